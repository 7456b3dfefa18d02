"""Facts about images, and what a reward model reads: prompt, answer, and an evaluation turn.

    prompt with image | answer | USER: Rate this answer. ... The picture shows: - ... ASSISTANT:

Facts are captions of the image written by people (Sun et al. 2023). They make up for a reward model
that sees no better than the policy it judges. The policy never reads them. They stand in the
evaluation turn, or before the question that was answered.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

from common import BadInput

# the options of a multiple-choice question, on lines or on one: A. x B. y, A) x B) y, (A) x (B) y
CHOICE = re.compile(
    r"(?:^|[?:.;]\s+)A[.):]\s.+?\sB[.):]\s|(?:^|\s)([(\[])A[)\]].+?\s\1B[)\]]", re.M | re.S
)


# ---- facts of a record


def facts_of(record, known):
    """The captions of a record's image, `known` being {image name: [text, ...]}; None without any.

    A text-only record has []. Names are those of LLaVA-RLHF: the file's name, COCO's without what
    stands before its number, and aok_<file> for the rationales of a multiple-choice question.
    """
    if record.image is None:
        return []
    name = Path(str(record.image)).name
    names = [name, name.rsplit("_", 1)[-1]]
    if CHOICE.search(record.turns[-1]):
        names = [f"aok_{n}" for n in names] + names
    return next((known[n] for n in names if n in known), None)


def facts_for(records, known, missing):
    """The captions of each record's image: one list a record, [] where there are none.

    known: {image name: [text, ...]}. missing: "refuse" raises BadInput for an unknown image,
    "count" prints how many there are.
    """
    facts = [facts_of(r, known) for r in records]
    without = [r for r, captions in zip(records, facts) if captions is None]
    if without and missing == "refuse":
        raise BadInput(
            f"{without[0].where}: --facts has no caption of {without[0].image} "
            f"({len(without)} of {len(records)} rows are without; --missing-facts count goes on "
            "without them)."
        )
    if without:
        print(f"{len(without)} of {len(records)} rows are without facts", file=sys.stderr)
    return [captions or [] for captions in facts]


# ---- what a reward model reads


def drawn_facts(intro, facts, rng, most=None):
    """The facts as text, a bullet a line, behind their introduction; "" without facts.

    The order is random. most: how many are drawn, if not all.
    """
    drawn = rng.sample(facts, min(len(facts), most or len(facts)))
    return intro + "".join(f"\n- {text}" for text in drawn) if facts else ""


def evaluation_turn(question, intro, facts, rng, most=None):
    """The text of an evaluation turn: in `question`, `{facts}` becomes `drawn_facts`."""
    return question.replace("{facts}", drawn_facts(intro, facts, rng, most))


def facts_first(record, facts):
    """The record with a text of facts on lines before its last question; unchanged without facts."""
    if not facts:
        return record
    *dialogue, question = record.turns
    return replace(record, turns=(*dialogue, f"{facts.strip()}\n{question}"))


def with_facts_first(processor, example, facts):
    """The example, its answers as they are, behind the prompt of `facts_first`."""
    if not facts:
        return example
    asked = replace(facts_first(example.record, facts), answers=())
    return replace(example, prompt=processor.encode(asked).prompt)


def longest_facts(processor, facts, most=None):
    """The captions that make the longest evaluation turn, in tokens."""
    length = lambda text: len(processor.tokenise(text))
    return sorted(facts, key=length)[-(most or len(facts)) :]


def with_evaluation(processor, example, turn):
    """The example as a reward model reads it: after each answer one more user turn, to its cue.

    turn: the text of that turn. An answer that was cut off gets an end token, as every answer of
    the data has.
    """
    turn_ids, _ = processor.ids_of([(processor.user_pieces(turn), False)])
    turn_ids, end = torch.tensor(turn_ids), torch.tensor([processor.end_id])
    answers = []
    for ids in example.answers:
        closed = len(ids) and int(ids[-1]) in processor.stop_ids
        answers.append(torch.cat([ids, turn_ids] if closed else [ids, end, turn_ids]))
    longest = len(example.prompt) + max(map(len, answers))
    if longest > processor.max_length:
        raise BadInput(
            f"{example.record.where}: prompt, answer and evaluation of {longest} tokens; "
            f"the limit is {processor.max_length}."
        )
    scored = [torch.ones(len(a), dtype=torch.bool) for a in answers]
    return replace(example, answers=answers, scored=scored)
