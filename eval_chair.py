"""CHAIR (Rohrbach et al. 2018): how many of the objects that a caption mentions are not there?

    python eval_chair.py --instances FILE --captions FILE --synonyms FILE \\
        --images DIR --model DIR --out DIR --limit 500
    python eval_chair.py --instances FILE --captions FILE --synonyms FILE --answers FILE

The second form only scores; it needs no model.

    chair_i   of all mentions of objects, repetitions counted, the share that is hallucinated
    chair_s   the share of captions with a hallucinated object
    recall    of the objects in the images, the share that is mentioned; without this figure, a
              model that says nothing would be the best
    length    mean number of words of a caption
0 / 0 is 0.

An object is in an image if its category is annotated or a reference caption mentions it. A line of
the synonym file is one object. Its first form, the node word, stands for all of them.

Words are taken as chair.py of LisaAnne/Hallucination takes them: lower case, tokens, singular.
Compounds become one word: "hot dog" is no dog, "baby elephant" is no person. In a caption with a
toilet, a seat is no chair.

Deviations: the original uses NLTK's tokens and pattern.en's singular. Here a plural ending is taken
off only if that gives a word of the synonym file. The compounds are those of that file and a few
fixed ones. In 97 % of 20,000 machine captions (caption_data of RUCAIBox/POPE) the mentions are the
same. There are 1.6 % more in all, because
1. "bus" counts, and so does "ties". pattern.en makes "bus" the unknown word "bu"; this is nine in
   ten of the differences.
2. "motor bike", "cheesecake" and "iPhone" count. In the official list the first two begin with a
   blank and the third has a capital, so they never match. But "stove top oven" is one mention, not
   two: the official compounds have two words.
3. Sentences without a blank between them ("a dog.A cat") are split.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import evaluation
from common import BadInput, Parser, positive_int, run, write_json
from data import Record
from formats.files import ImageFolder, image_folders, rows

PROMPT = "Describe the image."
# "t-shirt" and "o'clock" are one token, "dog's" is three
TOKEN = re.compile(r"\w+(?:(?:[-/]|'(?=\w\w))\w+)*|[^\w\s]")
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


@dataclass
class Picture:
    """What COCO files say about an image."""

    file: str
    objects: set  # node words of its annotated categories
    captions: list  # its reference captions


def read_synonyms(path):
    """Synonym file -> Vocabulary.

    A line is one object: its forms, separated by commas, the node word first.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--synonyms {path}: not a readable text file ({error}).") from None
    nodes = {}
    for number, line in enumerate(lines, 1):
        forms = [" ".join(form.lower().split()) for form in line.split(",")]
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
    return Vocabulary(nodes, compounds, words, longest)


def singular(word, known):
    """The known word that a word is a plural of; the word itself if it is known or has none."""
    if word in known:
        return word
    singulars = (word.removesuffix(end) + new for end, new in PLURALS if word.endswith(end))
    return next((s for s in singulars if s in known), word)


def mentions(text, vocabulary):
    """Node words of the objects that a text mentions, in order, with repetition."""
    words = [singular(word, vocabulary.words) for word in TOKEN.findall(text.lower())]

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


def field(row, key, kind, where):
    """row[key], which must be of type `kind`."""
    value = row.get(key) if isinstance(row, dict) else None
    if type(value) is not kind:
        raise BadInput(f"{where}: `{key}` is {value!r:.80}; {kind.__name__} is needed.")
    return value


def coco(path):
    """A COCO file -> function from the name of a list in it to that list's (where, row)."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not a readable JSON file ({error}).") from None

    def entries(name):
        """Each row with its place in the file, for messages."""
        for i, row in enumerate(field(content, name, list, path)):
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
            name = field(row, "name", str, where)
            if name not in vocabulary.nodes:
                raise BadInput(f"{where}: the category {name!r} is not in the synonym file.")
            categories[field(row, "id", int, where)] = vocabulary.nodes[name]

        for where, row in entries("images"):
            number = field(row, "id", int, where)
            name = field(row, "file_name", str, where)
            if pictures.setdefault(number, Picture(name, set(), [])).file != name:
                raise BadInput(
                    f"{where}: id {number} is {name!r} here and "
                    f"{pictures[number].file!r} elsewhere."
                )

        for where, row in entries("annotations"):
            number = field(row, "image_id", int, where)
            category = field(row, "category_id", int, where)
            if category not in categories:
                raise BadInput(
                    f"{where}: category_id {category} is not among the file's categories."
                )
            if number in pictures:  # an image that is not listed is not evaluated
                pictures[number].objects.add(categories[category])

    for entries in map(coco, captions):
        for where, row in entries("annotations"):
            number = field(row, "image_id", int, where)
            text = field(row, "caption", str, where)
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


def read_answers(path, pictures):
    """Answers file -> [(image id, caption)].

    Rows, JSON lines or an array, are {"image_id": id or file name, "caption"}.
    """
    ids = {picture.file: number for number, picture in pictures.items()}
    ids |= {number: number for number in pictures} | {str(number): number for number in pictures}
    captions = []
    for i, row in rows(Path(path)):
        text = field(row, "caption", str, f"{path}, row {i}")
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
    return captions


def score(captions, truth, vocabulary):
    """[(image id, text)], {image id: set of node words} -> figures.

    A second caption of an image counts like the first.
    """
    if not captions:
        raise BadInput("there is no caption to score.")
    n = len(captions)
    mentioned = 0  # mentions of objects
    hallucinated = 0  # those of objects that are not in the image
    false_captions = 0  # captions with such a mention
    present = 0  # objects in the images
    recalled = 0  # those that are mentioned
    words = 0
    for number, text in captions:
        objects = mentions(text, vocabulary)
        absent = sum(name not in truth[number] for name in objects)
        mentioned += len(objects)
        hallucinated += absent
        false_captions += absent > 0
        present += len(truth[number])
        recalled += len(truth[number].intersection(objects))
        words += len(text.split())
    return {
        "chair_i": hallucinated / max(1, mentioned),
        "chair_s": false_captions / n,
        "recall": recalled / max(1, present),
        "length": words / n,
        "n": n,
    }


def report(captions, truth, pictures, vocabulary, out):
    """[(image id, text)] -> figures. With `out`, writes captions.jsonl and metrics.json there."""
    figures = score(captions, truth, vocabulary)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        with open(Path(out) / "captions.jsonl", "w", encoding="utf-8") as file:
            for number, text in captions:
                objects = mentions(text, vocabulary)
                row = {
                    "image_id": number,
                    "image": pictures[number].file,
                    "caption": text,
                    "hallucinated": [name for name in objects if name not in truth[number]],
                }
                file.write(json.dumps(row) + "\n")
        write_json(Path(out) / "metrics.json", figures)
    return figures


def read(instances, captions, synonyms, images, prompt=PROMPT, limit=None):
    """COCO's files -> (vocabulary, pictures, truth, {image id: Record}) of the first `limit` images."""
    vocabulary = read_synonyms(synonyms)
    pictures = read_pictures(instances, captions, vocabulary)
    numbers = list(pictures)[:limit]
    truth = truth_of(numbers, pictures, vocabulary)

    records = {}
    folder = ImageFolder(images or image_folders(instances[0]))
    for number in numbers:
        image = folder.find(pictures[number].file)
        records[number] = Record(f"image id {number}", image, (prompt,))
    folder.report()
    return vocabulary, pictures, truth, records


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
    read_in = read(instances, captions, synonyms, images, prompt, limit)
    vocabulary, pictures, truth, records = read_in
    contestant = evaluation.in_memory(model, processor, batch_size)
    texts = evaluation.answer(contestant, list(records.values()), max_new_tokens, None, "CHAIR")
    return report(list(zip(records, texts)), truth, pictures, vocabulary, out)


def score_file(instances, captions, synonyms, answers, out=None):
    """Captions file -> figures. With `out`, writes captions.jsonl and metrics.json there."""
    vocabulary = read_synonyms(synonyms)
    pictures = read_pictures(instances, captions, vocabulary)
    described = read_answers(answers, pictures)
    truth = truth_of({number for number, _ in described}, pictures, vocabulary)
    return report(described, truth, pictures, vocabulary, out)


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
        help="for COCO: data/synonyms.txt of LisaAnne/Hallucination",
    )
    flag(
        "--answers",
        metavar="FILE",
        help="score this file: lines or array of {image_id: id or file name, caption}",
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
    return args


def main():
    """Let a model describe the images, or score a captions file; print the figures."""
    args = parse()
    files = args.instances, args.captions, args.synonyms
    if args.answers:
        figures = score_file(*files, args.answers, args.out)
    else:
        read_in = read(*files, args.images, args.prompt, args.limit)
        vocabulary, pictures, truth, records = read_in
        about = {
            "files": evaluation.hashes([*args.instances, *args.captions, args.synonyms]),
            "prompt": args.prompt,
            "limit": args.limit,
            "max_new_tokens": args.max_new_tokens,
        }
        for contestant in evaluation.contestants(args, about):
            texts = evaluation.answer(
                contestant,
                list(records.values()),
                args.max_new_tokens,
                contestant.path("replies.jsonl"),
                "CHAIR",
            )
            contestant.release()
            described = list(zip(records, texts))
            figures = report(described, truth, pictures, vocabulary, contestant.folder)
    for name, value in figures.items():
        number = f"{value:10d}" if name == "n" else f"{value:10.4f}"
        print(f"{name:8}{number}")


if __name__ == "__main__":
    run(main)
