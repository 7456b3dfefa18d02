"""Two experiments of Sun et al. 2023: facts and sight of a reward model; data of visual tuning.

    python -m lab.sight                  # three seeds; a finished cell is not run again
    python -m lab.sight --report         # run nothing: print the table, draw the picture

**Do facts help a reward model, and most where it sees badly?** Sight is the size of the pictures that the base gets: SIDES pixels wide, enlarged again; 0 is one
grey. The base is the same, and with it how well it reads. On the grey pictures the plain reward
model shows what can be told without seeing and without reading, the factual one what it reads.

A cell is a run of reward_model.py's own command line on pairs of captions: the truth against one
with a wrong colour, number or place. Corruptions that add an object are left out: the worse caption
is longer then, which tells them apart without looking.

    kinds of reward model     plain           no facts
                              facts           in the evaluation turn, behind the answer
                              facts first     before the question

results/sight.json holds the held-out accuracies and, as a measure of sight, the base's POPE random
accuracy on such pictures; results/sight.png shows both.

**Do questions with short answers help visual tuning?** Their SFT+ adds yes/no questions and
multiple choice to LLaVA's conversations and descriptions. Here that is the toy base, and "plain" a
model tuned on as many pictures without these rows, by sft.py's own command line: captions, open
questions, texts. Both are asked POPE's questions and 300 multiple-choice questions of test scenes.
"""

import json
import random
import statistics
import tempfile
from functools import partial
from pathlib import Path

from PIL import Image

import eval_chair
import eval_pope
from common import Parser, Progress, run, whole_folder, write_json
from data import Record
from formats import checkpoints
from formats.files import remember_images
from lab import text_score, toy
from lab.benchmarks import problems, test_scenes
from lab.chart import GRAY, Sheet
from lab.oracle import Oracle
from lab.reading import write_rows
from sampling import generate

ROOT = Path(__file__).parents[1]
PAIRS = ("povid.json", "povid_seen.json")
SIDES = (144, 12, 0)  # 144: the pictures as they are
KINDS = {"plain": ["--no-facts"], "facts": [], "facts first": ["--facts-first"]}
SETTINGS = [  # as reward_model.py's TOY; about four epochs, for reading is learned late
    *("--steps", "300", "--batch-size", "16", "--grad-accum", "1", "--lr", "1e-3"),
    *("--lora-rank", "16", "--held-out", "400", "--save-every", "0"),
]
COLOURS = {"plain": "#6b6b6b", "facts": "#8a2f9a", "facts first": "#1c8048"}


def pairs(seed):
    """The caption pairs of povid.json and povid_seen.json whose worse caption names no absent object."""
    oracle, found = Oracle(toy.world(seed)), []
    for name in PAIRS:
        for row in json.loads((toy.world(seed) / name).read_text()):
            prompt, worse = (
                row["conversations"][0]["value"],
                row["rejected_conversations"][1]["value"],
            )
            if oracle.question(row["image"], prompt)[0] == "describe":
                if not oracle.judge(row["image"], prompt, worse)["false"]:
                    found.append(row)
    return found


def seen(seed, side):
    """The folder of the pictures that are asked about, as a base of this sight gets them."""
    world = toy.world(seed)
    if side == SIDES[0]:
        return world / "images"
    folder = toy.CACHE / f"sight-{side}-{world.name}"
    if not folder.exists():
        rows = [row for name in PAIRS for row in json.loads((world / name).read_text())]
        rows += [json.loads(line) for line in open(world / "pope_random.json")]
        with whole_folder(folder) as aside:
            for name in sorted({row["image"] for row in rows}):
                picture = Image.open(world / "images" / name).convert("RGB")
                if side:
                    small = picture.resize((side, side), Image.Resampling.BOX)
                    worse = small.resize(picture.size, Image.Resampling.BICUBIC)
                else:
                    worse = Image.new("RGB", picture.size, (128, 128, 128))
                worse.save(aside / name, compress_level=1)
        remember_images(folder, folder)
    return folder


def sight(seed, side):
    """The base's POPE random accuracy on such pictures."""
    model, processor = checkpoints.load(toy.base(seed))
    questions = [toy.world(seed) / "pope_random.json"]
    return eval_pope.evaluate(model, processor, questions, seen(seed, side))["random"]["accuracy"]


def accuracy(seed, side, kind):
    """The held-out accuracy of a reward model."""
    with tempfile.TemporaryDirectory() as aside:
        data, out = Path(aside) / "pairs.json", Path(aside) / "run"
        write_rows(data, pairs(seed))
        flags = ["--model", toy.base(seed), "--data", data, "--images", seen(seed, side)]
        if kind != "plain":
            known = toy.world(seed) / "image_to_caption.json"
            flags += ["--facts", known, "--max-facts", "1"]
        flags += [*KINDS[kind], *SETTINGS, "--seed", seed, "--out", out]
        toy.script("reward_model.py", *flags)
        (figures,) = json.loads((out / "metrics.json").read_text()).values()
    return figures["accuracy"]


# ---- the data of visual tuning


def plain_base(seed, folder):
    """Tune a base without yes/no and multiple-choice rows -> its folder."""
    world = toy.world(seed)
    rows = json.loads((world / "instruct.json").read_text())
    short = lambda text: "\nA. " in text or text.removeprefix("<image>\n").startswith("Is there ")
    kept = [row for row in rows if not short(row["conversations"][0]["value"])]
    write_rows(folder / "conversation.json", kept)
    toy.script(
        *("sft.py", "--seed", seed, "--no-eval", "--dtype", "float32", "--out", folder / "run"),
        *("--data", folder / "conversation.json", "--data", world / "text_mix.json"),
        *("--images", world / "images"),
    )
    return folder / "run" / "model"


def plus_base(seed):
    """The base after as many steps as the plain one: before it was trained on, if it was."""
    base = toy.base(seed)
    before = base.parent / "run" / "model"
    return before if before.is_dir() else base


def abilities(seed, base):
    """Of a base that was tuned so: {"pope": accuracies, "choice": accuracy, "chair_s", "recall", "text"}.

    base: "plus" or "plain".
    """
    world = toy.world(seed)
    with tempfile.TemporaryDirectory() as aside:
        folder = plus_base(seed) if base == "plus" else plain_base(seed, Path(aside))
        model, processor = checkpoints.load(folder)
    questions = [world / f"pope_{split}.json" for split in ("random", "popular", "adversarial")]
    pope = eval_pope.evaluate(model, processor, questions, world / "images")
    truth = [world / "instances.json"], [world / "captions.json"], world / "synonyms.txt"
    chair = eval_chair.evaluate(model, processor, *truth, world / "images", None)
    asked = problems(test_scenes(world, 300), random.Random(f"{seed}/vqa"))[1::3]  # the choices
    records = [
        Record(row["image"], world / "images" / row["image"], (row["problem"],)) for row in asked
    ]
    said = [text.strip()[:1] for (text,) in generate(model, processor, records, 8)]
    right = [letter == row["solution"] for letter, row in zip(said, asked, strict=True)]
    return {
        "pope": {split: pope[split]["accuracy"] for split in ("random", "adversarial")},
        "choice": statistics.fmean(right),
        "chair_s": chair["chair_s"],
        "recall": chair["recall"],
        "text": text_score.evaluate(model, processor, world / "text_test.json")["mean"],
    }


# ---- cells, table, picture


def cells(seeds):
    """All cells {"what/seed/...": the call that measures it}; --facts-first comes last."""
    found = {}
    for seed in seeds:
        for side in SIDES:
            found[f"sight/{seed}/{side}"] = partial(sight, seed, side)
            for kind in KINDS:
                found[f"accuracy/{seed}/{side}/{kind}"] = partial(accuracy, seed, side, kind)
        for base in ("plus", "plain"):
            found[f"tuning/{seed}/{base}"] = partial(abilities, seed, base)
    return dict(sorted(found.items(), key=lambda cell: cell[0].endswith("facts first")))


def read(path):
    """The measured cells {name: figures}."""
    return json.loads(path.read_text()) if path.exists() else {}


def over_seeds(found, name):
    """The figures of a cell, {} being the seed's place in its name, of the seeds that have it."""
    what, rest = name.split("{}")
    matching = (key for key in found if key.startswith(what) and key.endswith(rest))
    return [found[key] for key in matching if key.count("/") == name.count("/")]


def spread(values):
    """Mean and standard deviation over seeds as text."""
    if not values:
        return "-"
    shown = f"{statistics.fmean(values):.3f}"
    return f"{shown} ± {statistics.stdev(values):.3f}" if len(values) > 1 else shown


def table(found):
    """What was measured, as text."""
    lines = [f"{'held-out accuracy':22}{'POPE random':18}" + "".join(f"{k:18}" for k in KINDS)]
    for side in SIDES:
        names = [f"sight/{{}}/{side}"] + [f"accuracy/{{}}/{side}/{kind}" for kind in KINDS]
        shown = [spread(over_seeds(found, name)) for name in names]
        lines.append(f"{f'{side} pixels':22}" + "".join(f"{text:18}" for text in shown))
    lines += [
        "",
        f"{'visual tuning':22}{'POPE random':18}{'adversarial':18}{'choice':18}{'CHAIR_s':18}text",
    ]
    for base in ("plain", "plus"):
        figures = over_seeds(found, f"tuning/{{}}/{base}")
        shown = [spread([f["pope"][split] for f in figures]) for split in ("random", "adversarial")]
        shown += [spread([f[name] for f in figures]) for name in ("choice", "chair_s", "text")]
        lines.append(f"{base:22}" + "".join(f"{text:18}" for text in shown))
    return "\n".join(lines)


def draw(found, path):
    """Held-out accuracy of each kind of reward model against sight."""
    x0, x1, y0, y1 = 60, 620, 98, 400
    sheet = Sheet(x1 + 20, y1 + 60)
    sheet.text(
        (14, 12), "Held-out accuracy of reward models against how well the base sees", "black", 18
    )
    sheet.text((14, 40), "Lines: means over seeds. Dots: seeds.", GRAY)
    sheet.text((14, 58), "Sight: the base's accuracy on POPE random with such pictures.", GRAY)
    at = lambda x, y: (
        x0 + (x - 0.45) / 0.55 * (x1 - x0),
        y1 - (y - 0.6) / 0.4 * (y1 - y0),
    )
    for tick in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        sheet.text((at(tick, 0)[0], y1 + 6), f"{tick:.1f}", GRAY, 12, "ma")
        if tick >= 0.6:
            sheet.line([at(0.45, tick), at(1.0, tick)], "#ececec")
            sheet.text((x0 - 6, at(0, tick)[1]), f"{tick:.1f}", GRAY, 12, "rm")
    sheet.line([(x0, y0), (x0, y1), (x1, y1)], GRAY)
    sheet.text(((x0 + x1) / 2, y1 + 24), "POPE random accuracy of the base", "black", 13, "ma")
    for row, (kind, colour) in enumerate(COLOURS.items()):
        points = []
        for side in SIDES:
            seen_at = over_seeds(found, f"sight/{{}}/{side}")
            held = over_seeds(found, f"accuracy/{{}}/{side}/{kind}")
            if not seen_at or not held:
                continue
            x = statistics.fmean(seen_at)
            points.append(at(x, statistics.fmean(held)))
            for value in held:
                sheet.dot(at(x, value), 3, colour, colour)
        if points:
            sheet.line(points, colour, 2)
            sheet.text((x1 - 6, y1 - 60 + 18 * row), kind, colour, 13, "ra")
    sheet.image.save(path, optimize=True)


def main():
    """Measure what is missing, print the table, draw the picture."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default 0 1 2)"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="CELL", help="beginnings of cells' names, such as accuracy/0"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "results", metavar="DIR")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "sight.json"
    missing = {} if args.report else cells(args.seeds)
    missing = {name: measure for name, measure in missing.items() if name not in read(path)}
    if args.only:
        missing = {n: m for n, m in missing.items() if n.startswith(tuple(args.only))}
    progress = Progress("cells", len(missing))
    for done, (name, measure) in enumerate(missing.items(), 1):
        figures = measure()
        write_json(path, dict(sorted((read(path) | {name: figures}).items())))
        progress(done, f"{name}  ")
    found = read(path)
    print(table(found))
    draw(found, args.out / "sight.png")


if __name__ == "__main__":
    run(main)
