"""lab/bench.py at a tiny size: the competitors compute the same thing, and the figures come out."""

import json
import math

import pytest

from lab import bench

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
LLM = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
TINY = {"vision": VISION, "llm": LLM, "batch": 2, "steps": 2, "words": 6}


def test_ours_and_naive_compute_the_same(tmp_path, monkeypatch):
    """Same adapters at the start, same optimizer: the losses stay equal over three steps."""
    workload = bench.build(tmp_path, TINY)
    assert workload["image_tokens"] == 4 and workload["timed_steps"] == 2
    monkeypatch.chdir(tmp_path)  # the reference cache lands there
    ours, naive = bench.ours(tmp_path), bench.naive(tmp_path)
    assert ours["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert ours["losses"] == pytest.approx(naive["losses"], abs=1e-5)
    assert abs(ours["losses"][2] - ours["losses"][0]) > 1e-4, "nothing was trained: says little"
    for mine, theirs in zip(ours["log_probs"], naive["log_probs"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)


def test_json_and_table(tmp_path, capsys):
    """The command line, with one competitor in a process of its own."""
    bench.main(["--json", str(tmp_path / "bench.json"), "--repeat", "1", "--only", "ours"], TINY)
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert figures.keys() == {"machine", "workload", "step", "head", "negatives"}
    assert figures["machine"].keys() == {"cpu", "cores", "torch", "threads", "load"}
    assert figures["step"].keys() == {"ours"} and figures["head"] == {}
    ours, kinds = figures["step"]["ours"], {"seconds", "seconds_3_epochs", "peak_mib"}
    assert ours.keys() == kinds | {f"{k}_ratio" for k in kinds}
    assert (
        ours["seconds_ratio"] == ours["seconds_3_epochs_ratio"] == {"median": 1, "min": 1, "max": 1}
    )
    assert ours["seconds_3_epochs"]["median"] < ours["seconds"]["median"]
    assert "\n| ours | " in capsys.readouterr().out


def test_figures_of_a_process_that_disagrees_are_refused(tmp_path, monkeypatch):
    answers = iter([[[-10.0, -11.0]], [[-10.0, -11.01]]])

    def run(*_, **__):
        line = json.dumps(
            {"seconds": 1, "peak_mib": 1, "losses": [math.log(2)], "log_probs": next(answers)}
        )
        return bench.subprocess.CompletedProcess([], 0, line, "")

    monkeypatch.setattr(bench.subprocess, "run", run)
    with pytest.raises(RuntimeError, match="naive computed something else"):
        bench.measure(tmp_path, ["ours", "naive"], 1)


def test_both_ways_to_negatives_draw_the_same(tmp_path):
    bench.build(tmp_path, TINY)
    one, apart = (
        bench.negatives("one-prefill", tmp_path),
        bench.negatives("prefill-a-sentence", tmp_path),
    )
    assert one["log_probs"][0] == pytest.approx(apart["log_probs"][0], abs=1e-3)
