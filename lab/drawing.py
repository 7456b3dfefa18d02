"""Pictures of the tiny built-in world: eight backdrops, 26 classes of things, a 3 x 2 grid of slots, drawn with Pillow."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (220, 50, 47),
    "blue": (45, 105, 215),
    "yellow": (250, 205, 40),
    "brown": (138, 84, 44),
    "white": (250, 250, 248),
    "black": (42, 42, 50),
    "gray": (140, 145, 155),
    "orange": (243, 135, 35),
    "green": (50, 160, 75),
    "purple": (140, 70, 185),
}
CLASSES: dict[str, tuple[str, ...]] = {
    "person": (),
    "car": ("red", "blue", "yellow"),
    "bicycle": (),
    "traffic light": (),
    "dog": ("brown", "white", "black"),
    "cat": ("gray", "orange", "black"),
    "bird": ("blue", "red", "yellow"),
    "cow": ("brown", "black"),
    "sheep": (),
    "boat": ("red", "blue", "white"),
    "umbrella": ("red", "blue", "yellow", "purple"),
    "kite": ("red", "green", "purple"),
    "bench": ("brown", "green"),
    "chair": ("red", "blue", "brown"),
    "couch": ("green", "red", "gray"),
    "bed": ("blue", "purple", "green"),
    "tv": (),
    "laptop": (),
    "book": ("red", "blue", "green"),
    "clock": (),
    "cup": ("red", "blue", "yellow"),
    "bowl": ("blue", "orange", "white"),
    "banana": (),
    "oven": (),
    "potted plant": (),
    "teddy bear": (),
}
SCENES: tuple[str, ...] = ("kitchen", "street", "beach", "farm", "bedroom", "park", "living room", "office")
DARK, PALE, GLASS, PINK = (48, 48, 58), (250, 246, 236), (190, 225, 240), (240, 165, 165)


@dataclass(frozen=True)
class Thing:
    """What stands in one slot: `count` (1 or 2) copies in `column` 0-2 (left to right) and `row` 0-1 (back, front)."""

    name: str
    colour: str | None
    count: int
    column: int
    row: int


def tone(c: Colour, by: float) -> Colour:
    """`c` moved towards black (`by` -1) or white (`by` 1)."""
    goal = 255 if by > 0 else 0
    return tuple(round(v + (goal - v) * abs(by)) for v in c)


class Pen:
    """Draws into a box of an image in unit coordinates: (0, 0) is its top left; lengths are in box widths."""

    def __init__(self, draw, x: float, y: float, w: float, h: float, flip: bool = False, shade: float = 0.0):
        self.draw, self.x, self.y, self.w, self.h, self.flip, self.shade = draw, x, y, w, h, flip, shade

    def at(self, points) -> list[tuple[float, float]]:
        return [(self.x + self.w * (1 - a if self.flip else a), self.y + self.h * b) for a, b in points]

    def corners(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, ...]:
        (a, b), (c, d) = self.at(((x0, y0), (x1, y1)))
        return min(a, c), b, max(a, c), max(b, d)

    def ink(self, fill) -> tuple[int, ...]:
        return tone(fill, self.shade) if len(fill) == 3 else fill

    def poly(self, fill, *points):
        self.draw.polygon(self.at(points), self.ink(fill))

    def box(self, fill, x0, y0, x1, y1, r=0.0):
        if r:
            self.draw.rounded_rectangle(self.corners(x0, y0, x1, y1), r * self.w, self.ink(fill))
        else:
            self.draw.rectangle(self.corners(x0, y0, x1, y1), self.ink(fill))

    def oval(self, fill, x0, y0, x1, y1):
        self.draw.ellipse(self.corners(x0, y0, x1, y1), self.ink(fill))

    def disc(self, fill, x, y, r):
        tall = r * self.w / self.h
        self.oval(fill, x - r, y - tall, x + r, y + tall)

    def ring(self, fill, x, y, r, width):
        tall = r * self.w / self.h
        box = self.corners(x - r, y - tall, x + r, y + tall)
        self.draw.ellipse(box, None, self.ink(fill), max(1, round(width * self.w)))

    def line(self, fill, width, *points):
        wide = max(1, round(width * self.w))
        self.draw.line(self.at(points), self.ink(fill), wide, joint="curve")
        if wide > 3:
            for x, y in (points[0], points[-1]):
                self.disc(fill, x, y, width / 2)

    def arc(self, fill, width, x0, y0, x1, y1, start, end):
        """An arc of the oval in the given corners, in degrees clockwise from the right."""
        if self.flip:
            start, end = 180 - end, 180 - start
        self.draw.arc(self.corners(x0, y0, x1, y1), start, end, self.ink(fill), max(1, round(width * self.w)))

    def half(self, fill, x0, y0, x1, y1, start=0, end=180):
        """The part of an oval cut off by a chord, the lower half unless told."""
        if self.flip:
            start, end = 180 - end, 180 - start
        self.draw.chord(self.corners(x0, y0, x1, y1), start, end, self.ink(fill))

    def fade(self, top: Colour, bottom: Colour, y0: float, y1: float, steps: int = 10):
        """A vertical gradient across the whole box."""
        for i in range(steps):
            c = tuple(round(a + (b - a) * i / (steps - 1)) for a, b in zip(top, bottom, strict=True))
            self.box(c, 0, y0 + (y1 - y0) * i / steps, 1, y0 + (y1 - y0) * (i + 1) / steps)


def person(p: Pen, c, rng):
    skin = rng.choice(((245, 205, 170), (225, 170, 125), (150, 100, 65)))
    shirt = rng.choice(((30, 150, 160), (235, 120, 130), (110, 120, 200)))
    hair = rng.choice(((60, 40, 30), (120, 75, 35), (40, 38, 45)))
    p.line((55, 65, 100), 0.23, (0.37, 0.6), (0.34, 0.92))
    p.line((65, 75, 115), 0.23, (0.63, 0.6), (0.66, 0.92))
    p.oval(DARK, 0.14, 0.93, 0.46, 1.0)
    p.oval(DARK, 0.54, 0.93, 0.86, 1.0)
    swing = rng.uniform(-0.05, 0.05)
    for x, hand in ((0.24, 0.1), (0.76, 0.9)):
        p.line(tone(shirt, -0.15), 0.17, (x, 0.35), (hand, 0.52 + swing))
        p.disc(skin, hand, 0.56 + swing, 0.1)
    p.box(shirt, 0.2, 0.28, 0.8, 0.66, 0.18)
    p.box(skin, 0.42, 0.22, 0.58, 0.32)
    p.disc(hair, 0.5, 0.125, 0.29)
    p.disc(skin, 0.5, 0.155, 0.24)
    for x in (0.41, 0.59):
        p.disc(DARK, x, 0.155, 0.035)
    p.arc((170, 70, 70), 0.04, 0.4, 0.14, 0.6, 0.215, 20, 160)


def car(p: Pen, c, rng):
    roof = rng.uniform(-0.03, 0.03)
    p.poly(c, (0.14, 0.48), (0.3, 0.06 + roof), (0.68, 0.06 + roof), (0.84, 0.48))
    p.poly(GLASS, (0.24, 0.45), (0.34, 0.15 + roof), (0.47, 0.15 + roof), (0.47, 0.45))
    p.poly(GLASS, (0.53, 0.45), (0.53, 0.15 + roof), (0.64, 0.15 + roof), (0.74, 0.45))
    p.box(c, 0.0, 0.42, 1.0, 0.84, 0.1)
    p.box(tone(c, -0.25), 0.03, 0.7, 0.97, 0.84, 0.06)
    p.box(tone(c, 0.35), 0.08, 0.46, 0.9, 0.51)
    p.oval((255, 245, 190), 0.92, 0.5, 1.0, 0.64)
    for x in (0.23, 0.77):
        p.disc(DARK, x, 0.82, 0.125)
        p.disc((200, 203, 210), x, 0.82, 0.06)


def bicycle(p: Pen, c, rng):
    frame = (0, 140, 135)
    for x in (0.21, 0.79):
        p.ring(DARK, x, 0.68, 0.2, 0.05)
        p.disc(DARK, x, 0.68, 0.04)
    p.line(frame, 0.055, (0.21, 0.68), (0.36, 0.32), (0.68, 0.3), (0.49, 0.7), (0.21, 0.68))
    p.line(frame, 0.055, (0.49, 0.7), (0.33, 0.2))
    p.line(frame, 0.055, (0.79, 0.68), (0.65, 0.1))
    p.line(DARK, 0.055, (0.56, 0.13), (0.65, 0.09), (0.76, 0.14))
    p.line(DARK, 0.08, (0.25, 0.18), (0.41, 0.18))
    p.disc((90, 90, 100), 0.49, 0.7, 0.06)


def traffic_light(p: Pen, c, rng):
    p.box((95, 98, 108), 0.42, 0.6, 0.58, 1.0)
    p.box((75, 78, 88), 0.25, 0.95, 0.75, 1.0, 0.05)
    p.box((38, 42, 50), 0.1, 0.0, 0.9, 0.72, 0.18)
    lit = rng.randrange(3)
    for i, lamp in enumerate(((255, 60, 50), (255, 205, 40), (60, 215, 95))):
        p.disc(lamp if i == lit else tone(lamp, -0.2), 0.5, 0.13 + 0.23 * i, 0.25)
        p.disc(tone(lamp, 0.5), 0.42, 0.1 + 0.23 * i, 0.07)


def dog(p: Pen, c, rng):
    """From the side, tail up, long snout and hanging ear."""
    dark, tail = tone(c, -0.3 if sum(c) > 200 else -0.5), rng.uniform(-0.05, 0.05)
    p.line(c, 0.08, (0.12, 0.52), (0.03, 0.3), (0.08 + tail, 0.12))
    for x in (0.2, 0.58):
        p.line(dark, 0.1, (x + 0.08, 0.65), (x + 0.09, 0.94))
    p.box(c, 0.08, 0.42, 0.72, 0.76, 0.16)
    for x in (0.15, 0.62):
        p.line(c, 0.11, (x, 0.65), (x, 0.94))
    p.poly(c, (0.48, 0.5), (0.58, 0.2), (0.8, 0.3), (0.72, 0.62))
    p.disc(c, 0.68, 0.24, 0.19)
    p.box(c, 0.68, 0.22, 1.0, 0.42, 0.09)
    p.line((215, 45, 60), 0.06, (0.52, 0.44), (0.72, 0.52))
    p.box(dark, 0.5, 0.1, 0.64, 0.44, 0.07)
    p.disc(DARK if sum(c) > 200 else (15, 15, 18), 0.96, 0.25, 0.055)
    p.disc(PALE, 0.75, 0.2, 0.045)
    p.disc((20, 20, 25), 0.76, 0.2, 0.03)
    p.oval(PINK, 0.82, 0.39, 0.91, 0.52)


def cat(p: Pen, c, rng):
    """Sitting, seen from the front: big pointed ears, whiskers, a tail curled up at its side."""
    dark, lean = tone(c, -0.3), rng.uniform(-0.04, 0.04)
    p.arc(c, 0.12, 0.6, 0.48, 1.0, 0.98, -80, 130)
    p.oval(c, 0.16, 0.42, 0.8, 1.02)
    p.oval(tone(c, 0.45), 0.34, 0.56, 0.62, 0.92)
    for x in (0.36, 0.6):
        p.oval(tone(c, 0.2), x - 0.12, 0.88, x + 0.12, 1.0)
    for side in (-1, 1):
        x = 0.48 + lean
        p.poly(c, (x + side * 0.36, 0.0), (x + side * 0.38, 0.32), (x + side * 0.02, 0.16))
        p.poly(PINK, (x + side * 0.31, 0.07), (x + side * 0.32, 0.24), (x + side * 0.13, 0.17))
    p.oval(c, 0.09 + lean, 0.12, 0.87 + lean, 0.56)
    for i in (-1, 0, 1):
        p.line(dark, 0.05, (0.48 + lean + i * 0.09, 0.13), (0.48 + lean + i * 0.08, 0.21))
    for side in (-1, 1):
        x = 0.48 + lean + side * 0.18
        p.oval((200, 235, 90), x - 0.09, 0.25, x + 0.09, 0.38)
        p.oval((15, 20, 20), x - 0.03, 0.26, x + 0.03, 0.37)
        for dy in (0.4, 0.46):
            p.line(PALE, 0.025, (x, 0.42), (x + side * 0.3, dy))
    p.poly(PINK, (0.42 + lean, 0.39), (0.54 + lean, 0.39), (0.48 + lean, 0.45))


def bird(p: Pen, c, rng):
    lift = rng.uniform(-0.06, 0.06)
    for x in (0.47, 0.57):
        p.line((215, 120, 30), 0.04, (x, 0.8), (x + 0.02, 0.98), (x + 0.1, 0.98))
    p.poly(tone(c, -0.3), (0.0, 0.42), (0.05, 0.66), (0.4, 0.68), (0.3, 0.45))
    p.oval(c, 0.16, 0.3, 0.82, 0.88)
    p.poly((245, 145, 30), (0.84, 0.18), (1.0, 0.28), (0.84, 0.36))
    p.disc(c, 0.7, 0.26, 0.2)
    p.half(tone(c, 0.55), 0.36, 0.45, 0.8, 0.88, -20, 140)
    p.poly(tone(c, -0.3), (0.12, 0.3 + lift), (0.6, 0.42), (0.56, 0.62), (0.34, 0.68))
    p.disc(PALE, 0.75, 0.22, 0.06)
    p.disc((20, 20, 25), 0.765, 0.22, 0.04)


def cow(p: Pen, c, rng):
    """From the side: a long white-patched barrel on four legs, a horned head with a pink muzzle."""
    dx = rng.uniform(-0.04, 0.04)
    p.line(c, 0.04, (0.05, 0.3), (0.01, 0.5), (0.03, 0.66))
    for x in (0.14, 0.27, 0.53, 0.66):
        p.box(tone(c, -0.2), x - 0.045, 0.6, x + 0.045, 0.92)
        p.box((60, 50, 45), x - 0.045, 0.91, x + 0.045, 1.0)
    p.oval(PINK, 0.34, 0.62, 0.5, 0.82)
    p.box(c, 0.03, 0.22, 0.76, 0.74, 0.14)
    p.oval(PALE, 0.1 + dx, 0.24, 0.34 + dx, 0.55)
    p.oval(PALE, 0.42 + dx, 0.4, 0.62 + dx, 0.7)
    for side in (-1, 1):
        p.poly((240, 225, 180), (0.8 + side * 0.06, 0.14), (0.8 + side * 0.17, -0.02), (0.8 + side * 0.13, 0.16))
        p.oval(tone(c, -0.2), 0.8 + side * 0.14 - 0.07, 0.15, 0.8 + side * 0.14 + 0.07, 0.27)
    p.box(c, 0.67, 0.08, 0.93, 0.56, 0.1)
    p.box(PALE, 0.77, 0.1, 0.83, 0.4, 0.03)
    p.oval(PINK, 0.64, 0.38, 0.96, 0.62)
    for x in (0.73, 0.87):
        p.disc((120, 60, 60), x, 0.5, 0.025)
        p.disc(PALE, x, 0.27, 0.04)
        p.disc((20, 20, 25), x, 0.27, 0.025)


def sheep(p: Pen, c, rng):
    wool, face = (246, 243, 234), (70, 62, 66)
    for x in (0.22, 0.36, 0.56, 0.7):
        p.line(face, 0.08, (x, 0.7), (x, 0.96))
    puffs = [(0.42 + 0.3 * math.cos(a), 0.46 + 0.26 * math.sin(a)) for a in (i * math.tau / 9 for i in range(9))]
    for x, y in puffs:
        p.disc(tone(wool, -0.12), x, y + 0.03, 0.135)
    for x, y in puffs:
        p.disc(wool, x + rng.uniform(-0.01, 0.01), y, 0.13)
    p.oval(wool, 0.15, 0.25, 0.7, 0.72)
    for x, y in ((0.3, 0.42), (0.5, 0.36), (0.42, 0.58)):
        p.arc(tone(wool, -0.2), 0.03, x - 0.08, y - 0.08, x + 0.08, y + 0.08, 20, 200)
    p.oval(face, 0.6, 0.3, 0.76, 0.42)
    p.oval(face, 0.68, 0.22, 0.98, 0.7)
    p.disc(wool, 0.77, 0.22, 0.1)
    p.disc(wool, 0.87, 0.24, 0.07)
    p.disc(PALE, 0.85, 0.42, 0.045)
    p.disc((15, 15, 20), 0.86, 0.42, 0.025)


def boat(p: Pen, c, rng):
    top = rng.uniform(0.0, 0.05)
    p.box((120, 80, 50), 0.47, top, 0.51, 0.72)
    p.poly(tone(c, 0.1), (0.53, top + 0.02), (0.53, 0.66), (0.95, 0.66))
    p.poly(tone(c, -0.1), (0.53, 0.45), (0.53, 0.66), (0.95, 0.66), (0.82, 0.45))
    p.poly((255, 250, 235), (0.45, top + 0.1), (0.45, 0.66), (0.1, 0.66))
    p.poly(c, (0.0, 0.71), (1.0, 0.71), (0.82, 1.0), (0.18, 1.0))
    p.poly(tone(c, -0.3), (0.1, 0.87), (0.9, 0.87), (0.82, 1.0), (0.18, 1.0))
    p.box((70, 60, 70), 0.0, 0.7, 1.0, 0.745)


def umbrella(p: Pen, c, rng):
    p.line((110, 75, 50), 0.05, (0.5, 0.04), (0.5, 0.88))
    p.arc((110, 75, 50), 0.05, 0.5, 0.8, 0.7, 1.0, 0, 180)
    p.half(c, 0.0, 0.04, 1.0, 0.98, 180, 360)
    p.half(tone(c, 0.3), 0.3, 0.04, 0.7, 0.98, 180, 360)
    p.half(tone(c, -0.25), 0.0, 0.04, 1.0, 0.98, 180, 205 + rng.uniform(-5, 5))
    for i in range(4):
        fill = (c, tone(c, 0.3), tone(c, 0.3), c)[i]
        p.oval(fill, i / 4, 0.44, (i + 1) / 4, 0.6)


def kite(p: Pen, c, rng):
    x = 0.5 + rng.uniform(-0.06, 0.06)
    p.line((90, 90, 100), 0.025, (0.5, 0.68), (0.36, 0.8), (0.5, 0.9), (0.38, 1.0))
    p.poly(c, (x, 0.0), (1.0, 0.28), (0.5, 0.72), (0.0, 0.28))
    p.poly(tone(c, 0.4), (x, 0.0), (0.0, 0.28), (0.5, 0.28))
    p.poly(tone(c, 0.4), (1.0, 0.28), (0.5, 0.72), (0.5, 0.28))
    for a, b in ((0.38, 0.8), (0.48, 0.91)):
        p.poly(COLOURS["yellow"], (a - 0.14, b - 0.05), (a, b), (a - 0.14, b + 0.05))
        p.poly(COLOURS["yellow"], (a + 0.14, b - 0.05), (a, b), (a + 0.14, b + 0.05))


def bench(p: Pen, c, rng):
    gap = rng.uniform(-0.01, 0.01)
    for x in (0.14, 0.86):
        p.box(DARK, x - 0.035, 0.05, x + 0.035, 1.0)
        p.box(DARK, x - 0.1, 0.94, x + 0.1, 1.0)
    for y in (0.0, 0.2, 0.4):
        p.box(c, 0.0, y + gap, 1.0, y + 0.14 + gap, 0.02)
        p.box(tone(c, 0.25), 0.01, y + gap, 0.99, y + 0.035 + gap)
    p.box(tone(c, 0.15), 0.0, 0.6, 1.0, 0.7, 0.02)
    p.box(tone(c, -0.25), 0.0, 0.68, 1.0, 0.78, 0.02)


def chair(p: Pen, c, rng):
    """Three-quarter view: tall back on the left, seat, four legs."""
    dark, seat = tone(c, -0.3), 0.56 + rng.uniform(-0.02, 0.02)
    for x, y in ((0.3, 0.9), (0.78, 0.9)):
        p.box(dark, x, seat, x + 0.1, y)
    p.box(c, 0.04, 0.02, 0.16, 1.0, 0.04)
    p.poly(c, (0.08, 0.0), (0.42, 0.08), (0.42, seat), (0.08, seat + 0.08))
    p.poly(tone(c, 0.3), (0.15, 0.08), (0.35, 0.13), (0.35, 0.4), (0.15, 0.43))
    p.poly(tone(c, 0.15), (0.06, seat + 0.1), (0.36, seat - 0.03), (1.0, seat - 0.03), (0.86, seat + 0.1))
    p.box(tone(c, -0.15), 0.06, seat + 0.1, 0.87, seat + 0.17)
    p.box(c, 0.75, seat + 0.1, 0.87, 1.0)


def couch(p: Pen, c, rng):
    mid = 0.5 + rng.uniform(-0.03, 0.03)
    for x in (0.1, 0.84):
        p.box((90, 60, 40), x, 0.88, x + 0.06, 1.0)
    p.box(tone(c, -0.12), 0.08, 0.0, 0.92, 0.7, 0.1)
    p.box(c, 0.13, 0.06, mid - 0.01, 0.55, 0.05)
    p.box(c, mid + 0.01, 0.06, 0.87, 0.55, 0.05)
    p.box(tone(c, 0.25), 0.12, 0.48, mid - 0.01, 0.72, 0.05)
    p.box(tone(c, 0.25), mid + 0.01, 0.48, 0.88, 0.72, 0.05)
    p.box(tone(c, -0.25), 0.05, 0.7, 0.95, 0.92, 0.04)
    for x in (0.0, 0.84):
        p.box(c, x, 0.32, x + 0.16, 0.92, 0.07)
        p.box(tone(c, 0.2), x + 0.02, 0.34, x + 0.14, 0.42, 0.03)


def bed(p: Pen, c, rng):
    wood, fold = (165, 112, 70), 0.38 + rng.uniform(-0.03, 0.03)
    p.box(wood, 0.0, 0.0, 0.09, 1.0, 0.03)
    p.box(wood, 0.92, 0.42, 1.0, 1.0, 0.03)
    p.box(tone(wood, -0.2), 0.05, 0.78, 0.95, 0.9)
    p.box((248, 246, 240), 0.09, 0.5, 0.93, 0.8, 0.04)
    p.box((255, 255, 255), 0.1, 0.3, 0.36, 0.56, 0.08)
    p.box((215, 220, 230), 0.12, 0.5, 0.36, 0.56, 0.03)
    p.box(c, fold, 0.4, 0.94, 0.82, 0.05)
    p.box(tone(c, 0.4), fold, 0.42, fold + 0.1, 0.82)
    p.box(tone(c, -0.2), fold, 0.74, 0.94, 0.82)


def tv(p: Pen, c, rng):
    p.line((70, 70, 80), 0.03, (0.3, 0.02), (0.5, 0.24), (0.7, 0.02))
    for x in (0.2, 0.8):
        p.line((70, 70, 80), 0.05, (x, 0.88), (x + (x - 0.5) * 0.1, 0.98))
    p.box((45, 42, 50), 0.0, 0.2, 1.0, 0.92, 0.06)
    p.box((62, 84, 120), 0.06, 0.27, 0.94, 0.84, 0.03)
    x = rng.uniform(0.15, 0.4)
    p.poly((110, 140, 180), (x, 0.83), (x + 0.25, 0.28), (x + 0.45, 0.28), (x + 0.2, 0.83))


def laptop(p: Pen, c, rng):
    silver, top = (205, 210, 218), rng.uniform(0.0, 0.05)
    p.box(tone(silver, -0.25), 0.13, top, 0.87, 0.7, 0.05)
    p.box((110, 200, 235), 0.18, top + 0.06, 0.82, 0.64)
    p.box((245, 250, 252), 0.25, 0.2, 0.58, 0.27)
    p.box((245, 250, 252), 0.25, 0.34, 0.75, 0.4)
    p.box((245, 250, 252), 0.25, 0.47, 0.66, 0.53)
    p.poly(silver, (0.12, 0.7), (0.88, 0.7), (1.0, 0.93), (0.0, 0.93))
    p.poly((90, 95, 105), (0.18, 0.73), (0.82, 0.73), (0.88, 0.84), (0.12, 0.84))
    p.box(tone(silver, -0.35), 0.0, 0.93, 1.0, 1.0, 0.03)


def book(p: Pen, c, rng):
    """Closed, standing a little turned: coloured cover, dark spine, white page block below and at the right."""
    dark, tip = tone(c, -0.35), rng.uniform(-0.02, 0.02)
    p.poly(dark, (0.0, 0.1), (0.2, 0.02), (1.0, 0.06), (1.0, 0.95), (0.2, 1.0), (0.0, 0.92))
    p.poly((252, 248, 235), (0.86, 0.09), (0.97, 0.1), (0.97, 0.9), (0.86, 0.92))
    p.poly(c, (0.16, 0.02 + tip), (0.88, 0.02), (0.88, 0.94), (0.16, 0.98))
    p.box((252, 240, 200), 0.3, 0.2, 0.74, 0.3)
    p.box((252, 240, 200), 0.38, 0.36, 0.66, 0.41)
    p.line(tone(c, 0.35), 0.03, (0.22, 0.06), (0.22, 0.93))


def clock(p: Pen, c, rng):
    p.disc((38, 52, 92), 0.5, 0.5, 0.5)
    p.disc((253, 252, 246), 0.5, 0.5, 0.4)
    for i in range(12):
        a = i * math.tau / 12
        x, y = math.cos(a), math.sin(a)
        p.line(DARK, 0.03 if i % 3 else 0.05, (0.5 + x * 0.32, 0.5 + y * 0.32), (0.5 + x * 0.36, 0.5 + y * 0.36))
    for reach, width in ((0.2, 0.06), (0.29, 0.04)):
        a = rng.uniform(0, math.tau)
        p.line(DARK, width, (0.5, 0.5), (0.5 + reach * math.cos(a), 0.5 + reach * math.sin(a)))
    p.disc((215, 50, 50), 0.5, 0.5, 0.05)


def cup(p: Pen, c, rng):
    sway = rng.uniform(-0.03, 0.03)
    p.arc(tone(c, -0.15), 0.1, 0.56, 0.36, 1.0, 0.8, -110, 110)
    p.box(c, 0.05, 0.28, 0.74, 0.9, 0.04)
    p.oval(c, 0.05, 0.78, 0.74, 1.0)
    p.box(tone(c, 0.3), 0.13, 0.38, 0.22, 0.86, 0.04)
    p.oval(tone(c, 0.35), 0.05, 0.2, 0.74, 0.38)
    p.oval((90, 55, 35), 0.11, 0.23, 0.68, 0.36)
    for x in (0.3, 0.5):
        p.line((245, 245, 245), 0.04, (x, 0.17), (x + 0.05 + sway, 0.1), (x - 0.02, 0.02))


def bowl(p: Pen, c, rng):
    wide = rng.uniform(0.0, 0.03)
    p.box(tone(c, -0.3), 0.34, 0.86, 0.66, 1.0, 0.03)
    p.half(c, wide, -0.5, 1 - wide, 0.95, 0, 180)
    p.half(tone(c, -0.15), wide, -0.5, 1 - wide, 0.95, 30, 100)
    p.oval(tone(c, 0.25), wide, 0.02, 1 - wide, 0.42)
    p.oval(tone(c, -0.4), 0.07, 0.08, 0.93, 0.37)


def banana(p: Pen, c, rng):
    yellow, bend = (250, 215, 55), rng.uniform(-0.04, 0.04)
    angles = [math.radians(a) for a in range(5, 176, 10)]
    outer = [(0.5 + 0.5 * math.cos(a), 0.05 + 0.92 * math.sin(a)) for a in angles]
    middle = [(0.5 + 0.48 * math.cos(a), 0.06 + (0.68 + bend) * math.sin(a)) for a in reversed(angles)]
    inner = [(0.5 + 0.42 * math.cos(a), 0.05 + (0.42 + bend) * math.sin(a)) for a in reversed(angles)]
    p.poly(yellow, *outer, *inner)
    p.poly(tone(yellow, -0.17), *outer, *middle)
    p.poly((110, 80, 40), (0.0, 0.12), (0.02, -0.04), (0.1, -0.04), (0.1, 0.14))
    p.disc((110, 80, 40), 0.97, 0.12, 0.04)


def oven(p: Pen, c, rng):
    body = (226, 230, 235)
    p.box(DARK, 0.06, 0.92, 0.94, 1.0)
    p.box(body, 0.0, 0.04, 1.0, 0.95, 0.05)
    p.box((70, 75, 85), 0.0, 0.0, 1.0, 0.07, 0.03)
    p.box((175, 182, 192), 0.0, 0.1, 1.0, 0.26)
    for x in (0.16, 0.39, 0.62, 0.85):
        p.disc((50, 52, 60), x, 0.18, 0.065)
    p.box((120, 126, 136), 0.1, 0.32, 0.9, 0.37, 0.02)
    p.box((45, 40, 45), 0.1, 0.43, 0.9, 0.86, 0.05)
    glow = rng.uniform(0.5, 0.6)
    p.box((225, 110, 40), 0.18, glow, 0.82, 0.8, 0.03)
    p.box((70, 45, 40), 0.18, 0.66, 0.82, 0.69)


def potted_plant(p: Pen, c, rng):
    greens = ((40, 140, 70), (65, 170, 85), (30, 115, 60))
    for i, degrees in enumerate((165, 15, 140, 40, 115, 65, 90)):
        a = math.radians(degrees + rng.uniform(-6, 6))
        x, y = math.cos(a), -math.sin(a)
        reach = 0.42 + 0.1 * (i > 1)
        tip, side = (0.5 + reach * x * 0.95, 0.62 + reach * 1.12 * y), 0.12
        middle = (0.5 + reach * x * 0.55, 0.62 + reach * 0.6 * y)
        p.poly(
            greens[i % 3],
            (0.5, 0.66),
            (middle[0] - y * side, middle[1] + x * side * 0.7),
            tip,
            (middle[0] + y * side, middle[1] - x * side * 0.7),
        )
    pot = (205, 105, 65)
    p.poly(pot, (0.22, 0.66), (0.78, 0.66), (0.7, 1.0), (0.3, 1.0))
    p.poly(tone(pot, -0.2), (0.6, 0.66), (0.78, 0.66), (0.7, 1.0), (0.58, 1.0))
    p.box(tone(pot, 0.15), 0.18, 0.62, 0.82, 0.72, 0.03)


def teddy_bear(p: Pen, c, rng):
    """Sitting, seen from the front: round ears, soles of both feet, red bow tie."""
    fur, light, arm = (212, 160, 100), (245, 218, 175), rng.uniform(-0.03, 0.03)
    for side in (-1, 1):
        x = 0.5 + side * 0.3
        p.disc(fur, x, 0.1, 0.15)
        p.disc(PINK, x, 0.1, 0.08)
        p.line(tone(fur, -0.12), 0.2, (0.5 + side * 0.25, 0.55), (0.5 + side * 0.38, 0.68 + arm))
    p.oval(fur, 0.2, 0.45, 0.8, 0.97)
    p.oval(light, 0.32, 0.56, 0.68, 0.9)
    for side in (-1, 1):
        p.disc(tone(fur, -0.12), 0.5 + side * 0.32, 0.86, 0.18)
        p.disc(light, 0.5 + side * 0.32, 0.86, 0.11)
    p.oval(fur, 0.13, 0.05, 0.87, 0.54)
    p.oval(light, 0.3, 0.29, 0.7, 0.52)
    p.oval((60, 40, 35), 0.42, 0.3, 0.58, 0.38)
    for x in (0.33, 0.67):
        p.disc((40, 30, 30), x, 0.25, 0.05)
    for side in (-1, 1):
        p.poly((215, 45, 60), (0.5, 0.56), (0.5 + side * 0.22, 0.5), (0.5 + side * 0.22, 0.63))
    p.disc((170, 30, 45), 0.5, 0.56, 0.06)


# Drawing function, width and height in slots; the sizes are part of what tells small things from large ones.
FIGURES = {
    "person": (person, 0.56, 1.0),
    "car": (car, 1.0, 0.56),
    "bicycle": (bicycle, 1.0, 0.66),
    "traffic light": (traffic_light, 0.46, 1.0),
    "dog": (dog, 0.95, 0.76),
    "cat": (cat, 0.74, 0.82),
    "bird": (bird, 0.86, 0.62),
    "cow": (cow, 1.04, 0.72),
    "sheep": (sheep, 0.98, 0.66),
    "boat": (boat, 0.98, 0.88),
    "umbrella": (umbrella, 1.0, 0.9),
    "kite": (kite, 0.84, 1.0),
    "bench": (bench, 1.02, 0.6),
    "chair": (chair, 0.68, 0.96),
    "couch": (couch, 1.04, 0.6),
    "bed": (bed, 1.06, 0.6),
    "tv": (tv, 1.0, 0.74),
    "laptop": (laptop, 1.0, 0.62),
    "book": (book, 0.7, 0.74),
    "clock": (clock, 0.84, 0.616),
    "cup": (cup, 0.74, 0.66),
    "bowl": (bowl, 0.96, 0.46),
    "banana": (banana, 0.96, 0.46),
    "oven": (oven, 0.86, 0.88),
    "potted plant": (potted_plant, 0.9, 0.96),
    "teddy bear": (teddy_bear, 0.82, 0.82),
}
HANGING = ("clock", "kite")


def wander(c: Colour, rng, by: int = 8) -> Colour:
    """`c` with every channel moved a little."""
    return tuple(min(255, v + rng.randint(-by, by)) for v in c)


def indoors(p: Pen, rng, wall: Colour, floor: Colour, skirting: Colour) -> float:
    """A wall above a floor; the height at which they meet."""
    edge, floor = 0.42 + rng.uniform(-0.03, 0.03), wander(floor, rng)
    wall = wander(wall, rng)
    p.fade(tone(wall, 0.2), wall, 0, edge)
    p.fade(tone(floor, -0.12), tone(floor, 0.1), edge, 1)
    p.box(skirting, 0, edge - 0.025, 1, edge)
    return edge


def kitchen(p: Pen, rng):
    edge = indoors(p, rng, (196, 220, 216), (226, 208, 184), (176, 146, 116))
    for i in range(1, 9):
        p.line((222, 236, 233), 0.005, (i / 9, 0), (i / 9, edge - 0.03))
    for i in range(1, 4):
        p.line((222, 236, 233), 0.005, (0, edge * i / 4), (1, edge * i / 4))
    p.box((196, 166, 134), 0, edge - 0.03, 1, edge + 0.02)
    for i in range(-3, 4):
        p.line((210, 191, 166), 0.006, (0.5 + i * 0.12, edge + 0.02), (0.5 + i * 0.32, 1))
    for y in (0.56, 0.74, 0.95):
        p.line((210, 191, 166), 0.006, (0, y), (1, y))


def street(p: Pen, rng):
    p.fade((190, 214, 232), (226, 232, 232), 0, 0.4)
    x, edge = -rng.uniform(0, 0.1), 0.4 + rng.uniform(-0.03, 0.03)
    while x < 1:
        wide, top = rng.uniform(0.16, 0.26), rng.uniform(0.03, 0.16)
        wall = wander(rng.choice(((214, 196, 184), (198, 204, 214), (222, 210, 186))), rng)
        p.box(wall, x, top, x + wide, edge)
        for i in range(3):
            for y in (top + 0.04, top + 0.13, top + 0.22):
                left = x + wide * (0.12 + 0.3 * i)
                p.box(tone(wall, -0.13), left, y, left + wide * 0.16, min(y + 0.05, edge))
        x += wide
    p.box((206, 202, 196), 0, edge, 1, edge + 0.13)
    p.box((178, 175, 172), 0, edge + 0.11, 1, edge + 0.13)
    p.fade((142, 146, 154), (160, 163, 170), edge + 0.13, 1)
    start = rng.uniform(-0.2, 0)
    for i in range(5):
        left = start + i * 0.3
        p.poly((214, 213, 206), (left, 0.74), (left + 0.16, 0.74), (left + 0.15, 0.765), (left - 0.01, 0.765))


def beach(p: Pen, rng):
    sea = 0.22 + rng.uniform(-0.03, 0.03)
    p.fade((168, 212, 238), (224, 240, 244), 0, sea)
    clouds(p, rng)
    p.fade((92, 172, 196), (150, 212, 216), sea, 0.48)
    for _ in range(7):
        x, y = rng.uniform(-0.1, 0.9), rng.uniform(sea + 0.02, 0.42)
        p.box((178, 224, 228), x, y, x + 0.15, y + 0.008)
    p.fade((240, 224, 186), (230, 206, 160), 0.46, 1)
    for i in range(7):
        p.oval((236, 244, 236), i / 6 - 0.1, 0.445 + rng.uniform(-0.01, 0.01), i / 6 + 0.1, 0.485)
    dots(p, rng, (214, 188, 142), 0.54)


def farm(p: Pen, rng):
    p.fade((176, 214, 240), (232, 242, 240), 0, 0.36)
    clouds(p, rng)
    shift = rng.uniform(-0.15, 0.15)
    p.oval((176, 204, 148), -0.4 + shift, 0.22, 0.7 + shift, 0.9)
    p.oval((160, 194, 134), 0.3 + shift, 0.25, 1.5 + shift, 0.9)
    p.fade((164, 198, 122), (140, 182, 100), 0.4, 1)
    for i in range(-4, 5):
        p.line((152, 184, 110), 0.012, (0.5 + i * 0.1, 0.42), (0.5 + i * 0.34, 1))
    for y in (0.355, 0.405):
        p.box((222, 206, 180), 0, y, 1, y + 0.014)
    start = rng.uniform(0, 0.1)
    for i in range(8):
        p.box((222, 206, 180), start + i * 0.13, 0.33, start + i * 0.13 + 0.02, 0.45)


def bedroom(p: Pen, rng):
    edge = indoors(p, rng, (222, 206, 222), (208, 182, 154), (244, 240, 238))
    for i in range(12):
        p.box((230, 217, 231), i / 12, 0, i / 12 + 0.035, edge - 0.025)
    planks(p, rng, edge, (196, 168, 138))
    p.oval((232, 212, 216), 0.06, 0.6, 0.94, 0.98)
    p.oval((238, 222, 226), 0.12, 0.64, 0.88, 0.94)


def park(p: Pen, rng):
    p.fade((186, 220, 238), (232, 242, 236), 0, 0.36)
    x = -0.1
    while x < 1.1:
        r = rng.uniform(0.09, 0.14)
        p.box((164, 142, 120), x - 0.012, 0.2, x + 0.012, 0.44)
        p.disc(wander((152, 192, 148), rng), x, 0.2, r)
        p.disc(wander((164, 202, 158), rng), x - 0.02, 0.16, r * 0.7)
        x += rng.uniform(0.2, 0.3)
    p.fade((158, 202, 138), (134, 186, 112), 0.4, 1)
    bend = rng.uniform(-0.15, 0.15)
    p.poly((226, 212, 180), (0.5 + bend, 0.4), (0.58 + bend, 0.4), (0.85 - bend, 1), (0.3 - bend, 1))
    dots(p, rng, (196, 222, 160), 0.48)


def living_room(p: Pen, rng):
    edge = indoors(p, rng, (238, 220, 190), (190, 156, 126), (250, 244, 232))
    for i in range(4):
        x = i / 4 + 0.03
        p.draw.rectangle(p.corners(x, 0.05, x + 0.19, edge - 0.07), None, (226, 206, 174), 3)
    planks(p, rng, edge, (178, 144, 114))
    p.poly((214, 190, 176), (0.16, 0.62), (0.84, 0.62), (0.96, 0.96), (0.04, 0.96))
    p.poly((224, 204, 190), (0.2, 0.65), (0.8, 0.65), (0.9, 0.93), (0.1, 0.93))


def office(p: Pen, rng):
    edge = indoors(p, rng, (214, 220, 226), (160, 172, 184), (240, 242, 244))
    p.box((236, 244, 248), 0, 0.06, 1, edge - 0.1)
    for i in range(9):
        p.box((222, 230, 236), 0, 0.06 + i * 0.03, 1, 0.073 + i * 0.03)
    shift = rng.uniform(-0.08, 0.08)
    for i in range(4):
        p.box((204, 210, 216), shift + i / 3 - 0.01, 0.04, shift + i / 3 + 0.01, edge - 0.08)
    for i in range(-4, 5):
        p.line((150, 162, 174), 0.005, (0.5 + i * 0.13, edge), (0.5 + i * 0.34, 1))
    for y in (0.54, 0.72, 0.93):
        p.line((150, 162, 174), 0.005, (0, y), (1, y))


def clouds(p: Pen, rng):
    for _ in range(2):
        x, y = rng.uniform(0, 0.9), rng.uniform(0.03, 0.1)
        for dx, r in ((0, 0.03), (0.05, 0.045), (0.1, 0.03)):
            p.disc((244, 249, 250), x + dx, y, r)


def dots(p: Pen, rng, fill: Colour, top: float):
    for _ in range(14):
        p.disc(fill, rng.random(), rng.uniform(top, 1), 0.008)


def planks(p: Pen, rng, edge: float, fill: Colour):
    for i in range(1, 6):
        y = edge + (1 - edge) * (i / 6) ** 1.4
        p.line(fill, 0.005, (0, y), (1, y))
        x = rng.random()
        p.line(fill, 0.005, (x, y), (x, edge + (1 - edge) * ((i + 1) / 6) ** 1.4))


BACKDROPS = {
    "kitchen": kitchen,
    "street": street,
    "beach": beach,
    "farm": farm,
    "bedroom": bedroom,
    "park": park,
    "living room": living_room,
    "office": office,
}


def draw(kind: str, things: Sequence[Thing], rng: random.Random, size: int = 144) -> Image.Image:
    """A `size` x `size` RGB picture of `things` before the backdrop `kind`, the same for the same state of `rng`.

    Raises ValueError for a thing whose colour its class does not come in; unknown names are KeyErrors.
    """
    side = 2 * size
    back, layer = Image.new("RGB", (side, side)), Image.new("RGBA", (side, side))
    ground, top = ImageDraw.Draw(back, "RGBA"), ImageDraw.Draw(layer)
    BACKDROPS[kind](Pen(ground, 0, 0, side, side), rng)
    for thing in sorted(things, key=lambda t: (t.row, t.column)):
        if thing.colour not in (CLASSES[thing.name] or (None,)):
            raise ValueError(f"{thing.name}: colour {thing.colour!r}, must be one of {CLASSES[thing.name] or (None,)}")
        figure, wide, high = FIGURES[thing.name]
        scale = 1.0 if thing.count == 1 else min(0.8, 0.6 / wide)
        for copy in range(thing.count):
            k = scale * rng.uniform(0.9, 1.1) * side
            w, h = wide * k * 0.305, high * k * 0.415
            aside, up = ((0, 0), (-0.078, 0.05), (0.078, 0.0))[copy + thing.count - 1]
            x = (thing.column / 3 + 1 / 6 + aside + rng.uniform(-0.015, 0.015)) * side
            y = (0.475 + 0.49 * thing.row - up * (scale < 0.7) - rng.uniform(0, 0.02)) * side
            if thing.name in HANGING:
                y -= (0.43 * side - h) / 2
            else:
                ground.ellipse((x - w * 0.52, y - side * 0.02, x + w * 0.52, y + side * 0.018), (30, 25, 40, 70))
            pen = Pen(top, x - w / 2, y - h, w, h, rng.random() < 0.5, rng.uniform(-0.08, 0.08))
            figure(pen, COLOURS.get(thing.colour), rng)
    back, layer = back.reduce(2), layer.reduce(2)
    mask = layer.getchannel("A")
    back.paste((35, 30, 45), (1, 1), mask.filter(ImageFilter.BoxBlur(1.5)).point([v * 55 // 100 for v in range(256)]))
    back.paste(layer, (0, 0), mask)
    return back
