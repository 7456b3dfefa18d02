"""A reward model: which of two answers is better, learned from pairs, with facts about the picture at hand (Fact-RLHF).

    L = -log sigmoid(r(x, y+) - r(x, y-)) + 1e-3 |mean(r(x, y+) + r(x, y-))|                   x = image and prompt

The first term is Amirloo et al. 2024, eq. 1; the second, in the code of Sun et al. 2023, keeps rewards near 0. r is a linear
head on the last hidden state of what the model reads:

    prompt with image | answer | USER: Rate this answer. Is all of it in the picture? The picture shows: - ... - ...
                                 Is it helpful? Is the language right? Is it too long? ASSISTANT:
                                                                                                ^ r is read here

The descriptions are captions of the picture written by people (--facts). They make up for a reward model that sees no better
than the policy it judges: it can look up what it would otherwise have to see. The policy never reads them.

    python reward_model.py                                                # toy world, CPU, minutes
    python reward_model.py --model LLAVA-RLHF-SFT --data llava_7b_v1_preference.json --images DIR --facts image_to_caption.json
    python ppo.py --model LLAVA-RLHF-SFT --data ... --reward-model runs/reward_model-0       # what it is for

It starts from the supervised model: LoRA on the LLM and a fresh head train, tower and projector do not. The folder of the run
holds adapter/ (PEFT), head.safetensors and reward.json; `checkpoints.load_reward` puts them on the base they were trained on.
Step 0 must print a loss near ln 2 = 0.69 and an accuracy near .5.
Toy data are truth against corrupted truth (povid.json, povid_seen.json), and one caption is read at a time. Over three seeds the
held-out accuracy there is .81 and .78, and .71 on ranked samples of the base, which it never saw (.84, .85 and .73 with --no-facts);
after --steps 1500 it is .87, .90 and .78 (.90, .90 and .78). Here facts do not help, for the base sees what the captions tell, and
the longer row takes longer to learn. Trained on the ranked samples themselves, in a trial of 150 steps, it learned little more than
that short answers are better. Seeds differ by whether 500 steps were enough to learn when "Yes" and "No" are wrong. In no pair an
omission loses, so omissions are not punished.

Choices where the papers are silent, and deviations:
1. The wording of the evaluation turn is ours, and r is read at the cue of its answer; the original writes some words of it.
2. Both answers share one row with prompt and image: the same scores as one by one. The turn is part of each answer's segment.
3. LoRA has alpha = 2 rank, here as everywhere in this project; the original has rank 64, alpha 16.
4. The mean of the centring term is over the pairs of a forward pass, as there over those of a device.
5. AdamW without weight decay, clipping at 1 (there paged, .3). One epoch; the original was stopped at step 200: --steps.
6. --max-facts reads some of the captions, drawn anew each time; the original reads all five.
7. Of multiple-choice questions the facts are their rationales (`aok_<file>`) where the file has them, else the captions.

Metrics: `loss`; `rewards/chosen`, `rewards/rejected` = r(x, y+), r(x, y-); `rewards/margins` their difference;
`rewards/accuracies` share of pairs with a positive one; `grad_norm` before clipping; `step_seconds`.
metrics.json, for each data file, of pairs whose pictures were not trained on: `accuracy`; `loss`; `calibration`: of pairs in which
the model gives its favourite a probability between the bin's bounds, how many, their mean probability and the share in
which the favourite was the preferred one (equal in a calibrated model); `length_correlation` of r with the answer's
tokens over all answers; `longer_preferred` and `longer_favoured`: share of pairs in which the longer answer is the annotator's
choice, and the model's (alike, or the model counts words).
"""

import math
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoints
import data
import training
from model import BadInput, last_tokens

TOY = {
    "data": ["povid.json", "povid_seen.json"],
    "steps": 500,
    "batch_size": 16,
    "lr": 1e-3,
    "projector_lr": 0.0,
    "lora_rank": 16,
    "held_out": 200,
    "max_facts": 1,
    "save_every": 0,
}
QUESTION = "Rate this answer.\nIs all of it in the picture?{facts}\nIs it helpful?\nIs the language right?\nIs it too long?"
FACTS = " The picture shows:"
BINS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def parse():
    """The command line."""
    parser = training.Parser(__doc__)
    training.add_training_flags(
        parser, lr=2e-5, projector_lr=0.0, lora_rank=64, epochs=1, batch_size=32
    )
    group = parser.add_argument_group("reward model")
    group.add_argument(
        "--facts",
        metavar="FILE",
        help="image_to_caption.json: captions of each picture, for the evaluation turn",
    )
    group.add_argument(
        "--no-facts",
        action="store_true",
        help="the plain reward model: an evaluation turn without captions",
    )
    group.add_argument(
        "--missing-facts",
        default="refuse",
        choices=("refuse", "count"),
        help="a picture without captions stops the run, or is counted (default %(default)s)",
    )
    group.add_argument(
        "--max-facts",
        type=int,
        metavar="N",
        help="captions read at a time, drawn anew each time (default: all)",
    )
    group.add_argument(
        "--held-out",
        type=int,
        default=500,
        metavar="N",
        help="pairs of each file not trained on, whole pictures, until it is N or a fifth (paper %(default)s)",
    )
    group.add_argument(
        "--test-data",
        action="append",
        default=[],
        metavar="FILE",
        help="pairs to report on, those whose pictures are not trained on; may be repeated",
    )
    group.add_argument(
        "--centre",
        type=float,
        default=1e-3,
        help="weight of the term that keeps rewards near 0 (paper %(default)s)",
    )
    args = training.parse(parser, TOY)
    if args.facts and args.no_facts:
        raise BadInput("--facts and --no-facts exclude each other.")
    if args.toy_world and not (args.facts or args.no_facts):
        args.facts = str(Path(args.toy_world) / "image_to_caption.json")
    if not (args.facts or args.no_facts):
        raise BadInput(
            "--facts FILE (captions of the pictures, as in image_to_caption.json) or --no-facts is needed."
        )
    if not (args.lora_rank and args.lr) or args.projector_lr or args.merge:
        raise BadInput(
            "a reward model is LoRA and a head beside a frozen base: --lora-rank and --lr above 0, "
            "no --projector-lr, no --merge."
        )
    if args.no_facts:
        args.max_facts = None
    if args.max_facts is not None and args.max_facts < 1:
        raise BadInput(f"--max-facts is {args.max_facts}; 1 or more is accepted.")
    if args.held_out < 1 or not (math.isfinite(args.centre) and args.centre >= 0):
        raise BadInput(
            f"--held-out {args.held_out} must be 1 or more, --centre {args.centre} 0 or more."
        )
    return args


# ---- the loss


def reward_loss(chosen, rejected, centre):
    """Scores of the preferred and of the other answers, (B,) each -> loss of each pair (B,), their centring term ()."""
    losses = -F.logsigmoid(chosen - rejected)  # eq. 1
    return losses, centre * (chosen + rejected).mean().abs()


# ---- what it reads


def picture_of(record):
    """What pairs are held out by. Pictures inside parquet and tsv files count as different ones, row by row."""
    return record.image if record.image is not None else record.turns


def held_out_split(files, count, seed):
    """Lists of records, one a data file -> for each the places of (training pairs, held-out pairs).

    Whole pictures are held out, the same in all files, until each file has `count` such pairs or a fifth of its own.
    """
    pictures = {}  # picture -> [(file, place)]
    for number, records in enumerate(files):
        for place, r in enumerate(records):
            pictures.setdefault(picture_of(r), []).append((number, place))
    order, split = list(pictures.values()), [([], []) for _ in files]
    random.Random(f"{seed}/held out").shuffle(order)
    for rows in order:
        wanted = any(len(split[n][1]) < min(count, len(files[n]) // 5) for n, _ in rows)
        for number, place in rows:
            split[number][wanted].append(place)
    for records, (train, held) in zip(files, split):
        if not held or not train:
            raise BadInput(
                f"{records[0].where}: {len(records)} pairs are too few to hold pictures out."
            )
    return [(sorted(train), sorted(held)) for train, held in split]


def not_trained_on(records, trained):
    """Places of the test records whose pictures are in none of the training records."""
    known = {picture_of(r) for r in trained}
    places = [i for i, r in enumerate(records) if picture_of(r) not in known]
    if not places:
        raise BadInput(f"{records[0].where}: --test-data has only pictures that are trained on.")
    return places


class Reader:
    """Scores pairs: example i with its evaluation turn, in packed rows."""

    def __init__(self, model, processor, examples, facts, max_facts=None):
        self.model, self.processor, self.examples = model, processor, examples
        self.facts, self.max_facts = facts, max_facts

    def rated(self, i, rng):
        """Example i as the reward model reads it."""
        return self.processor.rated(self.examples[i], self.turn(i, rng))

    def longest(self, i):
        """The same with its longest captions."""
        facts = data.longest_facts(self.processor, self.facts[i], self.max_facts)
        return self.processor.rated(
            self.examples[i], data.evaluation(QUESTION, FACTS, facts, random.Random(0))
        )

    def turn(self, i, rng):
        """Its evaluation turn."""
        return data.evaluation(QUESTION, FACTS, self.facts[i], rng, self.max_facts)

    def scores(self, places, rng):
        """r(x, y+), r(x, y-) of these examples, (B,) each. To be called inside `model.use("reward")`."""
        batch = self.processor.collate([self.rated(i, rng) for i in places]).to(self.model.device)
        return self.model.values(batch, last_tokens(batch), "reward").view(-1, 2).T


# ---- held-out figures


def correlation(a, b):
    """Pearson's r of two (n,) tensors; 0 if one is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    norm = a.norm() * b.norm()
    return round(float(a @ b / norm), 4) if norm > 0 else 0.0


def figures(chosen, rejected, lengths):
    """Scores (n,) of held-out pairs, and tokens (n, 2) of their answers -> what metrics.json holds of a data file."""
    margin, longer = chosen - rejected, (lengths[:, 0] - lengths[:, 1]).sign()
    p, right = margin.abs().sigmoid(), (margin > 0).float()
    unequal = longer != 0
    share = lambda hits: round(float(hits.float().mean()), 4) if len(hits) else None
    calibration = []
    for low, high in zip(BINS, BINS[1:]):
        inside = (p >= low) & (p < high if high < 1 else p <= high)
        row = {"from": low, "to": high, "n": int(inside.sum())}
        calibration.append(row | {"predicted": share(p[inside]), "observed": share(right[inside])})
    return {
        "n": len(margin),
        "accuracy": share(right),
        "loss": round(float(-F.logsigmoid(margin).mean()), 4),
        "calibration": calibration,
        "length_correlation": correlation(
            torch.cat([chosen, rejected]), lengths.T.flatten().float()
        ),
        "longer_preferred": share(longer[unequal] > 0),
        "longer_favoured": share((longer * margin)[unequal] > 0),
        "mean": round(float(torch.cat([chosen, rejected]).mean()), 4),
        "std": round(float(torch.cat([chosen, rejected]).std(correction=0)), 4),
    }


@torch.no_grad()
def evaluate(reader, held, args, label):
    """{data file: figures} of its held-out pairs; the same shuffles of captions every time."""
    found = {}
    progress = training.Progress(label, sum(map(len, held.values())))
    done = 0
    for path, places in held.items():
        rng, scores = random.Random(f"{args.seed}/{path}"), []
        for at in range(0, len(places), args.batch_size):
            with reader.model.use("reward"):
                scores.append(
                    torch.stack(list(reader.scores(places[at : at + args.batch_size], rng))).cpu()
                )
            done += len(places[at : at + args.batch_size])
            progress(done)
        lengths = torch.tensor([[len(a) for a in reader.examples[i].answers] for i in places])
        found[path] = figures(*torch.cat(scores, 1), lengths)
    return found


def table(before, after):
    """Held-out figures as text: a line a data file, and its calibration."""
    lines = []
    for path, f in after.items():
        lines.append(f"{path}: {f['n']} held-out pairs")
        for name in ("accuracy", "loss"):
            lines.append(f"  {name} {before[path][name]:.3f} -> {f[name]:.3f}")
        lines.append(
            f"  score and length: correlation {f['length_correlation']:.2f}; the longer answer is preferred "
            f"{f['longer_preferred'] or 0:.2f}, favoured {f['longer_favoured'] or 0:.2f}"
        )
        lines.append("  probability   pairs  predicted  observed")
        for row in f["calibration"]:
            shown = (
                f"{row['predicted']:9.2f} {row['observed']:9.2f}"
                if row["n"]
                else f"{'-':>9} {'-':>9}"
            )
            lines.append(f"  {row['from']:.1f} to {row['to']:.1f} {row['n']:8} {shown}")
    return "\n".join(lines)


def main():
    """Load, hold out, train, evaluate, save."""
    args, begin = parse(), time.time()
    device, dtype = training.device_and_dtype(args)
    skipped = [] if args.skip_bad_rows else None
    model, processor = checkpoints.load(args.model, dtype, device, args.template, args.image_aspect)
    processor.max_length = min(args.max_length or processor.max_length, processor.max_length)
    read = lambda path: data.encode_all(
        processor, data.load([path], args.images, answers=2, skipped=skipped), skipped
    )
    files = [read(path) for path in args.data]
    split = held_out_split([[e.record for e in found] for found in files], args.held_out, args.seed)
    examples, train, held = [], [], {}
    for path, found, (mine, others) in zip(args.data, files, split):
        train += [len(examples) + i for i in mine]
        held[path] = [len(examples) + i for i in others]
        examples += found
    trained = [examples[i].record for i in train]
    for path in args.test_data:
        found = read(path)
        unseen = not_trained_on([e.record for e in found], trained)
        print(
            f"{path}: {len(unseen)} of {len(found)} pairs have pictures that are not trained on",
            file=sys.stderr,
        )
        held[path] = [len(examples) + i for i in range(len(unseen))]
        examples += [found[i] for i in unseen]
    records = [e.record for e in examples]
    facts = (
        [[] for _ in records]
        if args.no_facts
        else data.facts_for(records, data.captions(args.facts), args.missing_facts)
    )
    reader = Reader(model, processor, examples, facts, args.max_facts)
    for i in range(len(examples)):
        reader.longest(i)  # what does not fit into the context is refused now
    out = training.start(args, "reward_model", skipped, args.test_data)
    print(
        f"{len(train)} pairs to train on, {sum(map(len, held.values()))} held out", file=sys.stderr
    )
    print(f"evaluation turn: {reader.turn(0, random.Random(0))!r}", file=sys.stderr)
    base_name = args.model

    model.prepare(llm=False, projector=False)
    model.add_adapter("reward", args.lora_rank)
    model.add_head("reward")
    seconds = {"setup": time.time() - begin}
    before = evaluate(reader, held, args, "held out, before")
    seconds["eval"] = time.time() - begin - seconds["setup"]
    model.train(args.gradient_checkpointing)
    if args.gradient_checkpointing:
        model.llm.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = training.optimizer_for(model, args.lr, 0.0)
    steps = training.total_steps(args, len(train))
    first = training.load_checkpoint(out, model, optimizer) if args.resume else 0
    log = training.Log(out, first, steps)
    for step in range(first, steps):
        step_begin, metrics, rows = time.time(), Counter(), []
        micro_batches = training.batch_of(step, args, len(train))
        pairs = sum(map(len, micro_batches))
        for number, micro in enumerate(micro_batches):
            with model.use("reward"):
                chosen, rejected = reader.scores(
                    [train[i] for i in micro], random.Random(f"{args.seed}/{step}/{number}")
                )
                losses, centring = reward_loss(chosen, rejected, args.centre)
                ((losses.sum() + centring * len(micro)) / pairs).backward()
            rows += [examples[train[i]].record.where for i in micro]
            for name, values in (
                ("loss", losses + centring),
                ("rewards/chosen", chosen),
                ("rewards/rejected", rejected),
                ("rewards/accuracies", (chosen > rejected).float()),
                ("rewards/margins", chosen - rejected),
            ):
                metrics[name] += values.sum().item() / pairs
        factor = min(
            1.0, (step + 1) / math.ceil(0.03 * steps)
        )  # constant after a warm-up, as both papers
        metrics["grad_norm"] = training.optimizer_step(optimizer, factor, metrics["loss"], rows)
        metrics["lr"], metrics["step_seconds"] = args.lr * factor, time.time() - step_begin
        log(step, ["loss", "rewards/accuracies", "rewards/margins"], metrics)
        if args.save_every and (step + 1) % args.save_every == 0:
            training.save_checkpoint(out, step + 1, model, optimizer)
    model.eval()
    seconds["train"] = time.time() - begin - sum(seconds.values())

    after = evaluate(reader, held, args, "held out, after")
    seconds["eval"] += time.time() - begin - sum(seconds.values())
    if args.resume:
        shutil.rmtree(
            out / "adapter", ignore_errors=True
        )  # a run stopped after its last step had written it
    settings = {
        "question": QUESTION,
        "facts": None if args.no_facts else FACTS,
        "max_facts": args.max_facts,
        "template": processor.template,
        "image_aspect": processor.image_aspect,
        "held_out": {path: after[path] for path in args.data},
    }
    checkpoints.save_reward(model, out, base_name, settings)
    training.write_json(out / "metrics.json", after)
    seconds = {k: round(v, 1) for k, v in seconds.items()}
    summary = {
        "before": {"reward": before},
        "after": {"reward": after},
        "seconds": seconds,
        "seed": args.seed,
    }
    training.write_json(out / "summary.json", summary)
    print(table(before, after))
    print(f"done in {sum(seconds.values()):.0f} s: {out}", file=sys.stderr)


if __name__ == "__main__":
    training.run(main)
