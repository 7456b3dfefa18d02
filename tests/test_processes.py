"""processes.py and sharding.py: two gloo processes do what one does on the same global batch."""

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import common
import processes
import training
from common import BadInput

ROOT = Path(__file__).parents[1]
# runs the scripts of a list, one after another: the start of a process costs more than a run
DRIVER = """
import importlib, json, sys
sys.path.insert(0, {root!r})
import torch
from common import run
torch.set_num_threads(1)
for script, *flags in json.load(open(sys.argv[1])):
    sys.argv = [script, *flags]
    run(importlib.import_module(script).main)
"""
# fails in one of two processes, while the other waits for it; both have printed by then
FAILING = """
import os, signal, sys, time
import processes
from common import BadInput
def main():
    processes.start("cpu")
    print("process 0 says so", file=sys.stderr)
    processes.gathered(0)
    if processes.number == 1 and sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if processes.number == 1 and sys.argv[1] == "stopped":
        os.kill(os.getppid(), signal.SIGTERM)
    elif processes.number == 1:
        raise BadInput("a.json, row 3: it is bad.")
    processes.gathered(0)
    time.sleep(60 * (sys.argv[1] == "stopped"))
"""
TRAINED = (
    "dpo dpo-full mpo mdpo sft sft-full povid online_dpo online_dpo-full bdhs ppo ppo-rloo".split()
)
TRAINED += ["grpo", "grpo-full", "reward_model"]
QUESTIONS = [
    {"image": f"{i % 5}.png", "text": f"Is there a {name} in the image?", "label": label}
    for i, (name, label) in enumerate([("cup", "yes"), ("dog", "no"), ("bowl", "yes")] * 3)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five pairs in POVID's layout, and a toy world's truth about their images."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "images").mkdir()
    rows, scenes = [], {}
    for i in range(5):
        name = f"{i}.png"
        pixels = random.Random(i).randbytes(28 * 28 * 3)
        Image.frombytes("RGB", (28, 28), pixels).save(folder / "images" / name)
        scenes[name] = {"kind": "kitchen", "things": []}
        said = ("No, there is no dog.", "A red cup is on the table. Two bananas are in a bowl.")
        dialogue = lambda text: [
            {"from": "human", "value": f"<image>\nWhat is in picture {i}?"},
            {"from": "gpt", "value": text},
        ]
        rows.append(
            {
                "id": str(i),
                "image": name,
                "conversations": dialogue(said[i % 2] + " It is red." * i),
                "rejected_conversations": dialogue(said[1 - i % 2]),
            }
        )
    (folder / "povid.json").write_text(json.dumps(rows))
    (folder / "scenes.json").write_text(json.dumps(scenes))
    (folder / "driver.py").write_text(DRIVER.format(root=str(ROOT)))
    (folder / "failing.py").write_text(FAILING)
    (folder / "random.json").write_text("\n".join(map(json.dumps, QUESTIONS)))
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(5)]
    instances = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "dog"}]}
    captions = [{"image_id": i, "caption": "A dog."} for i in range(5)]
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "captions.json").write_text(json.dumps({"annotations": captions}))
    (folder / "synonyms.txt").write_text("dog\ncup\nbanana")
    return folder


def launch(folder, *runs):
    """Run scripts in two processes -> the finished launcher."""
    (folder / "runs.json").write_text(json.dumps([[str(word) for word in row] for row in runs]))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, "driver.py", "runs.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def same_runs(checkpoint, processes):
    """{name: command line} of all trainers and evaluations for this number of processes.

    The global batch is the same: 4 examples, 2 a micro-batch. 10 examples are 3 steps, the last
    with one micro-batch, so that one of two processes has none.
    """
    short, lora, no_lora = ["--max-new-tokens", 6], ["--lora-rank", 4], ["--lora-rank", 0]
    rate = ["--projector-lr", 1e-4]
    drawn = ["--sample-batch-size", 2]  # a larger one would shrink for two processes
    judged = [*short, "--annotator", "reward_model-1", *rate, *drawn]
    grouped = [*judged, "--reward", "annotator", "--group-size", 3, "--minibatches", 1]
    frozen = [*short, *lora, "--projector-lr", 0]
    runs = {
        "dpo": [*lora, *rate, "--save-every", 1],
        "dpo-full": [*no_lora, *rate, "--save-every", 1, "--gradient-checkpointing"],
        "mpo": [*lora, *rate],
        "mdpo": [*lora, *rate],
        "sft": [*lora, *rate],
        "sft-full": [*no_lora, *rate, "--vision-lr", 1e-5],
        "povid": [*lora, *rate],
        "reward_model": ["--no-facts", *lora, "--projector-lr", 0, "--held-out", 1],
        "online_dpo": [*judged, *lora, "--mix", 0.3],
        "online_dpo-full": [*judged, *no_lora],
        "bdhs": [*short, *lora, *rate, *drawn, "--online"],
        "bdhs-offline": [*short, *lora, *rate],
        "grpo": [*grouped, *lora, "--kl-coef", 0.1],
        "grpo-full": [*grouped, *no_lora, "--kl-coef", 0, "--variant", "dr_grpo"],
        "ppo": [*frozen, "--reward-model", "reward_model-1", "--minibatches", 1],
        "ppo-rloo": [*frozen, "--reward-model", "oracle", "--advantage", "rloo"],
    }
    model = ["--model", checkpoint, "--images", "images", "--batch-size", 2]
    train = ["--data", "povid.json", "--lr", 1e-3, "--epochs", 2, "--grad-accum", 2 // processes]
    runs = {name: [*model, *train, *flags] for name, flags in runs.items()}
    truth = ["--instances", "instances.json", "--captions", "captions.json"]
    runs["eval_chair"] = [*model, *truth, "--synonyms", "synonyms.txt", *short]
    runs["eval_pope"] = [*model, "--questions", "random.json"]
    return {
        name: [name.split("-")[0], *flags, "--out", f"{name}-{processes}"]
        for name, flags in runs.items()
    }


def cut_back(run, copy):
    """A copy of a run folder as it was after its second step."""
    shutil.copytree(run, copy)
    (copy / "checkpoints" / "latest").write_text("step-000002")
    shutil.rmtree(copy / "checkpoints" / "step-000003")


def resumed(runs, name, run):
    """The command line that goes on in the folder `run`."""
    return [*runs[name][:-1], run, "--resume"]


@pytest.fixture(scope="module")
def both(folder, checkpoint):
    """All runs by one process and by two, and runs of each that the other goes on with."""

    def alone(*runs):
        """Run them in this process."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            for script, *flags in runs:
                patch.setattr(sys, "argv", [script, *map(str, flags)])
                importlib.import_module(script).main()

    one, two = (same_runs(checkpoint, processes) for processes in (1, 2))
    alone(*one.values())
    for name in ("dpo", "dpo-full"):
        cut_back(folder / f"{name}-1", folder / f"{name}-1-2")
    shutil.rmtree(folder / ".cache")  # else the reference is read, and not scored by two
    done = launch(
        folder, *two.values(), *(resumed(two, n, f"{n}-1-2") for n in ("dpo", "dpo-full"))
    )
    assert done.returncode == 0, done.stderr
    for name in ("dpo", "dpo-full"):
        cut_back(folder / f"{name}-2", folder / f"{name}-2-1")
        alone(resumed(one, name, f"{name}-2-1"))
    return folder


def metrics(out):
    """Lines of metrics.jsonl, without the times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]


def weights(out):
    """What a run saved."""
    adapter = out / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else out / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "a, b, steps",
    [
        (f"{name}-1", f"{name}-2", 2 if name in ("reward_model", "ppo-rloo") else 3)
        for name in TRAINED
    ]
    + [(f"{n}-1", f"{n}-{way}", 3) for n in ("dpo", "dpo-full") for way in ("1-2", "2-1")],
)
def test_two_processes_are_one(both, a, b, steps):
    """Metrics and weights, also of a run that goes on with another number of processes."""
    ours, others = metrics(both / a), metrics(both / b)
    assert len(ours) == steps and ours[-1]["grad_norm"] > 0
    for line, other in zip(ours, others, strict=True):
        assert line == pytest.approx(other, rel=1e-6, abs=1e-6)
    ours, others = weights(both / a), weights(both / b)
    assert ours.keys() == others.keys()
    for name in ours:
        assert torch.allclose(ours[name], others[name], rtol=0, atol=1e-6), name


@pytest.mark.parametrize(
    "name, files",
    [
        ("bdhs-offline", ["negatives.jsonl", "preferences.json"]),
        ("eval_pope", ["answers_random.jsonl", "metrics.json"]),
        ("eval_chair", ["captions.jsonl", "metrics.json"]),
        ("reward_model", ["metrics.json", "reward.json"]),
    ],
)
def test_answers_are_divided_and_joined(both, name, files):
    """The same files, byte for byte."""
    for file in files:
        assert (both / f"{name}-1" / file).read_bytes() == (both / f"{name}-2" / file).read_bytes()


def test_one_run_folder(both):
    """Nothing else was made: no second folder, no line twice, no file of process 1."""
    names = lambda run: {str(p.relative_to(both / run)) for p in (both / run).rglob("*")}
    for name in same_runs("", 1):
        assert names(f"{name}-1") == names(f"{name}-2") != set(), name
    kept = {f"{name}-{n}" for name in same_runs("", 1) for n in (1, 2)}
    kept |= {f"{name}-{way}" for name in ("dpo", "dpo-full") for way in ("1-2", "2-1")}
    folders = {p.name for p in both.iterdir() if p.is_dir() and not p.name.startswith(".")}
    assert folders - {"images"} == kept


@pytest.mark.parametrize("bucket", [1, 6, 100])
def test_sums_of_gradients(monkeypatch, bucket):
    """Of another process that has as much, and lacks the last: in one collective, or in several."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (3,), (1,), (2,))]
    params[0].grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    params[3].grad = torch.tensor([5.0, 6.0])
    other = [True, True, False, False]  # which gradients the other process has
    monkeypatch.setattr(processes, "total", 2)
    monkeypatch.setattr(processes, "gathered", lambda mine: [mine, other])
    collectives = []
    monkeypatch.setattr(processes, "all_reduced", lambda x: collectives.append(len(x)) or x + 10)
    processes.add_gradients(params, bucket)
    assert params[0].grad.tolist() == [[11, 12], [13, 14]]
    assert params[1].grad.tolist() == [10] * 3 and params[3].grad.tolist() == [15, 16]
    assert params[2].grad is None  # Adam must not move it: it does not with one process
    assert collectives == {1: [4, 3, 2], 6: [4, 5], 100: [9]}[bucket]


def test_other_weights_are_refused(monkeypatch):
    """Processes that start from different weights would train on, worse."""
    named = {"a": torch.ones(3), "b": torch.ones(2)}
    monkeypatch.setattr(processes, "total", 2)
    monkeypatch.setattr(processes, "gathered", lambda mine: [mine, mine])
    processes.check_same(named)
    monkeypatch.setattr(processes, "gathered", lambda mine: [mine, [3.0, 2.5]])
    with pytest.raises(BadInput, match="b differs between the processes"):
        processes.check_same(named)


# ---- a process that fails


@pytest.mark.parametrize(
    "how, sentence, status",
    [
        (
            "killed",
            "failing: process 1 of 2 ended, and with it the run; of a training run the last",
            -9,
        ),
        ("refused", "failing: a.json, row 3: it is bad.", 2),
    ],
)
def test_one_sentence_ends_all(folder, how, sentence, status):
    """Whichever process fails, and how: no traceback of ours, and torchrun names the first."""
    done = launch(folder, ["failing", how])
    assert done.returncode == 1
    ours, theirs = done.stderr.split("Traceback (most recent call last)")  # torchrun's own
    lines = [line for line in ours.splitlines() if line.startswith(("failing", "process"))]
    failed, started = sorted(lines)
    assert started == "process 0 says so" and failed.startswith(sentence)
    first = theirs.split("Root Cause")[1]
    assert "rank      : 1" in first and f"exitcode  : {status} " in first


def test_a_run_that_is_stopped_blames_no_process(folder):
    """A scheduler ends torchrun, which ends the processes: all of them were there."""
    done = launch(folder, ["failing", "stopped"])
    assert done.returncode
    lines = [line for line in done.stderr.splitlines() if line.startswith("failing")]
    assert lines == ["failing: torchrun ended the run"]


def test_of_several_processes_the_first_reports(tmp_path, monkeypatch):
    """Those of one run stand in folders beside each other."""
    assert common.first_to_fail.__wrapped__()
    answers = []
    for process in range(3):
        (tmp_path / str(process)).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(process) / "error.json"))
        answers.append(common.first_to_fail.__wrapped__())
    assert answers == [True, False, False]


def test_a_process_that_says_why_it_ends_is_not_interrupted(monkeypatch):
    """torchrun tells it to end in the middle of its sentence: one sentence, whole, its status."""
    ended, said, threads = [], [], []
    monkeypatch.setattr(common, "process_ids", [1, 2])
    monkeypatch.setattr(common, "first_to_fail", lambda: True)

    def leave(status):
        """os._exit, as far as a test can go: the first thread's call stops the process."""
        ended.append((status, "".join(said)))
        raise SystemExit

    class Stderr(io.StringIO):
        """While it takes the sentence, the other thread is told to end."""

        def write(self, text):
            if not threads:
                threads.append(threading.Thread(target=told))
                threads[0].start()
                threads[0].join(0.3)
            said.append(text)

    def told():
        with contextlib.suppress(SystemExit):
            common.end("torchrun ended the run", 1, stderr, patience=0)

    stderr = Stderr()
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit):
        common.end("a.json, row 3: it is bad.", 2, stderr)
    threads[0].join()
    assert ended[0] == (2, "a.json, row 3: it is bad.\n")


def test_a_script_that_a_process_starts_is_alone(monkeypatch):
    """Else it would wait for processes that do not exist: the toy reward model's own training, say."""
    torchruns = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
    for name in (*torchruns, "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    left = os.environ.keys() - processes.environment().keys()
    assert left >= {*torchruns, "TORCHELASTIC_ERROR_FILE"}
    assert processes.environment()["OMP_NUM_THREADS"] == "3" and "PATH" not in left


# ---- what is refused


def test_more_processes_than_examples(monkeypatch):
    args = argparse.Namespace(steps=None, epochs=3, batch_size=2, grad_accum=1)
    monkeypatch.setattr(processes, "total", 4)
    assert training.total_steps(args, 4) == 2  # 12 examples, 8 a step
    with pytest.raises(BadInput, match="4 processes for 3 examples; at most 3 are accepted"):
        training.total_steps(args, 3)


@pytest.mark.parametrize(
    "device, machine, gpus, said",
    [
        ("cuda:1", 2, 2, "--device cuda:1 with 2 processes; accepted are auto, cpu, cuda"),
        ("auto", 2, 1, "2 processes and 1 GPUs; each process needs one of its own"),
        ("cpu", 1, 0, "2 processes on several machines"),
    ],
)
def test_refused_processes(monkeypatch, device, machine, gpus, said):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(machine))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(BadInput, match=said):
        processes.start(device)
    assert processes.total == 1
