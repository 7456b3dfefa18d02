"""Data files as downloaded -> records. The keys of the first row choose the reader (`LAYOUTS`).

    layout          recognised by these keys          pairs that a row gives: chosen > rejected
    rlhf_v          text + origin_dataset             corrected answer > original
    hadpo           question + chosen + reject        chosen > reject (HA-DPO)
                    + image_id + correct
    seva            question + chosen + reject        chosen > reject
                    + image_id
    rlaif_v         question + chosen + rejected      chosen > rejected
                    + origin_dataset or ds_name
    mllm_dpo        question + chosen + rejected      chosen > rejected: dicts {from, value}, their
                    + ref_win_logp or                 Python repr, or whole dialogues
                    Helpfulness_gpt4v
    mmpr            question + chosen + rejected      chosen > rejected: strings
    vlfeedback      completions + models              every two answers with unequal mean rating
                                                      (Silkie)
    povid           conversations                     conversations > rejected_conversations
                    + rejected_conversations
    llava_rlhf      conversations + output_1          the output that `preference` (1 or 2) names
                    + output_2 + preference           > the other
    llama_factory   conversations                     chosen > rejected: one turn each, the last
                    + chosen + rejected               (LLaMA-Factory)
    llava_instruct  conversations                     none: instruction data for sft.py
    helpsteer       prompt + response + helpfulness   one per prompt: best > a worse one
                                                      (`pairs_by_quality`)
    helpsteer2      prompt + response_1 + response_2  the first > the second where the strength is
                    + preference_strength             negative, else the second > the first
    trl             chosen + rejected (+ prompt)      chosen > rejected: strings, or lists of
                                                      {role, content}; mDPO's data, whose prompt
                                                      is Vicuna's template with the question
    problem         problem + solution or answer      none: problems with their right answer, for
                                                      grpo.py (R1-V's CLEVR and GEOQA, geometry3k,
                                                      multimodal-open-r1, VLM-R1's RefCOCO)

Left out, and counted: rows of hadpo whose `correct` is true; in helpsteer2, the validation split
and rows of strength 0.

Files are parquet, JSON arrays or JSON lines; the JSON may be gzipped. rlhf_v may also be Muffin's
.tsv.

The image of a row is a path below --images (the policy: `files.ImageFolder`), or it is inside the
file itself (parquet, tsv). Every layout reads the same columns for it (`PICTURE`). If they are
missing, null, empty or NaN, the row is text-only, in layouts that have such rows. A row with
several images is refused; so is one with a picture, film or sound in a column that is not read
(`refuse_unread_media`). Other columns are ignored.

`<image>` in the first human turn is the place of the image, in every layout (`take_placeholder`).
HelpSteer's rows have no images; there it is text.

Not read: HA-DPO's desc_data.json, which names neither the question nor the image file. Written as
rows of trl, it is read.
"""

import ast
import base64
import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from common import BadInput
from data import Record
from formats.files import (
    ImageFolder,
    PackedImage,
    image_folders,
    image_size,
    open_header,
    rows,
)


def captions(path):
    """LLaVA-RLHF's image_to_caption.json: facts about images, for a reward model.

    -> {image file name: [text, ...]}.
    """
    try:
        by_image = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error}).") from None
    if not isinstance(by_image, dict):
        raise BadInput(
            f"{path}: holds {type(by_image).__name__}; "
            "an object {image: [caption, ...]} is needed."
        )

    for image, texts in by_image.items():
        if not isinstance(texts, list) or not texts:
            raise BadInput(
                f"{path}, {image!r:.80}: {texts!r:.80} was found; a list of captions is needed."
            )
        try:
            by_image[image] = [text_field(text, f"[{i}]") for i, text in enumerate(texts)]
        except BadInput as error:
            raise BadInput(f"{path}, {image!r:.80}: {error}") from None
    return by_image


# ---- cells


def text_field(value, key):
    """A non-empty string without the white space around it, or BadInput that names the key."""
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"`{key}` is {value!r:.80}; a non-empty string is needed.")
    # JSON can write half of a surrogate pair; no tokenizer can read it
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise BadInput(
            f"`{key}` holds half of a surrogate pair: {value!a:.80}; whole characters are needed."
        )
    return value.strip()


def answer_field(value, key):
    """As `text_field`. A number, or a list of numbers such as a box, becomes its text."""
    numbers = value if isinstance(value, list) else [value]
    if numbers and all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        value = json.dumps(value)
    return text_field(value, key)


# The columns that hold the image of a row, in every layout: `image`, `images`, `image_path`,
# `img_path`, `image_file_name`, `photo_url`, ...; `image_0`, `image_1`, ... hold one each.
PICTURE = re.compile(
    r"(?:image|img|picture|photo)s?(?:_?(?:path|file|name|file_?name|url)s?|_?(?P<number>\d+))?",
    re.IGNORECASE,
)
# What else a column of pictures, films or sounds may be called, or hold.
MEDIA = re.compile(r"image|img|picture|photo|pixel|video|audio", re.IGNORECASE)
MEDIA_FILE = re.compile(r"\S+\.(?:jpe?g|png|webp|gif|bmp|tiff?|mp4|avi|wav|mp3)", re.IGNORECASE)


def picture(row, images, *more):
    """The image that a row names: Path or PackedImage; None if it names none.

    more: cells that name it in places of their own. An image inside the file counts before paths.
    Of several paths those that exist count; they must be of one file.
    """
    one_each, cells = [], list(more)
    for key, cell in row.items():
        if match := PICTURE.fullmatch(key):
            found = named_in(cell)
            if len(found) > 1:
                raise BadInput(f"the row has {len(found)} pictures; one a row is accepted.")
            cells += found
            one_each += found if match["number"] else []
    packed = {cell for cell in cells if isinstance(cell, PackedImage)}
    count = max(len(one_each), len(packed))
    if count > 1:
        raise BadInput(f"the row has {count} pictures; one a row is accepted.")
    if packed:
        return packed.pop()
    if not cells:
        return None

    if len(cells) > 1:
        found = {images.look_up(name)[0]: name for name in cells}
        found.pop(None, None)
        if len(found) > 1:
            listed = " and ".join(f"{name!r:.80}" for name in found.values())
            raise BadInput(f"the row has the pictures {listed}; one a row is accepted.")
    return images.find(*cells)


def named_in(cell):
    """The images of a cell, a list of PackedImages and paths: a cell may be null, "", or NaN."""
    if isinstance(cell, list):
        return [name for c in cell for name in named_in(c)]
    if isinstance(cell, dict) and not cell.get("bytes"):
        cell = cell.get("path") or cell.get("url")
    # pandas writes NaN for a missing cell; NaN != NaN
    return [cell] if cell and cell == cell else []


def needed_picture(row, images):
    """As `picture`, for a layout that has an image in every row."""
    image = picture(row, images)
    if image is None:
        raise BadInput("the row names no image, which this layout has in every row.")
    return image


def refuse_unread_media(row, layout, image):
    """Refuse a row with a picture, film or sound where no reader looks for one.

    Read as text alone, the row would have another meaning. image: what was read.
    """
    texts = {name for key in LAYOUTS[layout][0] for name in key.split("|")} | {"prompt"}
    for key, cell in row.items():
        if image is None:
            unread = holds_media(key, cell, key in texts)
        else:  # beside the picture only another one inside the file, or a film
            packed = any(isinstance(name, PackedImage) for name in named_in(cell))
            film = re.search("video|audio", key, re.IGNORECASE) and named_in(cell)
            unread = film or packed and not PICTURE.fullmatch(key)
        if unread:
            raise BadInput(
                f"`{key}` is {cell!r:.80}, which is not read as a picture; accepted are `image`, "
                "`images`, `image_path` and `image_0`, one picture a row."
            )


def holds_media(key, cell, is_text=False):
    """Whether a cell of any column may hold or name a picture, film or sound."""
    if isinstance(cell, dict):
        return bool(cell.get("bytes")) or any(holds_media(k, c, is_text) for k, c in cell.items())
    if isinstance(cell, list):
        return any(holds_media(key, c, is_text) for c in cell)
    if isinstance(cell, (PackedImage, bytes)):
        return True
    if not cell or cell != cell:
        return False
    is_name = isinstance(cell, str) and MEDIA_FILE.fullmatch(cell)
    return bool(MEDIA.search(key) or is_name and not is_text)


def dialogue(conversations, key, used=None):
    """LLaVA turns -> texts [user, assistant, ...][:used].

    Turns before the first human turn are dropped.
    """
    if isinstance(conversations, list) and len(conversations) == 1:
        if isinstance(conversations[0], list):
            conversations = conversations[0]  # LLaVA-RLHF nests some dialogues one level deeper
    if not isinstance(conversations, list) or not all(isinstance(t, dict) for t in conversations):
        raise BadInput(
            f"`{key}` is {type(conversations).__name__}; a list of {{from, value}} turns is needed."
        )

    roles = [_role(turn) for turn in conversations]
    first = roles.index("human") if "human" in roles else len(roles)
    if set(roles[:first]) - {"gpt"}:
        raise BadInput(
            f"`{key}` has the roles {roles}; before the first human turn only gpt may speak, and a "
            "system text is written by the template."
        )
    roles = roles[first:]
    turns = conversations[first:]
    if roles != ["human", "gpt"] * (len(roles) // 2) or not roles:
        raise BadInput(
            f"`{key}` has the roles {roles}; human and gpt must alternate, from human to gpt."
        )
    return [
        (answer_field if i % 2 else text_field)(
            turn.get("value", turn.get("content")), f"{key}[{first + i}].value"
        )
        for i, turn in enumerate(turns[:used])
    ]


def _role(turn):
    """Who speaks: human or gpt, as LLaVA writes it in `from`. user and assistant mean the same."""
    said = turn.get("from", turn.get("role"))
    if not isinstance(said, str):
        return f"{said!r:.80}"
    return {"user": "human", "assistant": "gpt"}.get(said, said)


def take_placeholder(turns, image, required=False):
    """The turns without the placeholder of the image. The one rule for `<image>`, in all layouts:

    Once in the first human turn of a row with an image, it is the place of the image; LLaVA moves
    the image to the front, and so it is here. It may be missing; not so in LLaVA's conversations
    (required), where a row with an image must hold it. A row without an image must not hold it
    there. With the placeholder in its place, or without an image, `<image>` in any later turn is
    text; in an answer it always is.
    """
    count = turns[0].count("<image>")
    if count > 1:
        raise BadInput(
            f"the first human turn holds `<image>` {count} times; one picture a row is accepted."
        )
    if count and image is None or required and not count and image is not None:
        has = "an image" if image is not None else "no image"
        raise BadInput(
            f"the row has {has}, but its first human turn holds `<image>` {count} times."
        )
    if image is not None and not count and any("<image>" in turn for turn in turns[2::2]):
        raise BadInput("a later human turn holds `<image>`; only the first may show a picture.")
    return (text_field(turns[0].replace("<image>", ""), "first human turn"), *turns[1:])


def number(value, key):
    """A finite number from a number or a string; BadInput names the key."""
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        result = math.nan
    if not math.isfinite(result):
        raise BadInput(f"`{key}` is {value!r:.80}; a number is needed.")
    return result


def pair_of(chosen, rejected, what):
    """Two dialogues that differ only in the last answer -> (turns, (chosen, rejected)).

    A dialogue: [user, assistant, ..., assistant]. what: how a message names the two.
    """
    if chosen[:-1] != rejected[:-1]:
        raise BadInput(f"{what} differ before their last turn; only the last answer may.")
    return chosen[:-1], (chosen[-1], rejected[-1])


# ---- rows to records: one small function per layout, (row, where, images, notes) -> records.
# What a function leaves out on purpose, it counts in notes.


def _rlhf_v(row, where, images, notes):
    text = row["text"]
    if isinstance(text, str):
        try:
            text = json.loads(text)
        except (ValueError, RecursionError):
            try:
                text = json.loads(base64.b64decode(text, validate=True))
            except (ValueError, RecursionError):
                raise BadInput("`text` is neither JSON nor base64 of JSON.") from None
    if isinstance(text, list) and len(text) == 3:
        text = dict(zip(("question", "chosen", "rejected"), text))
    if not isinstance(text, dict):
        raise BadInput(
            f"`text` is {type(text).__name__}; question, chosen and rejected are needed."
        )

    image = needed_picture(row, images)
    keys = ("question", "chosen", "rejected")
    question, *pair = (text_field(text.get(key), f"text.{key}") for key in keys)
    return [Record(where, image, take_placeholder((question,), image), tuple(pair))]


def _flat(row, loser="rejected"):
    """question, chosen and the loser of a row that holds them as strings."""
    return (text_field(row[key], key) for key in ("question", "chosen", loser))


def _rlaif_v(row, where, images, notes):
    question, *pair = _flat(row)
    image = needed_picture(row, images)
    return [Record(where, image, take_placeholder((question,), image), tuple(pair))]


def _seva(row, where, images, notes):
    question, *pair = _flat(row, "reject")
    image = images.find(row["image_id"])
    return [Record(where, image, take_placeholder((question,), image), tuple(pair))]


def _hadpo(row, where, images, notes):
    if row["correct"]:
        notes["rows left out: the model had answered correctly"] += 1
        return []
    question, *pair = _flat(row, "reject")
    n = row["image_id"]
    # Visual Genome comes in two folders
    image = images.find(f"{n}.jpg", f"VG_100K/{n}.jpg", f"VG_100K_2/{n}.jpg")
    return [Record(where, image, take_placeholder((question,), image), tuple(pair))]


def _mmpr(row, where, images, notes):
    question, *pair = _flat(row)
    image = picture(row, images)
    return [Record(where, image, take_placeholder((question,), image), tuple(pair))]


def _turns(cell, key, role):
    """A cell of mllm_dpo -> list of turns.

    The cell is text, {from, value}, a list of these, or the Python repr of a dict or list.
    """
    if isinstance(cell, str) and cell.lstrip().startswith(("{", "[")):
        try:
            cell = ast.literal_eval(cell.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise BadInput(
                f"`{key}` is {cell!r:.80}, which is not the repr of a {{from, value}} dict."
            ) from None
    if isinstance(cell, str):
        cell = {"from": role, "value": cell}
    return cell if isinstance(cell, list) else [cell]


def _mllm_dpo(row, where, images, notes):
    image = picture(row, images)
    question = _turns(row["question"], "question", "human")
    chosen = _turns(row["chosen"], "chosen", "gpt")
    rejected = _turns(row["rejected"], "rejected", "gpt")

    before = chosen[:-1] or question  # a list is the whole dialogue, with the question
    chosen = dialogue(before + chosen[-1:], "chosen")
    rejected = dialogue((rejected[:-1] or before) + rejected[-1:], "rejected")
    turns, pair = pair_of(chosen, rejected, "chosen and rejected")
    return [Record(where, image, take_placeholder(turns, image), pair)]


def _vlfeedback(row, where, images, notes):
    prompt = text_field(row.get("prompt"), "prompt")
    completions = row["completions"]
    if isinstance(completions, dict):  # load_dataset makes this of a list of structs
        lists = list(completions.values())
        if not all(isinstance(v, list) and len(v) == len(lists[0]) for v in lists):
            raise BadInput("`completions` is an object whose values are not lists of one length.")
        completions = [dict(zip(completions, values)) for values in zip(*lists)]
    if not isinstance(completions, list):
        raise BadInput(
            f"`completions` is {completions!r:.80}; a list of {{annotations, response}} is needed."
        )

    # the answers and their mean ratings
    scores, answers = [], []
    for i, completion in enumerate(completions):
        ratings = completion.get("annotations") if isinstance(completion, dict) else None
        if (
            not isinstance(ratings, dict)
            or not all(isinstance(r, dict) and "Rating" in r for r in ratings.values())
            or not ratings
        ):
            raise BadInput(
                f"completions[{i}].annotations is {ratings!r:.80}; "
                "an object of {Rating, Rationale} is needed."
            )
        answers.append(text_field(completion.get("response"), f"completions[{i}].response"))
        scores.append(_mean_rating(ratings))

    image = picture(row, images)
    if not image:
        image = images.find(f"{row.get('id')}.jpg", f"{row.get('id')}.png")
    turns = take_placeholder((prompt,), image)

    # every two answers
    records = []
    for i in range(len(answers)):
        for j in range(i + 1, len(answers)):
            if scores[i] is None or scores[j] is None:
                notes["pairs left out: a rating is not a number"] += 1
            elif scores[i] == scores[j]:
                notes["pairs left out: equal ratings"] += 1
            elif answers[i] == answers[j]:
                notes["pairs left out: the same answer, rated twice"] += 1
            else:
                better, worse = (i, j) if scores[i] > scores[j] else (j, i)
                pair = (answers[better], answers[worse])
                place = f"{where}, completions {better} > {worse}"
                records.append(Record(place, image, turns, pair))
    return records


def _mean_rating(ratings):
    """The mean over all aspects, or None if one of them is not a number ("N/A").

    Silkie leaves out the pairs of such an answer.
    """
    try:
        return sum(number(r["Rating"], "Rating") for r in ratings.values()) / len(ratings)
    except BadInput:
        return None


def _povid(row, where, images, notes):
    image = picture(row, images)
    dialogues = [dialogue(row[key], key) for key in ("conversations", "rejected_conversations")]
    turns, pair = pair_of(*dialogues, "conversations and rejected_conversations")
    return [Record(where, image, take_placeholder(turns, image, required=True), pair)]


def _llama_factory(row, where, images, notes):
    image = picture(row, images)
    if row.get("system"):
        raise BadInput("`system` is not empty; the template writes the system text.")
    before = row["conversations"] if isinstance(row["conversations"], list) else []
    both = [before + _turns(row[key], key, "gpt") for key in ("chosen", "rejected")]
    dialogues = [dialogue(turns, key) for turns, key in zip(both, ("chosen", "rejected"))]
    turns, pair = pair_of(*dialogues, "chosen and rejected")
    return [Record(where, image, take_placeholder(turns, image), pair)]


def _llava_rlhf(row, where, images, notes):
    image = picture(row, images)
    # the last answer is left out: it is only a placeholder, and may be empty
    turns = dialogue(row["conversations"], "conversations", -1)

    outputs = []
    for key in ("output_1", "output_2"):
        value = row[key].get("value") if isinstance(row[key], dict) else None
        outputs.append(text_field(value, f"{key}.value"))

    if row["preference"] not in (1, 2) or isinstance(row["preference"], bool):
        raise BadInput(f"`preference` is {row['preference']!r}; 1 or 2 is needed.")
    pair = tuple(outputs if row["preference"] == 1 else outputs[::-1])
    return [Record(where, image, take_placeholder(turns, image, required=True), pair)]


# `caption_type` of Fact-RLHF's prompts (RLHF/data_utils/constants.py) -> the right answer
RIGHT = {1: "", 2: "A", 3: "B", 4: "C", 5: "D", 6: "No", 7: "Yes"}


def _llava_instruct(row, where, images, notes):
    image = picture(row, images)
    turns = dialogue(row["conversations"], "conversations")
    kind = row.get("caption_type")  # only in Fact-RLHF's prompts for PPO
    if kind is not None and (type(kind) is not int or kind not in RIGHT):
        raise BadInput(f"`caption_type` is {kind!r:.80}; a whole number from 1 to 7 is needed.")
    right = RIGHT.get(kind) if len(turns) == 2 else None  # it speaks of the first question
    before = take_placeholder(turns[:-1], image, required=True)
    return [Record(where, image, before, (turns[-1],), right=right)]


def _helpsteer(row, where, images, notes):
    quality = sum(number(row.get(key), key) for key in ("helpfulness", "correctness", "coherence"))
    turns = _steer_turns(row["prompt"])
    return [Record(where, None, turns, (text_field(row["response"], "response"),), quality)]


def _steer_turns(prompt):
    """The turns of HelpSteer's prompt.

    It holds the earlier turns too; `<extra_id_1>Assistant` and `<extra_id_1>User` separate them.
    """
    turns = re.split(r"\n?<extra_id_1>(?:Assistant|User)\n", text_field(prompt, "prompt"))
    if len(turns) % 2 == 0:
        raise BadInput(
            f"`prompt` holds {len(turns)} turns parted by <extra_id_1>; "
            "the last must be the user's."
        )
    return tuple(text_field(turn, f"prompt, turn {i}") for i, turn in enumerate(turns))


def _helpsteer2(row, where, images, notes):
    strength = number(row["preference_strength"], "preference_strength")
    pair = [text_field(row[key], key) for key in ("response_1", "response_2")]
    if row.get("split") == "validation":
        notes["rows left out: split is validation"] += 1
        return []
    if strength == 0:
        notes["rows left out: preference_strength is 0"] += 1
        return []

    turns = _steer_turns(row["prompt"])
    return [Record(where, None, turns, tuple(pair if strength < 0 else pair[::-1]))]


def _messages(cell, key, role):
    """A cell of trl, text or list of {role, content} -> ([(role, text), ...], [image cell, ...]).

    Only the first user turn may hold images: an image's block becomes `<image>`, and what it names
    one of the cells.
    """
    if isinstance(cell, str):
        cell = [{"role": role, "content": cell}]
    if not isinstance(cell, list) or not cell or not all(isinstance(m, dict) for m in cell):
        raise BadInput(
            f"`{key}` is {cell!r:.80}; a string or a list of {{role, content}} is needed."
        )

    turns = []
    named = []
    for i, message in enumerate(cell):
        content = message.get("content")
        name = f"{key}[{i}].content"
        if isinstance(content, list):
            kinds = [block.get("type") if isinstance(block, dict) else None for block in content]
            if not all(kind in ("image", "text") for kind in kinds):
                raise BadInput(
                    f"`{name}` has blocks of the types {kinds}; image and text are accepted."
                )
            if "image" in kinds and (i or message.get("role") != "user"):
                raise BadInput(f"`{name}` shows a picture; only the first user turn may.")
            pictures = [block for block in content if block["type"] == "image"]
            named += [block.get(k) for block in pictures for k in block.keys() - {"type", "text"}]
            texts = [
                "<image>" if block["type"] == "image" else block.get("text") or ""
                for block in content
            ]
            if not all(isinstance(text, str) for text in texts):
                raise BadInput(f"`{name}` has blocks whose text is none: {texts!r:.80}.")
            content = "".join(texts)
        turns.append((message.get("role"), text_field(content, name)))
    return turns, named


def _question_of(prompt):
    """The question in Vicuna's whole template, as mDPO's prompts are; any other prompt as it is."""
    whole = "A chat between a curious ", "ASSISTANT:"
    if not isinstance(prompt, str) or not re.fullmatch(".*".join(whole), prompt.strip(), re.DOTALL):
        return prompt
    turns = re.split(r"\s(?:USER|ASSISTANT):", prompt.strip())[1:-1]
    if len(turns) != 1:
        raise BadInput(f"`prompt` is Vicuna's template with {len(turns)} turns; one is accepted.")
    return turns[0]


def _trl(row, where, images, notes):
    prompt, named = [], []
    if row.get("prompt"):
        prompt, named = _messages(_question_of(row["prompt"]), "prompt", "user")

    dialogues = []
    for key in ("chosen", "rejected"):
        if not prompt and isinstance(row[key], str):
            raise BadInput(
                f"`{key}` is a string and there is no `prompt`; "
                "nothing shows where the answer begins."
            )
        answer, in_answer = _messages(row[key], key, "assistant")
        roles = [role for role, _ in prompt + answer]
        # a system turn is refused: the template writes the system text
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise BadInput(
                f"prompt and {key} have the roles {roles}; "
                "user and assistant must alternate, from user to assistant."
            )
        dialogues.append([text for _, text in prompt + answer])
        named += in_answer

    image = picture(row, images, *[name for cell in named for name in named_in(cell)])
    dialogues = [[*take_placeholder(d[:-1], image), d[-1]] for d in dialogues]
    turns, pair = pair_of(*dialogues, "chosen and rejected")
    return [Record(where, image, tuple(turns), pair)]


def _problem(row, where, images, notes):
    image = picture(row, images)
    question = text_field(row["problem"], "problem")
    key = "solution" if row.get("answer") is None and "solution" in row else "answer"
    answer = answer_field(row.get(key), key)

    # RefCOCO's rows state the size of the picture that a box is measured in
    stated = row.get("height"), row.get("width")
    if isinstance(row.get(key), list) and image is not None and None not in stated:
        height, width = image_size(image)
        if stated != (height, width):
            raise BadInput(
                f"`{key}` is a box in a picture of {stated[1]} x {stated[0]} pixels; "
                f"the file has {width} x {height}."
            )
    return [Record(where, image, take_placeholder((question,), image), (answer,))]


def pairs_by_quality(rated, notes):
    """Records of one rated answer each -> at most one pair per prompt.

    The pair: the best answer > a random one of those whose quality is at least 2 lower. Quality is
    helpfulness + correctness + coherence. This is the rule of the code of Li et al. 2024, who used
    it on answers of their own model.
    """
    groups, rng, records = {}, random.Random(0), []
    for record in rated:
        groups.setdefault((record.image, record.turns), []).append(record)

    for group in groups.values():
        best = max(group, key=lambda r: r.quality)
        worse = [r for r in group if r.quality <= best.quality - 2]
        if worse:
            loser = rng.choice(worse)
            where = f"{best.where} > {loser.where.rpartition(', ')[2]}"
            pair = best.answers + loser.answers
            records.append(replace(best, where=where, answers=pair, quality=None))
        elif len(group) == 1:
            notes["prompts left out: one answer only"] += 1
        else:
            notes["prompts left out: the answers' quality differs by less than 2"] += 1
    return records


_QA = ("question", "chosen", "rejected")
# name: (keys, reader). A file is of the first layout whose keys are all in its first row. a|b: one
# of the two keys is enough.
LAYOUTS = {
    "rlhf_v": (("text", "origin_dataset"), _rlhf_v),
    "hadpo": (("question", "chosen", "reject", "image_id", "correct"), _hadpo),
    "seva": (("question", "chosen", "reject", "image_id"), _seva),
    "rlaif_v": ((*_QA, "origin_dataset|ds_name"), _rlaif_v),
    "mllm_dpo": ((*_QA, "ref_win_logp|Helpfulness_gpt4v"), _mllm_dpo),
    "mmpr": (_QA, _mmpr),
    "vlfeedback": (("completions", "models"), _vlfeedback),
    "povid": (("conversations", "rejected_conversations"), _povid),
    "llava_rlhf": (("conversations", "output_1", "output_2", "preference"), _llava_rlhf),
    "llama_factory": (("conversations", "chosen", "rejected"), _llama_factory),
    "llava_instruct": (("conversations",), _llava_instruct),
    "helpsteer": (("prompt", "response", "helpfulness"), _helpsteer),
    "helpsteer2": (("prompt", "response_1", "response_2", "preference_strength"), _helpsteer2),
    "trl": (("chosen", "rejected"), _trl),
    "problem": (("problem", "solution|answer"), _problem),
}


def _missing(row, keys):
    """The first of these keys that a row does not have, or None."""
    for key in keys:
        if not any(name in row for name in key.split("|")):
            return key
    return None


@dataclass
class DataFile:
    """What `read` returns.

    with_picture: how many rows have an image. refused: [{"row":, "why":}]. notes: how many pairs
    were left out on purpose, and how many paths were not read as they stand, by reason.
    """

    path: Path
    layout: str
    rows: int
    with_picture: int
    records: list
    refused: list
    notes: Counter


def read(path, images=None):
    """Read one data file of any known layout -> DataFile.

    images: the folder below which the images lie; by default `files.image_folders`.
    """
    path = Path(path)
    layout = None
    total = with_picture = 0
    records, refused, notes = [], [], Counter()
    folder = ImageFolder(images or image_folders(path), notes)
    for i, row in rows(path, keep_bad=True):
        total += 1

        # the first row chooses the layout
        if layout is None and isinstance(row, dict):
            fits = (name for name, (keys, _) in LAYOUTS.items() if not _missing(row, keys))
            layout = next(fits, None)
            if layout is None and {"turns", "answers"} <= row.keys():
                raise BadInput(
                    f"{path}: rated answers of annotate.py, which rejection_sampling.py and "
                    "steerlm.py read; its preferences.json, best.json and attributes.json are beside."
                )
            if layout is None:
                known = [f"{name}: {' + '.join(keys)}" for name, (keys, _) in LAYOUTS.items()]
                raise BadInput(
                    f"{path}: row {i} has the keys {str(sorted(row)):.200}, "
                    f"which is no known layout; accepted are {'; '.join(known)}."
                )

        # its records, or why it is refused
        try:
            if isinstance(row, BadInput):
                raise row
            if not isinstance(row, dict):
                raise BadInput(f"the row is {type(row).__name__}; an object is needed.")
            keys, reader = LAYOUTS[layout]
            if key := _missing(row, keys):
                raise BadInput(f"key `{key}` is missing; the file is in layout {layout}.")
            new_records = reader(row, f"{path.name}, row {i}", folder, notes)
            if new_records:
                image = new_records[0].image
                refuse_unread_media(row, layout, image)
                if isinstance(image, Path):
                    open_header(image)  # pixels are decoded when they are needed
                with_picture += image is not None
            records += new_records
        except BadInput as error:
            refused.append({"row": i, "why": str(error)})

    if not total:
        raise BadInput(f"{path}: the file holds no row.")
    if layout == "helpsteer":
        records = pairs_by_quality(records, notes)
    return DataFile(path, layout, total, with_picture, records, refused, notes)
