"""What the toy LLM learns to read before it sees: questions about a described scene, text only.

A description is a caption, or two captions as facts. Behind it stands one of twelve tasks:

    yes_no   is there a cup?            where    where is the cup?      count  how many cups?
    color    what color is the cup?     choice   A, B, C or D?          list   name all objects
    sort     in alphabetical order      first    the first two          place  what is on the left?
    rewrite  again, without colors      colors   which colors?          verify is all of this true?

Everything is true. The answer to every question stands in the description, so the text score (exact
match) measures reading, and nothing else. `verify` compares with a retelling that is true or, in
half of the rows, corrupted as in povid.json. In a third of its rows the description comes last, as
the facts do in what a reward model reads. One row in nine is a dialogue of two questions.

    text.json        what the LLM is trained on before visual tuning
    text_mix.json    what is mixed into visual tuning; its size is the dial of how much stays: with
                     this one visual tuning takes 13, 8 and 18 % of the text score (seeds 0 to 2)
    text_test.json   the text score's questions, each with its `task`

All three are LLaVA-Instruct's layout without images. No scene is in two of them.
"""

import json
import random
from dataclasses import replace

from lab.scenes import (
    PLACES,
    caption,
    clauses_of,
    corrupted,
    listed,
    open_questions,
    opener_of,
    render,
    some_choice,
    some_scenes,
    some_yes_no,
    subject,
)

SIZES = {"text": 20_000, "text_mix": 500, "text_test": 300}  # descriptions
QUESTIONS = 6  # a description
TEST_QUESTIONS = 4
INTRO = "The picture shows:"  # as in what a reward model reads
VERIFY = "Is all of this true? {}"


# ---- tasks: (scene, clauses of its description, rng) -> (question, answer)


def yes_no(scene, clauses, rng):
    """POPE's question, in one word or in a sentence."""
    return some_yes_no(scene, rng)[1:]


def asked(start):
    """A task that asks one of the open questions that begin so."""

    def task(scene, clauses, rng):
        rows = [row for row in open_questions(scene) if row[0].startswith(start)]
        return rng.choice(rows) if rows else None

    return task


def choice(scene, clauses, rng):
    """A lettered question."""
    return some_choice(scene, rng)


def names(clauses):
    """The classes in the order of the description."""
    return [clause.thing.name for clause in clauses]


def name_all(scene, clauses, rng):
    """All objects."""
    return "Name the objects.", ", ".join(names(clauses)) + "."


def sort(scene, clauses, rng):
    """All objects in alphabetical order."""
    return "Name the objects in alphabetical order.", ", ".join(sorted(names(clauses))) + "."


def first(scene, clauses, rng):
    """The first two objects."""
    return "Which two objects are named first?", listed(names(clauses)[:2]) + "."


def place(scene, clauses, rng):
    """What is in one of the three places."""
    column = rng.randrange(3)
    there = [t for t in (clause.thing for clause in clauses) if t.column == column]
    things = [subject(t.name, t.colour, t.count) for t in there]
    return f"What is {PLACES[column]}?", (listed(things) if things else "nothing") + "."


def colors(scene, clauses, rng):
    """The colours, in the order of the description."""
    named = dict.fromkeys(clause.thing.colour for clause in clauses if clause.thing.colour)
    return "Which colors are named?", (", ".join(named) if named else "none") + "."


def verify(scene, clauses, rng):
    """A retelling, true or corrupted."""
    retellings = corrupted(scene, rng)
    true = rng.random() < 0.5
    return VERIFY.format(retellings[not true]), "Yes" if true else "No"


def rewrite(opener, clauses):
    """The description without colours. It is a task of descriptions that are one caption."""
    bare = [replace(c, thing=replace(c.thing, colour=None)) for c in clauses]
    return "Tell it again without colors.", render(opener, bare)


TASKS = {
    "yes_no": yes_no,
    "where": asked("Where"),
    "count": asked("How many"),
    "color": asked("What color"),
    "choice": choice,
    "list": name_all,
    "sort": sort,
    "first": first,
    "place": place,
    "colors": colors,
    "verify": verify,
}


# ---- rows


def turns(prompt, answer):
    """A LLaVA dialogue of one round."""
    return [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]


def write_rows(path, rows, lines=False):
    """Write rows, one a line: JSON lines if `lines`, else a JSON array."""
    rows = [json.dumps(row) for row in rows]
    path.write_text(
        "\n".join(rows) + "\n" if lines else "[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8"
    )


def questions(scene, rng, count):
    """(description, [(task, question, answer)]): `count` different tasks about one scene."""
    opener, clauses = opener_of(scene, rng), clauses_of(scene.things, rng)
    text, facts = render(opener, clauses), rng.random() < 0.5
    asked = {name: task(scene, clauses, rng) for name, task in TASKS.items()}
    if facts:
        text = "\n- ".join([INTRO, text, caption(scene, rng)])
    else:
        asked["rewrite"] = rewrite(opener, clauses)
    usable = [name for name in asked if asked[name]]
    return text, [(name, *asked[name]) for name in rng.sample(usable, count)]


def train_rows(scenes, rng):
    """Rows of LLaVA-Instruct without images, those of one description beside each other."""
    rows = []
    for name, scene in scenes.items():
        description, tasks = questions(scene, rng, QUESTIONS)
        two = rng.random() < 0.6  # of six questions two are one dialogue: one row in nine
        for i, (task, question, answer) in enumerate(tasks):
            if task == "verify" and rng.random() < 1 / 3:
                dialogue = turns(f"{question}\n{description}", answer)
            elif two and i == 1:
                continue
            else:
                dialogue = turns(f"{description}\n{question}", answer)
                if two and i == 0:
                    dialogue += turns(*tasks[1][1:])
            rows.append({"id": f"{name}_{i}", "conversations": dialogue})
    return rows


def test_rows(scenes, rng):
    """One question a row, with its task."""
    rows = []
    for name, scene in scenes.items():
        description, tasks = questions(scene, rng, TEST_QUESTIONS)
        for i, (task, question, answer) in enumerate(tasks):
            last = task == "verify" and rng.random() < 1 / 3
            text = f"{question}\n{description}" if last else f"{description}\n{question}"
            row = {"id": f"{name}_{i}", "task": task, "conversations": turns(text, answer)}
            rows.append(row)
    return rows


def write(folder, seed, sizes=SIZES):
    """Write text.json, text_mix.json and text_test.json into the folder of a world."""
    for split, scenes in some_scenes(seed, sizes).items():
        scenes = {name.removesuffix(".png"): scene for name, scene in scenes.items()}
        make = test_rows if split == "text_test" else train_rows
        rng = random.Random(f"{seed}/reading/{split}")
        write_rows(folder / f"{split}.json", make(scenes, rng))
