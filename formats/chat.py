"""Chat templates: the one that a checkpoint states, as a `Template`; and ours, as Jinja for others.

A chat template is a program. It is run on dialogues of place-holders, and what it writes around
them is cut out. Whatever these pieces do not reproduce exactly is refused.
"""

import contextlib
import json
import os
import re
import signal
import threading
from dataclasses import replace

from common import BadInput, one_line, read_json
from data import OWN, TEMPLATES, Template

HOLDERS = ("PLACE0HOLDER", "PLACE1HOLDER", "PLACE2HOLDER")
SAMPLE = (
    "What is this?",
    "A lamp.",
    "Where does it stand?\nOne word.",
    "On the desk; 2 of 3.",
    "Is it red?",
)
SECONDS = 5  # that a template may take; those of the hub take milliseconds
TYPO = "<\\s>"  # llava-v1.6-mistral-7b-hf wrote it where it meant </s>


def choose(folder, tokenizer, image_token, llm_type, original):
    """The prompt template of a checkpoint that notes none -> (name, `Template` if it is OWN).

    - What it was trained with, if its chat template is that of LLaVA-1.5 or 1.6 (see `is_form_of`).
    - Otherwise its chat template.
    - Without one, or if LLaVA's own code wrote the checkpoint (original), which does not read it:
      what LLaVA takes for such an LLM. There is no such rule for Llama-3, Phi-3 or Qwen.
    """
    source = chat_source(folder, tokenizer)
    guess = by_kind(tokenizer, llm_type)
    if guess and (original or not source):
        return guess, None
    if not source:
        raise BadInput(
            f"{folder}: no chat template, and an LLM ({llm_type}) for which LLaVA has no prompt of "
            f"its own; give --template: {', '.join(TEMPLATES)}."
        )
    try:
        own = cut(source, tokenizer, image_token)
    except ValueError as error:
        raise BadInput(
            f"{folder}: the chat template cannot be followed: {error}; "
            f"give --template: {', '.join(TEMPLATES)}."
        ) from None
    known = [name for name in TEMPLATES if is_form_of(own, name, tokenizer)]
    return (known[0], None) if known else (OWN, own)


def own_template(folder, tokenizer, image_token):
    """What `--template checkpoint` means: the chat template of a folder, whatever it is."""
    source = chat_source(folder, tokenizer)
    if not source:
        raise BadInput(f"{folder}: --template {OWN} was given, and there is no chat template.")
    try:
        return cut(source, tokenizer, image_token)
    except ValueError as error:
        raise BadInput(f"{folder}: the chat template cannot be followed: {error}.") from None


def by_kind(tokenizer, llm_type):
    """The prompt that LLaVA's own code takes for this kind of LLM; None if it has none."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    if llm_type == "mistral":
        return "mistral"
    if llm_type == "llama" and "<|im_start|>" in added:
        return "chatml"  # 1.6-34b, on a Yi
    return None if any(token.startswith("<|") for token in added) else "vicuna_v1"


def is_form_of(own, name, tokenizer):
    """Does a chat template mean one of LLaVA-1.5's and 1.6's prompts?

    The hub's are not quite what was trained: no system sentence or another one ("a curious human"),
    no end token after an answer or a misspelled one, spaces more or less. The papers trained and
    evaluated with LLaVA's own, so that one is taken.
    """
    ours = TEMPLATES[name]
    squeeze = lambda text: text.replace(" ", "")
    start = own.start.removeprefix(tokenizer.bos_token or "")
    systems = ("", ours.start, ours.start.replace("user", "human"))
    return (
        squeeze(start) in map(squeeze, systems)
        and squeeze(own.user) == squeeze(ours.user)
        and squeeze(own.between + own.answer) == squeeze(ours.between + ours.answer)
        and own.end in ("eos", ours.end)
        and own.after_image == ours.after_image
    )


# ---- the checkpoint's chat template, cut into pieces


def chat_source(folder, tokenizer):
    """The Jinja text of a folder's chat template, in the order in which AutoProcessor looks."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        if source := read_json(folder / name, {}).get("chat_template"):
            return source
    source = tokenizer.chat_template
    return source.get("default") if isinstance(source, dict) else source


@contextlib.contextmanager
def within(seconds):
    """Inside, work that takes longer ends with a ValueError: a template may hold loops in loops.

    The system's timer interrupts the main thread; in another one nothing is bounded.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        """The signal: leave the renderer by an error."""
        raise ValueError(f"it takes longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, before)


def render(source, tokenizer, turns, image_token="", parts=True):
    """What apply_chat_template writes for user, assistant, user ... turns.

    image_token: put the image into the first turn. parts: as the processors' templates want the
    content, a list of parts; otherwise as the LLMs' do, one string.

    transformers renders in Jinja's sandbox: a template reaches no file, module or attribute of ours.
    """
    messages = []
    for i, text in enumerate(turns):
        image = bool(image_token) and i == 0
        content = [{"type": "image"}] * image + [{"type": "text", "text": text}]
        if not parts:
            content = f"{image_token}\n{text}" if image else text
        messages.append({"role": "assistant" if i % 2 else "user", "content": content})
    with within(SECONDS):
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=source,
            tokenize=False,
            add_generation_prompt=len(turns) % 2 == 1,
            date_string="26 Jul 2024",  # Llama-3.2 would write the day of the run into the prompt
        )
    return text.replace(TYPO, tokenizer.eos_token)


def cut(source, tokenizer, image_token):
    """A chat template -> `Template`. ValueError: its output is not made of fixed pieces.

    A template that closes an answer with nothing gets the tokenizer's end token: without one a
    model would not learn to stop.
    """
    added = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)

    def between(turns, parts, image=""):
        """What stands before, between and after the turns."""
        text = render(source, tokenizer, turns, image, parts)
        pieces = re.split("|".join(turns), text)
        if len(pieces) != len(turns) + 1:
            raise ValueError(f"it writes {text!r:.200} for {len(turns)} turns")
        return pieces

    # content as a list of parts, or as one string
    for parts in (True, False):
        try:
            opening, cue = between(HOLDERS[:1], parts)
            with_image, _ = between(HOLDERS[:1], parts, image_token)
            if image_token in with_image:
                break
        except Exception as error:  # Jinja's, or the template's own raise_exception
            failure = one_line(error)
    else:
        raise ValueError(f"it does not write the image and the text of a user ({failure})")

    # the image stands before the first text
    if not with_image.startswith(opening + image_token):
        raise ValueError(f"the image is not just before the user's text ({with_image!r:.200})")
    after_image = with_image[len(opening + image_token) :]

    # an answer: what leads to it, what ends it, what stands before the next turn
    _, lead, middle, _ = between(HOLDERS, parts)
    *_, last = between(HOLDERS[:2], parts)
    if not lead.startswith(cue):
        raise ValueError(f"an answer is asked for with {cue!r:.80} and written after {lead!r:.80}")
    end = next(iter(re.findall("|".join(map(re.escape, added)), last)), "")
    tail, rest = last.partition(end)[0] if end else "", middle
    if end:
        if not middle.startswith(tail + end):
            raise ValueError(f"answers end with {last!r:.80} or with {middle!r:.80}")
        rest = middle[len(tail + end) :]

    # what the first and a later user turn share is the user's
    before = os.path.commonprefix([opening[::-1], rest[::-1]])[::-1]
    template = Template(
        start=opening.removesuffix(before),
        user=f"{before}{{}}{cue}",
        answer=f"{lead.removeprefix(cue)}{{}}{tail}",
        end="eos" if end in ("", tokenizer.eos_token) else end,
        between=rest.removesuffix(before),
        after_image=after_image,
    )
    whole = "".join((template.start, template.between, template.user))
    special = tuple(token for token in added if token in whole and token != image_token)
    letters = template.answer + after_image
    if any(token in letters for token in special) or "{}" in opening + rest + lead + tail:
        raise ValueError(f"an answer or an image has special tokens beside it ({letters!r:.80})")
    template = replace(template, special=special)

    # other texts must give the same
    for image in ("", image_token):
        theirs = render(source, tokenizer, SAMPLE, image, parts)
        if theirs != spelled(template, SAMPLE, image, end):
            raise ValueError(f"what it writes depends on the texts ({theirs!r:.300})")
    return swallow(template, tokenizer)


def swallow(template, tokenizer):
    """The template without the white space that its tokens take in: Phi-3's have `rstrip`."""
    tokens = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.rstrip]
    if not tokens:
        return template
    taken = re.compile(rf"({'|'.join(map(re.escape, tokens))})\s+")
    fields = {name: taken.sub(r"\1", getattr(template, name)) for name in ("start", "user")}
    if template.end in tokens:
        name = "between" if template.between else "user"
        fields[name] = fields.get(name, template.between).lstrip()
    return replace(template, **fields)


def spelled(template, turns, image_token, end):
    """A dialogue in a template, as one string."""
    text = template.start
    for i, turn in enumerate(turns):
        if i % 2:
            text += template.answer.replace("{}", turn) + end + template.between
            continue
        image = image_token + template.after_image if image_token and i == 0 else ""
        text += template.user.replace("{}", image + turn)
    return text


def check_ids(processor, folder):
    """Refuse an own template whose pieces do not give the tokens of the whole string."""
    own, tokenizer = processor.own, processor.tokenizer
    image = tokenizer.convert_ids_to_tokens(processor.image_token_id)
    end = tokenizer.eos_token if own.end == "eos" else own.end
    turns = []
    for i, text in enumerate(SAMPLE):
        pieces = processor.answer_pieces(text) if i % 2 else processor.user_pieces(text, i == 0, 1)
        turns.append((pieces, bool(i % 2)))
    ours, _ = processor.ids_of(turns, folder)
    whole = spelled(own, SAMPLE, image, end)
    theirs = processor.bos_ids + tokenizer.encode(
        whole, add_special_tokens=False, split_special_tokens=False
    )
    if ours != theirs:
        at = next(
            i for i, pair in enumerate(zip(ours + [None], theirs + [None])) if len({*pair}) > 1
        )
        raise BadInput(
            f"{folder}: the tokens of the chat template depend on what stands beside them, from "
            f"{tokenizer.decode(theirs[at:])!r:.60} on; give --template: {', '.join(TEMPLATES)}."
        )


# ---- ours, for other tools


def chat_template(template):
    """A `Template` as Jinja, for apply_chat_template of transformers."""
    before, cue = template.user.split("{}")
    lead, tail = template.answer.split("{}")
    quote = json.dumps
    end = "eos_token" if template.end == "eos" else quote(template.end)
    later = f"{{{{ {quote(template.between)} if not loop.first else '' }}}}"

    return (
        "{% macro body(content) %}{% if content is string %}{{ content }}{% else %}"
        "{% for part in content if part.type == 'image' %}"
        f"{{{{ {quote('<image>' + template.after_image)} }}}}{{% endfor %}}"
        "{% for part in content if part.type == 'text' %}{{ part.text }}{% endfor %}"
        "{% endif %}{% endmacro %}"
        f"{{{{ {quote(template.start)} }}}}"
        "{% for message in messages %}"
        "{% if message.role == 'user' %}"
        f"{later if template.between else ''}"
        f"{{{{ {quote(before)} + body(message.content) + {quote(cue)} }}}}"
        "{% elif message.role == 'assistant' %}"
        f"{{{{ {quote(lead)} + body(message.content) + {quote(tail)} + {end} }}}}"
        "{% else %}{{ raise_exception('the roles are user and assistant') }}{% endif %}"
        "{% endfor %}"
    )
