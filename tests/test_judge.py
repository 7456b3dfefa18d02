"""judge.py: the oracle's order, both orders of a pair, verdicts that cannot be read, an endpoint that misbehaves."""

import base64
import io
import json
import os
import signal
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import facts
import judge
from common import BadInput
from data import Processor, Record
from formats import adapters, checkpoints
from lora import add_adapter

KEY = "sk-secret-0123456789"


def flags(**changed):
    """The flags of judge.add_flags."""
    given = dict(
        annotator="endpoint",
        judge_url=None,
        judge_model=None,
        judge_key_file=None,
        annotator_device=None,
        judge_workers=2,
        facts=None,
        missing_facts="refuse",
        toy_world=None,
    )
    return SimpleNamespace(**(given | changed))


@pytest.fixture
def record(tmp_path):
    """A prompt with a picture, in a folder that a toy world would have."""
    (tmp_path / "images").mkdir()
    Image.effect_noise((40, 28), 80).convert("RGB").save(tmp_path / "images" / "0.png")
    return Record("row 0", tmp_path / "images" / "0.png", ("Describe the image.",))


# ---- the oracle


@pytest.fixture
def scene(record):
    """A kitchen with a red cup on the left and two bananas on the right."""
    thing = lambda *values: dict(zip(("name", "colour", "count", "column", "row"), values))
    things = [thing("cup", "red", 1, 0, 0), thing("banana", "yellow", 2, 2, 0)]
    (record.image.parents[1] / "scenes.json").write_text(
        json.dumps({"0.png": {"kind": "kitchen", "things": things}})
    )
    return record


def test_oracle_counts_errors_first_then_true_objects(scene):
    best_first = [
        "This is a kitchen. There is a red cup. There are two bananas.",
        "There is a red cup.",
        "There is a red cup. There are two bananas. There is a dog.",  # absent
        "There is a blue cup. There is a dog. There are two bananas.",  # absent and wrong
        "Rain in the hills. Fog and wind. Cold out there.",  # unreadable, names nothing
    ]
    (scores,) = judge.make(flags(annotator="oracle"))([scene], [best_first])
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 5
    assert scores[:3] == pytest.approx([0.02, 0.01, -0.98])


def test_oracle_silence_is_no_good_description(scene):
    (scores,) = judge.make(flags(annotator="oracle"))(
        [scene], [["", "This is a kitchen.", "There is a red cup. There is a dog."]]
    )
    assert scores == pytest.approx([-2, -2, -0.99])


def test_each_record_has_its_answers(scene, checkpoint, tmp_path):
    """One list too few or too many is a fault of the caller, and no score is made of the others."""
    score_by_model = judge.score_by_reward_model(reward_run(tmp_path / "run", checkpoint), {})
    for score in (judge.oracle(), score_by_model):
        for records, answers in (([scene] * 2, [["a"]]), ([scene], [["a"]] * 2)):
            with pytest.raises(ValueError, match="zip"):
                score(records, answers)


def test_oracle_of_a_question(scene):
    asked = replace(scene, turns=("Is there a cup in the image?",))
    (scores,) = judge.make(flags(annotator="oracle"))(
        [asked], [["Yes", "Yes, there is a cup.", "No", "perhaps a dog"]]
    )
    assert scores == pytest.approx([0.01, 0.01, -1, -1])


def test_oracle_of_a_dialogue(scene):
    """What counts is the last question."""
    turns = ("Describe the image.", "A kitchen.", "Is there a cup in the image?")
    (scores,) = judge.make(flags(annotator="oracle"))(
        [replace(scene, turns=turns)], [["Yes", "No"]]
    )
    assert scores == pytest.approx([0.01, -1])


def test_oracle_knows_toy_pictures_only(record):
    score = judge.make(flags(annotator="oracle"))
    with pytest.raises(BadInput, match="row 0: the oracle knows pictures of a toy world"):
        score([record], [["a", "b"]])
    with pytest.raises(BadInput, match="row 0: the oracle knows"):
        score([Record("row 0", None, ("Hello",))], [["a", "b"]])


# ---- two orders


@pytest.mark.parametrize(
    "reply, want",
    [
        ("Better: 1", 1),
        ("**Better: 2**\nResponse 2 names no dog.", -1),
        ("better: Response 1.", 1),
        ("Better: equal\nBoth are true.", 0),
        ("Reasons first.\nBetter: 2", -1),
        ("Better: 1 or 2", None),
        ("Better: 1\nBetter: 2", None),
        ("Response 1 is better", None),
        ("1", None),
        ("Better: 12", None),
        ("", None),
        (None, None),
    ],
)
def test_verdict(reply, want):
    assert judge.verdict(reply) == want


def shown(text):
    """The two responses in a question."""
    first, rest = text.split("\n\nResponse 1:\n")[1].split("\n\nResponse 2:\n")
    return first, rest.split("\n\nWhich response is better?")[0]


def asker(prefer):
    """An `ask` that answers by a function of the two responses, the first one last, and remembers."""
    seen = []

    def ask(questions, answered):
        seen.extend(shown(text) for _, text in questions)
        texts = [prefer(*shown(text)) for _, text in questions]
        replies = [judge.Reply(place, text) for place, text in enumerate(texts)]
        return replies[1:] + replies[:1]

    return ask, seen


def texts_of(replies):
    """The texts of replies in the order of their questions."""
    replies = sorted(replies, key=lambda reply: reply.place)
    assert [reply.place for reply in replies] == list(range(len(replies)))
    return [reply.text for reply in replies]


longer = lambda a, b: (
    "Better: equal" if len(a) == len(b) else f"Better: {1 + (len(b) > len(a))}\nIt says more."
)


def test_both_orders(record):
    ask, seen = asker(longer)
    assert judge.pairwise(ask)([record] * 2, [["{a}", "bbbb"], ["ccccc", "d"]]) == [
        [-1, 1],
        [1, -1],
    ]
    assert seen == [("{a}", "bbbb"), ("bbbb", "{a}"), ("ccccc", "d"), ("d", "ccccc")]


def test_equal_texts_are_a_tie_unasked(record):
    ask, seen = asker(longer)
    assert judge.pairwise(ask)([record], [["a", "a"]]) == [[0, 0]] and not seen
    assert judge.pairwise(ask)([record], [["a", "b"]]) == [[0, 0]] and len(seen) == 2


def test_a_verdict_that_depends_on_the_place_is_none(record, capsys):
    for reply in ("Better: 1", "Better: 2", "no idea", None):
        ask, _ = asker(lambda a, b, reply=reply: reply)
        assert judge.pairwise(ask)([record], [["a", "b"]]) == [[None, None]]
    told = capsys.readouterr().err
    assert (
        told.count("cannot be read") == 2
        and told.count("changes when the answers change places") == 2
    )
    half = lambda a, b: "Better: equal" if a == "a" else "Better: 1"
    assert judge.pairwise(asker(half)[0])([record], [["a", "b"]]) == [[None, None]]


@pytest.mark.parametrize("replies", [["Better: 1", "Hm."], ["Hm.", "Better: 1"], ["Hm.", "So."]])
def test_the_verdict_that_cannot_be_read_is_shown(record, capsys, replies):
    """Of a pair's two the one that it is; once a kind."""
    ask, _ = asker(lambda a, b: replies[a > b])
    assert judge.pairwise(ask)([record], [["a", "b", "c"]]) == [[None] * 3]
    told = "annotator: a verdict that cannot be read, counted as unreadable: "
    assert capsys.readouterr().err == f"{told}'Hm.'\n"


def test_more_answers(record):
    ask, seen = asker(lambda a, b: "?" if {a, b} == {"a", "bb"} or "e" in a + b else longer(a, b))
    assert judge.pairwise(ask)([record], [["a", "bb", "ccc", "a", "e"]]) == [[-1, -1, 2, -1, None]]
    assert len(seen) == 12


def test_checkpoint_asks_greedily_with_the_picture(record, checkpoint, monkeypatch):
    calls = []

    def generate(model, processor, records, max_new_tokens, **rest):
        calls.append((records, max_new_tokens, rest))
        return [[longer(*shown(r.turns[0]))] for r in records]

    monkeypatch.setattr(judge, "generate", generate)
    monkeypatch.setattr(Processor, "encode", lambda self, r, every_turn=False: refuse(r))

    def refuse(r):
        if "x" * 50 in r.turns[0]:
            raise BadInput("too long")

    score = judge.make(flags(annotator=str(checkpoint)))
    assert score([record] * 2, [["a", "bbbb"], ["a", "x" * 50]]) == [[-1, 1], [None, None]]
    ((records, tokens, rest),) = calls
    assert (
        [r.image for r in records] == [record.image] * 2
        and tokens == 16
        and "temperature" not in rest
    )


def test_checkpoint_for_real(record, checkpoint):
    """A model of random weights gives no verdict, and a question that is too long for its context no reply."""
    score = judge.make(flags(annotator=str(checkpoint)))
    assert score([record], [["a", "b"]]) == [[None, None]]
    short = "Better?\n\nResponse 1:\n{first}\n\nResponse 2:\n{second}\n\nWhich response is better?{dialogue}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "QUESTION", short)
        assert score([record], [["a", "b"]]) == [[None, None]]


def test_a_reward_model(record, checkpoint, tmp_path, monkeypatch):
    """Scores are the network's on each answer alone; equal texts score alike; facts are needed by one that reads them."""
    base, processor = checkpoints.load(checkpoint)
    base.prepare(llm=False, projector=False)
    add_adapter(base.llm, "reward", 2)
    base.add_head("reward")
    for name, p in base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    settings = {
        "held_out": {},
        "question": "Good?{facts}",
        "facts": " Seen:",
        "max_facts": None,
        "template": processor.template,
        "image_aspect": processor.image_aspect,
    }
    adapters.save_reward(base, tmp_path / "run", checkpoint, settings)
    (tmp_path / "facts.json").write_text(json.dumps({"0.png": ["a dog"]}))
    given = flags(annotator=str(tmp_path / "run"), facts=str(tmp_path / "facts.json"))
    other = replace(record, turns=("What is it?",), where="row 1")
    texts = [["a cat", "a dog and a cat", "a cat"], ["", "two"]]
    found = judge.make(given, records=[record, other])([record, other], texts)
    assert found[0][0] == found[0][2] != found[0][1]
    for r, row, scores in zip((record, other), texts, found):
        for text, score in zip(row, scores):
            example = facts.with_evaluation(
                processor, processor.encode(replace(r, answers=(text,))), "Good? Seen:\n- a dog"
            )
            batch = processor.collate([example])
            with torch.no_grad(), base.use("reward"):
                assert abs(base.values(batch, batch.last, "reward").item() - score) < 1e-5
    assert (
        judge.make(given, records=[record])([record], [["a cat", "cat " * 3000, "a dog"]])[0][1]
        is None
    ), "too long to be read"
    both = [
        replace(record, where="row 0"),
        replace(record, image=record.image.with_name("2.png"), where="row 0"),
    ]
    (tmp_path / "facts.json").write_text(json.dumps({"0.png": ["a dog"], "2.png": ["a cat"]}))
    assert judge.make(given, records=both)(both[:1], [["a dog"]]) == judge.make(
        given, records=both[:1]
    )(both[:1], [["a dog"]])
    strange = replace(record, image=record.image.with_name("1.png"), where="row 2")
    with pytest.raises(BadInput, match=r"no caption of .*1.png \(1 of 2 rows"):
        judge.make(given, records=[record, strange])
    with pytest.raises(BadInput, match="--facts FILE is needed"):
        judge.make(flags(annotator=str(tmp_path / "run")))
    with pytest.raises(
        BadInput, match="--facts is for a reward model that reads them; the annotator is oracle"
    ):
        judge.make(flags(annotator="oracle", facts="facts.json"))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "reward.json").write_text('{"question": "Good?"}')
    with pytest.raises(BadInput, match="old/reward.json: no base, base_name, facts, "):
        judge.make(flags(annotator=str(tmp_path / "old")))


def test_checkpoint_leaves_room_for_a_verdict(record, checkpoint, monkeypatch, capsys):
    """A question that leaves less than 16 tokens of the context has no reply; the others keep theirs."""
    model, processor = checkpoints.load(checkpoint)
    texts = ["x" * 200, "short"]
    queries = [replace(record, turns=(text,)) for text in texts]
    lengths = [len(processor.encode(query).prompt) for query in queries]
    monkeypatch.setattr(checkpoints, "load", lambda *args: (model, processor))
    monkeypatch.setattr(
        judge, "generate", lambda m, p, records, *a, **k: [[r.turns[0]] for r in records]
    )
    for room, replies in ((16, texts), (15, [None, "short"])):
        processor.max_length = lengths[0] + room
        ask = judge.ask_checkpoint("name")
        assert texts_of(ask([(record, text) for text in texts])) == replies
        assert capsys.readouterr().err.count("annotator: template vicuna_v1, image aspect pad") == 1


def reward_run(folder, checkpoint, **changed):
    """The run folder of a reward model that reads facts, of random weights."""
    base, processor = checkpoints.load(checkpoint)
    base.prepare(llm=False, projector=False)
    add_adapter(base.llm, "reward", 2)
    base.add_head("reward")
    settings = {
        "held_out": {},
        "question": "Good?{facts}",
        "facts": " Seen:",
        "max_facts": None,
        "template": processor.template,
        "image_aspect": processor.image_aspect,
    }
    adapters.save_reward(base, folder, checkpoint, settings | changed)
    return str(folder)


def test_a_reward_model_reads_what_it_was_trained_on(
    record, checkpoint, tmp_path, monkeypatch, capsys
):
    """Its own template and image aspect, and as many facts as it saw; the same ones at every call."""
    run = reward_run(
        tmp_path / "run", checkpoint, template="plain", image_aspect="checkpoint", max_facts=2
    )
    known = [f"fact {i}" for i in range(20)]
    (tmp_path / "facts.json").write_text(json.dumps({"0.png": known}))
    seen, load, turn = [], checkpoints.load, judge.evaluation_turn

    def loaded(*args, **more):
        model, processor = load(*args, **more)
        seen.append((processor.template, processor.image_aspect, model.dtype))
        return model, processor

    turns = []
    monkeypatch.setattr(checkpoints, "load", loaded)
    monkeypatch.setattr(
        judge, "evaluation_turn", lambda *args: turns.append(turn(*args)) or turns[-1]
    )
    given = flags(annotator=run, facts=str(tmp_path / "facts.json"))
    score = judge.make(given, dtype=torch.bfloat16, records=[record])
    assert seen == [("plain", "checkpoint", torch.bfloat16)]
    assert "annotator: template plain, image aspect checkpoint; asked as" in capsys.readouterr().err
    first, second = (score([record], [["a cat", "a dog"]]) for _ in range(2))
    assert first == second and turns[0] == turns[1] and turns[0].count("- fact") == 2
    score([replace(record, turns=("What is it?",))], [["a cat"]])
    assert turns[2] != turns[0], "another prompt draws its own"


def test_a_reward_model_whose_facts_come_first(record, checkpoint, tmp_path):
    """Its score is that of the answer behind facts and question, by its own adapter and head."""
    run = reward_run(tmp_path / "run", checkpoint, facts_first=True)
    (tmp_path / "facts.json").write_text(json.dumps({"0.png": ["a dog"]}))
    given = flags(annotator=run, facts=str(tmp_path / "facts.json"))
    ((found,),) = judge.make(given, records=[record])([record], [["a cat"]])
    base, processor = checkpoints.load(checkpoint)
    adapters.load_reward(base, run)
    turns = (f"Seen:\n- a dog\n{record.turns[0]}",)
    example = processor.encode(replace(record, turns=turns, answers=("a cat",)))
    batch = processor.collate([facts.with_evaluation(processor, example, "Good?")])
    with torch.no_grad(), base.use("reward"):
        assert abs(base.values(batch, batch.last, "reward").item() - found) < 1e-5


def test_as_many_facts_come_first_as_in_training(record, checkpoint, tmp_path, monkeypatch):
    """max_facts of the reward model, of all that are known."""
    run = reward_run(tmp_path / "run", checkpoint, facts_first=True, max_facts=2)
    many = [f"fact {i}" for i in range(5)]
    (tmp_path / "facts.json").write_text(json.dumps({"0.png": many}))
    given = flags(annotator=run, facts=str(tmp_path / "facts.json"))
    read, drawn = [], facts.drawn_facts
    monkeypatch.setattr(judge, "drawn_facts", lambda *g: read.append(drawn(*g)) or read[-1])
    judge.make(given, records=[record])([record], [["a cat"]])
    assert [text.count("- fact") for text in read] == [2]


def test_whose_facts(record, checkpoint, tmp_path, monkeypatch):
    """Those of --facts; without it, in the toy world, the world's."""
    run = reward_run(tmp_path / "run", checkpoint)
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "image_to_caption.json").write_text('{"0.png": ["of the world"]}')
    (tmp_path / "own.json").write_text('{"0.png": ["our own"]}')
    turns, turn = [], judge.evaluation_turn
    monkeypatch.setattr(
        judge, "evaluation_turn", lambda *args: turns.append(turn(*args)) or turns[-1]
    )
    for own, said in ((str(tmp_path / "own.json"), "our own"), (None, "of the world")):
        given = flags(annotator=run, facts=own, toy_world=str(tmp_path / "world"))
        judge.make(given, records=[record])([record], [["a cat"]])
        assert turns.pop().endswith(f"- {said}")
        assert given.facts == (own or str(tmp_path / "world" / "image_to_caption.json"))
    strange = replace(record, image=record.image.with_name("1.png"))
    given = flags(annotator=run, facts=str(tmp_path / "own.json"), missing_facts="count")
    judge.make(given, records=[strange])  # told, and no error


def test_how_the_annotator_is_made(record, checkpoint, tmp_path, monkeypatch):
    """dtype reaches a checkpoint and a reward model without facts; flags reach the endpoint."""
    plain = reward_run(tmp_path / "plain", checkpoint, question="Good?", facts=None)
    seen, load = [], checkpoints.load

    def loaded(*args, **more):
        model, processor = load(*args, **more)
        seen.append(model.dtype)
        return model, processor

    monkeypatch.setattr(checkpoints, "load", loaded)
    for annotator in (str(checkpoint), plain):
        for dtype in (torch.bfloat16, torch.float32):
            judge.make(flags(annotator=annotator), dtype=dtype)
            assert seen.pop() is dtype
    made = []
    monkeypatch.setattr(judge, "ask_endpoint", lambda *args, **more: made.append(args))
    (tmp_path / "key").write_text(KEY + "\n")
    url = "http://localhost/v1"
    given = flags(
        judge_url=url, judge_model="m", judge_key_file=str(tmp_path / "key"), judge_workers=3
    )
    judge.make(given)
    assert made == [(url, "m", KEY, 3)]


def test_flags_of_another_annotator():
    with pytest.raises(
        BadInput, match="--judge-url is for --annotator endpoint; the annotator is oracle"
    ):
        judge.make(flags(annotator="oracle", judge_url="http://localhost/v1"))
    for name in ("judge_model", "judge_key_file"):
        flag = "--" + name.replace("_", "-")
        with pytest.raises(BadInput, match=f"{flag} is for --annotator endpoint"):
            judge.make(flags(annotator="oracle", **{name: "x"}))
    with pytest.raises(BadInput, match="--annotator-device is for a reward model or a checkpoint"):
        judge.make(flags(annotator="oracle", annotator_device="cpu"))
    with pytest.raises(BadInput, match="nowhere: no such folder"):
        judge.make(flags(annotator="nowhere"))


def test_the_annotator_has_a_device_of_its_own(monkeypatch):
    """Without the flag it shares the policy's, and its weights count there."""
    asked = []
    monkeypatch.setattr(judge, "ask_checkpoint", lambda name, device, *_: asked.append(device))
    policy, beside = torch.device("meta"), judge.beside_the_policy
    alone, own = flags(annotator="llava"), flags(annotator="llava", annotator_device="cpu")
    judge.make(alone, policy)
    judge.make(own, policy)
    assert asked == [policy, torch.device("cpu")]
    assert beside(alone, policy) == ["llava"] and beside(own, policy) == []
    assert beside(own, torch.device("cpu")) == ["llava"]
    assert beside(flags(annotator="oracle"), policy) == beside(flags(), policy) == []
    with pytest.raises(BadInput, match="--annotator-device nowhere cannot be used"):
        judge.make(flags(annotator="llava", annotator_device="nowhere"), policy)


# ---- an endpoint


@pytest.fixture
def server(monkeypatch):
    """A function (respond) -> (url, requests): a local server; respond(n, body) -> status, bytes or a completion's text."""
    running = []
    for name in (
        "http_proxy",
        "HTTP_PROXY",
        "all_proxy",
        "ALL_PROXY",
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
    ):
        monkeypatch.delenv(name, raising=False)

    def start(respond):
        requests, lock = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    n = len(requests)
                    requests.append((self.path, dict(self.headers), body))
                status, said, *headers = respond(n, body)
                if isinstance(said, str):
                    said = json.dumps(
                        {"choices": [{"message": {"role": "assistant", "content": said}}]}
                    ).encode()
                try:
                    self.send_response(status)
                    for name, value in headers:
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(said)))
                    self.end_headers()
                    self.wfile.write(said)
                except OSError:
                    pass  # the client did not wait

            def log_message(self, *_):
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        running.append(http)
        return f"http://127.0.0.1:{http.server_port}/v1", requests

    yield start
    for http in running:
        http.shutdown()
        http.server_close()


def text_of(body):
    return body["messages"][0]["content"][-1]["text"]


def test_endpoint(server, record, monkeypatch):
    url, requests = server(lambda n, body: (200, longer(*shown(text_of(body)))))
    monkeypatch.setenv("OPENAI_BASE_URL", url + "/")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    args = flags(judge_model="some-model")
    score = judge.make(args)
    assert args.judge_url == url + "/" and KEY not in str(vars(args))
    texts = [["a", "bbbb"], ["ccccc", "d"], ["e", "e"], ["f", "g"]]
    alone = Record("row 1", None, ("Hello?", "Hello.", "Who is there?"))
    assert score([record, record, record, alone], texts) == [[-1, 1], [1, -1], [0, 0], [0, 0]]
    assert len(requests) == 6
    for path, headers, body in requests:
        assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
        assert body["model"] == "some-model" and body["temperature"] == 0
        *picture, _ = body["messages"][0]["content"]
        if picture:
            head, code = picture[0]["image_url"]["url"].split(",")
            file = Image.open(io.BytesIO(base64.b64decode(code)))
            assert (
                head == "data:image/jpeg;base64" and file.format == "JPEG" and file.size == (40, 28)
            )
        else:
            assert "User: Hello?\nAssistant: Hello.\nUser: Who is there?" in text_of(body)


def test_no_key_no_header(server, record):
    url, requests = server(lambda n, body: (200, "Better: equal"))
    assert judge.make(flags(judge_url=url, judge_model="m"))([record], [["a", "b"]]) == [[0, 0]]
    assert not any("Authorization" in headers for _, headers, _ in requests)


def test_a_reply_without_text_is_unreadable_and_not_asked_again(server, record):
    null = json.dumps({"choices": [{"message": {"content": None, "refusal": "no"}}]}).encode()
    url, requests = server(lambda n, body: (200, null))
    assert (
        judge.pairwise(judge.ask_endpoint(url, "m"))([record], [["a", "b"]]) == [[None, None]]
        and len(requests) == 2
    )


@pytest.mark.parametrize(
    "trouble",
    [
        (429, b"slow down"),
        (500, b"oops"),
        (503, b""),
        (200, b"{not json"),
        (200, b'{"choices": []}'),
        (200, b"[1]"),
        (200, b'"' + b"\xff" * 9),
    ],
)
def test_trouble_is_tried_again(server, record, trouble):
    url, requests = server(lambda n, body: trouble if n < 2 else (200, "Better: 1"))
    (reply,) = judge.ask_endpoint(url, "m", pause=0.01)([(record, "?")])
    assert reply.text == "Better: 1" and len(requests) == 3


def test_a_reply_is_bounded_and_counted(server, record):
    """Some servers know the bound by its new name alone; not all count tokens."""

    def respond(n, body):
        if "max_tokens" in body:
            return 400, b"Unsupported parameter: use 'max_completion_tokens' instead."
        content = {"choices": [{"message": {"content": "Better: 1"}}]}
        counts = {"prompt_tokens": 30, "completion_tokens": 4} if n % 2 else None
        return 200, json.dumps(content | {"usage": counts}).encode()

    url, requests = server(respond)
    ask = judge.ask_endpoint(url, "m", workers=1, pause=0.01, max_tokens=77)
    replies = list(ask([(record, "?")] * 3))
    assert texts_of(replies) == ["Better: 1"] * 3
    bodies = [body for _, _, body in requests]
    assert bodies[0]["max_tokens"] == 77 and bodies[-1]["max_completion_tokens"] == 77
    counted, alone = {"requests": 1, "tokens in": 30, "tokens out": 4}, {"requests": 1}
    assert [reply.usage for reply in replies] == [counted, alone, counted], "of requests 1 and 3"


def test_pauses_grow_and_heed_the_server(server, record):
    times = []
    respond = lambda n, body: (
        times.append(time.time()) or ((429, b"") if n < 3 else (200, "Better: 1"))
    )
    url, _ = server(respond)
    list(judge.ask_endpoint(url, "m", pause=0.05)([(record, "?")]))
    gaps = [b - a for a, b in zip(times, times[1:])]
    assert gaps[0] >= 0.05 and gaps[1] >= 0.1 and gaps[2] >= 0.2
    times.clear()
    url, _ = server(
        lambda n, body: (
            times.append(time.time())
            or ((429, b"", ("Retry-After", "1")) if n < 1 else (200, "Better: 1"))
        )
    )
    list(judge.ask_endpoint(url, "m", pause=0.01)([(record, "?")]))
    assert times[1] - times[0] >= 1


def test_no_pause_is_longer_than_a_minute(server, record, monkeypatch):
    """Whatever the server says, and however often it has failed."""
    waits = []

    class Stop(threading.Event):
        def wait(self, seconds):
            waits.append(seconds)

    monkeypatch.setattr(
        judge, "threading", SimpleNamespace(Event=Stop, Lock=threading.Lock, Timer=threading.Timer)
    )
    busy = [(429, b"", ("Retry-After", "3600")), (503, b""), (503, b"", ("Retry-After", "7"))]
    url, _ = server(lambda n, body: (busy + [(503, b"")] * 2)[n] if n < 5 else (200, "Better: 1"))
    assert texts_of(judge.ask_endpoint(url, "m", pause=10)([(record, "?")])) == ["Better: 1"]
    assert waits == [60, 20, 40, 60, 60]


def test_after_a_failure_one_may_ask_again(server, record):
    """With all its tries: the failure before does not cut them short."""
    replies = [(401, b"no"), (503, b""), (200, "Better: 1")]
    url, _ = server(lambda n, body: replies[n])
    ask = judge.ask_endpoint(url, "m", pause=0.01)
    with pytest.raises(judge.NoAnswer, match="status 401"):
        list(ask([(record, "?")]))
    assert texts_of(ask([(record, "?")])) == ["Better: 1"]


@pytest.mark.parametrize(
    "respond, words, count",
    [
        (
            lambda n, body: (503, b"down"),
            r"no answer after 3 tries, at last status 503 \(down\); --resume goes on",
            3,
        ),
        (
            lambda n, body: (200, b"<html>"),
            r"no answer after 3 tries, at last a reply that is no chat completion \(<html>\)",
            3,
        ),
        (
            lambda n, body: time.sleep(2) or (200, "Better: 1"),
            "no answer after 3 tries, at last no reply within 1 seconds",
            3,
        ),
        (
            lambda n, body: (401, b"Incorrect API key provided: " + KEY.encode()),
            r"status 401 \(.*provided: \*\*\*\)",
            1,
        ),
        (lambda n, body: (404, b"no such model"), r"status 404 \(no such model\)", 1),
        (lambda n, body: (400, b"too large"), r"status 400 \(too large\)", 1),
    ],
)
def test_an_endpoint_that_keeps_failing_stops_the_run(server, record, respond, words, count):
    url, requests = server(respond)
    timeout = 1 if "1 seconds" in words else 60  # a loaded machine may be slow without meaning it
    ask = judge.ask_endpoint(url, "m", KEY, timeout=timeout, tries=3, pause=0.01)
    with pytest.raises(judge.NoAnswer, match=words) as stopped:
        list(ask([(record, "?")]))
    assert KEY not in str(stopped.value) and len(requests) == count


def test_a_refused_question_among_others(server, record):
    """Its reply is the server's words; before the first answer it is held back."""
    respond = lambda n, body: (400, b"a filter") if "bad" in text_of(body) else (200, "Better: 1")
    url, _ = server(respond)
    words = judge.Reply(0, "status 400 (a filter)", {}, refused=True)
    asked = [(record, text) for text in ("bad", "bad", "good", "bad")]
    found = list(judge.ask_endpoint(url, "m", workers=1)(asked, answered=False))
    assert [reply.refused for reply in found] == [True, True, False, True] and found[0] == words
    assert list(judge.ask_endpoint(url, "m")([(record, "bad")], answered=True)) == [words]
    ask = judge.ask_endpoint(url, "m")  # it remembers an answer
    assert len([*ask([(record, "good")]), *ask([(record, "bad")], answered=False)]) == 2
    for answered in (None, False):
        with pytest.raises(judge.NoAnswer, match=r"status 400 \(a filter\); mend it, and --resume"):
            list(judge.ask_endpoint(url, "m")([(record, "bad")], answered))


@pytest.mark.parametrize("workers", [1, 4])
def test_the_first_questions_are_all_refused(server, record, workers):
    """A wrong flag, not a question: the run ends without going through the data."""
    url, requests = server(lambda n, body: (422, b"no such model"))
    found, asked = [], [(record, "?")] * 60
    with pytest.raises(judge.NoAnswer, match="status 422"):
        found.extend(judge.ask_endpoint(url, "m", workers=workers)(asked, answered=False))
    assert judge.FIRST <= len(requests) <= judge.FIRST + 2 * workers + 4 and not found


def test_an_interrupt_loses_no_reply(server, record):
    """Control-C while four requests are on their way: their replies come, no more is asked."""
    under_way = threading.Barrier(4, timeout=20)

    def respond(n, body):
        if under_way.wait() == 0:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)  # for the main thread, on a loaded machine
        return 200, "Better: 1"

    url, requests = server(respond)
    found = []
    # a shell starts background jobs with Ctrl-C ignored, and children inherit that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            found.extend(judge.ask_endpoint(url, "m", workers=4)([(record, "?")] * 20))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(requests) == len(found) == 4


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_of_the_whole_run(server, record, status):
    """Whatever was answered before."""
    url, _ = server(lambda n, body: (200, "Better: 1") if n < 3 else (status, b"no"))
    found = []
    with pytest.raises(judge.NoAnswer, match=f"status {status}"):
        ask = judge.ask_endpoint(url, "m", workers=1)
        found.extend(ask([(record, "?")] * 6, answered=True))
    assert not any(reply.refused for reply in found)


def test_nobody_there(record):
    with pytest.raises(
        judge.NoAnswer, match="no answer after 2 tries, at last ConnectionRefusedError"
    ):
        list(judge.ask_endpoint("http://127.0.0.1:9/v1", "m", tries=2, pause=0.01)([(record, "?")]))


def test_one_failure_ends_the_waiting_of_the_others(server, record):
    url, _ = server(lambda n, body: (401, b"") if "fatal" in text_of(body) else (429, b""))
    begin = time.time()
    ask = judge.ask_endpoint(url, "m", workers=4, pause=20)
    with pytest.raises(judge.NoAnswer, match="status 401"):
        list(ask([(record, "fatal")] + [(record, "?")] * 6))
    assert time.time() - begin < 5


def test_the_key_does_not_follow_a_redirect(server, record):
    other, there = server(lambda n, body: (200, "Better: 1"))
    for status in (301, 302, 307, 308):
        url, _ = server(
            lambda n, body, status=status: (status, b"", ("Location", other + "/chat/completions"))
        )
        with pytest.raises(judge.NoAnswer, match=f"status {status}"):
            list(judge.ask_endpoint(url, "m", KEY)([(record, "?")]))
    assert not there


def test_a_server_with_a_temperature_of_its_own(server, record):
    def respond(n, body):
        return (
            (400, b"'temperature' does not support 0")
            if "temperature" in body
            else (200, "Better: 1")
        )

    url, requests = server(respond)
    ask = judge.ask_endpoint(url, "m", pause=0.01, workers=2)
    assert texts_of(ask([(record, "?")] * 4)) == ["Better: 1"] * 4
    assert texts_of(ask([(record, "?")])) == ["Better: 1"]
    assert "temperature" not in requests[-1][2]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/v1",
        "host/v1",
        f"http://user:{KEY}@host/v1",
        f"https://host/v1?key={KEY}",
        "http://",
    ],
)
def test_urls_that_are_refused(url):
    with pytest.raises(BadInput, match="--judge-url: http") as refused:
        judge.ask_endpoint(url, "m")
    assert KEY not in str(refused.value)


def test_keys(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert judge.read_key() == ""
    (tmp_path / "key").write_text(KEY + "\n")
    assert judge.read_key(tmp_path / "key") == KEY
    for text, words in (
        ("", "holds no key"),
        (f"{KEY}\n{KEY}", "a key is one line"),
        (f"{KEY}é", "a key is one line"),
    ):
        (tmp_path / "key").write_text(text)
        with pytest.raises(BadInput, match=words) as refused:
            judge.read_key(tmp_path / "key")
        assert KEY not in str(refused.value)
    with pytest.raises(BadInput, match="not readable"):
        judge.read_key(tmp_path / "none")
    with pytest.raises(BadInput, match="needs --judge-url"):
        monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
        judge.make(flags())


@pytest.mark.parametrize("before", [185, 190])
@pytest.mark.parametrize("status", [401, 503, 200])
def test_no_part_of_the_key_is_shown_at_the_cut(server, record, status, before):
    """The key stands across the end of what is shown of the server's words."""
    url, _ = server(lambda n, body: (status, b"x" * (before - 1) + b" " + KEY.encode() + b" end"))
    with pytest.raises(judge.NoAnswer) as stopped:
        list(judge.ask_endpoint(url, "m", KEY, tries=1)([(record, "?")]))
    assert "x" * 50 in str(stopped.value) and KEY[:4] not in str(stopped.value)
