"""POPE (Li et al. 2023): yes/no questions about objects; does the model say yes to what is not in the picture?

    python eval_pope.py --questions coco_pope_{random,popular,adversarial}.json --images val2014 --model DIR --out DIR
    python eval_pope.py --questions coco_pope_random.json --answers answers_random.jsonl        only the score, no model

Official rule (evaluate.py of RUCAIBox/POPE): of an answer take the text up to the first full stop, delete commas,
split at spaces. If one of the words is exactly "No", "no" or "not" the answer is no, else yes: empty text, "NO" and
"No!" are yes.

Yes is the positive class. precision: of what the model affirmed, the part that is there; low where it hallucinates.
recall: of what is there, the part it affirmed. f1: their harmonic mean. accuracy: right answers of all. yes_ratio: how
often it said yes; half of the labels of the official files are yes. `mean`, over the splits, is what papers report;
its n is the sum.

What differs from the official script:
1. a ratio of nothing (precision of a model that never says yes) is 0, not a ZeroDivisionError;
2. as many answers as questions are needed: zip would score the shorter list and say nothing;
3. a label other than yes and no is refused, not taken as yes;
4. an answer ends after 16 tokens, which matters only if its "no" comes later than that.
"""

import json
import re
from pathlib import Path

from common import BadInput, Parser, run, write_json
from data import Record
from evaluation import add_flags, check_flags, load
from formats.files import find_image, rows
from sampling import generate

SUFFIX = "\nAnswer the question using a single word or phrase."  # LLaVA's
MAX_NEW_TOKENS = 16
METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def read_questions(path):
    """Question file, JSON lines or an array, -> list of {"image", "text", "label": "yes" or "no"}."""
    questions = []
    for i, row in rows(Path(path)):
        for key in ("image", "text", "label"):
            value = row.get(key) if isinstance(row, dict) else None
            if not isinstance(value, str) or not value:
                raise BadInput(
                    f"{path}, row {i}: `{key}` is {value!r}; image, text and label must be strings."
                )
        if row["label"] not in ("yes", "no"):
            raise BadInput(
                f"{path}, row {i}: `label` is {row['label']!r}; accepted are 'yes' and 'no'."
            )
        questions.append(row)
    if not questions:
        raise BadInput(f"{path}: the file holds no question.")
    return questions


def read_answers(path):
    """Answer file of POPE ({"question", "answer"}) or LLaVA ({"question_id", "text"}) -> texts, in the file's order."""
    answers = []
    for i, row in rows(Path(path)):
        text = row.get("answer", row.get("text")) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise BadInput(
                f"{path}, row {i}: a string `answer` (POPE) or `text` (LLaVA) is needed, found {text!r}."
            )
        answers.append(text)
    return answers


def split_name(path):
    """coco_pope_random.json -> "random"; the stem, if the file name's last word is no official split."""
    stem = Path(path).stem
    last = re.split("[_.-]", stem)[-1]
    return last if last in ("random", "popular", "adversarial") else stem


def read_splits(paths):
    """Question files -> {split: questions}."""
    splits = {}
    for path in paths:
        name = split_name(path)
        if name in splits or name == "mean":
            raise BadInput(
                f"{path}: the split name {name!r} is taken; each question file needs one of its own."
            )
        splits[name] = read_questions(path)
    return splits


def parse_answer(text):
    """Text of an answer -> "yes" or "no", by the official rule."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def score(labels, answers, where="score"):
    """Labels ("yes", "no") and answer texts, in the same order -> the five figures, fractions of 1, and n."""
    if len(labels) != len(answers) or not labels:
        raise BadInput(
            f"{where}: {len(answers)} answers to {len(labels)} questions; one answer a question is needed."
        )
    said = [parse_answer(a) for a in answers]
    count = lambda *pair: sum(p == pair for p in zip(said, labels))
    tp, fp, fn, tn = count("yes", "yes"), count("yes", "no"), count("no", "yes"), count("no", "no")
    precision, recall = tp / max(1, tp + fp), tp / max(1, tp + fn)
    f1 = 2 * precision * recall / (precision + recall) if tp else 0.0
    figures = ((tp + tn) / len(labels), precision, recall, f1, (tp + fp) / len(labels))
    return {**dict(zip(METRICS, figures)), "n": len(labels)}


def report(scores, out):
    """{split: figures} -> the same and their mean, splits of equal weight; with `out`, metrics.json is written."""
    mean = {key: sum(s[key] for s in scores.values()) / len(scores) for key in METRICS}
    metrics = {**scores, "mean": {**mean, "n": sum(s["n"] for s in scores.values())}}
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_json(Path(out) / "metrics.json", metrics)
    return metrics


def evaluate(model, processor, files, images, out=None, suffix=SUFFIX, batch_size=64):
    """Ask the questions of `files` about pictures below folder `images` -> {split: figures, ..., "mean": figures}.

    Greedy decoding. With `out`, writes answers_<split>.jsonl (official layout) and metrics.json there.
    """
    splits, records, answers, scores = read_splits(files), {}, {}, {}
    for path, questions in zip(files, splits.values()):
        for i, q in enumerate(questions):  # a missing picture is found before the first answer
            try:
                image = find_image(Path(images), q["image"])
            except BadInput as error:
                raise BadInput(f"{path}, row {i}: {error}") from None
            records[q["image"], q["text"]] = Record(
                f"{path}, row {i}", image, (q["text"] + suffix,)
            )
    for split, questions in splits.items():
        asked = [(q["image"], q["text"]) for q in questions]
        # The splits share all questions whose answer is yes: of the 9000 official ones 5127 are distinct.
        new = [key for key in dict.fromkeys(asked) if key not in answers]
        texts = generate(
            model,
            processor,
            [records[key] for key in new],
            MAX_NEW_TOKENS,
            batch_size=batch_size,
            label=f"POPE {split}",
        )
        answers.update((key, text) for key, (text,) in zip(new, texts))
        scores[split] = score([q["label"] for q in questions], [answers[key] for key in asked])
        if out:
            lines = [
                json.dumps({"question": key[1], "answer": answers[key]}) + "\n" for key in asked
            ]
            Path(out).mkdir(parents=True, exist_ok=True)
            (Path(out) / f"answers_{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return report(scores, out)


def main():
    """Ask a model the questions of each file, or score an answers file."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--questions",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="question files, one a split",
    )
    add(
        "--answers",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="score these, one for each question file",
    )
    add(
        "--suffix",
        default=SUFFIX,
        help='put behind each question, "" for nothing (default: LLaVA\'s %(default)r)',
    )
    add_flags(parser)
    args = parser.parse_args()
    check_flags(args)
    if args.answers:
        splits = read_splits(args.questions)
        if len(args.answers) != len(splits):
            raise BadInput(
                f"--answers has {len(args.answers)} files, --questions {len(splits)}; as many are needed."
            )
        scores = {}
        for (split, questions), path in zip(splits.items(), args.answers):
            scores[split] = score([q["label"] for q in questions], read_answers(path), path)
        metrics = report(scores, args.out)
    else:
        metrics = evaluate(
            *load(args), args.questions, args.images, args.out, args.suffix, args.batch_size
        )
    width = max(map(len, (*metrics, "split")))
    print(
        f"{'split':{width}}"
        + "".join(f"{key.replace('_', ' '):>11}" for key in METRICS)
        + f"{'n':>8}"
    )
    for split, s in metrics.items():
        print(f"{split:{width}}" + "".join(f"{s[key]:11.4f}" for key in METRICS) + f"{s['n']:8d}")


if __name__ == "__main__":
    run(main)
