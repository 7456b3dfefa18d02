"""Draws the toy world's images: eight backdrops, 26 classes of things, 3 x 2 slots."""

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
SCENES: tuple[str, ...] = (
    "kitchen",
    "street",
    "beach",
    "farm",
    "bedroom",
    "park",
    "living room",
    "office",
)
INK, DARK, MILK, PINK, GLASS = (
    (20, 20, 25),
    (48, 48, 58),
    (250, 246, 236),
    (240, 165, 165),
    (190, 225, 240),
)


@dataclass(frozen=True)
class Thing:
    """What stands in one slot."""

    name: str  # class
    colour: str | None
    count: int  # copies: 1 or 2
    column: int  # 0 to 2, left to right
    row: int  # 0: back, 1: front


def tone(c: Colour, by: float) -> Colour:
    """`c` moved towards black (`by` = -1) or white (`by` = 1)."""
    goal = 255 if by > 0 else 0
    return tuple(round(v + (goal - v) * abs(by)) for v in c)


class Pen:
    """Draws into a box of an image, in unit coordinates with (0, 0) at the box's top left.

    Radii and widths are in box widths. Every method takes one fill and any number of shapes. `flip`
    mirrors all shapes; `shade` is a tone() for all fills.
    """

    def __init__(
        self, draw, x: float, y: float, w: float, h: float, flip: bool = False, shade: float = 0.0
    ):
        self.draw, self.x, self.y, self.w, self.h, self.flip, self.shade = (
            draw,
            x,
            y,
            w,
            h,
            flip,
            shade,
        )

    def at(self, points) -> list[tuple[float, float]]:
        """Points in pixels of the image."""
        return [
            (self.x + self.w * (1 - a if self.flip else a), self.y + self.h * b) for a, b in points
        ]

    def corners(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, ...]:
        """A rectangle in pixels, left and right in order also when mirrored."""
        (a, b), (c, d) = self.at(((x0, y0), (x1, y1)))
        return min(a, c), b, max(a, c), d

    def poly(self, fill, *shapes):
        """Polygons: points."""
        for points in shapes:
            self.draw.polygon(self.at(points), tone(fill, self.shade))

    def box(self, fill, *shapes, r: float = 0.0):
        """Rectangles: (x0, y0, x1, y1). r: radius of the corners."""
        for shape in shapes:
            if r:
                self.draw.rounded_rectangle(
                    self.corners(*shape), r * self.w, tone(fill, self.shade)
                )
            else:
                self.draw.rectangle(self.corners(*shape), tone(fill, self.shade))

    def oval(self, fill, *shapes):
        """Ovals: (x0, y0, x1, y1)."""
        for shape in shapes:
            self.draw.ellipse(self.corners(*shape), tone(fill, self.shade))

    def disc(self, fill, *shapes):
        """Circles: (x, y, radius)."""
        for x, y, r in shapes:
            tall = r * self.w / self.h
            self.oval(fill, (x - r, y - tall, x + r, y + tall))

    def line(self, fill, width: float, *shapes):
        """Lines through points, with round joints and ends."""
        wide = max(1, round(width * self.w))
        for points in shapes:
            self.draw.line(self.at(points), tone(fill, self.shade), wide, joint="curve")
            if wide > 3:
                self.disc(fill, *((x, y, width / 2) for x, y in (points[0], points[-1])))

    def arc(self, fill, width: float | None, *shapes):
        """Parts of ovals: (x0, y0, x1, y1, start, end).

        Angles are in degrees, clockwise from the right. Without a width the shape is filled.
        """
        for *shape, start, end in shapes:
            turn = (180 - end, 180 - start) if self.flip else (start, end)
            if width is None:
                self.draw.chord(self.corners(*shape), *turn, tone(fill, self.shade))
            else:
                self.draw.arc(
                    self.corners(*shape),
                    *turn,
                    tone(fill, self.shade),
                    max(1, round(width * self.w)),
                )


# ---- things: p draws into the thing's box, c is the colour if the class has some


def person(p: Pen, c, rng):
    """Skin, shirt and swing of the arms differ."""
    skin = rng.choice(((245, 205, 170), (225, 170, 125), (150, 100, 65)))
    shirt = rng.choice(((30, 150, 160), (235, 120, 130), (110, 120, 200)))
    swing = rng.uniform(0.5, 0.56)
    p.line((55, 65, 100), 0.23, ((0.37, 0.6), (0.34, 0.92)), ((0.63, 0.6), (0.66, 0.92)))
    p.oval(DARK, (0.14, 0.93, 0.46, 1.0), (0.54, 0.93, 0.86, 1.0))
    p.line(tone(shirt, -0.15), 0.17, ((0.24, 0.35), (0.1, swing)), ((0.76, 0.35), (0.9, swing)))
    p.disc(skin, (0.1, swing + 0.04, 0.1), (0.9, swing + 0.04, 0.1))
    p.box(shirt, (0.2, 0.28, 0.8, 0.66), r=0.18)
    p.box(skin, (0.42, 0.22, 0.58, 0.32))
    p.disc(rng.choice(((60, 40, 30), (120, 75, 35), (40, 38, 45))), (0.5, 0.125, 0.29))
    p.disc(skin, (0.5, 0.155, 0.24))
    p.disc(DARK, (0.41, 0.155, 0.035), (0.59, 0.155, 0.035))
    p.arc((170, 70, 70), 0.04, (0.4, 0.14, 0.6, 0.215, 20, 160))


def car(p: Pen, c, rng):
    top = rng.uniform(0.03, 0.09)
    p.poly(c, ((0.14, 0.48), (0.3, top), (0.68, top), (0.84, 0.48)))
    p.poly(GLASS, ((0.24, 0.45), (0.34, 0.15), (0.47, 0.15), (0.47, 0.45)))
    p.poly(GLASS, ((0.53, 0.45), (0.53, 0.15), (0.64, 0.15), (0.74, 0.45)))
    p.box(c, (0.0, 0.42, 1.0, 0.84), r=0.1)
    p.box(tone(c, -0.25), (0.03, 0.7, 0.97, 0.84), r=0.06)
    p.box(tone(c, 0.35), (0.08, 0.46, 0.9, 0.51))
    p.oval((255, 245, 190), (0.92, 0.5, 1.0, 0.64))
    p.disc(DARK, (0.23, 0.82, 0.125), (0.77, 0.82, 0.125))
    p.disc((200, 203, 210), (0.23, 0.82, 0.06), (0.77, 0.82, 0.06))


def bicycle(p: Pen, c, rng):
    frame, rim = (0, 140, 135), rng.uniform(0.37, 0.4)
    p.arc(DARK, 0.05, (0.0, rim, 0.42, 1.0, 0, 360), (0.58, rim, 1.0, 1.0, 0, 360))
    p.line(frame, 0.055, ((0.21, 0.68), (0.36, 0.32), (0.68, 0.3), (0.49, 0.7), (0.21, 0.68)))
    p.line(frame, 0.055, ((0.49, 0.7), (0.33, 0.2)), ((0.79, 0.68), (0.65, 0.1)))
    p.line(DARK, 0.06, ((0.56, 0.13), (0.65, 0.09), (0.76, 0.14)), ((0.25, 0.18), (0.41, 0.18)))
    p.disc(DARK, (0.21, 0.68, 0.04), (0.79, 0.68, 0.04), (0.49, 0.7, 0.06))


def traffic_light(p: Pen, c, rng):
    p.box((95, 98, 108), (0.42, 0.6, 0.58, 1.0), (0.25, 0.95, 0.75, 1.0))
    p.box((38, 42, 50), (0.1, 0.0, 0.9, 0.72), r=0.18)
    lit = rng.randrange(3)
    for i, lamp in enumerate(((255, 60, 50), (255, 205, 40), (60, 215, 95))):
        p.disc(lamp if i == lit else tone(lamp, -0.2), (0.5, 0.13 + 0.23 * i, 0.25))
        p.disc(tone(lamp, 0.5), (0.42, 0.1 + 0.23 * i, 0.07))


def dog(p: Pen, c, rng):
    """From the side: tail up, long snout, hanging ear."""
    dark = tone(c, -0.3 if sum(c) > 200 else -0.5)
    p.line(c, 0.08, ((0.12, 0.52), (0.03, 0.3), (rng.uniform(0.03, 0.13), 0.12)))
    p.line(dark, 0.1, ((0.28, 0.65), (0.29, 0.94)), ((0.66, 0.65), (0.67, 0.94)))
    p.box(c, (0.08, 0.42, 0.72, 0.76), r=0.16)
    p.line(c, 0.11, ((0.15, 0.65), (0.15, 0.94)), ((0.62, 0.65), (0.62, 0.94)))
    p.poly(c, ((0.48, 0.5), (0.58, 0.2), (0.8, 0.3), (0.72, 0.62)))
    p.disc(c, (0.68, 0.24, 0.19))
    p.box(c, (0.68, 0.22, 1.0, 0.42), r=0.09)
    p.line((215, 45, 60), 0.06, ((0.52, 0.44), (0.72, 0.52)))
    p.box(dark, (0.5, 0.1, 0.64, 0.44), r=0.07)
    p.oval(PINK, (0.82, 0.39, 0.91, 0.52))
    p.disc(MILK, (0.75, 0.2, 0.05))
    p.disc(INK, (0.76, 0.2, 0.035), (0.96, 0.25, 0.055))


def cat(p: Pen, c, rng):
    """Sitting, from the front: big pointed ears, whiskers, tail curled up at its side."""
    p.arc(c, 0.12, (0.6, rng.uniform(0.44, 0.52), 1.0, 0.98, -80, 130))
    p.oval(c, (0.16, 0.42, 0.8, 1.02))
    p.oval(tone(c, 0.45), (0.34, 0.56, 0.62, 0.92))
    p.oval(tone(c, 0.2), (0.24, 0.88, 0.48, 1.0), (0.48, 0.88, 0.72, 1.0))
    p.poly(c, ((0.12, 0.0), (0.1, 0.32), (0.46, 0.16)), ((0.84, 0.0), (0.86, 0.32), (0.5, 0.16)))
    p.poly(
        PINK, ((0.17, 0.07), (0.16, 0.24), (0.35, 0.17)), ((0.79, 0.07), (0.8, 0.24), (0.61, 0.17))
    )
    p.oval(c, (0.09, 0.12, 0.87, 0.56))
    p.line(tone(c, -0.3), 0.05, *(((x, 0.13), (x, 0.21)) for x in (0.39, 0.48, 0.57)))
    p.oval((200, 235, 90), (0.21, 0.25, 0.39, 0.38), (0.57, 0.25, 0.75, 0.38))
    p.oval(INK, (0.27, 0.26, 0.33, 0.37), (0.63, 0.26, 0.69, 0.37))
    p.line(
        MILK,
        0.025,
        *(((0.48 + s * 0.18, 0.42), (0.48 + s * 0.48, y)) for s in (-1, 1) for y in (0.4, 0.46)),
    )
    p.poly(PINK, ((0.42, 0.39), (0.54, 0.39), (0.48, 0.45)))


def bird(p: Pen, c, rng):
    lift = rng.uniform(0.24, 0.36)
    p.line(
        (215, 120, 30), 0.04, *(((x, 0.8), (x + 0.02, 0.98), (x + 0.1, 0.98)) for x in (0.47, 0.57))
    )
    p.poly(tone(c, -0.3), ((0.0, 0.42), (0.05, 0.66), (0.4, 0.68), (0.3, 0.45)))
    p.oval(c, (0.16, 0.3, 0.82, 0.88))
    p.poly((245, 145, 30), ((0.84, 0.18), (1.0, 0.28), (0.84, 0.36)))
    p.disc(c, (0.7, 0.26, 0.2))
    p.arc(tone(c, 0.55), None, (0.36, 0.45, 0.8, 0.88, -20, 140))
    p.poly(tone(c, -0.3), ((0.12, lift), (0.6, 0.42), (0.56, 0.62), (0.34, 0.68)))
    p.disc(MILK, (0.75, 0.22, 0.06))
    p.disc(INK, (0.765, 0.22, 0.04))


def cow(p: Pen, c, rng):
    """From the side: a long white-patched barrel on four legs, a horned head with a pink muzzle."""
    dx, legs = rng.uniform(-0.04, 0.04), (0.14, 0.27, 0.53, 0.66)
    p.line(c, 0.04, ((0.05, 0.3), (0.01, 0.5), (0.03, 0.66)))
    p.box(tone(c, -0.2), *((x - 0.045, 0.6, x + 0.045, 0.92) for x in legs))
    p.box((60, 50, 45), *((x - 0.045, 0.91, x + 0.045, 1.0) for x in legs))
    p.oval(PINK, (0.34, 0.62, 0.5, 0.82))
    p.box(c, (0.03, 0.22, 0.76, 0.74), r=0.14)
    p.oval(MILK, (0.1 + dx, 0.24, 0.34 + dx, 0.55), (0.42 + dx, 0.4, 0.62 + dx, 0.7))
    p.poly(
        (240, 225, 180),
        *(((0.8 + s * 0.06, 0.14), (0.8 + s * 0.17, 0), (0.8 + s * 0.13, 0.16)) for s in (-1, 1)),
    )
    p.oval(tone(c, -0.2), (0.59, 0.15, 0.73, 0.27), (0.87, 0.15, 1.01, 0.27))
    p.box(c, (0.67, 0.08, 0.93, 0.56), r=0.1)
    p.box(MILK, (0.77, 0.1, 0.83, 0.4))
    p.oval(PINK, (0.64, 0.38, 0.96, 0.62))
    p.disc(MILK, (0.73, 0.27, 0.045), (0.87, 0.27, 0.045))
    p.disc(INK, (0.73, 0.27, 0.03), (0.87, 0.27, 0.03), (0.74, 0.5, 0.025), (0.86, 0.5, 0.025))


def sheep(p: Pen, c, rng):
    wool, face = (246, 243, 234), (70, 62, 66)
    p.line(face, 0.08, *(((x, 0.7), (x, 0.96)) for x in (0.22, 0.36, 0.56, 0.7)))
    turn = rng.uniform(0, 0.7)
    puffs = [
        (0.42 + 0.3 * math.cos(i * 0.7 + turn), 0.46 + 0.26 * math.sin(i * 0.7 + turn))
        for i in range(9)
    ]
    p.disc(tone(wool, -0.12), *((x, y + 0.03, 0.135) for x, y in puffs))
    p.disc(wool, *((x, y, 0.13) for x, y in puffs))
    p.oval(wool, (0.15, 0.25, 0.7, 0.72))
    curls = ((0.22, 0.34), (0.42, 0.28), (0.34, 0.5))
    p.arc(tone(wool, -0.2), 0.03, *((x, y, x + 0.16, y + 0.16, 20, 200) for x, y in curls))
    p.oval(face, (0.6, 0.3, 0.76, 0.42), (0.68, 0.22, 0.98, 0.7))
    p.disc(wool, (0.77, 0.22, 0.1), (0.87, 0.24, 0.07), (0.85, 0.42, 0.045))
    p.disc(INK, (0.86, 0.42, 0.025))


def boat(p: Pen, c, rng):
    top = rng.uniform(0.0, 0.06)
    p.box((120, 80, 50), (0.47, top, 0.51, 0.72))
    p.poly(tone(c, 0.1), ((0.53, top + 0.02), (0.53, 0.66), (0.95, 0.66)))
    p.poly(tone(c, -0.12), ((0.53, 0.5), (0.53, 0.66), (0.95, 0.66), (0.84, 0.5)))
    p.poly((255, 250, 235), ((0.45, top + 0.1), (0.45, 0.66), (0.1, 0.66)))
    p.poly(c, ((0.0, 0.71), (1.0, 0.71), (0.82, 1.0), (0.18, 1.0)))
    p.poly(tone(c, -0.3), ((0.1, 0.87), (0.9, 0.87), (0.82, 1.0), (0.18, 1.0)))
    p.box((70, 60, 70), (0.0, 0.7, 1.0, 0.745))


def umbrella(p: Pen, c, rng):
    wood, light = (110, 75, 50), tone(c, 0.3)
    p.line(wood, 0.05, ((0.5, 0.0), (0.5, 0.88)))
    p.arc(wood, 0.05, (0.5, 0.8, 0.7, 1.0, 0, 180))
    p.arc(c, None, (0.0, 0.04, 1.0, 0.98, 180, 360))
    p.arc(light, None, (0.3, 0.04, 0.7, 0.98, 180, 360))
    p.arc(tone(c, -0.25), None, (0.0, 0.04, 1.0, 0.98, 180, rng.uniform(200, 210)))
    p.oval(c, (0.0, 0.44, 0.25, 0.6), (0.75, 0.44, 1.0, 0.6))
    p.oval(light, (0.25, 0.44, 0.5, 0.6), (0.5, 0.44, 0.75, 0.6))


def kite(p: Pen, c, rng):
    x = 0.5 + rng.uniform(-0.06, 0.06)
    p.line((90, 90, 100), 0.025, ((0.5, 0.68), (0.36, 0.8), (0.5, 0.9), (0.38, 1.0)))
    p.poly(c, ((x, 0.0), (1.0, 0.28), (0.5, 0.72), (0.0, 0.28)))
    p.poly(
        tone(c, 0.4), ((x, 0.0), (0.0, 0.28), (0.5, 0.28)), ((1.0, 0.28), (0.5, 0.72), (0.5, 0.28))
    )
    for a, b in ((0.38, 0.8), (0.48, 0.91)):
        p.poly(
            (250, 205, 40), *(((a + s, b - 0.05), (a, b), (a + s, b + 0.05)) for s in (-0.14, 0.14))
        )


def bench(p: Pen, c, rng):
    gap = rng.uniform(-0.01, 0.01)
    p.box(
        DARK,
        (0.1, 0.05, 0.18, 1.0),
        (0.82, 0.05, 0.9, 1.0),
        (0.04, 0.94, 0.24, 1.0),
        (0.76, 0.94, 0.96, 1.0),
    )
    p.box(c, *((0.0, y + gap, 1.0, y + 0.14 + gap) for y in (0.0, 0.2, 0.4)), r=0.02)
    p.box(tone(c, 0.2), *((0.0, y + gap, 1.0, y + 0.04 + gap) for y in (0.0, 0.2, 0.4, 0.6)))
    p.box(tone(c, -0.2), (0.0, 0.64, 1.0, 0.78), r=0.02)


def chair(p: Pen, c, rng):
    """Three-quarter view: tall back on one side, seat, four legs."""
    seat = 0.56 + rng.uniform(-0.02, 0.02)
    p.box(tone(c, -0.3), (0.3, seat, 0.4, 0.9), (0.78, seat, 0.88, 0.9))
    p.box(c, (0.04, 0.02, 0.16, 1.0))
    p.poly(c, ((0.04, 0.0), (0.42, 0.08), (0.42, seat), (0.04, seat + 0.08)))
    p.poly(tone(c, 0.3), ((0.15, 0.08), (0.35, 0.13), (0.35, 0.4), (0.15, 0.43)))
    p.poly(
        tone(c, 0.15),
        ((0.06, seat + 0.1), (0.36, seat - 0.03), (1.0, seat - 0.03), (0.86, seat + 0.1)),
    )
    p.box(tone(c, -0.15), (0.06, seat + 0.1, 0.87, seat + 0.17))
    p.box(c, (0.75, seat + 0.1, 0.87, 1.0))


def couch(p: Pen, c, rng):
    mid = 0.5 + rng.uniform(-0.03, 0.03)
    p.box((90, 60, 40), (0.1, 0.88, 0.16, 1.0), (0.84, 0.88, 0.9, 1.0))
    p.box(tone(c, -0.12), (0.08, 0.0, 0.92, 0.7), r=0.1)
    p.box(c, (0.13, 0.06, mid - 0.01, 0.55), (mid + 0.01, 0.06, 0.87, 0.55), r=0.05)
    p.box(tone(c, 0.25), (0.12, 0.48, mid - 0.01, 0.72), (mid + 0.01, 0.48, 0.88, 0.72), r=0.05)
    p.box(tone(c, -0.25), (0.05, 0.7, 0.95, 0.92), r=0.04)
    p.box(c, (0.0, 0.32, 0.16, 0.92), (0.84, 0.32, 1.0, 0.92), r=0.07)
    p.box(tone(c, 0.2), (0.02, 0.34, 0.14, 0.42), (0.86, 0.34, 0.98, 0.42), r=0.03)


def bed(p: Pen, c, rng):
    wood, fold = (165, 112, 70), 0.38 + rng.uniform(-0.03, 0.03)
    p.box(tone(wood, -0.2), (0.05, 0.78, 0.95, 0.9))
    p.box(wood, (0.0, 0.0, 0.09, 1.0), (0.92, 0.36, 1.0, 1.0), r=0.03)
    p.box((248, 246, 240), (0.09, 0.5, 0.93, 0.8), r=0.04)
    p.box((215, 220, 230), (0.1, 0.26, 0.37, 0.56), r=0.08)
    p.box((255, 255, 255), (0.1, 0.26, 0.37, 0.51), r=0.08)
    p.box(c, (fold, 0.36, 0.94, 0.84), r=0.05)
    p.box(tone(c, 0.4), (fold, 0.38, fold + 0.1, 0.84))
    p.box(tone(c, -0.2), (fold, 0.74, 0.94, 0.84))


def tv(p: Pen, c, rng):
    x = rng.uniform(0.15, 0.4)
    p.line((70, 70, 80), 0.03, ((0.3, 0.02), (0.5, 0.24), (0.7, 0.02)))
    p.line((70, 70, 80), 0.05, ((0.2, 0.88), (0.17, 0.97)), ((0.8, 0.88), (0.83, 0.97)))
    p.box((45, 42, 50), (0.0, 0.2, 1.0, 0.92), r=0.06)
    p.box((62, 84, 120), (0.06, 0.27, 0.94, 0.84), r=0.03)
    p.poly((110, 140, 180), ((x, 0.83), (x + 0.25, 0.28), (x + 0.45, 0.28), (x + 0.2, 0.83)))


def laptop(p: Pen, c, rng):
    silver, end = (205, 210, 218), rng.uniform(0.5, 0.75)
    p.box(tone(silver, -0.25), (0.13, 0.0, 0.87, 0.7), r=0.05)
    p.box((110, 200, 235), (0.18, 0.06, 0.82, 0.64))
    p.box(
        (245, 250, 252), (0.25, 0.17, end, 0.25), (0.25, 0.32, 0.75, 0.39), (0.25, 0.46, 0.6, 0.53)
    )
    p.poly(silver, ((0.12, 0.7), (0.88, 0.7), (1.0, 0.93), (0.0, 0.93)))
    p.poly((90, 95, 105), ((0.18, 0.73), (0.82, 0.73), (0.88, 0.84), (0.12, 0.84)))
    p.box(tone(silver, -0.35), (0.0, 0.93, 1.0, 1.0), r=0.03)


def book(p: Pen, c, rng):
    """Closed, standing: coloured cover, a strip of white pages on one side."""
    top = rng.uniform(0.0, 0.04)
    p.poly(
        tone(c, -0.35), ((0.0, 0.1), (0.2, 0.02), (1.0, 0.06), (1.0, 0.95), (0.2, 1.0), (0.0, 0.92))
    )
    p.poly((252, 248, 235), ((0.84, 0.09), (0.97, 0.1), (0.97, 0.9), (0.84, 0.92)))
    p.poly(c, ((0.16, top), (0.86, 0.02), (0.86, 0.94), (0.16, 0.98)))
    p.box((252, 240, 200), (0.3, 0.2, 0.74, 0.3), (0.38, 0.36, 0.66, 0.41))
    p.line(tone(c, 0.35), 0.03, ((0.22, 0.06), (0.22, 0.93)))


def clock(p: Pen, c, rng):
    p.disc((38, 52, 92), (0.5, 0.5, 0.5))
    p.disc((253, 252, 246), (0.5, 0.5, 0.4))
    around = [(math.cos(i * math.tau / 12), math.sin(i * math.tau / 12)) for i in range(12)]
    p.line(
        DARK,
        0.035,
        *(((0.5 + x * 0.3, 0.5 + y * 0.3), (0.5 + x * 0.36, 0.5 + y * 0.36)) for x, y in around),
    )
    for reach, (x, y) in zip((0.18, 0.28), rng.sample(around, 2), strict=True):
        p.line(DARK, 0.05, ((0.5, 0.5), (0.5 + reach * x, 0.5 + reach * y)))
    p.disc((215, 50, 50), (0.5, 0.5, 0.05))


def cup(p: Pen, c, rng):
    sway = rng.uniform(-0.03, 0.03)
    p.arc(tone(c, -0.15), 0.1, (0.56, 0.36, 1.0, 0.8, -110, 110))
    p.box(c, (0.05, 0.28, 0.74, 0.9))
    p.oval(c, (0.05, 0.78, 0.74, 1.0))
    p.box(tone(c, 0.3), (0.13, 0.4, 0.22, 0.86), r=0.04)
    p.oval(tone(c, 0.35), (0.05, 0.2, 0.74, 0.38))
    p.oval((90, 55, 35), (0.11, 0.23, 0.68, 0.36))
    p.line(
        (245, 245, 245),
        0.04,
        *(((x, 0.17), (x + 0.05 + sway, 0.1), (x - 0.02, 0.02)) for x in (0.3, 0.5)),
    )


def bowl(p: Pen, c, rng):
    foot = rng.uniform(0.3, 0.36)
    p.box(tone(c, -0.3), (foot, 0.86, 1 - foot, 1.0), r=0.03)
    p.arc(c, None, (0.0, -0.5, 1.0, 0.95, 0, 180))
    p.arc(tone(c, -0.15), None, (0.0, -0.5, 1.0, 0.95, 30, 100))
    p.oval(tone(c, 0.25), (0.0, 0.02, 1.0, 0.42))
    p.oval(tone(c, -0.4), (0.07, 0.08, 0.93, 0.37))


def banana(p: Pen, c, rng):
    yellow, stem, bend = (250, 215, 55), (110, 80, 40), rng.uniform(0.38, 0.46)
    angles = [math.radians(a) for a in range(5, 176, 10)]
    outer, ridge, inner = (
        [(0.5 + wide * math.cos(a), 0.05 + high * math.sin(a)) for a in angles]
        for wide, high in ((0.5, 0.92), (0.48, bend + 0.27), (0.42, bend))
    )
    p.poly(yellow, outer + inner[::-1])
    p.poly(tone(yellow, -0.17), outer + ridge[::-1])
    p.poly(stem, ((0.0, 0.12), (0.02, -0.04), (0.1, -0.04), (0.1, 0.14)))
    p.disc(stem, (0.97, 0.12, 0.04))


def oven(p: Pen, c, rng):
    p.box(DARK, (0.06, 0.92, 0.94, 1.0))
    p.box((226, 230, 235), (0.0, 0.04, 1.0, 0.95), r=0.05)
    p.box((70, 75, 85), (0.0, 0.0, 1.0, 0.07), r=0.03)
    p.box((175, 182, 192), (0.0, 0.1, 1.0, 0.26))
    p.disc((50, 52, 60), *((x, 0.18, 0.065) for x in (0.16, 0.39, 0.62, 0.85)))
    p.box((120, 126, 136), (0.1, 0.32, 0.9, 0.37), r=0.02)
    p.box((45, 40, 45), (0.1, 0.43, 0.9, 0.86), r=0.05)
    p.box((225, 110, 40), (0.18, rng.uniform(0.5, 0.6), 0.82, 0.8), r=0.03)
    p.box((70, 45, 40), (0.18, 0.66, 0.82, 0.69))


def potted_plant(p: Pen, c, rng):
    pot, greens = (205, 105, 65), ((40, 140, 70), (65, 170, 85), (30, 115, 60))
    for i, degrees in enumerate((165, 15, 140, 40, 115, 65, 90)):
        a, reach = math.radians(degrees + rng.uniform(-6, 6)), 0.42 + 0.1 * (i > 1)
        x, y = reach * math.cos(a), -1.15 * reach * math.sin(a)
        u, v = 0.5 + 0.55 * x, 0.62 + 0.55 * y
        p.poly(
            greens[i % 3],
            ((0.5, 0.66), (u - y / 5, v + x / 6), (0.5 + x, 0.62 + y), (u + y / 5, v - x / 6)),
        )
    p.poly(pot, ((0.22, 0.66), (0.78, 0.66), (0.7, 1.0), (0.3, 1.0)))
    p.poly(tone(pot, -0.2), ((0.6, 0.66), (0.78, 0.66), (0.7, 1.0), (0.58, 1.0)))
    p.box(tone(pot, 0.15), (0.18, 0.62, 0.82, 0.72), r=0.03)


def teddy_bear(p: Pen, c, rng):
    """Sitting, from the front: round ears, pale muzzle, belly and soles, red bow tie."""
    fur, light, hand = (212, 160, 100), (245, 218, 175), rng.uniform(0.65, 0.71)
    p.disc(fur, (0.2, 0.12, 0.15), (0.8, 0.12, 0.15))
    p.disc(PINK, (0.2, 0.12, 0.08), (0.8, 0.12, 0.08))
    p.line(tone(fur, -0.12), 0.2, ((0.25, 0.55), (0.12, hand)), ((0.75, 0.55), (0.88, hand)))
    p.oval(fur, (0.2, 0.45, 0.8, 0.97))
    p.oval(light, (0.32, 0.56, 0.68, 0.9))
    p.disc(tone(fur, -0.12), (0.18, 0.85, 0.18), (0.82, 0.85, 0.18))
    p.disc(light, (0.18, 0.85, 0.11), (0.82, 0.85, 0.11))
    p.oval(fur, (0.13, 0.05, 0.87, 0.54))
    p.oval(light, (0.3, 0.29, 0.7, 0.52))
    p.oval(DARK, (0.42, 0.3, 0.58, 0.38), (0.28, 0.2, 0.38, 0.29), (0.62, 0.2, 0.72, 0.29))
    p.poly(
        (215, 45, 60),
        ((0.5, 0.56), (0.28, 0.5), (0.28, 0.63)),
        ((0.5, 0.56), (0.72, 0.5), (0.72, 0.63)),
    )


# class -> function that draws it, width and height in slots, colours. Sizes help to distinguish
# things.
FIGURES = {
    "person": (person, 0.56, 1.0, ()),
    "car": (car, 0.98, 0.56, ("red", "blue", "yellow")),
    "bicycle": (bicycle, 0.98, 0.66, ()),
    "traffic light": (traffic_light, 0.46, 1.0, ()),
    "dog": (dog, 0.94, 0.76, ("brown", "white", "black")),
    "cat": (cat, 0.76, 0.84, ("gray", "orange", "black")),
    "bird": (bird, 0.88, 0.64, ("blue", "red", "yellow")),
    "cow": (cow, 1.0, 0.72, ("brown", "black")),
    "sheep": (sheep, 0.98, 0.66, ()),
    "boat": (boat, 0.98, 0.88, ("red", "blue", "white")),
    "umbrella": (umbrella, 1.0, 0.9, ("red", "blue", "yellow", "purple")),
    "kite": (kite, 0.84, 1.0, ("red", "green", "purple")),
    "bench": (bench, 1.0, 0.6, ("brown", "green")),
    "chair": (chair, 0.7, 0.96, ("red", "blue", "brown")),
    "couch": (couch, 1.0, 0.62, ("green", "red", "gray")),
    "bed": (bed, 1.0, 0.62, ("blue", "purple", "green")),
    "tv": (tv, 0.98, 0.74, ()),
    "laptop": (laptop, 0.98, 0.62, ()),
    "book": (book, 0.7, 0.74, ("red", "blue", "green")),
    "clock": (clock, 0.86, 0.63, ()),
    "cup": (cup, 0.78, 0.68, ("red", "blue", "yellow")),
    "bowl": (bowl, 0.98, 0.5, ("blue", "orange", "white")),
    "banana": (banana, 0.98, 0.5, ()),
    "oven": (oven, 0.86, 0.88, ()),
    "potted plant": (potted_plant, 0.84, 0.98, ()),
    "teddy bear": (teddy_bear, 0.84, 0.82, ()),
}
CLASSES: dict[str, tuple[str, ...]] = {name: colours for name, (*_, colours) in FIGURES.items()}
HANGING = ("clock", "kite")


# ---- backdrops


def fade(p: Pen, top: Colour, bottom: Colour, y0: float, y1: float):
    """A vertical gradient across the whole box."""
    for i in range(10):
        c = tuple(round(a + (b - a) * i / 9) for a, b in zip(top, bottom, strict=True))
        p.box(c, (0, y0 + (y1 - y0) * i / 10, 1, y0 + (y1 - y0) * (i + 1) / 10))


def wander(c: Colour, rng) -> Colour:
    """A colour close to `c`."""
    return tuple(min(255, v + rng.randint(-7, 7)) for v in c)


def sky(p: Pen, rng, clouds: int):
    fade(p, wander((172, 213, 238), rng), (232, 242, 240), 0, 0.42)
    for x, y in ((rng.uniform(0, 0.9), rng.uniform(0.04, 0.1)) for _ in range(clouds)):
        p.disc((246, 250, 251), (x, y, 0.03), (x + 0.05, y, 0.045), (x + 0.1, y, 0.03))


def indoors(p: Pen, rng, wall: Colour, floor: Colour, skirting: Colour) -> float:
    """A wall above a floor -> the height at which they meet."""
    edge, wall, floor = 0.42 + rng.uniform(-0.03, 0.03), wander(wall, rng), wander(floor, rng)
    fade(p, tone(wall, 0.2), wall, 0, edge)
    fade(p, tone(floor, -0.1), tone(floor, 0.1), edge, 1)
    p.box(skirting, (0, edge - 0.025, 1, edge))
    return edge


def tiles(p: Pen, fill: Colour, edge: float):
    p.line(fill, 0.006, *(((0.5 + i * 0.13, edge), (0.5 + i * 0.34, 1)) for i in range(-4, 5)))
    p.line(fill, 0.006, *(((0, y), (1, y)) for y in (0.55, 0.73, 0.94)))


def planks(p: Pen, rng, fill: Colour, edge: float):
    for i in range(1, 6):
        y, below, x = edge + 0.58 * (i / 6) ** 1.4, edge + 0.58 * ((i + 1) / 6) ** 1.4, rng.random()
        p.line(fill, 0.005, ((0, y), (1, y)), ((x, y), (x, below)))


def kitchen(p: Pen, rng):
    edge = indoors(p, rng, (196, 220, 216), (226, 208, 184), (176, 146, 116))
    p.line((222, 236, 233), 0.005, *(((i / 9, 0), (i / 9, edge - 0.03)) for i in range(1, 9)))
    p.line((222, 236, 233), 0.005, *(((0, edge * i / 4), (1, edge * i / 4)) for i in range(1, 4)))
    p.box((196, 166, 134), (0, edge - 0.03, 1, edge + 0.02))
    tiles(p, (210, 191, 166), edge + 0.02)


def street(p: Pen, rng):
    sky(p, rng, 0)
    x, edge = -rng.uniform(0, 0.1), 0.4 + rng.uniform(-0.03, 0.03)
    while x < 1:
        wide, top = rng.uniform(0.16, 0.26), rng.uniform(0.03, 0.16)
        wall = wander(rng.choice(((214, 196, 184), (198, 204, 214), (222, 210, 186))), rng)
        p.box(wall, (x, top, x + wide, edge))
        rows, columns = (
            (top + 0.04, top + 0.11, top + 0.18),
            (x + wide * 0.12, x + wide * 0.42, x + wide * 0.72),
        )
        p.box(
            tone(wall, -0.12), *((a, b, a + wide * 0.16, b + 0.04) for a in columns for b in rows)
        )
        x += wide
    p.box((206, 202, 196), (0, edge, 1, edge + 0.13))
    p.box((184, 181, 178), (0, edge + 0.11, 1, edge + 0.13))
    fade(p, (158, 162, 170), (176, 179, 186), edge + 0.13, 1)
    start = rng.uniform(-0.2, 0)
    p.box(
        (222, 221, 214), *((start + i * 0.3, 0.74, start + i * 0.3 + 0.15, 0.76) for i in range(5))
    )


def beach(p: Pen, rng):
    sky(p, rng, 2)
    sea = 0.22 + rng.uniform(-0.03, 0.03)
    fade(p, (104, 180, 202), (156, 214, 218), sea, 0.47)
    glints = [(rng.uniform(-0.1, 0.9), rng.uniform(sea + 0.02, 0.42)) for _ in range(7)]
    p.box((178, 224, 228), *((x, y, x + 0.15, y + 0.008) for x, y in glints))
    fade(p, (240, 224, 186), (230, 206, 160), 0.46, 1)
    p.oval(
        (238, 246, 240),
        *((i / 6 - 0.1, rng.uniform(0.435, 0.455), i / 6 + 0.1, 0.485) for i in range(7)),
    )
    p.disc((214, 188, 142), *((rng.random(), rng.uniform(0.54, 1), 0.008) for _ in range(14)))


def farm(p: Pen, rng):
    sky(p, rng, 2)
    shift, start, fence = rng.uniform(-0.15, 0.15), rng.uniform(0, 0.1), (222, 206, 180)
    p.oval((176, 204, 148), (-0.4 + shift, 0.22, 0.7 + shift, 0.9))
    p.oval((160, 194, 134), (0.3 + shift, 0.25, 1.5 + shift, 0.9))
    fade(p, (168, 202, 126), (144, 186, 106), 0.4, 1)
    p.line(
        (154, 188, 114),
        0.012,
        *(((0.5 + i * 0.1, 0.42), (0.5 + i * 0.34, 1)) for i in range(-4, 5)),
    )
    p.box(fence, (0, 0.355, 1, 0.37), (0, 0.405, 1, 0.42))
    p.box(fence, *((start + i * 0.13, 0.33, start + i * 0.13 + 0.02, 0.45) for i in range(-1, 8)))


def bedroom(p: Pen, rng):
    edge = indoors(p, rng, (222, 206, 222), (212, 188, 162), (244, 240, 238))
    p.box((230, 217, 231), *((i / 12, 0, i / 12 + 0.035, edge - 0.025) for i in range(12)))
    planks(p, rng, (200, 174, 146), edge)
    p.oval((232, 212, 216), (0.06, 0.6, 0.94, 0.98))
    p.oval((238, 222, 226), (0.12, 0.64, 0.88, 0.94))


def park(p: Pen, rng):
    sky(p, rng, 1)
    x, bend = rng.uniform(-0.1, 0.05), rng.uniform(-0.15, 0.15)
    while x < 1.1:
        p.box((172, 152, 130), (x - 0.012, 0.2, x + 0.012, 0.44))
        p.disc(wander((160, 198, 156), rng), (x, 0.2, rng.uniform(0.09, 0.14)))
        p.disc(wander((170, 206, 164), rng), (x - 0.02, 0.16, 0.08))
        x += rng.uniform(0.2, 0.3)
    fade(p, (164, 206, 144), (140, 190, 118), 0.4, 1)
    p.poly(
        (226, 212, 180), ((0.5 + bend, 0.4), (0.58 + bend, 0.4), (0.85 - bend, 1), (0.3 - bend, 1))
    )
    p.disc((200, 226, 166), *((rng.random(), rng.uniform(0.48, 1), 0.008) for _ in range(14)))


def living_room(p: Pen, rng):
    edge = indoors(p, rng, (238, 220, 190), (200, 168, 140), (250, 244, 232))
    p.box((226, 206, 174), *((x, 0.05, x + 0.19, edge - 0.07) for x in (0.03, 0.28, 0.53, 0.78)))
    p.box((242, 228, 202), *((x, 0.06, x + 0.17, edge - 0.08) for x in (0.04, 0.29, 0.54, 0.79)))
    planks(p, rng, (188, 156, 128), edge)
    p.poly((214, 190, 176), ((0.16, 0.62), (0.84, 0.62), (0.96, 0.96), (0.04, 0.96)))
    p.poly((224, 204, 190), ((0.2, 0.65), (0.8, 0.65), (0.9, 0.93), (0.1, 0.93)))


def office(p: Pen, rng):
    edge, shift = (
        indoors(p, rng, (214, 220, 226), (178, 200, 212), (240, 242, 244)),
        rng.uniform(-0.08, 0.08),
    )
    p.box((236, 244, 248), (0, 0.06, 1, edge - 0.1))
    p.box((222, 230, 236), *((0, 0.06 + i * 0.03, 1, 0.073 + i * 0.03) for i in range(9)))
    p.box(
        (204, 210, 216),
        *((shift + i / 3 - 0.01, 0.04, shift + i / 3 + 0.01, edge - 0.08) for i in range(4)),
    )
    tiles(p, (166, 188, 200), edge)


BACKDROPS = dict(
    zip(SCENES, (kitchen, street, beach, farm, bedroom, park, living_room, office), strict=True)
)


def draw(kind: str, things: Sequence[Thing], rng: random.Random, size: int = 144) -> Image.Image:
    """An RGB image, `size` x `size`, of `things` in front of the backdrop `kind`.

    The same state of `rng` gives the same image. Raises KeyError for an unknown scene or class,
    ValueError for a colour that the class does not have.
    """
    side = 2 * size
    back, layer = Image.new("RGB", (side, side)), Image.new("RGBA", (side, side))
    BACKDROPS[kind](Pen(ImageDraw.Draw(back), 0, 0, side, side), rng)

    ground, top = ImageDraw.Draw(back, "RGBA"), ImageDraw.Draw(layer)
    for thing in sorted(things, key=lambda t: (t.row, t.column)):
        figure, wide, high, colours = FIGURES[thing.name]
        if thing.colour not in (colours or (None,)):
            raise ValueError(
                f"{thing.name}: colour {thing.colour!r} is not one of {colours or (None,)}"
            )

        scale = 1.0 if thing.count == 1 else min(0.8, 0.58 / wide)
        flip = rng.random() < 0.5
        for aside, up in ((0, 0),) if thing.count == 1 else ((-0.078, 0.05), (0.078, 0)):
            k = scale * rng.uniform(0.9, 1.1) * side
            w, h = wide * k * 0.31, high * k * 0.415 * rng.uniform(0.95, 1.03)
            x = (thing.column / 3 + 1 / 6 + aside + rng.uniform(-0.012, 0.012)) * side
            x = min(max(x, w / 2), side - w / 2)
            # Copies of wide things are low: one copy stands higher, so that both can be seen.
            y = (0.475 + 0.49 * thing.row - up * (scale < 0.7) - rng.uniform(0, 0.02)) * side

            if thing.name in HANGING:
                y -= (0.43 * side - h) / 2
            else:
                ground.ellipse(
                    (x - w * 0.52, y - side * 0.02, x + w * 0.52, y + side * 0.018),
                    (30, 25, 40, 70),
                )
            figure(
                Pen(top, x - w / 2, y - h, w, h, flip, rng.uniform(-0.08, 0.08)),
                COLOURS.get(thing.colour),
                rng,
            )

    back, layer = back.reduce(2), layer.reduce(2)
    mask = layer.getchannel("A")
    # A soft dark rim separates things from the backdrop; white things need it most.
    back.paste(
        (35, 30, 45),
        (1, 1),
        mask.filter(ImageFilter.BoxBlur(1.5)).point([v * 11 // 20 for v in range(256)]),
    )
    back.paste(layer, (0, 0), mask)
    return back
