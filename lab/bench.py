"""Our speed and memory beside the naive way and beside TRL, on CPU (Linux).

    python -m lab.bench [--json FILE] [--repeat N] [--only NAME]          some minutes a repeat

`step`: LoRA DPO steps in float32 of a LLaVA with random weights, about 62 M parameters: pictures of 576 tokens, prompts of about 45
text tokens, answers of about 70, 4 pairs a step, rank 16 on all linear layers of the LLM. All take the same weights, pictures,
tokens and one thread, each in a process of its own. Gradient checkpointing, TRL's default, is off for all.
    ours    the calls of dpo.py's loop: packed rows, answer rows through the fused head, reference log-probs cached
    naive   padded batch of 2B rows, logits of all positions, log_softmax and gather, reference pass in every step (as
            eric-mitchell/direct-preference-optimization; transformers' LLaVA, our LoRA)
    trl     DPOTrainer and a PEFT LoRA; with pictures it cannot cache the reference: adapters off in every step
A step's seconds = (reference pass over the timed pairs + the timed steps, pictures decoded in both) / steps, for one epoch, the
least favourable to a cache; a first step warms up and is left out. They are CPU seconds: with one thread those of the clock on an
idle machine, and less changed by other work. Peak = high-water mark of RSS less RSS before the first step, so without weights and
libraries. Figures are median (min - max) over repeats, which take turns; ratios are taken within a repeat. The script stops unless
step 0 gives loss ln 2 and all find the same log-probs of the answers.
The head has 40 % of this LLM's weights, in a 7 B model 2 %: skipping rows of it gains more here than there.

`head`: log-probs of 140 answer tokens of 1400 rows, V 32000, D 256, forward and backward to the hidden states, head frozen.
"""
import argparse
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

import checkpoints
import data
import dpo
import training
from model import LORA_TARGETS, LoRALinear, fused_log_probs

RANK, LR, BETA = 16, 1e-4, 0.1
STEP, HEAD = ("ours", "naive", "trl"), ("fused", "answer-rows", "naive-head", "trl-selective")
VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 336, "patch_size": 14}
LLM = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 32064}
FULL = {"vision": VISION, "llm": LLM, "batch": 4, "steps": 2, "words": 67}
TINY = {"vision": VISION | {"hidden_size": 32, "intermediate_size": 64, "image_size": 28}, "batch": 2, "steps": 2, "words": 6,
        "llm": LLM | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}}  # fmt: skip


def build(folder, size):
    """Write `folder/model` (hub layout), `folder/pairs.json` (POVID layout), pictures and size.json -> what was made, for the report."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

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
    split, system = pre_tokenizers.Whitespace(), data.TEMPLATES["vicuna_v1"].start + "USER: ASSISTANT:"
    vocabulary = dict.fromkeys(["<unk>", "<s>", "</s>", *words, *(word for word, _ in split.pre_tokenize_str(system))])
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = split
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder / "llm")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**size["llm"])).save_pretrained(folder / "llm")
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**size["vision"])).save_pretrained(folder / "vision")
    checkpoints.save(*checkpoints.compose(folder / "vision", folder / "llm"), folder / "model")
    model, _, batches = load(folder)
    prompt, image = batches[0][0].prompt, model.image_token_id
    answers = [len(a) for batch in batches for e in batch for a in e.answers]
    return {"parameters": sum(p.numel() for p in model.parameters()), "image_tokens": int((prompt == image).sum()),
            "prompt_text_tokens": int((prompt != image).sum()), "answer_tokens": statistics.mean(answers),
            "pairs_a_step": size["batch"], "timed_steps": size["steps"], "lora_rank": RANK}  # fmt: skip


def load(folder):
    """-> model, processor, batches of examples."""
    model, processor = checkpoints.load(folder / "model")
    examples = [processor.encode(r) for r in data.load([folder / "pairs.json"])]
    B = json.loads((folder / "size.json").read_text())["batch"]
    return model, processor, [examples[i : i + B] for i in range(0, len(examples), B)]


def high_water():
    """The process's largest RSS, MiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def before_first_step(model):
    """RSS in MiB, from which on the high-water mark counts anew."""
    sum(p.sum().item() for p in model.parameters())  # weights mapped from a file are in memory once touched
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
        ends.append(time.process_time())
    return {"seconds": (ends[-1] - ends[0]) / (len(ends) - 1), "peak_mib": high_water(), "losses": losses, "log_probs": first}


def ours(folder):
    """The calls of dpo.py's loop. Like each of the three -> seconds a step, peak_mib, losses, and log_probs (B, 2) of step 0."""
    model, processor, batches = load(folder)
    base, args = before_first_step(model), argparse.Namespace(batch_size=len(batches[0]))
    reference = [dpo.reference_log_probs(model, processor, batches[0], args)]
    begin = time.process_time()
    reference += dpo.reference_log_probs(model, processor, sum(batches[1:], []), args).split(args.batch_size)
    seconds = (time.process_time() - begin) / (len(batches) - 1)
    torch.manual_seed(0)
    model.prepare(RANK, projector=False).train(False)
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

    def log_probs(enabled, labels, **inputs):
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
            reference = log_probs(False, **inputs)
        return log_probs(True, **inputs), reference

    result = train(batches, score, [p for p in model.parameters() if p.requires_grad])
    return result | {"peak_mib": result["peak_mib"] - base}


def trl(folder):
    """TRL's trainer as its users call it; its log gives the log-probs of step 0 as means of the batch."""
    import datasets
    import peft
    import transformers
    from trl import DPOConfig, DPOTrainer

    template, size = data.TEMPLATES["vicuna_v1"], json.loads((folder / "size.json").read_text())
    rows = [{"prompt": "<s>" + template.start + template.user.replace("{}", "<image>\n" + r.turns[0]), "chosen": f" {r.answers[0]}</s>",
             "rejected": f" {r.answers[1]}</s>", "images": [str(r.image)]} for r in data.load([folder / "pairs.json"])]  # fmt: skip
    ends, clock = [], transformers.TrainerCallback()
    clock.on_step_end = lambda *args, **kwargs: ends.append(time.process_time())
    trainer = DPOTrainer(
        transformers.LlavaForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32), callbacks=[clock],
        args=DPOConfig("trl", num_train_epochs=1, per_device_train_batch_size=size["batch"], learning_rate=LR, beta=BETA, bf16=False,
                       max_length=None, gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
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
    """One way to the log-probs of 140 of 1400 rows -> seconds a call, peak_mib of the first, log_probs: their mean."""
    if name == "trl-selective":
        from trl.trainer.utils import selective_log_softmax
    torch.manual_seed(0)
    w, h, y = torch.randn(32000, 256) * 0.02, torch.randn(1400, 256, requires_grad=True), torch.randint(32000, (1400,))
    rows, seconds, base = torch.cat([torch.arange(630, 700), torch.arange(1330, 1400)]), [], before_first_step(torch.nn.Module())
    for call in range(calls):
        begin = time.process_time()
        if name == "fused":
            log_p = fused_log_probs(h[rows], w, y[rows])[0]
        elif name == "answer-rows":
            log_p = (h[rows] @ w.T).log_softmax(-1).gather(-1, y[rows, None])
        elif name == "naive-head":
            log_p = (h @ w.T).log_softmax(-1).gather(-1, y[:, None])[rows]
        else:
            log_p = selective_log_softmax(h @ w.T, y)[rows]
        log_p.sum().backward()
        seconds.append(time.process_time() - begin)
        peak = high_water() - base if call == 0 else peak
    return {"seconds": statistics.median(seconds[1:]), "peak_mib": peak, "log_probs": [[log_p.mean().item()]]}


def measure(folder, names, repeat):
    """Run each `repeat` times, taking turns, in processes of their own, and compare what they computed -> {name: [figures]}."""
    runs = {name: [] for name in names}
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    for name in [*names] * repeat:
        with tempfile.TemporaryDirectory() as cwd:  # the reference cache lands there
            command = [sys.executable, "-m", "lab.bench", "--child", name, str(folder)]
            done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
        if "ModuleNotFoundError" in done.stderr and name.startswith("trl"):
            print(f"{name} is not measured: {done.stderr.splitlines()[-1]} (pip install trl peft)", file=sys.stderr)
            continue
        if done.returncode:
            raise RuntimeError(f"{name} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
        runs[name].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {done.stdout.splitlines()[-1]:.120}", file=sys.stderr)
        first, mine = (torch.tensor(r[0]["log_probs"]) for r in (next(filter(None, runs.values())), runs[name]))
        apart = ((first.mean(0) if len(mine) == 1 else first) - mine).abs().max()
        if apart > 1e-3 or abs(runs[name][-1].get("losses", [math.log(2)])[0] - math.log(2)) > 1e-4:
            raise RuntimeError(f"{name} computed something else, log-probs {apart:.4f} apart: {runs[name][-1]}")
    return {name: found for name, found in runs.items() if found}


def summary(runs):
    """{name: {figure: {"median", "min", "max"}}}; `..._ratio` is against the first name, within a repeat."""
    first, out = next(iter(runs.values())), {}
    for name, found in runs.items():
        values = {k: [r[k] for r in found] for k in ("seconds", "peak_mib")}
        values |= {f"{k}_ratio": [r[k] / f[k] for r, f in zip(found, first)] for k in ("seconds", "peak_mib")}
        out[name] = {k: {"median": statistics.median(v), "min": min(v), "max": max(v)} for k, v in values.items()}
    return out


def main(argv=None, size=FULL):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", choices=(*STEP, *HEAD, "step", "head"), help="one competitor or one section")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.child:
        name, folder = args.child
        return print(json.dumps(head(name) if name in HEAD else {"ours": ours, "naive": naive, "trl": trl}[name](Path(folder))))
    cpu = next((x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "unknown")
    machine = {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "threads": 1, "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        out = {"machine": machine, "workload": build(Path(folder), size)}
        print(*(", ".join(f"{k} {v}" for k, v in out[part].items()) for part in out), sep="\n")
        for section, names in (("step", STEP), ("head", HEAD)):
            names = [n for n in names if args.only in (None, n, section)]
            out[section] = summary(measure(Path(folder), names, args.repeat)) if names else {}
    figure = lambda v, scale=1: f"{v['median'] * scale:.4g} ({v['min'] * scale:.4g} - {v['max'] * scale:.4g})"
    for section, unit, scale in (("step", "s", 1), ("head", "ms", 1000)):
        print(f"\n| {section} | {unit} | ratio | peak MiB | ratio |\n|---|---|---|---|---|")
        for name, row in out[section].items():
            cells = (row["seconds"], scale), (row["seconds_ratio"],), (row["peak_mib"],), (row["peak_mib_ratio"],)
            print(f"| {name} | {' | '.join(figure(*cell) for cell in cells)} |")
    if args.json:
        training.write_json(args.json, out)


if __name__ == "__main__":
    main()
