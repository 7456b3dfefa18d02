"""The README's results are those of results/results.json, and lab.reproduce's table says what is in it."""

import json
from pathlib import Path

import pytest

from lab import report, reproduce
from model import BadInput

ROOT = Path(__file__).parents[1]


def summary(accuracy, chair_s):
    split = {"accuracy": accuracy, "yes_ratio": 0.5}
    chair = {"chair_s": chair_s, "chair_i": 0.1, "recall": 0.9, "length": 30.0}
    return {"pope": {"random": split, "popular": split, "adversarial": split}, "chair": chair}


def test_table_by_hand(tmp_path):
    """Two seeds: means, sample standard deviations, mean paired differences."""
    cells = {
        "dpo": {
            str(s): {
                "before": summary(0.8 + 0.1 * s, 0.6),
                "after": summary(0.9, 0.2 + 0.2 * s),
                "minutes": 2.0,
            }
            for s in (0, 1)
        }
    }
    lines = reproduce.table(cells).splitlines()
    assert lines[2].startswith("| base | 2 | 0.850 ± 0.071 |") and "| 0.600 ± 0.000 |" in lines[2]
    assert lines[3].startswith("| DPO, corrupted truth (default) | 2 | 0.900 ± 0.000 (+0.050) |")
    assert "| 0.300 ± 0.141 (-0.300) |" in lines[3] and lines[3].endswith(
        "| 30.0 ± 0.0 (+0.0) | 2.0 |"
    )
    reproduce.chart(cells, tmp_path / "chart.png")


def test_tables_of_what_samples_by_hand(tmp_path):
    """Reward models have a table of their own; logs are means over seeds of the first and the last fifth of the steps."""
    held = lambda accuracy: {
        "accuracy": accuracy,
        "length_correlation": -0.5,
        "longer_preferred": 0.25,
        "longer_favoured": 0.0,
    }
    rewards = {
        str(s): {"after": {"reward": {"a/povid.json": held(0.8 + 0.1 * s)}}, "minutes": 3.0}
        for s in (0, 1)
    }
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"objective/kl": k, "response_length": 20.0}) + "\n" for k in range(10))
    )
    log = reproduce.log_of(tmp_path)
    assert log == {"objective/kl": [0.5, 8.5], "response_length": [20, 20]}
    run = {"before": summary(0.8, 0.6), "after": summary(0.9, 0.2), "minutes": 2.0, "log": log}
    other = run | {"log": {"objective/kl": [1.5, 9.5], "response_length": [20, 10]}}
    first, second, third = reproduce.tables({"reward": rewards, "ppo": {"0": run, "1": other}})
    assert "reads facts" not in first and "| PPO, factual" in first
    assert (
        second.splitlines()[2]
        == "| reads facts | 2 | povid.json | 0.850 ± 0.071 | -0.500 ± 0.000 | 0.250 ± 0.000 | 0.000 ± 0.000 | 3.0 |"
    )
    assert "1.00 → 9.00" in third and "20.00 → 15.00" in third and len(third.splitlines()) == 3


def test_only_reward_models_have_no_table_of_policies(tmp_path):
    held = {
        "accuracy": 0.9,
        "length_correlation": 0.0,
        "longer_preferred": 0.5,
        "longer_favoured": 0.5,
    }
    cells = {"reward": {"0": {"after": {"reward": {"a.json": held}}, "minutes": 1.0}}}
    first, second, third = reproduce.tables(cells)
    assert first == third == "" and "a.json" in second
    reproduce.chart(cells, tmp_path / "chart.png")
    assert not (tmp_path / "chart.png").exists()


def test_another_rows_folder(tmp_path):
    with pytest.raises(BadInput, match="reward-1: not there yet; --only reward makes it"):
        reproduce.written("@reward", 1, tmp_path)
    (tmp_path / "reward-1").mkdir()
    (tmp_path / "reward-1" / "summary.json").write_text("{}")
    assert (
        reproduce.written("@reward", 1, tmp_path) == str(tmp_path / "reward-1")
        and reproduce.written("--mix", 1, tmp_path) == "--mix"
    )


def test_readme_shows_the_results():
    cells = json.loads((ROOT / "results" / "results.json").read_text())
    tables = [part for part in reproduce.tables(cells) if part]
    assert "\n\n".join(tables) == (ROOT / "results" / "table.md").read_text().strip()
    assert all(part in (ROOT / "README.md").read_text() for part in tables)
    first = cells["dpo"]["0"]
    assert (
        report.table({"before": first["before"], "after": first["after"]})
        in (ROOT / "README.md").read_text()
    )
    for row, by_seed in cells.items():
        assert row in reproduce.ROWS and sorted(by_seed) == ["0", "1", "2"]


def test_readme_shows_the_benchmark():
    step, readme = (
        json.loads((ROOT / "results" / "bench.json").read_text())["step"],
        (ROOT / "README.md").read_text(),
    )
    assert step.keys() == {"ours", "naive", "trl", "trl-default"}
    for name, row in step.items():
        shown = lambda figure, digits: "{median:.{d}f} ({min:.{d}f} - {max:.{d}f})".format(
            **row[figure], d=digits
        )
        ratios = (
            []
            if name == "ours"
            else [shown("seconds_ratio", 1), shown("seconds_3_epochs_ratio", 1)]
        )
        for cell in (
            shown("seconds", 1),
            shown("seconds_3_epochs", 1),
            shown("peak_mib", 0),
            *ratios,
        ):
            assert f"| {cell} |" in readme, f"{name}: {cell}"
