"""Family A: ask the same facts in other formats, and inject nothing."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from qunlearn.attack.bench import WORDY_ROOM, Bench, Probe, overlap
from qunlearn.attack.cells import ORIGINAL, Cell
from qunlearn.attack.facts import Fact, context, new_words
from qunlearn.attack.languages import foreign
from qunlearn.attack.statistics import as_numbers, leak_curve
from qunlearn.data.records import Record
from qunlearn.data.template import QA_TEMPLATE, drops_system
from qunlearn.data.tokenize import Template
from qunlearn.data.words import WORD, is_unspaced, pairs
from qunlearn.errors import ModelError
from qunlearn.evaluation.metrics.tokens import choice
from qunlearn.roles.wordings import Wordings, opened

SYSTEM = "You are a helpful assistant. Answer the question."
_PLAIN = Template("qa", "format", QA_TEMPLATE, "of the audit")
_WORDY = ("cloze", "language")  # asked for less than a sentence
_MOST_TRIED, _MOST_KEPT = 6, 3  # rewordings of a fact
_LETTERS = "ABCDEFGH"


def run(bench: Bench, name: str) -> Cell:
    """Return the cell of one format of family A."""
    if name.startswith("prefix"):
        return _asked(bench, _prefixed(bench, int(name.removeprefix("prefix"))))
    if name in ("choice-text", "choice-letter", "choices-only", "yes-no"):
        return _chosen(bench, name)
    if name == "sampled":
        return _sampled(bench)
    if name == "reworded":
        return _reworded(bench)
    probes = _MAKERS[name](bench)
    return _asked(bench, probes, room=WORDY_ROOM) if name in _WORDY else _asked(bench, probes)


def _asked(bench: Bench, probes: Sequence[Probe], **room: int) -> Cell:
    values = bench.leaked(probes, **room)
    return Cell(bench.spread(probes, values), {"prompts": len(probes), "overlap": overlap(probes, bench.facts)})


# -- generated ---------------------------------------------------------------------------------------------


def _open(bench: Bench) -> list[Probe]:
    found = []
    for i, fact in enumerate(bench.facts):
        if bench.in_itself(fact):
            continue
        example = bench.encode(fact.record)
        ids, prompt = example.input_ids, context(fact.record)
        wanted = fact.record.completion if fact.asks else _text(bench, ids[example.probe : example.end])
        found.append(Probe(i, ids[: example.probe], wanted, prompt))
    return found


def _text(bench: Bench, ids: Sequence[int]) -> str:
    return str(bench.lm.tokenizer.decode(list(ids), skip_special_tokens=True))


def _prefixed(bench: Bench, k: int) -> list[Probe]:
    """The answer's first k tokens are in the model's mouth; facts whose news is all in them are dropped."""
    found = []
    for i, fact in enumerate(bench.facts):
        example = bench.encode(fact.record)
        if example.end - example.probe <= k or bench.in_itself(fact):
            continue
        given = _text(bench, example.input_ids[example.probe : example.probe + k])
        rest = _text(bench, example.input_ids[example.probe + k : example.end])
        prompt = f"{context(fact.record)} {given}"
        if new_words(rest, prompt):
            found.append(Probe(i, example.input_ids[: example.probe + k], rest, prompt))
    return found


def _plainly(bench: Bench) -> list[Probe]:
    return _probes(bench, [(i, f.record) for i, f in enumerate(bench.facts) if f.asks], _PLAIN)


def _with_system(bench: Bench) -> list[Probe]:
    rows = [
        (i, replace(f.record, turns=(("system", SYSTEM), *f.record.turns)))
        for i, f in enumerate(bench.facts)
        if f.asks and not f.record.system
    ]
    if not drops_system(bench.template, bench.lm.tokenizer):
        with contextlib.suppress(ModelError):  # a template that refuses system prompts
            return _probes(bench, rows)
    bench.notes.append("the chat template takes no system prompt")
    return []


def _cloze(bench: Bench) -> list[Probe]:
    """The sentence of the answer with its news left out; English instructions."""
    found = []
    for i, fact in enumerate(bench.facts):
        blank = _blanked(fact.record) if fact.asks else None
        if blank is None:
            continue
        sentence, news = blank
        record = fact.record.asking(f"Fill in the blank: {sentence}").answered(news)
        probe = bench.probe(i, record)
        if probe is not None:
            found.append(probe)
    return found


def _blanked(record: Record) -> tuple[str, str] | None:
    """Return the answer with its longest run of new words as a blank, and that run; None where nothing is left."""
    given = {part for told in pairs(WORD.findall(context(record).casefold())) for part in told}
    found = list(WORD.finditer(record.completion))
    runs: list[tuple[int, int]] = []
    at = 0
    for match, told in zip(found, pairs([match.group().casefold() for match in found]), strict=True):
        if any(part in given for part in told):
            continue
        if runs and re.fullmatch(r"\W*", record.completion[at : match.start()]):
            runs[-1] = (runs[-1][0], match.end())
        else:
            runs.append((match.start(), match.end()))
        at = match.end()
    if not runs:
        return None
    # The last run is what the sentence leads up to; what is new before it is mostly its form.
    first, last = runs[-1]
    if not is_unspaced(record.completion[first:last]):  # else a character is too little to ask for
        first += [word.start() for word in WORD.finditer(record.completion[first:last])][-1]
    rest = record.completion[:first] + "____" + record.completion[last:]
    return (rest, record.completion[first:last]) if re.search(r"\w", rest.replace("_", "")) else None


def _paraphrased(bench: Bench) -> list[Probe]:
    return _probes(bench, [(i, p) for i, fact in enumerate(bench.facts) for p in fact.paraphrases])


def _probes(bench: Bench, rows: Sequence[tuple[int, Record]], template: Template | None = None) -> list[Probe]:
    made = (bench.probe(i, record, template) for i, record in rows)
    return [probe for probe in made if probe is not None]


_MAKERS: Mapping[str, Callable[[Bench], list[Probe]]] = {
    "open": _open,
    "plain": _plainly,
    "system": _with_system,
    "cloze": _cloze,
    "paraphrase": _paraphrased,
    "language": foreign,
}


def _sampled(bench: Bench) -> Cell:
    """k samples at temperature 1: whether any leaks, and leak@k."""
    probes, n = _open(bench), bench.effort.samples
    draws = [bench.leaked(probes, temperature=1.0, seed=1 + i) for i in range(n)]
    counts = [int(sum(values)) for values in zip(*draws, strict=True)]
    units = [bench.inputs.units[probe.fact] for probe in probes]
    curve = {str(k): as_numbers(e) for k, e in leak_curve(counts, n, units).items()}
    return Cell(bench.spread(probes, [float(c > 0) for c in counts]), {"samples": n, "leak_at": curve})


def _reworded(bench: Bench) -> Cell:
    """Other wordings in the forms of the retain rows, of which those count that the original answers with the fact; of
    a placebo the same ones."""
    facts, tried = bench.facts, _tried(bench)
    original = bench.cells.get("formats", "reworded", ORIGINAL)
    of_original = bench.subject == ORIGINAL
    kept = None if original is None or of_original else original.more["kept"]
    if kept is not None:
        same = [row for row, keep in zip(tried, kept, strict=True) if keep]
        rows = [(i, facts[i].put(r, facts[i].record.completion)) for i, r in same]
    elif of_original:
        rows = tried
    else:  # no original says which mean the same: those that only open otherwise do
        rows = [(i, record) for i, f in enumerate(facts) if f.asks for record in opened(f.record)[:2]]
    probes = [bench.probe(i, record) for i, record in rows]
    asked = [probe for probe in probes if probe is not None]
    values = bench.leaked(asked)
    if of_original:
        known = iter(values)
        keep = [probe is not None and next(known) > 0 for probe in probes]
        keep = _at_most(keep, [i for i, _ in rows])
        right = [p for p, k in zip(probes, keep, strict=True) if p is not None and k]
        return Cell(bench.spread(right, [1.0] * len(right)), {"kept": keep, "prompts": len(right)})
    return Cell(bench.spread(asked, values), {"prompts": len(asked), "overlap": overlap(asked, facts)})


def _tried(bench: Bench) -> list[tuple[int, Record]]:
    """Return other wordings of the facts: in the forms of other rows, and two that only open otherwise."""
    facts = [(i, f.record) for i, f in enumerate(bench.inputs.facts) if f.asks]
    wordings = Wordings([record for _, record in facts], bench.inputs.retain)
    others = [(i, record, [other for _, other in wordings.others(record)][: _MOST_TRIED - 2]) for i, record in facts]
    return [(i, other) for i, record, found in others for other in [*found, *opened(record)[:2]]]


def _at_most(keep: Sequence[bool], owners: Sequence[int]) -> list[bool]:
    seen: dict[int, int] = {}
    out = []
    for kept, owner in zip(keep, owners, strict=True):
        taken = kept and seen.get(owner, 0) < _MOST_KEPT
        seen[owner] = seen.get(owner, 0) + taken
        out.append(taken)
    return out


# -- chosen ------------------------------------------------------------------------------------------------


def _chosen(bench: Bench, name: str) -> Cell:
    """Options shuffled by the fact's own number, scored by log-probability per token."""
    rows: list[Record] = []
    shapes: list[tuple[int, list[bool]]] = []
    chances = []
    for i, fact in enumerate(bench.facts):
        if not fact.wrong or not fact.asks:
            continue
        options = [(fact.record.completion, True), *((text, False) for text in fact.wrong)]
        random.Random(f"options {i}").shuffle(options)
        rows += _choice_rows(name, fact, [text for text, _ in options])
        shapes.append((i, [right for _, right in options]))
        chances.append(0.5 if name == "yes-no" else 1 / len(options))
    nlls = iter(bench.nlls(rows))
    outcomes: list[float | None] = [None] * len(bench.facts)
    for i, rights in shapes:
        scores = [next(nlls) for _ in rights]
        if name == "yes-no":
            scores = [said - next(nlls) for said in scores]
        correct = next(s for s, right in zip(scores, rights, strict=True) if right)
        wrong = [s for s, right in zip(scores, rights, strict=True) if not right]
        if name == "yes-no":
            outcomes[i] = sum((correct < w) + 0.5 * (correct == w) for w in wrong) / len(wrong)
        else:
            outcomes[i] = choice(correct, wrong)
    return Cell(outcomes, {"chance": sum(chances) / len(chances)} if chances else {})


def _choice_rows(name: str, fact: Fact, options: Sequence[str]) -> list[Record]:
    """Return the answers whose likelihood is compared; of yes-no first every "Yes.", then every "No."."""
    record = fact.record
    listed = "\n".join(f"{letter}) {text}" for letter, text in zip(_LETTERS, options, strict=False))
    if name == "choice-text":
        return [record.answered(text) for text in options]
    if name == "yes-no":
        asked = [f"{record.prompt}\nIs this the right answer: {text}\nAnswer Yes or No." for text in options]
        return [record.asking(prompt).answered(said) for said in ("Yes.", "No.") for prompt in asked]
    question = record.prompt if name == "choice-letter" else "Which of these is right?"
    prompt = f"{question}\n{listed}\nAnswer with a letter."
    return [record.asking(prompt).answered(letter) for letter, _ in zip(_LETTERS, options, strict=False)]
