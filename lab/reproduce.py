"""The laboratory: every method x seed in the toy world, by the user's own command lines -> results/.

    python -m lab.reproduce                    # all rows, seeds 0 1 2
    python -m lab.reproduce --only ipo --seeds 1
    python -m lab.reproduce --report           # train nothing: write the pages from results/results.json

Each cell is one command line (or two: make data, train) and one run folder below results/runs. A finished cell is not run again,
an unfinished one is begun anew. Two processes may share the work by --only. All methods of a seed start from the same base.

results/results.json holds what the cells wrote. From it come results/README.md (all tables, all claims of the papers), the charts,
and the marked parts of README.md, as soon as every row has all its seeds.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import BadInput, Parser, run, write_json
from lab import chart, pages, toy
from lab.rows import ROWS

ROOT = Path(__file__).parents[1]


def run_cell(row, seed, quick, folder):
    """Run a row's command lines to their end -> summary.json's and "minutes", "commands", "log"."""
    commands, begin, out = [], time.time(), None
    for i, (script, file, flags) in enumerate(ROWS[row].commands, 1):
        files = (file,) if isinstance(file, str) else file
        sources = (
            [out / "preferences.json"]
            if file is None
            else [toy.data_file(seed, name) for name in files]
        )
        out = folder / (f"{row}-{seed}" if i == len(ROWS[row].commands) else f"{row}-{seed}-data")
        flags = [written(flag, seed, folder) for flag in flags]
        for source in sources:
            flags += ["--data", str(source)]
        flags += ["--images", str(toy.world(seed) / "images"), "--seed", str(seed)]
        if quick and i == len(ROWS[row].commands):
            flags += ["--steps", "3"]
        commands.append([script, *flags, "--out", str(out)])
        shutil.rmtree(out, ignore_errors=True)
        print(f"\n{row}, seed {seed}: python {' '.join(commands[-1])}", file=sys.stderr)
        done = subprocess.run([sys.executable, str(ROOT / script), *commands[-1][1:]])
        if done.returncode:
            raise BadInput(
                f"{row}, seed {seed} ended with status {done.returncode}; call again to go on from here."
            )
    summary = json.loads((out / "summary.json").read_text())
    return summary | {
        "minutes": round((time.time() - begin) / 60, 2),
        "commands": commands,
        "log": log_of(out),
    }


def written(flag, seed, folder):
    """A flag of ROWS as the script gets it: @row -> that row's run folder, a file of the toy world -> its path."""
    if flag.startswith("@"):
        run = folder / f"{flag[1:]}-{seed}"
        if not (run / "summary.json").is_file():
            raise BadInput(f"{run}: not there yet; --only {flag[1:]} makes it.")
        return str(run)
    return str(toy.data_file(seed, flag)) if flag.endswith(".jsonl") else flag


def log_of(out):
    """A run's metrics.jsonl -> {name of pages.LOGGED: [mean of the first fifth of its steps, of the last fifth]}."""
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    fifth = max(1, len(lines) // 5)
    mean = lambda name, part: round(statistics.fmean(line[name] for line in part), 4)
    return {
        name: [mean(name, lines[:fifth]), mean(name, lines[-fifth:])]
        for name in pages.LOGGED
        if name in lines[0]
    }


def incomplete(cells):
    """Why there can be no pages yet; "" if every row has the same seeds."""
    missing = [row for row in ROWS if row not in cells]
    if missing:
        return f"no cell of {', '.join(missing)}"
    return (
        "" if len({tuple(by_seed) for by_seed in cells.values()}) == 1 else "rows differ in seeds"
    )


def write_pages(cells, folder):
    """The charts, results/README.md and the marked parts of README.md."""
    chart.draw(cells, folder / "chart.png", "recall", "present objects still mentioned")
    right = "right answers to hard questions"
    chart.draw(cells, folder / "chart_pope.png", "POPE adversarial", right)
    gpu = json.loads((ROOT / "results" / "gpu.json").read_text())
    (folder / "README.md").write_text(pages.results_page(cells, gpu), encoding="utf-8")
    if folder.resolve() == ROOT / "results":
        bench = json.loads((folder / "bench.json").read_text())
        front = ROOT / "README.md"
        text = pages.fill(front.read_text(encoding="utf-8"), pages.blocks(cells, bench, gpu))
        front.write_text(text, encoding="utf-8")


def main():
    """Run what is missing, write results.json and the pages, print the tables."""
    parser = Parser(__doc__)
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
    parser.add_argument(
        "--report", action="store_true", help="run nothing, only write the pages from results.json"
    )
    args = parser.parse_args()
    folder = Path(args.out)
    runs = folder / ("quick-runs" if args.quick else "runs")
    path = folder / ("quick.json" if args.quick else "results.json")
    cells = json.loads(path.read_text()) if path.exists() else {}
    for seed in [] if args.report else range(args.seeds):
        runs.mkdir(parents=True, exist_ok=True)
        for row in (r for r in ROWS if not args.only or r in args.only):
            if str(seed) not in cells.get(row, {}):
                cell = run_cell(row, seed, args.quick, runs)
                # read again: another process may have added to it
                cells = json.loads(path.read_text()) if path.exists() else {}
                cells.setdefault(row, {})[str(seed)] = cell
                cells = {r: dict(sorted(cells[r].items())) for r in ROWS if r in cells}
                write_json(path, cells)
    if not cells:
        raise BadInput(f"{path}: no results yet.")
    parts = pages.table(cells), pages.reward_table(cells), pages.log_table(cells)
    print("\n\n".join(part for part in parts if part))
    why = incomplete(cells)
    if args.report and why:
        raise BadInput(f"{path}: the pages need all rows with the same seeds; {why}.")
    if not args.quick and not why:
        write_pages(cells, folder)


if __name__ == "__main__":
    run(main)
