"""How well bdhs.py's similarity stands in for a sentence model at eps_s = .97, by length of the answer.

    python -m lab.similarity TEXTS --embedder sentence-transformers/all-MiniLM-L6-v2

TEXTS has one answer a line; those of 10 to 150 words count. Each is corrupted in five ways: 1, 2, 4 or 8 words of more than
three letters are replaced by such words of other answers, or half of its sentences end as sentences of other answers do.
"""

import random
import re
from pathlib import Path

import bdhs
from common import BadInput, Parser, Progress, run

BOUNDS = (10, 20, 40, 60, 90, 151)  # words
REPLACED = (1, 2, 4, 8)
WORD = re.compile(r"\w{4,}")


def with_words_replaced(text, k, others, rng):
    """The text with k of its words of more than three letters (all, if it has fewer) replaced by others."""
    places = list(WORD.finditer(text))
    for place in sorted(rng.sample(places, min(k, len(places))), key=lambda m: -m.start()):
        text = text[: place.start()] + rng.choice(others) + text[place.end() :]
    return text


def with_other_ends(text, sentences, rng):
    """The text, half of whose sentences keep a beginning and take the end of another sentence, as long as their own."""
    result = []
    for start, end in bdhs.split_sentences(text):
        words = text[start:end].split()
        if rng.random() < 0.5 and len(words) > 1:
            cut = rng.randrange(1, len(words))
            words[cut:] = rng.choice(sentences).split()[cut - len(words) :]
        result.append(" ".join(words))
    return " ".join(result)


def corrupted(texts, rng):
    """(text, corrupted text) pairs, five a text."""
    words = [word for text in texts for word in WORD.findall(text)]
    sentences = [text[a:b] for text in texts for a, b in bdhs.split_sentences(text)]
    pairs = []
    for text in texts:
        pairs += [(text, with_words_replaced(text, k, words, rng)) for k in REPLACED]
        pairs.append((text, with_other_ends(text, sentences, rng)))
    return pairs


def agreement(pairs, cosines, threshold):
    """[(words, pairs, share similar here, share similar to the sentence model, share in which both agree)] by length.

    cosines: the sentence model's, one a pair.
    """
    rows = []
    for low, high in zip(BOUNDS, BOUNDS[1:]):
        found = [
            (bdhs.word_cosine(a, b) >= threshold, cosine >= threshold)
            for (a, b), cosine in zip(pairs, cosines)
            if low <= len(a.split()) < high
        ]
        if found:
            share = lambda values, n=len(found): sum(values) / n
            ours, theirs = zip(*found)
            same = share(a == b for a, b in found)
            rows.append((f"{low} to {high - 1}", len(found), share(ours), share(theirs), same))
    return rows


def main():
    """Corrupt, compare, print a table."""
    parser = Parser(__doc__)
    parser.add_argument("texts", metavar="TEXTS", help="a file with one answer a line")
    parser.add_argument(
        "--embedder", required=True, metavar="DIR_OR_HUB_ID", help="sentence model, as in bdhs.py"
    )
    parser.add_argument("--threshold", type=float, default=0.97, help="(default %(default)s)")
    args = parser.parse_args()
    lines = Path(args.texts).read_text(encoding="utf-8").splitlines()
    texts = [line for line in lines if BOUNDS[0] <= len(line.split()) < BOUNDS[-1]]
    if len(texts) < 2:
        raise BadInput(
            f"{args.texts}: {len(texts)} lines of 10 to 150 words; 2 or more are needed."
        )
    pairs = corrupted(texts, random.Random(0))
    similarity, progress, cosines = (
        bdhs.load_embedder(args.embedder),
        Progress("pairs", len(pairs)),
        [],
    )
    for i in range(0, len(pairs), 32):
        cosines += similarity(*zip(*pairs[i : i + 32]))
        progress(len(cosines))
    print(
        "| words | pairs | similar here | similar to the sentence model | agreement |\n"
        + "|---" * 5
        + "|"
    )
    for words, n, ours, theirs, same in agreement(pairs, cosines, args.threshold):
        print(f"| {words} | {n} | {ours:.2f} | {theirs:.2f} | {same:.2f} |")


if __name__ == "__main__":
    run(main)
