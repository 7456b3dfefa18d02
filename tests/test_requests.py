"""What a judge reads, whole, and what becomes of its scores: the five benchmarks on one question each, by hand."""

import numpy as np
import pytest

from formats import alpaca_eval, llava_bench, mm_vet, mmhal, mt_bench
from formats.benchmarks import Question, Request


def asked(*turns, **about):
    return Question("q7", "f.json, row 7", "a.jpg", turns, ("kind",), about)


FAIR = (
    "You are a fair judge of what an AI assistant answers. Rate the answer{} below. {} Explain your "
    "judgement shortly first. Be objective. Then rate the answer from 1 to 10, in exactly this "
    'format: "[[rating]]", for example "Rating: [[5]]".\n\n'
)


def test_mt_bench_reads_a_dialogue():
    question = asked("Why?", "And then?")
    general = "Consider how helpful, relevant, accurate, deep, creative and detailed it is."
    first = FAIR.format(" to the question", general)
    first += "[Question]\nWhy?\n\n[Start of Assistant's Answer]\nSo.\n[End of Assistant's Answer]"
    second = FAIR.format(" to the second question of the user", general)
    second += (
        "<|Start of Assistant's Conversation with User|>\n\n### User:\nWhy?\n\n### Assistant:\nSo."
        "\n\n### User:\nAnd then?\n\n### Assistant:\nThus.\n\n"
        "<|End of Assistant's Conversation with User|>"
    )
    assert mt_bench.requests(question, ("So.", "Thus.")) == [
        Request("turn 1", first, ((("Why?",), "So."),)),
        Request("turn 2", second, ((("Why?", "So.", "And then?"), "Thus."),)),
    ]


def test_mt_bench_reads_a_reference_before_the_answer():
    question = asked("Why?", "And then?", reference=("True.", "Truer."))
    beside = mt_bench.AGAINST_REFERENCE
    first = FAIR.format(" to the question", beside)
    first += (
        "[Question]\nWhy?\n\n[Start of Reference Answer]\nTrue.\n[End of Reference Answer]\n\n"
        "[Start of Assistant's Answer]\nSo.\n[End of Assistant's Answer]"
    )
    second = FAIR.format(" to the second question of the user", beside)
    second += (
        "<|Start of Reference Answer|>\n\n### User:\nWhy?\n\n### Reference answer:\nTrue.\n\n"
        "### User:\nAnd then?\n\n### Reference answer:\nTruer.\n\n<|End of Reference Answer|>\n\n\n"
        "<|Start of Assistant's Conversation with User|>\n\n### User:\nWhy?\n\n### Assistant:\nSo."
        "\n\n### User:\nAnd then?\n\n### Assistant:\nThus.\n\n"
        "<|End of Assistant's Conversation with User|>"
    )
    assert [r.text for r in mt_bench.requests(question, ("So.", "Thus."))] == [first, second]


def test_what_the_others_read():
    """Behind the words that are the same for all: question, references and answer, in their places."""
    question = asked("Why?", contents=["cat", "mat"], reference="True.")
    (made,) = mmhal.requests(question, ("So.",))
    assert made == Request("", mmhal.PROMPT.format("cat, mat", "Why?", "True.", "So."), made.said)
    assert made.said == ((("Why?",), "So."),)

    question = asked("Why?", reference="red<AND>round<OR>ball")
    (made,) = mm_vet.requests(question, ("So.",))
    row = "Why? | red <AND> round <OR> ball | So. | "
    assert made == Request("", mm_vet.PROMPT + row, ((("Why?",), "So."),))

    about = {"context": "A cat.", "told": "the caption", "reference": "True."}
    (made,) = llava_bench.requests(asked("Why?", **about), ("So.",))
    parts = {"context": "A cat.", "told": "the caption", "first": "True.", "second": "So."}
    assert made.part == "" and made.text == llava_bench.PROMPT.format(question="Why?", **parts)
    assert made.said == ((("Why?",), "True."), (("Why?",), "So."))

    base, own = (("Why?",), "True."), (("Why?",), "So.")
    text = lambda **two: alpaca_eval.PROMPT.format(instruction="Why?", **two)
    assert alpaca_eval.requests(asked("Why?", reference="True."), ("So.",)) == [
        Request("baseline first", text(first="True.", second="So."), (base, own)),
        Request("baseline second", text(first="So.", second="True."), (own, base)),
    ]


@pytest.mark.parametrize(
    "rule, reply, want",
    [
        # AlpacaEval: preferences of its own file, and verdicts in an order
        *((lambda reply: alpaca_eval.official(reply), reply, want) for reply, want in (
            ("1", (0,)), ("2", (1,)), ("1.62", (0.62,)), ("0", (0.5,)), ("1.5", (0.5,)),
            ("None", None), ("0.9", None), ("2.1", None), ("nan", None), ("Better: 2", None))),
        *((lambda reply: alpaca_eval.official(reply, "baseline first"), reply, want) for reply, want in (
            ("Better: 2", (1,)), ("Better: 1.", (0,)), ("**BETTER: Response 2**", (1,)), ("x\nBetter: equal", (0.5,)),
            ("Better: 1\nBetter: 1", None), ("Better: 3", None), ("1", None), ("", None))),
        (lambda reply: alpaca_eval.official(reply, "baseline second"), "Better: 2", (0,)),
        (lambda reply: alpaca_eval.official(reply, "baseline second"), "Better: 1", (1,)),
        # MT-Bench
        (mt_bench.official, "Rating: [[7]]", (7,)), (mt_bench.official, "[[8.5]] of [3]", (8.5,)),
        (mt_bench.official, "[3], or [[4]]", (4,)), (mt_bench.official, "[3]", (3,)),
        (mt_bench.official, "3", None),
        # MM-Vet: the first word, from 0 to 1
        *((rule, reply, want) for rule, wrong in ((mm_vet.readable, None), (mm_vet.official, (0,)))
          for reply, want in (("0", (0,)), ("1.0", (1,)), ("0.25 x", (0.25,)), ("1.01", wrong), ("-0.1", wrong),
                              ("x", wrong), ("", wrong))),
        # MMHal-Bench: exactly one of 0 to 6
        *((rule, reply, want) for rule, wrong in ((mmhal.readable, None), (mmhal.official, (0,)))
          for reply, want in (("Rating: 0", (0,)), ("rating: 6", (6,)), ("Rating: 7", wrong), ("Rating: 1, no, RATING: 2", wrong),
                              ("6", wrong))),
        # LLaVA-Bench: two numbers in the first line
        *((llava_bench.official, reply, want) for reply, want in (
            ("8 9\nwhy", (8, 9)), ("8,9", (8, 9)), ("8.5 7.5", (8.5, 7.5)), ("8", (-1, -1)), ("8 9 10", (-1, -1)),
            ("8 inf", (-1, -1)), ("nan 8", (-1, -1)), ("Scores: 8 9", (-1, -1)))),
    ],
)  # fmt: skip
def test_a_score_is_read(rule, reply, want):
    assert rule(reply) == (pytest.approx(want) if want else want)


@pytest.mark.parametrize(
    "bench, scores, want",
    [
        (mmhal, [(6,)], [6, 0, 3, 1]),
        (mmhal, [(3,)], [3, 0, 0, 1]),
        (mmhal, [(2,)], [2, 1, 2, 1]),
        (mmhal, [(0,)], [0, 1, 0, 1]),
        (mmhal, [None], [0, 0, 0, 0]),
        (llava_bench, [(8, 9)], [8, 9, 1]),
        (llava_bench, [None], [0, 0, 0]),
        (mm_vet, [(0.5,), None, (1.0,)], [0.75, 1]),
        (mm_vet, [None, None], [0, 0]),
        (mt_bench, [(7,), None], [7, 1, 0, 0]),
        (mt_bench, [None, (4,)], [0, 0, 4, 1]),
        (alpaca_eval, [(1,), (0,)], [0.5, 0.5, 1]),
        (alpaca_eval, [(0.4,)], [0.4, 0, 1]),
        (alpaca_eval, [None, (1,)], [0, 0, 0]),
        (alpaca_eval, [(1,), (1,)], [1, 1, 1]),
    ],
)
def test_what_a_question_adds(bench, scores, want):
    assert bench.values(asked("Why?"), scores) == want


GROUPS = ["all", "b", "a"]


@pytest.mark.parametrize(
    "bench, sums, want",
    [
        (
            mmhal,  # score, hallucinated, informative, n
            [[12, 1, 6, 4], [9, 0, 4, 2], [3, 1, 2, 2]],
            {"score": 3, "hallucination_rate": 0.25, "informativeness": 50, "b": 4.5, "a": 1.5},
        ),
        (
            llava_bench,  # reference, model, n
            [[16, 8, 2], [10, 5, 1], [6, 3, 1]],
            {"relative": 50, "reference": 80, "model": 40, "b relative": 50, "b reference": 100,
             "b model": 50, "a relative": 50, "a reference": 60, "a model": 30},
        ),
        (
            mt_bench,  # turn 1, its n, turn 2, its n
            [[12, 2, 4, 1], [7, 1, 0, 0], [5, 1, 4, 1]],
            {"score": 16 / 3, "turn 1": 6, "turn 2": 4, "b": 7, "a": 4.5},
        ),
        (
            alpaca_eval,  # wins, whole wins, n
            [[2.5, 3, 4], [2, 2, 2], [0.5, 1, 2]],
            {"win_rate": 62.5, "discrete_win_rate": 75, "b": 100, "a": 25},
        ),
    ],
)  # fmt: skip
def test_figures_by_hand(bench, sums, want):
    found = bench.figures(np.array(sums, dtype=float), GROUPS)
    assert list(found) == list(want) and found == pytest.approx(want)
    draws = bench.figures(np.array([sums, np.zeros_like(sums)], dtype=float), GROUPS)
    for name, value in want.items():
        assert draws[name].tolist() == pytest.approx([value, 0])


def test_figures_of_mm_vet():
    """Capabilities before sets of them."""
    groups = ["all", "x_y only", "x", "y"]
    found = mm_vet.figures(np.array([[1.5, 3], [0.5, 1], [1, 2], [0, 1]]), groups)
    assert list(found) == ["total", "x", "y", "x_y only"]
    assert found == pytest.approx({"total": 50, "x": 50, "y": 0, "x_y only": 50})


@pytest.mark.parametrize(
    "grades, bench, want",
    [
        ([(0.5, 1)], mt_bench, "Rating: [[3]]"),
        ([(1, 0)], mt_bench, "Rating: [[10]]"),
        ([(0.5, 0), (1, 2)], llava_bench, "5 4"),
        ([(0.5, 1)], mm_vet, "0.2"),
        ([(1, 0)], mm_vet, "1.0"),
        ([(0.5, 0)], mmhal, "Rating: 5"),
        ([(0.6, 1)], mmhal, "Rating: 1"),
        ([(1, 0), (0.5, 0)], alpaca_eval, "Better: 1"),
        ([(1, 1), (0.5, 0)], alpaca_eval, "Better: 2"),
        ([(0.5, 1), (0.5, 1)], alpaca_eval, "Better: equal"),
    ],
)
def test_the_reply_of_a_judge_that_knows(grades, bench, want):
    assert bench.in_words(grades) == want
