"""Data files and pictures as downloaded -> records. The reader is chosen by the keys of a file's first row (`LAYOUTS`):

    layout          keys                                      pairs of a row
    rlhf_v          text + origin_dataset (parquet or jsonl)  corrected answer > original
    vlfeedback      completions + models (jsonl)              every two of the k answers with unequal mean rating (Silkie)
    povid           conversations + rejected_conversations    conversations > rejected_conversations
    llava_rlhf      output_1 + output_2 + preference          as `preference` (1 or 2) says
    llava_instruct  conversations                             none: instruction data for sft.py

In layouts with placeholders one `<image>` in the first human turn is the picture (wherever it stands there, it is moved to the
front, as LLaVA does); anywhere else, and in answers, it is text.
"""

import base64
import functools
import io
import json
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import training
from model import BadInput

MAX_PIXELS = 100_000_000  # a larger picture is refused before it is decoded (decompression bombs) ...
MAX_SIDE, MAX_RATIO = 20_000, 200  # ... and so is a long or thin one, that padding or resizing would make large


@dataclass(frozen=True)
class Record:
    """One prompt and its answers, best first: (chosen, rejected) of a preference pair, one answer of instruction data."""

    where: str  # file and row, for messages
    image: object  # Path, ParquetImage, or None for a text-only row
    turns: tuple  # user, assistant, ..., user: the dialogue up to the answer
    answers: tuple = ()


@dataclass(frozen=True)
class ParquetImage:
    """A picture inside a parquet file, read when it is needed: its row group is held, not the file."""

    file: str
    group: int
    row: int

    def read(self):
        """The encoded bytes."""
        return _row_group(self.file, self.group)[self.row].as_py()

    def __str__(self):
        return f"{self.file}, row group {self.group}, row {self.row}"


@functools.lru_cache(maxsize=2)
def _row_group(file, group):
    return _parquet(file).read_row_group(group, columns=["image.bytes"]).column("image").combine_chunks().field("bytes")


def _parquet(file):
    try:
        import pyarrow.parquet
    except ImportError:
        raise BadInput(f"{file}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, ValueError) as error:  # no such file, or none that Arrow can read
        raise BadInput(f"{file}: not readable as parquet ({str(error).splitlines()[0]}).") from None


# ---- files to rows


def rows(path):
    """(row number from 0, row) of a JSON array, JSON lines or parquet file."""
    if path.suffix == ".parquet":
        file = _parquet(path)
        pictures = {f.name for f in file.schema_arrow if f.name == "image" and f.type.num_fields}  # a column of paths has none
        columns = [c for c in file.schema_arrow.names if c not in pictures]
        n = 0
        for g in range(file.num_row_groups):
            for i, row in enumerate(file.read_row_group(g, columns=columns).to_pylist()):
                yield n, row | {name: ParquetImage(str(path), g, i) for name in pictures}
                n += 1
        return
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; --data takes a JSON, JSON-lines or parquet file.") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise BadInput(f"{path}: not a text file ({error}); accepted are JSON, JSON lines and .parquet.") from None
    if text.lstrip().startswith("["):
        try:
            array = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}: not valid JSON: {error}.") from None
        yield from enumerate(array)
        return
    n = 0
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028, which JSON strings may hold
        if line.strip():
            try:
                yield n, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}, line {number}: not valid JSON: {error}.") from None
            n += 1


def text_field(value, key):
    """A stripped non-empty string, or BadInput that names the key."""
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"`{key}` is {value!r:.80}; a non-empty string is needed.")
    if any("\ud800" <= c <= "\udfff" for c in value):  # JSON can write them, no tokenizer can read them
        raise BadInput(f"`{key}` holds half of a surrogate pair: {value!a:.80}; whole characters are needed.")
    return value.strip()


def find_image(images, *names):
    """The first of these paths that is a file below `images`.

    Data files carry their author's folders ("./data/coco/x.jpg"), so leading folders are dropped until a file is found.
    """
    for name in names:
        if not isinstance(name, str) or not name:
            continue
        parts = Path(name).parts
        if Path(name).is_absolute() or ".." in parts:
            raise BadInput(f"image path {name!r:.80} leaves --images; only paths below it are read.")
        for i in range(len(parts)):
            path = images.joinpath(*parts[i:])
            if os.path.isfile(path):  # Path.is_file raises for a name that is too long
                if not path.resolve().is_relative_to(images.resolve()):
                    raise BadInput(f"image path {name!r:.80} leaves --images through a link; only paths below it are read.")
                return path
    raise BadInput(f"image {' or '.join(f'{n!r:.80}' for n in names)} is not below --images {images}.")


def dialogue(conversations, key, used=None):
    """LLaVA turns -> (user, assistant, ...) texts [:used]; those before the first human turn are dropped."""
    if isinstance(conversations, list) and len(conversations) == 1 and isinstance(conversations[0], list):
        conversations = conversations[0]  # LLaVA-RLHF nests some dialogues one level deeper
    if not isinstance(conversations, list) or not all(isinstance(t, dict) for t in conversations):
        raise BadInput(f"`{key}` is {type(conversations).__name__}; a list of {{from, value}} turns is needed.")
    roles = [t.get("from") for t in conversations]
    first = roles.index("human") if "human" in roles else len(roles)
    roles, turns = roles[first:], conversations[first:]
    if roles != ["human", "gpt"] * (len(roles) // 2) or not roles:
        raise BadInput(f"`{key}` has the roles {roles}; human and gpt must alternate, from human to gpt.")
    return [text_field(t.get("value"), f"{key}[{first + i}].value") for i, t in enumerate(turns[:used])]


def take_placeholder(turns, image):
    """Remove the first turn's `<image>`; it and the row's image must come together."""
    count = turns[0].count("<image>")
    if count > 1:
        raise BadInput(f"the first human turn holds `<image>` {count} times; one picture a row is accepted.")
    if (count == 1) != (image is not None):
        has = "an image" if image is not None else "no image"
        raise BadInput(f"the row has {has}, but its first human turn holds `<image>` {count} times.")
    return (text_field(turns[0].replace("<image>", ""), "first human turn"), *turns[1:])


# ---- rows to records: one small function a layout, (row, where, images, notes) -> records
# what is left out on purpose is counted in notes


def _rlhf_v(row, where, images, notes):
    text = row["text"]
    if isinstance(text, str):
        try:
            text = json.loads(text)
        except json.JSONDecodeError:
            try:
                text = json.loads(base64.b64decode(text, validate=True))
            except ValueError:
                raise BadInput("`text` is neither JSON nor base64 of JSON.") from None
    if isinstance(text, list) and len(text) == 3:
        text = dict(zip(("question", "chosen", "rejected"), text))
    if not isinstance(text, dict):
        raise BadInput(f"`text` is {type(text).__name__}; question, chosen and rejected are needed.")
    image = row.get("image")
    if not isinstance(image, ParquetImage):
        image = find_image(images, *(n for n in (row.get("image_path"), image) if n))
    question, *pair = (text_field(text.get(k), f"text.{k}") for k in ("question", "chosen", "rejected"))
    return [Record(where, image, (question,), tuple(pair))]


def _vlfeedback(row, where, images, notes):
    prompt, completions = text_field(row.get("prompt"), "prompt"), row["completions"]
    if isinstance(completions, dict):  # what load_dataset makes of a list of structs
        lists = list(completions.values())
        if not all(isinstance(v, list) and len(v) == len(lists[0]) for v in lists):
            raise BadInput("`completions` is an object whose values are not lists of one length.")
        completions = [dict(zip(completions, values)) for values in zip(*lists)]
    if not isinstance(completions, list):
        raise BadInput(f"`completions` is {completions!r:.80}; a list of {{annotations, response}} is needed.")
    scores, answers = [], []
    for i, completion in enumerate(completions):
        ratings = completion.get("annotations") if isinstance(completion, dict) else None
        if (
            not isinstance(ratings, dict)
            or not all(isinstance(r, dict) and "Rating" in r for r in ratings.values())
            or not ratings
        ):
            raise BadInput(f"completions[{i}].annotations is {ratings!r:.80}; an object of {{Rating, Rationale}} is needed.")
        answers.append(text_field(completion.get("response"), f"completions[{i}].response"))
        scores.append(_mean_rating(ratings))
    image = find_image(images, *([row["image"]] if row.get("image") else [f"{row.get('id')}.jpg", f"{row.get('id')}.png"]))
    records = []
    for i in range(len(answers)):
        for j in range(i + 1, len(answers)):
            if scores[i] is None or scores[j] is None:
                notes["pairs left out: a rating is not a number"] += 1
            elif scores[i] == scores[j]:
                notes["pairs left out: equal ratings"] += 1
            elif answers[i] == answers[j]:
                notes["pairs left out: the same answer, rated twice"] += 1
            else:
                w, l = (i, j) if scores[i] > scores[j] else (j, i)
                records.append(Record(f"{where}, completions {w} > {l}", image, (prompt,), (answers[w], answers[l])))
    return records


def _mean_rating(ratings):
    """The mean over all aspects, or None if one of them ("N/A") is not a number: Silkie leaves those pairs out."""
    try:
        mean = sum(float(r["Rating"]) for r in ratings.values()) / len(ratings)
    except (TypeError, ValueError):
        return None
    return mean if math.isfinite(mean) else None


def _povid(row, where, images, notes):
    image = find_image(images, row["image"]) if row.get("image") else None
    chosen, rejected = (
        dialogue(row["conversations"], "conversations"),
        dialogue(row["rejected_conversations"], "rejected_conversations"),
    )
    if chosen[:-1] != rejected[:-1]:
        raise BadInput("conversations and rejected_conversations differ before their last turn; only the last answer may.")
    return [Record(where, image, take_placeholder(chosen[:-1], image), (chosen[-1], rejected[-1]))]


def _llava_rlhf(row, where, images, notes):
    image = find_image(images, row["image"]) if row.get("image") else None
    turns = dialogue(row["conversations"], "conversations", -1)  # the last answer is a placeholder, maybe empty
    outputs = [
        text_field((row[k] or {}).get("value") if isinstance(row[k], dict) else None, f"{k}.value")
        for k in ("output_1", "output_2")
    ]
    if row["preference"] not in (1, 2) or isinstance(row["preference"], bool):
        raise BadInput(f"`preference` is {row['preference']!r}; 1 or 2 is needed.")
    return [Record(where, image, take_placeholder(turns, image), tuple(outputs if row["preference"] == 1 else outputs[::-1]))]


def _llava_instruct(row, where, images, notes):
    image = find_image(images, row["image"]) if row.get("image") else None
    turns = dialogue(row["conversations"], "conversations")
    return [Record(where, image, take_placeholder(turns[:-1], image), (turns[-1],))]


LAYOUTS = {  # name: (keys that tell it, reader); the first whose keys are all there
    "rlhf_v": (("text", "origin_dataset"), _rlhf_v),
    "vlfeedback": (("completions", "models"), _vlfeedback),
    "povid": (("conversations", "rejected_conversations"), _povid),
    "llava_rlhf": (("conversations", "output_1", "output_2", "preference"), _llava_rlhf),
    "llava_instruct": (("conversations",), _llava_instruct),
}


@dataclass
class DataFile:
    """What `read` found. refused: [{"row":, "why":}]; notes: how many pairs were left out on purpose, by reason."""

    path: Path
    layout: str
    rows: int
    records: list
    refused: list
    notes: Counter


def read(path, images=None):
    """Read one data file of any known layout, pictures below folder `images` (default: the file's) -> DataFile."""
    path, images = Path(path), Path(images or Path(path).parent)
    records, refused, notes, layout, n = [], [], Counter(), None, 0
    for i, row in rows(path):
        n += 1
        if layout is None and isinstance(row, dict):
            layout = next((name for name, (keys, _) in LAYOUTS.items() if all(k in row for k in keys)), None)
            if layout is None:
                known = "; ".join(f"{name}: {' + '.join(keys)}" for name, (keys, _) in LAYOUTS.items())
                raise BadInput(
                    f"{path}: row {i} has the keys {str(sorted(row)):.200}, which is no known layout; accepted are {known}."
                )
        try:
            if not isinstance(row, dict):
                raise BadInput(f"the row is {type(row).__name__}; an object is needed.")
            keys, reader = LAYOUTS[layout]
            if any(k not in row for k in keys):
                raise BadInput(f"key `{next(k for k in keys if k not in row)}` is missing; the file is in layout {layout}.")
            found = reader(row, f"{path.name}, row {i}", images, notes)
            if found and isinstance(found[0].image, Path):
                _open(found[0].image)  # the header; pixels are decoded when they are needed
            records += found
        except BadInput as error:
            refused.append({"row": i, "why": str(error)})
    if not n:
        raise BadInput(f"{path}: the file holds no row.")
    return DataFile(path, layout, n, records, refused, notes)


def load(paths, images=None, answers=2):
    """Records of all data files, each with this many answers (2: preference pairs, 1: instruction data).

    A row that cannot be used stops the run before it starts, with the count of such rows: nothing is dropped silently.
    """
    records = []
    for path in paths:
        file = read(path, images)
        if file.refused:
            first = file.refused[0]
            more = f" ({len(file.refused)} of {file.rows} rows are refused)" if len(file.refused) > 1 else ""
            raise BadInput(f"{path}, row {first['row']}: {first['why']}{more}")
        for why, count in file.notes.items():
            print(f"{path}: {count} {why}", file=sys.stderr)
        if not file.records:
            raise BadInput(f"{path}: {file.rows} rows of layout {file.layout} give no pair.")
        have = len(file.records[0].answers)
        if have < answers:
            raise BadInput(
                f"{path}: layout {file.layout} is instruction data, one answer a prompt; preference pairs are needed."
            )
        records += [replace(r, answers=r.answers[:answers]) for r in file.records]
    return records


# ---- pictures


def _open(image):
    """Open a picture without decoding it; refuses what is no picture or too large."""
    try:
        file = Image.open(io.BytesIO(image.read()) if isinstance(image, ParquetImage) else image)
    except Exception as error:  # each of Pillow's decoders fails in its own way
        raise BadInput(f"{image}: not a readable picture ({error}).") from None
    if file.width * file.height > MAX_PIXELS or max(file.size) > min(MAX_SIDE, MAX_RATIO * min(file.size)):
        limits = f"{MAX_PIXELS:,} pixels, {MAX_SIDE:,} a side and sides of 1 : {MAX_RATIO}"
        raise BadInput(f"{image}: {file.width} x {file.height} pixels; at most {limits} are read.")
    return file


def open_image(image):
    """A Path or ParquetImage -> RGB picture: EXIF turn applied, transparency on white, 16-bit gray scaled, CMYK converted."""
    file = _open(image)
    try:
        file = ImageOps.exif_transpose(file)
        if file.mode.startswith("I;16"):
            file = Image.fromarray((np.asarray(file) >> 8).astype(np.uint8))
        if file.has_transparency_data:
            file = Image.alpha_composite(Image.new("RGBA", file.size, "white"), file.convert("RGBA"))
        return file.convert("RGB")
    except Exception as error:  # corrupt pixels or EXIF: OSError, SyntaxError, struct.error, TypeError, ...
        raise BadInput(f"{image}: the picture cannot be decoded ({error}).") from None


def image_hash(image):
    """sha256 of what a record's picture is made from; None for a text-only row."""
    if isinstance(image, ParquetImage):
        return f"{_file_hash(image.file)} {image.group} {image.row}"
    return image and _file_hash(image)


_file_hash = functools.lru_cache(maxsize=None)(training.file_hash)
