"""facts.py by hand: which captions a record has, how they are drawn, where they and an evaluation turn stand."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import facts
from common import BadInput
from data import Record

CHOICE = "Which?\nA. cup\nB. dog\nAnswer."


@pytest.mark.parametrize(
    "question, choice",
    [
        ("A. cup\nB. dog\nC.", True),
        (CHOICE, True),
        ("Which? A) cup B) dog .", True),
        ("Which: (A) cup (B) dog", True),
        ("Which [A] cup [B] dog", True),
        ("Which (A) cup [B] dog", False),
        ("Plan A. is good. Plan B. too", False),
        ("Is it A or B?", False),
        ("(A) cup", False),
    ],
)
def test_a_question_of_multiple_choice(question, choice):
    assert bool(facts.CHOICE.search(question)) is choice


def test_whose_captions():
    known = {"7.jpg": ["seven"], "aok_7.jpg": ["why"], "COCO_8.jpg": ["whole"], "8.jpg": ["eight"]}
    of = lambda image, *turns: facts.facts_of(Record("f, row 0", image, turns or ("What?",)), known)
    assert of(Path("a/7.jpg")) == of("COCO_train_7.jpg") == ["seven"]
    assert of("COCO_8.jpg") == ["whole"], "the whole name first"
    assert of("7.jpg", CHOICE) == of("x_7.jpg", CHOICE) == ["why"]
    assert of("8.jpg", CHOICE) == ["eight"], "without a rationale the captions"
    assert of("7.jpg", CHOICE, "A.", "What?") == ["seven"], "the last question counts"
    assert of(None) == [] and of("9.jpg") is None


def test_rows_without_captions(capsys):
    records = [Record(f"f, row {i}", f"{i}.jpg", ("What?",)) for i in range(3)]
    records.append(Record("f, row 3", None, ("What?",)))
    known = {"1.jpg": ["one"]}
    told = r"^f, row 0: --facts has no caption of 0.jpg \(2 of 4 rows are without; --missing-facts "
    with pytest.raises(BadInput, match=told):
        facts.facts_for(records, known, "refuse")
    assert facts.facts_for(records, known, "count") == [[], ["one"], [], []]
    assert capsys.readouterr().err == "2 of 4 rows are without facts\n"
    assert facts.facts_for(records[1:2], known, "refuse") == [["one"]]
    assert not capsys.readouterr().err


def test_facts_are_drawn_in_any_order():
    draw = lambda seed, *most: facts.drawn_facts(
        "See:", ["a", "b", "c"], random.Random(seed), *most
    )
    assert {draw(i) for i in range(60)} == {
        "See:" + "".join(f"\n- {x}" for x in order)
        for order in ("abc", "acb", "bac", "bca", "cab", "cba")
    }
    assert {draw(i, 1) for i in range(30)} == {"See:\n- a", "See:\n- b", "See:\n- c"}
    assert draw(0, 9).count("\n") == draw(0, 3).count("\n") == 3 and draw(0, 2).count("\n") == 2
    assert facts.drawn_facts("See:", [], random.Random(0)) == ""
    turn = facts.evaluation_turn("Rate.{facts} So?", " See:", ["a"], random.Random(0))
    assert turn == "Rate. See:\n- a So?"
    assert facts.evaluation_turn("Rate.{facts}", " See:", [], random.Random(0)) == "Rate."
    one = facts.evaluation_turn("{facts}", "", ["a", "b"], random.Random(0), 1)
    assert one in ("\n- a", "\n- b")


def test_facts_before_the_last_question(llava):
    _, processor = llava
    record = Record("f, row 0", None, ("One?", "Yes.", "Two?"), ("A cup.",))
    turns = ("One?", "Yes.", "See:\n- a\nTwo?")
    assert facts.facts_first(record, " See:\n- a").turns == turns
    assert facts.facts_first(record, "") is record
    example = processor.encode(record)
    read = facts.with_facts_first(processor, example, "\nSee:\n- a")
    assert torch.equal(read.prompt, processor.encode(replace(record, turns=turns)).prompt)
    assert read.answers is example.answers and read.record is record
    assert facts.with_facts_first(processor, example, "") is example


def test_the_longest_facts(llava):
    _, processor = llava
    texts = ["a b c d", "a", "a b", "a b c"]
    assert facts.longest_facts(processor, texts) == ["a", "a b", "a b c", "a b c d"]
    assert facts.longest_facts(processor, texts, 1) == ["a b c d"]
    assert facts.longest_facts(processor, texts, 9) == ["a", "a b", "a b c", "a b c d"]
    assert facts.longest_facts(processor, []) == []


def test_an_evaluation_behind_each_answer(llava):
    """A user's turn and its cue, scored all; an answer without an end token gets one."""
    _, processor = llava
    record = Record("f, row 0", None, ("What is it?",), ("A cup.", "No"))
    example = processor.encode(record)
    whole = replace(record, turns=("What is it?", "A cup.", "Rate."), answers=())
    turn = processor.encode(whole).prompt[len(example.prompt) + len(example.answers[0]) :]
    cut = replace(
        example, answers=[example.answers[0], example.answers[0][:-1], torch.zeros(0).long()]
    )
    read = facts.with_evaluation(processor, cut, "Rate.")
    end = torch.tensor([processor.end_id])
    want = [example.answers[0], example.answers[0], end]
    for found, scored, before in zip(read.answers, read.scored, want, strict=True):
        assert torch.equal(found, torch.cat([before, turn])) and scored.all()
        assert scored.dtype == torch.bool and len(scored) == len(found)
    longest = len(read.prompt) + len(read.answers[0])
    processor.max_length = longest
    facts.with_evaluation(processor, cut, "Rate.")
    processor.max_length -= 1
    told = (
        f"^f, row 0: prompt, answer and evaluation of {longest} tokens; the limit is {longest - 1}"
    )
    with pytest.raises(BadInput, match=told):
        facts.with_evaluation(processor, cut, "Rate.")
