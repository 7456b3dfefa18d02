"""Online and mixed direct preference optimization: each step the model answers, an annotator says which answer is better.

    (y~+, y~-)  the better and the worse of two answers, y ~ pi(. | x), in the eyes of an annotator
    Online-DPO  L_DPO(y~+, y~-, x)                                              Amirloo et al. 2024, section 2.3
    Mixed-DPO   alpha L_DPO(y+, y-, x) + (1 - alpha) L_DPO(y~+, y~-, x)         ibid., eq. 4; alpha ~ Bernoulli(P)
    L_DPO       as in dpo.py, eq. 3 (or IPO, SLiC); no gradient flows through the drawing and the judging

    python online_dpo.py                                       # toy world, CPU, minutes; its truth is the annotator
    python online_dpo.py --mix 0.5                             # Mixed-DPO
    python online_dpo.py --model llava-hf/llava-v1.6-vicuna-7b-hf --data RLHF-V-Dataset.parquet     # LLaVA-1.6-34B annotates
    python online_dpo.py --model ... --annotator endpoint --judge-url http://localhost:8000/v1 --judge-model NAME

pi is the policy of this very step, so y~- is a mistake that the model makes now; one that it no longer makes costs nothing
more. Of the data only pictures and prompts are used, with --mix also its pairs. pi_ref scores each step's answers in that step.
Step 0 must print rewards 0 and loss ln 2 times the share of prompts with a pair, `annotator/pairs`: in the toy world about .4.
There, over three seeds, CHAIR_s goes from .64 to .09 and recall loses .007 (offline, dpo.py: .08 at .025); half of the time is sampling.

Choices where the paper is silent, and deviations:
1. Temperature 1, the policy itself (not given); two answers; --k draws more and takes the best against the worst.
2. A prompt without a pair (tie, verdict that cannot be read or changes with the order, equal answers) adds no gradient but counts
   in the batch's mean, so that its share does not change the weight of the others. The paper does not speak of ties. How answers
   are judged: judge.py.
3. alpha is drawn for each example; P = .5 in the paper, 0 here: Online-DPO.
4. An answer cut off at --max-new-tokens has no end token, and is judged and trained as it stands.
5. Grid, schedule, optimizer and pairs in one row as in dpo.py.

Metrics: those of dpo.py, means over the step's prompts, where one without a pair counts 0 (`rewards/accuracies` of a perfect
step is `annotator/pairs`). `annotator/pairs`, `annotator/ties`, `annotator/unreadable`: shares of the prompts, sum 1 (offline
pairs of --mix are pairs); `annotator/score` mean score of the answers that were drawn (0 where the annotator compares);
`response_length` their tokens; `seconds/sample`, `seconds/score`, `seconds/train`: what `step_seconds` is made of.
"""

import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace

import torch
import torch.nn.functional as F

import checkpoints
import data
import judge
import training
from lab import report
from model import BadInput

TOY = {
    "data": ["rlhf_v.jsonl"],
    "steps": 230,
    "batch_size": 16,
    "lr": 1e-4,
    "beta": 0.5,
    "projector_lr": 0.0,
    "lora_rank": 16,
    "save_every": 0,
    "annotator": "oracle",
    "max_new_tokens": 96,
}
METRICS = (
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
    "seconds/sample",
    "seconds/score",
)
BETA = {"dpo": 0.1, "ipo": 0.9, "slic": 0.1}


def parse():
    """The command line."""
    parser = training.Parser(__doc__)
    training.add_training_flags(
        parser, lr=1e-6, projector_lr=2e-6, lora_rank=128, epochs=3, batch_size=32
    )
    group = parser.add_argument_group("preference optimization")
    group.add_argument(
        "--loss",
        default="dpo",
        choices=("dpo", "ipo", "slic"),
        help="objective (default %(default)s)",
    )
    group.add_argument(
        "--beta", type=float, help=f"strength of the pull to the reference (default {BETA})"
    )
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--mix",
        type=float,
        default=0.0,
        metavar="P",
        help="share of examples that take their pair of the data instead (default %(default)s; paper: 0.5)",
    )
    group.add_argument(
        "--k",
        type=int,
        default=2,
        help="answers a prompt, of which best and worst are used (default %(default)s)",
    )
    group.add_argument(
        "--temperature", type=float, default=1.0, help="of drawing (default %(default)s)"
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="longest answer (default %(default)s)",
    )
    judge.add_flags(parser)
    args = training.parse(parser, TOY)
    args.beta = BETA[args.loss] if args.beta is None else args.beta
    for name, value, good, accepted in (
        ("beta", args.beta, args.beta > 0, "more than 0"),
        ("mix", args.mix, 0 <= args.mix <= 1, "0 to 1"),
        ("k", args.k, args.k >= 2, "2 or more"),
        ("temperature", args.temperature, 0 < args.temperature < float("inf"), "more than 0"),
        ("max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "1 or more"),
    ):
        if not good:
            raise BadInput(f"--{name} is {value}; {accepted} is accepted.")
    return args


def preference_loss(logp_chosen, logp_rejected, ref_chosen, ref_rejected, beta, kind):
    """Loss of each pair from its four summed log-probs, all (B,) -> losses (B,), rewards of chosen and rejected (B,)."""
    h = (logp_chosen - ref_chosen) - (logp_rejected - ref_rejected)
    if kind == "dpo":
        losses = -F.logsigmoid(beta * h)  # eq. 3
    elif kind == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    elif kind == "slic":
        losses = (1 - beta * h).relu()
    return (
        losses,
        beta * (logp_chosen - ref_chosen).detach(),
        beta * (logp_rejected - ref_rejected).detach(),
    )


def sample(model, processor, examples, args, seed):
    """--k answers of the current policy to each prompt -> their tokens, B lists of k tensors (R,)."""
    generator = torch.Generator(model.device).manual_seed(random.Random(seed).getrandbits(62))
    pixel_values, image_sizes = processor.images(examples)
    prompts = [e.prompt for e in examples]
    model.eval()  # gradient checkpointing would switch off the cache
    samples = model.sample(
        prompts,
        pixel_values,
        args.k,
        args.max_new_tokens,
        args.temperature,
        processor.stop_ids,
        generator=generator,
        image_sizes=image_sizes,
    )
    model.train(args.gradient_checkpointing)
    return samples.tokens


def best_and_worst(scores):
    """Places of the best and the worst score -> (best, worst); "ties" or "unreadable" where they make no pair."""
    read = [i for i, score in enumerate(scores) if score is not None]
    if len(read) < 2:
        return "unreadable"
    best, worst = max(read, key=scores.__getitem__), min(read, key=scores.__getitem__)
    return (best, worst) if scores[best] > scores[worst] else "ties"


def main():
    """Load, train on answers as they are drawn and judged, save, evaluate."""
    args, begin = parse(), time.time()
    device, dtype = training.device_and_dtype(args)
    skipped = [] if args.skip_bad_rows else None
    records = data.load(args.data, args.images, answers=2 if args.mix else 0, skipped=skipped)
    if not args.mix:  # pairs that share picture and prompt are one task here
        unique = {r.asked: r for r in records}
        if len(unique) < len(records):
            print(
                f"{len(records) - len(unique)} rows repeat picture and prompt of another",
                file=sys.stderr,
            )
        records = list(unique.values())
    annotator = judge.make(args, device, dtype, records)
    model, processor = checkpoints.load(args.model, dtype, device, args.template, args.image_aspect)
    processor.max_length = min(args.max_length or processor.max_length, processor.max_length)
    examples = data.with_room(
        processor, data.encode_all(processor, records, skipped), args.max_new_tokens, skipped
    )
    out = training.start(args, "online_dpo", skipped)
    report.show_start(processor, examples)
    seconds = {"setup": time.time() - begin}
    before = report.evaluate(model, processor, args, out / "before")
    seconds["eval"] = time.time() - begin - seconds["setup"]
    seconds |= {
        "reference": 0.0,
        "sample": 0.0,
        "score": 0.0,
    }  # the reference scores each step's answers in that step

    model.prepare(
        args.lora_rank, llm=args.lr > 0, projector=args.projector_lr > 0, keep_reference=True
    )
    model.train(args.gradient_checkpointing)
    if args.gradient_checkpointing:
        model.llm.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = training.optimizer_for(model, args.lr, args.projector_lr)
    steps = training.total_steps(args, len(examples))
    first = training.load_checkpoint(out, model, optimizer) if args.resume else 0
    log = training.Log(out, first, steps)
    for step in range(first, steps):
        step_begin, metrics, rows = time.time(), Counter(dict.fromkeys(METRICS, 0.0)), []
        micro_batches = training.batch_of(step, args, len(examples))
        prompts, read, lengths = sum(map(len, micro_batches)), [], []
        for number, micro in enumerate(micro_batches):
            micro_begin, rng = time.time(), random.Random(f"{args.seed}/{step}/{number}/alpha")
            pairs = [examples[i] if rng.random() < args.mix else None for i in micro]  # eq. 4
            asked = [place for place, pair in enumerate(pairs) if pair is None]
            if asked:
                online = [examples[micro[place]] for place in asked]
                answers = sample(model, processor, online, args, f"{args.seed}/{step}/{number}")
                sampled = time.time()
                texts = [[processor.text(tokens) for tokens in row] for row in answers]
                try:
                    scores = annotator([e.record for e in online], texts)
                except judge.NoAnswer:
                    if step > first:  # the state of this step's beginning; verdicts cost money
                        training.save_checkpoint(out, step, model, optimizer)
                    raise
                for place, example, row, score in zip(asked, online, answers, scores, strict=True):
                    found = best_and_worst(score)
                    if isinstance(found, str):
                        metrics[f"annotator/{found}"] += 1 / prompts
                        continue
                    two = [row[i] for i in found]
                    pairs[place] = replace(
                        example,
                        answers=two,
                        scored=[torch.ones(len(t), dtype=torch.bool) for t in two],
                    )
                read += [value for row in scores for value in row if value is not None]
                lengths += [len(tokens) for row in answers for tokens in row]
                metrics["seconds/sample"] += sampled - micro_begin
                metrics["seconds/score"] += time.time() - sampled
            pairs = [pair for pair in pairs if pair is not None]
            metrics["annotator/pairs"] += len(pairs) / prompts
            rows += [pair.record.where for pair in pairs]
            if not pairs:
                continue
            batch = processor.collate(pairs).to(device)
            with torch.no_grad(), model.reference():
                ref_chosen, ref_rejected = model.answer_log_probs(batch).view(-1, 2).T  # (B,), (B,)
            chosen, rejected = model.answer_log_probs(batch).view(-1, 2).T
            losses, reward_chosen, reward_rejected = preference_loss(
                chosen, rejected, ref_chosen, ref_rejected, args.beta, args.loss
            )
            (losses.sum() / prompts).backward()
            for name, values in (
                ("loss", losses),
                ("rewards/chosen", reward_chosen),
                ("rewards/rejected", reward_rejected),
                ("rewards/accuracies", (reward_chosen > reward_rejected).float()),
                ("rewards/margins", reward_chosen - reward_rejected),
                ("logps/chosen", chosen),
                ("logps/rejected", rejected),
            ):
                metrics[name] += values.sum().item() / prompts
        factor = training.schedule(step, steps)
        metrics["grad_norm"] = training.optimizer_step(optimizer, factor, metrics["loss"], rows)
        metrics["lr"], metrics["step_seconds"] = args.lr * factor, time.time() - step_begin
        metrics["annotator/score"] = statistics.fmean(read) if read else 0.0
        metrics["response_length"] = statistics.fmean(lengths) if lengths else 0.0
        seconds["sample"] += metrics["seconds/sample"]
        seconds["score"] += metrics["seconds/score"]
        metrics["seconds/train"] = (
            metrics["step_seconds"] - metrics["seconds/sample"] - metrics["seconds/score"]
        )
        log(step, ["loss", "rewards/margins", "annotator/pairs", "annotator/score"], metrics)
        if args.save_every and (step + 1) % args.save_every == 0:
            training.save_checkpoint(out, step + 1, model, optimizer)
    model.eval()
    seconds["train"] = time.time() - begin - sum(seconds.values())

    training.save_result(out, model, processor, args)
    after = report.evaluate(model, processor, args, out / "after")
    seconds["eval"] += time.time() - begin - sum(seconds.values())
    report.finish(out, before, after, seconds, args)


if __name__ == "__main__":
    training.run(main)
