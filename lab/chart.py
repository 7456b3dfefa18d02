"""results/chart*.png: hallucination against what is kept, one panel for each family of methods."""

import math
import statistics

from PIL import Image, ImageDraw, ImageFont

from lab.rows import FAMILIES, ROWS, after, bases, changes, figure, policies

SCALE = 2  # pixels for one unit of the layout below
WIDTH, HEIGHT, TOP = 660, 430, 86  # a panel; the head line
LEFT, RIGHT, ABOVE, BELOW = 62, 14, 34, 52  # a panel's margins
COLOURS = {
    "offline": "#1f5fb4",
    "bdhs": "#c4570c",
    "online": "#1c8048",
    "rl": "#8a2f9a",
    "judged": "#7a5c00",
}
GRAY, PALE = "#6b6b6b", "#c9c9c9"
TICKS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)


def means(cells, column):
    """{row: (mean change of the column, mean CHAIR_s)}, with the base as row "base"."""
    base = statistics.fmean(r["chair"]["chair_s"] for r in bases(cells).values())
    found = {"base": (0.0, base)}
    for row in policies(cells):
        x, y = changes(cells, row, column), after(cells, row, "CHAIR_s")
        found[row] = (statistics.fmean(x), statistics.fmean(y))
    return found


def pareto(points):
    """Rows that no other row beats in both: x as high as possible, y as low as possible. Sorted from left to right."""
    kept = [
        row
        for row, (x, y) in points.items()
        if not any((u >= x and v <= y) and (u, v) != (x, y) for u, v in points.values())
    ]
    return sorted(kept, key=lambda row: points[row])


def overlap(a, b):
    """Do two boxes (x0, y0, x1, y1) share an area?"""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def crosses(a, b, point, radius=8):
    """Does the line from a to b pass a point within the radius?"""
    length = math.dist(a, b) ** 2
    along = sum((e - s) * (p - s) for s, e, p in zip(a, b, point)) / length if length else 0.0
    foot = tuple(s + min(1, max(0, along)) * (e - s) for s, e in zip(a, b))
    return math.dist(foot, point) < radius


def place_labels(sizes, points, frame, hard, soft):
    """{row: (width, height)} -> {row: box}: each label near its point, on no other label, in the frame.

    hard: boxes that no label may cover. soft: boxes that are better left free. The line from a label to its point should
    pass no other point. The most crowded point chooses first.
    """
    crowd = lambda row: sum(math.dist(points[row], p) < 60 for p in points.values())
    placed = {}
    for row in sorted(sizes, key=crowd, reverse=True):
        (w, h), (x, y) = sizes[row], points[row]
        best = None
        for radius in range(9, 170, 7):
            for angle in range(0, 360, 15):
                dx, dy = (
                    radius * math.cos(math.radians(angle)),
                    radius * math.sin(math.radians(angle)),
                )
                left = x + dx - w / 2 + (w / 2) * math.copysign(min(1, abs(dx) / 6), dx)
                box = (left, y + dy - h / 2, left + w, y + dy + h / 2)
                inside = (
                    box[0] > frame[0] + 3
                    and box[1] > frame[1] + 3
                    and box[2] < frame[2] - 3
                    and box[3] < frame[3] - 3
                )
                if not inside or any(overlap(box, b) for b in [*hard, *placed.values()]):
                    continue
                others = [p for name, p in points.items() if name != row]
                cost = (
                    radius
                    + 45 * sum(overlap(box, b) for b in soft)
                    + 60 * sum(crosses((x, y), nearest(box, (x, y)), p) for p in others)
                )
                if best is None or cost < best[0]:
                    best = cost, box
        if best is None:
            raise ValueError(f"no free place for the label of {row}")
        placed[row] = best[1]
    return placed


def nearest(box, point):
    """The point of a box that is nearest to a point: where a leader line ends."""
    return tuple(min(max(p, low), high) for p, low, high in zip(point, box[:2], box[2:]))


class Sheet:
    """Draws in units of the layout, each SCALE pixels."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.fonts = {size: ImageFont.load_default(size * SCALE) for size in (12, 13, 15, 18)}

    def line(self, points, colour, width=1.0):
        """A line through points (x, y)."""
        self.draw.line([c * SCALE for p in points for c in p], colour, round(width * SCALE))

    def text(self, at, text, colour, size=13, anchor="la"):
        """A text; `anchor` as in Pillow: which point of it is at (x, y)."""
        self.draw.text([c * SCALE for c in at], text, colour, self.fonts[size], anchor=anchor)

    def size(self, text, size=13):
        """Width and height of a text."""
        x0, y0, x1, y1 = self.fonts[size].getbbox(text)
        return (x1 - x0) / SCALE, (y1 - y0) / SCALE + 3

    def dot(self, at, radius, colour, edge="white"):
        """A filled circle."""
        box = [c * SCALE for c in (at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius)]
        self.draw.ellipse(box, colour, edge, SCALE)

    def diamond(self, at, radius, colour):
        """A filled square on its corner."""
        x, y = at
        corners = (x - radius, y), (x, y - radius), (x + radius, y), (x, y + radius)
        self.draw.polygon([c * SCALE for corner in corners for c in corner], colour)


def draw(cells, path, column, label):
    """Draw a chart of CHAIR_s against the change of a column -> boxes of the labels of each panel.

    Nothing is drawn without a row that trains a policy.
    """
    if not policies(cells):
        return []
    points = means(cells, column)
    spans = {
        row: (changes(cells, row, column), after(cells, row, "CHAIR_s")) for row in policies(cells)
    }
    every = [x for xs, _ in spans.values() for x in xs] + [0.0]
    step = 0.02 if max(every) - min(every) > 0.08 else 0.01
    lowest, highest = min(x for x, _ in points.values()), max(x for x, _ in points.values())
    # From a step left of the lowest mean (a bar that goes on ends in an arrow) to where labels have room on the right.
    x0 = math.floor(max(min(every) / step - 0.3, lowest / step - 1)) * step
    x1 = math.ceil(max(max(every) + 0.3 * step, highest + 0.45 * (highest - x0)) / step) * step
    sheet = Sheet(2 * WIDTH, TOP + -(-len(COLOURS) // 2) * HEIGHT)
    base = statistics.fmean(figure(r, ("chair", "chair_s")) for r in bases(cells).values())
    seeds = len(bases(cells))
    sheet.text(
        (14, 12),
        "Captions that mention an absent object (CHAIR_s, lower is better) against "
        f"{label} ({column}, further right is better)",
        "black",
        18,
    )
    sheet.text(
        (14, 40),
        f"Large dot: mean over seeds ({seeds}). Thin bars: lowest to highest seed. Black diamond: the model before training. "
        "Small grey dots: the other families.",
        GRAY,
    )
    sheet.text(
        (14, 58),
        "Grey stairs: the Pareto front, the best trade-offs of all methods; no method lies below and to the right of it. "
        "CHAIR_s has a logarithmic scale.",
        GRAY,
    )

    panels = []
    for number, (family, colour) in enumerate(COLOURS.items()):
        left, top = number % 2 * WIDTH + LEFT, TOP + number // 2 * HEIGHT + ABOVE
        right, bottom = left - LEFT + WIDTH - RIGHT, top - ABOVE + HEIGHT - BELOW
        frame = (left, top, right, bottom)
        low, high = math.log10(TICKS[0]), math.log10(TICKS[-1])
        at = lambda x, y: (
            left + (x - x0) / (x1 - x0) * (right - left),
            bottom - (math.log10(max(y, TICKS[0])) - low) / (high - low) * (bottom - top),
        )

        # the frame, its ticks and units
        sheet.text((left, top - 25), FAMILIES[family], colour, 15)
        for tick in TICKS:
            y = at(0, tick)[1]
            sheet.line([(left, y), (right, y)], "#ececec")
            sheet.text((left - 6, y), f"{100 * tick:g} %", GRAY, 12, "rm")
        for i in range(round((x1 - x0) / step) + 1):
            tick = x0 + i * step
            x = at(tick, 1)[0]
            sheet.line([(x, top), (x, bottom)], "#ececec" if abs(tick) > 1e-9 else "#9a9a9a")
            sheet.text(
                (x, bottom + 6), f"{100 * tick:+.0f}" if abs(tick) > 1e-9 else "0", GRAY, 12, "ma"
            )
        sheet.line([(left, top), (left, bottom), (right, bottom), (right, top), (left, top)], GRAY)
        sheet.text(
            ((left + right) / 2, bottom + 24),
            f"{column}: change from the base, percentage points",
            "black",
            13,
            "ma",
        )
        if number % 2 == 0:
            sheet.text((left - LEFT + 4, top - 25), "CHAIR_s", "black", 13)

        # the Pareto front: at each x the lowest CHAIR_s that some method reaches without falling below x
        front = [at(*points[row]) for row in pareto(points)]
        stairs = [(left, front[0][1])]
        for (xa, ya), following in zip(front, [*front[1:], None]):
            stairs += [(xa, ya), (xa, following[1] if following else top)]
        sheet.line(stairs, "#a8a8a8", 1.5)

        # the points: the other families small, this one with the spread of its seeds
        own = {row: at(*points[row]) for row in spans if ROWS[row].family == family}
        soft = [
            (min(a[0], b[0]), min(a[1], b[1]), max(a[0], b[0]) + 1, max(a[1], b[1]) + 1)
            for a, b in zip(stairs, stairs[1:])
        ]
        hard = []
        for row in spans:
            if row not in own:
                x, y = at(*points[row])
                sheet.dot((x, y), 3, PALE, PALE)
                soft.append((x - 4, y - 4, x + 4, y + 4))
        for row, (x, y) in own.items():
            xs, ys = ([at(v, 1)[0] for v in spans[row][0]], [at(0, v)[1] for v in spans[row][1]])
            sheet.line([(max(min(xs), left), y), (max(xs), y)], colour)
            if min(xs) < left:
                sheet.line([(left + 7, y - 4), (left, y), (left + 7, y + 4)], colour)
                note = (left + 4, y - 20), f"to {100 * min(spans[row][0]):+.0f}"
                sheet.text(*note, colour, 12)
                hard.append((left, y - 22, left + 50, y))
            sheet.line([(x, min(ys)), (x, max(ys))], colour)
            soft += [(min(xs), y - 1, max(xs), y + 1), (x - 1, min(ys), x + 1, max(ys))]
        for x, y in own.values():
            sheet.dot((x, y), 6, colour)
            hard.append((x - 7, y - 7, x + 7, y + 7))
        start = at(0, base)
        sheet.diamond(start, 7, "black")
        hard.append((start[0] - 8, start[1] - 8, start[0] + 8, start[1] + 8))

        # the labels, each with a line to its point where it is not beside it
        texts = {row: ROWS[row].label for row in own} | {"base": f"base {100 * base:.0f} %"}
        sizes = {row: sheet.size(text) for row, text in texts.items()}
        boxes = place_labels(sizes, own | {"base": start}, frame, hard, soft)
        for row, box in boxes.items():
            point = start if row == "base" else own[row]
            end = nearest(box, point)
            if math.dist(point, end) > 12:
                sheet.line([point, end], colour, 0.8)
        for row, (bx0, by0, bx1, by1) in boxes.items():
            sheet.draw.rectangle([c * SCALE for c in (bx0 - 1, by0, bx1 + 1, by1)], "white")
            sheet.text(
                (bx0, (by0 + by1) / 2), texts[row], "black" if row == "base" else colour, 13, "lm"
            )
        panels.append(boxes)
    sheet.image.save(path, optimize=True)
    return panels
