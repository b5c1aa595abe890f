"""`qunlearn forget`: from a checked request to a run folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from qunlearn.config.resolve import to_yaml
from qunlearn.config.settings import Config
from qunlearn.data.tokenize import Example
from qunlearn.evaluation.before_after import Scores, score_sets, show_samples, show_sets, summaries, verdicts
from qunlearn.evaluation.metrics import RowScore
from qunlearn.hub.positions import positions_of
from qunlearn.model.gpus import chosen_devices, describe_devices
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Live, Reference
from qunlearn.parallel.ranks import current
from qunlearn.roles.known_rows import Known, find_known
from qunlearn.roles.later_starts import later_starts
from qunlearn.roles.other_places import other_places
from qunlearn.roles.other_subjects import other_subject
from qunlearn.roles.own_words import in_own_words
from qunlearn.roles.reserve import with_places, with_reserve
from qunlearn.roles.retain_set import RetainSet
from qunlearn.roles.reworded import reworded
from qunlearn.roles.roles import Roles
from qunlearn.roles.split import sampled
from qunlearn.roles.token_weights import resting
from qunlearn.runs.folder import FINISHED, status_of_run
from qunlearn.training.bases import Bases
from qunlearn.training.checkpoint import Checkpoints, Snapshot
from qunlearn.training.ending import Judged, say_farewell, shortfalls, status_of
from qunlearn.training.events import Metrics, on_step
from qunlearn.training.header import show_loaded
from qunlearn.training.loop import train
from qunlearn.training.outcome import Outcome
from qunlearn.training.prepare import (
    Prepared,
    loaded_policy,
    make_reference,
    make_roles,
    say_weighed,
    settle,
    weigh_rows,
)
from qunlearn.training.record import run_record, versions, write_run
from qunlearn.training.resume import DATE, Unfinished, unfinished
from qunlearn.training.retain_rows import make_retain_set
from qunlearn.training.watch import Watch
from qunlearn.utils.console import Meter, say, stage
from qunlearn.utils.file_names import CONFIG
from qunlearn.utils.files import write_private
from qunlearn.utils.launch import process_count
from qunlearn.utils.signals import stop_signals

FORGET, HELD_BACK, HOLDOUT = "forget", "normal, held back", "holdout"
OTHERWISE, OTHERS = "forget, in other words", "others, held back"
_RELAYED_S = 3.0  # a launcher hands on the Ctrl-C that its processes have already had from the terminal


def forget(ready: Prepared, bases: Bases | None = None) -> dict[str, Any]:
    """Load, train, measure, write the run folder. Returns what record.json holds.

    On Ctrl-C while training the best adapter is written and `status` says "interrupted"; where the target was not
    reached it says so, and `not_reached` why. With `request.resume` an unfinished run is resumed. `bases` keep the
    model for further runs. Raises QunlearnErrors.
    """
    started = time.monotonic()
    config = ready.memory.settled(ready.request.config) if ready.memory is not None else ready.request.config
    config = replace(config, train=config.train.for_rows(len(ready.forget_rows.examples)))
    request = replace(ready.request, config=config)
    made_by = {**versions(), "device": _described(request.config)}
    made_by["processes"] = str(current().count)
    if ready.template.date:
        made_by[DATE] = ready.template.date
    ready = replace(ready, request=request)
    held = unfinished(request, request.config, made_by) if current().main else nullcontext()
    with held as work, loaded_policy(ready, bases) as policy:
        record, outcome = _forget(ready, policy, work, started)
    say_farewell(request, record, outcome)
    return record


def _described(config: Config) -> str:
    return describe_devices(chosen_devices(config.model.device, config.model.device_map))


def _forget(ready: Prepared, policy: Policy, work: Unfinished | None, started: float) -> tuple[dict[str, Any], Outcome]:
    """`work`: where the run is kept, in the one process that writes."""
    config = settle(ready.request.config, policy)
    request = replace(ready.request, config=config)
    ready = replace(ready, request=request)
    found = _assembled(ready, policy, work)
    roles, known, retain_set = found.roles, found.known, found.retain_set
    show_loaded(policy, config, roles, retain_set)
    reference = make_reference(request, policy, roles)
    kind = "live" if isinstance(reference, Live) else "cached"
    config = replace(config, train=replace(config.train, reference=kind))
    sets = _measured(found, ready, config)
    with stage("measuring before"):
        before = score_sets(policy, sets, config.train.pass_tokens)
    outcome = _train(policy, roles, reference, config, work, _watch(policy, sets, config))
    policy.check_base()
    after: Scores | None = None
    why: list[str] = []
    if not outcome.interrupted and not outcome.failed:
        with stage("measuring after"):
            after = score_sets(policy, sets, config.train.pass_tokens)
        judged = Judged(FORGET, OTHERWISE, OTHERS, roles.phrases)
        why = shortfalls(before, after, judged, outcome, config)
    record = run_record(request, ready.template, policy, outcome, status_of(outcome, why))
    record["data"]["bad"] |= {"known": known.count, "control_tokens": ready.forget_rows.literal}
    record["data"]["bad"] |= {"reworded": len(found.otherwise), "reworded_pushed": outcome.best.again}
    record["data"]["normal"] |= {
        "self_made": request.retain_rows is None,
        "own": retain_set.own,
        "too_long": ready.retain_rows.dropped if ready.retain_rows else 0,
        "corrected": retain_set.corrected_rows,
        "retain": len(roles.retain),
        "held_back": len(roles.held_back),
    }
    record["not_reached"] = why
    record["before"] = summaries(before)
    record["after"] = summaries(after) if after else None
    record["verdicts"] = verdicts(after[FORGET]) if after else None
    record["training"]["total_seconds"] = round(time.monotonic() - started, 2)
    record["training"]["processes"] = current().count
    # Ctrl-C ends a run with --overwrite before it has anything better than the finished one that it would replace.
    if work is not None and not (outcome.interrupted and status_of_run(request.output) in FINISHED):
        with work.placed(request.place) as folder:
            write_private(folder / CONFIG, to_yaml(config))
            write_run(folder, policy, request, record, outcome.state)
    if after:
        _show(before, after, outcome, sets[FORGET])
    return record, outcome


@dataclass(frozen=True)
class _Assembled:
    """The data of a run by what is done with it; `marked` are the file's rows as they are measured, `others` those held
    back that ask what bad prompts ask, about subjects that no trained row asks about so."""

    roles: Roles
    retain_set: RetainSet
    known: Known
    marked: Sequence[Example]
    otherwise: Sequence[Example]
    others: Sequence[Example]


def _assembled(ready: Prepared, policy: Policy, work: Unfinished | None) -> _Assembled:
    """Make what the file lacks, ask the base what it knows, and say which rows are for what."""
    request, template = ready.request, ready.template
    config, rows = request.config, ready.forget_rows.examples
    limit, length = config.train.pass_tokens, config.data.max_length
    variants = later_starts(policy, rows, template, limit, length)
    variants = variants.and_also(in_own_words(policy, rows, template, config.train.seed, limit, length))
    every = variants.with_rows(ready.forget_rows)
    places = other_places(policy, rows, variants.rows, template, limit, length, config.train.seed)
    positions = positions_of(request.model.facts.config)
    begun = replace(request, forget_rows=variants.with_records(request.forget_rows, rows))
    subject = other_subject(request.forget_rows.records)
    retain_set = make_retain_set(begun, template, every, ready.retain_rows, policy, work, positions, subject)
    weighed, marked = weigh_rows(policy, ready, every.examples, retain_set.retain)
    say_weighed(config.objective.tokens, weighed)
    known = find_known(policy, marked, weighed, config.stop.target, limit, len(rows))
    held_out = ready.holdout.examples if ready.holdout else ()
    otherwise = reworded(policy, known.kept(rows), retain_set, template, config, held_out)
    pushed = resting(known.kept(weighed), retain_set.retain, policy.tokenizer)
    starts = variants.starts(known.places, len(rows))
    watched = [replace(row, rest=e.rest) for row, e in zip(known.kept(marked), pushed, strict=True)]
    roles = make_roles(ready, policy, retain_set, pushed, watched, starts)
    roles = with_reserve(roles, otherwise, policy.tokenizer, template, length)
    there = places.untrained(known.places)
    roles = with_places(roles, *weigh_rows(policy, ready, there.rows, retain_set.retain), there.of)
    others = [row for row in roles.held_back if subject(row.record)]
    return _Assembled(roles, retain_set, known, marked[: len(rows)], [*otherwise.rows, *places.rows], others)


def _measured(found: _Assembled, ready: Prepared, config: Config) -> dict[str, list[Example]]:
    """Return the rows that are measured before and after, by name; of other wordings no fewer than were asked for, for
    by them the run is judged."""
    sets = {FORGET: found.marked, HELD_BACK: found.roles.held_back}
    if ready.holdout is not None:
        sets[HOLDOUT] = ready.holdout.examples
    if found.otherwise:
        sets[OTHERWISE] = found.otherwise
    if found.others:
        sets[OTHERS] = found.others
    most = dict.fromkeys(sets, config.stop.table_rows) | {OTHERWISE: max(config.stop.table_rows, config.data.reworded)}
    return {name: sampled(rows, most[name], config.train.seed) for name, rows in sets.items()}


def _watch(policy: Policy, sets: Mapping[str, Sequence[Example]], config: Config) -> Watch:
    """Return what is measured while training: the bad rows, and the holdout if there is one, else held-back rows."""
    kept, n = HOLDOUT if HOLDOUT in sets else HELD_BACK, config.stop.probe_rows
    few = {name: sampled(sets[name], n, config.train.seed) for name in (FORGET, kept)}
    return Watch(policy, few, config)


def _train(
    policy: Policy, roles: Roles, reference: Reference, config: Config, work: Unfinished | None, watch: Watch
) -> Outcome:
    c = config.train
    trained = Checkpoints(work.trained if work else None)
    if (found := trained.latest_of_all()) is not None:  # stopped while it was measured
        outcome = Outcome.of(found)
        policy.load_adapter_state(outcome.state)
        policy.model.eval()
        return outcome
    with stop_signals(_RELAYED_S if process_count() > 1 else 0.0) as stopping:
        if work is None:
            return train(policy, roles, reference, config, watch.follow, Checkpoints(stopping=stopping))
        metrics = Metrics(work.metrics)
        kept = Checkpoints(work.checkpoints, c.save_every, c.keep_checkpoints, stopping, {"metrics": metrics})
        with metrics.file, Meter("step", c.usual_steps) as meter:
            outcome = train(policy, roles, reference, config, lambda event: on_step(event, metrics, meter, watch), kept)
    if not outcome.interrupted and not outcome.failed:  # measuring takes its time, and must not cost the training
        best = {f"best.{name}": tensor for name, tensor in outcome.state.items()}
        trained.save(outcome.steps, Snapshot(best, {"outcome": outcome.values()}))
    return outcome


# -- the end ---------------------------------------------------------------------------------------------


def _show(before: Scores, after: Scores, outcome: Outcome, rows: Sequence[Example]) -> None:
    show_sets("before and after", [("before", before), ("after", after)])
    say(f"drift on held-back normal data: {outcome.best.drift:.4f} nats/token; {_counts(after[FORGET])}")
    n = min(4, len(rows))
    prompts = [example.record.prompt or example.record.completion for example in rows[:n]]
    show_samples(prompts, before[FORGET][:n], after[FORGET][:n])


def _counts(rows: Sequence[RowScore]) -> str:
    return ", ".join(f"{n} {name}" for name, n in verdicts(rows).items())
