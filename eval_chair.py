"""CHAIR (Rohrbach et al. 2018): which of the objects that a caption mentions are not in the picture?

    python eval_chair.py --instances FILE --captions FILE --synonyms FILE --images DIR --model DIR --out DIR --limit 500
    python eval_chair.py --instances FILE --captions FILE --synonyms FILE --answers FILE        only the score, no model

chair_i: of all mentions of objects, repetitions counted, the part that is hallucinated. chair_s: the part of the
captions that have one. recall: of the objects in the pictures, the part mentioned; without it, silence would be the
cure. length: mean words of a caption. In a picture are its annotated categories and whatever its reference captions
mention. A line of the synonym file is one object; its first form, the node word, stands for all. 0 / 0 is 0.

Words, as chair.py of LisaAnne/Hallucination has them: lower case, tokens, singular; compounds become one word ("hot
dog" is no dog, "baby elephant" no person); beside a toilet a seat is no chair. It uses NLTK's tokens and pattern.en's
singular. Here a plural ending is taken off only if that gives a word of the synonym file, and the compounds are those
of that file with a few fixed ones. In 97 % of 20,000 machine captions (caption_data of RUCAIBox/POPE) the mentions are
the same; there are 1.6 % more in all, because
1. "bus", which pattern.en makes "bu", an unknown word, counts (nine in ten of the differences), and so does "ties";
2. "motor bike", "cheesecake" and "iPhone" count: in the official list the first two begin with a blank and the third
   has a capital, so they never match; but "stove top oven" is one mention, not two (its compounds are of two words);
3. sentences without a blank between them ("a dog.A cat") are taken apart.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from common import BadInput, Parser, positive_int, run, write_json
from data import Record
from evaluation import add_flags, check_flags, load
from formats.files import find_image, rows
from sampling import generate

PROMPT = "Describe the image."
TOKEN = re.compile(
    r"\w+(?:(?:[-/]|'(?=\w\w))\w+)*|[^\w\s]"
)  # "t-shirt" and "o'clock" are one token, "dog's" is three
PLURALS = (("s", ""), ("ses", "s"), ("xes", "x"), ("ches", "ch"), ("shes", "sh"), ("ies", "y"), ("ves", "f"),
           ("ves", "fe"), ("men", "man"), ("people", "person"), ("children", "child"), ("mice", "mouse"),
           ("geese", "goose"))  # fmt: skip
ANIMALS = (
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "animal",
    "cub",
)
FIXED = {f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS} | {
    "passenger jet": "jet",
    "passenger train": "train",
    "toilet seat": "toilet",
    "home plate": "home plate",  # these two are no objects
    "train track": "train track",
}


@dataclass(frozen=True)
class Vocabulary:
    """A synonym file, ready for use."""

    nodes: dict  # form -> node word
    compounds: dict  # several words -> what they count as
    words: set  # the single words of all these
    longest: int  # words of the longest compound


@dataclass
class Picture:
    """What COCO files say about a picture."""

    file: str
    objects: set  # node words of its annotated categories
    captions: list  # its reference captions


def read_synonyms(path):
    """Synonym file -> Vocabulary. A line is one object: its forms, separated by commas, the node word first."""
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
                    f"{path}, line {number}: {form!r} is of {nodes[form]!r} already; a form has one object."
                )
    if not nodes or "" in nodes.values():
        raise BadInput(
            f"{path}: no word, or a line that begins with a comma; a line is the forms of one object."
        )
    compounds = FIXED | {form: form for form in nodes if " " in form}
    words = {word for text in (*nodes, *compounds) for word in text.split()}
    return Vocabulary(nodes, compounds, words, max(len(c.split()) for c in compounds))


def singular(word, known):
    """The word if it is known, else the known word that it is a plural of, else the word."""
    if word in known:
        return word
    singles = (word.removesuffix(end) + new for end, new in PLURALS if word.endswith(end))
    return next((s for s in singles if s in known), word)


def mentions(text, vocabulary):
    """Node words of the objects that a text mentions, in order, with repetition."""
    words = [singular(word, vocabulary.words) for word in TOKEN.findall(text.lower())]
    merged, i = [], 0
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
    """A COCO file -> function from a list's name to its (where, row)."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not a readable JSON file ({error}).") from None
    return lambda name: (
        (f"{path}, {name}[{i}]", row) for i, row in enumerate(field(content, name, list, path))
    )


def read_pictures(instances, captions, vocabulary):
    """COCO instance and caption files, lists of paths -> {image id: Picture}, as the instance files list them."""
    pictures = {}
    for file in map(coco, instances):
        nodes = {}
        for where, row in file("categories"):
            name = field(row, "name", str, where)
            if name not in vocabulary.nodes:
                raise BadInput(f"{where}: the category {name!r} is not in the synonym file.")
            nodes[field(row, "id", int, where)] = vocabulary.nodes[name]
        for where, row in file("images"):
            number, name = field(row, "id", int, where), field(row, "file_name", str, where)
            if pictures.setdefault(number, Picture(name, set(), [])).file != name:
                raise BadInput(
                    f"{where}: id {number} is {name!r} here and {pictures[number].file!r} elsewhere."
                )
        for where, row in file("annotations"):
            number, category = (
                field(row, "image_id", int, where),
                field(row, "category_id", int, where),
            )
            if category not in nodes:
                raise BadInput(
                    f"{where}: category_id {category} is not among the file's categories."
                )
            if number in pictures:  # one that is not listed is not evaluated
                pictures[number].objects.add(nodes[category])
    for file in map(coco, captions):
        for where, row in file("annotations"):
            number, text = field(row, "image_id", int, where), field(row, "caption", str, where)
            if number in pictures:
                pictures[number].captions.append(text)
    return pictures


def truth_of(numbers, pictures, vocabulary):
    """{image id: node words of all that is in the picture}, by its categories and its reference captions."""
    truth = {}
    for n in numbers:
        if not pictures[n].captions:
            raise BadInput(
                f"image id {n} ({pictures[n].file}) has no reference caption in --captions; one is needed."
            )
        truth[n] = pictures[n].objects.union(
            *(mentions(text, vocabulary) for text in pictures[n].captions)
        )
    return truth


def read_answers(path, pictures):
    """[{"image_id": id or file name, "caption"}], an array or JSON lines -> [(image id, caption)]."""
    ids = {p.file: number for number, p in pictures.items()} | {
        number: number for number in pictures
    }
    captions = []
    for i, row in rows(Path(path)):
        text = field(row, "caption", str, f"{path}, row {i}")
        name = row.get("image_id")
        if type(name) not in (int, str) or name not in ids:
            raise BadInput(
                f"{path}, row {i}: `image_id` is {name!r}; accepted are ids and file names of --instances."
            )
        captions.append((ids[name], text))
    return captions


def score(captions, truth, vocabulary):
    """[(image id, text)], {image id: set of node words} -> figures. A picture's second caption counts as its first."""
    if not captions:
        raise BadInput("there is no caption to score.")
    said = wrong = lying = found = there = words = 0
    for number, text in captions:
        objects = mentions(text, vocabulary)
        false = sum(o not in truth[number] for o in objects)
        said, wrong, lying = said + len(objects), wrong + false, lying + (false > 0)
        found, there = found + len(truth[number].intersection(objects)), there + len(truth[number])
        words += len(text.split())
    n = len(captions)
    chair_i, recall = wrong / max(1, said), found / max(1, there)
    return {"chair_i": chair_i, "chair_s": lying / n, "recall": recall, "length": words / n, "n": n}


def report(captions, truth, pictures, vocabulary, out):
    """Score; with `out`, write captions.jsonl and metrics.json there -> figures."""
    figures = score(captions, truth, vocabulary)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        with open(Path(out) / "captions.jsonl", "w", encoding="utf-8") as file:
            for number, text in captions:
                false = [o for o in mentions(text, vocabulary) if o not in truth[number]]
                row = {
                    "image_id": number,
                    "image": pictures[number].file,
                    "caption": text,
                    "hallucinated": false,
                }
                file.write(json.dumps(row) + "\n")
        write_json(Path(out) / "metrics.json", figures)
    return figures


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
    """Have the first `limit` pictures of the instance files described, greedily -> figures.

    instances, captions: lists of COCO files; images: folder. With `out`, writes captions.jsonl and metrics.json there.
    """
    vocabulary = read_synonyms(synonyms)
    pictures = read_pictures(instances, captions, vocabulary)
    chosen = list(pictures)[:limit]
    truth = truth_of(chosen, pictures, vocabulary)
    records = [
        Record(f"image id {n}", find_image(Path(images), pictures[n].file), (prompt,))
        for n in chosen
    ]
    texts = generate(
        model, processor, records, max_new_tokens, batch_size=batch_size, label="CHAIR"
    )
    return report(
        [(n, text) for n, (text,) in zip(chosen, texts)], truth, pictures, vocabulary, out
    )


def main():
    """Let a model describe the pictures, or score a captions file."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--instances",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="COCO instances, train and val",
    )
    add(
        "--captions",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="COCO captions, train and val",
    )
    add(
        "--synonyms",
        required=True,
        metavar="FILE",
        help="for COCO: data/synonyms.txt of LisaAnne/Hallucination",
    )
    add(
        "--answers",
        metavar="FILE",
        help="score these: lines or array of {image_id: id or file name, caption}",
    )
    add(
        "--prompt",
        default=PROMPT,
        help="default %(default)r; OPERA: 'Please describe this image in detail.'",
    )
    add(
        "--limit",
        type=positive_int,
        metavar="N",
        help="the first N pictures of --instances; OPERA: 500 at random",
    )
    add(
        "--max-new-tokens",
        type=positive_int,
        default=128,
        metavar="N",
        help="cuts captions (default %(default)s; OPERA: 512)",
    )
    add_flags(parser)
    args = parser.parse_args()
    check_flags(args)
    if args.limit and args.answers:
        raise BadInput("--limit does not go with --answers: a captions file is scored whole.")
    if args.answers:
        vocabulary = read_synonyms(args.synonyms)
        pictures = read_pictures(args.instances, args.captions, vocabulary)
        captions = read_answers(args.answers, pictures)
        truth = truth_of({number for number, _ in captions}, pictures, vocabulary)
        figures = report(captions, truth, pictures, vocabulary, args.out)
    else:
        figures = evaluate(
            *load(args),
            args.instances,
            args.captions,
            args.synonyms,
            args.images,
            args.out,
            args.prompt,
            args.limit,
            args.max_new_tokens,
            args.batch_size,
        )
    for name, value in figures.items():
        print(f"{name:8}{value:10.4f}" if name != "n" else f"{name:8}{value:10d}")


if __name__ == "__main__":
    run(main)
