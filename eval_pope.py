"""POPE (Li et al. 2023): yes/no questions about objects. Does the model affirm what is not there?

    python eval_pope.py --questions coco_pope_{random,popular,adversarial}.json \\
        --images val2014 --model DIR --out DIR
    python eval_pope.py --questions coco_pope_random.json --answers answers_random.jsonl

The second form only scores; it needs no model.

Official rule (evaluate.py of RUCAIBox/POPE): take the answer's text up to the first full stop,
delete commas, split at spaces. If one of the words is exactly "No", "no" or "not", the answer is
no; else it is yes. So empty text, "NO" and "No!" are yes.

Yes is the positive class.
    accuracy    the share of right answers
    precision   of the objects that the model affirmed, the share that is there; low where the
                model hallucinates
    recall      of the objects that are there, the share that the model affirmed
    f1          the harmonic mean of precision and recall
    yes_ratio   how often the model said yes; half of the official labels are yes
`mean`, over the splits, is what papers report; its n is the sum.

Deviations from the official script:
1. A ratio of nothing is 0, not a ZeroDivisionError (precision of a model that never says yes).
2. An answers file must answer these questions: see `answers_to`. The official `zip` takes the n-th
   answer for the n-th question, whatever it says, and silently scores the shorter list.
3. A label other than yes and no is refused, not taken as yes.
4. An answer ends after 16 tokens. This matters only if its "no" comes later.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import evaluation
from common import BadInput, Parser, run, write_json, write_text
from data import Record
from formats.files import ImageFolder, image_folders, rows
from formats.layouts import take_placeholder

SUFFIX = "\nAnswer the question using a single word or phrase."  # LLaVA's
MAX_NEW_TOKENS = 16
METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def read_questions(path):
    """Question file, JSON lines or an array -> [{"image", "text", "label": "yes" or "no"}]."""
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
    """Answer file -> [(answer, what the row says of its question)], in the file's order.

    Rows as POPE writes them, {"question", "answer"}, or LLaVA, {"question_id", "prompt", "text"}.
    """
    answers = []
    for i, row in rows(Path(path)):
        text = row.get("answer", row.get("text")) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise BadInput(
                f"{path}, row {i}: a string `answer` (POPE) or `text` (LLaVA) is needed, "
                f"found {text!r}."
            )
        asked = row.get("question", row.get("prompt", row.get("text") if "answer" in row else None))
        answers.append((text, Asked.of(row, asked)))
    return answers


@dataclass(frozen=True)
class Asked:
    """How a row names its question; None for what it does not say."""

    id: str | None
    text: str | None  # without LLaVA's SUFFIX
    image: str | None  # the file's name, without folders

    @classmethod
    def of(cls, row, text):
        """From a row and the text of its question."""
        number, image = row.get("question_id"), row.get("image")
        return cls(
            None if number is None else str(number),
            text.removesuffix(SUFFIX).strip() if isinstance(text, str) else None,
            Path(image).name if isinstance(image, str) else None,
        )

    def same_as(self, other):
        """Do two rows contradict each other in text or image? A text may have a suffix."""
        texts = self.text is None or self.text.startswith(other.text)
        return texts and (self.image is None or self.image == other.image)


def places(wanted, said, names):
    """Where the answer to each question stands, by these fields; None if they do not tell."""
    key = lambda row: tuple(getattr(row, name) for name in names)
    place = {key(row): i for i, row in enumerate(said)}
    found = [place.get(key(row)) for row in wanted]
    whole = all(None not in key(row) for row in said) and None not in found
    return found if whole and len(set(found)) == len(said) else None


def answers_to(questions, path):
    """Answers file -> its texts in the order of the questions.

    An answer belongs to the question with its id, else to that with its text and image. POPE's own
    files name the text alone: it must be unique, or the order that of the questions. Whatever else
    a row says of its question must fit as well, because all splits have the ids 1, 2, ...
    """
    given = read_answers(path)
    if len(given) != len(questions):
        raise BadInput(
            f"{path}: {len(given)} answers to {len(questions)} questions; "
            "one answer a question is needed."
        )
    wanted = [Asked.of(q, q["text"]) for q in questions]
    said = [asked for _, asked in given]
    by_fields = [places(wanted, said, names) for names in (("id",), ("text", "image"), ("text",))]
    in_order = range(len(said)) if all(row.text for row in said) else None
    for order in (*by_fields, in_order):
        if order is not None and all(said[i].same_as(q) for i, q in zip(order, wanted)):
            return [given[i][0] for i in order]

    i = next((i for i, q in enumerate(wanted) if not (said[i].text and said[i].same_as(q))), 0)
    told = {name: value for name, value in vars(said[i]).items() if value is not None}
    raise BadInput(
        f"{path}, row {i}: it names its question by {told or 'nothing'}, and question {i} is "
        f"{wanted[i].text!r} about {wanted[i].image}; answers are matched by question_id, else by "
        "question and image. Is the file of another split?"
    )


def split_name(path):
    """coco_pope_random.json -> "random"; a name that ends in no official split -> its stem."""
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
                f"{path}: the split name {name!r} is taken; "
                "each question file needs one of its own."
            )
        splits[name] = read_questions(path)
    return splits


def parse_answer(text):
    """Text of an answer -> "yes" or "no", by the official rule."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def score(labels, answers, where="score"):
    """Labels ("yes", "no") and answer texts, in the same order -> five fractions of 1, and n."""
    if len(labels) != len(answers) or not labels:
        raise BadInput(
            f"{where}: {len(answers)} answers to {len(labels)} questions; "
            "one answer a question is needed."
        )
    n = len(labels)
    parsed = [parse_answer(text) for text in answers]
    count = lambda *pair: sum(p == pair for p in zip(parsed, labels))
    tp = count("yes", "yes")
    fp = count("yes", "no")
    fn = count("no", "yes")
    tn = count("no", "no")

    precision = tp / max(1, tp + fp)
    recall = tp / max(1, tp + fn)
    return {
        "accuracy": (tp + tn) / n,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if tp else 0.0,
        "yes_ratio": (tp + fp) / n,
        "n": n,
    }


def report(scores, out):
    """{split: figures} -> the same with their "mean". With `out`, writes metrics.json there.

    All splits have the same weight.
    """
    mean = {key: sum(s[key] for s in scores.values()) / len(scores) for key in METRICS}
    mean["n"] = sum(s["n"] for s in scores.values())
    metrics = scores | {"mean": mean}
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_json(Path(out) / "metrics.json", metrics)
    return metrics


def read_records(files, images, suffix):
    """Question files -> {split: questions}, {(image, text): Record}; all images must be there."""
    splits = read_splits(files)
    records = {}
    folder = ImageFolder(images or image_folders(files[0]))
    for path, questions in zip(files, splits.values()):
        for i, q in enumerate(questions):
            where = f"{path}, row {i}"
            try:
                image = folder.find(q["image"])
                turns = take_placeholder((q["text"] + suffix,), image)
            except BadInput as error:
                raise BadInput(f"{where}: {error}") from None
            records[q["image"], q["text"]] = Record(where, image, turns)
    folder.report()
    return splits, records


def ask(contestant, splits, records, path=None, out=None):
    """Ask one contestant all questions -> {split: its answers' texts, in the file's order}.

    The splits share all questions whose answer is yes, so each question is asked once:
    of the 9000 official ones 5127 are distinct. With `out`, writes answers_<split>.jsonl, in the
    official layout.
    """
    texts = evaluation.answer(contestant, list(records.values()), MAX_NEW_TOKENS, path, "POPE")
    answers = dict(zip(records, texts))
    by_split = {}
    for split, questions in splits.items():
        keys = [(q["image"], q["text"]) for q in questions]
        by_split[split] = [answers[key] for key in keys]
        if out:
            lines = "".join(
                json.dumps({"question": text, "image": image, "answer": answers[image, text]})
                + "\n"
                for image, text in keys
            )
            Path(out).mkdir(parents=True, exist_ok=True)
            write_text(Path(out) / f"answers_{split}.jsonl", lines)
    return by_split


def score_splits(splits, answers, out=None):
    """{split: questions}, {split: texts} -> {split: figures, ..., "mean": figures}."""
    labels = {split: [q["label"] for q in questions] for split, questions in splits.items()}
    return report({split: score(labels[split], answers[split]) for split in splits}, out)


def evaluate(model, processor, files, images, out=None, suffix=SUFFIX, batch_size=64):
    """Ask a model in memory the questions of `files` -> {split: figures, ..., "mean": figures}.

    The images are below the folder `images`. Decoding is greedy. With `out`, writes
    answers_<split>.jsonl (official layout) and metrics.json there.
    """
    splits, records = read_records(files, images, suffix)
    contestant = evaluation.in_memory(model, processor, batch_size)
    return score_splits(splits, ask(contestant, splits, records, out=out), out)


def score_files(questions, answers, out=None):
    """Score answers files, one for each question file -> as `evaluate`."""
    splits = read_splits(questions)
    if len(answers) != len(splits):
        raise BadInput(
            f"--answers has {len(answers)} files, --questions {len(splits)}; as many are needed."
        )
    scores = {}
    for split, path in zip(splits, answers):
        labels = [q["label"] for q in splits[split]]
        scores[split] = score(labels, answers_to(splits[split], path), path)
    return report(scores, out)


def print_table(metrics):
    """One row a split."""
    width = max(map(len, (*metrics, "split")))
    names = "".join(f"{key.replace('_', ' '):>11}" for key in METRICS)
    print(f"{'split':{width}}{names}{'n':>8}")
    for split, figures in metrics.items():
        numbers = "".join(f"{figures[key]:11.4f}" for key in METRICS)
        print(f"{split:{width}}{numbers}{figures['n']:8d}")


def main():
    """Ask a model the questions of each file, or score answers files."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag(
        "--questions",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="question files, one a split",
    )
    flag(
        "--answers",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="score these files, one for each question file",
    )
    flag(
        "--suffix",
        default=SUFFIX,
        help='added after each question, "" for nothing (default: LLaVA\'s %(default)r)',
    )
    evaluation.add_flags(parser)
    args = parser.parse_args()
    evaluation.check_flags(args)

    if args.answers:
        metrics = score_files(args.questions, args.answers, args.out)
    else:
        splits, records = read_records(args.questions, args.images, args.suffix)
        about = {"questions": evaluation.hashes(args.questions), "suffix": args.suffix}
        for contestant in evaluation.contestants(args, about):
            path = contestant.path("replies.jsonl")
            answers = ask(contestant, splits, records, path, contestant.folder)
            contestant.release()
            metrics = score_splits(splits, answers, contestant.folder)
    print_table(metrics)


if __name__ == "__main__":
    run(main)
