"""A 4-bit base for LoRA: frozen linear layers in NF4 (QLoRA, Dettmers et al. 2023, 2305.14314).

A weight matrix, read row by row, is cut into blocks of 64. A block keeps its largest magnitude,
absmax, and for each weight the nearest of 16 levels of weight / absmax, two of them a byte. The
levels are quantiles of a normal distribution, because weights are nearly normal. Double
quantization keeps absmax in 8 bits too: minus its mean over the matrix, in blocks of 256 with a
largest magnitude each, the nearest of 256 levels. In all, `BITS_PER_WEIGHT`.

Every forward and every backward pass dequantizes the layers one by one and keeps nothing: memory
for time. Sampling, which reads all weights for every token, slows down most.

Levels, rounding and order are those of bitsandbytes, bit for bit. Weights are quantized from the
values in the file, whatever the dtype of the arithmetic.

Only the linear layers of the LLM's blocks are quantized. Tower, projector, embeddings, norms, LM
head and biases are not.
"""

import functools
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from common import BadInput
from lora import LORA_TARGETS

BLOCK, ABSMAX_BLOCK = 64, 256
# level, absmax, and float32 for the largest absmax of a block; the mean, 4 bytes a matrix, not
BITS_PER_WEIGHT = 4 + 8 / BLOCK + 32 / (BLOCK * ABSMAX_BLOCK)
# of a weight on the way from 4 bits: two bytes of index and four of float32, then four and bfloat16
UNPACKING_BYTES = 6

# QLoRA, appendix E: quantiles of N(0, 1), 8 for negative and 9 for positive numbers, over the last
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def absmax_levels():
    """The 256 levels of absmax: 8-bit dynamic quantization (Dettmers 2016, 1511.04561).

    Of each decade 10^-7 .. 1 there are 2^e midpoints, e = 0 .. 6, of either sign; and 0 and 1.
    """
    levels = [torch.tensor([0.0, 1.0])]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2**e + 1)
        middles = 10.0 ** (e - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += [middles, -middles]
    return torch.cat(levels).sort().values


@functools.lru_cache
def tables(device):
    """The levels of weights (16,) and of absmax (256,), and the two weights of each byte.

    The pair of a byte is two float32 in one int64, (256,): one look-up gives both.
    """
    levels, byte = torch.tensor(LEVELS), torch.arange(256)
    pairs = torch.stack([levels[byte // 16], levels[byte % 16]], dim=1).view(torch.int64)[:, 0]
    return levels.to(device), absmax_levels().to(device), pairs.to(device)


def whole_blocks(x, block):
    """(n,) -> (blocks, block), with zeros at the end if need be."""
    rest = -len(x) % block
    return (F.pad(x, (0, rest)) if rest else x).view(-1, block)


def nearest(x, levels, block):
    """Quantize (n,) float32 in blocks -> codes (n,) uint8, largest magnitude of each block.

    The last block may be shorter. A number in the middle of two levels takes the lower one.
    """
    rows = whole_blocks(x, block)
    largest = rows.abs().amax(1)
    scaled = rows * (1 / largest.clamp(min=1e-38))[:, None]
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True)
    return codes.to(torch.uint8).flatten()[: len(x)], largest


class NF4Linear(nn.Linear):
    """y = x W^T + b with W in NF4. There is no `weight`: `copy_` takes one, `dequantise` is it."""

    def __init__(self, linear):
        """Take the sizes, dtype and bias of a linear layer, not its weight."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.bias = linear.weight.dtype, linear.bias
        n, device = linear.weight.numel(), linear.weight.device
        blocks = -(-n // BLOCK)
        for name, size, dtype in (
            ("codes", -(-n // 2), torch.uint8),
            ("absmax", blocks, torch.uint8),
            ("scales", -(-blocks // ABSMAX_BLOCK), torch.float32),
            ("offset", 1, torch.float32),
        ):
            self.register_buffer(name, torch.empty(size, dtype=dtype, device=device))

    @property
    def shape(self):
        """Of the weight: (out, in)."""
        return torch.Size((self.out_features, self.in_features))

    @torch.no_grad()
    def copy_(self, weight):
        """Quantize a weight (out, in) of any dtype and device into this layer."""
        levels, absmax_levels, _ = tables(self.codes.device)
        flat = weight.to(self.codes.device, torch.float32).flatten()
        codes, absmax = nearest(flat, levels, BLOCK)
        if len(codes) % 2:
            codes = F.pad(codes, (0, 1))
        self.codes.copy_(codes[::2] << 4 | codes[1::2])
        self.offset.copy_(absmax.mean())
        codes, scales = nearest(absmax - self.offset, absmax_levels, ABSMAX_BLOCK)
        self.absmax.copy_(codes)
        self.scales.copy_(scales)
        return self

    @torch.no_grad()
    def dequantise(self):
        """The weight (out, in), in the dtype of the arithmetic; the products are float32.

        `UNPACKING_BYTES` a weight are in use on the way.
        """
        _, absmax_levels, pairs = tables(self.codes.device)
        scales = self.scales.repeat_interleave(ABSMAX_BLOCK)[: len(self.absmax)]
        absmax = absmax_levels[self.absmax.int()] * scales + self.offset  # (blocks,)
        flat = pairs.index_select(0, self.codes.int()).view(torch.float32)  # (n,)
        rows = whole_blocks(flat, BLOCK).mul_(absmax[:, None])
        return rows.flatten()[: self.shape.numel()].view(self.shape).to(self.dtype)

    def forward(self, x):
        return Multiply.apply(x, self)


class Multiply(torch.autograd.Function):
    """x W^T + b. The backward pass dequantizes W again; nothing is kept for it."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dequantise(), layer.bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantise(), None


# ---- models


def linears(llm):
    """[(parent, name, layer), ...] of the linear layers of the LLM's blocks, without an adapter."""
    found = []
    for parent in llm.base_model.layers.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                if name not in LORA_TARGETS:
                    known = ", ".join(LORA_TARGETS)
                    raise BadInput(
                        f"--quantize nf4: the layer {name} is unknown; known are {known}."
                    )
                found.append((parent, name, child))
    return found


def quantise_linears(llm):
    """Quantize the LLM's blocks in place, one layer at a time. Returns the LLM."""
    for parent, name, layer in linears(llm):
        setattr(parent, name, NF4Linear(layer).copy_(layer.weight))
    return llm


@contextmanager
def born_quantised(on=True):
    """Inside, a block's linear layer becomes an empty NF4Linear when its parent takes it in.

    So a model is built without ever holding more than one whole layer. on: False does nothing.
    """

    def replace(parent, name, child):
        if name in LORA_TARGETS and type(child) is nn.Linear:
            return NF4Linear(child)

    hook = register_module_module_registration_hook(replace) if on else None
    try:
        yield
    finally:
        if hook:
            hook.remove()


def slots(module):
    """`module.state_dict()`, in which an NF4Linear stands for its weight."""
    layers = {name: m for name, m in module.named_modules() if isinstance(m, NF4Linear)}
    found = {}
    for name, tensor in module.state_dict().items():
        parent, leaf = name.rpartition(".")[::2]
        if parent in layers and leaf != "bias":
            found[f"{parent}.weight"] = layers[parent]
        else:
            found[name] = tensor
    return found


def quantised(module):
    """'nf4' if there is a 4-bit layer, else 'none'."""
    return "nf4" if any(isinstance(m, NF4Linear) for m in module.modules()) else "none"


def summary(llm):
    """What the blocks' linear layers take, counted from their tensors, as a line of text."""
    layers = [layer for _, _, layer in linears(llm)]
    weights = sum(m.in_features * m.out_features for m in layers)
    tensors = [t for m in layers for name, t in m.state_dict().items() if name != "bias"]
    size = sum(t.nbytes for t in tensors)
    return f"{weights:,} weights of the LLM's blocks take {size / weights:.3f} bytes each"
