"""Another device gives the CPU's numbers: log-probs, gradients, samples, checkpoints, whole runs of the scripts.

`python -m pytest -q tests --device cuda` runs these tests there, and no others. Without the flag the same bodies run on the
CPU, which shows that they run, not that a GPU agrees. One model is built twice, on the CPU and on the device, in float32
without TensorFloat-32; what differs is rounding.
"""

import json
import math
import shutil
from types import SimpleNamespace

import conftest
import pytest
import torch
from elsewhere import Elsewhere
from test_dpo import metrics
from test_model import (
    IMAGE,
    LLMS,
    SLIDING,
    STOP,
    assert_same,
    head,
    ids,
    perturb,
    pixels,
    plain_log_probs,
    prompts,
    row_error,
    with_gradients,
)
from test_grpo import evenly, problems  # noqa: F401
from test_grpo import run as run_grpo  # noqa: F401
from test_online_dpo import by, files, run  # noqa: F401
from test_ppo import command as run_ppo  # noqa: F401

import bdhs
import dpo
import mdpo
import model as modelling
import mpo
import nf4
import sampling
import training
from formats.anyres import AnyRes
from model import MLLM, fused_log_probs, pack

ANYRES = AnyRes(((28, 56), (56, 28), (56, 56)), 28, 2)  # the tower of `build`: 2 patches a side


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """PyTorch lets cuDNN round float32 to TensorFloat-32; CLIP's patch embedding is a convolution."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def twice(build, device):
    """A function that makes the same model on the CPU and on the device.

    prepare: what to train, moved away from where it starts.
    """

    def make(kind="llama", dtype=torch.float32, prepare=None, tiles=False, quantise=False, **more):
        models = []
        for where in ("cpu", device):
            model = build(kind, dtype, **more)
            if tiles:
                model = MLLM(model.vision, model.projector, model.llm, IMAGE, anyres=ANYRES)
                model.image_newline.data.normal_(generator=torch.Generator().manual_seed(0))
            if quantise:
                nf4.quantise_linears(model.llm)
            models.append(model.to(where))
            if prepare is not None:
                model.prepare(**prepare)
        torch.manual_seed(0)
        if prepare is not None:
            perturb(models[0])
            models[1].load_state_dict(models[0].state_dict())
        return models

    return make


def pairs(k=2, high=9):
    """Three prompts, two of them with a picture, and k answers of each, of unequal lengths."""
    answers = [[ids(1 + (5 * i + 3 * j) % high) for j in range(k)] for i in range(3)]
    return pack(prompts(), answers, pixel_values=pixels())


def dpo_gradients(model, batch):
    """The loss of dpo.py on a batch, against a reference that is the same everywhere, and its gradients on the CPU."""
    batch = batch.to(model.device)
    chosen, rejected = model.answer_log_probs(batch).view(-1, 2).T
    reference = torch.tensor([[-9.0, -14.0, -20.0], [-13.0, -8.0, -21.0]], device=model.device)
    losses, *_ = dpo.dpo_loss(chosen, rejected, *reference, 0.1)
    model.zero_grad()
    losses.sum().backward()
    grads = {n: None if p.grad is None else p.grad.cpu() for n, p in model.named_parameters()}
    return losses.sum().detach().cpu(), grads


def assert_same_samples(got, want):
    """Token for token; log-probs up to rounding."""
    assert [[t.tolist() for t in row] for row in got.tokens] == [
        [t.tolist() for t in row] for row in want.tokens
    ]
    assert got.finished == want.finished
    for mine, theirs in zip(got.log_probs, want.log_probs):
        for a, b in zip(mine, theirs):
            assert (a - b).abs().max() <= 1e-4


def test_another_device_runs_only_what_depends_on_it():
    items = [SimpleNamespace(fixturenames=names) for names in (["build"], ["build", "device"])]
    left_out = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    for name, want in (("cpu", 2), ("cuda", 1)):
        config = SimpleNamespace(getoption=lambda flag: name, hook=hook)
        kept = items.copy()
        conftest.pytest_collection_modifyitems(config, kept)
        assert kept == items[-want:]
    assert left_out == items[:1]
    missing = SimpleNamespace(getoption=lambda flag: "cuda:99")
    with pytest.raises(pytest.UsageError, match="--device cuda:99 cannot be used: "):
        conftest.pytest_configure(missing)


# ---- log-probs and gradients


@pytest.mark.parametrize("kind, more", LLMS)
@torch.no_grad()
def test_log_probs_of_shared_prompts(twice, device, kind, more):
    here, there = twice(kind, **more)
    batch = pairs(4)
    for got, want in zip(there.log_probs(batch.to(device)), here.log_probs(batch)):
        assert (
            got.device.type == torch.device(device).type and (got.cpu() - want).abs().max() <= 1e-4
        )
    answers = there.answer_log_probs(batch.to(device)).cpu()
    assert torch.allclose(answers, here.answer_log_probs(batch), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind, more", [LLMS[0], LLMS[2], ("qwen2", SLIDING)])
@pytest.mark.parametrize("rank", [3, 0])
def test_gradients_of_dpo(twice, kind, more, rank):
    here, there = twice(kind, prepare={"lora_rank": rank}, **more)
    batch = pairs()
    want, got = dpo_gradients(here, batch), dpo_gradients(there, batch)
    assert_same(got, want, 2e-4)
    assert sum(g is not None for g in got[1].values()) >= 20

    calls = []
    there.llm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    there.train()
    there.llm.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(dpo_gradients(there, batch), got, 1e-4)
    assert len(calls) == 2, "nothing was computed again"


def test_a_micro_batch_waits_for_nothing(twice, device):
    """Copy, forward and backward pass of a DPO step: on CUDA a synchronising call raises."""
    _, model = twice(prepare={"lora_rank": 2})
    batch, reference = pairs(), torch.zeros(3, 2)
    for watched in (False, True):  # the first pass may set things up
        if watched and device != "cpu":
            torch.cuda.set_sync_debug_mode("error")
        try:
            moved = batch.to(device)
            logp = model.answer_log_probs(moved).view(-1, 2).T
            ref = reference.T.to(device, non_blocking=True)
            lengths = moved.lengths.view(-1, 2).T
            losses, *_ = dpo.dpo_loss(*logp, *ref, 0.1, "ipo", lengths)
            losses.sum().backward()
        finally:
            if device != "cpu":
                torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all()


@torch.no_grad()
def test_tiles(twice, device):
    """LLaVA-NeXT: pictures of different numbers of tiles, in training's rows and when sampling."""
    here, there = twice(tiles=True)
    sizes = torch.tensor([[28, 50], [60, 20], [40, 40]])
    tokens = [ANYRES.tokens(size) for size in sizes.tolist()]
    tiles = [1 + rows * columns for rows, columns in map(ANYRES.grid, sizes.tolist())]
    assert len(set(tokens)) == 3 and len(set(tiles)) == 2
    rows = [torch.cat([ids(3), torch.full((n,), IMAGE), ids(4)]) for n in tokens]
    images = torch.randn(sum(tiles), 3, 28, 28)
    batch = pack(rows, [[ids(4), ids(2)]] * 3, None, images, image_sizes=sizes)
    got = there.image_features(images.to(device), sizes)
    for a, b in zip(got, here.image_features(images, sizes), strict=True):
        assert (a.cpu() - b).abs().max() <= 1e-4
    got, want = there.log_probs(batch.to(device))[0], here.log_probs(batch)[0]
    assert (got.cpu() - want).abs().max() <= 1e-4
    how = {"max_new_tokens": 8, "temperature": 0, "image_sizes": sizes}
    assert_same_samples(
        sampling.sample(there, rows, images, **how), sampling.sample(here, rows, images, **how)
    )


@pytest.mark.parametrize("p", [0.5, 0.99, 0.9999])
def test_fused_log_probs_in_float32(device, p):
    h, weight, targets = head(p, torch.float32)
    incoming = torch.ones(len(h), dtype=torch.float64)
    truth = with_gradients(plain_log_probs, h.double(), weight.double(), targets, incoming)
    given = [t.to(device) for t in (h, weight, targets, incoming)]
    ours = [t.cpu() for t in with_gradients(fused_log_probs, *given)]
    assert ((ours[0] - truth[0]).abs() / truth[0].abs().clamp(min=1)).max() <= 3e-6
    assert (ours[1] - truth[1]).abs().max() <= 1e-5
    assert row_error(ours[2], truth[2]).max() <= 1e-6 * weight.norm(dim=1).mean()
    assert row_error(ours[3], truth[3]).max() <= 1e-6 * h.norm(dim=1).mean()


@pytest.mark.parametrize("p", [0.5, 0.99, 0.9999])
def test_fused_log_probs_in_bfloat16(device, p):
    """On CUDA a product of bfloat16 with a float32 sum. As on the CPU: as near to float64 as autograd, but for chance."""
    h, weight, targets = head(p, torch.bfloat16)
    for incoming in (torch.ones(len(h)).double(), torch.randn(len(h)).double()):
        truth = with_gradients(plain_log_probs, h.double(), weight.double(), targets, incoming)
        given = [t.to(device) for t in (h, weight, targets, incoming)]
        ours = [t.cpu() for t in with_gradients(fused_log_probs, *given)]
        plain = [t.cpu() for t in with_gradients(plain_log_probs, *given)]
        for i in (0, 1):
            ours_off, plain_off = ((x[i] - truth[i]).abs().mean() for x in (ours, plain))
            assert ours_off <= 1.05 * plain_off, i
        for i in (2, 3):
            ours_off, plain_off = (row_error(x[i], truth[i]).mean() for x in (ours, plain))
            assert ours_off <= 1.01 * plain_off, i


# ---- a base in 4 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_are_those_of_the_cpu(device, dtype):
    """The same codes for the same weights, and for the same codes the same values, bit for bit."""
    linear = torch.nn.Linear(200, 300, bias=False)
    torch.nn.init.normal_(linear.weight, std=0.02)
    linear.requires_grad_(False).to(dtype)
    here = nf4.NF4Linear(linear).copy_(linear.weight)
    there = nf4.NF4Linear(linear.to(device)).copy_(linear.weight)
    assert torch.equal(there.codes.cpu(), here.codes)
    assert torch.equal(here.to(device).dequantise().cpu(), here.to("cpu").dequantise())


def test_gradients_and_answers_of_a_4_bit_base(twice):
    """qwen2 has biases."""
    here, there = twice("qwen2", prepare={"lora_rank": 3}, quantise=True)
    batch = pairs()
    want, got = dpo_gradients(here, batch), dpo_gradients(there, batch)
    assert_same(got, want, 2e-4)
    assert sum(g is not None for g in got[1].values()) >= 20
    rows, images = prompts(), pixels()
    how = {"max_new_tokens": 12, "temperature": 0, "stop_ids": STOP}
    assert_same_samples(
        sampling.sample(there, rows, images, **how), sampling.sample(here, rows, images, **how)
    )


# ---- bfloat16


def far(model, batch, truth):
    """How far the log-probs of a bfloat16 model are from those of float32, on average."""
    return (model.log_probs(batch.to(model.device))[0].cpu() - truth).abs().mean()


@torch.no_grad()
def test_prefix_attention_in_bfloat16(twice, device, build, monkeypatch):
    """No farther from float32 than with one dense mask, and than on the CPU."""
    batch = pack(prompts(), [[ids(40), ids(30)]] * 3, pixel_values=pixels())
    truth = build().log_probs(batch)[0]
    here, there = twice(dtype=torch.bfloat16)
    moved, plain = batch.to(device), modelling.mask_and_prefix
    assert plain(moved, there.llm.config, moved.index)[1] == 3
    ours, cpu = far(there, batch, truth), far(here, batch, truth)
    monkeypatch.setattr(modelling, "mask_and_prefix", lambda *args: (plain(*args)[0], 0))
    dense = far(there, batch, truth)
    assert 0 < ours <= 1.25 * min(dense, cpu), (ours, dense, cpu)


def test_training_in_bfloat16_points_where_float32_does(twice):
    """The step that a GPU takes by default: frozen weights bfloat16, gradients float32."""
    here, _ = twice(prepare={"lora_rank": 3})
    _, there = twice(dtype=torch.bfloat16, prepare={"lora_rank": 3})
    trains = training.trainable(here)
    there.load_state_dict({n: p.detach() for n, p in trains.items()}, strict=False)
    batch = pairs()
    want, got = dpo_gradients(here, batch)[1], dpo_gradients(there, batch)[1]
    assert all(got[n].dtype == torch.float32 for n in trains)
    a, b = (torch.cat([grads[n].flatten() for n in trains]) for grads in (got, want))
    assert torch.cosine_similarity(a, b, dim=0) > 0.99
    assert 0.9 < a.norm() / b.norm() < 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_reference_is_the_base(twice, device, dtype):
    _, there = twice(dtype=dtype)
    batch = pairs().to(device)
    start = there.log_probs(batch)[0]
    there.prepare(lora_rank=4)
    # a GPU adds up in another order where LoRA flattens a layer's input
    rounding = 1e-5 if dtype == torch.float32 else 0.1
    assert (there.log_probs(batch)[0] - start).abs().max() <= rounding
    perturb(there)
    moved = (there.log_probs(batch)[0] - start).abs().max()
    with there.reference() as reference:
        assert (reference.log_probs(batch)[0] - start).abs().max() <= rounding < moved / 2


def root_mean_square(x):
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_log_probs_depend_on_the_rest_of_the_batch_by_rounding(build, device, dtype):
    """dpo.py's reference was scored beside other rows, so its step 0 is ln 2 up to rounding.

    Two bfloat16 passes over the same answer differ like two independent errors of bfloat16.
    """
    n = 16
    picture = torch.full((4,), IMAGE)
    rows = [torch.cat([ids(2 + i % 5), picture, ids(3)]) for i in range(n)]
    answers = [[ids(1 + (7 * i + 3 * k) % 23) for k in (0, 1)] for i in range(n)]
    images = pixels(n)

    def score(model, size):
        parts = [slice(i, i + size) for i in range(0, n, size)]
        batches = [pack(rows[s], answers[s], pixel_values=images[s]) for s in parts]
        moved = [batch.to(model.device) for batch in batches]
        return torch.cat([model.answer_log_probs(b).view(-1, 2) for b in moved]).double().cpu()

    truth, model = score(build(dtype=torch.float64), n), build(dtype=dtype).to(device)
    reference, policy = score(model, 4), score(model, 1)
    error, moved = root_mean_square(reference - truth), root_mean_square(policy - reference)
    assert error <= (1e-4 if dtype == torch.float32 else 0.2)
    assert 0 < moved <= math.sqrt(2) * error

    beta = 0.1
    losses, *_ = dpo.dpo_loss(*policy.T, *reference.T, beta)
    assert abs(losses.mean().item() - math.log(2)) <= beta * error  # as dpo.py says
    assert (losses - math.log(2)).abs().max() <= 4 * beta * error


# ---- sampling


@pytest.mark.parametrize("kind, more", LLMS)
def test_greedy_answers(twice, kind, more):
    """Answers that end at different lengths, of unequal prompts with pictures and without."""
    here, there = twice(kind, **more)
    rows, images = [*prompts(), *prompts()], pixels(4)
    for stop in (STOP, ()):
        how = {"max_new_tokens": 16, "temperature": 0, "stop_ids": stop}
        want = sampling.sample(here, rows, images, **how)
        assert_same_samples(sampling.sample(there, rows, images, **how), want)
    assert len({t for row in want.tokens for t in row[0].tolist()}) > 5, "it repeats itself"


@pytest.mark.parametrize("kind, more", LLMS)
def test_short_answers_in_rows(twice, kind, more):
    """Several questions of a picture, answered side by side there and each in a row of its own here."""
    here, there = twice(kind, **more)
    rows, images = prompts(), pixels()
    given = [[(ids(6), [6]), (ids(3), [3])], [(ids(4), [4])], [(ids(n), [n]) for n in (5, 2, 1)]]
    how = {"max_new_tokens": 8, "temperature": 0, "given": given, "stop_ids": STOP}
    want = sampling.sample(here, rows, images, **how)
    assert_same_samples(sampling.sample(there, rows, images, in_rows=True, **how), want)


def test_given_texts_and_hidden_pictures(twice):
    """BDHS: continued from several cuts, behind a picture of which half is hidden, then all of it."""
    here, there = twice()
    rows, images = prompts(), pixels()
    given = [[(ids(6), [0, 2, 5]), (ids(3), [3])], [(ids(4), [1, 4])], [(ids(5), [2])]]
    mask = torch.zeros(3, 14, dtype=torch.bool)
    for b, row in enumerate(rows):
        mask[b, : len(row)] = (row == IMAGE) & (torch.arange(len(row)) % 2 == 0)
    how = {"max_new_tokens": 12, "temperature": 0, "masked": mask, "given": given}
    assert_same_samples(
        sampling.sample(there, rows, images, **how), sampling.sample(here, rows, images, **how)
    )

    for b, row in enumerate(rows):
        mask[b, : len(row)] = row == IMAGE
    one = sampling.sample(there, rows, images, **how)
    assert_same_samples(sampling.sample(there, rows, pixels() * 2, **how), one)
    shown = sampling.sample(there, rows, images, **(how | {"masked": None}))
    assert not torch.allclose(shown.log_probs[0][0][:1], one.log_probs[0][0][:1], atol=1e-3)


def test_drawn_answers(twice, device):
    """The device's own generator: a seed repeats itself, and the log-probs are those that training will find."""
    _, there = twice()
    rows, images = prompts(), pixels()
    how = {"k": 5, "max_new_tokens": 15, "temperature": 0.8, "stop_ids": STOP}
    draw = lambda seed: sampling.sample(
        there, rows, images, **how, generator=torch.Generator(device).manual_seed(seed)
    )
    samples, again, other = draw(0), draw(0), draw(1)
    flat = lambda s: [t.tolist() for row in s.tokens for t in row]
    assert flat(samples) == flat(again) != flat(other)
    with torch.no_grad():
        log_p, _ = there.log_probs(pack(rows, samples.tokens, pixel_values=images).to(device))
    drawn = torch.cat([t for row in samples.log_probs for t in row])
    assert (log_p.cpu() - drawn).abs().max() <= 1e-4


# ---- checkpoints and whole runs


def test_checkpoint_goes_on_bit_for_bit(device, build, tmp_path):
    """Parameters, the optimizer's state where it was, and the random numbers of the CPU and of the device.

    The gradients are given: those of a model vary on a GPU in the last bit, for atomic sums have no order.
    """

    def step(model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in training.trainable(model).values():
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        training.take_step(optimizer, 1.0)
        return {n: p.detach().clone() for n, p in training.trainable(model).items()}

    runs = []
    for _ in range(2):
        model = build().to(device).prepare(lora_rank=2)
        runs.append((model, training.optimizer_for(model, 1e-2, 1e-3)))
    (model, optimizer), (resumed, other) = runs
    step(model, optimizer, 0)
    training.save_checkpoint(tmp_path, 1, model, optimizer)
    draws = lambda: (torch.rand(4), torch.rand(4, device=device))
    state = lambda o: [o.state[p] for g in o.param_groups for p in g["params"]]
    want, places = draws(), [{k: v.device for k, v in s.items()} for s in state(optimizer)]
    want_step = step(model, optimizer, 1)

    assert training.load_checkpoint(tmp_path, resumed, other) == 1
    assert all(torch.equal(a, b) for a, b in zip(draws(), want))
    assert [{k: v.device for k, v in s.items()} for s in state(other)] == places
    got_step = step(resumed, other, 1)
    assert all(torch.equal(got_step[n], p) for n, p in want_step.items())


@pytest.mark.parametrize(
    "script, more",
    [
        (dpo, []),
        (dpo, ["--gradient-checkpointing"]),
        (dpo, ["--lora-rank", "0"]),
        (dpo, ["--average-log-prob", "--beta", "5"]),
        (mpo, []),
        (mdpo, []),
    ],
)
def test_scripts_take_the_steps_of_the_cpu(device, run, files, script, more):  # noqa: F811
    """The command line, reference pass included, and its files."""
    outs = []
    for where in ("cpu", device):
        shutil.rmtree(files / ".cache", ignore_errors=True)  # the other device's reference
        outs.append(files / f"{script.__name__}-{len(outs)}{''.join(more)}")
        flags = ["--dtype", "float32", "--steps", 4, "--device", where, *more]
        run(outs[-1].name, *flags, script=script)
    for want, got in zip(*map(metrics, outs), strict=True):
        if want["step"] == 0:
            for name in [n for n in want if n.endswith("accuracies")]:
                want[name] = got[name] = 0  # of rewards near 0
        assert got == pytest.approx(want, rel=5e-3, abs=5e-3)
    first, *_, last = metrics(outs[0])
    assert last["loss"] < first["loss"] - 0.003, "nothing was trained: says little"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_online_scripts_start_at_ln_2(device, run, files, dtype):  # noqa: F811
    """Both draw from the policy on the device and take two steps; the policy is the reference at step 0."""
    where = ["--device", device, "--dtype", dtype, "--steps", 2]
    lines, _ = run(f"online-{dtype}", *where, annotator=by(len))
    assert len(lines) == 2 and lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    lines, _ = run(f"bdhs-{dtype}", "--online", "--max-new-tokens", 6, *where, script=bdhs)
    assert len(lines) == 2 and lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ppo_starts_at_the_reference(device, run_ppo, dtype):  # noqa: F811
    """Policy, reference, values and reward model on the device, two steps."""
    out = run_ppo("out", "--device", device, "--dtype", dtype, "--steps", "2")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and abs(lines[0]["objective/kl"]) <= (
        1e-5 if dtype == "float32" else 0.1
    )


@pytest.mark.parametrize("variant", ["grpo", "gspo"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grpo_starts_at_0(device, run_grpo, dtype, variant):  # noqa: F811
    """With a gradient; of two minibatches the first has ratios of 1, as its answers are scored again."""
    where = ["--device", device, "--dtype", dtype, "--variant", variant, "--kl-coef", 0.1]
    (first, second), _ = run_grpo("one", *where, score=evenly)
    rounding = 1e-5 if dtype == "float32" else 0.05
    assert abs(first["loss"]) < rounding < first["grad_norm"] and abs(first["kl"]) < rounding
    assert second["grad_norm"] > 0
    lines, _ = run_grpo("two", *where, "--minibatches", 2, "--lr", 1e-9, score=evenly)
    assert lines[0]["clip_ratio/region_mean"] == 0 or (dtype, variant) == ("bfloat16", "gspo")


# ---- a device that is not there: what would be on two of them


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("in_rows", [False, True])
def test_sampling_stays_on_the_models_device(build, kind, in_rows):
    """Every tensor that decoding makes, with a sliding window, hidden images, given texts and watched tokens."""
    model = build(kind, **{"mistral": {"sliding_window": 5}, "llama": {}}[kind])
    rows = [torch.tensor([1, 5, *[IMAGE] * 4, 7, 8]), torch.tensor([3, 4, 5])]
    hidden = torch.zeros(2, 8, dtype=torch.bool)
    hidden[0, 2:4] = True
    given = [[(torch.tensor([4, 5]), [0, 2])], [(torch.tensor([6]), [1])]]
    how = {"k": 2, "max_new_tokens": 6, "temperature": 0.0 if in_rows else 1.0, "watch": (3, 4)}
    how |= {"masked": hidden, "given": given, "stop_ids": range(30), "in_rows": in_rows}
    picture = torch.randn(1, 3, 28, 28)
    draw = lambda: sampling.sample(
        model, rows, picture, generator=torch.Generator().manual_seed(1), **how
    )
    want = draw()
    with Elsewhere(model):
        assert str(draw()) == str(want)


def test_scores_stay_on_the_models_device(build):
    """Batches that are moved there, log-probs and the values of a head."""
    model = build()
    model.prepare(lora_rank=2, projector=False)
    model.add_head("reward")
    rows = [torch.tensor([1, 5, *[IMAGE] * 4, 7, 8]), torch.tensor([3, 4, 5])]
    answers = [[torch.tensor([4, 5]), torch.tensor([6])], [torch.tensor([8, 9]), torch.tensor([2])]]
    batch = pack(rows, answers, pixel_values=torch.randn(1, 3, 28, 28))
    batch.weights = torch.rand(len(batch.targets))
    with torch.no_grad():
        want = model.answer_log_probs(batch)
        with Elsewhere(model) as there:
            on = batch.to(model.device)
            found = model.answer_log_probs(on)
            values = model.values(on, on.last, "reward")
            assert there.holds(found) and there.holds(values)
        assert torch.equal(found, want)


def test_a_new_head_and_a_new_adapter_are_where_the_model_is(build):
    """In float32 beside weights in bfloat16; the head begins without bias."""
    model = build(dtype=torch.bfloat16)
    model.add_head("reward")
    assert not model.heads["reward"].bias.any() and model.heads["reward"].weight.any()
    model = model.to("meta")
    model.prepare(lora_rank=2, projector=False)
    model.add_head("value")
    new = [*model.parameters_of("value"), *model.parameters_of("policy")]
    assert {(p.device.type, p.dtype) for p in new} == {("meta", torch.float32)}
