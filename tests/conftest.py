"""A tiny LLaVA with random weights: built in memory, as two parts on disk, composed of them, and as a checkpoint."""

import os

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from formats import checkpoints, dataset
from model import MLLM, Projector

SENTENCES = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: What is in the picture? ASSISTANT: A red cup is on the table.",
    "USER: Describe the image in detail. ASSISTANT: Two bananas and a bowl are on the left of the kitchen.",
    "USER: Is there a dog? ASSISTANT: No, there is no dog in the image. ASSISTANT: Yes, a dog sleeps under the table.",
)
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
LLM = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def read_records(paths, images=None, answers=2):
    """The records of data files, as a run reads them; a bad row is an error."""
    return dataset.read(paths, images, answers).records


def pytest_addoption(parser):
    """`--device cuda`: the tests that use the fixture `device` run there, and no others."""
    parser.addoption("--device", default="cpu", help="where the device-dependent tests run")


def pytest_configure(config):
    """Refuse a device that is not there."""
    name = config.getoption("--device")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise pytest.UsageError(f"--device {name} cannot be used: {reason}") from None


def pytest_collection_modifyitems(config, items):
    """On another device the other tests would say the same as on the CPU, and take minutes."""
    if config.getoption("--device") == "cpu":
        return
    others = [item for item in items if "device" not in item.fixturenames]
    items[:] = [item for item in items if item not in others]
    config.hook.pytest_deselected(items=others)


@pytest.fixture(scope="session")
def device(pytestconfig):
    """The name given by --device."""
    return pytestconfig.getoption("--device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """On the CI a missing test dependency is a failure, not a skip."""
    report = yield
    if os.environ.get("CI") and report.skipped and "could not import" in str(report.longrepr):
        report.outcome = "failed"
    return report


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """These tensors are too small to share; several threads only wait for each other."""
    torch.set_num_threads(1)


def scatter(module):
    """Random weights so large that every part moves the logits, none at a special value (norms 1, biases 0)."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return module


@pytest.fixture(scope="session")
def build():
    """A function that makes an MLLM in memory: `build("mistral", dtype=torch.float64, sliding_window=8)`.

    A picture of 28 x 28 pixels becomes 4 tokens; the image token is the last of the vocabulary.
    """

    def make(kind="llama", dtype=torch.float32, vocab_size=97, seed=0, **config):
        torch.manual_seed(seed)
        vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP))
        config = transformers.AutoConfig.for_model(
            kind, vocab_size=vocab_size, pad_token_id=0, **LLM, **config
        )
        llm = transformers.AutoModelForCausalLM.from_config(config)
        projector = Projector(CLIP["hidden_size"], LLM["hidden_size"])
        parts = [scatter(part).to(dtype) for part in (vision, projector, llm)]
        return MLLM(*parts, image_token_id=vocab_size - 1).eval()

    return make


def write_parts(folder):
    """Write `vision` (CLIP) and `llm` (Llama, byte-level BPE tokenizer with BOS and EOS), as downloaded."""
    torch.manual_seed(0)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder / "llm")
    llm = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **LLM))
    scatter(llm).save_pretrained(folder / "llm")
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP))
    scatter(vision).save_pretrained(folder / "vision")
    return folder


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """The folder that `write_parts` makes. Not to be changed."""
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def llava(parts):
    """(model, processor) composed of the parts; a fresh one for every test."""
    model, processor = checkpoints.compose(parts / "vision", parts / "llm")
    return model.eval(), processor


@pytest.fixture(scope="session")
def checkpoint(parts, tmp_path_factory):
    """The composed model as a saved checkpoint folder. Not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoint") / "llava"
    checkpoints.save(*checkpoints.compose(parts / "vision", parts / "llm"), folder)
    return folder
