"""training.py, and the loop that dpo.py and online_dpo.py share: what one step does, in which order, and what is written."""

import argparse
import copy
import json
import math
import random
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import read_records
from PIL import Image
from safetensors.torch import load_file, save_file

import dpo
import online_dpo
import processes
import sft
import sharding
import training
from common import BadInput, NonFinite, run
from data import Record
from formats import checkpoints, weights
from lab import toy
from model import MLLM

PAIRS = [  # chosen, rejected: all about one picture
    ("A red cup.", "A dog and two bananas."),
    ("No.", "Yes, there is a dog."),
    ("Two bananas and a bowl.", "A cat."),
    ("A table.", "A red table, a cup and a bowl."),
    ("The kitchen.", "The garden of the house."),
]


# ---- running a script here, to see what it does on the way


def write_pairs(folder, pairs=PAIRS):
    """A folder with povid.json, as many rows as pairs, each a question of its own."""
    (folder / "images").mkdir()
    Image.effect_mandelbrot((28, 28), (-2, -1, 1, 1), 9).convert("RGB").save(
        folder / "images" / "a.png"
    )
    rows = []
    for i, two in enumerate(pairs):
        human = {"from": "human", "value": f"<image>\nWhat is {'there ' * i}?"}
        chosen, rejected = ([human, {"from": "gpt", "value": text}] for text in two)
        rows.append({"image": "a.png", "conversations": chosen, "rejected_conversations": rejected})
    (folder / "povid.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def train(monkeypatch, tmp_path, checkpoint):
    """A function that runs a script's main() on five pairs -> run folder. online_dpo.py takes its pairs of the data."""
    write_pairs(tmp_path)
    monkeypatch.chdir(tmp_path)

    def call(script, out, *flags):
        common = ("--model", checkpoint, "--data", "povid.json", "--images", "images", "--out", out)
        offline = ("--mix", 1, "--annotator", "oracle") if script is online_dpo else ()
        command = [f"{script.__name__}.py", *common, *offline, *flags]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        if script is online_dpo:
            monkeypatch.setattr("judge.make", lambda *_: None)
        script.main()
        return tmp_path / out

    return call


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def optimizer_step(optimizer, factor, loss, names, max_norm=1.0):
    """The three lines that end a step in every loop -> the gradient's norm before clipping."""
    norm = training.clip_gradients(optimizer, max_norm)
    training.check_finite(loss, norm, names)
    training.take_step(optimizer, factor)
    return norm


@pytest.fixture
def steps_seen(monkeypatch):
    """A list that fills with what ends each step: the names of its rows, its gradients, the largest norm."""
    seen, clip, check = [], training.clip_gradients, training.check_finite

    def spy_clip(optimizer, max_norm):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append([None, [p.grad.clone() for p in params], max_norm])
        return clip(optimizer, max_norm)

    def spy_check(loss, grad_norm, names):
        seen[-1][0] = list(names)
        return check(loss, grad_norm, names)

    monkeypatch.setattr(training, "clip_gradients", spy_clip)
    monkeypatch.setattr(training, "check_finite", spy_check)
    return seen


SCRIPTS = pytest.mark.parametrize("script", [dpo, online_dpo])


@SCRIPTS
def test_the_gradient_of_a_step_is_the_mean_over_its_pairs(train, steps_seen, checkpoint, script):
    """Where policy and reference agree, DPO's gradient is -beta / 2 times that of log pi(y+) - log pi(y-).

    Two passes over five rows in steps of 2 x 2: four, four and the two that are left. The projector alone trains, too
    slowly to leave the reference, so this holds in each step: a gradient that stays or a pair that counts twice would show.
    """
    flags = ("--lr", 0, "--projector-lr", 1e-9, "--beta", 0.3, "--epochs", 2)
    out = train(script, "run", *flags, "--batch-size", 2, "--grad-accum", 2)
    rows = [names for names, _, _ in steps_seen]
    assert {max_norm for _, _, max_norm in steps_seen} == {1.0}
    assert [len(r) for r in rows] == [4, 4, 2]
    order = sum(rows, [])
    assert sorted(order[:5]) == sorted(order[5:]) and len(set(order)) == 5, "a pass is every row"
    assert order[:5] != order[5:], "the second pass has an order of its own"

    model, processor = checkpoints.load(checkpoint)
    model.prepare(llm=False)
    records = read_records(["povid.json"], "images", answers=2)
    examples = {r.where: processor.encode(r) for r in records}
    for (names, gradients, _), line in zip(steps_seen, lines_of(out), strict=True):
        model.zero_grad()
        sums = torch.zeros(2)
        for name in names:
            two = model.answer_log_probs(processor.collate([examples[name]]))
            (two[0] - two[1]).backward()
            sums += two.detach()
        for p, found in zip(model.projector.parameters(), gradients, strict=True):
            want = p.grad * (-0.3 / 2 / len(names))
            assert (found - want).norm() <= 1e-3 * want.norm() and want.norm() > 0
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-4)
        logps = [line["logps/chosen"], line["logps/rejected"]]
        assert logps == pytest.approx((sums / len(names)).tolist(), rel=1e-5)


WORKED = [  # log pi_ref of chosen and rejected, where log pi is -10 and -20; beta .5
    (-12, -17),  # rewards  1.0 and -1.5, h =  5
    (-10, -20),  #          0.0      0.0       0
    (-14, -24),  #          2.0      2.0       0
    (-7, -22),  #          -1.5      1.0      -5
    (-10, -16),  #          0.0     -2.0       4
]


@SCRIPTS
@pytest.mark.parametrize(
    "loss, want",
    [
        ("dpo", (0.0788887 + 0.693147 * 2 + 2.5788887 + 0.1269280) / 5),  # ln(1 + e^(-h / 2))
        ("ipo", None),  # worked out below, with the answers' lengths
        ("ipo_sum", (16 + 1 + 1 + 36 + 9) / 5),  # (h - 1)^2
        ("slic", (0 + 1 + 1 + 3.5 + 0) / 5),  # max(0, 1 - h / 2)
    ],
    ids=["dpo", "ipo", "ipo_sum", "slic"],
)
def test_metrics_of_known_log_probs(train, monkeypatch, checkpoint, script, loss, want):
    """Every answer's log-probs are given; what one step of 2 x 3 rows makes of them is worked out above."""
    _, processor = checkpoints.load(checkpoint)
    given, ipo = {}, []
    for record, reference in zip(read_records(["povid.json"], "images", answers=2), WORKED):
        answers = processor.encode(record).answers
        chosen, rejected = map(len, answers)
        per_token = (-10 - reference[0]) / chosen - (-20 - reference[1]) / rejected
        ipo.append((per_token - 1) ** 2)
        for answer, policy, ref in zip(answers, (-10, -20), reference):
            given[tuple(answer.tolist())] = (float(policy), float(ref))
    real = MLLM.answer_log_probs

    def known(self, batch):
        keys = [tuple(batch.targets[batch.owner == a].tolist()) for a in range(len(batch.lengths))]
        place = 0 if torch.is_grad_enabled() else 1
        return 0 * real(self, batch) + torch.tensor([given[key][place] for key in keys])

    monkeypatch.setattr(MLLM, "answer_log_probs", known)
    out = train(
        script,
        "run",
        "--loss",
        loss,
        "--beta",
        0.5,
        "--epochs",
        1,
        "--batch-size",
        3,
        "--grad-accum",
        2,
        "--lora-rank",
        2,
    )
    (line,) = lines_of(out)
    assert line["loss"] == pytest.approx(want or sum(ipo) / 5, rel=1e-5)
    assert line["rewards/chosen"] == pytest.approx((1 + 0 + 2 - 1.5 + 0) / 5, rel=1e-5)
    assert line["rewards/rejected"] == pytest.approx((-1.5 + 0 + 2 + 1 - 2) / 5, rel=1e-5)
    assert line["rewards/margins"] == pytest.approx((2.5 + 0 + 0 - 2.5 + 2) / 5, rel=1e-5)
    assert line["rewards/accuracies"] == pytest.approx(2 / 5), "equal rewards are not accurate"
    assert line["logps/chosen"] == pytest.approx(-10) and line["logps/rejected"] == pytest.approx(
        -20
    )


@SCRIPTS
def test_what_a_run_leaves(train, script):
    """Seven steps though there are epochs, a checkpoint every two of which two are kept, and the files beside them."""
    flags = ("--steps", 7, "--epochs", 2, "--batch-size", 2, "--lora-rank", 2, "--lr", 1e-3)
    out = train(script, "run", *flags, "--save-every", 2, "--seed", 3, "--projector-lr", 1e-4)
    lines = lines_of(out)
    assert [line["step"] for line in lines] == list(range(7))
    # 3 % of 7 steps, rounded up, are one step of warm-up; the cosine goes from step 1 to step 7
    cosine = [0.5 + 0.5 * math.cos(math.pi * i / 6) for i in range(6)]
    assert [line["lr"] for line in lines] == pytest.approx([1e-3 * f for f in [1, *cosine]])
    even = train(script, "even", "--steps", 3, "--schedule", "constant", "--lr", 1e-3)
    assert [line["lr"] for line in lines_of(even)] == pytest.approx([1e-3] * 3)
    names = ["latest", "step-000004", "step-000006"]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == names
    assert (out / "checkpoints" / "latest").read_text() == "step-000006"
    record = json.loads((out / "args.json").read_text())
    assert record["script"] == script.__name__ and {"torch", "transformers"} <= set(
        record["versions"]
    )
    wanted = {"steps": 7, "epochs": 2, "batch_size": 2, "grad_accum": 1, "lr": 1e-3, "seed": 3}
    wanted |= {"projector_lr": 1e-4, "lora_rank": 2, "save_every": 2, "loss": "dpo", "beta": 0.1}
    assert {name: record["flags"][name] for name in wanted} == wanted
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seed"] == 3 and summary["before"] is summary["after"] is None
    assert summary["seconds"].keys() >= {"setup", "reference", "train", "eval"}
    assert all(value >= 0 for value in summary["seconds"].values())


@SCRIPTS
def test_a_resumed_run_does_only_the_rest(train, steps_seen, script):
    """Stopped after the third of four steps with a checkpoint of the second: two steps are done, and logged once."""
    flags = ("--steps", 4, "--batch-size", 2, "--lora-rank", 2, "--lr", 1e-2, "--save-every", 2)
    out = train(script, "run", *flags)
    whole, want = list(steps_seen), lines_of(out)
    (out / "checkpoints" / "latest").write_text("step-000002")
    text = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(text[:3]))
    steps_seen.clear()
    train(script, "run", *flags, "--resume")
    assert [rows for rows, *_ in steps_seen] == [rows for rows, *_ in whole[2:]]
    for (_, found, _), (_, gradients, _) in zip(steps_seen, whole[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))
    timeless = lambda lines: [{k: v for k, v in x.items() if "seconds" not in k} for x in lines]
    assert timeless(lines_of(out)) == timeless(want)


@SCRIPTS
def test_save_every_0_saves_nothing(train, script):
    out = train(script, "run", "--steps", 2, "--batch-size", 2, "--lora-rank", 2, "--save-every", 0)
    assert not (out / "checkpoints").exists() and (out / "adapter").is_dir()


@SCRIPTS
def test_the_rates_reach_the_parts(train, script, checkpoint):
    """Adam's first step moves each weight by its rate: LoRA's B by --lr, the projector by --projector-lr."""
    flags = ("--steps", 1, "--batch-size", 5, "--lora-rank", 2, "--save-every", 1)
    out = train(script, "run", *flags, "--lr", 1e-2, "--projector-lr", 1e-3)
    state = load_file(out / "checkpoints" / "step-000001" / "state.safetensors")
    start = checkpoints.load(checkpoint)[0].projector.state_dict()
    projector = {k: v for k, v in state.items() if k.startswith("model.projector.")}
    assert projector.keys() == {f"model.projector.{name}" for name in start}
    moved = [(v - start[k.removeprefix("model.projector.")]).abs() for k, v in projector.items()]
    assert torch.cat([m.flatten() for m in moved]).median().item() == pytest.approx(1e-3, rel=1e-2)
    b = load_file(out / "adapter" / "adapter_model.safetensors")
    b = torch.cat([v.abs().flatten() for k, v in b.items() if "lora_B" in k])
    assert b.max().item() == pytest.approx(1e-2, rel=1e-2)


@SCRIPTS
def test_the_papers_defaults(monkeypatch, script):
    """A cell of the grid of Amirloo et al. 2024, section 5.7."""

    def parsed(*more):
        monkeypatch.setattr(sys, "argv", ["script.py", "--model", "m", "--data", "d.json", *more])
        return script.parse()

    args = parsed()
    assert (args.lr, args.projector_lr, args.lora_rank) == (1e-6, 2e-6, 128)
    assert (args.epochs, args.steps, args.batch_size * args.grad_accum) == (3, None, 32)
    assert args.batch_size == 2  # what fits 80 GB, see tests/test_memory.py
    args = parsed("--batch-size", "8")
    assert (args.batch_size, args.grad_accum) == (8, 1)  # the batch that was asked for
    assert (args.loss, args.beta, args.seed, args.save_every) == ("dpo", None, 0, 100)
    assert parsed("--loss", "ipo", "--beta", "0.8").beta == 0.8
    if script is online_dpo:
        assert (args.mix, args.k, args.temperature, args.max_new_tokens) == (0, 2, 1, 256)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 16, 32])
def test_a_batch_that_the_processes_cannot_make(monkeypatch, n):
    """16 forward passes of 2 rows: by 3 processes 6 each, 36 rows and not the paper's 32."""

    def parsed(*flags):
        monkeypatch.setattr(sys, "argv", ["dpo.py", *flags])
        return dpo.parse().grad_accum

    monkeypatch.setattr(processes, "total", n)
    model = ("--model", "m", "--data", "d.json")
    assert parsed(*model, "--grad-accum", "6") == 6
    assert parsed(*model, "--batch-size", "2") == 1
    assert parsed("--seed", "1") == -(-16 // n)  # a toy run, whose batch is another
    if n in (1, 2, 8, 16):
        assert parsed(*model) == 16 // n
        return
    why = f"{n} processes do not divide the 16 .* with {-(-16 // n)} the batch is "
    with pytest.raises(BadInput, match=f"{why}{ {3: 36, 32: 64}[n] } rows in place of 32"):
        parsed(*model)
    if n == 3:  # a new model of parts is no toy
        monkeypatch.setattr(sys, "argv", "sft.py --vision v --llm l --data d.json".split())
        with pytest.raises(BadInput, match="with 22 the batch is 132 rows in place of 128"):
            sft.parse()


class Resolved(Exception):
    """Carries the flags of a run that was stopped before it loaded anything."""


@pytest.fixture
def resolved(monkeypatch):
    """A function that gives the flags with which a script's main() would run."""
    for name in ("world", "base"):
        monkeypatch.setattr(toy, name, lambda seed: Path(f"toy-{seed}"))
    monkeypatch.setattr(toy, "data_file", lambda seed, name: Path(f"toy-{seed}") / name)

    def stop(args):
        raise Resolved(args)

    monkeypatch.setattr(training, "device_and_dtype", stop)

    def flags(script, *words):
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        with pytest.raises(Resolved) as stopped:
            script.main()
        return stopped.value.args[0]

    return flags


@SCRIPTS
def test_toy_settings_are_for_flags_that_are_not_given(resolved, script):
    """--epochs is given, so the toy number of steps is not taken: it would win. Nothing toy remains beside --model."""
    settings = script.TOY
    args = resolved(script)
    assert (args.steps, args.lr, args.beta) == (settings["steps"], settings["lr"], 0.5)
    assert args.model == "toy-0" and args.data == [f"toy-0/{name}" for name in settings["data"]]
    assert args.images == "toy-0/images" and args.toy_world == "toy-0"
    args = resolved(script, "--epochs", "2", "--lr=1e-3", "--seed", "4")
    assert (args.steps, args.epochs, args.lr, args.beta) == (None, 2, 1e-3, 0.5)
    assert args.model == "toy-4" and args.batch_size == settings["batch_size"]
    args = resolved(script, "--epochs", "2", "--steps", "5")
    assert (args.steps, args.epochs) == (5, 2)
    args = resolved(script, "--data", "mine.json")
    assert args.data == ["mine.json"] and args.images is None and args.toy_world == "toy-0"
    args = resolved(script, "--model", "m", "--data", "d.json", "--steps", "5")
    assert (args.steps, args.lr, args.beta, args.batch_size) == (5, 1e-6, 0.1, 2)
    assert args.toy_world is None


@SCRIPTS
def test_beta_is_that_of_the_loss(resolved, script):
    """A toy setting never replaces a default that depends on the method."""
    real = ("--model", "m", "--data", "d.json")
    for loss, toy_beta, beta in (
        ("dpo", 0.5, 0.1),
        ("ipo", 0.9, 0.9),
        ("ipo_sum", 0.9, 0.9),
        ("slic", 0.1, 0.1),
    ):
        assert resolved(script, "--loss", loss).beta == toy_beta
        assert resolved(script, "--loss", loss, *real).beta == beta
        assert resolved(script, "--loss", loss, "--beta", "0.3").beta == 0.3


# ---- which rows a step takes


def plan(n, **flags):
    """The rows of all steps: a list of steps, each a list of micro-batches of indices."""
    flags = {"steps": None, "epochs": 3, "batch_size": 2, "grad_accum": 1, "seed": 0} | flags
    args = argparse.Namespace(**flags)
    steps = [training.batch_of(i, args, n) for i in range(training.total_steps(args, n))]
    for indices, micro_batches in steps:
        assert [number for number, _ in micro_batches] == list(range(len(micro_batches)))
        assert indices == [i for _, micro in micro_batches for i in micro]
    return [[micro for _, micro in micro_batches] for _, micro_batches in steps]


def flat(steps):
    return [i for step in steps for micro in step for i in micro]


def test_an_epoch_is_a_permutation_of_its_own():
    order = flat(plan(20, epochs=4))
    epochs = [tuple(order[i : i + 20]) for i in range(0, 80, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(epochs)) == 4 and tuple(range(20)) not in epochs
    assert order == flat(plan(20, epochs=4)), "a function of seed and step alone"
    other = flat(plan(20, epochs=4, seed=1))
    assert sorted(other[:20]) == list(range(20)) and other[:20] not in map(list, epochs)


def test_the_batch_size_changes_no_order():
    want = flat(plan(7, epochs=2, batch_size=1))
    for batch_size, grad_accum in ((2, 1), (3, 2), (14, 1), (4, 4)):
        assert flat(plan(7, epochs=2, batch_size=batch_size, grad_accum=grad_accum)) == want


def test_sampling_batches_give_every_process_a_part(monkeypatch):
    """32 rows a step in batches of 16, or smaller ones where there are more processes."""
    for total, sizes in ((1, [16, 16]), (2, [16, 16]), (4, [8, 8, 8, 8])):
        monkeypatch.setattr(training.processes, "total", total)
        flags = {"steps": 1, "epochs": 1, "batch_size": 2, "grad_accum": 16 // total, "seed": 0}
        indices, whole = training.whole_batch(0, argparse.Namespace(**flags), 40, 16)
        assert [len(part) for _, part in whole] == sizes and len(indices) == 32
        monkeypatch.setattr(training.processes, "number", total - 1)
        assert training.batch_of(0, argparse.Namespace(**flags), 40, 16)[1]


def test_as_many_steps_as_the_examples_make(monkeypatch):
    """Each process needs an example of its own."""
    args = argparse.Namespace(steps=0, epochs=3, batch_size=2, grad_accum=2)
    assert [training.total_steps(args, n) for n in (1, 2, 4, 5)] == [1, 2, 3, 4]
    monkeypatch.setattr(processes, "total", 2)
    assert [training.total_steps(args, n) for n in (2, 8, 9)] == [1, 3, 4]
    with pytest.raises(BadInput, match="^2 processes for 1 examples; at most 1 are accepted"):
        training.total_steps(args, 1)
    args.steps = 7
    assert training.total_steps(args, 9) == 7


def test_the_last_step_of_the_epochs_takes_what_is_left():
    sizes = lambda steps: [[len(micro) for micro in step] for step in steps]
    assert sizes(plan(5, epochs=2, batch_size=4)) == [[4], [4], [2]]
    assert sizes(plan(5, epochs=1, batch_size=2, grad_accum=2)) == [[2, 2], [1]]
    assert sizes(plan(7, epochs=1, batch_size=2, grad_accum=2)) == [[2, 2], [2, 1]]
    assert sizes(plan(4, epochs=2, batch_size=4)) == [[4], [4]]
    assert sizes(plan(3, epochs=1, batch_size=8)) == [[3]]


def test_steps_win_over_epochs_and_are_full():
    """Seven steps of 2 x 2 of five rows: no step is short, and the rows go round evenly."""
    steps = plan(5, steps=7, epochs=1, grad_accum=2)
    assert [[len(micro) for micro in step] for step in steps] == [[2, 2]] * 7
    assert sorted(map(flat(steps).count, range(5))) == [5, 5, 6, 6, 6]
    assert len(plan(5, steps=1, epochs=100)) == 1


def test_the_order_is_the_seed_s_alone():
    """Python's own generator is neither asked nor moved. (No other plan of this file has 11 rows: none is remembered.)"""
    random.seed(1)
    state = random.getstate()
    first = plan(11, seed=5)
    assert random.getstate() == state
    plan(11, seed=6), plan(11, seed=7)
    random.seed(2)
    assert plan(11, seed=5) == first


# ---- schedule and optimizer


def test_schedule():
    """200 steps: six of warm-up, then half a cosine over 194, whose middle is step 103."""
    factors = [training.schedule(step, 200) for step in range(200)]
    assert factors[:7] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1])
    assert factors[103] == pytest.approx(0.5)
    assert factors[199] == pytest.approx(6.556e-5, rel=1e-3), "it ends one step short of 0"
    assert all(a > b for a, b in zip(factors[6:], factors[7:]))
    assert training.schedule(0, 34) == 0.5, "3 % of 34 steps are rounded up to two"
    assert training.schedule(0, 1) == 1
    constant = [training.schedule(step, 200, "constant") for step in range(200)]
    assert constant == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, *[1] * 195])
    assert training.schedule(0, 200, "constant", warmup=0) == 1


def sgd(*rates):
    """Two weights at 0 in groups of their own and plain descent, which shows a gradient's size as Adam does not."""
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in rates]
    groups = [{"params": [p], "lr": 9.0, "base_lr": rate} for p, rate in zip(params, rates)]
    return params, torch.optim.SGD(groups, lr=9.0)


def test_the_gradient_is_clipped_to_norm_1():
    (a, b), optimizer = sgd(1.0, 0.1)
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([-4.0])
    assert optimizer_step(optimizer, 0.5, 0.7, ["row"]) == pytest.approx(5)
    assert a.item() == pytest.approx(-0.3), "0.5 * 1.0 * 3 / 5"
    assert b.item() == pytest.approx(0.04), "0.5 * 0.1 * 4 / 5"
    assert a.grad is None and b.grad is None
    a.grad, b.grad = torch.tensor([0.3]), torch.tensor([0.4])
    assert optimizer_step(optimizer, 1.0, 0.7, ["row"]) == pytest.approx(0.5)
    assert a.item() == pytest.approx(-0.6), "a small gradient is left alone: 0.3 more"
    assert [g["base_lr"] for g in optimizer.param_groups] == [1.0, 0.1]


@pytest.mark.parametrize(
    "loss, gradient", [(math.nan, 1.0), (math.inf, 1.0), (0.7, math.nan), (0.7, -math.inf)]
)
def test_what_is_not_finite_stops_before_the_step(loss, gradient):
    (a, b), optimizer = sgd(1.0, 0.1)
    a.grad, b.grad = torch.tensor([gradient]), torch.tensor([1.0])
    with pytest.raises(NonFinite, match="f.json, row 3; f.json, row 8"):
        optimizer_step(optimizer, 0.5, loss, ["f.json, row 3", "f.json, row 8"])
    assert a.item() == b.item() == 0 and [g["lr"] for g in optimizer.param_groups] == [9.0, 9.0]


def fill_gradients(model, value):
    for p in training.trainable(model).values():
        p.grad = torch.full_like(p, value)


RATES = {"llm": 1e-2, "projector": 1e-3, "vision": 1e-4, "heads": 1e-2}


def moves(model, optimizer, *gradients, factor=1.0):
    """How far the weights of each part go in steps with these gradients everywhere: {part: distances}."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for value in gradients:
        fill_gradients(model, value)
        optimizer_step(optimizer, factor, 0.5, ["row"], 1e9)
    found = {}
    for n, p in model.named_parameters():
        found.setdefault(n.split(".")[0], []).append((before[n] - p.detach()).flatten())
    return {part: torch.cat(values) for part, values in found.items()}


def trained(build, **parts):
    model = build(seed=1)
    model.prepare(**parts)
    model.add_head("reward")
    return model, training.optimizer_for(model, 1e-2, 1e-3, 1e-4)


def test_every_part_has_its_rate(build):
    """A first step of Adam is its rate long, whatever the gradient; the schedule's factor is on top."""
    model, optimizer = trained(build, vision=True)
    found = moves(model, optimizer, 0.5, factor=0.5)
    assert found.keys() == RATES.keys()
    for part, moved in found.items():
        assert torch.allclose(moved, torch.tensor(RATES[part] / 2), atol=2e-6), part
    assert {g["name"]: g["base_lr"] for g in optimizer.param_groups} == RATES
    again = moves(model, optimizer, 0.5, factor=1.0)["projector"]
    assert again.median().item() == pytest.approx(1e-3, rel=1e-2), "base_lr is remembered"


def test_what_does_not_train_is_in_no_group(build):
    model, optimizer = trained(build, projector=False, lora_rank=2)
    assert [g["name"] for g in optimizer.param_groups] == ["llm", "heads"]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    want = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in held} == {id(p) for p in want} and len(held) == len(want)
    found = moves(model, optimizer, 0.5)
    assert (found["projector"] == 0).all() and (found["vision"] == 0).all()
    with pytest.raises(BadInput, match="nothing trains"):
        training.optimizer_for(build().prepare(llm=False, projector=False), 0, 0)


def test_no_weight_decay(build):
    """A weight whose gradient is 0 stays where it is, at any rate."""
    model, _ = trained(build, vision=True)
    optimizer = training.optimizer_for(model, 10.0, 10.0, 10.0)
    assert all((moved == 0).all() for moved in moves(model, optimizer, 0.0, 0.0).values())


def test_adam_s_averages(build):
    """Gradients 1 and 0 with betas .9 and .98: 1 + (.09 / .19) / sqrt(.0196 / .0396) = 1.67330 rates; 1.67006 with .999."""
    model, optimizer = trained(build)
    moved = moves(model, optimizer, 1.0, 0.0)["projector"]
    assert moved.median().item() == pytest.approx(1.67330e-3, rel=5e-4)


# ---- checkpoints


@pytest.fixture
def small(build):
    """(model, optimizer) after two steps, of LoRA and projector."""
    model = build().prepare(lora_rank=2)
    optimizer = training.optimizer_for(model, 1e-2, 1e-3)
    moves(model, optimizer, 1.0, -0.5)
    return model, optimizer


def test_a_model_on_the_cpu_saves_no_generator_of_a_gpu(small, tmp_path, monkeypatch):
    """There may be one, in use by others."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.zeros(1))
    training.save_checkpoint(tmp_path, 2, *small)
    names = load_file(tmp_path / "checkpoints" / "step-000002" / "state.safetensors").keys()
    assert {name for name in names if name.startswith("rng")} == {"rng.cpu"}


def test_one_process_saves_alone(small, tmp_path, monkeypatch):
    """One that is not the first, while that one may be writing the same checkpoint."""
    monkeypatch.setattr(processes, "number", 1)
    training.save_checkpoint(tmp_path, 2, *small)
    assert not (tmp_path / "checkpoints").exists()
    half = tmp_path / "checkpoints" / "step-000002.tmp"
    half.mkdir(parents=True)
    training.save_checkpoint(tmp_path, 2, *small, True)
    assert half.is_dir() and training.load_checkpoint(tmp_path, *small) == 2


def test_a_checkpoint_brings_everything_back(small, build, tmp_path):
    """Weights, Adam's averages, the generator's state and the step: the next step is the same, bit for bit."""
    model, optimizer = small
    torch.manual_seed(5)
    torch.rand(3)
    training.save_checkpoint(tmp_path, 2, model, optimizer)
    drawn = torch.rand(4)
    after = copy.deepcopy(model)
    want = moves(model, optimizer, 0.25, 0.75)

    torch.manual_seed(6)
    again = build(seed=0).prepare(lora_rank=2)
    other = training.optimizer_for(again, 1e-2, 1e-3)
    assert training.load_checkpoint(tmp_path, again, other) == 2
    assert torch.equal(torch.rand(4), drawn), "drawing goes on where it was"
    for (n, p), q in zip(after.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), n
    found = moves(again, other, 0.25, 0.75)
    assert all(torch.equal(found[part], want[part]) for part in want)


def test_the_state_of_an_algorithm_is_kept(small, tmp_path):
    """A running mean, say: given to save_checkpoint, updated in place by load_checkpoint."""
    mean = {"mean": 0.25, "count": 3}
    training.save_checkpoint(tmp_path, 1, *small, state=mean)
    restored = {"mean": 0.0, "count": 0}
    assert training.load_checkpoint(tmp_path, *small, state=restored) == 1
    assert restored == mean
    training.save_checkpoint(tmp_path, 2, *small)
    assert training.load_checkpoint(tmp_path, *small, state=restored) == 2 and restored == mean


def test_a_tensor_is_computed_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []
    compute = lambda: made.append(1) or torch.tensor([1.5, 2.5])
    for _ in range(2):
        assert training.cached("reference-x", compute).tolist() == [1.5, 2.5]
    assert training.cached("reference-y", compute).tolist() == [1.5, 2.5] and made == [1, 1]


def test_a_clock_counts_from_lap_to_lap(monkeypatch):
    times = iter([10.0, 12.0, 15.0, 19.0])
    monkeypatch.setattr(training.time, "time", lambda: next(times))
    clock = training.Clock()
    assert [clock.lap("setup"), clock.lap("train"), clock.lap("train")] == [2, 3, 4]
    assert clock.seconds == {"setup": 2, "reference": 0, "train": 7, "eval": 0}


def test_saving_draws_nothing(small, tmp_path):
    state = torch.get_rng_state()
    training.save_checkpoint(tmp_path, 1, *small)
    assert torch.equal(torch.get_rng_state(), state)


def kept(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_two_checkpoints_are_kept(small, tmp_path):
    """By number, not by name, and the torn rest of a kill counts for none."""
    for step in (999_998, 999_999):
        training.save_checkpoint(tmp_path, step, *small)
    assert kept(tmp_path) == ["latest", "step-999998", "step-999999"]
    (tmp_path / "checkpoints" / "step-999997.tmp").mkdir()
    training.save_checkpoint(tmp_path, 1_000_000, *small)
    assert set(kept(tmp_path)) - {"step-999997.tmp"} == {"latest", "step-999999", "step-1000000"}
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-1000000"
    assert training.load_checkpoint(tmp_path, *small) == 1_000_000


def test_the_checkpoint_that_latest_names_is_loaded(small, tmp_path):
    model, optimizer = small
    training.save_checkpoint(tmp_path, 3, model, optimizer)
    want = copy.deepcopy(model.projector.state_dict())
    moves(model, optimizer, 1.0)
    training.save_checkpoint(tmp_path, 6, model, optimizer)
    (tmp_path / "checkpoints" / "latest").write_text("step-000003")
    assert training.load_checkpoint(tmp_path, model, optimizer) == 3
    assert all(torch.equal(v, want[k]) for k, v in model.projector.state_dict().items())
    moves(model, optimizer, 0.5)  # the sixth step once more, another way
    training.save_checkpoint(tmp_path, 6, model, optimizer)
    want = copy.deepcopy(model.projector.state_dict())
    moves(model, optimizer, 1.0)
    assert training.load_checkpoint(tmp_path, model, optimizer) == 6
    assert all(torch.equal(v, want[k]) for k, v in model.projector.state_dict().items())


def test_no_checkpoint_yet_is_step_0(small, tmp_path):
    assert training.load_checkpoint(tmp_path, *small) == 0


@pytest.mark.parametrize("saved, now", [(True, False), (False, True)])
def test_a_checkpoint_of_another_model_is_refused(build, tmp_path, saved, now):
    model = build().prepare(projector=saved, lora_rank=2)
    training.save_checkpoint(tmp_path, 1, model, training.optimizer_for(model, 1e-2, 1e-3))
    other = build().prepare(projector=now, lora_rank=2)
    with pytest.raises(BadInput, match="projector.*only on one side"):
        training.load_checkpoint(tmp_path, other, training.optimizer_for(other, 1e-2, 1e-3))


@pytest.fixture
def two(small, tmp_path):
    """(folder of the checkpoints of steps 3 and 6, the projector at step 3, model, optimizer)."""
    model, optimizer = small
    training.save_checkpoint(tmp_path, 3, model, optimizer)
    third = copy.deepcopy(model.projector.state_dict())
    moves(model, optimizer, 1.0)
    training.save_checkpoint(tmp_path, 6, model, optimizer)
    return tmp_path / "checkpoints", third, model, optimizer


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: cut_short(f / "step-000006" / "state.safetensors"),
        lambda f: (f / "step-000006" / "state.safetensors").unlink(),
        lambda f: cut_short(f / "step-000006" / "state.json"),
        lambda f: (f / "step-000006" / "state.json").write_text(""),
        lambda f: (f / "step-000006" / "state.json").write_text('{"step": 6}'),
        lambda f: shutil.rmtree(f / "step-000006"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(two, tmp_path, capsys, damage):
    folder, third, model, optimizer = two
    damage(folder)
    assert training.load_checkpoint(tmp_path, model, optimizer) == 3
    assert all(torch.equal(v, third[k]) for k, v in model.projector.state_dict().items())
    said = capsys.readouterr().err
    assert (
        f"{folder}/step-000006 is damaged" in said and f"going on from {folder}/step-000003" in said
    )


def test_without_a_whole_checkpoint_a_run_does_not_start_anew(two, tmp_path):
    """Steps that were done are not thrown away in silence."""
    folder, _, model, optimizer = two
    for step in (3, 6):
        cut_short(folder / f"step-{step:06d}" / "state.safetensors")
    with pytest.raises(
        BadInput, match="step-000006 is damaged .*step-000003 is damaged .* no whole"
    ):
        training.load_checkpoint(tmp_path, model, optimizer)


@pytest.mark.parametrize("pointer", [None, "", "step-x"])
def test_a_lost_pointer(two, tmp_path, pointer):
    """Without a `latest` that can be read, the newest checkpoint is meant."""
    folder, _, model, optimizer = two
    (folder / "latest").unlink() if pointer is None else (folder / "latest").write_text(pointer)
    assert training.load_checkpoint(tmp_path, model, optimizer) == 6


def altered(folder, change):
    """Change the tensors of the checkpoint of step 6."""
    file = folder / "step-000006" / "state.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


BIAS = "projector.linear_2.bias"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t[f"model.{BIAS}"].fill_(math.nan), f"model.{BIAS} has NaN or infinity"),
        (lambda t: t[f"optimizer.{BIAS}.exp_avg"].fill_(math.inf), "exp_avg has NaN or infinity"),
        (
            lambda t: t.update({f"model.{BIAS}": t[f"model.{BIAS}"].int()}),
            f"model.{BIAS} is stored as int32",
        ),
        (lambda t: t.update({f"model.{BIAS}": torch.ones(1)}), r"shape \(1,\), not \(64,\)"),
        (
            lambda t: [t.pop(k) for k in list(t) if k.startswith("optimizer.")],
            "holds nothing of the optimizer",
        ),
        *(
            (
                lambda t, n=name, s=state: t.update({n: s}),
                f"{name} is no state of a random generator",
            )
            for name, state in (
                ("rng.cpu", torch.zeros(5, dtype=torch.uint8)),
                ("rng.cpu", torch.zeros(torch.get_rng_state().shape)),
                ("rng.cuda", torch.zeros(16)),
            )
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_right(two, tmp_path, change, message):
    """It can be read, so it is not passed over: it is refused by the name of the tensor."""
    folder, _, model, optimizer = two
    altered(folder, change)
    with pytest.raises(BadInput, match=message):
        training.load_checkpoint(tmp_path, model, optimizer)


@pytest.mark.parametrize(
    "kind, tensor, message",
    [
        *((kind, None, f"optimizer.{BIAS}.{kind} is missing, which belongs to the other two")
          for kind in ("step", "exp_avg", "exp_avg_sq")),
        ("step", torch.ones(1), rf"optimizer.{BIAS}.step has the shape \(1,\), not \(\)"),
        ("exp_avg", torch.ones(1), rf"optimizer.{BIAS}.exp_avg has the shape \(1,\), not \(64,\)"),
        ("exp_avg_sq", torch.ones(65), rf"{BIAS}.exp_avg_sq has the shape \(65,\), not \(64,\)"),
        ("exp_avg", torch.zeros(64).int(), f"optimizer.{BIAS}.exp_avg is stored as int32"),
    ],
)  # fmt: skip
def test_an_optimizer_that_cannot_be_right(two, tmp_path, kind, tensor, message):
    folder, _, model, optimizer = two
    key = f"optimizer.{BIAS}.{kind}"
    altered(folder, lambda t: t.pop(key) if tensor is None else t.update({key: tensor}))
    with pytest.raises(BadInput, match=f"step-000006/state.safetensors: .*{message}"):
        training.load_checkpoint(tmp_path, model, optimizer)


def test_a_weight_that_never_had_a_gradient(two, tmp_path):
    """Without the three numbers of AdamW it goes on without them."""
    folder, _, model, optimizer = two
    altered(folder, lambda t: [t.pop(k) for k in list(t) if k.startswith(f"optimizer.{BIAS}.")])
    assert training.load_checkpoint(tmp_path, model, optimizer) == 6
    assert optimizer.state[dict(model.named_parameters())[BIAS]] == {}


@pytest.mark.parametrize("step", [True, 6.0, "6", None, 7])
def test_a_step_that_is_none(two, tmp_path, step):
    folder, _, model, optimizer = two
    (folder / "step-000006" / "state.json").write_text(json.dumps({"step": step, "state": {}}))
    with pytest.raises(BadInput, match=f"state.json: step is {step!r}; its folder says another"):
        training.load_checkpoint(tmp_path, model, optimizer)


def test_which_parameter_is_on_one_side(two, tmp_path):
    """The first by name, whichever side has it."""
    folder, _, model, optimizer = two
    whole = load_file(folder / "step-000006" / "state.safetensors")
    for change in (
        lambda t: t.pop(f"model.{BIAS}"),
        lambda t: t.update({"model.a": torch.ones(1)}),
    ):
        altered(folder, change)
        name = "model.a" if change(dict(whole)) is None else f"model.{BIAS}"
        told = f"step-000006: parameter {name} is only on one side; the checkpoint is of another"
        with pytest.raises(BadInput, match=told):
            training.load_checkpoint(tmp_path, model, optimizer)


def test_a_step_that_the_run_never_had(two, tmp_path):
    folder, _, model, optimizer = two
    (folder / "step-000006" / "state.json").write_text('{"step": 9999, "state": {}}')
    with pytest.raises(BadInput, match="state.json: step is 9999; its folder says another"):
        training.load_checkpoint(tmp_path, model, optimizer)
    with pytest.raises(BadInput, match="its checkpoint is of step 6; this run has 5 steps"):
        training.Log(tmp_path, 6, 5)


# ---- run folder and log


def flags(**more):
    given = {"out": None, "resume": False, "seed": 0, "data": ["rows.json"], "lr": 0.5, "steps": 9}
    given |= {"skip_bad_rows": False, "grad_accum": 1}
    return argparse.Namespace(**given | more)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "rows.json").write_text("abc")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_folder_and_its_args(folder):
    (folder / "more.json").write_text("")
    out = training.start(flags(given={"lr"}), "dpo", [], ["more.json"])
    assert out == Path("runs/dpo-0") and sorted(p.name for p in out.iterdir()) == ["args.json"]
    record = json.loads((out / "args.json").read_text())
    assert record.keys() == {"script", "flags", "processes", "versions", "data", "skipped"}
    assert record["script"] == "dpo" and record["processes"] == 1
    assert record["flags"] == {
        "seed": 0,
        "grad_accum": 1,
        "data": ["rows.json"],
        "lr": 0.5,
        "steps": 9,
        "skip_bad_rows": False,
    }
    assert record["versions"].keys() == {"torch", "transformers", "pillow", "numpy", "safetensors"}
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["data"] == {  # sha256 of "abc" and of nothing, as published
        "rows.json": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "more.json": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }
    assert training.start(flags(), "dpo") == Path("runs/dpo-1")
    assert training.start(flags(), "bdhs") == Path("runs/bdhs-0")
    assert json.loads(Path("runs/bdhs-0/args.json").read_text())["script"] == "bdhs"
    out = training.start(flags(out="mine", skip_bad_rows=True), "dpo", [{"row": 3}])
    assert out == Path("mine") and json.loads((out / "skipped.json").read_text()) == [{"row": 3}]
    with pytest.raises(BadInput, match="--out mine exists"):
        training.start(flags(out="mine"), "dpo")
    with pytest.raises(BadInput, match="nothing.json: no such file"):
        training.start(flags(data=["nothing.json"]), "dpo")


def test_the_seed_seeds_both_generators(folder):
    def draw(seed):
        training.start(flags(seed=seed), "dpo")
        return torch.rand(1).item(), random.random()

    first, other, again = draw(3), draw(4), draw(3)
    assert first == again and first[0] != other[0] and first[1] != other[1]


@pytest.mark.parametrize(
    "key, name, value, said",
    [
        ("flags", "lr", 0.25, "--lr was 0.25 and is now 0.5"),
        ("flags", "gone", 1, "--gone was 1 and is now None"),
        ("versions", "torch", "1.0", "torch was 1.0 and is now"),
        ("data", "rows.json", "another", "rows.json was another and is now"),
    ],
)
def test_a_resumed_run_is_the_same_run(folder, key, name, value, said):
    training.start(flags(out="run"), "dpo")
    file = folder / "run" / "args.json"
    before = file.read_bytes()
    assert training.start(flags(out="run", resume=True), "dpo") == Path("run")
    assert file.read_bytes() == before
    record = json.loads(before)
    record[key][name] = value
    file.write_text(json.dumps(record))
    with pytest.raises(BadInput, match=said):
        training.start(flags(out="run", resume=True), "dpo")


def test_a_resumed_run_leaves_out_the_same_rows(folder):
    """Else every permutation would be another; what the run itself has added to the list stays."""
    rows = [{"file": "rows.json", "row": i, "why": "torn"} for i in (3, 3, 5)]
    again = flags(out="run", skip_bad_rows=True, resume=True)
    training.start(flags(out="run", skip_bad_rows=True), "dpo", rows)
    training.add_skipped(folder / "run", {"file": "rows.json", "row": 8, "why": "torn"})
    training.start(again, "dpo", [row | {"why": "gone"} for row in rows])
    listed = json.loads((folder / "run" / "skipped.json").read_text())
    assert [row["row"] for row in listed] == [3, 3, 5, 8]
    with pytest.raises(BadInput, match="rows.json, row 5 was left out and is now used; a resumed"):
        training.start(again, "dpo", rows[:2])
    with pytest.raises(BadInput, match="rows.json, row 3 was left out and is now used; a resumed"):
        training.start(again, "dpo", rows[1:])
    with pytest.raises(BadInput, match="rows.json, row 8 was used and is now left out; a resumed"):
        training.start(again, "dpo", [*rows, rows[0] | {"row": 8}])
    file = folder / "run" / "args.json"  # a run of earlier code does not know
    record = json.loads(file.read_text())
    del record["skipped"]
    file.write_text(json.dumps(record))
    training.start(again, "dpo", rows[:1])


def test_a_run_resumes_with_another_number_of_processes(folder):
    """Where the batch stays: 2 processes that accumulate 3 times are one that does 6 times."""
    training.start(flags(out="run", grad_accum=3), "dpo")
    file = folder / "run" / "args.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"processes": 2}))
    training.start(flags(out="run", grad_accum=6, resume=True), "dpo")
    said = "--grad-accum x processes was 6 and is now 3"
    with pytest.raises(BadInput, match=said):
        training.start(flags(out="run", grad_accum=3, resume=True), "dpo")


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "args.json: not readable as JSON"),
        ("{}", "args.json has no flags; the file that the run wrote is needed"),
        ('{"flags": 3}', "args.json has no flags"),
    ],
)
def test_a_damaged_args_json(folder, text, said):
    training.start(flags(out="run"), "dpo")
    (folder / "run" / "args.json").write_text(text)
    with pytest.raises(BadInput, match=said):
        training.start(flags(out="run", resume=True), "dpo")


def test_the_log_of_a_resumed_run(tmp_path, capsys):
    """Steps from the checkpoint on are cut off, with the half line of a kill; what comes is appended at once."""
    old = [{"step": i, "loss": 1.0} for i in range(6)]
    text = "".join(json.dumps(line) + "\n" for line in old)
    (tmp_path / "metrics.jsonl").write_text(text + "no json\n")
    with pytest.raises(BadInput, match="metrics.jsonl, line 7: not a step of a run"):
        training.Log(tmp_path, 4, 8)
    text += '{"step": 6, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    log = training.Log(tmp_path, 4, 8)
    assert lines_of(tmp_path) == old[:4]
    log(4, ["loss"], {"loss": 0.25, "lr": 0.1})
    assert lines_of(tmp_path) == [*old[:4], {"step": 4, "loss": 0.25, "lr": 0.1}]
    said = capsys.readouterr().err
    assert "step 4: loss 0.2500" in said and "lr" not in said
    log(5, ["loss"], {"loss": 0.125, "lr": 0.1})
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert "step 5:" not in capsys.readouterr().err, "the first step alone is always shown"


def test_the_log_of_a_new_run(tmp_path):
    log = training.Log(tmp_path, 0, 2)
    log(0, [], {"loss": 0.5})
    assert lines_of(tmp_path) == [{"step": 0, "loss": 0.5}]


@pytest.mark.parametrize(
    "error, status, said",
    [
        (BadInput("mend this"), 2, "mend this"),
        (NonFinite("loss nan"), 1, "loss nan"),
        (KeyboardInterrupt(), 130, "--resume"),
    ],
)
def test_exit_status(monkeypatch, capsys, error, status, said):
    def fail():
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/dpo.py"])
    with pytest.raises(SystemExit) as stop:
        run(fail, trains=True)
    err = capsys.readouterr().err
    assert stop.value.code == status and said in err and err.strip().startswith("dpo.py: ")


def test_a_fault_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_device_and_dtype():
    parse = lambda device, dtype: training.device_and_dtype(
        argparse.Namespace(device=device, dtype=dtype)
    )
    assert parse("cpu", "auto") == (torch.device("cpu"), torch.float32)
    assert parse("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)
    with pytest.raises(BadInput, match="--device nowhere cannot be used"):
        parse("nowhere", "auto")


set_devices = []  # what `gpu` has noted


@pytest.fixture
def gpu(monkeypatch):
    """A function that says whether there is a GPU with bfloat16 arithmetic."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", set_devices.append)
    set_devices.clear()
    with_bfloat16 = lambda has: monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: has or including_emulation
    )
    return with_bfloat16


def test_a_gpu_without_bfloat16(gpu):
    """Its emulation does not count: auto is float32 there, and asking for bfloat16 an error."""
    gpu(False)
    parse = lambda dtype: training.device_and_dtype(argparse.Namespace(device="cuda", dtype=dtype))
    assert parse("auto") == (torch.device("cuda"), torch.float32)
    with pytest.raises(BadInput, match="--dtype bfloat16: Tesla T4 has no bfloat16 arithmetic"):
        parse("bfloat16")


def test_auto_where_there_is_a_gpu(gpu):
    """auto takes it, and bfloat16 on it; what is given wins."""
    gpu(True)
    for device, dtype, want in (
        ("auto", "auto", ("cuda", torch.bfloat16)),
        ("auto", "float32", ("cuda", torch.float32)),
        ("cuda:1", "auto", ("cuda:1", torch.bfloat16)),
        ("cpu", "auto", ("cpu", torch.float32)),
    ):
        found = training.device_and_dtype(argparse.Namespace(device=device, dtype=dtype))
        assert found == (torch.device(want[0]), want[1])
    assert set_devices == [torch.device("cuda:1")], "else GPU 0 is worked on, too"


@pytest.mark.parametrize(
    "lora_rank, lr, merge, want",
    [
        (2, 1e-3, False, ["adapter"]),
        (2, 1e-3, True, ["adapter", "model"]),
        (0, 1e-3, False, ["model"]),
        (2, 0, False, ["model"]),  # the projector alone has trained
    ],
)
def test_what_training_leaves(llava, parts, tmp_path, lora_rank, lr, merge, want):
    model, processor = llava
    model.prepare(lora_rank, llm=lr > 0)
    args = argparse.Namespace(
        lora_rank=lora_rank, lr=lr, merge=merge, resume=False, model=str(parts)
    )
    training.save_result(tmp_path, model, processor, args)
    assert sorted(p.name for p in tmp_path.iterdir()) == want
    if "adapter" in want:
        told = json.loads((tmp_path / "adapter" / "alignment.json").read_text())
        assert (told["base_name"], told["template"]) == (str(parts), processor.template)
    args.resume = True
    training.save_result(tmp_path, model, processor, args)
    assert sorted(p.name for p in tmp_path.iterdir()) == want


@SCRIPTS
def test_pairs_of_text_alone_where_the_projector_alone_trains(train, tmp_path, script):
    """A pair without an image in a micro-batch of its own counts in the mean and adds no gradient."""
    rows = json.loads((tmp_path / "povid.json").read_text())
    for key in ("conversations", "rejected_conversations"):
        turn = rows[0][key][0]
        turn["value"] = turn["value"].replace("<image>\n", "")
    del rows[0]["image"]
    (tmp_path / "povid.json").write_text(json.dumps(rows))
    flags = ("--lr", 0, "--projector-lr", 1e-3, "--epochs", 1, "--batch-size", 1, "--grad-accum", 5)
    (line,) = lines_of(train(script, "run", *flags))
    assert line["loss"] == pytest.approx(math.log(2)) and line["grad_norm"] > 0


@pytest.mark.parametrize("changed, refused", [
    ({"gradient_checkpointing": True}, None),
    ({"batch_size": 2, "grad_accum": 16}, None),
    ({"batch_size": 2}, "--batch-size was 8 and is now 2"),
    ({"grad_accum": 2}, "--grad-accum x processes was 4 and is now 2"),
    ({"lora_rank": 8}, "--lora-rank was 16 and is now 8"),
])  # fmt: skip
def test_a_run_that_lacked_memory_goes_on_with_less(changed, refused):
    """The same batch in smaller parts, and checkpointing; not another batch, nor another model."""
    flags = {"batch_size": 8, "grad_accum": 4, "gradient_checkpointing": False, "lora_rank": 16}
    old, new = ({"flags": f, "versions": {}, "data": {}} for f in (flags, flags | changed))
    if refused is None:
        return training.check_same_run(old, new)
    with pytest.raises(BadInput, match=refused):
        training.check_same_run(old, new)


# ---- what only a GPU, or several processes, would show


def test_the_generator_of_a_gpu_is_saved_and_restored(small, tmp_path, monkeypatch):
    """That of the model's own GPU, where the model is on one."""
    model, optimizer = small
    generators = {torch.device("cuda:1"): torch.arange(16, dtype=torch.uint8)}
    monkeypatch.setattr(type(model), "device", property(lambda _: torch.device("cuda:1")))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda where: generators[where])
    training.save_checkpoint(tmp_path, 2, model, optimizer)
    names = load_file(tmp_path / "checkpoints" / "step-000002" / "state.safetensors").keys()
    assert {name for name in names if name.startswith("rng")} == {"rng.cpu", "rng.cuda"}
    restored = []
    restore = lambda state, where: restored.append((state.tolist(), where))
    monkeypatch.setattr(torch.cuda, "set_rng_state", restore)
    assert training.load_checkpoint(tmp_path, model, optimizer) == 2
    assert restored == [(list(range(16)), torch.device("cuda:1"))]


def test_a_checkpoint_of_a_gpu_goes_on_elsewhere(small, tmp_path, monkeypatch):
    """On the CPU its generator's state is left alone."""
    model, optimizer = small
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "device", property(lambda _: torch.device("cuda")))
        patch.setattr(torch.cuda, "get_rng_state", lambda _: torch.zeros(16, dtype=torch.uint8))
        training.save_checkpoint(tmp_path, 2, model, optimizer)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: 1 / 0)
    assert training.load_checkpoint(tmp_path, model, optimizer) == 2


@pytest.mark.parametrize("gone", [False, True])
def test_a_save_that_fails_leaves_the_room_that_it_took(small, tmp_path, monkeypatch, gone):
    """On a full disk, whose error is told also where its folder has gone; the checkpoint before stays."""
    training.save_checkpoint(tmp_path, 2, *small)

    folder = tmp_path / "checkpoints"

    def full(*_):
        if gone:
            shutil.rmtree(folder / "step-000004.tmp")
        raise OSError(28, "No space left on device")

    for module, name in ((weights, "write_tensors"), (training, "write_json")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match="No space"):
                training.save_checkpoint(tmp_path, 4, *small)
        assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-000002"]
    assert training.load_checkpoint(tmp_path, *small) == 2


def test_divided_gradients_are_clipped_with_the_others(monkeypatch):
    """Group by group: which are whole, and which a part, goes to `sharding.clip`, with the bound."""
    (a, b), optimizer = sgd(1.0, 0.1)
    added, clipped = [], []
    monkeypatch.setattr(sharding, "is_part", lambda p: p is b)
    monkeypatch.setattr(processes, "add_gradients", added.extend)
    monkeypatch.setattr(sharding, "clip", lambda *given: clipped.append(given) or 7.0)
    assert training.clip_gradients(optimizer, 0.25) == 7.0
    assert added == [a] and clipped == [([a], [b], 0.25)]


def test_what_all_processes_do_for_an_optimizer(build, monkeypatch):
    """The weights that train are compared, then the LLM's are divided, whose group holds no other."""
    model, seen = build().prepare(), []
    monkeypatch.setattr(processes, "check_same", lambda named: seen.append(list(named)))
    monkeypatch.setattr(sharding, "shard", seen.append)
    part = model.llm.lm_head.weight
    monkeypatch.setattr(sharding, "is_part", lambda p: p is part)
    groups = training.optimizer_for(model, 1e-2, 1e-3).param_groups
    assert seen == [list(training.trainable(model)), model]
    assert [(g["name"], len(g["params"]) == 1) for g in groups] == [
        ("llm", False), ("llm", True), ("projector", False)]  # fmt: skip
    assert groups[1]["params"][0] is part


def test_what_a_run_leaves_is_gathered(llava, tmp_path, monkeypatch):
    """Each process has all weights afterwards, and the second writes no adapter."""
    model, processor = llava
    model.prepare(lora_rank=2)
    gathered, args = [], {"resume": False, "lora_rank": 2, "lr": 1e-4, "merge": False, "model": "m"}
    monkeypatch.setattr(sharding, "gather", gathered.append)
    monkeypatch.setattr(processes, "number", 1)
    training.save_result(tmp_path, model, processor, SimpleNamespace(**args))
    assert gathered == [model] and not list(tmp_path.iterdir())


def test_numbers_of_a_step(monkeypatch):
    """Tensors and numbers, added over the processes; passes that are missing are made before."""
    order = []
    monkeypatch.setattr(sharding, "finish_passes", lambda: order.append("passes"))
    monkeypatch.setattr(processes, "gathered", lambda mine: order.append("sum") or [mine, mine])
    found = training.numbers({"a": torch.tensor(1.5), "b": 2.0, "c": torch.tensor(3)})
    assert found == {"a": 3.0, "b": 4.0, "c": 6.0} and order == ["passes", "sum"]
    assert found["not there"] == 0.0


def test_a_cached_tensor_is_process_0s(tmp_path, monkeypatch, capsys):
    """It alone reads and writes; what it has read comes to all."""
    monkeypatch.chdir(tmp_path)
    told = []
    monkeypatch.setattr(processes, "from_first", lambda value: told.append(value) or value)
    monkeypatch.setattr(processes, "number", 1)
    assert training.cached("x", lambda: torch.ones(2)).tolist() == [1, 1]
    assert told == [None] and not list(tmp_path.iterdir())
    monkeypatch.setattr(processes, "from_first", lambda value: torch.tensor([5.0]))
    assert training.cached("x", None).tolist() == [5]
    assert capsys.readouterr().err == "from the cache: .cache/x\n"
    folder = tmp_path / ".cache" / "y"
    folder.mkdir(parents=True)
    save_file({"tensor": torch.tensor([math.nan])}, folder / "tensor.safetensors")
    assert training.read_cached(folder) is None and not folder.exists()
    told = capsys.readouterr().err
    assert told == f"{folder} is damaged and computed anew (it holds NaN or infinity)\n"
    folder.mkdir()
    assert training.read_cached(folder) is None and not folder.exists()
    told = f"{folder} is damaged and computed anew (FileNotFoundError: "
    assert capsys.readouterr().err.startswith(told)
    assert training.read_cached(folder) is None and not capsys.readouterr().err


def test_what_a_fingerprint_knows(llava, tmp_path):
    """All that log-probs depend on, one by one; not what a run trains, nor how its batches are cut."""
    model, processor = llava
    for name in ("a", "b"):
        Image.new("RGB", (28, 28)).save(tmp_path / f"{name}.png")
    record = Record("f.json, row 0", tmp_path / "a.png", ("What?",), ("Yes", "No"))
    examples = [processor.encode(record)]
    of = lambda some=None: training.fingerprint(model, processor, some or examples)
    plain, (one,) = of(), examples
    assert re.fullmatch("[0-9a-f]{16}", plain) and of() == plain
    others = [
        [one, one],
        [replace(one, record=replace(record, image=tmp_path / "b.png"))],
        [replace(one, record=replace(record, image=None))],
        [replace(one, prompt=one.prompt[1:])],
        [replace(one, answers=one.answers[::-1])],
        [replace(one, answers=one.answers[:1])],
        [replace(one, weights=[torch.ones(2), torch.ones(2)])],
        [replace(one, weights=[torch.ones(2), torch.ones(2) * 5])],
    ]
    found = [of(some) for some in others]
    assert len({plain, *found}) == len(others) + 1
    assert of([replace(one, record=replace(record, where="row 7", answers=("x",)))]) == plain
    for part, name, value in (
        (model, "source", "elsewhere"), (model, "dtype", torch.bfloat16), (model, "feature_layer", -1),
        (model, "keep_cls", True), (model, "anyres", (1,)), (model, "image_token_id", 3),
        (processor, "image_aspect", "checkpoint"), (processor, "image_size", 14),
        (processor, "image_mean", (0, 0, 0)), (processor, "image_std", (1, 1, 1)),
        (model.vision.config, "hidden_act", "gelu"), (model.llm.config, "rms_norm_eps", 0.5),
    ):  # fmt: skip
        before = getattr(part, name)
        setattr(part, name, value)
        found.append(of())
        setattr(part, name, before)
    assert len({plain, *found}) == len(found) + 1
    model.prepare(lora_rank=2)
    assert of() == plain
