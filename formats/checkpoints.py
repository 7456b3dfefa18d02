"""LLaVA-1.5 and LLaVA-NeXT (1.6) checkpoints: every layout in, the hub layout out."""

import json

import huggingface_hub
import torch
import transformers  # gives its classes when first used; importing them here would cost every --help 2.5 seconds

from common import BadInput, new_folder, one_line, read_json, whole_folder, write_json
from data import TEMPLATES, Processor
from formats.adapters import adapters, load_adapter, merge, not_of_base
from formats.anyres import AnyRes
from formats.llava_original import add_image_token, add_rows, original_parts, pinpoints, translated
from formats.weights import fill, find, our_hub_name, tensor_index, tower_weights, weights
from model import MLLM, Projector

SHARD_SIZE = "5GB"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LOCAL = {"local_files_only": True, "trust_remote_code": False}


# ---- parts


def is_tied(llm):
    """Is the LM head the embedding matrix?"""
    return llm.get_output_embeddings().weight is llm.get_input_embeddings().weight


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


def make_processor(folder, tokenizer, model, template, image_aspect, max_length=0):
    """Mean and standard deviation come from `folder`, from a file of their own (4.x) or processor_config.json (5.x)."""
    vision, context = model.vision.config, model.llm.config.max_position_embeddings
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
        max_length=min(max_length or context, context),
        anyres=anyres,
    )


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
def load(name, dtype=torch.float32, device="cpu", template=None, image_aspect="pad", max_length=0):
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
    return model, make_processor(images, tokenizer, model, template, image_aspect, max_length)


@torch.no_grad()
@torch.random.fork_rng(devices=[])
def compose(
    vision,
    llm,
    dtype=torch.float32,
    device="cpu",
    template="vicuna_v1",
    image_aspect="pad",
    seed=0,
    max_length=0,
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
    return model, make_processor(clip_folder, tokenizer, model, template, image_aspect, max_length)


# ---- save


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
    write_json(path, config)
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
    write_json(folder / "preprocessor_config.json", image_processor)
    write_json(folder / "processor_config.json", llava_processor)
    write_json(
        folder / "generation_config.json",
        {f"{k}_token_id": v for k, v in ids.items() if v is not None},
    )
    write_json(folder / "chat_template.json", {"chat_template": template})  # before 4.52
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


@torch.no_grad()
def save(model, processor, folder, dtype=None):
    """Write a whole checkpoint in the hub layout, LoRA merged, weights in `dtype` (default: the model's).

    transformers 4.46 to 5.23 read it, with AutoProcessor. `folder` must not exist; it appears when it is complete.
    """
    dtype = dtype or model.dtype
    with whole_folder(new_folder(folder)) as aside:
        huggingface_hub.save_torch_state_dict(
            dict(merged(model, dtype)), aside, max_shard_size=SHARD_SIZE, metadata={"format": "pt"}
        )
        write_json(aside / "config.json", hub_config(model, processor, dtype))
        write_processor(model, processor, aside)
