"""What we write, read by older versions of transformers and PEFT: a base, an adapter, a merged model/.

    python tests/old_versions.py                        the pairs of PAIRS; minutes, and 300 MB each
    python tests/old_versions.py 4.49.0/0.14.0 ...      others

Not part of the test suite: it downloads packages. Each pair gets a virtual environment of its own
below `.cache/old-versions/`, which takes torch from the environment of this Python. Compared, for
the toy base model with random LoRA and a moved projector:

    base       logits of the base, read from its folder by transformers
    adapter    logits with adapter/, read by PEFT (and not those of the base: LoRA is not left out)
    off        logits with the adapter switched off
    merge      logits after PEFT's merge_and_unload
    model/     logits of the merged checkpoint
    generate   its greedy answer
    processor  token ids that AutoProcessor makes of prompt and image
    pixels     its pixels of an image that is not square; before 4.49 they differ: it crops

All agree with these pairs, but for those pixels, and for the processor of 4.41, which knows fewer
settings.
"""

import json
import os
import subprocess
import sys
import traceback
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAIRS = """4.41.2/0.11.1 4.46.3/0.13.2 4.49.0/0.14.0 4.52.4/0.15.2 4.57.1/0.14.0 4.57.1/0.18.1
    5.4.0/0.19.1 5.5.0/0.18.1 5.23.0/0.18.1 5.23.0/0.21.2"""
PROMPT = "USER: <image>\nWhat is in the picture? ASSISTANT:"


def write(folder):
    """Base, adapter and merged model, and what ours makes of them -> folder/expected.safetensors."""
    sys.path.insert(0, str(ROOT))
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    from formats import adapters, checkpoints
    from model import pack
    from sampling import sample

    def logits():
        """Of the prompt with its image, (P, V)."""
        batch = pack([prompt], [[]], pixel_values=pixels)
        with torch.no_grad():
            return model.llm.lm_head(model.hidden_states(batch))[0]

    # 1. base, image, prompt
    model, processor = checkpoints.load(ROOT / "lab" / "base")
    checkpoints.save(model, processor, folder / "base")
    picture = Image.effect_noise((90, 40), 80).convert("RGB")
    picture.save(folder / "picture.png")
    pixels = processor.pixels(picture)[None]
    before, after = (processor.tokenise(part) for part in PROMPT.split("<image>"))
    image = [processor.image_token_id] * processor.image_tokens
    prompt = torch.tensor([*processor.bos_ids, *before, *image, *after])
    expected = {"base": logits(), "pixels": pixels, "ids": prompt}

    # 2. LoRA and projector that do something
    model.prepare(lora_rank=4)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn_like(p) * 0.05)
    expected["adapted"] = logits()
    drawn = sample(model, [prompt], pixels, max_new_tokens=8, temperature=0, stop_ids=[])
    expected["answer"] = drawn.tokens[0][0]
    adapters.save_adapter(model, folder / "adapter", folder / "base", processor=processor)
    checkpoints.save(model, processor, folder / "model")
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")


def check(folder):
    """Runs in the old environment, without this project -> {what: difference or error}, printed."""
    import torch
    import transformers
    from PIL import Image
    from safetensors.torch import load_file
    from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

    want = load_file(folder / "expected.safetensors")
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 45):
        # one token an image, which the model itself replaces by many
        is_image = want["ids"] == LlavaConfig.from_pretrained(folder / "base").image_token_index
        want["ids"] = want["ids"][~is_image | ~is_image.roll(1)]
    inputs = {"input_ids": want["ids"][None], "pixel_values": want["pixels"]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    found = {}

    def compare(what, compute, expected):
        """Note the largest difference, or the error."""
        try:
            with torch.no_grad():
                value = compute()
            same = value.shape == expected.shape
            found[what] = (value - expected).abs().max().item() if same else str(value.shape)
        except Exception as error:  # whatever an old version stops with
            traceback.print_exc(file=sys.stderr)
            found[what] = f"{type(error).__name__}: {error}"[:90]

    read = lambda name: LlavaForConditionalGeneration.from_pretrained(folder / name).eval()
    logits = lambda model: model(**inputs).logits[0]
    compare("base", lambda: logits(read("base")), want["base"])

    def adapted():
        """The base with the adapter."""
        from peft import PeftModel

        return PeftModel.from_pretrained(read("base"), folder / "adapter").eval()

    def switched_off():
        """Logits without the adapter."""
        model = adapted()
        with model.disable_adapter():
            return logits(model)

    compare("adapter", lambda: logits(adapted()), want["adapted"])
    compare("off", switched_off, want["base"])
    compare("merge", lambda: logits(adapted().merge_and_unload()), want["adapted"])
    compare("model/", lambda: logits(read("model")), want["adapted"])

    def answer():
        """The first greedy tokens, without an end."""
        how = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
        return read("model").generate(**inputs, **how)[0, -8:]

    compare("generate", answer, want["answer"])

    def processed(key):
        """What AutoProcessor makes of the prompt and its image."""
        processor = AutoProcessor.from_pretrained(folder / "model")
        picture = Image.open(folder / "picture.png")
        return processor(images=picture, text=PROMPT, return_tensors="pt")[key]

    compare("processor", lambda: processed("input_ids")[0], want["ids"])
    compare("pixels", lambda: processed("pixel_values"), want["pixels"])
    print(json.dumps(found))


def environment(pair):
    """The Python of a virtual environment with this pair of versions, made at the first use."""
    transformers, peft = pair.split("/")
    folder = ROOT / ".cache" / "old-versions" / f"{transformers}-{peft}"
    python = folder / "bin" / "python"
    done = folder / "done"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, f"transformers=={transformers}", "psutil"], check=True)
        subprocess.run([*pip, "--no-deps", f"peft=={peft}", "accelerate==1.2.1"], check=True)
        # torch, pillow, jinja2 and the like: from here, after the environment's own packages
        here = next(p for p in sys.path if p.endswith("site-packages"))
        own = next(folder.glob("lib/python*/site-packages"))
        (own / "torch_of_the_project.pth").write_text(here)
        done.touch()
    return python


def main():
    """Write, check with each pair, print a table."""
    if sys.argv[1:2] == ["--check"]:
        return check(Path(sys.argv[2]))
    folder = ROOT / ".cache" / "old-versions" / f"written-{os.getpid()}"
    folder.mkdir(parents=True)
    write(folder)
    for pair in sys.argv[1:] or PAIRS.split():
        command = [environment(pair), __file__, "--check", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        (folder / f"{pair.replace('/', '-')}.log").write_text(done.stderr)
        lines = done.stdout.splitlines()
        if not lines:
            print(f"transformers/PEFT {pair}: {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        found = json.loads(lines[-1])
        bad = {k: v for k, v in found.items() if isinstance(v, str) or v > 1e-3}
        print(f"transformers/PEFT {pair}: {bad or 'all agree'}", flush=True)


if __name__ == "__main__":
    main()
