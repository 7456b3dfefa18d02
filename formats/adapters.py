"""LoRA in PEFT's files. Reward models: an adapter, a scalar head, and what they learned to read."""

import hashlib
import sys
from pathlib import Path

import torch

from common import MOST, BadInput, flag_name, new_folder, read_json, whole_folder, write_json
from formats.weights import (
    fill,
    find,
    hub_name,
    name_in_memory,
    our_hub_name,
    read_tensor,
    tensor_index,
    write_tensors,
)
from lora import LoRALinear, add_adapter
from nf4 import quantised

CONDITIONS = ("template", "image_aspect")  # of the processor
ADAPTER_FILES = ("adapter_config.json", "adapter_model*.safetensors", "alignment.json")


def adapters(model, adapter="policy"):
    """[(our name of the layer, its LoRA), ...], for every layer that has this adapter."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]
    return [(name, m.adapters[adapter]) for name, m in layers if adapter in m.adapters]


def not_of_base(name):
    """Is this tensor one of LoRA's, or of a scalar head?"""
    return name.endswith((".lora_A", ".lora_B")) or name.startswith("heads.")


# ---- adapters


@torch.no_grad()
def save_adapter(model, folder, base_name, adapter="policy", processor=None):
    """Write LoRA, and the projector if it trains, as a PEFT adapter for transformers.

    These lines load it (LLaVA-NeXT: LlavaNextForConditionalGeneration):

        base = LlavaForConditionalGeneration.from_pretrained(base_name)
        PeftModel.from_pretrained(base, folder)

    Every tensor is written twice: under the hub's names, and under transformers' own since 4.52.
    Some versions find only the first, some only the second, and both leave out LoRA with a warning
    at most (tests/old_versions.py tries pairs of versions). PEFT 0.10 stops at fields of the config
    that it does not know, so the newer fields are left out.

    alignment.json, a file of ours that PEFT does not read, says what the adapter was trained with:
    base (name and hash), dtype, and, with a processor, template and image aspect.
    """
    layers = adapters(model, adapter)
    if not layers or any(p.requires_grad for p in model.vision.parameters()):
        problem = "the model has no LoRA" if not layers else "the vision tower trains"
        raise BadInput(
            f"{folder}: {problem}, so an adapter cannot hold what was trained; "
            "save the whole model instead."
        )

    # the tensors
    trained = {}
    for name, lora in layers:
        trained[f"{our_hub_name(name)}.lora_A.weight"] = lora.lora_A
        trained[f"{our_hub_name(name)}.lora_B.weight"] = lora.lora_B
    projector_trains = bool(model.initial_projector)
    if projector_trains:
        for name, tensor in model.projector.state_dict().items():
            trained[our_hub_name(f"projector.{name}")] = tensor
    tensors = {}
    for name, tensor in trained.items():
        tensor = tensor.cpu().contiguous()
        tensors[f"base_model.model.{name}"] = tensor
        tensors[f"base_model.model.{name_in_memory(name)}"] = tensor.clone()

    # the config
    first = layers[0][1]
    rank = len(first.lora_A)
    alpha = round(first.scale * rank, 6)
    leaves = sorted({name.split(".")[-1] for name, _ in layers})
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
        # a list of names would also match the tower's q_proj, k_proj and v_proj
        "target_modules": rf".*language_model.*\.({'|'.join(leaves)})",
        "modules_to_save": ["multi_modal_projector"] if projector_trains else None,
    }

    # what it was trained with
    conditions = {
        "base_name": str(base_name),
        "base": base_hash(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantize": quantised(model),
    }
    if processor:
        conditions |= {name: getattr(processor, name) for name in CONDITIONS}

    with whole_folder(new_folder(folder)) as aside:
        write_tensors(tensors, aside / "adapter_model.safetensors")
        write_json(aside / "adapter_config.json", config)
        write_json(aside / "alignment.json", conditions)


def adapter_folder(name):
    """A folder or hub id -> the folder of a PEFT adapter. A run folder is refused by name."""
    folder = find(name, ADAPTER_FILES)
    if (folder / "adapter_config.json").is_file():
        return folder
    inner = folder / "adapter"
    if (inner / "adapter_config.json").is_file():
        raise BadInput(f"{name}: the folder of a run; its adapter is {inner}.")
    if (folder / "config.json").is_file():
        raise BadInput(f"{name}: a model; an adapter (adapter_config.json) is needed here.")
    raise BadInput(f"{name}: no adapter_config.json there; the folder of a PEFT adapter is needed.")


def read_conditions(folder):
    """alignment.json of an adapter: what it was trained with; {} for those of other programs."""
    path = folder / "alignment.json"
    conditions = read_json(path, {})
    check_texts(conditions, ("base", "base_name", "dtype", "quantize", *CONDITIONS), path)
    if "base" in conditions and "base_name" not in conditions:
        raise BadInput(f"{path}: `base` without `base_name`; both or neither are accepted.")
    return conditions


def check_texts(values, keys, path):
    """Refuse a value under one of these keys that is neither text nor null."""
    for key in keys:
        if not isinstance(values.get(key, ""), (str, type(None))):
            raise BadInput(f"{path}: {key} is {values[key]!r:.80}; a text is accepted.")


def as_trained(name, template=None, image_aspect=None, quantize=None):
    """(template, image_aspect, quantize) for a model that gets this adapter; no adapter: as given.

    None stands for a flag that was not given: it takes the value that the adapter was trained with.
    Another value is refused. Adapters of other programs do not say, so anything goes with them.
    """
    given = {"template": template, "image_aspect": image_aspect, "quantize": quantize}
    if name:
        conditions = read_conditions(adapter_folder(name))
        for key, value in given.items():
            trained = conditions.get(key)
            if value and trained and value != trained:
                raise BadInput(
                    f"{flag_name(key)} {value}: the adapter {name} was trained with {trained}; "
                    "leave the flag out."
                )
            given[key] = value or trained
    return tuple(given.values())


def check_base(model, conditions, folder):
    """Refuse a trained part on another base than its own, by the hash of the weights.

    That includes LoRA trained on 4 bits above the weights in 16: they differ by more than many
    adapters change. `checkpoints.save` merges into what the 4 bits stand for.
    """
    trained, loaded = conditions.get("quantize") or quantised(model), quantised(model)
    if trained != loaded:
        raise BadInput(
            f"{folder}: it was trained with --quantize {trained}; "
            f"the model that is loaded has --quantize {loaded}."
        )
    base = base_hash(model)
    if conditions["base"] != base:
        raise BadInput(
            f"{folder}: it was trained on {conditions['base_name']} (weights {conditions['base']}); "
            f"the model that is loaded is another (weights {base}). "
            "A merged model/ needs no adapter: it has it already."
        )


@torch.no_grad()
def load_adapter(model, folder, adapter="policy"):
    """Read a PEFT LoRA adapter into a model. Returns the model.

    The adapter "policy" needs a model that is not prepared yet: `model.prepare` is called here,
    then the tensors are copied. An adapter of another name joins those that are there. It must not
    hold a projector, because all adapters share the projector.

    Accepted: LoRA of one rank on linear layers of the LLM, and a projector in `modules_to_save`, in
    any naming of transformers. Other fields of the config are not read: what matters in them would
    show in the tensors. A tensor without a place is an error, and so is a place without its tensor.
    One that our alignment.json ties to another base is refused; another dtype is told, and that the
    base of an adapter without that file is not known.
    """
    # 1. check the config, and the base
    folder = adapter_folder(folder)
    conditions = read_conditions(folder)
    if "base" in conditions:
        check_base(model, conditions, folder)
    here, trained = str(model.dtype).removeprefix("torch."), conditions.get("dtype")
    if trained not in (None, here):
        print(
            f"{folder}: trained with --dtype {trained}, used with {here}: answers may differ",
            file=sys.stderr,
        )
    path = folder / "adapter_config.json"
    config = read_json(path)
    if "base" not in conditions:
        print(
            f"{folder}: no alignment.json, so whether this is its base cannot be checked; "
            f"adapter_config.json names {config.get('base_model_name_or_path')!r:.80}",
            file=sys.stderr,
        )
    kind = config.get("peft_type")
    rank = config.get("r")
    alpha = config.get("lora_alpha")
    numbers = type(rank) is int and type(alpha) in (int, float) and rank >= 1
    numbers = numbers and 0 < alpha <= MOST
    if kind != "LORA" or not numbers:
        raise BadInput(
            f"{path}: peft_type {kind!r:.80}, r {rank!r:.80}, lora_alpha {alpha!r:.80}; "
            "plain LoRA, with a rank from 1 and an alpha above 0, is accepted."
        )
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise BadInput(
                f"{path}: {key} is {config[key]!r:.80}; "
                "accepted: LoRA of one rank, scaled by lora_alpha / r."
            )

    # 2. find the tensors, under the hub's names
    index = {}
    for stored_name, place in tensor_index(folder, "adapter_model").items():
        name = hub_name(stored_name.removeprefix("base_model.model."))
        # `save_adapter` writes every tensor twice
        if name in index and not torch.equal(read_tensor(index[name]), read_tensor(place)):
            raise BadInput(
                f"{folder}: the weight {name} is there twice, under two names, with unequal values."
            )
        index[name] = place
    if not index:
        raise BadInput(f"{folder}/adapter_model.safetensors: holds no tensor; LoRA's are needed.")
    for name, (file, _, shape) in index.items():  # before memory for this rank is asked for
        if name.endswith(".lora_A.weight") and shape[:1] != (rank,):
            raise BadInput(f"{file}: {name} has the shape {shape}; {path} says rank {rank}.")
    targets = {name.split(".")[-3] for name in index if name.endswith(".lora_A.weight")}
    if not targets:
        raise BadInput(f"{folder}: no tensor of LoRA, whose names end in lora_A.weight.")
    has_projector = any(name.startswith("multi_modal_projector.") for name in index)

    # 3. add the adapter to the model
    if adapter == "policy":
        model.prepare(llm=False, projector=has_projector)
    elif has_projector:
        raise BadInput(
            f"{folder}: holds a projector; an adapter that stands beside another is LoRA alone."
        )
    add_adapter(model.llm, adapter, rank, alpha)

    # 4. copy the tensors; layers that the file does not adapt lose their new LoRA
    slots = {}
    if has_projector:
        for name, tensor in model.projector.state_dict().items():
            slots[our_hub_name(f"projector.{name}")] = tensor
    for name, lora in adapters(model, adapter):
        parent, leaf = name.rsplit(".", 1)
        if leaf in targets:
            slots[f"{our_hub_name(name)}.lora_A.weight"] = lora.lora_A
            slots[f"{our_hub_name(name)}.lora_B.weight"] = lora.lora_B
            continue
        layer = model.get_submodule(name)
        del layer.adapters[adapter]  # `add_adapter` adapted all of LORA_TARGETS
        if not layer.adapters:
            setattr(model.get_submodule(parent), leaf, layer.base)
    fill(slots, index, folder)
    return model


def merge(model):
    """Add LoRA to the weights that it adapts, in float32, and remove it. Returns the model."""
    if quantised(model) != "none":
        raise BadInput(
            "merging into 4-bit weights would round LoRA away; `checkpoints.save` "
            "merges into a copy of their values."
        )
    for name, lora in adapters(model):
        base = model.get_submodule(name).base
        base.weight.copy_(base.weight.float() + lora.scale * (lora.lora_B @ lora.lora_A))
        parent, leaf = name.rsplit(".", 1)
        setattr(model.get_submodule(parent), leaf, base)
    return model


# ---- reward models: an adapter, a scalar head, and what they learned to read


def base_hash(model):
    """A hash of the weights below all adapters, the same for every dtype.

    It is made of the names and of up to 8191 values of each tensor, as bfloat16. A projector that
    trains counts as training found it.
    """
    state = model.state_dict()
    for projector in model.initial_projector:
        state |= {f"projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    digest = hashlib.sha256()
    for name, tensor in state.items():
        if not_of_base(name):
            continue
        step = max(1, tensor.numel() // 4096)
        values = tensor.flatten()[::step].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name.replace('.base.', '.')} {tuple(tensor.shape)}".encode())
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def save_reward(model, folder, base_name, settings, name="reward"):
    """Write the adapter and the head of this name: adapter/ (PEFT), head.safetensors, reward.json.

    settings: what `load_reward` returns. reward.json is written last; it also holds the base's name
    and hash.
    """
    folder = Path(folder)
    save_adapter(model, folder / "adapter", base_name, name)
    head = {k: v.detach().cpu().contiguous() for k, v in model.heads[name].state_dict().items()}
    write_tensors(head, folder / "head.safetensors")
    base = {"base_name": str(base_name), "base": base_hash(model), "quantize": quantised(model)}
    write_json(folder / "reward.json", base | settings)


def reward_settings(folder):
    """The whole reward.json of a run of reward_model.py."""
    settings = read_json(Path(folder) / "reward.json")
    needed = "base base_name question facts max_facts template image_aspect held_out".split()
    missing = [name for name in needed if name not in settings]
    if missing:
        raise BadInput(
            f"{folder}/reward.json: no {', '.join(missing)}; "
            f"a run of this reward_model.py writes {', '.join(needed)}."
        )
    path = f"{folder}/reward.json"
    check_texts(
        settings, "base base_name question facts quantize template image_aspect".split(), path
    )
    most, held_out = settings["max_facts"], settings["held_out"]
    if most is not None and (type(most) is not int or not 1 <= most <= MOST):
        raise BadInput(f"{path}: max_facts is {most!r:.80}; a whole number from 1, or null.")
    if type(settings.get("facts_first", False)) is not bool:
        raise BadInput(f"{path}: facts_first is {settings['facts_first']!r:.80}; true or false.")
    for figure in held_out.values() if isinstance(held_out, dict) else [held_out]:
        numbers = [figure.get(k) for k in ("n", "mean", "std")] if isinstance(figure, dict) else []
        good = len(numbers) == 3 and all(type(x) in (int, float) for x in numbers)
        if figure is not None and not (
            good and numbers[0] >= 1 and all(abs(x) <= MOST for x in numbers)
        ):
            raise BadInput(f"{path}: held_out is {held_out!r:.80}; n, mean and std of each file.")
    return settings


@torch.no_grad()
def load_reward(model, folder, name="reward"):
    """Add a saved reward model to the base that it was trained on -> its reward.json.

    Its adapter and head get this name, and are frozen.
    """
    folder = Path(folder)
    settings = reward_settings(folder)
    check_base(model, settings, folder)
    load_adapter(model, folder / "adapter", name)
    model.add_head(name)
    fill(model.heads[name].state_dict(), tensor_index(folder, "head"), folder)
    for p in model.parameters_of(name):
        p.requires_grad_(False)
    return settings
