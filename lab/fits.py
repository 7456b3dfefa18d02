"""What fits on which GPU, and how long it takes.

Times and measured peaks are of results/gpu.json, the others are counted by memory.py.
"""

import argparse
import math
from typing import NamedTuple

import torch
import transformers

import memory
from formats.anyres import AnyRes
from model import MLLM, Projector

CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
CLIP |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}
SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
SEVEN |= {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064}
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
PICTURE = (480, 640)  # a photograph; heights and widths of NeXT's tiles follow from it
TEXT, ANSWER = 45, 100  # tokens of a prompt beside the picture, and of an answer
PAIRS, EPOCHS = 5733, 3  # RLHF-V, and dpo.py's default


class Run(NamedTuple):
    """A documented command: how it is called, its flags, and what it carries."""

    what: str
    model: str  # "1.5" or "next"
    flags: str  # as they are documented, beside the script's defaults
    batch: tuple  # rows a forward pass, forward passes a step
    answers: tuple = (ANSWER, ANSWER)  # tokens of each answer of a row
    checkpointing: bool = False
    cell: str = ""  # of results/gpu.json: the same micro-batch
    rank: int = 128
    projector_lr: float = 2e-6
    plan: memory.Plan = memory.Plan()
    quantize: str | None = None


CARD = "NVIDIA H200"  # of the measured figures
FRONT = 4  # so many are in the main README
SAVE = "--gradient-checkpointing"
DRAWN = memory.Plan(k=2, new=256)
PPO = memory.Plan(k=1, new=896, trained=2, frozen=1)
RUNS = [
    Run("`dpo.py`, LLaVA-1.5-7B", "1.5", "--batch-size 4 --grad-accum 8", (4, 8),
        cell="step/1.5/b4"),
    Run("the same", "1.5", f"--batch-size 4 --grad-accum 8 {SAVE}", (4, 8), checkpointing=True,
        cell="step/1.5/b4/checkpointing"),
    Run("`dpo.py`, LLaVA-NeXT-7B", "next", "", (2, 16), cell="step/next/b2"),
    Run("the same", "next", SAVE, (2, 16), checkpointing=True, cell="step/next/b2/checkpointing"),
    Run("`ppo.py`, LLaVA-1.5-7B", "1.5", SAVE, (2, 128), answers=(896,), checkpointing=True,
        rank=64, projector_lr=0, plan=PPO),
    Run("`online_dpo.py`, LLaVA-NeXT-7B, annotator elsewhere", "next", "", (2, 16),
        answers=(256, 256), plan=DRAWN),
    Run("`online_dpo.py`, LLaVA-NeXT-7B, annotator elsewhere", "next", SAVE, (2, 16),
        answers=(256, 256), checkpointing=True, plan=DRAWN),
    Run("`ppo.py`, LLaVA-1.5-7B", "1.5", "", (2, 128), answers=(896,), rank=64,
        projector_lr=0, plan=PPO),
    Run("`ppo.py`, LLaVA-NeXT-7B", "next", "", (2, 128), answers=(896,), rank=64,
        projector_lr=0, plan=PPO),
    Run("`bdhs.py`, LLaVA-NeXT-7B, answers of five sentences", "next", "", (2, 16),
        plan=memory.Plan(k=5, new=256, trains=False)),
    Run("`bdhs.py --online`, LLaVA-NeXT-7B", "next", "", (2, 16),
        answers=(ANSWER, ANSWER, ANSWER), plan=memory.Plan(k=5, new=256, reference=True)),
    Run("`povid.py`, LLaVA-NeXT-7B", "next", "", (2, 16), cell="step/next/b2"),
    Run("`reward_model.py`, LLaVA-1.5-7B, turns of 250 tokens", "1.5", "", (2, 16),
        answers=(350, 350), rank=64, projector_lr=0),
    Run("`eval_pope.py`, LLaVA-NeXT-7B", "next", "", (1, 1),
        plan=memory.Plan(k=1, new=16, trains=False)),
    Run("`eval_chair.py`, LLaVA-NeXT-7B", "next", "", (1, 1),
        plan=memory.Plan(k=1, new=128, trains=False)),
]  # fmt: skip


def shapes(kind, llm=SEVEN):
    """The MLLM of these sizes in bfloat16, without weights. kind: "1.5" or "next"."""
    with torch.device("meta"):
        vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP))
        language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llm, pad_token_id=0))
        projector = Projector(CLIP["hidden_size"], llm["hidden_size"])
        parts = [part.bfloat16() for part in (vision, projector, language)]
        return MLLM(*parts, llm["vocab_size"] - 1, anyres=tiling() if kind == "next" else None)


def tiling():
    """The tiles of LLaVA-NeXT."""
    return AnyRes(PINPOINTS, CLIP["image_size"], CLIP["image_size"] // CLIP["patch_size"])


def need(run, model):
    """Bytes that a run needs at its peak, with one prompt in `sampling.sample`."""
    picture, tiles = (CLIP["image_size"] // CLIP["patch_size"]) ** 2, 1
    if model.anyres:
        picture, tiles = model.anyres.tokens(PICTURE), 1 + math.prod(model.anyres.grid(PICTURE))
    P, R = TEXT + picture, sum(run.answers)
    args = argparse.Namespace(
        batch_size=run.batch[0],
        grad_accum=run.batch[1],
        lr=1e-6,
        projector_lr=run.projector_lr,
        lora_rank=run.rank,
        gradient_checkpointing=run.checkpointing,
        quantize=run.quantize,
    )
    load = memory.Load(run.batch[0], P + R, P, R, tiles)
    return sum(memory.peak(model, args, load, run.plan).values())


def lines(gpu):
    """A line of the table for each run. gpu: results/gpu.json."""
    cells = {row["cell"]: row for row in gpu if row["card"] == CARD}
    models = {kind: shapes(kind) for kind in ("1.5", "next")}
    table = []
    for run in RUNS:
        size = need(run, models[run.model]) / memory.GIB
        card = next(f"{n} GB" for n in (24, 48, 80) if size * memory.HEADROOM < n - 1)
        row = [run.what, f"`{run.flags}`" if run.flags else "", card, f"{size:.1f}", "", ""]
        if run.cell:
            cell = cells[run.cell]
            seconds = cell["seconds"][0] / int(run.cell.split("/")[2][1:])
            row[4] = f"{cell['peak_gib']:.1f}"
            if "dpo.py" in run.what or run.what == "the same":
                row[5] = f"{PAIRS * EPOCHS * seconds / 60:.0f}"
        table.append(row)
    return table


HEAD = ["", "flags", "fits", "GiB, computed", "a step alone, measured", "minutes"]
