"""How many bytes a run needs, counted from shapes and flags: no weight is read.

    need = memory.training(model, args, memory.Load(rows=4, length=821, ...))   # {part: bytes}
    need = memory.sampling(model, prompts=8, answers=8, length=621, new=128)    # bytes

`model` may be on the "meta" device (`checkpoints.load(name, dtype, "meta")`). Two tests hold the
counts within 15 % of what was measured: every training step in results/gpu.json, and live bytes of
a small model on a CPU; a third compares the kept activations with the tensors that autograd keeps.

What a training step holds at its peak:
1. weights      the frozen ones in the dtype of the arithmetic; NF4: 4.127 bits a weight of the
                LLM's blocks
2. what trains  float32: 4 bytes the number, 8 AdamW's two moments, 4 the gradient. The gradient
                and the activations are not at their most at the same time: without --grad-accum the
                backward pass frees the ones while it makes the others
3. activations  what autograd keeps for the backward pass, below

Clipping and AdamW work in place and add nothing.

Bytes that one block keeps for a token of the row (s: bytes of a number in the arithmetic, 2 in
bfloat16; D hidden size, Q = heads x head size, K the same of the keys, F inner size of the MLP,
r rank):

    two RMSNorms       2 x 4 D    they compute in float32, and keep the copy of their input
    their outputs      2 s D      input of the LoRA of q, k, v and of gate, up; kept once for all
    queries, keys, values  s (Q + 2 K)    after the rotation; the matrix products before it keep
                                  nothing, as their weights are frozen
    grouped heads      2 s Q      only where K < Q: under a mask keys and values are repeated
    attention's output 2 s Q      once by the kernel, once joined from prompt and answers (input of
                                  o_proj's LoRA); its log-sum-exp, 4 bytes a head
    MLP                4 s F      gate, silu(gate), up, and their product (input of down's LoRA)
    LoRA               7 s r      x A^T of the seven layers
    norms of q and k   4 (Q + K)  Qwen3 only

Once a block: A and B of the adapters in bfloat16, and the mask of the answers as numbers. The last
block computes its MLP only where an answer is scored. A block that trains whole keeps a bfloat16
copy of each weight, and a cast input for each layer instead of one for all. With
--gradient-checkpointing every block keeps its input, s D a token, and one block at a time is there
whole. In the backward pass of an MLP three gradients of its inner size are alive at once.

The head keeps d log p / d h, 4 D for a scored token, and works in chunks of 32 MB of logits. The
image tower runs before the LLM and keeps nothing, unless it trains.
"""

import argparse
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import processes
from common import flag_name
from formats.files import image_size
from nf4 import BITS_PER_WEIGHT, UNPACKING_BYTES

GIB = 2**30
# logits of `fused_log_probs`; softmax, its logarithm and z are alive at once
HEAD_CHUNK = 4 * 2**23
# The allocator rounds and splits: at the peak of the steps in results/gpu.json it had taken 2 to
# 5 % more than tensors held, with checkpointing up to 18 %, most of which it can give back.
HEADROOM = 1.05
# the defaults of dpo.py, for `python data.py FILE --model M`
DPO = argparse.Namespace(
    batch_size=2,
    grad_accum=16,
    lr=1e-6,
    projector_lr=2e-6,
    lora_rank=128,
    gradient_checkpointing=False,
    quantize=None,
)


@dataclass
class Load:
    """What one forward pass carries: rows of equal length, the longest of the data."""

    rows: int  # B
    length: int  # L, tokens of a packed row: prompt and all its answers
    prompt: int  # of which prompt
    scored: int  # tokens of a row that pass through the head
    tiles: int = 1  # pictures a row that the tower sees: 1, with LLaVA-NeXT its tiles; 0 for text


@dataclass(frozen=True)
class Plan:
    """What a run does beside the forward and backward pass of one model."""

    k: int = 0  # answers that it draws to a prompt, 0 if it draws none ...
    new: int = 0  # ... and the tokens of each
    trains: bool = True
    views: int = 1  # rows of a batch that an example makes: 2 with a corrupted picture beside it
    trained: int = 1  # adapters of --lora-rank that train ...
    frozen: int = 0  # ... and that only act
    reference: bool = False  # a copy of an LLM that trains whole is kept
    beside: int = 0  # bytes of other models on the device
    shards: int = 1  # processes among which the blocks are divided otherwise (sharding.py)


def longest(model, examples, rows):
    """The Load of `rows` rows as long as the longest of these Examples."""
    length = lambda e: len(e.prompt) + sum(map(len, e.answers))
    e = max(examples, key=length)
    tiles = int((e.prompt == model.image_token_id).any())
    if tiles and model.anyres:
        tiles += math.prod(model.anyres.grid(image_size(e.record.image)))
    P = len(e.prompt)
    return Load(rows, length(e), P, length(e) - P, tiles)


# ---- numbers of a model


def numbers(module):
    """How many numbers the parameters of a module hold."""
    return sum(p.numel() for p in module.parameters())


def block_layers(model):
    """The linear layers of the LLM's blocks, those that LoRA adapts and NF4 packs."""
    blocks = model.llm.base_model.layers
    adapters = [m.adapters for m in model.modules() if hasattr(m, "adapters")]
    inside = {id(m) for adapter in adapters for m in adapter.modules()}
    return [m for m in blocks.modules() if isinstance(m, nn.Linear) and id(m) not in inside]


def lora_numbers(model, rank):
    """How many numbers one adapter of this rank holds."""
    return rank * sum(m.in_features + m.out_features for m in block_layers(model))


def attention_sizes(config):
    """Sizes of the queries and of the keys of a token, Q and K, and the number of heads."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * size, config.num_key_value_heads * size, heads


# ---- training


def training(model, args, load, plan=Plan()):
    """A training step -> {"weights":, "trained":, "activations":}, bytes; their sum is the peak.

    args: the flags of `training.add_training_flags`.
    """
    s, load = model.dtype.itemsize, replace(load, rows=load.rows * plan.views)
    rank = args.lora_rank if args.lr else 0
    whole = bool(args.lr) and not rank
    nf4 = getattr(args, "quantize", None) == "nf4"
    llm, projector, vision = map(numbers, (model.llm, model.projector, model.vision))
    packed = sum(m.weight.numel() for m in block_layers(model)) if nf4 else 0
    vision_trains = bool(getattr(args, "vision_lr", 0))

    # 1. weights: what trains is counted below; its first state is kept where pi_ref needs it
    weights = 0
    if not whole or plan.reference:
        weights += s * (llm - packed) + BITS_PER_WEIGHT / 8 * packed
    weights += s * projector + (0 if vision_trains else s * vision)
    adapter = lora_numbers(model, rank)
    weights += 4 * plan.frozen * adapter
    total = plan.trained * adapter
    if whole and not plan.reference:
        blocks = numbers(model.llm.base_model.layers)
        total += blocks // plan.shards - blocks
    total += llm * whole + projector * bool(args.projector_lr) + vision * vision_trains

    # 2. the moments of the step at which memory may be at its most: (gradients, activations)
    kept, block = activations(model, load, rank, whole, args.gradient_checkpointing)
    if nf4:
        block += unpacking(model, load)
    if whole:
        head = 2 * 4 * numbers(model.llm.get_output_embeddings())  # its gradient, made and summed
    else:
        head = 3 * min(HEAD_CHUNK, 4 * load.rows * load.scored * model.llm.config.vocab_size)
    forward = kept + max(block, head) + tower(model, load, vision_trains)[0]
    moments = [
        (4 * total if args.grad_accum > 1 else 0, forward),
        (4 * total, block),  # the end of the backward pass
        (4 * total if args.grad_accum > 1 else 0, sum(tower(model, load, vision_trains))),
    ]
    gradients, most = max(moments, key=sum)
    return {"weights": weights, "trained": 12 * total + gradients, "activations": most}


def activations(model, load, rank, whole, checkpointing):
    """What the LLM keeps for the backward pass -> (bytes kept until it begins, most of one block).

    rank 0 and not whole: the LLM is frozen, and only the projector's gradient passes through it.
    The second is what the backward pass of a block needs beside.
    """
    config, s = model.llm.config, model.dtype.itemsize
    D, F, n = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    Q, K, heads = attention_sizes(config)
    T, N = load.rows * load.length, load.rows * load.scored
    lora, cast = rank > 0, whole and s < 4

    norm = 4 * D + s * D * (lora or whole)  # input, output
    norm += s * D * whole  # the normalised input, for the gradient of the norm's own weight
    attend = s * (Q + 2 * K) + s * Q + 4 * heads + s * Q * (lora or whole)
    attend += 2 * s * Q * (K < Q) + 3 * s * rank
    attend += s * 2 * D * cast  # q, k and v cast their input each
    if hasattr(model.llm.base_model.layers[0].self_attn, "q_norm"):
        attend += (4 + s * whole) * (Q + K)
    attend += s * rank  # o_proj
    mlp = 3 * s * F + s * F * (lora or whole) + 3 * s * rank + s * D * cast
    mask = s * load.rows * (load.length - load.prompt) * load.length
    copies = s * lora_numbers(model, rank) / n if s < 4 else 0
    if cast:
        copies = s * sum(m.weight.numel() for m in block_layers(model)) / n

    block = T * (2 * norm + attend + mlp) + mask + copies
    last = T * (norm + attend) + N * (norm + mlp) + mask + copies
    widest = T * (3 * s * F + 2 * s * D)
    end = N * (4 * D + 4 * D)  # the last norm, d log p / d h
    if checkpointing:
        return n * T * s * D + end, block + widest
    return (n - 1) * block + last + end, widest


def unpacking(model, load):
    """What dequantizing the largest layer adds, as two of the MLP's three gradients are alive."""
    third = model.dtype.itemsize * load.rows * load.length * model.llm.config.intermediate_size
    return max(0, UNPACKING_BYTES * max(m.weight.numel() for m in block_layers(model)) - third)


def tower(model, load, trains=False):
    """The image tower and projector -> (bytes they keep, bytes they need for the moment)."""
    config, s, I = model.vision.config, model.dtype.itemsize, load.rows * load.tiles
    patches = (config.image_size // config.patch_size) ** 2
    T, D, F = I * (patches + 1), config.hidden_size, config.intermediate_size
    out = model.llm.config.hidden_size
    kept = I * patches * s * (D + 2 * out) + load.rows * load.length * s * out
    if trains:
        block = T * (2 * 4 * D + 9 * s * D + 3 * s * F)
        return kept + config.num_hidden_layers * block, T * 3 * s * F
    return kept, T * (3 * s * F + 2 * s * D + 4 * D)


# ---- sampling


def cache_bytes(model):
    """Bytes of keys and values of one token, all blocks. LLaVA-1.5-7B in bfloat16: 512 KiB."""
    config = model.llm.config
    return 2 * config.num_hidden_layers * attention_sizes(config)[1] * model.dtype.itemsize


def sampling(model, prompts, answers, length, new, tiles=1, in_rows=0):
    """Most bytes that `sampling.sample` holds for its own.

    prompts: B, of `length` tokens (with given texts). answers: M in all. new: tokens of each.
    in_rows: most answers of a prompt, where they grow in its row of the cache; else 0.
    """
    config, s, T = model.llm.config, model.dtype.itemsize, prompts * length
    D, F, token = config.hidden_size, config.intermediate_size, cache_bytes(model)
    embeddings = T * s * D
    prefill = T * token + T * (3 * s * F + 3 * s * D + 8 * D) + 2 * prompts * length**2
    prefill = max(prefill, tower(model, Load(prompts, 0, 0, 0, tiles))[1])
    cache = answers * (length + new) * token * (1 + 0.5 / config.num_hidden_layers)  # one copied
    if in_rows:  # allocated whole before the prefill, and not copied
        cache = prompts * (length + in_rows * new) * token
        prefill += cache - T * token
    logits = answers * config.vocab_size * (4 * 4 + s)
    return embeddings + max(prefill, cache + logits)


# ---- does it fit


def available(device):
    """Bytes that a process may take on this device. On a CPU: its equal part of what is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # the whole memory, where no one counts what is free
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    table = Path("/proc/meminfo")
    if table.is_file():
        lines = (line.split() for line in table.read_text().splitlines())
        free = next(1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:")
    return free // processes.total


def smaller(args):
    """Flags that need less memory, the mildest first: {name: value} to try.

    A smaller micro-batch with more of them gives the same step. Checkpointing costs a third of the
    speed, NF4 some precision, a low rank some of what can be learned. What a script refuses is not
    among them: a model that sft.py composes has no NF4, and --vision-lr no LoRA.
    """
    batch = args.batch_size * args.grad_accum
    sizes = [n for n in range(args.batch_size, 0, -1) if batch % n == 0]
    ladder = [{}]
    if not args.gradient_checkpointing:
        ladder.append({"gradient_checkpointing": True})
    plain = getattr(args, "quantize", "") in (None, "none") and getattr(args, "model", True)
    if plain and args.lora_rank and args.lr:
        ladder.append(ladder[-1] | {"quantize": "nf4"})
    whole = args.lora_rank == 0 and args.lr and not getattr(args, "vision_lr", 0)
    if args.lora_rank > 16 or whole:
        ladder.append(ladder[-1] | {"lora_rank": 16})
    for step in ladder:
        for size in sizes:
            fewer = {"batch_size": size, "grad_accum": batch // size} if size < sizes[0] else {}
            yield step | fewer


def peak(model, args, load, plan=Plan()):
    """The most that a run holds -> {part: bytes}.

    Drawing is counted for one prompt, as larger batches are cut to what is free.
    """
    need = training(model, args, load, plan)
    if not plan.trains:
        need |= {"trained": 0, "activations": 0}
    drawing = sampling(model, 1, plan.k, load.prompt, plan.new, load.tiles) if plan.k else 0
    if plan.k and plan.trains and args.lr and model.dtype.itemsize < 4:  # the adapter is cast once
        drawing += model.dtype.itemsize * lora_numbers(model, args.lora_rank)
    if drawing > need["activations"]:
        need |= {"activations": 0, "sampling": drawing}
    if plan.beside:
        need["annotator"] = plan.beside
    return {part: size for part, size in need.items() if size}


def says(model, args, load, device, room, plan=Plan()):
    """One line: what a run needs, what the device has, and, if that is less, which flags help.

    room: bytes that the device has, None if no one asks.
    """
    need = peak(model, args, load, plan)
    total, rows = sum(need.values()), f"{load.rows * plan.views} x {load.length} tokens"
    parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in need.items())
    line = f"memory: {total / GIB:.1f} GiB at the peak ({parts}; {rows})"
    if room is not None:
        line += f"; {device} has {room / GIB:.1f} GiB free"
    if room is None or total * HEADROOM <= room:
        return line
    for flags in smaller(args) if plan.trains else ():
        changed = argparse.Namespace(**vars(args) | flags)
        fewer = replace(load, rows=changed.batch_size)
        total = sum(peak(model, changed, fewer, plan).values())
        if total * HEADROOM <= room:
            shown = " ".join(
                flag_name(name) if value is True else f"{flag_name(name)} {value}"
                for name, value in flags.items()
            )
            return f"{line}. It does not fit: {shown} needs {total / GIB:.1f}"
    return f"{line}. It does not fit, whatever the flags"
