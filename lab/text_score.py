"""The text score: does the LLM still read? Exact match on the questions of lab/reading.py.

Every question is a text without an image. Decoding is greedy. An answer is right if it is the
expected text, blanks at its ends aside.

    mean     of the tasks' figures: the text score
    <task>   the share of right answers
    n        how many questions
"""

import json

from common import write_json
from data import Record
from sampling import generate

MAX_NEW_TOKENS = 96  # the longest answer, a rewritten caption, has about 80


def read(path):
    """text_test.json -> its questions: [(task, Record with the right answer)]."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    questions = []
    for i, row in enumerate(rows):
        asked, answer = (turn["value"] for turn in row["conversations"])
        record = Record(f"{path}, row {i}", None, (asked,), (answer,))
        questions.append((row["task"], record))
    return questions


def score(tasks, right):
    """The task and whether it was right, for each question -> figures."""
    figures = {}
    for task in sorted(set(tasks)):
        of_task = [good for name, good in zip(tasks, right) if name == task]
        figures[task] = sum(of_task) / len(of_task)
    return {"mean": sum(figures.values()) / len(figures)} | figures | {"n": len(tasks)}


def evaluate(model, processor, path, out=None, batch_size=64):
    """Ask the questions of a text_test.json -> figures.

    With `out`, writes answers.jsonl and metrics.json there.
    """
    tasks, records = zip(*read(path))
    texts = generate(
        model,
        processor,
        list(records),
        MAX_NEW_TOKENS,
        batch_size=batch_size,
        label="text",
        split=True,
    )
    answers = [text.strip() for (text,) in texts]
    right = [answer == record.answers[0] for answer, record in zip(answers, records)]
    figures = score(tasks, right)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps(
                {"task": task, "question": r.turns[0], "right": r.answers[0], "answer": answer}
            )
            for task, r, answer in zip(tasks, records, answers)
        ]
        (out / "answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_json(out / "metrics.json", figures)
    return figures
