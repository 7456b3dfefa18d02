"""Short answers and multiple choice, scored by rule: what does alignment cost elsewhere?

    python eval_vqa.py --questions TextVQA_0.5.1_val.json llava_textvqa_val_v051_ocr.jsonl \\
        --images textvqa --model DIR --adapter none runs/dpo-0/adapter --out DIR
    python eval_vqa.py --questions MMBench_DEV_EN.tsv --model DIR --out DIR
    python eval_vqa.py --questions testdev_balanced_questions.json --answers answers.jsonl

The first two forms ask (evaluation.py says who can be asked, and how a run goes on). The third only
scores, a file a contestant; it needs no model. formats/vqa.py lists the files; a run takes those of
one benchmark. The rules:

vqa-v2      vqaEval.py of GT-Vision-Lab/VQA. An answer that n of the ten people gave is worth
            min(1, n / 3), averaged over the ten ways to leave one of them out. If the ten differ,
            all answers are normalised: punctuation, articles, digits, contractions. If they agree,
            none is: then "Yes" is not "yes".
textvqa     M4C's evaluator (facebookresearch/mmf), which LLaVA uses. As above, but both sides are
            always normalised, before that in lower case, without commas and question marks, and
            with "'s" as a word of its own.
gqa         eval.py of GQA: the answer, exactly.
a-okvqa     eval_predictions.py of allenai/aokvqa: the text of the right option, exactly.
scienceqa   eval_science_qa.py of LLaVA: "B", "B. ...", or "The answer is B." once; without the
            full stop, or anything else behind it, the last is none.
mmbench     VLMEvalKit's exact matching: a letter that stands alone in the answer, if no other one
            does and at most three words follow it; else the one option whose text it holds. It is
            that of August 2025; before, such a letter stood anywhere, and any length of text was
            searched; since June 2026, "answer is B" is found in longer answers too.
mmstar      MMStar's own: the answer's first character, or that behind "(", "option " or
            "the answer is ".
problems    R1-V's layout, by the exact rule of rewards.py, which says what it reads: yes or no, a
            letter, a number, a text of at most 20 words.

A model's text is first brought into the form that the official script reads. vqa-v2: normalised by
M4C's rule, as LLaVA's converter does before it submits. gqa: lower case, no full stop at the end,
as LLaVA's. a-okvqa: "B", "B. ...", "(B) ..." or the option's text become the option. A file that is
in that form already (`vqa.answers_to`) is scored as it stands.

    accuracy    the mean over questions; of a file with rotations, over those that are none
    circular    the share of questions that are right in all rotations of their options: what papers
                report of MMBench. --circular makes the rotations where a file has none
    unreadable  the share of lettered questions whose answer names no option; they are wrong
and the accuracy by type, category or subject; `circular <category>` where there are rotations.

Files in --out, of several contestants in a folder each:
    metrics.json        the figures; of several {contestant: figures}
    details.json        intervals, differences
    answers.jsonl       {"question_id", "round_id", "prompt", "text"}, for LLaVA's scripts
    official.json       for the scripts of VQA-v2, GQA and A-OKVQA
    changed-<name>.png  pictures with answers that differ from the first contestant's

Deviations from the official scripts:
1. Every question needs one answer (LLaVA's count a missing one of ScienceQA as wrong).
2. Where VLMEvalKit would ask a judge, or draw a letter, the answer is unreadable.
3. Answers end after 128 tokens; LLaVA's end there for short answers, and after 1024 for options.
4. ScienceQA without LLaVA's file is asked as the others are: hint, question, options.
"""

from common import BadInput, Parser, positive_int, run, write_json, write_text

import functools
import json
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

import comparison
import evaluation
import processes
import rewards
from data import Record
from formats import vqa
from formats.files import ImageFolder, PackedImage, image_folders
from formats.layouts import take_placeholder

# ---- short answers

NUMBERS = {"none": "0"} | {
    word: str(n)
    for n, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
PERIODS = 32  # so many are taken away: the scripts give `sub` a flag of this value as its count
FORMS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't "
    "mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've "
    "should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've "
    "someone'll someone's something'd something'd've something'll that's there'd there'd've "
    "there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't "
    "what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've "
    "you'd you'd've you'll you're you've"
)
# a form that lacks one apostrophe -> the form
CONTRACTIONS = {
    form[:i] + form[i + 1 :]: form
    for form in FORMS.split()
    for i, character in enumerate(form)
    if character == "'"
} | {"somebody'd": "somebodyd"}


@functools.cache  # of 214,000 questions with ten answers each, few are new
def normal(text):
    """An answer as both scripts compare it."""
    return plain_words(without_punctuation(text))


def without_punctuation(text):
    """Both scripts' processPunctuation.

    A mark is deleted if a blank stands beside it somewhere, else it becomes a blank.
    """
    numbers = re.search(r"\d,\d", text)
    result = text
    for mark in PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside or numbers else " ")
    return PERIOD.sub("", result, count=PERIODS)


def plain_words(text):
    """Both scripts' processDigitArticle: lower case, digits, no articles, contractions."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def unbroken(text):
    """Without line breaks and tabs."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def m4c(text):
    """M4C's EvalAIAnswerProcessor."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normal(unbroken(text.strip()))


def leave_one_out(said, answers):
    """The mean over the ten people of min(1, how many of the others said the same / 3)."""
    same = [answer == said for answer in answers]
    credits = [min(1, float(sum(same) - s) / 3) for s in same]
    return sum(credits) / len(credits)


def credit_vqa2(said, answers):
    """vqaEval.py: an answer against those of ten people -> 0 to 1."""
    said, answers = unbroken(said), [unbroken(answer) for answer in answers]
    if len(set(answers)) > 1:
        said, *answers = map(normal, (said, *answers))
    return leave_one_out(said, answers)


def credit_textvqa(said, answers):
    """M4C's TextVQAAccuracyEvaluator: an answer against those of ten people -> 0 to 1."""
    return leave_one_out(m4c(said), [m4c(answer) for answer in answers])


# ---- letters

OWN = re.compile(r"\W*([A-Z])(?:[).:,*]|\s*$)")


def letter_scienceqa(text, options):
    """LLaVA's eval_science_qa.py -> a letter of the options, or None."""
    if text in list("ABCDE"):
        letter = text
    elif re.match("[A-E][.] ", text):
        letter = text[0]
    else:
        found = re.findall("The answer is ([A-Z]).", text)  # "." is any character there
        letter = found[0] if len(found) == 1 else None
    return letter if letter in options else None


REFUSALS = (
    "Failed to obtain answer via API",
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def letter_mmbench(text, options):
    """VLMEvalKit's can_infer -> a letter of the options, or None."""
    if any(refusal in text for refusal in REFUSALS[1:]):
        return None
    words = text.translate(str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))).split()
    found = [letter for letter in options if letter in words]
    if REFUSALS[0] not in text:
        if len(found) == 1 and words.index(found[0]) > len(words) - 5:
            return found[0]
        if not found and "Z" in words:  # "none of them", in the words of its judge
            return None
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    held = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return held[0] if len(held) == 1 else None


def letter_mmstar(text, options):
    """MMStar's exact match, turned round -> a letter of the options, or None."""
    text = text.lower().strip().replace("\n", " ")
    found = re.match(r"\(?([a-d])|option ([a-d])|the answer is ([a-d])", text)
    letter = found and found[found.lastindex].upper()
    return letter if letter in options else None


def letter_own(text, options):
    """A letter at the start, alone or before punctuation; or the whole text of an option."""
    found = OWN.match(text)
    if found and found[1] in options:
        return found[1]
    said = text.strip().removesuffix(".").lower()
    same = [letter for letter, option in options.items() if option.lower() == said]
    return same[0] if len(same) == 1 else None


LETTER = {
    "scienceqa": letter_scienceqa,
    "mmbench": letter_mmbench,
    "mmstar": letter_mmstar,
    "a-okvqa": letter_own,
}


# ---- problems with a right answer

SAME = {
    "letter": rewards.same_letter,
    "yes/no": rewards.same_yes_no,
    "number": rewards.same_number,
    "text": rewards.same_text,
}


def right_of(question):
    """A question of `problems` -> (kind, text) of what is right, as rewards.py reads it."""
    try:
        found = rewards.right_answer(Record("", None, (question.text,), (question.truth,)))
    except BadInput:  # a box, and no picture
        found = None
    if found is None or found[0] not in SAME:
        raise BadInput(
            f"question {question.id}: the right answer is {question.truth!r:.80}; accepted are "
            f"yes or no, a letter, a number, and a text of at most {rewards.SHORT} words."
        )
    return found


# ---- scoring


def official_form(name, question, answer):
    """An Answer as the official script reads it: a text, or a letter or None for options."""
    if name == "a-okvqa" and answer.official:
        same = (letter for letter, text in question.options.items() if text == answer.text)
        return next(same, None)
    if question.options:
        return LETTER[name](answer.text, question.options)
    if answer.official:
        return answer.text
    if name == "problems":
        return rewards.final(answer.text) or ""
    if name == "gqa":
        return answer.text.rstrip(".").lower()
    return m4c(answer.text) if name == "vqa-v2" else answer.text


def credit(name, question, form):
    """What an answer in the official form is worth, 0 to 1."""
    if name == "vqa-v2":
        return credit_vqa2(form, question.truth)
    if name == "textvqa":
        return credit_textvqa(form, question.truth)
    if name == "problems":
        kind, right = question.truth
        return SAME[kind](form, right)
    if name == "a-okvqa":  # its script compares the options' texts
        return float(question.options.get(form) == question.options[question.truth])
    return float(form == question.truth)


def gains(name, questions, answers):
    """[(question, {figure: (what it adds to the sum, to the number)})], in order.

    Rotations add to `circular` alone, where the question itself stands.
    """
    forms = [official_form(name, q, a) for q, a in zip(questions, answers)]
    credits = [credit(name, q, form) for q, form in zip(questions, forms)]
    whole = defaultdict(list)
    for q, value in zip(questions, credits):
        whole[q.whole or q.id].append(value)
    has_rotations = any(q.rotation for q in questions)

    rows = []
    for q, form, value in zip(questions, forms, credits):
        row = {}
        if q.options:
            row["unreadable"] = (float(form is None), 1)
        if not q.rotation:
            all_right = float(min(whole[q.whole or q.id]) == 1)
            for group in ("", *q.groups):
                row[group or "accuracy"] = (value, 1)
                if has_rotations:
                    row[f"circular {group}".strip()] = (all_right, 1)
        rows.append((q, row))
    return rows


def figure_names(rows):
    """The names of the figures, the common ones first, then in the order of the questions."""
    found = list(dict.fromkeys(name for _, row in rows for name in row))
    first = [name for name in ("accuracy", "circular", "unreadable") if name in found]
    return first + [name for name in found if name not in first]


def score(name, questions, answers):
    """[Question], [Answer] in the same order -> the figures, fractions of 1, and n."""
    if not questions or len(questions) != len(answers):
        raise BadInput(f"{len(answers)} answers to {len(questions)} questions; one each is needed.")
    return figures_of(name, gains(name, questions, answers))


def figures_of(name, rows):
    """Rows of `gains` -> the figures, fractions of 1, and n."""
    figures = {"benchmark": name}
    for figure in figure_names(rows):
        values = [row[figure][0] for _, row in rows if figure in row]
        figures[figure] = sum(values) / len(values)
    return figures | {"n": sum(not q.rotation for q, _ in rows)}


def compared(rows):
    """{contestant: rows of `gains`} -> `comparison.compare`; the units are images."""
    names = figure_names(next(iter(rows.values())))
    column = {figure: k for k, figure in enumerate(names)}
    place, units = {}, {}
    for who, of in rows.items():
        units[who] = np.zeros((len(of), len(names), 2))
        for q, row in of:
            in_tsv = q.image is None or isinstance(q.image, str)  # one a question
            image = q.whole or q.id if in_tsv else str(q.image)
            i = place.setdefault(image, len(place))
            for figure, gain in row.items():
                units[who][i, column[figure]] += gain
    units = {who: array[: len(place)].reshape(len(place), -1) for who, array in units.items()}

    def figures(sums):
        """Sums (..., 2 x figures) -> {figure: (...)}."""
        sums = sums.reshape(*sums.shape[:-1], len(names), 2)
        shares = sums[..., 0] / np.maximum(1, sums[..., 1])
        return {figure: shares[..., k] for k, figure in enumerate(names)}

    return comparison.compare(units, figures)


# ---- asking


def read_records(args, questions):
    """[Question] -> [Record]; all images must be there."""
    packed = {}
    tsv = next((path for path in args.questions if Path(path).suffix == ".tsv"), None)
    if tsv:
        packed = vqa.unpack(tsv)
    folder = ImageFolder(args.images or image_folders(args.questions[0]))
    records = []
    for q in questions:
        where = f"{args.questions[0]}, question {q.id}"
        prompt = q.prompt
        if args.suffix is not None:
            prompt = prompt.removesuffix(vqa.SHORT).removesuffix(vqa.CHOICE) + args.suffix
        try:
            image = q.image
            if isinstance(image, tuple):
                image = folder.find(*image)
            elif isinstance(image, str):
                image = packed[image]
            turns = take_placeholder((prompt,), image)
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None
        records.append(Record(where, image, turns))
    folder.report()
    return records


def write_answers(folder, name, questions, records, texts, who):
    """answers.jsonl for LLaVA's scripts, and official.json for those with a form of their own."""
    lines = []
    for q, record, text in zip(questions, records, texts):
        number = vqa.keys_of(name, q)
        row = {"question_id": number if isinstance(number, str) else number[0]}
        row |= {"round_id": q.round, "prompt": record.turns[0], "text": text}
        row |= {"answer_id": f"{q.id}-{q.round}", "model_id": who, "metadata": {}}
        lines.append(json.dumps(row) + "\n")
    write_text(folder / "answers.jsonl", "".join(lines))
    if name not in ("vqa-v2", "gqa", "a-okvqa"):
        return
    forms = [official_form(name, q, vqa.Answer(text)) for q, text in zip(questions, texts)]
    if name == "a-okvqa":
        pairs = [(q, form) for q, form in zip(questions, forms) if not q.rotation]
        official = {q.id: q.options.get(form, "") for q, form in pairs}
    elif name == "gqa":
        official = [{"questionId": q.id, "prediction": f} for q, f in zip(questions, forms)]
    else:
        number = lambda q: int(q.id) if q.id.isdecimal() else q.id
        official = [{"question_id": number(q), "answer": f} for q, f in zip(questions, forms)]
    write_json(folder / "official.json", official)


# ---- the command line


def changed(name, questions, first, other, names, image_of):
    """Rows of `comparison.sheet`: the questions whose credit differs, rotations left out."""
    rows = []
    for q, *answers in zip(questions, first, other):
        credits = [credit(name, q, official_form(name, q, answer)) for answer in answers]
        if credits[0] == credits[1] or q.rotation:
            continue
        right = q.truth if isinstance(q.truth, str) else ", ".join(dict.fromkeys(q.truth))
        told = [(n, a.text, c == max(credits)) for n, a, c in zip(names, answers, credits)]
        rows.append((image_of(q), f"{q.text} ({right})", told))
    return rows


def finish(name, questions, said, images, args):
    """Print all that is known of {contestant: [Answer]}, and write it to --out.

    images: {question id: image} for the sheets, or {}.
    """
    rows = {who: gains(name, questions, answers) for who, answers in said.items()}
    figures = {who: figures_of(name, of) for who, of in rows.items()}
    results = compared(rows)
    first = next(iter(figures.values()))
    print(f"{name}: {first['n']} questions; 95 % intervals (bootstrap over images)")
    print("\n".join(comparison.table(results)))
    if name == "textvqa":
        ocr = any(vqa.OCR in q.prompt for q in questions)
        print(
            f"the prompts have {'the' if ocr else 'no'} OCR words of LLaVA's file; figures with "
            "and without them are not comparable"
        )
    if args.out:
        details = {who: {"intervals": r} for who, r in results.items()}
        comparison.write_figures(args.out, figures, details)
        image_of = lambda q: images.get(q.id)
        rows_of = lambda *two: changed(name, questions, *(said[w] for w in two), two, image_of)
        comparison.sheets(args.out, said, "answers of another worth", rows_of)


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
        help="the files of one benchmark, as downloaded; and LLaVA's file of prompts",
    )
    flag(
        "--answers",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="score these files, one a contestant",
    )
    flag(
        "--circular",
        action="store_true",
        help="ask each lettered question in all rotations of its options, as many times as it has "
        "options; of no effect where the file has rotations (index 1,000,000 and more)",
    )
    flag("--suffix", help="added after each question (default: LLaVA's for its kind)")
    flag(
        "--limit",
        type=positive_int,
        metavar="N",
        help="the first N questions (with their rotations); not comparable with whole benchmarks",
    )
    flag(
        "--max-new-tokens",
        type=positive_int,
        default=128,
        metavar="N",
        help="cuts answers after N tokens (default %(default)s, as LLaVA's for short answers)",
    )
    evaluation.add_flags(parser)
    args = parser.parse_args()
    evaluation.check_flags(args)
    return args


def read_questions(args):
    """--questions -> (the benchmark's name, [Question] with rotations)."""
    name, questions = vqa.read(args.questions)
    if name == "problems":
        right = [right_of(q) for q in questions]
        questions = [replace(q, truth=r, groups=r[:1]) for q, r in zip(questions, right)]
    if args.limit:
        kept = {q.whole or q.id for q in [q for q in questions if not q.rotation][: args.limit]}
        questions = [q for q in questions if (q.whole or q.id) in kept]
    if args.circular and not any(q.rotation for q in questions):
        if not all(any(q.options.values()) for q in questions):
            raise BadInput(f"--circular is for questions with options in lines; {name} has none.")
        questions = vqa.rotated(questions)
    return name, questions


def main():
    """Ask each contestant the questions, or read their answers; score."""
    args = parse()
    name, questions = read_questions(args)
    said, images = {}, {}
    if args.answers:
        for who, path in zip(evaluation.names_of_files(args.answers), args.answers):
            said[who] = vqa.answers_to(name, questions, path)
        if args.out and len(said) > 1:
            folder = ImageFolder(args.images or image_folders(args.questions[0]))
            for q in questions:
                found = [folder.look_up(n)[0] for n in q.image] if type(q.image) is tuple else []
                packed = q.image if isinstance(q.image, PackedImage) else None
                images[q.id] = next(filter(None, found), packed)
    else:
        records = read_records(args, questions)
        images = {q.id: record.image for q, record in zip(questions, records)}
        about = {
            "questions": evaluation.hashes(args.questions),
            "suffix": args.suffix,
            "circular": args.circular,
            "limit": args.limit,
            "max_new_tokens": args.max_new_tokens,
        }
        for contestant in evaluation.contestants(args, about):
            path = contestant.path("replies.jsonl")
            texts = evaluation.answer(contestant, records, args.max_new_tokens, path, name)
            contestant.release()
            said[contestant.name] = [vqa.Answer(text) for text in texts]
            if path:
                write_answers(path.parent, name, questions, records, texts, contestant.name)
        args.out = args.out if processes.number == 0 else None
    finish(name, questions, said, images, args)


if __name__ == "__main__":
    run(main)
