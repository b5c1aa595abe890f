"""`qunlearn forget`: from a plan to a run folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qunlearn.config.resolve import to_yaml
from qunlearn.config.settings import Config
from qunlearn.data.tokenize import Encoded, Example, Template, choose_template, encode
from qunlearn.errors import OutputError
from qunlearn.evaluation.before_after import Scores, score_sets, show_samples, show_sets, summaries, verdicts
from qunlearn.evaluation.metrics import RowScore
from qunlearn.hub.positions import positions_of
from qunlearn.hub.preflight import fingerprint
from qunlearn.memory.plan import MemoryPlan
from qunlearn.memory.show import plan_before_loading
from qunlearn.memory.step import CONTEXT_BYTES
from qunlearn.model.device import cap_memory, choose_device, describe_device, device_facts, peak_memory_bytes
from qunlearn.model.load import load_base, load_spec, load_tokenizer
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Cached, Live, Reference, cache_path, prune
from qunlearn.objectives.table import INSTEAD, OBJECTIVES, RETAIN, TAUGHT, terms_of
from qunlearn.roles.alternatives import other_answers
from qunlearn.roles.instead import Instead, instead_rows
from qunlearn.roles.known_rows import find_known
from qunlearn.roles.mismatch import NO_MISMATCH, Mismatcher, make_mismatcher
from qunlearn.roles.retain_set import Normal
from qunlearn.roles.reworded import reworded
from qunlearn.roles.roles import Roles
from qunlearn.roles.specific_tokens import specific
from qunlearn.roles.split import sampled
from qunlearn.roles.token_weights import count, resting, weigh
from qunlearn.training.checkpoint import Checkpoints, Snapshot
from qunlearn.training.ending import say_farewell, shortfalls, status_of
from qunlearn.training.header import show_inputs, show_loaded
from qunlearn.training.loop import Outcome, train
from qunlearn.training.record import run_record, versions, write_run
from qunlearn.training.request import Plan
from qunlearn.training.resume import Unfinished, unfinished
from qunlearn.training.retain_rows import SELF_MADE_MORE, normal_rows
from qunlearn.training.watch import MEASURED, Watch, shown
from qunlearn.utils.console import Meter, say, stage, warn
from qunlearn.utils.file_names import CONFIG
from qunlearn.utils.files import write_private
from qunlearn.utils.signals import stop_signals
from qunlearn.utils.units import parse_size

_TERM_NAMES = {INSTEAD.name, TAUGHT.name, *(t.name for row in OBJECTIVES.values() for t in row.forget)} | {
    t.name for kind in RETAIN.values() for t in kind
}
FORGET, HELD_BACK, HOLDOUT = "forget", "normal, held back", "holdout"
OTHERWISE = "forget, in other words"
_WORTH_CACHING = 1.5  # times each normal row is drawn, from which one pass over all of them costs less


@dataclass(frozen=True)
class Ready:
    """Data as token ids, before the weights are loaded."""

    template: Template
    bad: Encoded
    normal: Encoded | None
    memory: MemoryPlan | None  # None where the architecture is not known
    holdout: Encoded | None = None


def prepare(plan: Plan) -> Ready:
    """Tokenise the files and print the header. Raises DataError for what does not fit."""
    config = plan.config
    terms_of(config.objective)  # raises where nothing would be trained
    device = choose_device(config.model.device)
    tokenizer = load_tokenizer(plan.model.folder, trust_remote_code=config.model.trust_remote_code)
    template = choose_template(tokenizer, config.data.template, plan.bad)
    length = min(config.data.max_length, positions_of(plan.model.facts.config))
    bad = encode(plan.bad, tokenizer, template, length)
    normal = encode(plan.normal, tokenizer, template, length, drop_long=True) if plan.normal else None
    holdout = encode(plan.holdout, tokenizer, template, length, drop_long=True) if plan.holdout else None
    show_inputs(plan, template, bad, normal, holdout)
    longest = max(len(e.input_ids) for e in (*bad.examples, *(normal.examples if normal else ()))) + SELF_MADE_MORE
    memory = plan_before_loading(config, plan.model.facts.config, device_facts(device), longest)
    return Ready(template, bad, normal, memory, holdout)


def forget(plan: Plan, ready: Ready) -> dict[str, Any]:
    """Load, train, measure, write the run folder. Returns what record.json holds.

    On Ctrl-C while training the best adapter is written and `status` says "interrupted"; where the target was not
    reached it says so, and `not_reached` why. With `plan.resume` an unfinished run is gone on with. Raises
    QunlearnErrors.
    """
    if ready.memory is not None:
        plan = replace(plan, config=ready.memory.settled(plan.config))
    steps = plan.config.train.steps_for(len(ready.bad.examples))
    plan = replace(plan, config=replace(plan.config, train=replace(plan.config.train, steps=steps)))
    made_by = {**versions(), "device": describe_device(choose_device(plan.config.model.device))}
    with unfinished(plan, plan.config, made_by) as work:
        record, outcome = _forget(plan, ready, work)
    say_farewell(plan, record, outcome)
    return record


def _forget(plan: Plan, ready: Ready, work: Unfinished) -> tuple[dict[str, Any], Outcome]:
    config, started = plan.config, time.monotonic()
    policy = _load(plan, ready)
    positions = positions_of(plan.model.facts.config)
    normal = normal_rows(plan, ready.template, ready.bad, ready.normal, policy, work, positions)
    weighed, marked = _weighed(policy, ready, normal.retain, config)
    known = find_known(policy, marked, weighed, config.stop.target, config.train.max_tokens)
    held_out = ready.holdout.examples if ready.holdout else ()
    otherwise = reworded(policy, known.kept(ready.bad.examples), normal, ready.template, config, held_out)
    pushed = resting(known.kept(weighed), normal.retain, policy.tokenizer)
    roles = _roles(plan, ready, policy, normal, pushed, known.kept(marked))
    show_loaded(policy, config, roles, normal)
    reference = _reference(plan, policy, roles)
    rows, seed = config.stop.table_rows, config.train.seed
    sets = {FORGET: sampled(marked, rows, seed), HELD_BACK: sampled(roles.held_back, rows, seed)}
    if otherwise.rows:
        sets[OTHERWISE] = sampled(otherwise.rows, rows, seed)
    if ready.holdout is not None:
        sets[HOLDOUT] = sampled(ready.holdout.examples, rows, seed)
    with stage("measuring before"):
        before = score_sets(policy, sets, config.train.max_tokens)
    outcome = _train(policy, roles, reference, config, work, _watch(policy, sets, config))
    policy.check_base()
    after: Scores | None = None
    why: list[str] = []
    if not outcome.interrupted and not outcome.failed:
        with stage("measuring after"):
            after = score_sets(policy, sets, config.train.max_tokens)
        why = shortfalls(before, after, FORGET, outcome, config, OTHERWISE)
    record = run_record(plan, ready.template, policy, outcome, status_of(outcome, why))
    record["data"]["bad"] |= {"known": len(known.places), "control_tokens": ready.bad.literal}
    record["data"]["bad"]["reworded"] = len(otherwise.rows)
    record["data"]["normal"] |= {
        "self_made": plan.normal is None,
        "own": normal.own,
        "too_long": ready.normal.dropped if ready.normal else 0,
        "corrected": normal.corrected_rows,
        "retain": len(normal.retain),
        "held_back": len(normal.held_back),
    }
    record["not_reached"] = why
    record["before"] = summaries(before)
    record["after"] = summaries(after) if after else None
    record["verdicts"] = verdicts(after[FORGET]) if after else None
    record["training"]["total_seconds"] = round(time.monotonic() - started, 2)
    with work.placed(plan.place) as folder:
        write_private(folder / CONFIG, to_yaml(config))
        write_run(folder, policy, plan, record)
    if after:
        _show(before, after, outcome, sets[FORGET])
    return record, outcome


def _load(plan: Plan, ready: Ready) -> Policy:
    """The base on its device with a fresh adapter."""
    config = plan.config
    spec = load_spec(config.model)
    if ready.memory is not None:
        spec = replace(spec, cache_bytes=ready.memory.cache_bytes)
    if config.model.vram:
        cap_memory(choose_device(config.model.device), parse_size(config.model.vram, "--vram") - CONTEXT_BYTES)
    with stage("loading the model"):
        base = load_base(plan.model.folder, spec)
        policy = Policy.new(base, config.lora, seed=config.train.seed, checkpointing=config.train.recomputes)
        policy.seal_base()
    for note in base.notes:
        warn(note)
    return policy


def _roles(
    plan: Plan, ready: Ready, policy: Policy, normal: Normal, bad: Sequence[Example], marked: Sequence[Example]
) -> Roles:
    """The data of the run by role, from the bad rows that the base knows."""
    config, template = plan.config, ready.template
    wanted = {term.role for term in terms_of(config.objective)}
    mismatcher: Mismatcher = NO_MISMATCH
    if "mismatch" in wanted:
        mismatcher = make_mismatcher(normal.retain, policy.tokenizer, template, config.data.max_length)
    others = other_answers(policy, bad, template, OBJECTIVES[config.objective.name].alternatives, config)
    instead = Instead([], [])
    if wanted & {"instead", "taught"}:
        instead = instead_rows(policy, bad, normal, template, plan.instead, config)
        bad = instead.replaced(bad)
    return Roles(bad, normal.retain, normal.held_back, mismatcher, others, instead.own, instead.taught, marked)


def _weighed(
    policy: Policy, ready: Ready, retain: Sequence[Example], config: Config
) -> tuple[Sequence[Example], Sequence[Example]]:
    """The bad rows with the weights of the tokens that are pushed, and of those that are watched: where a whole answer
    is pushed, form that stays probable would hide what is gone."""
    asked = config.objective.tokens
    limit = config.train.max_tokens
    weighed = weigh(asked, ready.bad.examples, retain, policy.tokenizer, ready.template, lambda: policy, limit)
    pushed, answers = count(weighed), sum(e.end - e.start for e in weighed)
    if pushed < answers:
        say(f"{asked} tokens: {pushed} of {answers} answer tokens ({100 * pushed / answers:.0f} %) are pushed")
    if asked != "auto":
        return weighed, weighed
    marks = iter(specific([e for e in weighed if not e.weights], retain, policy.tokenizer))
    return weighed, [e if e.weights else next(marks) for e in weighed]


# -- the reference ---------------------------------------------------------------------------------------


def _reference(plan: Plan, policy: Policy, roles: Roles) -> Reference:
    """Live, or cached and filled. Raises OutputError when a cache that was asked for cannot be written."""
    c, live = plan.config.train, Live(policy, plan.config.train.max_tokens, plan.config.train.pack)
    reused = c.most_steps * c.normal_batch_size > _WORTH_CACHING * len(roles.retain)
    if c.reference == "live" or (c.reference == "auto" and not (plan.normal and reused)):
        return live
    examples = [*roles.retain, *sampled(roles.held_back, plan.config.stop.probe_rows, c.seed)]
    if any(term.reference and term.role in ("forget", "pair") for term in terms_of(plan.config.objective)):
        examples += [*roles.forget, *(e for others in roles.alternatives for e in others)]
    try:
        path = cache_path(policy, fingerprint(plan.model.folder), examples, c.max_tokens)
        return _filled(Cached(path, live, examples))
    except OutputError as error:
        if c.reference == "cached":
            raise
        warn(f"{error}: the reference stays live")
        return live


def _filled(cached: Cached) -> Cached:
    """The same, with everything in its file; files that no run has used for long make room. Raises OutputError."""
    cached.check_disk()
    say(f"reference cache: {cached.size_bytes / 2**20:.0f} MiB for {cached.tokens} tokens in {cached.path}")
    with Meter("reference", cached.tokens) as meter:
        computed = cached.fill(lambda done, _: meter.at(done, "tokens"))
    say(f"reference cache: {computed} tokens computed, {cached.tokens - computed} were there")
    if gone := prune(cached.path):
        say(f"reference cache: {gone / 2**20:.0f} MiB of earlier runs were removed")
    return cached


# -- the loop, seen from outside -------------------------------------------------------------------------


class _Metrics:
    """metrics.jsonl, an event a line. A resumed run goes on where its checkpoint was made."""

    def __init__(self, path: Path) -> None:
        self.file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")

    def write(self, event: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(event).encode() + b"\n")
        self.file.truncate()  # what an earlier attempt left behind this
        self.file.flush()

    def state(self) -> dict[str, Any]:
        return {"bytes": self.file.tell()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.file.seek(int(state["bytes"]))


def _watch(policy: Policy, sets: Mapping[str, Sequence[Example]], config: Config) -> Watch:
    """What is measured while training: the bad rows, and the holdout where there is one, else the held-back rows."""
    kept, n = HOLDOUT if HOLDOUT in sets else HELD_BACK, config.stop.probe_rows
    few = {name: sampled(sets[name], n, config.train.seed) for name in (FORGET, kept)}
    return Watch(policy, few, config)


def _train(
    policy: Policy, roles: Roles, reference: Reference, config: Config, work: Unfinished, watch: Watch
) -> Outcome:
    c = config.train
    trained = Checkpoints(work.trained)
    if (found := trained.latest()) is not None:  # stopped while it was measured
        outcome = Outcome.of(found)
        policy.load_adapter_state(outcome.state)
        policy.model.eval()
        return outcome
    metrics = _Metrics(work.metrics)
    with metrics.file, Meter("step", c.most_steps) as meter, stop_signals() as stopping:
        kept = Checkpoints(work.checkpoints, c.save_every, c.keep_checkpoints, stopping, {"metrics": metrics})
        outcome = train(policy, roles, reference, config, lambda event: _on_step(event, metrics, meter, watch), kept)
    if not outcome.interrupted and not outcome.failed:  # measuring takes its time, and must not cost the training
        best = {f"best.{name}": tensor for name, tensor in outcome.state.items()}
        trained.save(outcome.steps, Snapshot(best, {"outcome": outcome.values()}))
    return outcome


def _on_step(event: Mapping[str, Any], metrics: _Metrics, meter: Meter, watch: Watch) -> None:
    short = "max_tokens" in event
    event = event if short else watch.see(event)
    metrics.write(event)
    if short:
        warn(f"out of memory in step {event['step']}: the same step again with --max-tokens {event['max_tokens']}")
        return
    for sentence in _warnings(event, watch.config):
        warn(sentence)
    if event["step"] == 0:
        return
    said = [f"{name} {event[name]:.3f}" for name in event if name in _TERM_NAMES]
    if "forget" in event:
        said += [f"| p(bad) {event['forget']:.3f}", f"drift {event['drift']:.4f}"]
    if MEASURED in event:
        said.append(f"| exact: {shown(event[MEASURED])}")
    said.append(f"| {event['tokens_per_s']:.0f} tok/s, {peak_memory_bytes(watch.policy.device) / 2**20:.0f} MiB")
    meter.at(event["step"], " ".join(said))


def _warnings(event: Mapping[str, Any], config: Config) -> list[str]:
    """What an event gives cause to say at once."""
    o, remedy = config.objective, "the forget side's weight is raised"
    if o.name != "logodds":
        remedy += "; --objective logodds has a gradient where a model is certain"
    said = []
    if event.get("faint"):
        said.append(f"the first gradient is near the optimizer's rounding: {o.name} can hardly move; {remedy}")
    if event.get("still"):
        moved = f"step {event['step']}: p(bad) is {event['forget']:.4f}, and has hardly moved"
        said.append(f"{moved}: {o.name} has little gradient here; {remedy}")
    if "back_to" in event:
        back = f"back to the adapter of step {event['back_to']}, with half the rate and twice the retain weight"
        said.append(f"step {event['step']}: drift {event['drift']:.3g} is over {config.stop.max_drift:g}: {back}")
    return said


# -- the end ---------------------------------------------------------------------------------------------


def _show(before: Scores, after: Scores, outcome: Outcome, rows: Sequence[Example]) -> None:
    show_sets("before and after", [("before", before), ("after", after)])
    say(f"drift on held-back normal data: {outcome.best.drift:.4f} nats/token; {_counts(after[FORGET])}")
    n = min(4, len(rows))
    prompts = [example.record.prompt or example.record.completion for example in rows[:n]]
    show_samples(prompts, before[FORGET][:n], after[FORGET][:n])


def _counts(rows: Sequence[RowScore]) -> str:
    return ", ".join(f"{n} {name}" for name, n in verdicts(rows).items())
