"""Whole data sets: files in any layout -> records -> examples. Every unused row is reported.

rows = dataset.read(args.data, args.images, answers=2, skip_bad_rows=args.skip_bad_rows)
model, processor = ...                 # large, so the files are read before it is loaded
examples = rows.encode(processor)      # rows.skipped: what was left out, for skipped.json
"""

import hashlib
import os
import random
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from common import BadInput
from data import Example
from formats import layouts, pictures


@dataclass
class Rows:
    """The records of a data set, and the rows that were left out: [{"file":, "row":, "why":}]."""

    records: list
    skip_bad_rows: bool = False
    skipped: list = field(default_factory=list)

    def leave_out(self, rows, total):
        """Report rows that cannot be used, out of `total`, of which at least one must remain.

        Without skip_bad_rows the first of them stops the run.
        """
        if not rows:
            return
        first = rows[0]
        where = f"{first['file']}, row {first['row']}: {first['why']}"
        if not self.skip_bad_rows or len(rows) >= total:
            raise BadInput(
                f"{where} ({len(rows)} of {total} rows are refused; "
                "--skip-bad-rows goes on without them)"
            )
        print(f"{len(rows)} of {total} rows are skipped, first {where}", file=sys.stderr)
        self.skipped += rows

    def draw(self, n, seed):
        """Keep n of the records, drawn by the seed, in their order; n None keeps all."""
        total = len(self.records)
        if n is None:
            return
        if n > total:
            raise BadInput(f"--subset {n}: the data have {total} rows to draw from.")
        kept = sorted(random.Random(f"{seed}/subset").sample(range(total), n))
        self.records = [self.records[i] for i in kept]
        names = hashlib.sha256("\n".join(r.where for r in self.records).encode()).hexdigest()[:8]
        print(f"--subset: {n} of {total} rows, drawn by seed {seed} ({names})", file=sys.stderr)

    def check_images(self, how):
        """Leave out the rows whose image cannot be read; how: see `formats/pictures.py`."""
        why = pictures.unreadable([r.image for r in self.records], how)
        bad = [located(r.where, why[r.image]) for r in self.records if r.image in why]
        self.leave_out(bad, len(self.records))
        self.records = [r for r in self.records if r.image not in why]

    def encode(self, processor, every_turn=False, prompts_only=False, room=0):
        """Records -> Examples.

        every_turn: score all assistant turns, see `Processor.encode`.
        prompts_only: encode no answer; they stay in the records.
        room: tokens that must be left for an answer after the prompt.
        """
        encoded = [encode(processor, r, every_turn, prompts_only) for r in self.records]
        refused = [located(r.where, why) for r, (_, why) in zip(self.records, encoded) if why]
        self.leave_out(refused, len(self.records))
        examples = [example for example, why in encoded if not why]
        return self.with_room(processor, examples, room) if room else examples

    def with_room(self, processor, examples, room):
        """The examples whose prompt leaves room for an answer of so many tokens."""
        limit = processor.max_length
        fits = [len(e.prompt) + room <= limit for e in examples]
        why = f"the prompt leaves no room for --max-new-tokens {room}; the limit is {limit} tokens"
        refused = [located(e.record.where, why) for e, good in zip(examples, fits) if not good]
        self.leave_out(refused, len(examples))
        return [e for e, good in zip(examples, fits) if good]


def read(
    files,
    images=None,
    answers=2,
    skip_bad_rows=False,
    subset=(None, 0),
    unique=None,
    needs_image="",
    check_images=None,
):
    """Data files -> Rows.

    answers: how many a row must have (2: preference pairs, 1: instruction data or prompts).
    skip_bad_rows: leave out a row that cannot be used; without it, such a row stops the run.
    subset: (how many records are drawn of those that are left, or None for all; the seed).
    unique: a function of a record; of several records with equal values the first is kept.
    needs_image: what for; a text-only row is then one that cannot be used.
    check_images: "full" or "header", see formats/pictures.py; None looks at no image.
    """
    rows = Rows([], skip_bad_rows)
    for path in files:
        file = layouts.read(path, images)
        rows.leave_out([{"file": file.path.name, **row} for row in file.refused], file.rows)
        for why, count in file.notes.items():
            print(f"{path}: {count} {why}", file=sys.stderr)
        if not file.records:
            raise BadInput(f"{path}: {file.rows} rows of layout {file.layout} give no pair.")
        if len(file.records[0].answers) < answers:
            raise BadInput(
                f"{path}: layout {file.layout} is instruction data, one answer a prompt; "
                "preference pairs are needed."
            )
        text_only = sum(r.image is None for r in file.records)
        if text_only:
            print(f"{path}: {text_only} of {len(file.records)} have no picture", file=sys.stderr)
        rows.records += [replace(r, answers=r.answers[:answers]) for r in file.records]

    if needs_image:
        why = f"no image, which {needs_image}"
        without = [located(r.where, why) for r in rows.records if r.image is None]
        rows.leave_out(without, len(rows.records))
        rows.records = [r for r in rows.records if r.image is not None]
    if unique:
        first = {}
        for record in rows.records:
            first.setdefault(unique(record), record)
        if len(first) < len(rows.records):
            print(f"{len(rows.records) - len(first)} rows repeat another row", file=sys.stderr)
        rows.records = list(first.values())

    rows.draw(*subset)
    rows.check_images(check_images)
    return rows


def encode(processor, record, every_turn=False, prompts_only=False):
    """Record -> (Example, None), or (None, why it cannot be encoded)."""
    try:
        bare = replace(record, answers=()) if prompts_only else record
        return replace(processor.encode(bare, every_turn), record=record), None
    except BadInput as error:
        return None, str(error).removeprefix(f"{record.where}: ")


def share_prompt(examples):
    """Examples of one image, or of one text, -> packed rows that share the start of the prompts.

    Each stays its own dialogue, invisible to the others: the loss is that of separate rows, for a
    fraction of the tokens.
    """
    groups = {}
    alike = texts_alike([e for e in examples if e.record.image is None])
    for e in examples:
        image = e.record.image
        groups.setdefault(alike[id(e)] if image is None else image, []).append(e)

    shared = []
    for group in groups.values():
        first = group[0].prompt
        common = min(len(e.prompt) for e in group)
        for e in group[1:]:
            differ = (e.prompt[:common] != first[:common]).nonzero()
            common = int(differ[0]) if len(differ) else common
        answers, scored = [], []
        for e in group:
            rest = e.prompt[common:]
            unscored = torch.zeros(len(rest), dtype=torch.bool)
            answers += [torch.cat([rest, a]) for a in e.answers]
            scored += [torch.cat([unscored, s]) for s in e.scored]
        shared.append(Example(first[:common], answers, scored, group[0].record))
    return shared


def texts_alike(examples):
    """Text-only examples -> {id(example): number of its group}.

    A group's prompts share their beginning, such as a passage with several questions: at least half
    of what stands behind the beginning that all text-only prompts have, the system's sentence.
    """
    prompts = {id(e): e.prompt.tolist() for e in examples}
    order = sorted(prompts, key=prompts.get)
    same = lambda a, b: len(os.path.commonprefix([prompts[a], prompts[b]]))
    system = same(order[0], order[-1]) if order else 0  # the first and the last in order

    group, first = {}, None
    for i, key in enumerate(order):
        needed = (system + len(prompts[key])) / 2
        if first is None or same(first, key) < needed:
            first = key
        group[key] = i if first == key else group[first]
    return group


def located(where, why):
    """`Record.where` and a reason -> {"file":, "row":, "why":}, as skipped.json lists it."""
    file, row, part = re.fullmatch(r"(.*?), row (\d+)(.*)", where, re.DOTALL).groups()
    return {"file": file, "row": int(row), "why": f"{part.strip(', ')}: {why}" if part else why}


def images_folder(records, files, images=None):
    """The folder below which all images of these records lie that are files of their own.

    That is --images or the first data file's folder. Where some lie elsewhere, because each data
    file has its own, it is the nearest folder above all of them.
    """
    folder = os.path.abspath(images or Path(files[0]).parent)
    paths = [os.path.abspath(r.image) for r in records if isinstance(r.image, Path)]
    above = os.path.commonpath([folder, *map(os.path.dirname, paths)])
    if above == folder:
        return Path(folder)
    return Path(os.path.commonpath([os.path.dirname(path) for path in paths]))


def image_name(image, images, out):
    """An image's path below the folder `images`; None for a text-only row.

    One inside a parquet file is written to out/images first, under its file and row.
    """
    if image is None:
        return None
    if not hasattr(image, "read"):
        return Path(os.path.abspath(image)).relative_to(images).as_posix()
    encoded = image.read()
    path = out / "images" / f"{Path(image.file).stem}_{image.row}.jpg"
    if path.exists() and path.read_bytes() != encoded:  # another file of the same name
        path = path.with_stem(hashlib.sha256(encoded).hexdigest()[:16])
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(encoded)
    return path.name
