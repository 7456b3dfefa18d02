"""When a run in the toy world is evaluated, when the figures come from the cache, and what is shown of them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, ImageDraw

from data import Template
from lab import report


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A list that fills with the folders for which a model was really evaluated."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def evaluation(name):
        def evaluate(*args):
            folder = args[-1]
            seen.append(str(folder))
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps({name: len(seen)}))
            (folder / "answers.jsonl").write_text(name)
            return {name: len(seen)}

        return evaluate

    monkeypatch.setattr(report.eval_pope, "evaluate", evaluation("pope"))
    monkeypatch.setattr(report.eval_chair, "evaluate", evaluation("chair"))
    monkeypatch.setattr(report.text_score, "evaluate", evaluation("text"))
    return seen


def run(**more):
    return SimpleNamespace(**({"toy_world": "world-1", "no_eval": False} | more))


def test_no_evaluation(asked, llava):
    """Of another model than the toy base, and with --no-eval."""
    for args in (run(toy_world=None), run(no_eval=True)):
        for evaluate in (report.evaluate, report.evaluate_start):
            assert evaluate(*llava, args, Path("out")) is None
    assert asked == [] and not Path("out").exists()


def test_the_start_is_evaluated_once(asked, llava):
    """The second run has the same figures and files; another model, world or template has its own."""
    first = report.evaluate_start(*llava, run(), Path("a/before"))
    assert first == {"pope": {"pope": 1}, "chair": {"chair": 2}, "text": {"text": 3}}
    assert report.evaluate_start(*llava, run(), Path("b/before")) == first
    assert asked == ["a/before/pope", "a/before/chair", "a/before/text"]
    assert Path("b/before/pope/answers.jsonl").read_text() == "pope"

    model, processor = llava
    report.evaluate_start(model, processor, run(toy_world="world-2"), Path("c"))
    processor.template = "plain"
    report.evaluate_start(model, processor, run(), Path("d"))
    model.source = "other files"
    report.evaluate_start(model, processor, run(), Path("e"))
    processor.template = "checkpoint"  # the same name for two templates
    for name, start in (("f", "Be brief. "), ("g", "Be long. ")):
        processor.own = Template(start, "{}:", "{}")
        report.evaluate_start(model, processor, run(), Path(name))
    assert asked[3::3] == ["c/pope", "d/pope", "e/pope", "f/pope", "g/pope"]


def test_a_resumed_run_keeps_the_start_that_it_has(asked, llava):
    """Although the cache has it too."""
    first = report.evaluate_start(*llava, run(), Path("a/before"))
    assert Path(".cache").is_dir()
    assert report.evaluate_start(*llava, run(), Path("a/before")) == first and len(asked) == 3


def test_after_training_nothing_comes_from_the_cache(asked, llava):
    """A resumed run alone takes what it had written before."""
    report.evaluate_start(*llava, run(), Path("a/before"))
    after = report.evaluate(*llava, run(), Path("a/after"))
    assert len(asked) == 6
    assert report.evaluate(*llava, run(), Path("a/after")) == after and len(asked) == 6


def test_what_is_asked(monkeypatch, llava):
    """All three question files and the truth of the run's own world, about its images."""
    seen = []
    monkeypatch.setattr(report.eval_pope, "evaluate", lambda *args: seen.append(args))
    monkeypatch.setattr(report.eval_chair, "evaluate", lambda *args: seen.append(args))
    monkeypatch.setattr(report.text_score, "evaluate", lambda *args: seen.append(args))
    report.evaluate(*llava, run(), Path("out"))
    world = Path("world-1")
    questions = [world / f"pope_{split}.json" for split in ("random", "popular", "adversarial")]
    assert seen[0] == (*llava, questions, world / "images", Path("out/pope"))
    truth = [world / "instances.json"], [world / "captions.json"], world / "synonyms.txt"
    assert seen[1] == (*llava, *truth, world / "images", Path("out/chair"))
    assert seen[2] == (*llava, world / "text_test.json", Path("out/text"))


def test_half_of_an_evaluation_is_none(asked, llava):
    """A run that was stopped between POPE and CHAIR evaluates both again."""
    folder = Path("a/after/pope")
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    with pytest.raises(FileExistsError):  # of the fixture: POPE is asked again
        report.evaluate(*llava, run(), Path("a/after"))
    assert asked == ["a/after/pope"]


# ---- what is shown


def figures(first):
    """POPE, CHAIR and text score with figures that all differ: first, first + .01, ..."""
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    split = lambda n: {name: first + 0.1 * n + 0.01 * i for i, name in enumerate(names)}
    pope = {name: split(n) for n, name in enumerate((*report.SPLITS, "mean"))}
    names = ("chair_i", "chair_s", "recall", "length")
    chair = {name: first + 0.5 + 0.01 * i for i, name in enumerate(names)}
    return {"pope": pope, "chair": chair, "text": {"mean": first + 0.08}}


def test_table_by_hand():
    head, before, after = report.table({"before": figures(0.1), "after": figures(0.2)}).split("\n")
    assert head.split()[-1] == "text" and head.index("CHAIR_s") < head.index("CHAIR_i")
    # accuracy of the three splits, yes ratio of the last, CHAIR_s, CHAIR_i, recall, words, text
    want = ["0.100", "0.200", "0.300", "0.340", "0.610", "0.600", "0.620", "0.6", "0.180"]
    assert before.split() == ["before", *want]
    want = ["0.200", "0.300", "0.400", "0.440", "0.710", "0.700", "0.720", "0.7", "0.280"]
    assert after.split() == ["after", *want]


def test_the_summary(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(report, "picture", lambda *args: drawn.append(args))
    args = SimpleNamespace(toy_world="world-1", seed=7)
    before, after = figures(0.1), figures(0.2)
    report.finish(tmp_path, before, after, {"train": 12.345, "eval": 2.0}, args)
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "before": before,
        "after": after,
        "seconds": {"train": 12.3, "eval": 2.0},
        "seed": 7,
    }
    assert drawn == [(tmp_path, Path("world-1"))]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "before",
        "after",
    ]
    report.finish(tmp_path, None, after, {"train": 1.0}, args)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["after"]
    report.finish(tmp_path, None, None, {"train": 1.0}, args)
    assert capsys.readouterr().out == "" and len(drawn) == 2


def test_a_group_methods_curves_are_drawn(tmp_path, drawing):
    """grpo.py's: reward, groups without spread, length, each in its panel."""
    texts, lines = drawing
    rows = [
        {"loss": 0, "reward": r, "frac_reward_zero_std": z, "completions/mean_length": n, "step": i}
        for i, (r, z, n) in enumerate([(0.25, 0.5, 30), (0.75, 0.25, 20)])
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report._curves(tmp_path / "m.jsonl", 800, 190)
    names = [said for said, _ in texts if said in set(sum(report.CURVES, ()))]
    assert names == ["loss", "reward", "frac_reward_zero_std", "completions/mean_length"]
    rises = [points[1][1] < points[0][1] for points in lines[1:]]
    assert rises == [True, False, False]
    for bound in ("0.75", "0.25", "0.5", "30", "20"):
        assert (bound, report.GRAY) in texts


@pytest.fixture
def drawing(monkeypatch):
    """What is drawn: ([(text, colour)], [points of a line])."""
    texts, lines, real = [], [], ImageDraw.Draw

    def draw_on(image):
        draw = real(image)
        text, line = draw.text, draw.line

        def note_text(at, said, colour, font):
            texts.append((said, colour))
            text(at, said, colour, font)

        def note_line(points, colour, width):
            lines.append(points)
            line(points, colour, width)

        draw.text, draw.line = note_text, note_line
        return draw

    monkeypatch.setattr(report.ImageDraw, "Draw", draw_on)
    return texts, lines


def test_the_picture_of_a_run(tmp_path, drawing):
    """Of an image the first question about something absent; a wrong answer and an absent object are red."""
    world, out = tmp_path / "world", tmp_path / "run-1"
    (world / "images").mkdir(parents=True)
    Image.new("RGB", (28, 28), "blue").save(world / "images" / "a.png")
    (world / "synonyms.txt").write_text("dog, puppy\ncup, mug\n")
    questions = [("cup", "yes"), ("dog", "no"), ("cat", "no")]
    rows = [{"image": "a.png", "text": f"A {x}?", "label": label} for x, label in questions]
    lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
    (world / "pope_adversarial.json").write_text(lines(rows))
    said = {"before": ("A mug and a puppy.", ["dog"], "Yes"), "after": ("A mug.", [], "No")}
    for side, (caption, absent, answer) in said.items():
        for name in ("pope", "chair"):
            (out / side / name).mkdir(parents=True)
        answers = [
            {"question": row["text"], "image": "a.png", "answer": text}
            for row, text in zip(rows, ("Yes", answer, "Maybe"))
        ][::-1]
        (out / side / "pope" / "answers_adversarial.jsonl").write_text(lines(answers))
        row = {"image": "a.png", "caption": caption, "hallucinated": absent}
        (out / side / "chair" / "captions.jsonl").write_text(lines([row]))
    losses = [{"step": i, "loss": loss} for i, loss in enumerate((4.0, 2.0, 3.0))]
    (out / "metrics.jsonl").write_text(lines(losses))
    report.picture(out, world)

    texts, curves = drawing
    colour = dict(texts)
    assert colour["puppy."] == report.RED and colour["mug"] == report.BLACK
    assert colour["A dog?"] == report.BLUE and not {"A cup?", "A cat?"} & set(colour)
    assert colour["before: Yes  "] == report.RED and colour["after: No  "] == report.GREEN
    (curve,) = curves
    assert [y for _, y in curve] == [30, 164, 97]  # highest, lowest, between
    assert [x for x, _ in curve] == [60, 800, 1540]
    with Image.open(out / "report.png") as sheet:
        assert sheet.width == 3 * 520
