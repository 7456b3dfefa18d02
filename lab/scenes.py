"""Scenes of the toy world and what is said of them: captions, questions, answers, corruptions.

The same functions write the data and the oracle's corrections. Each kind of scene has six usual
classes. The first two are its signature: what one expects there. A ghost is a signature object that
is absent from the image.
"""

import random
from dataclasses import dataclass, replace

from lab.drawing import CLASSES, SCENES, Thing

USUAL = {  # kind of scene -> its usual classes; the first two are its signature
    "kitchen": ("oven", "cup", "bowl", "banana", "chair", "clock"),
    "street": ("car", "traffic light", "person", "bicycle", "dog", "bench"),
    "beach": ("umbrella", "boat", "person", "kite", "bird", "dog"),
    "farm": ("cow", "sheep", "dog", "bird", "person", "bicycle"),
    "bedroom": ("bed", "book", "teddy bear", "cat", "clock", "laptop"),
    "park": ("bench", "dog", "bird", "kite", "bicycle", "person"),
    "living room": ("couch", "tv", "cat", "book", "potted plant", "clock"),
    "office": ("laptop", "chair", "book", "cup", "clock", "potted plant"),
}
SYNONYMS = {"bicycle": "bike", "couch": "sofa", "tv": "television", "oven": "stove"}
PLURALS = {"person": "people", "sheep": "sheep"}
PLACES = ("on the left", "in the middle", "on the right")
SLOTS = tuple((column, row) for column in range(3) for row in range(2))
OPENERS = ("This is {}.", "The picture shows {}.")
CAPTION_PROMPT = "Describe the image."
CAPTION_PROMPTS = (
    CAPTION_PROMPT,
    "What do you see in this picture?",
    "What is shown?",
    "Write a caption.",
)
SHORT = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Scene:
    """What is in an image: at most one Thing of each class, ordered by column, then row.

    A Thing may show two objects of its class.
    """

    kind: str
    things: tuple[Thing, ...]

    @property
    def present(self):
        """{class: Thing}."""
        return {thing.name: thing for thing in self.things}

    @property
    def ghosts(self):
        """The signature classes that are absent from the image."""
        return [name for name in USUAL[self.kind][:2] if name not in self.present]

    @property
    def strange(self):
        """The absent classes that are not signature classes."""
        return [
            name
            for name in CLASSES
            if name not in self.present and name not in USUAL[self.kind][:2]
        ]


@dataclass(frozen=True)
class Clause:
    """How a caption mentions a thing."""

    thing: Thing
    word: str  # the class or its synonym
    there: bool  # it begins with "there is"
    joined: bool  # "and" joins it to the clause before


def some_thing(name, slot, rng):
    """A random thing of this class in this slot. One in ten shows two objects."""
    colour = rng.choice(CLASSES[name]) if CLASSES[name] else None
    return Thing(name, colour, 2 if rng.random() < 0.1 else 1, *slot)


def some_scene(rng):
    """A random scene of 3 to 5 things."""
    kind = rng.choice(SCENES)

    names = []
    while not 3 <= len(names) <= 5:
        names = [
            name for i, name in enumerate(USUAL[kind]) if rng.random() < (0.36 if i < 2 else 0.4)
        ]
        if rng.random() < 0.12:
            names.append(rng.choice([name for name in CLASSES if name not in USUAL[kind]]))

    things = [
        some_thing(name, slot, rng) for name, slot in zip(names, rng.sample(SLOTS, len(names)))
    ]
    return Scene(kind, tuple(sorted(things, key=slot_of)))


def some_scenes(seed, sizes):
    """{split: {file name: Scene}}. No scene occurs twice. sizes: {split: number of scenes}."""
    seen, splits = set(), {}
    for split, size in sizes.items():
        splits[split] = {}
        for i in range(size):
            rng = random.Random(f"{seed}/{split}/{i}")
            scene = some_scene(rng)
            while scene in seen:
                scene = some_scene(rng)
            seen.add(scene)
            splits[split][f"{split}_{i:05d}.png"] = scene
    return splits


def slot_of(thing):
    """(column, row)."""
    return thing.column, thing.row


# ---- texts


def a(word):
    """A word with its article: "a cup", "an oven"."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def at(kind):
    """A kind of scene as a place: "in a kitchen", "on a beach"."""
    return f"{'on' if kind in ('street', 'beach', 'farm') else 'in'} {a(kind)}"


def plural(word):
    """The plural of a word: "people", "benches", "cups"."""
    return PLURALS.get(word) or word + ("es" if word.endswith(("ch", "sh", "s", "x")) else "s")


def listed(words):
    """Words as a list in a sentence: "a, b and c"."""
    return " and ".join([", ".join(words[:-1])] * (len(words) > 1) + [words[-1]])


def subject(word, colour, count):
    """The subject of a clause: "a red cup", "two red cups"."""
    colour = f"{colour} " if colour else ""
    return f"two {colour}{plural(word)}" if count == 2 else a(colour + word)


def tell(word, colour, count, column, there):
    """A clause: "a red cup is on the left", or if `there`: "there is a red cup on the left".

    Without a column: "there is a red cup".
    """
    verb, who = "are" if count == 2 else "is", subject(word, colour, count)
    if column is None:
        return f"there {verb} {who}"
    return f"there {verb} {who} {PLACES[column]}" if there else f"{who} {verb} {PLACES[column]}"


def sentence(text):
    """The text with a capital and a period."""
    return text[0].upper() + text[1:] + "."


def clauses_of(things, rng):
    """Random Clauses for things.

    One in five uses a synonym, if its class has one. Three in ten are joined to the clause before,
    unless that one is joined itself.
    """
    clauses = []
    for thing in things:
        word = SYNONYMS[thing.name] if thing.name in SYNONYMS and rng.random() < 0.2 else thing.name
        joined = bool(clauses) and not clauses[-1].joined and rng.random() < 0.3
        clauses.append(Clause(thing, word, rng.random() < 0.5, joined))
    return clauses


def render(opener, clauses):
    """The opener, then a sentence for each clause; joined clauses share a sentence."""
    texts = []
    for clause in clauses:
        thing = clause.thing
        text = tell(clause.word, thing.colour, thing.count, thing.column, clause.there)
        if clause.joined:
            texts[-1] += " and " + text
        else:
            texts.append(text)
    return " ".join([opener, *map(sentence, texts)])


def opener_of(scene, rng):
    """A random first sentence, which names the kind of scene."""
    return rng.choice(OPENERS).format(a(scene.kind))


def caption(scene, rng, noise=0.0):
    """A caption that mentions everything in the scene, then each ghost with probability `noise`.

    Ghosts come last: in captions of real models, too, hallucinations grow towards the end. They
    have one form ("There is ..."). If they were spread over places and forms, the truth would be
    likelier than any ghost at every place, and greedy decoding would never mention one.
    """
    free = [slot for slot in SLOTS if slot not in map(slot_of, scene.things)]
    ghosts = [
        some_thing(name, rng.choice(free or SLOTS), rng)
        for name in scene.ghosts
        if rng.random() < noise
    ]
    last = [replace(clause, there=True, joined=False) for clause in clauses_of(ghosts, rng)]
    return render(opener_of(scene, rng), clauses_of(scene.things, rng) + last)


def object_to_ask(scene, rng, asked=()):
    """A random class that is not in `asked`.

    40 % are present, 30 % are ghosts, 30 % are other absent classes.
    """
    weights = []
    kinds = []
    for weight, names in ((0.4, scene.present), (0.3, scene.ghosts), (0.3, scene.strange)):
        left = [name for name in names if name not in asked]
        if left:
            weights.append(weight)
            kinds.append(left)
    (names,) = rng.choices(kinds, weights)
    return rng.choice(names)


def yes_no(name, yes, short):
    """(prompt, answer) of POPE's question. `short`: with LLaVA's suffix and a one-word answer."""
    prompt = f"Is there {a(name)} in the image?"
    if short:
        return prompt + SHORT, "Yes" if yes else "No"
    return prompt, f"Yes, there is {a(name)}." if yes else f"No, there is no {name}."


def some_yes_no(scene, rng, noise=0.0, asked=()):
    """(class, prompt, answer) of a yes/no question.

    The answer affirms a ghost with probability `noise`.
    """
    name = object_to_ask(scene, rng, asked)
    yes = name in scene.present or (name in scene.ghosts and rng.random() < noise)
    return name, *yes_no(name, yes, rng.random() < 0.5)


def open_questions(scene):
    """Every open question of a scene: [(prompt, answer)]. The answers are always true."""
    rows = []
    for thing in scene.things:
        number, be, who = "one", "is", thing.name
        if thing.count == 2:
            number, be, who = "two", "are", plural(thing.name)
        rows.append((f"Where {be} the {who}?", f"The {who} {be} {PLACES[thing.column]}."))
        rows.append((f"How many {plural(thing.name)} are there?", f"There {be} {number} {who}."))
        if thing.colour:
            rows.append((f"What color {be} the {who}?", f"The {who} {be} {thing.colour}."))
    return rows


def some_choice(scene, rng):
    """(prompt, answer) of a lettered question. The wrong options are never ghosts."""
    names = rng.sample(scene.strange, 3)
    letter = rng.randrange(4)
    names.insert(letter, rng.choice(scene.things).name)
    options = "\n".join(f"{'ABCD'[i]}. {name}" for i, name in enumerate(names))
    ask = "Answer with the option's letter from the given choices directly."
    return f"Which object is in the image?\n{options}\n{ask}", "ABCD"[letter]


def facts():
    """Rows without an image, [(prompt, answer)]: facts about the classes and the kinds of scene."""
    rows = []
    for name, colours in CLASSES.items():
        places = [at(kind) for kind in SCENES if name in USUAL[kind]]
        rows.append(
            (f"Where do you find {a(name)}?", f"{a(name).capitalize()} is found {listed(places)}.")
        )
        rows.append((f"What is the plural of {name}?", f"The plural of {name} is {plural(name)}."))
        if colours:
            rows.append(
                (
                    f"What colors can {a(name)} have?",
                    f"{a(name).capitalize()} can be {listed(colours)}.",
                )
            )
        if name in SYNONYMS:
            rows.append(
                (
                    f"What is another word for {name}?",
                    f"Another word for {name} is {SYNONYMS[name]}.",
                )
            )

    for kind in SCENES:
        usual = [a(name) for name in USUAL[kind]]
        rows.append((f"What do you find {at(kind)}?", f"You find {listed(usual)}."))
        for name in CLASSES:
            usual = name in USUAL[kind]
            answer = f"{a(name)} is usual" if usual else f"{a(name)} is not usual"
            rows.append(
                (
                    f"Is {a(name)} usual {at(kind)}?",
                    f"{'Yes' if usual else 'No'}, {answer} {at(kind)}.",
                )
            )
    return rows


def corrupted(scene, rng):
    """(true caption, corrupted caption).

    The corrupted caption has one or two plausible errors; all its other words are the same.
    """
    opener, true = opener_of(scene, rng), clauses_of(scene.things, rng)
    wrong, touched = true, set()
    for _ in range(rng.choice((1, 2))):
        # error -> [(class that it touches, the clauses with the error)]
        edits = {
            "insert": [],
            "colour": [],
            "count": [],
            "column": [],
        }

        # insert a usual class that is absent
        for name in USUAL[scene.kind]:
            if name not in {clause.thing.name for clause in wrong}:
                (new,) = clauses_of([some_thing(name, rng.choice(SLOTS), rng)], rng)
                at = sum(slot_of(clause.thing) <= slot_of(new.thing) for clause in wrong)
                edits["insert"].append((name, [*wrong[:at], new, *wrong[at:]]))

        # change an attribute of a thing that has no error yet
        columns = [0, *(clause.thing.column for clause in wrong), 2]
        for i, clause in enumerate(wrong):
            thing = clause.thing
            if thing.name not in touched:
                changes = [("colour", colour) for colour in CLASSES[thing.name]]
                changes += [("count", 3 - thing.count)]
                # Only columns that keep the order of the clauses: otherwise the order alone would
                # show the error.
                changes += [("column", column) for column in range(columns[i], columns[i + 2] + 1)]
                for attribute, value in changes:
                    if value != getattr(thing, attribute):
                        other = replace(clause, thing=replace(thing, **{attribute: value}))
                        edits[attribute].append((thing.name, [*wrong[:i], other, *wrong[i + 1 :]]))

        # choose a kind of error, "insert" twice as often, then an error
        kinds = ("insert", "insert", "colour", "count", "column")
        kind = rng.choice([kind for kind in kinds if edits[kind]])
        name, wrong = rng.choice(edits[kind])
        touched.add(name)
    return render(opener, true), render(opener, wrong)
