"""What a run in the toy world shows: evaluation before and after, one table, one picture. Knows no algorithm."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

import eval_chair
import eval_pope
from common import read_json, whole_folder, write_json
from formats.files import open_image
from training import fingerprint

SPLITS = ("random", "popular", "adversarial")
RED, BLACK, GRAY, GREEN, BLUE = (
    (200, 30, 30),
    (20, 20, 20),
    (140, 140, 140),
    (30, 130, 60),
    (40, 90, 180),
)


def show_start(processor, examples):
    """Print what the run is made of, and one prompt with its special tokens."""
    prompt = examples[0].prompt
    text = processor.tokenizer.decode(prompt[prompt != processor.image_token_id])
    pictures = int((prompt == processor.image_token_id).sum())
    print(
        f"{len(examples)} rows; template {processor.template}, image aspect {processor.image_aspect}",
        file=sys.stderr,
    )
    print(f"first prompt ({pictures} image tokens left out): {text!r}", file=sys.stderr)


def evaluate(model, processor, args, out):
    """POPE and CHAIR on the toy world's test scenes -> {"pope": P, "chair": C}, files in `out`.

    None with --no-eval, and for a run on another model. A resumed run takes the figures that it had
    written before.
    """
    if args.toy_world is None or args.no_eval:
        return None
    if all((out / name / "metrics.json").is_file() for name in ("pope", "chair")):
        return {name: read_json(out / name / "metrics.json") for name in ("pope", "chair")}
    world = Path(args.toy_world)
    questions = [world / f"pope_{split}.json" for split in SPLITS]
    truth = [world / "instances.json"], [world / "captions.json"], world / "synonyms.txt"
    images = world / "images"
    pope = eval_pope.evaluate(model, processor, questions, images, out / "pope")
    chair = eval_chair.evaluate(model, processor, *truth, images, out / "chair")
    return {"pope": pope, "chair": chair}


def evaluate_start(model, processor, args, out):
    """`evaluate` before training, from the cache if this model has been evaluated before.

    The cache is `.cache/evaluation-*`, under a hash of model, template, world and device.
    """
    if args.toy_world is None or args.no_eval:
        return None
    settings = (processor.template, processor.image_aspect, str(model.device), args.toy_world)
    digest = hashlib.sha256(repr((fingerprint(model, processor, []), settings)).encode())
    cached = Path(".cache") / f"evaluation-{digest.hexdigest()[:16]}"
    if cached.is_dir() and not out.exists():
        print(f"evaluation before training: {cached}", file=sys.stderr)
        shutil.copytree(cached, out)
    result = evaluate(model, processor, args, out)
    if not cached.is_dir():
        with whole_folder(cached) as aside:
            shutil.copytree(out, aside, dirs_exist_ok=True)
    return result


def finish(out, before, after, seconds, args):
    """Write summary.json, print the table, draw report.png."""
    seconds = {k: round(v, 1) for k, v in seconds.items()}
    write_json(
        out / "summary.json",
        {"before": before, "after": after, "seconds": seconds, "seed": args.seed},
    )
    if after:
        print(table({"before": before, "after": after} if before else {"after": after}))
        picture(out, Path(args.toy_world))
        print(f"picture: {out / 'report.png'}", file=sys.stderr)
    parts = ", ".join(f"{part} {s:.0f}" for part, s in seconds.items())
    print(f"done in {sum(seconds.values()):.0f} s ({parts}): {out}", file=sys.stderr)


def table(results):
    """{name: {"pope", "chair"}} -> a text table, a row a name."""
    head = [
        "",
        *(f"POPE {s}" for s in SPLITS),
        "yes ratio (adv.)",
        "CHAIR_s",
        "CHAIR_i",
        "recall",
        "words",
    ]
    lines = [head]
    for name, r in results.items():
        pope, chair = r["pope"], r["chair"]
        figures = [pope[s]["accuracy"] for s in SPLITS] + [pope["adversarial"]["yes_ratio"]]
        figures += [chair["chair_s"], chair["chair_i"], chair["recall"]]
        lines.append([name, *(f"{v:.3f}" for v in figures), f"{chair['length']:.1f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths))
        )
        for line in lines
    )


# ---- the picture: test images with what the model said before and after, and the training curves


def picture(out, world, columns=3, rows=4):
    """Draw out/report.png from the files that the evaluations and the log left in the run folder."""
    sides = [s for s in ("before", "after") if (out / s).is_dir()]
    said = {
        s: [json.loads(line) for line in open(out / s / "chair" / "captions.jsonl")] for s in sides
    }
    answers = {s: _yes_no(out / s / "pope", world) for s in sides}
    forms = {
        line.split(", ")[0]: line.split(", ")
        for line in (world / "synonyms.txt").read_text().splitlines()
    }
    asked = [i for i, row in enumerate(said[sides[0]]) if row["image"] in answers[sides[0]]]
    chosen = asked[:: max(1, len(asked) // (columns * rows))][: columns * rows]
    width, height, thumb, margin = 520, 196, 144, 12
    curves = _curves(out / "metrics.jsonl", columns * width, 190)
    sheet = Image.new("RGB", (columns * width, 40 + rows * height + curves.height), "white")
    draw, font, small = (
        ImageDraw.Draw(sheet),
        ImageFont.load_default(14),
        ImageFont.load_default(12),
    )
    draw.text(
        (margin, 10),
        f"{out.name}: what the model says of unseen pictures; red = not there, or wrong",
        BLACK,
        font,
    )
    for place, i in enumerate(chosen):
        x, y = place % columns * width, 40 + place // columns * height
        name = said[sides[0]][i]["image"]
        sheet.paste(
            Image.open(world / "images" / name).convert("RGB").resize((thumb, thumb)),
            (x + margin, y + 4),
        )
        at = y + 2
        for side in sides:
            row = said[side][i]
            absent = {
                w.lower()
                for node in row["hallucinated"]
                for form in forms.get(node, [node])
                for w in form.split()
            }
            draw.text((x + thumb + 2 * margin, at), side, GRAY, small)
            at = (
                _words(
                    draw,
                    row["caption"],
                    x + thumb + 2 * margin,
                    at + 14,
                    width - thumb - 3 * margin,
                    small,
                    absent,
                )
                + 4
            )
        (question, label), _ = answers[sides[0]][name]
        across = x + thumb + 2 * margin
        draw.text((across, at), question, BLUE, small)
        across += draw.textlength(question + "  ", small)
        for side in sides:
            given = answers[side][name][1]
            text = f"{side}: {given}  "
            draw.text(
                (across, at), text, RED if eval_pope.parse_answer(given) != label else GREEN, small
            )
            across += draw.textlength(text, small)
    sheet.paste(curves, (0, 40 + rows * height))
    sheet.save(out / "report.png")


def negatives(path, records, found, processor, count=8):
    """Draw what `bdhs.py` made: what the model could still see, the true answer with its cuts, and what came out.

    records: of the answers; found: for each its {"text", "hidden", "cuts", ...}. Words that the true answer does not have are
    red. Answers of more words are shown first.
    """
    order = sorted(
        range(len(records)),
        key=lambda i: (not found[i]["guided"], -len(records[i].answers[0].split()), i),
    )
    chosen = order[: len(order) // 2 or 1][:: max(1, len(order) // 2 // count)][:count]
    width, height, thumb, margin = 760, 190, 166, 12
    sheet = Image.new("RGB", (2 * width, 34 + (len(chosen) + 1) // 2 * height), "white")
    draw, font, small = (
        ImageDraw.Draw(sheet),
        ImageFont.load_default(14),
        ImageFont.load_default(12),
    )
    draw.text(
        (margin, 8),
        "dark = hidden from attention;  | = cut;  red = not in the true answer",
        BLACK,
        font,
    )
    for place, i in enumerate(chosen):
        x, y = place % 2 * width, 34 + place // 2 * height
        record, negative = records[i], found[i]
        shown = ImageOps.pad(open_image(record.image), (thumb, thumb))
        side = round(processor.image_tokens**0.5)
        if side * side == processor.image_tokens:
            cell, black = thumb / side, Image.new("RGB", (thumb, thumb))
            mask = Image.new("L", (thumb, thumb), 0)
            for n in negative["hidden"]:
                left, top = n % side * cell, n // side * cell
                ImageDraw.Draw(mask).rectangle(
                    (left, top, left + cell - 1, top + cell - 1), fill=215
                )
            shown.paste(black, (0, 0), mask)
        sheet.paste(shown, (x + margin, y + 4))
        at, across = y + 2, x + thumb + 2 * margin
        how = f"try {negative['tries']}{'' if negative['guided'] else ', unguided'}, similarity {negative['similarity']:.2f}"
        draw.text((across, at), f"{record.turns[-1][:70]}   ({how})", BLUE, small)
        true, cut = record.answers[0], ""
        for start, kept, end in negative["cuts"]:
            cut += f"{true[start:kept]} | {true[kept:end].strip()}  "
        room = width - thumb - 3 * margin
        at = _words(draw, "y+  " + (cut or true), across, at + 18, room, small, set()) + 6
        said = negative["text"]
        strange = {w.strip(".,!?").lower() for w in said.split()} - {
            w.strip(".,!?").lower() for w in true.split()
        }
        _words(draw, "y-  " + said, across, at, room, small, strange)
    sheet.save(path)


def _yes_no(folder, world):
    """{image: ((question, label), answer)}: of each image an adversarial question about something absent."""
    found = {}
    given = [json.loads(line)["answer"] for line in open(folder / "answers_adversarial.jsonl")]
    for question, answer in zip(eval_pope.read_questions(world / "pope_adversarial.json"), given):
        if question["label"] == "no":
            found.setdefault(question["image"], ((question["text"], question["label"]), answer))
    return found


def _words(draw, text, x, y, width, font, red):
    """Write wrapped text, the words in `red` in red -> y below it."""
    at = x
    for word in text.split():
        w = draw.textlength(word + " ", font)
        if at + w > x + width:
            at, y = x, y + 14
        plain = word.strip(".,").lower()
        absent = plain in red or plain.rstrip("s") in red or plain.removesuffix("es") in red
        draw.text((at, y), word, RED if absent else BLACK, font)
        at += w
    return y + 14


def _curves(
    path,
    width,
    height,
    panels=(("loss",), ("rewards/chosen", "rewards/rejected"), ("logps/chosen", "logps/rejected"))
    + (("objective/scores",), ("objective/kl",), ("response_length",)),
):
    """Training curves of a metrics.jsonl, a panel for each group of metrics that it holds."""
    lines = [json.loads(line) for line in open(path)]
    panels = [p for p in panels if lines and p[0] in lines[0]]
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, names in enumerate(panels):
        x0, x1 = i * width // len(panels) + 60, (i + 1) * width // len(panels) - 20
        y0, y1 = 30, height - 26
        values = {n: [line[n] for line in lines] for n in names}
        low, high = min(map(min, values.values())), max(map(max, values.values()))
        high += (high == low) * 1.0
        draw.rectangle((x0, y0, x1, y1), outline=GRAY)
        for text, y in ((f"{high:.3g}", y0), (f"{low:.3g}", y1 - 12)):
            draw.text((x0 - 8 - draw.textlength(text, font), y), text, GRAY, font)
        draw.text((x1 - 60, y1 + 6), f"step {lines[-1]['step'] + 1}", GRAY, font)
        at = x0
        for name, colour in zip(names, (GREEN, RED) if len(names) > 1 else (BLUE,)):
            draw.text((at, 10), name, colour, font)
            at += draw.textlength(name, font) + 16
            n = len(lines)
            points = [
                (x0 + (x1 - x0) * j / max(1, n - 1), y1 - (y1 - y0) * (v - low) / (high - low))
                for j, v in enumerate(values[name])
            ]
            if n > 1:
                draw.line(points, colour, 2)
    return sheet
