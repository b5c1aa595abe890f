"""Prepare a run: rows as token ids, the model with a fresh adapter, roles, and the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qunlearn.config.settings import Config
from qunlearn.data.tokenize import Encoded, Example, Template, choose_template, encode
from qunlearn.errors import NothingToForgetError, OutputError
from qunlearn.hub.fingerprint import fingerprint
from qunlearn.hub.positions import positions_of
from qunlearn.memory.gpus import GpusPlan
from qunlearn.memory.plan import MemoryPlan
from qunlearn.memory.show import plan_before_loading
from qunlearn.memory.show_gpus import gpus_plan_before_loading, shards_plan_before_loading
from qunlearn.memory.step import CONTEXT_BYTES
from qunlearn.model.device import cap_memory, choose_device, device_facts
from qunlearn.model.gpus import SHARDED, chosen_devices
from qunlearn.model.load import load_spec, load_tokenizer
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Cached, Live, Reference, cache_path, prune
from qunlearn.model.sharded import check_sharding, shard
from qunlearn.objectives.table import OBJECTIVES, terms_of
from qunlearn.parallel.parts import in_shards
from qunlearn.parallel.ranks import current
from qunlearn.roles.alternatives import other_answers
from qunlearn.roles.behaviour import with_fewer_words, without_phrases
from qunlearn.roles.instead import Instead, instead_rows, longest_given
from qunlearn.roles.mismatch import NO_MISMATCH, Mismatcher, make_mismatcher
from qunlearn.roles.retain_set import RetainSet
from qunlearn.roles.roles import Roles
from qunlearn.roles.specific_tokens import specific
from qunlearn.roles.split import sampled
from qunlearn.roles.token_weights import count, weigh
from qunlearn.training.bases import Bases
from qunlearn.training.gradients import block_of, recordable
from qunlearn.training.header import show_inputs
from qunlearn.training.record import versions
from qunlearn.training.request import ForgetRequest
from qunlearn.training.resume import date_begun, identity
from qunlearn.training.retain_rows import longest_own
from qunlearn.training.schedule import auto_lr
from qunlearn.utils.console import Meter, say, warn
from qunlearn.utils.launch import count_here, process_count
from qunlearn.utils.units import parse_size

_WORTH_CACHING = 1.5  # times each normal row is drawn, from which one pass over all of them costs less


@dataclass(frozen=True)
class Prepared:
    """A checked run with its rows as token ids, before the weights are loaded."""

    request: ForgetRequest
    template: Template
    forget_rows: Encoded
    retain_rows: Encoded | None
    memory: MemoryPlan | GpusPlan | None  # None where the architecture is not known
    holdout: Encoded | None = None


def prepare(request: ForgetRequest) -> Prepared:
    """Tokenise the files and print the header. Raises DataError for what does not fit."""
    config = request.config
    terms = terms_of(config.objective)  # raises where nothing would be trained
    if config.model.device_map == SHARDED:
        current().first(lambda: check_sharding(config, layered=any(term.layered for term in terms)))
    devices = chosen_devices(config.model.device, config.model.device_map)
    tokenizer = load_tokenizer(request.model.folder, trust_remote_code=config.model.trust_remote_code)
    files = (request.forget_rows, request.retain_rows, request.holdout)
    template = choose_template(tokenizer, config.data.template, *files, date=date_begun(request))
    length = config.data.max_length
    forget_rows = encode(request.forget_rows, tokenizer, template, length)
    retain_rows = (
        encode(request.retain_rows, tokenizer, template, length, drop_long=True) if request.retain_rows else None
    )
    holdout = encode(request.holdout, tokenizer, template, length, drop_long=True) if request.holdout else None
    show_inputs(request, template, forget_rows, retain_rows, holdout)
    longest = max(len(e.input_ids) for e in (*forget_rows.examples, *(retain_rows.examples if retain_rows else ())))
    if retain_rows is None or config.data.own_share > 0:
        longest = max(longest, longest_own(forget_rows, config, positions_of(request.model.facts.config)))
    if request.instead is not None:
        longest = max(longest, longest_given(forget_rows.examples, request.instead, tokenizer, length))
    facts = [device_facts(device) for device in devices]
    memory: MemoryPlan | GpusPlan | None
    if len(devices) > 1:
        memory = gpus_plan_before_loading(config, request.model.facts.config, facts, longest)
    elif config.model.device_map == SHARDED and devices[0].type == "cuda":
        memory = shards_plan_before_loading(config, request.model.facts.config, facts * process_count(), longest)
    else:
        memory = plan_before_loading(config, request.model.facts.config, facts[0], longest)
    return Prepared(request, template, forget_rows, retain_rows, memory, holdout)


@contextlib.contextmanager
def loaded_policy(ready: Prepared, bases: Bases | None) -> Iterator[Policy]:
    """Load the base onto its device, or take the one that is there, with a fresh adapter.

    Where there are to be other runs the base is kept when this one ends well, or finds nothing to forget.
    """
    request, config = ready.request, ready.request.config
    spec = load_spec(config.model)
    if ready.memory is not None:
        spec = replace(spec, cache_bytes=ready.memory.cache_bytes, spans=ready.memory.spans)
    sharded = config.model.device_map == SHARDED
    if sharded:
        spec = replace(spec, device_map=SHARDED, spans=())
    if config.model.vram:
        for device in chosen_devices(config.model.device, config.model.device_map):
            cap_memory(device, parse_size(config.model.vram, "--vram") - CONTEXT_BYTES)
    base = (bases or Bases()).load(request.model.folder, spec)
    train, kept = config.train, config.train.kept_blocks or 0
    policy = Policy.new(base, config.lora, seed=train.seed, checkpointing=train.recomputes, kept_blocks=kept)
    if sharded:
        policy = shard(policy, choose_device(config.model.device), current())
    policy.seal_base()
    current().check_same(lambda: _facts(request, policy))
    current().copy(p for p in policy.trainable().values() if not in_shards(p))  # of a shard there is one
    for note in base.notes:
        warn(note)
    try:
        yield policy
    except NothingToForgetError:
        if bases is not None:
            bases.keep(policy, request.model.folder, spec)
        raise
    if bases is not None:
        bases.keep(policy, request.model.folder, spec)


def _facts(request: ForgetRequest, policy: Policy) -> dict[str, object]:
    """Return what must be the same in all processes, or they would not draw the same steps, or add up unlike things."""
    found = identity(request, request.config)
    settings = found.pop("settings")
    kind = {"quantization": policy.base.quantization, "dtype": policy.dtype, "device": policy.device.type}
    return {**settings, **found, **versions(), **kind, "packing": policy.packing}


def settle(config: Config, policy: Policy) -> Config:
    """Replace what is still `auto` once the model is there, so that config.yaml says what ran.

    That is the learning rate, the retain side, the block that is steered, and what the memory plan could not settle.
    """
    objective, train = config.objective, config.train
    lr = train.lr if train.lr is not None else auto_lr(policy.hidden_size, OBJECTIVES[objective.name].lr)
    optimizer = "adamw" if train.optimizer == "auto" else train.optimizer
    checkpointing = "always" if train.checkpointing == "auto" else train.checkpointing
    retain = OBJECTIVES[objective.name].retain if objective.retain == "auto" else objective.retain
    layer = block_of(config, policy) if any(term.layered for term in terms_of(objective)) else objective.layer
    compile_ = "graphs" if train.compile != "off" and recordable(config) and policy.records else "off"
    if train.compile != compile_ == "off" and policy.device.type == "cuda":
        say("passes are launched piece by piece: these settings, or this model, cannot be recorded (--compile)")
    embeddings = "device" if config.model.embeddings == "auto" else config.model.embeddings
    return replace(
        config,
        model=replace(config.model, embeddings=embeddings),
        objective=replace(objective, retain=retain, layer=layer),
        train=replace(
            train,
            lr=lr,
            optimizer=optimizer,
            checkpointing=checkpointing,
            kept_blocks=train.kept_blocks or 0,
            compile=compile_,
            max_tokens=train.pass_tokens,
        ),
    )


def make_roles(
    ready: Prepared,
    policy: Policy,
    retain_set: RetainSet,
    forget_rows: Sequence[Example],
    marked: Sequence[Example],
    starts: Sequence[Sequence[int]] = (),
) -> Roles:
    """Return the data of the run by role, from the bad rows that the base knows; `starts` as in `Roles`."""
    request, config, template = ready.request, ready.request.config, ready.template
    wanted = {term.role for term in terms_of(config.objective)}
    mismatcher: Mismatcher = NO_MISMATCH
    if "mismatch" in wanted:
        mismatcher = make_mismatcher(retain_set.retain, policy.tokenizer, template, config.data.max_length)
    others = other_answers(policy, forget_rows, template, OBJECTIVES[config.objective.name].alternatives, config)
    instead = Instead([], [])
    if wanted & {"instead", "taught"}:
        instead = instead_rows(policy, forget_rows, retain_set, template, request.instead, config)
        forget_rows = instead.replaced(forget_rows)
    given = [example.record for example in ready.retain_rows.examples] if ready.retain_rows else ()
    kept = without_phrases(retain_set, instead.phrases, given)
    roles = Roles(
        forget_rows,
        kept.retain,
        kept.held_back,
        mismatcher,
        others,
        instead.own,
        instead.taught,
        marked,
        starts,
        instead.phrases,
    )
    return with_fewer_words(policy, roles, instead.behaviour, template, config)


def weigh_rows(
    policy: Policy, ready: Prepared, forget_rows: Sequence[Example], retain: Sequence[Example]
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return bad rows with the weights of the tokens that are pushed, and of those that are watched.

    Where a whole answer is pushed, form that stays probable would hide what is gone.
    """
    config = ready.request.config
    asked, limit = config.objective.tokens, config.train.pass_tokens
    weighed = weigh(asked, forget_rows, retain, policy.tokenizer, ready.template, lambda: policy, limit)
    if asked != "auto":
        return weighed, weighed
    marks = iter(specific([e for e in weighed if not e.weights], retain, policy.tokenizer))
    return weighed, [e if e.weights else next(marks) for e in weighed]


def say_weighed(asked: str, weighed: Sequence[Example]) -> None:
    """Say how much of the bad answers is pushed, where it is not all of them."""
    pushed, answers = count(weighed), sum(e.end - e.start for e in weighed)
    if pushed < answers:
        say(f"{asked} tokens: {pushed} of {answers} answer tokens ({100 * pushed / answers:.0f} %) are pushed")


def make_reference(request: ForgetRequest, policy: Policy, roles: Roles) -> Reference:
    """Return the reference: live, or cached and filled.

    Raises OutputError when a cache that was asked for cannot be written.
    """
    c, live = request.config.train, Live(policy, request.config.train.pass_tokens, request.config.train.pack)
    reused = c.usual_steps * c.normal_batch_size > _WORTH_CACHING * len(roles.retain)
    roles_of = {term.role for term in terms_of(request.config.objective) if term.reference and not term.layered}
    worth = request.retain_rows and reused and "retain" in roles_of
    if c.reference == "live" or (c.reference == "auto" and not worth):
        return live
    examples = [*sampled(roles.held_back, request.config.stop.probe_rows, c.seed)]
    if "retain" in roles_of:
        examples = [*roles.retain, *examples]
    if roles_of & {"forget", "pair"}:
        examples += [*roles.forget, *(e for others in roles.alternatives for e in others)]
    try:
        path = cache_path(policy, fingerprint(request.model.folder), examples, c.pass_tokens)
        return _filled(Cached(path, live, examples))
    except OutputError as error:
        if c.reference == "cached":
            raise
        warn(f"{error}: the reference stays live")
        return live


def _filled(cached: Cached) -> Cached:
    """The same, with everything in its file; files that no run has used for long make room. Raises OutputError.

    The processes of a machine fill one file, each every nth chunk of it.
    """
    ranks = current()
    ranks.agreed(lambda: ranks.first_here(cached.make))
    say(f"reference cache: {cached.size_bytes / 2**20:.0f} MiB for {cached.tokens} tokens in {cached.path}")
    with Meter("reference", cached.tokens) as meter:
        share = (ranks.here, count_here() if ranks.count > 1 else 1)
        computed = ranks.agreed(lambda: cached.fill(lambda done, _: meter.at(done, "tokens"), share))
    if ranks.count > 1:
        say(f"reference cache: {computed} tokens computed by this process, beside the shares of the others")
        ranks.agreed(cached.fill)
    else:
        say(f"reference cache: {computed} tokens computed, {cached.tokens - computed} were there")
    if not ranks.here and (gone := prune(cached.path)):
        say(f"reference cache: {gone / 2**20:.0f} MiB of earlier runs were removed")
    return cached
