"""Seconds and memory at the real shapes, LLaVA-1.5-7B and LLaVA-NeXT-7B, on one GPU.

    python -m lab.bench --device cuda [--json FILE] [--only NAME ...] [--seconds N]
    python -m lab.bench --dry                              every cell once, tiny, on the CPU

On an 80 GB card the cells take under eight minutes. The most valuable come first, each is written
to --json as soon as it is measured, and a cell is skipped that stands there already, measured on
this card with these versions and this code. So a run may be stopped at any time and started again.

A file of its own: lab/bench.py compares processes by CPU seconds and resident memory, at a size
that a CPU can do; here one process holds one model of 7 B, a cell is one thing that it does, and
clock and memory are the GPU's. The figures of one are not those of the other.

The model: random weights in bfloat16, made on the device: a Llama of 32 layers, CLIP ViT-L/14 at
336 pixels, LoRA of rank 128 on all linear layers of the LLM and the projector, both training in
float32, as dpo.py's defaults. One pair: a prompt of 45 text tokens and a picture (1.5: 576 tokens;
NeXT: 2340, a photograph of 640 x 480), two answers of 100 tokens. Pictures are decoded before: a
run's data loading is not in these figures.

Cells, by what their names begin with; b4 = 4 pairs (or prompts) at a time, the words behind it say
in what they differ, r16 a LoRA of rank 16, nf4 a base in 4 bits (nf4.py):
    step/       a DPO step as dpo.py's loop takes it, batch to the device, forward, backward, clip,
                AdamW; `checkpointing`: with --gradient-checkpointing; `dense`: the attention of the
                prompt also under the mask
    reference/  log pi_ref of the pairs, which dpo.py computes once for a whole run
    trl/        the step of TRL's DPOTrainer, a reference pass included, on the same weights and
                rows: lab/bench_trl.py. Its best setting; `default`: as it is without flags, with
                gradient checkpointing. `apart`: its mean log-probs of an answer against ours
    naive/      the step as most scripts take it: padded batch of 2 B rows with its own image each,
                logits of all positions in float32, and the reference (adapters off) in every step;
                our model's parts, LoRA and optimizer. `apart`: the largest difference of its
                log-probs of an answer from ours, both bfloat16
    attention/  one layer's attention of the rows of a step, forward and backward, in each of the
                ways of lab/bench_attention.py; `unequal`: prompts and answers of other lengths in
                each row. `cosine`: of its gradients with those of the dense mask in float32
    sample/     128 tokens of each prompt, LoRA beside the weights; t0 greedy, t1 temperature 1, k4
                four answers to a prompt; prefill and the recording of a step (`sampling.Recorded`)
                included; `generate`: transformers' own loop on the same model
    ppo/        an iteration of ppo.py by part, without its text: 128 tokens of each prompt; scores
                of a reward model; log-probs of reference and policy, and values; two passes of
                updates of policy and value network. Ranks as ppo.py's defaults
    grpo/       an iteration of grpo.py without its text: 8 answers of 64 tokens to each prompt, a
                random reward, one update, no KL; `sample_seconds`, `update_seconds`. `trl`: the step
                of TRL's GRPOTrainer on the same weights, with transformers' sampling, 8 rows a
                forward pass; it also decodes its pictures. `default`: with gradient checkpointing
    negative/   BDHS's guided completions: five sentences of each of the answers at once, 99 % of
                the picture hidden, 24 tokens a sentence; `plain`: a prompt with its picture for
                each sentence
    head/       log-probs of 280 answer tokens and the gradient to their hidden states, head frozen:
                `fused`; `answer-rows`: log_softmax of those rows; `all-rows`: of a padded batch of
                4 pairs, all positions
    card/       what the GPU can do: a product of bfloat16 matrices of 8192, a copy of 4 GiB
    tests/      `python -m pytest tests --device cuda`: how many passed
    toy/        `python dpo.py` on the card: its figures before and after

Figures: `seconds`, median (min - max) over 5 runs after 2 to warm up (grpo/: 3
after 1; sample/ and negative/: 2 after 1; ppo/, tests/, toy/: one), the device idle before and after each. `peak_gib`: most memory
that tensors held, weights included; `reserved_gib`: what the allocator had taken for that, near
what nvidia-smi shows; `held_gib`: held before the cell. `tokens_a_second`: new tokens of the whole batch. A cell that runs out of memory
says "does not fit", which is a figure too; one that fails says why, and the exit status is 1.

`flop_share` of a step: operations of the model that the step needs (`step_flops`) a second, as a
share of the bfloat16 matrix rate that card/matmul finds on the same card.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import transformers

import bdhs
import dpo
import grouping
import grpo
import memory
import model as modelling
import nf4
import ppo
import sampling
import training
from attention import attention_mask
from common import write_json
from data import Example
from formats.anyres import AnyRes
from lab import bench_attention, bench_trl
from lora import add_adapter
from model import MLLM, Projector, fused_log_probs, pack

ROOT = Path(__file__).parents[1]
BETA, LR = 0.1, 1e-6
SHAPES = {
    "7b": {
        "vision": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
        "llm": {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
        },
        "pinpoints": ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
        "picture": (480, 640),
        "rank": 128,
        "text": 45,
        "answer": 100,
        "new": 128,
        "group": (8, 64),
        "completion": 24,
        "head": (280, 5768),
        "matrix": 8192,
        "copy": 2**31,
        "unequal": (40, 60),
        "tests": ["tests"],
        "toy": [],
    },
    "tiny": {
        "vision": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        },
        "llm": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 128,
        },
        "pinpoints": ((28, 56), (56, 28), (56, 56)),
        "picture": (30, 50),
        "rank": 2,
        "text": 15,
        "answer": 10,
        "new": 6,
        "group": (3, 4),
        "completion": 3,
        "head": (28, 60),
        "matrix": 64,
        "copy": 2**10,
        "unequal": (3, 4),
        "tests": ["tests/test_device.py", "-k", "tiles"],
        "toy": ["--steps", "1", "--no-eval"],
    },
}


class Bench:
    """The model on the device, made at the first use, and what the cells do with it."""

    def __init__(self, shape, device):
        self.shape, self.device, self.models = shape, torch.device(device), {}
        if self.device.index is not None:
            torch.cuda.set_device(self.device)
        self.made = None  # rank and nf4 of the model in memory
        self.rank, self.nf4 = shape["rank"], False  # what the next cell asks for
        self.once = False  # for --dry
        self.rate = None  # bfloat16 operations a second of a matrix product
        torch.backends.cuda.enable_cudnn_sdp(False)  # as attention.py

    # ---- model and batches

    def parts(self, device):
        """A tower, a projector and an LLM with random weights in bfloat16."""
        vision = transformers.CLIPVisionConfig(**self.shape["vision"])
        llm = transformers.LlamaConfig(**self.shape["llm"], pad_token_id=0)
        with torch.device(device), default_dtype(torch.bfloat16):
            return (
                transformers.CLIPVisionModel(vision),
                Projector(vision.hidden_size, llm.hidden_size),
                transformers.LlamaForCausalLM(llm),
            )

    def model(self, kind):
        """The model as "1.5" or as "next": the same tower, projector and LLM, with tiles or without."""
        if not self.models or self.made != (self.rank, self.nf4):
            self.models, self.made = {}, (self.rank, self.nf4)
            self.free()
            torch.manual_seed(0)
            vision, _, llm = parts = self.parts(self.device)
            if self.nf4:
                nf4.quantise_linears(llm)
            image, side = llm.config.vocab_size - 1, vision.config.image_size
            anyres = AnyRes(self.shape["pinpoints"], side, side // vision.config.patch_size)
            square, tiled = MLLM(*parts, image), MLLM(*parts, image, anyres=anyres)
            square.prepare(self.rank)
            tiled.initial_projector = square.initial_projector
            tiled.image_newline.requires_grad_(False)
            with torch.no_grad():  # away from 0: a product with zeros can be faster
                for p in training.trainable(square).values():
                    p.add_(torch.randn_like(p), alpha=1e-3)
            self.models = {"1.5": square, "next": tiled}
        return self.models[kind]

    def prompts(self, kind, n):
        """n prompts of random text around a picture, its pixels, and `image_sizes`."""
        model, text, side = (
            self.model(kind),
            self.shape["text"],
            self.shape["vision"]["image_size"],
        )
        size, patches = self.shape["picture"], side // self.shape["vision"]["patch_size"]
        tiles, tokens, sizes = 1, patches**2, None
        if model.anyres:
            tiles, tokens = 1 + math.prod(model.anyres.grid(size)), model.anyres.tokens(size)
            sizes = torch.tensor([size] * n)
        words = lambda count: torch.randint(3, model.image_token_id, (count,))
        picture = torch.full((tokens,), model.image_token_id)
        rows = [torch.cat([words(text - 10), picture, words(10)]) for _ in range(n)]
        return rows, torch.randn(n * tiles, 3, side, side), sizes

    def answers(self, n, k):
        """k random answers to each of n prompts."""
        high, length = self.shape["llm"]["vocab_size"] - 1, self.shape["answer"]
        return [[torch.randint(3, high, (length,)) for _ in range(k)] for _ in range(n)]

    def pairs(self, kind, n):
        """A batch as Processor.collate gives it, on the CPU."""
        rows, pixels, sizes = self.prompts(kind, n)
        return pack(rows, self.answers(n, 2), None, pixels, image_sizes=sizes)

    def optimizer(self, model):
        """AdamW as the scripts use it."""
        return training.optimizer_for(model, LR, LR)

    # ---- cells: each sets up what is not timed, and measures

    def step(self, kind, n, how=None):
        """DPO as dpo.py's loop."""
        model, batch = self.model(kind), self.pairs(kind, n)
        optimizer, reference = self.optimizer(model), torch.zeros(2, n, device=self.device)

        def run():
            """What is timed."""
            chosen, rejected = model.answer_log_probs(batch.to(self.device)).view(-1, 2).T
            losses, *_ = dpo.dpo_loss(chosen, rejected, *reference, BETA)
            loss = losses.sum() / n
            loss.backward()
            training.clip_gradients(optimizer, max_norm=1.0)
            training.check_finite(loss.item(), 0.0, [])
            training.take_step(optimizer, 1.0)

        with checkpointing(model, how == "checkpointing"), dense_attention(how == "dense"):
            figures = {"tokens": batch.input_ids.numel()} | self.measure(run)
        if self.rate is None:
            self.rate = self.card("matmul")["tflop_a_second"]
        figures["counted_gib"] = self.counted(batch, how == "checkpointing")
        figures["flop"] = step_flops(model, batch)
        figures["flop_share"] = figures["flop"] / figures["seconds"][0] / 1e12 / self.rate
        return figures

    def counted(self, batch, checkpointing):
        """What memory.py counts for a step, GiB."""
        args = SimpleNamespace(
            lr=LR,
            projector_lr=LR,
            lora_rank=self.rank,
            gradient_checkpointing=checkpointing,
            grad_accum=1,
            quantize="nf4" if self.nf4 else None,
        )
        model = MLLM(*self.parts("meta"), self.shape["llm"]["vocab_size"] - 1)
        n, length = batch.input_ids.shape
        prompt, tiles = int((batch.segments == 0).sum(1).max()), len(batch.pixel_values) // n
        load = memory.Load(n, length, prompt, len(batch.targets) // n, tiles)
        return sum(memory.training(model, args, load).values()) / memory.GIB

    def reference(self, kind, n):
        """The pass that dpo.py makes once, adapters beside the base as there."""
        model, batch = self.model(kind), self.pairs(kind, n)

        @torch.no_grad()
        def run():
            """What is timed."""
            model.answer_log_probs(batch.to(self.device)).cpu()

        return {"tokens": batch.input_ids.numel()} | self.measure(run)

    def trl(self, kind, n, how="best"):
        """TRL's step, best or default. Our LoRA and optimizer make room for its own."""
        for name in ("trl", "peft", "datasets"):
            if importlib.util.find_spec(name) is None:
                return {"absent": f"{name} is not installed"}
        versions = {name: importlib.metadata.version(name) for name in ("trl", "peft")}
        model, (rows, pixels, sizes) = self.model(kind), self.prompts(kind, n)
        answers = self.answers(n, 2)
        batch = pack(rows, answers, None, pixels, image_sizes=sizes).to(self.device)
        with torch.no_grad(), model.reference():
            ours = model.answer_log_probs(batch).view(n, 2).mean(0)
        hub, batch = bench_trl.hub_model(model), bench_trl.padded(rows, answers, pixels, sizes)
        del model
        self.models = {}
        self.free()

        seconds = []
        with tempfile.TemporaryDirectory() as folder:

            def run():
                """What is timed, by the trainer's own callback: a step."""
                count = 2 if self.once else 7
                steps, theirs = bench_trl.steps(
                    hub, batch, self.rank, LR, BETA, how == "default", count, self.device, folder
                )
                seconds.extend([*steps[count // 3 :], theirs])

            memory = self.measure(run, warm=0, timed=1)
        *seconds, theirs = seconds
        apart = (ours.cpu() - torch.tensor(theirs)).abs().max().item()
        spread = (statistics.median(seconds), min(seconds), max(seconds))
        return {"apart": apart} | memory | {"seconds": spread} | versions

    def naive(self, kind, n, how=None):
        """Padded rows, an image each, logits of all positions, the reference in every step."""
        model, (rows, pixels, sizes) = self.model(kind), self.prompts(kind, n)
        answers, optimizer = self.answers(n, 2), self.optimizer(model)
        texts = [torch.cat([rows[b], answers[b][k]]) for k in (0, 1) for b in range(n)]
        ids = torch.stack(texts).to(self.device)  # all of one length here
        scored = torch.arange(ids.shape[1] - 1, device=self.device) >= len(rows[0]) - 1
        twice = None if sizes is None else sizes.repeat(2, 1)

        def log_probs():
            """Of the answers, (B, 2)."""
            x = model.embed(ids, torch.cat([pixels] * 2).to(self.device), twice)
            with model.autocast():
                out = model.llm(
                    inputs_embeds=x.to(model.dtype),
                    attention_mask=torch.ones_like(ids),
                    use_cache=False,
                )
            log_p = out.logits[:, :-1].float().log_softmax(-1)  # (2B, L - 1, V)
            log_p = log_p.gather(-1, ids[:, 1:, None])[..., 0]
            return (log_p * scored).sum(-1).view(2, n).T

        def run():
            """What is timed."""
            with torch.no_grad(), model.reference():
                reference = log_probs()
            losses, *_ = dpo.dpo_loss(*log_probs().T, *reference.T, BETA)
            loss = losses.sum() / n
            loss.backward()
            training.clip_gradients(optimizer, max_norm=1.0)
            training.check_finite(loss.item(), 0.0, [])
            training.take_step(optimizer, 1.0)

        with torch.no_grad():
            batch = pack(rows, answers, None, pixels, image_sizes=sizes).to(self.device)
            apart = (model.answer_log_probs(batch).view(n, 2) - log_probs()).abs().max().item()
        with checkpointing(model, how == "checkpointing"):
            return {"apart": apart} | self.measure(run)

    def attention(self, kind, n, how, lengths="equal"):
        """One layer, forward and backward, as queries, keys and values come from the model."""
        text, answer, P = self.shape["text"], self.shape["answer"], len(self.prompts(kind, 1)[0][0])
        rows = [[P, answer, answer] for _ in range(n)]
        if lengths == "unequal":
            less = lambda most: int(torch.randint(most, ()))
            prompt, short = self.shape["unequal"]
            rows = [[P - less(min(prompt, text)), answer - less(short), answer] for _ in rows]
        heads = self.shape["llm"]["num_attention_heads"]
        size = (n, max(map(sum, rows)), heads, self.shape["llm"]["hidden_size"] // heads)
        new = {"device": self.device, "dtype": torch.bfloat16}
        inputs = [torch.randn(size, **new).transpose(1, 2).requires_grad_() for _ in range(3)]
        grad = torch.randn(size, **new).transpose(1, 2)
        real = bench_attention.segments_of(rows, self.device)[:, None, :, None] >= 0
        way = bench_attention.WAYS[how](rows, self.device)

        def gradients(way, inputs):
            """Of the output's product with a constant."""
            return torch.autograd.grad((way(*inputs) * (grad * real)).sum(), inputs)

        got = torch.cat([g.flatten() for g in gradients(way, inputs)]).float()
        exact = bench_attention.dense(rows, self.device)
        want = gradients(exact, [x.detach().float().requires_grad_() for x in inputs])
        want = torch.cat([g.flatten() for g in want])
        cosine = torch.cosine_similarity(got, want, dim=0).item()
        del got, want
        return {"cosine": cosine} | self.measure(lambda: gradients(way, inputs), 3, 20)

    def sample(self, kind, n, how, many="k1"):
        """New tokens, none of which ends an answer."""
        model, (rows, pixels, sizes) = self.model(kind), self.prompts(kind, n)
        new, k = self.shape["new"], int(many.removeprefix("k"))

        def ours():
            """Our sampling."""
            temperature = 0.0 if how == "t0" else 1.0
            sampling.sample(model, rows, pixels, k, new, temperature, image_sizes=sizes)

        @torch.no_grad()
        def generate():
            """transformers' own sampling."""
            x = model.embed(torch.stack(rows).to(self.device), pixels.to(self.device), sizes)
            settings = {"do_sample": k > 1, "num_return_sequences": k, "pad_token_id": 0}
            model.llm.generate(
                inputs_embeds=x.to(model.dtype),
                attention_mask=torch.ones(x.shape[:2], dtype=torch.long, device=self.device),
                generation_config=transformers.GenerationConfig(
                    max_new_tokens=new, min_new_tokens=new, **settings
                ),
            )

        figures = self.measure(generate if how == "generate" else ours, warm=1, timed=2)
        return figures | {"tokens_a_second": n * k * new / figures["seconds"][0]}

    def ppo(self, kind, n):
        """An iteration over n prompts, four at a time, two minibatches, by part."""
        model, (rows, pixels, sizes) = self.model(kind), self.prompts(kind, n)
        flags = ["--model", "", "--data", "", "--reward-model", "", "--lora-rank", self.rank]
        flags += ["--batch-size", min(4, n // 2), "--grad-accum", max(1, n // 8)]
        flags += ["--max-new-tokens", self.shape["new"]]
        with mock.patch.object(sys, "argv", ["ppo.py", *map(str, flags)]):
            args = ppo.parse()
        args.samples = ppo.SAMPLES[args.advantage]

        # the networks, as ppo.py's main; what is added here is gone with the model
        model.projector.requires_grad_(False)
        for name in ("reward", "value"):
            add_adapter(model.llm, name, self.rank)
            model.add_head(name)
        for p in [*model.parameters_of("reward"), *model.heads["reward"].parameters()]:
            p.requires_grad_(False)
        model.train()
        optimizer = training.optimizer_for(model, args.lr, 0.0)
        pictures = Pictures(pixels.unflatten(0, (n, -1)), sizes)
        record = SimpleNamespace(where="a row of random numbers", image=None)
        prompts = [Prompt(row, [], [], record, number) for number, row in enumerate(rows)]
        clock, parts = training.Clock(), {}

        def lap(name):
            """Seconds since the last part."""
            self.synchronize()
            parts[f"{name}_seconds"] = clock.lap(name)

        @torch.no_grad()
        def rewards(rollout):
            """As `Reward.by_reward_model`, on the answers as they are."""
            scores = []
            for part in training.chunks(rollout.examples, args.batch_size):
                batch = pictures.collate(part).to(self.device)
                with model.use("reward"):
                    scores.append(model.values(batch, batch.last, "reward"))
            return torch.cat(scores)

        def run():
            """What is timed."""
            lap("setup")
            rollout = ppo.draw_rollout(model, pictures, prompts, args, 0)
            lap("sample")
            scores = rewards(rollout)
            lap("reward")
            rollout = ppo.with_reference_and_values(model, pictures, rollout, args)
            lap("reference_and_values")
            kl = ppo.kl_of(rollout.log_probs, rollout.reference, args.kl)
            rollout = ppo.with_advantages(rollout, scores, kl, args)
            ppo.update(model, pictures, optimizer, 1.0, rollout, args, 0)
            lap("update")

        figures = self.measure(run, warm=0, timed=1)
        self.models = {}  # it has adapters that no other cell has
        del parts["setup_seconds"]
        return figures | parts

    def grpo(self, kind, n, how="ours", setting="best"):
        """An iteration over n prompts."""
        G, new = self.shape["group"]
        if how == "trl":
            return self.grpo_trl(kind, n, G, new, setting == "default")
        model, (rows, pixels, sizes) = self.model(kind), self.prompts(kind, n)
        flags = ["--model", "", "--data", "", "--lora-rank", self.rank, "--batch-size", n]
        flags += ["--group-size", G, "--max-new-tokens", new, "--kl-coef", 0]
        with mock.patch.object(sys, "argv", ["grpo.py", *map(str, flags)]):
            args = grpo.parse()
        knobs = grpo.VARIANTS[args.variant]
        model.projector.requires_grad_(False)
        model.train()
        optimizer = training.optimizer_for(model, args.lr, 0.0)
        pictures = Pictures(pixels.unflatten(0, (n, -1)), sizes)
        record = SimpleNamespace(where="a row of random numbers", image=None)
        prompts = [Prompt(row, [], [], record, number) for number, row in enumerate(rows)]
        clock, parts = training.Clock(), {}

        def lap(name):
            """Seconds since the last part."""
            self.synchronize()
            parts[f"{name}_seconds"] = clock.lap(name)

        def run():
            """What is timed."""
            lap("setup")
            groups = grouping.draw(model, pictures, prompts, range(n), args, 0)
            lap("sample")
            for group in groups:
                group.terms = {"exact": torch.rand(G).tolist()}
                group.advantages = grpo.advantages(group.rewards, knobs.by_std)
            grpo.update(model, pictures, optimizer, 1.0, groups, prompts, knobs, args)
            lap("update")

        figures = self.measure(run, warm=1, timed=3)
        model.projector.requires_grad_(True)
        model.eval()
        del parts["setup_seconds"]
        return figures | parts

    def grpo_trl(self, kind, n, G, new, default):
        """TRL's iteration over n prompts. Our LoRA makes room for its own."""
        for name in ("trl", "peft", "datasets"):
            if importlib.util.find_spec(name) is None:
                return {"absent": f"{name} is not installed"}
        versions = {name: importlib.metadata.version(name) for name in ("trl", "peft")}
        hub = bench_trl.hub_model(self.model(kind))
        self.models = {}
        self.free()
        seconds, count = [], 2 if self.once else 4
        with tempfile.TemporaryDirectory() as folder:

            def run():
                """What is timed, by the trainer's own callback: a step."""
                how = (n, G, new, self.shape["text"], self.rank, LR, default, count)
                seconds.extend(bench_trl.grpo_steps(hub, *how, self.device, folder)[1:])

            memory = self.measure(run, warm=0, timed=1)
        spread = (statistics.median(seconds), min(seconds), max(seconds))
        return memory | {"seconds": spread} | versions

    def negative(self, kind, n, how=None):
        """Guided completions; cut in the middle of each of five sentences."""
        model, (rows, pixels, sizes) = self.model(kind), self.prompts(kind, n)
        answers, new = [row[0] for row in self.answers(n, 1)], self.shape["completion"]
        cuts = [len(answers[0]) * (2 * i + 1) // 10 for i in range(5)]
        generator = torch.Generator().manual_seed(0)
        tokens = int((rows[0] == model.image_token_id).sum())
        rho = bdhs.default_rho(tokens)
        if how == "plain":
            rows = [torch.cat([r, a[:c]]) for r, a in zip(rows, answers) for c in cuts]
            tiles = pixels.unflatten(0, (n, -1)).repeat_interleave(5, 0)
            pixels, sizes = tiles.flatten(0, 1), sizes if sizes is None else sizes.repeat(5, 1)
        given = None if how == "plain" else [[(a, cuts)] for a in answers]
        mask = bdhs.image_mask(rows, model.image_token_id, rho, generator)

        def run():
            """What is timed."""
            draw = {"masked": mask, "given": given, "image_sizes": sizes}
            sampling.sample(model, rows, pixels, 1, new, 1.0, **draw)

        figures = self.measure(run, warm=1, timed=2)
        return figures | {"seconds_an_answer": figures["seconds"][0] / n}

    def head(self, how):
        """Forward and backward to the hidden states."""
        few, many = self.shape["head"]
        D, V = (self.shape["llm"][name] for name in ("hidden_size", "vocab_size"))
        new = {"device": self.device, "dtype": torch.bfloat16}
        weight, h = torch.randn(V, D, **new) * 0.02, torch.randn(many, D, **new)
        targets = torch.randint(V, (many,), device=self.device)
        rows = slice(None) if how == "all-rows" else slice(0, few)
        h, targets = h[rows].clone().requires_grad_(), targets[rows]

        def run():
            """What is timed."""
            h.grad = None
            if how == "fused":
                log_p, _ = fused_log_probs(h, weight, targets)
            else:
                log_p = (h @ weight.t()).float().log_softmax(-1).gather(-1, targets[:, None])
            log_p[:few].sum().backward()

        return self.measure(run, 10, 30)

    def card(self, what):
        """The ceilings."""
        if what == "matmul":
            n = self.shape["matrix"]
            a, b = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(2))
            figures = self.measure(lambda: a @ b, 5, 20)
            return figures | {"tflop_a_second": 2 * n**3 / figures["seconds"][0] / 1e12}
        source = torch.randn(self.shape["copy"], device=self.device, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        figures = self.measure(lambda: target.copy_(source), 5, 20)
        return figures | {"gb_a_second": 2 * source.nbytes / figures["seconds"][0] / 1e9}

    def tests(self, _):
        """The tests that depend on the device, in a process of their own."""
        flags = [*self.shape["tests"], "--device", str(self.device)]
        done, seconds = self.command("-m", "pytest", "-q", *flags)
        said = done.stdout.splitlines()[-1] if done.stdout else done.stderr[-200:]
        if done.returncode:
            raise RuntimeError(said)
        passed = int(re.search(r"(\d+) passed", said)[1])
        return {"seconds": (seconds,) * 3, "passed": passed}

    def toy(self, _):
        """dpo.py's toy experiment in a process of its own."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            flags = ["--device", str(self.device), "--out", str(out), *self.shape["toy"]]
            done, seconds = self.command("dpo.py", *flags)
            if done.returncode:
                raise RuntimeError(done.stderr[-200:])
            summary = json.loads((out / "summary.json").read_text())
        figures = {"seconds": (seconds,) * 3, "train_seconds": summary["seconds"]["train"]}
        for when in ("before", "after"):
            for name in ("chair_s", "recall") if summary.get(when) else ():
                figures[f"{name}_{when}"] = summary[when]["chair"][name]
        return figures

    # ---- measuring

    def command(self, *arguments):
        """Run this Python in the project's folder -> what it did, seconds."""
        begin = time.perf_counter()
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done, time.perf_counter() - begin

    def synchronize(self):
        """Wait until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self, run, warm=2, timed=5):
        """-> seconds (median, min, max) of some runs, and memory from the first one on."""
        if self.once:
            warm, timed = 0, 1
        cuda, memory, seconds = self.device.type == "cuda", {}, []
        self.synchronize()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            memory["held_gib"] = torch.cuda.memory_allocated() / 2**30
        for i in range(warm + timed):
            begin = time.perf_counter()
            run()
            self.synchronize()
            if i >= warm:
                seconds.append(time.perf_counter() - begin)
        if cuda:
            memory["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            memory["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        return {"seconds": (statistics.median(seconds), min(seconds), max(seconds))} | memory

    def free(self):
        """Give back what a cell has left: gradients, and memory that the allocator keeps."""
        for model in self.models.values():
            model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def card_name(self):
        """The name of the device."""
        return torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"


@dataclass
class Prompt(Example):
    """An Example that knows its picture."""

    number: int = 0


class Pictures:
    """Stands where ppo.py has its Processor: decoded pictures, and answers that nothing ends."""

    stop_ids = ()
    prefetch = SimpleNamespace(expect=lambda images: None)  # they are decoded

    def __init__(self, tiles, sizes):
        self.tiles, self.sizes = tiles, sizes  # (n, tiles, 3, H, W), (n, 2) or None

    def images(self, examples):
        """As Processor.images."""
        places = [e.number for e in examples]
        return self.tiles[places].flatten(0, 1), None if self.sizes is None else self.sizes[places]

    def collate(self, examples):
        """As Processor.collate."""
        prompts, answers = [e.prompt for e in examples], [e.answers for e in examples]
        pixels, sizes = self.images(examples)
        return pack(prompts, answers, None, pixels, image_sizes=sizes)


def step_flops(model, batch):
    """Floating-point operations that a DPO step needs; a multiplication and an addition are two.

    T tokens, N of them scored, V pairs of a token and one that it sees, A heads x head size.
    1. LLM, forward: 2 x (linear layers + LoRA) x T, attention 4 A V a block, head 2 x V_head D N
    2. backward: linear layers are frozen, so 2 x them x T for the gradient of their input alone;
       LoRA 4 x, of both; attention 8 A V a block; head as before, it gives the gradient of h
    3. tower: forward alone. Projector: its weights train, the tower's output has no gradient
    Not counted: recomputation, norms, rotation, embeddings, and that our last block skips what is
    not read. A reference pass is not part of a step.
    """
    size = lambda m: m.in_features * m.out_features
    blocks, tower = model.llm.base_model.layers, model.vision.config
    linear = sum(size(m) for m in blocks.modules() if hasattr(m, "in_features"))
    lora = sum(p.numel() for n, p in blocks.named_parameters() if ".lora_" in n)
    T, N = int((batch.segments >= 0).sum()), len(batch.targets)
    real = (batch.segments >= 0)[:, None, :, None]
    V = int((attention_mask(batch.segments) & real).sum())
    heads = 12 * len(blocks) * model.llm.config.hidden_size * V  # 4 forward, 8 backward
    head = 2 * 2 * model.head_weight().numel() * N
    total = (2 + 2) * linear * T + (2 + 4) * lora * T + heads + head

    layers = model.vision.encoder.layers
    layers = layers[: range(len(layers) + 1)[model.feature_layer]]
    patches = (tower.image_size // tower.patch_size) ** 2
    tiles, tokens = len(batch.pixel_values), patches + 1
    tower_linear = sum(size(m) for m in layers.modules() if hasattr(m, "in_features"))
    patch = model.vision.embeddings.patch_embedding.weight.numel()
    total += tiles * 2 * (tower_linear * tokens + patch * patches)
    total += tiles * 4 * len(layers) * tower.hidden_size * tokens**2
    first, second = size(model.projector.linear_1), size(model.projector.linear_2)
    return total + tiles * patches * (2 * 2 * first + 3 * 2 * second)


@contextlib.contextmanager
def default_dtype(dtype):
    """What new parameters are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def checkpointing(model, on):
    """As --gradient-checkpointing inside, if on."""
    model.train(on)
    if on:
        model.llm.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.eval()
        if on:
            model.llm.activation_checkpointing_disable()


@contextlib.contextmanager
def dense_attention(on):
    """Inside, if on, the prompt's queries are masked like the others."""
    plain = modelling.mask_and_prefix
    if on:
        modelling.mask_and_prefix = lambda *args: (plain(*args)[0], 0)
    try:
        yield
    finally:
        modelling.mask_and_prefix = plain


# The most valuable first: a run may be stopped at any time.
CELLS = """
step/1.5/b4  step/1.5/b4/checkpointing  step/next/b1  step/next/b1/checkpointing  reference/1.5/b4  naive/1.5/b4
trl/1.5/b4  trl/1.5/b4/default  trl/next/b1  trl/next/b1/default  naive/next/b1
step/1.5/b4/r16  step/1.5/b4/checkpointing/r16  step/1.5/b4/nf4  step/1.5/b1/checkpointing/r16/nf4  step/next/b1/checkpointing/r16/nf4
attention/1.5/b4/prefix  attention/1.5/b4/own  attention/1.5/b4/varlen  attention/1.5/b4/dense
attention/1.5/b4/prefix/unequal  attention/1.5/b4/own/unequal  attention/1.5/b4/varlen/unequal
attention/next/b1/prefix  attention/next/b1/own  attention/next/b1/varlen
sample/1.5/b8/t1/k4  sample/1.5/b8/generate/k4  sample/1.5/b32/t1  ppo/1.5/b32/r64  tests/device  toy/dpo
grpo/1.5/b4/r64  grpo/1.5/b4/trl/r64  grpo/1.5/b4/trl/default/r64
step/1.5/b1  step/1.5/b1/checkpointing  step/1.5/b2  step/1.5/b2/checkpointing  step/next/b2  step/next/b2/checkpointing
step/next/b4/checkpointing  step/next/b4  naive/1.5/b1  reference/next/b4  naive/next/b2  naive/1.5/b2
naive/1.5/b4/checkpointing  naive/next/b4/checkpointing  card/matmul  card/copy  head/fused  head/answer-rows  head/all-rows
sample/1.5/b8/t0  negative/1.5/b8  negative/1.5/b8/plain  sample/1.5/b8/generate  step/1.5/b4/dense
step/next/b1/dense  step/1.5/b16/checkpointing  sample/1.5/b8/t1  sample/1.5/b32/t0  sample/1.5/b32/generate
sample/next/b8/t0  sample/1.5/b8/t1/nf4  negative/next/b4  naive/next/b1/checkpointing  step/1.5/b8  step/1.5/b16  step/next/b8/checkpointing
""".split()


def run_cell(bench, name):
    """-> {figure: value}; running out of memory is one."""
    what, *how = name.split("/")
    base = [word for word in how if re.fullmatch(r"r\d+|nf4", word)]
    how = [int(word[1:]) if re.fullmatch(r"b\d+", word) else word for word in how]
    how = [word for word in how if word not in base]
    bench.nf4 = "nf4" in base
    ranks = [int(word[1:]) for word in base if word != "nf4"]
    bench.rank = ranks[0] if ranks else bench.shape["rank"]
    torch.manual_seed(0)
    try:
        return getattr(bench, what)(*how)
    except torch.OutOfMemoryError as error:
        return {"does_not_fit": str(error).splitlines()[0]}
    except Exception as error:  # the other cells have figures to give all the same
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def row(name, figures, card):
    """A line of the table."""
    for key in ("does_not_fit", "absent", "error"):
        if key in figures:
            said = "does not fit" if key == "does_not_fit" else figures[key]
            return f"| {name} | {said} | | | | | {card} |"
    kinds = ("peak_gib", "counted_gib", "reserved_gib")
    sizes = [f"{figures[k]:.2f}" if k in figures else "" for k in kinds]
    rest = [k for k, v in figures.items() if isinstance(v, (int, float)) and not k.endswith("_gib")]
    more = ", ".join(f"{k} {figures[k]:.4g}" for k in rest)
    median, low, high = figures["seconds"]
    cells = [name, f"{median:.4g} ({low:.4g} - {high:.4g})", *sizes, more, card]
    return f"| {' | '.join(cells)} |"


def code():
    """A hash of the files that these figures depend on, and the commit where git knows it."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("formats/*.py"), *ROOT.glob("lab/bench_*.py")]
    text = "".join(f"{path.name} {path.read_text(encoding='utf-8')}" for path in sorted(files))
    git = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
        commit = done.stdout.strip()
    except OSError:  # no git here
        commit = ""
    return hashlib.sha256(text.encode()).hexdigest()[:12], commit or None


def main(argv=None):
    """Measure, print, write; -> exit status."""
    parser = argparse.ArgumentParser(
        prog="lab.bench --device cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = parser.add_argument
    flag("--json", metavar="FILE", help="write the figures there, a cell a line; go on from there")
    flag("--only", nargs="+", metavar="NAME", help="cells whose names begin with one of these")
    flag(
        "--seconds",
        type=float,
        default=420,
        help="start no cell after so many (default %(default)s)",
    )
    flag("--commit", help="of these files, where git cannot say it")
    flag("--device", default="cuda", help="default %(default)s")
    flag("--size", default="7b", choices=list(SHAPES), help="default %(default)s")
    flag("--dry", action="store_true", help="--device cpu --size tiny, and one run of each cell")
    args = parser.parse_args(argv)
    names = [n for n in CELLS if not args.only or n.startswith(tuple(args.only))]
    if not names:
        parser.error(f"--only: no cell begins so; cells are {' '.join(CELLS)}")
    if args.dry:
        args.device, args.size = "cpu", "tiny"
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    bench, begin, status = Bench(SHAPES[args.size], args.device), time.perf_counter(), 0
    bench.once = args.dry
    files, commit = code()
    made = {
        "card": bench.card_name(),
        "size": args.size,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "code": files,
    }
    path = Path(args.json) if args.json else None
    lines = json.loads(path.read_text()) if path and path.exists() else []
    known = {line["cell"]: line for line in lines if made.items() <= line.items()}

    print("| cell | seconds | peak GiB | counted GiB | reserved GiB | | card |")
    print("|---|---|---|---|---|---|---|")
    for i, name in enumerate(names):
        if name in known:
            print(row(name, known[name], f"{made['card']}, from {path}"))
            continue
        if time.perf_counter() - begin > args.seconds:
            print(f"not measured, --seconds {args.seconds:g}: {' '.join(names[i:])}")
            break
        figures = run_cell(bench, name)
        bench.free()
        print(row(name, figures, made["card"]), flush=True)
        status |= "error" in figures
        if path and not {"error", "absent"} & figures.keys():
            line = {"cell": name, **made, "commit": args.commit or commit, **figures}
            same = lambda other: all(other.get(k) == line[k] for k in ("cell", "card", "size"))
            lines = [other for other in lines if not same(other)] + [line]
            write_json(path, lines)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
