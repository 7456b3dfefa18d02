"""ppo.py: rewards, advantages, losses against plain loops; an iteration worked out; the script."""

import json
import math
import random
import re
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from elsewhere import Elsewhere
from PIL import Image
from safetensors.torch import load_file

import data
import judge
import ppo
import reward_model
import sampling
import training
from common import BadInput
from data import Record
from facts import with_evaluation
from formats import adapters, checkpoints
from lora import add_adapter
from model import pack
from sampling import Samples

CHOICE = "Which object is in the image?\nA. cup\nB. dog\nAnswer with the option's letter."


def settings(**changed):
    """The flags that an iteration looks at."""
    flags = dict(
        seed=0,
        batch_size=4,
        sample_batch_size=4,
        grad_accum=1,
        samples=2,
        minibatches=1,
        passes=1,
        advantage="gae",
        max_new_tokens=4,
        temperature=1.0,
        kl="k1",
        kl_coef=0.1,
        gamma=1.0,
        lam=0.95,
        reward_scale=1.0,
        clip=0.2,
        value_weight=0.1,
        lr=1e-3,
        correct_weight=2.0,
        length_weight=-10.0,
        unfinished_weight=-8.0,
        gradient_checkpointing=False,
    )
    return SimpleNamespace(**(flags | changed))


def actor(llava, lr, value=True):
    """(model with policy and value network, processor, optimizer)."""
    model, processor = llava
    torch.manual_seed(0)
    model.prepare(4, projector=False)
    if value:
        add_adapter(model.llm, "value", 4)
        model.add_head("value")
        torch.nn.init.zeros_(model.heads["value"].weight)
    return model, processor, training.optimizer_for(model, lr, 0.0)


def prompts(processor, n=4):
    """n text-only prompts, encoded."""
    return [
        processor.encode(Record(f"f.json, row {i}", None, (f"What is it? {i}",))) for i in range(n)
    ]


def first_token_is(token):
    """A reward: does the answer begin with this token."""
    return lambda rollout, *_: {
        "hit": torch.tensor([float(a[0] == token) for e in rollout.examples for a in e.answers])
    }


def stir(model, scale=0.1):
    """Every adapter and head does something, each something else."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or name.startswith("heads."):
                p.add_(torch.randn_like(p) * scale)


def iteration(model, processor, prompts, score, optimizer, factor, args, step):
    """The phases of ppo.py's loop, with `score(rollout, step)` -> {term: (M,)} -> metrics."""
    rollout = ppo.draw_rollout(model, processor, prompts, args, step)
    terms = score(rollout, step)
    rollout = ppo.with_reference_and_values(model, processor, rollout, args)
    kl = ppo.kl_of(rollout.log_probs, rollout.reference, args.kl)
    rollout = ppo.with_advantages(rollout, sum(terms.values()), kl, args)
    metrics = ppo.update(model, processor, optimizer, factor, rollout, args, step)
    return metrics | ppo.rollout_metrics(rollout, terms)


def iterate(model, processor, optimizer, prompts, score, args, step=0, factor=1.0):
    """One iteration of ppo.py that moves nothing -> (metrics, the gradients of each update; of a single one, unclipped)."""
    updates, names = [], {p: n for n, p in model.named_parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def keep():
        updates.append({names[p]: p.grad.clone() for p in params if p.grad is not None})

    optimizer.step = keep  # nothing moves
    metrics = iteration(model, processor, prompts, score, optimizer, factor, args, step)
    norm = metrics["grad_norm"]
    if len(updates) == 1 and norm > 1:
        updates = [{n: g * norm for n, g in updates[0].items()}]
    return metrics, updates


def let_say(monkeypatch, prompts, answers, old, finished):
    """The policy answers prompt i with answers[i], K token tensors, of the log-probs old[i]."""
    of = {tuple(e.prompt.tolist()): i for i, e in enumerate(prompts)}

    def sample(_, rows, *__, **___):
        here = [of[tuple(row.tolist())] for row in rows]
        return Samples(*([values[i] for i in here] for values in (answers, old, finished)))

    monkeypatch.setattr(sampling, "sample", sample)


def watch_updates(model):
    """-> the list that will hold, for each forward pass of an update, the prompts in it."""
    seen, log_probs = [], model.log_probs

    def watched(batch):
        if torch.is_grad_enabled():
            rows = [ids[part == 0] for ids, part in zip(batch.input_ids, batch.segments)]
            seen.append([tuple(row.tolist()) for row in rows])
        return log_probs(batch)

    model.log_probs = watched
    return seen


def alone(model, prompt, answer, head=None):
    """One answer in a row of its own -> log-probs and entropies of its tokens, or a head's values before each of them."""
    h = model.hidden_states(pack([torch.cat([prompt, answer])], [[]]))[0]  # (P + R, D)
    before = h[len(prompt) - 1 : len(prompt) + len(answer) - 1]  # (R, D)
    if head:
        return before @ model.heads[head].weight[0] + model.heads[head].bias[0]
    log_p = (before @ model.llm.get_output_embeddings().weight.t()).log_softmax(-1)
    return log_p.gather(-1, answer[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


# ---- rewards


@pytest.mark.parametrize(
    "prompt, gold, text, want",
    [
        (CHOICE, "B", "B. dog", 1),
        (CHOICE, "B. dog", "B", 1),
        (CHOICE, "(B)", "I think the correct option is B.", 1),
        (CHOICE, "B", "A. cup", 0),
        (CHOICE, "B", " B\n", 1),
        (CHOICE, " (B) dog", "B.", 1),
        (CHOICE, "B", "b", 0),
        (CHOICE, "B", "The correct option is A.", 0),
        (CHOICE, "No", "No", 0),  # not a yes/no question
        (CHOICE, "A dog", "A.", 0),  # an article, not a letter
        (CHOICE, "B", "(B) dog", 1),
        (CHOICE, "B", "B) dog", 1),
        (CHOICE, "B", "Bread", 0),
        ("Which one? A. cup B. dog", "B", "B.", 1),
        ("Which one? Options: (A) cup, (B) dog.", "(B) dog", "B", 1),
        ("Which one?\n[A] cup\n[B] dog", "A", "B", 0),
        ("Which one?\n[A] cup\n[B] dog", "A", "A", 1),
        ("Who stands left of A. Smith and B. Jones?", "B. Jones", "B.", 0),
        ("Which house is it?", "No. 7", "No. 7", 0),
        ("What does the sign say?", "No parking", "No parking", 0),
        ("Where is nobody?", "No one is in the kitchen.", "No", 0),
        ("Look at the image. Are there dogs?", "No.", "No", 0.5),
        ("Based on the image, is there a dog?\nAnswer with one word.", "No", "Yes", -0.5),
        ("<image>\nIsn't it red?", "No, blue", "No", 0.5),
        (CHOICE, "Yes", "Yes", 0),
        ("Is there a dog?", "no", " no", 0.5),
        ("Is there a dog?", " NO.", "yes, two", -0.5),
        ("Is there a dog?", "No", "There is no dog.", 0),
        ("Is there a dog?", "No", "Not at all", 0),
        ("Is there a dog?", "No", "Yesterday", 0),
        ("Which letter?", "B", "B", 0),
        (CHOICE, "B", "But why", 0),
        (CHOICE, "B", "", 0),
        ("Is there a dog?", "No", "No, there is none.", 0.5),
        ("Is there a dog?", "No, there is no dog.", "Yes", -0.5),
        ("Is there a dog?", "No", "Nothing there", 0),
        ("Is there a dog?", "Yes", "Yes", 0),
        ("Is there a dog?", "None of them", "No", 0),
        ("Is there a dog?", "No.", "Nothing", 0),
        ("Describe.", "A red cup.", "No", 0),
        ("Describe.", None, "No", 0),
    ],
)
def test_correctness(prompt, gold, text, want):
    assert (
        ppo.correctness(Record("f, row 0", None, (prompt,), () if gold is None else (gold,)), text)
        == want
    )


def test_the_kind_that_a_row_states_decides():
    """LLaVA-RLHF's `caption_type`: 1 general, 2 to 5 the letter, 6 "No", 7 "Yes"."""
    of = lambda right, text: ppo.correctness(
        Record("f, row 0", None, ("Is it?",), ("No",), right=right), text
    )
    assert [of("", t) for t in ("No", "Yes")] == [0, 0]
    assert [of("C", t) for t in ("C. cup", "No", "the correct option is C.")] == [1, 0, 1]
    assert [of("No", t) for t in ("No", "Yes", "Maybe")] == [0.5, -0.5, 0]
    assert [of("Yes", t) for t in ("No", "Yes")] == [0, 0]


def test_reward_scale():
    """Ten times the rewards and KL: the same whitened advantages, returns ten times as far from V; with RLOO no change."""
    lengths, kl, scores = [3, 1, 2], torch.randn(6), torch.tensor([1.0, -2.0, 0.5])
    rollout = ppo.Rollout(
        [SimpleNamespace(answers=[torch.zeros(n)]) for n in lengths], [], kl, values=torch.zeros(6)
    )
    of = lambda scale, **more: ppo.with_advantages(
        rollout, scores, kl, settings(reward_scale=scale, samples=3, **more)
    )
    one, ten = of(1.0), of(10.0)
    assert torch.allclose(ten.advantages, one.advantages, atol=1e-5)
    assert torch.allclose(ten.returns, 10 * one.returns)
    same = [of(scale, advantage="rloo").advantages for scale in (1.0, 10.0)]
    assert torch.equal(*same)


def test_value_moves_by_the_clip_whatever_the_return():
    """V from 0: towards a return of 3 or of 30 the gradient ends at .2, 7 % or .7 % of the return."""
    for target in (3.0, 30.0):
        v = torch.tensor([0.19, 0.21], requires_grad=True)
        ppo.value_loss(v, torch.zeros(2), torch.full((2,), target), 0.2).sum().backward()
        assert v.grad[0] < 0 == v.grad[1]


def test_the_papers_rloo(command, monkeypatch):
    """The flags that the docstring gives for Amirloo et al.: r is the reward model's score alone."""
    words = " ".join(ppo.__doc__.split())
    (flags,) = re.findall(r"Their RLOO is (--advantage rloo .*? --unfinished-weight 0)[;,]", words)
    seen = []
    monkeypatch.setattr(
        ppo, "rloo", lambda rewards: seen.append(rewards.shape) or torch.zeros_like(rewards)
    )
    out = command("a", *flags.split(), "--batch-size", "2", "--grad-accum", "1", "--steps", "1")
    given = json.loads((out / "args.json").read_text())["flags"]
    names = ("samples", "lr", "kl_coef", "minibatches", "passes", "epochs")
    assert [given[name] for name in names] == [4, 3e-4, 0.4, 1, 1, 2]
    assert not any(given[f"{term}_weight"] for term in ("correct", "length", "unfinished"))
    line = json.loads(next(open(out / "metrics.jsonl")))
    assert line["objective/scores"] == line["scores/reward_model"] != 0
    assert seen == [(2, 4)]


def test_correctness_is_that_of_the_last_question():
    """The last turn tells the kind of question, the first answer is the right one."""
    of = lambda turns, gold, text: ppo.correctness(Record("f, row 0", None, turns, gold), text)
    earlier = (CHOICE, "A", "Is there a dog?")
    assert of(earlier, ("B",), "B") == 0 and of(earlier[::-1], ("B",), "B") == 1
    assert of(("Is there a dog?",), ("No", "Yes"), "No") == 0.5
    assert of(("Is there a dog?",), ("Yes", "No"), "No") == 0


def test_reward_at_the_last_real_token():
    kl = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    got = ppo.token_rewards(torch.tensor([1.0, 2.0, 3.0]), kl, [3, 1, 2], 0.5)
    assert torch.allclose(got, torch.tensor([-0.05, -0.1, 1 - 0.15, 2 - 0.2, -0.25, 3 - 0.3]))
    assert kl[0] == 0.1 and kl[2] == pytest.approx(0.3)  # untouched


def test_estimators_of_kl():
    """Exactly, as expectations over all tokens: k1 and k3 are the KL divergence, clamped k1 is more."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    truth = float((p * (p / q).log()).sum())
    mean = {
        kind: float((p * ppo.kl_of(p.log(), q.log(), kind)).sum())
        for kind in ("k1", "k3", "clamped")
    }
    assert mean["k1"] == pytest.approx(truth) and mean["k3"] == pytest.approx(truth)
    assert (
        mean["clamped"] == pytest.approx(truth + 0.2 * math.log(0.5 / 0.2))
        and mean["clamped"] > 1.5 * truth
    )
    assert (ppo.kl_of(p.log(), q.log(), "k3") >= 0).all()


# ---- advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0)])
def test_gae_is_the_double_sum(gamma, lam):
    torch.manual_seed(0)
    lengths = [5, 1, 3]
    rewards, values = torch.randn(9).double(), torch.randn(9).double()
    got, returns = ppo.gae(rewards, values, lengths, gamma, lam)
    want, at = [], 0
    for n in lengths:
        r, v = rewards[at : at + n].tolist(), values[at : at + n].tolist() + [0.0]
        for t in range(n):
            want.append(
                sum(
                    (gamma * lam) ** j * (r[t + j] + gamma * v[t + j + 1] - v[t + j])
                    for j in range(n - t)
                )
            )
        at += n
    assert torch.allclose(got, torch.tensor(want).double()) and torch.allclose(
        returns, got + values
    )
    if gamma == lam == 1:  # the return is what is still to come
        assert torch.allclose(returns[:5], rewards[:5].flip(0).cumsum(0).flip(0))


def test_whitening():
    x = torch.tensor([1.0, 4.0, 4.0, 7.0])
    mean, std = 4.0, math.sqrt((9 + 0 + 0 + 9) / 4)
    assert ppo.whiten(x).tolist() == pytest.approx([(v - mean) / std for v in x.tolist()], abs=1e-6)
    assert ppo.whiten(torch.full((3,), 2.5)).tolist() == [0, 0, 0]


def test_leave_one_out():
    got = ppo.rloo(torch.tensor([[1.0, 2.0, 6.0], [3.0, 3.0, 3.0]]))
    assert torch.allclose(got, torch.tensor([[1 - 4.0, 2 - 3.5, 6 - 1.5], [0, 0, 0]]))


# ---- losses


def test_losses_against_loops():
    torch.manual_seed(0)
    new, old, a = torch.randn(40) * 0.3, torch.randn(40) * 0.3, torch.randn(40)
    losses, clipped = ppo.policy_loss(new, old, a, 0.2)
    for i in range(40):
        ratio = math.exp(new[i] - old[i])
        free, near = -float(a[i]) * ratio, -float(a[i]) * min(max(ratio, 0.8), 1.2)
        assert float(losses[i]) == pytest.approx(max(free, near), abs=1e-5) and bool(
            clipped[i]
        ) == (near > free)
    assert 0 < clipped.float().mean() < 1
    v, before, returns = torch.randn(40), torch.randn(40), torch.randn(40)
    got = ppo.value_loss(v, before, returns, 0.2)
    for i in range(40):
        near = float(before[i]) + min(max(float(v[i] - before[i]), -0.2), 0.2)
        want = 0.5 * max(float(v[i] - returns[i]) ** 2, (near - float(returns[i])) ** 2)
        assert float(got[i]) == pytest.approx(want, abs=1e-5)


def test_clipped_tokens_have_no_gradient():
    new = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    losses, _ = ppo.policy_loss(new, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2)
    losses.sum().backward()
    assert [g != 0 for g in new.grad.tolist()] == [False, True, True, False]


def test_trl_says_the_same_of_rloo():
    """TRL's RLOOTrainer on the same log-probs and advantages: loss, share of clipped answers. (It has no PPO any more.)"""
    trl = pytest.importorskip("trl")
    torch.manual_seed(0)
    new, lengths, advantages = torch.randn(8, 5) * 0.2, [5, 3, 1, 4, 2, 5, 5, 2], torch.randn(8)
    old = new + torch.randn(8, 5) * 0.1
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).float()
    theirs = mock.MagicMock(
        epsilon_low=0.2,
        epsilon_high=0.2,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    theirs._get_per_token_logps_and_entropies.return_value = new, torch.zeros(8, 5), None
    theirs.accelerator.gather = theirs.accelerator.reduce = lambda x, reduction=None: x
    tokens = {
        "prompt_ids": torch.zeros(8, 1),
        "prompt_mask": torch.ones(8, 1),
        "completion_ids": torch.zeros(8, 5),
    }
    given = tokens | {
        "completion_mask": mask,
        "old_logps": (old * mask).sum(1),
        "advantages": advantages,
    }
    want = trl.RLOOTrainer._compute_loss(theirs, None, given)

    row = lambda x: torch.cat([x[i, :n] for i, n in enumerate(lengths)])
    losses, clipped = ppo.policy_loss(
        ppo.summed(row(new), lengths), ppo.summed(row(old), lengths), advantages, 0.2
    )
    torch.testing.assert_close(losses.mean(), want)
    (shares,) = (m["clip_ratio/region_mean"] for m in theirs._metrics.values())
    assert float(clipped.float().mean()) == pytest.approx(shares[0]) and 0 < shares[0] < 1


# ---- an iteration


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_without_a_rate_nothing_moves(llava, advantage):
    """Ratio 1 in every pass, and the log-probs of sampling are those of a second look."""
    model, processor, optimizer = actor(llava, 0.0, advantage == "gae")
    for name, p in model.named_parameters():  # a policy that is not its reference
        if "adapters.policy.lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    before = {n: p.clone() for n, p in model.named_parameters()}
    seen = {}
    log_probs = model.log_probs

    def watched(batch):
        found = log_probs(batch)
        seen.setdefault(torch.is_grad_enabled(), []).append(found[0].detach())
        return found

    model.log_probs = watched
    some = prompts(processor, 6)
    args = settings(passes=2, advantage=advantage, samples=3, lr=0.0)
    metrics = iteration(model, processor, some, first_token_is(5), optimizer, 1.0, args, 0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert metrics["policy/approxkl"] < 1e-10 and metrics["policy/clipfrac"] == 0
    seeds = [random.Random(f"0/0/{number}").getrandbits(62) for number in (0, 1)]
    drawn = [
        sampling.sample(
            model,
            [e.prompt for e in part],
            None,
            3,
            4,
            1.0,
            processor.stop_ids,
            generator=torch.Generator().manual_seed(seed),
        )
        for part, seed in zip((some[:4], some[4:]), seeds)
    ]
    tokens, old = (
        sum([sum(getattr(d, name), []) for d in drawn], []) for name in ("tokens", "log_probs")
    )
    old, kl = torch.cat(old), torch.cat(old) - torch.cat(seen[False])
    assert metrics["response_length"] == sum(map(len, tokens)) / 18
    assert (
        metrics["objective/kl"] == pytest.approx(float(kl.sum()) / 18, abs=1e-4)
        and kl.abs().max() > 1e-3
    )
    ones = lambda group: [torch.ones(len(t), dtype=torch.bool) for t in group]
    groups = [tokens[3 * i : 3 * i + 3] for i in range(6)]
    scored = [replace(e, answers=group, scored=ones(group)) for e, group in zip(some, groups)]
    again, _ = log_probs(processor.collate(scored))
    assert (again - old).abs().max() < 1e-5


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_bandit(llava, advantage):
    """Which first token pays is learned from the reward alone."""
    model, processor, optimizer = actor(llava, 0.01, advantage == "gae")
    some = prompts(processor)
    batch = processor.collate(
        [replace(some[0], answers=[torch.tensor([5])], scored=[torch.ones(1, dtype=torch.bool)])]
    )
    h = model.hidden_states(batch)[0, batch.index[0]]
    p = (h @ model.llm.get_output_embeddings().weight.t()).softmax(-1)
    target = int(p.argsort(descending=True)[3])
    args = settings(samples=8, passes=2, max_new_tokens=2, kl_coef=0.0, advantage=advantage)
    seen = [
        iteration(model, processor, some, first_token_is(target), optimizer, 1.0, args, i)[
            "objective/scores"
        ]
        for i in range(20)
    ]
    assert seen[0] < 0.4 and sum(seen[-5:]) / 5 > 0.9, seen


def test_value_network_learns_the_return(llava):
    """With a policy that hardly moves, V comes near the constant reward (the head alone trains)."""
    model, processor, optimizer = actor(llava, 0.002)
    optimizer.param_groups[0]["base_lr"] = 0.0
    constant = lambda rollout, *_: {"one": torch.ones(len(rollout.lengths))}
    args = settings(kl_coef=0.0, value_weight=1.0, passes=4, clip=1.0)
    losses = [
        iteration(model, processor, prompts(processor), constant, optimizer, 1.0, args, i)[
            "val/loss"
        ]
        for i in range(12)
    ]
    assert losses[0] > 0.1 and losses[-1] < 0.2 * losses[0], losses


def test_endless_empty_and_equal_answers(llava, monkeypatch):
    """Nothing but end tokens, no end token at all, all rewards equal: finite numbers, no step into nowhere."""
    model, processor, optimizer = actor(llava, 1e-3)
    zero = lambda rollout, *_: {"zero": torch.zeros(len(rollout.lengths))}
    args = settings(max_new_tokens=1, kl_coef=0.0)
    metrics = iteration(model, processor, prompts(processor), zero, optimizer, 1.0, args, 0)
    assert metrics["response_length"] == 1 and all(math.isfinite(v) for v in metrics.values())
    for ids, finished in (([5, 6, 7, 8], False), ([processor.end_id], True)):
        tokens, log_probs = torch.tensor(ids), torch.full((len(ids),), -4.0)
        let_say(
            monkeypatch,
            prompts(processor),
            [[tokens] * 2] * 4,
            [[log_probs] * 2] * 4,
            [[finished] * 2] * 4,
        )
        metrics = iteration(
            model, processor, prompts(processor), zero, optimizer, 1.0, settings(kl_coef=0.0), 0
        )
        assert metrics["finished"] == finished and all(math.isfinite(v) for v in metrics.values())


def test_terms_of_the_reward(llava):
    """Right letters, length, cut-off answers; the facts reach the reward model and no policy's prompt."""
    model, processor, _ = actor(llava, 1e-3, value=False)
    add_adapter(model.llm, "reward", 2)
    model.add_head("reward")
    record = Record("f.json, row 0", None, (CHOICE,), ("B",))
    example = processor.encode(replace(record, answers=("B", "A. cup")))
    held_out = {
        "a": {"n": 2, "mean": 1.0, "std": 2.0},
        "b": {"n": 2, "mean": 3.0, "std": 0.0},
    }
    settings_of = {
        "question": "Rate.{facts}",
        "facts": " See:",
        "max_facts": None,
        "held_out": held_out,
    }
    facts = {record.prompt_key: ["A dog."]}
    reward = ppo.Reward(model, processor, settings_of, facts, settings(max_new_tokens=10))
    assert reward.mean == 2 and reward.std == pytest.approx(math.sqrt((4 + 1 + 9) / 2 - 4))
    drawn = replace(example, record=record)
    rollout = ppo.Rollout([drawn], [[True, False]], None)
    terms = reward.terms(rollout, 0)
    assert terms["correctness"].tolist() == [2, 0] and terms["unfinished"].tolist() == [0, -8]
    assert terms["length"].tolist() == pytest.approx([-len(a) for a in example.answers])
    unit = {"held_out": {"a": {"n": 1, "mean": 0.0, "std": 1.0}}}
    plain = ppo.Reward(model, processor, settings_of | unit, facts, reward.args).terms(rollout, 0)
    score = plain["reward_model"]
    assert torch.allclose(terms["reward_model"], (score - 2) / reward.std)
    assert score.unique().numel() == 2
    read = reward.with_turn(drawn, ["A dog."], random.Random(0)).answers[0]
    assert "Rate. See:\n- A dog." in processor.tokenizer.decode(read)
    assert "A dog." not in processor.tokenizer.decode(drawn.prompt)


def test_scores_that_never_differ():
    """Rounding may put E[x^2] - E[x]^2 below 0."""
    held = {"a": {"n": 3, "mean": 0.1, "std": 0.0}, "b": {"n": 4, "mean": 0.1, "std": 0.0}}
    for mean in torch.rand(300).tolist():
        for f in held.values():
            f["mean"] = round(mean, 4)
        assert 0 < ppo.mean_and_std(held)[1] < 1e-5


# ---- one update from given answers, against the same worked out answer by answer


LENGTHS = [(1, 4), (3, 2), (4, 4), (1, 2)]  # of the answers to each prompt
FINISHED = [[True, False], [True, True], [False, False], [True, True]]


@pytest.fixture
def given(llava, monkeypatch):
    """Prompts with answers, log-probs of sampling and scores, and a policy, reference and value network that all differ."""
    model, processor, optimizer = actor(llava, 1e-3)
    stir(model)
    some = [
        processor.encode(Record(f"f.json, row {i}", None, ("What is it?" + " Look." * i,)))
        for i in range(4)
    ]
    torch.manual_seed(1)
    answers = [[torch.randint(5, 300, (n,)) for n in pair] for pair in LENGTHS]
    with torch.no_grad():
        old = [
            [alone(model, e.prompt, a)[0] + 0.3 * torch.randn(len(a)) for a in pair]
            for e, pair in zip(some, answers)
        ]
    scores = [[0.5, -1.0], [2.0, 0.25], [-0.5, 1.5], [3.0, -2.0]]
    let_say(monkeypatch, some, answers, old, FINISHED)
    return SimpleNamespace(
        model=model,
        processor=processor,
        optimizer=optimizer,
        some=some,
        answers=answers,
        old=old,
        scores=scores,
    )


def two_terms(given):
    """score() of the given scores, in two terms; it looks at what it is told."""

    def score(rollout, step):
        assert rollout.finished == FINISHED and step == 3
        shown = [[a.tolist() for a in e.answers] for e in rollout.examples]
        assert shown == [[a.tolist() for a in pair] for pair in given.answers]
        r = torch.tensor(sum(given.scores, []))
        return {"half": r / 2, "rest": r - r / 2 + 1}

    return score


def worked(given, args):
    """What the update should be, from the given answers one at a time -> (metrics, {parameter: gradient}).

    Whole answers are numbers in Python; only what is differentiated is a tensor.
    """
    model, clip = given.model, args.clip
    log_ratios, entropies, values, fixed = [], [], [], []
    for e, pair, pair_old, pair_scores in zip(given.some, given.answers, given.old, given.scores):
        for answer, old, r in zip(pair, pair_old, pair_scores):
            log_p, entropy = alone(model, e.prompt, answer)
            with model.use("value"):
                v = alone(model, e.prompt, answer, "value")
            with torch.no_grad(), model.use(None):
                reference, _ = alone(model, e.prompt, answer)
            log_ratios.append(log_p - old)
            entropies += entropy.tolist()
            values.append(v)
            k1 = (old - reference).tolist()
            kinds = {
                "k1": k1,
                "k3": [math.exp(-x) - 1 + x for x in k1],
                "clamped": [max(x, 0.0) for x in k1],
            }
            fixed.append((k1, kinds[args.kl], r + 1, v.tolist()))
    tokens = sum(map(len, log_ratios))
    if args.advantage == "gae":
        advantages, returns = [], []
        for _, kl, r, v in fixed:
            rewards, v = [-args.kl_coef * x for x in kl], v + [0.0]
            rewards[-1] += r
            deltas = [rewards[t] + args.gamma * v[t + 1] - v[t] for t in range(len(kl))]
            a = [
                sum((args.gamma * args.lam) ** (j - t) * deltas[j] for j in range(t, len(kl)))
                for t in range(len(kl))
            ]
            advantages.append(a)
            returns.append([x + y for x, y in zip(a, v)])
        every = sum(advantages, [])
        mean, std = statistics.mean(every), statistics.pstdev(every)
        parts = [
            (x, torch.tensor([(a - mean) / std for a in row]))
            for x, row in zip(log_ratios, advantages)
        ]
        wrong = [((v - torch.tensor(g)) ** 2).sum() / 2 for v, g in zip(values, returns)]
        value = sum(wrong) / tokens
    else:
        whole = [r - args.kl_coef * sum(kl) for _, kl, r, _ in fixed]
        of_two = [whole[i] - whole[i ^ 1] for i in range(len(whole))]  # two answers a prompt
        parts = [(x.sum()[None], torch.tensor([a])) for x, a in zip(log_ratios, of_two)]
        value = torch.zeros(())
    losses, clipped = [], []
    for x, a in parts:
        for one, advantage in zip(x, a.tolist()):
            ratio = one.exp()
            bound = min(max(ratio.item(), 1 - clip), 1 + clip)
            clipped.append(-advantage * bound > -advantage * ratio.item())
            losses.append(-advantage * bound + 0 * one if clipped[-1] else -advantage * ratio)
    policy = sum(losses) / len(losses)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(
        policy + args.value_weight * value, params.values(), allow_unused=True
    )
    metrics = {
        "policy/loss": policy.item(),
        "policy/clipfrac": sum(clipped) / len(clipped),
        "policy/approxkl": sum((x**2).sum().item() for x in log_ratios) / tokens / 2,
        "objective/entropy": sum(entropies) / tokens,
        "objective/kl": sum(sum(k1) for k1, *_ in fixed) / len(fixed),
        "objective/scores": sum(r for _, _, r, _ in fixed) / len(fixed),
        "scores/half": sum(sum(given.scores, [])) / len(fixed) / 2,
        "scores/rest": sum(sum(given.scores, [])) / len(fixed) / 2 + 1,
        "response_length": 21 / 8,
        "finished": 5 / 8,
    }
    if args.advantage == "gae":
        metrics["val/loss"] = value.item()
    return metrics, {n: g for n, g in zip(params, grads) if g is not None}


@pytest.mark.parametrize("batch_size, grad_accum", [(4, 1), (2, 2), (3, 2), (1, 4)])
@pytest.mark.parametrize(
    "advantage, kl", [("gae", "k1"), ("gae", "k3"), ("gae", "clamped"), ("rloo", "k1")]
)
def test_an_update_is_the_worked_one(given, advantage, kl, batch_size, grad_accum):
    """Losses and gradients are those over all tokens (RLOO: answers) of the minibatch, however it is cut."""
    args = settings(
        batch_size=batch_size,
        grad_accum=grad_accum,
        advantage=advantage,
        kl=kl,
        gamma=0.9,
        lam=0.6,
        kl_coef=0.8,
        value_weight=0.3,
    )
    metrics, updates = iterate(
        given.model, given.processor, given.optimizer, given.some, two_terms(given), args, step=3
    )
    want, gradients = worked(given, args)
    assert 0 < want["policy/clipfrac"] < 1 and abs(want["objective/kl"]) > 0.1
    if advantage == "rloo" and grad_accum > 1:
        want.pop("policy/clipfrac")  # a mean over the micro-batches
    assert {n: metrics[n] for n in want} == pytest.approx(want, abs=2e-4)
    (found,) = updates
    assert found.keys() == gradients.keys()
    for name, g in gradients.items():
        torch.testing.assert_close(found[name], g, rtol=2e-3, atol=2e-4, msg=name)
    moved = {n.split(".")[-2] for n in found if "lora" in n} | {
        n.split(".")[1] for n in found if n.startswith("heads")
    }
    assert moved == ({"policy", "value"} if advantage == "gae" else {"policy"})


def test_the_factor_of_the_learning_rates(given):
    iterate(
        given.model,
        given.processor,
        given.optimizer,
        given.some,
        two_terms(given),
        settings(),
        step=3,
        factor=0.25,
    )
    rates = {group["name"]: group["lr"] for group in given.optimizer.param_groups}
    assert rates == {"llm": 2.5e-4, "heads": 2.5e-4}


def test_what_a_stop_would_tell(given, monkeypatch):
    """The loss that is looked at before a step is the whole one, and every prompt of the step is named."""
    seen, check = [], training.check_finite
    monkeypatch.setattr(training, "check_finite", lambda *a: seen.append(a) or check(*a))
    args = settings(value_weight=0.5, batch_size=2, grad_accum=2)
    metrics, _ = iterate(
        given.model, given.processor, given.optimizer, given.some, two_terms(given), args, step=3
    )
    ((loss, norm, rows),) = seen
    assert norm == metrics["grad_norm"]
    assert loss == pytest.approx(metrics["policy/loss"] + 0.5 * metrics["val/loss"], abs=1e-5)
    assert metrics["val/loss"] > 0.1 and sorted(rows) == [f"f.json, row {i}" for i in range(4)]


def test_value_weight_is_that_of_the_value_network_alone(given):
    run = lambda weight: iterate(
        given.model,
        given.processor,
        given.optimizer,
        given.some,
        two_terms(given),
        settings(value_weight=weight),
        step=3,
    )
    (one, (small,)), (other, (large,)) = run(0.01), run(0.03)
    assert one["val/loss"] == pytest.approx(other["val/loss"])
    for name in small:
        factor = 3 if "value" in name else 1
        torch.testing.assert_close(large[name], factor * small[name], rtol=1e-3, atol=1e-6)
    assert any("value" in name for name in small)


def test_the_old_value_bounds_the_new_one(given):
    """Once V has left V_old by more than clip towards the return, it has no gradient; on the other side it has."""
    model = given.model
    torch.nn.init.zeros_(model.heads["value"].weight)
    torch.nn.init.zeros_(model.heads["value"].bias)
    values, moved = model.values, 0.5
    model.values = lambda *a: values(*a) + (moved if torch.is_grad_enabled() else 0.0)

    def bias_gradient(r):
        given.scores = [[r - 1.0] * 2] * 4
        args = settings(kl_coef=0.0, gamma=1.0, lam=1.0, clip=0.2, value_weight=1.0)
        metrics, (found,) = iterate(
            model, given.processor, given.optimizer, given.some, two_terms(given), args, step=3
        )
        return float(found["heads.value.bias"][0]), metrics["val/loss"]

    assert bias_gradient(2.0) == pytest.approx((0.0, (2 - 0.2) ** 2 / 2), abs=1e-4)
    assert bias_gradient(-2.0) == pytest.approx((2.5, (2 + 0.5) ** 2 / 2), abs=1e-4)


def test_passes_and_minibatches(given, monkeypatch):
    """Each pass takes every prompt once, in another order; metrics are means over updates."""
    given.answers = [[a.repeat(4)[:4] for a in pair] for pair in given.answers]  # of one length
    given.old = [[o.repeat(4)[:4] for o in pair] for pair in given.old]
    let_say(monkeypatch, given.some, given.answers, given.old, FINISHED)
    run = lambda **changed: iterate(
        given.model,
        given.processor,
        given.optimizer,
        given.some,
        two_terms(given),
        settings(**changed),
        step=3,
    )
    once, updates = run()
    assert len(updates) == 1
    seen = watch_updates(given.model)
    again, updates = run(batch_size=1, grad_accum=2, passes=6)
    assert len(updates) == 12 and [len(rows) for rows in seen] == [1] * 24
    for name in (
        "policy/loss",
        "policy/clipfrac",
        "policy/approxkl",
        "objective/entropy",
        "val/loss",
        "objective/kl",
        "objective/scores",
    ):
        assert again[name] == pytest.approx(once[name], abs=1e-4), name
    order = [rows[0] for rows in seen]
    passes = [tuple(order[4 * i : 4 * i + 4]) for i in range(6)]
    prompts = {tuple(e.prompt.tolist()) for e in given.some}
    assert all(set(one) == prompts for one in passes) and len(set(passes)) > 2

    first = list(seen)
    seen.clear()
    run(batch_size=1, grad_accum=2, passes=6)
    assert seen == first  # of seed and step alone
    seen.clear()
    run(batch_size=1, grad_accum=2, passes=6, seed=1)
    assert seen != first
    mean_norm = again["grad_norm"]
    norms = [math.sqrt(sum(float((g**2).sum()) for g in u.values())) for u in updates]
    assert all(n <= 1 + 1e-4 for n in norms) and mean_norm >= statistics.mean(norms) - 1e-4


def test_orders_of_the_next_iteration_are_others(given):
    seen = watch_updates(given.model)
    found = set()
    for step in range(6):
        seen.clear()
        free = lambda *_: {"one": torch.arange(8.0)}
        iterate(
            given.model,
            given.processor,
            given.optimizer,
            given.some,
            free,
            settings(batch_size=1),
            step,
        )
        found.add(tuple(rows[0] for rows in seen))
    assert len(found) > 2


def test_in_bfloat16_the_answers_are_scored_again(checkpoint, monkeypatch):
    """What sampling told is not taken: the first ratio is 1, and the KL is that of a second look."""
    model, processor, optimizer = actor(checkpoints.load(checkpoint, torch.bfloat16), 1e-3)
    some = prompts(processor)
    answers = [[torch.tensor([7, 9, 11]), torch.tensor([8])] for _ in some]
    log_probs = [[torch.full((len(a),), -30.0) for a in pair] for pair in answers]
    let_say(monkeypatch, some, answers, log_probs, [[True, True]] * 4)
    metrics, _ = iterate(model, processor, optimizer, some, first_token_is(7), settings())
    assert metrics["policy/approxkl"] < 1e-4 and metrics["policy/clipfrac"] == 0
    assert abs(metrics["objective/kl"]) < 0.05  # policy and reference are the same still


# ---- what is drawn


def drawn(model, processor, optimizer, some, args, step=0):
    """The answers that one iteration draws, and whether each is finished."""
    found = []

    def score(rollout, _):
        answers = [[a.tolist() for a in e.answers] for e in rollout.examples]
        found.append((answers, sum(rollout.finished, [])))
        return {"none": torch.zeros(len(rollout.lengths))}

    iterate(model, processor, optimizer, some, score, args, step)
    return found[0]


def test_seeds_of_sampling(llava):
    """Answers differ between iterations, between chunks of one, and between siblings; the seed decides."""
    player = actor(llava, 1e-3)
    processor = player[1]
    same = prompts(processor, 1) * 4
    args = settings(batch_size=1, samples=2, max_new_tokens=6)
    first, finished = drawn(*player, same, args)
    assert [len(pair) for pair in first] == [2] * 4
    every = [tuple(a) for pair in first for a in pair]
    assert len(set(every)) > 4
    assert finished == [a[-1] in processor.stop_ids for a in every]
    torch.manual_seed(123)
    assert drawn(*player, same, args)[0] == first
    assert drawn(*player, same, args, step=1)[0] != first
    assert drawn(*player, same, settings(**vars(args) | {"seed": 1}))[0] != first


def test_temperature_and_length_of_what_is_drawn(llava):
    player = model, processor, _ = actor(llava, 1e-3)
    some = prompts(processor)
    cold, _ = drawn(*player, some, settings(temperature=1e-4, max_new_tokens=5))
    greedy = sampling.sample(model, [e.prompt for e in some], None, 2, 5, 0, processor.stop_ids)
    assert cold == [[a.tolist() for a in pair] for pair in greedy.tokens]
    warm, _ = drawn(*player, some, settings(temperature=50.0, max_new_tokens=3, samples=5))
    assert [len(row) for row in warm] == [5] * 4 and max(len(a) for row in warm for a in row) == 3


# ---- the reward model in ppo.py


def rater(llava, texts, max_facts=None, held_out=None, **changed):
    """(Reward, Examples with two answers of unequal length) over a model whose adapters all differ."""
    model, processor, _ = actor(llava, 1e-3)
    add_adapter(model.llm, "reward", 2)
    model.add_head("reward")
    stir(model)
    records = [Record(f"f.json, row {i}", None, (f"What is it? {i}",)) for i in range(5)]
    settings_of = {
        "question": "Rate.{facts}",
        "facts": " See:",
        "max_facts": max_facts,
        "held_out": held_out or {"a": {"n": 1, "mean": 0.0, "std": 1.0}},
    }
    facts = {r.prompt_key: texts for r in records}
    reward = ppo.Reward(model, processor, settings_of, facts, settings(**changed))
    answers = lambda i: ("A red cup is on the table." * i, "No")
    encoded = [processor.encode(replace(r, answers=answers(i + 1))) for i, r in enumerate(records)]
    return reward, [replace(e, record=r) for e, r in zip(encoded, records)]


def scores_of(reward, examples, step=0):
    """The reward model's term of these Examples' answers."""
    rollout = ppo.Rollout(examples, [[True] * len(e.answers) for e in examples], None)
    return reward.terms(rollout, step)["reward_model"]


@torch.no_grad()
def test_the_reward_is_read_by_the_reward_model(llava):
    """Its adapter, its head, at the cue behind each answer: as from each answer alone."""
    reward, examples = rater(llava, [], batch_size=2)
    model = reward.model
    found = scores_of(reward, examples)
    for name in ("policy", "value", None):
        with model.use(name):  # whatever acts outside
            assert torch.equal(scores_of(reward, examples), found)
    want = []
    for e in examples:
        for answer in reward.with_turn(e, [], random.Random(0)).answers:
            with model.use("reward"):
                h = model.hidden_states(pack([torch.cat([e.prompt, answer])], [[]]))[0, -1]
            want.append(float(h @ model.heads["reward"].weight[0] + model.heads["reward"].bias))
    assert found.tolist() == pytest.approx(want, abs=1e-4)
    assert len(set(want)) == 10


def test_captions_are_drawn_anew_each_step(llava):
    """One of three captions: another by prompt and by step, the same when a step is done again."""
    captions = ["A dog.", "A red cup is on the table.", "Two bananas are in a bowl in the kitchen."]
    reward, examples = rater(llava, captions, max_facts=1, batch_size=1)
    score = lambda some, step: [round(x, 3) for x in scores_of(reward, some, step).tolist()]
    one = examples[0]
    many = score([one] * 12, 0)[::2]
    assert len(set(many)) == 3  # not one draw for all
    by_step = [score([one], step)[0] for step in range(12)]
    assert len(set(by_step)) == 3
    assert score([one] * 12, 0)[::2] == many
    reward.args.seed = 1
    assert score([one] * 12, 0)[::2] != many


def test_facts_first_are_read_before_the_question(llava):
    """As reward_model.py reads them: in the prompt, and not behind the answer."""
    captions = ["A dog.", "A red cup."]
    reward, examples = rater(llava, captions, max_facts=1)
    reward.settings["facts_first"] = True
    for draw in range(4):
        read = reward.with_turn(examples[0], captions, random.Random(draw))
        drawn = random.Random(draw).sample(captions, 1)[0]
        turns = (f"See:\n- {drawn}\nWhat is it? 0",)
        asked = replace(examples[0].record, turns=turns)
        assert torch.equal(read.prompt, reward.processor.encode(asked).prompt)
        plain = with_evaluation(reward.processor, examples[0], "Rate.")
        assert all(torch.equal(a, b) for a, b in zip(read.answers, plain.answers))


def test_scores_are_in_units_of_all_held_out_pairs(llava):
    """Files weigh by their pairs: 3 pairs at -1 and 1 pair at 3 have mean 0 and variance 3."""
    held = {"a": {"n": 3, "mean": -1.0, "std": 0.0}, "b": {"n": 1, "mean": 3.0, "std": 0.0}}
    reward, examples = rater(llava, [])  # mean 0, spread 1
    plain = scores_of(reward, examples)
    other = lambda held_out: ppo.Reward(
        reward.model,
        reward.processor,
        reward.settings | {"held_out": held_out},
        reward.facts,
        reward.args,
    )
    assert torch.allclose(scores_of(other(held), examples), plain / math.sqrt(3))
    one_file = {"a": {"n": 7, "mean": 1.5, "std": 2.0}}
    assert torch.allclose(scores_of(other(one_file), examples), (plain - 1.5) / 2)


def test_terms_weigh_as_told(llava):
    weights = dict(correct_weight=3.0, length_weight=-6.0, unfinished_weight=-5.0)
    reward, examples = rater(llava, [], max_new_tokens=12, **weights)
    record = replace(examples[0].record, turns=("Is there a cup?",), answers=("No",))
    reward.facts[record.prompt_key] = []
    encode = lambda text: reward.processor.encode(replace(record, answers=(text,)))
    answers = [encode(text).answers[0] for text in ("No", "Yes, there is")]
    example = replace(examples[0], record=record, answers=answers)
    terms = reward.terms(ppo.Rollout([example], [[False, True]], None), 0)
    assert terms["correctness"].tolist() == [1.5, -1.5]
    assert terms["unfinished"].tolist() == [-5, 0]
    assert terms["length"].tolist() == pytest.approx([-len(a) / 2 for a in answers])
    assert set(terms) == {"reward_model", "correctness", "length", "unfinished"}


def test_a_picture_that_breaks_is_told_with_its_row(llava, tmp_path):
    """With the steps before saved; with --skip-bad-rows the others are sampled, and the row is noted."""
    _, processor = llava
    examples = []
    for i in range(4):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (28, 28)).save(path)
        examples.append(processor.encode(Record(f"f.json, row {i}", path, ("What?",))))
    (tmp_path / "2.png").write_bytes(b"torn")
    (tmp_path / "skipped.json").write_text("[]")
    args = settings(batch_size=2, grad_accum=1, sample_batch_size=3, minibatches=2, steps=1)
    args.skip_bad_rows, saved = False, []
    save = lambda step, alone: saved.append((step, alone))
    of = lambda step: ppo.prompts_of(step, args, tmp_path, processor, examples, save)
    with pytest.raises(BadInput, match="^f.json, row 2: .* The steps before are saved"):
        of(1)
    assert saved == [(1, True)]
    args.skip_bad_rows = True
    found = [e.record.where for e in of(1)]
    assert sorted(found) == [f"f.json, row {i}" for i in (0, 1, 3)]
    assert json.loads((tmp_path / "skipped.json").read_text())[0]["row"] == 2


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_an_iteration_stays_on_the_models_device(llava, advantage):
    """What is drawn, scored and computed before the update, with a reward model and with an oracle."""
    reward, examples = rater(llava, [], advantage=advantage, max_new_tokens=4, batch_size=2)
    model, processor, args = reward.model, reward.processor, reward.args

    def work():
        drawn = ppo.draw_rollout(model, processor, examples, args, 0)
        terms = reward.terms(drawn, 0)
        drawn = ppo.with_reference_and_values(model, processor, drawn, args)
        kl = ppo.kl_of(drawn.log_probs, drawn.reference, "k3")
        return terms, ppo.with_advantages(drawn, sum(terms.values()), kl, args)

    want, _ = work()
    with Elsewhere(model) as there:
        terms, rollout = work()
        assert all(map(there.holds, terms.values()))
        tensors = (rollout.log_probs, rollout.reference, rollout.advantages)
        assert all(map(there.holds, tensors))
        assert rollout.values is None or there.holds(rollout.values)
        reward.settings = None
        reward.oracle = lambda records, texts: [[1.0] * len(row) for row in texts]
        assert there.holds(reward.terms(rollout, 0)["reward_model"])
    assert want.keys() == terms.keys()
    assert all(torch.equal(want[name], terms[name]) for name in want)


# ---- the script


def conversation(question, answer):
    """Two turns in LLaVA's layout."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_images_that_another_process_sampled_are_decoded_ahead(command, monkeypatch, advantage):
    """What is kept goes before each phase, as in a process that sampled other prompts."""
    late, prefetch = [], data.Prefetch

    def forgets(phase):
        def run(*given):
            (processor,) = (
                g if isinstance(g, data.Processor) else g.processor
                for g in given
                if isinstance(g, (data.Processor, ppo.Reward))
            )
            ahead, get = processor.prefetch, prefetch.get
            ahead.kept.clear()
            with monkeypatch.context() as patch:
                known = lambda i: i in ahead.begun or i in ahead.kept
                note = lambda self, i: (late.append(i) if not known(i) else None, get(self, i))[1]
                patch.setattr(prefetch, "get", note)
                return phase(*given)

        return run

    for place, name in (
        (ppo, "with_reference_and_values"),
        (ppo, "update"),
        (ppo.Reward, "by_reward_model"),
    ):
        monkeypatch.setattr(place, name, forgets(getattr(place, name)))
    command("run", "--steps", "1", "--no-eval", "--advantage", advantage)
    assert not late


@pytest.fixture
def command(checkpoint, tmp_path, monkeypatch):
    """A function that runs ppo.py with a reward model of random weights -> the run folder."""
    rows = []
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.effect_noise((28, 28), 80).convert("RGB").save(tmp_path / "images" / f"{i}.png")
        turns = conversation("<image>\nIs there a dog?", "No")
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    (tmp_path / "facts.json").write_text(json.dumps({f"{i}.png": ["A cup."] for i in range(8)}))
    model, _ = checkpoints.load(checkpoint)
    model.prepare(llm=False, projector=False)
    torch.manual_seed(0)
    add_adapter(model.llm, "reward", 2)
    model.add_head("reward")
    stir(model)
    held = {"f": {"n": 1, "mean": 0.0, "std": 1.0}}
    written = {
        "question": reward_model.QUESTION,
        "facts": reward_model.FACTS,
        "max_facts": 1,
        "template": "vicuna_v1",
        "image_aspect": "pad",
        "held_out": held,
    }
    adapters.save_reward(model, tmp_path, checkpoint, written)
    monkeypatch.chdir(tmp_path)

    def run(out, *flags, facts=("--facts", "facts.json"), samples=("--samples", "2")):
        given = [
            "--model",
            str(checkpoint),
            "--data",
            "prompts.json",
            "--images",
            "images",
            "--reward-model",
            ".",
            "--lr",
            "0.01",
            "--batch-size",
            "2",
            *samples,
            "--max-new-tokens",
            "3",
            "--lora-rank",
            "2",
            "--out",
            out,
            *facts,
            *flags,
        ]
        monkeypatch.setattr(sys, "argv", ["ppo.py", *given])
        ppo.main()
        return tmp_path / out

    return run


def test_an_iteration_decodes_each_image_once(command, monkeypatch):
    """It reads each six times: to sample, score, take log pi_ref and values, and in two passes."""
    seen, opened = [], data.open_image
    monkeypatch.setattr(data, "open_image", lambda image: seen.append(image) or opened(image))
    command("a", "--steps", "2", "--batch-size", "4")
    assert len(seen) == len(set(seen)) == 8


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_run_and_resume(command, monkeypatch, advantage):
    flags = ("--steps", "3", "--save-every", "1", "--advantage", advantage)
    out = command("a", *flags)
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    for name in (
        "objective/kl",
        "objective/entropy",
        "objective/scores",
        "policy/approxkl",
        "policy/clipfrac",
        "response_length",
        "scores/reward_model",
        "scores/correctness",
        "scores/length",
        "scores/unfinished",
        "seconds/sample",
        "seconds/score",
        "seconds/train",
    ):
        assert name in lines[0], name
    assert ("val/loss" in lines[0]) == (advantage == "gae") and abs(lines[0]["objective/kl"]) < 1e-4
    save = training.save_checkpoint
    monkeypatch.setattr(
        training,
        "save_checkpoint",
        lambda out, step, *a: save(out, step, *a) or (step == 2 and 1 / 0),
    )
    with pytest.raises(ZeroDivisionError):
        command("b", *flags)
    monkeypatch.setattr(training, "save_checkpoint", save)
    again = command("b", *flags, "--resume")
    names = ("adapter/adapter_model.safetensors", "checkpoints/step-000003/state.safetensors")
    assert all((again / name).read_bytes() == (out / name).read_bytes() for name in names)
    state = set(load_file(out / names[1]))
    assert ("model.heads.value.weight" in state) == (advantage == "gae") and not any(
        "reward" in n for n in state
    )


def test_the_oracle_rewards(command, monkeypatch):
    """The toy world's truth in the place of a reward model: its scores are the term, the value network starts afresh."""
    shown = []
    score = lambda records, answers: (
        shown.append((records, answers)) or [[0.5] * len(texts) for texts in answers]
    )
    monkeypatch.setattr(judge, "oracle", lambda: score)
    out = command("o", "--reward-model", "oracle", "--steps", "1", "--length-weight", "0", facts=())
    line = json.loads((out / "metrics.jsonl").read_text())
    assert line["scores/reward_model"] == 0.5 and "val/loss" in line
    assert len(shown[0][0]) == 8, "what it does not know is refused at the start"
    records, answers = shown[1]
    assert [r.turns for r in records] == [("Is there a dog?",)] * len(answers) and all(
        len(texts) == 2 for texts in answers
    )


def test_files_of_one_name_keep_their_answers(command, monkeypatch, tmp_path, capsys):
    """a/train.json and b/train.json have rows of the same name; of equal prompts the first counts."""
    files = {
        "a": [("Is there a dog?", "No"), ("Is there a cup?", "Yes")],
        "b": [("Is there a dog?", "Yes")],
    }
    for folder, rows in files.items():
        (tmp_path / folder).mkdir()
        rows = [{"id": "0", "conversations": conversation(*row)} for row in rows]
        (tmp_path / folder / "train.json").write_text(json.dumps(rows))
    drawn = []
    score = lambda records, answers: drawn.append(records) or [[0.5] * len(a) for a in answers]
    monkeypatch.setattr(judge, "oracle", lambda: score)
    flags = ("--data", "a/train.json", "--data", "b/train.json", "--reward-model", "oracle")
    command("out", *flags, "--steps", "1", facts=())
    text_only = [(r.turns[0], r.answers) for r in drawn[0] if r.image is None]
    assert text_only == [("Is there a dog?", ("No",)), ("Is there a cup?", ("Yes",))]
    assert len(drawn[0]) == 8 + 2 and "1 rows repeat another row" in capsys.readouterr().err


def test_what_the_loop_hands_on(command, monkeypatch):
    """From phase to phase, when the policy has left its reference (step 1)."""
    seen = {name: [] for name in ("kl_of", "with_advantages", "update")}

    def spy(name):
        function = getattr(ppo, name)

        def watched(*given):
            found = function(*given)
            seen[name].append((given, found))
            return found

        monkeypatch.setattr(ppo, name, watched)

    for name in seen:
        spy(name)
    out = command("a", "--steps", "2", "--lr", "0.1", "--kl", "k3", "--length-weight", "-1")
    line = [json.loads(line) for line in open(out / "metrics.jsonl")][1]
    (log_probs, reference, kind), kl = seen["kl_of"][1]
    assert kind == "k3" and (log_probs - reference).abs().max() > 1e-3
    (rollout, scores, given_kl, _), advanced = seen["with_advantages"][1]
    assert torch.equal(given_kl, kl)
    assert torch.equal(rollout.log_probs, log_probs) and torch.equal(rollout.reference, reference)
    terms = ("reward_model", "correctness", "length", "unfinished")
    assert len(scores) == 8 and line["scores/length"] < 0 and line["scores/reward_model"] != 0
    assert float(scores.mean()) == pytest.approx(sum(line[f"scores/{n}"] for n in terms), abs=1e-5)
    assert line["objective/scores"] == pytest.approx(float(scores.mean()))
    of_all = float((log_probs - reference).sum())
    assert line["objective/kl"] == pytest.approx(of_all / len(scores))
    (_, _, _, factor, updated, _, step), metrics = seen["update"][1]
    assert updated is advanced and step == 1 and line["lr"] == pytest.approx(0.1 * factor)
    assert metrics.items() <= line.items()


def test_each_prompt_once_an_epoch(command, monkeypatch):
    """Iterations take the prompts of a shuffled epoch one after another, however they are cut."""
    drawn = []
    monkeypatch.setattr(
        judge,
        "oracle",
        lambda: (
            lambda records, answers: (
                drawn.append([r.image.name for r in records]) or [[0.5] * len(a) for a in answers]
            )
        ),
    )
    every = sorted(f"{i}.png" for i in range(8))
    found = {}
    for out, batch, accum, minibatches, epochs in (
        ("a", 2, 1, 2, 2),
        ("b", 1, 2, 2, 1),
        ("c", 1, 1, 4, 1),
        ("d", 2, 1, 1, 1),
    ):
        drawn.clear()
        flags = (f"--batch-size={batch}", f"--grad-accum={accum}", f"--minibatches={minibatches}",
                 f"--epochs={epochs}", "--passes=1", "--reward-model=oracle")  # fmt: skip
        command(out, *flags, facts=())
        assert drawn.pop(0) == every  # looked at before the run
        size = batch * accum * minibatches
        assert [len(names) for names in drawn] == [size] * (8 * epochs // size)
        found[out] = sum(drawn, [])
    first, second = found["a"][:8], found["a"][8:]
    assert sorted(first) == sorted(second) == every and first != second and first != every
    assert all(found[out] == first for out in "bcd")


def test_each_iteration_draws_anew(command, monkeypatch, tmp_path):
    """The same prompt asked again and again by a policy that stays has other answers each time."""
    rows = json.loads((tmp_path / "prompts.json").read_text())
    (tmp_path / "prompts.json").write_text(json.dumps(rows[:1]))
    drawn = []
    score = lambda _, answers: drawn.append(tuple(answers[0])) or [[0.5] * 2 for _ in answers]
    monkeypatch.setattr(judge, "oracle", lambda: score)
    flags = ("--batch-size=1", "--minibatches=1", "--steps=5", "--passes=1", "--lr=0")
    command("a", "--reward-model=oracle", *flags, facts=())
    assert len(drawn) == 6 and len(set(drawn[1:])) == 5  # the first: a look before the run


def test_where_the_networks_start(command, checkpoint, monkeypatch):
    """Policy: the base. Value network: the reward model, its head at 0; beside the oracle the base. The reward model stays."""

    def after_nothing(out, *flags, **more):
        command(out, "--steps", "1", "--lr", "0", "--save-every", "1", *flags, **more)
        return load_file(f"{out}/checkpoints/step-000001/state.safetensors")

    state = after_nothing("a")
    model, _ = checkpoints.load(checkpoint)
    model.prepare(2, projector=False)
    adapters.load_reward(model, ".")
    reward = {
        f"model.{n}".replace("adapters.reward", "adapters.value"): p
        for n, p in model.named_parameters()
        if "adapters.reward" in n
    }
    assert reward and all(torch.equal(state[n], p) for n, p in reward.items())
    assert any(p.abs().max() > 0 for n, p in reward.items() if "lora_B" in n)

    monkeypatch.setattr(judge, "oracle", lambda: lambda records, texts: [[0.5] * 2 for _ in texts])
    fresh = after_nothing("b", "--reward-model", "oracle", facts=())
    assert fresh.keys() == state.keys()
    for found in (state, fresh):
        heads = [n for n in found if n.startswith("model.heads")]
        assert sorted(heads) == ["model.heads.value.bias", "model.heads.value.weight"]
        assert all(not found[n].any() for n in heads)
        assert all(
            not p.any() for n, p in found.items() if "model.llm" in n and "policy.lora_B" in n
        )
    assert all(not p.any() for n, p in fresh.items() if "model.llm" in n and "value.lora_B" in n)
    trained = [n for n in state if "model.llm" in n]
    assert len(trained) == 2 * len(reward) and all("policy" in n or "value" in n for n in trained)


def test_learning_rates_of_a_run(command):
    """Five iterations of warm-up times a cosine over all of them."""
    out = command("a", "--steps", "6", "--passes", "1", "--lr", "0.01")
    rates = [json.loads(line)["lr"] for line in open(out / "metrics.jsonl")]
    cosine = [1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]
    ramp = [0.2, 0.4, 0.6, 0.8, 1, 1]
    assert rates == pytest.approx([0.01 * a * b for a, b in zip(ramp, cosine)])
    flags = ("--steps", "6", "--passes", "1", "--lr", "0.01", "--schedule", "constant")
    rates = [json.loads(line)["lr"] for line in open(command("b", *flags) / "metrics.jsonl")]
    assert rates == pytest.approx([0.01 * a for a in ramp])


def test_refusals(command):
    with pytest.raises(BadInput, match="trained with facts; --facts FILE is needed"):
        command("a", "--steps", "1", facts=())
    with pytest.raises(BadInput, match="--samples is 1; 2 or more with rloo"):
        command("b", "--advantage", "rloo", "--samples", "1")
    with pytest.raises(
        BadInput, match="--facts is for a reward model that reads them; --reward-model is oracle"
    ):
        command("e", "--reward-model", "oracle")
    with pytest.raises(BadInput, match="leaves no room for --max-new-tokens 500"):
        command("c", "--max-new-tokens", "500")
    with pytest.raises(BadInput, match="--samples: '0' was given; a whole number, 1 or more"):
        command("d", "--samples", "0")
    with pytest.raises(BadInput, match="--lam: '1.5' was given; a number, 0 to 1"):
        command("d", "--lam", "1.5")


def test_how_many_samples_a_run_takes(command, monkeypatch, tmp_path):
    """1, or 4 with rloo; in the toy world 2, or 4; a number that was given counts."""

    def samples(out, *flags, toy=False):
        def fill(args, toy_settings):
            assert "samples" not in toy_settings
            args.toy_world = str(tmp_path) if toy else None

        monkeypatch.setattr(ppo.toy, "fill", fill)
        monkeypatch.setattr(ppo, "draw_rollout", lambda *_: 1 / 0)  # here the run may end
        with pytest.raises(ZeroDivisionError):
            command(out, "--steps", "1", "--no-eval", *flags, samples=())
        return json.loads((tmp_path / out / "args.json").read_text())["flags"]["samples"]

    assert samples("a") == 1 and samples("b", "--advantage", "rloo") == 4
    assert samples("c", toy=True) == 2 and samples("d", "--advantage", "rloo", toy=True) == 4
    assert samples("e", "--advantage", "rloo", "--samples", "3", toy=True) == 3
