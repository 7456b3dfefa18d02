"""When a run in the toy world is evaluated, and when the figures come from the cache."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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
    assert first == {"pope": {"pope": 1}, "chair": {"chair": 2}}
    assert report.evaluate_start(*llava, run(), Path("b/before")) == first
    assert asked == ["a/before/pope", "a/before/chair"]
    assert Path("b/before/pope/answers.jsonl").read_text() == "pope"

    model, processor = llava
    report.evaluate_start(model, processor, run(toy_world="world-2"), Path("c"))
    processor.template = "plain"
    report.evaluate_start(model, processor, run(), Path("d"))
    with torch.no_grad():
        model.projector.linear_1.bias += 1
    report.evaluate_start(model, processor, run(), Path("e"))
    assert asked[2::2] == ["c/pope", "d/pope", "e/pope"]


def test_after_training_nothing_comes_from_the_cache(asked, llava):
    """A resumed run alone takes what it had written before."""
    report.evaluate_start(*llava, run(), Path("a/before"))
    after = report.evaluate(*llava, run(), Path("a/after"))
    assert len(asked) == 4
    assert report.evaluate(*llava, run(), Path("a/after")) == after and len(asked) == 4
