"""Ways to the attention of packed rows, for lab/bench_gpu.py: which is fastest on a GPU?

A row is [prompt | answer 1 | .. | answer K]. An answer sees its prompt whole and itself causally.
Cut out of the row, `prompt + one answer` as keys and that answer as queries is causal attention
aligned to the lower right. No mask is needed, so flash kernels can do it.

    dense       one mask for all queries
    prefix      attention.py's: the shared causal prefix without a mask, the other queries with one
    own         lower-right causal calls, one for each answer; rows of equal lengths share them
    varlen      one call of PyTorch's kernel for sequences of unequal lengths; it reads a copy of the
                prompt's keys for each answer, and needs no padding

On a CPU (one thread, the rows of lab/bench.py, in turns, CPU seconds) `own` took 1.05 to 1.16 times
as long as `prefix`, and `dense` 1.3 times.

Not among them: answers x prompt and answers x themselves, joined by their log-sum-exp. The kernels
return that sum without a gradient.

Each takes the lengths of B rows, [[P, R1, .., RK], ..], and returns a function of queries, keys and
values (B, heads, L, d) -> (B, heads, L, d). What it gives for padding means nothing. What depends
on the lengths alone is computed before: a model does it once for all layers.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from attention import attention_mask

sdpa = F.scaled_dot_product_attention


def segments_of(rows, device):
    """Lengths -> segments (B, L) as `model.pack` numbers them: 0 prompt, 1 .. K answers, -1 padding."""
    L = max(map(sum, rows))
    segments = torch.full((len(rows), L), -1)
    for b, lengths in enumerate(rows):
        numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        segments[b, : len(numbers)] = numbers
    return segments.to(device)


def dense(rows, device):
    """One mask for all queries."""
    mask = attention_mask(segments_of(rows, device))
    return lambda q, k, v: sdpa(q, k, v, mask)


def prefix(rows, device):
    """attention.py's `prefix_attention`, without what belongs to transformers."""
    shared = min(lengths[0] for lengths in rows) - 1  # the prompt's last position predicts a token
    mask = attention_mask(segments_of(rows, device))[:, :, shared:]

    def attend(q, k, v):
        """The prefix causally, the rest under the mask."""
        first = sdpa(q[:, :, :shared], k[:, :, :shared], v[:, :, :shared], is_causal=True)
        return torch.cat([first, sdpa(q[:, :, shared:], k, v, mask)], 2)

    return attend


def own(rows, device):
    """A call for the prompt and one for each answer, of all rows of the same lengths."""
    L, alike = max(map(sum, rows)), {}
    for b, lengths in enumerate(rows):
        alike.setdefault(tuple(lengths), []).append(b)
    alike = {lengths: torch.tensor(places, device=device) for lengths, places in alike.items()}

    def attend_alike(q, k, v, P, answers):
        """Rows of the same lengths, without padding."""
        parts, start = [sdpa(q[:, :, :P], k[:, :, :P], v[:, :, :P], is_causal=True)], P
        for R in answers:
            mine = slice(start, start + R)
            keys, values = (torch.cat([x[:, :, :P], x[:, :, mine]], 2) for x in (k, v))
            parts.append(sdpa(q[:, :, mine], keys, values, causal_lower_right(R, P + R)))
            start += R
        return torch.cat(parts, 2)

    def attend(q, k, v):
        """Group by group."""
        if len(alike) == 1:
            ((P, *answers),) = alike
            return attend_alike(q, k, v, P, answers)
        out = torch.zeros_like(q)
        for (P, *answers), places in alike.items():
            part = attend_alike(*(x[places] for x in (q, k, v)), P, answers)
            out = out.index_copy(0, places, F.pad(part, (0, 0, 0, L - part.shape[2])))
        return out

    return attend


def one_by_one(q, k, v, ends_q, ends_k, *_, window_size):
    """What `varlen_attn` computes, where there is no CUDA: (tokens, heads, d) and ends of sequences."""
    parts = []
    for i in range(len(ends_q) - 1):
        part = [x[e[i] : e[i + 1]] for x, e in ((q, ends_q), (k, ends_k), (v, ends_k))]
        mine, keys, values = (x.transpose(0, 1)[None] for x in part)
        bias = causal_lower_right(mine.shape[2], keys.shape[2])
        parts.append(sdpa(mine, keys, values, bias)[0].transpose(0, 1))
    return torch.cat(parts)


def varlen(rows, device):
    """All prompts and answers in one call."""
    kernel = one_by_one
    if torch.device(device).type == "cuda":
        from torch.nn.attention.varlen import varlen_attn as kernel

    L, queries, keys, counts = max(map(sum, rows)), [], [], []
    for b, (P, *answers) in enumerate(rows):
        row = torch.arange(b * L, (b + 1) * L)
        own_positions = row[: P + sum(answers)].split([P, *answers])
        for i, mine in enumerate(own_positions):
            queries.append(mine)
            keys.append(torch.cat([row[:P], mine]) if i else mine)
            counts.append((len(mine), len(keys[-1])))
    ends = torch.tensor([(0, 0), *counts]).cumsum(0).int().to(device)  # (sequences + 1, 2)
    longest = [max(c) for c in zip(*counts)]
    queries, keys = torch.cat(queries).to(device), torch.cat(keys).to(device)

    def attend(q, k, v):
        """Gather, one call, scatter."""
        flat_q, flat_k, flat_v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out = kernel(
            flat_q[queries], flat_k[keys], flat_v[keys], *ends.T.contiguous(), *longest,
            window_size=(-1, 0),
        )  # fmt: skip
        out = torch.zeros_like(flat_q).index_copy(0, queries, out)  # (B L, heads, d)
        return out.unflatten(0, (len(rows), L)).transpose(1, 2)

    return attend


WAYS = {"dense": dense, "prefix": prefix, "own": own, "varlen": varlen}
