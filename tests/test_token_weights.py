"""token_weights.py: corrected segments by hand and by another version of the rule; a run."""

import math
import random
import sys
from difflib import SequenceMatcher

import pytest
import torch
from conftest import read_records
from test_processes import DRIVER, ROOT, launch
from test_training import PAIRS, lines_of, train, write_pairs  # noqa: F401

import dpo
from common import BadInput
from data import Example
from formats import checkpoints
from token_weights import corrected, weigh

MARKED = [  # chosen, rejected, marked in chosen, marked in rejected; 2 ends an answer
    ([7, 8, 9, 20, 4, 5, 6, 2], [7, 8, 9, 30, 31, 4, 5, 6, 2], [3], [3, 4]),
    # 4 5 alone is too short to be unchanged; the first 7 belongs to the prompt's run
    ([7, 20, 4, 5, 21, 8, 9, 2], [7, 30, 4, 5, 31, 8, 9, 2], [1, 2, 3, 4], [1, 2, 3, 4]),
    # words that were only added; the run after them has three tokens
    ([7, 8, 9, 4, 5, 2], [7, 8, 9, 30, 31, 4, 5, 2], [], []),
    # the end token alone is too short: it is part of the last segment
    ([7, 8, 20, 2], [7, 8, 30, 31, 2], [2, 3], [2, 3, 4]),
    ([20, 2], [30, 31, 2], [0, 1], [0, 1, 2]),
    # a longer end is only added: nothing is opposite to it
    ([7, 8, 9], [7, 8, 9, 30, 2], [], []),
]


@pytest.mark.parametrize("chosen, rejected, in_chosen, in_rejected", MARKED)
def test_segments_by_hand(chosen, rejected, in_chosen, in_rejected):
    marks = corrected(chosen, rejected)
    assert [len(m) for m in marks] == [len(chosen), len(rejected)]
    assert [m.nonzero()[:, 0].tolist() for m in marks] == [in_chosen, in_rejected]


def marked(prompt, chosen, rejected):
    """The same rule by difflib's opcodes, on whole rows with their prompt."""
    a, b = prompt + rejected, prompt + chosen
    same = [o[1:] for o in SequenceMatcher(None, a, b, autojunk=False).get_opcodes()]
    same = [o for o in same if a[o[0] : o[1]] == b[o[2] : o[3]] and o[1] - o[0] >= 3]
    bounds = [(0, 0, 0, 0), *same, (len(a), len(a), len(b), len(b))]
    gaps = [(x[1], y[0], x[3], y[2]) for x, y in zip(bounds, bounds[1:])]
    gaps = [g for g in gaps if g[0] < g[1] and g[2] < g[3]]
    P = len(prompt)
    return [{n - P for g in gaps for n in range(g[i], g[i + 1])} for i in (2, 0)]


def test_segments_are_those_of_whole_rows():
    """Random answers that differ in words, with some left out, behind a prompt of 50 tokens."""
    rng, seen = random.Random(0), 0
    for _ in range(300):
        words = [rng.randrange(3, rng.choice([6, 40])) for _ in range(rng.randrange(1, 30))]
        other = [w if rng.random() < 0.8 else rng.randrange(3, 40) for w in words]
        cut = rng.randrange(len(other))
        other = other[:cut] + other[cut + rng.randrange(3) :]
        chosen, rejected = [*words, 2], [*other, 2]
        found = [set(m.nonzero()[:, 0].tolist()) for m in corrected(chosen, rejected)]
        assert found == marked(list(range(100, 150)), chosen, rejected)
        seen += 0 < len(found[0]) < len(chosen)
    assert seen > 100


def pair(chosen, rejected):
    """An Example of two answers."""
    answers = [torch.tensor(chosen), torch.tensor(rejected)]
    scored = [torch.ones(len(a), dtype=torch.bool) for a in answers]
    return Example(torch.tensor([1]), answers, scored, None)


def test_weights_by_hand(capsys):
    """5 on corrected tokens; means; and both: 5 and 1 divided by |unchanged| + 5 |corrected|."""
    two = [pair(*MARKED[0][:2])]
    (chosen, rejected) = weigh(two, 5.0)[0].weights
    assert chosen.tolist() == [1, 1, 1, 5, 1, 1, 1, 1]
    assert rejected.tolist() == [1, 1, 1, 5, 5, 1, 1, 1, 1]
    assert "18% of the answers' tokens" in capsys.readouterr().err  # 3 of 17
    (chosen, rejected) = weigh(two, average=True)[0].weights
    assert chosen.tolist() == [0.125] * 8 and rejected.tolist() == pytest.approx([1 / 9] * 9)
    (chosen, rejected) = weigh(two, 5.0, True)[0].weights
    assert chosen[[0, 3]].tolist() == pytest.approx([1 / 12, 5 / 12])
    assert rejected[[0, 3]].tolist() == pytest.approx([1 / 17, 5 / 17])
    assert weigh(two) is two and two[0].weights is None


@pytest.mark.parametrize("number, which", [(2, "no token"), (4, "every token")])
def test_a_weight_without_effect_is_refused(number, which):
    with pytest.raises(BadInput, match=f"--token-weight 5.0: {which} of the 2 pairs"):
        weigh([pair(*MARKED[number][:2])] * 2, 5.0)


@pytest.mark.parametrize("loss", ["ipo", "ipo_sum"])
@pytest.mark.parametrize("more", [["--token-weight", "5"], ["--average-log-prob"]])
def test_ipo_has_its_own_rule(monkeypatch, loss, more):
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--loss", loss, *more])
    with pytest.raises(BadInput, match=f"--loss {loss} says itself"):
        dpo.parse()
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--loss", "slic", *more])
    dpo.parse()


# ---- in a run: a LLaVA checkpoint, five pairs, the first step by hand in float64


FLAGS = {
    "sum": [],
    "weight": ["--token-weight", 5],
    "mean": ["--average-log-prob"],
    "both": ["--token-weight", 5, "--average-log-prob"],
}
EDITED = [  # answers that differ in parts
    ("A red cup is on the table of the kitchen.", "A red dog is on the table of the kitchen."),
    ("No, there is no dog.", "Yes, there is no dog in the image."),
    ("Two bananas and a bowl are there.", "Two bananas and a red cup are there."),
    ("A table.", "A red table, a cup and a bowl."),
    ("The kitchen is left of the table.", "The kitchen is left of the table, under a dog."),
]


@pytest.fixture
def edited(train, tmp_path):  # noqa: F811
    """`train` on pairs that differ in parts."""
    for name in ("povid.json", "images/a.png"):
        (tmp_path / name).unlink()
    (tmp_path / "images").rmdir()
    write_pairs(tmp_path, EDITED)
    return train


def by_hand(checkpoint, policy, flags, beta):
    """Means over all pairs of loss, margin and log pi, in float64 from whole logits."""
    weight, mean = 5 if "--token-weight" in flags else 1, "--average-log-prob" in flags
    model, processor = checkpoints.load(checkpoint)
    totals = []
    for example in map(processor.encode, read_records(["povid.json"], "images")):
        prompt = example.prompt.tolist()
        chosen, rejected = (a.tolist() for a in example.answers)
        segments = marked(prompt, chosen, rejected)
        rewards, logps = [], []
        for answer, segment in zip((chosen, rejected), segments):
            w = [weight if t in segment else 1 for t in range(len(answer))]
            scores = []
            for change in (policy, lambda model: None):  # pi, pi_ref
                copied = checkpoints.load(checkpoint)[0].double()
                change(copied)
                copied.dtype = torch.float64
                pixels = processor.pixels(example.record.image)[None].double()
                with torch.no_grad():
                    x = copied.embed(torch.tensor([prompt + answer]), pixels)
                    log_p = copied.llm(inputs_embeds=x).logits[0].log_softmax(-1)
                log_p = [log_p[len(prompt) - 1 + t, y].item() for t, y in enumerate(answer)]
                score = sum(a * b for a, b in zip(w, log_p))
                scores.append(score / sum(w) if mean else score)
            rewards.append(beta * (scores[0] - scores[1]))
            logps.append(scores[0])
        margin = rewards[0] - rewards[1]
        totals.append((math.log(1 + math.exp(-margin)), margin, *logps))
    return [sum(column) / len(totals) for column in zip(*totals)]


@pytest.mark.parametrize("name", FLAGS)
def test_a_run_by_hand(edited, checkpoint, name):
    """Step 0 is ln 2; step 1 has the projector that step 0 left, against the same reference."""
    flags = [*FLAGS[name], "--beta", 0.5, "--lr", 0, "--projector-lr", 1e-2, "--save-every", 1]
    out = edited(dpo, "run", *flags, "--steps", 2, "--batch-size", 5)
    lines = lines_of(out)
    state = next((out / "checkpoints").glob("step-000001"))

    def moved(model):
        from safetensors.torch import load_file

        saved = load_file(state / "state.safetensors")
        for n, p in model.projector.named_parameters():
            p.data.copy_(saved[f"model.projector.{n}"])

    keys = ("loss", "rewards/margins", "logps/chosen", "logps/rejected")
    for line, policy in zip(lines, (lambda model: None, moved)):
        want = by_hand(checkpoint, policy, flags, 0.5)
        assert [line[k] for k in keys] == pytest.approx(want, rel=1e-4, abs=2e-5)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(lines[1]["loss"] - math.log(2)) > 1e-3


def test_each_weighting_has_its_reference(edited, capsys):
    """Four entries of the cache; each is found again by a run of its kind alone."""
    for again in (False, True):
        for name, flags in FLAGS.items():
            edited(dpo, f"{name} {again}", *flags, "--steps", 1, "--lora-rank", 2)
            assert ("from the cache:" in capsys.readouterr().err) == again


@pytest.mark.parametrize("name", ["weight", "both"])
def test_one_micro_batch_or_three(edited, name):
    """Pairs of unequal lengths: the gradient is that of the mean over all pairs of the step."""
    norms = []
    for size, parts in ((5, 1), (2, 3)):
        flags = ["--batch-size", size, "--grad-accum", parts, "--epochs", 1, "--lora-rank", 2]
        out = edited(dpo, f"{size}", *FLAGS[name], *flags, "--beta", 0.5)
        norms.append(lines_of(out)[0]["grad_norm"])
    assert norms[0] > 0 and norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_two_processes(edited, tmp_path, checkpoint, capsys):
    """The steps of one process on the same global batch, and its cached reference."""
    flags = ["--epochs", 2, "--batch-size", 2, "--lora-rank", 4, "--lr", 1e-3, *FLAGS["both"]]
    flags += ["--beta", 5]
    one = lines_of(edited(dpo, "one", *flags, "--grad-accum", 2))
    where = ["--model", checkpoint, "--data", "povid.json", "--images", "images"]
    (tmp_path / "driver.py").write_text(DRIVER.format(root=str(ROOT)))
    done = launch(tmp_path, ["dpo", *where, *flags, "--grad-accum", 1, "--out", "two"])
    assert done.returncode == 0 and "from the cache:" in done.stderr, done.stderr
    two = lines_of(tmp_path / "two")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        for key in ("loss", "grad_norm", "logps/chosen", "rewards/margins"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6)


def test_a_long_answer_of_frequent_tokens():
    """One token of 250 differs: that one is marked, though all the others are the same frequent one."""
    chosen, rejected = [7] * 125 + [9] + [7] * 124, [7] * 125 + [8] + [7] * 124
    for marked in corrected(chosen, rejected):
        assert marked.nonzero().tolist() == [[125]]
