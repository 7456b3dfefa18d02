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
import dpo
import prefetch
import processes
import rejection_sampling
import reward_model
import sft
import sharding
import steerlm
import training
from common import BadInput
from data import Record
from formats import dataset, inspector, pictures, ratings

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
    write_pairs(4)
    return tmp_path


def write_pairs(n):
    """n images, of which 2.jpg ends too early, and pairs.json about them."""
    rows = []
    for i in range(n):
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
    read = [c for c in calls if ast.unparse(c.func) in ("dataset.read", "rows.check_images")]
    given = [k.value for c in read for k in c.keywords if k.arg == "check_images"]
    given += [c.args[0] for c in read if ast.unparse(c.func) == "rows.check_images"]
    assert [ast.unparse(way) for way in given] == ["args.check_images"]
    (loop,) = [
        n for n in ast.walk(tree) if isinstance(n, ast.For) and ast.unparse(n.target) == "step"
    ]
    text = ast.unparse(loop)
    drawn = ("processor.collate(", "collate(", "hallucinate(", "random.Random(", "draw_rollout(")
    drawn += (" draw(", "(draw(", "grouping.draw(")
    looked = {"ppo": "prompts_of(", "grpo": "training.readable("}.get(name, "training.batches(")
    assert 0 < text.index(looked) < min(text.find(c) for c in drawn if c in text)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_trainer_sets_its_threads_before_it_decodes(name):
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    line = text.rindex("\n    processor.prefetch.workers = args.workers\n")
    assert (
        text.index("checkpoints.load(")
        < line
        < text.index("report.show_start(" if name != "reward_model" else "before = evaluate(")
    )


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


def readable(late, micro_batches, skip, saved, step=7):
    args = SimpleNamespace(skip_bad_rows=skip)
    save = lambda step, alone: saved.append((step, alone))
    return list(training.readable(micro_batches, step, args, Path(), *late, save))


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
    """Also if no row of the step is left; of several processes this one writes it."""
    monkeypatch.setattr(processes, "total", total)
    saved = []
    with pytest.raises(BadInput, match="pairs.json, row 2: .*before are saved; --resume goes on"):
        readable(late, micro_batches, skip, saved)
    assert saved == [(7, True)]


@pytest.mark.parametrize("why", ["no step yet", "divided weights", "another failed first"])
def test_or_without_one_where_there_is_none_to_write(late, monkeypatch, why):
    monkeypatch.setattr(sharding, "divided", ["a model"] * (why == "divided weights"))
    monkeypatch.setattr(training, "first_to_fail", lambda: why != "another failed first")
    saved, step = [], 0 if why == "no step yet" else 7
    with pytest.raises(BadInput, match="pairs.json, row 2: .*--resume goes on from the last"):
        readable(late, [(0, [2])], False, saved, step)
    assert not saved


def test_a_micro_batch_does_not_wait_for_the_images_of_the_next(late, monkeypatch):
    processor, examples = late
    asked, get = [], processor.prefetch.get
    monkeypatch.setattr(processor.prefetch, "get", lambda i: asked.append(i.name) or get(i))
    args = SimpleNamespace(
        seed=0, steps=2, batch_size=1, grad_accum=3, workers=2, skip_bad_rows=False
    )
    good = [examples[i] for i in (0, 1, 3)]
    indices, micro_batches = training.batches(0, args, Path(), processor, good, None)
    assert not asked and len(indices) == 3
    for number, (found, micro) in enumerate(micro_batches):
        assert found == number and micro == [indices[number]] and len(asked) == number + 1


def test_several_processes_skip_nothing(late, monkeypatch):
    """All of them must do as many passes."""
    monkeypatch.setattr(processes, "total", 2)
    with pytest.raises(BadInput, match="pairs.json, row 2"):
        readable(late, [(0, [0, 2])], True, [])


def train(monkeypatch, checkpoint, out, *flags, script=sft):
    """sft.py, or another script, on pairs.json, a row a step."""
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
    monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, argv)])
    script.main()
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


def test_a_run_whose_first_step_fails_begins_anew(folder, checkpoint, monkeypatch):
    """There is nothing to save yet; the broken image is not in the first micro-batch."""
    with pytest.raises(BadInput, match=f"row 2: {WHY}.*begins anew"):
        train(monkeypatch, checkpoint, "run", "--grad-accum", 4)
    assert not Path("run/checkpoints").exists()
    Path("2.jpg").write_bytes(Path("1.jpg").read_bytes())
    resumed = train(monkeypatch, checkpoint, "run", "--grad-accum", 4, "--resume")
    whole = train(monkeypatch, checkpoint, "whole", "--grad-accum", 4)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_step_that_fails_half_way_leaves_no_trace(folder, checkpoint, monkeypatch):
    """Its first micro-batch has gone through the model; what is saved is the state before it."""
    argv = ("--grad-accum", 2, "--epochs", 3)
    args = SimpleNamespace(seed=0, steps=None, epochs=3, batch_size=1, grad_accum=2)
    steps = [training.batch_of(i, args, 4)[0] for i in range(6)]
    step = next(i for i in range(1, 6) if steps[i][1] == 2)
    broken, late = Path("2.jpg").read_bytes(), training.take_step
    Path("2.jpg").write_bytes(jpeg())
    whole, taken = train(monkeypatch, checkpoint, "whole", *argv), []

    def take_step(*args):
        late(*args)
        taken.append(1)
        if len(taken) == step:
            Path("2.jpg").write_bytes(broken)

    good = Path("2.jpg").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(training, "take_step", take_step)
        with pytest.raises(BadInput, match=f"row 2: {WHY}.*The steps before are saved"):
            train(monkeypatch, checkpoint, "run", *argv, "--workers", 0)
    assert Path("run/checkpoints/latest").read_text() == f"step-{step:06d}"
    Path("2.jpg").write_bytes(good)
    resumed = train(monkeypatch, checkpoint, "run", *argv, "--resume")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("script, flags", [
    (dpo, ()),
    (reward_model, ("--no-facts", "--held-out", 2)),
    (bdhs, ("--max-new-tokens", 4)),
], ids=["dpo", "reward_model", "bdhs"])  # fmt: skip
def test_what_is_read_outside_of_a_step_is_skipped_too(
    tmp_path, checkpoint, monkeypatch, script, flags
):
    """Every row, or those held out: with --skip-bad-rows their pixels are looked at before the run."""
    monkeypatch.chdir(tmp_path)
    write_pairs(10)
    for i in (0, 4, 5, 7):  # of which some is held out
        Path(f"{i}.jpg").write_bytes(jpeg(share=0.5))
    flags = ("--skip-bad-rows", *flags)
    if script is bdhs:
        argv = ["bdhs.py", "--model", checkpoint, "--data", "pairs.json", "--out", "run"]
        argv += ["--check-images", "header", *flags]
        monkeypatch.setattr("sys.argv", list(map(str, argv)))
        bdhs.main()
    else:
        train(monkeypatch, checkpoint, "run", *flags, script=script)
    skipped = json.loads(Path("run/skipped.json").read_text())
    assert [row["row"] for row in skipped] == [0, 2, 4, 5, 7]


@pytest.mark.parametrize("workers", [0, 3])
def test_the_flag_holds_from_the_first_image(folder, checkpoint, monkeypatch, workers):
    """dpo.py's reference pass is before the first step."""
    made, pool = [], prefetch.ThreadPoolExecutor
    note = lambda n, **how: made.append(n) or pool(n, **how)
    monkeypatch.setattr(prefetch, "ThreadPoolExecutor", note)
    train(monkeypatch, checkpoint, "run", "--skip-bad-rows", "--workers", workers, script=dpo)
    assert made == [workers] * (workers > 0)


@pytest.mark.parametrize("script", [rejection_sampling, steerlm])
def test_images_of_ratings_are_looked_at(folder, checkpoint, monkeypatch, script):
    rated = lambda text: {"response": text} | ratings.BEST
    rows = [
        {"image": f"{i}.jpg", "turns": ["What?"], "answers": [rated(f"A jar {i}.")]}
        for i in range(4)
    ]
    Path("ratings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--data", "ratings.jsonl", "--check-images", "full")
    argv = ("--model", checkpoint, "--steps", 1, "--batch-size", 1, "--lora-rank", 2, *flags)
    monkeypatch.setattr("sys.argv", list(map(str, ("x.py", *argv, "--out", "refused"))))
    with pytest.raises(BadInput, match=f"ratings.jsonl, row 2: {WHY}.*1 of 4 rows are refused"):
        script.main()
    monkeypatch.setattr(
        "sys.argv", list(map(str, ("x.py", *argv, "--skip-bad-rows", "--out", "run")))
    )
    script.main()
    assert [row["row"] for row in json.loads(Path("run/skipped.json").read_text())] == [2]


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
