"""Ask a model about images; with an adapter, show its answers before and after side by side.

    python sample.py --model llava-hf/llava-1.5-7b-hf --image cat.jpg \\
        --prompt "Describe the image in detail."
    python sample.py --model llava-hf/llava-1.5-7b-hf --adapter runs/dpo-0/adapter \\
        --image cat.jpg dog.jpg --k 3
    python sample.py --model llava-hf/llava-1.5-7b-hf --image cat.jpg --chat

Without --model, the toy base model of --seed answers; images of its world are below
`.cache/world-*/images`. One answer is greedy. Several are drawn at --temperature. Nothing is
written.

With an adapter, the words in [brackets] are those that the model without it would not have said: it
reads the same answer up to there, and its most likely next token is another one. A hallucination
that the adapter removes shows as such a word at the place where the two part.

Of --attributes: the request goes to a model with an adapter, or to one given without --adapter; the
base beside an adapter is asked plainly.

--chat asks on about one image: a line is a turn, an empty line or the end of input ends it. With an
adapter both answer every turn; the dialogue goes on with the answer of the adapter.
"""

from common import BadInput, Parser, not_negative, positive_int, run, seed

import re
import shutil
import sys
import textwrap
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import torch

import evaluation
import training
from data import Record
from formats import ratings
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
    flag("--chat", action="store_true", help="several turns, read from the terminal")
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
    if args.chat and (len(args.image) > 1 or args.k > 1):
        raise BadInput("--chat is about one image, with one answer a turn: no --k.")
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


@contextmanager
def base_alone(model, processor):
    """Inside, the checkpoint answers: no adapter, and no --attributes, which it never learned."""
    asked, processor.ask = processor.ask, ""
    try:
        with model.reference():
            yield
    finally:
        processor.ask = asked


def marked(model, processor, record, text):
    """The text, in brackets each word that the model would not have said without its adapter."""
    # 1. what it would have said in the place of each token
    with torch.no_grad(), base_alone(model, processor):
        batch = processor.collate([processor.encode(replace(record, answers=(text,)))])
        tokens, batch = batch.targets[:-1], batch.to(model.device)  # without the end token
        h = model.hidden_states(batch, batch.index)  # (R, D)
        logits = (h.to(model.dtype) @ model.head_weight().t()).float()  # (R, V)
    logits[:, model.image_token_id] = -torch.inf
    differs = (logits.argmax(-1).cpu()[:-1] != tokens).tolist()

    # 2. the words that these tokens are part of
    decode = processor.tokenizer.decode
    ends = [len(decode(tokens[: i + 1], skip_special_tokens=False)) for i in range(len(tokens))]
    spans = [(a, b) for a, b, other in zip([0, *ends], ends, differs) if other]
    shown = lambda m: any(a < m.end() and m.start() < b for a, b in spans)
    whole = decode(tokens, skip_special_tokens=False)
    return re.sub(r"\S+", lambda m: f"[{m[0]}]" if shown(m) else m[0], whole).strip()


def answers_to(records, model, processor, args):
    """k answers to each record -> columns: with an adapter those without it, then with it."""
    columns = []
    alone = base_alone(model, processor)
    for who in (alone, nullcontext()) if args.adapter else (nullcontext(),):
        with who:
            columns.append(
                generate(
                    model,
                    processor,
                    records,
                    args.max_new_tokens,
                    args.temperature,
                    args.k,
                    batch_size=8,
                    seed=args.seed,
                )
            )
    return columns


def show(record, texts, model, processor, args):
    """Print the answers to one record: rows of columns."""
    width = shutil.get_terminal_size((120, 0)).columns
    if args.adapter:
        print("\n".join(side_by_side(["BEFORE", "AFTER"], width)))
    for row in zip(*texts):
        if args.adapter:
            row = row[0], marked(model, processor, record, row[1])
        print("\n".join(side_by_side(row, width)) + "\n")


def chat(record, model, processor, args):
    """Answer line by line, until an empty one."""
    turns = []
    while True:
        print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return print()
        record = replace(record, turns=(*turns, line))
        columns = answers_to([record], model, processor, args)
        show(record, [texts[0] for texts in columns], model, processor, args)
        turns += [line, columns[-1][0][0]]


def main():
    """Load, answer without and with the adapter, print."""
    args = parse()
    args.model = args.model or str(toy.base(args.seed))
    model, processor = evaluation.load(args)
    (prompt,) = take_placeholder((args.prompt,), args.image)  # `<image>` is the picture's place
    two = args.adapter and args.attributes  # then they are asked differently
    if two:
        with base_alone(model, processor):
            training.show_prompt(processor, prompt, "BEFORE: ")
    training.show_prompt(processor, prompt, "AFTER: " if two else "")
    records = [Record(f"--image {file}", Path(file), (prompt,)) for file in args.image]
    if args.chat:
        return chat(records[0], model, processor, args)

    columns = answers_to(records, model, processor, args)
    for record, *texts in zip(records, *columns):
        print(f"{record.image}  {prompt}")
        show(record, texts, model, processor, args)


if __name__ == "__main__":
    run(main)
