"""What a user can get wrong: one sentence on stderr that names file, row and key, no traceback, exit status 2."""

import argparse
import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from conftest import read_records
from PIL import Image
from safetensors.torch import load_file, save_file

import common
import dpo
import evaluation
from common import BadInput
from data import Record
from formats import checkpoints, dataset, files, inspector, layouts

ROOT = Path(__file__).parents[1]


# ---- running scripts


def sentence(status, err, expected, code=2):
    """The last line of stderr, which must be the only one that is a message."""
    lines = err.splitlines()
    assert status == code, err
    assert "Traceback" not in err and "Error:" not in "".join(lines[:-1]), err
    assert [
        line for line in lines if line.startswith(("dpo.py: ", "data.py: ", "inspector.py: "))
    ] == lines[-1:], err
    for part in [expected] if isinstance(expected, str) else expected:
        assert part in lines[-1], lines[-1]
    return lines[-1]


def command(script, *args, cwd):
    """Run a script as a user does, from another folder -> (status, stdout, stderr)."""
    call = [sys.executable, ROOT / script, *map(str, args)]
    done = subprocess.run(call, cwd=cwd, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def say(monkeypatch, capsys, tmp_path):
    """The same without a new process: say(main, arguments, expected part(s) of the message, exit status)."""

    def run(main, args, expected, code=2):
        script = Path(sys.modules[main.__module__].__file__).name
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, args)])
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            common.run(main)
        return sentence(stop.value.code, capsys.readouterr().err, expected, code)

    return run


@pytest.fixture
def folder(tmp_path):
    """tmp_path/images with a good picture and bad ones, tmp_path/secret.png beside it."""
    images = tmp_path / "images"
    images.mkdir()
    noise = Image.effect_noise((64, 48), 90).convert("RGB")
    noise.save(images / "good.png")
    noise.save(tmp_path / "secret.png")
    noise.save(images / "whole.jpg", quality=95)
    (images / "cut.jpg").write_bytes((images / "whole.jpg").read_bytes()[:1500])
    (images / "cut.png").write_bytes((images / "good.png").read_bytes()[:1500])
    (images / "text.jpg").write_text("This is a text.")
    (images / "gone.png").symlink_to(tmp_path / "gone.png")
    (images / "up").symlink_to(tmp_path)
    (images / "bomb.png").write_bytes(bomb(60000, 60000))
    (images / "wide.png").write_bytes(bomb(20001, 200))
    (images / "thin.png").write_bytes(bomb(1, 2000))
    (images / "empty.jpg").touch()
    return tmp_path


def bomb(width, height):
    """A PNG of a few bytes whose header says width x height."""
    number = lambda n: struct.pack(">I", n)
    chunk = lambda kind, body: number(len(body)) + kind + body + number(zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# ---- rows


def turns(question, *more):
    return [
        {"from": "gpt" if i % 2 else "human", "value": text}
        for i, text in enumerate((question, *more))
    ]


def povid(image="good.png", question="<image>\nWhat?", chosen="A.", rejected="B.", **more):
    row = {
        "id": "x",
        "conversations": turns(question, chosen),
        "rejected_conversations": turns(question, rejected),
    }
    return row | ({"image": image} if image is not None else {}) | more


def rlhf_v(text, **more):
    return {"text": text, "origin_dataset": "demo", "image": "good.png", **more}


def llava_rlhf(**more):
    outputs = {
        "output_1": {"from": "gpt", "value": "A."},
        "output_2": {"from": "gpt", "value": "B."},
        "preference": 1,
    }
    return {"image": "good.png", "conversations": turns("What?\n<image>", "-"), **outputs, **more}


def vlfeedback(completions=None, ratings=("5", "1"), **more):
    rate = lambda rating: {"Helpfulness": {"Rating": rating, "Rationale": "-"}}
    answers = [{"response": c, "annotations": rate(r)} for c, r in zip("AB", ratings)]
    return {
        "id": "good",
        "prompt": "What?",
        "models": ["a", "b"],
        "completions": completions or answers,
        **more,
    }


def rated(annotations):
    return vlfeedback(
        [
            {"response": "A", "annotations": annotations},
            {"response": "B", "annotations": annotations},
        ]
    )


QA = {"question": "What?", "chosen": "A.", "rejected": "B."}
GOOD = {povid: povid(), rlhf_v: rlhf_v(QA), llava_rlhf: llava_rlhf(), vlfeedback: vlfeedback()}
NOT_THERE, UNEVEN = "is not below --images", "not lists of one length"
ROWS = {  # name: (layout, the bad row, what the message holds)
    "missing image": (povid, povid("no/such.jpg"), "image 'no/such.jpg' is not below --images"),
    "missing image by id": (
        vlfeedback,
        vlfeedback(id="gone"),
        ["'gone.jpg' or 'gone.png'", NOT_THERE],
    ),
    "no image named": (rlhf_v, rlhf_v(QA, image=None), "the row names no image"),
    "image is a number": (povid, povid(7), "image 7 is not below --images"),
    "image is NaN": (povid, povid(float("nan")), "has no image, but its first human turn holds"),
    "image in base64": (povid, povid("/9j" + "A" * 5000), "is not below --images"),
    "name too long": (povid, povid("A" * 5000), "is not below --images"),
    "image is a folder": (povid, povid("up"), "image 'up' is not below --images"),
    "unreadable image": (povid, povid("text.jpg"), "text.jpg: not a readable picture"),
    "empty image": (povid, povid("empty.jpg"), "empty.jpg: not a readable picture"),
    "path upwards": (povid, povid("../secret.png"), "image path '../secret.png' leaves --images"),
    "path upwards inside": (
        povid,
        povid("a/../../secret.png"),
        "'a/../../secret.png' leaves --images",
    ),
    "path upwards by id": (
        vlfeedback,
        vlfeedback(id="../secret"),
        "'../secret.jpg' leaves --images",
    ),
    "absolute path": (povid, povid("/etc/passwd"), "image '/etc/passwd' is not below --images"),
    "dangling link": (povid, povid("gone.png"), "image 'gone.png' is not below --images"),
    "bomb": (povid, povid("bomb.png"), "bomb.png: "),
    "wide picture": (povid, povid("wide.png"), "wide.png: 20001 x 200 pixels; at most"),
    "thin picture": (povid, povid("thin.png"), "thin.png: 1 x 2000 pixels; at most"),
    "no rejected": (
        rlhf_v,
        rlhf_v({"question": "What?", "chosen": "A."}),
        "`text.rejected` is None",
    ),
    "no answer": (
        povid,
        povid(rejected_conversations=turns("What?")),
        "rejected_conversations` has the roles",
    ),
    "no key": (
        povid,
        {"conversations": turns("What?", "A.")},
        "key `rejected_conversations` is missing",
    ),
    "no output": (llava_rlhf, llava_rlhf(output_2=None), "`output_2.value` is None"),
    "no text": (
        vlfeedback,
        vlfeedback([{"annotations": {"H": {"Rating": 1}}}]),
        "completions[0].response` is None",
    ),
    "empty answer": (povid, povid(rejected=""), "`rejected_conversations[1].value` is ''"),
    "white answer": (rlhf_v, rlhf_v(QA | {"chosen": " \n"}), "`text.chosen` is ' \\n'"),
    "answer is a list": (
        llava_rlhf,
        llava_rlhf(output_1={"value": ["A."]}),
        "`output_1.value` is ['A.']",
    ),
    "half a surrogate": (
        rlhf_v,
        rlhf_v(QA | {"chosen": "A \ud83d"}),
        "`text.chosen` holds half of a surrogate pair",
    ),
    "text is no JSON": (rlhf_v, rlhf_v("What?"), "`text` is neither JSON nor base64 of JSON"),
    "text is a number": (rlhf_v, rlhf_v("12"), "`text` is int"),
    "text is a 2-list": (rlhf_v, rlhf_v(["What?", "A."]), "`text` is list"),
    "other prompts": (
        povid,
        povid(rejected_conversations=turns("Who?", "B.")),
        "differ before their last turn",
    ),
    "roles": (
        povid,
        povid(conversations=turns("What?", "A.")[::-1]),
        "`conversations` has the roles ['human']",
    ),
    "no turns": (povid, povid(conversations=[]), "`conversations` has the roles []"),
    "turns of text": (povid, povid(conversations="What?"), "`conversations` is str"),
    "preference 0": (llava_rlhf, llava_rlhf(preference=0), "`preference` is 0; 1 or 2 is needed"),
    "preference true": (llava_rlhf, llava_rlhf(preference=True), "`preference` is True"),
    "preference text": (llava_rlhf, llava_rlhf(preference="1"), "`preference` is '1'"),
    "two images": (
        povid,
        povid(question="<image>\nAnd <image>?"),
        "turn holds `<image>` 2 times; one picture",
    ),
    "no placeholder": (
        povid,
        povid(question="What?"),
        "has an image, but its first human turn holds",
    ),
    "no picture": (povid, povid(None), "has no image, but its first human turn holds"),
    "only a placeholder": (povid, povid(question="<image>"), "`first human turn` is ''"),
    "ratings are text": (vlfeedback, rated("good"), "completions[0].annotations is 'good'"),
    "ratings are a list": (
        vlfeedback,
        rated([{"Rating": "1"}]),
        "completions[0].annotations is [{'Rating'",
    ),
    "rating is no object": (
        vlfeedback,
        rated({"Helpfulness": "5"}),
        "annotations is {'Helpfulness': '5'}",
    ),
    "rating without a value": (
        vlfeedback,
        rated({"Helpfulness": {"Rationale": "-"}}),
        "completions[0].annotations is",
    ),
    "no ratings": (vlfeedback, rated({}), "completions[0].annotations is {}"),
    "completion is text": (
        vlfeedback,
        vlfeedback(["A", "B"]),
        "completions[0].annotations is None",
    ),
    "completions are a number": (vlfeedback, vlfeedback(2), "`completions` is 2"),
    "completions are uneven": (
        vlfeedback,
        vlfeedback({"response": ["A", "B"], "annotations": [{}]}),
        UNEVEN,
    ),
    "completions are no lists": (vlfeedback, vlfeedback({"response": 1, "annotations": 2}), UNEVEN),
    "row is a list": (povid, [1, 2], "the row is list"),
    "row is null": (povid, None, "the row is NoneType"),
}


def lines_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_stops_the_run_before_it_starts(folder, say, name):
    layout, row, expected = ROWS[name]
    file = lines_of(folder / "bad.jsonl", [GOOD[layout], row])
    expected = ["bad.jsonl, row 1: ", *([expected] if isinstance(expected, str) else expected)]
    message = say(
        dpo.main, ["--model", "a/b/c", "--data", file, "--images", folder / "images"], expected
    )
    assert len(message) < 600 and message.endswith(
        "(1 of 2 rows are refused; --skip-bad-rows goes on without them)"
    )
    assert not (folder / "runs").exists()
    # and a look at the file lists it, beside the good row
    found = layouts.read(file, folder / "images")
    assert len(found.records) == 1 and [r["row"] for r in found.refused] == [1]


@pytest.mark.parametrize("layout", GOOD, ids=lambda f: f.__name__)
def test_the_good_rows_are_good(folder, layout):
    assert (
        len(read_records([lines_of(folder / "good.jsonl", [GOOD[layout]] * 2)], folder / "images"))
        == 2
    )


def test_all_bad_rows_are_counted(folder, say):
    file = lines_of(folder / "bad.jsonl", [povid("a.png"), povid(), povid("b.png"), 3])
    args = ["--model", "a/b/c", "--data", file, "--images", folder / "images"]
    message = say(dpo.main, args, "row 0: image 'a.png' is not below")
    assert message.endswith("(3 of 4 rows are refused; --skip-bad-rows goes on without them)")


# ---- files


FILES = {  # name: (content, what the message holds)
    "no layout": (
        '{"question": "What?", "answer": "A."}\n',
        ["row 0 has the keys ['answer', 'question']", "povid: "],
    ),
    "many keys": (
        json.dumps(dict.fromkeys(map(str, range(9999)))),
        "bad.json: row 0 has the keys ['0', '1'",
    ),
    "broken line": (
        json.dumps(povid()) + '\n{"conversations": [\n',
        ["bad.json, row 1: line 2: not valid JSON", "1 of 2 rows are refused"],
    ),
    "broken line after empty ones": (
        json.dumps(povid()) + '\n\n\n{"a"}\n',
        ["bad.json, row 1: line 4: not valid JSON", "1 of 2 rows are refused"],
    ),
    "broken array": ('[\n {"a": 1},\n {"a": ]\n', ["bad.json: not valid JSON", "line 3 column 8"]),
    "deep array": ("[" * 100_000, "bad.json: not valid JSON"),
    "no JSON": (
        "question,answer\nWhat?,A.\n",
        ["bad.json, row 0: line 1: not valid JSON", "2 of 2 rows are refused"],
    ),
    "first line broken": (
        "{\n" + json.dumps(povid()) + "\n",
        ["bad.json, row 0: line 1: not valid JSON", "1 of 2 rows are refused"],
    ),
    "empty": ("", "bad.json: the file holds no row"),
    "empty array": ("[]", "bad.json: the file holds no row"),
    "array of numbers": ("[1, 2]", ["bad.json, row 0: the row is int", "2 of 2 rows are refused"]),
    "ties only": (
        json.dumps(vlfeedback(ratings="33")),
        "bad.json: 1 rows of layout vlfeedback give no pair",
    ),
    "instructions": (
        json.dumps({"conversations": turns("What?", "A.")}),
        "layout llava_instruct is instruction data",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file(folder, say, name):
    content, expected = FILES[name]
    (folder / "bad.json").write_text(content)
    args = ["--model", "a/b/c", "--data", folder / "bad.json", "--images", folder / "images"]
    assert len(say(dpo.main, args, expected)) < 1200
    assert not (folder / "runs").exists()


def test_what_is_no_file(folder, say):
    (folder / "latin.json").write_bytes(b'[{"a": "caf\xe9"}]')
    model = ["--model", "a/b/c", "--data"]
    say(
        dpo.main,
        [*model, folder / "no.json"],
        "no.json: no such file; a JSON, JSON-lines or",
    )
    say(dpo.main, [*model, folder], f"{folder}: a folder with latin.json; a data file is needed")
    say(dpo.main, [*model, folder / "latin.json"], "latin.json: not a text file")
    say(dpo.main, ["--model", "a/b/c"], "--model needs --data")


def test_parquet(folder, say, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (folder / "bad.parquet").write_text("This is a text.")
    for name in ("no.parquet", "bad.parquet"):
        say(
            dpo.main,
            ["--model", "a/b/c", "--data", folder / name],
            f"{name}: not readable as parquet",
        )
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array(
        [
            None,
            {"bytes": None, "path": "x.png"},
            {"bytes": b"text", "path": None},
            {"bytes": bomb(60000, 60000), "path": None},
        ],
        kind,
    )
    columns = {"image": cells, "text": [json.dumps(QA)] * 4, "origin_dataset": ["demo"] * 4}
    pq.write_table(pa.table(columns), folder / "pictures.parquet", row_group_size=2)
    monkeypatch.chdir(folder)  # for .cache
    file = layouts.read(folder / "pictures.parquet")
    assert [(r["row"], r["why"][:21]) for r in file.refused] == [
        (0, "the row names no imag"),
        (1, "image 'x.png' is not "),
    ]
    for i, record in enumerate(file.records, 2):
        where = f"pictures.parquet, row {i}"
        with pytest.raises(BadInput, match=f"{where}: not a readable picture"):
            files.open_image(record.image)


# ---- pictures: what the header does not tell


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png"])
def test_a_cut_picture(folder, say, checkpoint, name):
    file = lines_of(folder / "rows.jsonl", [povid(name)])
    read_records([file], folder / "images")  # the header is whole
    args = ["--model", checkpoint, "--data", file, "--images", folder / "images"]
    assert "truncated" in say(dpo.main, args, f"{name}: the picture cannot be decoded")


@pytest.mark.parametrize(
    "kind, value", [(2, b"abc\0"), (6, b"\xff" * 4)], ids=["TypeError", "struct.error"]
)
def test_corrupt_exif(folder, kind, value):
    """A resolution that is a text or negative: Pillow turns the picture and fails when it writes the EXIF data anew."""
    entries = struct.pack("<HHI4s", 0x0112, 3, 1, b"\6\0\0\0") + struct.pack(
        "<HHI4s", 0x011A, kind, 1, value
    )
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + b"\0" * 4
    whole = (folder / "images" / "whole.jpg").read_bytes()
    (folder / "exif.jpg").write_bytes(
        whole[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + whole[2:]
    )
    with pytest.raises(BadInput, match="exif.jpg: the picture cannot be decoded"):
        files.open_image(folder / "exif.jpg")


# ---- model, flags, run folder


def test_equal_answers(folder, say, checkpoint):
    file = lines_of(
        folder / "rows.jsonl", [povid(), povid(chosen="A lamp.", rejected="\nA lamp. ")]
    )
    args = ["--model", checkpoint, "--data", file, "--images", folder / "images"]
    say(dpo.main, args, "rows.jsonl, row 1: chosen and rejected are the same tokens")


def test_too_long(folder, say, checkpoint):
    file = lines_of(folder / "rows.jsonl", [povid(), povid(question="<image>\n" + "Why? " * 600)])
    args = ["--model", checkpoint, "--data", file, "--images", folder / "images"]
    say(dpo.main, args, ["rows.jsonl, row 1: prompt of ", "the limit is 512"])
    say(dpo.main, [*args, "--max-length", 9], ["rows.jsonl, row 0: prompt of ", "the limit is 9"])


def test_image_token_count(llava):
    model, processor = llava
    example = processor.encode(Record("row 0", "a picture", ("What?",), ("A.", "B.")))
    pixels = torch.zeros(1, 3, processor.image_size, processor.image_size)
    assert model.embed(example.prompt[None], pixels).shape[1] == len(example.prompt)
    with pytest.raises(BadInput, match="4 image tokens in the text against 8 image features"):
        model.embed(example.prompt[None], pixels.repeat(2, 1, 1, 1))
    with pytest.raises(BadInput, match="4 image tokens in the text against 0 image features"):
        model.embed(example.prompt[None])
    with pytest.raises(BadInput, match="3 image tokens in the text against 4 image features"):
        at = (example.prompt == processor.image_token_id).nonzero()[0, 0]
        model.embed(torch.cat([example.prompt[:at], example.prompt[at + 1 :]])[None], pixels)


def changed(checkpoint, folder, change):
    """A copy of the checkpoint whose tensors went through `change`."""
    shutil.copytree(checkpoint, folder)
    save_file(
        change(load_file(folder / "model.safetensors")),
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def test_missing_keys(folder, say, checkpoint):
    lost = "multi_modal_projector.linear_2.weight"
    broken = changed(
        checkpoint,
        folder / "broken",
        lambda tensors: {k: v for k, v in tensors.items() if k != lost},
    )
    args = ["--data", lines_of(folder / "rows.jsonl", [povid()]), "--images", folder / "images"]
    say(
        dpo.main,
        ["--model", broken, *args],
        ["broken: the weights are not those", f"missing: {lost}"],
    )
    say(dpo.main, ["--model", folder / "no" / "model", *args], "no such folder")


def test_flags(folder, say):
    args = [
        "--model",
        "a/b/c",
        "--data",
        lines_of(folder / "rows.jsonl", [povid()]),
        "--images",
        folder / "images",
    ]
    for flags, expected in (
        (["--device", "gpu"], "--device gpu cannot be used: "),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used: "),
        (["--dtype", "float16"], ["--dtype: invalid choice: 'float16'", "float32", "bfloat16"]),
        (["--loss", "ppo"], ["--loss: invalid choice: 'ppo'", "ipo"]),
        (["--bata", "0.1"], "unrecognized arguments: --bata 0.1; --help lists what is accepted"),
        (["--step", "3"], "unrecognized arguments: --step 3"),  # no abbreviations
        (["--steps", "many"], "--steps: 'many' was given; a whole number, 1 or more, is needed"),
        (
            ["--batch-size", "0"],
            "--batch-size: '0' was given; a whole number, 1 or more, is needed",
        ),
        (["--steps", "-1"], "--steps: '-1' was given; a whole number, 1 or more, is needed"),
    ):
        say(dpo.main, [*args, *flags], expected)
    say(inspector.main, [folder / "rows.jsonl", "--jason"], "unrecognized arguments: --jason")
    assert not (folder / "runs").exists()


def test_a_tokenizer_that_is_a_pointer(checkpoint, tmp_path):
    """Of git-lfs, where a clone did not have it."""
    shutil.copytree(checkpoint, tmp_path / "clone")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:7\nsize 123456\n"
    (tmp_path / "clone" / "tokenizer.json").write_text(pointer)
    with pytest.raises(BadInput, match="tokenizer.json: a git-lfs pointer"):
        checkpoints.read_tokenizer(tmp_path / "clone")


def test_template(folder, say, checkpoint):
    args = [
        "--model",
        checkpoint,
        "--data",
        lines_of(folder / "rows.jsonl", [povid()]),
        "--images",
        folder / "images",
    ]
    say(
        dpo.main,
        [*args, "--template", "alpaca"],
        "--template 'alpaca' is unknown; accepted are vicuna_v1, mistral",
    )
    say(dpo.main, [*args, "--template", "chatml"], "--template chatml needs the token <|im_start|>")


def test_run_folder(folder, say):
    args = [
        "--model",
        "a/b/c",
        "--data",
        lines_of(folder / "rows.jsonl", [povid()]),
        "--images",
        folder / "images",
    ]
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("mine")
    say(dpo.main, [*args, "--out", "mine"], "--out mine exists; give another folder, or --resume")
    say(
        dpo.main,
        [*args, "--out", "mine", "--resume"],
        "--resume needs --out with the folder of a run; mine/args.json",
    )
    say(dpo.main, [*args, "--resume"], "--resume needs --out with the folder of a run")
    out = ["--out", "mine/notes.txt/deep/run"]
    say(
        dpo.main, [*args, *out], "--out mine/notes.txt/deep/run: mine/notes.txt is a file; a folder"
    )
    asked = argparse.Namespace(answers=None, model="m", adapter=None, images="i", out=out[1])
    with pytest.raises(BadInput, match="mine/notes.txt is a file; a folder is accepted"):
        evaluation.check_flags(asked)
    assert [p.name for p in (folder / "mine").iterdir()] == ["notes.txt"] and not (
        folder / "runs"
    ).exists()


# ---- the whole way, as a user types it


def test_dpo_refuses_a_bad_row(folder):
    file = lines_of(folder / "rows.jsonl", [povid(), povid("../secret.png")])
    status, out, err = command(
        "dpo.py", "--model", "a/b/c", "--data", file, "--images", "images", cwd=folder
    )
    sentence(
        status, err, ["dpo.py: ", "rows.jsonl, row 1: image path '../secret.png' leaves --images"]
    )
    assert out == "" and len(err.splitlines()) == 1


def test_dpo_unknown_flag(folder):
    status, _, err = command("dpo.py", "--learning-rate", "1", cwd=folder)
    assert sentence(status, err, "unrecognized arguments: --learning-rate 1") == err.strip()


@pytest.mark.parametrize("check, begun", [("full", False), ("header", True)])
def test_dpo_a_cut_picture(folder, checkpoint, check, begun):
    """Found before the run or on the way, after progress lines: the message is the last line all the same."""
    file = lines_of(folder / "rows.jsonl", [povid(), povid("cut.jpg")])
    args = ("--model", checkpoint, "--data", file, "--images", "images", "--out", "run")
    args += ("--batch-size", 1, "--check-images", check)
    status, _, err = command("dpo.py", *args, cwd=folder)
    sentence(status, err, "images/cut.jpg: the picture cannot be decoded")
    assert ("run folder run" in err.splitlines()) == (folder / "run").exists() == begun


def test_dpo_non_finite(folder, checkpoint):
    def spoil(tensors):
        tensors["multi_modal_projector.linear_2.weight"].fill_(3e38)  # finite; its products are not
        return tensors

    broken = changed(checkpoint, folder / "broken", spoil)
    file = lines_of(folder / "rows.jsonl", [povid(), povid(chosen="C.")])
    args = (
        "--model",
        broken,
        "--data",
        file,
        "--images",
        "images",
        "--out",
        "run",
        "--steps",
        2,
        "--batch-size",
        2,
    )
    status, _, err = command("dpo.py", *args, cwd=folder)
    sentence(
        status,
        err,
        ["loss nan", "rows.jsonl, row 0", "rows.jsonl, row 1", "no step was taken"],
        code=1,
    )
    assert (folder / "run" / "metrics.jsonl").read_text() == ""
    assert sorted(p.name for p in (folder / "run").iterdir()) == ["args.json", "metrics.jsonl"]


def test_data_lists_what_it_refuses(folder):
    rows = [povid(), povid("bomb.png"), povid(rejected=""), povid("text.jpg"), povid(None, "What?")]
    lines_of(folder / "rows.jsonl", rows)
    status, out, err = command("data.py", "rows.jsonl", "--images", "images", "--json", cwd=folder)
    found = json.loads(out)
    assert (
        status == 0 and err.startswith("images decoded 1/1  0 cannot be") and err.count("\n") == 1
    )
    assert (found["layout"], found["rows"], found["pairs"], found["notes"]) == ("povid", 5, 2, {})
    assert [r["row"] for r in found["refused"]] == [1, 2, 3]
    assert "60000" in found["refused"][0]["why"] or "3600000000" in found["refused"][0]["why"]
    assert [s["image"] for s in found["samples"]].count(None) == 1


def test_data_refuses_a_broken_file(folder):
    (folder / "rows.json").write_text(json.dumps([povid()])[:-1])
    status, out, err = command("data.py", "rows.json", "--images", "images", "--json", cwd=folder)
    assert sentence(status, err, "rows.json: not valid JSON") == err.strip() and out == ""


def test_a_line_that_is_no_json_is_a_bad_row(folder):
    """Counted, named by its line, and with skip_bad_rows left out, wherever it stands; a reader of scores raises it."""
    lines = [json.dumps(povid()), '{"a', "", "{" * 99_999, json.dumps(povid())]
    for order in (lines, lines[1:] + lines[:1], lines[3:] + lines[:3]):
        (folder / "rows.jsonl").write_text("\n".join(order))
        found = dataset.read([folder / "rows.jsonl"], folder / "images", skip_bad_rows=True)
        rows = [n for n, line in enumerate(filter(None, order)) if not line.endswith("}")]
        numbers = [n for n, line in enumerate(order, 1) if line and not line.endswith("}")]
        assert len(found.records) == 2 and [s["row"] for s in found.skipped] == rows
        for n, skipped in zip(numbers, found.skipped):
            assert skipped["why"].startswith(f"line {n}: not valid JSON: ")
        assert [type(row) for _, row in files.rows(folder / "rows.jsonl", keep_bad=True)].count(
            BadInput
        ) == 2
        with pytest.raises(BadInput, match=f"rows.jsonl, row {rows[0]}: line {numbers[0]}: not "):
            list(files.rows(folder / "rows.jsonl"))


def test_skip_bad_rows(folder, checkpoint):
    """Rows refused at reading, at encoding (too long, equal answers), and the run goes on; without the flag it does not."""
    rows = [
        povid(),
        povid("gone.jpg"),
        povid(chosen="A. " * 400),
        povid(chosen="C."),
        povid(chosen="B."),
    ]
    file = lines_of(folder / "rows.jsonl", rows)
    args = (
        "--model",
        checkpoint,
        "--data",
        file,
        "--images",
        "images",
        "--steps",
        1,
        "--batch-size",
        2,
    )
    status, _, err = command("dpo.py", *args, "--out", "run", cwd=folder)
    sentence(
        status,
        err,
        [
            "row 1: image 'gone.jpg'",
            "(1 of 5 rows are refused; --skip-bad-rows goes on without them)",
        ],
    )
    assert not (folder / "run").exists()
    status, _, err = command("dpo.py", *args, "--out", "run", "--skip-bad-rows", cwd=folder)
    assert status == 0, err
    assert (
        "1 of 5 rows are skipped, first rows.jsonl, row 1" in err
        and "2 of 4 rows are skipped, first rows.jsonl, row " in err
    )
    skipped = json.loads((folder / "run" / "skipped.json").read_text())
    assert [(s["file"], s["row"]) for s in skipped] == [
        ("rows.jsonl", 1),
        ("rows.jsonl", 2),
        ("rows.jsonl", 4),
    ]
    for entry, why in zip(
        skipped,
        ("image 'gone.jpg' is not", "prompt of ", "chosen and rejected are the same tokens"),
    ):
        assert entry["why"].startswith(why)
    assert (folder / "run" / "adapter").is_dir() and "\n2 rows; template" in err
    # --model lets data.py see what is refused at encoding
    status, out, err = command(
        "data.py", file, "--images", "images", "--model", checkpoint, "--json", cwd=folder
    )
    found = json.loads(out)
    assert status == 0 and (found["rows"], found["pairs"]) == (5, 2), err
    assert [r["row"] for r in found["refused"]] == [1, 2, 4]
    assert found["tokens"]["rejected"] == dict.fromkeys(("min", "median", "p95", "max"), 4)
    assert found["tokens"]["prompt"]["min"] > 4
    status, out, err = command(
        "data.py", file, "--images", "images", "--model", checkpoint, cwd=folder
    )
    assert (
        "3 rows refused" in out
        and "refused: 1, first row 2: prompt of" in out
        and "tokens of prompt: min" in out
    )


def test_skip_bad_rows_that_are_all(folder, say, checkpoint):
    args = ["--model", checkpoint, "--images", folder / "images", "--skip-bad-rows", "--data"]
    say(
        dpo.main,
        [*args, lines_of(folder / "gone.jsonl", [povid("a.jpg")] * 2)],
        ["row 0: image", "2 of 2 rows are refused"],
    )
    say(
        dpo.main,
        [*args, lines_of(folder / "same.jsonl", [povid(chosen="B.")])],
        ["row 0: chosen", "1 of 1 rows are refused"],
    )
    assert not (folder / "runs").exists()
