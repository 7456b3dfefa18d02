"""Our speed and memory beside the naive way and beside TRL, on CPU (Linux).

    python -m lab.bench [--json FILE] [--repeat N] [--only NAME]          some minutes a repeat

`step`: LoRA DPO steps in float32 of a LLaVA with random weights, about 62 M parameters: pictures of 576 tokens, prompts of about 50
text tokens, answers of about 70, 4 pairs a step, rank 16 on all linear layers of the LLM. All take the same weights, pictures,
tokens and thread count, each in a process of its own:

    ours               the calls of dpo.py's loop: packed rows, answer rows through the fused head, reference log-probs cached
    naive              padded batch of 2B rows, logits of all positions, log_softmax and gather, reference pass in every step (as
                       eric-mitchell/direct-preference-optimization, with transformers' LLaVA and our LoRA)
    trl                TRL's DPOTrainer and a PEFT LoRA; with pictures it cannot cache the reference: adapters off in every step
    ...-checkpointing  the same with gradient checkpointing, which is TRL's default

A step's seconds = (reference pass over the timed pairs + the timed steps, pictures decoded in both) / steps, for one epoch, the
least favourable to a cache; a first step warms up and is left out. Peak = high-water mark of RSS less RSS before the first step:
weights and libraries are left out. Figures are median (min - max) over repeats, which take turns; ratios are taken within a
repeat. Step 0 must give loss ln 2 and all must find the same log-probs of the answers, or the script stops.
The head is 40 % of this LLM's weights, in a 7 B model 2 %: what skipping rows of the head gains is larger here than there.

`head`: log-probs of 140 answer tokens of 1400 rows, V 32000, D 256, forward and backward to the hidden states, head frozen.
"""
import contextlib
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
from types import SimpleNamespace

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

import checkpoints
import data
import dpo
import training
from model import BadInput, LORA_TARGETS, LoRALinear, fused_log_probs

THREADS, RANK, LR, BETA = 1, 16, 1e-4, 0.1  # one thread: the figures then depend least on what else the machine does
STEP = ("ours", "naive", "trl", "ours-checkpointing", "trl-checkpointing")
HEAD = ("fused", "answer-rows", "naive-head", "trl-selective")
VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 336, "patch_size": 14}
LLM = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 32064}
FULL = {"vision": VISION, "llm": LLM, "batch": 4, "steps": 2, "words": 67}
TINY = {"vision": VISION | {"hidden_size": 32, "intermediate_size": 64, "image_size": 28}, "batch": 2, "steps": 1, "words": 6,
        "llm": LLM | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 1024}}  # fmt: skip


def build(folder, size):
    """Write `folder/model` (hub layout), `folder/pairs.json` (POVID layout), pictures and size -> what was made, for the report."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    rng, side, rows = random.Random(0), size["vision"]["image_size"], []
    torch.manual_seed(0)
    words = "a the red green small large cup dog table bowl man tree car stands lies left right of on under beside two and".split()
    write = lambda n: " ".join(rng.choice(words) for _ in range(n)) + "."
    for i in range(size["batch"] * (size["steps"] + 1)):
        pixels = torch.randint(256, (side, side, 3), dtype=torch.uint8)  # of the tower's size: resizing cannot differ
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        ask = {"from": "human", "value": f"<image>\n{write(8)}"}
        good, bad = ([ask, {"from": "gpt", "value": write(size["words"] + rng.randint(-3, 3))}] for _ in range(2))
        rows.append({"id": i, "image": f"{i}.png", "conversations": good, "rejected_conversations": bad})
    training.write_json(folder / "pairs.json", rows)
    training.write_json(folder / "size.json", size)
    bpe, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*special.values()], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([data.TEMPLATES["vicuna_v1"].start + "USER: ASSISTANT: " + " ".join(words)] * 2, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **special).save_pretrained(folder / "llm")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**size["llm"])).save_pretrained(folder / "llm")
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**size["vision"])).save_pretrained(folder / "vision")
    checkpoints.save(*checkpoints.compose(folder / "vision", folder / "llm"), folder / "model")
    model, _, batches = load(folder)
    mean = lambda lengths: round(statistics.mean(lengths))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "image_tokens": int((batches[0][0].prompt == model.image_token_id).sum()),
        "prompt_text_tokens": mean(int((e.prompt != model.image_token_id).sum()) for b in batches for e in b),
        "answer_tokens": mean(len(a) for b in batches for e in b for a in e.answers),
    } | {"pairs_a_step": size["batch"], "timed_steps": size["steps"], "lora_rank": RANK}  # fmt: skip


def load(folder):
    """-> model, processor, batches of examples."""
    model, processor = checkpoints.load(folder / "model")
    examples, B = [processor.encode(r) for r in data.load([folder / "pairs.json"])], json.loads((folder / "size.json").read_text())["batch"]
    return model, processor, [examples[i : i + B] for i in range(0, len(examples), B)]


def high_water():
    """The process's largest RSS, MiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def before_first_step(model=None):
    """RSS in MiB, from which on the high-water mark counts anew."""
    sum(p.sum().item() for p in (model.parameters() if model else ()))  # weights mapped from a file are in memory once touched
    with contextlib.suppress(OSError):  # where the kernel forbids it, the mark stays at that of loading
        Path("/proc/self/clear_refs").write_text("5")
    return high_water()


def train(batches, pair_log_probs, params):
    """DPO steps, the same for ours and naive. pair_log_probs: number of a batch -> policy (B, 2), reference (B, 2)."""
    optimizer = torch.optim.AdamW([{"params": params, "base_lr": LR}], lr=LR, weight_decay=0.0, fused=True)
    ends, losses, first = [], [], None
    for step, examples in enumerate(batches):
        policy, reference = pair_log_probs(step)
        first = policy.tolist() if first is None else first
        loss = dpo.preference_loss(*policy.T, *reference.T, BETA, "dpo")[0].mean()
        loss.backward()
        losses.append(loss.item())
        training.optimizer_step(optimizer, 1.0, losses[-1], [e.record.where for e in examples])
        ends.append(time.perf_counter())
    return {"seconds": (ends[-1] - ends[0]) / (len(ends) - 1), "peak_mib": high_water(), "losses": losses, "log_probs": first}


def ours(folder, checkpointing=False):
    """The calls of dpo.py's loop. Like each of the three -> seconds a step, peak_mib, losses, and log_probs (B, 2) of step 0."""
    model, processor, batches = load(folder)
    base, args = before_first_step(model), SimpleNamespace(batch_size=len(batches[0]))
    reference = [dpo.reference_log_probs(model, processor, batches[0], args)]
    begin = time.perf_counter()
    reference += dpo.reference_log_probs(model, processor, sum(batches[1:], []), args).split(args.batch_size)
    seconds = (time.perf_counter() - begin) / (len(batches) - 1)
    torch.manual_seed(0)
    model.prepare(RANK, projector=False).train(checkpointing)
    if checkpointing:
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})
    score = lambda step: (model.answer_log_probs(processor.collate(batches[step])).view(-1, 2), reference[step])
    result = train(batches, score, list(training.trainable(model).values()))
    return result | {"seconds": result["seconds"] + seconds, "peak_mib": result["peak_mib"] - base}


def naive(folder):
    """What most scripts do."""
    import transformers

    _, processor, batches = load(folder)  # the same tokens and pixels as ours
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
    base, adapters = before_first_step(model.requires_grad_(False)), []
    torch.manual_seed(0)
    for module in list(model.model.language_model.modules()):
        for name, child in [(n, c) for n, c in module.named_children() if n in LORA_TARGETS]:
            adapters.append(LoRALinear(child, RANK, 2 * RANK))
            setattr(module, name, adapters[-1])

    def log_probs(labels, enabled, **inputs):
        for m in adapters:
            m.enabled = enabled
        logits = model(**inputs, use_cache=False).logits[:, :-1]  # (2B, L - 1, V)
        log_p = logits.log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
        return (log_p * (labels[:, 1:] >= 0)).sum(-1).view(2, -1).T  # (B, 2)

    def score(step):
        rows = [(e.prompt, e.answers[k]) for k in (0, 1) for e in batches[step]]
        ids = pad_sequence([torch.cat(row) for row in rows], batch_first=True)
        labels = pad_sequence([torch.cat([p.new_full(p.shape, -1), a]) for p, a in rows], batch_first=True, padding_value=-1)
        there = pad_sequence([torch.ones(len(p) + len(a), dtype=torch.long) for p, a in rows], batch_first=True)
        pixels = torch.stack([processor.pixels(e.record.image) for e in batches[step]] * 2)
        inputs = {"labels": labels, "input_ids": ids, "attention_mask": there, "pixel_values": pixels}
        with torch.no_grad():
            reference = log_probs(enabled=False, **inputs)
        return log_probs(enabled=True, **inputs), reference

    result = train(batches, score, [p for p in model.parameters() if p.requires_grad])
    return result | {"peak_mib": result["peak_mib"] - base}


def trl(folder, checkpointing=False):
    """TRL's trainer as its users call it; its log gives the log-probs of step 0 as means of the batch."""
    import datasets
    import peft
    import transformers
    from trl import DPOConfig, DPOTrainer

    template, batch = data.TEMPLATES["vicuna_v1"], len(load(folder)[2][0])
    rows = [{"prompt": "<s>" + template.start + template.user.replace("{}", "<image>\n" + r.turns[0]), "chosen": f" {r.answers[0]}</s>",
             "rejected": f" {r.answers[1]}</s>", "images": [str(r.image)]} for r in data.load([folder / "pairs.json"])]  # fmt: skip
    ends, clock = [], transformers.TrainerCallback()
    clock.on_step_end = lambda *args, **kwargs: ends.append(time.perf_counter())
    trainer = DPOTrainer(
        transformers.LlavaForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32), callbacks=[clock],
        args=DPOConfig(
            "trl", num_train_epochs=1, per_device_train_batch_size=batch, learning_rate=LR, beta=BETA, bf16=False, max_length=None,
            gradient_checkpointing=checkpointing, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
            train_sampling_strategy="sequential", disable_tqdm=True, dataloader_pin_memory=False),
        train_dataset=datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image())),
        processing_class=transformers.AutoProcessor.from_pretrained(folder / "model"),
        peft_config=peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=rf".*language_model.*\.({'|'.join(LORA_TARGETS)})"),
    )  # fmt: skip
    base = before_first_step(trainer.model)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": (ends[-1] - ends[0]) / (len(ends) - 1), "peak_mib": high_water() - base, "losses": [e["loss"] for e in log],
            "log_probs": [[log[0]["logps/chosen"], log[0]["logps/rejected"]]]}  # fmt: skip


def head(name, calls=4):
    """One way to the log-probs of 140 of 1400 rows -> seconds a call, peak_mib of the first, the sum."""
    if name == "trl-selective":
        from trl.trainer.utils import selective_log_softmax
    torch.manual_seed(0)
    weight, h, targets = torch.randn(32000, 256) * 0.02, torch.randn(1400, 256, requires_grad=True), torch.randint(32000, (1400,))
    rows = torch.cat([torch.arange(630, 700), torch.arange(1330, 1400)])
    plain = lambda h, y: (h @ weight.T).log_softmax(-1).gather(-1, y[:, None])[:, 0]
    log_probs = {
        "fused": lambda: fused_log_probs(h[rows], weight, targets[rows])[0],
        "answer-rows": lambda: plain(h[rows], targets[rows]),
        "naive-head": lambda: plain(h, targets)[rows],
        "trl-selective": lambda: selective_log_softmax(h @ weight.T, targets)[rows],
    }[name]
    base, seconds, peaks = before_first_step(), [], []
    for _ in range(calls):
        begin = time.perf_counter()
        total = log_probs().sum()
        total.backward()
        seconds.append(time.perf_counter() - begin)
        peaks.append(high_water() - base)
    return {"seconds": statistics.median(seconds[1:]), "peak_mib": peaks[0], "sum": total.item()}


def child(name, folder):
    """Run one competitor in this process -> its figures, or {"missing": a sentence}."""
    torch.set_num_threads(THREADS)
    kind, _, checkpointing = name.partition("-")
    try:
        if name in HEAD:
            return head(name)
        return naive(folder) if kind == "naive" else {"ours": ours, "trl": trl}[kind](folder, bool(checkpointing))
    except ImportError as error:
        return {"missing": f"{name} is not measured: {error.name} is not installed (pip install trl peft)."}


def measure(folder, names, repeat):
    """Each competitor `repeat` times, taking turns, in processes of their own -> {name: [figures]}; stops when they disagree."""
    runs = {name: [] for name in names}
    for name in [*names] * repeat:
        with tempfile.TemporaryDirectory() as cwd:  # the reference cache lands there
            command, env = [sys.executable, "-m", "lab.bench", "--child", name, str(folder)], {"PYTHONPATH": str(Path(__file__).parents[1])}
            done = subprocess.run(command, cwd=cwd, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise BadInput(f"{name} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
        runs[name].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {done.stdout.splitlines()[-1]:.150}", file=sys.stderr)
    return runs


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[2], Path(sys.argv[3]))))
