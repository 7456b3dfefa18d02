"""What a run needs: the counts against measured peaks of a GPU, kept tensors and live bytes on a CPU."""

import importlib
import itertools
import json
import math
import re
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dpo
import memory
import nf4
import processes
import reward_model
import sampling
import sft
import training
from common import flag_name, lacks_memory
from data import Record
from formats import checkpoints, dataset
from formats.anyres import AnyRes
from lab import fits
from lab.bench_gpu import SHAPES, default_dtype
from model import MLLM, Projector, pack
from sampling import groups

ROOT = Path(__file__).parents[1]
CELLS = json.loads((ROOT / "results" / "gpu.json").read_text())
STEPS = [c for c in CELLS if c["cell"].startswith("step/") and "peak_gib" in c]
DRAWS = [c for c in CELLS if c["cell"].startswith(("sample/", "negative/"))]
DRAWS = [c for c in DRAWS if "peak_gib" in c]
DRAWS = [c for c in DRAWS if not {"generate", "plain", "nf4"} & {*c["cell"].split("/")}]
NAME = lambda c: f"{c['cell']} {c['card']}"


# ---- against a GPU


@pytest.fixture(scope="module")
def shapes():
    """The model of lab/bench_gpu.py without weights, and of a picture its tokens and its tiles."""
    shape = SHAPES["7b"]
    vision = transformers.CLIPVisionConfig(**shape["vision"])
    llm = transformers.LlamaConfig(**shape["llm"], pad_token_id=0)
    with torch.device("meta"), default_dtype(torch.bfloat16):
        projector = Projector(vision.hidden_size, llm.hidden_size)
        parts = (transformers.CLIPVisionModel(vision), projector)
        model = MLLM(*parts, transformers.LlamaForCausalLM(llm), llm.vocab_size - 1)
    anyres = AnyRes(shape["pinpoints"], 336, 24)
    size = shape["picture"]
    tiles = 1 + math.prod(anyres.grid(size))
    return model, {"1.5": (576, 1), "next": (anyres.tokens(size), tiles)}


def flags(**changed):
    """Flags of lab/bench_gpu.py's steps."""
    return Namespace(**(vars(memory.DPO) | {"grad_accum": 1} | changed))


def number(letter, words, default):
    """Of the word that is this letter and a number: r16 -> 16."""
    found = [int(w[1:]) for w in words if w[0] == letter and w[1:].isdigit()]
    return found[0] if found else default


@pytest.mark.parametrize("cell", STEPS, ids=NAME)
def test_a_step_on_a_gpu_needs_what_was_measured(shapes, cell):
    """Within 15 %, also of what comes on top of the weights."""
    model, pictures = shapes
    _, kind, pairs, *how = cell["cell"].split("/")
    tokens, tiles = pictures[kind]
    load = memory.Load(int(pairs[1:]), 45 + tokens + 2 * 100, 45 + tokens, 2 * 100, tiles)
    args = flags(
        gradient_checkpointing="checkpointing" in how,
        lora_rank=number("r", how, 128),
        quantize="nf4" if "nf4" in how else None,
    )
    need = memory.training(model, args, load)
    total = sum(need.values()) / memory.GIB
    assert total == pytest.approx(cell["peak_gib"], rel=0.15)
    weights = need["weights"] / memory.GIB
    assert total - weights == pytest.approx(cell["peak_gib"] - weights, rel=0.15)


@pytest.mark.parametrize("cell", DRAWS, ids=NAME)
def test_sampling_on_a_gpu_needs_what_was_measured(shapes, cell):
    """`negative/` completes five sentences of each answer, the last of them cut after 90 tokens."""
    model, pictures = shapes
    what, kind, prompts, *how = cell["cell"].split("/")
    tokens, tiles = pictures[kind]
    B, length = int(prompts[1:]), 45 + tokens
    if what == "sample":
        need = memory.sampling(model, B, B * number("k", how, 1), length, 128, tiles)
    else:
        need = memory.sampling(model, B, 5 * B, length + 90, 24, tiles)
    if cell.get("commit"):  # cells with a commit: the adapter of rank 128 is cast once
        need += model.dtype.itemsize * memory.lora_numbers(model, 128)
    assert need / memory.GIB == pytest.approx(cell["peak_gib"] - cell["held_gib"], rel=0.15)


# ---- against autograd and against live tensors, on a CPU


def small(kind, dtype, heads=8, keys=8):
    """A model large enough that activations are most of a step: 4 blocks of size 128."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        image_size=56, patch_size=14,
    )  # fmt: skip
    llm = transformers.AutoConfig.for_model(
        kind, hidden_size=128, intermediate_size=344, num_hidden_layers=4, vocab_size=500,
        num_attention_heads=heads, num_key_value_heads=keys, pad_token_id=0,
    )  # fmt: skip
    llm = transformers.AutoModelForCausalLM.from_config(llm).to(dtype)
    tower = transformers.CLIPVisionModel(vision).to(dtype)
    return MLLM(tower, Projector(64, 128).to(dtype), llm, 499)


def batch(pairs=2, text=44, answer=30):
    """Pairs of equal length with a picture of 16 tokens, and their Load."""
    words = lambda n: torch.randint(3, 498, (n,))
    prompts = [torch.cat([torch.full((16,), 499), words(text)]) for _ in range(pairs)]
    answers = [[words(answer), words(answer)] for _ in range(pairs)]
    P = 16 + text
    load = memory.Load(pairs, P + 2 * answer, P, 2 * answer, 1)
    return pack(prompts, answers, None, torch.randn(pairs, 3, 56, 56)), load


KINDS = (("llama", 8), ("llama", 2), ("qwen3", 2))  # all heads, grouped heads, norms of q and k
TRAINS = (  # LoRA, the whole LLM, the projector alone, LoRA on 4 bits
    {"lora_rank": 8},
    {"lora_rank": 0},
    {"lr": 0},
    {"lora_rank": 8, "quantize": "nf4"},
)
CASES = list(itertools.product(KINDS, (torch.float32, torch.bfloat16), TRAINS))


@pytest.mark.parametrize("kind, dtype, trains", CASES)
def test_activations_are_the_tensors_that_autograd_keeps(kind, dtype, trains):
    """Distinct storages that its nodes save, parameters aside: within 5 %."""
    args, model = flags(**trains), small(kind[0], dtype, keys=kind[1])
    pairs, load = batch()
    rank, whole = args.lora_rank if args.lr else 0, bool(args.lr) and not args.lora_rank
    counted, _ = memory.activations(model, load, rank, whole, False)
    counted += memory.tower(model, load)[0]

    if args.quantize:
        nf4.quantise_linears(model.llm)
    model.prepare(args.lora_rank, llm=args.lr > 0).train()
    own = {p.untyped_storage().data_ptr() for p in model.state_dict().values()}
    kept = {}

    def save(x):
        """Called for each tensor that a node of the graph saves."""
        kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage())
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        loss = model.answer_log_probs(pairs).sum()
    assert loss.requires_grad
    saved = sum(storage.nbytes() for where, storage in kept.items() if where not in own)
    assert counted == pytest.approx(saved, rel=0.05)


class Live(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that are still referenced."""

    def __init__(self, known):
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known}
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacking_a_layer_needs_what_is_alive(dtype):
    """Beside it the scales, 5 float32 or fewer a block of 64 weights."""
    layer = nf4.NF4Linear(torch.nn.Linear(1024, 1024, bias=False, dtype=dtype))
    layer.copy_(torch.randn(1024, 1024))
    layer.dequantise()  # makes the tables
    with Live([*layer.state_dict().values(), *nf4.tables(layer.codes.device)]) as live:
        layer.dequantise()
    assert 0 <= live.peak / 2**20 - nf4.UNPACKING_BYTES <= 5 * 4 / 64


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind, dtype, trains", CASES)
def test_a_step_on_a_cpu_needs_what_is_alive(kind, dtype, trains, checkpointing):
    """Weights, AdamW's moments and the most that one step makes: within 15 %."""
    args = flags(gradient_checkpointing=checkpointing, **trains)
    model = small(kind[0], dtype, keys=kind[1])
    pairs, load = batch()
    need = sum(memory.training(model, args, load).values())

    if args.quantize:
        nf4.quantise_linears(model.llm)
    model.prepare(args.lora_rank, llm=args.lr > 0, gradient_checkpointing=checkpointing).train()
    optimizer = training.optimizer_for(model, args.lr, args.projector_lr)

    def step():
        """As dpo.py's."""
        model.answer_log_probs(pairs).sum().backward()
        training.clip_gradients(optimizer, max_norm=1.0)
        training.take_step(optimizer, 1.0)

    step()  # AdamW makes its moments
    held = [*model.state_dict().values(), *model.initial_projector[0].parameters()]
    held += [x for state in optimizer.state.values() for x in state.values()]
    with Live(held) as live:
        step()
    assert need == pytest.approx(sum(x.nbytes for x in held) + live.peak, rel=0.15)


def test_a_second_micro_batch_finds_the_gradients_of_the_first(shapes):
    """Then 4 bytes a trained number come on top of the activations."""
    model, _ = shapes
    load = memory.Load(4, 821, 621, 200)
    one, more = (memory.training(model, flags(grad_accum=n), load) for n in (1, 8))
    trained = memory.lora_numbers(model, 128) + memory.numbers(model.projector)
    assert trained == 32 * 128 * (4 * 2 * 4096 + 3 * (4096 + 11008)) + 1025 * 4096 + 4097 * 4096
    assert sum(more.values()) - sum(one.values()) == 4 * trained


def test_nf4_packs_the_blocks_and_nothing_else(shapes):
    """6.5 billion weights of the blocks at 4.127 bits instead of 16; embeddings and head stay."""
    model, _ = shapes
    load = memory.Load(1, 821, 621, 200)
    plain, packed = (
        memory.training(model, flags(quantize=how), load)["weights"] for how in (None, "nf4")
    )
    blocks = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert plain - packed == pytest.approx(blocks * (16 - 4 - 8 / 64 - 32 / 16384) / 8)


def test_whole_tuning_divides_the_blocks_among_processes(shapes):
    """16 bytes of each of the blocks' numbers, the second micro-batch's gradients included."""
    model, _ = shapes
    load = memory.Load(1, 821, 621, 200)
    args = flags(lora_rank=0, grad_accum=2)
    one, two = (
        memory.training(model, args, load, memory.Plan(shards=n))["trained"] for n in (1, 2)
    )
    blocks = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096)
    assert one - two == 16 * blocks / 2


# ---- what is said


def test_the_line_names_flags_that_fit(shapes):
    """The mildest: a smaller micro-batch of the same step, then checkpointing too, ..."""
    model, _ = shapes
    load = memory.Load(4, 2585, 2385, 200, 5)
    said = lambda gib, **how: memory.says(
        model, flags(batch_size=4, grad_accum=8, **how), load, "cuda", gib * memory.GIB
    )
    assert said(80).endswith("cuda has 80.0 GiB free")
    assert "It does not fit: --batch-size 2 --grad-accum 16 needs" in said(60)
    assert "It does not fit: --gradient-checkpointing --batch-size 4 --grad-accum 8" not in said(24)
    assert "It does not fit: --gradient-checkpointing needs" in said(25)
    assert "It does not fit: --gradient-checkpointing --batch-size 2 --grad-accum 16 needs" in said(
        22
    )
    assert "--gradient-checkpointing --quantize nf4" in said(12, quantize=None)
    assert "It does not fit, whatever the flags" in said(4)
    # what the line promises, is what the flags need
    changed = flags(batch_size=2, grad_accum=16)
    promised = float(said(60).split(" needs ")[1])
    need = memory.training(model, changed, replace(load, rows=2))
    assert promised == pytest.approx(sum(need.values()) / memory.GIB, abs=0.05)


class Kept(Exception):
    """Carries the rows that a script counts, and stops it there."""


def test_the_longest_row_may_be_in_any_file(monkeypatch, tmp_path):
    """reward_model.py: of those of --data; rows of --test-data are scored and not trained on."""
    row = lambda i, text: {
        "id": str(i),
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": text},
        ],
        "rejected_conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A dog."},
        ],
    }
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    for name, text in (("one", "A cup."), ("two", "A red cup."), ("held", "A cup. " * 9)):
        (tmp_path / f"{name}.json").write_text(json.dumps([row(0, text)]))

    def keep(args, device, dtype, rows, *_):
        raise Kept([r.answers[0] for r in rows.records])

    monkeypatch.setattr(training, "show_memory", keep)
    monkeypatch.chdir(tmp_path)
    flags = "--model m --data one.json --data two.json --test-data held.json --images . --no-facts"
    monkeypatch.setattr(sys, "argv", ["reward_model.py", *flags.split()])
    with pytest.raises(Kept) as kept:
        reward_model.main()
    assert kept.value.args == (["A cup.", "A red cup."],)


def test_the_line_names_no_flag_that_the_script_refuses(monkeypatch, shapes):
    """Every flag of `smaller`, beside those that were given, passes the script's own check."""
    model, _ = shapes
    llava, parts = "--model m --data d.json", "--vision v --llm l --data d.json"
    for given, told in (
        (f"{llava} --lora-rank 128", {"quantize", "lora_rank"}),
        (llava, {"lora_rank"}),
        (f"{llava} --vision-lr 1e-5", set()),
        (parts, {"lora_rank"}),
        (f"{parts} --lora-rank 128", {"lora_rank"}),
        (f"{parts} --vision-lr 1e-5", set()),
    ):
        monkeypatch.setattr(sys, "argv", ["sft.py", *given.split()])
        seen = set()
        for more in memory.smaller(sft.parse()):
            words = [flag_name(n) + ("" if v is True else f"={v}") for n, v in more.items()]
            monkeypatch.setattr(sys, "argv", ["sft.py", *given.split(), *words])
            sft.parse()
            seen |= more.keys()
        assert seen == told | {"gradient_checkpointing", "batch_size", "grad_accum"}, given


def test_processes_share_the_memory_of_a_cpu(monkeypatch):
    """Two that run at once may take half each; of GPUs each process has its own."""
    cpu, text = torch.device("cpu"), "MemTotal: 9 kB\nMemAvailable: 4000 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    assert memory.available(cpu) == 4000 * 1024
    monkeypatch.setattr(processes, "total", 4)
    assert memory.available(cpu) == 1000 * 1024
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 4096}.get)
    assert memory.available(cpu) == 100 * 1024
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (500, 900))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 30)
    assert memory.available(torch.device("cuda")) == 540


def test_flags_of_the_inspector_are_the_defaults_of_dpo(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dpo.py"])
    args = vars(dpo.parse())
    assert {name: args[name] for name in vars(memory.DPO)} == vars(memory.DPO)


@pytest.mark.parametrize("error, lacks", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), True),
    (MemoryError(), True),
    (RuntimeError("shapes do not fit"), False),
])  # fmt: skip
def test_a_lack_of_memory_is_known(error, lacks):
    assert lacks_memory(error) == lacks


def test_a_lack_of_memory_ends_with_one_sentence():
    """A real one of the CPU's allocator, and status 1."""
    code = "import common, torch; common.run(lambda: torch.empty(2**60), True)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    for word in ("out of memory", "--batch-size", "--gradient-checkpointing", "checkpoint"):
        assert word in line
    code = "import common; common.run(lambda: [].append(1 / 0))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "ZeroDivisionError" in done.stderr


# ---- sampling in groups


def test_groups_hold_what_fits(shapes):
    """LLaVA-NeXT, 64 prompts of POPE with 16 new tokens: 2,401 x 512 KiB = 1.17 GiB a prompt."""
    model, _ = shapes
    cut = lambda gib, answers=1, new=16: [
        part.stop - part.start
        for part in groups(model, [2385] * 64, [answers] * 64, [5] * 64, new, gib * memory.GIB)
    ]
    assert cut(200) == [64]
    assert memory.sampling(model, 64, 64, 2385, 16, 5) / memory.GIB > 64 * 1.17
    sizes = cut(40)
    assert sum(sizes) == 64 and max(sizes) == sizes[0] == 27  # 27 x 1.17 = 31.7, and the prefill
    assert memory.sampling(model, 27, 27, 2385, 16, 5) <= 40 * memory.GIB
    assert memory.sampling(model, 28, 28, 2385, 16, 5) > 40 * memory.GIB
    assert cut(40, answers=5)[0] == 6  # BDHS: 30 caches
    assert cut(0.5) == [1] * 64  # what does not fit alone is tried all the same


@pytest.mark.parametrize("tiled", [False, True])
def test_groups_change_no_greedy_answer(build, tiled):
    """Prompts with and without image, masked, with given texts: one group against one a prompt."""
    model = build()
    if tiled:
        model.anyres = AnyRes(((28, 56), (56, 28), (56, 56)), 28, 2)
        model.image_newline = torch.nn.Parameter(torch.zeros(64))
    sizes = [(30, 50), (28, 28), (50, 20)]
    image = [model.anyres.tokens(s) if tiled else 4 for s in sizes]
    torch.manual_seed(1)
    words = lambda n: torch.randint(3, 90, (n,))
    show = lambda n: torch.full((n,), model.image_token_id)
    prompts = [torch.cat([words(3), show(image[0]), words(2)]), words(4)]
    prompts += [torch.cat([show(n), words(5)]) for n in image[1:]]
    tiles = 3 + sum(math.prod(model.anyres.grid(s)) for s in sizes) if tiled else 3
    pixels = torch.randn(tiles, 3, 28, 28)
    given = [[(words(4), [1, 3])], [(words(2), [2])], [(words(3), [0])], [(words(1), [1, 1])]]
    masked = torch.rand(4, max(map(len, prompts))) < 0.3
    masked[:, 0] = False
    for row, prompt in zip(masked, prompts):
        row[len(prompt) :] = False

    def draw(room):
        """All answers as lists, and the numbers of prompts that were prefilled together."""
        how = {"given": given, "masked": masked, "room": room}
        how["image_sizes"] = torch.tensor(sizes) if tiled else None
        samples = sampling.sample(model, prompts, pixels, 2, 5, 0, **how)
        return [[t.tolist() for t in row] for row in samples.tokens], samples.log_probs

    together, log_probs = draw(2**40)
    alone, alone_log_probs = draw(0)
    assert [len(row) for row in together] == [4, 2, 2, 4]
    assert together == alone
    for row, other in zip(log_probs, alone_log_probs):
        for a, b in zip(row, other):
            assert torch.allclose(a, b, atol=1e-4)


# ---- what is documented

NEEDS = {  # flags without which a script refuses to run on a model
    "ppo": ["--reward-model", "oracle"],
    "reward_model": ["--no-facts"],
    "sft": ["--lora-rank", "128"],  # whole, a 7B does not fit 80 GB
}


def defaults(monkeypatch, name, *more):
    """The flags of a script with --model."""
    script = importlib.import_module(name)
    needs = NEEDS.get(name, [])
    monkeypatch.setattr(sys, "argv", [name, "--model", "m", "--data", "d.json", *needs, *more])
    return script.parse()


@pytest.mark.parametrize(
    "name", "sft dpo mpo mdpo online_dpo bdhs povid reward_model ppo grpo".split()
)
def test_no_default_needs_more_than_80_gb(monkeypatch, name):
    """LLaVA-NeXT-7B with its largest picture, 2,928 tokens, and long answers; 79 GiB are free."""
    args = defaults(monkeypatch, name)
    model = fits.shapes("next")
    assert model.anyres.tokens((672, 672)) == 2928
    answers = {"ppo": [896], "grpo": [512] * 8, "online_dpo": [256, 256], "bdhs": [300] * 3}.get(
        name, [300, 300]
    )
    load = memory.Load(args.batch_size, 45 + 2928 + sum(answers), 2973, sum(answers), 5)
    plans = {"ppo": memory.Plan(trained=2, frozen=1), "mdpo": memory.Plan(views=2)}
    plan = plans.get(name, memory.Plan())
    said = memory.says(model, args, load, "cuda", 79 * memory.GIB, plan)
    assert said.endswith("cuda has 79.0 GiB free")


def test_the_table_counts_the_scripts_defaults(monkeypatch):
    """Batches and ranks of the documented runs are those of the scripts with the documented flags."""
    seen = 0
    for run in fits.RUNS:
        what = run.what if run.what != "the same" else what  # noqa: F821 - the row above
        name, *online = re.match(r"`(\w+)\.py(?: (--online))?`", what).groups()
        if name.startswith("eval"):
            continue
        flags = run.flags.split() + [flag for flag in online if flag]
        args = defaults(monkeypatch, name, *flags)
        assert run.batch == (args.batch_size, args.grad_accum)
        assert (run.rank, run.checkpointing) == (args.lora_rank, args.gradient_checkpointing)
        assert run.projector_lr == args.projector_lr
        assert run.plan.new == (args.max_new_tokens if run.plan.k else 0)
        seen += 1
    assert seen == len(fits.RUNS) - 2


def test_lines_of_the_table():
    """A measured row beside its count; each card holds its run with 5 % and 1 GiB to spare."""
    lines = fits.lines(CELLS)
    first = lines[0]
    cell = next(c for c in CELLS if c["cell"] == "step/1.5/b4")
    assert first[4] == f"{cell['peak_gib']:.1f}"
    assert first[5] == f"{5733 * 3 / 4 * cell['seconds'][0] / 60:.0f}"
    assert all(float(line[3]) * 1.05 < int(line[2].split()[0]) - 1 for line in lines)
    assert not any(line[5] for line in lines if not line[4])
    model = fits.shapes("1.5")
    trained = memory.lora_numbers(model, 128) + memory.numbers(model.projector)
    alone = fits.need(fits.RUNS[0]._replace(batch=(4, 1)), model)
    assert fits.need(fits.RUNS[0], model) - alone == 4 * trained


def test_a_34b_annotator_takes_65_gib():
    """As judge.py and results/README.md say: LLaVA-1.6-34B, a Yi of 34.4 billion weights."""
    sizes = {"hidden_size": 7168, "intermediate_size": 20480, "num_hidden_layers": 60}
    sizes |= {"num_attention_heads": 56, "num_key_value_heads": 8, "vocab_size": 64064}
    assert memory.numbers(fits.shapes("next", sizes)) * 2 / memory.GIB == pytest.approx(65, abs=0.5)


# ---- what a trainer prints


@pytest.mark.parametrize(
    "name", "sft dpo mpo mdpo online_dpo bdhs povid reward_model ppo grpo".split()
)
def test_every_trainer_says_it_before_it_reads_weights(name):
    """`training.show_memory` stands before the first `load` or `make` of a model."""
    text = (ROOT / f"{name}.py").read_text()
    body = text[text.index("\ndef main():") :]
    first = min(body.index(call) for call in ("checkpoints.load(", "judge.make(") if call in body)
    assert 0 < body.index("training.show_memory(") < first


def test_show_memory_takes_the_longest_row(checkpoint, capsys, monkeypatch):
    """Tokens of the longest pair times the batch; of drawn answers `new` each; no weight is read."""
    record = lambda i, *answers: Record(f"a.json, row {i}", None, ("What is it?",), answers)
    rows = dataset.Rows([record(0, "A cup.", "No."), record(1, "A red cup. " * 9, "A dog." * 9)])
    _, processor = checkpoints.load(checkpoint, device="meta")
    example = processor.encode(rows.records[1])
    length = len(example.prompt) + sum(map(len, example.answers))
    read = []
    monkeypatch.setattr(checkpoints, "fill", lambda *_: read.append("weights"))
    args = flags(model=str(checkpoint), template=None, batch_size=2)
    say = lambda **how: (
        training.show_memory(args, torch.device("cpu"), torch.float32, rows, **how)
        or capsys.readouterr().err
    )
    said = say()
    assert said.startswith("memory: 0.0 GiB at the peak (weights 0.0") and not read
    assert f"2 x {length} tokens); cpu has " in said and said.count("\n") == 1
    assert f"2 x {len(example.prompt) + 2 * 50} tokens" in say(
        drawn=2, plan=memory.Plan(k=2, new=50)
    )
    twice = lambda _, examples: [replace(e, answers=e.answers * 2) for e in examples]
    assert f"2 x {2 * length - len(example.prompt)} tokens" in say(packed=twice)
    assert "annotator" not in said and "annotator" in say(beside=[str(checkpoint)])
    args.batch_size = 100  # more than there are rows
    assert f"2 x {length} tokens" in say()


def test_sampling_by_hand(shapes):
    """PPO's 896 tokens for 64 prompts: embeddings, 512 KiB a token and a layer's keys twice, logits."""
    model, _ = shapes
    assert memory.cache_bytes(model) == 2 * 32 * 4096 * 2
    cache = 64 * (621 + 896) * 512 * 1024
    logits = 64 * 32064 * (4 * 4 + 2)
    by_hand = 64 * 621 * 4096 * 2 + cache + cache / 64 + logits
    assert memory.sampling(model, 64, 64, 621, 896) == pytest.approx(by_hand, rel=1e-9)
