"""Every on-disk layout of LLaVA-1.5 and LLaVA-NeXT (1.6) in; the hub layout and PEFT adapters out.

transformers wrote the same weights under five namings (4.x and 5.x, on disk and in memory), LLaVA's own code under a sixth.
All of them are read by renaming to the hub's, and only the hub's is written, because every version reads it:

    the hub's                       here            transformers' others            LLaVA's own
    vision_tower.vision_model.X     vision.X        [model.]vision_tower.X          model.vision_tower.[the hub's]
    multi_modal_projector.linear_1  projector.X     model.multi_modal_projector.X   model.mm_projector.0 (and linear_2, .2)
    image_newline                   image_newline   model.image_newline             model.image_newline
    language_model.model.X          llm.model.X     model.language_model.[model.]X  model.X
    language_model.lm_head.X        llm.lm_head.X   lm_head.X                       lm_head.X

transformers leaves a weight that it does not find at its random start and goes on (4.x and 5.0-5.5 do so with the whole
tower of a file written as `vision_tower.X`). Here a missing or an unexpected tensor is an error.
"""

import hashlib
import json
import re
from pathlib import Path

import huggingface_hub
import torch
import transformers  # gives its classes when first used; importing them here would cost every --help 2.5 seconds
from safetensors import safe_open
from safetensors.torch import save_file

import training
from anyres import AnyRes
from data import TEMPLATES, Processor
from model import BadInput, LoRALinear, MLLM, Projector

SHARD_SIZE = "5GB"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LOCAL = {"local_files_only": True, "trust_remote_code": False}
HUB_FILES = (
    "*.json",
    "*.safetensors",
    "*.model",
    "*.jinja",
    "merges.txt",
    "vocab.txt",
)  # neither pickles nor code


# ---- names


def hub_name(name):
    """The hub's name of a tensor in any naming of transformers or LLaVA; an unknown name comes back as it is."""
    name = re.sub(
        r"^model\.(?=(vision_tower|multi_modal_projector|language_model|mm_projector)\.|image_newline$)",
        "",
        name,
    )
    name = re.sub(r"^model\.(?=(embed_tokens|layers|norm)\.)", "language_model.model.", name)
    name = re.sub(
        r"^mm_projector\.(0|2)\.",
        lambda m: f"multi_modal_projector.linear_{int(m[1]) // 2 + 1}.",
        name,
    )
    name = re.sub(r"^vision_tower\.vision_tower\.", "vision_tower.", name)
    name = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    name = re.sub(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)


def our_hub_name(name):
    """The hub's name of a tensor of `MLLM`."""
    if name == "image_newline":
        return name
    part, rest = name.split(".", 1)
    hub = {
        "vision": "vision_tower.vision_model",
        "projector": "multi_modal_projector",
        "llm": "language_model",
    }
    return f"{hub[part]}.{rest}"


# ---- files


def find(name, files=HUB_FILES):
    """The folder `name`, or if there is none and it looks like owner/name, that repository's `files`, downloaded."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        raise BadInput(f"{name}: no such folder; a folder or a hub id (owner/name) is accepted.")
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(files)))
    except (
        Exception
    ) as error:  # the client passes on its own errors, its HTTP library's and the system's
        raise BadInput(
            f"{name}: no such folder, and not received from the hub ({one_line(error)})."
        ) from None


def one_line(error):
    """Kind and beginning of an error of another library."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def read_json(path, default=None):
    """The object in a JSON file; without a file, `default` if there is one."""
    if default is not None and not path.exists():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable as JSON ({one_line(error)}).") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds a {type(value).__name__}; an object is accepted.")
    return value


def tensor_index(folder, stem="model"):
    """What the safetensors files of a folder hold, from their headers: {name: (file, name, shape)}.

    Left out are buffers that old versions stored and that are computed today.
    """
    index, files = folder / f"{stem}.safetensors.index.json", [folder / f"{stem}.safetensors"]
    shards = sorted(
        folder.glob(f"{stem}-*-of-*.safetensors")
    )  # of pickles that were converted one by one
    if index.exists() and not files[0].exists():
        files = [
            folder / file for file in sorted(set(read_json(index).get("weight_map", {}).values()))
        ]
    elif shards and not files[0].exists():
        files = shards
    elif not files[0].exists():
        other = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "no other weights"
        raise BadInput(
            f"{folder}: found {other} instead of {files[0].name}; pickles are not read: convert them with "
            "from_pretrained(OLD) and save_pretrained(NEW) of transformers or PEFT, or, what LLaVA's own code wrote, each "
            f"file with safetensors.torch.save_file(torch.load(BIN, weights_only=True), NEW), NEW = {stem}[-1-of-N].safetensors."
        )
    found = {}
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                found |= {
                    name: (file, name, tuple(f.get_slice(name).get_shape())) for name in f.keys()
                }
        except (
            Exception
        ) as error:  # safetensors has an error class of its own, derived from Exception
            raise BadInput(f"{file}: not readable as safetensors ({one_line(error)}).") from None
    return {k: v for k, v in found.items() if not k.endswith((".inv_freq", ".position_ids"))}


def weights(folder, stem="model"):
    """`tensor_index` under the hub's names."""
    files = tensor_index(folder, stem)
    found = {
        hub_name(re.sub(r"^base_model\.(model\.(?=model\.))?", "", k)): v for k, v in files.items()
    }
    if len(found) < len(files):
        raise BadInput(
            f"{folder}: {len(files) - len(found)} weights are there twice, under two names."
        )
    return found


def fill(slots, found, folder, tied=()):
    """Copy the tensors `found` into `slots`, name -> tensor, one at a time, so that memory holds one copy of the model.

    tied: names in `slots` that share the memory of another; they may be missing, and must be equal to it if not.
    """
    wrong = {
        "missing": slots.keys() - found.keys() - set(tied),
        "unexpected": found.keys() - slots.keys(),
    }
    if any(wrong.values()):
        few = lambda names: (
            ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        )
        text = "; ".join(f"{what}: {few(names)}" for what, names in wrong.items() if names)
        raise BadInput(f"{folder}: the weights are not those that its config asks for; {text}.")
    for name, (file, _, shape) in found.items():
        if shape != tuple(slots[name].shape):
            raise BadInput(
                f"{file}: {name} has the shape {shape}, but the config asks for {tuple(slots[name].shape)}."
            )
    for file in sorted({file for file, _, _ in found.values()}):
        with safe_open(file, "pt") as f:
            for name in (n for n in found if found[n][0] == file and n not in tied):
                slots[name].copy_(f.get_tensor(found[name][1]))
    for name in (n for n in tied if n in found):
        with safe_open(found[name][0], "pt") as f:
            if not torch.equal(f.get_tensor(found[name][1]).to(slots[name]), slots[name]):
                raise BadInput(
                    f"{folder}: the config ties {name} to the embeddings; the files hold another matrix."
                )


# ---- parts


def empty(make, config, dtype, device):
    """A transformers model whose weights are allocated but not drawn. make: a from-config function."""
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device(device):
        model = make(config, dtype=dtype)
    model.tie_weights()
    return model


def empty_llm(config, embeddings, dtype, device):
    """An LLM to be filled in, with as many token rows as the file has: early LLaVA configs name another number."""
    if embeddings:
        config.vocab_size = embeddings[2][0]
    try:
        llm = empty(transformers.AutoModelForCausalLM.from_config, config, dtype, device)
    except Exception as error:  # not a causal LM, or sizes that do not go together
        raise BadInput(
            f"no LLM can be built of a {config.model_type!r} config ({one_line(error)})."
        ) from None
    if llm.base_model_prefix != "model" or not hasattr(llm.base_model, "layers"):
        raise BadInput(
            f"an LLM of type {config.model_type!r} is not accepted; llama, mistral, qwen2 and the like are."
        )
    return llm


def is_tied(llm):
    """Is the LM head the embedding matrix?"""
    return llm.get_output_embeddings().weight is llm.get_input_embeddings().weight


def tower_weights(folder):
    """`tensor_index` of a CLIP's vision tower, or of that of a whole CLIP, under the names of CLIPVisionModel."""
    rest = (
        "text_model.",
        "text_projection.",
        "visual_projection.",
        "logit_scale",
    )  # of a whole CLIP
    return {
        k.removeprefix("vision_model."): v
        for k, v in tensor_index(folder).items()
        if not k.startswith(rest)
    }


def tower_config(folder):
    """CLIPVisionConfig of a CLIP's folder."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise BadInput(
            f"{folder}/config.json: model_type is {kind!r}; accepted is 'clip' or 'clip_vision_model'."
        )
    try:
        return transformers.CLIPVisionConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # type checks of transformers and of huggingface_hub
        raise BadInput(f"{folder}: no usable config.json ({one_line(error)}).") from None


def read_tokenizer(folder):
    """The fast tokenizer in a folder."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **LOCAL)
    except Exception as error:  # each kind of tokenizer file fails in its own way
        if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
            raise BadInput(
                f"{folder}: reading tokenizer.model needs the packages sentencepiece and protobuf; "
                "tokenizer.json of another copy of the same LLM is accepted in its place."
            ) from None
        raise BadInput(f"{folder}: no usable tokenizer ({one_line(error)}).") from None
    if not tokenizer.is_fast:
        raise BadInput(
            f"{folder}: {type(tokenizer).__name__} is a slow tokenizer; one of tokenizer.json is accepted."
        )
    return tokenizer


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


def make_processor(folder, tokenizer, model, template, image_aspect):
    """Mean and standard deviation come from `folder`, from a file of their own (4.x) or processor_config.json (5.x)."""
    vision = model.vision.config
    given = read_json(folder / "processor_config.json", {}).get("image_processor")
    given = given or read_json(folder / "preprocessor_config.json", {})
    for key in ("size", "crop_size"):
        size = given.get(key, vision.image_size)
        if set(size.values() if isinstance(size, dict) else [size]) != {vision.image_size}:
            raise BadInput(
                f"{folder}: {key} of the image processor is {size}; the tower takes {vision.image_size}."
            )
    anyres = model.anyres
    if anyres and anyres.pinpoints != (
        other := pinpoints(given.get("image_grid_pinpoints", anyres.pinpoints))
    ):
        raise BadInput(
            f"{folder}: image_grid_pinpoints are {other} for the processor and {anyres.pinpoints} for the model."
        )
    return Processor(
        tokenizer=tokenizer,
        image_token_id=model.image_token_id,
        image_size=vision.image_size,
        image_tokens=(vision.image_size // vision.patch_size) ** 2 + model.keep_cls,
        image_mean=tuple(given.get("image_mean", CLIP_MEAN)),
        image_std=tuple(given.get("image_std", CLIP_STD)),
        template=template,
        image_aspect=image_aspect,
        max_length=model.llm.config.max_position_embeddings,
        anyres=anyres,
    )


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


# ---- LLaVA's own checkpoints


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


# ---- load and compose


def read_config(raw, path):
    """A config.json in the hub's terms as LlavaConfig or LlavaNextConfig. What `MLLM` does not compute is refused."""
    classes = {"llava": transformers.LlavaConfig, "llava_next": transformers.LlavaNextConfig}
    kind = raw.get("model_type")
    if kind not in classes:
        raise BadInput(f"{path}: the model type is {kind!r}; accepted is 'llava' or 'llava_next'.")
    tower = (raw.get("vision_config") or {}).get("model_type", "clip_vision_model")
    layer, select = (
        raw.get("vision_feature_layer", -2),
        raw.get("vision_feature_select_strategy", "default"),
    )
    activation = raw.get("projector_hidden_act", "gelu")
    for key, value, good, accepted in (
        ("vision_config.model_type", tower, tower == "clip_vision_model", "'clip_vision_model'"),
        ("vision_feature_layer", layer, type(layer) is int, "one integer"),
        (
            "vision_feature_select_strategy",
            select,
            select in ("default", "full"),
            "'default' or 'full'",
        ),
        (
            "vision_feature_select_strategy",
            select,
            kind == "llava" or select == "default",
            "'default' for LLaVA-NeXT",
        ),
        ("projector_hidden_act", activation, activation == "gelu", "'gelu'"),
    ):
        if not good:
            raise BadInput(f"{path}: {key} is {value!r}; accepted is {accepted}.")
    try:
        config = classes[kind].from_dict(raw)
    except Exception as error:  # type checks of transformers and of huggingface_hub
        raise BadInput(f"{path}: not a usable config ({one_line(error)}).") from None
    states = config.vision_config.num_hidden_layers + 1
    if not -states <= layer < states:
        raise BadInput(
            f"{path}: vision_feature_layer is {layer}; the tower has {states} hidden states."
        )
    if kind == "llava_next":
        points, side = pinpoints(config.image_grid_pinpoints), config.vision_config.image_size
        if (
            not isinstance(points, tuple)
            or not points
            or any(n <= 0 or n % side for point in points for n in point)
        ):
            raise BadInput(
                f"{path}: image_grid_pinpoints is {points!r}; accepted are pairs of multiples of {side}, the tower's input."
            )
    return config


@torch.no_grad()
@torch.random.fork_rng(devices=[])
def load(name, dtype=torch.float32, device="cpu", template=None, image_aspect="pad"):
    """Read a LLaVA-1.5 or LLaVA-NeXT checkpoint of transformers or of LLaVA, a folder or a hub id -> (MLLM, Processor).

    template: a name in data.TEMPLATES. By default what `save` noted in config.json (`prompt_template`, a key that
    transformers carries along unread), else as LLaVA trained it: "mistral" for a Mistral, "chatml" where the tokenizer
    knows `<|im_start|>` (1.6-34b), "vicuna_v1" for the rest. LLaVA's own LoRA is merged, as its code does; its tokenizers
    get `<image>`. The caller's random state is left alone (that of the CPU). On device "meta" no weight is read.
    """
    folder = find(name)
    path = folder / "config.json"
    raw = read_json(path)
    original = "mm_vision_tower" in raw
    if original:
        found, words, images, lora = original_parts(folder, raw)
        raw = translated(raw, path, tower_config(images).to_dict())
    else:
        found, words, images, lora = weights(folder), folder, folder, None
    config, tokenizer = read_config(raw, path), read_tokenizer(words)
    if original:
        add_image_token(tokenizer)
        config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    config.text_config.tie_word_embeddings = config.tie_word_embeddings
    llm = empty_llm(
        config.text_config, found.get("language_model.model.embed_tokens.weight"), dtype, device
    )
    image = config.image_token_index
    known = tokenizer.get_vocab().get("<image>", image)
    if known != image or not (original or 0 <= known < llm.config.vocab_size):
        raise BadInput(
            f"{folder}: the image token is {image} in config.json and {known} in the tokenizer; "
            f"one number below {llm.config.vocab_size}, the rows of the embeddings, is accepted."
        )
    vision = empty(transformers.CLIPVisionModel._from_config, config.vision_config, dtype, device)
    bias, keep_cls = (
        config.multimodal_projector_bias,
        config.vision_feature_select_strategy == "full",
    )
    projector = Projector(vision.config.hidden_size, llm.config.hidden_size, bias).to(device, dtype)
    anyres = None
    if config.model_type == "llava_next":
        side = vision.config.image_size
        anyres = AnyRes(
            pinpoints(config.image_grid_pinpoints), side, side // vision.config.patch_size
        )
    model = MLLM(vision, projector, llm, image, config.vision_feature_layer, keep_cls, anyres)
    if torch.device(device).type != "meta":
        slots = {our_hub_name(k): v for k, v in model.state_dict().items()}
        fill(slots, found, folder, ("language_model.lm_head.weight",) if is_tied(llm) else ())
        if lora:
            merge(load_adapter(model, lora))
        if original:
            add_rows(llm, len(tokenizer))

    trained = "chatml" if "<|im_start|>" in tokenizer.get_vocab() else "vicuna_v1"
    trained = "mistral" if llm.config.model_type == "mistral" else trained
    template = template or getattr(config, "prompt_template", None) or trained
    return model, make_processor(images, tokenizer, model, template, image_aspect)


@torch.no_grad()
@torch.random.fork_rng(devices=[])
def compose(
    vision, llm, dtype=torch.float32, device="cpu", template="vicuna_v1", image_aspect="pad", seed=0
):
    """A CLIP and an LLM, folders or hub ids, and a projector drawn from `seed` -> (MLLM, Processor).

    `<image>`, and `<pad>` if there is no padding token, are added to the tokenizer; a new row is the mean of the old.
    The rows are not padded to a multiple of 64 as by LLaVA's converter: so few answer rows pass through the head that
    a faster product would save little. The caller's random state is left alone (that of the CPU).
    """
    clip_folder, llm_folder = find(vision), find(llm)
    clip_config = tower_config(clip_folder)
    try:
        config = transformers.AutoConfig.from_pretrained(str(llm_folder), **LOCAL)
    except Exception as error:  # type checks of transformers and of huggingface_hub
        raise BadInput(f"{llm_folder}: no usable config.json ({one_line(error)}).") from None
    tower = empty(transformers.CLIPVisionModel._from_config, clip_config, dtype, device)
    fill(tower.state_dict(), tower_weights(clip_folder), clip_folder)
    found = tensor_index(llm_folder)
    language = empty_llm(config, found.get("model.embed_tokens.weight"), dtype, device)
    fill(language.state_dict(), found, llm_folder, ("lm_head.weight",) if is_tied(language) else ())

    tokenizer = read_tokenizer(llm_folder)
    add_image_token(tokenizer)
    torch.default_generator.manual_seed(seed)
    projector = Projector(clip_config.hidden_size, config.hidden_size).to(device, dtype)
    add_rows(language, len(tokenizer))
    model = MLLM(tower, projector, language, tokenizer.convert_tokens_to_ids("<image>"))
    return model, make_processor(clip_folder, tokenizer, model, template, image_aspect)


# ---- save


def adapters(model, adapter="policy"):
    """(our name of the layer, its LoRA) of every layer that has this adapter."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]
    return [(name, m.adapters[adapter]) for name, m in layers if adapter in m.adapters]


def not_of_base(name):
    """Is this tensor one of LoRA's, or of a scalar head?"""
    return name.endswith((".lora_A", ".lora_B")) or name.startswith("heads.")


def merged(model, dtype):
    """(hub name, tensor to write) of every weight; the policy's LoRA is added in float32."""
    lora = {f"{name}.base.weight": m for name, m in adapters(model)}
    for name, tensor in model.state_dict().items():
        if not_of_base(name) or name == "llm.lm_head.weight" and is_tied(model.llm):
            continue
        if name in lora:
            tensor = tensor.float() + lora[name].scale * (lora[name].lora_B @ lora[name].lora_A)
        yield our_hub_name(name.replace(".base.", ".")), tensor.to("cpu", dtype).contiguous()


def hub_config(model, processor, dtype):
    """config.json as transformers 5 writes it, and beside that the names under which 4.x looks for the same."""
    name = "LlavaNext" if model.anyres else "Llava"
    tiling = (
        {"image_grid_pinpoints": [list(p) for p in model.anyres.pinpoints]} if model.anyres else {}
    )
    config = getattr(transformers, f"{name}Config")(
        architectures=[f"{name}ForConditionalGeneration"],
        vision_config=model.vision.config.to_dict(),
        text_config=model.llm.config.to_dict(),
        image_token_index=model.image_token_id,
        image_seq_length=processor.image_tokens,
        vision_feature_layer=model.feature_layer,
        vision_feature_select_strategy="full" if model.keep_cls else "default",
        multimodal_projector_bias=model.projector.linear_1.bias is not None,
        tie_word_embeddings=is_tied(model.llm),
        prompt_template=processor.template,
        **tiling,
    ).to_diff_dict()
    text = config["text_config"]
    for part in (config, text, config["vision_config"]):
        part["dtype"] = part["torch_dtype"] = str(dtype).removeprefix("torch.")
        part.pop("_name_or_path", None)
    rope = dict(
        text.get("rope_parameters") or {}
    )  # 4.x does not look there and would take theta 10000 for any LLM
    if "rope_theta" in rope:
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    return config


def chat_template(name):
    """A template of data.py as the Jinja that transformers' apply_chat_template runs."""
    template, quote = TEMPLATES[name], json.dumps
    (before, cue), (lead, tail) = template.user.split("{}"), template.answer.split("{}")
    end = "eos_token" if template.end == "eos" else quote(template.end)
    return (
        "{% macro body(content) %}{% if content is string %}{{ content }}{% else %}"
        "{% for part in content if part.type == 'image' %}{{ '<image>\\n' }}{% endfor %}"
        "{% for part in content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}{% endmacro %}"
        f"{{{{ {quote(template.start)} }}}}{{% for message in messages %}}{{% if message.role == 'user' %}}"
        f"{{{{ {quote(before)} + body(message.content) + {quote(cue)} }}}}{{% elif message.role == 'assistant' %}}"
        f"{{{{ {quote(lead)} + body(message.content) + {quote(tail)} + {end} }}}}"
        "{% else %}{{ raise_exception('the roles are user and assistant') }}{% endif %}{% endfor %}"
    )


def write_processor(model, processor, folder):
    """Tokenizer, processor, generation config and chat template, in the files that 4.x and 5.x both read."""
    tokenizer = processor.tokenizer
    tokenizer.save_pretrained(
        folder
    )  # without Processor's `split_special_tokens`: theirs looks for `<image>`
    path = folder / "tokenizer_config.json"
    config = {
        k: v for k, v in read_json(path).items() if k not in ("is_local", "local_files_only")
    }  # of this machine
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = (
            "PreTrainedTokenizerFast"  # 4.x knows it under this name only, 5.x under both
        )
        config["model_input_names"] = [
            "input_ids",
            "attention_mask",
        ]  # 4.x adds token_type_ids, at which its generate stops
    training.write_json(path, config)
    side, anyres = processor.image_size, processor.anyres
    kind = "LlavaNextProcessor" if anyres else "LlavaProcessor"
    image_processor = {
        "image_processor_type": "LlavaNextImageProcessor" if anyres else "CLIPImageProcessor",
        "processor_class": kind,
        **dict.fromkeys(
            ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize"), True
        ),
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": processor.image_mean,
        "image_std": processor.image_std,
        **({"image_grid_pinpoints": anyres.pinpoints, "do_pad": True} if anyres else {}),
    }
    llava_processor = {
        "processor_class": kind,
        "image_token": tokenizer.convert_ids_to_tokens(processor.image_token_id),
        "patch_size": model.vision.config.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "full" if model.keep_cls else "default",
    }
    ids = {"bos": tokenizer.bos_token_id, "eos": processor.stop_ids, "pad": tokenizer.pad_token_id}
    template = chat_template(processor.template)
    training.write_json(folder / "preprocessor_config.json", image_processor)
    training.write_json(folder / "processor_config.json", llava_processor)
    training.write_json(
        folder / "generation_config.json",
        {f"{k}_token_id": v for k, v in ids.items() if v is not None},
    )
    training.write_json(folder / "chat_template.json", {"chat_template": template})  # before 4.52
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


@torch.no_grad()
def save(model, processor, folder, dtype=None):
    """Write a whole checkpoint in the hub layout, LoRA merged, weights in `dtype` (default: the model's).

    transformers 4.46 to 5.23 read it, with AutoProcessor. `folder` must not exist; it appears when it is complete.
    """
    dtype = dtype or model.dtype
    with training.whole_folder(training.new_folder(folder)) as aside:
        huggingface_hub.save_torch_state_dict(
            dict(merged(model, dtype)), aside, max_shard_size=SHARD_SIZE, metadata={"format": "pt"}
        )
        training.write_json(aside / "config.json", hub_config(model, processor, dtype))
        write_processor(model, processor, aside)


# ---- adapters


@torch.no_grad()
def save_adapter(model, folder, base_name, adapter="policy"):
    """Write LoRA, and the projector if it trains, as a PEFT adapter of LlavaForConditionalGeneration (or LlavaNext...).

    `PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base_name), folder)` loads it; tried with
    PEFT 0.13, 0.17, 0.21 and transformers 4.46, 4.57, 5.23. LoRA has the hub's names, which all of them read. The
    projector is written twice, under the hub's names and under transformers' own since 4.52: the oldest reads only the
    first, and PEFT 0.21 stops with a KeyError without the second. PEFT 0.10 stops at fields of the config that it does
    not know, so the newer ones are left out.
    """
    lora = adapters(model, adapter)
    if not lora or any(p.requires_grad for p in model.vision.parameters()):
        found = "the model has no LoRA" if not lora else "the vision tower trains"
        raise BadInput(
            f"{folder}: {found}, so an adapter cannot hold what was trained; save the whole model instead."
        )
    tensors = {}
    for name, m in lora:
        tensors |= {
            f"{our_hub_name(name)}.lora_A.weight": m.lora_A,
            f"{our_hub_name(name)}.lora_B.weight": m.lora_B,
        }
    projector = model.initial_projector is not None
    for name, tensor in model.projector.state_dict().items() if projector else ():
        tensors |= {
            f"multi_modal_projector.{name}": tensor,
            f"model.multi_modal_projector.{name}": tensor.clone(),
        }
    rank = len(lora[0][1].lora_A)
    alpha = round(lora[0][1].scale * rank, 6)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_name),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        # a list of names would also find the tower's q_proj, k_proj and v_proj
        "target_modules": rf".*language_model.*\.({'|'.join(sorted({name.split('.')[-1] for name, _ in lora}))})",
        "modules_to_save": ["multi_modal_projector"] if projector else None,
    }
    with training.whole_folder(training.new_folder(folder)) as aside:
        tensors = {f"base_model.model.{k}": v.cpu().contiguous() for k, v in tensors.items()}
        save_file(tensors, aside / "adapter_model.safetensors", metadata={"format": "pt"})
        training.write_json(aside / "adapter_config.json", config)


@torch.no_grad()
def load_adapter(model, folder, adapter="policy"):
    """Read a PEFT LoRA adapter into a model that is not prepared yet: `model.prepare`, then copy. Returns the model.

    Under another name than "policy" it joins what is there, and must not hold a projector, which all adapters share.

    Accepted is LoRA of one rank on linear layers of the LLM, and a projector in `modules_to_save`, in any naming of
    transformers. Other fields of the config are not looked at: what matters in them would show in the tensors, and a
    tensor without a place is an error, as is a place without its tensor.
    """
    folder = Path(folder)
    path = folder / "adapter_config.json"
    config = read_json(path)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if (
        config.get("peft_type") != "LORA"
        or type(rank) is not int
        or type(alpha) not in (int, float)
        or rank < 1
    ):
        found = f"peft_type {config.get('peft_type')!r}, r {rank!r}, lora_alpha {alpha!r}"
        raise BadInput(f"{path}: {found}; plain LoRA, with a rank and an alpha, is accepted.")
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise BadInput(
                f"{path}: {key} is {config[key]!r}; accepted: LoRA of one rank, scaled by lora_alpha / r."
            )
    found = {}
    for name, tensor in tensor_index(folder, "adapter_model").items():
        new = hub_name(name.removeprefix("base_model.model."))
        if new in found and not new.startswith(
            "multi_modal_projector."
        ):  # that `save_adapter` writes twice
            raise BadInput(f"{folder}: the weight {new} is there twice, under two names.")
        found[new] = tensor
    targets = {name.split(".")[-3] for name in found if name.endswith(".lora_A.weight")}
    projector = any(name.startswith("multi_modal_projector.") for name in found)
    if adapter == "policy":
        model.prepare(lora_rank=rank, lora_alpha=alpha, projector=projector)
    elif projector:
        raise BadInput(
            f"{folder}: holds a projector; an adapter that stands beside another is LoRA alone."
        )
    else:
        model.add_adapter(adapter, rank, alpha)
    slots = (
        {our_hub_name(f"projector.{k}"): v for k, v in model.projector.state_dict().items()}
        if projector
        else {}
    )
    for name, m in adapters(model, adapter):
        parent, leaf = name.rsplit(".", 1)
        if leaf in targets:
            slots |= {
                f"{our_hub_name(name)}.lora_A.weight": m.lora_A,
                f"{our_hub_name(name)}.lora_B.weight": m.lora_B,
            }
            continue
        layer = model.get_submodule(name)
        del layer.adapters[adapter]  # all of LORA_TARGETS were adapted
        if not layer.adapters:
            setattr(model.get_submodule(parent), leaf, layer.base)
    fill(slots, found, folder)
    return model


def merge(model):
    """Add LoRA to the weights it stands beside, in float32, and take it away. Returns the model."""
    for name, m in adapters(model):
        base = model.get_submodule(name).base
        base.weight.copy_(base.weight.float() + m.scale * (m.lora_B @ m.lora_A))
        parent, leaf = name.rsplit(".", 1)
        setattr(model.get_submodule(parent), leaf, base)
    return model


# ---- reward models: an adapter, a scalar head, and what they were trained to read


def base_hash(model):
    """A hash of the frozen weights, the same for every dtype: of names and up to 4096 values of each, as bfloat16."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not not_of_base(name):
            some = (
                tensor.flatten()[:: max(1, tensor.numel() // 4096)]
                .to("cpu", torch.bfloat16)
                .contiguous()
            )
            digest.update(f"{name.replace('.base.', '.')} {tuple(tensor.shape)}".encode())
            digest.update(some.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def save_reward(model, folder, base_name, settings, name="reward"):
    """Write adapter and head of this name into a folder: adapter/ (PEFT), head.safetensors, reward.json.

    settings: what `load_reward` gives back. reward.json is written last; beside them it holds the base's name and hash.
    """
    folder = Path(folder)
    save_adapter(model, folder / "adapter", base_name, name)
    head = {k: v.detach().cpu().contiguous() for k, v in model.heads[name].state_dict().items()}
    save_file(head, folder / "head.safetensors", metadata={"format": "pt"})
    training.write_json(
        folder / "reward.json", {"base_name": str(base_name), "base": base_hash(model)} | settings
    )


def reward_settings(folder):
    """reward.json of a run of reward_model.py, whole."""
    settings = read_json(Path(folder) / "reward.json")
    needed = (
        "base",
        "base_name",
        "question",
        "facts",
        "max_facts",
        "template",
        "image_aspect",
        "held_out",
    )
    missing = [name for name in needed if name not in settings]
    if missing:
        raise BadInput(
            f"{folder}/reward.json: no {', '.join(missing)}; a run of this reward_model.py writes {', '.join(needed)}."
        )
    return settings


@torch.no_grad()
def load_reward(model, folder, name="reward"):
    """Stand a saved reward model on the base that it was trained on: adapter and head of this name, frozen -> reward.json."""
    folder, settings = Path(folder), reward_settings(folder)
    if settings["base"] != (found := base_hash(model)):
        raise BadInput(
            f"{folder}: this reward model was trained on {settings['base_name']} (weights {settings['base']}); "
            f"the model that is loaded is another (weights {found})."
        )
    load_adapter(model, folder / "adapter", name)
    model.add_head(name)
    fill(model.heads[name].state_dict(), tensor_index(folder, "head"), folder)
    for p in model.parameters_of(name):
        p.requires_grad_(False)
    return settings
