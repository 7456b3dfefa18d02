"""sample.py: what is printed is what the model says, before and after an adapter."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import sample
import sampling
from common import run
from data import Record
from formats import adapters, checkpoints


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys, checkpoint):
    """A function that runs sample.py on a small picture -> (stdout, stderr)."""
    Image.effect_noise((28, 28), 80).convert("RGB").save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")

    def call(*args, status=0):
        command = [
            "--model",
            checkpoint,
            "--image",
            "a.png",
            "--prompt",
            "What?",
            "--max-new-tokens",
            6,
            *args,
        ]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, command)])
        try:
            run(sample.main)
        except SystemExit as end:
            assert end.code == status
        return capsys.readouterr()

    return call


def test_columns():
    assert sample.side_by_side(["a b", "one two three"], 13) == [
        "a b   | one",
        "      | two",
        "      | three",
    ]
    assert sample.side_by_side(["a\n\nb"], 10) == ["a", "", "b"] and sample.side_by_side(
        ["", "x"], 9
    ) == ["    | x"]


def test_without_and_with_an_adapter(ask, checkpoint, tmp_path):
    model, processor = checkpoints.load(checkpoint)
    record = Record("row", Path("a.png"), ("What?",))
    ((before,),) = sampling.generate(model, processor, [record], 6)
    model.prepare(2, projector=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for _, layer in checkpoints.adapters(model):
            layer.lora_B.normal_()
    adapters.save_adapter(model, tmp_path / "adapter", checkpoint)
    ((after,),) = sampling.generate(model, processor, [record], 6)
    assert before != after
    out, _ = ask()
    assert out.splitlines() == ["a.png  What?", *sample.side_by_side([before], 60), ""]
    out, _ = ask("--adapter", tmp_path / "adapter")
    head, names, *lines = out.splitlines()
    assert names.split() == ["BEFORE", "|", "AFTER"] and lines == [
        *sample.side_by_side([before, after], 60),
        "",
    ]
    out, err = ask("--k", 3, "--image", "a.png")
    prompt = "USER: <image>\\nWhat? ASSISTANT:\", an answer ends with '</s>'"
    assert err.count("template vicuna_v1, image aspect pad; asked as") == err.count(prompt) == 1
    assert out.count("a.png") == 2 and out == ask("--k", 3, "--image", "a.png").out


def test_what_reaches_the_model(ask, monkeypatch):
    """One answer is greedy, more are drawn; prompt, image, template, aspect, length and seed are those of the flags."""
    calls = []

    def generate(model, processor, records, most, temperature, k, batch_size, seed):
        args = most, temperature, k, batch_size, seed
        calls.append((processor.template, processor.image_aspect, args))
        (record,) = records
        assert (record.image, record.turns) == (Path("a.png"), ("What?",))
        return [["x"] * k]

    monkeypatch.setattr(sample, "generate", generate)
    for flags, want in (
        ([], ("vicuna_v1", "pad", (6, 0.0, 1, 8, 0))),
        (["--k", 3, "--seed", 5], ("vicuna_v1", "pad", (6, 1.0, 3, 8, 5))),
        (["--k", 3, "--temperature", 0], ("vicuna_v1", "pad", (6, 0.0, 3, 8, 0))),
        (["--temperature", 0.5], ("vicuna_v1", "pad", (6, 0.5, 1, 8, 0))),
        (
            ["--template", "plain", "--image-aspect", "checkpoint"],
            ("plain", "checkpoint", (6, 0.0, 1, 8, 0)),
        ),
    ):
        ask(*flags)
        assert calls.pop() == want and not calls


def test_bad_flags(ask):
    for flags, words in (
        (["--k", 0], "argument --k: '0' was given; a whole number, 1 or more, is needed"),
        (
            ["--temperature", "nan"],
            "argument --temperature: 'nan' was given; a number, 0 or more, is needed",
        ),
        (["--image", "none.png"], "--image none.png: no such file"),
        (["--adapter", "nowhere"], "nowhere"),
    ):
        _, err = ask(*flags, status=2)
        assert words in err and "Traceback" not in err


def test_a_placeholder_is_the_place_of_the_picture(ask):
    """As in data files; the model does not read it as letters behind the picture."""
    assert ask("--prompt", "<image>\nWhat?").out == ask().out
    _, err = ask("--prompt", "<image> and <image>", status=2)
    assert "holds `<image>` 2 times" in err
