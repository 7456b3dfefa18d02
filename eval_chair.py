"""CHAIR (Rohrbach et al. 2018): how many of the objects that a caption mentions are not there?

    python eval_chair.py --instances FILE... --captions FILE... --synonyms FILE \\
        --images DIR --model DIR --adapter none runs/dpo-0/adapter --out DIR --limit 500
    python eval_chair.py --instances FILE... --captions FILE... --synonyms FILE --answers FILE...
    python eval_chair.py --instances FILE... --captions FILE... --synonyms FILE \\
        --questions obj_halbench_300_with_image.jsonl --model DIR --out DIR

The first form asks (evaluation.py says who can be asked, and how a run goes on). The second only
scores, a file a contestant; it needs no model. The third takes images and prompts from Object
HalBench (RLHF-V).

    chair_i   of all mentions of objects, repetitions counted, the share that is hallucinated
    chair_s   the share of captions with a hallucinated object
    recall    of the objects in the images, the share that is mentioned; without this figure, a
              model that says nothing would be the best
    length    mean number of words of a caption
0 / 0 is 0.

An object is in an image if its category is annotated or a reference caption mentions it. A line of
the synonym file is one object. Its first form, the node word, stands for all of them.

With --questions, `chair_s_refine` is the share among the captions that mention an object at all,
Object HalBench's "response hallucination". Its own figures are others: there gpt-3.5-turbo-0613,
retired, lists the objects of an answer; here the words are looked up, as its script does without
--use_gpt. So name them "Object HalBench's prompts, CHAIR's rule". Its `obj_rec` is our recall; it
is the column Recall of Amirloo et al. 2024, who listed the objects with GPT.

Words are taken as chair.py of LisaAnne/Hallucination takes them: lower case, tokens, singular.
Compounds become one word: "hot dog" is no dog, "baby elephant" is no person. In a caption with a
toilet, a seat is no chair.

Deviations: the original uses NLTK's tokens and pattern.en's singular. Here a plural ending is taken
off only if that gives a word of the synonym file. The compounds are those of that file and a few
fixed ones. Of 20,000 machine captions (caption_data of RUCAIBox/POPE), 575 have other mentions here
than by the original's rule. All of them, with the number of captions (one has both 1 and 2):
1. (501) a bus counts. pattern.en makes "bus" the unknown word "bu", and so "airbus" and "minibus";
   "buses" it reads
2. (43)  "ties" count, as do "canoes". pattern.en makes them "ty" and "cano"; it fails likewise for
   collies, doggies, magpies, thieves
3. (13)  "cheesecake" (9) and "iPhone" (4) count, and so does "motor bike" (0). In the official list
   the two others begin with a blank and "iPhone" has a capital, so they never match
4. (4)   "stove top oven" is one mention, not two: the official compounds have two words
5. (15)  words that the original leaves glued: a sentence without a blank before it ("a dog.A cat"),
   and in one caption an invisible blank
--original counts as the original does: for comparison with published figures. It differs from it in
one caption of the 20,000, that with the invisible blank.
"""

from common import (
    BadInput,
    Parser,
    file_hash,
    positive_int,
    run,
    whole_folder,
    write_json,
    write_text,
)

import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import comparison
import evaluation
import processes
from data import Record
from formats.files import ImageFolder, image_folders, need, rows

PROMPT = "Describe the image."
# "t-shirt" and "o'clock" are one token, "dog's" is three
TOKEN = re.compile(r"\w+(?:(?:[-/]|'(?=\w\w))\w+)*|[^\w\s]")
# --original: so is "dog.A"; and these words are not found, as pattern.en spoils them
GLUED = re.compile(r"\w+(?:(?:[-/.]|'(?=\w\w))\w+)*|[^\w\s]")
LOST = set("bus airbus minibus ties canoes collies doggies magpies thieves".split())
PLURALS = (
    ("s", ""),
    ("ses", "s"),
    ("xes", "x"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("ies", "y"),
    ("ves", "f"),
    ("ves", "fe"),
    ("men", "man"),
    ("people", "person"),
    ("children", "child"),
    ("mice", "mouse"),
    ("geese", "goose"),
)
ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()
FIXED = {f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS} | {
    "passenger jet": "jet",
    "passenger train": "train",
    "toilet seat": "toilet",
    "home plate": "home plate",  # this and the next are no objects
    "train track": "train track",
}


@dataclass(frozen=True)
class Vocabulary:
    """A synonym file, ready for use."""

    nodes: dict  # form -> node word
    compounds: dict  # phrase of several words -> the word that it counts as
    words: set  # the single words of all forms and compounds
    longest: int  # number of words in the longest compound
    original: bool = False  # with the original's faults


@dataclass
class Picture:
    """What COCO files say about an image."""

    file: str
    objects: set  # node words of its annotated categories
    captions: list  # its reference captions


def read_synonyms(path, original=False):
    """Synonym file -> Vocabulary.

    A line is one object: its forms, separated by commas, the node word first. original: a form that
    the original's script cannot find is left out.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--synonyms {path}: not a readable text file ({error}).") from None
    nodes = {}
    for number, line in enumerate(lines, 1):
        written = line.split(",")
        if original:
            written = line.strip().split(", ")
            written = [f for f in written if f == f.strip().lower() and len(f.split()) < 3]
        forms = [" ".join(form.lower().split()) for form in written]
        for form in filter(None, forms):
            if nodes.setdefault(form, forms[0]) != forms[0]:
                raise BadInput(
                    f"{path}, line {number}: {form!r} is of {nodes[form]!r} already; "
                    "a form has one object."
                )
    if not nodes or "" in nodes.values():
        raise BadInput(
            f"{path}: no word, or a line that begins with a comma; "
            "a line is the forms of one object."
        )

    compounds = FIXED | {form: form for form in nodes if " " in form}
    words = {word for text in (*nodes, *compounds) for word in text.split()}
    longest = max(len(compound.split()) for compound in compounds)
    return Vocabulary(nodes, compounds, words, longest, original)


def singular(word, known):
    """The known word that a word is a plural of; the word itself if it is known or has none."""
    if word in known:
        return word
    singulars = (word.removesuffix(end) + new for end, new in PLURALS if word.endswith(end))
    return next((s for s in singulars if s in known), word)


def mentions(text, vocabulary):
    """Node words of the objects that a text mentions, in order, with repetition."""
    tokens = (GLUED if vocabulary.original else TOKEN).findall(text.lower())
    lost = LOST if vocabulary.original else ()
    words = ["" if word in lost else singular(word, vocabulary.words) for word in tokens]

    # from left to right, replace the longest compound that begins here
    merged = []
    i = 0
    while i < len(words):
        for n in range(vocabulary.longest, 0, -1):
            phrase = " ".join(words[i : i + n])
            if n == 1 or phrase in vocabulary.compounds:
                break
        merged.append(vocabulary.compounds.get(phrase, phrase))
        i += n

    if "toilet" in merged:
        merged = [word for word in merged if word != "seat"]
    return [vocabulary.nodes[word] for word in merged if word in vocabulary.nodes]


def coco(path):
    """A COCO file -> function from the name of a list in it to that list's (where, row)."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not a readable JSON file ({error}).") from None

    def entries(name):
        """Each row with its place in the file, for messages."""
        for i, row in enumerate(need(content, name, list, path)):
            yield f"{path}, {name}[{i}]", row

    return entries


def read_pictures(instances, captions, vocabulary):
    """COCO instance and caption files, lists of paths -> {image id: Picture}.

    The images stand in the order of the instance files.
    """
    pictures = {}
    for entries in map(coco, instances):
        categories = {}  # id -> node word
        for where, row in entries("categories"):
            name = need(row, "name", str, where)
            if name not in vocabulary.nodes:
                raise BadInput(f"{where}: the category {name!r} is not in the synonym file.")
            categories[need(row, "id", int, where)] = vocabulary.nodes[name]

        for where, row in entries("images"):
            number = need(row, "id", int, where)
            name = need(row, "file_name", str, where)
            if pictures.setdefault(number, Picture(name, set(), [])).file != name:
                raise BadInput(
                    f"{where}: id {number} is {name!r} here and "
                    f"{pictures[number].file!r} elsewhere."
                )

        for where, row in entries("annotations"):
            number = need(row, "image_id", int, where)
            category = need(row, "category_id", int, where)
            if category not in categories:
                raise BadInput(
                    f"{where}: category_id {category} is not among the file's categories."
                )
            if number in pictures:  # an image that is not listed is not evaluated
                pictures[number].objects.add(categories[category])

    for entries in map(coco, captions):
        for where, row in entries("annotations"):
            number = need(row, "image_id", int, where)
            text = need(row, "caption", str, where, empty=True)
            if number in pictures:
                pictures[number].captions.append(text)
    return pictures


def truth_of(numbers, pictures, vocabulary):
    """{image id: node words of its objects}, from its categories and its reference captions."""
    truth = {}
    for number in numbers:
        picture = pictures[number]
        if not picture.captions:
            raise BadInput(
                f"image id {number} ({picture.file}) has no reference caption in --captions; "
                "one is needed."
            )
        mentioned = [mentions(text, vocabulary) for text in picture.captions]
        truth[number] = picture.objects.union(*mentioned)
    return truth


# ---- Object HalBench


def read_prompts(path, pictures):
    """Object HalBench's rows {"image_id", "question", "image"} -> [(image id, prompt)]."""
    prompts = []
    for i, row in rows(Path(path)):
        where = f"{path}, row {i}"
        number = need(row, "image_id", int, where)
        if number not in pictures:
            raise BadInput(f"{where}: image id {number} is not in --instances.")
        prompts.append((number, need(row, "question", str, where)))
    doubled = next((pair for pair in prompts if prompts.count(pair) > 1), None)
    if doubled or not prompts:
        raise BadInput(f"{path}: {f'{doubled} is there twice' if doubled else 'no prompt'}.")
    return prompts


def unpack_images(path):
    """The images inside Object HalBench's file, as files in `.cache` -> {image id: path}."""
    folder = Path(".cache") / f"object-halbench-{file_hash(path)[:16]}"
    numbers = {}
    with whole_folder(folder) as aside:
        for i, row in rows(Path(path)):
            where, number = f"{path}, row {i}", row["image_id"]
            try:
                content = base64.b64decode(need(row, "image", str, where), validate=True)
            except ValueError:
                raise BadInput(
                    f"{where}: `image` is no image in base64; without one, --images is needed."
                ) from None
            numbers[number] = folder / f"{number}.jpg"
            (aside / f"{number}.jpg").write_bytes(content)
    return numbers


# ---- scoring


def read_answers(path, pictures, prompts=None):
    """Answers file -> [(image id, caption)].

    Rows, JSON lines or an array, are {"image_id": id or file name, "caption"}; RLHF-V's files have
    the caption in `text` or `answer`. prompts: [(image id, prompt)] that must be answered, each
    once; then the result has their order.
    """
    ids = {picture.file: number for number, picture in pictures.items()}
    ids |= {number: number for number in pictures} | {str(number): number for number in pictures}
    captions, asked = [], []
    for i, row in rows(Path(path)):
        key = next((k for k in ("text", "answer") if isinstance(row, dict) and k in row), "caption")
        key = "caption" if "caption" in row else key
        text = need(row, key, str, f"{path}, row {i}", empty=True)
        name = row.get("image_id")
        if type(name) not in (int, str) or name not in ids:
            raise BadInput(
                f"{path}, row {i}: `image_id` is {name!r}; "
                "accepted are ids and file names of --instances."
            )
        named = row.get("image")  # in our own files, beside the id
        if isinstance(named, str) and Path(named).name != Path(pictures[ids[name]].file).name:
            raise BadInput(
                f"{path}, row {i}: the image is {named!r}, but `image_id` {name!r} is "
                f"{pictures[ids[name]].file!r} in --instances; is the file of another split?"
            )
        captions.append((ids[name], text))
        asked.append((ids[name], row.get("question", row.get("prompt"))))
    return captions if prompts is None else in_order(path, prompts, asked, captions)


def in_order(path, prompts, asked, captions):
    """The captions in the order of the prompts; a row without its prompt is known by its image."""
    alone = len({number for number, _ in prompts}) == len(prompts)
    keys = [number if alone and text is None else (number, text) for number, text in asked]
    places = {}
    for place, key in enumerate(keys):
        if key in places:
            raise BadInput(f"{path}, row {place}: a second answer to {key}; one is accepted.")
        places[key] = place
    found = [places.get(pair, places.get(pair[0])) for pair in prompts]
    if None in found:
        raise BadInput(f"{path}: {prompts[found.index(None)]} has no answer.")
    if len(found) < len(keys):
        extra = next(key for place, key in enumerate(keys) if place not in found)
        raise BadInput(f"{path}: an answer to {extra}, which is no question of --questions.")
    return [captions[place] for place in found]


COUNTED = ("mentioned", "hallucinated", "false", "present", "recalled", "words", "n", "with_object")


def counts(number, text, truth, vocabulary):
    """What a caption adds to each of COUNTED: mentions, those not there, 1 with such a one, ..."""
    objects = mentions(text, vocabulary)
    absent = sum(name not in truth[number] for name in objects)
    recalled = len(truth[number].intersection(objects))
    present, words = len(truth[number]), len(text.split())
    return [len(objects), absent, absent > 0, present, recalled, words, 1, len(objects) > 0]


def ratios(sums, refine):
    """Sums (..., 8) of `counts` -> the figures; refine: also that of Object HalBench."""
    mentioned, hallucinated, false, present, recalled, words, n, with_object = np.moveaxis(
        sums, -1, 0
    )
    figures = {
        "chair_i": hallucinated / np.maximum(1, mentioned),
        "chair_s": false / np.maximum(1, n),
        "recall": recalled / np.maximum(1, present),
        "length": words / np.maximum(1, n),
    }
    return figures | ({"chair_s_refine": false / np.maximum(1, with_object)} if refine else {})


def score(captions, truth, vocabulary, refine=False):
    """[(image id, text)], {image id: set of node words} -> figures.

    A second caption of an image counts like the first.
    """
    if not captions:
        raise BadInput("there is no caption to score.")
    sums = np.sum([counts(number, text, truth, vocabulary) for number, text in captions], axis=0)
    return {k: float(v) for k, v in ratios(sums, refine).items()} | {"n": len(captions)}


def report(captions, truth, pictures, vocabulary, out, prompts=None):
    """[(image id, text)] -> figures. With `out`, writes captions.jsonl and metrics.json there.

    prompts: Object HalBench's, in the order of the captions; they are written too.
    """
    figures = score(captions, truth, vocabulary, refine=prompts is not None)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        lines = []
        for i, (number, text) in enumerate(captions):
            objects = mentions(text, vocabulary)
            row = {
                "image_id": number,
                "image": pictures[number].file,
                "caption": text,
                "hallucinated": [name for name in objects if name not in truth[number]],
            }
            if prompts:  # as RLHF-V's script reads it
                row |= {"question": prompts[i][1], "text": text}
            lines.append(json.dumps(row) + "\n")
        write_text(Path(out) / "captions.jsonl", "".join(lines))
        write_json(Path(out) / "metrics.json", figures)
    return figures


# ---- asking


def read(
    instances,
    captions,
    synonyms,
    images,
    prompt=PROMPT,
    limit=None,
    questions=None,
    original=False,
):
    """COCO's files -> (vocabulary, pictures, truth, [(image id, prompt)], [Record]).

    Of the first `limit` images, or with `questions` of Object HalBench's.
    """
    vocabulary = read_synonyms(synonyms, original)
    pictures = read_pictures(instances, captions, vocabulary)
    if questions:
        prompts = read_prompts(questions, pictures)[:limit]
    else:
        prompts = [(number, prompt) for number in list(pictures)[:limit]]
    truth = truth_of({number for number, _ in prompts}, pictures, vocabulary)

    packed = unpack_images(questions) if questions and not images else {}
    folder = ImageFolder(images or image_folders(instances[0]))
    records = []
    for number, text in prompts:
        image = packed.get(number) or folder.find(pictures[number].file)
        records.append(Record(f"image id {number}", image, (text,)))
    folder.report()
    return vocabulary, pictures, truth, prompts, records


def evaluate(
    model,
    processor,
    instances,
    captions,
    synonyms,
    images,
    out=None,
    prompt=PROMPT,
    limit=None,
    max_new_tokens=128,
    batch_size=64,
):
    """Let a model in memory describe the first `limit` images of the instance files -> figures.

    instances, captions: lists of COCO files. images: a folder. Decoding is greedy. With `out`,
    writes captions.jsonl and metrics.json there.
    """
    vocabulary, pictures, truth, prompts, records = read(
        instances, captions, synonyms, images, prompt, limit
    )
    contestant = evaluation.in_memory(model, processor, batch_size)
    texts = evaluation.answer(contestant, records, max_new_tokens, None, "CHAIR")
    said = [(number, text) for (number, _), text in zip(prompts, texts)]
    return report(said, truth, pictures, vocabulary, out)


# ---- the command line


def compared(said, truth, vocabulary, refine):
    """{contestant: [(image id, text)]} -> `comparison.compare`, with images as the units."""
    first, *others = said
    numbers = sorted({number for number, _ in said[first]})
    for name in others:
        theirs = {number for number, _ in said[name]}
        if theirs != set(numbers):
            odd = min(theirs ^ set(numbers))
            raise BadInput(
                f"image id {odd} has a caption of {first if odd in numbers else name} alone; "
                "contestants are compared on the same images."
            )
    place = {number: i for i, number in enumerate(numbers)}
    units = {name: np.zeros((len(numbers), len(COUNTED))) for name in said}
    for name, captions in said.items():
        for number, text in captions:
            units[name][place[number]] += counts(number, text, truth, vocabulary)
    return comparison.compare(units, lambda sums: ratios(sums, refine))


def changed(first, other, names, truth, vocabulary, image_of):
    """Rows of `comparison.sheet`: captions of an image with other hallucinated objects."""
    wrong = lambda number, text: [
        name for name in mentions(text, vocabulary) if name not in truth[number]
    ]
    found = []
    for (number, text), (_, theirs) in zip(sorted(first), sorted(other)):
        objects = [wrong(number, text), wrong(number, theirs)]
        if set(objects[0]) != set(objects[1]):
            told = [f"{n} ({', '.join(dict.fromkeys(o)) or '-'})" for n, o in zip(names, objects)]
            answers = list(zip(told, (text, theirs), (not objects[0], not objects[1])))
            found.append(
                (image_of(number), f"image id {number} (in brackets: said and not there)", answers)
            )
    return found


def finish(said, truth, pictures, vocabulary, prompts, args):
    """Print and write what is known of {contestant: [(image id, text)]}."""
    figures = {
        name: score(captions, truth, vocabulary, prompts is not None)
        for name, captions in said.items()
    }
    results = compared(said, truth, vocabulary, prompts is not None)
    if prompts:
        print("Object HalBench's prompts, CHAIR's rule: not comparable with figures of its judge")
    n = next(iter(figures.values()))["n"]
    print(f"{n} captions; 95 % intervals (bootstrap over images; differences are paired)")
    print("\n".join(comparison.table(results)))

    if args.out:
        details = {name: {"intervals": r} for name, r in results.items()}
        comparison.write_figures(args.out, figures, details)
        folder = ImageFolder(args.images or image_folders(args.instances[0]))
        image_of = lambda number: folder.look_up(pictures[number].file)[0]
        rows_of = lambda *two: changed(*(said[w] for w in two), two, truth, vocabulary, image_of)
        comparison.sheets(args.out, said, "captions that hallucinate other objects", rows_of)


def parse():
    """The command line."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag(
        "--instances",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="COCO instances, train and val",
    )
    flag(
        "--captions",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="COCO captions, train and val",
    )
    flag(
        "--synonyms",
        required=True,
        metavar="FILE",
        help="for COCO: data/synonyms.txt of LisaAnne/Hallucination; Object HalBench has one of "
        "its own, eval/data/synonyms_refine.txt of RLHF-V/RLHF-V",
    )
    flag(
        "--original",
        action="store_true",
        help="count with the faults of the original script, for comparison with published figures",
    )
    flag(
        "--questions",
        metavar="FILE",
        help="Object HalBench's images and prompts, obj_halbench_300_with_image.jsonl of RLHF-V",
    )
    flag(
        "--answers",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="score these files, one a contestant: lines or array of {image_id: id or file name, "
        "caption}",
    )
    flag(
        "--prompt",
        default=PROMPT,
        help="default %(default)r; OPERA: 'Please describe this image in detail.'",
    )
    flag(
        "--limit",
        type=positive_int,
        metavar="N",
        help="the first N images of --instances; OPERA: 500 at random",
    )
    flag(
        "--max-new-tokens",
        type=positive_int,
        default=128,
        metavar="N",
        help="cuts captions after N tokens (default %(default)s; OPERA: 512)",
    )
    evaluation.add_flags(parser)
    args = parser.parse_args()
    evaluation.check_flags(args)
    if args.limit and args.answers:
        raise BadInput("--limit does not go with --answers: a captions file is scored whole.")
    if args.questions and "prompt" in args.given:
        raise BadInput("--prompt does not go with --questions, which has prompts of its own.")
    return args


def read_said(args):
    """--answers -> {contestant: [(image id, text)]}, truth, pictures, vocabulary, prompts."""
    vocabulary = read_synonyms(args.synonyms, args.original)
    pictures = read_pictures(args.instances, args.captions, vocabulary)
    prompts = read_prompts(args.questions, pictures) if args.questions else None
    said = {}
    for name, path in zip(evaluation.names_of_files(args.answers), args.answers):
        said[name] = read_answers(path, pictures, prompts)
    numbers = {number for captions in said.values() for number, _ in captions}
    return said, truth_of(numbers, pictures, vocabulary), pictures, vocabulary, prompts


def ask(args):
    """Let each contestant describe the images -> as `read_said`."""
    files = args.instances, args.captions, args.synonyms
    vocabulary, pictures, truth, prompts, records = read(
        *files, args.images, args.prompt, args.limit, args.questions, args.original
    )
    more = [args.questions] if args.questions else []

    # what a run that goes on must share
    about = {
        "files": evaluation.hashes([*args.instances, *args.captions, args.synonyms, *more]),
        "prompt": args.prompt,
        "limit": args.limit,
        "original": args.original,
        "max_new_tokens": args.max_new_tokens,
    }

    said, numbers = {}, [number for number, _ in prompts]
    prompts = prompts if args.questions else None
    for contestant in evaluation.contestants(args, about):
        path = contestant.path("replies.jsonl")
        texts = evaluation.answer(contestant, records, args.max_new_tokens, path, "CHAIR")
        contestant.release()
        said[contestant.name] = list(zip(numbers, texts))
        report(said[contestant.name], truth, pictures, vocabulary, contestant.folder, prompts)
    args.out = args.out if processes.number == 0 else None
    return said, truth, pictures, vocabulary, prompts


def main():
    """Let contestants describe the images, or read captions files; score."""
    args = parse()
    said, truth, pictures, vocabulary, prompts = read_said(args) if args.answers else ask(args)
    if args.answers and args.out and len(said) == 1:
        (captions,) = said.values()
        report(captions, truth, pictures, vocabulary, args.out, prompts)
    finish(said, truth, pictures, vocabulary, prompts, args)


if __name__ == "__main__":
    run(main)
