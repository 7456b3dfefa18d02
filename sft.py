"""Supervised fine-tuning: make a multimodal LLM, or teach one, from instruction data.

    loss = - sum_t log p(y_t | image, prompt, y_<t) / number of answer tokens in the whole batch

    python sft.py                                                  # toy world: the toy base model
    python sft.py --model llava-hf/llava-1.5-7b-hf --data llava_v1_5_mix665k.json --images DIR
    python sft.py --vision CLIP --llm LLM --lr 0 --projector-lr 2e-3 --template plain \\
        --data blip_laion_cc_sbu_558k.json --images DIR            # a new model: LLaVA's stage 1

Without flags it composes the toy world's tiny CLIP and its tiny LLM, which has learned to read by
this script (lab/reading.py), under a million parameters together, and trains LLM and projector on
the toy world's instruction data, whose captions and answers name expected objects that are absent,
with some text mixed in. Expect the loss to fall from 2.5 to about 0.12, and a model that sees (POPE
random accuracy .940, object recall .961) but hallucinates (CHAIR_s .628) and reads worse than its
LLM did (text score .674 against .771).

Every assistant turn is scored, with its end token; nothing else is. Rows about one image, or one
text, share it: they are packed after their common prompt and do not see each other
(`dataset.share_prompt`), so --batch-size counts images and texts. The result is `model/` in the hub
layout, or with --lora-rank a PEFT `adapter/`.

One step:
1. batch   images with all their dialogues; for each micro-batch:
2. score       log p of every answer token
3. loss        and its gradient
4. step    clip the gradient, update
5. log

Choices; the papers' settings are those of Sun et al. 2023 (their SFT+: 3 epochs, lr 2e-5, batch
128, cosine, warm-up .03):
1. The mean is over the tokens of the whole batch, also when it is accumulated; frameworks often
   average means.
2. Rows that share an image meet in one batch; a trainer that shuffles rows would separate them.
3. --template plain keeps the question: image, line end, question, line end, answer. LLaVA's own
   first stage drops it, so that the caption follows the image.
4. The tower stays frozen unless --vision-lr says otherwise (LLaVA-1.6 tunes it; LLaVA-1.5 and Sun
   et al. do not).

Metrics: `loss` as above; `tokens` scored in the batch; `grad_norm` before clipping to 1; `lr` of
the LLM; `step_seconds` is the whole step, decoding of images included.
"""

from common import BadInput, Parser, not_negative, run

import time
from collections import Counter

import training
from formats import checkpoints, dataset
from lab import report, toy

TOY = {
    "data": ["instruct.json", "text_mix.json"],
    "vision": "clip",
    "llm": "llm",
    "steps": 2150,
    "batch_size": 8,
    "grad_accum": 1,
    "lr": 1.5e-3,
    "projector_lr": 1.5e-3,
    "save_every": 0,
}


def parse():
    """The command line."""
    parser = Parser(__doc__)
    training.add_training_flags(
        parser, lr=2e-5, projector_lr=2e-5, lora_rank=0, epochs=3, batch_size=2, grad_accum=64
    )
    flag = parser.add_argument_group("supervised fine-tuning").add_argument
    flag("--vision", metavar="DIR_OR_HUB_ID", help="with --llm: a new model from this CLIP ...")
    flag("--llm", metavar="DIR_OR_HUB_ID", help="... and this LLM, and a fresh projector")
    flag(
        "--vision-lr",
        type=not_negative,
        default=0.0,
        help="0 = vision tower frozen (default %(default)s)",
    )
    args = training.parse(parser)
    if args.lora_rank and args.vision_lr:
        raise BadInput(
            "--vision-lr trains the tower, which an adapter does not hold; "
            "give --lora-rank 0 with it."
        )
    if args.quantize == "nf4" and not args.model:
        raise BadInput("--quantize is for a model that is read; give --model.")
    if bool(args.vision) != bool(args.llm):
        raise BadInput("--vision and --llm go together: a model is composed of both.")
    if args.vision and not args.data:
        raise BadInput("--vision and --llm need --data: instruction data for the new model.")
    return args


def main():
    """Load, pack, train, save, evaluate."""
    args, clock = parse(), training.Clock()
    toy.fill(args, TOY)  # without --model: parts and world of our own, and TOY's settings

    # ---- load data; load or compose the model
    device, dtype = training.device_and_dtype(args)
    rows = dataset.read(
        args.data,
        args.images,
        answers=1,
        skip_bad_rows=args.skip_bad_rows,
        subset=(args.subset, args.seed),
        check_images=args.check_images,
    )
    shared = lambda _, examples: dataset.share_prompt(examples)
    training.show_memory(args, device, dtype, rows, shared, together=True)
    if args.model:
        model, processor = checkpoints.load(
            args.model,
            dtype,
            device,
            args.template,
            args.image_aspect,
            args.max_length,
            args.quantize,
        )
    else:
        model, processor = checkpoints.compose(
            args.vision,
            args.llm,
            dtype,
            device,
            args.template or "vicuna_v1",
            args.image_aspect or "pad",
            args.seed,
            args.max_length,
        )
    processor.prefetch.workers = args.workers
    examples = dataset.share_prompt(rows.encode(processor, every_turn=True))
    out = training.start(args, "sft", rows.skipped)
    report.show_start(processor, examples)
    clock.lap("setup")

    # ---- choose what trains
    model.prepare(
        args.lora_rank,
        llm=args.lr > 0,
        projector=args.projector_lr > 0,
        vision=args.vision_lr > 0,
        gradient_checkpointing=args.gradient_checkpointing,
    )

    # ---- train
    model.train()
    optimizer = training.optimizer_for(model, args.lr, args.projector_lr, args.vision_lr)
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
    report.finish(out, None, after, clock.seconds, args)


if __name__ == "__main__":
    run(main, trains=True)
