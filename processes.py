"""Several processes of one run on one machine, a GPU each: torchrun --nproc-per-node N dpo.py ...

Every process holds the model and reads the data. The micro-batches of a step are dealt to them
(`training.batch_of`), their gradients are added before the step (`add_gradients`), and process 0
alone prints and writes. Other work is divided by `share`, and `joined`.

Without torchrun there is one process: nothing here does anything, and torch.distributed is not
loaded.
"""

import atexit
import contextlib
import datetime
import os
import signal
import sys
import threading
from pathlib import Path

import common
from common import BadInput

number, total = 0, 1  # this process, and how many there are; `start` sets them


def start(device):
    """Join the run that torchrun started, if it did. device: --device, of which each has its own.

    From here on process 0 alone prints.
    """
    global number, total
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or total > 1:
        return
    import torch
    import torch.distributed as dist

    n = int(os.environ["WORLD_SIZE"])
    if n != int(os.environ["LOCAL_WORLD_SIZE"]):
        raise BadInput(f"{n} processes on several machines; those of one machine are accepted.")
    if device not in ("auto", "cpu", "cuda"):
        raise BadInput(f"--device {device} with {n} processes; accepted are auto, cpu, cuda.")
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if 0 < gpus < n:
        raise BadInput(f"{n} processes and {gpus} GPUs; each process needs one of its own.")
    number, total = int(os.environ["RANK"]), n
    if gpus:
        torch.cuda.set_device(number)

    # Waiting is no error here: others may build a toy world or ask a judge for long. A process
    # that has died is noticed by torchrun, and at once by gloo.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=datetime.timedelta(days=7)
    )
    atexit.register(dist.destroy_process_group)
    common.process_ids[:] = gathered(os.getpid())
    watch_for_the_end()
    gathered(None)  # none goes on before all can be told to end
    if number:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


def watch_for_the_end():
    """When torchrun ends this process, because another has failed, say so and end at once.

    A thread does it: the main one may wait inside a collective, where Python handles no signal.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(write)
    stderr = sys.stderr

    def wait():
        """Read signal numbers, as Python's own handler writes them."""
        while os.read(read, 1)[0] != signal.SIGTERM:
            pass
        told = common.mark_of(f"told-{os.getpid()}")
        if told:
            told.touch()
        stopped = f"{Path(sys.argv[0]).name}: torchrun ended the run"
        common.end(common.lost() or stopped, 1, stderr, patience=0)

    threading.Thread(target=wait, daemon=True).start()


def environment():
    """The environment for a script that this process runs, as a run of one process."""
    ours = ("RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")
    return {k: v for k, v in os.environ.items() if not any(name in k for name in ours)}


# ---- values


def gathered(value):
    """The value of every process, in their order; any that pickle takes, tensors on the CPU."""
    if total == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * total
    dist.all_gather_object(values, value)
    return values


def from_first(value):
    """Process 0's value."""
    return gathered(value if number == 0 else None)[0]


def summed(values):
    """{name: float} of every process -> their sums by name; one may lack a name."""
    sums = {}
    for theirs in gathered(values):
        for name, value in theirs.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def share(parts):
    """The parts that this process works on: its own number, and every `total`-th from there."""
    return parts[number::total]


def joined(results):
    """What every process made of its `share` -> all of it, in the order of the parts."""
    everyone = gathered(results)
    places = range(len(everyone[0]))  # process 0 has as many as any other
    return [theirs[i] for i in places for theirs in everyone if i < len(theirs)]


@contextlib.contextmanager
def first_alone():
    """Process 0 runs the block first, then the others: they find in the cache what it built."""
    if number:
        gathered(None)
    yield
    if not number:
        gathered(None)


# ---- tensors


def joined_tensor(parts, device):
    """As `joined`, of tensors, one after another along their first dimension; None without any."""
    if total > 1:
        parts = joined([x.cpu() for x in parts])
    import torch

    return torch.cat(parts).to(device) if parts else None


def add_gradients(params, bucket=2**25):
    """Replace each gradient by the sum of those of all processes; None counts as zeros.

    A parameter without a gradient on any process stays without. The sums are computed a bucket of
    so many numbers at a time: LoRA of a 7B model has 450 small tensors.
    """
    if total == 1:
        return
    import torch

    present = zip(*gathered([p.grad is not None for p in params]))
    params = [p for p, flags in zip(params, present) if any(flags)]
    while params:
        some, size = [], 0
        while params and (not some or size + params[0].numel() <= bucket):
            some.append(params.pop(0))
            size += some[-1].numel()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
        flat = all_reduced(torch.cat([g.flatten() for g in grads]))
        for p, part in zip(some, flat.split([p.numel() for p in some])):
            p.grad = part.view_as(p)


def all_reduced(tensor):
    """The sum of every process's tensor."""
    import torch.distributed as dist

    dist.all_reduce(tensor)
    return tensor


def check_same(named):
    """BadInput unless all processes have the same {name: tensor}; by a sum of each."""
    if total == 1:
        return
    import torch

    sums = torch.stack([x.detach().double().sum() for x in named.values()]).tolist()
    for name, values in zip(named, zip(*gathered(sums))):
        if len(set(values)) > 1:
            raise BadInput(f"{name} differs between the processes; all must load the same weights.")
