"""sft.py: which model it teaches, what is scored, and which parts learn."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import sft
import training
from common import BadInput
from formats import checkpoints, dataset

DIALOGUES = (
    ("What is it?", "A red cup.", "And behind?", "A dog and two bananas on a table."),
    ("Is there a dog?", "No."),
    ("Name a colour.", "Blue."),  # text only
)


class Stop(Exception):
    """Ends main() where a test has seen enough."""


@pytest.fixture
def call(monkeypatch, tmp_path):
    """A function that runs sft.main() on the dialogues, with these flags."""
    Image.effect_noise((28, 28), 80).convert("RGB").save(tmp_path / "a.png")
    rows = []
    for i, texts in enumerate(DIALOGUES):
        image = {} if i == 2 else {"image": "a.png"}
        texts = ("<image>\n" * bool(image) + texts[0], *texts[1:])
        roles = ("human", "gpt") * (len(texts) // 2)
        turns = [{"from": role, "value": text} for role, text in zip(roles, texts)]
        rows.append(image | {"conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, flags)])
        sft.main()

    return main


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--model", "M", "--data", "rows.json", "--lora-rank", 4, "--vision-lr", 1e-5],
            "--vision-lr trains the tower",
        ),
        (["--vision", "CLIP", "--data", "rows.json"], "--vision and --llm go together"),
        (["--llm", "LLM", "--data", "rows.json"], "--vision and --llm go together"),
        (["--vision", "CLIP", "--llm", "LLM"], "--vision and --llm need --data"),
    ],
)
def test_bad_flags(call, flags, words):
    with pytest.raises(BadInput, match=words):
        call(*flags)
    assert not Path("runs").exists()


def test_the_model_is_that_of_the_flags(call, monkeypatch):
    """Composed of two parts, or read; prompt, image aspect, seed and length reach both."""
    seen = []

    def stop(*args):
        seen.append(args)
        raise Stop

    monkeypatch.setattr(training, "show_memory", lambda *_, **__: None)
    monkeypatch.setattr(checkpoints, "load", stop)
    monkeypatch.setattr(checkpoints, "compose", stop)
    flags = ["--data", "rows.json", "--device", "cpu", "--dtype", "bfloat16", "--max-length", 99]
    flags += ["--seed", 7, "--image-aspect", "checkpoint"]
    kind = (torch.bfloat16, torch.device("cpu"))
    for more, want in (
        (
            ["--model", "M", "--template", "plain"],
            ("M", *kind, "plain", "checkpoint", 99, None),
        ),
        (
            ["--model", "M", "--quantize", "nf4", "--lora-rank", 4],
            ("M", *kind, None, "checkpoint", 99, "nf4"),
        ),
        (["--vision", "V", "--llm", "L"], ("V", "L", *kind, "vicuna_v1", "checkpoint", 7, 99)),
        (
            ["--vision", "V", "--llm", "L", "--template", "plain"],
            ("V", "L", *kind, "plain", "checkpoint", 7, 99),
        ),
    ):
        with pytest.raises(Stop):
            call(*flags, *more)
        assert seen.pop() == want


def test_a_step_by_hand(call, checkpoint):
    """The mean over the answer tokens of all turns, in both micro-batches; a row about the same image shares it."""
    call(
        "--model",
        checkpoint,
        "--data",
        "rows.json",
        "--images",
        ".",
        "--out",
        "run",
        "--steps",
        1,
        "--batch-size",
        1,
        "--grad-accum",
        2,
    )
    (line,) = [json.loads(text) for text in Path("run/metrics.jsonl").read_text().splitlines()]

    model, processor = checkpoints.load(checkpoint)
    examples = dataset.read(["rows.json"], answers=1).encode(processor, every_turn=True)
    total = tokens = 0
    for example in examples:
        said = processor.tokenizer.decode(example.answers[0][example.scored[0]])
        assert "cup" not in said or "bananas" in said  # both turns of the first
        with torch.no_grad():
            log_p, _ = model.log_probs(processor.collate([example]))
        total, tokens = total - float(log_p.sum()), tokens + len(log_p)
    assert line["tokens"] == tokens
    assert line["loss"] == pytest.approx(total / tokens, abs=1e-4)


@pytest.mark.parametrize("lr, projector_lr, vision_lr", [(0, 1e-3, 2e-3), (3e-3, 0, 0)])
def test_each_part_has_its_rate(call, monkeypatch, checkpoint, lr, projector_lr, vision_lr):
    seen = []

    def stop(model, *rates):
        trains = [
            any(p.requires_grad for p in part.parameters())
            for part in (model.llm, model.projector, model.vision)
        ]
        seen.append((trains, rates))
        raise Stop

    monkeypatch.setattr(training, "optimizer_for", stop)
    with pytest.raises(Stop):
        call(
            "--model",
            checkpoint,
            "--data",
            "rows.json",
            "--out",
            "run",
            "--lr",
            lr,
            "--projector-lr",
            projector_lr,
            "--vision-lr",
            vision_lr,
        )
    rates = (lr, projector_lr, vision_lr)
    assert seen == [([rate > 0 for rate in rates], rates)]


@pytest.mark.parametrize("kind, want", [("cosine", [1, 1, 0.5]), ("constant", [1, 1, 1])])
def test_the_schedule_of_a_run(call, checkpoint, kind, want):
    """A step of warm-up, then half a cosine over two steps, or none."""
    flags = ("--model", checkpoint, "--data", "rows.json", "--steps", 3, "--lr", 1e-3)
    call(*flags, "--schedule", kind, "--out", "run", "--no-eval")
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["lr"] for line in lines] == pytest.approx([1e-3 * f for f in want])


def test_random_weights_are_not_evaluated(call, monkeypatch, parts):
    """A composed model has no figures before its training."""
    seen = []

    def stop(*args):
        raise Stop

    monkeypatch.setattr(sft.report, "evaluate_start", lambda *args: seen.append(args))
    monkeypatch.setattr(training, "optimizer_for", stop)
    with pytest.raises(Stop):
        call("--vision", parts / "vision", "--llm", parts / "llm", "--data", "rows.json")
    assert not seen


def test_rows_that_are_skipped(call, monkeypatch, checkpoint):
    rows = json.loads(Path("rows.json").read_text())
    rows[1]["conversations"][1]["value"] = ""
    Path("rows.json").write_text(json.dumps(rows))
    flags = ("--model", checkpoint, "--data", "rows.json", "--out", "run")
    with pytest.raises(BadInput, match="rows.json, row 1"):
        call(*flags)

    def stop(*args):
        raise Stop

    monkeypatch.setattr(training, "optimizer_for", stop)
    with pytest.raises(Stop):
        call(*flags, "--skip-bad-rows")
    assert [row["row"] for row in json.loads(Path("run/skipped.json").read_text())] == [1]


def test_text_alone_where_the_projector_alone_trains(call, checkpoint):
    """LLaVA's first stage with a text-only row in a micro-batch of its own: it adds no gradient, and no error."""
    call(
        *("--model", checkpoint, "--data", "rows.json", "--images", ".", "--out", "run"),
        *("--lr", 0, "--projector-lr", 1e-3, "--batch-size", 1, "--grad-accum", 2, "--epochs", 1),
    )
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 1 and lines[0]["grad_norm"] > 0 and lines[0]["loss"] > 0
