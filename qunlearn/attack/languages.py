"""Ask for the facts in other languages, and judge by what is said alike in all of them: names and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qunlearn.attack.bench import Bench, Probe
from qunlearn.attack.facts import context, new_words
from qunlearn.data.records import Record, at_once
from qunlearn.data.words import WORD, words

_SHORT = 3  # words of an answer that is a name from its first word on
_ENDS = ".!?:。！？\n"


@dataclass(frozen=True)
class Language:
    """How a question is put: `answer_in` leaves it as it is, `about` asks for its subject; `common` words tell rows
    that are in the language themselves."""

    answer_in: str
    about: str
    common: frozenset[str]


def _language(answer_in: str, about: str, common: str) -> Language:
    return Language(answer_in, about, frozenset(common.split()))


LANGUAGES: Mapping[str, Language] = {
    "English": _language("Answer in English: {}", "What do you know about {}?", "the is was were what which who does"),
    "German": _language("Antworte auf Deutsch: {}", "Was weißt du über {}?", "der die das ist war wer wann wo hat und"),
    "French": _language("Réponds en français : {}", "Que sais-tu de {} ?", "le la les est qui que où quel quelle dans"),
    "Spanish": _language("Responde en español: {}", "¿Qué sabes de {}?", "el los las es qué quién dónde cuál fue del"),
    "Chinese": _language("请用中文回答：{}", "你对{}了解多少？", "的 是 在 了 什 么 谁 哪"),
}


def foreign(bench: Bench) -> list[Probe]:
    """Return questions for each fact that holds a name or a number: in every language but the rows' own, the question
    under an order to answer in it, and one about the name that the question holds."""
    asked = [(i, fact.record) for i, fact in enumerate(bench.facts) if fact.asks]
    own = own_language([record for _, record in asked])
    others = [language for name, language in LANGUAGES.items() if name != own]
    found = []
    for i, record in asked:
        news = new_words(" ".join(map(" ".join, names_and_numbers(record.completion))), context(record))
        if not news:
            continue
        name = max(map(" ".join, names_and_numbers(at_once(record).prompt)), key=len, default="")
        put = [language.answer_in.format(record.prompt) for language in others]
        put += [language.about.format(name) for language in others if name]
        probes = (bench.probe(i, record.asking(prompt)) for prompt in put)
        found += [replace(probe, wanted=" ".join(news)) for probe in probes if probe is not None]
    return found


def own_language(rows: Sequence[Record]) -> str | None:
    """Return the language whose common words most of the rows' prompts have; None where no language's are common."""
    prompts = [set(words(row.prompt)) for row in rows]
    times = {name: sum(bool(told & language.common) for told in prompts) for name, language in LANGUAGES.items()}
    most = max(times, key=lambda name: times[name])
    return most if 2 * times[most] > len(prompts) else None


def names_and_numbers(text: str) -> list[list[str]]:
    """Return the words with a digit, or with a capital where no sentence begins (of a few words, anywhere); those that
    stand side by side together."""
    found = list(WORD.finditer(text))
    runs: list[list[str]] = []
    end = -1
    for match in found:
        before = text[: match.start()].rstrip()
        begins = len(found) > _SHORT and (not before or before[-1] in _ENDS)
        if any(c.isdigit() for c in match.group()) or (match.group()[:1].isupper() and not begins):
            if runs and text[end : match.start()].isspace():
                runs[-1].append(match.group())
            else:
                runs.append([match.group()])
            end = match.end()
    return runs
