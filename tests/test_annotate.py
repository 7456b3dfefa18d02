"""annotate.py and what reads its ratings: replies, the pair rule, a kill, rejection sampling, SteerLM."""

import json
import math
import random
import re
import sys
import time
from collections import Counter

import pytest
import torch
from PIL import Image

import annotate
import judge
import rejection_sampling
import steerlm
import training
from common import BadInput
from data import Processor, Record
from formats import checkpoints, layouts, ratings
from formats.ratings import ATTRIBUTES, Rated
from test_judge import server  # noqa: F401

RATED = "helpfulness {}, correctness {}, coherence {}, complexity {}, verbosity {}"


def rating(*values):
    return dict(zip(ATTRIBUTES, values, strict=True))


def line(number, *values):
    return f"Ratings of response {number}: {RATED.format(*values)}"


# ---- a judge's reply


def test_a_reply_is_read_line_by_line():
    """Any case and decoration; the reason is what stands before the line."""
    reply = "\n".join(
        [
            "Response 1 is true",
            "and short.",
            "1. **" + line(1, 4, 3, 4, 1, 0).upper() + "**",
            "Wrong.",
        ]
        + [line(2, "0.0", 1, 2, 3, 4).replace(" 1,", ": 1;")]
    )
    rated, reasons = annotate.read_reply(reply, 2)
    assert rated == [rating(4, 3, 4, 1, 0), rating(0, 1, 2, 3, 4)]
    assert reasons == ["Response 1 is true and short.", "Wrong."]


@pytest.mark.parametrize(
    "second",
    [
        "",  # three of four
        line(2, 4, 5, 4, 4, 4),  # out of range
        line(2, 4, -1, 4, 4, 4),
        line(2, 4, 3.5, 4, 4, 4),
        line(2, 4, 3, 4, 4, 4).replace(", verbosity 4", ""),
        line(2, 4, 3, 4, 4, 4) + ", verbosity 3",
        line(2, 4, 3, 4, 4, 4) + "\n" + line(2, 4, 3, 4, 4, 4),
        line(2, "four", 3, 4, 4, 4),
    ],
)
def test_what_cannot_be_read_loses_that_answer_alone(second):
    reply = "\n".join(
        [line(1, 1, 1, 1, 1, 1), second, line(3, 2, 2, 2, 2, 2), line(9, 0, 0, 0, 0, 0)]
    )
    rated, reasons = annotate.read_reply(reply, 3)
    assert rated == [rating(1, 1, 1, 1, 1), None, rating(2, 2, 2, 2, 2)]
    assert reasons[1].startswith("unreadable: Ratings of response 1")


def test_no_reply_is_no_rating():
    for reply in (None, "", "I cannot rate that."):
        assert annotate.read_reply(reply, 2)[0] == [None, None]


def test_the_question_shows_the_dialogue_and_every_answer():
    record = Record("r", None, ("Who?", "Me.", "Why?"))
    text = annotate.question(record, ["Because.", "So."])
    assert "User: Who?\nAssistant: Me.\nUser: Why?" in text and "picture above" not in text
    assert "Response 1:\nBecause.\n\nResponse 2:\nSo.\n\nRate" in text
    assert "about the picture above" in annotate.question(Record("r", "a.png", ("Who?",)), ["A"])


# ---- what is made of ratings


def rated(*qualities, where="r, row 0"):
    """A prompt whose answers "a0", "a1", ... have these qualities (None: not readable)."""
    values = {None: None}
    for q in range(13):
        values[q] = rating(min(4, q), min(4, max(0, q - 4)), max(0, q - 8), 4, q % 5)
    answers = tuple(f"a{i}" for i in range(len(qualities)))
    given = tuple(values[q] for q in qualities)
    return Rated(Record(where, None, ("What?",), ("R.",)), answers, given, ("",) * len(answers))


def test_quality_leaves_out_complexity_and_verbosity():
    assert ratings.quality(rating(4, 3, 2, 1, 0)) == 9
    assert [ratings.quality(r) for r in rated(*range(13)).ratings] == list(range(13))


def test_pair_rule():
    """The first of the best; one drawn among those at least the margin below; unreadable: nowhere."""
    draw = lambda one, margin=2: {ratings.pair(one, random.Random(i), margin) for i in range(40)}
    assert draw(rated(10, 12, 12, 11)) == {("a1", "a0")}
    assert draw(rated(10, 12, None, 3)) == {("a1", "a0"), ("a1", "a3")}
    assert draw(rated(11, 12, 12)) == draw(rated(5)) == draw(rated(None, None)) == {None}
    assert draw(rated(11, 12, 9), 3) == {("a1", "a2")} and draw(rated(11, 12), 1) == {("a1", "a0")}


def test_best_answer():
    assert ratings.best(rated(11, 12, 12), 12) == "a1" and ratings.best(rated(11, 10), 12) is None
    assert ratings.best(rated(11, None, 10), 11) == "a0" and ratings.best(rated(None), 0) is None


def test_attributes_as_text():
    text = "\nHelpfulness:4,Correctness:3,Coherence:2,Complexity:1,Verbosity:0"
    assert ratings.request(rating(4, 3, 2, 1, 0)) == text
    assert ratings.attributes("verbosity=0,correctness=3") == rating(4, 3, 4, 4, 0)
    for bad in ("honesty=4", "verbosity=5", "verbosity", "verbosity=-1", ""):
        with pytest.raises(Exception, match="was given; NAME=0 to NAME=4"):
            ratings.attributes(bad)


def test_a_line_is_read_as_it_was_written(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    record = Record("r", tmp_path / "a.png", ("Who?", "Me.", "Why?"), ("Because.",))
    one = Rated(record, ("x", "y"), (rating(4, 3, 2, 1, 0), None), ("good", "unreadable: hm"))
    path = tmp_path / "ratings.jsonl"
    path.write_text(json.dumps(ratings.line_of(one, "a.png")) + "\n")
    (read,) = ratings.read(path)
    assert read.record.where == "ratings.jsonl, row 0"
    assert (read.record.image, read.record.turns, read.record.answers) == (
        tmp_path / "a.png",
        ("Who?", "Me.", "Why?"),
        ("Because.",),
    )
    assert (read.answers, read.ratings, read.reasons) == (one.answers, one.ratings, one.reasons)


@pytest.mark.parametrize(
    "answer, message",
    [
        ({"response": "x", **rating(4, 5, 4, 4, 4)}, "row 0: answer 0: correctness is 5; a whole"),
        ({"response": "x", "helpfulness": 4}, "answer 0: correctness is None"),
        ({"response": "x", **rating(4, True, 4, 4, 4)}, "correctness is True"),
        ({"text": "x"}, "`answers` is .*; a list of objects with `response` is needed"),
        ("abc", "`answers` is"),
        ({"response": "x", **rating(4, math.inf, 4, 4, 4)}, "correctness is inf"),
        ({"response": "x", **rating(4, 10**400, 4, 4, 4)}, "correctness is 1000"),
    ],
)
def test_bad_ratings_are_refused(tmp_path, answer, message):
    path = tmp_path / "ratings.jsonl"
    path.write_text(json.dumps({"turns": ["What?"], "answers": [answer]}))
    with pytest.raises(BadInput, match=message):
        ratings.read(path)
    path.write_text('{"turns": "What?", "answers": []}')
    with pytest.raises(BadInput, match="row 0: `turns` 'What\\?' .* lists of texts are accepted"):
        ratings.read(path)
    path.write_text('{"turns": ["What?"], "answers": [], "image": "no.png"}')
    with pytest.raises(BadInput, match="row 0: image 'no.png' is not below"):
        ratings.read(path)
    path.write_text('{"conversations": []}')
    with pytest.raises(BadInput, match="row 0: no ratings; a line as annotate.py writes"):
        ratings.read(path)


# ---- whole runs


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
    """A function that runs a script on the tiny checkpoint -> its run folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(7):
        Image.effect_noise((28, 28), 80).convert("RGB").save(tmp_path / "images" / f"{i}.png")
        said = [f"<image>\nWhat is {i}?", f"It is {i}."]
        said = [{"from": ("human", "gpt")[k], "value": text} for k, text in enumerate(said)]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": said})
    (tmp_path / "prompts.json").write_text(json.dumps(rows))

    def start(script, name, *more, data="prompts.json"):
        command = ["x", "--images", "images", "--out", name, *more]
        command += [] if "--ratings" in more else ["--model", checkpoint, "--data", data]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        script.main()
        return tmp_path / name

    return start


ENDPOINT = ("--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m")
SHORT = ("--max-new-tokens", 8, "--batch-size", 3, "--k", 3)


def by_length(questions):
    """A judge: the longer the answer, the better; response 1 of every other prompt is not rated."""
    for n, (_, text) in enumerate(questions):
        yield "\n".join(lines_by_length(text)[n % 2 :])


def lines_by_length(text):
    """The lines that rate each response in a question by its length."""
    parts = text.split("Rate each")[0].split("Response ")[1:]
    lengths = [len(part.split(":\n", 1)[1].strip()) for part in parts]
    values = [min(4, size // 6) for size in lengths]
    return [line(i, v, v, v, 2, 1) for i, v in enumerate(values, 1)]


@pytest.fixture
def asked(monkeypatch):
    """The questions that reach the judge, which is `by_length`; it dies before question `asked.dies`."""
    seen = Counter()

    def ask(questions, answered):
        for place, (reply, (record, _)) in enumerate(zip(by_length(questions), questions)):
            if sum(seen.values()) == ask.dies:
                raise judge.NoAnswer("the server is gone.")
            seen[record.turns[-1]] += 1
            yield judge.Reply(place, reply)

    ask.dies = -1
    ask.seen = seen
    monkeypatch.setattr(judge, "ask_endpoint", lambda *args, **more: ask)
    return ask


def test_annotate(run, asked):
    """Every answer has its place; the files follow from the ratings; nothing is asked twice."""
    out = run(annotate, "a", *ENDPOINT, *SHORT, "--threshold", 6)
    lines = [json.loads(text) for text in (out / "ratings.jsonl").read_text().splitlines()]
    assert [one["turns"] for one in lines] == [[f"What is {i}?"] for i in range(7)]
    assert [one["reference"] for one in lines] == [[f"It is {i}."] for i in range(7)]
    assert set(asked.seen.values()) == {1} and len(asked.seen) == 7
    drawn = [
        json.loads(text)["answers"] for text in (out / "answers.jsonl").read_text().splitlines()
    ]
    assert all(len(texts) == 3 for texts in drawn)
    for one, texts in zip(lines, drawn):
        assert [a["response"] for a in one["answers"]] == [
            t for t in dict.fromkeys(x.strip() for x in texts) if t
        ]
    known = ratings.read(out / "ratings.jsonl", "images")
    files = {
        name: json.loads((out / f"{name}.json").read_text())
        for name in ("preferences", "best", "attributes", "reference")
    }
    said = lambda row, key: row[key][-1]["value"]
    pairs = [ratings.pair(one, random.Random(f"0/pair/{i}"), 2.0) for i, one in enumerate(known)]
    assert [
        (said(r, "conversations"), said(r, "rejected_conversations")) for r in files["preferences"]
    ] == [pair for pair in pairs if pair]
    assert files["preferences"]
    best = [a for one in known if (a := ratings.best(one, 6))]
    assert [said(row, "conversations") for row in files["best"]] == best and best
    readable = [(a, r) for one in known for a, r in one.readable()]
    for row, (answer, r) in zip(files["attributes"], readable, strict=True):
        prompt = row["conversations"][0]["value"]
        assert prompt.startswith("<image>\nWhat is") and prompt.endswith(ratings.request(r))
        assert said(row, "conversations") == answer
    assert [said(row, "conversations") for row in files["reference"]] == [
        f"It is {i}." for i in range(7)
    ]
    figures = json.loads((out / "statistics.json").read_text())
    assert figures["answers"] - figures["unreadable ratings"] == len(readable)
    assert figures["unreadable ratings"] == 3, "response 1 of prompts 1, 3 and 5"
    assert figures["equal answers, left out"] == figures["empty answers, left out"] == 0


def test_answers_that_are_left_out_are_counted(run, asked, monkeypatch, capsys):
    """Of the prompts that --share takes; of ratings made before, nobody knows them."""
    drawn = [["a cat", " a cat\n", "a dog"], ["", "  ", "a dog"], ["a cat"] * 3, [""] * 3]
    drawn += [["a cat", "a dog", "a cup"]] * 3
    generate = lambda model, processor, records, *_, **__: [
        drawn[int(r.turns[0][len("What is ")])] for r in records
    ]
    monkeypatch.setattr(annotate, "generate", generate)
    figures = lambda out: json.loads((out / "statistics.json").read_text())
    known = ("answers", "equal answers, left out", "empty answers, left out")
    out = run(annotate, "a", *ENDPOINT, *SHORT)
    assert [figures(out)[name] for name in known] == [13, 3, 5]
    assert figures(out)["prompts without a rated answer"] >= 1
    assert re.search(
        "equal answers, left out +3\nempty answers, left out +5\n", capsys.readouterr().out
    )
    part = figures(run(annotate, "b", *ENDPOINT, *SHORT, "--share", 0.4))
    assert sum(part[name] for name in known) == 3 * part["prompts"] == 9
    made = figures(run(annotate, "c", "--ratings", out / "ratings.jsonl", "--images", "images"))
    assert made["answers"] == 13 and not made.keys() & set(known[1:])


def test_a_killed_run_asks_only_what_is_left(run, asked):
    whole = run(annotate, "a", *ENDPOINT, *SHORT)
    asked.seen.clear()
    asked.dies = 4
    with pytest.raises(judge.NoAnswer):
        run(annotate, "b", *ENDPOINT, *SHORT)
    assert len((whole.parent / "b" / "reviews.jsonl").read_text().splitlines()) == 4
    asked.dies = -1
    out = run(annotate, "b", *ENDPOINT, *SHORT, "--resume")
    assert set(asked.seen.values()) == {1} and len(asked.seen) == 7
    answers = lambda folder: (folder / "answers.jsonl").read_text()
    assert answers(out) == answers(whole)


MADE = ("ratings.jsonl", "preferences.json", "best.json", "attributes.json", "reference.json",
        "statistics.json")  # fmt: skip


def completion(body):
    """(prompt of a request, a server's reply that rates by length and counts tokens)."""
    text = body["messages"][0]["content"][-1]["text"]
    prompt = text.split("What was asked:\n")[1].split("\n")[0]
    said = {"choices": [{"message": {"content": "\n".join(lines_by_length(text))}}]}
    return prompt, json.dumps(said | {"usage": {"prompt_tokens": 10, "completion_tokens": 5}})


def test_each_reply_is_kept_when_it_arrives(run, server, tmp_path, capsys):  # noqa: F811
    """While the first prompt has no reply, those of the others are on disk; all are paid once."""
    paths = [tmp_path / name / "reviews.jsonl" for name in ("whole", "cut")]
    failing, kept = [False], []

    def respond(n, body):
        prompt, reply = completion(body)
        if prompt == "What is 0?" and failing[0]:
            lines = lambda: len(paths[1].read_text().splitlines()) if paths[1].exists() else 0
            end = time.monotonic() + 20
            while lines() < 6 and time.monotonic() < end:
                time.sleep(0.02)
            kept.append(lines())
            return 401, b"no more credit"
        return 200, reply.encode()

    url, requests = server(respond)
    flags = ("--judge-url", url, "--judge-model", "m", "--judge-workers", 2, *SHORT)
    whole = run(annotate, "whole", *flags)
    figures = json.loads((whole / "statistics.json").read_text())
    assert {name: figures[name] for name in ("requests", "tokens in", "tokens out")} == {
        "requests": 7,
        "tokens in": 70,
        "tokens out": 35,
    }

    failing[0] = True
    with pytest.raises(judge.NoAnswer, match="status 401 .no more credit.*--resume goes on"):
        run(annotate, "cut", *flags)
    assert kept == [6]
    with open(paths[1], "a") as file:
        file.write('{"image": nu')  # killed inside a line
    failing[0] = False
    requests.clear()
    cut = run(annotate, "cut", *flags, "--resume")
    assert [completion(body)[0] for _, _, body in requests] == ["What is 0?"]
    assert "reviews.jsonl, line 7: half a line" in capsys.readouterr().err
    for name in MADE:
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("status, which", [(400, 3), (413, 0), (422, 6)])
def test_a_prompt_that_the_server_refuses(run, server, capsys, status, which):  # noqa: F811
    """It is counted, the server's words are shown, and --resume asks it again and nothing else."""
    refusing = [True]

    def respond(n, body):
        prompt, reply = completion(body)
        if prompt == f"What is {which}?" and refusing[0]:
            return status, b"content management policy"
        return 200, reply.encode()

    url, requests = server(respond)
    flags = ("--judge-url", url, "--judge-model", "m", "--judge-workers", 1, *SHORT)
    out = run(annotate, "a", *flags)
    words = f"status {status} (content management policy)"
    assert f"annotator: a rating that cannot be read: {words!r}" in capsys.readouterr().err
    rated = ratings.read(out / "ratings.jsonl", "images")
    assert set(rated[which].ratings) == {None}
    assert set(rated[which].reasons) == {f"unreadable: {words}"}
    figures = json.loads((out / "statistics.json").read_text())
    assert figures["unreadable ratings"] == len(rated[which].answers) > 0
    assert figures["prompts without a rated answer"] == 1 and figures["requests"] == 6

    for refusing[0] in (True, False):
        requests.clear()
        again = run(annotate, "a", *flags, "--resume")
        assert [completion(body)[0] for _, _, body in requests] == [f"What is {which}?"]
        figures = json.loads((again / "statistics.json").read_text())
        assert figures["requests"] == 7 - refusing[0]
    whole = run(annotate, "whole", *flags)
    for name in MADE:
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_server_that_refuses_every_prompt(run, server, tmp_path):  # noqa: F811
    """A wrong name of the model, say: nothing is made of it, and nothing kept."""
    url, requests = server(lambda n, body: (400, b"no model m"))
    with pytest.raises(judge.NoAnswer, match=r"--judge-url .*: status 400 \(no model m\); mend it"):
        run(annotate, "a", "--judge-url", url, "--judge-model", "m", *SHORT)
    assert not (tmp_path / "a" / "reviews.jsonl").read_text() and len(requests) == 7
    assert not (tmp_path / "a" / "ratings.jsonl").exists()


def test_flags_that_would_do_nothing_are_refused(run, checkpoint, tmp_path):
    for flag, value in (
        ("--k", 7),
        ("--judge-url", "http://x"),
        ("--judge-workers", 2),
        ("--max-new-tokens", 9),
        ("--batch-size", 2),
        ("--quantize", "nf4"),
    ):
        match = f"{flag} does not go with --ratings, which asks nobody; accepted are .*--margin"
        with pytest.raises(BadInput, match=match):
            run(annotate, "a", "--ratings", "x.jsonl", flag, value)
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "reward.json").write_text("{}")
    for flags, message in (
        (("--annotator", "oracle", "--judge-url", "http://x"), "--judge-url is for --annotator"),
        (("--annotator", "oracle", "--annotator-device", "cpu"), "--annotator-device is for"),
        (("--annotator", tmp_path / "reward"), "a reward model, which .*; accepted are oracle, a"),
        (("--annotator", checkpoint, "--facts", "x.json"), "unrecognized arguments: --facts"),
        (("--annotator", checkpoint, "--missing-facts", "count"), "unrecognized arguments: --miss"),
    ):
        with pytest.raises(BadInput, match=message):
            run(annotate, "a", *flags)


def test_help_offers_what_is_accepted(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["annotate.py", "--help"])
    with pytest.raises(SystemExit):
        annotate.parse()
    told = capsys.readouterr().out
    assert "(default: endpoint)" in told and "reward" not in told and "-facts" not in told


def test_the_oracle_s_pictures_are_checked_before_sampling(run, monkeypatch, tmp_path):
    """And before there is a run folder. Both a folder without a world and another world's picture."""
    monkeypatch.setattr(annotate, "generate", None)
    match = "prompts.json, row 0: the oracle knows pictures of a toy world"
    with pytest.raises(BadInput, match=match):
        run(annotate, "a", "--annotator", "oracle", *SHORT)
    (tmp_path / "scenes.json").write_text("{}")
    with pytest.raises(BadInput, match="0.png is no picture of this world"):
        run(annotate, "a", "--annotator", "oracle", *SHORT)
    assert not (tmp_path / "a").exists()


def test_images_inside_a_parquet_file(run, asked, tmp_path):
    """They are written beside the ratings, where the next script finds them without more flags."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": (tmp_path / "images" / f"{i}.png").read_bytes()} for i in range(3)]
    columns = {"image": images, "question": [f"What is {i}?" for i in range(3)]}
    columns |= {"chosen": ["A."] * 3, "rejected": ["B."] * 3, "origin_dataset": ["x"] * 3}
    columns["ds_name"] = ["x"] * 3
    pq.write_table(pa.table(columns), tmp_path / "packed.parquet")
    out = run(annotate, "a", *ENDPOINT, *SHORT, data="packed.parquet")
    known = ratings.read(out / "ratings.jsonl")
    assert [one.record.image.parent for one in known] == [out / "images"] * 3
    assert [one.record.image.read_bytes() for one in known] == [i["bytes"] for i in images]


def test_flips_and_shares_of_the_same_ratings(run, asked):
    first = run(annotate, "a", *ENDPOINT, *SHORT, "--margin", 1)
    pairs = lambda out: [
        tuple(row[key][-1]["value"] for key in ("conversations", "rejected_conversations"))
        for row in json.loads((out / "preferences.json").read_text())
    ]
    asked.seen.clear()
    made = ("--ratings", first / "ratings.jsonl", "--margin", 1)
    all_flipped = run(annotate, "b", *made, "--flip", 1)
    assert pairs(all_flipped) == [pair[::-1] for pair in pairs(first)] and pairs(first)
    some, more = (run(annotate, f"f{p}", *made, "--flip", p / 10) for p in (3, 7))
    flipped = lambda out: {i for i, pair in enumerate(pairs(out)) if pair != pairs(first)[i]}
    assert flipped(some) < flipped(more), "more noise keeps what was exchanged"
    part = run(annotate, "c", *made, "--share", 0.43)
    count = lambda out, name: len(json.loads((out / f"{name}.json").read_text()))
    assert count(part, "reference") == 3 and count(first, "reference") == 7
    assert set(pairs(part)) <= set(pairs(first)) and not asked.seen


@pytest.fixture
def taught(monkeypatch):
    """The (prompt, answer) texts of the rows that a script trains on, in any order."""
    seen, collate = [], Processor.collate

    def spy(self, examples, view=None):
        for e in examples:
            for answer, scored in zip(e.answers, e.scored):
                unscored = torch.cat([e.prompt, answer[~scored]])
                words = unscored[unscored != self.image_token_id]
                seen.append((self.tokenizer.decode(words), self.text(answer[scored])))
        return collate(self, examples, view)

    monkeypatch.setattr(Processor, "collate", spy)
    return seen


def test_rejection_sampling_trains_on_the_best_answers(run, asked, taught):
    folder = run(annotate, "a", *ENDPOINT, *SHORT)
    file = folder / "ratings.jsonl"
    best = {ratings.best(one, 6) for one in ratings.read(file, "images")} - {None}
    taught.clear()
    flags = ("--batch-size", 2, "--grad-accum", 1, "--epochs", 1, "--lora-rank", 2)
    out = run(rejection_sampling, "r", *flags, "--threshold", 6, data=file)
    assert {answer for _, answer in taught} == best and best
    assert (out / "adapter").is_dir() and (out / "summary.json").is_file()
    with pytest.raises(BadInput, match="--threshold 13: no answer to any of 7 prompts has it"):
        run(rejection_sampling, "s", *flags, "--threshold", 13, data=file)


def test_steerlm_asks_for_what_each_answer_has(run, asked, taught):
    folder = run(annotate, "a", *ENDPOINT, *SHORT)
    file = folder / "ratings.jsonl"
    known = ratings.read(file, "images")
    taught.clear()
    run(
        steerlm,
        "s",
        "--batch-size",
        2,
        "--grad-accum",
        1,
        "--epochs",
        1,
        "--lora-rank",
        2,
        data=file,
    )
    want = sorted((a, ratings.request(r)) for one in known for a, r in one.readable())
    got = sorted(
        (answer, "\n" + prompt[prompt.index("Helpfulness") :].split(" ASSISTANT")[0])
        for prompt, answer in taught
    )
    assert got == want and len(want) > 7


def test_the_request_stands_behind_the_last_turn(checkpoint):
    _, processor = checkpoints.load(checkpoint)
    processor.ask = ratings.request(ratings.BEST)
    tokens = processor.encode(Record("r", None, ("Who?", "Me.", "Why?"))).prompt
    text = processor.tokenizer.decode(tokens)
    assert "Why?\nHelpfulness:4" in text and text.count("Helpfulness") == 1


def test_a_real_endpoint_is_asked(monkeypatch, tmp_path):
    """The flags reach judge.asker; a checkpoint's reply is bounded by the number of answers."""
    seen = []
    ask = lambda items, answered: [judge.Reply(0, *by_length(items))]
    monkeypatch.setattr(judge, "asker", lambda *args: seen.append(args) or ask)
    monkeypatch.setattr(sys, "argv", ["x", *ENDPOINT, "--k", "3"])
    args = annotate.parse()
    rate = annotate.make_rater(args, "cpu", torch.float32)
    assert seen == [(args, "cpu", torch.float32, 300)]
    record, texts = Record("r", None, ("What?",)), ("a" * 12, "b" * 30)
    (found,) = rate([record], [texts], tmp_path / "reviews.jsonl")
    assert found[0] == [rating(2, 2, 2, 2, 1), rating(4, 4, 4, 2, 1)]
    assert training.flag_name("judge_url") == "--judge-url"


def test_other_scripts_say_who_reads_ratings(run, asked):
    out = run(annotate, "a", *ENDPOINT, *SHORT)
    with pytest.raises(BadInput, match="rated answers .* rejection_sampling.py and steerlm.py"):
        layouts.read(out / "ratings.jsonl")
    with pytest.raises(BadInput, match="a run of annotate.py: its ratings.jsonl is for"):
        ratings.read(out)
