"""A reward model: which of two answers is better, learned from pairs, with facts about the image.

    L = -log sigmoid(r(x, y+) - r(x, y-)) + 1e-3 |mean(r(x, y+) + r(x, y-))|    x = image and prompt

The first term is Amirloo et al. 2024, eq. 1. The second keeps rewards near 0; it is in the code of
Sun et al. 2023 (Fact-RLHF). r is a linear head on the last hidden state of what the model reads:

    prompt with image | answer | USER: Rate this answer. Is all of it in the picture?
                                 The picture shows: - ... - ... Is it helpful?
                                 Is the language right? Is it too long? ASSISTANT:
                                                                                 ^ r is read here

The facts are captions of the image written by people (--facts). They make up for a reward model
that sees no better than the policy it judges: it can look up what it would otherwise have to see.
The policy never reads them. With --facts-first they stand before the question that was answered,
on lines of their own, and the evaluation turn has none.

    python reward_model.py                                             # toy world, CPU, minutes
    python reward_model.py --model LLAVA-RLHF-SFT --data llava_7b_v1_preference.json \\
        --images DIR --facts image_to_caption.json
    python ppo.py --model LLAVA-RLHF-SFT --data ... --reward-model runs/reward_model-0

Training starts from the supervised model. LoRA on the LLM and a new head train; tower and projector
do not. The run folder holds adapter/ (PEFT), head.safetensors and reward.json. `load_reward` of
formats/adapters.py puts them on the base that they were trained on.

One step:
1. batch   pairs, each answer followed by its evaluation turn, each pair one row
2. score   r of both answers
3. loss    and its gradient
4. step    clip the gradient, update
5. log

Step 0 must print a loss near ln 2 = 0.69 and an accuracy near .5.

The toy data are the truth against a corrupted truth (povid.json, povid_seen.json), and one caption
is read at a time. Held-out accuracy on seeds 0 to 2 (the last column are ranked samples of the
base, which the reward model never saw):

                        povid.json        povid_seen.json    ranked samples
    the default          .86  .77  .79     .86  .78  .70      .77  .68  .74
    --no-facts           .88  .88  .82     .89  .89  .83      .78  .77  .71

Facts do not help here: in 1.4 epochs it does not learn to read them. In four epochs of captions
alone it does (lab/sight.py): facts add .01, .06 and -.01 to the accuracy on wrong colours, numbers
and places, and .07, .05 and .06 where all pictures are grey. With --facts-first it is right on .80,
.80 and .89, and on grey pictures on .81, .80 and .86: it reads and hardly looks.

No pair punishes an omission, so the reward model does not either.

Choices where the papers are silent, and deviations:
1. The wording of the evaluation turn is ours, and r is read where its answer would begin. The
   original writes some words of that answer.
2. Both answers share one row with prompt and image: the same scores as one by one. The evaluation
   turn is part of each answer's segment.
3. LoRA has alpha = 2 rank, here as everywhere in this project; the original has rank 64, alpha 16.
4. The mean of the centring term is over the pairs of a forward pass; the original's is over those
   of a device.
5. AdamW without weight decay, clipping at 1 (the original: paged AdamW, .3). --schedule is
   constant after a warm-up of 3 %, as in both papers. One epoch; the original was stopped at step
   200: --steps.
6. --max-facts reads some of the captions, drawn anew each time; the original reads all five.
7. The facts of a multiple-choice question are its rationales (`aok_<file>`) where the file of
   --facts has them, else the captions.

Metrics: `loss`; `rewards/chosen`, `rewards/rejected` = r(x, y+), r(x, y-); `rewards/margins` is
their difference, `rewards/accuracies` the share of pairs in which it is positive. `grad_norm` is
measured before clipping; `step_seconds` is the whole step.

metrics.json has, for each data file, figures of the pairs whose images were not trained on:
`accuracy`; `loss`; `mean` and `std` of r over all answers; `length_correlation` of r with the
number of tokens over all answers; `longer_preferred`, `longer_favoured`: the share of pairs in
which the longer answer is the annotator's choice, and the model's (should match; otherwise the
model rewards length). `calibration`: of the pairs in which the model gives its favourite a
probability between the bounds of a bin, how many they are, their mean probability, and the share in
which the favourite is the preferred answer (equal in a calibrated model).
"""

from common import BadInput, Parser, Progress, not_negative, positive_int, run, write_json

import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

import processes
import training
from facts import (
    drawn_facts,
    evaluation_turn,
    facts_for,
    facts_of,
    longest_facts,
    with_evaluation,
    with_facts_first,
)
from formats import adapters, checkpoints, dataset
from formats.layouts import captions
from lab import toy
from lora import add_adapter

TOY = {
    "data": ["povid.json", "povid_seen.json"],
    "steps": 500,
    "batch_size": 16,
    "grad_accum": 1,
    "lr": 1e-3,
    "projector_lr": 0.0,
    "lora_rank": 16,
    "held_out": 200,
    "max_facts": 1,
    "save_every": 0,
}
QUESTION = (  # the evaluation turn; {facts} is FACTS and the captions, a bullet a line
    "Rate this answer.\nIs all of it in the picture?{facts}\nIs it helpful?\n"
    "Is the language right?\nIs it too long?"
)
FACTS = " The picture shows:"
BINS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the calibration


def parse():
    """The command line."""
    parser = Parser(__doc__)
    training.add_training_flags(
        parser,
        lr=2e-5,
        projector_lr=0.0,
        lora_rank=64,
        epochs=1,
        batch_size=2,
        grad_accum=16,
        schedule="constant",
    )
    flag = parser.add_argument_group("reward model").add_argument
    flag(
        "--facts",
        metavar="FILE",
        help="image_to_caption.json: captions of each image, for the evaluation turn",
    )
    flag(
        "--no-facts",
        action="store_true",
        help="the plain reward model: an evaluation turn without captions",
    )
    flag(
        "--missing-facts",
        default="refuse",
        choices=("refuse", "count"),
        help="an image without captions stops the run, or is counted (default %(default)s)",
    )
    flag(
        "--max-facts",
        type=positive_int,
        metavar="N",
        help="captions read at a time, drawn anew each time (default: all)",
    )

    flag(
        "--facts-first",
        action="store_true",
        help="captions before the question, not in the evaluation turn",
    )

    # which pairs are held out
    flag(
        "--held-out",
        type=positive_int,
        default=500,
        metavar="N",
        help="pairs of each file not trained on, whole images, until it is N or a fifth "
        "(paper %(default)s)",
    )
    flag(
        "--test-data",
        action="append",
        default=[],
        metavar="FILE",
        help="pairs to report on, those whose images are not trained on; may be repeated",
    )

    # the loss
    flag(
        "--centre",
        type=not_negative,
        default=1e-3,
        help="weight of the term that keeps rewards near 0 (paper %(default)s)",
    )
    args = training.parse(parser)
    if args.no_facts and (args.facts or args.facts_first):
        given = "--facts" if args.facts else "--facts-first"
        raise BadInput(f"{given} and --no-facts exclude each other.")
    twice = set(args.test_data) & set(args.data or ())
    if twice:
        raise BadInput(f"--test-data {min(twice)} is --data too; its held-out pairs are reported.")
    if args.model and not (args.facts or args.no_facts):
        raise BadInput(
            "--facts FILE (captions of the images, as in image_to_caption.json) "
            "or --no-facts is needed."
        )
    if not (args.lora_rank and args.lr) or args.projector_lr or args.merge:
        raise BadInput(
            "a reward model is LoRA and a head beside a frozen base: --lora-rank and --lr above 0, "
            "no --projector-lr, no --merge."
        )
    return args


# ---- what is read, the scores, the loss


def as_read(processor, example, known, rng, args):
    """The pair with an evaluation turn after each answer, one for both. known: captions."""
    if args.facts_first:
        text = drawn_facts(FACTS, known, rng, args.max_facts)
        example, known = with_facts_first(processor, example, text), []
    turn = evaluation_turn(QUESTION, FACTS, known, rng, args.max_facts)
    return with_evaluation(processor, example, turn)


def with_turns(processor, examples, facts, rng, args):
    """Pairs as the reward model reads them. facts: {`Record.prompt_key`: captions of the image}."""
    return [as_read(processor, e, facts[e.record.prompt_key], rng, args) for e in examples]


def with_longest_turns(processor, examples, known, args):
    """Pairs with the longest evaluation turn that their images' captions can make."""
    longer = []
    for example in examples:
        longest = longest_facts(processor, facts_of(example.record, known) or [], args.max_facts)
        longer.append(as_read(processor, example, longest, random.Random(0), args))
    return longer


def check_lengths(processor, examples, facts, args):
    """Refuse now what does not fit into the context later: each pair with its longest captions."""
    for example in examples:
        longest = longest_facts(processor, facts[example.record.prompt_key], args.max_facts)
        as_read(processor, example, longest, random.Random(0), args)


def score(model, batch):
    """r(x, y+) and r(x, y-) of B pairs, (2, B). To be called inside `model.use("reward")`."""
    return model.values(batch, batch.last, "reward").view(-1, 2).T


def reward_loss(chosen, rejected, centre):
    """Scores of the preferred and of the other answers, (B,) each.

    -> loss of each pair (B,), their centring term ().
    """
    losses = -F.logsigmoid(chosen - rejected)  # eq. 1
    return losses, centre * (chosen + rejected).mean().abs()


# ---- what is held out


def image_of(record):
    """What pairs are held out by: the image, or the dialogue where there is none.

    Images inside parquet and tsv files count as different ones, row by row.
    """
    return record.image if record.image is not None else record.turns


def held_out_split(files, count, seed):
    """Records of each data file -> for each file the places of (training pairs, held-out pairs).

    Whole images are held out, the same in all files, until each file has `count` such pairs or a
    fifth of its own.
    """
    by_image = {}  # image -> [(number of the file, place in it)]
    for number, records in enumerate(files):
        for place, record in enumerate(records):
            by_image.setdefault(image_of(record), []).append((number, place))
    images = list(by_image.values())
    random.Random(f"{seed}/held out").shuffle(images)

    split = [([], []) for _ in files]
    for rows in images:
        hold_out = any(len(split[n][1]) < min(count, len(files[n]) // 5) for n, _ in rows)
        for number, place in rows:
            split[number][hold_out].append(place)
    for records, (train, held) in zip(files, split):
        if not held or not train:
            raise BadInput(
                f"{records[0].where}: {len(records)} pairs are too few to hold images out."
            )
    return [(sorted(train), sorted(held)) for train, held in split]


def not_trained_on(records, trained):
    """Places of the test records whose images are in none of the training records."""
    known = {image_of(r) for r in trained}
    places = [i for i, r in enumerate(records) if image_of(r) not in known]
    if not places:
        raise BadInput(f"{records[0].where}: --test-data has only images that are trained on.")
    return places


def divide(files, args):
    """Examples of each file, --data then --test-data -> (to train on, {file: to report on})."""
    data, test_data = files[: len(args.data)], files[len(args.data) :]
    train, held = [], {}
    split = held_out_split([[e.record for e in file] for file in data], args.held_out, args.seed)
    for path, examples, (to_train, to_hold) in zip(args.data, data, split):
        train += [examples[i] for i in to_train]
        held[path] = [examples[i] for i in to_hold]
    for path, examples in zip(args.test_data, test_data):
        unseen = not_trained_on([e.record for e in examples], [e.record for e in train])
        held[path] = [examples[i] for i in unseen]
        print(
            f"{path}: {len(unseen)} of {len(examples)} pairs have images that are not trained on",
            file=sys.stderr,
        )
    return train, held


# ---- held-out figures


def correlation(a, b):
    """Pearson's r of two (n,) tensors; 0 if one is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    norm = a.norm() * b.norm()
    return round(float(a @ b / norm), 4) if norm > 0 else 0.0


def mean_of(hits):
    """The mean of (n,), rounded; None without any."""
    return round(float(hits.float().mean()), 4) if len(hits) else None


def figures(chosen, rejected, lengths):
    """What metrics.json holds of one data file.

    Scores of its held-out pairs, (n,) each, and the tokens of their answers (n, 2).
    """
    margin = chosen - rejected
    p = margin.abs().sigmoid()  # the probability of the model's favourite
    right = (margin > 0).float()
    longer = (lengths[:, 0] - lengths[:, 1]).sign()  # 1: the preferred answer is the longer one
    unequal = longer != 0
    scores = torch.cat([chosen, rejected])

    calibration = []
    for low, high in zip(BINS, BINS[1:]):
        inside = (p >= low) & (p < high if high < 1 else p <= high)
        calibration.append(
            {
                "from": low,
                "to": high,
                "n": int(inside.sum()),
                "predicted": mean_of(p[inside]),
                "observed": mean_of(right[inside]),
            }
        )
    return {
        "n": len(margin),
        "accuracy": mean_of(right),
        "loss": round(float(-F.logsigmoid(margin).mean()), 4),
        "calibration": calibration,
        "length_correlation": correlation(scores, lengths.T.flatten().float()),
        "longer_preferred": mean_of(longer[unequal] > 0),
        "longer_favoured": mean_of((longer * margin)[unequal] > 0),
        "mean": round(float(scores.mean()), 4),
        "std": round(float(scores.std(correction=0)), 4),
    }


@torch.no_grad()
def evaluate(model, processor, held, facts, args, label):
    """{data file: figures of its held-out pairs}; the same captions are drawn every time.

    Of several processes, each scores a share.
    """
    shares = {}  # of each file: lists of a batch's examples
    for path, examples in held.items():
        rng = random.Random(f"{args.seed}/{Path(path).name}")
        read = with_turns(processor, examples, facts, rng, args)
        starts = range(0, len(read), args.batch_size)
        shares[path] = processes.share([read[i : i + args.batch_size] for i in starts])

    parts = sum(shares.values(), [])
    processor.prefetch.expect([e.record.image for part in parts for e in part])
    result, done = {}, 0
    progress = Progress(label, sum(map(len, parts)))
    for path, examples in held.items():
        scores = []
        for part in shares[path]:
            batch = processor.collate(part).to(model.device)
            with model.use("reward"):
                scores.append(score(model, batch).cpu())  # (2, B)
            done += len(part)
            progress(done)
        chosen, rejected = torch.cat(processes.joined(scores), 1)  # (n,), (n,)
        lengths = torch.tensor([[len(tokens) for tokens in e.answers] for e in examples])  # (n, 2)
        result[path] = figures(chosen, rejected, lengths)
    return result


def table(before, after):
    """Held-out figures as text: each data file with its calibration."""
    lines = []
    for path, f in after.items():
        lines.append(f"{path}: {f['n']} held-out pairs")
        for name in ("accuracy", "loss"):
            lines.append(f"  {name} {before[path][name]:.3f} -> {f[name]:.3f}")
        lines.append(
            f"  score and length: correlation {f['length_correlation']:.2f}; the longer answer is "
            f"preferred {f['longer_preferred'] or 0:.2f}, favoured {f['longer_favoured'] or 0:.2f}"
        )
        lines.append("  probability   pairs  predicted  observed")
        for row in f["calibration"]:
            shown = f"{'-':>9} {'-':>9}"
            if row["n"]:
                shown = f"{row['predicted']:9.2f} {row['observed']:9.2f}"
            lines.append(f"  {row['from']:.1f} to {row['to']:.1f} {row['n']:8} {shown}")
    return "\n".join(lines)


def main():
    """Load, hold out, train, evaluate, save."""
    args, clock = parse(), training.Clock()
    toy.fill(args, TOY)  # without --model: our own small model and world, TOY for flags not given
    if args.toy_world and not (args.facts or args.no_facts):
        args.facts = str(Path(args.toy_world) / "image_to_caption.json")
    if args.no_facts:
        args.max_facts = None

    # ---- load data and model
    device, dtype = training.device_and_dtype(args)
    if args.skip_bad_rows:  # held-out pairs are scored outside of any step
        args.check_images = "full"
    files = [
        dataset.read(
            [path],
            args.images,
            answers=2,
            skip_bad_rows=args.skip_bad_rows,
            subset=(args.subset, args.seed),
            check_images=args.check_images,
        )
        for path in [*args.data, *args.test_data]
    ]
    known = {} if args.no_facts else captions(args.facts)
    read = lambda processor, some: with_longest_turns(processor, some, known, args)
    trained_on = [record for rows in files[: len(args.data)] for record in rows.records]
    training.show_memory(args, device, dtype, dataset.Rows(trained_on), read)
    model, processor = checkpoints.load(
        args.model,
        dtype,
        device,
        args.template,
        args.image_aspect,
        args.max_length,
        args.quantize,
    )
    processor.prefetch.workers = args.workers
    encoded = [rows.encode(processor) for rows in files]  # for each file its Examples
    skipped = [row for rows in files for row in rows.skipped]

    # ---- hold out whole images, find the captions of each image
    train, held = divide(encoded, args)
    used = [*train, *(e for examples in held.values() for e in examples)]
    records = [e.record for e in used]
    texts = [[] for _ in records]
    if not args.no_facts:
        texts = facts_for(records, known, args.missing_facts)
    facts = {record.prompt_key: row for record, row in zip(records, texts)}
    check_lengths(processor, used, facts, args)
    out = training.start(args, "reward_model", skipped, args.test_data)
    turn = evaluation_turn(QUESTION, FACTS, texts[0], random.Random(0), args.max_facts)
    training.show_prompt(processor)
    print(f"{len(train)} pairs to train on, {len(used) - len(train)} held out", file=sys.stderr)
    print(f"evaluation turn: {turn!r}", file=sys.stderr)

    # ---- choose what trains: LoRA and the head
    model.prepare(llm=False, projector=False, gradient_checkpointing=args.gradient_checkpointing)
    add_adapter(model.llm, "reward", args.lora_rank)
    model.add_head("reward")
    clock.lap("setup")
    before = evaluate(model, processor, held, facts, args, "held out, before")
    clock.lap("eval")

    # ---- train
    model.train()
    optimizer = training.optimizer_for(model, args.lr, 0.0)
    steps = training.total_steps(args, len(train))
    first = training.load_checkpoint(out, model, optimizer) if args.resume else 0
    log = training.Log(out, first, steps)
    save = lambda step, alone=False: training.save_checkpoint(out, step, model, optimizer, alone)
    for step in range(first, steps):
        step_begin = time.time()
        metrics = Counter()

        # 1. batch
        indices, micro_batches = training.batches(step, args, out, processor, train, save)
        for number, micro in micro_batches:
            rng = random.Random(f"{args.seed}/{step}/{number}")  # which captions, in which order
            examples = [train[i] for i in micro]
            read = with_turns(processor, examples, facts, rng, args)
            batch = processor.collate(read).to(device)

            with model.use("reward"):
                # 2. score
                chosen, rejected = score(model, batch)  # (B,), (B,)

                # 3. loss: the mean over all pairs of the step
                losses, centring = reward_loss(chosen, rejected, args.centre)  # (B,), ()
                ((losses.sum() + centring * len(micro)) / len(indices)).backward()

            for name, values in (
                ("loss", losses + centring),
                ("rewards/chosen", chosen),
                ("rewards/rejected", rejected),
                ("rewards/accuracies", (chosen > rejected).float()),
                ("rewards/margins", chosen - rejected),
            ):
                metrics[name] += values.detach().sum() / len(indices)

        # 4. step
        where = [train[i].record.where for i in indices]
        metrics = training.numbers(metrics)
        metrics["grad_norm"] = training.clip_gradients(optimizer, max_norm=1.0)
        training.check_finite(metrics["loss"], metrics["grad_norm"], where)
        factor = training.schedule(step, steps, args.schedule)
        training.take_step(optimizer, factor)

        # 5. log
        metrics["lr"] = args.lr * factor
        metrics["step_seconds"] = time.time() - step_begin
        log(step, ["loss", "rewards/accuracies", "rewards/margins"], metrics)
        if args.save_every and (step + 1) % args.save_every == 0:
            save(step + 1)
    model.eval()
    clock.lap("train")

    # ---- evaluate, save
    after = evaluate(model, processor, held, facts, args, "held out, after")
    clock.lap("eval")
    if processes.number:
        return
    if args.resume:  # a run that was stopped after its last step had written it
        shutil.rmtree(out / "adapter", ignore_errors=True)
    settings = {
        "question": QUESTION,
        "facts": None if args.no_facts else FACTS,
        "max_facts": args.max_facts,
        "facts_first": args.facts_first,
        "template": processor.template,
        "image_aspect": processor.image_aspect,
        "held_out": {path: after[path] for path in args.data},
    }
    adapters.save_reward(model, out, args.model, settings)
    write_json(out / "metrics.json", after)
    seconds = {part: round(value, 1) for part, value in clock.seconds.items()}
    summary = {
        "before": {"reward": before},
        "after": {"reward": after},
        "seconds": seconds,
        "seed": args.seed,
    }
    write_json(out / "summary.json", summary)
    print(table(before, after))
    print(f"done in {sum(seconds.values()):.0f} s: {out}", file=sys.stderr)


if __name__ == "__main__":
    run(main, trains=True)
