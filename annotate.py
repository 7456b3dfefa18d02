"""Rated answers of a model: sampled, judged on five attributes, and made into training data.

    python annotate.py                       # toy world, CPU; its truth is the judge
    python annotate.py --model llava-hf/llava-1.5-13b-hf --data prompts.json --images DIR \\
        --annotator endpoint --judge-url URL --judge-model NAME
    python annotate.py --ratings runs/annotate-0/ratings.jsonl --flip 0.25        # asks nobody

The first half of Li et al. 2024:
1. sample   k = 4 answers to each prompt, at temperature 1.2
2. rate     the judge sees the image, the prompt and all its answers together, writes a reason for
            each, and rates helpfulness, correctness, coherence, complexity and verbosity, 0 to 4
3. write    quality Q = helpfulness + correctness + coherence
            preferences.json   chosen: the answer of the highest Q; rejected: one drawn among those
                               with Q <= Q_max - 2; no pair without one     (POVID's layout: dpo.py)
            reference.json     the data's own answer to each prompt, for the paper's plain SFT
                               (LLaVA-Instruct's layout: sft.py)
            best.json          the best answer, if Q >= --threshold   (LLaVA-Instruct's layout)
            attributes.json    every rated answer; the prompt asks for its attributes      (the same)

rejection_sampling.py and steerlm.py read ratings.jsonl (formats/ratings.py), a line a prompt;
best.json and attributes.json are what they train on, for other programs.

reviews.jsonl holds the judge's replies: an endpoint's as each arrives, with the tokens that it
counted, a checkpoint's 64 at a time. A run that was stopped goes on with --resume: what has its
reply is not asked again. --limit bounds the number of prompts, and so the cost; the sum of the
tokens is in statistics.json.

--flip P exchanges chosen and rejected in a share P of the pairs: the paper's study of noise.
--share S takes a share S of the prompts: its study of data size. Both draw with --seed.

Choices where the paper is silent:
1. Its prompt for Gemini is not published. Ours defines the attributes in HelpSteer's words.
2. Its threshold for rejection sampling is inferred from a file name, "perfectscored": Q = 12.
3. Equal answers to a prompt are rated once and kept once; empty answers are left out. Both are
   counted, and so are the prompts of which this leaves nothing.
4. A rating that cannot be read, or a judge that rates three of four answers, loses that answer
   and no other. Nothing is guessed; all of it is counted. So is a prompt that an endpoint refuses
   (status 400, 413 or 422: a filter, say) while it answers others; --resume asks it again. Where
   it refuses the first 8, or all, the run stops; at any other refusal too.
5. The answers stand in the order in which they were drawn, as in the paper.

Figures (statistics.json): prompts, rated answers and those left out, `unreadable` ratings, mean of
each attribute, mean Q of chosen and rejected answers, words of both, pairs and prompts without one,
what an endpoint counted.
"""

from common import (
    BadInput,
    Parser,
    Progress,
    finite,
    flag_name,
    fraction,
    not_negative,
    positive_int,
    run,
    write_json,
    write_text,
)

import json
import random
import re
import statistics
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import evaluation
import judge
import processes
import training
from formats import checkpoints, dataset, ratings
from formats.files import remember_images
from formats.ratings import ATTRIBUTES, Rated, quality
from lab import report, toy
from sampling import generate

TOY = {"data": ["povid.json"], "annotator": "oracle", "max_new_tokens": 96, "batch_size": 64}
QUESTION = """You are an expert in rating what is answered to questions{about}.

What was asked:
{dialogue}

{responses}

Rate each response on five attributes, each with a whole number from 0 (lowest) to 4 (highest).
helpfulness: how useful the response is, overall, for what was asked
correctness: it has all facts that matter and no error; with a picture, everything it says is there
coherence: how consistent and clear it is
complexity: how much knowledge and thought it takes to write it
verbosity: how much detail it has, relative to what was asked

For each response first write a reason in one sentence, then one line of exactly this form:
Ratings of response 1: helpfulness 3, correctness 4, coherence 4, complexity 2, verbosity 1"""
LINE = re.compile(r"[\W\d]*ratings? of response (\d+)\W+(.*)", re.IGNORECASE)
VALUE = re.compile(rf"\b({'|'.join(ATTRIBUTES)})\b\W*?(-?\d+(?:\.\d+)?)", re.IGNORECASE)
OF_RATINGS = ("images", "seed", "out", "resume", "margin", "threshold", "flip", "share")
RATING_TOKENS = 100  # of a checkpoint's reply, for each answer: a reason and a line


def parse():
    """The command line."""
    parser = Parser(__doc__)
    training.add_model_flags(parser, "the toy base model of --seed, and toy settings")
    training.add_data_flags(parser)
    flag = parser.add_argument_group("answers").add_argument
    flag(
        "--k",
        type=positive_int,
        default=4,
        help="answers to each prompt (default %(default)s)",
    )
    flag(
        "--temperature",
        type=not_negative,
        default=1.2,
        help="of sampling (default %(default)s)",
    )
    flag(
        "--max-new-tokens",
        type=positive_int,
        default=1024,
        metavar="N",
        help="longest answer (default %(default)s)",
    )
    flag(
        "--batch-size",
        type=positive_int,
        default=16,
        metavar="N",
        help="prompts that are sampled at a time (default %(default)s)",
    )
    flag("--limit", type=positive_int, metavar="N", help="prompts, the first of the data")
    judge.add_flags(parser, default="endpoint", replies=True)

    flag = parser.add_argument_group("what is made of the ratings").add_argument
    flag(
        "--ratings",
        metavar="FILE",
        help="ratings.jsonl of another run: make data of it, ask nobody",
    )
    flag(
        "--margin",
        type=finite,
        default=2.0,
        help="by which the rejected answer's quality is lower, at least (default %(default)s)",
    )
    flag(
        "--threshold",
        type=finite,
        default=12.0,
        help="least quality of an answer in best.json, of 12 (default %(default)s)",
    )
    flag("--flip", type=fraction, default=0.0, help="share of pairs that are exchanged")
    flag("--share", type=fraction, default=1.0, help="share of the prompts (default: all)")
    return training.parse_run(parser)


# ---- 1. sample


def draw_answers(model, processor, records, args, path):
    """k answers to each prompt -> lists of texts, also in answers.jsonl as they are drawn.

    A resumed run goes on after the last whole batch; a batch has its own seed.
    """
    drawn = whole_lines(path)
    drawn = drawn[: len(drawn) // args.batch_size * args.batch_size]
    write_text(path, "".join(json.dumps(line) + "\n" for line in drawn))
    answers = [line["answers"] for line in drawn]
    progress = Progress("answers", len(records), len(answers))
    with open(path, "a", encoding="utf-8") as file:
        for start in range(len(answers), len(records), args.batch_size):
            part = records[start : start + args.batch_size]
            texts = generate(
                model,
                processor,
                part,
                args.max_new_tokens,
                args.temperature,
                args.k,
                batch_size=args.batch_size,
                seed=random.Random(f"{args.seed}/{start}").getrandbits(62),
                label="",
            )
            for row in texts:
                file.write(json.dumps({"answers": row}) + "\n")
            file.flush()
            answers += texts
            progress(len(answers))
    return answers


def whole_lines(path):
    """The lines of a JSON lines file that were written to their end; [] without the file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


# ---- 2. rate


def question(record, answers):
    """The text that the judge reads with the image."""
    about = " about the picture above" if record.image is not None else ""
    speakers = ("User", "Assistant")
    dialogue = record.turns[0]
    if len(record.turns) > 1:
        dialogue = "\n".join(f"{speakers[i % 2]}: {t}" for i, t in enumerate(record.turns))
    responses = "\n\n".join(f"Response {i}:\n{text}" for i, text in enumerate(answers, 1))
    return QUESTION.format(about=about, dialogue=dialogue, responses=responses)


def read_reply(reply, n):
    """A judge's reply about n answers -> their ratings (None: not readable), and the reasons.

    The reason of an answer is what stands before its line. Two lines for one answer are no rating.
    """
    found, texts = {}, {}
    before = []
    for line in (reply or "").splitlines():
        match = LINE.fullmatch(line)
        if not match:
            before.append(line.strip())
            continue
        number = int(match[1])
        found.setdefault(number, []).append(dict_of(match[2]))
        texts[number] = " ".join(filter(None, before))
        before = []

    given, reasons = [], []
    for number in range(1, n + 1):
        rated = found.get(number, [])
        rating = rated[0] if len(rated) == 1 else None
        what = texts.get(number, "")
        if rating is None:
            what = f"unreadable: {' '.join((reply or '').split())[:500]}"
        given.append(rating)
        reasons.append(what)
    return given, reasons


def dict_of(text):
    """ "helpfulness 3, ..." -> {attribute: value}; None unless all five are there once, 0 to 4."""
    values = [(name.lower(), float(value)) for name, value in VALUE.findall(text)]
    if sorted(name for name, _ in values) != sorted(ATTRIBUTES):
        return None
    try:
        return ratings.checked(dict(values), "a rating")
    except BadInput:
        return None


def make_rater(args, device, dtype):
    """The judge that the flags name: a function (records, lists of answers, path) -> a list.

    It gives (ratings, reasons, what a server counted) of each record. path: reviews.jsonl.
    """
    device = judge.checked(args, device)
    if (Path(args.annotator) / "reward.json").is_file():
        raise BadInput(
            f"--annotator {args.annotator} is a reward model, which gives one score; accepted are "
            "oracle, a LLaVA checkpoint, endpoint."
        )
    if args.annotator == "oracle":
        return rate_by_oracle
    ask = judge.asker(args, device, dtype, RATING_TOKENS * args.k)

    def rate(records, answers, path):
        """Ask about each prompt once; the first reply that cannot be read is shown."""
        questions = [question(record, texts) for record, texts in zip(records, answers)]
        found, shown = [], False
        for texts, row in zip(answers, reviews(ask, records, questions, path)):
            rated, reasons = read_reply(row["answer"], len(texts))
            if None in rated and not shown:
                shown = True
                what = row["answer"]
                print(f"annotator: a rating that cannot be read: {what!r:.500}", file=sys.stderr)
            found.append((rated, reasons, row.get("usage", {})))
        return found

    return rate


def reviews(ask, records, questions, path):
    """The judge's reply to each question -> rows {"image", "prompt", "answer", "usage"}, in order.

    path: reviews.jsonl, to which each reply is added as it comes; a question that has its line is
    not asked again. One that a server refuses has its words for an answer, and no line.
    """
    keys = [evaluation.key_of(replace(r, turns=(q,))) for r, q in zip(records, questions)]
    rows = evaluation.read_replies(path)
    todo = {key: item for key, *item in zip(keys, records, questions) if key not in rows}
    waiting = list(todo)
    progress = Progress("ratings", len(keys), len(keys) - len(todo))
    asked = ask([tuple(item) for item in todo.values()], answered=bool(rows))
    with open(path, "a", encoding="utf-8") as file:
        for n, reply in enumerate(asked, len(keys) - len(todo) + 1):
            image, turns = key = waiting[reply.place]
            row = {"image": image, "prompt": list(turns), "answer": reply.text or ""}
            rows[key] = row | {"usage": reply.usage}
            if not reply.refused:
                file.write(json.dumps(rows[key]) + "\n")
                file.flush()
            progress(n)
    return [rows[key] for key in keys]


def rate_by_oracle(records, answers, path):
    """The toy world's truth. It costs nothing, so that nothing is kept."""
    found, progress = [], Progress("ratings", len(records))
    for record, texts in zip(records, answers):
        world = judge.world_of(record)
        rated = [world.rate(record.image, record.turns[-1], text) for text in texts]
        counts = [world.judge(record.image, record.turns[-1], text) for text in texts]
        reasons = [", ".join(f"{n} {what}" for what, n in count.items()) for count in counts]
        found.append((rated, reasons, {}))
        progress(len(found))
    return found


def rate_all(args, records, answers, rate, out):
    """[Rated, ...] of all prompts, also in ratings.jsonl; and the sum of what a server counted."""
    images = dataset.images_folder(records, args.data, args.images)
    remember_images(out, images)
    different = [
        tuple(text for text in dict.fromkeys(map(str.strip, texts)) if text) for texts in answers
    ]
    asked = [i for i, texts in enumerate(different) if texts]  # no answer, no question
    found = rate([records[i] for i in asked], [different[i] for i in asked], out / "reviews.jsonl")
    by_place = dict(zip(asked, found))

    lines, usage = [], Counter()
    for i, (record, texts) in enumerate(zip(records, different)):
        rated, reasons, counted = by_place.get(i, ((), (), {}))
        one = Rated(record, texts, tuple(rated), tuple(reasons))
        line = ratings.line_of(one, dataset.image_name(record.image, images, out))
        lines.append(json.dumps(line | {"usage": counted}) + "\n")
        usage.update(counted)
    write_text(out / "ratings.jsonl", "".join(lines))
    return ratings.read(out / "ratings.jsonl"), usage


# ---- 3. write


def make_data(args, rated, out, drawn=None, usage=None):
    """Write the four data files and statistics.json; print the figures.

    drawn: all answers to each prompt, also those that were not rated. usage: what a server counted.
    """
    images = dataset.images_folder([one.record for one in rated], args.data, args.images)
    remember_images(out, images)
    order = list(range(len(rated)))
    random.Random(f"{args.seed}/share").shuffle(order)
    chosen = sorted(order[: round(args.share * len(rated))])

    preferences, best, attributes, reference = [], [], [], []
    qualities, words, flipped = [], [], 0
    for i in chosen:
        one = rated[i]
        name = dataset.image_name(one.record.image, images, out)
        row = lambda answer, ask="": ratings.instruct_row(one.record, name, answer, ask)
        rng = random.Random(f"{args.seed}/pair/{i}")  # so that a smaller share has the same pairs
        two = ratings.pair(one, rng, args.margin)
        if two:
            by_text = dict(one.readable())
            qualities.append([quality(by_text[text]) for text in two])
            words.append([len(text.split()) for text in two])
            flip = rng.random() < args.flip
            flipped += flip
            winner, loser = two[::-1] if flip else two
            losing = row(loser)["conversations"]
            preferences.append(row(winner) | {"rejected_conversations": losing})
        answer = ratings.best(one, args.threshold)
        if answer:
            best.append(row(answer))
        attributes += [row(text, ratings.request(rating)) for text, rating in one.readable()]
        if one.record.answers:
            reference.append(row(one.record.answers[0]))

    for name, rows in (
        ("preferences", preferences),
        ("best", best),
        ("attributes", attributes),
        ("reference", reference),
    ):
        for number, row in enumerate(rows):
            row["id"] = str(number)
        write_json(out / f"{name}.json", rows)

    every = [r for i in chosen for _, r in rated[i].readable()]
    n_answers = sum(len(rated[i].answers) for i in chosen)
    left_out = {}
    if drawn:
        stripped = [text.strip() for i in chosen for text in drawn[i]]
        empty = stripped.count("")
        left_out = {
            "equal answers, left out": len(stripped) - empty - n_answers,
            "empty answers, left out": empty,
        }
    mean = lambda values: round(statistics.fmean(values), 3) if values else None
    figures = {
        "prompts": len(chosen),
        "answers": n_answers,
        **left_out,
        "unreadable ratings": n_answers - len(every),
        "prompts without a rated answer": sum(not rated[i].readable() for i in chosen),
        **{f"mean {name}": mean([r[name] for r in every]) for name in ATTRIBUTES},
        "pairs": len(preferences),
        "pairs exchanged by --flip": flipped,
        "mean quality, chosen": mean([q for q, _ in qualities]),
        "mean quality, rejected": mean([q for _, q in qualities]),
        "mean words, chosen": mean([n for n, _ in words]),
        "mean words, rejected": mean([n for _, n in words]),
        "best answers": len(best),
        **(usage or {}),
    }
    write_json(out / "statistics.json", figures)
    print("\n".join(f"{name:<32}{value}" for name, value in figures.items()))
    if not preferences:
        print("no two answers to a prompt differ by --margin: preferences.json is empty")
    if not best:
        print("no answer reaches --threshold: best.json is empty")


def main():
    """Load, sample, rate, write."""
    args = parse()
    if processes.total > 1:
        raise BadInput(
            "annotate.py is one process; an endpoint is asked --judge-workers at a time."
        )
    if args.ratings:  # made already
        other = args.given - {"ratings", *OF_RATINGS}
        if other:
            raise BadInput(
                f"{flag_name(min(other))} does not go with --ratings, which asks nobody; accepted "
                f"are {', '.join(map(flag_name, OF_RATINGS))}."
            )
        args.data = [args.ratings]
        rated = ratings.read(args.ratings, args.images)
        make_data(args, rated, training.start(args, "annotate"))
        return
    toy.fill(args, TOY)  # without --model: our own small model and world, TOY for flags not given

    # ---- load prompts, judge and model
    device, dtype = training.device_and_dtype(args)
    rows = dataset.read(
        args.data,
        args.images,
        answers=1,  # it is the reference
        skip_bad_rows=args.skip_bad_rows,
        subset=(args.subset, args.seed),
        unique=lambda record: record.prompt_key,
        check_images=args.check_images,
    )
    rate = make_rater(args, device, dtype)
    model, processor = checkpoints.load(
        args.model, dtype, device, args.template, args.image_aspect, quantize=args.quantize
    )
    examples = rows.encode(processor, prompts_only=True, room=args.max_new_tokens)
    records = [e.record for e in examples][: args.limit]
    if args.annotator == "oracle":  # a picture that it does not know, before hours of sampling
        for record in records:
            judge.world_of(record).scene(record.image)
    out = training.start(args, "annotate", rows.skipped)
    report.show_start(processor, examples)

    # 1. sample
    answers = draw_answers(model, processor, records, args, out / "answers.jsonl")

    # 2. rate
    rated, usage = rate_all(args, records, answers, rate, out)

    # 3. write
    make_data(args, rated, out, answers, usage)


if __name__ == "__main__":
    run(main)
