"""Records to tensors: prompt templates, pixels, collation into packed rows; and generation of answers.

    python data.py FILE --images DIR [--model DIR_OR_HUB_ID] [--json]      what a data file holds, before a long training run

Readers of the public layouts are in layouts.py; scripts reach them as `data.load`.
"""

import functools
import json
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import training
from files import image_hash, image_size, open_image
from layouts import LAYOUTS, Record, captions, load, read, refusals
from model import BadInput, pack

__all__ = [
    "LAYOUTS",
    "Record",
    "captions",
    "image_hash",
    "load",
    "open_image",
    "read",
]  # one door for the scripts


# ---- prompts


@dataclass(frozen=True)
class Template:
    """How a dialogue is written. `{}` is the text; the picture stands at the start of the first user text.

    `end` closes an answer and is its last scored token: "eos" or a special token of the tokenizer's.
    """

    start: str
    user: str
    answer: str
    end: str = "eos"


TEMPLATES = {
    "vicuna_v1": Template(  # LLaVA-1.5; conversation.py of haotian-liu/LLaVA
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        "polite answers to the user's questions. ",
        "USER: {} ASSISTANT:",
        " {}",
    ),
    "mistral": Template("", "[INST] {} [/INST]", " {} "),
    "chatml": Template(  # LLaVA-1.6-34B
        "<|im_start|>system\nAnswer the questions.<|im_end|>",
        "<|im_start|>user\n{}<|im_end|><|im_start|>assistant\n",
        "{}",
        "<|im_end|>",
    ),
    "plain": Template("", "{}\n", "{}\n"),  # no roles, for a model that knows none yet
}
CHOICE = re.compile(r"^A[.)] .+\n+B[.)] ", re.M)  # the options of a multiple-choice question
SPECIAL = re.compile(r"(<\|im_start\|>|<\|im_end\|>)")


@dataclass
class Example:
    """A record as token ids: prompt (P,), answers K x (R,), and which answer tokens are scored, K x (R,) bool."""

    prompt: torch.Tensor
    answers: list
    scored: list
    record: Record


@dataclass
class Processor:
    """Text and pictures to tensors, as one checkpoint was trained."""

    tokenizer: object
    image_token_id: int
    image_size: int  # side of the tower's input, pixels
    image_tokens: int  # features that one picture becomes, or LLaVA-NeXT's overview of it
    image_mean: tuple
    image_std: tuple
    template: str  # a key of TEMPLATES
    image_aspect: str  # "pad": to a square of the mean colour, as LLaVA-1.5 was trained; "checkpoint": centre crop
    max_length: int  # the LLM's context, tokens
    anyres: object = None  # the AnyRes of LLaVA-NeXT, trained on tiles: then both values of image_aspect mean these

    def __post_init__(self):
        if self.template not in TEMPLATES:
            raise BadInput(
                f"--template {self.template!r} is unknown; accepted are {', '.join(TEMPLATES)}."
            )
        if self.image_aspect not in ("pad", "checkpoint"):
            raise BadInput(
                f"--image-aspect {self.image_aspect!r} is unknown; accepted are pad, checkpoint."
            )
        # user text is never read as special tokens: `<image>` and `</s>` in an answer are the letters they are made of
        self.tokenizer.split_special_tokens = (
            True  # set on the backend alone, the first `encode` would put it back
        )
        # the system sentence comes back in every row: half of the time of encoding
        self._tokenise = functools.lru_cache(1024)(
            lambda text: self.tokenizer.encode(text, add_special_tokens=False)
        )

    @property
    def end_id(self):
        """The token that ends an answer; sampling stops there."""
        end = TEMPLATES[self.template].end
        return self.tokenizer.eos_token_id if end == "eos" else self._special(end)

    @property
    def stop_ids(self):
        """Tokens at which sampling stops."""
        return sorted({self.end_id, self.tokenizer.eos_token_id})

    def _special(self, token):
        i = self.tokenizer.convert_tokens_to_ids(token)
        if i is None or i == self.tokenizer.unk_token_id:
            raise BadInput(
                f"--template {self.template} needs the token {token}, which this tokenizer does not have."
            )
        return i

    def _ids(self, *parts):
        """Texts and ready ids -> ids. Texts that meet are tokenised as one, as in the whole string."""
        ids, text = [], ""
        for part in (*parts, []):
            if isinstance(part, str):
                text += part
                continue
            ids = ids + self._tokenise(text) if text else ids
            ids, text = ids + part, ""
        return ids

    def _written(self, pattern, text=""):
        """Parts of a piece of the template: its special tokens as ids; those that `text` spells out stay text."""
        pieces = SPECIAL.split(pattern)
        return [
            [self._special(p)] if SPECIAL.fullmatch(p) else p.replace("{}", text) for p in pieces
        ]

    def _user(self, text, first, image_tokens):
        """Parts of one user turn. The picture's tokens, then a newline, as LLaVA writes `<image>\\n`."""
        template = TEMPLATES[self.template]
        before, after = template.user.split("{}")
        bos = self.tokenizer.bos_token_id
        start = (
            [
                *([[bos]] if bos is not None and self._adds_bos else []),
                *self._written(template.start),
            ]
            if first
            else []
        )
        shown = [[self.image_token_id] * image_tokens, "\n"] if first and image_tokens else []
        return [*start, *self._written(before), *shown, *self._written("{}" + after, text)]

    def _turn(self, user, text, where):
        """Parts of a user turn and the answer's text -> (ids of the prompt, ids of the answer), those of the whole string."""
        cue = self._ids(*user)
        ids = self._ids(*user, TEMPLATES[self.template].answer.replace("{}", text), [self.end_id])
        if ids[: len(cue)] != cue:
            raise BadInput(
                f"{where}: the tokenizer joins the end of the prompt with the answer {text[:30]!r}."
            )
        return cue, ids[len(cue) :]

    def tokens_of(self, image):
        """How many image tokens a record's picture takes. Its file is looked at only where its size matters."""
        if image is None:
            return 0
        return self.anyres.tokens(image_size(image)) if self.anyres else self.image_tokens

    @functools.cached_property
    def _adds_bos(self):
        return self.tokenizer("a").input_ids[:1] == [self.tokenizer.bos_token_id]

    def encode(self, record, every_turn=False):
        """Record -> Example. every_turn: score all assistant turns (instruction data), not only the last answer.

        The ids of prompt + answer are those of the whole string; a tokenizer that joins the two is refused, as is a text longer
        than the context, and a pair whose two answers are the same tokens.
        """
        image_tokens = self.tokens_of(record.image)
        prompt, history = [], []  # history: (start, end) of earlier assistant turns
        for i in range(0, len(record.turns) - 1, 2):
            user = self._user(record.turns[i], i == 0, image_tokens)
            cue, answer = self._turn(user, record.turns[i + 1], record.where)
            history.append((len(prompt) + len(cue), len(prompt) + len(cue) + len(answer)))
            prompt += cue + answer
        user = self._user(record.turns[-1], len(record.turns) == 1, image_tokens)
        answers = [torch.tensor(self._turn(user, text, record.where)[1]) for text in record.answers]
        prompt = torch.tensor(prompt + self._ids(*user))
        scored = [torch.ones(len(a), dtype=torch.bool) for a in answers]
        longest = len(prompt) + max(map(len, answers), default=0)
        if longest > self.max_length:
            raise BadInput(
                f"{record.where}: prompt of {len(prompt)} and answer of {longest - len(prompt)} tokens; the limit is {self.max_length}."
            )
        if len(answers) == 2 and torch.equal(answers[0], answers[1]):
            raise BadInput(
                f"{record.where}: chosen and rejected are the same tokens; a pair must differ."
            )
        if every_turn and history:
            start = history[0][0]
            mask = torch.zeros(len(prompt) - start, dtype=torch.bool)
            for begin, end in history:
                mask[begin - start : end - start] = True
            answers, scored = (
                [torch.cat([prompt[start:], a]) for a in answers],
                [torch.cat([mask, s]) for s in scored],
            )
            prompt = prompt[:start]
        return Example(prompt, answers, scored, record)

    def pixels(self, image):
        """A Path, PackedImage or RGB picture -> (3, H, W) float32, as CLIPImageProcessor makes it.

        LLaVA-NeXT: (tiles, 3, H, W), the overview first, as LlavaNextImageProcessor makes them.
        """
        picture = image if isinstance(image, Image.Image) else open_image(image)
        if self.anyres:
            return torch.stack([self._normalised(tile) for tile in self.anyres.tiles(picture)])
        side = self.image_size
        if self.image_aspect == "pad" and picture.width != picture.height:
            square = Image.new(
                "RGB", (max(picture.size),) * 2, tuple(int(255 * m) for m in self.image_mean)
            )
            square.paste(
                picture,
                ((square.width - picture.width) // 2, (square.height - picture.height) // 2),
            )
            picture = square
        short = min(picture.size)
        size = tuple(side if edge == short else int(side * edge / short) for edge in picture.size)
        picture = picture.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        return self._normalised(picture.crop((left, top, left + side, top + side)))

    def _normalised(self, picture):
        x = np.asarray(picture, dtype=np.float32) / 255
        return torch.from_numpy(
            (x - np.float32(self.image_mean)) / np.float32(self.image_std)
        ).permute(2, 0, 1)

    def images(self, examples):
        """`pixel_values` and `image_sizes` of the examples' pictures, as `Batch` holds them; None where there are none."""
        pixels, sizes = [], []
        for image in (e.record.image for e in examples if e.record.image is not None):
            picture = open_image(image)
            pixels.append(self.pixels(picture))
            sizes.append((picture.height, picture.width))
        if not pixels:
            return None, None
        return (
            (torch.cat(pixels), torch.tensor(sizes)) if self.anyres else (torch.stack(pixels), None)
        )

    def collate(self, examples):
        """Examples -> packed Batch, pictures decoded."""
        pixel_values, image_sizes = self.images(examples)
        return pack(
            [e.prompt for e in examples],
            [e.answers for e in examples],
            [e.scored for e in examples],
            pixel_values,
            image_sizes=image_sizes,
        )

    def rated(self, example, question):
        """The example as a reward model reads it: behind each answer one more user turn, up to the cue of its answer.

        question: what that turn asks. An answer that was cut off gets its end token, as every answer of the data has.
        """
        turn = torch.tensor(self._ids(*self._user(question, False, 0)))
        answers = []
        for ids in example.answers:
            closed = len(ids) and int(ids[-1]) in self.stop_ids
            answers.append(
                torch.cat([ids, turn] if closed else [ids, torch.tensor([self.end_id]), turn])
            )
        longest = len(example.prompt) + max(map(len, answers))
        if longest > self.max_length:
            raise BadInput(
                f"{example.record.where}: prompt, answer and evaluation of {longest} tokens; the limit is {self.max_length}."
            )
        return replace(
            example, answers=answers, scored=[torch.ones(len(a), dtype=torch.bool) for a in answers]
        )

    def length(self, text):
        """Tokens of a text that stands by itself."""
        return len(self._tokenise(text))

    def text(self, ids):
        """Token ids of an answer -> its text, without the end token."""
        return self.tokenizer.decode(
            ids[~torch.isin(ids, torch.tensor(self.stop_ids))], skip_special_tokens=False
        ).strip()


def share_prompt(examples):
    """Examples about one picture -> packed rows that share the picture and whatever their prompts have in common.

    Each stays its own dialogue (siblings are invisible to each other): the loss is that of separate rows, at a fraction of the
    tokens. Text-only examples stay alone.
    """
    groups = {}
    for i, e in enumerate(examples):
        groups.setdefault(e.record.image if e.record.image is not None else i, []).append(e)
    shared = []
    for group in groups.values():
        common = min(len(e.prompt) for e in group)
        for e in group[1:]:
            differ = (e.prompt[:common] != group[0].prompt[:common]).nonzero()
            common = int(differ[0]) if len(differ) else common
        answers, scored = [], []
        for e in group:
            rest = e.prompt[common:]
            answers += [torch.cat([rest, a]) for a in e.answers]
            scored += [torch.cat([torch.zeros(len(rest), dtype=torch.bool), s]) for s in e.scored]
        shared.append(Example(group[0].prompt[:common], answers, scored, group[0].record))
    return shared


def facts_of(record, known):
    """The captions of a record's picture, `known` being {image name: [text, ...]}; None if there are none.

    A record without picture has []. Names are those of LLaVA-RLHF: the file's, COCO's without what stands before its number, and
    aok_<file> for the rationales of a multiple-choice question.
    """
    if record.image is None:
        return []
    name = Path(str(record.image)).name
    names = [name, name.rsplit("_", 1)[-1]]
    if CHOICE.search(record.turns[-1]):
        names = [f"aok_{n}" for n in names] + names
    return next((known[n] for n in names if n in known), None)


def facts_for(records, known, missing):
    """The captions of each record's picture: a list a record, [] where there are none. known: {image name: [text, ...]}.

    missing: "refuse" raises BadInput for a picture that is not known, "count" prints how many there are.
    """
    found = [facts_of(r, known) for r in records]
    without = [r for r, facts in zip(records, found) if facts is None]
    if without and missing == "refuse":
        raise BadInput(
            f"{without[0].where}: --facts has no caption of {without[0].image} ({len(without)} of {len(records)} rows are "
            "without; --missing-facts count goes on without them)."
        )
    if without:
        print(f"{len(without)} of {len(records)} rows are without facts", file=sys.stderr)
    return [facts or [] for facts in found]


def evaluation(question, intro, facts, rng, most=None):
    """The text of a reward model's evaluation turn: `{facts}` becomes the facts in random order, one bullet a line.

    intro: what introduces them; without facts nothing takes the place of `{facts}`. most: how many are drawn, if not all.
    """
    bullets = "".join(
        f"\n- {text}" for text in rng.sample(facts, min(len(facts), most or len(facts)))
    )
    return question.replace("{facts}", intro + bullets if facts else "")


def longest_facts(processor, facts, most=None):
    """Of the captions those that make the longest evaluation turn, in tokens."""
    return sorted(facts, key=processor.length)[-(most or len(facts)) :]


def generate(
    model,
    processor,
    records,
    max_new_tokens,
    temperature=0.0,
    k=1,
    batch_size=64,
    seed=0,
    label="generate",
):
    """k answers to each record's prompt -> list of k texts each, in order. Progress on stderr when it takes long."""
    examples = [processor.encode(replace(r, answers=())) for r in records]
    order = sorted(
        range(len(examples)), key=lambda i: len(examples[i].prompt)
    )  # like lengths together: little padding
    generator = torch.Generator(model.device).manual_seed(seed)
    progress, texts = training.Progress(label, len(records)), [None] * len(records)
    for at in range(0, len(order), batch_size):
        chosen = order[at : at + batch_size]
        batch = [examples[i] for i in chosen]
        pixel_values, image_sizes = processor.images(batch)
        samples = model.sample(
            [e.prompt for e in batch],
            pixel_values,
            k,
            max_new_tokens,
            temperature,
            processor.stop_ids,
            generator=generator,
            image_sizes=image_sizes,
        )
        for i, tokens in zip(chosen, samples.tokens):
            texts[i] = [processor.text(t) for t in tokens]
        progress(at + len(chosen))
    return texts


def skipped_row(record, why):
    """A record that a run leaves out, as skipped.json lists it: {"file":, "row":, "why":}."""
    file, row, part = re.fullmatch(r"(.*?), row (\d+)(.*)", record.where, re.DOTALL).groups()
    return {"file": file, "row": int(row), "why": f"{part.strip(', ')}: {why}" if part else why}


def encode_each(processor, records, every_turn=False):
    """Records -> (examples of those that can be encoded, [{"file":, "row":, "why":}] of the others)."""
    examples, refused = [], []
    for record in records:
        try:
            examples.append(processor.encode(record, every_turn))
        except BadInput as error:
            refused.append(skipped_row(record, str(error).removeprefix(f"{record.where}: ")))
    return examples, refused


def encode_all(processor, records, skipped=None, every_turn=False):
    """Records -> Examples. One that cannot be encoded stops the run, or joins the list `skipped`, as in `layouts.load`."""
    examples, refused = encode_each(processor, records, every_turn)
    if refused and (skipped is None or not examples):
        first = refused[0]
        raise BadInput(
            f"{first['file']}, row {first['row']}: {first['why']} {refusals(len(refused), len(records))}"
        )
    if refused:
        print(
            f"{len(refused)} of {len(records)} rows are skipped at encoding, first: {refused[0]['why']}",
            file=sys.stderr,
        )
        skipped += refused
    return examples


def with_room(processor, examples, max_new_tokens, skipped=None):
    """Those of the examples whose prompt leaves room for an answer. One without stops the run, or joins the list `skipped`."""
    room = lambda e: len(e.prompt) + max_new_tokens <= processor.max_length
    short, long = [e for e in examples if room(e)], [e for e in examples if not room(e)]
    if long and (skipped is None or not short):
        raise BadInput(
            f"{long[0].record.where}: a prompt of {len(long[0].prompt)} tokens leaves no room for --max-new-tokens "
            f"{max_new_tokens}; the limit is {processor.max_length} ({len(long)} of {len(examples)} prompts)."
        )
    if long:
        print(
            f"{len(long)} of {len(examples)} prompts leave no room for --max-new-tokens and are skipped",
            file=sys.stderr,
        )
        skipped += [
            skipped_row(e.record, "the prompt leaves no room for --max-new-tokens") for e in long
        ]
    return short


def main():
    """Show what a data file holds: layout, counts, what is refused and why, samples; with --model also token lengths."""
    parser = training.Parser(main.__doc__)
    parser.add_argument(
        "file", help="parquet, JSON or JSON lines, in any layout listed at the top of layouts.py"
    )
    parser.add_argument("--images", help="folder of the pictures (default: the file's)")
    parser.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        help="count tokens as this checkpoint does, and what it would refuse",
    )
    parser.add_argument("--template", help="with --model: another prompt than the checkpoint's own")
    parser.add_argument(
        "--max-length",
        type=int,
        default=0,
        metavar="N",
        help="with --model: as in training; 0 = its context",
    )
    parser.add_argument("--json", action="store_true", help="print for programs")
    args = parser.parse_args()
    file = read(args.file, args.images)
    records, refused, lengths = file.records, file.refused, {}
    if args.model:
        import checkpoints

        _, processor = checkpoints.load(args.model, device="meta", template=args.template)
        processor.max_length = min(args.max_length or processor.max_length, processor.max_length)
        examples, others = encode_each(processor, records)
        records = [e.record for e in examples]
        refused = refused + [{"row": r["row"], "why": r["why"]} for r in others]
        columns = {"prompt": [len(e.prompt) for e in examples]}
        for i, name in enumerate(("chosen", "rejected")):
            columns[name] = [len(e.answers[i]) for e in examples if i < len(e.answers)]
        for name, values in columns.items():
            if values:
                shown = np.percentile(values, (0, 50, 95, 100), method="nearest").tolist()
                lengths[name] = dict(zip(("min", "median", "p95", "max"), shown))
    samples = []
    for r in random.Random(0).sample(records, min(3, len(records))):
        chosen, rejected = (*r.answers, None)[:2]
        samples.append(
            {
                "image": r.image and str(r.image),
                "prompt": r.turns[-1],
                "chosen": chosen,
                "rejected": rejected,
            }
        )
    pairs = sum(len(r.answers) == 2 for r in records)
    found = {
        "layout": file.layout,
        "rows": file.rows,
        "pairs": pairs,
        "refused": refused,
        "notes": dict(file.notes),
    }
    if args.json:
        print(
            json.dumps(
                found | ({"tokens": lengths} if args.model else {}) | {"samples": samples}, indent=1
            )
        )
        return
    bad = len({r["row"] for r in refused})
    print(f"{args.file}: layout {file.layout}, {file.rows} rows, {pairs} pairs, {bad} rows refused")
    kinds = [
        re.sub(r"'[^']*'|\"[^\"]*\"|\S*[/\d]\S*", "..", r["why"]) for r in refused
    ]  # paths, quotes, numbers vary
    for kind, count in Counter(kinds).most_common():
        first = refused[kinds.index(kind)]
        print(f"  refused: {count}, first row {first['row']}: {first['why']}")
    for why, count in file.notes.items():
        print(f"  {count} {why}")
    for name, values in lengths.items():
        print(
            f"  tokens of {name}: " + ", ".join(f"{key} {value}" for key, value in values.items())
        )
    for s in samples:
        print("".join(f"\n{key:>9}  {value}" for key, value in s.items() if value is not None))


if __name__ == "__main__":
    training.run(main)
