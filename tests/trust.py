"""What a run survives, and what it refuses, counted: python tests/trust.py

Needs tests/requirements.txt, and atheris for the fuzz runs. Everything is tiny and on the CPU; it takes about half an
hour on one core. It prints a line for each kind of bad input, and the table at the end. The exit status is 1 if anything
was lost or found. tests/test_trust.py runs a little of each. The mutants in the table are those of the last run of
tests/mutants.py, which takes hours; tests/long_run.py watches memory and step time over 50,000 steps.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # runs are forked
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import conftest
import torch

import badness
import kills
from formats import checkpoints

TARGETS = ("pictures", "tensors", "rows")


def fuzz(target, folder, runs):
    """(executions, what was found or "") of a fuzz run; (0, "") without atheris."""
    command = [
        sys.executable,
        str(Path(__file__).parent / "fuzz.py"),
        target,
        folder / target,
        runs,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace")
    if "No module named 'atheris'" in done.stderr:
        return 0, ""
    counted = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    found = re.findall(r"(?:Uncaught Python exception|ERROR: libFuzzer).*\n?.*", done.stderr)
    crashed = "" if done.returncode == 0 else (found or [done.stderr[-300:]])[0]
    return int(counted[1]) if counted else 0, crashed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=240, help="ends of runs (default %(default)s)")
    parser.add_argument(
        "--runs",
        nargs="+",
        default=list(kills.RUNS),
        choices=list(kills.RUNS),
        help="those to end (default all)",
    )
    parser.add_argument(
        "--most", type=int, help="bad inputs of each kind (default all, some 25,000)"
    )
    parser.add_argument(
        "--executions", type=int, default=100_000, help="of each fuzz run (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    fuzz_folder = Path(".cache/fuzz").resolve()
    folder = Path(tempfile.mkdtemp(prefix="trust"))
    conftest.write_parts(folder / "parts")
    checkpoint = folder / "llava"
    checkpoints.save(
        *checkpoints.compose(folder / "parts/vision", folder / "parts/llm"), checkpoint
    )
    os.chdir(folder)
    table, wrong, begin = [], 0, time.time()

    # 1. runs that are ended and go on
    if args.kills:
        names = {name: kills.RUNS[name] for name in args.runs}
        ended, lost = kills.kills(folder / "kills", checkpoint, args.kills, args.seed, names)
        n = ended.total()
        table.append(
            (f"runs ended, of {len(names)} kinds", n, "went on bit for bit", n - len(lost))
        )
        shares = ", ".join(f"{how} {count}" for how, count in ended.items())
        print(
            f"{shares}{'' if ended['full'] else '; no disk became full: mounting one needs root'}"
        )
        wrong += len(lost)

        runs, unfit = kills.full_disks(folder / "disks", checkpoint, names)
        table.append(("runs on a full disk", runs, "one sentence, no half file", runs - len(unfit)))
        print(*unfit, sep="\n", end="\n" * bool(unfit))
        wrong += len(unfit)

    # 2. bad inputs
    total = good = found = 0
    if args.most != 0:
        reward = badness.write_reward(folder / "reward", checkpoint)
        for kind, cases in badness.kinds(folder / "bad", checkpoint, reward, args.seed).items():
            refused, accepted, faults = badness.count(cases, random.Random(args.seed), args.most)
            print(
                f"{kind}: {refused} refused, {accepted} accepted, {len(faults)} faults", flush=True
            )
            for what, fault in faults:
                print(f"    {what[:100]}: {fault[:300]}")
            total, good, found = (
                total + refused + accepted + len(faults),
                good + accepted,
                found + len(faults),
            )
        table.append(("bad inputs", total, "refused", total - good - found))
        table.append(("", "", "still good, and accepted", good))
        wrong += found

    # 3. fuzz runs
    if args.executions:
        executions, findings = 0, []
        for target in TARGETS:
            n, crashed = fuzz(target, fuzz_folder, args.executions)
            executions += n
            findings += [crashed] * bool(crashed)
            print(f"fuzz {target}: {n} executions {crashed[:500]}", flush=True)
        table.append(("fuzz executions", executions, "findings", len(findings)))
        wrong += len(findings)

    # 4. mutants, of the last run of tests/mutants.py
    run = json.loads(Path(__file__).with_name("mutants.json").read_text())["run"]
    same = run["equivalent"]
    table.append((f"mutants, of {run['of']}", run["mutants"] - same, "noticed", run["noticed"]))
    table.append(("", same, "cannot change a result", ""))

    print(f"\n{time.time() - begin:.0f} s, {torch.__version__}, seed {args.seed}")
    for what, n, how, m in table:
        print(f"{what:<28}{n:>8}   {how:<26}{m:>8}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
