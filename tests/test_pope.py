"""eval_pope.py: POPE's evaluate.py and LLaVA's eval_pope.py, restated, give the same digits; several contestants; bad input."""

import json
import random
import re
import sys

import pytest
import torch
from PIL import Image

import eval_pope
import evaluation
from common import BadInput
from formats import checkpoints

SPLITS = ("random", "popular", "adversarial")


# ---- the official scripts, restated from their published code


def said_no(text):
    """Both scripts: the text before the first full stop, no commas, parted by single spaces."""
    head = text[: text.index(".")] if "." in text else text
    return any(word in ("No", "not", "no") for word in head.replace(",", "").split(" "))


def official(answers, labels):
    """What both scripts print: five unrounded figures of the answers and labels, zipped."""
    ratio = sum(not said_no(a) for a in answers) / len(answers)
    seen = [(not said_no(a), label != "no") for a, label in zip(answers, labels)]
    tp, fp = seen.count((True, True)), seen.count((True, False))
    fn, tn = seen.count((False, True)), seen.count((False, False))
    precision, recall = float(tp) / float(tp + fp), float(tp) / float(tp + fn)
    f1 = 2 * precision * recall / (precision + recall)
    right = (tp + tn) / (tp + tn + fp + fn)
    return {
        "accuracy": right,
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_ratio": ratio,
    }


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluate_py(answer_file, label_file):
    """POPE: a line an answer with `answer`, a line a question with `label`, in the same order."""
    answers = [row["answer"] for row in lines_of(answer_file)]
    return official(answers, [row["label"] for row in lines_of(label_file)])


def llava_eval_pope(annotations, question_file, result_file):
    """LLaVA: the category of an answer is that of its question_id; labels are of coco_pope_*.json."""
    category = {row["question_id"]: row["category"] for row in lines_of(question_file)}
    results, figures = lines_of(result_file), {}
    for file in sorted(annotations.iterdir()):
        assert file.name.startswith("coco_pope_") and file.name.endswith(".json")
        split = file.name[10:-5]
        texts = [row["text"] for row in results if category[row["question_id"]] == split]
        figures[split] = official(texts, [row["label"] for row in lines_of(file)])
    return figures


# ---- a small POPE


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


THINGS = ("dog", "cat", "cup", "owl", "car", "bus")


def write_pope(folder, images=5):
    """coco_pope_*.json as POPE writes them: six questions an image, the three yes ones in all splits."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(0)
    there = {f"COCO_{i}.jpg": rng.sample(THINGS, 3) for i in range(images)}
    files = []
    for split in SPLITS:
        rows = []
        for image, things in there.items():
            absent = [f"{split} {thing}" for thing in THINGS if thing not in things]
            for yes, no in zip(things, absent):
                rows += [(image, yes, "yes"), (image, no, "no")]
        rows = [
            {"question_id": n, "image": i, "text": f"Is there a {t} in the image?", "label": label}
            for n, (i, t, label) in enumerate(rows, 1)
        ]
        files.append(write_lines(folder / f"coco_pope_{split}.json", rows))
    return files


ADVERSARIAL = ["NO", "No!", "no\nnone", "There isn't one", "Not", "n,o", "yes. no", ".", "", "no,", "No.Yes",
               " No", "yes, not", "不", "Nope", "yes no.", "Yes, there is no doubt."]  # fmt: skip
ANSWERS = {
    "random": lambda rng, label: rng.choice(["Yes", "No", "yes.", "no."]),
    "all yes": lambda rng, label: "Yes",
    "the truth": lambda rng, label: label,
    "adversarially formatted": lambda rng, label: rng.choice(ADVERSARIAL),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_digits_of_the_official_scripts(tmp_path, monkeypatch, kind):
    """Our figures, and theirs of our files, and ours of files in their layouts: one number."""
    files = write_pope(tmp_path / "coco")
    rng = random.Random(kind)
    splits = eval_pope.read_splits(files)
    said = {s: [ANSWERS[kind](rng, q["label"]) for q in splits[s]] for s in SPLITS}
    figures = eval_pope.score_splits(splits, said)

    eval_pope.write_answers(tmp_path, splits, said)
    eval_pope.write_llava(tmp_path, splits, said, eval_pope.SUFFIX, "m")
    llava = [tmp_path / "llava_questions.jsonl", tmp_path / "llava_answers.jsonl"]
    of_llava = llava_eval_pope(tmp_path / "coco", *llava)
    for split, file in zip(SPLITS, files):
        ours = {key: figures[split][key] for key in eval_pope.METRICS}
        assert ours == evaluate_py(tmp_path / f"answers_{split}.jsonl", file) == of_llava[split]
        assert figures[split]["n"] == 30
    mean = sum(figures[split]["f1"] for split in SPLITS) / 3
    assert figures["mean"]["f1"] == mean

    # LLaVA's question file has no labels: they come from POPE's
    rows = [{k: v for k, v in row.items() if k != "label"} for row in lines_of(llava[0])]
    write_lines(llava[0], rows)
    rng.shuffle(answers := lines_of(llava[1]))
    write_lines(llava[1], answers)  # in another order: by their ids
    words = ["--questions", llava[0], *files, "--answers", llava[1], "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["eval_pope.py", *map(str, words)])
    eval_pope.main()
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == figures


def test_all_no(tmp_path):
    """The official script divides by zero here; precision of nothing is 0."""
    splits = eval_pope.read_splits(write_pope(tmp_path / "coco"))
    said = {s: ["No"] * len(splits[s]) for s in SPLITS}
    with pytest.raises(ZeroDivisionError):
        official(said["random"], [q["label"] for q in splits["random"]])
    zero = {"precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
    assert eval_pope.score_splits(splits, said)["mean"] == zero | {"accuracy": 0.5, "n": 90}
    eval_pope.compared(splits, {"a": said, "b": said})


def test_published_figures():
    """LLaVA-1.5-7B, random split of 2,910 questions, as its authors' script printed them (LLaVA#626)."""
    tp, fp, tn, fn = 1183, 31, 1379, 317
    labels = ["yes"] * tp + ["no"] * fp + ["no"] * tn + ["yes"] * fn
    answers = ["Yes"] * tp + ["Yes"] * fp + ["No"] * tn + ["No"] * fn
    found = eval_pope.score(labels, answers)
    assert found["accuracy"] == 0.8804123711340206 and found["precision"] == 0.9744645799011532
    assert found["recall"] == 0.7886666666666666 and found["f1"] == 0.8717759764185703
    assert found["n"] == 2910


@pytest.mark.parametrize(
    "text, said",
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("NO!", "no"),
        ("  **No**, none", "no"),
        ("'Yes', no", "yes"),
        ("No.", "no"),
        ("Yes\nno", "yes"),
        ("Nope", None),
        ("There is no dog", None),
        ("yesterday", None),
        ("", None),
        ("!?", None),
        ("不", None),
        ("_no_", "no"),
    ],
)
def test_strict_rule(text, said):
    assert eval_pope.parse_strictly(text) == said


def test_strict_score_by_hand():
    """Unreadable is wrong: a missed object where there is one, and no affirmation where there is none."""
    labels = ["yes", "yes", "yes", "no", "no", "no"]
    answers = ["Yes", "NO", "There is", "no", "Yes", "None"]  # tp 1, fn 2, tn 1, fp 1, neither 1
    found = eval_pope.score(labels, answers, parse=eval_pope.parse_strictly)
    want = {"accuracy": 2 / 6, "precision": 1 / 2, "recall": 1 / 3, "f1": 0.4, "yes_ratio": 2 / 6}
    assert found == pytest.approx(want | {"n": 6})


# ---- LLaVA's file


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows[0].pop("category"), "row 0: `label` is None"),
        (lambda rows: rows[3].pop("category"), "row 3: `label` is None"),
        (lambda rows: rows[3].update(category=7), "row 3: `category` is 7"),
        (lambda rows: rows[3].update(label="maybe"), "row 3: `label` is 'maybe'"),
        (
            lambda rows: rows[3].update(text="Is there a hat?"),
            "row 3: no `label`, and POPE's files .* have no such question in the split 'random'",
        ),
        (
            lambda rows: rows[3].update(category="odd"),
            ".* beside LLaVA's file, such as coco_pope_odd",
        ),
    ],
)
def test_bad_file_of_llava(tmp_path, change, message):
    files = write_pope(tmp_path / "coco")
    splits = eval_pope.read_splits(files)
    said = {s: ["Yes"] * len(splits[s]) for s in SPLITS}
    eval_pope.write_llava(tmp_path, splits, said, eval_pope.SUFFIX, "m")
    path = tmp_path / "llava_questions.jsonl"
    rows = lines_of(path)
    for row in rows:
        del row["label"]
    change(rows)
    write_lines(path, rows)
    with pytest.raises(BadInput, match=f"llava_questions.jsonl, {message}"):
        eval_pope.read_splits([path, *files])
    with pytest.raises(BadInput, match="a second file with categories"):
        write_lines(path, rows[10:])
        other = write_lines(tmp_path / "more.jsonl", rows[20:])
        eval_pope.read_splits([path, other])


def test_which_random_split():
    """Both sizes are told, and nothing is said of a split of another size."""
    for n, other in ((2910, "3,000 in POPE today"), (3000, "2,910 in the file that LLaVA took")):
        (line,) = eval_pope.remarks({"random": [{}] * n})
        assert f"{n:,} questions here, {other}" in line and "LLaVA#626" in line
    assert eval_pope.remarks({"random": [{}] * 48, "popular": [{}] * 3000}) == []
    assert eval_pope.remarks({}, eval_pope.SUFFIX) == [
        "behind each question stands '\\nAnswer the question using a single word or phrase.' (LLaVA's)"
    ]
    assert eval_pope.remarks({}, "") == ["no suffix"]
    assert eval_pope.remarks({}, " Short.") == ["behind each question stands ' Short.'"]


# ---- rounding


@pytest.mark.parametrize(
    "first, dtype, within",
    [
        ([20.0, 0, 19.875, 0], "bfloat16", True),  # from 16 to 32 a step is 1/8
        ([20.0, 0, 19.75, 0], "bfloat16", False),
        ([20.0, 0, 19.875, 0], "float32", False),
        ([0, 15.9375, 15.875, 0], "bfloat16", True),  # from 8 to 16 it is 1/16
        ([0, 15.9375, 15.8125, 0], "bfloat16", False),
        ([-3.0, -9, -9, -3.015625], "bfloat16", True),  # the best of each; from 2 to 4 it is 1/64
        ([1.0, 0, 1.0 + 2**-23, 0], "float32", True),
        ([0.0, 0, 0.0, 0], "bfloat16", True),
    ],
)
def test_within_rounding(first, dtype, within):
    assert eval_pope.within_rounding({"first": first}, dtype) is within


def test_steps_are_those_of_torch():
    for name, step in eval_pope.EPSILON.items():
        assert step == torch.finfo(getattr(torch, name)).eps


# ---- the command line


@pytest.fixture
def pope(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = write_pope(tmp_path / "coco")
    for i in range(5):
        Image.effect_noise((30, 28), 90 + i).convert("RGB").save(
            tmp_path / "coco" / f"COCO_{i}.jpg"
        )
    return files


def main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["eval_pope.py", *map(str, words)])
    eval_pope.main()


def test_two_contestants_from_files(pope, tmp_path, monkeypatch, capsys):
    """Their paired difference, the sheet of what changed, and each one's figures."""
    splits = eval_pope.read_splits(pope)
    for name, wrong in (("a", 10), ("b", 2)):
        said = {}
        for s in SPLITS:
            labels = [q["label"] for q in splits[s]]
            said[s] = ["Yes" if i < wrong else label for i, label in enumerate(labels)]
        eval_pope.write_answers(tmp_path / name, splits, said)
    answers = [tmp_path / n / f"answers_{s}.jsonl" for n in "ab" for s in SPLITS]
    main(monkeypatch, "--questions", *pope, "--answers", *answers, "--out", tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    a, b = metrics
    assert (a, b) == ("a", "b"), "files of two folders are known by them"
    assert metrics[a]["mean"]["accuracy"] == pytest.approx(25 / 30)
    assert metrics[b]["mean"]["accuracy"] == pytest.approx(29 / 30)
    details = json.loads((tmp_path / "out" / "details.json").read_text())
    paired = details[b]["intervals"]["mean accuracy"]
    assert paired["difference"] == pytest.approx(4 / 30)
    assert 0 <= paired["difference_low"] < 4 / 30 < paired["difference_high"]
    printed = capsys.readouterr().out
    assert "a against b, 12 answers that differ" in printed
    assert (tmp_path / "out" / "changed-b.png").is_file()


def test_both_rules_side_by_side(pope, tmp_path, monkeypatch, capsys):
    """Three answers of thirty: "NO" counts as yes, "Not here" as yes, "None, no" as no."""
    questions = eval_pope.read_questions(pope[0])  # yes, no, yes, no, ...
    texts = [q["label"] for q in questions]
    texts[1], texts[3], texts[5] = "NO", "Not here", "None, no"
    rows = [{"question": q["text"], "answer": text} for q, text in zip(questions, texts)]
    write_lines(tmp_path / "a.jsonl", rows)
    main(monkeypatch, "--questions", pope[0], "--answers", tmp_path / "a.jsonl", "--out", "out")
    official_table, strict_table, *_ = capsys.readouterr().out.split("\n\n")
    assert official_table.splitlines()[-1].split()[1] == f"{28 / 30:.4f}"
    head, *rows = strict_table.splitlines()
    assert head.startswith("strict rule: of 30 answers 2 begin with neither yes nor no, 1 begin")
    assert rows[-1].split()[1] == f"{28 / 30:.4f}" and rows[-1].split()[5] == "0.5000"
    details = json.loads((tmp_path / "out" / "details.json").read_text())
    assert details["a"]["unreadable"] == 2 and details["a"]["strict"]["mean"]["yes_ratio"] == 0.5


def test_contestants_on_the_command_line(pope, checkpoint, tmp_path, monkeypatch, capsys):
    """A model and a copy whose head nearly ties yes and no, in bfloat16: told with the cost."""
    model, processor = checkpoints.load(checkpoint)
    with torch.no_grad():
        model.head_weight().zero_()
        yes, no = (eval_pope.evaluation.first_token(processor, *pair) for pair in yes_and_no())
        model.head_weight()[yes, 0] = model.head_weight()[no, 0] = 1.0
        model.head_weight()[no, 1] = 2**-7
    checkpoints.save(model, processor, tmp_path / "flat")
    flags = ["--questions", *pope, "--device", "cpu", "--dtype", "bfloat16", "--batch-size", 20]
    out = tmp_path / "out"
    main(monkeypatch, *flags, "--model", checkpoint, tmp_path / "flat", "--out", out)
    printed = capsys.readouterr().out
    assert "behind each question stands '\\nAnswer the question" in printed
    n = sum(eval_pope.within_rounding(r, "bfloat16") for r in lines_of(out / "flat/replies.jsonl"))
    assert n > 5 and f"flat: {n} of 60 answers were decided within rounding" in printed
    assert re.search(
        r"flat: .*one step of bfloat16 apart.*--batch-size 1 takes \d+\.\d times", printed
    )
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics) == ["llava", "flat"]
    for name in metrics:
        for split, file in zip(SPLITS, pope):
            texts = [row["answer"] for row in lines_of(out / name / f"answers_{split}.jsonl")]
            labels = [row["label"] for row in lines_of(file)]
            assert metrics[name][split] == eval_pope.score(labels, texts)
    assert len(lines_of(out / "flat" / "replies.jsonl")) == 60, "of 90, 15 are in all three splits"

    # the same command asks nobody; another one is refused
    monkeypatch.setattr(evaluation, "ask_model", lambda *a: pytest.fail("asked again"))
    main(monkeypatch, *flags, "--model", checkpoint, tmp_path / "flat", "--out", out)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    with pytest.raises(BadInput, match="about, suffix: .* and here it is ''"):
        main(
            monkeypatch,
            *flags,
            "--model",
            checkpoint,
            tmp_path / "flat",
            "--out",
            out,
            "--suffix",
            "",
        )


def yes_and_no():
    from data import Record

    return [(Record("", None, ("?",)), text) for text in ("Yes", "No")]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"question_id": 1, "text": "Yes"}\n{"question_id": 2, "te', "line 2: not valid JSON"),
        (b'{"question_id": 1, "text": "\xff"}\n', "not a text file .*utf-8"),
        (
            b'{"question_id": 1, "text": "Yes"}\n' * 2,
            "2 answers to 30 questions.*; question_id 1 has 2 answers; question_id 2 has none",
        ),
        (b'{"question_id": 31, "text": "Yes"}\n', "question_id 1 has none"),
        (
            b'{"question_id": 1, "text": "Yes"}\n' * 30,
            "row 0: it names its question by .*; question_id 1 has 30 answers; question_id 2 has none",
        ),
        (b"", "0 answers to 30 questions"),
        (b'{"question_id": 1, "text": 3}\n', "row 0: a string `answer`"),
    ],
)
def test_bad_answers(pope, tmp_path, monkeypatch, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match=f"a.jsonl.*{message}"):
        main(monkeypatch, "--questions", pope[0], "--answers", tmp_path / "a.jsonl")


def test_a_question_without_its_image(pope, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "coco" / "COCO_3.jpg").unlink()
    with pytest.raises(BadInput, match="random.json, row 18: image 'COCO_3.jpg' is not below"):
        main(monkeypatch, "--questions", *pope, "--model", checkpoint, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
