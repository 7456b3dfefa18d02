"""The laboratory: every method x seed in the toy world, by the user's own command lines -> results.json, tables, a chart in results/.

    python -m lab.reproduce                    # all rows, seeds 0 1 2
    python -m lab.reproduce --only ipo --seeds 1
    python -m lab.reproduce --table            # only print the table of what is there

Each cell is one command line (or two: make data, train) and one run folder below results/runs; a finished cell is not run again, an
unfinished one is begun anew; two processes may share the work by --only. All methods of a seed start from the same base. The
table gives mean and standard deviation over seeds, and the mean paired difference to the base. Whatever the README says of
results comes from it.
"""

import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import training
from lab import toyworld

BDHS = ["--lr", "3e-4"]  # as bdhs.py --online
CORRECTED = [
    "--lr",
    "5e-5",
]  # an annotator's corrections only take away; at the default rate the model would learn to say less
CONSTRUCTED = ("povid.json", "povid_seen.json")
TEST = [
    "--test-data",
    "vlfeedback.jsonl",
]  # own samples ranked by the oracle: nothing is trained on them
LONG = ["--steps", "1500"]  # three times the default
MIX = ["--mix", "0.5"]
BARE = ["--length-weight", "0"]
RLOO = [
    "--advantage",
    "rloo",
    "--samples",
    "4",
    "--minibatches",
    "1",
]  # as many answers an iteration as PPO
# row: (what it is, commands: (script, data of the toy world or of the command before, further flags; @row: that row's run folder))
ROWS = {
    "dpo": ("DPO, corrupted truth (default)", [("dpo.py", "povid.json", [])]),
    "dpo-seen": ("DPO, corrupted truth of SFT's pictures", [("dpo.py", "povid_seen.json", [])]),
    "dpo-corrected": ("DPO, corrected samples", [("dpo.py", "rlhf_v.jsonl", CORRECTED)]),
    "dpo-ranked": ("DPO, ranked samples", [("dpo.py", "vlfeedback.jsonl", CORRECTED)]),
    "ipo": ("IPO, corrected samples", [("dpo.py", "rlhf_v.jsonl", ["--loss", "ipo", *CORRECTED])]),
    "slic": (
        "SLiC, corrected samples",
        [("dpo.py", "rlhf_v.jsonl", ["--loss", "slic", *CORRECTED])],
    ),
    "bdhs": ("BDHS, offline", [("bdhs.py", "povid.json", []), ("dpo.py", None, BDHS)]),
    "bdhs-online": ("BDHS, online", [("bdhs.py", "povid.json", ["--online"])]),
    "bdhs-noise": (
        "BDHS, noise for the mask",
        [("bdhs.py", "povid.json", ["--rho", "0", "--noise-steps", "500"]), ("dpo.py", None, BDHS)],
    ),
    "mask-only": (
        "mask, no guidance",
        [("bdhs.py", "povid.json", ["--no-guidance"]), ("dpo.py", None, BDHS)],
    ),
    "guidance-only": (
        "guidance, no mask",
        [("bdhs.py", "povid.json", ["--rho", "0"]), ("dpo.py", None, BDHS)],
    ),
    "povid": (
        "POVID: distortion + corrupted truth",
        [("bdhs.py", "povid.json", ["--online", "--povid", "--gamma", "0.5"])],
    ),
    "reward": ("reads facts", [("reward_model.py", CONSTRUCTED, TEST)]),
    "reward-plain": ("plain", [("reward_model.py", CONSTRUCTED, ["--no-facts", *TEST])]),
    "reward-long": ("reads facts, 1500 steps", [("reward_model.py", CONSTRUCTED, [*LONG, *TEST])]),
    "reward-plain-long": (
        "plain, 1500 steps",
        [("reward_model.py", CONSTRUCTED, ["--no-facts", *LONG, *TEST])],
    ),
    "online": ("Online DPO, the oracle annotates", [("online_dpo.py", "rlhf_v.jsonl", [])]),
    "online-povid": ("the same, prompts of corrupted truth", [("online_dpo.py", "povid.json", [])]),
    "mixed": ("Mixed-DPO, with corrupted truth", [("online_dpo.py", "povid.json", MIX)]),
    "mixed-corrected": (
        "Mixed-DPO, with corrected samples",
        [("online_dpo.py", "rlhf_v.jsonl", MIX)],
    ),
    "online-reward": (
        "Online DPO, factual reward model annotates",
        [("online_dpo.py", "rlhf_v.jsonl", ["--annotator", "@reward"])],
    ),
    "ppo": (
        "PPO, factual reward model (Fact-RLHF)",
        [("ppo.py", "povid.json", ["--reward-model", "@reward"])],
    ),
    "ppo-plain": (
        "PPO, plain reward model, no length term",
        [("ppo.py", "povid.json", ["--reward-model", "@reward-plain", *BARE])],
    ),
    "ppo-plain-length": (
        "PPO, plain reward model",
        [("ppo.py", "povid.json", ["--reward-model", "@reward-plain"])],
    ),
    "ppo-oracle": (
        "PPO, the oracle rewards, no length term",
        [("ppo.py", "povid.json", ["--reward-model", "oracle", *BARE])],
    ),
    "rloo": (
        "RLOO, factual reward model",
        [("ppo.py", "povid.json", ["--reward-model", "@reward", *RLOO])],
    ),
}
FIGURES = {  # column: where it is in {"pope":, "chair":}
    "POPE random": ("pope", "random", "accuracy"),
    "popular": ("pope", "popular", "accuracy"),
    "adversarial": ("pope", "adversarial", "accuracy"),
    "yes ratio (adv.)": ("pope", "adversarial", "yes_ratio"),
    "CHAIR_s": ("chair", "chair_s"),
    "CHAIR_i": ("chair", "chair_i"),
    "recall": ("chair", "recall"),
    "words": ("chair", "length"),
}
LOGGED = {  # what a run that samples logs: column
    "annotator/pairs": "share with a pair",
    "annotator/score": "annotator's score",
    "objective/scores": "reward r",
    "scores/reward_model": "reward model",
    "objective/kl": "KL",
    "objective/entropy": "entropy",
    "response_length": "tokens",
}


def figure(result, place):
    """The number at a place of {"pope", "chair"}."""
    for key in place:
        result = result[key]
    return result


def run_cell(row, seed, quick, folder):
    """Run a row's command lines to their end -> summary.json's and "minutes", "commands", "log"."""
    commands, begin, out = [], time.time(), None
    for i, (script, file, flags) in enumerate(ROWS[row][1], 1):
        files = (file,) if isinstance(file, str) else file
        sources = (
            [out / "preferences.json"]
            if file is None
            else [toyworld.path(seed, name) for name in files]
        )
        out = folder / (f"{row}-{seed}" if i == len(ROWS[row][1]) else f"{row}-{seed}-data")
        flags = [written(flag, seed, folder) for flag in flags]
        for source in sources:
            flags += ["--data", str(source)]
        flags += ["--images", str(toyworld.world(seed) / "images"), "--seed", str(seed)]
        if quick and i == len(ROWS[row][1]):
            flags += ["--steps", "3"]
        commands.append([script, *flags, "--out", str(out)])
        shutil.rmtree(out, ignore_errors=True)
        print(f"\n{row}, seed {seed}: python {' '.join(commands[-1])}", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parents[1] / script), *commands[-1][1:]]
        )
        if done.returncode:
            raise training.BadInput(
                f"{row}, seed {seed} ended with status {done.returncode}; call again to go on from here."
            )
    summary = json.loads((out / "summary.json").read_text())
    return summary | {
        "minutes": round((time.time() - begin) / 60, 2),
        "commands": commands,
        "log": log_of(out),
    }


def written(flag, seed, folder):
    """A flag of ROWS as it is given: @row -> that row's run folder, a file of the toy world -> its path."""
    if flag.startswith("@"):
        found = folder / f"{flag[1:]}-{seed}"
        if not (found / "summary.json").is_file():
            raise training.BadInput(f"{found}: not there yet; --only {flag[1:]} makes it.")
        return str(found)
    return str(toyworld.path(seed, flag)) if flag.endswith(".jsonl") else flag


def log_of(out):
    """What a run's metrics.jsonl says of LOGGED: the mean of the first and of the last fifth of its steps."""
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    fifth = max(1, len(lines) // 5)
    mean = lambda name, part: round(statistics.fmean(line[name] for line in part), 4)
    return {
        name: [mean(name, lines[:fifth]), mean(name, lines[-fifth:])]
        for name in LOGGED
        if name in lines[0]
    }


def spread(values, digits):
    """Mean +- standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def policies(cells):
    """Those of the cells whose row trains a policy."""
    return {
        row: by_seed for row, by_seed in cells.items() if ROWS[row][1][-1][0] != "reward_model.py"
    }


def reward_table(cells):
    """Held-out figures of the reward models, a line for each and each data file; "" without any."""
    columns = {"accuracy": "accuracy", "length_correlation": "score and tokens, correlation",
               "longer_preferred": "longer is preferred", "longer_favoured": "longer is favoured"}  # fmt: skip
    lines = []
    for row, by_seed in cells.items():
        if row in policies(cells):
            continue
        files = {}
        for cell in by_seed.values():
            for path, found in cell["after"]["reward"].items():
                files.setdefault(Path(path).name, []).append(found)
        for name, found in files.items():
            shown = [spread([f[column] for f in found], 3) for column in columns]
            minutes = statistics.mean(c["minutes"] for c in by_seed.values())
            lines.append(
                f"| {ROWS[row][0]} | {len(found)} | {name} | "
                + " | ".join(shown)
                + f" | {minutes:.1f} |"
            )
    head = ["reward model", "seeds", "held-out pairs of", *columns.values(), "minutes"]
    return (
        "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines])
        if lines
        else ""
    )


def log_table(cells):
    """What the runs that sample logged: first fifth -> last fifth of the steps, means over seeds; "" without any."""
    lines = []
    for row, by_seed in policies(cells).items():
        logs = [
            cell["log"] for cell in by_seed.values() if "response_length" in cell.get("log", {})
        ]
        if logs:
            mean = lambda name, i: statistics.mean(log[name][i] for log in logs)
            shown = [
                f"{mean(name, 0):.2f} → {mean(name, 1):.2f}" if name in logs[0] else ""
                for name in LOGGED
            ]
            lines.append(f"| {ROWS[row][0]} | " + " | ".join(shown) + " |")
    head = ["method", *LOGGED.values()]
    return (
        "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines])
        if lines
        else ""
    )


def table(cells):
    """Cells {row: {seed: summary}} -> Markdown: mean +- standard deviation over seeds, (mean paired difference to the base).

    "" without a row that trains a policy.
    """
    cells = policies(cells)
    if not cells:
        return ""
    lines = [
        "| method | seeds | " + " | ".join(FIGURES) + " | minutes |",
        "|---|---|" + "---|" * (len(FIGURES) + 1),
    ]
    bases = {seed: cell["before"] for row in cells.values() for seed, cell in row.items()}
    digits = {name: 1 if name == "words" else 3 for name in FIGURES}
    columns = [
        spread([figure(b, place) for b in bases.values()], digits[name])
        for name, place in FIGURES.items()
    ]
    lines.append(f"| base | {len(bases)} | " + " | ".join(columns) + " | |")
    for row, by_seed in cells.items():
        columns = []
        for name, place in FIGURES.items():
            after = [figure(c["after"], place) for c in by_seed.values()]
            change = statistics.mean(
                a - figure(c["before"], place) for a, c in zip(after, by_seed.values())
            )
            columns.append(f"{spread(after, digits[name])} ({change:+.{digits[name]}f})")
        minutes = statistics.mean(c["minutes"] for c in by_seed.values())
        lines.append(
            f"| {ROWS[row][0]} | {len(by_seed)} | " + " | ".join(columns) + f" | {minutes:.1f} |"
        )
    return "\n".join(lines)


def tables(cells):
    """The three of them."""
    return table(cells), reward_table(cells), log_table(cells)


def chart(cells, path):
    """Draw hallucination against recall and against adversarial accuracy. Small dots are seeds, numbers means (of log CHAIR_s)."""
    cells = policies(cells)
    if not cells:
        return
    axes = (
        (("chair", "recall"), "object recall"),
        (("pope", "adversarial", "accuracy"), "POPE adversarial accuracy"),
    )
    bases = {seed: cell["before"] for row in cells.values() for seed, cell in row.items()}
    shown = {"base": list(bases.values())} | {
        row: [c["after"] for c in by_seed.values()] for row, by_seed in cells.items()
    }
    width, left, top = 520, 70, 50
    height = max(460, top + 24 * len(shown) + 10)
    sheet = Image.new("RGB", (2 * width + 290, height), "white")
    draw, font, small = (
        ImageDraw.Draw(sheet),
        ImageFont.load_default(14),
        ImageFont.load_default(12),
    )
    draw.text(
        (left, 14),
        "CHAIR_s (down is better; a logarithmic scale) against what is kept (right is better)",
        "black",
        font,
    )
    colours = [f"hsl({360 * i // len(shown)}, 75%, 42%)" for i in range(len(shown))]
    for panel, (place, label) in enumerate(axes):
        height_of = lambda r: math.log10(max(0.01, figure(r, ("chair", "chair_s"))))
        points = [[(figure(r, place), height_of(r)) for r in results] for results in shown.values()]
        every = sum(points, [])
        (x0, x1), (y0, y1) = ((min(v) - 0.01, max(v) + 0.01) for v in zip(*every))
        at = lambda x, y: (
            panel * width + left + (x - x0) / (x1 - x0) * (width - left - 20),
            height - 50 - (y - y0) / (y1 - y0) * (height - 50 - top),
        )
        draw.rectangle((*at(x0, y1), *at(x1, y0)), outline="gray")
        for i in range(5):
            x, y = x0 + (x1 - x0) * i / 4, y0 + (y1 - y0) * i / 4
            draw.text((at(x, y0)[0] - 14, height - 46), f"{x:.2f}", "gray", small)
            draw.text((panel * width + left - 36, at(x0, y)[1] - 7), f"{10**y:.2f}", "gray", small)
        draw.text((panel * width + left, height - 26), label, "black", font)
        for seeds, colour in zip(points, colours):
            for x, y in (at(*point) for point in seeds):
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        for number, (seeds, colour) in enumerate(zip(points, colours)):
            x, y = at(*(statistics.mean(v) for v in zip(*seeds)))
            draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill=colour)
            draw.text((x, y), str(number), "white", small, anchor="mm")
    for i, (row, colour) in enumerate(zip(shown, colours)):
        x, y = 2 * width + 8, top + 24 * i
        draw.ellipse((x, y, x + 16, y + 16), fill=colour)
        draw.text((x + 8, y + 8), str(i), "white", small, anchor="mm")
        draw.text((x + 22, y), "base" if row == "base" else ROWS[row][0], "black", small)
    sheet.save(path)


def main():
    """Run what is missing, write results.json, table.md and chart.png, print the table."""
    parser = training.Parser(__doc__)
    parser.add_argument(
        "--only",
        action="append",
        choices=list(ROWS),
        metavar="ROW",
        help=f"one of {', '.join(ROWS)}; may be repeated",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (default %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="three steps a cell: does everything still run?"
    )
    parser.add_argument("--out", default="results", metavar="DIR", help="(default %(default)s)")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    folder = Path(args.out)
    runs = folder / ("quick-runs" if args.quick else "runs")
    runs.mkdir(parents=True, exist_ok=True)
    path = folder / ("quick.json" if args.quick else "results.json")
    cells = json.loads(path.read_text()) if path.exists() else {}
    for seed in [] if args.table else range(args.seeds):
        for row in (r for r in ROWS if not args.only or r in args.only):
            if str(seed) not in cells.get(row, {}):
                cell = run_cell(row, seed, args.quick, runs)
                cells = (
                    json.loads(path.read_text()) if path.exists() else {}
                )  # again: another process may have added to it
                cells.setdefault(row, {})[str(seed)] = cell
                cells = {r: dict(sorted(cells[r].items())) for r in ROWS if r in cells}
                training.write_json(path, cells)
    if not cells:
        raise training.BadInput(f"{path}: no results yet.")
    text = "\n\n".join(part for part in tables(cells) if part)
    if not args.quick:
        (folder / "table.md").write_text(text + "\n", encoding="utf-8")
        chart(cells, folder / "chart.png")
    print(text)


if __name__ == "__main__":
    training.run(main)
