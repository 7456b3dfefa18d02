"""Rejection sampling: the best of a model's own answers to each prompt, then fine-tuning on it.

    y*   = argmax_k Q(y_k | x), kept if Q(y* | x) >= --threshold            y_1 .. y_4 ~ pi(. | x)
    loss = - sum_t log p(y*_t | image, x, y*_<t) / number of answer tokens in the whole batch

    python rejection_sampling.py                                                  # toy world, CPU
    python rejection_sampling.py --model llava-hf/llava-1.5-13b-hf \\
        --data runs/annotate-0/ratings.jsonl --images DIR

Q is helpfulness + correctness + coherence as the judge of annotate.py rated them, 0 to 12: Li et
al. 2024, who compare this with DPO, SteerLM and plain fine-tuning on the same prompts. --model is
the model that gave the answers. Nothing tells it what a worse answer is: compare dpo.py on
preferences.json of the same ratings, which does.

One step:
1. batch   prompts, each with its best answer; for each micro-batch:
2. score       log p of every answer token
3. loss        and its gradient
4. step    clip the gradient, update
5. log

Expect in the toy world (seed 0): CHAIR_s falls from .63 to .05, recall from .96 to .95, and
adversarial POPE accuracy rises from .76 to .80; its judge is the truth, and half of the prompts are
requests for a caption.

Choices where the paper is silent, and deviations:
1. The threshold is inferred from the name of its data file, "perfectscored": 12, the most.
2. Of several best answers the first is taken.
3. Learning rates, LoRA 128, 3 epochs, batch 128: its scripts. Its LoRA has dropout .05, ours none.

Metrics: those of sft.py.
"""

from common import BadInput, Parser, finite, run

import time
from collections import Counter
from dataclasses import replace

import training
from formats import checkpoints, dataset, ratings
from lab import report, toy

TOY = {
    "data": ["ratings.jsonl"],
    "steps": 230,
    "batch_size": 16,
    "grad_accum": 1,
    "lr": 4e-4,
    "projector_lr": 0.0,
    "lora_rank": 16,
    "save_every": 0,
}


def parse():
    """The command line."""
    parser = Parser(__doc__)
    training.add_training_flags(
        parser, lr=4e-4, projector_lr=2e-5, lora_rank=128, epochs=3, batch_size=4, grad_accum=32
    )
    flag = parser.add_argument_group("rejection sampling").add_argument
    flag(
        "--threshold",
        type=finite,
        default=12.0,
        help="least quality of an answer that is trained on, of 12 (default %(default)s)",
    )
    return training.parse(parser)


def best_answers(rated, threshold):
    """[Rated, ...] -> a Record for each prompt whose best answer reaches the threshold."""
    chosen = [(one.record, ratings.best(one, threshold)) for one in rated]
    records = [replace(record, answers=(answer,)) for record, answer in chosen if answer]
    if not records:
        raise BadInput(
            f"--threshold {threshold:g}: no answer to any of {len(rated)} prompts has it."
        )
    return records


def main():
    """Load, choose, train, save, evaluate."""
    args, clock = parse(), training.Clock()
    toy.fill(args, TOY)  # without --model: our own small model and world, TOY for flags not given

    # ---- load ratings and model, choose the answers
    device, dtype = training.device_and_dtype(args)
    rated = [one for path in args.data for one in ratings.read(path, args.images)]
    rows = dataset.Rows(best_answers(rated, args.threshold), args.skip_bad_rows)
    rows.draw(args.subset, args.seed)
    rows.check_images(args.check_images)
    shared = lambda _, examples: dataset.share_prompt(examples)
    training.show_memory(args, device, dtype, rows, shared, together=True)
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
    examples = dataset.share_prompt(rows.encode(processor))
    out = training.start(args, "rejection_sampling", rows.skipped)
    report.show_start(processor, examples)
    clock.lap("setup")
    before = report.evaluate_start(model, processor, args, out / "before")
    clock.lap("eval")

    # ---- choose what trains
    model.prepare(
        args.lora_rank,
        llm=args.lr > 0,
        projector=args.projector_lr > 0,
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
        tokens = sum(int(s.sum()) for i in indices for s in examples[i].scored)
        for _, micro in micro_batches:
            batch = processor.collate([examples[i] for i in micro]).to(device)

            # 2. score
            log_p, _ = model.log_probs(batch)  # (N,)

            # 3. loss: the mean over all answer tokens of the step
            loss = -log_p.sum() / tokens
            if loss.requires_grad:  # not so for text alone, where only the projector trains
                loss.backward()
            metrics["loss"] += loss.detach()

        # 4. step
        where = [examples[i].record.where for i in indices]
        metrics = training.numbers(metrics)
        metrics["grad_norm"] = training.clip_gradients(optimizer, max_norm=1.0)
        training.check_finite(metrics["loss"], metrics["grad_norm"], where)
        factor = training.schedule(step, steps, args.schedule)
        training.take_step(optimizer, factor)

        # 5. log
        metrics["tokens"] = tokens
        metrics["lr"] = args.lr * factor
        metrics["step_seconds"] = time.time() - step_begin
        log(step, ["loss"], metrics)
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
