"""dpo.py: the losses by hand and against TRL, the command line (and sft.py's) from the first step to the last file."""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import read_records
from PIL import Image
from safetensors.torch import load_file, save_file

import dpo as dpo_script
import online_dpo
import training
from common import BadInput
from data import TEMPLATES, Record
from dpo import dpo_loss
from formats import adapters, checkpoints
from formats.anyres import AnyRes
from model import MLLM

ROOT = Path(__file__).parents[1]


# ---- the losses


@pytest.mark.parametrize(
    "kind, beta, want",
    [
        # pair 1: chosen -10 from -12, rejected -20 from -17: h = 2 - (-3) = 5
        # pair 2: chosen -8 from -7, rejected -9 from -9.5: h = -1 - 0.5 = -1.5
        # pair 3: nothing moved, h = 0
        ("dpo", 0.1, [0.474077, 0.770960, 0.693147]),  # ln(1 + e^-0.5), ln(1 + e^0.15), ln 2
        ("dpo", 2.0, [0.0000454, 3.048587, 0.693147]),  # ln(1 + e^-10), ln(1 + e^3), ln 2
        # tokens 4 and 12, 2 and 5, 3 and 3: h' = 2/4 + 3/12 = .75, -1/2 - .5/5 = -.6, 0
        ("ipo", 0.1, [18.0625, 31.36, 25.0]),  # 1 / (2 * 0.1) = 5: -4.25^2, -5.6^2, -5^2
        ("ipo", 1.0, [0.0625, 1.21, 0.25]),  # 1 / 2 = 0.5: .25^2, -1.1^2, -.5^2
        ("ipo_sum", 0.1, [0.0, 42.25, 25.0]),  # (5 - 5)^2, (-1.5 - 5)^2, (0 - 5)^2
        ("ipo_sum", 1.0, [20.25, 4.0, 0.25]),  # (5 - 0.5)^2, (-1.5 - 0.5)^2, (0 - 0.5)^2
        ("slic", 0.1, [0.5, 1.15, 1.0]),  # 1 - 0.5, 1 + 0.15, 1
        ("slic", 2.0, [0.0, 4.0, 1.0]),  # max(0, 1 - 10), 1 + 3, 1
    ],
)
@pytest.mark.parametrize("script", [dpo_script, online_dpo])
def test_losses_by_hand(script, kind, beta, want):
    t = torch.tensor
    chosen, rejected = (
        t([-10.0, -8.0, -30.0], requires_grad=True),
        t([-20.0, -9.0, -40.0], requires_grad=True),
    )
    ref_chosen, ref_rejected = t([-12.0, -7.0, -30.0]), t([-17.0, -9.5, -40.0])
    tokens = t([[4, 2, 3], [12, 5, 3]])
    losses, reward_chosen, reward_rejected = script.dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, beta, kind, tokens
    )
    assert torch.allclose(losses, t(want), rtol=1e-5, atol=1e-7)
    assert torch.allclose(reward_chosen, beta * t([2.0, -1.0, 0.0]))
    assert torch.allclose(reward_rejected, beta * t([-3.0, 0.5, 0.0]))
    assert not reward_chosen.requires_grad and not reward_rejected.requires_grad
    losses.sum().backward()
    h, per_token = [5.0, -1.5, 0.0], [0.75, -0.6, 0.0]
    slope = {  # d loss / d h
        "dpo": [-beta / (1 + math.exp(beta * x)) for x in h],
        "ipo": [2 * (x - 1 / (2 * beta)) for x in per_token],
        "ipo_sum": [2 * (x - 1 / (2 * beta)) for x in h],
        "slic": [-beta * (beta * x < 1) for x in h],
    }[kind]
    shares = 1 / tokens if kind == "ipo" else torch.ones(2, 3)
    assert torch.allclose(chosen.grad, t(slope) * shares[0], atol=1e-6)
    assert torch.allclose(rejected.grad, -t(slope) * shares[1], atol=1e-6)


def test_dpo_loss_of_a_lost_pair_is_finite():
    zero = torch.zeros(1)
    losses, *_ = dpo_loss(torch.tensor([-5000.0]), zero, zero, zero, 0.5, "dpo")
    assert losses.item() == 2500.0


# ---- a data file: six pairs of unequal lengths, pictures of several shapes, one shared, one row without


PAIRS = [  # image, question, chosen, rejected; the letter Z is in row 4 alone
    (
        "a.png",
        "What is there?",
        "A red cup on the table.",
        "A dog and two bananas are on the table of the kitchen.",
    ),
    ("b.png", "Is there a dog?", "No, there is no dog in the image.", "Yes."),
    (
        "a.png",
        "Describe the image in detail.",
        "Two bananas and a bowl.",
        "A bowl, a cup, a dog, a cat and a table.",
    ),
    (None, "Is a cup red?", "Some are.", "Yes, every cup is red, always."),
    ("c.png", "Is there a cup?", "Z: yes.", "No cup."),
    ("d.png", "What is on the left?", "A bowl stands on the left of the table.", "Nothing."),
]


def pictures(folder):
    """Four small pictures: a square of the tower's size, a large one, a wide one and a tall one."""
    folder.mkdir()
    for i, (name, size) in enumerate(
        {"a": (28, 28), "b": (60, 60), "c": (50, 30), "d": (31, 47)}.items()
    ):
        picture = Image.new("RGB", size, (40 * i, 200 - 30 * i, 90))
        picture.paste((250, 60 * i, 10), (3, 5, 3 + size[0] // 2, 5 + size[1] // 3))
        picture.save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with povid.json, instruct.json and images/: where the scripts are run."""
    folder = tmp_path_factory.mktemp("run")
    pictures(folder / "images")
    pairs, instruct = [], []
    for image, question, chosen, rejected in PAIRS:
        human = {"from": "human", "value": f"<image>\n{question}" if image else question}
        row = {"image": image} if image else {}
        answer = lambda text: [human, {"from": "gpt", "value": text}]
        pairs.append(
            row | {"conversations": answer(chosen), "rejected_conversations": answer(rejected)}
        )
        more = (
            [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
            if len(chosen) > 20
            else []
        )
        instruct.append(row | {"conversations": answer(chosen) + more})
    (folder / "povid.json").write_text(json.dumps(pairs))
    (folder / "instruct.json").write_text(json.dumps(instruct))
    return folder


def run(folder, script, *flags, status=0):
    """Run a script as a user does, in `folder` -> stderr."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1"
    }
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stderr


def dpo(folder, model, out, *flags, images="images", batch=2, status=0):
    return run(
        folder,
        "dpo.py",
        "--model",
        model,
        "--data",
        "povid.json",
        "--images",
        images,
        "--lora-rank",
        4,
        "--batch-size",
        batch,
        "--lr",
        1e-3,
        "--projector-lr",
        1e-4,
        "--out",
        out,
        *flags,
        status=status,
    )


def metrics(out):
    """Lines of metrics.jsonl, without the times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines]


def assert_near(out, other):
    """Metrics and weights of two runs that differ in rounding only."""
    for a, b in zip(metrics(out), metrics(other), strict=True):
        if a["step"] == 0:
            a["rewards/accuracies"] = b["rewards/accuracies"] = (
                0  # of rewards that are 0 up to rounding
            )
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)
    file = (
        "adapter/adapter_model.safetensors"
        if (out / "adapter").exists()
        else "model/model.safetensors"
    )
    a, b = load_file(out / file), load_file(other / file)
    assert a.keys() == b.keys()
    gap = torch.cat([(a[k] - b[k]).abs().flatten() for k in a])
    # where a gradient vanishes (LoRA's A at the start, CLIP's key biases always) Adam divides rounding by rounding
    assert (gap > 1e-6).float().mean() < 1e-3 and gap.max() < 5e-5


@pytest.fixture(scope="module")
def six(world, checkpoint):
    """Six steps of two pairs with a checkpoint every three: (run folder, stderr)."""
    return world / "six", dpo(world, checkpoint, "six", "--steps", 6, "--save-every", 3)


# ---- the command line


def test_first_step_is_ln_2(six):
    out, said = six
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(6))
    first = lines[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert abs(first["rewards/chosen"]) < 1e-5 and abs(first["rewards/rejected"]) < 1e-5
    assert f"{first['loss']:.4f}" == "0.6931" and "0.6931" in said
    assert lines[-1]["loss"] < 0.68 and lines[-1]["rewards/margins"] > 0.01, "it learns nothing"
    for line in lines:
        assert line["rewards/margins"] == pytest.approx(
            line["rewards/chosen"] - line["rewards/rejected"], abs=1e-6
        )
        assert line["logps/chosen"] < 0 and line["logps/rejected"] < 0 and line["grad_norm"] > 0
    # 3 % of 6 steps, rounded up, are one step of warm-up; then a cosine from 1 at step 1 towards 0 at step 6
    want = [1, 1, *(0.5 + 0.5 * math.cos(math.pi * i / 5) for i in range(1, 5))]
    assert [line["lr"] for line in lines] == pytest.approx([1e-3 * f for f in want])
    assert sorted(p.name for p in (out / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "alignment.json",
    ]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["before"] is summary["after"] is None
    assert set(summary["seconds"]) == {"setup", "reference", "train", "eval"}


def test_metrics_are_what_they_say(six, world, checkpoint):
    """Step 0 by hand: the two pairs that the seed puts first, one row an answer."""
    args = argparse.Namespace(batch_size=2, grad_accum=1, steps=6, seed=0)
    chosen_rows, _ = training.batch_of(0, args, len(PAIRS))
    model, processor = checkpoints.load(checkpoint)
    examples = [processor.encode(r) for r in read_records([world / "povid.json"], world / "images")]
    sums = []
    for i in chosen_rows:
        for answer in examples[i].answers:
            tokens = torch.cat([examples[i].prompt, answer])[None]
            image = examples[i].record.image
            x = model.embed(tokens, None if image is None else processor.pixels(image)[None])
            log_p = model.llm(inputs_embeds=x, use_cache=False).logits[0].log_softmax(-1)
            at = len(examples[i].prompt) - 1
            sums.append(sum(log_p[at + t, token].item() for t, token in enumerate(answer)))
    first = metrics(six[0])[0]
    assert first["logps/chosen"] == pytest.approx((sums[0] + sums[2]) / 2, abs=1e-4)
    assert first["logps/rejected"] == pytest.approx((sums[1] + sums[3]) / 2, abs=1e-4)


def test_adapter_is_the_trained_model(six, checkpoint):
    """What `adapter/` holds is what the last checkpoint holds, under PEFT's names."""
    state = load_file(six[0] / "checkpoints" / "step-000006" / "state.safetensors")
    model = adapters.load_adapter(checkpoints.load(checkpoint)[0], six[0] / "adapter")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == {k[len("model.") :] for k in state if k.startswith("model.")}
    assert all(torch.equal(p, state[f"model.{n}"]) for n, p in trained.items())


def test_resume_is_bit_equal(six, world, checkpoint):
    """Back to the third of six steps, with what a kill during the next save would have left."""
    out, again = six[0], world / "again"
    shutil.copytree(out, again)
    for left in (again / "adapter", again / "checkpoints" / "step-000006"):
        shutil.rmtree(left)
    (again / "summary.json").unlink()
    (again / "checkpoints" / "latest").write_text("step-000003")
    torn = again / "checkpoints" / "step-000006.tmp"
    torn.mkdir()
    (torn / "state.safetensors").write_bytes(b"torn")
    dpo(world, checkpoint, "again", "--steps", 6, "--save-every", 3, "--resume")
    assert metrics(again) == metrics(out)
    for file in ("adapter/adapter_model.safetensors", "checkpoints/step-000006/state.safetensors"):
        assert (again / file).read_bytes() == (out / file).read_bytes(), file
    assert sorted(p.name for p in (again / "checkpoints").iterdir()) == [
        "latest",
        "step-000003",
        "step-000006",
    ]
    assert (again / "checkpoints" / "latest").read_text() == "step-000006"


def test_reference_cache(six, world, checkpoint):
    """A run that was killed before its first checkpoint begins anew: bit for bit, with the log-probs of the cache."""
    assert "reference 6/6" in six[1] and "from the cache:" not in six[1]
    entries = lambda: sorted(p.name for p in (world / ".cache").glob("reference-*"))
    (entry,) = entries()
    again = world / "anew"
    again.mkdir()
    for name in ("args.json", "metrics.jsonl"):
        shutil.copy(six[0] / name, again / name)
    said = dpo(world, checkpoint, "anew", "--steps", 6, "--save-every", 3, "--resume")
    assert (
        f"from the cache: .cache/{entry}" in said
        and "reference 6/6" not in said
        and entries() == [entry]
    )
    assert metrics(again) == metrics(six[0])
    adapters = [
        (out / "adapter" / "adapter_model.safetensors").read_bytes() for out in (again, six[0])
    ]
    assert adapters[0] == adapters[1]


def test_another_picture_is_not_in_the_cache(six, world, checkpoint):
    """The same name, other pixels."""
    before = set((world / ".cache").iterdir())
    shutil.copytree(world / "images", world / "other")
    Image.new("RGB", (28, 28), "green").save(world / "other" / "a.png")
    said = dpo(world, checkpoint, "changed", "--steps", 1, images="other")
    assert "reference 6/6" in said and len(set((world / ".cache").iterdir()) - before) == 1
    first = metrics(world / "changed")[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["logps/chosen"] != metrics(six[0])[0]["logps/chosen"]


# what the cache must notice. Each change leaves the token ids and the other weights as they are, unless it says so


def config(**changes):
    """Change config.json: keys like "text_config.rms_norm_eps" are written with two underscores."""

    def apply(folder):
        file = folder / "config.json"
        values = json.loads(file.read_text())
        for name, value in changes.items():
            *path, key = name.split("__")
            part = values[path[0]] if path else values
            assert part.get(key) != value
            part[key] = value
        file.write_text(json.dumps(values))

    return apply


def picture_values(key, value):
    """Change what the image processor's file says."""

    def apply(folder):
        found = 0
        for file in folder.glob("*processor_config.json"):
            values = json.loads(file.read_text())
            part = values.get("image_processor", values)
            if key in part:
                found += part[key] != value
                part[key] = value
                file.write_text(json.dumps(values))
        assert found

    return apply


def weight(name):
    """Add .5 to one tensor of the file."""

    def apply(folder):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors[name] = tensors[name] + 0.5
        save_file(tensors, file, metadata={"format": "pt"})

    return apply


VISION = "vision_tower.vision_model"
FOLDERS = {
    "feature layer": config(vision_feature_layer=-1),
    "LLM's config": config(text_config__rms_norm_eps=0.1),
    "tower's config": config(vision_config__layer_norm_eps=0.1),
    "mean": picture_values("image_mean", [0.1, 0.2, 0.3]),
    "deviation": picture_values("image_std", [0.5, 0.6, 0.7]),
    "tower's weights": weight(f"{VISION}.encoder.layers.0.mlp.fc1.bias"),
    "projector's weights": weight("multi_modal_projector.linear_1.bias"),
    "LLM's weights": weight("language_model.model.layers.1.mlp.down_proj.weight"),
}


@pytest.fixture
def score(monkeypatch, tmp_path, world, checkpoint):
    """A function: reference log-probs of the pairs -> ((6, 2), whether the model had to compute). Changes as arguments.

    edit: of a copy of the checkpoint. adjust: of (model, processor). edit_data: of the examples. cache: where to run.
    """
    passes, real = [], MLLM.answer_log_probs
    monkeypatch.setattr(
        MLLM, "answer_log_probs", lambda *args: passes.append(1) or real(*args), raising=True
    )

    def call(
        edit=None, adjust=None, edit_data=None, cache="cache", batch=4, rank=0, images=None, **more
    ):
        folder, work = checkpoint, tmp_path / cache
        work.mkdir(exist_ok=True)
        if edit:
            folder = tmp_path / "edited"
            if not folder.exists():
                shutil.copytree(checkpoint, folder)
                edit(folder)
        model, processor = checkpoints.load(folder, **more)
        model.prepare(rank)
        if adjust:
            adjust(model, processor)
        records = read_records([world / "povid.json"], images or world / "images", answers=2)
        examples = [processor.encode(r) for r in records]
        if edit_data:
            examples = edit_data(examples)
        monkeypatch.chdir(work)
        passes.clear()
        args = argparse.Namespace(batch_size=batch)
        found = dpo_script.reference_log_probs(model, processor, examples, args.batch_size)
        return found, bool(passes)

    return call


def test_the_cache_is_found_again(score, world, checkpoint):
    """Another batch size and LoRA, which adds 0 at its start, are no other reference. Each row is its own pair's."""
    first, computed = score(rank=2)
    assert computed and first.shape == (6, 2)
    again, computed = score(batch=1, rank=3)
    assert torch.equal(again, first) and not computed
    model, processor = checkpoints.load(checkpoint)
    records = read_records([world / "povid.json"], world / "images", answers=2)
    with torch.no_grad():
        for row, record in zip(first, records, strict=True):
            alone = model.answer_log_probs(processor.collate([processor.encode(record)]))
            assert torch.allclose(row, alone, rtol=1e-5)


def notices(score, **changes):
    """With the changes, the cache of the plain run is not used: what comes is what an empty cache gives."""
    plain, _ = score()
    found, computed = score(**changes)
    assert computed, "the cache of another reference was used"
    want, _ = score(cache="empty", **changes)
    assert torch.equal(found, want)
    assert found.shape != plain.shape or not torch.allclose(found, plain, atol=1e-4), "no change"
    again, computed = score()
    assert torch.equal(again, plain) and not computed


@pytest.mark.parametrize("name", FOLDERS)
def test_the_cache_is_of_one_checkpoint(score, name):
    notices(score, edit=FOLDERS[name])


def test_the_cache_is_of_one_dtype(score):
    """All of the weights may be float32, where all of them train, while the arithmetic is bfloat16."""

    def to_bfloat16(model, processor):
        model.vision.float()
        model.dtype = torch.bfloat16

    notices(score, adjust=to_bfloat16)


def test_the_cache_is_of_one_image_aspect(score):
    notices(score, image_aspect="checkpoint")


def test_the_cache_is_of_one_template(score):
    notices(score, template="mistral")


def test_the_cache_is_of_one_tiling(score, tmp_path, world):
    """A square in two tiles above or beside one another: as many tokens, other pixels."""

    def tiles(*pinpoints):
        def adjust(model, processor):
            model.anyres = processor.anyres = AnyRes(pinpoints, 28, 2)
            model.image_newline = torch.nn.Parameter(torch.ones_like(model.llm.lm_head.weight[0]))

        return adjust

    squares = tmp_path / "squares"
    squares.mkdir()
    for name in "abcd":
        with Image.open(world / "images" / f"{name}.png") as picture:
            picture.resize((28, 28)).save(squares / f"{name}.png")
    above, beside = tiles((56, 28)), tiles((28, 56))
    plain, _ = score(adjust=above, images=squares)
    found, computed = score(adjust=beside, images=squares)
    assert computed and not torch.allclose(found, plain, atol=1e-4)
    assert not score(adjust=above, images=squares)[1]


def answered(example, *answers):
    """The example with other answers, every token scored."""
    scored = [torch.ones(len(tokens), dtype=torch.bool) for tokens in answers]
    return replace(example, answers=list(answers), scored=scored)


@pytest.mark.parametrize(
    "edit_data",
    [
        lambda examples: examples[::-1],
        lambda examples: examples[:5],
        lambda examples: [answered(e, *e.answers[::-1]) for e in examples],
        lambda examples: [replace(examples[0], prompt=examples[0].prompt.flip(0)), *examples[1:]],
        lambda examples: [answered(e, e.answers[0], e.answers[1][1:]) for e in examples],
        lambda examples: [answered(e, e.answers[0][1:], e.answers[1]) for e in examples],
        lambda examples: [replace(examples[0], record=examples[1].record), *examples[1:]],
    ],
    ids=["order", "fewer", "swapped", "prompt", "rejected", "chosen", "picture"],
)
def test_the_cache_is_of_these_pairs(score, edit_data):
    notices(score, edit_data=edit_data)


def test_resume_with_another_flag_is_refused(six, world, checkpoint):
    before = (six[0] / "metrics.jsonl").read_bytes()
    said = dpo(
        world,
        checkpoint,
        "six",
        "--steps",
        6,
        "--save-every",
        3,
        "--resume",
        "--lr",
        2e-3,
        status=2,
    )
    assert "--lr was 0.001 and is now 0.002" in said and "Traceback" not in said
    assert (six[0] / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "changed, value, named", [("batch_size", 3, "--batch-size"), ("data", None, "povid.json")]
)
def test_a_run_folder_belongs_to_one_run(six, world, monkeypatch, tmp_path, changed, value, named):
    """Another flag, or other bytes in the data file."""
    shutil.copy(world / "povid.json", tmp_path)
    if changed == "data":
        (tmp_path / "povid.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    flags = json.loads((six[0] / "args.json").read_text())["flags"] | {
        "out": str(six[0]),
        "resume": True,
    }
    flags |= {} if value is None else {changed: value}
    with pytest.raises(BadInput, match=named):
        training.start(argparse.Namespace(**flags), "dpo")


def test_accumulated_batch_is_the_batch(world, checkpoint):
    """Two forward passes of two pairs of unequal lengths against one of four."""
    dpo(world, checkpoint, "four", "--steps", 3, batch=4)
    dpo(world, checkpoint, "two-by-two", "--steps", 3, "--grad-accum", 2)
    assert_near(world / "four", world / "two-by-two")


def test_not_a_number_stops_the_run(world, checkpoint):
    """The embedding of a letter that only row 4 has is so large that its square overflows; the steps before are kept."""
    bad = world / "bad-model"
    shutil.copytree(checkpoint, bad)
    _, processor = checkpoints.load(checkpoint)
    examples = [processor.encode(r) for r in read_records([world / "povid.json"], world / "images")]
    tokens = [set(torch.cat([e.prompt, *e.answers]).tolist()) for e in examples]
    letter = min(tokens[4] - set().union(*tokens[:4], tokens[5]))
    weights = load_file(bad / "model.safetensors")
    weights["language_model.model.embed_tokens.weight"][letter] = 3e38
    save_file(weights, bad / "model.safetensors", metadata={"format": "pt"})
    said = dpo(world, bad, "stopped", "--steps", 6, "--save-every", 1, "--seed", 2, status=1)
    assert "povid.json, row 4" in said and "Traceback" not in said
    done = metrics(world / "stopped")
    assert 0 < len(done) < 3 and all(math.isfinite(v) for line in done for v in line.values())
    folder = world / "stopped" / "checkpoints"
    assert (folder / "latest").read_text() == f"step-{len(done):06d}"
    assert all(
        t.isfinite().all()
        for t in load_file(folder / f"step-{len(done):06d}" / "state.safetensors").values()
    )
    assert (
        len(list(folder.glob("step-*"))) == len(done)
        and not (world / "stopped" / "adapter").exists()
    )


def sft(world, model, out, batch, accumulate, *flags):
    """Four steps; the whole LLM, projector and tower train."""
    return run(
        world,
        "sft.py",
        "--model",
        model,
        "--data",
        "instruct.json",
        "--images",
        "images",
        "--steps",
        4,
        "--batch-size",
        batch,
        "--grad-accum",
        accumulate,
        "--lr",
        1e-4,
        "--projector-lr",
        1e-4,
        "--vision-lr",
        1e-4,
        "--save-every",
        2,
        "--out",
        out,
        *flags,
    )


def test_sft_accumulated_and_resumed(world, checkpoint):
    """The loss is a mean over the tokens of the whole batch, not a mean of means. Resumed bit for bit in the middle."""
    sft(world, checkpoint, "sft-four", 4, 1)
    sft(world, checkpoint, "sft-two", 2, 2)
    one = world / "sft-four"
    assert_near(one, world / "sft-two")
    start, end = (
        load_file(checkpoint / "model.safetensors"),
        load_file(one / "model" / "model.safetensors"),
    )
    moved = {name.split(".")[0] for name in start if (start[name] - end[name]).abs().max() > 5e-5}
    assert moved == {"language_model", "multi_modal_projector", "vision_tower"}
    assert metrics(one)[-1]["loss"] < metrics(one)[0]["loss"]

    again = world / "sft-again"
    shutil.copytree(one, again)
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints" / "step-000004")
    (again / "checkpoints" / "latest").write_text("step-000002")
    sft(world, checkpoint, "sft-again", 4, 1, "--resume")
    assert metrics(again) == metrics(one)
    for file in ("model/model.safetensors", "checkpoints/step-000004/state.safetensors"):
        assert (again / file).read_bytes() == (one / file).read_bytes(), file


# ---- the same numbers as TRL


def test_loss_is_that_of_trl(checkpoint, tmp_path):
    """TRL's own trainer, collator and loss on rows with pictures: same tokens, log-probs, loss, rewards and gradients.

    The policy is the checkpoint with noise on every weight of LLM and projector, so h is not 0.
    """
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    import transformers

    folder = pictures(tmp_path / "images")
    rows = [row for row in PAIRS if row[0] in ("a.png", "b.png")][
        :2
    ]  # squares: transformers does not pad to a square
    model, processor = checkpoints.load(checkpoint)
    examples = [
        processor.encode(Record("row", folder / image, (question,), (chosen, rejected)))
        for image, question, chosen, rejected in rows
    ]
    batch = processor.collate(examples)
    with torch.no_grad():
        reference = model.answer_log_probs(batch).view(-1, 2)
        torch.manual_seed(0)
        for p in (*model.llm.parameters(), *model.projector.parameters()):
            p.add_(torch.randn_like(p) * 0.02)
    checkpoints.save(model, processor, tmp_path / "policy")
    model.prepare()

    template = TEMPLATES[processor.template]
    dataset = datasets.Dataset.from_list(
        [
            {
                "prompt": "<s>"
                + template.start
                + template.user.replace("{}", f"<image>\n{question}"),
                "chosen": template.answer.replace("{}", chosen) + "</s>",
                "rejected": template.answer.replace("{}", rejected) + "</s>",
                "images": [str(folder / image)],
            }
            for image, question, chosen, rejected in rows
        ]
    ).cast_column("images", datasets.List(datasets.Image()))
    llava = transformers.LlavaForConditionalGeneration
    for theirs, ours, beta in (
        ("sigmoid", "dpo", 0.1),
        ("ipo", "ipo", 0.9),
        ("hinge", "slic", 0.02),
    ):
        config = trl.DPOConfig(
            output_dir=str(tmp_path / ours),
            loss_type=theirs,
            beta=beta,
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            use_cpu=True,
        )
        trainer = trl.DPOTrainer(
            llava.from_pretrained(tmp_path / "policy"),
            llava.from_pretrained(checkpoint),
            config,
            train_dataset=dataset,
            processing_class=transformers.AutoProcessor.from_pretrained(checkpoint),
        )
        inputs = trainer.data_collator([dict(row) for row in dataset])
        tokens = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])
        ]
        assert tokens == [
            torch.cat([e.prompt, e.answers[k]]).tolist() for k in (0, 1) for e in examples
        ]
        assert torch.allclose(inputs["pixel_values"][:2], batch.pixel_values, atol=1e-5)
        their_loss = trainer.compute_loss(trainer.model, inputs)
        their_loss.backward()

        model.zero_grad()
        chosen, rejected = model.answer_log_probs(batch).view(-1, 2).T
        losses, reward_chosen, reward_rejected = dpo_loss(
            chosen, rejected, *reference.T, beta, ours, batch.lengths.view(-1, 2).T
        )
        losses.mean().backward()
        logged = {k: v[-1] for k, v in trainer._metrics["eval"].items()}
        assert losses.mean().item() == pytest.approx(their_loss.item(), abs=1e-5)
        assert (
            abs(losses.mean().item() - {"dpo": 0.6931, "ipo": 0.3086, "slic": 1.0}[ours]) > 1e-2
        ), "h is 0: says little"
        for name, value in (
            ("logps/chosen", chosen),
            ("logps/rejected", rejected),
            ("rewards/chosen", reward_chosen),
            ("rewards/rejected", reward_rejected),
        ):
            assert logged[name] == pytest.approx(value.mean().item(), rel=1e-5, abs=1e-5), name
        grads = dict(trainer.model.named_parameters())
        for name, p in model.llm.model.named_parameters():
            theirs_grad = grads[f"model.language_model.{name}"].grad
            assert (p.grad - theirs_grad).norm() <= 1e-4 * theirs_grad.norm(), name
