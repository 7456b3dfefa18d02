"""Chat templates: what a checkpoint states, cut into pieces; which of LLaVA's prompts wins over it."""

import json
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from test_data import byte_level, processor_of, sentencepiece
from tokenizers import AddedToken

from common import BadInput
from data import TEMPLATES, Record, Template
from formats import chat, checkpoints
from formats.checkpoints import compose, load, save

# how the processors on the hub write the content of a message, and how LLMs' own templates do
PARTS = (
    "{% for c in m.content %}{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}"
)
EACH = "{% for m in messages %}"
CUE = "{% endfor %}{% if add_generation_prompt %}"
LLAMA3 = (
    "{{ bos_token }}" + EACH + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>" + CUE + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)
PHI3 = EACH + "<|{{ m.role }}|>\n" + PARTS + "<|end|>\n" + CUE + "<|assistant|>\n{% endif %}"
QWEN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + EACH + "<|im_start|>"
    "{{ m.role }}\n" + PARTS + "<|im_end|>\n" + CUE + "<|im_start|>assistant\n{% endif %}"
)
YI = (
    EACH
    + "<|im_start|>{{ m.role }}\n"
    + PARTS
    + "<|im_end|>"
    + CUE
    + "<|im_start|>assistant\n{% endif %}"
)
HUB_15 = EACH + "{{ m.role | upper }}: " + PARTS + " " + CUE + "ASSISTANT:{% endif %}"
HUMAN = TEMPLATES["vicuna_v1"].start.replace("user", "human") + HUB_15
HUB_MISTRAL = (
    EACH + "{% if m.role == 'user' %}[INST] " + PARTS + " [/INST]{% else %} "
    "{{ m.content[0].text }}END {% endif %}{% endfor %}"
)
LLAMA2 = (
    EACH
    + "{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} </s>"
    "{% endif %}{% endfor %}"
)
SPECIAL = {
    "llama3": "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
    "phi3": "<|user|> <|assistant|> <|end|>",
}
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
DIALOGUES = {  # (source, special tokens, tokenizer, the whole dialogue of TURNS, its end token)
    "llama3": (
        LLAMA3, SPECIAL["llama3"], byte_level,
        "<|begin_of_text|>" + HEADER.format("user") + "<image>\nWhat is it?<|eot_id|>"
        + HEADER.format("assistant") + "A lamp.<|eot_id|>" + HEADER.format("user")
        + "Its colour?<|eot_id|>" + HEADER.format("assistant"), "<|eot_id|>",
    ),
    "phi3": (
        PHI3, SPECIAL["phi3"], sentencepiece,
        "<s><|user|>\n<image>\nWhat is it?<|end|>\n<|assistant|>\nA lamp.<|end|>\n<|user|>\nIts colour?"
        "<|end|>\n<|assistant|>\n", "<|end|>",
    ),
    "qwen": (
        QWEN, "", byte_level,
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat is it?"
        "<|im_end|>\n<|im_start|>assistant\nA lamp.<|im_end|>\n<|im_start|>user\nIts colour?<|im_end|>\n"
        "<|im_start|>assistant\n", "<|im_end|>",
    ),
    "llama2": (
        LLAMA2, "", sentencepiece,
        "<s>[INST] <image>\nWhat is it? [/INST] A lamp. </s><s>[INST] Its colour? [/INST]", "</s>",
    ),
    "no end": (  # unlike LLaVA's own: a line end before the cue
        EACH + "{{ m.role | upper }}: " + PARTS + "{{ '\\n' }}" + CUE + "ASSISTANT:{% endif %}", "", sentencepiece,
        "<s>USER: <image>\nWhat is it?\nASSISTANT: A lamp.</s>\nUSER: Its colour?\nASSISTANT:", "</s>",
    ),
}  # fmt: skip
TURNS = ("What is it?", "A lamp.", "Its colour?")


def tokenizer_with(kind, special, **more):
    """A tokenizer of test_data.py with more special tokens; it adds "<|begin_of_text|>" if it has one."""
    tokenizer = kind()
    tokens = [AddedToken(t, special=True, normalized=False, **more) for t in special.split()]
    tokenizer.add_tokens(tokens, special_tokens=True)
    if "<|begin_of_text|>" in special:
        tokenizer.bos_token = "<|begin_of_text|>"
    return tokenizer


def own(source, tokenizer, folder):
    """The Processor of a folder with this chat template, its tokens checked."""
    (folder / "chat_template.jinja").write_text(source)
    form = chat.own_template(folder, tokenizer, "<image>")
    processor = processor_of(tokenizer)
    processor.own, processor.template = form, "checkpoint"
    chat.check_ids(processor, folder)
    return processor


@pytest.mark.parametrize("name", DIALOGUES)
@pytest.mark.parametrize("swallows", [False, True])
def test_a_dialogue_has_the_tokens_of_the_checkpoints_own(name, swallows, tmp_path):
    """Those of the whole string, where the template's special tokens are tokens. Phi-3's swallow white space."""
    source, special, kind, whole, end = DIALOGUES[name]
    processor = own(source, tokenizer_with(kind, special, rstrip=swallows), tmp_path)
    reader = tokenizer_with(kind, special, rstrip=swallows)
    example = processor.encode(Record("row 0", Path("x.png"), TURNS, ("Red.", "Green.")))
    expected = reader.encode(whole.replace("<image>", "<image>" * 4), add_special_tokens=False)
    assert example.prompt.tolist() == expected
    assert example.answers[0][-1] == processor.end_id == reader.convert_tokens_to_ids(end)
    form = processor.own
    whole = form.start + form.between + form.user
    added = (str(t) for t in reader.added_tokens_decoder.values())
    assert set(form.special) == {t for t in added if t in whole and t != "<image>"}
    assert processor.end_id in processor.stop_ids
    assert processor.text(example.answers[0]) == "Red."


@pytest.mark.parametrize("name", DIALOGUES)
def test_the_users_special_tokens_stay_letters(name, tmp_path):
    source, special, kind, _, end = DIALOGUES[name]
    processor = own(source, tokenizer_with(kind, special), tmp_path)
    tokens = processor.tokenizer.all_special_ids
    count = lambda text: sum(
        i in tokens for i in processor.encode(Record("row 0", None, (text,))).prompt.tolist()
    )
    assert count(f"a {end} b <image> <|im_start|>{special}") == count("a")


@pytest.mark.parametrize("name", DIALOGUES)
def test_what_we_write_for_others_is_the_checkpoints_own(name, tmp_path):
    """apply_chat_template with our Jinja gives the string; cut again, it gives the same Template."""
    source, special, kind, whole, end = DIALOGUES[name]
    tokenizer = tokenizer_with(kind, special)
    form = own(source, tokenizer, tmp_path).own
    ours = chat.chat_template(form)
    written = chat.render(ours, tokenizer, TURNS, "<image>")
    assert written.removeprefix("<s>") == whole.removeprefix("<s>")
    assert chat.cut(ours, tokenizer, "<image>") == form


@pytest.mark.parametrize(
    "source, kind, name",
    [
        (HUB_15, sentencepiece, "vicuna_v1"),
        (HUMAN, sentencepiece, "vicuna_v1"),
        (HUB_15.replace("{{ c.text }}", "{{ c.text + ' ' }}"), sentencepiece, "vicuna_v1"),
        (HUB_MISTRAL.replace("END", "<\\s>"), sentencepiece, "mistral"),
        (HUB_MISTRAL.replace("END", "</s>"), sentencepiece, "mistral"),
        ("{{ bos_token }}" + HUB_MISTRAL.replace("END", "</s>"), sentencepiece, "mistral"),
        (YI, byte_level, "chatml"),
        ("<|im_start|>system\nAnswer the questions.<|im_end|>" + YI, byte_level, "chatml"),
        ("A chat about cars. " + HUB_15, sentencepiece, "checkpoint"),  # another system sentence
        (LLAMA2, sentencepiece, "checkpoint"),  # a BOS a turn
        (HUB_MISTRAL.replace("END", "</s>Next:"), sentencepiece, "checkpoint"),
        (QWEN, byte_level, "checkpoint"),
        (
            QWEN.replace("You are a helpful assistant.", "Answer the questions."),
            byte_level,
            "checkpoint",
        ),
    ],
)
def test_llavas_own_prompt_wins_over_the_hubs_form_of_it(source, kind, name, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(source)
    assert chat.choose(tmp_path, kind(), "<image>", "llama", False)[0] == name


@pytest.mark.parametrize(
    "llm, special, original, source, name",
    [
        ("llama", "", False, None, "vicuna_v1"),
        ("mistral", "", False, None, "mistral"),
        ("llama", "<|im_start|>", False, None, "chatml"),
        ("llama", "<|im_start|>", True, QWEN, "chatml"),  # 1.6-34b: the tokenizer is Yi's
        ("qwen2", "<|im_start|> <|im_end|>", True, QWEN, "checkpoint"),
        ("llama", SPECIAL["llama3"], True, LLAMA3, "checkpoint"),
        ("qwen2", "<|im_start|>", False, None, None),
        ("llama", SPECIAL["llama3"], True, None, None),
        ("llama", SPECIAL["phi3"], False, None, None),
    ],
)
def test_without_a_chat_template_llavas_rule_or_none(
    parts, tmp_path, llm, special, original, source, name
):
    """A Llama-3, Phi-3 or Qwen is not asked with vicuna_v1 or the 34B's chatml."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts / "llm")
    tokenizer.add_tokens(
        [AddedToken(t, special=True) for t in ("<image>", *special.split())], special_tokens=True
    )
    tokenizer.chat_template = source
    if name:
        assert chat.choose(tmp_path, tokenizer, "<image>", llm, original)[0] == name
        return
    with pytest.raises(
        BadInput, match=r"no chat template, and an LLM \(.*give --template: vicuna_v1"
    ):
        chat.choose(tmp_path, tokenizer, "<image>", llm, original)


@pytest.mark.parametrize(
    "source, why",
    [
        (PHI3.replace("<image>\n", ""), "does not write the image and the text of a user"),
        (PHI3.replace("{{ c.text }}", "{{ c.text | upper }}"), "depends on the texts"),
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{% for", "TemplateSyntaxError"),
        ("<image>" + PHI3.replace("<image>\n", ""), "does not write|not just before"),
        (PHI3.replace("<|{{ m.role }}|>\n", "<|{{ m.role }}|>\n{{ loop.index }} "), "depends on the texts"),
        (PHI3.replace("{{ c.text }}", "{{ c.text | replace('lamp', 'cat') }}"), "depends on the texts"),
        (PHI3 + "{% if add_generation_prompt %}<think>\n{% endif %}", "is asked for with"),
        (PHI3.replace("<image>\n", "<image><|end|>"), "special tokens beside it"),
    ],
)  # fmt: skip
def test_a_chat_template_that_cannot_be_followed_is_refused(tmp_path, source, why):
    tokenizer = tokenizer_with(byte_level, SPECIAL["phi3"])
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(BadInput, match=f"the chat template cannot be followed: .*({why})"):
        chat.choose(tmp_path, tokenizer, "<image>", "qwen2", False)


def test_the_date_in_a_prompt_is_not_that_of_the_run():
    """Llama-3.2's own default."""
    source = "{{ date_string }}: {{ messages[0].content[0].text }}"
    tokenizer = tokenizer_with(byte_level, SPECIAL["phi3"])
    assert chat.render(source, tokenizer, ["A cup."]) == "26 Jul 2024: A cup."


def test_tokens_that_depend_on_their_neighbours_are_refused(tmp_path):
    """A token that swallows the white space before it takes it from the user's text."""
    with pytest.raises(BadInput, match="the tokens of the chat template depend on what stands"):
        own(
            PHI3.replace("<|end|>", " <|end|>"),
            tokenizer_with(byte_level, SPECIAL["phi3"], lstrip=True),
            tmp_path,
        )


def test_a_composed_checkpoint_is_held_to_the_same(parts, tmp_path):
    shutil.copytree(parts / "llm", tmp_path / "llm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts / "llm")
    tokens = [AddedToken(t, special=True, lstrip=True) for t in SPECIAL["phi3"].split()]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.chat_template = PHI3.replace("<|end|>", " <|end|>")
    tokenizer.save_pretrained(tmp_path / "llm")
    with pytest.raises(BadInput, match="the tokens of the chat template depend on what stands"):
        compose(parts / "vision", tmp_path / "llm", template="checkpoint")


def test_the_file_is_found_as_autoprocessor_finds_it(tmp_path):
    """chat_template.jinja, chat_template.json, processor_config.json, the tokenizer's own."""
    tokenizer = byte_level()
    assert chat.chat_source(tmp_path, tokenizer) is None
    tokenizer.chat_template = {"default": "D", "tool_use": "T"}
    assert chat.chat_source(tmp_path, tokenizer) == "D"
    tokenizer.chat_template = "tokenizer"
    assert chat.chat_source(tmp_path, tokenizer) == "tokenizer"
    for name in ("processor_config.json", "chat_template.json"):
        (tmp_path / name).write_text(json.dumps({"chat_template": name}))
        assert chat.chat_source(tmp_path, tokenizer) == name
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert chat.chat_source(tmp_path, tokenizer) == "jinja"


@pytest.fixture(scope="module")
def chatty(parts, tmp_path_factory):
    """A LLaVA whose LLM has Llama-3's tokens and chat template, as transformers writes one: no note of a template."""
    folder = tmp_path_factory.mktemp("chatty")
    shutil.copytree(parts / "llm", folder / "llm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts / "llm")
    tokens = [AddedToken(t, special=True, normalized=False) for t in SPECIAL["llama3"].split()]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.chat_template = LLAMA3.replace("{{ bos_token }}", "<s>")
    tokenizer.save_pretrained(folder / "llm")
    save(*compose(parts / "vision", folder / "llm", template="checkpoint"), folder / "llava")
    config = json.loads((folder / "llava" / "config.json").read_text())
    assert config.pop("prompt_template") == "checkpoint"
    (folder / "llava" / "config.json").write_text(json.dumps(config))
    return folder


def test_a_checkpoint_is_asked_with_its_own_template(chatty, tmp_path):
    """Whether it notes so or not; AutoProcessor asks it in the same tokens; --template overrides it."""
    model, processor = load(chatty / "llava")
    assert processor.template == "checkpoint" and processor.own.end == "<|eot_id|>"
    prompt = processor.encode(Record("row 0", Path("x.png"), TURNS)).prompt
    theirs = transformers.AutoProcessor.from_pretrained(chatty / "llava")
    text = theirs.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TURNS[0]}]},
            {"role": "assistant", "content": [{"type": "text", "text": TURNS[1]}]},
            {"role": "user", "content": [{"type": "text", "text": TURNS[2]}]},
        ],
        add_generation_prompt=True,
    )
    assert text.startswith(
        "<s><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
    )
    one = [
        i
        for n, i in enumerate(prompt.tolist())
        if i != processor.image_token_id or prompt[n - 1] != i
    ]
    assert one == theirs.tokenizer(text, add_special_tokens=False).input_ids
    save(model, processor, tmp_path / "again")
    assert load(tmp_path / "again")[1].own == processor.own
    assert load(chatty / "llava", template="vicuna_v1")[1].template == "vicuna_v1"


def test_a_template_without_meaning_is_refused(parts, checkpoint, tmp_path):
    with pytest.raises(
        BadInput, match="--template checkpoint was given, and there is no chat template"
    ):
        checkpoints.compose(parts / "vision", parts / "llm", template="checkpoint")


# ---- the time that a template may take


def test_work_within_seconds():
    """What takes longer ends; what was there before, a handler and a timer, is there again."""
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 60)
        with pytest.raises(ValueError, match="^it takes longer than 0.05 seconds$"):
            with chat.within(0.05):
                time.sleep(5)
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
        signal.setitimer(signal.ITIMER_REAL, 0)
        with chat.within(5):
            pass
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
        signal.raise_signal(signal.SIGALRM)
        assert rang == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_in_another_thread_nothing_is_bounded():
    done = []

    def work():
        with chat.within(0.01):
            time.sleep(0.05)
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


def test_a_template_that_never_ends(monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match="longer than 0.2 seconds"):
        chat.render(loops, byte_level(), ["x"])


# ---- pieces, by hand


def test_what_a_template_is_given():
    """Roles by turn, the cue after a user's; content in parts, the image first, or as one string."""
    source = "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}{{ add_generation_prompt }}"
    of = lambda *given: chat.render(source, byte_level(), *given)
    text = lambda value: "{'type': 'text', 'text': '%s'}" % value
    assert of(["a", "b"]) == f"[user: [{text('a')}]][assistant: [{text('b')}]]False"
    assert of(["a"], "<image>") == f"[user: [{{'type': 'image'}}, {text('a')}]]True"
    assert of(["a", "b", "c"], "<image>", False) == "[user: <image>\na][assistant: b][user: c]True"
    assert of(["a"], "", False) == "[user: a]True"
    assert (
        chat.render("{{ 'x' + messages[0].content }}<\\s>", byte_level(), ["a"], "", False)
        == "xa" + byte_level().eos_token
    )


FORM = Template("S.", "U {}:", " {}~", end="<e>", between="|", after_image="!")


def test_a_dialogue_spelled():
    spell = lambda turns, image: chat.spelled(FORM, turns, image, "<e>")
    assert spell(("a", "b", "c"), "<image>") == "S.U <image>!a: b~<e>|U c:"
    assert spell(("a", "b", "c", "d"), "") == "S.U a: b~<e>|U c: d~<e>|"
    assert spell(("a",), "") == "S.U a:"


@pytest.mark.parametrize(
    "changed, same",
    [
        ({}, True),
        ({"start": ""}, True),
        ({"start": "S. "}, True),
        ({"start": "<s>" + TEMPLATES["vicuna_v1"].start}, True),
        ({"start": TEMPLATES["vicuna_v1"].start.replace("user", "human")}, True),
        ({"start": "Another."}, False),
        ({"user": " USER:{} ASSISTANT:"}, True),
        ({"user": "USER: {} BOT:"}, False),
        ({"answer": "{}", "between": " "}, True),
        ({"answer": "{}.", }, False),
        ({"end": "<|end|>"}, False),
        ({"after_image": ""}, False),
    ],
)  # fmt: skip
def test_which_prompt_is_llavas(changed, same):
    own = replace(TEMPLATES["vicuna_v1"], **changed)
    if changed.get("start") == "S. ":
        own = replace(own, start=TEMPLATES["vicuna_v1"].start.replace(" ", ""))
    tokenizer = sentencepiece()
    assert tokenizer.bos_token == "<s>"
    assert chat.is_form_of(own, "vicuna_v1", tokenizer) is same


def test_white_space_that_tokens_take():
    """Phi-3's tokens: in the first part and in a user's turn, and after the end token where it stands."""
    tokenizer = tokenizer_with(byte_level, "<|user|> <|end|>", rstrip=True)
    form = Template("<|user|>\n a", "<|user|> \n{}<|end|>\n", "{} <|user|> x", "<|end|>", "\n b")
    assert chat.swallow(form, tokenizer) == replace(
        form, start="<|user|>a", user="<|user|>{}<|end|>", between="b"
    )
    ends_user = replace(form, between="", user="\n{}")
    assert chat.swallow(ends_user, tokenizer).user == "{}"
    other = replace(form, end="eos")
    assert chat.swallow(other, tokenizer).between == "\n b"
    plain = tokenizer_with(byte_level, "<|user|> <|end|>")
    assert chat.swallow(form, plain) is form


def test_messages_name_the_folder_and_the_way_out(tmp_path):
    names = "give --template: vicuna_v1, mistral, chatml, plain"
    tokenizer = tokenizer_with(byte_level, SPECIAL["phi3"])
    at = f"^{re.escape(str(tmp_path))}: "
    with pytest.raises(BadInput, match=rf"{at}no chat template, and an LLM \(qwen2\) .*; {names}"):
        chat.choose(tmp_path, tokenizer, "<image>", "qwen2", False)
    (tmp_path / "chat_template.jinja").write_text("{{ 7 }}")
    for call, end in ((lambda: chat.choose(tmp_path, tokenizer, "<image>", "qwen2", False), f"; {names}"),
                      (lambda: chat.own_template(tmp_path, tokenizer, "<image>"), "\\.$")):  # fmt: skip
        told = (
            r"the chat template cannot be followed: it does not write .*it writes '7' for 1 turns\)"
        )
        with pytest.raises(BadInput, match=at + told + end):
            call()


def test_from_where_tokens_depend_on_their_neighbours(tmp_path):
    """The message shows the checkpoint's own text from the first other token on."""
    told = (
        f"^{re.escape(str(tmp_path))}: the tokens of the chat template depend on what stands beside "
        r"them, from '<\|end\|><\|assistant\|>\\nA lamp.<\|end\|><\|user\|>\\nWhere does it on; give --template: "
        r"vicuna_v1, mistral, chatml, plain\.$"
    )
    with pytest.raises(BadInput, match=told):
        own(
            PHI3.replace("<|end|>", " <|end|>"),
            tokenizer_with(byte_level, SPECIAL["phi3"], lstrip=True),
            tmp_path,
        )


@pytest.mark.parametrize("joined, told", [(":On", "On the desk; 2 of 3."), (":A", "A lamp.")])
def test_an_answer_that_is_joined_with_the_cue(tmp_path, joined, told):
    """Each answer of the sample is tried: the first letters decide."""
    tokenizer = byte_level()
    source = EACH + "{% if m.role == 'user' %}Q: " + PARTS + " A:{% else %}"
    source += "{{ m.content[0].text + eos_token }}{% endif %}{% endfor %}"
    assert own(source, tokenizer, tmp_path).own.user == "Q: {} A:"
    tokenizer.add_tokens([joined])
    with pytest.raises(BadInput, match=f"the tokenizer joins the end of the prompt with .*{told}"):
        own(source, tokenizer, tmp_path)
