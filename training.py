"""What is not the algorithm: command line, run folder, seeds, batches, schedule, checkpoints, log. No trainer."""

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

from model import BadInput


class NonFinite(RuntimeError):
    """A loss or gradient that is not a number; the run stops before the optimizer step. Exit status 1."""


def run(main):
    """Call main(); one sentence instead of a traceback for what the user can mend. Exit status 2, or 1 for non-finite numbers."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except BadInput as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
    except NonFinite as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(
            f"\n{script}: interrupted; the run folder keeps its last checkpoint, go on with --resume",
            file=sys.stderr,
        )
        sys.exit(130)


# ---- command line


class Parser(argparse.ArgumentParser):
    """argparse with whole flag names only, and mistakes raised as BadInput."""

    def __init__(self, description):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message):
        raise BadInput(f"{message}; --help lists what is accepted.")


def add_model_flags(parser):
    """Where the model comes from and how it runs: the same in every script."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        help="LLaVA checkpoint; without it: the toy base of --seed and toy settings",
    )
    group.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, ...; auto takes cuda where there is one",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of frozen weights and arithmetic (what trains is float32); auto: bfloat16 on cuda, else float32",
    )
    group.add_argument(
        "--template",
        help="prompt: vicuna_v1, mistral, chatml, plain (default: the checkpoint's own)",
    )
    group.add_argument(
        "--image-aspect",
        default="pad",
        choices=("pad", "checkpoint"),
        help="pad to a square as LLaVA-1.5 was trained, or centre crop as transformers does; LLaVA-NeXT: both are its tiles",
    )
    return group


def add_training_flags(parser, lr, projector_lr, lora_rank, epochs, batch_size):
    """The flags common to all trainers, with this paper's defaults."""
    add_model_flags(parser)
    group = parser.add_argument_group("data and run folder")
    group.add_argument(
        "--data",
        action="append",
        metavar="FILE",
        help="data file, layout recognised; may be repeated",
    )
    group.add_argument(
        "--images",
        metavar="DIR",
        help="folder below which image paths are looked up (default: the data file's)",
    )
    group.add_argument(
        "--skip-bad-rows",
        action="store_true",
        help="leave out rows that cannot be used, listed in skipped.json, instead of stopping before the run",
    )
    group.add_argument(
        "--out", metavar="DIR", help="run folder (default: runs/<script>-<next number>)"
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint of --out; other flags must be the same",
    )
    group.add_argument(
        "--save-every",
        type=int,
        default=100,
        metavar="N",
        help="steps between checkpoints; 0 = none (default %(default)s)",
    )
    group.add_argument("--seed", type=int, default=0, help="of world, base and run")
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, help="optimizer steps; overrides --epochs")
    group.add_argument(
        "--epochs", type=int, default=epochs, help="passes over the data (default %(default)s)"
    )
    group.add_argument(
        "--batch-size",
        type=int,
        default=batch_size,
        metavar="N",
        help="rows a forward pass (default %(default)s)",
    )
    group.add_argument(
        "--grad-accum",
        type=int,
        default=1,
        metavar="N",
        help="forward passes an optimizer step; N x batch size is the batch",
    )
    group.add_argument(
        "--lr",
        type=float,
        default=lr,
        help="of LoRA, or of the LLM with --lora-rank 0; 0 freezes it (default %(default)s)",
    )
    group.add_argument(
        "--projector-lr",
        type=float,
        default=projector_lr,
        help="0 = projector frozen (default %(default)s)",
    )
    group.add_argument(
        "--lora-rank",
        type=int,
        default=lora_rank,
        metavar="N",
        help="rank of LoRA on all linear layers of the LLM, alpha = 2 rank; 0 = full tuning (default %(default)s)",
    )
    group.add_argument(
        "--merge",
        action="store_true",
        help="after LoRA also write model/: LoRA merged, a checkpoint that needs no adapter",
    )
    group.add_argument(
        "--max-length",
        type=int,
        default=0,
        metavar="N",
        help="refuse longer prompt + answer; 0 = the LLM's context",
    )
    group.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, a third slower",
    )
    return group


def parse(parser, toy, argv=None):
    """Parse; without --model, take the `toy` settings for flags not given, and the toy world's files. Says so in one line."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    flags = {a.dest: a.option_strings for a in parser._actions}
    given = {
        dest for dest, options in flags.items() if any(t.split("=")[0] in options for t in argv)
    }
    args.toy_world = None
    if args.resume and not (args.out and (Path(args.out) / "args.json").is_file()):
        raise BadInput(
            f"--resume needs --out with the folder of a run; {args.out}/args.json is not there."
        )
    if not args.resume and args.out and Path(args.out).exists():
        raise BadInput(
            f"--out {args.out} exists; give another folder, or --resume to go on with it."
        )
    for name in ("steps", "epochs", "batch_size", "grad_accum"):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            raise BadInput(
                f"--{name.replace('_', '-')} is {getattr(args, name)}; at least 1 is needed."
            )
    for name in ("lora_rank", "max_length", "save_every", "lr", "projector_lr", "vision_lr"):
        value = getattr(args, name, 0)
        if not (math.isfinite(value) and value >= 0):
            raise BadInput(f"--{name.replace('_', '-')} is {value}; 0 or more is needed.")
    if args.lora_rank and getattr(args, "vision_lr", 0):
        raise BadInput(
            "--vision-lr trains the tower, which an adapter does not hold; give --lora-rank 0 with it."
        )
    if bool(getattr(args, "vision", None)) != bool(getattr(args, "llm", None)):
        raise BadInput("--vision and --llm go together: a model is composed of both.")
    if args.model is None and not (getattr(args, "vision", None) or getattr(args, "llm", None)):
        from lab import toyworld

        skip = given | ({"steps"} if "epochs" in given else set())
        used = {k: v for k, v in toy.items() if k not in skip}
        args.toy_world = str(toyworld.world(args.seed))
        for name, value in used.items():
            setattr(args, name, value)
        if "data" not in given:
            args.data = [str(toyworld.path(args.seed, name)) for name in toy["data"]]
        if "images" not in given and "data" not in given:
            args.images = str(Path(args.toy_world) / "images")
        if "vision" in toy:
            args.vision, args.llm = (
                str(toyworld.parts(args.seed) / toy[name]) for name in ("vision", "llm")
            )
        else:
            args.model = str(toyworld.base(args.seed))
        settings = " ".join(
            f"--{k.replace('_', '-')} {v}"
            for k, v in used.items()
            if k not in ("data", "vision", "llm")
        )
        print(f"no --model: toy world of seed {args.seed}, {settings}", file=sys.stderr)
    if not args.data:
        raise BadInput(
            "--model needs --data: a data file in one of the layouts that layouts.py lists."
        )
    return args


def device_and_dtype(args):
    """--device and --dtype -> (torch.device, torch.dtype)."""
    import torch

    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(
            f"--device {args.device} cannot be used: {str(error).splitlines()[0]}"
        ) from None
    dtype = (
        args.dtype if args.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    )
    return device, getattr(torch, dtype)


# ---- run folder


def write_text(path, text):
    """Write a file whole or not at all: aside, flushed to disk, renamed."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_json(path, value):
    """Write a value as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1))


def file_hash(path):
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def start(args, script, skipped=None, more=()):
    """Create (or, with --resume, check) the run folder and seed everything -> Path. args.json holds every resolved flag.

    skipped: the rows that --skip-bad-rows left out, for skipped.json. more: data files besides those of --data.
    """
    import torch

    out = (
        Path(args.out)
        if args.out
        else next(p for i in range(10**6) if not (p := Path("runs") / f"{script}-{i}").exists())
    )
    flags = {k: v for k, v in vars(args).items() if k not in ("out", "resume")}
    versions = {
        p: importlib.metadata.version(p)
        for p in ("torch", "transformers", "pillow", "numpy", "safetensors")
    }
    record = {"script": script, "flags": flags, "versions": versions, "data": {}}
    for path in [*args.data, *more]:
        if not Path(path).is_file():
            raise BadInput(f"--data {path}: no such file.")
        record["data"][path] = file_hash(path)
    if args.resume:
        old = json.loads((out / "args.json").read_text())
        for key in ("flags", "versions", "data"):
            for name in old[key].keys() | record[key].keys():
                a, b = old[key].get(name), record[key].get(name)
                if a != b:
                    what = f"--{name.replace('_', '-')}" if key == "flags" else name
                    raise BadInput(
                        f"--resume: {what} was {a} and is now {b}; a resumed run must be the same run."
                    )
    else:
        out.mkdir(parents=True)
        write_json(out / "args.json", record)
    if skipped is not None:
        write_json(out / "skipped.json", skipped)
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    print(f"run folder {out}", file=sys.stderr)
    return out


# ---- batches, schedule, optimizer


def total_steps(args, n):
    """--steps, or what --epochs makes of n examples."""
    return args.steps or math.ceil(n * args.epochs / (args.batch_size * args.grad_accum))


def batch_of(step, args, n):
    """The examples of an optimizer step, as grad_accum lists of indices: a seeded permutation an epoch, one after another.

    A function of seed and step alone, so that a resumed run needs no saved position. With --epochs the last step takes what is left.
    """
    size = args.batch_size * args.grad_accum
    end = (step + 1) * size if args.steps else min((step + 1) * size, n * args.epochs)
    chosen = shuffled(step * size, end, n, args.seed)
    return [chosen[i : i + args.batch_size] for i in range(0, len(chosen), args.batch_size)]


def shuffled(start, end, n, seed):
    """Places start .. end - 1 of an endless row of seeded permutations of 0 .. n - 1."""
    return [_permutation(seed, j // n, n)[j % n] for j in range(start, end)]


@functools.lru_cache(maxsize=2)
def _permutation(seed, epoch, n):
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def schedule(step, steps, warmup=0.03):
    """Factor of the learning rate: linear warm-up over 3 % of the steps, then a cosine to 0 (Li et al. 2024's scripts)."""
    ramp = math.ceil(warmup * steps)
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def optimizer_for(model, lr, projector_lr, vision_lr=0.0):
    """AdamW without weight decay, a learning rate for each part, which each group remembers as `base_lr`.

    beta2 is .98 where the papers' scripts keep .999: runs of hundreds of steps end before an average over thousands is warm.
    """
    import torch

    rates = {"llm": lr, "projector": projector_lr, "vision": vision_lr, "heads": lr}
    groups = []
    for name, rate in rates.items():
        params = [p for p in getattr(model, name).parameters() if p.requires_grad]
        if params:
            groups.append({"params": params, "lr": rate, "base_lr": rate, "name": name})
    if not groups:
        raise BadInput("nothing trains: --lr, --projector-lr and the other rates are all 0.")
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def optimizer_step(optimizer, factor, loss, rows, max_norm=1.0):
    """Clip the gradient to max_norm, set the rates, step -> gradient norm before clipping.

    A loss or gradient that is not finite stops the run here, before anything changes; `rows` are named in the message.
    """
    import torch

    params = [p for g in optimizer.param_groups for p in g["params"]]
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    if not math.isfinite(loss) or not torch.isfinite(norm):
        raise NonFinite(
            f"loss {loss}, gradient norm {float(norm)} at {'; '.join(rows)}; no step was taken."
        )
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


# ---- checkpoints: whole or absent, and enough to go on bit for bit


def trainable(model):
    """{name: parameter} of what trains."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(out, step, model, optimizer, keep=2):
    """Write `out/checkpoints/step-<step>/` aside, flush, rename; then point `latest` to it. Keeps the last `keep`."""
    import torch
    from safetensors.torch import save_file

    params = trainable(model)
    tensors = {f"model.{n}": p.detach().contiguous() for n, p in params.items()}
    for n, p in params.items():
        tensors |= {f"optimizer.{n}.{k}": v.contiguous() for k, v in optimizer.state[p].items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    folder = out / "checkpoints"
    final, aside = folder / f"step-{step:06d}", folder / f"step-{step:06d}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(tensors, aside / "state.safetensors", metadata={"format": "pt"})
    with open(aside / "state.safetensors", "rb") as file:
        os.fsync(file.fileno())
    write_json(aside / "state.json", {"step": step})
    if final.exists():  # a run resumed from an older step passes this one again
        shutil.rmtree(final)
    os.replace(aside, final)
    write_text(folder / "latest", final.name)
    whole = [p for p in folder.glob("step-*") if not p.name.endswith(".tmp")]
    for old in sorted(whole, key=lambda p: int(p.name.removeprefix("step-")))[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(out, model, optimizer):
    """Restore the last checkpoint of a run folder -> the step to go on with; 0 when the run had not saved one yet."""
    import torch
    from safetensors.torch import load_file

    pointer = out / "checkpoints" / "latest"
    if not pointer.is_file():
        return 0
    folder = out / "checkpoints" / pointer.read_text().strip()
    tensors = load_file(folder / "state.safetensors")
    params = trainable(model)
    missing = {f"model.{n}" for n in params} ^ {k for k in tensors if k.startswith("model.")}
    if missing:
        raise BadInput(
            f"{folder}: parameter {sorted(missing)[0]} is only on one side; the checkpoint is of another model."
        )
    with torch.no_grad():
        for n, p in params.items():
            p.copy_(tensors[f"model.{n}"])
            prefix = f"optimizer.{n}."
            state = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            optimizer.state[p] = {
                k: v.to(p.device) if v.ndim or p.is_cuda else v for k, v in state.items()
            }
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return json.loads((folder / "state.json").read_text())["step"]


def save_result(out, model, processor, args):
    """What training leaves: a PEFT `adapter/`; without LoRA, or with --merge, a full `model/` in the hub layout.

    A resumed run writes again what it may have written before it was stopped.
    """
    import checkpoints

    if args.resume:
        for name in ("adapter", "model"):
            shutil.rmtree(out / name, ignore_errors=True)
    lora = args.lora_rank and args.lr
    if lora:
        checkpoints.save_adapter(model, out / "adapter", args.model)
    if args.merge or not lora:
        checkpoints.save(model, processor, out / "model")


@contextlib.contextmanager
def whole_folder(path, flush=True):
    """A folder that appears only when it is complete: filled aside, flushed to the disk, renamed. Whoever finishes first wins."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)  # left by a killed process of the same number
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in (*aside.rglob("*"), aside) if flush else ():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if not path.exists():
            os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def new_folder(path):
    """The path, if nothing is there; BadInput otherwise."""
    if Path(path).exists():
        raise BadInput(f"{path}: exists already; nothing is written over.")
    return Path(path)


# ---- log


class Progress:
    """One line on stderr for long work: done of total, values, rate, time left. Redrawn on a terminal, every 10 s elsewhere."""

    def __init__(self, label, total, done=0):
        self.label, self.total, self.first, self.begin, self.shown = (
            label,
            total,
            done,
            time.time(),
            time.time(),
        )

    def __call__(self, done, values=""):
        now, live, last = time.time(), sys.stderr.isatty(), done >= self.total
        if last or now - self.shown > (0.2 if live else 10):
            self.shown = now
            rate = (done - self.first) / max(now - self.begin, 1e-9)
            left = (
                f"{(self.total - done) / rate:.0f} s left"
                if not last
                else f"{now - self.begin:.0f} s"
            )
            line = f"{self.label} {done}/{self.total}  {values}{rate:.{2 if rate < 10 else 0}f}/s  {left}"
            print(
                f"\r{line:<100}" if live else line,
                end="\n" if last or not live else "",
                file=sys.stderr,
                flush=True,
            )


class Log:
    """metrics.jsonl, a line a step (`step` = updates done before it), and the progress line."""

    def __init__(self, out, first, steps):
        path = out / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [
            line for line in lines if line.endswith("\n")
        ]  # a run that was killed may leave half a line
        write_text(path, "".join(line for line in whole if json.loads(line)["step"] < first))
        self.file, self.first = open(path, "a", encoding="utf-8"), first
        self.progress = Progress("step", steps, first)

    def __call__(self, step, show, metrics):
        """Write one step's metrics; `show` names those on the progress line. The first step is always shown."""
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        values = "".join(f"{name} {metrics[name]:.4f}  " for name in show)
        if step == self.first:
            print(f"step {step}: {values}", file=sys.stderr)
        self.progress(step + 1, values)
