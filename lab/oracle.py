"""The toy world's oracle: compares answers about an image with the truth, corrects and rates them.

It stands where the papers use GPT-4V, Gemini or a person: as preference annotator, as rater of five
attributes, as judge.
"""

import json
import os
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common import BadInput
from lab.drawing import CLASSES, COLOURS, SCENES, Thing
from lab.reading import write_rows
from lab.scenes import (
    CAPTION_PROMPTS,
    PLACES,
    SHORT,
    SYNONYMS,
    Scene,
    a,
    caption,
    open_questions,
    plural,
    sentence,
    some_yes_no,
    tell,
    yes_no,
)

WORDS = [(name, word) for name in CLASSES for word in (name, SYNONYMS.get(name, name))]
# form -> (class, word in the singular): "sofas" -> ("couch", "sofa")
KNOWN = {form: (name, word) for name, word in WORDS for form in (word, plural(word))}
NOUN = "|".join(sorted(KNOWN, key=len, reverse=True))
COLOUR = "|".join(COLOURS)
MENTION = re.compile(rf"\b({NOUN})\b", re.I)
OPENER = re.compile(
    rf"(?:this is|the picture shows|the image shows) an? (?P<kind>{'|'.join(SCENES)})", re.I
)
CLAUSE = re.compile(
    r"(?:yes, )?(?P<there>there (?:is|are) )?(?P<count>an?|one|two|the) "
    rf"(?:(?P<colour>{COLOUR}) )?(?P<noun>{NOUN})"
    rf"(?: (?:is|are))?(?: (?:(?P<place>{'|'.join(PLACES)})|(?P<predicate>{COLOUR})))?",
    re.I,
)
QUESTIONS = {
    "yes_no": re.compile(r"Is there an? (?P<noun>.+?) in the image\?"),
    "colour": re.compile(r"What color (?:is|are) the (?P<noun>.+?)\?"),
    "column": re.compile(r"Where (?:is|are) the (?P<noun>.+?)\?"),
    "count": re.compile(r"How many (?P<noun>.+?) are there\?"),
    "choice": re.compile(r"Which object is in the image\?\n(?P<options>(?:[A-Z]\. .+\n)+)"),
}


@dataclass(frozen=True)
class Claim:
    """What a clause says.

    An opener ("This is a kitchen") has only `span` and `kind`; an unreadable clause only `span`.
    """

    span: tuple[int, int]
    name: str | None = None
    colour: str | None = None
    count: int | None = None
    column: int | None = None
    kind: str | None = None
    word: str | None = None
    there: bool = False


def mentions(text):
    """The classes that the text names, in order and with repetition."""
    return [KNOWN[form.lower()][0] for form in MENTION.findall(text)]


def claim_of(clause, start=0):
    """A clause -> Claim. start: position of the clause in the text."""
    span = start, start + len(clause)
    if match := OPENER.fullmatch(clause):
        return Claim(span, kind=match["kind"].lower())
    match = CLAUSE.fullmatch(clause)
    if not match:
        return Claim(span)

    name, word = KNOWN[match["noun"].lower()]
    colour = match["colour"] or match["predicate"]
    place = match["place"]
    return Claim(
        span,
        name,
        colour=colour and colour.lower(),
        count={"a": 1, "an": 1, "one": 1, "two": 2, "the": None}[match["count"].lower()],
        column=PLACES.index(place.lower()) if place else None,
        word=word,
        there=bool(match["there"]),
    )


def sentences(text):
    """The Claims of each sentence, one for each clause.

    A sentence ends at a period, an exclamation mark or a line's end. " and " joins clauses.
    """
    by_sentence = []
    for part in re.finditer(r"[^.!\n]+", text):
        start = part.start()
        of_sentence = []
        for clause in part[0].split(" and "):
            if clause.strip():
                indent = len(clause) - len(clause.lstrip())
                of_sentence.append(claim_of(clause.strip(), start + indent))
            start += len(clause) + len(" and ")
        by_sentence.append(of_sentence)
    return by_sentence


def claims(text):
    """One Claim for each clause of the text."""
    return [claim for of_sentence in sentences(text) for claim in of_sentence]


def slips(scene, claim):
    """Names of a claim's wrong attributes: "kind", or "colour", "count", "column" of a thing."""
    if claim.kind:
        return [] if claim.kind == scene.kind else ["kind"]
    thing = scene.present.get(claim.name)
    wrong = []
    for key in ("colour", "count", "column") if thing else ():
        value = getattr(claim, key)
        if value is not None and value != getattr(thing, key):
            wrong.append(key)
    return wrong


class Oracle:
    """Knows what is in every image of a world; judges answers, corrects them, rates them.

    A prompt that is none of this world's questions (placeholder and suffix aside) is taken as a
    request to describe the image.
    """

    def __init__(self, folder):
        truth = json.loads((Path(folder) / "scenes.json").read_text(encoding="utf-8"))
        self.scenes = {}
        for name, scene in truth.items():
            self.scenes[name] = Scene(
                scene["kind"], tuple(Thing(**thing) for thing in scene["things"])
            )

    def scene(self, image):
        """The Scene of an image, given as a path or a file name."""
        name = Path(image).name
        if name not in self.scenes:
            raise BadInput(
                f"{image} is no picture of this world; "
                f"its scenes.json knows {len(self.scenes)} others."
            )
        return self.scenes[name]

    def question(self, image, prompt):
        """(kind, class asked about, true answer). A request to describe has only the kind."""
        scene = self.scene(image)
        for kind, pattern in QUESTIONS.items():
            match = pattern.search(prompt)
            if not match:
                continue
            if kind == "choice":
                options = dict(re.findall(r"([A-Z])\. (.+)", match["options"]))
                right = [letter for letter, name in options.items() if name in scene.present]
                return kind, None, right[0] if right else "None of them."
            name = KNOWN.get(match["noun"], (match["noun"],))[0]
            if kind == "yes_no":
                return kind, name, yes_no(name, name in scene.present, SHORT in prompt)[1]
            right = [answer for question, answer in open_questions(scene) if question == match[0]]
            return kind, name, right[0] if right else f"There is no {name}."
        return "describe", None, None

    def judge(self, image, prompt, answer):
        """Counts of what is right and wrong in an answer.

        true         objects that are there; 1 for a right short answer
        false        mentioned objects that are absent
        wrong        wrong attributes
        missed       objects that are not mentioned
        unreadable   clauses that cannot be read
        words        words
        errors       what must be corrected: false + wrong + unreadable, and for a short answer
                     + missed; a description may leave objects out
        """
        scene = self.scene(image)
        kind, name, right = self.question(image, prompt)
        counts = dict.fromkeys(("true", "false", "wrong", "missed", "unreadable"), 0)

        if answer.strip() == right:
            counts["true"] = 1
        elif kind == "yes_no":
            words = set(re.findall("[a-z]+", answer.lower()))
            named = set(mentions(answer))
            no = bool(words & {"no", "not"})
            yes = not no and ("yes" in words or name in named)
            if not (yes or no) or named - {name}:
                counts["unreadable"] = 1
            elif name in scene.present:
                counts["true" if yes else "missed"] = 1
            else:
                counts["true" if no else "false"] = 1
        elif kind == "choice":
            name = dict(re.findall(r"([A-Z])\. (.+)", prompt)).get(answer.strip()[:1])
            if name in scene.present:
                counts["true"] = 1
            else:
                counts["false" if name else "unreadable"] = 1
        else:
            made = claims(answer)
            for claim in made:
                named = [claim.name] if claim.name else mentions(answer[slice(*claim.span)])
                counts["false"] += sum(other not in scene.present for other in named)
                counts["wrong"] += len(slips(scene, claim))
                counts["unreadable"] += not (claim.name or claim.kind)
            if kind == "describe":
                counts["true"] = len(scene.present.keys() & set(mentions(answer)))
                counts["missed"] = len(scene.things) - counts["true"]
            else:
                answered = any(
                    claim.name == name and getattr(claim, kind) is not None for claim in made
                )
                counts["missed"] = int(not answered)
                counts["true"] = int(not any(counts.values()))

        errors = counts["false"] + counts["wrong"] + counts["unreadable"]
        if kind != "describe":
            errors += counts["missed"]
        return counts | {"words": len(answer.split()), "errors": errors}

    def correct(self, image, prompt, answer, rng):
        """The answer as an annotator of RLHF-V would correct it: what is true stays, word for word.

        In a description, false and unreadable clauses are removed and wrong attributes replaced. If
        nothing is left, a true caption replaces it. A wrong short answer becomes the true one.
        """
        if not self.judge(image, prompt, answer)["errors"]:
            return answer
        scene = self.scene(image)
        kind, name, right = self.question(image, prompt)
        if kind == "yes_no":
            return yes_no(name, name in scene.present, len(answer.split()) == 1)[1]
        if kind != "describe":
            return right

        # a description, clause by clause
        mentioned = {claim.name for claim in claims(answer) if not slips(scene, claim)}
        kept = []
        for of_sentence in sentences(answer):
            clauses = []
            for claim in of_sentence:
                text = answer[slice(*claim.span)]
                thing = scene.present.get(claim.name)
                wrong = slips(scene, claim)
                if claim.kind and wrong:
                    clauses.append(re.sub(rf"an? {claim.kind}$", a(scene.kind), text, flags=re.I))
                elif wrong and claim.name not in mentioned:
                    colour = claim.colour and thing.colour
                    column = None if claim.column is None else thing.column
                    clauses.append(tell(claim.word, colour, thing.count, column, claim.there))
                    mentioned.add(claim.name)
                elif not wrong and (claim.kind or thing):
                    clauses.append(text)
            if clauses:
                kept.append(sentence(" and ".join(clauses)))
        return " ".join(kept) or caption(scene, rng)

    def rate(self, image, prompt, answer):
        """The five attributes of HelpSteer, 0 to 4.

        helpfulness   4 x the share of the present objects that a description names; 4 for a right
                      short answer
        correctness   4, less 1 for every error; 0 for a wrong short answer
        coherence     4, less 2 for every unreadable clause and 1 for every repeated object
        complexity    1 for every three attributes
        verbosity     1 for every ten words
        """
        counts = self.judge(image, prompt, answer)
        short = self.question(image, prompt)[0] != "describe"
        if short:
            helpful = not counts["errors"]
        else:
            helpful = counts["true"] / max(1, counts["true"] + counts["missed"])

        named = mentions(answer)
        repeated = len(named) - len(set(named))
        attributes = 0
        for claim in claims(answer):
            values = (claim.colour, claim.count, claim.column)
            attributes += sum(value is not None for value in values)
        return {
            "helpfulness": round(4 * helpful),
            "correctness": max(0, 4 - counts["errors"] * (4 if short else 1)),
            "coherence": max(0, 4 - 2 * counts["unreadable"] - repeated),
            "complexity": min(4, attributes // 3),
            "verbosity": min(4, counts["words"] // 10),
        }

    def rate_vlfeedback(self, image, prompt, answer):
        """VLFeedback's aspects, "1" to "5": helpfulness and correctness of `rate`, plus 1.

        Nothing is unethical.
        """
        rated = self.rate(image, prompt, answer)
        return {
            "Helpfulness": str(1 + rated["helpfulness"]),
            "Ethical Considerations": "5",
            "Visual Faithfulness": str(1 + rated["correctness"]),
        }


# ---- preferences among a model's own answers


def preference_prompts(folder, seed):
    """[(image, prompt)]: for each preference image, a request for a caption and four questions.

    The questions are yes/no. Among four samples, nearly every caption prompt has a wrong one, and
    one yes/no question in three.
    """
    rng = random.Random(f"{seed}/preference prompts")
    prompts = []
    for image, scene in Oracle(folder).scenes.items():
        if image.startswith("preference_"):
            prompts.append((image, rng.choice(CAPTION_PROMPTS)))
            asked = []
            for _ in range(4):
                name, prompt, _ = some_yes_no(scene, rng, asked=asked)
                asked.append(name)
                prompts.append((image, prompt))
    return prompts


def preferences_from_answers(prompts, answers, oracle, folder, rng):
    """Write vlfeedback.jsonl and rlhf_v.jsonl to a folder -> counts.

    vlfeedback.jsonl holds ranked samples; rlhf_v.jsonl a wrong sample and its correction.
    prompts: [(image, prompt)]. answers: the samples for each prompt. Empty samples are left out,
    because no reader takes them. Among several wrong samples of a prompt, one is drawn.

    The counts are {"vlfeedback": rows, "rlhf_v": rows, "empty": samples, "right": prompts without a
    wrong sample, which have no row in rlhf_v.jsonl}.
    """
    folder = Path(folder)
    ranked = []
    corrected = []
    counts = Counter(vlfeedback=0, rlhf_v=0, empty=0, right=0)
    for (image, prompt), samples in zip(prompts, answers, strict=True):
        # rate the samples
        completions = []
        wrong = []
        for i, sample in enumerate(samples):
            judged = oracle.judge(image, prompt, sample)
            ratings = oracle.rate_vlfeedback(image, prompt, sample)
            if not sample.strip():
                counts["empty"] += 1
                continue
            why = ", ".join(f"{count} {key}" for key, count in judged.items())
            notes = {
                aspect: {"Rating": rating, "Rationale": why} for aspect, rating in ratings.items()
            }
            completions.append({"model": f"sample-{i}", "response": sample, "annotations": notes})
            if judged["errors"]:
                wrong.append(sample)

        # rank them
        ranked.append(
            {
                "id": Path(image).stem,
                "image": image,
                "prompt": prompt,
                "models": [completion["model"] for completion in completions],
                "completions": completions,
            }
        )

        # correct one of the wrong samples
        if not wrong:
            counts["right"] += 1
            continue
        rejected = rng.choice(wrong)
        chosen = oracle.correct(image, prompt, rejected, rng)
        describe = oracle.question(image, prompt)[0] == "describe"
        kind = "detailed_description" if describe else "question_answering"
        text = {"question": prompt, "chosen": chosen, "rejected": rejected}
        corrected.append(
            {
                "ds_name": "toyworld",
                "image": image,
                "text": json.dumps(text),
                "origin_dataset": "toyworld",
                "origin_split": json.dumps({"model": "sample", "type": kind}),
                "idx": len(corrected),
                "image_path": image,
            }
        )

    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("vlfeedback", ranked), ("rlhf_v", corrected)):
        counts[name] = len(rows)
        aside = folder / f"{name}.jsonl.{os.getpid()}"
        write_rows(aside, rows, lines=True)
        aside.replace(folder / f"{name}.jsonl")
    return dict(counts)


def answers_of(model_dir, folder, out, seed, k=4, temperature=1.0, max_new_tokens=96):
    """Write preferences among a checkpoint's own answers to the folder `out` -> counts.

    It answers each preference prompt of the world in `folder` k times.
    """
    from data import Record
    from formats import checkpoints
    from sampling import generate

    prompts = preference_prompts(folder, seed)
    images = Path(folder) / "images"
    records = [Record(f"{folder}, {image}", images / image, (prompt,)) for image, prompt in prompts]
    model, processor = checkpoints.load(model_dir)

    answers = generate(
        model, processor, records, max_new_tokens, temperature, k, seed=seed, label="answers"
    )
    return preferences_from_answers(
        prompts, answers, Oracle(folder), out, random.Random(f"{seed}/corrections")
    )
