"""Tables of results/results.json and results/bench.json, for the pages that `lab.reproduce --report` writes.

README.md holds parts between `<!-- begin NAME -->` and `<!-- end NAME -->`; `fill` writes them anew. results/README.md is
written as a whole: `results_page`. The papers' claims are in lab/claims.py.
"""

import re
import statistics
from pathlib import Path

from lab import claims, fits, report
from lab.rows import (
    DEFAULT,
    EQUAL,
    FAMILIES,
    FIGURES,
    ROWS,
    after,
    bases,
    changes,
    comparable,
    figure,
    mean,
    policies,
)

LOGGED = {  # what a run that samples logs: column
    "annotator/pairs": "prompts that gave a pair",
    "annotator/score": "annotator's score",
    "objective/scores": "reward r",
    "scores/reward_model": "reward model's score",
    "objective/kl": "KL",
    "objective/entropy": "entropy",
    "response_length": "tokens",
}
# what other runs log and lab/claims.py tells of
ALSO_LOGGED = (
    *("logps/chosen", "frac_reward_zero_std", "completions/mean_length"),
    *("completions/wrong_length", "rewards/exact/mean"),
)
REWARD = {  # what reward_model.py measures on held-out pairs: column
    "accuracy": "accuracy",
    "length_correlation": "correlation of score and tokens",
    "longer_preferred": "longer answer is the chosen one",
    "longer_favoured": "longer answer gets the higher score",
}
SEED_BY_SEED = (DEFAULT, "ppo")
FRONT = (DEFAULT, "dpo", "mpo", "bdhs", "online", "ppo", "grpo", "judged-best")
BENCH = {
    "ours": "`dpo.py`'s loop",
    "naive": "the plain way: padded batch, all logits",
    "trl": "TRL 1.16",
    "trl-default": "TRL 1.16 with its default, gradient checkpointing",
}
GPU = [  # lab.bench_gpu: what, and the cells of `dpo.py`'s loop, of the plain way, of TRL
    ("LLaVA-1.5-7B, 4 pairs", "step/1.5/b4", "naive/1.5/b4", "trl/1.5/b4"),
    ("LLaVA-1.5-7B, 4 pairs, checkpointing", "step/1.5/b4/checkpointing", "naive/1.5/b4/checkpointing", "trl/1.5/b4/default"),
    ("LLaVA-1.5-7B, 1 pair, NF4, rank 16, checkpointing", "step/1.5/b1/checkpointing/r16/nf4"),
    ("LLaVA-NeXT-7B, 1 pair", "step/next/b1", "naive/next/b1", "trl/next/b1"),
    ("LLaVA-NeXT-7B, 1 pair, checkpointing", "step/next/b1/checkpointing", "naive/next/b1/checkpointing", "trl/next/b1/default"),
    ("LLaVA-NeXT-7B, 1 pair, NF4, rank 16, checkpointing", "step/next/b1/checkpointing/r16/nf4"),
    ("LLaVA-1.5-7B, sampling: 128 tokens of 8 prompts x 4 answers", "sample/1.5/b8/t1/k4", "sample/1.5/b8/generate/k4", ""),
    ("LLaVA-1.5-7B, GRPO: an iteration, 4 prompts x 8 answers of 64 tokens", "grpo/1.5/b4/r64", "", "grpo/1.5/b4/trl/r64"),
]  # fmt: skip
GPU_COLUMNS = (
    "", "seconds", "plain: seconds", "TRL: seconds", "plain: ratio", "TRL: ratio", "peak GiB", "plain: peak GiB",
    "TRL: peak GiB", "counted GiB", "share of the matrix rate",
)  # fmt: skip


def spread(values, digits):
    """Mean ± standard deviation of a sample."""
    shown = f"{mean(values):.{digits}f}"
    return f"{shown} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else shown


def markdown(head, lines):
    """Columns and rows -> a Markdown table; "" without rows."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if lines else ""


def table(cells):
    """Policies: mean ± standard deviation over seeds, (mean paired difference to the base)."""
    if not policies(cells):
        return ""
    digits = {column: 1 if column == "words" else 3 for column in FIGURES}
    start = bases(cells).values()
    shown = [spread([figure(b, place) for b in start], digits[c]) for c, place in FIGURES.items()]
    lines = [["base", str(len(start)), *shown, ""]]
    for family in FAMILIES:
        for row, by_seed in policies(cells).items():
            if ROWS[row].family == family:
                shown = [
                    f"{spread(after(cells, row, c), digits[c])} ({mean(changes(cells, row, c)):+.{digits[c]}f})"
                    for c in FIGURES
                ]
                minutes = mean(c["minutes"] for c in by_seed.values())
                lines.append([ROWS[row].name, str(len(by_seed)), *shown, f"{minutes:.1f}"])
    return markdown(["method", "seeds", *FIGURES, "minutes"], lines)


def reward_table(cells):
    """Held-out figures of the reward models, a line for each and each data file."""
    lines = []
    for row, by_seed in cells.items():
        if row in policies(cells):
            continue
        files = {}
        for cell in by_seed.values():
            for path, held in cell["after"]["reward"].items():
                files.setdefault(Path(path).name, []).append(held)
        minutes = mean(c["minutes"] for c in by_seed.values())
        for name, held in files.items():
            shown = [spread([h[column] for h in held], 3) for column in REWARD]
            lines.append([ROWS[row].name, str(len(held)), name, *shown, f"{minutes:.1f}"])
    return markdown(["reward model", "seeds", "held-out pairs", *REWARD.values(), "minutes"], lines)


def log_table(cells):
    """What the runs that sample logged: first fifth -> last fifth of the steps, means over seeds."""
    lines = []
    for row, by_seed in policies(cells).items():
        logs = [c["log"] for c in by_seed.values() if "response_length" in c.get("log", {})]
        if logs:
            shown = [
                " → ".join(f"{mean(log[name][part] for log in logs):.2f}" for part in (0, 1))
                if name in logs[0]
                else ""
                for name in LOGGED
            ]
            lines.append([ROWS[row].name, *shown])
    return markdown(["method", *LOGGED.values()], lines)


def seeds_table(cells):
    """The rows of SEED_BY_SEED on every seed that they have: from the base to after training."""
    lines = []
    for row in SEED_BY_SEED:
        for seed, cell in cells.get(row, {}).items():
            before, later = (
                {c: figure(cell[when], place) for c, place in FIGURES.items()}
                for when in ("before", "after")
            )
            shown = [
                f"{before[c]:.3f} → {later[c]:.3f} ({100 * (later[c] - before[c]):+.1f})"
                for c in ("CHAIR_s", "recall", "POPE random", "POPE adversarial", "text")
            ]
            words = f"{before['words']:.1f} → {later['words']:.1f} ({100 * later['words'] / before['words'] - 100:+.0f} %)"
            lines.append([ROWS[row].name, seed, *shown, words])
    head = ["method", "seed", "CHAIR_s", "recall", "POPE random", "POPE adversarial", "text"]
    return markdown([*head, "words"], lines)


def equal_table(cells):
    """The rows of EQUAL: what they cost and what became of the base."""
    digits = {"CHAIR_s": 3, "recall": 3, "POPE adversarial": 3, "text": 3, "words": 1}
    lines = []
    for row, (signal, answers) in EQUAL.items():
        if row in cells:
            cpu = [c["cpu_seconds"] for c in cells[row].values() if "cpu_seconds" in c]
            shown = [spread(after(cells, row, column), n) for column, n in digits.items()]
            spent = f"{mean(cpu):.0f}" if cpu else ""
            lines.append([ROWS[row].name, signal, f"{answers:,}", spent, *shown])
    return markdown(["method", "who judges", "answers", "CPU s", *digits], lines)


def front_table(cells):
    """The README's choice of rows and columns."""
    columns = ("CHAIR_s", "recall", "POPE adversarial", "text")
    start = bases(cells).values()
    shown = [f"{mean(figure(b, FIGURES[c]) for b in start):.3f}" for c in columns]
    words = mean(figure(b, FIGURES["words"]) for b in start)
    lines = [["base", *shown, f"{words:.1f}", ""]]
    for row in [row for row in FRONT if row in cells]:
        shown = [
            f"{mean(after(cells, row, c)):.3f} ({100 * mean(changes(cells, row, c)):+.1f})"
            for c in columns
        ]
        minutes = mean(c["minutes"] for c in cells[row].values())
        words = mean(after(cells, row, "words"))
        lines.append([ROWS[row].name, *shown, f"{words:.1f}", f"{minutes:.1f}"])
    return markdown(["method", *columns, "words", "minutes"], lines)


def bench_table(bench):
    """Seconds and memory of a DPO step: median (least - most), ratios within a round.

    The bfloat16 columns stand there once it was measured.
    """
    sections = {"": bench["step"], "-bfloat16": bench.get("step-bfloat16") or {}}
    lines = []
    for name in bench["step"]:
        line = [BENCH[name]]
        for suffix, section in sections.items():
            row = section.get(name + suffix)
            if row:
                shown = lambda key, digits: (
                    f"{row[key]['median']:.{digits}f} ({row[key]['min']:.{digits}f} - {row[key]['max']:.{digits}f})"
                )
                ratio = lambda key: "1" if name == "ours" else shown(key, 1)
                line += [
                    shown("seconds", 1),
                    ratio("seconds_ratio"),
                    shown("seconds_3_epochs", 1),
                    ratio("seconds_3_epochs_ratio"),
                    shown("peak_mib", 0),
                ]
            elif section:
                line += [""] * 5
        lines.append(line)
    head = ["CPU s a step, one epoch", "ratio", "CPU s a step, three epochs", "ratio"]
    head += ["peak MiB beside the weights"]
    if not sections["-bfloat16"]:
        return (
            markdown(["", *head], lines)
            + "\n\nThe columns of bfloat16 are left out: not measured yet."
        )
    both = [f"{kind}: {column}" for kind in ("float32", "bfloat16") for column in head]
    return markdown(["", *both], lines)


def gpu_line(what, ours, others):
    """A line of `gpu_table`: the figures of our cell and of the other ways' ({} if not measured)."""
    ways = [ours, *others]
    second = lambda row: row["seconds"][0] if "seconds" in row else None
    seconds = ["does not fit" if "does_not_fit" in row else "" for row in ways]
    seconds = [f"{second(row):.2f}" if second(row) else said for row, said in zip(ways, seconds)]
    both = lambda row: second(ours) and second(row)
    ratios = [f"{second(row) / second(ours):.1f}" if both(row) else "" for row in others]
    peaks = [f"{row['peak_gib']:.1f}" if "peak_gib" in row else "" for row in ways]
    share = f"{ours['flop_share']:.0%}" if "flop_share" in ours else ""
    counted = f"{ours['counted_gib']:.1f}" if "counted_gib" in ours else ""
    return [what, *seconds, *ratios, *peaks, counted, share]


def gpu_table(gpu):
    """Seconds and peak memory of a step, a table for each GPU; empty columns are left out."""
    tables = []
    for card in dict.fromkeys(row["card"] for row in gpu):
        cells = {row["cell"]: row for row in gpu if row["card"] == card}
        lines = [
            gpu_line(what, cells[ours], [cells.get(name, {}) for name in (others or ("", ""))])
            for what, ours, *others in GPU
            if ours in cells
        ]
        used = [i for i in range(len(GPU_COLUMNS)) if any(line[i] for line in lines)]
        made = [
            f"{name} {', '.join(sorted(found))}"
            for name in ("torch", "transformers", "trl", "commit")
            if (found := {row[name] for row in cells.values() if row.get(name)})
        ]
        head = [", ".join([card, *made]), *(GPU_COLUMNS[i] for i in used if i)]
        tables.append(markdown(head, [[line[i] for i in used] for line in lines]))
    return "\n\n".join(tables)


def blocks(cells, bench, gpu):
    """The parts of README.md that are computed."""
    first = cells[DEFAULT]["0"]
    shown = report.table({"before": first["before"], "after": first["after"]})
    findings = "\n".join(f"{i}. {text}" for i, text in enumerate(claims.findings(cells), 1))
    return {
        "first-run": f"```\n{shown}\n```",
        "results": f"{front_table(cells)}\n\n{findings}",
        "speed": bench_table(bench),
        "gpu": gpu_table(gpu),
        "fits": markdown(fits.HEAD, fits.lines(gpu)[: fits.FRONT]),
    }


def fill(text, parts):
    """README's text with the parts between its marks written anew."""
    for name, part in parts.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md: {begin} and {end} must be there once each")
        text = re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{part}\n{end}", text, flags=re.DOTALL)
    return text


def results_page(everything, gpu):
    """results/README.md, of all cells of results.json."""
    cells = comparable(everything)
    parts = [claims.INTRODUCTION, table(cells), claims.CHARTS]
    parts += ["## What the papers claim, and what happens here", claims.HOW_TO_READ]
    paper = None
    for claim in claims.claims(cells):
        if claim.paper != paper:
            paper = claim.paper
            parts.append(f"### {paper}")
        parts.append(
            f"**{claim.sentence}**\n\n- The paper: {claim.reported}\n- Here: {claim.here}\n- {claim.verdict}"
        )
    parts.append("## What else the rows show")
    parts.append("\n".join(f"- {text}" for text in claims.observations(cells)))
    parts += ["## Seed by seed", claims.SEED_BY_SEED, seeds_table(everything)]
    parts += ["## Reward models", claims.REWARD_MODELS, reward_table(cells)]
    parts.append("\n".join(f"- {text}" for text in claims.reward_observations(cells)))
    parts += ["## What was sampled during training", claims.SAMPLED, log_table(cells)]
    parts += ["## Equal numbers of answers, equal seconds", claims.EQUAL, equal_table(cells)]
    parts += ["## What fits where, and how long it takes", claims.FITS]
    parts += [markdown(fits.HEAD, fits.lines(gpu)), claims.REST]
    return "\n\n".join(parts) + "\n"
