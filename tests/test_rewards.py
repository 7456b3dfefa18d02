"""rewards.py: what of a text is the answer, each kind by its rule, which rows can be scored, the sum of the terms."""

import argparse
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

import judge
import rewards
from common import BadInput
from data import Record
from formats import dataset


@pytest.mark.parametrize(
    "text, want",
    [
        ("<think>It is 2.</think>\n<answer> 3 </answer>", "3"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),  # the last one
        ("<answer><answer>\n4\n</answer>", "4"),
        ("<answer>\\boxed{5}</answer>", "5"),
        ("so x is \\boxed{1} or \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("so x is \\boxed{1", None),  # cut off
        (" There are 3 cups. ", "There are 3 cups."),
        ("word " * 20, ("word " * 20).strip()),
        ("word " * 21, None),
        ("word " * 21 + "<answer>3</answer>", "3"),
        ("<answer>3", "<answer>3"),
        ("", ""),
    ],
)
def test_what_is_the_answer(text, want):
    assert rewards.final(text) == want


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3),
        (" 3. ", 3),
        ("-0.5", -0.5),
        (".5", 0.5),
        ("1,200", 1200),
        ("1,2", None),
        ("1/2", 0.5),
        ("145°", 145),
        ("45^\\circ", 45),
        ("45^{\\circ}", 45),
        ("90 degrees", 90),
        ("$5$", 5),
        ("50%", 50),
        ("5 cm", 5),
        ("24 cm^2", 24),
        ("12 square feet", 12),
        ("5 cups", None),
        ("2 \\sqrt { 221 }", 2 * math.sqrt(221)),
        ("2√3", 2 * math.sqrt(3)),
        ("\\sqrt{\\frac{9}{4}}", 1.5),
        ("\\frac{\\sqrt{3}}{2}", math.sqrt(3) / 2),
        ("\\dfrac12", 0.5),
        ("\\frac { 5 } { 2 }", 2.5),
        ("12 \\pi", 12 * math.pi),
        ("(1+2)(3)", 9),
        ("2^{3}", 8),
        ("2 \\times 3", 6),
        ("-\\left(1 - 3\\right)", 2),
        ("9**9**9**9", None),  # too large
        ("10^{200} \\times 10^{200}", None),
        ("1/0", None),
        ("(-8)^(1/2)", None),  # no real number
        ("\\sqrt{-1}", None),
        ("\\sqrt{(-8)^{1/2}}", None),
        ("(-8)^(1/3) + 1", None),
        ("(-2)^3", -8),
        ("0^(-1)", None),
        ("$3$", 3),
        (" $ 3.$ ", 3),
        ("X3X", None),
        ("2×3", 6),
        ("2·3", 6),
        ("−2", -2),
        ("√4", 2),
        ("2π", 2 * math.pi),
        ("2\\cdot3", 6),
        ("2\\times3", 6),
        ("2\\pi", 2 * math.pi),
        ("0^(1/2)", 0),
        ("(1/4)^(1/2)", 0.5),
        ("-2^(1/2)", -math.sqrt(2)),
        ("+3", 3),
        ("1 + 2 + ... + 9", None),
        ("2(...)", None),
        ("1 2", None),
        ("1 + 2", 3),
        ("2 3 \\pi", None),
        ("007", None),
        ("x", None),
        ("pip", None),
        ("__import__('os')", None),
        ("(" * 60 + "1", None),
        ("1" * 101, None),
        ("", None),
    ],
)
def test_the_value_of_an_expression(text, value):
    found = rewards.value_of(text)
    assert found == (None if value is None else pytest.approx(value, rel=1e-9))


@pytest.mark.parametrize(
    "said, right, want",
    [
        ("3", "3", 1),
        ("3.0", "3", 1),
        ("There are 3 items in the image.", "3", 1),
        ("There are two red cups.", "2", 1),
        ("Twelve", "12", 1),
        ("There are two cups and one dog.", "2", 0),  # which of them?
        ("x = 3", "3", 1),
        ("x = 2 + 1", "3", 1),
        ("x = 2 + 1 = 3", "3", 1),
        ("30", "3", 0),
        ("none", "0", 0),
        ("\\frac{1}{2}", "0.5", 1),
        ("374.1 cm", "374.1", 1),
        ("374.2", "374.1", 0),
        ("cup3", "3", 0),
        ("2", "Two", 1),
        ("v1.3", "3", 0),
        ("-3", "3", 0),
        ("It is -3 now", "-3", 1),
        ("I see 3, I think.", "3", 1),
        ("I see 1,200.", "1200", 1),
        ("I see 3.", "3", 1),
    ],
)
def test_numbers(said, right, want):
    assert rewards.same_number(said, right) == want


@pytest.mark.parametrize(
    "said, right, want",
    [
        ("B", "B", 1),
        ("B. dog", "B", 1),
        ("(B)", "B. dog", 1),
        ("B) dog", "(B) dog", 1),
        ("The answer is B.", "B", 1),
        ("correct option is (B)", "B", 1),
        ("Answer: B", "B", 1),
        ("A dog", "A", 0),  # an article
        ("The answer is A dog", "A", 0),
        ("Bread", "B", 0),
        ("b", "B", 0),
        ("A", "B", 0),
        ("dog", "B", 0),
    ],
)
def test_letters(said, right, want):
    assert rewards.same_letter(said, right) == want


@pytest.mark.parametrize(
    "said, right, want",
    [
        ("Yes", "yes", 1),
        (" no, there is no dog.", "No", 1),
        ("**No**", "No, there is no dog.", 1),
        ("Nothing", "No", 0),
        ("There is no dog.", "No", 0),
        ("Yes", "No", 0),
        ("", "No", 0),
    ],
)
def test_yes_no(said, right, want):
    assert rewards.same_yes_no(said, right) == want


def test_texts():
    assert rewards.same_text("The car is  RED!", "a car is red") == 1
    assert rewards.same_text("The car is not red", "The car is red") == 0


SIZE = (30, 40)  # height, width


@pytest.mark.parametrize(
    "said, want",
    [
        ("[10, 0, 20, 10]", 1),
        ("It is at (10, 0, 20, 10).", 1),
        ('[{"bbox_2d": [10.0, 0, 20, 10], "label": "dog"}]', 1),
        ("[0, 0, 5, 5] no, [10, 0, 20, 10]", 1),  # the last
        ("[15, 0, 25, 10]", 50 / 150),
        ("[10, 0, 20, 20]", 0.5),
        ("[20, 0, 30, 10]", 0),  # they touch
        ("[20, 10, 10, 0]", 0),  # corners in the wrong order
        ("[10, 0, 20]", 0),
        ("[10,0,20,10]", 1),
        ("[10,000,020,010]", 1),
        ("[10,0,20,10,30]", 0),
        ("[10,000,20,10,30]", 0),
        (f"[0, 5, {'9' * 400}, 5]", 0),  # no number of Python is as large
        ("10, 0, 20, 10", 0),
        ("", 0),
        ("[0.25, 0, 0.5, 0.33333333]", 1),  # of the sides
    ],
)
def test_boxes(said, want):
    got = rewards.overlap(said, "[10, 0, 20, 10]", SIZE, False)
    assert got == pytest.approx(want, abs=1e-6)


def test_fractions_of_the_padded_square():
    """40 x 30 pixels stand in a square of 40, 5 pixels from its top; LLaVA-1.5 measures there."""
    assert rewards.in_pixels(("0.25", "0.125", "0.5", "0.375"), SIZE, True) == (10, 0, 20, 10)
    said = "[0.25, 0.125, 0.5, 0.375]"
    assert rewards.overlap(said, "[10, 0, 20, 10]", SIZE, True) == 1
    assert rewards.overlap(said, "[10, 0, 20, 10]", SIZE, False) < 0.6
    assert rewards.in_pixels(("0.25", "0", "0.5", "1"), (40, 30), True)[0::2] == (5, 15)


# ---- the data's answer


@pytest.fixture
def picture(tmp_path):
    """A picture of 40 x 30 pixels."""
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def record(answer, image=None, row=0, right=None):
    answers = () if answer is None else (answer,)
    return Record(f"f.json, row {row}", image, (f"Question {row}?",), answers, right=right)


@pytest.mark.parametrize(
    "answer, want",
    [
        ("<answer> 3 </answer>", ("number", "3")),
        ("<think>a\nb</think>\n\n<answer>B</answer>", ("letter", "B")),
        ("145°", ("number", "145°")),
        ("2 \\sqrt { 221 }", ("number", "2 \\sqrt { 221 }")),
        ("A. cup", ("letter", "A. cup")),
        ("Two", ("number", "Two")),
        ("A cup", ("text", "A cup")),
        ("No, there is no dog.", ("yes/no", "No, there is no dog.")),
        ("No parking", ("text", "No parking")),
        ("There are two cups.", ("text", "There are two cups.")),
        ("[1.0, 2.0, 12.0, 13.5]", ("box", "[1.0, 2.0, 12.0, 13.5]")),
        ("word " * 21, None),
        ("A dog sleeps under the table.", None),  # six words: a description
        ("The two red cups there", ("text", "The two red cups there")),
        ("...", None),
    ],
)
def test_the_kind_of_an_answer(picture, answer, want):
    assert rewards.right_answer(record(answer, picture)) == want


def test_what_a_row_of_fact_rlhf_states(picture):
    kinds = [rewards.right_answer(record("Is it?", right=r)) for r in ("B", "No", "")]
    assert kinds == [("letter", "B"), ("yes/no", "No"), None]


def test_boxes_that_cannot_be(picture):
    for box in ("[0, 0, 41, 31]", "[0, 0, 1, 1]", "[39, 0, 40, 30]"):
        assert rewards.right_answer(record(box, picture))[0] == "box"
    for box in ("[0, 0, 42, 30]", "[0, 0, 40, 32]", "[-1, 0, 40, 30]", "[9, 0, 9, 30]"):
        with pytest.raises(BadInput, match="is not in the picture of 40 x 30 pixels"):
            rewards.right_answer(record(box, picture))
    with pytest.raises(BadInput, match="is a box, and the row has no picture"):
        rewards.right_answer(record("[0, 0, 4, 3]"))


def test_rows_without_an_answer_that_can_be_read(picture, capsys):
    """Counted and refused, or left out; with mixed, the annotator takes a long one, but no bad one."""
    answers = ["3", "word " * 21, None, "[0, 0, 400, 300]"]
    make = lambda skip: dataset.Rows(
        [record(a, picture, i) for i, a in enumerate(answers)], skip_bad_rows=skip
    )
    with pytest.raises(BadInput, match=r"row 1: no rule can read .*\(3 of 4 rows are refused"):
        rewards.right_answers(make(False), "exact")
    rows = make(True)
    right = rewards.right_answers(rows, "exact")
    assert list(right.values()) == [("number", "3")] and len(rows.records) == 1
    assert [row["row"] for row in rows.skipped] == [1, 2, 3]
    assert "has no answer" in rows.skipped[1]["why"] and "not in the" in rows.skipped[2]["why"]

    rows = make(True)
    right = rewards.right_answers(rows, "mixed")
    assert [r.where[-1] for r in rows.records] == ["0", "1"] and len(right) == 1
    assert rewards.says(right, rows.records) == "rewards: 1 by the annotator, 1 by number"
    rows = make(False)
    assert rewards.right_answers(rows, "annotator") == {} and len(rows.records) == 4


# ---- the sum


def test_each_prompt_has_its_terms(picture):
    """Exact or the annotator, never both; the annotator sees its prompts alone, all at once."""
    records = [
        record("B", row=0),
        record("word " * 21, row=1),
        record("[10, 0, 20, 10]", picture, 2),
    ]
    right = rewards.right_answers(dataset.Rows(list(records)), "mixed")
    asked = []

    def annotator(records, answers):
        asked.append(([r.where for r in records], answers))
        return [[0.25, None] for _ in records]

    args = SimpleNamespace(format_weight=0.5)
    score = rewards.scorer(args, right, annotator, square=False)
    tagged = "<think>so</think> <answer>B</answer>"
    answers = [[tagged, "A"], ["x", "y"], ["[15, 0, 25, 10]", tagged]]
    assert score(records, answers) == [
        {"exact": [1.0, 0.0], "format": [0.5, 0.0]},
        {"annotator": [0.25, None], "format": [0.0, 0.0]},
        {"exact": [pytest.approx(1 / 3), 0.0], "format": [0.0, 0.5]},
    ]
    assert asked == [(["f.json, row 1"], [["x", "y"]])]
    args.format_weight = 0
    assert score(records[:1], answers[:1]) == [{"exact": [1.0, 0.0]}] and len(asked) == 1
    with pytest.raises(ValueError, match="shorter|longer"):
        score(records[:1], answers)


@pytest.mark.parametrize(
    "truth, said, want",
    [
        (("letter", "B. dog"), "The answer is B", 1),
        (("letter", "B. dog"), "A. dog", 0),
        (("yes/no", "No, it is red."), "no", 1),
        (("yes/no", "No"), "No, there is none", 1),
        (("number", "0.5"), "1/2", 1),
        (("number", "3"), "three", 1),
        (("text", "a red car"), "The red car.", 1),
        (("text", "no"), "No, sir", 0),
        (("box", "[0, 0, 0.5, 1]"), "[0, 0, 1, 1]", 0.5),
        (("text", "red"), "word " * 40, 0),
    ],
)
def test_each_kind_by_its_own_rule(picture, truth, said, want):
    """What the rules of the other kinds would not take, or would."""
    one = record("", picture, 1)
    score = rewards.scorer(SimpleNamespace(format_weight=0), {one.prompt_key: truth}, None, False)
    assert score([one], [[said]]) == [{"exact": [pytest.approx(want)]}]


PIECES = [
    "1",
    "20",
    "0",
    "9" * 12,
    ".",
    "...",
    ",",
    "-",
    "+",
    "*",
    "/",
    "^",
    "(",
    ")",
    "[",
    "{",
    "}",
    "\\frac",
]
PIECES += [
    "\\sqrt",
    "sqrt",
    "pi",
    "√",
    " ",
    "\n",
    "%",
    "cm",
    "=",
    "<answer>",
    "</answer>",
    "\\boxed{",
    "yes",
    "No",
]
PIECES += [
    "A",
    "B.",
    "(C)",
    "two",
    "the",
    "e",
    "_",
    "٣",
    "²",
    "½",
    "'",
    "\x00",
    "inf",
    "[1,2,3,4]",
    "[0,.1,.2,.3]",
]


def test_whatever_a_model_says(picture):
    """No text ends a run; a reward is between 0 and 1, and what is right as it stands is worth 1."""
    rng, kinds = random.Random(0), set()
    keys = {kind: record(kind, picture, row) for row, kind in enumerate("BCDEF")}
    truths = (
        ("number", "3"),
        ("letter", "B."),
        ("yes/no", "No"),
        ("text", "red"),
        ("box", "[9, 0, 20, 9]"),
    )
    right = {one.prompt_key: truth for one, truth in zip(keys.values(), truths)}
    score = rewards.scorer(SimpleNamespace(format_weight=1), right, None, square=True)
    own = record("", picture, 9)
    for _ in range(4000):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 12)))
        for terms in score(list(keys.values()), [[text]] * 5):
            assert all(0 <= x <= 1 for values in terms.values() for x in values), text
        try:
            answer = rewards.right_answer(replace(own, answers=(text,)))
        except BadInput:
            continue
        if answer:
            kinds.add(answer[0])
            of_itself = rewards.scorer(
                SimpleNamespace(format_weight=0), {own.prompt_key: answer}, None, False
            )
            assert of_itself([own], [[text]]) == [{"exact": [1.0]}], text
    assert kinds == {"number", "letter", "yes/no", "text", "box"}


@pytest.mark.parametrize(
    "text, want",
    [
        ("<think>a\nb</think>\n<answer>\n3</answer>", 1),
        (" <think></think><answer>3</answer> ", 1),
        ("<think>a</think><answer>3</answer>.", 0),
        ("<answer>3</answer>", 0),
        ("<think>a</think><answer>3</answer><answer>4</answer>", 0),
        ("<think>a</think> so <answer>3</answer>", 0),
        ("<answer>3</answer><think>a</think>", 0),
    ],
)
def test_the_format(text, want):
    assert rewards.in_format(text) == want


def test_a_verdict_for_each_prompt(picture):
    """An annotator that forgets one is a fault, and so are answers without their prompt."""
    args, one = SimpleNamespace(format_weight=0), record("", picture, 1)
    for given, records in (([], [one]), ([[1.0]] * 2, [one])):
        score = rewards.scorer(args, {}, lambda *_: given, False)
        with pytest.raises(ValueError, match="zip"):
            score(records, [["3"]] * len(records))
    score = rewards.scorer(args, {one.prompt_key: ("number", "3")}, None, False)
    with pytest.raises(ValueError, match="zip"):
        score([one], [["3"]] * 2)


def test_every_flag_of_an_annotator_is_known():
    """Those that judge.py adds."""
    parser = argparse.ArgumentParser()
    judge.add_flags(parser)
    assert set(rewards.ANNOTATOR_FLAGS) == vars(parser.parse_args([])).keys()


def test_flags_of_an_annotator_that_nobody_asks():
    args = SimpleNamespace(reward="exact", given={"judge_url"}, format_weight=0, ask=None)
    with pytest.raises(BadInput, match="--judge-url is for --reward annotator or mixed"):
        rewards.check_flags(args)
    args.given = set()
    rewards.check_flags(args)
    assert args.ask == ""
    args.ask, args.format_weight = None, 1.0
    rewards.check_flags(args)
    assert "<think>" in args.ask
    args.ask = "Be brief."
    rewards.check_flags(args)
    assert args.ask == "\nBe brief."
