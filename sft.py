"""Supervised fine-tuning: make a multimodal LLM, or teach one, from instruction data.

    loss = - sum_t log p(y_t | image, prompt, y_<t) / number of answer tokens in the whole batch

    python sft.py                                                  # toy world: builds the toy base model (see below)
    python sft.py --model llava-hf/llava-1.5-7b-hf --data llava_v1_5_mix665k.json --images DIR
    python sft.py --vision CLIP --llm LLM --lr 0 --projector-lr 2e-3 --template plain --data blip_laion_cc_sbu_558k.json ...
                                                                   # a new model: stage 1 of LLaVA trains the projector only

Without flags it composes the toy world's tiny CLIP and a random LLM, under a million parameters, and trains LLM and projector on
the toy world's instruction data, whose captions and answers name expected objects that are not there. Expect the loss to fall
from 6.8 to about 0.13, and a model that sees (POPE random accuracy .95, object recall .96) and says too much (CHAIR_s .64).

Every assistant turn is scored, with its end token; nothing else is. Rows about one picture share it: they are packed behind
their common prompt and do not see each other (data.share_prompt), so --batch-size counts pictures. The answer is `model/` in
the hub layout, or a PEFT `adapter/` with --lora-rank.

Choices, the papers' settings being those of Sun et al. 2023 (their SFT+: 3 epochs, lr 2e-5, batch 128, cosine, warm-up .03):
1. The mean is over the tokens of the whole batch, also when it is accumulated; frameworks often average means.
2. Rows that share a picture meet in one batch; a trainer that shuffles rows would meet them apart.
3. The tower stays frozen unless --vision-lr says otherwise (LLaVA-1.6 tunes it, LLaVA-1.5 and Sun et al. do not).

Metrics: `loss` as above; `tokens` scored in the batch; `grad_norm` before clipping to 1; `lr` of the LLM; `step_seconds` from
rows in hand to optimizer step done, decoding of pictures included.
"""

import time
from collections import Counter

import checkpoints
import data
import training
from lab import report

TOY = {
    "data": ["instruct.json"],
    "vision": "clip",
    "llm": "llm",
    "steps": 1900,
    "batch_size": 8,
    "lr": 1.5e-3,
    "projector_lr": 1.5e-3,
    "save_every": 0,
}


def parse():
    """The command line."""
    parser = training.Parser(__doc__)
    training.add_training_flags(
        parser, lr=2e-5, projector_lr=2e-5, lora_rank=0, epochs=3, batch_size=128
    )
    group = parser.add_argument_group("supervised fine-tuning")
    group.add_argument(
        "--vision",
        metavar="DIR_OR_HUB_ID",
        help="with --llm: compose a new model from this CLIP ...",
    )
    group.add_argument(
        "--llm", metavar="DIR_OR_HUB_ID", help="... and this LLM, and a fresh projector"
    )
    group.add_argument(
        "--vision-lr", type=float, default=0.0, help="0 = vision tower frozen (default)"
    )
    return training.parse(parser, TOY)


def main():
    """Load, pack, train, save, evaluate."""
    args, begin = parse(), time.time()
    device, dtype = training.device_and_dtype(args)
    skipped = [] if args.skip_bad_rows else None
    records = data.load(args.data, args.images, answers=1, skipped=skipped)
    if args.model:
        model, processor = checkpoints.load(
            args.model, dtype, device, args.template, args.image_aspect
        )
    else:
        model, processor = checkpoints.compose(
            args.vision,
            args.llm,
            dtype,
            device,
            args.template or "vicuna_v1",
            args.image_aspect,
            args.seed,
        )
    processor.max_length = min(args.max_length or processor.max_length, processor.max_length)
    examples = data.share_prompt(data.encode_all(processor, records, skipped, every_turn=True))
    out = training.start(args, "sft", skipped)
    report.show_start(processor, examples)
    seconds = {"setup": time.time() - begin, "reference": 0.0}
    before = report.evaluate(model, processor, args, out / "before") if args.model else None
    seconds["eval"] = time.time() - begin - sum(seconds.values())

    model.prepare(
        args.lora_rank, llm=args.lr > 0, projector=args.projector_lr > 0, vision=args.vision_lr > 0
    )
    model.train(args.gradient_checkpointing)
    if args.gradient_checkpointing:
        model.llm.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = training.optimizer_for(model, args.lr, args.projector_lr, args.vision_lr)
    steps = training.total_steps(args, len(examples))
    first = training.load_checkpoint(out, model, optimizer) if args.resume else 0
    log = training.Log(out, first, steps)
    for step in range(first, steps):
        step_begin, metrics, rows = time.time(), Counter(), []
        micro_batches = training.batch_of(step, args, len(examples))
        metrics["tokens"] = sum(
            int(s.sum()) for micro in micro_batches for i in micro for s in examples[i].scored
        )
        for micro in micro_batches:
            batch = processor.collate([examples[i] for i in micro]).to(device)
            log_p, _ = model.log_probs(batch)  # (N,)
            loss = -log_p.sum() / metrics["tokens"]
            loss.backward()
            rows += [examples[i].record.where for i in micro]
            metrics["loss"] += loss.item()
        factor = training.schedule(step, steps)
        metrics["grad_norm"] = training.optimizer_step(optimizer, factor, metrics["loss"], rows)
        metrics["lr"], metrics["step_seconds"] = args.lr * factor, time.time() - step_begin
        log(step, ["loss"], metrics)
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
