"""Files as downloaded: rows of parquet, JSON, JSON lines and tsv; images, opened safely."""

import base64
import functools
import gzip
import io
import json
import os
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from common import BadInput, file_hash, file_identity, whole_folder, write_json

# A larger image is refused before it is decoded: it may be a decompression bomb. So is a long or
# thin one, which padding or resizing would make large.
MAX_PIXELS = 100_000_000
MAX_SIDE = 20_000
MAX_RATIO = 200  # of the longer side to the shorter

TURNED = (5, 6, 7, 8)  # the values of EXIF's orientation that swap height and width


@dataclass(frozen=True)
class PackedImage:
    """An image inside a parquet or tsv file. It is read when it is needed."""

    file: str
    row: int

    def read(self):
        """The encoded bytes."""
        path, starts = _unpacked(self.file)
        with open(path, "rb") as file:
            file.seek(starts[self.row])
            return file.read(starts[self.row + 1] - starts[self.row])

    def __str__(self):
        return f"{self.file}, row {self.row}"


@functools.lru_cache(maxsize=None)
def _unpacked(file):
    """Unpack a file's images at the first use -> (path of the unpacked file, where each starts).

    All images lie one after another in one file, in `.cache/pictures-*`. The reason: training reads
    in random order, which parquet does not allow. There, one image costs its page, up to 1000
    images.

    While it unpacks, memory is bounded by the row group, about twice its size, not by the file.
    Afterwards it is bounded by one image.
    """
    folder = Path(".cache") / f"pictures-{_file_hash(file)[:16]}"
    if not folder.is_dir():
        print(f"{file}: unpacking its images to {folder}", file=sys.stderr)
        with whole_folder(folder) as aside, open(aside / "pictures", "wb") as out:
            starts = [0]
            for encoded in _encoded_images(Path(file)):
                out.write(encoded or b"")
                starts.append(out.tell())
            write_json(aside / "starts.json", starts)

    starts = json.loads((folder / "starts.json").read_text())
    return (folder / "pictures").resolve(), starts


def _encoded_images(path):
    """The bytes of each row's image, or None."""
    if path.suffix == ".tsv":
        for number, line in _lines(path):
            try:
                yield base64.b64decode(line.split("\t")[1], validate=True)
            except ValueError as error:
                raise BadInput(
                    f"{path}, line {number}: the image is not base64 ({error})."
                ) from None
        return

    import pyarrow

    file = _parquet(path)
    column, _ = _columns(file)
    leaves = [n for n in _leaves(file) if n.startswith(f"{column}.") and n.endswith(".bytes")]
    for batch in _batches(path, file, leaves, 16):
        for cell in batch.column(0).to_pylist():
            if isinstance(cell, list) and len(cell) == 1:
                cell = cell[0]
            yield cell["bytes"] if isinstance(cell, dict) else None
    pyarrow.default_memory_pool().release_unused()


# ---- files to rows


def _parquet(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise BadInput(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        # with pre_buffer, all that was read would stay in memory
        return pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (OSError, ValueError) as error:  # no such file, or none that Arrow can read
        raise BadInput(f"{path}: not readable as parquet ({str(error).splitlines()[0]}).") from None


def _leaves(file):
    """All columns that a parquet file stores, as "image.bytes" or "images.list.element.path"."""
    return [file.schema.column(i).path for i in range(len(file.schema))]


def _columns(file):
    """The column of images, if there is one, and all leaves except the images' bytes."""
    leaves = _leaves(file)
    tops = [name.split(".")[0] for name in leaves if name.endswith(".bytes")]
    column = next((top for top in tops if top in ("image", "images")), None)
    small = [n for n in leaves if not (n.startswith(f"{column}.") and n.endswith(".bytes"))]
    return column, small


def _batches(path, file, columns, size):
    try:
        yield from file.iter_batches(batch_size=size, columns=columns, use_threads=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable as parquet ({str(error).splitlines()[0]}).") from None


def _parquet_rows(path):
    file = _parquet(path)
    column, leaves = _columns(file)

    number = 0
    for batch in _batches(path, file, leaves, 1024):
        for row in batch.to_pylist():
            if column:
                # The bytes are not read here. The path beside them shows whether the cell is null,
                # and how long its list is.
                cell = row.get(column, {})
                image = PackedImage(str(path), number)
                if isinstance(cell, list):
                    row[column] = [image] * len(cell)
                elif cell is not None:
                    row[column] = image
            yield number, row
            number += 1


def _lines(path):
    """(number from 1, line) of a UTF-8 text file, gzipped or not.

    U+2028 does not end a line: JSON strings may hold it.
    """
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            yield from enumerate(file, 1)
    except FileNotFoundError:
        raise BadInput(
            f"{path}: no such file; --data takes a JSON, JSON-lines or parquet file."
        ) from None
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise BadInput(
            f"{path}: not a text file ({error}); accepted are JSON, JSON lines and .parquet."
        ) from None


MUFFIN = (
    "dataset_name",
    "image",
    "text",
    "origin_dataset",
    "origin_split",
    "origin_split_inner_idx",
    "image_path",
)


def _tsv_rows(path):
    """RLHF-V's training file: seven fields without a header; image and text are in base64."""
    for number, line in _lines(path):
        fields = line.rstrip("\r\n").split("\t")
        if len(fields) != len(MUFFIN):
            raise BadInput(
                f"{path}, line {number}: {len(fields)} fields; "
                f"the seven of RLHF-V are needed: {', '.join(MUFFIN)}."
            )
        image = PackedImage(str(path), number - 1) if fields[1] else None
        yield number - 1, dict(zip(MUFFIN, fields)) | {"image": image}


def rows(path):
    """(row number from 0, row) of a parquet file, JSON array, JSON lines, or RLHF-V's tsv."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    if path.suffix == ".tsv":
        yield from _tsv_rows(path)
        return

    lines = _lines(path)
    row_number = 0
    for number, line in lines:
        if not row_number and line.lstrip().startswith("["):  # a JSON array: the whole file is one
            try:
                # the empty lines keep the line numbers in the message of an error
                array = json.loads("\n" * (number - 1) + line + "".join(rest for _, rest in lines))
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}: not valid JSON: {error}.") from None
            yield from enumerate(array)
        elif line.strip():
            try:
                yield row_number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}, line {number}: not valid JSON: {error}.") from None
            row_number += 1


# ---- images


def find_image(images, *names):
    """The first of these paths that is a file below `images`.

    Data files carry their author's folders ("./data/coco/x.jpg"). So leading folders are dropped
    until a file is found.
    """
    for name in names:
        if not isinstance(name, str) or not name:
            continue
        parts = Path(name).parts
        if Path(name).is_absolute() or ".." in parts:
            raise BadInput(
                f"image path {name!r:.80} leaves --images; only paths below it are read."
            )
        for i in range(len(parts)):
            path = images.joinpath(*parts[i:])
            if os.path.isfile(path):  # Path.is_file raises an error if a name is too long
                if not path.resolve().is_relative_to(images.resolve()):
                    raise BadInput(
                        f"image path {name!r:.80} leaves --images through a link; "
                        "only paths below it are read."
                    )
                return path

    listed = " or ".join(f"{name!r:.80}" for name in names)
    raise BadInput(f"image {listed} is not below --images {images}.")


def open_header(image):
    """Open an image without decoding it. A file that is no image, or too large, is refused."""
    try:
        file = Image.open(io.BytesIO(image.read()) if isinstance(image, PackedImage) else image)
    except Exception as error:  # each of Pillow's decoders fails in its own way
        raise BadInput(f"{image}: not a readable picture ({error}).") from None
    longest = min(MAX_SIDE, MAX_RATIO * min(file.size))
    if file.width * file.height > MAX_PIXELS or max(file.size) > longest:
        limits = f"{MAX_PIXELS:,} pixels, {MAX_SIDE:,} a side and sides of 1 : {MAX_RATIO}"
        raise BadInput(f"{image}: {file.width} x {file.height} pixels; at most {limits} are read.")
    return file


def open_image(image):
    """A Path or PackedImage -> RGB image.

    It is turned as EXIF says. What is transparent becomes white, 16-bit gray is scaled to 8 bits,
    CMYK is converted.
    """
    file = open_header(image)
    try:
        file = ImageOps.exif_transpose(file)
        if file.mode.startswith("I;16"):
            file = Image.fromarray((np.asarray(file) >> 8).astype(np.uint8))
        if file.has_transparency_data:
            white = Image.new("RGBA", file.size, "white")
            file = Image.alpha_composite(white, file.convert("RGBA"))
        return file.convert("RGB")
    except Exception as error:
        # corrupt pixels or EXIF: OSError, SyntaxError, struct.error, TypeError, ...
        raise BadInput(f"{image}: the picture cannot be decoded ({error}).") from None


def image_size(image):
    """(height, width) of the image that `open_image` returns, from the file's header.

    A PNG is decoded, because its EXIF data may come last.
    """
    with open_header(image) as file:
        width, height = file.size
        try:
            # Pillow has turned the size of a TIFF already
            turned = file.format != "TIFF" and (
                file.getexif().get(ExifTags.Base.Orientation) in TURNED
            )
        except Exception as error:  # as in `open_image`
            raise BadInput(f"{image}: the picture cannot be decoded ({error}).") from None
    return (width, height) if turned else (height, width)


def image_identity(image):
    """What an image is known by: `file_identity`, and the row if it is inside a file.

    None for a text-only row.
    """
    if isinstance(image, PackedImage):
        return f"{file_identity(image.file)} {image.row}"
    return image and file_identity(image)


_file_hash = functools.lru_cache(maxsize=None)(file_hash)
