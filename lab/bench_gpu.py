"""Seconds and memory of the real shapes, LLaVA-1.5-7B and LLaVA-NeXT-7B, on one GPU.

    python -m lab.bench_gpu [--json FILE] [--only NAME ...] [--seconds N]      3 to 7 minutes on an H100
    python -m lab.bench_gpu --device cpu --size tiny                           that it runs, in seconds

A file of its own: lab/bench.py compares processes by CPU seconds and resident memory, at a size that a CPU can do; here one
process holds one model of 7 B, a cell is one thing that it does, and clock and memory are the GPU's. The figures of one are not
those of the other.

The model: random weights in bfloat16, made on the device (no file is read or written): a Llama of 32 layers, CLIP ViT-L/14 at 336
pixels, LoRA of rank 128 on all linear layers of the LLM and the projector, both training in float32, as dpo.py's defaults. One pair: a
prompt of 45 text tokens and a picture (1.5: 576 tokens; NeXT: 2340, a photograph of 640 x 480), two answers of 100 tokens.
Pictures are decoded before: a run's data loading is not in these figures.

Cells, by what their names begin with; b4 = 4 pairs (or prompts) at a time, the last word of some says in what they differ:
    step/       a DPO step as dpo.py's loop takes it, batch to the device, forward, backward, clip, AdamW; `checkpointing`: with
                --gradient-checkpointing; `dense`: the attention of the prompt also under the mask
    reference/  log pi_ref of the pairs, which dpo.py computes once for a whole run
    naive/      the step as most scripts take it: padded batch of 2 B rows with its own image each, logits of all positions in float32,
                and the reference (adapters off) in every step; our model's parts, LoRA and optimizer. `apart`: the largest difference
                of its log-probs of an answer from ours, both bfloat16
    sample/     128 tokens of each prompt, LoRA beside the weights; t0 greedy, t1 temperature 1; `generate`: transformers' own
                loop on the same model, greedy
    negative/   BDHS's guided completions: five sentences of each of the answers at once, 99 % of the picture hidden, 24 tokens a
                sentence; `plain`: a prompt with its picture for each sentence
    head/       log-probs of 280 answer tokens and the gradient to their hidden states, head frozen: `fused`; `answer-rows`: log_softmax of
                those rows; `all-rows`: of a padded batch of 4 pairs, all positions
    card/       what the GPU can do: a product of bfloat16 matrices of 8192, a copy of 4 GiB

Figures: `seconds`, median (min - max) over 5 runs after 2 to warm up (sample/ and negative/: 2 after 1), the device idle before and after each.
`peak_gib`: most memory that tensors held, weights included; `reserved_gib`: what the allocator had taken for that, near what nvidia-smi
shows; `held_gib`: held before the cell. `tokens_a_second`: new tokens of the whole batch. A cell that runs out of memory says "does not fit",
which is a figure too; one that fails says why, and the exit status is 1. --json appends a line a cell as soon as it is measured.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import statistics
import sys
import time

import torch
import transformers

import bdhs
import dpo
import model as modelling
import sampling
import training
from formats.anyres import AnyRes
from model import MLLM, Projector, fused_log_probs, pack

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
        "completion": 24,
        "head": (280, 5768),
        "matrix": 8192,
        "copy": 2**31,
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
        "completion": 3,
        "head": (28, 60),
        "matrix": 64,
        "copy": 2**10,
    },
}


def sample(model, *args, **how):
    """Draw answers."""
    return sampling.sample(model, *args, **how)


class Bench:
    """The model on the device, made at the first use, and what the cells do with it."""

    def __init__(self, shape, device):
        self.shape, self.device, self.models = shape, torch.device(device), {}

    # ---- model and batches

    def model(self, kind):
        """The model as "1.5" or as "next": the same tower, projector and LLM, with tiles or without."""
        if not self.models:
            torch.manual_seed(0)
            vision, llm = (
                transformers.CLIPVisionConfig(**self.shape["vision"]),
                transformers.LlamaConfig(**self.shape["llm"], pad_token_id=0),
            )
            with torch.device(self.device), default_dtype(torch.bfloat16):
                parts = (
                    transformers.CLIPVisionModel(vision),
                    Projector(vision.hidden_size, llm.hidden_size),
                    transformers.LlamaForCausalLM(llm),
                )
                patches = vision.image_size // vision.patch_size
                anyres = AnyRes(self.shape["pinpoints"], vision.image_size, patches)
                self.models = {
                    "1.5": MLLM(*parts, llm.vocab_size - 1),
                    "next": MLLM(*parts, llm.vocab_size - 1, anyres=anyres),
                }
            square, tiled = self.models.values()
            square.prepare(self.shape["rank"])
            tiled.initial_projector = square.initial_projector
            tiled.image_newline.requires_grad_(False)
            with torch.no_grad():  # away from 0: a product with zeros can be faster
                for p in training.trainable(square).values():
                    p.add_(torch.randn_like(p), alpha=1e-3)
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
            return {"tokens": batch.input_ids.numel()} | self.measure(run)

    def reference(self, kind, n):
        """The pass that dpo.py makes once, adapters beside the base as there."""
        model, batch = self.model(kind), self.pairs(kind, n)

        @torch.no_grad()
        def run():
            """What is timed."""
            model.answer_log_probs(batch.to(self.device)).cpu()

        return {"tokens": batch.input_ids.numel()} | self.measure(run)

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

    def sample(self, kind, n, how):
        """New tokens, none of which ends an answer."""
        model, (rows, pixels, sizes) = self.model(kind), self.prompts(kind, n)
        new = self.shape["new"]

        def ours():
            """Our sampling."""
            temperature = 0.0 if how == "t0" else 1.0
            sample(model, rows, pixels, 1, new, temperature, image_sizes=sizes)

        @torch.no_grad()
        def generate():
            """transformers' own sampling."""
            x = model.embed(torch.stack(rows).to(self.device), pixels.to(self.device), sizes)
            model.llm.generate(
                inputs_embeds=x.to(model.dtype),
                attention_mask=torch.ones(x.shape[:2], dtype=torch.long, device=self.device),
                generation_config=transformers.GenerationConfig(
                    do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0
                ),
            )

        figures = self.measure(generate if how == "generate" else ours, warm=1, timed=2)
        return figures | {"tokens_a_second": n * new / figures["seconds"][0]}

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
            sample(model, rows, pixels, 1, new, 1.0, **draw)

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

    # ---- measuring

    def synchronize(self):
        """Wait until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self, run, warm=2, timed=5):
        """-> seconds (median, min, max) of some runs, and memory from the first one on."""
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
step/1.5/b4  step/1.5/b4/checkpointing  step/next/b1  step/next/b1/checkpointing  naive/1.5/b4  naive/next/b1
step/1.5/b1  step/1.5/b1/checkpointing  step/1.5/b2  step/1.5/b2/checkpointing  step/next/b2  step/next/b2/checkpointing
step/next/b4/checkpointing  step/next/b4  reference/1.5/b4  reference/next/b4  naive/1.5/b1  naive/1.5/b2  naive/next/b2
naive/1.5/b4/checkpointing  naive/next/b4/checkpointing  card/matmul  card/copy  head/fused  head/answer-rows  head/all-rows
sample/1.5/b8/t0  sample/1.5/b32/t1  negative/1.5/b8  negative/1.5/b8/plain  sample/1.5/b8/generate  step/1.5/b4/dense
step/next/b1/dense  step/1.5/b16/checkpointing  sample/1.5/b8/t1  sample/1.5/b32/t0  sample/1.5/b32/generate
sample/next/b8/t0  negative/next/b4  naive/next/b1/checkpointing  step/1.5/b8  step/1.5/b16  step/next/b8/checkpointing
""".split()


def run_cell(bench, name):
    """-> {figure: value}; running out of memory is one."""
    what, *how = name.split("/")
    if len(how) > 1:
        how[1] = int(how[1].removeprefix("b"))
    torch.manual_seed(0)
    try:
        return getattr(bench, what)(*how)
    except torch.OutOfMemoryError as error:
        return {"does_not_fit": str(error).splitlines()[0]}
    except Exception as error:  # the other cells have figures to give all the same
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def row(name, figures, card):
    """A line of the table."""
    if "does_not_fit" in figures or "error" in figures:
        said = "does not fit" if "does_not_fit" in figures else figures["error"]
        return f"| {name} | {said} | | | | {card} |"
    memory = [f"{figures[k]:.2f}" if k in figures else "" for k in ("peak_gib", "reserved_gib")]
    rest = [k for k in figures if k != "seconds" and not k.endswith("_gib")]
    more = ", ".join(f"{k} {figures[k]:.4g}" for k in rest)
    median, low, high = figures["seconds"]
    cells = [name, f"{median:.4g} ({low:.4g} - {high:.4g})", *memory, more, card]
    return f"| {' | '.join(cells)} |"


def main(argv=None):
    """Measure, print, append; -> exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="append a line a cell there")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="cells whose names begin with one of these"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=420,
        help="start no cell after so many (default %(default)s)",
    )
    parser.add_argument("--device", default="cuda", help="default %(default)s")
    parser.add_argument("--size", default="7b", choices=list(SHAPES), help="default %(default)s")
    args = parser.parse_args(argv)
    names = [n for n in CELLS if not args.only or n.startswith(tuple(args.only))]
    if not names:
        parser.error(f"--only: no cell begins so; cells are {' '.join(CELLS)}")
    bench, begin, status = Bench(SHAPES[args.size], args.device), time.perf_counter(), 0
    card = bench.card_name()
    print("| cell | seconds | peak GiB | reserved GiB | | card |\n|---|---|---|---|---|---|")
    for i, name in enumerate(names):
        if time.perf_counter() - begin > args.seconds:
            print(f"not measured, --seconds {args.seconds:g}: {' '.join(names[i:])}")
            break
        figures = run_cell(bench, name)
        bench.free()
        print(row(name, figures, card), flush=True)
        status |= "error" in figures
        if args.json:
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            line = {"cell": name, "card": card, "size": args.size, **versions, **figures}
            with open(args.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
