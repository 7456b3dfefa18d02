"""reward_model.py: the loss, what is read and where, held-out figures, and the files that ppo.py loads."""

import json
import math
import random
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import reward_model
import training
from common import BadInput
from data import Record
from facts import (
    evaluation_turn,
    facts_for,
    facts_of,
    longest_facts,
    with_evaluation,
)
from formats import adapters, checkpoints
from formats.layouts import captions
from lora import LoRALinear, add_adapter
from model import MLLM, pack

CAPTIONS = ["A red cup is on the table.", "Two bananas are in a bowl.", "There is no dog."]
AFTER = SimpleNamespace(max_facts=None, facts_first=False)
CHOICE = "Which object is in the image?\nA. cup\nB. dog\nAnswer with the option's letter."


def pairs(folder, n=6):
    """n records with a picture each (two pairs a picture), longer answers preferred."""
    (folder / "images").mkdir(exist_ok=True)
    rows = []
    for i in range(n):
        path = folder / "images" / f"{i // 2:012d}.jpg"
        Image.effect_noise((28, 28), 80).convert("RGB").save(path)
        rows.append(
            Record(
                f"pairs.json, row {i}",
                path,
                (f"Describe the image {i}.",),
                (f"A red cup is on table {i}.", "No"),
            )
        )
    return rows


def no_facts(examples):
    """Facts of these examples: none."""
    return {e.record.prompt_key: [] for e in examples}


def scores(model, processor, examples, facts=None, seed=0):
    """r(x, y+), r(x, y-) of these examples, (2, B)."""
    facts = facts or no_facts(examples)
    return reward_model.score(
        model,
        processor.collate(
            reward_model.with_turns(processor, examples, facts, random.Random(seed), AFTER)
        ),
    )


def ready(model, rank=4):
    """With a reward adapter and head that do something."""
    model.prepare(llm=False, projector=False)
    torch.manual_seed(3)
    add_adapter(model.llm, "reward", rank)
    model.add_head("reward")
    with torch.no_grad():
        for p in model.parameters_of("reward"):
            p.add_(torch.randn_like(p) * 0.1)
    return model


class Watch:
    """What reaches the model in a run: rows read, scores with the gradient that comes back, learning rates.

    trained, held: (where, evaluation turn) of each example read with and without gradients. scores: for each forward pass
    of training (chosen, rejected, their gradients), tensors. offset: what is added to the scores, chosen and rejected.
    """

    def __init__(self, monkeypatch, offset=(0.0, 0.0)):
        self.trained, self.held, self.scores, self.rates = [], [], [], []
        values, step = MLLM.values, torch.optim.AdamW.step

        def watched_reading(processor, example, turn):
            if torch.is_grad_enabled():
                self.trained.append((example.record.where, turn))
            else:
                self.held.append((example.record.where, turn))
            return with_evaluation(processor, example, turn)

        def watched_values(model, *given):
            found = values(model, *given)
            found = found + torch.tensor(offset).repeat(len(found) // 2)
            if torch.is_grad_enabled():
                here = [found.detach()[::2], found.detach()[1::2]]
                self.scores.append(here)
                found.register_hook(lambda g: here.extend((g[::2], g[1::2])))
            return found

        def watched_step(optimizer, *given, **more):
            self.rates.append([group["lr"] for group in optimizer.param_groups])
            return step(optimizer, *given, **more)

        monkeypatch.setattr(reward_model, "with_evaluation", watched_reading)
        monkeypatch.setattr(MLLM, "values", watched_values)
        monkeypatch.setattr(torch.optim.AdamW, "step", watched_step)


# ---- the loss


def test_loss_and_centring_by_hand():
    losses, centring = reward_model.reward_loss(
        torch.tensor([1.0, -0.5]), torch.tensor([0.25, 0.5]), 1e-3
    )
    want = [math.log(1 + math.exp(-0.75)), math.log(1 + math.exp(1.0))]
    assert losses.tolist() == pytest.approx(want, rel=1e-6)
    assert float(centring) == pytest.approx(1e-3 * (1.25 + 0.0) / 2, rel=1e-6)
    _, centring = reward_model.reward_loss(torch.tensor([-2.0, 0.5]), torch.tensor([0.0, 0.5]), 0.5)
    assert float(centring) == pytest.approx(0.25)  # |mean(-2, 1)| / 2


def test_loss_is_binary_cross_entropy_of_the_difference():
    r1, r0, choice = torch.randn(9), torch.randn(9), torch.randint(0, 2, (9,))
    want = torch.nn.functional.binary_cross_entropy_with_logits(
        r1 - r0, choice.float()
    )  # as the original writes it
    chosen, rejected = torch.where(choice == 1, r1, r0), torch.where(choice == 1, r0, r1)
    assert torch.allclose(reward_model.reward_loss(chosen, rejected, 0.0)[0].mean(), want)


def test_trl_says_the_same():
    """TRL's RewardTrainer on the same scores; its centring term is another one (squares), so without."""
    trl = pytest.importorskip("trl")
    chosen, rejected = torch.randn(6), torch.randn(6)
    theirs = mock.MagicMock(_metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0)
    theirs.model.training, theirs.args.center_rewards_coefficient = False, None
    theirs.accelerator.gather = theirs.accelerator.gather_for_metrics = lambda x: x
    network = lambda **inputs: mock.MagicMock(logits=torch.cat([chosen, rejected])[:, None])
    want = trl.RewardTrainer.compute_loss(theirs, network, {"attention_mask": torch.ones(12, 1)})
    losses, centring = reward_model.reward_loss(chosen, rejected, 0.0)
    torch.testing.assert_close(losses.mean(), want)
    assert centring == 0 and theirs._metrics["eval"]["accuracy"] == [
        pytest.approx((chosen > rejected).float().mean().item())
    ]


# ---- what is read, and where


def test_facts_stand_behind_the_answer_and_in_no_prompt(llava, tmp_path):
    _, processor = llava
    example = processor.encode(pairs(tmp_path, 2)[0])
    text = evaluation_turn(reward_model.QUESTION, reward_model.FACTS, CAPTIONS, random.Random(0))
    assert all(f"\n- {c}" in text for c in CAPTIONS)
    read = with_evaluation(processor, example, text)
    assert torch.equal(read.prompt, example.prompt)
    for long, short in zip(read.answers, example.answers):
        assert torch.equal(long[: len(short)], short)
        turn = processor.tokenizer.decode(long[len(short) :])
        assert (
            turn.startswith("USER: Rate")
            and turn.endswith("ASSISTANT:")
            and all(c in turn for c in CAPTIONS)
        )
    assert not any(c in processor.tokenizer.decode(example.prompt) for c in CAPTIONS)
    some = [evaluation_turn("{facts}", "", CAPTIONS, random.Random(i), most=1) for i in range(30)]
    assert {text.count("- ") for text in some} == {1} and len(set(some)) == len(CAPTIONS)
    assert evaluation_turn("{facts}", "", CAPTIONS, random.Random(0), most=9).count("- ") == len(
        CAPTIONS
    )
    length = lambda text: len(processor.tokenise(text))
    assert length("a a a") > length("a")
    assert longest_facts(processor, ["a", "a a a", "a a"], 2) == ["a a", "a a a"]
    assert len(longest_facts(processor, CAPTIONS)) == len(CAPTIONS)
    orders = {evaluation_turn("{facts}", "", CAPTIONS, random.Random(i)) for i in range(30)}
    assert len(orders) == 6, "captions are not shuffled"
    plain = evaluation_turn(reward_model.QUESTION, reward_model.FACTS, [], random.Random(0))
    assert "{facts}" not in plain and "-" not in plain and reward_model.FACTS not in plain


def test_facts_first_stand_in_the_prompt_and_behind_no_answer(llava, tmp_path):
    _, processor = llava
    record = pairs(tmp_path, 2)[0]
    example = processor.encode(record)
    first = SimpleNamespace(max_facts=None, facts_first=True)
    read = reward_model.as_read(processor, example, CAPTIONS[:1], random.Random(0), first)
    question = f"The picture shows:\n- {CAPTIONS[0]}\n{record.turns[0]}"
    assert torch.equal(read.prompt, processor.encode(replace(record, turns=(question,))).prompt)
    plain = reward_model.as_read(processor, example, [], random.Random(0), AFTER)
    assert all(torch.equal(a, b) for a, b in zip(read.answers, plain.answers))
    assert read.record is example.record, "its image and its place in messages"
    one = SimpleNamespace(max_facts=1, facts_first=True)
    some = [
        reward_model.as_read(processor, example, CAPTIONS, random.Random(i), one) for i in range(30)
    ]
    assert len({tuple(e.prompt.tolist()) for e in some}) == len(CAPTIONS)
    bare = reward_model.as_read(processor, example, [], random.Random(0), first)
    assert torch.equal(bare.prompt, example.prompt)


def test_cut_off_answer_is_closed_once(llava, tmp_path):
    _, processor = llava
    example = processor.encode(pairs(tmp_path, 2)[0])
    whole = example.answers[0]
    cut = replace(example, answers=[whole[:-1], whole, whole[:0]])
    first, second, empty = with_evaluation(processor, cut, "Rate it.").answers
    assert torch.equal(first, second) and int(empty[0]) == processor.end_id


def test_packed_scores_are_those_of_one_answer_alone(llava, tmp_path):
    model, processor = llava
    ready(model)
    examples = [processor.encode(r) for r in pairs(tmp_path, 4)]
    facts = {e.record.prompt_key: CAPTIONS[:1] for e in examples}
    turn = evaluation_turn(
        reward_model.QUESTION, reward_model.FACTS, CAPTIONS[:1], random.Random(0)
    )
    with torch.no_grad(), model.use("reward"):
        chosen, rejected = scores(model, processor, examples, facts)
        for i in range(4):
            read = with_evaluation(processor, examples[i], turn)
            for k, packed in enumerate((chosen, rejected)):
                ids = torch.cat([read.prompt, read.answers[k]])
                batch = pack([ids], [[]], pixel_values=processor.images([examples[i]])[0])
                alone = model.hidden_states(batch)[0, -1]
                want = model.heads["reward"].weight[0] @ alone + model.heads["reward"].bias[0]
                assert abs(float(packed[i] - want)) < 1e-5


def test_adapters_do_not_touch_each_other(llava, tmp_path):
    """Policy, reward and nothing over one base: `use` switches between them, errors and all."""
    model, processor = llava
    batch = processor.collate([processor.encode(r) for r in pairs(tmp_path, 2)])
    log_probs = lambda: model.log_probs(batch)[0].detach()
    base = log_probs()
    model.prepare(4, projector=False)
    for name in ("reward", "value"):
        add_adapter(model.llm, name, 2)
    assert torch.equal(log_probs(), base)
    found = {}
    for name in ("policy", "reward"):
        torch.nn.init.normal_(model.llm.model.layers[0].mlp.up_proj.adapters[name].lora_B)
        with model.use(name):
            found[name] = log_probs()
    assert torch.equal(log_probs(), found["policy"]) and not torch.allclose(
        found["policy"], found["reward"]
    )
    for switch in (model.use(None), model.reference(), model.use("value")):
        with switch:
            assert torch.equal(log_probs(), base)
    with pytest.raises(ZeroDivisionError), model.use("reward"):
        1 / 0
    assert torch.equal(log_probs(), found["policy"])
    with pytest.raises(BadInput, match="no adapter 'other'"), model.use("other"):
        pass
    with model.use("reward"):
        model.log_probs(batch)[0].sum().backward()
    grads = {
        n.split(".")[-2]
        for n, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert grads == {"reward"}


# ---- facts


def test_facts_of_names():
    known = {"000000000007.jpg": ["coco"], "aok_000000000007.jpg": ["why"], "x.png": ["x"]}
    of = lambda name, prompt="Describe.": facts_of(Record("f, row 0", name, (prompt,)), known)
    assert of("a/COCO_train2014_000000000007.jpg") == ["coco"] and of("000000000007.jpg") == [
        "coco"
    ]
    assert of("000000000007.jpg", CHOICE) == ["why"] and of("x.png", CHOICE) == ["x"]
    assert of("y.png") is None and of(None) == []


def test_missing_facts_are_refused_or_counted(tmp_path, capsys):
    records = pairs(tmp_path)
    file = tmp_path / "image_to_caption.json"
    file.write_text(json.dumps({f"{i:012d}.jpg": CAPTIONS for i in (0, 2)}))
    known = captions(file)
    with pytest.raises(BadInput, match=r"row 2: .*no caption of .*000000000001.jpg \(2 of 6 rows"):
        facts_for(records, known, "refuse")
    assert [len(f) for f in facts_for(records, known, "count")] == [3, 3, 0, 0, 3, 3]
    assert "2 of 6 rows are without facts" in capsys.readouterr().err


# ---- held-out figures


def test_no_picture_is_on_both_sides(tmp_path):
    records = pairs(tmp_path, 40)
    ((train, held),) = reward_model.held_out_split([records], 5, 0)
    assert sorted(train + held) == list(range(40)) and len(held) == 6  # whole pictures
    assert not {records[i].image for i in train} & {records[i].image for i in held}
    assert len(reward_model.held_out_split([records], 500, 0)[0][1]) == 8  # a fifth
    with pytest.raises(BadInput, match="too few"):
        reward_model.held_out_split([records[:2]], 1, 0)


def test_the_seed_decides_what_is_held_out(tmp_path):
    records = pairs(tmp_path, 40)
    held = lambda seed: reward_model.held_out_split([records], 5, seed)[0][1]
    assert held(0) == held(0) and len({tuple(held(seed)) for seed in range(4)}) > 1
    assert held(0) != list(range(6)) and held(0) != list(range(34, 40))
    text = [replace(r, image=None, turns=(f"Why? {i // 3}",)) for i, r in enumerate(records)]
    ((train, held),) = reward_model.held_out_split([text], 5, 0)  # without pictures by the question
    assert not {text[i].turns for i in train} & {text[i].turns for i in held} and len(held) == 6


def test_held_out_pictures_are_those_of_all_files(tmp_path):
    records = pairs(tmp_path, 60)  # two a picture
    files = one, other = records[:40], records[20:50]
    split = reward_model.held_out_split(files, 4, 0)
    pictures = [
        [{rows[i].image for i in places} for places in found] for rows, found in zip(files, split)
    ]
    trained, held = pictures[0][0] | pictures[1][0], pictures[0][1] | pictures[1][1]
    assert not trained & held and min(len(found) for _, found in split) >= 4
    assert all(len(train + held) == len(rows) for rows, (train, held) in zip(files, split))

    test = records[30:]
    places = reward_model.not_trained_on(
        test, [one[i] for i in split[0][0]] + [other[i] for i in split[1][0]]
    )
    assert {test[i].image for i in places} == {r.image for r in test} - trained and {
        r.image for r in records[50:]
    } < {test[i].image for i in places}
    with pytest.raises(BadInput, match="--test-data has only images that are trained on"):
        reward_model.not_trained_on(one[:2], one)


def test_figures_by_hand():
    chosen, rejected = torch.tensor([2.0, 0.0, 0.1, 1.0]), torch.tensor([0.0, 2.0, 0.0, 1.0])
    lengths = torch.tensor([[5, 1], [1, 5], [3, 3], [2, 4]])
    found = reward_model.figures(chosen, rejected, lengths)
    assert found["accuracy"] == 0.5 and found["n"] == 4
    sigma = lambda x: 1 / (1 + math.exp(-x))
    by_from = {row["from"]: row for row in found["calibration"]}
    assert by_from[0.5]["n"] == 2 and by_from[0.5]["observed"] == 0.5
    assert by_from[0.5]["predicted"] == pytest.approx((sigma(0.1) + 0.5) / 2, abs=1e-4)
    assert by_from[0.8]["n"] == 2 and by_from[0.8]["predicted"] == pytest.approx(sigma(2), abs=1e-4)
    assert sum(row["n"] for row in found["calibration"]) == 4
    assert found["longer_preferred"] == pytest.approx(1 / 3, abs=1e-4) and found[
        "longer_favoured"
    ] == pytest.approx(2 / 3, abs=1e-4)
    x, y = [2, 0, 0.1, 1, 0, 2, 0, 1], [5, 1, 3, 2, 1, 5, 3, 4]
    mean = lambda v: sum(v) / 8
    cov = sum((a - mean(x)) * (b - mean(y)) for a, b in zip(x, y))
    norm = math.sqrt(sum((a - mean(x)) ** 2 for a in x) * sum((b - mean(y)) ** 2 for b in y))
    assert found["length_correlation"] == pytest.approx(cov / norm, abs=1e-4)
    assert (
        reward_model.figures(torch.ones(2), torch.ones(2), torch.ones(2, 2).long())[
            "length_correlation"
        ]
        == 0
    )


def test_figures_of_the_scores():
    """Mean, spread and loss over all answers; a bin's bounds; a tie is no hit; only unequal lengths are asked for the longer."""
    chosen, rejected = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 4.5])
    found = reward_model.figures(chosen, rejected, torch.tensor([[1, 2], [4, 2], [3, 9]]))
    assert found["mean"] == pytest.approx(12.5 / 6, abs=1e-4)
    assert found["std"] == pytest.approx(math.sqrt(36.25 / 6 - (12.5 / 6) ** 2), abs=1e-4)
    sigma = lambda x: 1 / (1 + math.exp(-x))
    losses = [-math.log(sigma(m)) for m in (2, 0, -2.5)]
    assert found["loss"] == pytest.approx(sum(losses) / 3, abs=1e-4)
    assert found["accuracy"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["longer_preferred"] == pytest.approx(1 / 3, abs=1e-4)
    figures = [found[name] for name in ("mean", "std", "loss", "accuracy", "length_correlation")]
    figures += [row[name] for row in found["calibration"] for name in ("predicted", "observed")]
    assert all(x is None or x == round(x, 4) for x in figures), "four places are written"
    assert found["longer_favoured"] == pytest.approx(1 / 3, abs=1e-4)  # the third: 9 tokens and 4.5
    assert [row["n"] for row in found["calibration"]] == [1, 0, 0, 1, 1]
    assert found["calibration"][0]["observed"] == 0
    assert found["calibration"][3]["observed"] == 1 and found["calibration"][4]["observed"] == 0
    assert found["calibration"][1]["predicted"] is None
    sure = reward_model.figures(torch.tensor([99.0]), torch.tensor([-99.0]), torch.ones(1, 2))
    assert sure["calibration"][4]["n"] == 1 and sure["longer_favoured"] is None


def test_a_bound_belongs_to_one_bin(monkeypatch):
    """The lower one to its bin, the upper one to the next; 1 to the last."""
    monkeypatch.setattr(reward_model, "BINS", (0.25, 0.5, 0.75, 1.0))
    chosen, rejected = torch.tensor([0.0, 0.0, 99.0]), torch.tensor([0.0, 0.0, -99.0])
    found = reward_model.figures(chosen, rejected, torch.ones(3, 2))
    assert [row["n"] for row in found["calibration"]] == [0, 2, 1]
    assert [row["predicted"] for row in found["calibration"]] == [None, 0.5, 1.0]


def test_evaluation_in_batches_is_that_of_single_pairs(llava, tmp_path):
    """By the reward adapter, whatever acts outside; lengths are those of the answers, without the turn."""
    model, processor = llava
    ready(model)
    records = [
        replace(r, answers=("A red cup is on the table." * (i % 3 + 1), "No. " * (3 * i)))
        for i, r in enumerate(pairs(tmp_path, 7))
    ]
    examples = [processor.encode(r) for r in records]
    facts = {e.record.prompt_key: CAPTIONS[:1] for e in examples}
    held = {"a": [examples[i] for i in (5, 0, 3, 2, 6)], "b": [examples[i] for i in (1, 4)]}
    args = SimpleNamespace(seed=0, batch_size=2, max_facts=None, facts_first=False)
    found = reward_model.evaluate(model, processor, held, facts, args, "label")
    assert list(found) == ["a", "b"]
    for path, some in held.items():
        with torch.no_grad(), model.use("reward"):
            one_by_one = [scores(model, processor, [e], facts) for e in some]
        lengths = torch.tensor([[len(a) for a in e.answers] for e in some])
        want = reward_model.figures(*torch.cat(one_by_one, 1), lengths)
        for name in (
            "accuracy",
            "loss",
            "mean",
            "std",
            "length_correlation",
            "longer_preferred",
            "longer_favoured",
        ):
            assert found[path][name] == pytest.approx(want[name], abs=2e-4), name
        assert found[path]["n"] == len(some)


# ---- files


SETTINGS = {
    "question": "Q",
    "facts": "F",
    "max_facts": None,
    "template": "plain",
    "image_aspect": "pad",
    "held_out": {},
}


def test_round_trip_and_another_base(llava, parts, tmp_path):
    model, processor = llava
    ready(model)
    examples = [processor.encode(r) for r in pairs(tmp_path, 4)]
    of = lambda m: scores(m, processor, [examples[0], examples[3]])
    with torch.no_grad(), model.use("reward"):
        want = of(model)
    adapters.save_reward(model, tmp_path, "BASE", SETTINGS)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "BASE"
    other = checkpoints.compose(parts / "vision", parts / "llm")[0].prepare(2, projector=False)
    assert adapters.load_reward(other, tmp_path)["facts"] == "F"
    adapters.load_reward(other, tmp_path, "value")
    with torch.no_grad():
        for name in ("reward", "value"):
            with other.use(name):
                got = of(other) if name == "reward" else None
            assert got is None or torch.equal(got, want)
    assert (
        not any(p.requires_grad for p in other.parameters_of("reward"))
        and len(other.parameters_of("value")) == 2 * 14 + 2
    )
    assert all(
        a is not b and torch.equal(a, b)
        for a, b in zip(other.parameters_of("reward"), other.parameters_of("value"))
    )
    assert {n.split(".")[-2] for n, p in other.named_parameters() if p.requires_grad} == {"policy"}

    wrong = checkpoints.compose(parts / "vision", parts / "llm", seed=1)[0]  # another projector
    with pytest.raises(BadInput, match="was trained on BASE .* is another"):
        adapters.load_reward(wrong, tmp_path)
    assert not any(isinstance(m, LoRALinear) for m in wrong.modules())


def test_base_hash_does_not_depend_on_dtype_or_adapters(checkpoint):
    model = checkpoints.load(checkpoint)[0]
    found = adapters.base_hash(model)
    assert adapters.base_hash(checkpoints.load(checkpoint, torch.bfloat16)[0]) == found
    assert adapters.base_hash(ready(model)) == found
    with torch.no_grad():
        model.projector.linear_2.bias += 1
    assert adapters.base_hash(model) != found


def test_heads_and_other_adapters_are_not_in_a_merged_checkpoint(llava, tmp_path):
    model, processor = llava
    plain = dict(checkpoints.merged(model, []))
    model.prepare(2, projector=False)
    add_adapter(model.llm, "reward", 2)
    model.add_head("reward")
    torch.nn.init.normal_(model.llm.model.layers[0].mlp.up_proj.adapters["reward"].lora_B)
    found = dict(checkpoints.merged(model, []))
    assert found.keys() == plain.keys() and all(torch.equal(found[k], plain[k]) for k in plain)


# ---- the script


@pytest.fixture
def command(checkpoint, tmp_path, monkeypatch):
    """A function that runs reward_model.py in a folder with a POVID file and facts -> the run folder."""
    rows = []
    for r in pairs(tmp_path, 20):
        row = {"id": r.where, "image": r.image.name}
        for key, answer in (
            ("conversations", r.answers[0]),
            ("rejected_conversations", r.answers[1]),
        ):
            row[key] = [
                {"from": "human", "value": f"<image>\n{r.turns[0]}"},
                {"from": "gpt", "value": answer},
            ]
        rows.append(row)
    (tmp_path / "povid.json").write_text(json.dumps(rows))
    (tmp_path / "facts.json").write_text(
        json.dumps({f"{i:012d}.jpg": CAPTIONS[:1] for i in range(10)})
    )
    monkeypatch.chdir(tmp_path)

    def run(out, *flags):
        given = [
            "--model",
            str(checkpoint),
            "--data",
            "povid.json",
            "--images",
            "images",
            "--batch-size",
            "4",
            "--lr",
            "0.01",
            "--lora-rank",
            "2",
            "--held-out",
            "4",
            "--out",
            out,
            *flags,
        ]
        monkeypatch.setattr(sys, "argv", ["reward_model.py", *given])
        reward_model.main()
        return tmp_path / out

    return run


def test_learns_resumes_and_reports(command, checkpoint, monkeypatch, capsys):
    out = command("a", "--steps", "6", "--facts", "facts.json")
    summary, settings = (json.loads((out / f"{n}.json").read_text()) for n in ("summary", "reward"))
    after = summary["after"]["reward"]["povid.json"]
    assert (
        json.loads((out / "metrics.json").read_text())
        == summary["after"]["reward"]
        == settings["held_out"]
    )
    assert (
        after["accuracy"] == 1
        and after["n"] == 4
        and after["loss"] < summary["before"]["reward"]["povid.json"]["loss"]
    )
    assert (
        settings["facts"] == reward_model.FACTS
        and "calibration" in after
        and "probability" in capsys.readouterr().out
    )
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    assert [line["step"] for line in lines] == list(range(6)) and lines[-1]["loss"] < lines[0][
        "loss"
    ]
    assert "rewards/accuracies" in lines[0]

    Path("more.json").write_text(Path("povid.json").read_text())
    other = command("t", "--steps", "1", "--no-facts", "--test-data", "more.json")
    assert sorted(json.loads((other / "metrics.json").read_text())) == ["more.json", "povid.json"]
    assert list(json.loads((other / "reward.json").read_text())["held_out"]) == ["povid.json"]
    with pytest.raises(BadInput, match="--max-facts: '0' was given; a whole number, 1 or more"):
        command("c", "--facts", "facts.json", "--max-facts", "0")
    with pytest.raises(BadInput, match="--facts-first and --no-facts exclude each other"):
        command("e", "--no-facts", "--facts-first")
    with pytest.raises(BadInput, match="--facts FILE .* or --no-facts is needed"):
        command("c", "--steps", "1")
    with pytest.raises(BadInput, match="--test-data povid.json is --data too"):
        command("c", "--no-facts", "--test-data", "povid.json")

    save = training.save_checkpoint
    monkeypatch.setattr(
        training,
        "save_checkpoint",
        lambda out, step, *a: save(out, step, *a) or (step == 4 and 1 / 0),
    )
    with pytest.raises(ZeroDivisionError):
        command("b", "--steps", "6", "--facts", "facts.json", "--save-every", "2")
    monkeypatch.setattr(training, "save_checkpoint", save)
    again = command("b", "--steps", "6", "--facts", "facts.json", "--save-every", "2", "--resume")
    for name in ("adapter/adapter_model.safetensors", "head.safetensors"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_held_out_images_are_decoded_ahead(command, monkeypatch):
    late, prefetch, evaluate = [], data.Prefetch, reward_model.evaluate
    get = prefetch.get

    def forgets(model, processor, *given):
        ahead = processor.prefetch
        ahead.kept.clear()
        with monkeypatch.context() as patch:
            known = lambda i: i in ahead.begun or i in ahead.kept
            note = lambda self, i: (late.append(i) if not known(i) else None, get(self, i))[1]
            patch.setattr(prefetch, "get", note)
            return evaluate(model, processor, *given)

    monkeypatch.setattr(reward_model, "evaluate", forgets)
    command("run", "--steps", "1", "--no-facts")
    assert not late


# ---- what a run reads, and what comes back


def test_the_gradient_of_each_score(command, monkeypatch):
    """A pair's part is 1/pairs of the step; the centring of a forward pass weighs as its pairs do. Worked out pair by pair."""
    watch = Watch(monkeypatch, offset=(0.25, -1.0))
    flags = ("--no-facts", "--epochs", "1", "--batch-size", "3", "--grad-accum", "2")
    out = command("a", *flags, "--centre", "0.4", "--lr", "1e-9")
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    sizes = [len(chosen) for chosen, *_ in watch.scores]
    assert sizes == [3, 3, 3, 3, 3, 1]  # 16 pairs: the last step has 3 + 1
    for line, step in zip(lines, (watch.scores[:2], watch.scores[2:4], watch.scores[4:])):
        n = sum(len(chosen) for chosen, *_ in step)
        total, every = 0.0, [[], []]
        for chosen, rejected, of_chosen, of_rejected in step:
            here = [(a, b) for a, b in zip(chosen.tolist(), rejected.tolist())]
            mean = sum(a + b for a, b in here) / len(here)
            sign = 1 if mean > 0 else -1
            for (a, b), g, h in zip(here, of_chosen.tolist(), of_rejected.tolist()):
                wrong = 1 / (1 + math.exp(a - b))
                assert g == pytest.approx((-wrong + 0.4 * sign) / n, abs=1e-5)
                assert h == pytest.approx((wrong + 0.4 * sign) / n, abs=1e-5)
                total += math.log(1 + math.exp(b - a)) + 0.4 * abs(mean)
                every[0].append(a)
                every[1].append(b)
        assert line["loss"] == pytest.approx(total / n, abs=1e-5)
        assert line["rewards/chosen"] == pytest.approx(sum(every[0]) / n, abs=1e-5)
        assert line["rewards/rejected"] == pytest.approx(sum(every[1]) / n, abs=1e-5)
        margins = [a - b for a, b in zip(*every)]
        assert line["rewards/margins"] == pytest.approx(sum(margins) / n, abs=1e-5)
        assert line["rewards/accuracies"] == pytest.approx(sum(m > 0 for m in margins) / n)
        assert line["grad_norm"] > 0
    assert len(lines) == 3


def test_grad_accum_changes_nothing_but_the_centring(command):
    """The same figures of a step over eight pairs, in one forward pass or in two."""
    flags = ("--no-facts", "--steps", "1", "--centre", "0", "--lr", "1e-3")
    one = command("a", *flags, "--batch-size", "8")
    two = command("b", *flags, "--batch-size", "4", "--grad-accum", "2")
    a, b = (json.loads(next(open(out / "metrics.jsonl"))) for out in (one, two))
    for name in ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "rewards/accuracies"):
        assert a[name] == pytest.approx(b[name], abs=1e-4), name


def test_rates_warm_up_and_stay(command, monkeypatch):
    watch = Watch(monkeypatch)
    out = command("a", "--no-facts", "--steps", "67", "--batch-size", "1", "--lr", "0.003")
    rates = [json.loads(line)["lr"] for line in open(out / "metrics.jsonl")]
    want = [0.001, 0.002] + [0.003] * 65  # 3 % of 67 steps are 3
    assert rates == pytest.approx(want)
    assert [row for row in watch.rates] == [pytest.approx([rate] * 2) for rate in want]
    flags = ("--no-facts", "--steps", "3", "--batch-size", "1", "--lr", "0.003")
    out = command("b", *flags, "--schedule", "cosine")
    rates = [json.loads(line)["lr"] for line in open(out / "metrics.jsonl")]
    assert rates == pytest.approx([0.003, 0.003, 0.0015]), "a step of warm-up, half a cosine over 2"


def test_captions_are_drawn_anew(command, monkeypatch):
    """One caption of three: another for each pair, pass and step; the held-out pairs keep theirs, before and after."""
    Path("facts.json").write_text(json.dumps({f"{i:012d}.jpg": CAPTIONS for i in range(10)}))
    watch = Watch(monkeypatch)
    flags = ("--facts", "facts.json", "--max-facts", "1", "--batch-size", "1", "--grad-accum", "4")
    out = command("a", *flags, "--epochs", "12", "--lr", "1e-9")
    setup, run = watch.trained[20:40], watch.trained[40:]  # after 20 for the memory
    assert len({where for where, _ in setup}) == 20 and len(run) == 12 * 16
    which = [next(i for i, c in enumerate(CAPTIONS) if c in turn) for _, turn in run]
    assert all(sum(c in turn for c in CAPTIONS) == 1 for _, turn in run)
    of_pair = {}
    for (where, _), i in zip(run, which):
        of_pair.setdefault(where, set()).add(i)
    assert sum(len(found) == 3 for found in of_pair.values()) > 8
    steps = [tuple(which[i : i + 4]) for i in range(0, len(which), 4)]
    assert len(set(steps)) > 20 and sum(len(set(step)) > 1 for step in steps) > 40
    before, after = watch.held[: len(watch.held) // 2], watch.held[len(watch.held) // 2 :]
    assert before == after and len({turn for _, turn in before}) > 1
    summary = json.loads((out / "summary.json").read_text())
    for name, held in summary["before"]["reward"].items():  # in another batch, so up to rounding
        then = summary["after"]["reward"][name]
        assert then["accuracy"] == held["accuracy"]
        assert then["loss"] == pytest.approx(held["loss"], abs=1.1e-4)  # four places are written
    assert json.loads((out / "reward.json").read_text())["max_facts"] == 1


def test_who_is_trained_on_and_who_is_held_out(command, monkeypatch):
    """Two files and test data: each training pair once an epoch, all others in their file's figures, no picture in both."""
    rows = json.loads(Path("povid.json").read_text())
    for name, some in (("povid", rows[:10]), ("two", rows[10:]), ("more", rows[::-1])):
        Path(f"{name}.json").write_text(json.dumps(some))
    watch = Watch(monkeypatch)
    out = command(
        "a",
        "--data",
        "two.json",
        "--test-data",
        "more.json",
        "--no-facts",
        "--epochs",
        "2",
        "--held-out",
        "2",
    )
    picture = {f"povid.json, row {i}": i // 2 for i in range(10)}
    picture |= {f"two.json, row {i}": 5 + i // 2 for i in range(10)}
    picture |= {f"more.json, row {i}": (19 - i) // 2 for i in range(20)}
    trained = [where for where, turn in watch.trained][20 + 20 + 4 :]  # the first are looked at
    first, second = set(trained[:16]), set(trained[16:])
    assert len(trained) == 32 and len(first) == 16 and first == second
    assert trained[:16] != trained[16:] and trained[:16] != sorted(trained[:16])
    held = [where for where, _ in watch.held]
    assert held[:8] == held[8:] and len(set(held[:8])) == 8
    assert first | set(held[:4]) == {w for w in picture if not w.startswith("more")}
    assert [w.split(".")[0] for w in held[:8]] == ["povid"] * 2 + ["two"] * 2 + ["more"] * 4
    assert not {picture[w] for w in first} & {picture[w] for w in held}
    found = json.loads((out / "metrics.json").read_text())
    assert {name: f["n"] for name, f in found.items()} == {
        "povid.json": 2,
        "two.json": 2,
        "more.json": 4,
    }
    assert list(json.loads((out / "reward.json").read_text())["held_out"]) == [
        "povid.json",
        "two.json",
    ]


def test_the_adapter_learns_and_not_the_head_alone(command):
    out = command("a", "--no-facts", "--steps", "1")
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    started_at_zero = [p for name, p in adapter.items() if "lora_B" in name]
    assert len(started_at_zero) == 2 * 14 and all(p.any() for p in started_at_zero)
