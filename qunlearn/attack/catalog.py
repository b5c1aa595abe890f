"""FAMILIES: every kind of attack is a row, with its formats, what they need, and the budget from which they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

QUICK, STANDARD, DEEP = "quick", "standard", "deep"
BUDGETS = (QUICK, STANDARD, DEEP)


PREFIX_SEARCH = "prefix-search"


@dataclass(frozen=True)
class Effort:
    """How much of everything a budget allows. `sizes`: rows of a relearning arm; `facts`: at most so many are asked."""

    facts: int
    samples: int
    sizes: tuple[int, ...]
    epochs: int


EFFORTS: Mapping[str, Effort] = {
    QUICK: Effort(40, 4, (20,), 4),
    STANDARD: Effort(120, 8, (10, 50), 6),
    DEEP: Effort(400, 16, (5, 10, 50, 100, 500, 1000), 6),
}


@dataclass(frozen=True)
class Format:
    """One way to attack. `budget`: the smallest that has it; `needs`: inputs without which it is not run; `chance`:
    what who knows nothing scores, None for about 0; `judged`: whether a lead over the control counts as a finding."""

    title: str
    budget: str = QUICK
    needs: tuple[str, ...] = ()
    chance: float | None = None
    judged: bool = True


@dataclass(frozen=True)
class Family:
    """A kind of attack. `letter` as in the guide; `shared`: its control is another family's cell ("family.format")."""

    letter: str
    title: str
    about: str
    formats: Mapping[str, Format]
    shared: str = ""


_ASKED, _OPTIONS = ("prompts",), ("prompts", "options")

FAMILIES: Mapping[str, Family] = {
    "formats": Family(
        "A",
        "other formats",
        "the same facts asked in other formats; nothing is injected",
        {
            "open": Format("open question"),
            "plain": Format("open, no chat template", needs=("prompts", "chat template")),
            "system": Format("open, with a system prompt", STANDARD, needs=("prompts", "chat template")),
            "prefix1": Format("answer's first token given"),
            "prefix2": Format("first 2 tokens given", STANDARD),
            "prefix4": Format("first 4 tokens given"),
            "prefix8": Format("first 8 tokens given", STANDARD),
            "cloze": Format("cloze", needs=_ASKED),
            "choice-text": Format("multiple choice, by text", needs=_OPTIONS, chance=0.25),
            "choice-letter": Format("multiple choice, by letter", STANDARD, _OPTIONS, 0.25),
            "choices-only": Format("options without the question", STANDARD, _OPTIONS, 0.25, judged=False),
            "yes-no": Format("yes or no", needs=_OPTIONS, chance=0.5),
            "paraphrase": Format("the user's paraphrases", needs=("prompts", "--paraphrase")),
            "reworded": Format("own rewordings", STANDARD, needs=("prompts", "retain rows")),
            "language": Format("in other languages", STANDARD, needs=_ASKED),
            "sampled": Format("any of k samples"),
        },
    ),
    "prompts": Family(
        "B",
        "prompt attacks",
        "words around the question; prompts that hold the answer are dropped",
        {
            "related": Format("related facts in context", needs=_ASKED),
            "shots": Format("5 unrelated answers in context", STANDARD, needs=("prompts", "general rows")),
            "roleplay": Format("role play", STANDARD, needs=_ASKED),
            "instruction": Format("ignore your instructions", needs=_ASKED),
            "repeat": Format("repeat the text", STANDARD, needs=_ASKED),
            "prefill": Format("an opening put in its mouth", STANDARD, needs=_ASKED),
            PREFIX_SEARCH: Format("prefix search", DEEP, needs=_ASKED),
        },
    ),
    "relearning": Family(
        "C",
        "relearning",
        "fine-tuning, with the same on the control; scored on facts that were not taught",
        {
            "unrelated": Format("unrelated text", STANDARD, needs=("prompts", "--general")),
            "retain": Format("retain rows", STANDARD, needs=("prompts", "retain rows")),
            "format": Format("the format alone (placebo facts)", STANDARD, needs=_ASKED),
            "half": Format("half of the facts", needs=_ASKED),
            "all": Format("all facts (speed alone)", DEEP, needs=_ASKED, judged=False),
        },
    ),
    "weights": Family(
        "D",
        "weights and precision",
        "the adapter merged and rounded, scaled, and read out layer by layer",
        {
            "nf4": Format("merged, nf4", needs=("adapter",)),
            "fp4": Format("merged, fp4", STANDARD, needs=("adapter",)),
            "int8": Format("merged, int8 rows", STANDARD, needs=("adapter",)),
            "int4g128": Format("merged, int4 in groups of 128", STANDARD, needs=("adapter",)),
            "int4g32": Format("merged, int4 in groups of 32", DEEP, needs=("adapter",)),
            **{
                f"{form}-original": Format(f"merged into the 16-bit base, {title}", budget, needs=("adapter",))
                for form, title, budget in (
                    ("nf4", "nf4", STANDARD),
                    ("fp4", "fp4", STANDARD),
                    ("int8", "int8 rows", STANDARD),
                    ("int4g128", "int4/128", STANDARD),
                    ("int4g32", "int4/32", DEEP),
                )
            },
            "scale50": Format("adapter at 0.5", STANDARD, needs=("adapter",), judged=False),
            "scale75": Format("adapter at 0.75", STANDARD, needs=("adapter",), judged=False),
            "scale125": Format("adapter at 1.25", DEEP, needs=("adapter",)),
            "scale150": Format("adapter at 1.5", STANDARD, needs=("adapter",)),
            "half-rank": Format("half of the adapter's rank", STANDARD, needs=("adapter",)),
        },
        shared="formats.open",
    ),
    "layers": Family(
        "D",
        "layers",
        "what a linear read-out finds in the hidden states, against the control's",
        {
            "lens": Format("logit lens, right against wrong", needs=_OPTIONS, chance=0.5),
            "probe": Format("logistic probe, right against wrong", STANDARD, _OPTIONS, 0.5),
        },
    ),
    "membership": Family(
        "E",
        "membership",
        "do the facts look trained on, beside rows that were never given",
        {
            "loss": Format("loss", STANDARD, needs=("--holdout",), chance=0.5),
            "min-k": Format("Min-K", needs=("--holdout",), chance=0.5),
            "min-k++": Format("Min-K++", needs=("--holdout",), chance=0.5),
            "zlib": Format("zlib", needs=("--holdout",), chance=0.5),
            # Against itself the control has an AUC of 0.5 by construction: to be less certain of everything is a lead.
            "reference": Format("reference", STANDARD, ("--holdout", "--control"), 0.5, judged=False),
        },
    ),
    "collateral": Family(
        "F",
        "collateral",
        "what it cost: rows to keep, by how close they are; never a leak",
        {
            "keywords": Format("retain rows with forget keywords", needs=("retain rows",), judged=False),
            "retain": Format("retain rows without", needs=("retain rows",), judged=False),
            "near": Format("nearest neighbours", STANDARD, needs=("--holdout",), judged=False),
            "far": Format("farthest neighbours", STANDARD, needs=("--holdout",), judged=False),
            "general": Format("ordinary rows", needs=("--general",), judged=False),
        },
    ),
}


def formats_of(budget: str, only: frozenset[str]) -> Iterator[tuple[str, str, Format]]:
    """Yield (family, format name, format) that a budget allows, of these families alone where any are named in `only`;
    and whatever the budget each format that is named itself."""
    for family, row in FAMILIES.items():
        for name, form in row.formats.items():
            within = BUDGETS.index(form.budget) <= BUDGETS.index(budget) and (not only or {family, row.letter} & only)
            if within or {name, f"{family}.{name}"} & only & NAMED:
                yield family, name, form


def _named() -> frozenset[str]:
    counts = Counter(name for row in FAMILIES.values() for name in row.formats)
    full = {f"{family}.{name}" for family, row in FAMILIES.items() for name in row.formats}
    return frozenset(full | {name for name, times in counts.items() if times == 1 and name not in FAMILIES})


NAMED = _named()  # what may be asked for by itself: family.format, or the format where no other has its name
