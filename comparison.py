"""Contestants on the same questions: intervals, paired differences, a table, a sheet of pictures.

    units = {"base": counts, "dpo": other_counts}      # (U, C): what each of U images adds to a sum
    figures = lambda sums: {"accuracy": sums[..., 0] / np.maximum(1, sums[..., 1])}
    results = comparison.compare(units, figures)
    print("\\n".join(comparison.table(results)))
    comparison.write_figures(out, {name: score(name) for name in units}, results)
    comparison.sheets(out, list(units), "answers that differ", rows_of)

Intervals are 95 % percentile bootstrap intervals. The units that are drawn are images, because the
questions about one image are no independent trials; without images they are questions. All
contestants answer the same draws, so a difference is paired: its interval is narrower than those of
the two figures where both fail on the same images. A figure that is 0 or 1 on every unit has an
interval without width; this says nothing about another sample.
"""

import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common import BadInput, write_json
from formats.files import open_image

RESAMPLES = 2000
AT_A_TIME = 100  # resamples; 9,000 units are 7 MB
WIDTH, HEIGHT, THUMB, MARGIN, LINE = 560, 190, 166, 12, 14  # of a cell of the sheet, pixels
BLACK, BLUE = (20, 20, 20), (40, 90, 180)
COLOURS = {None: BLACK, True: (30, 130, 60), False: (200, 30, 30)}


def compare(units, figures, seed=0):
    """{contestant: (U, C) array}, a function -> {contestant: {figure: {"value", "low", "high"}}}.

    figures: sums (..., C) -> {figure: (...)}; it must not divide by 0, as a draw may hold anything.
    All but the first contestant also have "difference" to it, "difference_low", "difference_high".
    """
    units = {name: np.asarray(rows, dtype=float) for name, rows in units.items()}
    shapes = {rows.shape for rows in units.values()}
    U = len(next(iter(units.values())))
    if len(shapes) > 1 or not U:
        raise BadInput(
            f"contestants with counts of {shapes}; the same units, 1 or more, are needed."
        )

    # the sums of all units, then those of each draw
    exact = {name: figures(rows.sum(0)) for name, rows in units.items()}
    drawn = {name: [] for name in units}
    rng = np.random.default_rng(seed)
    for _ in range(RESAMPLES // AT_A_TIME):
        times = rng.multinomial(U, np.full(U, 1 / U), AT_A_TIME)  # (R, U) how often each is drawn
        for name, rows in units.items():
            drawn[name].append(times @ rows)  # (R, C)
    drawn = {name: figures(np.concatenate(sums)) for name, sums in drawn.items()}

    first = next(iter(units))
    results = {}
    for name in units:
        results[name] = {}
        for key, value in exact[name].items():
            low, high = interval(drawn[name][key])
            results[name][key] = {"value": float(value), "low": low, "high": high}
            if name != first:
                low, high = interval(drawn[name][key] - drawn[first][key])
                results[name][key] |= {
                    "difference": float(value - exact[first][key]),
                    "difference_low": low,
                    "difference_high": high,
                }
    return results


def interval(values):
    """Draws (R,) -> the middle 95 % of them."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def table(results, only=None, titles=None):
    """Results of `compare` -> lines of text: a block a figure, a line a contestant.

    only: names of figures, in their order. titles: {figure: what stands there in its place}.
    """
    first, *others = results
    between = lambda low, high, sign="": f"{low:{sign}.4f} .. {high:{sign}.4f}"
    lines = [("", "contestant" if others else "", "value", "95 % interval")]
    lines[0] += (f"minus {first}", "95 % interval") if others else ("", "")
    for key in only or results[first]:
        for name in results:
            r = results[name][key]
            title = (titles or {}).get(key, key) if name == first else ""
            line = (title, name if others else "", f"{r['value']:.4f}")
            line += (between(r["low"], r["high"]),)
            if name == first:
                lines.append((*line, "", ""))
                continue
            low, high = r["difference_low"], r["difference_high"]
            surely = "  not 0" if low > 0 or high < 0 else ""
            lines.append((*line, f"{r['difference']:+.4f}", between(low, high, "+") + surely))
    widths = [max(map(len, column)) for column in zip(*lines)]
    widths[0] = max(24, widths[0])
    numbers = (2, 4)  # columns of one number, which stand at the right
    aligned = lambda line: [
        f"{text:>{w}}" if i in numbers else f"{text:{w}}"
        for i, (text, w) in enumerate(zip(line, widths))
    ]
    return ["  ".join(filter(None, aligned(line))).rstrip() for line in lines]


def sheet(path, title, rows, columns=2, most=24):
    """Draw pictures with their question and answers -> how many rows there were.

    rows: [(image or None, question, [(name, answer, right)])], of answers that differ, say; right
    is True, False, or None where there is no telling. At most so many are drawn, spread evenly.
    """
    n = min(most, len(rows))
    chosen = [rows[i * len(rows) // n] for i in range(n)]
    height = 34 + -(-max(1, n) // columns) * HEIGHT
    page = Image.new("RGB", (columns * WIDTH, height), "white")
    draw = ImageDraw.Draw(page)
    small = ImageFont.load_default(12)
    draw.text((MARGIN, 8), f"{title}: {n} of {len(rows)}", BLACK, ImageFont.load_default(14))

    for place, (image, question, answers) in enumerate(chosen):
        x, y = place % columns * WIDTH, 34 + place // columns * HEIGHT
        left, top = x + MARGIN, y + 2
        if image is not None:
            thumb = ImageOps.pad(open_image(image), (THUMB, THUMB), color="white")
            page.paste(thumb, (left, y + 4))
            left += THUMB + MARGIN
        each = (HEIGHT // LINE - 3) // max(1, len(answers))  # lines; the question has two
        texts = [(question, BLUE, 2)]
        texts += [(f"{name}: {text}", COLOURS[right], each) for name, text, right in answers]
        for text, colour, most_lines in texts:
            text = " ".join(text.split())
            wrapped = textwrap.wrap(text, 56, max_lines=max(1, most_lines), placeholder=" ...")
            for line in wrapped:
                draw.text((left, top), line, colour, small)
                top += LINE
    page.save(path)
    return len(rows)


def sheets(out, names, what, rows_of):
    """changed-<name>.png of all contestants but the first: where each differs from the first.

    what: "answers that differ", say. rows_of: a function (first, other) -> rows of `sheet`.
    """
    first, *others = names
    for other in others:
        path = Path(out) / f"changed-{other.replace('/', '-')}.png"
        n = sheet(path, f"{first} against {other}, {what}", rows_of(first, other))
        print(f"{path}: {first} against {other}, {n} {what}")


def write_figures(out, figures, details):
    """metrics.json, {figure: value} of one contestant, of several {contestant: ...}; details.json.

    figures, details: {contestant: ...}.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    one = next(iter(figures.values()))
    write_json(out / "metrics.json", figures if len(figures) > 1 else one)
    write_json(out / "details.json", details)
