"""The one way through all evaluations: who answers, how questions are asked, how a run goes on.

A script reads its questions, makes a `Record` of each, and asks every contestant all of them:

    parser = Parser(__doc__)
    evaluation.add_flags(parser)                    # --model, --adapter, --endpoint, --out, ...
    args = parser.parse_args()
    evaluation.check_flags(args)                    # --answers (of the script), or who answers
    about = {"questions": evaluation.hashes(args.questions), "max_new_tokens": 16}
    for contestant in evaluation.contestants(args, about):
        path = contestant.path("replies.jsonl")     # None on all processes but the first
        texts = evaluation.answer(contestant, records, 16, path, "POPE")    # one a record, in order
        contestant.release()                        # the next one needs the memory

A contestant is a LLaVA checkpoint (--model, several may be given), one with an adapter (--adapter,
several may be given; `none` is the checkpoint alone), or a server that speaks OpenAI's chat
completions (--endpoint, --endpoint-model). `in_memory` makes one of a model that is loaded. Of
--attributes: the request goes to a model with an adapter, or to one given without --adapter; the
base beside an adapter is asked plainly.

Decoding is greedy unless a temperature is given. Questions are grouped by image: an image is
encoded once, and what its questions begin with runs through the LLM once (`sampling.sample`, given
texts). Groups of similar length make a batch. A question that stands there twice is asked once.

--out is a folder that can be interrupted. Its files:
    evaluation.json     `about` and the contestants' settings: what the answers depend on. The same
                        command goes on where it was stopped; another one is refused by the first
                        setting that differs
    replies.jsonl       a line a question, written as soon as its answer is there: image, prompt
                        (the turns of the dialogue), answer. Image and prompt are the key. A
                        half-written last line is dropped, and said so
    metrics.json        the figures, of one contestant; of several {name: figures}
Of several contestants each has a folder of its own name in it, for its answers.

Scores are computed from answers alone, in the script; comparison.py has intervals, paired
differences, the table and the sheet of answers that differ.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import processes
import training
from common import (
    BadInput,
    Progress,
    claim,
    file_hash,
    flag_name,
    naming,
    one_line,
    positive_int,
    read_json,
    refuse_unwritable,
    write_json,
    write_text,
)
from formats import ratings
from sampling import sample

SETTINGS = "evaluation.json"
SHORT = 32  # tokens of an answer; up to here those about an image grow side by side in one row
OF_A_MODEL = ("template", "image_aspect", "quantize", "attributes", "adapter")


# ---- the command line


def add_flags(parser):
    """Flags that all evaluation scripts have."""
    flag = training.add_model_flags(parser, "give --answers", several=True).add_argument
    flag(
        "--adapter",
        nargs="+",
        action="extend",
        metavar="DIR",
        help="PEFT adapter to put on it, such as a run's adapter/; each is a contestant, and "
        "`none` is --model alone",
    )
    flag = parser.add_argument_group("server").add_argument
    flag(
        "--endpoint",
        metavar="URL",
        help="ask a server (OpenAI's chat completions) up to and with /v1, beside or without "
        "--model",
    )
    flag("--endpoint-model", metavar="NAME", help="the name of the model there")
    flag(
        "--endpoint-key-file",
        metavar="FILE",
        help="file with its key (default: OPENAI_API_KEY, or no key)",
    )
    flag(
        "--endpoint-workers",
        type=positive_int,
        default=8,
        metavar="N",
        help="requests at a time (default %(default)s)",
    )
    group = parser.add_argument_group("evaluation")
    flag = group.add_argument
    ratings.add_attributes_flag(group)
    flag(
        "--images",
        metavar="DIR",
        help="folder of the images (default: that of the first question file)",
    )
    flag(
        "--out",
        metavar="DIR",
        help="folder for answers and metrics.json; the same command goes on in it",
    )
    flag(
        "--batch-size",
        type=positive_int,
        default=64,
        metavar="N",
        help="questions at a time; fewer where memory is short (default %(default)s)",
    )


def check_flags(args, judged=False):
    """Either --answers, or all that a model or a server needs; --out must be ours or empty.

    judged: a judge's replies to --answers are kept in --out, so that this goes on there as well.
    """
    refuse_unwritable(args.out)

    # who is asked
    asks = args.model or args.endpoint
    if args.answers and (asks or args.adapter or args.attributes):
        raise BadInput(
            "--answers scores a file without a model; --model, --adapter, --endpoint and "
            "--attributes do not go with it."
        )
    if not args.answers and not (asks and args.out):
        raise BadInput(
            "--model and --out are needed (or --endpoint and --out), or --answers FILE to score "
            "answers that exist."
        )
    if bool(args.endpoint) != bool(args.endpoint_model):
        raise BadInput("--endpoint and --endpoint-model go together: address and model's name.")
    if not args.model:
        for name in OF_A_MODEL:
            if getattr(args, name):
                raise BadInput(f"{flag_name(name)} is for --model; none is given.")
    if args.adapter and len(args.model) > 1:
        raise BadInput(
            "--adapter with several --model: an adapter belongs to one model; give one --model, or "
            "merged folders."
        )

    # where it is kept
    out = Path(args.out) if args.out else None
    if out and out.exists():
        ours = (judged or not args.answers) and (out / SETTINGS).is_file()
        begun = {f"{SETTINGS}.tmp"}  # of a run killed in its first moment
        if not ours and not begun.issuperset(os.listdir(out)):
            raise BadInput(f"--out {args.out} exists and is not an empty folder; give another.")


def load(args):
    """--model with --adapter, one of each -> (model, processor)."""
    from formats import adapters, checkpoints  # brings transformers; --help does without

    device, dtype = training.device_and_dtype(args)
    given = args.template, args.image_aspect, args.quantize
    template, aspect, quantize = adapters.as_trained(args.adapter, *given)
    model, processor = checkpoints.load(
        args.model, dtype, device, template, aspect, quantize=quantize
    )
    processor.ask = ratings.request(args.attributes) if args.attributes else ""
    if args.adapter:
        adapters.load_adapter(model, args.adapter)
    return model, processor


# ---- who answers


@dataclass
class Contestant:
    """Who answers: a model, loaded when its first question is asked, or a server."""

    name: str
    folder: Path | None = None  # for its answers; None: nothing is written
    settings: dict = field(default_factory=dict)  # what its answers depend on
    load: object = None  # a function () -> (model, processor)
    server: object = None  # or (max_new_tokens, temperature) -> `ask` of judge.py
    batch_size: int = 64
    loaded: tuple | None = None  # (model, processor)
    asked: int = 0  # questions that this process run has asked ...
    seconds: float = 0.0  # ... and how long that took, loading aside

    def path(self, name):
        """A file in its folder; None without one."""
        if self.folder is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def model_and_processor(self):
        """(model, processor), loaded at the first call."""
        if self.loaded is None:
            self.loaded = self.load()
            training.show_prompt(self.loaded[1])
        return self.loaded

    def release(self):
        """Give its memory back."""
        self.loaded = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def in_memory(model, processor, batch_size=64):
    """A contestant of a loaded model; it writes no files of its own."""
    return Contestant("model", loaded=(model, processor), batch_size=batch_size)


def contestants(args, about):
    """The contestants that the flags name, in their order: models, adapters, then the server.

    about: {what: value} of JSON, all that the answers depend on besides who gives them: `hashes`
    of the question files, prompt, bound of an answer. A folder --out that was begun with another
    `about`, or other contestants, is refused.
    """
    from formats import adapters, checkpoints

    processes.start(args.device)
    if args.endpoint and processes.total > 1:
        raise BadInput("--endpoint: one process asks it, --endpoint-workers at a time.")
    of_models = {name: getattr(args, name) for name in OF_A_MODEL[:-1]}
    if args.model:
        device, dtype = training.device_and_dtype(args)
        of_models |= {"dtype": str(dtype).removeprefix("torch."), "device": device.type}

    chosen, labels = [], []  # labels: paths or names that tell them apart
    for model in args.model or ():
        for given in args.adapter or [None]:
            adapter = None if given == "none" else given
            attributes = None if given == "none" else args.attributes  # a base never learned them
            settings = {"model": model, "files": files_of(checkpoints.find_model(model))}
            if adapter:
                files = files_of(adapters.adapter_folder(adapter))
                settings |= {"adapter": adapter, "adapter files": files}
            settings |= of_models | {"attributes": attributes, "batch_size": args.batch_size}
            own = {"model": model, "adapter": adapter, "attributes": attributes}
            one = argparse.Namespace(**vars(args) | own)
            chosen.append(
                Contestant(
                    "",
                    settings=settings,
                    load=lambda one=one: load(one),
                    batch_size=args.batch_size,
                )
            )
            labels.append(adapter or model)
    if args.endpoint:
        settings = {"endpoint": args.endpoint, "endpoint_model": args.endpoint_model}
        chosen.append(Contestant("", settings=settings, server=server_of(args)))
        name = args.endpoint_model
        labels.append(f"{name}-endpoint" if name in labels else name)

    for contestant, name in zip(chosen, names_of(labels)):
        contestant.name = name
        if args.out and processes.number == 0:
            own = [name.replace("/", "-")] if len(chosen) > 1 else []
            contestant.folder = Path(args.out, *own)
    settings = {contestant.name: contestant.settings for contestant in chosen}
    if processes.number == 0:
        begin(Path(args.out), {"about": about, "contestants": settings})
    return chosen


def server_of(args):
    """--endpoint -> what `Contestant.server` is: it makes an `ask` of judge.py."""
    import judge

    key = judge.read_key(args.endpoint_key_file, "--endpoint-key-file")

    def connect(max_new_tokens, temperature):
        """What asks the server; an answer is as long as the evaluation says, and no longer."""
        return judge.ask_endpoint(
            args.endpoint,
            args.endpoint_model,
            key,
            args.endpoint_workers,
            max_tokens=max_new_tokens,
            temperature=temperature,
            flag="--endpoint",
            resume="the same command",
        )

    connect(1, 0)  # a wrong address is refused now
    return connect


def names_of(paths):
    """Names that tell paths apart: their shortest ends that differ, without adapter/ and model/."""
    whole = [Path(path).parts for path in paths]
    bare = [p[:-1] if len(p) > 1 and p[-1] in ("adapter", "model") else p for p in whole]
    for parts in (bare, whole):
        for n in range(1, max(map(len, parts)) + 1):
            ends = ["/".join(p[-n:]).lstrip("/") for p in parts]
            if len(set(ends)) == len(ends):
                return ends
    twice = next(path for path in paths if paths.count(path) > 1)
    raise BadInput(f"{twice} is given twice; each contestant answers once.")


def names_of_files(paths):
    """As `names_of`, without the files' endings where the names still differ."""
    bare = [str(Path(path).with_suffix("")) for path in paths]
    return names_of(bare if len(set(bare)) == len(bare) else paths)


def files_of(folder):
    """A hash of names, sizes and times of the files in a folder of weights; none is read."""
    files = sorted(p for p in Path(folder).iterdir() if p.is_file())
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def hashes(paths):
    """{path: beginning of the sha256 of its content}, for `about`."""
    try:
        return {str(path): file_hash(path)[:16] for path in paths}
    except OSError as error:
        raise BadInput(f"{error.filename}: not readable ({error.strerror}).") from None


def begin(out, settings):
    """Make the folder with its settings, or see that it was begun with the same ones."""
    file = out / SETTINGS
    settings = json.loads(json.dumps(settings))  # as it is read back
    if file.is_file():
        difference = first_difference(read_json(file), settings)
        if difference:
            raise BadInput(f"--out {out}: {difference}; give another folder.")
        print(f"{out}: goes on", file=sys.stderr)
        claim(out)
        return
    out.mkdir(parents=True, exist_ok=True)
    claim(out)
    write_json(file, settings)


def first_difference(old, new, name=""):
    """What the first differing value of two nested dictionaries is; "" if there is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in (*old, *(key for key in new if key not in old)):
            nested = f"{name}, {key}" if name else str(key)
            found = first_difference(old.get(key), new.get(key), nested)
            if found:
                return found
        return ""
    return (
        "" if old == new else f"it was begun with {name}: {old!r:.100}, and here it is {new!r:.100}"
    )


# ---- asking


def answer(contestant, records, max_new_tokens, path=None, label="", temperature=0.0):
    """The contestant's answer to each record -> texts, in the order of the records."""
    rows = replies(contestant, records, max_new_tokens, path, label, (), temperature)
    return [row["answer"] for row in rows]


def replies(contestant, records, max_new_tokens, path=None, label="", watch=(), temperature=0.0):
    """The contestant's reply to each record -> rows {"image", "prompt", "answer"}, in order.

    path: replies.jsonl, to which each reply is added as it comes; a question that has its line is
    not asked again. Without it nothing is kept. label: of the progress line, "" for none.
    watch: texts; a model's row also has "first", the logits of their first tokens where its answer
    begins. At a temperature above 0, what is left of an interrupted run is drawn anew.

    Of several processes, all call this, each answers a share, and all get all rows.
    """
    keys = [key_of(record) for record in records]
    rows = processes.from_first(read_replies(path) if path else {})
    todo = {key: record for key, record in zip(keys, records) if key not in rows}
    if todo:
        ask = ask_server if contestant.server else ask_model
        total, waiting = len(set(keys)), list(todo)
        asked = ask(contestant, list(todo.values()), max_new_tokens, watch, temperature)
        progress = Progress(label, total, total - len(todo))
        started, seen = time.time(), 0
        with open(path, "a", encoding="utf-8") if path else contextlib.nullcontext() as file:
            for part in filter(None, asked):
                for place, reply in part:
                    image, turns = key = waiting[place]
                    rows[key] = {"image": image, "prompt": list(turns), **reply}
                if file:
                    with naming(path):
                        file.writelines(
                            json.dumps(rows[waiting[place]]) + "\n" for place, _ in part
                        )
                        file.flush()
                seen += len(part)
                progress(total - len(todo) + seen)
        contestant.asked += len(todo)
        contestant.seconds += time.time() - started
    empty = sum(not rows[key]["answer"].strip() for key in set(keys))
    if empty:
        print(f"{contestant.name}: {empty} of {len(set(keys))} answers are empty", file=sys.stderr)
    return [rows[key] for key in keys]


def key_of(record):
    """What a reply is kept under: the image's place, None without one, and the dialogue."""
    image = record.image
    if image is not None:
        image = os.path.abspath(image) if isinstance(image, Path) else str(image)
    return image, tuple(record.turns)


def read_replies(path):
    """replies.jsonl -> {key: row}. A half-written last line is cut off the file, and said so."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole, half = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
    if half:
        number = whole.count(b"\n") + 1
        print(
            f"{path}, line {number}: half a line, as a killed run leaves it; "
            "dropped, and its question is asked again",
            file=sys.stderr,
        )
    rows = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line.decode("utf-8"))
            key = row["image"], tuple(row["prompt"])
            if not isinstance(row["answer"], str):
                raise ValueError("`answer` is no text")
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise BadInput(
                f"{path}, line {number}: no reply of ours ({one_line(error)}); a line is an object "
                "with image, prompt and answer."
            ) from None
        rows[key] = row
    if half:
        write_text(path, whole.decode("utf-8"))
    return rows


def ask_server(contestant, records, max_new_tokens, watch, temperature):
    """Replies of a server: [(place, {"answer"})]; without spaces around, as a model's."""
    asked = contestant.server(max_new_tokens, temperature)([(record, None) for record in records])
    for reply in asked:
        yield [(reply.place, {"answer": reply.text.strip()})]


def ask_model(contestant, records, max_new_tokens, watch=(), temperature=0.0):
    """Replies of a model, batch by batch: [(place, {"answer"} and with `watch` {"first"})].

    Of several processes each draws one batch of a round; all get the replies of all.
    """
    model, processor = contestant.model_and_processor()
    examples = [processor.encode(replace(record, answers=())) for record in records]
    batches = by_image(examples, contestant.batch_size)
    of_row = lambda row: examples[row[0]]
    mine = [of_row(row) for batch in processes.share(batches) for row in batch]
    processor.prefetch.expect([example.record.image for example in mine])
    watched = [first_token(processor, records[0], text) for text in watch]
    generator = torch.Generator(model.device).manual_seed(0)

    for start in range(0, len(batches), processes.total):
        replied = []
        for batch in processes.share(batches[start : start + processes.total]):
            prompts, given = zip(
                *(shared_start([examples[i].prompt for i in row]) for row in batch)
            )
            pixel_values, image_sizes = processor.images([of_row(row) for row in batch])
            samples = sample(
                model,
                list(prompts),
                pixel_values,
                1,
                max_new_tokens,
                temperature,
                processor.stop_ids,
                given=list(given),
                generator=generator,
                image_sizes=image_sizes,
                watch=watched,
                in_rows=temperature == 0 and max_new_tokens <= SHORT,
            )
            for row, tokens, first in zip(batch, samples.tokens, samples.first):
                for place, ids, logits in zip(row, tokens, first):
                    reply = {"answer": processor.text(ids)}
                    replied.append((place, reply | ({"first": logits.tolist()} if watch else {})))
        yield sum(processes.gathered(replied), [])


def by_image(examples, batch_size):
    """Examples -> batches of rows; a row is the numbers of the questions about one image.

    A batch has at most `batch_size` questions. Rows of similar length stand together.
    """
    of_image = {}
    for i, example in enumerate(examples):
        alone = ("no image", i)
        of_image.setdefault(example.record.image or alone, []).append(i)
    rows = [
        numbers[start : start + batch_size]
        for numbers in of_image.values()
        for start in range(0, len(numbers), batch_size)
    ]
    rows.sort(key=lambda row: (max(len(examples[i].prompt) for i in row), len(row)))
    batches, size = [], batch_size
    for row in rows:
        if size + len(row) > batch_size:
            batches.append([])
            size = 0
        batches[-1].append(row)
        size += len(row)
    return batches


def shared_start(prompts):
    """Prompts (P,) of one image -> the tokens that all begin with, and [(the rest, [its length])].

    The rest is a given text of `sample`, after which the answer is drawn.
    """
    shortest = min(map(len, prompts))
    same = torch.stack([p[:shortest] == prompts[0][:shortest] for p in prompts]).all(0)
    n = int(same.long().cumprod(0).sum())
    return prompts[0][:n], [(p[n:], [len(p) - n]) for p in prompts]


def first_word(text):
    """The first word of an answer, in lower case and without punctuation; "" without a word."""
    return re.match(r"[\W_]*([^\W_]*)", text)[1].lower()


def first_token(processor, record, text):
    """The token that an answer with this text begins with."""
    return int(processor.encode(replace(record, answers=(text,))).answers[0][0])
