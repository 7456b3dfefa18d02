"""What every trainer needs and no paper is about: flags, run folder, batches, optimizer, log.

A script calls these in the order in which they stand here. There is no trainer class: the loop, the
loss and the metrics are in the script.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import torch

import processes
import sharding
from common import (
    BadInput,
    Ended,
    NonFinite,
    Progress,
    claim,
    file_hash,
    first_to_fail,
    flag_name,
    naming,
    natural,
    not_negative,
    one_line,
    positive_int,
    read_json,
    refuse_no_folder,
    refuse_unwritable,
    refusing,
    remove_leftovers,
    seed,
    whole_folder,
    write_json,
    write_text,
)
from formats import dataset
from formats.files import image_identity

# ---- the command line


def add_model_flags(parser, without, several=False):
    """Where the model comes from and how it runs. without: what happens without --model.

    several: --model is a list.
    """
    group = parser.add_argument_group("model")
    flag = group.add_argument
    flag(
        "--model",
        nargs="+" if several else None,
        action="extend" if several else "store",
        metavar="DIR_OR_HUB_ID",
        help=f"LLaVA checkpoint; without it: {without}",
    )
    flag(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, ...; auto takes cuda where there is one",
    )
    flag(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of frozen weights and arithmetic (what trains is float32); auto: bfloat16 on a GPU "
        "that has it, else float32",
    )
    flag(
        "--quantize",
        choices=("none", "nf4"),
        help="nf4: the linear layers of the LLM's blocks in 4 bits, an eighth of float32, a "
        "quarter of bfloat16; only LoRA trains on them (default: what --adapter was trained on, "
        "else none)",
    )
    flag(
        "--template",
        help="prompt: vicuna_v1, mistral, chatml, plain, or checkpoint, its chat template "
        "(default: what the checkpoint was trained with)",
    )
    flag(
        "--image-aspect",
        choices=("pad", "checkpoint"),
        help="pad to a square as LLaVA-1.5 was trained, or centre crop as transformers does "
        "(default: what the checkpoint notes, else pad); no effect on LLaVA-NeXT, which cuts tiles",
    )
    return group


def add_data_flags(parser):
    """Which rows are read, and where a run writes -> the group of these flags."""
    group = parser.add_argument_group("data and run folder")
    flag = group.add_argument
    flag(
        "--data",
        action="append",
        metavar="FILE",
        help="data file, layout recognised; may be repeated",
    )
    flag(
        "--images",
        metavar="DIR",
        help="folder below which image paths are looked up (default: the data file's, `images` in "
        "it, and where a script that wrote the file put its images)",
    )
    flag(
        "--subset",
        type=positive_int,
        metavar="N",
        help="draw N of the rows by --seed, as the papers' 5,000 of a larger set were drawn by "
        "theirs; which rows those were is not published (default: all rows)",
    )
    flag(
        "--skip-bad-rows",
        action="store_true",
        help="leave out rows that cannot be used and list them in skipped.json; without it, such "
        "a row stops the run, before it starts wherever that can be seen",
    )
    flag(
        "--check-images",
        choices=("full", "header"),
        default="full",
        help="before the run decode every image, which finds broken files (5 minutes for 100,000 "
        "photographs on one core, once), or read its header (seconds); full is also taken with "
        "--skip-bad-rows where images are read outside of a step (default %(default)s)",
    )
    flag("--out", metavar="DIR", help="run folder (default: runs/<script>-<next number>)")
    flag(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint of --out; other flags must be the same, but for the "
        "micro-batches of a batch, --gradient-checkpointing, --check-images and --workers",
    )
    flag("--seed", type=seed, default=0, help="of world, base model and run")
    return group


def add_training_flags(
    parser, lr, projector_lr, lora_rank, epochs, batch_size, grad_accum, schedule="cosine"
):
    """The flags that all trainers share, with the defaults of the script's paper.

    Its batch is batch_size x grad_accum. batch_size rows of a LLaVA-NeXT-7B fit an 80 GB GPU with
    LoRA, which is every script's default but sft.py's.
    """
    add_model_flags(parser, "the toy base model of --seed, and toy settings")
    flag = add_data_flags(parser).add_argument
    flag(
        "--save-every",
        type=natural,
        default=100,
        metavar="N",
        help="steps between checkpoints; 0 = none (default %(default)s)",
    )
    flag("--no-eval", action="store_true", help="no evaluation before and after training")

    flag = parser.add_argument_group("training").add_argument
    flag("--steps", type=positive_int, help="optimizer steps; overrides --epochs")
    flag(
        "--epochs",
        type=positive_int,
        default=epochs,
        help="passes over the data (default %(default)s)",
    )
    flag(
        "--batch-size",
        type=positive_int,
        default=batch_size,
        metavar="N",
        help="rows a forward pass of each process (default %(default)s)",
    )
    flag(
        "--grad-accum",
        type=positive_int,
        default=grad_accum,
        metavar="N",
        help="forward passes an optimizer step; N x batch size x processes is the batch (default 1 "
        "with a given --batch-size, else %(default)s / processes)",
    )
    flag(
        "--lr",
        type=not_negative,
        default=lr,
        help="of LoRA, or of the LLM with --lora-rank 0; 0 freezes it (default %(default)s)",
    )
    flag(
        "--projector-lr",
        type=not_negative,
        default=projector_lr,
        help="0 = projector frozen (default %(default)s)",
    )
    flag(
        "--schedule",
        default=schedule,
        choices=("cosine", "constant"),
        help="of the learning rates after the warm-up (default %(default)s)",
    )
    flag(
        "--lora-rank",
        type=natural,
        default=lora_rank,
        metavar="N",
        help="rank of LoRA on all linear layers of the LLM, alpha = 2 rank; 0 = full tuning, "
        "of a 7B 108 GB "
        "(default %(default)s)",
    )
    flag(
        "--merge",
        action="store_true",
        help="after LoRA also write model/: LoRA merged, a checkpoint that needs no adapter",
    )
    flag(
        "--max-length",
        type=natural,
        default=0,
        metavar="N",
        help="refuse longer prompt + answer; 0 = the LLM's context",
    )
    flag(
        "--workers",
        type=natural,
        default=4,
        metavar="N",
        help="threads that decode the next images while the device works (default %(default)s)",
    )
    flag(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, a third slower",
    )


def parse_run(parser):
    """The flags of a script with a run folder -> args. Nothing is loaded or made.

    Of several processes, none goes on before all have checked their flags.
    """
    args = parser.parse_args()

    # the run folder
    if args.resume and not (args.out and (Path(args.out) / "args.json").is_file()):
        raise BadInput(
            f"--resume needs --out with the folder of a run; {args.out}/args.json is not there."
        )
    if not args.resume and args.out:
        refuse_used(Path(args.out))
    refuse_unwritable(args.out)

    if args.model and not args.data:
        raise BadInput(
            "--model needs --data: a data file in one of the layouts of formats/layouts.py."
        )
    args.toy_world = None  # lab.toy.fill sets it
    processes.start(args.device)
    return args


def refuse_used(out):
    """Refuse a folder of --out that holds more than what a run killed in its first moment leaves."""
    first = {"skipped.json", "skipped.json.tmp", "args.json.tmp"}
    left = lambda name: name in first or name.startswith(".probe-")  # of `refuse_unwritable`
    if os.path.lexists(out) and not (out.is_dir() and all(map(left, os.listdir(out)))):
        raise BadInput(f"--out {out} exists; give another folder, or --resume to go on with it.")


def parse(parser):
    """`parse_run` for a script that trains."""
    args = parse_run(parser)
    if args.quantize == "nf4" and (not args.lora_rank or not args.lr):
        raise BadInput(
            f"--quantize nf4 with --lora-rank {args.lora_rank} and --lr {args.lr}: "
            "4-bit weights do not train; LoRA on them does, with a rank and a rate above 0."
        )

    # with --batch-size, the batch that was asked for; else the paper's
    if "grad_accum" not in args.given:
        whole, n = args.grad_accum, processes.total
        args.grad_accum = 1 if "batch_size" in args.given else math.ceil(whole / n)
        is_toy = not args.model and not getattr(args, "vision", None)  # has a batch of its own
        if "batch_size" not in args.given and whole % n and not is_toy:
            raise BadInput(
                f"{n} processes do not divide the {whole} forward passes of a step; --grad-accum "
                f"says how many each makes: with {args.grad_accum} the batch is "
                f"{args.grad_accum * n * args.batch_size} rows in place of "
                f"{whole * args.batch_size}."
            )
    return args


def device_and_dtype(args):
    """--device and --dtype -> (torch.device, torch.dtype)."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes.total > 1:
        name = f"cuda:{processes.number}"
    device = device_of(name, "--device")
    if device.index is not None:  # else some libraries would also work on GPU 0
        torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # on a GPU, float32 would round the tower's convolution
    dtype, has_bfloat16 = args.dtype, True
    if device.type == "cuda":  # emulated on cards before Ampere: slower than float32
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and not has_bfloat16:
        raise BadInput(
            f"--dtype bfloat16: {torch.cuda.get_device_name(device)} has no bfloat16 arithmetic; "
            "float32 is accepted."
        )
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and has_bfloat16 else "float32"
    return device, getattr(torch, dtype)


def device_of(name, flag):
    """The torch.device of this name, if it can be used. flag: where the name was given."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"{flag} {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def show_memory(
    args, device, dtype, rows, packed=None, together=False, drawn=0, beside=(), plan=None
):
    """Print in one line what the run will need and what the device has; no weight is read.

    packed: a function (processor, Examples) -> Examples as they are trained on, if not as they are.
    together: rows of one image are packed in one. beside: other checkpoints on the same device.
    plan: a `memory.Plan`. drawn: a row trains on so many answers of `plan.new` tokens.
    The longest row is looked for among the 64 with the most characters.
    """
    import memory
    from formats import checkpoints

    outline = functools.partial(checkpoints.load, dtype=dtype, device="meta")
    if args.model:
        model, processor = outline(args.model, template=args.template)
    else:  # sft.py composes one
        model, processor = checkpoints.compose(args.vision, args.llm, dtype, "meta")

    groups = {}
    for i, record in enumerate(rows.records):
        key = record.image if together and record.image is not None else i
        groups.setdefault(key, []).append(record)
    letters = lambda records: sum(len("".join(r.turns + r.answers)) for r in records)
    some = sorted(groups.values(), key=letters, reverse=True)[:64]
    encoded = [dataset.encode(processor, r, together)[0] for group in some for r in group]
    examples = [e for e in encoded if e]  # the others are refused later, with their reasons
    if not examples:
        return
    examples = packed(processor, examples) if packed else examples
    if drawn:
        answers = [torch.zeros(plan.new)] * drawn
        examples = [replace(e, answers=answers) for e in examples]
    size = sum(memory.numbers(outline(name)[0]) for name in beside) * dtype.itemsize

    load = memory.longest(model, examples, min(args.batch_size, len(rows.records)))
    room = memory.available(device)
    plan = replace(plan or memory.Plan(), beside=size, shards=processes.total)
    print(memory.says(model, args, load, device, room, plan), file=sys.stderr)


# ---- run folder


def start(args, script, skipped=(), more_data=()):
    """Create the run folder (or check it, with --resume) and seed everything -> its Path.

    args.json holds every resolved flag, versions, a hash of each data file, and what was skipped.
    skipped: the rows that --skip-bad-rows left out. more_data: data files besides those of --data.
    """
    flags = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "given")}
    packages = ("torch", "transformers", "pillow", "numpy", "safetensors")
    record = {
        "script": script,
        "flags": flags,
        "processes": processes.total,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "data": {},
        "skipped": list(skipped),
    }
    for path in [*args.data, *more_data]:
        if not Path(path).is_file():
            raise BadInput(f"--data {path}: no such file.")
        record["data"][path] = file_hash(path)
    if args.resume:
        out = Path(args.out)
        check_same_run(read_json(out / "args.json"), record)
    out = processes.from_first(run_folder(args, script) if processes.number == 0 else None)
    if not args.resume and processes.number == 0:
        if args.skip_bad_rows:  # a resumed run keeps it: rows may have been added in the run
            write_json(out / "skipped.json", list(skipped))
        write_json(out / "args.json", record)
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    print(f"run folder {out}", file=sys.stderr)
    return out


def run_folder(args, script):
    """Make --out, or runs/<script>-<n> with the first n that is not taken -> its Path, locked.

    With --resume it is there, and what a killed process left half-written in it is removed.
    """
    if args.resume:
        out = Path(args.out)
    elif args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
    else:
        Path("runs").mkdir(exist_ok=True)
        for n in range(10**6):
            out = Path("runs", f"{script}-{n}")
            with contextlib.suppress(FileExistsError):
                out.mkdir()
                break
    claim(out)
    if args.out and not args.resume:
        refuse_used(out)  # another run may have begun in it since the flags were read
    if args.resume:
        remove_leftovers(out)
        refuse_no_folder(out / "checkpoints")
        for half in (out / "checkpoints").glob("step-*.tmp"):
            shutil.rmtree(half, ignore_errors=True)
    return out


@refusing("--resume", "args.json is not what the run wrote")
def check_same_run(old, new):
    """Refuse to resume with other flags, versions, data or rows that are left out, by name.

    The number of processes may change, if --grad-accum changes with it so that the batch does not.
    So may what only costs memory or time, for a run that lacked memory: the micro-batches of the
    same batch, and checkpointing. Up to rounding the steps are the same; where something is
    drawn for each micro-batch, or sampling batches shrink (`batch_of`), the draws are others.
    """
    for kind in ("flags", "versions", "data"):
        if not isinstance(old.get(kind), dict):
            raise BadInput(
                f"--resume: args.json has no {kind}; the file that the run wrote is needed."
            )
    old, new = (
        r
        | {
            "flags": r["flags"]
            | {"grad_accum": r["flags"].get("grad_accum", 1) * r.get("processes", 1)}
        }
        for r in (old, new)
    )
    may_change = {"gradient_checkpointing", "workers", "check_images"}
    batches = [r["flags"].get("batch_size", 1) * r["flags"]["grad_accum"] for r in (old, new)]
    if batches[0] == batches[1]:
        may_change |= {"batch_size", "grad_accum"}
    for kind in ("flags", "versions", "data"):
        for name in old[kind].keys() | new[kind].keys():
            was, is_now = old[kind].get(name), new[kind].get(name)
            if was != is_now and name not in may_change:
                what = flag_name(name) if kind == "flags" else name
                what += " x processes" * (name == "grad_accum")
                raise BadInput(
                    f"--resume: {what} was {was} and is now {is_now}; "
                    "a resumed run must be the same run."
                )
    # another number of examples would put others into every step
    was, is_now = (Counter((s["file"], s["row"]) for s in r.get("skipped", ())) for r in (old, new))
    changed = (was - is_now) + (is_now - was)
    if changed and "skipped" in old:
        file, row = min(changed)
        back = was[file, row] > is_now[file, row]
        how = "was left out and is now used" if back else "was used and is now left out"
        raise BadInput(f"--resume: {file}, row {row} {how}; a resumed run must be the same run.")


class Clock:
    """Seconds of a run by part: `lap("train")` adds to a part the time since the last lap."""

    def __init__(self):
        self.seconds = dict.fromkeys(("setup", "reference", "train", "eval"), 0.0)
        self.last = time.time()

    def lap(self, part):
        """Add to this part -> the seconds that were added."""
        now = time.time()
        passed, self.last = now - self.last, now
        self.seconds[part] = self.seconds.get(part, 0.0) + passed
        return passed


def show_prompt(processor, text="...", who=""):
    """Print how a question about an image is asked. who: names the model, where there are two."""
    ids, _ = processor.ids_of([(processor.user_pieces(text + processor.ask, True, 1), False)])
    decode = processor.tokenizer.decode
    print(
        f"{who}template {processor.template}, image aspect {processor.image_aspect}; "
        f"asked as {decode(ids)!r}, an answer ends with {decode([processor.end_id])!r}",
        file=sys.stderr,
    )


# ---- batches, schedule, optimizer


def global_batch(args):
    """Examples of an optimizer step."""
    return args.batch_size * args.grad_accum * processes.total


def total_steps(args, n):
    """--steps, or what --epochs makes of n examples."""
    if processes.total > n:
        raise BadInput(f"{processes.total} processes for {n} examples; at most {n} are accepted.")
    return args.steps or math.ceil(n * args.epochs / global_batch(args))


def batch_of(step, args, n, size=None):
    """The examples of an optimizer step, as indices -> all of them, and the micro-batches.

    The micro-batches are pairs (number, indices): those of this process. size: of each, by default
    --batch-size; a script that samples takes --sample-batch-size, or less where several processes
    would not get one each. Every epoch is a new seeded permutation. The result depends on seed and
    step alone, so a resumed run needs no saved position. With --epochs the last step takes what is
    left.
    """
    chosen, micro_batches = whole_batch(step, args, n, size)
    sharding.expected = math.ceil(len(micro_batches) / processes.total)
    return chosen, processes.share(micro_batches)


def whole_batch(step, args, n, size=None):
    """`batch_of` with the micro-batches of all processes."""
    whole = global_batch(args)
    # a part for each process
    size = min(size or args.batch_size, args.batch_size * args.grad_accum)
    end = (step + 1) * whole if args.steps else min((step + 1) * whole, n * args.epochs)
    chosen = shuffled(step * whole, end, n, args.seed)
    return chosen, list(enumerate(chunks(chosen, size)))


def chunks(items, size):
    """Consecutive lists of at most `size`."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def batches(step, args, out, processor, examples, save, size=None, beside=()):
    """The examples of an optimizer step -> the indices of all, and this process's micro-batches.

    A micro-batch (number, indices) is given as soon as its images are decoded, on --workers
    threads, which also begin with the next step's. size: as for `batch_of`. out, save: for rows
    whose image cannot be decoded (`readable`); save(step) writes the run's checkpoint. beside: for
    each example another one that is used with it, whose image is decoded ahead, too.
    """
    end_after_steps(save, step)
    indices, mine = batch_of(step, args, len(examples), size)
    later = processes.share(whole_batch(step + 1, args, len(examples), size)[1])
    lists = (examples, beside) if beside else (examples,)
    ahead = [e[i] for _, micro in [*mine, *later] for i in micro for e in lists]
    processor.prefetch.expect([e.record.image for e in ahead])
    return indices, readable(mine, step, args, out, processor, examples, save)


before_steps = {}  # {signal: what it did before the steps of this run}
asked_to_end = []  # the signals that came since


def end_after_steps(save, step):
    """From the first step on, Ctrl-C and SIGTERM wait for a step's end, and are obeyed here.

    The steps so far are saved. A second signal ends the run at once. Of several processes torchrun
    is the one to ask.
    """
    if asked_to_end:
        number = asked_to_end.pop()
        restore_signals()
        keep_steps(save, step)
        raise Ended(number)
    if before_steps or processes.total > 1:
        return
    if threading.current_thread() is not threading.main_thread():
        return

    def ask(number, _):
        """Note the signal."""
        if asked_to_end:
            raise Ended(number)
        asked_to_end.append(number)
        print("\nending after this step; once more ends now", file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM):
        before_steps[number] = signal.signal(number, ask)


def restore_signals():
    """After the last step, signals end the run as before the first."""
    for number, handler in before_steps.items():
        signal.signal(number, handler)
    before_steps.clear()
    if asked_to_end:  # it came in the last step
        raise Ended(asked_to_end.pop())


def readable(micro_batches, step, args, out, processor, examples, save, any_left=False):
    """Yield the micro-batches of a step without the rows whose image can no longer be decoded.

    With --skip-bad-rows they are listed in skipped.json; they count as 0 in the means of the step.
    Without it, with several processes, or where no row is left, the run stops; once the file is
    repaired, --resume goes on. No weight has moved until then: that is the checkpoint's state.
    any_left: the step has other rows already.
    """
    for number, micro in micro_batches:
        good = []
        for i in micro:
            record = examples[i].record
            try:
                if record.image is not None:
                    processor.prefetch.get(record.image)
                good.append(i)
            except BadInput as error:
                if not args.skip_bad_rows or processes.total > 1:
                    stop(f"{record.where}: {error}", save, step)
                add_skipped(out, dataset.located(record.where, str(error)))
        if good:
            any_left = True
            yield number, good
    if micro_batches and not any_left:
        stop(f"{record.where}: no row of this step has an image that can be decoded.", save, step)


def stop(why, save, step):
    """Write a checkpoint of the steps before this one, if possible, and raise BadInput."""
    if keep_steps(save, step):
        raise BadInput(f"{why} The steps before are saved; --resume goes on from there.")
    raise BadInput(f"{why} --resume goes on from the last checkpoint, or begins anew without one.")


def keep_steps(save, step):
    """Before an error ends the run: write a checkpoint of the `step` updates so far -> written?

    Of several processes the first to fail writes it alone. It cannot if each holds but a part of
    the weights (sharding.py).
    """
    if not step or sharding.divided or not first_to_fail():
        return False
    save(step, alone=True)
    return True


def add_skipped(out, row):
    """Add a row that failed in the run to skipped.json, once."""
    path = out / "skipped.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    if row not in rows:
        write_json(path, [*rows, row])
        print(f"skipped: {row['file']}, row {row['row']}: {row['why']}", file=sys.stderr)


def shuffled(start, end, n, seed):
    """Items start .. end - 1 of an endless sequence of seeded permutations of 0 .. n - 1."""
    return [_permutation(seed, j // n, n)[j % n] for j in range(start, end)]


@functools.lru_cache(maxsize=2)
def _permutation(seed, epoch, n):
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def schedule(step, steps, kind="cosine", warmup=0.03):
    """Factor of the learning rate: linear warm-up over 3 % of the steps, then a cosine to 0.

    As in the scripts of Li et al. 2024. kind "constant": 1 after the warm-up, as Amirloo et al. and
    Sun et al. train reward models (Amirloo et al. PPO too).
    """
    ramp = math.ceil(warmup * steps)
    if step < ramp:
        return (step + 1) / ramp
    if kind == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def optimizer_for(model, lr, projector_lr, vision_lr=0.0):
    """AdamW without weight decay, a learning rate for each part; groups remember it as `base_lr`.

    beta2 is .98 where the papers' scripts keep .999, for which hundreds of steps are too few.
    Of several processes, each keeps a part of an LLM that trains whole (sharding.py).
    """
    processes.check_same(trainable(model))
    sharding.shard(model)
    rates = {"llm": lr, "projector": projector_lr, "vision": vision_lr, "heads": lr}
    groups = []
    for name, rate in rates.items():
        trained = [p for p in getattr(model, name).parameters() if p.requires_grad]
        for params in sharding.apart(trained):
            groups.append({"params": params, "lr": rate, "base_lr": rate, "name": name})
    if not groups:
        raise BadInput("nothing trains: --lr, --projector-lr and the other rates are all 0.")
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def numbers(metrics):
    """{name: number or tensor ()} -> {name: float}, 0 for a name without a number.

    One transfer. A loop that does not sample queues its work and waits for the device here, and
    again for the norm in `clip_gradients`. The numbers of several processes are added.
    """
    sharding.finish_passes()

    tensors = {name: x for name, x in metrics.items() if torch.is_tensor(x)}
    if tensors:
        values = torch.stack([x.detach().double() for x in tensors.values()]).tolist()
        metrics = {**metrics, **dict(zip(tensors, values))}
    return defaultdict(float, processes.summed(metrics))


def clip_gradients(optimizer, max_norm):
    """Scale the gradient of all trained parameters down to `max_norm` -> its norm before.

    It is the sum of the gradients of all processes.
    """
    whole, parts = [], []
    for group in optimizer.param_groups:
        (parts if sharding.is_part(group["params"][0]) else whole).extend(group["params"])
    processes.add_gradients(whole)
    if parts:
        return sharding.clip(whole, parts, max_norm)
    return float(torch.nn.utils.clip_grad_norm_(whole, max_norm))


def check_finite(loss, grad_norm, where):
    """Stop before the optimizer step if a number is not finite. where: the names of its rows."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFinite(
            f"loss {loss}, gradient norm {grad_norm} at {'; '.join(where)}; no step was taken."
        )


def take_step(optimizer, factor):
    """Update the weights at `factor` times each group's learning rate; forget the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ---- checkpoints: whole or absent, and enough to go on bit for bit


def trainable(model):
    """{name: parameter} of what trains."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(out, step, model, optimizer, alone=False, state=None, keep=2):
    """Write `out/checkpoints/step-<step>/` aside, flush, rename; then point `latest` to it.

    Saved are what trains, the optimizer, the random generators, and the algorithm's own `state`, a
    dict of JSON values (a running mean, say). The last `keep` checkpoints remain.
    alone: this process writes, without the others; else process 0 does.
    """
    from formats.weights import write_tensors

    writes = alone or processes.number == 0
    tensors = {}
    for n, p in trainable(model).items():
        saved = {f"model.{n}": p.detach()}
        saved |= {f"optimizer.{n}.{k}": v for k, v in optimizer.state[p].items()}
        for name, tensor in saved.items():
            tensor = sharding.whole(tensor)  # all processes take part, and one keeps it
            if writes:
                tensors[name] = tensor.contiguous()
    if not writes:
        return
    tensors["rng.cpu"] = torch.get_rng_state()
    if model.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(model.device)

    folder = out / "checkpoints"
    final = folder / f"step-{step:06d}"
    aside = final.with_suffix(".alone.tmp" if alone else ".tmp")  # the others may just write, too
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write_tensors(tensors, aside / "state.safetensors")
        with open(aside / "state.safetensors", "rb") as file:
            os.fsync(file.fileno())
        write_json(aside / "state.json", {"step": step, "state": state or {}})
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # its room, on a disk that may be full
        raise
    if final.exists():  # a run resumed from an older step passes this one again
        shutil.rmtree(final)
    os.replace(aside, final)
    write_text(folder / "latest", final.name)

    whole = [p for p in folder.glob("step-*") if not p.name.endswith(".tmp")]
    for old in sorted(whole, key=lambda p: int(p.name.removeprefix("step-")))[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(out, model, optimizer, state=None):
    """Restore a run's last checkpoint -> the step to go on with; 0 without a checkpoint.

    One whose files cannot be read gives way to the one before it, which is said. What can be read
    but cannot be right is refused: another model's parameters, NaN, the step of another folder.

    `state`, the dict that was given to `save_checkpoint`, is updated in place.
    """
    folder, tensors, saved = last_checkpoint(out / "checkpoints")
    if not folder:
        return 0
    check_checkpoint(folder, tensors, saved, trainable(model))
    with torch.no_grad():
        for n, p in trainable(model).items():
            p.copy_(sharding.part_like(p, tensors[f"model.{n}"]))
            prefix = f"optimizer.{n}."
            mine = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            optimizer.state[p] = {k: sharding.part_like(p, v) for k, v in mine.items()}
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and model.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], model.device)
    if state is not None:
        state.update(saved["state"])
    return saved["step"]


def last_checkpoint(folder):
    """The newest checkpoint whose files can be read -> (its folder, tensors, state.json).

    (None, None, None) if none was ever written. `latest` may name an older one than the newest.
    """
    from safetensors.torch import load_file

    # 1. candidates, newest first
    number = lambda path: int(path.name.removeprefix("step-"))
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-[0-9]{1,18}", p.name)]
    found.sort(key=number, reverse=True)
    pointer = folder / "latest"
    if not found and not pointer.exists():
        return None, None, None
    name = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    if re.fullmatch(r"step-[0-9]{1,18}", name):  # nothing that leads out of the folder
        named = folder / name
        found = [p for p in found if number(p) <= number(named)]
        found = found if named in found else [named, *found]

    # 2. the first that is whole
    damaged = []
    for path in found:
        try:
            tensors = load_file(path / "state.safetensors")
            saved = json.loads((path / "state.json").read_text())
            saved["step"], saved["state"].items(), tensors["rng.cpu"]
        except Exception as error:  # missing, cut short, no JSON; safetensors has its own class
            damaged.append(f"{path} is damaged ({one_line(error)})")
            continue
        if damaged:
            print(f"{'; '.join(damaged)}: going on from {path}", file=sys.stderr)
        return path, tensors, saved
    raise BadInput(f"--resume: {'; '.join(damaged) or folder}; no whole checkpoint is left.")


def check_checkpoint(folder, tensors, saved, params):
    """Refuse a checkpoint that is readable, but cannot be one of this run."""
    from formats.weights import check_values

    file = folder / "state.safetensors"
    one_side = {f"model.{n}" for n in params} ^ {k for k in tensors if k.startswith("model.")}
    if one_side:
        raise BadInput(
            f"{folder}: parameter {min(one_side)} is only on one side; "
            "the checkpoint is of another model."
        )
    if not any(name.startswith("optimizer.") for name in tensors):
        raise BadInput(f"{file}: holds nothing of the optimizer, which cannot start anew.")
    for name, tensor in tensors.items():
        if not name.startswith("rng."):
            check_values(tensor, name, file)
    for name, p in params.items():
        shapes = {"step": (), "exp_avg": tuple(p.shape), "exp_avg_sq": tuple(p.shape)}
        shapes = {f"optimizer.{name}.{kind}": shape for kind, shape in shapes.items()}
        missing = sorted(shapes.keys() - tensors.keys())
        if 0 < len(missing) < len(shapes):  # none at all: it never had a gradient
            raise BadInput(f"{file}: {missing[0]} is missing, which belongs to the other two.")
        for kind, shape in {f"model.{name}": tuple(p.shape), **shapes}.items():
            if kind in tensors and tuple(tensors[kind].shape) != shape:
                found = tuple(tensors[kind].shape)
                raise BadInput(f"{file}: {kind} has the shape {found}, not {shape}.")
    for name, here in (("rng.cpu", torch.get_rng_state()), ("rng.cuda", None)):
        state = tensors.get(name)
        same = here is None or state is None or state.shape == here.shape
        if state is not None and not (same and state.dtype == torch.uint8):
            raise BadInput(f"{file}: {name} is no state of a random generator of this version.")
    if type(saved["step"]) is not int or saved["step"] != int(folder.name.removeprefix("step-")):
        raise BadInput(f"{folder}/state.json: step is {saved['step']!r}; its folder says another.")


def save_result(out, model, processor, args):
    """What training leaves: a PEFT `adapter/`; without LoRA, or with --merge, a whole `model/`.

    A base that was composed in this run is on no disk, so an adapter alone would be of no use.

    A resumed run writes again what it may have written before it was stopped.
    """
    from formats import adapters, checkpoints

    if args.resume and processes.number == 0:
        for name in ("adapter", "model"):
            shutil.rmtree(out / name, ignore_errors=True)
    lora = args.lora_rank and args.lr
    if lora and processes.number == 0:
        adapters.save_adapter(model, out / "adapter", args.model, processor=processor)
    if args.merge or not lora or not args.model:
        checkpoints.save(model, processor, out / "model")
    sharding.gather(model)


def fingerprint(model, processor, examples):
    """A hash of all that log-probs of the model as it was loaded depend on, for the cache.

    Weights and images are known by their files (`file_identity`), none of which is read.
    """
    from nf4 import quantised

    parts = [
        (model.source, quantised(model), model.dtype, model.device.type),
        (processor.image_aspect, processor.image_size, processor.image_mean, processor.image_std),
        (model.feature_layer, model.keep_cls, model.anyres, model.image_token_id),
        (model.vision.config, model.llm.config),
    ]
    lines = [repr(part) for part in parts]
    for e in examples:
        answers = [a.tolist() for a in e.answers]
        weights = [w.tolist() for w in e.weights] if e.weights else ""
        lines.append(f"{image_identity(e.record.image)} {e.prompt.tolist()} {answers}{weights}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def cached(name, compute):
    """The tensor that `compute` gives, kept in `.cache/<name>/`: computed at the first use only."""
    from formats.weights import write_tensors

    folder = Path(".cache") / name
    tensor = processes.from_first(read_cached(folder) if processes.number == 0 else None)
    if tensor is not None:
        print(f"from the cache: {folder}", file=sys.stderr)
        return tensor
    tensor = compute()
    if processes.number == 0:
        with whole_folder(folder) as aside:
            write_tensors({"tensor": tensor}, aside / "tensor.safetensors")
    return tensor


def read_cached(folder):
    """The tensor in a folder of `cached`; None if there is none, or one that cannot be right."""
    from safetensors.torch import load_file

    if not folder.is_dir():
        return None
    try:
        tensor = load_file(folder / "tensor.safetensors")["tensor"]
        if tensor.isfinite().all():
            return tensor
        why = "it holds NaN or infinity"
    except Exception as error:  # missing, cut short; safetensors has its own class
        why = one_line(error)
    print(f"{folder} is damaged and computed anew ({why})", file=sys.stderr)
    shutil.rmtree(folder)
    return None


# ---- log


class Log:
    """metrics.jsonl, a line a step (`step` = updates done before it), and the progress line.

    Process 0 writes it.
    """

    def __init__(self, out, first, steps):
        if first > steps:
            raise BadInput(f"{out}: its checkpoint is of step {first}; this run has {steps} steps.")
        if processes.number:
            return
        path = out / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = []
        for i, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                continue  # a killed run may leave half a line
            try:
                before = json.loads(line)["step"] < first
            except (ValueError, TypeError, KeyError, RecursionError):
                raise BadInput(f"{path}, line {i}: not a step of a run.") from None
            kept += [line.decode()] * before
        write_text(path, "".join(kept))
        self.path, self.first = path, first
        self.progress = Progress("step", steps, first)

    def __call__(self, step, show, metrics):
        """Write one step's metrics; `show` names those on the progress line."""
        if processes.number:
            return
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        values = "".join(f"{name} {metrics[name]:.4f}  " for name in show)
        if step == self.first:
            print(f"step {step}: {values}", file=sys.stderr)
        self.progress(step + 1, values)
        if step + 1 == self.progress.total:
            restore_signals()
