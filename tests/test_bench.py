"""lab/bench.py and lab/bench_gpu.py at a tiny size: competitors compute the same thing, and the figures come out."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lab import bench, bench_attention, bench_gpu, bench_trl

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


def test_bfloat16_computes_the_same(tmp_path, monkeypatch):
    """Ours and TRL's, in this process: in bfloat16 indeed, and the same as in float32 but for rounding."""
    bench.build(tmp_path, TINY)
    monkeypatch.chdir(tmp_path)
    first = bench.ours(tmp_path)
    for name, way in bench.SECTIONS["step-bfloat16"].items():
        result = way(tmp_path)
        bench.check_same(name, result, first)
        mean = torch.tensor(first["log_probs"]).mean(0)
        apart = (torch.tensor(result["log_probs"]).mean(0) - mean).abs().max()
        assert apart > 1e-4, f"{name} is in float32"
    with pytest.raises(RuntimeError, match="ours-bfloat16 computed something else"):
        bench.check_same("ours-bfloat16", result | {"log_probs": [[0.0, 0.0]]}, first)


def test_grpo_of_both(tmp_path, monkeypatch):
    """The same weights and prompts; answers of equal length; what TRL is asked has our tokens."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    bench.build(tmp_path, TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "NEW", 5)
    ours = bench.grpo_ours(tmp_path)
    bench.check_same("grpo-trl", bench.grpo_trl(tmp_path), ours)

    _, processor, batches = bench.load(tmp_path)
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "model")
    theirs.chat_template = bench.chat_template()
    example = batches[0][0]
    content = [{"type": "image", "url": str(example.record.image)}]
    content.append({"type": "text", "text": example.record.turns[0]})
    asked = theirs.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True
    )
    assert list(asked["input_ids"][0]) == example.prompt.tolist()


def test_json_and_table(tmp_path, capsys):
    """The command line, with one competitor in a process of its own."""
    bench.main(["--json", str(tmp_path / "bench.json"), "--repeat", "1", "--only", "ours"], TINY)
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert figures.keys() == {"machine", "workload", *bench.SECTIONS}
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


def test_both_ways_to_pope_answer_the_same(tmp_path):
    """Thirty answers of two tokens, not all alike; one other token is refused."""
    bench.build(tmp_path, TINY)
    ours, theirs = bench.pope_ours(tmp_path), bench.pope_generate(tmp_path)
    bench.check_same("pope-generate", theirs, ours)
    assert [len(answer) for answer in ours["answers"]] == [2] * 30
    assert len(set(map(tuple, ours["answers"]))) > 1
    assert torch.tensor(ours["log_probs"]).shape == (30, 6)
    assert torch.tensor(ours["log_probs"]).std(0).min() > 1e-3, "picture and question say nothing"
    theirs["answers"][29][1] += 1
    with pytest.raises(RuntimeError, match="pope-generate computed something else"):
        bench.check_same("pope-generate", theirs, ours)


# ---- the real shapes on a GPU; here a tiny one on the CPU


def gpu_bench(tmp_path, *flags):
    """-> exit status, {cell: line}."""
    file = tmp_path / "gpu.json"
    status = bench.main(["--dry", "--json", str(file), *map(str, flags)])
    lines = json.loads(file.read_text()) if file.exists() else []
    assert len({line["cell"] for line in lines}) == len(lines)
    return status, {line["cell"]: line for line in lines}


@pytest.fixture
def commands(monkeypatch):
    """Processes that cells start are noted here, and not started: they take half a minute."""
    noted = []

    def command(self, *arguments):
        noted.append(arguments)
        if arguments[0] == "dpo.py":
            out = bench_gpu.Path(arguments[arguments.index("--out") + 1])
            out.mkdir()
            chair = {"chair": {"chair_s": 0.5, "recall": 0.9}}
            summary = {"before": chair, "after": chair, "seconds": {"train": 2.0}}
            (out / "summary.json").write_text(json.dumps(summary))
        return SimpleNamespace(returncode=0, stdout="....\n46 passed in 7.01s\n"), 9.0

    monkeypatch.setattr(bench_gpu.Bench, "command", command)
    return noted


def test_every_cell_of_the_gpu_is_measured(tmp_path, capsys, commands):
    status, lines = gpu_bench(tmp_path)
    assert status == 0 and list(lines) == bench_gpu.CELLS
    for name, line in lines.items():
        median, low, high = line["seconds"]
        assert 0 < low <= median <= high and line["card"] == "CPU" and len(line["code"]) == 12
        if name.startswith(("naive/", "trl/")):
            assert line["apart"] < 0.02, f"{name} computed something else"
        if name.startswith("attention/"):
            assert line["cosine"] > 0.999, f"{name} computed something else"
        if name.startswith("step/"):
            assert line["counted_gib"] > 0
    step = lambda name: lines[f"step/1.5/{name}"]["counted_gib"]
    assert step("b4/nf4") < step("b4") < step("b4/r16"), "the rank is 2 without r16"
    assert step("b4/checkpointing") < step("b4") < step("b16")
    # a prompt of 15 tokens of text and 4 of the picture, two answers of 10; NeXT: 14 of 30 x 50 pixels
    assert lines["step/1.5/b4"]["tokens"] == 4 * (15 + 4 + 2 * 10)
    assert lines["step/next/b2"]["tokens"] == 2 * (15 + 14 + 2 * 10)
    ppo = lines["ppo/1.5/b32/r64"]
    parts = sum(value for name, value in ppo.items() if name.endswith("_seconds"))
    assert parts == pytest.approx(ppo["seconds"][0], rel=0.05)
    assert lines["tests/device"]["passed"] == 46 and lines["toy/dpo"]["chair_s_after"] == 0.5
    assert [c[:3] for c in commands] == [("-m", "pytest", "-q"), ("dpo.py", "--device", "cpu")]
    told = capsys.readouterr().out
    assert all(f"\n| {name} | " in told for name in bench_gpu.CELLS)


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch, capsys):
    head = ["head/fused", "head/answer-rows"]
    others = [
        {"cell": "head/fused", "card": "NVIDIA H200", "size": "tiny"},
        {"cell": "head/all-rows", "card": "CPU", "size": "tiny", "code": "old"},
    ]
    (tmp_path / "gpu.json").write_text(json.dumps(others))
    bench_gpu.main(["--dry", "--json", str(tmp_path / "gpu.json"), "--only", *head])
    lines = json.loads((tmp_path / "gpu.json").read_text())
    assert lines[:2] == others and [line["cell"] for line in lines[2:]] == head

    monkeypatch.setattr(bench_gpu.Bench, "head", lambda *_: {"seconds": (9.0, 9.0, 9.0)})
    again = ["--dry", "--json", str(tmp_path / "gpu.json"), "--only", "head/"]
    bench_gpu.main(again)
    after = json.loads((tmp_path / "gpu.json").read_text())
    assert after[0] == others[0] and after[1:3] == lines[2:], "measured again"
    assert after[3]["cell"] == "head/all-rows" and after[3]["seconds"] == [9.0, 9.0, 9.0]
    assert f"CPU, from {tmp_path / 'gpu.json'}" in capsys.readouterr().out

    monkeypatch.setattr(bench_gpu, "code", lambda: ("0" * 12, None))
    bench_gpu.main([*again, "--commit", "abc"])
    new = [
        line for line in json.loads((tmp_path / "gpu.json").read_text()) if line["card"] == "CPU"
    ]
    assert len(new) == 3 and {line["commit"] for line in new} == {"abc"}
    assert all(line["seconds"] == [9.0, 9.0, 9.0] for line in new), "of other code"


def test_cells_of_the_gpu_do_what_they_say(monkeypatch):
    """The layers that are run again, the prefix of the attention, the rows that are prefilled."""
    cells = bench_gpu.Bench(bench_gpu.SHAPES["tiny"], "cpu")
    model, seen = cells.model("1.5"), []
    cells.rate = 1.0
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
    assert run("sample/1.5/b3/t1/k4")[0] == [(3, 19)] + [(12, 1)] * 5
    assert run("sample/1.5/b3/generate/k4")[0] == [(12, 19)] + [(12, 1)] * 5
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
    assert lines["head/fused"]["seconds"][0] > 0, "the run did not go on"
    told = capsys.readouterr().out
    assert "| reference/1.5/b4 | does not fit |" in told
    assert "| negative/1.5/b8 | ZeroDivisionError: division by zero |" in told
    assert "negative/1.5/b8" not in lines, "nobody would measure it again"
    find = bench_gpu.importlib.util.find_spec
    absent = lambda name: None if name == "trl" else find(name)
    monkeypatch.setattr(bench_gpu.importlib.util, "find_spec", absent)
    status, lines = gpu_bench(tmp_path, "--only", "trl/1.5/b4/default")
    assert status == 0 and not any(name.startswith("trl/") for name in lines)
    assert "| trl/1.5/b4/default | trl is not installed |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--device", "cuda:99"], "--device cuda:99 cannot be used: "),
        (["--dry", "--only", "stop/"], "--only: no cell begins so; cells are step/1.5/b4 "),
    ],
)
def test_bad_flags_of_the_gpu(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(flags)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_no_cell_is_started_late(tmp_path, capsys):
    status, lines = gpu_bench(tmp_path, "--only", "head/", "--seconds", 1e-9)
    assert status == 0 and not lines
    assert "not measured, --seconds 1e-09: head/fused head/answer-rows" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [[[7, 4, 4]] * 3, [[7, 4, 5], [5, 1, 3, 6], [9, 2]]])
def test_ways_to_attention_agree(rows):
    """Output and gradients in float64, against the softmax of what each token may see, written out."""
    torch.manual_seed(0)
    B, L = len(rows), max(map(sum, rows))
    see, real = torch.eye(L, dtype=torch.bool).repeat(B, 1, 1), torch.zeros(B, 1, L, 1)
    for b, (P, *answers) in enumerate(rows):
        real[b, :, : P + sum(answers)] = 1
        ends = torch.tensor([P, *answers]).cumsum(0).tolist()
        for begin, end in zip([0, *ends], ends):
            for i in range(begin, end):
                see[b, i, : min(i, P)] = True
                see[b, i, begin : i + 1] = True
    q, k, v, grad = (torch.randn(B, 2, L, 8, dtype=torch.float64) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    scores = (q @ k.mT / 8**0.5).masked_fill(~see[:, None], -torch.inf)
    want = (scores.softmax(-1) @ v) * real
    want = [want, *torch.autograd.grad((want * grad).sum(), inputs)]
    for name, way in bench_attention.WAYS.items():
        got = way(rows, "cpu")(*inputs) * real
        got = [got, *torch.autograd.grad((got * grad).sum(), inputs)]
        for a, b in zip(got, want):
            assert (a - b).abs().max() <= 1e-12, name


@pytest.mark.parametrize("kind", ["1.5", "next"])
def test_operations_of_a_step(kind):
    """Against PyTorch's count of what our step does; the count leaves attention out, on a CPU."""
    cells = bench_gpu.Bench(bench_gpu.SHAPES["tiny"], "cpu")
    model, batch = cells.model(kind), cells.pairs(kind, 2)
    addmm = lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]  # in place; PyTorch counts the other alone
    mapping = {torch.ops.aten.addmm_: addmm}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model.answer_log_probs(batch).sum().backward()
    # 2 blocks of 64 numbers a token; a token sees those before it, but no sibling
    P, tiles = {"1.5": (19, 1), "next": (29, 5)}[kind]
    seen = P * (P + 1) // 2 + 2 * (10 * P + 10 * 11 // 2)
    attention = 2 * 2 * 12 * 64 * seen
    tower = 2 * tiles * 2 * 4 * 32 * 5**2  # 2 of its 3 blocks, 5 tokens of 32 numbers
    # the last block's MLP runs for 20 tokens alone, of P + 20
    skipped = 2 * P * 3 * (4 * 64 * 96 + 6 * 2 * (64 + 96))
    left_out = attention + tower + skipped
    assert counter.get_total_flops() == bench_gpu.step_flops(model, batch) - left_out


def test_trl_gets_our_weights_and_rows():
    cells = bench_gpu.Bench(bench_gpu.SHAPES["tiny"], "cpu")
    model = cells.model("1.5")
    hub = bench_trl.hub_model(model)
    parts = [*model.parameters(), *model.initial_projector[0].parameters()]
    mine = {p.data_ptr() for p in parts}
    assert all(p.data_ptr() in mine for p in hub.parameters()), "a copy"
    rows = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    answers = [[torch.tensor([1, 2]), torch.tensor([3])], [torch.tensor([4]), torch.tensor([9, 9])]]
    batch = bench_trl.padded(rows, answers, torch.zeros(2, 3, 28, 28), None)
    want = [[5, 6, 7, 1, 2], [8, 4, 0, 0, 0], [5, 6, 7, 3, 0], [8, 9, 9, 0, 0]]
    assert batch["input_ids"].tolist() == want
    scored = [[0, 0, 0, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0, 1, 1, 0, 0]]
    assert batch["completion_mask"].tolist() == scored
    there = [[1] * n + [0] * (5 - n) for n in (5, 2, 4, 3)]
    assert batch["attention_mask"].tolist() == there and len(batch["pixel_values"]) == 4
