"""LLaVA-1.5 and LLaVA-NeXT (1.6) checkpoints: reads every layout, writes the hub's.

transformers and huggingface_hub are imported where needed: at the top it would slow every `--help`.
"""

import sys

import torch

import processes
import sharding
from common import (
    MOST,
    BadInput,
    new_folder,
    one_line,
    read_json,
    refuse_lfs_pointer,
    refusing,
    whole_folder,
    write_json,
)
from data import OWN, Processor
from formats import chat
from formats.adapters import adapters, load_adapter, merge, not_of_base
from formats.anyres import AnyRes
from formats.llava_original import add_image_token, add_rows, original_parts, pinpoints, translated
from formats.weights import (
    check_shapes,
    fill,
    find,
    our_hub_name,
    source,
    tensor_index,
    tower_weights,
    weights,
    write_shards,
)
from model import MLLM, Projector
from nf4 import NF4Linear, born_quantised, linears, quantised, slots, summary

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LOCAL = {"local_files_only": True, "trust_remote_code": False}


# ---- parts


def is_tied(llm):
    """Is the LM head the embedding matrix?"""
    return llm.get_output_embeddings().weight is llm.get_input_embeddings().weight


def empty(make, config, dtype, device):
    """A transformers model whose weights are allocated but not initialized.

    make: a function that builds a model from a config.
    """
    from transformers.initialization import no_init_weights

    no_model = f"no model can be built of a {config.model_type!r} config"
    with refusing("config.json", no_model), no_init_weights(), torch.device(device):
        model = make(config, dtype=dtype)
    model.tie_weights()
    return model


def empty_llm(config, embeddings, dtype, device, quantize=None):
    """An LLM without weights yet, with as many token rows as the file has.

    Early LLaVA configs name another number of rows. embeddings: (file, name, shape), or None.
    quantize: "nf4" makes the layers of its blocks 4-bit layers.
    """
    import transformers

    if embeddings and len(embeddings[2]) == 2:
        config.vocab_size = embeddings[2][0]
    with born_quantised(quantize == "nf4"):
        llm = empty(transformers.AutoModelForCausalLM.from_config, config, dtype, device)
    if llm.base_model_prefix != "model" or not hasattr(llm.base_model, "layers"):
        raise BadInput(
            f"an LLM of type {config.model_type!r} is not accepted; "
            "llama, mistral, qwen2 and the like are."
        )
    if quantize == "nf4":
        linears(llm)  # refuses a layer that it does not know
    return llm


def refuse_quantised(config, path):
    """Refuse a checkpoint whose own weights are quantized. config: its config.json."""
    for part in (config, config.get("text_config")):
        found = part.get("quantization_config") if isinstance(part, dict) else None
        if found:
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise BadInput(
                f"{path}: quantization_config: its weights are quantized already ({method}); "
                "accepted are those in float32, bfloat16 or float16, with --quantize nf4 for 4 bits."
            )


def find_model(name):
    """`find` for a whole model. An adapter, or the folder of a run, is refused by what it is."""
    folder = find(name)
    if (folder / "config.json").exists():
        return folder
    if (folder / "adapter_config.json").exists():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise BadInput(
            f"{name}: an adapter, where a whole model is needed; its base is {base}. "
            "A run with --merge writes model/, which holds both."
        )
    inside = [p for p in (folder / "model", folder / "adapter") if p.is_dir()]
    if (folder / "args.json").exists():
        what = " and ".join(map(str, inside)) or "neither model/ nor adapter/"
        raise BadInput(
            f"{name}: the folder of a run, where a model is needed; it holds {what}. "
            "A run with --merge writes model/."
        )
    raise BadInput(f"{name}: no config.json there; the folder of a model is needed.")


def tower_config(folder):
    """The CLIPVisionConfig in the folder of a CLIP."""
    import transformers

    kind = read_json(folder / "config.json").get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise BadInput(
            f"{folder}/config.json: model_type is {kind!r}; "
            "accepted is 'clip' or 'clip_vision_model'."
        )
    try:
        return transformers.CLIPVisionConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # type checks of transformers and of huggingface_hub
        raise BadInput(f"{folder}: no usable config.json ({one_line(error)}).") from None


def read_tokenizer(folder):
    """The fast tokenizer in a folder."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **LOCAL)
    except Exception as error:  # each kind of tokenizer file fails in its own way
        for file in [*folder.glob("*.json"), *folder.glob("tokenizer.model")]:
            refuse_lfs_pointer(file)
        sentencepiece = (folder / "tokenizer.model").exists()
        if sentencepiece and not (folder / "tokenizer.json").exists():
            raise BadInput(
                f"{folder}: reading tokenizer.model needs the packages sentencepiece and protobuf; "
                "tokenizer.json of another copy of the same LLM is accepted in its place."
            ) from None
        raise BadInput(f"{folder}: no usable tokenizer ({one_line(error)}).") from None

    try:
        if tokenizer.is_fast:
            tokenizer("a")
    except BaseException as error:  # tokenizers, which is written in Rust, panics beside Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise BadInput(f"{folder}: no usable tokenizer ({one_line(error)}).") from None
    if not tokenizer.is_fast:
        raise BadInput(
            f"{folder}: {type(tokenizer).__name__} is a slow tokenizer; "
            "one of tokenizer.json is accepted."
        )
    if tokenizer.eos_token_id is None:
        raise BadInput(
            f"{folder}/tokenizer_config.json: eos_token is {tokenizer.eos_token!r}; "
            "a token that ends an answer is needed."
        )
    return tokenizer


def make_processor(folder, tokenizer, model, template, image_aspect, max_length=0, own=None):
    """The Processor of a model. own: the `Template` that the name OWN stands for.

    Mean and standard deviation of the images come from `folder`, from a file of their own
    (transformers 4.x) or from processor_config.json (5.x).
    """
    vision = model.vision.config
    context = model.llm.config.max_position_embeddings
    given = read_json(folder / "processor_config.json", {}).get("image_processor")
    given = given or read_json(folder / "preprocessor_config.json", {})

    if not isinstance(given, dict):
        raise BadInput(f"{folder}: image_processor is {given!r:.80}; an object is accepted.")

    # its images must have the size that the tower takes, and the model's tiles
    for key in ("size", "crop_size"):
        size = given.get(key, vision.image_size)
        sides = size.values() if isinstance(size, dict) else [size]
        if not sides or any(side != vision.image_size for side in sides):
            raise BadInput(
                f"{folder}: {key} of the image processor is {size!r:.80}; "
                f"the tower takes {vision.image_size}."
            )
    anyres = model.anyres
    if anyres:
        points = pinpoints(given.get("image_grid_pinpoints", anyres.pinpoints))
        if points != anyres.pinpoints:
            raise BadInput(
                f"{folder}: image_grid_pinpoints are {points!r:.200} for the processor "
                f"and {anyres.pinpoints} for the model."
            )

    colours = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    for key, usual in colours.items():
        values = colours[key] = given.get(key, usual)
        lowest = 0 if key == "image_mean" else 1e-3  # it divides
        if (
            not isinstance(values, (list, tuple))
            or len(values) != 3
            or not all(type(x) in (int, float) and lowest <= x <= 1 for x in values)
        ):
            raise BadInput(
                f"{folder}: {key} is {values!r:.80}; three numbers from {lowest} to 1 are accepted."
            )

    processor = Processor(
        tokenizer=tokenizer,
        image_token_id=model.image_token_id,
        image_size=vision.image_size,
        image_tokens=(vision.image_size // vision.patch_size) ** 2 + model.keep_cls,
        image_mean=tuple(colours["image_mean"]),
        image_std=tuple(colours["image_std"]),
        template=template,
        image_aspect=image_aspect,
        max_length=min(max_length or context, context),
        anyres=anyres,
        own=own,
        embeddings=model.llm.get_input_embeddings().num_embeddings,
    )
    if own:
        chat.check_ids(processor, folder)
    return processor


# ---- load and compose


def read_config(raw, path):
    """A config.json in the hub's terms as LlavaConfig or LlavaNextConfig.

    A setting that `MLLM` does not compute is refused.
    """
    import transformers

    classes = {"llava": transformers.LlavaConfig, "llava_next": transformers.LlavaNextConfig}
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in classes:
        raise BadInput(
            f"{path}: the model type is {kind!r:.80}; accepted is 'llava' or 'llava_next'."
        )
    for key in ("vision_config", "text_config"):
        if not isinstance(raw.get(key) or {}, dict):
            raise BadInput(f"{path}: {key} is {raw[key]!r:.80}; an object is accepted.")
    for key in ("prompt_template", "image_aspect"):
        if not isinstance(raw.get(key) or "", str):
            raise BadInput(f"{path}: {key} is {raw[key]!r:.80}; a name is accepted.")

    # settings that decide what the model computes
    tower = (raw.get("vision_config") or {}).get("model_type", "clip_vision_model")
    layer = raw.get("vision_feature_layer", -2)
    strategy = "vision_feature_select_strategy"
    select = raw.get(strategy, "default")
    fits_kind = kind == "llava" or select == "default"
    activation = raw.get("projector_hidden_act", "gelu")
    for key, value, good, accepted in (
        ("vision_config.model_type", tower, tower == "clip_vision_model", "'clip_vision_model'"),
        ("vision_feature_layer", layer, type(layer) is int, "one integer"),
        (strategy, select, select in ("default", "full"), "'default' or 'full'"),
        (strategy, select, fits_kind, "'default' for LLaVA-NeXT"),
        ("projector_hidden_act", activation, activation == "gelu", "'gelu'"),
    ):
        if not good:
            raise BadInput(f"{path}: {key} is {value!r:.80}; accepted is {accepted}.")

    try:
        config = classes[kind].from_dict(raw)
    except Exception as error:  # type checks of transformers and of huggingface_hub
        raise BadInput(f"{path}: not a usable config ({one_line(error)}).") from None

    # numbers that count things, and must fit the tower
    counts = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "vocab_size max_position_embeddings image_size patch_size"
    ).split()
    for part in ("vision_config", "text_config"):
        for key in counts:
            value = getattr(getattr(config, part), key, 1)
            most = 1000 if key == "num_hidden_layers" else MOST  # layers are made one by one
            if value is not None and (type(value) is not int or not 1 <= value <= most):
                raise BadInput(
                    f"{path}: {part}.{key} is {value!r:.80}; a whole number from 1 to {most} is accepted."
                )
    states = config.vision_config.num_hidden_layers + 1
    if not -states <= layer < states:
        raise BadInput(
            f"{path}: vision_feature_layer is {layer}; the tower has {states} hidden states."
        )
    if kind == "llava_next":
        points = pinpoints(config.image_grid_pinpoints)
        side = config.vision_config.image_size
        if (
            not isinstance(points, tuple)
            or not points
            or any(n <= 0 or n % side for point in points for n in point)
        ):
            raise BadInput(
                f"{path}: image_grid_pinpoints is {points!r}; "
                f"accepted are pairs of multiples of {side}, the tower's input."
            )
    return config


def empty_model(config, index, dtype, device, quantize=None):
    """The MLLM of a `read_config`, without weights yet. index: what the files hold."""
    import transformers

    text, vision = config.text_config, config.vision_config
    embeddings = index.get("language_model.model.embed_tokens.weight")
    llm = empty_llm(text, embeddings, dtype, device, quantize)
    tower = empty(transformers.CLIPVisionModel._from_config, vision, dtype, device)
    bias = config.multimodal_projector_bias
    with torch.device(device):
        projector = Projector(vision.hidden_size, text.hidden_size, bias).to(dtype)
    keep_cls = config.vision_feature_select_strategy == "full"
    anyres = None
    if config.model_type == "llava_next":
        points = pinpoints(config.image_grid_pinpoints)
        anyres = AnyRes(points, vision.image_size, vision.image_size // vision.patch_size)
    image = config.image_token_index
    return MLLM(tower, projector, llm, image, config.vision_feature_layer, keep_cls, anyres)


@torch.no_grad()
@torch.random.fork_rng(devices=[])
def load(
    name,
    dtype=torch.float32,
    device="cpu",
    template=None,
    image_aspect=None,
    max_length=0,
    quantize=None,
):
    """Read a LLaVA-1.5 or LLaVA-NeXT checkpoint -> (MLLM, Processor).

    name: a folder or a hub id. transformers or LLaVA's own code wrote the checkpoint. LLaVA's own
        LoRA is merged, as its code does; its tokenizers get `<image>`.
    template: a name in data.TEMPLATES, or "checkpoint" for its own chat template. By default it is
        what `save` noted in config.json (`prompt_template`, a key that transformers keeps but does
        not read). Without that `chat.choose` decides.
    image_aspect: by default what `save` noted in config.json, else "pad".
    device: on "meta" no weight is read.
    quantize: "nf4" keeps the linear layers of the LLM's blocks in 4 bits (nf4.py). Each is
        quantized as it is read: beside the 4-bit weights, one layer is there whole.

    The caller's random state (that of the CPU) is left unchanged.
    """
    # 1. find the parts, read the config
    folder = find_model(name)
    path = folder / "config.json"
    raw = read_json(path)
    refuse_quantised(raw, path)
    original = "mm_vision_tower" in raw  # LLaVA's own code wrote it
    if original:
        index, tokenizer_folder, image_folder, lora = original_parts(folder, raw)
        raw = translated(raw, path, tower_config(image_folder).to_dict())
    else:
        index = weights(folder)
        tokenizer_folder = image_folder = folder
        lora = None
    if lora and quantize == "nf4":
        raise BadInput(
            f"{folder}: --quantize nf4: LLaVA's own LoRA is merged when it is read, and 4 bits would "
            "round it away; accepted is the merged model (checkpoints.load, then checkpoints.save)."
        )
    config = read_config(raw, path)
    tokenizer = read_tokenizer(tokenizer_folder)
    if original:
        add_image_token(tokenizer)
        config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")

    # 2. build the model, without weights; before that without memory, to see that the files fit
    config.text_config.tie_word_embeddings = config.tie_word_embeddings
    real = torch.device(device).type != "meta"
    if real:
        outline = empty_model(config, index, dtype, "meta")
        tied = ("language_model.lm_head.weight",) if is_tied(outline.llm) else ()
        places = {our_hub_name(k): v for k, v in outline.state_dict().items()}
        check_shapes(places, index, folder, tied)
    model = empty_model(config, index, dtype, device, quantize)
    llm = model.llm

    image = config.image_token_index
    in_tokenizer = tokenizer.get_vocab().get("<image>", image)
    in_embeddings = type(image) is int and 0 <= in_tokenizer < llm.config.vocab_size
    if in_tokenizer != image or not (original or in_embeddings):
        raise BadInput(
            f"{folder}: the image token is {image!r:.80} in config.json and {in_tokenizer!r:.80} "
            f"in the tokenizer; one number below {llm.config.vocab_size}, "
            "the rows of the embeddings, is accepted."
        )

    # the prompt that the model was trained with
    template, own = template or getattr(config, "prompt_template", None), None
    image_token = tokenizer.convert_ids_to_tokens(image)
    if not template:
        kind = config.text_config.model_type
        template, own = chat.choose(tokenizer_folder, tokenizer, image_token, kind, original)
    elif template == OWN:
        own = chat.own_template(tokenizer_folder, tokenizer, image_token)

    # 3. fill in the weights
    keeps = getattr(config, "bfloat16_keeps", None)
    if dtype == torch.bfloat16 and type(keeps) is float:
        print(
            f"{folder}: bfloat16 keeps {keeps:.0%} of what its LoRA learned; --dtype float32, "
            "or the base with --adapter, keeps all of it",
            file=sys.stderr,
        )
    if real:
        places = {our_hub_name(k): v for k, v in slots(model).items()}
        tied = ("language_model.lm_head.weight",) if is_tied(llm) else ()
        fill(places, index, folder, tied)
        model.source = source(index, tensor_index(lora, "adapter_model") if lora else {})
        if lora:
            merge(load_adapter(model, lora))
        if original:
            add_rows(llm, len(tokenizer))
        if quantize == "nf4":
            print(f"--quantize nf4: {summary(llm)}", file=sys.stderr)

    # 4. the processor
    aspect = image_aspect or getattr(config, "image_aspect", None) or "pad"
    processor = make_processor(image_folder, tokenizer, model, template, aspect, max_length, own)
    return model, processor


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
    """A CLIP, an LLM and a new projector -> (MLLM, Processor).

    vision, llm: folders or hub ids.
    seed: of the projector's random weights.
    device: on "meta" no weight is read.

    The tokenizer gets `<image>`, and `<pad>` if there is no padding token; a new row is the mean of
    the old ones. LLaVA's converter pads the rows to a multiple of 64. That is not done here: so few
    answer rows pass through the head that a faster product would save little.

    The caller's random state (that of the CPU) is left unchanged.
    """
    import transformers

    # 1. find the parts, read the configs
    clip_folder = find_model(vision)
    llm_folder = find_model(llm)
    clip_config = tower_config(clip_folder)
    refuse_quantised(read_json(llm_folder / "config.json", {}), llm_folder / "config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(str(llm_folder), **LOCAL)
    except Exception as error:  # type checks of transformers and of huggingface_hub
        raise BadInput(f"{llm_folder}: no usable config.json ({one_line(error)}).") from None

    # 2. build and fill the tower and the LLM
    tower = empty(transformers.CLIPVisionModel._from_config, clip_config, dtype, device)
    real = torch.device(device).type != "meta"
    if real:
        fill(tower.state_dict(), tower_weights(clip_folder), clip_folder)
    index = tensor_index(llm_folder)
    language = empty_llm(config, index.get("model.embed_tokens.weight"), dtype, device)
    tied = ("lm_head.weight",) if is_tied(language) else ()
    if real:
        fill(language.state_dict(), index, llm_folder, tied)

    # 3. what is new: the image token, the projector, rows for new tokens
    tokenizer = read_tokenizer(llm_folder)
    add_image_token(tokenizer)
    torch.default_generator.manual_seed(seed)
    projector = Projector(clip_config.hidden_size, config.hidden_size).to(device, dtype)
    add_rows(language, len(tokenizer))

    model = MLLM(tower, projector, language, tokenizer.convert_tokens_to_ids("<image>"))
    model.source = f"{source(tower_weights(clip_folder), index)}; projector of seed {seed}"
    own = chat.own_template(llm_folder, tokenizer, "<image>") if template == OWN else None
    processor = make_processor(
        clip_folder, tokenizer, model, template, image_aspect, max_length, own
    )
    return model, processor


# ---- save


def merged(model, kept):
    """(hub name, tensor to write) of every weight. The policy's LoRA is added in float32.

    kept: a list that gets, for each merged layer, (<R, U>, <U, U>): U is what LoRA adds, R what is
    left of it when the layer is rounded to bfloat16.

    A 4-bit weight is written as what it stands for, in the dtype of the arithmetic. So LoRA is
    merged into the base that it was trained on: the original one would differ from that by more
    than many adapters change, and merging into 4 bits would round the adapter away.
    """
    adapted = {f"{name}.base.weight": lora for name, lora in adapters(model)}
    for name, tensor in slots(model).items():
        if not_of_base(name) or name == "llm.lm_head.weight" and is_tied(model.llm):
            continue
        in_4_bits = isinstance(tensor, NF4Linear)
        tensor = tensor.dequantise() if in_4_bits else sharding.whole(tensor)
        if name in adapted:
            lora = adapted[name]
            update = lora.scale * (lora.lora_B @ lora.lora_A)
            base, tensor = tensor, tensor.float() + update
            rounded = tensor.bfloat16().float() - base.bfloat16().float()
            kept.append(((rounded * update).sum().item(), update.square().sum().item()))
        yield our_hub_name(name.replace(".base.", ".")), tensor


def hub_config(model, processor, dtype):
    """config.json as transformers 5 writes it. The keys that 4.x looks for are added.

    dtype: what transformers reads the weights as, unless it is told.
    """
    import transformers

    name = "Llava"
    tiling = {}
    if model.anyres:
        name = "LlavaNext"
        tiling = {"image_grid_pinpoints": [list(p) for p in model.anyres.pinpoints]}
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
        image_aspect=processor.image_aspect,
        **tiling,
    ).to_diff_dict()

    text = config["text_config"]
    for part in (config, text, config["vision_config"]):
        part["dtype"] = part["torch_dtype"] = str(dtype).removeprefix("torch.")
        part.pop("_name_or_path", None)

    # 4.x does not read rope_parameters; it would take theta 10000 for any LLM
    rope = dict(text.get("rope_parameters") or {})
    if "rope_theta" in rope:
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    return config


def write_processor(model, processor, folder):
    """Tokenizer, processor, generation config and chat template, in files for 4.x and 5.x."""
    # the tokenizer
    tokenizer = processor.tokenizer
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    for key in ("is_local", "local_files_only"):  # of this machine
        config.pop(key, None)
    # Processor sets it; with it, transformers would take `<image>` for letters
    config["split_special_tokens"] = False
    # 4.47 to 4.57 stop at a list under the name that 5.x gives it; all read the old name
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if config.get("tokenizer_class") == "TokenizersBackend":
        # 4.x knows the class by this name only, 5.x by both
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        # without this, 4.x adds token_type_ids, and its generate stops at them
        config["model_input_names"] = ["input_ids", "attention_mask"]
    write_json(path, config)

    # the image processor, which makes the pixels that ours makes
    side = processor.image_size
    anyres = processor.anyres
    kind = "LlavaNextProcessor" if anyres else "LlavaProcessor"
    if anyres:
        own = {"image_processor_type": "LlavaNextImageProcessor", "do_pad": True}
        own["image_grid_pinpoints"] = anyres.pinpoints
    elif processor.image_aspect == "pad":
        # no type: LLaVA's own from 4.49 on, which pads; before it CLIP's, which crops. To name
        # LLaVA's would stop the older versions
        own = {"do_pad": True}
    else:
        own = {"image_processor_type": "CLIPImageProcessor"}
    image_processor = {
        "processor_class": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": processor.image_mean,
        "image_std": processor.image_std,
        **own,
    }
    write_json(folder / "preprocessor_config.json", image_processor)

    # the processor around both
    llava_processor = {
        "processor_class": kind,
        "image_token": tokenizer.convert_ids_to_tokens(processor.image_token_id),
        "patch_size": model.vision.config.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "full" if model.keep_cls else "default",
    }
    write_json(folder / "processor_config.json", llava_processor)

    # where generation stops
    ids = {"bos": tokenizer.bos_token_id, "eos": processor.stop_ids, "pad": tokenizer.pad_token_id}
    generation = {f"{name}_token_id": ids[name] for name in ids if ids[name] is not None}
    write_json(folder / "generation_config.json", generation)

    # how a dialogue becomes a prompt
    template = chat.chat_template(processor.form)
    write_json(folder / "chat_template.json", {"chat_template": template})  # before 4.52
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


@torch.no_grad()
def save(model, processor, folder, dtype=None):
    """Write a whole checkpoint in the hub layout. LoRA is merged.

    dtype: of all weights. By default nothing that was trained is rounded: merged layers and
        parameters that trained are float32, the others stay as they are. With DPO's defaults in
        bfloat16, the file would keep 65 % of the log-prob margin that LoRA learned.

    config.json notes the share of LoRA's update that bfloat16 would keep (`bfloat16_keeps`, a
    projection on the update): `load` says so to whoever asks for bfloat16. Of several processes,
    all call this, and process 0 writes.

    transformers 4.46 to 5.23 read it, with AutoProcessor (tests/old_versions.py tries some), which
    crops before 4.49 instead of padding. 4.41 reads the weights alone. `folder` must
    not exist; it appears when it is complete.
    """
    widest = dtype or model.dtype
    kept = []

    def tensors():
        """What is written."""
        nonlocal widest
        for name, tensor in merged(model, kept):
            tensor = tensor.to("cpu", dtype or tensor.dtype).contiguous()
            widest = torch.promote_types(widest, tensor.dtype)
            yield name, tensor

    if processes.number:
        for _ in merged(model, kept):  # takes part in gathering what is divided, and keeps nothing
            pass
        return
    if quantised(model) == "nf4":
        print(f"{folder}: 4-bit weights are written as what they stand for", file=sys.stderr)
    with whole_folder(new_folder(folder)) as aside:
        write_shards(tensors(), aside)
        config = hub_config(model, processor, widest)
        total = sum(whole for _, whole in kept)
        if total and not dtype:
            share = sum(part for part, _ in kept) / total
            config["bfloat16_keeps"] = round(share, 4)
            what = f"merged layers are float32; bfloat16 would keep {share:.0%} of LoRA's update"
            print(f"{folder}: {what}", file=sys.stderr)
        write_json(aside / "config.json", config)
        write_processor(model, processor, aside)
