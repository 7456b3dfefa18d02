"""lab/bench.py and lab/bench_gpu.py at a tiny size: competitors compute the same thing, and the figures come out."""

import json
import math

import pytest
import torch

from lab import bench, bench_gpu

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


# ---- the real shapes on a GPU; here a tiny one on the CPU


def gpu_bench(tmp_path, *flags):
    """-> exit status, {cell: line}."""
    file = tmp_path / "gpu.json"
    status = bench_gpu.main(
        ["--device", "cpu", "--size", "tiny", "--json", str(file), *map(str, flags)]
    )
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    assert len({line["cell"] for line in lines}) == len(lines)
    return status, {line["cell"]: line for line in lines}


def test_every_cell_of_the_gpu_is_measured(tmp_path, capsys, monkeypatch):
    measure = bench_gpu.Bench.measure
    monkeypatch.setattr(
        bench_gpu.Bench, "measure", lambda self, run, *_, **__: measure(self, run, 0, 1)
    )
    status, lines = gpu_bench(tmp_path)
    assert status == 0 and list(lines) == bench_gpu.CELLS
    for name, line in lines.items():
        median, low, high = line["seconds"]
        assert 0 < low <= median <= high and line["card"] == "CPU"
        if name.startswith("naive/"):
            assert line["apart"] < 0.02, "the plain way computed something else"
    # a prompt of 15 tokens of text and 4 of the picture, two answers of 10; NeXT: 14 of 30 x 50 pixels
    assert lines["step/1.5/b4"]["tokens"] == 4 * (15 + 4 + 2 * 10)
    assert lines["step/next/b2"]["tokens"] == 2 * (15 + 14 + 2 * 10)
    told = capsys.readouterr().out
    assert all(f"\n| {name} | " in told for name in bench_gpu.CELLS)


def test_cells_of_the_gpu_do_what_they_say(monkeypatch):
    """The layers that are run again, the prefix of the attention, the rows that are prefilled."""
    cells = bench_gpu.Bench(bench_gpu.SHAPES["tiny"], "cpu")
    model, seen = cells.model("1.5"), []
    cells.measure = lambda run, *_, **__: run() or {"seconds": (1, 1, 1)}
    model.llm.model.layers[0].mlp.register_forward_pre_hook(
        lambda _, args: seen.append(tuple(args[0].shape[:-1]))
    )
    run_llm = model.run_llm
    prefixes = []

    def spy(x, see, position_ids, cache=None, prefix=0, wanted=None):
        prefixes.append(prefix)
        return run_llm(x, see, position_ids, cache, prefix, wanted)

    monkeypatch.setattr(model, "run_llm", spy)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def run(name):
        """-> rows and length of each forward pass, prefixes."""
        seen.clear(), prefixes.clear()
        found = bench_gpu.run_cell(cells, name)
        assert "error" not in found, found
        return list(seen), list(prefixes)

    assert run("step/1.5/b2") == ([(2, 39)], [18])
    assert run("step/1.5/b2/checkpointing") == ([(2, 39)] * 2, [18])
    assert run("step/1.5/b2") == ([(2, 39)], [18]), "checkpointing stays on"
    assert run("step/1.5/b2/dense") == ([(2, 39)], [0])
    assert run("reference/1.5/b2")[0] == [(2, 39)]
    # ours for the comparison, the plain way for it, its reference, its policy
    assert run("naive/1.5/b2")[0] == [(2, 39)] + [(4, 29)] * 3
    assert run("sample/1.5/b3/t0")[0] == [(3, 19)] + [(3, 1)] * 5
    assert run("negative/1.5/b2")[0] == [(2, 29)] + [(10, 1)] * 2
    rows, length = run("negative/1.5/b2/plain")[0][0]
    assert (rows, length) == (10, 19 + 9), "cut behind 1, 3, 5, 7 and 9 of 10 tokens"
    trained = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert trained and all(".lora_" in n or n.startswith("projector.") for n in trained)


def test_a_cell_that_does_not_fit_or_fails_is_a_line(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(bench_gpu.Bench, "reference", full)
    monkeypatch.setattr(bench_gpu.Bench, "negative", lambda *_: 1 / 0)
    status, lines = gpu_bench(tmp_path, "--only", "reference/1.5", "negative/1.5/b8", "head/fused")
    assert status == 1, "a failure is told"
    assert lines["reference/1.5/b4"]["does_not_fit"] == "CUDA out of memory."
    assert lines["negative/1.5/b8"]["error"] == "ZeroDivisionError: division by zero"
    assert lines["head/fused"]["seconds"][0] > 0, "the run did not go on"
    assert "| reference/1.5/b4 | does not fit |" in capsys.readouterr().out


def test_no_cell_is_started_late(tmp_path, capsys):
    status, lines = gpu_bench(tmp_path, "--only", "head/", "--seconds", 1e-9)
    assert status == 0 and not lines
    assert "not measured, --seconds 1e-09: head/fused head/answer-rows" in capsys.readouterr().out
