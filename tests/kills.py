"""Runs that are killed and go on: the result is bit for bit that of an undisturbed run.

Every run is a process forked from one that has loaded torch, so a start takes no seconds. It ends by SIGKILL at a random
moment, before its n-th write, renaming or removal of a file, or by SIGTERM or Ctrl-C; or its disk becomes full at a random
moment, and it ends by SIGKILL or by itself. Then it is started again (after room was made), with --resume where a run
folder has its args.json, until it comes to its end. `python tests/trust.py` does it some hundred times.
"""

import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

import badness
import common
from formats import ratings

ROOT = Path(__file__).parents[1]
WORDS = (
    "A red cup.",
    "No.",
    "Two bananas and a bowl.",
    "A table.",
    "The kitchen.",
    "A dog sleeps.",
)


# ---- what is run


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def write_data(folder):
    """Six rows each of pairs, ratings and questions about three pictures, and what the other evaluations read."""
    (folder / "images").mkdir(parents=True)
    for i in range(3):
        Image.effect_noise((30 + i, 28), 60).convert("RGB").save(folder / f"images/{i}.png")
    pairs, rated, questions, problems = [], [], [], []
    for i, text in enumerate(WORDS):
        name, asked, other = f"{i % 3}.png", f"<image>\nWhat is {'there ' * i}?", WORDS[i - 1]
        pairs.append(
            {
                "image": name,
                "conversations": turns(asked, text),
                "rejected_conversations": turns(asked, other),
            }
        )
        good, bad = (dict.fromkeys(ratings.ATTRIBUTES, n) for n in (4, 1))
        answers = [{"response": text, "reason": ""} | good, {"response": other, "reason": ""} | bad]
        rated.append(
            {
                "image": name,
                "turns": [f"What is {'there ' * i}?"],
                "reference": [text],
                "answers": answers,
            }
        )
        ask = f"Is there a {'red ' * (i // 3)}dog in the image?"
        questions.append(
            {"question_id": i, "image": name, "text": ask, "label": ("yes", "no")[i % 2]}
        )
        problems.append(
            {"image": name, "problem": f"How many {'red ' * i}cups?", "solution": str(i)}
        )
    (folder / "povid.json").write_text(json.dumps(pairs))
    (folder / "facts.json").write_text(
        json.dumps({f"{i}.png": [WORDS[i], "A cup."] for i in range(3)})
    )
    for name, rows in (
        ("ratings.jsonl", rated),
        ("pope_random.json", questions),
        ("problems.jsonl", problems),
    ):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_benchmarks(folder)
    return folder


def write_benchmarks(folder):
    """Six questions of AMBER and of MM-Vet, COCO's files of the three pictures."""
    kinds, queries, vet = [], [], {}
    for i, text in enumerate(WORDS):
        truth = {"truth": ["cup"], "hallu": ["dog"]} if i < 3 else {"truth": ("yes", "no")[i % 2]}
        kinds.append({"id": i, "type": "relation" if i > 2 else "generative", **truth})
        queries.append({"id": i, "image": f"{i % 3}.png", "query": f"Is there a cup? {i}"})
        vet[f"v{i}"] = {"imagename": f"{i % 3}.png", "question": f"What is {i}?", "answer": text,
                        "capability": ["ocr", "rec"][: 1 + i % 2]}  # fmt: skip
    objects = {
        "categories": [{"id": 1, "name": "cup"}],
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)],
        "annotations": [{"image_id": i, "category_id": 1} for i in range(2)],
    }
    captions = {"annotations": [{"image_id": i, "caption": "A dog."} for i in range(3)]}
    for name, value in (
        ("annotations", kinds),
        ("query", queries),
        ("relation", {"cup": ["mug"], "dog": []}),
        ("mm-vet", vet),
        ("instances", objects),
        ("captions", captions),
    ):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "safe_words.txt").write_text("table")
    (folder / "synonyms.txt").write_text("cup, mug\ndog, puppy\n")


TRAINS = (
    "--steps 3 --save-every 1 --batch-size 2 --lora-rank 2 --lr 1e-3 --projector-lr 1e-4 --no-eval"
)
DRAWS = f"{TRAINS} --max-new-tokens 8 --sample-batch-size 2"
RUNS = {  # name: (script, flags)
    "dpo": ("dpo", f"{TRAINS} --data {{povid}}"),
    "dpo, whole LLM": ("dpo", f"{TRAINS} --data {{povid}} --lora-rank 0"),
    "mpo": ("mpo", f"{TRAINS} --data {{povid}}"),
    "mdpo": ("mdpo", f"{TRAINS} --data {{povid}}"),
    "povid": ("povid", f"{TRAINS} --data {{povid}}"),
    "sft": ("sft", f"{TRAINS} --data {{povid}}"),
    "bdhs": ("bdhs", "--data {povid} --max-new-tokens 8 --sample-batch-size 2"),
    "bdhs --online": ("bdhs", f"{DRAWS} --data {{povid}} --online"),
    "online_dpo": ("online_dpo", f"{DRAWS} --data {{povid}} --annotator {{reward}} --facts {{facts}}"),
    "reward_model": ("reward_model", f"{TRAINS} --data {{povid}} --projector-lr 0 --no-facts"),
    "ppo": ("ppo", f"{DRAWS} --data {{povid}} --projector-lr 0 --reward-model {{reward}} --facts {{facts}}"),
    "grpo": ("grpo", f"{DRAWS} --data {{problems}} --group-size 2 --minibatches 1"),
    "rejection_sampling": ("rejection_sampling", f"{TRAINS} --data {{ratings}}"),
    "steerlm": ("steerlm", f"{TRAINS} --data {{ratings}}"),
    "annotate": ("annotate", "--data {povid} --annotator {model} --k 2 --max-new-tokens 8 --batch-size 2"),
    "eval_pope": ("eval_pope", "--questions {questions} --batch-size 2"),
    "eval_chair": ("eval_chair", "--instances {folder}/instances.json --captions {folder}/captions.json --synonyms "
                   "{folder}/synonyms.txt --batch-size 1 --max-new-tokens 8"),
    "eval_amber": ("eval_amber", "--questions {folder}/query.json --rule plain --batch-size 2 --max-new-tokens 8"),
    "eval_vqa": ("eval_vqa", "--questions {problems} --batch-size 2 --max-new-tokens 8"),
    "eval_judge": ("eval_judge", "--questions {folder}/mm-vet.json --annotator {judge} --judge-runs 2 --batch-size 2 "
                   "--max-new-tokens 8"),
}  # fmt: skip


def write_judge(folder, checkpoint):
    """The checkpoint with a context that a judge's question fits in."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 4096
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def command(name, folder, checkpoint, reward, judge=None):
    """(module, argv without --out) of a run."""
    script, flags = RUNS[name]
    places = {
        "folder": folder,
        "judge": judge,
        "povid": folder / "povid.json",
        "facts": folder / "facts.json",
        "ratings": folder / "ratings.jsonl",
        "questions": folder / "pope_random.json",
        "problems": folder / "problems.jsonl",
        "reward": reward,
        "model": checkpoint,
    }
    flags = flags.format(**places).split()
    return script, ["--model", checkpoint, "--images", folder / "images", "--device", "cpu", *flags]


# ---- one start of it


def forked(script, argv, place, before=None):
    """Start a run in a process of its own, in the folder `place` -> its number. before: called in it first."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.chdir(place)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        sys.argv = [str(ROOT / f"{script}.py"), *map(str, argv)]
        torch.set_num_threads(1)
        if before:
            before()
        common.run(importlib.import_module(script).main, trains=True)
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 70
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
count_of = {}  # in a run: how many writes, renamings and removals have begun


def count_changes(last=None):
    """Count the changes of files in this process; die before change number `last`. Without it, note their number."""
    count_of["n"] = 0

    def hook(event, args):
        writes = (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes or event in CHANGES:
            count_of["n"] += 1
            if count_of["n"] == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def note_changes():
    """In an undisturbed run: leave the number of its changes in the file `changes`."""
    count_changes()
    exit_now = os._exit

    def leave(status):
        Path("changes").write_text(str(count_of["n"]))
        exit_now(status)

    os._exit = leave


# ---- what a run leaves, without what is a matter of time


def without_seconds(value):
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if "second" not in k}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def left(out):
    """{file: a hash of its content} of a run folder; of checkpoints the last."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = str(path.relative_to(out))
        if name.startswith("checkpoints/step") or name in ("summary.json", "skipped.json"):
            continue
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content]
            with contextlib.suppress(ValueError):  # half a line differs
                rows = [without_seconds(json.loads(line)) for line in lines]
                content = json.dumps(rows).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    latest = out / "checkpoints/latest"
    if latest.exists():
        tensors = load_file(out / "checkpoints" / latest.read_text() / "state.safetensors")
        state = b"".join(name.encode() + t.numpy().tobytes() for name, t in sorted(tensors.items()))
        found["state"] = hashlib.sha256(state).hexdigest()
    return found


# ---- undisturbed, and disturbed

OUT = "disk/out"


def mounted(disk, options):
    """Is a small disk of this folder: needs root."""
    disk.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    return subprocess.run(mount, capture_output=True).returncode == 0


def fill(path):
    """Write a file until nothing fits on its disk."""
    with open(path, "wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size):
                    pass


def undisturbed(script, argv, place):
    """Run to the end -> (what it left, its seconds, its changes of files); AssertionError if it fails."""
    place.mkdir(parents=True)
    begin = time.monotonic()
    _, status = os.waitpid(forked(script, [*argv, "--out", OUT], place, note_changes), 0)
    assert status == 0, f"{script}: {(place / 'log').read_text()[-2000:]}"
    return left(place / OUT), time.monotonic() - begin, int((place / "changes").read_text())


def disturbed(script, argv, place, seconds, changes, rng, how):
    """Run, end it once or twice on the way, go on -> (what it left, how often it was ended, why it is lost or "").

    how: "moment", "change", "SIGTERM", "SIGINT" or "full" (on a disk of its own).
    """
    place.mkdir(parents=True, exist_ok=True)
    out, filler = place / OUT, place / "disk/filler"
    wanted, ended = rng.choice((1, 1, 2)), 0
    for start in range(9):
        resumes = (out / "args.json").is_file() and not script.startswith("eval")
        before = None
        if ended < wanted and how == "change":
            last = rng.randint(1, changes)
            before = lambda last=last: count_changes(last)
        pid = forked(script, [*argv, "--out", OUT, *["--resume"] * resumes], place, before)
        if ended < wanted and how != "change":
            time.sleep(rng.uniform(0.05, 1) * seconds)
            kill = how != "full" or rng.random() < 0.5  # or it finds out by itself
            if how == "full":
                fill(filler)
                time.sleep(rng.uniform(0, 0.3) * seconds * kill)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, getattr(signal, how, signal.SIGKILL) if kill else 0)
        _, status = os.waitpid(pid, 0)
        code, log = os.waitstatus_to_exitcode(status), (place / "log").read_text()
        filler.unlink(missing_ok=True)
        if code == 0:
            halves = [p.name for p in out.rglob("*") if p.name.endswith((".part", ".tmp"))]
            return left(out), ended, f"{halves} stay behind" if halves else ""
        usual = {"SIGTERM": (-15, 143), "SIGINT": (130,), "full": (-9, 2)}.get(how, (-9,))
        if code not in usual or "Traceback" in log:
            break
        ended += 1
    return {}, ended, f"status {code}: {log[-400:]}"


def kills(folder, checkpoint, total, seed=0, names=RUNS, say=print):
    """End runs `total` times or a little more -> ({how: ends}, [(run, why), ...] of those that were lost).

    Each run is done twice undisturbed first: the same seed gives the same run. No disk becomes full without root.
    """
    rng = random.Random(seed)
    data = write_data(folder / "data")
    reward = badness.write_reward(folder / "reward", checkpoint)
    judge = write_judge(folder / "judge", checkpoint)
    for name in {script for script, _ in (RUNS[n] for n in names)}:
        importlib.import_module(name)
    lost, ended, known = [], Counter(), {}
    for name in names:
        script, argv = command(name, data, checkpoint, reward, judge)
        first, seconds, changes = undisturbed(script, argv, folder / "whole" / name / "1")
        again, *_ = undisturbed(script, argv, folder / "whole" / name / "2")
        if first != again:
            lost.append((name, f"the same seed gives another run: {differing(first, again)}"))
        known[name] = script, argv, first, seconds, changes
    number = 0
    while ended.total() < total:
        for name, (script, argv, first, seconds, changes) in known.items():
            how = rng.choices(("moment", "change", "SIGTERM", "SIGINT", "full"), (4, 4, 1, 1, 2))[0]
            place = folder / "killed" / f"{number}"
            disk = place / "disk"
            if how == "full" and not mounted(disk, "size=16m"):
                how = "moment"
            try:
                found, times, why = disturbed(script, argv, place, seconds, changes, rng, how)
            finally:
                if how == "full":
                    subprocess.run(["umount", str(disk)], check=True)
            ended[how], number = ended[how] + times, number + 1
            if why or found != first:
                lost.append((name, f"{how}, {place}: {why or differing(first, found)}"))
                say(*lost[-1])
            else:
                shutil.rmtree(place)
            if ended.total() >= total:
                break
    return ended, lost


DISKS = ("size=4k", "size=12k", "size=24k", "size=100k", "size=300k", "ro,size=1m")


def full_disks(folder, checkpoint, names=RUNS):
    """Each run with --out on small and on read-only disks (needs root, for tmpfs) -> (runs, [(run, disk, why), ...]).

    It ends with status 2, or 0 where the disk is large enough, without a traceback, and leaves nothing half-written.
    """
    disk, place = folder / "disk", folder / "place"
    data = write_data(folder / "data")
    reward = badness.write_reward(folder / "reward", checkpoint)
    judge = write_judge(folder / "judge", checkpoint)
    runs, wrong = 0, []
    for name in names:
        script, argv = command(name, data, checkpoint, reward, judge)
        importlib.import_module(script)
        for options in DISKS:
            if not mounted(disk, options):
                return runs, wrong
            try:
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                _, status = os.waitpid(forked(script, [*argv, "--out", disk / "out"], place), 0)
                halves = [p.name for p in disk.rglob("*") if p.name.endswith((".part", ".tmp"))]
            finally:
                subprocess.run(["umount", str(disk)], check=True)
            runs, log = runs + 1, (place / "log").read_text()
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, 2) or "Traceback" in log or halves:
                wrong.append((name, options, f"status {code}, {halves}: {log[-400:]}"))
    return runs, wrong


def differing(one, other):
    """The files that differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
