"""LLaVA-Bench (Liu et al. 2023), in the wild (60 questions) or COCO (90): two answers get 1 to 10.

Facts from LLaVA's llava/eval: eval_gpt_review_bench.py, eval_gpt_review_visual.py,
summarize_gpt_review.py.

    questions.jsonl         {"question_id", "image", "text", "category"}: conv, detail, complex
    context.jsonl           {"image", "caption"}; of COCO {"image", "captions", "instances"}
    answers_gpt4.jsonl      {"question_id", "text"}, the reference: answers of a text-only GPT-4,
                            which read the context
    the judge's file        {"question_id", "category", "content", "tuple"}, a line a question

The judge reads no picture, but the context, the reference as Assistant 1 and the model's answer as
Assistant 2. Reported is 100 x mean score of the model / mean score of the reference: a ratio of
means, not a mean of ratios. The means are rounded to three digits before.

Official parse: the first line, commas as spaces, split at single spaces, must give two numbers;
else both scores are -1, and enter the means. So "8, 7", which has two spaces then, is -1, -1; and a
judge of whom nothing can be read gives 100 %. The readable figures take the first line's two
numbers, separated by a comma, spaces or both, and leave out replies without them.
"""

import json
import re
from pathlib import Path

import numpy as np

from common import BadInput, write_text
from formats.benchmarks import Question, Request, ids_differ, in_order, read_rows, share
from formats.files import need, number_or_text

CATEGORIES = ("conv", "detail", "complex")
MAX_TOKENS, TEMPERATURE, RETRIES, CUE = 1024, 0.2, (), ""
MAIN = ("relative", *(f"{name} relative" for name in CATEGORIES))
PAIR = re.compile(r"\W*(\d+(?:\.\d+)?)(?:\s*,\s*|\s+)(\d+(?:\.\d+)?)\W*")

PROMPT = """[Context]
{context}

[Question]
{question}

[Assistant 1]
{first}

[End of Assistant 1]

[Assistant 2]
{second}

[End of Assistant 2]

[System]
Above are a user's question about an image and the answers of two AI assistants. You do not see \
the image; {told}
Rate how helpful, relevant, accurate and detailed each answer is. Give each assistant one overall \
score from 1 to 10; higher is better.
Your first line must hold nothing but the two scores, that of Assistant 1 and then that of \
Assistant 2, separated by a space. From the next line on explain your ratings. Take care that the \
order of the answers does not sway you.

"""
WILD = "the context describes it in a few sentences."
COCO = (
    "the context describes it in five sentences and lists its objects with their boxes "
    "(x1, y1, x2, y2): left, top, right and bottom edge as numbers from 0 to 1."
)


def read(path, context=None, references=None):
    """Questions with the context of their image and the reference answer."""
    if not context or not references:
        raise BadInput(
            "LLaVA-Bench needs --context (context.jsonl; of COCO caps_boxes_coco2014_val_80.jsonl) "
            "and --references (answers_gpt4.jsonl)."
        )
    described = {}
    for where, row in read_rows(context):
        described[need(row, "image", str, where)] = context_of(row, where)
    questions = []
    for where, row in read_rows(path):
        image, asked = need(row, "image", str, where), need(row, "text", str, where)
        category = need(row, "category", str, where)
        if category not in CATEGORIES:
            raise BadInput(
                f"{where}: `category` is {category!r}; accepted are {', '.join(CATEGORIES)}."
            )
        if image not in described:
            raise BadInput(f"{where}: {context} holds no context of {image}.")
        number = number_or_text(row, "question_id", where)
        about = dict(zip(("context", "told"), described[image]))
        questions.append(Question(number, where, image, (asked,), (category,), about))
    ids_differ(questions, path)
    for q, (text,) in zip(questions, read_answers(references, questions)):
        q.about["reference"] = text
    return questions


def context_of(row, where):
    """(what the judge reads of an image, what it is told that this is)."""
    if "instances" in row:
        try:
            boxes = "\n".join(f"{thing['category']}: {thing['bbox']}" for thing in row["instances"])
            return "\n".join(row["captions"]) + "\n\n" + boxes, COCO
        except (LookupError, TypeError):
            raise BadInput(
                f"{where}: `captions` (texts) and `instances` (category and bbox of each) are needed."
            ) from None
    caption = row.get("caption")
    if isinstance(caption, list):
        caption = "\n".join(map(str, caption))
    return need({"caption": caption}, "caption", str, where), WILD


def remarks(questions):
    """What makes the figures differ from others."""
    if len(questions) in (60, 90):
        return []
    return [f"{len(questions)} questions; LLaVA-Bench in the wild has 60, COCO 90"]


def read_answers(path, questions):
    """Answers {"question_id", "text"} -> [(answer,)]."""
    given = []
    for where, row in read_rows(path):
        number = number_or_text(row, "question_id", where)
        given.append((number, (need(row, "text", str, where, empty=True),)))
    return in_order(questions, given, path)


def write_answers(folder, questions, answers, name):
    """llava_bench.jsonl, as LLaVA's model_vqa.py writes it."""
    lines = []
    for q, (text,) in zip(questions, answers):
        row = {"question_id": q.id, "prompt": q.turns[0], "text": text, "answer_id": str(q.id)}
        row |= {"model_id": name, "category": q.groups[0], "metadata": {}}
        lines.append(json.dumps(row) + "\n")
    write_text(Path(folder) / "llava_bench.jsonl", "".join(lines))


def requests(question, answer):
    """One request: the reference is Assistant 1, the answer Assistant 2."""
    about, (asked,) = question.about, question.turns
    text = PROMPT.format(
        context=about["context"],
        question=asked,
        first=about["reference"],
        second=answer[0],
        told=about["told"],
    )
    return [Request("", text, tuple((question.turns, t) for t in (about["reference"], answer[0])))]


def official(reply, part=""):
    """(score of the reference, of the answer) by the official rule: -1, -1 where it reads none."""
    words = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, words)
    except ValueError:
        return -1.0, -1.0
    return (first, second) if np.isfinite([first, second]).all() else (-1.0, -1.0)


def readable(reply, part=""):
    """(score of the reference, of the answer), or None."""
    match = PAIR.fullmatch(reply.strip().split("\n")[0])
    return tuple(map(float, match.groups())) if match else None


def in_words(grades):
    """The reply of a judge that knows the truth: [(share told, errors)] of both -> two scores."""
    return " ".join(str(1 + round(9 * told / (1 + errors))) for told, errors in grades)


def values(question, scores):
    """Score of the reference, of the answer, 1; zeros without scores."""
    return [0, 0, 0] if scores[0] is None else [*scores[0], 1]


def figures(sums, groups):
    """Of all and of each category: relative score (100 is the reference's), 10 x both means."""
    first, second, n = np.moveaxis(sums, -1, 0)  # (..., G) each
    first, second = np.round(share(first, n), 3), np.round(share(second, n), 3)
    named = {}
    for k, group in enumerate(groups):
        prefix = f"{group} " if k else ""
        named[f"{prefix}relative"] = 100 * share(second[..., k], first[..., k])
        named[f"{prefix}reference"] = 10 * first[..., k]
        named[f"{prefix}model"] = 10 * second[..., k]
    return named


def read_reviews(path, questions):
    """The official judge's file -> replies."""
    given = []
    for where, row in read_rows(path):
        number = number_or_text(row, "question_id", where)
        given.append((number, [need(row, "content", str, where, empty=True)]))
    return in_order(questions, given, path, "review")


def write_reviews(folder, questions, replies, name, judge):
    """llava_bench_reviews.jsonl, which LLaVA's summarize_gpt_review.py reads."""
    lines = []
    for i, (q, (text,)) in enumerate(zip(questions, replies)):
        coco = "" if q.about["told"] == COCO else "llava_bench_"
        row = {"id": i + 1, "question_id": q.id, "answer1_id": str(q.id), "answer2_id": str(q.id)}
        row |= {"category": coco + q.groups[0], "content": text, "tuple": list(official(text))}
        lines.append(json.dumps(row) + "\n")
    write_text(Path(folder) / "llava_bench_reviews.jsonl", "".join(lines))
