"""Every on-disk layout of LLaVA in; the hub layout and PEFT adapters out.

transformers wrote the same weights under five namings (4.x and 5.x, disk and memory). All are read by renaming to the hub's:

    hub name                          here                             other namings
    vision_tower.vision_model.X       vision.X                         [model.]vision_tower.X
    multi_modal_projector.X           projector.X                      model.multi_modal_projector.X
    language_model.model.X            llm.model.X                      model.language_model.[model.]X
    language_model.lm_head.weight     llm.lm_head.weight               lm_head.weight

and only the hub's is written: every transformers from 4.46 to 5.23 reads it, while 4.x and 5.0-5.5 leave a tower written as
`vision_tower.X` at its random start with no more than a warning. A missing or unexpected tensor is an error here.
"""
import contextlib
import copy
import functools
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch
import transformers  # its classes are fetched when first used: importing them here would cost every --help 2.5 s
from safetensors import safe_open
from safetensors.torch import save_file

from data import TEMPLATES, Processor
from model import LORA_TARGETS, BadInput, LoRALinear, MLLM, Projector

SHARD_BYTES = 5_000_000_000
HUB_PREFIXES = {"vision.": "vision_tower.vision_model.", "projector.": "multi_modal_projector.", "llm.": "language_model."}
CONVERT = "transformers: AutoModel...from_pretrained(OLD).save_pretrained(NEW)"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# ---- names


def hub_name(name):
    """The hub's name of a tensor in any naming that transformers wrote; an unknown name comes back unchanged."""
    name = re.sub(r"^model\.(?=(vision_tower|multi_modal_projector|language_model)\.)", "", name)
    name = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    name = re.sub(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)


def our_hub_name(name):
    """The hub's name of a tensor of `MLLM`."""
    part, rest = name.split(".", 1)
    return HUB_PREFIXES[part + "."] + rest


# ---- reading


def find(name, files=("*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt")):
    """A folder as it is; anything else that looks like owner/name is downloaded from the hub (no pickles, no code)."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise BadInput(f"{name}: no such folder, and no hub id either (owner/name).")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(files)))
    except Exception as error:  # the client raises its own, httpx's and the operating system's
        reason = str(error).strip().split("\n")[0]
        raise BadInput(f"{name}: no such folder, and the hub did not give it ({type(error).__name__}: {reason}).") from None


def read_json(path, default=None):
    """The object in a JSON file; `default` if there is no file and a default is given."""
    if default is not None and not path.exists():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error}).") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds {type(value).__name__}; an object is needed.")
    return value


def tensor_index(folder, rename=lambda name: name, stem="model", convert=CONVERT):
    """What the safetensors files of a folder hold, from their headers: {new name: (file, name, shape)}.

    `rename` returns None for a tensor to leave out. Buffers that old versions stored and that are computed today are left out.
    """
    index, files = folder / f"{stem}.safetensors.index.json", [folder / f"{stem}.safetensors"]
    if not files[0].exists() and index.exists():
        files = [folder / f for f in sorted(set(read_json(index).get("weight_map", {}).values()))]
    elif not files[0].exists():
        pickles = few(p.name for p in folder.glob("*.bin")) or "nothing else"
        raise BadInput(f"{folder}: no {files[0].name} but {pickles}; pickles are not read, so convert them with {convert}.")
    found = {}
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                for name in f.keys():
                    new = None if name.endswith((".inv_freq", ".position_ids")) else rename(name)
                    if new in found:
                        raise BadInput(f"{file}: {name} and {found[new][1]} are the same weight, {new}.")
                    if new:
                        found[new] = (file, name, tuple(f.get_slice(name).get_shape()))
        except (OSError, RuntimeError, ValueError) as error:
            raise error if isinstance(error, BadInput) else BadInput(f"{file}: not readable as safetensors ({error}).") from None
        except Exception as error:  # safetensors' own error class derives from Exception alone
            raise BadInput(f"{file}: not readable as safetensors ({error}).") from None
    return found


def few(names):
    """The first names of a list, for a message."""
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def fill(slots, found, folder, tied=()):
    """Copy the tensors `found` into `slots` (name -> tensor), one at a time: peak memory stays near one copy of the model.

    tied: names that may be missing because they share another's memory. If both are there they must be equal.
    """
    missing, unexpected = slots.keys() - found.keys() - set(tied), found.keys() - slots.keys()
    if missing or unexpected:
        parts = [f"{what} {few(names)}" for what, names in (("missing", missing), ("unexpected", unexpected)) if names]
        raise BadInput(f"{folder}: the weights do not fit config.json: {'; '.join(parts)}.")
    for name, (file, _, shape) in found.items():
        if shape != tuple(slots[name].shape):
            raise BadInput(f"{file}: {name} is {shape}, but config.json asks for {tuple(slots[name].shape)}.")
    for file in sorted({file for file, _, _ in found.values()}):
        with safe_open(file, "pt") as f:
            for name, (where, key, _) in found.items():
                if where == file and name not in tied:
                    slots[name].copy_(f.get_tensor(key))
    for name in tied:
        if name in found:
            with safe_open(found[name][0], "pt") as f:
                if not torch.equal(f.get_tensor(found[name][1]).to(slots[name]), slots[name]):
                    raise BadInput(f"{folder}: config.json ties {name} to the embeddings, but the file holds another matrix.")


def empty(make, config, dtype, device):
    """A transformers model whose weights are allocated and not initialised; `make` is its class's from-config function."""
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device(device):
        model = make(config, dtype=dtype)
    model.tie_weights()
    return model


def empty_llm(config, vocab_size, dtype, device):
    """An LLM with as many token rows as the file holds: early LLaVA configs name another number."""
    config.vocab_size = vocab_size
    try:
        llm = empty(transformers.AutoModelForCausalLM.from_config, config, dtype, device)
    except ValueError as error:
        raise BadInput(f"no causal LM for {config.model_type!r} ({str(error)[:120]}).") from None
    if llm.base_model_prefix != "model" or not hasattr(llm.base_model, "layers"):
        raise BadInput(f"LLMs of type {config.model_type!r} are not supported; Llama-like ones are (llama, mistral, qwen2, ...).")
    return llm


def tied_head(llm, name):
    """The head's name, in a tuple, if it is the embedding matrix; else an empty tuple."""
    return (name,) if llm.get_output_embeddings().weight is llm.get_input_embeddings().weight else ()


def make_processor(folder, tokenizer, vision, llm, image_token_id, keep_cls, template, image_aspect):
    """Mean and standard deviation come from `folder`: in 4.x preprocessor_config.json, in 5.x nested in processor_config.json."""
    images = read_json(folder / "processor_config.json", {}).get("image_processor")
    images = images or read_json(folder / "preprocessor_config.json", {})
    for key in ("size", "crop_size"):
        size = images.get(key, vision.image_size)
        sides = set(size.values()) if isinstance(size, dict) else {size}
        if sides - {vision.image_size, None}:
            raise BadInput(f"{folder}: the image processor's {key} is {size}, but the tower takes {vision.image_size} pixels.")
    return Processor(
        tokenizer=tokenizer,
        image_token_id=image_token_id,
        image_size=vision.image_size,
        image_tokens=(vision.image_size // vision.patch_size) ** 2 + keep_cls,
        image_mean=tuple(images.get("image_mean", CLIP_MEAN)),
        image_std=tuple(images.get("image_std", CLIP_STD)),
        template=template,
        image_aspect=image_aspect,
        max_length=llm.max_position_embeddings,
    )


def read_tokenizer(folder):
    """The fast tokenizer of a folder."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each format has its own
        raise BadInput(f"{folder}: no usable tokenizer ({type(error).__name__}: {str(error).strip()[:160]}).") from None
    if not tokenizer.is_fast:
        raise BadInput(f"{folder}: the tokenizer is a slow one; a tokenizer.json is needed.")
    return tokenizer


def read_config(folder):
    """config.json of a LLaVA checkpoint -> (LlavaConfig, the plain object). What this model cannot compute is refused."""
    path = folder / "config.json"
    raw = read_json(path)
    if "mm_vision_tower" in raw or any("LlavaLlama" in a or "LlavaMistral" in a for a in raw.get("architectures") or ()):
        raise BadInput(f"{path}: an original LLaVA checkpoint (mm_vision_tower); accepted is its conversion, model_type 'llava'.")
    if raw.get("model_type") != "llava":
        raise BadInput(f"{path}: model_type is {raw.get('model_type')!r}; accepted is 'llava' (LLaVA-1.5 in the hub layout).")
    tower = (raw.get("vision_config") or {}).get("model_type", "clip_vision_model")
    layer, strategy = raw.get("vision_feature_layer", -2), raw.get("vision_feature_select_strategy", "default")
    for key, value, good, accepted in (
        ("vision_config.model_type", tower, tower == "clip_vision_model", "'clip_vision_model'"),
        ("vision_feature_layer", layer, type(layer) is int, "one integer"),
        ("vision_feature_select_strategy", strategy, strategy in ("default", "full"), "'default' or 'full'"),
        ("projector_hidden_act", act := raw.get("projector_hidden_act", "gelu"), act == "gelu", "'gelu'"),
    ):
        if not good:
            raise BadInput(f"{path}: {key} is {value!r}; accepted is {accepted}.")
    try:
        config = transformers.LlavaConfig.from_dict(raw)
    except Exception as error:  # a type check of transformers or of huggingface_hub
        raise BadInput(f"{path}: not a usable config ({str(error).strip()[:200]}).") from None
    states = config.vision_config.num_hidden_layers + 1
    if not -states <= layer < states:
        raise BadInput(f"{path}: vision_feature_layer is {layer}; the tower has {states} hidden states.")
    if "image_token_id" in raw:
        config.image_token_index = raw["image_token_id"]
    return config, raw


@torch.no_grad()
def load(name, dtype=torch.float32, device="cpu", template=None, image_aspect="pad"):
    """Read a LLaVA-1.5 checkpoint, a folder or a hub id -> (MLLM, Processor).

    template: a name in data.TEMPLATES. By default the one a checkpoint of ours names in config.json (`prompt_template`, which
    transformers carries along unread), else the one of its kind: "mistral" for a Mistral, "vicuna_v1" for the rest.
    """
    folder = find(name)
    config, raw = read_config(folder)
    found = tensor_index(folder, hub_name)
    embeddings = found.get("language_model.model.embed_tokens.weight")
    config.text_config.tie_word_embeddings = config.tie_word_embeddings
    rows = embeddings[2][0] if embeddings else config.text_config.vocab_size
    if not 0 <= config.image_token_index < rows:
        raise BadInput(f"{folder / 'config.json'}: image_token_index is {config.image_token_index}; there are {rows} token rows.")
    llm = empty_llm(config.text_config, rows, dtype, device)
    vision = empty(transformers.CLIPVisionModel._from_config, config.vision_config, dtype, device)
    widths = config.vision_config.hidden_size, config.text_config.hidden_size
    projector = Projector(*widths, bias=config.multimodal_projector_bias).to(device, dtype)
    keep_cls = config.vision_feature_select_strategy == "full"
    model = MLLM(vision, projector, llm, config.image_token_index, config.vision_feature_layer, keep_cls)
    slots = {our_hub_name(k): v for k, v in model.state_dict().items()}
    fill(slots, found, folder, tied_head(llm, "language_model.lm_head.weight"))

    tokenizer = read_tokenizer(folder)
    known = tokenizer.get_vocab().get("<image>")
    if known not in (None, config.image_token_index):
        raise BadInput(f"{folder}: <image> is token {known} in the tokenizer and {config.image_token_index} in config.json.")
    template = template or raw.get("prompt_template") or ("mistral" if llm.config.model_type == "mistral" else "vicuna_v1")
    args = (config.vision_config, config.text_config, config.image_token_index, keep_cls, template, image_aspect)
    return model, make_processor(folder, tokenizer, *args)


@torch.no_grad()
def compose(vision, llm, dtype=torch.float32, device="cpu", template="vicuna_v1", image_aspect="pad", seed=0):
    """A LLaVA from a CLIP and an LLM (folders or hub ids) and a fresh projector drawn from `seed` -> (MLLM, Processor).

    `<image>` and, where there is no padding token, `<pad>` are added to the tokenizer; their rows are the mean of the others.
    Rows are not padded to a multiple of 64: `<image>` never reaches the LLM, and the head sees a few answer rows only.
    """
    vision_folder, llm_folder = find(vision), find(llm)
    kind = read_json(vision_folder / "config.json").get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise BadInput(f"{vision_folder / 'config.json'}: model_type is {kind!r}; accepted are 'clip' and 'clip_vision_model'.")
    vision_config = transformers.CLIPVisionConfig.from_pretrained(str(vision_folder), local_files_only=True)
    tower = empty(transformers.CLIPVisionModel._from_config, vision_config, dtype, device)
    other = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")  # the rest of a full CLIP
    wanted = lambda name: None if name.startswith(other) else name.removeprefix("vision_model.")
    fill(tower.state_dict(), tensor_index(vision_folder, wanted), vision_folder)

    try:
        config = transformers.AutoConfig.from_pretrained(str(llm_folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise BadInput(f"{llm_folder}: no usable config.json ({str(error).strip()[:160]}).") from None
    found = tensor_index(llm_folder)
    embeddings = found.get("model.embed_tokens.weight")
    language = empty_llm(config, embeddings[2][0] if embeddings else config.vocab_size, dtype, device)
    fill(language.state_dict(), found, llm_folder, tied_head(language, "lm_head.weight"))

    tokenizer = read_tokenizer(llm_folder)
    add = lambda token: tokenizer.add_tokens(transformers.AddedToken(token, special=True, normalized=False), special_tokens=True)
    if "<image>" not in tokenizer.get_vocab():
        add("<image>")
    if tokenizer.pad_token is None:
        add("<pad>")
        tokenizer.pad_token = "<pad>"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = Projector(vision_config.hidden_size, config.hidden_size).to(device, dtype)
        rows = language.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            for layer in (language.get_input_embeddings(), language.get_output_embeddings()):
                layer.weight[rows:] = layer.weight[:rows].float().mean(0).to(dtype)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model = MLLM(tower, projector, language, image_token_id)
    args = (vision_config, config, image_token_id, False, template, image_aspect)
    return model, make_processor(vision_folder, tokenizer, *args)


# ---- writing


@contextlib.contextmanager
def written_aside(folder):
    """A temporary folder beside `folder` that takes its name once everything is written and on the disk."""
    folder = Path(folder)
    if folder.exists():
        raise BadInput(f"{folder}: exists already; checkpoints are never written over something.")
    aside = folder.parent / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in (*(p for p in aside.rglob("*") if p.is_file()), aside):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def adapters(model):
    """(our name, module) of every LoRA layer."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]


def merged_weights(model, dtype):
    """{hub name: (bytes, function that makes the tensor to write)}, LoRA merged in float32."""
    lora, makers = dict(adapters(model)), {}

    def make(name, tensor):
        owner, base, leaf = name.rpartition(".base.")
        if base and leaf == "weight":
            m = lora[owner]
            tensor = tensor.float() + m.scale * (m.lora_B @ m.lora_A)
        return tensor.to("cpu", dtype).contiguous()

    tied = {f"llm.{name}" for name in tied_head(model.llm, "lm_head.weight")}
    for name, tensor in model.state_dict().items():
        if name not in tied and not name.endswith((".lora_A", ".lora_B")):
            size = tensor.numel() * dtype.itemsize
            makers[our_hub_name(name.replace(".base.", "."))] = size, functools.partial(make, name, tensor)
    return makers


def chat_template(name):
    """A template of data.py as the Jinja that transformers' apply_chat_template runs."""
    template, text = TEMPLATES[name], json.dumps
    user, answer = template.user.split("{}"), template.answer.split("{}")
    end = "eos_token" if template.end == "eos" else text(template.end)
    return (
        "{% macro body(content) %}{% if content is string %}{{ content }}{% else %}"
        "{% for part in content if part.type == 'image' %}{{ '<image>\\n' }}{% endfor %}"
        "{% for part in content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}{% endmacro %}"
        f"{{{{ {text(template.start)} }}}}"
        "{% for message in messages %}{% if message.role == 'user' %}"
        f"{{{{ {text(user[0])} + body(message.content) + {text(user[1])} }}}}"
        "{% elif message.role == 'assistant' %}"
        f"{{{{ {text(answer[0])} + body(message.content) + {text(answer[1])} + {end} }}}}"
        "{% else %}{{ raise_exception('only the roles user and assistant are known to this model') }}{% endif %}{% endfor %}"
    )


def hub_config(model, processor, dtype):
    """config.json as transformers 5 writes it, with the keys beside it that 4.x reads instead."""
    config = transformers.LlavaConfig(
        vision_config=model.vision.config.to_dict(),
        text_config=model.llm.config.to_dict(),
        image_token_index=model.image_token_id,
        image_seq_length=processor.image_tokens,
        vision_feature_layer=model.feature_layer,
        vision_feature_select_strategy="full" if model.keep_cls else "default",
        multimodal_projector_bias=model.projector.linear_1.bias is not None,
        tie_word_embeddings=bool(tied_head(model.llm, "lm_head.weight")),
    )
    value = config.to_dict() | {"architectures": ["LlavaForConditionalGeneration"], "prompt_template": processor.template}
    name = str(dtype).removeprefix("torch.")
    for part in (value, value["text_config"], value["vision_config"]):
        part["dtype"] = part["torch_dtype"] = name
    # 4.x does not know rope_parameters: a Mistral would silently get theta 10000 for its 1000000
    rope = dict(value["text_config"].get("rope_parameters") or {})
    if "rope_theta" in rope:
        value["text_config"]["rope_theta"] = rope.pop("rope_theta")
        value["text_config"]["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return value


@torch.no_grad()
def save(model, processor, folder, dtype=None):
    """Write a whole checkpoint that transformers 4.46 to 5.23 reads: LoRA merged, weights in `dtype` (default: the model's).

    Files above 5 GB are split. An existing folder is refused.
    """
    dtype = dtype or model.dtype
    makers = merged_weights(model, dtype)
    shards, size = [[]], 0
    for name, (bytes_, _) in makers.items():
        if shards[-1] and size + bytes_ > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    with written_aside(folder) as aside:
        weight_map = {}
        for i, names in enumerate(shards, 1):
            file = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            save_file({n: makers[n][1]() for n in names}, aside / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            total = sum(b for b, _ in makers.values())
            write_json(aside / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(aside / "config.json", hub_config(model, processor, dtype))
        write_processor(model, processor, aside)


def write_processor(model, processor, folder):
    """Tokenizer, LlavaProcessor, image processor, generation config, chat template."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.split_special_tokens = False  # ours splits them; transformers' processor must not
    tokenizer.save_pretrained(folder)
    template = chat_template(processor.template)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")  # 4.57 and later
    write_json(folder / "chat_template.json", {"chat_template": template})  # before
    strategy = "full" if model.keep_cls else "default"
    extra = {"patch_size": model.vision.config.patch_size, "num_additional_image_tokens": 1}
    extra |= {"processor_class": "LlavaProcessor", "image_token": "<image>", "vision_feature_select_strategy": strategy}
    write_json(folder / "processor_config.json", extra)
    side = processor.image_size
    image = {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "resample": 3}
    image |= dict.fromkeys(("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize"), True)
    image |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, "rescale_factor": 1 / 255}
    image |= {"image_mean": processor.image_mean, "image_std": processor.image_std}
    write_json(folder / "preprocessor_config.json", image)  # 5.x reads it too where processor_config.json nests none
    stop = list(processor.stop_ids)
    generation = {"eos_token_id": stop if len(stop) > 1 else stop[0]}
    generation |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    write_json(folder / "generation_config.json", {k: v for k, v in generation.items() if v is not None})


# ---- adapters


def save_adapter(model, folder, base_name):
    """Write LoRA, and the projector if it trains, as a PEFT adapter of LlavaForConditionalGeneration.

    Names are the hub's: PEFT 0.13 with transformers 4.46 reads no other, 0.21 with 5.23 reads them all. The config has only the
    fields that PEFT 0.10 knows, because that version fails on others. Reading it back: `load_adapter`, or PEFT's
    `PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base_name), folder)`.
    """
    lora = adapters(model)
    if not lora:
        raise BadInput(f"{folder}: the model has no LoRA, so there is no adapter to write; save the whole model.")
    if any(p.requires_grad for p in model.vision.parameters()):
        raise BadInput(f"{folder}: the vision tower trains, which an adapter does not hold; save the whole model.")
    tensors = {}
    for name, m in lora:
        for leaf in ("lora_A", "lora_B"):
            tensors[f"base_model.model.{our_hub_name(name)}.{leaf}.weight"] = getattr(m, leaf).detach().cpu().contiguous()
    if model.initial_projector is not None:
        for name, tensor in model.projector.state_dict().items():
            tensors[f"base_model.model.multi_modal_projector.{name}"] = tensor.cpu().contiguous()
            tensors[f"base_model.model.model.multi_modal_projector.{name}"] = tensor.cpu().contiguous().clone()
    targets = "|".join(t for t in LORA_TARGETS if any(name.endswith(t) for name, _ in lora))
    rank, alpha = len(lora[0][1].lora_A), lora[0][1].scale * len(lora[0][1].lora_A)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_name),
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": round(alpha) if math.isclose(alpha, round(alpha)) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": rf".*language_model.*\.({targets})",  # a bare list would also hit the tower's q_proj, k_proj, v_proj
        "modules_to_save": ["multi_modal_projector"] if model.initial_projector is not None else None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "auto_mapping": None,
    }
    with written_aside(folder) as aside:
        save_file(tensors, aside / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(aside / "adapter_config.json", config)


@torch.no_grad()
def load_adapter(model, folder):
    """Read a PEFT LoRA adapter into a model that was not prepared yet: calls `model.prepare`, then copies. Returns the model.

    Read are plain LoRA on the LLM's linear layers and a projector in `modules_to_save`, in any of transformers' namings; fields
    of the config that are not used here are ignored, but a tensor without a place, or a place without a tensor, is an error.
    """
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA" or not isinstance(config.get("r"), int) or "lora_alpha" not in config:
        raise BadInput(f"{folder / 'adapter_config.json'}: not a LoRA adapter (peft_type {config.get('peft_type')!r}).")
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise BadInput(f"{folder / 'adapter_config.json'}: {key} is {config[key]!r}; plain LoRA of one rank is accepted.")
    rename = lambda name: None if name.startswith("base_model.model.model.multi") else hub_name(name.removeprefix("base_model.model."))
    found = tensor_index(folder, rename, "adapter_model", "PEFT: PeftModel.from_pretrained(BASE, OLD).save_pretrained(NEW)")
    projector = any(name.startswith("multi_modal_projector.") for name in found)
    model.prepare(lora_rank=config["r"], lora_alpha=config["lora_alpha"], projector=projector)
    targets = {name.split(".")[-3] for name in found if ".lora_" in name}
    slots = {f"multi_modal_projector.{k}": v for k, v in model.projector.state_dict().items()} if projector else {}
    for name, m in adapters(model):
        parent, _, leaf = name.rpartition(".")
        if leaf in targets:
            slots |= {f"{our_hub_name(name)}.{ab}.weight": getattr(m, ab).data for ab in ("lora_A", "lora_B")}
        else:
            setattr(model.get_submodule(parent), leaf, m.base)
    fill(slots, found, folder)
    return model
