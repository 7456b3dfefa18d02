"""MM-Vet (Yu et al. 2023): 218 open questions; a judge gives 0.0 to 1.0, reported per capability.

Facts from mm-vet_evaluator.ipynb of MM-Vet.

    mm-vet.json             {"v1_0": {"imagename", "question", "answer", "capability": ["ocr"]}}
    a model's file          {"v1_0": "its answer", ...}
    the judge's file        {"v1_0": {"model": [...], "content": [...], "score": [...]}}, a list
                            item a run; the paper has five runs

The judge reads no picture, but a table of question, ground truth and prediction, and completes the
last cell. <AND> in a ground truth joins what must all be there, <OR> alternatives.

Official parse: the text up to the first space is a number from 0 to 1. Otherwise the judge is asked
again with a cue, at rising temperature, five times in all; then the score is 0. A capability's
score is the mean over the questions that need it, x 100; the total is that over all questions.
"""

from pathlib import Path

import numpy as np

from common import BadInput, read_json, write_json
from formats.benchmarks import Question, Request, ids_differ, in_order, share
from formats.files import need

MAX_TOKENS, TEMPERATURE = 3, 0.0
RETRIES = (0.0, 0.5, 1.0, 1.5)  # temperatures
CUE = "\nPredict the correctness of the answer (digit): "
MAIN = ("total",)

PROMPT = """Give the prediction of an AI model a correctness score by comparing it with the ground \
truth. <AND> in the ground truth means that a prediction is totally right only if it has all the \
elements; <OR> means that any one of them makes it totally right. The score is 0.0 (totally \
wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Write nothing but the \
score that is missing in the last row.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which numbers are on the dice? | 2 <AND> 6 | A five. | 0.0
Which numbers are on the dice? | 2 <AND> 6 | A two. | 0.5
Which numbers are on the dice? | 2 <AND> 6 | A six. | 0.5
Which numbers are on the dice? | 2 <AND> 6 | A six, or perhaps a four. | 0.5
Which numbers are on the dice? | 2 <AND> 6 | They show 6 and 2. | 1.0
Why is this drawing funny? | A dog sits at a desk and writes, while its owner lies in the basket \
on the floor. The two have changed places, and the owner looks content. | The drawing is about a \
dog that works at a desk, which dogs do not do. | 0.4
Why is this drawing funny? | A dog sits at a desk and writes, while its owner lies in the basket \
on the floor. The two have changed places, and the owner looks content. | It turns the usual roles \
around: the dog does the office work at the desk, and the man rests in the dog's basket and seems \
to enjoy it. The contrast with what one expects of pets and owners is what makes it funny. | 1.0
"""


def read(path, context=None, references=None):
    """mm-vet.json -> questions; a question's groups are its capabilities and their set."""
    questions = []
    for key, row in read_json(path).items():
        where = f"{path}, {key}"
        needs = row.get("capability") if isinstance(row, dict) else None
        if not isinstance(needs, list) or not needs or not all(isinstance(c, str) for c in needs):
            raise BadInput(f"{where}: `capability` is {needs!r:.80}; a list of names is needed.")
        needs = sorted(set(needs))
        together = ["_".join(needs) + " only"]
        image, asked = need(row, "imagename", str, where), need(row, "question", str, where)
        about = {"reference": need(row, "answer", str, where)}
        questions.append(Question(key, where, image, (asked,), (*needs, *together), about))
    return ids_differ(questions, path)


def remarks(questions):
    """What makes the figures differ from others."""
    return [] if len(questions) == 218 else [f"{len(questions)} questions; MM-Vet has 218"]


def read_answers(path, questions):
    """{id: answer} -> [(answer,)]."""
    given = read_json(path)
    texts = [(key, (need(given, key, str, f"{path}, {key}", empty=True),)) for key in given]
    return in_order(questions, texts, path)


def write_answers(folder, questions, answers, name):
    """mm_vet.json, {id: answer}."""
    write_json(Path(folder) / "mm_vet.json", {q.id: text for q, (text,) in zip(questions, answers)})


def requests(question, answer):
    """One request: the table with a last row to complete."""
    truth = question.about["reference"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    text = PROMPT + " | ".join([question.turns[0], truth, answer[0], ""])
    return [Request("", text, ((question.turns, answer[0]),))]


def readable(reply, part=""):
    """(score,) from 0 to 1, or None."""
    try:
        score = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return (score,) if 0 <= score <= 1 else None


def official(reply, part=""):
    """(score,), 0 for a reply without one."""
    return readable(reply) or (0.0,)


def in_words(grades):
    """The reply of a judge that knows the truth: [(share told, errors)] -> a score."""
    ((told, errors),) = grades
    return f"{told / (1 + errors):.1f}"


def values(question, scores):
    """Mean score over the runs that have one, and 1; zeros without any."""
    found = [s[0] for s in scores if s is not None]
    return [sum(found) / len(found), 1] if found else [0, 0]


def figures(sums, groups):
    """Total and the score of each capability, then of each set of them; 0 to 100."""
    score, n = np.moveaxis(sums, -1, 0)  # (..., G) each
    scores = 100 * share(score, n)
    order = sorted(range(len(groups)), key=lambda k: groups[k].endswith(" only"))
    return {groups[k] if k else "total": scores[..., k] for k in order}


def read_reviews(path, questions):
    """The official grades -> replies of each run."""
    grades = read_json(path)
    given = []
    for key, row in grades.items():
        contents = row.get("content") if isinstance(row, dict) else None
        if not isinstance(contents, list) or not all(isinstance(c, str) for c in contents):
            raise BadInput(
                f"{path}, {key}: `content` is {contents!r:.80}; a list of replies is needed."
            )
        given.append((key, contents))
    runs = {len(contents) for _, contents in given}
    if len(runs) != 1 or 0 in runs:
        raise BadInput(f"{path}: the questions have {sorted(runs)} runs; as many each are needed.")
    return in_order(questions, given, path, "grade")


def write_reviews(folder, questions, replies, name, judge):
    """mm_vet_reviews.json, as the notebook keeps its grades."""
    grades = {}
    for q, texts in zip(questions, replies):
        scores = [official(text)[0] for text in texts]
        grades[q.id] = {"model": [judge] * len(texts), "content": list(texts), "score": scores}
    write_json(Path(folder) / "mm_vet_reviews.json", grades)
