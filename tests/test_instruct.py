"""instruct.py: small files as published -> exactly these conversations and facts, which sft.py and layouts.captions read."""

import json
import sys
from pathlib import Path

import pytest
from conftest import read_records
from PIL import Image

from common import BadInput
from formats import instruct, layouts

HERE = Path(__file__).parent / "data" / "instruct"
WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the letter and the text of the right option."


def turns(*texts):
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


def run(monkeypatch, **flags):
    args = [part for k, v in flags.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    monkeypatch.setattr(sys, "argv", ["instruct.py", *args])
    instruct.main()


def test_conversations_and_facts(tmp_path, monkeypatch, capsys):
    (tmp_path / "coco.json").write_text(
        json.dumps({"annotations": [{"image_id": 25, "caption": "A red lamp. "}]})
    )
    out, facts = tmp_path / "out.json", tmp_path / "facts.json"
    flags = {
        "vqa_questions": HERE / "vqa_questions.json",
        "vqa_annotations": HERE / "vqa_annotations.json",
        "out": out,
        "aokvqa": HERE / "aokvqa.json",
        "flickr": HERE / "karpathy.json",
        "coco_captions": tmp_path / "coco.json",
    }
    run(monkeypatch, **flags, facts=facts)
    err = capsys.readouterr().err
    assert (
        "1 VQA-v2 questions left out" in err
        and "1 Flickr30k pictures left out" in err
        and "out.json: 4 conver" in err
    )
    nine, options = "000000000009.jpg", "\nA. sitting\nB. light\nC. eating\nD. play"
    vqa = turns(f"<image>\nIs it a lamp?{WORD}", "Yes", f"Is it on?{WORD}", "No")
    aok = turns(
        f"<image>\nWhat is it for?{options}{LETTER}",
        "B. light",
        f"Where is it?\nA. desk\nB. bed{LETTER}",
        "A. desk",
    )
    assert json.loads(out.read_text()) == [
        {"id": "vqa_000000000009", "image": nine, "conversations": vqa},
        {
            "id": "vqa_000000000025",
            "image": "000000000025.jpg",
            "conversations": turns(f"<image>\nIs it red?{WORD}", "Yes"),
        },
        {"id": "aok_000000000009", "image": nine, "conversations": aok},
        {
            "id": "flickr_lamp",
            "image": "lamp.jpg",
            "conversations": turns(f"<image>\n{instruct.CAPTION}", "A lamp."),
        },
    ]
    sentences = [
        'The answer to "What is it for?" is "light".',
        'The answer to "Where is it?" is "desk".',
    ]
    assert layouts.captions(facts) == {
        "aok_000000000009.jpg": ["It is a lamp.", "A lamp gives light.", *sentences],
        "000000000025.jpg": ["A red lamp."],
    }
    for name in (nine, "000000000025.jpg", "lamp.jpg"):
        Image.new("RGB", (30, 20)).save(tmp_path / name)
    assert len(read_records([out], tmp_path, answers=1)) == 4
    with pytest.raises(BadInput, match="out.json: exists already"):
        run(monkeypatch, **flags)


def test_flickr_files():
    notes = instruct.Counter()
    assert instruct.flickr_captions(HERE / "flickr.csv", notes) == {
        "lamp.jpg": ["A lamp, on.", "A lamp."]
    }
    assert notes == {"Flickr30k pictures left out: not of the training split": 1}
    notes.clear()
    assert instruct.flickr_captions(HERE / "results.csv", notes) == {"lamp.jpg": ['A "lamp , on .']}
    assert notes == {"Flickr30k captions left out: the line has no comment": 1}


@pytest.mark.parametrize(
    "change, why",
    [
        ({"correct_choice_idx": 4}, "`correct_choice_idx` is 4; 0 to 3"),
        ({"correct_choice_idx": None}, "`correct_choice_idx` is None"),
        ({"correct_choice_idx": True}, "`correct_choice_idx` is True"),
        ({"choices": ["a"]}, r"`choices` is \['a'\]"),
        ({"rationales": "a"}, "`rationales` is 'a'"),
        ({"question": " "}, "`question` is ' '"),
        ({"image_id": "9"}, "image id is '9'"),
    ],
)
def test_bad_rows(tmp_path, change, why):
    row = json.loads((HERE / "aokvqa.json").read_text())[0]
    (tmp_path / "a.json").write_text(json.dumps([row, row | change]))
    with pytest.raises(BadInput, match=f"a.json, row 1: .*{why}"):
        instruct.aokvqa(tmp_path / "a.json")


def test_bad_files(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text('{"annotations": []}')
    with pytest.raises(BadInput, match="vqa_questions.json, row 0: question_id 9000 is not among"):
        instruct.vqa(HERE / "vqa_questions.json", tmp_path / "a.json", instruct.Counter())
    with pytest.raises(BadInput, match="a list of objects `questions` is needed"):
        instruct.vqa(tmp_path / "a.json", HERE / "vqa_annotations.json", instruct.Counter())
    with pytest.raises(BadInput, match="go together"):
        run(monkeypatch, vqa_questions="a.json", out="b.json")
    with pytest.raises(BadInput, match="nothing to write"):
        run(monkeypatch, aokvqa="a.json")
    with pytest.raises(BadInput, match="no conversations for"):
        run(monkeypatch, coco_captions=tmp_path / "a.json", out=tmp_path / "b.json")


def test_one_of_the_captions_is_drawn(tmp_path, monkeypatch):
    """Not the first of every picture, nor the same place in all; and the same in every run."""
    pictures = [
        {"filename": f"{i}.jpg", "sentences": [{"raw": f"Caption {n}."} for n in range(5)]}
        for i in range(40)
    ]
    (tmp_path / "k.json").write_text(json.dumps({"images": pictures}))
    for name in "ab":
        run(monkeypatch, flickr=tmp_path / "k.json", out=tmp_path / f"{name}.json")
    rows = json.loads((tmp_path / "a.json").read_text())
    assert {r["conversations"][1]["value"] for r in rows} == {f"Caption {n}." for n in range(5)}
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
