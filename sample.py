"""Ask a model about a picture; with an adapter: before and after, side by side.

    python sample.py --model llava-hf/llava-1.5-7b-hf --image cat.jpg --prompt "Describe the image in detail."
    python sample.py --model llava-hf/llava-1.5-7b-hf --adapter runs/dpo-0/adapter --image cat.jpg dog.jpg --k 3

Without --model the toy base of --seed answers; pictures of its world are below `.cache/world-*/images`. One answer is greedy,
more are drawn at --temperature. Nothing is written.
"""

import shutil
import textwrap
from itertools import zip_longest
from pathlib import Path

import checkpoints
import data
import training
from model import BadInput


def parse():
    """The command line."""
    parser = training.Parser(__doc__)
    group = training.add_model_flags(parser)
    group.add_argument(
        "--adapter", metavar="DIR", help="PEFT adapter: answer without it, then with it"
    )
    group = parser.add_argument_group("question")
    group.add_argument(
        "--image",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="each picture is asked about alone",
    )
    group.add_argument("--prompt", default="Describe the image.", help="(default %(default)r)")
    group.add_argument("--k", type=int, default=1, help="answers a picture (default %(default)s)")
    group.add_argument(
        "--temperature", type=float, help="0 is greedy (default: 0 for one answer, else 1)"
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="longest answer (default %(default)s)",
    )
    group.add_argument("--seed", type=int, default=0, help="of drawing, and of the toy base")
    args = parser.parse_args()
    if args.temperature is None:
        args.temperature = 0.0 if args.k == 1 else 1.0
    for name, value, least in (
        ("k", args.k, 1),
        ("max-new-tokens", args.max_new_tokens, 1),
        ("temperature", args.temperature, 0),
    ):
        if not least <= value < float("inf"):
            raise BadInput(f"--{name} is {value}; {least} or more is needed.")
    for file in args.image:
        if not Path(file).is_file():
            raise BadInput(f"--image {file}: no such file.")
    return args


def side_by_side(columns, width):
    """Texts -> lines of them in columns."""
    each = (width - 3 * (len(columns) - 1)) // len(columns)
    wrapped = [
        [w for line in text.splitlines() for w in textwrap.wrap(line, each) or [""]]
        for text in columns
    ]
    return [
        " | ".join(part.ljust(each) for part in row).rstrip()
        for row in zip_longest(*wrapped, fillvalue="")
    ]


def main():
    """Load, answer, with an adapter answer again, print."""
    args = parse()
    device, dtype = training.device_and_dtype(args)
    if args.model is None:
        from lab import toyworld

        args.model = str(toyworld.base(args.seed))
    model, processor = checkpoints.load(args.model, dtype, device, args.template, args.image_aspect)
    records = [data.Record(f"--image {file}", Path(file), (args.prompt,)) for file in args.image]
    ask = lambda: data.generate(
        model, processor, records, args.max_new_tokens, args.temperature, args.k, 8, args.seed
    )
    said = [ask()]
    if args.adapter:
        checkpoints.load_adapter(model, args.adapter)
        said.append(ask())
    width = shutil.get_terminal_size((120, 0)).columns
    for record, *texts in zip(records, *said):
        print(f"{record.image}  {args.prompt}")
        if args.adapter:
            print("\n".join(side_by_side(["BEFORE", "AFTER"], width)))
        for row in zip(*texts):
            print("\n".join(side_by_side(row, width)) + "\n")


if __name__ == "__main__":
    training.run(main)
