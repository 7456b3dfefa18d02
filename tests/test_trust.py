"""A run on a full or read-only disk, in a folder that another run uses or left half-written, and what strangers wrote."""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import badness
import kills
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import common
import judge
import training
from common import BadInput
from data import Record
from formats import adapters, chat, checkpoints, files, layouts, pictures

ROOT = Path(__file__).parents[1]


def ended(code):
    """Run code in a process of its own -> its exit status and the text on stderr."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr


def gone():
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture
def other_process():
    """A function that runs code beside the test until it ends; the code prints a line when it has begun."""
    started = []

    def start(code, *args):
        command = [sys.executable, "-c", f"{code}\nprint('on', flush=True)\nsys.stdin.read()"]
        process = subprocess.Popen(
            [*command, *map(str, args)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout.readline() == b"on\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


# ---- a full, read-only or wrong place


FULL = """
import resource, sys
from pathlib import Path
import torch, common, training
torch.manual_seed(0)
class Model(torch.nn.Linear):
    device = torch.device("cpu")
model = Model(30, 30)
optimizer = torch.optim.AdamW(model.parameters())
log = training.Log(Path("{out}"), 0, 5)
resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
common.run(lambda: {call})
"""


@pytest.mark.parametrize(
    "call, file",
    [
        ("log(0, [], dict.fromkeys(map(str, range(99)), 0.0))", "metrics.jsonl"),
        (
            'training.save_checkpoint(Path("{out}"), 1, model, optimizer)',
            "checkpoints/step-000001.tmp/state.safetensors",
        ),
    ],
)
def test_a_full_disk_names_the_file_and_frees_its_room(tmp_path, call, file):
    """A limit on the size of files stands in for it. Half a checkpoint would fill the disk for ever."""
    status, said = ended(FULL.format(out=tmp_path, call=call.format(out=tmp_path)))
    assert (status, said) == (2, f"-c: {tmp_path}/{file}: File too large.\n")
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_full_disk_that_names_no_file(capsys):
    """Pillow's and Python's own writes name none."""

    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(SystemExit, match="2"):
        common.run(full)
    assert "No space left on device, while a file was written" in capsys.readouterr().err


def test_a_text_that_cannot_be_written_leaves_no_half(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        common.write_text(tmp_path / "a", "\ud800")
    assert not list(tmp_path.iterdir())


def test_out_is_tried_before_anything_is_loaded(tmp_path, monkeypatch):
    """Even root can make no folder in /proc; a file of the same name as the cache stops it later."""
    monkeypatch.chdir(tmp_path)
    common.refuse_unwritable("new/folder")
    common.refuse_unwritable(None)
    assert not list(tmp_path.iterdir()), "the probe is gone"
    with pytest.raises(BadInput, match="--out /proc/run: nothing can be written in /proc"):
        common.refuse_unwritable("/proc/run")
    Path("a").touch()
    with pytest.raises(BadInput, match="--out a/run: a is a file; a folder is accepted"):
        common.refuse_unwritable("a/run")
    os.symlink("nowhere", "link")
    with pytest.raises(BadInput, match="--out link/run: link is a file"):
        common.refuse_unwritable("link/run")


@pytest.mark.parametrize("link, what", [(False, "a file"), (True, "a link that leads nowhere")])
def test_a_cache_that_is_no_folder(tmp_path, monkeypatch, link, what):
    monkeypatch.chdir(tmp_path)
    os.symlink("nowhere", ".cache") if link else Path(".cache").touch()
    for call in (
        lambda: common.refuse_unwritable(None),
        lambda: common.whole_folder(".cache/x").__enter__(),
    ):
        with pytest.raises(BadInput, match=rf"\.cache: {what}; a folder is needed there"):
            call()


# ---- two processes, and what a killed one leaves


CLAIM = "import sys, common; common.claim(sys.argv[1])"


def flags(**more):
    given = {"out": None, "resume": False, "seed": 0, "data": ["rows.json"], "lr": 0.5, "steps": 9}
    given |= {"skip_bad_rows": False, "grad_accum": 1}
    return argparse.Namespace(**given | more)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "rows.json").write_text("abc")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_runs_in_one_folder(folder, other_process):
    """Refused while the other lives, and no longer; the same process may go on in its own."""
    out = training.start(flags(out="run"), "dpo")
    training.start(flags(out="run", resume=True), "dpo")
    os.close(common.claimed.popitem()[1])
    other = other_process(CLAIM, folder / out)
    with pytest.raises(BadInput, match="--out run: another process works in this folder"):
        training.start(flags(out="run", resume=True), "dpo")
    other.kill()
    other.wait()
    assert training.start(flags(out="run", resume=True), "dpo") == out


def test_two_new_runs_take_two_folders(folder, monkeypatch):
    """The second finds the first's folder only when it makes its own."""
    made = Path.mkdir

    def late(path, *args, **kwargs):
        if path.name == "dpo-0" and not path.exists():
            made(path)  # the other process
        made(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", late)
    assert training.start(flags(), "dpo") == Path("runs/dpo-1")


def test_what_a_killed_run_leaves_is_removed(folder, other_process):
    out = training.start(flags(out="run"), "dpo")
    mine = other_process("import sys")
    kept = [f".model.{mine.pid}.part", ".model.x.part", ".venv.1", "checkpoints"]
    for name in (
        *kept,
        f".model.{gone()}.part",
        "checkpoints/step-000003.tmp",
        "checkpoints/a.tmp",
    ):
        (out / name / "inside").mkdir(parents=True)
    held = f".adapter.{gone()}.part"  # a process of another machine fills it
    (out / held).mkdir()
    other_process(CLAIM, folder / out / held)
    training.start(flags(out="run", resume=True), "dpo")
    assert {p.name for p in out.iterdir()} == {*kept, held, "args.json"}
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["a.tmp", "inside"]


def test_a_new_folder_of_the_cache_removes_old_halves(folder):
    half = folder / f".reference-1.{gone()}.part"
    half.mkdir()
    with common.whole_folder("reference-2"):
        pass
    assert not half.exists()


def test_two_processes_write_one_cache(folder, monkeypatch):
    """Both found it missing; between the last look and the renaming the other finishes."""
    replace = os.replace

    def slow(source, target):
        Path(target).mkdir()
        Path(target, "by").write_text("the other")
        replace(source, target)

    monkeypatch.setattr(os, "replace", slow)
    with common.whole_folder("made") as aside:
        (aside / "by").touch()
    assert Path("made/by").read_text() == "the other"
    assert {p.name for p in folder.iterdir()} == {"made", "rows.json"}


# ---- damaged caches and run folders


@pytest.mark.parametrize("damage", ["cut", "nan", "other", "gone"])
def test_a_damaged_cache_is_computed_anew(folder, capsys, damage):
    compute = lambda: torch.arange(3.0)
    training.cached("x", compute)
    file = Path(".cache/x/tensor.safetensors")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "gone":
        file.unlink()
    else:
        bad = {"nan": {"tensor": torch.tensor([1.0, torch.nan])}, "other": {"b": torch.ones(1)}}
        save_file(bad[damage], file)
    assert training.cached("x", compute).tolist() == [0, 1, 2]
    assert "is damaged and computed anew" in capsys.readouterr().err
    assert training.cached("x", lambda: 1 / 0).tolist() == [0, 1, 2]


def test_the_memory_of_pictures_may_hold_anything(folder):
    Path(".cache").mkdir()
    Path(".cache", pictures.SEEN).write_bytes(b"\xff\xfe\0half")
    assert pictures.decoded([]) == {}


class Small(torch.nn.Linear):
    device = torch.device("cpu")


@pytest.fixture
def saved(tmp_path):
    """(a run folder with a checkpoint of step 1, model, optimizer)."""
    torch.manual_seed(0)
    model = Small(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    training.save_checkpoint(tmp_path, 1, model, optimizer)
    return tmp_path, model, optimizer


@pytest.mark.parametrize("name", ["../../other/step-000001", "{abs}/step-000001", "step-٣", "\0"])
def test_latest_does_not_lead_out_of_the_folder(saved, tmp_path_factory, name):
    """A checkpoint of another run lies there; the run goes on from its own."""
    out, model, optimizer = saved
    elsewhere = tmp_path_factory.mktemp("other")
    training.save_checkpoint(elsewhere, 1, Small(2, 2), torch.optim.AdamW(Small(2, 2).parameters()))
    (out / "checkpoints/other").symlink_to(elsewhere / "checkpoints")
    name = name.format(abs=elsewhere / "checkpoints")
    (out / "checkpoints/latest").write_text(name)
    folder, *_ = training.last_checkpoint(out / "checkpoints")
    assert folder == out / "checkpoints/step-000001"


TENSORS = {
    "optimizer.weight.exp_avg": (torch.zeros(3, 2), r"has the shape \(3, 2\), not \(2, 2\)"),
    "optimizer.bias.step": (torch.zeros(2), r"has the shape \(2,\), not \(\)"),
    "optimizer.bias.exp_avg_sq": (None, "exp_avg_sq is missing"),
    "rng.cpu": (torch.zeros(5, dtype=torch.uint8), "no state of a random generator"),
    "rng.cuda": (torch.zeros(5), "no state of a random generator"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_a_checkpoint_that_cannot_be_right(saved, name):
    out, model, optimizer = saved
    file = out / "checkpoints/step-000001/state.safetensors"
    value, message = TENSORS[name]
    tensors = load_file(file) | {name: value}
    save_file({k: v for k, v in tensors.items() if v is not None}, file)
    with pytest.raises(BadInput, match=message):
        training.load_checkpoint(out, model, optimizer)


@pytest.mark.parametrize(
    "text", ["[]", '{"step": 1, "state": []}', '{"step": 1}', "", "[" * 100_000]
)
def test_a_state_json_that_is_none(saved, text):
    out, model, optimizer = saved
    (out / "checkpoints/step-000001/state.json").write_text(text)
    with pytest.raises(BadInput, match="step-000001 is damaged"):
        training.load_checkpoint(out, model, optimizer, {})


@pytest.mark.parametrize("step", ["1", True, 1.0, None])
def test_a_step_that_is_no_whole_number(saved, step):
    out, model, optimizer = saved
    (out / "checkpoints/step-000001/state.json").write_text(json.dumps({"step": step, "state": {}}))
    with pytest.raises(BadInput, match="state.json: step is"):
        training.load_checkpoint(out, model, optimizer)


@pytest.mark.parametrize("line", [b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"[]\n"])
def test_a_log_of_something_else(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(line)
    with pytest.raises(BadInput, match="metrics.jsonl, line 1: not a step of a run"):
        training.Log(tmp_path, 1, 5)


# ---- what strangers wrote, on the terminal


def test_control_characters_do_not_reach_the_terminal(capsys):
    """Colour, the window's title, a bell, a line that is written over, marks of direction."""
    text = "a\x1b[31m\x1b]0;x\x07\r\x9b2J\u202e\ud800\tb\nc"
    said = r"a\x1b[31m\x1b]0;x\x07\r\x9b2J\u202e\ud800" + "\tb\nc"
    assert common.printable(text, 99) == said

    def refuse():
        raise BadInput(text)

    with pytest.raises(SystemExit):
        common.run(refuse)
    assert said in capsys.readouterr().err


def test_a_long_reason_is_cut(capsys):
    def refuse():
        raise BadInput("a" * 3_000_000)

    with pytest.raises(SystemExit):
        common.run(refuse)
    said = capsys.readouterr().err
    assert len(said) < common.LONGEST + 200 and "(3000" in said


@pytest.mark.parametrize("flag", [common.positive_int, common.natural, common.seed])
def test_numbers_too_large_for_a_tensor(flag):
    for text in ("9" * 30, "9" * 4000, "9" * 10_000, "-" + "9" * 30):
        with pytest.raises(argparse.ArgumentTypeError) as refused:
            flag(text)
        assert len(str(refused.value)) < 200
    assert common.seed("-5") == -5 and common.seed(str(2**63 - 1)) == 2**63 - 1
    torch.manual_seed(-(2**63) + 1), torch.manual_seed(2**63 - 1)


# ---- a damaged model folder


@pytest.fixture
def model_folder(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "m"))


def change(path, keys, value):
    """Write a JSON file anew with another value at the place of these keys."""
    whole = json.loads(path.read_text())
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(whole))


PREPROCESSOR = "preprocessor_config.json"
VALUES = [  # file, keys, value, what the message says
    (PREPROCESSOR, ["image_mean"], [0.5, 0.5], "image_mean is .*three numbers from 0 to 1"),
    (PREPROCESSOR, ["image_mean"], "abc", "image_mean is 'abc'"),
    (PREPROCESSOR, ["image_std"], [0.5, 0.5, 0.0], "image_std is .*three numbers from 0.001 to 1"),
    (PREPROCESSOR, ["image_std"], [0.5, float("nan"), 0.5], "image_std is"),
    (PREPROCESSOR, ["size"], [[1]], "size of the image processor is"),
    (PREPROCESSOR, ["crop_size", "height"], [28], "crop_size of the image processor is"),
    ("processor_config.json", ["image_processor"], [1], "image_processor is .*an object is accept"),
    ("config.json", ["model_type"], ["llava"], "the model type is"),
    ("config.json", ["text_config"], "llama", "text_config is 'llama'; an object is accepted"),
    ("config.json", ["text_config", "hidden_size"], -64, "text_config.hidden_size is -64"),
    ("config.json", ["vision_config", "patch_size"], 10**30, "vision_config.patch_size is 1000"),
    ("config.json", ["vision_config", "num_hidden_layers"], 10**8, "num_hidden_layers is 100000000"),
    ("config.json", ["text_config", "intermediate_size"], 10**9, "has the shape .*the config asks"),
    ("config.json", ["vision_config", "hidden_size"], 0, "vision_config.hidden_size is 0; a whole"),
    ("config.json", ["image_token_index"], "x", "the image token is 'x'|not a usable config"),
    ("config.json", ["prompt_template"], {"a": 1}, "prompt_template is .*a name is accepted"),
    ("tokenizer_config.json", ["model_max_length"], {}, "no usable tokenizer"),
    ("tokenizer.json", ["post_processor", "special_tokens"], {}, "no usable tokenizer"),
]  # fmt: skip


@pytest.mark.parametrize("file, keys, value, message", VALUES)
def test_a_value_that_no_model_has(model_folder, file, keys, value, message):
    """Refused before any memory is asked for: 10^9 rows of 64 numbers would be 256 GB."""
    change(model_folder / file, keys, value)
    with pytest.raises(BadInput, match=message):
        checkpoints.load(model_folder)


@pytest.mark.parametrize("text", [None, "{}", "[]", "", "[" * 100_000, '{"a":' * 100_000, "\xff"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_file_that_is_missing_or_something_else(model_folder, file, text):
    (model_folder / file).unlink()
    if text is not None:
        (model_folder / file).write_text(text, encoding="latin-1")
    with pytest.raises(BadInput):
        checkpoints.load(model_folder)


@pytest.mark.parametrize(
    "names",
    [None, [], {"a": 1}, {"a": None}, {"a": "../m/model.safetensors"}, {"a": "/etc/passwd"}],
)
def test_an_index_names_files_beside_it(model_folder, names):
    (model_folder / "model.safetensors").rename(model_folder / "x.safetensors")
    (model_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(BadInput, match="weight_map names .*names of .safetensors files beside it"):
        checkpoints.load(model_folder)


def test_tokens_beyond_the_embeddings(model_folder):
    """The tokenizer has one word more than the model."""
    whole = json.loads((model_folder / "tokenizer.json").read_text())
    vocabulary = whole["model"]["vocab"]
    vocabulary["?"] = 5000
    (model_folder / "tokenizer.json").write_text(json.dumps(whole))
    _, processor = checkpoints.load(model_folder)
    with pytest.raises(BadInput, match="row 0: the token '.' has the id 5000; the model has embed"):
        processor.encode(Record("row 0", None, ("?",), ("a",)))


def test_a_tokenizer_that_knows_no_letter(llava, monkeypatch):
    _, processor = llava
    monkeypatch.setattr(processor, "tokenise", lambda text: [])
    processor.bos_ids = []
    with pytest.raises(BadInput, match="row 0: the tokenizer makes no token of the prompt"):
        processor.encode(Record("row 0", None, ("?",), ("a",)))


@pytest.fixture
def adapter_folder(checkpoint, tmp_path):
    model, processor = checkpoints.load(checkpoint)
    model.prepare(lora_rank=2, projector=False)
    model.add_head("policy")
    settings = {"question": "?", "facts": None, "max_facts": None, "template": "vicuna_v1"}
    settings |= {"image_aspect": "pad", "held_out": {"a": {"n": 1, "mean": 0, "std": 1.0}}}
    adapters.save_reward(model, tmp_path / "r", checkpoint, settings, "policy")
    return tmp_path / "r"


def test_an_adapter_s_rank_is_compared_before_memory_is_asked_for(adapter_folder, checkpoint):
    """10^9 x 64 numbers for each layer."""
    folder = adapter_folder / "adapter"
    change(folder / "adapter_config.json", ["r"], 10**9)
    with pytest.raises(BadInput, match="has the shape .*adapter_config.json says rank 1000000000"):
        adapters.load_adapter(checkpoints.load(checkpoint)[0], folder)


@pytest.mark.parametrize("key", ["base", "base_name", "dtype", "quantize", "template"])
@pytest.mark.parametrize("value", [[1], {"a": 1}, 7])
def test_the_conditions_of_an_adapter_are_texts(adapter_folder, checkpoint, key, value):
    change(adapter_folder / "adapter/alignment.json", [key], value)
    with pytest.raises(BadInput, match=f"alignment.json: {key} is"):
        adapters.as_trained(adapter_folder / "adapter")


REWARD = [("base", 1), ("base_name", ["x"]), ("question", {}), ("question", {"a": 1}), ("facts", 5),
          ("max_facts", "1"), ("max_facts", 10**30), ("max_facts", True), ("template", [1]),
          ("image_aspect", 3), ("facts_first", 1), ("held_out", {"a": 1}), ("held_out", "x"),
          ("held_out", {"a": {"n": 0, "mean": 0, "std": 1}}),
          ("held_out", {"a": {"n": 1, "mean": None, "std": 1}}),
          ("held_out", {"a": {"n": 1, "mean": float("nan"), "std": 1}})]  # fmt: skip


@pytest.mark.parametrize("key, value", REWARD)
def test_reward_json_of_wrong_types(adapter_folder, key, value):
    assert adapters.reward_settings(adapter_folder)["question"] == "?"
    change(adapter_folder / "reward.json", [key], value)
    with pytest.raises(BadInput, match=f"reward.json: {key} is"):
        adapters.reward_settings(adapter_folder)


# ---- one bad value is its row's alone


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


TEXT = {"type": "text", "text": "Hi?"}
TRL = {"prompt": [{"role": "user", "content": [TEXT]}], "chosen": "A.", "rejected": "B."}
CONVERSATION = {"conversations": turns("Hi?", "A."), "rejected_conversations": turns("Hi?", "B.")}
CELLS = [
    (TRL, ["prompt", 0, "content", 0, "text"], [None], "blocks whose text is none"),
    (TRL, ["prompt", 0, "content", 0, "type"], ["text"], "blocks of the types"),
    (TRL, ["prompt", 0, "content"], [None], "blocks of the types"),
    (CONVERSATION, ["conversations", 0, "from"], ["human"], "has the roles"),
    (CONVERSATION, ["conversations", 0, "value"], [None], "a non-empty string is needed"),
    (CONVERSATION, ["conversations", 1], None, "a list of {from, value} turns"),
]


@pytest.mark.parametrize("row, keys, value, why", CELLS)
def test_one_bad_value_is_its_row_s_alone(tmp_path, row, keys, value, why):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row, row, row]))
    change(file, [1, *keys], value)
    found = layouts.read(file)
    assert len(found.records) == 2 and [r["row"] for r in found.refused] == [1]
    assert why in found.refused[0]["why"]


@pytest.mark.parametrize("cell", ["[" * 100_000, '{"a":' * 100_000, "W1tb" * 50_000])
def test_a_cell_nested_deep(tmp_path, cell):
    """JSON, and JSON in base64, in a column that holds it as text."""
    qa = json.dumps({"question": "Hi?", "chosen": "A.", "rejected": "B."})
    rows = [{"text": text, "origin_dataset": "x", "image": "a.png"} for text in (qa, cell)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    found = layouts.read(tmp_path / "rows.jsonl")
    assert len(found.records) == 1
    assert found.refused == [{"row": 1, "why": "`text` is neither JSON nor base64 of JSON."}]


def test_a_cell_of_parquet_that_is_no_text(tmp_path):
    """A bit flipped in a text column: the other rows of the same batch are read."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"prompt": ["Hi?"] * 3, "chosen": ["A.", "Aha!", "A."], "rejected": ["B."] * 3}
    path = tmp_path / "rows.parquet"
    pq.write_table(
        pa.table(columns), path, compression="none", use_dictionary=False, write_statistics=False
    )
    path.write_bytes(path.read_bytes().replace(b"Aha!", b"A\xff\xff!", 1))
    found = layouts.read(path)
    assert len(found.records) == 2 and [r["row"] for r in found.refused] == [1]
    assert "a cell is not text" in found.refused[0]["why"]


def test_a_picture_that_runs_another_program(tmp_path, monkeypatch):
    """Pillow starts Ghostscript to read EPS; it is not asked to."""
    Image.new("RGB", (9, 9)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").format == "EPS"
    monkeypatch.setattr("subprocess.Popen", lambda *_: 1 / 0)
    with pytest.raises(BadInput, match="not a readable picture"):
        files.open_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", [*files.FORMATS, "MPO"])  # MPO: a JPEG with more pictures
def test_pictures_that_are_read(tmp_path, kind):
    Image.effect_noise((16, 16), 90).convert("RGB").save(tmp_path / "a", kind)
    assert files.open_image(tmp_path / "a").size == (16, 16)


def test_a_template_that_never_ends(checkpoint, monkeypatch):
    """Jinja bounds one loop, not loops in loops. A template reaches nothing of ours."""
    tokenizer = checkpoints.read_tokenizer(checkpoint)
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    endless = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    begin = time.monotonic()
    with pytest.raises(ValueError, match="longer than 0.2 seconds"):
        chat.cut(endless, tokenizer, "<image>")
    assert time.monotonic() - begin < 20 and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    for reach in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% include '/etc/passwd' %}"):
        with pytest.raises(ValueError, match="does not write the image and the text"):
            chat.cut(reach, tokenizer, "<image>")


def test_an_empty_value_of_argparse():
    """argparse makes an empty list of `--data=--`."""
    parser = common.Parser("test")
    parser.add_argument("--data")
    with pytest.raises(BadInput, match="--data=--: -- is no value"):
        parser.parse_args(["--data=--"])


@pytest.mark.parametrize("keys, value", [(["processes"], None), (["skipped"], 5), (["skipped"], [{}]),
                                         (["skipped"], [{"file": 1, "row": []}]),
                                         (["flags", "batch_size"], "x" * 10**6)])  # fmt: skip
def test_args_json_of_wrong_types(folder, keys, value):
    out = training.start(flags(out="run", batch_size=2), "dpo")
    change(out / "args.json", keys, value)
    with pytest.raises(BadInput) as refused:
        training.start(flags(out="run", batch_size=2, resume=True), "dpo")
    assert "args.json" in str(refused.value) or "--batch-size" in str(refused.value)
    assert len(str(refused.value)) < 2000


# ---- all kinds, some of each


KINDS = ("rows of data", "data files", "captions, ratings", "pictures", "model folders",
         "weights, adapters", "run folders", "flags")  # fmt: skip


@pytest.fixture(scope="module")
def all_kinds(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    reward = badness.write_reward(folder / "reward", checkpoint)
    return badness.kinds(folder / "kinds", checkpoint, reward)


@pytest.mark.parametrize("kind", KINDS)
def test_some_bad_inputs_of_each_kind(all_kinds, tmp_path, monkeypatch, kind):
    """Forty of thousands, another forty each week; `python tests/trust.py` tries all of them."""
    monkeypatch.chdir(tmp_path)
    assert all_kinds.keys() == set(KINDS)
    rng = random.Random(time.strftime("%Y-%W"))
    refused, accepted, faults = badness.count(all_kinds[kind], rng, 40)
    assert not faults
    assert refused > 10 and refused + accepted == 40


# ---- a judge's server that means ill


@pytest.fixture
def raw_server(monkeypatch):
    """A function (send) -> url: a server whose replies are whatever send(connection) writes."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    listening = []

    def start(send):
        sock = socket.create_server(("127.0.0.1", 0))
        listening.append(sock)

        def serve():
            while True:
                try:
                    connection, _ = sock.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    connection.recv(2**16)
                    send(connection)

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{sock.getsockname()[1]}/v1"

    yield start
    for sock in listening:
        sock.close()


def drip(beginning):
    """A sender of a byte every .05 seconds after the beginning, for ten seconds."""

    def send(connection):
        connection.sendall(beginning)
        for _ in range(200):
            connection.sendall(b"0")
            time.sleep(0.05)

    return send


OK = b"HTTP/1.1 200 OK\r\n"
ASKED = [(Record("row 0", None, ("?",)), "?")]


@pytest.mark.parametrize(
    "beginning",
    [b"HTTP/1.1 2", OK + b"Content-Length: 999\r\n\r\n", OK + b"Transfer-Encoding: chunked\r\n\r\n",
     b"HTTP/1.1 500 No\r\nContent-Length: 999\r\n\r\n"],
    ids=["headers", "body", "chunk", "error"],
)  # fmt: skip
def test_a_byte_at_a_time_is_no_reply(raw_server, beginning):
    """Each read ends well before the limit; the reply as a whole does not."""
    ask = judge.ask_endpoint(raw_server(drip(beginning)), "m", timeout=0.4, tries=1)
    begin = time.monotonic()
    with pytest.raises(judge.NoAnswer, match="no reply within 0.4 seconds|status 500"):
        list(ask(ASKED))
    assert time.monotonic() - begin < 5


def test_a_reply_of_gigabytes_is_not_read(raw_server):
    sent = []

    def send(connection):
        connection.sendall(OK + b"Content-Length: 3000000000\r\n\r\n")
        for _ in range(3000):
            connection.sendall(b"x" * 10**6)
            sent.append(10**6)

    ask = judge.ask_endpoint(raw_server(send), "m", tries=1)
    with pytest.raises(judge.NoAnswer, match="a reply of more than 4,194,304 bytes"):
        list(ask(ASKED))
    assert sum(sent) < 10**8


@pytest.mark.parametrize("status", [b"200 OK", b"400 No", b"500 No"])
def test_a_server_s_words_are_shown_as_text(raw_server, status):
    words = b"\x1b]0;x\x07\x1b[2J\xc2\x9b1m" * 9
    reply = b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(words), words)
    url = raw_server(lambda connection: connection.sendall(reply))
    with pytest.raises(judge.NoAnswer) as refused:
        list(judge.ask_endpoint(url, "m", tries=1)(ASKED))
    said = str(refused.value)
    assert r"\x1b]0;x\x07" in said and not any(c in said for c in "\x1b\x07\x9b")


@pytest.mark.parametrize("usage", [[], {"prompt_tokens": 10**40}, {"prompt_tokens": True}, 5])
def test_a_server_may_count_as_it_likes(raw_server, usage):
    content = {"choices": [{"message": {"content": "Better: 1"}}], "usage": usage}
    body = json.dumps(content).encode()
    reply = OK + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    url = raw_server(lambda connection: connection.sendall(reply))
    (reply,) = judge.ask_endpoint(url, "m")(ASKED)
    assert reply == judge.Reply(0, "Better: 1", {"requests": 1})


# ---- killed, and started again


def test_killed_runs_go_on_bit_for_bit(tmp_path):
    """A few ends of three kinds of run, some bad inputs; `python tests/trust.py` alone does hundreds of all kinds."""
    flags = "--kills 6 --runs dpo bdhs ppo --most 1 --executions 0".split()
    command = [
        sys.executable,
        str(ROOT / "tests/trust.py"),
        *flags,
        "--seed",
        time.strftime("%Y%W"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert re.search(r"runs ended, of 3 kinds +(\d+) +went on bit for bit +\1\b", done.stdout)


def test_a_run_folder_that_was_killed_in_its_first_moment(folder):
    """Before args.json is there, --resume cannot go on, and the same command may begin anew."""
    Path("run").mkdir()
    Path("run/args.json.tmp").touch()
    Path("run/.probe-k3a_9x").mkdir()
    training.refuse_used(Path("run"))
    assert training.start(flags(out="run"), "dpo") == Path("run")
    with pytest.raises(BadInput, match="--out run exists"):
        training.start(flags(out="run"), "dpo")


@pytest.mark.parametrize(
    "name", "sft mpo mdpo online_dpo povid reward_model ppo grpo steerlm".split()
)
def test_every_loop_ends_after_its_step(name):
    """Through `training.batches`, or by its own call."""
    code = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    assert "training.batches(" in code or "training.end_after_steps(save, step)" in code


ENDS = [("dpo", signal.SIGINT, 130), ("dpo", signal.SIGTERM, 143), ("grpo", signal.SIGTERM, 143)]


@pytest.mark.parametrize("name, number, status", ENDS)
def test_a_signal_ends_a_run_after_its_step(checkpoint, tmp_path, name, number, status):
    """--save-every 0 writes no checkpoint; the step in which the signal comes is saved, and no other follows."""
    data = kills.write_data(tmp_path / "data")
    script, argv = kills.command(name, data, checkpoint, None)
    more = ["--steps", "100000", "--save-every", "0", "--out", "out"]
    command = [sys.executable, ROOT / f"{script}.py", *argv, *more]
    process = subprocess.Popen(
        list(map(str, command)), cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "out/metrics.jsonl"
    begin = time.monotonic()
    while not log.exists() or log.read_bytes().count(b"\n") < 3:
        assert time.monotonic() - begin < 60 and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status and "ending after this step" in said
    assert said.rstrip().endswith("--resume goes on from it") and "Traceback" not in said
    steps = log.read_bytes().count(b"\n")
    assert (tmp_path / "out/checkpoints/latest").read_text() == f"step-{steps:06d}"


def test_a_second_signal_ends_at_once_and_none_is_kept(monkeypatch):
    monkeypatch.setattr(training, "keep_steps", lambda *_: None)
    before = signal.getsignal(signal.SIGINT)
    training.end_after_steps(None, 0)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(common.Ended) as ended:
        signal.raise_signal(signal.SIGINT)
    assert ended.value.status == 130 and training.asked_to_end == [signal.SIGTERM]
    with pytest.raises(common.Ended) as ended:
        training.end_after_steps(None, 1)
    assert ended.value.status == 143 and not training.asked_to_end
    assert signal.getsignal(signal.SIGINT) is before and not training.before_steps
