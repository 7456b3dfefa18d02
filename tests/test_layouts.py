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
REGION = "Please provide the bounding box coordinate of the region this sentence describes: the {}."
LEFT_OUT = "prompts left out: the answers' quality differs by less than 2"


def dropped(leading):
    """The note about paths that were found without these folders."""
    return f"image paths are read without their leading {leading!r}"


FILES = {  # name: (layout, records as (row, image, turns, answers), refused rows, notes)
    "rlaif_v.jsonl": (
        "rlaif_v",
        [
            (0, "lamp.jpg", ("What is on the desk?",), ("A lamp.", "A cup.")),
            (1, "desk.png", ("Is  a word?",), ("No.", "Yes.")),  # `<image>` was the image's place
        ],
        {2: "the row names no image"},
        {dropped("img"): 1},
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
        {dropped("scigraph"): 1},
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
    "llama_factory.json": (
        "llama_factory",
        [
            (0, "lamp.jpg", ("What is on the desk?",), ("A lamp.", "A cup.")),
            (1, "desk.png", ("Is it wood?", "Yes.", "Sure?"), ("Yes, it is.", "No.")),
            (2, None, ("Name a colour.",), ("Blue.", "A dog.")),
        ],
        {
            3: "the row has 2 pictures; one",
            4: "`system` is not empty",
            5: "`chosen` has the roles ['human', 'human']",
            6: "the row has no image, but its first human turn holds `<image>` 1 times",
            7: "a later human turn holds `<image>`",
        },
        {dropped("mllm_demo_data"): 1},
    ),
    "mmpr.jsonl": (
        "mmpr",
        [
            (0, "lamp.jpg", ("Find x.",), ("Final answer: 4", "Final answer: 6")),
            (1, "desk.png", ("Find y.",), ("4", "6")),
            (2, None, ("Find z.",), ("4", "6")),
        ],
        {
            3: "the row has 2 pictures; one",
            4: "`video` is 'a.mp4', which is not read as a picture",
            5: "`chosen` is ['4']",
        },
        {dropped("geo"): 1},
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
            (1, "desk.png", ("Is  a word?", "No.", "Sure?"), ("Yes.", "No.")),
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
            5: "the row has no image, but its first human turn holds `<image>` 1 times",
            6: "`prompt[2].content` shows a picture; only the first",
            7: "prompt and chosen have the roles ['system', 'user', 'assistant']",
            8: "`chosen` is a string and there is no `prompt`",
            9: "chosen and rejected differ before their last turn",
            10: "`prompt[0].content` has blocks of the types ['audio']",
        },
        {},
    ),
    "mdpo.json": (
        "trl",
        [
            (0, "lamp.jpg", ("What might it be?\nSay why.",), ("A lamp.", "A bowl.")),
            (1, "desk.png", ("What is it?",), ("A desk.", "A bed.")),
            # no template: a prompt that begins as its system text does
            (
                2,
                "desk.png",
                ("A chat between a curious boy and a girl: what is it?",),
                ("A desk.", "A bed."),
            ),
        ],
        {
            3: "`prompt` is Vicuna's template with 2 turns; one is accepted.",
            4: "`prompt` is Vicuna's template with 3 turns; one is accepted.",
            5: "`prompt` is Vicuna's template with 0 turns; one is accepted.",
        },
        {dropped("images"): 3},
    ),
    "refcoco.json": (
        "problem",
        [
            (0, "lamp.jpg", (REGION.format("lamp"),), ("[1.0, 2.0, 12.0, 13.5]",)),
            (1, "desk.png", (REGION.format("lamp"),), ("[0, 0, 40, 30]",)),
        ],
        {
            2: "`solution` is a box in a picture of 80 x 60 pixels; the file has 40 x 30.",
            3: "`solution` is []; a non-empty string",
            4: "`solution` is None; a non-empty string",
            5: "`problem` is ''; a non-empty string",
        },
        {dropped("train2014"): 5},
    ),
    "refcoco_lines.jsonl": (
        "llava_instruct",
        [
            (0, "lamp.jpg", (REGION.format("lamp"),), ("[1.0, 2.0, 12.0, 13.5]",)),
            (1, "lamp.jpg", (REGION.format("light"),), ("[1.0, 2.0, 12.0, 13.5]",)),
            (2, "desk.png", ("How many desks are there?",), ("1",)),
        ],
        {3: "`conversations[1].value` is True", 4: "the row has 2 pictures"},
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
        answers = min(len(r.answers) for r in file.records)
        rows = dataset.read([path], images, answers, skip_bad_rows=True)
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


def test_the_kind_of_a_question(tmp_path):
    """Fact-RLHF's `caption_type`, of rows with one question: it speaks of the first. Without it, nothing is known."""

    def row(kind, rounds=1):
        turns = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "No"}] * rounds
        return {"id": "a", "conversations": turns} | (
            {} if kind is None else {"caption_type": kind}
        )

    def read(*rows):
        (tmp_path / "ppo.json").write_text(json.dumps(rows))
        return layouts.read(tmp_path / "ppo.json")

    kinds = [None, *range(1, 8)]
    found = [r.right for r in read(*map(row, kinds)).records]
    assert found == [None, "", "A", "B", "C", "D", "No", "Yes"]
    assert [r.right for r in read(row(6), row(6, rounds=2)).records] == ["No", None]
    for kind in (0, 8, "6", True):
        (refused,) = read(row(6), row(kind)).refused
        assert f"`caption_type` is {kind!r}; a whole number from 1 to 7" in str(refused)


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
    path.write_text("\t".join(lines[0][:6]) + "\n" + "\t".join(lines[1]) + "\n")
    with pytest.raises(BadInput, match="demo-2.tsv, row 0: line 1: 6 fields; the seven of RLHF-V"):
        dataset.read([path])
    (record,) = dataset.read([path], skip_bad_rows=True).records  # its picture is that of row 1
    assert files.open_image(record.image).getpixel((2, 2)) == (0, 0, 255)


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


def test_the_answer_goes_before_the_solution(tmp_path):
    """Of a row that has both; DeepScaleR's solutions, say, are whole derivations."""
    rows = [
        {"problem": "2 + 2?", "solution": "Two and two are four.", "answer": "4"},
        {"problem": "2 + 2?", "solution": "4", "answer": None},
        {"problem": "2 + 2?", "solution": "four", "answer": 4},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = layouts.read(tmp_path / "p.jsonl")
    assert [r.answers for r in file.records] == [("4",)] * 3 and not file.refused


PROBLEMS = {  # a public data set with its columns, and the answers that its rows give
    "clevr_cogen_a_train": (
        {
            "image": ["red", "blue"],
            "problem": ["How many items are there in the image?", "Count the balls."],
            "solution": ["<answer> 3 </answer>", "<answer> 10 </answer>"],
        },
        ["<answer> 3 </answer>", "<answer> 10 </answer>"],
    ),
    "GEOQA_R1V_Train_8K": (
        {
            "image": ["red", "blue"],
            "problem": ["As shown, find the angle C.", "Find the radius."],
            "solution": ["<answer> 145° </answer>", "<answer> 2√3 </answer>"],
        },
        ["<answer> 145° </answer>", "<answer> 2√3 </answer>"],
    ),
    "geometry3k": (
        {
            "images": ["red", "blue"],
            "problem": ["<image>Find x.", "<image>Find $\\angle 2$."],
            "answer": ["2 \\sqrt { 221 }", "120"],
            "id": [0, 1],
            "choices": [["1", "2"], ["3", "4"]],
            "ground_truth": ["B", "A"],
        },
        ["2 \\sqrt { 221 }", "120"],
    ),
    "multimodal-open-r1-8k-verified": (
        {
            "image": ["red", "blue"],
            "problem": ["Which is it?\nA: cup\nB: dog", "Is it red?"],
            "solution": ["<think>It barks.</think>\n\n<answer>B</answer>", "<answer>No</answer>"],
            "original_question": ["Which is it?", "Is it red?"],
            "original_answer": ["dog", "no"],
        },
        ["<think>It barks.</think>\n\n<answer>B</answer>", "<answer>No</answer>"],
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_with_their_answer(tmp_path, monkeypatch, name):
    """What people train GRPO on, in the columns of the parquet files as downloaded."""
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    columns, answers = PROBLEMS[name]
    pictures = [{"bytes": png(colour), "path": None} for colour in ("red", "blue")]
    if "images" in columns:
        columns = columns | {"images": [[cell] for cell in pictures]}
    else:
        columns = columns | {"image": pictures}
    file = layouts.read(write_parquet(tmp_path / f"{name}.parquet", columns, 1))
    assert (file.layout, file.rows, file.with_picture, file.refused) == ("problem", 2, 2, [])
    asked = [problem.removeprefix("<image>") for problem in columns["problem"]]
    assert [r.turns for r in file.records] == [(text,) for text in asked]
    assert [r.answers for r in file.records] == [(text,) for text in answers]
    shown = [files.open_image(r.image).getpixel((2, 2)) for r in file.records]
    assert shown == [(255, 0, 0), (0, 0, 255)]

    flags = [f"{name}.parquet", "--json"]
    script = [sys.executable, str(ROOT / "data.py"), *flags]
    summary = json.loads(subprocess.run(script, capture_output=True, check=True).stdout)
    assert (summary["layout"], summary["rows"], summary["refused"]) == ("problem", 2, [])
    assert {s["chosen"] for s in summary["samples"]} == set(answers)


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


# ---- the picture of a row, in every layout


SAID = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A."}]
SHOWN = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]
OTHER = [SHOWN[0], {"from": "gpt", "value": "B."}]
PAIR = {"chosen": "A.", "rejected": "B."}
rated = lambda text, rating: {"response": text, "annotations": {"H": {"Rating": rating}}}
ROWS = {  # layout: a row with a placeholder, without a picture
    "rlhf_v": {"text": {"question": "<image>\nWhat?", **PAIR}, "origin_dataset": "x"},
    "rlaif_v": {"question": "<image>\nWhat?", **PAIR, "ds_name": "x"},
    "mllm_dpo": {"question": "<image>\nWhat?", **PAIR, "ref_win_logp": 1},
    "mmpr": {"question": "<image>\nWhat?", **PAIR},
    "vlfeedback": {
        "id": "none",
        "prompt": "<image>\nWhat?",
        "models": [],
        "completions": [rated("A.", 5), rated("B.", 1)],
    },
    "povid": {"conversations": SHOWN, "rejected_conversations": OTHER},
    "llama_factory": {
        "conversations": SHOWN[:1],
        "chosen": SHOWN[1],
        "rejected": OTHER[1],
    },
    "llava_rlhf": {
        "conversations": SHOWN,
        "output_1": SHOWN[1],
        "output_2": OTHER[1],
        "preference": 1,
    },
    "llava_instruct": {"conversations": SHOWN},
    "trl": {"prompt": "<image>\nWhat?", **PAIR},
}
COLUMNS = {  # how a row may name lamp.jpg
    "image": "lamp.jpg",
    "images": ["lamp.jpg"],
    "image_path": "lamp.jpg",
    "img_path": "lamp.jpg",
    "image_0": {"path": "lamp.jpg", "bytes": None},
    "image_1": "lamp.jpg",
    "Image": [None, {"path": "lamp.jpg"}],
    "image_file_name": "lamp.jpg",
    "photo_url": "https://example.org/data/lamp.jpg",
}


def read_row(folder, images, /, **row):
    """One row -> DataFile."""
    (folder / "row.json").write_text(json.dumps([row]))
    return layouts.read(folder / "row.json", images)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("layout", ROWS)
def test_every_column_of_pictures_is_read_in_every_layout(images, tmp_path, layout, column):
    """And with the picture there, `<image>` is its place, not seven letters."""
    file = read_row(tmp_path, images, **ROWS[layout], **{column: COLUMNS[column]})
    assert (file.layout, file.refused, file.with_picture) == (layout, [], 1)
    (record,) = file.records
    assert (record.image, record.turns) == (images / "lamp.jpg", ("What?",))
    assert record.answers in (("A.", "B."), ("A.",))


@pytest.mark.parametrize("layout", ROWS)
def test_a_placeholder_without_a_picture_is_refused(images, tmp_path, layout):
    (refused,) = read_row(tmp_path, images, **ROWS[layout]).refused
    names_one = layout in ("rlhf_v", "rlaif_v", "vlfeedback")  # every row of these has an image
    assert ("no image" in refused["why"]) or (names_one and "'none.jpg'" in refused["why"])


@pytest.mark.parametrize("layout", ROWS)
def test_two_placeholders_are_refused(images, tmp_path, layout):
    """Two pictures were meant, whatever the row holds."""
    row = json.loads(json.dumps(ROWS[layout]).replace("<image>", "<image> and <image>"))
    (refused,) = read_row(tmp_path, images, **row, image="lamp.jpg").refused
    assert "first human turn holds `<image>` 2 times" in refused["why"]


def test_a_picture_without_a_placeholder(images, tmp_path):
    """Only LLaVA's conversations must hold it."""
    for layout, row in ROWS.items():
        row = json.loads(json.dumps(row).replace("<image>\\n", ""))
        file = read_row(tmp_path, images, **row, image="lamp.jpg")
        if layout in ("povid", "llava_rlhf", "llava_instruct"):
            assert "first human turn holds `<image>` 0 times" in file.refused[0]["why"]
        else:
            assert [r.turns for r in file.records] == [("What?",)], layout


UNREAD = {
    "media": ["a.png"],
    "file": "train/x.jpeg",
    "image_id": 7,
    "rejected_image": "a.png",
    "pixel_values": [[0.5]],
    "video": "a.mp4",
    "audios": ["a.wav"],
    "meta": {"image": "a.png"},
    "source": {"bytes": "AAAA", "path": None},
}


@pytest.mark.parametrize("column", UNREAD)
@pytest.mark.parametrize("row", [{"prompt": "What?", **PAIR}, {"conversations": SAID}], ids=str)
def test_a_picture_that_nobody_reads_is_refused(images, tmp_path, row, column):
    file = read_row(tmp_path, images, **row, **{column: UNREAD[column]})
    assert file.records == [] and f"`{column}` is " in file.refused[0]["why"]


def test_what_is_no_picture(images, tmp_path):
    """Columns that are empty, or only sound like a picture; and an answer that is a file's name."""
    nothing = {
        "image": None,
        "images": [],
        "image_path": "",
        "image_0": float("nan"),
        "video": None,
    }
    nothing |= {"num_images": 0, "image_1": {"bytes": None, "path": None}, "images_": [None]}
    row = {
        "prompt": "What is it called?",
        "chosen": "lamp.jpg",
        "rejected": "desk.png",
        "id": "x/1",
    }
    file = read_row(tmp_path, images, **row, **nothing)
    assert (file.refused, file.with_picture) == ([], 0)
    (record,) = file.records
    assert (record.image, record.answers) == (None, ("lamp.jpg", "desk.png"))


def test_two_pictures_are_refused(images, tmp_path):
    row = {"prompt": "What?", **PAIR}
    for more, why in (
        ({"image_0": "lamp.jpg", "image_1": "desk.png"}, "the row has 2 pictures"),
        ({"image_0": "lamp.jpg", "image_1": "lamp.jpg"}, "the row has 2 pictures"),
        ({"images": ["lamp.jpg", "desk.png"]}, "the row has 2 pictures"),
        ({"image": "lamp.jpg", "image_path": "desk.png"}, "pictures 'lamp.jpg' and 'desk.png'"),
        ({"image": "lamp.jpg", "video": "a.mp4"}, "`video` is 'a.mp4'"),
    ):
        (refused,) = read_row(tmp_path, images, **row, **more).refused
        assert why in refused["why"]
    # the same file twice is one picture, and so is a path that leads nowhere beside one
    for more in (
        {"image": "x/lamp.jpg", "image_path": "lamp.jpg"},
        {"image": "train", "images": "lamp.jpg"},
    ):
        file = read_row(tmp_path, images, **row, **more)
        assert (file.refused, file.records[0].image) == ([], images / "lamp.jpg")


def test_a_picture_named_in_its_block(images, tmp_path):
    """As Qwen's messages do it: with another one beside, or in a column too."""
    block = lambda **named: [{"type": "image", **named}, {"type": "text", "text": "What?"}]
    for named in ({"image": "lamp.jpg"}, {"path": "lamp.jpg"}, {"url": "http://a/lamp.jpg"}):
        prompt = [{"role": "user", "content": block(**named)}]
        file = read_row(tmp_path, images, prompt=prompt, **PAIR)
        assert (file.refused, file.records[0].image) == ([], images / "lamp.jpg")
        assert file.records[0].turns == ("What?",)
        assert read_row(tmp_path, images, prompt=prompt, **PAIR, image="lamp.jpg").with_picture == 1
        (refused,) = read_row(tmp_path, images, prompt=prompt, **PAIR, image="desk.png").refused
        assert "one a row is accepted" in refused["why"]
    prompt = [{"role": "user", "content": block(image="lamp.jpg") + block(image="desk.png")}]
    assert read_row(tmp_path, images, prompt=prompt, **PAIR).records == []


def test_a_system_turn_is_not_dropped(images, tmp_path):
    turns = [{"from": "system", "value": "Be brief."}, *SAID]
    (refused,) = read_row(tmp_path, images, conversations=turns).refused
    assert "roles ['system', 'human', 'gpt']; before the first human turn" in refused["why"]


def test_columns_of_a_parquet_file(images, tmp_path, monkeypatch):
    """Structs, bytes and lists of both, whole or with gaps; a path where the bytes are missing."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    alone = pa.struct([("bytes", pa.binary())])
    red, blue = png("red"), png("blue")
    cell = lambda data, path=None: {"bytes": data, "path": path}
    text = {"question": ["What?"] * 3, "chosen": ["A."] * 3, "rejected": ["B."] * 3}
    RED, BLUE = (255, 0, 0), (0, 0, 255)

    def shown(**columns):
        """The colour of each row's picture, or why the row is refused."""
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet"
        arrays = {name: pa.array(cells, kind) for name, (kind, cells) in columns.items()}
        pq.write_table(pa.table(text | arrays), path, row_group_size=2)
        file = layouts.read(path, images)
        found = {
            r.where: files.open_image(r.image).getpixel((2, 2)) if r.image else None
            for r in file.records
        }
        found |= {f"{path.name}, row {r['row']}": r["why"] for r in file.refused}
        return [found[f"{path.name}, row {i}"] for i in range(3)]

    whole = [cell(red), cell(blue), cell(red, "x.png")]
    assert shown(image_0=(kind, whole)) == [RED, BLUE, RED]
    assert shown(picture=(alone, [{"bytes": c["bytes"]} for c in whole])) == [RED, BLUE, RED]
    assert shown(img=(pa.binary(), [red, blue, red])) == [RED, BLUE, RED]
    gaps = [None, cell(blue), cell(None, "desk.png")]  # desk.png is red
    assert shown(image=(kind, gaps)) == [None, BLUE, RED]
    assert shown(image=(pa.binary(), [None, blue, b""])) == [None, BLUE, None]
    for inner, put in ((kind, cell), (pa.binary(), lambda data: data)):
        listed = [[put(red)], [], [put(red), put(blue)]]
        full = [[put(red)], [put(blue)], [put(red), put(blue)]]
        assert shown(images=(pa.list_(inner), full))[:2] == [RED, BLUE]
        assert shown(images=(pa.list_(inner), full))[2].startswith("the row has 2 pictures")
        *first, why = shown(images=(pa.list_(inner), listed))
        assert first == [RED, None] and why.startswith("the row has 2 pictures")
        assert shown(images=(pa.list_(inner), [[put(blue)], None, [None, put(red)]])) == [
            BLUE,
            None,
            RED,
        ]
    both = {"image_0": (kind, whole), "image_1": (kind, [None, cell(red), None])}
    assert shown(**both)[::2] == [RED, RED] and "2 pictures" in shown(**both)[1]
    second = {"image": (kind, whole), "image_1": (kind, [None, cell(red), None])}
    assert "2 pictures" in shown(**second)[1]
    other = {"image": (kind, whole), "rejected_image": (kind, [None, cell(red), None])}
    assert shown(**other)[::2] == [RED, RED] and "`rejected_image` is " in shown(**other)[1]
    assert all("`photograph` is " in why for why in shown(photograph=(kind, whole)))


# ---- paths: the policy is in files.ImageFolder


def found(folder, *names, images=None):
    """The files of paths, below the folder of images, and the notes."""
    finder = files.ImageFolder(images or folder)
    paths = [
        finder.look_up(name)[0] and finder.find(name).relative_to(folder).as_posix()
        for name in names
    ]
    return paths, dict(finder.notes)


def test_paths_that_stand_as_they_are(images):
    (images / "train").mkdir()
    (images / "train" / "lamp.jpg").write_bytes(b"another")
    here = str(images / "train" / "lamp.jpg")
    names = ["train/lamp.jpg", "./lamp.jpg", here, "train\\lamp.jpg", "train/../desk.png"]
    paths = ["train/lamp.jpg", "lamp.jpg", "train/lamp.jpg", "train/lamp.jpg", "desk.png"]
    assert found(images, *names) == (paths, {})
    outside = images.parent / "lamp.jpg"
    outside.write_bytes(b"not below")
    for name in ("../lamp.jpg", "train/../../lamp.jpg", "..\\lamp.jpg"):
        with pytest.raises(BadInput, match="leaves --images; only paths below it"):
            found(images, name)
    assert found(images, "gone.jpg", str(outside.parent / "gone.jpg"), "", 7) == ([None] * 4, {})


def test_paths_of_the_author_end_below_images(images):
    """The longest end that exists counts, and what was dropped is told by kind, once."""
    (images / "train").mkdir()
    (images / "train" / "lamp.jpg").write_bytes(b"another")
    names = {
        "/home/a/coco/train/lamp.jpg": "train/lamp.jpg",
        "/home/a/coco/desk.png": "desk.png",
        "./data/coco/lamp.jpg": "lamp.jpg",
        "D:\\coco\\lamp.jpg": "lamp.jpg",
        "https://example.org/coco/train/lamp.jpg": "train/lamp.jpg",
        "https://example.org/coco/lamp.jpg?size=2": None,
    }
    paths, notes = found(images, *names)
    assert paths == list(names.values())
    assert notes == {
        dropped("/home/a/coco"): 2,
        dropped("./data/coco"): 1,
        dropped("D:/coco"): 1,
        dropped("https://example.org/coco"): 1,
        # train/lamp.jpg and lamp.jpg have two names each
        "image paths end at the file of another path: is it the same image?": 2,
    }
    many = [f"{i}/x/desk.png" for i in range(30)]
    _, notes = found(images, *many)
    assert len(notes) == 12 and notes["image paths are read without other leading folders"] == 20


def test_links_are_followed(images, tmp_path):
    """Data sets lie on mounted disks and in the hub's cache; a link is the user's own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    Image.new("RGB", (8, 8)).save(disk / "a.png")
    (images / "coco").symlink_to(disk)
    (images / "b.png").symlink_to(disk / "a.png")
    (images / "broken.png").symlink_to(disk / "gone.png")
    names = ["coco/a.png", "b.png", "broken.png", str(images / "coco" / "a.png")]
    assert found(images, *names)[0] == ["coco/a.png", "b.png", None, "coco/a.png"]
    # --images itself is a link: the path may be that of the disk
    (tmp_path / "link").symlink_to(images)
    linked = files.ImageFolder(tmp_path / "link")
    assert linked.find(str(images / "lamp.jpg")) == tmp_path / "link" / "lamp.jpg"


def test_what_was_dropped_is_told(images, tmp_path, capsys):
    row = {"prompt": "What?", **PAIR, "image": "/home/a/lamp.jpg"}
    (tmp_path / "a.json").write_text(json.dumps([row] * 3))
    read_records([tmp_path / "a.json"], images)
    assert f"a.json: 3 {dropped('/home/a')}" in capsys.readouterr().err


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:7\nsize 123456\n"


def test_pointers_of_git_lfs(images, tmp_path):
    """A clone without git-lfs leaves them in the place of data and pictures."""
    for name in ("a.json", "a.jsonl", "a.parquet", "a.tsv", "a.json.gz"):
        (tmp_path / name).write_text(POINTER)
        with pytest.raises(BadInput, match=f"{name}: a git-lfs pointer"):
            layouts.read(tmp_path / name, images)
    (images / "lamp.jpg").write_text(POINTER)
    (refused,) = read_row(tmp_path, images, prompt="What?", **PAIR, image="lamp.jpg").refused
    assert "lamp.jpg: a git-lfs pointer" in refused["why"]


def test_what_is_given_in_the_place_of_data(tmp_path):
    def refused(path):
        with pytest.raises(BadInput) as error:
            layouts.read(path)
        return str(error.value).removeprefix(f"{path}: ")

    for name, why in (
        ("config.json", "a model; a data file is needed."),
        ("adapter_config.json", "an adapter; a data file is needed."),
        ("args.json", "a run folder; a data file is needed."),
    ):
        (tmp_path / name).write_text('{\n "data": [1],\n "x": 2\n}')
        assert refused(tmp_path) == why
        assert refused(tmp_path / name).startswith("one object with the keys ['data', 'x']; rows")
    (tmp_path / "preferences.json").write_text("[]")
    assert refused(tmp_path).startswith(f"a run folder, whose data are {tmp_path}/preferences.json")
    (tmp_path / "data").mkdir()
    assert refused(tmp_path / "data").startswith("a folder without data files")
    (tmp_path / "data" / "b.parquet").touch()
    assert refused(tmp_path / "data").startswith("a folder with b.parquet")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\x08\0\0\0\0\0\0\xff{}")
    assert refused(weights).startswith("not a text file")
