"""The rows of results/: which command lines `lab.reproduce` runs, and where a figure is in what they write."""

import statistics
from typing import NamedTuple

BDHS = ["--lr", "3e-4"]  # as bdhs.py --online
DEFAULT = "dpo-corrected"  # `python dpo.py`
YARDSTICKS = (DEFAULT, "dpo")  # the rows with which most claims compare another
# An annotator's corrections only remove text: at a higher rate the model would learn to say less.
CORRECTED = ["--lr", "5e-5"]
FAST = ["--lr", "2e-4"]  # where the chosen answers are no shorter than the truth
CONSTRUCTED = ("povid.json", "povid_seen.json")
# The base model's own answers, ranked by the oracle. Nothing is trained on them.
TEST = ["--test-data", "vlfeedback.jsonl"]
MIX = ["--mix", "0.5"]
BARE = ["--length-weight", "0"]
# Two epochs, so that half of the pairs are half of the steps, as in Li et al. 2024.
EPOCHS = ["--epochs", "2", *FAST]
RATINGS = ["--ratings", "ratings.jsonl"]
# Plain SFT from the base, with the settings of rejection_sampling.py and steerlm.py.
SFT = [
    *("--model", "@base", "--lora-rank", "16", "--lr", "4e-4", "--projector-lr", "0"),
    *("--steps", "230", "--batch-size", "16", "--grad-accum", "1", "--save-every", "0"),
]
# Five times as many steps, a higher rate, and another request: these three differ from the row before.
STEERED = ["--steps", "1200", "--lr", "1.5e-3", "--attributes", "complexity=2,verbosity=2"]
OTHER_BASE = ["--model", "@other-base", "--annotator", "oracle", "--max-new-tokens", "96"]
# As many answers an iteration as PPO.
RLOO = ["--advantage", "rloo", "--samples", "4", "--minibatches", "1"]
# 2,560 answers of the policy, as in PPO and RLOO: 640 prompts x 4, 80 x 16 x 2, 40 x 8 x 8.
FEW_DPO = ["--share", "0.2134"]
FEW_ONLINE = ["--steps", "80"]
FEW_GRPO = ["--steps", "40", "--batch-size", "8", "--reward", "annotator"]


class Row(NamedTuple):
    """One method.

    commands: (script, data, further flags), one after the other. data: files of the toy world, or None for the
    preferences.json of the command before. Flags: "@row" is that row's run folder, "@base" the base model, "@other-base"
    that of the next seed, a name that ends in .jsonl a file of the toy world.
    """

    family: str
    name: str
    label: str  # in the chart, below the family's name
    commands: list


FAMILIES = {
    "offline": "Offline: DPO, IPO, SLiC, MPO and mDPO on given pairs",
    "bdhs": "BDHS and POVID: the model's own biased completions",
    "online": "Online and mixed DPO: the model's own answers, ordered",
    "rl": "Reinforcement learning: PPO, RLOO and GRPO",
    "judged": "The same judged answers, used in four ways (Li et al. 2024)",
    "reward": "Reward models",
}
ROWS = {
    "dpo": Row("offline", "DPO, corrupted truth", "corrupted truth", [
        ("dpo.py", "povid.json", FAST)]),
    "dpo-seen": Row("offline", "DPO, corrupted truth, images seen in SFT", "images seen in SFT", [
        ("dpo.py", "povid_seen.json", FAST)]),
    "dpo-corrected": Row("offline", "DPO, corrected samples (default)", "corrected samples (default)", [
        ("dpo.py", "rlhf_v.jsonl", [])]),
    "dpo-ranked": Row("offline", "DPO, ranked samples", "ranked samples", [
        ("dpo.py", "vlfeedback.jsonl", CORRECTED)]),
    "ipo": Row("offline", "IPO with sums, corrected samples", "IPO with sums", [
        ("dpo.py", "rlhf_v.jsonl", ["--loss", "ipo_sum", "--beta", "0.5", *CORRECTED])]),
    "ipo-mean": Row("offline", "IPO, corrected samples", "IPO", [
        ("dpo.py", "rlhf_v.jsonl", ["--loss", "ipo", "--beta", "0.5", *CORRECTED])]),
    "slic": Row("offline", "SLiC, corrected samples", "SLiC, corrected samples", [
        ("dpo.py", "rlhf_v.jsonl", ["--loss", "slic", "--beta", "0.5", *CORRECTED])]),
    "dpo-imageless": Row("offline", "DPO, corrupted truth, without the images", "without images", [
        ("dpo.py", "povid_imageless.json", FAST)]),
    "mpo": Row("offline", "MPO, corrupted truth", "MPO", [("mpo.py", "povid.json", [])]),
    "mdpo": Row("offline", "mDPO, corrupted truth", "mDPO", [("mdpo.py", "povid.json", [])]),
    "bdhs": Row("bdhs", "BDHS, offline", "BDHS, offline", [
        ("bdhs.py", "povid.json", []), ("dpo.py", None, BDHS)]),
    "bdhs-online": Row("bdhs", "BDHS, online", "BDHS, online", [
        ("bdhs.py", "povid.json", ["--online"])]),
    "bdhs-noise": Row("bdhs", "BDHS, noise instead of the mask", "noise instead of the mask", [
        ("bdhs.py", "povid.json", ["--rho", "0", "--noise-steps", "500"]), ("dpo.py", None, BDHS)]),
    "mask-only": Row("bdhs", "BDHS, mask without guidance", "mask, no guidance", [
        ("bdhs.py", "povid.json", ["--no-guidance"]), ("dpo.py", None, BDHS)]),
    "guidance-only": Row("bdhs", "BDHS, guidance without mask", "guidance, no mask", [
        ("bdhs.py", "povid.json", ["--rho", "0"]), ("dpo.py", None, BDHS)]),
    "povid": Row("bdhs", "POVID: image distortion + corrupted truth", "POVID", [
        ("povid.py", "povid.json", ["--gamma", "0.5"])]),
    "reward": Row("reward", "reads facts", "", [("reward_model.py", CONSTRUCTED, TEST)]),
    "reward-plain": Row("reward", "plain", "", [
        ("reward_model.py", CONSTRUCTED, ["--no-facts", *TEST])]),
    "online": Row("online", "Online DPO, the oracle annotates", "online, oracle", [
        ("online_dpo.py", "rlhf_v.jsonl", [])]),
    "online-povid": Row(
        "online", "Online DPO, the oracle annotates, prompts of corrupted truth",
        "online, oracle, other prompts", [("online_dpo.py", "povid.json", [])]),
    "online-few": Row("online", "Online DPO, the oracle annotates, 2,560 answers", "online, 2,560 answers", [
        ("online_dpo.py", "povid.json", FEW_ONLINE)]),
    "mixed": Row("online", "Mixed-DPO, with corrupted truth", "mixed, corrupted truth", [
        ("online_dpo.py", "povid.json", MIX)]),
    "mixed-corrected": Row("online", "Mixed-DPO, with corrected samples", "mixed, corrected samples", [
        ("online_dpo.py", "rlhf_v.jsonl", MIX)]),
    "online-reward": Row("online", "Online DPO, factual reward model annotates", "online, reward model", [
        ("online_dpo.py", "rlhf_v.jsonl", ["--annotator", "@reward"])]),
    "ppo": Row("rl", "PPO, factual reward model (Fact-RLHF)", "PPO, factual (Fact-RLHF)", [
        ("ppo.py", "povid.json", ["--reward-model", "@reward"])]),
    "ppo-plain": Row("rl", "PPO, plain reward model, no length term", "PPO, plain, no length term", [
        ("ppo.py", "povid.json", ["--reward-model", "@reward-plain", *BARE])]),
    "ppo-plain-length": Row("rl", "PPO, plain reward model", "PPO, plain", [
        ("ppo.py", "povid.json", ["--reward-model", "@reward-plain"])]),
    "ppo-oracle": Row("rl", "PPO, the oracle rewards, no length term", "PPO, oracle", [
        ("ppo.py", "povid.json", ["--reward-model", "oracle", *BARE])]),
    "rloo": Row("rl", "RLOO, factual reward model", "RLOO, factual", [
        ("ppo.py", "povid.json", ["--reward-model", "@reward", *RLOO])]),
    "grpo": Row("rl", "GRPO, exact answers and the oracle", "GRPO", [
        ("grpo.py", ("questions.jsonl", "povid.json"), [])]),
    "grpo-dr": Row("rl", "Dr. GRPO, exact answers and the oracle", "Dr. GRPO", [
        ("grpo.py", ("questions.jsonl", "povid.json"), ["--variant", "dr_grpo"])]),
    "grpo-few": Row("rl", "GRPO, the oracle rewards, 2,560 answers", "GRPO, 2,560 answers", [
        ("grpo.py", "povid.json", FEW_GRPO)]),
    "judged-sft": Row("judged", "SFT on the data's own answers", "SFT, data's answers", [
        ("sft.py", "reference.json", SFT)]),
    "judged-best": Row("judged", "Rejection sampling", "rejection sampling", [
        ("rejection_sampling.py", "ratings.jsonl", [])]),
    "judged-steerlm": Row("judged", "SteerLM, asked for the best", "SteerLM", [
        ("steerlm.py", "ratings.jsonl", [])]),
    "judged-steerlm-long": Row("judged", "SteerLM, five times as many steps, higher rate, asked for short answers", "SteerLM, longer", [
        ("steerlm.py", "ratings.jsonl", STEERED)]),
    "judged-dpo": Row("judged", "DPO on the judged answers", "DPO", [
        ("dpo.py", "preferences.json", EPOCHS)]),
    "judged-few": Row("judged", "DPO on 2,560 judged answers", "DPO, 2,560 answers", [
        ("annotate.py", (), [*RATINGS, *FEW_DPO]), ("dpo.py", None, FAST)]),
    **{
        f"judged-share-{share}": Row("judged", f"DPO, {share} % of the prompts", f"{share} % of the prompts", [
            ("annotate.py", (), [*RATINGS, "--share", str(share / 100)]), ("dpo.py", None, EPOCHS)])
        for share in (25, 50, 75)
    },
    **{
        f"judged-flip-{flip}": Row("judged", f"DPO, {flip} % of the pairs exchanged", f"{flip} % exchanged", [
            ("annotate.py", (), [*RATINGS, "--flip", str(flip / 100)]), ("dpo.py", None, EPOCHS)])
        for flip in (25, 50, 75)
    },
    "judged-transfer": Row("judged", "DPO on another seed's base's answers", "another base's answers", [
        ("annotate.py", "povid.json", OTHER_BASE), ("dpo.py", None, EPOCHS)]),
}  # fmt: skip
# Beside each other at equal numbers of answers and of seconds: row -> who says what is better, and how many answers the
# policy draws (`judged-few`: drew before training).
EQUAL = {
    "dpo": ("the data", 0),
    "judged-few": ("oracle", 2_560),
    "online-few": ("oracle", 2_560),
    "ppo-oracle": ("oracle", 2_560),
    "grpo-few": ("oracle", 2_560),
    "ppo": ("reward model, length", 2_560),
    "rloo": ("reward model, length", 2_560),
    "online-povid": ("oracle", 7_360),
    "grpo": ("exact answers, oracle", 28_800),
}
FIGURES = {  # column: where it is in {"pope":, "chair":, "text":}
    "POPE random": ("pope", "random", "accuracy"),
    "POPE popular": ("pope", "popular", "accuracy"),
    "POPE adversarial": ("pope", "adversarial", "accuracy"),
    "yes ratio (adv.)": ("pope", "adversarial", "yes_ratio"),
    "CHAIR_s": ("chair", "chair_s"),
    "CHAIR_i": ("chair", "chair_i"),
    "recall": ("chair", "recall"),
    "words": ("chair", "length"),
    "text": ("text", "mean"),
}


def figure(result, place):
    """The number at a place of {"pope", "chair", "text"}."""
    for key in place:
        result = result[key]
    return result


def comparable(cells):
    """Of the cells {row: {seed: summary}} those of rows that have all seeds of YARDSTICKS."""
    seeds = set.intersection(*(set(cells.get(row, {})) for row in YARDSTICKS))
    return {
        row: {seed: by_seed[seed] for seed in sorted(seeds, key=int)}
        for row, by_seed in cells.items()
        if seeds and seeds <= by_seed.keys()
    }


def policies(cells):
    """Those of the cells {row: {seed: summary}} whose row trains a policy."""
    return {row: by_seed for row, by_seed in cells.items() if ROWS[row].family != "reward"}


def bases(cells):
    """The base model's evaluation {seed: result}."""
    return {seed: cell["before"] for row in policies(cells).values() for seed, cell in row.items()}


def after(cells, row, column):
    """A row's figures after training, one a seed."""
    return [figure(cell["after"], FIGURES[column]) for cell in cells[row].values()]


def changes(cells, row, column):
    """Differences to the base of the same seed, one a seed."""
    place = FIGURES[column]
    return [figure(c["after"], place) - figure(c["before"], place) for c in cells[row].values()]


def mean(values):
    """Arithmetic mean; a name shorter than the library's for lines full of numbers."""
    return statistics.fmean(values)
