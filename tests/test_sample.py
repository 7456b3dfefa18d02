"""sample.py: what is printed is what the model says, before and after an adapter."""

import io
import re
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
    loaded = adapters.load_adapter(checkpoints.load(checkpoint)[0], tmp_path / "adapter")
    told = sample.marked(loaded, processor, record, after)
    assert "[" in told, "it says something else"
    assert names.split() == ["BEFORE", "|", "AFTER"] and lines == [
        *sample.side_by_side([before, told], 60),
        "",
    ]
    out, err = ask("--k", 3, "--image", "a.png")
    prompt = "USER: <image>\\nWhat? ASSISTANT:\", an answer ends with '</s>'"
    assert err.count("template vicuna_v1, image aspect pad; asked as") == err.count(prompt) == 1
    assert out.count("a.png") == 2 and out == ask("--k", 3, "--image", "a.png").out


@pytest.fixture
def adapted(tmp_path, monkeypatch, checkpoint):
    """(model, processor) with an adapter that also has a projector, on a small picture a.png."""
    Image.effect_noise((28, 28), 80).convert("RGB").save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    model, processor = checkpoints.load(checkpoint)
    model.prepare(2)
    torch.manual_seed(0)
    with torch.no_grad():
        for _, layer in checkpoints.adapters(model):
            layer.lora_B.normal_()
        for p in model.projector.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    adapters.save_adapter(model, tmp_path / "adapter", checkpoint)
    return adapters.load_adapter(checkpoints.load(checkpoint)[0], tmp_path / "adapter"), processor


def say_whole_words(processor, *models):
    """Let the models say lower-case words alone, so that their text is read as their tokens."""
    texts = {i: processor.tokenizer.decode([i]) for i in range(len(processor.tokenizer))}
    words = [i for i, text in texts.items() if re.fullmatch(" [a-z]{2,}", text)]
    with torch.no_grad():
        for m in models:
            rows = m.head_weight()[words].clone()
            m.head_weight().zero_()[words] = rows + 9 * rows.sign()


def test_marked_words_are_those_of_another_next_token(adapted, checkpoint):
    """By the base alone, token after token: projector and LoRA of the adapter play no part."""
    model, processor = adapted
    base, _ = checkpoints.load(checkpoint)
    record = Record("", Path("a.png"), ("What is in the picture?",))
    say_whole_words(processor, base, model)
    ((own,),) = sampling.generate(base, processor, [record], 6)
    assert len(own.split()) == 6 and sample.marked(model, processor, record, own) == own

    text = own + " bananas  and\na bowl, no dog."
    ids = processor.encode(Record("", record.image, record.turns, (text,))).answers[0][:-1]
    prompt = processor.encode(record).prompt
    pixels, _ = processor.images([processor.encode(record)])
    so_far, marks = "", []
    for i in range(len(ids)):
        drawn = sampling.sample(
            base, [torch.cat([prompt, ids[:i]])], pixels, max_new_tokens=1, temperature=0
        )
        piece = processor.tokenizer.decode(ids[: i + 1])[len(so_far) :]
        if drawn.tokens[0][0][0] != ids[i]:
            marks += range(len(so_far), len(so_far) + len(piece))
        so_far += piece
    words = re.split(r"(\s+)", so_far)
    place, want = 0, ""
    for word in words:
        told = word.strip() and set(marks) & set(range(place, place + len(word)))
        want += f"[{word}]" if told else word
        place += len(word)
    assert sample.marked(model, processor, record, text) == want.strip() and "[" in want
    assert sample.marked(model, processor, record, "") == ""


def test_the_request_is_for_the_adapter(ask, adapted, checkpoint, tmp_path, monkeypatch):
    """BEFORE is the base asked plainly, AFTER the adapter asked for the ratings; alone it is asked."""
    request = "\nHelpfulness:4,Correctness:4,Coherence:4,Complexity:2,Verbosity:4"
    (tuned, _), (base, processor) = adapted, checkpoints.load(checkpoint)
    record = Record("", Path("a.png"), ("What?",))
    wished = Record("", Path("a.png"), ("What?" + request,))
    said = {}
    for model, who in ((base, "base"), (tuned, "tuned")):
        for of, how in ((record, "plainly"), (wished, "asked")):
            ((said[who, how],),) = sampling.generate(model, processor, [of], 6)
    assert len(set(said.values())) == 4, "else a mix-up would not be seen"

    marked = sample.marked(tuned, processor, record, said["tuned", "asked"])
    wishes = ("--attributes", "complexity=2")
    out, err = ask("--adapter", tmp_path / "adapter", *wishes)
    lines = ["a.png  What?", *sample.side_by_side(["BEFORE", "AFTER"], 60)]
    assert out.splitlines() == [
        *lines,
        *sample.side_by_side([said["base", "plainly"], marked], 60),
        "",
    ]
    shown = re.findall(r"^(BEFORE|AFTER): .* asked as .*What\?(.*) ASSISTANT:", err, re.MULTILINE)
    assert shown == [("BEFORE", ""), ("AFTER", request.replace("\n", "\\n"))]
    out, _ = ask(*wishes)
    assert out.splitlines()[1:] == [*sample.side_by_side([said["base", "asked"]], 60), ""]


def test_marked_words_are_those_of_the_base_asked_plainly(adapted, checkpoint):
    model, processor = adapted
    base, _ = checkpoints.load(checkpoint)
    say_whole_words(processor, base, model)
    record = Record("", Path("a.png"), ("What is in the picture?",))
    ((plain,),) = sampling.generate(base, processor, [record], 6)
    processor.ask = "\nHelpfulness:4,Correctness:4,Coherence:4,Complexity:4,Verbosity:4"
    ((asked,),) = sampling.generate(base, processor, [record], 6)
    assert sample.marked(model, processor, record, plain) == plain and "[" not in plain
    assert "[" in sample.marked(model, processor, record, asked)
    assert processor.ask, "asked again behind it"


def test_chat(ask, monkeypatch, adapted, checkpoint, tmp_path):
    """Both answer every turn; the dialogue goes on with the adapter's words, as they were said."""
    model, processor = adapted
    base, _ = checkpoints.load(checkpoint)
    dialogue, want = [], []
    for line in ("Is there a dog?", "And a cup?"):
        record = Record("", Path("a.png"), (*dialogue, line))
        ((before,),) = sampling.generate(base, processor, [record], 6)
        ((after,),) = sampling.generate(model, processor, [record], 6)
        told = sample.marked(model, processor, record, after)
        want += [*sample.side_by_side(["BEFORE", "AFTER"], 60)]
        want += [*sample.side_by_side([before, told], 60), ""]
        dialogue += [line, after]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Is there a dog?\nAnd a cup?\n"))
    out, _ = ask("--chat", "--adapter", tmp_path / "adapter")
    lines = [line.removeprefix("> ").rstrip() for line in out.splitlines()]
    assert lines == [line.rstrip() for line in want] + [""]

    monkeypatch.setattr(sys, "stdin", io.StringIO("\nnever asked\n"))
    assert ask("--chat").out == "> \n"
    for more in (("--k", 2), ("--image", "a.png")):
        assert "--chat is about one image" in ask("--chat", *more, status=2).err


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
