"""Bias-driven hallucination sampling (BDHS): preference data that the model makes by itself.

The idea (Amirloo et al. 2024, section 3.4). A hallucination is what a language model says about an
image that it does not look at. So take a good answer y+, hide nearly all image tokens from
attention, and let the model write the second half of each sentence again. The result shows its own
bias: fluent, and close to y+. Then train with DPO to prefer y+. No annotator, no second model, no
corrupted text. An example with 3 of 36 image tokens visible:

    y+    This is a kitchen. A red cup is on the left. There is a clock in the middle.
    cut   This is a | kitchen. A red | cup is on the left. There is | a clock in the middle.
    y-    This is a kitchen. A red bowl is on the right. There is an oven on the left.

Every sentence is completed after the true sentences before it, not after the rewritten ones. So all
sentences can be drawn at the same time, and y- differs from y+ only in parts. Algorithm 1, with
line numbers of our own:

    1   for i = 1 .. N:
    2       hide each image token with probability rho_th
    3       if i = N > 1:  draw an answer without guidance, return it
    4       for each sentence s_k of y+:
    5           if it begins with "Yes" or "No", swap these with probability .5
    6           cut it at random:  s_k = (first part, rest)
    7           y-_k = first part + a text drawn from pi(. | prompt, image with hidden tokens,
                original sentences y+_1 .. y+_k-1, first part), up to a full stop or the end
    8       y- = y-_1 y-_2 ...;  return it unless similarity(y-, y+) >= eps_s
    9   return the last y-, even if it is similar

    python bdhs.py                  # toy world: preferences.json for `dpo.py --lr 3e-4`, a picture
    python bdhs.py --model llava-hf/llava-v1.6-vicuna-7b-hf --data povid.json --images DIR
    python bdhs.py --online         # train: every step draws its negatives from the current policy

Memory: each sentence that is completed holds keys and values of its whole prompt, so the default
--batch-size 32 is for small models.

Online, the loss is DPO (eq. 3) on (y+, y-). With --gamma and a given rejected answer it is Avg-DPO
(eq. 5): gamma L(y+, given) + (1 - gamma) L(y+, y-). The hidden tokens are for drawing only: policy
and reference score both answers with the whole image. One online step:
1. batch   prompts with their y+; for each micro-batch:
2. draw        y- with the current policy (Algorithm 1)
3. score       log pi and log pi_ref of both answers
4. loss        and its gradient
5. step    clip the gradient, update
6. log

At step 0 `rewards/margins` is 0 and the loss is ln 2 times the share of examples with a negative
(with --gamma, of an example without a usable one gamma ln 2).

Ablations: --rho 0: guidance only; --no-guidance: mask only; --noise-steps 500 --rho 0: BDHS_noise,
a diffused image instead of a mask (eq. 8, 9; noise as in povid.py, which is POVID's distortion).
--dropout-ntp: the negatives of MPO's paper (arXiv 2411.10442) in place of lines 3 to 7: y- keeps
half of the words of y+ and goes on to its end without the image. Here the image is hidden whole (no
token is left out, no position moves), and an answer too similar to y+ is drawn again.

Choices where the paper is silent, and deviations:
1. rho_th = .99, as in the paper, leaves 5.8 of LLaVA-1.5's 576 tokens visible. Smaller images keep
   as many: rho_th = 1 - max(.01, 5.76 / T) for T tokens, .84 for the toy world's 36. A hidden token
   keeps its place: no other position attends to it, in no layer, during the whole generation, and
   no position id moves.
2. A cut falls between words, each place equally likely: from no word to all but one are kept. A
   swapped "Yes" is always kept, otherwise the swap would have no effect; a swapped sentence may be
   kept whole. "None" and "Not" are not "No".
3. A sentence ends at . ! or ? before white space, or at the end of a line; a list number such as
   "1." does not end one. A completion ends at the first such mark; a line end before its first
   word is none.
4. Similarity is by default the cosine of the sets of words: with k of n different words replaced,
   1 - k/n. --embedder takes the paper's sentence model. At eps_s = .97, on real answers (COCO's
   captions, LLaVA-Bench, MMHal-Bench), corrupted in five ways by python -m lab.similarity:

       words                                   10-19   20-39   40-59   60-89   90-150
       similar here                              .09     .13     .17     .31     .42
       similar to all-MiniLM-L6-v2               .11     .21     .34     .40     .45
       both say the same                         .98     .87     .78     .78     .82

   Of answers of 60 to 89 words with two other words the sentence model accepts .49, this one .71,
   and a cosine of word counts, in which `the` and `a` weigh most, none.
5. The paper gives no temperature: 1. An answer that equals y+ after N tries, or is empty, is left
   out and counted. Online with --gamma the given pair still counts, eq. 5's first term.

Metrics: those of dpo.py; `negatives/similarity` to y+, `negatives/tries`, `negatives/words`;
`negatives/equal`: share of the step's examples without a usable negative. They add no gradient (the
given pair aside) and count as 0 in the means of the step.
"""

from common import BadInput, Parser, Progress, fraction, not_negative, positive, positive_int

import json
import math
import os
import random
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F

import memory
import processes
import training
from common import ranged, run, write_json, write_text
from formats import checkpoints, dataset
from formats.files import remember_images
from formats.weights import find
from lab import report, toy
from noise import diffuse
from sampling import sample

TOY = {
    "data": ["povid.json"],
    "steps": 230,
    "batch_size": 16,
    "grad_accum": 1,
    "lr": 3e-4,
    "beta": 0.5,
    "projector_lr": 0.0,
    "lora_rank": 16,
    "save_every": 0,
}
# an optional list number, then text up to . ! ? before white space, or to the end of a line
SENTENCE = re.compile(r"(?:\d+\.\s+)?\S.*?(?:[.!?]+(?=\s|$)|(?=\n)|$)")
END = re.compile(r"[.!?\n]")
YES_NO = re.compile(r"(Yes|yes|No|no)\b")
SWAP = {"Yes": "No", "yes": "no", "No": "Yes", "no": "yes"}


def parse():
    """The command line."""
    parser = Parser(__doc__)
    training.add_training_flags(
        parser, lr=1e-6, projector_lr=2e-6, lora_rank=128, epochs=3, batch_size=2, grad_accum=16
    )
    flag = parser.add_argument_group("bias-driven hallucination sampling").add_argument
    flag(
        "--online",
        action="store_true",
        help="train, with negatives of the current policy at every step",
    )

    # what the model sees
    flag(
        "--rho",
        type=fraction,
        help="rho_th, share of image tokens to hide (default 1 - max(.01, 5.76 / tokens))",
    )
    flag(
        "--no-guidance",
        action="store_true",
        help="answer freely instead of completing the sentences of y+",
    )
    flag(
        "--dropout-ntp",
        action="store_true",
        help="continue half of y+ to the end, with the whole image hidden (--rho 1): for mpo.py",
    )
    flag(
        "--noise-steps",
        type=ranged(int, "0 to 999", lambda n: 0 <= n < 1000),
        default=0,
        metavar="N",
        help="diffuse the image N of 1000 steps (default %(default)s)",
    )

    # how often, and what is too similar
    flag(
        "--tries",
        type=positive_int,
        default=5,
        metavar="N",
        help="N_BDHS, the last one without guidance (default %(default)s)",
    )
    flag(
        "--threshold",
        type=float,
        default=0.97,
        help="eps_s: as similar as this is too similar (default %(default)s)",
    )
    flag(
        "--embedder",
        metavar="DIR_OR_HUB_ID",
        help="sentence model for the similarity (paper: sentence-transformers/all-mpnet-base-v2; "
        "default: cosine of word sets)",
    )

    # sampling
    flag(
        "--sample-batch-size",
        type=positive_int,
        default=16,
        metavar="N",
        help="answers that a process completes at a time, whatever the micro-batch; fewer where "
        "memory is short (default %(default)s)",
    )
    flag("--temperature", type=not_negative, default=1.0, help="of drawing (default %(default)s)")
    flag(
        "--max-new-tokens",
        type=positive_int,
        default=256,
        metavar="N",
        help="longest completion (default %(default)s)",
    )

    # the online loss
    flag(
        "--gamma",
        type=ranged(float, "0 to less than 1", lambda g: 0 <= g < 1),
        default=0.0,
        help="with --online: weight of the given rejected answer, Avg-DPO (paper .5; default 0: it "
        "is not used)",
    )
    flag(
        "--beta",
        type=positive,
        default=0.1,
        help="strength of the pull to the reference (default %(default)s)",
    )
    args = training.parse(parser)
    if args.gamma and not args.online:
        raise BadInput("--gamma is part of a loss; it needs --online.")
    if args.dropout_ntp and args.no_guidance:
        raise BadInput("--dropout-ntp continues y+, which --no-guidance does not see; give one.")
    if args.dropout_ntp and args.rho is None:
        args.rho = 1.0
    return args


# ---- Algorithm 1


@dataclass
class Negative:
    """A hallucinated answer y- and how it was made.

    cuts: (start, cut, end) of each sentence in characters of y+; [] without guidance.
    """

    text: str
    similarity: float
    tries: int
    guided: bool
    swaps: int
    visible: int  # image tokens
    cuts: list
    hidden: list  # numbers of the hidden image tokens


@dataclass
class Sentence:
    """One sentence of y+ on its way to y-.

    text: y+ up to the sentence's end, its "Yes" or "No" swapped or not. start, cut: characters of
    `text`; the sentence begins at `start`, and what is after `cut` is drawn anew.
    """

    text: str
    start: int
    cut: int
    swapped: bool
    ids: torch.Tensor  # tokens that begin with `text`; without a swap, those of all of y+
    n_kept: int  # how many of them spell text[:cut]
    completion: str = ""


class Drawer:
    """Draws negatives: Algorithm 1, and the settings that it needs."""

    def __init__(self, model, processor, args):
        self.model, self.processor, self.args = model, processor, args
        rows = model.llm.get_input_embeddings().num_embeddings
        tokens = range(min(rows, len(processor.tokenizer)))
        texts = processor.tokenizer.batch_decode([[i] for i in tokens])
        # not a bare line end: as the first token it would leave half a sentence
        self.sentence_ends = [i for i, t in enumerate(texts) if END.search(t) and t.strip()]
        if args.dropout_ntp:  # an answer goes on to its own end
            self.sentence_ends = []
        self.similarity = word_cosines
        if args.embedder:
            self.similarity = load_embedder(args.embedder, model.device)

    def hallucinate(self, examples, seed):
        """y- for the first answer of each example -> a list of `Negative`, the same for a seed."""
        args, processor = self.args, self.processor
        rng = random.Random(seed)  # draws cuts and swaps
        generator = seeded(seed)  # draws masks and noise, on the CPU
        token_generator = seeded(f"{seed}/tokens", self.model.device)
        images = [processor.images([e]) for e in examples]
        negatives = [None] * len(examples)
        remaining = list(range(len(examples)))  # numbers of the examples that still need one

        for i in range(1, args.tries + 1):  # line 1
            answers = [examples[j].record.answers[0] for j in remaining]
            prompts = [examples[j].prompt for j in remaining]

            # line 2: the image that the model sees
            is_image = [p == processor.image_token_id for p in prompts]
            rho = args.rho
            if rho is None:
                rho = default_rho(max(int(at.sum()) for at in is_image))
            masked = image_mask(prompts, processor.image_token_id, rho, generator)  # (B, P)
            if args.noise_steps:
                noisy = lambda image: diffuse(image, args.noise_steps, generator)
                images = {j: processor.images([examples[j]], noisy) for j in remaining}
            pixels = torch.cat([images[j][0] for j in remaining])
            sizes = torch.cat([images[j][1] for j in remaining]) if processor.anyres else None
            view = (pixels, sizes, masked)

            guided = not (args.no_guidance or (args.tries > 1 and i == args.tries))
            guided = guided or args.dropout_ntp
            if guided:  # lines 4 to 7
                cut = cut_in_half if args.dropout_ntp else cut_sentences
                plans = [cut(examples[j], processor, rng) for j in remaining]
                self.complete_sentences(prompts, plans, view, token_generator)
                texts = [join(plan, answer) for plan, answer in zip(plans, answers)]
            else:  # line 3
                plans = [[] for _ in remaining]
                texts = self.answer_freely(prompts, view, token_generator)

            # lines 8 and 9: what differs from y+ is final, the others are tried again
            similarities = self.similarity(texts, answers)
            again = []
            for n, j in enumerate(remaining):
                hidden = masked[n, : len(prompts[n])][is_image[n]]
                whole = [(0, len(answers[n]))]
                spans = whole if args.dropout_ntp else split_sentences(answers[n])
                negatives[j] = Negative(
                    text=texts[n],
                    similarity=similarities[n],
                    tries=i,
                    guided=guided,
                    swaps=sum(s.swapped for s in plans[n]),
                    visible=int((~hidden).sum()),
                    cuts=[(s.start, s.cut, end) for s, (_, end) in zip(plans[n], spans)],
                    hidden=hidden.nonzero()[:, 0].tolist(),
                )
                if similarities[n] >= args.threshold or not texts[n]:
                    again.append(j)
            remaining = again
            if not remaining:
                break
        return negatives

    def complete_sentences(self, prompts, plans, view, generator):
        """Draw the ends of all planned sentences; prompts and images are prefilled once.

        Each sentence gets its `completion`, up to the first mark that ends a sentence.
        """
        groups = [by_text(plan) for plan in plans]
        if not any(groups):
            return
        given = []  # for each prompt: texts that answers begin with, and where these are cut
        for group in groups:
            cuts = [[s.n_kept for s in sentences] for sentences in group]
            texts = [sentences[0].ids[: max(n)] for sentences, n in zip(group, cuts)]
            given.append(list(zip(texts, cuts)))

        stop = [*self.processor.stop_ids, *self.sentence_ends]
        drawn = self.draw(prompts, view, stop, generator, given)
        for group, answers in zip(groups, drawn):
            # `sample` returns the answers in the order of the texts and their cuts
            for s, ids in zip(sum(group, []), answers):
                s.completion = self.first_end(s.ids[: s.n_kept], ids)

    def first_end(self, kept, drawn):
        """Kept and drawn token ids -> the text of the drawn ones up to the first sentence end."""
        decode = self.processor.tokenizer.decode
        drawn = drawn[~torch.isin(drawn, torch.tensor(self.processor.stop_ids))]
        begun = decode(kept, skip_special_tokens=False)
        text = decode(torch.cat([kept, drawn]), skip_special_tokens=False)[len(begun) :]
        if "\n" in text[: len(text) - len(text.lstrip())]:  # a line end there ends nothing
            text = " " + text.lstrip()
        end = None if self.args.dropout_ntp else END.search(text)
        return text[: end.end()].rstrip("\n") if end else text

    def answer_freely(self, prompts, view, generator):
        """Draw one answer to each prompt, without guidance -> texts."""
        drawn = self.draw(prompts, view, self.processor.stop_ids, generator)
        return [self.processor.text(tokens) for (tokens,) in drawn]

    def draw(self, prompts, view, stop_ids, generator, given=None):
        """Token sequences drawn after the prompts, seen through `view` (pixels, sizes, masked)."""
        pixels, sizes, masked = view
        samples = sample(
            self.model,
            prompts,
            pixels,
            k=1,
            max_new_tokens=self.args.max_new_tokens,
            temperature=self.args.temperature,
            stop_ids=stop_ids,
            masked=masked,
            given=given,
            generator=generator,
            image_sizes=sizes,
        )
        return samples.tokens


def seeded(seed, device="cpu"):
    """A generator of random numbers from a seed of any kind."""
    bits = random.Random(seed).getrandbits(62)
    return torch.Generator(device).manual_seed(bits)


def by_text(plan):
    """The sentences that are to be completed, grouped by the tokens that they are cuts of.

    Sentences without a swap are cuts of one and the same y+. A sentence that is kept whole with its
    mark, needs no completion.
    """
    groups = {}
    for s in plan:
        whole = s.cut == len(s.text) and END.search(s.text[-1])
        if not whole:
            groups.setdefault(tuple(s.ids.tolist()), []).append(s)
    return list(groups.values())


# ---- line 2: what the model sees


def default_rho(tokens):
    """rho_th for an image of so many tokens: .99 from 576 on, below that as many stay visible."""
    return 1 - max(0.01, min(1.0, 5.76 / tokens))


def image_mask(prompts, image_token_id, rho_th, generator):
    """Eq. 6: hide image token i iff rho_i < rho_th, rho_i ~ U(0, 1) -> (B, longest P) bool."""
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=-1)
    return (ids == image_token_id) & (torch.rand(ids.shape, generator=generator) < rho_th)


# ---- lines 4 to 7: the sentences of an answer


def cut_sentences(example, processor, rng):
    """Split y+ into sentences, swap Yes and No in half of those that begin so, cut each."""
    answer, plan = example.record.answers[0], []
    ids = example.answers[0][:-1]  # without the end token
    starts = word_starts(ids, answer, processor.tokenizer)
    for start, end in split_sentences(answer):
        yes_no = YES_NO.match(answer[start:end])

        if yes_no and rng.random() >= 0.5:
            after = start + len(yes_no[0])
            text = answer[:start] + SWAP[yes_no[0]] + answer[after:end]
            swapped = processor.encode(replace(example.record, answers=(text,)))
            tokens = swapped.answers[0][:-1]
            places = word_starts(tokens, text, processor.tokenizer).items()
            # at least the swapped word is kept
            places = [(c, n) for c, n in places if c > start] + [(len(text), len(tokens))]
            cut, kept = rng.choice(places)
            plan.append(Sentence(text, start, cut, True, tokens, kept))
        else:
            # no word kept: that place is the end of the sentence before, as white space is not kept
            no_word = max(c for c in starts if c <= start)
            places = [(c, n) for c, n in starts.items() if no_word <= c < end]
            cut, kept = rng.choice(places)
            plan.append(Sentence(answer[:end], start, max(cut, start), False, ids, kept))
    return plan


def cut_in_half(example, processor, _):
    """DropoutNTP: y+ as if it were one sentence, of which half of the words are kept."""
    answer, ids = example.record.answers[0], example.answers[0][:-1]
    places = list(word_starts(ids, answer, processor.tokenizer).items())
    cut, kept = places[len(places) // 2]
    return [Sentence(answer, 0, cut, False, ids, kept)]


def split_sentences(text):
    """(start, end) of every sentence of a text."""
    return [m.span() for m in SENTENCE.finditer(text)]


def word_starts(ids, text, tokenizer):
    """{c: n}: the first n tokens of `ids` spell text[:c], and a word follows there. {0: 0, ...}

    White space before that word is not kept, except line ends, which would end the sentence if they
    were drawn again.
    """
    places = {}
    for n in range(len(ids)):
        begun = tokenizer.decode(ids[:n], skip_special_tokens=False)
        kept = begun.strip()
        if text.startswith(kept) and (not kept or text[len(kept) : len(kept) + 1].isspace()):
            if len(kept) not in places or begun.endswith("\n"):
                places[len(kept)] = n
    return places


def join(plan, answer):
    """The sentences with their new ends, between them the white space of y+."""
    text, done = "", 0
    for s, (start, end) in zip(plan, split_sentences(answer)):
        beginning = s.text[s.start : s.cut]
        text += answer[done:start] if text else ""
        text += beginning + (s.completion if beginning else s.completion.lstrip())
        done = end
    return text.strip()


# ---- line 8: how alike two answers are


def word_cosines(texts, others):
    """The `word_cosine` of each text and its counterpart."""
    return [word_cosine(a, b) for a, b in zip(texts, others)]


def word_cosine(a, b):
    """Cosine of the sets of words of two texts: shared words / sqrt(words of a x words of b)."""
    x, y = (set(re.findall(r"\w+", text.lower())) for text in (a, b))
    return len(x & y) / math.sqrt(len(x) * len(y)) if x and y else 0.0


def load_embedder(name, device="cpu"):
    """A sentence model on a device -> a function (texts, texts) -> cosines.

    An embedding is the mean over tokens, as in all-mpnet and all-MiniLM.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = str(find(name))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    model.eval().to(device)

    @torch.no_grad()
    def embed(texts):
        """Mean of the token states of each text, of length 1."""
        inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        inputs = inputs.to(device)
        weight = inputs["attention_mask"][:, :, None].float()
        pooled = (model(**inputs).last_hidden_state * weight).sum(1) / weight.sum(1)
        return F.normalize(pooled, dim=-1)

    return lambda a, b: (embed(a) * embed(b)).sum(-1).tolist()


# ---- offline: a preference file


def offline(args, out, examples, drawer):
    """Write preferences.json (POVID's layout), statistics.json and a picture."""
    records = [e.record for e in examples]
    images = dataset.images_folder(records, args.data, args.images)
    negatives, drawn, seconds = draw_all(args, out, examples, drawer)
    if processes.number:
        return

    rows = []
    for record, negative in zip(records, negatives):
        text = " ".join(negative["text"].split())
        equal = text == " ".join(record.answers[0].split())
        if not equal and encode_negative(record, text, drawer.processor):
            rows.append(povid_row(record, negative, dataset.image_name(record.image, images, out)))
    if not rows:
        raise BadInput(
            "no answer came out different from y+; hide more (--rho), or try more often (--tries)."
        )
    write_json(out / "preferences.json", rows)
    remember_images(out, images)

    words = lambda texts: round(statistics.mean(len(text.split()) for text in texts), 1)
    share = lambda good: round(sum(map(good, negatives)) / len(negatives), 4)
    tenths = Counter(int(n["similarity"] * 10 + 1e-6) for n in negatives)
    summary = {
        "answers": len(negatives),
        "preferences": len(rows),
        "left out: equal to y+, empty or too long": len(negatives) - len(rows),
        "tries": dict(sorted(Counter(n["tries"] for n in negatives).items())),
        "unguided": share(lambda n: not n["guided"]),
        "swapped": share(lambda n: n["swaps"] > 0),
        "similarity": {f"{d / 10:.1f}": tenths[d] for d in range(11)},
        "visible image tokens": round(statistics.mean(n["visible"] for n in negatives), 2),
        "words of y+": words(r.answers[0] for r in records),
        "words of y-": words(n["text"] for n in negatives),
        "seconds": round(seconds, 1),
        "answers a second": round(drawn / max(seconds, 1e-9), 2),
    }
    write_json(out / "statistics.json", summary)
    print("\n".join(f"{key:<42}{value}" for key, value in summary.items()))
    report.negatives(out / "negatives.png", records, negatives, drawer.processor)
    print(f"picture: {out / 'negatives.png'}", file=sys.stderr)

    print(
        f"train on it: python dpo.py --data {out / 'preferences.json'} and the same --model",
        file=sys.stderr,
    )


def draw_all(args, out, examples, drawer):
    """negatives.jsonl, written as they come; a resumed run goes on after its last whole batch.

    Of several processes, each draws every other batch, and process 0 writes.
    -> all negatives as dicts, how many were drawn now, and in how many seconds.
    """
    path, size = out / "negatives.jsonl", args.sample_batch_size
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    lines = [line for line in lines if line.endswith("\n")]  # a killed run may leave half a line
    if len(lines) < len(examples):
        lines = lines[: len(lines) // size * size]
    lines = processes.from_first(lines)
    if processes.number == 0:
        write_text(path, "".join(lines))

    first, begin = len(lines), time.time()
    progress = Progress("negatives", len(examples), first)
    starts = range(first, len(examples), size)
    mine = [e.record.image for i in processes.share(starts) for e in examples[i : i + size]]
    drawer.processor.prefetch.expect(mine)
    with open(path if processes.number == 0 else os.devnull, "a", encoding="utf-8") as file:
        for i in range(0, len(starts), processes.total):  # a batch of each process at a time
            drawn = []
            for start in processes.share(starts[i : i + processes.total]):
                batch = drawer.hallucinate(examples[start : start + size], f"{args.seed}/{start}")
                drawn.append([{"row": start + j} | asdict(n) for j, n in enumerate(batch)])
            new = [json.dumps(n) + "\n" for batch in processes.joined(drawn) for n in batch]
            file.writelines(new)
            file.flush()
            lines += new
            progress(len(lines))
    negatives = [json.loads(line) for line in lines]
    return negatives, len(negatives) - first, time.time() - begin


def povid_row(record, negative, image):
    """A row of POVID's layout: y+ in `conversations`, y- in `rejected_conversations`."""
    row = {"id": str(negative["row"]), "image": image}
    human = ["<image>\n" * (i == 0) + turn for i, turn in enumerate(record.turns)]
    answers = {"conversations": record.answers[0], "rejected_conversations": negative["text"]}
    for key, answer in answers.items():
        turns = enumerate([*human, answer])
        row[key] = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in turns]
    return row


# ---- online: a loss


def dpo_loss(logp_chosen, logp_rejected, ref_chosen, ref_rejected, beta):
    """The loss of each pair from its four summed log-probs, all (B,).

    -> losses (B,), rewards of the chosen and of the rejected answers (B,).
    """
    reward_chosen = beta * (logp_chosen - ref_chosen)
    reward_rejected = beta * (logp_rejected - ref_rejected)
    margin = (logp_chosen - ref_chosen) - (logp_rejected - ref_rejected)  # h
    losses = -F.logsigmoid(beta * margin)  # eq. 3
    return losses, reward_chosen.detach(), reward_rejected.detach()


def as_long_pairs(_, examples):
    """The Examples with a y- of the length of y+, which is not drawn yet."""
    return [replace(e, answers=[e.answers[0], *e.answers]) for e in examples]


def with_negatives(examples, negatives, processor):
    """The Examples with y- as their second answer, before a given one -> Examples, [y- is usable].

    It is not if it is empty, does not fit into the context, or has the tokens of y+. Such an
    example is left out; one with a given answer stays for the sake of that, with y+ in the place of
    y-.
    """
    pairs, usable = [], []
    for example, negative in zip(examples, negatives):
        drawn = encode_negative(example.record, negative.text, processor) or example
        is_usable = not torch.equal(drawn.answers[0], example.answers[0])
        if is_usable or len(example.answers) > 1:
            answers = [example.answers[0], drawn.answers[0], *example.answers[1:]]
            scored = [example.scored[0], drawn.scored[0], *example.scored[1:]]
            pairs.append(replace(example, answers=answers, scored=scored))
            usable.append(is_usable)
    return pairs, usable


def encode_negative(record, text, processor):
    """y- as the only answer of an Example; None where no model could be trained on it.

    So it is if it is empty, or longer than what prompt and context leave.
    """
    try:
        return processor.encode(replace(record, answers=(text,))) if text else None
    except BadInput:
        return None


def online(args, clock, device, model, processor, examples, out):
    """Train with negatives that the current policy makes at every step."""
    clock.lap("setup")
    before = report.evaluate_start(model, processor, args, out / "before")
    clock.lap("eval")

    model.prepare(
        args.lora_rank,
        llm=args.lr > 0,
        projector=args.projector_lr > 0,
        keep_reference=True,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    model.train()
    optimizer = training.optimizer_for(model, args.lr, args.projector_lr)
    drawer = Drawer(model, processor, args)
    steps = training.total_steps(args, len(examples))
    first = training.load_checkpoint(out, model, optimizer) if args.resume else 0
    log = training.Log(out, first, steps)
    save = lambda step, alone=False: training.save_checkpoint(out, step, model, optimizer, alone)
    for step in range(first, steps):
        step_begin = time.time()
        metrics = Counter()

        # 1. batch
        indices, batches = training.batches(
            step, args, out, processor, examples, save, args.sample_batch_size
        )
        for number, batch_indices in batches:
            positives = [examples[i] for i in batch_indices]

            # 2. draw
            negatives = drawer.hallucinate(positives, f"{args.seed}/{step}/{number}")
            pairs, usable = with_negatives(positives, negatives, processor)
            for name, values in (
                ("negatives/similarity", [n.similarity for n in negatives]),
                ("negatives/tries", [n.tries for n in negatives]),
                ("negatives/words", [len(n.text.split()) for n in negatives]),
            ):
                metrics[name] += sum(values) / len(indices)
            metrics["negatives/equal"] += (len(positives) - sum(usable)) / len(indices)
            size = args.batch_size
            usable = torch.tensor(usable, dtype=torch.float32).to(device, non_blocking=True)
            for micro, used in zip(training.chunks(pairs, size), usable.split(size)):  # used: (B,)
                batch = processor.collate(micro).to(device)

                # 3. score: with the whole image
                B = len(micro)
                with torch.no_grad(), model.reference():
                    ref_chosen, ref_drawn, *ref_given = model.answer_log_probs(batch).view(B, -1).T
                chosen, drawn, *given = model.answer_log_probs(batch).view(B, -1).T  # (B,) each

                # 4. loss: the mean over all examples of the step
                losses, reward_chosen, reward_rejected = dpo_loss(
                    chosen, drawn, ref_chosen, ref_drawn, args.beta
                )
                if args.gamma:  # eq. 5
                    given_losses, *_ = dpo_loss(
                        chosen, given[0], ref_chosen, ref_given[0], args.beta
                    )
                    losses = args.gamma * given_losses + (1 - args.gamma) * used * losses
                (losses.sum() / len(indices)).backward()

                metrics["loss"] += losses.detach().sum() / len(indices)
                for name, values in (
                    ("rewards/chosen", reward_chosen),
                    ("rewards/rejected", reward_rejected),
                    ("rewards/accuracies", (reward_chosen > reward_rejected).float()),
                    ("rewards/margins", reward_chosen - reward_rejected),
                    ("logps/chosen", chosen),
                    ("logps/rejected", drawn),
                ):
                    metrics[name] += (used * values.detach()).sum() / len(indices)

        # 5. step
        where = [examples[i].record.where for i in indices]
        metrics = training.numbers(metrics)
        metrics["grad_norm"] = training.clip_gradients(optimizer, max_norm=1.0)
        training.check_finite(metrics["loss"], metrics["grad_norm"], where)
        factor = training.schedule(step, steps, args.schedule)
        training.take_step(optimizer, factor)

        # 6. log
        metrics["lr"] = args.lr * factor
        metrics["step_seconds"] = time.time() - step_begin
        log(step, ["loss", "rewards/margins", "logps/chosen", "logps/rejected"], metrics)
        if args.save_every and (step + 1) % args.save_every == 0:
            save(step + 1)
    model.eval()
    clock.lap("train")

    training.save_result(out, model, processor, args)
    after = report.evaluate(model, processor, args, out / "after")
    clock.lap("eval")
    report.finish(out, before, after, clock.seconds, args)


def main():
    """Load, then write a preference file, or train."""
    args, clock = parse(), training.Clock()
    toy.fill(args, TOY)  # without --model: our own small model and world, TOY for flags not given

    device, dtype = training.device_and_dtype(args)
    # without --gamma, pairs that share a chosen answer give one example
    one_example = None if args.gamma else lambda record: (*record.prompt_key, record.answers)
    if args.skip_bad_rows and not args.online:  # negatives are drawn outside of any step
        args.check_images = "full"
    rows = dataset.read(
        args.data,
        args.images,
        answers=2 if args.gamma else 1,
        skip_bad_rows=args.skip_bad_rows,
        subset=(args.subset, args.seed),
        check_images=args.check_images,
        unique=one_example,
        needs_image="BDHS would hide",  # completes the message: no image, which ...
    )
    sentences = max(len(split_sentences(r.answers[0])) for r in rows.records)
    sentences = 1 if args.dropout_ntp else sentences
    training.show_memory(
        args,
        device,
        dtype,
        rows,
        packed=as_long_pairs,
        plan=memory.Plan(
            k=sentences, new=args.max_new_tokens, trains=args.online, reference=args.online
        ),
    )
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
    examples = rows.encode(processor)
    out = training.start(args, "bdhs", rows.skipped)
    report.show_start(processor, examples)
    if args.online:
        online(args, clock, device, model, processor, examples, out)
    else:
        offline(args, out, examples, Drawer(model, processor, args))


if __name__ == "__main__":
    run(main, trains=True)
