"""Whole data sets: files in any layout -> examples, with every row that cannot be used reported."""

import re
import sys
from dataclasses import replace
from pathlib import Path

from common import BadInput
from formats import layouts


def load(
    processor,
    files,
    images=None,
    answers=2,
    skip_bad_rows=False,
    every_turn=False,
    prompts_only=False,
    unique=None,
    needs_image="",
    room=0,
):
    """Data files -> (Examples, rows that were skipped as [{"file":, "row":, "why":}]).

    answers: how many a row must have (2: preference pairs, 1: instruction data or prompts).
    skip_bad_rows: leave out a row that cannot be used; without it, such a row stops the run.
    every_turn: score all assistant turns, see `Processor.encode`.
    prompts_only: encode no answer; they stay in the records.
    unique: a function of a record; of several records with equal values the first is kept.
    needs_image: what for; a text-only row is then one that cannot be used.
    room: tokens that must be left for an answer after the prompt.
    """
    bad = BadRows(skip_bad_rows)

    # 1. read
    records = []
    for path in files:
        records += read_records(path, images, answers, bad)
    if needs_image:
        why = f"no image, which {needs_image}"
        bad.add([located(r.where, why) for r in records if r.image is None], len(records))
        records = [r for r in records if r.image is not None]
    if unique:
        records = without_repeats(records, unique)

    # 2. encode
    encoded = [encode(processor, r, every_turn, prompts_only) for r in records]
    reasons = [(r.where, why) for r, (_, why) in zip(records, encoded) if why]
    bad.add([located(where, why) for where, why in reasons], len(records))
    examples = [example for example, why in encoded if not why]

    # 3. leave room for what will be sampled
    if room:
        limit = processor.max_length
        why = f"the prompt leaves no room for --max-new-tokens {room}; the limit is {limit} tokens"
        too_long = [e for e in examples if len(e.prompt) + room > limit]
        bad.add([located(e.record.where, why) for e in too_long], len(examples))
        examples = [e for e in examples if len(e.prompt) + room <= limit]
    return examples, bad.skipped


class BadRows:
    """Rows that cannot be used: the first stops the run, or with `skip` they are collected."""

    def __init__(self, skip):
        self.skip, self.skipped = skip, []

    def add(self, rows, total):
        """rows: [{"file":, "row":, "why":}] out of `total`, of which at least one must remain."""
        if not rows:
            return
        first = rows[0]
        where = f"{first['file']}, row {first['row']}: {first['why']}"
        if not self.skip or len(rows) >= total:
            raise BadInput(
                f"{where} ({len(rows)} of {total} rows are refused; "
                "--skip-bad-rows goes on without them)"
            )
        print(f"{len(rows)} of {total} rows are skipped, first {where}", file=sys.stderr)
        self.skipped += rows


def located(where, why):
    """`Record.where` and a reason -> {"file":, "row":, "why":}, as skipped.json lists it."""
    file, row, part = re.fullmatch(r"(.*?), row (\d+)(.*)", where, re.DOTALL).groups()
    return {"file": file, "row": int(row), "why": f"{part.strip(', ')}: {why}" if part else why}


def read_records(path, images, answers, bad):
    """The records of one file, each with this many answers."""
    file = layouts.read(path, images)
    bad.add([{"file": file.path.name, **row} for row in file.refused], file.rows)
    for why, count in file.notes.items():
        print(f"{path}: {count} {why}", file=sys.stderr)
    if not file.records:
        raise BadInput(f"{path}: {file.rows} rows of layout {file.layout} give no pair.")
    if len(file.records[0].answers) < answers:
        raise BadInput(
            f"{path}: layout {file.layout} is instruction data, one answer a prompt; "
            "preference pairs are needed."
        )
    return [replace(r, answers=r.answers[:answers]) for r in file.records]


def without_repeats(records, key):
    """The first record for each value of `key`."""
    unique = {}
    for record in records:
        unique.setdefault(key(record), record)
    if len(unique) < len(records):
        print(f"{len(records) - len(unique)} rows repeat another row", file=sys.stderr)
    return list(unique.values())


def encode(processor, record, every_turn=False, prompts_only=False):
    """Record -> (Example, None), or (None, why it cannot be encoded)."""
    try:
        bare = replace(record, answers=()) if prompts_only else record
        return replace(processor.encode(bare, every_turn), record=record), None
    except BadInput as error:
        return None, str(error).removeprefix(f"{record.where}: ")


def images_folder(files, images=None):
    """The folder below which the images of a data set lie: --images, or the first file's folder."""
    return Path(images or Path(files[0]).parent)
