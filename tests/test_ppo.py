"""ppo.py: rewards, advantages and losses against plain loops; an iteration that moves nothing, one that learns; the script."""

import json
import math
import random
import sys
from collections import defaultdict
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import checkpoints
import data
import judge
import ppo
import reward_model
import training
from data import Record
from model import BadInput, Samples

CHOICE = "Which object is in the image?\nA. cup\nB. dog\nAnswer with the option's letter."


def settings(**changed):
    """The flags that an iteration looks at."""
    flags = dict(
        seed=0,
        batch_size=4,
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
        model.add_adapter("value", 4)
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
    return lambda answered, *_: {
        "hit": torch.tensor([float(a[0] == token) for e in answered for a in e.answers])
    }


# ---- rewards


@pytest.mark.parametrize(
    "prompt, gold, text, want",
    [
        (CHOICE, "B", "B. dog", 1),
        (CHOICE, "B. dog", "B", 1),
        (CHOICE, "(B)", "I think the correct option is B.", 1),
        (CHOICE, "B", "A. cup", 0),
        (CHOICE, "B", "But why", 0),
        (CHOICE, "B", "", 0),
        ("Is there a dog?", "No", "No, there is none.", 0.5),
        ("Is there a dog?", "No, there is no dog.", "Yes", -0.5),
        ("Is there a dog?", "No", "Nothing there", 0),
        ("Is there a dog?", "Yes", "Yes", 0),
        ("Is there a dog?", "None of them", "No", 0),
        ("Describe.", "A red cup.", "No", 0),
        ("Describe.", None, "No", 0),
    ],
)
def test_correctness(prompt, gold, text, want):
    assert (
        ppo.correctness(Record("f, row 0", None, (prompt,), () if gold is None else (gold,)), text)
        == want
    )


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
    metrics = ppo.iterate(model, processor, some, first_token_is(5), optimizer, 1.0, args, 0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert metrics["policy/approxkl"] < 1e-10 and metrics["policy/clipfrac"] == 0
    generator = torch.Generator().manual_seed(random.Random("0/0").getrandbits(62))
    drawn = [
        model.sample(
            [e.prompt for e in part], None, 3, 4, 1.0, processor.stop_ids, generator=generator
        )
        for part in (some[:4], some[4:])
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
    scored = [data.replace(e, answers=group, scored=ones(group)) for e, group in zip(some, groups)]
    again, _ = log_probs(processor.collate(scored))
    assert (again - old).abs().max() < 1e-5


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_bandit(llava, advantage):
    """Which first token pays is learned from the reward alone."""
    model, processor, optimizer = actor(llava, 0.01, advantage == "gae")
    some = prompts(processor)
    batch = processor.collate(
        [
            data.replace(
                some[0], answers=[torch.tensor([5])], scored=[torch.ones(1, dtype=torch.bool)]
            )
        ]
    )
    h = model.hidden(batch)[0, batch.index[0]]
    p = (h @ model.llm.get_output_embeddings().weight.t()).softmax(-1)
    target = int(p.argsort(descending=True)[3])
    args = settings(samples=8, passes=2, max_new_tokens=2, kl_coef=0.0, advantage=advantage)
    seen = [
        ppo.iterate(model, processor, some, first_token_is(target), optimizer, 1.0, args, i)[
            "objective/scores"
        ]
        for i in range(20)
    ]
    assert seen[0] < 0.4 and sum(seen[-5:]) / 5 > 0.9, seen


def test_value_network_learns_the_return(llava):
    """With a policy that hardly moves, V comes near the constant reward (the head alone trains)."""
    model, processor, optimizer = actor(llava, 0.002)
    optimizer.param_groups[0]["base_lr"] = 0.0
    constant = lambda answered, *_: {"one": torch.ones(sum(len(e.answers) for e in answered))}
    args = settings(kl_coef=0.0, value_weight=1.0, passes=4, clip=1.0)
    losses = [
        ppo.iterate(model, processor, prompts(processor), constant, optimizer, 1.0, args, i)[
            "val/loss"
        ]
        for i in range(12)
    ]
    assert losses[0] > 0.1 and losses[-1] < 0.2 * losses[0], losses


def test_endless_empty_and_equal_answers(llava):
    """Nothing but end tokens, no end token at all, all rewards equal: finite numbers, no step into nowhere."""
    model, processor, optimizer = actor(llava, 1e-3)
    zero = lambda answered, *_: {"zero": torch.zeros(sum(len(e.answers) for e in answered))}
    args = settings(max_new_tokens=1, kl_coef=0.0)
    metrics = ppo.iterate(model, processor, prompts(processor), zero, optimizer, 1.0, args, 0)
    assert metrics["response_length"] == 1 and all(math.isfinite(v) for v in metrics.values())
    for ids, finished in (([5, 6, 7, 8], False), ([processor.end_id], True)):
        tokens, log_probs = torch.tensor(ids), torch.full((len(ids),), -4.0)
        model.sample = lambda rows, *_, **__: Samples(
            [[tokens] * 2] * len(rows), [[log_probs] * 2] * len(rows), [[finished] * 2] * len(rows)
        )
        metrics = ppo.iterate(
            model, processor, prompts(processor), zero, optimizer, 1.0, settings(kl_coef=0.0), 0
        )
        assert metrics["finished"] == finished and all(math.isfinite(v) for v in metrics.values())


def test_terms_of_the_reward(llava):
    """Right letters, length, cut-off answers; the facts reach the reward model and no policy's prompt."""
    model, processor, _ = actor(llava, 1e-3, value=False)
    model.add_adapter("reward", 2)
    model.add_head("reward")
    record = Record("f.json, row 0", None, (CHOICE,), ("B",))
    example = processor.encode(data.replace(record, answers=("B", "A. cup")))
    scorer = ppo.Scorer(
        model,
        processor,
        {
            "question": "Rate.{facts}",
            "facts": " See:",
            "max_facts": None,
            "held_out": {
                "a": {"n": 2, "mean": 1.0, "std": 2.0},
                "b": {"n": 2, "mean": 3.0, "std": 0.0},
            },
        },
        {record.asked: ["A dog."]},
        settings(max_new_tokens=10),
    )
    assert scorer.mean == 2 and scorer.std == pytest.approx(math.sqrt((4 + 1 + 9) / 2 - 4))
    answered = data.replace(example, record=record)
    with torch.no_grad():
        terms = scorer([answered], [True, False], 0)
        assert terms["correctness"].tolist() == [2, 0] and terms["unfinished"].tolist() == [0, -8]
        assert terms["length"].tolist() == pytest.approx([-len(a) for a in example.answers])
        score = scorer.reward([answered], None, 0)
        assert (
            torch.allclose(terms["reward_model"], (score - 2) / scorer.std)
            and score.unique().numel() == 2
        )
    read = processor.tokenizer.decode(scorer.rated(answered, random.Random(0)).answers[0])
    assert "Rate. See:\n- A dog." in read and "A dog." not in processor.tokenizer.decode(
        answered.prompt
    )


def test_scores_that_never_differ(llava):
    """Rounding may put E[x^2] - E[x]^2 below 0."""
    held = {"a": {"n": 3, "mean": 0.1, "std": 0.0}, "b": {"n": 4, "mean": 0.1, "std": 0.0}}
    for mean in torch.rand(300).tolist():
        for f in held.values():
            f["mean"] = round(mean, 4)
        assert 0 < ppo.Scorer(None, None, {"held_out": held}, {}, None).std < 1e-5


def test_files_of_one_name_keep_their_answers(llava, capsys):
    """Rows of a/train.json and b/train.json have the same `where`; of rows that ask the same the first counts, and it is told."""
    _, processor, _ = actor(llava, 1e-3, value=False)
    ask = lambda question, gold: Record("train.json, row 0", None, (question,), (gold,))
    records = [
        ask("Is there a dog?", "No"),
        ask("Is there a cup?", "Yes"),
        ask("Is there a dog?", "Yes"),
    ]
    found = ppo.prompts_of(processor, records, settings(max_new_tokens=4), None)
    assert [(e.record.turns[0][-4:], e.record.answers) for e in found] == [
        ("dog?", ("No",)),
        ("cup?", ("Yes",)),
    ]
    assert "1 rows repeat picture and prompt" in capsys.readouterr().err


# ---- the script


@pytest.fixture
def command(checkpoint, tmp_path, monkeypatch):
    """A function that runs ppo.py with a reward model of random weights -> the run folder."""
    rows = []
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.effect_noise((28, 28), 80).convert("RGB").save(tmp_path / "images" / f"{i}.png")
        said = [
            {"from": "human", "value": "<image>\nIs there a dog?"},
            {"from": "gpt", "value": "No"},
        ]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": said})
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    (tmp_path / "facts.json").write_text(json.dumps({f"{i}.png": ["A cup."] for i in range(8)}))
    model, _ = checkpoints.load(checkpoint)
    model.prepare(llm=False, projector=False)
    torch.manual_seed(0)
    model.add_adapter("reward", 2)
    model.add_head("reward")
    held = {"f": {"n": 1, "mean": 0.0, "std": 1.0}}
    told = {
        "question": reward_model.QUESTION,
        "facts": reward_model.FACTS,
        "max_facts": 1,
        "template": "vicuna_v1",
        "image_aspect": "pad",
        "held_out": held,
    }
    checkpoints.save_reward(model, tmp_path, checkpoint, told)
    monkeypatch.chdir(tmp_path)

    def run(out, *flags, facts=("--facts", "facts.json")):
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
            "--samples",
            "2",
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
