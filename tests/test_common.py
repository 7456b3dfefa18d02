"""The command line's numbers and which flags were given, files, and how an error ends a script."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_house import SCRIPTS

import common
from common import BadInput, Parser

ROOT = Path(__file__).parents[1]


def parser():
    p = Parser("test")
    p.add_argument("--n", type=common.positive_int, default=3)
    p.add_argument("--save-every", type=common.natural, default=5)
    p.add_argument("--beta", type=common.positive)
    p.add_argument("--lr", type=common.not_negative)
    p.add_argument("--mix", type=common.fraction)
    p.add_argument("--k", type=common.ranged(int, "2 or more", lambda k: k >= 2))
    p.add_argument("--quiet", action="store_true")
    return p


def test_numbers_in_range():
    args = parser().parse_args("--n 1 --save-every 0 --beta 1e-9 --lr 0 --mix 1 --k 2".split())
    assert (args.n, args.save_every, args.beta, args.lr, args.mix, args.k) == (1, 0, 1e-9, 0, 1, 2)
    assert all(type(n) is int for n in (args.n, args.save_every, args.k))
    assert parser().parse_args(["--mix", "0"]).mix == 0


@pytest.mark.parametrize(
    "flag, value, needed",
    [
        ("--n", "0", "a whole number, 1 or more"),
        ("--n", "1.5", "a whole number, 1 or more"),
        ("--n", "one", "a whole number, 1 or more"),
        ("--save-every", "-1", "a whole number, 0 or more"),
        ("--beta", "0", "a number, more than 0"),
        ("--beta", "nan", "a number, more than 0"),
        ("--beta", "inf", "a number, more than 0"),
        ("--lr", "-1e-9", "a number, 0 or more"),
        ("--lr", "nan", "a number, 0 or more"),
        ("--mix", "1.0001", "a number, 0 to 1"),
        ("--mix", "-0.1", "a number, 0 to 1"),
        ("--k", "1", "a whole number, 2 or more"),
    ],
)
def test_numbers_out_of_range(flag, value, needed):
    with pytest.raises(
        BadInput, match=f"argument {flag}: '{value}' was given; {needed}, is needed"
    ):
        parser().parse_args([f"{flag}={value}"])


def test_flags_that_were_given():
    assert parser().parse_args([]).given == set()
    given = parser().parse_args(["--save-every=5", "--quiet", "--n", "3"]).given
    assert given == {"save_every", "quiet", "n"}, "a flag counts although it repeats its default"
    with pytest.raises(BadInput, match="--sav"):
        parser().parse_args(["--sav", "3"])


# ---- files and folders, progress


def test_of_two_that_fill_a_folder_the_first_wins(tmp_path):
    """The second throws its own away, and stops nobody."""
    folder = tmp_path / "made"
    with common.whole_folder(folder) as late:
        (late / "by").write_text("late")
        with common.whole_folder(tmp_path / "other") as early:
            (early / "by").write_text("early")
        (tmp_path / "other").rename(folder)
    assert (folder / "by").read_text() == "early"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_folder_that_fails_is_absent(tmp_path):
    with pytest.raises(ZeroDivisionError), common.whole_folder(tmp_path / "made") as aside:
        (aside / "half").write_text("")
        assert not (tmp_path / "made").exists()
        1 / 0
    assert not list(tmp_path.iterdir())


def test_only_an_object_is_read(tmp_path):
    path = tmp_path / "a.json"
    assert common.read_json(path, {}) == {}
    with pytest.raises(BadInput, match="a.json: not readable as JSON"):
        common.read_json(path)
    for text, kind in (("[1]", "list"), ("null", "NoneType"), ('"x"', "str")):
        path.write_text(text)
        with pytest.raises(BadInput, match=f"a.json: holds a {kind}; an object is accepted"):
            common.read_json(path, {})
    path.write_text('{"a": 1}')
    assert common.read_json(path) == common.read_json(path, {}) == {"a": 1}


def test_progress_of_a_run_that_goes_on(monkeypatch, capsys):
    """Rate and rest are those of this process; every 10 seconds a line, and one at the end."""
    clock = [1000.0]
    monkeypatch.setattr(common.time, "time", lambda: clock[0])
    show = common.Progress("step", 100, 50)
    said = []
    for passed, done in ((10, 60), (20, 70), (25, 75), (50, 100)):
        clock[0] = 1000.0 + passed
        show(done, "loss 1  ")
        said.append(capsys.readouterr().err)
    assert said == [
        "",
        "step 70/100  loss 1  1.00/s  30 s left\n",
        "",
        "step 100/100  loss 1  1.00/s  50 s\n",
    ]


def test_what_the_system_refuses_is_one_sentence(tmp_path, capsys):
    """A folder where a file is read: the path and the system's reason, exit status 2.

    Other errors stay tracebacks.
    """
    with pytest.raises(SystemExit, match="2"):
        common.run(lambda: open(tmp_path))
    assert capsys.readouterr().err.endswith(f"{tmp_path}: Is a directory.\n")

    def broken():
        raise OSError("no file has to do with it")

    with pytest.raises(OSError, match="no file"):
        common.run(broken)


def ended(code):
    """Run code in a process of its own -> its exit status and the text on stderr."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr


TOO_LARGE = """
import resource, sys
import torch, common
from formats.weights import write_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
def folder():
    with common.whole_folder("{path}") as aside, open(aside / "part", "wb") as file:
        file.write(bytes(5000))
common.run(lambda: {call})
"""


@pytest.mark.parametrize(
    "call",
    [
        "common.write_text('{path}', 'a' * 5000)",
        "write_tensors({{'a': torch.zeros(2000)}}, '{path}')",
        "folder()",
    ],
)
def test_a_full_disk_is_one_sentence(tmp_path, call):
    """A limit on the size of files stands in for it: the system names no file there either."""
    path = tmp_path / "new"
    status, said = ended(TOO_LARGE.format(path=path, call=call.format(path=path)))
    assert (status, said) == (2, f"-c: {path}: File too large.\n")
    assert not path.exists() or "tensors" in call


def test_other_errors_than_a_disks_keep_their_kind(tmp_path):
    """A refused connection while a folder is filled is not about the folder."""
    with pytest.raises(ConnectionRefusedError) as refused, common.naming(tmp_path):
        raise ConnectionRefusedError(111, "Connection refused")
    assert refused.value.filename is None
    with pytest.raises(OSError) as full, common.naming(tmp_path):
        raise OSError(28, "No space left on device", "other.json")
    assert full.value.filename == "other.json"


# ---- one of several processes

ALONE_OF_TWO = """
import os, sys, time
import common
time.sleep = lambda seconds: None
common.process_ids[:] = [os.getpid(), {other}]
def main():
    sys.stderr = open(os.devnull, "w")
    raise {error}
common.run(main)
"""
NCCL = "RuntimeError('NCCL Error 2: shared memory of the container is too small')"


@pytest.mark.parametrize("error", [NCCL, "OSError('no address')", "BlockingIOError(11, 'busy')"])
def test_no_process_dies_without_its_reason(error):
    """Although stderr of a process above 0 is closed, and although all the others are there."""
    status, said = ended(ALONE_OF_TWO.format(other="os.getpid()", error=error))
    assert status == 1 and "Traceback" in said and error.split("'")[1] in said
    assert "ended, and with it" not in said


def gone_beside_a_run(folder, monkeypatch):
    """The id of a process that has ended, in a run that has its folder of marks here."""
    for process in ("0", "1"):
        (folder / process).mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "0" / "error.json"))
    other = subprocess.Popen([sys.executable, "-c", ""])
    other.wait()
    return other.pid


@pytest.mark.parametrize("torchrun", [True, False])
def test_a_collective_that_lost_a_process_says_which(tmp_path, monkeypatch, torchrun):
    """Also where another launcher than torchrun started the processes."""
    other = gone_beside_a_run(tmp_path, monkeypatch)
    (tmp_path / f"told-{os.getpid()}").touch()
    if not torchrun:
        monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    status, said = ended(ALONE_OF_TWO.format(other=other, error=NCCL))
    assert status == 1
    assert said == (
        "-c: process 1 of 2 ended, and with it the run; of a training run the last checkpoint, "
        "if there is one, is whole, and --resume goes on from it\n"
    )


def test_a_process_that_was_told_to_end_is_no_cause(tmp_path, monkeypatch):
    """torchrun is stopped, and its other process was faster."""
    other = gone_beside_a_run(tmp_path, monkeypatch)
    (tmp_path / f"told-{other}").touch()
    status, said = ended(ALONE_OF_TWO.format(other=other, error=NCCL))
    assert (status, said) == (1, "-c: torchrun ended the run\n")


# ---- what to do about it


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()])
def test_advice_is_what_the_script_can_follow(capsys, error):
    """Checkpoints and LoRA are a trainer's; --save-every 0 writes no checkpoint."""

    def fail():
        raise error

    said = {}
    for trains in (True, False):
        with pytest.raises(SystemExit):
            common.run(fail, trains)
        said[trains] = capsys.readouterr().err
    assert "the last checkpoint, if there is one, is whole, and --resume" in said[True]
    for word in ("--resume", "checkpoint", "--lora-rank", "--grad-accum"):
        assert word not in said[False]
    if isinstance(error, MemoryError):
        for text in said.values():
            assert "--batch-size" in text and "--max-new-tokens" in text
            assert "--quantize nf4" in text


def test_trainers_alone_say_that_they_train():
    scripts = [path for path in ROOT.glob("*.py") if "\n    run(main" in path.read_text()]
    trains = {path.stem for path in scripts if "run(main, trains=True)" in path.read_text()}
    assert trains == set(SCRIPTS) and len(scripts) > len(trains)


IMPORTED = """
import pathlib, time
pathlib.Path({there!r}).touch()
time.sleep(60)
"""


@pytest.mark.parametrize(
    "path", [p for p in ROOT.glob("*.py") if "\n    run(main" in p.read_text()]
)
def test_an_interrupt_during_imports(tmp_path, path):
    """In each script, at the first import that takes long."""
    there = tmp_path / "there"
    for name in ("torch", "numpy"):
        (tmp_path / f"{name}.py").write_text(IMPORTED.format(there=str(there)))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, path],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts background jobs with Ctrl-C ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    begin = time.monotonic()
    while not there.exists():
        assert time.monotonic() - begin < 60 and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, f"\n{path.name}: interrupted\n")


# ---- what a file is not


def test_a_pointer_of_git_lfs(tmp_path):
    """Only such a file is refused; one that is not there is not its business."""
    (tmp_path / "weights").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:7")
    with pytest.raises(BadInput, match="weights: a git-lfs pointer"):
        common.refuse_lfs_pointer(tmp_path / "weights")
    (tmp_path / "text").write_text("version 2")
    common.refuse_lfs_pointer(tmp_path / "text")
    common.refuse_lfs_pointer(tmp_path / "nothing")
