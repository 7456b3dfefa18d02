"""The toy world: its files, the disease, and the oracle that knows the truth."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from common import BadInput
from lab import drawing, parts, toy, toyworld
from lab import scenes as scenes_of
from lab.oracle import Oracle, claims, mentions, preference_prompts, preferences_from_answers
from lab.drawing import Thing
from lab.scenes import SHORT, Scene
from lab.toyworld import ANSWER_NOISE, NOISE

ROOT = Path(__file__).parents[1]
TEXTS = {"text": 9, "text_mix": 40, "text_test": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "world"
    toyworld.write(
        folder, 5, instruct_images=400, preference_images=150, test_images=140, size=48, texts=TEXTS
    )
    parts.write(folder / "parts", folder, 5, epochs=0)
    return folder


@pytest.fixture(scope="module")
def oracle(folder):
    return Oracle(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "parts" / "llm")


def load(folder, name):
    return json.loads((folder / name).read_text())


def turns(row, key="conversations"):
    prompt, answer = (turn["value"] for turn in row[key])
    return prompt.replace("<image>", "").strip(), answer


def oracle_of(folder, scenes):
    truth = {
        image: {"kind": s.kind, "things": [vars(thing) for thing in s.things]}
        for image, s in scenes.items()
    }
    (folder / "scenes.json").write_text(json.dumps(truth))
    return Oracle(folder)


@pytest.fixture
def one(tmp_path):
    """An oracle of one picture: a red cup and two bananas on the left, an orange bowl on the right of a kitchen."""
    things = (
        Thing("cup", "red", 1, 0, 0),
        Thing("banana", None, 2, 0, 1),
        Thing("bowl", "orange", 1, 2, 0),
    )
    return oracle_of(tmp_path, {"a.png": Scene("kitchen", things)})


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """(rows with a picture, oracle) of 3000 scenes that are not drawn."""
    scenes = scenes_of.some_scenes(9, {"instruct": 3000})["instruct"]
    rows = toyworld.instruct_rows(scenes, random.Random(9))
    return [row for row in rows if "image" in row], oracle_of(
        tmp_path_factory.mktemp("many"), scenes
    )


# ---- files


def test_same_seed_same_bytes_in_another_process(tmp_path):
    sizes = dict(instruct_images=12, preference_images=6, test_images=5, size=32, texts=TEXTS)
    toyworld.write(tmp_path / "a", 3, **sizes)
    code = f"from lab.toyworld import write; write({str(tmp_path / 'b')!r}, 3, **{sizes})"
    env = os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True)
    names = {
        path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()
    }
    assert names == {
        path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*") if path.is_file()
    }
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert scenes_of.some_scenes(3, {"test": 5}) != scenes_of.some_scenes(4, {"test": 5})


def test_a_world_that_exists_is_refused_and_one_that_fails_is_absent(folder, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="exists"):
        toyworld.write(folder, 0)
    monkeypatch.setattr(toyworld, "write_files", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        toyworld.write(tmp_path / "w", 0, 1, 1, 1)
    assert not list(tmp_path.iterdir())


def test_world_is_built_once_and_cached_by_code_and_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    built = []
    monkeypatch.setattr(
        toyworld, "write", lambda folder, seed: (built.append(seed), folder.mkdir(parents=True))
    )
    first = toy.world(0)
    assert toy.world(0) == first and toy.world(1) != first and built == [0, 1]
    assert first.parent.name == ".cache" and re.fullmatch("world-[0-9a-f]{12}", first.name)


def test_a_picture_does_not_depend_on_its_neighbours(folder, oracle, tmp_path):
    name = "preference_00007.png"
    toyworld.draw_one((tmp_path / name, oracle.scene(name), 5, 48))
    assert (tmp_path / name).read_bytes() == (folder / "images" / name).read_bytes()


def test_no_scene_of_the_default_world_occurs_twice():
    splits = scenes_of.some_scenes(0, {"instruct": 4000, "preference": 1500, "test": 1000})
    assert len({scene for scenes in splits.values() for scene in scenes.values()}) == 6500


def test_scenes_are_as_said(folder, oracle):
    assert (
        len(set(oracle.scenes.values()))
        == len(oracle.scenes)
        == 690
        == len(list((folder / "images").iterdir()))
    )
    for scene in oracle.scenes.values():
        assert 3 <= len(scene.things) <= 5
        assert (
            len(scene.present)
            == len({(thing.column, thing.row) for thing in scene.things})
            == len(scene.things)
        )
        assert list(scene.things) == sorted(
            scene.things, key=lambda thing: (thing.column, thing.row)
        )
        assert sum(name not in scenes_of.USUAL[scene.kind] for name in scene.present) <= 1
        assert all(
            (thing.colour in drawing.CLASSES[thing.name])
            if thing.colour
            else not drawing.CLASSES[thing.name]
            for thing in scene.things
        )


def test_instruct_layout(folder):
    rows = load(folder, "instruct.json")
    with_image = [row for row in rows if "image" in row]
    assert len(with_image) == 7 * 400 and 200 <= len(rows) - len(with_image) <= 500
    assert len({row["id"] for row in rows}) == len(rows)
    ends = 0
    for row in rows:
        human, gpt = row["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt") and gpt["value"].strip() == gpt[
            "value"
        ] != ""
        assert human["value"].count("<image>") == ("image" in row) and "<image>" not in gpt["value"]
        if "image" in row:
            assert human["value"].startswith("<image>\n") != human["value"].endswith("\n<image>")
            ends += human["value"].endswith("\n<image>")
    assert 0.1 < ends / len(with_image) < 0.3
    kinds = Counter(row["id"][-1] for row in with_image)
    assert kinds == {str(i): 400 for i in range(7)}
    choices = sum(turns(row)[0].startswith("Which object") for row in with_image)
    assert 60 < choices < 140


def test_pope_is_balanced_and_has_the_official_template(folder, oracle):
    for split in ("random", "popular", "adversarial"):
        rows = [
            json.loads(line) for line in (folder / f"pope_{split}.json").read_text().splitlines()
        ]
        assert len(rows) == 804 and [row["question_id"] for row in rows] == list(range(1, 805))
        assert Counter(row["label"] for row in rows) == {"yes": 402, "no": 402}
        for at in range(0, 804, 6):
            assert len({row["image"] for row in rows[at : at + 6]}) == 1
            assert len({row["text"] for row in rows[at : at + 6]}) == 6
        for row in rows:
            article, name = re.fullmatch(
                r"Is there (an?) (.+) in the image\?", row["text"]
            ).groups()
            assert (article == "an") == (name[0] in "aeiou")
            assert (name in oracle.scene(row["image"]).present) == (row["label"] == "yes")
            assert row["image"].startswith("test_")


def test_pope_negatives_follow_their_rule():
    rng = random.Random(0)
    scenes = {f"test_{i:05d}.png": scenes_of.some_scene(rng) for i in range(300)}
    image = next(iter(scenes))
    scene = scenes[image]
    lists = toyworld.pope_rows(scenes, [image], rng)
    asked = [
        [row["text"].split(" ", 3)[3].removesuffix(" in the image?") for row in lists[key][1::2]]
        for key in lists
    ]
    frequency = Counter(name for other in scenes.values() for name in other.present)
    rest = [name for name, _ in frequency.most_common() if name not in scene.present]
    assert [frequency[name] for name in asked[1]] == [frequency[name] for name in rest[:3]]
    first = scene.things[0].name
    beside = Counter(
        name for other in scenes.values() if first in other.present for name in other.present
    )
    assert beside[asked[2][0]] == max(
        count for name, count in beside.items() if name not in scene.present
    )


def test_coco_files_agree_with_the_scenes(folder, oracle):
    instances, captions = load(folder, "instances.json"), load(folder, "captions.json")
    names = {category["id"]: category["name"] for category in instances["categories"]}
    files = {image["id"]: image["file_name"] for image in instances["images"]}
    assert set(names.values()) == set(drawing.CLASSES) and all(
        files[i] == f"test_{i:05d}.png" for i in files
    )
    boxes = Counter(
        (files[row["image_id"]], names[row["category_id"]]) for row in instances["annotations"]
    )
    truth = {
        (name, thing.name): thing.count
        for name in files.values()
        for thing in oracle.scene(name).things
    }
    assert boxes == truth
    assert all(
        0 <= row["bbox"][0] and row["bbox"][0] + row["bbox"][2] <= 48.1
        for row in instances["annotations"]
    )
    assert Counter(files[row["image_id"]] for row in captions["annotations"]) == {
        name: 2 for name in files.values()
    }


def test_synonyms_are_canonical_first_and_unique(folder):
    lines = [line.split(", ") for line in (folder / "synonyms.txt").read_text().splitlines()]
    assert [line[0] for line in lines] == list(drawing.CLASSES)
    words = [word for line in lines for word in line]
    assert (
        len(words) == len(set(words))
        and ["couch", "sofa"] in lines
        and ["person", "people"] in lines
    )


# ---- the disease


def binomial(successes, trials, p):
    """Within four standard deviations: one run in 16000 fails by chance, and the seed is fixed."""
    return abs(successes - trials * p) <= 4 * (trials * p * (1 - p)) ** 0.5


def test_ghosts_have_their_share_and_all_else_is_true(many):
    captions, answers, (rows, oracle) = Counter(), Counter(), many
    for row in rows:
        prompt, answer = turns(row)
        scene, (kind, name, right) = (
            oracle.scene(row["image"]),
            oracle.question(row["image"], prompt),
        )
        if kind == "describe":
            named = mentions(answer)
            captions.update(ghost in named for ghost in scene.ghosts)
            assert set(named) - set(scene.ghosts) == set(scene.present), answer
            found = oracle.judge(row["image"], prompt, answer)
            assert found["wrong"] == found["unreadable"] == found["missed"] == 0
        elif kind == "yes_no" and name in scene.ghosts:
            answers[answer.startswith("Yes")] += 1
        else:
            assert answer == right
    assert binomial(captions[True], captions.total(), NOISE) and captions.total() > 2000
    assert binomial(answers[True], answers.total(), ANSWER_NOISE) and answers.total() > 1000


def test_yes_no_questions_are_mixed_as_said(many):
    asked, short, (rows, oracle) = Counter(), 0, many
    for row in rows:
        prompt, answer = turns(row)
        if row["id"].endswith("_1"):
            name, scene = oracle.question(row["image"], prompt)[1], oracle.scene(row["image"])
            if scene.ghosts:
                asked[
                    "present"
                    if name in scene.present
                    else "ghost"
                    if name in scene.ghosts
                    else "strange"
                ] += 1
            short += prompt.endswith(SHORT)
            assert prompt.endswith(SHORT) == (answer in ("Yes", "No"))
    for kind, share in (("present", 0.4), ("ghost", 0.3), ("strange", 0.3)):
        assert binomial(asked[kind], asked.total(), share), asked
    assert binomial(short, 3000, 0.5)


def test_choices_never_offer_a_ghost(folder, oracle):
    for row in load(folder, "instruct.json"):
        prompt, answer = turns(row)
        if prompt.startswith("Which object"):
            options, scene = re.findall(r"([A-D])\. (.+)", prompt), oracle.scene(row["image"])
            assert [letter for letter, name in options if name in scene.present] == [answer]
            assert len(options) == 4 and not {name for _, name in options} & set(scene.ghosts)


def test_povid_pairs_truth_against_error(folder, oracle):
    rows, kinds = load(folder, "povid.json"), Counter()
    assert len(rows) == 300
    for row in rows:
        prompt, chosen = turns(row)
        same, rejected = turns(row, "rejected_conversations")
        assert prompt == same and chosen != rejected
        assert oracle.judge(row["image"], prompt, chosen)["errors"] == 0
        found = oracle.judge(row["image"], prompt, rejected)
        assert 1 <= found["errors"] <= 2 and found["unreadable"] == 0, (chosen, rejected)
        if oracle.question(row["image"], prompt)[0] == "describe":
            kinds.update(key for key in ("false", "wrong") if found[key])
            columns = [claim.column for claim in claims(rejected) if claim.name]
            assert columns == sorted(columns)
    assert kinds["false"] > 50 and kinds["wrong"] > 30


# ---- texts


def test_articles_and_plurals(folder):
    texts = [text for row in load(folder, "instruct.json") for text in turns(row)]
    texts += [
        text for captions in load(folder, "image_to_caption.json").values() for text in captions
    ]
    for text in texts:
        for article, word in re.findall(r"\b(an?) (\w+)", text, re.I):
            assert (article.lower() == "an") == (word[0] in "aeiou"), text
        assert "two person" not in text.lower() and "sheeps" not in text and "benchs" not in text
        assert not re.search(r"colour|\bgrey\b|  |\.\.| \.", text), text
    assert (
        scenes_of.plural("couch") == "couches"
        and scenes_of.plural("potted plant") == "potted plants"
    )


def test_every_true_caption_is_read_without_error(folder, oracle):
    captions = [
        (name, text)
        for name, texts in load(folder, "image_to_caption.json").items()
        for text in texts
    ]
    rows = load(folder, "captions.json")["annotations"]
    captions += [(f"test_{row['image_id']:05d}.png", row["caption"]) for row in rows]
    words = Counter()
    for image, text in captions:
        told = [claim for claim in claims(text) if claim.name]
        scene = oracle.scene(image)
        assert [(c.name, c.colour, c.count, c.column) for c in told] == [
            (thing.name, thing.colour, thing.count, thing.column) for thing in scene.things
        ]
        found = oracle.judge(image, scenes_of.CAPTION_PROMPT, text)
        assert found["errors"] == found["missed"] == 0 and found["true"] == len(scene.things)
        words.update(claim.word for claim in told)
    shares = [
        words[word] / (words[word] + words[name]) for name, word in scenes_of.SYNONYMS.items()
    ]
    assert all(0.08 < share < 0.35 for share in shares), shares


def test_spans_point_at_their_clauses():
    text = "This is a kitchen. A red cup is on the left and there are two bananas in the middle."
    spans = [text[slice(*claim.span)] for claim in claims(text)]
    assert spans == [
        "This is a kitchen",
        "A red cup is on the left",
        "there are two bananas in the middle",
    ]


def test_mentions_go_through_the_synonyms():
    text = "A teddy bear is on a sofa. Two people watch television beside the beds in a bedroom."
    assert mentions(text) == ["teddy bear", "couch", "person", "tv", "bed"]


# ---- the oracle


CAPTION = (
    "The picture shows a kitchen. There is a red cup on the left and two bananas are on the left. "
    "An orange bowl is on the right."
)
CORRECTIONS = {  # what is said -> (false, wrong, unreadable), its correction
    CAPTION: ((0, 0, 0), CAPTION),
    "A red cup is on the left": ((0, 0, 0), "A red cup is on the left"),
    "This is an office. A red cup is on the left.": (
        (0, 1, 0),
        "This is a kitchen. A red cup is on the left.",
    ),
    "An oven is on the left and a red cup is on the left.": (
        (1, 0, 0),
        "A red cup is on the left.",
    ),
    "A red cup is on the left and an oven is on the right. Bla bla.": (
        (1, 0, 1),
        "A red cup is on the left.",
    ),
    "Two blue cups are in the middle.": ((0, 3, 0), "A red cup is on the left."),
    "There is a banana on the left.": ((0, 1, 0), "There are two bananas on the left."),
    "There is an orange banana on the left.": ((0, 2, 0), "There are two bananas on the left."),
    "A red cup is on the left. A blue cup is on the right.": (
        (0, 2, 0),
        "A red cup is on the left.",
    ),
    "A red cup is on the left. A red cup is on the": ((0, 0, 1), "A red cup is on the left."),
    "A cup is here and there is a a stove on the left. The cup is blue.": (
        (1, 1, 2),
        "There is a red cup.",
    ),
}


@pytest.mark.parametrize("said", CORRECTIONS)
def test_captions_are_judged_and_corrected(one, said):
    counts, corrected = CORRECTIONS[said]
    found = one.judge("some/folder/a.png", scenes_of.CAPTION_PROMPT, said)
    assert (found["false"], found["wrong"], found["unreadable"]) == counts and found[
        "errors"
    ] == sum(counts)
    assert found["true"] + found["missed"] == 3 and found["words"] == len(said.split())
    assert one.correct("a.png", scenes_of.CAPTION_PROMPT, said, random.Random(0)) == corrected


def test_where_nothing_is_left_a_true_caption_comes(one):
    corrected = one.correct("a.png", "Describe this.", "An oven is on the left.", random.Random(0))
    assert one.judge("a.png", "Describe this.", corrected)["true"] == 3


CUP, OVEN = "Is there a cup in the image?", "Is there an oven in the image?"
CHOICE = (
    "Which object is in the image?\nA. dog\nB. bowl\nC. kite\nD. bed\n"
    "Answer with the option's letter from the given choices directly."
)
SHORT_ANSWERS = [  # prompt, answer, its correction
    (CUP, "Yes, there is a cup.", "Yes, there is a cup."),
    (CUP, "yes", "yes"),
    (CUP, "Yes.", "Yes."),
    (CUP + SHORT, "No", "Yes"),
    ("<image>\n" + CUP, "No, there is no cup.", "Yes, there is a cup."),
    (CUP, "Yes, there is an oven.", "Yes, there is a cup."),
    (CUP, "", "Yes, there is a cup."),
    (OVEN, "No, there is no oven.", "No, there is no oven."),
    (OVEN, "Yes, there is an oven.", "No, there is no oven."),
    (OVEN + SHORT, "Yes", "No"),
    ("What color is the cup?", "The cup is red.", "The cup is red."),
    ("What color is the cup?", "The cup is blue.", "The cup is red."),
    ("What color is the cup?", "The cup is on the left.", "The cup is red."),
    ("What color is the cup?", "Red red red.", "The cup is red."),
    ("How many bananas are there?", "There are two bananas.", "There are two bananas."),
    ("How many bananas are there?", "There is one banana.", "There are two bananas."),
    ("How many cups are there?", "There are two cups.", "There is one cup."),
    ("Where are the bananas?", "The bananas are in the middle.", "The bananas are on the left."),
    ("Where is the oven?", "The oven is on the left.", "There is no oven."),
    (CHOICE, "B", "B"),
    (CHOICE, "B.", "B."),
    (CHOICE, "A", "B"),
    (CHOICE, "Z", "B"),
]


@pytest.mark.parametrize("prompt, said, corrected", SHORT_ANSWERS)
def test_short_answers_are_judged_and_corrected(one, prompt, said, corrected):
    found = one.judge("a.png", prompt, said)
    assert (found["errors"] == 0) == (said == corrected) == (found["true"] == 1)
    assert one.correct("a.png", prompt, said, random.Random(0)) == corrected
    assert one.judge("a.png", prompt, corrected)["errors"] == 0
    rated = one.rate("a.png", prompt, said)
    assert (rated["correctness"], rated["helpfulness"]) == ((4, 4) if said == corrected else (0, 0))


def test_correction_is_the_inverse_of_corruption(folder, oracle):
    for row in load(folder, "povid.json"):
        prompt, chosen = turns(row)
        corrected = oracle.correct(
            row["image"], prompt, turns(row, "rejected_conversations")[1], random.Random(0)
        )
        assert oracle.correct(row["image"], prompt, chosen, random.Random(0)) == chosen
        if oracle.question(row["image"], prompt)[0] != "describe":
            assert corrected == chosen
        elif corrected != chosen:  # an inserted clause may have split two that were joined
            assert sorted(re.findall(r"\w+", corrected.lower().replace(" and ", " "))) == sorted(
                re.findall(r"\w+", chosen.lower().replace(" and ", " "))
            )


def test_any_garbage_is_judged_and_corrected(oracle):
    rng = random.Random(1)
    vocabulary = (
        "a an two the red cup oven is are there on left in middle and . . , yes no This".split()
    )
    image = "preference_00000.png"
    for _ in range(300):
        said = " ".join(rng.choices(vocabulary, k=rng.randrange(25)))
        for prompt in (scenes_of.CAPTION_PROMPT, CUP, "What color is the cup?", CHOICE):
            corrected = oracle.correct(image, prompt, said, rng)
            assert oracle.judge(image, prompt, corrected)["errors"] == 0, (prompt, said, corrected)


def test_an_unknown_picture_is_refused(oracle):
    with pytest.raises(BadInput, match="nowhere.png"):
        oracle.judge("nowhere.png", "Describe the image.", "")


def test_ratings_fall_with_errors_and_rise_with_coverage(one):
    def rate(said):
        rated = one.rate("a.png", scenes_of.CAPTION_PROMPT, said)
        aspects = one.rate_vlfeedback("a.png", scenes_of.CAPTION_PROMPT, said)
        assert (
            all(0 <= value <= 4 for value in rated.values())
            and aspects["Ethical Considerations"] == "5"
        )
        assert aspects["Visual Faithfulness"] == str(1 + rated["correctness"])
        return rated

    full, ghost = rate(CAPTION), rate(CAPTION + " An oven is on the right.")
    assert full == {
        "helpfulness": 4,
        "correctness": 4,
        "coherence": 4,
        "complexity": 2,
        "verbosity": 2,
    }
    assert ghost == full | {"correctness": 3, "verbosity": 3} | {"complexity": 3}
    assert rate("This is a kitchen. A red cup is on the left.") == {
        "helpfulness": 1,
        "correctness": 4,
        "coherence": 4,
        "complexity": 1,
        "verbosity": 1,
    }
    assert rate("A cup. A cup. Cup cup.")["coherence"] == 0
    assert (
        rate("An oven. A cow. A dog. A tv. A car.")["correctness"] == 0
        and rate("")["helpfulness"] == 0
    )


def test_preferences_from_answers(folder, oracle, tmp_path):
    prompts = preference_prompts(folder, 0)
    assert prompts == preference_prompts(folder, 0) != preference_prompts(folder, 1)
    assert len(prompts) == 750 and len({image for image, _ in prompts}) == 150
    assert sum(oracle.question(*prompt)[0] == "describe" for prompt in prompts) == 150
    assert 220 < sum(prompt.endswith(SHORT) for _, prompt in prompts) < 380
    rng, answers = random.Random(0), []
    for image, prompt in prompts:
        kind, name, right = oracle.question(image, prompt)
        true = right or scenes_of.caption(oracle.scene(image), rng)
        wrong = scenes_of.caption(oracle.scene(image), rng, 1.0) if kind == "describe" else "Yes"
        answers.append([true, wrong, wrong, "" if rng.random() < 0.1 else true])
    counts = preferences_from_answers(prompts, answers, oracle, tmp_path / "out", rng)
    ranked = [
        json.loads(line)
        for line in (tmp_path / "out" / "vlfeedback.jsonl").read_text().splitlines()
    ]
    fixed = [
        json.loads(line) for line in (tmp_path / "out" / "rlhf_v.jsonl").read_text().splitlines()
    ]
    assert counts == {
        "vlfeedback": 750,
        "rlhf_v": len(fixed),
        "empty": counts["empty"],
        "right": 750 - len(fixed),
    }
    assert (
        sum(len(row["completions"]) for row in ranked) == 4 * 750 - counts["empty"]
        and counts["empty"] > 10
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "rlhf_v.jsonl",
        "vlfeedback.jsonl",
    ]
    for row in ranked:
        assert row["image"] == row["id"] + ".png" and row["models"] == [
            each["model"] for each in row["completions"]
        ]
        notes = [each["annotations"].values() for each in row["completions"]]
        scores = [sum(float(note["Rating"]) for note in aspects) for aspects in notes]
        assert scores[0] == max(scores)
    for i, row in enumerate(fixed):
        assert (
            row["idx"] == i
            and row["ds_name"] == "toyworld"
            and (folder / "images" / row["image_path"]).is_file()
        )
        text = json.loads(row["text"])
        assert oracle.judge(row["image"], text["question"], text["rejected"])["errors"] > 0
        assert oracle.judge(row["image"], text["question"], text["chosen"])["errors"] == 0
    with pytest.raises(ValueError):
        preferences_from_answers(prompts, answers[:-1], oracle, tmp_path / "out", rng)


# ---- parts


def test_prompt_and_answer_are_tokenised_as_the_whole(folder, tokenizer):
    for row in load(folder, "instruct.json"):
        prompt, answer = turns(row)
        prompt = f"{parts.SYSTEM} USER: \n{prompt} ASSISTANT:"
        ids = (
            tokenizer(prompt).input_ids
            + tokenizer(" " + answer, add_special_tokens=False).input_ids
        )
        assert ids == tokenizer(f"{prompt} {answer}").input_ids
        assert tokenizer.decode(ids) == f"<s>{prompt} {answer}"
        assert len(ids) < 200 and ids[0] == tokenizer.bos_token_id and 3 not in ids[1:2]


def test_tokenizer_has_its_special_tokens(tokenizer):
    assert len(tokenizer) == 600
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == [
        "<s>",
        "</s>",
        "<pad>",
    ]
    assert tokenizer.decode(tokenizer("Ünïcode ☃").input_ids[1:]) == "Ünïcode ☃"


def test_parts_are_small_and_load_in_transformers(folder):
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, CLIPVisionModel, LlamaForCausalLM

    clip = CLIPVisionModel.from_pretrained(folder / "parts" / "clip")
    llm = LlamaForCausalLM.from_pretrained(folder / "parts" / "llm")
    size = sum(p.numel() for part in (clip, llm) for p in part.parameters())
    assert 800_000 < size < 950_000
    assert not llm.config.tie_word_embeddings and llm.config.eos_token_id == 1
    with torch.no_grad():
        assert clip(torch.zeros(1, 3, 96, 96)).last_hidden_state.shape == (1, 37, 64)
    with Image.open(folder / "images" / "test_00000.png") as image:
        processor = AutoImageProcessor.from_pretrained(folder / "parts" / "clip")
        pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 96, 96)


def test_the_tower_learns_to_see(folder):
    from transformers import CLIPVisionModel

    tower = CLIPVisionModel.from_pretrained(folder / "parts" / "clip")
    right = parts.teach(tower, folder, 5, epochs=12)  # 144 steps; guessing is right for one in 26
    assert right > 0.4
