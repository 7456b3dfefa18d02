"""processes.py and sharding.py: two gloo processes do what one does on the same global batch."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five pairs, two of them text alone, as POVID's layout; a toy world's truth about the images."""
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
    (folder / "scenes.json").write_text(json.dumps({"test": scenes}))
    (folder / "driver.py").write_text(DRIVER.format(root=str(ROOT)))
    return folder


def launch(folder, processes, *runs):
    """Run scripts in so many processes -> the finished launcher."""
    (folder / "runs.json").write_text(json.dumps([[str(word) for word in row] for row in runs]))
    command = [sys.executable, "driver.py", "runs.json"]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command[1:1] = [*torchrun, str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def same_runs(checkpoint, processes):
    """The command lines of all trainers for this number of processes, with one global batch.

    4 examples a step, 2 a micro-batch: 10 examples are 3 steps, the last with one micro-batch, so
    that one of two processes has none.
    """
    common = ["--model", checkpoint, "--data", "povid.json", "--images", "images", "--lr", 1e-3,
              "--batch-size", 2, "--grad-accum", 2 // processes, "--epochs", 2]  # fmt: skip
    lora = [*common, "--lora-rank", 4, "--projector-lr", 1e-4]
    full = [*common, "--lora-rank", 0, "--projector-lr", 1e-4]
    out = lambda name: ["--out", f"{name}-{processes}"]
    return [
        ["dpo", *lora, *out("dpo")],
        ["sft", *lora, *out("sft")],
        ["dpo", *full, *out("dpo-full")],
        ["sft", *full, *out("sft-full")],
    ]


@pytest.fixture(scope="module")
def both(folder, checkpoint):
    """All trainers by one process, and by two."""
    for processes in (1, 2):
        done = launch(folder, processes, *same_runs(checkpoint, processes))
        assert done.returncode == 0, done.stderr
    return folder


def metrics(out):
    """Lines of metrics.jsonl, without the times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]


def weights(out):
    """What a run saved."""
    adapter = out / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else out / "model" / "model.safetensors")


@pytest.mark.parametrize("name", ["dpo", "sft", "dpo-full", "sft-full"])
def test_two_processes_are_one(both, name):
    one, two = (both / f"{name}-{n}" for n in (1, 2))
    assert len(metrics(one)) == 3
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    gap = torch.cat([(a[k] - b[k]).abs().flatten() for k in a])
    assert (gap > 1e-6).float().mean() < 1e-3 and gap.max() < 5e-5
