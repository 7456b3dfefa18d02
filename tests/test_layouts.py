"""layouts.py: a hand-written file of each layout with its traps, the records it must give and the rows it must refuse."""

import base64
import gzip
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import read_records
from PIL import Image

from common import BadInput
from formats import dataset, files, layouts

HERE, ROOT = Path(__file__).parent / "data", Path(__file__).parents[1]
SPLIT = ("Hi.", "Hello.", "Who are you?")
LEFT_OUT = "prompts left out: the answers' quality differs by less than 2"
FILES = {  # name: (layout, records as (row, image, turns, answers), refused rows, notes)
    "rlaif_v.jsonl": (
        "rlaif_v",
        [
            (0, "lamp.jpg", ("What is on the desk?",), ("A lamp.", "A cup.")),
            (
                1,
                "desk.png",
                ("Is <image> a word?",),
                ("No.", "Yes."),
            ),  # text: this layout has no placeholder
        ],
        {2: "the row names no image"},
        {},
    ),
    "mllm_dpo.json": (
        "mllm_dpo",
        [
            (0, "lamp.jpg", ("What trend?",), ("It rises.", "It is flat.")),
            (1, None, ("What's this?\nOne word.",), ("Text.", "A picture.")),
            (2, None, ("Name a colour.", "Blue.", "Another?"), ("Red.", "A dog.")),
            (3, "desk.png", ("What is it?",), ("A desk.", "A [lamp].")),
        ],
        {
            4: "`question` is \"{'from': __import__",
            5: "has no image, but its first human turn",
            6: "`rejected[1].value` is None",
        },
        {},
    ),
    "rejection_sampling.json": (
        "llava_instruct",
        [
            (0, "lamp.jpg", ("What trend?",), ("It rises.",)),
            (
                1,
                None,
                (
                    "Name a colour.\nHelpfulness:4,Correctness:4,Coherence:4,Complexity:4,Verbosity:4",
                ),
                ("Blue.",),
            ),
        ],
        {},
        {},
    ),
    "mmpr.jsonl": (
        "mmpr",
        [
            (0, "lamp.jpg", ("Find x.",), ("Final answer: 4", "Final answer: 6")),
            (1, "desk.png", ("Find y.",), ("4", "6")),
            (2, None, ("Find z.",), ("4", "6")),
        ],
        {3: "the row has 2 pictures; one", 4: "the row has a video", 5: "`chosen` is ['4']"},
        {},
    ),
    "seva.json": (
        "seva",
        [(0, "lamp.jpg", ("What does the sign say?",), ("STOP", "SHOP"))],
        {1: "key `reject` is missing; the file is in layout seva"},
        {},
    ),
    "hadpo_pope.json": (
        "hadpo",
        [
            (
                0,
                "VG_100K_2/2317001.jpg",
                ("Is there a dog?",),
                ("No, there is no dog.", "Yes, a dog."),
            )
        ],
        {2: "image '1.jpg' or 'VG_100K/1.jpg' or"},
        {"rows left out: the model had answered correctly": 1},
    ),
    "trl.jsonl": (
        "trl",
        [
            (0, "lamp.jpg", ("What is this?",), ("A lamp.", "A bowl.")),
            (1, "desk.png", ("Is <image> a word?", "No.", "Sure?"), ("Yes.", "No.")),
            (2, None, ("Name a colour.",), ("Blue.", "A dog.")),
            (
                3,
                "desk.png",
                ("What is it?",),
                ("A desk.", "A bed."),
            ),  # no `prompt`: what both begin with
        ],
        {
            4: "the row has 2 pictures; one",
            5: "the first user turn shows 1 pictures, but the row has 0",
            6: "`prompt[2].content` shows a picture; only the first",
            7: "prompt and chosen have the roles ['system', 'user', 'assistant']",
            8: "`chosen` is a string and there is no `prompt`",
            9: "chosen and rejected differ before their last turn",
            10: "`prompt[0].content` has blocks of the types ['audio']",
        },
        {},
    ),
    "helpsteer.jsonl": (
        "helpsteer",
        [
            ("2 > row 0", None, ("Name a fruit.",), ("Pear.", "Rock.")),
            ("7 > row 8", None, SPLIT, ("A model.", "A dog.")),
        ],
        {6: "`helpfulness` is 'N/A'; a number is needed", 9: "`prompt` holds 2 turns parted by"},
        {LEFT_OUT: 1, "prompts left out: one answer only": 1},
    ),
    "helpsteer2_preference.jsonl": (
        "helpsteer2",
        [
            (0, None, ("Name a fruit.",), ("Pear.", "Rock.")),
            (1, None, ("Name a fruit.",), ("Pear.", "Rock.")),
        ],
        {4: "`preference_strength` is None; a number is needed"},
        {"rows left out: preference_strength is 0": 1, "rows left out: split is validation": 1},
    ),
}


@pytest.fixture
def images(tmp_path, monkeypatch):
    """lamp.jpg, desk.png and a picture of Visual Genome; the working folder is elsewhere, for .cache."""
    folder = tmp_path / "images"
    (folder / "VG_100K_2").mkdir(parents=True)
    for name in ("lamp.jpg", "desk.png", "VG_100K_2/2317001.jpg"):
        Image.new("RGB", (40, 30), "red").save(folder / name)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_file(images, tmp_path, name, gzipped):
    layout, records, refused, notes = FILES[name]
    path = HERE / name
    if gzipped:
        path = tmp_path / (name + ".gz")
        path.write_bytes(gzip.compress((HERE / name).read_bytes()))
    file = layouts.read(path, images)
    assert file.layout == layout
    found = [(r.where, r.image, r.turns, r.answers) for r in file.records]
    assert found == [
        (f"{path.name}, row {n}", image and images / image, *texts) for n, image, *texts in records
    ]
    assert [r["row"] for r in file.refused] == list(refused)
    for r in file.refused:
        assert r["why"].startswith(refused[r["row"]]) or refused[r["row"]] in r["why"]
    assert file.notes == notes
    if refused:
        with pytest.raises(
            BadInput, match=rf"\({len(refused)} of {file.rows} rows are refused; --skip-bad-rows"
        ):
            read_records([path], images)
        rows = dataset.read([path], images, skip_bad_rows=True)
        assert len(rows.records) == len(records) and rows.skipped == [
            {"file": path.name, **r} for r in file.refused
        ]


def test_what_is_not_read(images):
    with pytest.raises(
        BadInput, match=r"row 0 has the keys \['2317001'\], which is no known layout"
    ):
        layouts.read(HERE / "hadpo_desc.json", images)
    with pytest.raises(BadInput, match="trailing_comma.json: not valid JSON: .* line [23] column"):
        layouts.read(HERE / "trailing_comma.json", images)


def test_a_cut_gzip_file(images, tmp_path):
    whole = gzip.compress((HERE / "helpsteer.jsonl").read_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-30])
    (tmp_path / "b.jsonl.gz").write_text("{}")
    for name in "ab":
        with pytest.raises(BadInput, match=rf"{name}.jsonl.gz: not a text file"):
            layouts.read(tmp_path / f"{name}.jsonl.gz", images)


def test_windows_text(images, tmp_path):
    """A byte order mark, and lines that end in CR LF."""
    text = (HERE / "seva.json").read_text().replace("\n", "\r\n")
    (tmp_path / "seva.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(layouts.read(tmp_path / "seva.json", images).records) == 1


def test_the_pair_of_a_rated_prompt_is_drawn_from_all_that_are_worse(images, tmp_path):
    rows = [
        {
            "prompt": f"Question {i}?",
            "response": f"Answer {q}.",
            "helpfulness": q,
            "correctness": 0,
            "coherence": 0,
        }
        for i in range(60)
        for q in (0, 1, 2, 3, 4)
    ]
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    one, two = (layouts.read(tmp_path / "h.jsonl").records for _ in range(2))
    assert one == two and len(one) == 60 and {r.answers[0] for r in one} == {"Answer 4."}
    assert {r.answers[1] for r in one} == {"Answer 0.", "Answer 1.", "Answer 2."}


def test_captions(tmp_path):
    found = layouts.captions(HERE / "image_to_caption.json")
    assert found == {
        "000000000009.jpg": ["A lamp.", "A lamp on a desk."],
        "aok_lamp.jpg": ["Lamps give light."],
    }
    for text, why in (
        ("[]", "holds list"),
        ('{"a": "A lamp."}', "a list of captions"),
        ('{"a": []}', "a list of captions"),
        ('{"a": ["A lamp.", ""]}', r"'a': `\[1\]` is ''"),
        ("{", "not readable as JSON"),
    ):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(BadInput, match=f"c.json.*{why}"):
            layouts.captions(tmp_path / "c.json")
    with pytest.raises(BadInput, match="no.json: not readable"):
        layouts.captions(tmp_path / "no.json")


# ---- pictures inside a file


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 12), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_muffin_tsv(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode = lambda data: base64.b64encode(data).decode()
    texts = [["What is this?", "A lamp.", "A cup."], ["What colour?", "Blue.", "Green."]]
    lines = [
        [
            "demo",
            encode(png(c)),
            encode(json.dumps(t).encode()),
            "demo",
            encode(b"{}"),
            str(i),
            f"x/{i}.jpg",
        ]
        for i, (c, t) in enumerate(zip(("red", "blue"), texts))
    ]
    path = tmp_path / "demo-2.tsv"
    path.write_text("".join("\t".join(line) + "\n" for line in lines))
    file = layouts.read(path)
    assert (file.layout, file.refused) == ("rlhf_v", [])
    assert [[*r.turns, *r.answers] for r in file.records] == texts
    shown = [files.open_image(r.image).getpixel((2, 2)) for r in file.records]
    assert shown == [(255, 0, 0), (0, 0, 255)]
    path.write_text("\t".join(lines[0][:6]) + "\n")
    with pytest.raises(BadInput, match="demo-2.tsv, line 1: 6 fields; the seven of RLHF-V"):
        layouts.read(path)


def write_parquet(path, columns, group):
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kinds = {"image": kind, "images": pa.list_(kind)}
    pq.write_table(
        pa.table({k: pa.array(v, kinds.get(k)) for k, v in columns.items()}),
        path,
        row_group_size=group,
    )
    return path


def test_trl_parquet(tmp_path, monkeypatch):
    """`images` as load_dataset stores it: a list of structs, whose lengths are read without the pictures."""
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    cell = lambda colour: {"bytes": png(colour), "path": None}
    blocks = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}],
            }
        ]
    ] * 4
    text = [[{"role": "user", "content": [{"type": "text", "text": "What?"}]}]]
    answer = lambda word: [[{"role": "assistant", "content": [{"type": "text", "text": word}]}]] * 5
    pictures = [[cell("red")], [cell("red"), cell("blue")], None, [cell("blue")], []]
    columns = {
        "images": pictures,
        "prompt": blocks + text,
        "chosen": answer("A."),
        "rejected": answer("B."),
    }
    file = layouts.read(write_parquet(tmp_path / "trl.parquet", columns, 2))
    assert file.layout == "trl" and [r.where for r in file.records] == [
        f"trl.parquet, row {i}" for i in (0, 3, 4)
    ]
    assert [r["row"] for r in file.refused] == [1, 2] and not (tmp_path / ".cache").exists()
    assert files.open_image(file.records[1].image).getpixel((2, 2)) == (0, 0, 255)
    assert file.records[2].image is None and all(r.answers == ("A.", "B.") for r in file.records)
    assert len({files.image_identity(r.image) for r in file.records}) == 3


@pytest.mark.parametrize("picture", ["image", None])
def test_rlaif_v_parquet(images, tmp_path, picture):
    pytest.importorskip("pyarrow")
    columns = {
        "ds_name": ["d"] * 2,
        "question": ["What?"] * 2,
        "chosen": ["A."] * 2,
        "rejected": ["B."] * 2,
        "idx": ["0", "1"],
        "origin_dataset": ["d"] * 2,
        "image_path": ["lamp.jpg"] * 2,
        "logps": ["[]"] * 2,
    }
    if picture:
        columns["image"] = [{"bytes": png("blue"), "path": "x.png"}] * 2
    file = layouts.read(write_parquet(tmp_path / "RLAIF-V-Dataset_000.parquet", columns, 1), images)
    assert (file.layout, file.refused, len(file.records)) == ("rlaif_v", [], 2)
    blue = files.open_image(file.records[1].image).getpixel((2, 2)) == (0, 0, 255)
    assert blue == (picture == "image")  # the bytes go before the path


MEASURE = """
import random, sys
import pyarrow.parquet
from formats import layouts

def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) >> 10
start = peak()
records = layouts.read(sys.argv[1]).records
loaded = peak()
random.Random(0).shuffle(records)
assert all(len(r.image.read()) == 200_000 for r in records)
print(len(records), loaded - start, peak() - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_of_a_parquet_file_is_bounded(tmp_path):
    """160 MB of pictures in groups of 10 MB: reading takes none of them, random access a few groups at first, then none."""
    pytest.importorskip("pyarrow")
    n, rng = 800, random.Random(0)
    cells = [{"bytes": rng.randbytes(200_000), "path": None} for _ in range(n)]
    columns = {
        "image": cells,
        "text": [json.dumps({"question": "What?", "chosen": "A.", "rejected": "B."})] * n,
    }
    path = write_parquet(tmp_path / "big.parquet", columns | {"origin_dataset": ["demo"] * n}, 50)
    for unpacked in (False, True):
        assert (tmp_path / ".cache").exists() == unpacked
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, path],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        count, loaded, peak = map(int, done.stdout.split())
        assert count == n and loaded < 30 and peak < (30 if unpacked else 100), done.stdout


def test_files_written_by_datasets(images, tmp_path):
    """The library that wrote the public parquet files: its Image feature in a column and in a list, and nested lists."""
    datasets = pytest.importorskip("datasets")
    red, blue = Image.new("RGB", (20, 12), "red"), Image.new("RGB", (20, 12), "blue")
    text = [
        json.dumps({"question": f"What is {i}?", "chosen": "A.", "rejected": "B."})
        for i in range(3)
    ]
    columns = {
        "image": [red, blue, red],
        "text": text,
        "origin_dataset": ["d"] * 3,
        "idx": [0, 1, 2],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "idx": datasets.Value("int64")}
        | dict.fromkeys(("text", "origin_dataset"), datasets.Value("string"))
    )
    datasets.Dataset.from_dict(columns, features).to_parquet(
        tmp_path / "rlhf_v.parquet", batch_size=2
    )
    file = layouts.read(tmp_path / "rlhf_v.parquet")
    assert (file.layout, file.refused, len(file.records)) == ("rlhf_v", [], 3)
    assert [files.open_image(r.image).getpixel((2, 2))[2] for r in file.records] == [0, 255, 0]

    block = lambda kind, text: {"type": kind, "text": text}
    ask = [
        [{"role": "user", "content": [block("image", None), block("text", "What?")]}],
        [{"role": "user", "content": [block("text", "Who?")]}],
    ]
    said = lambda word: [[{"role": "assistant", "content": [block("text", word)]}]] * 2
    rows = datasets.Dataset.from_dict(
        {"images": [[blue], []], "prompt": ask, "chosen": said("A."), "rejected": said("B.")}
    )
    rows.cast_column("images", datasets.Sequence(datasets.Image())).to_parquet(
        tmp_path / "trl.parquet"
    )
    file = layouts.read(tmp_path / "trl.parquet")
    assert [(r.turns, r.answers) for r in file.records] == [
        (("What?",), ("A.", "B.")),
        (("Who?",), ("A.", "B.")),
    ]
    assert (
        files.open_image(file.records[0].image).getpixel((2, 2)) == (0, 0, 255)
        and file.records[1].image is None
    )

    rate = lambda n: {"Helpfulness": {"Rating": n, "Rationale": "-"}}
    answers = [
        {"model": m, "response": f"{m}.", "annotations": rate(n)}
        for m, n in zip("xyz", ("5", "1", "N/A"))
    ]
    rows = datasets.Dataset.from_dict(
        {"id": ["lamp"], "prompt": ["What?"], "models": [["x", "y", "z"]], "completions": [answers]}
    )
    rows.to_parquet(tmp_path / "vlfeedback.parquet")
    file = layouts.read(tmp_path / "vlfeedback.parquet", images)
    assert [(r.image.name, r.turns, r.answers) for r in file.records] == [
        ("lamp.jpg", ("What?",), ("x.", "y."))
    ]
