"""povid.py: the tokens that noise chooses, what scores them, the noise, the loss, the flags."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import test_bdhs
import torch
from PIL import Image
from test_bdhs import PAIRS, noise_of, told, write

import common
import povid
from common import BadInput
from model import MLLM, pack

# What the tests watch: the only names of this file that say where something is done.
ENCODER = (MLLM, "image_features")
SCORER = (povid, "distorted_log_probs")

examples, watch, files = test_bdhs.examples, test_bdhs.watch, test_bdhs.files  # fixtures


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs povid.py in a folder -> (stdout, stderr)."""

    def call(*args, cwd, ok=True):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["povid.py", *map(str, args)])
        try:
            common.run(povid.main)
        except SystemExit as end:
            assert not ok and end.code == 2
        else:
            assert ok
        return capsys.readouterr()

    return call


def data_flags(folder, name, rows, picture=None):
    """Writes a POVID file. -> the flags for it; nothing is drawn, so without a longest answer."""
    return write(folder, name, rows, picture)[:4]


def test_dpo_loss_by_hand():
    losses, chosen, rejected = povid.dpo_loss(
        *(torch.tensor([float(v)]) for v in (-3, -8, -4, -6)), 0.5
    )
    assert losses.item() == pytest.approx(math.log(1 + math.exp(-0.5 * 3)))
    assert chosen.item() == 0.5 and rejected.item() == -1


@torch.no_grad()
def test_distorted_answer(llava, examples):
    """The most likely tokens after the true prefix and the noise, and all sums, by position.

    Never the image token, even where it is the most likely one.
    """
    model, processor = llava
    examples = [
        replace(
            e,
            answers=[e.answers[0], torch.tensor([5, 6, 2])],
            scored=[e.scored[0], torch.ones(3, dtype=torch.bool)],
        )
        for e in examples[:2]
    ]
    batch = processor.collate(examples)
    noisy = replace(batch, pixel_values=torch.randn(2, 3, 28, 28))
    weight, at, avoided = model.llm.get_output_embeddings().weight, 0, 0
    weight[model.image_token_id] = 2 * weight[povid.distorted(model, noisy)[0]]
    wrong = povid.distorted(model, noisy)
    rows = povid.distorted_log_probs(model, batch, wrong, 2)
    assert rows.shape == (3, 2)
    assert torch.allclose(rows[[0, 2]], model.answer_log_probs(batch).view(2, 2).T)
    for b, example in enumerate(examples):
        clean = model.hidden_states(
            replace(
                pack([example.prompt], [example.answers[:1]]),
                pixel_values=batch.pixel_values[b : b + 1],
            )
        )
        dirty = model.hidden_states(
            replace(
                pack([example.prompt], [example.answers[:1]]),
                pixel_values=noisy.pixel_values[b : b + 1],
            )
        )
        total, P = 0.0, len(example.prompt)
        for t in range(len(example.answers[0])):
            logits = dirty[0, P - 1 + t] @ weight.t()
            avoided += logits.argmax() == model.image_token_id
            logits[model.image_token_id] = -torch.inf
            assert wrong[at + t] == logits.argmax()
            total += (clean[0, P - 1 + t] @ weight.t()).log_softmax(-1)[wrong[at + t]]
        assert rows[1, b] == pytest.approx(float(total), rel=1e-4)
        at += len(example.answers[0]) + 3
    assert avoided


@pytest.mark.parametrize(
    "more",
    [["--gamma", "0"], ["--gamma", "0.5", "--grad-accum", "2"], ["--lora-rank", "0"]],
)
def test_starts_at_ln_2(run, files, checkpoint, more):
    name = "start" + "".join(more)
    flags = ("--model", checkpoint, "--data", "povid.json", "--images", "images", "--batch-size", 2)
    run(*flags, *more, "--steps", 3, "--lr", "1e-3", "--out", name, cwd=files)
    lines = told(files, name)
    assert len(lines) == 3
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5) == lines[0]["rewards/rejected"]
    assert lines[2]["loss"] != lines[0]["loss"]
    assert (files / name / ("model" if "--lora-rank" in more else "adapter")).is_dir()


@pytest.mark.parametrize("gamma", [0, 0.75])
def test_loss_by_hand(run, files, checkpoint, llava, watch, gamma):
    """Eq. 3 and 5. Noise for choosing y- alone, each micro-batch's own.

    Reference and policy then score with clean images.
    """
    _, processor = llava
    images, scores = watch(ENCODER), watch(SCORER)
    flags = ("--model", checkpoint, *data_flags(files, "povid2.json", PAIRS, picture=0),
             "--gamma", gamma, "--beta", 0.5, "--batch-size", 2, "--grad-accum", 2,
             "--lr", "1e-2")  # fmt: skip
    run(*flags, "--steps", 3, "--out", f"povid {gamma}", cwd=files)
    assert len(images) == 3 * 6 and len(scores) == 3 * 4
    clean, noisy = processor.pixels(files / "images" / "0.png"), []
    example = SimpleNamespace(record=SimpleNamespace(image=files / "images" / "0.png"))
    for i, call in enumerate(images):
        assert len(call.pixel_values) == 2
        if i % 3:
            assert all(torch.equal(p, clean) for p in call.pixel_values)
        else:
            noisy += call.pixel_values
    assert all(0.2 < noise_of(p, example, processor) < 0.5 for p in noisy)  # 500 steps
    assert len({str(p.tolist()) for p in noisy}) == 12
    for step, line in enumerate(told(files, f"povid {gamma}")):
        mine, given, gains, logps = [], [], [], []
        for reference, policy in zip(*(scores[4 * step + i : 4 * step + 4 : 2] for i in (0, 1))):
            assert len(policy.result) == (3 if gamma else 2)
            gain = (0.5 * (policy.result - reference.result)).tolist()  # of y+, distorted, given
            gains += zip(*gain[:2])
            logps += zip(*policy.result[:2].tolist())
            mine += [math.log1p(math.exp(m - y)) for y, m in zip(gain[0], gain[1])]
            given += [math.log1p(math.exp(m - y)) for y, m in zip(gain[0], gain[-1])]
        if step and gamma:
            assert abs(sum(mine) - sum(given)) > 4e-3
        want = gamma * sum(given) / 4 + (1 - gamma) * sum(mine) / 4
        assert line["loss"] == pytest.approx(want, abs=1e-4)
        mean = lambda values: pytest.approx(sum(values) / 4, abs=1e-4)
        for name, pairs in (("rewards", gains), ("logps", logps)):
            for answer, values in zip(("chosen", "rejected"), zip(*pairs)):
                assert line[f"{name}/{answer}"] == mean(values)
        assert line["rewards/margins"] == mean([a - b for a, b in gains])
        assert line["rewards/accuracies"] == mean([a > b for a, b in gains])


def test_the_policy_chooses_and_both_score(run, files, checkpoint, watch):
    """Which adapter acts while y- is chosen, and while the reference and the policy score."""
    active = lambda model: {layer.active for layer in model.lora_layers()}
    choose, score, seen = povid.distorted, povid.distorted_log_probs, []
    watch((povid, "distorted"), lambda c: seen.append(active(c.model)) or choose(**called(c)))
    watch(SCORER, lambda c: seen.append(active(c.model)) or score(**called(c)))
    flags = ("--model", checkpoint, "--data", "povid.json", "--images", "images",
             "--batch-size", 2, "--steps", 2)  # fmt: skip
    run(*flags, "--out", "who", cwd=files)
    assert seen == [{"policy"}, {None}, {"policy"}] * 2


def called(seen):
    """The arguments of a call that was noted."""
    return {name: value for name, value in vars(seen).items() if name != "training"}


def test_one_micro_batch_or_two(run, files, checkpoint):
    """The gradient is that of the mean over all pairs of the step, however they are split."""
    flags = ("--model", checkpoint, *data_flags(files, "four.json", PAIRS), "--noise-steps", 0,
             "--steps", 1)  # fmt: skip
    norms = []
    for size, parts in ((4, 1), (2, 2)):
        name = f"parts {parts}"
        run(*flags, "--batch-size", size, "--grad-accum", parts, "--out", name, cwd=files)
        norms.append(told(files, name)[0]["grad_norm"])
    assert norms[0] > 0 and norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_flags_reach_what_they_are_for(run, files, checkpoint, watch):
    """Loading, what trains, the rates and their schedule, clipping, bad rows."""
    loads, prepares = watch((povid.checkpoints, "load")), watch((MLLM, "prepare"))
    rates, clips = (watch((povid.training, n)) for n in ("optimizer_for", "clip_gradients"))
    scores = watch(SCORER)
    rows = json.loads((files / "povid.json").read_text())
    (files / "one bad.json").write_text(json.dumps([*rows, {"id": "bad"}]))
    run("--model", checkpoint, "--data", "one bad.json", "--images", "images", "--skip-bad-rows",
        "--max-length", 333, "--template", "plain", "--gradient-checkpointing",
        "--lora-rank", 3, "--lr", "1e-3", "--projector-lr", "1e-4", "--batch-size", 2, "--steps", 6,
        "--schedule", "constant", "--out", "flags",
        cwd=files)  # fmt: skip
    _, processor = loads[1].result  # the first is for its shapes
    assert (processor.max_length, processor.template) == (333, "plain")
    assert prepares[0].gradient_checkpointing and prepares[0].lora_rank == 3
    assert all(call.training for call in scores), "blocks are only recomputed in training mode"
    groups = {group["name"]: group["base_lr"] for group in rates[0].result.param_groups}
    assert groups == {"llm": 1e-3, "projector": 1e-4}
    assert [call.max_norm for call in clips] == [1.0] * 6
    assert [line["lr"] for line in told(files, "flags")] == pytest.approx([1e-3] * 6)
    (skipped,) = json.loads((files / "flags" / "skipped.json").read_text())
    assert skipped["row"] == len(rows)


def test_noise_follows_flags(run, files, checkpoint, llava, watch):
    """--noise-steps is taken as given, 0 included; the same seed gives the same noise."""
    _, processor = llava
    images = watch(ENCODER)
    flags = ("--gamma", 0, "--model", checkpoint, *data_flags(files, "one.json", PAIRS[:1]),
             "--steps", 1, "--batch-size", 1)  # fmt: skip
    noisy = []
    for name, more in (
        ("none", ("--noise-steps", 0)),
        ("little", ("--noise-steps", 10)),
        ("again", ("--noise-steps", 10)),
        ("other", ("--noise-steps", 10, "--seed", 1)),
    ):
        images.clear()
        run(*flags, *more, "--out", f"noise {name}", cwd=files)
        noisy.append(images[0].pixel_values[0])
    example = SimpleNamespace(record=SimpleNamespace(image=files / "images" / "0.png"))
    levels = [noise_of(p, example, processor) for p in noisy]
    assert levels[0] == 0 and all(0.005 < level < 0.03 for level in levels[1:])
    assert torch.equal(noisy[1], noisy[2]) and not torch.equal(noisy[1], noisy[3])


def test_no_noise_on_padding(run, files, checkpoint, llava, watch):
    """A wide picture is padded to a square of 28 pixels after the noise: rows 7 to 20 hold it."""
    _, processor = llava
    Image.new("RGB", (56, 28), (128,) * 3).save(files / "images" / "wide.png")
    rows = json.loads((files / "povid.json").read_text())[:1]
    (files / "wide.json").write_text(json.dumps([rows[0] | {"image": "wide.png"}]))
    images = watch(ENCODER)
    run("--model", checkpoint, "--data", "wide.json", "--images", "images", "--steps", 1,
        "--batch-size", 1, "--out", "wide", cwd=files)  # fmt: skip
    difference = images[0].pixel_values[0] - processor.pixels(files / "images" / "wide.png")
    assert (difference[:, [*range(5), *range(23, 28)]] == 0).all()
    assert (difference[:, 7:21] != 0).float().mean() > 0.9


def test_resumed_is_uninterrupted(run, files, checkpoint):
    """The noise, too, belongs to the step and not to the process."""
    flags = ("--model", checkpoint, "--data", "povid.json", "--images", "images", "--batch-size", 2,
             "--lr", "1e-3", "--steps", 4, "--save-every", 2)  # fmt: skip
    run(*flags, "--out", "straight", cwd=files)
    run(*flags, "--out", "again", cwd=files)
    for file in (files / "again/checkpoints/step-000004").iterdir():
        file.unlink()
    (files / "again/checkpoints/step-000004").rmdir()
    (files / "again/checkpoints/latest").write_text("step-000002")
    run(*flags, "--out", "again", "--resume", cwd=files)
    adapter = "adapter/adapter_model.safetensors"
    assert (files / "again" / adapter).read_bytes() == (files / "straight" / adapter).read_bytes()


def test_a_chosen_answer_is_one_task(run, files, checkpoint, watch):
    """Rows that differ in the given answer alone are one with --gamma 0; by default all are read."""
    scores = watch(SCORER)
    question, chosen, rejected = PAIRS[1]
    rows = [PAIRS[1], (question, chosen, "A"), ("Is it?", chosen, rejected), (question, "A", "B")]
    flags = ("--model", checkpoint, *data_flags(files, "twice.json", rows, picture=0),
             "--batch-size", 1, "--epochs", 1)  # fmt: skip
    for name, more, pairs, answers in (("one task", ("--gamma", 0), 3, 1), ("all", (), 4, 2)):
        scores.clear()
        _, err = run(*flags, *more, "--out", f"twice {name}", cwd=files)
        assert len(told(files, f"twice {name}")) == pairs
        assert [len(call.batch.lengths) for call in scores] == [answers] * 2 * pairs
        assert ("1 rows repeat another row" in err) == ("repeat" in err) == (pairs == 3)


@pytest.mark.parametrize(
    "given, name, want",
    [
        ([], "noise_steps", 500),
        (["--noise-steps", "0"], "noise_steps", 0),
        (["--noise-steps", "999"], "noise_steps", 999),
        (["--noise-steps", "1000"], "noise_steps", None),
        (["--noise-steps", "-1"], "noise_steps", None),
        ([], "gamma", 0.5),
        (["--gamma", "0"], "gamma", 0),
        (["--gamma", "1"], "gamma", None),
        (["--gamma", "-0.5"], "gamma", None),
        (["--beta", "0"], "beta", None),
        ([], "beta", 0.1),
    ],
)
def test_flags_at_their_bounds(monkeypatch, given, name, want):
    """The paper's defaults; the last value that is taken, the first that is refused (None)."""
    monkeypatch.setattr(sys, "argv", ["povid.py", "--model", "m", "--data", "d", *given])
    if want is None:
        with pytest.raises(BadInput, match=f"argument {given[0]}: '{given[1]}' was given"):
            povid.parse()
    else:
        assert getattr(povid.parse(), name) == want


def test_row_without_an_image(run, files, checkpoint):
    turns = lambda text: [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": text}]
    row = {"id": "1", "conversations": turns("Yes."), "rejected_conversations": turns("No.")}
    (files / "text.json").write_text(json.dumps([row]))
    _, err = run("--model", checkpoint, "--data", "text.json", cwd=files, ok=False)
    assert "text.json, row 0: no image, which POVID would distort" in err
    assert "--skip-bad-rows" in err and "Traceback" not in err
