"""Who attends to whom in a packed row, and two ways to skip work on which no result depends.

Neither changes a number: `prefix_attention` gives the plain prompt to a causal kernel, and
`LastBlock` computes the last block only where its output is read. Tests compare both with the
plain way.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from common import BadInput


def attention_mask(segments, masked=None):
    """Which position attends to which: (B, L) segments -> (B, 1, L, L) boolean, True = visible.

    Causal. An answer sees the prompt and itself, never a sibling. `masked` (B, L) marks positions
    (image tokens in BDHS) that only they themselves may see. A padding position sees itself, so
    that no row of the softmax is empty.
    """
    L = segments.shape[1]
    mask = (segments[:, :, None] == segments[:, None, :]) | (segments == 0)[:, None, :]
    mask &= torch.ones(L, L, dtype=torch.bool, device=segments.device).tril()
    if masked is not None:
        mask &= ~masked[:, None, :] | torch.eye(L, dtype=torch.bool, device=segments.device)
    return mask[:, None]


def sliding_window(mask, queries, keys, config):
    """Intersect a mask with the LLM's sliding window, by position id.

    (B, 1, Q, K), (B, Q), (B, K) -> a mask, or {kind of layer: mask} for an LLM that mixes kinds.
    """
    layer_types = set(getattr(config, "layer_types", None) or ())
    width = getattr(config, "sliding_window", None)
    if not width or layer_types == {"full_attention"}:
        return mask
    near = mask & ((queries[:, :, None] - keys[:, None, :]) < width)[:, None]
    return {"full_attention": mask, "sliding_attention": near} if layer_types else near


def mask_and_prefix(batch, config, wanted=None, masked=None):
    """The attention mask of a batch, and how many first positions are a plain causal prompt.

    wanted: flat positions (N,) whose hidden states will be read; the prefix contains none of them.
    The prefix is 0 where anything may be masked or a sliding window applies.
    """
    mask = attention_mask(batch.segments, masked)
    windowed = sliding_window(mask, batch.position_ids, batch.position_ids, config)
    if windowed is not mask or masked is not None:
        return windowed, 0

    # the prompt without its last token, which predicts; so the rest is never empty
    prefix = batch.shortest_prompt - 1
    known = (batch.index, batch.last)  # others may be in the prompt; to look waits for the device
    if wanted is not None and len(wanted) and not any(wanted is x for x in known):
        prefix = min(prefix, int((wanted % mask.shape[-1]).min()))
    return mask, prefix


@functools.cache
def prefix_attention():
    """Register "prefix" with transformers: its SDPA attention that knows about the causal prefix.

    The queries of the first `prefix` positions need no mask and none of the later keys. A causal
    kernel computes them at half the work, and on a GPU without leaving the flash kernels.
    Returns the name for `set_attn_implementation`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa
    from transformers.masking_utils import sdpa_mask

    def attend(module, query, key, value, attention_mask, prefix=0, wanted=None, **settings):
        """(B, heads, Q, d) and a mask (B, 1, Q, keys) -> (B, Q, heads, d), None.

        Given `wanted`, the last block's output for the prefix is not read, and is skipped.
        """
        if not prefix:
            return sdpa(module, query, key, value, attention_mask, **settings)
        first, rest = query.split([prefix, query.shape[2] - prefix], 2)
        rest, _ = sdpa(module, rest, key, value, attention_mask[:, :, prefix:], **settings)
        if wanted is not None and module.layer_idx == module.config.num_hidden_layers - 1:
            return F.pad(rest, (0, 0, 0, 0, prefix, 0)), None
        settings["is_causal"] = True
        first, _ = sdpa(module, first, key[:, :, :prefix], value[:, :, :prefix], None, **settings)
        return torch.cat([first, rest], 1), None

    AttentionInterface.register("prefix", attend)
    AttentionMaskInterface.register("prefix", sdpa_mask)
    return "prefix"


class LastBlock:
    """Mixed into the class of an LLM's last block: after attention it computes only wanted rows.

    By count of multiplications this saves a fifth for a reward model, which reads one position an
    answer, in the toy model of 3 blocks; 5 % of lab/bench.py's DPO step with its 8 blocks; and 2 %
    with the 32 blocks of a 7B model.
    """

    # all four add attention and MLP in the same way
    KNOWN = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")

    @classmethod
    def mix_into(cls, block):
        """Change the class of a block in place, if it is a known one. Weights keep their names."""
        if type(block).__name__ in cls.KNOWN and not isinstance(block, cls):
            block.__class__ = type(type(block).__name__, (cls, type(block)), {})

    def forward(self, hidden_states, wanted=None, **settings):
        """(B, L, D) and flat positions (N,) -> (N, D). Without positions: as the block itself."""
        if wanted is None:
            return super().forward(hidden_states, **settings)
        x, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), wanted=wanted, **settings
        )
        x = (hidden_states + x).flatten(0, 1)[wanted]  # (N, D)
        return x + self.mlp(self.post_attention_layernorm(x))


def install_attention(vision, llm):
    """Give both towers the attention of this file and no dropout. Refuse an LLM that is not h W^T.

    With dropout, policy and reference would differ at step 0.
    """
    head, kind = llm.get_output_embeddings(), type(llm).__name__
    if head.bias is not None or getattr(llm.config, "final_logit_softcapping", None):
        raise BadInput(f"{kind}: an LM head with a bias or a soft cap is not supported.")
    for name in ("logits_scaling", "logit_scale"):
        if getattr(llm.config, name, 1.0) not in (None, 1.0):
            raise BadInput(f"{kind}: an LLM that scales its logits ({name}) is not supported.")

    for part in (vision, llm):  # eager attention would add our boolean masks as 0 and 1
        part.set_attn_implementation("sdpa")  # raises for an LLM that it would compute wrongly
        for module in part.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in ("attention_dropout", "dropout"):  # the second is CLIP's name for it
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
    llm.set_attn_implementation(prefix_attention())
    # cuDNN's attention gave wrong gradients after a prefix in bfloat16: cosine .61 to .91 with
    # those of float32, .999 with the flash and the memory-efficient kernel (H200, torch 2.11)
    torch.backends.cuda.enable_cudnn_sdp(False)
    LastBlock.mix_into(llm.base_model.layers[-1])
