"""What every file may use: errors, the command line, whole files and folders, progress.

No torch here: reading a JSON file or printing `--help` must not load it.
"""

import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

# ---- errors and exit statuses


class BadInput(ValueError):
    """The user gave something that cannot be used; one sentence says what, and where. Status 2."""

    def __str__(self):
        return printable(super().__str__(), 2000)


class Ended(KeyboardInterrupt):
    """A signal asked a run to end, and its step is saved. Status 128 + the signal's number."""

    def __init__(self, number):
        super().__init__()
        self.status = 128 + number


class NonFinite(RuntimeError):
    """A loss or gradient is not a number; the run stops before the optimizer step. Status 1."""


WHOLE = "the last checkpoint, if there is one, is whole"
OUT_OF_MEMORY = {  # does the script train?
    True: "out of memory; lower --batch-size (raise --grad-accum as much) or give "
    f"--gradient-checkpointing: {WHOLE}, and --resume goes on with these; or start again with "
    "--quantize nf4, or a lower --lora-rank or --max-new-tokens",
    False: "out of memory; lower --batch-size, --k or --max-new-tokens, whichever of them the "
    "script has, or give --quantize nf4",
}


def run(main, trains=False):
    """Call main(). An error that the user can mend ends with one sentence, not with a traceback.

    trains: does the script train, with checkpoints in its run folder?
    A script imports this file first, for Ctrl-C during the other imports (`end_imports`).
    Exit status: 2 for BadInput and for files that the system refuses (rights, a full disk), 1 for
    NonFinite and for a lack of memory, 130 after Ctrl-C.
    """
    script, stderr = Path(sys.argv[0]).name, sys.stderr  # of several processes, one alone prints
    if signal.getsignal(signal.SIGINT) is end_imports:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        return
    except BadInput as error:
        text, status = f"{script}: {error}", 2
    except NonFinite as error:
        text, status = f"{script}: {error}", 1
    except KeyboardInterrupt as error:
        goes_on = f"; {WHOLE}, and --resume goes on from it" if trains else ""
        text, status = f"\n{script}: interrupted{goes_on}", getattr(error, "status", 130)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            text, status = f"{script}: {error.filename}: {error.strerror}.", 2
        elif isinstance(error, OSError) and error.errno in DISK_ERRORS:
            text, status = f"{script}: {error.strerror}, while a file was written.", 2
        elif lacks_memory(error):
            text, status = f"{script}: {OUT_OF_MEMORY[trains]} ({one_line(error)}).", 1
        elif not process_ids:
            raise
        else:
            of_collective = re.search("gloo|NCCL", str(error))
            text, status = (of_collective and lost()) or traceback.format_exc(), 1
    end(text, status, stderr)


# ---- one of several processes (processes.py)

process_ids = []  # of all processes of a run that torchrun started, in their order
ending = threading.Lock()  # torchrun may tell a process to end while it says why it ends


def mark_of(name):
    """The path of a mark that the processes of a run see; None if torchrun did not start it.

    torchrun gives every process a folder, which stand beside each other in one of the run's own.
    """
    folder = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(folder).parents[1] / name if folder else None


@functools.cache
def first_to_fail():
    """Is this process the first that asks? It reports the error; alone it is."""
    mark = mark_of("failed")
    try:
        if mark:
            mark.touch(exist_ok=False)
        return True
    except FileExistsError:
        return False


def is_alive(pid):
    """Is there a process of this id?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def lost():
    """The sentence of a process that cannot go on because another is gone; None if none is.

    One that torchrun told to end left a mark before it went: it is not the cause.
    """
    script = Path(sys.argv[0]).name
    for _ in range(20):  # torchrun takes a moment to notice
        gone = {i: mark_of(f"told-{pid}") for i, pid in enumerate(process_ids) if not is_alive(pid)}
        failed = [i for i, told in gone.items() if not (told and told.exists())]
        if failed:
            return (
                f"{script}: process {min(failed)} of {len(process_ids)} ended, and with it the "
                f"run; of a training run {WHOLE}, and --resume goes on from it"
            )
        if gone:
            return f"{script}: torchrun ended the run"
        time.sleep(0.1)


def end(text, status, stderr, patience=600):
    """Print what stopped the process and end it; of several processes, the first to fail prints.

    The others wait: torchrun ends them when the first has ended, and that one may have to save.
    """
    with ending:
        first = first_to_fail()
        if first:
            print(printable(text, LONGEST), file=stderr, flush=True)
        if not process_ids:
            sys.exit(status)
        if first:
            os._exit(status)  # at a normal end a collective may wait for those that are gone
    time.sleep(patience)
    os._exit(status)


def lacks_memory(error):
    """Is it a lack of memory? torch is not loaded: its errors are known by name and words."""
    kind = type(error).__name__
    return kind in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(error)


def one_line(error):
    """The kind and the beginning of another library's error."""
    return f"{type(error).__name__}: {' '.join(str(error)[:2000].split())[:160]}"


LONGEST = 20_000  # characters of a message: a traceback fits


def printable(text, limit):
    """Text of others for the terminal: control characters spelled out, except the ends of lines.

    A file name, a cell or a server's reply may hold codes that move the cursor, rename the window
    or hide what was printed; Unicode's marks of direction do the same to a line. A longer text
    loses its middle, and that is said.
    """
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... ({len(text)} characters) ... {text[-limit // 4 :]}"
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


# C0 without tab and line feed, DEL, C1, halves of surrogate pairs, marks of direction
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


# ---- the command line


class Parser(argparse.ArgumentParser):
    """argparse with whole flag names only; it raises BadInput and notes which flags were given."""

    def __init__(self, description):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_args(self, argv=None):
        """As argparse; `args.given` holds the names of the flags that stand on the command line."""
        argv = sys.argv[1:] if argv is None else argv
        if wrong := [token for token in argv if token.endswith("=--")]:
            self.error(
                f"{wrong[0]:.80}: -- is no value"
            )  # argparse would take it for an empty list
        args = super().parse_args(argv)
        spelled = {token.split("=")[0] for token in argv}
        args.given = {a.dest for a in self._actions if spelled & set(a.option_strings)}
        return args

    def error(self, message):
        """Raise BadInput where argparse would print its usage."""
        raise BadInput(f"{message}; --help lists what is accepted.")


def flag_name(dest):
    """ "batch_size" -> "--batch-size"."""
    return f"--{dest.replace('_', '-')}"


MOST = 10**9  # of anything that is counted: more fits no memory, and no tensor's size


def ranged(kind, accepted, good, most=MOST):
    """A `type=` for argparse: a finite number of this kind for which `good` is true.

    accepted: how the message describes the range. most: bounds the size of a whole number.
    """

    def convert(text):
        """The number that a text spells."""
        try:
            value = kind(text)
            usable = kind is int or math.isfinite(value)
        except ValueError:
            usable = False
        if usable and kind is int and abs(value) > most:
            raise argparse.ArgumentTypeError(f"{text!r:.80} was given; at most {most} is accepted")
        if not usable or not good(value):
            kinds = {int: "a whole number", float: "a number"}
            raise argparse.ArgumentTypeError(
                f"{text!r:.80} was given; {kinds[kind]}, {accepted}, is needed"
            )
        return value

    return convert


positive_int = ranged(int, "1 or more", lambda n: n >= 1)
natural = ranged(int, "0 or more", lambda n: n >= 0)
seed = ranged(int, "positive or negative", lambda n: True, most=2**63 - 1)  # torch takes no more
positive = ranged(float, "more than 0", lambda x: x > 0)
not_negative = ranged(float, "0 or more", lambda x: x >= 0)
finite = ranged(float, "finite", lambda x: True)
fraction = ranged(float, "0 to 1", lambda x: 0 <= x <= 1)


# ---- files and folders: whole or absent


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@contextlib.contextmanager
def naming(path):
    """Inside, a full disk is an OSError that names this file: the system's own names none.

    safetensors raises an error of its own kind, with the system's number in its text.
    """
    try:
        yield
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = getattr(error, "errno", None) or (found and int(found[1]))
        if number not in DISK_ERRORS or getattr(error, "filename", None):
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


def write_text(path, text):
    """Write a file whole or not at all: aside, flushed to disk, renamed."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    try:
        with naming(path), open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)  # half a file, on a disk that may be full
        raise


def write_json(path, value):
    """Write a value as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1))


@contextlib.contextmanager
def refusing(path, what):
    """Inside, what another library cannot make of a stranger's file is BadInput that names it.

    For values of any kind, where a library checks some and stumbles over the others.
    """
    try:
        yield
    except (BadInput, MemoryError):
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        raise BadInput(f"{path}: {what} ({one_line(error)}).") from None


def read_json(path, default=None):
    """The object in a JSON file. Without a file: `default`, if there is one."""
    path = Path(path)
    if default is not None and not path.exists():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        refuse_lfs_pointer(path)
        raise BadInput(f"{path}: not readable as JSON ({one_line(error)}).") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds a {type(value).__name__}; an object is accepted.")
    return value


def refuse_lfs_pointer(path):
    """Refuse a file that a clone without git-lfs left in the place of the real one.

    For files that could not be read: a pointer is three lines of text.
    """
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return
    if is_pointer:
        raise BadInput(
            f"{path}: a git-lfs pointer, not the file itself; "
            "`git lfs pull` in its repository fetches it."
        )


def file_hash(path):
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_to_others(path):
    """Give a file the mode that `open` would have given it: who may read it is the umask's to say.

    A server often runs as another user.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def file_identity(path):
    """What a file is known by without reading it: its place behind links, size and time.

    In the hub's cache the place behind the links contains the hash of the content.
    """
    place = Path(path).resolve()
    stat = place.stat()
    return f"{place} {stat.st_size} {stat.st_mtime_ns}"


@contextlib.contextmanager
def whole_folder(path, flush=True):
    """A folder that appears only when it is complete: filled aside, flushed to disk, renamed.

    Of several processes the first to finish wins. What a killed one left beside it is removed.
    """
    path = Path(path)
    refuse_no_folder(path.parent)
    remove_leftovers(path.parent)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)  # a killed process of the same number left it
    aside.mkdir(parents=True)
    held = hold(aside)
    try:
        with naming(path):
            yield aside
            for file in (*aside.rglob("*"), aside) if flush else ():
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        if not path.exists():
            try:
                os.replace(aside, path)
            except OSError:
                if not path.is_dir():  # else another process was faster by a moment
                    raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if held is not None:
            os.close(held)


def hold(folder):
    """Lock a folder as long as this process lives -> its descriptor; None if another holds it.

    The system lets go of the lock when the process ends, however it ends. Where a file system has
    no locks, nothing is held.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass
    return descriptor


claimed = {}  # of run folders that are locked until this process ends: {(device, inode): descriptor}


def claim(folder):
    """Lock a run folder for this process; refuse one in which another works.

    Two runs in one folder would write over each other.
    """
    status = os.stat(folder)
    key = status.st_dev, status.st_ino
    if key not in claimed:
        descriptor = hold(folder)
        if descriptor is None:
            raise BadInput(
                f"--out {folder}: another process works in this folder; give another one."
            )
        claimed[key] = descriptor


def remove_leftovers(folder):
    """Remove what killed processes left half-filled in a folder: `.NAME.PID.part`.

    The process of `whole_folder` is gone, and no other, of another machine perhaps, holds it.
    """
    for aside in Path(folder).glob(".*.part"):
        pid = re.fullmatch(r"\..+\.([0-9]{1,9})\.part", aside.name)
        if not pid or not aside.is_dir() or is_alive(int(pid[1])):
            continue
        with contextlib.suppress(OSError):  # another process removes it, too
            held = hold(aside)
            if held is not None:
                shutil.rmtree(aside, ignore_errors=True)
                os.close(held)


def refuse_no_folder(path):
    """Refuse a path that is there and is no folder: a file, or a link that leads nowhere."""
    path = Path(path)
    if os.path.lexists(path) and not path.is_dir():
        what = "a link that leads nowhere" if path.is_symlink() and not path.exists() else "a file"
        raise BadInput(f"{path}: {what}; a folder is needed there.")


def refuse_unwritable(out):
    """Refuse a folder of --out that cannot be made or written, before hours of work end in it.

    A folder is made there and removed: rights, a read-only or a full disk, and /proc show in
    nothing less.
    """
    refuse_no_folder(".cache")
    out = Path(out or "runs/new")
    for parent in (out, *out.parents):
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise BadInput(f"--out {out}: {parent} is a file; a folder is accepted.")
            break
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".probe-", dir=parent))
    except OSError as error:
        raise BadInput(
            f"--out {out}: nothing can be written in {parent} ({error.strerror})."
        ) from None


def new_folder(path):
    """The path, if nothing is there; BadInput otherwise."""
    if Path(path).exists():
        raise BadInput(f"{path}: exists already; nothing is written over.")
    return Path(path)


# ---- progress


class Progress:
    """One line on stderr for long work: done of total, values, rate, time left.

    Redrawn in place on a terminal, printed every 10 s elsewhere; never without a label.
    """

    def __init__(self, label, total, done=0):
        self.label, self.total, self.first = label, total, done
        self.begin = self.shown = time.time()

    def __call__(self, done, values=""):
        now, live, last = time.time(), sys.stderr.isatty(), done >= self.total
        if not self.label or (not last and now - self.shown <= (0.2 if live else 10)):
            return
        self.shown = now
        rate = (done - self.first) / max(now - self.begin, 1e-9)
        left = f"{now - self.begin:.0f} s" if last else f"{(self.total - done) / rate:.0f} s left"
        digits = 2 if rate < 10 else 0
        line = f"{self.label} {done}/{self.total}  {values}{rate:.{digits}f}/s  {left}"
        line, end = (f"\r{line:<100}", "\n" if last else "") if live else (line, "\n")
        print(line, end=end, file=sys.stderr, flush=True)


# ---- Ctrl-C before `run`


def end_imports(*_):
    """Ctrl-C while a script imports torch, for seconds: status 130 and no traceback.

    An exception could be caught in what is imported; nothing is begun yet that would need it.
    """
    if first_to_fail():
        print(f"\n{Path(sys.argv[0]).name}: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def is_script():
    """Does a script in this folder run? Those import this file first, and call `run`."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    return main is not None and Path(main).resolve().parent == Path(__file__).resolve().parent


if is_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_imports)
