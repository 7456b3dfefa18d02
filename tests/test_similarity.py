"""lab.similarity: how answers are corrupted, and how often two measures agree."""

import random
import sys

import pytest

import bdhs
from common import BadInput
from lab import similarity

TEXT = "A green bottle stands on the table. Two dogs sleep under a chair near the window."


def test_so_many_words_are_replaced():
    for k in (1, 2, 4, 20):
        new = similarity.with_words_replaced(TEXT, k, ["lamp"], random.Random(k))
        assert len(new.split()) == 16
        changed = [(a, b) for a, b in zip(TEXT.split(), new.split()) if a != b]
        # green bottle stands table dogs sleep under chair near window: ten of more than three letters
        assert len(changed) == min(k, 10)
        assert all(b.strip(".") == "lamp" and len(a.strip(".")) > 3 for a, b in changed)


def test_ends_are_as_long_as_before():
    ends = {
        similarity.with_other_ends(TEXT, ["x y z 4 5 6 7 8 9 end."], random.Random(seed))
        for seed in range(40)
    }
    assert TEXT in ends and len(ends) > 10
    for new in ends:
        assert len(new.split()) == 16 and new.startswith("A ") and " Two " in new
        assert new.split()[6].strip(".") in ("table", "end")


def test_agreement_by_hand():
    """Of 33 different words one is other: 1 - 1/33 = .9697 is not similar; of 34 it is. The model says yes, no, yes."""
    words = [f"w{i}" for i in range(40)]
    pairs = [(" ".join(words[:n]), " ".join([*words[: n - 1], "other"])) for n in (33, 34, 40)]
    pairs.append(("a b c d e f g h i j", "a b c d e f g h i j"))
    rows = similarity.agreement(pairs, [0.98, 0.96, 0.97, 0.5], 0.97)
    assert [row[:2] for row in rows] == [("10 to 19", 1), ("20 to 39", 2), ("40 to 59", 1)]
    assert [row[2:] for row in rows] == [(1, 0, 0), (0.5, 0.5, 0), (1, 1, 1)]


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bdhs, "load_embedder", lambda name: lambda a, b: [1.0] * len(a))
    (tmp_path / "texts").write_text(f"{TEXT}\ntoo short\n{TEXT.replace('green', 'brown')}\n")
    command = ["similarity.py", str(tmp_path / "texts"), "--embedder", "m"]
    monkeypatch.setattr(sys, "argv", command)
    similarity.main()
    *_, row = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["10 to 19", "10"] and cells[3] == "1.00" and cells[2] == cells[4]
    (tmp_path / "texts").write_text(TEXT)
    with pytest.raises(BadInput, match="1 lines of 10 to 150 words; 2 or more"):
        similarity.main()
