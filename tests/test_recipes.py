"""lab/recipes.py: every command line of results/RECIPES.md is accepted by its script; the page is up to date."""

import importlib
import re
import shlex
import sys

import pytest

from lab import fits, recipes

PAGE = recipes.PAGE.read_text(encoding="utf-8")
LINES = [
    line for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]
FLAGS = sorted({flags for flags in re.findall(r"`(--[^`]*)`, \d+ GiB", PAGE)} | {""})


def parsed(line, monkeypatch):
    """The arguments that a script reads from a command line."""
    python, script, *words = shlex.split(line)
    assert python == "python"
    monkeypatch.setattr(sys, "argv", [script, *words])
    return importlib.import_module(script.removesuffix(".py")).parse()


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_accepted(line, monkeypatch, tmp_path):
    """Training lines also with the flags of each card."""
    monkeypatch.chdir(tmp_path)
    args = parsed(line, monkeypatch)
    assert args.out.startswith("runs/") and args.model
    if "eval_" not in line:
        assert [parsed(f"{line} {flags}", monkeypatch).model for flags in FLAGS]


def test_the_page_is_what_the_code_writes():
    assert PAGE == recipes.page()
    assert len(LINES) > 30 and len(FLAGS) > 1
    assert PAGE.count("not run here") == sum(len(paper.recipes) for paper in recipes.PAPERS)


def test_steerlm_is_asked_for_ratings(monkeypatch, tmp_path):
    """Each of its columns asks for all 4, in words that the evaluations accept; no other row asks."""
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"The columns of SteerLM:\n\n```\n(.*?)\n```", PAGE, re.DOTALL)
    lines = block.splitlines()
    assert len(lines) == len(recipes.LI_LIN_PEI.columns)
    assert sorted(lines) == sorted(line for line in LINES if "--attributes" in line)
    four = dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity", "verbosity"), 4)
    for line in lines:
        args = parsed(line, monkeypatch)
        assert args.attributes == four and args.adapter == ["none", "runs/ROW/adapter"]


def test_each_row_is_evaluated_in_folders_of_its_own():
    """A folder of --out belongs to its contestants: another row's adapter is refused there."""
    for paper in recipes.PAPERS:
        folders = [line.split("--out ")[1] for line in paper.evaluations]
        assert all(folder.startswith("runs/ROW/") for folder in folders)
        assert len(set(folders)) == len(folders)


def test_a_row_has_a_figure_for_every_column():
    for paper in recipes.PAPERS:
        assert all(len(recipe.figures) == len(paper.columns) for recipe in paper.recipes)


def test_hours_by_hand():
    """RLHF-V, three epochs: each pair once by the reference, then as the front page's table counts."""
    cells = {"step/next/b2": 0.5, "reference/next/b4": 0.4, "sample/next/b8/t0": 8.0}
    recipe = recipes.Recipe("", (), (), pairs=3600, drawn=720)
    # 3600 x 3 x 0.25 s + 3600 x 0.1 s on a card half as fast, 720 x 1 s on one with a third
    found = recipes.hours(recipe, {}, cells, 2.0, 3.0)
    assert found == pytest.approx((3600 * (0.75 + 0.1) * 2 + 720 * 3) / 3600)
    large = recipes.hours(recipe._replace(model="1.5-13b"), {}, {
        "step/1.5/b4": 1.0, "reference/1.5/b4": 0.4, "sample/1.5/b8/t0": 8.0}, 2.0, 3.0)  # fmt: skip
    assert large == pytest.approx(found * 13 / 6.7)


def test_a_13b_has_thirteen_billion_parameters():
    """Vicuna-13B: 13.0 B, and 6.7 B of the 7B, by which hours are scaled."""
    count = lambda model: sum(p.numel() for p in model.llm.parameters()) / 1e9
    models = recipes.shapes()
    assert count(models["1.5-13b"]) == pytest.approx(13.0, abs=0.05)
    assert count(models["1.5"]) == pytest.approx(6.74, abs=0.01)


def test_what_fits_is_the_front_pages_count():
    """dpo.py on LLaVA-NeXT-7B: as in lab/fits.py; 24 GB need checkpointing, 80 GB do not."""
    models, run = recipes.shapes(), fits.RUNS[2]
    dpo = recipes.Recipe("", (), (), pairs=1)
    flags, size, _ = recipes.fitted(dpo, models, 80)
    assert flags == "" and size == pytest.approx(fits.need(run, models["next"]) / 2**30)
    assert recipes.fitted(dpo, models, 24)[0] == "--gradient-checkpointing"
    with pytest.raises(ValueError, match="does not fit 8 GB"):
        recipes.fitted(dpo._replace(model="1.5-13b"), models, 8)
