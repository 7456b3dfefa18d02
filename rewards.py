r"""What an answer is worth: exact answers by rule, the scores of judge.py, and the format.

    --reward exact        the data's answer decides: 1 if it is the same, else 0; a box: its overlap
    --reward annotator    the score of --annotator decides: the toy world's truth, a reward model, a
                          checkpoint, an endpoint
    --reward mixed        exact where a rule can read the data's answer, else the annotator

With mixed the two keep their own scales: grpo.py's advantages are divided by each group's spread,
but with --variant dr_grpo the prompts with the larger rewards weigh more.

A checkpoint or an endpoint compares every two of a prompt's G answers in both orders: G (G - 1)
questions, 56 for 8 answers.

Of the data's answer and of the model's alike, what counts is the last <answer>...</answer>; without
such tags the last \boxed{...}; without that the whole text, if it has at most 20 words. The data's
answer decides which rule holds, the first that can read it:

    box       [10, 20, 110.5, 220]            overlap (IoU) with the last box in the answer
    yes/no    Yes; No, there is no dog.       the first word is the same
    letter    B; (B); B. dog                  B, B., B), (B), B. dog, or "the answer is B"
    number    3; 1,200; -1/2; 145°; 5 cm;     of equal value: the whole, or what stands behind the
              2\sqrt{221}; \frac{\pi}{2}      last "=", or the only number in it; "two" is 2
    text      any other, up to 5 words        the same words; case, punctuation, articles aside

A box is two corners, x1 y1 x2 y2, in pixels of the picture's file. Numbers that are all at most 1
are fractions, as LLaVA-1.5 writes boxes: of the padded square where the picture is padded to one
(image aspect pad), else of the picture's sides. Boxes from 0 to 1000 are not read.

--format-weight W adds W for an answer that is <think>...</think><answer>...</answer> and no more.
"""

import ast
import math
import re
from collections import Counter

import judge
from common import BadInput, flag_name, not_negative
from formats.dataset import located
from formats.files import image_size

SHORT = 20  # words of a text that is an answer as a whole
TEXT = 5  # words of a right answer that is compared word for word
FORMAT_REQUEST = (
    "\nFirst think in <think> </think> tags, then give the final answer in <answer> </answer> tags."
)
ANNOTATOR_FLAGS = (
    *("annotator", "annotator_device", "facts", "missing_facts"),
    *("judge_url", "judge_model", "judge_key_file", "judge_workers"),
)
CORNER = r"\s*(-?(?:\d{1,9}(?:\.\d*)?|\.\d+))\s*"
BOX = re.compile(rf"[\[(]{CORNER},{CORNER},{CORNER},{CORNER}[\])]")
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
DIGITS = r"-?(?:\d+(?:,\d{3})*(?:\.\d*)?|\.\d+)"
NUMBER = re.compile(rf"(?<![\w.]){DIGITS}(?!\w)|\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)
UNIT = re.compile(
    r"\s*(?:°|\^?\{?\\(?:circ|degree)\}?|%|(?:square |sq )?"
    r"(?:degrees?|mm|cm|km|m|ft|feet|in|inches|units?)\b(?:\^?\{?[23]\}?|[²³])?)\.?$",
    re.IGNORECASE,
)


def add_flags(parser):
    """Add the flags that say what an answer is worth, and those of the annotator."""
    flag = parser.add_argument_group("reward").add_argument
    flag(
        "--reward",
        default="exact",
        choices=("exact", "annotator", "mixed"),
        help="the data's answer by rule, --annotator, or the first where it can be read and the "
        "second elsewhere (default %(default)s)",
    )
    flag(
        "--format-weight",
        type=not_negative,
        default=0.0,
        metavar="W",
        help="of an answer in <think> and <answer> tags (default %(default)s; R1-V 1)",
    )
    flag(
        "--ask",
        metavar="TEXT",
        help="stands behind every question, such as LLaVA's 'Answer the question using a single "
        "word or phrase.' (default: nothing; with --format-weight, the request for the tags)",
    )
    judge.add_flags(parser)


def check_flags(args):
    """Refuse flags of an annotator that nobody asks; fill in --annotator and --ask."""
    if args.reward == "exact":
        for name in sorted(args.given):
            if name in ANNOTATOR_FLAGS:
                raise BadInput(f"{flag_name(name)} is for --reward annotator or mixed.")
        args.annotator = None  # for the run folder: none is loaded
    request = FORMAT_REQUEST if args.format_weight else ""
    args.ask = request if args.ask is None else "\n" + args.ask


# ---- what of a text is the answer


def final(text):
    """The part of a text that is its answer; None if it names none and is too long to be one."""
    tagged = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    if tagged:
        return boxed(tagged[-1]) or tagged[-1].strip()
    if "\\boxed{" in text:
        return boxed(text)
    return text.strip() if len(text.split()) <= SHORT else None


def boxed(text):
    r"""What the last \boxed{...} holds; None without one that closes."""
    begin = text.rfind("\\boxed{") + len("\\boxed{")
    depth = 1
    for end in range(begin, len(text) if "\\boxed{" in text else 0):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end].strip()
    return None


# ---- a function for each kind of answer: (what is said, the right answer) -> 0 to 1


def same_letter(said, right):
    """1 for the letter that `right` begins with."""
    begins = r"[(\[]?([A-Z])(?:[.):\],]|$)"
    match = re.match(begins, said) or re.search(rf"(?:[Aa]nswer|option)(?: is)?:? {begins}", said)
    return float(bool(match) and match[1] == re.match(begins, right)[1])


def same_yes_no(said, right):
    """1 for the same first word, yes or no."""
    match = re.match(r"\W*(yes|no)\b", said, re.IGNORECASE)
    return float(bool(match) and right.lower().startswith(match[1].lower()))


def same_number(said, right):
    """1 for a number of the same value."""
    value = number_in(said)
    return float(value is not None and math.isclose(value, number_in(right), rel_tol=1e-6))


def same_text(said, right):
    """1 for the same words."""
    bare = lambda text: re.sub(r"\b(?:a|an|the)\b|[^\w\s]|_", " ", text.lower()).split()
    return float(bare(said) == bare(right))


def overlap(said, right, size, square):
    """Intersection over union of the last box that is said and the right one; 0 without a box."""
    found = BOX.findall(said)
    if not found:
        return 0.0
    a, b = (in_pixels(box, size, square) for box in (found[-1], BOX.findall(right)[0]))
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, wide) * max(0.0, high)
    area = lambda c: max(0.0, c[2] - c[0]) * max(0.0, c[3] - c[1])
    return both / (area(a) + area(b) - both)  # the right one has an area


def in_pixels(box, size, square):
    """Four numbers as text -> x1, y1, x2, y2 in pixels. size: height and width of the picture.

    square: fractions are those of the picture padded to a square, which stands in its middle.
    """
    height, width = size
    x1, y1, x2, y2 = map(float, box)
    if max(map(abs, (x1, y1, x2, y2))) > 1:
        return x1, y1, x2, y2
    sides = (max(size),) * 2 if square else (width, height)
    left, top = (sides[0] - width) / 2, (sides[1] - height) / 2
    return x1 * sides[0] - left, y1 * sides[1] - top, x2 * sides[0] - left, y2 * sides[1] - top


# ---- numbers


def number_in(text):
    """The number that a text is, or ends with behind "=", or the only one in it; else None."""
    for part in (text, text.rpartition("=")[2]):
        value = value_of(part)
        if value is not None:
            return value
    found = NUMBER.findall(text)
    if len(found) != 1:
        return None
    word = found[0].lower()
    return float(WORDS.index(word)) if word in WORDS else value_of(word)


def value_of(text):
    r"""The value of a number or expression, plain or LaTeX, with or without a unit; else None.

    + - * / ^ ( ) \frac \sqrt \pi \cdot \times and their characters are read; nothing is executed.
    """
    text = UNIT.sub("", text.strip().strip("$").strip().removesuffix("."))
    if not re.search(r"\d|pi|π", text) or len(text) > 100:
        return None
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\\(?:left|right|[,!; ])|(?<!\d)\s+|\s+(?!\d)", "", text)  # 1 2 is not 12
    for old, new in (("π", "pi"), ("√", "sqrt"), ("×", "*"), ("·", "*"), ("^", "**"), ("−", "-")):
        text = text.replace(old, new)
    text = re.sub(r"\\(?:cdot|times)", "*", text)
    text = re.sub(r"\\[dt]?frac", "frac", text).replace("\\", "")

    # innermost braces first: frac{a}{b} is (a)/(b), other braces are brackets
    text = re.sub(r"frac(\d)(\d)", r"frac{\1}{\2}", text)
    before = ""
    while before != text:
        before = text
        text = re.sub(r"frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
        text = re.sub(r"(?<!frac)(?<!\})\{([^{}]*)\}", r"(\1)", text)
    text = re.sub(r"sqrt(\d+\.?\d*)", r"sqrt(\1)", text)
    text = re.sub(r"(?<=[\d)i])(?=sqrt|pi|\()", "*", text)  # 2 sqrt(3), 2 pi, 2 (3)
    if not re.fullmatch(r"(?:[\d.+\-*/()]|sqrt|pi)+", text):
        return None
    try:
        value = evaluated(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError):
        return None
    return value if math.isfinite(value) else None


def evaluated(node):
    """The value of a parsed expression of numbers, pi, sqrt and arithmetic."""
    match node:
        case ast.Constant(value=int() | float()):  # not the dots of 1+...+9
            return float(node.value)
        case ast.Name(id="pi"):
            return math.pi
        case ast.Call(func=ast.Name(id="sqrt"), args=[inner]):
            return math.sqrt(evaluated(inner))
        case ast.UnaryOp(op=ast.UAdd() | ast.USub()):
            return evaluated(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
        case ast.BinOp():
            a, b = evaluated(node.left), evaluated(node.right)
            match node.op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div():
                    return a / b
                case ast.Pow() if a >= 0 or b.is_integer():  # else it is no real number
                    return a**b
    raise ValueError("no arithmetic")


# ---- the data's answer


def right_answer(record):
    """(kind, text) of what the data holds as right; None if no rule can read it.

    BadInput if there is none, or if it is a box that cannot be in the picture.
    """
    if not record.answers:
        raise BadInput("the row has no answer.")
    text = record.right or final(record.answers[0])
    if text is None or record.right == "":
        return None
    boxes = BOX.findall(text)
    if len(boxes) == 1:
        check_box(boxes[0], record)
        return "box", text
    if re.match(r"(?:yes|no)(?:[.,;:!]|$)", text, re.IGNORECASE):
        return "yes/no", text
    if re.match(r"[(\[]?[A-Z](?:[.):\]]|$)", text):
        return "letter", text
    if value_of(text) is not None or text.lower() in WORDS:
        return "number", text
    return ("text", text) if re.search(r"\w", text) and len(text.split()) <= TEXT else None


def check_box(box, record):
    """BadInput unless the picture holds the box. RefCOCO's lines count the last pixel: 1 over."""
    if record.image is None:
        raise BadInput("the answer is a box, and the row has no picture.")
    height, width = image_size(record.image)
    x1, y1, x2, y2 = in_pixels(box, (height, width), False)
    if not (0 <= x1 < x2 <= width + 1 and 0 <= y1 < y2 <= height + 1):
        raise BadInput(
            f"the box {', '.join(box)} is not in the picture of {width} x {height} pixels; "
            "x1, y1, x2, y2 in pixels of the file, or fractions, are accepted."
        )


def right_answers(rows, how):
    """The right answers of a data set -> {`Record.prompt_key`: (kind, text)}.

    Rows that cannot be scored are left out of `rows`, or stop the run. how: --reward.
    """
    if how == "annotator":
        return {}
    right, refused, kept = {}, [], []
    for record in rows.records:
        try:
            answer = right_answer(record)
            if answer is None and how == "exact":
                raise BadInput(
                    f"no rule can read the answer {record.answers[0]!r:.80}; accepted are boxes, "
                    f"yes/no, letters, numbers and texts of at most {TEXT} words, and with "
                    "--reward mixed any answer."
                )
        except BadInput as error:
            refused.append(located(record.where, str(error)))
            continue
        kept.append(record)
        if answer:
            right[record.prompt_key] = answer
    rows.leave_out(refused, len(rows.records))
    rows.records = kept
    return right


# ---- all terms


def says(right, records):
    """One line: how many prompts are scored in which way."""
    kinds = Counter(right[r.prompt_key][0] if r.prompt_key in right else "" for r in records)
    named = {kind: f"{n} by {kind or 'the annotator'}" for kind, n in sorted(kinds.items())}
    return "rewards: " + ", ".join(named.values())


def scorer(args, right, annotator, square):
    """A function (records, answers) -> for each prompt {term: G numbers}, whose sum is its reward.

    right: of `right_answers`. annotator: of `judge.make`; its number is None where it gave no
    verdict. square: see `in_pixels`.
    """

    def exact(record, text):
        """0 to 1: by the rule of the right answer's kind."""
        kind, truth = right[record.prompt_key]
        said = final(text)
        if not said:
            return 0.0
        if kind == "box":
            return overlap(said, truth, image_size(record.image), square)
        if kind == "letter":
            return same_letter(said, truth)
        if kind == "yes/no":
            return same_yes_no(said, truth)
        if kind == "number":
            return same_number(said, truth)
        return same_text(said, truth)

    def score(records, answers):
        """One prompt after the other; the annotator is asked about all its prompts at once."""
        judged = [i for i, record in enumerate(records) if record.prompt_key not in right]
        given = ()
        if judged:
            given = annotator([records[i] for i in judged], [answers[i] for i in judged])
        by_annotator = dict(zip(judged, given, strict=True))
        terms = []
        for i, (record, texts) in enumerate(zip(records, answers, strict=True)):
            if i in by_annotator:
                terms.append({"annotator": by_annotator[i]})
            else:
                terms.append({"exact": [exact(record, text) for text in texts]})
            if args.format_weight:
                terms[i]["format"] = [args.format_weight * in_format(text) for text in texts]
        return terms

    return score


def in_format(text):
    """1 for thoughts and an answer, each in its tags once, and nothing else."""
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    whole = re.fullmatch(r"<think>.*</think>\s*<answer>.*</answer>", text.strip(), re.DOTALL)
    return float(bool(whole) and all(text.count(tag) == 1 for tag in tags))
