"""Bias-driven hallucination sampling (BDHS): preference data that the model makes itself while most of the image is hidden.

The idea (Amirloo et al. 2024, section 3.4). A hallucination is what a language model says of a picture it does not look at. So
take a good answer y+, hide nearly all image tokens from attention, and let the model say the second half of each sentence
again: what comes out is its own bias, fluent, and close to y+. Train with DPO to prefer y+ over that. No annotator, no second
model, no corrupted text. Worked example, 3 of 36 image tokens visible:

    y+    This is a kitchen. A red cup is on the left. There is a clock in the middle.
    cut   This is a | kitchen. A red | cup is on the left. There is | a clock in the middle.
    y-    This is a kitchen. A red bowl is on the right. There is an oven on the left.

Every sentence is completed behind the true sentences before it, not behind what was made of them, so all sentences of a batch
of answers are drawn at once, and the answer diverges and rejoins (Algorithm 1):

    for i = 1 .. N:  hide each image token with probability rho_th; i = N: answer freely, return it
        for each sentence s_k of y+:  "Yes" <-> "No" at its start with probability .5;  s_k = (first part, rest), cut at random
            y-_k = first part + pi(. | prompt, masked image, y+_1 .. y+_k-1, first part), up to a full stop or the end
        return y- unless similarity(y-, y+) >= eps_s

    python bdhs.py                                       # toy world: preferences.json for dpo.py --lr 3e-4, statistics, a picture
    python bdhs.py --model llava-hf/llava-v1.6-vicuna-7b-hf --data povid.json --images DIR
    python bdhs.py --online                              # train: every step draws its negatives from the current policy

Memory: each sentence that is being completed holds keys and values of its prompt, so --batch-size 32 is for small models.

Online the loss is DPO (eq. 3) on (y+, y-), or with --gamma and a given rejected answer Avg-DPO (eq. 5). The hidden image is for
drawing only: policy and reference score both answers with the whole image. Step 0 must print loss ln 2 and rewards 0.

--rho 0: guidance only; --no-guidance: mask only; --noise-steps 500 --rho 0: BDHS_noise, diffused pixels instead of a mask (eq.
8, 9); --povid: POVID's image distortion, a loss term (section 3.3): y- is at every position the most likely token behind the true
prefix and the noisy image.

Choices where the paper is silent, and deviations:
1. rho_th = .99 as in the paper leaves 5.8 of LLaVA-1.5's 576 tokens. Smaller images keep as many: rho_th = 1 - max(.01, 5.76 / T)
   of T tokens, .84 for the toy world's 36. Masked tokens stay in their places: nobody attends to them (but they themselves), in
   no layer, during the whole generation; no position id moves.
2. A cut falls between words, each place equally likely: from none to all but one of the words are kept. A swapped "Yes" is
   always kept, else the swap would have no effect. "None" and "Not" are no "No".
3. A sentence ends at . ! or ? before white space, or at a line's end; "1." opens one. A completion ends at the first such mark.
4. Similarity is by default the cosine of word counts, with the paper's eps_s = .97: an answer of n different words counts as
   changed when one of them is another, for n up to 33, when two are, up to 66. --embedder takes the paper's sentence model.
5. Temperature 1 (not given). Answers that still equal y+ after N tries are left out, counted.
6. POVID's code lets the reference choose its own tokens; here both score the policy's, so that step 0 is ln 2. Noise is clamped to
   the range of pixels, where POVID's conversion to bytes wraps around.

Metrics: those of dpo.py; `negatives/similarity` to y+, `negatives/tries`, `negatives/words`; `negatives/equal`: pairs of the step
without a usable negative, which add no gradient.
"""

import json
import math
import random
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoints
import data
import training
from lab import report
from model import BadInput, fused_log_probs

TOY = {
    "data": ["povid.json"],
    "steps": 230,
    "batch_size": 16,
    "lr": 3e-4,
    "beta": 0.5,
    "projector_lr": 0.0,
    "lora_rank": 16,
    "save_every": 0,
}
SENTENCE = re.compile(r"(?:\d+\.\s+)?\S.*?(?:[.!?]+(?=\s|$)|(?=\n)|$)")
END = re.compile(r"[.!?\n]")
YES_NO = re.compile(r"(Yes|yes|No|no)\b")
SWAP = {"Yes": "No", "yes": "no", "No": "Yes", "no": "yes"}


def parse():
    """The command line."""
    parser = training.Parser(__doc__)
    training.add_training_flags(
        parser, lr=1e-6, projector_lr=2e-6, lora_rank=128, epochs=3, batch_size=32
    )
    group = parser.add_argument_group("bias-driven hallucination sampling")
    group.add_argument(
        "--online",
        action="store_true",
        help="train, with negatives of the current policy at every step",
    )
    group.add_argument(
        "--rho",
        type=float,
        help="rho_th, share of image tokens to hide (default 1 - max(.01, 5.76 / tokens))",
    )
    group.add_argument(
        "--no-guidance",
        action="store_true",
        help="answer freely instead of completing the sentences of y+",
    )
    group.add_argument(
        "--noise-steps",
        type=int,
        metavar="N",
        help="diffuse the pixels N of 1000 steps (default 0; --povid 500)",
    )
    group.add_argument(
        "--tries",
        type=int,
        default=5,
        metavar="N",
        help="N_BDHS, the last one without guidance (default %(default)s)",
    )
    group.add_argument(
        "--threshold",
        type=float,
        default=0.97,
        help="eps_s: as similar as this is too similar (default %(default)s)",
    )
    group.add_argument(
        "--embedder",
        metavar="DIR_OR_HUB_ID",
        help="sentence model for the similarity (paper: sentence-transformers/"
        "all-mpnet-base-v2; default: cosine of word counts)",
    )
    group.add_argument(
        "--temperature", type=float, default=1.0, help="of drawing (default %(default)s)"
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="longest completion (default %(default)s)",
    )
    group.add_argument(
        "--povid",
        action="store_true",
        help="with --online: POVID's image distortion instead of sampling",
    )
    group.add_argument(
        "--gamma",
        type=float,
        default=0.0,
        help="with --online: weight of the given rejected answer, Avg-DPO "
        "(paper .5; default 0: it is not used)",
    )
    group.add_argument(
        "--beta",
        type=float,
        default=0.1,
        help="strength of the pull to the reference (default %(default)s)",
    )
    args = training.parse(parser, TOY)
    if args.noise_steps is None:
        args.noise_steps = 500 if args.povid else 0
    for name, value, good, accepted in (
        ("rho", args.rho, args.rho is None or 0 <= args.rho <= 1, "0 to 1"),
        ("noise-steps", args.noise_steps, 0 <= args.noise_steps < 1000, "0 to 999"),
        ("tries", args.tries, args.tries >= 1, "1 or more"),
        ("temperature", args.temperature, args.temperature >= 0, "0 or more"),
        ("max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "1 or more"),
        ("gamma", args.gamma, 0 <= args.gamma < 1, "0 to less than 1"),
        ("beta", args.beta, args.beta > 0, "more than 0"),
    ):
        if not good:
            raise BadInput(f"--{name} is {value}; {accepted} is accepted.")
    if (args.povid or args.gamma) and not args.online:
        raise BadInput("--povid and --gamma are parts of a loss; they need --online.")
    return args


# ---- the words of an answer


def split_sentences(text):
    """(start, end) of every sentence of a text."""
    return [m.span() for m in SENTENCE.finditer(text)]


def word_starts(ids, text, tokenizer):
    """{c: n}: the n first tokens of `ids` spell text[:c], and a word follows there. {0: 0, ...}

    White space before that word is not among them, but for line ends: drawn anew, they would end the sentence.
    """
    found = {}
    for n in range(len(ids)):
        begun = tokenizer.decode(ids[:n], skip_special_tokens=False)
        kept = begun.strip()
        if text.startswith(kept) and (not kept or text[len(kept) : len(kept) + 1].isspace()):
            if len(kept) not in found or begun.endswith("\n"):
                found[len(kept)] = n
    return found


@dataclass
class Sentence:
    """One sentence of y+ on its way to y-: `text`[:cut] is kept (text: y+ with the sentence swapped or not, up to its end)."""

    text: str
    start: int
    cut: int
    swapped: bool
    given: torch.Tensor  # tokens of `text`
    kept: int  # how many of them are kept
    completion: str = ""


def cut_sentences(example, processor, rng):
    """Split y+ into sentences, swap yes and no in half of those that begin with them, and cut each at random."""
    answer, plan = example.record.answers[0], []
    ids = example.answers[0][:-1]  # without the end token
    starts = word_starts(ids, answer, processor.tokenizer)
    for start, end in split_sentences(answer):
        yes_no = YES_NO.match(answer[start:end])
        if yes_no and rng.random() >= 0.5:
            text = answer[:start] + SWAP[yes_no[0]] + answer[start + len(yes_no[0]) : end]
            tokens = processor.encode(replace(example.record, answers=(text,))).answers[0][:-1]
            places = {
                c: n for c, n in word_starts(tokens, text, processor.tokenizer).items() if c > start
            }
            cut, kept = rng.choice([*places.items(), (len(text), len(tokens))])
            plan.append(Sentence(text, start, cut, True, tokens, kept))
        else:
            # the place before a sentence's first word is the end of the sentence before it
            before = max((c for c in starts if c <= start), default=0)
            cut, kept = rng.choice([(c, n) for c, n in starts.items() if before <= c < end])
            plan.append(Sentence(answer[:end], start, max(cut, start), False, ids, kept))
    return plan


def join(plan, answer):
    """The sentences with their new ends, between them the white space of y+."""
    text, at = "", 0
    for s, (start, end) in zip(plan, split_sentences(answer)):
        said = s.text[s.start : s.cut] + (
            s.completion if s.cut > s.start else s.completion.lstrip()
        )
        text += (answer[at:start] if text else "") + said
        at = end
    return text.strip()


# ---- what the model sees


def default_rho(tokens):
    """rho_th for an image of so many tokens: the paper's .99 from LLaVA-1.5's 576 on, below that as many visible ones as there."""
    return 1 - max(0.01, min(1.0, 5.76 / tokens))


def image_mask(prompts, image_token_id, rho_th, generator):
    """Eq. 6: hide image token i iff rho_i < rho_th, rho_i ~ U(0, 1) -> (B, longest P), True = hidden."""
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=-1)
    return (ids == image_token_id) & (torch.rand(ids.shape, generator=generator) < rho_th)


def alpha_bar(steps):
    """Share of the signal's variance after so many of 1000 diffusion steps (eq. 9; POVID's schedule)."""
    beta = torch.sigmoid(torch.linspace(-6, 6, 1000, dtype=torch.float64)) * (0.5e-2 - 1e-5) + 1e-5
    return float((1 - beta).cumprod(0)[steps]) if steps else 1.0


def diffuse(pixels, steps, mean, std, generator):
    """Eq. 8 on normalised pixels (..., 3, H, W): sqrt(abar) x + sqrt(1 - abar) eps, x in 0 .. 1; the result is clamped to that."""
    if not steps:
        return pixels
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    abar, x = alpha_bar(steps), pixels * std + mean
    noisy = math.sqrt(abar) * x + math.sqrt(1 - abar) * torch.randn(x.shape, generator=generator)
    return (noisy.clamp(0, 1) - mean) / std


# ---- how alike two answers are


def word_cosine(a, b):
    """Cosine of the word counts of two texts."""
    x, y = (Counter(re.findall(r"\w+", text.lower())) for text in (a, b))
    norm = math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))
    return sum(count * y[word] for word, count in x.items()) / norm if norm else 0.0


def load_embedder(name):
    """A sentence model -> function of (texts, texts) that gives their cosines; mean over tokens, as all-mpnet and all-MiniLM."""
    from transformers import AutoModel, AutoTokenizer

    folder = checkpoints.find(name)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    model = AutoModel.from_pretrained(
        str(folder), local_files_only=True, use_safetensors=True
    ).eval()

    @torch.no_grad()
    def embed(texts):
        """Mean of the token states of each text."""
        inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        weight = inputs["attention_mask"][:, :, None].float()
        pooled = (model(**inputs).last_hidden_state * weight).sum(1) / weight.sum(1)
        return F.normalize(pooled, dim=-1)

    return lambda a, b: (embed(a) * embed(b)).sum(-1).tolist()


# ---- Algorithm 1


@dataclass
class Negative:
    """A hallucinated answer and how it came about. cuts: (start, cut, end) of each sentence in y+, () if unguided."""

    text: str
    similarity: float
    tries: int
    guided: bool
    swaps: int
    visible: int  # image tokens
    cuts: list
    hidden: list  # numbers of the hidden image tokens


class Drawer:
    """What all drawing needs: the settings, the tokens that end a sentence, the similarity."""

    def __init__(self, model, processor, args):
        self.model, self.processor, self.args = model, processor, args
        rows = model.llm.get_input_embeddings().num_embeddings
        texts = processor.tokenizer.batch_decode(
            [[i] for i in range(min(rows, len(processor.tokenizer)))]
        )
        self.sentence_ends = [i for i, text in enumerate(texts) if END.search(text)]
        embedder = load_embedder(args.embedder) if args.embedder else None
        self.similarity = embedder or (lambda a, b: [word_cosine(x, y) for x, y in zip(a, b)])

    def hallucinate(self, examples, seed):
        """y- for the first answer of each example (Algorithm 1), as a list of `Negative`. The same seed gives the same."""
        args, processor = self.args, self.processor
        rng, generator = (
            random.Random(seed),
            torch.Generator().manual_seed(random.Random(seed).getrandbits(62)),
        )
        device_generator = torch.Generator(self.model.device).manual_seed(
            random.Random(f"{seed}/tokens").getrandbits(62)
        )
        pictures = [processor.images([e]) for e in examples]
        found, left = [None] * len(examples), list(range(len(examples)))
        for i in range(1, args.tries + 1):
            guided = not (args.no_guidance or (args.tries > 1 and i == args.tries))
            prompts = [examples[j].prompt for j in left]
            tokens = max(int((p == processor.image_token_id).sum()) for p in prompts)
            hidden = image_mask(
                prompts,
                processor.image_token_id,
                default_rho(tokens) if args.rho is None else args.rho,
                generator,
            )
            pixels = torch.cat([pictures[j][0] for j in left])
            sizes = torch.cat([pictures[j][1] for j in left]) if processor.anyres else None
            pixels = diffuse(
                pixels, args.noise_steps, processor.image_mean, processor.image_std, generator
            )
            plans = [cut_sentences(examples[j], processor, rng) if guided else [] for j in left]
            texts = self.complete(plans, prompts, (pixels, sizes), hidden, device_generator)
            answers = [examples[j].record.answers[0] for j in left]
            texts = [
                join(plan, answer) if guided else text
                for text, plan, answer in zip(texts, plans, answers)
            ]
            alike, again = self.similarity(texts, answers), []
            for j, text, phi, plan, hide, prompt in zip(left, texts, alike, plans, hidden, prompts):
                places = hide[: len(prompt)][prompt == processor.image_token_id]
                spans = split_sentences(examples[j].record.answers[0]) if guided else []
                cuts = [(s.start, s.cut, end) for s, (_, end) in zip(plan, spans)]
                swaps, hides = sum(s.swapped for s in plan), places.nonzero()[:, 0].tolist()
                found[j] = Negative(text, phi, i, guided, swaps, int((~places).sum()), cuts, hides)
                if phi >= args.threshold or not text:
                    again.append(j)
            left = again
            if not left:
                break
        return found

    def complete(self, plans, prompts, images, hidden, generator):
        """Draw the ends of all planned sentences, prompt and image prefilled once -> texts of the prompts without a plan."""
        guided, tokenizer = any(plans), self.processor.tokenizer
        given, drawn = (
            [],
            [],
        )  # of each prompt: (tokens, cuts), and the sentences that these cuts belong to
        for plan in plans:
            shared = {}  # sentences that were not swapped are cuts of one and the same y+
            for s in plan:
                if s.cut < len(s.text) or not END.search(
                    s.text[-1]
                ):  # a sentence kept whole, with its mark, is complete
                    shared.setdefault(tuple(s.given.tolist()), []).append(s)
            longest = {ids: max(s.kept for s in group) for ids, group in shared.items()}
            given.append(
                [
                    (torch.tensor(ids[: longest[ids]], dtype=torch.long), [s.kept for s in g])
                    for ids, g in shared.items()
                ]
            )
            drawn.append(sum(shared.values(), []))
        if guided and not any(given):
            return [""] * len(plans)
        stop = [*self.processor.stop_ids, *(self.sentence_ends if guided else ())]
        samples = self.model.sample(
            prompts,
            images[0],
            1,
            self.args.max_new_tokens,
            self.args.temperature,
            stop,
            hidden,
            given if guided else None,
            generator,
            images[1],
        )
        if not guided:
            return [self.processor.text(tokens) for (tokens,) in samples.tokens]
        for sentences, answers in zip(drawn, samples.tokens):
            for s, new in zip(sentences, answers):
                new = new[~torch.isin(new, torch.tensor(self.processor.stop_ids))]
                begun = tokenizer.decode(s.given[: s.kept], skip_special_tokens=False)
                text = tokenizer.decode(
                    torch.cat([s.given[: s.kept], new]), skip_special_tokens=False
                )[len(begun) :]
                end = END.search(text, len(text) - len(text.lstrip()))
                s.completion = text[: end.end()].rstrip("\n") if end else text
        return [""] * len(plans)


# ---- offline: a preference file


def offline(args, out, records, examples, drawer):
    """Write negatives.jsonl as they come (and go on where it ends), then preferences.json, statistics.json and a picture."""
    path, size = out / "negatives.jsonl", args.batch_size
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    lines = [line for line in lines if line.endswith("\n")]
    lines = (
        lines[: len(lines) // size * size] if len(lines) < len(examples) else lines
    )  # whole batches
    training.write_text(path, "".join(lines))
    progress, begin, first = (
        training.Progress("negatives", len(examples), len(lines)),
        time.time(),
        len(lines),
    )
    with open(path, "a", encoding="utf-8") as file:
        for at in range(first, len(examples), size):
            negatives = drawer.hallucinate(examples[at : at + size], f"{args.seed}/{at}")
            file.write(
                "".join(
                    json.dumps({"row": at + i} | asdict(n)) + "\n" for i, n in enumerate(negatives)
                )
            )
            file.flush()
            progress(at + len(negatives))
    seconds = time.time() - begin
    negatives = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    rows, equal = [], 0
    for record, negative in zip(records, negatives):
        if " ".join(negative["text"].split()) in ("", " ".join(record.answers[0].split())):
            equal += 1
            continue
        row = {"id": str(negative["row"]), "image": image_name(record.image, args, out)}
        human = ["<image>\n" * (i == 0) + turn for i, turn in enumerate(record.turns)]
        for key, answer in (
            ("conversations", record.answers[0]),
            ("rejected_conversations", negative["text"]),
        ):
            said = [*human, answer]
            row[key] = [
                {"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(said)
            ]
        rows.append(row)
    if not rows:
        raise BadInput(
            "no answer came out different from y+; hide more (--rho), or cut more (--tries)."
        )
    training.write_json(out / "preferences.json", rows)
    words = lambda texts: round(statistics.mean(len(text.split()) for text in texts), 1)
    found = {
        "answers": len(negatives),
        "preferences": len(rows),
        "left out, equal to y+ or empty": equal,
        "tries": dict(sorted(Counter(n["tries"] for n in negatives).items())),
        "unguided": round(sum(not n["guided"] for n in negatives) / len(negatives), 4),
        "swapped": round(sum(n["swaps"] > 0 for n in negatives) / len(negatives), 4),
        "similarity": {
            f"{d / 10:.1f}": sum(int(n["similarity"] * 10 + 1e-6) == d for n in negatives)
            for d in range(11)
        },
        "visible image tokens": round(statistics.mean(n["visible"] for n in negatives), 2),
        "words of y+": words(r.answers[0] for r in records),
        "words of y-": words(n["text"] for n in negatives),
        "seconds": round(seconds, 1),
        "answers a second": round((len(negatives) - first) / max(seconds, 1e-9), 2),
    }
    training.write_json(out / "statistics.json", found)
    print("\n".join(f"{key:<32}{value}" for key, value in found.items()))
    report.negatives(out / "negatives.png", records, negatives, drawer.processor)
    images = (
        out / "images" if (out / "images").is_dir() else args.images or Path(args.data[0]).parent
    )
    print(f"picture: {out / 'negatives.png'}", file=sys.stderr)
    print(
        f"train on it: python dpo.py --data {out / 'preferences.json'} --images {images} and the same --model",
        file=sys.stderr,
    )


def image_name(image, args, out):
    """A picture's path below --images; one from inside a parquet file is written to out/images first."""
    if hasattr(image, "read"):
        name = f"{Path(image.file).stem}_{image.row}.jpg"
        (out / "images").mkdir(exist_ok=True)
        (out / "images" / name).write_bytes(image.read())
        return name
    folder = args.images or Path(args.data[0]).parent
    if not image.is_relative_to(folder):
        raise BadInput(
            f"{image} is not below {folder}; give the folder of all pictures as --images."
        )
    return image.relative_to(folder).as_posix()


# ---- online: a loss


def dpo_loss(logp_chosen, logp_rejected, ref_chosen, ref_rejected, beta):
    """Loss of each pair from its four summed log-probs, all (B,) -> losses (B,), rewards of chosen and rejected (B,)."""
    h = (logp_chosen - ref_chosen) - (logp_rejected - ref_rejected)
    losses = -F.logsigmoid(beta * h)  # eq. 3
    return (
        losses,
        beta * (logp_chosen - ref_chosen).detach(),
        beta * (logp_rejected - ref_rejected).detach(),
    )


def with_negatives(examples, negatives, processor):
    """The Examples with the negative as second answer, before a given one; left out if it has the tokens of y+, or none."""
    kept = []
    for example, negative in zip(examples, negatives):
        if negative.text:
            drawn = processor.encode(replace(example.record, answers=(negative.text,)))
            if not torch.equal(drawn.answers[0], example.answers[0]):
                answers = [example.answers[0], *drawn.answers, *example.answers[1:]]
                scored = [example.scored[0], *drawn.scored, *example.scored[1:]]
                kept.append(replace(example, answers=answers, scored=scored))
    return kept


def distorted(model, batch, pixels):
    """POVID's y-: at every scored position of `batch` the token that is most likely behind the true prefix and these pixels, (N,)."""
    with torch.no_grad():
        h = model.hidden(replace(batch, pixel_values=pixels), rows=batch.index)
        logits = h.to(model.dtype) @ model.llm.get_output_embeddings().weight.to(model.dtype).t()
        logits[:, model.image_token_id] = -torch.inf
        return logits.argmax(-1)


def distorted_log_probs(model, batch, wrong, k):
    """As `answer_log_probs` of rows of k answers, (k + 1, B): y+, its distorted tokens behind the same true prefix, the rest."""
    h = model.hidden(batch, rows=batch.index).to(model.dtype)
    weight, sums = model.llm.get_output_embeddings().weight.to(model.dtype), []
    for targets in (batch.targets, wrong):
        log_p, _ = fused_log_probs(h, weight, targets)
        sums.append(
            log_p.new_zeros(batch.answers).index_add(0, batch.owner, log_p).view(-1, k).T
        )  # (k, B)
    return torch.cat([sums[0][:1], sums[1][:1], sums[0][1:]])


def online(args, begin, device, model, processor, examples, out):
    """Train with negatives that the current policy makes at every step."""
    seconds = {"setup": time.time() - begin}
    before = report.evaluate(model, processor, args, out / "before")
    seconds["eval"] = time.time() - begin - seconds["setup"]
    seconds["reference"] = 0.0  # the reference scores each step's negatives in that step

    model.prepare(
        args.lora_rank, llm=args.lr > 0, projector=args.projector_lr > 0, keep_reference=True
    )
    model.train(args.gradient_checkpointing)
    if args.gradient_checkpointing:
        model.llm.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = training.optimizer_for(model, args.lr, args.projector_lr)
    drawer = Drawer(model, processor, args)
    steps = training.total_steps(args, len(examples))
    first = training.load_checkpoint(out, model, optimizer) if args.resume else 0
    log = training.Log(out, first, steps)
    for step in range(first, steps):
        step_begin, metrics, rows = time.time(), Counter(), []
        micro_batches = training.batch_of(step, args, len(examples))
        pairs = sum(map(len, micro_batches))
        for number, micro in enumerate(micro_batches):
            chosen_examples = [examples[i] for i in micro]
            rows += [e.record.where for e in chosen_examples]
            if args.povid:
                batch, k = (
                    processor.collate(chosen_examples).to(device),
                    len(chosen_examples[0].answers),
                )
                generator = torch.Generator().manual_seed(
                    random.Random(f"{args.seed}/{step}/{number}").getrandbits(62)
                )
                noisy = diffuse(
                    batch.pixel_values.cpu(),
                    args.noise_steps,
                    processor.image_mean,
                    processor.image_std,
                    generator,
                )
                wrong = distorted(model, batch, noisy.to(device))
                score = lambda: distorted_log_probs(model, batch, wrong, k)
            else:
                model.eval()  # gradient checkpointing would switch off the cache
                negatives = drawer.hallucinate(chosen_examples, f"{args.seed}/{step}/{number}")
                model.train(args.gradient_checkpointing)
                pairs_here = with_negatives(chosen_examples, negatives, processor)
                for name, values in (
                    ("negatives/similarity", [n.similarity for n in negatives]),
                    ("negatives/tries", [n.tries for n in negatives]),
                    ("negatives/words", [len(n.text.split()) for n in negatives]),
                ):
                    metrics[name] += sum(values) / pairs
                metrics["negatives/equal"] += (len(micro) - len(pairs_here)) / pairs
                if not pairs_here:
                    continue
                batch = processor.collate(pairs_here).to(device)
                score = lambda: model.answer_log_probs(batch).view(len(pairs_here), -1).T
            with torch.no_grad(), model.reference():
                ref_chosen, ref_rejected, *ref_given = score()  # (B,) each
            chosen, rejected, *given = score()
            losses, reward_chosen, reward_rejected = dpo_loss(
                chosen, rejected, ref_chosen, ref_rejected, args.beta
            )
            if args.gamma:
                given_losses, *_ = dpo_loss(chosen, given[0], ref_chosen, ref_given[0], args.beta)
                losses = args.gamma * given_losses + (1 - args.gamma) * losses  # eq. 5
            (losses.sum() / pairs).backward()
            for name, values in (
                ("loss", losses),
                ("rewards/chosen", reward_chosen),
                ("rewards/rejected", reward_rejected),
                ("rewards/accuracies", (reward_chosen > reward_rejected).float()),
                ("rewards/margins", reward_chosen - reward_rejected),
                ("logps/chosen", chosen),
                ("logps/rejected", rejected),
            ):
                metrics[name] += values.sum().item() / pairs
        factor = training.schedule(step, steps)
        metrics["grad_norm"] = training.optimizer_step(optimizer, factor, metrics["loss"], rows)
        metrics["lr"], metrics["step_seconds"] = args.lr * factor, time.time() - step_begin
        log(step, ["loss", "rewards/margins", "logps/chosen", "logps/rejected"], metrics)
        if args.save_every and (step + 1) % args.save_every == 0:
            training.save_checkpoint(out, step + 1, model, optimizer)
    model.eval()
    seconds["train"] = time.time() - begin - sum(seconds.values())

    training.save_result(out, model, processor, args)
    after = report.evaluate(model, processor, args, out / "after")
    seconds["eval"] += time.time() - begin - sum(seconds.values())
    report.finish(out, before, after, seconds, args)


def main():
    """Load, then write a preference file, or train."""
    args, begin = parse(), time.time()
    device, dtype = training.device_and_dtype(args)
    skipped = [] if args.skip_bad_rows else None
    records = data.load(args.data, args.images, answers=2 if args.gamma else 1, skipped=skipped)
    blind = [r for r in records if r.image is None]
    if blind and skipped is None:
        raise BadInput(
            f"{blind[0].where}: no picture, which BDHS would hide; {len(blind)} such rows, --skip-bad-rows goes on."
        )
    if blind:
        skipped += [data.skipped_row(r, "no picture, which BDHS would hide") for r in blind]
    records = [r for r in records if r.image is not None]
    if not args.gamma:  # pairs that share a chosen answer are one task here
        unique = {(*r.asked, r.answers): r for r in records}
        if len(unique) < len(records):
            print(
                f"{len(records) - len(unique)} rows repeat picture, prompt and chosen answer of another",
                file=sys.stderr,
            )
        records = list(unique.values())
    model, processor = checkpoints.load(args.model, dtype, device, args.template, args.image_aspect)
    processor.max_length = min(args.max_length or processor.max_length, processor.max_length)
    examples = data.encode_all(processor, records, skipped)
    out = training.start(args, "bdhs", skipped)
    report.show_start(processor, examples)
    if args.online:
        online(args, begin, device, model, processor, examples, out)
    else:
        offline(args, out, [e.record for e in examples], examples, Drawer(model, processor, args))


if __name__ == "__main__":
    training.run(main)
