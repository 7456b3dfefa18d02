"""Checkpoints that LLaVA's own code wrote (haotian-liu/LLaVA), in the terms of the hub's."""

import json

import transformers  # gives its classes when first used, so `--help` does not pay for them

from common import BadInput, read_json
from formats.weights import HUB_FILES, find, tower_weights, weights


def pinpoints(value):
    """A list of pairs, also spelled as a string, as tuples; anything else as it is."""
    try:
        value = (
            json.loads(value.replace("(", "[").replace(")", "]"))
            if isinstance(value, str)
            else value
        )
        return tuple((int(a), int(b)) for a, b in value)
    except (TypeError, ValueError):
        return value


def translated(raw, path, tower):
    """LLaVA's own flat config.json in the hub's terms. tower: the vision_config. What would change the model is checked."""
    kinds = {
        "llava": "llama",
        "llava_llama": "llama",
        "llava_mistral": "mistral",
        "llava_qwen": "qwen2",
    }
    ratio, select = raw.get("image_aspect_ratio"), raw.get("mm_vision_select_feature", "patch")
    merge, points = (
        "spatial_unpad" if ratio == "anyres" else "flat",
        pinpoints(raw.get("image_grid_pinpoints")),
    )
    for key, good, accepted in (
        ("model_type", raw.get("model_type") in kinds, ", ".join(kinds)),
        (
            "mm_projector_type",
            raw.get("mm_projector_type") == "mlp2x_gelu",
            "'mlp2x_gelu', as 1.5 and 1.6 have it",
        ),
        ("mm_vision_select_feature", select in ("patch", "cls_patch"), "'patch' or 'cls_patch'"),
        (
            "image_aspect_ratio",
            ratio in (None, "square", "pad", "anyres"),
            "'pad' or 'square' (1.5) or 'anyres' (1.6)",
        ),
        ("mm_patch_merge_type", raw.get("mm_patch_merge_type", "flat") == merge, repr(merge)),
        (
            "image_grid_pinpoints",
            ratio != "anyres" or isinstance(points, tuple),
            "pairs of width and height",
        ),
        ("mm_use_im_start_end", not raw.get("mm_use_im_start_end"), "false"),
    ):
        if not good:
            raise BadInput(
                f"{path}: {key} of the original LLaVA is {raw.get(key)!r}; accepted is {accepted}."
            )
    text = {
        k: v
        for k, v in raw.items()
        if "mm_" not in k and not k.startswith(("image_", "tokenizer_", "architectures"))
    }
    config = {
        "model_type": "llava_next" if ratio == "anyres" else "llava",
        "text_config": text | {"model_type": kinds[raw["model_type"]]},
        "vision_config": tower,
        "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default" if select == "patch" else "full",
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
    }
    if ratio == "anyres":
        config["image_grid_pinpoints"] = [
            [height, width] for width, height in points
        ]  # the original has width first
    return config


def original_parts(folder, raw):
    """Where the parts of an original LLaVA are -> weights under the hub's names, folder of the tokenizer, of the tower, LoRA.

    A whole checkpoint; or a projector (`mm_projector`) beside the LLM that config.json's `_name_or_path` names; or LoRA and
    `non_lora_trainables` beside the base that adapter_config.json names. Without a tower of their own: `mm_vision_tower`.
    """
    whole = any(folder.glob("model*.safetensors*")) or any(folder.glob("pytorch_model*"))
    base, lora = folder, folder / "adapter_config.json"
    if whole:
        found = weights(folder)
    else:
        path, key, stem = folder / "config.json", "_name_or_path", "mm_projector"
        if lora.exists():
            path, key, stem = lora, "base_model_name_or_path", "non_lora_trainables"
        trained = weights(folder, stem)
        name = read_json(path).get(key)
        if not name:
            raise BadInput(
                f"{path}: {key} is {name!r}; the folder or hub id of the model below this {stem} is needed."
            )
        base = find(name)
        found = weights(base) | trained
    own = any(name.startswith("vision_tower.") for name in found)
    tower = find(
        raw["mm_vision_tower"], ("config.json", "preprocessor_config.json") if own else HUB_FILES
    )
    if not own:
        found |= {f"vision_tower.vision_model.{k}": v for k, v in tower_weights(tower).items()}
    words = folder if any(folder.glob("tokenizer*")) else base
    return found, words, tower, folder if lora.exists() and not whole else None


def add_image_token(tokenizer):
    """Add `<image>`, and `<pad>` if there is no padding token. Nothing happens if they are there."""
    for token in ("<image>",) if tokenizer.pad_token else ("<image>", "<pad>"):
        tokenizer.add_tokens(
            transformers.AddedToken(token, special=True, normalized=False), special_tokens=True
        )
    tokenizer.pad_token = tokenizer.pad_token or "<pad>"


def add_rows(llm, rows):
    """Give embeddings and head at least this many rows; a new one is the mean of the old."""
    old = llm.config.vocab_size
    if rows > old:
        llm.resize_token_embeddings(rows, rows, mean_resizing=False)
        for layer in (llm.get_input_embeddings(), llm.get_output_embeddings()):
            layer.weight[old:] = layer.weight[:old].float().mean(0).to(layer.weight.dtype)
