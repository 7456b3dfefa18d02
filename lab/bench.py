"""Our speed and memory beside the naive way and beside TRL, on CPU (Linux).

    python -m lab.bench [--json FILE] [--repeat N] [--only NAME ...]      some minutes a repeat
    python -m lab.bench --device cuda [--help]      the real shapes on one GPU: lab/bench_gpu.py

`step`: LoRA DPO steps in float32. The LLaVA has random weights, about 62 M parameters. Images have
576 tokens, prompts about 45 text tokens, answers about 70; 4 pairs a step; rank 16 on all linear
layers of the LLM. All ways take the same weights, images, tokens and one thread. Each runs in a
process of its own. Gradient checkpointing, TRL's default, is off for all but the last.
    ours    the calls of dpo.py's loop: packed rows, only answer rows through the fused head,
            reference log-probs cached
    naive   a padded batch of 2B rows, logits of all positions, log_softmax and gather, a reference
            pass in every step (as eric-mitchell/direct-preference-optimization; transformers'
            LLaVA, our LoRA)
    trl     DPOTrainer and a PEFT LoRA. With images it cannot cache the reference: it switches the
            adapters off in every step
    trl-default    the same with gradient checkpointing, as it is without the flag that turns it off
`step-bfloat16`: ours and trl, frozen weights and arithmetic in bfloat16, what trains in float32.

Seconds of a step = (reference pass over the timed pairs + the timed steps) / steps. Both decode the
images. This is the cost for one epoch, the least favourable to a cache. seconds_3_epochs counts a
third of the reference pass: 3 is the smallest number of epochs of the papers' DPO runs (Amirloo et
al. 3 to 7, Li et al. 3). A first step warms up and is not counted.

The seconds are CPU seconds. With one thread on an idle machine they equal the clock's; other work
changes them less. Peak = highest RSS less RSS before the first step, so without weights and
libraries. Figures are median (min - max) over the repeats, in which the ways take turns. Ratios are
taken within a repeat. The script stops unless step 0 gives loss ln 2 and all ways have the same
log-probs of the answers, to .001, in bfloat16 to APART_BFLOAT16.

The head has 40 % of this LLM's multiplications; in a 7 B model it has 2 %. So skipping rows of the
head gains more here than there.

`grpo`: iterations of GRPO on the same weights, pictures and prompts: 8 answers of 64 tokens to each
of 4 prompts, at temperature 1, advantages of a reward that is 0 or 1, one update; no KL. What is
drawn differs, so here the log-probs of the pairs' answers are compared.
    grpo-ours    the calls of grpo.py's loop: an image encoded once for its 8 answers
    grpo-trl     GRPOTrainer and a PEFT LoRA, with transformers' own sampling

`head`: log-probs of 140 answer tokens of 1400 rows, V 32000, D 256, forward and backward to the
hidden states, head frozen.

`negatives`: BDHS's guided completions of the same pairs' chosen answers, five sentences each, 12
tokens a sentence; seconds for an answer and try. Decoding is greedy, so that both ways draw the
same.
    one-prefill           as bdhs.py
    prefill-a-sentence    a prompt with its image for each sentence

`pope`: greedy answers of two tokens, as "Yes" and its end are, to six questions about each of five
pictures; seconds a question. The answers must be equal token for token, and the logits of six words
where they begin to .001.
    pope-ours         as the evaluations ask: an image encoded once for its questions
    pope-generate     one by one with transformers' LLaVA and its `generate`
"""

import argparse
import functools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

import dpo
import eval_pope
import evaluation
import grouping
import grpo
import training
from common import write_json
from data import TEMPLATES, Record
from formats import checkpoints, layouts
from lora import LORA_TARGETS, LoRALinear
from model import fused_log_probs
from sampling import sample

APART_BFLOAT16 = 0.5  # bfloat16 moves an answer's log-prob by .1; a wrong token, by about 10
RANK = 16
GROUP, NEW = 8, 64  # answers to a prompt of `grpo`, tokens of each
LR = 1e-4
BETA = 0.1
FULL = {
    "vision": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 336,
        "patch_size": 14,
    },
    "llm": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "vocab_size": 32064,
    },
    "batch": 4,
    "steps": 3,
    "words": 67,
}


# ---- the workload


def build(folder, size):
    """Write the workload to a folder -> what was made, for the report.

    model/ (hub layout), pairs.json (POVID layout), images, size.json
    """
    import transformers

    torch.manual_seed(0)
    words = (
        "a the red green small large cup dog table bowl man tree car stands lies left right of on "
        "under beside two and"
    ).split()
    write_json(folder / "pairs.json", random_pairs(folder, size, words))
    write_json(folder / "size.json", size)

    tokenizer(words).save_pretrained(folder / "llm")
    llm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size["llm"]))
    llm.save_pretrained(folder / "llm")
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**size["vision"]))
    vision.save_pretrained(folder / "vision")
    checkpoints.save(*checkpoints.compose(folder / "vision", folder / "llm"), folder / "model")

    model, processor, batches = load(folder)
    answers = [answer for batch in batches for example in batch for answer in example.answers]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "image_tokens": processor.image_tokens,
        "prompt_text_tokens": len(batches[0][0].prompt) - processor.image_tokens,
        "answer_tokens": statistics.mean(map(len, answers)),
        "pairs_a_step": size["batch"],
        "timed_steps": size["steps"],
    }


def random_pairs(folder, size, words):
    """Rows of POVID for the warm-up step and the timed ones. Writes their images to the folder."""
    rng = random.Random(0)
    side = size["vision"]["image_size"]  # of the tower: resizing cannot differ
    write = lambda n: " ".join(rng.choices(words, k=n)) + "."
    rows = []
    for i in range(size["batch"] * (size["steps"] + 1)):
        pixels = torch.randint(256, (side, side, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        ask = {"from": "human", "value": f"<image>\n{write(8)}"}
        chosen = {"from": "gpt", "value": write(size["words"] + rng.randint(-3, 3))}
        rejected = {"from": "gpt", "value": write(size["words"] + rng.randint(-3, 3))}
        rows.append(
            {
                "id": i,
                "image": f"{i}.png",
                "conversations": [ask, chosen],
                "rejected_conversations": [ask, rejected],
            }
        )
    return rows


def tokenizer(words):
    """A tokenizer with one token for each of these words and for those of the prompt template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Whitespace()
    template = split.pre_tokenize_str(TEMPLATES["vicuna_v1"].start + "USER: ASSISTANT:")
    names = dict.fromkeys(["<unk>", "<s>", "</s>", *words, *(word for word, _ in template)])
    ids = {word: i for i, word in enumerate(names)}

    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = split
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def load(folder, dtype=torch.float32):
    """-> model, processor, batches of examples."""
    model, processor = checkpoints.load(folder / "model", dtype)
    examples = [processor.encode(r) for r in layouts.read(folder / "pairs.json").records]
    B = json.loads((folder / "size.json").read_text())["batch"]
    return model, processor, [examples[i : i + B] for i in range(0, len(examples), B)]


def high_water(model=None):
    """The process's highest RSS, MiB.

    With a model: RSS now, after its weights were read. Highest then means since this call.
    """
    if model is not None:
        for p in model.parameters():  # weights mapped from a file are not in memory until read
            p.sum().item()
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


# ---- DPO steps
# Each way -> seconds a step (two kinds), peak_mib, losses, log_probs of step 0, (B, 2)


def train(batches, pair_log_probs, params, base, reference_seconds=0.0):
    """DPO steps, the same for ours and naive.

    pair_log_probs: number of a batch -> log-probs of policy (B, 2) and of reference (B, 2).
    base: RSS before the first step. reference_seconds: what the reference pass over a step's pairs
    took, if it is not part of the step.
    """
    optimizer = torch.optim.AdamW(
        [{"params": params, "base_lr": LR}], lr=LR, weight_decay=0.0, fused=True
    )
    ends = []
    losses = []
    first = None
    for step, examples in enumerate(batches):
        policy, reference = pair_log_probs(step)
        if first is None:
            first = policy.tolist()
        loss = dpo.dpo_loss(*policy.T, *reference.T, BETA)[0].mean()
        loss.backward()
        losses.append(loss.item())
        grad_norm = training.clip_gradients(optimizer, max_norm=1.0)
        training.check_finite(losses[-1], grad_norm, [e.record.where for e in examples])
        training.take_step(optimizer, 1.0)
        ends.append(time.process_time())

    step_seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    return {
        "seconds": step_seconds + reference_seconds,
        "seconds_3_epochs": step_seconds + reference_seconds / 3,
        "peak_mib": high_water() - base,
        "losses": losses,
        "log_probs": first,
    }


def ours(folder, dtype=torch.float32):
    """The calls of dpo.py's loop."""
    model, processor, batches = load(folder, dtype)
    base = high_water(model)

    # reference pass: the first batch warms up
    size = len(batches[0])
    reference = [dpo.reference_log_probs(model, processor, batches[0], size)]
    begin = time.process_time()
    timed = sum(batches[1:], [])
    reference += dpo.reference_log_probs(model, processor, timed, size).split(size)
    seconds = (time.process_time() - begin) / (len(batches) - 1)

    torch.manual_seed(0)
    model.prepare(RANK, projector=False)

    def score(step):
        """Policy and reference on both answers of a batch."""
        policy = model.answer_log_probs(processor.collate(batches[step])).view(-1, 2)
        return policy, reference[step]

    return train(batches, score, list(training.trainable(model).values()), base, seconds)


def naive(folder):
    """What most scripts do."""
    import transformers

    _, processor, batches = load(folder)  # the same tokens and pixels as ours
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder / "model", dtype=torch.float32
    )
    base = high_water(model.requires_grad_(False))

    # LoRA
    adapters = []
    torch.manual_seed(0)
    for module in list(model.model.language_model.modules()):
        for name, child in [(n, c) for n, c in module.named_children() if n in LORA_TARGETS]:
            adapters.append(LoRALinear(child, RANK, 2 * RANK))
            setattr(module, name, adapters[-1])

    def log_probs(enabled, inputs):
        """Log-probs (B, 2) of the answers of a batch, with the adapters or without."""
        for adapter in adapters:
            adapter.active = "policy" if enabled else None
        return hub_log_probs(model, **inputs)

    def score(step):
        """Policy and reference on both answers of a batch."""
        inputs = padded_pairs(processor, batches[step])
        with torch.no_grad():
            reference = log_probs(False, inputs)
        return log_probs(True, inputs), reference

    return train(batches, score, [p for p in model.parameters() if p.requires_grad], base)


def padded_pairs(processor, examples):
    """The answers of B pairs as transformers' model reads them: 2B rows, chosen first."""
    rows = [(e.prompt, e.answers[k]) for k in (0, 1) for e in examples]
    ids = [torch.cat([prompt, answer]) for prompt, answer in rows]
    labels = [torch.cat([torch.full_like(prompt, -1), answer]) for prompt, answer in rows]
    ids = pad_sequence(ids, batch_first=True, padding_value=-1)  # (2B, L)
    labels = pad_sequence(labels, batch_first=True, padding_value=-1)  # (2B, L)
    pixels = torch.stack([processor.pixels(e.record.image) for e in examples] * 2)
    return {
        "labels": labels,
        "input_ids": ids.clamp(min=0),
        "attention_mask": (ids >= 0).long(),
        "pixel_values": pixels,
    }


def hub_log_probs(model, labels, **inputs):
    """Log-probs (B, 2) of the answers of a batch, from logits of all positions."""
    logits = model(**inputs, use_cache=False).logits[:, :-1]  # (2B, L - 1, V)
    log_p = logits.log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    return (log_p * (labels[:, 1:] >= 0)).sum(-1).view(2, -1).T  # (B, 2)


def trl(folder, gradient_checkpointing=False, dtype=torch.float32):
    """TRL's trainer as its users call it. Its log has the mean log-probs of the batch of step 0."""
    import datasets
    import peft
    import transformers
    from trl import DPOConfig, DPOTrainer

    # data
    template = TEMPLATES["vicuna_v1"]
    rows = []
    for record in layouts.read(folder / "pairs.json").records:
        user = template.user.replace("{}", "<image>\n" + record.turns[0])
        rows.append(
            {
                "prompt": "<s>" + template.start + user,
                "chosen": f" {record.answers[0]}</s>",
                "rejected": f" {record.answers[1]}</s>",
                "images": [str(record.image)],
            }
        )
    images = datasets.List(datasets.Image())
    data = datasets.Dataset.from_list(rows).cast_column("images", images)

    # trainer
    ends = []
    clock = transformers.TrainerCallback()
    clock.on_step_end = lambda *args, **kwargs: ends.append(time.process_time())
    config = DPOConfig(
        "trl",
        num_train_epochs=1,
        per_device_train_batch_size=json.loads((folder / "size.json").read_text())["batch"],
        learning_rate=LR,
        beta=BETA,
        bf16=dtype == torch.bfloat16,
        max_length=None,
        gradient_checkpointing=gradient_checkpointing,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    lora = peft.LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=rf".*language_model.*\.({'|'.join(LORA_TARGETS)})",
    )
    trainer = DPOTrainer(
        transformers.LlavaForConditionalGeneration.from_pretrained(folder / "model", dtype=dtype),
        args=config,
        callbacks=[clock],
        train_dataset=data,
        processing_class=transformers.AutoProcessor.from_pretrained(folder / "model"),
        peft_config=lora,
    )

    base = high_water(trainer.model)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    return {
        "seconds": seconds,
        "seconds_3_epochs": seconds,
        "peak_mib": high_water() - base,
        "losses": [entry["loss"] for entry in log],
        "log_probs": [[log[0]["logps/chosen"], log[0]["logps/rejected"]]],
    }


# ---- GRPO iterations
# Each way -> seconds of one, peak_mib, log_probs of the first pairs, (B, 2)


def parity(tokens):
    """A reward that varies: is the sum of the ids odd?"""
    return float(sum(tokens) % 2)


def grpo_ours(folder):
    """The calls of grpo.py's loop."""
    model, processor, batches = load(folder)
    base = high_water(model)
    with torch.no_grad():
        first = model.answer_log_probs(processor.collate(batches[0])).view(-1, 2)
    torch.manual_seed(0)
    model.prepare(RANK, projector=False)
    model.train()
    optimizer = training.optimizer_for(model, LR, 0.0)
    knobs, size = grpo.VARIANTS["grpo"], len(batches[0])
    args = argparse.Namespace(
        variant="grpo",
        group_size=GROUP,
        max_new_tokens=NEW,
        batch_size=size,
        minibatches=1,
        kl_coef=0.0,
    )
    ends = []
    for step, examples in enumerate(batches):
        groups = grouping.draw(model, processor, examples, range(size), args, step)
        for group in groups:
            group.terms = {"exact": [parity(tokens.tolist()) for tokens in group.answers]}
            group.advantages = grpo.advantages(group.rewards, knobs.by_std)
        grpo.update(model, processor, optimizer, 1.0, groups, examples, knobs, args)
        ends.append(time.process_time())
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    return {"seconds": seconds, "peak_mib": high_water() - base, "log_probs": first.tolist()}


def grpo_trl(folder):
    """TRL's trainer as its users call it, a chat template writing our prompts."""
    import datasets
    import peft
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    # data
    _, processor, batches = load(folder)
    size, n = len(batches[0]), len(batches)
    records = [example.record for batch in batches for example in batch]
    rows = [
        {"prompt": [{"role": "user", "content": r.turns[0]}], "image": str(r.image)}
        for r in records
    ]
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    theirs = transformers.AutoProcessor.from_pretrained(folder / "model")
    theirs.chat_template = chat_template()

    # trainer
    ends = []
    clock = transformers.TrainerCallback()
    clock.on_step_end = lambda *args, **kwargs: ends.append(time.process_time())
    config = GRPOConfig(
        "trl",
        max_steps=n,
        per_device_train_batch_size=size * GROUP,
        num_generations=GROUP,
        max_completion_length=NEW,
        generation_kwargs={"min_new_tokens": NEW},
        loss_type="grpo",
        learning_rate=LR,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    lora = peft.LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=rf".*language_model.*\.({'|'.join(LORA_TARGETS)})",
    )
    hub = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder / "model", dtype=torch.float32
    )
    with torch.no_grad():
        inputs = padded_pairs(processor, batches[0])
        first = hub_log_probs(hub.requires_grad_(False), **inputs)
    trainer = GRPOTrainer(
        hub,
        reward_funcs=lambda completion_ids, **_: [parity(tokens) for tokens in completion_ids],
        args=config,
        callbacks=[clock],
        train_dataset=data,
        processing_class=theirs,
        peft_config=lora,
    )
    base = high_water(trainer.model)
    trainer.train()
    drawn = [entry["completions/mean_length"] for entry in trainer.state.log_history[:-1]]
    if drawn != [NEW] * n:
        raise RuntimeError(f"TRL drew answers of {drawn} tokens")
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    return {"seconds": seconds, "peak_mib": high_water() - base, "log_probs": first.tolist()}


def chat_template():
    """A template of transformers that asks about a picture as we do."""
    template = TEMPLATES["vicuna_v1"]
    before, after = template.user.split("{}")
    picture = "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    parts = "{% for part in messages[0]['content'] %}" + picture + "{% endfor %}"
    return "<s>" + template.start + before + parts + after


# ---- the head, and BDHS's negatives


def head(name, _):
    """One way to the log-probs of 140 of 1400 rows.

    -> seconds a call after the first, peak_mib, log_probs: their mean.
    """
    if name == "trl-selective":
        from trl.trainer.utils import selective_log_softmax

    torch.manual_seed(0)
    w = torch.randn(32000, 256) * 0.02
    h = torch.randn(1400, 256, requires_grad=True)
    y = torch.randint(32000, (1400,))
    rows = torch.cat([torch.arange(630, 700), torch.arange(1330, 1400)])
    plain = lambda h, y: (h @ w.T).log_softmax(-1).gather(-1, y[:, None])
    way = {
        "fused": lambda: fused_log_probs(h[rows], w, y[rows])[0],
        "answer-rows": lambda: plain(h[rows], y[rows]),
        "naive-head": lambda: plain(h, y)[rows],
        "trl-selective": lambda: selective_log_softmax(h @ w.T, y)[rows],
    }[name]

    base = high_water(torch.nn.Module())
    ends = []
    for _ in range(4):
        log_p = way()
        log_p.sum().backward()
        ends.append(time.process_time())
    return {
        "seconds": (ends[-1] - ends[0]) / 3,
        "peak_mib": high_water() - base,
        "log_probs": [[log_p.mean().item()]],
    }


def negatives(name, folder):
    """One way to complete five beginnings of each answer of a batch.

    -> seconds an answer after the first batch, peak_mib, log_probs: their mean.
    """
    model, processor, batches = load(folder)
    base = high_water(model)
    ends = []
    for examples in batches:
        pixels, _ = processor.images(examples)
        cuts = [[len(e.answers[0]) * (2 * i + 1) // 10 for i in range(5)] for e in examples]
        if name == "one-prefill":
            prompts = [e.prompt for e in examples]
            given = [[(e.answers[0], cut)] for e, cut in zip(examples, cuts)]
            samples = sample(model, prompts, pixels, 1, 12, 0, given=given)
        else:
            prompts = [
                torch.cat([e.prompt, e.answers[0][:end]])
                for e, cut in zip(examples, cuts)
                for end in cut
            ]
            samples = sample(model, prompts, pixels.repeat_interleave(5, 0), 1, 12, 0)
        mean = torch.stack([log_p.sum() for answer in samples.log_probs for log_p in answer]).mean()
        ends.append(time.process_time())

    seconds = (ends[-1] - ends[0]) / (len(ends) - 1) / len(batches[0])
    return {"seconds": seconds, "peak_mib": high_water() - base, "log_probs": [[mean.item()]]}


# ---- POPE
# Each way -> seconds a question, peak_mib, answers: ids of their tokens; log_probs: logits of some
# words where the answers begin, (questions, words)

OBJECTS = "dog cup table bowl man tree".split()
ANSWER = 2  # tokens of an answer


def pope_records(folder):
    """Questions about six pictures, those about one beside each other; the first six warm up."""
    ask = [f"Is there a {name} in the image?{eval_pope.SUFFIX}" for name in OBJECTS]
    return [
        Record("", image, (text,))
        for image in (folder / f"{i}.png" for i in range(6))
        for text in ask
    ]


def pope_ours(folder):
    """The calls of eval_pope.py."""
    model, processor, _ = load(folder)
    processor.text = lambda ids: " ".join(map(str, ids.tolist()))  # most ids have no word here
    base = high_water(model)
    records, n = pope_records(folder), len(OBJECTS)
    contestant = evaluation.in_memory(model, processor)
    ask = lambda some: evaluation.replies(contestant, some, ANSWER, watch=OBJECTS)

    ask(records[:n])
    begin = time.process_time()
    rows = ask(records[n:])
    seconds = time.process_time() - begin
    return {
        "seconds": seconds / len(rows),
        "peak_mib": high_water() - base,
        "answers": [[int(i) for i in row["answer"].split()] for row in rows],
        "log_probs": [row["first"] for row in rows],
    }


@torch.no_grad()
def pope_generate(folder):
    """What most scripts do."""
    import transformers

    _, processor, _ = load(folder)  # the same tokens and pixels as ours
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder / "model", dtype=torch.float32
    ).eval()
    base = high_water(model)
    records, n = pope_records(folder), len(OBJECTS)
    watch = [evaluation.first_token(processor, records[0], text) for text in OBJECTS]

    ends, answers, first = [], [], []
    for record in records:
        ids = processor.encode(record).prompt[None]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=processor.pixels(record.image)[None],
            max_new_tokens=ANSWER,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        answers.append(out.sequences[0, ids.shape[1] :].tolist())
        first.append(out.logits[0][0, watch].tolist())
        ends.append(time.process_time())
    return {
        "seconds": (ends[-1] - ends[n - 1]) / (len(ends) - n),
        "peak_mib": high_water() - base,
        "answers": answers[n:],
        "log_probs": first[n:],
    }


# ---- run all ways, compare, print


SECTIONS = {  # section -> {name of a way: function of the workload's folder}
    "step": {
        "ours": ours,
        "naive": naive,
        "trl": trl,
        "trl-default": functools.partial(trl, gradient_checkpointing=True),
    },
    "step-bfloat16": {
        "ours-bfloat16": functools.partial(ours, dtype=torch.bfloat16),
        "trl-bfloat16": functools.partial(trl, dtype=torch.bfloat16),
    },
    "grpo": {"grpo-ours": grpo_ours, "grpo-trl": grpo_trl},
    "head": {
        "fused": functools.partial(head, "fused"),
        "answer-rows": functools.partial(head, "answer-rows"),
        "naive-head": functools.partial(head, "naive-head"),
        "trl-selective": functools.partial(head, "trl-selective"),
    },
    "negatives": {
        "one-prefill": functools.partial(negatives, "one-prefill"),
        "prefill-a-sentence": functools.partial(negatives, "prefill-a-sentence"),
    },
    "pope": {"pope-ours": pope_ours, "pope-generate": pope_generate},
}


def measure(folder, names, repeat):
    """Run each way `repeat` times, in processes of their own -> {name: {figure: spread}}.

    The ways take turns. A spread is {"median", "min", "max"}. `..._ratio` is the ratio to the first
    way. RuntimeError if a way computes something else than the first.
    """
    results = {name: [] for name in names}
    for name in [*names] * repeat:
        done = run_child(name, folder)
        if "ModuleNotFoundError" in done.stderr and "trl" in name:
            reason = done.stderr.splitlines()[-1]
            print(f"{name} is not measured: {reason} (pip install trl peft)", file=sys.stderr)
            continue
        if done.returncode:
            raise RuntimeError(
                f"{name} ended with status {done.returncode}:\n{done.stderr[-2000:]}"
            )
        line = done.stdout.splitlines()[-1]
        print(f"{name}: {line:.120}", file=sys.stderr)
        result = json.loads(line)
        results[name].append(result)
        first = next(filter(None, results.values()))[0]
        check_same(name, result, first)

    spreads = {}
    measured = {name: repeats for name, repeats in results.items() if repeats}
    for name, repeats in measured.items():
        first = next(iter(measured.values()))
        kinds = [kind for kind in repeats[0] if kind not in ("losses", "log_probs", "answers")]
        values = {kind: [result[kind] for result in repeats] for kind in kinds}
        for kind in kinds:
            values[f"{kind}_ratio"] = [r[kind] / f[kind] for r, f in zip(repeats, first)]
        spreads[name] = {
            kind: {"median": statistics.median(v), "min": min(v), "max": max(v)}
            for kind, v in values.items()
        }
    return spreads


def run_child(name, folder):
    """Run one way in a process of its own; the last line that it prints is its result."""
    command = [sys.executable, "-m", "lab.bench", "--child", name, str(folder)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with tempfile.TemporaryDirectory() as cwd:  # for the cache of reference log-probs
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def check_same(name, result, first):
    """RuntimeError unless a result has loss ln 2 at step 0 and the first way's log-probs, answers."""
    ours = torch.tensor(first["log_probs"])
    other = torch.tensor(result["log_probs"])
    if len(other) == 1:  # TRL has only the batch's mean
        ours = ours.mean(0)
    apart = (ours - other).abs().max()
    loss = result.get("losses", [math.log(2)])[0]
    limit = APART_BFLOAT16 if name.endswith("bfloat16") else 1e-3
    answers = result.get("answers") == first.get("answers")
    if not apart <= limit or not abs(loss - math.log(2)) <= 1e-4 or not answers:
        raise RuntimeError(f"{name} computed something else, log-probs {apart:.4f} apart: {result}")


def cpu_name():
    """The name of the CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if "model name" in line:
            return line.split(":")[1].strip()
    return "unknown"


def print_section(section, spreads):
    """One Markdown table: a row for each way."""
    columns = list(next(iter(spreads.values()), ()))
    print("\n| " + " | ".join([section, *columns]) + " |\n|" + "---|" * (len(columns) + 1))
    for name, row in spreads.items():
        cells = [f"{c['median']:.3g} ({c['min']:.3g} - {c['max']:.3g})" for c in row.values()]
        print("|", name, "|", " | ".join(cells), "|")


def main(argv=None, size=FULL):
    """Measure, print, write; -> exit status."""
    argv = sys.argv[1:] if argv is None else argv
    door = argparse.ArgumentParser(add_help=False)
    door.add_argument("--device", default="cpu", help="cuda: lab/bench_gpu.py, with its own flags")
    door.add_argument("--dry", action="store_true", help="the same tiny, on the CPU")
    here, _ = door.parse_known_args(argv)
    if here.dry or here.device != "cpu":
        from lab import bench_gpu

        return bench_gpu.main(argv)

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[door]
    )
    flag = parser.add_argument
    flag("--json", metavar="FILE", help="write the figures to this file too")
    flag("--repeat", type=int, default=3, help="runs of each way (default %(default)s)")
    choices = [name for section, ways in SECTIONS.items() for name in (section, *ways)]
    flag("--only", nargs="+", choices=choices, help="sections, or ways of them")
    flag("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    if args.child:
        name, folder = args.child
        way = next(ways[name] for ways in SECTIONS.values() if name in ways)
        print(json.dumps(way(Path(folder))))
        return

    machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": 1,
        "load": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        out = {"machine": machine, "workload": build(Path(folder), size)}
        for part in out.values():
            print(", ".join(f"{name} {value}" for name, value in part.items()))
        for section, ways in SECTIONS.items():
            names = [n for n in ways if not args.only or {n, section} & set(args.only)]
            out[section] = measure(Path(folder), names, args.repeat)
            print_section(section, out[section])
    if args.json:
        write_json(args.json, out)


if __name__ == "__main__":
    sys.exit(main())
