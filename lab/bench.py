"""Our speed and memory beside the naive way and beside TRL, on CPU (Linux).

    python -m lab.bench [--json FILE] [--repeat N] [--only NAME]          some minutes a repeat

`step`: LoRA DPO steps in float32 of a LLaVA with random weights, about 62 M parameters: pictures of 576 tokens, prompts of about 45
text tokens, answers of about 70, 4 pairs a step, rank 16 on all linear layers of the LLM. All take the same weights, pictures,
tokens and one thread, each in a process of its own. Gradient checkpointing, TRL's default, is off for all but the last.
    ours    the calls of dpo.py's loop: packed rows, answer rows through the fused head, reference log-probs cached
    naive   padded batch of 2B rows, logits of all positions, log_softmax and gather, reference pass in every step (as
            eric-mitchell/direct-preference-optimization; transformers' LLaVA, our LoRA)
    trl     DPOTrainer and a PEFT LoRA; with pictures it cannot cache the reference: adapters off in every step
    trl-default    the same with gradient checkpointing, as it is without the flag that switches it off
A step's seconds = (reference pass over the timed pairs + the timed steps, pictures decoded in both) / steps, so for one epoch, the
least favourable to a cache; seconds_3_epochs has a third of the reference pass: the fewest epochs of the papers' DPO runs (Amirloo
et al. 3 to 7, Li et al. 3). A first step warms up and is left out. They are CPU seconds: with one thread those of the clock on an
idle machine, and less changed by other work. Peak = high-water mark of RSS less RSS before the first step, so without weights and
libraries. Figures are median (min - max) over repeats, which take turns; ratios are taken within a repeat. The script stops unless
step 0 gives loss ln 2 and all find the same log-probs of the answers.
The head has 40 % of this LLM's multiplications, in a 7 B model 2 %: skipping rows of it gains more here than there.

`head`: log-probs of 140 answer tokens of 1400 rows, V 32000, D 256, forward and backward to the hidden states, head frozen.

`negatives`: BDHS's guided completions of the same pairs' chosen answers, five sentences each, 12 tokens a sentence (greedy, so that
both draw the same); seconds an answer and try. one-prefill: as bdhs.py; prefill-a-sentence: a prompt with its image for each.
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
import training
from common import write_json
from data import TEMPLATES
from formats import checkpoints, layouts
from lora import LORA_TARGETS, LoRALinear
from model import fused_log_probs
from sampling import sample

RANK, LR, BETA = 16, 1e-4, 0.1
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


def build(folder, size):
    """Write `folder/model` (hub layout), `folder/pairs.json` (POVID layout), pictures and size.json -> what was made, for the report."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    rng, side, rows = random.Random(0), size["vision"]["image_size"], []
    torch.manual_seed(0)
    words = "a the red green small large cup dog table bowl man tree car stands lies left right of on under beside two and".split()
    write = lambda n: " ".join(rng.choices(words, k=n)) + "."
    for i in range(size["batch"] * (size["steps"] + 1)):
        pixels = torch.randint(
            256, (side, side, 3), dtype=torch.uint8
        )  # of the tower's size: resizing cannot differ
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        ask = {"from": "human", "value": f"<image>\n{write(8)}"}
        good, bad = (
            [ask, {"from": "gpt", "value": write(size["words"] + rng.randint(-3, 3))}]
            for _ in range(2)
        )
        rows.append(
            {"id": i, "image": f"{i}.png", "conversations": good, "rejected_conversations": bad}
        )
    write_json(folder / "pairs.json", rows)
    write_json(folder / "size.json", size)
    split, system = (
        pre_tokenizers.Whitespace(),
        TEMPLATES["vicuna_v1"].start + "USER: ASSISTANT:",
    )
    vocabulary = dict.fromkeys(
        ["<unk>", "<s>", "</s>", *words, *(word for word, _ in split.pre_tokenize_str(system))]
    )
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = split
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(
        folder / "llm"
    )
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**size["llm"])).save_pretrained(
        folder / "llm"
    )
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**size["vision"])).save_pretrained(
        folder / "vision"
    )
    checkpoints.save(*checkpoints.compose(folder / "vision", folder / "llm"), folder / "model")
    model, processor, batches = load(folder)
    tokens = {
        "image_tokens": processor.image_tokens,
        "prompt_text_tokens": len(batches[0][0].prompt) - processor.image_tokens,
    }
    tokens["answer_tokens"] = statistics.mean(
        len(a) for batch in batches for e in batch for a in e.answers
    )
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        **tokens,
        "pairs_a_step": size["batch"],
        "timed_steps": size["steps"],
    }


def load(folder):
    """-> model, processor, batches of examples."""
    model, processor = checkpoints.load(folder / "model")
    examples = [processor.encode(r) for r in layouts.read(folder / "pairs.json").records]
    B = json.loads((folder / "size.json").read_text())["batch"]
    return model, processor, [examples[i : i + B] for i in range(0, len(examples), B)]


def high_water(model=None):
    """The process's largest RSS, MiB. With a model: RSS now, its weights touched, from which on the mark counts anew."""
    if model is not None:
        sum(
            p.sum().item() for p in model.parameters()
        )  # weights mapped from a file are not in memory before
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def train(batches, pair_log_probs, params, base, reference_seconds=0.0):
    """DPO steps, the same for ours and naive. pair_log_probs: number of a batch -> policy (B, 2), reference (B, 2).

    reference_seconds: what the reference pass over a step's pairs took, where it is not part of the step.
    """
    optimizer = torch.optim.AdamW(
        [{"params": params, "base_lr": LR}], lr=LR, weight_decay=0.0, fused=True
    )
    ends, losses, first = [], [], None
    for step, examples in enumerate(batches):
        policy, reference = pair_log_probs(step)
        first = policy.tolist() if first is None else first
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


def ours(folder):
    """The calls of dpo.py's loop. Like each -> seconds a step (two of them), peak_mib, losses, and log_probs (B, 2) of step 0."""
    model, processor, batches = load(folder)
    base, size = high_water(model), len(batches[0])
    reference = [dpo.reference_log_probs(model, processor, batches[0], size)]
    begin = time.process_time()
    rest = sum(batches[1:], [])
    reference += dpo.reference_log_probs(model, processor, rest, size).split(size)
    seconds = (time.process_time() - begin) / (len(batches) - 1)
    torch.manual_seed(0)
    model.prepare(RANK, projector=False)
    score = lambda step: (
        model.answer_log_probs(processor.collate(batches[step])).view(-1, 2),
        reference[step],
    )
    return train(batches, score, list(training.trainable(model).values()), base, seconds)


def naive(folder):
    """What most scripts do."""
    import transformers

    _, processor, batches = load(folder)  # the same tokens and pixels as ours
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder / "model", dtype=torch.float32
    )
    base, adapters = high_water(model.requires_grad_(False)), []
    torch.manual_seed(0)
    for module in list(model.model.language_model.modules()):
        for name, child in [(n, c) for n, c in module.named_children() if n in LORA_TARGETS]:
            adapters.append(LoRALinear(child, RANK, 2 * RANK))
            setattr(module, name, adapters[-1])

    def log_probs(enabled, labels, **inputs):
        """Of the answers of a batch, (B, 2), with the adapters or without."""
        for m in adapters:
            m.active = "policy" if enabled else None
        logits = model(**inputs, use_cache=False).logits[:, :-1]  # (2B, L - 1, V)
        log_p = logits.log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
        return (log_p * (labels[:, 1:] >= 0)).sum(-1).view(2, -1).T  # (B, 2)

    def score(step):
        """Policy and reference on both answers of a batch."""
        pairs = [(e.prompt, e.answers[k]) for k in (0, 1) for e in batches[step]]
        labels = pad_sequence(
            [torch.cat([torch.full_like(p, -1), a]) for p, a in pairs],
            batch_first=True,
            padding_value=-1,
        )
        ids = pad_sequence([torch.cat(pair) for pair in pairs], batch_first=True, padding_value=-1)
        pixels = torch.stack([processor.pixels(e.record.image) for e in batches[step]] * 2)
        inputs = {
            "labels": labels,
            "input_ids": ids.clamp(min=0),
            "attention_mask": (ids >= 0).long(),
            "pixel_values": pixels,
        }
        with torch.no_grad():
            reference = log_probs(False, **inputs)
        return log_probs(True, **inputs), reference

    return train(batches, score, [p for p in model.parameters() if p.requires_grad], base)


def trl(folder, gradient_checkpointing=False):
    """TRL's trainer as its users call it; its log gives the log-probs of step 0 as means of the batch."""
    import datasets
    import peft
    import transformers
    from trl import DPOConfig, DPOTrainer

    template, size = TEMPLATES["vicuna_v1"], json.loads((folder / "size.json").read_text())
    rows = [
        {
            "prompt": "<s>"
            + template.start
            + template.user.replace("{}", "<image>\n" + r.turns[0]),
            "chosen": f" {r.answers[0]}</s>",
            "rejected": f" {r.answers[1]}</s>",
            "images": [str(r.image)],
        }
        for r in layouts.read(folder / "pairs.json").records
    ]
    ends, clock = [], transformers.TrainerCallback()
    clock.on_step_end = lambda *args, **kwargs: ends.append(time.process_time())
    config = DPOConfig(
        "trl",
        num_train_epochs=1,
        per_device_train_batch_size=size["batch"],
        learning_rate=LR,
        beta=BETA,
        bf16=False,
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
    trainer = DPOTrainer(
        transformers.LlavaForConditionalGeneration.from_pretrained(
            folder / "model", dtype=torch.float32
        ),
        args=config,
        callbacks=[clock],
        train_dataset=datasets.Dataset.from_list(rows).cast_column(
            "images", datasets.List(datasets.Image())
        ),
        processing_class=transformers.AutoProcessor.from_pretrained(folder / "model"),
        peft_config=peft.LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=rf".*language_model.*\.({'|'.join(LORA_TARGETS)})",
        ),
    )
    base = high_water(trainer.model)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    return {
        "seconds": seconds,
        "seconds_3_epochs": seconds,
        "peak_mib": high_water() - base,
        "losses": [e["loss"] for e in log],
        "log_probs": [[log[0]["logps/chosen"], log[0]["logps/rejected"]]],
    }


def head(name, _):
    """One way to the log-probs of 140 of 1400 rows -> seconds a call after the first, peak_mib, log_probs: their mean."""
    if name == "trl-selective":
        from trl.trainer.utils import selective_log_softmax
    torch.manual_seed(0)
    w, h, y = (
        torch.randn(32000, 256) * 0.02,
        torch.randn(1400, 256, requires_grad=True),
        torch.randint(32000, (1400,)),
    )
    rows, ends, base = (
        torch.cat([torch.arange(630, 700), torch.arange(1330, 1400)]),
        [],
        high_water(torch.nn.Module()),
    )
    plain = lambda h, y: (h @ w.T).log_softmax(-1).gather(-1, y[:, None])
    for _ in range(4):
        log_p = {
            "fused": lambda: fused_log_probs(h[rows], w, y[rows])[0],
            "answer-rows": lambda: plain(h[rows], y[rows]),
            "naive-head": lambda: plain(h, y)[rows],
            "trl-selective": lambda: selective_log_softmax(h @ w.T, y)[rows],
        }[name]()
        log_p.sum().backward()
        ends.append(time.process_time())
    return {
        "seconds": (ends[-1] - ends[0]) / 3,
        "peak_mib": high_water() - base,
        "log_probs": [[log_p.mean().item()]],
    }


def negatives(name, folder):
    """The ends of five sentences of each of a batch of answers -> seconds an answer after the first batch, peak_mib, log_probs."""
    model, processor, batches = load(folder)
    ends, base = [], high_water(model)
    for examples in batches:
        prompts, (pixels, _) = [e.prompt for e in examples], processor.images(examples)
        cuts = [[len(e.answers[0]) * (2 * i + 1) // 10 for i in range(5)] for e in examples]
        if name == "one-prefill":
            given = [[(e.answers[0], cut)] for e, cut in zip(examples, cuts)]
            samples = sample(model, prompts, pixels, 1, 12, 0, given=given)
        else:
            prompts = [
                torch.cat([e.prompt, e.answers[0][:c]])
                for e, cut in zip(examples, cuts)
                for c in cut
            ]
            samples = sample(model, prompts, pixels.repeat_interleave(5, 0), 1, 12, 0)
        mean = torch.stack([log_p.sum() for answer in samples.log_probs for log_p in answer]).mean()
        ends.append(time.process_time())
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1) / len(batches[0])
    return {"seconds": seconds, "peak_mib": high_water() - base, "log_probs": [[mean.item()]]}


SECTIONS = {
    "step": {
        "ours": ours,
        "naive": naive,
        "trl": trl,
        "trl-default": functools.partial(trl, gradient_checkpointing=True),
    },
    "head": {
        n: functools.partial(head, n)
        for n in ("fused", "answer-rows", "naive-head", "trl-selective")
    },
    "negatives": {
        n: functools.partial(negatives, n) for n in ("one-prefill", "prefill-a-sentence")
    },
}


def measure(folder, names, repeat):
    """Run each `repeat` times, taking turns, in processes of their own; compare what they computed -> {name: {figure: spread}}.

    A spread is {"median", "min", "max"}; `..._ratio` is against the first name.
    """
    runs = {name: [] for name in names}
    for name in [*names] * repeat:
        with tempfile.TemporaryDirectory() as cwd:  # the reference cache lands there
            command, env = (
                [sys.executable, "-m", "lab.bench", "--child", name, str(folder)],
                {"PYTHONPATH": str(Path(__file__).parents[1])},
            )
            done = subprocess.run(
                command, cwd=cwd, env=os.environ | env, capture_output=True, text=True
            )
        if "ModuleNotFoundError" in done.stderr and name.startswith("trl"):
            print(
                f"{name} is not measured: {done.stderr.splitlines()[-1]} (pip install trl peft)",
                file=sys.stderr,
            )
            continue
        if done.returncode:
            raise RuntimeError(
                f"{name} ended with status {done.returncode}:\n{done.stderr[-2000:]}"
            )
        runs[name].append(found := json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {done.stdout.splitlines()[-1]:.120}", file=sys.stderr)
        first, mine = (
            torch.tensor(r["log_probs"]) for r in (next(filter(None, runs.values()))[0], found)
        )
        apart = ((first.mean(0) if len(mine) == 1 else first) - mine).abs().max()
        if (
            not apart <= 1e-3
            or not abs(found.get("losses", [math.log(2)])[0] - math.log(2)) <= 1e-4
        ):
            raise RuntimeError(
                f"{name} computed something else, log-probs {apart:.4f} apart: {found}"
            )
    out, first = {}, next(filter(None, runs.values()), None)
    for name, found in runs.items():
        if found:
            kinds = [k for k in found[0] if k not in ("losses", "log_probs")]
            values = {k: [r[k] for r in found] for k in kinds}
            values |= {f"{k}_ratio": [r[k] / f[k] for r, f in zip(found, first)] for k in kinds}
            out[name] = {
                k: {"median": statistics.median(v), "min": min(v), "max": max(v)}
                for k, v in values.items()
            }
    return out


def main(argv=None, size=FULL):
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument(
        "--repeat", type=int, default=3, help="times that each is run (default %(default)s)"
    )
    parser.add_argument(
        "--only",
        choices=[n for k, v in SECTIONS.items() for n in (k, *v)],
        help="one section or one of its rows",
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.child:
        name, folder = args.child
        return print(
            json.dumps(next(v[name] for v in SECTIONS.values() if name in v)(Path(folder)))
        )
    cpu = next(
        (
            x.split(":")[1].strip()
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in x
        ),
        "unknown",
    )
    out = {
        "machine": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "threads": 1,
            "load": os.getloadavg()[0],
        }
    }
    with tempfile.TemporaryDirectory() as folder:
        out["workload"] = build(Path(folder), size)
        print(*(", ".join(f"{k} {v}" for k, v in part.items()) for part in out.values()), sep="\n")
        for section, names in SECTIONS.items():
            out[section] = measure(
                Path(folder), [n for n in names if args.only in (None, n, section)], args.repeat
            )
            columns = list(next(iter(out[section].values()), ()))
            print("\n| " + " | ".join([section, *columns]) + " |\n|" + "---|" * (len(columns) + 1))
            for name, row in out[section].items():
                cells = (
                    f"{c['median']:.3g} ({c['min']:.3g} - {c['max']:.3g})" for c in row.values()
                )
                print("|", name, "|", " | ".join(cells), "|")
    if args.json:
        write_json(args.json, out)


if __name__ == "__main__":
    main()
