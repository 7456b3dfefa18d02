"""Benchmarks with a judge: MMHal-Bench, LLaVA-Bench, MM-Vet, MT-Bench, AlpacaEval.

    python eval_judge.py --questions response_template.json --images images --model DIR --out DIR \\
        --annotator endpoint --judge-url URL --judge-model NAME
    python eval_judge.py --questions questions.jsonl --context context.jsonl \\
        --references answers_gpt4.jsonl --answers answers.jsonl --annotator ... --out DIR
    python eval_judge.py --questions mm-vet.json --reviews gpt-4-0613-grade-1runs.json

The question file says which benchmark it is. Two steps, each goes on where it was stopped when the
same command is given again:
1. answer    --model or --endpoint answer the questions (evaluation.py); or --answers takes files in
             the benchmark's layout. MT-Bench is asked turn by turn, at its categories' temperatures
2. judge     --annotator reads the answers: a server (endpoint), a checkpoint, or in the toy world
             its truth (oracle). Without --annotator this step is left out, and answers that were
             judged before are scored again: no call is made for what has its reply
--reviews scores the official judge's own file; it needs neither answers nor a judge.

How a judge is asked, how its reply is read and what is computed of it stands in a file for each
benchmark: formats/{mmhal,llava_bench,mm_vet,mt_bench,alpaca_eval}.py. The judges' prompts have the
official structure in our words, so that the official judge may rate a little differently here. The
judges of the papers (gpt-4-0314, gpt-4-0613, ...) are retired; figures of two judges, or of one
judge's name in two years, are not comparable. So the judge's name, the name by which its server
calls it, and the date stand beside every figure, and replies of two judges are never mixed.

Most judges read a description or a reference answer in the place of the picture. With
--judge-sees-image it is shown to them: MMHal-Bench becomes MMHALBench-V (Amirloo et al. 2024).

Official rules make a number even of a reply that cannot be read; how many there were is printed,
and the figures without them are in details.json. Intervals draw images (comparison.py); they say
nothing about how far the judge errs.

Files in --out, of several contestants in a folder each:
    replies.jsonl           the answers, with what was asked
    reviews.jsonl           the judge's replies, a line each: what it read, judge, date
    <benchmark>.json(l)     the answers in the official layout, and <benchmark>_reviews.json(l)
    metrics.json            figures, judge and date; of several {contestant: ...}
    details.json            intervals, differences, figures of readable replies alone
    changed-<name>.png      pictures whose score differs from the first contestant's

Deviations:
1. Answers and reviews are matched by their ids (MMHal-Bench: picture and question), not by order.
2. The instructions that the official judges get as a system message stand in the one message.
3. A server's reply may have 1024 tokens at least, so that a judge may think first.
   A question that it refuses while it answers others (a filter, say) counts as unreadable;
   it is not kept, and the same command asks it again.
4. A ratio of nothing is 0.
"""

from common import BadInput, Parser, Progress, positive_int, run

import functools
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import comparison
import evaluation
import judge
import processes
import training
from data import Record
from formats import alpaca_eval, benchmarks, llava_bench, mm_vet, mmhal, mt_bench
from formats.files import ImageFolder, image_folders
from formats.layouts import take_placeholder

# keys of a question -> the benchmark
KEYS = {
    ("image_src", "gt_answer"): mmhal,
    ("imagename", "capability"): mm_vet,
    ("turns", "category"): mt_bench,
    ("image", "text", "category"): llava_bench,
    ("instruction", "output"): alpaca_eval,
}
TITLES = {
    mmhal: "MMHal-Bench",
    mm_vet: "MM-Vet",
    mt_bench: "MT-Bench",
    llava_bench: "LLaVA-Bench",
    alpaca_eval: "AlpacaEval",
}


READ_BY = {"context": (llava_bench,), "references": (llava_bench, mt_bench, alpaca_eval)}


def benchmark_of(path):
    """The file of questions -> the module of its benchmark."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable ({type(error).__name__}: {error}).") from None
    for part in (text, text.split("\n", 1)[0]):  # a whole file, or lines
        try:
            first = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if isinstance(first, list):
            first = first[0] if first else None
        elif isinstance(first, dict) and first and all(isinstance(v, dict) for v in first.values()):
            first = next(iter(first.values()))
        for keys, bench in KEYS.items():
            if isinstance(first, dict) and first.keys() >= set(keys):
                return bench
    listed = "; ".join(f"{TITLES[bench]} ({', '.join(keys)})" for keys, bench in KEYS.items())
    raise BadInput(f"{path}: its first question has the keys of no benchmark: {listed}.")


# ---- 1. answer


def read_records(bench, questions, images):
    """{id: (path of the image or None, first turn without placeholder)}; no image may be missing."""
    folder = ImageFolder(images)
    found = {}
    for q in questions:
        try:
            image = None if q.image is None else folder.find(q.image)
            (turn,) = take_placeholder(q.turns[:1], image)
        except BadInput as error:
            raise BadInput(f"{q.where}: {error}") from None
        found[q.id] = image, turn
    folder.report()
    return found


def ask(bench, contestant, questions, shown, path, max_new_tokens):
    """Ask one contestant all questions, turn by turn -> [(text of turn 1, ...)]."""
    at = bench.temperature if bench is mt_bench else lambda q: 0.0
    said = [() for _ in questions]
    for turn in range(max(len(q.turns) for q in questions)):
        temperatures = sorted({at(q) for q in questions if len(q.turns) > turn})
        for temperature in temperatures:
            places = [
                i for i, q in enumerate(questions) if len(q.turns) > turn and at(q) == temperature
            ]
            records = []
            for i in places:
                image, first = shown[questions[i].id]
                turns = (first, *questions[i].turns[1 : turn + 1])
                dialogue = [text for pair in zip(turns, said[i]) for text in pair]
                records.append(Record(questions[i].where, image, (*dialogue, turns[-1])))
            label = TITLES[bench]
            texts = evaluation.answer(contestant, records, max_new_tokens, path, label, temperature)
            for i, text in zip(places, texts):
                said[i] += (text,)
    return said


# ---- 2. judge


TRUTH = "the toy world's truth"


@dataclass
class Judge:
    """Who judges."""

    name: str
    # a function ([(question, Request, image or None)], temperature, answered) -> judge.Reply's;
    # answered: see `ask_endpoint`
    ask: object
    served: set = field(default_factory=set)  # names by which a server calls it, or a hash of files


def make_judge(args, bench):
    """--annotator -> Judge, or None without it."""
    device, dtype = training.device_and_dtype(args)
    device = judge.checked(args, device)
    if args.annotator is None:
        return None
    if args.annotator == "oracle":
        return Judge(TRUTH, lambda items, *_: by_truth(bench, items))
    if (Path(args.annotator) / "reward.json").is_file():
        raise BadInput(
            f"--annotator {args.annotator} is a reward model, which writes no reply; a checkpoint, "
            "endpoint or oracle is accepted."
        )

    def to_judge(q, request, image):
        """What `ask` of judge.py takes."""
        shown = image if args.judge_sees_image else None
        return Record(q.where, shown, (request.text,)), request.text

    if args.annotator == "endpoint":
        return of_server(judge.connector(args), args.judge_model, to_judge, bench.MAX_TOKENS)

    from formats import checkpoints  # brings transformers; --help does without

    load = functools.cache(
        lambda: judge.ask_checkpoint(args.annotator, device, dtype, bench.MAX_TOKENS)
    )

    def ask_it(items, temperature, answered):
        """Replies of a checkpoint in order; it decodes greedily whatever the temperature."""
        return load()([to_judge(*item) for item in items])

    files = evaluation.files_of(checkpoints.find_model(args.annotator))
    return Judge(args.annotator, ask_it, {f"files {files}"})


def of_server(endpoint, name, to_judge, max_tokens):
    """The Judge behind an endpoint; its replies are taken as they arrive."""
    served = set()
    tokens = max(judge.REPLY_TOKENS, max_tokens)

    def ask_it(items, temperature, answered):
        """Replies as they arrive."""
        ask = endpoint(
            max_tokens=tokens, temperature=temperature, resume="the same command", served=served
        )
        return ask([to_judge(*item) for item in items], answered)

    endpoint()  # a wrong address is refused now
    return Judge(name, ask_it, served)


def by_truth(bench, items):
    """Replies in the benchmark's format, by the truth of the toy world.

    An answer's grade is (the share of what was asked that it tells, its errors).
    """
    for place, (q, request, image) in enumerate(items):
        grades = []
        for turns, text in request.said:
            record = Record(q.where, image, turns)
            counts = judge.world_of(record).judge(image, turns[-1], text)
            told = counts["true"] / max(1, counts["true"] + counts["missed"])
            grades.append((told, counts["errors"]))
        yield judge.Reply(place, bench.in_words(grades))


def judged(who, bench, questions, said, images, path, sees=False, runs=1):
    """The judge's reply to each request -> ([replies of a question], the rows that hold them).

    who: Judge, or None to read what is in the file. images: of each question its path or None.
    path: reviews.jsonl, to which each reply is added as it comes. sees: is the picture shown to the
    judge? The key of a reply is what the judge read and saw, so that another answer is judged anew.
    The toy world's truth always sees it.
    """
    rows = evaluation.read_replies(path)
    sees = sees or TRUTH in {who and who.name, *(row.get("judge") for row in rows.values())}
    places = []  # (question's number, Request, its name)
    for i, (q, answer) in enumerate(zip(questions, said)):
        for request in bench.requests(q, answer):
            for n in range(runs):
                name = " ".join(filter(None, (request.part, f"run {n + 1}" if n else "")))
                places.append((i, request, name))

    used = [None] * len(places)  # the last row of each place
    waiting = list(range(len(places)))
    for n, temperature in enumerate((bench.TEMPERATURE, *bench.RETRIES)):
        asked = {}  # place -> (key, what is asked)
        for place in waiting:
            i, request, name = places[place]
            if n:
                name = " ".join(filter(None, (name, f"try {n + 1}")))
                request = benchmarks.Request(request.part, request.text + bench.CUE, request.said)
            key = evaluation.key_of(Record("", images[i] if sees else None, (name, request.text)))
            asked[place] = key, (questions[i], request, images[i])
        todo = {key: item for key, item in asked.values() if key not in rows}
        if todo and who is None:
            has = f"holds {len(asked) - len(todo)} of {len(asked)} replies"
            raise BadInput(f"{path}: {has}; --annotator is needed for the others.")
        if todo:
            add_replies(who, todo, temperature, rows, path, TITLES[bench])
        for place, (key, _) in asked.items():
            used[place] = rows[key]
        parts = [request.part for _, request, _ in places]
        waiting = [p for p in waiting if bench.readable(used[p]["answer"], parts[p]) is None]
    refuse_two_judges(used, who, path)

    replies = [[] for _ in questions]
    for (i, request, _), row in zip(places, used):
        replies[i].append((row["answer"], request.part))
    return replies, used


def add_replies(who, todo, temperature, rows, path, label):
    """Ask for each item of {key: item}, and add each reply to the rows and to the file."""
    refuse_two_judges(rows.values(), who, path)
    known = {row["served"] for row in rows.values()} - {None}
    progress = Progress(f"{label}, judge", len(todo))
    waiting = list(todo)
    with open(path, "a", encoding="utf-8") as file:
        asked = who.ask(list(todo.values()), temperature, bool(rows))
        for n, reply in enumerate(asked, 1):
            key = waiting[reply.place]
            names = sorted(known | who.served)
            if len(names) > 1:
                raise BadInput(
                    f"{path}: the judge {who.name} was served as {names[0]!r} and as {names[1]!r}; "
                    "replies of two judges are not mixed; give another --out to judge all again."
                )
            image, (name, text) = key
            answer = "" if reply.refused else reply.text or ""
            row = {"image": image, "prompt": [name, text], "answer": answer, "judge": who.name}
            row |= {"served": names[0] if names else None, "date": time.strftime("%Y-%m-%d")}
            rows[key] = row
            if reply.refused:
                where = todo[key][0].where
                print(f"{where}: the judge refuses it: {reply.text}", file=sys.stderr)
            else:
                file.write(json.dumps(row) + "\n")
                file.flush()
            progress(n)


def refuse_two_judges(rows, who, path):
    """All rows must be of one judge, and of `who` if it is given."""
    names = {who.name: "here"} if who else {}
    for row in rows:
        if not isinstance(row.get("judge"), str) or not isinstance(row.get("date"), str):
            raise BadInput(f"{path}: a line without `judge` and `date`; is it a file of ours?")
        row.setdefault("served", None)
        names.setdefault(row["judge"], row["date"])
        if len(names) > 1:
            one, other = list(names)[:2]
            raise BadInput(
                f"{path}: it has replies of the judge {other!r} ({names[other]}), and of {one!r} "
                f"({names[one]}); replies of two judges are not mixed; give another --out."
            )


# ---- 3. score


def scores_of(rule, replies):
    """[[(reply, part)]] of each question -> [[numbers or None]]."""
    return [[rule(text, part) for text, part in of_question] for of_question in replies]


def units_of(bench, questions, scores):
    """Scores of each question -> units (U, G x V) and the names of the G groups."""
    units, groups = benchmarks.in_groups(
        questions, [bench.values(q, s) for q, s in zip(questions, scores)]
    )
    return units.reshape(len(units), -1), groups


def figures_of(bench, groups):
    """A function from sums (..., G x V) to figures, for `comparison.compare`."""
    return lambda sums: bench.figures(sums.reshape(*sums.shape[:-1], len(groups), -1), groups)


def figures(bench, questions, replies, rule):
    """{figure: number} of one contestant."""
    units, groups = units_of(bench, questions, scores_of(rule, replies))
    values = figures_of(bench, groups)(units.sum(0))
    return {key: float(value) for key, value in values.items()}


def totals_of_runs(bench, questions, replies):
    """The first figure of each run of the judge, where there are several."""
    runs = len(replies[0])
    if bench is not mm_vet or runs < 2:
        return None
    each = [[of[n : n + 1] for of in replies] for n in range(runs)]
    return [figures(bench, questions, one, bench.official)["total"] for one in each]


def by_whom(rows):
    """Rows of reviews.jsonl -> {"judge", "served", "date"}."""
    dates = sorted({row["date"] for row in rows})
    date = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return {"judge": rows[0]["judge"], "served": rows[0].get("served"), "date": date}


def finish(bench, questions, results, said, args):
    """Print all that is known of {contestant: (replies, by whom)}, and write it to --out."""
    metrics, details, units = {}, {}, {}
    for name, (replies, whom) in results.items():
        units[name], groups = units_of(bench, questions, scores_of(bench.official, replies))
        metrics[name] = figures(bench, questions, replies, bench.official)
        of_all = [bench.readable(text, part) for of in replies for text, part in of]
        lengths = [len(text) for answer in said.get(name, ()) for text in answer]
        metrics[name] |= {
            "n": len(questions),
            "unreadable": sum(score is None for score in of_all),
            "characters": statistics.mean(lengths) if lengths else None,
        } | whom
        details[name] = {
            "readable": figures(bench, questions, replies, bench.readable),
            "runs": totals_of_runs(bench, questions, replies),
        }
    compared = comparison.compare(units, figures_of(bench, groups))
    for name, intervals in compared.items():
        details[name]["intervals"] = intervals

    print(f"{TITLES[bench]}: 95 % intervals (bootstrap over images; differences are paired)")
    hidden = (" only", " reference", " model")
    print(
        "\n".join(comparison.table(compared, [k for k in compared[name] if not k.endswith(hidden)]))
    )
    for name, (replies, _) in results.items():
        m, n = metrics[name], sum(map(len, replies))
        served = f" ({m['served']})" if m["served"] else ""
        print(f"\n{name}: judge {m['judge']}{served}, {m['date'] or 'date unknown'}")
        alone = details[name]["readable"]
        apart = ", ".join(f"{key} {alone[key]:.4g}" for key in bench.MAIN if key in alone)
        left = f"without them: {apart}" if m["unreadable"] < n else "nothing is left"
        print(f"{name}: {m['unreadable']} of {n} replies unreadable; {left}")
        if m["characters"] is not None:
            print(f"{name}: {m['characters']:.0f} characters an answer; judges like length")
        if details[name]["runs"]:
            runs = details[name]["runs"]
            shown = ", ".join(f"{total:.1f}" for total in runs)
            print(f"{name}: total of each run {shown}; standard deviation {np.std(runs):.1f}")
    for line in bench.remarks(questions):
        print(line)

    if args.out:
        comparison.write_figures(args.out, metrics, details)


def changed(bench, questions, replies, said, names, images):
    """Rows of `comparison.sheet`: the pictures about which two contestants get other scores.

    replies, said: of each of the two, in the order of the questions. Turns are parted by "/".
    """
    rows = []
    for i, of in enumerate(zip(*(scores_of(bench.official, of) for of in replies))):
        if images[i] is None or of[0] == of[1]:
            continue
        sums = [sum(0 if s is None else s[-1] for s in scores) for scores in of]
        answers = []
        for name, scores, total, texts in zip(names, of, sums, said):
            shown = ", ".join("-" if s is None else f"{s[-1]:g}" for s in scores)
            better = total == max(sums) if sums[0] != sums[1] else None
            answers.append((f"{name} ({shown})", " / ".join(texts[i]), better))
        rows.append((images[i], " / ".join(questions[i].turns), answers))
    return rows


def parse():
    """The command line."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--questions", required=True, metavar="FILE", help="question file, as downloaded")
    flag(
        "--context",
        metavar="FILE",
        help="LLaVA-Bench: what the judge reads in the place of a picture",
    )
    flag(
        "--references",
        metavar="FILE",
        help="LLaVA-Bench: answers of GPT-4; MT-Bench: reference answers; AlpacaEval: outputs of "
        "another baseline than the question file's",
    )
    flag(
        "--answers",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="judge these, one file a contestant, in the benchmark's layout",
    )
    flag(
        "--reviews",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="score these files of the official judge, one a contestant",
    )
    flag(
        "--max-new-tokens",
        type=positive_int,
        default=1024,
        metavar="N",
        help="longest answer (default %(default)s)",
    )
    evaluation.add_flags(parser)
    judge.add_flags(parser, default=None, replies=True)
    flag = parser.add_argument_group("judge").add_argument
    flag(
        "--judge-sees-image",
        action="store_true",
        help="show the picture to the judge: MMHALBench-V, if the questions are MMHal-Bench's",
    )
    flag(
        "--judge-runs",
        type=positive_int,
        default=1,
        metavar="N",
        help="MM-Vet: judge each answer N times; the paper 5 (default %(default)s)",
    )
    args = parser.parse_args()
    if args.reviews:
        if args.model or args.endpoint or args.adapter or args.answers or args.annotator:
            raise BadInput(
                "--reviews scores a judge's file; answers, models and judges do not go with it."
            )
        args.answers = args.reviews
        evaluation.check_flags(args)
        args.answers = None
        return args
    evaluation.check_flags(args, judged=True)
    if args.answers and not args.out:
        raise BadInput("--answers needs --out, where the judge's replies are kept.")
    return args


def main():
    """Answers, reviews, scores."""
    args = parse()
    bench = benchmark_of(args.questions)
    for name, users in READ_BY.items():
        if getattr(args, name) and bench not in users:
            raise BadInput(f"--{name} is for {' and '.join(TITLES[b] for b in users)} alone.")
    questions = bench.read(args.questions, args.context, args.references)
    if args.judge_runs > 1 and bench is not mm_vet:
        raise BadInput(f"--judge-runs is for MM-Vet; the questions are {TITLES[bench]}'s.")

    # a judge's own files
    if args.reviews:
        results = {}
        for who, path in zip(evaluation.names_of_files(args.reviews), args.reviews):
            replies = [[(t, "") for t in of] for of in bench.read_reviews(path, questions)]
            whom = {"judge": f"of {path}", "served": None, "date": None}
            results[who] = replies, whom
        finish(bench, questions, results, {}, args)
        return

    # 1. answer
    who = make_judge(args, bench)
    said, paths = {}, {}  # of each contestant its answers, and where its reviews are kept
    if args.answers:
        images = images_of(args, questions)
        names = evaluation.names_of_files(args.answers)
        said = {n: bench.read_answers(path, questions) for n, path in zip(names, args.answers)}
        about = {"benchmark": TITLES[bench], "questions": evaluation.hashes([args.questions])}
        settings = {n: evaluation.hashes([path]) for n, path in zip(names, args.answers)}
        evaluation.begin(Path(args.out), {"about": about, "contestants": settings})
        for name in names:
            paths[name] = Path(args.out, *([name.replace("/", "-")] if len(names) > 1 else []))
    else:
        folder = args.images or image_folders(args.questions)
        shown = read_records(bench, questions, folder)
        images = [shown[q.id][0] for q in questions]
        about = {
            "benchmark": TITLES[bench],
            "questions": evaluation.hashes([args.questions]),
            "max_new_tokens": args.max_new_tokens,
        }
        for contestant in evaluation.contestants(args, about):
            path, name = contestant.path("replies.jsonl"), contestant.name
            said[name] = ask(bench, contestant, questions, shown, path, args.max_new_tokens)
            contestant.release()
            if path:
                bench.write_answers(path.parent, questions, said[name], name)
                paths[name] = path.parent
    if processes.number:
        return

    # 2. judge
    if who is None and not any((folder / "reviews.jsonl").exists() for folder in paths.values()):
        print(f"{args.out}: answers are there; the same command with --annotator judges them")
        return
    results = {}
    for name, folder in paths.items():
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / "reviews.jsonl"
        sees, runs = args.judge_sees_image, args.judge_runs
        replies, rows = judged(who, bench, questions, said[name], images, kept, sees, runs)
        results[name] = replies, by_whom(rows)
        texts = [[text for text, _ in of] for of in replies]
        bench.write_reviews(folder, questions, texts, name, rows[0]["judge"])

    # 3. score
    finish(bench, questions, results, said, args)
    if len(results) > 1 and any(image is not None for image in images):
        rows_of = lambda *two: changed(
            bench, questions, [results[n][0] for n in two], [said[n] for n in two], two, images
        )
        comparison.sheets(args.out, results, "scores of pictures that differ", rows_of)


def images_of(args, questions):
    """The image of each question, or None; one that the judge needs must be there."""
    required = args.judge_sees_image or args.annotator == "oracle"
    folder = ImageFolder(args.images or image_folders(args.questions))
    images = []
    for q in questions:
        found = None if q.image is None else folder.look_up(q.image)[0]
        if required and q.image is not None and found is None:
            raise BadInput(f"{q.where}: image {q.image!r:.80} is not below --images.")
        images.append(found)
    return images


if __name__ == "__main__":
    run(main)
