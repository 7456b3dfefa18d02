"""LoRA: low-rank adapters for the linear layers of a frozen LLM (Hu et al. 2021, 2106.09685)."""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from common import BadInput

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRA(nn.Module):
    """(alpha / rank) x A^T B^T. A and B are float32. B, and so what LoRA adds, starts at 0."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as PEFT
        # drawn on the CPU: a seed gives the same on every device
        self.to(next(iter(base.state_dict().values())).device)
        self.ready = None  # A and B in another dtype, inside `cast_once`

    def weights(self, dtype):
        """A (rank, in) and B (out, rank) in this dtype."""
        return self.ready or (self.lora_A.to(dtype), self.lora_B.to(dtype))


class LoRALinear(nn.Module):
    """y = x W^T plus the adapter in use. Several named adapters share one frozen W (`MLLM.use`).

    active: the adapter in use, None for W alone. Preference optimization trains "policy".
    """

    def __init__(self, base, rank, alpha, name="policy"):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict({name: LoRA(base, rank, alpha)})
        self.active = "policy"

    def forward(self, x):
        if self.active not in self.adapters:
            return self.base(x)
        lora, rows = self.adapters[self.active], x.flatten(0, -2)  # (n, in)
        y = self.base(rows)
        A, B = lora.weights(y.dtype)
        low = lora.scale * F.linear(rows.to(y.dtype), A)  # (n, rank)
        y.addmm_(low, B.t())  # in place: no second tensor of y's size
        return y.unflatten(0, x.shape[:-1])


@contextlib.contextmanager
def cast_once(llm, dtype):
    """Inside, no adapter changes, and each that acts is cast now and not at every call.

    For sampling: at rank 128 the casts are 450 kernels and 1.9 GB a token of a 7B model in
    bfloat16.
    """
    layers = [m for m in llm.modules() if isinstance(m, LoRALinear) and m.active in m.adapters]
    acting = [m.adapters[m.active] for m in layers]
    try:
        for lora in acting:
            lora.ready = lora.weights(dtype)
        yield
    finally:
        for lora in acting:
            lora.ready = None


def add_adapter(llm, name, rank, alpha=None):
    """Add a trainable LoRA of this name to every linear layer of the LLM's blocks.

    alpha: 2 x rank by default.
    """
    alpha = 2 * rank if alpha is None else alpha
    for block in llm.base_model.layers:
        for module in [m for m in block.modules() if not isinstance(m, LoRALinear)]:
            for leaf, child in list(module.named_children()):
                if isinstance(child, LoRALinear):
                    child.adapters[name] = LoRA(child.base, rank, alpha)
                elif isinstance(child, nn.Linear):
                    if leaf not in LORA_TARGETS:
                        known = ", ".join(LORA_TARGETS)
                        raise BadInput(f"LoRA: the layer {leaf} is unknown; known are {known}.")
                    setattr(module, leaf, LoRALinear(child, rank, alpha, name))
