"""GRPO: reinforcement learning from groups of answers, with Dr. GRPO, DAPO and GSPO as variants.

    A_i = (r_i - mean r) / (std r + 1e-4)         of G answers to one prompt x = image and question
    w_t = pi(y_t) / pi_old(y_t)                                      Shao et al. 2024, DeepSeekMath
    loss = mean_i mean_t [ max(-w_t A_i, -clip(w_t, 1 - low, 1 + high) A_i) + beta KL_t ]
    KL_t = w_t (pi_ref / pi - log(pi_ref / pi) - 1)                             k3, times the ratio

    python grpo.py                                        # toy world, CPU, minutes
    python grpo.py --model llava-hf/llava-1.5-7b-hf --data clevr_cogen_a_train.parquet \\
        --ask "Answer the question using a single word or phrase." --max-new-tokens 16
    python grpo.py --model ... --data ... --reward annotator --annotator RUN_OF_REWARD_MODEL

The loss is 0 at the start, and that is right. In a group the advantages have sum 0, and with one
update an iteration w is 1: the value of the loss says nothing, its gradient everything. (With
dr_grpo and dapo it is 0 for answers of equal length, below 0 where the better ones are longer.)
Watch

    reward                  it should climb, in tens of iterations
    grad_norm               above 0
    frac_reward_zero_std    share of groups whose answers all have the same reward: they teach
                            nothing. It grows as answers become right; near 1 from the start, the
                            data is too easy, too hard, or no answer is in the form that the rule
                            reads (rewards.py): --ask

Expect in the toy world (seed 0): CHAIR_s falls from .63 to .04, recall from .96 to .95; POPE rises
from .76 to .81 on adversarial questions and falls from .94 to .93 on random ones; groups without
spread grow from .37 to .52. Where the model draws the line between "Yes" and "No" is what the
questions pay for: of povid.json's yes/no questions more than half have the answer "No", so
lab/questions.py adds others. Spread alone is no lesson: a model that guesses has it, too.

One step is an iteration over batch-size x grad-accum x minibatches prompts (x processes):
1. sample       G answers to each prompt, at temperature 1: one encoding of the image, one prefill
2. score        rewards.py: exact answers by rule, a judge, the format
3. advantages   within the group; a group without spread is skipped
4. loss         of each minibatch: the prompt once, its G answers behind it in the same row
5. step         one optimizer update a minibatch
6. log

--variant sets four knobs (`VARIANTS`; they are printed at start):

              / std   mean of the token losses             clip        ratio of
    grpo      yes     of an answer, then of the answers    .2 / .2     a token
    dr_grpo   no      sum / (answers x longest allowed)    .2 / .2     a token   Liu et al. 2025
    dapo      yes     of all tokens of the minibatch       .2 / .28    a token   Yu et al. 2025
    gspo      yes     of an answer, then of the answers    3e-4 / 4e-4 an answer, the geometric
                                                           mean of its tokens'   Zheng et al. 2025

dapo also samples on for the groups that lack spread, in at most 8 rounds an iteration (so it reads
more prompts than --epochs says), and leaves answers that were cut off out of the loss and its
count. Everywhere they count in mean and std.

Clipping idles with one update an iteration; --minibatches N makes N (GSPO 4, DAPO 16). RLOO
(ppo.py --advantage rloo --kl-coef 0) is dr_grpo up to the factor G / (G - 1) and the longest
length. In ppo.py KL is part of the reward, here of the loss.

Choices where the papers are silent or disagree:
1. std is the unbiased one, as in all code that was read; DeepSeekMath does not say.
2. The gradient of k3 alone is (1 - pi_ref / pi) grad log pi, not that of the KL divergence. Times
   the ratio it is; so TRL after 1.9. --kl k3 is the paper's. beta: .04 with an annotator
   (DeepSeekMath), 0 with exact answers (DAPO, Dr. GRPO, TRL).
3. A group that is skipped adds no gradient, no KL either, but counts in the mean of its minibatch,
   so that the others do not weigh more. In dapo's mean of all tokens only what trains counts. An
   update without any other group still takes a step: AdamW goes on where it went, as in TRL.
4. An answer without a verdict (judge.py) is left out of mean and std, its advantage is 0.
5. The image token is never drawn; nothing else is filtered (code for Qwen2-VL draws with top-k 50,
   but scores without it).
6. log pi_old is that of sampling; in bfloat16 with several minibatches the answers are scored again
   as the update will. With one update it is log pi itself, so that w is exactly 1.
7. LoRA and its rate are VLM-R1's (DeepSeekMath: all weights, 1e-6); G is TRL's (DeepSeekMath 64).
8. Toy questions and settings were chosen on seed 1.

Metrics have TRL's names: `reward`, `reward_std` over all answers, `frac_reward_zero_std`,
`rewards/TERM/mean` and `/std`, `completions/mean_length` (`min_`, `max_`, `mean_terminated_`: of
those with an end token), `completions/clipped_ratio` share that was cut off, `kl` mean of KL_t,
`entropy` of the next token, `clip_ratio/low_mean`, `high_mean`, `region_mean`: of what trains,
means over the iteration's updates. Ours: `completions/right_length`, `wrong_length` tokens of
answers that a rule scored at least .5, or less (absent without any); `reward_unread` share without
a verdict; `groups` that were drawn. `loss`, `grad_norm`, `lr`, `step_seconds` and
its parts as in ppo.py.
"""

from common import Parser, not_negative, positive, positive_int, ranged, run

import math
import statistics
import sys
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import torch

import grouping
import judge
import memory
import processes
import rewards
import sampling
import training
from formats import checkpoints, dataset
from lab import report, toy


class Knobs(NamedTuple):
    """What the variants differ in."""

    by_std: bool  # are advantages divided by the group's standard deviation?
    mean: str  # of the losses: "answers", "tokens", or "longest"
    low: float  # the ratio is clipped below 1 - low ...
    high: float  # ... and above 1 + high
    ratio: str  # of a "token", or of an "answer"


VARIANTS = {
    "grpo": Knobs(True, "answers", 0.2, 0.2, "token"),
    "dr_grpo": Knobs(False, "longest", 0.2, 0.2, "token"),
    "dapo": Knobs(True, "tokens", 0.2, 0.28, "token"),
    "gspo": Knobs(True, "answers", 3e-4, 4e-4, "answer"),
}
ROUNDS = 8  # of sampling in an iteration of dapo, at most
KL_COEF = {"exact": 0.0, "annotator": 0.04, "mixed": 0.04}
METRICS = ("loss", "kl", "entropy") + tuple(
    f"clip_ratio/{x}_mean" for x in ("low", "high", "region")
)
TOY = {
    "data": ["questions.jsonl", "povid.json"],
    "reward": "mixed",
    "annotator": "oracle",
    "steps": 150,
    "batch_size": 24,
    "grad_accum": 1,
    "sample_batch_size": 24,
    "lr": 5e-4,
    "schedule": "cosine",
    "lora_rank": 16,
    "max_new_tokens": 96,
    "save_every": 0,
}


def parse():
    """The command line."""
    parser = Parser(__doc__)
    training.add_training_flags(
        parser,
        lr=1e-5,
        projector_lr=0.0,
        lora_rank=64,
        epochs=1,
        batch_size=1,
        grad_accum=16,
        schedule="constant",
    )
    flag = parser.add_argument_group(
        "groups (a step is an iteration; --batch-size counts prompts)"
    ).add_argument
    flag(
        "--variant",
        default="grpo",
        choices=tuple(VARIANTS),
        help="which paper's knobs (default %(default)s)",
    )
    flag(
        "--group-size",
        type=ranged(int, "2 or more", lambda n: n >= 2),
        default=8,
        metavar="G",
        help="answers to each prompt (default %(default)s)",
    )
    flag(
        "--minibatches",
        type=positive_int,
        default=1,
        metavar="N",
        help="updates an iteration, each on its own prompts (default %(default)s)",
    )
    flag(
        "--sample-batch-size",
        type=positive_int,
        default=16,
        metavar="N",
        help="prompts that a process answers at a time; fewer where memory is short "
        "(default %(default)s)",
    )
    flag(
        "--max-new-tokens",
        type=positive_int,
        default=512,
        metavar="N",
        help="longest answer (default %(default)s)",
    )
    flag(
        "--clip",
        type=positive,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="of the ratio (default: the variant's)",
    )
    flag(
        "--kl-coef",
        type=not_negative,
        help="beta; 0 needs no reference (default .04 with an annotator, 0 with exact answers)",
    )
    flag(
        "--kl",
        default="weighted",
        choices=("weighted", "k3"),
        help="k3 times the ratio, or alone (default %(default)s)",
    )
    rewards.add_flags(parser)
    return training.parse(parser)


# ---- 3. advantages


def advantages(values, by_std):
    """Rewards of a group (G,) -> by how much each is better than their mean, (G,); 0 for NaN."""
    better = values - values.nanmean()
    if by_std:
        read = better[~better.isnan()]
        better = better / ((read**2).sum() / (len(read) - 1)).sqrt().add(1e-4)
    return better.nan_to_num().float()


# ---- 4. loss


def token_losses(log_p, old, better, owner, lengths, knobs):
    """Clipped loss of each token, before the KL -> losses, ratios, (N,) each.

    log_p, old: (N,) under pi and pi_old. better: (N,) the advantage of a token's answer.
    owner: (N,) number of that answer. lengths: (M,) tokens of each answer.
    """
    log_ratio = log_p - old
    if knobs.ratio == "answer":  # GSPO, eq. 7
        log_ratio = answer_means(log_ratio, owner, lengths)[owner]
    ratio = log_ratio.exp()
    near = ratio.clamp(1 - knobs.low, 1 + knobs.high)
    return torch.maximum(-better * ratio, -better * near), ratio


def answer_means(x, owner, lengths):
    """(N,) -> (M,), the mean over each answer's tokens."""
    return x.new_zeros(len(lengths)).index_add(0, owner, x) / lengths


def k3(log_p, reference):
    """Schulman's estimate of KL(pi || pi_ref) from each token drawn from pi, (N,)."""
    return torch.expm1(reference - log_p) - (reference - log_p)


def token_weights(owner, lengths, mean, M, N, longest):
    """What each token's loss is multiplied by, so that the sum is the variant's mean, (N,).

    M, N: answers and tokens of the whole minibatch. longest: --max-new-tokens.
    """
    if mean == "answers":
        return 1 / (M * lengths[owner])
    return torch.full_like(owner, 1 / (N if mean == "tokens" else M * longest), dtype=torch.float32)


# ---- 5. step


def update(model, processor, optimizer, factor, groups, examples, knobs, args):
    """One update with a minibatch of Groups -> metrics. factor: of the learning rates."""
    # what trains, and the sizes over which the loss is a mean
    cut_off = args.variant == "dapo"  # are they left out?
    trained = [group.without(cut_off) for group in groups if group.spread]
    trained = [group for group in trained if group.answers]
    M, A = (sum(len(group.answers) for group in some) for some in (groups, trained))
    N = sum(len(tokens) for group in trained for tokens in group.answers)
    metrics = Counter(dict.fromkeys(METRICS, 0.0))

    # this process's share, on the device at once
    mine = processes.share(training.chunks(trained, args.batch_size))
    grouping.decode_ahead(processor, mine, examples)
    better_of = [[group.advantages for group in micro] for micro in mine]
    old_of = [[x for group in micro for x in group.old] for micro in mine]
    all_better, all_old = (grouping.on_device(x, model.device) for x in (better_of, old_of))

    for micro, better, old in zip(mine, all_better, all_old):  # m answers, n tokens
        rows = [sampling.with_answers(examples[group.place], group.answers) for group in micro]
        batch = processor.collate(rows).to(model.device)
        owner, lengths = batch.owner, batch.lengths  # (n,), (m,)
        better = better[owner]  # (m,) -> (n,)

        # 4. loss
        if args.kl_coef:
            with torch.no_grad(), model.reference():
                reference, _ = model.log_probs(batch)  # (n,)
        log_p, entropy = model.log_probs(batch)  # (n,), (n,)
        old = log_p.detach() if args.minibatches == 1 else old  # (n,)
        losses, ratio = token_losses(log_p, old, better, owner, lengths, knobs)
        if args.kl_coef:
            kl = k3(log_p, reference) * (ratio if args.kl == "weighted" else 1)
            losses = losses + args.kl_coef * kl
            metrics["kl"] += kl.detach().sum() / N
        weights = token_weights(owner, lengths, knobs.mean, M, N, args.max_new_tokens)
        loss = (losses * weights).sum()
        if loss.requires_grad:  # not so for text alone, where only the projector trains
            loss.backward()

        # metrics: the mean over tokens, of GSPO's ratios over answers
        share = "answers" if knobs.ratio == "answer" else "tokens"
        share = token_weights(owner, lengths, share, A, N, args.max_new_tokens)
        low = (ratio < 1 - knobs.low) & (better < 0)
        high = (ratio > 1 + knobs.high) & (better > 0)
        metrics["loss"] += loss.detach()
        metrics["entropy"] += entropy.sum() / N
        for name, clipped in (("low", low), ("high", high), ("region", low | high)):
            metrics[f"clip_ratio/{name}_mean"] += (clipped * share).sum()

    # 5. step
    if not trained:  # a gradient of 0, so that AdamW has a state to save
        for p in training.trainable(model).values():
            p.grad = torch.zeros_like(p)
    metrics = training.numbers(metrics)
    metrics["grad_norm"] = training.clip_gradients(optimizer, max_norm=1.0)
    where = [examples[group.place].record.where for group in trained]
    training.check_finite(metrics["loss"], metrics["grad_norm"], where)
    training.take_step(optimizer, factor)
    return metrics


# ---- the run


def main():
    """Load, iterate, save, evaluate."""
    args, clock = parse(), training.Clock()
    toy.fill(args, TOY)  # without --model: our own small model and world, TOY for flags not given
    rewards.check_flags(args)
    if args.kl_coef is None:
        args.kl_coef = KL_COEF[args.reward]
    knobs = VARIANTS[args.variant]
    if args.clip:
        knobs = knobs._replace(low=args.clip[0], high=args.clip[1])
    print(f"{args.variant}: {knobs}, KL {args.kl} x {args.kl_coef}", file=sys.stderr)

    # ---- load data, annotator and model
    device, dtype = training.device_and_dtype(args)
    rows = dataset.read(
        args.data,
        args.images,
        answers=1,
        skip_bad_rows=args.skip_bad_rows,
        subset=(args.subset, args.seed),
        check_images=args.check_images,
        unique=lambda record: record.prompt_key,
    )
    right = rewards.right_answers(rows, args.reward)
    print(rewards.says(right, rows.records), file=sys.stderr)
    judged = [record for record in rows.records if record.prompt_key not in right]
    # several processes would divide an LLM that trains whole, unless each keeps a copy
    keep_reference = args.kl_coef > 0 or processes.total > 1
    training.show_memory(
        args,
        device,
        dtype,
        rows,
        drawn=args.group_size,
        beside=judge.beside_the_policy(args, device) if judged else (),
        plan=memory.Plan(k=args.group_size, new=args.max_new_tokens, reference=keep_reference),
    )
    annotator = judge.make(args, device, dtype, judged) if judged else None
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
    processor.prefetch.kept_bytes = 4 * 2**30  # an image is read twice in an iteration
    square = processor.image_aspect == "pad" and not processor.anyres
    score = rewards.scorer(args, right, annotator, square)
    processor.ask = args.ask
    examples = rows.encode(processor, prompts_only=True, room=args.max_new_tokens)
    processor.ask = ""  # an evaluation asks as the others do
    out = training.start(args, "grpo", rows.skipped)
    report.show_start(processor, examples)
    clock.lap("setup")
    before = report.evaluate_start(model, processor, args, out / "before")
    clock.lap("eval")

    # ---- choose what trains
    model.prepare(
        args.lora_rank,
        llm=args.lr > 0,
        projector=args.projector_lr > 0,
        keep_reference=keep_reference,
        gradient_checkpointing=args.gradient_checkpointing,
    )

    # ---- train
    model.train()
    optimizer = training.optimizer_for(model, args.lr, args.projector_lr)
    steps = args.steps or math.ceil(training.total_steps(args, len(examples)) / args.minibatches)
    state = {"prompts": 0}  # how many of the endless sequence of prompts were drawn
    first = training.load_checkpoint(out, model, optimizer, state) if args.resume else 0
    log = training.Log(out, first, steps)
    save = lambda step, alone=False: training.save_checkpoint(
        out, step, model, optimizer, alone, state
    )
    size = training.global_batch(args)
    together = min(args.sample_batch_size, size // processes.total)  # a part for each process
    # with --epochs the last iteration takes what is left
    most = math.inf if args.steps or args.variant == "dapo" else len(examples) * args.epochs
    history = []  # the metrics of the first iterations
    clock.lap("setup")
    for step in range(first, steps):
        training.end_after_steps(save, step)
        seconds, taken = Counter(), state["prompts"]
        drawn, full = [], []  # the Groups of this iteration, and those with spread
        for attempt in range(ROUNDS if args.variant == "dapo" else 1):
            end = min(taken + size * args.minibatches - len(full), most)
            places = training.shuffled(taken, end, len(examples), args.seed)
            parts = list(enumerate(training.chunks(places, together)))
            parts, taken = processes.share(parts), end
            processor.prefetch.expect([examples[i].record.image for _, p in parts for i in p])

            found = []  # a list of Groups for each part
            for number, part in training.readable(
                parts, step, args, out, processor, examples, save, bool(drawn)
            ):
                # 1. sample
                seed = f"{args.seed}/{step}/{attempt}/{number}"
                groups = grouping.draw(model, processor, examples, part, args, seed)
                seconds["sample"] += clock.lap("sample")

                # 2. score
                try:
                    texts = [group.texts(processor) for group in groups]
                    terms = score([examples[i].record for i in part], texts)
                except judge.NoAnswer:  # verdicts cost money: keep the state before this step
                    training.keep_steps(save, step)
                    raise
                found.append([replace(group, terms=t) for group, t in zip(groups, terms)])
                seconds["score"] += clock.lap("score")

            # 3. advantages
            groups = sum(processes.joined(found), [])
            for group in groups:
                group.advantages = advantages(group.rewards, knobs.by_std)
            drawn += groups
            full += [group for group in groups if group.spread]
            if len(full) == size * args.minibatches:
                break

        # 4. loss, 5. step
        whole = full if args.variant == "dapo" else drawn
        if args.minibatches > 1 and model.dtype != torch.float32:
            trained = [group for group in whole if group.spread]
            grouping.scored_again(model, processor, trained, examples, args)
        factor = training.schedule(step, steps, args.schedule)
        updates = [
            update(model, processor, optimizer, factor, minibatch, examples, knobs, args)
            for minibatch in training.chunks(whole, size) or [[]]
        ]
        seconds["train"] = clock.lap("train")
        state["prompts"] = taken

        # 6. log
        metrics = {name: statistics.fmean(m[name] for m in updates) for name in updates[0]}
        metrics |= grouping.metrics(drawn)
        metrics["lr"] = args.lr * factor
        metrics |= {f"seconds/{part}": seconds[part] for part in ("sample", "score", "train")}
        metrics["step_seconds"] = sum(seconds.values())
        log(step, ["loss", "reward", "frac_reward_zero_std", "grad_norm"], metrics)
        history = [*history, metrics][: grouping.FIRST]
        if step + 1 - first == grouping.FIRST:
            text = drawn[0].texts(processor)[0]
            grouping.warn(history, examples[drawn[0].place].record, text, args)
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
