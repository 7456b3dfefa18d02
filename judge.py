"""Answers -> scores: which of a prompt's answers are better. Knows no algorithm.

    score = judge.make(args, device, dtype, records)        # the flags of `add_flags`; records: all that will be asked about
    score(records, answers)                                 # [[float | None, ...], ...]: a list a record, a number an answer

Higher is better, equal numbers are a tie (equal texts always are), None is a verdict that could not be read, or that changed
when the answers changed places. Nothing is guessed: who asks counts ties and None, and makes no pair of them. Four annotators:

    oracle              the toy world's truth, scenes.json beside the folder of pictures: fewest errors, then most true objects
    DIR with reward.json     a reward model, the run folder of reward_model.py; loaded with a base of its own
    DIR_OR_HUB_ID       a LLaVA checkpoint that is shown picture, question and two answers
    endpoint            the same question to a server that speaks OpenAI's chat completions (vLLM, llama.cpp, OpenAI, ...)

The last two compare two answers in both orders, and only a verdict that survives the swap counts. The paper saw no bias of its
34B annotator for a place (Amirloo et al. 2024, appendix D) and did not swap; of another judge one cannot know without. Of more
than two answers all pairs are asked; an answer's score is its wins less its losses over the verdicts that could be read. The
criteria are those of the paper's prompt (table 14); the words are ours, and so is the choice "equal".

A key is read from OPENAI_API_KEY or --judge-key-file and is written nowhere; the server's messages are shown without it.
"""

import base64
import functools
import http.client
import io
import json
import os
import random
import re
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from common import BadInput, positive_int
from data import Record
from facts import evaluation_turn, facts_for, last_tokens, with_evaluation
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
1. The better response has fewer hallucinations. Everything it says must be in the picture: each object, its attributes, \
colours, numbers, places and relations, described as they appear. Where the picture is unclear, leaving a detail out is better \
than guessing.
2. Among equally true responses, the better one answers what was asked: helpful and concise, without needless questions or \
remarks.
The order of the responses and their length mean nothing.

Your first line must be one of "Better: 1", "Better: 2" or "Better: equal". Then give the reason in one sentence."""
VERDICT = re.compile(r"\W*better:\W*(?:response )?(1|2|equal)\W*", re.IGNORECASE)
VERDICT_TOKENS = (
    16  # of a checkpoint's reply: the first line and a little more; the reason is not read
)
RETRY = (408, 409, 429, 500, 502, 503, 504, 529)


class NoAnswer(BadInput):
    """An endpoint that keeps failing, or refuses. What has been trained so far is worth keeping."""


def add_flags(parser):
    """Who judges: the same in every script that asks."""
    group = parser.add_argument_group("annotator")
    group.add_argument(
        "--annotator",
        default="llava-hf/llava-v1.6-34b-hf",
        metavar="oracle|DIR_OR_HUB_ID|endpoint",
        help="who says what is better: the toy world's truth, a run of reward_model.py, a LLaVA checkpoint, "
        "a server (default %(default)s)",
    )
    group.add_argument(
        "--facts", metavar="FILE", help="image_to_caption.json, for a reward model that reads facts"
    )
    group.add_argument(
        "--missing-facts",
        default="refuse",
        choices=("refuse", "count"),
        help="a picture without captions stops the run, or is counted (default %(default)s)",
    )
    group.add_argument(
        "--judge-url", metavar="URL", help="endpoint: up to and with /v1 (default: OPENAI_BASE_URL)"
    )
    group.add_argument("--judge-model", metavar="NAME", help="endpoint: the model's name there")
    group.add_argument(
        "--judge-key-file",
        metavar="FILE",
        help="endpoint: file that holds the key (default: OPENAI_API_KEY; or none)",
    )
    group.add_argument(
        "--judge-workers",
        type=positive_int,
        default=8,
        metavar="N",
        help="endpoint: requests at a time (default %(default)s)",
    )


def make(args, device="cpu", dtype=torch.float32, records=()):
    """The annotator that the flags name -> function (records, answers) -> scores.

    records: `Record`s, here all that will be asked about: facts that a reward model needs and that are missing are told now;
    answers: for each a list of texts. Raises BadInput, and NoAnswer when an endpoint does not work. Sets args.judge_url where it
    came from the environment, and args.facts where it is the toy world's, so that a run folder tells them.
    """
    if args.annotator != "endpoint":
        for flag in ("judge_url", "judge_model", "judge_key_file"):
            if getattr(args, flag):
                raise BadInput(
                    f"--{flag.replace('_', '-')} is for --annotator endpoint; the annotator is {args.annotator}."
                )
    settings = (
        adapters.reward_settings(args.annotator)
        if (Path(args.annotator) / "reward.json").is_file()
        else None
    )
    if settings and settings["facts"] is not None:
        if args.facts is None and args.toy_world:
            args.facts = str(Path(args.toy_world) / "image_to_caption.json")
        if args.facts is None:
            raise BadInput(
                f"--annotator {args.annotator} was trained with facts; --facts FILE is needed."
            )
        facts = facts_for(records, captions(args.facts), args.missing_facts)
        return reward_model(
            args.annotator, {r.prompt_key: known for r, known in zip(records, facts)}, device, dtype
        )
    if args.facts:
        raise BadInput(
            f"--facts is for a reward model that reads them; the annotator is {args.annotator}."
        )
    if settings:
        return reward_model(args.annotator, {}, device, dtype)
    if args.annotator != "endpoint":
        return (
            oracle()
            if args.annotator == "oracle"
            else pairwise(checkpoint(args.annotator, device, dtype))
        )
    args.judge_url = args.judge_url or os.environ.get("OPENAI_BASE_URL")
    if not args.judge_url or not args.judge_model:
        raise BadInput(
            "--annotator endpoint needs --judge-url (or OPENAI_BASE_URL) and --judge-model."
        )
    return pairwise(
        endpoint(
            args.judge_url, args.judge_model, read_key(args.judge_key_file), args.judge_workers
        )
    )


# ---- the toy world's truth


def oracle():
    """Score by the truth: - errors + true objects / 100. No picture has a hundred objects, so errors come first.

    Both are counted by `Oracle.judge`: absent objects, wrong attributes and unreadable clauses are errors; a right short answer
    is one true object, a missing one an error. A description may leave things out, but not everything: one that names no object
    of the picture has as many errors more as it missed, else silence would be the best of answers.
    """
    from lab.oracle import Oracle

    worlds = functools.lru_cache(Oracle)

    def score(records, answers):
        """By the scenes of the pictures."""
        found = []
        for record, texts in zip(records, answers, strict=True):
            folder = (
                record.image.resolve().parent.parent if isinstance(record.image, Path) else None
            )
            if not (folder and (folder / "scenes.json").is_file()):
                raise BadInput(
                    f"{record.where}: the oracle knows pictures of a toy world, with scenes.json beside their folder."
                )
            world, prompt = worlds(folder), record.turns[-1]
            describe = world.question(record.image, prompt)[0] == "describe"
            counts = [world.judge(record.image, prompt, text) for text in texts]
            silent = [n["missed"] if describe and not n["true"] else 0 for n in counts]
            found.append([n["true"] / 100 - n["errors"] - s for n, s in zip(counts, silent)])
        return found

    return score


# ---- a reward model


def reward_model(folder, facts, device="cpu", dtype=torch.float32):
    """Score by a run of reward_model.py. facts: {`Record.prompt_key`: the captions of its picture}, for one that reads them.

    The same answer to the same prompt scores the same every time; one that does not fit into the context cannot be read.
    """
    settings = adapters.reward_settings(folder)
    model, processor = checkpoints.load(
        settings["base_name"], dtype, device, settings["template"], settings["image_aspect"]
    )
    adapters.load_reward(model, folder)

    def read(record, text, turn):
        """The tokens of an answer and its evaluation turn; None where they do not fit."""
        try:
            example = processor.encode(replace(record, answers=(text,)))
            return with_evaluation(processor, example, turn).answers[0]
        except BadInput:
            return None

    @torch.no_grad()
    def score(records, answers):
        """One packed row a prompt, each different text once."""
        rated, texts = [], []
        for record, row in zip(records, answers, strict=True):
            rng, known = (
                random.Random(f"{Path(str(record.image)).name} {record.turns[-1]}"),
                facts.get(record.prompt_key, []),
            )
            turn = evaluation_turn(
                settings["question"], settings["facts"], known, rng, settings["max_facts"]
            )
            tokens = {text: read(record, text, turn) for text in row}
            texts.append([text for text, ids in tokens.items() if ids is not None])
            if texts[-1]:
                rated.append(
                    replace(
                        processor.encode(replace(record, answers=())),
                        answers=[tokens[t] for t in texts[-1]],
                    )
                )
        found = iter(())
        if rated:
            scored = [[torch.ones(len(ids), dtype=torch.bool) for ids in e.answers] for e in rated]
            batch = processor.collate([replace(e, scored=s) for e, s in zip(rated, scored)]).to(
                device
            )
            with model.use("reward"):
                found = iter(model.values(batch, last_tokens(batch), "reward").tolist())
        scores = [{text: next(found) for text in row} for row in texts]
        return [[by_text.get(text) for text in row] for by_text, row in zip(scores, answers)]

    return score


# ---- two answers, both orders


def pairwise(ask):
    """Make a scorer of `ask`: [(record, question)] -> [reply or None]."""
    told = set()

    def score(records, answers):
        """Wins less losses over the pairs of different answers."""
        different = [
            list(dict.fromkeys(texts)) for texts in answers
        ]  # the same text twice is a tie, unasked
        duels = [
            (i, a, b)
            for i, texts in enumerate(different)
            for b in range(len(texts))
            for a in range(b)
        ]
        questions = []
        for i, a, b in duels:
            for first, second in ((a, b), (b, a)):
                questions.append(
                    (records[i], question(records[i], different[i][first], different[i][second]))
                )
        replies = ask(questions) if questions else []
        points = [[[] for _ in texts] for texts in different]
        for n, (i, a, b) in enumerate(duels):
            one, other = (verdict(reply) for reply in replies[2 * n : 2 * n + 2])
            if (
                None not in (one, other) and one == -other
            ):  # the same answer won in both orders, or none in either
                points[i][a].append(one)
                points[i][b].append(other)
                continue
            kind = (
                "cannot be read"
                if None in (one, other)
                else "changes when the answers change places"
            )
            if kind not in told:
                told.add(kind)
                reply = replies[2 * n + (one is not None)]
                print(
                    f"annotator: a verdict that {kind}, counted as unreadable: {reply!r:.200}",
                    file=sys.stderr,
                )
        totals = [[float(sum(p)) if p or len(rows) == 1 else None for p in rows] for rows in points]
        return [
            [total[texts.index(t)] for t in given]
            for total, texts, given in zip(totals, different, answers, strict=True)
        ]

    return score


def question(record, first, second):
    """What the judge is asked, beside the picture."""
    turns = record.turns
    dialogue = (
        "\n".join(f"{('User', 'Assistant')[i % 2]}: {t}" for i, t in enumerate(turns))
        if turns[1:]
        else turns[0]
    )
    return QUESTION.format(dialogue=dialogue, first=first, second=second)


def verdict(reply):
    """1: the first response is better, -1: the second, 0: equal; None unless exactly one line says so."""
    found = [m[1].lower() for line in (reply or "").splitlines() if (m := VERDICT.fullmatch(line))]
    return {"1": 1, "2": -1, "equal": 0}[found[0]] if len(found) == 1 else None


def checkpoint(name, device="cpu", dtype=torch.float32):
    """A LLaVA folder or hub id -> `ask`. Greedy; a question that does not fit into its context has no reply."""
    model, processor = checkpoints.load(name, dtype, device)
    processor.max_length -= VERDICT_TOKENS

    def ask(questions):
        """A reply a question; None where it does not fit."""
        replies, fits = [None] * len(questions), {}
        for i, (record, text) in enumerate(questions):
            query = Record(record.where, record.image, (text,))
            try:
                processor.encode(query)
            except BadInput:
                continue
            fits[i] = query
        said = generate(
            model, processor, list(fits.values()), VERDICT_TOKENS, batch_size=8, label="judge"
        )
        for i, (reply,) in zip(fits, said):
            replies[i] = reply
        return replies

    return ask


# ---- a server


def read_key(file=None):
    """The key from a file, or from OPENAI_API_KEY; "" where there is none. No message shows it."""
    if not file:
        key, where = os.environ.get("OPENAI_API_KEY", ""), "OPENAI_API_KEY"
    else:
        try:
            key, where = Path(file).read_text(encoding="utf-8"), f"--judge-key-file {file}"
        except (OSError, ValueError) as error:
            raise BadInput(
                f"--judge-key-file {file}: not readable ({type(error).__name__})."
            ) from None
        if not key.strip():
            raise BadInput(f"--judge-key-file {file}: holds no key.")
    if not re.fullmatch(
        r"[!-~]*", key.strip()
    ):  # http.client would quote a bad header in its error
        raise BadInput(
            f"{where}: a key is one line of printable characters without spaces; what is there is not."
        )
    return key.strip()


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would send the key along, to any host."""

    def redirect_request(self, *_):
        """Follow none: it would carry the key to another host."""
        return None


def endpoint(url, model, key="", workers=8, timeout=120.0, tries=6, pause=1.0):
    """A server's chat completions -> `ask`.

    `workers` requests at a time, each tried up to `tries` times, with pauses of `pause` seconds, twice that, four times, ...,
    or as long as the server says, a minute at most. Raises NoAnswer after the last try, and at once where the server refuses.
    """
    parts = urllib.parse.urlsplit(url)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or "@" in parts.netloc
        or parts.query
        or parts.fragment
    ):
        raise BadInput(
            "--judge-url: http(s)://host[:port]/path is accepted, without a user, a key or a query in it."
        )
    target, opener, stop = (
        url.rstrip("/") + "/chat/completions",
        urllib.request.build_opener(NoRedirect),
        threading.Event(),
    )
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    options = {"temperature": 0}

    def clean(text):
        """The server's words, short and without the key."""
        text = " ".join(str(text).split())
        return (text.replace(key, "***") if key else text)[:200]

    def once(body):
        """(reply, "", 0), or (None, why, seconds that the server asks to wait); NoAnswer for what another try cannot mend."""
        sent = options | body
        request = urllib.request.Request(target, json.dumps(sent).encode(), headers)
        try:
            with opener.open(request, timeout=timeout) as response:
                found = response.read()
        except urllib.error.HTTPError as error:
            with error:
                try:
                    said = clean(error.read().decode("utf-8", "replace"))
                except (OSError, http.client.HTTPException):
                    said = ""
            if error.code == 400 and "temperature" in said and "temperature" in sent:
                options.pop(
                    "temperature", None
                )  # a server that wants its own, as those of reasoning models
                return None, f"status 400 ({said})", 0
            if error.code not in RETRY:
                raise NoAnswer(
                    f"--judge-url {url}: status {error.code} ({said}); mend it, and --resume goes on from here."
                ) from None
            asked = error.headers.get("Retry-After", "")
            return None, f"status {error.code} ({said})", float(asked) if asked.isdecimal() else 0
        except TimeoutError:
            return None, f"no reply within {timeout:g} seconds", 0
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            reason = getattr(error, "reason", error)
            late = isinstance(reason, TimeoutError)
            return (
                None,
                f"no reply within {timeout:g} seconds"
                if late
                else f"{type(reason).__name__}: {clean(reason)}",
                0,
            )
        try:
            reply = json.loads(found)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return (
                None,
                f"a reply that is no chat completion ({clean(found.decode('utf-8', 'replace'))})",
                0,
            )
        return (reply if isinstance(reply, str) else ""), "", 0  # null: the model declined

    def patient(item):
        """One question, asked again after a wait where that may help."""
        record, text = item
        content = [{"type": "text", "text": text}]
        if record.image is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": data_url(record.image)}})
        body = {"model": model, "messages": [{"role": "user", "content": content}]}
        for n in range(tries):
            reply, why, asked = once(body)
            if reply is not None:
                return reply
            if n + 1 < tries and stop.wait(min(60.0, max(asked, pause * 2**n))):
                break
        raise NoAnswer(
            f"--judge-url {url}: no answer after {tries} tries, at last {why}; --resume goes on from here."
        )

    def ask(questions):
        """A reply a question, `workers` at a time."""
        stop.clear()
        with ThreadPoolExecutor(workers) as pool:
            try:
                return list(pool.map(patient, questions))
            except BaseException:
                stop.set()  # the others need not wait for their next try
                raise

    return ask


def data_url(image):
    """A picture as a JPEG in a URL."""
    file = io.BytesIO()
    open_image(image).save(file, "JPEG", quality=95)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
