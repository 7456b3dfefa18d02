"""Instruction data of Sun et al. 2023 (their SFT+ model), built from public files.

It also writes facts about the images, for a reward model.

    python -m formats.instruct --out instruct.json --facts facts.json
        --aokvqa aokvqa_v1p0_train.json
        --flickr flickr_annotations_30k.csv
        --vqa-questions v2_OpenEnded_mscoco_train2014_questions.json
        --vqa-annotations v2_mscoco_train2014_annotations.json
    python sft.py --model DIR --data llava_instruct_80k.json --data instruct.json --images DIR

--out gets LLaVA conversations (layout llava_instruct), one per image:

    VQA-v2     yes/no questions only; all questions of an image are rounds of one conversation
               (83k; train2014 has as many images)
    A-OKVQA    multiple choice, also rounds of one conversation (16k)
    Flickr30k  one caption ("spotting captioning", 23k)

--facts gets facts about the images, {file: [text, ...]} in the style of their
image_to_caption.json. `aok_<file>` holds rationales and true options of A-OKVQA. With
--coco-captions, `<file>` holds COCO's captions. Facts are for the reward model, never for the
policy.

Choices where paper and code are silent:
1. VQA questions end in LLaVA's "single word or phrase" sentence; their evaluation appends it too.
   Answers are "Yes" and "No".
2. A-OKVQA's options have letters, and the answer is "B. umbrella": their reward for right answers
   looks for "B." at the start.
3. A true option becomes a fact as the sentence: The answer to "..." is "...".
4. Flickr30k: one of an image's captions, drawn with seed 0, without boxes. Where splits are named,
   only the training split is used, all 29,000 pictures of it; which 23k they took is not known.
5. COCO images have their 2017 names (000000000009.jpg), as in LLaVA-Instruct. VQA-v2's images are
   named by id in the same way.

The authors' own mixture is mix-llava-sft90k-vqav2_83k-okvqa_16k-flickr_23k.json. sft.py should read
it as it is; that was not tried, because the file was not available.
"""

import csv
import json
import random
import sys
from collections import Counter
from pathlib import Path

from common import BadInput, Parser, new_folder, run, write_json
from formats import files
from formats.layouts import text_field

YES_NO = "\nAnswer the question using a single word or phrase."  # LLaVA's
CHOICE = "\nAnswer with the letter and the text of the right option."
CAPTION = "Provide a one-sentence caption for the provided image."  # LLaVA's
LETTERS = "ABCDEFGHIJ"


def coco_name(number, where):
    """The file name of a COCO image in train2017."""
    if type(number) is not int or number < 0:
        raise BadInput(f"{where}: the image id is {number!r:.80}; a whole number is needed.")
    return f"{number:012d}.jpg"


def listed(path, key):
    """The list of objects that a JSON object holds under `key`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error}).") from None
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadInput(f"{path}: an object with a list of objects `{key}` is needed.")
    return rows


def field(row, key, where):
    """A text of a row, or BadInput that says where."""
    try:
        return text_field(row.get(key), key)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def vqa(questions, annotations, notes):
    """VQA-v2's two files -> {image: [(question, "Yes" or "No"), ...]}."""
    answers = {}
    for row in listed(annotations, "annotations"):
        yes_no = row.get("answer_type") == "yes/no"
        answers[row.get("question_id")] = row.get("multiple_choice_answer") if yes_no else None

    rounds = {}
    for i, row in enumerate(listed(questions, "questions")):
        where = f"{questions}, row {i}"
        answer = answers.get(row.get("question_id"), "")
        if answer == "":
            raise BadInput(
                f"{where}: question_id {row.get('question_id')!r} is not among the annotations "
                f"of {annotations}."
            )
        if answer not in ("yes", "no"):
            notes["VQA-v2 questions left out: the answer is not yes or no"] += 1
            continue
        image = coco_name(row.get("image_id"), where)
        question = field(row, "question", where) + YES_NO
        rounds.setdefault(image, []).append((question, answer.title()))
    return rounds


def aokvqa(path):
    """A-OKVQA's file -> rounds, facts.

    rounds: {image: [(question with options, answer), ...]}; facts: {"aok_" + image: [text, ...]}.
    """
    rounds, facts = {}, {}
    for i, row in files.rows(Path(path)):
        where = f"{path}, row {i}"

        # the options, the right one, the rationales
        cells = row if isinstance(row, dict) else {}
        choices = cells.get("choices")
        right = cells.get("correct_choice_idx")
        rationales = cells.get("rationales")
        if (
            not isinstance(choices, list)
            or not 2 <= len(choices) <= len(LETTERS)
            or not all(type(choice) is str for choice in choices)
        ):
            raise BadInput(
                f"{where}: `choices` is {choices!r:.80}; "
                f"a list of 2 to {len(LETTERS)} strings is needed."
            )
        # counted from 0; the test split has no right option
        if type(right) is not int or not 0 <= right < len(choices):
            raise BadInput(
                f"{where}: `correct_choice_idx` is {right!r}; 0 to {len(choices) - 1} is needed."
            )
        if not isinstance(rationales, list):
            raise BadInput(
                f"{where}: `rationales` is {rationales!r:.80}; a list of texts is needed."
            )

        # a round of the image's conversation
        question = field(row, "question", where)
        image = coco_name(row.get("image_id"), where)
        options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices))
        answer = f"{LETTERS[right]}. {choices[right]}"
        rounds.setdefault(image, []).append((question + options + CHOICE, answer))

        # its facts
        texts = [field({"rationales": r}, "rationales", where) for r in rationales]
        texts.append(f'The answer to "{question}" is "{choices[right]}".')
        facts.setdefault(f"aok_{image}", []).extend(texts)
    return rounds, facts


def flickr_captions(path, notes):
    """Flickr30k -> {image: captions}.

    Read are Karpathy's JSON, the Hub's CSV (`raw`, `filename`) and Kaggle's results.csv (with |).
    """
    # rows, and the captions of each
    if Path(path).suffix == ".json":
        rows = listed(path, "images")
        captions = []
        for row in rows:
            sentences = row.get("sentences") or []
            captions.append([s.get("raw") if isinstance(s, dict) else s for s in sentences])
    else:
        rows = csv_rows(path)
        captions = []
        for i, row in enumerate(rows):
            try:
                captions.append(json.loads(row["raw"]) if "raw" in row else [row.get("comment")])
            except (TypeError, ValueError):
                raise BadInput(
                    f"{path}, row {i}: `raw` is {row['raw']!r:.80}; "
                    "a JSON list of captions is needed."
                ) from None

    # the captions of each image
    by_image = {}
    for i, (row, texts) in enumerate(zip(rows, captions)):
        if row.get("split", "train") != "train":
            notes["Flickr30k pictures left out: not of the training split"] += 1
            continue
        where = f"{path}, row {i}"
        name = row.get("filename", row.get("image_name"))
        image = field({"filename": name}, "filename", where)
        if texts == [None]:  # results.csv has a line that lacks a bar
            notes["Flickr30k captions left out: the line has no comment"] += 1
            continue
        if not isinstance(texts, list) or not texts:
            raise BadInput(f"{where}: the captions are {texts!r:.80}; a list of texts is needed.")
        new_captions = (field({"caption": text}, "caption", where) for text in texts)
        by_image.setdefault(image, []).extend(new_captions)
    return by_image


def csv_rows(path):
    """The rows of a CSV file with a header, which "," or "|" separates. Only "," may be quoted."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            bars = "|" in file.readline()
            file.seek(0)
            delimiter = "|" if bars else ","
            quoting = csv.QUOTE_NONE if bars else csv.QUOTE_MINIMAL
            rows = list(csv.DictReader(file, delimiter=delimiter, quoting=quoting))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: not readable as CSV ({error}).") from None
    return [{(key or "").strip(): cell for key, cell in row.items()} for row in rows]


def coco_captions(path):
    """COCO's captions_*.json -> {image: captions}."""
    by_image = {}
    for i, row in enumerate(listed(path, "annotations")):
        where = f"{path}, row {i}"
        image = coco_name(row.get("image_id"), where)
        by_image.setdefault(image, []).append(field(row, "caption", where))
    return by_image


def conversation(name, image, rounds):
    """One row of LLaVA-Instruct."""
    turns = []
    for i, (question, answer) in enumerate(rounds):
        question = question if i else "<image>\n" + question
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": f"{name}_{Path(image).stem}", "image": image, "conversations": turns}


def main():
    """Read, convert, write."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--vqa-questions", metavar="FILE", help="VQA-v2's questions ...")
    flag("--vqa-annotations", metavar="FILE", help="... and its annotations")
    flag("--aokvqa", metavar="FILE", help="A-OKVQA with answers")
    flag("--flickr", metavar="FILE", help="Flickr30k's captions, JSON or CSV")
    flag("--coco-captions", metavar="FILE", help="captions_train2017.json, only for --facts")
    flag("--out", metavar="FILE", help="writes conversations to this file")
    flag("--facts", metavar="FILE", help="writes facts, from --aokvqa and --coco-captions")
    args = parser.parse_args()
    if bool(args.vqa_questions) != bool(args.vqa_annotations):
        raise BadInput("--vqa-questions and --vqa-annotations go together.")
    if not args.out and not args.facts:
        raise BadInput("nothing to write: give --out, --facts or both.")
    for path in filter(None, (args.out, args.facts)):
        new_folder(path)

    # ---- read and convert
    rows, facts, notes = [], {}, Counter()
    if args.vqa_questions:
        rounds = vqa(args.vqa_questions, args.vqa_annotations, notes)
        rows += [conversation("vqa", *r) for r in rounds.items()]
    if args.aokvqa:
        rounds, facts = aokvqa(args.aokvqa)
        rows += [conversation("aok", *r) for r in rounds.items()]
    if args.flickr:
        rng = random.Random(0)
        for image, texts in flickr_captions(args.flickr, notes).items():
            rows.append(conversation("flickr", image, [(CAPTION, rng.choice(texts))]))
    if args.coco_captions:
        facts |= coco_captions(args.coco_captions)

    # ---- write
    for why, count in notes.items():
        print(f"{count} {why}", file=sys.stderr)
    for path, content, what in (
        (args.out, rows, "conversations"),
        (args.facts, facts, "images with facts"),
    ):
        if path and not content:
            raise BadInput(f"no {what} for {path}; the files given hold none.")
        if path:
            write_json(path, content)
            print(f"{path}: {len(content)} {what}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
