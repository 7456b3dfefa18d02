"""nf4.py: codes and values against QLoRA's formula, a worked example, bitsandbytes and torchao; a 4-bit model against one
whose weights are what the 4 bits stand for; what loading, saving and the scripts do with it."""

import ast
import copy
import importlib.util
import json
import shutil
import weakref
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from test_dpo import ROOT, metrics, world  # noqa: F401
from test_llava_next import original_config, original_model, write_original
from test_model import IMAGE, ids, perturb, pixels, prompts
from torch import nn

import dpo
import evaluation
import judge
import nf4
import sample
import sft
import training
from common import BadInput
from data import Record
from formats import adapters, checkpoints
from lora import LoRALinear, add_adapter
from model import pack
from nf4 import NF4Linear
from sampling import generate

TRAINERS = "dpo mpo mdpo online_dpo bdhs povid reward_model ppo grpo sft".split()
# (out, in): whole blocks; a short last block; rows that are no multiple of a block; an odd number of weights
SHAPES = [(64, 192), (33, 50), (70, 100), (7, 9)]


def linear(out, into, dtype=torch.float32, bias=False):
    """A linear layer with weights as an LLM has them."""
    layer = nn.Linear(into, out, bias, dtype=dtype)
    nn.init.normal_(layer.weight, std=0.02)
    return layer.requires_grad_(False)


def quantise(layer):
    return NF4Linear(layer).copy_(layer.weight)


def plain(model):
    """A copy of the model whose 4-bit layers are linear layers with the weights that they stand for."""
    model = copy.deepcopy(model)
    for parent, name, layer in nf4.linears(model.llm):
        new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        new.weight = nn.Parameter(layer.dequantise(), requires_grad=False)
        new.bias = layer.bias
        setattr(parent, name, new)
    return model


@pytest.fixture
def pair(build):
    """(a model with a 4-bit base, the same model with the weights that it stands for)."""
    model = build("qwen2")  # it has biases
    nf4.quantise_linears(model.llm)
    return model, plain(model)


def answers(model):
    """Two answers to each of `prompts`, two of which show a picture."""
    torch.manual_seed(1)
    asked = [p.where(p != IMAGE, model.image_token_id) for p in prompts()]
    return pack(asked, [[ids(4), ids(2)] for _ in asked], pixel_values=pixels())


# ---- codes and values


def test_levels_are_the_quantiles_of_a_normal():
    """QLoRA, appendix E, in float64: 8 from 1 - delta to 1/2 for one sign, 9 for the other, over the last."""
    delta = 1 - 0.9677083
    at = lambda n: torch.special.ndtri(torch.linspace(1 - delta, 0.5, n, dtype=torch.float64))
    levels = torch.cat([-at(8)[:-1], at(9)]).sort().values
    want = levels / levels[-1]
    assert torch.allclose(torch.tensor(nf4.LEVELS, dtype=torch.float64), want, atol=2e-7, rtol=0)


def test_by_hand():
    """Two blocks with absmax 1 and 3: mean 2, largest difference 1, and -1 has no level of its own: -.9929688 is next.

    Of the first block 1, -.7, .03 and .24 are nearest to levels 15, 1 (-.696), 7 (0) and 10 (.246); the rest is 0.
    """
    layer = nn.Linear(64, 2, bias=False)
    weight = torch.zeros(2, 64)
    weight[0, :4] = torch.tensor([1.0, -0.7, 0.03, 0.24])
    weight[1, 63] = -3.0
    quantised = NF4Linear(layer).copy_(weight)
    assert quantised.codes[:3].tolist() == [15 * 16 + 1, 7 * 16 + 10, 7 * 16 + 7]
    assert quantised.codes[-1] == 7 * 16 + 0
    assert quantised.offset.tolist() == [2.0] and quantised.scales.tolist() == [1.0]
    assert quantised.absmax.tolist() == [0, 255]
    got = quantised.dequantise()
    low = 2 - 0.9929688
    want = torch.tensor([1.0, -0.6961928, 0.0, 0.2461123]) * low
    assert torch.allclose(got[0, :4], want, atol=1e-6) and got[0, 4:].abs().max() == 0
    assert got[1, 63] == -3.0 and got[1, :63].abs().max() == 0


def test_a_middle_belongs_to_the_lower_level_and_zeros_stay():
    codes, largest = nf4.nearest(torch.tensor([2.0, 0.5, -1.0]), torch.tensor([0.0, 0.5, 1.0]), 2)
    assert codes.tolist() == [2, 0, 0] and largest.tolist() == [2.0, 1.0]
    torch.manual_seed(0)
    some = linear(3, 64)
    some.weight[1] = 0  # double quantization gives this block an absmax that is not 0
    got = quantise(some).dequantise()
    assert got[1].abs().max() == 0 and (got[[0, 2]] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 192), (33, 50), (512, 1024)])
def test_bitsandbytes_has_the_same_bits(shape, dtype):
    """Its CPU kernel looks absmax up in a coarse table and misses the nearest level in .2 %: its slow path does not."""
    theirs = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    layer = linear(*shape, dtype)
    ours = quantise(layer)
    packed, state = theirs.quantize_4bit(
        layer.weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    assert torch.equal(ours.codes, packed.flatten())
    assert torch.equal(ours.scales, state.state2.absmax)
    assert torch.equal(ours.offset[0], state.offset)

    _, absmax = theirs.quantize_4bit(layer.weight, blocksize=64, quant_type="nf4")
    difference = (absmax.absmax - state.offset).double()  # float64 takes the slow path
    slow = torch.ops.bitsandbytes.quantize_blockwise.default
    codes, _ = slow(difference, theirs.create_dynamic_map(), 256)
    assert torch.equal(ours.absmax, codes)

    state.absmax = codes
    assert torch.equal(ours.dequantise(), theirs.dequantize_4bit(packed, state))


def test_torchao_is_one_rounding_away():
    """It rounds the levels to four digits and absmax to 8 bits in even steps.

    torchao 0.18 agreed. It is no test dependency: where it is installed, transformers loads it, and it fills stderr.
    """
    if not importlib.util.find_spec("torchao"):
        pytest.skip("torchao is not installed")
    from torchao.quantization import NF4Tensor as theirs

    torch.manual_seed(0)
    layer = linear(512, 1024)
    ours, other = quantise(layer), theirs.from_tensor(layer.weight, 64, 256)
    same = ours.codes == other.quantized_data
    assert same.float().mean() > 0.999  # others lie between the middles of the two tables

    absmax = layer.weight.view(-1, 64).abs().amax(1)
    scales = ours.scales.repeat_interleave(256)
    # the widest steps: 1/64 of the largest difference here, 1/128 there
    step = (scales / 64 + scales / 128).repeat_interleave(32)
    bound = 5e-5 * absmax.repeat_interleave(32) * 1.1 + step
    error = (ours.dequantise() - other.get_original_weight()).abs().view(-1, 2).amax(1)
    assert (error <= bound)[same].all()


@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_near_the_weights(shape):
    """Half the widest gap of the levels, .1519, times absmax, and the rounding of absmax."""
    torch.manual_seed(0)
    layer = linear(*shape)
    quantised = quantise(layer)
    flat = F.pad(layer.weight.flatten(), (0, -layer.weight.numel() % 64)).view(-1, 64)
    absmax = flat.abs().amax(1, keepdim=True)
    bound = 0.152 * absmax + (absmax - absmax.mean()).abs().max() / 64
    bound = bound.expand(-1, 64).flatten()[: layer.weight.numel()].view(shape)
    error = (quantised.dequantise() - layer.weight).abs()
    assert (error <= bound).all() and error.max() > 0


def test_bytes():
    """Of a LLaMA-7B's matrix: 4 bits, 8 / 64 for absmax, 32 / 16384 for its scale; and the mean."""
    with torch.device("meta"):
        layer = NF4Linear(nn.Linear(4096, 11008, bias=False))
    tensors = layer.state_dict().values()
    n = 4096 * 11008
    assert sum(t.nbytes for t in tensors) == n // 2 + n // 64 + 4 * n // 16384 + 4
    assert nf4.BITS_PER_WEIGHT == pytest.approx(4.12695, abs=1e-5)
    assert not list(layer.parameters())


# ---- forward and backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradient(shape, dtype):
    torch.manual_seed(0)
    layer = linear(*shape, dtype, bias=True)
    quantised = quantise(layer)
    whole = nn.Linear(shape[1], shape[0], dtype=dtype)
    whole.weight, whole.bias = nn.Parameter(quantised.dequantise()), layer.bias
    assert whole.weight.dtype == dtype

    x = torch.randn(5, shape[1], dtype=dtype)
    got, want = x.clone().requires_grad_(), x.requires_grad_()
    y, z = quantised(got), whole(want)
    assert torch.equal(y, z)
    slope = torch.randn_like(y)
    y.backward(slope)
    z.backward(slope)
    assert torch.equal(got.grad, want.grad)


def test_autocast_is_that_of_a_linear_layer():
    """A float32 input in a bfloat16 model, as `MLLM.autocast` makes it."""
    layer = linear(64, 96, torch.bfloat16)
    quantised = quantise(layer)
    whole = linear(64, 96, torch.bfloat16)
    whole.weight = nn.Parameter(quantised.dequantise(), requires_grad=False)
    results = []
    for m in (quantised, whole):
        x = torch.linspace(-1, 1, 96).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = m(x[None])
        y.float().square().sum().backward()
        results.append((y, x.grad))
    (y, g), (z, h) = results
    assert y.dtype == z.dtype == torch.bfloat16 and torch.equal(y, z)
    assert g.dtype == h.dtype == torch.float32 and torch.equal(g, h)


def test_nothing_is_kept_for_the_backward_pass():
    kept = []
    keep = lambda tensor: kept.append(tensor.nbytes) or tensor
    x = torch.randn(3, 64, requires_grad=True)
    layer = linear(96, 64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
        assert sum(kept) == 4 * 96 * 64
        kept.clear()
        quantise(layer)(x)
        assert kept == []


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_that_of_the_values(pair, checkpointing):
    """Loss and gradients of LoRA and projector; a model that trains LoRA alone through its first layer too."""
    results = []
    for model in pair:
        torch.manual_seed(0)
        model.prepare(2, gradient_checkpointing=checkpointing).train()
        perturb(model)
        model.answer_log_probs(answers(model)).square().sum().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    got, want = results
    assert got.keys() == want.keys() and any("lora_A" in name for name in got)
    for name in got:
        assert torch.equal(got[name], want[name]), name
        assert want[name].abs().max() > 0


def test_adapters_of_ppo(pair):
    """Policy, value and reward on one 4-bit base; each acts alone, and the reference is the base."""
    results = []
    for model in pair:
        torch.manual_seed(0)
        start = model.answer_log_probs(answers(model)).detach()
        model.prepare(2, projector=False)
        for name in ("value", "reward"):
            add_adapter(model.llm, name, 3)
            model.add_head(name)
        perturb(model)
        batch, seen = answers(model), {}
        for name in ("policy", "value", "reward"):
            with model.use(name), torch.no_grad():
                seen[name] = model.hidden_states(batch, batch.index)
        with model.reference(), torch.no_grad():
            assert torch.equal(model.answer_log_probs(batch), start)
        assert not torch.equal(model.answer_log_probs(batch), start)
        results.append(seen)
    got, want = results
    for name in got:
        assert torch.equal(got[name], want[name])
    assert not torch.equal(got["policy"], got["value"])


def test_greedy_answers(llava):
    model, processor = llava
    nf4.quantise_linears(model.llm)
    other = plain(model)
    records = [Record(f"row {i}", None, (f"What is it? {i}",)) for i in range(3)]
    how = dict(max_new_tokens=12, temperature=0.0, k=1, batch_size=2, seed=0)
    got = generate(model, processor, records, **how)
    assert got == generate(other, processor, records, **how)
    assert any(text for texts in got for text in texts)


# ---- reading and writing


def test_loading_quantises(checkpoint, capsys):
    """Every layer of the blocks and no other, from the values in the file, whatever the dtype."""
    model, _ = checkpoints.load(checkpoint, quantize="nf4")
    assert "weights of the LLM's blocks take 0.5" in capsys.readouterr().err
    want, _ = checkpoints.load(checkpoint)
    assert capsys.readouterr().err == ""
    nf4.quantise_linears(want.llm)
    layers = [n for n, m in model.named_modules() if isinstance(m, NF4Linear)]
    assert len(layers) == 2 * 7 and all(n.startswith("llm.model.layers.") for n in layers)
    half, _ = checkpoints.load(checkpoint, torch.bfloat16, quantize="nf4")
    assert half.dtype == torch.bfloat16
    for name, tensor in want.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
        assert torch.equal(
            half.state_dict()[name].float(), tensor.to(half.state_dict()[name]).float()
        )
    for _, _, layer in nf4.linears(half.llm):
        assert layer.dequantise().dtype == torch.bfloat16


def test_loading_holds_one_whole_layer_at_a_time(checkpoint, monkeypatch):
    """When a layer is born quantised, the whole ones before it are gone."""
    born, alive = [], []
    first = NF4Linear.__init__

    def init(self, layer):
        alive.append(sum(ref() is not None for ref in born))
        born.append(weakref.ref(layer.weight))
        first(self, layer)

    monkeypatch.setattr(NF4Linear, "__init__", init)
    checkpoints.load(checkpoint, quantize="nf4")
    assert len(alive) == 2 * 7 and max(alive) == 0
    assert not any(ref() is not None for ref in born)


def test_names_are_those_of_plain_layers(pair):
    """So every layout of checkpoints fits, biases included; a 4-bit layer stands for its weight."""
    model, other = pair
    got, want = nf4.slots(model), other.state_dict()
    assert got.keys() == want.keys()
    for name, slot in got.items():
        assert slot.shape == want[name].shape
        in_block = ".layers." in name and name.startswith("llm.") and name.endswith("proj.weight")
        assert isinstance(slot, NF4Linear) is in_block


def test_an_original_llava_in_4_bits(tmp_path):
    folder = write_original(
        tmp_path / "llava", original_model(False), tmp_path / "clip", ("tower", "llm", "projector")
    )
    model, _ = checkpoints.load(folder, quantize="nf4")
    want, _ = checkpoints.load(folder)
    nf4.quantise_linears(want.llm)
    for name, tensor in want.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_loading_reads_no_weight_on_meta(checkpoint):
    model, _ = checkpoints.load(checkpoint, device="meta", quantize="nf4")
    assert all(t.is_meta for t in model.state_dict().values())
    assert nf4.quantised(model) == "nf4"


def test_a_whole_model_holds_the_merged_values(checkpoint, tmp_path, capsys):
    """LoRA in the base that it was trained on; the file is a plain one."""
    model, processor = checkpoints.load(checkpoint, quantize="nf4")
    model.prepare(2)
    perturb(model)
    want = model.answer_log_probs(answers(model))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    with pytest.raises(BadInput, match="4-bit weights would round LoRA away"):
        adapters.merge(model)
    checkpoints.save(model, processor, tmp_path / "whole")
    assert "4-bit weights are written as what they stand for" in capsys.readouterr().err

    with safe_open(tmp_path / "whole" / "model.safetensors", "pt") as f:
        for name, m in layers.items():
            lora = m.adapters["policy"]
            value = m.base.dequantise() + lora.scale * (lora.lora_B @ lora.lora_A)
            assert torch.equal(f.get_tensor(f"language_model.{name[4:]}.weight"), value)
    again, _ = checkpoints.load(tmp_path / "whole")
    assert torch.allclose(again.answer_log_probs(answers(again)), want, atol=1e-4)


def test_an_adapter_belongs_to_its_4_bit_base(checkpoint, tmp_path):
    """It says so; an evaluation without --quantize follows it; another base is refused, both ways."""
    folder = tmp_path / "adapter"
    model, _ = checkpoints.load(checkpoint, quantize="nf4")
    model.prepare(2)
    perturb(model)
    adapters.save_adapter(model, folder, checkpoint)
    assert json.loads((folder / "alignment.json").read_text())["quantize"] == "nf4"

    args = Namespace(
        model=str(checkpoint), adapter=str(folder), device="cpu", dtype="float32", attributes=None
    )
    args.template = args.image_aspect = args.quantize = args.out = None
    again, _ = evaluation.load(args)
    want = model.answer_log_probs(answers(model))
    assert torch.equal(again.answer_log_probs(answers(again)), want)
    args.quantize = "none"
    with pytest.raises(BadInput, match="--quantize none: the adapter .* was trained with nf4"):
        evaluation.load(args)

    whole, _ = checkpoints.load(checkpoint)
    said = "trained with --quantize nf4; the model that is loaded has --quantize none"
    with pytest.raises(BadInput, match=said):
        adapters.load_adapter(whole, folder)
    adapters.save_adapter(whole.prepare(2), tmp_path / "whole", checkpoint)
    said = "trained with --quantize none; the model that is loaded has --quantize nf4"
    with pytest.raises(BadInput, match=said):
        adapters.load_adapter(checkpoints.load(checkpoint, quantize="nf4")[0], tmp_path / "whole")


def test_hashes_tell_a_4_bit_base(checkpoint):
    """The same for every dtype, and with an adapter on it; another without the 4 bits or with other codes."""
    load = lambda **how: checkpoints.load(checkpoint, **how)[0]
    model, processor = checkpoints.load(checkpoint, quantize="nf4")
    plain_hash, hash_, print_ = (
        adapters.base_hash(load()),
        adapters.base_hash(model),
        training.fingerprint(model, processor, []),
    )
    assert hash_ != plain_hash and print_ != training.fingerprint(load(), processor, [])
    assert hash_ == adapters.base_hash(load(dtype=torch.bfloat16, quantize="nf4"))
    model.prepare(2, projector=False)
    assert hash_ == adapters.base_hash(model)
    next(m for m in model.modules() if isinstance(m, NF4Linear)).codes[0] ^= 1
    assert hash_ != adapters.base_hash(model)


def test_a_reward_model_belongs_to_its_4_bit_base(checkpoint, tmp_path):
    model, processor = checkpoints.load(checkpoint, quantize="nf4")
    model.prepare(llm=False, projector=False)
    add_adapter(model.llm, "reward", 2)
    model.add_head("reward")
    settings = dict.fromkeys("question facts max_facts held_out".split())
    settings |= {"template": processor.template, "image_aspect": processor.image_aspect}
    adapters.save_reward(model, tmp_path, checkpoint, settings)
    assert json.loads((tmp_path / "reward.json").read_text())["quantize"] == "nf4"
    other, _ = checkpoints.load(checkpoint, quantize="nf4")
    adapters.load_reward(other, tmp_path)
    judge.score_by_reward_model(tmp_path, {})  # as an annotator it brings its own base
    with pytest.raises(BadInput, match="trained with --quantize nf4; the model"):
        adapters.load_reward(checkpoints.load(checkpoint)[0], tmp_path)


# ---- what is refused


def test_a_4_bit_llm_does_not_train_whole(pair):
    with pytest.raises(BadInput, match="4-bit weights do not train: .* needs --lora-rank"):
        pair[0].prepare(0)


@pytest.mark.parametrize("flag", ["--lora-rank", "--lr"])
def test_full_tuning_is_refused(monkeypatch, flag):
    monkeypatch.setattr("sys.argv", ["dpo.py", "--quantize", "nf4", flag, "0"])
    with pytest.raises(BadInput, match=f"{flag} 0.*: 4-bit weights do not train"):
        dpo.parse()


def test_a_new_model_is_not_quantised(monkeypatch):
    monkeypatch.setattr("sys.argv", ["sft.py", "--quantize", "nf4", "--lora-rank", "4"])
    with pytest.raises(BadInput, match="--quantize is for a model that is read; give --model"):
        sft.parse()


@pytest.mark.parametrize("where", ["whole", "llm"])
def test_a_quantised_checkpoint_is_refused(checkpoint, tmp_path, where):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    part = config if where == "whole" else config["text_config"]
    part["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        BadInput, match=r"config.json: quantization_config.*\(bitsandbytes\); accepted"
    ):
        checkpoints.load(folder)


def test_a_quantised_llm_is_not_composed(parts, tmp_path):
    folder = tmp_path / "llm"
    shutil.copytree(parts / "llm", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises(BadInput, match=r"quantization_config.*\(gptq\)"):
        checkpoints.compose(parts / "vision", folder)


def test_lora_of_llava_is_not_merged_into_4_bits(tmp_path):
    theirs = original_model(False)
    base = write_original(tmp_path / "base", theirs, tmp_path / "clip", ("llm",))
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "config.json").write_text(json.dumps(original_config(theirs, tmp_path / "clip")))
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": str(base)}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(base / "model.safetensors", lora / "non_lora_trainables.safetensors")
    with pytest.raises(BadInput, match="LLaVA's own LoRA is merged when it is read"):
        checkpoints.load(lora, quantize="nf4")


def test_an_unknown_layer_is_refused(build):
    model = build()
    attention = model.llm.model.layers[0].self_attn
    attention.qkv_proj = linear(64, 64)
    with pytest.raises(BadInput, match="the layer qkv_proj is unknown; known are q_proj, k_proj"):
        nf4.quantise_linears(model.llm)


# ---- the scripts


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_passes_the_flag_on(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    loads = [ast.unparse(n) for n in calls if ast.unparse(n.func) == "checkpoints.load"]
    assert len(loads) == 1 and loads[0].endswith("args.max_length, args.quantize)")


def test_sample_answers_in_4_bits(checkpoint, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    flags = f"--model {checkpoint} --image {tmp_path / 'a.png'} --max-new-tokens 1 --quantize"
    for value, said in (("nf4", True), ("none", False)):
        monkeypatch.setattr("sys.argv", ["sample.py", *flags.split(), value])
        sample.main()
        assert ("weights of the LLM's blocks take 0.5" in capsys.readouterr().err) is said


def test_a_run(world, checkpoint, monkeypatch, capsys):  # noqa: F811
    """It starts at ln 2, resumes bit for bit, and its merged model answers as its adapter on the 4-bit base."""
    out = world / "nf4"
    flags = "--data povid.json --images images --lora-rank 4 --batch-size 2 --lr 1e-3 --steps 4"
    flags += " --projector-lr 0 --quantize nf4 --save-every 2 --no-eval --merge --out nf4 --model"
    monkeypatch.chdir(world)
    monkeypatch.setattr("sys.argv", ["dpo.py", *flags.split(), str(checkpoint)])
    dpo.main()
    err = capsys.readouterr().err
    assert "weights of the LLM's blocks take 0.5" in err and "4-bit weights are written" in err
    assert metrics(out)[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert json.loads((out / "args.json").read_text())["flags"]["quantize"] == "nf4"

    merged, _ = checkpoints.load(out / "model")
    model, _ = checkpoints.load(checkpoint, quantize="nf4")
    adapters.load_adapter(model, out / "adapter")
    batch = answers(model)
    want = model.answer_log_probs(batch)
    assert torch.allclose(merged.answer_log_probs(batch), want, atol=1e-4)

    before = metrics(out)
    (out / "checkpoints" / "latest").write_text("step-000002")
    monkeypatch.setattr("sys.argv", ["dpo.py", *flags.split(), str(checkpoint), "--resume"])
    dpo.main()
    assert metrics(out) == before and len(before) == 4
