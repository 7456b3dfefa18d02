"""lab/bench.py at a tiny size: the competitors compute the same thing, and the figures come out."""
import json
import math

import pytest

from lab import bench

FIGURES = {"seconds", "peak_mib", "seconds_ratio", "peak_mib_ratio"}


def test_ours_and_naive_compute_the_same(tmp_path, monkeypatch):
    workload = bench.build(tmp_path, bench.TINY)
    assert workload["image_tokens"] == 4 and workload["timed_steps"] == 2
    monkeypatch.chdir(tmp_path)  # the reference cache lands there
    ours, naive = bench.ours(tmp_path), bench.naive(tmp_path)
    assert ours["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert ours["losses"] == pytest.approx(naive["losses"], abs=1e-5)
    assert abs(ours["losses"][2] - ours["losses"][0]) > 1e-4, "nothing was trained: says little"
    for mine, theirs in zip(ours["log_probs"], naive["log_probs"]):
        assert mine == pytest.approx(theirs, abs=1e-3)


def test_json_and_table(tmp_path, capsys):
    bench.main(["--json", str(tmp_path / "bench.json"), "--repeat", "1", "--only", "ours"], bench.TINY)
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert figures.keys() == {"machine", "workload", "step", "head"}
    assert figures["machine"].keys() == {"cpu", "cores", "torch", "threads", "load"}
    assert figures["step"].keys() == {"ours"} and figures["step"]["ours"].keys() == FIGURES
    assert figures["step"]["ours"]["seconds_ratio"] == {"median": 1, "min": 1, "max": 1}
    assert "\n| ours | " in capsys.readouterr().out


def test_summary_pairs_within_a_repeat():
    runs = {"a": [{"seconds": 1, "peak_mib": 4}, {"seconds": 2, "peak_mib": 4}], "b": [{"seconds": 3, "peak_mib": 8}, {"seconds": 4, "peak_mib": 8}]}
    assert bench.summary(runs)["b"]["seconds_ratio"] == {"median": 2.5, "min": 2, "max": 3}
