"""Do memory and step time stay flat? python tests/long_run.py [--steps N]

dpo.py itself trains a tiny model on the CPU for 50,000 steps (a quarter of an hour of one core): 240 pairs about 60
pictures that are decoded anew in each step, a checkpoint every 1,000 steps. From outside its memory (RSS) and its CPU
time are read each half second. They are means over each hundredth of the steps, in results/long_run.json. CPU time is
taken because it depends less on what else the machine does.

Flat: the last tenth of the steps holds at most 2 % more memory than the second, and takes at most 10 % more CPU time a
step. Else the exit status is 1.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import conftest
import torch
from PIL import Image

from formats import checkpoints

PARTS = 100
FLAGS = ("--save-every 1000 --batch-size 2 --lora-rank 2 --lr 1e-5 --projector-lr 1e-6 --no-eval --device cpu "
         "--dtype float32").split()  # fmt: skip


def write_data(folder):
    """240 pairs about 60 pictures of noise -> the data file."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(60):
        Image.effect_noise((28 + i % 9, 28), 60).convert("RGB").save(folder / f"images/{i}.png")
    for i in range(240):
        said = lambda answer: [
            {"from": "human", "value": f"<image>\nWhat is {i}?"},
            {"from": "gpt", "value": answer},
        ]
        good, bad = said("A red cup." * (1 + i % 3)), said("Two bananas.")
        row = {"image": f"{i % 60}.png", "conversations": good, "rejected_conversations": bad}
        rows.append(row)
    (folder / "povid.json").write_text(json.dumps(rows))
    return folder / "povid.json"


def steps_done(path):
    """The steps that are in metrics.jsonl, read from its end."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 4096))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] + 1 if lines else 0


def watch(process, metrics):
    """[(steps, MiB, CPU seconds)] of a run, each half second until it ends."""
    page, tick = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
    seen = []
    while process.poll() is None:
        time.sleep(0.5)
        try:
            memory = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * page / 2**20
            times = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
            seen.append((steps_done(metrics), memory, sum(map(int, times)) / tick))
        except (FileNotFoundError, IndexError):
            pass  # not begun, or just ended
    return seen


def by_part(seen, steps):
    """Samples -> [{"step", "mib", "cpu_ms"}, ...]: of each part of the steps the mean memory and CPU time a step."""
    seen = [s for s in seen if 0 < s[0] < steps]  # not while it loads or saves
    parts, last = [], seen[0]
    for part in range(PARTS):
        inside = [s for s in seen if part * steps < s[0] * PARTS <= (part + 1) * steps]
        if inside and inside[-1][0] > last[0]:
            mib = sum(s[1] for s in inside) / len(inside)
            ms = 1000 * (inside[-1][2] - last[2]) / (inside[-1][0] - last[0])
            parts.append({"step": inside[-1][0], "mib": round(mib, 1), "cpu_ms": round(ms, 2)})
            last = inside[-1]
    return parts


def growth(parts, steps, key):
    """How much more of `key` the last tenth of the steps has than the second: .02 is 2 % more."""
    of = lambda begin, end: [p[key] for p in parts if begin * steps < p["step"] <= end * steps]
    mean = lambda values: sum(values) / len(values)
    return mean(of(0.9, 1)) / mean(of(0.1, 0.2)) - 1


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--out", default=str(ROOT / "results/long_run.json"))
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="long"))
    conftest.write_parts(folder / "parts")
    parts = checkpoints.compose(folder / "parts/vision", folder / "parts/llm")
    checkpoints.save(*parts, folder / "llava")
    data = write_data(folder / "data")
    command = [sys.executable, ROOT / "dpo.py", "--model", folder / "llava", "--data", data, *FLAGS,
               "--steps", args.steps, "--out", folder / "run"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [*map(str, command)], cwd=folder, env=environment, stdout=log, stderr=log
        )
        seen = watch(process, folder / "run/metrics.jsonl")
    if process.returncode:
        sys.exit((folder / "log").read_text(errors="replace")[-2000:])
    parts = by_part(seen, args.steps)
    grown = {key: round(growth(parts, args.steps, key), 4) for key in ("mib", "cpu_ms")}
    about = {"script": "dpo.py", "steps": args.steps, "torch": torch.__version__}
    about |= {"machine": platform.processor() or platform.machine(), "growth": grown}
    rows = ",\n  ".join(json.dumps(part) for part in parts)
    Path(args.out).write_text(f'{json.dumps(about)[:-1]},\n "parts": [\n  {rows}]}}\n')
    print(f"{args.steps} steps of dpo.py: memory {parts[0]['mib']:.0f} MiB in the first hundredth, "
          f"{parts[-1]['mib']:.0f} in the last; last tenth against the second: memory {grown['mib']:+.2%}, "
          f"CPU time a step {grown['cpu_ms']:+.2%}")  # fmt: skip
    sys.exit(grown["mib"] > 0.02 or grown["cpu_ms"] > 0.1)


if __name__ == "__main__":
    main()
