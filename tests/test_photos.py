"""Real photographs in four public layouts (skipped where they are not): one set of log-probs, equal to transformers' own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import read_records
from transformers import LlavaForConditionalGeneration

from formats import checkpoints

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT.parent / "shared" / "data" / "photos"
FILES = ("povid.json", "rlhf_v.parquet", "llava_rlhf_preference.json", "vlfeedback.jsonl")
pytestmark = pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photographs are not here")


def log_probs(model, processor, file):
    """{(question, chosen, rejected): (log p(chosen), log p(rejected))} of a data file."""
    records = read_records([PHOTOS / file], PHOTOS / "images")
    with torch.no_grad():
        batches = [
            model.answer_log_probs(processor.collate([processor.encode(r)])) for r in records
        ]
    return {(r.turns[-1], *r.answers): b for r, b in zip(records, batches)}


def test_the_layouts_agree_with_each_other_and_with_transformers(checkpoint):
    model, processor = checkpoints.load(checkpoint)
    found = {file: log_probs(model, processor, file) for file in FILES}
    expected = found["povid.json"]
    assert len(expected) == len(json.loads((PHOTOS / "povid.json").read_text()))
    for file, pairs in found.items():
        assert expected.keys() <= pairs.keys(), (
            file
        )  # VLFeedback holds more pairs of the same answers
        for pair, values in expected.items():
            torch.testing.assert_close(pairs[pair], values, rtol=1e-5, atol=1e-4)

    theirs = LlavaForConditionalGeneration.from_pretrained(checkpoint).eval()
    for record in read_records([PHOTOS / "povid.json"], PHOTOS / "images"):
        example = processor.encode(record)
        pixels = processor.pixels(record.image)[None]
        for answer, ours in zip(example.answers, expected[record.turns[-1], *record.answers]):
            ids = torch.cat([example.prompt, answer])[None]
            with torch.no_grad():
                logits = theirs(
                    input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)
                ).logits
            rows = logits[0, len(example.prompt) - 1 : -1].log_softmax(-1)
            assert abs(rows.gather(-1, answer[:, None]).sum() - ours) <= 1e-5 * len(answer) * max(
                1, abs(ours) / len(answer)
            )


@pytest.fixture
def run(checkpoint, tmp_path):
    """A function that runs a script on the checkpoint, below tmp_path."""

    def command(script, *flags):
        line = [sys.executable, ROOT / script, "--model", checkpoint, *map(str, flags)]
        done = subprocess.run(
            line,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return done

    return command


@pytest.mark.parametrize("file", FILES)
def test_dpo_trains_on_each_layout_and_pope_scores_it(run, tmp_path, file):
    flags = [
        "--data",
        PHOTOS / file,
        "--images",
        PHOTOS / "images",
        "--steps",
        2,
        "--batch-size",
        2,
        "--lora-rank",
        4,
        "--out",
        "run",
    ]
    run("dpo.py", *flags)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4) and first[
        "rewards/margins"
    ] == pytest.approx(0, abs=1e-5)
    if file == FILES[0]:
        questions = [
            "--questions",
            PHOTOS / "pope_photos.json",
            "--images",
            PHOTOS / "images",
            "--out",
            "pope",
        ]
        run("eval_pope.py", "--adapter", "run/adapter", *questions)
        scores = json.loads((tmp_path / "pope" / "metrics.json").read_text())
        assert scores["mean"]["n"] == len((PHOTOS / "pope_photos.json").read_text().split("\n{"))


def test_corrected_segments_of_photographs_weigh_more(run, tmp_path):
    """RLHF-V's own recipe; its score is a mean over tokens."""
    data = ["--data", PHOTOS / "rlhf_v.parquet", "--steps", 2, "--batch-size", 2, "--lora-rank", 4]
    done = run("dpo.py", *data, "--token-weight", 5, "--average-log-prob", "--out", "run")
    share = int(re.search(r"corrected segments: (\d+)% of", done.stderr)[1])
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < share < 100 and first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert -30 < first["logps/chosen"] < 0


@pytest.mark.parametrize(
    "name, start", [("mpo", lambda line: 0.8318 + line["loss/nll"]), ("mdpo", lambda line: 2.0794)]
)
def test_relatives_of_dpo_train_on_photographs(run, tmp_path, name, start):
    """What step 0 must print; in 4 bits the weights are others, and step 0 is the same."""
    data = ["--data", PHOTOS / "vlfeedback.jsonl", "--images", PHOTOS / "images", "--steps", 2]
    for i, more in enumerate(([], ["--quantize", "nf4", "--projector-lr", 0])):
        flags = [*data, "--batch-size", 2, "--lora-rank", 4, *more]
        run(f"{name}.py", *flags, "--out", f"run-{i}")
        first = json.loads((tmp_path / f"run-{i}" / "metrics.jsonl").read_text().splitlines()[0])
        assert first["loss"] == pytest.approx(start(first), abs=2e-4)
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_reward_model_reads_the_captions_and_serves_online_dpo_and_ppo(run, tmp_path):
    """The whole of Fact-RLHF on photographs: a reward model, an annotator, a reward."""
    facts = PHOTOS / "image_to_caption.json"
    lora = ["--images", PHOTOS / "images", "--steps", 2, "--batch-size", 2, "--lora-rank", 4]
    rated = run(
        "reward_model.py",
        "--data",
        PHOTOS / "llava_rlhf_preference.json",
        *lora,
        "--facts",
        facts,
        "--out",
        "reward",
    )
    assert any(
        repr(f"The picture shows:\n- {text}")[1:-1] in rated.stderr
        for texts in json.loads(facts.read_text()).values()
        for text in texts
    )
    report = json.loads((tmp_path / "reward" / "metrics.json").read_text())
    assert all(0 <= found["accuracy"] <= 1 and found["n"] for found in report.values())

    sampled = ["--data", PHOTOS / "povid.json", *lora, "--facts", facts, "--max-new-tokens", 12]
    run("online_dpo.py", *sampled, "--annotator", "reward", "--out", "online")
    first, second = (json.loads(line) for line in open(tmp_path / "online" / "metrics.jsonl"))
    assert (
        first["annotator/pairs"] == 1
        and first["loss"] == pytest.approx(0.6931, abs=1e-4)
        and first["annotator/unreadable"] == 0
    )

    run("ppo.py", *sampled, "--reward-model", "reward", "--out", "ppo")
    first, second = (json.loads(line) for line in open(tmp_path / "ppo" / "metrics.jsonl"))
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4) and first["seconds/score"] > 0
