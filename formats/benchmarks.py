"""What the benchmarks with a judge have in common: questions, what a judge is asked, sums by group.

Each benchmark is a file of its own: mmhal.py, llava_bench.py, mm_vet.py, mt_bench.py,
alpaca_eval.py. It holds what is published of it: the layouts of its files, what its judge reads,
how the judge's reply becomes numbers, and what is computed of these. eval_judge.py asks and
reports.

    read(path, context, references) -> [Question]
    read_answers(path, questions)   -> [(text of turn 1, ...)], in the order of the questions
    write_answers(folder, questions, answers, name)     in the official layout
    requests(question, answer)      -> [Request], one a reply of the judge
    official(reply, part), readable(reply, part)        -> numbers of a reply, or None
    in_words(grades)                -> the reply of a judge that knows the truth
    values(question, scores)        -> V numbers, of one question, that are summed
    figures(sums, groups)           -> {figure: value}, from sums (..., G, V)
    read_reviews(path, questions)   -> [replies], from the official judge's own file
    write_reviews(folder, questions, replies, name, judge)      in the official layout

The official rule often makes a number of a reply that cannot be read (0 in MMHal-Bench, -1 in
LLaVA-Bench). `official` does as it does. `readable` is the rule of eval_judge.py: a reply without a
readable score counts nowhere.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common import BadInput
from formats.files import rows


@dataclass(frozen=True)
class Question:
    """One question of a benchmark, and what its judge is told beside it."""

    id: object  # as in the file
    where: str  # file and row, for messages
    image: str | None  # as the file names it
    turns: tuple  # what the user says
    groups: tuple  # of which it is one: its type, its capabilities
    about: dict = field(default_factory=dict)  # reference answer, context, ...


@dataclass(frozen=True)
class Request:
    """What the judge is asked at once."""

    part: str  # which of the question's replies it is: "turn 2"; "" where there is one
    text: str
    said: tuple  # ((turns up to the answer), answer) of each answer that is judged, as in the text


def read_rows(path):
    """Rows of a JSON or JSON-lines file, each an object -> [(where, row)]."""
    found = []
    for i, row in rows(Path(path)):
        if not isinstance(row, dict):
            raise BadInput(f"{path}, row {i}: {row!r:.80}; an object is needed.")
        found.append((f"{path}, row {i}", row))
    if not found:
        raise BadInput(f"{path}: the file holds no row.")
    return found


def ids_differ(questions, path):
    """The questions, if no two have the same id."""
    seen = {}
    for q in questions:
        if q.id in seen:
            raise BadInput(f"{q.where}: the id {q.id!r:.80} stands in {seen[q.id]} already.")
        seen[q.id] = q.where
    if not questions:
        raise BadInput(f"{path}: the file holds no question.")
    return questions


def in_order(questions, given, path, what="answer"):
    """[(id, thing)] -> the things in the order of the questions, one each."""
    found = {}
    for key, thing in given:
        if key in found:
            raise BadInput(f"{path}: the question {key!r:.80} has two {what}s; one is needed.")
        found[key] = thing
    wanted = {q.id for q in questions}
    missing = [q.id for q in questions if q.id not in found]
    unknown = [key for key in found if key not in wanted]
    if missing or unknown:
        parts = [f"{missing[0]!r:.80} has none"] if missing else []
        parts += [f"{unknown[0]!r:.80} is none of the questions"] if unknown else []
        raise BadInput(
            f"{path}: {len(found)} {what}s to {len(questions)} questions, matched by their ids: "
            f"{', '.join(parts)}."
        )
    return [found[q.id] for q in questions]


def group_names(questions):
    """ "all", and then the groups of the questions, in the order in which they appear."""
    return ["all", *dict.fromkeys(name for q in questions for name in q.groups)]


def in_groups(questions, values):
    """Values (n, V), one row a question -> units (U, G, V), one an image, and the G names.

    A question without an image is a unit of its own. Its values stand in "all" and in its groups.
    """
    names = group_names(questions)
    values = np.asarray(values, dtype=float)
    units = {}
    for i, q in enumerate(questions):
        units.setdefault(q.image if q.image is not None else ("question", i), len(units))
    sums = np.zeros((len(units), len(names), values.shape[1]))
    for i, q in enumerate(questions):
        unit = units[q.image if q.image is not None else ("question", i)]
        for name in ("all", *q.groups):
            sums[unit, names.index(name)] += values[i]
    return sums, names


def share(part, whole):
    """part / whole, and 0 where the whole is 0."""
    return np.where(whole == 0, 0.0, part / np.where(whole == 0, 1, whole))
