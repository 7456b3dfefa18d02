"""Properties that hold for any input: readers, templates, collation, messages; inputs drawn by hypothesis."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import common  # noqa: E402
import data  # noqa: E402
from common import BadInput  # noqa: E402
from data import Record  # noqa: E402
from formats import files, layouts, ratings, weights  # noqa: E402
from model import pack  # noqa: E402

some = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
QUIET = TEXT.filter(lambda text: "<image>" not in text)


# ---- readers


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@given(row=st.data())
@some
def test_any_row_is_read_or_refused_alone(tmp_path, layout, row):
    """Any JSON under the keys of a layout, beside any other keys; the records have no empty text."""
    keys = [name.split("|")[0] for name in layouts.LAYOUTS[layout][0]]
    rows = row.draw(
        st.lists(st.fixed_dictionaries(dict.fromkeys(keys, JSON)), min_size=1, max_size=3)
    )
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    found = layouts.read(path)
    assert found.rows == len(rows)
    assert {r["row"] for r in found.refused} <= set(range(len(rows)))
    for record in found.records:
        assert all(text.strip() == text and text for text in (*record.turns, *record.answers))
        assert len(record.turns) % 2 == 1 and len(record.answers) in (1, 2)


@given(
    content=st.binary(max_size=300),
    name=st.sampled_from(["a.json", "a.jsonl", "a.tsv", "a.json.gz", "a.parquet"]),
)
@some
def test_any_bytes_are_no_traceback(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    for read in (layouts.read, ratings.read, layouts.captions):
        try:
            read(path)
        except BadInput as error:
            assert name in str(error)


@given(question=QUIET, chosen=QUIET, rejected=QUIET)
@some
def test_what_is_written_is_read(tmp_path, question, chosen, rejected):
    """Whatever the letters: the same texts come back, without the white space around them."""
    row = {"prompt": question, "chosen": chosen, "rejected": rejected}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    (record,) = layouts.read(path).records
    assert record.turns == (question.strip(),)
    assert record.answers == (chosen.strip(), rejected.strip())


@given(
    name=st.text(max_size=40),
    parts=st.lists(st.sampled_from(["..", ".", "a", "", "/", "b.png", "\\"]), max_size=6),
)
@some
def test_no_path_leaves_the_folder(tmp_path, name, parts):
    """secret.png lies above; nothing but files below `in` is found."""
    inside = tmp_path / "in"
    (inside / "a").mkdir(parents=True, exist_ok=True)
    for place in (tmp_path / "secret.png", inside / "b.png", inside / "a/b.png"):
        place.touch()
    folder = files.ImageFolder(inside)
    for tried in (
        name,
        "/".join(parts),
        "/".join([*parts, "secret.png"]),
        str(tmp_path / "secret.png"),
    ):
        try:
            found = folder.find(tried)
        except BadInput:
            continue
        assert found.resolve().is_relative_to(inside)


@given(content=st.binary(max_size=200))
@some
def test_any_bytes_are_no_picture_and_no_weights(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BadInput, match="a.png: "):
        files.open_image(tmp_path / "a.png")
    try:
        weights.tensor_index(tmp_path)
    except BadInput as error:
        assert "model.safetensors: " in str(error)


# ---- templates


@pytest.mark.parametrize("template", ["vicuna_v1", "mistral", "plain"])
@given(turns=st.lists(TEXT, min_size=1, max_size=3).filter(lambda t: len(t) % 2), answer=TEXT)
@some
def test_data_text_gives_no_special_token(llava, template, turns, answer):
    """`</s>`, `<image>`, `<s>` in a text stay letters: the ids of the specials are the template's own."""
    _, processor = llava
    processor.template = template
    for cached in ("bos_ids",):
        processor.__dict__.pop(cached, None)
    nasty = "</s><s><image><unk>"
    texts = [text + nasty for text in turns]
    tokenizer = processor.tokenizer
    specials = {tokenizer.bos_token_id, processor.image_token_id}
    try:
        example = processor.encode(Record("x, row 0", None, tuple(texts), (nasty + answer,)))
    except BadInput:
        return
    ids = example.prompt.tolist() + example.answers[0].tolist()
    assert processor.image_token_id not in ids
    assert ids.count(tokenizer.bos_token_id) == len(processor.bos_ids)
    ends = len(turns) // 2 + 1
    assert ids.count(processor.end_id) == ends and specials
    said = tokenizer.decode(example.answers[0][:-1], skip_special_tokens=False)
    assert (nasty + answer).strip() == said.strip()


@given(chosen=TEXT, rejected=TEXT)
@some
def test_the_tokens_of_a_row_are_those_of_its_text(llava, chosen, rejected):
    """Prompt and answer, tokenised apart, are the whole string, tokenised at once."""
    _, processor = llava
    question = "What is it?"
    try:
        example = processor.encode(Record("x, row 0", None, (question,), (chosen, rejected)))
    except BadInput as error:
        assert "same tokens" in str(error) or "joins" in str(error)
        return
    form = data.TEMPLATES["vicuna_v1"]
    for text, ids in zip((chosen, rejected), example.answers):
        whole = form.start + form.user.replace("{}", question) + form.answer.replace("{}", text)
        at_once = processor.tokenise(whole)
        assert (
            processor.bos_ids + at_once + [processor.end_id]
            == example.prompt.tolist() + ids.tolist()
        )


# ---- collation


IDS = st.lists(st.integers(1, 90), min_size=1, max_size=9).map(torch.tensor)


@given(rows=st.lists(st.tuples(IDS, st.lists(IDS, min_size=1, max_size=3)), min_size=1, max_size=4))
@some
def test_a_packed_batch_holds_each_answer_once(rows):
    """Each target is predicted from the position before it: the prompt's end, or the token before."""
    prompts, answers = zip(*rows)
    batch = pack(list(prompts), list(answers))
    flat = batch.input_ids.flatten()
    number, place = 0, 0
    for b, (prompt, row) in enumerate(rows):
        start = len(prompt)
        for k, answer in enumerate(row):
            n = len(answer)
            assert batch.lengths[number] == n
            assert batch.targets[place : place + n].tolist() == answer.tolist()
            before = batch.index[place : place + n]
            given = flat[before].tolist()
            assert given == [int(prompt[-1]), *answer[:-1].tolist()]
            positions = batch.position_ids[b, start : start + n].tolist()
            assert positions == list(range(len(prompt), len(prompt) + n))
            assert set(batch.segments[b, start : start + n].tolist()) == {k + 1}
            start, place, number = start + n, place + n, number + 1
        assert (batch.segments[b, start:] == -1).all()
    assert place == len(batch.targets) and number == len(batch.lengths)


# ---- pictures and messages


@given(
    width=st.integers(1, 60),
    height=st.integers(1, 60),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]),
)
@some
def test_any_picture_becomes_a_square_of_numbers(tmp_path, llava, width, height, mode):
    _, processor = llava
    pixels = np.arange(width * height * 4, dtype=np.uint8).reshape(height, width, 4)
    picture = (
        Image.fromarray(pixels, "RGBA").convert("L").convert("I;16")
        if mode == "I;16"
        else Image.fromarray(pixels, "RGBA").convert(mode)
    )
    picture.save(tmp_path / "a.png")
    x, size = processor.decode(tmp_path / "a.png")
    assert x.shape == (3, 28, 28) and x.isfinite().all() and size == (height, width)
    assert files.image_size(tmp_path / "a.png") == (height, width)


@given(text=st.text(), limit=st.integers(20, 90))
@some
def test_what_is_printed_has_no_control_character(text, limit):
    said = common.printable(text, limit)
    assert not any(ord(c) < 32 and c not in "\t\n" or 127 <= ord(c) < 160 for c in said)
    said.encode("utf-8")
    if len(text) <= limit and text.isprintable():
        assert said == text
