"""A world whose truth is known: draws scenes and writes them in the public layouts.

The fault that a model learns here is bias, not blindness. Supervised captions and yes/no answers
mention a ghost (lab/scenes.py), an object that one expects there and that is absent, with
probability NOISE and ANSWER_NOISE, drawn anew for every statement. All else in the data is true. So
a model that sees well still says too much. The truth is on disk (scenes.json), so every
hallucination can be counted instead of judged.

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
from itertools import permutations
from pathlib import Path

from common import new_folder, run, whole_folder
from lab import drawing, reading
from lab.drawing import CLASSES
from lab.reading import turns, write_rows
from lab.scenes import (
    CAPTION_PROMPTS,
    PLURALS,
    SYNONYMS,
    caption,
    corrupted,
    facts,
    object_to_ask,
    open_questions,
    some_choice,
    some_scenes,
    some_yes_no,
    yes_no,
)

NOISE = 0.8  # of captions
# Of yes/no answers. At .8 hardly any answer about a signature object depends on the image, so that
# the model does not learn to look, and DPO finds nothing to turn: adversarial POPE rose by .012.
ANSWER_NOISE = 0.65


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
            name, prompt, answer = some_yes_no(scene, rng, ANSWER_NOISE, asked)
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


def write(
    folder,
    seed,
    instruct_images=5000,
    preference_images=1500,
    test_images=1000,
    size=144,
    texts=reading.SIZES,
):
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
    text.json, text_mix.json, text_test.json    texts without images (lab/reading.py)

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
        reading.write(aside, seed, texts)


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
