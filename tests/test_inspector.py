"""data.py FILE: counts, lengths and samples of a data file, and what a checkpoint would refuse of it."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image

from data import Record
from formats import checkpoints, inspector


@pytest.fixture
def inspect(monkeypatch, capsys):
    """A function that runs inspector.main() -> what it prints."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, flags)])
        inspector.main()
        return capsys.readouterr().out

    return call


def pair(question, chosen, rejected, **more):
    """A row of POVID."""
    turns = lambda answer: [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return more | {"conversations": turns(chosen), "rejected_conversations": turns(rejected)}


def test_spread_of_lengths():
    """Of 101 lengths the 95th percentile is the 96th smallest."""
    examples = [
        SimpleNamespace(prompt=[0] * n, answers=[[0] * 2 * n, [0] * 3 * n]) for n in range(1, 102)
    ]
    assert inspector.lengths(examples) == {
        "prompt": {"min": 1, "median": 51, "p95": 96, "max": 101},
        "chosen": {"min": 2, "median": 102, "p95": 192, "max": 202},
        "rejected": {"min": 3, "median": 153, "p95": 288, "max": 303},
    }
    alone = inspector.lengths([SimpleNamespace(prompt=[0], answers=[[0, 0]])])
    assert list(alone) == ["prompt", "chosen"]


def test_a_sample_shows_the_last_question_and_both_answers():
    record = Record("row 0", Path("a.png"), ("First?", "Yes.", "Last?"), ("good", "bad"))
    shown = {"image": "a.png", "prompt": "Last?", "chosen": "good", "rejected": "bad"}
    assert inspector.sample_of(record) == shown
    record = Record("row 0", None, ("Only?",), ("good",))
    shown = {"image": None, "prompt": "Only?", "chosen": "good", "rejected": None}
    assert inspector.sample_of(record) == shown


def test_refused_rows_are_counted_once_and_by_kind(capsys):
    """A row of two pairs may be refused twice; reasons that differ in numbers are one kind."""
    refused = [
        {"row": 3, "why": "completions 0 > 1: prompt of 90 tokens"},
        {"row": 3, "why": "completions 2 > 1: prompt of 91 tokens"},
        {"row": 8, "why": "the row has no image"},
    ]
    summary = {"layout": "vlfeedback", "rows": 9, "with_picture": 5, "pairs": 7, "refused": refused}
    inspector.show("v.json", summary | {"notes": {"left out": 4}, "samples": []})
    assert capsys.readouterr().out.splitlines() == [
        "v.json: layout vlfeedback, 9 rows, 5 with a picture, 7 pairs, 2 rows refused",
        "  refused: 2, first row 3: completions 0 > 1: prompt of 90 tokens",
        "  refused: 1, first row 8: the row has no image",
        "  4 left out",
    ]


def test_what_a_checkpoint_refuses(inspect, monkeypatch, checkpoint, tmp_path):
    """Beside what cannot be read; --images, --template and --max-length are those of training."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (28, 28)).save(tmp_path / "images" / "a.png")
    rows = [
        pair("<image>\nWhat?", "A cup.", "A dog.", image="a.png"),
        pair("<image>\nWhat?", "A cup.", "A dog.", image="gone.png"),
        pair("What?", "A cup. " * 50, "A dog."),
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    seen, load = [], checkpoints.load

    def loaded(name, **how):
        seen.append((name, how))
        return load(name, **how)

    monkeypatch.setattr(checkpoints, "load", loaded)
    flags = ("--images", tmp_path / "images", "--json")
    found = json.loads(inspect(file, *flags))
    assert (found["rows"], found["pairs"], [r["row"] for r in found["refused"]]) == (3, 2, [1])
    assert found["with_picture"] == 1
    assert "tokens" not in found and not seen

    model = ("--model", checkpoint, "--template", "plain", "--max-length", 40)
    found = json.loads(inspect(file, *flags, *model))
    how = {"device": "meta", "dtype": torch.bfloat16, "template": "plain", "max_length": 40}
    assert seen == [(str(checkpoint), how)]
    assert found["memory"].startswith("memory: 0.0 GiB at the peak (weights 0.0, trained 0.0, ")
    assert "2 x" in found["memory"]
    assert (found["rows"], found["pairs"], [r["row"] for r in found["refused"]]) == (3, 1, [1, 2])
    assert [sample["chosen"] for sample in found["samples"]] == ["A cup."]
    assert found["tokens"]["prompt"]["max"] <= 40


def test_instruction_data_has_no_pairs(inspect, tmp_path):
    turns = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": turns}]))
    found = json.loads(inspect(tmp_path / "rows.json", "--json"))
    assert (found["layout"], found["rows"], found["pairs"]) == ("llava_instruct", 1, 0)


def test_a_token_that_the_model_does_not_have(inspect, checkpoint, tmp_path):
    """`data.py FILE --model` names the row; so does a run, before it starts."""
    shutil.copytree(checkpoint, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(200)])
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [pair("What?", "A cup.", f"A {word}.") for word in ("dog", "<extra_199>")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = json.loads(inspect(tmp_path / "rows.json", "--model", tmp_path / "model", "--json"))
    (refused,) = found["refused"]
    assert refused["row"] == 1 and "the token '<extra_199>' has the id" in refused["why"]
