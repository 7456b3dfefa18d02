"""LLaVA-NeXT against transformers: geometry, pixels, logits, greedy answers, every naming, adapters."""

import json
import re
import sys
import warnings

import pytest
import test_checkpoints
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from test_checkpoints import (
    IMAGE_ID,
    NAMINGS,
    PATCH,
    SIDE,
    clip_config,
    edit,
    llm_config,
    scatter,
    tiny_tokenizer,
    write,
)

import dpo
import evaluation
import grpo
import sampling
import sft
from common import BadInput
from data import TEMPLATES, Record
from formats import files
from formats.adapters import load_adapter, save_adapter
from formats.anyres import AnyRes
from formats.checkpoints import load, save
from lora import add_adapter
from model import pack

DEFAULT = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
TINY = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))  # of 28 pixels, 4 patches a side
SHAPES = (
    (40, 60),
    (60, 40),
    (28, 28),
    (20, 100),
    (100, 19),
    (100, 100),
    (33, 47),
    (5, 90),
    (90, 2),
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny_next(kind="llama", **more):
    config = transformers.LlavaNextConfig(
        vision_config=clip_config(),
        text_config=llm_config(kind, **more),
        image_token_index=IMAGE_ID,
        image_grid_pinpoints=[list(p) for p in TINY],
    )
    return scatter(transformers.LlavaNextForConditionalGeneration(config))


@pytest.fixture(scope="module")
def hf():
    torch.manual_seed(1)
    return tiny_next()


@pytest.fixture(scope="module")
def folder(hf, tmp_path_factory):
    return write(tmp_path_factory.mktemp("next") / "H", hf, chatml=False)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A file of noise in each of SHAPES."""
    folder = tmp_path_factory.mktemp("pictures")
    for h, w in SHAPES:
        noise(h, w).save(folder / f"{h}x{w}.png")
    return [folder / f"{h}x{w}.png" for h, w in SHAPES]


def noise(h, w):
    return Image.merge("RGB", [Image.effect_noise((w, h), 90) for _ in range(3)])


def examples(processor, pictures):
    """A row of each picture and two of text alone, with two answers."""
    images = [None, *pictures[:4], None, *pictures[4:]]
    answers = ("A cup.", "Two red cups on a table."), ("No", "Yes, there is a dog.")
    return [
        processor.encode(
            Record(f"row {i}", image, ("What is this?" * (1 + i % 3),), answers[i % 2])
        )
        for i, image in enumerate(images)
    ]


def their_logits(theirs, ids, pixel_values, image_sizes):
    with torch.no_grad():
        return theirs(
            input_ids=ids[None],
            attention_mask=torch.ones_like(ids)[None],
            pixel_values=pixel_values,
            image_sizes=image_sizes,
        ).logits[0]


def one_by_one(processor, theirs, example, k=0):
    """transformers' logits of prompt + answer k, alone, with its own image processor."""
    ids = torch.cat([example.prompt, example.answers[k]])
    if example.record.image is None:
        return their_logits(theirs, ids, None, None)
    return their_logits(
        theirs, ids, *their_pixels(processor, files.open_image(example.record.image))
    )


def their_pixels(processor, picture):
    square = {"size": {"shortest_edge": processor.image_size}, "crop_size": processor.image_size}
    grid = [list(p) for p in processor.anyres.pinpoints]
    out = transformers.LlavaNextImageProcessorPil(**square, image_grid_pinpoints=grid)(
        picture, return_tensors="pt"
    )
    return out["pixel_values"], out["image_sizes"]


def our_logits(model, rows, pixel_values, image_sizes):
    with torch.no_grad():
        return model.llm.lm_head(
            model.hidden_states(
                pack(rows, [[]] * len(rows), None, pixel_values, image_sizes=image_sizes)
            )
        )


# ---- geometry and pixels


@pytest.mark.parametrize(
    "size, tokens",
    [
        ((480, 640), 2340),
        ((640, 480), 2352),
        ((336, 336), 1176),
        ((426, 640), 2144),
        ((200, 1000), 1598),
        ((1000, 1000), 2928),
    ],
)
def test_tokens_of_the_public_checkpoints(size, tokens):
    assert AnyRes(DEFAULT, 336, 24).tokens(size) == tokens


def test_geometry_is_that_of_transformers():
    """Thousands of shapes: pinpoint, tokens by its processor, tokens by its model."""
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    ours = AnyRes(DEFAULT, 336, 24)
    count = transformers.LlavaNextProcessor._get_unpadded_features
    generator = torch.Generator().manual_seed(0)
    shapes = torch.randint(1, 1400, (3000, 2), generator=generator).tolist()
    old = 0
    for h, w in [
        *shapes,
        *((n, n) for n in range(1, 700, 7)),
        *((n, 3 * n) for n in range(1, 700, 7)),
    ]:
        best = select_best_resolution((h, w), [list(p) for p in DEFAULT])
        assert ours.fit((h, w)) == best
        rows, columns = best[0] // 336, best[1] // 336
        assert ours.tokens((h, w)) == 576 + sum(count(None, h, w, 24, 24, rows, columns))
        left = unpad_image(torch.zeros(1, rows * 24, columns * 24), (h, w)).shape
        assert ours.tokens((h, w)) == 576 + left[1] * (left[2] + 1)
        scaled = (w * (rows * 24 / h)) if w / h <= columns / rows else (h * (columns * 24 / w))
        old += int(scaled) != int(round(scaled, 7))
    assert old, "shapes where older versions round otherwise are not among them"


@pytest.mark.parametrize("grid, tile", [(TINY, SIDE), (DEFAULT, 336)])
def test_pixels_are_those_of_transformers(folder, grid, tile):
    _, processor = load(folder)
    processor.anyres, processor.image_size = AnyRes(grid, tile, 4), tile
    for h, w in [*SHAPES, (101, 150), (337, 335)]:
        picture = noise(h, w)
        theirs, size = their_pixels(processor, picture)
        for aspect in ("pad", "checkpoint"):
            processor.image_aspect = aspect
            ours = processor.pixels(picture)
            assert ours.shape == theirs[0].shape
            assert (ours - theirs[0]).abs().max() <= 1e-6
        assert size.tolist() == [[h, w]]


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("turn", [None, 1, 3, 6, 8])
def test_a_picture_s_size_is_known_without_decoding(tmp_path, kind, turn):
    exif = Image.Exif()
    if turn:
        exif[0x0112] = turn
    noise(20, 50).save(tmp_path / f"p.{kind}", exif=exif)
    picture = files.open_image(tmp_path / f"p.{kind}")
    assert files.image_size(tmp_path / f"p.{kind}") == (picture.height, picture.width)
    assert (picture.height > picture.width) == (turn in (6, 8))


# ---- the same numbers


@pytest.mark.parametrize(
    "kind, more", [("llama", {}), ("mistral", {"sliding_window": 20}), ("qwen2", {}), ("qwen3", {})]
)
def test_logits_of_a_batch_of_shapes(tmp_path, pictures, kind, more):
    theirs = tiny_next(kind, **more)
    model, processor = load(write(tmp_path / "m", theirs, chatml=False))
    rows = examples(processor, pictures)
    texts = [torch.cat([e.prompt, e.answers[0]]) for e in rows]
    batch = processor.collate(rows)
    assert len(batch.pixel_values) == sum(
        1 + len(processor.anyres.tiles(files.open_image(p))) - 1 for p in pictures
    )
    assert batch.image_sizes.tolist() == [list(s) for s in SHAPES]
    ours = our_logits(model, texts, batch.pixel_values, batch.image_sizes)
    assert len({int((e.prompt == IMAGE_ID).sum()) for e in rows}) > 5
    for b, e in enumerate(rows):
        want = one_by_one(processor, theirs, e)
        assert (ours[b, : len(want)] - want).abs().max() <= 1e-5, e.record.image
        assert want.std() > 0.3
    stacked = [their_pixels(processor, files.open_image(p)) for p in pictures[:2]]
    swapped = our_logits(model, texts[1:2], stacked[0][0][0].flip(0), stacked[0][1])
    assert (swapped[0] - ours[1, : len(swapped[0])]).abs().max() > 1e-2, (
        "the order of the tiles does not matter"
    )

    with torch.no_grad():  # both answers behind one prompt, one picture: what training sees
        log_p = model.answer_log_probs(batch).view(-1, 2)
    for b, e in enumerate(rows):
        for k, answer in enumerate(e.answers):
            logits = one_by_one(processor, theirs, e, k)[len(e.prompt) - 1 : -1].log_softmax(-1)
            assert log_p[b, k].item() == pytest.approx(
                logits.gather(-1, answer[:, None]).sum().item(), rel=1e-5
            )


def test_greedy_answers_are_those_of_generate(folder, hf, pictures):
    model, processor = load(folder)
    records = [
        Record("r", image, ("What is this?" * n,), ())
        for n, image in enumerate([None, *pictures], 1)
    ]
    rows = [processor.encode(r) for r in records]
    pixel_values, image_sizes = processor.images(rows)
    samples = sampling.sample(
        model,
        [e.prompt for e in rows],
        pixel_values,
        2,
        12,
        0,
        processor.stop_ids,
        image_sizes=image_sizes,
    )
    texts = sampling.generate(model, processor, records, 12, batch_size=4)
    seen = set()
    for e, tokens, text in zip(rows, samples.tokens, texts):
        inputs = {"input_ids": e.prompt[None], "attention_mask": torch.ones_like(e.prompt)[None]}
        if e.record.image is not None:
            inputs["pixel_values"], inputs["image_sizes"] = their_pixels(
                processor, files.open_image(e.record.image)
            )
        how = {
            "do_sample": False,
            "max_new_tokens": 12,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "suppress_tokens": [IMAGE_ID],
        }
        out = hf.generate(**inputs, **how)[0, len(e.prompt) :]
        assert tokens[0].tolist() == tokens[1].tolist() == out.tolist()
        assert text == [processor.text(out)]
        seen |= set(out.tolist())
    assert len(seen) > 5


def test_an_image_that_changes_its_size_after_encoding_is_refused(folder, tmp_path):
    """Its tokens are counted when the prompt is made; on a GPU nothing else would notice."""
    _, processor = load(folder)
    Image.new("RGB", (40, 60)).save(tmp_path / "a.png")
    example = processor.encode(Record("row 7", tmp_path / "a.png", ("What?",), ("A",)))
    room = int((example.prompt == IMAGE_ID).sum())
    Image.new("RGB", (100, 20)).save(tmp_path / "a.png")
    takes = processor.anyres.tokens((20, 100))
    assert takes != room
    with pytest.raises(BadInput, match=f"row 7: the image takes {takes} .* room for {room}"):
        processor.images([example])


def test_features_and_tokens_must_agree_in_every_row(folder, pictures):
    model, processor = load(folder)
    a, b = (
        processor.encode(Record("r", p, ("What?",), ("A",))) for p in (pictures[0], pictures[2])
    )
    pixel_values, image_sizes = processor.images([a, b])
    pixels = lambda e: int((e.prompt == IMAGE_ID).sum())
    both = pixels(a) + pixels(b)
    message = re.escape(
        f"{both} image tokens in the text against {both} image features "
        f"(of rows with an image: {[pixels(b), pixels(a)]}, of images: {[pixels(a), pixels(b)]})"
    )
    with pytest.raises(BadInput, match=message):  # as many in all, in the wrong rows
        our_logits(model, [b.prompt, a.prompt], pixel_values, image_sizes)
    with pytest.raises(
        BadInput,
        match=f"{pixels(a)} image tokens in the text against {both} image",
    ):
        our_logits(model, [a.prompt], pixel_values, image_sizes)
    with pytest.raises(BadInput, match="tiles, but images of these heights and widths have"):
        our_logits(model, [a.prompt, b.prompt], pixel_values[1:], image_sizes)


# ---- on disk


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_gives_the_same_weights(tmp_path, hf, naming):
    model, processor = load(write(tmp_path / naming, hf, naming, chatml=False))
    ours, theirs = model.state_dict(), hf.state_dict()
    assert torch.equal(ours.pop("image_newline"), theirs.pop("model.image_newline"))
    names = {"vision.": "model.vision_tower.", "projector.": "model.multi_modal_projector.",
             "llm.model.": "model.language_model.", "llm.lm_head.": "lm_head."}  # fmt: skip
    assert len(ours) == len(theirs)
    for name, tensor in ours.items():
        old = next(k for k in names if name.startswith(k))
        assert torch.equal(tensor, theirs[names[old] + name[len(old) :]]), name
    assert processor.anyres == AnyRes(TINY, SIDE, SIDE // PATCH)


@pytest.mark.parametrize("template", TEMPLATES)
def test_transformers_reads_what_is_saved(tmp_path, folder, pictures, template):
    model, processor = load(
        write(tmp_path / "m", tiny_next(tie_word_embeddings=template == "plain")), template=template
    )
    save(model, processor, tmp_path / "out")
    theirs, info = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), info
    assert "image_newline" in load_file(tmp_path / "out" / "model.safetensors")
    whole = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(whole).__name__ == "LlavaNextProcessor"
    for e in examples(processor, pictures)[1:4]:
        chat = [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": e.record.turns[0]}],
            }
        ]
        text = whole.apply_chat_template(chat, add_generation_prompt=True)
        inputs = whole(images=files.open_image(e.record.image), text=text, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == e.prompt.tolist()
        assert (inputs["pixel_values"][0] - processor.pixels(e.record.image)).abs().max() <= 1e-6
        want = their_logits(
            theirs.eval(), inputs["input_ids"][0], inputs["pixel_values"], inputs["image_sizes"]
        )
        assert (our_logits(model, [e.prompt], *processor.images([e]))[0] - want).abs().max() <= 1e-5
    again, other = load(tmp_path / "out")
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())
    )
    assert other.anyres == processor.anyres and other.template == template


@pytest.mark.parametrize(
    "values, message",
    [
        ({"image_grid_pinpoints": [[28, 50]]}, "multiples of 28"),
        ({"image_grid_pinpoints": []}, "multiples of 28"),
        ({"vision_feature_select_strategy": "full"}, "'default' for LLaVA-NeXT"),
        ({"model_type": "llava"}, "unexpected: image_newline"),
    ],
)
def test_a_config_it_cannot_compute_is_refused(tmp_path, hf, values, message):
    new = write(tmp_path / "m", hf)
    edit(new / "config.json", **values)
    with pytest.raises(BadInput, match=message):
        load(new)


def test_processor_and_model_with_other_tiles_are_refused(tmp_path, hf):
    new = write(tmp_path / "m", hf)
    (new / "preprocessor_config.json").write_text(json.dumps({"image_grid_pinpoints": [[28, 28]]}))
    with pytest.raises(BadInput, match="for the processor and"):
        load(new)


def test_adapter_round_trip_through_peft(tmp_path, folder, pictures):
    peft = pytest.importorskip("peft")
    model, processor = load(folder)
    rows = examples(processor, pictures)[1:4]
    base = our_logits(model, [e.prompt for e in rows], *processor.images(rows))
    model.prepare(llm=False)
    add_adapter(model.llm, "policy", 4, 6)
    assert not model.image_newline.requires_grad
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    ours = our_logits(model, [e.prompt for e in rows], *processor.images(rows))
    assert (ours - base).abs().max() > 0.1
    save_adapter(model, tmp_path / "a", folder)
    again = load_adapter(load(folder)[0], tmp_path / "a")
    assert torch.equal(our_logits(again, [e.prompt for e in rows], *processor.images(rows)), ours)
    with again.reference():
        assert torch.equal(
            our_logits(again, [e.prompt for e in rows], *processor.images(rows)), base
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = transformers.LlavaNextForConditionalGeneration.from_pretrained(folder)
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    for b, e in enumerate(rows):
        want = their_logits(
            theirs, e.prompt, *their_pixels(processor, files.open_image(e.record.image))
        )
        assert (ours[b, : len(want)] - want).abs().max() <= 1e-5
    theirs.save_pretrained(tmp_path / "b")
    back = load_adapter(load(folder)[0], tmp_path / "b")
    assert torch.equal(our_logits(back, [e.prompt for e in rows], *processor.images(rows)), ours)


# ---- checkpoints of LLaVA's own code: names and config written out by hand

WORDS = 261  # of the tokenizer as LLaVA has it; <image> and <pad> come behind them
ORIGINAL = {
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.language_model.": "model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
}


def as_original(theirs):
    """The state dict of a transformers model under LLaVA's names, the rows of <image> and <pad> cut off."""
    out = {}
    for name, tensor in theirs.state_dict().items():
        old = next((k for k in ORIGINAL if name.startswith(k)), "")
        rows = WORDS if name.endswith(("embed_tokens.weight", "lm_head.weight")) else None
        out[ORIGINAL.get(old, "") + name[len(old) :]] = tensor[:rows].clone()
    return out


def original_model(next_, kind="llama", **more):
    """A transformers model that an original can have become: two more rows, the mean of the others; <image> is the first."""
    common = {
        "vision_config": clip_config(),
        "text_config": llm_config(kind, vocab_size=WORDS + 2, **more),
        "image_token_index": WORDS,
    }
    if next_:  # TINY is for LLaVA (width, height): the first two change places
        config = transformers.LlavaNextConfig(
            **common, image_grid_pinpoints=[[h, w] for w, h in TINY]
        )
        theirs = scatter(transformers.LlavaNextForConditionalGeneration(config))
    else:
        theirs = scatter(
            transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**common))
        )
    with torch.no_grad():
        for layer in (theirs.get_input_embeddings(), theirs.get_output_embeddings()):
            layer.weight[WORDS:] = layer.weight[:WORDS].mean(0)
    return theirs


def original_config(theirs, tower, **values):
    next_ = hasattr(theirs.config, "image_grid_pinpoints")
    text = theirs.config.text_config.to_dict() | {"vocab_size": WORDS}
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen"}[text["model_type"]]
    anyres = {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": str([list(p) for p in TINY]),
        "image_crop_resolution": 224,
    }
    return text | {
        "architectures": [f"Llava{kind}ForCausalLM"],
        "model_type": f"llava_{kind.lower()}",
        "use_mm_proj": True,
        "mm_vision_tower": str(tower),
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 32,
        "mm_projector_lr": None,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 2048,
        "image_aspect_ratio": "pad",
        **(anyres if next_ else {}),
        **values,
    }


def write_original(
    folder, theirs, tower, parts=("tower", "llm", "projector"), tokenizer=None, **values
):
    """parts: which weights are in the folder. tower: the folder of mm_vision_tower, written here if it is not there yet."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(original_config(theirs, tower, **values)))
    tiny_tokenizer(image=False, chatml=False, **(tokenizer or {})).save_pretrained(folder)
    tensors = as_original(theirs)
    kinds = {
        "tower": "model.vision_tower",
        "projector": ("model.mm_projector", "model.image_newline"),
    }
    for part, names in kinds.items():
        if part not in parts:
            tensors = {k: v for k, v in tensors.items() if not k.startswith(names)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if not tower.exists():
        same = transformers.CLIPVisionModel(clip_config())
        names = {
            k.removeprefix("model.vision_tower."): v
            for k, v in theirs.state_dict().items()
            if "vision_tower" in k
        }
        if "tower" not in parts:
            same.load_state_dict(names)
        same.save_pretrained(tower)
    return folder


def agree(folder, theirs, pictures, template="vicuna_v1"):
    """Loading `folder` gives the logits of `theirs`, alone and in a batch -> (model, processor)."""
    model, processor = load(folder)
    assert processor.template == template and processor.image_token_id == WORDS
    rows = examples(processor, pictures)
    pixel_values, image_sizes = processor.images(rows)
    ours, at = our_logits(model, [e.prompt for e in rows], pixel_values, image_sizes), 0
    for b, e in enumerate(rows):
        inputs = {"input_ids": e.prompt[None], "attention_mask": torch.ones_like(e.prompt)[None]}
        if e.record.image is not None:
            inputs["pixel_values"] = processor.pixels(e.record.image)[None]
            if processor.anyres:
                inputs["image_sizes"] = image_sizes[at : at + 1]
            at += 1
        with torch.no_grad():
            want = theirs(**inputs).logits[0]
        assert (ours[b, : len(want)] - want).abs().max() <= 3e-5  # 1.04e-5 was seen: rounding
        assert want.std() > 0.3
    return model, processor


@pytest.mark.parametrize(
    "next_, kind, inside, template, more",
    [
        (False, "llama", False, "vicuna_v1", {}),
        (False, "llama", True, "vicuna_v1", {"model_type": "llava"}),
        (True, "llama", True, "vicuna_v1", {}),
        (True, "mistral", True, "mistral", {"image_grid_pinpoints": [list(p) for p in TINY]}),
        (True, "qwen2", False, "vicuna_v1", {}),
    ],
)
def test_original_checkpoints(tmp_path, pictures, next_, kind, inside, template, more):
    rope = (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
        if kind == "mistral"
        else {}
    )
    theirs = original_model(next_, kind, **rope)
    parts = ("tower", "llm", "projector") if inside else ("llm", "projector")
    new = write_original(tmp_path / "m", theirs, tmp_path / "clip", parts, **more)
    model, processor = agree(new, theirs, pictures, template)
    save(model, processor, tmp_path / "hub")
    name = "LlavaNextForConditionalGeneration" if next_ else "LlavaForConditionalGeneration"
    again, info = getattr(transformers, name).from_pretrained(
        tmp_path / "hub", output_loading_info=True
    )
    assert not any(info.values()), info
    assert (
        agree(tmp_path / "hub", again.eval(), pictures, template)[1].tokenizer.pad_token == "<pad>"
    )


def test_chatml_for_a_tokenizer_that_knows_it(tmp_path):
    """LLaVA-1.6-34b."""
    new = write_original(tmp_path / "m", original_model(True), tmp_path / "clip")
    tiny_tokenizer(image=False, chatml=True, bos=False).save_pretrained(new)
    _, processor = load(new)
    assert processor.template == "chatml"
    text = processor.tokenizer.decode(
        processor.encode(Record("r", None, ("Why?",), ("So.",))).prompt
    )
    assert (
        text
        == "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n"
    )


def test_original_projector_beside_an_llm(tmp_path, pictures):
    theirs = original_model(False)
    llm = write_original(tmp_path / "llm", theirs, tmp_path / "clip", ("llm",))
    (llm / "config.json").write_text(json.dumps(theirs.config.text_config.to_dict()))
    new = tmp_path / "projector"
    new.mkdir()
    (new / "config.json").write_text(
        json.dumps(original_config(theirs, tmp_path / "clip", _name_or_path=str(llm)))
    )
    tensors = {k: v for k, v in as_original(theirs).items() if "mm_projector" in k}
    save_file(tensors, new / "mm_projector.safetensors")
    agree(new, theirs, pictures)
    edit(new / "config.json", _name_or_path=None)
    with pytest.raises(
        BadInput,
        match="_name_or_path is None; the folder or hub id of the model below this mm_projector",
    ):
        load(new)
    (new / "mm_projector.safetensors").rename(new / "mm_projector.bin")
    with pytest.raises(
        BadInput,
        match=r"mm_projector.bin instead of .*save_file\(torch.load\(BIN, weights_only=True\)",
    ):
        load(new)


@pytest.mark.parametrize(
    "next_, base_has", [(False, ("llm",)), (True, ("tower", "llm", "projector"))]
)
def test_original_lora(tmp_path, pictures, next_, base_has):
    theirs = original_model(next_)
    base = write_original(tmp_path / "base", theirs, tmp_path / "clip", base_has)
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "config.json").write_text(json.dumps(original_config(theirs, tmp_path / "clip")))
    config = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 6,
        "base_model_name_or_path": str(base),
        "target_modules": ["q_proj"],
    }
    (lora / "adapter_config.json").write_text(json.dumps(config))
    adapter, trained = {}, {}
    with torch.no_grad():
        for i, layer in enumerate(theirs.model.language_model.layers):
            for name, module in (
                ("self_attn.q_proj", layer.self_attn.q_proj),
                ("mlp.up_proj", layer.mlp.up_proj),
            ):
                a, b = (
                    torch.randn(3, module.in_features) * 0.2,
                    torch.randn(module.out_features, 3) * 0.2,
                )
                module.weight += 2 * b @ a
                key = f"base_model.model.model.layers.{i}.{name}.lora_"
                adapter |= {f"{key}A.weight": a, f"{key}B.weight": b}
        theirs.model.multi_modal_projector.linear_1.weight += 0.1
        for k, v in as_original(theirs).items():
            if "mm_projector" in k:
                trained[f"base_model.model.{k}"] = v
    save_file(adapter, lora / "adapter_model.safetensors")
    save_file(trained, lora / "non_lora_trainables.safetensors")
    model, _ = agree(lora, theirs, pictures)
    assert not any("lora" in n for n in model.state_dict())
    (lora / "non_lora_trainables.safetensors").rename(lora / "non_lora_trainables.bin")
    with pytest.raises(
        BadInput, match="non_lora_trainables.bin instead of non_lora_trainables.safetensors"
    ):
        load(lora)


def test_original_shards_converted_one_by_one(tmp_path, pictures):
    theirs = original_model(True)
    new = write_original(tmp_path / "m", theirs, tmp_path / "clip")
    tensors = load_file(new / "model.safetensors")
    for i, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        save_file({n: tensors[n] for n in names}, new / f"model-{i:05d}-of-00002.safetensors")
    (new / "model.safetensors").rename(new / "pytorch_model.bin")
    (new / "pytorch_model.bin.index.json").write_text("{}")
    agree(new, theirs, pictures[:2])
    (new / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadInput, match="missing: "):
        load(new)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "llava_mpt"}, "model_type of the original LLaVA is 'llava_mpt'"),
        ({"mm_projector_type": "linear"}, "mm_projector_type of the original LLaVA is 'linear'"),
        (
            {"image_aspect_ratio": "highres"},
            "image_aspect_ratio of the original LLaVA is 'highres'",
        ),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type .* accepted is 'spatial_unpad'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end .* accepted is false"),
        ({"image_grid_pinpoints": "__import__('os')"}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": "[[28, 56], [56]]"}, "image_grid_pinpoints"),
        ({"mm_vision_tower": "nowhere"}, "nowhere: no such folder"),
        ({"num_hidden_layers": 3}, "missing: language_model.model.layers.2"),
    ],
)
def test_an_original_it_cannot_compute_is_refused(tmp_path, values, message):
    new = write_original(tmp_path / "m", original_model(True), tmp_path / "clip")
    edit(new / "config.json", **values)
    with pytest.raises(BadInput, match=message):
        load(new)


# ---- training


def generated(folder, records):
    """transformers' greedy answers, with the AutoProcessor, chat template and generation config of a saved checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    theirs, info = getattr(transformers, config["architectures"][0]).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    processor, out = transformers.AutoProcessor.from_pretrained(folder), []
    for r in records:
        chat = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": r.turns[0]}]}
        ]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=files.open_image(r.image), text=text, return_tensors="pt")
        how = {
            "do_sample": False,
            "max_new_tokens": 12,
            "suppress_tokens": [theirs.config.image_token_id],
        }
        out.append(
            theirs.eval().generate(**inputs, **how)[0, inputs["input_ids"].shape[1] :].tolist()
        )
    return out


def test_grpo_on_tiles(tmp_path, monkeypatch, folder, pictures):
    """Pictures of unequal numbers of tiles in one batch: drawn, scored, trained; step 0 is at 0."""
    rows = [
        {"image": p.name, "problem": f"How many, {i}?", "solution": "two"}
        for i, p in enumerate(pictures[:6])
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = ["--model", folder, "--data", tmp_path / "rows.json", "--images", pictures[0].parent]
    flags += ["--out", tmp_path / "run", "--steps", 2, "--batch-size", 3, "--grad-accum", 2]
    flags += [
        "--group-size",
        3,
        "--max-new-tokens",
        4,
        "--lora-rank",
        4,
        "--kl-coef",
        0.1,
        "--lr",
        0.02,
    ]
    monkeypatch.setattr(sys, "argv", ["grpo.py", *map(str, flags)])
    monkeypatch.chdir(tmp_path)
    vary = lambda *_: lambda records, texts: [{"exact": [1.0, 0.0, 0.5]} for _ in texts]
    monkeypatch.setattr(grpo.rewards, "scorer", vary)
    grpo.main()
    first, second = (json.loads(x) for x in open(tmp_path / "run" / "metrics.jsonl"))
    assert abs(first["loss"]) < 1e-5 < first["grad_norm"] and first["kl"] < 1e-5 < second["kl"]


@pytest.mark.parametrize("kind", ["LLaVA-1.5", "LLaVA-NeXT", "original LLaVA-1.6"])
@pytest.mark.parametrize("script", [dpo, sft])
def test_train_and_merge(tmp_path, monkeypatch, folder, pictures, kind, script):
    """The command line, on pictures of many shapes; then what it leaves, read by transformers."""
    if kind == "LLaVA-1.5":
        folder = write(tmp_path / "m", test_checkpoints.tiny_llava())
    elif kind == "original LLaVA-1.6":
        folder = write_original(tmp_path / "m", original_model(True), tmp_path / "clip")
    turn = lambda who, text: {"from": who, "value": text}
    ask = turn("human", "<image>\nWhat is it?")
    rows = [
        {"id": i, "image": p.name, "conversations": [ask, turn("gpt", "A cup.")]}
        for i, p in enumerate(pictures[:6])
    ]
    if script is dpo:
        rows = [row | {"rejected_conversations": [ask, turn("gpt", "Two dogs.")]} for row in rows]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = [
        "--model",
        folder,
        "--data",
        tmp_path / "rows.json",
        "--images",
        pictures[0].parent,
        "--out",
        tmp_path / "run",
        "--steps",
        3,
        "--batch-size",
        4,
        "--lr",
        0.02,
        "--lora-rank",
        4,
        "--image-aspect",
        "checkpoint",
        "--merge",
    ]
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
    monkeypatch.chdir(tmp_path)
    script.main()
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert script is sft or first["loss"] == pytest.approx(0.6931, abs=1e-4)

    records = [Record("r", p, ("What is it?",), ()) for p in pictures]
    merged, processor = load(tmp_path / "run" / "model", image_aspect="checkpoint")
    adapted = load_adapter(load(folder, image_aspect="checkpoint")[0], tmp_path / "run" / "adapter")
    rows = [processor.encode(r) for r in records]
    pixel_values, image_sizes = processor.images(rows)
    draw = lambda m: sampling.sample(
        m,
        [e.prompt for e in rows],
        pixel_values,
        1,
        12,
        0,
        processor.stop_ids,
        image_sizes=image_sizes,
    )
    theirs = generated(tmp_path / "run" / "model", records)
    for model in (merged, adapted):
        assert [t.tolist() for (t,) in draw(model).tokens] == theirs
    assert [t.tolist() for (t,) in draw(load(folder)[0]).tokens] != theirs, (
        "training changed nothing"
    )
    assert len({token for tokens in theirs for token in tokens}) > 5


@pytest.mark.parametrize(
    "size, tokens", [((55, 176), 1360), ((110, 352), 1360), ((88, 55), 984), ((88, 99), 1272)]
)
def test_a_float_product_just_below_a_whole_number(size, tokens):
    """Where the product's error is not rounded away, one more row or column is cut on each side."""
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    ours = AnyRes(DEFAULT, 336, 24)
    rows, columns = ours.grid(size)
    count = transformers.LlavaNextProcessor._get_unpadded_features
    assert 576 + sum(count(None, *size, 24, 24, rows, columns)) == tokens
    left = unpad_image(torch.zeros(1, rows * 24, columns * 24), size).shape
    assert 576 + left[1] * (left[2] + 1) == tokens
    assert ours.tokens(size) == tokens


def test_questions_of_a_tiled_picture_together(folder, pictures):
    """Pictures of other shapes take other numbers of tiles and tokens; answers are those of one by one."""
    model, processor = load(folder)
    texts = ("Is there a cup?", "Is there a cup on the left?", "What is there?")
    records = [Record("", picture, (text,)) for text in texts for picture in pictures[:4]]
    want = [one for (one,) in sampling.generate(model, processor, records, 6, batch_size=1)]
    assert len(set(want)) > 4
    for batch_size in (2, 7, 64):
        contestant = evaluation.in_memory(model, processor, batch_size)
        assert evaluation.answer(contestant, records, 6) == want
