"""What the papers claim, and what results/results.json says about it.

Every number of the toy world below is computed from results.json, and so is every verdict: a claim is a list of conditions on
the seeds' figures. The papers' numbers are typed from their tables. The texts are Markdown, for `lab.pages`.
"""

import json
import re
import statistics
from pathlib import Path
from typing import NamedTuple

from lab.rows import DEFAULT, FIGURES, after, bases, changes, figure, mean

AMIRLOO = "Amirloo et al. 2024: data, online DPO, BDHS, RL"
LI = "Li, Lin, Pei 2024: preferences against the loss of text abilities"
SUN = "Sun et al. 2023: Fact-RLHF"
SIGHT = Path(__file__).parents[1] / "results" / "sight.json"
SIDES = (144, 12, 0)  # pixels of the pictures of lab.sight
MDPO = "F. Wang et al. 2024: mDPO"
MPO = "W. Wang et al. 2024: MPO"
GROUPS = "Yu et al. 2025, Liu et al. 2025: DAPO and Dr. GRPO"

INTRODUCTION = """# Results in the toy world: all rows, all claims

`python -m lab.reproduce --report` wrote this page from `results.json`. Do not edit it by hand; its texts are in `lab/claims.py`.
Terms are explained in the [README](../README.md).

**How it was made.** `python -m lab.reproduce` ran the methods below, on as many seeds as the table says. A seed sets the world, the
base model and the run. What a claim needs and is not there yet leaves the claim open. `--only ROW` picks rows. A base whose accuracy on
random questions about pictures that are not tested is below .92 is trained on (`lab/toy.py`): here that of seed 2, from .90 to .93.

**How to read the table.** Mean ± standard deviation over seeds. In brackets: the mean difference to the base of the same seed.
For one seed the 95 % half-width is .03 for CHAIR_s (1000 captions) and for POPE accuracy (804 questions a split).

**Settings.** DPO runs take 230 steps of 16 pairs; those on judged answers two epochs, about as many steps where all pairs are taken.

| data or method | learning rate |
|---|---|
| "samples": the base model's own answers, corrected (the default) or ranked by the oracle | 5e-5 |
| corrupted truth, and the judged answers | 2e-4 |
| the BDHS family and POVID | 3e-4 |
| online and mixed DPO | 1e-4 |
| PPO and RLOO: 40 iterations of 64 answers | 3e-4 |
| GRPO: 150 iterations of 192 answers | 5e-4 |
| SFT, rejection sampling and SteerLM on the judged answers' prompts: 230 steps of 16 answers | 4e-4 |
| SteerLM, longer: 1,200 steps | 1.5e-3 |

The default's settings were chosen on seeds 1 and 2, those of GRPO on seed 1; the others on scenes of another world, with an earlier base whose LLM could not read.

## All rows"""

CHARTS = """![CHAIR_s against the change in recall, one panel for each family of methods](chart.png)

The same for the hard yes/no questions.

![CHAIR_s against the change in adversarial POPE accuracy](chart_pope.png)"""

HOW_TO_READ = """Each claim says what the paper reports, what happens here, and whether it holds.

- "On every seed" means the same direction in all paired comparisons. Between two equal methods that happens by chance in one
  comparison of two with one seed, of four with three. So "holds" is evidence for a direction, not a proof, and it says nothing about
  the size on real data.
- The papers use benchmarks with a GPT judge (LLaVA-Bench, MMHal, MM-Vet) for the quality of open answers. Here recall stands in:
  the share of present objects that a caption mentions.
- Papers' columns: POPE accuracy or F1, MMHal and its variant with images MMHal-V (0 to 6), LLaVA-W = LLaVA-Bench in the Wild, Recall =
  object recall on COCO. Li et al.'s numbers are from their poster, most of Sun et al.'s from transcriptions of their tables. The papers report single runs. Amirloo et al.'s own repeated rows differ by up to 2 points of LLaVA-W and .1 of MMHal."""

REWARD_MODELS = """Trained on truth against corrupted truth (`povid.json` and `povid_seen.json`). Accuracy is on pairs whose images were held
out; `vlfeedback.jsonl` holds ranked samples of the base, on which nothing was trained. The last two columns compare: how often the
longer answer is the chosen one, and how often the reward model scores it higher."""

SAMPLED = """First fifth of the steps → last fifth, means over seeds. Reward r includes the length term. Tokens are those of the
answers drawn."""

SEED_BY_SEED = """`python dpo.py --seed N` and `python ppo.py --seed N`, also on seeds that no other row has. In brackets: points, of words percent.
The base of seed 5 was built, and its default run, after the default and the rule of the bases stood. Another number of threads rounds
otherwise: its LLM and base trained on two threads, the default gains 5.5 points there for 3.8 of recall."""

EQUAL = """Answers are those that the policy draws in training; those of "DPO on 2,560 judged answers" are the base's, drawn before.
CPU seconds are of one thread, for training with its reference pass, sampling and scoring (drawing and rating answers before is not in them), means over the
seeds on which they were measured. The machine was busy: they compare methods, and are longer than on an idle one. For equal seconds compare rows with about as many."""

FITS = """Flags are those beside a script's defaults. A prompt is a photograph of 640 x 480 and 45 tokens of text; answers are
of 100 tokens, in PPO of its `--max-new-tokens` (896), in online DPO of 256. bfloat16, LoRA rank 128, in PPO and the reward model 64.

- **GiB, computed**: the peak of the command by `memory.py`, which counts from shapes; scripts that train, and bdhs.py, print it for your data before it
  reads weights. Scripts that sample need at least this, and use what else is free for answers at a time (POPE, CHAIR, BDHS, PPO).
- **a step alone, measured**: one micro-batch, no gradients of others beside it, on an H200 (`gpu.json`). Of every such step the count
  is within 3 %, and so is sampling within 8 % (`tests/test_memory.py`).
- **minutes**: RLHF-V's 5,733 pairs, three epochs, from the measured seconds of a step; reference pass and evaluation come on top.
- **fits**: the smallest of 24, 48 and 80 GB that holds it with 5 % and 1 GiB to spare.

An annotator of 34 B parameters (`online_dpo.py`'s default, the paper's) takes 65 GiB of its own: `--annotator-device cuda:1`, or
`--annotator endpoint` with a server. Full tuning of a 7B model takes 108 GB before activations."""

REST = """## What BDHS writes

Dark patches are hidden from attention, `|` is the cut, red words are not in the true answer.

![Images with what the model could see, the cut true answer and the completed one](negatives.png)

## More about speed

The README's table is of `python -m lab.bench --only step step-bfloat16 --json results/bench.json`: LoRA DPO steps of a LLaVA-shaped
model with random weights (62 M parameters, 576 image tokens, vocabulary 32064, 4 pairs, float32, one thread of a Xeon). Each
method runs in a process of its own. The script stops unless all of them agree in loss and log-probs. Our time includes the one
reference pass, spread over one epoch and over three; three is the fewest of the papers' DPO runs. Cells are the median of three
rounds (least - most). Ratios are taken within a round.

- The ratio depends on the state of the machine, and TRL's steps depend on it more than ours. In seven earlier rounds, most while
  the other core was training, TRL took 30 to 39 s, ours 7.8 to 10.1, and the ratio over one epoch was 3.1 to 5.0.
- On one H200, 7B-shaped models with random weights (`python -m lab.bench --device cuda`, `gpu.json`): the table in the main README.
  The plain way ran with PyTorch's default kernels. Ours ran without cuDNN's attention, whose gradients were wrong after a shared
  prompt (cosine .61 to .91 with those of float32); with it, most of our steps were 5 to 13 % faster.
- On that GPU a step of decoding is recorded once, as a CUDA graph, and replayed: 128 tokens of 8 greedy answers take 1.71 s, of 32
  2.85 s, of 4 drawn answers to each of 8 prompts 2.26 s. transformers' own `generate` takes 4.0, 3.0 and 3.4 times as long: it waits
  for thousands of kernel launches a token, not for arithmetic. On a base in 4 bits 8 answers take 8.2 s: every step unpacks all weights.
  BDHS negatives: .092 s an answer where every sentence shares one prefill, .187 s where each has its own. An iteration of PPO (32
  answers of 128 tokens, all networks of 7B shape) takes 15.0 s, 2.9 of them sampling; of GRPO (4 prompts x 8 answers of 64 tokens)
  1.7 s, where TRL's `GRPOTrainer` takes 5.0 times as long.
- `dpo.py`, `bdhs.py`, `sample.py` with an adapter and `eval_pope.py` also ran there as a user runs them, on a checkpoint of 7B shape on
  disk (13.3 GB, random weights) and nine photographs.
- Negatives of `bdhs.py` in the toy world: 54 answers a second on one thread, 18 s for 1000. At the shape above (`--only negatives`,
  five sentences an answer, two rounds): .95 to 1.0 CPU s for one answer and one try. With a prefill of prompt and image for each
  sentence it is 2.9 to 3.4. These figures are not in `bench.json`.
- POPE at that shape (`--only pope`: 576 image tokens, six questions about each of five pictures, two new tokens a question, float32,
  one thread, three rounds on a loaded EPYC) took .090 CPU s a question as the evaluations ask, and 5.5 (5.4 - 5.6) times as long one
  by one with transformers' `generate`.
- GRPO at that shape (`--only grpo`: 8 answers of 64 tokens to each of 4 prompts, one update, float32, one thread, two rounds on a loaded
  EPYC) took 18.4 CPU s an iteration and 2434 MiB beside the weights; TRL's `GRPOTrainer` with transformers' sampling 9.2 (8.8 - 9.7)
  times as long and 4.6 (4.5 - 4.7) times the memory. There every answer has a copy of prompt and image.

## What is tested, and how

Public layouts are checked with files written by hand with each layout's traps (`tests/data`: exact records and refusals are
asserted), with parquet and tsv files made in the tests (also by `datasets`), and with real photographs (four layouts give the same
log-probs, equal to transformers'). None of the large public files was at hand.

| layout | checked with |
|---|---|
| RLHF-V, VLFeedback | by hand, made, photographs |
| POVID, LLaVA-RLHF | by hand, photographs |
| RLAIF-V, HelpSteer, HelpSteer2, TRL | by hand, made |
| LLaVA-Instruct, mllm-dpo, MMPR, SeVa, HA-DPO, mDPO | by hand |

On tiny random weights, logits are within 1e-5 of transformers' own classes for Llama, Mistral, Qwen2 and Qwen3 (LLaVA-NeXT with
nine image shapes). Greedy answers equal theirs token for token. Adapters load in PEFT, merged checkpoints with `AutoProcessor`:
`tests/test_checkpoints.py`, `tests/test_llava_next.py`. Images inside a parquet file are unpacked once, to `.cache/`. Memory follows the row
group, not the file: 160 MB of images in groups of 10 MB stay below 100 MB (`tests/test_layouts.py`).

What runs survive, by `python tests/trust.py --most 300 --executions 50000 --seed 1` (a quarter of an hour), and what the
tests notice, by `python tests/mutants.py --sample 300 --seed 4`:

| what | how many | of them | how many |
|---|---|---|---|
| runs of 20 kinds, ended at any moment, at a change of a file, on a disk that fills up, or by a signal | 241 | went on bit for bit | 241 |
| runs on a disk that is full or read-only | 120 | said so in a sentence, left no half file | 120 |
| bad data, pictures, checkpoints, run folders, flags | 2254 | refused in a sentence | 1734 |
| | | still good, and accepted | 520 |
| executions of a coverage-guided fuzz run | 150000 | findings | 0 |
| faults in a copy of the code that can change a result | 299 | noticed by a test | 294 |

50,000 steps of `dpo.py` keep memory and seconds within 2 % (`tests/long_run.py`, `long_run.json`)."""


SHARES = ("judged-share-25", "judged-share-50", "judged-share-75", "judged-dpo")
FEW = ("judged-few", "online-few", "ppo-oracle", "grpo-few")
FLIPS = ("judged-dpo", "judged-flip-25", "judged-flip-50", "judged-flip-75")
UNFIT = 'SteerLM fell apart here ("What else the rows show"), so the verdict leaves it out. '


class Claim(NamedTuple):
    """A claim of a paper: its sentence, what the paper reports, what happens here, the verdict's line.

    The last two are functions until `measured` calls them.
    """

    paper: str
    sentence: str
    reported: str
    here: str
    verdict: str


def measured(claim):
    """The claim with its last two texts; open where a row that they tell of is not there yet."""
    try:
        return claim._replace(here=claim.here(), verdict=claim.verdict())
    except KeyError as row:
        return claim._replace(here=f"the row {row} is not measured yet.", verdict="**Open.**")


def told(texts):
    """The texts that these functions give, without those that tell of a row that is not there yet."""
    found = []
    for text in texts:
        try:
            found.append(text())
        except KeyError:
            continue
    return found


def verdict(*conditions):
    """Parts of a claim (true here?) -> its line."""
    if all(conditions):
        return "**Holds here.**"
    return "**Holds in part.**" if any(conditions) else "**Does not hold here.**"


def sight():
    """What `python -m lab.sight` measured: {cell: figures}; KeyError without it."""
    if not SIGHT.exists():
        raise KeyError("lab.sight")
    return json.loads(SIGHT.read_text())


def by_seed(found, name):
    """The figures of a cell of lab.sight, {} being the seed in its name, one a seed.

    Of the seeds that have all cells that a claim compares; KeyError without any.
    """
    sights = [f"accuracy/{{}}/{side}/{kind}" for side in SIDES for kind in ("facts", "plain")]
    together = ["tuning/{}/plus", "tuning/{}/plain"] if name.startswith("tuning") else sights
    whole = [n for n in range(10) if all(cell.format(n) in found for cell in together)]
    if not whole:
        raise KeyError(f"{name.format('N')} of lab.sight")
    return [found[name.format(n)] for n in whole]


def gains_of_facts(found, side):
    """Accuracy with facts less that without, one a seed, on pictures of this many pixels."""
    facts, plain = (by_seed(found, f"accuracy/{{}}/{side}/{kind}") for kind in ("facts", "plain"))
    return [a - b for a, b in zip(facts, plain)]


def told_of_sight(found):
    """The base's sight and both accuracies, from the best sight to none."""
    texts = []
    for side in SIDES:
        facts, plain = (
            by_seed(found, f"accuracy/{{}}/{side}/{kind}") for kind in ("facts", "plain")
        )
        gains = ", ".join(signed(100 * gain) for gain in gains_of_facts(found, side))
        texts.append(
            f"{mean(facts):.3f} with facts against {mean(plain):.3f} plain (by seed {gains} points) where the base sees {side} pixels "
            f"(POPE random {mean(by_seed(found, f'sight/{{}}/{side}')):.3f})"
        )
    return (
        f"pairs of captions, one of them with a wrong colour, number or place: {'; '.join(texts)}. "
        "0 pixels are one grey: there the plain model has only habits of the texts, and the factual one can only read. The curve: [sight.png](sight.png)."
    )


def tuned(found, base, name):
    """A figure of a way of visual tuning, one a seed: a split of POPE, or a name in `lab.sight.abilities`."""
    return [
        f["pope"][name] if name in f["pope"] else f[name]
        for f in by_seed(found, f"tuning/{{}}/{base}")
    ]


def told_of_tuning(found):
    """What yes/no and multiple-choice rows add to visual tuning."""

    def told_of(name):
        """Means without and with these rows, and the gain of each seed."""
        plain, plus = (tuned(found, base, name) for base in ("plain", "plus"))
        gains = ", ".join(signed(100 * (b - a)) for a, b in zip(plain, plus, strict=True))
        return f"{mean(plain):.3f} → {mean(plus):.3f} (by seed {gains} points)"

    return (
        "visual tuning on captions and open questions → with yes/no and multiple-choice questions of the same pictures besides: "
        f"POPE random {told_of('random')}, adversarial {told_of('adversarial')}, multiple choice {told_of('choice')}, CHAIR_s {told_of('chair_s')}, text score {told_of('text')}. Captions are in both."
    )


def untested(reason):
    """The line of a claim that no row is about."""
    return f"**Cannot be tested here:** {reason}"


def signed(points):
    """A change with one decimal and its sign; 0.0 without."""
    return re.sub(r"^[+-](?=0\.0$)", "", f"{points:+.1f}")


class Figures:
    """Short names for the numbers in the sentences below."""

    def __init__(self, cells):
        self.cells = cells

    def chair(self, row):
        """The row's mean CHAIR_s."""
        return f"{mean(after(self.cells, row, 'CHAIR_s')):.3f}"

    def value(self, row, column):
        """The row's mean in a column."""
        return f"{mean(after(self.cells, row, column)):.3f}"

    def list(self, rows, column):
        """The rows' means, one after the other."""
        return " / ".join(self.value(row, column) for row in rows)

    def logged(self, row, name):
        """A logged figure, first fifth -> last fifth of the steps, means over seeds."""
        logs = [cell["log"][name] for cell in self.cells[row].values()]
        return " → ".join(f"{mean(log[part] for log in logs):.2f}" for part in (0, 1))

    def ends(self, row, name):
        """A logged figure: (first fifth, last fifth of the steps), one a seed."""
        return [tuple(cell["log"][name]) for cell in self.cells[row].values()]

    def spread(self, row, column):
        """Mean and standard deviation over seeds."""
        values = after(self.cells, row, column)
        apart = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{mean(values):.3f}{apart}"

    def words(self, row):
        """The row's mean number of words of a caption."""
        return f"{mean(after(self.cells, row, 'words')):.1f}"

    def lengths(self, rows):
        """The rows' mean numbers of words, one after the other."""
        return " / ".join(self.words(row) for row in rows)

    def lost_to_pictures(self):
        """How much of the LLM's text score visual tuning took, one a seed."""
        before = [cell["before"]["text"]["mean"] for cell in self.cells["judged-dpo"].values()]
        shares = [1 - base / llm for base, llm in zip(before, self.llm_scores(), strict=True)]
        return ", ".join(f"{100 * share:.0f} %" for share in shares)

    def base(self, column, digits=3):
        """The base's mean."""
        return f"{mean(figure(b, FIGURES[column]) for b in bases(self.cells).values()):.{digits}f}"

    def llm_scores(self):
        """The text score of the LLM before visual tuning, one a seed."""
        return [cell["llm"]["mean"] for cell in self.cells["judged-dpo"].values()]

    def llm(self):
        return f"{mean(self.llm_scores()):.3f}"

    def above_llm(self):
        """The four methods whose text score is above the LLM's on every seed."""
        return [
            row
            for row in ("judged-sft", "judged-steerlm", "judged-best", "judged-dpo")
            if all(x > y for x, y in zip(after(self.cells, row, "text"), self.llm_scores()))
        ]

    def change(self, row, column):
        """Mean change to the base in percentage points, with its sign."""
        return signed(100 * mean(changes(self.cells, row, column)))

    def loss(self, row):
        """By how many percentage points does recall fall?"""
        return f"{-100 * mean(changes(self.cells, row, 'recall')):.1f}"

    def seeds(self, row, column):
        """Changes to the base in percentage points, one a seed."""
        return ", ".join(signed(100 * c) for c in changes(self.cells, row, column))

    def recall(self, row):
        return self.change(row, "recall")

    def hard(self, row):
        return self.change(row, "POPE adversarial")

    def both(self, row):
        """CHAIR_s and the change of recall."""
        return f"CHAIR_s {self.chair(row)}, recall {self.recall(row)} points"

    def count(self, a, b, column):
        """On how many seeds has row a a higher figure than row b?"""
        pairs = zip(after(self.cells, a, column), after(self.cells, b, column))
        return sum(x > y + 1e-12 for x, y in pairs)

    def every(self, a, b, column):
        """Is row a's figure higher than row b's on every seed?"""
        return self.count(a, b, column) == len(self.cells[a])

    def cut(self, row, column="CHAIR_s"):
        """By how many percent of the base's figure does a row lower it?"""
        place = ("chair", "length") if column == "words" else ("chair", "chair_s")
        start = mean(figure(b, place) for b in bases(self.cells).values())
        return f"{-100 * mean(changes(self.cells, row, column)) / start:.0f} %"

    def part(self, row, of, column):
        """A row's change as a percentage of another row's."""
        return f"{100 * mean(changes(self.cells, row, column)) / mean(changes(self.cells, of, column)):.0f} %"

    def held(self, row, file):
        """A reward model's accuracies on held-out pairs of a file, one a seed."""
        return [
            next(
                h["accuracy"] for path, h in c["after"]["reward"].items() if Path(path).name == file
            )
            for c in self.cells[row].values()
        ]

    def accuracy(self, row, file):
        return f"{mean(self.held(row, file)):.3f}"


def claims(cells):
    """All testable claims of the papers, in the papers' order."""
    f, n = Figures(cells), len(cells[DEFAULT])
    of = lambda a, b, column: f"{f.count(a, b, column)} of {n} seeds"
    falling = lambda values: all(a > b for a, b in zip(values, values[1:]))
    higher = lambda values, others: all(a > b for a, b in zip(values, others))
    gains = lambda a, b, column: f.every(a, b, column)  # higher on every seed
    less = lambda a, b: f.every(b, a, "CHAIR_s")  # fewer hallucinations on every seed
    between = lambda row, a, b, column: (
        sorted((mean(after(cells, r, column)), r) for r in (row, a, b))[1][1] == row
    )
    files = ("povid.json", "povid_seen.json", "vlfeedback.jsonl")
    ends = lambda row, name: ", ".join(f"{a:.2f} → {b:.2f}" for a, b in f.ends(row, name))
    last = lambda row, name: [end for _, end in f.ends(row, name)]
    found = [
        Claim(
            AMIRLOO,
            "Offline DPO on corrupted answers lowers hallucination and costs open-ended quality. Online DPO does the reverse. Mixed-DPO lies between or is the best of both.",
            "POVID data, base → offline / online / mixed: POPE 86.40 → 88.09 / 86.49 / 88.03, Recall 68.13 → 73.48 / 68.45 / 74.53, "
            "LLaVA-W 80.85 → 78.63 / 82.61 / 82.75.",
            lambda: (
                f"on the same prompts, offline: {f.both('dpo')}, adversarial accuracy {f.hard('dpo')}. Online: {f.both('online-povid')}, {f.hard('online-povid')}. "
                f"Mixed: {f.both('mixed')}, {f.hard('mixed')}. Online keeps more recall than offline on {of('online-povid', 'dpo', 'recall')} and gains less "
                f"adversarial accuracy on {of('dpo', 'online-povid', 'POPE adversarial')}. Here CHAIR_s falls online too."
            ),
            lambda: verdict(
                gains("online-povid", "dpo", "recall"),
                gains("dpo", "online-povid", "POPE adversarial"),
                between("mixed", "dpo", "online-povid", "recall"),
                between("mixed", "dpo", "online-povid", "CHAIR_s"),
            ),
        ),
        Claim(
            AMIRLOO,
            "Mixing adds nothing where online DPO is better than offline DPO everywhere.",
            "RLHF-V data, offline / online / mixed: POPE 83.86 / 85.40 / 85.57, LLaVA-W 70.58 / 79.66 / 78.46, Recall 64.26 / 68.13 / 67.82.",
            lambda: (
                f"on corrected samples, offline: {f.both('dpo-corrected')}. Online: {f.both('online')}. Mixed: {f.both('mixed-corrected')}. "
                f"Online keeps more recall than offline on {of('online', 'dpo-corrected', 'recall')}; its CHAIR_s is lower on {of('dpo-corrected', 'online', 'CHAIR_s')}. "
                f"Mixed has a lower CHAIR_s than online on {of('online', 'mixed-corrected', 'CHAIR_s')}, and less recall on {of('online', 'mixed-corrected', 'recall')}."
            ),
            lambda: verdict(
                gains("online", "dpo-corrected", "recall"),
                less("online", "dpo-corrected"),
                not (
                    less("mixed-corrected", "online")
                    and gains("mixed-corrected", "online", "recall")
                ),
            ),
        ),
        Claim(
            AMIRLOO,
            "A stronger annotator makes online DPO better.",
            "annotator LLaVA-1.6-7B → 34B (right on 81.88 → 93.90 % of RLHF-V's pairs): LLaVA-W 81.55 → 82.61, MMHal-V 2.72 → 2.94, Recall 67.40 → 68.45; POPE 86.54 → 86.49.",
            lambda: (
                f"the oracle is the strong annotator, the factual reward model the weak one. Weak → strong: CHAIR_s {f.chair('online-reward')} → {f.chair('online')}, "
                f"recall {f.recall('online-reward')} → {f.recall('online')} points, POPE random {f.change('online-reward', 'POPE random')} → {f.change('online', 'POPE random')} points. "
                f"Recall is higher with the oracle on {of('online', 'online-reward', 'recall')}, CHAIR_s lower on {of('online-reward', 'online', 'CHAIR_s')}."
            ),
            lambda: verdict(
                gains("online", "online-reward", "recall"), less("online", "online-reward")
            ),
        ),
        Claim(
            AMIRLOO,
            "Pairs of an answer and its subtle corruption are at least as good as ranked answers.",
            "VLFeedback 5k ranked → its chosen answers (those written by LLaVA) corrupted by GPT-4: POPE 86.31 → 87.52, MMHal 2.92 → 3.03, LLaVA-W 83.10 → 88.64, Recall 68.03 → 70.13.",
            lambda: f"corrupted truth: {f.both('dpo')}. Ranked samples: {f.both('dpo-ranked')}.",
            lambda: untested(
                "the two rows also differ in learning rate (2e-4, 5e-5), in images and in who wrote the chosen answers."
            ),
        ),
        Claim(
            AMIRLOO,
            "Prompts that the model has already seen in SFT are as good as new ones.",
            "corrupted VLFeedback, all prompts → only LLaVA's prompts: POPE 85.59 → 87.63, LLaVA-W 86.65 → 86.55, Recall 68.66 → 70.44, MMHal 3.39 → 2.85.",
            lambda: (
                f"DPO on corrupted truth, new images → images of SFT: CHAIR_s {f.chair('dpo')} → {f.chair('dpo-seen')}, adversarial accuracy {f.hard('dpo')} → {f.hard('dpo-seen')} points, "
                f"recall {f.recall('dpo')} → {f.recall('dpo-seen')} points."
            ),
            lambda: verdict(
                not less("dpo", "dpo-seen"),
                not gains("dpo", "dpo-seen", "recall"),
                not gains("dpo", "dpo-seen", "POPE adversarial"),
            ),
        ),
        Claim(
            AMIRLOO,
            "Chosen answers of a weaker model are not worse than GPT-4V's.",
            "corrupted VLFeedback, chosen by GPT-4V → by LLaVA-1.5-7B: POPE 86.78 → 87.52, LLaVA-W 86.77 → 88.64, Recall 69.08 → 70.13, MMHal 3.30 → 3.03.",
            lambda: (
                "chosen answers are the truth or the base model's own; there is no second model."
            ),
            lambda: untested("it needs chosen answers of two models."),
        ),
        Claim(
            AMIRLOO,
            "BDHS with the attention mask is better than BDHS with noise, and noise is better than POVID's image distortion.",
            "POVID-5k, mask / noise / POVID's distortion: LLaVA-W 86.33 / 84.53 / 80.15, MM-Vet 43.4 / 41.38 / 41.28, MMHal-V 2.71 / 2.48 / 2.64, POPE 88.75 / 88.60 / 88.33.",
            lambda: (
                f"mask: {f.both('bdhs')}. Noise: {f.both('bdhs-noise')}. POVID: {f.both('povid')}. The mask has a lower CHAIR_s than the noise on {of('bdhs-noise', 'bdhs', 'CHAIR_s')} "
                f"and more recall on {of('bdhs', 'bdhs-noise', 'recall')}; the noise a lower one than POVID, which also learns from the corrupted truth, on {of('povid', 'bdhs-noise', 'CHAIR_s')}."
            ),
            lambda: verdict(less("bdhs", "bdhs-noise"), less("bdhs-noise", "povid")),
        ),
        Claim(
            AMIRLOO,
            "Reference guidance matters.",
            "mask alone → mask and guidance: at rho .98 LLaVA-W 82.25 → 86.54, MMHal-V 2.25 → 2.68; at .99 86.08 → 86.33 and 2.51 → 2.71. Recall falls: 77.46 → 76.10 and 77.04 → 75.58.",
            lambda: (
                f"mask alone: {f.both('mask-only')}, adversarial accuracy {f.hard('mask-only')}. With guidance: {f.both('bdhs')}, {f.hard('bdhs')}. Guidance keeps more recall on "
                f"{of('bdhs', 'mask-only', 'recall')} and gains more adversarial accuracy on {of('bdhs', 'mask-only', 'POPE adversarial')}. "
                f"CHAIR_s is higher with it on {of('bdhs', 'mask-only', 'CHAIR_s')}."
            ),
            lambda: verdict(
                gains("bdhs", "mask-only", "recall"),
                gains("bdhs", "mask-only", "POPE adversarial"),
                less("bdhs", "mask-only"),
            ),
        ),
        Claim(
            AMIRLOO,
            "Online BDHS is better than offline BDHS.",
            "POVID-5k, offline → online: MMHal-V 2.71 → 2.99, MMHal 2.61 → 2.80, POPE 88.75 → 88.83; but LLaVA-W 86.33 → 85.03, Recall 75.58 → 74.09.",
            lambda: (
                f"offline → online: CHAIR_s {f.chair('bdhs')} → {f.chair('bdhs-online')}, recall {f.recall('bdhs')} → {f.recall('bdhs-online')} points, adversarial accuracy "
                f"{f.hard('bdhs')} → {f.hard('bdhs-online')} points. CHAIR_s is lower online on {of('bdhs', 'bdhs-online', 'CHAIR_s')}."
            ),
            lambda: verdict(
                less("bdhs-online", "bdhs"), gains("bdhs-online", "bdhs", "POPE adversarial")
            ),
        ),
        Claim(
            AMIRLOO,
            "A reward model trained on constructed pairs is below chance on other data, and RL with it collapses.",
            "trained on POVID, right on .99 of POVID's held-out pairs, on .24 (LLaVA-1.5-7B) or .34 (1.6-7B) of RLHF-V's, on .56 or .59 of VLFeedback's. PPO and RLOO with it are unstable; "
            "with a reward model of VLFeedback PPO reaches POPE 87.54, LLaVA-W 80.17.",
            lambda: (
                f"trained on corrupted truth, right on {f.accuracy('reward', 'vlfeedback.jsonl')} (with facts) and {f.accuracy('reward-plain', 'vlfeedback.jsonl')} (plain) of ranked samples of the base. "
                f"After PPO with either CHAIR_s is {f.chair('ppo')} and {f.chair('ppo-plain-length')}. Tested on ranked samples only; the paper's lowest figures are on corrected ones (RLHF-V)."
            ),
            lambda: verdict(
                all(v < 0.5 for v in f.held("reward", files[2]) + f.held("reward-plain", files[2])),
                any(
                    c >= 0
                    for r in ("ppo", "ppo-plain-length")
                    for c in changes(cells, r, "CHAIR_s")
                ),
            ),
        ),
        Claim(
            AMIRLOO,
            "IPO and SLiC are no worse than DPO, and better on open answers.",
            "POVID, DPO / IPO / SLiC: POPE 88.09 / 87.62 / 88.28, LLaVA-W 78.63 / 82.34 / 81.99, Recall 73.48 / 69.81 / 74.32, MM-Vet 40.60 / 43.99 / 41.51.",
            lambda: (
                f"on corrected samples, all at 5e-5, DPO: {f.both('dpo-corrected')}. SLiC: {f.both('slic')}; it stops at its margin; it keeps more recall on {of('slic', 'dpo-corrected', 'recall')}, "
                f"and its CHAIR_s is higher on {of('slic', 'dpo-corrected', 'CHAIR_s')}. IPO with sums over tokens (--loss ipo_sum): {f.both('ipo')}. IPO per token (--loss ipo), as its authors confirmed it: {f.both('ipo-mean')}, adversarial accuracy {f.hard('ipo-mean')} (DPO {f.hard('dpo-corrected')})."
            ),
            lambda: verdict(
                gains("slic", "dpo-corrected", "recall"),
                not less("dpo-corrected", "slic"),
                not less("dpo-corrected", "ipo"),
            ),
        ),
        Claim(
            LI,
            "DPO is better than rejection sampling, SteerLM and SFT at following text instructions, and only DPO exceeds the LLM that LLaVA began with.",
            "MT-Bench: Vicuna-1.5-13B 6.57, LLaVA-1.5-13B 5.99, SFT 5.01, SteerLM 5.70, rejection sampling 6.22, DPO 6.73. The answers' lengths (characters): base 935, SFT 775, SteerLM 883, rejection sampling 1042, DPO 1476.",
            lambda: (
                f"text score of the LLM before it saw pictures {f.llm()}, of the base {f.base('text')} (visual tuning took {f.lost_to_pictures()} of it, a seed each); SFT {f.spread('judged-sft', 'text')}, "
                f"SteerLM {f.spread('judged-steerlm', 'text')}, rejection sampling {f.spread('judged-best', 'text')}, DPO {f.spread('judged-dpo', 'text')}. DPO is above rejection sampling on "
                f"{of('judged-dpo', 'judged-best', 'text')} and above SFT on {of('judged-dpo', 'judged-sft', 'text')}, rejection sampling above SFT on {of('judged-best', 'judged-sft', 'text')}. "
                f"Above the LLM: DPO on {sum(x > y for x, y in zip(after(cells, 'judged-dpo', 'text'), f.llm_scores()))} of {n} seeds. {UNFIT}Words of a caption: base {f.base('words', 1)}, "
                f"SFT {f.words('judged-sft')}, SteerLM {f.words('judged-steerlm')}, rejection sampling {f.words('judged-best')}, DPO {f.words('judged-dpo')}. The prompts of the judged answers are about pictures, and no text task is among them."
            ),
            lambda: verdict(
                gains("judged-dpo", "judged-best", "text"),
                gains("judged-dpo", "judged-sft", "text"),
                gains("judged-best", "judged-sft", "text"),
                f.above_llm() == ["judged-dpo"],
            ),
        ),
        Claim(
            LI,
            "SFT on a teacher's answers hurts.",
            "LLaVA-1.5-13B → standard SFT: MT-Bench 5.99 → 5.01, LLaVA-Bench 73.1 → 63.7, POPE .859 → .850.",
            lambda: (
                f"the data's own answers are the truth, in the base's own style: text score {f.change('judged-sft', 'text')} points (a seed each {f.seeds('judged-sft', 'text')}), "
                f"adversarial accuracy {f.hard('judged-sft')} ({f.seeds('judged-sft', 'POPE adversarial')}), {f.both('judged-sft')}, {f.words('judged-sft')} words (base {f.base('words', 1)})."
            ),
            lambda: verdict(
                all(c < 0 for c in changes(cells, "judged-sft", "text")),
                all(c < 0 for c in changes(cells, "judged-sft", "POPE adversarial")),
            ),
        ),
        Claim(
            LI,
            "Rejection sampling is best on POPE.",
            "LLaVA-1.5-13B / SFT / SteerLM / rejection sampling / DPO: POPE .859 / .850 / .878 / .883 / .870.",
            lambda: (
                f"adversarial accuracy, base {f.base('POPE adversarial')}, SFT {f.spread('judged-sft', 'POPE adversarial')}, SteerLM {f.spread('judged-steerlm', 'POPE adversarial')}, "
                f"rejection sampling {f.spread('judged-best', 'POPE adversarial')}, DPO {f.spread('judged-dpo', 'POPE adversarial')}. Rejection sampling is above SFT on {of('judged-best', 'judged-sft', 'POPE adversarial')} "
                f"and above DPO on {of('judged-best', 'judged-dpo', 'POPE adversarial')}. {UNFIT}In captions: rejection sampling {f.both('judged-best')}, {f.words('judged-best')} words; DPO {f.both('judged-dpo')}, {f.words('judged-dpo')} words."
            ),
            lambda: verdict(
                gains("judged-best", "judged-sft", "POPE adversarial"),
                gains("judged-best", "judged-dpo", "POPE adversarial"),
            ),
        ),
        Claim(
            LI,
            "The gain grows with the number of pairs and shrinks with wrong labels.",
            "MT-Bench with 25 / 50 / 75 / 100 % of the pairs (read from a plot): 6.39 / 6.46 / 6.61 / 6.73. With 0 / 25 / 50 / 75 % of the pairs swapped: 6.73 / 6.35 / 6.26 / 5.99. "
            "Half of the pairs swapped carries no preference, yet that run is above the base (5.99).",
            lambda: (
                f"with 25 / 50 / 75 / 100 % of the prompts, two epochs each: CHAIR_s {f.list(SHARES, 'CHAIR_s')}, adversarial accuracy {f.list(SHARES, 'POPE adversarial')}, text score {f.list(SHARES, 'text')}, words {f.lengths(SHARES)}. "
                f"With 0 / 25 / 50 / 75 % of the pairs exchanged: CHAIR_s {f.list(FLIPS, 'CHAIR_s')}, adversarial accuracy {f.list(FLIPS, 'POPE adversarial')}, text score {f.list(FLIPS, 'text')}, words {f.lengths(FLIPS)}. Standard deviations are in the table of all rows."
            ),
            lambda: verdict(
                falling([mean(after(cells, r, "CHAIR_s")) for r in SHARES]),
                falling([-mean(after(cells, r, "CHAIR_s")) for r in FLIPS]),
                falling([mean(after(cells, r, "text")) for r in FLIPS]),
            ),
        ),
        Claim(
            LI,
            "Pairs that another model wrote also improve this one.",
            "LLaVA-1.5-7B → DPO on the 13B model's pairs: MT-Bench 5.87 → 6.23, MM-Vet 30.5 → 39.8.",
            lambda: (
                f"pairs of the answers of another seed's base to the same prompts: {f.both('judged-transfer')}, adversarial accuracy {f.hard('judged-transfer')} ({f.seeds('judged-transfer', 'POPE adversarial')}), {f.words('judged-transfer')} words; "
                f"its own pairs: {f.both('judged-dpo')}, {f.hard('judged-dpo')} ({f.seeds('judged-dpo', 'POPE adversarial')}), {f.words('judged-dpo')} words. Both models have one size."
            ),
            lambda: verdict(
                all(c < 0 for c in changes(cells, "judged-transfer", "CHAIR_s")),
                all(c > 0 for c in changes(cells, "judged-transfer", "POPE adversarial")),
            ),
        ),
        Claim(
            SUN,
            "A reward model that reads facts about the image is more accurate.",
            "accuracies are not reported. Fact-RLHF against RLHF without facts, both 7B with a 13B reward model: MMHal 1.8 → 2.1, LLaVA-Bench 93.4 → 94.1.",
            lambda: (
                "with facts against plain: "
                + ", ".join(
                    f"{f.accuracy('reward', x)} against {f.accuracy('reward-plain', x)} ({x})"
                    for x in files
                )
                + ". These runs are 1.4 epochs of captions and yes/no questions; four epochs of captions alone: the next claim."
            ),
            lambda: verdict(
                *(higher(f.held("reward", x), f.held("reward-plain", x)) for x in files),
            ),
        ),
        Claim(
            SUN,
            "Facts help most where the reward model sees badly.",
            "the reason why they are read; not measured.",
            lambda: told_of_sight(sight()),
            lambda: verdict(
                all(v > 0 for v in gains_of_facts(sight(), 0)),
                all(v > 0 for v in gains_of_facts(sight(), 12)),
                higher(gains_of_facts(sight(), 12), gains_of_facts(sight(), 144)),
            ),
        ),
        Claim(
            SUN,
            "Plain PPO makes answers longer and gains nothing; facts and a length term repair that.",
            "MMHal, 7B: SFT+ 1.8, RLHF 1.8, Fact-RLHF 2.1; LLaVA-Bench 86.3, 93.4, 94.1.",
            lambda: (
                f"plain PPO without the length term: {f.both('ppo-plain')}, {f.cut('ppo-plain', 'words')} fewer words. The reward models punish errors and not omissions, so the policy learns to "
                f"say less. With the length term: {f.both('ppo-plain-length')}, {f.cut('ppo-plain-length', 'words')} fewer words. With facts and the length term: {f.both('ppo')}, {f.cut('ppo', 'words')} fewer."
            ),
            lambda: verdict(
                all(c > 0 for c in changes(cells, "ppo-plain", "words")),
                gains("ppo", "ppo-plain", "recall"),
                gains("ppo-plain-length", "ppo-plain", "recall"),
            ),
        ),
        Claim(
            SUN,
            "A larger reward model helps a small policy.",
            "7B policy, reward model 7B → 13B: LLaVA-Bench 87.8 → 93.4; MMHal 1.8 → 1.8, MMBench 50.8 → 48.9.",
            lambda: "there is one size of model.",
            lambda: untested("it needs two sizes of model."),
        ),
        Claim(
            SUN,
            "Human-made question-answer data in SFT improves capability benchmarks.",
            "LLaVA-7B → SFT+ with VQA-v2, A-OKVQA and Flickr30k: MMBench 38.7 → 52.1, POPE F1 76.0 → 82.7.",
            lambda: told_of_tuning(sight()),
            lambda: verdict(
                higher(tuned(sight(), "plus", "random"), tuned(sight(), "plain", "random")),
                higher(
                    tuned(sight(), "plus", "adversarial"), tuned(sight(), "plain", "adversarial")
                ),
                higher(tuned(sight(), "plus", "choice"), tuned(sight(), "plain", "choice")),
            ),
        ),
        Claim(
            SUN,
            "Alignment costs a small policy abilities, and a large one not.",
            "SFT+ → Fact-RLHF, MMBench: 7B 52.1 → 51.4, 13B 57.5 → 60.1. POPE F1 falls in both: 82.7 → 81.5 and 82.8 → 81.9.",
            lambda: (
                f"PPO with the factual reward model changes POPE random by {f.change('ppo', 'POPE random')} and recall by {f.recall('ppo')} points."
            ),
            lambda: untested("there is one size of model."),
        ),
        Claim(
            MDPO,
            "DPO without the images is about as good as DPO.",
            'figure 1, MMHal: DPO on the same pairs without their images ("DPO (No Image)") scores about as DPO.',
            lambda: (
                f"the same pairs as text alone: CHAIR_s {f.spread('dpo-imageless', 'CHAIR_s')}, recall {f.spread('dpo-imageless', 'recall')}, adversarial accuracy {f.spread('dpo-imageless', 'POPE adversarial')}. "
                f"With the images: {f.spread('dpo', 'CHAIR_s')}, {f.spread('dpo', 'recall')}, {f.spread('dpo', 'POPE adversarial')}; the base {f.base('CHAIR_s')}, {f.base('recall')}, {f.base('POPE adversarial')}. "
                f"Without them CHAIR_s is higher on {of('dpo-imageless', 'dpo', 'CHAIR_s')}, recall lower on {of('dpo', 'dpo-imageless', 'recall')}, accuracy lower on {of('dpo', 'dpo-imageless', 'POPE adversarial')}."
            ),
            lambda: verdict(
                not less("dpo", "dpo-imageless"),
                not gains("dpo", "dpo-imageless", "recall"),
                not gains("dpo", "dpo-imageless", "POPE adversarial"),
            ),
        ),
        Claim(
            MDPO,
            "mDPO hallucinates less than DPO, and pays in recall.",
            "base / DPO / mDPO, LLaVA-1.5-7B: Object HalBench CHAIR_s 54.7 / 49.0 / 35.7, AMBER's cover 51.8 / 55.1 / 52.4. Bunny-3B: 43.0 / 44.3 / 27.0 and 75.6 / 74.1 / 67.4.",
            lambda: (
                f"CHAIR_s with DPO {f.spread('dpo', 'CHAIR_s')}, with mDPO {f.spread('mdpo', 'CHAIR_s')}: lower on {of('dpo', 'mdpo', 'CHAIR_s')}. Recall {f.spread('dpo', 'recall')} and {f.spread('mdpo', 'recall')}: lower on {of('dpo', 'mdpo', 'recall')}."
            ),
            lambda: verdict(less("mdpo", "dpo"), gains("dpo", "mdpo", "recall")),
        ),
        Claim(
            MPO,
            "With MPO the log-probs of the chosen answers do not fall; with DPO they do.",
            "it gives no log-probs. The likelihood of the chosen answers is there to hold them: M3CoT, direct answers / chains of thought, DPO 75.8 / 72.7, MPO 77.7 / 79.1.",
            lambda: (
                f"log pi(y+), first → last fifth of the steps, a seed each: DPO {ends('dpo', 'logps/chosen')}; MPO {ends('mpo', 'logps/chosen')}."
            ),
            lambda: verdict(
                all(a <= b for a, b in f.ends("mpo", "logps/chosen")),
                all(a > b for a, b in f.ends("dpo", "logps/chosen")),
            ),
        ),
        Claim(
            GROUPS,
            "More and more groups have no spread.",
            "DAPO, figure 3: the share of prompts whose answers are all right grows through the training; so it samples on.",
            lambda: (
                f"share of groups whose answers all have one reward, first → last fifth of the steps, a seed each: GRPO {ends('grpo', 'frac_reward_zero_std')}; Dr. GRPO {ends('grpo-dr', 'frac_reward_zero_std')}."
            ),
            lambda: verdict(
                all(a < b for a, b in f.ends("grpo", "frac_reward_zero_std")),
                all(a < b for a, b in f.ends("grpo-dr", "frac_reward_zero_std")),
            ),
        ),
        Claim(
            GROUPS,
            "Dr. GRPO's wrong answers are shorter at equal reward.",
            "Liu et al., figure 5: the reward is that of GRPO, wrong answers are much shorter.",
            lambda: (
                f"tokens of answers that the rule scores as wrong, first → last fifth of the steps, a seed each: GRPO {ends('grpo', 'completions/wrong_length')}; Dr. GRPO {ends('grpo-dr', 'completions/wrong_length')}. "
                f"Exact reward: {ends('grpo', 'rewards/exact/mean')}; {ends('grpo-dr', 'rewards/exact/mean')}. Afterwards GRPO: {f.both('grpo')}; Dr. GRPO: {f.both('grpo-dr')}. Answers to these questions are a word or a short sentence, so little can be saved."
            ),
            lambda: verdict(
                higher(
                    last("grpo", "completions/wrong_length"),
                    last("grpo-dr", "completions/wrong_length"),
                ),
                not higher(
                    last("grpo", "rewards/exact/mean"), last("grpo-dr", "rewards/exact/mean")
                ),
            ),
        ),
    ]
    return [measured(claim) for claim in found]


def findings(cells):
    """The README's three."""
    f = Figures(cells)
    return told(
        [
            lambda: (
                f"**Most hallucinations go, and the model still sees.** The default takes {f.cut(DEFAULT)} off CHAIR_s. It costs {f.loss(DEFAULT)} points of recall. "
                f"Answers have {f.cut(DEFAULT, 'words')} fewer words; most of the missing ones were about absent objects. Adversarial accuracy changes by {f.hard(DEFAULT)} points, "
                f"random accuracy by {f.change(DEFAULT, 'POPE random')}."
            ),
            lambda: (
                f"**BDHS needs no annotator.** As published it gets {f.part('bdhs', 'dpo', 'CHAIR_s')} of the reduction of CHAIR_s that the data's own pairs bring, for {f.loss('bdhs')} points of recall. "
                f"With guidance alone (sentences of y+ are completed with the whole image in view) it gets {f.part('guidance-only', 'dpo', 'CHAIR_s')} of that reduction for {f.loss('guidance-only')} points."
            ),
            lambda: (
                f"**A signal that punishes only what is wrong teaches the model to say less.** Recall falls by {f.loss('dpo-corrected')} points with DPO on corrected samples and by {f.loss('ppo-plain')} with PPO on a plain reward model. "
                f"Online DPO with the oracle, which prefers the fuller of two equally true answers, ends at CHAIR_s {f.chair('online')} and loses {f.loss('online')} points. Fact-RLHF loses {f.loss('ppo')}."
            ),
        ]
    )


def observations(cells):
    """What no paper claims, of policies."""
    f, n = Figures(cells), len(cells[DEFAULT])
    gains = lambda row: [100 * c for c in changes(cells, row, "POPE adversarial")]
    rl = ("ppo", "ppo-plain", "ppo-plain-length", "ppo-oracle", "rloo")
    return told(
        [
            lambda: (
                f"**Seeds differ.** With the default adversarial accuracy changes by {f.seeds(DEFAULT, 'POPE adversarial')} points."
            ),
            lambda: (
                f"**Corrections of the model's own samples teach it to say less.** A correction only removes text. Recall falls by {f.loss('dpo-corrected')} points at a quarter of the learning rate of corrupted truth. "
                f"Ranked samples keep recall ({f.recall('dpo-ranked')} points) and lower CHAIR_s less ({f.chair('dpo-ranked')})."
            ),
            lambda: (
                f"**BDHS needs no annotator.** Beside corrupted truth it has {f.part('bdhs', 'dpo', 'CHAIR_s')} of the reduction of CHAIR_s and {f.part('bdhs', 'dpo', 'POPE adversarial')} of the gain in adversarial accuracy, for {f.loss('bdhs')} points of recall."
            ),
            lambda: (
                f"**The mask.** Guidance with the whole image in view: {f.both('guidance-only')}. With the mask: {f.both('bdhs')}. This base hallucinates with full sight, so its own completions are bias enough."
            ),
            lambda: (
                f"**Online and offline DPO.** On the prompts of the default: CHAIR_s {f.chair('online')} against {f.chair(DEFAULT)}, for {f.loss('online')} points of recall instead of {f.loss(DEFAULT)}. "
                f"On the prompts of corrupted truth: {f.both('online-povid')}, with a lower CHAIR_s than those pairs bring on {f.count('dpo', 'online-povid', 'CHAIR_s')} of {n} seeds; adversarial accuracy {f.hard('online-povid')} against {f.hard('dpo')}."
            ),
            lambda: (
                f"**Fact-RLHF** (PPO, factual reward model, length term) takes {f.cut('ppo')} off CHAIR_s for {f.loss('ppo')} points of recall. RLOO, without a value network: {f.both('rloo')}."
            ),
            lambda: (
                f"**MPO and mDPO on corrupted truth.** DPO: {f.both('dpo')}, adversarial accuracy {f.hard('dpo')}, text {f.change('dpo', 'text')}. MPO: {f.both('mpo')}, {f.hard('mpo')}, {f.change('mpo', 'text')}. "
                f"mDPO: {f.both('mdpo')}, {f.hard('mdpo')}, {f.change('mdpo', 'text')}. The chosen answers' log-probs, first and last fifth of the steps: {f.logged('dpo', 'logps/chosen')} with DPO, {f.logged('mpo', 'logps/chosen')} with MPO."
            ),
            lambda: (
                f"**GRPO** on questions with exact answers, and captions judged by the oracle: {f.both('grpo')}, adversarial accuracy {f.hard('grpo')}, text {f.change('grpo', 'text')}. "
                f"Groups without spread: {f.logged('grpo', 'frac_reward_zero_std')}; tokens of an answer: {f.logged('grpo', 'completions/mean_length')}."
            ),
            lambda: (
                f"**SteerLM.** With as many steps as the others, and asked for all 4: {f.both('judged-steerlm')}, {f.words('judged-steerlm')} words, accuracy on random questions {f.value('judged-steerlm', 'POPE random')}. "
                f"With 1,200 steps at a higher rate, and asked for short answers (complexity and verbosity 2): {f.both('judged-steerlm-long')}, {f.words('judged-steerlm-long')} words, accuracy {f.value('judged-steerlm-long', 'POPE random')}. "
                f"The two differ in steps, rate and request, so no one of them is shown to be the cause. The text score stays down "
                f"({f.value('judged-steerlm-long', 'text')}): no text is rated in either row."
            ),
            lambda: (
                f"**2,560 answers each, judged by the oracle** (DPO / online DPO / PPO / GRPO): CHAIR_s {f.list(FEW, 'CHAIR_s')}, recall {f.list(FEW, 'recall')}, adversarial accuracy {f.list(FEW, 'POPE adversarial')}, text {f.list(FEW, 'text')}. "
                f"With the factual reward model (PPO / RLOO): {f.list(('ppo', 'rloo'), 'CHAIR_s')}, {f.list(('ppo', 'rloo'), 'recall')}, {f.list(('ppo', 'rloo'), 'POPE adversarial')}, {f.list(('ppo', 'rloo'), 'text')}."
            ),
            lambda: (
                f"**With the oracle as its reward PPO takes {f.cut('ppo-oracle')} off CHAIR_s** for {f.loss('ppo-oracle')} points of recall. With the learned factual reward model CHAIR_s is {f.chair('ppo')}, with the oracle {f.chair('ppo-oracle')}."
            ),
            lambda: (
                f"**RL and yes/no answers.** Adversarial accuracy rises by more than half a point on at most {max(sum(g > 0.5 for g in gains(row)) for row in rl)} and at least {min(sum(g > 0.5 for g in gains(row)) for row in rl)} of {n} seeds for each of the {len(rl)} rows of PPO and RLOO."
            ),
        ]
    )


def reward_observations(cells):
    """What no paper claims, of reward models."""
    return told(
        [
            lambda: (
                "**They favour the shorter answer.** On ranked samples and on povid.json the longer answer gets the higher score less often than the oracle chooses it. In the pairs they learn from, the longer one is seldom the better."
            ),
        ]
    )
