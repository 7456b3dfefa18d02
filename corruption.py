"""Corrupted pictures for conditional preference (mdpo.py): a crop, noise, or nothing to see.

    crop     a part of 1 to 20 % of the area, sides 3 : 4 to 4 : 3, enlarged to the picture's size:
             mDPO's code (torchvision's RandomResizedCrop; the paper speaks of cropping 0-20 %)
    noise    500 of 1000 diffusion steps (noise.py), as in CHiP
    blank    black

A corrupted picture has the size of the original, and is corrupted before padding and tiling. So it
takes as many image tokens, also in LLaVA-NeXT. What is drawn depends on the seed and on the row
alone: policy, reference, each epoch and a resumed run see the same.
"""

import math
import random
from dataclasses import dataclass, replace

import torch
from PIL import Image

from formats import dataset
from formats.files import ChangedImage, image_size
from noise import diffuse

KINDS = ("crop", "noise", "blank")
KEPT = (0.01, 0.2)  # share of the area
SIDES = (3 / 4, 4 / 3)  # width : height
TRIES = 10  # as in RandomResizedCrop; where none fits that takes the middle, which may be all
NOISE_STEPS = 500


@dataclass(frozen=True)
class Corruption:
    """A function RGB image -> RGB image of the same size; its name in caches is its repr."""

    kind: str
    seed: str

    def __call__(self, image):
        if self.kind == "blank":
            return Image.new("RGB", image.size)
        if self.kind == "noise":
            bits = random.Random(self.seed).getrandbits(62)
            return diffuse(image, NOISE_STEPS, torch.Generator().manual_seed(bits))
        box = crop_box(image.height, image.width, self.seed)
        return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


def crop_box(height, width, seed):
    """The part of a picture that a seed draws -> (left, top, right, bottom); None: none fits in."""
    rng = random.Random(seed)
    for _ in range(TRIES):
        area = height * width * rng.uniform(*KEPT)
        ratio = math.exp(rng.uniform(*map(math.log, SIDES)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h


def corrupt(rows, examples, kind, seed):
    """Examples -> those that can be corrupted, and each of them with y+ alone and that picture.

    rows: the `dataset.Rows` of these examples; a row whose picture is smaller than its crop is one
    that cannot be used.
    """
    kept, corrupted, refused = [], [], []
    for e in examples:
        where, image = e.record.where, e.record.image
        change = Corruption(kind, f"{seed}/{where}")
        if kind == "crop" and not crop_box(*image_size(image), change.seed):
            height, width = image_size(image)
            why = f"its picture of {width} x {height} pixels is smaller than its crop"
            refused.append(dataset.located(where, f"{why}; --corrupt noise and blank take any"))
            continue
        record = replace(e.record, image=ChangedImage(image, change))
        kept.append(e)
        corrupted.append(replace(e, record=record, answers=e.answers[:1], scored=e.scored[:1]))
    rows.leave_out(refused, len(examples))
    return kept, corrupted
