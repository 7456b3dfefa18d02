"""The toy base model's parts, as transformers folders: a CLIP tower and a tiny Llama.

A real LLaVA is composed of a CLIP that was pretrained on images and an LLM that reads; so is ours.
The LLM is made here with random weights and learns to read by sft.py's own command line (lab/toy.py
and lab/reading.py). The tower trains here for half a minute.

From the feature of every patch the tower learns to name what stands in that
sixth of the image (class, colour, count: all of it true) and which sixth it is. The features are
those that LLaVA takes: of the last layer but one. A tower that trains from scratch through the LLM
would spend most of the training time just learning to see.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from common import Progress, write_json
from formats import checkpoints
from training import schedule, shuffled
from lab.drawing import CLASSES, COLOURS

SIDE, PATCH, WIDTH = 96, 16, 64
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def write(folder, world, seed, epochs=5):
    """Write folder/clip and folder/llm for the world in folder `world`.

    They have 252 k and 646 k parameters. `seed` seeds both.
    """
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = Path(folder)

    # the models
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=600,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
        initializer_range=0.08,  # about 1 / sqrt(128); 0.02 suits a Llama 20 times as wide
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower, llm = CLIPVisionModel(vision), LlamaForCausalLM(text)
        if epochs:
            teach(tower, world, seed, epochs)

    tower.save_pretrained(folder / "clip")
    llm.save_pretrained(folder / "llm")

    # tokenizer
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}  # ids 0, 1, 2
    files = world / "instruct.json", world / "text_mix.json"
    rows = [row for file in files for row in json.loads(file.read_text())]
    bpe = tokenizer(rows, list(special.values()))
    PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=512, **special).save_pretrained(
        folder / "llm"
    )

    # image processor
    steps = dict.fromkeys(
        ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize"), True
    )
    sizes = {
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "resample": 3,
    }
    pixels = {
        "image_processor_type": "CLIPImageProcessor",
        "rescale_factor": 1 / 255,
        "image_mean": MEAN,
        "image_std": STD,
    }
    write_json(folder / "clip" / "preprocessor_config.json", steps | sizes | pixels)


def take_llm(model, folder):
    """Write the LLM of the LLaVA checkpoint in folder `model`, with its tokenizer, to `folder`."""
    found, processor = checkpoints.load(model)
    found.llm.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)


def tokenizer(rows, special):
    """A byte-level BPE of 600 tokens, trained on LLaVA-Instruct rows in their prompt template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    texts = [
        [turn["value"].replace("<image>", "") for turn in row["conversations"]] for row in rows
    ]
    texts = [f"{SYSTEM} USER: {turns[0]} ASSISTANT: {turns[1]}" for turns in texts]

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 0)])
    return bpe


def teach(tower, world, seed, epochs, batch_size=32, lr=2e-3):
    """Train the tower on the instruct images -> accuracy on the last batch.

    The accuracy is the share of patches with a thing whose class the tower names right.
    """
    truth = json.loads((world / "scenes.json").read_text())
    names = [name for name in truth if name.startswith("instruct_")]
    kinds, colours = [None, *CLASSES], [None, *COLOURS]

    # what the images show
    labels = torch.zeros(len(names), 6, 3, dtype=torch.long)
    pictures = torch.empty(len(names), 3, SIDE, SIDE)
    for i, name in enumerate(names):
        for thing in truth[name]["things"]:
            slot = thing["row"] * 3 + thing["column"]
            labels[i, slot] = torch.tensor(
                [kinds.index(thing["name"]), colours.index(thing["colour"]), thing["count"]]
            )
        with Image.open(world / "images" / name) as picture:
            x = (
                np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32)
                / 255
            )
        pictures[i] = torch.from_numpy((x - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)

    sizes = [len(kinds), len(colours), 3, 6]
    head = nn.Linear(WIDTH, sum(sizes))
    slot_of_patch = torch.tensor(
        [row // 3 * 3 + column // 2 for row in range(6) for column in range(6)]
    )
    # for each patch: class, colour, count, number of its sixth
    labels = torch.cat([labels, torch.arange(6).view(1, 6, 1).expand(len(labels), 6, 1)], -1)[
        :, slot_of_patch
    ]  # (images, 36, 4)

    params = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(params, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    steps = epochs * (len(names) // batch_size)
    progress, right = Progress("teaching the toy CLIP to see", steps), 0.0
    for step in range(steps):
        i = shuffled(step * batch_size, (step + 1) * batch_size, len(names), seed)
        x = tower.pre_layrnorm(tower.embeddings(pictures[i]))
        for layer in tower.encoder.layers[:-1]:
            x = layer(x, attention_mask=None)
        logits = head(x[:, 1:]).split(sizes, -1)  # of each of the 36 patches

        loss = sum(
            F.cross_entropy(z.flatten(0, 1), y.flatten())
            for z, y in zip(logits, labels[i].unbind(-1))
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()

        full = labels[i][..., 0] > 0
        right = (logits[0].argmax(-1) == labels[i][..., 0])[full].float().mean().item()
        progress(step + 1, f"loss {loss.item():.3f}  ")
    return right
