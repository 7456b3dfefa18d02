"""Files as downloaded: rows of parquet, JSON, JSON lines and tsv; images, opened safely."""

import base64
import functools
import gzip
import hashlib
import io
import json
import os
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from common import (
    BadInput,
    file_hash,
    file_identity,
    refuse_lfs_pointer,
    whole_folder,
    write_json,
)

# A larger image is refused before it is decoded: it may be a decompression bomb. So is a long or
# thin one, which padding or resizing would make large.
MAX_PIXELS = 100_000_000
MAX_SIDE = 20_000
MAX_RATIO = 200  # of the longer side to the shorter

# Pillow knows more, among them some that run other programs (EPS starts Ghostscript)
FORMATS = "PNG JPEG WEBP GIF BMP DIB TIFF PPM JPEG2000 AVIF ICO TGA".split()

TURNED = (5, 6, 7, 8)  # the values of EXIF's orientation that swap height and width

# Pillow's modes of more than 8 bits; `convert` clips their values instead of scaling them
DEEP_GRAY = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF


@dataclass(frozen=True)
class PackedImage:
    """An image inside a parquet or tsv file. It is read when it is needed."""

    file: str
    row: int
    column: str = "image"

    def read(self):
        """The encoded bytes."""
        path, starts = _unpacked(self.file, self.column)
        with open(path, "rb") as file:
            file.seek(starts[self.row])
            return file.read(starts[self.row + 1] - starts[self.row])

    def __str__(self):
        return f"{self.file}, row {self.row}"


@dataclass(frozen=True)
class ChangedImage:
    """An image that is shown as `change` makes it: RGB image -> RGB image of the same size.

    The repr of `change` says what it does, for caches.
    """

    image: object
    change: object


@functools.lru_cache(maxsize=None)
def _unpacked(file, column):
    """Unpack a column of images at the first use -> (path of the unpacked file, where each starts).

    All images lie one after another in one file, in `.cache/pictures-*`. The reason: training reads
    in random order, which parquet does not allow. There, one image costs its page, up to 1000
    images.

    While it unpacks, memory is bounded by the row group, about twice its size, not by the file.
    Afterwards it is bounded by one image.
    """
    made_of = f"{_file_hash(file)} {column}".encode()
    folder = Path(".cache") / f"pictures-{hashlib.sha256(made_of).hexdigest()[:16]}"
    if not folder.is_dir():
        print(f"{file}: unpacking its images to {folder}", file=sys.stderr)
        with whole_folder(folder) as aside, open(aside / "pictures", "wb") as out:
            starts = [0]
            for encoded in _encoded_images(Path(file), column):
                out.write(encoded or b"")
                starts.append(out.tell())
            write_json(aside / "starts.json", starts)

    try:
        starts = json.loads((folder / "starts.json").read_text())
        ordered = all(a <= b for a, b in zip([0, *starts], starts))
        whole = ordered and starts[-1] == (folder / "pictures").stat().st_size
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        whole = False
    if not whole:
        raise BadInput(f"{folder}: damaged; once it is removed, it is made anew.")
    return (folder / "pictures").resolve(), starts


def _encoded_images(path, column):
    """The bytes of each row's image in a column, or None."""
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
    for batch in _batches(path, file, _bytes_of(file, column), 16):
        for cell in batch.column(0).to_pylist():
            cells = cell if isinstance(cell, list) else [cell]
            encoded = (c["bytes"] if isinstance(c, dict) else c for c in cells)
            yield next(filter(None, encoded), None)
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


def _image_columns(file):
    """The columns that hold encoded images: bytes, structs with `bytes`, or lists of these."""
    from pyarrow import types

    found = []
    for field in file.schema_arrow:
        kind = field.type
        if types.is_list(kind) or types.is_large_list(kind):
            kind = kind.value_type
        is_struct = types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if is_struct or types.is_binary(kind) or types.is_large_binary(kind):
            found.append(field.name)
    return found


def _leaves(file, column):
    """What a parquet file stores of a column: ["image.bytes", "image.path"]."""
    paths = [file.schema.column(i).path for i in range(len(file.schema))]
    return [path for path in paths if path == column or path.startswith(f"{column}.")]


def _bytes_of(file, column):
    """The stored column of an image column's bytes, as a list of one."""
    leaves = _leaves(file, column)
    return [leaf for leaf in leaves if leaf.endswith(".bytes")] or leaves


def _every_cell_is_full(file, column):
    """Whether the statistics say that no image is missing, and something beside it is stored.

    Then the bytes need not be read to know how many images a row has.
    """
    (leaf,) = _bytes_of(file, column)
    index = [file.schema.column(i).path for i in range(len(file.schema))].index(leaf)
    groups = range(file.metadata.num_row_groups)
    statistics = [file.metadata.row_group(g).column(index).statistics for g in groups]
    no_nulls = all(s is not None and s.has_null_count and s.null_count == 0 for s in statistics)
    is_list = leaf not in (column, f"{column}.bytes")
    return no_nulls and not (is_list and len(_leaves(file, column)) == 1)


def _batches(path, file, columns, size):
    try:
        yield from file.iter_batches(batch_size=size, columns=columns, use_threads=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable as parquet ({str(error).splitlines()[0]}).") from None


def _parquet_rows(path):
    file = _parquet(path)
    columns = _image_columns(file)
    full = {column for column in columns if _every_cell_is_full(file, column)}
    unread = {leaf for column in full for leaf in _bytes_of(file, column)}
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    leaves = [leaf for leaf in leaves if leaf not in unread]

    number = 0
    for batch in _batches(path, file, leaves, 1024 if len(full) == len(columns) else 16):
        for row in _python_rows(batch):
            for column in columns if isinstance(row, dict) else ():
                image = PackedImage(str(path), number, column)
                row[column] = _packed(row.get(column, {}), image, column in full)
            yield number, row
            number += 1


def _python_rows(batch):
    """The rows of a parquet batch as dicts; a BadInput in the place of one that has none."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield BadInput(f"a cell is not text ({error}).")


def _packed(cell, image, is_full):
    """A cell of an image column with `image` in the place of bytes; a path without bytes stays."""
    if isinstance(cell, list):
        return [_packed(c, image, is_full) for c in cell]
    if cell is None or is_full:
        return cell if cell is None else image
    if isinstance(cell, dict):
        return image if cell["bytes"] else cell
    return image if cell else None


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
            f"{path}: no such file; a JSON, JSON-lines or parquet file is needed."
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
            yield (
                number - 1,
                BadInput(
                    f"line {number}: {len(fields)} fields; "
                    f"the seven of RLHF-V are needed: {', '.join(MUFFIN)}."
                ),
            )
            continue
        image = PackedImage(str(path), number - 1) if fields[1] else None
        yield number - 1, dict(zip(MUFFIN, fields)) | {"image": image}


def rows(path, keep_bad=False):
    """(row number from 0, row) of a parquet file, JSON array, JSON lines, or RLHF-V's tsv.

    A row is whatever JSON holds there, a dict in a file that can be used. keep_bad: in the place of
    a row of parquet or of a line that cannot be read stands a BadInput; without it, it is raised.
    """
    for number, row in _rows(path):
        if isinstance(row, BadInput) and not keep_bad:
            raise BadInput(f"{path}, row {number}: {row}")
        yield number, row


def _rows(path):
    refuse_lfs_pointer(path)
    if path.is_dir():
        raise BadInput(f"{path}: {_what_folder(path)}; a data file is needed.")
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
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not row_number:
                    _refuse_one_object(path)
                row = BadInput(f"line {number}: not valid JSON: {error}.")
            yield row_number, row
            row_number += 1


KINDS = {str: "a text", int: "a whole number", list: "a list"}


def need(row, key, kind, where, empty=False):
    """row[key] of a row of a file, which must be of this kind.

    A text must not be blank, unless `empty`. where: file and row, for the message.
    """
    value = row.get(key) if isinstance(row, dict) else None
    if type(value) is not kind or (kind is str and not (value.strip() or empty)):
        raise BadInput(f"{where}: `{key}` is {value!r:.80}; {KINDS[kind]} is needed.")
    return value


def number_or_text(row, key, where):
    """row[key] of a row of a file: a whole number or a text, as ids are."""
    value = row.get(key) if isinstance(row, dict) else None
    if type(value) not in (int, str) or value == "":
        raise BadInput(f"{where}: `{key}` is {value!r:.80}; a number or a text is needed.")
    return value


def _refuse_one_object(path):
    """Refuse a file that is one object over several lines: settings, or rows under a key."""
    try:
        keys = list(json.loads("".join(line for _, line in _lines(path))))
    except (ValueError, RecursionError):
        return
    raise BadInput(
        f"{path}: one object with the keys {str(keys):.200}; rows are needed, in an array or an "
        "object a line."
    )


def _what_folder(path):
    """What a folder is that was given in the place of a data file."""
    for name, what in (
        (
            "ratings.jsonl",
            "a run of annotate.py: its ratings.jsonl is for rejection_sampling.py and steerlm.py, "
            "its preferences.json for dpo.py",
        ),
        ("preferences.json", f"a run folder, whose data are {path / 'preferences.json'}"),
        ("args.json", "a run folder"),
        ("adapter_config.json", "an adapter"),
        ("config.json", "a model"),
    ):
        if (path / name).is_file():
            return what
    kinds = (".parquet", ".json", ".jsonl", ".gz", ".tsv")
    names = sorted(p.name for p in path.iterdir() if p.suffix in kinds)
    return f"a folder with {', '.join(names[:5])}" if names else "a folder without data files"


# ---- images


IMAGES_NOTE = "images.json"  # {"images_folder": path}, beside a data file


def image_folders(path):
    """Where the images of a data file are looked for without --images.

    In its own folder, in `images` there, and where `remember_images` says; a message names that
    folder although it may have moved.
    """
    folder = Path(path).parent
    folders = [folder, *([folder / "images"] if (folder / "images").is_dir() else [])]
    try:
        note = json.loads((folder / IMAGES_NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        note = None
    noted = note.get("images_folder") if isinstance(note, dict) else None
    if isinstance(noted, str):
        folders.append(Path(noted))
    return folders


def remember_images(folder, images):
    """Write down where the images of the data files in a folder lie, for `image_folders`."""
    write_json(Path(folder) / IMAGES_NOTE, {"images_folder": os.path.abspath(images)})


class ImageFolder:
    """Finds the images that a data file names. This is the whole policy for their paths:

    1. Only files below --images are read. Without --images these are the folders of
       `image_folders`: the data file's own, and those that a script of ours wrote down.
    2. A path that exists below --images is taken as it stands, also an absolute one. `..` must not
       leave the folder.
    3. Any other path is its author's ("./data/coco/x.jpg", "/home/a/coco/x.jpg", "D:\\coco\\x.jpg",
       a URL): leading folders are dropped until a file is found, so the longest end that exists
       counts. `notes` counts what was dropped, and names that are different and end at one file.
    4. Links below --images are followed, because data on mounted disks and in the hub's cache are
       links. The risk: a link that leads out of the folder is read. Data files cannot create links;
       an archive can, when it is unpacked.
    """

    def __init__(self, images, notes=None):
        folders = images if isinstance(images, list) else [images]
        self.folders = [Path(folder) for folder in folders]
        self.notes = Counter() if notes is None else notes
        self.taken = {}  # the name by which each file was found without leading folders

    def find(self, *names):
        """The file of the first of these paths that exists."""
        for name in names:
            path, leading = self.look_up(name)
            if path:
                self.note(path, leading, name)
                return path
        listed = " or ".join(f"{name!r:.80}" for name in names)
        folders = " or ".join(map(str, self.folders))
        raise BadInput(f"image {listed} is not below --images {folders}.")

    def look_up(self, name):
        """(The file of a path, the leading folders that were dropped), or (None, "")."""
        if not isinstance(name, str) or not name:
            return None, ""
        parts = name.replace("\\", "/").split("/")
        if ".." in parts:
            parts = os.path.normpath("/".join(parts)).split("/")
            if parts[0] == "..":
                raise BadInput(
                    f"image path {name!r:.80} leaves --images; only paths below it are read."
                )

        # an absolute path as it stands
        for folder in self.folders if parts[0] == "" and os.path.isfile(name) else ():
            for base in (os.path.abspath(folder), os.path.realpath(folder)):
                inside = os.path.relpath("/".join(parts), base)
                if inside.split("/")[0] != "..":
                    return folder / inside, ""

        # the longest end
        for i in range(len(parts)):
            for folder in self.folders:
                path = folder.joinpath(*parts[i:])
                if os.path.isfile(path):  # Path.is_file raises an error if a name is too long
                    shortened = set(parts[:i]) - {"", "."}
                    return path, "/".join(parts[:i]) if shortened else ""
        return None, ""

    def note(self, path, leading, name):
        """Count a path that was found without its leading folders, by those folders."""
        if not leading:
            return
        begin = "image paths are read without"
        kind = f"{begin} their leading {leading!r:.80}"
        if kind not in self.notes and sum(note.startswith(begin) for note in self.notes) >= 10:
            kind = f"{begin} other leading folders"
        self.notes[kind] += 1
        if self.taken.setdefault(path, name) != name:
            self.notes["image paths end at the file of another path: is it the same image?"] += 1

    def report(self):
        """Print the notes."""
        for note, count in self.notes.items():
            print(f"{self.folders[0]}: {count} {note}", file=sys.stderr)


def open_header(image):
    """Open an image without decoding it. A file that is no image, or too large, is refused."""
    try:
        source = io.BytesIO(image.read()) if isinstance(image, PackedImage) else image
        file = Image.open(source, formats=FORMATS)
    except Exception as error:  # each of Pillow's decoders fails in its own way
        if isinstance(image, Path):
            refuse_lfs_pointer(image)
        raise BadInput(f"{image}: not a readable picture ({error}).") from None
    longest = min(MAX_SIDE, MAX_RATIO * min(file.size))
    if file.width * file.height > MAX_PIXELS or max(file.size) > longest:
        limits = f"{MAX_PIXELS:,} pixels, {MAX_SIDE:,} a side and sides of 1 : {MAX_RATIO}"
        raise BadInput(f"{image}: {file.width} x {file.height} pixels; at most {limits} are read.")
    if file.mode in DEEP_GRAY and gray_bits(file) is None:
        raise BadInput(
            f"{image}: {file.format} with gray values of Pillow's mode {file.mode}, and nothing says "
            "which of them is white; accepted are 8 bits, and unsigned 12 or 16 in PNG, TIFF, PGM "
            "and JPEG 2000."
        )
    return file


def gray_bits(file):
    """How many bits the values of a picture in a mode of DEEP_GRAY have; None if nothing says so.

    Pillow scales PGM and JPEG 2000 to 16 bits. Signed values and those of 32 bits, whole or not,
    have no agreed white: Pillow's own `convert` would clip them to 0 .. 255, mostly white.
    """
    if file.mode not in DEEP_GRAY or file.mode == "F":
        return None
    if file.format in ("PNG", "PPM", "JPEG2000"):
        return 16
    if file.format == "TIFF" and file.mode.startswith("I;16"):
        return file.tag_v2[BITS_PER_SAMPLE][0]
    return None


def open_image(image):
    """A Path, PackedImage or ChangedImage -> RGB image.

    It is turned as EXIF says. What is transparent becomes white, gray of 12 or 16 bits is scaled to
    8, other colour spaces are converted.
    """
    if isinstance(image, ChangedImage):
        return image.change(open_image(image.image))
    file = open_header(image)
    try:
        bits = gray_bits(file)
        inverted = file.format == "TIFF" and file.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
        file = ImageOps.exif_transpose(file)
        if bits:
            values = np.asarray(file)
            gray = (values >> bits - 8).astype(np.uint8)
            gray = 255 - gray if inverted else gray  # Pillow inverts 8 bits itself
            gray[values == file.info.get("transparency", -1)] = 255
            file = Image.fromarray(gray)
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
    if isinstance(image, ChangedImage):
        image = image.image
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
    if isinstance(image, ChangedImage):
        return f"{image_identity(image.image)} {image.change!r}"
    if isinstance(image, PackedImage):
        return f"{file_identity(image.file)} {image.row}"
    return image and file_identity(image)


_file_hash = functools.lru_cache(maxsize=None)(file_hash)
