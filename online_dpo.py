"""Online and mixed DPO: in each step the model answers, and an annotator judges.

    (y~+, y~-)  the better and the worse of two answers, y ~ pi(. | x), according to an annotator
    Online-DPO  L_DPO(y~+, y~-, x)                              Amirloo et al. 2024, section 2.3
    Mixed-DPO   alpha L_DPO(y+, y-, x) + (1 - alpha) L_DPO(y~+, y~-, x)
                                                                eq. 4; alpha ~ Bernoulli(P)
    L_DPO       as in dpo.py, eq. 3 (or IPO, SLiC); no gradient flows through drawing and judging

    python online_dpo.py                     # toy world, CPU, minutes; its truth is the annotator
    python online_dpo.py --mix 0.5           # Mixed-DPO
    python online_dpo.py --model llava-hf/llava-v1.6-vicuna-7b-hf --data RLHF-V-Dataset.parquet
                                             # LLaVA-1.6-34B annotates
    python online_dpo.py --model ... --annotator endpoint --judge-url http://localhost:8000/v1 \\
        --judge-model NAME

pi is the policy of this very step, so y~- is a mistake that the model makes now; mistakes that it
has unlearned are no longer penalised. Only images and prompts of the data are used; with --mix also
the pairs. pi_ref scores the answers of each step in that step.

One step:
1. batch    prompts; alpha decides for each between the data's pair and answers of its own;
            for each --sample-batch-size of them:
2. sample       k answers of the current policy
3. judge        the best against the worst answer; ties and unreadable verdicts make no pair;
                for each micro-batch of pairs:
4. score            log pi and log pi_ref of both answers
5. loss             and its gradient
6. step     clip the gradient, update
7. log

At step 0 `rewards/margins` is 0 and the loss ln 2 times the share of prompts with a pair,
`annotator/pairs`: in the toy world about .4. There (seed 0) CHAIR_s falls from .63 to .10 and
recall loses .003 (offline, dpo.py: .06 and .014). Half of the time is sampling.

Choices where the paper is silent, and deviations:
1. The paper gives neither temperature nor sampling policy: temperature 1, the policy itself. Two
   answers; --k draws more and takes the best against the worst.
2. A prompt without a pair (a tie, a verdict that cannot be read or that changes with the order,
   equal answers) adds no gradient but counts in the batch's mean, so that its share does not change
   the weight of the others. The paper does not speak of ties. How answers are judged: judge.py.
3. alpha is drawn for each example; P = .5 in the paper, 0 here: Online-DPO.
4. An answer cut off at --max-new-tokens has no end token; it is judged and trained as it is.
5. Grid, schedule, optimizer and pairs in one row as in dpo.py.

Metrics: those of dpo.py, means over the step's prompts; prompts without a pair count as 0, so
`rewards/accuracies` of a perfect step is `annotator/pairs`. `annotator/pairs`, `annotator/ties`,
`annotator/unreadable` are shares of the prompts with sum 1 (the data's pairs of --mix are pairs).
`annotator/score` is the mean score of the answers that were drawn (0 where the annotator only
compares), `response_length` their tokens. `seconds/sample`, `seconds/score` and `seconds/train` are
the parts of `step_seconds`.
"""

from common import Parser, fraction, positive, positive_int, ranged, run

import random
from collections import Counter

import torch
import torch.nn.functional as F

import judge
import memory
import sampling
import training
from formats import checkpoints, dataset
from lab import report, toy

BETA = {"dpo": 0.1, "ipo": 0.9, "ipo_sum": 0.9, "slic": 0.1}
TOY_BETA = BETA | {"dpo": 0.5}
TOY = {
    "data": ["rlhf_v.jsonl"],
    "steps": 230,
    "batch_size": 16,
    "grad_accum": 1,
    "lr": 1e-4,
    "projector_lr": 0.0,
    "lora_rank": 16,
    "save_every": 0,
    "annotator": "oracle",
    "max_new_tokens": 96,
}
METRICS = (  # of every step, also of one without a pair
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "annotator/pairs",
    "annotator/ties",
    "annotator/unreadable",
    "annotator/score",
    "response_length",
    "scores",  # how many make annotator/score and
    "answers",  # response_length: for their means, not logged
)


def parse():
    """The command line."""
    parser = Parser(__doc__)
    training.add_training_flags(
        parser, lr=1e-6, projector_lr=2e-6, lora_rank=128, epochs=3, batch_size=2, grad_accum=16
    )
    flag = parser.add_argument_group("preference optimization").add_argument
    flag("--loss", default="dpo", choices=tuple(BETA), help="objective (default %(default)s)")
    flag("--beta", type=positive, help=f"strength of the pull to the reference (default {BETA})")

    flag = parser.add_argument_group("answers").add_argument
    flag(
        "--mix",
        type=fraction,
        default=0.0,
        metavar="P",
        help="share of examples that use the data's pair instead (default %(default)s; paper: 0.5)",
    )
    flag(
        "--k",
        type=ranged(int, "2 or more", lambda k: k >= 2),
        default=2,
        help="answers a prompt, of which best and worst are used (default %(default)s)",
    )
    flag(
        "--sample-batch-size",
        type=positive_int,
        default=16,
        metavar="N",
        help="prompts that a process answers at a time, whatever the micro-batch; fewer where "
        "memory is short (default %(default)s)",
    )
    flag("--temperature", type=positive, default=1.0, help="of sampling (default %(default)s)")
    flag(
        "--max-new-tokens",
        type=positive_int,
        default=256,
        metavar="N",
        help="longest answer (default %(default)s)",
    )
    judge.add_flags(parser)
    return training.parse(parser)


def dpo_loss(logp_chosen, logp_rejected, ref_chosen, ref_rejected, beta, kind="dpo", tokens=None):
    """The loss of each pair from its four summed log-probs, all (B,).

    tokens: (2, B), the lengths of chosen and rejected; "ipo" alone needs them.
    -> losses (B,), rewards of the chosen and of the rejected answers (B,).
    """
    moved_chosen = logp_chosen - ref_chosen
    moved_rejected = logp_rejected - ref_rejected
    margin = moved_chosen - moved_rejected  # h
    if kind == "dpo":
        losses = -F.logsigmoid(beta * margin)  # eq. 3
    elif kind == "ipo":
        per_token = moved_chosen / tokens[0] - moved_rejected / tokens[1]
        losses = (per_token - 1 / (2 * beta)) ** 2
    elif kind == "ipo_sum":
        losses = (margin - 1 / (2 * beta)) ** 2
    elif kind == "slic":
        losses = (1 - beta * margin).relu()
    return losses, beta * moved_chosen.detach(), beta * moved_rejected.detach()


def best_and_worst(scores):
    """Places of the best and the worst score -> (best, worst).

    "ties" or "unreadable" where they make no pair; None is a score that could not be read.
    """
    readable = [i for i, score in enumerate(scores) if score is not None]
    if len(readable) < 2:
        return "unreadable"
    best, worst = max(readable, key=scores.__getitem__), min(readable, key=scores.__getitem__)
    return (best, worst) if scores[best] > scores[worst] else "ties"


def main():
    """Load, train on answers as they are drawn and judged, save, evaluate."""
    args, clock = parse(), training.Clock()
    toy.fill(args, TOY)  # without --model: our own small model and world, TOY for flags not given
    args.beta = args.beta or (TOY_BETA if args.toy_world else BETA)[args.loss]

    # ---- load data, annotator and model
    device, dtype = training.device_and_dtype(args)
    rows = dataset.read(
        args.data,
        args.images,
        answers=2 if args.mix else 0,
        skip_bad_rows=args.skip_bad_rows,
        subset=(args.subset, args.seed),
        check_images=args.check_images,
        unique=None if args.mix else lambda record: record.prompt_key,
    )
    training.show_memory(
        args,
        device,
        dtype,
        rows,
        drawn=2,
        beside=judge.beside_the_policy(args, device),
        plan=memory.Plan(k=args.k, new=args.max_new_tokens, reference=True),
    )
    annotator = judge.make(args, device, dtype, rows.records)
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
    examples = rows.encode(processor, room=args.max_new_tokens)
    out = training.start(args, "online_dpo", rows.skipped)
    report.show_start(processor, examples)
    clock.lap("setup")
    before = report.evaluate_start(model, processor, args, out / "before")
    clock.lap("eval")

    # ---- choose what trains
    model.prepare(
        args.lora_rank,
        llm=args.lr > 0,
        projector=args.projector_lr > 0,
        keep_reference=True,
        gradient_checkpointing=args.gradient_checkpointing,
    )

    # ---- train
    model.train()
    optimizer = training.optimizer_for(model, args.lr, args.projector_lr)
    steps = training.total_steps(args, len(examples))
    first = training.load_checkpoint(out, model, optimizer) if args.resume else 0
    log = training.Log(out, first, steps)
    save = lambda step, alone=False: training.save_checkpoint(out, step, model, optimizer, alone)
    for step in range(first, steps):
        metrics, seconds = Counter(dict.fromkeys(METRICS, 0.0)), Counter()

        # 1. batch: eq. 4, pairs[i] is the data's pair, or None where the policy answers
        size = args.sample_batch_size
        indices, batches = training.batches(step, args, out, processor, examples, save, size)
        for number, batch_indices in batches:
            seed = f"{args.seed}/{step}/{number}"
            rng = random.Random(f"{seed}/alpha")
            pairs = [examples[i] if rng.random() < args.mix else None for i in batch_indices]
            places = [i for i, pair in enumerate(pairs) if pair is None]
            online = [examples[batch_indices[i]] for i in places]

            if online:
                # 2. sample
                answers = sampling.answers_to(
                    model, processor, online, args.k, args.max_new_tokens, seed, args.temperature
                ).tokens
                texts = [[processor.text(tokens) for tokens in row] for row in answers]
                metrics["answers"] += len(online) * args.k
                metrics["response_length"] += sum(len(tokens) for row in answers for tokens in row)
                seconds["sample"] += clock.lap("sample")

                # 3. judge
                try:
                    scores = annotator([e.record for e in online], texts)
                except judge.NoAnswer:  # verdicts cost money: keep the state before this step
                    training.keep_steps(save, step)
                    raise
                for i, example, row, values in zip(places, online, answers, scores, strict=True):
                    verdict = best_and_worst(values)
                    if isinstance(verdict, str):
                        metrics[f"annotator/{verdict}"] += 1 / len(indices)
                    else:
                        pairs[i] = sampling.with_answers(example, [row[place] for place in verdict])
                read = [value for row in scores for value in row if value is not None]
                metrics["scores"] += len(read)
                metrics["annotator/score"] += sum(read)
                seconds["score"] += clock.lap("score")

            pairs = [pair for pair in pairs if pair is not None]
            metrics["annotator/pairs"] += len(pairs) / len(indices)
            for micro in training.chunks(pairs, args.batch_size):
                batch = processor.collate(micro).to(device)

                # 4. score
                with torch.no_grad(), model.reference():
                    ref_chosen, ref_rejected = model.answer_log_probs(batch).view(-1, 2).T
                chosen, rejected = model.answer_log_probs(batch).view(-1, 2).T  # (B,), (B,)

                # 5. loss: the mean over all prompts of the step
                tokens = batch.lengths.view(-1, 2).T  # (2, B)
                losses, reward_chosen, reward_rejected = dpo_loss(
                    chosen, rejected, ref_chosen, ref_rejected, args.beta, args.loss, tokens
                )
                loss = losses.sum() / len(indices)
                if loss.requires_grad:  # not so for text alone, where only the projector trains
                    loss.backward()

                for name, values in (
                    ("loss", losses),
                    ("rewards/chosen", reward_chosen),
                    ("rewards/rejected", reward_rejected),
                    ("rewards/accuracies", (reward_chosen > reward_rejected).float()),
                    ("rewards/margins", reward_chosen - reward_rejected),
                    ("logps/chosen", chosen),
                    ("logps/rejected", rejected),
                ):
                    metrics[name] += values.detach().sum() / len(indices)
            seconds["train"] += clock.lap("train")

        # 6. step
        where = [examples[i].record.where for i in indices]
        metrics = training.numbers(metrics)
        metrics["grad_norm"] = training.clip_gradients(optimizer, max_norm=1.0)
        training.check_finite(metrics["loss"], metrics["grad_norm"], where)
        factor = training.schedule(step, steps, args.schedule)
        training.take_step(optimizer, factor)

        # 7. log
        metrics["lr"] = args.lr * factor
        metrics["annotator/score"] /= max(1, metrics.pop("scores"))
        metrics["response_length"] /= max(1, metrics.pop("answers"))
        seconds["train"] += clock.lap("train")
        metrics |= {f"seconds/{part}": seconds[part] for part in ("sample", "score", "train")}
        metrics["step_seconds"] = sum(seconds.values())
        log(step, ["loss", "rewards/margins", "annotator/pairs", "annotator/score"], metrics)
        if args.save_every and (step + 1) % args.save_every == 0:
            save(step + 1)
    model.eval()
    clock.lap("train")

    # ---- save, evaluate
    training.save_result(out, model, processor, args)
    after = report.evaluate(model, processor, args, out / "after")
    clock.lap("eval")
    report.finish(out, before, after, clock.seconds, args)


if __name__ == "__main__":
    run(main, trains=True)
