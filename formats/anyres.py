"""LLaVA-NeXT's any resolution: an image becomes an overview and tiles; the grid fits its shape.

The image is fitted into the best of a few sizes ("pinpoints"), padded with black, and cut into
tiles of the tower's size. The tower encodes the overview (the whole image, squeezed to one square)
and each tile.

The tiles' features are put together to one map again, and its padding is cut off. Each row of the
map ends with a learned vector, `image_newline`. The overview's features come first.

Rounding, in pixels and features, is that of transformers 4.57 to 5.23. Older code differs:
- LLaVA itself and 4.46 cut with int(x). Today's int(round(x, 7)) undoes the error of the float
  product. For some shapes, int(x) cuts one more row or column on each side.
- 4.46 pads an odd remainder with one pixel too few, so that its edge tiles are resized.
"""

import math
from dataclasses import dataclass

import torch
from PIL import Image

from common import BadInput


@dataclass(frozen=True)
class AnyRes:
    """The geometry of one checkpoint. Every size is (height, width), in pixels."""

    pinpoints: tuple  # ((height, width), ...), multiples of `tile`; of equally good ones the first
    tile: int  # side of a tile, the tower's input
    patches: int  # features along a tile's side

    def fit(self, size):
        """The pinpoint that keeps most pixels of the image; of these, the one that wastes least."""
        h, w = size

        def merit(pinpoint):
            """Pixels of the image that this size keeps, then minus the pixels that it wastes."""
            height, width = pinpoint
            scale = min(width / w, height / h)
            kept = min(int(w * scale) * int(h * scale), w * h)
            return kept, kept - height * width

        return max(self.pinpoints, key=merit)

    def grid(self, size):
        """(rows, columns) of tiles for an image of this size."""
        return tuple(edge // self.tile for edge in self.fit(size))

    def margin(self, size):
        """(rows, columns) of features that show only padding, cut off at each of the two sides."""
        rows, columns = (n * self.patches for n in self.grid(size))
        h, w = size
        if w / h > columns / rows:
            return (rows - int(round(h * (columns / w), 7))) // 2, 0
        return 0, (columns - int(round(w * (rows / h), 7))) // 2

    def tokens(self, size):
        """The number of features of an image of this size."""
        rows, columns = (n * self.patches for n in self.grid(size))
        top, left = self.margin(size)
        return self.patches**2 + (rows - 2 * top) * (columns - 2 * left + 1)

    def tiles(self, picture):
        """An RGB image -> its overview and tiles, row by row, all tile x tile pixels."""
        # the size of the image inside the pinpoint
        height, width = self.fit((picture.height, picture.width))
        scale_h, scale_w = height / picture.height, width / picture.width
        if scale_w < scale_h:
            w, h = width, min(math.ceil(picture.height * scale_w), height)
        else:
            w, h = min(math.ceil(picture.width * scale_h), width), height

        # padded with black
        canvas = Image.new("RGB", (width, height))
        resized = picture.resize((w, h), Image.Resampling.BICUBIC)
        canvas.paste(resized, ((width - w) // 2, (height - h) // 2))

        side = self.tile
        overview = picture.resize((side, side), Image.Resampling.BICUBIC)
        corners = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
        return [overview, *(canvas.crop((x, y, x + side, y + side)) for x, y in corners)]

    def join_all(self, features, sizes, newline):
        """The features of all tiles (tiles, patches^2, D) -> one tensor (tokens, D) per image.

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
        """Features of an overview and its tiles -> the features of the image (tokens, D).

        features: (1 + tiles, patches^2, D); newline: (D,).
        """
        top, left = self.margin(size)
        p = self.patches
        x = features[1:].unflatten(0, self.grid(size))  # (rows, columns, p p, D)
        x = x.unflatten(2, (p, p))  # (rows, columns, p, p, D)
        x = x.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (rows p, columns p, D)

        x = x[top : len(x) - top, left : x.shape[1] - left]
        x = torch.cat([x, newline.expand(len(x), 1, -1)], 1)
        return torch.cat([features[0], x.flatten(0, 1)])
