"""The multimodal LLM: CLIP encoder -> projector -> LLM, with LoRA, fused log-probs, shared prompts and sampling.

Shapes, everywhere in this repository: B rows (prompts or pairs), K answers of a prompt, L row length, P prompt, R answer,
N scored answer tokens of a whole batch, I images, T features of an image, D hidden size, V vocabulary.

Three ideas make it fast; each is exact and has a test that compares it with the plain way:
1. only rows that predict an answer token pass through the last block's MLP and the LM head (`log_probs`, `LastBlock`);
2. log p(y_t) depends on h_t alone, so its gradient is computed in closed form beside it (`FusedLogProb`): no logits are kept
   and nothing is recomputed in the backward pass;
3. the answers of one prompt share it: one row `[prompt | answer 1 | ... | answer K]` (`pack`), one image encoding, and, when
   sampling, one prefill (`MLLM.sample`).
"""

import contextlib
import copy
import functools
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class BadInput(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what and where. Exit status 2."""


# ---- fused log-probs


class FusedLogProb(torch.autograd.Function):
    """log p(y | h) and entropy of softmax(h W^T) for N rows, with exact gradients and without keeping logits.

    d log p(y) / d h = (onehot(y) - p) W is computed chunk by chunk in the forward pass; the backward pass multiplies it by the
    incoming (N,) gradient. A trainable W adds dW = (g (onehot(y) - p))^T h, for which the chunks are computed again: four
    products against the three of the naive way, in exchange for never holding (N, V).
    Softmax and onehot - p are float32 (float64 for float64 input) and cast before the product, whose sum stays float32 until
    it has met the incoming gradient: rounded twice it would be up to 1.2 times as far from the truth as autograd's. Written as
    W[y] - p W the two terms would cancel in bfloat16: for p(y) = 0.996 the median error of the gradient is 68 % instead of 3 %.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, chunk):
        need_h, need_w = ctx.needs_input_grad[:2]
        log_p = torch.empty(
            len(h), device=h.device, dtype=torch.promote_types(h.dtype, torch.float32)
        )
        entropy = torch.empty_like(log_p)
        slope = torch.empty(h.shape, device=h.device, dtype=log_p.dtype) if need_h else None
        for i in range(0, len(h), chunk):
            s = slice(i, i + chunk)
            minus_p, log_p[s], entropy[s] = FusedLogProb.minus_softmax(h[s], weight, targets[s])
            if need_h:
                minus_p.scatter_(
                    1, targets[s, None], 0.0
                )  # y apart: 1 - p(y), the largest factor, is not rounded
                others = FusedLogProb.product(minus_p.to(weight.dtype), weight)
                slope[s] = torch.addcmul(
                    others, -torch.expm1(log_p[s, None]), weight[targets[s]].to(others.dtype)
                )
        ctx.chunk, ctx.dtype = chunk, h.dtype
        ctx.save_for_backward(*(slope, *((h, weight, targets) if need_w else ())))
        ctx.mark_non_differentiable(entropy)
        return log_p, entropy

    @staticmethod
    def backward(ctx, grad, _):
        slope, *saved = ctx.saved_tensors
        grad_h = (slope * grad[:, None]).to(ctx.dtype) if slope is not None else None
        grad_w = None
        if saved:
            h, weight, targets = saved
            grad_w = torch.zeros_like(
                weight, dtype=torch.promote_types(weight.dtype, torch.float32)
            )
            for i in range(0, len(h), ctx.chunk):
                s = slice(i, i + ctx.chunk)
                minus_p, log_p, _ = FusedLogProb.minus_softmax(h[s], weight, targets[s])
                minus_p[torch.arange(len(minus_p), device=h.device), targets[s]] = -torch.expm1(
                    log_p
                )
                grad_w += (minus_p.mul_(grad[s, None]).to(h.dtype).t() @ h[s]).to(grad_w.dtype)
            grad_w = grad_w.to(weight.dtype)
        return grad_h, grad_w, None, None

    @staticmethod
    def product(x, weight):
        """x (n, V) @ weight (V, D), not rounded below float32."""
        if weight.dtype != torch.bfloat16:
            return x @ weight
        return (
            torch.mm(x, weight, out_dtype=torch.float32)
            if x.is_cuda
            else x.float() @ weight.float()
        )

    @staticmethod
    def minus_softmax(h, weight, targets):
        """One chunk: -softmax (n, V), log p(target) (n,), entropy (n,)."""
        z = (h @ weight.t()).to(torch.promote_types(h.dtype, torch.float32))  # (n, V)
        z -= z.amax(
            -1, keepdim=True
        )  # else log p is rounded at the size of the logits, not its own
        minus_p = z.exp()
        total = minus_p.sum(-1, keepdim=True)
        minus_p /= -total
        log_total = total.log()[:, 0]
        log_p = z.gather(-1, targets[:, None])[:, 0] - log_total
        return minus_p, log_p, torch.linalg.vecdot(minus_p, z) + log_total


def fused_log_probs(h, weight, targets, chunk=None):
    """Log-probability of `targets` and entropy of each row: (N, D), (V, D), (N,) -> (N,), (N,); entropy carries no gradient.

    `chunk` rows pass through the head at a time; the default keeps a chunk's logits near 32 MB in float32.
    """
    return FusedLogProb.apply(h, weight, targets, chunk or max(16, 2**23 // weight.shape[0]))


# ---- rows that share a prompt


@dataclass
class Batch:
    """B packed rows `[prompt | answer 1 | ... | answer K]`, padded on the right to length L (see `pack`)."""

    input_ids: torch.Tensor  # (B, L); image positions hold the image token's id
    position_ids: torch.Tensor  # (B, L); restart at the prompt's end for every answer
    segments: torch.Tensor  # (B, L); 0 prompt, k = 1..K answer k, -1 padding
    index: torch.Tensor  # (N,) flat position b * L + l whose hidden state predicts ...
    targets: torch.Tensor  # (N,) ... this token
    owner: torch.Tensor  # (N,) number of its answer, counted through all rows: 0 .. answers - 1
    answers: int
    pixel_values: torch.Tensor | None = (
        None  # (I, 3, H, W), the images of the rows in order; LLaVA-NeXT: all their tiles
    )
    image_sizes: torch.Tensor | None = None  # (I, 2), height and width in pixels; LLaVA-NeXT only

    def to(self, device):
        """The same batch with every tensor on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in moved.items()})


def pack(prompts, answers, scored=None, pixel_values=None, pad_id=0, image_sizes=None):
    """Pack the answers of each prompt behind one copy of it.

    prompts: B tensors (P,). answers: B lists of tensors (R,). scored: B lists of boolean tensors (R,), which tokens enter the
    loss (default: all). The first token of an answer is predicted from the prompt's last position, wherever the answer stands.
    """
    B, L = len(prompts), max(len(p) + sum(map(len, a)) for p, a in zip(prompts, answers))
    input_ids = torch.full((B, L), pad_id)
    position_ids = torch.zeros(B, L, dtype=torch.long)
    segments = torch.full((B, L), -1)
    index, targets, owner, n = [], [], [], 0
    for b, (prompt, row) in enumerate(zip(prompts, answers)):
        P = at = len(prompt)
        input_ids[b, :P], position_ids[b, :P], segments[b, :P] = prompt, torch.arange(P), 0
        for k, answer in enumerate(row):
            R = len(answer)
            here = slice(at, at + R)
            input_ids[b, here], position_ids[b, here], segments[b, here] = (
                answer,
                torch.arange(P, P + R),
                k + 1,
            )
            before = torch.arange(at - 1, at + R - 1)
            before[:1] = P - 1
            keep = scored[b][k] if scored else torch.ones(R, dtype=torch.bool)
            index.append(b * L + before[keep])
            targets.append(answer[keep])
            owner.append(torch.full((int(keep.sum()),), n))
            at, n = at + R, n + 1
    cat = lambda parts: torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)
    return Batch(
        input_ids,
        position_ids,
        segments,
        cat(index),
        cat(targets),
        cat(owner),
        n,
        pixel_values,
        image_sizes,
    )


def last_tokens(batch):
    """Flat position of the last token of every answer of a batch, (answers,). No answer may be empty."""
    following = F.pad(batch.segments[:, 1:], (0, 1), value=-1)
    return ((batch.segments > 0) & (batch.segments != following)).flatten().nonzero()[:, 0]


def attention_mask(segments, hidden=None):
    """Which position sees which: (B, L) segments -> (B, 1, L, L) boolean, True = visible.

    Causal; an answer sees the prompt and itself, never a sibling. `hidden` (B, L) marks positions (image tokens in BDHS) that
    nobody but themselves may see. A padding position sees itself, so that no row of the softmax is empty.
    """
    L = segments.shape[1]
    see = (segments[:, :, None] == segments[:, None, :]) | (segments == 0)[:, None, :]
    see &= torch.ones(L, L, dtype=torch.bool, device=segments.device).tril()
    if hidden is not None:
        see &= ~hidden[:, None, :] | torch.eye(L, dtype=torch.bool, device=segments.device)
    return see[:, None]


@functools.cache
def prefix_attention():
    """Register "prefix" with transformers: its SDPA attention, where the first `prefix` positions of every row are plain prompt.

    Their queries need no mask and none of the later keys: a causal kernel takes them, at half the work (and on a GPU without
    leaving the flash kernels). Returns the name for `set_attn_implementation`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa
    from transformers.masking_utils import sdpa_mask

    def attend(module, query, key, value, attention_mask, prefix=0, rows=None, **settings):
        """(B, heads, Q, d), mask (B, 1, Q, keys) -> (B, Q, heads, d), None. With rows, nobody reads the last block's prefix."""
        if not prefix:
            return sdpa(module, query, key, value, attention_mask, **settings)
        first, rest = query.split([prefix, query.shape[2] - prefix], 2)
        rest, _ = sdpa(module, rest, key, value, attention_mask[:, :, prefix:], **settings)
        if rows is not None and module.layer_idx == module.config.num_hidden_layers - 1:
            return F.pad(rest, (0, 0, 0, 0, prefix, 0)), None
        settings["is_causal"] = True
        first, _ = sdpa(module, first, key[:, :, :prefix], value[:, :, :prefix], None, **settings)
        return torch.cat([first, rest], 1), None

    AttentionInterface.register("prefix", attend)
    AttentionMaskInterface.register("prefix", sdpa_mask)
    return "prefix"


class LastBlock:
    """Mixed into the class of an LLM's last block: behind the attention only the wanted rows, for nothing reads the others.

    By count of multiplications a reward model, which wants one row an answer, is spared a fifth in the toy model of 3 blocks;
    lab/bench.py's DPO step 5 % with its 8 blocks, and 2 % with the 32 of a 7 B model.
    """

    KNOWN = (
        "LlamaDecoderLayer",
        "MistralDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
    )  # all built the same way

    @classmethod
    def mix_into(cls, block):
        """Change the class of a block in place, if its way of adding attention and MLP is known. Weights keep their names."""
        if type(block).__name__ in cls.KNOWN and not isinstance(block, cls):
            block.__class__ = type(type(block).__name__, (cls, type(block)), {})

    def forward(self, hidden_states, rows=None, **settings):
        """(B, L, D), flat positions (N,) -> (N, D); without rows as the block itself."""
        if rows is None:
            return super().forward(hidden_states, **settings)
        x, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), rows=rows, **settings
        )
        x = (hidden_states + x).flatten(0, 1)[rows]
        return x + self.mlp(self.post_attention_layernorm(x))


# ---- LoRA


class LoRA(nn.Module):
    """(alpha / rank) x A^T B^T (Hu et al. 2021). A and B are float32; B starts at 0, so training starts at the base weight."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.scale = alpha / rank
        new = {"dtype": torch.float32, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **new))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **new))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as PEFT

    def add_to(self, y, x):
        """y (n, out) += its share of x (n, in), in y's own memory: no tensor of that size is made beside it.

        y must be no view: autograd would copy it whole in the backward pass.
        """
        low = self.scale * F.linear(x.to(y.dtype), self.lora_A.to(y.dtype))  # (n, rank)
        return y.addmm_(low, self.lora_B.to(y.dtype).t())


class LoRALinear(nn.Module):
    """y = x W^T, and what the adapter in use adds: several named adapters stand over one frozen W (`MLLM.use`).

    `active` is the name of the one in use, None for W alone. "policy" is the one that preference optimization trains.
    """

    def __init__(self, base, rank, alpha, name="policy"):
        super().__init__()
        self.base, self.adapters, self.active = (
            base,
            nn.ModuleDict({name: LoRA(base, rank, alpha)}),
            "policy",
        )

    def forward(self, x):
        if self.active not in self.adapters:
            return self.base(x)
        rows = x.flatten(0, -2)
        return self.adapters[self.active].add_to(self.base(rows), rows).unflatten(0, x.shape[:-1])


# ---- the model


class Projector(nn.Module):
    """LLaVA-1.5's two-layer map of image features into the LLM's embedding space: (..., D_vision) -> (..., D)."""

    def __init__(self, vision_size, hidden_size, bias=True):
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, hidden_size, bias=bias)
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(x)))


class KVCache:
    """Keys and values of every layer, in memory allocated once: the prompt's slots, then one slot a new token."""

    def __init__(self, slots):
        self.slots, self.length, self.keys, self.values = slots, 0, [], []

    def update(self, key, value, layer, *_):
        """Called by each attention layer: store (rows, heads, new, d) behind what is there, return all of it."""
        if layer == len(self.keys):
            shape = (*key.shape[:2], self.slots, key.shape[3])
            self.keys.append(key.new_empty(shape))
            self.values.append(value.new_empty((*shape[:3], value.shape[3])))
        end = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def take(self, rows, slots):
        """Keep (or repeat) these rows, with room for `slots` tokens."""
        self.slots = slots
        for stored in (self.keys, self.values):
            for i, old in enumerate(stored):
                stored[i] = old.new_empty((len(rows), old.shape[1], slots, old.shape[3]))
                stored[i][:, :, : self.length] = old[rows, :, : self.length]


@dataclass
class Samples:
    """K answers of each of B prompts: `tokens[b][k]` (R,), the stop token included, and their log-probs `log_probs[b][k]` (R,).

    The log-probs are those of the full softmax at temperature 1, whatever temperature drew the tokens.
    `finished[b][k]` is False for an answer cut off at `max_new_tokens`.
    """

    tokens: list
    log_probs: list
    finished: list


class MLLM(nn.Module):
    """transformers' CLIPVisionModel and causal LM with our projector, splice and LoRA; arithmetic in `dtype`.

    image_token_id: the id at whose positions image features are put. feature_layer: which of the tower's hidden states
    (-2: the output of the last layer but one, as LLaVA). keep_cls: False drops the class token ("default" in LLaVA's config).
    anyres: LLaVA-NeXT's tiling, an `anyres.AnyRes`; None for LLaVA-1.5, one image one square. Its `image_newline` never trains.
    """

    def __init__(
        self, vision, projector, llm, image_token_id, feature_layer=-2, keep_cls=False, anyres=None
    ):
        super().__init__()
        self.vision, self.projector, self.llm = vision, projector, llm
        self.image_token_id, self.feature_layer, self.keep_cls = (
            image_token_id,
            feature_layer,
            keep_cls,
        )
        self.anyres, self.dtype = anyres, llm.get_input_embeddings().weight.dtype
        if anyres:
            self.image_newline = nn.Parameter(
                torch.zeros_like(llm.get_input_embeddings().weight[0])
            )
        self.initial_projector, self.initial_llm = None, []
        self.heads = nn.ModuleDict()  # scalar heads by name, of reward and value models
        head = llm.get_output_embeddings()
        if head.bias is not None or getattr(llm.config, "final_logit_softcapping", None):
            raise BadInput(
                f"{type(llm).__name__}: an LM head with a bias or a soft cap is not supported; Llama-like heads are."
            )
        for name in ("logits_scaling", "logit_scale"):
            if getattr(llm.config, name, 1.0) not in (None, 1.0):
                raise BadInput(
                    f"{type(llm).__name__}: an LLM that scales its logits ({name}) is not supported; Llama-like ones are."
                )
        for part in (vision, llm):  # eager attention would add our boolean masks as 0 and 1
            part.set_attn_implementation(
                "sdpa"
            )  # raises for an architecture that it would compute wrongly
        llm.set_attn_implementation(prefix_attention())
        LastBlock.mix_into(llm.base_model.layers[-1])
        for module in self.modules():  # dropout would make policy and reference differ at step 0
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in ("attention_dropout", "dropout"):  # the second is CLIP's name for it
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        self.eval()

    @property
    def device(self):
        return self.llm.get_input_embeddings().weight.device

    def prepare(
        self,
        lora_rank=0,
        lora_alpha=None,
        llm=True,
        projector=True,
        vision=False,
        keep_reference=False,
    ):
        """Choose what trains: LoRA of this rank on every linear layer of the LLM's blocks (0: the whole LLM), projector, tower.

        Whatever trains becomes float32: a step of 1e-6 on bfloat16 weights changes almost nothing. alpha defaults to 2 rank.
        keep_reference: where the whole LLM trains, keep a frozen copy of it for `reference()`.
        """
        self.requires_grad_(False)
        if llm and lora_rank:
            self.add_adapter("policy", lora_rank, lora_alpha)
        elif llm:
            if keep_reference:
                self.initial_llm = [
                    copy.deepcopy(self.llm)
                ]  # in a list: no part of the model, of its files or its optimizer
            self.llm.float().requires_grad_(True)
        if projector:
            self.initial_projector = {k: v.clone() for k, v in self.projector.state_dict().items()}
            self.projector.float().requires_grad_(True)
        if vision:
            self.vision.float().requires_grad_(True)
        return self

    def add_adapter(self, name, rank, alpha=None):
        """Stand LoRA of this name beside every linear layer of the LLM's blocks; it trains. alpha defaults to 2 rank."""
        alpha = 2 * rank if alpha is None else alpha
        for block in self.llm.base_model.layers:
            for module in [m for m in block.modules() if not isinstance(m, LoRALinear)]:
                for leaf, child in list(module.named_children()):
                    if isinstance(child, LoRALinear):
                        child.adapters[name] = LoRA(child.base, rank, alpha)
                    elif isinstance(child, nn.Linear):
                        if leaf not in LORA_TARGETS:
                            raise BadInput(
                                f"LoRA: no adapter is known for the layer {leaf}; known are {', '.join(LORA_TARGETS)}."
                            )
                        setattr(module, leaf, LoRALinear(child, rank, alpha, name))

    def add_head(self, name):
        """A scalar head over the hidden state, D -> 1, float32, its bias at 0; it trains."""
        self.heads[name] = nn.Linear(
            self.llm.config.hidden_size, 1, device=self.device, dtype=torch.float32
        )
        nn.init.zeros_(self.heads[name].bias)

    def parameters_of(self, name):
        """The parameters of the adapter and of the head of this name."""
        adapters = [
            m.adapters[name]
            for m in self.modules()
            if isinstance(m, LoRALinear) and name in m.adapters
        ]
        heads = [self.heads[name]] if name in self.heads else []
        return [p for m in adapters + heads for p in m.parameters()]

    @contextlib.contextmanager
    def use(self, name):
        """Inside, the adapter of this name acts instead of "policy"; None: the base alone.

        A backward pass belongs inside too: gradient checkpointing runs the blocks again in it.
        """
        layers = [m for m in self.modules() if isinstance(m, LoRALinear)]
        if name is not None and not any(name in m.adapters for m in layers):
            raise BadInput(f"the model has no adapter {name!r}.")
        before = [m.active for m in layers]
        try:
            for m in layers:
                m.active = name
            yield self
        finally:
            for m, active in zip(layers, before):
                m.active = active

    @contextlib.contextmanager
    def reference(self):
        """Inside, the model is the one that training started from: adapters off, projector (and LLM) at the initial copy."""
        adapted = any(isinstance(m, LoRALinear) for m in self.modules())
        if (
            not adapted
            and not self.initial_llm
            and any(p.requires_grad for p in self.llm.parameters())
        ):
            raise BadInput(
                "--lora-rank 0 trains the LLM itself, so the reference policy is gone: cache its log-probs before."
            )
        if any(p.requires_grad for p in self.vision.parameters()):
            raise BadInput(
                "the vision tower trains, so the reference policy is gone: cache its log-probs before."
            )
        trained = (
            {k: v.clone() for k, v in self.projector.state_dict().items()}
            if self.initial_projector
            else None
        )
        trained_llm = self.llm
        try:
            if self.initial_llm:
                self.llm = self.initial_llm[0]
            if trained:
                self.projector.load_state_dict(self.initial_projector)
            with self.use(None):
                yield self
        finally:
            self.llm = trained_llm
            if trained:
                self.projector.load_state_dict(trained)

    def autocast(self):
        """Arithmetic in `dtype` although what trains is float32."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def image_features(self, pixel_values, image_sizes=None):
        """(I, 3, H, W) -> I tensors (T, D). Layers of the tower behind `feature_layer` are not run.

        LLaVA-NeXT: pixel_values holds the tiles of all images in order, image_sizes (I, 2) their heights and widths.
        """
        sizes = image_sizes.tolist() if self.anyres else ()
        tiles = [1 + math.prod(self.anyres.grid(size)) for size in sizes]
        if self.anyres and sum(tiles) != len(pixel_values):
            raise BadInput(
                f"{len(pixel_values)} tiles, but images of these heights and widths have {sum(tiles)}: {sizes}."
            )
        states = len(self.vision.encoder.layers) + 1
        with self.autocast():
            x = self.vision.pre_layrnorm(self.vision.embeddings(pixel_values.to(self.dtype)))
            for layer in self.vision.encoder.layers[: range(states)[self.feature_layer]]:
                x = layer(x, attention_mask=None)
            x = self.projector(x if self.keep_cls else x[:, 1:])
        if not self.anyres:
            return list(x)
        return [
            self.anyres.join(f, size, self.image_newline.to(x.dtype))
            for f, size in zip(x.split(tiles), sizes)
        ]

    def embed(self, input_ids, pixel_values=None, image_sizes=None):
        """(B, L) ids with image features at the image positions -> (B, L, D). A row shows one image or none."""
        at_image = input_ids == self.image_token_id
        x = self.llm.get_input_embeddings()(input_ids.masked_fill(at_image, 0))
        features = [] if pixel_values is None else self.image_features(pixel_values, image_sizes)
        wanted = [(b, n) for b, n in enumerate(at_image.sum(1).tolist()) if n]
        for (b, n), f in zip(wanted, features):
            if n != len(f):
                raise BadInput(
                    f"row {b} of the batch: {n} image tokens in the text against {len(f)} image features."
                )
        if len(wanted) != len(features):
            tokens, found = sum(n for _, n in wanted), sum(map(len, features))
            raise BadInput(f"{tokens} image tokens in the text against {found} image features.")
        return (
            x.masked_scatter(at_image[:, :, None], torch.cat(features).to(x.dtype))
            if features
            else x
        )

    def decode(self, x, see, position_ids, cache=None, prefix=0, rows=None):
        """Run the LLM's blocks: (B, L, D) embeddings and a (B, 1, L, keys) boolean mask -> (B, L, D) hidden states.

        prefix: the length up to which the mask is the plain causal one (see `prefix_attention`).
        rows: flat positions (N,) whose states are wanted, none of them in the prefix -> (N, D).
        """
        x = x.to(
            self.dtype
        )  # embeddings that train are float32; so would the residual stream be, and unlike the reference's
        with self.autocast():
            out = self.llm.base_model(
                inputs_embeds=x,
                attention_mask=see,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
                prefix=prefix,
                rows=rows,
            )
        h = out.last_hidden_state
        return h if rows is None or h.dim() == 2 else h.flatten(0, 1)[rows]  # 2: of a `LastBlock`

    def hidden(self, batch, hidden_positions=None, rows=None):
        """Hidden states of every position of a batch, (B, L, D), or of these flat positions (N,) -> (N, D)."""
        see, prefix = self.visible(batch, hidden_positions, rows)
        x = self.embed(batch.input_ids, batch.pixel_values, batch.image_sizes)
        return self.decode(x, see, batch.position_ids, prefix=prefix, rows=rows)

    def visible(self, batch, hidden_positions=None, rows=None):
        """The attention mask of a batch, and the length up to which it is the plain causal one and has none of `rows`."""
        see = attention_mask(batch.segments, hidden_positions)
        windowed = self.window(see, batch.position_ids, batch.position_ids)
        if windowed is not see or (hidden_positions is not None and hidden_positions.any()):
            return windowed, 0
        L, shortest = see.shape[-1], int((batch.segments == 0).sum(1).min())
        first = (
            L - 1 if rows is None or not len(rows) else int((rows % L).min())
        )  # the masked part is not empty
        return windowed, min(shortest, first)

    def window(self, see, queries, keys):
        """Intersect a mask with the LLM's sliding window, by position. (B, 1, Q, K), (B, Q), (B, K) -> mask or dict of masks."""
        config = self.llm.config
        layer_types = set(getattr(config, "layer_types", None) or ())
        width = getattr(config, "sliding_window", None)
        if not width or layer_types == {"full_attention"}:
            return see
        near = see & ((queries[:, :, None] - keys[:, None, :]) < width)[:, None]
        return {"full_attention": see, "sliding_attention": near} if layer_types else near

    def log_probs(self, batch):
        """Log-probability of every scored answer token, and the entropy there: (N,), (N,) float32."""
        h = self.hidden(batch, rows=batch.index)  # (N, D)
        return fused_log_probs(
            h.to(self.dtype), self.llm.get_output_embeddings().weight.to(self.dtype), batch.targets
        )

    def answer_log_probs(self, batch):
        """log p(answer | prompt): the sum over its scored tokens, (answers,)."""
        log_p, _ = self.log_probs(batch)
        return log_p.new_zeros(batch.answers).index_add(0, batch.owner, log_p)

    def values(self, batch, at, head):
        """A scalar head on the hidden states at the flat positions `at` (N,) of a batch -> (N,) float32."""
        h = self.hidden(batch, rows=at)  # (N, D)
        return self.heads[head](h.float())[:, 0]

    @torch.no_grad()
    def sample(
        self,
        prompts,
        pixel_values=None,
        k=1,
        max_new_tokens=256,
        temperature=1.0,
        stop_ids=(),
        image_mask=None,
        given=None,
        generator=None,
        image_sizes=None,
    ):
        """Draw k answers of each prompt: the image is encoded once, the prompt prefilled once, then its cache is repeated.

        prompts: B tensors (P,). temperature 0 is greedy. Drawing stops at any of `stop_ids` or after max_new_tokens; the image
        token is never drawn. image_mask (B, longest P) marks prompt positions to hide from attention for the whole
        generation; no position id moves. given: B lists of (tokens (R,), cuts): texts that the answers begin with; each is
        prefilled once, behind its prompt, and continued k times from each cut, the number of its tokens that are kept.
        Returns `Samples`, in the order of `given` and its cuts, without the given tokens.
        """
        given = given or [[(torch.zeros(0, dtype=torch.long), [0])]] * len(prompts)
        batch = pack(prompts, [[tokens for tokens, _ in texts] for texts in given]).to(self.device)
        B, L = batch.input_ids.shape
        hide = torch.zeros(B, L, dtype=torch.bool, device=self.device)
        if image_mask is not None:
            hide[:, : image_mask.shape[1]] = image_mask.to(self.device)
        branches = [
            [(j + 1, cut) for j, (_, cuts) in enumerate(texts) for cut in cuts for _ in range(k)]
            for texts in given
        ]
        row = torch.tensor(
            [b for b in range(B) for _ in branches[b]], device=self.device
        )  # (M,) of each answer
        segment, cut = torch.tensor(sum(branches, []), device=self.device).view(-1, 2).T
        start = (
            torch.tensor([len(p) for p in prompts], device=self.device)[row] + cut
        )  # position id of the first new token
        positions = batch.position_ids[row]
        mine = (batch.segments[row] == 0) | (
            (batch.segments[row] == segment[:, None]) & (positions < start[:, None])
        )
        last = row * L + (mine & (positions == start[:, None] - 1)).int().argmax(1)  # (M,) flat

        cache = KVCache(L)
        x = self.embed(
            batch.input_ids,
            None if pixel_values is None else pixel_values.to(self.device),
            image_sizes,
        )
        see, prefix = self.visible(batch, hide, last)
        h = self.decode(x, see, batch.position_ids, cache, prefix, last)  # (M, D)
        cache.length = L

        M, slots = len(row), L + max_new_tokens
        cache.take(row, slots)
        alive = torch.arange(
            M, device=self.device
        )  # the answers that are computed, and which of them still grow
        live = torch.ones(M, dtype=torch.bool, device=self.device)
        visible = F.pad(mine & ~hide[row], (0, max_new_tokens))
        positions = F.pad(positions, (0, max_new_tokens))
        tokens = torch.zeros(M, max_new_tokens, dtype=torch.long, device=self.device)
        log_probs = torch.zeros(M, max_new_tokens, device=self.device)
        drawn = torch.zeros(M, dtype=torch.long, device=self.device)
        finished = torch.zeros(M, dtype=torch.bool, device=self.device)
        stop = torch.tensor(list(stop_ids), device=self.device)
        weight = self.llm.get_output_embeddings().weight.to(self.dtype)
        for t in range(max_new_tokens):
            logits = (h.to(self.dtype) @ weight.t()).float()  # (M, V)
            log_p = logits.log_softmax(-1)
            logits[:, self.image_token_id] = -torch.inf
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                token = torch.multinomial(
                    (logits / temperature).softmax(-1), 1, generator=generator
                )[:, 0]
            rows = alive[live]
            tokens[rows, t], log_probs[rows, t] = (
                token[live],
                log_p.gather(-1, token[:, None])[live, 0],
            )
            drawn[rows] += 1
            finished[rows] = torch.isin(token[live], stop)
            live &= ~torch.isin(token, stop)
            if t == max_new_tokens - 1 or not live.any():
                break
            if live.sum() <= 0.75 * len(live):  # enough answers have ended to be worth the copy
                keep = live.nonzero()[:, 0]
                alive, live, token, start, visible, positions = (
                    v[keep] for v in (alive, live, token, start, visible, positions)
                )
                cache.take(keep, slots)
            visible[:, L + t], positions[:, L + t] = True, start + t
            seen = self.window(
                visible[:, None, None, : L + t + 1], (start + t)[:, None], positions[:, : L + t + 1]
            )
            h = self.decode(
                self.llm.get_input_embeddings()(token)[:, None], seen, (start + t)[:, None], cache
            )[:, 0]
            cache.length += 1
        ends = torch.tensor([len(b) for b in branches]).cumsum(0).tolist()
        split = lambda v: [
            [v[m, : drawn[m]].cpu() for m in range(end - len(b), end)]
            for b, end in zip(branches, ends)
        ]
        finished = [finished[end - len(b) : end].tolist() for b, end in zip(branches, ends)]
        return Samples(split(tokens), split(log_probs), finished)
