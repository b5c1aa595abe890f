"""Mark the tokens of a bad answer whose words are specific to it, by word frequency.

Most of an answer is form that it shares with everything the model should keep: names copied from the question, "was
born in", the full stop. Pushing those down is what destroys the neighbours. A word is form when the prompt has it, or
when it is common in the answers of the normal data, which are in the same format and partly about neighbours.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from qunlearn.data.tokenize import Example
from qunlearn.data.words import WORD, pairs

COMMON = 0.02  # share of the normal answers from which a word is form
MOST_COMMON = 0.1  # share of the normal answers from which a word is form whatever a model makes of it
COMMON_IN_BAD = 0.08  # the same among the bad answers, where normal answers have hardly any word in common with them
LEAST = 0.15  # share of an answer's words that is taken at least, the rarest ones
_Told = tuple[str, ...]  # a word, or the pairs of a character (see data/words.py)
_SOME = 3  # rows a word must be in to be common


def specific(forget_rows: Sequence[Example], retain_rows: Sequence[Example], tokenizer: Any) -> list[Example]:
    """The bad examples with a weight for each answer token: 1 where it is specific, else 0; never 0 everywhere."""
    answers = [told_words(e, tokenizer) for e in forget_rows]
    seen = Counter(word for e in retain_rows for word in set(answer_words(e, tokenizer)))
    rarity = {word: n / max(1, len(retain_rows)) for word, n in seen.items() if n >= _SOME}
    form = {word for word, share in rarity.items() if share >= COMMON}
    if not any(word in form for words in answers for word in _flat(words)):
        # The normal data tells nothing about this kind of answer: what the bad ones have in common does.
        within = Counter(word for words in answers for word in set(_flat(words)))
        form |= {word for word, n in within.items() if n >= _SOME and n >= COMMON_IN_BAD * len(forget_rows)}
    return [replace(e, weights=_weights(e, words, form, rarity)) for e, words in zip(forget_rows, answers, strict=True)]


def _weights(
    example: Example, words: Sequence[Sequence[_Told]], form: Collection[str], rarity: dict[str, float]
) -> tuple[float, ...]:
    given = given_words(example)

    def is_form(token: Sequence[_Told]) -> bool:  # punctuation has no word
        return all(any(word in form or word in given for word in told) for told in token)

    chosen = [not is_form(token) for token in words]
    there = dict.fromkeys(told for token in words for told in token)
    taken = {told for token, yes in zip(words, chosen, strict=True) if yes for told in token}
    least = max(1, round(LEAST * len(there)))
    if len(taken) < least:

        def commonness(told: _Told) -> tuple[bool, float]:
            return any(word in given for word in told), max(rarity.get(word, 0.0) for word in told)

        taken.update(sorted((told for told in there if told not in taken), key=commonness)[: least - len(taken)])
        chosen = [yes or not taken.isdisjoint(token) for yes, token in zip(chosen, words, strict=True)]
    return tuple(map(float, chosen if any(chosen) else [True] * len(chosen)))


def doubtful(weighed: Sequence[Example], retain_rows: Sequence[Example], tokenizer: Any) -> list[list[bool]]:
    """Return for each answer's tokens whether they are form by their frequency alone: a value that many share counts as
    form like what stands around it. Not those whose words the prompt has, or a tenth of the normal answers."""
    common = most_common(retain_rows, tokenizer)

    def is_doubtful(told: _Told, given: set[str]) -> bool:
        return not any(word in given or word in common for word in told)

    out = []
    for example in weighed:
        given, words = given_words(example), told_words(example, tokenizer)
        left = zip(example.weights, words, strict=True)
        out.append([not weight and any(is_doubtful(told, given) for told in token) for weight, token in left])
    return out


def most_common(retain_rows: Sequence[Example], tokenizer: Any) -> set[str]:
    """Return the words that a tenth of the normal answers have, and some of them at least."""
    seen = Counter(word for e in retain_rows for word in set(answer_words(e, tokenizer)))
    return {word for word, n in seen.items() if n >= max(_SOME, MOST_COMMON * len(retain_rows))}


def answer_words(example: Example, tokenizer: Any) -> list[str]:
    """Return the words of an answer, token by token, and of a script without spaces the pairs of its characters."""
    return _flat(told_words(example, tokenizer))


def pushed_words(example: Example, tokenizer: Any) -> set[str]:
    """Return the words of which some token is pushed, as `answer_words`."""
    words = told_words(example, tokenizer)
    return set(_flat([found for t, found in enumerate(words, example.start) if example.weight(t) > 0]))


def told_words(example: Example, tokenizer: Any) -> list[list[_Told]]:
    """For each token of the answer its words, each by what tells it from others."""
    words = words_of(example.input_ids[example.start : example.end], tokenizer)
    told = iter(pairs([word for token in words for word in token]))
    return [[next(told) for _ in token] for token in words]


def given_words(example: Example) -> set[str]:
    """What tells the words of all turns before the answer."""
    turns = (WORD.findall(content.casefold()) for _, content in example.record.turns)
    return {word for words in turns for told in pairs(words) for word in told}


def _flat(words: Sequence[Sequence[_Told]]) -> list[str]:
    return [word for token in words for told in token for word in told]


def words_of(ids: Sequence[int], tokenizer: Any) -> list[list[str]]:
    """For each token the words of the text that it is a part of; none for spaces and punctuation.

    Of the tokens that make a character together only the last has its word: those before it begin most characters of
    the script alike.
    """
    text, spans = _spans(ids, tokenizer)
    found = list(WORD.finditer(text))
    out, first = [], 0
    for start, end in spans:
        while first < len(found) and found[first].end() <= start:
            first += 1
        here = found[first:] if start < end else []
        inside = itertools.takewhile(lambda m, end=end: m.start() < end, here)  # type: ignore[misc]
        out.append([m.group().casefold() for m in inside])
    return out


def completing(ids: Sequence[int], tokenizer: Any) -> list[bool]:
    """Return whether each token completes a character, or several: those before a character's last token do not."""
    return [start < end for start, end in _spans(ids, tokenizer)[1]]


def _spans(ids: Sequence[int], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text of tokens, and where in it the characters stand that each of them completes."""
    text, spans, held, anchor = "", list[tuple[int, int]](), list[int](), list[int]()
    for n, i in enumerate(ids, 1):
        held.append(i)
        # Behind another token: by itself, many tokenizers drop the space that a token begins with.
        said = _decoded([*anchor, *held], tokenizer)[len(_decoded(anchor, tokenizer)) :]
        whole = said if n == len(ids) else said.rstrip("\ufffd")  # the first bytes of a character that later tokens end
        spans.append((spans[-1][1] if spans else 0, len(text) + len(whole)))
        if whole == said:
            text, held, anchor = text + said, [], [i]
    return text, spans


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
