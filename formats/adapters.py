"""LoRA in PEFT's files, and reward models: an adapter, a scalar head, and what they were trained to read."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from common import BadInput, new_folder, read_json, whole_folder, write_json
from formats.weights import fill, hub_name, our_hub_name, tensor_index
from lora import LoRALinear, add_adapter


def adapters(model, adapter="policy"):
    """(our name of the layer, its LoRA) of every layer that has this adapter."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]
    return [(name, m.adapters[adapter]) for name, m in layers if adapter in m.adapters]


def not_of_base(name):
    """Is this tensor one of LoRA's, or of a scalar head?"""
    return name.endswith((".lora_A", ".lora_B")) or name.startswith("heads.")


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
    projector = bool(model.initial_projector)
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
    with whole_folder(new_folder(folder)) as aside:
        tensors = {f"base_model.model.{k}": v.cpu().contiguous() for k, v in tensors.items()}
        save_file(tensors, aside / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(aside / "adapter_config.json", config)


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
        model.prepare(llm=False, projector=projector)
        add_adapter(model.llm, adapter, rank, alpha)
    elif projector:
        raise BadInput(
            f"{folder}: holds a projector; an adapter that stands beside another is LoRA alone."
        )
    else:
        add_adapter(model.llm, adapter, rank, alpha)
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
    write_json(
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
