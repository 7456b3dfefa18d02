"""Checkpoints that LLaVA's own code wrote (haotian-liu/LLaVA), translated into the hub's terms.

transformers is imported where needed: at the top it would slow every `--help`.
"""

import json


from common import BadInput, read_json
from formats.weights import HUB_FILES, find, tower_weights, weights


def pinpoints(value):
    """A list of pairs, or a string that spells one, as tuples. Anything else is left as it is."""
    try:
        if isinstance(value, str):
            value = json.loads(value.replace("(", "[").replace(")", "]"))
        return tuple((int(a), int(b)) for a, b in value)
    except (TypeError, ValueError):
        return value


def translated(raw, path, tower):
    """LLaVA's own flat config.json in the hub's terms.

    tower: the vision_config. A setting that would change the model is checked.
    """
    # the settings that decide what the model computes
    kinds = {
        "llava": "llama",
        "llava_llama": "llama",
        "llava_mistral": "mistral",
        "llava_qwen": "qwen2",
    }
    projector = raw.get("mm_projector_type")
    select = raw.get("mm_vision_select_feature", "patch")
    ratio = raw.get("image_aspect_ratio")
    ratios = (None, "square", "pad", "anyres")
    merge = "spatial_unpad" if ratio == "anyres" else "flat"  # must go with the ratio
    points = pinpoints(raw.get("image_grid_pinpoints"))
    good_points = ratio != "anyres" or isinstance(points, tuple)
    for key, good, accepted in (
        ("model_type", raw.get("model_type") in kinds, ", ".join(kinds)),
        ("mm_projector_type", projector == "mlp2x_gelu", "'mlp2x_gelu', as 1.5 and 1.6 have it"),
        ("mm_vision_select_feature", select in ("patch", "cls_patch"), "'patch' or 'cls_patch'"),
        ("image_aspect_ratio", ratio in ratios, "'pad' or 'square' (1.5) or 'anyres' (1.6)"),
        ("mm_patch_merge_type", raw.get("mm_patch_merge_type", "flat") == merge, repr(merge)),
        ("image_grid_pinpoints", good_points, "pairs of width and height"),
        ("mm_use_im_start_end", not raw.get("mm_use_im_start_end"), "false"),
    ):
        if not good:
            raise BadInput(
                f"{path}: {key} of the original LLaVA is {raw.get(key)!r}; accepted is {accepted}."
            )

    # the flat config also holds the LLM's settings
    not_llm = ("image_", "tokenizer_", "architectures")
    llm = {k: v for k, v in raw.items() if "mm_" not in k and not k.startswith(not_llm)}
    config = {
        "model_type": "llava_next" if ratio == "anyres" else "llava",
        "text_config": llm | {"model_type": kinds[raw["model_type"]]},
        "vision_config": tower,
        "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default" if select == "patch" else "full",
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
    }
    if ratio == "anyres":  # the original has width first
        config["image_grid_pinpoints"] = [[height, width] for width, height in points]
    return config


def original_parts(folder, raw):
    """Find the parts of an original LLaVA.

    -> weights under the hub's names, folder of the tokenizer, folder of the tower, folder of LoRA
    or None.

    Accepted are three forms:
    - a whole checkpoint;
    - a projector (`mm_projector`), beside the LLM that config.json names in `_name_or_path`;
    - LoRA and `non_lora_trainables`, beside the base that adapter_config.json names.

    Weights without a tower of their own get that of `mm_vision_tower`.
    """
    # the weights
    whole = any(folder.glob("model*.safetensors*")) or any(folder.glob("pytorch_model*"))
    base, lora = folder, folder / "adapter_config.json"
    if whole:
        index = weights(folder)
    else:
        path, key, stem = folder / "config.json", "_name_or_path", "mm_projector"
        if lora.exists():
            path, key, stem = lora, "base_model_name_or_path", "non_lora_trainables"
        trained = weights(folder, stem)
        name = read_json(path).get(key)
        if not name:
            raise BadInput(
                f"{path}: {key} is {name!r}; "
                f"the folder or hub id of the model below this {stem} is needed."
            )
        base = find(name)
        index = weights(base) | trained

    # the tower
    has_tower = any(name.startswith("vision_tower.") for name in index)
    tower_files = ("config.json", "preprocessor_config.json") if has_tower else HUB_FILES
    tower = find(raw["mm_vision_tower"], tower_files)
    if not has_tower:
        for name, place in tower_weights(tower).items():
            index[f"vision_tower.vision_model.{name}"] = place

    tokenizer = folder if any(folder.glob("tokenizer*")) else base
    return index, tokenizer, tower, folder if lora.exists() and not whole else None


def add_image_token(tokenizer):
    """Add `<image>`, and `<pad>` if there is no padding token. A token that is there stays."""
    import transformers

    for token in ("<image>",) if tokenizer.pad_token else ("<image>", "<pad>"):
        added = transformers.AddedToken(token, special=True, normalized=False)
        tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or "<pad>"


def add_rows(llm, rows):
    """Give embeddings and head at least this many rows. A new row is the mean of the old ones."""
    old = llm.config.vocab_size
    if rows > old:
        llm.resize_token_embeddings(rows, rows, mean_resizing=False)
        for layer in (llm.get_input_embeddings(), llm.get_output_embeddings()):
            layer.weight[old:] = layer.weight[:old].float().mean(0).to(layer.weight.dtype)
