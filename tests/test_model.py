"""model.py against the plain way: log-softmax of all logits, a padded row an answer, a full forward pass a token."""

import contextlib
import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import CLIP, scatter
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, CLIPVisionModel

import memory
import sampling
from attention import LastBlock, attention_mask, mask_and_prefix
from common import BadInput
from data import Record
from formats.anyres import AnyRes
from lora import LoRA, LoRALinear, add_adapter, cast_once
from model import MLLM, FusedLogProb, Projector, fused_log_probs, pack

SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 6,
    "max_window_layers": 1,
}  # layer 0 full, layer 1 sliding
LLMS = [
    ("llama", {}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 6}),
    ("qwen2", {}),
    ("qwen2", SLIDING),
    ("qwen3", {}),
    ("qwen3", SLIDING),
    ("llama", {"tie_word_embeddings": True}),
]
IMAGE = 96  # the image token of `build`
STOP = set(range(5, IMAGE, 9))


def ids(*shape, high=IMAGE):
    return torch.randint(1, high, shape)


def prompts(n=3):
    """Prompts of unequal lengths: with a picture in the middle, without one, with one near the end."""
    picture = torch.full((4,), IMAGE)
    return [torch.cat([ids(2), picture, ids(5)]), ids(4), torch.cat([ids(9), picture, ids(1)])][:n]


def pixels(n=2):
    return torch.randn(n, 3, 28, 28)


# ---- fused log-probs


def plain_log_probs(h, weight, targets):
    """What FusedLogProb replaces."""
    logits = (h @ weight.t()).to(torch.promote_types(h.dtype, torch.float32))
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], entropy


def head(p, dtype=torch.float64, N=200, D=64, V=1009):
    """h, W, y with p(y) = p in every row, up to rounding to `dtype`: h moves along W[y] until it is (bisection)."""
    torch.manual_seed(0)
    weight = (torch.randn(V, D, dtype=torch.float64) * 0.1).to(dtype).double()
    h, targets = torch.randn(N, D, dtype=torch.float64), torch.randint(V, (N,))
    low, high = (
        torch.full((N, 1), -100.0, dtype=torch.float64),
        torch.full((N, 1), 100.0, dtype=torch.float64),
    )
    for _ in range(60):
        middle = (low + high) / 2
        too_much = (
            plain_log_probs(h + middle * weight[targets], weight, targets)[0].exp()[:, None] > p
        )
        low, high = torch.where(too_much, low, middle), torch.where(too_much, middle, high)
    return (h + low * weight[targets]).to(dtype), weight.to(dtype), targets


def with_gradients(function, h, weight, targets, incoming):
    """log p, entropy, d (incoming . log p) / dh and / dW, all as float64."""
    h, weight = h.clone().requires_grad_(), weight.clone().requires_grad_()
    log_p, entropy = function(h, weight, targets)
    (log_p * incoming.to(log_p.dtype)).sum().backward()
    return [t.detach().double() for t in (log_p, entropy, h.grad, weight.grad)]


def row_error(a, b):
    return (a - b).norm(dim=1)


@pytest.mark.parametrize("p", [0.5, 0.99, 0.9999])
def test_fused_in_float64(p):
    h, weight, targets = head(p)
    incoming = torch.randn(len(h), dtype=torch.float64)
    want = with_gradients(plain_log_probs, h, weight, targets, incoming)
    got = with_gradients(fused_log_probs, h, weight, targets, incoming)
    assert torch.allclose(want[0].exp(), torch.full_like(want[0], p), atol=1e-9)
    assert max((a - b).abs().max() for a, b in zip(got, want)) <= 1e-10


@pytest.mark.parametrize("p", [0.5, 0.99, 0.9999, 0.999999])
def test_fused_in_float32(p):
    """Also in sight of certainty, where the gradient is 1 - p: a log-sum-exp of 20 rounded to 1e-6 would swamp it."""
    h, weight, targets = head(p, torch.float32)
    incoming = torch.ones(len(h), dtype=torch.float64)
    truth = with_gradients(plain_log_probs, h.double(), weight.double(), targets, incoming)
    ours = with_gradients(fused_log_probs, h, weight, targets, incoming)
    plain = with_gradients(plain_log_probs, h, weight, targets, incoming)
    assert ((ours[0] - truth[0]).abs() / truth[0].abs().clamp(min=1)).max() <= 3e-6
    assert (ours[1] - truth[1]).abs().max() <= 1e-5
    assert row_error(ours[2], truth[2]).max() <= 1e-6 * weight.norm(dim=1).mean()
    assert row_error(ours[3], truth[3]).max() <= 1e-6 * h.norm(dim=1).mean()
    for i in (2, 3):
        assert row_error(ours[i], truth[i]).mean() <= 1.5 * row_error(plain[i], truth[i]).mean()


@pytest.mark.parametrize("p", [0.5, 0.99, 0.9999])
def test_fused_in_bfloat16_is_as_good_as_autograd(p):
    """Both start from the same bfloat16 h and W; the truth is float64 on those. Equal but for chance, 1 % of the mean error."""
    h, weight, targets = head(p, torch.bfloat16)
    for incoming in (torch.ones(len(h)).double(), torch.randn(len(h)).double()):
        truth = with_gradients(plain_log_probs, h.double(), weight.double(), targets, incoming)
        ours = with_gradients(fused_log_probs, h, weight, targets, incoming)
        plain = with_gradients(plain_log_probs, h, weight, targets, incoming)
        assert (ours[0] - truth[0]).abs().mean() <= 1.05 * (plain[0] - truth[0]).abs().mean()
        assert (ours[1] - truth[1]).abs().mean() <= 1.05 * (plain[1] - truth[1]).abs().mean()
        for i in (2, 3):
            assert (
                row_error(ours[i], truth[i]).mean() <= 1.01 * row_error(plain[i], truth[i]).mean()
            )


def test_product_of_bfloat16_is_not_rounded_to_bfloat16():
    torch.manual_seed(0)
    x, weight = torch.randn(8, 300).bfloat16(), torch.randn(300, 16).bfloat16()
    want = x.double() @ weight.double()
    got = FusedLogProb.product(x, weight)
    assert got.dtype == torch.float32 and (got - want).norm() < 1e-5 * want.norm()


def test_fused_chunks_agree():
    h, weight, targets = head(0.5)
    incoming = torch.randn(len(h), dtype=torch.float64)
    results = [
        with_gradients(lambda *a: fused_log_probs(*a, chunk), h, weight, targets, incoming)
        for chunk in (1, 7, 10**9)
    ]
    for other in results[1:]:
        assert max((a - b).abs().max() for a, b in zip(other, results[0])) <= 1e-12


def test_no_rows():
    h, weight = torch.zeros(0, 8, requires_grad=True), torch.randn(5, 8)
    log_p, entropy = fused_log_probs(h, weight, torch.zeros(0, dtype=torch.long))
    assert log_p.shape == entropy.shape == (0,)
    log_p.sum().backward()


class CountProducts(TorchDispatchMode):
    """Counts matrix products over the vocabulary, and notes the largest tensor that any operation made."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.products, self.largest = vocabulary, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.products += any(self.vocabulary in t.shape for t in args if torch.is_tensor(t))
        if torch.is_tensor(out):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("trainable, forward, backward", [(False, 2, 0), (True, 2, 2)])
def test_products_over_the_vocabulary(trainable, forward, backward):
    """Two in the forward pass; none in the backward pass of a frozen head, whose W never gets a gradient."""
    h, weight, targets = (t.detach() for t in head(0.5, torch.float32, N=30))
    h.requires_grad_(), weight.requires_grad_(trainable)
    with CountProducts(len(weight)) as count:
        log_p, entropy = fused_log_probs(h, weight, targets)
    assert count.products == forward and not entropy.requires_grad
    with CountProducts(len(weight)) as count:
        log_p.sum().backward()
    assert count.products == backward
    if not trainable:
        assert weight.grad is None
        assert count.largest <= h.numel(), "the backward pass made something larger than (N, D)"


def test_one_product_without_gradients():
    h, weight, targets = head(0.5, torch.float32)
    with torch.no_grad(), CountProducts(len(weight)) as count:
        fused_log_probs(h, weight, targets)
    assert count.products == 1


def test_chunks_bound_the_memory():
    h, weight, targets = head(0.5, torch.float32, N=40)
    h.requires_grad_(), weight.requires_grad_()
    with CountProducts(len(weight)) as count:
        fused_log_probs(h, weight, targets, chunk=4)[0].sum().backward()
    assert count.largest <= weight.numel(), "(N, V) logits were made"


def test_softmax_is_not_called_in_the_backward_pass(build, monkeypatch):
    """The same through the model: LoRA trains, the head is frozen."""
    model, calls, original = build(), [], FusedLogProb.minus_softmax
    model.prepare(lora_rank=2)
    monkeypatch.setattr(
        FusedLogProb, "minus_softmax", staticmethod(lambda *a: calls.append(1) or original(*a))
    )
    loss = model.answer_log_probs(
        pack(prompts(), [[ids(3), ids(5)]] * 3, pixel_values=pixels())
    ).sum()
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 1 and model.llm.lm_head.weight.grad is None


# ---- rows that share a prompt


def test_pack_by_hand():
    t = torch.tensor
    scored = [[t([True, True]), t([True, False, True])], [t([True]), t([True, True])]]
    batch = pack(
        [t([5, 6, 7]), t([8])],
        [[t([10, 11]), t([20, 21, 22])], [t([30]), t([40, 41])]],
        scored,
        pad_id=1,
    )
    # flat position              0   1   2   3   4   5   6   7      8   9  10  11 ...
    assert batch.input_ids.tolist() == [[5, 6, 7, 10, 11, 20, 21, 22], [8, 30, 40, 41, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5], [0, 1, 1, 2, 0, 0, 0, 0]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 2, -1, -1, -1, -1]]
    # 10 and 20 come from 7, the prompt's last; 11 from 10; 22 from 21, itself not scored; 30 and 40 from 8; 41 from 40
    assert batch.targets.tolist() == [10, 11, 20, 22, 30, 40, 41]
    assert batch.index.tolist() == [2, 3, 2, 6, 8, 8, 10]
    assert batch.owner.tolist() == [0, 0, 1, 1, 2, 3, 3]
    assert len(batch.lengths) == 4


def test_attention_mask_against_three_loops():
    segments = pack(
        [ids(4), ids(2), ids(1)], [[ids(3), ids(1), ids(2)], [ids(2)], [ids(1), ids(1)]]
    ).segments
    B, L = segments.shape
    hidden = torch.rand(B, L) < 0.3
    got, got_hidden = attention_mask(segments), attention_mask(segments, hidden)
    assert got.shape == (B, 1, L, L) and got.dtype == torch.bool
    for b in range(B):
        for i in range(L):
            for j in range(L):
                a, c = segments[b, i].item(), segments[b, j].item()
                sees = j <= i and (c == a or c == 0)  # itself or the prompt
                assert got[b, 0, i, j] == sees
                assert got_hidden[b, 0, i, j] == (sees and (i == j or not hidden[b, j]))
    assert got.any(-1).all() and got_hidden.any(-1).all(), "an empty softmax"


def padded_log_probs(model, prompts, answers, images):
    """The plain way: a row an answer with its own prompt and picture, padded, masked by transformers, all logits."""
    rows, pictures, place = [], [], 0
    for prompt, row in zip(prompts, answers):
        has = int((prompt == IMAGE).any())
        for answer in row:
            rows.append((prompt, answer))
            pictures += [images[place]] * has
        place += has
    length = max(len(p) + len(a) for p, a in rows)
    tokens, mask = (
        torch.zeros(len(rows), length, dtype=torch.long),
        torch.zeros(len(rows), length, dtype=torch.long),
    )
    for i, (p, a) in enumerate(rows):
        tokens[i, : len(p) + len(a)], mask[i, : len(p) + len(a)] = torch.cat([p, a]), 1
    x = model.embed(tokens, torch.stack(pictures) if pictures else None)
    log_p = model.llm(inputs_embeds=x, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    return torch.stack(
        [
            sum(log_p[i, len(p) + t - 1, token] for t, token in enumerate(a))
            for i, (p, a) in enumerate(rows)
        ]
    )


def gradients(model, log_probs):
    """Loss with an uneven weight for each answer, and the gradient of every parameter (None where there is none)."""
    loss = (log_probs * torch.linspace(-1, 1.5, len(log_probs), dtype=log_probs.dtype)).sum()
    model.zero_grad()
    loss.backward()
    return loss.detach(), {
        n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
    }


def assert_same(got, want, tolerance):
    """Losses and gradients, relative to the gradient's norm. CLIP's key biases have none: all scores move alike."""
    (loss, grads), (want_loss, want_grads) = got, want
    assert abs(loss - want_loss) <= tolerance * abs(want_loss)
    largest = max(g.norm() for g in want_grads.values() if g is not None)
    for name, a in want_grads.items():
        b = grads[name]
        assert (a is None) == (b is None), name
        if a is not None:
            assert (a - b).norm() <= tolerance * max(a.norm(), 1e-8 * largest), name


def perturb(model):
    """Move LoRA's B and whatever else starts at a special value away from it."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)


@pytest.mark.parametrize("kind, more", LLMS)
@pytest.mark.parametrize("what", ["lora", "full"])
def test_packed_pair_is_padded_pair(build, kind, more, what):
    model = build(kind, torch.float64, **more)
    model.prepare(lora_rank=3) if what == "lora" else model.prepare(vision=True)
    perturb(model.double())
    rows, images = prompts(), pixels().double()
    answers = [[ids(7), ids(3)], [ids(2), ids(8)], [ids(1), ids(6)]]
    want = gradients(model, padded_log_probs(model, rows, answers, images))
    got = gradients(model, model.answer_log_probs(pack(rows, answers, pixel_values=images)))
    assert_same(got, want, 1e-6)
    trains = {n for n, g in got[1].items() if g is not None}
    if what == "lora":
        assert (
            all(".lora_" in n or n.startswith("projector.") for n in trains)
            and len(trains) == 2 * 7 * 2 + 4
        )
    else:
        assert {"vision.embeddings.class_embedding", "llm.model.embed_tokens.weight"} <= trains


@pytest.mark.parametrize("kind, more", [LLMS[0], LLMS[4]])
def test_four_answers_and_gradient_checkpointing(build, kind, more):
    model = build(kind, torch.float64, **more).prepare(lora_rank=3)
    perturb(model.double())
    rows, images = prompts(), pixels().double()
    answers = [[ids(n) for n in lengths] for lengths in ([4, 1, 6, 3], [2, 2, 5, 1], [3, 7, 1, 2])]
    batch = pack(rows, answers, pixel_values=images)
    want = gradients(model, padded_log_probs(model, rows, answers, images))
    got = gradients(model, model.answer_log_probs(batch))
    assert_same(got, want, 1e-6)

    calls = []
    model.llm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.train()
    model.llm.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(gradients(model, model.answer_log_probs(batch)), got, 1e-12)
    assert len(calls) == 2, "nothing was computed again"


@pytest.mark.parametrize("asked, times", [(False, 1), (True, 2)])
def test_blocks_are_computed_again_where_that_is_asked_for(build, asked, times):
    model, calls = build().prepare(lora_rank=2, gradient_checkpointing=asked).train(), []
    model.llm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.answer_log_probs(pack([ids(4)], [[ids(3)]])).sum().backward()
    assert len(calls) == times


@pytest.mark.parametrize("kind, more", LLMS)
@pytest.mark.parametrize("known", [True, False])
def test_last_block_computes_wanted_rows_alone(build, monkeypatch, kind, more, known):
    """The same states and gradients as of all rows; an LLM whose blocks are not known computes them all, and gives the same."""
    if not known:
        monkeypatch.setattr(LastBlock, "KNOWN", ())
    model = build(kind, torch.float64, **more).prepare(lora_rank=3)
    perturb(model.double())
    assert isinstance(model.llm.model.layers[-1], LastBlock) == known and not isinstance(
        model.llm.model.layers[0], LastBlock
    )
    batch = pack(
        prompts(),
        [[ids(3), ids(1)], [ids(2), ids(5)], [ids(1), ids(6)]],
        pixel_values=pixels().double(),
    )
    L, seen = batch.input_ids.shape[1], []
    model.llm.model.layers[-1].mlp.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[:-1].numel())
    )
    rows = batch.index[
        torch.randperm(len(batch.index))
    ]  # in any order; the first tokens' position comes twice
    got = gradients(model, model.hidden_states(batch, wanted=rows).sin().sum(-1))
    assert seen == [len(rows) if known else 3 * L]
    assert_same(
        got, gradients(model, model.hidden_states(batch).flatten(0, 1)[rows].sin().sum(-1)), 1e-6
    )
    early = torch.tensor([2, 2 * L + 20])  # a row of the prompt's
    assert torch.allclose(
        model.hidden_states(batch, wanted=early),
        model.hidden_states(batch).flatten(0, 1)[early],
        atol=1e-12,
    )


def test_how_long_the_prefix_is(build):
    """The shortest prompt of the rows; none where something is hidden or a window slides; never the whole row."""
    batch = pack([ids(11), ids(4), ids(14)], [[ids(2)], [ids(3), ids(1)], [ids(1)]])
    model = build("llama", torch.float32)
    config = model.llm.config
    see, prefix = mask_and_prefix(batch, config)
    assert prefix == 3 and torch.equal(see, attention_mask(batch.segments)), "not its last token"
    hidden = torch.zeros_like(batch.segments, dtype=torch.bool)
    assert mask_and_prefix(batch, config, masked=hidden)[1] == 0, "to look would wait for a GPU"
    assert mask_and_prefix(batch, config, wanted=batch.index)[1] == 3, (
        "the prompt's last position predicts the first answer token"
    )
    assert (
        mask_and_prefix(batch, config, wanted=torch.tensor([2 * batch.input_ids.shape[1] + 1, 9]))[
            1
        ]
        == 1
    )
    assert mask_and_prefix(pack([ids(5), ids(5)], [[], []]), config)[1] == 4
    assert (
        mask_and_prefix(batch, build("mistral", torch.float32, sliding_window=3).llm.config)[1] == 0
    )


def test_lora_in_bfloat16_is_that_of_float32(build):
    """With B away from 0, under autocast: within bfloat16's rounding, gradients float32."""
    model = build("llama", torch.float32).prepare(lora_rank=3)
    perturb(model)
    layer = model.llm.model.layers[0].mlp.up_proj
    x = torch.randn(2, 5, layer.base.in_features)
    want = layer(x)
    plain = layer.base(x)
    layer.base.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.bfloat16()):
            got = layer(given)
            assert (
                got.dtype == torch.bfloat16
                and (got - want).norm() < 0.01 * want.norm() < 0.1 * (want - plain).norm() / 0.01
            )
    got.float().sum().backward()
    assert (
        layer.adapters["policy"].lora_A.grad.dtype == torch.float32
        and layer.adapters["policy"].lora_A.grad.abs().sum() > 0
    )


def test_packed_pair_in_float32(build):
    """In the precision in which it is used: the rest is rounding."""
    model = build().prepare(lora_rank=3)
    perturb(model)
    rows, images, answers = (
        prompts(),
        pixels(),
        [[ids(7), ids(3)], [ids(2), ids(8)], [ids(1), ids(6)]],
    )
    want = gradients(model, padded_log_probs(model, rows, answers, images))
    assert_same(
        gradients(model, model.answer_log_probs(pack(rows, answers, pixel_values=images))),
        want,
        1e-5,
    )


def test_log_probs_of_some_tokens_and_entropy(build):
    model, rows, images = build(), prompts(), pixels()
    answers = [[ids(4)] for _ in rows]
    scored = [[torch.tensor([True, False, False, True])] for _ in rows]
    with torch.no_grad():
        every, entropy = model.log_probs(pack(rows, answers, pixel_values=images))
        some, some_entropy = model.log_probs(pack(rows, answers, scored, images))
        batch = pack(rows, answers, pixel_values=images)
        logits = model.llm.lm_head(model.hidden_states(batch)).flatten(0, 1)[batch.index]
    assert torch.equal(some, every.view(3, 4)[:, [0, 3]].flatten())
    assert torch.equal(some_entropy, entropy.view(3, 4)[:, [0, 3]].flatten())
    assert torch.allclose(
        entropy, torch.distributions.Categorical(logits=logits).entropy(), atol=1e-5
    )


# ---- sampling


@torch.no_grad()
def greedy(model, prompt, image, steps, stop=(), mask=None):
    """The plain way: all of it again for every token. mask: a function of the length, 4-D for transformers' LLM."""
    tokens, log_probs = prompt, []
    for _ in range(steps):
        x = model.embed(tokens[None], image)
        more = {}
        if mask is not None:
            more = {
                "attention_mask": mask(len(tokens)),
                "position_ids": torch.arange(len(tokens))[None],
            }
        log_p = model.llm(inputs_embeds=x, use_cache=False, **more).logits[0, -1].log_softmax(-1)
        allowed = log_p.clone()
        allowed[IMAGE] = -math.inf
        tokens = torch.cat([tokens, allowed.argmax()[None]])
        log_probs.append(log_p[tokens[-1]])
        if tokens[-1].item() in stop:
            break
    return tokens[len(prompt) :], torch.stack(log_probs)


def images_of(rows, images):
    """The picture of each prompt, (1, 3, H, W) or None."""
    rest = iter(images.split(1))
    return [next(rest) if (row == IMAGE).any() else None for row in rows]


@pytest.fixture(params=["plain", "recorded"])
def way(request, monkeypatch):
    """Sampling as on a CPU, and as on a GPU, but that a recorded step is done again and not replayed."""
    if request.param == "recorded":
        monkeypatch.setattr(sampling, "can_record", lambda *_: True)
        monkeypatch.setattr(sampling, "recording", lambda step, _: step)
        full = torch.Tensor.new_full  # what nobody wrote is NaN
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, shape: full(x, shape, math.nan))
    return request.param


@pytest.mark.parametrize("kind, more", LLMS)
def test_cached_sampling_is_uncached(build, way, kind, more):
    """Unequal prompts with and without pictures in one batch, against each alone, token by token."""
    model, rows, images = build(kind, **more), prompts(), pixels()
    samples = sampling.sample(model, rows, images, max_new_tokens=12, temperature=0)
    for b, image in enumerate(images_of(rows, images)):
        tokens, log_probs = greedy(model, rows[b], image, 12)
        assert samples.tokens[b][0].tolist() == tokens.tolist()
        assert torch.allclose(samples.log_probs[b][0], log_probs, atol=1e-5)
    assert samples.finished == [[False]] * 3
    assert len({t for row in samples.tokens for t in row[0].tolist()}) > 5, (
        "the model repeats itself: says little"
    )


def test_text_only_sampling(build):
    model, rows = build(), [ids(6), ids(3)]
    samples = sampling.sample(model, rows, max_new_tokens=6, temperature=0)
    for b, row in enumerate(rows):
        assert samples.tokens[b][0].tolist() == greedy(model, row, None, 6)[0].tolist()


@pytest.mark.parametrize("kind, more", [LLMS[0], LLMS[2], LLMS[4]])
def test_ended_answers_leave_the_batch(build, way, kind, more):
    """Answers end at different lengths; those that go on are what each prompt gives alone."""
    model, rows = build(kind, **more), [*prompts(), *prompts(), *prompts()]
    images = pixels(6)
    samples = sampling.sample(model, rows, images, max_new_tokens=20, temperature=0, stop_ids=STOP)
    for b, image in enumerate(images_of(rows, images)):
        tokens, log_probs = greedy(model, rows[b], image, 20, STOP)
        assert samples.tokens[b][0].tolist() == tokens.tolist()
        assert torch.allclose(samples.log_probs[b][0], log_probs, atol=1e-5)
        assert samples.finished[b] == [tokens[-1].item() in STOP]
    assert len({len(row[0]) for row in samples.tokens}) >= 4, (
        "the answers end together: says little"
    )


def test_sampled_log_probs_are_those_of_a_second_look(build):
    """Drawn at another temperature, while ended answers leave the batch; scored as training will score them."""
    model, rows, images = build(), prompts(), pixels()
    samples = sampling.sample(
        model,
        rows,
        images,
        k=5,
        max_new_tokens=15,
        temperature=0.8,
        stop_ids=STOP,
        generator=torch.Generator().manual_seed(0),
    )
    lengths = {len(t) for row in samples.tokens for t in row}
    assert len(lengths) > 3
    with torch.no_grad():
        log_p, _ = model.log_probs(pack(rows, samples.tokens, pixel_values=images))
    assert (log_p - torch.cat([t for row in samples.log_probs for t in row])).abs().max() <= 1e-5


def test_samples_stop_finish_and_repeat(build):
    model, rows, images = build(), prompts(), pixels()
    draw = lambda seed, **how: sampling.sample(
        model,
        rows,
        images,
        k=6,
        max_new_tokens=8,
        stop_ids=STOP,
        **how,
        generator=torch.Generator().manual_seed(seed),
    )
    samples = draw(0)
    assert [len(row) for row in samples.tokens] == [6, 6, 6]
    for row, flags in zip(samples.tokens, samples.finished):
        for tokens, finished in zip(row, flags):
            assert not set(tokens[:-1].tolist()) & STOP and IMAGE not in tokens
            assert finished == (tokens[-1].item() in STOP)
            assert finished or len(tokens) == 8
    assert {f for flags in samples.finished for f in flags} == {True, False}
    assert any(not torch.equal(row[0], other) for row in samples.tokens for other in row[1:]), (
        "k times the same"
    )
    flat = lambda s: [t.tolist() for row in s.tokens for t in row]
    assert flat(draw(0)) == flat(samples) and flat(draw(1)) != flat(samples)
    one = sampling.sample(model, rows, images, max_new_tokens=1, temperature=0)
    assert all(len(row[0]) == 1 for row in one.tokens)


def test_frequencies_of_samples(build):
    """Pairs of tokens come as often as the softmax says, up to five standard deviations of a binomial count."""
    model, n = build(vocab_size=8), 6000
    prompt = ids(5, high=7)
    with torch.no_grad():
        first = model.llm(prompt[None]).logits[0, -1]
        second = model.llm(
            torch.stack([torch.cat([prompt, torch.tensor([t])]) for t in range(8)])
        ).logits[:, -1]
    for temperature in (1.0, 2.0):
        samples = sampling.sample(
            model,
            [prompt],
            k=n,
            max_new_tokens=2,
            temperature=temperature,
            generator=torch.Generator().manual_seed(0),
        )
        tokens = torch.stack(samples.tokens[0])  # (n, 2)
        counts = torch.zeros(8, 8).index_put(
            (tokens[:, 0], tokens[:, 1]), torch.ones(n), accumulate=True
        )
        drawable = torch.arange(8) != 7  # the image token is never drawn
        p_first, p_second = (((x / temperature).softmax(-1) * drawable) for x in (first, second))
        p = (p_first / p_first.sum())[:, None] * p_second / p_second.sum(-1, keepdim=True)
        assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1).all()
        assert counts[:, 7].sum() == counts[7].sum() == 0
        assert (n * p > 20).sum() > 15, "too few pairs are frequent: says little"


def test_hidden_pictures(build, way):
    """image_mask: nothing of the pixels comes through, and what is seen keeps its place."""
    model, rows, images = build(), prompts(), pixels()
    mask = torch.zeros(3, 14, dtype=torch.bool)
    for b, row in enumerate(rows):
        mask[b, : len(row)] = row == IMAGE
    run = lambda images, mask=None: sampling.sample(
        model, rows, images, max_new_tokens=6, temperature=0, masked=mask
    )
    hidden, other = run(images, mask), run(pixels() * 2, mask)
    assert not hidden.log_probs[0][0].isnan().any()
    for b in range(3):
        assert torch.equal(hidden.tokens[b][0], other.tokens[b][0])
        assert torch.equal(hidden.log_probs[b][0], other.log_probs[b][0])
    shown = run(images)
    assert not torch.allclose(shown.log_probs[0][0], hidden.log_probs[0][0], atol=1e-3)
    assert torch.allclose(shown.log_probs[1][0], hidden.log_probs[1][0], atol=1e-6), (
        "a row without a picture changed"
    )


@pytest.mark.parametrize("training", [True, False])
def test_sampling_leaves_the_mode_as_it_was(build, training):
    model = build().train(training)
    sampling.sample(model, [ids(4)], max_new_tokens=2)
    assert {m.training for m in model.modules()} == {training}


def test_ended_answers_are_no_longer_computed(build, monkeypatch):
    """40 answers of very unequal lengths: the last steps compute a few rows, and never a new one."""
    model, rows = build(), []
    run_llm = model.run_llm
    monkeypatch.setattr(model, "run_llm", lambda x, *rest: rows.append(len(x)) or run_llm(x, *rest))
    sampling.sample(
        model,
        [ids(4)],
        k=40,
        max_new_tokens=12,
        stop_ids=range(5, IMAGE, 4),
        generator=torch.Generator().manual_seed(0),
    )
    prefill, *steps = rows
    assert prefill == 1 and steps == sorted(steps, reverse=True) and steps[-1] <= 20 < steps[0]
    assert len({*steps[-7:]}) > 1, "to the end"


def test_a_step_is_recorded_anew_when_half_of_the_answers_have_ended(build, monkeypatch):
    """Recorded for the answers that are left; a step that is replayed must not outlive their cache."""
    model, made, done = build(), [], []
    record = lambda step, _: made.append(1) or (lambda: done.append(len(made)) or step())
    monkeypatch.setattr(sampling, "can_record", lambda *_: True)
    monkeypatch.setattr(sampling, "recording", record)
    rows, widths = [], []
    run_llm = model.run_llm

    def noted(x, mask, *rest):
        rows.append(len(x))
        widths.append(mask.shape[-1])
        return run_llm(x, mask, *rest)

    monkeypatch.setattr(model, "run_llm", noted)
    draw = torch.Generator().manual_seed(0)
    how = {"k": 40, "max_new_tokens": 12, "stop_ids": range(5, IMAGE, 4), "generator": draw}
    sampling.sample(model, [ids(4)], **how)
    sizes = list(dict.fromkeys(rows[1:]))
    assert len(made) == len(sizes) >= 2 and len(done) == len(rows) - 1
    assert all(b <= a / 2 for a, b in zip(sizes, sizes[1:]))
    assert set(widths[1:]) == {4 + 12}  # always all slots: a replay cannot take more than before


def test_what_is_asked_of_cuda_for_a_recording(monkeypatch):
    """Done once, within the graph, on one stream of the device for all; then replayed, into the same tensor."""
    said, device = [], torch.device("cuda", 1)
    signature = inspect.signature(torch.cuda.graph)

    @contextlib.contextmanager
    def graph(*arguments, **more):
        bound = signature.bind(*arguments, **more).arguments
        said.append(("graph", bound["stream"], bound["capture_error_mode"]))
        yield
        said.append("end")

    fake = SimpleNamespace(replay=lambda: said.append("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: fake)
    monkeypatch.setattr(torch.cuda, "Stream", lambda where: ("stream", where, len(said)))
    monkeypatch.setattr(
        torch.cuda, "device", lambda where: contextlib.nullcontext(said.append(where))
    )
    monkeypatch.setattr(torch.cuda, "graph", graph)
    sampling.recording_stream.cache_clear()
    result = torch.zeros(1)
    replay = sampling.recording(lambda: said.append("step") or result, device)
    stream = ("stream", device, 0)
    once = [device, ("graph", stream, "thread_local"), "step", "end"]
    assert said == once
    assert replay() is result and replay() is result and said == [*once, "replay", "replay"]
    sampling.recording(lambda: None, device)
    assert said[-2] == once[1]
    sampling.recording_stream.cache_clear()


def test_who_records_a_step(build):
    """A GPU, for more than a few tokens; rotary embeddings that look at the length do not."""
    model = build()
    assert not sampling.can_record(model, 100)
    there = SimpleNamespace(device=torch.device("cuda"), llm=model.llm)
    assert sampling.can_record(there, 9) and not sampling.can_record(there, 8)
    for kind in ("dynamic", "longrope"):
        model.llm.base_model.rotary_emb.rope_type = kind
        assert not sampling.can_record(there, 100)
    model.llm.base_model.rotary_emb.rope_type = {"full_attention": "dynamic"}
    assert not sampling.can_record(there, 100)
    model.llm.base_model.rotary_emb.rope_type = "yarn"
    assert sampling.can_record(there, 100)
    model.llm.base_model.unshard = None  # as FSDP2 leaves it
    assert not sampling.can_record(there, 100)
    del model.llm.base_model.unshard
    model.llm.base_model.layers[-1] = torch.nn.Identity()  # of an LLM that was not tried
    assert not sampling.can_record(there, 100)


def test_log_probs_of_a_bfloat16_model_are_not_rounded_to_bfloat16(build):
    """Those that sampling notes are those of a second look, which a test above holds to float32."""
    model, rows = build(dtype=torch.bfloat16), [ids(5), ids(5), ids(5)]
    samples = sampling.sample(model, rows, k=1, max_new_tokens=1, temperature=0)
    got = torch.cat([row[0] for row in samples.log_probs])
    with torch.no_grad():
        want, _ = model.log_probs(pack(rows, samples.tokens))
    assert got.dtype == torch.float32 and (got != got.bfloat16().float()).any()
    assert torch.allclose(got, want, atol=1e-4)


def test_generate_gives_each_record_its_own_texts(llava, monkeypatch, tmp_path):
    """Batches by length, texts in the order of the records; all settings arrive, one generator for all batches."""
    model, processor = llava
    questions = ["Is there a dog in the image?", "What?", "What is on the table?", "A cup?"]
    records, shades = [], (0, 80, 160, None)
    for question, shade in zip(questions, shades):
        path = None if shade is None else tmp_path / f"{shade}.png"
        if path:
            Image.new("RGB", (28, 28), (shade,) * 3).save(path)
        # the answers are none of its business: these would be refused
        records.append(Record(question, path, (question,), ("same " * 600, "same " * 600)))
    calls = []

    def sample(model, prompts, pixel_values, k, max_new_tokens, temperature, stop_ids, **more):
        assert set(more) == {"generator", "image_sizes"} and more["image_sizes"] is None
        generator = more["generator"]
        first = torch.rand((), generator=generator).item()
        calls.append((k, max_new_tokens, temperature, set(stop_ids), generator, first))
        shown = [processor.tokenizer.decode(p) for p in prompts]
        asked = [next(q for q in questions if q in text) for text in shown]
        with_image = [records[questions.index(q)] for q in asked]
        with_image = [r for r in with_image if r.image]
        assert [processor.image_token_id in p for p in prompts] == [q != "A cup?" for q in asked]
        for record, pixels in zip(with_image, pixel_values, strict=True):
            assert torch.equal(pixels, processor.pixels(record.image))
        said = [
            [processor.tokenise(f" {q} {i}") + [processor.end_id] for i in (1, 2)] for q in asked
        ]
        return sampling.Samples([[torch.tensor(ids) for ids in row] for row in said], None, None)

    monkeypatch.setattr(type(processor), "stop_ids", [processor.end_id, 5])
    monkeypatch.setattr(sampling, "sample", sample)
    got = sampling.generate(model, processor, records, 9, 0.7, k=2, batch_size=3, seed=5)
    assert got == [[f"{q} 1", f"{q} 2"] for q in questions]
    assert [c[:4] for c in calls] == [(2, 9, 0.7, {processor.end_id, 5})] * 2
    assert calls[0][4].initial_seed() == 5
    assert calls[0][5] != calls[1][5], "every batch draws the same"


@pytest.mark.parametrize("kind, more", [LLMS[0], LLMS[2], LLMS[5]])
def test_image_mask_against_transformers(build, kind, more):
    """Half of the picture hidden, and all that is drawn after it: transformers' LLM with a 4-D mask, no cache."""
    model, rows, images = build(kind, **more), prompts(), pixels()
    mask = torch.zeros(3, 14, dtype=torch.bool)
    for b, row in enumerate(rows):
        mask[b, : len(row)] = (row == IMAGE) & (torch.arange(len(row)) % 2 == 0)
    width = more.get("sliding_window") or 10**6
    samples = sampling.sample(model, rows, images, max_new_tokens=8, temperature=0, masked=mask)
    for b, image in enumerate(images_of(rows, images)):

        def visible(length):
            see = torch.zeros(1, 1, length, length, dtype=torch.bool)
            for i in range(length):
                for j in range(i + 1):
                    see[0, 0, i, j] = i - j < width and (
                        i == j or j >= len(rows[b]) or not mask[b, j]
                    )
            return see

        tokens, log_probs = greedy(model, rows[b], image, 8, mask=visible)
        assert samples.tokens[b][0].tolist() == tokens.tolist()
        assert torch.allclose(samples.log_probs[b][0], log_probs, atol=1e-5)


# ---- LoRA, what trains, the reference


def some_log_probs(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model.log_probs(pack(prompts(), [[ids(4), ids(2)]] * 3, pixel_values=pixels()))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_starts_at_the_base(build, dtype):
    model = build(dtype=dtype)
    before = some_log_probs(model)
    model.prepare(lora_rank=4)
    assert torch.equal(some_log_probs(model), before)


def test_lora_is_a_product_added_to_the_weight():
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(6, 5), rank=2, alpha=3)
    lora = layer.adapters["policy"]
    torch.nn.init.normal_(lora.lora_B)
    x = torch.randn(4, 6)
    want = (
        x @ (layer.base.weight + 1.5 * lora.lora_B @ lora.lora_A).t() + layer.base.bias
    )  # 3 / 2 = 1.5
    assert torch.allclose(layer(x), want, atol=1e-5)


def test_an_adapter_that_is_not_the_policys_acts_on_request_alone(build):
    model = build()
    base = some_log_probs(model)
    add_adapter(model.llm, "reward", 2)
    with torch.no_grad():
        for layer in model.lora_layers():
            layer.adapters["reward"].lora_B.normal_()
    assert torch.equal(some_log_probs(model), base)
    with model.use("reward"):
        assert not torch.allclose(some_log_probs(model), base, atol=1e-2)


def test_lora_a_starts_as_in_peft():
    """Uniform between -1 and 1 over the square root of the inputs."""
    torch.manual_seed(0)
    start = LoRA(torch.nn.Linear(400, 5), rank=8, alpha=16).lora_A
    assert 0.99 / 20 < start.abs().max() <= 1 / 20 and abs(start.std() - 0.05 / 3**0.5) < 1e-3


def test_each_adapter_has_its_rank_and_alpha(build):
    model = build()
    for name, rank, alpha in (("policy", 4, 6), ("reward", 2, 7), ("value", 3, None)):
        add_adapter(model.llm, name, rank, alpha)
    assert len(model.lora_layers()) == 2 * 7
    for layer in model.lora_layers():
        found = {n: (len(lora.lora_A), lora.scale) for n, lora in layer.adapters.items()}
        assert found == {"policy": (4, 1.5), "reward": (2, 3.5), "value": (3, 2.0)}
        assert layer.active == "policy"


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_sampling_while_a_bfloat16_model_trains(build, lora_rank):
    """What trains is float32; the sampled log-probs are those that training sees."""
    model = build(dtype=torch.bfloat16).prepare(lora_rank)
    rows = [ids(6), ids(6)]
    samples = sampling.sample(model, rows, max_new_tokens=1, temperature=0)
    got = torch.cat([row[0] for row in samples.log_probs])
    with torch.no_grad():
        assert torch.allclose(got, model.log_probs(pack(rows, samples.tokens))[0], atol=1e-4)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_reference_is_the_start(build, lora_rank):
    model = build()
    start = some_log_probs(model)
    model.prepare(lora_rank, keep_reference=True)
    perturb(model)
    trained, weights = some_log_probs(model), {n: p.clone() for n, p in model.named_parameters()}
    assert (trained - start).abs().max() > 1e-2
    with model.reference() as reference:
        assert torch.equal(some_log_probs(reference), start)
    with pytest.raises(ZeroDivisionError), model.reference():
        1 / 0
    assert torch.equal(some_log_probs(model), trained)
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_reference_in_bfloat16_is_the_policy_at_step_0(build, lora_rank):
    """The whole LLM trains in float32 and is computed in bfloat16; its frozen copy is bfloat16. Both round alike."""
    model = build("llama", torch.bfloat16).prepare(lora_rank, keep_reference=True)
    policy = some_log_probs(model)
    with model.reference() as reference:
        assert torch.equal(some_log_probs(reference), policy)


def test_no_reference_when_the_llm_trains(build):
    with pytest.raises(BadInput, match="--lora-rank 0"), build().prepare().reference():
        pass


@pytest.mark.parametrize(
    "how, trains",
    [
        ({"lora_rank": 4}, ("lora", "projector.")),
        ({"lora_rank": 4, "projector": False}, ("lora",)),
        ({}, ("llm.", "projector.")),
        ({"llm": False}, ("projector.",)),
        ({"vision": True}, ("llm.", "projector.", "vision.")),
    ],
)
def test_what_trains_is_float32(build, how, trains):
    model = build(dtype=torch.bfloat16).prepare(**how)
    for name, p in model.named_parameters():
        part = "lora" if ".lora_" in name else name.split(".")[0] + "."
        assert p.requires_grad == (part in trains), name
        assert p.dtype == (torch.float32 if part in trains else torch.bfloat16), name
    batch = pack(prompts(), [[ids(4), ids(2)]] * 3, pixel_values=pixels())
    model.answer_log_probs(batch).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("images, tokens", [(1, 8), (2, 4), (1, 0)])
def test_features_and_image_tokens_must_agree(build, images, tokens):
    prompt = torch.cat([ids(2), torch.full((tokens,), IMAGE), ids(2)])
    with pytest.raises(
        BadInput, match=f"{tokens} image tokens in the text against {images * 4} image features"
    ):
        build().log_probs(pack([prompt], [[ids(2)]], pixel_values=pixels(images)))


def test_features_come_from_the_last_layer_but_one(build):
    """LLaVA's choice, where a caller makes none: the last layer of the tower has no say."""
    model, images = build(), pixels(1)
    before = model.image_features(images)[0]
    scatter(model.vision.encoder.layers[-1])
    assert torch.equal(model.image_features(images)[0], before)
    scatter(model.vision.encoder.layers[-2])
    assert not torch.allclose(model.image_features(images)[0], before, atol=1e-3)


def test_image_tokens_without_a_picture(build):
    with pytest.raises(BadInput, match="4 image tokens in the text against 0"):
        build().log_probs(pack(prompts(1), [[ids(2)]]))


@pytest.mark.parametrize(
    "kind, more, why",
    [
        (
            "gemma2",
            {"final_logit_softcapping": 30.0, "head_dim": 16},
            "Gemma2ForCausalLM.*soft cap",
        ),
        ("phi", {}, "PhiForCausalLM: an LM head with a bias"),
        ("granite", {"logits_scaling": 2.0}, "GraniteForCausalLM.*logits_scaling"),
        ("cohere", {"logit_scale": 0.5}, "CohereForCausalLM.*logit_scale"),
    ],
)
def test_heads_that_are_not_a_plain_product_are_refused(build, kind, more, why):
    with pytest.raises(BadInput, match=why):
        build(kind, **more)


# ---- dropout, and which adapter is in use


@pytest.mark.parametrize("where", ["llm", "tower", "module"])
def test_dropout_of_a_checkpoint_stays_off(build, where):
    """In training the policy of step 0 is the reference, and two looks are equal, whatever the config says."""
    model = build(attention_dropout=0.5 if where == "llm" else 0.0)
    vision = CLIPVisionModel(
        CLIPVisionConfig(**CLIP, attention_dropout=0.5 if where == "tower" else 0.0)
    )
    if where == "module":
        mlp = model.llm.model.layers[0].mlp
        mlp.act_fn = torch.nn.Sequential(mlp.act_fn, torch.nn.Dropout(0.5))
    model = MLLM(vision, model.projector, model.llm, IMAGE).prepare(lora_rank=2).train()
    batch = pack(prompts(), [[ids(4), ids(2)]] * 3, pixel_values=pixels())
    with torch.no_grad():
        policy = model.log_probs(batch)[0]
        with model.reference() as reference:
            assert torch.equal(reference.log_probs(batch)[0], policy)
        assert torch.equal(model.eval().log_probs(batch)[0], policy)


@pytest.mark.parametrize("outer", ["reward", None])
def test_use_gives_back_what_was_in_use(build, outer):
    model = build().prepare(lora_rank=2)
    add_adapter(model.llm, "reward", 2)
    add_adapter(model.llm, "value", 2)
    perturb(model)
    policy = some_log_probs(model)
    with model.use(outer):
        before = some_log_probs(model)
        with model.use("value"):
            value = some_log_probs(model)
        assert torch.equal(some_log_probs(model), before)
        with pytest.raises(ZeroDivisionError), model.use("value"):
            1 / 0
        assert torch.equal(some_log_probs(model), before)
        with model.reference():
            pass
        assert torch.equal(some_log_probs(model), before)
    assert torch.equal(some_log_probs(model), policy)
    assert min((a - b).abs().max() for a, b in ((before, value), (before, policy))) > 1e-3
    with pytest.raises(BadInput, match="no adapter 'nobody'"), model.use("nobody"):
        pass


def test_last_token_of_each_answer():
    batch = pack([ids(3), ids(2)], [[ids(2), ids(1)], [ids(4)]])
    assert batch.last.tolist() == [4, 5, 6 + 5]  # rows are 6 long


def test_lengths_of_the_answers_of_a_batch():
    """Counted over all rows, scored tokens alone; an answer without one has length 0."""
    ids = lambda n: torch.arange(5, 5 + n)
    none = torch.tensor([False])
    scored = [[torch.tensor([False, True, True]), none], [torch.ones(4).bool(), none]]
    batch = pack([ids(2), ids(3)], [[ids(3), ids(1)], [ids(4), ids(1)]], scored)
    assert batch.lengths.tolist() == [2, 0, 4, 0]


def test_each_head_reads_the_hidden_state_in_float32(build):
    """A new head has bias 0; of two heads the named one is read, at the positions that are asked for."""
    model = build(dtype=torch.bfloat16)
    for name, place in (("reward", 3), ("value", 7)):
        model.add_head(name)
        assert model.heads[name].bias.item() == 0
        with torch.no_grad():
            model.heads[name].weight.zero_()[0, place] = 1
    batch = pack([ids(3), ids(5)], [[ids(2)], [ids(4)]])
    wanted = torch.tensor([4, 17, 0])
    with torch.no_grad():
        states = model.hidden_states(batch).flatten(0, 1)[wanted].float()
        for name, place in (("reward", 3), ("value", 7)):
            got = model.values(batch, wanted, name)
            assert got.dtype == torch.float32
            assert torch.allclose(got, states[:, place], atol=0.02 * states.abs().max().item())


def test_parameters_of_a_name_are_those_of_its_adapter_and_head(build):
    model = build()
    for name in ("reward", "reward2"):
        add_adapter(model.llm, name, 2)
        model.add_head(name)
    found = {n: {id(p) for p in model.parameters_of(n)} for n in ("reward", "reward2", "policy")}
    assert len(found["reward"]) == len(found["reward2"]) == 2 * 7 * 2 + 2
    assert not found["reward"] & found["reward2"] and not found["policy"]
    assert {id(p) for p in model.heads["reward"].parameters()} <= found["reward"]


class NoWaiting(TorchDispatchMode):
    """Raises where the host would wait for a GPU: at a number read, or a shape that depends on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "bincount")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not name.startswith(self.WAITS), f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", [False, True])
def test_a_step_does_not_wait_for_the_device(build, monkeypatch, head):
    """Forward and backward pass of pairs, or of a scalar head; `tolist` reads memory without dispatch."""
    model = build().prepare(lora_rank=2)
    model.add_head("reward")
    rows = [[ids(3), ids(1)], [ids(2), ids(5)], [ids(1), ids(6)]]
    batch = pack(prompts(), rows, pixel_values=pixels())
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # as there: the numbers were compared before
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda _: pytest.fail("tolist waits for the device")
    )
    with NoWaiting():
        x = model.values(batch, batch.last, "reward") if head else model.answer_log_probs(batch)
        x.sum().backward()
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        float(x.sum())


def test_adapters_are_cast_once_inside(build):
    """The same answers; outside, the trained float32 values act again."""
    model = build(dtype=torch.bfloat16).prepare(lora_rank=2)
    perturb(model)
    loras = [m.adapters["policy"] for m in model.lora_layers()]
    with torch.no_grad():
        want = some_log_probs(model)
        with cast_once(model.llm, torch.bfloat16):
            a, b = loras[0].weights(torch.bfloat16)
            assert a is loras[0].weights(torch.bfloat16)[0] and a.dtype == b.dtype == torch.bfloat16
            assert torch.equal(some_log_probs(model), want)
            loras[0].lora_B.mul_(-50.0)
            assert torch.equal(some_log_probs(model), want)
        assert not torch.equal(some_log_probs(model), want)
        with pytest.raises(ZeroDivisionError), cast_once(model.llm, torch.bfloat16):
            1 / 0
        assert all(lora.ready is None for lora in loras)


def test_who_is_refused_as_a_reference(build):
    """By what trains and is not kept."""
    with pytest.raises(BadInput, match="^--lora-rank 0: the LLM trains, so pi_ref is gone"):
        with build().prepare().reference():
            pass
    for how in ({"lora_rank": 2}, {"keep_reference": True}):
        with pytest.raises(BadInput, match="^the vision tower trains, so pi_ref is gone"):
            with build().prepare(vision=True, **how).reference():
                pass


def test_a_layer_that_lora_does_not_know(build):
    model = build()
    model.llm.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    known = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    with pytest.raises(BadInput, match=f"^LoRA: the layer extra is unknown; known are {known}\\.$"):
        add_adapter(model.llm, "policy", 2)


def test_a_product_of_bfloat16_on_a_gpu(monkeypatch):
    """It is asked for in float32: no kernel rounds it in between."""
    asked = []
    monkeypatch.setattr(torch, "mm", lambda *two, out_dtype: asked.append((two, out_dtype)) or 7)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    x, w = torch.ones(2, 3).bfloat16(), torch.ones(3, 4).bfloat16()
    assert FusedLogProb.product(x, w) == 7
    assert asked[0][0][0] is x and asked[0][0][1] is w and asked[0][1] == torch.float32
    assert FusedLogProb.product(x.float(), w.float()).tolist() == [[3] * 4] * 2, "a plain product"


def test_what_goes_to_a_gpu_from_pinned_memory(monkeypatch):
    """Every tensor of a batch but the sizes of its images, without waiting; to the CPU nothing is pinned."""
    batch = pack([ids(3)], [[ids(2)]], pixel_values=pixels(1), image_sizes=torch.ones(1, 2))
    batch.weights, moved = torch.ones(2), []

    def to(x, device, non_blocking):
        moved.append((x, torch.device(device).type, non_blocking))
        return x

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x.clone().fill_(1))
    tensors = {name: x for name, x in vars(batch).items() if torch.is_tensor(x)}
    there = batch.to("cuda:0")
    assert len(moved) == len(tensors) - 1 == 10 and there.image_sizes is batch.image_sizes
    assert {(where, late) for _, where, late in moved} == {("cuda", True)}
    assert all((x == 1).all() for x, *_ in moved), "pinned"
    assert there.shortest_prompt == 3
    moved.clear()
    batch.to("cpu")
    assert {id(x) for x, *_ in moved} <= {id(x) for x in tensors.values()} and len(moved) == 10


@pytest.mark.parametrize("bias", [True, False])
def test_the_projector_of_llava(bias):
    """Two layers with GELU between; both with bias, or neither."""
    layer = Projector(3, 5, bias)
    assert [tuple(p.shape) for n, p in layer.named_parameters() if n.endswith("weight")] == [
        (5, 3), (5, 5)]  # fmt: skip
    assert (layer.linear_1.bias is not None) is (layer.linear_2.bias is not None) is bias
    x = torch.randn(2, 3)
    parts = (layer.linear_1, layer.linear_2)
    one, two = (part.bias if bias else 0 for part in parts)
    inner = x @ layer.linear_1.weight.t() + one
    inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(layer(x), inner @ layer.linear_2.weight.t() + two)
    assert Projector(3, 5).linear_1.bias is not None


def test_training_keeps_no_keys_and_values(build, monkeypatch):
    """Without a cache of ours transformers must not begin one of its own."""
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "DynamicCache", lambda *_, **__: pytest.fail("a cache"))
    some_log_probs(build())


@pytest.mark.parametrize("kind, more", [("llama", {}), ("mistral", {"sliding_window": 3})])
def test_the_llm_alone_is_transformers(build, kind, more):
    """Called by others, such as its own generate, with a mask of padding or none."""
    ours = build(kind, **more).llm
    row, mask = ids(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with torch.no_grad():
        found = [ours(row).logits, ours(row, attention_mask=mask).logits]
        ours.set_attn_implementation("eager")
        want = [ours(row).logits, ours(row, attention_mask=mask).logits]
    torch.testing.assert_close(found[0], want[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1][mask == 1], want[1][mask == 1], rtol=0, atol=1e-4)


def test_where_groups_of_prompts_end(build):
    """A prompt more is taken as long as what `memory.sampling` counts for all of them fits, to the byte."""
    model, new = build(), 7
    lengths, answers, tiles = [5, 9, 4, 30], [2, 1, 3, 1], [1, 1, 5, 0]

    def need(a, b, in_rows):
        M = sum(answers[a:b])
        K = max(answers[a:b]) if in_rows else 0
        return memory.sampling(model, prompts=b - a, answers=M, length=max(lengths[a:b]), new=new,
                               tiles=max(tiles[a:b]), in_rows=K)  # fmt: skip

    for in_rows in (False, True):
        split = lambda room: [
            (s.start, s.stop)
            for s in sampling.groups(model, lengths, answers, tiles, new, room, in_rows)
        ]
        assert split(0) == [(0, 1), (1, 2), (2, 3), (3, 4)]
        assert split(need(0, 4, in_rows)) == [(0, 4)]
        for room in (need(0, 2, in_rows), need(0, 3, in_rows) - 1, need(0, 3, in_rows)):
            want, start = [], 0
            for end in range(1, 5):
                if end == 4 or need(start, end + 1, in_rows) > room:
                    want.append((start, end))
                    start = end
            assert split(room) == want
    assert list(sampling.groups(model, [5], [1], [0], new, 0)) == [slice(0, 1)]


def test_pictures_of_the_tower(build):
    """One of a prompt with an image; with tiles as many as its size makes, and the overview."""
    model = build()
    rows = [*prompts(), ids(3)]
    assert sampling.tiles_of(model, rows, None) == [1, 0, 1, 0]
    sizes = torch.tensor([[20, 60], [60, 20]])
    assert sampling.tiles_of(model, rows, sizes) == [1, 0, 1, 0]
    model.anyres = AnyRes(((28, 56), (84, 28)), 28, 2)
    assert sampling.tiles_of(model, rows, sizes) == [3, 0, 4, 0]
    assert sampling.tiles_of(model, rows, sizes[:1]) == [1, 0, 1, 0], "found later"
    assert sampling.part(None, slice(1)) is None
    assert sampling.part(torch.ones(3), slice(3, 4)) is None
    assert sampling.part(torch.arange(3), slice(1, 2)).tolist() == [1]


def test_padding_of_packed_rows():
    """On the right: id 0 (or the given one), position 0, segment -1."""
    batch = pack([ids(2), ids(1)], [[ids(2)], [ids(1)]])
    assert batch.input_ids[1, 2:].tolist() == batch.position_ids[1, 2:].tolist() == [0, 0]
    assert batch.segments.tolist() == [[0, 0, 1, 1], [0, 1, -1, -1]]
    assert pack([ids(2), ids(1)], [[ids(2)], [ids(1)]], pad_id=7).input_ids[1, 2:].tolist() == [
        7,
        7,
    ]
    assert batch.shortest_prompt == 1


def test_what_is_drawn_where_nothing_is_said(build):
    """One answer to each prompt, at temperature 1, of up to 256 tokens."""
    model, rows, drawn = build(), [ids(4), ids(2)], []
    for how in ({}, {"k": 1, "max_new_tokens": 256, "temperature": 1.0}):
        torch.manual_seed(3)
        drawn.append(sampling.sample(model, rows, **how))
    for one, other in zip(drawn[0].tokens, drawn[1].tokens):
        assert len(one) == 1 and len(one[0]) == 256 and torch.equal(one[0], other[0])


def test_how_many_images_are_decoded_together(llava, monkeypatch):
    """Of 130 prompts 64, 64 and 2; greedily, one answer each."""
    model, processor = llava
    sizes = []

    def sample(model, prompts, pixel_values, k, max_new_tokens, temperature, stop_ids, **more):
        sizes.append(len(prompts))
        assert (k, max_new_tokens, temperature, stop_ids) == (1, 3, 0.0, processor.stop_ids)
        return sampling.Samples([[torch.tensor([5])]] * len(prompts), [], [])

    monkeypatch.setattr(sampling, "sample", sample)
    record = Record("f.json, row 0", None, ("What is it?",))
    texts = sampling.generate(model, processor, [record] * 130, 3)
    assert sizes == [64, 64, 2] and texts == [[processor.text(torch.tensor([5]))]] * 130


def test_answers_of_a_seed(llava):
    """Any text is a seed; the temperature is 1 by default."""
    model, processor = llava
    example = processor.encode(Record("f.json, row 0", None, ("What is it?",)))
    draw = lambda seed, *more: [
        t.tolist() for t in sampling.answers_to(model, processor, [example], 3, 5, seed, *more).tokens[0]
    ]  # fmt: skip
    assert draw("0/17") == draw("0/17", 1.0) != draw("0/17", 3.0)
    assert draw("0/17") != draw("1/17") and len(draw("x")) == 3
    assert max(map(len, draw("x"))) <= 5


def test_an_example_with_other_answers(llava):
    example = llava[1].encode(Record("f.json, row 0", None, ("What?",), ("A cup.",)))
    other = sampling.with_answers(example, [ids(2), ids(3)])
    assert [s.tolist() for s in other.scored] == [[True] * 2, [True] * 3]
    assert other.record is example.record and torch.equal(other.prompt, example.prompt)


@pytest.mark.parametrize("tiles", [False, True])
def test_prompts_that_are_drawn_one_after_the_other(build, tiles):
    """Each group has its own pictures, their sizes and what is hidden: greedy answers are those of all at once."""
    model, shown = build(), pixels()
    sizes = None
    rows = [ids(3), *prompts(), ids(2)]
    if tiles:
        model = MLLM(
            model.vision,
            model.projector,
            model.llm,
            IMAGE,
            anyres=AnyRes(((28, 56), (56, 28)), 28, 2),
        )
        model.image_newline.data.normal_()
        sizes, shown = torch.tensor([[20, 60], [60, 20]]), pixels(6)
        tokens = [model.anyres.tokens(tuple(size)) for size in sizes.tolist()]
        picture = [torch.full((n,), IMAGE) for n in tokens]
        rows = [
            ids(3),
            torch.cat([ids(2), picture[0], ids(5)]),
            ids(4),
            torch.cat([picture[1], ids(1)]),
            ids(2),
        ]
    masked = torch.zeros(5, max(map(len, rows)), dtype=torch.bool)
    masked[1, 2:4] = masked[3, 3:5] = True
    given = [
        [(ids(2), [0, 1])],
        [(ids(1), [1])],
        [(ids(3), [2])],
        [(ids(1), [0])],
        [(ids(2), [1, 2])],
    ]
    draw = lambda room: sampling.sample(
        model, rows, shown, 2, 4, 0.0, STOP, masked, given, image_sizes=sizes, room=room, watch=(3,)
    )
    whole, apart = draw(1e12), draw(0)
    assert [len(row) for row in whole.tokens] == [4, 2, 2, 2, 4]
    for name in ("tokens", "log_probs", "first"):
        for one, other in zip(
            sum(getattr(whole, name), []), sum(getattr(apart, name), []), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    assert whole.finished == apart.finished


def test_attention_of_an_llm_that_scales_it_otherwise(build):
    """Granite's multiplier, before the prefix and behind it: as transformers computes it."""
    model = build("granite", attention_multiplier=0.9, logits_scaling=1.0, embedding_multiplier=1.0)
    prompt, answer = ids(6), ids(4)
    batch = pack([prompt], [[answer]])
    assert mask_and_prefix(batch, model.llm.config)[1] == 5
    with torch.no_grad():
        found, _ = model.log_probs(batch)
        model.llm.set_attn_implementation("eager")
        logits = model.llm(torch.cat([prompt, answer])[None]).logits[0, 5:-1]
    want = logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]
    torch.testing.assert_close(found, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("in_rows", [False, True])
@pytest.mark.parametrize("room", [None, 12345])
def test_what_the_groups_are_made_of(build, monkeypatch, in_rows, room):
    """Tokens with the given texts, answers, pictures; three quarters of the free memory, or the given room."""
    model, seen = build(), []
    monkeypatch.setattr(
        sampling.memory, "available", lambda device: 1000 if device == model.device else 0
    )
    monkeypatch.setattr(sampling, "groups", lambda *given: seen.append(given) or [slice(0, 2)])
    rows = prompts(2)
    given = [[(ids(2), [0, 1]), (ids(3), [3])], [(ids(1), [1])]]
    how = {"given": given, "room": room, "in_rows": in_rows}
    sampling.sample(model, rows, pixels(1), 2, 3, 0.0, **how)
    assert seen == [(model, [11 + 5, 4 + 1], [6, 2], [1, 0], 3, room or 750.0, in_rows)]


def test_more_images_than_the_prompts_show(build):
    """They are refused, and not left out in silence."""
    model = build()
    with pytest.raises(BadInput, match="0 image tokens in the text against 4 image features"):
        sampling.sample(model, [ids(3)], pixels(1), 1, 2, 0.0)
    with pytest.raises(BadInput, match="4 image tokens in the text against 8 image features"):
        sampling.sample(model, prompts(2), pixels(2), 1, 2, 0.0)


def test_both_towers_get_an_attention_that_takes_boolean_masks(build):
    """Whatever they were built with: eager attention would add True as 1."""
    model = build()
    model.vision.set_attn_implementation("eager")
    model.llm.set_attn_implementation("eager")
    again = MLLM(model.vision, model.projector, model.llm, IMAGE)
    assert again.vision.config._attn_implementation == "sdpa"
    assert again.llm.config._attn_implementation == "prefix"
    plain = build()
    assert torch.equal(some_log_probs(again), some_log_probs(plain))
