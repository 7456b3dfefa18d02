"""The README's results are those of results/results.json, and lab.reproduce's table says what is in it."""

import json
from pathlib import Path

from lab import report, reproduce

ROOT = Path(__file__).parents[1]


def summary(accuracy, chair_s):
    split = {"accuracy": accuracy, "yes_ratio": 0.5}
    chair = {"chair_s": chair_s, "chair_i": 0.1, "recall": 0.9, "length": 30.0}
    return {"pope": {"random": split, "popular": split, "adversarial": split}, "chair": chair}


def test_table_by_hand(tmp_path):
    """Two seeds: means, sample standard deviations, mean paired differences."""
    cells = {
        "dpo": {
            str(s): {"before": summary(0.8 + 0.1 * s, 0.6), "after": summary(0.9, 0.2 + 0.2 * s), "minutes": 2.0}
            for s in (0, 1)
        }
    }
    lines = reproduce.table(cells).splitlines()
    assert lines[2].startswith("| base | 2 | 0.850 ± 0.071 |") and "| 0.600 ± 0.000 |" in lines[2]
    assert lines[3].startswith("| DPO, corrupted truth (default) | 2 | 0.900 ± 0.000 (+0.050) |")
    assert "| 0.300 ± 0.141 (-0.300) |" in lines[3] and lines[3].endswith("| 30.0 ± 0.0 (+0.0) | 2.0 |")
    reproduce.chart(cells, tmp_path / "chart.png")


def test_readme_shows_the_results():
    cells = json.loads((ROOT / "results" / "results.json").read_text())
    table = reproduce.table(cells)
    assert table == (ROOT / "results" / "table.md").read_text().strip()
    assert table in (ROOT / "README.md").read_text()
    first = cells["dpo"]["0"]
    assert report.table({"before": first["before"], "after": first["after"]}) in (ROOT / "README.md").read_text()
    for row, by_seed in cells.items():
        assert row in reproduce.ROWS and sorted(by_seed) == ["0", "1", "2"]
