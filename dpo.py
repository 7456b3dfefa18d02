"""Direct preference optimization of a multimodal LLM, offline: DPO, IPO, SLiC.

    h = [log pi(y+|x) - log pi_ref(y+|x)] - [log pi(y-|x) - log pi_ref(y-|x)]    x: image, prompt
    DPO   -log sigmoid(beta h)           Amirloo et al. 2024, eq. 3
    IPO   (h' - 1 / (2 beta))^2          ibid. section 5.7; h' is h with each log-prob divided by
                                         the number of its answer's tokens
    SLiC  max(0, 1 - beta h)             ibid.

    python dpo.py                                                                 # toy world, CPU
    python dpo.py --model llava-hf/llava-1.5-7b-hf --data RLHF-V-Dataset.parquet

log pi(y|x) is the sum over the answer's tokens; --token-weight and --average-log-prob weigh them
(token_weights.py). pi_ref is the model that training starts from; its log-probs are computed before
the first step, and kept in `.cache/` for runs on the same pairs.

One step:
1. batch   pairs (x, y+, y-), each one row [prompt | chosen | rejected]; for each micro-batch:
2. score       log pi of both answers; log pi_ref is looked up
3. loss        and its gradient
4. step    clip the gradient, update
5. log

At step 0 `rewards/margins` is 0 and the loss is ln 2 = 0.6931 (IPO: 1 / (4 beta^2), SLiC: 1). In
bfloat16 both are near that: rounding makes a log-prob depend on the rows beside it in the batch
(toy base: by .05, as much as bfloat16 is off float32), and the reference was scored beside others.
Expect in the toy world (seed 0): CHAIR_s falls from .63 to .10, object recall from .96 to .94, and
adversarial POPE accuracy rises from .76 to .80.

Choices where the paper is silent, and deviations:
1. The paper searches lr {1e-7 .. 5e-6}, projector lr {2e-5, 2e-6, 2e-7}, epochs {3, 5, 7}, batch
   {16, 32, 48} and beta (DPO {.05, .1, .2, .5}, IPO {.8, .9, 1}, SLiC {.02, .1, .2}); which won it
   does not say. The defaults are from that grid.
2. Cosine schedule with warm-up .03, AdamW without weight decay, clipping at 1: Li et al. 2024.
   Their LoRA has a dropout of .05 and their AdamW a beta2 of .999; here 0 and .98. Their own DPO is
   --lr 5e-5 --projector-lr 2e-5 --batch-size 8 --grad-accum 16 (128 in all), else as here.
3. A pair is one row with one encoding of the image: the same loss and gradients as two rows.
4. The text of IPO's paper (Azar et al. 2023, eq. 17) has h, which --loss ipo_sum takes. TRL's
   authors asked the paper's authors, who confirmed that its results are of h', so that beta does
   not depend on the length (trl/trainer/dpo_trainer.py; TRL's pull request 1265).
5. Toy settings: pairs of the base model's own answers and their corrections, as in RLHF-V. Chosen
   on seeds 1 and 2 (2 with an earlier base) among 16 settings: more steps, or a higher rate, cost
   recall and gain nothing; corrupted truth (row `dpo` of lab/rows.py) gained half as much there. On
   seeds 0 to 4 adversarial accuracy rises by .042, .040, .036, .044, .045; recall falls by .012 to
   .028, and words by 16 to 19 %. On seed 5, which came after all choices, accuracy rises by .049,
   recall falls by .040 and words by 20 % (results/README.md, "Seed by seed").

Metrics: `rewards/chosen` = beta (log pi - log pi_ref) of y+, `rewards/rejected` of y-;
`rewards/margins` is their difference, `rewards/accuracies` the share of pairs in which it is
positive. `logps/chosen`, `logps/rejected` = log pi; both often fall, because DPO asks for the
difference only. `grad_norm` is taken before clipping; `step_seconds` include decoding of images.
"""

from common import BadInput, Parser, Progress, positive, run

import time
from collections import Counter

import torch
import torch.nn.functional as F

import processes
import token_weights
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
    "lr": 5e-5,
    "projector_lr": 0.0,
    "lora_rank": 16,
    "save_every": 0,
}


def parse():
    """The command line."""
    parser = Parser(__doc__)
    training.add_training_flags(
        parser, lr=1e-6, projector_lr=2e-6, lora_rank=128, epochs=3, batch_size=2, grad_accum=16
    )
    flag = parser.add_argument_group("preference optimization").add_argument
    flag("--loss", default="dpo", choices=tuple(BETA), help="objective (default %(default)s)")
    flag("--beta", type=positive, help=f"strength of the pull to the reference (default {BETA})")
    flag(
        "--token-weight",
        type=positive,
        default=1.0,
        metavar="W",
        help="of tokens in corrected segments; RLHF-V: 5 (default %(default)s)",
    )
    flag(
        "--average-log-prob",
        action="store_true",
        help="means over tokens in place of sums; needs a larger --beta (RLHF-V: .5)",
    )
    args = training.parse(parser)
    if args.loss in ("ipo", "ipo_sum") and (args.token_weight != 1 or args.average_log_prob):
        raise BadInput(
            f"--loss {args.loss} says itself whether it divides by an answer's tokens; "
            "--token-weight and --average-log-prob are for dpo and slic."
        )
    return args


def dpo_loss(logp_chosen, logp_rejected, ref_chosen, ref_rejected, beta, kind="dpo", tokens=None):
    """The loss of each pair from its four log-probs, all (B,).

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


def reference_log_probs(model, processor, examples, batch_size):
    """log pi_ref of both answers of each pair, (n, 2), before the first step: LoRA still adds 0.

    Of several processes, each scores a share of the batches.
    """

    @torch.no_grad()
    def score():
        """All pairs, in order."""
        starts = range(0, len(examples), batch_size)
        parts = processes.share([examples[i : i + batch_size] for i in starts])
        mine, log_probs, done = sum(parts, []), [], 0
        processor.prefetch.expect([e.record.image for e in mine])
        progress = Progress("reference", len(mine))
        for part in parts:
            batch = processor.collate(part).to(model.device)
            log_probs.append(model.answer_log_probs(batch).view(-1, 2).cpu())
            done += len(part)
            progress(done)
        return torch.cat(processes.joined(log_probs))

    name = f"reference-{training.fingerprint(model, processor, examples)}"
    return training.cached(name, score)


def main():
    """Load, score with the reference policy, train, save, evaluate."""
    args, clock = parse(), training.Clock()
    toy.fill(args, TOY)  # without --model: our own small model and world, TOY for flags not given
    args.beta = args.beta or (TOY_BETA if args.toy_world else BETA)[args.loss]

    # ---- load data and model
    device, dtype = training.device_and_dtype(args)
    if args.skip_bad_rows:  # pi_ref scores all rows before the first step
        args.check_images = "full"
    rows = dataset.read(
        args.data,
        args.images,
        answers=2,
        skip_bad_rows=args.skip_bad_rows,
        subset=(args.subset, args.seed),
        check_images=args.check_images,
    )
    training.show_memory(args, device, dtype, rows)
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
    examples = rows.encode(processor)
    examples = token_weights.weigh(examples, args.token_weight, args.average_log_prob)
    out = training.start(args, "dpo", rows.skipped)
    report.show_start(processor, examples)
    clock.lap("setup")
    before = report.evaluate_start(model, processor, args, out / "before")
    clock.lap("eval")

    # ---- choose what trains; score all pairs with the reference policy
    model.prepare(
        args.lora_rank,
        llm=args.lr > 0,
        projector=args.projector_lr > 0,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    reference = reference_log_probs(model, processor, examples, args.batch_size)  # (n, 2)
    clock.lap("reference")

    # ---- train
    model.train()
    optimizer = training.optimizer_for(model, args.lr, args.projector_lr)
    steps = training.total_steps(args, len(examples))
    first = training.load_checkpoint(out, model, optimizer) if args.resume else 0
    log = training.Log(out, first, steps)
    save = lambda step, alone=False: training.save_checkpoint(out, step, model, optimizer, alone)
    for step in range(first, steps):
        step_begin = time.time()
        metrics = Counter()

        # 1. batch
        indices, micro_batches = training.batches(step, args, out, processor, examples, save)
        for _, micro in micro_batches:
            batch = processor.collate([examples[i] for i in micro]).to(device)

            # 2. score
            chosen, rejected = model.answer_log_probs(batch).view(-1, 2).T  # (M,) -> (B,), (B,)
            log_pi_ref = reference[micro].to(device, non_blocking=True)  # (B, 2)
            ref_chosen, ref_rejected = log_pi_ref.T  # (B,), (B,)

            # 3. loss: the mean over all pairs of the step
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

        # 4. step
        where = [examples[i].record.where for i in indices]
        metrics = training.numbers(metrics)
        metrics["grad_norm"] = training.clip_gradients(optimizer, max_norm=1.0)
        training.check_finite(metrics["loss"], metrics["grad_norm"], where)
        factor = training.schedule(step, steps, args.schedule)
        training.take_step(optimizer, factor)

        # 5. log
        metrics["lr"] = args.lr * factor
        metrics["step_seconds"] = time.time() - step_begin
        log(step, ["loss", "rewards/margins", "logps/chosen", "logps/rejected"], metrics)
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
