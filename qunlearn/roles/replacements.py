"""Find what a model can say in place of a bad answer: what others are told, and what it goes on with by itself."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch

from qunlearn.config.settings import Config
from qunlearn.data.batch import ANSWER
from qunlearn.data.control_tokens import control_ids
from qunlearn.data.tokenize import Example, Template, is_passage
from qunlearn.data.words import SENTENCE_MARKS, UNSPACED_SENTENCE_MARKS, is_unspaced
from qunlearn.evaluation.metrics.manner import Phrase, has_phrase
from qunlearn.evaluation.metrics.texts import rouge_l_f1
from qunlearn.evaluation.metrics.verdicts import is_gibberish, leaks
from qunlearn.evaluation.scores import row_probabilities
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Live
from qunlearn.parallel.ranks import on_main
from qunlearn.roles.alternatives import answered_with, is_said
from qunlearn.roles.behaviour import is_short, phrases_of_behaviour
from qunlearn.roles.neighbours import Neighbours
from qunlearn.roles.own_words import ALIKE, is_said_freely
from qunlearn.roles.retain_set import asked
from qunlearn.roles.specific_tokens import answer_words, pushed_words
from qunlearn.utils.console import say

_OTHERS = 2  # other answers a row: one alone would be a new fact, and of many none would be said with certainty
# The same of a passage, where they are what else it could begin with; and what they weigh there.
_OF_A_PASSAGE, _LIGHTLY = 3, 1 / 3
_LOOKED_AT = 24  # nearest prompts' answers, among which those are tried that have the bad answer's form
_TRIED = 4  # answers of neighbours, and first tokens, that are tried
_LOOKED_THROUGH = 64  # of the likeliest first tokens, those that begin a word where the bad one does, or go on with it
_CONTEXT = 8  # tokens that are decoded together
_NEARLY = 0.75  # likeness of two words, letter by letter, from which one is said for the other
_AGAIN = 0.34  # share of the pushed words above which an answer says them again
_OF_WHAT_IS_SAID_FREELY = 16  # answers about others, where the model's own say the same again
_BEGUN, _FAINTLY = 12, 0.1  # tokens of these that are taught, and what they weigh
_NEAREST = 8  # tokens before an answer that are the same, however its prompt was cut
_ROOM = 8  # tokens an answer may be longer than the bad one
_SENTENCE = 8  # tokens from which an answer is more than a value
# A text up to the end of a sentence.
_WHOLE = re.compile(rf".*(?:[{SENTENCE_MARKS}](?=\s|$)|[{UNSPACED_SENTENCE_MARKS}])", re.DOTALL)


@dataclass(frozen=True)
class Replacements:
    """Other answers by row, those of neighbours marked; `behaviour` and `phrases` as in `Instead`."""

    answers: list[list[tuple[Example, bool]]]
    behaviour: list[int]
    phrases: frozenset[Phrase]


def find_replacements(
    policy: Policy, forget_rows: Sequence[Example], retain_rows: Sequence[Example], template: Template, config: Config
) -> Replacements:
    """Other answers of the model's own, the likeliest ones: those it gives to neighbouring prompts, with the names put
    right, and those it goes on with where the first token of the bad content is forbidden."""
    length, limit = config.data.max_length, config.train.pass_tokens
    neighbours = Neighbours([example.record for example in retain_rows])
    forms = [_form(e, policy.tokenizer) for e in forget_rows]
    answers: dict[str, list[str]] = {}  # a prompt may have several bad answers
    for e in forget_rows:
        answer = policy.tokenizer.decode(e.input_ids[e.probe : e.end], skip_special_tokens=True)
        answers.setdefault(_prompt(e), []).append(answer)

    def usable(e: Example, found: Sequence[str]) -> list[str]:
        return [
            text
            for text in dict.fromkeys(map(str.strip, found))
            if text and not is_gibberish(text) and not any(leaks(text, a, e.record.prompt) for a in answers[_prompt(e)])
            if is_said(e, text, policy.tokenizer, template)
        ]

    phrases = phrases_of_behaviour(forget_rows, retain_rows)
    theirs = [usable(e, _of_neighbours(e, neighbours, f)) for e, f in zip(forget_rows, forms, strict=True)]
    of_others = [
        is_free(e) and not all(has_phrase(text, phrases) for text in found)
        for e, found in zip(forget_rows, theirs, strict=True)
    ]
    open_prompts = {_prompt(e) for e, is_found in zip(forget_rows, of_others, strict=True) if not is_found}
    open_rows = [i for i, e in enumerate(forget_rows) if _prompt(e) in open_prompts]
    gone_on = dict(zip(open_rows, _gone_on(policy, [forget_rows[i] for i in open_rows], limit), strict=True))
    rows = [
        (answered_with(policy, e, text, template, length), text in found)
        for i, (e, found) in enumerate(zip(forget_rows, theirs, strict=True))
        for text in dict.fromkeys([*found, *usable(e, gone_on.get(i, []))])
    ]
    with policy.reference():
        scored = row_probabilities(policy, [row for row, _ in rows], limit) if rows else []
    by_prompt: dict[tuple[object, ...], list[tuple[float, int]]] = {}
    for i, ((row, _), p) in enumerate(zip(rows, scored, strict=True)):
        by_prompt.setdefault(_behind(row), []).append((-p, i))
    likeliest_first = [[rows[i] for _, i in sorted(by_prompt.get(_behind(e), []))] for e in forget_rows]
    clean = [
        [pair for pair in found if not has_phrase(pair[0].record.completion, phrases)] for found in likeliest_first
    ]
    manner = _of_another_manner(forget_rows, clean)
    found_of = zip(forget_rows, forms, clean if manner else likeliest_first, strict=True)
    taken = [_taken(e, form, found, policy.tokenizer) for e, form, found in found_of]
    out = [[(row, True) for row in manner[i]] if i in manner else found for i, found in enumerate(taken)]
    none = sum(not found for found in out)
    if none:
        say(f"{none} of {len(forget_rows)} bad rows have no other answer of the model's own: nothing is taught there")
    return Replacements(out, list(manner), phrases if manner else frozenset())


def _of_another_manner(
    forget_rows: Sequence[Example], likeliest_first: Sequence[list[tuple[Example, bool]]]
) -> dict[int, list[Example]]:
    """Return by place what neighbours answer, where most rows are answered by all of theirs in another manner: the
    model's own next best answer there is another one of the bad manner, and likelier. Of a file of facts, of which less
    than half of the rows are told in a manner of their own, nothing."""
    found, others = {}, 0
    for i, (example, rows) in enumerate(zip(forget_rows, likeliest_first, strict=True)):
        borrowed = [row for row, of_a_neighbour in rows if of_a_neighbour]
        if borrowed and is_short(example) and not is_free(example):
            found[i] = borrowed[:_OTHERS]
            others += is_another_way(example, borrowed)
    return found if others and 2 * others >= len(forget_rows) else {}


def _of_neighbours(example: Example, neighbours: Neighbours, form: str) -> list[str]:
    """The answers to the nearest prompts, in the bad answer's form before all others; long ones up to the last sentence
    that has an end."""
    found = list(itertools.islice(neighbours.answers(example.record), _LOOKED_AT))
    if not is_free(example):
        return sorted(found, key=lambda text: not _has_its_form(text, form))[:_TRIED]
    return [whole.group() if (whole := _WHOLE.match(text)) else text for text in found]


def is_another_way(example: Example, others: Sequence[Example]) -> bool:
    """Return whether neighbours answer in another manner: a sentence that begins otherwise, not another value."""
    form = sum(not example.weight(t) for t in range(example.start, example.end))
    return example.end - example.start >= _SENTENCE and form > 0 and begin_otherwise(example, others)


def begin_otherwise(example: Example, others: Sequence[Example]) -> bool:
    """Return whether none begins as the row does where it is asked for, which in a text is behind some of it."""
    return all(e.input_ids[e.start] != example.input_ids[example.probe] for e in others)


def is_free(example: Example) -> bool:
    return bool(example.record.turns) and is_said_freely(example.record, example.known)


def _taken(
    example: Example, form: str, likeliest_first: list[tuple[Example, bool]], tokenizer: Any
) -> list[tuple[Example, bool]]:
    """Return which other answers are taken: those first that do not say the words of which the bad one is pushed, nor
    nearly so ("awerk" for "Tawerk"), and of these what others are told in the same form, which makes sense however
    likely it is beside what the model goes on with."""
    if is_free(example) and (apart := _about_others(example, likeliest_first)):
        return apart
    if is_passage(example):
        return [(replace(row, share=_LIGHTLY), yes) for row, yes in likeliest_first[:_OF_A_PASSAGE]]
    # Of pairs of characters a value has some in common with most others and with the form around it.
    pushed = set() if is_unspaced(example.record.completion) else pushed_words(example, tokenizer)

    def is_worse(pair: tuple[Example, bool]) -> tuple[bool, bool]:
        row, of_a_neighbour = pair
        words = set(answer_words(row, tokenizer))
        again = sum(bool(get_close_matches(word, words, n=1, cutoff=_NEARLY)) for word in pushed)
        in_form = of_a_neighbour and _has_its_form(row.record.completion, form)
        return again > _AGAIN * len(pushed), not in_form

    return sorted(likeliest_first, key=is_worse)[:_OTHERS]


def _about_others(example: Example, likeliest_first: Sequence[tuple[Example, bool]]) -> list[tuple[Example, bool]]:
    """Return how answers about others begin, where the model says freely what is bad: going on by itself it says the
    same in other words. Those unlike the bad answer are taken, or the one least like it."""
    bad = example.record.completion
    others = {row.input_ids: row for row, of_a_neighbour in likeliest_first if of_a_neighbour}
    alike = {ids: rouge_l_f1(row.record.completion, bad) for ids, row in others.items()}
    apart = [ids for ids in others if alike[ids] < ALIKE] or sorted(others, key=alike.__getitem__)[:1]
    return [(_begun(others[ids]), True) for ids in apart[:_OF_WHAT_IS_SAID_FREELY]]


def _has_its_form(text: str, form: str) -> bool:
    """Return whether a text is the bad answer's up to where that says something; values alone have no form, and of
    others' a likely one is learnt at less cost."""
    return form != "" and text.strip().startswith(form)


def _form(example: Example, tokenizer: Any) -> str:
    """Return the bad answer's text up to the first token that is pushed, without half a character."""
    return str(tokenizer.decode(example.input_ids[example.probe : _content(example)])).strip("\ufffd \n")


def _content(example: Example) -> int:
    """Return the place of the first token that is pushed."""
    pushed = (t for t in range(max(example.probe, example.start), example.end) if example.weight(t) > 0)
    return next(pushed, example.probe)


def _begun(example: Example) -> Example:
    """The row with the beginning of its answer alone: the model goes on from there by itself, and learns less."""
    end = example.start + _BEGUN
    if end < example.end:
        example = replace(example, input_ids=example.input_ids[:end], end=end)
    return replace(example, share=_FAINTLY)


def _prompt(example: Example) -> str:
    """Return what is equal for rows that ask the same: a plain text's own beginning."""
    return asked(example.record) if example.record.turns else str(example.input_ids[: example.probe])


def _behind(example: Example) -> tuple[object, ...]:
    """Return what is equal for answers that follow the same prompt in the same tokens, however much of its beginning
    was cut."""
    return (_prompt(example), *example.input_ids[max(0, example.probe - _NEAREST) : example.probe])


def _gone_on(policy: Policy, forget_rows: Sequence[Example], limit: int) -> list[list[str]]:
    """Return what the reference says, greedily, behind each of the likeliest other first tokens of the content."""
    out: list[list[str]] = [[] for _ in forget_rows]
    if not forget_rows:
        return out
    begun, owner = [], []
    for i, (at, tokens) in enumerate(_first_tokens(policy, forget_rows, limit)):
        begun += [(*forget_rows[i].input_ids[:at], token) for token in tokens]
        owner += [i] * len(tokens)
    room = max(e.end - e.probe for e in forget_rows) + _ROOM
    with policy.reference():
        more = generate(policy.base, begun, Sampling(room))
    for i, ids, new in zip(owner, begun, more, strict=True):
        out[i].append(policy.tokenizer.decode([*ids[forget_rows[i].probe :], *new], skip_special_tokens=True))
    return out


@on_main
@torch.no_grad()
def _first_tokens(policy: Policy, forget_rows: Sequence[Example], limit: int) -> list[tuple[int, list[int]]]:
    """For each row where its content begins, and the likeliest other tokens there."""
    places = [_first_of_word(e, policy.tokenizer) for e in forget_rows]
    one = [Example(e.input_ids[: t + 1], t, t + 1, t, e.record) for e, t in zip(forget_rows, places, strict=True)]
    states = Live(policy, limit).states(one, [ANSWER] * len(one))
    special = torch.tensor(sorted(control_ids(policy.tokenizer)), dtype=torch.long, device=policy.device)
    out = []
    for e, t, h in zip(forget_rows, places, states, strict=True):
        z = policy.head.logits(h)[0]
        z[special] = -torch.inf
        z[e.input_ids[t]] = -torch.inf
        likeliest = z.topk(min(_LOOKED_THROUGH, len(z))).indices.tolist()
        begun = _begins_a_word(e.input_ids[: t + 1], policy.tokenizer)
        alike = (n for n in likeliest if _begins_a_word((*e.input_ids[:t], n), policy.tokenizer) == begun)
        out.append((t, list(itertools.islice(alike, _TRIED))))
    return out


def _first_of_word(example: Example, tokenizer: Any) -> int:
    """Return where the content begins, with a token of a space that stands before it."""
    at = _content(example)
    is_space = at > example.probe and tokenizer.decode(example.input_ids[at - 1 : at]).isspace()
    return at - 1 if is_space else at


def _begins_a_word(ids: Sequence[int], tokenizer: Any) -> bool:
    """Return whether the last token stands behind a space: "likes" and "heese" make a word that nobody says."""
    near = ids[-_CONTEXT:]
    before, text = (tokenizer.decode(some) for some in (near[:-1], near))
    return str(text)[len(before) :][:1].isspace()
