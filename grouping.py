"""Groups of answers for grpo.py: drawn, scored again, copied, and what a run logs of them.

Knows neither rewards nor losses: what an answer is worth is in rewards.py, what is learned from it
in grpo.py.
"""

import math
import statistics
import sys
from dataclasses import dataclass

import torch

import processes
import sampling
import training

FIRST = 3  # iterations after which a run that cannot learn is told so


@dataclass
class Group:
    """G answers to one prompt."""

    place: int  # of its Example
    answers: list  # G token tensors (R,)
    finished: list  # G: False for an answer that was cut off
    old: list  # G tensors (R,), log pi_old
    terms: dict | None = None  # {term: G numbers, None without a verdict}
    advantages: torch.Tensor | None = None  # (G,)

    @property
    def rewards(self):
        """The sum of the terms, (G,); NaN without a verdict."""
        sums = [math.nan if None in row else sum(row) for row in zip(*self.terms.values())]
        return torch.tensor(sums, dtype=torch.float64)

    @property
    def spread(self):
        """Do two of the answers have different rewards?"""
        return len(set(self.rewards[~self.rewards.isnan()].tolist())) > 1

    def texts(self, processor):
        """The answers as texts, G."""
        return [processor.text(tokens) for tokens in self.answers]

    def without(self, cut_off):
        """The same without the answers that were cut off, if `cut_off`."""
        keep = [i for i, finished in enumerate(self.finished) if finished or not cut_off]
        pick = lambda values: [values[i] for i in keep]
        answers, old = pick(self.answers), pick(self.old)
        return Group(self.place, answers, pick(self.finished), old, None, self.advantages[keep])


def draw(model, processor, examples, places, args, seed):
    """--group-size answers to each of these prompts -> Groups, without terms."""
    prompts = [examples[i] for i in places]
    samples = sampling.answers_to(
        model, processor, prompts, args.group_size, args.max_new_tokens, seed
    )
    drawn = zip(places, samples.tokens, samples.finished, samples.log_probs)
    return [Group(*values) for values in drawn]


def decode_ahead(processor, parts, examples):
    """Begin with the images of these lists of Groups: often another process has sampled them."""
    processor.prefetch.expect([examples[g.place].record.image for part in parts for g in part])


def on_device(parts, device):
    """Lists of tensors -> the joined tensor of each, copied together, before the first is used."""
    joined = [torch.cat(part) for part in parts]
    return torch.cat(joined).to(device).split([len(x) for x in joined]) if joined else []


@torch.no_grad()
def scored_again(model, processor, groups, examples, args):
    """Replace log pi_old of these Groups by what the update computes before its first step."""
    parts = processes.share(training.chunks(groups, args.batch_size))
    decode_ahead(processor, parts, examples)
    found = []
    for part in parts:
        rows = [sampling.with_answers(examples[group.place], group.answers) for group in part]
        log_p, _ = model.log_probs(processor.collate(rows).to(model.device))
        found.append(log_p)
    log_p = processes.joined_tensor(found, "cpu")  # (N,); None without a group
    lengths = [len(tokens) for group in groups for tokens in group.answers]
    old = iter(log_p.split(lengths) if groups else ())
    for group in groups:
        group.old = [next(old) for _ in group.answers]


# ---- what a run logs of its groups, and what it is told


def metrics(groups):
    """Metrics, in TRL's names, of grpo.py's Groups, whether they train or not."""
    values = torch.cat([group.rewards for group in groups])
    read = values[~values.isnan()].tolist()
    lengths = [len(tokens) for group in groups for tokens in group.answers]
    finished = sum((group.finished for group in groups), [])
    found = {
        "reward": mean(read),
        "reward_std": std(read),
        "reward_unread": 1 - len(read) / len(values),
        "frac_reward_zero_std": mean([not group.spread for group in groups]),
        "groups": len(groups),
        "completions/mean_length": mean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - mean(finished),
        "completions/mean_terminated_length": mean([n for n, f in zip(lengths, finished) if f]),
    }
    for term in sorted({term for group in groups for term in group.terms}):
        values = [x for group in groups for x in group.terms.get(term, ()) if x is not None]
        found |= {f"rewards/{term}/mean": mean(values), f"rewards/{term}/std": std(values)}
    exact = [x for g in groups for x in g.terms.get("exact", [None] * len(g.answers))]
    for name, right in (("right", True), ("wrong", False)):
        those = [n for n, x in zip(lengths, exact) if x is not None and (x >= 0.5) == right]
        if those:
            found[f"completions/{name}_length"] = mean(those)
    return found


def mean(values):
    """Arithmetic mean; 0 of none."""
    return statistics.fmean(values) if values else 0.0


def std(values):
    """Unbiased standard deviation; 0 of one or none."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def warn(history, record, text, args):
    """Say what keeps a run from learning, if its FIRST iterations show it. history: their metrics.

    record, text: a prompt and an answer to it.
    """
    over_all = lambda name: mean([metrics[name] for metrics in history])
    if over_all("completions/clipped_ratio") == 1:
        learns = "; dapo learns from none of them" if args.variant == "dapo" else ""
        print(
            f"all answers of {FIRST} iterations were cut off at --max-new-tokens "
            f"{args.max_new_tokens}{learns}.",
            file=sys.stderr,
        )
    if over_all("frac_reward_zero_std") == 1:
        print(
            f"the reward never varied within a group in {FIRST} iterations (its mean is "
            f"{over_all('reward'):.3f}), so that nothing was learned. The usual reasons: no answer "
            "has the form that the rule reads (--ask); all are cut off (--max-new-tokens); the "
            "data is too hard, or too easy; the answers are all the same; the annotator gives no "
            f"verdict. An answer was {text!r:.200}; the data has {str(record.answers[:1]):.80}.",
            file=sys.stderr,
        )
