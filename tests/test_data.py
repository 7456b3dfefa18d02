"""data.py: every layout with its traps, prompts and tokens against strings by hand, pictures against transformers."""

import io
import json
import random
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import read_records
from PIL import Image
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

import facts
from common import BadInput
from data import TEMPLATES, Example, Processor, Record
from formats import dataset, files, layouts
from model import pack

HERE = Path(__file__).parent / "data"
PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "photos"
SIDE, PATCH = 28, 14  # 4 image tokens
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
QUESTION, CHOSEN, REJECTED = (
    "What is on the desk?",
    "A lamp, and a café menu.",
    "A lamp and two phones.",
)


# ---- tokenizers and processors made for the tests


SPECIAL = ["<image>", "<|im_start|>", "<|im_end|>"]
WORDS = "USER: ASSISTANT: the user's questions. polite answers lamp desk colour What is on A [INST] [/INST] user"


def merge(words, vocab):
    """Merges that build each word from left to right; the new pieces go into `vocab`."""
    merges = []
    for word in words:
        for i in range(1, len(word)):
            if (pair := (word[:i], word[i])) not in merges:
                merges.append(pair)
            vocab.setdefault(word[: i + 1], len(vocab))
    return merges


def byte_level(merged=True, joined=()):
    """Byte-level BPE as GPT-2 and Qwen have it, without a BOS."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = [w for word in WORDS.split() for w in ("Ġ" + word, word)] if merged else []
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merge([*words, *joined], vocab)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not joined)
    backend.decoder = decoders.ByteLevel()
    return finish(backend, eos_token="<|endoftext|>")


def sentencepiece():
    """As transformers reads Llama's SentencePiece model: "▁" in front, no pre-tokenizer, byte fallback, a BOS."""
    vocab = {
        w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])
    }
    for c in "▁" + "".join(chr(c) for c in range(33, 127)):
        vocab[c] = len(vocab)
    merges = merge(["▁▁", *(p + word for word in WORDS.split() for p in ("▁", ""))], vocab)
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return finish(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def finish(backend, **names):
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in [*names.values(), *SPECIAL]]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **names
    )


TOKENIZERS = {"byte_level": byte_level, "sentencepiece": sentencepiece}


def processor_of(tokenizer, template="vicuna_v1", image_aspect="pad", max_length=2000, side=SIDE):
    image = tokenizer.convert_tokens_to_ids("<image>")
    return Processor(
        tokenizer, image, side, (side // PATCH) ** 2, MEAN, STD, template, image_aspect, max_length
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """lamp.jpg, desk.png, and another desk.png in train2014/."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "train2014").mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "lamp.jpg")
    Image.new("RGB", (30, 40), "brown").save(folder / "desk.png")
    Image.new("RGB", (30, 40), "green").save(folder / "train2014" / "desk.png")
    return folder


def pairs(file):
    """What a data file says, without where it says it."""
    return [(r.turns, *r.answers) for r in file.records]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- layouts


def test_povid(images):
    file = layouts.read(HERE / "povid.json", images)
    assert (file.layout, file.rows, file.refused) == ("povid", 3, [])
    assert pairs(file) == [
        ((QUESTION,), CHOSEN, REJECTED),
        (("Name a colour.",), "Blue.", "A dog."),
        (
            ("Is there a lamp?", "Yes, one.", "What does <image> mean in HTML?"),
            "<image> is not a tag of HTML.",
            "It ends with </s>.",
        ),
    ]
    # the author's folder "./data/coco" is dropped, one that is there is not
    assert [r.image for r in file.records] == [
        images / "lamp.jpg",
        None,
        images / "train2014" / "desk.png",
    ]
    assert file.records[2].where == "povid.json, row 2"


def test_rlhf_v_jsonl(images):
    file = layouts.read(HERE / "rlhf_v.jsonl", images)
    assert (file.layout, file.rows, file.refused) == ("rlhf_v", 4, [])
    # text as object, JSON string, base64 of a list, list; both sets of key names
    assert pairs(file) == [((QUESTION,), CHOSEN, REJECTED)] * 3 + [
        (("Is  a word?",), "No.", "Yes.")  # `<image>` was the image's place
    ]
    names = [
        "lamp.jpg",
        "lamp.jpg",
        "desk.png",
        "desk.png",
    ]  # `image_path` before `image`, which may name a split
    assert [r.image for r in file.records] == [images / name for name in names]


def png(colour, size=(20, 12)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def parquet_rows(n):
    text = [
        {"question": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"It is {i + 1}."}
        for i in range(n)
    ]
    columns = {
        "text": [json.dumps(t) for t in text],
        "origin_dataset": ["demo"] * n,
        "idx": list(range(n)),
    }
    return {
        "ds_name": ["demo"] * n,
        **columns,
        "image_path": [f"not/there/{i}.jpg" for i in range(n)],
    }


def test_rlhf_v_parquet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for .cache
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    n, colours = 7, [(i * 30, 0, 255 - i * 30) for i in range(7)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array(
        [{"bytes": png(c), "path": None if i % 2 else "x.png"} for i, c in enumerate(colours)], kind
    )
    pq.write_table(
        pa.table({"image": cells, **parquet_rows(n)}), tmp_path / "demo.parquet", row_group_size=3
    )
    assert pq.ParquetFile(tmp_path / "demo.parquet").num_row_groups == 3
    file = layouts.read(tmp_path / "demo.parquet")
    assert (file.layout, file.rows, file.refused) == ("rlhf_v", n, [])
    assert pairs(file) == [((f"What is {i}?",), f"It is {i}.", f"It is {i + 1}.") for i in range(n)]
    assert file.records[4].where == "demo.parquet, row 4"
    for i in (6, 0, 3, 2, 5, 1, 4):  # as in training: any order, over all row groups
        picture = files.open_image(file.records[i].image)
        assert picture.size == (20, 12) and picture.getpixel((3, 3)) == colours[i]
    hashes = [files.image_identity(r.image) for r in file.records]
    assert len(set(hashes)) == n and str(file.records[4].image).endswith("demo.parquet, row 4")


def test_rlhf_v_parquet_with_a_column_of_paths(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.png").write_bytes(png("red"))
    columns = parquet_rows(1) | {"image_path": [None], "image": ["a.png"]}
    pq.write_table(pa.table(columns), tmp_path / "demo.parquet")
    assert [r.image for r in layouts.read(tmp_path / "demo.parquet").records] == [
        tmp_path / "a.png"
    ]


def test_llava_rlhf(images):
    file = layouts.read(HERE / "llava_rlhf.json", images)
    assert (file.layout, file.rows, file.refused) == ("llava_rlhf", 3, [])
    assert pairs(file) == [
        ((QUESTION,), CHOSEN, REJECTED),  # `<image>` stood at the end
        (
            ("Is there a lamp?", "Yes, one.", "What colour is it?"),
            "Red.",
            "Green.",
        ),  # [[...]], preference 2
        (("Name a colour.",), "Blue.", "A dog."),
    ]
    assert [r.image for r in file.records] == [images / "lamp.jpg", images / "desk.png", None]


def test_vlfeedback(images):
    file = layouts.read(HERE / "vlfeedback.jsonl", images)
    assert (file.layout, file.rows, file.refused) == ("vlfeedback", 3, [])
    assert pairs(file) == [
        ((QUESTION,), CHOSEN, REJECTED),
        # means 13/3, 7/3, 13/3, N/A: of six pairs one is tied, three are not rated; the row repeats the id of the first
        (("Is there a lamp?",), "Yes.", "No."),
        (("Is there a lamp?",), "I think so.", "No."),
        # an object of lists, as load_dataset gives it; the prompt holds U+2028, which ends a line for str.splitlines
        (("Describe\u2028the desk.",), "It is wood.", "It is glass."),
        (("Describe\u2028the desk.",), "It is made of brown wood.", "It is wood."),
        (("Describe\u2028the desk.",), "It is made of brown wood.", "It is glass."),
    ]
    assert [r.image for r in file.records] == [images / "lamp.jpg"] * 3 + [images / "desk.png"] * 3
    assert file.records[2].where == "vlfeedback.jsonl, row 1, completions 2 > 1"
    assert file.notes == {
        "pairs left out: equal ratings": 1,
        "pairs left out: a rating is not a number": 3,
    }


@pytest.mark.parametrize(
    "rating, mean",
    [
        ("4", 4),
        (4, 4),
        ("4.5", 4.5),
        ("N/A", None),
        ("", None),
        (None, None),
        ("nan", None),
        ("inf", None),
        ([4], None),
    ],
)
def test_ratings(rating, mean):
    assert (
        layouts._mean_rating(
            {"Helpfulness": {"Rating": rating}, "Visual Faithfulness": {"Rating": rating}}
        )
        == mean
    )


def test_llava_instruct(images):
    file = layouts.read(HERE / "llava_instruct.json", images)
    assert (file.layout, file.rows, file.refused) == ("llava_instruct", 3, [])
    assert pairs(file) == [
        (("What is this?", "A lamp.", "And its colour?"), "Red."),
        (("Name a colour.",), "Blue."),
        (("Describe the desk.",), "It is made of wood."),  # the leading gpt turn is dropped
    ]
    assert [r.image for r in file.records] == [images / "lamp.jpg", None, images / "desk.png"]
    assert len(read_records([HERE / "llava_instruct.json"], images, answers=1)) == 3


def test_several_files_and_the_first_answer_only(images):
    files = [HERE / "povid.json", HERE / "vlfeedback.jsonl", HERE / "llava_instruct.json"]
    records = read_records(files, images, answers=1)
    assert [len(r.answers) for r in records] == [1] * (3 + 6 + 3) and records[0].answers == (
        CHOSEN,
    )


def test_images_default_to_the_files_folder(images, tmp_path):
    shutil.copytree(images, tmp_path / "all")
    shutil.copy(HERE / "llava_rlhf.json", tmp_path / "all")
    assert (
        layouts.read(tmp_path / "all" / "llava_rlhf.json").records[0].image
        == tmp_path / "all" / "lamp.jpg"
    )


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_pair_is_the_same_in_all_layouts(images, tokenizer):
    processor = processor_of(TOKENIZERS[tokenizer]())
    files = ("povid.json", "rlhf_v.jsonl", "llava_rlhf.json", "vlfeedback.jsonl")
    first, *others = [
        processor.encode(layouts.read(HERE / name, images).records[0]) for name in files
    ]
    for other in others:
        assert other.record.image == first.record.image
        assert torch.equal(other.prompt, first.prompt)
        assert all(torch.equal(a, b) for a, b in zip(other.answers, first.answers, strict=True))


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the folder of photos is not here")
def test_photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for .cache
    names = ("povid.json", "llava_rlhf_preference.json", "vlfeedback.jsonl", "rlhf_v.parquet")
    pytest.importorskip("pyarrow")
    povid, llava, vlfeedback, parquet = [
        layouts.read(PHOTOS / name, PHOTOS / "images") for name in names
    ]
    assert not any(file.refused for file in (povid, llava, vlfeedback, parquet))
    assert len(povid.records) == 9 and pairs(povid) == pairs(llava) == pairs(parquet)
    assert [r.image for r in povid.records] == [r.image for r in llava.records]
    for r, s in zip(povid.records, parquet.records):
        assert np.array_equal(files.open_image(r.image), files.open_image(s.image))
    found = pairs(vlfeedback)
    # four answers a row, the last without a rating: up to three pairs, the first of which is that of the other files
    assert list(dict.fromkeys(p for p in found if p in pairs(povid))) == pairs(povid)
    same = vlfeedback.notes["pairs left out: the same answer, rated twice"]
    assert (
        same > 0
        and len(found) + same == 27 == vlfeedback.notes["pairs left out: a rating is not a number"]
    )


# ---- prompts and tokens; the strings are section 3.9's of the formats that LLaVA's conversation.py produces


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
FORMS = {  # (prompt, answer) of an image and user Q1 / assistant A1 / user Q2; EOS is the tokenizer's
    "vicuna_v1": (SYSTEM + "USER: <image>\nQ1 ASSISTANT: A1EOSUSER: Q2 ASSISTANT:", " A2EOS"),
    "mistral": ("[INST] <image>\nQ1 [/INST] A1 EOS[INST] Q2 [/INST]", " A2 EOS"),
    "chatml": (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|>"
        "<|im_start|>assistant\nA1<|im_end|><|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n",
        "A2<|im_end|>",
    ),
    "plain": ("<image>\nQ1\nA1\nEOSQ2\n", "A2\nEOS"),
}
TURNS = {
    "Q1": "What is on the desk?",
    "A1": "A lamp, 20 €.",
    "Q2": "And its colour?\n\nOne word.",
    "A2": "Red.",
}


def spelled(text, eos, image_tokens, turns=TURNS):
    for name, turn in ({"EOS": eos} | turns).items():
        text = text.replace(name, turn)
    return text.replace("<image>", "<image>" * image_tokens)


def test_every_template_is_written_out():
    assert FORMS.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("template", FORMS)
@pytest.mark.parametrize("picture", [True, False])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_ids_are_those_of_the_whole_string(tokenizer, template, picture):
    whole = TOKENIZERS[tokenizer]()  # another one, which finds special tokens in the text
    processor = processor_of(TOKENIZERS[tokenizer](), template)
    *turns, answer = TURNS.values()
    record = Record("row 0", Path("x.png") if picture else None, tuple(turns), (answer, "A dog."))
    example = processor.encode(record)
    assert (example.prompt == processor.image_token_id).sum() == (4 if picture else 0)
    for text, answer in zip(record.answers, example.answers):
        prompt, end = (
            part if picture else part.replace("<image>\n", "") for part in FORMS[template]
        )
        written = spelled(prompt + end, whole.eos_token, 4, TURNS | {"A2": text})
        ids = [*example.prompt.tolist(), *answer.tolist()]
        assert ids == whole(written).input_ids
        if tokenizer == "byte_level":  # which loses nothing, so text can be compared as well
            assert whole.decode(example.prompt) == spelled(prompt, whole.eos_token, 4)
            assert whole.decode(answer) == spelled(end, whole.eos_token, 4, {"A2": text})
        assert processor.text(answer) == text
        end_token = "<|im_end|>" if template == "chatml" else whole.eos_token
        assert answer[-1] == processor.end_id == whole.convert_tokens_to_ids(end_token)
    assert all(
        s.all() for s in example.scored
    )  # the end token is scored, and the last token there is
    assert set(processor.stop_ids) == {processor.end_id, whole.eos_token_id}
    assert torch.equal(
        processor.encode(Record("row 0", record.image, record.turns)).prompt, example.prompt
    )


@pytest.mark.parametrize("template", FORMS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_special_tokens_in_a_text_are_letters(tokenizer, template):
    processor = processor_of(TOKENIZERS[tokenizer](), template)
    eos = processor.tokenizer.eos_token
    nasty = f"a <image> b {eos} c <|im_end|><|im_start|>user"
    record = Record("row 0", Path("x.png"), ("What <image>?", nasty, nasty), (nasty, nasty + "!"))
    plain = processor.encode(Record("row 0", Path("x.png"), ("What?", "a", "b"), ("a", "b")))
    special = [processor.tokenizer.convert_tokens_to_ids(t) for t in (eos, *SPECIAL)]
    for _ in range(2):  # the tokenizer remembers settings from call to call
        example = processor.encode(record)
        for ids, expected in zip(
            (example.prompt, *example.answers), (plain.prompt, *plain.answers)
        ):
            assert [i for i in ids.tolist() if i in special] == [
                i for i in expected.tolist() if i in special
            ]
        assert processor.text(example.answers[0]) == nasty


def test_a_template_whose_tokens_are_missing_is_refused():
    tokenizer = byte_level()
    lacking = tokenizer.convert_tokens_to_ids
    tokenizer.convert_tokens_to_ids = lambda t: None if t == "<|im_end|>" else lacking(t)
    with pytest.raises(BadInput, match=r"--template chatml needs the token <\|im_end\|>"):
        processor_of(tokenizer, "chatml").encode(Record("row 0", None, ("a",), ("b", "c")))


def test_a_tokenizer_that_joins_prompt_and_answer_is_refused():
    processor = processor_of(byte_level(merged=False, joined=[":ĠRed"]))
    with pytest.raises(
        BadInput, match="row 3: the tokenizer joins the end of the prompt with the answer 'Red.'"
    ):
        processor.encode(Record("row 3", None, ("What colour?",), ("Red.", "Blue.")))
    with pytest.raises(
        BadInput, match="row 4: the tokenizer joins"
    ):  # in an earlier turn the mask would be off by one
        processor.encode(
            Record("row 4", None, ("What colour?", "Red.", "Sure?"), ("No.",)), every_turn=True
        )


def test_letters_that_are_read_as_the_image():
    """`<image>` as an added token that is not special is found in any text: the row is named."""
    tokenizer = byte_level()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in backend["added_tokens"]:
        token["special"] &= token["content"] != "<image>"
    backend = Tokenizer.from_str(json.dumps(backend))
    processor = processor_of(
        transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    )
    image = Path("x.png")
    processor.encode(Record("a.json, row 1", image, ("What?",), ("A.", "B.")))
    for turns, answers in (
        (("What is <image>?",), ("A.", "B.")),
        (("What?",), ("A.", "The <image>.")),
        (("What?", "<image>", "And?"), ("A.", "B.")),
    ):
        with pytest.raises(
            BadInput, match=r"a.json, row 1: .* the letters <image> in .* as the image"
        ):
            processor.encode(Record("a.json, row 1", image, turns, answers))


def test_ids_without_an_embedding():
    """A token that was added to the tokenizer and not to the model; the image's own needs none."""
    tokenizer = byte_level()
    n = len(tokenizer)
    tokenizer.add_tokens(["<bbox>"])
    processor = processor_of(tokenizer)
    processor.embeddings = processor.image_token_id = n
    processor.encode(Record("a.json, row 1", Path("x.png"), ("What?",), ("A box.", "B.")))
    processor.image_token_id = n - 1
    processor.embeddings = n
    for turns, answers in ((("What <bbox>?",), ("A.", "B.")), (("What?",), ("A.", "A <bbox>."))):
        with pytest.raises(
            BadInput, match=f"row 1: the token '<bbox>' has the id {n}; the model has"
        ):
            processor.encode(Record("a.json, row 1", None, turns, answers))
        processor.embeddings = n + 1
        processor.encode(Record("a.json, row 1", None, turns, answers))
        processor.embeddings = n


def test_every_turn_scores_assistant_turns_only():
    processor = processor_of(byte_level(merged=False), "plain")  # a token a letter
    record = Record("row 0", Path("x.png"), ("ab", "c", "d"), ("ef",))
    last, every = processor.encode(record), processor.encode(record, every_turn=True)
    #                     4 patches, \n, a, b, \n | c, \n, EOS | d, \n | e, f, \n, EOS
    assert len(last.prompt) == 4 + 4 + 3 + 2 and len(last.answers[0]) == 4
    assert len(every.prompt) == 4 + 4
    assert every.scored[0].int().tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 1]
    ids = torch.cat([every.prompt, every.answers[0]])
    assert torch.equal(ids, torch.cat([last.prompt, last.answers[0]]))
    one = Record("row 1", None, ("ab",), ("ef",))
    assert torch.equal(processor.encode(one, every_turn=True).prompt, processor.encode(one).prompt)


def test_every_turn_in_vicunas_words():
    processor = processor_of(byte_level())
    turns = ("What is on the desk?", "A lamp.", "And its colour?", "Red.", "Sure?")
    example = processor.encode(Record("row 0", Path("x.png"), turns, ("Yes.",)), every_turn=True)
    ids, scored, eos = example.answers[0], example.scored[0], "<|endoftext|>"
    assert processor.tokenizer.decode(ids[scored]) == f" A lamp.{eos} Red.{eos} Yes.{eos}"
    assert (
        processor.tokenizer.decode(ids[~scored])
        == "USER: And its colour? ASSISTANT:USER: Sure? ASSISTANT:"
    )


def test_what_makes_two_prompts_the_same():
    """Image and all turns; not the file, and not the answers."""
    record = Record("a.json, row 0", Path("x.png"), ("What?", "A cup.", "Sure?"), ("Yes.",))
    same = replace(record, where="b.json, row 7", answers=("No.",), quality=1.0)
    assert same.prompt_key == record.prompt_key
    for change in (
        {"image": Path("y.png")},
        {"image": None},
        {"turns": ("What?", "A dog.", "Sure?")},
        {"turns": ("What?", "A cup.", "No?")},
    ):
        assert replace(record, **change).prompt_key != record.prompt_key


def test_text_of_tokens_is_without_those_that_stop_alone():
    """Any other special token is shown: the model did say it."""
    processor = processor_of(byte_level(), "chatml")
    ids = processor.tokenizer.convert_tokens_to_ids
    said = [*processor.tokenise("A lamp."), ids("<|im_start|>"), *processor.tokenise("Red.")]
    for end in ("<|im_end|>", "<|endoftext|>"):
        assert processor.text(torch.tensor([*said, ids(end)])) == "A lamp.<|im_start|>Red."


def test_length_and_equal_answers():
    processor = processor_of(byte_level(merged=False), "plain", max_length=12)
    row = Record("row 5", Path("x.png"), ("ab",), ("ef", "gh"))  # 4 + 4 tokens and 4
    processor.encode(row)
    processor.max_length = 11
    with pytest.raises(
        BadInput, match="row 5: prompt of 8 and answer of 4 tokens; the limit is 11"
    ):
        processor.encode(row)
    for answers in (("ef", "e"), ("e", "ef")):  # the longer one counts, wherever it stands
        with pytest.raises(BadInput, match="prompt of 8 and answer of 4"):
            processor.encode(replace(row, answers=answers))
    with pytest.raises(BadInput, match="row 6: chosen and rejected are the same tokens"):
        processor.encode(Record("row 6", None, ("ab",), ("ef", "ef")))


# ---- rows that share a prompt


def test_share_prompt_is_exact(images, build):
    tokenizer = byte_level()
    processor, model = (
        processor_of(tokenizer),
        build(vocab_size=len(tokenizer), dtype=torch.float64),
    )
    model.image_token_id = processor.image_token_id
    lamp, desk = images / "lamp.jpg", images / "train2014" / "desk.png"
    multi = Record("multi", lamp, ("What is this?", "A lamp.", "And its colour?"), ("Red.",))
    records = [
        Record("first", lamp, ("What is on the desk?",), ("A lamp.", "Two phones and a cup.")),
        Record("other picture", desk, ("What is on the desk?",), ("A lamp.", "Two phones.")),
        Record("same prompt", lamp, ("What is on the desk?",), ("A menu.",)),
        Record("text only", None, ("What is on the desk?",), ("A lamp.", "Nothing.")),
        Record("longer", lamp, ("What is on the desk? One word.",), ("Lamp.", "Cup.")),
        Record("text only too", None, ("What is on the desk?",), ("A mug.",)),
    ]
    examples = [processor.encode(r) for r in records] + [processor.encode(multi, every_turn=True)]
    shared = dataset.share_prompt(examples)
    order = [0, 2, 4, 6, 1, 3, 5]  # by picture, and by text where there is none
    assert [len(e.answers) for e in shared] == [2 + 1 + 2 + 1, 2, 2 + 1]
    assert (shared[0].prompt == processor.image_token_id).sum() == 4
    assert tokenizer.decode(shared[0].prompt).endswith(
        "\nWhat is"
    )  # all four prompts about the lamp begin so
    assert sum(int(s.sum()) for e in shared for s in e.scored) == sum(
        int(s.sum()) for e in examples for s in e.scored
    )
    packed = processor.collate(shared)
    assert len(packed.pixel_values) == 2
    with torch.no_grad():
        together, _ = model.log_probs(packed)
        alone = []
        for i in order:
            for answer, scored in zip(
                examples[i].answers, examples[i].scored
            ):  # one row, one answer
                pixels = (
                    examples[i].record.image and processor.pixels(examples[i].record.image)[None]
                )
                alone.append(
                    model.log_probs(pack([examples[i].prompt], [[answer]], [[scored]], pixels))[0]
                )
        sums = model.answer_log_probs(packed)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-10, rtol=0)
    torch.testing.assert_close(sums, torch.stack([a.sum() for a in alone]), atol=1e-10, rtol=0)


def test_share_prompt_of_texts():
    """Questions about one passage share it, wherever they stand; other texts stay alone."""
    processor = processor_of(byte_level())
    passages = "This is a long text about a lamp.", "Another long text, about two phones."
    questions = "What is it?", "Is there a lamp?", "How many?"
    texts = [f"{p}\n{q}" for q in questions for p in passages] + ["Hello.", "How are you?"]
    records = [Record(f"row {i}", None, (t,), ("Yes.",)) for i, t in enumerate(texts)]
    examples = [processor.encode(r) for r in records]
    shared = dataset.share_prompt(examples)
    # This/What/Is ...: rows 0 2 4 are of the first passage, 1 3 5 of the second
    assert [[a.tolist()[-5:] for a in e.answers] for e in shared] == [
        [examples[i].answers[0].tolist()[-5:] for i in group]
        for group in ([0, 2, 4], [1, 3, 5], [6], [7])
    ]
    for example, passage in zip(shared, passages):
        assert processor.tokenizer.decode(example.prompt).endswith(passage + "\n")
    tokens = lambda some: sum(len(e.prompt) + sum(map(len, e.answers)) for e in some)
    assert tokens(shared) < 0.7 * tokens(examples)


def test_share_prompt_of_one_changes_nothing():
    record = Record("row 0", Path("x.png"), ("What is this?",), ("A lamp.", "A cup."))
    example = processor_of(byte_level()).encode(record)
    (alone,) = dataset.share_prompt([example])
    assert torch.equal(alone.prompt, example.prompt)
    for a, b in zip(alone.answers + alone.scored, example.answers + example.scored, strict=True):
        assert torch.equal(a, b)


# ---- pictures


SIZES = [(37, 53), (53, 37), (28, 28), (29, 100), (100, 29), (5, 7), (1, 9), (64, 63), (333, 500)]
SIZES += [(28, 31), (31, 28), (29, 28)]  # odd margins: the smaller half is cut off in front


def noise(size, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [28, 42])
def test_centre_crop_is_transformers(size, side):
    settings = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    clip = transformers.CLIPImageProcessorPil(**settings)(
        noise(size), return_tensors="pt"
    ).pixel_values[0]
    llava = transformers.LlavaImageProcessorPil(**settings)(
        noise(size), return_tensors="pt"
    ).pixel_values[0]
    ours = processor_of(byte_level(), image_aspect="checkpoint", side=side).pixels(noise(size))
    assert ours.shape == (3, side, side) and ours.dtype == torch.float32
    assert (ours - clip).abs().max() <= 1e-6 and (ours - llava).abs().max() <= 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_pad_is_transformers(size):
    settings = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    processor = transformers.LlavaImageProcessorPil(do_pad=True, **settings)
    llava = processor(noise(size), return_tensors="pt").pixel_values[0]
    assert (processor_of(byte_level()).pixels(noise(size)) - llava).abs().max() <= 1e-6


@pytest.mark.parametrize("wide", [True, False])
def test_pad_by_hand(wide):
    size = (SIDE, 13) if wide else (13, SIDE)
    picture = noise(size)
    square = np.empty((SIDE, SIDE, 3))
    square[:] = (122, 116, 104)  # int(255 * mean)
    at = slice(7, 20)  # (28 - 13) // 2 = 7 in front, 8 behind
    square[at if wide else slice(None), slice(None) if wide else at] = np.asarray(picture)
    expected = (
        torch.tensor((square / 255 - np.array(MEAN)) / np.array(STD)).permute(2, 0, 1).float()
    )
    assert (processor_of(byte_level()).pixels(picture) - expected).abs().max() <= 1e-6


def opened(image, path, **how):
    image.save(path, **how)
    return files.open_image(path)


@pytest.mark.parametrize(
    "orientation, turn",
    [
        (1, None),
        (3, "ROTATE_180"),
        (6, "ROTATE_270"),
        (8, "ROTATE_90"),
        (2, "FLIP_LEFT_RIGHT"),
        (5, "TRANSPOSE"),
    ],
)
def test_exif_turn(tmp_path, orientation, turn):
    picture, exif = noise((6, 4)), Image.Exif()
    exif[0x0112] = orientation
    expected = picture if turn is None else picture.transpose(Image.Transpose[turn])
    assert np.array_equal(opened(picture, tmp_path / "x.png", exif=exif), expected)
    jpeg = opened(picture, tmp_path / "x.jpg", exif=exif, quality=95)
    assert jpeg.size == expected.size


def test_gray_palette_and_bits(tmp_path):
    gray = Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint8))
    assert np.asarray(opened(gray, tmp_path / "gray.png")).tolist() == [
        [[0] * 3, [100] * 3, [255] * 3]
    ]
    bits = opened(gray.point(lambda v: v > 50, "1"), tmp_path / "1.png")
    assert np.asarray(bits).tolist() == [[[0] * 3, [255] * 3, [255] * 3]]
    palette = Image.fromarray(np.array([[0, 2, 1]], dtype=np.uint8), "L").convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    expected = [[[255, 0, 0], [0, 0, 255], [0, 255, 0]]]
    assert np.asarray(opened(palette, tmp_path / "p.png")).tolist() == expected
    assert np.asarray(opened(palette, tmp_path / "p.gif")).tolist() == expected
    expected[0][1] = [255, 255, 255]  # a transparent colour shows the white behind it
    assert np.asarray(opened(palette, tmp_path / "tp.png", transparency=2)).tolist() == expected


def test_alpha_is_on_white(tmp_path):
    rgba = Image.fromarray(
        np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [10, 20, 30, 51]]], dtype=np.uint8), "RGBA"
    )
    expected = [[[255] * 3, [0] * 3, [206, 208, 210]]]  # (255 - 51) / 255 = 0.8 of white
    assert np.asarray(opened(rgba, tmp_path / "x.png")).tolist() == expected
    assert (
        np.asarray(opened(rgba, tmp_path / "x.webp", lossless=True, exact=True)).tolist()
        == expected
    )
    la = Image.fromarray(np.array([[[100, 0], [100, 255]]], dtype=np.uint8), "LA")
    assert np.asarray(opened(la, tmp_path / "la.png")).tolist() == [[[255] * 3, [100] * 3]]


def test_cmyk(tmp_path):
    values = [[[0, 255, 255, 0], [255, 0, 0, 0], [0, 0, 0, 255], [0, 0, 0, 0]]]
    cmyk = Image.fromarray(np.array(values, dtype=np.uint8), "CMYK")
    expected = [[[255, 0, 0], [0, 255, 255], [0, 0, 0], [255, 255, 255]]]
    assert np.asarray(opened(cmyk, tmp_path / "x.tif")).tolist() == expected
    big = cmyk.resize((64, 16), Image.Resampling.NEAREST)  # JPEG stores CMYK inverted
    difference = np.asarray(opened(big, tmp_path / "x.jpg", quality=100)).astype(int) - np.asarray(
        big.convert("RGB")
    )
    assert np.abs(difference).max() <= 3


GRAYS = [0, 0x1234, 0x80FF, 65535]
AS_8_BITS = [0, 0x12, 0x80, 255]


def gray16(path, order="<u2", **how):
    mode = "I;16" if order == "<u2" else "I;16B"
    image = Image.frombytes(mode, (4, 1), np.array(GRAYS, order).tobytes())
    return np.asarray(opened(image, path, **how))


@pytest.mark.parametrize(
    "name, order",
    [("x.png", "<u2"), ("x.tif", "<u2"), ("big.tif", ">u2"), ("x.pgm", "<u2"), ("x.jp2", "<u2")],
)
def test_16_bit_gray_is_scaled(tmp_path, name, order):
    shown = gray16(tmp_path / name, order)
    with Image.open(tmp_path / name) as file:
        assert file.mode in files.DEEP_GRAY
    assert shown.tolist() == [[[v] * 3 for v in AS_8_BITS]]


def test_16_bit_gray_that_is_compressed_turned_or_transparent(tmp_path):
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 3  # upside down
    assert gray16(tmp_path / "x.png", exif=exif)[0, :, 0].tolist() == AS_8_BITS[::-1]
    assert gray16(tmp_path / "x.tif", compression="tiff_lzw")[0, :, 0].tolist() == AS_8_BITS
    assert gray16(tmp_path / "x.png", transparency=0x1234)[0, :, 0].tolist() == [0, 255, 0x80, 255]


def tiff(values, kind, bits, photometric=1, sample_format=1, order="<"):
    """A TIFF of one line of gray values, by hand. kind: their struct format; photometric 0: 0 is white."""
    data = (
        values if isinstance(values, bytes) else struct.pack(f"{order}{len(values)}{kind}", *values)
    )
    width = 4
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 12 * 10 + 4}
    tags |= {277: 1, 278: 1, 279: len(data), 339: sample_format}
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    entries = [struct.pack(order + "HHIHH", t, 3, 1, v, 0) for t, v in tags.items()]
    return head + struct.pack(order + "H", len(tags)) + b"".join(entries) + bytes(4) + data


def pnm(kind, maximum, fmt, *values):
    return f"{kind} 4 1 {maximum}\n".encode() + struct.pack(fmt, *values)


HDR = [0.0, 0.5, 1.0, 2.0]
DEEP = {  # file: gray of 8 bits, or None where nothing says which value is white
    "12 bits": (tiff(bytes([0x00, 0x01, 0x23, 0x80, 0xFF, 0xFF]), "", 12), [0, 0x12, 0x80, 255]),
    "0 is white": (tiff(GRAYS, "H", 16, photometric=0), [255, 255 - 0x12, 255 - 0x80, 0]),
    "8 bits, 0 is white": (tiff([0, 1, 200, 255], "B", 8, photometric=0), [255, 254, 55, 0]),
    "signed": (tiff([-5, 0, 7, 30000], "h", 16, sample_format=2), None),
    "signed, big end": (tiff([-5, 0, 7, 30000], "h", 16, sample_format=2, order=">"), None),
    "32 bits": (tiff([0, 1, 65535, 2**31 - 1], "I", 32), None),
    "signed 32 bits": (tiff([0, 1, 65535, -4], "i", 32, sample_format=2), None),
    "floats": (tiff(HDR, "f", 32, sample_format=3), None),
    "PGM to 4095": (pnm("P5", 4095, ">4H", 0, 0x123, 0x80F, 4095), [0, 0x12, 0x80, 255]),
    "PGM in text": (b"P2 4 1 4095\n0 291 2063 4095\n", [0, 0x12, 0x80, 255]),
    "PFM": (pnm("Pf", -1.0, "<4f", *HDR), None),
}


@pytest.mark.parametrize("name", DEEP)
def test_gray_of_more_than_8_bits(tmp_path, name):
    content, expected = DEEP[name]
    (tmp_path / "x").write_bytes(content)
    if expected:
        assert np.asarray(files.open_image(tmp_path / "x")).tolist() == [
            [[v] * 3 for v in expected]
        ]
        return
    for read in (files.open_header, files.open_image):  # found before a run, too
        with pytest.raises(BadInput, match="x: .* nothing says which of them is white"):
            read(tmp_path / "x")


MODES = {  # a colour in each of Pillow's modes, and what it is as RGB on white; None: refused
    "1": (1, [255, 255, 255]),
    "L": (100, [100] * 3),
    "P": (7, [7] * 3),
    "LA": ((100, 51), [224] * 3),
    "PA": ((7, 255), [7] * 3),
    "RGB": ((10, 20, 30), [10, 20, 30]),
    "RGBX": ((10, 20, 30, 0), [10, 20, 30]),
    "RGBA": ((10, 20, 30, 51), [206, 208, 210]),
    "RGBa": ((2, 4, 6, 51), [206, 208, 210]),  # the same, premultiplied
    "CMYK": ((0, 255, 255, 0), [255, 0, 0]),
    "YCbCr": ((76, 85, 255), [254, 0, 0]),
    "HSV": ((0, 255, 255), [255, 0, 0]),
    "LAB": ((136, 208, 195), [250, 3, 11]),  # red, by LittleCMS
    "La": ((20, 51), None),
} | dict.fromkeys(files.DEEP_GRAY, (1000, None))  # in no container that says what is white


def test_every_mode_of_pillow(tmp_path, monkeypatch):
    assert MODES.keys() == set(Image.MODES)
    for mode, (colour, expected) in MODES.items():
        image = Image.new(mode, (20, 20), colour)
        if mode in ("P", "PA"):
            image.putpalette([v for v in range(256) for _ in "RGB"])
        monkeypatch.setattr(Image, "open", lambda file, formats=None: image)
        if expected:
            assert list(files.open_image(Path("x")).getpixel((3, 3))) == expected, mode
        else:
            with pytest.raises(BadInput, match="x: "):
                files.open_image(Path("x"))


def test_collate_pairs_pictures_with_rows(images):
    processor = processor_of(byte_level())
    records = read_records([HERE / "povid.json"], images)
    batch = processor.collate([processor.encode(r) for r in records])
    assert len(batch.lengths) == 6 and batch.pixel_values.shape == (
        2,
        3,
        SIDE,
        SIDE,
    )  # the second row is text
    assert torch.equal(batch.pixel_values[1], processor.pixels(images / "train2014" / "desk.png"))
    assert ((batch.input_ids == processor.image_token_id).sum(1)).tolist() == [4, 0, 4]
    assert processor.collate([processor.encode(records[1])]).pixel_values is None


TURNED = {  # what a viewer does for each orientation of EXIF
    1: None,
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("orientation", TURNED)
def test_size_of_a_turned_picture(tmp_path, orientation, kind):
    picture, exif, turn = noise((24, 16)), Image.Exif(), TURNED[orientation]
    exif[0x0112] = orientation
    shown = opened(picture, tmp_path / f"x.{kind}", exif=exif)
    expected = picture.transpose(Image.Transpose[turn]) if turn else picture
    assert shown.size == expected.size
    assert files.image_size(tmp_path / f"x.{kind}") == (expected.height, expected.width)
    if kind == "png":
        assert np.array_equal(shown, expected)


def header_only(path, width, height):
    """A PNG that says how large it is and holds no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13)
    idat = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    path.write_bytes(start + chunk + struct.pack(">I", zlib.crc32(chunk)) + idat)
    return path


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "largest, too_large",
    [
        ((10_000, 10_000), (10_001, 10_000)),  # 100 million pixels
        ((20_000, 101), (20_001, 101)),  # a side
        ((101, 20_000), (101, 20_001)),
        ((200, 1), (201, 1)),  # 200 times as long as wide
        ((1, 200), (1, 201)),
    ],
)
def test_how_large_a_picture_may_be(tmp_path, largest, too_large):
    """What is accepted goes on to the decoder, which finds no pixels; the rest is refused by its header."""
    with pytest.raises(BadInput, match="cannot be decoded"):
        files.open_image(header_only(tmp_path / "x.png", *largest))
    with pytest.raises(BadInput, match="{} x {} pixels; at most".format(*too_large)):
        files.open_image(header_only(tmp_path / "x.png", *too_large))


# ---- what stands around an answer


def test_bos_only_where_the_tokenizer_adds_it():
    tokenizer = byte_level()
    tokenizer.bos_token = "<|endoftext|>"  # named, as Qwen's, and never written
    example = processor_of(tokenizer).encode(Record("row 0", None, ("Hi.",), ("Yes.",)))
    assert example.prompt[0] != tokenizer.bos_token_id
    tokenizer = sentencepiece()
    example = processor_of(tokenizer).encode(Record("row 0", None, ("Hi.",), ("Yes.",)))
    assert (example.prompt == tokenizer.bos_token_id).nonzero().tolist() == [[0]]


def test_share_prompt_of_a_prompt_that_is_the_beginning_of_another():
    record = Record("row 0", Path("x.png"), ("What?",), ("A.",))
    long, short = torch.tensor([5, 6, 7, 8]), torch.tensor([5, 6])
    one = lambda prompt, answer: Example(
        prompt, [torch.tensor([answer])], [torch.tensor([True])], record
    )
    for prompts in ((long, short), (short, long)):
        (shared,) = dataset.share_prompt([one(p, 40 + len(p)) for p in prompts])
        assert shared.prompt.tolist() == [5, 6]
        assert [a.tolist() for a in shared.answers] == [
            [7, 8, 44] if p is long else [42] for p in prompts
        ]
        assert [s.tolist() for s in shared.scored] == [
            [False, False, True] if p is long else [True] for p in prompts
        ]


CHOICE = "Which?\nA. a lamp\nB. a cup"


@pytest.mark.parametrize(
    "image, turns, known, found",
    [
        ("7.jpg", ("What?",), ["7.jpg", "aok_7.jpg"], "7.jpg"),
        ("COCO_train2014_7.jpg", ("What?",), ["7.jpg", "train2014_7.jpg"], "7.jpg"),
        (
            "COCO_train2014_7.jpg",
            ("What?",),
            ["7.jpg", "COCO_train2014_7.jpg"],
            "COCO_train2014_7.jpg",
        ),
        ("COCO_train2014_7.jpg", (CHOICE,), ["7.jpg", "aok_7.jpg"], "aok_7.jpg"),
        ("7.jpg", (CHOICE.replace(".", ")"),), ["7.jpg", "aok_7.jpg"], "aok_7.jpg"),
        ("7.jpg", (CHOICE,), ["7.jpg"], "7.jpg"),
        ("7.jpg", (CHOICE, "A.", "Why?"), ["7.jpg", "aok_7.jpg"], "7.jpg"),
        ("7.jpg", ("What?",), ["aok_7.jpg"], None),
    ],
)
def test_names_of_facts(image, turns, known, found):
    record = Record("row 0", Path("x") / image, turns, ("A.",))
    assert facts.facts_of(record, {name: [name] for name in known}) == (found and [found])


def test_facts_of_records_without():
    text, lamp = Record("row 0", None, ("Hi.",)), Record("row 1", Path("lamp.jpg"), ("What?",))
    assert facts.facts_for([text], {}, "refuse") == [[]]
    with pytest.raises(BadInput, match="row 1: --facts has no caption of lamp.jpg"):
        facts.facts_for([text, lamp], {}, "refuse")
    assert facts.facts_for([text, lamp], {}, "count") == [[], []]


def test_the_longest_facts_are_those_of_most_tokens():
    processor = processor_of(byte_level())
    texts = ["xyzxyz", "the user's questions", "a", "qqqqqqq"]  # 6, 3, 1 and 7 tokens or so
    tokens = {text: len(processor.tokenise(text)) for text in texts}
    assert len(texts[1]) > len(texts[3]) and tokens[texts[1]] < tokens[texts[0]] < tokens[texts[3]]
    assert set(facts.longest_facts(processor, texts, 2)) == {texts[0], texts[3]}
    assert set(facts.longest_facts(processor, texts)) == set(texts)


def test_facts_in_an_evaluation_turn():
    texts, turn = [f"fact {i}" for i in range(6)], "Good?{facts} End."
    drawn = {facts.evaluation_turn(turn, " Seen:", texts, random.Random(i), 2) for i in range(9)}
    lists = [text.removeprefix("Good? Seen:\n- ").removesuffix(" End.") for text in drawn]
    assert all(len(set(text.split("\n- ")) & set(texts)) == 2 for text in lists) and len(drawn) > 3
    whole = [facts.evaluation_turn(turn, " Seen:", texts, random.Random(i)) for i in range(9)]
    assert all(text.count("\n- ") == 6 for text in whole) and len(set(whole)) > 3
    assert facts.evaluation_turn(turn, " Seen:", [], random.Random(0)) == "Good? End."


def test_facts_before_the_last_question():
    """Worked by hand: lines before the last user turn; dialogue, answers and record stay."""
    processor = processor_of(byte_level(), "plain")
    record = Record("row 0", None, ("Hi.", "Hello.", "What is it?"), ("A lamp.", "No"))
    text = facts.drawn_facts(" Seen:", ["a cat"], random.Random(0))
    turns = ("Hi.", "Hello.", "Seen:\n- a cat\nWhat is it?")
    assert facts.facts_first(record, text).turns == turns
    assert facts.facts_first(record, "") is record
    example = processor.encode(record)
    read = facts.with_facts_first(processor, example, text)
    assert read.prompt.tolist() == processor.encode(replace(record, turns=turns)).prompt.tolist()
    assert read.answers is example.answers and read.record is record
    assert facts.with_facts_first(processor, example, "") is example


def test_room_for_an_answer():
    processor = processor_of(byte_level(merged=False), "plain")
    short, long = (
        processor.encode(Record(f"a.json, row {i}", None, (text,), ("e",)))
        for i, text in enumerate(("ab", "abcd"))
    )
    processor.max_length = len(long.prompt) + 10
    refuse, skip = dataset.Rows([]), dataset.Rows([], skip_bad_rows=True)
    assert refuse.with_room(processor, [short, long], 10) == [short, long]
    with pytest.raises(BadInput, match="a.json, row 1: the prompt leaves no room"):
        refuse.with_room(processor, [short, long], 11)
    assert skip.with_room(processor, [short, long], 11) == [short]
    assert [(r["file"], r["row"]) for r in skip.skipped] == [("a.json", 1)]
    with pytest.raises(BadInput, match="leaves no room"):
        skip.with_room(processor, [long], 11)


def test_a_rated_answer_is_closed_once():
    processor = processor_of(byte_level(merged=False), "plain")
    example = processor.encode(Record("row 0", None, ("ab",), ("ef", "g")))
    cut = example.answers[0][:2]  # at max_new_tokens
    answers = [example.answers[0], cut]
    turn = processor.tokenizer.encode("ok\n", add_special_tokens=False)
    rated = facts.with_evaluation(processor, replace(example, answers=answers), "ok")
    assert rated.answers[0].tolist() == [*answers[0].tolist(), *turn]
    assert rated.answers[1].tolist() == [*cut.tolist(), processor.end_id, *turn]
    processor.max_length = len(example.prompt) + len(rated.answers[0])
    facts.with_evaluation(processor, replace(example, answers=answers), "ok")
    processor.max_length -= 1
    with pytest.raises(BadInput, match="row 0: prompt, answer and evaluation of"):
        facts.with_evaluation(processor, replace(example, answers=answers), "ok")


def test_every_token_that_stops_closes_a_rated_answer():
    """ChatML: sampling stops at the template's end and at the tokenizer's."""
    processor = processor_of(byte_level(), "chatml")
    example = processor.encode(Record("row 0", None, ("What?",), ("A lamp.",)))
    text = example.answers[0][:-1]
    for name in ("<|im_end|>", "<|endoftext|>"):
        end = torch.tensor([processor.tokenizer.convert_tokens_to_ids(name)])
        closed = replace(example, answers=[torch.cat([text, end])])
        (rated,) = facts.with_evaluation(processor, closed, "Good?").answers
        turn = processor.tokenizer.decode(rated[len(text) + 1 :])
        assert rated[len(text)] == end and turn.startswith("<|im_start|>user\nGood?")


def test_another_view_of_the_images(tmp_path):
    """`view` sees the image as opened; what it gives is what the model sees."""
    Image.new("RGB", (40, 40), (200, 10, 10)).save(tmp_path / "red.png")
    processor = processor_of(byte_level(merged=False), "plain")
    example = processor.encode(Record("row 0", tmp_path / "red.png", ("ab",), ("ef",)))
    seen = []

    def blue(image):
        seen.append(image.size)
        return Image.new("RGB", (30, 60), (10, 10, 200))

    plain, other = processor.collate([example]), processor.collate([example], view=blue)
    assert seen == [(40, 40)] and torch.equal(plain.input_ids, other.input_ids)
    want = processor.pixels(Image.new("RGB", (30, 60), (10, 10, 200)))
    assert torch.equal(other.pixel_values[0], want) and not torch.equal(plain.pixel_values[0], want)


# ---- whole data sets


def instruct(*turns):
    """A text-only row of LLaVA-Instruct."""
    roles = ("human", "gpt") * (len(turns) // 2)
    return {"conversations": [{"from": r, "value": t} for r, t in zip(roles, turns)]}


def test_what_is_left_out_at_each_stage_is_listed(tmp_path, capsys):
    """At reading, at encoding, and for want of room; of how many rows is told each time."""
    rows = [
        instruct("ab", "e"),
        instruct("cd", ""),
        instruct("ef", "x" * 99),
        instruct("abcdefgh", "e"),
        instruct("gh", "e"),
    ]
    path = write(tmp_path / "a.json", rows)
    processor = processor_of(byte_level(merged=False), "plain", max_length=20)
    found = dataset.read([path], answers=1, skip_bad_rows=True)
    examples = found.encode(processor, room=15)
    assert [e.record.turns for e in examples] == [("ab",), ("gh",)]
    assert [(r["file"], r["row"]) for r in found.skipped] == [
        ("a.json", 1),
        ("a.json", 2),
        ("a.json", 3),
    ]
    err = capsys.readouterr().err
    for told in ("1 of 5 rows", "1 of 4 rows", "1 of 3 rows"):
        assert told in err
    with pytest.raises(BadInput, match=r"a.json, row 1: .* \(1 of 5 rows are refused"):
        dataset.read([path], answers=1)


def test_of_the_answers_only_the_record_knows(tmp_path):
    """prompts_only: not even an answer that is too long matters, and the record keeps it."""
    path = write(tmp_path / "a.json", [instruct("ab", "e" * 99)])
    processor = processor_of(byte_level(merged=False), "plain", max_length=20)
    (example,) = dataset.read([path], answers=1).encode(processor, prompts_only=True)
    assert example.answers == [] and example.record.answers == ("e" * 99,)
    with pytest.raises(BadInput, match="a.json, row 0: prompt of"):
        dataset.read([path], answers=1).encode(processor)


def test_every_turn_of_a_data_set(tmp_path):
    path = write(tmp_path / "a.json", [instruct("ab", "ef", "cd", "gh")])
    processor = processor_of(byte_level(merged=False))
    found = {
        every_turn: dataset.read([path], answers=1).encode(processor, every_turn=every_turn)
        for every_turn in (False, True)
    }
    said = {}
    for every_turn, (example,) in found.items():
        said[every_turn] = processor.tokenizer.decode(example.answers[0][example.scored[0]])
    assert "gh" in said[False] and "ef" not in said[False]
    assert "gh" in said[True] and "ef" in said[True]


def test_of_equal_records_the_first_is_kept(tmp_path, capsys):
    rows = [instruct("ab", "first"), instruct("cd", "other"), instruct("ab", "second")]
    files = [write(tmp_path / "a.json", rows), write(tmp_path / "b.json", [instruct("cd", "last")])]
    found = dataset.read(files, answers=1, unique=lambda record: record.turns)
    assert [r.answers for r in found.records] == [("first",), ("other",)]
    assert "2 rows repeat another row" in capsys.readouterr().err


def test_a_subset_is_drawn_by_the_seed(tmp_path, capsys):
    """So many rows, in their order, of what is left; another seed draws others; it is said which."""
    rows = [instruct(f"Q{i}", "a") for i in range(40)] + [instruct("Q0", "b")]
    path = write(tmp_path / "a.json", rows)
    once = lambda record: record.turns
    drawn = [dataset.read([path], None, 1, subset=(9, s), unique=once).records for s in (0, 0, 1)]
    numbers = [[int(r.turns[0][1:]) for r in records] for records in drawn]
    assert numbers[0] == numbers[1] == sorted(numbers[0]) and len(set(numbers[0])) == 9
    assert numbers[0] != numbers[2] and numbers[0] != list(range(9))
    told = [line for line in capsys.readouterr().err.splitlines() if "--subset" in line]
    assert told[0].startswith("--subset: 9 of 40 rows, drawn by seed 0 (")
    assert told[0] == told[1] and told[0][-9:] != told[2][-9:]
    assert len(dataset.read([path], None, 1, subset=(40, 0), unique=once).records) == 40
    with pytest.raises(BadInput, match="--subset 42: the data have 41 rows to draw from"):
        dataset.read([path], None, 1, subset=(42, 0))


def test_rows_without_an_image_where_one_is_needed(images, tmp_path):
    with_image = instruct("<image>\nab", "e") | {"image": "lamp.jpg"}
    path = write(tmp_path / "a.json", [instruct("ab", "e"), with_image])
    with pytest.raises(BadInput, match="a.json, row 0: no image, which this would hide"):
        dataset.read([path], images, 1, needs_image="this would hide")
    found = dataset.read([path], images, 1, skip_bad_rows=True, needs_image="this would hide")
    assert [r.image for r in found.records] == [images / "lamp.jpg"]
    assert [r["row"] for r in found.skipped] == [0]
    assert len(dataset.read([path], images, 1).records) == 2


def test_instruction_data_is_no_preference_data(tmp_path):
    path = write(tmp_path / "a.json", [instruct("ab", "e")])
    with pytest.raises(BadInput, match="layout llava_instruct is instruction data"):
        dataset.read([path])


def test_the_pair_of_a_row_is_named():
    """A row of several pairs: which of them cannot be used is part of why."""
    where = "v.jsonl, row 12, completions 2 > 1"
    assert dataset.located(where, "too long") == {
        "file": "v.jsonl",
        "row": 12,
        "why": "completions 2 > 1: too long",
    }
    assert dataset.located("b.json, row 4", "x") == {"file": "b.json", "row": 4, "why": "x"}


def test_the_folder_of_all_images(tmp_path):
    """--images or the first file's folder; what is above all images, if some lie elsewhere."""
    record = lambda *parts: Record("row 0", parts and tmp_path.joinpath(*parts) or None, ("a",))
    one, two = tmp_path / "one", tmp_path / "two"
    folder = lambda *records, images=None: dataset.images_folder(
        records, [one / "a.json", two / "b.json"], images
    )
    assert folder(record()) == folder(record("one", "x", "1.png")) == one
    assert folder(record("two", "1.png"), images=two) == two
    assert folder(record("one", "1.png"), record("two", "1.png")) == tmp_path
    assert folder(record("two", "x", "1.png"), record("two", "y", "1.png")) == two


def test_where_images_are_looked_for_without_a_flag(tmp_path):
    """Beside the data file, in `images` there, and where a script of ours wrote down."""
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data / "images", elsewhere):
        folder.mkdir(parents=True)
    for path in (data / "a.png", data / "images" / "b.png", elsewhere / "c.png"):
        path.write_bytes(png("red"))
    row = {"prompt": "What?", "chosen": "A.", "rejected": "B."}
    path = write(data / "t.jsonl", [row | {"image": f"{name}.png"} for name in "abc"])
    assert [r["row"] for r in layouts.read(path).refused] == [2]
    files.remember_images(data, elsewhere)
    found = layouts.read(path)
    assert [r.image.name for r in found.records] == ["a.png", "b.png", "c.png"] and not found.notes
    # with the flag, there alone
    assert [r["row"] for r in layouts.read(path, elsewhere).refused] == [0, 1]
    # another tool's images.json
    for text in ("[1]", "{", '{"images_folder": 3}'):
        (data / "images.json").write_text(text)
        assert files.image_folders(path) == [data, data / "images"]
    # a folder that is gone is named
    (data / "images.json").write_text('{"images_folder": "/gone"}')
    (refused,) = layouts.read(path).refused
    assert refused["why"].endswith(f"is not below --images {data} or {data / 'images'} or /gone.")


def test_an_answer_rated_twice_gives_no_pair(images, tmp_path):
    rated = [("Yes.", "4"), ("Yes.", "2"), ("No.", "1")]
    completions = [
        {"response": text, "annotations": {"Helpfulness": {"Rating": rating}}}
        for text, rating in rated
    ]
    row = {"id": "lamp", "prompt": "A lamp?", "models": [], "completions": completions}
    file = layouts.read(write(tmp_path / "v.jsonl", [row]), images)
    assert pairs(file) == [(("A lamp?",), "Yes.", "No.")] * 2
    assert file.notes == {"pairs left out: the same answer, rated twice": 1}


def test_the_history_belongs_to_a_rated_prompt(tmp_path):
    """Two dialogues that end in the same question are two prompts: no pair is made across them."""
    first, second = (f"Hi.\n<extra_id_1>Assistant\n{t}\n<extra_id_1>User\nWhy?" for t in "AB")
    ratings = ((first, "best", 4), (first, "worst", 0), (second, "other", 1))
    rows = [
        {"prompt": p, "response": r, "helpfulness": q, "correctness": 0, "coherence": 0}
        for p, r, q in ratings
    ]
    file = layouts.read(write(tmp_path / "h.jsonl", rows))
    assert pairs(file) == [(("Hi.", "A", "Why?"), "best", "worst")]
    assert file.notes == {"prompts left out: one answer only": 1}


def test_what_is_no_number_and_no_text():
    for value in (True, False, "inf", "-inf", "nan", "two", None, [1]):
        with pytest.raises(BadInput, match="`strength` is .* a number is needed"):
            layouts.number(value, "strength")
    assert layouts.number(" -1.5", "strength") == -1.5
    for half in ("\ud800", "\udbff", "\udc00", "\udfff"):
        with pytest.raises(BadInput, match="`answer` holds half of a surrogate pair"):
            layouts.text_field(f"A {half}.", "answer")
    for whole in ("\ud7ff", "\ue000", "\U0001f600"):
        assert layouts.text_field(f" A {whole}. ", "answer") == f"A {whole}."


def test_whole_dialogues_of_a_pair_must_be_one(images, tmp_path):
    """mllm_dpo may write whole dialogues; two different questions make no pair, whatever `question` says."""
    turn = lambda role, text: {"from": role, "value": text}
    chosen = [turn("human", "<image>\nWhat is it?"), turn("gpt", "A lamp.")]
    rejected = [turn("human", "<image>\nWhat else?"), turn("gpt", "A cup.")]
    row = {"question": "What is it?", "image": "lamp.jpg", "ref_win_logp": 0.5}
    rows = [
        row | {"chosen": chosen, "rejected": rejected},
        row | {"chosen": chosen, "rejected": chosen[:1] + rejected[1:]},
    ]
    file = layouts.read(write(tmp_path / "m.jsonl", rows), images)
    assert [r["row"] for r in file.refused] == [0]
    assert "differ before their last turn" in file.refused[0]["why"]
    assert pairs(file) == [(("What is it?",), "A lamp.", "A cup.")]


def test_an_image_in_a_later_turn_is_refused(images, tmp_path):
    """trl: also where the turn stands in `chosen` behind a prompt, and the row has an image."""
    turn = lambda role, *blocks: {"role": role, "content": list(blocks)}
    text = lambda words: {"type": "text", "text": words}
    prompt = [turn("user", text("Hi.")), turn("assistant", text("Hello."))]
    late = [turn("user", {"type": "image"}, text("And this?")), turn("assistant", text("A lamp."))]
    plain = [turn("user", text("And this?")), turn("assistant", text("A cup."))]
    row = {"prompt": prompt, "images": ["lamp.jpg"]}
    for chosen, rejected in ((late, plain), (plain, late)):
        rows = [row | {"chosen": chosen, "rejected": rejected}]
        (refused,) = layouts.read(write(tmp_path / "t.jsonl", rows), images).refused
        assert (
            refused["why"]
            == "a later human turn holds `<image>`; only the first may show a picture."
        )


def test_which_turn_is_bad():
    """Counted from the first turn of the file, those that are dropped included."""
    turns = [("gpt", "Hi."), ("human", "What?"), ("gpt", " ")]
    rows = [{"from": role, "value": text} for role, text in turns]
    with pytest.raises(BadInput, match=r"`said\[2\].value` is ' '; a non-empty string is needed"):
        layouts.dialogue(rows, "said")


def test_numbers_of_rows_and_lines(tmp_path):
    """Blank lines are no rows, but lines; a bare CR ends no line: between JSON's tokens it is white space."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"a": 1,\r"b": 2}\n\n \r\n{"a": 3}\r\n{"a": 4}')
    assert list(files.rows(path)) == [(0, {"a": 1, "b": 2}), (1, {"a": 3}), (2, {"a": 4})]
    path.write_bytes(b'{"a": 1}\n\n{"a": }\n')
    with pytest.raises(BadInput, match="a.jsonl, row 1: line 3: not valid JSON"):
        list(files.rows(path))


def test_sizes_are_those_of_the_view(tmp_path):
    """LLaVA-NeXT joins the tiles by the size of the image that was cut into them."""
    Image.new("RGB", (40, 20)).save(tmp_path / "wide.png")
    processor = processor_of(byte_level(merged=False), "plain")
    processor.anyres = SimpleNamespace(tiles=lambda image: [image], tokens=lambda size: 4)
    example = processor.encode(Record("row 0", tmp_path / "wide.png", ("ab",), ("ef",)))
    view = lambda image: image.crop((0, 0, 10, 20))
    assert processor.collate([example]).image_sizes.tolist() == [[20, 40]]
    assert processor.collate([example], view).image_sizes.tolist() == [[20, 10]]


def test_rows_without_a_picture_are_told(images, tmp_path, capsys):
    rows = [instruct("<image>\nab", "e") | {"image": "lamp.jpg"}, instruct("ab", "e")]
    dataset.read([write(tmp_path / "a.json", rows)], images, 1)
    assert "a.json: 1 of 2 have no picture" in capsys.readouterr().err
    dataset.read([write(tmp_path / "b.json", rows[:1])], images, 1)
    assert "picture" not in capsys.readouterr().err
