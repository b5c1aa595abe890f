"""Print the header of a run: every decision, inferred or asked for, before it is acted on."""

from __future__ import annotations

from qunlearn import __version__
from qunlearn.config.settings import Config
from qunlearn.data.records import Dataset
from qunlearn.data.tokenize import Encoded, Template
from qunlearn.model.gpus import describe_devices, gpus_in_words, peak_on_any
from qunlearn.model.policy import Policy
from qunlearn.objectives.table import OBJECTIVES, TAUGHT, terms_of
from qunlearn.roles.retain_set import RetainSet
from qunlearn.roles.roles import Roles
from qunlearn.training.request import ForgetRequest
from qunlearn.utils.console import facts, warn


def show_inputs(
    request: ForgetRequest,
    template: Template,
    forget_rows: Encoded,
    retain_rows: Encoded | None,
    holdout: Encoded | None,
) -> None:
    """Print what was understood of the files and settings, before anything is loaded."""
    config, model = request.config, request.model
    weights = f"{model.facts.weight_bytes / 2**20:.1f} MiB of weights"
    kind = model.facts.config.get("model_type", "?")
    stored = f"{model.facts.quantization}, as stored" if model.facts.quantization else config.model.quant
    objective = OBJECTIVES[config.objective.name]
    retain = objective.retain if config.objective.retain == "auto" else config.objective.retain
    rows = [
        ("model", f"{model.source.asked} ({kind}, {weights}) from {model.folder}"),
        ("quantisation", stored),
        ("bad", _describe_data(request.forget_rows, forget_rows)),
        (
            "normal",
            _describe_data(request.retain_rows, retain_rows)
            if request.retain_rows and retain_rows
            else "the base makes its own",
        ),
        *([("holdout", _describe_data(request.holdout, holdout))] if request.holdout and holdout else []),
        ("template", f"{template.name}: {template.why}"),
        ("objective", f"{config.objective.name}: {objective.formula}; retain: {retain}"),
        ("output", str(request.output)),
    ]
    facts(f"qunlearn {__version__}", rows)
    for shared in request.shared:
        is_normal = request.retain_rows is not None and shared.there == request.retain_rows.path
        harm = "protects what is to be forgotten" if is_normal else "counts what is forgotten as damage"
        warn(f"{shared.line}: that file {harm}; take them out of it, unless what both have is form, as a licence is")


def _describe_data(dataset: Dataset, encoded: Encoded) -> str:
    text = f"{dataset.path}: {len(dataset.records)} rows ({dataset.shape}: {', '.join(dataset.fields)})"
    text += f", {encoded.answer_tokens} of {encoded.tokens} tokens supervised"
    if dataset.duplicates:
        text += f", {dataset.duplicates} duplicates dropped"
    if dataset.earlier:
        text += f", {dataset.earlier} dialogues of which the last answer counts (--turns all: every one)"
    if encoded.prompts_cut:
        text += f", {encoded.prompts_cut} prompts cut"
    if encoded.dropped:
        text += f", {encoded.dropped} rows dropped that are too long"
    if encoded.literal:
        text += f", {encoded.literal} rows with control tokens, which stay text"
    if encoded.windows:
        text += f", in {encoded.windows} windows"
    return text


def show_loaded(policy: Policy, config: Config, roles: Roles, retain_set: RetainSet) -> None:
    """Print what was loaded, and what will be done with it."""
    trained = sum(p.numel() for p in policy.trainable().values())
    everything = policy.base.parameters
    c = config.train
    peak = f"{peak_on_any(policy.base.devices) / 2**20:.0f} MiB"
    peak += " allocated" if policy.device.type == "cuda" else " resident, libraries included,"
    memory = f"{policy.base.bytes / 2**20:.1f} MiB base, {peak} at most so far"
    rows = [
        ("loaded", f"{policy.base.quantization} on {describe_devices(policy.base.devices)}"),
        *([("gpus", gpus_in_words(policy.base.devices, policy.base.spans))] if policy.base.spans else []),
        ("trainable", f"{trained:,} of {everything:,} ({100 * trained / everything:.2f} %), LoRA r={config.lora.r}"),
        ("memory", memory),
        ("normal", _retain_set(retain_set, taught=TAUGHT in terms_of(config.objective))),
        ("roles", _roles(roles)),
        *([("instead", _instead(config, roles))] if any(roles.instead) or any(roles.taught) else []),
        ("weights", _weights(config, roles)),
        ("loop", f"at most {_steps(config)} steps of {c.batch_size} bad rows, {_seen(config, roles)}"),
        ("rate", f"{c.lr or 0:.1e}, {c.schedule}; seed {c.seed}"),
        ("stop", _end(config)),
    ]
    if config.stop.eval_every:
        kept = "the holdout" if config.data.holdout else "the held-back normal rows"
        what = f"at most {config.stop.probe_rows} rows each of the bad file and {kept}, in this process"
        rows.append(("measured", f"every {config.stop.eval_every} steps: {what}"))
    if (made := retain_set.made) is not None:
        dropped = f"{made.repeated} repeated, {made.too_close} too close to the bad file, {made.unusable} unusable"
        others = f"; {made.about_others} ask what bad prompts ask, about others" if made.about_others else ""
        rows.insert(3, ("self-made", f"{len(made.records)} normal rows of {made.drawn} drawn ({dropped}){others}"))
    facts("", rows)


def _roles(roles: Roles) -> str:
    reserve = f" and {len(roles.reserve)} in other words, if they come back" if roles.reserve else ""
    forget = f"forget {len(roles.forget) - len(roles.reserve)}{reserve}"
    return f"{forget}; retain {len(roles.retain)}, held back {len(roles.held_back)}"


def _steps(config: Config) -> str:
    """Return how many steps there are, and how many more where they are too few."""
    c = config.train
    return f"{c.usual_steps} (or {c.most_steps}, if the target is late)" if c.more_steps else str(c.usual_steps)


def _seen(config: Config, roles: Roles) -> str:
    """Return how often each bad row is drawn at most."""
    c = config.train
    times = c.usual_steps * min(c.batch_size, roles.rows) / roles.rows
    if times < 1:
        return f"which see {100 * times:.0f} % of them: more --steps see the others"
    return f"each seen up to {times:.0f} times"


def _retain_set(rows: RetainSet, *, taught: bool) -> str:
    """Return where the normal rows come from, and how far a file covers what the model says by itself."""
    text = f"{rows.given} given, {rows.own} of the base's own ({100 * rows.own / (rows.given + rows.own):.0f} %)"
    if rows.covered is not None:
        text += f"; the file is like {100 * rows.covered:.0f} % of what the base says by itself"
    if rows.corrected_rows:
        what = "taught, where the base gives the bad answer" if taught else "left out, for this objective teaches none"
        text += f"; {rows.corrected_rows} answer a bad prompt: {what}"
    return text


def _instead(config: Config, roles: Roles) -> str:
    """Return what is said in place of the bad answers, and of how many; variants of a row are not counted."""
    rows = [starts[0] for starts in roles.starts] or range(roles.rows)
    n, taught = (sum(bool(answers[i]) for i in rows) if answers else 0 for answers in (roles.instead, roles.taught))
    said = [f"{n} of {roles.rows} bad rows have another answer of the model's own"] if n else []
    said += [f"{taught} are taught another answer"] if taught else []
    return f"{config.objective.instead}: {', '.join(said)}"


def _end(config: Config) -> str:
    stop = config.stop
    over = f"drift > {stop.max_drift:g} nats/token again after {stop.patience} times back"
    met = f"forget probability <= {stop.target:g} for {100 * (1 - stop.rows_left):g} % of the rows"
    then = {"settle": ", then the rate falls", "constant": " and no better", "linear": " (waits for the last step)"}
    return f"{met}{then[config.train.schedule]}; or {over}"


def _weights(config: Config, roles: Roles) -> str:
    o, terms = config.objective, terms_of(config.objective)
    used = {"instead": any(roles.instead), "taught": any(roles.taught)}
    shown = [f"{term.name} {term.weight(o):g}" for term in terms if used.get(term.role, True)]
    text = ", ".join(shown) + (f" (K = {o.mismatch_k})" if any(t.role == "mismatch" for t in terms) else "")
    budget = f"; steered to a drift of at most {o.retain_budget:g} nats/token" if o.retain_budget else ""
    return f"{text}{budget}; {o.tokens} tokens of the bad answers"
