"""Records to tensors: prompt templates, images, collation into packed rows.

    python data.py FILE --images DIR [--model DIR_OR_HUB_ID]    what a data file holds, before a run

The public layouts are read in formats/layouts.py, whole data sets in formats/dataset.py.
"""

from common import BadInput, run

import functools
import itertools
import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from formats.files import image_size, open_image
from model import pack
from prefetch import Prefetch


@dataclass(frozen=True)
class Record:
    """One prompt and its answers, best first: (chosen, rejected), or one in instruction data."""

    where: str  # file and row, for messages
    image: object  # Path, PackedImage, or None for a text-only row
    turns: tuple  # user, assistant, ..., user: the dialogue up to the answer
    answers: tuple = ()
    quality: float | None = None  # of the only answer, in a layout that rates single answers
    right: str | None = None  # what Fact-RLHF's rows say: a letter, "No", "Yes", "": none of these

    @property
    def prompt_key(self):
        """Image and dialogue: equal for records that ask the same, whatever file they come from."""
        return str(self.image), self.turns


# ---- prompt templates


@dataclass(frozen=True)
class Template:
    """How a dialogue is written. `{}` is the text; the image stands before the first user text.

    end: closes an answer and is its last scored token, "eos" or a special token of the tokenizer.
    between: stands before each later user turn. special: the tokens in it that are not letters.
    """

    start: str
    user: str
    answer: str
    end: str = "eos"
    between: str = ""
    after_image: str = "\n"
    special: tuple = ()


TEMPLATES = {
    "vicuna_v1": Template(  # LLaVA-1.5; conversation.py of haotian-liu/LLaVA
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
        "USER: {} ASSISTANT:",
        " {}",
    ),
    "mistral": Template("", "[INST] {} [/INST]", " {} "),
    "chatml": Template(  # LLaVA-1.6-34B
        "<|im_start|>system\nAnswer the questions.<|im_end|>",
        "<|im_start|>user\n{}<|im_end|><|im_start|>assistant\n",
        "{}",
        "<|im_end|>",
        special=("<|im_start|>", "<|im_end|>"),
    ),
    "plain": Template("", "{}\n", "{}\n"),  # no roles, for a model that knows none yet
}
OWN = "checkpoint"  # the name of a checkpoint's own chat template, which formats/chat.py reads


# ---- text and images to tensors


@dataclass
class Example:
    """A record as token ids: prompt (P,), answers K x (R,), and which answer tokens are scored."""

    prompt: torch.Tensor
    answers: list
    scored: list
    record: Record
    weights: list | None = None  # K x (R,), of the scored tokens in log p(answer); None: 1 each


@dataclass
class Processor:
    """Text and images to tensors, as one checkpoint was trained."""

    tokenizer: object
    image_token_id: int
    image_size: int  # side of the tower's input, pixels
    image_tokens: int  # features of one image, or of LLaVA-NeXT's overview of it
    image_mean: tuple
    image_std: tuple
    template: str  # a key of TEMPLATES, or OWN
    image_aspect: str  # "pad": to a square, as LLaVA-1.5 was trained; "checkpoint": centre crop
    max_length: int  # the longest prompt + answer, tokens
    ask: str = ""  # stands behind the last user turn: the attributes that steerlm.py asks for
    anyres: object = None  # the AnyRes of LLaVA-NeXT; with it, image_aspect has no effect
    own: Template | None = None  # what OWN means
    embeddings: int | None = None  # how many tokens have a row in the LLM's embeddings

    def __post_init__(self):
        if self.template not in TEMPLATES and self.template != OWN:
            accepted = ", ".join((*TEMPLATES, OWN))
            raise BadInput(f"--template {self.template!r} is unknown; accepted are {accepted}.")
        if self.image_aspect not in ("pad", "checkpoint"):
            raise BadInput(f"--image-aspect {self.image_aspect!r}; accepted are pad, checkpoint.")
        # `<image>` and `</s>` in a user's text are letters, not special tokens; set on the backend
        # alone, the first `encode` would undo it
        self.tokenizer.split_special_tokens = True
        encode = functools.partial(self.tokenizer.encode, add_special_tokens=False)
        self.tokenise = functools.lru_cache(1024)(encode)  # the system sentence is in every row

    # ---- text

    @property
    def form(self):
        """The `Template` that the dialogues are written in."""
        return self.own if self.template == OWN else TEMPLATES[self.template]

    @functools.cached_property
    def bos_ids(self):
        """The token that opens a dialogue, if this tokenizer adds one and the template has none."""
        bos = self.tokenizer.bos_token_id
        adds = bos is not None and self.tokenizer("a").input_ids[:1] == [bos]
        written = adds and (self.form.start + self.form.user).startswith(self.tokenizer.bos_token)
        return [bos] if adds and not written else []

    @property
    def end_id(self):
        """The token that ends an answer."""
        end = self.form.end
        return self.tokenizer.eos_token_id if end == "eos" else self.special_id(end)

    @property
    def stop_ids(self):
        """Tokens at which sampling stops."""
        return sorted({self.end_id, self.tokenizer.eos_token_id})

    def special_id(self, token):
        """The id of a special token that the template needs."""
        i = self.tokenizer.convert_tokens_to_ids(token)
        if i is None or i == self.tokenizer.unk_token_id:
            raise BadInput(f"--template {self.template} needs the token {token}, which is missing.")
        return i

    def template_pieces(self, pattern):
        """A part of the template in pieces: its special tokens as ids, the rest as text."""
        special = self.form.special
        parts = (
            re.split(f"({'|'.join(map(re.escape, special))})", pattern) if special else [pattern]
        )
        return [[self.special_id(p)] if p in special else p for p in parts]

    def user_pieces(self, text, first=False, image_tokens=0):
        """One user turn in pieces, texts and lists of ids; special tokens in `text` remain text.

        After the image's tokens LLaVA writes a newline, as in `<image>\\n`.
        """
        form, image = self.form, []
        before, after = form.user.split("{}")
        start = [self.bos_ids, *self.template_pieces(form.start)]
        if first and image_tokens:
            image = [[self.image_token_id] * image_tokens, form.after_image]
        start = start if first else self.template_pieces(form.between)
        return [*start, *self.template_pieces(before), *image, text, *self.template_pieces(after)]

    def answer_pieces(self, text):
        """An answer in pieces: its text, and its end token."""
        return [self.form.answer.replace("{}", text), [self.end_id]]

    def ids_of(self, turns, where=""):
        """[(pieces, scored), ...] -> ids, and for each id whether it is scored.

        Texts that meet are tokenised as one, so the ids are those of the whole string. Refused: a
        tokenizer that joins the end of a prompt with the answer; a text that it reads as the image,
        where `<image>` is an added token but not a special one; an id without an embedding.
        """
        ids, scored = [], []
        text, start = "", 0  # the text since the last ready ids, and where its tokens begin
        for pieces, is_scored in turns:
            for is_text, group in itertools.groupby(pieces, lambda piece: isinstance(piece, str)):
                if not is_text:
                    ready = sum(group, [])
                    ids += ready
                    scored += [is_scored] * len(ready)
                    text, start = "", len(ids)
                    continue
                new = "".join(group)
                text += new
                before, whole = ids[start:], self.tokenise(text)
                if self.image_token_id in whole:
                    token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
                    what = f"the letters {token} in {new.strip()[:80]!r} as the image"
                    raise BadInput(f"{where}: the tokenizer reads {what}.")
                if is_scored and whole[: len(before)] != before:
                    what = f"the end of the prompt with the answer {new.strip()[:30]!r}"
                    raise BadInput(f"{where}: the tokenizer joins {what}.")
                unscored = len(before) if is_scored else len(whole)
                ids[start:] = whole
                scored[start:] = [False] * unscored + [True] * (len(whole) - unscored)
        largest = max((i for i in ids if i != self.image_token_id), default=0)
        if self.embeddings and largest >= self.embeddings:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise BadInput(
                f"{where}: the token {token!r} has the id {largest}; "
                f"the model has embeddings of {self.embeddings} tokens."
            )
        return ids, scored

    def encode(self, record, every_turn=False):
        """Record -> Example. every_turn: score all assistant turns (instruction data).

        Refused: a text longer than `max_length`, and a pair whose answers are the same tokens.
        """
        # 1. the dialogue up to the answer
        dialogue = []
        for i, text in enumerate(record.turns):
            if i % 2:
                dialogue.append((self.answer_pieces(text), True))
            else:
                image_tokens = self.tokens_of(record.image) if i == 0 else 0
                text += self.ask if i == len(record.turns) - 1 else ""
                dialogue.append((self.user_pieces(text, i == 0, image_tokens), False))
        prompt, prompt_scored = self.ids_of(dialogue, record.where)
        P = len(prompt)
        if not P:
            raise BadInput(f"{record.where}: the tokenizer makes no token of the prompt.")

        # 2. each answer: what comes after it in the ids of the whole
        answers, scored = [], []
        for text in record.answers:
            ids, _ = self.ids_of([*dialogue, (self.answer_pieces(text), True)], record.where)
            answers.append(torch.tensor(ids[P:]))
            scored.append(torch.ones(len(ids) - P, dtype=torch.bool))

        longest = max(map(len, answers), default=0)
        if P + longest > self.max_length:
            raise BadInput(
                f"{record.where}: prompt of {P} and answer of {longest} tokens; "
                f"the limit is {self.max_length}."
            )
        if len(answers) == 2 and torch.equal(*answers):
            raise BadInput(f"{record.where}: chosen and rejected are the same tokens.")

        # 3. instruction data: earlier assistant turns are part of the answer, scored as they are
        if every_turn and any(prompt_scored):
            P = prompt_scored.index(True)
            answers = [torch.cat([torch.tensor(prompt[P:]), a]) for a in answers]
            scored = [torch.cat([torch.tensor(prompt_scored[P:]), s]) for s in scored]
        return Example(torch.tensor(prompt[:P]), answers, scored, record)

    def text(self, ids):
        """Token ids of an answer -> its text, without the end token."""
        kept = ids[~torch.isin(ids, torch.tensor(self.stop_ids))]
        return self.tokenizer.decode(kept, skip_special_tokens=False).strip()

    # ---- images

    def tokens_of(self, image):
        """How many image tokens a record's image takes. Its file is opened only if size matters."""
        if image is None:
            return 0
        return self.anyres.tokens(image_size(image)) if self.anyres else self.image_tokens

    @functools.cached_property
    def prefetch(self):
        """Decodes images before they are asked for, on threads."""
        return Prefetch(self.decode)

    def decode(self, image):
        """A Path, PackedImage or RGB image -> its `pixels`, and (height, width)."""
        image = image if isinstance(image, Image.Image) else open_image(image)
        return self.pixels(image), (image.height, image.width)

    def pixels(self, image):
        """A Path, PackedImage or RGB image -> (3, H, W) float32, as CLIPImageProcessor makes it.

        LLaVA-NeXT: (tiles, 3, H, W), the overview first, as LlavaNextImageProcessor makes them.
        """
        image = image if isinstance(image, Image.Image) else open_image(image)
        if self.anyres:
            return torch.stack([self.normalise(tile) for tile in self.anyres.tiles(image)])

        # LLaVA-1.5: to a square of the mean colour
        if self.image_aspect == "pad" and image.width != image.height:
            mean = tuple(int(255 * m) for m in self.image_mean)
            square = Image.new("RGB", (max(image.size),) * 2, mean)
            corner = (square.width - image.width) // 2, (square.height - image.height) // 2
            square.paste(image, corner)
            image = square

        # CLIP: the shorter edge to `side`, then the centre
        side, short = self.image_size, min(image.size)
        size = tuple(side if edge == short else int(side * edge / short) for edge in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        return self.normalise(image.crop((left, top, left + side, top + side)))

    def normalise(self, image):
        """RGB image -> (3, H, W), mean 0 and standard deviation 1 over CLIP's training images."""
        x = np.asarray(image, dtype=np.float32) / 255
        x = (x - np.float32(self.image_mean)) / np.float32(self.image_std)
        return torch.from_numpy(x).permute(2, 0, 1)

    def images(self, examples, view=None):
        """The examples' images -> `pixel_values`, `image_sizes` of a `Batch`; None without images.

        view: a function RGB image -> RGB image that shows the model something else (a crop, say).
        """
        found = []
        for example in examples:
            if example.record.image is None:
                continue
            if view:
                pixels, size = self.decode(view(open_image(example.record.image)))
            else:
                pixels, size = self.prefetch.get(example.record.image)
            room = int((example.prompt == self.image_token_id).sum())
            tokens = self.anyres.tokens(size) if self.anyres else self.image_tokens
            if tokens != room:
                raise BadInput(
                    f"{example.record.where}: the image takes {tokens} tokens and the prompt has "
                    f"room for {room}; its size has changed since the prompt was made."
                )
            found.append((pixels, size))
        if not found:
            return None, None
        pixels, sizes = zip(*found)
        if self.anyres:
            return torch.cat(pixels), torch.tensor(sizes)
        return torch.stack(pixels), None

    def collate(self, examples, view=None):
        """Examples -> packed Batch, images decoded (and seen through `view`)."""
        pixel_values, image_sizes = self.images(examples, view)
        prompts = [e.prompt for e in examples]
        answers, scored = [e.answers for e in examples], [e.scored for e in examples]
        batch = pack(prompts, answers, scored, pixel_values, image_sizes=image_sizes)
        if examples[0].weights:
            batch.weights = torch.cat([w for e in examples for w in e.weights])
        return batch


if __name__ == "__main__":
    from formats.inspector import main  # the one door upwards: a command, not a part of this file

    run(main)
