"""Tensors on disk: every naming of LLaVA's weights -> the hub's, from safetensors alone.

transformers wrote the same weights under five namings (4.x and 5.x, on disk and in memory). LLaVA's
own code used a sixth. All are read; their tensors get the hub's names. Only the hub's naming is
written, because every version reads it.

    the hub's                       here            transformers' others            LLaVA's own
    vision_tower.vision_model.X     vision.X        [model.]vision_tower.X          (1)
    multi_modal_projector.linear_1  projector.X     model.multi_modal_projector.X   (2)
    image_newline                   image_newline   model.image_newline             (3)
    language_model.model.X          llm.model.X     model.language_model.[model.]X  model.X
    language_model.lm_head.X        llm.lm_head.X   lm_head.X                       lm_head.X

    (1) model.vision_tower.[the hub's]
    (2) model.mm_projector.0; and linear_2 is model.mm_projector.2
    (3) model.image_newline

If transformers does not find a weight, it leaves it at its random start and goes on (4.x and
5.0-5.5 do so with the whole tower of a file written as `vision_tower.X`). Here, a missing or an
unexpected tensor is an error.

huggingface_hub is imported where needed: at the top it would slow every `--help`.
"""

import math
import os
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common import (
    BadInput,
    file_identity,
    naming,
    one_line,
    open_to_others,
    read_json,
    refuse_lfs_pointer,
    write_json,
)

FLOATS = ("float32", "bfloat16", "float16", "float64")  # float8 would need its scales
SHARD_BYTES = 5 * 10**9
# neither pickles nor code
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt")


# ---- names


def hub_name(name):
    """The hub's name of a tensor in any naming of transformers or LLaVA.

    An unknown name comes back unchanged.
    """
    parts = "vision_tower|multi_modal_projector|language_model|mm_projector"
    name = re.sub(rf"^model\.(?=({parts})\.|image_newline$)", "", name)
    name = re.sub(r"^model\.(?=(embed_tokens|layers|norm)\.)", "language_model.model.", name)
    name = re.sub(r"^mm_projector\.0\.", "multi_modal_projector.linear_1.", name)
    name = re.sub(r"^mm_projector\.2\.", "multi_modal_projector.linear_2.", name)
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


def name_in_memory(name):
    """The hub's name of a tensor of LLM or projector -> that in transformers since 4.52."""
    name = re.sub(r"^language_model\.model\.", "language_model.", name)
    return f"model.{name}"


# ---- files


def find(name, files=HUB_FILES):
    """The folder `name`. If there is none and it looks like owner/name: download from the hub.

    files: which files of the repository are downloaded.
    """
    import huggingface_hub

    if not isinstance(name, (str, Path)) or "\0" in str(name):
        raise BadInput(f"{name!r:.80}: a folder or a hub id (owner/name) is accepted.")
    if os.path.isdir(name):
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        raise BadInput(
            f"{name!s:.200}: no such folder; a folder or a hub id (owner/name) is accepted."
        )
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(files)))
    except Exception as error:
        # errors of the client itself, of its HTTP library and of the system
        raise BadInput(
            f"{name}: no such folder, and not received from the hub ({one_line(error)})."
        ) from None


def tensor_index(folder, stem="model"):
    """What the safetensors files of a folder hold, from their headers.

    -> {name: (file, name in the file, shape)}. Left out: buffers that old versions stored and that
    are computed today.
    """
    # which files
    whole = folder / f"{stem}.safetensors"
    shard_list = folder / f"{stem}.safetensors.index.json"
    shards = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))  # pickles, converted one by one
    if whole.exists():
        files = [whole]
    elif shard_list.exists():
        shard_of = read_json(shard_list).get("weight_map")
        names = shard_of.values() if isinstance(shard_of, dict) else [shard_of]
        for name in names:  # no path, which could lead out of the folder
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
                raise BadInput(
                    f"{shard_list}: weight_map names {name!r:.80}; names of .safetensors files "
                    "beside it are accepted."
                )
        files = [folder / name for name in sorted(set(names))]
    elif shards:
        files = shards
    else:
        other = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "no other weights"
        raise BadInput(
            f"{folder}: found {other} instead of {whole.name}; pickles are not read: convert what "
            "transformers or PEFT wrote with from_pretrained(OLD) and save_pretrained(NEW), "
            "and each file that LLaVA's own code wrote with "
            "safetensors.torch.save_file(torch.load(BIN, weights_only=True), NEW), "
            f"NEW = {stem}[-1-of-N].safetensors."
        )

    # their tensors
    index = {}
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                for name in f.keys():
                    index[name] = (file, name, tuple(f.get_slice(name).get_shape()))
        except Exception as error:  # the error class of safetensors is derived from Exception
            refuse_lfs_pointer(file)
            raise BadInput(f"{file}: not readable as safetensors ({one_line(error)}).") from None
    return {k: v for k, v in index.items() if not k.endswith((".inv_freq", ".position_ids"))}


def read_tensor(place):
    """The tensor of an entry of `tensor_index`, checked."""
    file, stored_name, _ = place
    with safe_open(file, "pt") as f:
        tensor = f.get_tensor(stored_name)
    check_values(tensor, stored_name, file)
    return tensor


def weights(folder, stem="model"):
    """`tensor_index` under the hub's names."""
    stored = tensor_index(folder, stem)
    index = {}
    for name, place in stored.items():
        name = re.sub(r"^base_model\.(model\.(?=model\.))?", "", name)
        index[hub_name(name)] = place
    if len(index) < len(stored):
        raise BadInput(
            f"{folder}: {len(stored) - len(index)} weights are there twice, under two names."
        )
    return index


def check_values(tensor, name, file):
    """Refuse a tensor that cannot be a weight: not floating point, or with NaN or infinity.

    .04 s for 500 MB on one core, beside .06 s for reading and copying them from a warm disk cache.
    """
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in FLOATS:
        raise BadInput(f"{file}: {name} is stored as {kind}; accepted are {', '.join(FLOATS)}.")
    if tensor.numel() == 0:
        raise BadInput(f"{file}: {name} has the shape {tuple(tensor.shape)}: it holds no number.")
    if not all(map(math.isfinite, torch.aminmax(tensor))):  # NaN comes through both
        wrong = int((~tensor.isfinite()).sum())
        raise BadInput(
            f"{file}: {name} has NaN or infinity in {wrong} of {tensor.numel()} places; "
            "finite weights are accepted."
        )


def check_shapes(slots, found, folder, tied=()):
    """Refuse files that do not hold a tensor for every slot, of its shape, and no other one.

    As `fill`, which calls it; on a model without memory (device "meta") before any is asked for.
    """
    wrong = {
        "missing": slots.keys() - found.keys() - set(tied),
        "unexpected": found.keys() - slots.keys(),
    }
    if any(wrong.values()):
        text = "; ".join(f"{what}: {_few(names)}" for what, names in wrong.items() if names)
        raise BadInput(f"{folder}: the weights are not those that its config asks for; {text}.")
    for name, (file, _, shape) in found.items():
        if shape != tuple(slots[name].shape):
            raise BadInput(
                f"{file}: {name} has the shape {shape}, "
                f"but the config asks for {tuple(slots[name].shape)}."
            )


def fill(slots, found, folder, tied=()):
    """Copy tensors from files into the model, one at a time: memory holds one copy of the model.

    slots: {name: tensor of the model, or another thing with `shape` and `copy_`}.
    found: {name: (file, name in the file, shape)}, as from `tensor_index`.
    tied: names in `slots` that share the memory of another. A file may lack them; if it holds one,
        it must be equal to the other.

    Every tensor is checked (`check_values`).
    """
    check_shapes(slots, found, folder, tied)

    # copy file by file
    for file in sorted({file for file, _, _ in found.values()}):
        with safe_open(file, "pt") as f:
            for name, (place, stored_name, _) in found.items():
                if place == file and name not in tied:
                    tensor = f.get_tensor(stored_name)
                    check_values(tensor, name, file)
                    slots[name].copy_(tensor)

    # compare what is tied
    for name in (n for n in tied if n in found):
        if not torch.equal(read_tensor(found[name]).to(slots[name]), slots[name]):
            raise BadInput(
                f"{folder}: the config ties {name} to the embeddings; the files hold another matrix."
            )


def source(*indices):
    """What the files of these indices (see `tensor_index`) are known by, for `MLLM.source`."""
    files = {file for index in indices for file, _, _ in index.values()}
    return "; ".join(sorted(map(file_identity, files)))


def _few(names):
    """The first four names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(sorted(names)[:4]) + more


def tower_weights(folder):
    """`tensor_index` of a CLIP's vision tower, under the names of CLIPVisionModel.

    The folder may hold a whole CLIP.
    """
    others = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
    return {
        name.removeprefix("vision_model."): place
        for name, place in tensor_index(folder).items()
        if not name.startswith(others)
    }


# ---- writing


def write_tensors(tensors, path):
    """Write {name: tensor} as safetensors. Its library makes files that only their owner reads."""
    with naming(path):
        save_file(tensors, path, metadata={"format": "pt"})
    open_to_others(path)


def write_shards(tensors, folder, stem="model"):
    """Write (name, tensor) pairs as STEM.safetensors, or from SHARD_BYTES on as files and an index.

    One file is in memory at a time.
    """
    # 1. files, numbered from 1
    files, weight_map, total = [], {}, 0
    shard, size = {}, 0

    def write():
        """Write what has been gathered."""
        files.append(folder / f"{stem}-{len(files) + 1:05d}.safetensors")
        weight_map.update(dict.fromkeys(shard, len(files)))
        write_tensors(shard, files[-1])
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            write()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()

    # 2. their names, once it is known how many they are
    if len(files) == 1:
        files[0].rename(folder / f"{stem}.safetensors")
        return
    names = [f"{stem}-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    for file, name in zip(files, names):
        file.rename(folder / name)
    weight_map = {name: names[number - 1] for name, number in weight_map.items()}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / f"{stem}.safetensors.index.json", index)
