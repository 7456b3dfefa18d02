"""Instruction data of Sun et al. 2023 (their SFT+ model) out of public files, and facts about the pictures for a reward model.

    python -m formats.instruct --out instruct.json --facts facts.json --aokvqa aokvqa_v1p0_train.json
        --flickr flickr_annotations_30k.csv
        --vqa-questions v2_OpenEnded_mscoco_train2014_questions.json --vqa-annotations v2_mscoco_train2014_annotations.json
    python sft.py --model DIR --data llava_instruct_80k.json --data instruct.json --images DIR

Written are LLaVA conversations (layout llava_instruct), one a picture:

    VQA-v2     yes/no questions only, all of a picture as rounds of one conversation (83k; train2014 has as many pictures)
    A-OKVQA    multiple choice, rounds of one conversation likewise (16k)
    Flickr30k  one caption ("spotting captioning", 23k)

--facts is {file: [text, ...]} in the style of their image_to_caption.json: `aok_<file>` holds rationales and true options of
A-OKVQA, and with --coco-captions `<file>` holds COCO's captions. Facts are for the reward model, never for the policy.

Choices where paper and code are silent:
1. VQA questions end in LLaVA's "single word or phrase" sentence, which their evaluation appends too; answers are "Yes", "No".
2. A-OKVQA's options are lettered, and the answer is "B. umbrella": their reward for right answers looks for "B." at the start.
3. A true option becomes a fact as the sentence: The answer to "..." is "...".
4. Flickr30k: one of a picture's captions, drawn with seed 0, without boxes; only of the training split where splits are named.
5. COCO pictures carry their 2017 names (000000000009.jpg), as in LLaVA-Instruct; VQA-v2's are named by id as well.

The authors' own mixture (mix-llava-sft90k-vqav2_83k-okvqa_16k-flickr_23k.json) should be read by sft.py as it is; it was
not seen here.
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
    """File name of a COCO picture in train2017."""
    if type(number) is not int or number < 0:
        raise BadInput(f"{where}: the image id is {number!r:.80}; a whole number is needed.")
    return f"{number:012d}.jpg"


def listed(path, key):
    """The list of objects that a JSON object holds under `key`."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error}).") from None
    found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise BadInput(f"{path}: an object with a list of objects `{key}` is needed.")
    return found


def field(row, key, where):
    """A text of a row, or BadInput that says where."""
    try:
        return text_field(row.get(key), key)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def vqa(questions, annotations, notes):
    """VQA-v2's two files -> {picture: [(question, "Yes" or "No"), ...]}."""
    answers, rounds = {}, {}
    for row in listed(annotations, "annotations"):
        answers[row.get("question_id")] = (
            row.get("multiple_choice_answer") if row.get("answer_type") == "yes/no" else None
        )
    for i, row in enumerate(listed(questions, "questions")):
        where, answer = f"{questions}, row {i}", answers.get(row.get("question_id"), "")
        if answer == "":
            raise BadInput(
                f"{where}: question_id {row.get('question_id')!r} is not among the annotations of {annotations}."
            )
        if answer not in ("yes", "no"):
            notes["VQA-v2 questions left out: the answer is not yes or no"] += 1
            continue
        rounds.setdefault(coco_name(row.get("image_id"), where), []).append(
            (field(row, "question", where) + YES_NO, answer.title())
        )
    return rounds


def aokvqa(path):
    """A-OKVQA's file -> ({picture: [(question with options, answer), ...]}, {"aok_" + picture: facts})."""
    rounds, facts = {}, {}
    for i, row in files.rows(Path(path)):
        where = f"{path}, row {i}"
        choices, right, rationales = (
            (row if isinstance(row, dict) else {}).get(k)
            for k in ("choices", "correct_choice_idx", "rationales")
        )
        if (
            not isinstance(choices, list)
            or not 2 <= len(choices) <= len(LETTERS)
            or not all(type(c) is str for c in choices)
        ):
            raise BadInput(
                f"{where}: `choices` is {choices!r:.80}; a list of 2 to {len(LETTERS)} strings is needed."
            )
        if type(right) is not int or not 0 <= right < len(
            choices
        ):  # counted from 0; the test split has none
            raise BadInput(
                f"{where}: `correct_choice_idx` is {right!r}; 0 to {len(choices) - 1} is needed."
            )
        if not isinstance(rationales, list):
            raise BadInput(
                f"{where}: `rationales` is {rationales!r:.80}; a list of texts is needed."
            )
        question, image = field(row, "question", where), coco_name(row.get("image_id"), where)
        options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices))
        rounds.setdefault(image, []).append(
            (question + options + CHOICE, f"{LETTERS[right]}. {choices[right]}")
        )
        texts = [field({"rationales": r}, "rationales", where) for r in rationales]
        facts.setdefault(f"aok_{image}", []).extend(
            [*texts, f'The answer to "{question}" is "{choices[right]}".']
        )
    return rounds, facts


def flickr_captions(path, notes):
    """Flickr30k -> {picture: captions}: Karpathy's JSON, the Hub's CSV (`raw`, `filename`) or Kaggle's results.csv (with |)."""
    found = {}
    if Path(path).suffix == ".json":
        rows = listed(path, "images")
        texts = [
            [s.get("raw") if isinstance(s, dict) else s for s in row.get("sentences") or []]
            for row in rows
        ]
    else:
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                bars = "|" in file.readline()
                file.seek(0)
                rows = list(
                    csv.DictReader(
                        file,
                        delimiter="|" if bars else ",",
                        quoting=csv.QUOTE_NONE if bars else csv.QUOTE_MINIMAL,
                    )
                )
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise BadInput(f"{path}: not readable as CSV ({error}).") from None
        rows = [{(k or "").strip(): v for k, v in row.items()} for row in rows]
        texts = []
        for i, row in enumerate(rows):
            try:
                texts.append(json.loads(row["raw"]) if "raw" in row else [row.get("comment")])
            except (TypeError, ValueError):
                raise BadInput(
                    f"{path}, row {i}: `raw` is {row['raw']!r:.80}; a JSON list of captions is needed."
                ) from None
    for i, (row, captions) in enumerate(zip(rows, texts)):
        if row.get("split", "train") != "train":
            notes["Flickr30k pictures left out: not of the training split"] += 1
            continue
        where = f"{path}, row {i}"
        image = field({"filename": row.get("filename", row.get("image_name"))}, "filename", where)
        if captions == [None]:  # results.csv has a line that lacks a bar
            notes["Flickr30k captions left out: the line has no comment"] += 1
            continue
        if not isinstance(captions, list) or not captions:
            raise BadInput(
                f"{where}: the captions are {captions!r:.80}; a list of texts is needed."
            )
        found.setdefault(image, []).extend(
            field({"caption": c}, "caption", where) for c in captions
        )
    return found


def coco_captions(path):
    """COCO's captions_*.json -> {picture: captions}."""
    found = {}
    for i, row in enumerate(listed(path, "annotations")):
        where = f"{path}, row {i}"
        found.setdefault(coco_name(row.get("image_id"), where), []).append(
            field(row, "caption", where)
        )
    return found


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
    parser.add_argument("--vqa-questions", metavar="FILE", help="VQA-v2's questions ...")
    parser.add_argument("--vqa-annotations", metavar="FILE", help="... and its annotations")
    parser.add_argument("--aokvqa", metavar="FILE", help="A-OKVQA with answers")
    parser.add_argument("--flickr", metavar="FILE", help="Flickr30k's captions, JSON or CSV")
    parser.add_argument(
        "--coco-captions", metavar="FILE", help="captions_train2017.json, for --facts only"
    )
    parser.add_argument("--out", metavar="FILE", help="conversations to write")
    parser.add_argument(
        "--facts", metavar="FILE", help="facts to write, of --aokvqa and --coco-captions"
    )
    args = parser.parse_args()
    if bool(args.vqa_questions) != bool(args.vqa_annotations):
        raise BadInput("--vqa-questions and --vqa-annotations go together.")
    if not args.out and not args.facts:
        raise BadInput("nothing to write: give --out, --facts or both.")
    for path in filter(None, (args.out, args.facts)):
        new_folder(path)
    rows, facts, notes = [], {}, Counter()
    if args.vqa_questions:
        rows += [
            conversation("vqa", *r)
            for r in vqa(args.vqa_questions, args.vqa_annotations, notes).items()
        ]
    if args.aokvqa:
        rounds, facts = aokvqa(args.aokvqa)
        rows += [conversation("aok", *r) for r in rounds.items()]
    if args.flickr:
        rng = random.Random(0)
        for image, texts in flickr_captions(args.flickr, notes).items():
            rows.append(conversation("flickr", image, [(CAPTION, rng.choice(texts))]))
    if args.coco_captions:
        facts |= coco_captions(args.coco_captions)
    for why, count in notes.items():
        print(f"{count} {why}", file=sys.stderr)
    for path, found, what in (
        (args.out, rows, "conversations"),
        (args.facts, facts, "pictures with facts"),
    ):
        if path and not found:
            raise BadInput(f"no {what} for {path}; the files given hold none.")
        if path:
            write_json(path, found)
            print(f"{path}: {len(found)} {what}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
