"""eval_vqa.py: the official scorers, restated, give the same digits; files as downloaded; several contestants; bad input."""

import base64
import csv
import hashlib
import io
import json
import random
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import badness
import pytest
from PIL import Image

import eval_vqa
from common import BadInput
from formats import vqa

# ---- the official scorers, restated from their published code


def depunctuate(text, marks, comma):
    """processPunctuation of vqaEval.py and of M4C: the flag of `sub` stands where its count does."""
    out = text
    for p in marks:
        touching = (p + " ") in text or (" " + p) in text
        out = out.replace(p, "") if touching or re.search(comma, text) else out.replace(p, " ")
    return re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", out, 32)


MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]  # fmt: skip
DIGITS = dict(none="0", zero="0", one="1", two="2", three="3", four="4", five="5", six="6", seven="7",
              eight="8", nine="9", ten="10")  # fmt: skip


def digit_article(text):
    """processDigitArticle of both."""
    kept = []
    for word in text.lower().split():
        word = DIGITS.get(word, word)
        if word not in ["a", "an", "the"]:
            kept.append(word)
    return " ".join(eval_vqa.CONTRACTIONS.get(word, word) for word in kept)


def vqa_eval(answer, people):
    """vqaEval.py: `people` have distinct ids, so that leaving one out leaves nine."""
    clean = lambda text: text.replace("\n", " ").replace("\t", " ").strip()
    full = lambda text: digit_article(depunctuate(text, MARKS, r"(\d)(\,)(\d)"))
    gts = [{"answer": clean(a), "answer_id": i} for i, a in enumerate(people)]
    answer = clean(answer)
    if len({gt["answer"] for gt in gts}) > 1:
        answer = full(answer)
        for gt in gts:
            gt["answer"] = full(gt["answer"])
    accs = []
    for gt in gts:
        others = [g for g in gts if g != gt]
        accs.append(min(1, float(len([g for g in others if g["answer"] == answer])) / 3))
    return float(sum(accs)) / len(accs)


def m4c_normal(text):
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return digit_article(depunctuate(text, MARKS, r"(?<=\d)(\,)+(?=\d)"))


def m4c_eval(answer, people):
    people = list(enumerate(m4c_normal(a) for a in people))
    scores = {}
    for unique in {a for _, a in people}:
        accs = []
        for person in people:
            same = [p for p in people if p != person and p[1] == unique]
            accs.append(min(1, float(len(same)) / 3))
        scores[unique] = sum(accs) / len(accs)
    return scores.get(m4c_normal(answer), 0.0)


def llava_sqa(text, options):
    """eval_science_qa.py of LLaVA's main branch: the index of the option, or -1."""
    letters = list("ABCDE")
    if text in letters:
        answer = text
    elif len(text) >= 3 and text[0] in letters and text[1:3] == ". ":
        answer = text[0]
    else:
        found = re.compile(r"The answer is ([A-Z]).").findall(text)
        answer = found[0] if len(found) == 1 else "FAILED"
    return letters.index(answer) if answer in letters[: len(options)] else -1


def can_infer(answer, choices):
    """VLMEvalKit's: a letter, "Z", or False."""

    def by_letter():
        if "Failed to obtain answer via API" in answer:
            return False
        rejected = ["Sorry, I can't help with images of people yet.", "I can't process this file.",
                    "I'm sorry, but without the image provided", "Cannot determine the answer"]  # fmt: skip
        if any(sentence in answer for sentence in rejected):
            return "Z"
        cleaned = answer
        for c in ".()[],:;!*#{}":
            cleaned = cleaned.replace(c, " ")
        splits = [x.strip() for x in cleaned.split()]
        count = sum(c in splits for c in choices)
        if count == 1:
            for ch in choices:
                if ch in splits and splits.index(ch) > (len(splits) - 5):
                    return ch
        elif count == 0 and sum(c in splits for c in ("Z", "")) == 1:
            return "Z"
        return False

    def by_text():
        lower = answer.lower()
        if len(lower) > 2 * sum(len(str(v)) for v in choices.values()):
            return False
        held = [k for k in choices if str(choices[k]).lower() in lower]
        return held[0] if len(held) == 1 else False

    return by_letter() or by_text()


def mmstar_match(pred, gt):
    answer, predict = gt.lower().strip(), pred.lower().strip().replace("\n", " ")
    try:
        if answer == predict[0] or (predict[0] == "(" and answer == predict[1]):
            return 1.0
        if predict[0:7] == "option " and answer == predict[7]:
            return 1.0
        if predict[0:14] == "the answer is " and answer == predict[14]:
            return 1.0
    except IndexError:
        return 0.0
    return 0.0


# ---- rules


def test_contractions_are_the_official_ones():
    """sha256 of vqaEval.py's table (commit a013f00), but for capitals and words that map to themselves."""
    table = json.dumps(sorted(eval_vqa.CONTRACTIONS.items()))
    want = "853d25c89947b7f6d41f6c5f81b2d6c3119927f4b16f557fc1b03af6ef45605e"
    assert hashlib.sha256(table.encode()).hexdigest() == want and len(eval_vqa.CONTRACTIONS) == 114


WORDS = ["yes", "Yes", "no", "two", "2", "none", "a", "the", "An", "dont", "don't", "let's", "lets", "y'allll", "1,000",
         "1000", "3.5", ".5", "5.", "e.g.", "it's", "t-shirt", "t shirt", "tshirt", "(red)", "red;", "red ;", "red", "?",
         "blue/green", "blue / green", "what?", "x\ty", "x\ny", "." * 40, "", "  ", "_a_", "{b}", "10:30", "'s", "oclock",
         "\u2019", "caf\u00e9", "\uff11,\uff12", "1,,2"]  # fmt: skip


@pytest.mark.parametrize("ours, theirs", [("credit_vqa2", vqa_eval), ("credit_textvqa", m4c_eval)])
def test_digits_of_short_answers(ours, theirs):
    rng, right = random.Random(0), 0
    phrase = lambda n: " ".join(rng.choices(WORDS, k=rng.randrange(1, n)))
    for _ in range(600):
        pool = [phrase(4) for _ in range(rng.randrange(1, 5))]
        people = rng.choices(pool, k=10)
        said = rng.choice([*pool, phrase(3)])
        said = said.upper() if rng.random() < 0.3 else said
        credit = getattr(eval_vqa, ours)(said, people)
        assert credit == theirs(said, people), (said, people)
        right += credit > 0
    assert right > 200


@pytest.mark.parametrize(
    "said, people, vqa2, textvqa",
    [
        ("yes", ["yes"] * 10, 1, 1),
        ("Yes", ["yes"] * 10, 0, 1),  # all agree: VQA-v2 compares as they stand
        ("Yes", ["yes"] * 9 + ["no"], 1, 1),
        ("red", ["red"] * 3 + ["blue"] * 7, 0.9, 0.9),  # left out three times: 2/3, else 1
        ("red", ["red"] * 1 + ["blue"] * 9, 0.3, 0.3),  # 9 times 1/3, once 0
        ("The cat.", ["cat"] * 4 + ["dog"] * 6, 1, 1),
        ("two", ["2"] * 9 + ["3"], 1, 1),
        ("1,000", ["1000"] * 5 + ["10"] * 5, 1, 1),
        ("dog's", ["dog 's"] * 5 + ["dog"] * 5, 0, 1),
        ("", ["a"] * 5 + ["dog"] * 5, 1, 1),  # an article is nothing
    ],
)
def test_short_answers_by_hand(said, people, vqa2, textvqa):
    assert eval_vqa.credit_vqa2(said, people) == pytest.approx(vqa2)
    assert eval_vqa.credit_textvqa(said, people) == pytest.approx(textvqa)


LETTERED = ["A", "B.", "B. cat", "B.cat", " C ", "C\n", "\nC", "The answer is B.", "The answer is B", "The answer is B,", "The answer is A. The answer is A.", "", "Z", "a dog",
            "so The answer is D. no The answer is A", "The answer is F.", "The answer is ", "a", "E", "E. x", "AB", "A.",
            "A. ", "(B) cat", "(b", "(", "option c", "Option ", "the answer is d", "the answer is ", "A or B", "A A",
            "A dog and a bird", "B for all these", "B for all of these", "B is what I see in it", "I think that it is the cat", "I can't process this file. B",
            "Failed to obtain answer via API: cat", "{A}", "the bird, a parrot", "dog cat", "D\ncat", "XB", "X B.", "B)cat", "so (B)cat", "B.cat", "*C*", "CAT", "cat.",
            "It is a bird " * 9]  # fmt: skip


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("text", LETTERED)
def test_letters_of_the_official_scorers(text, n):
    options = dict(zip("ABCD", ["dog", "cat", "bird", "red car"][:n]))
    index = llava_sqa(text, options)
    assert eval_vqa.letter_scienceqa(text, options) == ("ABCDE"[index] if index >= 0 else None)
    letter = can_infer(text, options)
    assert eval_vqa.letter_mmbench(text, options) == (letter if letter in options else None)
    found = eval_vqa.letter_mmstar(text, options)
    for letter in options:
        assert (found == letter) == mmstar_match(text, letter)


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("B. cat", "B"),
        ("(B) cat", "B"),
        (" **B**", "B"),
        ("B: the cat", "B"),
        ("cat", "B"),
        ("Cat.", "B"),
        ("A dog", None),
        ("E.", None),
        ("the cat", None),
        ("", None),
    ],
)
def test_own_letters(text, letter):
    assert eval_vqa.letter_own(text, {"A": "dog", "B": "cat", "C": "Cat house"}) == letter


@pytest.mark.parametrize(
    "text, letter",
    [("B", "B"), ("b.", "B"), ("(c)", "C"), ("option\nC", "C"), ("The answer is\nA", "A"), ("E", None),
     ("so B", None), ("\nOption b", "B"), ("(e", None), ("the answer is d", None), ("", None)],
)  # fmt: skip
def test_letters_of_mmstar(text, letter):
    assert eval_vqa.letter_mmstar(text, {"A": "dog", "B": "cat", "C": "bird"}) == letter


@pytest.mark.parametrize(
    "text, want",
    [
        ("The Dog", "dog"), ("an apple a day", "apple day"), ("Two cats", "2 cats"), ("ten", "10"),
        ("none", "0"), ("dont", "don't"), ("Youre", "you're"), ("well", "well"), ("somebody'd", "somebodyd"),
        ("t-shirt", "t shirt"), ("t-shirt -", "tshirt"), ("1,000", "1000"), ("red;", "red"), ("3.5", "3.5"),
        ("5.", "5"), ("what?", "what"),
    ],
)  # fmt: skip
def test_an_answer_as_the_scripts_compare_it(text, want):
    assert eval_vqa.normal(text).split() == want.split()


# ---- small files as downloaded


def picture(i):
    file = io.BytesIO()
    Image.new("RGB", (30, 28), (40 * i, 200, 9)).save(file, "PNG")
    return file.getvalue()


def noise_picture(i):
    """As a cell: long enough not to be taken for the index of another row."""
    rng = random.Random(i)
    file = io.BytesIO()
    pixels = bytes(rng.randrange(256) for _ in range(30 * 28 * 3))
    Image.frombytes("RGB", (30, 28), pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TEN = ["red"] * 6 + ["blue"] * 2 + ["dark red"] * 2
HEADER = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category"]  # fmt: skip


def write_tsv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows(rows)
    return path


@pytest.fixture
def files(tmp_path, monkeypatch):
    """One folder with small files of all benchmarks, and their images -> {benchmark: (files, ids)}."""
    monkeypatch.chdir(tmp_path)
    dump = lambda name, value: (tmp_path / name).write_text(json.dumps(value))
    places = ["COCO_val2014_000000000007.jpg", "train_images/ab.jpg", "images/n9.jpg", "n8.jpg",
              "val2017/000000000005.jpg", "images/test/3/image.png", "own.png"]  # fmt: skip
    for i, place in enumerate(places):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(picture(i))

    asked = [{"image_id": 7, "question": f"What is {i}?", "question_id": 70 + i} for i in range(3)]
    dump("v2_q.json", {"questions": asked, "data_subtype": "val2014", "info": {}})
    answers = [{"answer": a, "answer_id": k, "answer_confidence": "yes"} for k, a in enumerate(TEN)]
    rows = [{"question_id": 70 + i, "image_id": 7, "answers": answers, "question_type": "what",
             "answer_type": kind} for i, kind in enumerate(["other", "number", "other"])]  # fmt: skip
    dump("v2_a.json", {"annotations": rows, "info": {}})
    text = [
        {"question_id": 1 + i, "image_id": "ab", "question": q, "answers": TEN}
        for i, q in enumerate(["What brand?", "What color?"])
    ]
    dump("TextVQA_0.5.1_val.json", {"data": text, "dataset_type": "val"})
    gqa = {
        "9": {"question": "Is it red?", "answer": "yes", "imageId": "n9", "isBalanced": True,
              "types": {"structural": "verify"}},
        "8": {"question": "What is it?", "answer": "traffic light", "imageId": "n8", "isBalanced": True,
              "types": {"structural": "query"}},
    }  # fmt: skip
    dump("testdev_balanced_questions.json", gqa)
    ok = [{"split": "val", "image_id": 5, "question_id": f"q{i}", "question": f"Why {i}?", "difficult_direct_answer": i == 1,
           "choices": ["sun", "rain", "snow", "fog"], "correct_choice_idx": 2, "direct_answers": []} for i in range(2)]  # fmt: skip
    dump("aokvqa_v1p0_val.json", ok)
    problems = {
        "3": {"question": "Which?", "choices": ["cat", "dog"], "answer": 1, "hint": "Look.", "image": "image.png",
              "subject": "natural science"},
        "4": {"question": "When?", "choices": ["now", "later", "never"], "answer": 0, "hint": "", "image": None,
              "subject": "social science"},
        "5": {"question": "Where?", "choices": ["here", "there"], "answer": 0, "hint": "", "image": None},
    }  # fmt: skip
    dump("problems.json", problems)
    dump("pid_splits.json", {"train": ["5"], "val": [], "test": ["4", "3"]})
    million = 10**6
    write_tsv(tmp_path / "mmb.tsv", [
        [12, 'A "quoted"\nquestion?', "nan", "cat", "dog", "", "None", "B", "ocr", noise_picture(1), "coarse"],
        [13, "Which?", "See it.", "1", "2", "3", "4", "A", "count", noise_picture(2), "fine"],
        [million + 12, 'A "quoted"\nquestion?', "nan", "dog", "cat", "", "None", "A", "ocr", "12", "coarse"],
    ])  # fmt: skip
    solutions = ["<answer> 3 </answer>", "Yes", "B. dog", "a red car"]
    rows = [{"image": "own.png", "problem": f"<image>What {i}?", "solution": s} for i, s in enumerate(solutions)]  # fmt: skip
    write_lines(tmp_path / "problems.jsonl", rows)
    return {
        "vqa-v2": (["v2_a.json", "v2_q.json"], ["70", "71", "72"]),
        "textvqa": (["TextVQA_0.5.1_val.json"], ["1", "2"]),
        "gqa": (["testdev_balanced_questions.json"], ["9", "8"]),
        "a-okvqa": (["aokvqa_v1p0_val.json"], ["q0", "q1"]),
        "scienceqa": (["pid_splits.json", "problems.json"], ["4", "3"]),
        "mmbench": (["mmb.tsv"], ["12", "13", "1000012"]),
        "problems": (["problems.jsonl"], ["0", "1", "2", "3"]),
    }


def main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["eval_vqa.py", *map(str, words)])
    eval_vqa.main()


def metrics(monkeypatch, files, answers, *words):
    """The figures of an answers file."""
    main(monkeypatch, "--questions", *files, "--answers", answers, "--out", "scored", *words)
    figures = json.loads(open("scored/metrics.json").read())
    shutil.rmtree("scored")
    return figures


def test_questions_of_all_files(files):
    for name, (paths, ids) in files.items():
        found, questions = vqa.read(paths)
        assert found == name and [q.id for q in questions] == ids
    q = vqa.read(files["mmbench"][0])[1][0]
    assert q.prompt == 'A "quoted"\nquestion?\nA. cat\nB. dog' + vqa.CHOICE
    assert q.options == {"A": "cat", "B": "dog"} and q.groups == ("coarse", "ocr")
    assert vqa.read(files["mmbench"][0])[1][1].prompt.startswith("See it.\nWhich?\nA. 1\nB. 2\n")
    q = vqa.read(files["scienceqa"][0])[1][1]
    assert q.prompt == "Look.\nWhich?\nA. cat\nB. dog" + vqa.CHOICE and q.truth == "B"
    assert q.groups == ("with image", "natural science")


def test_parquet(tmp_path, files):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pixels = [{"bytes": picture(i), "path": None} for i in range(2)]
    cases = {
        "mmstar": dict(index=[0, 1], answer=["B", "A"], category=["coarse"] * 2, l2_category=["x", "y"],
                       question=["Q?\nOptions: A: a, B: b, C: c, D: d"] * 2),
        "scienceqa": dict(choices=[["a", "b"]] * 2, answer=[1, 0], question=["Q?"] * 2, hint=["", "h"]),
        "a-okvqa": dict(question_id=["u", "v"], choices=[["a", "b"]] * 2, correct_choice_idx=[1, 0],
                        question=["Q?"] * 2),
        "textvqa": dict(question_id=[5, 6], image_id=["i", "j"], question=["Q?"] * 2, answers=[TEN] * 2),
        "vqa-v2": dict(question_id=[5, 6], question=["Q?"] * 2, answer_type=["other"] * 2,
                       answers=[[{"answer": a, "answer_id": i} for i, a in enumerate(TEN)]] * 2),
    }  # fmt: skip
    for name, columns in cases.items():
        pq.write_table(pa.table(columns | {"image": pixels}), "x.parquet")
        found, questions = vqa.read(["x.parquet"])
        assert found == name and len(questions) == 2
        assert questions[1].image.read() == picture(1)


# ---- scoring files


def rows_of(ids, texts):
    return [{"question_id": number, "text": text} for number, text in zip(ids, texts)]


def test_figures_of_vqa2(files, monkeypatch):
    """Text goes through LLaVA's converter; the official layout is scored as it stands."""
    paths, ids = files["vqa-v2"]
    texts = ["A Red.", "blue", "green"]  # six, two (8 ways 2/3, 2 ways 1/3) and none of the ten
    found = metrics(monkeypatch, paths, write_lines(Path("a.jsonl"), rows_of(ids, texts)))
    want = {
        "accuracy": (1 + 0.6 + 0) / 3,
        "other": 0.5,
        "number": 0.6,
        "n": 3,
        "benchmark": "vqa-v2",
    }
    assert found == pytest.approx(want)
    rows = [{"question_id": int(i), "answer": t} for i, t in zip(ids, texts)]
    Path("official.json").write_text(json.dumps(rows[::-1]))  # in another order: by their ids
    assert metrics(monkeypatch, paths, "official.json") == pytest.approx(want)


def test_all_agree_official_and_converted(files, monkeypatch):
    """vqaEval.py does not normalise where the ten agree; LLaVA's converter has done so before."""
    content = json.loads(Path("v2_a.json").read_text())
    for row in content["annotations"]:
        row["answers"] = [{"answer": "yes", "answer_id": k} for k in range(10)]
    Path("v2_a.json").write_text(json.dumps(content))
    paths, ids = files["vqa-v2"]
    write_lines(Path("a.jsonl"), rows_of(ids, ["Yes", "yes", "Yes."]))
    assert metrics(monkeypatch, paths, "a.jsonl")["accuracy"] == 1
    rows = [{"question_id": int(i), "answer": t} for i, t in zip(ids, ["Yes", "yes", "Yes."])]
    Path("official.json").write_text(json.dumps(rows))
    assert metrics(monkeypatch, paths, "official.json")["accuracy"] == 1 / 3


def test_figures_of_gqa(files, monkeypatch):
    paths, ids = files["gqa"]
    write_lines(Path("a.jsonl"), rows_of(ids, ["Yes.", "light"]))
    found = metrics(monkeypatch, paths, "a.jsonl")
    assert found == {"benchmark": "gqa", "accuracy": 0.5, "binary": 1, "open": 0, "n": 2}
    rows = [{"questionId": i, "prediction": t} for i, t in zip(ids[::-1], ["traffic light", "Yes"])]
    Path("official.json").write_text(json.dumps(rows))  # its own script knows no capitals
    assert metrics(monkeypatch, paths, "official.json") == found | {"binary": 0, "open": 1}


def test_figures_of_aokvqa(files, monkeypatch):
    paths, ids = files["a-okvqa"]
    write_lines(Path("a.jsonl"), rows_of(ids, ["C. snow", "I see snow"]))
    found = metrics(monkeypatch, paths, "a.jsonl")
    want = {"accuracy": 0.5, "unreadable": 0.5, "not difficult": 1, "n": 2, "benchmark": "a-okvqa"}
    assert found == want
    Path("official.json").write_text(
        json.dumps({"q1": {"multiple_choice": "snow"}, "q0": "C. snow"})
    )
    assert metrics(monkeypatch, paths, "official.json") == want | {"not difficult": 0}


def test_figures_of_scienceqa(files, monkeypatch):
    paths, ids = files["scienceqa"]
    write_lines(Path("a.jsonl"), rows_of(ids, ["C", "The answer is B."]))
    assert metrics(monkeypatch, paths, "a.jsonl") == {
        "benchmark": "scienceqa", "accuracy": 0.5, "unreadable": 0, "social science": 0, "with image": 1,
        "natural science": 1, "n": 2}  # fmt: skip


def test_names_of_answers_that_differ_in_their_ending(files, monkeypatch):
    """a.json and a.jsonl are two contestants; so are files whose names have a dot."""
    paths, ids = files["problems"]
    Path("a.json").write_text(json.dumps(rows_of(ids, ["yes"] * len(ids))))
    write_lines(Path("a.jsonl"), rows_of(ids, ["no"] * len(ids)))
    shutil.copy("a.json", "b-1.5.json")
    for answers in (["a.json", "a.jsonl"], ["a.json", "b-1.5.json"]):
        main(monkeypatch, "--questions", *paths, "--answers", *answers, "--out", "scored")
        found = json.loads(Path("scored/metrics.json").read_text())
        assert len(found) == 2 and found.keys() <= {"a.json", "a.jsonl", "a", "b-1.5"}
        shutil.rmtree("scored")


def test_a_right_answer_of_zero():
    row = {"problem": "How many dogs?", "solution": 0, "image": "a.jpg"}
    assert vqa.problem(row, "f, row 3").truth == "0"
    with pytest.raises(BadInput, match="`solution` is None; a text is needed"):
        vqa.problem(row | {"solution": None}, "f, row 3")


def test_figures_of_mmbench(files, monkeypatch):
    """Question 12 is right alone, not in its rotation; 13 has no rotation. Unreadable counts all rows."""
    paths, ids = files["mmbench"]
    write_lines(Path("a.jsonl"), rows_of(ids, ["B", "1", "no idea"]))
    found = metrics(monkeypatch, paths, "a.jsonl")
    want = {"accuracy": 1, "circular": 0.5, "unreadable": 1 / 3, "coarse": 1, "circular coarse": 0, "ocr": 1,
            "circular ocr": 0, "fine": 1, "circular fine": 1, "count": 1, "circular count": 1, "n": 2,
            "benchmark": "mmbench"}  # fmt: skip
    assert found == want
    write_lines(Path("a.jsonl"), rows_of(ids, ["B", "1", "A"]))
    assert metrics(monkeypatch, paths, "a.jsonl")["circular"] == 1
    with open("vlmevalkit.tsv", "w") as file:  # its table of predictions
        file.write("index\tprediction\n12\tB\n1000012\tB\n13\tD\n")
    found = metrics(monkeypatch, paths, "vlmevalkit.tsv")
    assert (found["accuracy"], found["circular"]) == (0.5, 0)


def test_figures_of_problems(files, monkeypatch):
    """rewards.py's exact rule reads both sides; the kind of the right answer is a figure of its own."""
    paths, ids = files["problems"]
    texts = ["There are three of them.", "no", "The answer is B.", "Red car!"]
    write_lines(Path("a.jsonl"), rows_of(ids, texts))
    assert metrics(monkeypatch, paths, "a.jsonl") == {
        "benchmark": "problems", "accuracy": 0.75, "number": 1, "yes/no": 0, "letter": 1, "text": 1, "n": 4}  # fmt: skip
    for solution, message in (("[1, 2, 3, 4]", "question 0: the right answer is"), ("", "row 0: `solution` is ''")):  # fmt: skip
        write_lines(Path("problems.jsonl"), [{"image": "own.png", "problem": "Q?", "solution": solution}])  # fmt: skip
        with pytest.raises(BadInput, match=message):
            metrics(monkeypatch, paths, "a.jsonl")


def test_what_a_question_adds():
    """Each figure a sum and a count of 1: a rotation to `circular` alone, which all of them must have right."""
    one = lambda number, truth, turn: SimpleNamespace(
        id=number,
        whole="q",
        truth=truth,
        rotation=turn,
        options={"A": "x", "B": "y"},
        groups=("g",),
    )
    questions = [one("q", "A", False), one("q2", "B", True)]
    gains = lambda *texts: [
        row for _, row in eval_vqa.gains("mmbench", questions, [vqa.Answer(t) for t in texts])
    ]
    right = {"accuracy": (1.0, 1), "g": (1.0, 1), "circular": (1.0, 1), "circular g": (1.0, 1)}
    assert gains("A", "B") == [right | {"unreadable": (0.0, 1)}, {"unreadable": (0.0, 1)}]
    wrong = {"circular": (0.0, 1), "circular g": (0.0, 1), "unreadable": (0.0, 1)}
    assert gains("A", "?") == [right | wrong, {"unreadable": (1.0, 1)}]
    alone = [SimpleNamespace(id="q", whole=None, truth="A", rotation=False, options={}, groups=())]
    (only,) = eval_vqa.gains("gqa", alone, [vqa.Answer("a.")])
    assert only[1] == {"accuracy": (0.0, 1)}


def test_ten_people_without_one():
    """k of ten said so: with each of them left out k - 1, with each other k; a third each, 1 at most."""
    said = [eval_vqa.leave_one_out("x", ["x"] * k + ["y"] * (10 - k)) for k in range(6)]
    assert said == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])
    assert eval_vqa.leave_one_out("x", ["x", "y"]) == pytest.approx((0 + 1 / 3) / 2)


def test_what_is_compared_of_ten_people():
    """vqa-v2: what all agree on is compared as it is, else in plain words; TextVQA: in M4C's form."""
    assert eval_vqa.credit_vqa2("The dog", ["dog"] * 10) == 0
    assert eval_vqa.credit_vqa2("dog\n", ["dog"] * 10) == 1
    assert eval_vqa.credit_vqa2("The dog", ["A dog"] * 9 + ["cat"]) == 1
    assert eval_vqa.credit_textvqa("The Dog", ["dog"] * 10) == eval_vqa.leave_one_out(
        eval_vqa.m4c("The Dog"), [eval_vqa.m4c("dog")] * 10
    )


def test_line_breaks_and_tabs_are_blanks():
    assert eval_vqa.unbroken(" a\nb\tc\n") == "a b c"


def test_the_units_of_an_interval(monkeypatch):
    """An image; a question of a tsv file with its rotations; a question without an image. Sums of each, by figure."""
    ask = lambda number, image, whole=None: SimpleNamespace(id=number, image=image, whole=whole)
    questions = [
        ask("1", Path("a.png")), ask("2", Path("a.png")), ask("3", Path("b.png")), ask("4", "base64"),
        ask("5", "base64", "4"), ask("6", "base64"), ask("7", None), ask("8", None),
    ]  # fmt: skip
    rows = [
        (q, {"accuracy": (i, 1)} if i else {"unreadable": (1, 1)}) for i, q in enumerate(questions)
    ]
    seen = []
    monkeypatch.setattr(eval_vqa.comparison, "compare", lambda *given: seen.extend(given))
    eval_vqa.compared({"one": rows, "two": rows[::-1]})
    units, figures = seen
    assert units["one"].tolist() == [  # accuracy: sum, n; unreadable: sum, n
        [1, 1, 1, 1], [2, 1, 0, 0], [3 + 4, 2, 0, 0], [5, 1, 0, 0], [6, 1, 0, 0], [7, 1, 0, 0]]  # fmt: skip
    assert units["two"].tolist() == units["one"].tolist()
    found = figures(units["one"].sum(0))
    assert found == {"accuracy": 28 / 7, "unreadable": 1}


def test_what_the_official_scripts_read():
    """An answer in the form of each: of problems what stands in its tags."""
    of = lambda name, text, official=False, **more: eval_vqa.official_form(
        name, SimpleNamespace(options=more.get("options")), vqa.Answer(text, official)
    )
    assert of("problems", "<think>2</think><answer> 3 </answer>") == "3"
    assert of("problems", "") == "" and of("gqa", "Yes.") == "yes"
    assert of("gqa", "XX..") == "xx" and of("gqa", "a.b.") == "a.b"
    assert of("gqa", "Yes.", True) == "Yes." and of("textvqa", "A b.") == "A b."
    options = {"A": "dog", "B": "cat"}
    assert of("a-okvqa", "cat", True, options=options) == "B"
    assert of("a-okvqa", "bird", True, options=options) is None
    assert of("a-okvqa", "A", options=options) == "A"


def test_rotations(files):
    """Each option stands at each letter once, and the right letter follows it."""
    name, questions = vqa.read(files["scienceqa"][0])
    turned = vqa.rotated(questions)
    assert [(q.id, q.round, q.truth) for q in turned] == [
        ("4", 0, "A"), ("4", 1, "C"), ("4", 2, "B"), ("3", 0, "B"), ("3", 1, "A")]  # fmt: skip
    assert turned[1].prompt == "When?\nA. later\nB. never\nC. now" + vqa.CHOICE
    for q in turned:
        right = {"4": "now", "3": "dog"}[q.id]
        assert q.options[q.truth] == right and f"\n{q.truth}. {right}\n" in q.prompt
    said = [vqa.Answer("A") for _ in turned]  # always A: right in one rotation each
    found = eval_vqa.score(name, turned, said)
    assert (found["accuracy"], found["circular"], found["n"]) == (0.5, 0, 2)
    found = eval_vqa.score(name, turned, [vqa.Answer(q.truth) for q in turned])
    assert (found["accuracy"], found["circular"]) == (1, 1)


def test_prompts_of_llava(files, monkeypatch, capsys):
    """Its TextVQA rows carry the image as question_id; the question is found by its text."""
    rows = [
        {"question_id": "ab", "image": "ab.jpg", "text": f"{q}\n{vqa.OCR} Dakota{vqa.SHORT}"}
        for q in ("what color?", "what brand?")
    ]
    write_lines(Path("llava_textvqa_val_v051_ocr.jsonl"), rows)
    paths = [*files["textvqa"][0], "llava_textvqa_val_v051_ocr.jsonl"]
    _, questions = vqa.read(paths)
    assert [q.prompt for q in questions] == [rows[1]["text"], rows[0]["text"]]
    said = [{"question_id": "ab", "prompt": r["text"], "text": t} for r, t in zip(rows, ["red", "x"])]  # fmt: skip
    write_lines(Path("a.jsonl"), said)
    assert metrics(monkeypatch, paths, "a.jsonl") == {
        "benchmark": "textvqa",
        "accuracy": 0.5,
        "n": 2,
    }
    assert "the prompts have the OCR words" in capsys.readouterr().out

    sqa = [{"id": i, "conversations": [{"from": "human", "value": f"<image>\n{t}"}]}
           for i, t in (("3", "Which?\nA. cat\nB. dog"), ("4", "When?"))]  # fmt: skip
    Path("llava_test_CQM-A.json").write_text(json.dumps(sqa))
    _, questions = vqa.read([*files["scienceqa"][0], "llava_test_CQM-A.json"])
    assert questions[1].prompt == "Which?\nA. cat\nB. dog" + vqa.CHOICE
    with pytest.raises(BadInput, match="question 4: its prompt does not hold the options"):
        vqa.rotated(questions)


# ---- asking


@pytest.mark.parametrize(
    "name", ["vqa-v2", "textvqa", "gqa", "a-okvqa", "scienceqa", "mmbench", "problems"]
)
def test_end_to_end(files, checkpoint, monkeypatch, capsys, name):
    """Ask, and score again what was written: LLaVA's layout and the official one give the same figures."""
    paths, ids = files[name]
    base = ["--questions", *paths, "--model", checkpoint, "--device", "cpu", "--max-new-tokens", 4]
    main(monkeypatch, *base, "--out", "out")
    found = json.loads(Path("out/metrics.json").read_text())
    assert found["benchmark"] == name and 0 <= found["accuracy"] <= 1
    replies = [json.loads(line) for line in open("out/replies.jsonl")]
    assert len(replies) == len(ids)
    assert metrics(monkeypatch, paths, "out/answers.jsonl") == found
    if name in ("vqa-v2", "gqa", "a-okvqa"):
        assert metrics(monkeypatch, paths, "out/official.json") == found
    main(monkeypatch, *base, "--out", "out")  # again: goes on, asks nothing
    assert [json.loads(line) for line in open("out/replies.jsonl")] == replies
    if name == "mmbench":
        assert Path(replies[0]["image"]).read_bytes() == base64.b64decode(noise_picture(1))
    if name == "scienceqa":
        assert sorted(str(r["image"])[-5:] for r in replies) == ["None", "e.png"]


def test_contestants_and_rotations(files, checkpoint, monkeypatch, capsys):
    paths, _ = files["scienceqa"]
    base = ["--questions", *paths, "--circular", "--device", "cpu", "--max-new-tokens", 2]
    main(monkeypatch, *base, "--model", checkpoint, "--out", "out")
    rows = [json.loads(line) for line in open("out/answers.jsonl")]
    assert [(r["question_id"], r["round_id"]) for r in rows] == [
        ("4", 0),
        ("4", 1),
        ("4", 2),
        ("3", 0),
        ("3", 1),
    ]
    right = {("4", 0): "A", ("4", 1): "C", ("4", 2): "B", ("3", 0): "B", ("3", 1): "A"}
    truth = [r | {"text": right[r["question_id"], r["round_id"]]} for r in rows]
    write_lines(Path("right.jsonl"), truth)
    write_lines(Path("wrong.jsonl"), [r | {"text": "E"} for r in truth])
    words = ["--questions", *paths, "--circular", "--answers", "wrong.jsonl", "right.jsonl"]
    main(monkeypatch, *words, "--out", "both")
    found = json.loads(Path("both/metrics.json").read_text())
    assert found["right"]["circular"] == 1 and found["wrong"]["circular"] == 0
    details = json.loads(Path("both/details.json").read_text())
    assert details["right"]["intervals"]["accuracy"]["difference"] == 1
    assert Path("both/changed-right.png").is_file()
    assert "2 answers of another worth" in capsys.readouterr().out


def test_two_models(files, checkpoint, monkeypatch):
    """Each has a folder of its own; the same weights under another name answer the same."""
    shutil.copytree(checkpoint, "other")
    words = ["--questions", *files["gqa"][0], "--model", checkpoint, "other", "--device", "cpu"]
    main(monkeypatch, *words, "--max-new-tokens", 3, "--out", "out")
    found = json.loads(Path("out/metrics.json").read_text())
    assert list(found) == ["llava", "other"] and found["llava"] == found["other"]
    texts = [Path("out", name, "official.json").read_text() for name in found]
    assert texts[0] == texts[1]
    details = json.loads(Path("out/details.json").read_text())
    assert details["other"]["intervals"]["accuracy"]["difference"] == 0
    assert Path("out/changed-other.png").is_file()


def test_limit_keeps_rotations(files, monkeypatch):
    paths, _ = files["mmbench"]
    write_lines(Path("a.jsonl"), rows_of(["12", "1000012"], ["B", "A"]))
    found = metrics(monkeypatch, paths, "a.jsonl", "--limit", 1)
    assert (found["accuracy"], found["circular"], found["n"]) == (1, 1, 1)


# ---- bad input


@pytest.mark.parametrize(
    "rows, message",
    [
        ([("9", "a")], r"question 8 has no answer \(1 answers to 2"),
        ([("9", "a"), ("9", "b"), ("8", "c")], "row 1: a second answer to question 9"),
        ([("9", "a"), ("8", "b"), ("7", "c")], "an answer to 7, which is no question"),
        ([("9", "a"), ("8", None)], "row 1: `text` is None"),
        ([("9", "a"), ({}, "b")], "row 1: `question_id` is {}"),
        ([], r"question 9 has no answer \(0 answers"),
    ],
)
def test_answers_that_do_not_fit(files, rows, message):
    name, questions = vqa.read(files["gqa"][0])
    write_lines(Path("a.jsonl"), [{"question_id": i, "text": t} for i, t in rows])
    with pytest.raises(BadInput, match=f"a.jsonl.*{message}"):
        vqa.answers_to(name, questions, "a.jsonl")


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"question_id": "9", "text": "a"}\n{"question_id": "8", "te', "line 2: not valid JSON"),
        (b'{"question_id": "9", "text": "\xff"}\n', "not UTF-8|not a text file"),
        (b'[{"question_id": "9", "text": "a"}, 3]', "row 1: a int; an object is needed"),
        (
            b'{"question_id": "9", "text": "a", "round_id": []}\n',
            "`round_id` is \\[\\]; a whole number is needed",
        ),
        (
            b'{"question_id": "9", "text": "a", "prompt": "Is it blue?"}\n',
            "it answers 'Is it blue\\?'",
        ),
        (b"", "question 9 has no answer"),
    ],
)
def test_broken_answer_files(files, content, message):
    name, questions = vqa.read(files["gqa"][0])
    Path("a.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        vqa.answers_to(name, questions, "a.jsonl")


def changed_json(path, change):
    content = json.loads(Path(path).read_text())
    change(content)
    Path(path).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name, path, change, message",
    [
        ("textvqa", "TextVQA_0.5.1_val.json", lambda c: c["data"][1].pop("answers"), r"data\[1\]: 0 answers of people"),
        ("textvqa", "TextVQA_0.5.1_val.json", lambda c: c["data"].clear(), "no question in these files"),
        ("textvqa", "TextVQA_0.5.1_val.json", lambda c: c["data"][1].update(question_id=1), "question 1 is there twice"),
        ("vqa-v2", "v2_a.json", lambda c: c["annotations"].pop(), "question_id 72 is not among the annotations"),
        ("vqa-v2", "v2_q.json", lambda c: c["questions"].pop(), "question_id 72 is annotated, not asked"),
        ("vqa-v2", "v2_a.json", lambda c: c["annotations"][0]["answers"].pop(), "9 answers of people"),
        ("gqa", "testdev_balanced_questions.json", lambda c: c["8"].pop("answer"), "8: `answer` is None"),
        ("gqa", "testdev_balanced_questions.json", lambda c: c.update({"8": 3}), "8: `question` is None"),
        ("gqa", "testdev_balanced_questions.json", lambda c: c["8"].update(isBalanced=False), "8: `isBalanced` is False"),
        ("a-okvqa", "aokvqa_v1p0_val.json", lambda c: c[1].pop("correct_choice_idx"), "row 1: `correct_choice_idx` is None"),
        ("a-okvqa", "aokvqa_v1p0_val.json", lambda c: c[1].update(choices=["a"]), "row 1: `choices` is"),
        ("a-okvqa", "aokvqa_v1p0_val.json", lambda c: c.clear(), "holds no question"),
        ("scienceqa", "pid_splits.json", lambda c: c["test"].append("77"), "the problem '77' is not in"),
        ("scienceqa", "pid_splits.json", lambda c: c["test"].append(None), "the problem None is not in"),
        ("vqa-v2", "v2_a.json", lambda c: c["annotations"][0].update(answers=3), "0 answers of people"),
        ("scienceqa", "pid_splits.json", lambda c: c["test"].append({}), "the problem {} is not in"),
        ("scienceqa", "problems.json", lambda c: c["3"].update(answer=2), "`answer` is 2; 0 to 1"),
    ],
)  # fmt: skip
def test_bad_questions(files, name, path, change, message):
    changed_json(path, change)
    with pytest.raises(BadInput, match=message):
        vqa.read(files[name][0])


@pytest.mark.parametrize(
    "rows, message",
    [
        ([[1, "Q?", "", "a", "b", "", "", "C", "", "x", ""]], "row 0: `answer` is 'C'; one of A, B"),
        ([[1, "Q?", "", "a", "b", "", "", "", "", "x", ""]], "row 0: `answer` is None"),
        ([["x", "Q?", "", "a", "b", "", "", "A", "", "x", ""]], "row 0: `index` is 'x'"),
        ([[1, "", "", "a", "b", "", "", "A", "", "x", ""]], "row 0: `question` is None"),
        ([[1, "Q?", "a"]], "row 0: 3 cells; the header has 11"),
        ([[1000001, "Q?", "", "a", "b", "", "", "A", "", "1", ""]], "index 1000001 is a rotation of 1, not there"),
        ([], "holds no question"),
    ],
)  # fmt: skip
def test_bad_tables(files, rows, message):
    write_tsv(Path("mmb.tsv"), rows)
    with pytest.raises(BadInput, match=message):
        vqa.read(["mmb.tsv"])


@pytest.mark.parametrize(
    "cell, message", [("7", "picture of index 1 is that of '7', not there"), ("", "`image` is ''"), ("*" * 99, "no picture in base64")]
)  # fmt: skip
def test_pictures_that_are_not_there(files, cell, message):
    write_tsv(Path("mmb.tsv"), [[1, "Q?", "", "a", "b", "", "", "A", "", cell, ""]])
    with pytest.raises(BadInput, match=message):
        vqa.unpack("mmb.tsv")


def test_missing_image(files, checkpoint, monkeypatch):
    Path("n8.jpg").unlink()
    words = ["--questions", *files["gqa"][0], "--model", checkpoint, "--device", "cpu"]
    with pytest.raises(BadInput, match="question 8: image .*n8.jpg.* is not below --images"):
        main(monkeypatch, *words, "--out", "out")


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--questions", "v2_q.json"],
            "no benchmark by itself; VQA-v2 needs its questions and its annotations",
        ),
        (
            ["--questions", "problems.json", "pid_splits.json", "problems.jsonl"],
            "files of two benchmarks",
        ),
        (
            ["--questions", "aokvqa_v1p0_val.json", "mmb.tsv"],
            "files of two benchmarks; one is accepted",
        ),
        (["--questions", "testdev_balanced_questions.json", "--circular"], "--circular is for"),
    ],
)
def test_bad_combinations(files, monkeypatch, words, message):
    with pytest.raises(BadInput, match=message):
        main(monkeypatch, *words, "--answers", "x.jsonl")


def damaged(path, rng):
    """Contents of a file with one bad value, or cut, or with flipped bits; 40 of them."""
    content = Path(path).read_bytes()
    changes = [bytes_ for _, bytes_ in badness.byte_changes(content, rng)]
    if not path.endswith("tsv"):
        lines = content.splitlines() if path.endswith("jsonl") else [content]
        texts = [text for line in lines for _, text in badness.json_changes(json.loads(line))]
        changes += [text.encode("utf-8", "surrogatepass") for text in rng.sample(texts, 60)]
    return rng.sample(changes, 40)


def test_damaged_files(files):
    """Refused with a sentence or read; no other error."""
    rng, ends = random.Random(0), set()
    for name, (paths, ids) in files.items():
        write_lines(Path("answers.jsonl"), rows_of(ids, ["A"] * len(ids)))

        def attempt(paths=paths):
            args = SimpleNamespace(questions=paths, limit=None, circular=False)
            name, questions = eval_vqa.read_questions(args)
            if paths[0].endswith("tsv"):
                vqa.unpack(paths[0])
            eval_vqa.score(name, questions, vqa.answers_to(name, questions, "answers.jsonl"))

        for path in (*paths, "answers.jsonl"):
            content = Path(path).read_bytes()
            for changed in damaged(path, rng):
                Path(path).write_bytes(changed)
                end = badness.outcome(attempt)
                assert end in ("refused", "accepted"), (path, changed[:300], end)
                ends.add(end)
            Path(path).write_bytes(content)
    assert len(ends) == 2
