"""AlpacaEval (Li et al. 2023): 805 instructions, text only; which of two outputs is better?

Facts from alpaca_eval 0.6.6: metrics/helpers.py, metrics/winrate.py.

    the evaluation set      an array of {"instruction", "output", "generator"}: the baseline's
                            outputs (text_davinci_003 in AlpacaEval 1, gpt4_1106_preview in 2).
                            --references takes the outputs of another baseline, in the same layout
    a model's outputs       the same layout; AlpacaEval's own tool reads it
    annotations.json        {"instruction", "output_1", "output_2", "preference"}: 1 if output_1,
                            the baseline's, is better, 2 if output_2, 1.5 (or 0) for a draw

The win rate is the mean of preference - 1, x 100, over the annotations that have one. In the
discrete win rate a preference above 1.5 is a win, one of 1.5 half a win.

The judge here is no annotator of AlpacaEval's: it compares the two outputs in both orders, in our
words, and what it prefers in one order alone counts half. The length-controlled win rate of
AlpacaEval 2 needs its tool and its fitted coefficients.
"""

import re
from pathlib import Path

import numpy as np

from common import write_json
from formats.benchmarks import Question, Request, ids_differ, in_order, read_rows, share
from formats.files import need

MAX_TOKENS, TEMPERATURE, RETRIES, CUE = 1024, 0.0, (), ""
MAIN = ("win_rate", "discrete_win_rate")
ORDERS = ("baseline first", "baseline second")
VERDICT = re.compile(r"\W*better:\W*(?:response )?(1|2|equal)\W*", re.IGNORECASE)

PROMPT = """You are an expert in comparing what AI assistants answer to instructions.

The instruction:
{instruction}

Response 1:
{first}

Response 2:
{second}

Which response is better? It follows the instruction, is true, and is helpful to the person who \
gave it. The order of the responses and their length mean nothing.

Your first line must be one of "Better: 1", "Better: 2" or "Better: equal". \
Then give the reason in one sentence."""


def read(path, context=None, references=None):
    """The evaluation set -> questions with the baseline's output."""
    questions = [question_of(where, row) for where, row in read_rows(path)]
    ids_differ(questions, path)
    if references:
        for q, (text,) in zip(questions, read_answers(references, questions)):
            q.about["reference"] = text
    return questions


def question_of(where, row):
    """A row of the evaluation set -> Question."""
    asked = instruction_of(where, row)
    image = need(row, "image", str, where) if "image" in row else None
    groups = (need(row, "dataset", str, where),) if row.get("dataset") else ()
    about = {"reference": need(row, "output", str, where, empty=True), "row": row}
    return Question(id_of(where, row), where, image, (asked,), groups, about)


def id_of(where, row):
    """What a row is matched by: the instruction with its `input`, and the image if it has one."""
    asked = instruction_of(where, row)
    return (asked, need(row, "image", str, where)) if row.get("image") else asked


def instruction_of(where, row):
    """What a row asks."""
    more = row.get("input")
    return need(row, "instruction", str, where) + (f"\n\n{more}" if more else "")


def remarks(questions):
    """What makes the figures differ from others."""
    return [] if len(questions) == 805 else [f"{len(questions)} instructions; AlpacaEval has 805"]


def read_answers(path, questions):
    """A model's outputs -> [(output,)]."""
    given = []
    for where, row in read_rows(path):
        output = need(row, "output", str, where, empty=True)
        given.append((id_of(where, row), (output,)))
    return in_order(questions, given, path, "output")


def named(question):
    """What a row of an outputs or annotations file says of its question."""
    row = question.about["row"]
    return {k: row[k] for k in ("instruction", "input", "image", "dataset") if k in row}


def write_answers(folder, questions, answers, name):
    """alpaca_eval.json, for `alpaca_eval --model_outputs`."""
    outputs = [
        named(q) | {"output": text, "generator": name} for q, (text,) in zip(questions, answers)
    ]
    write_json(Path(folder) / "alpaca_eval.json", outputs)


def requests(question, answer):
    """Two requests, one an order."""
    pair = [question.about["reference"], answer[0]]
    made = []
    for part, (first, second) in zip(ORDERS, (pair, pair[::-1])):
        text = PROMPT.format(instruction=question.turns[0], first=first, second=second)
        made.append(Request(part, text, tuple((question.turns, t) for t in (first, second))))
    return made


def official(reply, part=""):
    """(how far the model's output wins, 0 to 1), or None.

    part: an order, in which the reply is a verdict; "" for a preference of AlpacaEval's own file.
    """
    if part not in ORDERS:
        try:
            preference = float(reply)
        except ValueError:
            return None
        preference = 1.5 if preference == 0 else preference
        return (preference - 1,) if 1 <= preference <= 2 else None
    lines = [VERDICT.fullmatch(line) for line in reply.splitlines()]
    found = [match[1].lower() for match in lines if match]
    if len(found) != 1:
        return None
    second = {"1": 0.0, "equal": 0.5, "2": 1.0}[found[0]]  # how far response 2 wins
    return (second if part == ORDERS[0] else 1 - second,)


readable = official


def in_words(grades):
    """The reply of a judge that knows the truth: [(share told, errors)] of both -> a verdict.

    Fewer errors are better; among equal errors, more that is told.
    """
    (first, errors_1), (second, errors_2) = grades
    order = (-errors_1, first), (-errors_2, second)
    return "Better: " + ("equal" if order[0] == order[1] else str(1 + (order[1] > order[0])))


def values(question, scores):
    """How far the model wins, the same as win, half a win or none, and 1; zeros without a score."""
    if None in scores:
        return [0, 0, 0]
    wins = sum(s[0] for s in scores) / len(scores)
    return [wins, 0.5 + 0.5 * np.sign(wins - 0.5), 1]


def figures(sums, groups):
    """Win rate and discrete win rate of all, and the win rate of each data set; 0 to 100."""
    wins, discrete, n = np.moveaxis(sums, -1, 0)  # (..., G) each
    named = {
        "win_rate": 100 * share(wins, n)[..., 0],
        "discrete_win_rate": 100 * share(discrete, n)[..., 0],
    }
    return named | {g: 100 * share(wins, n)[..., k] for k, g in enumerate(groups) if k}


def read_reviews(path, questions):
    """annotations.json -> preferences as texts."""
    given = [(id_of(where, row), [str(row.get("preference"))]) for where, row in read_rows(path)]
    return in_order(questions, given, path, "annotation")


def write_reviews(folder, questions, replies, name, judge):
    """alpaca_eval_reviews.json, in the layout of annotations.json."""
    rows = []
    for q, texts in zip(questions, replies):
        wins = [official(text, part) for text, part in zip(texts, ORDERS)]
        row = named(q) | {"annotator": judge, "generator_2": name}
        row["preference"] = None if None in wins else 1 + sum(w[0] for w in wins) / 2
        rows.append(row)
    write_json(Path(folder) / "alpaca_eval_reviews.json", rows)
