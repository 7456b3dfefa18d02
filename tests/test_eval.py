"""POPE and CHAIR: the official rules against cases worked out by hand, other scorers, and the official files."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval_chair
import eval_pope
import evaluation
import sampling
from common import BadInput
from data import Record
from formats import adapters, checkpoints
from lab import parts, toyworld

ROOT = Path(__file__).parents[1]
OFFICIAL = ROOT.parent / "shared" / "data" / "benchmarks"
official = pytest.mark.skipif(
    not OFFICIAL.is_dir(), reason="the official benchmark files are not there"
)
SPLITS = ("random", "popular", "adversarial")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def question(image="a.png", thing="dog", label="yes"):
    return {"image": image, "text": f"Is there a {thing} in the image?", "label": label}


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)], capture_output=True, text=True
    )


# ---- POPE


@pytest.mark.parametrize(
    "text, said",
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no", "no"),
        ("not", "no"),
        ("No.", "no"),
        ("No, there is no dog.", "no"),
        ("There is not, I think", "no"),
        ("I see no dog", "no"),
        ("Yes, not only a dog", "no"),
        ("Yes. There is no cat.", "yes"),  # the text ends at the first full stop
        (".no", "yes"),
        ("", "yes"),
        ("NO", "yes"),
        ("nO", "yes"),
        ("Not", "yes"),
        ("No!", "yes"),
        ("no\nthere is none", "yes"),  # only a blank parts words
        ("\tno", "yes"),
        ("There isn't a dog", "yes"),
        ("None", "yes"),
        ("Nope", "yes"),
        ("n,o", "no"),  # commas vanish, they do not part words
        ("yes,no", "yes"),
        ("yes, no", "no"),
        ("不", "yes"),
    ],
)
def test_parse_answer(text, said):
    assert eval_pope.parse_answer(text) == said


def plain_score(labels, answers):
    """The same arithmetic, written apart."""
    no = [
        any(w in ("No", "no", "not") for w in a.partition(".")[0].replace(",", "").split(" "))
        for a in answers
    ]
    pairs = list(zip([not n for n in no], [label == "yes" for label in labels]))
    tp, fp, fn = pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))
    right = sum(a == b for a, b in pairs)
    p, r = tp / (tp + fp), tp / (tp + fn)
    f1 = 2 * p * r / (p + r)
    return {
        "accuracy": right / len(pairs),
        "precision": p,
        "recall": r,
        "f1": f1,
        "yes_ratio": (tp + fp) / len(pairs),
    }


def test_score_against_another_scorer():
    rng = random.Random(0)
    words = ["yes", "Yes,", "No", "no", "not", "no.", ".", "dog", "No,", "NO", "isn't", "there"]
    for _ in range(200):
        n = rng.randrange(20, 60)
        labels = [rng.choice(("yes", "no")) for _ in range(n)] + ["yes"]
        answers = [" ".join(rng.choices(words, k=rng.randrange(5))) for _ in range(n)] + ["yes"]
        found = eval_pope.score(labels, answers)
        assert found.pop("n") == n + 1
        assert found == pytest.approx(plain_score(labels, answers), abs=1e-12)


def test_score_by_hand():
    labels = ["yes", "yes", "yes", "no", "no", "no", "no", "no"]
    answers = [
        "Yes",
        "yes.",
        "No",
        "Yes",
        "no",
        "No, none",
        "not",
        "I see no dog",
    ]  # tp 2, fn 1, fp 1, tn 4
    expected = {
        "accuracy": 6 / 8,
        "precision": 2 / 3,
        "recall": 2 / 3,
        "f1": 2 / 3,
        "yes_ratio": 3 / 8,
        "n": 8,
    }
    assert eval_pope.score(labels, answers) == pytest.approx(expected)


def test_score_without_a_yes_is_no_division_by_zero():
    zero = {"precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
    assert eval_pope.score(["yes", "no"], ["no", "no"]) == zero | {"accuracy": 0.5, "n": 2}
    assert eval_pope.score(["no", "no"], ["no", "no"]) == zero | {"accuracy": 1.0, "n": 2}
    assert eval_pope.score(["no"], ["yes"]) == zero | {"accuracy": 0.0, "yes_ratio": 1.0, "n": 1}


def test_scores_of_one_are_whole():
    """A count of 1 is divided by 1."""
    one = dict.fromkeys(eval_pope.METRICS, 1.0)
    assert eval_pope.score(["yes"], ["yes"]) == one | {"n": 1}


@pytest.mark.parametrize("answers", [[], ["yes"], ["yes"] * 3])
def test_as_many_answers_as_questions(answers):
    with pytest.raises(BadInput, match=f"^score: {len(answers)} answers to 2 questions"):
        eval_pope.score(["yes", "no"], answers)
    with pytest.raises(BadInput, match="^here: "):
        eval_pope.score(["yes", "no"], answers, "here")


@pytest.mark.parametrize(
    "name, split",
    [
        ("coco_pope_random.json", "random"),
        ("x/coco-pope-popular.jsonl", "popular"),
        ("pope.adversarial.json", "adversarial"),
        ("random.json", "random"),
        ("pope_random_small.json", "pope_random_small"),
        ("gqa_pope_nonrandom.json", "gqa_pope_nonrandom"),
        ("random_questions", "random_questions"),
    ],
)
def test_split_name(name, split):
    assert eval_pope.split_name(name) == split


@pytest.mark.parametrize("names", [("a/x_random.json", "y_random.json"), ("mean.json",)])
def test_split_names_must_differ(tmp_path, names):
    (tmp_path / "a").mkdir()
    with pytest.raises(BadInput, match="is taken"):
        eval_pope.read_splits([write_lines(tmp_path / name, [question()]) for name in names])


@official
@pytest.mark.parametrize("split", SPLITS)
def test_official_coco_files(split):
    questions = eval_pope.read_questions(OFFICIAL / f"coco_pope_{split}.json")
    labels = [q["label"] for q in questions]
    assert (len(questions), labels.count("yes"), labels.count("no")) == (3000, 1500, 1500)
    assert len({q["image"] for q in questions}) == 500
    everything = eval_pope.score(labels, ["Yes"] * 3000)
    assert everything == pytest.approx(
        {"accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": 2 / 3, "yes_ratio": 1, "n": 3000}
    )


@official
def test_official_array_file_and_count_of_distinct_questions():
    path = OFFICIAL / "gqa_pope_seem_popular.json"
    assert path.read_text().startswith("[")
    questions = eval_pope.read_questions(path)
    assert len(questions) == 3000 and questions[0]["image"] == "2405722.jpg"
    assert eval_pope.split_name(path) == "popular"
    splits = eval_pope.read_splits([OFFICIAL / f"coco_pope_{split}.json" for split in SPLITS])
    asked = {(q["image"], q["text"]) for questions in splits.values() for q in questions}
    assert (
        f"of the 9000 official ones {len(asked)} are distinct"
        in (ROOT / "eval_pope.py").read_text()
    )


@pytest.mark.parametrize(
    "row, message",
    [
        ({"image": "a.png", "text": "?"}, "row 1: `label` is None"),
        (
            {"image": "a.png", "text": "?", "label": "Yes"},
            "row 1: `label` is 'Yes'; accepted are 'yes' and 'no'",
        ),
        ({"image": 7, "text": "?", "label": "no"}, "row 1: `image` is 7"),
        ({"image": "a.png", "text": "", "label": "no"}, "row 1: `text` is ''"),
        ("yes", "row 1: `image` is None"),
    ],
)
def test_bad_questions(tmp_path, row, message):
    with pytest.raises(BadInput, match=re.escape(message)):
        eval_pope.read_questions(write_lines(tmp_path / "q.json", [question(), row]))


def test_evaluate_asks_equal_questions_once(tmp_path, monkeypatch):
    asked = []

    def ask(contestant, records, max_new_tokens, *_):
        assert (max_new_tokens, contestant.batch_size) == (16, 5)
        asked.append([(r.image.name, r.turns) for r in records])
        for i, r in enumerate(records):
            yield [(i, {"answer": "No, none." if "cat" in r.turns[0] else "Yes"})]

    monkeypatch.setattr(evaluation, "ask_model", ask)
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    dog = question("a.png", "dog")
    first = [dog, question("b.png", "cat", "no"), dog, question("b.png", "dog", "no")]
    second = [question("b.png", "cat", "yes"), question("a.png", "owl", "no")]
    files = [
        write_lines(tmp_path / "x_random.json", first),
        write_lines(tmp_path / "own.json", second),
    ]
    out = tmp_path / "deep" / "out"
    metrics = eval_pope.evaluate(None, None, files, tmp_path, out, suffix=" Short.", batch_size=5)
    prompt = lambda thing: (f"Is there a {thing} in the image? Short.",)
    assert asked == [
        [
            ("a.png", prompt("dog")),
            ("b.png", prompt("cat")),
            ("b.png", prompt("dog")),
            ("a.png", prompt("owl")),
        ]
    ]
    assert metrics["random"] == pytest.approx(
        {"accuracy": 0.75, "precision": 2 / 3, "recall": 1, "f1": 0.8, "yes_ratio": 0.75, "n": 4}
    )
    assert metrics["own"] == {
        "accuracy": 0,
        "precision": 0,
        "recall": 0,
        "f1": 0,
        "yes_ratio": 0.5,
        "n": 2,
    }
    assert metrics["mean"] == pytest.approx(
        {
            "accuracy": 0.375,
            "precision": 1 / 3,
            "recall": 0.5,
            "f1": 0.4,
            "yes_ratio": 0.625,
            "n": 6,
        }
    )
    assert list(metrics) == ["random", "own", "mean"]
    assert json.loads((out / "metrics.json").read_text()) == metrics
    lines = [json.loads(line) for line in (out / "answers_random.jsonl").read_text().splitlines()]
    assert [line["question"] for line in lines] == [q["text"] for q in first]
    assert [line["answer"] for line in lines] == ["Yes", "No, none.", "Yes", "Yes"]
    answers = eval_pope.answers_to(second, out / "answers_own.jsonl")
    assert eval_pope.score([q["label"] for q in second], answers) == metrics["own"]


def test_pictures_and_placeholders_of_a_question_file(tmp_path, monkeypatch, capsys):
    """Without --images they are looked for beside the questions; leading folders are told."""
    asked = []

    def ask(contestant, records, *_):
        asked.extend(records)
        yield [(i, {"answer": "Yes"}) for i in range(len(records))]

    monkeypatch.setattr(evaluation, "ask_model", ask)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    row = question("val/a.png", "dog")
    row["text"] = "<image>\n" + row["text"]
    eval_pope.evaluate(None, None, [write_lines(tmp_path / "q.json", [row])], None, suffix="")
    (record,) = asked
    assert record.image == tmp_path / "images" / "a.png"
    assert record.turns == ("Is there a dog in the image?",)
    assert "1 image paths are read without their leading 'val'" in capsys.readouterr().err


def test_missing_picture_is_found_before_the_first_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "ask_model", lambda *a: pytest.fail("asked too early"))
    (tmp_path / "a.png").touch()
    path = write_lines(tmp_path / "random.json", [question(), question("b.png")])
    with pytest.raises(BadInput, match="random.json, row 1: image 'b.png' is not below"):
        eval_pope.evaluate(None, None, [path], tmp_path)


def test_pope_answers_on_the_command_line(tmp_path):
    labels = {"dog": "yes", "cat": "no", "owl": "no", "cup": "yes"}
    questions = [
        question(thing=thing, label=label) | {"question_id": i}
        for i, (thing, label) in enumerate(labels.items())
    ]
    files = [write_lines(tmp_path / f"q_{s}.json", questions) for s in SPLITS[:2]]
    texts = ["Yes", "No", "Yes", "No"]
    theirs = write_lines(
        tmp_path / "pope.jsonl",
        [{"question": q["text"], "answer": text} for q, text in zip(questions, texts)],
    )
    llava = write_lines(
        tmp_path / "llava.jsonl",
        [
            {"question_id": i, "prompt": questions[i]["text"] + eval_pope.SUFFIX, "text": "Yes"}
            for i in range(4)
        ],
    )
    done = run(
        "eval_pope.py", "--questions", *files, "--answers", theirs, llava, "--out", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["random"] == {
        "accuracy": 0.5,
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
        "yes_ratio": 0.5,
        "n": 4,
    }
    assert (
        metrics["popular"]["yes_ratio"],
        metrics["mean"]["yes_ratio"],
        metrics["mean"]["n"],
    ) == (1.0, 0.75, 8)
    table = [line.split() for line in done.stdout.split("\n\n")[0].splitlines()]
    assert [row[0] for row in table] == ["split", "random", "popular", "mean"]
    assert table[1][1:] == ["0.5000"] * 5 + ["4"]
    assert table[3][5:] == ["0.7500", "8"]

    write_lines(theirs, [{"question": "?", "answer": "Yes"}] * 3)
    done = run("eval_pope.py", "--questions", files[0], "--answers", theirs)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr
        == f"eval_pope.py: {theirs}: 3 answers to 4 questions; one answer a question is needed.\n"
    )


ASKED = [  # of two images the same question
    question("a.png", "dog", "yes") | {"question_id": 1},
    question("b.png", "dog", "no") | {"question_id": 2},
    question("b.png", "cat", "no") | {"question_id": 3},
]
SAID = ["Yes", "No", "No cat."]
OTHER = [q | {"text": q["text"].replace("cat", "cup")} for q in ASKED]


def as_pope(q):
    return {"question": q["text"]}


def as_llava(q):
    return {"question_id": str(q["question_id"]), "prompt": q["text"] + eval_pope.SUFFIX}


def as_ours(q):
    return {"question": q["text"] + " Be brief.", "image": "val2014/" + q["image"]}


def as_exact(q):
    return {"question": q["text"], "image": "val2014/" + q["image"]}


def as_suffixed(q):
    return {"question": q["text"] + eval_pope.SUFFIX, "image": q["image"]}


def as_whole(q):
    return q


def as_numbered(q):
    return {"question_id": q["question_id"]}


@pytest.mark.parametrize(
    "rows, order, fits",
    [
        (as_llava, [2, 0, 1], True),
        (as_exact, [1, 2, 0], True),
        (as_suffixed, [1, 2, 0], True),
        (as_whole, [1, 2, 0], True),  # the question's own row with an answer
        (as_numbered, [1, 2, 0], True),
        (as_pope, [0, 1, 2], True),
        (as_ours, [0, 1, 2], True),  # another suffix: in order alone
        (as_pope, [2, 1, 0], False),  # of which image is the answer about the dog?
        (as_ours, [1, 2, 0], False),
        (lambda q: {}, [0, 1, 2], False),
    ],
)
def test_an_answer_is_that_of_its_question(tmp_path, rows, order, fits):
    """By id, else by text and image, wherever it stands; where neither tells, the order must be the same."""
    key = "text" if rows in (as_llava, as_numbered) else "answer"
    path = write_lines(tmp_path / "a.jsonl", [rows(ASKED[i]) | {key: SAID[i]} for i in order])
    if fits:
        assert eval_pope.answers_to(ASKED, path) == SAID
        return
    with pytest.raises(
        BadInput, match="a.jsonl, row 0: .*matched by question_id, else by question"
    ):
        eval_pope.answers_to(ASKED, path)


@pytest.mark.parametrize("rows", [as_pope, as_llava, as_exact, as_whole])
@pytest.mark.parametrize("other", [OTHER, [q | {"image": f"x{q['image']}"} for q in ASKED]])
def test_a_file_of_other_questions_is_refused(tmp_path, rows, other):
    """All splits number their questions alike; what else a row says tells them apart."""
    if rows in (as_pope, as_llava) and other is not OTHER:
        pytest.skip("these files name no image")
    key = "text" if rows is as_llava else "answer"
    path = write_lines(tmp_path / "random.jsonl", [rows(q) | {key: "No"} for q in other])
    with pytest.raises(BadInput, match="Is the file of another split?"):
        eval_pope.answers_to(ASKED, path)


def test_an_id_that_is_there_twice_names_nothing(tmp_path):
    rows = [as_llava(ASKED[i]) | {"text": "No"} for i in (0, 2, 2)]
    with pytest.raises(BadInput, match="row 1: "):
        eval_pope.answers_to(ASKED, write_lines(tmp_path / "a.jsonl", rows))


def test_which_ids_a_message_names():
    """The first that is doubled, and the first that has no answer; none where a row has no id."""
    of = lambda *ids: [eval_pope.Asked(i, None, None) for i in ids]
    told = eval_pope.doubled_or_missing
    assert told(of("1", "2", "3", "4"), of("2", "2", "3", "3", "3")) == (
        "; question_id 2 has 2 answers; question_id 1 has none"
    )
    assert told(of("1", "2"), of("2", "1")) == told(of("1", "2"), of("1", None)) == ""


@official
@pytest.mark.parametrize("rows", [as_pope, as_llava, as_exact])
def test_the_official_splits_are_told_apart(tmp_path, rows):
    """An answers file of each fits its own split alone, whatever its name; POPE's order is needed for POPE's files."""
    files = {s: OFFICIAL / f"coco_pope_{s}.json" for s in SPLITS}
    asked = {s: eval_pope.read_questions(path) for s, path in files.items()}
    key = "text" if rows is as_llava else "answer"
    for one in SPLITS:
        said = [rows(q) | {key: q["label"]} for q in asked[one]]
        said = said if rows is as_pope else said[::-1]
        path = write_lines(tmp_path / "answers.jsonl", said)
        for other in SPLITS:
            if one == other:
                assert eval_pope.answers_to(asked[one], path) == [q["label"] for q in asked[one]]
                continue
            with pytest.raises(BadInput, match="Is the file of another split?"):
                eval_pope.answers_to(asked[other], path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--questions q_random.json", "--model and --out are needed"),
        ("--questions q_random.json --model m", "--model and --out are needed"),
        ("--questions q_random.json --model m --answers a.jsonl", "do not go with it"),
        (
            "--questions q_random.json --answers a.jsonl a.jsonl",
            "--answers has 2 files, --questions 1",
        ),
        (
            "--questions q_random.json --answers a.jsonl --out full",
            "full exists and is not an empty folder",
        ),
        (
            "--questions q_random.json --answers a.jsonl --out a.jsonl",
            "--out a.jsonl: a.jsonl is a file; a folder is accepted",
        ),
        (
            "--questions q_random.json --answers bad.jsonl",
            "bad.jsonl, row 0: a string `answer` (POPE) or `text`",
        ),
        ("--questions none.json --answers a.jsonl", "none.json: no such file"),
        ("--questions empty.json --answers a.jsonl", "empty.json: the file holds no question"),
        (
            "--questions q_random.json --model m --images . --out new --batch-size 0",
            "argument --batch-size: '0' was given; a whole number, 1 or more, is needed",
        ),
        ("--questions q_random.json --model none --images . --out new", "none"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_lines(Path("q_random.json"), [question()])
    write_lines(Path("a.jsonl"), [{"answer": "Yes"}])
    write_lines(Path("bad.jsonl"), [{"answer": None, "text": "Yes"}])
    Path("empty.json").touch()
    Path("a.png").touch()
    Path("full").mkdir()
    Path("full/file").touch()
    monkeypatch.setattr(sys, "argv", ["eval_pope.py", *arguments.split()])
    with pytest.raises(BadInput, match=re.escape(message)):
        eval_pope.main()
    assert not Path("new").exists()


# ---- CHAIR

SYNONYMS = """person, man, woman, people, baby, adult, child, passenger
dog, puppy, hound
bus, minibus
knife, pocketknife
tie, bow, bow tie
traffic light,  stop light
teddy bear, teddybear
bear
wine glass
hot dog
motorcycle,  motor bike
airplane, jet, plane
train
chair, seat
toilet
bench
elephant
mouse
cell phone, iPhone
oven, stove, stove top oven
dining table, table
potted plant
couch, sofa 
clock
plate
"""


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text(SYNONYMS)
    return eval_chair.read_synonyms(path)


MENTIONS = [
    ("A man and two women walk three dogs.", ["person", "person", "dog"]),
    ("puppies, hounds & a puppy", ["dog", "dog", "dog"]),
    ("Two teddy bears on a bench; benches!", ["teddy bear", "bench", "bench"]),
    ("a bear, teddy", ["bear"]),
    ("teddy. Bear", ["bear"]),  # a full stop is between the two
    ("traffic lights and stop  lights", ["traffic light", "traffic light"]),
    ("hot dogs and a dog", ["hot dog", "dog"]),
    ("a baby elephant, adult elephants, a baby", ["elephant", "elephant", "person"]),
    ("a baby bears a dog", ["bear", "dog"]),  # read as the animal, as there
    ("a passenger jet and a passenger train with passengers", ["airplane", "train", "person"]),
    ("a toilet seat", ["toilet"]),
    ("the seat of the toilet", ["toilet"]),
    ("the seat of the bus", ["chair", "bus"]),
    ("the train track, train tracks, a train", ["train"]),
    ("wine glasses; glasses of wine; a glass", ["wine glass"]),
    ("a bow tie and ties, bows", ["tie", "tie", "tie"]),
    ("knives and a pocketknife", ["knife", "knife"]),
    ("at 11 o'clock by the clock", ["clock"]),
    ("a home plate, a plate", ["plate"]),
    ("mice, a mouse and a mouse-pad", ["mouse", "mouse"]),
    ("buses, a bus, minibuses", ["bus", "bus", "bus"]),
    ("a motor bike beside motor bikes", ["motorcycle", "motorcycle"]),
    ("a stove top oven near the oven", ["oven", "oven"]),
    ("an IPHONE", ["cell phone"]),
    ("the dog's tail; the dogs' tails", ["dog", "dog"]),
    ("a dining table, a table, tables", ["dining table"] * 3),
    ("sofas by potted plants", ["couch", "potted plant"]),
    ("policemen and grandchildren doing dishes", []),
    ("manly dogged busy personal seating plant", []),
    ("", []),
]


@pytest.mark.parametrize("text, nodes", MENTIONS)
def test_mentions(vocabulary, text, nodes):
    assert eval_chair.mentions(text, vocabulary) == nodes


def test_chair_by_hand(vocabulary):
    truth = {1: {"dog", "person"}, 2: {"bus"}, 3: set(), 4: {"oven", "chair", "couch"}}
    captions = [
        (
            1,
            "A dog, a puppy and a bench; another bench.",
        ),  # 4 mentions, 2 false; 1 of 2 found; 9 words
        (2, "Nothing here."),  # 0 of 1 found; 2 words
        (3, "A teddy bear."),  # 1 mention, 1 false; 3 words
        (4, "chairs, chairs and a stove"),  # 3 mentions; 2 of 3 found; 5 words
    ]
    expected = {"chair_i": 3 / 8, "chair_s": 2 / 4, "recall": 3 / 6, "length": 19 / 4, "n": 4}
    assert eval_chair.score(captions, truth, vocabulary) == pytest.approx(expected)
    nothing = {"chair_i": 0, "chair_s": 0, "recall": 0, "length": 0, "n": 1}
    assert eval_chair.score([(3, "")], truth, vocabulary) == nothing
    alone = {"chair_i": 1, "chair_s": 1, "recall": 0, "length": 1, "n": 1, "chair_s_refine": 1}
    assert eval_chair.score([(2, "dog")], truth, vocabulary, refine=True) == alone
    found = eval_chair.score([(2, "bus")], truth, vocabulary)
    assert (found["recall"], found["length"]) == (1, 1)
    with pytest.raises(BadInput, match="no caption"):
        eval_chair.score([], truth, vocabulary)


def test_chair_brute_force(vocabulary):
    rng = random.Random(0)
    nodes = sorted(set(vocabulary.nodes.values()))
    for _ in range(100):
        truth = {i: set(rng.sample(nodes, rng.randrange(5))) for i in range(8)}
        said = [(rng.randrange(8), rng.choices(nodes, k=rng.randrange(6))) for _ in range(10)]
        captions = [
            (i, "".join(f"There is the {node}. " for node in objects)) for i, objects in said
        ]
        flat = [(i, o) for i, objects in said for o in objects]
        wrong = [(i, o) for i, o in flat if o not in truth[i]]
        hits = [o for i, objects in said for o in truth[i] if o in objects]
        expected = {
            "chair_i": len(wrong) / max(1, len(flat)),
            "chair_s": sum(any(o not in truth[i] for o in objects) for i, objects in said) / 10,
            "recall": len(hits) / max(1, sum(len(truth[i]) for i, _ in said)),
            "length": sum(len(caption.split()) for _, caption in captions) / 10,
            "n": 10,
        }
        assert eval_chair.score(captions, truth, vocabulary) == pytest.approx(expected)


def test_a_compound_of_toilet_is_no_toilet(tmp_path):
    """Only beside a toilet is a seat no chair."""
    (tmp_path / "synonyms.txt").write_text("toilet\nchair, seat\nbrush, toilet brush\n")
    vocabulary = eval_chair.read_synonyms(tmp_path / "synonyms.txt")
    for text, nodes in (
        ("A toilet with a seat.", ["toilet"]),
        ("A toilet seat.", ["toilet"]),
        ("A toilet brush on a seat.", ["brush", "chair"]),
    ):
        assert eval_chair.mentions(text, vocabulary) == nodes


@official
def test_official_synonyms():
    vocabulary = eval_chair.read_synonyms(OFFICIAL / "chair_synonyms.txt")
    nodes = set(vocabulary.nodes.values())
    assert len(nodes) == 80 and len(vocabulary.nodes) == 403
    assert {"potted plant", "tv", "cell phone", "hair drier", "motorcycle", "skis"} <= nodes
    for form, node in vocabulary.nodes.items():
        if form not in eval_chair.FIXED:
            assert eval_chair.mentions(f"There is a {form}.", vocabulary) == [node]
    plurals = "skis, scissors, doughnuts, giraffes, sandwiches, couches, geese, calves, ladies, oxen, ferries, skies"
    objects = [
        "skis",
        "scissors",
        "donut",
        "giraffe",
        "sandwich",
        "couch",
        "bird",
        "cow",
        "person",
        "cow",
        "boat",
    ]
    assert eval_chair.mentions(plurals, vocabulary) == objects  # skies are no skis
    # what a port of the official script (Maxlinn/CHAIR-metric-standalone, outputs.json) finds in its first example
    text = (
        "The image features a young child sitting in a high chair, reaching for a birthday cake placed on a dining "
        "table. The cake has a single pink candle on it, indicating that it is a birthday celebration. \n\nAnother "
        "person, possibly a woman, is present in the scene, standing behind the child and holding out their hand "
        "towards the cake. A cup is also visible on the table, close to the cake. The scene captures a joyful moment "
        "of a child's birthday celebration."
    )
    theirs = "person chair cake table cake person person person cake cup table cake person"
    objects = ["dining table" if word == "table" else word for word in theirs.split()]
    assert eval_chair.mentions(text, vocabulary) == objects


COCO = {
    "categories": [{"id": 18, "name": "dog"}, {"id": 6, "name": "bus"}],
    "images": [{"id": i, "file_name": f"COCO_{i}.jpg"} for i in (42, 7, 1)],
    "annotations": [{"image_id": i, "category_id": c} for i, c in ((42, 18), (7, 6), (42, 18))],
}
REFERENCES = {
    "annotations": [
        {"image_id": 42, "caption": "A man with his dog."},
        {"image_id": 42, "caption": "A puppy on a bench."},
        {"image_id": 7, "caption": "It is red."},
        {"image_id": 1, "caption": "Two people."},
        {"image_id": 99, "caption": "An oven elsewhere."},
    ]
}


@pytest.fixture
def coco(tmp_path):
    """Instances, captions and synonyms as files, and pictures that need not be opened."""
    for name, value in (("instances.json", COCO), ("captions.json", REFERENCES)):
        (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    for image in COCO["images"]:
        (tmp_path / image["file_name"]).touch()
    return tmp_path


def test_truth(coco, vocabulary):
    pictures = eval_chair.read_pictures(
        [coco / "instances.json"], [coco / "captions.json"], vocabulary
    )
    assert list(pictures) == [42, 7, 1]
    truth = eval_chair.truth_of(pictures, pictures, vocabulary)
    assert truth == {42: {"dog", "person", "bench"}, 7: {"bus"}, 1: {"person"}}


def test_truth_of_two_files(coco, vocabulary):
    more = {"images": [{"id": 5, "file_name": "COCO_5.jpg"}], "annotations": []}
    (coco / "more.json").write_text(json.dumps(COCO | more))
    (coco / "more_captions.json").write_text(
        json.dumps({"annotations": [{"image_id": 5, "caption": "A couch."}]})
    )
    files = (
        [coco / "instances.json", coco / "more.json"],
        [coco / "more_captions.json", coco / "captions.json"],
    )
    pictures = eval_chair.read_pictures(*files, vocabulary)
    assert eval_chair.truth_of([5, 7], pictures, vocabulary) == {5: {"couch"}, 7: {"bus"}}


def test_chair_evaluate(coco, monkeypatch):
    said = {"COCO_42.jpg": "A dog and a bus. A bus!", "COCO_7.jpg": "A bus."}

    def ask(contestant, records, max_new_tokens, *_):
        assert [r.turns for r in records] == [("Tell.",)] * 2 and max_new_tokens == 128
        yield [(i, {"answer": said[r.image.name]}) for i, r in enumerate(records)]

    monkeypatch.setattr(evaluation, "ask_model", ask)
    files = [coco / "instances.json"], [coco / "captions.json"], coco / "synonyms.txt"
    figures = eval_chair.evaluate(None, None, *files, coco, coco / "out", prompt="Tell.", limit=2)
    assert figures == pytest.approx(
        {"chair_i": 2 / 4, "chair_s": 1 / 2, "recall": 2 / 4, "length": 9 / 2, "n": 2}
    )
    assert json.loads((coco / "out" / "metrics.json").read_text()) == figures
    assert [
        json.loads(line) for line in (coco / "out" / "captions.jsonl").read_text().splitlines()
    ] == [
        {
            "image_id": 42,
            "image": "COCO_42.jpg",
            "caption": "A dog and a bus. A bus!",
            "hallucinated": ["bus", "bus"],
        },
        {"image_id": 7, "image": "COCO_7.jpg", "caption": "A bus.", "hallucinated": []},
    ]


def test_chair_answers_on_the_command_line(coco):
    rows = [
        {"image_id": 42, "caption": "A dog, a bus."},
        {"image_id": "COCO_7.jpg", "caption": "A bus."},
    ]
    files = [f"--{name}={coco / name}.json" for name in ("instances", "captions")] + [
        f"--synonyms={coco}/synonyms.txt"
    ]
    (coco / "array.json").write_text(json.dumps(rows))
    first = run("eval_chair.py", *files, "--answers", coco / "array.json", "--out", coco / "out")
    assert first.returncode == 0, first.stderr
    metrics = json.loads((coco / "out" / "metrics.json").read_text())
    assert metrics == pytest.approx(
        {"chair_i": 1 / 3, "chair_s": 0.5, "recall": 2 / 4, "length": 3, "n": 2}
    )
    again = run(
        "eval_chair.py", *files, "--answers", coco / "out" / "captions.jsonl"
    )  # its own file is one too
    assert again.stdout == first.stdout and re.search("chair_i +0.3333 ", first.stdout)


def test_a_caption_is_that_of_its_image(coco):
    """Ids may be strings. A row of ours names the image too: with another image of that id it is of other data."""
    pictures = eval_chair.read_pictures(
        [coco / "instances.json"], [], eval_chair.read_synonyms(coco / "synonyms.txt")
    )
    row = {"image_id": "42", "caption": "A dog.", "image": f"val2014/{pictures[42].file}"}
    path = write_lines(coco / "a.jsonl", [row])
    assert eval_chair.read_answers(path, pictures) == [(42, "A dog.")]
    write_lines(path, [row | {"image": "other.jpg"}])
    with pytest.raises(BadInput, match="row 0: the image is 'other.jpg', but `image_id` '42' is"):
        eval_chair.read_answers(path, pictures)


def change(coco, name, **values):
    content = json.loads((coco / name).read_text())
    (coco / name).write_text(json.dumps(content | values))


MISTAKES = {
    "category without a word": (
        lambda c: change(c, "instances.json", categories=[{"id": 18, "name": "zebra"}]),
        "instances.json, categories[0]: the category 'zebra' is not in the synonym file",
    ),
    "unknown category": (
        lambda c: change(c, "instances.json", annotations=[{"image_id": 42, "category_id": 3}]),
        "instances.json, annotations[0]: category_id 3 is not among",
    ),
    "no file name": (
        lambda c: change(c, "instances.json", images=[{"id": 42}]),
        "instances.json, images[0]: `file_name` is None; a text is needed",
    ),
    "no images": (
        lambda c: change(c, "instances.json", images=None),
        "instances.json: `images` is None",
    ),
    "same id twice": (
        lambda c: change(
            c, "instances.json", images=[*COCO["images"], {"id": 7, "file_name": "x.jpg"}]
        ),
        "images[3]: id 7 is 'x.jpg' here and 'COCO_7.jpg' elsewhere",
    ),
    "no reference": (
        lambda c: change(c, "captions.json", annotations=REFERENCES["annotations"][:2]),
        "image id 7 (COCO_7.jpg) has no reference caption",
    ),
    "bad reference": (
        lambda c: change(c, "captions.json", annotations=[{"image_id": 7}]),
        "captions.json, annotations[0]: `caption` is None; a text is needed",
    ),
    "no JSON": (
        lambda c: (c / "captions.json").write_text("{"),
        "captions.json: not a readable JSON file",
    ),
    "no synonyms": (
        lambda c: (c / "synonyms.txt").unlink(),
        "synonyms.txt: not a readable text file",
    ),
    "empty synonyms": (lambda c: (c / "synonyms.txt").write_text("\n"), "synonyms.txt: no word"),
    "two objects": (
        lambda c: (c / "synonyms.txt").write_text(SYNONYMS + "cat, dog\n"),
        "line 26: 'dog' is of 'dog' already",
    ),
    "unknown image": (
        lambda c: write_lines(c / "answers.jsonl", [{"image_id": 8, "caption": "A bus."}]),
        "answers.jsonl, row 0: `image_id` is 8",
    ),
    "unknown file": (
        lambda c: write_lines(c / "answers.jsonl", [{"image_id": "8.jpg", "caption": "A bus."}]),
        "answers.jsonl, row 0: `image_id` is '8.jpg'",
    ),
    "no caption": (
        lambda c: write_lines(c / "answers.jsonl", [{"image_id": 7}]),
        "answers.jsonl, row 0: `caption` is None; a text is needed",
    ),
    "no answers": (lambda c: write_lines(c / "answers.jsonl", []), "no caption to score"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_chair_mistakes(coco, monkeypatch, name):
    spoil, message = MISTAKES[name]
    write_lines(coco / "answers.jsonl", [{"image_id": 7, "caption": "A bus."}])
    arguments = "--instances instances.json --captions captions.json --synonyms synonyms.txt --answers answers.jsonl"
    monkeypatch.setattr(sys, "argv", ["eval_chair.py", *arguments.split()])
    monkeypatch.chdir(coco)
    eval_chair.main()
    spoil(coco)
    with pytest.raises(BadInput, match=re.escape(message)):
        eval_chair.main()


# ---- both, with a model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "world"
    texts = {"text": 4, "text_mix": 9, "text_test": 3}
    toyworld.write(folder, 3, 30, 5, 8, size=48, texts=texts)
    parts.write(folder / "parts", folder, 3, epochs=0)
    return folder


def test_toy_truth_agrees_with_its_scenes(world):
    vocabulary = eval_chair.read_synonyms(world / "synonyms.txt")
    pictures = eval_chair.read_pictures(
        [world / "instances.json"], [world / "captions.json"], vocabulary
    )
    scenes = json.loads((world / "scenes.json").read_text())
    for picture in pictures.values():
        there = {thing["name"] for thing in scenes[picture.file]["things"]}
        assert picture.objects == there
        for caption in picture.captions:  # they tell everything, and nothing else
            assert set(eval_chair.mentions(caption, vocabulary)) == there


def test_command_lines_with_a_model(world, tmp_path, monkeypatch, capsys):
    model, processor = checkpoints.compose(world / "parts" / "clip", world / "parts" / "llm")
    checkpoints.save(model, processor, tmp_path / "model")
    common = f"--images {world}/images --model {tmp_path}/model --dtype float32 --device cpu --batch-size 16"
    files = " ".join(f"{world}/pope_{split}.json" for split in SPLITS)
    monkeypatch.setattr(
        sys, "argv", f"eval_pope.py --questions {files} {common} --out {tmp_path}/pope".split()
    )
    eval_pope.main()
    asked = {split: eval_pope.read_questions(world / f"pope_{split}.json") for split in SPLITS}
    for split, questions in asked.items():
        lines = [
            json.loads(line)
            for line in (tmp_path / "pope" / f"answers_{split}.jsonl").read_text().splitlines()
        ]
        assert [line["question"] for line in lines] == [q["text"] for q in questions]
    printed = capsys.readouterr().out
    found = [line.split() for line in printed.split("\n\n")[0].splitlines()]
    assert [row[0] for row in found] == ["split", *SPLITS, "mean"]
    assert int(found[-1][-1]) == sum(map(len, asked.values()))
    figures = (tmp_path / "pope" / "metrics.json").read_bytes()
    monkeypatch.setattr(evaluation, "ask_model", lambda *a: pytest.fail("asked again"))
    eval_pope.main()  # the same command finds all answers there
    assert (tmp_path / "pope" / "metrics.json").read_bytes() == figures
    monkeypatch.undo()
    model.prepare(lora_rank=4)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(weight, std=0.5)
    adapters.save_adapter(model, tmp_path / "adapter", str(tmp_path / "model"))
    truth = f"--instances {world}/instances.json --captions {world}/captions.json --synonyms {world}/synonyms.txt"
    said = {}
    for out, more in (("plain", ""), ("adapted", f"--adapter {tmp_path}/adapter")):
        arguments = f"eval_chair.py {truth} {common} {more} --limit 5 --max-new-tokens 8 --out {tmp_path / out}"
        monkeypatch.setattr(sys, "argv", arguments.split())
        eval_chair.main()
        said[out] = [
            json.loads(line)
            for line in (tmp_path / out / "captions.jsonl").read_text().splitlines()
        ]
        assert [line["image"] for line in said[out]] == [f"test_{i:05d}.png" for i in range(5)]
        assert json.loads((tmp_path / out / "metrics.json").read_text())["n"] == 5
    records = [
        Record("here", world / "images" / line["image"], (eval_chair.PROMPT,))
        for line in said["plain"]
    ]
    assert [line["caption"] for line in said["adapted"]] == [
        t for (t,) in sampling.generate(model, processor, records, 8)
    ]
    assert said["plain"] != said["adapted"]


@pytest.mark.parametrize("script", [eval_pope, eval_chair])
def test_the_request_is_for_the_adapter(script, world, tmp_path, monkeypatch):
    """The prompts that base and adapter get in one run, as their tokens say."""
    model, processor = checkpoints.compose(world / "parts" / "clip", world / "parts" / "llm")
    checkpoints.save(model, processor, tmp_path / "model")
    model.prepare(lora_rank=2)
    adapters.save_adapter(model, tmp_path / "run" / "adapter", str(tmp_path / "model"))
    got, whole = [], evaluation.sample

    def seen(model, prompts, *args, given, **flags):
        adapted = bool(model.lora_layers())
        for start, rests in zip(prompts, given):
            ids = [[*start.tolist(), *rest.tolist()] for rest, _ in rests]
            got.extend((adapted, processor.tokenizer.decode(of)) for of in ids)
        return whole(model, prompts, *args, given=given, **flags)

    monkeypatch.setattr(evaluation, "sample", seen)
    if script is eval_pope:
        words, question = f"--questions {world}/pope_random.json", "?" + eval_pope.SUFFIX
    else:
        files = (f"--{name} {world}/{name}" for name in ("instances", "captions", "synonyms"))
        words = " ".join(f"{flag}.{end}" for flag, end in zip(files, ("json", "json", "txt")))
        words, question = f"{words} --limit 3 --max-new-tokens 4", eval_chair.PROMPT
    words += f" --images {world}/images --model {tmp_path}/model --dtype float32 --device cpu"
    words += f" --adapter none {tmp_path}/run/adapter --out {tmp_path}/out"
    words += " --attributes verbosity=1"
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words.split()])
    script.main()
    request = "\nHelpfulness:4,Correctness:4,Coherence:4,Complexity:4,Verbosity:1"
    ends = {(adapted, text[text.rindex(question) :]) for adapted, text in got}
    assert ends == {(False, f"{question} ASSISTANT:"), (True, f"{question}{request} ASSISTANT:")}


def test_the_model_that_is_evaluated(tmp_path, monkeypatch):
    """All flags about it reach it: template and aspect of the image too."""
    loaded, adapted, processor = [], [], SimpleNamespace()
    load = lambda *args, quantize: loaded.append((*args, quantize)) or ("model", processor)
    monkeypatch.setattr(checkpoints, "load", load)
    monkeypatch.setattr(adapters, "load_adapter", lambda *args: adapted.append(args))
    monkeypatch.setattr(adapters, "as_trained", lambda _, *given: given)
    given = {"model": "m", "dtype": "bfloat16", "device": "cpu", "template": "plain"}
    given |= {"image_aspect": "checkpoint", "adapter": None, "out": "out"}
    given |= {"quantize": "nf4", "attributes": None}
    assert evaluation.load(SimpleNamespace(**given)) == ("model", processor) and not adapted
    evaluation.load(SimpleNamespace(**given | {"adapter": "run/adapter"}))
    want = ("m", torch.bfloat16, torch.device("cpu"), "plain", "checkpoint", "nf4")
    assert loaded == [want, want] and adapted == [("model", "run/adapter")]
    assert processor.ask == ""
