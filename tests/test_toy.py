"""lab/toy.py: which flags a toy run gets, and what is built, cached, and built anew when something that made it changes."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval_pope
from common import run
from formats import dataset
from formats.files import image_folders
from lab import oracle, parts, toy, toyworld

SOURCES = (
    "sft model attention data lab/parts lab/oracle lab/questions sampling reward_model facts lora"
).split()


@pytest.fixture
def built(monkeypatch, tmp_path):
    """What is built, in order: (script or function, arguments). Nothing takes long; the world is a folder's name."""
    monkeypatch.chdir(tmp_path)
    home, calls = tmp_path / "home", []
    for name in SOURCES:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / f"{name}.py").write_text(f'"""{name}"""\nx = 1\n')
    monkeypatch.setattr(toy, "HOME", home)
    monkeypatch.setattr(toy, "world", lambda seed: Path(f"world-{seed}"))

    def script(name, *arguments):
        calls.append((name, *arguments[:3]))
        model = arguments[3] / "model"
        model.mkdir(parents=True)
        (model / "model.safetensors").write_text(f"{name} {arguments[1]}")

    def answers_of(model, world, out, seed):
        calls.append(("answers", str(model), str(world), seed))
        Path(out).mkdir(exist_ok=True)
        for name in toy.OWN_ANSWERS:
            (Path(out) / name).write_text("[]")
        return {"pairs": 3}

    monkeypatch.setattr(toy, "script", script)
    monkeypatch.setattr(toy, "sight", lambda model, out, seed: 0.92)
    monkeypatch.setattr(toy, "parts", lambda seed: Path(f"parts-{seed}"))
    monkeypatch.setattr(parts, "take_llm", lambda model, folder: calls.append(("llm", model.name)))
    monkeypatch.setattr(oracle, "answers_of", answers_of)
    return calls


def of_base(seed):
    """What a base needs: an LLM that reads, taken out of its run, then visual tuning."""
    return [
        ("sft.py", "--seed", seed, "--out"),
        ("llm", "model"),
        ("sft.py", "--seed", seed, "--out"),
    ]


def edit(name, text):
    """Change a source file of the project."""
    (toy.HOME / f"{name}.py").write_text(text)


def test_the_base_of_seed_0_is_shipped_and_the_others_are_built_once(built):
    assert toy.base(0) == Path(toy.__file__).parent / "base" and not built
    one = toy.base(1)
    assert toy.base(1) == one and one.parts[0] == ".cache" and (one / "model.safetensors").is_file()
    assert toy.base(2) != one
    assert built == of_base(1) + of_base(2)


@pytest.mark.parametrize("seen, times", [([0.92], 0), ([0.9199, 0.95], 1), ([0.8, 0.91, 0.5], 2)])
def test_a_base_that_sees_badly_is_trained_on(built, monkeypatch, capfd, seen, times):
    """At most twice, each time from where it was; the last model is the base."""
    asked, given = [], []
    script = toy.script

    def noted(name, *arguments):
        flags = {"--data": []}
        for flag, value in zip(arguments[::2], arguments[1::2]):
            flags[flag] = [*flags["--data"], str(value)] if flag == "--data" else value
        given.append(flags)
        script(name, *arguments)
        (arguments[3] / "model" / "model.safetensors").write_text(f"weights {len(given)}")

    def sight(model, out, seed):
        asked.append((model / "model.safetensors").read_text())
        assert seed == 3 and out.name == f"run{len(asked)}-before"
        return seen[len(asked) - 1]

    monkeypatch.setattr(toy, "sight", sight)
    monkeypatch.setattr(toy, "script", noted)
    model = toy.base(3)
    _, first, *others = given  # of the reader, of the base
    assert asked == [f"weights {2 + i}" for i in range(min(times + 1, 2))]
    assert (model / "model.safetensors").read_text() == f"weights {2 + times}"
    assert "--steps" not in first and "--model" not in first and len(others) == times
    for i, flags in enumerate(others):
        assert flags["--seed"] == 3 and flags["--steps"] == "1000" and flags["--lr"] == "1.5e-3"
        assert str(flags["--images"]) == "world-3/images"
        assert flags["--data"] == ["world-3/instruct.json", "world-3/text_mix.json"]
        assert flags["--model"].parts[-2:] == ("run" if i == 0 else "run1", "model")
    told = [f"it sees {value:.3f}, less than 0.92: trained on" for value in seen[:times]]
    assert [line for line in capfd.readouterr().err.splitlines() if "sees" in line] == told


def test_how_well_a_base_sees(monkeypatch, tmp_path, checkpoint):
    """By eval_pope.py's own command line, on pictures that neither training nor a test has."""
    texts = {"text": 1, "text_mix": 1, "text_test": 1}
    toyworld.write(tmp_path / "world", 0, 8, 12, 8, size=28, texts=texts)
    monkeypatch.setattr(toy, "world", lambda seed: tmp_path / "world")
    value = toy.sight(checkpoint, tmp_path / "seen", 0)
    rows = [json.loads(line) for line in open(tmp_path / "seen" / "pope_random.json")]
    pictures = {row["image"] for row in rows}
    assert len(pictures) == 12 and all(name.startswith("preference_") for name in pictures)
    answers = [json.loads(line) for line in open(tmp_path / "seen/pope/answers_random.jsonl")]
    right = [eval_pope.parse_answer(a["answer"]) == row["label"] for a, row in zip(answers, rows)]
    assert len(right) == len(rows) and value == pytest.approx(sum(right) / len(right), abs=1e-12)


@pytest.mark.parametrize("name", ["sft", "model", "attention", "data", "lab/parts"])
def test_another_code_is_another_base(built, name):
    """Of all files that make it; words about the code change nothing."""
    one = toy.base(1)
    edit(name, '"""Other words."""\nx = 1  # a comment\n')
    assert toy.base(1) == one
    edit(name, "x = 2\n")
    assert toy.base(1) != one and built == 2 * of_base(1)


def test_the_base_s_own_answers(built):
    """Two files are its own answers, built once together; the others are the world's."""
    assert toy.data_file(1, "povid.json") == Path("world-1/povid.json") and not built
    two = [toy.data_file(1, name) for name in toy.OWN_ANSWERS]
    assert [path.name for path in two] == list(toy.OWN_ANSWERS) and two[0].parent == two[1].parent
    assert all(path.is_file() for path in two)
    assert built == [*of_base(1), ("answers", str(toy.base(1)), "world-1", 1)]
    for name in ("lab/oracle", "sampling"):
        edit(name, "x = 3\n")
        assert toy.data_file(1, toy.OWN_ANSWERS[0]) not in two
    (toy.base(1) / "model.safetensors").write_text("other weights")
    toy.data_file(1, toy.OWN_ANSWERS[0])
    assert [call[0] for call in built[3:]] == 4 * ["answers"]


def test_the_problems_of_a_world(built):
    """Questions with their right answers, from its truth; built once, and anew for another code."""
    Path("world-1/images").mkdir(parents=True)
    cup = {"name": "cup", "colour": "red", "count": 2, "column": 0, "row": 0}
    scenes = {"preference_00000.png": {"kind": "kitchen", "things": [cup]}}
    Path("world-1/scenes.json").write_text(json.dumps(scenes))
    path = toy.data_file(1, "questions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    count = {"problem": "How many cups are there?", "solution": "<answer> 2 </answer>"}
    assert {"image": "preference_00000.png"} | count in rows and len(rows) == 4
    assert image_folders(path) == [path.parent, Path("world-1/images").resolve()]
    path.write_text("[]")
    assert toy.data_file(1, "questions.jsonl") == path and path.read_text() == "[]"
    for name in ("lab/oracle", "lab/questions"):
        edit(name, "x = 3\n")
        assert toy.data_file(1, "questions.jsonl") != path
    assert not built


def test_pairs_without_their_images(built):
    """povid.json's rows and nothing of a picture, read by dpo.py's reader as text alone."""
    turns = lambda answer: [
        {"from": "human", "value": "<image>\nWhat is shown?"},
        {"from": "gpt", "value": answer},
    ]
    row = {"id": "1", "image": "preference_00000.png"}
    row |= {"conversations": turns("A cup."), "rejected_conversations": turns("A cat.")}
    Path("world-1").mkdir()
    Path("world-1/povid.json").write_text(json.dumps([row]))
    path = toy.data_file(1, "povid_imageless.json")
    assert "image" not in path.read_text().replace("imageless", "")
    (record,) = dataset.read([str(path)], None, answers=2).records
    assert record.image is None and record.turns == ("What is shown?",)
    assert record.answers == ("A cup.", "A cat.")
    path.write_text("[]")
    assert toy.data_file(1, "povid_imageless.json") == path and path.read_text() == "[]"


def test_the_reward_model(built):
    first = toy.reward_model(1)
    assert toy.reward_model(1) == first and first.name == "run"
    assert built[3:] == [("reward_model.py", "--seed", 1, "--out")]
    seen = {first}
    for name in ("reward_model", "facts", "lora"):
        edit(name, "x = 3\n")
        seen.add(toy.reward_model(1))
    (toy.base(1) / "model.safetensors").write_text("other weights")
    assert len(seen | {toy.reward_model(1)}) == 5


def test_answers_of_a_model_on_the_command_line(built, monkeypatch, capsys):
    """About the world of --seed, which seeds the sampling too."""
    words = ["x", "--answers-of", "runs/sft-0/model", "--seed", "4", "--out", "answers"]
    monkeypatch.setattr(sys, "argv", words)
    run(toy.main)
    assert built == [("answers", "runs/sft-0/model", "world-4", 4)]
    assert capsys.readouterr().out == "pairs: 3\n"
    # a script that reads the answers finds the images without --images
    Path("world-4/images").mkdir(parents=True)
    found = image_folders("answers/vlfeedback.jsonl")
    assert found == [Path("answers"), Path("world-4/images").resolve()]


def flags(**changed):
    """A script's resolved flags."""
    given = {"model": None, "data": None, "images": None, "seed": 4, "steps": None, "lr": 1.0}
    return SimpleNamespace(**given | changed, given=set(changed), toy_world=None)


def test_a_new_model_is_made_of_the_world_s_parts(built, monkeypatch):
    monkeypatch.setattr(toy, "reader", lambda seed: Path(f"reader-{seed}/llm"))
    settings = {"data": ["a.json", "b.json"], "vision": "clip", "llm": "llm", "steps": 9}
    args = flags(vision=None, llm=None)
    args.given = set()
    toy.fill(args, settings)
    assert (args.vision, args.llm) == ("parts-4/clip", "reader-4/llm") and args.model is None
    assert args.data == ["world-4/a.json", "world-4/b.json"] and args.steps == 9
    assert (args.images, args.toy_world, args.lr) == ("world-4/images", "world-4", 1.0)

    given = flags(vision="CLIP", llm="LLM", data=["mine.json"])
    toy.fill(given, settings)
    assert (given.vision, given.data, given.steps, given.toy_world) == (
        "CLIP",
        ["mine.json"],
        None,
        None,
    )


def test_what_is_given_stays(built):
    settings = {"data": ["a.json"], "steps": 9, "lr": 2.0}
    args = flags(images="mine")
    toy.fill(args, settings)
    assert (args.images, args.data, args.lr) == ("mine", ["world-4/a.json"], 2.0)
    args = flags(epochs=3, lr=5.0)
    toy.fill(args, settings)
    assert (args.steps, args.lr, args.model) == (None, 5.0, str(toy.base(4)))
    args = flags(data=["mine.json"])
    toy.fill(args, settings)
    assert (args.data, args.images, args.toy_world) == (["mine.json"], None, "world-4")


def test_the_corrected_answers_of_seed_0_are_shipped(built):
    """Of the shipped base, so that `python dpo.py` begins at once; another seed's are built."""
    path = toy.data_file(0, "rlhf_v.jsonl")
    assert path == Path(toy.__file__).parent / "base" / "rlhf_v.jsonl.gz" and not built
    rows = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
    assert len(rows) == 3762 and {row["origin_dataset"] for row in rows} == {"toyworld"}
    texts = [json.loads(row["text"]) for row in rows]
    assert all(text["chosen"] != text["rejected"] for text in texts)
    assert toy.data_file(0, "vlfeedback.jsonl").parent.name.startswith("answers-")
    assert toy.data_file(1, "rlhf_v.jsonl").parent.name.startswith("answers-")
