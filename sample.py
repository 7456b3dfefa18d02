"""Ask a model about images; with an adapter, show its answers before and after side by side.

    python sample.py --model llava-hf/llava-1.5-7b-hf --image cat.jpg \\
        --prompt "Describe the image in detail."
    python sample.py --model llava-hf/llava-1.5-7b-hf --adapter runs/dpo-0/adapter \\
        --image cat.jpg dog.jpg --k 3

Without --model, the toy base model of --seed answers; images of its world are below
`.cache/world-*/images`. One answer is greedy. Several are drawn at --temperature. Nothing is
written.
"""

import shutil
import textwrap
from itertools import zip_longest
from pathlib import Path

import training
from common import BadInput, Parser, not_negative, positive_int, run, seed
from data import Record
from formats import adapters, checkpoints, ratings
from formats.layouts import take_placeholder
from lab import toy
from sampling import generate


def parse():
    """The command line."""
    parser = Parser(__doc__)
    flag = training.add_model_flags(parser, "the toy base model of --seed").add_argument
    flag("--adapter", metavar="DIR", help="PEFT adapter: answer without it, then with it")
    group = parser.add_argument_group("question")
    flag = group.add_argument
    flag(
        "--image",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="images; each gets answers of its own",
    )
    flag("--prompt", default="Describe the image.", help="(default %(default)r)")
    ratings.add_attributes_flag(group)
    flag("--k", type=positive_int, default=1, help="answers per image (default %(default)s)")
    flag(
        "--temperature",
        type=not_negative,
        help="0 is greedy (default: 0 for one answer, else 1)",
    )
    flag(
        "--max-new-tokens",
        type=positive_int,
        default=256,
        metavar="N",
        help="most tokens of an answer (default %(default)s)",
    )
    flag("--seed", type=seed, default=0, help="seeds the sampling and names the toy base model")
    args = parser.parse_args()
    if args.temperature is None:
        args.temperature = 0.0 if args.k == 1 else 1.0
    for file in args.image:
        if not Path(file).is_file():
            raise BadInput(f"--image {file}: no such file.")
    return args


def side_by_side(columns, width):
    """Texts -> lines that show them in columns. width: characters of a whole line."""
    each = (width - 3 * (len(columns) - 1)) // len(columns)
    wrapped = []
    for text in columns:
        paragraphs = [textwrap.wrap(line, each) or [""] for line in text.splitlines()]
        wrapped.append([part for paragraph in paragraphs for part in paragraph])

    lines = []
    for parts in zip_longest(*wrapped, fillvalue=""):
        lines.append(" | ".join(part.ljust(each) for part in parts).rstrip())
    return lines


def main():
    """Load, answer, answer again with the adapter, print."""
    args = parse()
    device, dtype = training.device_and_dtype(args)
    name = args.model or str(toy.base(args.seed))
    given = args.template, args.image_aspect, args.quantize
    template, aspect, quantize = adapters.as_trained(args.adapter, *given)
    model, processor = checkpoints.load(name, dtype, device, template, aspect, quantize=quantize)
    processor.ask = ratings.request(args.attributes) if args.attributes else ""
    (prompt,) = take_placeholder((args.prompt,), args.image)  # `<image>` is the picture's place
    training.show_prompt(processor, prompt)
    records = [Record(f"--image {file}", Path(file), (prompt,)) for file in args.image]

    def answers():
        """k answers about each image."""
        return generate(
            model,
            processor,
            records,
            args.max_new_tokens,
            args.temperature,
            args.k,
            batch_size=8,
            seed=args.seed,
        )

    columns = [answers()]
    if args.adapter:
        adapters.load_adapter(model, args.adapter)
        columns.append(answers())

    width = shutil.get_terminal_size((120, 0)).columns
    for record, *texts in zip(records, *columns):
        print(f"{record.image}  {prompt}")
        if args.adapter:
            print("\n".join(side_by_side(["BEFORE", "AFTER"], width)))
        for row in zip(*texts):
            print("\n".join(side_by_side(row, width)) + "\n")


if __name__ == "__main__":
    run(main)
