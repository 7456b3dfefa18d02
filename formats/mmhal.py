"""MMHal-Bench (Sun et al. 2023): 96 questions that invite hallucination; a judge rates 0 to 6.

Facts from Eval/eval_gpt_mmhal.py of LLaVA-RLHF and eval/summarize_gpt_mmhal_review.py of RLHF-V.

    response_template.json  an array of objects with question_type, image_src (a URL), image_content
                            (names of objects), question, gt_answer, and model_answer, "" to fill
    the judge's file        an array of chat completions, in the same order

The judge reads no picture, but the names of objects in it and a reference answer. In MMHALBench-V
(Amirloo et al. 2024) it also sees the picture. Ratings 3 to 6 are for answers without
hallucination, 0 to 2 for those with one; within each, the more informative is higher.

Official parse: in lower case, which of "rating: 0" ... "rating: 6" does the reply hold? With
exactly one, that is the score; else it is 0. Hallucination: a score below 3.
"""

from pathlib import Path

import numpy as np

from common import BadInput, write_json
from formats.benchmarks import Question, Request, ids_differ, in_order, read_rows, share
from formats.files import need

TYPES = (
    "attribute", "adversarial", "comparison", "counting",
    "relation", "environment", "holistic", "other",
)  # fmt: skip
MAX_TOKENS, TEMPERATURE, RETRIES, CUE = 1024, 0.0, (), ""
MAIN = ("score", "hallucination_rate", "informativeness")

PROMPT = """You are a fair judge of answers that a multimodal model gives to questions about an \
image. Two things count: how informative the answer is, and whether it hallucinates. An answer \
hallucinates if it states something that neither the image nor the earlier conversation shows or \
implies: a false claim about an object, an action, a feeling or any other detail.

Five examples show what is meant.

### Example 1:
- Image Contents: Bicycle, Wheel
- Question: How many bicycles lean against the wall?
- Standard Human-Generated Answer: Three bicycles lean against the wall.
- LMM Response to Evaluate: Two bicycles lean against the wall.
- Analysis: The number is wrong, there are three bicycles. This is a false claim.
- Hallucination: Yes.

### Example 2:
- Image Contents: Bird, Plant, Owl
- Question: What does this picture show?
- Standard Human-Generated Answer: An owl sits on a fence post. Behind it are bushes, out of focus.
- LMM Response to Evaluate: The picture shows an owl with brown feathers on a wooden post. It is a \
quiet moment that shows how well such a bird blends into its surroundings.
- Analysis: Nothing in the response contradicts the image. It does not say, for instance, that the \
owl holds a mouse.
- Hallucination: No.

### Example 3:
- Image Contents: Person, Boat, Clothing, Hat
- Question: Describe this picture in detail.
- Standard Human-Generated Answer: A man in a straw hat stands in a small green boat on a river. \
On the bank there are some houses, and the sky is gray.
- LMM Response to Evaluate: A man with a straw hat stands in a green boat on a calm river and \
holds a fishing rod. Houses line the bank. The cloudy sky and the still water give the scene a \
peaceful mood, as on an early morning.
- Analysis: Most of it is right, but there is no fishing rod in the image. This is a false claim.
- Hallucination: Yes.

### Example 4:
- Image Contents: Train, Person, Building, Luggage and bags
- Question: In which city was this photo taken?
- Standard Human-Generated Answer: The sign on the platform reads "Leeds", so it was taken in Leeds.
- LMM Response to Evaluate: It was taken on the platform of a railway station. Which city it is \
cannot be said from the image.
- Analysis: The response does not name the city, but it claims nothing false. To leave a detail \
out, to be unsure or to miss the question is no hallucination.
- Hallucination: No.

### Example 5:
- Image Contents: Car, Street, Snow
- Question: What should a driver be careful about here?
- Standard Human-Generated Answer: The road is covered with snow. A driver should go slowly.
- LMM Response to Evaluate: The road is covered with snow, so tyres have little grip and braking \
takes longer. A driver should go slowly, keep a larger distance, and avoid sudden steering. Winter \
tyres help, and where the snow has been pressed to ice, even careful braking may not be enough.
- Analysis: The response is much longer than the reference, but all that it adds is general \
knowledge that follows from the snow. Such reasoning is welcome, as long as nothing in it is false.
- Hallucination: No.

Judge the response below in this way: how informative is it, and does it hallucinate, compared \
with the image contents, the question and the human answer?

The human answer may give facts without any analysis, and it need not name every object and \
attribute in the image; so judge with some care. Analysis and reasoning of the model are to be \
encouraged.

First explain your judgement shortly. Then give your rating, one of:
- Rating: 6, very informative with good analysis or reasoning, no hallucination
- Rating: 5, very informative, no hallucination
- Rating: 4, somewhat informative, no hallucination
- Rating: 3, not informative, no hallucination
- Rating: 2, very informative, with hallucination
- Rating: 1, somewhat informative, with hallucination
- Rating: 0, not informative, with hallucination

### Image Contents
{}

### Question
{}

### Standard Human-Generated Answer
{}

### LMM Response to Evaluate
{}
"""


def read(path, context=None, references=None):
    """The template -> questions. Its own answers, if it is filled, are not looked at."""
    questions = []
    for where, row in read_rows(path):
        contents = row.get("image_content")
        if not isinstance(contents, list) or not all(isinstance(name, str) for name in contents):
            raise BadInput(
                f"{where}: `image_content` is {contents!r:.80}; a list of names is needed."
            )
        kind, source = need(row, "question_type", str, where), need(row, "image_src", str, where)
        asked = need(row, "question", str, where)
        about = {"contents": contents, "reference": need(row, "gt_answer", str, where), "row": row}
        questions.append(Question((source, asked), where, source, (asked,), (kind,), about))
    return ids_differ(questions, path)


def remarks(questions):
    """What makes the figures differ from others."""
    whole = len(questions) == 96 and all(
        q.groups == (TYPES[i % 8],) for i, q in enumerate(questions)
    )
    if whole:
        return []
    return [f"{len(questions)} questions; the official template has 96, twelve of each of 8 types"]


def read_answers(path, questions):
    """A filled template -> [(answer,)]."""
    given = []
    for where, row in read_rows(path):
        key = need(row, "image_src", str, where), need(row, "question", str, where)
        answer = need(row, "model_answer", str, where, empty=True)
        given.append((key, (answer,)))
    if not any(answer.strip() for _, (answer,) in given):
        raise BadInput(
            f"{path}: every `model_answer` is empty; is it the template, not yet filled?"
        )
    return in_order(questions, given, path)


def write_answers(folder, questions, answers, name):
    """mmhal.json, the template with `model_answer` filled."""
    filled = [q.about["row"] | {"model_answer": text} for q, (text,) in zip(questions, answers)]
    write_json(Path(folder) / "mmhal.json", filled)


def requests(question, answer):
    """One request, of the official structure."""
    about, (asked,) = question.about, question.turns
    contents = ", ".join(about["contents"])
    text = PROMPT.format(contents, asked, about["reference"], answer[0])
    return [Request("", text, ((question.turns, answer[0]),))]


def readable(reply, part=""):
    """(rating,), or None unless the reply holds exactly one of the seven ratings."""
    found = [s for s in range(7) if f"rating: {s}" in reply.lower()]
    return (found[0],) if len(found) == 1 else None


def official(reply, part=""):
    """(rating,), 0 for a reply that holds none or several."""
    return readable(reply) or (0,)


def in_words(grades):
    """The reply of a judge that knows the truth: [(share told, errors)] -> a rating."""
    ((told, errors),) = grades
    return f"Rating: {round(2 * told) if errors else 3 + round(3 * told)}"


def values(question, scores):
    """Score, hallucinated, informative (RLHF-V: what is left of 3), 1; zeros without a score."""
    if scores[0] is None:
        return [0, 0, 0, 0]
    (s,) = scores[0]
    return [s, s < 3, s - 3 if s >= 3 else s, 1]


def figures(sums, groups):
    """Mean score, hallucination rate, informativeness (0 to 100), mean score of each type."""
    score, hallucinated, informative, n = np.moveaxis(sums, -1, 0)  # (..., G) each
    named = {
        "score": share(score, n)[..., 0],
        "hallucination_rate": share(hallucinated, n)[..., 0],
        "informativeness": share(informative, n)[..., 0] / 3 * 100,
    }
    return named | {g: share(score, n)[..., k] for k, g in enumerate(groups) if k}


def read_reviews(path, questions):
    """The official judge's file, chat completions in the order of the template -> replies."""
    contents = []
    for where, row in read_rows(path):
        try:
            contents.append(row["choices"][0]["message"]["content"] or "")
        except (LookupError, TypeError):
            raise BadInput(
                f"{where}: no choices[0].message.content; a chat completion is needed."
            ) from None
    if len(contents) != len(questions):
        raise BadInput(
            f"{path}: {len(contents)} replies to {len(questions)} questions; they are matched by "
            "their order."
        )
    return [[content] for content in contents]


def write_reviews(folder, questions, replies, name, judge):
    """mmhal_reviews.json, as the official script keeps its replies."""
    rows = [
        {"model": judge, "choices": [{"message": {"role": "assistant", "content": text}}]}
        for (text,) in replies
    ]
    write_json(Path(folder) / "mmhal_reviews.json", rows)
