"""POVID's image distortion: negatives by teacher forcing with a noisy image, the baseline of BDHS.

    y-_t   the most likely token after the true prefix y+_<t and the noisy image
    L      gamma L_DPO(y+, given y-) + (1 - gamma) L_DPO(y+, y-)
                           Amirloo et al. 2024, section 3.3, eq. 5; L_DPO as in dpo.py, eq. 3

    python povid.py                     # toy world, CPU, minutes
    python povid.py --model llava-hf/llava-1.5-7b-hf --data povid.json --images DIR

The noisy image only chooses y-. Policy and reference score it with the clean image, each token
after the true prefix. There are no samples: every position is predicted at once, so y- need not be
a sentence.

One step:
1. batch    pairs with their images; for each micro-batch:
2. distort      diffuse the images, take the most likely tokens
3. score        log pi and log pi_ref of y+, of y- and of the given rejected answer
4. loss         and its gradient
5. step     clip the gradient, update
6. log

At step 0 `rewards/margins` is 0 and the loss is ln 2.

Choices where the paper is silent, and deviations:
1. POVID's code lets the reference choose its own tokens; here both score the policy's, so that step
   0 is ln 2.
2. Noise is added to the image as it is on disk, before padding and tiling, as in POVID's code; but
   it is clamped to the range of pixels, where POVID's conversion to bytes wraps around. So its
   strength depends on the size: after 500 steps its deviation in a tower of 336 pixels is .15 for
   an image of 640 pixels, .36 for one of 336, of 1 between black and white.
3. Grid, schedule and optimizer as in dpo.py.

Metrics: those of dpo.py, of the pair (y+, y-).
"""

from common import Parser, positive, ranged, run

import random
import time
from collections import Counter
from dataclasses import replace

import torch
import torch.nn.functional as F

import memory
import training
from formats import checkpoints, dataset
from lab import report, toy
from model import fused_log_probs
from noise import diffuse

TOY = {
    "data": ["povid.json"],
    "steps": 230,
    "batch_size": 16,
    "grad_accum": 1,
    "lr": 3e-4,
    "beta": 0.5,
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
    flag = parser.add_argument_group("image distortion").add_argument
    flag(
        "--noise-steps",
        type=ranged(int, "0 to 999", lambda n: 0 <= n < 1000),
        default=500,
        metavar="N",
        help="diffuse the image N of 1000 steps (default %(default)s)",
    )
    flag(
        "--gamma",
        type=ranged(float, "0 to less than 1", lambda g: 0 <= g < 1),
        default=0.5,
        help="weight of the given rejected answer; 0: it is not used (default %(default)s)",
    )
    flag(
        "--beta",
        type=positive,
        default=0.1,
        help="strength of the pull to the reference (default %(default)s)",
    )
    return training.parse(parser)


def dpo_loss(logp_chosen, logp_rejected, ref_chosen, ref_rejected, beta):
    """The loss of each pair from its four summed log-probs, all (B,).

    -> losses (B,), rewards of the chosen and of the rejected answers (B,).
    """
    reward_chosen = beta * (logp_chosen - ref_chosen)
    reward_rejected = beta * (logp_rejected - ref_rejected)
    margin = (logp_chosen - ref_chosen) - (logp_rejected - ref_rejected)  # h
    losses = -F.logsigmoid(beta * margin)  # eq. 3
    return losses, reward_chosen.detach(), reward_rejected.detach()


@torch.no_grad()
def distorted(model, batch):
    """The most likely tokens after the true prefix and the batch's images, a scored position each.

    -> (N,), never the image token.
    """
    h = model.hidden_states(batch, batch.index)  # (N, D)
    logits = h.to(model.dtype) @ model.head_weight().t()  # (N, V)
    logits[:, model.image_token_id] = -torch.inf
    return logits.argmax(-1)


def distorted_log_probs(model, batch, wrong, k):
    """Log-probs of y+, of the distorted tokens at its positions, and of the other answers.

    batch: rows of k answers, y+ first. wrong: (N,). -> (k + 1, B), sums over tokens.
    """
    h = model.hidden_states(batch, batch.index).to(model.dtype)  # (N, D)
    sums = []
    for targets in (batch.targets, wrong):
        log_p, _ = fused_log_probs(h, model.head_weight(), targets)  # (N,)
        sums.append(
            log_p.new_zeros(len(batch.lengths)).index_add(0, batch.owner, log_p).view(-1, k).T
        )
    true, as_distorted = sums  # (k, B) each
    return torch.cat([true[:1], as_distorted[:1], true[1:]])


def main():
    """Load, train, save, evaluate."""
    args, clock = parse(), training.Clock()
    toy.fill(args, TOY)  # without --model: our own small model and world, TOY for flags not given

    # ---- load data and model
    device, dtype = training.device_and_dtype(args)
    # without --gamma, pairs that share a chosen answer give one example
    one_example = None if args.gamma else lambda record: (*record.prompt_key, record.answers)
    rows = dataset.read(
        args.data,
        args.images,
        answers=2 if args.gamma else 1,
        skip_bad_rows=args.skip_bad_rows,
        subset=(args.subset, args.seed),
        check_images=args.check_images,
        unique=one_example,
        needs_image="POVID would distort",
    )
    training.show_memory(args, device, dtype, rows, plan=memory.Plan(reference=True))
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
    out = training.start(args, "povid", rows.skipped)
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
        step_begin = time.time()
        metrics = Counter()

        # 1. batch
        indices, micro_batches = training.batches(step, args, out, processor, examples, save)
        for number, micro in micro_batches:
            batch = processor.collate([examples[i] for i in micro])
            k = len(examples[micro[0]].answers)

            # 2. distort
            seed = random.Random(f"{args.seed}/{step}/{number}").getrandbits(62)
            generator = torch.Generator().manual_seed(seed)
            pixels, _ = processor.images(
                [examples[i] for i in micro],
                lambda image: diffuse(image, args.noise_steps, generator),
            )
            noisy, batch = replace(batch, pixel_values=pixels).to(device), batch.to(device)
            wrong = distorted(model, noisy)  # (N,)

            # 3. score: with the clean image
            with torch.no_grad(), model.reference():
                ref_chosen, ref_wrong, *ref_given = distorted_log_probs(model, batch, wrong, k)
            chosen, rejected, *given = distorted_log_probs(model, batch, wrong, k)  # (B,) each

            # 4. loss: the mean over all pairs of the step
            losses, reward_chosen, reward_rejected = dpo_loss(
                chosen, rejected, ref_chosen, ref_wrong, args.beta
            )
            if args.gamma:  # eq. 5
                given_losses, *_ = dpo_loss(chosen, given[0], ref_chosen, ref_given[0], args.beta)
                losses = args.gamma * given_losses + (1 - args.gamma) * losses
            (losses.sum() / len(indices)).backward()

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

        # 5. step
        where = [examples[i].record.where for i in indices]
        metrics = training.numbers(metrics)
        metrics["grad_norm"] = training.clip_gradients(optimizer, max_norm=1.0)
        training.check_finite(metrics["loss"], metrics["grad_norm"], where)
        factor = training.schedule(step, steps, args.schedule)
        training.take_step(optimizer, factor)

        # 6. log
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
