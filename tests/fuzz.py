"""A coverage-guided fuzz run of one reader, with atheris: python tests/fuzz.py TARGET FOLDER RUNS

TARGET is pictures, tensors or rows. FOLDER keeps what reached new code: it is read at the next start, so that a run goes
on. A finding is every error but BadInput; atheris writes it to FOLDER and stops. `python tests/trust.py` runs all three.
"""

import io
import json
import random
import sys
import tempfile
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
with atheris.instrument_imports(include=["formats", "common", "PIL", "safetensors"]):
    from common import BadInput
    from formats import files, layouts, weights

PLACE = Path(tempfile.mkdtemp(prefix="fuzz"))


def pictures(data):
    (PLACE / "a").write_bytes(data)
    files.image_size(PLACE / "a")
    files.open_image(PLACE / "a")


def tensors(data):
    (PLACE / "model.safetensors").write_bytes(data)
    for place in weights.tensor_index(PLACE).values():
        weights.read_tensor(place)


def rows(data):
    (PLACE / "a.json").write_bytes(data)
    layouts.read(PLACE / "a.json", PLACE)


def seeds(target, folder):
    """Write small good files, from which the run starts."""
    import badness

    found = []
    if target == "pictures":
        from PIL import Image

        for kind in files.FORMATS:
            file = io.BytesIO()
            Image.effect_noise((8, 8), 60).convert("RGB").save(file, kind)
            found.append(file.getvalue())
    elif target == "tensors":
        import torch
        from safetensors.torch import save

        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            found.append(
                save({"a": torch.ones(2, 3, dtype=dtype), "b.c": torch.ones(1, dtype=dtype)})
            )
    else:
        found += [json.dumps(row).encode() for _, row in badness.good_rows()]
        found += [json.dumps([row] * 2).encode() for _, row in badness.good_rows()]
    for i, content in enumerate(found):
        (folder / f"seed-{i}").write_bytes(content)


def main():
    target, folder, runs = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    seeds(target, folder)
    read = {"pictures": pictures, "tensors": tensors, "rows": rows}[target]

    def once(data):
        try:
            read(data)
        except BadInput:
            pass

    seed = random.Random(target).randrange(2**31)
    options = [f"-runs={runs}", f"-seed={seed}", "-max_len=20000", "-timeout=30", "-rss_limit_mb=4096",
               "-print_final_stats=1", f"-artifact_prefix={folder}/finding-"]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(folder)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
