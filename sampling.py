"""Drawing answers: the image is encoded once, the prompt is prefilled once, then decoding in place.

On a GPU a decoding step is recorded once and replayed for each token (`Recorded`).

samples = sample(model, prompts, pixel_values, k=4, stop_ids=processor.stop_ids)
texts = generate(model, processor, records, max_new_tokens=64)      # greedy, with progress
samples = answers_to(model, processor, examples, k=4, max_new_tokens=64, seed="0/17")
"""

import functools
import math
import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import memory
import processes
from attention import LastBlock, mask_and_prefix, sliding_window
from common import Progress
from lora import cast_once
from model import pack


# of the free memory: the cache is copied, and the allocator had taken up to 1.31 times what tensors
# held (results/gpu.json, sample/ without nf4)
SHARE = 0.75
FEW = 8  # tokens for which recording a step does not pay


@dataclass
class Samples:
    """K answers for each of B prompts.

    tokens[b][k]: (R,), the stop token included. log_probs[b][k]: (R,), under the full softmax at
    temperature 1, whatever temperature drew the tokens. finished[b][k]: False for an answer that
    was cut off at `max_new_tokens`. first[b][k]: (W,), what the tokens `watch` had for logits where
    the answer's first token was drawn, as the arithmetic rounded them.
    """

    tokens: list
    log_probs: list
    finished: list
    first: list | None = None


class KVCache:
    """Keys and values of every layer, allocated once: the prompt's slots, then one a token.

    slot: None, or a tensor (1,) that says where the next token goes. Then attention runs over all
    slots, so that every step is the same work at the same places: `Recorded`.
    """

    def __init__(self, slots):
        self.slots, self.length, self.slot = slots, 0, None
        self.keys, self.values = [], []

    def update(self, key, value, layer, *_, **__):
        """transformers calls this: store (rows, heads, new, d) after what is there, return all."""
        if self.slot is not None:
            self.keys[layer].index_copy_(2, self.slot, key)
            self.values[layer].index_copy_(2, self.slot, value)
            return self.keys[layer], self.values[layer]
        if layer == len(self.keys):
            shape = (*key.shape[:2], self.slots)
            self.keys.append(key.new_empty((*shape, key.shape[3])))
            self.values.append(value.new_empty((*shape, value.shape[3])))
        end = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def take(self, rows, slots):
        """Keep (or repeat) these rows, with room for `slots` tokens."""
        for stored in (self.keys, self.values):
            for i, old in enumerate(stored):
                stored[i] = old.new_empty((len(rows), old.shape[1], slots, old.shape[3]))
                stored[i][:, :, : self.length] = old[rows, :, : self.length]
                # `Recorded` reads these too: at weight 0, but 0 times a NaN is NaN
                stored[i][:, :, self.length :] = 0


@dataclass
class Growing:
    """The M answers that are being drawn, after their prompts are prefilled."""

    cache: KVCache  # M rows, L slots in use
    h: torch.Tensor  # (M, D) hidden state that predicts the next token
    visible: torch.Tensor  # (M, L) bool, which cached positions the new tokens attend to
    positions: torch.Tensor  # (M, L) position ids of the cache
    next_position: torch.Tensor  # (M,) position id of the first new token
    row: torch.Tensor  # (M,) the prompt of each; the cache of `decode_in_rows` has B rows


@torch.no_grad()
def sample(
    model,
    prompts,
    pixel_values=None,
    k=1,
    max_new_tokens=256,
    temperature=1.0,
    stop_ids=(),
    masked=None,
    given=None,
    generator=None,
    image_sizes=None,
    room=None,
    watch=(),
    in_rows=False,
):
    """Draw k answers to each prompt -> `Samples`.

    prompts: B tensors (P,). temperature 0 is greedy. Drawing stops at any of `stop_ids` or after
    max_new_tokens; the image token is never drawn. masked: (B, longest P), True = nobody attends to
    this prompt position during the whole generation; no position id moves (BDHS).
    given: texts that the answers begin with, B lists of (tokens (R,), cuts). Each is prefilled
    once, after its prompt, and continued k times from each cut, the number of its tokens kept.
    The result has the order of `given` and its cuts, and not the given tokens.

    room: bytes that this may take (default: most of what the device has free). What needs more is
    drawn in groups of prompts, one after the other. They share the generator, so at temperatures
    above 0 another room may give other draws; the same room gives the same.
    watch: token ids; see `Samples`. in_rows: for short greedy answers; see `decode_in_rows`.
    """
    given = given or [[(torch.zeros(0, dtype=torch.long), [0])]] * len(prompts)
    branches = [
        [(text, cut) for text, (_, cuts) in enumerate(texts) for cut in cuts for _ in range(k)]
        for texts in given
    ]
    tiles = tiles_of(model, prompts, image_sizes)
    lengths = [len(p) + sum(len(t) for t, _ in texts) for p, texts in zip(prompts, given)]
    answers = [len(row) for row in branches]
    training = model.training
    model.eval()  # gradient checkpointing would switch off the cache

    samples = Samples([], [], [], [])
    with cast_once(model.llm, model.dtype):
        room = SHARE * memory.available(model.device) if room is None else room
        for some in groups(model, lengths, answers, tiles, max_new_tokens, room, in_rows):
            shown = slice(sum(tiles[: some.start]), sum(tiles[: some.stop]))  # the tower's pictures
            images = slice(*(sum(n > 0 for n in tiles[:end]) for end in (some.start, some.stop)))
            if some == slice(0, len(prompts)):
                shown = images = slice(None)
            draw(
                samples,
                model,
                prompts[some],
                given[some],
                branches[some],
                part(pixel_values, shown),
                part(image_sizes, images),
                part(masked, some),
                (max_new_tokens, temperature, stop_ids, generator, watch),
                in_rows,
            )
    model.train(training)
    return samples


def tiles_of(model, prompts, image_sizes):
    """How many images the tower sees for each prompt: 0 without one, with tiles more than 1."""
    tiles = [int((p == model.image_token_id).any()) for p in prompts]
    if not model.anyres or image_sizes is None or len(image_sizes) != sum(tiles):
        return tiles  # more or fewer images than the text shows are found later
    sizes = iter(image_sizes.tolist())
    return [has and 1 + math.prod(model.anyres.grid(next(sizes))) for has in tiles]


def part(x, places):
    """These places of a tensor; None of None, and where no row is left."""
    return None if x is None or not len(x[places]) else x[places]


def groups(model, lengths, answers, tiles, new, room, in_rows=False):
    """Slices of consecutive prompts, each as long as what it needs fits into `room` bytes.

    lengths, answers, tiles: of each prompt its tokens (given texts included), how many answers are
    drawn, and pictures. At least one prompt is in a group, whether it fits or not.
    """
    start = 0
    for end in range(1, len(lengths) + 1):
        more = slice(start, end + 1)  # would the next prompt fit too?
        need = memory.sampling(
            model,
            len(lengths[more]),
            sum(answers[more]),
            max(lengths[more]),
            new,
            max(tiles[more]),
            max(answers[more]) if in_rows else 0,
        )
        if end == len(lengths) or need > room:
            yield slice(start, end)
            start = end


def draw(samples, model, prompts, given, branches, pixel_values, image_sizes, masked, how, in_rows):
    """Draw the answers to one group of prompts and add them to `samples`."""
    max_new_tokens, _, stop_ids, _, watch = how

    # 1. prefill: image, prompts and given texts, once
    growing = prefill(
        model, prompts, given, branches, pixel_values, image_sizes, masked, max_new_tokens, in_rows
    )
    # 2. decode: one token of every answer at a time
    if in_rows:
        drawn = decode_in_rows(model, growing, max_new_tokens, stop_ids, watch)
    else:
        drawn = decode(model, growing, *how)
    tokens, log_probs, lengths, finished, first = (x.cpu() for x in drawn)

    m = 0
    for row in branches:
        mine = range(m, m + len(row))
        samples.tokens.append([tokens[i, : lengths[i]] for i in mine])
        samples.log_probs.append([log_probs[i, : lengths[i]] for i in mine])
        samples.finished.append([bool(finished[i]) for i in mine])
        samples.first.append([first[i] for i in mine])
        m += len(row)


def prefill(
    model, prompts, given, branches, pixel_values, image_sizes, masked, max_new_tokens, in_rows
):
    """Run prompts and given texts through the model once, and repeat their cache for each answer.

    branches: for each prompt the (number of the given text, cut) of each of its answers, M in all.
    in_rows: the cache is not repeated; it has room for all answers of a prompt behind it.
    """
    device = model.device
    batch = pack(prompts, [[tokens for tokens, _ in texts] for texts in given]).to(device)
    B, L = batch.input_ids.shape
    hide = None
    if masked is not None and masked.any():
        hide = F.pad(masked, (0, L - masked.shape[1])).to(device)  # (B, L)

    # which positions of its row each answer follows, and the last of them
    row = torch.tensor([b for b in range(B) for _ in branches[b]], device=device)  # (M,)
    text, cut = torch.tensor(sum(branches, []), device=device).view(-1, 2).T  # (M,), (M,)
    next_position = torch.tensor([len(p) for p in prompts], device=device)[row] + cut  # (M,)
    positions, segments = batch.position_ids[row], batch.segments[row]  # (M, L)
    kept = (segments == text[:, None] + 1) & (positions < next_position[:, None])
    follows = (segments == 0) | kept  # (M, L)
    last = (follows & (positions == next_position[:, None] - 1)).int().argmax(1)  # (M,)

    cache = KVCache(L + in_rows * max(map(len, branches)) * max_new_tokens)
    pixel_values = None if pixel_values is None else pixel_values.to(device)
    x = model.embed(batch.input_ids, pixel_values, image_sizes)  # (B, L, D)
    wanted = row * L + last
    mask, prefix = mask_and_prefix(batch, model.llm.config, wanted, hide)
    h = model.run_llm(x, mask, batch.position_ids, cache, prefix, wanted)  # (M, D)
    cache.length = L
    if not in_rows:
        cache.take(row, L + max_new_tokens)
    visible = follows if hide is None else follows & ~hide[row]
    return Growing(cache, h, visible, positions, next_position, row)


def decode(model, growing, max_new_tokens, temperature, stop_ids, generator, watch=()):
    """Draw until every answer has ended -> tokens, log-probs (M, max), lengths, finished (M,).

    And the logits of the tokens `watch` at the first step, (M, W).
    """
    cache, h, next_position = growing.cache, growing.h, growing.next_position
    M, L, device = len(h), cache.length, h.device
    visible = F.pad(growing.visible, (0, max_new_tokens))
    positions = F.pad(growing.positions, (0, max_new_tokens))
    head = model.head_weight()
    ends_answer = torch.zeros(len(head), dtype=torch.bool)  # (V,)
    ends_answer[list(stop_ids)] = True
    ends_answer = ends_answer.to(device)

    tokens = torch.zeros(M, max_new_tokens, dtype=torch.long, device=device)
    log_probs = torch.zeros(M, max_new_tokens, device=device)
    drawn = torch.zeros(M, dtype=torch.long, device=device)
    finished = torch.zeros(M, dtype=torch.bool, device=device)
    computed = torch.arange(M, device=device)  # the answers that are still in the cache ...
    live = torch.ones(M, dtype=torch.bool, device=device)  # ... and which of them still grow
    look_every = 8 if device.type == "cuda" else 1  # to count them, the host waits for the device
    record = can_record(model, max_new_tokens)
    worth_a_copy = 0.5 if record else 0.75  # a copy is followed by a new recording
    step, slots = None, torch.arange(L, L + max_new_tokens, device=device)

    for t in range(max_new_tokens):
        # draw token t of every answer
        logits = (h.to(model.dtype) @ head.t()).float()  # (M, V)
        log_p = logits.log_softmax(-1)
        if t == 0:
            first = logits[:, list(watch)]  # (M, W)
        logits[:, model.image_token_id] = -torch.inf
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            p = (logits / temperature).softmax(-1)
            token = torch.multinomial(p, 1, generator=generator)[:, 0]

        # note it, for the answers that still grow
        tokens[computed, t] = token * live
        log_probs[computed, t] = log_p.gather(-1, token[:, None])[:, 0] * live
        drawn[computed] += live
        ended = ends_answer[token]
        finished[computed] |= live & ended
        live = live & ~ended
        if t == max_new_tokens - 1:
            break

        # drop the ended answers once they are enough to be worth the copy
        growing_now = int(live.sum()) if t % look_every == 0 else len(live)
        if growing_now == 0:
            break
        pays = max_new_tokens - t > FEW or not record
        if growing_now <= worth_a_copy * len(live) and pays:
            keep = live.nonzero()[:, 0]
            computed, live, token = computed[keep], live[keep], token[keep]
            visible, positions = visible[keep], positions[keep]
            next_position = next_position[keep]
            cache.take(keep, L + max_new_tokens)
            step = None

        # the hidden state that predicts token t + 1
        places = token, next_position + t, visible, positions, slots[t : t + 1]
        if record and step is None:
            step = Recorded(model, cache, *places)
        h = step(token) if step else next_states(model, cache, *places)
        cache.length += 1
    return tokens, log_probs, drawn, finished, first


def next_states(model, cache, token, now, visible, positions, slot):
    """Run one new token of each answer (M,), at the position ids `now` (M,) -> its state (M, D).

    It goes into the slot `slot` (1,) of the cache, and of visible and positions (M, slots).
    """
    visible.index_fill_(1, slot, True)
    positions.index_copy_(1, slot, now[:, None])
    keys = slice(cache.length + 1) if cache.slot is None else slice(None)
    mask = sliding_window(
        visible[:, None, None, keys], now[:, None], positions[:, keys], model.llm.config
    )
    x = model.llm.get_input_embeddings()(token)[:, None]  # (M, 1, D)
    return model.run_llm(x, mask, now[:, None], cache)[:, 0]


class Recorded:
    """`next_states` as a CUDA graph: a GPU gets one launch a token in place of thousands.

    A 7B model's launches take several times as long as their arithmetic.
    """

    def __init__(self, model, cache, token, now, visible, positions, slot):
        # a replay reads and writes them where they are now
        self.token, self.now = token.clone(), now.clone()
        self.slot = cache.slot = slot.clone()
        self.visible, self.positions = visible, positions

        def step():
            places = self.visible, self.positions, self.slot
            h = next_states(model, cache, self.token, self.now, *places)
            self.now += 1
            self.slot += 1
            return h

        self.replay = recording(step, token.device)

    def __call__(self, token):
        """The next token of each answer (M,) -> its state (M, D), which the next call overwrites."""
        self.token.copy_(token)
        return self.replay()


def recording(step, device):
    """Record what a function does on a GPU, without doing it -> a function that does it."""
    graph, stream = torch.cuda.CUDAGraph(), recording_stream(device)
    # the annotator's device need not be the current one; threads that decode images may go on
    with (
        torch.cuda.device(device),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        result = step()

    def replay():
        graph.replay()
        return result

    return replay


@functools.cache
def recording_stream(device):
    """One stream of a GPU for all recordings: cuBLAS keeps memory for each that it has seen."""
    return torch.cuda.Stream(device)


def can_record(model, max_new_tokens):
    """Is the model on a GPU, its step the same at every length, and are the tokens worth it?

    Only kinds of LLM that were tried are recorded. Rotary embeddings of two types look at the length on the
    host; blocks that were divided (sharding.py) have hooks of FSDP.
    """
    base = model.llm.base_model
    known = isinstance(base.layers[-1], LastBlock) and not hasattr(base, "unshard")
    if model.device.type != "cuda" or max_new_tokens <= FEW or not known:
        return False
    kind = str(base.rotary_emb.rope_type)
    return "dynamic" not in kind and "longrope" not in kind


def decode_in_rows(model, growing, max_new_tokens, stop_ids, watch=()):
    """As `decode` at temperature 0, for short answers: they grow side by side in a prompt's row.

    The cache has B rows of L + K x max_new_tokens slots, in place of M rows of L + max_new_tokens:
    six short answers about an image need a sixth of the memory, and nothing is copied. An ended
    answer is computed on until all have ended, and each query runs over all slots of its row, so
    that long answers would cost more than the copy.
    """
    cache, h, row = growing.cache, growing.h, growing.row
    M, B, L, device = len(h), int(row[-1]) + 1, cache.length, h.device
    slot = torch.arange(M, device=device) - torch.searchsorted(row, row)  # (M,) 0 .. K - 1
    K = int(slot.max()) + 1
    visible = torch.zeros(B, K, L, dtype=torch.bool, device=device)
    visible[row, slot] = growing.visible
    key_positions = torch.zeros(B, L, dtype=torch.long, device=device)
    key_positions[row] = growing.positions
    own = torch.eye(K, dtype=torch.bool, device=device).expand(B, K, K)  # an answer sees itself
    embeddings, head = model.llm.get_input_embeddings(), model.head_weight()
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)

    tokens = torch.zeros(M, max_new_tokens, dtype=torch.long, device=device)
    log_probs = torch.zeros(M, max_new_tokens, device=device)
    drawn = torch.zeros(M, dtype=torch.long, device=device)
    live = torch.ones(M, dtype=torch.bool, device=device)

    for t in range(max_new_tokens):
        # token t of every answer
        logits = (h.to(model.dtype) @ head.t()).float()  # (M, V)
        log_p = logits.log_softmax(-1)
        if t == 0:
            first = logits[:, list(watch)]  # (M, W)
        logits[:, model.image_token_id] = -torch.inf
        token = logits.argmax(-1)
        tokens[:, t] = token * live
        log_probs[:, t] = log_p.gather(-1, token[:, None])[:, 0] * live
        drawn += live
        live = live & ~torch.isin(token, stops)
        if t == max_new_tokens - 1 or not live.any():
            break

        # the hidden states that predict token t + 1, K new slots of each row
        new, now = torch.zeros(2, B, K, dtype=torch.long, device=device)
        new[row, slot], now[row, slot] = token, growing.next_position + t
        visible = torch.cat([visible, own], 2)  # (B, K, L + (t + 1) K)
        key_positions = torch.cat([key_positions, now], 1)
        mask = sliding_window(visible[:, None], now, key_positions, model.llm.config)
        h = model.run_llm(embeddings(new), mask, now, cache)[row, slot]  # (M, D)
        cache.length += K
    return tokens, log_probs, drawn, ~live, first


def answers_to(model, processor, examples, k, max_new_tokens, seed, temperature=1.0):
    """k answers to the prompt of each Example, drawn by the seed, any text -> `Samples`."""
    generator = torch.Generator(model.device).manual_seed(random.Random(seed).getrandbits(62))
    pixel_values, image_sizes = processor.images(examples)
    return sample(
        model,
        [e.prompt for e in examples],
        pixel_values,
        k,
        max_new_tokens,
        temperature,
        processor.stop_ids,
        generator=generator,
        image_sizes=image_sizes,
    )


def with_answers(example, answers):
    """The Example with these token sequences (R,) as its answers, each token scored."""
    scored = [torch.ones(len(tokens), dtype=torch.bool) for tokens in answers]
    return replace(example, answers=answers, scored=scored)


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
    split=False,
):
    """k answers to each record's prompt -> a list of k texts for each record, in order.

    batch_size: prompts whose images are decoded together; `sample` draws fewer at a time where
    memory is short. split: the batches are divided among the processes, all of which call this;
    greedy answers only, as one generator draws all. Progress is shown on stderr when it takes long.
    """
    examples = [processor.encode(replace(r, answers=())) for r in records]
    # prompts of similar length together: little padding
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
    generator = torch.Generator(model.device).manual_seed(seed)
    starts = range(0, len(order), batch_size)
    parts = [order[start : start + batch_size] for start in starts]
    parts = processes.share(parts) if split else parts
    mine, texts = sum(parts, []), []
    processor.prefetch.expect([examples[i].record.image for i in mine])
    progress = Progress(label, len(mine))
    for chosen in parts:
        batch = [examples[i] for i in chosen]
        pixel_values, image_sizes = processor.images(batch)
        samples = sample(
            model,
            [e.prompt for e in batch],
            pixel_values,
            k,
            max_new_tokens,
            temperature,
            processor.stop_ids,
            generator=generator,
            image_sizes=image_sizes,
        )
        texts.append([[processor.text(t) for t in tokens] for tokens in samples.tokens])
        progress(sum(map(len, texts)))
    texts = sum(processes.joined(texts) if split else texts, [])
    by_place = dict(zip(order, texts))
    return [by_place[i] for i in range(len(records))]
