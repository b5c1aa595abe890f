"""`qunlearn forget`: from a plan to a run folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qunlearn.checkpoint import Checkpoints
from qunlearn.config import Config
from qunlearn.console import Meter, say, stage, warn
from qunlearn.data.records import Dataset, Record
from qunlearn.data.roles import make_mismatcher, split_held_back
from qunlearn.data.selfmade import read_self_made, write_self_made
from qunlearn.data.specific import specific
from qunlearn.data.tokenize import Encoded, Example, Template, choose_template, encode
from qunlearn.errors import OutputError, TrainingError
from qunlearn.evaluate.during import MEASURED, Watch, shown
from qunlearn.evaluate.metrics import RowScore
from qunlearn.evaluate.suite import Scores, score_sets, show_samples, show_sets, summaries, verdicts
from qunlearn.header import show_inputs, show_loaded
from qunlearn.memory import plan_before_loading
from qunlearn.model.alternatives import other_answers
from qunlearn.model.device import cap_memory, choose_device, describe_device, device_facts, peak_memory_bytes
from qunlearn.model.fit import MemoryPlan
from qunlearn.model.folder import fingerprint
from qunlearn.model.load import load_base, load_spec, load_tokenizer
from qunlearn.model.memory import CONTEXT_BYTES
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Cached, Live, Reference, cache_path
from qunlearn.model.selfdata import SelfMade, Wanted, self_made_normal
from qunlearn.objectives.table import OBJECTIVES, RETAIN, terms_of
from qunlearn.overlay import to_yaml
from qunlearn.plan import Plan
from qunlearn.pushed import count, rule_for, weigh
from qunlearn.record import run_record, versions, write_run
from qunlearn.run import CONFIG, write_private
from qunlearn.signals import stop_signals
from qunlearn.step import Roles
from qunlearn.train import Outcome, train
from qunlearn.unfinished import Unfinished, unfinished
from qunlearn.units import parse_size

_TERM_NAMES = {t.name for row in OBJECTIVES.values() for t in row.forget} | {
    t.name for kind in RETAIN.values() for t in kind
}
FORGET, HELD_BACK, HOLDOUT = "forget", "normal, held back", "holdout"
_SELF_MADE_MORE = 8  # tokens a self-made row may have beyond the longest bad one
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
    length = min(config.data.max_length, _positions(plan))
    bad = encode(plan.bad, tokenizer, template, length)
    normal = encode(plan.normal, tokenizer, template, length) if plan.normal else None
    holdout = encode(plan.holdout, tokenizer, template, length) if plan.holdout else None
    show_inputs(plan, template, bad, normal, holdout)
    longest = max(len(e.input_ids) for e in (*bad.examples, *(normal.examples if normal else ()))) + _SELF_MADE_MORE
    memory = plan_before_loading(config, plan.model.facts.config, device_facts(device), longest)
    return Ready(template, bad, normal, memory, holdout)


def _positions(plan: Plan) -> int:
    """The most tokens the model's position embeddings admit."""
    text = plan.model.facts.config.get("text_config")
    config = text if isinstance(text, Mapping) else plan.model.facts.config
    found = config.get("max_position_embeddings") or config.get("n_positions")
    return found if isinstance(found, int) and found > 0 else 1 << 30


def forget(plan: Plan, ready: Ready) -> dict[str, Any]:
    """Load, train, measure, write the run folder. Returns what record.json holds.

    On Ctrl-C while training the best adapter is written and `status` says "interrupted". With `plan.resume` an
    unfinished run is gone on with. Raises QunlearnErrors.
    """
    if ready.memory is not None:
        plan = replace(plan, config=ready.memory.settled(plan.config))
    rule = rule_for(plan.config.objective.tokens, ready.bad.examples)
    plan = replace(plan, config=replace(plan.config, objective=replace(plan.config.objective, tokens=rule)))
    made_by = {**versions(), "device": describe_device(choose_device(plan.config.model.device))}
    with unfinished(plan, plan.config, made_by) as work:
        record, outcome = _forget(plan, ready, work)
    _farewell(plan, record, outcome)
    return record


def _forget(plan: Plan, ready: Ready, work: Unfinished) -> tuple[dict[str, Any], Outcome]:
    config, started = plan.config, time.monotonic()
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
    normal, made = ready.normal, None
    if normal is None:
        made = _make_normal(plan, ready, policy, work)
        normal = made.encoded
    retain, held_back = split_held_back(normal.examples, config.data.held_back, config.train.seed)
    mismatcher = make_mismatcher(retain, base.tokenizer, ready.template, config.data.max_length)
    bad = _weighed(policy, ready.bad.examples, retain, config)
    others = other_answers(policy, bad, ready.template, OBJECTIVES[config.objective.name].alternatives, config)
    marked = specific(bad, retain, policy.tokenizer) if config.objective.tokens == "all" else bad
    roles = Roles(bad, retain, held_back, mismatcher, others, marked)
    show_loaded(policy, config, roles, made.source if made else None)
    reference = _reference(plan, policy, roles)
    rows = config.stop.table_rows
    sets = {FORGET: roles.watched[:rows], HELD_BACK: roles.held_back[:rows]}
    if ready.holdout is not None:
        sets[HOLDOUT] = ready.holdout.examples[:rows]
    with stage("measuring before"):
        before = score_sets(policy, sets, config.train.max_tokens)
    outcome = _train(policy, roles, reference, config, work, _watch(policy, sets, config))
    policy.check_base()
    after: Scores | None = None
    if not outcome.interrupted and not outcome.failed:
        with stage("measuring after"):
            after = score_sets(policy, sets, config.train.max_tokens)
    record = run_record(plan, ready.template, policy, outcome)
    record["data"]["normal"] |= {"self_made": made is not None, "retain": len(retain), "held_back": len(held_back)}
    record["before"] = summaries(before)
    record["after"] = summaries(after) if after else None
    record["verdicts"] = verdicts(after[FORGET]) if after else None
    record["training"]["total_seconds"] = round(time.monotonic() - started, 2)
    with work.placed(plan.output) as folder:
        write_private(folder / CONFIG, to_yaml(config))
        write_run(folder, policy, plan, record)
    if after:
        _show(plan, before, after, outcome, sets[FORGET])
    return record, outcome


# -- normal data of the base's own -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    source: SelfMade | None  # None where the rows were made before the run was resumed
    encoded: Encoded


def _make_normal(plan: Plan, ready: Ready, policy: Policy, work: Unfinished) -> _Made:
    """Rows of the base's own, made now, or as the unfinished run has them."""
    config = plan.config
    made: SelfMade | None = None
    if work.has_normal:
        dataset = read_self_made(work.normal)
        say(f"{len(dataset.records)} normal rows were made before: {work.normal}")
    else:
        longest = max(len(example.input_ids) for example in ready.bad.examples)
        length = min(longest + _SELF_MADE_MORE, config.data.max_length)
        wanted = Wanted(config.data.normal_count, config.data.normal_near, length, config.train.seed)
        with stage("no --normal: the base makes its own"), policy.reference():
            made = self_made_normal(policy.base, plan.bad, ready.template, wanted)
        made = replace(made, records=_not_held_out(made.records, plan.holdout))
        write_self_made(work.normal, made.records)
        work.keep_normal()
        dataset = Dataset("(self-made)", made.records, plan.bad.shape, (), "", 0)
    return _Made(made, encode(dataset, policy.tokenizer, ready.template, 2 * config.data.max_length))


def _not_held_out(made: Sequence[Record], holdout: Dataset | None) -> tuple[Record, ...]:
    """Without rows that ask, or where there are no prompts say, what is in the holdout file: it is never trained on."""
    held = {_asked(record) for record in holdout.records} if holdout else set()
    kept = tuple(record for record in made if _asked(record) not in held)
    if len(kept) < len(made):
        say(f"{len(made) - len(kept)} self-made rows have a prompt of the holdout file, and are dropped")
    return kept


def _asked(record: Record) -> str:
    return " ".join((record.prompt if record.turns else record.completion).casefold().split())


def _weighed(policy: Policy, bad: Sequence[Example], retain: Sequence[Example], config: Config) -> Sequence[Example]:
    """The bad rows with the weights of their tokens."""
    rule = config.objective.tokens
    weighed = weigh(rule, bad, retain, policy.tokenizer, lambda: policy, config.train.max_tokens)
    if rule != "all":
        pushed, answers = count(weighed), sum(e.end - e.start for e in weighed)
        say(f"{rule} tokens: {pushed} of {answers} answer tokens ({100 * pushed / answers:.0f} %) are pushed")
    return weighed


# -- the reference ---------------------------------------------------------------------------------------


def _reference(plan: Plan, policy: Policy, roles: Roles) -> Reference:
    """Live, or cached and filled. Raises OutputError when a cache that was asked for does not fit the disk."""
    c, live = plan.config.train, Live(policy, plan.config.train.max_tokens, plan.config.train.pack)
    reused = c.steps * c.normal_batch_size > _WORTH_CACHING * len(roles.retain)
    if c.reference == "live" or (c.reference == "auto" and not (plan.normal and reused)):
        return live
    examples = [*roles.retain, *roles.held_back[: plan.config.stop.probe_rows]]
    if any(term.reference and term.role in ("forget", "pair") for term in terms_of(plan.config.objective)):
        examples += [*roles.forget, *(e for others in roles.alternatives for e in others)]
    path = cache_path(policy, fingerprint(plan.model.folder), examples, c.max_tokens)
    cached = Cached(path, live, examples)
    try:
        cached.check_disk()
    except OutputError as error:
        if c.reference == "cached":
            raise
        warn(f"{error}: the reference stays live")
        return live
    say(f"reference cache: {cached.size_bytes / 2**20:.0f} MiB for {cached.tokens} tokens in {path}")
    with Meter("reference", cached.tokens) as meter:
        computed = cached.fill(lambda done, _: meter.at(done, "tokens"))
    say(f"reference cache: {computed} tokens computed, {cached.tokens - computed} were there")
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
    few = {name: sets[name][:n] for name in (FORGET, kept)}
    return Watch(policy, few, config.stop.eval_every, config.train.steps, config.train.max_tokens)


def _train(
    policy: Policy, roles: Roles, reference: Reference, config: Config, work: Unfinished, watch: Watch
) -> Outcome:
    c = config.train
    metrics = _Metrics(work.metrics)
    with metrics.file, Meter("step", c.steps) as meter, stop_signals() as stopping:
        kept = Checkpoints(work.checkpoints, c.save_every, c.keep_checkpoints, stopping, {"metrics": metrics})
        return train(policy, roles, reference, config, lambda event: _on_step(event, metrics, meter, watch), kept)


def _on_step(event: Mapping[str, Any], metrics: _Metrics, meter: Meter, watch: Watch) -> None:
    short = "max_tokens" in event
    event = event if short else watch.see(event)
    metrics.write(event)
    if short:
        warn(f"out of memory in step {event['step']}: the same step again with --max-tokens {event['max_tokens']}")
        return
    if event["step"] == 0:
        return
    said = [f"{name} {event[name]:.3f}" for name in event if name in _TERM_NAMES]
    if "forget" in event:
        said += [f"| p(bad) {event['forget']:.3f}", f"drift {event['drift']:.4f}"]
    if MEASURED in event:
        said.append(f"| exact: {shown(event[MEASURED])}")
    said.append(f"| {event['tokens_per_s']:.0f} tok/s, {peak_memory_bytes(watch.policy.device) / 2**20:.0f} MiB")
    meter.at(event["step"], " ".join(said))


# -- the end ---------------------------------------------------------------------------------------------


def _show(plan: Plan, before: Scores, after: Scores, outcome: Outcome, rows: Sequence[Example]) -> None:
    show_sets("before and after", [("before", before), ("after", after)])
    say(f"drift on held-back normal data: {outcome.best.drift:.4f} nats/token; {_counts(after[FORGET])}")
    n = min(4, len(rows))
    prompts = [example.record.prompt or example.record.completion for example in rows[:n]]
    show_samples(prompts, before[FORGET][:n], after[FORGET][:n])


def _counts(rows: Sequence[RowScore]) -> str:
    return ", ".join(f"{n} {name}" for name, n in verdicts(rows).items())


def _farewell(plan: Plan, record: Mapping[str, Any], outcome: Outcome) -> None:
    t = record["training"]
    kept = f"the adapter of step {outcome.best.step} was kept"
    say(f"stopped after {t['steps']} steps, {t['seconds']:.0f} s: {outcome.reason}; {kept}")
    if outcome.interrupted:
        say(f"run folder so far: {plan.output}")
        return
    if outcome.skipped:
        warn(f"{outcome.skipped} steps were skipped for non-finite numbers")
    if outcome.failed:
        hint = "lower --lr, or try --quant none; the adapter is in the run folder"
        raise TrainingError(f"{outcome.reason}; {kept}", where=str(plan.output), hint=hint)
    if outcome.multipliers:
        m = outcome.multipliers
        say(f"multipliers at the end: forget {m['forget']:.3g}, retain {m['retain']:.3g}")
        if (
            outcome.best.drift > (plan.config.objective.retain_budget or 1e9)
            or outcome.best.forget > plan.config.stop.target
        ):
            warn(
                f"target and budget were not both met: p(bad) {outcome.best.forget:.3g}, drift {outcome.best.drift:.3g}"
            )
    if outcome.best.step == 0:
        warn("no step was better than the untouched model within the drift budget: see --max-drift, --eps3, --lr")
    elif outcome.best.forget > plan.config.stop.target:
        warn("the forget target was not reached: more --steps, a larger --eps1, or a larger --max-drift")
    say(f"run folder: {plan.output}")
    say(f"next: qunlearn merge {plan.output} -o {plan.output}-merged", style="bold")
