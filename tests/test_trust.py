"""A run on a full or read-only disk, in a folder that another run uses or left half-written, and what strangers wrote."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import common
import training
from common import BadInput
from formats import pictures

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
