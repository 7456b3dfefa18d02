"""Long work that processes divide: two give what one gives, each decodes its own images ahead, progress counts its own."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import common
import dpo
import grouping
import mdpo
import mpo
import ppo
import processes
import reward_model
import sampling
from data import Record
from lora import add_adapter

TEXTS = ("A red cup is on the table.", "No", "Two bananas", "A bowl is on the left.", "Yes, a dog.")
ARGS = SimpleNamespace(
    batch_size=2, sample_batch_size=2, samples=2, max_new_tokens=4, temperature=1.0, seed=3,
    advantage="gae", max_facts=None, facts_first=False,
)  # fmt: skip


@pytest.fixture
def player(llava, tmp_path):
    """(model, processor, five Examples with an image of their own and two answers)."""
    model, processor = llava
    model.prepare(2, projector=False)
    for name in ("reward", "value"):
        add_adapter(model.llm, name, 2)
        model.add_head(name)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    examples = []
    for i, text in enumerate(TEXTS):
        path = tmp_path / f"{i}.png"
        Image.effect_noise((28, 28), 20 * i + 20).convert("RGB").save(path)
        asked = ("Describe the image." * (i + 1),)  # of five lengths
        examples.append(processor.encode(Record(f"p.json, row {i}", path, asked, (text, "None"))))
    return model, processor, examples


def reference(script, answers=2):
    """log pi_ref, which is kept in a folder: each call gets an empty one."""

    def work(model, processor, examples):
        three = [replace(e, answers=e.answers + e.answers[:1], scored=e.scored + e.scored[:1])
                 for e in examples]  # fmt: skip
        return script.reference_log_probs(
            model, processor, three if answers == 3 else examples, ARGS.batch_size
        )

    return work


def texts(model, processor, examples):
    return sampling.generate(
        model, processor, [e.record for e in examples], 4, batch_size=2, label="Texts", split=True
    )


def old_log_probs(model, processor, examples):
    groups = [grouping.Group(i, e.answers, [True, True], []) for i, e in enumerate(examples)]
    grouping.scored_again(model, processor, groups, examples, ARGS)
    return [group.old for group in groups]


def rollout(model, processor, examples):
    """Drawn answers, as a rollout of the whole."""
    drawn = ppo.draw_rollout(model, processor, examples, ARGS, 0)
    return [[e.answers for e in drawn.examples], drawn.finished, drawn.log_probs]


def scored_rollout(model, processor, examples):
    given = ppo.Rollout(examples, [[True, True]] * len(examples), None)
    found = ppo.with_reference_and_values(model, processor, given, ARGS)
    return [found.reference, found.values]


def rewards(model, processor, examples):
    told = {"question": "Rate.", "facts": "", "max_facts": None}
    told["held_out"] = {"a": {"n": 2, "mean": 0.5, "std": 2.0}}
    facts = {e.record.prompt_key: [] for e in examples}
    return ppo.Reward(model, processor, told, facts, ARGS).by_reward_model(examples, 0)


def held_out(model, processor, examples):
    facts = {e.record.prompt_key: [] for e in examples}
    held = {"a": examples[:3], "b": examples[3:]}
    return reward_model.evaluate(model, processor, held, facts, ARGS, "Held-out pairs")


WORK = {  # name: (what is divided, label of its progress, sizes of the batches of one process)
    "dpo": (reference(dpo), "reference", [2, 2, 1]),
    "mpo": (reference(mpo), "reference", [2, 2, 1]),
    "mdpo": (reference(mdpo, 3), "reference", [2, 2, 1]),
    "generate": (texts, "Texts", [2, 2, 1]),
    "grpo": (old_log_probs, None, [2, 2, 1]),
    "draw": (rollout, None, None),
    "score": (scored_rollout, None, [2, 2, 1]),
    "reward": (rewards, None, [2, 2, 1]),
    "evaluate": (held_out, "Held-out pairs", [2, 1, 2]),
}


class Watched:
    """What work() asked for: images decoded ahead; labels, totals and counts of its progress."""

    def __init__(self, monkeypatch, processor, work):
        self.ahead, self.bars, self.counts = [], [], []
        with monkeypatch.context() as patch:
            patch.setattr(processor.prefetch, "expect", self.ahead.extend)
            begin = lambda bar, label, total, done=0: self.bars.append((label, total, done))
            patch.setattr(common.Progress, "__init__", begin)
            patch.setattr(common.Progress, "__call__", lambda bar, n, *_: self.counts.append(n))
            self.result = work()


def flat(result):
    """All tensors and values in nested lists and dicts, in order."""
    if isinstance(result, dict):
        result = list(result.items())
    if not isinstance(result, (list, tuple)):
        return [result]
    return [x for part in result for x in flat(part)]


def same(found, want):
    """Equal values, and tensors up to rounding."""
    found, want = flat(found), flat(want)
    assert len(found) == len(want)
    for a, b in zip(found, want):
        torch.testing.assert_close(a, b) if torch.is_tensor(a) else None
        assert torch.is_tensor(a) or a == b


def running(of):
    """1 2 2 -> 1 3 5."""
    return [sum(of[: i + 1]) for i in range(len(of))]


@pytest.mark.parametrize("name", WORK)
def test_what_processes_divide(player, tmp_path, monkeypatch, name):
    """Alone, and as the first and the second of two, which take every other batch and then have all."""
    model, processor, examples = player
    work, label, sizes = WORK[name]
    batches = []  # what was made of each, in the order of the calls

    def watched(folder, joined):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        monkeypatch.setattr(processes, "from_first", lambda value: value)
        monkeypatch.setattr(processes, "joined", joined)
        tensor = lambda parts, device: torch.cat(all_of) if (all_of := joined(parts)) else None
        monkeypatch.setattr(processes, "joined_tensor", tensor)
        return Watched(monkeypatch, processor, lambda: work(model, processor, examples))

    whole = watched("alone", lambda mine: batches.append(mine) or mine)
    images = [e.record.image for e in examples]
    assert sorted(whole.ahead) == (images if sizes else [])
    assert whole.bars == ([(label, 5, 0)] if label else [])
    assert whole.counts == (running(sizes) if label else [])

    monkeypatch.setattr(processes, "total", 2)
    ahead = []
    for number in (0, 1):
        monkeypatch.setattr(processes, "number", number)
        left = iter(batches)

        def joined(mine):
            every = next(left)
            same(mine, every[number::2])
            return every

        one = watched(str(number), joined)
        assert not list(left)
        same(one.result, whole.result)
        ahead.append(one.ahead)
        assert one.bars == ([(label, len(one.ahead), 0)] if label else [])
        assert one.counts[-1:] == ([len(one.ahead)] if label else [])
    assert sorted(sum(ahead, [])) == (images if sizes else [])
    assert not sizes or len(ahead[0]) > len(ahead[1]) > 0


def test_a_label_is_said(llava, capsys):
    """By default it says what is done; none, and nothing is said."""
    model, processor = llava
    record = Record("p.json, row 0", None, ("What is it?",))
    sampling.generate(model, processor, [record], 2)
    assert capsys.readouterr().err.startswith("generate 1/1 ")
    sampling.generate(model, processor, [record], 2, label="")
    assert not capsys.readouterr().err


def test_generated_texts_have_the_order_of_the_records(player):
    """Whatever the length of their prompts and the size of the batches; k of each, drawn by the seed."""
    model, processor, examples = player
    records = [e.record for e in random.Random(1).sample(examples, 5)]
    want = [sampling.generate(model, processor, [r], 6)[0] for r in records]
    assert sampling.generate(model, processor, records, 6, batch_size=2) == want
    draw = lambda **how: sampling.generate(
        model, processor, records, 6, temperature=1.0, **{"k": 3} | how
    )
    assert [len(row) for row in draw()] == [3] * 5
    assert draw() == draw(seed=0) != draw(seed=1)


def test_each_process_may_generate_alone(player, monkeypatch):
    """Without `split` nothing is divided, and no other process is asked."""
    model, processor, examples = player
    records = [e.record for e in examples]
    want = sampling.generate(model, processor, records, 4, batch_size=2)
    monkeypatch.setattr(processes, "total", 2)
    monkeypatch.setattr(processes, "number", 1)
    monkeypatch.setattr(processes, "gathered", lambda _: pytest.fail("asked"))
    assert sampling.generate(model, processor, records, 4, batch_size=2) == want
