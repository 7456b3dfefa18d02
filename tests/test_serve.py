"""A server in the place of a model: what is sent to it, one that fails or is killed for, and one that we did not write."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from test_judge import KEY, server  # noqa: F401
from test_pope import lines_of, write_pope

import eval_judge
import eval_pope
import evaluation
import judge
from common import BadInput, Parser
from data import Record
from formats import mmhal

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pope(tmp_path):
    files = write_pope(tmp_path / "coco")
    for i in range(5):
        gray = Image.new("RGB", (30, 28), (50 * i,) * 3)  # a JPEG of it is exact
        gray.save(tmp_path / "coco" / f"COCO_{i}.jpg")
    return files


def flags(url, *more):
    return ["--endpoint", url, "--endpoint-model", "org/m", "--endpoint-workers", "1", *more]


def main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["eval_pope.py", *map(str, words)])
    eval_pope.main()


def asked(body):
    """(gray level of the picture, text) of a request with one user turn."""
    picture, text = body["messages"][-1]["content"]
    content = base64.b64decode(picture["image_url"]["url"].split(",")[1])
    with Image.open(io.BytesIO(content)) as image:
        return image.getpixel((9, 9))[0], text["text"]


def test_what_a_server_is_asked(server, pope, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Picture and question with its suffix, greedy, as long as the rule says; the key is in no file."""
    url, requests = server(lambda n, body: (200, "No" if n % 3 else "Yes"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    out = tmp_path / "out"
    main(monkeypatch, "--questions", *pope, *flags(url), "--out", out)
    assert len(requests) == 60
    splits = eval_pope.read_splits(pope)
    for n, q in enumerate(splits["random"]):
        _, headers, body = requests[n]
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("org/m", 0, 16)
        assert headers["Authorization"] == f"Bearer {KEY}"
        assert asked(body) == (50 * int(q["image"][5]), q["text"] + eval_pope.SUFFIX)
    rows = lines_of(out / "answers_random.jsonl")
    assert [row["answer"] for row in rows] == ["No" if n % 3 else "Yes" for n in range(30)]
    printed = capsys.readouterr()
    assert "m: answers decided within rounding: not counted, a server does not tell" in printed.out
    everything = printed.out + printed.err
    everything += "".join(p.read_text() for p in out.rglob("*") if p.is_file())
    assert KEY not in everything and json.loads((out / "metrics.json").read_text())


def test_a_dialogue_for_a_server(server, tmp_path):  # noqa: F811
    """Turn by turn, the picture in the first."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    url, requests = server(lambda n, body: (200, "Yes"))
    connect = lambda tokens, temperature: judge.ask_endpoint(url, "m")
    turns = ("Is there a dog?", "No.", "A cat?")
    records = [Record("", tmp_path / "a.png", turns), Record("", None, turns[:1])]
    assert evaluation.answer(evaluation.Contestant("m", server=connect), records, 5) == ["Yes"] * 2
    by_length = sorted((body["messages"] for *_, body in requests), key=len)
    assert by_length[0] == [{"role": "user", "content": [{"type": "text", "text": turns[0]}]}]
    first, *others = by_length[1]
    assert [part["type"] for part in first["content"]] == ["image_url", "text"]
    assert others == [
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "A cat?"},
    ]


def test_a_server_that_refuses_in_the_middle(server, pope, tmp_path, monkeypatch):  # noqa: F811
    """What it answered is kept; the same command asks for the rest; another name is another run."""
    url, requests = server(lambda n, body: (401, b"who are you") if n == 20 else (200, "Yes"))
    command = ["--questions", *pope, *flags(url), "--out", tmp_path / "out"]
    with pytest.raises(judge.NoAnswer, match="--endpoint http.*401.*the same command goes on"):
        main(monkeypatch, *command)
    kept = lines_of(tmp_path / "out" / "replies.jsonl")
    assert len(kept) == len(requests) - 1 >= 20 and not (tmp_path / "out" / "metrics.json").exists()
    main(monkeypatch, *command)
    assert lines_of(tmp_path / "out" / "replies.jsonl")[: len(kept)] == kept
    assert len(requests) == 61, "the refused question was asked again, no other"
    with pytest.raises(BadInput, match="it was begun with contestants, m: .* and here it is None"):
        main(monkeypatch, *command, "--endpoint-model", "other")


def test_a_killed_process_asks_nothing_twice(server, pope, tmp_path):  # noqa: F811
    """SIGKILL while a question is under way: each answer that was written is asked for once."""
    process = []

    def respond(n, body):
        if n == 25:
            os.kill(process[0].pid, signal.SIGKILL)
        return 200, "Yes"

    url, requests = server(respond)
    command = [sys.executable, ROOT / "eval_pope.py", "--questions", *pope, *flags(url)]
    command = [*map(str, command), "--out", str(tmp_path / "out")]
    process.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
    assert process[0].wait() == -signal.SIGKILL
    kept = [row for row in (tmp_path / "out" / "replies.jsonl").read_text().split("\n")[:-1]]
    assert 20 <= len(kept) <= 25
    before = len(requests)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answered = {(row["image"], row["prompt"][0]) for row in map(json.loads, kept)}
    assert len(answered) == len(kept) and len(requests) - before == 60 - len(kept)


@pytest.mark.parametrize("url", ["ftp://x/v1", "http://user:k@x/v1", "http://x/v1?key=k", "x"])
def test_addresses_that_are_refused(pope, tmp_path, monkeypatch, url):
    with pytest.raises(BadInput, match="--endpoint: http"):
        main(monkeypatch, "--questions", *pope, *flags(url), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_key_file(pope, tmp_path, monkeypatch):
    (tmp_path / "key").write_text("two words\n")
    command = ["--questions", *pope, *flags("http://x/v1"), "--out", tmp_path / "out"]
    with pytest.raises(BadInput, match="--endpoint-key-file .*key: a key is one line") as refused:
        main(monkeypatch, *command, "--endpoint-key-file", tmp_path / "key")
    assert "two words" not in str(refused.value)


# ---- a server that we did not write


@pytest.fixture
def served(checkpoint, tmp_path, monkeypatch):
    """transformers' own `serve` with the tiny checkpoint -> its address."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    command = [sys.executable, "-c", start, "serve", str(checkpoint), "--device", "cpu"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    log = open(tmp_path / "serve.log", "w+")
    process = subprocess.Popen(command, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2).read()
            break
        except OSError:
            assert process.poll() is None, (tmp_path / "serve.log").read_text()
            time.sleep(0.5)
    yield f"{address}/v1"
    process.terminate()
    process.wait()


def test_transformers_serve_as_contestant_and_as_judge(
    served, checkpoint, pope, tmp_path, monkeypatch
):
    """The checkpoint answers the same here and there."""
    out = tmp_path / "out"
    more = ["--endpoint", served, "--endpoint-model", str(checkpoint), "--device", "cpu"]
    main(monkeypatch, "--questions", pope[0], "--model", checkpoint, *more, "--out", out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics) == 2 and {m["random"]["n"] for m in metrics.values()} == {30}
    here, there = (lines_of(p) for p in sorted(out.glob("*/answers_random.jsonl")))
    said = lambda row: re.sub(r"<s>|\s", "", row["answer"])  # the server leaves these out
    assert list(map(said, here)) == list(map(said, there)) and len(set(map(said, here))) > 10

    parser = Parser("")
    judge.add_flags(parser)
    words = ["--annotator", "endpoint", "--judge-url", served, "--judge-model", str(checkpoint)]
    score = judge.make(parser.parse_args(words))
    record = Record("", tmp_path / "coco" / "COCO_1.jpg", ("What is there?",))
    assert score([record], [["A dog.", "A cat."]]) == [[None, None]], "it says no verdict"


def test_eval_judge_with_transformers_serve(served, checkpoint, tmp_path, monkeypatch):
    """MMHALBench-V: contestant and judge get the picture. MT-Bench: two turns, as our code answers."""

    def judge_main(*words):
        monkeypatch.setattr(sys, "argv", ["eval_judge.py", *map(str, words)])
        eval_judge.main()

    # MMHal-Bench, with pictures
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(3):
        Image.new("RGB", (40, 28), (50 * i, 80, 90)).save(tmp_path / "images" / f"{i}.png")
        row = {"question_type": "attribute", "image_src": f"https://example.org/{i}.png"}
        row |= {"image_content": ["Cup"], "question": f"What is {i}?", "gt_answer": "A cup."}
        rows.append(row | {"model_answer": ""})
    (tmp_path / "template.json").write_text(json.dumps(rows))
    contestant = ("--endpoint", served, "--endpoint-model", checkpoint, "--max-new-tokens", 8)
    flags = ("--questions", tmp_path / "template.json", "--images", tmp_path / "images")
    flags += (*contestant, "--out", tmp_path / "out", "--judge-sees-image")
    monkeypatch.setattr(judge, "REPLY_TOKENS", 8)
    monkeypatch.setattr(mmhal, "MAX_TOKENS", 8)
    named = ("--annotator", "endpoint", "--judge-url", served, "--judge-model", checkpoint)
    judge_main(*flags, *named)
    filled = json.loads((tmp_path / "out" / "mmhal.json").read_text())
    assert all(row["model_answer"].strip() for row in filled)
    reviews = lines_of(tmp_path / "out" / "reviews.jsonl")
    assert len(reviews) == 3 and all(review["answer"].strip() for review in reviews)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["judge"] == str(checkpoint) and found["served"].startswith(str(checkpoint))
    assert found["n"] == 3 and found["unreadable"] == 3 and found["hallucination_rate"] == 1
    judge_main(*flags)  # scored again, nobody is asked
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == found

    # MT-Bench, text
    rows = [
        {
            "question_id": i,
            "category": "extraction",
            "turns": [f"Is there {thing}?", "Describe it."],
        }
        for i, thing in enumerate(("a dog", "a cup", "a kitchen"))
    ]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--questions", tmp_path / "question.jsonl", "--max-new-tokens", 8)
    judge_main(*flags, *contestant, "--out", tmp_path / "there")
    judge_main(*flags, "--model", checkpoint, "--device", "cpu", "--out", tmp_path / "here")
    said = [
        [row["choices"][0]["turns"] for row in lines_of(tmp_path / where / "mt_bench.jsonl")]
        for where in ("here", "there")
    ]
    assert said[0] == said[1] and len({text for turns in said[0] for text in turns}) == 6
