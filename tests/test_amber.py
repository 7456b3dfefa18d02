"""eval_amber.py: inference.py, restated, gives the same digits; the plain rule; asking; several contestants; bad input."""

import json
import random
import sys
import types
from pathlib import Path

import badness
import numpy as np
import pytest
from PIL import Image

import eval_amber
from common import BadInput

# ---- inference.py of junyangwang0410/AMBER, restated from its published code


def mark(words, flags, own, fits):
    """The first word that fits marks itself, or the own word that it is associated with -> was there one?"""
    for j, word in enumerate(words):
        if fits(word):
            start = len(flags) - own
            flags[flags[j] + start if j < start else j] = 1
            return True
    return False


def inference(responses, annotations, association, global_safe, extract, similar, kind="a"):
    """The figures that it prints, in its order. annotations: in the order of ids from 1."""
    m = dict.fromkeys(["chair", "cover", "cog", "clean"], 0)
    num = dict.fromkeys(m, 0.001)
    qa = {group: dict(right=0, n=0.001, no=0, no_n=0.001, ans=0, ans_n=0.001)
          for group in ("all", "state", "number", "action", "existence", "relation")}  # fmt: skip
    known = [w for key in association for w in (key, *association[key])]
    for row in responses:
        gt, said = annotations[row["id"] - 1], row["response"]
        if gt["type"] == "generative":
            nouns = [noun for noun in extract(said) if noun in known]
            safe, safe_flags, bad, bad_flags = [], [], [], []
            for words, flags, key in ((safe, safe_flags, "truth"), (bad, bad_flags, "hallu")):
                for idx, word in enumerate(gt[key]):
                    words += association[word]
                    flags += [idx] * len(association[word])
                words += gt[key]
                flags += [0] * len(gt[key])
            wrong = [0] * len(nouns)
            n_safe, n_bad = len(gt["truth"]), len(gt["hallu"])
            for i, noun in enumerate(nouns):
                if noun in global_safe or mark(safe, safe_flags, n_safe, lambda w: w == noun):  # noqa: B023
                    continue
                mark(bad, bad_flags, n_bad, lambda w: w == noun)  # noqa: B023
                mark(bad, bad_flags, n_bad, lambda w: similar(noun, w))  # noqa: B023
                if not mark(safe, safe_flags, n_safe, lambda w: similar(noun, w)):  # noqa: B023
                    wrong[i] = 1
            m["chair"] += sum(wrong)
            num["chair"] += len(wrong)
            m["cover"] += sum(safe_flags[-n_safe:])
            num["cover"] += n_safe
            m["cog"] += sum(bad_flags[-n_bad:])
            num["cog"] += n_bad
            m["clean"] += sum(wrong) == 0
            num["clean"] += 1
            continue
        group = {"discriminative-attribute-state": "state", "discriminative-attribute-number": "number",
                 "discriminative-attribute-action": "action",
                 "discriminative-hallucination": "existence"}.get(gt["type"], "relation")  # fmt: skip
        for q in (qa["all"], qa[group]):
            q["n"] += 1
            if gt["truth"] == "yes":
                q["right"] += said == "Yes"
            else:
                q["no_n"] += 1
                q["right"] += said == "No"
                q["no"] += said == "No"
            if said == "No":
                q["ans_n"] += 1
                q["ans"] += gt["truth"] == "no"
    printed = []
    if kind in ("a", "g"):
        rate = lambda key: round(m[key] / num[key] * 100, 1)
        printed += [
            rate("chair"),
            rate("cover"),
            round(100 - m["clean"] / num["clean"] * 100, 1),
            rate("cog"),
        ]

    def of(groups, epsilon=0.0001):
        share = lambda a, b: round(
            sum(qa[g][a] for g in groups) / sum(qa[g][b] for g in groups) * 100, 1
        )
        p, r = share("ans", "ans_n"), share("no", "no_n")
        f1 = round(2 * (p / 100) * (r / 100) / ((p / 100) + (r / 100) + epsilon) * 100, 1)
        return [share("right", "n"), p, r, f1]

    if kind in ("a", "d"):
        attribute = ("state", "number", "action")
        printed += of(["all"]) + of(["existence"], 0.001) + of(attribute)
        printed += [v for group in (*attribute, "relation") for v in of([group])]
    return printed


# ---- a small AMBER

ASSOCIATION = {"sky": [], "building": ["house", "tower"], "house": ["roof"], "wall": ["building"], "boat": ["ship"],
               "ship": [], "bird": ["wing"], "wing": [], "grass": ["ground"], "ground": [], "orange": [], "bus": [],
               "knife": [], "person": ["man", "child"], "man": [], "child": []}  # fmt: skip
TYPES = ["discriminative-attribute-state", "discriminative-attribute-number", "discriminative-attribute-action",
         "discriminative-hallucination", "discriminative-relation", "relation"]  # fmt: skip
WORDS = sorted({w for key, others in ASSOCIATION.items() for w in (key, *others)})


def small_amber(folder, rng, pictures=6, each=3):
    """AMBER's data folder and query_all.json, written small -> (annotations, questions)."""
    annotations, questions = [], []
    for i in range(1, pictures + 1):
        truth = rng.sample(list(ASSOCIATION), 4)
        hallu = rng.sample([w for w in ASSOCIATION if w not in truth], 3)
        annotations.append({"id": i, "type": "generative", "truth": truth, "hallu": hallu})
        questions.append({"id": i, "image": f"AMBER_{i}.jpg", "query": "Describe this image."})
    for i in range(1, pictures + 1):
        for kind in TYPES * each:
            truth = "no" if kind == TYPES[3] else rng.choice(["yes", "no"])
            annotations.append({"id": len(annotations) + 1, "type": kind, "truth": truth})
            number = len(annotations)
            questions.append({"id": number, "image": f"AMBER_{i}.jpg", "query": f"Is it {number}?"})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "query").mkdir(exist_ok=True)
    for name, value in (("annotations", annotations), ("relation", ASSOCIATION), ("query/query_all", questions)):  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "safe_words.txt").write_text("orange\nground")
    return annotations, questions


@pytest.fixture
def amber(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    annotations, questions = small_amber(tmp_path / "data", random.Random(0))
    for i in range(1, 7):
        Image.new("RGB", (30, 28), (40 * i, 100, 9)).save(tmp_path / f"AMBER_{i}.jpg")
    return annotations, questions


SIMILAR = {("ship", "bus"), ("roof", "wall"), ("man", "child"), ("wing", "sky"), ("house", "boat")}


def alike(one, other):
    """Stands for spaCy's similarity above .8: symmetric, and of a word to itself."""
    return one == other or (one, other) in SIMILAR or (other, one) in SIMILAR


KINDS = {
    "random": lambda rng, truth: rng.choice(["Yes", "No"]),
    "all yes": lambda rng, truth: "Yes",
    "all no": lambda rng, truth: "No",
    "the truth": lambda rng, truth: truth.capitalize(),
    "adversarially formatted": lambda rng, truth: rng.choice(
        ["Yes", "No", "yes", "No.", "", "NO", " No"]
    ),  # fmt: skip
}


PRINTED = [  # in the order of inference.py
    *("CHAIR", "Cover", "Hal", "Cog", "Accuracy", "Precision", "Recall", "F1"),
    *(f"{group} {name}"
      for group in ("Existence", "Attribute", "State", "Number", "Action", "Relation")
      for name in ("Accuracy", "Precision", "Recall", "F1")),
    "AMBER",
]  # fmt: skip


@pytest.mark.parametrize("similar", [alike, None])
@pytest.mark.parametrize("kind", KINDS)
def test_digits_of_inference(tmp_path, kind, similar):
    rng = random.Random(f"{kind}")
    for trial in range(8):
        annotations, questions = small_amber(tmp_path / str(trial), rng, rng.randrange(1, 6), 1)
        lists = eval_amber.Lists(tmp_path / str(trial))
        responses = []
        for row, question in zip(annotations, questions):
            words = rng.choices([*WORDS, "Sky", "zebra"], k=rng.randrange(8))
            text = " ".join(words) if row["type"] == "generative" else KINDS[kind](rng, row["truth"])  # fmt: skip
            responses.append({"id": question["id"], "response": text})
        (tmp_path / "r.json").write_text(json.dumps(responses))
        asked = eval_amber.read_questions([tmp_path / str(trial) / "query/query_all.json"], lists)
        said = eval_amber.read_answers(tmp_path / "r.json", asked, lists)
        figures, _, _ = eval_amber.score(asked, said, lists, str.split, similar)
        want = inference(responses, annotations, ASSOCIATION, {"orange", "ground"}, str.split,
                         similar or (lambda one, other: False))  # fmt: skip
        assert list(figures["official"]) == PRINTED
        ours = list(figures["official"].values())
        assert ours.pop() == round((100 - want[0] + want[7]) / 2, 2)
        assert ours == want
        for name, value in zip(("chair", "cover", "hal", "cog", "accuracy"), want):
            assert figures[name] == pytest.approx(value / 100, abs=2e-3)


def test_description_by_hand(tmp_path):
    """wall, boat are there; bird is invented. building covers wall, by association, though house is no word of it."""
    small_amber(tmp_path, random.Random(0))
    lists = eval_amber.Lists(tmp_path)
    annotation = {"type": "generative", "truth": ["wall", "boat"], "hallu": ["bird", "person"]}
    nouns = ["building", "orange", "wing", "man", "man", "sky", "zebra", "boat"]
    # wrong: wing, man, man, sky; zebra is no word of AMBER; bird (by wing) and person (by man) are marked
    found = eval_amber.look_up(nouns, annotation, lists)
    assert found == [4, 7, 2, 2, True, 1, 2, 2]
    figures = eval_amber.generative(found)
    assert figures == {"chair": 4 / 7, "cover": 1, "hal": 1, "cog": 1}
    # roof is like wall: it covers it, and nothing is wrong
    assert eval_amber.look_up(["roof"], annotation, lists, alike) == [0, 1, 1, 2, False, 1, 0, 2]


def test_f1_of_a_question_by_hand():
    """4 times "No", once rightly, of 2: precision 1/4, recall 1/2, f1 1/3; 0 of nothing is 0, and 1 of 1 is 1."""
    found = eval_amber.discriminative([3, 8, 1, 4, 2])
    assert list(found) == ["accuracy", "precision", "recall", "f1"]
    assert list(found.values()) == pytest.approx([3 / 8, 1 / 4, 1 / 2, 1 / 3])
    assert list(eval_amber.discriminative([0] * 5).values()) == [0] * 4
    assert list(eval_amber.discriminative([1] * 5).values()) == [1] * 4


def test_groups_without_a_question_have_no_figure():
    """Whichever they are; AMBER needs both tasks."""
    sums = [0] * 8 + [3, 8, 1, 4, 2] * 7
    found = eval_amber.official_figures(sums, {"", "state", "relation"})
    groups = ("", "State ", "Relation ")
    assert list(found) == [g + n for g in groups for n in ("Accuracy", "Precision", "Recall", "F1")]
    assert [found[g + "Accuracy"] for g in groups] == [37.5] * 3
    named = eval_amber.figures_of(np.array(sums), {"state", "relation"})
    names = ("accuracy", "precision", "recall", "f1")
    assert list(named) == [f"{g} {n}" for g in ("state", "relation") for n in names]
    sums[:8] = [1, 2, 1, 2, 1, 1, 0, 1]
    found = eval_amber.official_figures(sums, {"state"})
    assert list(found)[:4] == ["CHAIR", "Cover", "Hal", "Cog"] and "AMBER" not in found
    assert "AMBER" in eval_amber.official_figures(sums, {""})


def test_nothing_is_zero(tmp_path):
    small_amber(tmp_path, random.Random(0))
    lists = eval_amber.Lists(tmp_path)
    asked = eval_amber.read_questions([tmp_path / "query/query_all.json"], lists)
    figures, units, groups = eval_amber.score(asked, dict.fromkeys(asked, ""), lists, str.split, None)  # fmt: skip
    for name in ("chair", "cover", "hal", "cog", "accuracy", "precision", "recall", "f1"):
        assert figures[name] == 0
    assert figures["unreadable"] == 1
    eval_amber.figures_of(units[:0].sum(0)[None], groups)


@pytest.mark.parametrize(
    "text, said",
    [
        ("Yes, it is.", "Yes"),
        ("no", "No"),
        ("**No**", "No"),
        ("NO!", "No"),
        ("\nYes", "Yes"),
        ("Not at all", "Not at all"),
        ("It is", "It is"),
        ("", ""),
        ("Nope", "Nope"),
    ],
)
def test_responses_of_a_model(text, said):
    assert eval_amber.response(text, {"type": "relation"}) == said
    assert eval_amber.response(text, {"type": "generative"}) == text


def test_plain_rule():
    """Plurals by WordNet's endings, if the word is in the vocabulary; capitals as they stand."""
    words = {"knife", "man", "house", "glass", "sky", "child", "berry", "air-conditioning", "grass", "TV"}  # fmt: skip
    nouns_of, similar = eval_amber.plain_rule(words)
    text = "Knives, knives and men, houses; glasses of berries. Children, children: air-conditioning, grass TV dogs"
    kept = [noun for noun in nouns_of(text) if noun in words]
    assert kept == ["knife", "man", "house", "glass", "berry", "child", "air-conditioning", "grass", "TV"]  # fmt: skip
    assert similar is None


@pytest.fixture
def packages(monkeypatch):
    """NLTK and spaCy, as far as the official rule calls them; the tag of a word is written behind it."""
    nltk, stem, spacy = (types.ModuleType(name) for name in ("nltk", "nltk.stem", "spacy"))
    nltk.word_tokenize = str.split
    nltk.pos_tag = lambda words: [tuple(w.split("/")) if "/" in w else (w, "NN") for w in words]
    stem.WordNetLemmatizer = type("L", (), {"lemmatize": lambda self, word: word.removesuffix("s")})
    nltk.stem = stem

    class Doc:
        def __init__(self, word):
            self.word = word

        def similarity(self, other):
            return {("ship", "bus"): 0.8, ("roof", "wall"): 0.81}.get((self.word, other.word), 0.1)

    spacy.load = lambda name: {"en_core_web_lg": Doc}[name]
    for module in (nltk, stem, spacy):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_official_rule(packages):
    nouns_of, similar = eval_amber.official_rule()
    assert nouns_of("boats/NNS sail/VB sky/NNP big/JJ house") == ["boat", "sky", "house"]
    assert similar("roof", "wall") and not similar("ship", "bus")  # more than .8


def test_official_rule_says_what_is_missing(packages, monkeypatch):
    """NLTK's message is a box of stars over many lines; each similarity is asked for once."""
    _, similar = eval_amber.official_rule()
    assert [similar("roof", "wall"), similar("wall", "roof")] == [True, False]
    monkeypatch.setattr(eval_amber, "SIMILAR", 0.9)
    assert similar("roof", "wall") and not similar("roof", "bus"), "the first is known"

    def load(name):
        raise LookupError("\n****\n  Resource punkt not found.\n" + "x" * 99)

    monkeypatch.setattr(sys.modules["spacy"], "load", load)
    told = r"\(LookupError: Resource punkt not found\. x{34}\)\.$"
    with pytest.raises(BadInput, match=told):
        eval_amber.official_rule()


def test_official_rule_without_packages(amber, monkeypatch):
    """Said before a question is asked, with what to install; questions alone need no package."""
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(
        BadInput, match="pip install nltk spacy; .*en_core_web_lg; or give --rule plain"
    ):
        main(monkeypatch, "--answers", "r.json")
    rows = [{"id": q["id"], "response": "No"} for q in amber[1] if q["id"] > 6]
    Path("r.json").write_text(json.dumps(rows))
    Path("data/query/query_discriminative.json").write_text(json.dumps(amber[1][6:]))
    words = ["--questions", "data/query/query_discriminative.json", "--answers", "r.json"]
    monkeypatch.setattr(sys, "argv", ["eval_amber.py", *words, "--out", "out"])
    eval_amber.main()
    found = json.loads(Path("out/metrics.json").read_text())
    assert found["existence accuracy"] == found["existence f1"] == 1 and "chair" not in found
    assert found["official"]["Existence Accuracy"] == 100.0


# ---- asking


def main(monkeypatch, *words):
    questions = ["--questions", "data/query/query_all.json"]
    monkeypatch.setattr(sys, "argv", ["eval_amber.py", *questions, *map(str, words)])
    eval_amber.main()


def test_end_to_end(amber, checkpoint, monkeypatch, capsys):
    base = ["--rule", "plain", "--images", ".", "--model", checkpoint, "--device", "cpu"]
    base += ["--max-new-tokens", 6, "--suffix", " Please answer yes or no.", "--out", "out"]
    main(monkeypatch, *base)
    found = json.loads(Path("out/metrics.json").read_text())
    assert found["rule"] == "plain" and found["descriptions"] == 6 and found["questions"] == 108
    assert {"chair", "cover", "hal", "cog", "accuracy", "f1", "relation recall", "amber"} <= found.keys()  # fmt: skip
    replies = [json.loads(line) for line in Path("out/replies.jsonl").read_text().splitlines()]
    assert {r["prompt"][0].endswith("yes or no.") for r in replies} == {True, False}
    assert len(replies) == 114

    # interrupted: the half-written line is asked again, and the figures are the same
    kept = Path("out/replies.jsonl").read_text()
    Path("out/replies.jsonl").write_text(kept[:-20])
    main(monkeypatch, *base)
    assert "half a line" in capsys.readouterr().err
    assert json.loads(Path("out/metrics.json").read_text()) == found

    # what was written for inference.py scores to the same
    main(monkeypatch, "--rule", "plain", "--answers", "out/responses.json", "--out", "again")
    assert json.loads(Path("again/metrics.json").read_text()) == found


def test_contestants(amber, monkeypatch, capsys):
    """Two answers files: LLaVA's layout is mapped to Yes and No, the official one is not."""
    annotations, questions = amber
    truth = {row["id"]: row["truth"] for row in annotations}
    text = lambda n: " ".join(truth[n]) if n <= 6 else truth[n] + "."
    rows = [{"question_id": q["id"], "text": text(q["id"])} for q in questions]
    random.Random(0).shuffle(rows)
    Path("right.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrong = [{"id": q["id"], "response": "" if q["id"] <= 6 else "yes"} for q in questions]
    Path("wrong.json").write_text(json.dumps(wrong))
    main(monkeypatch, "--rule", "plain", "--answers", "wrong.json", "right.jsonl", "--out", "o")
    found = json.loads(Path("o/metrics.json").read_text())
    assert found["right"]["accuracy"] == found["right"]["amber"] == 1
    assert found["right"]["cover"] == 22 / 24  # "house" covers building where both are there
    assert found["wrong"]["accuracy"] == found["wrong"]["cover"] == 0
    assert (found["right"]["unreadable"], found["wrong"]["unreadable"]) == (0, 1)
    details = json.loads(Path("o/details.json").read_text())
    assert details["right"]["intervals"]["state accuracy"]["difference"] == 1
    assert Path("o/changed-right.png").is_file()
    assert "100.0% of the answers are neither Yes nor No" in capsys.readouterr().out


# ---- bad input


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows.pop(), r"id 114 has no answer \(113 answers to 114"),
        (lambda rows: rows.append(rows[3]), "row 114: a second answer to id 4"),
        (
            lambda rows: rows.append({"id": 999, "response": ""}),
            "an answer to id 999, which is no question",
        ),
        (lambda rows: rows[5].update(id="6"), "row 5: `id` is '6'; a whole number is needed"),
        (lambda rows: rows[5].update(response=None), "row 5: `response` is None"),
        (lambda rows: rows.insert(0, 3), "row 0: `question_id` is None"),
        (lambda rows: rows.clear(), r"id 1 has no answer \(0 answers"),
    ],
)
def test_bad_answers(amber, monkeypatch, change, message):
    rows = [{"id": q["id"], "response": "No"} for q in amber[1]]
    change(rows)
    Path("r.json").write_text(json.dumps(rows))
    with pytest.raises(BadInput, match=f"r.json.*{message}"):
        main(monkeypatch, "--rule", "plain", "--answers", "r.json")


@pytest.mark.parametrize(
    "content, message",
    [
        (b'[{"id": 1, "response": "a"}, {"id": 2', "not valid JSON"),
        (b'{"id": 1, "response": "a"}\n{"id": 2, "resp', "line 2: not valid JSON"),
        (b'[{"id": 1, "response": "\xff"}]', "not a text file"),
    ],
)
def test_broken_answers(amber, monkeypatch, content, message):
    Path("r.json").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        main(monkeypatch, "--rule", "plain", "--answers", "r.json")


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("annotations", lambda c: c.pop(), "id 114 is not among the annotations"),
        ("annotations", lambda c: c.append(c[0]), "id 1 is there twice"),
        ("annotations", lambda c: c[0]["truth"].append("zebra"), "'zebra' of `truth` is not in relation.json"),
        ("annotations", lambda c: c[0].pop("hallu"), "`hallu` is None"),
        ("annotations", lambda c: c[9].update(truth="maybe"), "`truth` is 'maybe'; yes or no"),
        ("query/query_all", lambda c: c.append(c[0]), "id 1 is there twice"),
        ("query/query_all", lambda c: c[2].pop("image"), "row 2: `image` is None"),
        ("query/query_all", lambda c: c.clear(), "holds no question"),
        ("relation", lambda c: c.update(sky="blue"), "'sky' has 'blue', no words"),
    ],
)  # fmt: skip
def test_bad_files(amber, monkeypatch, name, change, message):
    path = Path(f"data/{name}.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=message):
        main(monkeypatch, "--rule", "plain", "--answers", "r.json")


def test_missing_files(amber, checkpoint, monkeypatch):
    base = ["--rule", "plain", "--model", checkpoint, "--device", "cpu", "--out", "out"]
    with pytest.raises(BadInput, match="id 1: image 'AMBER_1.jpg' or .* is not below --images"):
        main(monkeypatch, *base)  # they are not beside the question file
    Path("data/safe_words.txt").write_bytes(b"\xff")
    with pytest.raises(BadInput, match="safe_words.txt: not a readable text"):
        main(monkeypatch, *base)
    Path("data/annotations.json").unlink()
    with pytest.raises(BadInput, match="no annotations.json in its folder or the one above"):
        main(monkeypatch, *base)


def test_damaged_files(amber):
    """Refused with a sentence or read; no other error."""
    rng = random.Random(0)
    query = "data/query/query_all.json"
    Path("r.json").write_text(json.dumps([{"id": q["id"], "response": "No"} for q in amber[1]]))

    def attempt():
        lists = eval_amber.Lists("data")
        asked = eval_amber.read_questions([query], lists)
        said = eval_amber.read_answers("r.json", asked, lists)
        eval_amber.score(asked, said, lists, *eval_amber.plain_rule(lists.vocabulary))

    for path in ("data/annotations.json", "data/relation.json", query, "r.json"):
        content = Path(path).read_bytes()
        part = json.loads(content)
        part = part[:2] + part[6:8] if isinstance(part, list) else part
        texts = [text.encode("utf-8", "surrogatepass") for _, text in badness.json_changes(part)]
        bytes_ = [changed for _, changed in badness.byte_changes(content, rng)]
        for changed in rng.sample(texts, 40) + rng.sample(bytes_, 20):
            Path(path).write_bytes(changed)
            assert badness.outcome(attempt) in ("refused", "accepted"), (path, changed[:300])
        Path(path).write_bytes(content)
