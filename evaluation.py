"""What the evaluation scripts share: flags, and the model that is evaluated."""

from pathlib import Path

import processes
import training
from common import BadInput, positive_int, refuse_below_file
from formats import ratings


def add_flags(parser):
    """Flags that all evaluation scripts have."""
    flag = training.add_model_flags(parser, "give --answers").add_argument
    flag("--adapter", metavar="DIR", help="PEFT adapter to put on it, such as a run's adapter/")
    group = parser.add_argument_group("evaluation")
    flag = group.add_argument
    ratings.add_attributes_flag(group)
    flag(
        "--images",
        metavar="DIR",
        help="folder of the images (default: that of the first question file)",
    )
    flag("--out", metavar="DIR", help="folder for answers and metrics.json; new or empty")
    flag(
        "--batch-size",
        type=positive_int,
        default=64,
        metavar="N",
        help="prompts at a time; fewer where memory is short (default %(default)s)",
    )


def check_flags(args):
    """Either --answers, or all that a model needs; --out must be new or empty."""
    if args.answers and (args.model or args.adapter or args.attributes):
        raise BadInput(
            "--answers scores a file without a model; --model, --adapter and --attributes do not "
            "go with it."
        )
    if not args.answers and not (args.model and args.out):
        raise BadInput(
            "--model and --out are needed, or --answers FILE to score answers that exist."
        )
    out = Path(args.out) if args.out else None
    if out and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"--out {args.out} exists and is not an empty folder; give another.")
    refuse_below_file(args.out)


def load(args):
    """--model with --adapter -> (model, processor).

    Of several processes, each answers a share, and process 0 alone writes: sets args.out.
    """
    from formats import adapters, checkpoints  # brings transformers; --help does without

    processes.start(args.device)
    args.out = args.out if processes.number == 0 else None
    device, dtype = training.device_and_dtype(args)
    given = args.template, args.image_aspect, args.quantize
    template, aspect, quantize = adapters.as_trained(args.adapter, *given)
    model, processor = checkpoints.load(
        args.model, dtype, device, template, aspect, quantize=quantize
    )
    processor.ask = ratings.request(args.attributes) if args.attributes else ""
    if args.adapter:
        adapters.load_adapter(model, args.adapter)
    training.show_prompt(processor)
    return model, processor
