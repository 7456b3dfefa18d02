"""checkpoints.py against transformers and PEFT: same logits, same tokens, every naming, every refusal."""

import json
import shutil
import warnings
from dataclasses import fields, replace

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import sampling
from common import BadInput
from data import TEMPLATES, Processor, Record
from formats import checkpoints, llava_original, weights
from formats.adapters import load_adapter, save_adapter, save_reward
from formats.checkpoints import compose, load, save
from formats.llava_original import translated
from lora import LoRALinear, add_adapter
from model import Projector, pack

MISTRAL = {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 6,
    "max_window_layers": 1,
}  # one layer of each kind
SIDE, PATCH, VOCAB, IMAGE_ID = 28, 7, 270, 261  # 16 patches


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny_tokenizer(image=True, bos=True, chatml=True):
    """Bytes, with BOS in front, as a Llama tokenizer has it; 261 is <image>. bos=False: as Qwen's. chatml: its two tokens."""
    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens(
        ["<|im_start|>", "<|im_end|>"] if chatml else ["<a>", "<b>"], special_tokens=True
    )
    if image:
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def clip_config():
    return transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )


def llm_config(kind="llama", vocab_size=VOCAB, **more):
    return transformers.AutoConfig.for_model(
        kind,
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        **more,
    )


def scatter(model):
    """No weight at a special value (norms at 1, biases at 0), and large enough that every part moves the logits."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model.eval()


def tiny_llava(kind="llama", layer=-2, strategy="default", **more):
    config = transformers.LlavaConfig(
        vision_config=clip_config(),
        text_config=llm_config(kind, **more),
        image_token_index=IMAGE_ID,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    return scatter(transformers.LlavaForConditionalGeneration(config))


NAMINGS = {  # in memory of transformers 5.23 -> on disk, written out by hand from what each version produced
    "H": {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.image_newline": "image_newline",
    },
    "M4": {"model.vision_tower.": "model.vision_tower.vision_model."},
    "M5": {},
    "H5": {
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.image_newline": "image_newline",
    },
    "X": {
        "model.vision_tower.": "model.vision_tower.vision_model.",
        "model.language_model.": "model.language_model.model.",
        "lm_head.": "language_model.lm_head.",
    },
}


def renamed(tensors, naming, prefix=""):
    out = {}
    for name, tensor in tensors.items():
        old = next((k for k in NAMINGS[naming] if name.startswith(prefix + k)), None)
        new = prefix + NAMINGS[naming][old] + name[len(prefix + old) :] if old else name
        out[new] = tensor.contiguous().clone()
    return out


def write(folder, hf, naming="H", change=None, **tokenizer):
    """A checkpoint as some version of transformers would have written it."""
    folder.mkdir(parents=True)
    hf.config.save_pretrained(folder)
    tiny_tokenizer(**tokenizer).save_pretrained(folder)
    tensors = renamed(hf.state_dict(), naming)
    if change:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit(path, **values):
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.fixture(scope="module")
def hf():
    torch.manual_seed(1)
    return tiny_llava()


@pytest.fixture(scope="module")
def folder(hf, tmp_path_factory):
    return write(tmp_path_factory.mktemp("llava") / "H", hf)


def from_transformers(folder):
    """transformers only warns of missing, unexpected and mismatched weights: here there are none."""
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def ids(*shape):
    return torch.randint(3, 259, shape)


def prompts(image_tokens=16):
    """Picture and text, text alone, picture in the middle: of three lengths."""
    picture = torch.full((image_tokens,), IMAGE_ID)
    return [torch.cat([ids(2), picture, ids(5)]), ids(4), torch.cat([ids(9), picture, ids(1)])]


def our_logits(model, rows, pixels):
    with torch.no_grad():
        return model.llm.lm_head(
            model.hidden_states(pack(rows, [[]] * len(rows), pixel_values=pixels))
        )


def their_logits(model, rows, pixels):
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    with torch.no_grad():
        return model(input_ids=padded, attention_mask=mask, pixel_values=pixels).logits


def difference(ours, theirs, rows):
    return max(
        (ours[b, : len(r)] - theirs[b, : len(r)]).abs().max().item() for b, r in enumerate(rows)
    )


# ---- the same numbers


@pytest.mark.parametrize(
    "kind, layer, strategy, more",
    [
        ("llama", -2, "default", {}),
        ("llama", -1, "default", {}),
        ("llama", 1, "default", {}),
        ("llama", -2, "full", {}),
        ("llama", -2, "default", {"tie_word_embeddings": True}),
        ("mistral", -2, "default", {"sliding_window": 8}),
        ("mistral", -2, "default", MISTRAL),
        ("mistral", -2, "default", {"sliding_window": 6, "tie_word_embeddings": True}),
        ("qwen2", -2, "default", {}),
        ("qwen2", -2, "default", SLIDING | {"tie_word_embeddings": True}),
        ("qwen3", -2, "default", {}),
        ("qwen3", -2, "default", SLIDING | {"tie_word_embeddings": True, "head_dim": 16}),
    ],
)
def test_logits_are_those_of_transformers(tmp_path, kind, layer, strategy, more):
    theirs = tiny_llava(kind, layer, strategy, **more)
    model, processor = load(write(tmp_path / "m", theirs, chatml=False))
    tokens = 16 + (strategy == "full")
    assert processor.image_tokens == tokens
    assert processor.template == ("mistral" if kind == "mistral" else "vicuna_v1")
    rows, pixels = prompts(tokens), torch.randn(2, 3, SIDE, SIDE)
    ours, want = our_logits(model, rows, pixels), their_logits(theirs, rows, pixels)
    assert difference(ours, want, rows) <= 1e-5
    assert want.std() > 0.3, "the logits are too flat to tell anything"
    assert difference(our_logits(model, rows, pixels.flip(0)), want, rows) > 1e-2, (
        "the pictures do not matter"
    )
    alone = our_logits(model, rows[1:2], None)
    assert difference(alone, want[1:2], rows[1:2]) <= 1e-5


def test_greedy_sampling_is_generate(folder, hf):
    model, processor = load(folder)
    rows, pixels = prompts(), torch.randn(2, 3, SIDE, SIDE)
    samples = sampling.sample(
        model, rows, pixels, max_new_tokens=12, temperature=0, stop_ids=processor.stop_ids
    )
    seen = set()
    for row, picture, tokens in zip(rows, (pixels[:1], None, pixels[1:]), samples.tokens):
        inputs = {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}
        inputs |= {} if picture is None else {"pixel_values": picture}
        how = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": 2, "pad_token_id": 0}
        out = hf.generate(**inputs, **how, suppress_tokens=[IMAGE_ID])
        assert tokens[0].tolist() == out[0, len(row) :].tolist()
        seen |= set(tokens[0].tolist())
    assert len(seen) > 5, "the model repeats itself, so the comparison says little"


# ---- reading


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_gives_the_same_weights(tmp_path, hf, naming):
    state = torch.get_rng_state()
    model, _ = load(write(tmp_path / naming, hf, naming))
    assert torch.equal(state, torch.get_rng_state()), "loading draws from the caller's generator"
    ours, theirs = model.state_dict(), hf.state_dict()
    names = {"vision.": "model.vision_tower.", "projector.": "model.multi_modal_projector.",
             "llm.model.": "model.language_model.", "llm.lm_head.": "lm_head."}  # fmt: skip
    assert len(ours) == len(theirs)
    for name, tensor in ours.items():
        old = next(k for k in names if name.startswith(k))
        assert torch.equal(tensor, theirs[names[old] + name[len(old) :]]), name


def test_shards_old_buffers_and_dtype(tmp_path, hf, folder):
    new = write(tmp_path / "m", hf)
    tensors = load_file(new / "model.safetensors")
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    weight_map = {}
    for i, names in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        save_file({n: tensors[n] for n in names}, new / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(names, f"model-{i}.safetensors")
    (new / "model.safetensors").unlink()
    (new / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model, _ = load(new)
    want, _ = load(folder)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), want.state_dict().values())
    )
    half, _ = load(new, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and {p.dtype for p in half.parameters()} == {torch.bfloat16}
    computed, want = half.llm.model.rotary_emb.inv_freq, hf.model.language_model.rotary_emb.inv_freq
    assert torch.equal(computed, want), "computed in bfloat16"
    (new / "model-1.safetensors").unlink()
    with pytest.raises(BadInput, match="model-1.safetensors"):
        load(new)


def test_tied_head_may_be_on_disk_but_must_be_equal(tmp_path):
    theirs = tiny_llava(tie_word_embeddings=True)

    def drop(tensors):
        del tensors["language_model.lm_head.weight"]

    def bend(tensors):
        tensors["language_model.lm_head.weight"][3] += 1

    for name, change in (("both", None), ("one", drop), ("said above", drop)):
        new = write(tmp_path / name, theirs, change=change)
        if name == "said above":  # at the top of config.json alone, where transformers looks too
            text = json.loads((new / "config.json").read_text())["text_config"]
            edit(new / "config.json", text_config=text | {"tie_word_embeddings": False})
        model, _ = load(new)
        assert torch.equal(model.llm.lm_head.weight, theirs.lm_head.weight)
    with pytest.raises(BadInput, match="ties"):
        load(write(tmp_path / "bent", theirs, change=bend))


def test_config_of_an_early_version(tmp_path, hf):
    """image_token_id for image_token_index, a wrong vocab_size, null patch_size, image processors of 4.x and 5.x."""
    new = write(tmp_path / "m", hf)
    text = json.loads((new / "config.json").read_text())["text_config"]
    edit(
        new / "config.json",
        image_token_index=None,
        image_token_id=IMAGE_ID,
        text_config=text | {"vocab_size": 31064},
    )
    (new / "processor_config.json").write_text(
        '{"processor_class": "LlavaProcessor", "patch_size": null}'
    )
    _, processor = load(new)
    assert (
        processor.image_mean == checkpoints.CLIP_MEAN
        and processor.image_std == checkpoints.CLIP_STD
    )
    assert (processor.image_token_id, processor.image_size, processor.image_tokens) == (
        IMAGE_ID,
        SIDE,
        16,
    )
    images = {"image_mean": [0.5, 0.5, 0.5], "crop_size": 28, "size": {"shortest_edge": 28}}
    (new / "preprocessor_config.json").write_text(json.dumps(images))
    assert load(new)[1].image_mean == (0.5, 0.5, 0.5)
    edit(
        new / "processor_config.json",
        image_processor={"image_mean": [0.1, 0.2, 0.3], "size": {"shortest_edge": 28}},
    )
    assert load(new)[1].image_mean == (0.1, 0.2, 0.3)
    edit(new / "processor_config.json", image_processor={"size": {"shortest_edge": 14}})
    with pytest.raises(BadInput, match="tower takes 28"):
        load(new)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "blip_2"}, "'blip_2'; accepted is 'llava' or 'llava_next'"),
        ({"model_type": "llava_next"}, "missing: image_newline"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer is \[-2, -1\]"),
        ({"vision_feature_layer": -9}, "4 hidden states"),
        ({"vision_feature_select_strategy": "half"}, "'half'"),
        ({"projector_hidden_act": "relu"}, "'relu'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "siglip"),
        ({"text_config": {"model_type": "gpt2", "vocab_size": VOCAB}}, "gpt2"),
        ({"text_config": {"model_type": "llama", "hidden_size": 49}}, "hidden size"),
        ({"text_config": {"model_type": "t5"}}, "no model can be built"),
        ({"image_token_index": 262}, "262 in config.json and 261 in the tokenizer"),
        ({"multimodal_projector_bias": False}, r"unexpected: multi_modal_projector.linear_1.bias"),
    ],
)
def test_a_config_it_cannot_compute_is_refused(tmp_path, hf, values, message):
    new = write(tmp_path / "m", hf)
    edit(new / "config.json", **values)
    with pytest.raises(BadInput, match=message):
        load(new)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop("vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias"),
            "missing: vision_tower.*fc1.bias",
        ),
        (lambda t: t.update({"image_newline": torch.ones(48)}), "unexpected: image_newline"),
        (
            lambda t: t.update({"multi_modal_projector.linear_1.bias": torch.ones(7)}),
            r"1.bias has the shape \(7,\)",
        ),
        (lambda t: t.update({"lm_head.weight": torch.ones(VOCAB, 48)}), "there twice"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, hf, change, message):
    with pytest.raises(BadInput, match=message):
        load(write(tmp_path / "m", hf, change=change))


@pytest.mark.parametrize("token", [9999, VOCAB, -1, "261", 1.0, True])
def test_an_image_token_without_an_embedding(tmp_path, hf, token):
    """Where the tokenizer knows none, so that nothing contradicts it."""
    new = write(tmp_path / "m", hf, image=False)
    edit(new / "config.json", image_token_index=VOCAB - 1)
    assert load(new)[0].image_token_id == VOCAB - 1
    edit(new / "config.json", image_token_index=token)
    with pytest.raises(
        BadInput, match=f"(m: the image token is {token!r} in|config.json: not a usable config)"
    ):
        load(new)


def test_missing_and_broken_files_are_refused(tmp_path, hf, monkeypatch):
    new = write(tmp_path / "m", hf)
    files = {
        "tokenizer.json": "tokenizer",
        "model.safetensors": "safetensors",
        "config.json": "not readable as JSON|no config.json there",
    }
    for file, message in files.items():
        whole = (new / file).read_bytes()
        (new / file).write_bytes(b"{")
        with pytest.raises(BadInput, match=message):
            load(new)
        (new / file).unlink()
        with pytest.raises(BadInput, match=message):
            load(new)
        (new / file).write_bytes(whole)
    (new / "model.safetensors").unlink()
    (new / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(BadInput, match=r"found pytorch_model.bin .* save_pretrained\(NEW\)"):
        load(new)
    with pytest.raises(BadInput, match="no such folder; a folder or a hub id"):
        load(tmp_path / "nowhere")

    def offline(name, allow_patterns):
        assert not [p for p in allow_patterns if p.endswith((".bin", ".py", ".pt"))]
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(BadInput, match="someone/llava: .*ConnectionError: no route to host"):
        load("someone/llava")


# ---- writing


@pytest.mark.parametrize(
    "kind, strategy, tie",
    [
        ("llama", "default", False),
        ("mistral", "full", True),
        ("qwen2", "default", True),
        ("qwen3", "default", False),
    ],
)
def test_transformers_reads_what_is_saved(tmp_path, kind, strategy, tie):
    more = MISTRAL if kind == "mistral" else SLIDING if kind == "qwen3" else {}
    theirs = tiny_llava(kind, layer=-1, strategy=strategy, tie_word_embeddings=tie, **more)
    model, processor = load(write(tmp_path / "m", theirs), template="chatml")
    save(model, processor, tmp_path / "out")
    theirs = from_transformers(tmp_path / "out")
    rows, pixels = prompts(processor.image_tokens), torch.randn(2, 3, SIDE, SIDE)
    assert (
        difference(our_logits(model, rows, pixels), their_logits(theirs, rows, pixels), rows)
        <= 1e-5
    )
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert ("language_model.lm_head.weight" in names) is not tie
    assert all(
        n.startswith(("vision_tower.vision_model.", "multi_modal_projector.", "language_model."))
        for n in names
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "float32" and "_name_or_path" not in config["text_config"]
    assert config["text_config"]["rope_theta"] == (1e6 if kind == "mistral" else 1e4), (
        "4.x looks for it there"
    )
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast", "4.x knows no other name"
    assert config["model_input_names"] == ["input_ids", "attention_mask"], (
        "generate of 4.x stops at token_type_ids"
    )
    assert "local_files_only" not in config
    assert not list(tmp_path.glob(".out*")), "the folder written aside is still there"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("bos, aspect", [(True, "checkpoint"), (False, "pad")])
def test_autoprocessor_makes_the_same_input(tmp_path, hf, template, bos, aspect):
    """Template and pixels as trained, although the base's tokenizer_config splits special tokens."""
    base = write(tmp_path / "m", hf, bos=bos)
    edit(base / "tokenizer_config.json", split_special_tokens=False)  # the key is what counts
    model, processor = load(base, template=template, image_aspect=aspect)
    save(model, processor, tmp_path / "out")
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    picture = Image.effect_noise((40, 28), 60).convert("RGB")
    picture.save(tmp_path / "p.png")
    record = Record("here", tmp_path / "p.png", ("What is this?", "A cat", "Sure?"), ("Yes",))
    text = lambda value: {"type": "text", "text": value}
    chat = [
        {"role": "user", "content": [text("What is this?"), {"type": "image"}]},
        {"role": "assistant", "content": [text("A cat")]},
        {"role": "user", "content": "Sure?"},
    ]
    out = theirs(
        images=picture,
        text=theirs.apply_chat_template(chat, add_generation_prompt=True),
        return_tensors="pt",
    )
    example = processor.encode(record)
    assert (example.prompt[0].item() == 1) is bos
    assert out["input_ids"][0].tolist() == example.prompt.tolist()
    assert (example.prompt == IMAGE_ID).sum() == 16
    assert (out["pixel_values"][0] - processor.pixels(picture)).abs().max() < 1e-5
    chat.append({"role": "assistant", "content": "Yes"})
    whole = theirs(images=picture, text=theirs.apply_chat_template(chat), return_tensors="pt")[
        "input_ids"
    ][0]
    assert whole.tolist() == [*example.prompt.tolist(), *example.answers[0].tolist()]
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == processor.stop_ids
    with pytest.raises(Exception, match="user and assistant"):
        theirs.apply_chat_template([{"role": "system", "content": "x"}])


def test_save_and_load_are_inverse(tmp_path, folder, monkeypatch):
    model, processor = load(folder, template="chatml")
    monkeypatch.setattr(weights, "SHARD_BYTES", 50_000)
    save(model, processor, tmp_path / "a" / "out")
    assert len(list((tmp_path / "a" / "out").glob("model-*-of-*.safetensors"))) > 2
    again, other = load(tmp_path / "a" / "out")
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())
    )
    assert vars(again.llm.config)["rope_parameters"] == vars(model.llm.config)["rope_parameters"]
    for field in fields(Processor):
        if field.name != "tokenizer":
            assert getattr(other, field.name) == getattr(processor, field.name), field.name
    assert other.template == "chatml"
    assert other.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    from_transformers(tmp_path / "a" / "out")
    monkeypatch.undo()
    save(model, processor, tmp_path / "half", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    before = (tmp_path / "half" / "config.json").read_bytes()
    with pytest.raises(BadInput, match="exists"):
        save(model, processor, tmp_path / "half")
    assert (tmp_path / "half" / "config.json").read_bytes() == before


def test_a_failed_save_leaves_nothing(tmp_path, folder, monkeypatch):
    model, processor = load(folder)
    monkeypatch.setattr(checkpoints, "write_processor", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(model, processor, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("whole_clip, known_image", [(False, False), (True, True)])
def test_compose(tmp_path, whole_clip, known_image):
    tower = scatter(transformers.CLIPVisionModel(clip_config()))
    if whole_clip:
        text = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        config = transformers.CLIPConfig(
            text_config=text, vision_config=clip_config().to_dict(), projection_dim=8
        )
        clip = scatter(transformers.CLIPModel(config))
        tower = clip.vision_model
        clip.save_pretrained(tmp_path / "clip")
    else:
        tower.save_pretrained(tmp_path / "clip")
        (tmp_path / "clip" / "preprocessor_config.json").write_text(
            '{"image_mean": [0.5, 0.4, 0.3], "crop_size": 28}'
        )
    llm = scatter(transformers.LlamaForCausalLM(llm_config(vocab_size=270 if known_image else 261)))
    llm.save_pretrained(tmp_path / "llm")
    tiny_tokenizer(image=known_image).save_pretrained(tmp_path / "llm")
    model, processor = compose(tmp_path / "clip", tmp_path / "llm", template="chatml", seed=3)

    tower_weights = {k.removeprefix("vision_model."): v for k, v in tower.state_dict().items()}
    assert all(torch.equal(v, tower_weights[k]) for k, v in model.vision.state_dict().items())
    rows = llm.config.vocab_size
    for ours, theirs in (
        (model.llm.model.embed_tokens, llm.model.embed_tokens),
        (model.llm.lm_head, llm.lm_head),
    ):
        assert torch.equal(ours.weight[:rows], theirs.weight)
        assert len(ours.weight) == model.llm.config.vocab_size == (270 if known_image else 263)
        for new in ours.weight[rows:]:
            torch.testing.assert_close(new, theirs.weight.mean(0))
    assert processor.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>") == 261
    assert processor.tokenizer.pad_token == "<pad>" and processor.image_tokens == 16
    assert processor.image_mean == (checkpoints.CLIP_MEAN if whole_clip else (0.5, 0.4, 0.3))
    state = torch.get_rng_state()
    same, _ = compose(tmp_path / "clip", tmp_path / "llm", seed=3)
    other, _ = compose(tmp_path / "clip", tmp_path / "llm", seed=4)
    assert torch.equal(state, torch.get_rng_state()), "composing draws from the caller's generator"
    assert torch.equal(same.projector.linear_1.weight, model.projector.linear_1.weight)
    assert not torch.equal(other.projector.linear_1.weight, model.projector.linear_1.weight)
    save(model, processor, tmp_path / "out")
    theirs = from_transformers(tmp_path / "out")
    batch, pixels = prompts(), torch.randn(2, 3, SIDE, SIDE)
    assert (
        difference(our_logits(model, batch, pixels), their_logits(theirs, batch, pixels), batch)
        <= 1e-5
    )
    for wrong, message in ((("llm", "llm"), "'llama'"), (("clip", "clip"), "clip")):
        with pytest.raises(BadInput, match=message):
            compose(*(tmp_path / w for w in wrong))


# ---- adapters


def tuned(folder, **how):
    """A prepared model whose trainable part has moved."""
    model, processor = load(folder)
    model.prepare(llm=False, **how)
    add_adapter(model.llm, "policy", 4, 6)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model, processor


def with_peft(folder, adapter):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        base = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
        return peft.PeftModel.from_pretrained(base, adapter).eval()


@pytest.mark.parametrize("projector", [True, False])
def test_peft_loads_our_adapter(tmp_path, folder, projector):
    model, _ = tuned(folder, projector=projector)
    save_adapter(model, tmp_path / "a", folder)
    rows, pixels = prompts(), torch.randn(2, 3, SIDE, SIDE)
    ours = our_logits(model, rows, pixels)
    theirs = with_peft(folder, tmp_path / "a")
    assert difference(ours, their_logits(theirs, rows, pixels), rows) <= 1e-5
    base = our_logits(load(folder)[0], rows, pixels)
    assert difference(ours, base, rows) > 0.1, "the adapter does nothing"
    wrapped = {n.split(".lora_")[0] for n in theirs.state_dict() if ".lora_B" in n}
    assert len(wrapped) == 14 and not [n for n in wrapped if "vision" in n]
    with theirs.disable_adapter():
        assert difference(base, their_logits(theirs, rows, pixels), rows) <= 1e-5, (
            "PEFT cannot switch it off"
        )
    merged = theirs.merge_and_unload()
    assert difference(ours, their_logits(merged, rows, pixels), rows) <= 1e-5
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    peft_0_10 = {
        "peft_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "r",
        "target_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "modules_to_save",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
    }
    assert config.keys() <= peft_0_10 and (config["r"], config["lora_alpha"]) == (4, 6)
    with pytest.raises(BadInput, match="exists"):
        save_adapter(model, tmp_path / "a", folder)


@pytest.mark.parametrize("naming", ["H", "M4", "M5"])
@pytest.mark.parametrize(
    "targets", ["q_proj|v_proj", "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"]
)
def test_we_load_what_peft_saves(tmp_path, folder, naming, targets):
    peft = pytest.importorskip("peft")
    base = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=rf".*language_model.*\.({targets})",
        modules_to_save=["multi_modal_projector"] if naming != "M4" else None,
    )
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file(renamed(load_file(file), naming, "base_model.model."), file)
    model = load_adapter(load(folder)[0], tmp_path / "a")
    rows, pixels = prompts(), torch.randn(2, 3, SIDE, SIDE)
    ours = our_logits(model, rows, pixels)
    assert difference(ours, their_logits(theirs, rows, pixels), rows) <= 1e-5
    with model.reference():
        assert (
            difference(
                our_logits(model, rows, pixels), our_logits(load(folder)[0], rows, pixels), rows
            )
            == 0
        )
    assert sum(isinstance(m, LoRALinear) for m in model.modules()) == 2 * len(targets.split("|"))
    save_adapter(model, tmp_path / "b", folder)
    again = load_adapter(load(folder)[0], tmp_path / "b")
    assert difference(our_logits(again, rows, pixels), ours, rows) == 0


def test_merged_is_adapter(tmp_path, folder):
    model, processor = tuned(folder)
    save(model, processor, tmp_path / "merged")
    save_adapter(model, tmp_path / "a", folder)
    rows, pixels = prompts(), torch.randn(2, 3, SIDE, SIDE)
    ours = our_logits(model, rows, pixels)
    assert difference(our_logits(load(tmp_path / "merged")[0], rows, pixels), ours, rows) <= 1e-5
    again = load_adapter(load(folder)[0], tmp_path / "a")
    assert difference(our_logits(again, rows, pixels), ours, rows) == 0
    trained = lambda m: {n for n, p in m.named_parameters() if p.requires_grad}
    assert trained(again) == trained(model)


def test_lora_is_merged_in_float32(tmp_path, folder):
    model, processor = load(folder, dtype=torch.bfloat16)
    model.prepare(lora_rank=4, projector=False)
    layer = model.llm.model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.adapters["policy"].lora_B.normal_()
    save(model, processor, tmp_path / "out", dtype=torch.float32)
    got = load_file(tmp_path / "out" / "model.safetensors")[
        "language_model.model.layers.1.mlp.up_proj.weight"
    ]
    lora = layer.adapters["policy"]
    assert torch.equal(got, layer.base.weight.float() + lora.scale * (lora.lora_B @ lora.lora_A))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 8}, "shape"),
        ({"lora_alpha": "6"}, "lora_alpha"),
    ],
)
def test_an_adapter_config_it_cannot_compute_is_refused(tmp_path, folder, values, message):
    save_adapter(tuned(folder)[0], tmp_path / "a", folder)
    edit(tmp_path / "a" / "adapter_config.json", a_field_of_tomorrow={"x": 1})
    load_adapter(load(folder)[0], tmp_path / "a")
    edit(tmp_path / "a" / "adapter_config.json", **values)
    with pytest.raises(BadInput, match=message):
        load_adapter(load(folder)[0], tmp_path / "a")


def test_adapter_weights_that_do_not_fit_are_refused(tmp_path, folder):
    save_adapter(tuned(folder)[0], tmp_path / "a", folder)
    file, prefix = tmp_path / "a" / "adapter_model.safetensors", "base_model.model."
    layer, tower = (
        prefix + "language_model.model.layers.1.mlp.up_proj.",
        prefix + "vision_tower.vision_model.",
    )
    whole = {k: v for k, v in load_file(file).items() if not k.startswith(prefix + "model.")}
    for change, message in (
        ({layer + "lora_B.weight": None}, "missing: .*up_proj.lora_B"),
        (
            {layer + "lora_A.weight": None, layer + "lora_B.weight": None},
            "missing: .*up_proj.lora_A",
        ),
        ({layer + "lora_magnitude_vector": torch.ones(3)}, "unexpected: .*magnitude"),
        ({layer + "lora_B.bias": torch.ones(3)}, "unexpected: .*bias"),
        (
            {tower + "encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)},
            "unexpected: vision",
        ),
        (
            {prefix + "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 48)},
            "q_proj.lora_A.weight is there twice",
        ),
        (
            {prefix + "multi_modal_projector.linear_2.bias": None},
            "missing: multi_modal",
        ),
    ):
        save_file({k: v for k, v in (whole | change).items() if v is not None}, file)
        with pytest.raises(BadInput, match=message):
            load_adapter(load(folder)[0], tmp_path / "a")
    file.unlink()
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"never opened")
    with pytest.raises(BadInput, match="adapter_model.bin"):
        load_adapter(load(folder)[0], tmp_path / "a")


def test_an_adapter_that_would_lose_something_is_refused(tmp_path, folder):
    with pytest.raises(BadInput, match="no LoRA"):
        save_adapter(load(folder)[0].prepare(lora_rank=0), tmp_path / "a", folder)
    with pytest.raises(BadInput, match="tower"):
        save_adapter(load(folder)[0].prepare(lora_rank=2, vision=True), tmp_path / "a", folder)
    assert not list(tmp_path.iterdir())


def test_no_weight_is_read_on_meta(checkpoint):
    """The processor is the same; the files could hold anything."""
    model, processor = checkpoints.load(checkpoint, device="meta")
    _, whole = checkpoints.load(checkpoint)
    assert all(p.is_meta for p in model.parameters())
    same = (
        "image_token_id",
        "image_size",
        "image_tokens",
        "image_mean",
        "image_std",
        "template",
        "max_length",
    )
    assert all(getattr(processor, name) == getattr(whole, name) for name in same)


def test_no_weight_is_composed_on_meta(parts):
    """Tower, LLM, new rows and projector; in the dtype that is asked for."""
    folders = parts / "vision", parts / "llm"
    model, processor = checkpoints.compose(*folders, torch.bfloat16, "meta")
    real, whole = checkpoints.compose(*folders)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    shapes = lambda m: {name: p.shape for name, p in m.named_parameters()}
    assert shapes(model) == shapes(real)
    assert processor.image_token_id == whole.image_token_id


@pytest.mark.parametrize("given, limit", [(0, 512), (99, 99), (512, 512), (9999, 512)])
def test_the_limit_of_length(checkpoint, parts, given, limit):
    """--max-length, or the context of the LLM, and never more than that."""
    _, processor = checkpoints.load(checkpoint, device="meta", max_length=given)
    _, other = checkpoints.compose(parts / "vision", parts / "llm", max_length=given)
    assert processor.max_length == other.max_length == limit


def test_the_projector_is_drawn_from_the_seed(parts):
    """The same seed draws the same, whatever was drawn before; the caller's random state is left alone."""
    drawn = []
    for state, seed in ((1, 5), (2, 5), (2, 6)):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        model, _ = checkpoints.compose(parts / "vision", parts / "llm", seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append(model.projector.linear_1.weight)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    seeds = ({}, {"seed": 0}, {"seed": 1})
    models = [checkpoints.compose(parts / "vision", parts / "llm", **seed)[0] for seed in seeds]
    first, same, other = (model.projector.linear_1.weight for model in models)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_reading_draws_nothing(checkpoint):
    before = torch.get_rng_state()
    checkpoints.load(checkpoint)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_keeps_its_dtype(checkpoint, tmp_path):
    """Saved without another word, weights and config have the model's own."""
    model, processor = checkpoints.load(checkpoint, torch.bfloat16)
    for dtype, want in ((None, torch.bfloat16), (torch.float16, torch.float16)):
        folder = tmp_path / str(want)
        checkpoints.save(model, processor, folder, dtype)
        assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {want}
        config = json.loads((folder / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == str(want).removeprefix("torch.")


def test_stop_tokens_of_the_template_are_saved(checkpoint, tmp_path):
    """All of them: another program's generate ends where ours does."""
    model, processor = checkpoints.load(checkpoint)
    processor.tokenizer.add_tokens("<|im_end|>", special_tokens=True)
    processor.tokenizer.add_tokens("<|im_start|>", special_tokens=True)
    processor = replace(processor, template="chatml")
    checkpoints.save(model, processor, tmp_path / "m")
    saved = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert saved["eos_token_id"] == [2, end]


def test_an_adapter_of_fewer_layers_beside_another(checkpoint, tmp_path):
    """The layers that it leaves out keep the adapter that they have."""
    model, _ = checkpoints.load(checkpoint)
    model.prepare(lora_rank=2, projector=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for _, layer in checkpoints.adapters(model):
            layer.lora_B.normal_()
    save_adapter(model, tmp_path / "whole", checkpoint)
    some = tmp_path / "some"
    some.mkdir()
    config = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    (some / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    tensors = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if ".q_proj." in k}, some / "adapter_model.safetensors"
    )

    ids = torch.tensor([[1, 5, 9, 13]])
    with torch.no_grad():
        before = model.llm(ids).logits
        load_adapter(model, some, "other")
        assert torch.equal(model.llm(ids).logits, before)
    names = lambda adapter: {
        name.split(".")[-1] for name, _ in checkpoints.adapters(model, adapter)
    }
    assert names("other") == {"q_proj"} and len(names("policy")) == 7


def test_a_head_is_saved_by_its_name(checkpoint, tmp_path):
    model, _ = checkpoints.load(checkpoint)
    model.prepare(llm=False, projector=False)
    for name in ("value", "reward"):
        add_adapter(model.llm, name, 2)
        model.add_head(name)
    with torch.no_grad():
        for i, head in enumerate(model.heads.values()):
            for p in head.parameters():
                p.fill_(i + 1.0)
    save_reward(model, tmp_path / "run", checkpoint, {"question": "Good?"})
    for tensor in load_file(tmp_path / "run" / "head.safetensors").values():
        assert (tensor == 2).all()


@pytest.mark.parametrize("tied", [None, False, True])
def test_an_original_config_says_whether_the_head_is_tied(tied):
    raw = {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu"}
    if tied is not None:
        raw["tie_word_embeddings"] = tied
    config = translated(raw, "config.json", {})
    assert config["tie_word_embeddings"] is bool(tied)
    assert config["text_config"]["model_type"] == "llama"


@pytest.mark.parametrize("own", [False, True])
def test_whose_tokenizer_an_original_has(tmp_path, monkeypatch, own):
    """A projector beside an LLM: its own where one lies beside it, else the LLM's."""
    for name in ("llm", "tower"):
        (tmp_path / name).mkdir()
    folder = tmp_path / "projector"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_name_or_path": str(tmp_path / "llm")}))
    if own:
        (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(llava_original, "weights", lambda *_: {"vision_tower.x": None})
    raw = {"mm_vision_tower": str(tmp_path / "tower")}
    _, words, tower, lora = llava_original.original_parts(folder, raw)
    assert words == (folder if own else tmp_path / "llm")
    assert (tower, lora) == (tmp_path / "tower", None)


def test_a_projector_without_bias(checkpoint, tmp_path):
    """It is saved, and found again, as what it is."""
    model, processor = checkpoints.load(checkpoint)
    first, second = model.projector.linear_1, model.projector.linear_2
    model.projector = Projector(first.in_features, second.out_features, False)
    checkpoints.save(model, processor, tmp_path / "m")
    again, _ = checkpoints.load(tmp_path / "m")
    found, want = again.projector.state_dict(), model.projector.state_dict()
    assert found.keys() == want.keys() == {"linear_1.weight", "linear_2.weight"}
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_a_whole_file_beside_an_old_index(checkpoint, tmp_path):
    """model.safetensors is what counts; an index that another version left names files that are gone."""
    folder = tmp_path / "m"
    shutil.copytree(checkpoint, folder)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found, want = (checkpoints.load(f)[0].state_dict() for f in (folder, checkpoint))
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_a_kept_class_token_is_told_to_other_programs(llava, tmp_path):
    """LLaVA's "full": the tower's class token is one of the image's tokens."""
    model, processor = llava
    for model.keep_cls, word in ((False, "default"), (True, "full")):
        checkpoints.save(model, processor, tmp_path / word)
        for name in ("config.json", "processor_config.json"):
            config = json.loads((tmp_path / word / name).read_text())
            assert config["vision_feature_select_strategy"] == word, name
