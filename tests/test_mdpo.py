"""mdpo.py and corruption.py: the loss by hand and against TRL, the pictures, the first steps, what is refused."""

import json
import math
import random
import shutil
import sys

import pytest
import test_llava_next
import torch
from conftest import read_records
from PIL import Image
from safetensors.torch import load_file
from test_memory import batch, flags, small
from test_mpo import FIXED, double, tokens_of, trl_loss
from test_training import lines_of, train  # noqa: F401  (a fixture)

import corruption
import mdpo
import memory
import training
from common import BadInput
from corruption import Corruption, crop_box
from formats import checkpoints
from formats.files import ChangedImage, image_identity, image_size, open_image
from mdpo import mdpo_loss
from model import MLLM, pack
from noise import diffuse

# ---- the loss


SIX = FIXED | {"logp_imageless": double(-12, -22), "ref_imageless": double(-11.5, -23)}
SIX = {name.removeprefix("logp_"): values for name, values in SIX.items()}


def test_loss_by_hand():
    """R+ .2 and -.1, R- -.1 and .05, Rc -.05 and .1: margins .3, -.15; .25, -.2; .2, -.1."""
    losses, *rewards = mdpo_loss(**SIX, beta=0.1)
    soft = lambda x: math.log(1 + math.exp(-x))
    want = [soft(0.3) + soft(0.25) + soft(0.2), soft(-0.15) + soft(-0.2) + soft(-0.1)]
    assert losses.tolist() == pytest.approx(want)
    assert losses.mean().item() == pytest.approx(0.662656 + 0.687039 + 0.671268, abs=1e-6)
    assert [r.tolist() for r in rewards] == [
        pytest.approx(x) for x in ([0.2, -0.1], [-0.1, 0.05], [-0.05, 0.1])
    ]


def as_trl(values, beta):
    """Ours, and TRL's DPO three times: as it is; against y+ behind the crop; against its own reference.

    -> two pairs of the mean loss and its gradients (3, B) for y+, y- and y+ behind the crop.
    """
    leaves = {n: x.clone().requires_grad_(not n.startswith("ref")) for n, x in values.items()}
    ours = mdpo_loss(**leaves, beta=beta)[0].mean()
    ours.backward()
    names = ["chosen", "rejected", "imageless"]
    gradient = torch.stack([leaves[name].grad for name in names])

    B, total, theirs = len(values["chosen"]), 0.0, torch.zeros(3, len(values["chosen"]))
    lengths = torch.randint(1, 9, (2 * B,))
    against = (  # log pi and log pi_ref of what TRL takes for the rejected answer
        (values["rejected"], values["ref_rejected"]),
        (values["imageless"], values["ref_imageless"]),
        (values["ref_chosen"], values["ref_chosen"]),
    )
    for k, (policy, reference) in enumerate(against):
        sums = torch.cat([values["chosen"], policy])
        rows = tokens_of(sums, lengths, 9).requires_grad_()
        references = torch.cat([values["ref_chosen"], reference])
        loss, _ = trl_loss(["sigmoid"], [1.0], beta, rows, lengths, references)
        loss.backward()
        total += loss.item()
        theirs[0] += rows.grad[:B, 0]
        if k < 2:
            theirs[k + 1] = rows.grad[B:, 0]
    return (ours.item(), gradient), (total, theirs.double())


def test_fixed_pairs_as_trl():
    (ours, gradient), (theirs, their_gradient) = as_trl(SIX, 0.1)
    assert ours == pytest.approx(2.020963, abs=1e-6) and theirs == pytest.approx(ours, abs=1e-6)
    assert torch.allclose(gradient, their_gradient, atol=1e-6) and gradient.abs().min() > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_random_pairs_as_trl(seed):
    torch.manual_seed(seed)
    values = {name: -8 - 4 * torch.randn(6).double() for name in SIX}
    (ours, gradient), (theirs, their_gradient) = as_trl(values, 0.3)
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert torch.allclose(gradient, their_gradient, atol=1e-6)


# ---- corrupted pictures


def coordinates(width, height):
    """A picture in which red says how far right a pixel is, green how far down: 0 .. 255."""
    picture = Image.new("RGB", (width, height))
    for x in range(width):
        for y in range(height):
            picture.putpixel((x, y), (255 * x // (width - 1), 255 * y // (height - 1), 0))
    return picture


def test_crops():
    """1 to 20 % of the area, sides 3 : 4 to 4 : 3, anywhere, each seed its own."""
    boxes = [crop_box(480, 640, f"{i}") for i in range(2000)]
    shares, sides = [], []
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 640 and 0 <= top < bottom <= 480
        shares.append((right - left) * (bottom - top) / (640 * 480))
        sides.append((right - left) / (bottom - top))
    assert 0.0099 < min(shares) < 0.02 and 0.18 < max(shares) < 0.2015
    assert sum(shares) / 2000 == pytest.approx(0.105, abs=0.01)  # of a uniform share
    assert 0.73 < min(sides) < 0.78 and 1.29 < max(sides) < 1.36
    # of a uniform logarithm; a uniform ratio would give .027
    assert sum(map(math.log, sides)) / 2000 == pytest.approx(0, abs=0.013)
    assert min(b[0] for b in boxes) < 20 and max(b[2] for b in boxes) > 620
    assert len(set(boxes)) == 2000 and boxes[7] == crop_box(480, 640, "7")


def test_where_a_crop_may_lie():
    """Of a picture of 3 x 3 pixels it is one pixel, any of the nine, or two; of one row, a part of it."""
    found = {corruption.crop_box(3, 3, str(i)) for i in range(400)}
    assert found >= {(x, y, x + 1, y + 1) for x in range(3) for y in range(3)}
    assert {(c - a) * (d - b) for a, b, c, d in found} == {1, 2}
    assert all(0 <= a < c <= 3 and 0 <= b < d <= 3 for a, b, c, d in found)
    for height, width in ((1, 60), (60, 1)):
        boxes = {corruption.crop_box(height, width, str(i)) for i in range(200)} - {None}
        assert boxes and all(0 <= a < c <= width and 0 <= b < d <= height for a, b, c, d in boxes)


def test_a_crop_is_that_part_enlarged():
    picture, change = coordinates(80, 60), Corruption("crop", "a.json, row 3")
    left, top, right, bottom = crop_box(60, 80, change.seed)
    shown = change(picture)
    assert shown.size == picture.size and shown.tobytes() == change(picture).tobytes()
    red, green, _ = shown.getextrema()
    assert red == pytest.approx((255 * left / 79, 255 * (right - 1) / 79), abs=4)
    assert green == pytest.approx((255 * top / 59, 255 * (bottom - 1) / 59), abs=4)
    assert change(picture).tobytes() != Corruption("crop", "a.json, row 4")(picture).tobytes()


def test_noise_and_blank():
    picture = coordinates(40, 30)
    assert Corruption("blank", "0")(picture).getextrema() == ((0, 0),) * 3
    change = Corruption("noise", "0")
    generator = torch.Generator().manual_seed(random.Random("0").getrandbits(62))
    assert change(picture).tobytes() == diffuse(picture, 500, generator).tobytes()
    assert change(picture).tobytes() == change(picture).tobytes() != picture.tobytes()
    assert change(picture).tobytes() != Corruption("noise", "1")(picture).tobytes()


def test_a_corrupted_picture_is_a_picture(tmp_path):
    """It opens, is as large as EXIF says, and has a name of its own in caches."""
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    coordinates(40, 30).save(path, exif=exif)
    images = [ChangedImage(path, Corruption(kind, "0")) for kind in corruption.KINDS]
    images.append(ChangedImage(path, Corruption("crop", "1")))
    for image in images:
        assert image_size(image) == image_size(path) == (40, 30)
        assert open_image(image).size == (30, 40)
        assert open_image(image).tobytes() == image.change(open_image(path)).tobytes()
    assert len({image_identity(image) for image in [path, *images]}) == 5
    again = ChangedImage(path, Corruption("crop", "0"))
    assert again == images[0] and image_identity(again) == image_identity(images[0])


@pytest.mark.parametrize("kind", corruption.KINDS)
def test_tiles_are_cut_from_the_corrupted_picture(tmp_path, kind):
    """LLaVA-NeXT: as many tokens as the original takes; the tiles are those of the corrupted file."""
    next_model = test_llava_next.tiny_next()
    _, processor = checkpoints.load(test_llava_next.write(tmp_path / "m", next_model, chatml=False))
    for size in ((40, 60), (100, 19), (28, 28)):
        path, saved = tmp_path / f"{size}.png", tmp_path / f"{size}-changed.png"
        coordinates(*size).save(path)
        change = Corruption(kind, "0")
        change(coordinates(*size)).save(saved)
        pixels, shape = processor.decode(ChangedImage(path, change))
        assert processor.tokens_of(ChangedImage(path, change)) == processor.tokens_of(path)
        assert torch.equal(pixels, processor.pixels(saved)) and shape == size[::-1]


# ---- what is refused


def picture_rows(folder, sizes):
    """A POVID file of pairs about pictures of these sizes; None: a row without one."""
    (folder / "images").mkdir(exist_ok=True)
    rows = []
    for i, size in enumerate(sizes):
        if size:
            Image.effect_noise(size, 50).convert("RGB").save(folder / "images" / f"{i}.png")
        human = {"from": "human", "value": f"{'<image>' if size else ''}\nWhat is {i}?"}
        answers = ([human, {"from": "gpt", "value": x}] for x in (f"A cup {i}.", "A dog."))
        chosen, rejected = answers
        rows.append({"conversations": chosen, "rejected_conversations": rejected})
        rows[-1] |= {"image": f"{i}.png"} if size else {}
    (folder / "povid.json").write_text(json.dumps(rows))


@pytest.mark.parametrize(
    "sizes, said",
    [
        ([(60, 40), None], "povid.json, row 1: no image, which mDPO would corrupt"),
        ([(60, 40), (1, 1)], "row 1: its picture of 1 x 1 pixels is smaller than its crop"),
        ([(60, 40), (1000, 6)], "row 1: its picture of 1000 x 6 pixels is smaller than its crop"),
    ],
)
def test_rows_that_cannot_be_used(train, tmp_path, sizes, said):  # noqa: F811
    picture_rows(tmp_path, sizes)
    with pytest.raises(BadInput, match=said):
        train(mdpo, "run", "--steps", 1)
    assert not (tmp_path / "run").exists()
    out = train(mdpo, "run", "--steps", 1, "--skip-bad-rows", "--batch-size", 1)
    (skipped,) = json.loads((out / "skipped.json").read_text())
    assert (skipped["row"], skipped["file"]) == (1, "povid.json")
    assert lines_of(out)[0]["loss"] == pytest.approx(3 * math.log(2), abs=1e-5)


def test_any_picture_can_be_blank(train, tmp_path):  # noqa: F811
    picture_rows(tmp_path, [(60, 40), (1, 1)])
    train(mdpo, "run", "--steps", 1, "--corrupt", "blank")


def test_a_chosen_answer_is_not_cut(train):  # noqa: F811
    with pytest.raises(BadInput, match="row .: prompt of .* the limit is 30"):
        train(mdpo, "cut", "--max-length", 30, "--steps", 1)


# ---- a run


FIVE = [(28, 28), (60, 40), (50, 30), (31, 47), (64, 64)]
FLAGS = ["--lora-rank", 2, "--lr", 1e-2, "--beta", 0.5, "--save-every", 2]


@pytest.fixture
def run(train, tmp_path):  # noqa: F811
    """`train` on five pairs, each with a picture of its own."""
    picture_rows(tmp_path, FIVE)
    return lambda out, *flags: train(mdpo, out, *flags)


def by_hand(checkpoint, kind, seed, projector, beta):
    """Means over all pairs in float64, one row an answer, from whole logits; a policy with this projector."""
    model, processor = checkpoints.load(checkpoint)
    policy = checkpoints.load(checkpoint)[0]
    for name, p in policy.projector.named_parameters():
        p.data.copy_(projector.get(f"model.projector.{name}", p.data))
    for m in (model, policy):
        m.double()
        m.dtype = torch.float64
    found = []
    for record in read_records(["povid.json"], "images"):
        example = processor.encode(record)
        picture = open_image(record.image)
        shown = Corruption(kind, f"{seed}/{record.where}")(picture)
        scores = []
        for m in (policy, model):
            for answer, image in zip((0, 1, 0), (picture, picture, shown)):
                ids = torch.cat([example.prompt, example.answers[answer]])[None]
                with torch.no_grad():
                    x = m.embed(ids, processor.pixels(image)[None].double())
                    log_p = m.llm(inputs_embeds=x).logits[0].log_softmax(-1)
                at = len(example.prompt) - 1
                scores.append(log_p[at:-1].gather(-1, ids[0, at + 1 :, None]).sum().item())
        chosen, rejected, shown = (beta * (scores[i] - scores[i + 3]) for i in range(3))
        soft = lambda x: math.log(1 + math.exp(-x))
        loss = soft(chosen - rejected) + soft(chosen - shown) + soft(chosen)
        found.append([loss, chosen, rejected, shown, *scores[:3]])
    return [sum(column) / len(found) for column in zip(*found)]


@pytest.mark.parametrize("kind", corruption.KINDS)
def test_first_steps_by_hand(run, checkpoint, kind):
    """Step 0 is 3 ln 2, and step 1 that of the projector that step 0 left, with the same pictures."""
    rates = ["--lr", 0, "--projector-lr", 1e-2, "--beta", 0.5, "--save-every", 1, "--seed", 7]
    out = run("run", *rates, "--steps", 2, "--batch-size", 5, "--corrupt", kind)
    first, second = lines_of(out)
    assert first["loss"] == pytest.approx(2.0794, abs=1e-4)
    moved = load_file(out / "checkpoints" / "step-000001" / "state.safetensors")
    keys = ["loss", "rewards/chosen", "rewards/rejected", "rewards/imageless_chosen"]
    keys += ["logps/chosen", "logps/rejected", "logps/imageless_chosen"]
    for line, projector in ((first, {}), (second, moved)):
        want = by_hand(checkpoint, kind, 7, projector, 0.5)
        assert [line[k] for k in keys] == pytest.approx(want, rel=1e-4, abs=3e-5)
        margin = line["rewards/chosen"] - line["rewards/imageless_chosen"]
        assert line["rewards/imageless_margins"] == pytest.approx(margin, abs=1e-6)
    assert abs(second["loss"] - first["loss"]) > 1e-2
    assert abs(second["rewards/imageless_margins"]) > 1e-3


def test_all_passes_see_the_same_pictures(run, monkeypatch):
    """What the tower is given: once for the reference, once for each of two epochs."""
    seen, real = {}, MLLM.image_features

    def watched(self, pixel_values, image_sizes=None):
        for pixels in pixel_values:
            key = pixels.numpy().tobytes()
            seen[key] = seen.get(key, 0) + 1
        return real(self, pixel_values, image_sizes)

    monkeypatch.setattr(MLLM, "image_features", watched)
    run("run", *FLAGS, "--epochs", 2, "--batch-size", 2)
    assert sorted(seen.values()) == [3] * 10  # five pictures and their five crops


def test_corrupted_pictures_are_decoded_ahead(run, monkeypatch):
    """By the threads, each with its original's step."""
    asked, real = [], training.batches

    def watched(step, args, out, processor, *more, **named):
        found = real(step, args, out, processor, *more, **named)
        ahead = [*processor.prefetch.begun, *processor.prefetch.kept]
        asked.append((named["beside"], set(ahead)))
        return found

    monkeypatch.setattr(training, "batches", watched)
    run("run", *FLAGS, "--steps", 1, "--batch-size", 5, "--workers", 1)
    corrupted, ahead = asked[0]
    assert {e.record.image for e in corrupted} <= ahead and len(corrupted) == 5


def test_a_run_of_llava_next(run, tmp_path):
    """Rows of different numbers of tiles, each beside its corrupted picture's tiles."""
    model = test_llava_next.write(tmp_path / "next", test_llava_next.tiny_next(), chatml=False)
    flags = ["--model", model, *FLAGS, "--projector-lr", 1e-3, "--steps", 3, "--batch-size", 3]
    first, *_, last = lines_of(run("run", *flags))
    assert first["loss"] == pytest.approx(3 * math.log(2), abs=1e-4)
    assert abs(first["logps/imageless_chosen"] - first["logps/chosen"]) > 1e-3
    assert last["loss"] < first["loss"] and last["rewards/imageless_chosen"] != 0


def test_each_corruption_has_its_reference(run, capsys):
    """Kind and seed; a second run finds its own."""
    kinds = [["--corrupt", kind] for kind in corruption.KINDS] + [["--seed", 1]]
    for again in (False, True):
        for i, more in enumerate(kinds):
            run(f"{i} {again}", *FLAGS, *more, "--steps", 1)
            assert ("from the cache:" in capsys.readouterr().err) == again


def test_resume_is_bit_equal(run, tmp_path):
    flags = [*FLAGS, "--steps", 4, "--batch-size", 2, "--grad-accum", 2]
    out = run("run", *flags)
    again = tmp_path / "again"
    shutil.copytree(out, again)
    (again / "checkpoints" / "latest").write_text("step-000002")
    shutil.rmtree(again / "checkpoints" / "step-000004")
    shutil.rmtree(again / "adapter")
    run("again", *flags, "--resume")
    timeless = lambda out: [{k: v for k, v in x.items() if "sec" not in k} for x in lines_of(out)]
    assert timeless(again) == timeless(out)
    for file in ("adapter/adapter_model.safetensors", "checkpoints/step-000004/state.safetensors"):
        assert (again / file).read_bytes() == (out / file).read_bytes(), file


def test_one_micro_batch_or_two(run):
    lines = []
    for size, parts in ((4, 1), (2, 2)):
        flags = [*FLAGS, "--batch-size", size, "--grad-accum", parts, "--steps", 2]
        lines.append(lines_of(run(f"{size}", *flags))[1])
    for name in ("loss", "grad_norm", "rewards/imageless_margins"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-4, abs=1e-5)


def test_defaults(monkeypatch):
    """The paper's: lr 1e-5, three epochs of batches of 32; its code's LoRA of rank 64, projector frozen."""
    monkeypatch.setattr(sys, "argv", "mdpo.py --model m --data d.json".split())
    args = mdpo.parse()
    assert (args.lr, args.projector_lr, args.epochs, args.beta) == (1e-5, 0, 3, 0.1)
    assert (args.lora_rank, args.batch_size * args.grad_accum, args.corrupt) == (64, 32, "crop")


# ---- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", [{"lora_rank": 8}, {"lora_rank": 0}, {"lr": 0}])
def test_memory_counts_the_second_row(dtype, trains):
    """Tensors that autograd keeps for two pairs and their two second rows: within 5 %, and not below."""
    args, model = flags(**trains), small("llama", dtype)
    pairs, load = batch()
    rows = pairs.input_ids[:, : load.prompt]
    answers = pairs.targets.view(2, 2, -1)
    prompts, both = [], []
    for row, (chosen, rejected) in zip(rows, answers):
        prompts += [row, row]
        both += [[chosen, rejected], [chosen]]
    four = pack(prompts, both, None, torch.randn(4, 3, 56, 56))
    counted = memory.training(model, args, load, memory.Plan(views=2))

    rank, whole = args.lora_rank if args.lr else 0, bool(args.lr) and not args.lora_rank
    twice = memory.Load(2 * load.rows, *list(vars(load).values())[1:])
    kept, _ = memory.activations(model, twice, rank, whole, False)
    kept += memory.tower(model, twice)[0]
    assert counted == memory.training(model, args, twice)

    model.prepare(args.lora_rank, llm=args.lr > 0).train()
    own = {p.untyped_storage().data_ptr() for p in model.state_dict().values()}
    saved = {}
    save = lambda x: saved.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage()) and x
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        model.answer_log_probs(four).sum()
    alive = sum(storage.nbytes() for where, storage in saved.items() if where not in own)
    assert 0.99 * alive < kept < 1.07 * alive


def test_the_run_says_it(run, capsys):
    """Two pairs are four rows; flags that help count them, too."""
    run("run", *FLAGS, "--steps", 1, "--batch-size", 2)
    assert " 4 x " in capsys.readouterr().err.split("memory: ")[1].split(" tokens)")[0]
    load, args = memory.Load(4, 821, 621, 200), flags(batch_size=4, grad_accum=1)
    model = small("llama", torch.bfloat16)
    room = sum(memory.peak(model, args, load, memory.Plan(views=2)).values()) * 0.7
    line = memory.says(model, args, load, "cpu", room, memory.Plan(views=2))
    assert "8 x 821 tokens" in line and "It does not fit: " in line
