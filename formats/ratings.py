"""Rated answers: ratings.jsonl as annotate.py writes it, and what its readers take from it.

A line is a prompt with its answers. The names of the attributes are HelpSteer's.

    {"image": "a.png" or null, "turns": ["What is that?"], "reference": ["A cup."],
     "answers": [{"response": "A red cup.", "helpfulness": 4, "correctness": 3, "coherence": 4,
                  "complexity": 1, "verbosity": 0, "reason": "The cup is blue."}, ...]}

turns: the dialogue up to the answer. reference: the data's own answers, best first. An answer whose
rating could not be read has no attribute, and its `reason` says why.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from common import BadInput
from data import Record
from formats.files import ImageFolder, image_folders, rows

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
LOWEST, HIGHEST = 0, 4
BEST = dict.fromkeys(ATTRIBUTES, HIGHEST)
QUALITY = ATTRIBUTES[:3]  # Li et al. 2024 sum these and leave out complexity and verbosity


@dataclass(frozen=True)
class Rated:
    """A prompt, the different answers to it, and for each its {attribute: 0 to 4} or None."""

    record: Record  # its answers are the data's own
    answers: tuple
    ratings: tuple
    reasons: tuple

    def readable(self):
        """[(answer, rating)] of the answers that have a rating."""
        return [(a, r) for a, r in zip(self.answers, self.ratings) if r is not None]


def quality(rating):
    """Helpfulness + correctness + coherence, 0 to 12."""
    return sum(rating[name] for name in QUALITY)


def checked(rating, where):
    """A dict of the five attributes as whole numbers from 0 to 4, or BadInput."""
    for name in ATTRIBUTES:
        value = rating.get(name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not LOWEST <= value <= HIGHEST or value != int(value):
            raise BadInput(
                f"{where}: {name} is {value!r:.40}; a whole number from {LOWEST} to {HIGHEST} "
                "is accepted."
            )
    return {name: int(rating[name]) for name in ATTRIBUTES}


def line_of(rated, image):
    """A Rated -> the dict of its line. image: its path below the folder of images, or None."""
    answers = []
    for answer, rating, reason in zip(rated.answers, rated.ratings, rated.reasons, strict=True):
        answers.append({"response": answer} | (rating or {}) | {"reason": reason})
    record = rated.record
    return {
        "image": image,
        "turns": list(record.turns),
        "reference": list(record.answers),
        "answers": answers,
    }


def rated_of(row, where, folder):
    """A line of ratings.jsonl -> Rated. folder: an `ImageFolder`."""
    if not isinstance(row, dict) or not {"turns", "answers"} <= row.keys():
        raise BadInput("no ratings; a line as annotate.py writes it is accepted.")
    texts = lambda value: isinstance(value, list) and all(isinstance(text, str) for text in value)
    turns, answers, own = row["turns"], row["answers"], row.get("reference", [])
    if not texts(turns) or len(turns) % 2 == 0 or not texts(own):
        raise BadInput(
            f"`turns` {turns!r:.60} and `reference` {own!r:.60}; lists of texts are accepted, the "
            "turns from a user's to a user's."
        )
    if not isinstance(answers, list) or not all(
        isinstance(answer, dict) and isinstance(answer.get("response"), str) for answer in answers
    ):
        raise BadInput(
            f"`answers` is {answers!r:.80}; a list of objects with `response` is needed."
        )

    given = []
    for i, answer in enumerate(answers):
        has = any(name in answer for name in ATTRIBUTES)
        given.append(checked(answer, f"answer {i}") if has else None)
    image = folder.find(row["image"]) if row.get("image") else None
    return Rated(
        Record(where, image, tuple(turns), tuple(own)),
        tuple(answer["response"] for answer in answers),
        tuple(given),
        tuple(answer.get("reason", "") for answer in answers),
    )


def read(path, images=None):
    """ratings.jsonl -> [Rated, ...]. images: the folder of the images; by default the file's."""
    path = Path(path)
    folder = ImageFolder(images or image_folders(path))
    found = []
    for number, row in rows(path):
        where = f"{path.name}, row {number}"
        try:
            found.append(rated_of(row, where, folder))
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None
    folder.report()
    if not found:
        raise BadInput(f"{path}: no line; ratings.jsonl of a run of annotate.py is accepted.")
    return found


# ---- what is made of it


def pair(rated, rng, margin):
    """(chosen, rejected), or None where no two answers differ by `margin` in quality.

    chosen: the best answer; of several the first. rejected: drawn at random among those whose
    quality is at least `margin` lower. The rule of the code of Li et al. 2024.
    """
    readable = rated.readable()
    if not readable:
        return None
    best, rating = max(readable, key=lambda pair: quality(pair[1]))
    worse = [a for a, r in readable if quality(r) <= quality(rating) - margin]
    return (best, rng.choice(worse)) if worse else None


def best(rated, threshold):
    """The answer of the highest quality, of several the first; None below the threshold."""
    readable = rated.readable()
    if not readable:
        return None
    answer, rating = max(readable, key=lambda pair: quality(pair[1]))
    return answer if quality(rating) >= threshold else None


def request(rating):
    """The text that asks for an answer with these attributes, behind the user's last turn.

    SteerLM conditions on it in training and in use. The shape is that of the code of Li et al.
    """
    return "\n" + ",".join(f"{name.capitalize()}:{rating[name]}" for name in ATTRIBUTES)


def instruct_row(record, image, answer, ask=""):
    """A row of LLaVA-Instruct's layout: the record's dialogue with this answer.

    ask: stands behind the user's last turn.
    """
    turns = [*record.turns[:-1], record.turns[-1] + ask, answer]
    if image is not None:
        turns[0] = f"<image>\n{turns[0]}"
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return ({"image": image} if image is not None else {}) | {"conversations": said}


def attributes(text):
    """A `type=` for argparse: "helpfulness=4,verbosity=2" -> a rating; what is not named is 4."""
    rating = dict(BEST)
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in ATTRIBUTES or value not in map(str, range(LOWEST, HIGHEST + 1)):
            raise argparse.ArgumentTypeError(
                f"{part!r:.60} was given; NAME=0 to NAME={HIGHEST} of {', '.join(ATTRIBUTES)} "
                "is accepted"
            )
        rating[name] = int(value)
    return rating


def add_attributes_flag(group, default=None):
    """--attributes, for a model of steerlm.py.

    default: a rating, for training; None in what asks models, with or without adapters.
    """
    rule = (
        "(default: all 4)"
        if default
        else "(default: the prompt as it is). The request goes to a model with an adapter, or to "
        "one given without --adapter; the base beside an adapter is asked plainly."
    )
    group.add_argument(
        "--attributes",
        type=attributes,
        default=default,
        metavar="NAME=0..4,...",
        help=f"ratings that the prompt asks a model of steerlm.py for, of {', '.join(ATTRIBUTES)}; "
        f"what is not named is 4 {rule}",
    )
