"""The multimodal LLM: CLIP encoder -> projector -> LLM, with fused log-probs.

Shapes, everywhere in this repository: B rows (prompts or pairs), K answers of a prompt, L row
length, P prompt, R answer, M answers and N scored answer tokens of a whole batch, I images,
T features of an image, D hidden size, V vocabulary.

Three ideas make it fast. Each is exact, and a test compares it with the plain way:
1. Only positions that predict an answer token pass through the LM head (`MLLM.log_probs`).
2. The gradient of log p(y_t) is computed with it in closed form (`FusedLogProb`): no logits are
   stored, and with a frozen LM head nothing is recomputed in the backward pass.
3. The answers of one prompt share it and its image: `[prompt | answer 1 | .. | answer K]` (`pack`).
   An answer attends to the prompt and to itself, never to another answer.
"""

import contextlib
import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from attention import install_attention, mask_and_prefix
from common import BadInput
from lora import LoRALinear, add_adapter
from nf4 import quantised


# ---- fused log-probs


class FusedLogProb(torch.autograd.Function):
    """log p(y | h) and the entropy of softmax(h W^T) for N rows; exact gradients, no stored logits.

    The forward pass computes d log p(y) / d h = (onehot(y) - p) W chunk by chunk; the backward pass
    multiplies it by the incoming (N,) gradient. A trainable W adds dW = (g (onehot(y) - p))^T h,
    for which the chunks are computed again: four matrix products where the naive way needs three.

    Precision: softmax and onehot - p are computed in float32 (float64 for float64 input) and cast
    to W's dtype once; the product stays float32. Rounding it too makes the error up to 1.2 times
    autograd's. W[y] - p W in bfloat16 loses 68 % (median, p(y) = .996): the two nearly cancel.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, chunk):
        need_h, need_w = ctx.needs_input_grad[:2]
        log_p = h.new_empty(len(h), dtype=torch.promote_types(h.dtype, torch.float32))
        entropy = torch.empty_like(log_p)
        slope = torch.empty_like(h, dtype=log_p.dtype) if need_h else None  # d log p / d h
        for i in range(0, len(h), chunk):
            s = slice(i, i + chunk)
            minus_p, log_p[s], entropy[s] = FusedLogProb.minus_softmax(h[s], weight, targets[s])
            if need_h:
                # the target's term (1 - p(y)) W[y] in float32; the others, -p W, may be rounded
                minus_p.scatter_(1, targets[s, None], 0.0)
                others = FusedLogProb.product(minus_p.to(weight.dtype), weight)
                one_minus_p = -torch.expm1(log_p[s, None])
                slope[s] = torch.addcmul(others, one_minus_p, weight[targets[s]].to(others.dtype))

        ctx.chunk, ctx.dtype = chunk, h.dtype
        ctx.save_for_backward(slope, *((h, weight, targets) if need_w else ()))
        ctx.mark_non_differentiable(entropy)
        return log_p, entropy

    @staticmethod
    def backward(ctx, grad, _):
        slope, *saved = ctx.saved_tensors
        grad_h = (slope * grad[:, None]).to(ctx.dtype) if slope is not None else None
        if not saved:
            return grad_h, None, None, None
        h, weight, targets = saved
        grad_w = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for i in range(0, len(h), ctx.chunk):
            s = slice(i, i + ctx.chunk)
            minus_p, log_p, _ = FusedLogProb.minus_softmax(h[s], weight, targets[s])
            minus_p.scatter_(1, targets[s, None], -torch.expm1(log_p)[:, None])
            grad_w += (minus_p.mul_(grad[s, None]).to(h.dtype).t() @ h[s]).to(grad_w.dtype)
        return grad_h, grad_w.to(weight.dtype), None, None

    @staticmethod
    def product(x, weight):
        """x (n, V) @ weight (V, D), never rounded below float32."""
        if x.is_cuda and x.dtype == torch.bfloat16:
            return torch.mm(x, weight, out_dtype=torch.float32)
        return (x.float() @ weight.float()) if x.dtype == torch.bfloat16 else x @ weight

    @staticmethod
    def minus_softmax(h, weight, targets):
        """One chunk: -softmax (n, V), log p(target) (n,), entropy (n,)."""
        z = (h @ weight.t()).to(torch.promote_types(h.dtype, torch.float32))  # (n, V)
        # else log p is rounded at the size of the logits, not its own
        z -= z.amax(-1, keepdim=True)
        minus_p = z.exp()
        total = minus_p.sum(-1, keepdim=True)
        minus_p /= -total
        log_total = total.log()[:, 0]  # H = log_total - sum p z
        log_p = z.gather(-1, targets[:, None])[:, 0] - log_total
        return minus_p, log_p, torch.linalg.vecdot(minus_p, z) + log_total


def fused_log_probs(h, weight, targets, chunk=None):
    """Log-probability of `targets` and entropy of each row: (N, D), (V, D), (N,) -> (N,), (N,).

    The entropy carries no gradient. A chunk of rows has by default 32 MB of logits in float32.
    """
    return FusedLogProb.apply(h, weight, targets, chunk or max(16, 2**23 // weight.shape[0]))


# ---- rows that share a prompt


@dataclass
class Batch:
    """B packed rows `[prompt | answer 1 | ... | answer K]`, padded on the right to length L."""

    input_ids: torch.Tensor  # (B, L); image positions hold the image token's id
    position_ids: torch.Tensor  # (B, L); every answer starts again at the prompt's end
    segments: torch.Tensor  # (B, L); 0 prompt, k = 1..K answer k, -1 padding
    index: torch.Tensor  # (N,) flat position b * L + l whose hidden state predicts ...
    targets: torch.Tensor  # (N,) ... this token
    owner: torch.Tensor  # (N,) number of its answer, counted row by row: 0 .. M - 1
    lengths: torch.Tensor  # (M,) scored tokens of each answer
    last: torch.Tensor  # (M,) flat position of each answer's last token; of an empty one, before it
    shortest_prompt: int  # tokens
    pixel_values: torch.Tensor | None = None  # (I, 3, H, W) in row order; NeXT: all their tiles
    image_sizes: torch.Tensor | None = None  # (I, 2) height and width in pixels; LLaVA-NeXT only
    weights: torch.Tensor | None = None  # (N,) of the tokens in `answer_log_probs`; None: 1 each

    def to(self, device):
        """The same batch with its tensors on `device`; `image_sizes`, which Python reads, stay.

        To a GPU they go from pinned memory, so that the host need not wait until it is idle.
        """
        tensors = {k: x for k, x in vars(self).items() if torch.is_tensor(x) and k != "image_sizes"}
        if torch.device(device).type == "cuda":
            tensors = {name: x.pin_memory() for name, x in tensors.items()}
        return replace(self, **{k: x.to(device, non_blocking=True) for k, x in tensors.items()})


def pack(prompts, answers, scored=None, pixel_values=None, pad_id=0, image_sizes=None):
    """Pack the answers of each prompt after one copy of it.

    prompts: B tensors (P,). answers: B lists of tensors (R,). scored: B lists of boolean tensors
    (R,), which tokens enter the loss (default: all). A prompt 1 2 3 with two answers:

        input_ids     1 2 3 | 10 11 | 20 21 22        index    2  3  2  5  6    hidden state at ...
        position_ids  0 1 2 |  3  4 |  3  4  5        targets 10 11 20 21 22    ... predicts
        segments      0 0 0 |  1  1 |  2  2  2        owner    0  0  1  1  1
    """
    B = len(prompts)
    L = max(len(p) + sum(map(len, row)) for p, row in zip(prompts, answers))
    input_ids = torch.full((B, L), pad_id)
    position_ids = torch.zeros(B, L, dtype=torch.long)
    segments = torch.full((B, L), -1)
    index, targets, owner, last = [], [], [], []

    for b, (prompt, row) in enumerate(zip(prompts, answers)):
        P = len(prompt)
        input_ids[b, :P] = prompt
        position_ids[b, :P] = torch.arange(P)
        segments[b, :P] = 0
        start = P
        for k, answer in enumerate(row):
            R = len(answer)
            here = slice(start, start + R)
            input_ids[b, here] = answer
            position_ids[b, here] = torch.arange(P, P + R)
            segments[b, here] = k + 1
            predicts_from = torch.arange(start - 1, start + R - 1)
            predicts_from[:1] = P - 1  # the first token: from the prompt's end
            keep = scored[b][k] if scored else torch.ones(R, dtype=torch.bool)
            index.append(b * L + predicts_from[keep])
            targets.append(answer[keep])
            owner.append(torch.full((int(keep.sum()),), len(owner)))  # number of this answer
            start += R
            last.append(b * L + start - 1)

    parts = [torch.cat(x or [torch.zeros(0).long()]) for x in (index, targets, owner)]
    lengths = torch.tensor([len(one) for one in owner], dtype=torch.long)
    last, shortest = torch.tensor(last, dtype=torch.long), min(map(len, prompts))
    rows = input_ids, position_ids, segments
    return Batch(*rows, *parts, lengths, last, shortest, pixel_values, image_sizes)


# ---- the model


class Projector(nn.Module):
    """LLaVA-1.5's two-layer map of image features to LLM embeddings: (.., D_vision) -> (.., D)."""

    def __init__(self, vision_size, hidden_size, bias=True):
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, hidden_size, bias=bias)
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(x)))


class MLLM(nn.Module):
    """transformers' CLIPVisionModel and causal LM with our projector, image splice and LoRA.

    image_token_id: image features replace the embeddings of this token.
    feature_layer: which hidden state of the tower they are (-2: the last layer but one, LLaVA's).
    keep_cls: False drops the class token ("default" in LLaVA's config).
    anyres: the tiling of LLaVA-NeXT, a `formats.anyres.AnyRes`; None for LLaVA-1.5.
    """

    def __init__(
        self, vision, projector, llm, image_token_id, feature_layer=-2, keep_cls=False, anyres=None
    ):
        super().__init__()
        self.vision, self.projector, self.llm = vision, projector, llm
        self.image_token_id = image_token_id
        self.feature_layer, self.keep_cls, self.anyres = feature_layer, keep_cls, anyres
        self.dtype = llm.get_input_embeddings().weight.dtype  # of the arithmetic
        if anyres:  # the vector that ends a row of tiles; it never trains
            self.image_newline = nn.Parameter(llm.get_input_embeddings().weight[0].detach() * 0)
        self.source = ""  # names the files that the weights were read from, for caches
        self.heads = nn.ModuleDict()  # scalar heads by name, of reward and value models
        self.initial_projector, self.initial_llm = [], []  # in lists: nn.Module does not see them
        install_attention(vision, llm)
        self.eval()

    @property
    def device(self):
        return self.llm.get_input_embeddings().weight.device

    def prepare(
        self,
        lora_rank=0,
        llm=True,
        projector=True,
        vision=False,
        keep_reference=False,
        gradient_checkpointing=False,
    ):
        """Choose what trains: LoRA on the LLM (rank 0: the whole LLM), the projector, the tower.

        What trains becomes float32: a step of 1e-6 on bfloat16 weights changes almost nothing.
        keep_reference: of an LLM that trains whole, keep a frozen copy for `reference`.
        """
        self.requires_grad_(False)
        if llm and lora_rank:
            add_adapter(self.llm, "policy", lora_rank)
        elif llm:
            if quantised(self.llm) != "none":
                raise BadInput("4-bit weights do not train: --quantize nf4 needs --lora-rank.")
            if keep_reference:
                self.initial_llm = [copy.deepcopy(self.llm)]
            self.llm.float().requires_grad_(True)
        if projector:
            self.initial_projector = [copy.deepcopy(self.projector)]
            self.projector.float().requires_grad_(True)
        if vision:
            self.vision.float().requires_grad_(True)
        if gradient_checkpointing:
            self.llm.activation_checkpointing_enable({"use_reentrant": False})
        return self

    def add_head(self, name):
        """Add a trainable scalar head on the hidden state, D -> 1, float32, with bias 0."""
        size = self.llm.config.hidden_size
        self.heads[name] = nn.Linear(size, 1, device=self.device, dtype=torch.float32)
        nn.init.zeros_(self.heads[name].bias)

    def lora_layers(self):
        """Every linear layer that has an adapter."""
        return [m for m in self.modules() if isinstance(m, LoRALinear)]

    def parameters_of(self, name):
        """The parameters of the adapter and of the head of this name."""
        mine = lambda n: f".adapters.{name}." in n or n.startswith(f"heads.{name}.")
        return [p for n, p in self.named_parameters() if mine(n)]

    @contextlib.contextmanager
    def use(self, name):
        """Inside, the adapter of this name acts; None: the base alone. Outside, "policy" acts.

        The backward pass belongs inside too: gradient checkpointing runs the blocks again in it.
        """
        layers = self.lora_layers()
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
        """Inside, the model is pi_ref: no adapter, projector and LLM as training found them.

        For online methods; dpo.py computes log pi_ref before its first step instead.
        """
        trains = lambda part: any(p.requires_grad for p in part.parameters())
        lost = trains(self.llm) and not self.lora_layers() and not self.initial_llm
        if lost or trains(self.vision):
            what = "--lora-rank 0: the LLM" if lost else "the vision tower"
            raise BadInput(
                f"{what} trains, so pi_ref is gone; cache its log-probs before training."
            )
        llm, projector = self.llm, self.projector
        try:
            if self.initial_llm:
                self.llm = self.initial_llm[0]
            if self.initial_projector:
                self.projector = self.initial_projector[0]
            with self.use(None):
                yield self
        finally:
            self.llm, self.projector = llm, projector

    def autocast(self):
        """Arithmetic in `dtype`, although what trains is float32."""
        on = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on)

    def image_features(self, pixel_values, image_sizes=None):
        """(I, 3, H, W) -> I tensors (T, D). The tower stops at `feature_layer`.

        LLaVA-NeXT: pixel_values holds the tiles of all images in order, image_sizes (I, 2) their
        heights and widths.
        """
        states = len(self.vision.encoder.layers) + 1
        with self.autocast():
            x = self.vision.pre_layrnorm(self.vision.embeddings(pixel_values.to(self.dtype)))
            for layer in self.vision.encoder.layers[
                : range(states)[self.feature_layer]
            ]:  # -2: n - 1
                x = layer(x, attention_mask=None)
            x = self.projector(x if self.keep_cls else x[:, 1:])
        if not self.anyres:
            return list(x)
        return self.anyres.join_all(x, image_sizes.tolist(), self.image_newline.to(x.dtype))

    def embed(self, input_ids, pixel_values=None, image_sizes=None):
        """(B, L) ids, image features in place of the image tokens -> (B, L, D).

        A row shows one image or none. On a GPU the numbers are not compared, as that would wait for
        it; `Processor.images` has compared them.
        """
        at_image = input_ids == self.image_token_id  # (B, L)
        x = self.llm.get_input_embeddings()(input_ids.masked_fill(at_image, 0))
        features = [] if pixel_values is None else self.image_features(pixel_values, image_sizes)
        if not at_image.is_cuda:
            tokens, lengths = [n for n in at_image.sum(1).tolist() if n], [len(f) for f in features]
            if tokens != lengths:
                raise BadInput(
                    f"{sum(tokens)} image tokens in the text against {sum(lengths)} image features "
                    f"(of rows with an image: {tokens}, of images: {lengths})."
                )
        if not features:
            return x
        # not masked_scatter: on a GPU its gradient waits to count the mask
        features = torch.cat(features).to(x.dtype)
        number = (at_image.flatten().cumsum(0) - 1).clamp(0, len(features) - 1)
        shown = features.index_select(0, number).view_as(x)
        return torch.where(at_image[:, :, None], shown, x)

    def run_llm(self, x, mask, position_ids, cache=None, prefix=0, wanted=None):
        """Run the LLM's blocks: embeddings (B, L, D), mask (B, 1, L, keys) -> states (B, L, D).

        prefix: number of leading positions whose mask is plain causal (see attention.py).
        wanted: flat positions (N,), none of them in the prefix -> (N, D).
        """
        # float32 embeddings would make the residual stream float32, unlike pi_ref's
        x = x.to(self.dtype)
        with self.autocast():
            out = self.llm.base_model(
                inputs_embeds=x,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
                prefix=prefix,
                wanted=wanted,
            )
        h = out.last_hidden_state
        if wanted is None or h.dim() == 2:  # attention.py's `LastBlock` has picked the positions
            return h
        return h.flatten(0, 1)[wanted]

    def hidden_states(self, batch, wanted=None, masked=None):
        """Hidden states at the flat positions `wanted` (N,) -> (N, D), or of all, (B, L, D).

        masked: (B, L), True = no other position attends to it.
        """
        mask, prefix = mask_and_prefix(batch, self.llm.config, wanted, masked)
        x = self.embed(batch.input_ids, batch.pixel_values, batch.image_sizes)
        return self.run_llm(x, mask, batch.position_ids, prefix=prefix, wanted=wanted)

    def head_weight(self):
        """The LM head's matrix (V, D) in the dtype of the arithmetic."""
        return self.llm.get_output_embeddings().weight.to(self.dtype)

    def log_probs(self, batch):
        """Log-prob of every scored answer token, and the entropy there: (N,), (N,) float32."""
        h = self.hidden_states(batch, batch.index)  # (N, D)
        return fused_log_probs(h.to(self.dtype), self.head_weight(), batch.targets)

    def answer_log_probs(self, batch):
        """log p(answer | prompt): the sum over its scored tokens, weighted or not, (M,)."""
        log_p, _ = self.log_probs(batch)
        if batch.weights is not None:
            log_p = log_p * batch.weights
        return log_p.new_zeros(len(batch.lengths)).index_add(0, batch.owner, log_p)

    def values(self, batch, wanted, head):
        """A scalar head on the hidden states at the flat positions (N,) -> (N,) float32."""
        h = self.hidden_states(batch, wanted)  # (N, D)
        return self.heads[head](h.float())[:, 0]
