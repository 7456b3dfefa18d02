"""eval_chair.py: Object HalBench's prompts, several contestants, bad input; what RLHF-V's script makes of the same words."""

import base64
import io
import json
import random
import re
import sys

import pytest
from PIL import Image

import eval_chair
import evaluation
from common import BadInput

SYNONYMS = "person, man, woman\ndog, puppy\nbus\ncat\ndining table, table\n"
IMAGES = {1: {"dog", "person"}, 2: {"bus"}, 3: {"cat", "dog"}, 4: {"person"}}
NAMES = {"dog": 18, "bus": 6, "person": 1, "cat": 17}


def picture(i):
    file = io.BytesIO()
    Image.new("RGB", (30, 28), (60 * i, 200, 9)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """Four pictures, their objects, and Object HalBench's file with a prompt of each."""
    monkeypatch.chdir(tmp_path)
    instances = {
        "categories": [{"id": i, "name": name} for name, i in NAMES.items()],
        "images": [{"id": i, "file_name": f"COCO_{i}.jpg"} for i in IMAGES],
        "annotations": [
            {"image_id": i, "category_id": NAMES[n]} for i, names in IMAGES.items() for n in names
        ],
    }
    captions = {"annotations": [{"image_id": i, "caption": "It is red."} for i in IMAGES]}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    rows = [
        {
            "image_id": i,
            "question": f"Describe picture {i}.",
            "image": base64.b64encode(picture(i)).decode(),
        }
        for i in (3, 1, 4)
    ]
    write_lines(tmp_path / "obj.jsonl", rows)
    return tmp_path


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main(monkeypatch, *words):
    files = "--instances instances.json --captions captions.json --synonyms synonyms.txt".split()
    monkeypatch.setattr(sys, "argv", ["eval_chair.py", *files, *map(str, words)])
    eval_chair.main()


def obj_halbench(captions, truth, nodes):
    """RLHF-V's compute_chair without GPT, restated: its four figures of [(image, words in vocabulary)]."""
    hallucinated = mentioned = with_object = false = right = present = 0
    for image, words in captions:
        objects = [nodes[word] for word in words]
        absent = [o for o in objects if o not in truth[image]]
        present += len(truth[image])
        right += len({o for o in objects if o in truth[image]})
        mentioned, hallucinated = mentioned + len(objects), hallucinated + len(absent)
        false, with_object = false + bool(absent), with_object + bool(objects)
    return {
        "chair_s": false / len(captions),
        "chair_s_refine": false / with_object,
        "chair_i": hallucinated / mentioned,
        "recall": right / present,
    }


def test_figures_of_object_halbench(coco):
    vocabulary = eval_chair.read_synonyms("synonyms.txt")
    rng = random.Random(0)
    words = ["man", "woman", "dog", "puppy", "bus", "cat", "table"]
    for _ in range(50):
        said = [
            (rng.choice(list(IMAGES)), rng.choices(words, k=rng.randrange(5))) for _ in range(20)
        ]
        captions = [(i, " and ".join(f"a {word}" for word in some)) for i, some in said]
        found = eval_chair.score(captions, IMAGES, vocabulary, refine=True)
        want = obj_halbench(said, IMAGES, vocabulary.nodes)
        assert {key: found[key] for key in want} == want
    silent = eval_chair.score([(1, ""), (2, "It.")], IMAGES, vocabulary, refine=True)
    assert silent["chair_s_refine"] == 0


def test_contestants_of_object_halbench(coco):
    """With refine the figure of captions that have an object: one of one, where one of two is false."""
    vocabulary = eval_chair.read_synonyms("synonyms.txt")
    said = {"a": [(2, "A dog."), (4, "It is red.")], "b": [(2, "A bus."), (4, "A dog.")]}
    found = eval_chair.compared(said, IMAGES, vocabulary, True)
    assert [found[name]["chair_s"]["value"] for name in "ab"] == [0.5, 0.5]
    assert [found[name]["chair_s_refine"]["value"] for name in "ab"] == [1, 0.5]
    assert "chair_s_refine" not in eval_chair.compared(said, IMAGES, vocabulary, False)["a"]


def test_prompts_and_images_of_object_halbench(coco, checkpoint, monkeypatch, capsys):
    """Its own prompts about its own pictures, in its order; RLHF-V's script can read what is written."""
    flags = "--questions obj.jsonl --model", checkpoint, "--device cpu --max-new-tokens 6 --out out"
    main(monkeypatch, *" ".join(map(str, flags)).split())
    printed = capsys.readouterr().out
    assert "Object HalBench's prompts, CHAIR's rule: not comparable" in printed
    rows = [json.loads(line) for line in open("out/captions.jsonl")]
    assert [(r["image_id"], r["question"]) for r in rows] == [
        (i, f"Describe picture {i}.") for i in (3, 1, 4)
    ]
    assert all(r["text"] == r["caption"] for r in rows)
    replies = [json.loads(line) for line in open("out/replies.jsonl")]
    for reply in replies:
        (number,) = re.findall(r"\d+", reply["prompt"][0])
        assert open(reply["image"], "rb").read() == picture(int(number))
    metrics = json.loads(open("out/metrics.json").read())
    assert metrics["n"] == 3 and "chair_s_refine" in metrics

    # its own answers file scores to the same, in any order
    write_lines(coco / "turned.jsonl", [rows[i] for i in (2, 0, 1)])
    main(monkeypatch, *"--questions obj.jsonl --answers turned.jsonl --out again".split())
    assert json.loads(open("again/metrics.json").read()) == metrics
    assert [json.loads(line) for line in open("again/captions.jsonl")] == rows


@pytest.mark.parametrize(
    "rows, message",
    [
        ([(3, "a"), (1, "a")], r"\(4, 'Describe picture 4.'\) has no answer"),
        ([(3, "a"), (1, "a"), (4, "a"), (1, "b")], "row 3: a second answer to 1"),
        ([(3, "a"), (1, "a"), (4, "a"), (2, "b")], "an answer to 2, which is no question"),
        ([(3, "a"), (1, "a"), (9, "a")], "row 2: `image_id` is 9"),
        ([], r"\(3, 'Describe picture 3.'\) has no answer"),
    ],
)
def test_answers_that_are_not_those_of_the_questions(coco, monkeypatch, rows, message):
    write_lines(coco / "a.jsonl", [{"image_id": i, "caption": text} for i, text in rows])
    with pytest.raises(BadInput, match=f"a.jsonl.*{message}"):
        main(monkeypatch, *"--questions obj.jsonl --answers a.jsonl".split())


@pytest.mark.parametrize(
    "row, message",
    [
        ({"image_id": 9, "question": "?"}, "row 3: image id 9 is not in --instances"),
        ({"image_id": "1", "question": "?"}, "row 3: `image_id` is '1'; a whole number is needed"),
        ({"image_id": 2}, "row 3: `question` is None"),
        ({"image_id": 1, "question": "Describe picture 1."}, "is there twice"),
    ],
)
def test_bad_prompts(coco, monkeypatch, row, message):
    with open("obj.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(BadInput, match=f"obj.jsonl.*{message}"):
        main(monkeypatch, *"--questions obj.jsonl --answers a.jsonl".split())


def test_an_image_that_is_none(coco, monkeypatch):
    with open("obj.jsonl", "a") as file:
        file.write(json.dumps({"image_id": 2, "question": "?", "image": "no base64!"}) + "\n")
    with pytest.raises(BadInput, match="obj.jsonl, row 3: `image` is no image in base64"):
        main(monkeypatch, *"--questions obj.jsonl --model m --out out".split())
    assert not list(coco.glob(".cache/object-halbench-*"))


def test_two_contestants(coco, monkeypatch, capsys):
    """Paired on the same images; what differs is drawn; other images are refused."""
    before = {1: "A dog and a bus.", 2: "A bus and a cat.", 3: "A cat.", 4: "A man."}
    after = {4: "A man.", 3: "A cat and a dog.", 1: "A dog.", 2: "A bus and a cat."}
    for name, said in (("before", before), ("after", after)):
        write_lines(
            coco / f"{name}.jsonl", [{"image_id": i, "caption": t} for i, t in said.items()]
        )
    main(monkeypatch, *"--answers before.jsonl after.jsonl --out out".split())
    printed = capsys.readouterr().out
    metrics = json.loads(open("out/metrics.json").read())
    assert metrics["before"]["chair_s"] == 0.5 and metrics["after"]["chair_s"] == 0.25
    details = json.loads(open("out/details.json").read())
    paired = details["after"]["intervals"]["chair_s"]
    assert paired["difference"] == -0.25 and paired["difference_high"] == 0
    assert paired["difference_low"] < -0.25 and paired["low"] < paired["value"] < paired["high"]
    assert (
        "out/changed-after.png: before against after, 1 captions that hallucinate other objects"
        in printed
    )
    write_lines(coco / "after.jsonl", [{"image_id": 1, "caption": "A dog."}])
    with pytest.raises(BadInput, match="image id 2 has a caption of before alone"):
        main(monkeypatch, *"--answers before.jsonl after.jsonl".split())


TRAPS = (
    "bus, minibus\nairplane, plane, airbus\ntie, bow, bow tie\nboat, canoe\nmotorcycle,  motor bike\n"
    "cake,  cheesecake\ncell phone, phone, iPhone\noven, stovetop, stove, stove top oven\ndog, doggie\n"
    "wine glass\nskis, ski\nperson, thief\nsports ball, ball\n"
)


@pytest.mark.parametrize(
    "text, ours, theirs",  # theirs: worked out with pattern.en and NLTK's tokens
    [
        ("a bus, two buses", ["bus", "bus"], ["bus"]),
        ("minibuses, a minibus", ["bus", "bus"], ["bus"]),
        ("an airbus, airbuses", ["airplane"] * 2, ["airplane"]),
        ("a tie and ties", ["tie", "tie"], ["tie"]),
        ("bow ties, a bow tie", ["tie", "tie"], ["tie", "tie"]),
        ("a canoe, canoes", ["boat", "boat"], ["boat"]),
        ("a motor bike, motorcycles", ["motorcycle"] * 2, ["motorcycle"]),
        ("cheesecake, cakes", ["cake", "cake"], ["cake"]),
        ("an iPhone, phones", ["cell phone"] * 2, ["cell phone"]),
        ("a stove top oven", ["oven"], ["oven", "oven"]),
        ("a dog.There is a dog.", ["dog", "dog"], ["dog"]),
        ("doggies and a doggie", ["dog", "dog"], ["dog"]),
        ("wine glasses, skis, sports balls", ["wine glass", "skis", "sports ball"], None),
        ("thieves and a thief", ["person", "person"], ["person"]),
        ("a dog. The dog's tail, 3.5 dogs", ["dog"] * 3, None),
    ],
)
def test_traps_of_the_original(tmp_path, text, ours, theirs):
    """By default they are mended; --original has them."""
    (tmp_path / "s.txt").write_text(TRAPS)
    mended = eval_chair.read_synonyms(tmp_path / "s.txt")
    original = eval_chair.read_synonyms(tmp_path / "s.txt", original=True)
    assert eval_chair.mentions(text, mended) == ours
    assert eval_chair.mentions(text, original) == (ours if theirs is None else theirs)


def test_original_on_the_command_line(coco, monkeypatch):
    """The truth is read by the same rule: a category counts, a bus in a reference caption does not."""
    captions = {"annotations": [{"image_id": i, "caption": "A bus."} for i in IMAGES]}
    (coco / "captions.json").write_text(json.dumps(captions))
    write_lines(coco / "a.jsonl", [{"image_id": i, "caption": "Two buses."} for i in (1, 2)])
    for out, flags, chair_i in (("ours", "", 0), ("theirs", "--original", 0.5)):
        main(monkeypatch, *f"--answers a.jsonl {flags} --out {out}".split())
        assert json.loads(open(f"{out}/metrics.json").read())["chair_i"] == chair_i


def test_a_model_counted_as_the_original(coco, checkpoint, monkeypatch):
    ask = lambda contestant, records, *_: [[(i, {"answer": "A bus."}) for i in range(len(records))]]
    monkeypatch.setattr(evaluation, "ask_model", ask)
    flags = f"--questions obj.jsonl --model {checkpoint} --device cpu --out"
    for more, chair_s in (("ours", 1), ("theirs --original", 0)):
        main(monkeypatch, *f"{flags} {more}".split())
        assert json.loads(open(f"{more[:6].strip()}/metrics.json").read())["chair_s"] == chair_s
    with pytest.raises(BadInput, match="about, original: True, and here it is False"):
        main(monkeypatch, *f"{flags} theirs".split())


@pytest.mark.parametrize(
    "words, message",
    [
        ("--answers a --limit 3", "--limit does not go with --answers"),
        ("--questions obj.jsonl --prompt x --answers a", "--prompt does not go with --questions"),
    ],
)
def test_flags(coco, monkeypatch, words, message):
    with pytest.raises(BadInput, match=message):
        main(monkeypatch, *words.split())


# ---- small parts, by hand


def test_captions_in_the_order_of_the_prompts():
    """By image and prompt; a row without its prompt by its image, where each image has one prompt."""
    order = lambda prompts, asked: eval_chair.in_order("f", prompts, asked, list("abcd"))
    one, two, three = (1, "p"), (2, "q"), (1, "r")
    assert order([one, two], [(2, None), (1, None)]) == ["b", "a"]
    assert order([one, two], [(2, "q"), (1, None)]) == ["b", "a"]
    assert order([one, two, three], [three, two, one]) == ["c", "b", "a"]
    for prompts, asked, told in (
        ([one, three], [(1, None), three], r"\(1, 'p'\) has no answer"),
        ([one, two], [one, (2, "x")], r"\(2, 'q'\) has no answer"),
        ([one, two], [one, two, two], r", row 2: a second answer to \(2, 'q'\); one is accepted"),
        ([one], [one, two], r": an answer to \(2, 'q'\), which is no question of --questions"),
        ([one], [(3, None), one], ": an answer to 3, which is no question"),
    ):
        with pytest.raises(BadInput, match=f"^f(: )?{told}"):
            order(prompts, asked)


@pytest.mark.parametrize(
    "word, want",
    [("dog", "dog"), ("dogs", "dog"), ("buses", "bus"), ("knives", "knife"), ("cats", "cats"), ("bus", "bus"), ("s", "s")],
)  # fmt: skip
def test_a_known_word_in_the_singular(word, want):
    assert eval_chair.singular(word, {"dog", "bus", "knife"}) == want


def test_contestants_on_other_images(monkeypatch):
    """The smallest image that one of them lacks, and who has it; two captions of an image are one unit."""
    seen = []
    monkeypatch.setattr(eval_chair, "counts", lambda number, text, *_: [len(text)] * 8)
    monkeypatch.setattr(
        eval_chair.comparison, "compare", lambda units, of: seen.append((units, of))
    )
    said = {"a": [(5, "xx"), (3, "x"), (5, "xxx")], "b": [(3, "yyyy"), (5, "")]}
    eval_chair.compared(said, {}, None, True)
    ((units, figures),) = seen
    assert units["a"].tolist() == [[1] * 8, [5] * 8] and units["b"].tolist() == [[4] * 8, [0] * 8]
    assert "chair_s_refine" in figures(units["a"])
    for other, told in (
        ([(3, "")], "5 has a caption of a"),
        ([(3, ""), (5, ""), (4, "")], "4 has a caption of b"),
    ):
        with pytest.raises(BadInput, match=f"^image id {told} alone"):
            eval_chair.compared(said | {"b": other}, {}, None, False)
