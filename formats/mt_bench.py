"""MT-Bench (Zheng et al. 2023): 80 questions of two turns, text only; a judge gives 1 to 10 a turn.

Facts from fastchat/llm_judge of FastChat: common.py, gen_judgment.py, show_result.py.

    question.jsonl          {"question_id", "category", "turns": [two texts]}
    gpt-4.jsonl             reference answers in the layout of a model's answers; math, reasoning
                            and coding need them
    a model's answers       {"question_id", "model_id", "choices": [{"turns": [two texts]}]}
    the judge's file        {"question_id", "model", "judge", "user_prompt", "judgment", "score",
                            "turn"}, a line a turn

Single grading: the judge reads the question and the answer; for the second turn the whole dialogue.
Official parse: the first [[number]], else the first [number], else -1, which is left out. The score
is the mean over both turns. Answers are drawn at the temperature of their category.

An `image` of a question (no official one has it) is shown to the model: Li et al. 2024 measured how
far an irrelevant picture disturbs.
"""

import json
import re
import time
from pathlib import Path

import numpy as np

from common import BadInput, write_text
from formats.benchmarks import Question, Request, ids_differ, in_order, read_rows, share
from formats.files import need, number_or_text

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
                "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}  # fmt: skip
OTHER = 0.7  # of a category that is none of these
NEED_REFERENCE = ("math", "reasoning", "coding")
MAX_TOKENS, TEMPERATURE, RETRIES, CUE = 2048, 0.0, (), ""
MAIN = ("score", "turn 1", "turn 2")
DOUBLE, SINGLE = re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]")

ASKED = """You are a fair judge of what an AI assistant answers. Rate the answer{place} below. \
{what} Explain your judgement shortly first. Be objective. Then rate the answer from 1 to 10, in \
exactly this format: "[[rating]]", for example "Rating: [[5]]".

"""
GENERAL = "Consider how helpful, relevant, accurate, deep, creative and detailed it is."
AGAINST_REFERENCE = (
    "Consider whether it is correct and helpful. You are given a reference answer: compare the two "
    "first, and name and correct the mistakes."
)


def read(path, context=None, references=None):
    """question.jsonl with its reference answers."""
    questions = []
    for where, row in read_rows(path):
        turns = row.get("turns")
        texts = isinstance(turns, list) and all(isinstance(t, str) and t.strip() for t in turns)
        if not texts or len(turns) != 2:
            raise BadInput(f"{where}: `turns` is {turns!r:.80}; a list of two texts is needed.")
        number = number_or_text(row, "question_id", where)
        image = need(row, "image", str, where) if "image" in row else None
        category = need(row, "category", str, where)
        questions.append(Question(number, where, image, tuple(turns), (category,), {}))
    ids_differ(questions, path)

    known = dict(answers_in(references)) if references else {}
    for q in questions:
        if q.groups[0] in NEED_REFERENCE and q.id not in known:
            raise BadInput(
                f"{q.where}: {', '.join(NEED_REFERENCE)} are judged beside a reference answer; "
                f"--references {references or '(reference_answer/gpt-4.jsonl)'} has none."
            )
        if q.groups[0] in NEED_REFERENCE:
            q.about["reference"] = known[q.id]
    return questions


def remarks(questions):
    """What makes the figures differ from others."""
    return [] if len(questions) == 80 else [f"{len(questions)} questions; MT-Bench has 80"]


def temperature(question):
    """At which the question is answered."""
    return TEMPERATURES.get(question.groups[0], OTHER)


def answers_in(path):
    """[(question_id, (text of turn 1, of turn 2))] of an answers file."""
    given = []
    for where, row in read_rows(path):
        try:
            turns = row["choices"][0]["turns"]
        except (LookupError, TypeError):
            turns = None
        if not isinstance(turns, list) or list(map(type, turns)) != [str, str]:
            raise BadInput(f"{where}: choices[0].turns, a list of two texts, is needed.")
        given.append((number_or_text(row, "question_id", where), tuple(turns)))
    return given


def read_answers(path, questions):
    """A model's answers -> [(text of turn 1, of turn 2)]."""
    return in_order(questions, answers_in(path), path)


def write_answers(folder, questions, answers, name):
    """mt_bench.jsonl, FastChat's model_answer/<model>.jsonl."""
    lines = []
    for q, texts in zip(questions, answers):
        row = {"question_id": q.id, "answer_id": str(q.id), "model_id": name}
        row |= {"choices": [{"index": 0, "turns": list(texts)}], "tstamp": time.time()}
        lines.append(json.dumps(row) + "\n")
    write_text(Path(folder) / "mt_bench.jsonl", "".join(lines))


def dialogue(who, turns, answers, title):
    """A dialogue between two marks, as the judge reads it."""
    parts = [f"### User:\n{t}\n\n### {title}:\n{a}" for t, a in zip(turns, answers)]
    return f"<|Start of {who}|>\n\n" + "\n\n".join(parts) + f"\n\n<|End of {who}|>"


def requests(question, answer):
    """Two requests: the first turn; the second, with the whole dialogue."""
    turns, reference = question.turns, question.about.get("reference")
    what = AGAINST_REFERENCE if reference else GENERAL

    # turn 1
    text = ASKED.format(place=" to the question", what=what) + f"[Question]\n{turns[0]}\n\n"
    if reference:
        text += f"[Start of Reference Answer]\n{reference[0]}\n[End of Reference Answer]\n\n"
    text += f"[Start of Assistant's Answer]\n{answer[0]}\n[End of Assistant's Answer]"
    first = Request("turn 1", text, ((turns[:1], answer[0]),))

    # turn 2
    text = ASKED.format(place=" to the second question of the user", what=what)
    if reference:
        text += dialogue("Reference Answer", turns, reference, "Reference answer") + "\n\n\n"
    text += dialogue("Assistant's Conversation with User", turns, answer, "Assistant")
    said = ((turns[0], answer[0], turns[1]), answer[1])
    return [first, Request("turn 2", text, (said,))]


def official(reply, part=""):
    """(rating,), or None, which is left out."""
    match = DOUBLE.search(reply) or SINGLE.search(reply)
    return (float(match[1]),) if match else None


readable = official


def in_words(grades):
    """The reply of a judge that knows the truth: [(share told, errors)] -> a rating."""
    ((told, errors),) = grades
    return f"Rating: [[{1 + round(9 * told / (1 + errors))}]]"


def values(question, scores):
    """Of each turn its score and 1; zeros without a score."""
    return [x for s in scores for x in ((0, 0) if s is None else (s[0], 1))]


def figures(sums, groups):
    """Mean rating, that of each turn, and that of each category; 1 to 10."""
    first, n_first, second, n_second = np.moveaxis(sums, -1, 0)  # (..., G) each
    score = share(first + second, n_first + n_second)
    named = {
        "score": score[..., 0],
        "turn 1": share(first, n_first)[..., 0],
        "turn 2": share(second, n_second)[..., 0],
    }
    return named | {g: score[..., k] for k, g in enumerate(groups) if k}


def read_reviews(path, questions):
    """FastChat's judgments of one model -> replies to turn 1 and turn 2."""
    given, models = {}, {}
    for where, row in read_rows(path):
        models.setdefault(str(row.get("model")), where)
        if len(models) > 1:
            raise BadInput(
                f"{where}: a second model, {row.get('model')!r:.80}; a file each is needed."
            )
        turn = row.get("turn")
        if turn not in (1, 2):
            raise BadInput(f"{where}: `turn` is {turn!r:.80}; 1 or 2 is needed.")
        number = number_or_text(row, "question_id", where)
        turns = given.setdefault(number, {})
        if turn in turns:
            raise BadInput(f"{where}: question {number} has two judgments of turn {turn}.")
        turns[turn] = need(row, "judgment", str, where, empty=True)
    for key, turns in given.items():
        if len(turns) < 2:
            raise BadInput(f"{path}: question {key} has a judgment of one turn; two are needed.")
    return in_order(questions, [(k, [t[1], t[2]]) for k, t in given.items()], path, "judgment")


def write_reviews(folder, questions, replies, name, judge):
    """mt_bench_reviews.jsonl, which FastChat's show_result.py reads; -1 where there is no score."""
    lines = []
    for q, texts in zip(questions, replies):
        kind = "single-math-v1" if "reference" in q.about else "single-v1"
        for turn, text in enumerate(texts, 1):
            (score,) = official(text) or (-1,)
            row = {
                "question_id": q.id,
                "model": name,
                "judgment": text,
                "score": score,
                "turn": turn,
            }
            row["judge"] = [judge, kind + ("-multi-turn" if turn == 2 else "")]
            lines.append(json.dumps(row) + "\n")
    write_text(Path(folder) / "mt_bench_reviews.jsonl", "".join(lines))
