"""Bad inputs, made systematically: every reader, picture format, file of a model and of a run, and every flag.

    Outcome.of(attempt)     what the code makes of one: "refused", "accepted", or a fault

A case is (what, attempt). Good files are changed in one place: a value of another kind, a missing key, a text nested
100,000 deep, a cut, a flipped bit, a header that lies. Many a changed file is still good, so that both "refused" and
"accepted" are right; a fault is every other end: an error that is not BadInput, more than 30 seconds, more than 4 GB of
memory, and, for a row of data, an error that ends the whole file. `python tests/trust.py` runs them all.
"""

import contextlib
import copy
import importlib
import io
import json
import random
import resource
import shutil
import signal
import sys
import traceback
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import common
import training
from common import BadInput
from data import Record
from formats import adapters, checkpoints, files, layouts, ratings

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "data"
SECONDS, BYTES = 30, 4 * 2**30  # that an attempt may take

DEEP = "[" * 100_000 + "]" * 100_000
VALUES = (
    None, True, -1, 0, 10**30, 1e308, float("nan"), "", "x", "\ud800", "\0", "../x", "<image>", "a" * 100_000,
    [], {}, [1], [None], ["a", None], [[["a"]]], {"a": 1}, {"type": None}, {"bytes": 1}, "DEEP", "DROP",
)  # fmt: skip


# ---- one attempt


def outcome(attempt):
    """Run a function -> "refused", "accepted", or what went wrong, with the place in our code."""

    def stop(*_):
        raise TimeoutError("a hang")

    used = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + BYTES, used[1]))
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            attempt()
        return "accepted"
    except (BadInput, common.NonFinite) as error:
        return "refused" if len(str(error)) < 5000 else f"a message of {len(str(error))} characters"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        if isinstance(error, OSError) and error.filename is not None:
            return "refused"
        ours = [f for f in traceback.extract_tb(error.__traceback__) if str(ROOT) in f.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        return f"{type(error).__name__} at {where}: {str(error)[:80]!r}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, used)


# ---- changes


def places(value, path=()):
    """The paths to all parts of a JSON value, the whole first."""
    yield path
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, part in inside:
        yield from places(part, (*path, key))


def text_with(value, path, new):
    """JSON of a value in which `new` stands at the end of a path; DROP leaves it out."""
    whole = [copy.deepcopy(value)]
    inner = whole
    for key in (0, *path)[:-1]:
        inner = inner[key]
    last = (0, *path)[-1]
    if new == "DROP":
        del inner[last]
        whole = whole or [{}]
    else:
        inner[last] = new
    return json.dumps(whole[0]).replace('"DEEP"', DEEP)


def json_changes(value):
    """(what, JSON text) of every change in one place."""
    for path in places(value):
        for new in VALUES:
            yield (
                f"{'.'.join(map(str, path)) or 'whole'} = {new!r:.20}",
                text_with(value, path, new),
            )


def byte_changes(content, rng, flips=12):
    """(what, bytes): cut at several places, flipped bits, zeros, 0xff, and more at the end."""
    n = len(content)
    for part in (0, 1, 8, n // 8, n // 2, n - 1):
        yield f"cut at {part} of {n}", content[:part]
    for _ in range(flips):
        place = rng.randrange(min(n, 200) if rng.random() < 0.7 else n)
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        yield f"bit of byte {place}", bytes(changed)
        for filler in (b"\0", b"\xff"):
            yield f"{filler} x 4 at {place}", content[:place] + filler * 4 + content[place + 4 :]
    yield "more at the end", content + b"\0more" * 9


# ---- the cases of each kind


def write_images(folder):
    """Every picture that the good rows name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (
        "lamp.jpg",
        "desk.png",
        "a.png",
        "2317001.jpg",
    ):  # lamp.jpg as refcoco.json says it is
        Image.effect_noise((40, 30), 90).convert("RGB").save(folder / name)


def good_rows():
    """One good row of each file of tests/data that `layouts.read` knows."""
    for path in sorted(HERE.glob("*.json*")):
        try:
            found = layouts.read(path, HERE)
        except BadInput:
            continue
        refused = {r["row"]: r["why"] for r in found.refused}
        no_picture = lambda i: "is not below --images" in refused.get(i, "is not below --images")
        for i, row in files.rows(path):
            if isinstance(row, dict) and no_picture(i):
                yield path.name, row
                break


def rows(folder, rng):
    """A changed row between two good ones must be refused alone."""
    write_images(folder / "images")
    path = folder / "rows.jsonl"
    for name, row in good_rows():
        good = json.dumps(row)

        def attempt(good, text):
            path.write_text(f"{good}\n{text}\n{good}\n", encoding="utf-8", errors="surrogatepass")
            try:
                found = layouts.read(path, folder / "images")
            except BadInput as error:
                raise ValueError(f"one row ends the file: {error}") from None
            if any(r["row"] == 1 for r in found.refused):
                raise BadInput("the row")

        for what, text in json_changes(row):
            if DEEP not in text:  # no JSON for Python, whatever the reader: the line is named
                yield f"{name}: {what}", lambda good=good, text=text: attempt(good, text)


def tables(folder, rng):
    """Files instead of rows: other kinds, cut, and texts nested deep in a cell."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_images(folder / "images")

    def read(name, content):
        (folder / name).write_bytes(content)
        found = layouts.read(folder / name, folder / "images")
        for record in found.records:
            files.open_image(record.image) if record.image else None
        if found.refused and not found.records:
            raise BadInput("all rows")

    for name in ("x.json", "x.jsonl", "x.tsv", "x.json.gz", "x.parquet"):
        for content in (b"", b"\xff\xfe", b"\0" * 99, DEEP.encode(), b'{"a":' * 99_999, b"PAR1" * 9, b"\x1f\x8b" * 9,
                        b"[1,", b"null", b'"a"', b"1e999", b"\xef\xbb\xbf[]", b"\t" * 6, b"version https://git-lfs"):  # fmt: skip
            yield (
                f"{name}: {content[:12]!r}",
                lambda name=name, content=content: read(name, content),
            )
    qa = {"question": "What?", "chosen": "A.", "rejected": "B."}
    cells = [
        json.dumps(qa),
        DEEP,
        "{" * 100_000,
        "x",
        json.dumps(qa | {"chosen": None}),
        DEEP.replace("[", "("),
    ]
    columns = {"image": ["a.png"] * 6, "text": cells, "origin_dataset": ["d"] * 6}
    good = io.BytesIO()
    pq.write_table(pa.table(columns), good)
    yield "deep cells", lambda: read("deep.parquet", good.getvalue())
    columns = {
        "question": cells,
        "chosen": cells,
        "rejected": ["B."] * 6,
        "ref_win_logp": [0.0] * 6,
    }
    deep = io.BytesIO()
    pq.write_table(pa.table(columns), deep)
    yield "deep reprs", lambda: read("repr.parquet", deep.getvalue())
    for what, content in byte_changes(good.getvalue(), rng, 25):
        yield f"parquet: {what}", lambda content=content: read("y.parquet", content)


def other_readers(folder, rng):
    """Captions and ratings."""
    write_images(folder)

    def read(reader, path, text):
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        reader(path)

    known = {"a.png": ["A lamp.", "A desk."]}
    for what, text in json_changes(known):
        yield f"captions: {what}", lambda text=text: read(layouts.captions, folder / "c.json", text)
    rating = dict.fromkeys(ratings.ATTRIBUTES, 3)
    answers = [{"response": "A.", "reason": "-"} | rating, {"response": "B.", "reason": ""}]
    row = {"image": "a.png", "turns": ["What?"], "reference": ["C."], "answers": answers}
    for what, text in json_changes(row):
        yield f"ratings: {what}", lambda text=text: read(ratings.read, folder / "r.jsonl", text)


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "MPO", "DIB", "TGA", "ICO", "AVIF",
           "PCX", "SGI", "EPS", "PDF", "IM", "SPIDER", "MSP", "XBM", "ICNS", "DDS")  # fmt: skip


def pictures(folder, rng):
    """Every format that Pillow writes here, changed byte by byte."""
    picture = Image.effect_noise((40, 30), 90).convert("RGB")

    def read(path, content):
        path.write_bytes(content)
        files.image_size(path)
        files.open_image(path)

    for kind in FORMATS:
        file = io.BytesIO()
        try:
            of_kind = picture.convert(
                "1" if kind in ("MSP", "XBM") else "F" if kind == "SPIDER" else "RGB"
            )
            of_kind.save(file, kind)
        except (KeyError, OSError, ValueError):
            continue
        path = folder / f"a.{kind.lower()}"
        yield f"{kind}: whole", lambda path=path, file=file: read(path, file.getvalue())
        for what, content in byte_changes(file.getvalue(), rng):
            yield f"{kind}: {what}", lambda path=path, content=content: read(path, content)


MODEL_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json", "preprocessor_config.json",
               "processor_config.json", "chat_template.json", "generation_config.json")  # fmt: skip


def use(folder):
    """Load a model and ask it something."""
    model, processor = checkpoints.load(folder)
    example = processor.encode(Record("x, row 0", None, ("What?",), ("A.",)))
    processor.pixels(Image.new("RGB", (30, 40)))
    with torch.no_grad():
        model.answer_log_probs(processor.collate([example]))
    processor.text(example.answers[0])


def model_files(folder, rng, checkpoint):
    """Each JSON file of a checkpoint, changed in one place or as bytes."""
    good = folder / "model"
    shutil.copytree(checkpoint, good)

    def attempt(name, content):
        (good / name).write_bytes(content)
        try:
            use(good)
        finally:
            shutil.copy(Path(checkpoint) / name, good / name)

    for name in MODEL_FILES:
        content = (good / name).read_bytes()
        value = json.loads(content)
        if name == "tokenizer.json":  # a word or a merge a time would be thousands
            for key in ("vocab", "merges"):
                some = list(value["model"][key])[-3:]
                value["model"][key] = (
                    {k: value["model"][key][k] for k in some} if key == "vocab" else some
                )
            value["added_tokens"] = value["added_tokens"][:1]
        for what, text in json_changes(value):
            yield (
                f"{name}: {what}",
                lambda name=name, text=text: attempt(name, text.encode(errors="surrogatepass")),
            )
        for what, changed in byte_changes(content, rng, 4):
            yield f"{name}: {what}", lambda name=name, changed=changed: attempt(name, changed)
    jinja = ("", "{{", "{% for i in range(10**9) %}x{% endfor %}", "{{ 1/0 }}", "{{ ''.__class__.__mro__ }}",
             "{{ messages[9].content }}", "{% include '/etc/passwd' %}", "{{ raise_exception('x') }}", "{{ cycler }}",
             "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
             "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "<image>" * 9, "{{ messages }}", "\ud800")  # fmt: skip
    for text in jinja:
        content = text.encode(errors="surrogatepass")
        yield (
            f"chat_template.jinja: {text[:40]}",
            lambda content=content: attempt("chat_template.jinja", content),
        )


def header_changes(path, rng):
    """(what, bytes) of a safetensors file whose header lies, and of one that is cut or flipped."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]

    def packed(text):
        return len(text).to_bytes(8, "little") + text + rest

    name = next(key for key in header if key != "__metadata__")
    for path in places(header[name]):
        for new in (
            *VALUES,
            "F64",
            "I8",
            "BOOL",
            "F8_E4M3",
            [10**18],
            [0],
            [2**62, 4],
            [0, 2**63],
            [8, 4],
        ):
            yield (
                f"header {path} = {new!r:.20}",
                packed(text_with(header, (name, *path), new).encode(errors="replace")),
            )
    twice = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    yield "a name twice", packed(twice.encode())
    for other in ("__class__", "../../x", "", "a" * 10**5, "\0", "model.\u202e"):
        renamed = {(other if key == name else key): value for key, value in header.items()}
        yield f"the name {other[:10]!r}", packed(json.dumps(renamed).encode())
    for length in (0, 1, size - 1, size + 1, 10**9, 2**63, 2**64 - 1):
        yield f"a header of {length}", length.to_bytes(8, "little") + content[8:]
    yield "a header of brackets", packed(DEEP.encode())
    yield from ((what, changed) for what, changed in byte_changes(content, rng, 6))


def weights(folder, rng, checkpoint, reward):
    """model.safetensors, adapter_model.safetensors and head.safetensors; adapter_config.json, alignment.json, reward.json."""
    good, trained = folder / "model", folder / "reward"
    shutil.copytree(checkpoint, good)
    shutil.copytree(reward, trained)

    def attempt(path, content, use):
        before = path.read_bytes()
        path.write_bytes(content)
        try:
            use()
        finally:
            path.write_bytes(before)

    def reward_model():
        settings = adapters.reward_settings(trained)
        adapters.as_trained(trained / "adapter", settings["template"])
        adapters.load_reward(checkpoints.load(checkpoint)[0], trained)

    for path, use_it in ((good / "model.safetensors", lambda: use(good)),
                         (trained / "adapter/adapter_model.safetensors", reward_model),
                         (trained / "head.safetensors", reward_model)):  # fmt: skip
        for what, content in header_changes(path, rng):
            yield (
                f"{path.name}: {what}",
                lambda path=path, content=content, use_it=use_it: attempt(path, content, use_it),
            )
        for value in (float("nan"), float("inf"), -float("inf")):
            tensors = load_file(path)
            next(iter(tensors.values())).view(-1)[0] = value
            save_file(tensors, folder / "spoiled")
            content = (folder / "spoiled").read_bytes()
            yield (
                f"{path.name}: {value}",
                lambda path=path, content=content, use_it=use_it: attempt(path, content, use_it),
            )
    for path in (
        trained / "adapter/adapter_config.json",
        trained / "adapter/alignment.json",
        trained / "reward.json",
    ):
        for what, text in json_changes(json.loads(path.read_text())):
            content = text.encode(errors="surrogatepass")
            yield (
                f"{path.name}: {what}",
                lambda path=path, content=content: attempt(path, content, reward_model),
            )


def run_folders(folder, rng):
    """args.json, latest, state.json, state.safetensors and metrics.jsonl of a run."""

    class Small(torch.nn.Linear):
        device = torch.device("cpu")

    torch.manual_seed(0)
    model = Small(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    training.save_checkpoint(folder, 1, model, optimizer, state={"mean": 0.5})
    record = {"flags": {"lr": 1.0, "batch_size": 2}, "versions": {"torch": "2"}, "data": {"a": "b"}, "processes": 1,
              "skipped": [{"file": "a", "row": 1, "why": "x"}]}  # fmt: skip
    (folder / "args.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')

    def resume():
        training.check_same_run(common.read_json(folder / "args.json"), record)
        training.load_checkpoint(folder, model, optimizer, {})
        training.Log(folder, 1, 5)

    def attempt(path, content):
        before = path.read_bytes()
        path.write_bytes(content)
        try:
            resume()
        finally:
            path.write_bytes(before)

    step = folder / "checkpoints/step-000001"
    for path in (folder / "args.json", step / "state.json"):
        for what, text in json_changes(json.loads(path.read_text())):
            content = text.encode(errors="surrogatepass")
            yield f"{path.name}: {what}", lambda path=path, content=content: attempt(path, content)
    for what, content in header_changes(step / "state.safetensors", rng):
        yield (
            f"state.safetensors: {what}",
            lambda content=content: attempt(step / "state.safetensors", content),
        )
    for name in (
        "step-9",
        "../x",
        "/etc",
        "",
        "\0",
        "a" * 9999,
        "step-" + "9" * 30,
        "step--1",
        "\ud800",
    ):
        content = name.encode(errors="surrogatepass")
        yield (
            f"latest: {name[:20]!r}",
            lambda content=content: attempt(folder / "checkpoints/latest", content),
        )
    for content in (
        b"\xff\n",
        DEEP.encode() + b"\n",
        b"[]\n",
        b'{"step": "x"}\n',
        b'{"step": null}\n',
        b"half",
        b"\0\n",
    ):
        yield (
            f"metrics.jsonl: {content[:10]}",
            lambda content=content: attempt(folder / "metrics.jsonl", content),
        )


SCRIPTS = (
    "sft dpo mpo mdpo online_dpo bdhs povid reward_model ppo grpo annotate rejection_sampling steerlm sample eval_pope "
    "eval_chair"
).split()
FLAG_VALUES = ("", "-1", "0", "nan", "inf", "-inf", "1e400", "9" * 30, "9" * 9999, "x" * 10**6, "\ud800", "--", "1,2",
               "/proc/new", "/dev/null", "../..", "٣", "0x10", "None", "[]", "\x1b[31m")  # fmt: skip


def flags(folder, rng):
    """Every flag of every script with every hostile value: the command line is read, nothing is loaded."""
    seen = []
    parse_args = common.Parser.parse_args

    def spy(parser, argv=None):
        seen.append(parser)
        return parse_args(parser, argv)

    def parse(module, argv):
        before = sys.argv
        sys.argv = [f"{module.__name__}.py", *argv]
        try:
            module.parse()
        finally:
            sys.argv = before

    for name in SCRIPTS:
        module = importlib.import_module(name)
        common.Parser.parse_args = spy
        try:
            with contextlib.suppress(BadInput):
                parse(module, [])
        finally:
            common.Parser.parse_args = parse_args
        for action in seen.pop()._actions:
            for value in FLAG_VALUES if action.option_strings and action.dest != "help" else ():
                argv = [f"{action.option_strings[0]}={value}"]
                if action.nargs == 0 and value == "":
                    argv = [action.option_strings[0]]
                yield (
                    f"{name} {argv[0][:60]!r}",
                    lambda module=module, argv=argv: parse(module, argv),
                )


def kinds(folder, checkpoint, reward, seed=0):
    """{kind: cases}; each kind has a folder of its own. checkpoint, reward: of a model and of a reward model on it."""

    def inside(name):
        (folder / name).mkdir(parents=True)
        return folder / name, random.Random(f"{seed}/{name}")

    return {
        "rows of data": rows(*inside("rows")),
        "data files": tables(*inside("tables")),
        "captions, ratings": other_readers(*inside("others")),
        "pictures": pictures(*inside("pictures")),
        "model folders": model_files(*inside("models"), checkpoint),
        "weights, adapters": weights(*inside("weights"), checkpoint, reward),
        "run folders": run_folders(*inside("runs")),
        "flags": flags(*inside("flags")),
    }


def count(cases, rng, most=None):
    """Try cases, all or `most` of them -> (refused, accepted, [(what, fault), ...])."""
    cases = list(cases)
    if most is not None and len(cases) > most:
        cases = rng.sample(cases, most)
    refused, accepted, faults = 0, 0, []
    for what, attempt in cases:
        found = outcome(attempt)
        refused += found == "refused"
        accepted += found == "accepted"
        if found not in ("refused", "accepted"):
            faults.append((what, found))
    return refused, accepted, faults


def write_reward(folder, checkpoint):
    """A reward model on the checkpoint, as reward_model.py leaves it."""
    model, _ = checkpoints.load(checkpoint)
    model.prepare(lora_rank=2, projector=False)
    model.add_head("policy")
    settings = {
        "question": "Is it {facts}?",
        "facts": "Facts:",
        "max_facts": 1,
        "template": "vicuna_v1",
    }
    settings |= {"image_aspect": "pad", "held_out": {"a": {"n": 1, "mean": 0.0, "std": 1.0}}}
    adapters.save_reward(model, folder, checkpoint, settings, "policy")
    return folder
