"""How much each token of an answer weighs in its log-prob: corrected segments, means.

    log pi(y|x) = sum_t w_t log p(y_t | x, y_<t)

    default                 w_t = 1
    --token-weight g        w_t = g in a corrected segment, else 1: RLHF-V; g = 5 in its paper
    --average-log-prob      w_t = 1 / tokens of y; an option of Li et al. 2024's code
    both                    w_t / (sum of w): DDPO, the score of RLHF-V's paper (arXiv 2312.00849)

A corrected segment is what differs between chosen and rejected by the rule of RLHF-V's code
(`get_diff_ids`; difflib over token ids):
1. Runs of at least three equal tokens are unchanged. A shorter one belongs to what is around it.
   The prompt precedes both answers, so equal tokens at their beginnings always are.
2. What lies between two unchanged runs is a corrected segment, unless one of the answers has
   nothing there: words that were only added or only deleted keep the weight 1.

Deviations: RLHF-V compares rows padded to the longest of their batch, where padding can be an
unchanged run; here nothing is padded. difflib's shortcut for sequences of 200 tokens or more, which
begins no run at a frequent token, is off.
"""

import sys
from dataclasses import replace
from difflib import SequenceMatcher

import torch

from common import BadInput

SHORTEST_RUN = 3
PROMPT = [-3, -2, -1]  # stands for it: a run that no answer holds


def corrected(chosen, rejected):
    """Which tokens of two answers, lists of ids, are in a corrected segment -> two (R,) bool."""
    a, b = PROMPT + rejected, PROMPT + chosen  # in this order, which difflib's result depends on
    *runs, end = SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    in_rejected, in_chosen = (torch.zeros(len(x), dtype=torch.bool) for x in (a, b))
    i = j = 0  # ends of the last unchanged run
    for run in [run for run in runs if run.size >= SHORTEST_RUN] + [end]:
        if i < run.a and j < run.b:
            in_rejected[i : run.a] = True
            in_chosen[j : run.b] = True
        i, j = run.a + run.size, run.b + run.size
    return in_chosen[len(PROMPT) :], in_rejected[len(PROMPT) :]


def weigh(examples, weight=1.0, average=False):
    """Examples of two answers -> the same with `weights`, and the share of corrected tokens told.

    Refused: a weight that would be that of every token, or of none.
    """
    if weight == 1 and not average:
        return examples
    weighed, marks = [], []
    for e in examples:
        in_segment = corrected(*(answer.tolist() for answer in e.answers))
        weights = [torch.where(marked, weight, 1.0) for marked in in_segment]  # (R,) each
        if average:
            weights = [w / w.sum() for w in weights]
        weighed.append(replace(e, weights=weights))
        marks += in_segment

    if weight != 1:
        share = torch.cat(marks).float().mean().item()
        if share in (0, 1):
            which = "no token" if share == 0 else "every token"
            raise BadInput(
                f"--token-weight {weight}: {which} of the {len(examples)} pairs is in a corrected "
                "segment; pairs are needed whose answers differ in parts, as RLHF-V's do."
            )
        print(f"corrected segments: {share:.0%} of the answers' tokens", file=sys.stderr)
    return weighed
