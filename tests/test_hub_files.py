"""The files of a checkpoint, key by key: what is written for other programs, and which numbers in theirs are taken.

What is written is compared with the files of llava-hf/llava-1.5-7b-hf and llava-v1.6 on the hub, with other sizes and with
numbers that no library takes by default.
"""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from elsewhere import Elsewhere
from safetensors.torch import load_file

from common import MOST, BadInput, file_identity
from formats import adapters, chat, checkpoints, weights
from formats.anyres import AnyRes
from lora import add_adapter
from model import MLLM, Projector

# ---- names of weights


@pytest.mark.parametrize(
    "theirs, hub",
    [
        # transformers' others (table in formats/weights.py)
        ("model.vision_tower.post_layernorm.bias", "vision_tower.vision_model.post_layernorm.bias"),
        ("vision_tower.post_layernorm.bias", "vision_tower.vision_model.post_layernorm.bias"),
        ("model.vision_tower.vision_model.x", "vision_tower.vision_model.x"),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("model.language_model.layers.0.x", "language_model.model.layers.0.x"),
        ("model.language_model.model.layers.0.x", "language_model.model.layers.0.x"),
        ("language_model.norm.weight", "language_model.model.norm.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.image_newline", "image_newline"),
        # LLaVA's own
        ("model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        ("model.layers.3.mlp.up_proj.weight", "language_model.model.layers.3.mlp.up_proj.weight"),
        ("model.norm.weight", "language_model.model.norm.weight"),
        ("model.mm_projector.0.weight", "multi_modal_projector.linear_1.weight"),
        ("model.mm_projector.2.bias", "multi_modal_projector.linear_2.bias"),
        ("mm_projector.0.bias", "multi_modal_projector.linear_1.bias"),
        ("model.vision_tower.vision_tower.vision_model.x", "vision_tower.vision_model.x"),
        # nothing of the kind
        ("model.layerset.x", "model.layerset.x"),
        ("model.image_newlines", "model.image_newlines"),
        ("mm_projector.1.weight", "mm_projector.1.weight"),
        ("mm_projectors0.weight", "mm_projectors0.weight"),
    ],
)
def test_the_hubs_name_of_a_weight(theirs, hub):
    assert weights.hub_name(theirs) == hub
    if theirs != hub:
        assert weights.hub_name(hub) == hub, "the hub's own name stays"


def test_names_of_our_weights():
    names = {
        "vision.post_layernorm.bias": "vision_tower.vision_model.post_layernorm.bias",
        "projector.linear_2.weight": "multi_modal_projector.linear_2.weight",
        "llm.model.norm.weight": "language_model.model.norm.weight",
        "llm.lm_head.weight": "language_model.lm_head.weight",
        "image_newline": "image_newline",
    }
    assert {name: weights.our_hub_name(name) for name in names} == names
    memory = {
        "language_model.model.norm.weight": "model.language_model.norm.weight",
        "multi_modal_projector.linear_1.bias": "model.multi_modal_projector.linear_1.bias",
    }
    assert {name: weights.name_in_memory(name) for name in memory} == memory


def test_a_list_of_names_is_cut():
    names = ["e", "b", "a", "d", "c", "f"]
    assert weights._few(names) == "a, b, c, d and 2 more"
    assert weights._few(names[:5]) == "a, b, c, d and 1 more"
    assert weights._few(names[:4]) == "a, b, d, e"


def test_the_weights_of_a_whole_clip(tmp_path):
    tensors = {
        "vision_model.post_layernorm.bias": torch.ones(1),
        "text_model.x": torch.ones(1),
        "text_projection.weight": torch.ones(1),
        "visual_projection.weight": torch.ones(1),
        "logit_scale": torch.ones(1),
        "vision_model.embeddings.position_ids": torch.ones(1),
    }
    weights.write_tensors(tensors, tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    found = weights.tower_weights(tmp_path)
    assert found == {"post_layernorm.bias": (file, "vision_model.post_layernorm.bias", (1,))}


# ---- shards


@pytest.mark.parametrize("limit, sizes", [(16, [2, 1, 2]), (15, [1, 1, 1, 1, 1]), (40, [5])])
def test_shards(tmp_path, monkeypatch, limit, sizes):
    """Tensors of 8, 8, 16, 4 and 12 bytes: files of at most `limit`, but for a larger tensor alone."""
    monkeypatch.setattr(weights, "SHARD_BYTES", {40: 48}.get(limit, limit))
    numbers = {"a": 2, "b": 2, "c": 4, "d": 1, "e": 3}
    tensors = {name: torch.arange(float(n)) for name, n in numbers.items()}
    weights.write_shards(iter(tensors.items()), tmp_path)
    found = weights.tensor_index(tmp_path)
    assert {name: shape for name, (*_, shape) in found.items()} == {
        name: (n,) for name, n in numbers.items()
    }
    assert all(torch.equal(weights.read_tensor(found[name]), tensors[name]) for name in tensors)
    if len(sizes) == 1:
        assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
        return
    n = len(sizes)
    names = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*names, "model.safetensors.index.json"]
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 48}
    want = [name for name, size in zip(names, sizes) for _ in range(size)]
    assert [index["weight_map"][name] for name in numbers] == want
    assert {name: found[name][0].name for name in numbers} == index["weight_map"]


def test_shards_without_an_index_and_another_stem(tmp_path):
    for i, name in enumerate("ab"):
        file = tmp_path / f"projector-{i + 1}-of-2.safetensors"
        weights.write_tensors({name: torch.full((1,), float(i))}, file)
    weights.write_tensors({"c": torch.ones(1)}, tmp_path / "model.safetensors")
    found = weights.tensor_index(tmp_path, "projector")
    assert {name: place[0].name for name, place in found.items()} == {
        "a": "projector-1-of-2.safetensors",
        "b": "projector-2-of-2.safetensors",
    }
    assert set(weights.tensor_index(tmp_path)) == {"c"}
    with pytest.raises(BadInput, match=r"NEW = other\[-1-of-N\]") as error:
        weights.tensor_index(tmp_path, "other")
    assert str(error.value).startswith(f"{tmp_path}: found no other weights instead of other.safe")


@pytest.mark.parametrize(
    "tensor, why",
    [
        (torch.tensor([1, 2]), "is stored as int64; accepted are float32, bfloat16, float16, float64"),
        (torch.zeros(0, 3), r"has the shape \(0, 3\): it holds no number"),
        (torch.tensor([1.0, float("nan"), 2.0]), "has NaN or infinity in 1 of 3 places"),
        (torch.tensor([float("inf"), -float("inf"), 2.0]), "has NaN or infinity in 2 of 3 places"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_weight(tmp_path, tensor, why):
    """The message names file and tensor, whichever way it is read."""
    file = tmp_path / "model.safetensors"
    weights.write_tensors({"w": tensor}, file)
    place = weights.tensor_index(tmp_path)["w"]
    message = f"^{re.escape(str(file))}: w {why}"
    with pytest.raises(BadInput, match=message):
        weights.read_tensor(place)
    slot = {"w": torch.zeros(tensor.shape)}
    with pytest.raises(BadInput, match=message):
        weights.fill(slot, {"w": place}, tmp_path)


def test_a_tied_weight_is_compared_and_not_copied(tmp_path):
    file = tmp_path / "model.safetensors"
    weights.write_tensors({"a": torch.ones(2), "tied": torch.ones(2)}, file)
    index = weights.tensor_index(tmp_path)
    slots = {"a": torch.zeros(2)}
    slots["tied"] = slots["a"]
    weights.fill(slots, index, tmp_path, ["tied"])
    assert slots["a"].tolist() == [1, 1]
    weights.fill(
        {"a": torch.zeros(2), "tied": torch.ones(2)}, {"a": index["a"]}, tmp_path, ["tied"]
    )
    weights.write_tensors({"a": torch.ones(2), "tied": torch.tensor([1.0, 2.0])}, file)
    with pytest.raises(BadInput, match=f"^{re.escape(str(tmp_path))}: the config ties tied to"):
        weights.fill(slots, index, tmp_path, ["tied"])
    with pytest.raises(BadInput, match="missing: a; unexpected: b$|missing: a; unexpected: b\\."):
        weights.check_shapes({"a": torch.ones(2)}, {"b": (file, "b", (2,))}, tmp_path)
    with pytest.raises(
        BadInput, match=rf"^{re.escape(str(file))}: a has the shape \(2,\), .* \(3,\)"
    ):
        weights.check_shapes({"a": torch.ones(3)}, {"a": (file, "a", (2,))}, tmp_path)


# ---- what is written


MEAN, STD = (0.5, 0.25, 0.125), (0.3, 0.2, 0.1)
TILES = AnyRes(((28, 56), (56, 28)), 28, 2)


def written(model, processor, folder):
    """{file: its JSON} that write_processor writes."""
    folder.mkdir()
    checkpoints.write_processor(model, processor, folder)
    return {p.name: json.loads(p.read_text()) for p in folder.glob("*.json")}


@pytest.mark.parametrize(
    "aspect, anyres, own",
    [
        ("pad", None, {"do_pad": True}),
        ("checkpoint", None, {"image_processor_type": "CLIPImageProcessor"}),
        (
            "pad",
            TILES,
            {
                "image_processor_type": "LlavaNextImageProcessor",
                "do_pad": True,
                "image_grid_pinpoints": [[28, 56], [56, 28]],
            },
        ),
    ],
)
def test_the_files_of_the_processor(llava, tmp_path, aspect, anyres, own):
    """As on the hub: preprocessor_config.json, processor_config.json, generation_config.json."""
    model, processor = llava
    changed = {"image_mean": MEAN, "image_std": STD, "image_aspect": aspect, "anyres": anyres}
    processor = replace(processor, **changed)
    found = written(model, processor, tmp_path / "m")
    kind = "LlavaNextProcessor" if anyres else "LlavaProcessor"
    assert found["preprocessor_config.json"] == {
        "processor_class": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        **own,
    }
    assert found["processor_config.json"] == {
        "processor_class": kind,
        "image_token": "<image>",
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    pad = processor.tokenizer.pad_token_id
    assert pad is not None and found["generation_config.json"] == {
        "bos_token_id": 1,
        "eos_token_id": [2],
        "pad_token_id": pad,
    }
    template = (tmp_path / "m" / "chat_template.jinja").read_text()
    assert found["chat_template.json"] == {"chat_template": template} and "ASSISTANT:" in template


def test_the_files_of_the_tokenizer(llava, tmp_path, monkeypatch):
    """What some version of transformers stops at, or takes otherwise, is not in them."""
    model, processor = llava
    config = written(model, processor, tmp_path / "a")["tokenizer_config.json"]
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert config["split_special_tokens"] is False

    def other(self, folder):
        """As another version writes it."""
        content = {"is_local": True, "local_files_only": True, "tokenizer_class": "LlamaTokenizer"}
        content |= {"extra_special_tokens": ["<x>"], "bos_token": "<s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(content))

    monkeypatch.setattr(type(processor.tokenizer), "save_pretrained", other)
    processor.tokenizer.pad_token = processor.tokenizer.bos_token = None
    found = written(model, processor, tmp_path / "b")
    assert found["tokenizer_config.json"] == {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "split_special_tokens": False,
        "additional_special_tokens": ["<x>"],
    }
    assert found["generation_config.json"] == {"eos_token_id": [2]}


def plain(config):
    """Without the keys that transformers itself adds, at any depth."""
    own = ("transformers_version", "_attn_implementation_autoset")
    return {k: plain(v) if isinstance(v, dict) else v for k, v in config.items() if k not in own}


def test_config_json(llava):
    """Nothing at its default, which transformers would leave out."""
    model, processor = llava
    model.feature_layer, model.keep_cls = -1, True
    model.projector = Projector(32, 64, False)
    model.llm.config._name_or_path = model.vision.config._name_or_path = "/of/this/machine"
    found = checkpoints.hub_config(model, replace(processor, image_aspect="checkpoint"), torch.half)
    assert found["architectures"] == ["LlavaForConditionalGeneration"]
    assert found["model_type"] == "llava"
    assert found["image_token_index"] == processor.image_token_id
    assert found["image_seq_length"] == 4 and found["vision_feature_layer"] == -1
    assert found["vision_feature_select_strategy"] == "full"
    assert found["multimodal_projector_bias"] is False
    assert found.get("tie_word_embeddings", False) is False
    assert (found["prompt_template"], found["image_aspect"]) == ("vicuna_v1", "checkpoint")
    for part in (found, found["text_config"], found["vision_config"]):
        assert part["dtype"] == part["torch_dtype"] == "float16"
        assert "_name_or_path" not in part
    text = found["text_config"]
    assert (text["rope_theta"], text["rope_scaling"]) == (10000.0, None)
    assert text["hidden_size"] == 64 and found["vision_config"]["hidden_size"] == 32


def test_config_json_of_tiles_and_of_a_scaled_rope(llava):
    model, processor = llava
    model = MLLM(model.vision, model.projector, model.llm, processor.image_token_id, anyres=TILES)
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    model.llm.config.rope_parameters = rope
    model.llm.lm_head.weight = model.llm.model.embed_tokens.weight
    found = checkpoints.hub_config(model, processor, torch.bfloat16)
    assert found["architectures"] == ["LlavaNextForConditionalGeneration"]
    assert found["model_type"] == "llava_next" and found["tie_word_embeddings"] is True
    assert found["image_grid_pinpoints"] == [[28, 56], [56, 28]]
    assert found["text_config"]["rope_theta"] == 5e5
    assert found["text_config"]["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert model.llm.config.rope_parameters["rope_theta"] == 5e5, "the model keeps its own"


# ---- what is read


def processor_of(llava, folder, content, file="preprocessor_config.json", **how):
    """The Processor that a folder with this image processor gives."""
    folder.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(content))
    model, processor = llava
    how = {"template": "plain", "image_aspect": "pad"} | how
    return checkpoints.make_processor(folder, processor.tokenizer, model, **how)


@pytest.mark.parametrize(
    "content",
    [
        {"image_mean": MEAN, "image_std": [1, 1e-3, 0.5]},
        {"image_mean": [0, 1, 0.5], "image_std": STD, "size": 28, "crop_size": 28},
        {"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": 28}},
        {"image_mean": MEAN, "image_std": STD, "crop_size": {"height": 28, "width": 28}},
    ],
)
def test_an_image_processor_is_taken(llava, tmp_path, content):
    want = tuple(content["image_mean"]), tuple(content["image_std"])
    one = processor_of(llava, tmp_path / "a", content)
    other = {"image_processor": content}
    for found in (one, processor_of(llava, tmp_path / "b", other, "processor_config.json")):
        assert (found.image_mean, found.image_std) == want
        assert (found.image_size, found.image_tokens) == (28, 4)
        assert (found.template, found.image_aspect, found.anyres) == ("plain", "pad", None)
        assert found.image_token_id == llava[0].image_token_id
        assert found.embeddings == llava[0].llm.config.vocab_size and found.own is None
    llava[0].keep_cls = True
    assert processor_of(llava, tmp_path / "a", content).image_tokens == 5


def test_without_an_image_processor_the_numbers_are_clips(llava, tmp_path):
    """Of openai/clip-vit-large-patch14-336."""
    found = processor_of(llava, tmp_path / "a", {})
    assert found.image_mean == (0.48145466, 0.4578275, 0.40821073)
    assert found.image_std == (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize(
    "content, message",
    [
        *(({key: values}, f"{key} is .*; three numbers from {low} to 1 are accepted")
          for key, low, wrong in (("image_mean", 0, -0.1), ("image_std", 0.001, 0.0009))
          for values in ([wrong, 0.5, 0.5], [0.5, 0.5, 1.1], [0.5, 0.5], [0.5] * 4, 0.5, "abc",
                         None, [True, 0.5, 0.5], {"a": 0.5})),
        *(({key: size}, f"{key} of the image processor is .*; the tower takes 28")
          for key in ("size", "crop_size")
          for size in (14, {}, {"shortest_edge": 14}, {"height": 28, "width": 14}, None)),
    ],
)  # fmt: skip
def test_an_image_processor_is_refused(llava, tmp_path, content, message):
    with pytest.raises(BadInput, match=f"^{re.escape(str(tmp_path / 'a'))}: {message}"):
        processor_of(llava, tmp_path / "a", content)


def test_an_image_processor_that_is_no_object(llava, tmp_path):
    with pytest.raises(BadInput, match=r"a: image_processor is \[28\]; an object is accepted"):
        processor_of(llava, tmp_path / "a", {"image_processor": [28]}, "processor_config.json")


def test_tiles_of_processor_and_model_must_agree(llava, tmp_path):
    model, processor = llava
    model.anyres = TILES
    same = processor_of(llava, tmp_path / "a", {"image_grid_pinpoints": [[28, 56], [56, 28]]})
    assert same.anyres is TILES and processor_of(llava, tmp_path / "a", {}).anyres is TILES
    with pytest.raises(BadInput, match=r"a: image_grid_pinpoints are \(\(28, 56\),\) for the .*28"):
        processor_of(llava, tmp_path / "a", {"image_grid_pinpoints": [[28, 56]]})


RAW = {
    "model_type": "llava",
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    },
    "text_config": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
        "max_position_embeddings": 512,
    },
}


def changed(key, value, raw=RAW):
    """RAW with another value under "key" or "part.key"."""
    part, _, name = key.rpartition(".")
    if part:
        return raw | {part: raw[part] | {name: value}}
    return raw | {name: value}


@pytest.mark.parametrize("layer", [-4, -1, 0, 3])
def test_the_layers_of_a_config(layer):
    config = checkpoints.read_config(changed("vision_feature_layer", layer), "config.json")
    assert config.vision_feature_layer == layer and config.model_type == "llava"
    assert config.text_config.hidden_size == 64 and config.vision_config.hidden_size == 32


def test_a_config_that_says_little():
    """What is missing or null has transformers' defaults, which are those of LLaVA-1.5."""
    raw = {"model_type": "llava", "vision_config": None, "prompt_template": None}
    config = checkpoints.read_config(raw, "config.json")
    assert config.vision_feature_layer == -2
    assert config.vision_feature_select_strategy == "default"
    tower = changed("vision_config", {"hidden_size": 32, "num_attention_heads": 4})
    assert checkpoints.read_config(tower, "config.json").vision_config.hidden_size == 32
    for key in ("prompt_template", "image_aspect"):
        assert getattr(checkpoints.read_config(changed(key, "x"), "c"), key) == "x"
    full = changed("vision_feature_select_strategy", "full")
    assert checkpoints.read_config(full, "c").vision_feature_select_strategy == "full"


COUNTS = (
    "vision_config.hidden_size vision_config.intermediate_size vision_config.num_hidden_layers "
    "vision_config.num_attention_heads vision_config.image_size vision_config.patch_size "
    "text_config.hidden_size text_config.intermediate_size text_config.num_hidden_layers "
    "text_config.num_attention_heads text_config.num_key_value_heads text_config.vocab_size "
    "text_config.max_position_embeddings"
).split()


@pytest.mark.parametrize("key", COUNTS)
def test_a_number_that_counts_nothing(monkeypatch, key):
    """transformers checks some of them itself, in words of its own; here it lets all pass."""
    most = 1000 if key.endswith("num_hidden_layers") else MOST
    config = checkpoints.read_config(RAW, "config.json")
    part, name = key.split(".")
    monkeypatch.setattr(transformers.LlavaConfig, "from_dict", lambda raw: config)
    told = f"^here: {re.escape(key)} is .*; a whole number from 1 to {most} is accepted"
    for value in (0, -1, True, 1.5, "3", most + 1):
        vars(getattr(config, part))[name] = value
        with pytest.raises(BadInput, match=told):
            checkpoints.read_config(RAW, "here")
    for value in (1, most, None):
        vars(getattr(config, part))[name] = value
        if key != "vision_config.num_hidden_layers":  # which bounds the layer
            assert checkpoints.read_config(RAW, "here") is config


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("model_type", None, "the model type is None; accepted is 'llava' or 'llava_next'"),
        ("model_type", ["llava"], r"the model type is \['llava'\]"),
        ("vision_config", [3], r"vision_config is \[3\]; an object is accepted"),
        ("text_config", "x", "text_config is 'x'; an object is accepted"),
        ("prompt_template", 3, "prompt_template is 3; a name is accepted"),
        ("image_aspect", ["pad"], r"image_aspect is \['pad'\]; a name is accepted"),
        ("vision_config.model_type", "x", "vision_config.model_type is 'x'; .*clip_vision_model"),
        ("vision_feature_layer", "1", "vision_feature_layer is '1'; accepted is one integer"),
        ("vision_feature_layer", True, "vision_feature_layer is True; accepted is one integer"),
        ("vision_feature_layer", 4, "vision_feature_layer is 4; the tower has 4 hidden states"),
        ("vision_feature_layer", -5, "vision_feature_layer is -5; the tower has 4 hidden states"),
        (
            "vision_feature_select_strategy",
            "x",
            ".*strategy is 'x'; accepted is 'default' or 'full'",
        ),
        ("projector_hidden_act", "x", "projector_hidden_act is 'x'; accepted is 'gelu'"),
        ("text_config.hidden_size", "x", "not a usable config"),
    ],
)
def test_a_config_is_refused(key, value, message):
    with pytest.raises(BadInput, match=f"^here: {message}"):
        checkpoints.read_config(changed(key, value), "here")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("vision_feature_select_strategy", "full", ".*'full'; accepted is 'default' for LLaVA-NeXT"),
        *(("image_grid_pinpoints", points, "image_grid_pinpoints is .* multiples of 28")
          for points in ([[28, 0]], [[28, 57]], [[-28, 28]], [], [[28, 28, 28]])),
    ],
)  # fmt: skip
def test_a_config_of_tiles_is_refused(key, value, message):
    raw = RAW | {"model_type": "llava_next", "image_grid_pinpoints": [[28, 56], [56, 28]]}
    assert checkpoints.read_config(raw, "here").model_type == "llava_next"
    with pytest.raises(BadInput, match=f"^here: {message}"):
        checkpoints.read_config(changed(key, value, raw), "here")


# ---- folders that are no model


@pytest.mark.parametrize(
    "files, message",
    [
        (["adapter_config.json"], "an adapter, where a whole model is needed; its base is BASE"),
        (["args.json", "model/x", "adapter/x"], "run, .* it holds FOLDER/model and FOLDER/adapter"),
        (["args.json", "model/x"], r"run, .* it holds FOLDER/model\. "),
        (["args.json", "adapter/x"], r"run, .* it holds FOLDER/adapter\. "),
        (["args.json", "model"], "run, .* it holds neither model/ nor adapter/"),
        (["x"], "no config.json there; the folder of a model is needed"),
    ],
)
def test_a_folder_that_is_no_model(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"base_model_name_or_path": "BASE"}')
    message = message.replace("FOLDER", re.escape(str(tmp_path)))
    with pytest.raises(BadInput, match=f"^{re.escape(str(tmp_path))}: .*{message}"):
        checkpoints.find_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert checkpoints.find_model(tmp_path) == tmp_path


def test_a_model_that_transformers_cannot_build():
    def fails(config, dtype):
        raise ValueError("no\nsuch")

    config = transformers.AutoConfig.for_model("llama")
    told = r"^config.json: no model can be built of a 'llama' config \(.*no such\)"
    with pytest.raises(BadInput, match=told):
        checkpoints.empty(fails, config, torch.float32, "meta")


@pytest.mark.parametrize("quantize, refused", [("nf4", True), (None, False), ("none", False)])
def test_llavas_own_lora_in_4_bits(checkpoint, parts, tmp_path, monkeypatch, quantize, refused):
    """It is merged when it is read; what follows is another refusal."""
    folder = tmp_path / "m"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"mm_vision_tower": "x", "model_type": "llava_llama", "mm_projector_type": "linear"}
    (folder / "config.json").write_text(json.dumps(config | own))
    found = {}, folder, parts / "vision", folder
    monkeypatch.setattr(checkpoints, "original_parts", lambda *_: found)
    monkeypatch.setattr(checkpoints, "translated", lambda raw, *_: RAW | {"model_type": "blip"})
    told = ": --quantize nf4: LLaVA's own LoRA" if refused else "/config.json: the model type is"
    with pytest.raises(BadInput, match=f"^{re.escape(str(folder))}{told}"):
        checkpoints.load(folder, quantize=quantize)


def test_a_tower_that_is_no_clip(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "siglip_vision_model"}')
    told = f"^{re.escape(str(tmp_path))}/config.json: model_type is 'siglip_vision_model'"
    with pytest.raises(BadInput, match=told):
        checkpoints.tower_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip", "vision_config": 3}')
    with pytest.raises(BadInput, match=f"^{re.escape(str(tmp_path))}: no usable config.json"):
        checkpoints.tower_config(tmp_path)


@pytest.mark.parametrize(
    "config, method",
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"quantization_config": "fp8"}, "fp8"),
        ({"text_config": "x"}, None),
        ({"quantization_config": {}}, None),
    ],
)
def test_weights_that_are_quantized_already(config, method):
    if method is None:
        return checkpoints.refuse_quantised(config, "here")
    with pytest.raises(BadInput, match=rf"^here: quantization_config: .* already \({method}\)"):
        checkpoints.refuse_quantised(config, "here")


@pytest.mark.parametrize(
    "files, message",
    [
        (["tokenizer.model"], "reading tokenizer.model needs the packages sentencepiece"),
        (["tokenizer.model", "tokenizer.json"], r"no usable tokenizer \("),
        ([], r"no usable tokenizer \("),
    ],
)
def test_a_tokenizer_that_cannot_be_read(tmp_path, monkeypatch, files, message):
    def fails(name, local_files_only, trust_remote_code):
        assert (name, local_files_only, trust_remote_code) == (str(tmp_path), True, False)
        raise ValueError("broken")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fails)
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(BadInput, match=f"^{re.escape(str(tmp_path))}: {message}"):
        checkpoints.read_tokenizer(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for name in files[:1]:
        (tmp_path / name).write_text(pointer)
        with pytest.raises(BadInput, match=f"{name}: .*git-lfs"):
            checkpoints.read_tokenizer(tmp_path)


# ---- which file a message names


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "blip"}, "/config.json: the model type is 'blip'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "/config.json: quantization_config: its"),
        ({"mm_vision_tower": "TOWER", "model_type": "llava_llama", "mm_projector_type": "linear"},
         "/config.json: mm_projector_type of the original LLaVA is 'linear'"),
        ({"multimodal_projector_bias": False}, ": the weights are not those .* unexpected: multi_m"),
        ({"image_token_index": 3}, ": the image token is 3 in config.json and "),
        ({"prompt_template": "checkpoint"}, ": the chat template cannot be followed"),
        ({"prompt_template": "nobodys"}, None),
        ({"image_aspect": "wide"}, None),
    ],
)  # fmt: skip
def test_a_message_names_the_file_of_the_checkpoint(checkpoint, parts, tmp_path, values, message):
    folder = tmp_path / "m"
    shutil.copytree(checkpoint, folder)
    if values.get("mm_vision_tower"):
        values = values | {"mm_vision_tower": str(parts / "vision")}
    for file in ("chat_template.json", "chat_template.jinja"):
        (folder / file).write_text('{"chat_template": "no"}' if file.endswith("json") else "no")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    told = f"^{re.escape(str(folder))}{message}" if message else "is unknown|'wide'; accepted are"
    with pytest.raises(BadInput, match=told):
        checkpoints.load(folder)


def test_a_message_names_the_part_that_does_not_fit(parts, tmp_path):
    """Of a composed model: the tower's folder, or the LLM's."""
    for part, other in (("vision", "llm"), ("llm", "vision")):
        folder = tmp_path / part
        shutil.copytree(parts / part, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
        named = {part: folder, other: parts / other}
        with pytest.raises(BadInput, match=f"^{re.escape(str(folder))}: the weights are not those"):
            checkpoints.compose(named["vision"], named["llm"])
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": "fp8"}))
    told = f"^{re.escape(str(folder))}/config.json: quantization_config"
    with pytest.raises(BadInput, match=told):
        checkpoints.compose(parts / "vision", folder)
    (folder / "config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(BadInput, match=f"^{re.escape(str(folder))}: no usable config.json"):
        checkpoints.compose(parts / "vision", folder)


def test_a_composed_model_takes_the_llms_own_template(parts, tmp_path):
    """--template checkpoint: of the LLM's folder, with <image> as its image token."""
    with pytest.raises(BadInput, match=f"^{re.escape(str(parts / 'llm'))}: --template checkpoint"):
        checkpoints.compose(parts / "vision", parts / "llm", template="checkpoint")
    folder = tmp_path / "llm"
    shutil.copytree(parts / "llm", folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ 'Q: ' if m.role == 'user' }}"
        "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}"
        "{% endif %}{{ '\nA:\n' if m.role == 'user' else eos_token }}{% endfor %}"
    )
    _, processor = checkpoints.compose(parts / "vision", folder, template="checkpoint")
    assert processor.template == "checkpoint" and processor.own.user == "Q: {}\nA:\n"
    assert processor.own.after_image == ""


# ---- a model on another device


def test_what_is_saved_comes_to_the_cpu(llava, tmp_path, monkeypatch):
    """Whole weights, in the dtype that is asked for, and adapters with their head."""
    model, processor = llava
    model.prepare(lora_rank=2, projector=False)
    add_adapter(model.llm, "reward", 2)
    model.add_head("reward")
    want = adapters.base_hash(model)
    kept = []
    take = lambda tensors, *_: kept.extend(dict(tensors).values())
    with Elsewhere(model) as there:
        monkeypatch.setattr(checkpoints, "write_shards", take)
        monkeypatch.setattr(adapters, "write_tensors", take)
        for dtype in (None, torch.float16):
            kept.clear()
            checkpoints.save(model, processor, tmp_path / str(dtype), dtype)
            assert {t.dtype for t in kept} == {dtype or torch.float32} and len(kept) > 50
            assert not any(map(there.holds, kept)) and all(t.is_contiguous() for t in kept)
        kept.clear()
        adapters.save_reward(model, tmp_path / "reward", "BASE", {})
        assert len(kept) == 2 * 2 * 14 + 2 and not any(map(there.holds, kept))
        assert adapters.base_hash(model) == want


def test_the_hash_of_a_base():
    """Names and shapes, and of each tensor every n-th value in bfloat16, n = numbers // 4096; without LoRA and heads."""
    tensors = {
        "llm.a.base.weight": torch.arange(20000.0).view(100, 200),
        "llm.b": torch.tensor([1.5, 2.5]),
        "heads.reward.weight": torch.ones(1),
        "llm.a.adapters.policy.lora_A": torch.ones(1),
        "projector.x": torch.ones(3),
    }
    model = SimpleNamespace(state_dict=lambda: dict(tensors), initial_projector=[])
    digest = hashlib.sha256()
    for name, shape, values in (
        ("llm.a.weight", (100, 200), torch.arange(0.0, 20000, 4)),
        ("llm.b", (2,), torch.tensor([1.5, 2.5])),
        ("projector.x", (3,), torch.ones(3)),
    ):
        digest.update(f"{name} {shape}".encode())
        digest.update(values.bfloat16().view(torch.uint8).numpy())
    want = digest.hexdigest()[:16]
    assert adapters.base_hash(model) == want
    started = torch.nn.ParameterDict({"x": torch.ones(3)})
    tensors["projector.x"] = torch.zeros(3)
    assert adapters.base_hash(model) != want
    model.initial_projector = [started]
    assert adapters.base_hash(model) == want, "a projector that trains, as it started"


# ---- what is said


@pytest.mark.parametrize(
    "dtype, keeps, said",
    [
        (torch.bfloat16, 0.654, True),
        (torch.float32, 0.654, False),
        (torch.bfloat16, None, False),
        (torch.bfloat16, "much", False),
    ],
)
def test_what_bfloat16_loses_is_said(checkpoint, tmp_path, capsys, dtype, keeps, said):
    folder = tmp_path / "m"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bfloat16_keeps": keeps}))
    checkpoints.load(folder, dtype)
    told = f"{folder}: bfloat16 keeps 65% of what its LoRA learned; --dtype float32, or the base "
    assert capsys.readouterr().err == said * (told + "with --adapter, keeps all of it\n")


def test_how_much_of_lora_bfloat16_would_keep(llava, tmp_path, capsys):
    """The projection of the rounded update on the update, over all layers; nothing of it where a dtype is given."""
    model, processor = llava
    model.prepare(lora_rank=2, projector=False)
    torch.manual_seed(0)
    part = whole = 0.0
    with torch.no_grad():
        for layer in model.lora_layers():
            lora = layer.adapters["policy"]
            lora.lora_B.normal_(std=1e-3)
            update = lora.scale * (lora.lora_B @ lora.lora_A)
            base = layer.base.weight
            rounded = (base + update).bfloat16().double() - base.bfloat16().double()
            part += float((rounded * update).sum())
            whole += float(update.double().square().sum())
    checkpoints.save(model, processor, tmp_path / "a")
    found = json.loads((tmp_path / "a" / "config.json").read_text())["bfloat16_keeps"]
    assert found == pytest.approx(part / whole, abs=1e-3) and found == round(found, 4)
    assert 0.01 < found < 1.5
    told = f"{tmp_path}/a: merged layers are float32; bfloat16 would keep {found:.0%} of LoRA's update\n"
    assert capsys.readouterr().err == told
    checkpoints.save(model, processor, tmp_path / "b", torch.float32)
    assert "bfloat16_keeps" not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert not capsys.readouterr().err


def test_the_second_process_saves_nothing(llava, tmp_path, monkeypatch):
    """It only takes part in gathering every weight."""
    model, processor = llava
    gathered = []
    monkeypatch.setattr(checkpoints.processes, "number", 1)
    monkeypatch.setattr(checkpoints.sharding, "whole", lambda x: gathered.append(x) or x)
    checkpoints.save(model, processor, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    assert len(gathered) == len(model.state_dict())


def test_texts_are_utf_8_whatever_the_locale(llava, tmp_path, monkeypatch):
    """Chat templates are: none is left to what the machine prefers."""
    model, processor = llava
    for name in ("read_text", "write_text"):
        plain = getattr(Path, name)

        def strict(self, *given, encoding=None, plain=plain, **more):
            assert encoding == "utf-8", self
            return plain(self, *given, encoding=encoding, **more)

        monkeypatch.setattr(Path, name, strict)
    checkpoints.write_processor(model, processor, tmp_path)
    assert chat.chat_source(tmp_path, processor.tokenizer)


def test_what_a_model_was_read_from(checkpoint, parts):
    """The files, known by name, size and time, in no matter which order; of a composed one the seed too."""
    model, _ = checkpoints.load(checkpoint)
    file = checkpoint / "model.safetensors"
    assert model.source == file_identity(file) == weights.source(weights.weights(checkpoint))
    assert checkpoints.load(checkpoint, device="meta")[0].source == ""
    composed = [
        checkpoints.compose(parts / "vision", parts / "llm", seed=s)[0].source for s in (3, 4)
    ]
    files = [parts / part / "model.safetensors" for part in ("vision", "llm")]
    both = "; ".join(sorted(map(file_identity, files)))
    assert composed == [f"{both}; projector of seed {seed}" for seed in (3, 4)]
    first, second = (weights.tensor_index(parts / part) for part in ("vision", "llm"))
    assert weights.source(first, second) == weights.source(second, first) == both


@pytest.mark.parametrize("with_lora", [False, True])
def test_the_parts_of_llavas_own_checkpoint(checkpoint, parts, tmp_path, monkeypatch, with_lora):
    """Tower, tokenizer and LoRA from where `original_parts` finds them; which prompt, `chat.choose` is asked."""
    folder, lora, seen = tmp_path / "m", tmp_path / "lora", []
    shutil.copytree(checkpoint, folder)
    shutil.copytree(parts / "vision", tmp_path / "tower")
    lora.mkdir()
    weights.write_tensors({"x": torch.ones(1)}, lora / "adapter_model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["prompt_template"]
    (folder / "config.json").write_text(json.dumps({"mm_vision_tower": "t"}))
    images = {"image_mean": MEAN, "image_std": STD}
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(images))
    found = weights.weights(folder), folder, tmp_path / "tower", lora if with_lora else None
    monkeypatch.setattr(checkpoints, "original_parts", lambda *_: found)
    monkeypatch.setattr(checkpoints, "translated", lambda raw, path, tower: config)
    monkeypatch.setattr(
        checkpoints.chat, "choose", lambda *given: seen.append(given) or ("plain", None)
    )
    monkeypatch.setattr(checkpoints, "load_adapter", lambda model, where: where)
    monkeypatch.setattr(checkpoints, "merge", seen.append)
    model, processor = checkpoints.load(folder)
    (where, tokenizer, *told), *merged = seen
    assert (where, told) == (folder, ["<image>", "llama", True]) and merged == [lora] * with_lora
    assert tokenizer is processor.tokenizer and processor.template == "plain"
    assert (processor.image_mean, processor.image_std) == (MEAN, STD)
    files = [folder / "model.safetensors"] + [lora / "adapter_model.safetensors"] * with_lora
    assert model.source == "; ".join(sorted(map(file_identity, files)))


def test_which_prompt_a_checkpoint_of_the_hub_has(checkpoint, tmp_path, monkeypatch):
    """What it notes; without a note `chat.choose` decides, unless one is given."""
    folder, seen = tmp_path / "m", []
    shutil.copytree(checkpoint, folder)
    monkeypatch.setattr(
        checkpoints.chat, "choose", lambda *given: seen.append(given) or ("chatml", None)
    )
    of = lambda **how: checkpoints.load(folder, device="meta", **how)[1]
    assert of().template == "vicuna_v1" and of(template="plain").template == "plain" and not seen
    assert (of().image_aspect, of(image_aspect="checkpoint").image_aspect) == ("pad", "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    config |= {"prompt_template": None, "image_aspect": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert of(template="plain").template == "plain" and not seen
    found = of()
    assert (found.template, found.image_aspect) == ("chatml", "pad")
    assert seen == [(folder, found.tokenizer, "<image>", "llama", False)]


def test_an_llm_whose_head_is_its_embeddings(parts, tmp_path):
    """Its files need not hold the head; what they hold must be equal."""
    config = transformers.AutoConfig.from_pretrained(parts / "llm")
    config.tie_word_embeddings = True
    llm = transformers.LlamaForCausalLM(config)
    shutil.copytree(parts / "llm", tmp_path / "llm")
    llm.save_pretrained(tmp_path / "llm")
    file = tmp_path / "llm" / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    model, _ = checkpoints.compose(parts / "vision", tmp_path / "llm")
    assert checkpoints.is_tied(model.llm)
    assert torch.equal(model.llm.lm_head.weight[:-2], llm.lm_head.weight)
    weights.write_tensors(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file
    )
    with pytest.raises(BadInput, match=f"^{re.escape(str(tmp_path))}/llm: the config ties lm_head"):
        checkpoints.compose(parts / "vision", tmp_path / "llm")
