"""eval_judge.py: official files, official parsing restated, two judges kept apart, runs that go on, a server we did not write."""

import ast
import json
import random
import re
import sys
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval_judge
import evaluation
import judge
from common import BadInput
from formats import alpaca_eval, llava_bench, mm_vet, mmhal, mt_bench
from formats.benchmarks import Question, in_groups

OFFICIAL = Path(__file__).parents[2] / "shared" / "data" / "benchmarks"


def write(path, rows):
    """JSON, or JSON lines for a .jsonl."""
    lines = str(path).endswith(".jsonl")
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return path


def main(*words):
    """Run the script in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval_judge.py", *map(str, words)])
        eval_judge.main()


@pytest.fixture
def pictures(tmp_path):
    """A folder of four pictures."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (28, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def hal_row(i, **changed):
    return {
        "question_type": mmhal.TYPES[i % 8],
        "question_topic": "indoor",
        "image_id": str(i),
        "image_src": f"https://example.org/a/{i}.png",
        "image_content": ["Mug", "Table"],
        "question": f"What is {i}?",
        "gt_answer": "A mug.",
        "model_answer": "",
    } | changed


@pytest.fixture
def template(tmp_path, pictures):
    """A template of MMHal-Bench with four questions."""
    return write(tmp_path / "template.json", [hal_row(i) for i in range(4)])


# ---- MMHal-Bench


def official_mmhal(contents):
    """The published rule of eval_gpt_mmhal.py and RLHF-V's summary, restated."""
    scores = []
    for content in contents:
        hits = {s for s in range(7) if content.lower().count(f"rating: {s}")}
        scores.append(hits.pop() if len(hits) == 1 else 0)
    types = [[] for _ in range(8)]
    for i, s in enumerate(scores):
        types[i % 8].append(s)
    informative = [s - 3 if s >= 3 else s for s in scores]
    return {
        "score": sum(scores) / len(scores),
        "hallucination_rate": sum(s < 3 for s in scores) / len(scores),
        "informativeness": sum(informative) / len(informative) / 3 * 100,
        **{mmhal.TYPES[k]: sum(t) / len(t) for k, t in enumerate(types)},
    }


@pytest.mark.parametrize(
    "reply, official, readable",
    [
        ("It is right. Rating: 5", (5,), (5,)),
        ("RATING: 6, very informative", (6,), (6,)),
        ("rating: 0, not informative, with hallucination", (0,), (0,)),
        ("Rating: 3. I repeat: Rating: 3", (3,), (3,)),
        ("Not Rating: 5 but Rating: 2", (0,), None),
        ("I would give it a five.", (0,), None),
        ("Rating 5", (0,), None),
        ("", (0,), None),
        ("Rating: 10", (1,), (1,)),
    ],
)
def test_mmhal_parse(reply, official, readable):
    assert mmhal.official(reply) == official and mmhal.readable(reply) == readable


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the official question files are not here")
def test_mmhal_on_the_official_template(tmp_path, capsys):
    """Replies with no, one and two ratings: every figure is that of the restated rule."""
    path = OFFICIAL / "mmhal_response_template.json"
    questions = mmhal.read(path)
    assert len(questions) == 96 and not mmhal.remarks(questions)
    rng = random.Random(3)
    forms = ("Good. Rating: {}", "No number", "Rating: {} or Rating: {}", "rating: {}\nRating: {}")
    contents = [rng.choice(forms).format(rng.randrange(7), rng.randrange(7)) for _ in range(96)]
    assert {bool(mmhal.readable(c)) for c in contents} == {True, False}
    rows = [{"choices": [{"message": {"role": "assistant", "content": c}}]} for c in contents]
    reviews = write(tmp_path / "gpt4.json", rows)
    main("--questions", path, "--reviews", reviews, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for key, value in official_mmhal(contents).items():
        assert found[key] == pytest.approx(value, abs=1e-12), key
    assert found["unreadable"] == sum(mmhal.readable(c) is None for c in contents)
    details = json.loads((tmp_path / "out" / "details.json").read_text())["gpt4"]
    assert details["intervals"]["score"]["value"] == found["score"]
    assert details["readable"]["score"] > found["score"]
    assert str(reviews) in found["judge"] and "date unknown" in capsys.readouterr().out


def test_mmhal_request_holds_what_the_judge_needs(template):
    q = mmhal.read(template)[0]
    (request,) = mmhal.requests(q, ("It is {red}.",))
    end = request.text[request.text.index("### Image Contents") :]
    parts = ["Image Contents\nMug, Table", "Question\nWhat is 0?"]
    parts += ["Standard Human-Generated Answer\nA mug.", "LMM Response to Evaluate\nIt is {red}."]
    assert end.split("\n\n") == [f"### {part}" for part in parts[:-1]] + [f"### {parts[-1]}\n"]
    for rating in range(7):
        assert f"Rating: {rating}" in request.text


def test_mmhal_filled_template(template, tmp_path):
    """Written and read back; an answer belongs to its picture and question, whatever the order."""
    questions = mmhal.read(template)
    said = [(f"answer {i}",) for i in range(4)]
    mmhal.write_answers(tmp_path, questions, said, "m")
    filled = json.loads((tmp_path / "mmhal.json").read_text())
    assert filled == [hal_row(i, model_answer=f"answer {i}") for i in range(4)]
    write(tmp_path / "mixed.json", filled[::-1])
    assert mmhal.read_answers(tmp_path / "mixed.json", questions) == said
    with pytest.raises(BadInput, match="every `model_answer` is empty"):
        mmhal.read_answers(template, questions)
    write(tmp_path / "short.json", filled[:3])
    with pytest.raises(BadInput, match=r"3 answers to 4 questions.*3.png.*has none"):
        mmhal.read_answers(tmp_path / "short.json", questions)
    write(tmp_path / "twice.json", [*filled, filled[0]])
    with pytest.raises(BadInput, match="has two answers"):
        mmhal.read_answers(tmp_path / "twice.json", questions)


# ---- LLaVA-Bench


def official_pair(review):
    """parse_score of LLaVA's eval_gpt_review_bench.py, restated."""
    parts = review.split("\n")[0].replace(",", " ").split(" ")
    if len(parts) != 2:
        return [-1, -1]
    try:
        return [float(part) for part in parts]
    except ValueError:
        return [-1, -1]


REVIEWS = [
    ("8 7\nBoth fine.", (8, 7), (8, 7)),
    ("8, 7\nBoth fine.", (-1, -1), (8, 7)),
    ("8,7", (8, 7), (8, 7)),
    ("8.5 7.0", (8.5, 7), (8.5, 7)),
    ("8  7", (-1, -1), (8, 7)),
    ("8 7 ", (-1, -1), (8, 7)),
    ("Scores: 8 7", (-1, -1), None),
    ("8 good", (-1, -1), None),
    ("8", (-1, -1), None),
    ("", (-1, -1), None),
    ("8/10 7/10", (-1, -1), None),
    ("nan 7", (-1, -1), None),
]


@pytest.mark.parametrize("review, official, readable", REVIEWS)
def test_llava_bench_parse(review, official, readable):
    assert (
        llava_bench.official(review) == official == tuple(official_pair(review)) or "nan" in review
    )
    assert llava_bench.readable(review) == readable


def wild_files(folder, n=6):
    """Questions, context and references of a small LLaVA-Bench."""
    kinds = llava_bench.CATEGORIES
    rows = [
        {"question_id": i, "image": f"{i % 4}.png", "text": f"Q{i}?", "category": kinds[i % 3]}
        for i in range(n)
    ]
    context = [
        {"id": str(i), "image": f"{i}.png", "caption": "A harbour at dusk."} for i in range(4)
    ]
    references = [{"question_id": i, "text": f"reference {i}", "answer_id": "g"} for i in range(n)]
    return (
        "--questions", write(folder / "questions.jsonl", rows),
        "--context", write(folder / "context.jsonl", context),
        "--references", write(folder / "gpt4.jsonl", references),
    )  # fmt: skip


def test_llava_bench_against_the_summary(tmp_path, capsys):
    """The figures of summarize_gpt_review.py, restated: round the means, then their ratio."""
    flags = wild_files(tmp_path, len(REVIEWS))
    rows, scores = [], defaultdict(list)
    for i, (content, _, _) in enumerate(REVIEWS[:-1] + [("9 3", 0, 0)]):
        kind = llava_bench.CATEGORIES[i % 3]
        rows.append({"question_id": i, "category": f"llava_bench_{kind}", "content": content})
        rows[-1]["tuple"] = official_pair(content)
        for key in (kind, ""):
            scores[key].append(rows[-1]["tuple"])
    reviews = write(tmp_path / "reviews.jsonl", rows[::-1])
    main(*flags, "--reviews", reviews, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for key, pairs in scores.items():
        first, second = (round(x, 3) for x in np.asarray(pairs).mean(0).tolist())
        prefix = f"{key} " if key else ""
        assert round(found[f"{prefix}relative"], 1) == round(second / first * 100, 1)
        assert round(found[f"{prefix}model"], 1) == round(second * 10, 1)
    details = json.loads((tmp_path / "out" / "details.json").read_text())
    pairs = [pair for _, _, pair in REVIEWS if pair] + [(9, 3)]
    first, second = (round(x, 3) for x in np.asarray(pairs).mean(0).tolist())
    assert details["reviews"]["readable"]["relative"] == pytest.approx(100 * second / first)
    assert "5 of 12 replies unreadable" in capsys.readouterr().out


def test_llava_bench_request(tmp_path):
    flags = wild_files(tmp_path)
    questions = llava_bench.read(flags[1], flags[3], flags[5])
    (request,) = llava_bench.requests(questions[1], ("a boat",))
    begin = (
        "[Context]\nA harbour at dusk.\n\n[Question]\nQ1?\n\n[Assistant 1]\nreference 1\n\n"
        "[End of Assistant 1]\n\n[Assistant 2]\na boat\n\n[End of Assistant 2]\n\n[System]\n"
    )
    assert request.text.startswith(begin) and "boxes" not in request.text
    assert [text for _, text in request.said] == ["reference 1", "a boat"]


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the official question files are not here")
def test_llava_bench_coco_files():
    names = ("questions", "context", "gpt4_answers")
    questions = llava_bench.read(*(OFFICIAL / f"llava_bench_coco_{n}.jsonl" for n in names))
    assert len(questions) == 90 and not llava_bench.remarks(questions)
    text = llava_bench.requests(questions[0], ("x",))[0].text
    assert "\n\nsuitcase: [" in text and "boxes" in text and "black and brown" in text


def test_llava_bench_figures_by_hand():
    """Two questions of one group, scores (8, 5) and (7, 4): means 7.5 and 4.5 of 10, the answer has 60 % of the reference."""
    found = llava_bench.figures(np.array([[15.0, 9.0, 2.0], [0.0, 0.0, 0.0]]), ["all", "conv"])
    assert {key: float(value) for key, value in found.items()} == {
        "relative": 60, "reference": 75, "model": 45, "conv relative": 0, "conv reference": 0, "conv model": 0,
    }  # fmt: skip


# ---- MM-Vet


def vet_files(folder):
    """mm-vet.json of four questions, and its answers."""
    needs = (["ocr", "math"], ["rec"], ["rec", "gen"], ["math", "ocr"])
    questions = {
        f"v1_{i}": {
            "imagename": f"{i}.png",
            "question": f"Q{i}?",
            "answer": "3<OR>three<AND>x",
            "capability": c,
        }
        for i, c in enumerate(needs)
    }
    answers = {f"v1_{i}": f"answer {i}" for i in range(4)}
    return write(folder / "mm-vet.json", questions), write(folder / "m.json", answers)


@pytest.mark.parametrize(
    "reply, want",
    [
        ("0.5", 0.5), ("1.0 because", 1.0), ("1", 1.0), ("0", 0.0), (" 0.5", None), ("0.7\n", 0.7),
        ("1.5", None), ("-0.1", None), ("nan", None), ("good", None), ("", None), ("0.5,", None),
    ],
)  # fmt: skip
def test_mm_vet_parse(reply, want):
    assert mm_vet.readable(reply) == (None if want is None else (want,))
    assert mm_vet.official(reply) == (want or 0.0,)


def test_mm_vet_per_capability(tmp_path):
    """By hand: 0.4, 1, 0, unreadable (0); two runs."""
    questions, _ = vet_files(tmp_path)
    contents = {"v1_3": ["bad", "1.0"], "v1_0": ["0.4", "0.4"], "v1_1": ["1.0", "0.0"]}
    contents["v1_2"] = ["0.0", "0.6"]
    grades = {key: {"model": ["g"] * 2, "content": c, "score": []} for key, c in contents.items()}
    reviews = write(tmp_path / "grades.json", grades)
    main("--questions", questions, "--reviews", reviews, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    want = {
        "total": 100 * (0.4 + 0.5 + 0.3 + 0.5) / 4,
        "ocr": 100 * (0.4 + 0.5) / 2,
        "math": 100 * (0.4 + 0.5) / 2,
        "rec": 100 * (0.5 + 0.3) / 2,
        "gen": 30,
        "math_ocr only": 45,
        "rec only": 50,
        "gen_rec only": 30,
    }
    assert {k: found[k] for k in want} == pytest.approx(want)
    details = json.loads((tmp_path / "out" / "details.json").read_text())
    assert details["grades"]["runs"] == pytest.approx([35, 50])


def test_mm_vet_request_is_the_last_row(tmp_path):
    q = mm_vet.read(vet_files(tmp_path)[0])[0]
    text = mm_vet.requests(q, ("It is 3",))[0].text
    assert text.splitlines()[-1] == "Q0? | 3 <OR> three <AND> x | It is 3 | "
    assert text.startswith(mm_vet.PROMPT)


def test_mm_vet_unreadable_is_asked_again(tmp_path, pictures, monkeypatch):
    """With the cue, at the official temperatures; five times in all, then it is 0."""
    questions, answers = vet_files(tmp_path)
    seen = []

    def ask(items, temperature, answered):
        for place, (q, request, _) in enumerate(items):
            seen.append((q.id, temperature, request.text.endswith(mm_vet.CUE)))
            tried = sum(key == q.id for key, *_ in seen)
            said = {"v1_0": "0.5", "v1_1": "good" if tried < 3 else "1.0"}
            yield judge.Reply(place, said.get(q.id, "?"))

    monkeypatch.setattr(eval_judge, "make_judge", lambda *a: eval_judge.Judge("j", ask))
    flags = ("--questions", questions, "--answers", answers, "--out", tmp_path / "out")
    main(*flags)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["total"] == pytest.approx(37.5) and found["unreadable"] == 2
    assert [s[1:] for s in seen if s[0] == "v1_0"] == [(0.0, False)]
    assert [s[1:] for s in seen if s[0] == "v1_1"] == [(0.0, False), (0.0, True), (0.5, True)]
    of_last = [s[1] for s in seen if s[0] == "v1_2"]
    assert of_last == [0.0, 0.0, 0.5, 1.0, 1.5]
    seen.clear()
    main(*flags)
    assert not seen, "what has its reply is not asked again"


# ---- MT-Bench


def mt_files(folder, kinds=("writing", "math", "stem")):
    rows = [
        {"question_id": 81 + i, "category": k, "turns": [f"Q{i}?", f"And {i}?"]}
        for i, k in enumerate(kinds)
    ]
    answer = lambda i, who: {
        "question_id": 81 + i,
        "answer_id": "a",
        "model_id": who,
        "choices": [{"index": 0, "turns": [f"{who} {i} one", f"{who} {i} two"]}],
        "tstamp": 1.0,
    }
    n = range(len(kinds))
    return (
        write(folder / "question.jsonl", rows),
        write(folder / "gpt-4.jsonl", [answer(i, "gpt-4") for i in n]),
        write(folder / "vicuna.jsonl", [answer(i, "vicuna") for i in n]),
    )


def official_rating(judgment):
    """run_judge_single of FastChat's common.py, restated."""
    match = re.search(r"\[\[(\d+\.?\d*)\]\]", judgment) or re.search(r"\[(\d+\.?\d*)\]", judgment)
    return ast.literal_eval(match.groups()[0]) if match else -1


@pytest.mark.parametrize(
    "reply",
    [
        "Rating: [[7]]",
        "[[7.5]]",
        "[6]",
        "I say [3], so [[9]] and [[2]]",
        "Rating: 7",
        "",
        "[[x]]",
        "[[10]]",
    ],
)
def test_mt_bench_parse(reply):
    found = mt_bench.official(reply)
    assert (found[0] if found else -1) == official_rating(reply)


def test_the_days_of_the_judging():
    """One day, or the first to the last."""
    rows = [{"judge": "j", "date": f"2026-01-0{day}"} for day in (2, 3, 1, 2)]
    of = lambda some: eval_judge.by_whom(some)["date"]
    assert of(rows) == "2026-01-01 to 2026-01-03" and of(rows[::3]) == "2026-01-02"
    assert of(rows[:2]) == "2026-01-02 to 2026-01-03"


def test_mt_bench_score_leaves_out_what_has_none(tmp_path):
    """show_result.py: -1 rows dropped, means over both turns, over turn 1, over turn 2."""
    questions, references, _ = mt_files(tmp_path)
    texts = {81: ("[[8]]", "[[5]]"), 82: ("none", "[[2]]"), 83: ("[[6.5]]", "[[1]]")}
    rows = [
        {"question_id": i, "model": "m", "judge": ["g", "single-v1"], "judgment": t, "turn": n}
        for i, pair in texts.items()
        for n, t in enumerate(pair, 1)
    ]
    random.Random(0).shuffle(rows)
    reviews = write(tmp_path / "gpt-4_single.jsonl", rows)
    flags = ("--questions", questions, "--references", references)
    main(*flags, "--reviews", reviews, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    want = {"score": 22.5 / 5, "turn 1": 14.5 / 2, "turn 2": 8 / 3, "writing": 6.5, "math": 2}
    assert {k: found[k] for k in want} == pytest.approx(want)
    assert found["unreadable"] == 1


def test_mt_bench_requests(tmp_path):
    questions, references, answers = mt_files(tmp_path)
    plain, maths, _ = mt_bench.read(questions, references=references)
    first, second = mt_bench.requests(plain, ("one", "two"))
    assert first.text.endswith(
        "[Question]\nQ0?\n\n[Start of Assistant's Answer]\none\n[End of Assistant's Answer]"
    )
    assert (
        "### User:\nQ0?\n\n### Assistant:\none\n\n### User:\nAnd 0?\n\n### Assistant:\ntwo"
        in second.text
    )
    assert "second question" in second.text and "eference" not in first.text + second.text
    first, second = mt_bench.requests(maths, ("one", "two"))
    assert "[Start of Reference Answer]\ngpt-4 1 one\n" in first.text
    assert "### Reference answer:\ngpt-4 1 two" in second.text
    assert second.said == ((("Q1?", "one", "And 1?"), "two"),)
    for request in (first, second):
        assert mt_bench.AGAINST_REFERENCE in request.text and mt_bench.GENERAL not in request.text
    for request in mt_bench.requests(plain, ("one", "two")):
        assert mt_bench.GENERAL in request.text
    with pytest.raises(BadInput, match=r"math, reasoning, coding are judged beside a reference"):
        mt_bench.read(questions)


def test_mt_bench_is_asked_turn_by_turn(tmp_path):
    """The second turn follows the model's own first answer, at the temperature of its category."""
    path, references, _ = mt_files(tmp_path, ("writing", "math", "stem", "other"))
    questions = mt_bench.read(path, references=references)
    asked = []

    def server(max_new_tokens, temperature):
        def ask(items):
            for place, (record, _) in enumerate(items):
                asked.append((record.turns, temperature))
                yield judge.Reply(place, f"answer to {record.turns[-1]}")

        return ask

    contestant = evaluation.Contestant("m", server=server)
    shown = eval_judge.read_records(mt_bench, questions, tmp_path)
    said = eval_judge.ask(mt_bench, contestant, questions, shown, None, 9)
    assert said == [(f"answer to Q{i}?", f"answer to And {i}?") for i in range(4)]
    at = {turns: t for turns, t in asked}
    for i, t in enumerate((0.7, 0.0, 0.1, 0.7)):
        assert at[f"Q{i}?",] == t and at[f"Q{i}?", f"answer to Q{i}?", f"And {i}?"] == t


# ---- AlpacaEval


def alpaca_files(folder, n=4):
    rows = [
        {"instruction": f"Name {i}.", "output": f"base {i}", "generator": "davinci", "dataset": "d"}
        for i in range(n)
    ]
    own = [row | {"output": f"model {i}", "generator": "m"} for i, row in enumerate(rows)]
    return write(folder / "alpaca_eval.json", rows), write(folder / "m.json", own[::-1])


def test_alpaca_eval_win_rate(tmp_path):
    """metrics/helpers.py: 0 is a draw, null is left out; discrete: a draw is half a win."""
    questions, _ = alpaca_files(tmp_path, 6)
    preferences = [1, 2, 1.62, 0, None, 1.5]
    rows = [
        {"instruction": f"Name {i}.", "output_1": "", "output_2": "", "preference": p}
        for i, p in enumerate(preferences)
    ]
    reviews = write(tmp_path / "annotations.json", rows)
    main("--questions", questions, "--reviews", reviews, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["win_rate"] == pytest.approx(100 * (0 + 1 + 0.62 + 0.5 + 0.5) / 5)
    assert found["discrete_win_rate"] == pytest.approx(100 * (0 + 1 + 1 + 0.5 + 0.5) / 5)
    assert found["unreadable"] == 1


def test_alpaca_eval_asks_in_both_orders(tmp_path):
    questions, answers = alpaca_files(tmp_path)
    q = alpaca_eval.read(questions)[0]
    first, second = alpaca_eval.requests(q, ("model 0",))
    assert "Response 1:\nbase 0\n\nResponse 2:\nmodel 0\n" in first.text
    assert "Response 1:\nmodel 0\n\nResponse 2:\nbase 0\n" in second.text
    rule = alpaca_eval.official
    assert rule("Better: 2", first.part) == (1,) and rule("Better: 2", second.part) == (0,)
    assert rule("Better: equal\nSame.", first.part) == (0.5,) and rule("Both", first.part) is None
    assert alpaca_eval.values(q, [(1.0,), (0.0,)]) == [0.5, 0.5, 1], "the first place won twice"
    assert alpaca_eval.values(q, [(1.0,), (0.5,)]) == [0.75, 1, 1]
    assert alpaca_eval.values(q, [(1.0,), None]) == [0, 0, 0]


# ---- any benchmark


def test_the_file_says_which_benchmark_it_is(tmp_path, template):
    assert eval_judge.benchmark_of(template) is mmhal
    assert eval_judge.benchmark_of(wild_files(tmp_path)[1]) is llava_bench
    assert eval_judge.benchmark_of(vet_files(tmp_path)[0]) is mm_vet
    assert eval_judge.benchmark_of(mt_files(tmp_path)[0]) is mt_bench
    assert eval_judge.benchmark_of(alpaca_files(tmp_path)[0]) is alpaca_eval
    for text in ("", "[]", "{}", '{"a": 1}', "[1]", "plain"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(BadInput, match=r"keys of no benchmark: MMHal-Bench \(image_src"):
            eval_judge.benchmark_of(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(BadInput, match="x.json: not readable .*Unicode"):
        eval_judge.benchmark_of(tmp_path / "x.json")


@pytest.mark.parametrize("bench", list(eval_judge.TITLES), ids=eval_judge.TITLES.get)
def test_no_division_by_zero(bench):
    """Nothing readable, or scores of 0: every figure is a finite number."""
    for V in (2, 3, 4):
        for value in (0.0, -1.0):
            try:
                with np.errstate(all="raise"):
                    found = bench.figures(np.full((2, V), value), ["all", "conv"])
            except ValueError:
                continue  # another V
            assert np.isfinite(list(found.values())).all()
            break


def test_by_whom_and_when():
    row = lambda date, **more: {"judge": "j", "date": date} | more
    assert eval_judge.by_whom([row("2")]) == {"judge": "j", "served": None, "date": "2"}
    found = eval_judge.by_whom([row("3", served="s"), row("1"), row("2"), row("3")])
    assert found == {"judge": "j", "served": "s", "date": "1 to 3"}


def test_the_total_of_each_run():
    """MM-Vet's, if it was judged more than once; no other benchmark's."""
    about = {"reference": "r"}
    questions = [Question(i, "w", f"{i}.jpg", ("?",), ("g", "g only"), about) for i in "ab"]
    replies = [[("1.0", ""), ("0.5", "")], [("0.0", ""), ("x", "")]]
    runs = lambda bench, some: eval_judge.totals_of_runs(bench, questions, some)
    assert runs(mm_vet, replies) == pytest.approx([50, 25])
    assert runs(mm_vet, [of[:1] for of in replies]) is None
    assert runs(alpaca_eval, replies) is None


def test_each_reply_is_read_as_its_part():
    """AlpacaEval's orders: the same words mean the opposite."""
    replies = [[("Better: 2", "baseline first"), ("Better: 2", "baseline second")]]
    assert eval_judge.scores_of(alpaca_eval.official, replies) == [[(1.0,), (0.0,)]]


def test_questions_about_one_picture_are_one_unit():
    """By hand: two about a, in groups x and y; one about b, in x; two without a picture."""
    asked = [("a", "x"), ("b", "x"), ("a", "y"), (None, "y"), (None, "y")]
    questions = [Question(n, "", image, ("?",), (g,)) for n, (image, g) in enumerate(asked)]
    units, names = in_groups(questions, [[1, 1], [2, 1], [3, 1], [4, 1], [5, 1]])
    assert names == ["all", "x", "y"]
    want = [[[4, 2], [1, 1], [3, 1]], [[2, 1], [2, 1], [0, 0]]]
    want += [[[4, 1], [0, 0], [4, 1]], [[5, 1], [0, 0], [5, 1]]]
    assert units.tolist() == want


def test_what_is_written_is_read_back(tmp_path, template):
    """Answers and reviews in the official layouts."""
    wild = wild_files(tmp_path)
    (tmp_path / "mm").mkdir(), (tmp_path / "mt").mkdir(), (tmp_path / "al").mkdir()
    vet, mt, alpaca = (
        vet_files(tmp_path / "mm")[0], mt_files(tmp_path / "mt"), alpaca_files(tmp_path / "al")[0],
    )  # fmt: skip
    for bench, questions in (
        (mmhal, mmhal.read(template)),
        (llava_bench, llava_bench.read(*wild[1::2])),
        (mm_vet, mm_vet.read(vet)),
        (mt_bench, mt_bench.read(mt[0], references=mt[1])),
        (alpaca_eval, alpaca_eval.read(alpaca)),
    ):
        folder = tmp_path / bench.__name__
        folder.mkdir()
        said = [tuple(f"{i} of {t}" for t in q.turns) for i, q in enumerate(questions)]
        bench.write_answers(folder, questions, said, "m")
        (file,) = folder.iterdir()
        assert bench.read_answers(file, questions) == said
        replies = [["Better: 2" for _ in bench.requests(q, a)] for q, a in zip(questions, said)]
        if bench is alpaca_eval:
            replies = [["Better: 2", "Better: 1"] for _ in questions]
        bench.write_reviews(folder, questions, replies, "m", "j")
        (file,) = folder.glob("*_reviews*")
        back = bench.read_reviews(file, questions)
        assert back == ([["2.0"]] * 4 if bench is alpaca_eval else replies)


# ---- a judge


class Server:
    """An OpenAI-compatible server on this machine. reply: function (body) -> (status, text, model)."""

    def __init__(self, reply):
        self.bodies = bodies = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                bodies.append(body)
                status, text, model = reply(body)
                answer = {"model": model, "choices": [{"message": {"content": text}}]}
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve():
    """A function that starts a Server."""
    running = []

    def start(reply):
        running.append(Server(reply))
        return running[-1]

    yield start
    for server in running:
        server.close()


def judge_flags(server, name="gpt-x"):
    return (
        "--annotator",
        "endpoint",
        "--judge-url",
        server.url,
        "--judge-model",
        name,
        "--judge-workers",
        1,
    )


@pytest.fixture
def filled(template, tmp_path):
    """A filled template."""
    return write(
        tmp_path / "filled.json", [hal_row(i, model_answer=f"answer {i}") for i in range(4)]
    )


def test_a_judge_that_fails_in_the_middle_is_resumed(template, filled, serve, tmp_path, capsys):
    """What was judged is kept, also after the failure; nothing is paid twice; at last nobody is asked."""
    failing = [True]

    def reply(body):
        n = body["messages"][0]["content"][0]["text"].rsplit("answer ", 1)[1].strip()
        if n == "2" and failing[0]:
            return 401, "", "m"
        return 200, f"Rating: {n}", "gpt-x-0613"

    server = serve(reply)
    flags = ("--questions", template, "--answers", filled, "--out", tmp_path / "out")
    with pytest.raises(BadInput, match="status 401.*the same command goes on from here"):
        main(*flags, *judge_flags(server))
    kept = (tmp_path / "out" / "reviews.jsonl").read_text().splitlines()
    assert len(kept) == len(server.bodies) - 1 >= 2
    with pytest.raises(BadInput, match=f"holds {len(kept)} of 4 replies; --annotator is needed"):
        main(*flags)

    with open(tmp_path / "out" / "reviews.jsonl", "a") as file:
        file.write('{"image": nu')  # killed inside a line
    failing[0] = False
    server.bodies.clear()
    main(*flags, *judge_flags(server))
    assert len(server.bodies) == 4 - len(kept)
    assert "image_url" not in json.dumps(server.bodies)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["score"] == 1.5 and found["hallucination_rate"] == 0.75
    assert found["judge"] == "gpt-x" and found["served"] == "gpt-x-0613"
    assert found["date"] == time.strftime("%Y-%m-%d")
    assert found["characters"] == 8
    assert "judge gpt-x (gpt-x-0613), 20" in capsys.readouterr().out

    server.bodies.clear()
    main(*flags)
    assert not server.bodies
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == found


def test_a_question_that_the_judge_refuses(template, filled, serve, tmp_path, capsys):
    """It is unreadable, told and not kept: the same command asks it again. Not so if all are."""
    refuses = [str, "2".__eq__]  # at first all
    words = "content management policy"

    def reply(body):
        n = body["messages"][0]["content"][0]["text"].rsplit("answer ", 1)[1].strip()
        return (400 if refuses and refuses[0](n) else 200), f"Rating: 6 {words}", "m"

    server = serve(reply)
    flags = ("--questions", template, "--answers", filled, "--out", tmp_path / "out")
    with pytest.raises(judge.NoAnswer, match=f"status 400 .*{words}.*the same command goes on"):
        main(*flags, *judge_flags(server))
    figures = lambda: json.loads((tmp_path / "out" / "metrics.json").read_text())
    for unreadable, asked in ((1, 4), (1, 1), (0, 1)):
        refuses.pop(0) if len(refuses) > 1 or not unreadable else None
        server.bodies.clear()
        main(*flags, *judge_flags(server))
        assert figures()["unreadable"] == unreadable and len(server.bodies) == asked
        told = capsys.readouterr().err
        assert unreadable == told.count("the judge refuses it: status 400")
    assert len((tmp_path / "out" / "reviews.jsonl").read_text().splitlines()) == 4


def test_two_judges_are_not_mixed(template, filled, serve, tmp_path):
    """Neither another name on the command line, nor another name that the server tells."""
    served, n = ["a-1"], [0]

    def reply(body):
        n[0] += 1
        return (200, "Rating: 4", served[0]) if n[0] != 3 else (401, "", "")

    server = serve(reply)
    flags = ("--questions", template, "--answers", filled, "--out", tmp_path / "out")
    with pytest.raises(BadInput, match="status 401"):
        main(*flags, *judge_flags(server))
    kept = (tmp_path / "out" / "reviews.jsonl").read_text()
    with pytest.raises(BadInput, match="replies of the judge 'gpt-x' .* and of 'gpt-y' \\(here\\)"):
        main(*flags, *judge_flags(server, "gpt-y"))
    served[0] = "a-2"
    with pytest.raises(BadInput, match="served as 'a-1' and as 'a-2'; .* another --out"):
        main(*flags, *judge_flags(server))
    assert (tmp_path / "out" / "reviews.jsonl").read_text() == kept
    served[0] = "a-1"
    main(*flags, *judge_flags(server))


def test_the_image_is_shown_where_asked(template, filled, serve, pictures, tmp_path):
    """MMHALBench-V; its replies are no replies of the judge without pictures."""
    server = serve(lambda body: (200, "Rating: 6", "m"))
    flags = ("--questions", template, "--answers", filled, "--images", pictures)
    main(*flags, "--out", tmp_path / "out", "--judge-sees-image", *judge_flags(server))
    kinds = [[part["type"] for part in b["messages"][0]["content"]] for b in server.bodies]
    assert kinds == [["image_url", "text"]] * 4
    with pytest.raises(BadInput, match="holds 0 of 4 replies"):
        main(*flags, "--out", tmp_path / "out")
    (pictures / "3.png").unlink()
    with pytest.raises(BadInput, match="row 3: image .*3.png' is not below --images"):
        main(*flags, "--out", tmp_path / "v", "--judge-sees-image", *judge_flags(server))


def test_how_a_server_is_asked(serve, tmp_path):
    """Temperature of the official script, and room to think before a score of three tokens."""
    server = serve(lambda body: (200, "8 7", "m"))
    answers = [{"question_id": i, "text": f"a {i}"} for i in range(6)]
    flags = (*wild_files(tmp_path), "--answers", write(tmp_path / "a.jsonl", answers))
    main(*flags, "--out", tmp_path / "wild", *judge_flags(server))
    assert {(b["temperature"], b["max_tokens"], b["model"]) for b in server.bodies} == {
        (0.2, 1024, "gpt-x")
    }
    server.bodies.clear()
    questions, answers = vet_files(tmp_path)
    flags = ("--questions", questions, "--answers", answers, "--out", tmp_path / "vet")
    main(*flags, *judge_flags(server))
    asked = {(b["temperature"], b["max_tokens"]) for b in server.bodies}
    assert asked == {(t, 1024) for t in (0.0, 0.5, 1.0, 1.5)}


def test_another_answer_is_judged_anew(template, filled, serve, tmp_path):
    """A folder that was begun with other answers is refused."""
    server = serve(lambda body: (200, "Rating: 6", "m"))
    flags = ("--questions", template, "--out", tmp_path / "out", *judge_flags(server))
    main(*flags, "--answers", filled)
    other = write(tmp_path / "filled.json", [hal_row(i, model_answer="x") for i in range(4)])
    with pytest.raises(BadInput, match="it was begun with contestants, filled"):
        main(*flags, "--answers", other)


def test_contestants_side_by_side(template, filled, serve, pictures, tmp_path, capsys):
    other = write(tmp_path / "other.json", [hal_row(i, model_answer="worse") for i in range(4)])

    def reply(body):
        worse = body["messages"][0]["content"][0]["text"].endswith("worse\n")
        return 200, f"Rating: {2 if worse else 5}", "m"

    flags = ("--questions", template, "--answers", filled, other, "--images", pictures)
    main(*flags, "--out", tmp_path / "out", *judge_flags(serve(reply)))
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["filled"]["score"] == 5 and found["other"]["score"] == 2
    details = json.loads((tmp_path / "out" / "details.json").read_text())
    assert details["other"]["intervals"]["score"]["difference"] == -3
    out = capsys.readouterr().out
    assert "changed-other.png: filled against other, 4 scores" in out and "minus filled" in out
    assert (tmp_path / "out" / "changed-other.png").is_file()


def test_a_checkpoint_as_contestant_and_as_judge(template, pictures, checkpoint, tmp_path, capsys):
    """Random weights give no rating; it runs to its end, in two steps, without a server."""
    flags = (
        "--questions",
        template,
        "--images",
        pictures,
        "--model",
        checkpoint,
        "--device",
        "cpu",
    )
    flags += ("--out", tmp_path / "out", "--max-new-tokens", 4)
    main(*flags)
    assert "the same command with --annotator judges them" in capsys.readouterr().out
    assert (tmp_path / "out" / "mmhal.json").is_file()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmhal, "PROMPT", "{} {} {} {}")
        patch.setattr(mmhal, "MAX_TOKENS", 4)
        main(*flags, "--annotator", checkpoint)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["unreadable"] == 4 and found["score"] == 0 and found["hallucination_rate"] == 1
    assert found["judge"] == str(checkpoint) and found["served"].startswith("files ")


@pytest.mark.parametrize(
    "words, message",
    [
        ("--reviews r --answers a", "--reviews scores a judge's file"),
        ("--answers a", "--answers needs --out"),
        ("--answers a --out {out} --judge-url http://x", "--judge-url is for --annotator endpoint"),
        ("--answers a --out {out} --annotator endpoint", "needs --judge-url"),
        ("--answers a --out {out} --judge-runs 2", "--judge-runs is for MM-Vet"),
        ("--model m", "--model and --out are needed"),
    ],
)
def test_flags_that_do_not_go_together(words, message, template, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(BadInput, match=re.escape(message)):
        main("--questions", template, *words.format(out=tmp_path / "out").split())


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"question": ""}, "row 1: `question` is ''; a text is needed"),
        ({"image_content": "Mug"}, "row 1: `image_content` is 'Mug'; a list of names"),
        ({"gt_answer": None}, "row 1: `gt_answer` is None"),
        ({"image_src": "x/0.png", "question": "What is 0?"}, "row 1: the id .* stands in .*row 0"),
    ],
)
def test_a_bad_question(tmp_path, changed, message):
    rows = [hal_row(0, image_src="x/0.png"), hal_row(1, **changed)]
    with pytest.raises(BadInput, match=message):
        mmhal.read(write(tmp_path / "t.json", rows))


def test_half_written_and_strange_files(tmp_path, template):
    """Named by file and line or row; nothing is guessed."""
    flags = wild_files(tmp_path)
    questions = llava_bench.read(*flags[1::2])
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"question_id": i, "text": f"a {i}"}) for i in range(6)]
    path.write_text("\n".join(lines)[:-9])
    with pytest.raises(BadInput, match="a.jsonl, row 5: line 6: not valid JSON"):
        llava_bench.read_answers(path, questions)
    path.write_text("\n".join(lines[:5]))
    with pytest.raises(BadInput, match="5 answers to 6 questions, .*: 5 has none"):
        llava_bench.read_answers(path, questions)
    path.write_text("\n".join([*lines, lines[0].replace("0", "60")]))
    with pytest.raises(BadInput, match="60 is none of the questions"):
        llava_bench.read_answers(path, questions)
    path.write_bytes(lines[0].encode() + b'\n{"question_id": 1, "text": "\xff"}')
    with pytest.raises(BadInput, match="a.jsonl: not a text file"):
        llava_bench.read_answers(path, questions)
    path.write_text('["a"]')
    with pytest.raises(BadInput, match="a.jsonl, row 0: 'a'; an object is needed"):
        llava_bench.read_answers(path, questions)
    (tmp_path / "n.json").write_text('{"v1_0": 3}')
    with pytest.raises(BadInput, match="n.json, v1_0: `v1_0` is 3; a text is needed"):
        mm_vet.read_answers(tmp_path / "n.json", mm_vet.read(vet_files(tmp_path)[0]))
    with pytest.raises(BadInput, match="needs --context .* and --references"):
        llava_bench.read(flags[1])


def test_nothing_said_is_judged_too(serve, tmp_path, capsys):
    """An empty first answer is part of the second turn's dialogue; a judge that declines is unreadable."""
    path, references, _ = mt_files(tmp_path, ("stem", "writing"))
    server = serve(lambda body: (200, None, "m"))
    flags = ("--questions", path, "--endpoint", server.url, "--endpoint-model", "m")
    main(*flags, "--out", tmp_path / "out", *judge_flags(server))
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["score"] == 0 and found["unreadable"] == 4 and found["characters"] == 0
    assert "m: 4 of 4 replies unreadable; nothing is left" in capsys.readouterr().out


def test_a_model_that_says_nothing_is_asked_on(tmp_path, llava, monkeypatch):
    """Its second question follows its empty answer."""
    model, processor = llava
    path, _, _ = mt_files(tmp_path, ("extraction",))
    questions = mt_bench.read(path)
    monkeypatch.setattr(type(processor), "text", lambda self, ids: "")
    contestant = evaluation.in_memory(model, processor)
    shown = eval_judge.read_records(mt_bench, questions, tmp_path)
    assert eval_judge.ask(mt_bench, contestant, questions, shown, None, 3) == [("", "")]


def test_a_missing_picture_is_named(template, pictures, checkpoint, tmp_path):
    (pictures / "2.png").unlink()
    flags = ("--questions", template, "--images", pictures, "--model", checkpoint)
    with pytest.raises(BadInput, match="template.json, row 2: image .*2.png"):
        main(*flags, "--out", tmp_path / "out", "--device", "cpu")


# ---- the toy world's truth


@pytest.mark.parametrize(
    "bench, grades, want",
    [
        (mmhal, [(1.0, 0)], (6,)),
        (mmhal, [(0.0, 0)], (3,)),
        (mmhal, [(1.0, 2)], (2,)),
        (mmhal, [(0.0, 1)], (0,)),
        (llava_bench, [(1.0, 0), (0.5, 0)], (10, 5)),  # round(4.5) is 4
        (mm_vet, [(1.0, 1)], (0.5,)),
        (mt_bench, [(1.0, 0)], (10,)),
        (alpaca_eval, [(0.2, 0), (0.9, 1)], (0,)),
        (alpaca_eval, [(0.2, 0), (0.9, 0)], (1,)),
        (alpaca_eval, [(0.2, 0), (0.2, 0)], (0.5,)),
    ],
)
def test_in_words(bench, grades, want):
    """What a judge that knows the truth says is read back by the official rule."""
    part = alpaca_eval.ORDERS[0] if bench is alpaca_eval else ""
    assert bench.official(bench.in_words(grades), part) == want


def test_the_truth_judges(template, pictures, tmp_path):
    """Answers of a toy world, without any model."""
    thing = dict(name="cup", colour="red", count=1, column=0, row=0)
    scenes = {f"{i}.png": {"kind": "kitchen", "things": [thing]} for i in range(4)}
    write(tmp_path / "scenes.json", scenes)
    texts = ["There is a red cup.", "There is a blue cup.", "There is a dog.", "This is a kitchen."]
    rows = [hal_row(i, question="Describe the image.", model_answer=t) for i, t in enumerate(texts)]
    template = write(tmp_path / "t.json", [row | {"model_answer": ""} for row in rows])
    flags = ("--questions", template, "--answers", write(tmp_path / "f.json", rows))
    flags += ("--images", pictures, "--out", tmp_path / "out")
    main(*flags, "--annotator", "oracle")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["score"] == (6 + 2 + 0 + 3) / 4 and found["hallucination_rate"] == 0.5
    assert found["judge"] == "the toy world's truth"
    main(*flags)  # scored again, without a judge


def test_the_truth_judges_each_picture(template, pictures, tmp_path):
    """The same answer to the same question about two pictures: true of one, not of the other."""
    thing = dict(colour="red", count=1, column=0, row=0)
    scenes = {f"{i}.png": {"kind": "kitchen", "things": [thing | {"name": n}]}
              for i, n in enumerate(("cup", "bowl"))}  # fmt: skip
    write(tmp_path / "scenes.json", scenes)
    same = dict(question="Describe the image.", model_answer="There is a red cup.")
    rows = [hal_row(i, **same) for i in range(2)]
    template = write(tmp_path / "t.json", [row | {"model_answer": ""} for row in rows])
    flags = ("--questions", template, "--answers", write(tmp_path / "f.json", rows))
    flags += ("--images", pictures, "--out", tmp_path / "out")
    main(*flags, "--annotator", "oracle")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["score"] == (6 + 0) / 2
    assert len((tmp_path / "out" / "reviews.jsonl").read_text().splitlines()) == 2
    main(*flags)  # the same pictures when it is scored again
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == found


def test_answers_that_cannot_be_read_begin_no_folder(template, filled, tmp_path):
    """When the file is mended, the same command works."""
    broken = tmp_path / "broken.json"
    broken.write_bytes(filled.read_bytes()[:-10])
    flags = ("--questions", template, "--answers", broken, "--out", tmp_path / "out")
    with pytest.raises(BadInput, match="broken.json"):
        main(*flags)
    assert not (tmp_path / "out").exists()
    broken.write_bytes(filled.read_bytes())
    main(*flags)


@pytest.mark.parametrize("bad", [[1], {}, None, 1.5])
def test_ids_that_are_no_ids(tmp_path, bad):
    turns = {"question_id": bad, "category": "writing", "turns": ["a", "b"]}
    needed = "`question_id` is .*; a number or a text is needed"
    with pytest.raises(BadInput, match=needed):
        mt_bench.read(write(tmp_path / "q.jsonl", [turns]))
    said = {"question_id": bad, "choices": [{"turns": ["a", "b"]}]}
    with pytest.raises(BadInput, match=needed):
        mt_bench.read_answers(write(tmp_path / "a.jsonl", [said]), [])
    rated = {"question_id": bad, "model": [bad], "turn": 1, "judgment": "[[1]]"}
    with pytest.raises(BadInput, match=needed):
        mt_bench.read_reviews(write(tmp_path / "r.jsonl", [rated]), [])
    row = {"question_id": bad, "text": "x", "content": "8 7"}
    for read in (llava_bench.read_answers, llava_bench.read_reviews):
        with pytest.raises(BadInput, match=needed):
            read(write(tmp_path / "l.jsonl", [row]), [])
    if bad:
        row = {"instruction": "x", "output": "y", "image": [bad]}
        with pytest.raises(BadInput, match="`image` is .*; a text is needed"):
            alpaca_eval.read_answers(write(tmp_path / "o.json", [row]), [])


@pytest.mark.parametrize("turns", ["ab", ["a"], ["a", 3], None])
def test_turns_that_are_no_turns(tmp_path, turns):
    said = {"question_id": 1, "choices": [{"turns": turns}]}
    with pytest.raises(BadInput, match="a list of two texts, is needed"):
        mt_bench.read_answers(write(tmp_path / "a.jsonl", [said]), [])


def test_the_better_of_two_answers_is_green():
    """By the sum over its replies; equal sums are neither."""
    questions = [Question(i, "", f"{i}.png", ("Q?",), (), {}) for i in range(3)]
    replies = [[[("Rating: 6", "")], [("Rating: 1", "")], [("Rating: 2", "")]],
               [[("Rating: 6", "")], [("Rating: 3", "")], [("no", "")]]]  # fmt: skip
    said = [[("a",)] * 3, [("b",)] * 3]
    images = ["0.png", "1.png", None]
    rows = eval_judge.changed(mmhal, questions, replies, said, ("x", "y"), images)
    assert rows == [("1.png", "Q?", [("x (1)", "a", False), ("y (3)", "b", True)])]


def test_turns_stand_together_on_the_sheet():
    """The first may be the one whose score differs."""
    questions = [Question(0, "", "0.png", ("Q1?", "Q2?"), (), {})]
    replies = [[[(f"[[{n}]]", ""), ("[[10]]", "")]] for n in (4, 8)]
    rows = eval_judge.changed(
        mt_bench, questions, replies, [[("a", "b")], [("c", "d")]], ("x", "y"), ["0.png"]
    )
    answers = [("x (4, 10)", "a / b", False), ("y (8, 10)", "c / d", True)]
    assert rows == [("0.png", "Q1? / Q2?", answers)]


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--context", "--context is for LLaVA-Bench alone"),
        ("--references", "--references is for LLaVA-Bench and MT-Bench and AlpacaEval alone"),
    ],
)
def test_files_that_the_benchmark_does_not_read(template, filled, tmp_path, flag, message):
    with pytest.raises(BadInput, match=message):
        main("--questions", template, "--answers", filled, "--out", tmp_path / "out", flag, "x")
