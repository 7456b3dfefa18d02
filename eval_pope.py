"""POPE (Li et al. 2023): yes/no questions about objects. Does the model affirm what is not there?

    python eval_pope.py --questions coco_pope_{random,popular,adversarial}.json \\
        --images val2014 --model DIR --adapter none runs/dpo-0/adapter --out DIR
    python eval_pope.py --questions coco_pope_random.json --answers answers_random.jsonl
    python eval_pope.py --questions llava_pope_test.jsonl coco/coco_pope_*.json --answers FILE

The first form asks (evaluation.py says who can be asked, and how a run goes on). The others only
score; they need no model. --answers takes a file for each question file, and then those of a second
contestant, and so on. The third form is LLaVA's: one file of all questions, with their `category`,
and one of all answers; the labels stand in POPE's own files.

Official rule (evaluate.py of RUCAIBox/POPE): take the answer's text up to the first full stop,
delete commas, split at spaces. If one of the words is exactly "No", "no" or "not", the answer is
no; else it is yes. So empty text, "NO" and "No!" are yes. LLaVA's eval_pope.py has the same rule.
Strict rule, beside it: the first word, in lower case and without punctuation, is yes or no; any
other answer is unreadable, and wrong. Where the two disagree, look at the answers.

Yes is the positive class.
    accuracy    the share of right answers
    precision   of the objects that the model affirmed, the share that is there; low where the
                model hallucinates
    recall      of the objects that are there, the share that the model affirmed
    f1          the harmonic mean of precision and recall
    yes_ratio   how often the model said yes; half of the official labels are yes
`mean`, over the splits, is what papers report (LLaVA: of f1); its n is the sum. The intervals
draw images, as six questions share one (comparison.py).

Files in --out, of several contestants in a folder each:
    metrics.json            the figures by the official rule; of several {contestant: figures}
    details.json            strict figures, intervals, differences, answers decided within rounding
    answers_<split>.jsonl   for POPE's evaluate.py: the same figures to the last digit
    llava_{questions,answers}.jsonl     for LLaVA's eval_pope.py: the same
    changed-<name>.png      pictures with answers that differ from the first contestant's

Three causes of "cannot reproduce", said in the output:
- the random split has 3,000 questions, and had 2,910 when LLaVA took it (LLaVA#626)
- the suffix behind each question: LLaVA's asks for one word, POPE's own questions have none
- in half precision, yes and no can be equal within rounding, and the other questions in the batch
  decide (LLaVA#1928). Such answers are counted; --batch-size 1 asks each question alone

Deviations from the official script:
1. A ratio of nothing is 0, not a ZeroDivisionError (precision of a model that never says yes).
2. An answers file must answer these questions: see `answers_to`. The official `zip` takes the n-th
   answer for the n-th question, whatever it says, and silently scores the shorter list.
3. A label other than yes and no is refused, not taken as yes.
4. An answer ends after 16 tokens. This matters only if its "no" comes later.
"""

from common import BadInput, Parser, run, write_json, write_text

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import comparison
import evaluation
import processes
from data import Record
from formats.files import ImageFolder, image_folders, rows
from formats.layouts import take_placeholder

SUFFIX = "\nAnswer the question using a single word or phrase."  # LLaVA's
MAX_NEW_TOKENS = 16
METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")
# first words whose logits are compared
YES, NO = ("Yes", "yes"), ("No", "no")
EPSILON = {"float32": 2**-23, "bfloat16": 2**-7}  # the step of numbers from 1 to 2


def read_questions(path):
    """Question file, JSON lines or an array -> [{"image", "text", "label": "yes" or "no"}].

    In LLaVA's file each row has a `category`, its split, and need not have a label.
    """
    questions = []
    for i, row in rows(Path(path)):
        is_llava = isinstance(row, dict) and "category" in row
        for key in ("image", "text", "category" if is_llava else "label"):
            value = row.get(key) if isinstance(row, dict) else None
            if not isinstance(value, str) or not value:
                raise BadInput(
                    f"{path}, row {i}: `{key}` is {value!r}; image, text and label (or LLaVA's "
                    "category) must be strings."
                )
        if row.get("label") not in ("yes", "no") and not (is_llava and "label" not in row):
            raise BadInput(
                f"{path}, row {i}: `label` is {row['label']!r}; accepted are 'yes' and 'no'."
            )
        if questions and is_llava != ("category" in questions[0]):
            raise BadInput(f"{path}, row {i}: some rows have a `category`, others have none.")
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
    wanted = [Asked.of(q, q["text"]) for q in questions]
    said = [asked for _, asked in given]
    if len(given) != len(questions):
        raise BadInput(
            f"{path}: {len(given)} answers to {len(questions)} questions; "
            f"one answer a question is needed{doubled_or_missing(wanted, said)}."
        )
    by_fields = [places(wanted, said, names) for names in (("id",), ("text", "image"), ("text",))]
    in_order = range(len(said)) if all(row.text for row in said) else None
    for order in (*by_fields, in_order):
        if order is not None and all(said[i].same_as(q) for i, q in zip(order, wanted)):
            return [given[i][0] for i in order]

    i = next(i for i, q in enumerate(wanted) if not (said[i].text and said[i].same_as(q)))
    told = {name: value for name, value in vars(said[i]).items() if value is not None}
    raise BadInput(
        f"{path}, row {i}: it names its question by {told or 'nothing'}, and question {i} is "
        f"{wanted[i].text!r} about {wanted[i].image}; answers are matched by question_id, else by "
        f"question and image{doubled_or_missing(wanted, said)}. Is the file of another split?"
    )


def doubled_or_missing(wanted, said):
    """Part of a message: the first id with two answers, and the first with none; "" without ids."""
    ids, parts = [row.id for row in said], []
    if None not in ids:
        parts += [f"question_id {i} has {ids.count(i)} answers" for i in ids if ids.count(i) > 1][
            :1
        ]
        parts += [f"question_id {row.id} has none" for row in wanted if row.id not in ids][:1]
    return "".join(f"; {part}" for part in parts)


def split_name(path):
    """coco_pope_random.json -> "random"; a name that ends in no official split -> its stem."""
    stem = Path(path).stem
    last = re.split("[_.-]", stem)[-1]
    return last if last in ("random", "popular", "adversarial") else stem


def read_splits(paths):
    """Question files -> {split: questions}, one a file, or LLaVA's file with the label files."""
    splits, of_llava = {}, []
    for path in paths:
        questions = read_questions(path)
        if "category" in questions[0]:
            of_llava.append((path, questions))
            continue
        name = split_name(path)
        if name in splits or name == "mean":
            raise BadInput(
                f"{path}: the split name {name!r} is taken; "
                "each question file needs one of its own."
            )
        splits[name] = questions
    if len(of_llava) > 1:
        raise BadInput(f"{of_llava[1][0]}: a second file with categories; one is accepted.")
    return by_category(*of_llava[0], splits) if of_llava else splits


def by_category(path, questions, labelled):
    """LLaVA's questions -> {category: questions}, the texts without LLaVA's suffix.

    labelled: {split: POPE's own questions}, for rows without a label of their own.
    """
    labels = {
        split: {(q["image"], q["text"]): q["label"] for q in rows}
        for split, rows in labelled.items()
    }
    splits = {}
    for i, row in enumerate(questions):
        category, text = row["category"], row["text"].removesuffix(SUFFIX)
        label = row.get("label") or labels.get(category, {}).get((row["image"], text))
        if label is None:
            raise BadInput(
                f"{path}, row {i}: no `label`, and POPE's files of --questions have no such "
                f"question in the split {category!r}; they are needed beside LLaVA's file, such as "
                f"coco_pope_{category}.json."
            )
        splits.setdefault(category, []).append(row | {"text": text, "label": label})
    return splits


def parse_answer(text):
    """Text of an answer -> "yes" or "no", by the official rule."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def parse_strictly(text):
    """Text of an answer -> "yes", "no", or None where its first word is neither."""
    word = evaluation.first_word(text)
    return word if word in ("yes", "no") else None


def counts(label, said):
    """One question as a row (tp, fp, fn, tn); said: "yes", "no", or None, which is wrong."""
    if said is None:
        said = "no" if label == "yes" else "unreadable"
    pairs = (("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"))
    return [(said, label) == pair for pair in pairs]


def ratios(sums, n):
    """Sums (..., 4) of `counts`, over n questions (...) -> the five figures."""
    tp, fp, fn, tn = np.moveaxis(sums, -1, 0)
    precision, recall = tp / np.maximum(1, tp + fp), tp / np.maximum(1, tp + fn)
    return {
        "accuracy": (tp + tn) / np.maximum(1, n),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / np.where(tp > 0, precision + recall, 1),
        "yes_ratio": (tp + fp) / np.maximum(1, n),
    }


def score(labels, answers, where="score", parse=parse_answer):
    """Labels ("yes", "no") and answer texts, in the same order -> five fractions of 1, and n."""
    if len(labels) != len(answers) or not labels:
        raise BadInput(
            f"{where}: {len(answers)} answers to {len(labels)} questions; "
            "one answer a question is needed."
        )
    rows = [counts(label, parse(text)) for label, text in zip(labels, answers)]
    figures = ratios(np.sum(rows, axis=0), len(labels))
    return {key: float(value) for key, value in figures.items()} | {"n": len(labels)}


def report(scores, out=None):
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


def score_splits(splits, said, out=None, parse=parse_answer):
    """{split: questions}, {split: texts} -> {split: figures, ..., "mean": figures}."""
    labels = {split: [q["label"] for q in questions] for split, questions in splits.items()}
    return report({s: score(labels[s], said[s], s, parse) for s in splits}, out)


# ---- asking


def read_records(files, images, suffix):
    """Question files -> {split: questions}, {(image, text): Record}; all images must be there."""
    splits = read_splits(files)
    paths = {split_name(path): path for path in files}
    records = {}
    folder = ImageFolder(images or image_folders(files[0]))
    for split, questions in splits.items():
        for i, q in enumerate(questions):
            of_llava = f"category {split}, question_id {q.get('question_id')}"
            where = of_llava if "category" in q else f"{paths[split]}, row {i}"
            try:
                image = folder.find(q["image"])
                turns = take_placeholder((q["text"] + suffix,), image)
            except BadInput as error:
                raise BadInput(f"{where}: {error}") from None
            records[q["image"], q["text"]] = Record(where, image, turns)
    folder.report()
    return splits, records


def ask(contestant, splits, records, path=None, watch=()):
    """Ask one contestant all questions -> {split: its replies, in the order of the questions}.

    The splits share all questions whose answer is yes, so each question is asked once:
    of the 9000 official ones 5127 are distinct.
    """
    asked = list(records.values())
    replies = evaluation.replies(contestant, asked, MAX_NEW_TOKENS, path, "POPE", watch)
    by_key = dict(zip(records, replies))
    return {s: [by_key[q["image"], q["text"]] for q in qs] for s, qs in splits.items()}


def texts_of(replies):
    """{split: replies} -> {split: texts}."""
    return {split: [row["answer"] for row in rows] for split, rows in replies.items()}


def write_answers(folder, splits, said):
    """answers_<split>.jsonl in POPE's layout, a row a question, in the order of the questions."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split, questions in splits.items():
        lines = [
            json.dumps({"question": q["text"], "image": q["image"], "answer": text})
            for q, text in zip(questions, said[split])
        ]
        write_text(Path(folder) / f"answers_{split}.jsonl", "".join(f"{line}\n" for line in lines))


def write_llava(folder, splits, said, suffix, name):
    """llava_questions.jsonl and llava_answers.jsonl, for LLaVA's eval_pope.py.

    It finds an answer's category by an id, which must be unique among all splits; POPE's are not.
    """
    questions, answers = [], []
    for split, asked in splits.items():
        for q, text in zip(asked, said[split]):
            number, prompt = len(questions), q["text"] + suffix
            row = {"question_id": number, "image": q["image"], "text": prompt, "category": split}
            questions.append(row | {"label": q["label"]})
            row = {"question_id": number, "prompt": prompt, "text": text}
            answers.append(row | {"answer_id": str(number), "model_id": name, "metadata": {}})
    for file, rows in (("llava_questions.jsonl", questions), ("llava_answers.jsonl", answers)):
        write_text(Path(folder) / file, "".join(json.dumps(row) + "\n" for row in rows))


def evaluate(model, processor, files, images, out=None, suffix=SUFFIX, batch_size=64):
    """Ask a model in memory the questions of `files` -> {split: figures, ..., "mean": figures}.

    The images are below the folder `images`. Decoding is greedy. With `out`, writes
    answers_<split>.jsonl (official layout) and metrics.json there.
    """
    splits, records = read_records(files, images, suffix)
    contestant = evaluation.in_memory(model, processor, batch_size)
    said = texts_of(ask(contestant, splits, records))
    if out:
        write_answers(out, splits, said)
    return score_splits(splits, said, out)


def read_said(splits, files):
    """Answers files -> {contestant: {split: texts}}.

    A file for each split and contestant, or of LLaVA's questions one for each contestant.
    """
    of_llava = "category" in next(iter(splits.values()))[0]
    each = 1 if of_llava else len(splits)
    if len(files) % each or len(set(files)) < len(files):
        raise BadInput(
            f"--answers has {len(files)} files, --questions {each}; as many are needed, or as many "
            "for each contestant, none of them twice."
        )
    groups = [files[start : start + each] for start in range(0, len(files), each)]
    folders = [str(Path(group[0]).parent) for group in groups]
    of_folders = each > 1 and len(groups) == len(set(folders)) > 1
    first_files = [group[0] for group in groups]
    names = evaluation.names_of(folders) if of_folders else evaluation.names_of_files(first_files)
    said = {}
    for name, paths in zip(names, groups):
        if of_llava:
            everything = answers_to(sum(splits.values(), []), paths[0])
            ends = np.cumsum([len(questions) for questions in splits.values()])
            parts = [everything[end - len(splits[s]) : end] for s, end in zip(splits, ends)]
        else:
            parts = [answers_to(splits[s], path) for s, path in zip(splits, paths)]
        said[name] = dict(zip(splits, parts))
    return said


# ---- what is said of the figures


def within_rounding(row, dtype):
    """Do the best yes and the best no differ by at most one step of `dtype` at their size?

    row: a reply with "first", the logits of YES and NO at its first token. The arithmetic before
    them was rounded too, so that the answers which the batch may flip are these at least.
    """
    yes, no = max(row["first"][: len(YES)]), max(row["first"][len(YES) :])
    size = max(abs(yes), abs(no), 2.0**-126)
    return abs(yes - no) <= EPSILON[dtype] * 2.0 ** math.floor(math.log2(size))


def about_rounding(contestant, replies, records):
    """How many answers were decided by rounding, and what asking one by one costs -> (n, text)."""
    rows = list({(r["image"], *r["prompt"]): r for rows in replies.values() for r in rows}.values())
    dtype = contestant.settings.get("dtype")
    known = [row for row in rows if "first" in row]
    if not known or all(max(r["first"][:2]) == max(r["first"][2:]) for r in known):
        why = "a server does not tell" if contestant.server else "yes and no begin alike"
        return None, f"{contestant.name}: answers decided within rounding: not counted, {why}"

    n = sum(within_rounding(row, dtype) for row in known)
    text = (
        f"{contestant.name}: {n} of {len(known)} answers were decided within rounding: the logits "
        f"of yes and no are at most one step of {dtype} apart"
    )
    if dtype == "float32":
        return n, text
    cost = one_by_one(contestant, records)
    costs = f" takes {cost:.1f} times as long" if cost else " asks each question alone"
    return n, f"{text}; the batch may flip these and others; --batch-size 1{costs}"


def one_by_one(contestant, records):
    """How many times as long --batch-size 1 takes, by a few questions; None: no telling."""
    if contestant.batch_size == 1 or contestant.asked < contestant.batch_size:
        return None
    alone = replace(contestant, batch_size=1, asked=0, seconds=0.0)
    evaluation.answer(alone, list(records.values())[:8], MAX_NEW_TOKENS)
    return alone.seconds / alone.asked / (contestant.seconds / contestant.asked)


def remarks(splits, suffix=None):
    """Lines on what makes these figures comparable with others, or not."""
    lines = []
    if suffix is not None:
        whose = " (LLaVA's)" if suffix == SUFFIX else ""
        lines.append(f"behind each question stands {suffix!r}{whose}" if suffix else "no suffix")
    n = len(splits.get("random", ()))
    if n in (2910, 3000):
        other = {2910: "3,000 in POPE today", 3000: "2,910 in the file that LLaVA took"}[n]
        lines.append(
            f"the random split has {n:,} questions here, {other}: figures of the two are not "
            "comparable (LLaVA#626)"
        )
    return lines


def units_of(splits, said):
    """{split: texts} -> (images, 4 x splits): tp, fp, fn, tn of each image's questions."""
    images = {}
    for questions in splits.values():
        for q in questions:
            images.setdefault(q["image"], len(images))
    units = np.zeros((len(images), len(splits), 4))
    for k, (split, questions) in enumerate(splits.items()):
        for q, text in zip(questions, said[split]):
            units[images[q["image"]], k] += counts(q["label"], parse_answer(text))
    return units.reshape(len(images), -1)


def compared(splits, said):
    """{contestant: {split: texts}} -> `comparison.compare` of "<split> <figure>", mean included."""

    def figures(sums):
        """Sums (..., 4 x splits) -> {"<split> <figure>": (...)}."""
        sums = sums.reshape(*sums.shape[:-1], len(splits), 4)
        by_split = ratios(sums, sums.sum(-1))  # (..., splits)
        named = {
            f"{s} {key}": by_split[key][..., k] for k, s in enumerate(splits) for key in METRICS
        }
        return named | {f"mean {key}": by_split[key].mean(-1) for key in METRICS}

    return comparison.compare({name: units_of(splits, of) for name, of in said.items()}, figures)


def changed(splits, first, other, names, image_of):
    """Rows of `comparison.sheet`: the questions that two contestants answer differently, once each.

    first, other: {split: texts}. image_of: a function from a question's image to a file, or None.
    """
    rows = {}
    for split, questions in splits.items():
        for q, *texts in zip(questions, first[split], other[split]):
            parsed = [parse_answer(text) for text in texts]
            if parsed[0] != parsed[1]:
                answers = [(n, t, p == q["label"]) for n, t, p in zip(names, texts, parsed)]
                asked = f"{q['text']} ({q['label']})"
                rows[q["image"], q["text"]] = (image_of(q["image"]), asked, answers)
    return list(rows.values())


def print_table(metrics):
    """One row a split."""
    width = max(map(len, (*metrics, "split")))
    names = "".join(f"{key.replace('_', ' '):>11}" for key in METRICS)
    print(f"{'split':{width}}{names}{'n':>8}")
    for split, figures in metrics.items():
        numbers = "".join(f"{figures[key]:11.4f}" for key in METRICS)
        print(f"{split:{width}}{numbers}{figures['n']:8d}")


def finish(splits, said, notes, args):
    """Print all that is known of {contestant: {split: texts}}, and write it to --out.

    notes: {contestant: (answers decided within rounding, text)}, where a model was asked.
    """
    official = {name: score_splits(splits, of) for name, of in said.items()}
    strict = {name: score_splits(splits, of, parse=parse_strictly) for name, of in said.items()}
    results = compared(splits, said)

    # figures by both rules
    details = {}
    for name, of in said.items():
        texts = [text for split in splits for text in of[split]]
        unreadable = sum(parse_strictly(text) is None for text in texts)
        differ = sum(parse_strictly(text) not in (None, parse_answer(text)) for text in texts)
        details[name] = {
            "strict": strict[name],
            "unreadable": unreadable,
            "begin otherwise than they count": differ,
            "intervals": results[name],
        }
        if len(said) > 1:
            print(f"{name}:")
        print_table(official[name])
        print(
            f"\nstrict rule: of {len(texts)} answers {unreadable} begin with neither yes nor no, "
            f"{differ} begin otherwise than they count by the official rule"
        )
        print_table(strict[name])
        print()

    # intervals and differences
    shown = [f"{split} accuracy" for split in splits]
    shown += [f"mean {key}" for key in ("accuracy", "f1", "yes_ratio")]
    print("95 % intervals (bootstrap over images; differences are paired)")
    print("\n".join(comparison.table(results, shown)))
    print()

    # what to know before comparing them with others
    for name, (n, text) in notes.items():
        details[name]["decided within rounding"] = n
        print(text)
    for line in remarks(splits, None if args.answers else args.suffix):
        print(line)

    if args.out:
        comparison.write_figures(args.out, official, details)
        folder = ImageFolder(args.images or image_folders(args.questions[0]))
        image_of = lambda name: folder.look_up(name)[0]
        rows_of = lambda *names: changed(splits, *(said[n] for n in names), names, image_of)
        comparison.sheets(args.out, said, "answers that differ", rows_of)


def parse():
    """The command line."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag(
        "--questions",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="question files, one a split; or LLaVA's file, and with it POPE's for the labels",
    )
    flag(
        "--answers",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="score these files, one for each question file; then those of another contestant",
    )
    flag(
        "--suffix",
        default=SUFFIX,
        help='added after each question, "" for nothing (default: LLaVA\'s %(default)r)',
    )
    evaluation.add_flags(parser)
    args = parser.parse_args()
    evaluation.check_flags(args)
    return args


def main():
    """Ask each contestant the questions of all files, or read their answers; score."""
    args = parse()
    notes = {}
    if args.answers:
        splits = read_splits(args.questions)
        said = read_said(splits, args.answers)
    else:
        splits, records = read_records(args.questions, args.images, args.suffix)
        about = {"questions": evaluation.hashes(args.questions), "suffix": args.suffix}
        said = {}
        for contestant in evaluation.contestants(args, about | {"max_new_tokens": MAX_NEW_TOKENS}):
            name, path = contestant.name, contestant.path("replies.jsonl")
            watch = () if contestant.server else YES + NO
            replies = ask(contestant, splits, records, path, watch)
            said[name] = texts_of(replies)
            notes[name] = about_rounding(contestant, replies, records)
            if path:
                write_answers(path.parent, splits, said[name])
                write_llava(path.parent, splits, said[name], args.suffix, name)
            contestant.release()
        args.out = args.out if processes.number == 0 else None
    finish(splits, said, notes, args)


if __name__ == "__main__":
    run(main)
