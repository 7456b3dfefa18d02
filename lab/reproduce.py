"""The laboratory: every method x seed in the toy world, by the user's own command lines -> results/.

    python -m lab.reproduce                    # all rows, seeds 0 1 2
    python -m lab.reproduce --only ipo --seeds 1
    OMP_NUM_THREADS=1 python -m lab.reproduce --jobs 8      # eight cells at a time
    python -m lab.reproduce --report           # train nothing: write the pages from results/results.json

Each cell is one command line (or two: make data, train) and one run folder below results/runs. A finished cell is not run again,
an unfinished one is begun anew. Each writes a log beside its folder. All methods of a seed start from the same base.

results/results.json holds what the cells wrote. From it come results/README.md (all tables, all claims of the papers), the charts,
and the marked parts of README.md: of the seeds that the rows `dpo-corrected` (the default) and `dpo` have, and the rows that have
all of them. Further seeds of the default and of PPO stand in a table of their own.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from common import BadInput, Parser, Progress, positive_int, run, write_json
from formats import adapters, checkpoints
from lab import chart, pages, report, text_score, toy
from lab.rows import ROWS, YARDSTICKS, comparable

ROOT = Path(__file__).parents[1]


def shared(row):
    """What a row shares with others of its seed, and is made once: files, or "evaluation"."""
    files = [flag for _, _, flags in ROWS[row].commands for flag in flags]
    for _, data, _ in ROWS[row].commands:
        files += [data] if isinstance(data, str) else data or ()
    made = ["vlfeedback.jsonl"] * any(name in toy.OWN_ANSWERS for name in files)
    made += ["ratings.jsonl"] * any(name in toy.RATED for name in files)
    return made + ["evaluation"] * (ROWS[row].family != "reward")


def prepare(seed, what):
    """Make what rows of a seed share."""
    if what == "evaluation":
        evaluated(seed)
    else:
        toy.data_file(seed, what)


def run_cell(row, seed, quick, folder):
    """Run a row's command lines to their end -> summary.json's and "minutes", "cpu_seconds", "commands", "log".

    "cpu_seconds": of the row's own commands, without the setup and the evaluations of the last.
    """
    commands, begin, out, cpu = [], time.time(), None, []
    for i, (script, file, flags) in enumerate(ROWS[row].commands, 1):
        last = i == len(ROWS[row].commands)
        files = (file,) if isinstance(file, str) else file
        sources = (
            [out / "preferences.json"]
            if file is None
            else [toy.data_file(seed, name) for name in files]
        )
        out = folder / (f"{row}-{seed}" if last else f"{row}-{seed}-data")
        flags = [written(flag, seed, folder) for flag in flags]
        for source in sources:
            flags += ["--data", str(source)]
        flags += ["--images", str(toy.world(seed) / "images"), "--seed", str(seed)]
        if quick and last:
            flags += ["--steps", "3"]
        commands.append([script, *flags, "--out", str(out)])
        shutil.rmtree(out, ignore_errors=True)
        with open(folder / f"{out.name}.log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / script), *commands[-1][1:]],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            _, status, used = os.wait4(process.pid, 0)  # of this process: others run beside it
        process.returncode = os.waitstatus_to_exitcode(status)
        cpu.append(used.ru_utime + used.ru_stime)
        if process.returncode:
            command = f"python {' '.join(commands[-1])}"
            raise BadInput(
                f"{command} ended with status {process.returncode}: see {log.name}; call again to "
                "go on from here."
            )
    summary = json.loads((out / "summary.json").read_text())
    if summary["after"] is None:  # a script that knows no toy world: sft.py on a given model
        summary |= {"before": evaluated(seed), "after": evaluated(seed, out)}
    if row == "judged-dpo":  # what the paper compares with: the LLM that saw no picture yet
        model, processor = checkpoints.compose(toy.parts(seed) / "clip", toy.reader(seed))
        summary["llm"] = text_score.evaluate(model, processor, toy.world(seed) / "text_test.json")
    parts = summary["seconds"]
    share = 1 - (parts["setup"] + parts["eval"]) / max(sum(parts.values()), 0.1)
    return summary | {
        "minutes": round((time.time() - begin) / 60, 2),
        "cpu_seconds": round(sum(cpu[:-1]) + cpu[-1] * share, 1),
        "commands": [[part.replace(f"{ROOT}/", "") for part in line] for line in commands],
        "log": log_of(out),
    }


def evaluated(seed, out=None):
    """The figures of the seed's base, with the adapter of the run folder `out` if there is one."""
    model, processor = checkpoints.load(toy.base(seed))
    args = SimpleNamespace(toy_world=str(toy.world(seed)), no_eval=False)
    if out:
        adapters.load_adapter(model, out / "adapter")
        return report.evaluate(model, processor, args, out / "after")
    with tempfile.TemporaryDirectory() as aside:
        return report.evaluate_start(model, processor, args, Path(aside) / "before")


def needs(row):
    """The rows whose run folders a row's flags name."""
    flags = [flag[1:] for _, _, flags in ROWS[row].commands for flag in flags if flag[:1] == "@"]
    return [name for name in flags if name in ROWS]


def written(flag, seed, folder):
    """A flag of ROWS as the script gets it: see `Row`."""
    if flag in ("@base", "@other-base"):
        return str(toy.base(seed if flag == "@base" else seed + 1))
    if flag.startswith("@"):
        run = folder / f"{flag[1:]}-{seed}"
        if not (run / "summary.json").is_file():
            raise BadInput(f"{run}: not there yet; --only {flag[1:]} makes it.")
        return str(run)
    return str(toy.data_file(seed, flag)) if flag.endswith(".jsonl") else flag


def log_of(out):
    """A run's metrics.jsonl -> {name of pages.LOGGED or ALSO_LOGGED: [mean of the first fifth of its steps, of the last fifth]}."""
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    fifth = max(1, len(lines) // 5)
    found = {}
    for name in (*pages.LOGGED, *pages.ALSO_LOGGED):
        ends = lines[:fifth], lines[-fifth:]
        ends = [[line[name] for line in part if name in line] for part in ends]
        if all(ends):
            found[name] = [round(statistics.fmean(values), 4) for values in ends]
    return found


def run_all(args, runs, path):
    """Run the cells that are missing in the file `path`, --jobs at a time, and add them to it."""
    read = lambda: json.loads(path.read_text()) if path.exists() else {}
    there, lock = read(), threading.Lock()
    for seed in args.seeds:
        toy.base(seed)
    missing = [
        (row, seed)
        for seed in args.seeds
        for row in ROWS
        if (not args.only or row in args.only) and str(seed) not in there.get(row, {})
    ]
    progress = Progress("cells", len(missing))
    started, done = {}, []  # (row or what rows share, seed) -> its future

    def cell(row, seed):
        for what in (*shared(row), *needs(row)):
            if (what, seed) in started:
                started[what, seed].result()
        result = run_cell(row, seed, args.quick, runs)
        with lock:  # read again: another process may have added to it
            cells = read()
            cells.setdefault(row, {})[str(seed)] = result
            write_json(path, {r: dict(sorted(cells[r].items())) for r in ROWS if r in cells})
            done.append((row, seed))
            progress(len(done), f"{row}, seed {seed}: {result['minutes']} min  ")

    # what others wait for starts first
    waits = lambda row: 2 * bool(needs(row)) + bool(shared(row))
    order = sorted(missing, key=lambda one: waits(one[0]))
    parts = dict.fromkeys((what, seed) for row, seed in order for what in shared(row))
    with ThreadPoolExecutor(args.jobs) as pool:
        for what, seed in parts:
            started[what, seed] = pool.submit(prepare, seed, what)
        for row, seed in order:
            started[row, seed] = pool.submit(cell, row, seed)
    failed = [future.exception() for future in started.values() if future.exception()]
    if failed:  # the others went on to their ends
        raise failed[0]


def write_pages(everything, folder):
    """The charts, results/README.md and the marked parts of README.md."""
    cells = comparable(everything)
    chart.draw(cells, folder / "chart.png", "recall", "present objects still mentioned")
    right = "right answers to hard questions"
    chart.draw(cells, folder / "chart_pope.png", "POPE adversarial", right)
    gpu = json.loads((ROOT / "results" / "gpu.json").read_text())
    (folder / "README.md").write_text(pages.results_page(everything, gpu), encoding="utf-8")
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
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default 0 1 2)"
    )
    parser.add_argument(
        "--jobs",
        type=positive_int,
        default=1,
        metavar="N",
        help="cells at a time; give each one thread: OMP_NUM_THREADS=1 (default %(default)s)",
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
    if not args.report:
        runs.mkdir(parents=True, exist_ok=True)
        run_all(args, runs, path)
        cells = json.loads(path.read_text()) if path.exists() else {}
    if not cells:
        raise BadInput(f"{path}: no results yet.")
    parts = pages.table(cells), pages.reward_table(cells), pages.log_table(cells)
    print("\n\n".join(part for part in parts if part))
    if args.report and not comparable(cells):
        raise BadInput(
            f"{path}: the pages need a seed of the rows {' and '.join(YARDSTICKS)}, with which the "
            "others are compared."
        )
    if not args.quick and comparable(cells):
        write_pages(cells, folder)


if __name__ == "__main__":
    run(main)
