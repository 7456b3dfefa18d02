"""Question and answer files of visual question answering, as downloaded.

    name, questions = vqa.read(["TextVQA_0.5.1_val.json", "llava_textvqa_val_v051_ocr.jsonl"])
    answers = vqa.answers_to(name, questions, "answers.jsonl")

    benchmark   files                                                       images
    vqa-v2      v2_OpenEnded_mscoco_val2014_questions.json, with            val2014/
                v2_mscoco_val2014_annotations.json
    textvqa     TextVQA_0.5.1_val.json                                      train_images/
    gqa         testdev_balanced_questions.json                             images/
    a-okvqa     aokvqa_v1p0_val.json                                        val2017/
    scienceqa   problems.json and pid_splits.json (the test split)          images/test/
    mmbench     mmbench_dev_20230712.tsv, MMBench_DEV_EN.tsv, MMStar.tsv    inside, base64
    mmstar      mmstar.parquet                                              inside

A parquet file with the same keys is read too. Beside them may stand LLaVA's file of what it asks,
which takes the place of our own prompts: llava_textvqa_val_v051_ocr.jsonl (with words that another
model read in the picture), llava_gqa_testdev_balanced.jsonl, llava_test_CQM-A.json.

Rows {"image", "problem", "solution" or "answer"}, as R1-V's, are the benchmark `problems`: anything
with a short right answer. lab/benchmarks.py writes such a file about the toy world.
"""

import base64
import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path

from common import BadInput, file_hash, refuse_lfs_pointer, whole_folder
from formats.files import PackedImage, need, number_or_text, rows

LETTERS = "ABCDEFGHIJ"
SHORT = "\nAnswer the question using a single word or phrase."  # LLaVA's, as the next
CHOICE = "\nAnswer with the option's letter from the given choices directly."
OCR = "Reference OCR token:"  # begins a line of LLaVA's prompts for TextVQA
# cells without a value, as pandas and LLaVA read them
EMPTY = ("", "nan", "none", "na", "n/a", "#n/a", "#na", "null", "<na>", "-nan")
# an object with one of these is a row: a file of one line
ROW_KEYS = {"text", "answer", "prediction", "question", "problem", "conversations", "question_id"}
ROTATED = 10**6  # MMBench: what an index is above this belongs to the same question


@dataclass(frozen=True)
class Question:
    """A question with what is right."""

    id: str
    image: object  # a tuple of names for it, a PackedImage, its index in a tsv file, or None
    text: str  # the question alone
    prompt: str  # what is asked: the question with hint and options, and LLaVA's last line
    truth: object  # ten answers, one (gqa, problems), or a letter of `options`
    options: dict  # {letter: text}, {} for a short answer
    groups: tuple = ()  # names of the figures that it counts for, besides accuracy
    whole: str = ""  # id of the question that it is a rotation of
    round: int = 0  # which rotation, of those that `rotated` makes
    rotation: bool = False  # is it one besides the question itself?


def id_of(row, key, where):
    """row[key] as text; whole numbers and texts are accepted."""
    return str(number_or_text(row, key, where))


def ten(answers, where):
    """The ten answers of a question: strings, or objects with `answer`."""
    given = answers if isinstance(answers, list) else ()
    texts = [a.get("answer") if isinstance(a, dict) else a for a in given]
    if len(texts) != 10 or not all(type(text) is str for text in texts):
        raise BadInput(
            f"{where}: {len(texts)} answers of people ({answers!r:.60}); ten strings are needed; "
            "test splits have none, and are scored on a server."
        )
    return tuple(texts)


def lettered(choices, where):
    """A list of options -> {letter: text}."""
    texts = isinstance(choices, list) and all(type(choice) is str for choice in choices)
    if not texts or not 2 <= len(choices) <= len(LETTERS):
        raise BadInput(f"{where}: `choices` is {choices!r:.80}; 2 to {len(LETTERS)} strings.")
    return dict(zip(LETTERS, choices))


def right_letter(index, options, key, where):
    """The letter of a right option, counted from 0."""
    if type(index) is not int or not 0 <= index < len(options):
        raise BadInput(
            f"{where}: `{key}` is {index!r:.80}; 0 to {len(options) - 1} is needed; test splits "
            "without it are scored on a server."
        )
    return LETTERS[index]


def choice_prompt(text, options, hint=""):
    """Hint, question and options, as LLaVA asks them."""
    lines = [hint, text] if hint else [text]
    lines += [f"{letter}. {option}" for letter, option in options.items()]
    return "\n".join(lines) + CHOICE


# ---- one reader a benchmark


def vqa2(asked, annotated, path):
    """VQA-v2: lists of questions and of annotations -> [Question]."""
    subset = asked.get("data_subtype", "val2014")
    annotations = {}
    for i, row in enumerate(need(annotated, "annotations", list, path)):
        number = id_of(row, "question_id", f"{path}, annotations[{i}]")
        if number in annotations:
            raise BadInput(f"{path}, annotations[{i}]: question_id {number} is there twice.")
        annotations[number] = row
    questions = []
    for i, row in enumerate(need(asked, "questions", list, path)):
        where = f"{path}, questions[{i}]"
        number, text = id_of(row, "question_id", where), need(row, "question", str, where)
        image = need(row, "image_id", int, where)
        names = f"COCO_{subset}_{image:012d}.jpg", f"{image:012d}.jpg"
        if number not in annotations:
            raise BadInput(f"{where}: question_id {number} is not among the annotations.")
        annotation = annotations.pop(number)
        answers = ten(annotation.get("answers"), f"{path}, annotations of {number}")
        kind = need(annotation, "answer_type", str, f"{path}, annotations of {number}")
        questions.append(Question(number, names, text, text + SHORT, answers, {}, (kind,)))
    if annotations:
        raise BadInput(f"{path}: question_id {next(iter(annotations))} is annotated, not asked.")
    return questions


def textvqa(row, where):
    """A row of TextVQA."""
    number, text = id_of(row, "question_id", where), need(row, "question", str, where)
    image = row.get("image")
    if not isinstance(image, PackedImage):
        image = id_of(row, "image_id", where)
        image = (*(f"{folder}{image}.jpg" for folder in ("", "train_images/", "test_images/")),)
    return Question(number, image, text, text + SHORT, ten(row.get("answers"), where), {})


def vqa2_row(row, where):
    """A row of VQA-v2 in a parquet file."""
    kind = need(row, "answer_type", str, where)
    return replace(textvqa(row, where), groups=(kind,))


def gqa(number, row, where):
    """A question of GQA; open questions are those whose structure is `query`."""
    text, answer = need(row, "question", str, where), need(row, "answer", str, where)
    image = id_of(row, "imageId", where)
    if row.get("isBalanced") is False:
        raise BadInput(
            f"{where}: `isBalanced` is False; its accuracy is that of the balanced questions: "
            "testdev_balanced_questions.json."
        )
    types = row.get("types")
    structure = types.get("structural") if isinstance(types, dict) else None
    groups = () if structure is None else ("open" if structure == "query" else "binary",)
    names = f"{image}.jpg", f"images/{image}.jpg"
    return Question(number, names, text, text + SHORT, answer, {}, groups)


def aokvqa(row, where):
    """A row of A-OKVQA.

    `not difficult` are those that an older version of its script scored alone.
    """
    number, text = id_of(row, "question_id", where), need(row, "question", str, where)
    options = lettered(row.get("choices"), where)
    right = right_letter(row.get("correct_choice_idx"), options, "correct_choice_idx", where)
    image = row.get("image")
    if not isinstance(image, PackedImage):
        image = need(row, "image_id", int, where)
        folders = "", "val2017/", "train2017/", "test2017/"
        image = tuple(f"{folder}{image:012d}.jpg" for folder in folders)
    groups = ("not difficult",) if row.get("difficult_direct_answer") is False else ()
    return Question(number, image, text, choice_prompt(text, options), right, options, groups)


def scienceqa(number, row, where):
    """A problem of ScienceQA, with or without an image."""
    text = need(row, "question", str, where)
    options = lettered(row.get("choices"), where)
    right = right_letter(row.get("answer"), options, "answer", where)
    image = row.get("image")
    if isinstance(image, str) and image:
        image = tuple(f"{folder}{number}/{image}" for folder in ("", "test/", "images/test/"))
    subject = row.get("subject")
    groups = ("with image",) if image else ()
    groups += (subject,) if isinstance(subject, str) and subject else ()
    prompt = choice_prompt(text, options, str(row.get("hint") or ""))
    return Question(number, image or None, text, prompt, right, options, groups)


def mmbench(row, where):
    """A row of MMBench or of a file of its layout: options in columns A, B, ..."""
    cells = {key: None if str(cell).lower() in EMPTY else cell for key, cell in row.items()}
    number, text = id_of(cells, "index", where), need(cells, "question", str, where)
    if not number.isdecimal():
        raise BadInput(f"{where}: `index` is {number!r:.80}; a whole number is needed.")
    options = {letter: str(cells[letter]) for letter in LETTERS if cells.get(letter) is not None}
    if cells.get("answer") not in options:
        raise BadInput(
            f"{where}: `answer` is {cells.get('answer')!r:.80}; one of {', '.join(options)} is "
            "needed; test splits without it are scored on a server."
        )
    groups = [cells.get(key) for key in ("l2-category", "L2-category", "category", "l2_category")]
    prompt = choice_prompt(text, options, str(cells.get("hint") or ""))
    whole = str(int(number) % ROTATED)
    return Question(
        number,
        cells["image"] if isinstance(cells.get("image"), PackedImage) else number,
        text,
        prompt,
        cells["answer"],
        options,
        tuple(dict.fromkeys(str(group) for group in groups if group)),
        whole,
        rotation=whole != number,
    )


def mmstar(row, where):
    """A row of MMStar's parquet file; the options stand in the question."""
    number, text = id_of(row, "index", where), need(row, "question", str, where)
    right = need(row, "answer", str, where).strip()
    options = dict.fromkeys("ABCD", "")
    if right not in options:
        raise BadInput(f"{where}: `answer` is {right!r:.80}; A, B, C or D is needed.")
    groups = tuple(str(row[key]) for key in ("category", "l2_category") if row.get(key))
    return Question(number, row.get("image"), text, text + CHOICE, right, options, groups)


def problem(row, where):
    """A row of R1-V's layout; what is right is read by rewards.py."""
    text = need(row, "problem", str, where).replace("<image>", "").strip()
    key = "solution" if row.get("answer") is None else "answer"
    image = row.get("image")
    image = (image,) if isinstance(image, str) and image else image
    if image is not None and not isinstance(image, (tuple, PackedImage)):
        raise BadInput(f"{where}: `image` is {image!r:.80}; the name of a file is needed.")
    right = row.get(key)
    right = str(right) if type(right) in (int, float) else need(row, key, str, where)
    return Question(where.rsplit(" ", 1)[1], image, text, text, right, {})


# ---- files


def tsv_rows(path, pictures=False):
    """(where, row) of a tsv file with a header, quoted as pandas writes it.

    The picture of a row is left out, or with `pictures` stays as it is.
    """
    csv.field_size_limit(1 << 30)  # a picture is a cell
    refuse_lfs_pointer(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter="\t")
            header = next(lines, [])
            for i, cells in enumerate(lines):
                if len(cells) != len(header):
                    raise BadInput(
                        f"{path}, row {i}: {len(cells)} cells; the header has {len(header)}."
                    )
                row = dict(zip(header, cells))
                yield f"{path}, row {i}", row if pictures else row | {"image": None}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: not a readable tsv file ({error}).") from None


def unpack(path):
    """The pictures of a tsv file, in base64, as files in `.cache` -> {index: path}.

    A short cell is the index of the row whose picture it is: rotated questions share one.
    """
    folder = Path(".cache") / f"pictures-{file_hash(path)[:16]}"
    places = {}
    with whole_folder(folder) as aside:
        for where, row in tsv_rows(path, pictures=True):
            index, cell = id_of(row, "index", where), need(row, "image", str, where)
            if len(cell) <= 64:
                places[index] = cell
                continue
            try:
                content = base64.b64decode(cell, validate=True)
            except ValueError:
                raise BadInput(f"{where}: `image` is no picture in base64.") from None
            if not index.isdecimal():
                raise BadInput(f"{where}: `index` is {index!r:.80}; a whole number is needed.")
            (aside / index).write_bytes(content)
            places[index] = folder / index
    for index, place in places.items():
        if isinstance(place, str) and not isinstance(places.get(place), Path):
            raise BadInput(f"{path}: the picture of index {index} is that of {place!r}, not there.")
    return {i: places[p] if isinstance(p, str) else p for i, p in places.items()}


def content_of(path):
    """A JSON object, or a list of (where, row)."""
    path = Path(path)
    if path.suffix == ".tsv":
        return list(tsv_rows(path))
    if path.suffix not in (".parquet", ".gz") and path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise BadInput(f"{path}: not UTF-8 ({error}).") from None
        except (ValueError, RecursionError):
            content = None  # JSON lines, or nothing: `rows` says what
        if isinstance(content, dict) and not ROW_KEYS & content.keys():
            return content
    found = [(f"{path}, row {i}", row) for i, row in rows(path)]
    where, row = next((pair for pair in found if not isinstance(pair[1], dict)), ("", None))
    if where:
        raise BadInput(f"{where}: a {type(row).__name__}; an object is needed.")
    return found


def reader_of(row):
    """(benchmark, reader) of a table by the keys of its first row, or (None, None)."""
    keys = row.keys()
    if "problem" in keys:
        return "problems", problem
    if "correct_choice_idx" in keys:
        return "a-okvqa", aokvqa
    if {"question", "choices", "answer"} <= keys:
        return "scienceqa", lambda row, where: scienceqa(where.rsplit(" ", 1)[1], row, where)
    if {"index", "question", "A", "B"} <= keys:
        return "mmbench", mmbench
    if {"index", "question", "answer"} <= keys:
        return "mmstar", mmstar
    if {"question", "answers"} <= keys:
        return ("vqa-v2", vqa2_row) if "answer_type" in keys else ("textvqa", textvqa)
    return None, None


ACCEPTED = (
    "files of VQA-v2, TextVQA, GQA, A-OKVQA, ScienceQA, MMBench and MMStar, and rows with a "
    "`problem` are accepted"
)


def read(paths):
    """Question files of one benchmark -> (its name, [Question])."""
    name, questions, objects, prompts = None, [], {}, []
    for path in paths:
        content = content_of(path)
        if isinstance(content, dict):
            kinds = [key for key in ("questions", "annotations", "data") if key in content]
            first = next(iter(content.values()), None)
            if kinds:
                kind = kinds[0]
            elif isinstance(first, dict):
                kind = "choices" if "choices" in first else "imageId"
            else:
                kind = "splits"
            if kind in objects:
                raise BadInput(f"{path}: a second file with {kind}; one is accepted.")
            objects[kind] = content, path
            continue
        if not content:
            raise BadInput(f"{path}: the file holds no question.")
        row = content[0][1]
        if "conversations" in row or {"text", "image"} <= row.keys():
            prompts.append((path, content))
            continue
        kind, reader = reader_of(row)
        if kind is None:
            raise BadInput(f"{path}: a row has the keys {list(row)!r:.120}; {ACCEPTED}.")
        if name or objects:
            raise BadInput(f"{path}: files of two benchmarks; one is accepted.")
        name, questions = kind, [reader(row, where) for where, row in content]

    if objects and not name:
        name, questions = of_objects(objects)
    if not questions:
        raise BadInput(f"{paths[0]}: no question in these files; {ACCEPTED}.")
    doubled(questions, paths[0])
    for path, content in prompts:
        questions = with_prompts(name, questions, path, content)
    return name, questions


def of_objects(objects):
    """Files that are one object, {what it holds: (content, path)} -> (benchmark, [Question])."""
    kinds = set(objects)
    if kinds == {"questions", "annotations"}:
        path = objects["annotations"][1]
        return "vqa-v2", vqa2(objects["questions"][0], objects["annotations"][0], path)
    if kinds == {"data"}:
        content, path = objects["data"]
        data = need(content, "data", list, path)
        return "textvqa", [textvqa(row, f"{path}, data[{i}]") for i, row in enumerate(data)]
    if kinds == {"imageId"}:
        content, path = objects["imageId"]
        return "gqa", [gqa(number, row, f"{path}, {number}") for number, row in content.items()]
    if kinds == {"choices", "splits"}:
        problems, path = objects["choices"]
        splits, of_splits = objects["splits"]
        numbers = need(splits, "test", list, of_splits)
        missing = [n for n in numbers if not isinstance(n, str) or n not in problems]
        if missing:
            raise BadInput(f"{of_splits}: the problem {missing[0]!r:.80} is not in {path}.")
        return "scienceqa", [scienceqa(n, problems[n], f"{path}, {n}") for n in numbers]
    listed = ", ".join(str(path) for _, path in objects.values())
    raise BadInput(
        f"{listed}: no benchmark by itself; VQA-v2 needs its questions and its annotations, "
        "ScienceQA problems.json and pid_splits.json."
    )


def doubled(questions, path):
    """Refuse a question that is there twice, and rotations of a question that is not there."""
    seen = set()
    for question in questions:
        if question.id in seen:
            raise BadInput(f"{path}: question {question.id} is there twice.")
        seen.add(question.id)
    lost = next((q for q in questions if q.rotation and q.whole not in seen), None)
    if lost:
        raise BadInput(f"{path}: index {lost.id} is a rotation of {lost.whole}, not there.")


def line_of(prompt):
    """The question in LLaVA's prompt for TextVQA: its first line that is no OCR."""
    lines = [line for line in prompt.split("\n") if not line.startswith(OCR)]
    return lines[0].lower()


def keys_of(name, question):
    """What LLaVA's files call a question: its id; in TextVQA image and text."""
    if name == "textvqa" and isinstance(question.image, tuple):
        return Path(question.image[0]).stem, question.text.lower()
    return question.id


def with_prompts(name, questions, path, content):
    """The questions with the prompts of LLaVA's file; each must have one."""
    prompts = {}
    for where, row in content:
        if "conversations" in row:
            turns = need(row, "conversations", list, where)
            text = need(turns[0] if turns else {}, "value", str, where)
            key = id_of(row, "id", where)
            prompt = text.replace("<image>", "").strip() + CHOICE
        else:
            prompt, key = need(row, "text", str, where), id_of(row, "question_id", where)
            key = (key, line_of(prompt)) if name == "textvqa" else key
        if prompts.get(key, prompt) != prompt:
            raise BadInput(f"{where}: a second prompt for {key}.")
        prompts[key] = prompt
    keys = [keys_of(name, question) for question in questions]
    missing = next((key for key in keys if key not in prompts), None)
    if missing is not None:
        raise BadInput(
            f"{path}: no prompt for the question {missing!r:.200}; is it of another split?"
        )
    return [replace(q, prompt=prompts[key]) for q, key in zip(questions, keys)]


def rotated(questions):
    """Each lettered question in all rotations of its options, as MMBench has them."""
    found = []
    for question in questions:
        texts, letters = list(question.options.values()), list(question.options)
        right = letters.index(question.truth)
        for k in range(len(letters)):
            options = dict(zip(letters, texts[k:] + texts[:k]))
            listed = lambda options: "\n".join(f"{a}. {text}" for a, text in options.items())
            if k and listed(question.options) not in question.prompt:
                raise BadInput(
                    f"question {question.id}: its prompt does not hold the options as lines "
                    "`A. ...`; they cannot be rotated."
                )
            prompt = question.prompt.replace(listed(question.options), listed(options))
            truth = letters[(right - k) % len(letters)]
            changes = {"options": options, "truth": truth, "prompt": prompt, "round": k}
            whole = {"whole": question.whole or question.id, "rotation": k > 0}
            found.append(replace(question, **changes, **whole))
    return found


# ---- answers


@dataclass(frozen=True)
class Answer:
    """What an answers file says: a model's text, or what an official script scores as it stands."""

    text: str
    official: bool = False


def answers_to(name, questions, path):
    """Answers file -> [Answer] in the order of the questions, each of which needs one.

    Rows, JSON lines or an array: {"question_id", "text"} (LLaVA, with "round_id" for rotations), or
    as the official scripts read them: {"question_id", "answer"} (VQA), {"questionId", "prediction"}
    (GQA), one object {question_id: option} (A-OKVQA); VLMEvalKit's table of "index", "prediction".
    """
    content = content_of(path)
    if isinstance(content, dict):  # A-OKVQA
        texts = {
            k: v.get("multiple_choice") if isinstance(v, dict) else v for k, v in content.items()
        }
        content = [
            (f"{path}, {key}", {"question_id": key, "answer": text}) for key, text in texts.items()
        ]
    of_key = {}
    for question in questions:
        of_key.setdefault(keys_of(name, question), []).append(question.id)
    texts_of = {question.id: flat(question.text) for question in questions}
    given = {}
    for where, row in content:
        key, answer, prompt = said(row, where)
        if name == "textvqa" and isinstance(prompt, str) and key not in texts_of:
            same = of_key.get((key, line_of(prompt)), [key])
            key = same.pop(0) if len(same) > 1 else same[0]
        if isinstance(prompt, str) and flat(prompt).find(texts_of.get(key, "")) < 0:
            raise BadInput(
                f"{where}: it answers {prompt!r:.80}, and question {key} is {texts_of[key]!r:.80}; "
                "is the file of another split?"
            )
        turn = need(row, "round_id", int, where) if "round_id" in row else 0
        if (key, turn) in given:
            raise BadInput(f"{where}: a second answer to question {key}; one is accepted.")
        given[key, turn] = answer
    found = [given.pop((q.id, q.round), None) for q in questions]
    if None in found:
        q = questions[found.index(None)]
        of_round = f", rotation {q.round}" if q.round else ""
        raise BadInput(
            f"{path}: question {q.id}{of_round} has no answer ({len(content)} answers to "
            f"{len(questions)} questions)."
        )
    if given:
        (key, turn), extra = next(iter(given)), len(given)
        raise BadInput(
            f"{path}: an answer to {key}{f', rotation {turn}' if turn else ''}, which is no "
            f"question of these files ({extra} such answers)."
        )
    return found


def flat(text):
    """A text in lower case with single blanks."""
    return " ".join(text.lower().split())


def said(row, where):
    """A row of an answers file -> (the question's id, Answer, the prompt that it names)."""
    keys = row if isinstance(row, dict) else {}
    name = next((k for k in ("question_id", "questionId", "index") if k in keys), "question_id")
    key = id_of(row, name, where)
    # LLaVA's rows have "text"; VQA's and GQA's are read as their scripts read them
    kind = next((k for k in ("text", "prediction", "answer") if k in keys), "text")
    text = row.get(kind)
    if not isinstance(text, str):
        raise BadInput(f"{where}: `{kind}` is {text!r:.80}; a string is needed.")
    official = kind == "answer" or name == "questionId"
    return key, Answer(text, official), row.get("prompt")
