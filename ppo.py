"""Reinforcement learning from a reward model: PPO as in Fact-RLHF, and RLOO.

    maximise E[r(x, y)] - beta KL(pi || pi_ref)          Amirloo et al. 2024, eq. 2; Sun et al. 2023     x = image and prompt

One iteration (`iterate`), for a batch of prompts:
1. sample     k answers of each prompt from the policy, at temperature 1
2. score      r = reward model + correctness + length + unfinished: four terms at the end of an answer, logged apart
3. KL         kl_t = log pi(y_t) - log pi_ref(y_t);   reward of token t: -beta kl_t, and + r at the last
4. GAE        A_t = sum_j (gamma lambda)^j (reward_t+j + gamma V_t+j+1 - V_t+j);   return = A + V      Schulman et al. 2016
5. whitening  A <- (A - mean) / std, over all tokens of the iteration
6. update     several passes over minibatches:                                                           Schulman et al. 2017
                  policy  mean of max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)),      ratio = pi / pi_old
                  value   mean of .5 max((V - return)^2, (clip(V, V_old - eps, V_old + eps) - return)^2)

--advantage rloo: no value network, no steps 4 and 5. R_i = r_i - beta kl_i of the whole answer, A_i = R_i - the mean R of the
k - 1 other answers to the same prompt; the ratio is that of whole answers (REINFORCE in the first minibatch).

    python ppo.py                                          # toy world, CPU, minutes; trains its reward model first
    python ppo.py --reward-model oracle --length-weight 0  # the toy world's truth in its place
    python ppo.py --model LLAVA-RLHF-SFT --data llava_ppo50k.json --images DIR --reward-model DIR --facts image_to_caption.json

One frozen base carries three adapters: policy, reward, value; without an adapter it is pi_ref. The value network starts from
the reward model's adapter (from the base, where there is none), its head at 0; it reads the policy's prompt, never the facts, and
V_t before token t is known.

    correctness  2 c. Multiple choice: c = 1 for the right letter, else 0. Right answer "No": c = .5 for "No", -.5 for "Yes".
    length       -10 tokens / --max-new-tokens              unfinished  -8 for an answer that was cut off

The prompts are those of --data in any layout; its answers (the first of a pair) are taken as the right ones.
In the toy world, over three seeds, CHAIR_s goes from .64 to .06 and recall loses .016 (a reward model trained on another number of
threads is another one: once .28); RLOO does the same. With a plain reward model and no length term PPO learns to say less: recall
loses .087, a quarter of the words go.

Choices where the papers are silent, and deviations. Sun et al.'s code has these, and here they are mended:
1. The terminal reward stands at the last real token, there at the last padded slot. Padding enters no mean, whitening or loss.
2. kl_t is log pi - log pi_ref, whose mean is the KL divergence; there it is clamped at 0 token by token (--kl clamped), which
   overestimates it and rewards nothing but standing still. k3 = 1/ratio - 1 + log ratio is the other unbiased one.
3. A multiple-choice answer of the bare letter counts as right; there only "B." and "correct option is B." do.
And these are left out: the factor 10 on all rewards (whitening cancels it), the cut at a question mark, coefficients of length
for each kind of prompt, the policy's own supervised start: pi_ref is --model. LoRA has alpha = 2 rank (there r 64, alpha 16).
4. The reward model reads an answer that was cut off with an end token; that it was cut off is told by a term of its own.
5. Log-probs of sampling serve as log pi_old in float32 (equal to 1e-5); in bfloat16 the answers are scored again.
6. The reward model's score, less its mean on held-out pairs, is divided by its spread there (Amirloo et al. normalise theirs on
   the alignment set; Sun et al. take it as it is), so that the other terms weigh the same beside any reward model.
   Amirloo et al.'s RLOO: --advantage rloo --samples 4 --lr 3e-4 --kl-coef .4 --batch-size 256 --minibatches 1 --passes 1.
7. One clip of the gradient norm (1) covers policy and value network.
8. Toy settings: half of the toy questions have the answer "Yes", for which the symbolic term gives nothing whatever is said, so
   at the weight 2 the policy learns to say "No"; the weight is 0. And the toy reward model punishes errors far more than omissions:
   long answers are paid for (+8 tokens / --max-new-tokens; r is in units of the reward model's spread), not fined.

Metrics: `objective/scores` mean r, `scores/...` its terms; `objective/kl` mean over answers of the sum of k1 over tokens (may
be negative in one batch); `objective/entropy` of the next token, nats; `policy/loss`, `policy/approxkl` = .5 mean (log ratio)^2;
`policy/clipfrac` share of clipped ratios; `val/loss`; `response_length` tokens; `finished` share of answers with an end token;
`seconds/sample`, `seconds/score` (reward, reference, value), `seconds/train`. `lr` is that of policy and value network.
"""

import hashlib
import math
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

import checkpoints
import data
import judge
import training
from lab import report
from model import BadInput, last_tokens

TOY = {
    "data": ["povid.json"],
    "steps": 40,
    "batch_size": 16,
    "minibatches": 2,
    "samples": 2,
    "lr": 3e-4,
    "projector_lr": 0.0,
    "lora_rank": 16,
    "max_new_tokens": 96,
    "correct_weight": 0.0,
    "length_weight": 8.0,
    "save_every": 0,
}


def parse():
    """The command line."""
    parser = training.Parser(__doc__)
    training.add_training_flags(
        parser, lr=3e-5, projector_lr=0.0, lora_rank=64, epochs=4, batch_size=256
    )
    group = parser.add_argument_group(
        "reinforcement learning (a step is an iteration; --batch-size counts prompts)"
    )
    group.add_argument(
        "--reward-model",
        metavar="DIR|oracle",
        help="folder of a run of reward_model.py (toy world: made on first use), or its truth",
    )
    group.add_argument(
        "--facts", metavar="FILE", help="image_to_caption.json, for a reward model that reads facts"
    )
    group.add_argument(
        "--missing-facts",
        default="refuse",
        choices=("refuse", "count"),
        help="a picture without captions stops the run, or is counted (default %(default)s)",
    )
    group.add_argument(
        "--advantage",
        default="gae",
        choices=("gae", "rloo"),
        help="PPO with a value network, or RLOO",
    )
    group.add_argument(
        "--samples", type=int, metavar="K", help="answers of each prompt (default 1, with rloo 4)"
    )
    group.add_argument(
        "--minibatches",
        type=int,
        default=2,
        metavar="N",
        help="of a pass; N x grad-accum x batch-size prompts an iteration (default %(default)s)",
    )
    group.add_argument(
        "--passes",
        type=int,
        default=2,
        metavar="N",
        help="over the answers of an iteration (default %(default)s)",
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=896,
        metavar="N",
        help="longest answer (default %(default)s)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="of sampling; only 1 samples the policy (default %(default)s)",
    )
    group.add_argument("--kl-coef", type=float, default=0.1, help="beta (default %(default)s)")
    group.add_argument(
        "--kl",
        default="k1",
        choices=("k1", "k3", "clamped"),
        help="estimator of KL (default %(default)s)",
    )
    group.add_argument("--gamma", type=float, default=1.0, help="discount (default %(default)s)")
    group.add_argument("--lam", type=float, default=1.0, help="lambda of GAE (default %(default)s)")
    group.add_argument(
        "--clip", type=float, default=0.2, help="eps of ratio and of value (default %(default)s)"
    )
    group.add_argument(
        "--value-weight", type=float, default=0.1, help="of the value loss (default %(default)s)"
    )
    group.add_argument(
        "--correct-weight",
        type=float,
        default=2.0,
        help="of a correct answer (default %(default)s)",
    )
    group.add_argument(
        "--length-weight",
        type=float,
        default=-10.0,
        help="of an answer of --max-new-tokens (default %(default)s)",
    )
    group.add_argument(
        "--unfinished-weight",
        type=float,
        default=-8.0,
        help="of a cut-off answer (default %(default)s)",
    )
    args = training.parse(parser, TOY)
    if args.samples is None:
        args.samples = 4 if args.advantage == "rloo" else 1
    for name, accepted, good in (
        (
            "samples",
            "2 or more with rloo, else 1",
            args.samples >= (2 if args.advantage == "rloo" else 1),
        ),
        ("minibatches", "1 or more", args.minibatches >= 1),
        ("passes", "1 or more", args.passes >= 1),
        ("max_new_tokens", "1 or more", args.max_new_tokens >= 1),
        ("temperature", "more than 0", args.temperature > 0),
        ("kl_coef", "0 or more", args.kl_coef >= 0),
        ("gamma", "0 to 1", 0 <= args.gamma <= 1),
        ("lam", "0 to 1", 0 <= args.lam <= 1),
        ("clip", "more than 0", args.clip > 0),
        ("value_weight", "0 or more", args.value_weight >= 0),
    ):
        if not good:
            raise BadInput(
                f"--{name.replace('_', '-')} is {getattr(args, name)}; {accepted} is accepted."
            )
    if not args.lora_rank or args.projector_lr:
        raise BadInput(
            "policy, reward and value network share one frozen base: --lora-rank above 0, --projector-lr 0."
        )
    if args.reward_model is None and args.toy_world is None:
        raise BadInput(
            "--model needs --reward-model: the folder of a run of reward_model.py on the same model."
        )
    if args.reward_model is None:
        args.reward_model = str(toy_reward_model(args.seed))
    return args


def toy_reward_model(seed):
    """The reward model of the toy base of the seed, trained by reward_model.py's own command line on first use, and cached."""
    from lab import toyworld

    code = Path(__file__).parent
    sources = [
        code / f"{name}.py"
        for name in ("reward_model", "training", "checkpoints", "model", "data", "files", "layouts")
    ]
    weights = hashlib.sha256((toyworld.base(seed) / "model.safetensors").read_bytes()).hexdigest()
    folder = (
        Path(".cache") / f"reward-{toyworld.made_of(*sources, toyworld.world(seed).name, weights)}"
    )
    if not folder.exists():
        print(f"training the toy reward model of seed {seed}, once", file=sys.stderr)
        with training.whole_folder(folder) as aside:
            command = [
                sys.executable,
                str(code / "reward_model.py"),
                "--seed",
                str(seed),
                "--out",
                str(aside / "run"),
            ]
            subprocess.run(command, check=True, stdout=sys.stderr)
    return folder / "run"


# ---- rewards; N tokens of M answers stand in one row, answer after answer, `lengths` (M,) long


def correctness(record, text):
    """c of an answer to a question whose right answer is known (Sun et al.): 1 or 0, +-.5 where it is "No", else 0."""
    gold, text = (record.answers[0].strip() if record.answers else ""), text.strip()
    letter = re.match(r"\(?([A-Z])\b", gold)
    if data.CHOICE.search(record.turns[-1]) and letter:
        letter = letter[1]
        return float(
            text == letter
            or text.startswith(f"{letter}.")
            or f"correct option is {letter}." in text
        )
    if re.match(r"no\b", gold, re.I):
        said = re.match(r"(yes|no)\b", text, re.I)
        return 0.0 if not said else 0.5 if said[0].lower() == "no" else -0.5
    return 0.0


def kl_of(log_p, reference, kind):
    """Estimate of KL(pi || pi_ref) from each token drawn from pi, (N,). k1 and k3 are unbiased."""
    log_ratio = log_p - reference
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    return log_ratio.clamp(min=0) if kind == "clamped" else log_ratio


def token_rewards(scores, kl, lengths, beta):
    """-beta kl of every token (N,), and the answers' scores (M,) at their last tokens -> (N,)."""
    rewards = -beta * kl
    rewards[torch.tensor(lengths).cumsum(0) - 1] += scores
    return rewards


def gae(rewards, values, lengths, gamma, lam):
    """Generalised advantage estimation: rewards, values (N,) -> advantages, returns (N,). Beyond an answer's end is nothing."""
    r, v = (
        pad_sequence(x.split(lengths), batch_first=True) for x in (rewards, values)
    )  # (M, R), zeros behind the end
    advantages, ahead, following = (
        torch.zeros_like(r),
        torch.zeros_like(r[:, 0]),
        torch.zeros_like(r[:, 0]),
    )
    for t in reversed(range(r.shape[1])):
        ahead = r[:, t] + gamma * following - v[:, t] + gamma * lam * ahead
        advantages[:, t], following = ahead, v[:, t]
    advantages = torch.cat([row[:n] for row, n in zip(advantages, lengths)])
    return advantages, advantages + values


def rloo(rewards):
    """Rewards (B, K) of whole answers -> advantages (B, K): each less the mean of its siblings (Ahmadian et al. 2024)."""
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


def whiten(x):
    """Mean 0 and standard deviation 1 over all of (N,); a constant becomes 0."""
    return (x - x.mean()) * (x.var(correction=0) + 1e-8).rsqrt()


# ---- losses


def policy_loss(log_p, old, advantages, clip):
    """Clipped loss of each token (N,), or for RLOO of each answer (M,) -> losses, which of them are clipped."""
    ratio = (log_p - old).exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(free, clipped), clipped > free


def value_loss(values, old, returns, clip):
    """Loss of the value network at each token, (N,): it may not gain by moving further than clip from the old value."""
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


# ---- one iteration


def summed(x, lengths):
    """(N,) -> (M,), the sum over each answer."""
    return torch.stack([part.sum() for part in x.split(lengths)])


def chunks(items, size):
    """Consecutive lists of at most `size`."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def iterate(model, processor, prompts, score, optimizer, factor, args, step):
    """Sample, score, estimate advantages, update -> metrics. prompts: Examples. factor: of the learning rates.

    score(answered, finished, step) -> {name: (M,)}, whose sum is r; `answered` are the Examples with k drawn answers each.
    """
    begin, device, with_values = time.time(), model.device, args.advantage == "gae"
    seed = random.Random(f"{args.seed}/{step}").getrandbits(62)
    generator = torch.Generator(device).manual_seed(seed)

    with torch.no_grad():
        # 1. sample
        model.eval()  # gradient checkpointing would switch off the cache
        answered, finished, old = [], [], []
        for some in chunks(prompts, args.batch_size):
            pixel_values, image_sizes = processor.images(some)
            drawn = model.sample(
                [e.prompt for e in some],
                pixel_values,
                args.samples,
                args.max_new_tokens,
                args.temperature,
                processor.stop_ids,
                generator=generator,
                image_sizes=image_sizes,
            )
            for e, tokens in zip(some, drawn.tokens):
                answered.append(
                    replace(
                        e,
                        answers=tokens,
                        scored=[torch.ones(len(t), dtype=torch.bool) for t in tokens],
                    )
                )
            finished += sum(drawn.finished, [])
            old += sum(drawn.log_probs, [])
        lengths = [len(a) for e in answered for a in e.answers]  # (M,)
        seconds = {"sample": time.time() - begin}

        # 2. score
        terms = score(answered, finished, step)
        scores = sum(terms.values())  # (M,)

        # 3. KL
        reference, values, again = [], [], []
        for some in chunks(answered, args.batch_size):
            batch = processor.collate(some).to(device)
            with model.reference():
                reference.append(model.log_probs(batch)[0])
            if with_values:
                with model.use("value"):
                    values.append(model.values(batch, batch.index, "value"))
            if model.dtype != torch.float32:
                again.append(model.log_probs(batch)[0])
        old, reference = torch.cat(again or old).to(device), torch.cat(reference)  # (N,)
        kl = kl_of(old, reference, args.kl)
        seconds["score"] = time.time() - begin - sum(seconds.values())

        if with_values:
            # 4. GAE
            values = torch.cat(values)
            rewards = token_rewards(scores, kl, lengths, args.kl_coef)
            advantages, returns = gae(rewards, values, lengths, args.gamma, args.lam)
            # 5. whitening
            advantages = whiten(advantages)
        else:
            rewards = (scores - args.kl_coef * summed(kl, lengths)).view(-1, args.samples)  # (B, K)
            advantages = (
                rloo(rewards).flatten().repeat_interleave(torch.tensor(lengths, device=device))
            )  # (N,)

    # 6. update
    metrics = Counter()
    tokens = [sum(map(len, e.answers)) for e in answered]  # of each prompt's answers
    per_prompt = lambda x: x.split(tokens)
    old_of, advantages_of = per_prompt(old), per_prompt(advantages)
    values_of, returns_of = (
        (per_prompt(values), per_prompt(returns)) if with_values else (None, None)
    )
    model.train(args.gradient_checkpointing)
    updates = 0
    for number in range(args.passes):
        order = list(range(len(answered)))
        random.Random(f"{args.seed}/{step}/{number}").shuffle(order)
        for minibatch in chunks(order, args.batch_size * args.grad_accum):
            n, loss = sum(tokens[i] for i in minibatch), 0.0
            m, rows = len(minibatch) * args.samples, [answered[i].record.where for i in minibatch]
            for micro in chunks(minibatch, args.batch_size):
                some = lambda parts: torch.cat([parts[i] for i in micro])
                batch = processor.collate([answered[i] for i in micro]).to(device)
                log_p, entropy = model.log_probs(batch)  # (N,)
                log_ratio = (log_p - some(old_of)).detach()
                if with_values:
                    losses, clipped = policy_loss(
                        log_p, some(old_of), some(advantages_of), args.clip
                    )
                    mean = losses.sum() / n
                else:
                    here = [len(a) for i in micro for a in answered[i].answers]
                    first = torch.tensor(here).cumsum(0) - 1
                    whole = [summed(x, here) for x in (log_p, some(old_of))]
                    losses, clipped = policy_loss(*whole, some(advantages_of)[first], args.clip)
                    mean = losses.sum() / m
                mean.backward()
                found = [
                    ("policy/loss", mean * n),
                    ("policy/clipfrac", clipped.float().mean() * len(log_p)),
                    ("policy/approxkl", 0.5 * (log_ratio**2).sum()),
                    ("objective/entropy", entropy.sum()),
                ]
                loss += mean.item()
                if with_values:
                    with model.use("value"):
                        v = model.values(batch, batch.index, "value")
                        mean = value_loss(v, some(values_of), some(returns_of), args.clip).sum() / n
                        (args.value_weight * mean).backward()
                    found.append(("val/loss", mean * n))
                    loss += args.value_weight * mean.item()
                for name, value in found:
                    metrics[name] += value.item() / n
            metrics["grad_norm"] += training.optimizer_step(optimizer, factor, loss, rows)
            updates += 1
    model.eval()
    metrics = {name: value / updates for name, value in metrics.items()}
    metrics |= (
        {f"scores/{name}": term.mean().item() for name, term in terms.items()}
        if len(terms) > 1
        else {}
    )
    metrics["objective/scores"] = scores.mean().item()
    metrics["objective/kl"] = (old - reference).sum().item() / len(lengths)
    metrics["response_length"], metrics["finished"] = (
        sum(lengths) / len(lengths),
        sum(finished) / len(finished),
    )
    seconds["train"] = time.time() - begin - sum(seconds.values())
    return metrics | {f"seconds/{name}": value for name, value in seconds.items()}


class Scorer:
    """The four terms of r. facts: {where of a record: the captions of its picture}, for a reward model that reads them.

    settings: what `checkpoints.load_reward` gave; None where the toy world's oracle stands in for a reward model.
    """

    def __init__(self, model, processor, settings, facts, args):
        self.model, self.processor, self.settings, self.facts, self.args = (
            model,
            processor,
            settings,
            facts,
            args,
        )
        self.mean, self.std = 0.0, 1.0
        if settings is None:
            self.oracle = judge.oracle()
            return
        held = settings[
            "held_out"
        ].values()  # its scores on held-out pairs: mean and standard deviation
        n = sum(f["n"] for f in held)
        self.mean = sum(f["mean"] * f["n"] for f in held) / n
        self.std = math.sqrt(
            max(
                1e-12,
                sum((f["std"] ** 2 + f["mean"] ** 2) * f["n"] for f in held) / n - self.mean**2,
            )
        )

    def rated(self, example, rng):
        """The example as the reward model reads it."""
        said, facts = self.settings, self.facts[example.record.asked]
        return self.processor.rated(
            example, data.evaluation(said["question"], said["facts"], facts, rng, said["max_facts"])
        )

    def check(self, examples):
        """Refuse now what the reward model cannot read later: an answer and captions that do not fit, a picture of another world."""
        if self.settings is None:
            self.oracle([e.record for e in examples], [[""] for _ in examples])
            return
        said, answer = self.settings, torch.zeros(self.args.max_new_tokens, dtype=torch.long)
        for e in examples:
            facts = data.longest_facts(
                self.processor, self.facts[e.record.asked], said["max_facts"]
            )
            turn = data.evaluation(said["question"], said["facts"], facts, random.Random(0))
            self.processor.rated(replace(e, answers=[answer]), turn)

    def reward(self, answered, texts, step):
        """The reward model's scores of the answers drawn, (M,)."""
        if self.settings is None:
            return torch.tensor(
                sum(self.oracle([e.record for e in answered], texts), []), device=self.model.device
            )
        rng, found = random.Random(f"{self.args.seed}/{step}/facts"), []
        for some in chunks(answered, self.args.batch_size):
            batch = self.processor.collate([self.rated(e, rng) for e in some]).to(self.model.device)
            with self.model.use("reward"):
                found.append(self.model.values(batch, last_tokens(batch), "reward"))
        return torch.cat(found)

    def __call__(self, answered, finished, step):
        """{term: (M,)} of the answers drawn."""
        args, device = self.args, self.model.device
        texts = [[self.processor.text(tokens) for tokens in e.answers] for e in answered]
        score = self.reward(answered, texts, step)
        correct = [correctness(e.record, text) for e, row in zip(answered, texts) for text in row]
        lengths = torch.tensor(
            [len(tokens) for e in answered for tokens in e.answers], device=device
        )
        return {
            "reward_model": (score - self.mean) / self.std,
            "correctness": args.correct_weight * torch.tensor(correct, device=device),
            "length": args.length_weight * lengths / args.max_new_tokens,
            "unfinished": args.unfinished_weight * (~torch.tensor(finished, device=device)).float(),
        }


# ---- the run


def prompts_of(processor, records, args, skipped):
    """Records -> Examples without answers, each once, their gold answers kept in the record."""
    unique = {}
    for r in records:
        unique.setdefault(r.asked, r)
    if len(unique) < len(records):
        print(
            f"{len(records) - len(unique)} rows repeat picture and prompt of another",
            file=sys.stderr,
        )
    examples = data.encode_all(
        processor, [replace(r, answers=()) for r in unique.values()], skipped
    )
    examples = data.with_room(processor, examples, args.max_new_tokens, skipped)
    return [replace(e, record=unique[e.record.asked]) for e in examples]


def main():
    """Load, put reward and value network beside the policy, iterate, save, evaluate."""
    args, begin = parse(), time.time()
    device, dtype = training.device_and_dtype(args)
    skipped = [] if args.skip_bad_rows else None
    records = data.load(args.data, args.images, answers=1, skipped=skipped)
    model, processor = checkpoints.load(args.model, dtype, device, args.template, args.image_aspect)
    processor.max_length = min(args.max_length or processor.max_length, processor.max_length)
    examples = prompts_of(processor, records, args, skipped)

    settings = (
        None if args.reward_model == "oracle" else checkpoints.load_reward(model, args.reward_model)
    )
    for name in ("template", "image_aspect") if settings else ():
        if settings[name] != getattr(processor, name):
            raise BadInput(
                f"--reward-model {args.reward_model} was trained with {name} {settings[name]}, "
                f"and this run has {getattr(processor, name)}."
            )
    records, facts = [e.record for e in examples], [[] for _ in examples]
    if settings and settings["facts"] is not None:
        if args.facts is None and args.toy_world:
            args.facts = str(Path(args.toy_world) / "image_to_caption.json")
        if args.facts is None:
            raise BadInput(
                f"--reward-model {args.reward_model} was trained with facts; --facts FILE is needed."
            )
        facts = data.facts_for(records, data.captions(args.facts), args.missing_facts)
    elif args.facts:
        raise BadInput(
            f"--facts is for a reward model that reads them; --reward-model is {args.reward_model}."
        )
    scorer = Scorer(
        model, processor, settings, {r.asked: known for r, known in zip(records, facts)}, args
    )
    scorer.check(examples)
    out = training.start(args, "ppo", skipped)
    report.show_start(processor, examples)
    seconds = {"setup": time.time() - begin}
    before = report.evaluate(model, processor, args, out / "before")
    seconds["eval"] = time.time() - begin - seconds["setup"]
    seconds |= {
        "reference": 0.0,
        "sample": 0.0,
        "score": 0.0,
    }  # the reference scores each iteration's answers in that iteration

    model.prepare(args.lora_rank, projector=False)
    if args.advantage == "gae":
        if settings:
            checkpoints.load_reward(model, args.reward_model, "value")
        else:
            model.add_adapter("value", args.lora_rank)
            model.add_head("value")
        for p in model.parameters_of("value"):
            p.requires_grad_(True)
        for p in model.heads["value"].parameters():
            torch.nn.init.zeros_(p)
    if args.gradient_checkpointing:
        model.llm.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = training.optimizer_for(model, args.lr, 0.0)
    steps = args.steps or math.ceil(training.total_steps(args, len(examples)) / args.minibatches)
    first = training.load_checkpoint(out, model, optimizer) if args.resume else 0
    log = training.Log(out, first, steps)
    for step in range(first, steps):
        step_begin = time.time()
        batches = [
            training.batch_of(step * args.minibatches + i, args, len(examples))
            for i in range(args.minibatches)
        ]
        prompts = [examples[i] for batch in batches for micro in batch for i in micro]
        factor = min(1.0, (step + 1) / 5) * training.schedule(
            step, steps, warmup=0
        )  # cosine, 5 iterations of warm-up
        metrics = iterate(model, processor, prompts, scorer, optimizer, factor, args, step)
        metrics["lr"], metrics["step_seconds"] = args.lr * factor, time.time() - step_begin
        seconds["sample"] += metrics["seconds/sample"]
        seconds["score"] += metrics["seconds/score"]
        log(step, ["objective/scores", "objective/kl", "response_length"], metrics)
        if args.save_every and (step + 1) % args.save_every == 0:
            training.save_checkpoint(out, step + 1, model, optimizer)
    seconds["train"] = time.time() - begin - sum(seconds.values())

    training.save_result(out, model, processor, args)
    after = report.evaluate(model, processor, args, out / "after")
    seconds["eval"] += time.time() - begin - sum(seconds.values())
    report.finish(out, before, after, seconds, args)


if __name__ == "__main__":
    training.run(main)
