"""online_dpo.py: which answers make a pair, what a step does with them, and that it learns what the annotator likes."""

import json
import math
import random
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import common
import dpo
import judge
import online_dpo
import sampling
from common import BadInput
from data import Processor, Record
from formats import dataset

ADAPTER = "adapter/adapter_model.safetensors"
KEY = "sk-secret-0123456789"


@pytest.mark.parametrize(
    "scores, want",
    [
        ([1, 2], (1, 0)),
        ([2.0, -1.5], (0, 1)),
        ([1, 1], "ties"),
        ([None, 1], "unreadable"),
        ([None, None], "unreadable"),
        ([0, 3, 3, -1], (1, 3)),
        ([None, 3, 0], (1, 2)),
        ([None, 3, 3], "ties"),
        ([None, 3, None], "unreadable"),
    ],
)
def test_best_and_worst(scores, want):
    assert online_dpo.best_and_worst(scores) == want


# ---- the script


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A POVID file of six rows with five prompts, and a toy world's truth about its pictures."""
    folder = tmp_path_factory.mktemp("online")
    (folder / "images").mkdir()
    rows, scenes = [], {}
    for i in range(6):
        Image.frombytes("RGB", (28, 28), random.Random(i).randbytes(28 * 28 * 3)).save(
            folder / "images" / f"{i}.png"
        )
        scenes[f"{i}.png"] = {"kind": "kitchen", "things": []}
        said = ("No, there is no dog.", "A red cup is on the table. Two bananas are in a bowl.")[
            i % 2
        ]
        turns = lambda text: [
            {"from": "human", "value": "<image>\nIs there a dog?"},
            {"from": "gpt", "value": text},
        ]
        row = {"id": str(i), "image": f"{min(i, 4)}.png", "conversations": turns(said)}
        rows.append(row | {"rejected_conversations": turns(f"A dog {i}.")})
    (folder / "povid.json").write_text(json.dumps(rows))
    (folder / "scenes.json").write_text(json.dumps(scenes))
    return folder


@pytest.fixture
def run(monkeypatch, capsys, files, checkpoint):
    """A function that runs a script in the folder -> (metrics, stderr). annotator: a function of two lists, or None."""

    def call(out, *args, annotator=None, script=online_dpo, status=0):
        monkeypatch.chdir(files)
        command = [
            "--model",
            checkpoint,
            "--data",
            "povid.json",
            "--images",
            "images",
            "--lora-rank",
            4,
            "--lr",
            "1e-3",
            "--projector-lr",
            "1e-4",
            "--batch-size",
            2,
            "--out",
            out,
        ]
        if script is online_dpo:
            command += ["--max-new-tokens", 6]
        if annotator:
            command += ["--annotator", "oracle"]
            monkeypatch.setattr(judge, "make", lambda *_: annotator)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, [*command, *args])])
        try:
            common.run(script.main)
        except SystemExit as end:
            assert end.code == status
        else:
            assert status == 0
        path = files / out / "metrics.jsonl"
        return [
            json.loads(line) for line in path.read_text().splitlines()
        ] if path.exists() else [], capsys.readouterr().err

    return call


def by(value):
    """An annotator from a function of one answer."""
    return lambda records, answers: [[value(text) for text in texts] for texts in answers]


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--loss", "ipo"],
        ["--grad-accum", 2],
        ["--lora-rank", 0],
        ["--k", 4],
        ["--gradient-checkpointing"],
    ],
)
def test_step_0(run, files, more):
    name = "start" + "".join(map(str, more))
    lines, err = run(name, "--steps", 3, *more, annotator=by(lambda text: sum(map(ord, text)) % 3))
    assert len(lines) == 3 and len({tuple(line) for line in lines}) == 1
    assert "1 rows repeat another row" in err
    for line in lines:
        parts = [line[f"annotator/{name}"] for name in ("pairs", "ties", "unreadable")]
        assert sum(parts) == pytest.approx(1) and parts[2] == 0
        assert line["step_seconds"] == pytest.approx(
            sum(line[f"seconds/{name}"] for name in ("sample", "score", "train"))
        )
        assert 1 <= line["response_length"] <= 6 and 0 <= line["annotator/score"] <= 2
    start = {"dpo": math.log(2), "ipo": (1 / (2 * 0.9)) ** 2}["ipo" if "ipo" in more else "dpo"]
    assert lines[0]["loss"] == pytest.approx(start * lines[0]["annotator/pairs"], abs=1e-5)
    assert lines[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5) == lines[0]["rewards/rejected"]
    assert (files / name / ("model" if 0 in more else "adapter")).is_dir()
    assert json.loads((files / name / "summary.json").read_text())["seconds"].keys() >= {
        "sample",
        "score",
        "train",
    }


def test_all_offline_is_dpo(run, files):
    """--mix 1: no answer is drawn, no annotator asked; every figure and every weight are those of dpo.py."""

    def never(records, answers):
        raise AssertionError("asked")

    more = ("--epochs", 3, "--grad-accum", 2, "--beta", 0.5)
    want, _ = run("offline", *more, script=dpo)
    got, _ = run("mixed", "--mix", 1, *more, annotator=never)
    assert len(got) == len(want) == 5  # the last step is half a batch
    for a, b in zip(got, want):
        for name, value in b.items():
            if not name.endswith("seconds") and not (
                b["step"] == 0 and name == "rewards/accuracies"
            ):  # 0 up to rounding
                assert a[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
        assert a["annotator/pairs"] == 1 and a["response_length"] == 0
    a, b = load_file(files / "mixed" / ADAPTER), load_file(files / "offline" / ADAPTER)
    assert a.keys() == b.keys() and got[-1]["loss"] < 0.69
    assert torch.cat([(a[k] - b[k]).abs().flatten() for k in a]).median() < 1e-6


def test_half_offline(run):
    """alpha is drawn for each example: both kinds of pairs meet in one step. Bounds of five standard deviations."""
    drawn = []

    def count(records, answers):
        drawn.append(len(records))
        return [[0, 0] for _ in records]  # all ties: pairs are those of the data

    lines, _ = run("half", "--mix", 0.5, "--steps", 20, "--lr", 0, annotator=count)
    assert sum(drawn) == pytest.approx(20, abs=5 * math.sqrt(40 / 4)) and {1, 2} == set(drawn)
    assert sum(line["annotator/ties"] for line in lines) * 2 == pytest.approx(sum(drawn))
    assert sum(line["annotator/pairs"] for line in lines) * 2 == pytest.approx(40 - sum(drawn))


@pytest.mark.parametrize("value, name", [(0.0, "ties"), (None, "unreadable")])
def test_no_pair_no_gradient(run, files, value, name):
    lines, _ = run(name, "--steps", 2, annotator=by(lambda text: value))
    for line in lines:
        assert (
            line[f"annotator/{name}"] == 1
            and line["loss"] == line["grad_norm"] == line["annotator/pairs"] == 0
        )
    adapter = load_file(files / name / ADAPTER)
    assert all((t == 0).all() for k, t in adapter.items() if "lora_B" in k)


def test_the_pair_is_the_best_and_the_worst_as_drawn(run, monkeypatch):
    """Tokens go into the loss as they were drawn, best first, and the prompt's weight is 1 / prompts."""
    seen, drawn, collate, sample = [], [], Processor.collate, sampling.answers_to
    monkeypatch.setattr(
        Processor,
        "collate",
        lambda self, pairs: seen.append((self, pairs)) or collate(self, pairs),
    )
    monkeypatch.setattr(
        sampling, "answers_to", lambda *args: drawn.append(sample(*args)) or drawn[-1]
    )
    value = lambda text: sum(map(ord, text))
    run("tokens", "--steps", 2, "--k", 3, annotator=by(value))
    for (processor, pairs), samples in zip(seen, drawn, strict=True):
        answers = samples.tokens
        assert len(pairs) == len(answers) == 2
        for pair, row in zip(pairs, answers):
            ranked = sorted(row, key=lambda tokens: value(processor.text(tokens)))
            assert torch.equal(pair.answers[0], ranked[-1]) and torch.equal(
                pair.answers[1], ranked[0]
            )
            assert [len(s) for s in pair.scored] == [len(a) for a in pair.answers] and all(
                s.all() for s in pair.scored
            )


@torch.no_grad()
def test_sampling_is_seeded_and_leaves_the_generators_alone(llava, files):
    model, processor = llava
    examples = [
        processor.encode(Record("row", files / "images" / f"{i}.png", ("Is there a dog?",)))
        for i in range(2)
    ]
    state = torch.get_rng_state()
    draw = lambda seed: [
        [t.tolist() for t in row]
        for row in sampling.answers_to(model, processor, examples, 2, 6, seed).tokens
    ]
    assert draw("0/1/0") == draw("0/1/0") != draw("0/2/0")
    assert torch.equal(state, torch.get_rng_state())


def test_prompts_without_room_for_an_answer(run, llava, capsys):
    """Refused before the run, or skipped and listed: no answer is cut shorter than --max-new-tokens says."""
    lines, err = run("room", "--steps", 1, "--max-new-tokens", 5000, annotator=by(len), status=2)
    assert "leaves no room for --max-new-tokens 5000" in err and not lines
    _, processor = llava
    ask = lambda i, text: processor.encode(
        Record(f"f.json, row {i}, completions 1 > 2", None, (text,))
    )
    examples = [ask(0, "Why?"), ask(1, "Why? " * 20), ask(2, "Why?")]
    processor.max_length = len(examples[0].prompt) + 6
    rows = dataset.Rows([], skip_bad_rows=True)
    assert rows.with_room(processor, examples, 6) == [examples[0], examples[2]]
    why = f"the prompt leaves no room for --max-new-tokens 6; the limit is {processor.max_length}"
    assert rows.skipped == [{"file": "f.json", "row": 1, "why": f"completions 1 > 2: {why} tokens"}]
    assert "1 of 3 rows are skipped" in capsys.readouterr().err
    with pytest.raises(
        BadInput,
        match=r"f.json, row 0: .* leaves no room for --max-new-tokens 7; .*\(3 of 3 rows",
    ):
        rows.with_room(processor, examples, 7)


def test_resumed_is_uninterrupted(run, files):
    flags = ("--steps", 4, "--save-every", 2, "--mix", 0.3, "--grad-accum", 2)
    like = by(lambda text: sum(map(ord, text)) % 5 or None)
    whole, _ = run("straight", *flags, annotator=like)
    run("again", *flags, annotator=like)
    for file in (files / "again" / "checkpoints" / "step-000004").iterdir():
        file.unlink()
    (files / "again" / "checkpoints" / "step-000004").rmdir()
    (files / "again" / "checkpoints" / "latest").write_text("step-000002")
    again, _ = run("again", *flags, "--resume", annotator=like)
    timeless = lambda lines: [
        {k: v for k, v in line.items() if "seconds" not in k} for line in lines
    ]
    assert timeless(again) == timeless(whole)
    assert (files / "again" / ADAPTER).read_bytes() == (files / "straight" / ADAPTER).read_bytes()


def test_annotator_that_fails_costs_no_step(run, files):
    """The run stops with a sentence, keeps the steps that were paid for, and goes on as if nothing had happened."""
    like, calls = by(lambda text: sum(map(ord, text)) % 5), []

    def fails(records, answers):
        calls.append(1)
        if len(calls) == 6:  # the second half of step 2
            raise judge.NoAnswer("the server is down.")
        return like(records, answers)

    flags = ("--steps", 4, "--save-every", 0, "--grad-accum", 2, "--sample-batch-size", 2)
    run("paid", *flags, annotator=like)
    lines, err = run("failed", *flags, annotator=fails, status=2)
    assert len(lines) == 2 and "the server is down." in err and "Traceback" not in err
    folder = files / "failed" / "checkpoints"
    assert (folder / "latest").read_text() == "step-000002", "the state before the failed step"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-000002"]
    asked = []
    again = lambda *texts: asked.append(1) or like(*texts)
    lines, _ = run("failed", *flags, "--resume", annotator=again)
    assert len(asked) == 4, "two steps of two: nothing that was paid for is asked again"
    assert (
        len(lines) == 4
        and (files / "failed" / ADAPTER).read_bytes() == (files / "paid" / ADAPTER).read_bytes()
    )


def test_annotator_that_fails_at_once_saves_nothing(run, files):
    def fails(records, answers):
        raise judge.NoAnswer("the server is down.")

    lines, err = run("never", "--steps", 2, annotator=fails, status=2)
    assert not lines and "the server is down." in err
    assert not (files / "never" / "checkpoints").exists()


def seeds_of(run, monkeypatch, name, *flags):
    """The seeds that answers are drawn with, in order: of whatever generator is asked for the first token of a batch."""
    seeds, real = [], torch.multinomial

    def spy(*args, generator=None, **more):
        seed = generator.initial_seed()
        if not seeds or seeds[-1] != seed:
            seeds.append(seed)
        return real(*args, generator=generator, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", spy)
        run(name, "--steps", 2, "--grad-accum", 2, *flags, annotator=by(len))
    return seeds


def test_every_sampling_batch_draws_with_its_own_seed(run, monkeypatch):
    size = ("--sample-batch-size", 2)
    seeds = seeds_of(run, monkeypatch, "seeds", *size)
    assert len(seeds) == len(set(seeds)) == 4
    assert seeds_of(run, monkeypatch, "seeds-again", *size) == seeds
    assert not set(seeds) & set(seeds_of(run, monkeypatch, "seeds-other", *size, "--seed", 1))


def test_sampling_has_a_batch_of_its_own(run, monkeypatch):
    """Its micro-batches change no answer; two of a step are drawn at once, and each is trained on."""
    assert len(seeds_of(run, monkeypatch, "whole", "--sample-batch-size", 4)) == 2
    rows, lines, collate = [], [], Processor.collate
    spy = lambda self, examples, view=None: (
        rows[-1].append(len(examples)) or collate(self, examples, view)
    )
    monkeypatch.setattr(Processor, "collate", spy)
    for size in (4, 2, 1):
        rows.append([])
        flags = ("--batch-size", size, "--grad-accum", 4 // size, "--sample-batch-size", 4)
        lines.append(run(f"cut-{size}", "--steps", 2, *flags, annotator=by(len))[0])
    assert [max(part) for part in rows] == [4, 2, 1] and len(set(map(sum, rows))) == 1
    for other in lines[1:]:
        for one, two in zip(lines[0], other, strict=True):
            for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected", "response_length"):
                assert two[name] == pytest.approx(one[name], abs=1e-4), name


def test_alpha_is_drawn_anew_for_each_micro_batch_and_step(run):
    """One row a micro-batch, all drawn pairs ties, so annotator/pairs is the step's share of pairs of the data."""
    ties = by(lambda text: 0)
    flags = (
        "--mix",
        0.5,
        "--batch-size",
        1,
        "--sample-batch-size",
        1,
        "--grad-accum",
        6,
        "--steps",
        5,
        "--lr",
        0,
    )
    shares = lambda name, *more: [
        round(line["annotator/pairs"], 6) for line in run(name, *flags, *more, annotator=ties)[0]
    ]
    found = shares("alpha")
    assert set(found) - {0, 1}, "all micro-batches of a step have one alpha"
    assert len(set(found)) > 1, "all steps have the same alphas"
    assert shares("alpha-again") == found != shares("alpha-other", "--seed", 1)


def test_mix_is_the_share_of_the_data(run):
    """P = .9: of 40 examples 36 are expected to take their own pair, within five standard deviations."""
    lines, _ = run("much", "--mix", 0.9, "--steps", 20, "--lr", 0, annotator=by(lambda text: 0))
    own = sum(line["annotator/pairs"] for line in lines) * 2
    assert own == pytest.approx(36, abs=5 * math.sqrt(40 * 0.9 * 0.1))


def test_a_prompt_without_a_pair_counts_in_the_mean(run):
    """The first prompt alone, and beside one that ties: half the loss, half the gradient, half of every mean."""

    def first(records, answers, calls=[]):
        calls.append(1)
        return [[0, 1] if len(calls) % 3 != 0 else [1, 1]] * len(records)

    flags = ("--steps", 1, "--batch-size", 1, "--sample-batch-size", 1)
    ((one,), _) = run("alone", *flags, annotator=first)
    ((two,), _) = run("beside", *flags, "--grad-accum", 2, annotator=first)
    assert one["annotator/pairs"] == 1 and two["annotator/pairs"] == two["annotator/ties"] == 0.5
    for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
        assert one[name] != 0 and two[name] == pytest.approx(one[name] / 2, rel=1e-4), name


@pytest.mark.parametrize(
    "scores, score, kind",
    [
        ([3, 1], 2, "pairs"),
        ([1, 4], 2.5, "pairs"),
        ([2, 2], 2, "ties"),
        ([None, 5], 5, "unreadable"),
    ],
)
def test_what_the_annotator_said_is_logged(run, scores, score, kind):
    name = f"said{scores[0]}{scores[1]}"
    ((line,), _) = run(name, "--steps", 1, annotator=lambda records, _: [scores] * len(records))
    assert line["annotator/score"] == score
    for other in ("pairs", "ties", "unreadable"):
        assert line[f"annotator/{other}"] == (other == kind)


def test_learns_what_the_annotator_likes(run):
    """A bandit whose good arm is known, an answer with the letter s: from some of the answers to nearly all of them."""
    flags = (
        "--steps",
        18,
        "--batch-size",
        10,
        "--max-new-tokens",
        3,
        "--k",
        4,
        "--lr",
        "3e-2",
        "--projector-lr",
        0,
    )
    lines, _ = run("bandit", *flags, annotator=by(lambda text: float("s" in text)))
    rate = [line["annotator/score"] for line in lines]
    assert sum(rate[:3]) / 3 < 0.4 and sum(rate[-3:]) / 3 > 0.9
    assert lines[-1]["annotator/pairs"] < lines[0]["annotator/pairs"]  # little is left to learn


def test_oracle(run, files):
    lines, _ = run("oracle", "--steps", 2, "--annotator", "oracle")
    assert (
        len(lines) == 2
        and json.loads((files / "oracle" / "args.json").read_text())["flags"]["annotator"]
        == "oracle"
    )


def test_the_key_is_in_no_file_and_no_message(run, files, monkeypatch):
    """A whole run with an endpoint that fails now and then, then one that refuses."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    keys, refuse = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            keys.append(self.headers["Authorization"])
            text = body["messages"][0]["content"][1]["text"].split("\n\nResponse 1:\n")[1]
            first, second = text.split("\n\nWhich response is better?")[0].split(
                "\n\nResponse 2:\n"
            )
            said = json.dumps(
                {"choices": [{"message": {"content": f"Better: {1 + (first < second)}"}}]}
            ).encode()
            self.send_response(401 if refuse else 500 if len(keys) == 2 else 200)
            self.end_headers()
            self.wfile.write(f"wrong key {KEY}".encode() if refuse else said)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{http.server_port}/v1"
    flags = (
        "--annotator",
        "endpoint",
        "--judge-url",
        url,
        "--judge-model",
        "m",
        "--steps",
        2,
        "--save-every",
        1,
    )
    lines, err = run("endpoint", *flags)
    assert set(keys) == {f"Bearer {KEY}"} and len(lines) == 2 and lines[0]["annotator/pairs"] == 1
    refuse.append(True)
    _, refused = run("refused", *flags, status=2)
    http.shutdown()
    http.server_close()
    assert (
        "status 401 (wrong key ***)" in refused
        and KEY not in err + refused
        and "Traceback" not in refused
    )
    written = [
        p for name in ("endpoint", "refused") for p in (files / name).rglob("*") if p.is_file()
    ]
    assert len(written) > 5 and not any(KEY.encode() in p.read_bytes() for p in written)
    assert json.loads((files / "endpoint" / "args.json").read_text())["flags"]["judge_url"] == url


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--k", "1"], "--k: '1' was given; a whole number, 2 or more"),
        (["--mix", "1.5"], "--mix: '1.5' was given; a number, 0 to 1"),
        (["--temperature", "0"], "--temperature: '0' was given; a number, more than 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens: '0' was given; a whole number, 1 or more"),
        (["--beta", "0"], "--beta: '0' was given; a number, more than 0"),
        (["--annotator", "nowhere"], "nowhere: no such folder"),
        (["--annotator", "endpoint"], "--annotator endpoint needs --judge-url"),
        (
            ["--annotator", "oracle", "--judge-model", "m"],
            "--judge-model is for --annotator endpoint",
        ),
    ],
)
def test_bad_flags(run, monkeypatch, flags, words):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    _, err = run("bad", *flags, status=2)
    assert words in err and "Traceback" not in err
