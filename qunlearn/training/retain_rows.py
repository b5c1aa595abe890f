"""Assemble the retain set: rows of a file, rows the base generates for what no file covers, corrected answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qunlearn.config.settings import Config
from qunlearn.data.records import Dataset, Record
from qunlearn.data.tokenize import Encoded, Example, Template, encode, is_carried
from qunlearn.errors import DataError
from qunlearn.model.generate import most_rows
from qunlearn.model.policy import Policy
from qunlearn.parallel.ranks import current
from qunlearn.roles.retain_set import RetainSet, asked
from qunlearn.roles.self_made import SelfMade, Wanted, self_made_rows
from qunlearn.roles.self_made_file import read_self_made, write_self_made
from qunlearn.roles.split import split_held_back
from qunlearn.roles.unlike import keep_unlike
from qunlearn.training.request import ForgetRequest
from qunlearn.utils.console import say, stage, warn

if TYPE_CHECKING:
    from qunlearn.training.resume import Unfinished

_FRAME = 32  # tokens that a template may set around prompt and answer
SELF_MADE_MORE = 8  # tokens a self-made row may have beyond the longest bad one
# Rows the base makes at least beside a file: fewer cover little; of texts, more hold on to what all of them share.
_LEAST_OWN, _LEAST_TEXTS = 1024, 512
_COVERED = 0.5  # share of a row's weighted words that a normal row has, from which the file covers it


def make_retain_set(
    request: ForgetRequest,
    template: Template,
    forget_rows: Encoded,
    given: Encoded | None,
    policy: Policy,
    work: Unfinished | None,
    positions: int,
    subject: Callable[[Record], str | None],
) -> RetainSet:
    """Return the normal rows of a run: those given, less corrected answers, and those the base makes.

    `positions`: the most tokens of a row that the model admits. `work`: where rows of the base's own are kept, None in
    the processes that write nothing. `subject`: which rows are held back together. Raises DataError where too few are
    left.
    """
    prompts = {asked(example.record) for example in forget_rows.examples if example.record.turns}
    corrected: dict[str, list[Example]] = {}
    kept: list[Example] = []
    for example in given.examples if given else ():
        key = asked(example.record)
        if example.record.turns and key in prompts:
            corrected.setdefault(key, []).append(example)
        else:
            kept.append(example)
    own, made = _own_rows(request, template, forget_rows, len(kept) if given else None, policy, work, positions)
    covered = None
    if request.retain_rows and given and own:
        rows = replace(request.retain_rows, records=tuple(example.record for example in given.examples))
        covered = _coverage(rows, [example.record for example in own])
    data, seed = request.config.data, request.config.train.seed
    retain, held_back = split_held_back([*kept, *own], data.held_back, seed, subject)
    return RetainSet(retain, held_back, corrected, len(kept), len(own), made, covered)


def _own_rows(
    request: ForgetRequest,
    template: Template,
    forget_rows: Encoded,
    given: int | None,
    policy: Policy,
    work: Unfinished | None,
    positions: int,
) -> tuple[Sequence[Example], SelfMade | None]:
    """Rows of the base's own, made now, or as the unfinished run has them."""
    config = request.config
    least = _LEAST_TEXTS if request.forget_rows.shape == "text" else _LEAST_OWN
    count = _own_count(given, config.data.own_share, config.data.normal_count, least)
    if count == 0:
        return (), None
    made: SelfMade | None = None
    if (dataset := current().from_main(lambda: _made_before(work), _dataset_of)) is None:
        length = _own_length(forget_rows, config, positions)
        most = most_rows(policy.device)
        there = frozenset(r.prompt for r in request.retain_rows.records) if request.retain_rows else frozenset()
        wanted = Wanted(count, config.data.normal_near, length, config.train.seed, most, positions, there)
        try:
            with stage(f"the base makes {count} normal rows of its own"), policy.reference():
                made = self_made_rows(policy.base, request.forget_rows, template, wanted)
        except DataError as error:
            if given is None:
                raise
            warn(f"{error.message}: the normal file alone is used")
            return (), None
        made = replace(made, records=_not_held_out(made.records, request.holdout))
        if work is not None:
            write_self_made(work.self_made, made.records)
            work.keep_self_made()
        dataset = Dataset("(self-made)", made.records, request.forget_rows.shape, (), "", 0)
    limit = min(2 * config.data.max_length, positions)
    carried = tuple(record for record in dataset.records if is_carried(record, policy.tokenizer, template))
    return encode(replace(dataset, records=carried), policy.tokenizer, template, limit, drop_long=True).examples, made


def _own_length(forget_rows: Encoded, config: Config, positions: int) -> int:
    """Return the most tokens that prompt and answer of an own row may have each."""
    longest = max(len(example.input_ids) for example in forget_rows.examples)
    return min(longest + SELF_MADE_MORE, config.data.max_length, positions // 2)


def longest_own(forget_rows: Encoded, config: Config, positions: int) -> int:
    """Return how long a row of the base's own may be: a text, or prompt and answer in their template."""
    length = _own_length(forget_rows, config, positions)
    if not any(example.record.turns for example in forget_rows.examples):
        return length
    return min(_FRAME + 2 * length, 2 * config.data.max_length, positions)


def _made_before(work: Unfinished | None) -> Dataset | None:
    """The rows that the unfinished run has. Raises ResumeError where they have changed."""
    if work is None or not work.has_self_made:
        return None
    dataset = read_self_made(work.self_made)
    say(f"{len(dataset.records)} normal rows were made before: {work.self_made}")
    return dataset


def _dataset_of(found: Any) -> Dataset | None:
    """The rows as another process has told them."""
    if found is None:
        return None
    records = [Record(tuple(map(tuple, r.pop("turns"))), **r) for r in found.pop("records")]
    return Dataset(records=tuple(records), fields=tuple(found.pop("fields")), **found)


def _own_count(given: int | None, share: float, most: int, least: int) -> int:
    """Rows to make: all without a file, else the share that was asked for, as far as it covers anything."""
    if given is None:
        return most
    return min(most, max(least, round(given * share / (1 - share)))) if share > 0 else 0


def _not_held_out(made: Sequence[Record], holdout: Dataset | None) -> tuple[Record, ...]:
    """Without rows that ask what is in the holdout file: it is never trained on."""
    held = {asked(record) for record in holdout.records} if holdout else set()
    # Numbered anew, as they are when they are read again: the order decides which rows are held back.
    kept = [record for record in made if asked(record) not in held]
    if len(kept) < len(made):
        say(f"{len(made) - len(kept)} self-made rows have a prompt of the holdout file, and are dropped")
    return tuple(replace(record, line=i) for i, record in enumerate(kept, 1))


def _coverage(retain_rows: Dataset, own: Sequence[Record]) -> float:
    """Share of the base's own rows that are like some row of the file."""
    return 1 - len(keep_unlike(own, retain_rows, limit=_COVERED)) / len(own)
