"""lab/sight.py: pairs with wrong attributes, pictures of less sight, rows left out, what is told of the cells."""

import json
import random

import pytest
from PIL import Image, ImageChops, ImageStat

import eval_chair
import eval_pope
from formats import checkpoints
from lab import parts, sight, toyworld
from lab.benchmarks import problems
from lab.benchmarks import test_scenes as scenes_of_the_test
from lab.oracle import Oracle, mentions


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world of 30 preference pictures and 12 seen ones."""
    folder = tmp_path_factory.mktemp("sight") / "world"
    texts = {"text": 1, "text_mix": 1, "text_test": 1}
    toyworld.write(folder, 7, 30, 30, 4, size=48, texts=texts)
    return folder


@pytest.fixture
def toy(world, tmp_path, monkeypatch):
    """lab.toy with this world and an empty cache."""
    monkeypatch.setattr(sight.toy, "world", lambda seed: world)
    monkeypatch.setattr(sight.toy, "CACHE", tmp_path / "cache")
    return sight.toy


def test_pairs_are_the_captions_with_wrong_attributes(world, toy):
    """Of a caption a picture in each file: those whose worse caption is not longer by a clause."""
    texts = lambda row: [
        row[key][1]["value"] for key in ("conversations", "rejected_conversations")
    ]
    rows = [row for name in sight.PAIRS for row in json.loads((world / name).read_text())]
    captions = [row for row in rows if len(texts(row)[0].split()) > 6]
    scenes, taken = Oracle(world).scenes, sight.pairs(7)
    assert len(captions) == 2 * 30 and 0 < len(taken) < 60
    for row in captions:
        better, worse = texts(row)
        absent = set(mentions(worse)) - scenes[row["image"]].present.keys()
        longer = len(worse.split()) > len(better.split()) + 3
        assert bool(absent) == longer == (row not in taken), (better, worse)


def test_less_sight_is_fewer_pixels(world, toy):
    whole = sight.seen(7, sight.SIDES[0])
    assert whole == world / "images"
    names = [path.name for path in whole.iterdir()]
    names = sorted(name for name in names if not name.startswith("test_")) + ["test_00000.png"]
    lost = []
    for side in (12, 0):
        folder = sight.seen(7, side)
        there = {path.name for path in folder.iterdir()}
        assert set(names) <= there, "all pictures of pairs, and those of POPE"
        picture, before = Image.open(folder / names[0]), Image.open(whole / names[0])
        lost.append(sum(ImageStat.Stat(ImageChops.difference(before, picture)).mean))
    assert 0 < lost[0] < lost[1] and len(picture.getcolors()) == 1
    assert sight.seen(7, 0) == folder, "made once"


def test_the_plain_mix_has_no_short_questions(world, toy, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(toy, "script", lambda *arguments: calls.append(arguments))
    assert sight.plain_base(7, tmp_path) == tmp_path / "run" / "model"
    asked = [
        row["conversations"][0]["value"]
        for row in json.loads((tmp_path / "conversation.json").read_text())
    ]
    every = [
        row["conversations"][0]["value"]
        for row in json.loads((world / "instruct.json").read_text())
    ]
    short = [text for text in every if "in the image?" in text]  # yes/no and multiple choice
    assert len(short) >= 5 * 30 and sorted(asked + short) == sorted(every)
    assert any("Where" in text for text in asked) and any("plural" in text for text in asked)
    assert calls[0][0] == "sft.py" and tmp_path / "conversation.json" in calls[0]


def test_what_a_base_can_do(world, toy, tmp_path, monkeypatch):
    """Each figure is that of the base's own evaluation."""
    parts.write(tmp_path / "parts", world, 7, epochs=0)
    model, processor = checkpoints.compose(tmp_path / "parts" / "clip", tmp_path / "parts" / "llm")
    checkpoints.save(model, processor, tmp_path / "plain")
    monkeypatch.setattr(sight, "plain_base", lambda seed, folder: tmp_path / "plain")
    asked = problems(scenes_of_the_test(world, 300), random.Random("7/vqa"))[1::3]
    letter = asked[0]["solution"]
    right = [row["solution"] == letter for row in asked]
    assert all("\nA. " in row["problem"] for row in asked) and 0 < sum(right) < len(right)
    says = lambda model, processor, records, most: [(f" {letter}. a cup",)] * len(records)
    monkeypatch.setattr(sight, "generate", says)
    scored = lambda model, processor, path: {"mean": 0.5} if path.name == "text_test.json" else {}
    monkeypatch.setattr(sight.text_score, "evaluate", scored)
    found = sight.abilities(7, "plain")
    assert found["choice"] == sum(right) / len(right) and found["text"] == 0.5
    images = world / "images"
    questions = [world / f"pope_{split}.json" for split in ("random", "adversarial")]
    pope = eval_pope.evaluate(model, processor, questions, images)
    assert found["pope"] == {name: pope[name]["accuracy"] for name in ("random", "adversarial")}
    truth = [world / "instances.json"], [world / "captions.json"], world / "synonyms.txt"
    chair = eval_chair.evaluate(model, processor, *truth, images, None)
    assert (found["chair_s"], found["recall"]) == (chair["chair_s"], chair["recall"])


def test_both_mixes_are_of_as_many_steps(toy, tmp_path, monkeypatch):
    """A base that was trained on is compared as it was before."""
    monkeypatch.setattr(toy, "base", lambda seed: tmp_path / "base" / "model")
    assert sight.plus_base(7) == tmp_path / "base" / "model"
    (tmp_path / "base" / "run" / "model").mkdir(parents=True)
    assert sight.plus_base(7) == tmp_path / "base" / "run" / "model"


def test_cells_are_resumed_and_told(toy, tmp_path, monkeypatch, capsys):
    """Two seeds, one of them with a cell less; a second call measures only that."""
    measured = []
    for what in ("sight", "accuracy", "abilities"):
        monkeypatch.setattr(sight, what, lambda *of, what=what: measured.append(of) or made(what))

    def made(what):
        if what == "sight":
            return 0.5 + len(measured) / 1000
        if what == "accuracy":
            return 0.75
        pope = {"random": 0.9, "adversarial": 0.8}
        return {"pope": pope, "choice": 0.25, "chair_s": 0.6, "text": 0.7}

    run = lambda: monkeypatch.setattr(
        "sys.argv", ["x", "--seeds", "0", "1", "--out", str(tmp_path)]
    )
    run()
    sight.main()
    count = len(sight.SIDES) * (1 + len(sight.KINDS)) + 2
    assert len(measured) == 2 * count
    path = tmp_path / "sight.json"
    cells = json.loads(path.read_text())
    del cells["accuracy/1/12/facts"]
    cells["accuracy/0/12/facts"] = 0.25
    write_json = json.dumps(cells)
    path.write_text(write_json)
    capsys.readouterr()
    sight.main()
    assert measured[2 * count :] == [(1, 12, "facts")]
    shown = capsys.readouterr().out
    assert "0.500 ± 0.354" in shown, "mean and deviation of .25 and .75"
    assert "0.700 ± 0.000" in shown, "the text score"
    assert "0.900 ± 0.000" in shown and Image.open(tmp_path / "sight.png").size[0] > 500
