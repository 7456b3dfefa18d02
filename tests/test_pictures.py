"""Images that cannot be decoded: found before a run, remembered, left out or the end of the run, with its checkpoint."""

import ast
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_house import ROOT, SCRIPTS

import bdhs
import data
import processes
import sft
import training
from common import BadInput
from data import Record
from formats import dataset, inspector, pictures

SIZE = 40, 30


def jpeg(colour="red", share=1.0):
    """The first `share` of a JPEG's bytes."""
    file = io.BytesIO()
    Image.effect_noise(SIZE, 90).convert("RGB").save(file, "JPEG", quality=95)
    return file.getvalue()[: int(len(file.getvalue()) * share)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """0.jpg .. 3.jpg, of which 2.jpg ends too early, and pairs.json about them."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for i in range(4):
        Path(f"{i}.jpg").write_bytes(jpeg(share=0.5 if i == 2 else 1))
        turns = lambda answer: [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": answer},
        ]
        chosen, rejected = turns(f"A jar {i}."), turns(f"A cat {i}.")
        rows.append(
            {"image": f"{i}.jpg", "conversations": chosen, "rejected_conversations": rejected}
        )
    Path("pairs.json").write_text(json.dumps(rows))
    return tmp_path


PATHS = [Path(f"{i}.jpg") for i in range(4)]
WHY = "2.jpg: the picture cannot be decoded"


# ---- before a run


def test_what_each_way_finds(folder):
    """A file that ends too early has a good header; one that is no image has none."""
    Path("3.jpg").write_text("no image")
    for how, bad in (("full", ["2.jpg", "3.jpg"]), ("header", ["3.jpg"]), (None, [])):
        found = pictures.unreadable([None, *PATHS, PATHS[2]], how)
        assert [str(image) for image in found] == bad
    assert WHY in pictures.unreadable(PATHS, "full")[PATHS[2]]


def test_a_good_file_is_decoded_once(folder, monkeypatch):
    """Until it changes. A bad one is looked at again: it may be repaired, or the disk was."""
    calls, opened = [], pictures.open_image
    monkeypatch.setattr(pictures, "open_image", lambda i: calls.append(str(i)) or opened(i))
    again = lambda: (calls.clear(), pictures.unreadable(PATHS, "full"), sorted(calls))[1:]
    assert list(again()[0]) == [PATHS[2]] and len(calls) == 4
    assert again()[1] == ["2.jpg"]
    Path("1.jpg").write_bytes(jpeg(share=0.4))
    assert again() == (pictures.unreadable(PATHS, "full"), ["1.jpg", "2.jpg"])
    os.utime("0.jpg", ns=(1, 1))
    Path("2.jpg").write_bytes(jpeg())
    bad, looked = again()
    assert list(bad) == [PATHS[1]] and looked == ["0.jpg", "1.jpg", "2.jpg"]
    assert again()[1] == ["1.jpg"]
    assert len(set((folder / ".cache" / pictures.SEEN).read_text().split())) == 5


def test_images_inside_a_file_are_told_apart(folder):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    text = json.dumps({"question": "What?", "chosen": "A jar.", "rejected": "A cat."})
    rows = [
        {
            "image": {"bytes": jpeg(share=share), "path": "x.jpg"},
            "text": text,
            "origin_dataset": "d",
        }
        for share in (1, 0.5, 1)
    ]
    pq.write_table(pa.Table.from_pylist(rows), "rows.parquet")
    for _ in range(2):
        with pytest.raises(
            BadInput, match=r"row 1: rows.parquet, row 1: .*cannot be decoded.*\(1 of"
        ):
            dataset.read([Path("rows.parquet")], check_images="full")
    rows = dataset.read([Path("rows.parquet")], skip_bad_rows=True, check_images="full")
    assert [r.where for r in rows.records] == ["rows.parquet, row 0", "rows.parquet, row 2"]


def test_rows_of_bad_images_are_refused_or_skipped(folder):
    read = lambda **how: dataset.read([Path("pairs.json")], **how)
    with pytest.raises(BadInput, match=rf"pairs.json, row 2: {WHY} .*\(1 of 4 rows are refused"):
        read(check_images="full")
    rows = read(check_images="full", skip_bad_rows=True)
    assert len(rows.records) == 3 and [(r["file"], r["row"]) for r in rows.skipped] == [
        ("pairs.json", 2)
    ]
    assert len(read(check_images="header").records) == len(read().records) == 4


def test_data_py_refuses_what_a_run_refuses(folder, monkeypatch, capsys):
    for flags, refused in (((), 1), (("--check-images", "header"), 0)):
        monkeypatch.setattr("sys.argv", ["data.py", "pairs.json", *flags, "--json"])
        inspector.main()
        told = json.loads(capsys.readouterr().out)
        assert [r["row"] for r in told["refused"]] == [2] * refused
        assert told["pairs"] == 4 - refused and told["rows"] == 4


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_trainer_looks_at_its_images(name):
    """Before the run as its flag says, and at those of a step before the step uses any random number."""
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    read = [c for c in calls if ast.unparse(c.func) == "dataset.read"]
    ways = [ast.unparse(k.value) for c in read for k in c.keywords if k.arg == "check_images"]
    assert ways == ["args.check_images"]
    (loop,) = [
        n for n in ast.walk(tree) if isinstance(n, ast.For) and ast.unparse(n.target) == "step"
    ]
    text = ast.unparse(loop)
    assert "save = lambda: training.save_checkpoint(out, step, model, optimizer)" in text
    drawn = ("processor.collate(", "collate(", "hallucinate(", "random.Random(", "draw_rollout(")
    assert 0 < text.index("training.readable(") < min(text.find(c) for c in drawn if c in text)


# ---- in a run


@pytest.fixture
def late(folder):
    """What `training.readable` gets: a processor without model, examples of the four images and one of text."""
    examples = [
        SimpleNamespace(record=Record(f"pairs.json, row {i}", image, ("What?",)))
        for i, image in enumerate([*PATHS, None])
    ]
    processor = SimpleNamespace(
        prefetch=data.Prefetch(lambda i: (torch.zeros(1), data.open_image(i).size))
    )
    Path("skipped.json").write_text("[]")
    return processor, examples


def readable(late, micro_batches, skip, saved):
    args = SimpleNamespace(skip_bad_rows=skip)
    return training.readable(micro_batches, *late, args, Path(), lambda: saved.append("saved"))


def test_a_row_that_fails_late_is_skipped_and_listed(late, capsys):
    """Once, whatever the number of epochs; its micro-batch goes on without it, or not at all."""
    saved = []
    for _ in range(2):
        left = readable(late, [(0, [0, 2]), (1, [2]), (2, [4, 3])], True, saved)
        assert left == [(0, [0]), (2, [4, 3])] and not saved
    (row,) = json.loads(Path("skipped.json").read_text())
    assert (row["file"], row["row"]) == ("pairs.json", 2) and WHY in row["why"]
    assert capsys.readouterr().err.count("skipped: pairs.json, row 2") == 1


@pytest.mark.parametrize("total", [1, 2])
@pytest.mark.parametrize("micro_batches, skip", [([(0, [0, 2])], False), ([(0, [2])], True)])
def test_else_the_run_stops_with_a_checkpoint(late, monkeypatch, micro_batches, skip, total):
    """Also if no row of the step is left. One of several processes cannot write a checkpoint alone."""
    monkeypatch.setattr(processes, "total", total)
    saved = []
    with pytest.raises(BadInput, match="pairs.json, row 2: .*--resume goes on"):
        readable(late, micro_batches, skip, saved)
    assert saved == ["saved"] * (total == 1)


def test_several_processes_skip_nothing(late, monkeypatch):
    """All of them must do as many passes."""
    monkeypatch.setattr(processes, "total", 2)
    with pytest.raises(BadInput, match="pairs.json, row 2"):
        readable(late, [(0, [0, 2])], True, [])


def train(monkeypatch, checkpoint, out, *flags):
    """sft.py on pairs.json, a row a step."""
    argv = [
        "--model",
        checkpoint,
        "--data",
        "pairs.json",
        "--epochs",
        1,
        "--batch-size",
        1,
        "--lora-rank",
        2,
    ]
    argv += ["--save-every", 0, "--check-images", "header", "--out", out, *flags]
    monkeypatch.setattr("sys.argv", ["sft.py", *map(str, argv)])
    sft.main()
    return load_file(Path(out) / "adapter" / "adapter_model.safetensors")


def test_a_run_goes_on_once_the_file_is_repaired(folder, checkpoint, monkeypatch):
    """From the step at which it stopped, to what an undisturbed run gives."""
    with pytest.raises(BadInput, match=f"row 2: {WHY}.*The steps before are saved"):
        train(monkeypatch, checkpoint, "run")
    done = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert Path("run/checkpoints/latest").read_text() == f"step-{len(done):06d}"
    Path("2.jpg").write_bytes(Path("1.jpg").read_bytes())
    resumed = train(monkeypatch, checkpoint, "run", "--resume")
    whole = train(monkeypatch, checkpoint, "whole")
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 4
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_run_skips_what_fails_late(folder, checkpoint, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x"])
    argv = ("--skip-bad-rows", "--grad-accum", 2)
    train(monkeypatch, checkpoint, "run", *argv)
    (row,) = json.loads(Path("run/skipped.json").read_text())
    assert row["row"] == 2 and len(Path("run/metrics.jsonl").read_text().splitlines()) == 2


# ---- a drawn answer that does not fit


def test_a_drawn_answer_that_does_not_fit_is_no_negative(llava):
    """It is left out like an empty one; online, the run would end, and again after --resume."""
    _, processor = llava
    record = Record("row 0", None, ("What?",), ("A cup.",))
    example = processor.encode(record)
    processor.max_length = len(example.prompt) + 40
    negatives = [SimpleNamespace(text=text) for text in ("A dog.", "dog " * 60, "")]
    assert [bdhs.encode_negative(record, n.text, processor) is None for n in negatives] == [
        False,
        True,
        True,
    ]
    (pair,), usable = bdhs.with_negatives([example] * 3, negatives, processor)
    assert processor.text(pair.answers[1]) == "A dog." and usable == [True]
