"""LLaVA-NeXT's any resolution: a picture becomes an overview and the tiles of a grid that suits its shape.

The picture is fitted into the best of a few sizes ("pinpoints"), padded with black, cut into tiles of the tower's size, and
the tower encodes the overview (the whole picture squeezed to one square) and each tile. The tiles' features are put together
again to one map, whose padding is cut off; each row of it ends with a learned vector, `image_newline`; the overview's
features come first.

Rounding is that of transformers 4.57 to 5.23, in pixels and features. Older code differs in details: LLaVA itself and 4.46
cut with int(x) where today's int(round(x, 7)) undoes the error of the float product, which is one more row or column cut on
each side for some shapes; and 4.46 pads an odd remainder with one pixel too few, so that its edge tiles are resized.
"""

import math
from dataclasses import dataclass

import torch
from PIL import Image

from common import BadInput


@dataclass(frozen=True)
class AnyRes:
    """The geometry of one checkpoint. Every size is (height, width), in pixels."""

    pinpoints: tuple  # ((height, width), ...), multiples of `tile`; at equal merit the first wins
    tile: int  # side of a tile, the tower's input
    patches: int  # features along a tile's side

    def fit(self, size):
        """The pinpoint that keeps most pixels of the picture; of those, the one that wastes least."""
        h, w = size

        def merit(pinpoint):
            """Pixels of the picture that this size keeps, then least padding."""
            scale = min(pinpoint[1] / w, pinpoint[0] / h)
            kept = min(int(w * scale) * int(h * scale), w * h)
            return kept, kept - pinpoint[0] * pinpoint[1]

        return max(self.pinpoints, key=merit)

    def grid(self, size):
        """(rows, columns) of the tiles of a picture of this size."""
        return tuple(edge // self.tile for edge in self.fit(size))

    def margin(self, size):
        """(rows, columns) of features that show only padding, cut off at each of the two sides."""
        rows, columns = (n * self.patches for n in self.grid(size))
        h, w = size
        if w / h > columns / rows:
            return (rows - int(round(h * (columns / w), 7))) // 2, 0
        return 0, (columns - int(round(w * (rows / h), 7))) // 2

    def tokens(self, size):
        """How many features a picture of this size becomes."""
        rows, columns = (
            n * self.patches - 2 * cut for n, cut in zip(self.grid(size), self.margin(size))
        )
        return self.patches**2 + rows * (columns + 1)

    def tiles(self, picture):
        """An RGB picture -> its overview and tiles, row by row, all tile x tile pixels."""
        height, width = self.fit((picture.height, picture.width))
        scale_h, scale_w = height / picture.height, width / picture.width
        if scale_w < scale_h:
            w, h = width, min(math.ceil(picture.height * scale_w), height)
        else:
            w, h = min(math.ceil(picture.width * scale_h), width), height
        canvas, side = Image.new("RGB", (width, height)), self.tile
        canvas.paste(
            picture.resize((w, h), Image.Resampling.BICUBIC), ((width - w) // 2, (height - h) // 2)
        )
        corners = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
        cut = [canvas.crop((x, y, x + side, y + side)) for x, y in corners]
        return [picture.resize((side, side), Image.Resampling.BICUBIC), *cut]

    def join_all(self, features, sizes, newline):
        """The features of all tiles (tiles, patches^2, D) -> one tensor (tokens, D) an image.

        sizes: height and width of each image, in pixels.
        """
        tiles = [1 + math.prod(self.grid(size)) for size in sizes]
        if sum(tiles) != len(features):
            raise BadInput(
                f"{len(features)} tiles, but images of these heights and widths have {sum(tiles)}: "
                f"{sizes}."
            )
        return [self.join(f, size, newline) for f, size in zip(features.split(tiles), sizes)]

    def join(self, features, size, newline):
        """Features of overview and tiles (1 + tiles, patches^2, D), newline (D,) -> those of the picture (tokens, D)."""
        (top, left), p = self.margin(size), self.patches
        x = (
            features[1:].unflatten(0, self.grid(size)).unflatten(2, (p, p))
        )  # (rows, columns, p, p, D)
        x = x.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (rows p, columns p, D)
        x = x[top : len(x) - top, left : x.shape[1] - left]
        x = torch.cat([x, newline.expand(len(x), 1, -1)], 1)
        return torch.cat([features[0], x.flatten(0, 1)])
