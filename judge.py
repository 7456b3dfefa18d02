"""Judges answers: scores that say which of a prompt's answers are better. Knows no algorithm.

    score = judge.make(args, device, dtype, records)    # the flags of `add_flags`; all records
    score(records, answers)                             # [[float or None, ...], ...]

The result holds one list a record and one number an answer. Higher is better. Equal numbers are a
tie; equal texts always tie. None is a verdict that could not be read, that a server refused to give
while it gave others, or that changed when the answers changed places. Nothing is guessed: the
caller counts ties and None, and makes no pair of them.

There are four annotators:

    oracle                  the toy world's truth, scenes.json beside the folder of images:
                            fewest errors first, then most true objects
    DIR with reward.json    a reward model: the run folder of reward_model.py. It is loaded with a
                            base model of its own
    DIR_OR_HUB_ID           a LLaVA checkpoint. It reads the image, the question and two answers
    endpoint                the same question to a server that speaks OpenAI's chat completions
                            (vLLM, llama.cpp, OpenAI, ...)

The last two compare two answers in both orders. Only a verdict that survives the swap counts. The
paper did not swap: its 34B annotator showed no bias for a place (Amirloo et al. 2024, appendix D).
Another judge may have one. With more than two answers, all pairs are compared; the score of an
answer is its wins less its losses, over the verdicts that could be read. The criteria are those of
the paper's prompt (table 14). The words are ours, and so is the choice "equal".

The key is read from OPENAI_API_KEY or --judge-key-file. It is never written, and the server's
messages are shown without it.
"""

import base64
import contextlib
import functools
import http.client
import io
import json
import os
import queue
import random
import re
import socket
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import training
from common import MOST, BadInput, flag_name, positive_int, printable
from data import Record
from facts import drawn_facts, evaluation_turn, facts_first, facts_for, with_evaluation
from formats import adapters, checkpoints
from formats.files import open_image
from formats.layouts import captions
from sampling import generate

QUESTION = """You are an expert in comparing what is said of a picture with what the picture shows.

What was asked about the picture above:
{dialogue}

Response 1:
{first}

Response 2:
{second}

Which response is better? Judge in this order:
1. The better response has fewer hallucinations. Everything it says must be in the picture: \
each object, its attributes, colours, numbers, places and relations, described as they appear. \
Where the picture is unclear, leaving a detail out is better than guessing.
2. Among equally true responses, the better one answers what was asked: helpful and concise, \
without needless questions or remarks.
The order of the responses and their length mean nothing.

Your first line must be one of "Better: 1", "Better: 2" or "Better: equal". \
Then give the reason in one sentence."""
VERDICT = re.compile(r"\W*better:\W*(?:response )?(1|2|equal)\W*", re.IGNORECASE)
# A checkpoint writes the first line and a little more; its reason is not read.
VERDICT_TOKENS = 16
AT_A_TIME = 64  # questions to a checkpoint
REPLY_BYTES = 4 * 2**20  # of an endpoint's reply: more is no verdict
REPLY_TOKENS = 1024  # of an endpoint: a verdict and its reason, with room for some thought
RETRY = (408, 409, 429, 500, 502, 503, 504, 529)  # statuses for which another try may help
OF_A_QUESTION = (400, 413, 422)  # statuses that may mean one question: a filter, its length
FIRST = 8  # questions: where the first are all refused, it is no question's fault


class NoAnswer(BadInput):
    """An endpoint keeps failing, or refuses. What has been trained so far is worth keeping."""


@dataclass
class Reply:
    """What a checkpoint or a server wrote to one of the questions that it was asked."""

    place: int  # of the question among them
    text: str | None  # None: the question does not fit into a checkpoint's context
    usage: dict = field(default_factory=dict)  # a server's "requests", "tokens in", "tokens out"
    refused: bool = False  # the server will not answer this question; the text says why


def add_flags(parser, default="llava-hf/llava-v1.6-34b-hf", replies=False):
    """Add the flags that name the annotator.

    default: who it is without the flag; None: nobody. replies: of a script that reads what an
    annotator writes; a reward model writes nothing.
    """
    flag = parser.add_argument_group("annotator").add_argument
    scorer = "" if replies else "a run folder of reward_model.py, "
    flag(
        "--annotator",
        default=default,
        metavar="oracle|DIR_OR_HUB_ID|endpoint",
        help=f"who judges answers: the toy world's truth, {scorer}a LLaVA checkpoint, or a server "
        f"(default: {default or 'nobody'})",
    )
    flag(
        "--annotator-device",
        metavar="DEVICE",
        help=f"of {'' if replies else 'a reward model or '}a checkpoint: cuda:1, say; a 34B in "
        "bfloat16 takes 65 GiB and leaves an 80 GB GPU no room for the policy (default: the "
        "policy's device)",
    )
    if not replies:
        flag(
            "--facts",
            metavar="FILE",
            help="image_to_caption.json, for a reward model that reads facts",
        )
        flag(
            "--missing-facts",
            default="refuse",
            choices=("refuse", "count"),
            help="an image without captions stops the run, or is counted (default %(default)s)",
        )
    flag(
        "--judge-url",
        metavar="URL",
        help="endpoint: its address, up to and with /v1 (default: OPENAI_BASE_URL)",
    )
    flag("--judge-model", metavar="NAME", help="endpoint: the name of the model there")
    flag(
        "--judge-key-file",
        metavar="FILE",
        help="endpoint: file with the key (default: OPENAI_API_KEY, or no key)",
    )
    flag(
        "--judge-workers",
        type=positive_int,
        default=8,
        metavar="N",
        help="endpoint: requests at a time (default %(default)s)",
    )


def beside_the_policy(args, device):
    """The checkpoint that `make` will load on the policy's device, as a list of one or none."""
    elsewhere = args.annotator_device and torch.device(args.annotator_device) != device
    if args.annotator in ("oracle", "endpoint") or elsewhere:
        return []
    if (Path(args.annotator) / "reward.json").is_file():
        return [adapters.reward_settings(args.annotator)["base_name"]]
    return [args.annotator]


def checked(args, device):
    """Refuse flags of another annotator -> the device of this one."""
    if args.annotator != "endpoint":
        for name in ("judge_url", "judge_model", "judge_key_file"):
            if getattr(args, name):
                raise BadInput(
                    f"{flag_name(name)} is for --annotator endpoint; "
                    f"the annotator is {args.annotator}."
                )

    if args.annotator_device:
        if args.annotator in ("oracle", "endpoint"):
            raise BadInput(
                "--annotator-device is for a reward model or a checkpoint; "
                f"the annotator is {args.annotator}."
            )
        return training.device_of(args.annotator_device, "--annotator-device")
    return device


def make(args, device="cpu", dtype=torch.float32, records=()):
    """The annotator that the flags name: a function (records, answers) -> scores.

    records: all `Record`s that will be judged, so that missing facts are reported now.
    answers: a list of texts for each record.

    Raises BadInput, and NoAnswer when an endpoint does not work. Sets args.judge_url if it comes
    from the environment, and args.facts if they are the toy world's, so that the run folder shows
    them.
    """
    device = checked(args, device)

    # a reward model, which may read facts
    is_reward_model = (Path(args.annotator) / "reward.json").is_file()
    settings = adapters.reward_settings(args.annotator) if is_reward_model else None
    reads_facts = is_reward_model and settings["facts"] is not None
    if args.facts and not reads_facts:
        raise BadInput(
            f"--facts is for a reward model that reads them; the annotator is {args.annotator}."
        )
    if is_reward_model:
        facts = known_facts(args, records) if reads_facts else {}
        return score_by_reward_model(args.annotator, facts, device, dtype)

    if args.annotator == "oracle":
        return oracle()
    return pairwise(asker(args, device, dtype, VERDICT_TOKENS))


def asker(args, device, dtype, max_tokens):
    """What asks --annotator, a checkpoint or a server: `ask`, see `ask_endpoint`.

    max_tokens: of a checkpoint's reply; a server's model may think first, and has at least
    REPLY_TOKENS.
    """
    if args.annotator != "endpoint":
        return ask_checkpoint(args.annotator, device, dtype, max_tokens)
    return connector(args)(max_tokens=max(REPLY_TOKENS, max_tokens))


def connector(args):
    """--annotator endpoint -> `ask_endpoint` with the flags' address, model, key and workers."""
    args.judge_url = args.judge_url or os.environ.get("OPENAI_BASE_URL")
    if not args.judge_url or not args.judge_model:
        raise BadInput(
            "--annotator endpoint needs --judge-url (or OPENAI_BASE_URL) and --judge-model."
        )
    key = read_key(args.judge_key_file)
    return functools.partial(
        ask_endpoint, args.judge_url, args.judge_model, key, args.judge_workers
    )


# ---- the toy world's truth


def world_of(record):
    """The Oracle of the world that a record's image belongs to."""
    folder = record.image.resolve().parent.parent if isinstance(record.image, Path) else None
    if folder is None or not (folder / "scenes.json").is_file():
        raise BadInput(
            f"{record.where}: the oracle knows pictures of a toy world, "
            "with scenes.json beside their folder."
        )
    return known_world(folder)


@functools.lru_cache
def known_world(folder):
    """The Oracle of a world's folder."""
    from lab.oracle import Oracle

    return Oracle(folder)


def oracle():
    """A scorer by the truth: true objects / 100 - errors.

    No image has a hundred objects, so that errors decide first. `Oracle.judge` counts both: absent
    objects, wrong attributes and unreadable clauses are errors. A right short answer is one true
    object; a missing one is an error. A description may leave objects out, but not all of them: if
    it names none, every missed object is an error. Otherwise silence would be the best answer.
    """

    def score(records, answers):
        """Scores by the scenes of the images."""
        scores = []
        for record, texts in zip(records, answers, strict=True):
            world = world_of(record)
            prompt = record.turns[-1]
            describe = world.question(record.image, prompt)[0] == "describe"
            counts = [world.judge(record.image, prompt, text) for text in texts]
            silence = [n["missed"] if describe and not n["true"] else 0 for n in counts]
            scores.append([n["true"] / 100 - n["errors"] - s for n, s in zip(counts, silence)])
        return scores

    return score


# ---- a reward model


def known_facts(args, records):
    """{`Record.prompt_key`: captions of its image}, from --facts or the toy world."""
    if args.facts is None and args.toy_world:
        args.facts = str(Path(args.toy_world) / "image_to_caption.json")
    if args.facts is None:
        raise BadInput(
            f"--annotator {args.annotator} was trained with facts; --facts FILE is needed."
        )
    facts = facts_for(records, captions(args.facts), args.missing_facts)
    return {record.prompt_key: known for record, known in zip(records, facts)}


def score_by_reward_model(folder, facts, device="cpu", dtype=torch.float32):
    """A scorer by a run folder of reward_model.py.

    facts: {`Record.prompt_key`: captions of its image}, for a reward model that reads them.

    The same answer to the same prompt always has the same score. An answer that does not fit into
    the context cannot be read.
    """
    settings = adapters.reward_settings(folder)
    model, processor = checkpoints.load(
        settings["base_name"],
        dtype,
        device,
        settings["template"],
        settings["image_aspect"],
        quantize=settings.get("quantize"),
    )
    adapters.load_reward(model, folder)
    training.show_prompt(processor, who="annotator: ")

    def read(record, text, turn):
        """The tokens of an answer and its evaluation turn; None if they do not fit."""
        try:
            example = processor.encode(replace(record, answers=(text,)))
            return with_evaluation(processor, example, turn).answers[0]
        except BadInput:
            return None

    @torch.no_grad()
    def score(records, answers):
        """Scores from one packed row a prompt, which holds each different text once."""
        examples = []  # of the prompts with a readable answer
        readable = []  # of each prompt, the texts that fit
        for record, texts in zip(records, answers, strict=True):
            rng = random.Random(f"{Path(str(record.image)).name} {record.turns[-1]}")
            known = facts.get(record.prompt_key, [])
            most = settings["max_facts"]
            if settings.get("facts_first"):
                record = facts_first(record, drawn_facts(settings["facts"], known, rng, most))
                known = []
            turn = evaluation_turn(settings["question"], settings["facts"], known, rng, most)
            tokens = {text: read(record, text, turn) for text in texts}
            fitting = [text for text, ids in tokens.items() if ids is not None]
            readable.append(fitting)
            if fitting:
                prompt = processor.encode(replace(record, answers=()))
                examples.append(replace(prompt, answers=[tokens[text] for text in fitting]))

        values = iter(())
        if examples:
            every_token = [
                [torch.ones(len(ids), dtype=torch.bool) for ids in example.answers]
                for example in examples
            ]
            examples = [replace(e, scored=scored) for e, scored in zip(examples, every_token)]
            batch = processor.collate(examples).to(device)
            with model.use("reward"):
                values = iter(model.values(batch, batch.last, "reward").tolist())

        scores = [{text: next(values) for text in fitting} for fitting in readable]
        return [[by_text.get(text) for text in texts] for by_text, texts in zip(scores, answers)]

    return score


# ---- two answers, both orders


def pairwise(ask):
    """A scorer that compares answers two by two. ask: see `ask_endpoint`."""
    reported = set()  # the kinds of unreadable verdicts that have been printed

    def score(records, answers):
        """Wins less losses, over the pairs of different answers."""
        different = [list(dict.fromkeys(texts)) for texts in answers]  # equal texts tie, not asked
        pairs = [
            (i, a, b)
            for i, texts in enumerate(different)
            for b in range(len(texts))
            for a in range(b)
        ]

        # ask for each pair twice
        questions = []
        for i, a, b in pairs:
            for first, second in ((a, b), (b, a)):
                text = question(records[i], different[i][first], different[i][second])
                questions.append((records[i], text))
        replies = [None] * len(questions)
        for reply in ask(questions, answered=False):
            replies[reply.place] = reply.text

        # count the verdicts that agree: the same answer won in both orders, or neither did
        points = [[[] for _ in texts] for texts in different]
        for n, (i, a, b) in enumerate(pairs):
            of_a, of_b = (verdict(reply) for reply in replies[2 * n : 2 * n + 2])
            readable = of_a is not None and of_b is not None
            if readable and of_a == -of_b:
                points[i][a].append(of_a)
                points[i][b].append(of_b)
                continue
            kind = "changes when the answers change places" if readable else "cannot be read"
            if kind not in reported:
                reported.add(kind)
                reply = replies[2 * n + (of_a is not None)]
                print(
                    f"annotator: a verdict that {kind}, counted as unreadable: {reply!r:.200}",
                    file=sys.stderr,
                )

        # an only text has 0, a text without any verdict None
        totals = [
            [float(sum(wins)) if wins or len(texts) == 1 else None for wins in of_prompt]
            for texts, of_prompt in zip(different, points)
        ]
        return [
            [total[texts.index(text)] for text in given]
            for total, texts, given in zip(totals, different, answers, strict=True)
        ]

    return score


def question(record, first, second):
    """The text that the judge reads with the image."""
    turns = record.turns
    dialogue = turns[0]
    if len(turns) > 1:
        speakers = ("User", "Assistant")
        dialogue = "\n".join(f"{speakers[i % 2]}: {turn}" for i, turn in enumerate(turns))
    return QUESTION.format(dialogue=dialogue, first=first, second=second)


def verdict(reply):
    """1: the first response is better; -1: the second; 0: equal.

    None unless exactly one line of the reply says so.
    """
    lines = (reply or "").splitlines()
    verdicts = [match[1].lower() for line in lines if (match := VERDICT.fullmatch(line))]
    return {"1": 1, "2": -1, "equal": 0}[verdicts[0]] if len(verdicts) == 1 else None


def ask_checkpoint(name, device="cpu", dtype=torch.float32, max_tokens=VERDICT_TOKENS):
    """A LLaVA folder or hub id -> `ask`. Decoding is greedy, up to `max_tokens`."""
    model, processor = checkpoints.load(name, dtype, device)
    processor.max_length -= max_tokens
    training.show_prompt(processor, who="annotator: ")

    def replies_to(questions):
        """One text a question; None for a question that does not fit into the context."""
        fitting = {}  # number of the question -> Record
        for i, (record, text) in enumerate(questions):
            query = Record(record.where, record.image, (text,))
            try:
                processor.encode(query)
            except BadInput:
                continue
            fitting[i] = query

        texts = generate(
            model, processor, list(fitting.values()), max_tokens, batch_size=8, label="judge"
        )
        replies = [None] * len(questions)
        for i, (reply,) in zip(fitting, texts):
            replies[i] = reply
        return replies

    def ask(questions, answered=None):
        """Replies in order, some at a time, so that a caller can keep what there is."""
        for start in range(0, len(questions), AT_A_TIME):
            texts = replies_to(questions[start : start + AT_A_TIME])
            yield from (Reply(place, text) for place, text in enumerate(texts, start))

    return ask


# ---- a server


def read_key(file=None, flag="--judge-key-file"):
    """The key in a file, else that of OPENAI_API_KEY; "" without any. No message shows it."""
    if file:
        source = f"{flag} {file}"
        try:
            key = Path(file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BadInput(f"{source}: not readable ({type(error).__name__}).") from None
        if not key.strip():
            raise BadInput(f"{source}: holds no key.")
    else:
        source = "OPENAI_API_KEY"
        key = os.environ.get("OPENAI_API_KEY", "")

    # http.client would quote a bad header in its error
    if not re.fullmatch(r"[!-~]*", key.strip()):
        raise BadInput(
            f"{source}: a key is one line of printable characters without spaces; "
            "what is there is not."
        )
    return key.strip()


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Takes a redirect as an error: urllib would send the key along, to any host."""

    def redirect_request(self, *_):
        """Follow none."""
        return None


class Watched:
    """A handler of urllib that notes its socket, so that another thread can end a slow reply."""

    def __init__(self, sockets):
        super().__init__()
        self.sockets = sockets

    def do_open(self, kind, request, **how):
        """As urllib's, with a connection that notes its socket."""
        sockets = self.sockets

        class Connection(kind):
            """A connection that notes its socket."""

            def connect(self):
                """Connect, and note it."""
                super().connect()
                sockets.append(self.sock)

        return super().do_open(Connection, request, **how)


class WatchedHTTP(Watched, urllib.request.HTTPHandler):
    """http://"""


class WatchedHTTPS(Watched, urllib.request.HTTPSHandler):
    """https://"""


@contextlib.contextmanager
def deadline(seconds):
    """Inside, the connections of the opener that it gives are cut when so much time has passed.

    -> (opener, an event that is set when they are). A socket's own limit is for each read: a server
    that sends a byte a second would never reach it.
    """
    sockets, late = [], threading.Event()

    def cut():
        """Too late: end every connection."""
        late.set()
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        watched = WatchedHTTP(sockets), WatchedHTTPS(sockets)
        yield urllib.request.build_opener(NoRedirect, *watched), late
    finally:
        timer.cancel()


def bounded(response):
    """The body of a reply of at most REPLY_BYTES."""
    content = response.read(REPLY_BYTES + 1)
    if len(content) > REPLY_BYTES:
        raise OSError(f"a reply of more than {REPLY_BYTES:,} bytes")
    return content


def ask_endpoint(
    url,
    model,
    key="",
    workers=8,
    timeout=120.0,
    tries=6,
    pause=1.0,
    max_tokens=REPLY_TOKENS,
    temperature=0,
    flag="--judge-url",
    resume="--resume",
    served=None,
):
    """A server's chat completions -> `ask`, a function (items, answered=None) -> iterator.

    It gives a `Reply` to each item as it arrives, in any order, so that a caller can keep it at
    once. An item is (record, text): the record's image and the text, or with None for the text the
    record's own dialogue, turn by turn.

    max_tokens bounds a reply: a model that rambles is paid for. flag, resume: how messages name the
    address and the way to go on. served: a set that gets the names by which the server calls its
    model; one name may be another model tomorrow.

    `workers` requests run at a time. Each is tried up to `tries` times. The pauses between tries
    are `pause` seconds, twice that, four times that, ..., or as long as the server says; a minute
    at most. Raises NoAnswer after the last try, and at once if the server refuses; the replies to
    the requests that are on their way come before it, as they do before a KeyboardInterrupt.

    answered: has this server answered other questions of the run? If it has, or once it does, a
    question that it refuses with a status of OF_A_QUESTION is one it cannot take: the `Reply` is
    marked as refused. Before the first answer such replies are held back; FIRST of them, or an end
    without an answer, mean a wrong flag and raise NoAnswer. None: every refusal does.

    A reply must be whole within `timeout` seconds, and have at most REPLY_BYTES.
    """
    parts = urllib.parse.urlsplit(url)
    is_http = parts.scheme in ("http", "https") and parts.hostname
    if not is_http or "@" in parts.netloc or parts.query or parts.fragment:
        raise BadInput(
            f"{flag}: http(s)://host[:port]/path is accepted, without a user, a key or a "
            "query in it."
        )
    target = url.rstrip("/") + "/chat/completions"
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    options = {"temperature": temperature, "max_tokens": max_tokens}
    stop = threading.Event()
    has_answered = False

    def clean(text):
        """The server's words, short and without the key."""
        text = " ".join(str(text)[:10_000].split())
        return printable((text.replace(key, "***") if key else text)[:200], 200)

    def once(body):
        """One request -> ((text, usage, refused), "", 0), or (None, why, seconds to wait).

        The seconds are those that the server asks for. Raises NoAnswer for an error that another
        try cannot mend.
        """
        body = options | body
        request = urllib.request.Request(target, json.dumps(body).encode(), headers)
        with deadline(timeout) as (opener, late):
            try:
                with opener.open(request, timeout=timeout) as response:
                    content = bounded(response)
            except urllib.error.HTTPError as error:
                return refused(error, body)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = getattr(error, "reason", error)  # URLError is an OSError
                if late.is_set() or isinstance(reason, TimeoutError):
                    return None, f"no reply within {timeout:g} seconds", 0
                return None, f"{type(reason).__name__}: {clean(reason)}", 0
            if late.is_set():
                return None, f"no reply within {timeout:g} seconds", 0

        try:
            whole = json.loads(content)
            text, counts = whole["choices"][0]["message"]["content"], whole.get("usage")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            shown = clean(content[:10_000].decode("utf-8", "replace"))
            return None, f"a reply that is no chat completion ({shown})", 0
        if served is not None and isinstance(whole.get("model"), str):
            served.add(printable(whole["model"], 200))
        text = text if isinstance(text, str) else ""  # null: the model declined
        return (text, usage_of(counts), False), "", 0

    def usage_of(tokens):
        """What the server says that one reply cost; not every server says it."""
        tokens = tokens if isinstance(tokens, dict) else {}
        usage = {"requests": 1}
        for name, key in (("tokens in", "prompt_tokens"), ("tokens out", "completion_tokens")):
            if type(tokens.get(key)) is int and 0 <= tokens[key] <= MOST:
                usage[name] = tokens[key]
        return usage

    def refusal(status):
        """The error of a refusal that ends the run."""
        return NoAnswer(f"{flag} {url}: {status}; mend it, and {resume} goes on from here.")

    def refused(error, body):
        """What `once` returns or raises for a status other than 200."""
        with error:
            try:
                message = clean(bounded(error).decode("utf-8", "replace"))
            except (OSError, http.client.HTTPException, ValueError):
                message = ""
        status = f"status {error.code} ({message})"

        # some servers, such as those of reasoning models, accept no temperature but their own, and
        # have another name for the bound
        if error.code == 400 and "temperature" in message and "temperature" in body:
            options.pop("temperature", None)
            return None, status, 0
        if error.code == 400 and "max_completion_tokens" in message and "max_tokens" in body:
            options.pop("max_tokens", None)
            options["max_completion_tokens"] = max_tokens
            return None, status, 0
        if error.code in OF_A_QUESTION:
            return (status, {}, True), "", 0
        if error.code not in RETRY:
            raise refusal(status) from None
        wait = error.headers.get("Retry-After", "")
        return None, status, float(wait[:9]) if wait.isdecimal() else 0

    def patient(place, item):
        """The Reply to one question, asked again after a pause if that may help."""
        record, text = item
        turns = record.turns if text is None else (text,)
        content = [{"type": "text", "text": turns[0]}]
        if record.image is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": data_url(record.image)}})
        messages = [{"role": "user", "content": content}]
        for i, turn in enumerate(turns[1:], 1):
            messages.append({"role": ("user", "assistant")[i % 2], "content": turn})
        body = {"model": model, "messages": messages}

        for n in range(tries):
            given, why, wait = once(body)
            if given is not None:
                return Reply(place, *given)
            if n + 1 < tries and stop.wait(min(60.0, max(wait, pause * 2**n))):
                break
        raise NoAnswer(
            f"{flag} {url}: no answer after {tries} tries, at last {why}; "
            f"{resume} goes on from here."
        )

    def ask(items, answered=None):
        """Replies as they arrive, `workers` at a time."""
        nonlocal has_answered
        has_answered |= bool(answered)
        stop.clear()
        held, failure = [], None  # held: refused, before any answer
        arrived = queue.SimpleQueue()

        with ThreadPoolExecutor(workers) as pool:
            asked = [pool.submit(patient, place, item) for place, item in enumerate(items)]
            for one in asked:
                one.add_done_callback(arrived.put)

            def end():
                """Ask no more; what is on its way still comes, and waits for no further try."""
                stop.set()
                for one in asked:
                    one.cancel()

            try:
                left = len(asked)
                while left:
                    try:
                        one = arrived.get()
                    except KeyboardInterrupt as error:
                        if failure:
                            raise
                        failure = error
                        end()
                        continue
                    left -= 1
                    if one.cancelled():
                        continue
                    error = one.exception()
                    if not error:
                        reply = one.result()
                        has_answered |= not reply.refused
                        if not reply.refused or (has_answered and answered is not None):
                            yield from (*held, reply)
                            held.clear()
                        else:
                            held.append(reply)
                            if answered is None or len(held) == FIRST:
                                error = refusal(reply.text)
                    if error and not failure:
                        failure = error
                        end()
            finally:
                end()
        if failure or held:
            raise failure or refusal(held[0].text)

    return ask


def data_url(image):
    """An image as a JPEG in a URL."""
    file = io.BytesIO()
    open_image(image).save(file, "JPEG", quality=95)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
