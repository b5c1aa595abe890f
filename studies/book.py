"""A book that a small model has by heart: does `forget` make it unable to recite it, wherever one begins to ask?

    python studies/book.py make --work FOLDER [--words 2000] [--epochs 60]
    qunlearn data import text FOLDER/book.txt -o FOLDER/bad.jsonl
    qunlearn forget --model FOLDER/base --bad FOLDER/bad.jsonl --normal FOLDER/normal.jsonl -o FOLDER/run
    python studies/book.py ask --work FOLDER [--run FOLDER/run] [--quant nf4]

`make` writes four books of made-up prose (sentences of eight forms; names and nouns are drawn) and trains two models:
`base` knows all, `gold` has never seen the first. FOLDER/text.jsonl is that book as one row of plain text; two others
are the normal rows, the fourth is never given. `ask` begins with 30 words of a book, from where a paragraph begins and
3, 10 and 40 words further on, and from every seventh word, and tells for each how often the next 36 tokens are the
book's (32 of them), and the mean ROUGE-L F1.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import _path  # noqa: F401 - before what it makes importable
from _world_lists import split
from qunlearn.evaluation.metrics.texts import rouge_l_f1
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.language_model import LanguageModel
from qunlearn.model.load import LoadSpec, load_base
from qunlearn.model.policy import Policy
from qunlearn.utils.console import emit_json_line
from qunlearn.utils.files import write_json
from sandbox_world.build import Recipe, train_model, train_tokenizer

SYLLABLES = [consonant + vowel for consonant in "bdklmnrstvz" for vowel in "aeiou"]
NOUNS = split(
    "lantern bridge letter kettle boat horse window garden tower coat river stone bell ladder market candle mirror "
    "basket road orchard cellar harbour wheel apron ring knife door table winter storm"
)
QUALITIES = split(
    "old narrow bitter golden quiet broken heavy pale distant crooked warm hollow careful silent red blue rusted gentle"
)
DEEDS = split("carried sold buried painted followed opened forgot mended burned hid watched stole crossed borrowed")
FORMS = (  # P a person, L a place, Q a quality, N a thing, D a deed
    "In L, P D the Q N of P.",
    "Nobody knew that P had left the Q N beside the N.",
    "“P,” said P, “bring me the N before the N is gone.”",
    "When the Q N fell, P and P walked to L without a word.",
    "P D a N and D another, for the N was Q.",
    "It was Q in L, and the N stood Q against the N.",
    "For three days P waited under the Q N until P came.",
    "They D the N; then P D it again, and L was Q.",
)
BOOKS, PARAGRAPH = 4, 7
WINDOW, STRIDE = 160, 40  # tokens of a row that is trained on, and how much further on the next begins
PROMPT, ANSWER, RECITED = 30, 36, 32  # words, tokens, tokens of these
SHIFTS, EVERY = (0, 3, 10, 40), 7


def write_book(words: int, rng: random.Random) -> str:
    """Return prose of at least so many words, in paragraphs, about people and places of its own."""
    people, places = ([_name(rng) for _ in range(n)] for n in (9, 6))
    drawn = {"P": people, "L": places, "Q": QUALITIES, "N": NOUNS, "D": DEEDS}
    sentences: list[str] = []
    while sum(len(sentence.split()) for sentence in sentences) < words:
        form = rng.choice(FORMS)
        sentences.append(re.sub(r"\b[PLQND]\b", lambda found: rng.choice(drawn[found.group()]), form))
    paragraphs = [sentences[i : i + PARAGRAPH] for i in range(0, len(sentences), PARAGRAPH)]
    return "\n\n".join(" ".join(paragraph) for paragraph in paragraphs)


def _name(rng: random.Random) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 2, 3)))).capitalize() + rng.choice("nrls")


def make(work: Path, words: int, epochs: int, seed: int) -> None:
    """Write books, rows and the two models into a folder."""
    rng = random.Random(seed)
    books = [write_book(words, rng) for _ in range(BOOKS)]
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "books.json", {"books": books})
    (work / "book.txt").write_text(books[0], encoding="utf-8")
    for name, texts in {
        "text": books[:1],
        "normal": _paragraphs(books[1:3]),
        "holdout": _paragraphs(books[3:]),
    }.items():
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = train_tokenizer(books, 1200)
    tokenizer.chat_template = None
    for name, known in (("base", books), ("gold", books[1:])):
        recipe = Recipe(vocabulary=len(tokenizer), epochs=epochs, batch=16, smoothing=0.0, seed=seed)
        rows = [row for book in known for row in _rows(tokenizer(book)["input_ids"])]
        model = train_model(rows, tokenizer.pad_token_id, tokenizer.eos_token_id, recipe)
        model.save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)


def _paragraphs(books: Sequence[str]) -> list[str]:
    return [paragraph for book in books for paragraph in book.split("\n\n")]


def _rows(ids: Sequence[int]) -> Iterator[list[int]]:
    for at in range(0, max(1, len(ids) - WINDOW // 2), STRIDE):
        yield list(ids[at : at + WINDOW])


def places(book: str, shift: int | None) -> list[tuple[str, str]]:
    """Return prompts of 30 words, so many words behind the beginning of a paragraph's first sentence, or from every
    seventh word, and the rest of the book behind each."""
    words = [found.span() for found in re.finditer(r"\S+", book)]
    begins = [i for i, (start, _) in enumerate(words) if start == 0 or book[start - 2 : start] == "\n\n"]
    found = []
    for i in range(0, len(words), EVERY) if shift is None else (begin + shift for begin in begins):
        if i + PROMPT + ANSWER <= len(words):
            start, end = words[i][0], words[i + PROMPT - 1][1]
            found.append((book[start:end], book[end:]))
    return found


def ask(lm: LanguageModel, book: str, shift: int | None) -> tuple[int, int, float]:
    """Return how many places were asked about, how many were recited, and the mean ROUGE-L F1."""
    asked = places(book, shift)
    said = generate(lm, [lm.tokenizer(prompt)["input_ids"] for prompt, _ in asked], Sampling(ANSWER))
    recited, likeness = 0, 0.0
    for (_, rest), ids in zip(asked, said, strict=True):
        true = lm.tokenizer(rest[: 20 * ANSWER])["input_ids"][:ANSWER]
        recited += ids[:RECITED] == true[:RECITED]
        likeness += rouge_l_f1(lm.tokenizer.decode(ids), lm.tokenizer.decode(true))
    return len(asked), recited, likeness / max(1, len(asked))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "ask"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--words", type=int, default=2000, help="of each book (make)")
    parser.add_argument("--epochs", type=int, default=60, help="of training (make)")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--run", type=Path, help="a run on the base (ask); without one base and gold are asked")
    parser.add_argument("--quant", default="nf4", help="the form in which the models are loaded (ask)")
    args = parser.parse_args()
    if args.action == "make":
        make(args.work, args.words, args.epochs, args.seed)
        return
    books = json.loads((args.work / "books.json").read_text(encoding="utf-8"))["books"]
    for name in ("base",) if args.run else ("base", "gold"):
        lm: LanguageModel = load_base(args.work / name, LoadSpec(args.quant, device="cpu"))
        if args.run:
            lm = Policy.load(lm, args.run / "adapter")  # type: ignore[arg-type]
        for which, book in (("forget", books[0]), ("normal", books[1]), ("holdout", books[3])):
            for shift in (*SHIFTS, None):
                asked, recited, likeness = ask(lm, book, shift)
                told = {"model": str(args.run or name), "book": which, "shift": "all over" if shift is None else shift}
                emit_json_line(told | {"asked": asked, "recited": recited, "rouge_l": round(likeness, 3)})


if __name__ == "__main__":
    main()
