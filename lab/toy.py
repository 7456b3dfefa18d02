"""The toy world as the scripts use it: who fills in a run's flags, and who builds and caches what.

    toy.fill(args, TOY)        without --model: the toy base model, its world's data, toy settings
    toy.world(0), toy.base(0), toy.data_file(0, "povid.json"), toy.reward_model(0)

Everything is built on first use, below `.cache/` in the working folder, under a hash of what made
it: the code, the seed, and what it was built from. training.py and the files that only read data
sets are not part of the hash. If a change there changes a result, raise VERSION.
"""

import ast
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import processes
from common import Parser, file_hash, flag_name, read_json, whole_folder
from formats.files import remember_images
from lab import toyworld
from lab.reading import write_rows

VERSION = 1
READ = (  # how the LLM learns to read: 3,500 steps of 16 descriptions
    *("--steps", "3500", "--batch-size", "16", "--grad-accum", "1"),
    *("--lr", "1.5e-3", "--projector-lr", "0", "--save-every", "0", "--dtype", "float32"),
)
LEAST_SIGHT = 0.92  # POPE's random accuracy that a base must have
TRAIN_ON = (  # a base that has less is trained on, at most twice
    *("--steps", "1000", "--batch-size", "8", "--grad-accum", "1"),
    *("--lr", "1.5e-3", "--projector-lr", "1.5e-3", "--save-every", "0", "--dtype", "float32"),
)
HOME = Path(__file__).parents[1]  # the folder of the scripts
CACHE = Path(".cache")
PARSING = threading.Lock()  # ast.parse fails where two threads call it (Python 3.11)
OWN_ANSWERS = ("vlfeedback.jsonl", "rlhf_v.jsonl")  # hold the base model's own answers
RATED = ("ratings.jsonl", "preferences.json", "reference.json")  # what annotate.py writes of them


def fill(args, settings):
    """Without --model, complete `args` for a run in the toy world of --seed; with it, do nothing.

    The toy base model becomes the model. `settings`, the TOY of a script, replaces the defaults of
    flags that were not given: {"data": [files of the world], "steps": ..., ...}. A setting never
    replaces a default that depends on the method, such as the beta of a loss.
    """
    if args.model or getattr(args, "vision", None):
        return
    skip = args.given | ({"steps"} if "epochs" in args.given else set())
    used = {name: value for name, value in settings.items() if name not in skip}
    for name, value in used.items():
        setattr(args, name, value)

    with processes.first_alone():
        args.toy_world = str(world(args.seed))
        if "data" not in args.given:
            args.data = [str(data_file(args.seed, name)) for name in settings["data"]]
            if "images" not in args.given:
                args.images = str(Path(args.toy_world) / "images")
        if "vision" in settings:  # sft.py composes a new model
            args.vision, args.llm = str(parts(args.seed) / "clip"), str(reader(args.seed))
        else:
            args.model = str(base(args.seed))

    shown = {k: v for k, v in used.items() if k not in ("data", "vision", "llm")}
    flags = " ".join(f"{flag_name(name)} {value}" for name, value in shown.items())
    print(f"no --model: toy world of seed {args.seed}, {flags}", file=sys.stderr)


# ---- what is built and cached


def made_of(*things):
    """A short hash of what made a folder: source files (code without comments) and values."""
    parts = [f"version {VERSION}"]
    for thing in things:
        if isinstance(thing, Path):
            with PARSING:
                code = ast.parse(thing.read_text(encoding="utf-8"))
            for node in ast.walk(code):
                documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                if documented and ast.get_docstring(node) is not None:
                    del node.body[0]
            thing = ast.dump(code)
        parts.append(str(thing))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def sources(*names):
    """The source files of these modules."""
    return [HOME / f"{name}.py" for name in names]


def world(seed):
    """The folder of the seed's world: images and data files in the public layouts."""
    made = made_of(*sources("lab/toyworld", "lab/drawing", "lab/scenes", "lab/reading"), seed)
    folder = CACHE / f"world-{made}"
    if not folder.exists():
        toyworld.write(folder, seed)
    return folder


def parts(seed):
    """The folder with the toy base model's parts: clip/ and llm/, which has random weights."""
    folder = CACHE / f"parts-{made_of(*sources('lab/parts'), world(seed).name)}"
    if not folder.exists():
        from lab import parts as making

        with whole_folder(folder) as aside:
            making.write(aside, world(seed), seed)
    return folder


def reader(seed):
    """The LLM that has learned to read: shipped for seed 0, built by sft.py for the others."""
    shipped = Path(__file__).parent / "base" / "llm"
    if seed == 0 and shipped.is_dir():
        return shipped
    code = sources("sft", "model", "attention", "data", "lab/parts")
    folder = CACHE / f"reader-{made_of(*code, parts(seed).name, *READ)}"
    if not folder.exists():
        from lab import parts as making

        print(f"teaching the toy LLM of seed {seed} to read, once", file=sys.stderr)
        data, made = world(seed) / "text.json", parts(seed)
        given = "--data", data, "--vision", made / "clip", "--llm", made / "llm", *READ
        with whole_folder(folder) as aside:
            script("sft.py", "--seed", seed, "--out", aside / "run", *given)
            making.take_llm(aside / "run" / "model", aside / "llm")
    return folder / "llm"


def base(seed):
    """The toy base model: shipped for seed 0, built by sft.py's own command line for the others.

    Some towers learn to see less well than others. A base that does not see well enough for its
    yes/no answers to depend on the picture (`sight`) is trained on.
    """
    shipped = Path(__file__).parent / "base"
    if seed == 0 and shipped.is_dir():
        return shipped
    code = sources("sft", "model", "attention", "data", "lab/parts")
    made = made_of(*code, world(seed).name, reader(seed).parent.name, LEAST_SIGHT, *TRAIN_ON)
    folder = CACHE / f"base-{made}"
    if not folder.exists():
        print(f"building the toy base model of seed {seed}, once", file=sys.stderr)
        with whole_folder(folder) as aside:
            os.replace(trained_until_it_sees(aside, seed), aside / "model")
    return folder / "model"


def trained_until_it_sees(folder, seed):
    """Train a base in `folder` until it sees, at most three times -> where its model is.

    Where it was trained on, the models before stay in run/ and run1/.
    """
    script("sft.py", "--seed", seed, "--out", folder / "run", "--dtype", "float32")
    model = folder / "run" / "model"
    for run in ("run1", "run2"):
        seen = sight(model, folder / f"{run}-before", seed)
        if seen >= LEAST_SIGHT:
            break
        print(f"it sees {seen:.3f}, less than {LEAST_SIGHT}: trained on", file=sys.stderr)
        given = ["--model", model, "--images", world(seed) / "images", *TRAIN_ON]
        for name in ("instruct.json", "text_mix.json"):
            given += ["--data", world(seed) / name]
        script("sft.py", "--seed", seed, "--out", folder / run, *given)
        model = folder / run / "model"
    return model


def sight(model, out, seed):
    """POPE's random accuracy on 400 of povid.json's pictures: no base is trained on them or tested."""
    from lab.oracle import Oracle

    scenes = Oracle(world(seed)).scenes
    pictures = [image for image in scenes if image.startswith("preference_")][:400]
    shown = {image: scenes[image] for image in pictures}
    rows = toyworld.pope_rows(shown, pictures, random.Random(f"{seed}/sight"))["random"]
    out.mkdir()
    write_rows(out / "pope_random.json", rows, lines=True)
    given = "--questions", out / "pope_random.json", "--images", world(seed) / "images"
    script("eval_pope.py", "--model", model, *given, "--out", out / "pope", "--dtype", "float32")
    return read_json(out / "pope" / "metrics.json")["random"]["accuracy"]


def data_file(seed, name):
    """A data file of the seed's world. Those of OWN_ANSWERS and RATED are made with the base model.

    The corrected answers of seed 0 are shipped: a minute's work for what `python dpo.py` begins with.
    """
    shipped = Path(__file__).parent / "base" / f"{name}.gz"
    if seed == 0 and shipped.is_file():
        return shipped
    if name in RATED:
        return annotations(seed) / name
    if name == "questions.jsonl":
        return problems(seed) / name
    if name == "povid_imageless.json":
        return imageless(seed) / name
    if name not in OWN_ANSWERS:
        return world(seed) / name
    made = made_of(*sources("lab/oracle", "sampling"), world(seed).name, weights(seed))
    folder = CACHE / f"answers-{made}"
    if not folder.exists():
        from lab import oracle

        with whole_folder(folder) as aside:
            oracle.answers_of(base(seed), world(seed), aside, seed)
            remember_images(aside, world(seed) / "images")
    return folder / name


def problems(seed):
    """Questions about the world's pictures with their right answers, for grpo.py."""
    folder = (
        CACHE / f"problems-{made_of(*sources('lab/questions', 'lab/oracle'), world(seed).name)}"
    )
    if not folder.exists():
        from lab import questions

        with whole_folder(folder) as aside:
            questions.write(world(seed), seed, aside / "questions.jsonl")
            remember_images(aside, world(seed) / "images")
    return folder


def imageless(seed):
    """povid.json without its images: what mDPO's paper compares with, "DPO (No Image)"."""
    folder = CACHE / f"imageless-{world(seed).name}"
    if not folder.exists():
        rows = json.loads((world(seed) / "povid.json").read_text(encoding="utf-8"))
        for row in rows:
            del row["image"]
            for turns in (row["conversations"], row["rejected_conversations"]):
                turns[0]["value"] = turns[0]["value"].removeprefix("<image>\n")
        with whole_folder(folder) as aside:
            write_rows(aside / "povid_imageless.json", rows)
    return folder


def annotations(seed):
    """The base model's own answers, rated by the world's truth: annotate.py's own command line."""
    code = sources("annotate", "formats/ratings", "lab/oracle", "sampling")
    folder = CACHE / f"ratings-{made_of(*code, world(seed).name, weights(seed))}"
    if not folder.exists():
        print(f"rating the toy base model's answers of seed {seed}, once", file=sys.stderr)
        with whole_folder(folder) as aside:
            script("annotate.py", "--seed", seed, "--out", aside / "run")
    return folder / "run"


def reward_model(seed, quantize=None):
    """The reward model of the toy base, trained by reward_model.py's own command line."""
    more = ["--quantize", quantize] if quantize == "nf4" else []
    code = sources("reward_model", "facts", "model", "attention", "lora", "data")
    folder = CACHE / f"reward-{made_of(*code, world(seed).name, weights(seed), *more)}"
    if not folder.exists():
        print(f"training the toy reward model of seed {seed}, once", file=sys.stderr)
        with whole_folder(folder) as aside:
            script("reward_model.py", "--seed", seed, "--out", aside / "run", *more)
    return folder / "run"


def weights(seed):
    """A hash of the toy base model's weights."""
    return file_hash(base(seed) / "model.safetensors")


def script(name, *arguments):
    """Run a script of this project with the user's own command line."""
    command = [sys.executable, str(HOME / name), *map(str, arguments)]
    environment = processes.environment()
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)


def main():
    """Write a world, or preferences among a model's own answers to it."""
    parser = Parser(toyworld.__doc__)
    flag = parser.add_argument
    flag("--seed", type=int, default=0, help="another seed is another world; it seeds the sampling")
    flag("--out", type=Path, required=True, help="folder to write; for a world it must be new")
    flag("--answers-of", metavar="MODEL", help="write preferences among its answers instead")
    args = parser.parse_args()
    if not args.answers_of:
        toyworld.write(args.out, args.seed)
        return
    from lab import oracle

    counts = oracle.answers_of(args.answers_of, world(args.seed), args.out, args.seed)
    remember_images(args.out, world(args.seed) / "images")
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))
