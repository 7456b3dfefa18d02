"""A world whose truth is known: draws scenes and writes them in the public layouts.

The fault that a model learns here is bias, not blindness. Each kind of scene has six usual classes.
The first two are its signature: what one expects there. A ghost is a signature object that is
absent from the image. Supervised captions and yes/no answers mention a ghost with probability
NOISE, drawn anew for every statement. All else in the data is true. So a model that sees well still
says too much. The truth is on disk (scenes.json), so every hallucination can be counted instead of
judged.

    python -m lab.toyworld --seed 0 --out DIR
        a world: images, questions, preferences
    python -m lab.toyworld --seed 0 --out DIR --answers-of MODEL
        preferences among a model's own answers to that world
"""

import json
import multiprocessing
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

from common import new_folder, run, whole_folder
from lab import drawing
from lab.drawing import CLASSES, SCENES, Thing

NOISE = 0.8
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


def slot_of(thing):
    """(column, row)."""
    return thing.column, thing.row


# ---- texts: the same functions write the data and the oracle's corrections


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


# ---- files


def turns(prompt, answer):
    """A LLaVA dialogue of one round."""
    return [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]


def instruct_rows(scenes, rng):
    """Rows of LLaVA-Instruct: seven for each image, and the facts.

    As in the real data, the placeholder may stand at the end (one in five).
    """
    rows = []
    for image, scene in scenes.items():
        # a caption, five yes/no questions, an open or a lettered question
        asked = []
        rounds = [(rng.choice(CAPTION_PROMPTS), caption(scene, rng, NOISE))]
        for _ in range(5):
            name, prompt, answer = some_yes_no(scene, rng, NOISE, asked)
            asked.append(name)
            rounds.append((prompt, answer))
        if rng.random() < 0.75:
            rounds.append(rng.choice(open_questions(scene)))
        else:
            rounds.append(some_choice(scene, rng))

        for i, (prompt, answer) in enumerate(rounds):
            prompt = prompt + "\n<image>" if rng.random() < 0.2 else "<image>\n" + prompt
            rows.append(
                {
                    "id": f"{Path(image).stem}_{i}",
                    "image": image,
                    "conversations": turns(prompt, answer),
                }
            )

    rows += [
        {"id": f"text_{i:05d}", "conversations": turns(*fact)} for i, fact in enumerate(facts())
    ]
    rng.shuffle(rows)
    return rows


def povid_rows(scenes, rng):
    """Rows of POVID, two for each image.

    One is a true caption against its corruption, the other a right yes/no answer against the wrong
    one.
    """
    rows = []
    for image, scene in scenes.items():
        name = object_to_ask(scene, rng)
        short = rng.random() < 0.5
        present = name in scene.present
        prompt, right = yes_no(name, present, short)
        _, wrong = yes_no(name, not present, short)
        pairs = [(rng.choice(CAPTION_PROMPTS), *corrupted(scene, rng)), (prompt, right, wrong)]

        for i, (prompt, chosen, rejected) in enumerate(pairs):
            row = {"id": f"{Path(image).stem}_{i}", "image": image}
            for key, answer in (("conversations", chosen), ("rejected_conversations", rejected)):
                row[key] = turns("<image>\n" + prompt, answer)
            rows.append(row)
    return rows


def pope_rows(scenes, images, rng):
    """POPE's three lists, as its builder makes them -> {split: rows}.

    For each image: three present objects, each followed by an absent one. The absent class is
    random        any class
    popular       the class that is most frequent in `scenes`
    adversarial   the class that occurs most often together with the present object just asked about
    A class is used at most once for an image.
    """
    frequency = Counter(name for scene in scenes.values() for name in scene.present)
    together = Counter(pair for scene in scenes.values() for pair in permutations(scene.present, 2))

    lists = {"random": [], "popular": [], "adversarial": []}
    for split, rows in lists.items():
        for image in images:
            used = set(scenes[image].present)
            for thing in scenes[image].things[:3]:
                left = [name for name in CLASSES if name not in used]
                if split == "random":
                    absent = rng.choice(left)
                elif split == "popular":
                    absent = max(left, key=lambda name: frequency[name])
                else:
                    absent = max(left, key=lambda name: together[thing.name, name])
                used.add(absent)

                for name, label in ((thing.name, "yes"), (absent, "no")):
                    row = {
                        "question_id": len(rows) + 1,
                        "image": image,
                        "text": yes_no(name, True, False)[0],
                    }
                    rows.append(row | {"label": label})
    return lists


def coco(scenes, size, rng):
    """(instances, captions) in COCO's layout. A box is the slot, or half of it for each of two."""
    categories = [
        {"id": i, "name": name, "supercategory": "object"} for i, name in enumerate(CLASSES, 1)
    ]
    ids = {category["name"]: category["id"] for category in categories}

    images, boxes, captions = [], [], []
    for name, scene in scenes.items():
        number = int(Path(name).stem.split("_")[1])
        images.append({"id": number, "file_name": name, "width": size, "height": size})
        for thing in scene.things:
            wide, high = size / 3 / thing.count, size / 2
            for i in range(thing.count):
                box = [
                    round(thing.column * size / 3 + i * wide, 1),
                    thing.row * high,
                    round(wide, 1),
                    high,
                ]
                row = {
                    "id": len(boxes) + 1,
                    "image_id": number,
                    "category_id": ids[thing.name],
                    "bbox": box,
                }
                boxes.append(row | {"area": round(wide * high, 1), "iscrowd": 0})

        for _ in range(2):
            captions.append(
                {"id": len(captions) + 1, "image_id": number, "caption": caption(scene, rng)}
            )

    instances = {"images": images, "annotations": boxes, "categories": categories}
    return instances, {"images": images, "annotations": captions}


def write_json(path, value):
    """Write a value as JSON on one line."""
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")


def write_rows(path, rows, lines=False):
    """Write rows, one a line: JSON lines if `lines`, else a JSON array."""
    rows = [json.dumps(row) for row in rows]
    path.write_text(
        "\n".join(rows) + "\n" if lines else "[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8"
    )


def draw_one(job):
    """Draw one image. job: (path, scene, seed, size)."""
    path, scene, seed, size = job
    picture = drawing.draw(
        scene.kind, list(scene.things), random.Random(f"{seed}/drawing/{path.name}"), size
    )
    picture.save(path, compress_level=1)


def draw_all(jobs):
    """Draw all images, in two processes if there are enough jobs to make that faster."""
    if len(jobs) < 1000:
        return [draw_one(job) for job in jobs]
    started = time.time()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for i, _ in enumerate(pool.imap_unordered(draw_one, jobs, chunksize=50), 1):
            if i == len(jobs) or (i % 100 == 0 and sys.stderr.isatty()):
                rate = i / (time.time() - started)
                end = "\n" if i == len(jobs) else ""
                line = (
                    f"\rtoy world: {i}/{len(jobs)} images, {rate:.0f}/s, "
                    f"{(len(jobs) - i) / rate:.0f} s left "
                )
                print(line, end=end, file=sys.stderr, flush=True)


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


def write(folder, seed, instruct_images=5000, preference_images=1500, test_images=1000, size=144):
    """Write a world. The same seed and sizes give the same bytes.

    images/*.png
    instruct.json                               LLaVA-Instruct
    povid.json                                  POVID
    povid_seen.json                             POVID, with images of instruct.json
    pope_{random,popular,adversarial}.json      POPE
    instances.json, captions.json               COCO
    synonyms.txt                                CHAIR
    image_to_caption.json                       captions as facts
    scenes.json                                 the truth

    The folder is either whole or absent. BadInput if it exists.
    """
    with whole_folder(new_folder(folder), flush=False) as aside:
        (aside / "images").mkdir()
        splits = some_scenes(
            seed,
            {"instruct": instruct_images, "preference": preference_images, "test": test_images},
        )
        scenes = splits["instruct"] | splits["preference"] | splits["test"]
        draw_all([(aside / "images" / name, scene, seed, size) for name, scene in scenes.items()])
        write_files(aside, seed, splits, size)


def write_files(folder, seed, splits, size):
    """Write everything except the images."""
    rng = random.Random(f"{seed}/texts")
    rows = instruct_rows(splits["instruct"], rng)
    write_rows(folder / "instruct.json", rows)
    write_rows(folder / "povid.json", povid_rows(splits["preference"], rng))
    for split, questions in pope_rows(splits["test"], list(splits["test"])[:134], rng).items():
        write_rows(folder / f"pope_{split}.json", questions, lines=True)

    # COCO, and the synonyms of CHAIR
    instances, captions = coco(splits["test"], size, rng)
    write_json(folder / "instances.json", instances)
    write_json(folder / "captions.json", captions)
    # irregular plurals too: the rules of a scorer miss them
    forms = [(name, SYNONYMS.get(name), PLURALS.get(name)) for name in CLASSES]
    lines = [", ".join(dict.fromkeys(filter(None, words))) for words in forms]
    (folder / "synonyms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    # captions as facts
    known = splits["instruct"] | splits["preference"]
    facts_of_images = {
        image: [caption(scene, rng) for _ in range(rng.choice((2, 3)))]
        for image, scene in known.items()
    }
    write_json(folder / "image_to_caption.json", facts_of_images)

    # preferences on images of instruct.json
    seen = dict(list(splits["instruct"].items())[: len(splits["preference"])])
    write_rows(folder / "povid_seen.json", povid_rows(seen, random.Random(f"{seed}/seen")))

    # the truth
    everything = known | splits["test"]
    truth = {
        image: {"kind": s.kind, "things": [vars(thing) for thing in s.things]}
        for image, s in everything.items()
    }
    write_json(folder / "scenes.json", truth)


if __name__ == "__main__":
    from lab.toy import main  # a command, not a part of this module: it may import from above

    run(main)
