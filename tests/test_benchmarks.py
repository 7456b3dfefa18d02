"""lab/benchmarks.py: the toy world's test pictures in the layouts of AMBER and R1-V, with the truth that they have."""

import json
import random
import sys
from pathlib import Path

import pytest

import eval_amber
import eval_judge
import eval_vqa
from common import BadInput
from formats import alpaca_eval, llava_bench, mm_vet, mmhal, mt_bench, vqa
from lab import benchmarks, toyworld
from lab import scenes as scenes_of
from lab.oracle import Oracle


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world, and its benchmarks -> (world, benchmarks)."""
    folder = tmp_path_factory.mktemp("toy")
    texts = {"text": 2, "text_mix": 2, "text_test": 2}
    toyworld.write(folder / "world", 0, 2, 2, 12, size=28, texts=texts)
    benchmarks.write(folder / "world", folder / "out", 0, limit=10)
    return folder / "world", folder / "out"


def run(monkeypatch, script, *words):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
    script.main()
    return json.loads(Path("out/metrics.json").read_text())


def test_amber_of_the_toy_world(world, tmp_path, monkeypatch):
    """True captions and denials are perfect; captions with every ghost are caught, and only those."""
    monkeypatch.chdir(tmp_path)
    folder, out = world
    scenes, rng = Oracle(folder).scenes, random.Random(0)
    query = out / "amber" / "query" / "query_all.json"
    questions = json.loads(query.read_text())
    ghosts = [scenes[f"test_{i:05d}.png"].ghosts for i in range(10)]
    assert len({q["image"] for q in questions}) == 10
    assert len(questions) == 20 + sum(map(len, ghosts))
    for noise, false in ((0, 0), (1, 1)):
        rows = []
        for q in questions:
            describes = q["query"] == benchmarks.CAPTION_PROMPTS[0]
            text = scenes_of.caption(scenes[q["image"]], rng, noise=noise) if describes else "No"
            rows.append({"id": q["id"], "response": text})
        (tmp_path / f"{noise}.json").write_text(json.dumps(rows))
        words = ["--rule", "plain", "--questions", query, "--answers", f"{noise}.json"]
        found = run(monkeypatch, eval_amber, *words, "--out", "out")
        assert found["cover"] == found["f1"] == 1 and found["cog"] == false
        assert found["hal"] == false * sum(map(bool, ghosts)) / 10
        assert (found["chair"] > 0) == bool(false)
        for file in ("metrics.json", "details.json"):
            (tmp_path / "out" / file).unlink()


def test_problems_of_the_toy_world(world, tmp_path, monkeypatch):
    """The world's truth answers all of them: open answers, letters, yes."""
    monkeypatch.chdir(tmp_path)
    folder, out = world
    oracle = Oracle(folder)
    name, questions = vqa.read([out / "problems.jsonl"])
    assert name == "problems" and len(questions) == 30
    rows = [
        {"question_id": q.id, "text": oracle.question(q.image[0], q.text)[2]} for q in questions
    ]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--questions", out / "problems.jsonl", "--answers", "a.jsonl", "--out", "out"]
    found = run(monkeypatch, eval_vqa, *words)
    assert found == {"benchmark": "problems", "accuracy": 1, "number": 1, "letter": 1, "yes/no": 1, "n": 30}  # fmt: skip


JUDGED = {  # the file of questions, more flags, and the figures of the truth itself
    mmhal: ("mmhal.json", (), {"score": 6, "hallucination_rate": 0, "informativeness": 100}),
    mm_vet: ("mm_vet.json", (), {"total": 100}),
    mt_bench: ("mt_bench.jsonl", (), {"score": 10}),
    alpaca_eval: ("alpaca_eval.json", (), {"win_rate": 50}),
    llava_bench: (
        "llava_bench.jsonl",
        ("--context", "llava_bench_context.jsonl", "--references", "llava_bench_gpt4.jsonl"),
        {"relative": 100, "reference": 100},
    ),
}


@pytest.mark.parametrize("bench", JUDGED, ids=eval_judge.TITLES.get)
def test_the_truth_judges_the_truth(bench, world, tmp_path, monkeypatch):
    """The best figures for the truth; worse ones, in each benchmark, for captions with every ghost."""
    monkeypatch.chdir(tmp_path)
    folder, out = world
    oracle, rng = Oracle(folder), random.Random(1)
    name, more, best = JUDGED[bench]
    flags = ["--questions", out / name, *(w if w[0] == "-" else out / w for w in more)]
    files = dict(zip(map(str, flags), map(str, flags[1:])))
    questions = bench.read(out / name, files.get("--context"), files.get("--references"))
    for noise in (0, 1):
        said = []
        for q in questions:
            scene = oracle.scenes[q.image]
            ghosts = scenes_of.caption(scene, rng, noise=noise)
            right = [oracle.question(q.image, turn)[2] for turn in q.turns]
            said.append(tuple(text or ghosts for text in right))
        Path(f"{noise}").mkdir()
        bench.write_answers(f"{noise}", questions, said, "m")
    answers = sorted(path for path in Path().glob("?/*"))
    words = [*flags, "--answers", *answers, "--annotator", "oracle", "--out", "out"]
    truth, ghosts = run(monkeypatch, eval_judge, *words).values()
    assert {key: truth[key] for key in best} == best and truth["unreadable"] == 0
    key = next(iter(best))
    assert ghosts[key] < truth[key]


def test_models_are_asked_without_images_flag(world, tmp_path, checkpoint, monkeypatch):
    """Both folders know where the world's images are."""
    monkeypatch.chdir(tmp_path)
    asks = ["--model", checkpoint, "--device", "cpu", "--max-new-tokens", 2, "--out", "out"]
    found = run(monkeypatch, eval_vqa, "--questions", world[1] / "problems.jsonl", *asks)
    assert found["n"] == 30
    monkeypatch.chdir(world[1])
    query = world[1] / "amber" / "query" / "query_all.json"
    found = run(monkeypatch, eval_amber, "--rule", "plain", "--questions", query, *asks)
    assert found["descriptions"] == 10


def test_folder_that_exists(world):
    with pytest.raises(BadInput, match="exists already"):
        benchmarks.write(*world, 0)
