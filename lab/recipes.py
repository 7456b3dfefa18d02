"""The main rows of the papers' tables as command lines, with what they need: results/RECIPES.md.

    python -m lab.recipes            # writes the page

Memory is counted by memory.py for the longest row of the given size (lab/fits.py). Hours are
scaled, not measured, from steps on an H200 (results/gpu.json): arithmetic by the cards' matrix
rates, drawing of answers by their memory bandwidths, a 13B by its number of parameters.
"""

import json
from pathlib import Path
from typing import NamedTuple

import memory
from common import write_text
from lab import fits

PAGE = Path(__file__).parents[1] / "results" / "RECIPES.md"
GPU = Path(__file__).parents[1] / "results" / "gpu.json"
THIRTEEN = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
THIRTEEN |= {"num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32064}
PARAMETERS = 13.0 / 6.7  # of a 13B, in those of a 7B
# card: its GB; how many times as long as an H200 it takes for arithmetic, and to read weights
CARDS = {"H100": (80, 1.0, 4.8 / 3.35), "RTX 4090": (24, 989 / 165, 4.8 / 1.01)}
STEPS = [  # what is tried in this order until a run fits a card
    {},
    {"checkpointing": True},
    {"checkpointing": True, "smaller": True},
    {"checkpointing": True, "quantize": "nf4"},
    {"checkpointing": True, "smaller": True, "quantize": "nf4"},
]
DRAWN = 128  # tokens of an answer that a model draws, as in the measured cells
NEXT, THIRTEEN_B = "llava-hf/llava-v1.6-vicuna-7b-hf", "llava-hf/llava-1.5-13b-hf"
SFT = "LLaVA-RLHF-7b-v1.5-224/sft_model"


class Recipe(NamedTuple):
    """A row of a paper's table."""

    row: str
    lines: tuple  # command lines, in order; the flags of a card are added to the first that trains
    figures: tuple  # the paper's
    pairs: int  # rows that are trained on in an epoch; 0 for a model as it is
    epochs: int = 3
    batch: tuple = (2, 16)  # rows a forward pass, forward passes a step
    answers: tuple = (fits.ANSWER, fits.ANSWER)
    passes: int = 1  # of training over a row in an epoch; PPO: two, of policy and of value
    refers: int = 1  # passes of the reference over each row, in all
    drawn: int = 0  # answers that are drawn in all
    guided: bool = False  # are these BDHS's?
    plan: memory.Plan = memory.Plan()
    before: memory.Plan | None = None  # of the first line, if it draws for the second
    rank: int = 128
    model: str = "next"  # or "1.5", "1.5-13b"
    asked: str = ""  # flags that its evaluations need and those of the other rows do not


class Paper(NamedTuple):
    """A paper's rows, what they are evaluated with, and what the columns are."""

    title: str
    about: str
    columns: tuple
    recipes: tuple
    evaluations: tuple


def trains(script, *flags, model=NEXT, out=None):
    """A command line that trains."""
    return " ".join([f"python {script}.py --model {model}", *flags, f"--out runs/{out}"])


POVID = "--data povid.json --images coco"
FIVE = "--subset 5000 --seed 0"
ONLINE = memory.Plan(k=2, new=256)
SERVED = "--annotator endpoint --judge-url URL --judge-model llava-v1.6-34b"
LI = "--lora-rank 128 --projector-lr 2e-5"
THEIRS = "--lr 4e-4 --batch-size 2 --grad-accum 64"
PPO = memory.Plan(k=1, new=896, trained=2, frozen=1)


def evaluation(script, *flags, model=NEXT, out=None):
    """A command line that evaluates the model and one adapter."""
    who = f"--model {model} --adapter none runs/ROW/adapter"
    return " ".join([f"python {script}.py", *flags, who, f"--out runs/ROW/{out}"])


JUDGED = "--annotator endpoint --judge-url URL --judge-model JUDGE"
POPE = "--questions coco_pope_random.json coco_pope_popular.json coco_pope_adversarial.json"
MMHAL = "--questions response_template.json --images mmhal"
WILD = (
    "--questions questions.jsonl --context context.jsonl --references answers_gpt4.jsonl "
    "--images llava-bench"
)

AMIRLOO = Paper(
    "Amirloo et al. 2024: LLaVA-NeXT-7B",
    "The paper searches learning rates, beta, epochs and batches (`dpo.py`, choice 1) and does not "
    "say which won a row; the lines have our defaults, so search them. Which 5,000 rows it drew is "
    "not published: `--subset 5000 --seed 0` draws others. Recall is object recall on captions, "
    "listed by GPT there and by CHAIR's rule here.",
    ("POPE", "MMHal", "MMHal-V", "LLaVA-W", "TextVQA", "GQA", "MM-Vet", "Recall"),
    (
        Recipe("base", (), (86.40, 2.95, 2.75, 80.85, 64.85, 64.23, 43.94, 68.13), 0),
        Recipe(
            "DPO, POVID 5k (table 3)",
            (trains("dpo", POVID, FIVE, out="povid-5k"),),
            (88.18, 2.93, 2.93, 81.89, 64.90, 64.34, 43.39, 71.80),
            5000,
        ),
        Recipe(
            "DPO, POVID 17k (table 3)",
            (trains("dpo", POVID, out="povid"),),
            (88.09, 3.16, 3.07, 78.05, 64.56, 64.12, 40.60, 73.48),
            17000,
        ),
        Recipe(
            "DPO, RLHF-V 5.7k (table 3)",
            (trains("dpo", "--data RLHF-V-Dataset.parquet", out="rlhf-v"),),
            (83.86, 3.15, 3.26, 70.58, 64.75, 62.89, 37.16, 64.26),
            5733,
        ),
        Recipe(
            "DPO, VLFeedback 5k (table 3)",
            (
                trains(
                    "dpo",
                    "--data vlfeedback_80k.jsonl --images merged_images",
                    FIVE,
                    out="vlfeedback-5k",
                ),
            ),
            (86.31, 2.92, 3.00, 83.10, 65.06, 64.09, 43.21, 68.03),
            5000,
        ),
        Recipe(
            "BDHS, POVID 5k (table 6)",
            (
                trains("bdhs", POVID, FIVE, "--sample-batch-size 4", out="bdhs-5k"),
                trains("dpo", "--data runs/bdhs-5k/preferences.json --images coco", out="bdhs"),
            ),
            (88.75, 2.61, 2.71, 86.33, 65.07, 63.97, 43.40, 75.58),
            5000,
            drawn=5000,
            guided=True,
            before=memory.Plan(k=5, new=256, trains=False),
        ),
        Recipe(
            "online BDHS, POVID 5k (table 6)",
            (trains("bdhs", "--online", POVID, FIVE, out="bdhs-online"),),
            (88.83, 2.80, 2.99, 85.03, 65.09, 63.65, 43.12, 74.09),
            5000,
            refers=3,
            drawn=15000,
            guided=True,
            plan=memory.Plan(k=5, new=256),
        ),
        Recipe(
            "POVID's image distortion, 5k (table 6)",
            (trains("povid", POVID, FIVE, out="povid-noise"),),
            (88.33, 2.84, 2.64, 80.15, 64.21, 63.79, 41.28, 69.39),
            5000,
            answers=(fits.ANSWER,) * 3,
        ),
        Recipe(
            "online DPO, POVID 17k (table 2)",
            (trains("online_dpo", POVID, SERVED, out="online"),),
            (86.49, 2.88, 2.94, 82.61, 64.88, 64.31, 43.26, 68.45),
            17000,
            answers=(256, 256),
            refers=3,
            drawn=2 * 3 * 17000,
            plan=ONLINE,
        ),
        Recipe(
            "mixed DPO, POVID 17k (table 2)",
            (trains("online_dpo", POVID, "--mix 0.5", SERVED, out="mixed"),),
            (88.03, 2.83, 3.10, 82.75, 64.93, 64.47, 42.80, 74.53),
            17000,
            answers=(256, 256),
            refers=3,
            drawn=3 * 17000,
            plan=ONLINE,
        ),
    ),
    (
        evaluation("eval_pope", POPE, "--images val2014", out="pope"),
        evaluation("eval_judge", MMHAL, JUDGED, out="mmhal"),
        evaluation("eval_judge", MMHAL, "--judge-sees-image", JUDGED, out="mmhal-v"),
        evaluation("eval_judge", WILD, JUDGED, out="llava-w"),
        evaluation(
            "eval_vqa",
            "--questions TextVQA_0.5.1_val.json llava_textvqa_val_v051_ocr.jsonl",
            "--images textvqa",
            out="textvqa",
        ),
        evaluation(
            "eval_vqa", "--questions testdev_balanced_questions.json --images gqa", out="gqa"
        ),
        evaluation("eval_judge", "--questions mm-vet.json --images mm-vet", JUDGED, out="mm-vet"),
        evaluation(
            "eval_chair",
            "--instances instances_train2014.json instances_val2014.json",
            "--captions captions_train2014.json captions_val2014.json --synonyms synonyms.txt",
            "--questions obj_halbench_300_with_image.jsonl",
            out="recall",
        ),
    ),
)

LI_LIN_PEI = Paper(
    "Li, Lin, Pei 2024: LLaVA-1.5-13B, answers rated on five attributes",
    "The files are those of `alexshengzhili/mllm-dpo` (29.9, 21.1, 101 and 11.2 MB in this order). "
    "To rate answers anew, `annotate.py` is first; its judge there was Gemini, with a prompt that "
    "is not published. The row SteerLM is evaluated with a request for ratings; which one is not "
    "published: its lines ask for all 4, and its base plainly.",
    ("MM-Vet", "LLaVA-W", "POPE", "MMBench", "MT-Bench", "AlpacaEval"),
    (
        Recipe("base", (), (36.3, 73.1, 0.859, 67.4, 5.99, 79.3), 0, model="1.5-13b"),
        Recipe(
            "DPO",
            (
                trains(
                    "dpo",
                    "--data dpo_inference0104.with_logpllava-v1.5-13b_2024-02-03.json",
                    "--images images",
                    "--lr 5e-5 --projector-lr 2e-5 --batch-size 2 --grad-accum 64",
                    model=THIRTEEN_B,
                    out="five-dpo",
                ),
            ),
            (41.2, 79.1, 0.870, 66.8, 6.73, 86.4),
            5182,
            batch=(2, 64),
            model="1.5-13b",
        ),
        Recipe(
            "rejection sampling",
            (
                trains(
                    "sft",
                    "--data rejection_sampling.json --images images",
                    LI,
                    THEIRS,
                    model=THIRTEEN_B,
                    out="five-rejection",
                ),
            ),
            (38.0, 70.6, 0.883, 67.6, 6.22, 74.9),
            5034,
            batch=(2, 64),
            answers=(fits.ANSWER,),
            refers=0,
            model="1.5-13b",
        ),
        Recipe(
            "SteerLM",
            (
                trains(
                    "sft",
                    "--data steerlm.json --images images",
                    LI,
                    THEIRS,
                    model=THIRTEEN_B,
                    out="five-steerlm",
                ),
            ),
            (35.2, 67.0, 0.878, 65.1, 5.70, 68.8),
            20728,
            batch=(2, 64),
            answers=(fits.ANSWER,),
            refers=0,
            model="1.5-13b",
            asked="--attributes helpfulness=4,correctness=4,coherence=4,complexity=4,verbosity=4",
        ),
        Recipe(
            "standard SFT",
            (
                trains(
                    "sft",
                    "--data standard_sft.json --images images",
                    LI,
                    THEIRS,
                    model=THIRTEEN_B,
                    out="five-sft",
                ),
            ),
            (36.5, 63.7, 0.850, 65.4, 5.01, 50.2),
            5182,
            batch=(2, 64),
            answers=(fits.ANSWER,),
            refers=0,
            model="1.5-13b",
        ),
    ),
    (
        evaluation(
            "eval_judge",
            "--questions mm-vet.json --images mm-vet",
            JUDGED,
            model=THIRTEEN_B,
            out="mm-vet",
        ),
        evaluation("eval_judge", WILD, JUDGED, model=THIRTEEN_B, out="llava-w"),
        evaluation("eval_pope", POPE, "--images val2014", model=THIRTEEN_B, out="pope"),
        evaluation("eval_vqa", "--questions MMBench_DEV_EN.tsv", model=THIRTEEN_B, out="mmbench"),
        evaluation(
            "eval_judge",
            "--questions question.jsonl --references gpt-4.jsonl",
            JUDGED,
            model=THIRTEEN_B,
            out="mt-bench",
        ),
        evaluation(
            "eval_judge",
            "--questions alpaca_eval.json --max-new-tokens 2048",
            JUDGED,
            model=THIRTEEN_B,
            out="alpaca-eval",
        ),
    ),
)

SUN = Paper(
    "Sun et al. 2023: Fact-RLHF, LLaVA-7B",
    "Model, preferences and captions are those of `zhiqings/LLaVA-RLHF-7b-v1.5-224` and "
    "`zhiqings/LLaVA-Human-Preference-10K`; `llava_ppo50k-aokvqa12k-vqa10k.json` holds the prompts."
    " The authors' reward model is a 13B that reads 336 pixels; here it shares the policy's base. "
    "They stop it at step 200. Their policy first learns the answers of the preferences for an "
    "epoch, which is left out. Memory is counted at 336 pixels; their tower reads 224.",
    ("MMHal", "hallucination rate", "LLaVA-B (COCO)", "POPE f1"),
    (
        Recipe("LLaVA-SFT+", (), (1.76, 0.67, 86.3, 82.7), 0, model="1.5", rank=64),
        Recipe(
            "Fact-RLHF",
            (
                trains(
                    "reward_model",
                    "--data llava_7b_v1_preference.json --images coco",
                    "--facts image_to_caption.json --steps 200",
                    model=SFT,
                    out="fact-rm",
                ),
                trains(
                    "ppo",
                    "--data llava_ppo50k-aokvqa12k-vqa10k.json --images coco",
                    "--reward-model runs/fact-rm --facts image_to_caption.json",
                    model=SFT,
                    out="fact-rlhf",
                ),
            ),
            (2.05, 0.68, 94.1, 81.5),
            72000,
            epochs=4,
            batch=(2, 128),
            answers=(896,),
            passes=4,
            refers=4,
            drawn=4 * 72000,
            plan=PPO,
            rank=64,
            model="1.5",
        ),
    ),
    (
        evaluation("eval_judge", MMHAL, JUDGED, model=SFT, out="mmhal"),
        evaluation(
            "eval_judge",
            "--questions qa90_questions.jsonl --context caps_boxes_coco2014_val_80.jsonl",
            "--references qa90_gpt4_answer.jsonl --images val2014",
            JUDGED,
            model=SFT,
            out="llava-b",
        ),
        evaluation("eval_pope", POPE, "--images val2014", model=SFT, out="pope"),
    ),
)
PAPERS = (AMIRLOO, LI_LIN_PEI, SUN)


def shapes():
    """The models of the recipes, without weights."""
    made = {kind: fits.shapes(kind) for kind in ("1.5", "next")}
    return made | {"1.5-13b": fits.shapes("1.5", THIRTEEN)}


def fitted(recipe, models, room):
    """The first of STEPS with which a recipe fits so many GB -> (flags, GiB, step)."""
    rows, passes = recipe.batch
    for step in STEPS:
        batch = (1, rows * passes) if step.get("smaller") else (rows, passes)
        run = fits.Run(
            "",
            recipe.model,
            "",
            batch,
            recipe.answers,
            step.get("checkpointing", False),
            rank=recipe.rank,
            plan=recipe.plan,
            quantize=step.get("quantize"),
        )
        size = fits.need(run, models[recipe.model]) / memory.GIB
        if size * memory.HEADROOM < room - 1:
            flags = ["--gradient-checkpointing"] if step.get("checkpointing") else []
            if step.get("smaller"):
                flags.append(f"--batch-size 1 --grad-accum {batch[1]}")
            if step.get("quantize"):
                flags.append("--quantize nf4")
            return " ".join(flags), size, step
    raise ValueError(f"{recipe.row} does not fit {room} GB")


def hours(recipe, step, cells, arithmetic, bandwidth):
    """How long a recipe takes, in hours: passes of the reference and of training, and drawing."""
    kind = "next" if recipe.model == "next" else "1.5"
    size = PARAMETERS if recipe.model == "1.5-13b" else 1
    name = {"next": "step/next/b2", "1.5": "step/1.5/b4"}[kind]
    name += "/checkpointing" if step.get("checkpointing") else ""
    a_pair = cells[name] / int(name.split("/")[2][1:])
    trained = recipe.pairs * recipe.epochs * recipe.passes * a_pair
    referred = recipe.pairs * recipe.refers * cells[f"reference/{kind}/b4"] / 4
    drawing = "negative/next/b4" if recipe.guided else f"sample/{kind}/b8/t0"
    an_answer = cells[drawing] / int(drawing.split("/")[2][1:])
    drawn = recipe.drawn * an_answer
    return ((trained + referred) * arithmetic + drawn * bandwidth) * size / 3600


def cost(recipe, models, cells):
    """For each card the cell "flags, GiB, hours" of the table."""
    texts = []
    for room, arithmetic, bandwidth in CARDS.values():
        if not recipe.pairs:
            texts.append("")
            continue
        parts = []
        for line in (recipe._replace(plan=recipe.before),) if recipe.before else ():
            flags, size, step = fitted(line, models, room)
            parts.append(f"first line {f'`{flags}`, ' if flags else ''}{size:.0f} GiB; then ")
        flags, size, step = fitted(recipe, models, room)
        time = hours(recipe, step, cells, arithmetic, bandwidth)
        more = " or more" if step.get("quantize") else ""
        shown = f"{time:.0f}" if time >= 9.95 else f"{time:.1f}"
        parts.append(f"{f'`{flags}`, ' if flags else ''}{size:.0f} GiB, {shown} h{more}")
        texts.append("".join(parts))
    return texts


def page():
    """The text of results/RECIPES.md."""
    rows = json.loads(GPU.read_text(encoding="utf-8"))
    cells = {row["cell"]: row["seconds"][0] for row in rows if row["card"] == fits.CARD}
    models = shapes()
    parts = [
        "# Recipes: the papers' main rows as command lines",
        "`python -m lab.recipes` writes this page, and a test parses each line with its script. "
        "**None of these rows was run here**: the figures are the papers'. Memory is counted, "
        f"hours are scaled from single steps on an H200 to an {' and an '.join(CARDS)} "
        f"(lab/recipes.py says how); {DRAWN} tokens are taken for an answer that is drawn, "
        f"{fits.ANSWER} for one of the data. The judges of the papers are retired, so that figures "
        "of another judge are not comparable with theirs: evaluate the base with the same judge, "
        "and compare differences.",
        "`runs/ROW` stands for the folder of the row, URL and JUDGE for a server's address and its "
        "model's name. Flags in the table belong behind the training lines, on that card; with "
        "`--quantize nf4` every pass unpacks the weights, how long that takes is not in the hours. "
        "Names of data files are those of their publishers, images lie where `--images` says; "
        "`povid.json` is the one file of `YiyangAiLab/POVID_preference_data_for_VLLMs`; RLHF-V's "
        "parquet file has 879 MB and its pictures in it, `vlfeedback_80k.jsonl` 426 MB without.",
    ]
    for paper in PAPERS:
        parts += [f"## {paper.title}", paper.about]
        head = ["row", *paper.columns, *(f"{c[0]} GB" for c in CARDS.values()), "here"]
        lines = [head, ["---"] * len(head)]
        for recipe in paper.recipes:
            figures = [f"{x:g}" for x in recipe.figures]
            lines.append([recipe.row, *figures, *cost(recipe, models, cells), "not run here"])
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        for recipe in paper.recipes:
            if recipe.lines:
                text = "\n".join(recipe.lines)
                parts.append(f"{recipe.row}:\n\n```\n{text}\n```")
        text = "\n".join(paper.evaluations)
        parts.append(f"The columns, in their order:\n\n```\n{text}\n```")
        for recipe in paper.recipes:
            if recipe.asked:
                text = "\n".join(f"{line} {recipe.asked}" for line in paper.evaluations)
                parts.append(f"The columns of {recipe.row}:\n\n```\n{text}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    write_text(PAGE, page())
