"""reward_model.py: the loss, what is read and where, held-out figures, and the files that ppo.py loads."""

import json
import math
import random
import sys
from collections import defaultdict
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

import checkpoints
import data
import reward_model
import training
from data import Record
from model import BadInput, LoRALinear, last_tokens, pack

CAPTIONS = ["A red cup is on the table.", "Two bananas are in a bowl.", "There is no dog."]
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


def ready(model, rank=4):
    """With a reward adapter and head that do something."""
    model.prepare(llm=False, projector=False)
    torch.manual_seed(3)
    model.add_adapter("reward", rank)
    model.add_head("reward")
    with torch.no_grad():
        for p in model.parameters_of("reward"):
            p.add_(torch.randn_like(p) * 0.1)
    return model


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


def test_last_tokens():
    batch = pack(
        [torch.arange(3), torch.arange(2)], [[torch.arange(2), torch.arange(1)], [torch.arange(4)]]
    )
    assert last_tokens(batch).tolist() == [4, 5, 6 + 5]  # rows are 6 long


def test_facts_stand_behind_the_answer_and_in_no_prompt(llava, tmp_path):
    _, processor = llava
    example = processor.encode(pairs(tmp_path, 2)[0])
    text = data.evaluation(reward_model.QUESTION, reward_model.FACTS, CAPTIONS, random.Random(0))
    assert all(f"\n- {c}" in text for c in CAPTIONS)
    rated = processor.rated(example, text)
    assert torch.equal(rated.prompt, example.prompt)
    for long, short in zip(rated.answers, example.answers):
        assert torch.equal(long[: len(short)], short)
        turn = processor.tokenizer.decode(long[len(short) :])
        assert (
            turn.startswith("USER: Rate")
            and turn.endswith("ASSISTANT:")
            and all(c in turn for c in CAPTIONS)
        )
    assert not any(c in processor.tokenizer.decode(example.prompt) for c in CAPTIONS)
    some = [data.evaluation("{facts}", "", CAPTIONS, random.Random(i), most=1) for i in range(30)]
    assert {text.count("- ") for text in some} == {1} and len(set(some)) == len(CAPTIONS)
    assert data.evaluation("{facts}", "", CAPTIONS, random.Random(0), most=9).count("- ") == len(
        CAPTIONS
    )
    length = processor.length
    assert length("a a a") > length("a")
    assert data.longest_facts(processor, ["a", "a a a", "a a"], 2) == ["a a", "a a a"]
    assert len(data.longest_facts(processor, CAPTIONS)) == len(CAPTIONS)
    orders = {data.evaluation("{facts}", "", CAPTIONS, random.Random(i)) for i in range(30)}
    assert len(orders) == 6, "captions are not shuffled"
    plain = data.evaluation(reward_model.QUESTION, reward_model.FACTS, [], random.Random(0))
    assert "{facts}" not in plain and "-" not in plain and reward_model.FACTS not in plain


def test_cut_off_answer_is_closed_once(llava, tmp_path):
    _, processor = llava
    example = processor.encode(pairs(tmp_path, 2)[0])
    whole = example.answers[0]
    cut = data.replace(example, answers=[whole[:-1], whole, whole[:0]])
    first, second, empty = processor.rated(cut, "Rate it.").answers
    assert torch.equal(first, second) and int(empty[0]) == processor.end_id


def test_packed_scores_are_those_of_one_answer_alone(llava, tmp_path):
    model, processor = llava
    ready(model)
    examples = [processor.encode(r) for r in pairs(tmp_path, 4)]
    reader = reward_model.Reader(model, processor, examples, [CAPTIONS[:1]] * 4)
    with torch.no_grad(), model.use("reward"):
        chosen, rejected = reader.scores([0, 1, 2, 3], random.Random(0))
        for i in range(4):
            rated = reader.rated(i, random.Random(0))
            for k, packed in enumerate((chosen, rejected)):
                ids = torch.cat([rated.prompt, rated.answers[k]])
                batch = pack([ids], [[]], pixel_values=processor.images([examples[i]])[0])
                alone = model.hidden(batch)[0, -1]
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
        model.add_adapter(name, 2)
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
    of = lambda name, prompt="Describe.": data.facts_of(Record("f, row 0", name, (prompt,)), known)
    assert of("a/COCO_train2014_000000000007.jpg") == ["coco"] and of("000000000007.jpg") == [
        "coco"
    ]
    assert of("000000000007.jpg", CHOICE) == ["why"] and of("x.png", CHOICE) == ["x"]
    assert of("y.png") is None and of(None) == []


def test_missing_facts_are_refused_or_counted(tmp_path, capsys):
    records = pairs(tmp_path)
    file = tmp_path / "image_to_caption.json"
    file.write_text(json.dumps({f"{i:012d}.jpg": CAPTIONS for i in (0, 2)}))
    known = data.captions(file)
    with pytest.raises(BadInput, match=r"row 2: .*no caption of .*000000000001.jpg \(2 of 6 rows"):
        data.facts_for(records, known, "refuse")
    assert [len(f) for f in data.facts_for(records, known, "count")] == [3, 3, 0, 0, 3, 3]
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
    with pytest.raises(BadInput, match="--test-data has only pictures that are trained on"):
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
    scores = lambda m: torch.stack(
        list(reward_model.Reader(m, processor, examples, [[]] * 4).scores([0, 3], random.Random(0)))
    )
    with torch.no_grad(), model.use("reward"):
        want = scores(model)
    checkpoints.save_reward(model, tmp_path, "BASE", SETTINGS)
    other = checkpoints.compose(parts / "vision", parts / "llm")[0].prepare(2, projector=False)
    assert checkpoints.load_reward(other, tmp_path)["facts"] == "F"
    checkpoints.load_reward(other, tmp_path, "value")
    with torch.no_grad():
        for name in ("reward", "value"):
            with other.use(name):
                got = scores(other) if name == "reward" else None
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
        checkpoints.load_reward(wrong, tmp_path)
    assert not any(isinstance(m, LoRALinear) for m in wrong.modules())


def test_base_hash_does_not_depend_on_dtype_or_adapters(checkpoint):
    model = checkpoints.load(checkpoint)[0]
    found = checkpoints.base_hash(model)
    assert checkpoints.base_hash(checkpoints.load(checkpoint, torch.bfloat16)[0]) == found
    assert checkpoints.base_hash(ready(model)) == found
    with torch.no_grad():
        model.projector.linear_2.bias += 1
    assert checkpoints.base_hash(model) != found


def test_heads_and_other_adapters_are_not_in_a_merged_checkpoint(llava, tmp_path):
    model, processor = llava
    plain = dict(checkpoints.merged(model, torch.float32))
    model.prepare(2, projector=False)
    model.add_adapter("reward", 2)
    model.add_head("reward")
    torch.nn.init.normal_(model.llm.model.layers[0].mlp.up_proj.adapters["reward"].lora_B)
    found = dict(checkpoints.merged(model, torch.float32))
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
    with pytest.raises(BadInput, match="--max-facts is 0; 1 or more"):
        command("c", "--facts", "facts.json", "--max-facts", "0")
    with pytest.raises(BadInput, match="--facts FILE .* or --no-facts is needed"):
        command("c", "--steps", "1")

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
