"""lab/reading.py and lab/text_score.py: every answer stands in its description, read by another way; the score by hand."""

import json
import re

import pytest

from lab import reading, scenes, text_score
from lab.oracle import claims, mentions

NUMBERS = {"one": 1, "two": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reading")
    reading.write(folder, 3, {"text": 400, "text_mix": 60, "text_test": 300})
    return folder


def rows(folder, name):
    return json.loads((folder / name).read_text())


def told(text):
    """What a description says, through the oracle's reader: [Claim] of its things."""
    return [claim for claim in claims(text) if claim.name]


def test_every_answer_is_in_the_description(folder):
    """Read by the oracle's own reader of captions, which wrote none of them."""
    checked = set()
    for row in rows(folder, "text_test.json"):
        (asked, answer), task = (turn["value"] for turn in row["conversations"]), row["task"]
        if task == "verify":
            continue
        facts = asked.startswith(reading.INTRO)
        lines = asked.split("\n")
        description = lines[1].removeprefix("- ") if facts else lines[0]
        question = "\n".join(lines[3:] if facts else lines[1:])
        things = told(description)
        names = [claim.name for claim in things]
        if task == "yes_no":
            noun = re.search(r"Is there an? (.*?) in the image", question)[1]
            assert answer.startswith("Yes") == (noun in names)
        elif task in ("where", "color", "count"):
            (thing,) = [
                c for c in things if re.search(rf"\b({c.name}|{scenes.plural(c.name)})\b", question)
            ]
            if task == "where":
                assert scenes.PLACES[thing.column] in answer
            elif task == "color":
                assert answer.endswith(f"{thing.colour}.")
            else:
                assert NUMBERS[answer.split()[2]] == thing.count
        elif task == "choice":
            assert re.search(rf"^{answer}\. (.*)$", question, re.M)[1] in names
        elif task in ("list", "sort"):
            assert answer == ", ".join(sorted(names) if task == "sort" else names) + "."
        elif task == "first":
            assert answer == f"{names[0]} and {names[1]}."
        elif task == "place":
            column = next(i for i, place in enumerate(scenes.PLACES) if place in question)
            there = [c.name for c in things if c.column == column]
            assert answer == "nothing." if not there else mentions(answer) == there
        elif task == "colors":
            wanted = list(dict.fromkeys(c.colour for c in things if c.colour))
            assert answer == (", ".join(wanted) or "none") + "."
        elif task == "rewrite":
            assert [(c.name, c.count, c.column) for c in told(answer)] == [
                (c.name, c.count, c.column) for c in things
            ]
            assert not any(c.colour for c in told(answer))
        checked.add(task)
    assert checked == {*reading.TASKS, "rewrite"} - {"verify"}


def test_verify_is_yes_if_nothing_differs(folder):
    """Half of the retellings are true; a third of the rows have the description last."""
    verdicts, last = [], 0
    for row in rows(folder, "text.json"):
        for asked, answer in zip(row["conversations"][::2], row["conversations"][1::2]):
            if "Is all of this true?" not in asked["value"]:
                continue
            first = row["conversations"][0]["value"]
            retelling = asked["value"].split("Is all of this true? ")[1].split("\n")[0]
            rest = first.replace(retelling, "")
            behind = asked["value"].startswith("Is all of this true?") and "\n" in asked["value"]
            last += behind
            description = next(line for line in rest.split("\n") if told(line)).removeprefix("- ")
            of = lambda text: sorted((c.name, c.colour, c.count, c.column) for c in told(text))
            assert (of(retelling) == of(description)) == (answer["value"] == "Yes")
            verdicts.append(answer["value"] == "Yes")
    assert len(verdicts) > 150 and 0.42 < sum(verdicts) / len(verdicts) < 0.58
    assert 0.2 < last / len(verdicts) < 0.42


def test_layout_and_splits(folder):
    """LLaVA-Instruct without images; no description is in two files; one row in nine has two questions."""
    seen = {}
    for name in ("text.json", "text_mix.json", "text_test.json"):
        found = rows(folder, name)
        assert len({row["id"] for row in found}) == len(found)
        assert all("image" not in row for row in found)
        turns = [[turn["from"] for turn in row["conversations"]] for row in found]
        assert all(t in (["human", "gpt"], ["human", "gpt"] * 2) for t in turns)
        two = sum(len(t) == 4 for t in turns) / len(turns)
        assert two == 0 if name == "text_test.json" else 0.05 < two < 0.25
        seen[name] = {row["conversations"][0]["value"].split("\n")[0] for row in found}
    assert len(rows(folder, "text_test.json")) == 300 * reading.TEST_QUESTIONS
    scenes_of = scenes.some_scenes(3, {"text": 400, "text_mix": 60, "text_test": 300})
    sets = [set(part.values()) for part in scenes_of.values()]
    assert not sets[0] & sets[2] and not sets[1] & sets[2] and not sets[0] & sets[1]


def test_same_seed_same_texts(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        reading.write(tmp_path / name, seed, {"text": 5, "text_mix": 3, "text_test": 2})
    read = lambda name: [(tmp_path / name / f"{f}.json").read_bytes() for f in reading.SIZES]
    assert read("a") == read("b") != read("c")


def test_score_by_hand():
    figures = text_score.score(["sort", "list", "sort", "list", "list"], [1, 0, 0, 0, 1])
    assert figures == {
        "mean": pytest.approx((1 / 3 + 1 / 2) / 2),
        "list": pytest.approx(1 / 3),
        "sort": 0.5,
        "n": 5,
    }


def test_the_text_score_of_a_model(folder, tmp_path, monkeypatch):
    """A model that says the right thing to every second question; blanks at the ends are no fault."""
    path = folder / "text_test.json"
    known = {
        row["conversations"][0]["value"]: row["conversations"][1]["value"]
        for row in rows(folder, path.name)
    }

    def answers(model, processor, records, limit, **more):
        assert all(r.image is None and len(r.turns) == 1 for r in records) and limit >= 90
        return [
            [f" {known[r.turns[0]]}\n" if i % 2 else known[r.turns[0]].lower() + "!"]
            for i, r in enumerate(records)
        ]

    monkeypatch.setattr(text_score, "generate", answers)
    figures = text_score.evaluate(None, None, path, tmp_path / "text")
    written = [
        json.loads(line) for line in (tmp_path / "text" / "answers.jsonl").read_text().splitlines()
    ]
    right = [line["answer"] == line["right"] for line in written]
    assert sum(right) == len(right) / 2 and figures["n"] == len(right)
    assert json.loads((tmp_path / "text" / "metrics.json").read_text()) == figures
    for task in {*reading.TASKS, "rewrite"}:
        mine = [r for r, line in zip(right, written) if line["task"] == task]
        assert figures[task] == pytest.approx(sum(mine) / len(mine))
