"""The one way through all evaluations: who answers, how they are asked, how a run goes on; intervals and differences."""

import json
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

import comparison
import evaluation
import judge
import memory
import sample
import sampling
from common import BadInput, Parser
from data import Record
from formats import adapters, checkpoints


@pytest.fixture
def pictures(tmp_path):
    """Three pictures of different shapes."""
    rng = np.random.default_rng(0)
    paths = []
    for i, size in enumerate(((28, 28), (40, 28), (28, 50))):
        paths.append(tmp_path / f"p{i}.png")
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(paths[-1])
    return paths


@pytest.fixture
def records(pictures):
    """Questions about three pictures in mixed order, one without a picture, one twice, a dialogue."""
    asked = [
        (0, "Is there a dog?"),
        (1, "Is there a cup on the table?"),
        (0, "Is there a dog on the left of the kitchen?"),
        (2, "Describe the image in detail."),
        (None, "What is a dog?"),
        (0, "What is in the picture?"),
        (1, "Is there a dog?"),
        (0, "Is there a dog?"),
    ]
    made = [
        Record(f"q{n}", None if i is None else pictures[i], (text,))
        for n, (i, text) in enumerate(asked)
    ]
    return [*made, Record("q8", pictures[1], ("Is there a dog?", "No.", "Why not?"))]


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """The folder of an adapter that changes what the checkpoint says."""
    model, _ = checkpoints.load(checkpoint)
    model.prepare(2)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    folder = tmp_path / "run" / "adapter"
    adapters.save_adapter(model, folder, checkpoint)
    return folder


# ---- asking


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_questions_of_an_image_together_are_answered_as_alone(llava, records, batch_size):
    """The image and what its questions begin with run once; the answers are those of one by one."""
    model, processor = llava
    want = [texts[0] for texts in sampling.generate(model, processor, records, 12, batch_size=1)]
    assert len(set(want)) > 3, "else a mix-up would not be seen"
    contestant = evaluation.in_memory(model, processor, batch_size)
    assert evaluation.answer(contestant, records, 12) == want
    assert contestant.asked == len(records) - 1 and contestant.seconds > 0


def test_one_process_alone_has_all_parts(llava, records):
    """`split` divides among processes; of one it changes nothing."""
    model, processor = llava
    texts = sampling.generate(model, processor, records, 8, batch_size=2)
    assert sampling.generate(model, processor, records, 8, batch_size=2, split=True) == texts


def test_an_image_is_encoded_once(llava, records, monkeypatch):
    model, processor = llava
    shown = []
    features = model.image_features
    monkeypatch.setattr(
        model,
        "image_features",
        lambda pixels, *a: shown.append(len(pixels)) or features(pixels, *a),
    )
    evaluation.answer(evaluation.in_memory(model, processor), records, 4)
    assert sum(shown) == 3
    shown.clear()
    evaluation.answer(evaluation.in_memory(model, processor, batch_size=1), records, 4)
    assert sum(shown) == 7, "one by one: a question is encoded alone"


def test_what_was_watched_is_what_decided(llava, records):
    """The logits of the watched first tokens, by a forward pass of the prompt alone."""
    model, processor = llava
    contestant = evaluation.in_memory(model, processor)
    rows = evaluation.replies(contestant, records, 3, watch=("Yes", "No"))
    ids = [processor.tokenise(" Yes")[0], processor.tokenise(" No")[0]]
    assert ids[0] != ids[1]
    for record, row in zip(records, rows):
        batch = processor.collate([processor.encode(record)])
        with torch.no_grad():
            h = model.hidden_states(batch)[0, len(processor.encode(record).prompt) - 1]
        want = (h @ model.head_weight().t())[ids]
        assert row["first"] == pytest.approx(want.tolist(), abs=1e-4)


def test_by_image_bounds_a_batch():
    class Example:
        def __init__(self, image, length):
            self.record = Record("", image, ("?",))
            self.prompt = torch.zeros(length)

    rng = random.Random(0)
    for _ in range(50):
        size = rng.randrange(1, 9)
        examples = [
            Example(rng.choice(["a", "b", "c", None]), rng.randrange(5, 30)) for _ in range(40)
        ]
        batches = evaluation.by_image(examples, size)
        assert sorted(i for batch in batches for row in batch for i in row) == list(range(40))
        for batch in batches:
            assert 0 < sum(map(len, batch)) <= size
            for row in batch:
                images = {examples[i].record.image for i in row}
                assert len(images) == 1 and (images != {None} or len(row) == 1)


def test_shared_start():
    prompts = [torch.tensor(p) for p in ([1, 2, 3, 4], [1, 2, 5], [1, 2])]
    start, given = evaluation.shared_start(prompts)
    assert start.tolist() == [1, 2]
    assert [(rest.tolist(), cuts) for rest, cuts in given] == [([3, 4], [2]), ([5], [1]), ([], [0])]


# ---- going on


def test_a_killed_run_asks_nothing_twice(llava, records, tmp_path, monkeypatch, capsys):
    model, processor = llava
    path = tmp_path / "replies.jsonl"
    want = evaluation.answer(evaluation.in_memory(model, processor), records, 6)

    asked = []
    whole = evaluation.ask_model

    def killed(contestant, records, *how):
        for n, part in enumerate(whole(contestant, records, *how)):
            if n == 2:
                raise KeyboardInterrupt
            asked.extend(evaluation.key_of(records[place]) for place, _ in part)
            yield part

    monkeypatch.setattr(evaluation, "ask_model", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluation.answer(evaluation.in_memory(model, processor, 2), records, 6, path)
    lines = path.read_text().splitlines()
    assert len(lines) == len(asked) > 1
    with open(path, "a") as file:
        file.write('{"image": nu')  # killed inside a line
    capsys.readouterr()

    def seen(contestant, records, *how):
        asked.extend(map(evaluation.key_of, records))
        return whole(contestant, records, *how)

    monkeypatch.setattr(evaluation, "ask_model", seen)
    assert evaluation.answer(evaluation.in_memory(model, processor, 2), records, 6, path) == want
    assert len(asked) == len(set(asked)) == len({evaluation.key_of(r) for r in records})
    assert f"line {len(lines) + 1}: half a line" in capsys.readouterr().err
    assert path.read_text().splitlines()[: len(lines)] == lines

    monkeypatch.setattr(evaluation, "ask_model", lambda *a: pytest.fail("asked again"))
    unloaded = evaluation.Contestant("x", load=lambda: pytest.fail("loaded for nothing"))
    assert evaluation.answer(unloaded, records, 6, path) == want


@pytest.mark.parametrize("name, ours", [("evaluation.json.tmp", True), ("evaluation.tmp", False)])
def test_a_run_killed_in_its_first_moment_begins_again(tmp_path, monkeypatch, name, ours):
    """Its settings are half written, and nothing else is in its folder."""
    (tmp_path / name).write_text('{"mod')
    monkeypatch.setattr("sys.argv", ["x", "--model", "m", "--out", str(tmp_path)])
    parser = Parser("An evaluation.")
    evaluation.add_flags(parser)
    parser.add_argument("--answers")
    args = parser.parse_args()
    if ours:
        evaluation.check_flags(args)
        evaluation.begin(tmp_path, {"model": "m"})
        assert [path.name for path in tmp_path.iterdir()] == [evaluation.SETTINGS]
    else:
        with pytest.raises(BadInput, match="exists and is not an empty folder"):
            evaluation.check_flags(args)


@pytest.mark.parametrize(
    "line, why",
    [
        (b"{}", "KeyError"),
        (b'{"image": null, "prompt": ["?"], "answer": 3}', "`answer` is no text"),
        (b"[", "JSONDecodeError"),
        (b'{"image": null, "prompt": ["?"], "answer": "\xff"}', "UnicodeDecodeError"),
    ],
)
def test_a_file_that_is_not_ours(tmp_path, line, why):
    good = json.dumps({"image": None, "prompt": ["?"], "answer": "."}).encode()
    path = tmp_path / "replies.jsonl"
    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(BadInput, match=f"replies.jsonl, line 2: no reply of ours .*{why}"):
        evaluation.read_replies(path)


def test_empty_answers_are_told(tmp_path, capsys):
    texts = ("", " Yes\n", " ")
    ask = lambda items: [judge.Reply(place, text) for place, text in enumerate(texts)]
    contestant = evaluation.Contestant("m", server=lambda tokens, temperature: ask)
    records = [Record("", None, (f"{i}?",)) for i in range(3)]
    assert evaluation.answer(contestant, records, 5) == ["", "Yes", ""]
    assert "m: 2 of 3 answers are empty" in capsys.readouterr().err


# ---- who answers


def parse(*words):
    parser = Parser("")
    evaluation.add_flags(parser)
    parser.add_argument("--answers", nargs="+")
    args = parser.parse_args(list(map(str, words)))
    evaluation.check_flags(args)
    return args


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "--model and --out are needed (or --endpoint and --out), or --answers"),
        ("--model m", "--model and --out are needed"),
        ("--answers a --model m", "do not go with it"),
        ("--answers a --endpoint http://x --endpoint-model m", "do not go with it"),
        ("--endpoint http://x --out o", "--endpoint and --endpoint-model go together"),
        ("--model m --endpoint-model n --out o", "--endpoint and --endpoint-model go together"),
        (
            "--endpoint http://x --endpoint-model n --adapter a --out o",
            "--adapter is for --model; none",
        ),
        (
            "--endpoint http://x --endpoint-model n --template plain --out o",
            "--template is for --model",
        ),
        ("--model m n --adapter a --out o", "--adapter with several --model"),
    ],
)
def test_flags_that_do_not_go_together(words, message):
    with pytest.raises(BadInput, match=re.escape(message)):
        parse(*words.split())


@pytest.mark.parametrize(
    "paths, names",
    [
        (["runs/dpo-0/adapter"], ["dpo-0"]),
        (["runs/dpo-0/adapter", "runs/bdhs-0/adapter"], ["dpo-0", "bdhs-0"]),
        (["llava-hf/llava-1.5-7b-hf", "runs/dpo-0/adapter"], ["llava-1.5-7b-hf", "dpo-0"]),
        (["a/x/model", "b/x/model"], ["a/x", "b/x"]),
        (["x/model", "x/adapter"], ["model", "adapter"]),
        (["adapter"], ["adapter"]),
        (["/m"], ["m"]),
    ],
)
def test_names_of(paths, names):
    assert evaluation.names_of(paths) == names


def test_a_contestant_given_twice():
    with pytest.raises(BadInput, match="a/b is given twice"):
        evaluation.names_of(["a/b", "c", "a/b"])


def test_a_folder_of_another_run_is_refused(checkpoint, tmp_path, capsys):
    """By the first thing that differs: questions, prompt, model, settings."""
    flags = ("--model", checkpoint, "--out", tmp_path / "out", "--device", "cpu")
    about = {"questions": {"q.json": "0123"}, "suffix": "?"}
    (one,) = evaluation.contestants(parse(*flags), about)
    assert one.name == checkpoint.name and one.path("replies.jsonl").parent == tmp_path / "out"
    evaluation.contestants(parse(*flags), about)
    assert "goes on" in capsys.readouterr().err
    for other, more, message in (
        (about | {"suffix": "!"}, (), "it was begun with about, suffix: '?', and here it is '!'"),
        (about | {"questions": {"q.json": "9"}}, (), "about, questions, q.json: '0123'"),
        (about | {"limit": 5}, (), "about, limit: None, and here it is 5"),
        (about, ("--template", "plain"), "template: None, and here it is 'plain'"),
        (about, ("--batch-size", "1"), "batch_size: 64, and here it is 1"),
        (about, ("--dtype", "bfloat16"), "dtype: 'float32', and here it is 'bfloat16'"),
        (about, ("--adapter", "none", "--endpoint", "http://x", "--endpoint-model", "m"), ", m: "),
    ):
        with pytest.raises(BadInput, match=re.escape(message)):
            evaluation.contestants(parse(*flags, *more), other)


def test_weights_that_changed_are_another_model(checkpoint, tmp_path):
    model, processor = checkpoints.load(checkpoint)
    checkpoints.save(model, processor, tmp_path / "m")
    flags = ("--model", tmp_path / "m", "--out", tmp_path / "out", "--device", "cpu")
    evaluation.contestants(parse(*flags), {})
    (tmp_path / "m").rename(tmp_path / "old")
    checkpoints.save(model, processor, tmp_path / "m")
    with pytest.raises(BadInput, match="contestants, m, files: "):
        evaluation.contestants(parse(*flags), {})


ADAPTED = (
    "the request goes to a model with an adapter, or to one given without --adapter; the base "
)
ADAPTED += "beside an adapter is asked plainly."
WISHES = "complexity=2,verbosity=2"
REQUEST = "\nHelpfulness:4,Correctness:4,Coherence:4,Complexity:2,Verbosity:2"


@pytest.mark.parametrize(
    "adapters_given, want",
    [(("none", "A"), ["", REQUEST]), (("none",), [""]), (("A",), [REQUEST]), ((), [REQUEST])],
)
def test_who_is_asked_for_attributes(adapter, checkpoint, tmp_path, adapters_given, want):
    given = [str(adapter) if name == "A" else name for name in adapters_given]
    flags = ["--model", checkpoint, *(["--adapter", *given] if given else [])]
    flags += ["--attributes", WISHES, "--out", tmp_path / "out", "--device", "cpu"]
    said = [one.load()[1].ask for one in evaluation.contestants(parse(*flags), {})]
    assert said == want
    settings = json.loads((tmp_path / "out" / "evaluation.json").read_text())["contestants"]
    asked = [bool(one["attributes"]) for one in settings.values()]
    assert asked == [bool(text) for text in want]


def test_answers_to_a_request_are_no_answers_without_one(adapter, checkpoint, tmp_path):
    """The base has the same name and folder, given alone and as `none`; only one is asked."""
    flags = ["--model", checkpoint, "--attributes", WISHES, "--device", "cpu"]
    flags += ["--out", tmp_path / "out"]
    evaluation.contestants(parse(*flags), {})
    message = f"contestants, {checkpoint.name}, attributes: {{'helpfulness': 4, "
    with pytest.raises(BadInput, match=f"{message}.*, and here it is None"):
        evaluation.contestants(parse(*flags, "--adapter", "none"), {})
    two = ("--adapter", "none", adapter, "--out", tmp_path / "two")
    evaluation.contestants(parse(*flags, *two), {})
    plain = [word for word in flags if word not in ("--attributes", WISHES)]
    with pytest.raises(BadInput, match="contestants, run, attributes: .*, and here it is None"):
        evaluation.contestants(parse(*plain, *two), {})


def test_the_rule_stands_in_the_same_words_where_it_is_looked_for():
    parser = Parser("")
    evaluation.add_flags(parser)
    texts = evaluation.__doc__, sample.__doc__, parser.format_help()
    assert all(
        ADAPTED in " ".join(text.split()).replace("The request", "the request") for text in texts
    )


# ---- intervals


def accuracy(sums):
    return {"accuracy": sums[..., 0] / np.maximum(1, sums[..., 1])}


def test_an_interval_is_that_of_a_mean():
    """Of one question an image the bootstrap agrees with the normal approximation."""
    rng = np.random.default_rng(1)
    right = rng.random(1000) < 0.8
    other = np.where(rng.random(1000) < 0.1, ~right, right)
    units = {n: np.stack([x, np.ones(1000)], 1) for n, x in (("a", right), ("b", other))}
    results = comparison.compare(units, accuracy)
    a, b = results["a"]["accuracy"], results["b"]["accuracy"]
    error = lambda x: 1.96 * np.std(x) / 1000**0.5
    assert a["value"] == right.mean() and b["value"] == other.mean()
    assert a["low"] == pytest.approx(right.mean() - error(right), abs=0.003)
    assert a["high"] == pytest.approx(right.mean() + error(right), abs=0.003)
    difference = other.astype(float) - right
    assert b["difference"] == pytest.approx(difference.mean())
    assert b["difference_low"] == pytest.approx(difference.mean() - error(difference), abs=0.003)
    assert b["difference_high"] == pytest.approx(difference.mean() + error(difference), abs=0.003)
    assert "difference" not in a
    assert comparison.compare(units, accuracy) == results, "the draws are seeded"


def test_the_middle_95_percent():
    assert comparison.interval(np.random.default_rng(0).permutation(1001)) == (25.0, 975.0)
    assert comparison.interval(np.array([3.0])) == (3.0, 3.0)


def test_draws_are_those_of_the_seed():
    units = {"a": np.random.default_rng(1).random((9, 2))}
    figures = lambda sums: {"sum": sums[..., 0]}
    of = lambda *seed: comparison.compare(units, figures, *seed)["a"]["sum"]
    assert of() == of(0) != of(1)
    assert of()["value"] == pytest.approx(units["a"][:, 0].sum())


def test_images_are_the_units():
    """Six equal answers about an image are one trial: the interval is that of the images."""
    rng = np.random.default_rng(2)
    right = rng.random(300) < 0.7
    one = comparison.compare({"a": np.stack([right, np.ones(300)], 1)}, accuracy)
    six = comparison.compare({"a": np.stack([6 * right, np.full(300, 6)], 1)}, accuracy)
    assert one == six


def test_intervals_of_little():
    units = {"a": np.array([[1.0, 1.0]]), "b": np.array([[0.0, 0.0]])}
    results = comparison.compare(units, accuracy)
    assert results["a"]["accuracy"] == {"value": 1, "low": 1, "high": 1}
    assert results["b"]["accuracy"]["difference"] == -1
    with pytest.raises(BadInput, match="the same units, 1 or more"):
        comparison.compare({"a": np.zeros((0, 2))}, accuracy)
    with pytest.raises(BadInput, match="the same units"):
        comparison.compare({"a": np.zeros((2, 2)), "b": np.zeros((3, 2))}, accuracy)


def test_columns_of_a_table_stand_under_each_other():
    """Also figures from 0 to 100 beside fractions."""
    units = {"base": np.array([[1, 1]] * 4 + [[0, 1]] * 4), "dpo": np.array([[1, 1]] * 8)}
    figures = lambda sums: accuracy(sums) | {"percent": 100 * accuracy(sums)["accuracy"]}
    head, *lines = comparison.table(comparison.compare(units, figures))
    starts = {line.index(" .. ", head.index("95 %")) for line in lines[::2]}
    assert all(line[head.index("95 %") - 1] == " " for line in lines)
    value = head.index("value") + len("value")
    assert all(line[value - 1].isdigit() and line[value] == " " for line in lines)
    assert max(starts) < head.index("minus base")
    minus = head.index("minus base") + len("minus base")
    assert all(line[minus - 1].isdigit() for line in lines[1::2])


def test_sheets_and_figures_of_several(tmp_path, capsys):
    names = ("base", "a/dpo", "ppo")
    asked = []
    comparison.sheets(tmp_path, names, "answers that differ", lambda *two: asked.append(two) or [])
    assert asked == [("base", "a/dpo"), ("base", "ppo")]
    assert {p.name for p in tmp_path.iterdir()} == {"changed-a-dpo.png", "changed-ppo.png"}
    assert "changed-ppo.png: base against ppo, 0 answers that differ" in capsys.readouterr().out
    comparison.write_figures(tmp_path / "one", {"base": {"f1": 1}}, {"base": {}})
    assert json.loads((tmp_path / "one/metrics.json").read_text()) == {"f1": 1}
    two = {"base": {"f1": 1}, "dpo": {"f1": 0}}
    comparison.write_figures(tmp_path / "one", two, {})
    assert json.loads((tmp_path / "one/metrics.json").read_text()) == two


def test_table_and_sheet(pictures, tmp_path):
    units = {"base": np.array([[1, 1]] * 4 + [[0, 1]] * 4), "dpo": np.array([[1, 1]] * 8)}
    lines = comparison.table(comparison.compare(units, accuracy), titles={"accuracy": "POPE"})
    assert (
        lines[0].split()[:2] == ["contestant", "value"] and "minus base  95 % interval" in lines[0]
    )
    assert lines[1].split()[:3] == ["POPE", "base", "0.5000"]
    assert lines[2].split()[:2] == ["dpo", "1.0000"] and lines[2].endswith("not 0")
    answers = [("base", "Yes " * 200, False), ("dpo", "No", True)]
    rows = [(pictures[i % 3] if i else None, "Is there a dog?", answers) for i in range(30)]
    assert comparison.sheet(tmp_path / "s.png", "base against dpo", rows) == 30
    with Image.open(tmp_path / "s.png") as page:
        assert page.size == (2 * comparison.WIDTH, 34 + 12 * comparison.HEIGHT)
    assert comparison.sheet(tmp_path / "none.png", "base against dpo", []) == 0


# ---- models and adapters


def test_each_contestant_answers_for_itself(checkpoint, records, tmp_path):
    """The checkpoint alone, with one adapter and with another: what each says when it is loaded alone."""
    folders = ["none"]
    for i in (1, 2):
        model, _ = checkpoints.load(checkpoint)
        model.prepare(2)
        torch.manual_seed(i)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.3)
        folders.append(str(tmp_path / f"run{i}" / "adapter"))
        adapters.save_adapter(model, folders[-1], checkpoint)
    flags = "--model", checkpoint, "--adapter", *folders, "--out", tmp_path / "out"
    said = {}
    for contestant in evaluation.contestants(parse(*flags, "--device", "cpu"), {}):
        path = contestant.path("replies.jsonl")
        assert path == tmp_path / "out" / contestant.name / "replies.jsonl"
        said[contestant.name] = evaluation.answer(contestant, records, 8, path)
        contestant.release()
        assert contestant.loaded is None
    assert list(said) == [checkpoint.name, "run1", "run2"]
    for folder, texts in zip(folders, said.values()):
        model, processor = checkpoints.load(checkpoint)
        if folder != "none":
            adapters.load_adapter(model, folder)
        assert texts == [one for (one,) in sampling.generate(model, processor, records, 8)]
    assert len(set(map(tuple, said.values()))) == 3


# ---- answers side by side in one row of the cache


@pytest.mark.parametrize("config", [{}, {"kind": "mistral", "sliding_window": 8}])
def test_in_rows_nothing_changes_but_the_memory(build, config, monkeypatch):
    """Rows of one to four answers, some ended early: tokens, log-probs and ends as by `decode`."""
    model = build(**config, seed=3)
    torch.manual_seed(0)
    draw = lambda n: torch.randint(3, 90, (n,))
    image = torch.full((4,), model.image_token_id)
    prompts = [torch.cat([draw(3), image, draw(2)]), draw(9), torch.cat([image, draw(5)])]
    texts = [[draw(4), draw(1), draw(6)], [draw(0)], [draw(5), draw(2), draw(2), draw(3)]]
    given = [[(text, [len(text)]) for text in some] for some in texts]
    pixels = torch.randn(2, 3, 28, 28)

    caches = []

    class Watched(sampling.KVCache):
        def __init__(self, slots):
            super().__init__(slots)
            caches.append(self)

    monkeypatch.setattr(sampling, "KVCache", Watched)
    how = {"max_new_tokens": 7, "temperature": 0, "given": given, "watch": (5, 6)}
    free = sampling.sample(model, prompts, pixels, **how)
    stops = {int(free.tokens[0][1][2]), int(free.tokens[2][3][4])}
    want = sampling.sample(model, prompts, pixels, stop_ids=stops, **how)
    ends = [len(ids) for row in want.tokens for ids in row]
    assert min(ends) < 4 and max(ends) == 7, "else no answer ends before another"
    got = sampling.sample(model, prompts, pixels, stop_ids=stops, in_rows=True, **how)
    for one, other in zip(want.tokens, got.tokens, strict=True):
        assert [ids.tolist() for ids in one] == [ids.tolist() for ids in other]
    assert got.finished == want.finished and {True, False} == set(sum(got.finished, []))
    for name in ("log_probs", "first"):
        for one, other in zip(getattr(want, name), getattr(got, name), strict=True):
            for a, b in zip(one, other, strict=True):
                assert torch.allclose(a, b, atol=1e-4), name

    L = max(len(p) + sum(map(len, some)) for p, some in zip(prompts, texts))
    held = sum(x.nbytes for stored in (caches[-1].keys, caches[-1].values) for x in stored)
    assert held == 3 * (L + 4 * 7) * memory.cache_bytes(model)


def test_memory_of_answers_in_rows(build):
    """The cache of 11 prompts with room for 6 answers each is there from the prefill on."""
    model = build()  # D 64, inner size 96, 2 blocks, 2 key heads of 16, float32
    B, L, new, T = 11, 621, 16, 11 * 621
    token = 2 * 2 * 2 * 16 * 4
    assert memory.cache_bytes(model) == token
    cache = B * (L + 6 * new) * token
    activations = T * (3 * 4 * 96 + 3 * 4 * 64 + 8 * 64) + 2 * B * L**2
    want = T * 4 * 64 + cache + activations
    assert memory.sampling(model, B, 6 * B, L, new, in_rows=6) == want
    longer = memory.sampling(model, B, 6 * B, L, new + 1000, in_rows=6)
    assert longer - want == B * 6 * 1000 * token


def test_short_answers_alone_are_drawn_in_rows(llava, records, monkeypatch):
    model, processor = llava
    seen, whole = [], sampling.sample
    watch = lambda *args, **how: seen.append(how["in_rows"]) or whole(*args, **how)
    monkeypatch.setattr(evaluation, "sample", watch)
    for new, temperature, want in ((32, 0.0, True), (33, 0.0, False), (4, 0.5, False)):
        seen.clear()
        contestant = evaluation.in_memory(model, processor)
        evaluation.answer(contestant, records, new, temperature=temperature)
        assert set(seen) == {want}
