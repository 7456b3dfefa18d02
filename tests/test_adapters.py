"""formats/adapters.py: what an adapter's files say, key by key, and which values of others' files are taken."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from common import MOST, BadInput
from formats import adapters
from lora import add_adapter


@pytest.fixture
def tuned(llava):
    """(model, processor) with LoRA of rank 4 and alpha 6, and a projector that trains."""
    model, processor = llava
    model.prepare(llm=False, projector=True)
    add_adapter(model.llm, "policy", 4, 6)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters_of("policy"):
            p.add_(torch.randn_like(p) * 0.1)
    return model, processor


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def named(path):
    """As the beginning of a pattern."""
    return f"^{re.escape(str(path))}"


# ---- what is written


@pytest.mark.parametrize("alpha, shown", [(6, 6), (3, 3), (5.5, 5.5), (0.1, 0.1)])
def test_the_config_of_an_adapter(llava, tmp_path, alpha, shown):
    """As PEFT 0.10 reads it: whole numbers stay whole."""
    model, _ = llava
    model.prepare(llm=False, projector=False)
    add_adapter(model.llm, "other", 3, alpha)
    adapters.save_adapter(model, tmp_path / "a", "BASE", "other")
    found = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    leaves = "down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj"
    assert found == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "BASE",
        "inference_mode": True,
        "r": 3,
        "lora_alpha": shown,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": rf".*language_model.*\.({leaves})",
        "modules_to_save": None,
    }
    assert type(found["lora_alpha"]) is type(shown)
    assert json.loads((tmp_path / "a" / "alignment.json").read_text()) == {
        "base_name": "BASE",
        "base": adapters.base_hash(model),
        "dtype": "float32",
        "quantize": "none",
    }


def test_the_tensors_of_an_adapter(tuned, tmp_path):
    """Each twice: under the hub's name, and under that in memory since 4.52."""
    model, processor = tuned
    adapters.save_adapter(model, tmp_path / "a", "BASE", processor=processor)
    found = load_file(tmp_path / "a" / "adapter_model.safetensors")
    lora = model.llm.model.layers[1].mlp.up_proj.adapters["policy"]
    for prefix in ("language_model.model", "model.language_model"):
        name = f"base_model.model.{prefix}.layers.1.mlp.up_proj"
        assert torch.equal(found[f"{name}.lora_A.weight"], lora.lora_A)
        assert torch.equal(found[f"{name}.lora_B.weight"], lora.lora_B)
    for prefix in ("", "model."):
        name = f"base_model.model.{prefix}multi_modal_projector.linear_2.bias"
        assert torch.equal(found[name], model.projector.linear_2.bias)
    assert len(found) == 2 * (2 * 7 * 2 + 4)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["multi_modal_projector"]
    conditions = json.loads((tmp_path / "a" / "alignment.json").read_text())
    assert (conditions["template"], conditions["image_aspect"]) == ("vicuna_v1", "pad")


@pytest.mark.parametrize("what", ["no LoRA", "the vision tower trains"])
def test_what_no_adapter_can_hold(llava, tmp_path, what):
    model, _ = llava
    model.prepare(lora_rank=0) if what == "no LoRA" else model.prepare(lora_rank=2, vision=True)
    with pytest.raises(BadInput, match=named(tmp_path / "a") + f": .*{what}, so an adapter cannot"):
        adapters.save_adapter(model, tmp_path / "a", "BASE")


def test_the_files_of_a_reward_model(llava, tmp_path):
    model, _ = llava
    model.prepare(llm=False, projector=False)
    add_adapter(model.llm, "value", 2)
    model.add_head("value")
    with torch.no_grad():
        model.heads["value"].bias.fill_(0.5)
    adapters.save_reward(model, tmp_path / "r", "BASE", {"question": "Q"}, "value")
    assert json.loads((tmp_path / "r" / "reward.json").read_text()) == {
        "base_name": "BASE",
        "base": adapters.base_hash(model),
        "quantize": "none",
        "question": "Q",
    }
    head = load_file(tmp_path / "r" / "head.safetensors")
    assert head.keys() == {"weight", "bias"} and head["bias"].tolist() == [0.5]
    config = json.loads((tmp_path / "r" / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == ("BASE", 2)


# ---- what is read


def test_an_adapter_of_ours_comes_back(tuned, checkpoint, tmp_path, capsys, llava):
    """Nothing is said of it; of one in another dtype, or of another program's, what cannot be known."""
    model, processor = tuned
    adapters.save_adapter(model, tmp_path / "a", "BASE", processor=processor)
    want = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters_of("policy"):
            p.zero_()

    def again():
        from formats import checkpoints

        fresh, _ = checkpoints.load(checkpoint)
        fresh.projector.load_state_dict(model.initial_projector[0].state_dict())
        return fresh

    fresh = again()
    assert adapters.load_adapter(fresh, tmp_path / "a") is fresh
    assert not capsys.readouterr().err
    found = dict(fresh.named_parameters())
    assert all(torch.equal(found[name], p) for name, p in want.items())
    assert {n for n, p in found.items() if p.requires_grad} == {
        n for n in want if ".lora_" in n or n.startswith("projector.")
    }

    edit(tmp_path / "a" / "alignment.json", dtype="bfloat16")
    adapters.load_adapter(again(), tmp_path / "a")
    told = f"{tmp_path}/a: trained with --dtype bfloat16, used with float32: answers may differ\n"
    assert capsys.readouterr().err == told
    (tmp_path / "a" / "alignment.json").unlink()
    adapters.load_adapter(again(), tmp_path / "a")
    told = f"{tmp_path}/a: no alignment.json, so whether this is its base cannot be checked; "
    assert capsys.readouterr().err == told + "adapter_config.json names 'BASE'\n"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"peft_type": "LOHA"}, r"peft_type 'LOHA', r 4, lora_alpha 6; plain LoRA, with a rank"),
        *(({"r": r}, f"peft_type 'LORA', r {r!r}, lora_alpha 6;") for r in (0, -1, None, True, 4.0)),
        *(({"lora_alpha": a}, f"r 4, lora_alpha {re.escape(repr(a))};")
          for a in (0, -1, None, True, "6", MOST + 1)),
        *(({key: value}, f"{key} is .*; accepted: LoRA of one rank, scaled by lora_alpha / r")
          for key, value in (("use_dora", True), ("use_rslora", 1), ("rank_pattern", {"a": 1}),
                             ("alpha_pattern", {"a": 1}))),
    ],
)  # fmt: skip
def test_a_config_that_is_refused(tuned, checkpoint, tmp_path, values, message):
    """By the file, before the model is changed."""
    model, _ = tuned
    adapters.save_adapter(model, tmp_path / "a", "BASE")
    (tmp_path / "a" / "alignment.json").unlink()
    path = tmp_path / "a" / "adapter_config.json"
    edit(path, **values)
    with pytest.raises(BadInput, match=f"{named(path)}: .*{message}"):
        adapters.load_adapter(model, tmp_path / "a", "another")
    assert not [n for n, _ in model.named_parameters() if ".another." in n]


def test_an_adapter_beside_another_is_lora_alone(tuned, tmp_path):
    model, _ = tuned
    adapters.save_adapter(model, tmp_path / "a", "BASE")
    with pytest.raises(BadInput, match=named(tmp_path / "a") + ": holds a projector; an adapter"):
        adapters.load_adapter(model, tmp_path / "a", "another")


def test_the_smallest_and_the_largest_alpha(tuned, tmp_path):
    model, _ = tuned
    model.initial_projector = []
    adapters.save_adapter(model, tmp_path / "a", "BASE")
    for i, alpha in enumerate((1e-3, MOST)):
        edit(tmp_path / "a" / "adapter_config.json", lora_alpha=alpha)
        (tmp_path / "a" / "alignment.json").unlink(missing_ok=True)
        adapters.load_adapter(model, tmp_path / "a", f"n{i}")
        assert adapters.adapters(model, f"n{i}")[0][1].scale == alpha / 4


@pytest.mark.parametrize(
    "files, message",
    [
        (["adapter/adapter_config.json"], "the folder of a run; its adapter is FOLDER/adapter"),
        (["config.json"], r"a model; an adapter \(adapter_config.json\) is needed here"),
        (["x"], "no adapter_config.json there; the folder of a PEFT adapter is needed"),
    ],
)
def test_a_folder_that_is_no_adapter(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    message = message.replace("FOLDER", re.escape(str(tmp_path)))
    with pytest.raises(BadInput, match=f"{named(tmp_path)}: {message}"):
        adapters.adapter_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert adapters.adapter_folder(tmp_path) == tmp_path


@pytest.mark.parametrize(
    "content, message",
    [
        *(({key: 3}, f"{key} is 3; a text is accepted")
          for key in ("base", "base_name", "dtype", "quantize", "template", "image_aspect")),
        ({"base": "x"}, "`base` without `base_name`; both or neither are accepted"),
    ],
)  # fmt: skip
def test_conditions_that_are_none(tmp_path, content, message):
    path = tmp_path / "alignment.json"
    assert adapters.read_conditions(tmp_path) == {}
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=f"{named(path)}: {message}"):
        adapters.read_conditions(tmp_path)
    path.write_text('{"base": "x", "base_name": "y", "dtype": null}')
    assert adapters.read_conditions(tmp_path)["base"] == "x"


def test_flags_that_an_adapter_decides(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    conditions = {"template": "plain", "image_aspect": "pad", "quantize": "nf4"}
    (tmp_path / "alignment.json").write_text(json.dumps(conditions))
    assert adapters.as_trained(tmp_path) == ("plain", "pad", "nf4")
    assert adapters.as_trained(tmp_path, "plain", "pad", "nf4") == ("plain", "pad", "nf4")
    assert adapters.as_trained(None, "chatml", None, "nf4") == ("chatml", None, "nf4")
    for i, (key, flag) in enumerate(
        {
            "template": "--template",
            "image_aspect": "--image-aspect",
            "quantize": "--quantize",
        }.items()
    ):
        given = [None] * 3
        given[i] = "other"
        told = f"^{flag} other: the adapter {re.escape(str(tmp_path))} was trained with "
        with pytest.raises(BadInput, match=told + conditions[key]):
            adapters.as_trained(tmp_path, *given)
    (tmp_path / "alignment.json").write_text('{"template": "plain", "quantize": null}')
    assert adapters.as_trained(tmp_path, None, "checkpoint", "nf4") == (
        "plain",
        "checkpoint",
        "nf4",
    )


def test_another_base_is_refused(llava):
    model, _ = llava
    base = adapters.base_hash(model)
    adapters.check_base(model, {"base": base, "base_name": "B"}, "here")
    adapters.check_base(model, {"base": base, "base_name": "B", "quantize": "none"}, "here")
    with pytest.raises(BadInput, match=rf"^here: it was trained on B \(weights x\); .*{base}\)"):
        adapters.check_base(model, {"base": "x", "base_name": "B"}, "here")
    told = "^here: it was trained with --quantize nf4; the model that is loaded has --quantize none"
    with pytest.raises(BadInput, match=told):
        adapters.check_base(model, {"base": base, "base_name": "B", "quantize": "nf4"}, "here")


# ---- reward.json

WHOLE = {
    "base": "b", "base_name": "B", "question": "Q", "facts": "F", "max_facts": None,
    "template": "plain", "image_aspect": "pad", "held_out": {"a": {"n": 1, "mean": 0.5, "std": 0}},
}  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"max_facts": 1},
        {"max_facts": MOST},
        {"facts_first": True},
        {"held_out": None},
        {"held_out": {}},
        {"held_out": {"a": None}},
        {"held_out": {"a": {"n": 2.0, "mean": -MOST, "std": MOST}}},
        {"quantize": None, "facts": None},
    ],
)
def test_settings_that_are_taken(tmp_path, values):
    (tmp_path / "reward.json").write_text(json.dumps(WHOLE | values))
    assert adapters.reward_settings(tmp_path) == WHOLE | values


@pytest.mark.parametrize(
    "values, message",
    [
        *(({"max_facts": m}, f"max_facts is {m!r}; a whole number from 1, or null")
          for m in (0, -1, True, 1.0, "1", MOST + 1)),
        ({"facts_first": 1}, "facts_first is 1; true or false"),
        *(({key: 3}, f"{key} is 3; a text is accepted")
          for key in "base base_name question facts quantize template image_aspect".split()),
        *(({"held_out": held}, "held_out is .*; n, mean and std of each file")
          for held in (3, {"a": 3}, {"a": {"n": 1, "mean": 0}}, {"a": {"n": 0, "mean": 0, "std": 0}},
                       {"a": {"n": 1, "mean": "0", "std": 0}}, {"a": {"n": 1, "mean": 0, "std": True}},
                       {"a": {"n": 1, "mean": MOST + 1, "std": 0}}, {"a": {"n": 1, "mean": 0, "std": -MOST - 1}},
                       {"a": {"n": MOST * 2, "mean": 0, "std": 0}})),
    ],
)  # fmt: skip
def test_settings_that_are_refused(tmp_path, values, message):
    path = tmp_path / "reward.json"
    path.write_text(json.dumps(WHOLE | values))
    with pytest.raises(BadInput, match=f"{named(path)}: {message}"):
        adapters.reward_settings(tmp_path)


@pytest.mark.parametrize("key", WHOLE)
def test_settings_that_are_missing(tmp_path, key):
    path = tmp_path / "reward.json"
    path.write_text(json.dumps({k: v for k, v in WHOLE.items() if k != key}))
    told = (
        f"{named(path)}: no {key}; a run of this reward_model.py writes base, base_name, question, "
    )
    with pytest.raises(BadInput, match=told + "facts, max_facts, template, image_aspect, held_out"):
        adapters.reward_settings(tmp_path)


def test_a_loaded_reward_model_is_frozen(llava, checkpoint, tmp_path):
    """Under the name that is asked for; its settings come back."""
    model, _ = llava
    model.prepare(llm=False, projector=False)
    add_adapter(model.llm, "reward", 2)
    model.add_head("reward")
    settings = {k: v for k, v in WHOLE.items() if not k.startswith("base")}
    adapters.save_reward(model, tmp_path / "r", checkpoint, settings)
    found = adapters.load_reward(model, tmp_path / "r", "value")
    assert found["question"] == "Q" and found["base_name"] == str(checkpoint)
    value, reward = (model.parameters_of(name) for name in ("value", "reward"))
    assert len(value) == len(reward) and not any(p.requires_grad for p in value)
    assert all(p.requires_grad for p in reward)
    assert all(torch.equal(a, b) for a, b in zip(value, reward))
    shutil.copy(
        tmp_path / "r" / "adapter" / "adapter_model.safetensors",
        tmp_path / "r" / "head.safetensors",
    )
    with pytest.raises(BadInput, match=named(tmp_path / "r") + ": the weights are not those"):
        adapters.load_reward(model, tmp_path / "r", "third")
