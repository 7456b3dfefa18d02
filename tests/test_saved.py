"""What is written holds what was trained, says under which conditions, and is checked when it is read."""

import json
import shutil
import stat
import warnings
from argparse import Namespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import evaluation
import training
from common import BadInput
from formats import adapters, checkpoints
from formats.adapters import as_trained, load_adapter, save_adapter
from lora import add_adapter


@pytest.fixture
def small_update(checkpoint):
    """(model, processor) in bfloat16. LoRA adds .001 or .004 to weights of .5 in one layer, nothing elsewhere.

    bfloat16 has steps of 2^-8 = .0039 there: .501 becomes .5, and .504 becomes .5039.
    """
    model, processor = checkpoints.load(checkpoint, torch.bfloat16)
    model.prepare(lora_rank=1, projector=False)
    layer = model.llm.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.base.weight.fill_(0.5)
        layer.adapters["policy"].lora_A.fill_(1.0)
        layer.adapters["policy"].lora_B[::2] = 0.0005  # times alpha / rank = 2
        layer.adapters["policy"].lora_B[1::2] = 0.002
    return model, processor


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change(file, **tensors):
    """Replace tensors of a safetensors file; None removes one."""
    whole = load_file(file) | tensors
    save_file({k: v for k, v in whole.items() if v is not None}, file, metadata={"format": "pt"})


# ---- nothing trained is lost


def test_a_merged_layer_is_written_in_float32(small_update, tmp_path, capsys):
    """And who reads it in bfloat16 is told the share that is left: .00390625 x .004 / (.001^2 + .004^2) = .919."""
    checkpoints.save(*small_update, tmp_path / "m")
    assert "bfloat16 would keep 92% of LoRA's update" in capsys.readouterr().err
    merged = checkpoints.load(tmp_path / "m")[0].llm.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(merged[::2], torch.full_like(merged[::2], 0.501))
    torch.testing.assert_close(merged[1::2], torch.full_like(merged[1::2], 0.504))
    assert not capsys.readouterr().err

    tensors = load_file(tmp_path / "m" / "model.safetensors")
    wide = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert len(wide) == 14 and all("_proj." in name and "layers" in name for name in wide)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "m")
    assert {p.dtype for p in theirs.parameters()} == {torch.float32}, "transformers would round"

    checkpoints.load(tmp_path / "m", torch.bfloat16)
    assert "bfloat16 keeps 92% of what its LoRA learned" in capsys.readouterr().err


def test_what_trained_whole_is_written_in_float32(checkpoint, tmp_path):
    """--lora-rank 0: .501 comes back as .501; the tower, which is frozen, stays bfloat16."""
    model, processor = checkpoints.load(checkpoint, torch.bfloat16)
    model.prepare()
    with torch.no_grad():
        model.llm.model.norm.weight.fill_(0.501)
        model.projector.linear_2.bias.fill_(0.501)
    checkpoints.save(model, processor, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for name in ("language_model.model.norm.weight", "multi_modal_projector.linear_2.bias"):
        assert (tensors[name] == torch.tensor(0.501)).all()
    tower = {t.dtype for name, t in tensors.items() if name.startswith("vision_tower.")}
    assert tower == {torch.bfloat16}


# ---- the conditions of an adapter


@pytest.fixture
def trained(checkpoint, tmp_path):
    """(folder of an adapter trained with template plain and centre crop, its merged model/)."""
    model, processor = checkpoints.load(checkpoint, template="plain", image_aspect="checkpoint")
    model.prepare(lora_rank=2)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn_like(p) * 0.01)
    save_adapter(model, tmp_path / "run" / "adapter", checkpoint, processor=processor)
    checkpoints.save(model, processor, tmp_path / "run" / "model")
    return tmp_path / "run" / "adapter", tmp_path / "run" / "model"


def test_an_adapter_says_what_it_was_trained_with(trained, checkpoint):
    base = adapters.base_hash(checkpoints.load(checkpoint)[0])
    assert json.loads((trained[0] / "alignment.json").read_text()) == {
        "base_name": str(checkpoint),
        "base": base,
        "dtype": "float32",
        "quantize": "none",
        "template": "plain",
        "image_aspect": "checkpoint",
    }


@pytest.mark.parametrize("given", [(None, None, None), ("plain", "checkpoint", "none")])
def test_an_adapter_brings_its_conditions(trained, checkpoint, given):
    assert as_trained(trained[0], *given) == ("plain", "checkpoint", "none")
    assert as_trained(None, *given) == given


def test_another_dtype_is_told(trained, checkpoint, capsys):
    for dtype, said in ((torch.float32, False), (torch.bfloat16, True)):
        adapters.load_adapter(checkpoints.load(checkpoint, dtype)[0], trained[0])
        what = "trained with --dtype float32, used with bfloat16"
        assert (what in capsys.readouterr().err) == said


@pytest.mark.parametrize(
    "given, message",
    [
        (("vicuna_v1", None), "--template vicuna_v1: .* trained with plain"),
        ((None, "pad"), "--image-aspect pad: .* trained with checkpoint"),
        ((None, None, "nf4"), "--quantize nf4: .* trained with none"),
    ],
)
def test_other_conditions_are_refused(trained, given, message):
    with pytest.raises(BadInput, match=message):
        as_trained(trained[0], *given)


def test_an_evaluation_asks_as_trained(trained, checkpoint):
    """Without the flags, template and aspect are the adapter's; the checkpoint's own would be others."""
    args = {"model": str(checkpoint), "adapter": str(trained[0]), "device": "cpu"}
    args |= {
        "dtype": "float32",
        "template": None,
        "image_aspect": None,
        "quantize": None,
        "attributes": None,
        "out": None,
    }
    _, processor = evaluation.load(Namespace(**args))
    assert (processor.template, processor.image_aspect) == ("plain", "checkpoint")
    _, processor = evaluation.load(Namespace(**args | {"adapter": None}))
    assert (processor.template, processor.image_aspect) == ("vicuna_v1", "pad")


def test_a_model_is_asked_as_trained(trained):
    """model/ too remembers both; flags that are given win."""
    _, processor = checkpoints.load(trained[1])
    assert (processor.template, processor.image_aspect) == ("plain", "checkpoint")
    _, processor = checkpoints.load(trained[1], template="vicuna_v1", image_aspect="pad")
    assert (processor.template, processor.image_aspect) == ("vicuna_v1", "pad")


def test_an_adapter_on_another_base_is_refused(trained, checkpoint, tmp_path):
    """On its own merged model it would count twice."""
    adapter, model = trained
    load_adapter(checkpoints.load(checkpoint)[0], adapter)
    load_adapter(checkpoints.load(checkpoint, torch.bfloat16)[0], adapter)
    with pytest.raises(BadInput, match=f"trained on {checkpoint} .* A merged model/ needs no"):
        load_adapter(checkpoints.load(model)[0], adapter)
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    name = "language_model.model.norm.weight"
    change(other / "model.safetensors", **{name: torch.full((64,), 0.75)})
    with pytest.raises(BadInput, match="the model that is loaded is another"):
        load_adapter(checkpoints.load(other)[0], adapter)


def test_an_adapter_of_peft_says_nothing(trained, checkpoint, capsys):
    """Taken on any base, and told: nobody can know whether it is its own."""
    adapter, model = trained
    load_adapter(checkpoints.load(checkpoint)[0], adapter)
    assert "alignment.json" not in capsys.readouterr().err
    (adapter / "alignment.json").unlink()
    assert as_trained(adapter, "mistral", None) == ("mistral", None, None)
    load_adapter(checkpoints.load(model)[0], adapter)
    told = f"whether this is its base cannot be checked; adapter_config.json names {str(checkpoint)!r:.80}"
    assert told in capsys.readouterr().err


# ---- values that cannot be right


@pytest.mark.parametrize(
    "value, message",
    [
        (float("nan"), "NaN or infinity in 1 of 64 places"),
        (float("inf"), "NaN or infinity in 1 of 64"),
        (-float("inf"), "NaN or infinity in 1 of 64"),
        (torch.int32, "stored as int32; accepted are float32, bfloat16"),
        (torch.float8_e4m3fn, "stored as float8_e4m3fn"),
    ],
)
def test_weights_that_cannot_be_right(checkpoint, tmp_path, value, message):
    folder, name = tmp_path / "m", "language_model.model.norm.weight"
    shutil.copytree(checkpoint, folder)
    tensor = load_file(folder / "model.safetensors")[name]
    if isinstance(value, float):
        tensor[5] = value
    else:
        tensor = tensor.to(value)
    change(folder / "model.safetensors", **{name: tensor})
    with pytest.raises(BadInput, match=f"model.safetensors: {name} .*{message}"):
        checkpoints.load(folder)


def test_an_adapter_that_cannot_be_right(trained, checkpoint, tmp_path):
    """NaN in LoRA, no tensor at all, a factor of NaN or 0."""
    base = lambda: checkpoints.load(checkpoint)[0]
    for alpha in (float("nan"), float("inf"), 0, -4):
        folder = tmp_path / f"alpha {alpha}"
        shutil.copytree(trained[0], folder)
        edit(folder / "adapter_config.json", lora_alpha=alpha)
        with pytest.raises(BadInput, match=f"lora_alpha {alpha}"):
            load_adapter(base(), folder)

    file = trained[0] / "adapter_model.safetensors"
    whole = load_file(file)
    name = "layers.0.self_attn.q_proj.lora_B.weight"
    bad = {k: torch.full_like(v, float("nan")) for k, v in whole.items() if k.endswith(name)}
    assert len(bad) == 2, "under both names"
    change(file, **bad)
    with pytest.raises(BadInput, match=r"q_proj.lora_B.weight has NaN"):
        load_adapter(base(), trained[0])
    save_file({}, file)
    with pytest.raises(BadInput, match="holds no tensor"):
        load_adapter(base(), trained[0])


# ---- what other tools read


def test_lora_is_written_under_both_names(trained, checkpoint):
    """Old and new versions of transformers and PEFT look for one of them each; a pair that disagrees is refused."""
    file = trained[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    hub = {k: v for k, v in tensors.items() if not k.startswith("base_model.model.model.")}
    assert len(tensors) == 2 * len(hub) == 2 * (28 + 4)
    for name, tensor in hub.items():
        new = name.replace("base_model.model.", "base_model.model.model.")
        new = new.replace("language_model.model.", "language_model.")
        assert torch.equal(tensors[new], tensor)
    one = next(iter(hub))
    change(file, **{one: hub[one] + 1})
    with pytest.raises(BadInput, match="there twice, under two names, with unequal values"):
        load_adapter(checkpoints.load(checkpoint)[0], trained[0])


def test_files_are_open_to_others(trained, checkpoint, tmp_path):
    """Another user's server reads them: every file has the mode that the umask leaves."""
    model, _ = checkpoints.load(checkpoint)
    model.prepare(llm=False, projector=False)
    add_adapter(model.llm, "reward", 2)
    model.add_head("reward")
    adapters.save_reward(model, tmp_path / "reward", checkpoint, {})
    (tmp_path / "plain").touch()
    want = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    folders = (*trained, tmp_path / "reward")
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    assert sum(p.suffix == ".safetensors" for p in files) == 4
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {want}


def test_old_names_of_special_tokens(checkpoint, tmp_path):
    """transformers 4.47 to 4.57 stop at a list under the new name; `<image>` stays one token."""
    model, processor = checkpoints.load(checkpoint)
    processor.tokenizer.add_special_tokens({"extra_special_tokens": ["<more>"]})
    checkpoints.save(model, processor, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert "<more>" in config["additional_special_tokens"] and "extra_special_tokens" not in config
    assert config["split_special_tokens"] is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert again.encode("<more>", add_special_tokens=False) == [again.get_vocab()["<more>"]]
    assert "<more>" in again.all_special_tokens


# ---- what was given is not what was meant


@pytest.fixture
def run_folder(trained, tmp_path):
    (tmp_path / "run" / "args.json").write_text("{}")
    return tmp_path / "run"


def test_an_adapter_where_a_model_is_needed(run_folder, checkpoint):
    """And a run folder; the message says what it is, its base, and what to give instead."""
    for name, message in (
        (run_folder / "adapter", f"an adapter, where a whole model .* its base is {checkpoint}"),
        (run_folder, rf"folder of a run, .* {run_folder}/model and {run_folder}/adapter"),
        (run_folder.parent, "no config.json there; the folder of a model is needed"),
    ):
        with pytest.raises(BadInput, match=message):
            checkpoints.load(name)
        with pytest.raises(BadInput, match=message):
            checkpoints.compose(name, name)


def test_something_else_where_an_adapter_is_needed(run_folder, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (
        (run_folder, f"the folder of a run; its adapter is {run_folder}/adapter"),
        (checkpoint, "a model; an adapter .* is needed here"),
        (tmp_path / "empty", "no adapter_config.json there"),
        (tmp_path / "nowhere", "no such folder; a folder or a hub id"),
    ):
        with pytest.raises(BadInput, match=message):
            load_adapter(checkpoints.load(checkpoint)[0], name)
        with pytest.raises(BadInput, match=message):
            as_trained(name)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:7\nsize 123456\n"


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_clone_without_git_lfs(checkpoint, tmp_path, file):
    shutil.copytree(checkpoint, tmp_path / "m")
    (tmp_path / "m" / file).write_text(POINTER)
    with pytest.raises(BadInput, match=f"{file}: a git-lfs pointer, .* `git lfs pull`"):
        checkpoints.load(tmp_path / "m")


def test_a_tokenizer_without_an_end(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "m")
    edit(tmp_path / "m" / "tokenizer_config.json", eos_token=None)
    with pytest.raises(BadInput, match="eos_token is None; a token that ends an answer is needed"):
        checkpoints.load(tmp_path / "m")


def test_a_composed_base_is_kept(llava, tmp_path):
    """LoRA on a base that is on no disk: an adapter alone would be of no use, so model/ is written too."""
    args = Namespace(resume=False, lora_rank=2, lr=1e-3, merge=False, model=None)
    model, processor = llava
    model.prepare(lora_rank=2)
    training.save_result(tmp_path, model, processor, args)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model"]
    checkpoints.load(tmp_path / "model")
