"""`python data.py FILE`: what a data file holds, before a long training run."""

import json
import random
import re
from collections import Counter

import numpy as np

from common import Parser, natural
from formats import dataset, layouts, pictures


def parse():
    """The command line."""
    parser = Parser(main.__doc__)
    parser.add_argument(
        "file", help="parquet, JSON or JSON lines, in any layout listed in formats/layouts.py"
    )
    parser.add_argument(
        "--images", metavar="DIR", help="folder of the images (default: the file's)"
    )
    parser.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        help="count tokens as this checkpoint does, and what it would refuse",
    )
    parser.add_argument("--template", help="with --model: another prompt than the checkpoint's own")
    parser.add_argument(
        "--max-length",
        type=natural,
        default=0,
        metavar="N",
        help="with --model: as in training; 0 = its context",
    )
    parser.add_argument(
        "--check-images",
        choices=pictures.HOW,
        default="full",
        help="decode every image, or read its header (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print for programs")
    return parser.parse_args()


def main():
    """Show a data file: layout, counts, refused rows, samples; with --model also token lengths."""
    args = parse()
    file = layouts.read(args.file, args.images)
    why = pictures.unreadable([r.image for r in file.records], args.check_images)
    bad = [refused_row(r, why[r.image]) for r in file.records if r.image in why]
    records, tokens, fits = [r for r in file.records if r.image not in why], {}, None
    refused = file.refused + bad
    if args.model:
        import torch  # without --model neither it nor transformers is needed

        import memory
        from formats import checkpoints

        model, processor = checkpoints.load(
            args.model,
            dtype=torch.bfloat16,
            device="meta",
            template=args.template,
            max_length=args.max_length,
        )
        encoded = [(r, *dataset.encode(processor, r)) for r in records]
        records = [r for r, example, _ in encoded if example]
        refused = refused + [refused_row(r, why) for r, _, why in encoded if why]
        examples = [example for _, example, _ in encoded if example]
        tokens = lengths(examples)
        if examples and len(examples[0].answers) == 2:
            load = memory.longest(model, examples, memory.DPO.batch_size)
            device, room = torch.device("cuda"), None
            if torch.cuda.is_available():
                room = memory.available(device)
            fits = memory.says(model, memory.DPO, load, device, room)

    summary = {
        "layout": file.layout,
        "rows": file.rows,
        "with_picture": file.with_picture,
        "pairs": sum(len(r.answers) == 2 for r in records),
        "refused": refused,
        "notes": dict(file.notes),
    }
    if args.model:
        summary["tokens"] = tokens
        summary["memory"] = fits
    summary["samples"] = [
        sample_of(r) for r in random.Random(0).sample(records, min(3, len(records)))
    ]
    if args.json:
        print(json.dumps(summary, indent=1))
    else:
        show(args.file, summary)


def refused_row(record, why):
    """A row that cannot be encoded -> {"row":, "why":}."""
    row = dataset.located(record.where, why)
    return {"row": row["row"], "why": row["why"]}


def lengths(examples):
    """Tokens of prompts and answers -> {"prompt": {"min":, "median":, "p95":, "max":}, ...}."""
    columns = {"prompt": [len(e.prompt) for e in examples]}
    for i, name in enumerate(("chosen", "rejected")):
        columns[name] = [len(e.answers[i]) for e in examples if i < len(e.answers)]
    spreads = {}
    for name, values in columns.items():
        if values:
            spread = np.percentile(values, (0, 50, 95, 100), method="nearest").tolist()
            spreads[name] = dict(zip(("min", "median", "p95", "max"), spread))
    return spreads


def sample_of(record):
    """A record as it is shown."""
    chosen, rejected = (*record.answers, None, None)[:2]
    image = record.image and str(record.image)
    return {"image": image, "prompt": record.turns[-1], "chosen": chosen, "rejected": rejected}


def show(path, summary):
    """Print for people."""
    refused = summary["refused"]
    bad = len({r["row"] for r in refused})
    print(
        f"{path}: layout {summary['layout']}, {summary['rows']} rows, {summary['with_picture']} with "
        f"a picture, {summary['pairs']} pairs, {bad} rows refused"
    )
    # reasons that differ only in paths, quotes and numbers are of one kind
    kinds = [re.sub(r"'[^']*'|\"[^\"]*\"|\S*[/\d]\S*", "..", r["why"]) for r in refused]
    for kind, count in Counter(kinds).most_common():
        first = refused[kinds.index(kind)]
        print(f"  refused: {count}, first row {first['row']}: {first['why']}")
    for why, count in summary["notes"].items():
        print(f"  {count} {why}")
    for name, spread in summary.get("tokens", {}).items():
        shown = ", ".join(f"{key} {value}" for key, value in spread.items())
        print(f"  tokens of {name}: {shown}")
    if summary.get("memory"):
        print(f"  dpo.py's defaults in bfloat16: {summary['memory']}")
    for sample in summary["samples"]:
        print("".join(f"\n{key:>9}  {value}" for key, value in sample.items() if value is not None))
