"""mpo.py: the losses by hand and against TRL, the shift, the first step, a resumed run, the flags."""

import json
import math
import shutil
import sys
from collections import defaultdict
from unittest import mock

import pytest
import torch
from conftest import read_records
from test_training import lines_of, train  # noqa: F401  (a fixture)

import dpo
import mpo
import training
from common import BadInput
from formats import checkpoints
from mpo import mpo_loss


def trl_loss(kinds, weights, beta, policy, lengths, reference):
    """TRL's DPOTrainer on log-probs of tokens.

    policy: (2 B, T), the chosen answers first, 0 after the end. lengths: (2 B,). reference: (2 B,),
    sums. -> the loss, and what it logs.
    """
    trl = pytest.importorskip("trl")
    rows, T = policy.shape
    mask = (torch.arange(T) < lengths[:, None]).long()
    mask = torch.cat([torch.zeros(rows, 1).long(), mask], 1)  # the prompt is one token
    stub = mock.MagicMock(
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=kinds,
        loss_weights=weights,
        beta=beta,
        label_smoothing=0,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    stub.accelerator.gather = stub.accelerator.gather_for_metrics = lambda x: x
    nothing = torch.zeros(rows, T)
    output = mock.MagicMock(
        log_probs=policy, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )
    inputs = {
        "input_ids": torch.ones(rows, T + 1).long(),
        "attention_mask": torch.ones(rows, T + 1).long(),
        "completion_mask": mask,
        "ref_chosen_logps": reference[: rows // 2],
        "ref_rejected_logps": reference[rows // 2 :],
    }
    loss = trl.DPOTrainer._compute_loss(stub, lambda **_: output, inputs, False)
    (logged,) = stub._metrics.values()
    return loss, {name: values[-1] for name, values in logged.items()}


def tokens_of(sums, lengths, T):
    """Log-probs of tokens with these sums, random apart from that: (B,) -> (B, T)."""
    mask = (torch.arange(T) < lengths[:, None]).to(sums.dtype)
    x = torch.randn(len(sums), T, dtype=sums.dtype) * mask
    return x + mask * ((sums - x.sum(1)) / lengths)[:, None]


# ---- the losses


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


FIXED = {  # two pairs; 4 and 8 tokens are chosen
    "logp_chosen": double(-8, -20),
    "logp_rejected": double(-9, -18),
    "ref_chosen": double(-10, -19),
    "ref_rejected": double(-8, -18.5),
}
LENGTHS = torch.tensor([4, 8, 5, 6])
WEIGHTS = (0.8, 0.2, 1.0)


@pytest.mark.parametrize("delta, bco", [(0.0, 1.352696), (0.05, 1.353009)])
def test_losses_by_hand(delta, bco):
    """Pair 1: R+ .2, R- -.1. Pair 2: R+ -.1, R- .05. NLL 8/4 and 20/8."""
    terms, chosen, rejected = mpo_loss(**FIXED, beta=0.1, delta=delta, tokens=LENGTHS[:2])
    assert chosen.tolist() == pytest.approx([0.2, -0.1])
    assert rejected.tolist() == pytest.approx([-0.1, 0.05])
    soft = lambda x: math.log(1 + math.exp(-x))
    want = [
        [soft(0.3), soft(-0.15)],
        [soft(0.2 - delta) + soft(delta + 0.1), soft(-0.1 - delta) + soft(delta - 0.05)],
        [2.0, 2.5],
    ]
    assert torch.allclose(terms, double(*want), rtol=1e-9)
    assert terms.mean(1).tolist() == pytest.approx([0.662656, bco, 2.25], abs=1e-6)
    weighted = sum(w * term for w, term in zip(WEIGHTS, terms.mean(1).tolist()))
    assert weighted == pytest.approx(3.050664 if not delta else 3.050727, abs=1e-6)


def ours_and_theirs(values, lengths, beta, delta):
    """Loss and gradients by mpo_loss, and by TRL a pair at a time: its NLL is a mean over tokens.

    TRL has no shift; delta / beta on both references moves BCO alone.
    """
    leaves = {name: x.clone().requires_grad_(name.startswith("logp")) for name, x in values.items()}
    B = len(leaves["logp_chosen"])
    terms, *_ = mpo_loss(**leaves, beta=beta, delta=delta, tokens=lengths[:B])
    ours = sum(w * term for w, term in zip(WEIGHTS, terms)).mean()
    ours.backward()

    theirs, gradients, T = 0, [], int(lengths.max())
    for i in range(B):
        two = torch.tensor([i, B + i])
        sums = torch.stack([values["logp_chosen"][i], values["logp_rejected"][i]])
        policy = tokens_of(sums, lengths[two], T).requires_grad_()
        shift = delta / beta
        reference = torch.stack([values["ref_chosen"][i], values["ref_rejected"][i]]) + shift
        kinds = ["sigmoid", "bco_pair", "sft"]
        loss, logged = trl_loss(kinds, list(WEIGHTS), beta, policy, lengths[two], reference)
        (loss / B).backward()
        theirs += loss.item() / B
        gradients.append(policy.grad[:, 0])  # the same for each token of an answer
        assert torch.allclose(policy.grad[0, : lengths[i]], policy.grad[0, 0])
    theirs_grad = torch.stack(gradients).T
    ours_grad = torch.stack([leaves["logp_chosen"].grad, leaves["logp_rejected"].grad])
    return ours.item(), theirs, ours_grad, theirs_grad


@pytest.mark.parametrize("delta", [0.0, 0.05])
def test_fixed_pairs_as_trl(delta):
    ours, theirs, gradient, their_gradient = ours_and_theirs(FIXED, LENGTHS, 0.1, delta)
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert torch.allclose(gradient, their_gradient, atol=1e-6)
    assert gradient.abs().min() > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_random_pairs_as_trl(seed):
    torch.manual_seed(seed)
    lengths = torch.randint(1, 12, (12,))
    values = {name: -8 - 4 * torch.randn(6).double() for name in FIXED}
    delta = torch.randn(()).item()
    ours, theirs, gradient, their_gradient = ours_and_theirs(values, lengths, 0.3, delta)
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert torch.allclose(gradient, their_gradient, atol=1e-6)


def test_a_lost_pair_is_finite():
    zero, far = torch.zeros(1), torch.tensor([-5000.0])
    terms, *_ = mpo_loss(far, zero, zero, zero, 0.5, 0.0, torch.tensor([10]))
    assert terms[:, 0].tolist() == pytest.approx([2500, 2500 + math.log(2), 500])


# ---- a run


FLAGS = ["--batch-size", 2, "--grad-accum", 2, "--lora-rank", 2, "--lr", 1e-2, "--beta", 0.5]
FLAGS += ["--projector-lr", 1e-3]


def test_first_steps_by_hand(train, checkpoint):  # noqa: F811
    """Step 0 is .8318 + NLL; each step's shift is the mean of the rewards before it; names as TRL's."""
    out = train(mpo, "run", *FLAGS, "--steps", 5)
    lines = lines_of(out)
    model, processor = checkpoints.load(checkpoint)
    nll = []
    for record in read_records(["povid.json"], "images"):
        example = processor.encode(record)
        ids = torch.cat([example.prompt, example.answers[0]])[None]
        with torch.no_grad():
            x = model.embed(ids, processor.pixels(record.image)[None])
            log_p = model.llm(inputs_embeds=x).logits[0].log_softmax(-1)
        at = len(example.prompt) - 1
        answer = log_p[at:-1].gather(-1, example.answers[0][:, None])
        nll.append(-answer.mean().item())
    first = lines[0]
    args = mock.Mock(batch_size=2, grad_accum=2, steps=5, epochs=1, seed=0)
    chosen, _ = training.batch_of(0, args, 5)
    want = sum(nll[i] for i in chosen) / 4
    assert first["loss/nll"] == pytest.approx(want, rel=1e-5)
    assert first["loss"] == pytest.approx(0.831777 + want, abs=1e-5)
    assert (first["loss/dpo"], first["loss/bco"]) == pytest.approx((0.693147, 1.386294), abs=1e-5)

    rewards = [(x["rewards/chosen"] + x["rewards/rejected"]) / 2 for x in lines]
    for step, line in enumerate(lines):
        assert line["delta"] == pytest.approx(sum(rewards[:step]) / max(1, step), abs=1e-9)
        terms = [line[f"loss/{name}"] for name in ("dpo", "bco", "nll")]
        assert line["loss"] == pytest.approx(sum(w * x for w, x in zip(WEIGHTS, terms)), rel=1e-6)
    assert lines[0]["delta"] == 0 and abs(lines[4]["delta"]) > 1e-3
    _, logged = trl_loss(["sigmoid"], [1.0], 0.1, torch.zeros(2, 3), LENGTHS[:2], torch.zeros(2))
    theirs = {k for k in logged if k.startswith(("rewards/", "logps/"))}
    assert theirs == {k for k in first if k.startswith(("rewards/", "logps/"))}


def test_the_shift_enters_the_loss(train):  # noqa: F811
    """The last step's BCO from the step's own rows: one row a step, so that means are values."""
    flags = ["--batch-size", 1, "--lora-rank", 2, "--lr", 1e-2, "--beta", 2, "--steps", 4]
    for line in lines_of(train(mpo, "run", *flags)):
        soft = lambda x: math.log(1 + math.exp(-x))
        chosen, rejected = line["rewards/chosen"], line["rewards/rejected"]
        bco = soft(chosen - line["delta"]) + soft(line["delta"] - rejected)
        assert line["loss/bco"] == pytest.approx(bco, rel=1e-5)
    assert abs(bco - soft(chosen) - soft(-rejected)) > 1e-2


def test_resume_is_bit_equal(train, tmp_path):  # noqa: F811
    """Also the shift, which no weight remembers."""
    flags = [*FLAGS, "--steps", 4, "--save-every", 2]
    out = train(mpo, "run", *flags)
    again = tmp_path / "again"
    shutil.copytree(out, again)
    (again / "checkpoints" / "latest").write_text("step-000002")
    shutil.rmtree(again / "checkpoints" / "step-000004")
    shutil.rmtree(again / "adapter")
    with pytest.raises(BadInput, match="--out again exists"):
        train(mpo, "again", *flags)
    train(mpo, "again", *flags, "--resume")
    timeless = lambda out: [{k: v for k, v in x.items() if "sec" not in k} for x in lines_of(out)]
    assert timeless(again) == timeless(out)
    for file in ("adapter/adapter_model.safetensors", "checkpoints/step-000004/state.safetensors"):
        assert (again / file).read_bytes() == (out / file).read_bytes(), file
    states = [
        json.loads((o / "checkpoints/step-000004/state.json").read_text()) for o in (out, again)
    ]
    assert states[0] == states[1] and states[0]["state"]["rewards"] != 0


def test_one_micro_batch_or_two(train):  # noqa: F811
    lines = []
    for size, parts in ((4, 1), (2, 2)):
        flags = ["--batch-size", size, "--grad-accum", parts, "--lora-rank", 2, "--steps", 2]
        lines.append(lines_of(train(mpo, f"{size}", *flags, "--beta", 0.5, "--lr", 1e-3))[1])
    for name in ("loss", "loss/nll", "grad_norm", "delta"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-4)


def test_weights_make_it_dpo(train):  # noqa: F811
    """1 0 0 is dpo.py, bit for bit in what trains."""
    flags = [*FLAGS, "--steps", 3]
    ours = train(mpo, "mpo", *flags, "--weights", 1, 0, 0)
    theirs = train(dpo, "dpo", *flags)
    for a, b in zip(lines_of(ours), lines_of(theirs), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)


def test_defaults_and_refusals(monkeypatch, train):  # noqa: F811
    """MPO's paper: a batch of 256, one epoch, 5e-6. No chosen answer is cut: its likelihood would be another."""

    def parsed(*flags):
        monkeypatch.setattr(sys, "argv", ["mpo.py", *flags])
        return mpo.parse()

    args = parsed("--model", "m", "--data", "d.json")
    assert (args.lr, args.projector_lr, args.epochs, args.beta) == (5e-6, 5e-6, 1, 0.1)
    assert args.batch_size * args.grad_accum == 256 and tuple(args.weights) == WEIGHTS
    assert parsed("--weights", "1", "0", "0.5").weights == [1, 0, 0.5]
    with pytest.raises(BadInput, match="'-1' was given; a number, 0 or more"):
        parsed("--weights", "1", "-1", "0")
    with pytest.raises(BadInput, match="--weights 0 0 0"):
        parsed("--weights", "0", "0", "0")
    with pytest.raises(BadInput, match="row .: prompt of .* the limit is 30"):
        train(mpo, "cut", "--max-length", 30, "--steps", 1)
