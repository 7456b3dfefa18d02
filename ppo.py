"""Reinforcement learning from a reward model: PPO as in Fact-RLHF, and RLOO.

    maximise E[r(x, y)] - beta KL(pi || pi_ref)        Amirloo et al. 2024, eq. 2; Sun et al. 2023
                                                       x = image and prompt

One step is an iteration over batch-size x grad-accum x minibatches prompts (x processes):
1. sample      k answers to each prompt from the policy, at temperature 1
2. score       r = reward model + correctness + length + unfinished: four terms, logged apart
3. KL          kl_t = log pi(y_t) - log pi_ref(y_t)
               reward of token t: -beta kl_t; at the last token of the answer also + r;
               with GAE all times --reward-scale
4. GAE         A_t = sum_j (gamma lambda)^j (reward_{t+j} + gamma V_{t+j+1} - V_{t+j})
               return_t = A_t + V_t                                       Schulman et al. 2016
               with gamma = lambda = 1, the defaults: all rewards from t on, minus V_t
5. whitening   A <- (A - mean) / std, over all tokens of the iteration
6. update      passes x minibatches optimizer updates                     Schulman et al. 2017
               policy: mean of max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)), ratio = pi / pi_old
               value: mean of .5 max((V - return)^2, (clip(V, V_old - eps, V_old + eps) - return)^2)
7. log

--advantage rloo (Ahmadian et al. 2024) has no value network and no steps 4 and 5. An answer i is
one action: R_i = r_i - beta kl_i, kl_i being the sum over its tokens, and A_i = R_i - the mean R of
the k - 1 other answers to the same prompt. The ratio is that of whole answers (in the first
minibatch, where it is 1, this is REINFORCE).

    python ppo.py                      # toy world, CPU, minutes; trains its reward model first
    python ppo.py --reward-model oracle --length-weight 0     # the toy world's truth instead of it
    python ppo.py --model LLAVA-RLHF-SFT --data llava_ppo50k.json --images DIR \\
        --reward-model DIR --facts image_to_caption.json

Facts are captions of the image that the reward model reads (Fact-RLHF); the policy never reads
them. One frozen base carries three adapters: policy, reward, value; without an adapter it is
pi_ref. The value network starts from the reward model's adapter (from a new one with the oracle),
its head at 0. It reads the policy's prompt; V_t is its value before token t.

    correctness   --correct-weight 2 times c. Multiple choice: c = 1 for the right letter, else 0.
                  A yes/no question whose answer is "No": c = .5 for "No", -.5 for "Yes".
    length        --length-weight -10 times tokens / --max-new-tokens
    unfinished    --unfinished-weight -8 for an answer that was cut off

The prompts are those of --data, in any layout. For `correctness`, the data's answer (of a pair: the
chosen one) counts as right. The kind of question is the `caption_type` of LLaVA-RLHF's rows; where
there is none, it is read from the question: lettered options, or a verb such as "Is" at its
beginning.

In the toy world (seed 0) CHAIR_s falls from .63 to .04, recall stays (.96) and so do POPE and the
text score. On seeds 0 to 4 CHAIR_s ends at .043, .045, .060, .055, .066, recall at .96, .95, .95,
.91, .92; two threads (OMP_NUM_THREADS=2) round otherwise, and end at the same figures. With
--length-weight 8 and the same reward model adversarial POPE is .744 instead of .760 (base .756).
With a plain reward model and no length term the policy learns to say less: 31 % of the words and
.14 of recall go.

Corrected from the code of Sun et al.:
1. The final reward stands at the last real token; theirs stands at the last padded slot. Padding
   enters no mean, no whitening and no loss.
2. kl_t is log pi - log pi_ref, whose mean is the KL divergence. Theirs is clamped at 0, token by
   token (--kl clamped): it overestimates the KL, and a move away from pi_ref is never paid back.
   The other unbiased estimator is k3 = pi_ref / pi - 1 + log(pi / pi_ref).
3. A multiple-choice answer "B", "B)" or "(B)" counts as right; theirs accepts only "B." and
   "correct option is B.". "No" and "Yes" are whole words; theirs takes "Nothing" for "No".
4. Their code multiplies r and KL by 10. Whitening cancels that for the policy. The value network
   then has to reach ten times the return, while clipping still stops it .2 from where it was: one
   iteration moves V to .7 % of the return, with a factor of 1 to 7 %. --reward-scale 10 is theirs.

Left out from their code: cutting an answer after its first question mark, length coefficients for
each kind of prompt, and the policy's own supervised start: pi_ref is --model. LoRA has alpha = 2
rank (theirs: rank 64, alpha 16). A prompt is the whole dialogue up to its last question; theirs is
the first question.

Choices where the papers are silent, and deviations:
5. An end token is added to a cut-off answer before the reward model reads it. A term of its own
   says that the answer was cut off.
6. In float32, log pi_old is taken from sampling (the two agree to within 1e-5). In bfloat16 the
   answers are scored again.
7. The reward model's score, less its mean on held-out pairs, is divided by its spread there. So the
   other terms weigh the same beside any reward model. Amirloo et al. normalise on the alignment
   set; Sun et al. take the score as it is.
8. Amirloo et al. have no terms but the reward model, which reads no facts. Their RLOO is
   --advantage rloo --samples 4 --lr 3e-4 --kl-coef .4 --batch-size 2 --grad-accum 128 --minibatches
   1 --passes 1 --epochs 2 --correct-weight 0 --length-weight 0 --unfinished-weight 0; their PPO has
   --lr 1.41e-5 --schedule constant --epochs 3 --batch-size 2 --grad-accum 16 and the same zeros.
   Clipping, GAE and the weight of KL in PPO are not given.
9. One clip of the gradient norm (1) covers policy and value network.
10. Toy settings. Half of the toy questions have the answer "Yes", for which `correctness` gives
   nothing whatever the answer is; at the weight 2 the policy learns to say "No". So the weight is
   0. And the toy reward model punishes errors, but not omissions, so long answers are rewarded (+5
   tokens / --max-new-tokens): a sentence of nine tokens earns .5, in units of the reward model's
   spread, more than one about a present object costs and less than one about an absent object.

Metrics: `objective/scores` mean r, `scores/...` its terms; `objective/kl` mean over answers of the
sum of log pi - log pi_ref over tokens (may be negative in one batch); `objective/entropy` of the
next token, nats; `policy/loss`; `policy/approxkl` = .5 mean (log ratio)^2; `policy/clipfrac` share
of clipped ratios; `val/loss`; `response_length` tokens; `finished` share of answers with an end
token; `grad_norm` before clipping. The metrics of an update are means over the iteration's updates.
`seconds/sample`, `seconds/score` (reward, reference, value) and `seconds/train` are the parts of
`step_seconds`. `lr` is that of policy and value network.
"""

from common import BadInput, Parser, finite, fraction, not_negative, positive, positive_int, run

import math
import random
import re
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

import judge
import memory
import processes
import sampling
import training
from facts import (
    CHOICE,
    drawn_facts,
    evaluation_turn,
    facts_for,
    longest_facts,
    with_evaluation,
    with_facts_first,
)
from formats import adapters, checkpoints, dataset
from formats.layouts import captions
from lab import report, toy
from lora import add_adapter

# a question, or a part of one behind a comma, that begins with such a verb
ASKS_YES_NO = re.compile(
    r"(?:^|[.?!:,]\s+)(?:am|is|are|was|were|do|does|did|has|have|had|can|could|will|would|shall|"
    r"should|may|might|must)(?:n't)?\s[^.?!]*\?",
    re.IGNORECASE | re.MULTILINE,
)
SAMPLES = {"gae": 1, "rloo": 4}
TOY_SAMPLES = SAMPLES | {"gae": 2}
TOY = {
    "data": ["povid.json"],
    "steps": 40,
    "batch_size": 16,
    "grad_accum": 1,
    "sample_batch_size": 16,
    "minibatches": 2,
    "lr": 3e-4,
    "projector_lr": 0.0,
    "lora_rank": 16,
    "max_new_tokens": 96,
    "correct_weight": 0.0,
    "length_weight": 5.0,
    "save_every": 0,
}


def parse():
    """The command line."""
    parser = Parser(__doc__)
    training.add_training_flags(
        parser, lr=3e-5, projector_lr=0.0, lora_rank=64, epochs=4, batch_size=2, grad_accum=128
    )
    flag = parser.add_argument_group(
        "reinforcement learning (a step is an iteration; --batch-size counts prompts)"
    ).add_argument
    flag(
        "--reward-model",
        metavar="DIR|oracle",
        help="folder of a run of reward_model.py (toy world: made on first use), or its truth",
    )
    flag(
        "--facts", metavar="FILE", help="image_to_caption.json, for a reward model that reads facts"
    )
    flag(
        "--missing-facts",
        default="refuse",
        choices=("refuse", "count"),
        help="an image without captions stops the run, or is counted (default %(default)s)",
    )

    # how an iteration is made
    flag(
        "--advantage",
        default="gae",
        choices=tuple(SAMPLES),
        help="PPO with a value network, or RLOO (default %(default)s)",
    )
    flag(
        "--samples",
        type=positive_int,
        metavar="K",
        help="answers to each prompt (default 1, with rloo 4; 2 or more with rloo)",
    )
    flag(
        "--minibatches",
        type=positive_int,
        default=2,
        metavar="N",
        help="of a pass; N x grad-accum x batch-size prompts an iteration (default %(default)s)",
    )
    flag(
        "--passes",
        type=positive_int,
        default=2,
        metavar="N",
        help="over the answers of an iteration (default %(default)s)",
    )

    # sampling
    flag(
        "--sample-batch-size",
        type=positive_int,
        default=64,
        metavar="N",
        help="prompts that a process answers at a time; fewer where memory is short "
        "(default %(default)s)",
    )
    flag(
        "--max-new-tokens",
        type=positive_int,
        default=896,
        metavar="N",
        help="longest answer (default %(default)s)",
    )
    flag(
        "--temperature",
        type=positive,
        default=1.0,
        help="of sampling; only 1 samples the policy (default %(default)s)",
    )

    # KL, advantages and clipping
    flag("--kl-coef", type=not_negative, default=0.1, help="beta (default %(default)s)")
    flag(
        "--kl",
        default="k1",
        choices=("k1", "k3", "clamped"),
        help="estimator of KL (default %(default)s)",
    )
    flag("--gamma", type=fraction, default=1.0, help="discount (default %(default)s)")
    flag("--lam", type=fraction, default=1.0, help="lambda of GAE (default %(default)s)")
    flag(
        "--clip", type=positive, default=0.2, help="eps of ratio and of value (default %(default)s)"
    )
    flag(
        "--value-weight",
        type=not_negative,
        default=0.1,
        help="of the value loss (default %(default)s)",
    )

    flag(
        "--reward-scale",
        type=positive,
        default=1.0,
        help="factor on r and KL before GAE, none with rloo; Sun et al.'s code: 10 (default "
        "%(default)s)",
    )

    # the terms of r
    flag(
        "--correct-weight",
        type=finite,
        default=2.0,
        help="of a correct answer (default %(default)s)",
    )
    flag(
        "--length-weight",
        type=finite,
        default=-10.0,
        help="of an answer of --max-new-tokens (default %(default)s)",
    )
    flag(
        "--unfinished-weight",
        type=finite,
        default=-8.0,
        help="of a cut-off answer (default %(default)s)",
    )
    args = training.parse(parser)
    if args.advantage == "rloo" and args.samples == 1:
        raise BadInput("--samples is 1; 2 or more with rloo is accepted.")
    if not args.lora_rank or args.projector_lr:
        raise BadInput(
            "policy, reward and value network share one frozen base: --lora-rank above 0, "
            "--projector-lr 0."
        )
    if args.model and args.reward_model is None:
        raise BadInput(
            "--model needs --reward-model: the folder of a run of reward_model.py on the same "
            "model."
        )
    return args


# ---- what an iteration draws


@dataclass
class Rollout:
    """K answers to each of B prompts: M = B K answers, N tokens in all.

    Tensors (N,) hold one value a token, answer after answer, in the order of `examples`.
    """

    examples: list  # B Examples, whose answers are the K that were drawn
    finished: list  # B lists of K: False for an answer that was cut off
    log_probs: torch.Tensor  # (N,) log pi_old
    reference: torch.Tensor | None = None  # (N,) log pi_ref
    values: torch.Tensor | None = None  # (N,) V_old before each token; None with RLOO
    advantages: torch.Tensor | None = None  # (N,) with RLOO the same for all tokens of an answer
    returns: torch.Tensor | None = None  # (N,) None with RLOO

    @property
    def lengths(self):
        """Tokens of each answer, a list (M,)."""
        return [len(tokens) for e in self.examples for tokens in e.answers]

    def take(self, places):
        """The same for these prompts alone, in this order."""
        tokens = [sum(map(len, e.answers)) for e in self.examples]  # of all answers to a prompt
        taken = {}
        for name in ("log_probs", "reference", "values", "advantages", "returns"):
            x = getattr(self, name)
            if x is not None:
                parts = x.split(tokens)
                taken[name] = torch.cat([parts[i] for i in places])
        examples = [self.examples[i] for i in places]
        finished = [self.finished[i] for i in places]
        return Rollout(examples, finished, **taken)


def summed(x, lengths):
    """(N,) -> (M,), the sum over each answer."""
    return torch.stack([part.sum() for part in x.split(lengths)])


def first_of(x, lengths):
    """(N,) -> (M,), the value at the first token of each answer."""
    return torch.stack([part[0] for part in x.split(lengths)])


def last_of(lengths):
    """The places of the last tokens of the answers among all N tokens, (M,)."""
    return torch.tensor(lengths).cumsum(0) - 1


def decode_ahead(processor, parts):
    """Begin with the images of these lists of Examples: often another process has sampled them."""
    processor.prefetch.expect([e.record.image for part in parts for e in part])


# ---- 1. sample


def prompts_of(step, args, out, processor, examples, save):
    """The Examples of an iteration: the next `minibatches` batches, in one list.

    Each process looks at the images of those that it samples (`training.readable`).
    """
    chosen = []
    for number in range(step * args.minibatches, (step + 1) * args.minibatches):
        chosen += training.batch_of(number, args, len(examples))[0]
    parts = processes.share(list(enumerate(training.chunks(chosen, args.sample_batch_size))))
    decode_ahead(processor, [[examples[i] for i in part] for _, part in parts])
    kept = training.readable(parts, step, args, out, processor, examples, save)
    lost = {i for _, part in parts for i in part} - {i for _, part in kept for i in part}
    return [examples[i] for i in chosen if i not in lost]


@torch.no_grad()
def draw_rollout(model, processor, prompts, args, step):
    """--samples answers of the current policy to each of B prompts (Examples) -> Rollout.

    Of several processes, each draws a share, and all have the whole Rollout.
    """
    drawn = []  # for each part: the answers to each prompt, which are finished, log-probs
    for number, part in processes.share(
        list(enumerate(training.chunks(prompts, args.sample_batch_size)))
    ):
        seed = f"{args.seed}/{step}/{number}"
        samples = sampling.answers_to(
            model, processor, part, args.samples, args.max_new_tokens, seed, args.temperature
        )
        drawn.append((samples.tokens, samples.finished, samples.log_probs))
    tokens, finished, log_probs = (sum(rows, []) for rows in zip(*processes.joined(drawn)))
    examples = [sampling.with_answers(e, answers) for e, answers in zip(prompts, tokens)]
    return Rollout(examples, finished, torch.cat(sum(log_probs, [])).to(model.device))


# ---- 2. score


def right_answer(record):
    """A letter, "No" or "Yes"; "" for a question of another kind.

    A row of Fact-RLHF's data states it. Else the question decides: with lettered options the
    answer's letter counts; after a verb that asks for yes or no, its first word.
    """
    if record.right is not None:
        return record.right
    question, gold = record.turns[-1], record.answers[0].strip() if record.answers else ""
    letter = re.match(r"[(\[]?([A-Z])(?:[.):\]]|$)", gold)
    if CHOICE.search(question):
        return letter[1] if letter else ""
    word = re.match(r"(yes|no)(?=[.,;:!]?(?:\s|$))", gold, re.IGNORECASE)
    return word[1].capitalize() if word and ASKS_YES_NO.search(question) else ""


def correctness(record, text):
    """c of an answer (Sun et al.). Multiple choice: 1 or 0. "No" is right: .5 or -.5. Else 0."""
    right, text = right_answer(record), text.strip()
    if len(right) == 1:
        begins = re.match(rf"{right}$|[(\[]?{right}[.):\]]", text)
        return float(bool(begins) or f"correct option is {right}." in text)
    said = re.match(r"(yes|no)\b", text, re.IGNORECASE)
    if right == "No" and said:
        return 0.5 if said[0].lower() == "no" else -0.5
    return 0.0


def mean_and_std(held_out):
    """Mean and standard deviation of a reward model's scores on the held-out pairs of all files.

    held_out: {data file: what reward_model.py's `figures` gave}.
    """
    files = (held_out or {}).values()
    if not files:
        raise BadInput("reward.json: held_out is empty; a run of reward_model.py fills it.")
    n = sum(f["n"] for f in files)
    mean = sum(f["mean"] * f["n"] for f in files) / n
    variance = sum((f["std"] ** 2 + f["mean"] ** 2) * f["n"] for f in files) / n - mean**2
    return mean, math.sqrt(max(1e-12, variance))


class Reward:
    """r of an answer, in four terms.

    settings: reward.json of the reward model, which stands in `model`; None: the toy world's oracle
    takes its place. facts: {`Record.prompt_key`: captions of the image}.
    """

    def __init__(self, model, processor, settings, facts, args):
        self.model, self.processor, self.args = model, processor, args
        self.settings, self.facts = settings, facts
        if settings is None:
            self.oracle = judge.oracle()
        else:
            self.mean, self.std = mean_and_std(settings["held_out"])

    def with_turn(self, example, known, rng):
        """The example as the reward model reads it. known: the captions of its image."""
        settings, most = self.settings, self.settings["max_facts"]
        if settings.get("facts_first"):
            text = drawn_facts(settings["facts"], known, rng, most)
            example, known = with_facts_first(self.processor, example, text), []
        turn = evaluation_turn(settings["question"], settings["facts"], known, rng, most)
        return with_evaluation(self.processor, example, turn)

    def check(self, examples):
        """Refuse now what cannot be scored later.

        That is an answer and captions that do not fit into the context, or, for the oracle, an
        image of another world.
        """
        if self.settings is None:
            self.oracle([e.record for e in examples], [[""] for _ in examples])
            return
        answer = torch.zeros(self.args.max_new_tokens, dtype=torch.long)
        for e in examples:
            known = self.facts[e.record.prompt_key]
            longest = longest_facts(self.processor, known, self.settings["max_facts"])
            self.with_turn(replace(e, answers=[answer]), longest, random.Random(0))

    def by_oracle(self, examples, texts):
        """The oracle's scores, (M,)."""
        scores = self.oracle([e.record for e in examples], texts)
        return torch.tensor(sum(scores, []), device=self.model.device)

    def by_reward_model(self, examples, step):
        """The reward model's scores in units of their spread on held-out pairs, (M,)."""
        rng = random.Random(f"{self.args.seed}/{step}/facts")  # which captions, in which order
        read = [self.with_turn(e, self.facts[e.record.prompt_key], rng) for e in examples]
        parts = processes.share(training.chunks(read, self.args.batch_size))
        decode_ahead(self.processor, parts)
        scores = []
        for part in parts:
            batch = self.processor.collate(part).to(self.model.device)
            with self.model.use("reward"):
                scores.append(self.model.values(batch, batch.last, "reward"))
        return (processes.joined_tensor(scores, self.model.device) - self.mean) / self.std

    @torch.no_grad()
    def terms(self, rollout, step):
        """{term: (M,)}, whose sum is r."""
        args, device, examples = self.args, self.model.device, rollout.examples
        texts = [[self.processor.text(tokens) for tokens in e.answers] for e in examples]
        correct = [correctness(e.record, text) for e, row in zip(examples, texts) for text in row]
        lengths = torch.tensor(rollout.lengths, device=device)
        finished = torch.tensor(sum(rollout.finished, []), device=device)
        if self.settings is None:
            scores = self.by_oracle(examples, texts)
        else:
            scores = self.by_reward_model(examples, step)
        return {
            "reward_model": scores,
            "correctness": args.correct_weight * torch.tensor(correct, device=device),
            "length": args.length_weight * lengths / args.max_new_tokens,
            "unfinished": args.unfinished_weight * (~finished).float(),
        }


# ---- 3. KL


@torch.no_grad()
def with_reference_and_values(model, processor, rollout, args):
    """log pi_ref of every token, and with GAE its value -> the Rollout with both.

    In bfloat16 also log pi_old again, as the update will compute it.
    """
    parts = processes.share(training.chunks(rollout.examples, args.batch_size))
    decode_ahead(processor, parts)
    reference, values, log_probs = [], [], []
    for part in parts:
        batch = processor.collate(part).to(model.device)
        with model.reference():
            reference.append(model.log_probs(batch)[0])
        if args.advantage == "gae":
            with model.use("value"):
                values.append(model.values(batch, batch.index, "value"))
        if model.dtype != torch.float32:
            log_probs.append(model.log_probs(batch)[0])
    whole = lambda parts: processes.joined_tensor(parts, model.device)  # None without any
    return replace(
        rollout,
        reference=whole(reference),
        values=whole(values),
        log_probs=rollout.log_probs if model.dtype == torch.float32 else whole(log_probs),
    )


def kl_of(log_p, reference, kind):
    """Estimate of KL(pi || pi_ref) from each token drawn from pi, (N,). k1 and k3 are unbiased."""
    over_reference = log_p - reference  # log(pi / pi_ref)
    if kind == "k3":
        return torch.expm1(-over_reference) + over_reference
    return over_reference.clamp(min=0) if kind == "clamped" else over_reference


def token_rewards(scores, kl, lengths, beta):
    """-beta kl of every token (N,), plus the answers' scores (M,) at their last tokens -> (N,)."""
    rewards = -beta * kl
    rewards[last_of(lengths)] += scores
    return rewards


# ---- 4. and 5. advantages


def gae(rewards, values, lengths, gamma, lam):
    """Generalised advantage estimation: rewards, values (N,) -> advantages, returns (N,), (N,).

    After the end of an answer all is 0.
    """
    r, v = (pad_sequence(x.split(lengths), batch_first=True) for x in (rewards, values))  # (M, R)
    padded = torch.zeros_like(r)  # (M, R) the advantages
    advantage = torch.zeros_like(r[:, 0])  # (M,) A_t+1
    next_value = torch.zeros_like(r[:, 0])  # (M,) V_t+1
    for t in reversed(range(r.shape[1])):
        advantage = r[:, t] + gamma * next_value - v[:, t] + gamma * lam * advantage
        padded[:, t] = advantage
        next_value = v[:, t]
    advantages = torch.cat([row[:n] for row, n in zip(padded, lengths)])
    return advantages, advantages + values


def whiten(x):
    """Mean 0 and standard deviation 1 over all of (N,); a constant becomes 0."""
    return (x - x.mean()) * (x.var(correction=0) + 1e-8).rsqrt()


def rloo(rewards):
    """Rewards of whole answers (B, K) -> advantages (B, K): each less the mean of the others."""
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


def with_advantages(rollout, scores, kl, args):
    """Scores r of the answers (M,) and kl of the tokens (N,) -> the Rollout with advantages."""
    lengths = rollout.lengths
    if args.advantage == "rloo":
        rewards = scores - args.kl_coef * summed(kl, lengths)  # (M,)
        advantages = rloo(rewards.view(-1, args.samples)).flatten()  # (M,)
        repeats = torch.tensor(lengths, device=advantages.device)
        return replace(rollout, advantages=advantages.repeat_interleave(repeats))  # (N,)

    # 4. GAE
    rewards = args.reward_scale * token_rewards(scores, kl, lengths, args.kl_coef)  # (N,)
    advantages, returns = gae(rewards, rollout.values, lengths, args.gamma, args.lam)  # (N,), (N,)

    # 5. whitening
    return replace(rollout, advantages=whiten(advantages), returns=returns)


# ---- 6. update


def policy_loss(log_p, old, advantages, clip):
    """Clipped loss of each token (N,), or with RLOO of each answer (M,).

    -> losses, which of them are clipped.
    """
    ratio = (log_p - old).exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(free, clipped), clipped > free


def value_loss(values, old, returns, clip):
    """Loss of the value network at each token, (N,).

    It gains nothing by moving further than `clip` from the old value.
    """
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def update(model, processor, optimizer, factor, rollout, args, step):
    """Update the networks with each minibatch of each pass -> metrics, their means over updates.

    factor: of the learning rates.
    """
    updates = []  # the metrics of each
    for number in range(args.passes):
        order = list(range(len(rollout.examples)))
        random.Random(f"{args.seed}/{step}/{number}").shuffle(order)
        for places in training.chunks(order, training.global_batch(args)):
            minibatch = rollout.take(places)
            M, N = len(minibatch.lengths), sum(minibatch.lengths)
            metrics = Counter()
            mine = processes.share(training.chunks(places, args.batch_size))
            mine = [rollout.take(micro_places) for micro_places in mine]
            decode_ahead(processor, [micro.examples for micro in mine])
            for micro in mine:  # m answers, n tokens
                batch = processor.collate(micro.examples).to(model.device)

                # the adapter "policy": the mean over all tokens (RLOO: answers) of the minibatch
                log_p, entropy = model.log_probs(batch)  # (n,), (n,)
                if args.advantage == "gae":
                    # (n,), (n,)
                    losses, clipped = policy_loss(
                        log_p, micro.log_probs, micro.advantages, args.clip
                    )
                    count = N
                else:
                    # (m,), (m,)
                    losses, clipped = policy_loss(
                        summed(log_p, micro.lengths),
                        summed(micro.log_probs, micro.lengths),
                        first_of(micro.advantages, micro.lengths),  # all tokens have the same
                        args.clip,
                    )
                    count = M
                loss = losses.sum() / count
                loss.backward()

                log_ratio = (log_p - micro.log_probs).detach()
                metrics["policy/loss"] += loss.detach()
                metrics["policy/clipfrac"] += clipped.float().sum() / count
                metrics["policy/approxkl"] += 0.5 * (log_ratio**2).sum() / N
                metrics["objective/entropy"] += entropy.sum() / N

                # the value network: the mean over all tokens of the minibatch
                if args.advantage == "gae":
                    with model.use("value"):
                        values = model.values(batch, batch.index, "value")  # (n,)
                        losses = value_loss(values, micro.values, micro.returns, args.clip)  # (n,)
                        loss = losses.sum() / N
                        (args.value_weight * loss).backward()
                    metrics["val/loss"] += loss.detach()

            where = [e.record.where for e in minibatch.examples]
            metrics = training.numbers(metrics)
            metrics["grad_norm"] = training.clip_gradients(optimizer, max_norm=1.0)
            loss = metrics["policy/loss"] + args.value_weight * metrics.get("val/loss", 0)
            training.check_finite(loss, metrics["grad_norm"], where)
            training.take_step(optimizer, factor)
            updates.append(metrics)
    return {name: statistics.fmean(m[name] for m in updates) for name in updates[0]}


# ---- 7. log


def rollout_metrics(rollout, terms):
    """The metrics of what was drawn and of its scores. terms: {name: (M,)}."""
    M = len(rollout.lengths)
    metrics = {f"scores/{name}": term.mean().item() for name, term in terms.items()}
    metrics["objective/scores"] = sum(terms.values()).mean().item()
    metrics["objective/kl"] = (rollout.log_probs - rollout.reference).sum().item() / M
    metrics["response_length"] = sum(rollout.lengths) / M
    metrics["finished"] = sum(sum(rollout.finished, [])) / M
    return metrics


# ---- the run


def load_reward_model(model, processor, folder):
    """Put the reward model of a run folder beside the policy -> its settings."""
    settings = adapters.load_reward(model, folder)
    for name in ("template", "image_aspect"):
        if settings[name] != getattr(processor, name):
            raise BadInput(
                f"--reward-model {folder} was trained with {name} {settings[name]}, "
                f"and this run has {getattr(processor, name)}."
            )
    return settings


def facts_by_prompt(records, settings, args):
    """{`Record.prompt_key`: captions of the image}; no captions where nobody reads them."""
    texts = [[] for _ in records]
    if settings and settings["facts"] is not None:
        if args.facts is None and args.toy_world:
            args.facts = str(Path(args.toy_world) / "image_to_caption.json")
        if args.facts is None:
            raise BadInput(
                f"--reward-model {args.reward_model} was trained with facts; "
                "--facts FILE is needed."
            )
        texts = facts_for(records, captions(args.facts), args.missing_facts)
    elif args.facts:
        raise BadInput(
            f"--facts is for a reward model that reads them; --reward-model is {args.reward_model}."
        )
    return {record.prompt_key: row for record, row in zip(records, texts)}


def add_value_network(model, args):
    """An adapter and a head "value" that train: the reward model's adapter, and a head of zeros."""
    if args.reward_model == "oracle":
        add_adapter(model.llm, "value", args.lora_rank)
        model.add_head("value")
    else:
        adapters.load_reward(model, args.reward_model, "value")
    for p in model.parameters_of("value"):
        p.requires_grad_(True)
    for p in model.heads["value"].parameters():
        torch.nn.init.zeros_(p)


def main():
    """Load, put reward and value network beside the policy, iterate, save, evaluate."""
    args, clock = parse(), training.Clock()
    toy.fill(args, TOY)  # without --model: our own small model and world, TOY for flags not given
    args.samples = args.samples or (TOY_SAMPLES if args.toy_world else SAMPLES)[args.advantage]
    if args.reward_model is None:
        with processes.first_alone():
            args.reward_model = str(toy.reward_model(args.seed, args.quantize))

    # ---- load data, model and reward model
    device, dtype = training.device_and_dtype(args)
    rows = dataset.read(
        args.data,
        args.images,
        answers=1,
        skip_bad_rows=args.skip_bad_rows,
        subset=(args.subset, args.seed),
        check_images=args.check_images,
        unique=lambda record: record.prompt_key,
    )
    training.show_memory(
        args,
        device,
        dtype,
        rows,
        drawn=args.samples,
        plan=memory.Plan(
            k=args.samples,
            new=args.max_new_tokens,
            trained=1 + (args.advantage == "gae"),
            frozen=int(args.reward_model != "oracle"),
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
    processor.prefetch.kept_bytes = 4 * 2**30  # an iteration: 512 images, .7 GB of LLaVA-1.5's
    examples = rows.encode(processor, prompts_only=True, room=args.max_new_tokens)
    settings = None
    if args.reward_model != "oracle":
        settings = load_reward_model(model, processor, args.reward_model)
    facts = facts_by_prompt([e.record for e in examples], settings, args)
    reward = Reward(model, processor, settings, facts, args)
    reward.check(examples)
    out = training.start(args, "ppo", rows.skipped)
    report.show_start(processor, examples)
    clock.lap("setup")
    before = report.evaluate_start(model, processor, args, out / "before")
    clock.lap("eval")

    # ---- choose what trains: the policy's LoRA, and the value network
    model.prepare(
        args.lora_rank, projector=False, gradient_checkpointing=args.gradient_checkpointing
    )
    if args.advantage == "gae":
        add_value_network(model, args)

    # ---- train
    model.train()
    optimizer = training.optimizer_for(model, args.lr, 0.0)
    steps = args.steps or math.ceil(training.total_steps(args, len(examples)) / args.minibatches)
    first = training.load_checkpoint(out, model, optimizer) if args.resume else 0
    log = training.Log(out, first, steps)
    save = lambda step, alone=False: training.save_checkpoint(out, step, model, optimizer, alone)
    clock.lap("setup")
    for step in range(first, steps):
        training.end_after_steps(save, step)
        prompts = prompts_of(step, args, out, processor, examples, save)
        metrics = {}

        # 1. sample
        rollout = draw_rollout(model, processor, prompts, args, step)
        metrics["seconds/sample"] = clock.lap("sample")

        # 2. score
        terms = reward.terms(rollout, step)  # {name: (M,)}
        scores = sum(terms.values())  # (M,)

        # 3. KL
        rollout = with_reference_and_values(model, processor, rollout, args)
        kl = kl_of(rollout.log_probs, rollout.reference, args.kl)  # (N,)
        metrics["seconds/score"] = clock.lap("score")

        # 4. GAE, 5. whitening
        rollout = with_advantages(rollout, scores, kl, args)

        # 6. update: 5 iterations of warm-up, times the schedule
        factor = min(1.0, (step + 1) / 5) * training.schedule(step, steps, args.schedule, 0)
        metrics |= update(model, processor, optimizer, factor, rollout, args, step)
        metrics["seconds/train"] = clock.lap("train")

        # 7. log
        metrics |= rollout_metrics(rollout, terms)
        metrics["lr"] = args.lr * factor
        metrics["step_seconds"] = sum(metrics[f"seconds/{n}"] for n in ("sample", "score", "train"))
        log(step, ["objective/scores", "objective/kl", "response_length"], metrics)
        if args.save_every and (step + 1) % args.save_every == 0:
            save(step + 1)
    model.eval()
    clock.lap("train")

    # ---- save, evaluate
    training.save_result(out, model, processor, args)
    after = report.evaluate(model, processor, args, out / "after")
    clock.lap("eval")
    report.finish(out, before, after, clock.seconds, args)


if __name__ == "__main__":
    run(main, trains=True)
