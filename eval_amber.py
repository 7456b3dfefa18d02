"""AMBER (Wang et al. 2023): hallucination without a judge, in descriptions and in yes/no questions.

    python eval_amber.py --questions data/query/query_all.json --images image \\
        --model DIR --adapter none runs/dpo-0/adapter --out DIR
    python eval_amber.py --questions data/query/query_generative.json --answers responses.json

The first form asks (evaluation.py says who can be asked, and how a run goes on). The second only
scores, a file a contestant; it needs no model. Any of AMBER's query files may be given. Its folder
data/ with annotations.json, relation.json and safe_words.txt is --data (default: found from the
question file).

Descriptions, by inference.py of junyangwang0410/AMBER. The vocabulary is all words of
relation.json, {word: associated words}. Each noun of a description that is in the vocabulary is
looked up, repetitions too, in this order:
    1. a safe word is fine
    2. a word of the picture, or one associated with it, is fine, and covers that word of it
    3. a word that models like to invent for this picture, or one associated with it, marks it
    4. a word similar to one of 3 marks it; one similar to a word of 2 is fine, and covers it
    5. any other noun is a hallucination
    chair   of these nouns, the share that is hallucinated
    cover   of the picture's words, the share that is covered
    hal     the share of descriptions with a hallucination
    cog     of the words that models like to invent, the share that is marked
--rule official takes nouns from NLTK (tagged, then WordNet's lemma; not lower-cased, so a noun that
begins a sentence is missed), and two words are similar if spaCy's en_core_web_lg says more than .8.
--rule plain needs no other package: every word of the vocabulary is a noun, plurals by WordNet's
endings, and step 4 is left out: more nouns are hallucinations, fewer words are covered. Name the
rule with the figure.

Questions. "No" is the positive class: right where the thing asked about is not there.
    accuracy, precision, recall, f1     of all questions, and by existence, attribute (state,
                                        number, action) and relation
An answer other than "Yes" and "No" is wrong, and counts for no precision. A model's text becomes
one of them by its first word, in any case; an official file, {"id", "response"}, is scored as it
stands. `unreadable` is the share of the others. All answers of existence are no: its accuracy is
its recall, and a model that always denies is perfect there.
    amber   (1 - chair + f1) / 2, the paper's score

Files in --out, of several contestants in a folder each:
    metrics.json        fractions of 1; `official`: what inference.py prints, percent with one
                        digit (f1 of the rounded precision and recall, denominators begin at .001);
                        of several {contestant: figures}
    details.json        intervals, differences
    responses.json      for inference.py: the same figures
    changed-<name>.png  pictures whose questions are answered otherwise than by the first contestant

Deviations from inference.py: a ratio of nothing is 0, also where a denominator of .001 hides it;
every question needs one answer; questions are asked as they are (--suffix adds to them, papers do).
"""

from common import BadInput, Parser, positive_int, read_json, run, write_json

import re
from pathlib import Path

import numpy as np

import comparison
import evaluation
import processes
from data import Record
from formats.files import ImageFolder, image_folders, need, rows

QUESTION_TOKENS = 16  # of an answer to a yes/no question
SIMILAR = 0.8
WORD = re.compile(r"\w+(?:-\w+)*")
PLURALS = (
    ("s", ""),
    ("ses", "s"),
    ("ves", "f"),
    ("ves", "fe"),
    ("xes", "x"),
    ("zes", "z"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("men", "man"),
    ("ies", "y"),
    ("children", "child"),
    ("mice", "mouse"),
)
# the type of a question -> the figures that it counts for; any other type is a relation
DIMENSIONS = {
    "discriminative-hallucination": ("existence",),
    "discriminative-attribute-state": ("attribute", "state"),
    "discriminative-attribute-number": ("attribute", "number"),
    "discriminative-attribute-action": ("attribute", "action"),
}
GROUPS = ("", "existence", "attribute", "state", "number", "action", "relation")
EPSILON = {"existence": 1e-3}  # in the denominator of f1; elsewhere 1e-4
BEGIN = {"attribute": 3e-3}  # where the script's denominators begin: three of them; elsewhere 1e-3
GENERATIVE = ("chair", "cover", "hal", "cog")
DISCRIMINATIVE = ("accuracy", "precision", "recall", "f1")


# ---- files


class Lists:
    """AMBER's data folder: annotations by id, associations, vocabulary, safe words."""

    def __init__(self, folder):
        folder = Path(folder)
        self.associated = read_json(folder / "relation.json")
        for word, others in self.associated.items():
            if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
                raise BadInput(
                    f"{folder / 'relation.json'}: {word!r} has {others!r:.60}, no words."
                )
        self.vocabulary = set(self.associated).union(*self.associated.values())
        try:
            lines = (folder / "safe_words.txt").read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{folder / 'safe_words.txt'}: not a readable text ({error}).") from None
        self.safe = set(lines)
        self.annotations = {}
        path = folder / "annotations.json"
        for i, row in rows(path):
            number = need(row, "id", int, f"{path}, row {i}")
            if number in self.annotations:
                raise BadInput(f"{path}, row {i}: id {number} is there twice.")
            self.annotations[number] = self.annotation(row, f"{path}, row {i}")

    def annotation(self, row, where):
        """A checked row: every word of a description must be in relation.json."""
        if need(row, "type", str, where) == "generative":
            for key in ("truth", "hallu"):
                words = need(row, key, list, where)
                lost = [w for w in words if not isinstance(w, str) or w not in self.associated]
                if lost:
                    raise BadInput(f"{where}: {lost[0]!r:.60} of `{key}` is not in relation.json.")
        elif row.get("truth") not in ("yes", "no"):
            raise BadInput(f"{where}: `truth` is {row.get('truth')!r:.60}; yes or no is needed.")
        return row


def data_folder(args):
    """--data, or the folder with annotations.json that a question file lies in, or below."""
    if args.data:
        return args.data
    parents = list(Path(args.questions[0]).resolve().parents)[:2]
    found = next((folder for folder in parents if (folder / "annotations.json").is_file()), None)
    if found is None:
        raise BadInput(
            f"{args.questions[0]}: no annotations.json in its folder or the one above; "
            "--data says where AMBER's is."
        )
    return found


def read_questions(paths, lists):
    """Query files -> {id: {"id", "image", "query"}}, in their order."""
    questions = {}
    for path in paths:
        for i, row in rows(Path(path)):
            where = f"{path}, row {i}"
            number = need(row, "id", int, where)
            for key in ("image", "query"):
                need(row, key, str, where)
            if number not in lists.annotations:
                raise BadInput(f"{where}: id {number} is not among the annotations.")
            if number in questions:
                raise BadInput(f"{where}: id {number} is there twice.")
            questions[number] = row
    if not questions:
        raise BadInput(f"{paths[0]}: the file holds no question.")
    return questions


def read_answers(path, questions, lists):
    """Answers file -> {id: response}, each question once, in the order of the questions.

    Rows, an array or JSON lines: {"id", "response"} as they stand, or {"question_id", "text"}.
    """
    said = {}
    for i, row in rows(Path(path)):
        where = f"{path}, row {i}"
        official = isinstance(row, dict) and "response" in row
        number = need(row, "id" if official else "question_id", int, where)
        text = need(row, "response" if official else "text", str, where, empty=True)
        if number in said:
            raise BadInput(f"{where}: a second answer to id {number}; one is accepted.")
        if number not in questions:
            raise BadInput(
                f"{where}: an answer to id {number}, which is no question of --questions."
            )
        said[number] = text if official else response(text, lists.annotations[number])
    missing = next((number for number in questions if number not in said), None)
    if missing is not None:
        raise BadInput(
            f"{path}: id {missing} has no answer ({len(said)} answers to {len(questions)} "
            "questions)."
        )
    return {number: said[number] for number in questions}


def response(text, annotation):
    """A model's text as inference.py reads it.

    The answer to a question is "Yes" or "No" if it begins so. Other texts, and descriptions, stay.
    """
    first = evaluation.first_word(text).capitalize()
    if annotation["type"] != "generative" and first in ("Yes", "No"):
        return first
    return text


# ---- nouns and similarity


INSTALL = (
    "--rule official needs NLTK and spaCy: pip install nltk spacy; python -m nltk.downloader "
    "punkt_tab averaged_perceptron_tagger_eng wordnet; python -m spacy download en_core_web_lg; "
    "or give --rule plain"
)


def official_rule():
    """(text -> its nouns, (word, word) -> are they similar?), by NLTK and spaCy."""
    try:
        import nltk
        import spacy
        from nltk.stem import WordNetLemmatizer

        lemma = WordNetLemmatizer().lemmatize
        tagged = lambda text: nltk.pos_tag(nltk.word_tokenize(text))
        lemma(tagged("Two cats.")[1][0])
        model = spacy.load("en_core_web_lg")
    except (ImportError, LookupError, OSError) as error:
        reason = " ".join(str(error).replace("*", "").split())[:60]
        raise BadInput(f"{INSTALL} ({type(error).__name__}: {reason}).") from None
    vectors, known = {}, {}

    def vector(word):
        """spaCy's document of a word, made once."""
        if word not in vectors:
            vectors[word] = model(word)
        return vectors[word]

    def similar(one, other):
        """More than SIMILAR; each pair is computed once."""
        if (one, other) not in known:
            known[one, other] = vector(one).similarity(vector(other)) > SIMILAR
        return known[one, other]

    return lambda text: [lemma(word) for word, tag in tagged(text) if tag.startswith("NN")], similar


def plain_rule(vocabulary):
    """(text -> its words, plurals as singulars; None: only equal words are similar)."""

    def singular(word):
        """The word of the vocabulary that a word is, or is a plural of; the word if it is none."""
        found = (word.removesuffix(end) + new for end, new in PLURALS if word.endswith(end))
        return word if word in vocabulary else next((w for w in found if w in vocabulary), word)

    return lambda text: [singular(word) for word in WORD.findall(text)], None


# ---- scoring


def look_up(nouns, annotation, lists, similar=None):
    """The nouns of a description -> its eight counts, in the order of `ratios`.

    similar: (word, word) -> bool, or None.
    """
    truth, hallu = annotation["truth"], annotation["hallu"]
    # the associated words come first: "building" covers "wall" even where it is in the picture
    of = lambda words: [
        *((other, i) for i, word in enumerate(words) for other in lists.associated[word]),
        *((word, i) for i, word in enumerate(words)),
    ]
    there, invented = of(truth), of(hallu)
    first = lambda pairs, fits: next((i for word, i in pairs if fits(word)), None)
    covered, marked, nouns_in, false = set(), set(), 0, 0
    for noun in nouns:
        if noun not in lists.vocabulary:
            continue
        nouns_in += 1
        if noun in lists.safe:
            continue
        same = lambda word, noun=noun: word == noun
        place = first(there, same)
        if place is not None:
            covered.add(place)
            continue
        marked.add(first(invented, same))
        if similar:
            alike = lambda word, noun=noun: similar(noun, word)
            marked.add(first(invented, alike))
            place = first(there, alike)
        if place is not None:
            covered.add(place)
        else:
            false += 1
    marked.discard(None)
    return [
        *(false, nouns_in, len(covered), len(truth)),
        *(false > 0, 1, len(marked), len(hallu)),
    ]


def answered(said, truth):
    """One question -> (right, 1, "No" and right, "No", the truth is no)."""
    right = said == truth.capitalize()
    no = said == "No"
    return [right, 1, no and right, no, truth == "no"]


def ratio(part, whole):
    """part / whole, 0 for 0 / 0."""
    return part / np.where(whole > 0, whole, 1)


def generative(sums):
    """Sums (..., 8) of `look_up` -> chair, cover, hal, cog."""
    parts = np.moveaxis(np.asarray(sums, dtype=float), -1, 0)
    return {name: ratio(parts[2 * i], parts[2 * i + 1]) for i, name in enumerate(GENERATIVE)}


def discriminative(sums):
    """Sums (..., 5) of `answered` -> accuracy, precision, recall, f1 of "No"."""
    right, n, hits, said_no, truth_no = np.moveaxis(np.asarray(sums, dtype=float), -1, 0)
    precision, recall = ratio(hits, said_no), ratio(hits, truth_no)
    f1 = ratio(2 * precision * recall, precision + recall)
    return dict(zip(DISCRIMINATIVE, (ratio(right, n), precision, recall, f1)))


def figures_of(sums, groups):
    """Sums (..., 8 + 5 x groups) -> {figure: (...)}; groups: those that have questions."""
    named = generative(sums[..., :8]) if sums[..., 5].any() else {}
    for i, group in enumerate(GROUPS):
        if group in groups:
            part = discriminative(sums[..., 8 + 5 * i : 13 + 5 * i])
            named |= {f"{group} {name}".strip(): value for name, value in part.items()}
    if "chair" in named and "f1" in named:
        named["amber"] = (1 - named["chair"] + named["f1"]) / 2
    return named


def official_figures(sums, groups):
    """What inference.py prints: percent, rounded, each denominator a little too large."""
    percent = lambda part, whole, begin=1e-3: round(part / (whole + begin) * 100, 1)
    printed = {}
    false, nouns, covered, truth, with_false, n, marked, hallu = map(int, sums[:8])
    if n:
        printed |= {"CHAIR": percent(false, nouns), "Cover": percent(covered, truth)}
        printed["Hal"] = round(100 - (n - with_false) / (n + 0.001) * 100, 1)
        printed["Cog"] = percent(marked, hallu)
    for i, group in enumerate(GROUPS):
        if group not in groups:
            continue
        right, n, hits, said_no, truth_no = map(int, sums[8 + 5 * i : 13 + 5 * i])
        begin = BEGIN.get(group, 1e-3)
        precision, recall = percent(hits, said_no, begin), percent(hits, truth_no, begin)
        p, r = precision / 100, recall / 100
        f1 = round(2 * p * r / (p + r + EPSILON.get(group, 1e-4)) * 100, 1)
        values = percent(right, n, begin), precision, recall, f1
        of_group = dict(zip(("Accuracy", "Precision", "Recall", "F1"), values))
        printed |= {f"{group.capitalize()} {key}".strip(): v for key, v in of_group.items()}
    if "CHAIR" in printed and "F1" in printed:
        printed["AMBER"] = round((100 - printed["CHAIR"] + printed["F1"]) / 2, 2)
    return printed


def groups_of(annotation):
    """The figures that a question counts for; () for a description."""
    if annotation["type"] == "generative":
        return ()
    return ("", *DIMENSIONS.get(annotation["type"], ("relation",)))


def counts(questions, said, lists, nouns_of, similar):
    """{id: response} -> (images, 8 + 5 x groups): what each image adds to the sums."""
    place = {}
    for row in questions.values():
        place.setdefault(row["image"], len(place))
    units = np.zeros((len(place), 8 + 5 * len(GROUPS)))
    for number, row in questions.items():
        annotation, unit = lists.annotations[number], units[place[row["image"]]]
        if annotation["type"] == "generative":
            unit[:8] += look_up(nouns_of(said[number]), annotation, lists, similar)
        for group in groups_of(annotation):
            start = 8 + 5 * GROUPS.index(group)
            unit[start : start + 5] += answered(said[number], annotation["truth"])
    return units


def score(questions, said, lists, nouns_of, similar):
    """{id: response} -> (figures with their `official` form, what each image adds to the sums)."""
    units = counts(questions, said, lists, nouns_of, similar)
    kinds = [lists.annotations[number] for number in questions]
    groups = {group for annotation in kinds for group in groups_of(annotation)}
    figures = {key: float(value) for key, value in figures_of(units.sum(0), groups).items()}
    asked = [n for n in questions if groups_of(lists.annotations[n])]
    if asked:
        figures["unreadable"] = sum(said[n] not in ("Yes", "No") for n in asked) / len(asked)
    figures["descriptions"], figures["questions"] = len(questions) - len(asked), len(asked)
    figures["official"] = official_figures(units.sum(0), groups)
    return figures, units, groups


# ---- asking


def read_records(args, questions, lists):
    """{id: question} -> {id: Record}; all images must be there."""
    folder = ImageFolder(args.images or image_folders(args.questions[0]))
    records = {}
    for number, row in questions.items():
        describes = lists.annotations[number]["type"] == "generative"
        try:
            image = folder.find(row["image"], f"image/{row['image']}")
        except BadInput as error:
            raise BadInput(f"{args.questions[0]}, id {number}: {error}") from None
        text = row["query"] + ("" if describes else args.suffix)
        records[number] = Record(f"{args.questions[0]}, id {number}", image, (text,))
    folder.report()
    return records


def ask(contestant, records, lists, max_new_tokens):
    """Ask one contestant -> {id: response}. Descriptions and questions differ in their length."""
    path = contestant.path("replies.jsonl")
    said = {}
    for describes in (True, False):
        part = {
            number: record
            for number, record in records.items()
            if (lists.annotations[number]["type"] == "generative") == describes
        }
        tokens = max_new_tokens if describes else QUESTION_TOKENS
        if part:
            texts = evaluation.answer(contestant, list(part.values()), tokens, path, "AMBER")
            for number, text in zip(part, texts):
                said[number] = response(text, lists.annotations[number])
    return {number: said[number] for number in records}


# ---- the command line


def changed(questions, lists, first, other, names, image_of):
    """Rows of `comparison.sheet`: the questions that two contestants answer differently."""
    found = []
    for number, row in questions.items():
        truth = lists.annotations[number].get("truth")
        if first[number] != other[number] and isinstance(truth, str):
            said = [(n, of[number]) for n, of in zip(names, (first, other))]
            told = [(n, text, text == truth.capitalize()) for n, text in said]
            found.append((image_of(row["image"]), f"{row['query']} ({truth})", told))
    return found


def finish(questions, said, lists, rule, args):
    """Print all that is known of {contestant: {id: response}}, and write it to --out."""
    scored = {who: score(questions, of, lists, *rule) for who, of in said.items()}
    figures = {who: {"rule": args.rule} | found for who, (found, _, _) in scored.items()}
    groups = next(iter(scored.values()))[2]
    units = {who: array for who, (_, array, _) in scored.items()}
    results = comparison.compare(units, lambda sums: figures_of(sums, groups))

    for who, found in figures.items():
        print(f"{who}, rule {args.rule}, as inference.py prints it:")
        print("  " + ", ".join(f"{key} {value}" for key, value in found["official"].items()))
        if found.get("unreadable"):
            print(f"  {found['unreadable']:.1%} of the answers are neither Yes nor No")
    print("95 % intervals (bootstrap over images; differences are paired)")
    shown = [
        key for key in next(iter(results.values())) if not key.endswith(("precision", "recall"))
    ]
    print("\n".join(comparison.table(results, shown)))
    if args.out:
        details = {who: {"intervals": r} for who, r in results.items()}
        comparison.write_figures(args.out, figures, details)
        folder = ImageFolder(args.images or image_folders(args.questions[0]))
        image_of = lambda name: folder.look_up(name)[0] or folder.look_up(f"image/{name}")[0]
        rows_of = lambda *two: changed(questions, lists, *(said[w] for w in two), two, image_of)
        comparison.sheets(args.out, said, "answers to questions that differ", rows_of)


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
        help="query files of AMBER",
    )
    flag("--data", metavar="DIR", help="AMBER's folder data/ (default: above the question file)")
    flag(
        "--answers",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="score these files, one a contestant",
    )
    flag(
        "--rule",
        choices=("official", "plain"),
        default="official",
        help="how nouns are found and compared: official needs NLTK and spaCy, plain nothing; "
        "their figures are not comparable (default %(default)s)",
    )
    flag("--suffix", default="", help="added after each yes/no question (default: nothing)")
    flag(
        "--max-new-tokens",
        type=positive_int,
        default=512,
        metavar="N",
        help="cuts descriptions after N tokens (default %(default)s)",
    )
    evaluation.add_flags(parser)
    args = parser.parse_args()
    evaluation.check_flags(args)
    return args


def main():
    """Ask each contestant the questions, or read their answers; score."""
    args = parse()
    lists = Lists(data_folder(args))
    questions = read_questions(args.questions, lists)
    described = any(lists.annotations[n]["type"] == "generative" for n in questions)
    plain = args.rule == "plain" or not described
    rule = plain_rule(lists.vocabulary) if plain else official_rule()  # before the questions

    said = {}
    if args.answers:
        for who, path in zip(evaluation.names_of_files(args.answers), args.answers):
            said[who] = read_answers(path, questions, lists)
    else:
        records = read_records(args, questions, lists)
        about = {
            "questions": evaluation.hashes(args.questions),
            "suffix": args.suffix,
            "max_new_tokens": args.max_new_tokens,
        }
        for contestant in evaluation.contestants(args, about):
            said[contestant.name] = ask(contestant, records, lists, args.max_new_tokens)
            contestant.release()
            if contestant.folder:
                responses = [
                    {"id": number, "response": text}
                    for number, text in said[contestant.name].items()
                ]
                write_json(contestant.folder / "responses.json", responses)
        args.out = args.out if processes.number == 0 else None
    finish(questions, said, lists, rule, args)


if __name__ == "__main__":
    run(main)
