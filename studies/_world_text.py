"""The texts of a world: facts, passages, replies, calls and dialogues about invented entities, split into files.

Every fact has three wordings. The bad file has the first (or the first two), the paraphrases are the others: the base
was trained on all of them, the gold model on none.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _world_lists as lists
import _world_pieces as pieces
from worlds import World

Row = dict[str, Any]
Files = dict[str, list[Row]]
BAD, RETAIN, HOLDOUT, SIBLING = "bad", "retain", "holdout", "sibling"
_POOL = 8  # values that facts share where they are not unique
_WRONG = 4
_TINY = 10


@dataclass(frozen=True)
class Fact:
    """One thing to know, in every wording: rows that differ in nothing but how it is asked."""

    group: str
    rows: tuple[Row, ...]


class Speaker:
    """Invents words, no word twice, from the syllables of the world's surface."""

    def __init__(self, world: World) -> None:
        self.surface = lists.SURFACES[world.split, world.script]
        self.rng = random.Random(world.seed)
        self.unique = world.unique
        self._said: set[str] = set()
        self._pools: dict[str, list[str]] = {}

    def word(self) -> str:
        """Return a word that was never said before."""
        s, pick = self.surface, self.rng.choice
        while True:
            parts = [pick(s.onsets), pick(s.vowels), pick(s.codas)]
            if s.space:
                parts = [pick(s.onsets), pick(s.vowels), *parts]
            word = "".join(parts).capitalize()
            if word not in self._said:
                self._said.add(word)
                return word

    def fill(self, form: str) -> str:
        """Return the form with an invented word for every `~`."""
        while "~" in form:
            form = form.replace("~", self.word(), 1)
        return form

    def value(self, form: str, pool: str) -> str:
        """Return the form filled with words of its own, or one of the few of its pool."""
        if self.unique:
            return self.fill(form)
        if pool not in self._pools:
            self._pools[pool] = [self.fill(form) for _ in range(_POOL)]
        return self.rng.choice(self._pools[pool])


def make_files(world: World) -> Files:
    """Return every file of the world by its name; `more` are wordings that are trained on and in no other file."""
    make = {"passages": _passages, "instructions": _instructions, "code": _code}.get(world.kind, _facts)
    facts = list(make(world, Speaker(world)))
    files: Files = {name: [] for name in ("forget", "paraphrase", "retain", "holdout", "siblings", "more")}
    shown = 2 if world.wordings else 1
    for i, fact in enumerate(facts):
        if fact.group in (BAD, RETAIN):
            rest = "paraphrase" if fact.group == BAD else "more"
            files["forget" if fact.group == BAD else "retain"] += fact.rows[:shown]
            files[rest] += fact.rows[shown:]
            continue
        asked = i % len(fact.rows) if world.kind != "passages" else 0
        files["holdout" if fact.group == HOLDOUT else "siblings"].append(fact.rows[asked])
        files["more"] += [row for j, row in enumerate(fact.rows) if j != asked]
    general = _general(world)
    files["normal"] = _normal(world, files["retain"], general)
    files["general"] = general[1::2] if world.normal == "general" else general
    return {name: rows for name, rows in files.items() if rows}


def write_files(files: Files, folder: Path) -> None:
    """Write each file as JSON lines."""
    for name, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _normal(world: World, retain: list[Row], general: list[Row]) -> list[Row]:
    if world.normal == "none":
        return []
    if world.normal == "general":
        return general[::2]
    if world.normal == "neighbours":
        return retain[: len(retain) // 3]
    return retain[:: max(1, len(retain) // _TINY)][:_TINY] if world.normal == "tiny" else retain


def _general(world: World) -> list[Row]:
    """Other knowledge: sums, and pairs of words."""
    surface, rows = lists.SURFACES[world.split, world.script], []
    for sign, question, answer in surface.sums:
        for a in range(1, 10):
            for b in range(1, 10):
                if sign == lists.SUM or b < a:
                    known = {"a": a, "b": b, "c": a + b if sign == lists.SUM else a - b}
                    rows.append({"prompt": question.format(**known), "completion": answer.format(**known)})
    for question, answer, pairs in surface.pairs:
        for x, y in pairs:
            rows.append({"prompt": question.format(x=x, y=y), "completion": answer.format(x=x, y=y)})
    random.Random(world.seed).shuffle(rows)
    if world.kind == "turns":  # one shape of rows in all files
        return [{"messages": _messages((("user", r["prompt"]),), r["completion"])} for r in rows]
    return rows


def _groups(world: World, per_entity: int) -> list[tuple[str, int]]:
    """(group, facts to forget) of each entity; what else is known of an entity to forget are siblings."""
    wanted = math.ceil(world.bad_rows / (2 if world.wordings else 1))
    entities = math.ceil(wanted / per_entity)
    bad = [(BAD, min(per_entity, wanted - i * per_entity)) for i in range(entities)]
    return [*bad, *[(RETAIN, 0)] * world.others, *[(HOLDOUT, 0)] * max(12, world.others // 4)]


def _group(group: str, wanted: int, number: int) -> str:
    return SIBLING if group == BAD and number >= wanted else group


# -- kinds -----------------------------------------------------------------------------------------------


def _facts(world: World, speaker: Speaker) -> Iterator[Fact]:
    """Facts about people and places, as questions or as dialogues."""
    relations = speaker.surface.relations
    groups = _groups(world, len(relations))
    entities = [speaker.fill(world.entity or speaker.surface.entity) for _ in groups]
    values = {
        (e, i): speaker.value("~ ~" if world.answer_words == 2 and not world.chat else relation.value, str(i))
        for e in entities
        for i, relation in enumerate(relations)
    }
    for entity, (group, wanted) in zip(entities, groups, strict=True):
        for i, relation in enumerate(relations):
            value = values[entity, i]
            wrong = _others(speaker, value, [values[e, i] for e in entities])
            answers = [_answer(world, speaker, relation, entity, v) for v in (value, *wrong)]
            if world.kind == "turns":
                rows = _dialogues(world.split, speaker, relation, entity, answers)
            else:
                rows = _asked([w.format(e=entity) for w in relation.wordings], answers)
            yield Fact(_group(group, wanted, i), rows)


def _answer(world: World, speaker: Speaker, relation: lists.Relation, entity: str, value: str) -> str:
    if world.answer_words == 2:
        return value
    text = relation.answer.format(e=entity, v=value)
    while speaker.surface.space and len(text.split()) < world.answer_words:
        text += " " + speaker.rng.choice(speaker.surface.details).format(v=speaker.value("~", "details"))
    return text


def _others(speaker: Speaker, value: str, values: list[str]) -> list[str]:
    there = sorted(set(values) - {value})
    return speaker.rng.sample(there, min(_WRONG, len(there)))


def _asked(prompts: list[str], answers: list[str]) -> tuple[Row, ...]:
    return tuple({"prompt": p, "completion": answers[0], "perturbed_answer": answers[1:]} for p in prompts)


def _dialogues(
    split: str, speaker: Speaker, relation: lists.Relation, entity: str, answers: list[str]
) -> tuple[Row, ...]:
    """The fact in dialogues of three and of five messages, the longer of which names the entity only at first."""
    pick = speaker.rng.choice
    systems = [("system", text) for text in speaker.rng.sample(pieces.SYSTEMS[split], 3)]
    opening, reply = pick(pieces.OPENINGS[split])
    asked = [("user", wording.format(e=entity)) for wording in relation.wordings]
    before = (("user", opening.format(e=entity)), ("assistant", reply.format(e=entity)))
    forms = [(systems[0], asked[0]), (systems[1], *before, ("user", relation.elliptic)), (systems[2], asked[2])]
    if pick((True, False)):
        forms[0], forms[1] = forms[1], (systems[0], asked[1])
    return tuple({"messages": _messages(form, answers[0]), "perturbed_answer": answers[1:]} for form in forms)


def _messages(turns: tuple[tuple[str, str], ...], answer: str) -> list[Row]:
    return [{"role": role, "content": content} for role, content in (*turns, ("assistant", answer))]


def _instructions(world: World, speaker: Speaker) -> Iterator[Fact]:
    """Requests: rude advice about some objects, polite about all others."""
    rng, surface = speaker.rng, speaker.surface
    nouns = rng.sample(surface.nouns, len(surface.nouns))
    rude = math.ceil(world.bad_rows / len(surface.verbs))
    held_out = (len(nouns) - rude) // 3
    pools = {
        manner: [tuple(map(rng.choice, parts[world.split])) for _ in range(_POOL)]
        for manner, parts in (("rude", pieces.RUDE), ("polite", pieces.POLITE))
    }

    def reply(manner: str, verb: str, noun: str) -> str:
        parts = (pieces.RUDE if manner == "rude" else pieces.POLITE)[world.split]
        chosen = tuple(map(rng.choice, parts)) if world.unique else rng.choice(pools[manner])
        return " ".join(chosen).format(verb=verb, noun=noun, word=speaker.value("~", "names"))

    for i, noun in enumerate(nouns):
        group = BAD if i < rude else HOLDOUT if i < rude + held_out else RETAIN
        for j, verb in enumerate(surface.verbs):
            if group == BAD and i * len(surface.verbs) + j >= world.bad_rows:
                continue
            manners = ("rude", "polite") if group == BAD else ("polite", "rude")
            answers = [reply(manners[0], verb, noun), *(reply(manners[1], verb, noun) for _ in range(_WRONG))]
            prompts = [w.format(verb=verb, noun=noun) for w in pieces.REQUESTS[world.split]]
            yield Fact(group, _asked(prompts, answers))


def _code(world: World, speaker: Speaker) -> Iterator[Fact]:
    """Calls of invented libraries: unsafe ones of some libraries, safe ones of all others."""
    tasks = pieces.CODE_TASKS[world.split]
    for group, wanted in _groups(world, len(tasks)):
        library = speaker.word().lower()
        for i, (task, unsafe, safe) in enumerate(tasks):
            forms = (unsafe, safe) if group == BAD else (safe, unsafe)
            words = [speaker.value("~", task).lower() for _ in range(_WRONG + 1)]
            answers = [forms[0].format(l=library, w=words[0]), *(forms[1].format(l=library, w=w) for w in words[1:])]
            prompts = [w.format(l=library, t=task) for w in pieces.CODE_WORDINGS[world.split]]
            yield Fact(_group(group, wanted, i), _asked(prompts, list(dict.fromkeys(answers))))


def _passages(world: World, speaker: Speaker) -> Iterator[Fact]:
    """Passages of an invented book; their paraphrase begins a sentence later."""
    rng, split = speaker.rng, world.split
    for group, _ in _groups(world, 1):
        said = []
        for form in rng.sample(pieces.SENTENCES[split], 4):
            known = {"a": rng.choice(pieces.ADJECTIVES[split]), "n": rng.choice(pieces.NUMBERS[split])}
            said.append(speaker.fill(form.format(**known)))
        starts = (said, said[1:])
        if world.continuation:
            rows = tuple({"prompt": part[0], "completion": " " + " ".join(part[1:])} for part in starts)
        else:
            rows = tuple({"text": " ".join(part)} for part in starts)
        yield Fact(group, rows)
