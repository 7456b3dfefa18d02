"""Tensors on disk: every naming of LLaVA's weights -> the hub's, from safetensors alone.

transformers wrote the same weights under five namings (4.x and 5.x, on disk and in memory), LLaVA's
own code under a sixth. All are read by renaming them to the hub's, and only the hub's is written,
because every version reads it:

    the hub's                       here            transformers' others            LLaVA's own
    vision_tower.vision_model.X     vision.X        [model.]vision_tower.X          model.vision_tower.[the hub's]
    multi_modal_projector.linear_1  projector.X     model.multi_modal_projector.X   model.mm_projector.0 (and linear_2, .2)
    image_newline                   image_newline   model.image_newline             model.image_newline
    language_model.model.X          llm.model.X     model.language_model.[model.]X  model.X
    language_model.lm_head.X        llm.lm_head.X   lm_head.X                       lm_head.X

transformers leaves a weight that it does not find at its random start and goes on (4.x and 5.0-5.5
do so with the whole tower of a file written as `vision_tower.X`). Here a missing or an unexpected
tensor is an error.
"""

import re
from pathlib import Path

import huggingface_hub
import torch
from safetensors import safe_open

from common import BadInput, one_line, read_json

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
