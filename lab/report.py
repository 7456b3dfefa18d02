"""Evaluates a toy run before and after training; prints one table, draws one image.

Knows no algorithm.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

import eval_chair
import eval_pope
import processes
from common import read_json, whole_folder, write_json
from formats.files import open_image
from lab import text_score
from training import fingerprint

SPLITS = ("random", "popular", "adversarial")
RED = (200, 30, 30)
BLACK = (20, 20, 20)
GRAY = (140, 140, 140)
GREEN = (30, 130, 60)
BLUE = (40, 90, 180)
CURVES = (  # metrics that share a panel
    ("loss",),
    ("rewards/chosen", "rewards/rejected"),
    ("logps/chosen", "logps/rejected"),
    ("objective/scores",),
    ("objective/kl",),
    ("response_length",),
    ("reward",),
    ("frac_reward_zero_std",),
    ("completions/mean_length",),
)


def show_start(processor, examples):
    """Print the number of rows, how they are encoded, and the first prompt."""
    prompt = examples[0].prompt
    is_image = prompt == processor.image_token_id
    text = processor.tokenizer.decode(prompt[~is_image])
    print(
        f"{len(examples)} rows; template {processor.template}, "
        f"image aspect {processor.image_aspect}",
        file=sys.stderr,
    )
    print(f"first prompt ({int(is_image.sum())} image tokens left out): {text!r}", file=sys.stderr)


def evaluate(model, processor, args, out):
    """POPE, CHAIR and the text score in the toy world -> {"pope":, "chair":, "text": figures}.

    Writes the evaluations' files to `out`. None with --no-eval, and for a run on another model. A
    resumed run reads the figures that it wrote before. Of several processes, each answers a share.
    """
    if args.toy_world is None or args.no_eval:
        return None
    files = {name: out / name / "metrics.json" for name in ("pope", "chair", "text")}
    if all(file.is_file() for file in files.values()):
        return {name: read_json(file) for name, file in files.items()}

    world = Path(args.toy_world)
    images = world / "images"
    questions = [world / f"pope_{split}.json" for split in SPLITS]
    truth = [world / "instances.json"], [world / "captions.json"], world / "synonyms.txt"
    where = [out / name if processes.number == 0 else None for name in files]
    return {
        "pope": eval_pope.evaluate(model, processor, questions, images, where[0]),
        "chair": eval_chair.evaluate(model, processor, *truth, images, where[1]),
        "text": text_score.evaluate(model, processor, world / "text_test.json", where[2]),
    }


def evaluate_start(model, processor, args, out):
    """`evaluate` before training; from the cache if this model was evaluated before.

    The cache is `.cache/evaluation-*`, named by a hash of model, template, world and device.
    """
    if args.toy_world is None or args.no_eval:
        return None

    settings = (processor.form, processor.image_aspect, str(model.device), args.toy_world)
    digest = hashlib.sha256(repr((fingerprint(model, processor, []), settings)).encode())
    cached = Path(".cache") / f"evaluation-{digest.hexdigest()[:16]}"
    with processes.first_alone():
        if cached.is_dir() and not out.exists():
            print(f"evaluation before training: {cached}", file=sys.stderr)
            shutil.copytree(cached, out)

    result = evaluate(model, processor, args, out)
    if processes.number == 0 and not cached.is_dir():
        with whole_folder(cached) as aside:
            shutil.copytree(out, aside, dirs_exist_ok=True)
    return result


def finish(out, before, after, seconds, args):
    """Write summary.json, print the table, draw report.png."""
    if processes.number:
        return
    seconds = {name: round(value, 1) for name, value in seconds.items()}
    summary = {"before": before, "after": after, "seconds": seconds, "seed": args.seed}
    write_json(out / "summary.json", summary)

    if after:
        print(table({"before": before, "after": after} if before else {"after": after}))
        picture(out, Path(args.toy_world))
        print(f"picture: {out / 'report.png'}", file=sys.stderr)

    parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    print(f"done in {sum(seconds.values()):.0f} s ({parts}): {out}", file=sys.stderr)


def table(results):
    """{name: {"pope", "chair", "text"}} -> a text table, one row a name."""
    splits = [f"POPE {split}" for split in SPLITS]
    lines = [["", *splits, "yes ratio (adv.)", "CHAIR_s", "CHAIR_i", "recall", "words", "text"]]
    for name, result in results.items():
        pope, chair = result["pope"], result["chair"]
        figures = [pope[split]["accuracy"] for split in SPLITS]
        figures += [pope["adversarial"]["yes_ratio"]]
        figures += [chair["chair_s"], chair["chair_i"], chair["recall"]]
        lines.append([name, *(f"{value:.3f}" for value in figures)])
        lines[-1] += [f"{chair['length']:.1f}", f"{result['text']['mean']:.3f}"]

    widths = [max(map(len, column)) for column in zip(*lines)]
    texts = []
    for name, *cells in lines:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        texts.append("  ".join([name.ljust(widths[0]), *aligned]))
    return "\n".join(texts)


# ---- report.png: test images with the answers before and after, and the training curves


def picture(out, world, columns=3, rows=4):
    """Draw out/report.png from the files of the evaluations and the log in the run folder `out`."""
    sides = [side for side in ("before", "after") if (out / side).is_dir()]
    captions = {side: _lines(out / side / "chair" / "captions.jsonl") for side in sides}
    answers = {side: _yes_no(out / side / "pope", world) for side in sides}
    forms = {}  # node word -> its forms
    for line in (world / "synonyms.txt").read_text().splitlines():
        forms[line.split(", ")[0]] = line.split(", ")

    # images with a caption and a question, spread over the test set
    first = sides[0]
    usable = [i for i, row in enumerate(captions[first]) if row["image"] in answers[first]]
    chosen = usable[:: max(1, len(usable) // (columns * rows))][: columns * rows]

    width, height, thumb, margin = 520, 196, 144, 12
    head = 40
    curves = _curves(out / "metrics.jsonl", columns * width, 190)
    sheet = Image.new("RGB", (columns * width, head + rows * height + curves.height), "white")
    draw = ImageDraw.Draw(sheet)
    small = ImageFont.load_default(12)
    title = f"{out.name}: what the model says of unseen pictures; red = not there, or wrong"
    draw.text((margin, 10), title, BLACK, ImageFont.load_default(14))

    for place, i in enumerate(chosen):
        # the image
        x = place % columns * width
        y = head + place // columns * height
        name = captions[first][i]["image"]
        image = Image.open(world / "images" / name).convert("RGB")
        sheet.paste(image.resize((thumb, thumb)), (x + margin, y + 4))

        # the captions, hallucinated words in red
        left = x + thumb + 2 * margin
        room = width - thumb - 3 * margin
        top = y + 2
        for side in sides:
            row = captions[side][i]
            red = set()
            for node in row["hallucinated"]:
                for form in forms.get(node, [node]):
                    red.update(word.lower() for word in form.split())
            draw.text((left, top), side, GRAY, small)
            top = _words(draw, row["caption"], left, top + 14, room, small, red) + 4

        # the question about an absent object, wrong answers in red
        (question, label), _ = answers[first][name]
        draw.text((left, top), question, BLUE, small)
        left += draw.textlength(question + "  ", small)
        for side in sides:
            _, answer = answers[side][name]
            text = f"{side}: {answer}  "
            colour = GREEN if eval_pope.parse_answer(answer) == label else RED
            draw.text((left, top), text, colour, small)
            left += draw.textlength(text, small)

    sheet.paste(curves, (0, head + rows * height))
    sheet.save(out / "report.png")


def negatives(path, records, results, processor, count=8):
    """Draw what bdhs.py made: the part of the image that the model saw, the cuts, the new answer.

    results: for each record its {"text", "hidden", "cuts", ...}. Words that the true answer does
    not have are red. Guided answers come before unguided ones, then long true answers before short
    ones; examples are taken from the first half of that order.
    """
    length = lambda i: len(records[i].answers[0].split())
    order = sorted(range(len(records)), key=lambda i: (not results[i]["guided"], -length(i), i))
    half = order[: len(order) // 2 or 1]
    chosen = half[:: max(1, len(order) // 2 // count)][:count]

    width, height, thumb, margin = 760, 190, 166, 12
    head = 34
    sheet = Image.new("RGB", (2 * width, head + (len(chosen) + 1) // 2 * height), "white")
    draw = ImageDraw.Draw(sheet)
    small = ImageFont.load_default(12)
    title = "dark = hidden from attention;  | = cut;  red = not in the true answer"
    draw.text((margin, 8), title, BLACK, ImageFont.load_default(14))

    for place, i in enumerate(chosen):
        record, result = records[i], results[i]
        true, new = record.answers[0], result["text"]

        # the image, its hidden patches dark
        x = place % 2 * width
        y = head + place // 2 * height
        shown = ImageOps.pad(open_image(record.image), (thumb, thumb))
        _darken(shown, result["hidden"], processor.image_tokens)
        sheet.paste(shown, (x + margin, y + 4))

        # the prompt, and how the answer was made
        left = x + thumb + 2 * margin
        room = width - thumb - 3 * margin
        unguided = "" if result["guided"] else ", unguided"
        how = f"try {result['tries']}{unguided}, similarity {result['similarity']:.2f}"
        draw.text((left, y + 2), f"{record.turns[-1][:70]}   ({how})", BLUE, small)

        # the true answer with its cuts, and the new one
        parts = ""
        for start, kept, end in result["cuts"]:
            parts += f"{true[start:kept]} | {true[kept:end].strip()}  "
        top = _words(draw, "y+  " + (parts or true), left, y + 20, room, small, set()) + 6
        _words(draw, "y-  " + new, left, top, room, small, _bare_words(new) - _bare_words(true))
    sheet.save(path)


def _darken(image, hidden, tokens):
    """Darken the patches `hidden` of a square image that has this many image tokens.

    Does nothing if the tokens form no square.
    """
    side = round(tokens**0.5)
    if side * side != tokens:
        return
    cell = image.width / side
    mask = Image.new("L", image.size, 0)
    for n in hidden:
        left, top = n % side * cell, n // side * cell
        box = (left, top, left + cell - 1, top + cell - 1)
        ImageDraw.Draw(mask).rectangle(box, fill=215)
    image.paste(Image.new("RGB", image.size), (0, 0), mask)


def _bare_words(text):
    """The words of a text in lower case, without punctuation at their ends."""
    return {word.strip(".,!?").lower() for word in text.split()}


def _lines(path):
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _yes_no(folder, world):
    """{image: ((question, label), answer)}, for one question about an absent object an image.

    The questions are those of the adversarial split.
    """
    chosen = {}
    questions = eval_pope.read_questions(world / "pope_adversarial.json")
    answers = eval_pope.answers_to(questions, folder / "answers_adversarial.jsonl")
    for question, answer in zip(questions, answers):
        if question["label"] == "no":
            text_and_label = question["text"], question["label"]
            chosen.setdefault(question["image"], (text_and_label, answer))
    return chosen


def _words(draw, text, x, y, width, font, red):
    """Write text, wrapped, with the words in `red` in red -> y below it."""
    left = x
    for word in text.split():
        advance = draw.textlength(word + " ", font)
        if left + advance > x + width:
            left = x
            y += 14
        plain = word.strip(".,").lower()
        is_red = plain in red or plain.rstrip("s") in red or plain.removesuffix("es") in red
        draw.text((left, y), word, RED if is_red else BLACK, font)
        left += advance
    return y + 14


def _curves(path, width, height):
    """Draw the training curves in a metrics.jsonl: a panel for each of CURVES that it has."""
    lines = _lines(path)
    panels = [names for names in CURVES if lines and names[0] in lines[0]]
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for i, names in enumerate(panels):
        values = {name: [line[name] for line in lines] for name in names}

        # the frame, with the range of the values and the last step
        x0, x1 = i * width // len(panels) + 60, (i + 1) * width // len(panels) - 20
        y0, y1 = 30, height - 26
        low, high = min(map(min, values.values())), max(map(max, values.values()))
        if high == low:
            high += 1.0
        draw.rectangle((x0, y0, x1, y1), outline=GRAY)
        for text, y in ((f"{high:.3g}", y0), (f"{low:.3g}", y1 - 12)):
            draw.text((x0 - 8 - draw.textlength(text, font), y), text, GRAY, font)
        draw.text((x1 - 60, y1 + 6), f"step {lines[-1]['step'] + 1}", GRAY, font)

        # the curves, each under its name
        left = x0
        for name, colour in zip(names, (GREEN, RED) if len(names) > 1 else (BLUE,)):
            draw.text((left, 10), name, colour, font)
            left += draw.textlength(name, font) + 16
            points = []
            for j, value in enumerate(values[name]):
                across = x0 + (x1 - x0) * j / max(1, len(lines) - 1)
                points.append((across, y1 - (y1 - y0) * (value - low) / (high - low)))
            if len(points) > 1:
                draw.line(points, colour, 2)
    return sheet
