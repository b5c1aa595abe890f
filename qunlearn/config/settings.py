"""Every setting of a run: the only place where a default lives.

Flags, `--set`, recipes and `-c` files are overlays over these dataclasses; help texts and the documentation are
generated from the fields. How overlays are read and laid is in overlay.py.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qunlearn.errors import ConfigError

# What a number may be where a setting says nothing else: counts fit in 32 bits, and nothing is infinite.
_MOST_WHOLE, _MOST = 2**31 - 1, 1e9
MOST_SEED = 2**63 - 1  # seeds are added to, and PyTorch takes 64 bits


def _setting(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A field with its help text, its command-line flag and what values it may have (bounds are inclusive)."""
    meta = {"help": help, "flag": flag, "choices": tuple(choices), "low": low, "high": high}
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class ModelConfig:
    """Which base model, and how it is loaded."""

    name: str = _setting("", "A folder, a hub id, or a short name (see `qunlearn models`).", flag="--model")
    revision: str | None = _setting(None, "Branch, tag or commit on the hub.", flag="--revision")
    quant: str = _setting(
        "nf4",
        "How the base is quantised. NF4 is QLoRA's data type: 4 bits a weight.",
        flag="--quant",
        choices=("nf4", "fp4", "int8", "none"),
    )
    double_quant: bool = _setting(True, "Quantise the quantisation constants too: 0.25-0.3 GiB less at 7B.")
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N.", flag="--device")
    embeddings: str = _setting(
        "auto",
        "Where the input embeddings live: cpu spares the card a large vocabulary's table; auto: cpu where that makes "
        "it fit.",
        flag="--embeddings",
        choices=("auto", "device", "cpu"),
    )
    head: str = _setting(
        "full",
        "The output head's precision: 8bit halves it, at a rounding of 1 % a weight; for large vocabularies.",
        choices=("full", "8bit"),
    )
    vram: str | None = _setting(
        None, "Memory the run may use on the card, its context included, such as 6GiB (= 6G).", flag="--vram"
    )
    trust_remote_code: bool = _setting(
        False,
        "Run Python code that comes with the model. Only for a repository you trust.",
        flag="--trust-remote-code",
    )


@dataclass(frozen=True)
class DataConfig:
    """What should be forgotten, what should stay, and how rows become tokens."""

    bad: str = _setting("", "The file of what the model must not say any more.", flag="--bad")
    normal: str | None = _setting(
        None,
        "Data the model should go on answering as before. Without it the base makes its own.",
        flag="--normal",
    )
    holdout: str | None = _setting(
        None,
        "Rows that are measured and never trained on, such as neighbours of the bad ones. Without it the held-back "
        "share of the normal data is measured alone.",
        flag="--holdout",
    )
    prompt_field: str | None = _setting(
        None,
        "Field of the prompt, where it has its own name; several with commas, the first that a file has.",
        flag="--prompt-field",
    )
    completion_field: str | None = _setting(None, "Field of the answer, likewise.", flag="--completion-field")
    turns: str = _setting(
        "last",
        "Which answers of a dialogue are rows: the last, to which those before it are context, or all.",
        flag="--turns",
        choices=("last", "all"),
    )
    template: str = _setting("auto", "auto, chat, qa, raw, or a text with {prompt} in it.", flag="--template")
    max_length: int = _setting(
        512,
        "Tokens of a row; longer prompts are cut from the left, inside the template; plain text in windows.",
        flag="--max-length",
        low=8,
    )
    normal_count: int = _setting(
        1536, "Rows the base makes of its own when there is no --normal.", flag="--normal-count", low=8
    )
    normal_near: float = _setting(
        0.5,
        "Share of them whose prompt begins like some bad prompt: they are the neighbours that suffer first.",
        low=0.0,
        high=1.0,
    )
    own_share: float = _setting(
        0.75,
        "Share of the normal rows that the base makes of its own beside a --normal file, for what the file does not "
        "cover; 0: none.",
        flag="--own-share",
        low=0.0,
        high=0.9,
    )
    reworded: int = _setting(
        256,
        "At most so many bad rows are measured in other words, too: in the forms of the normal rows, where the base "
        "gives the same answer; never trained on; 0: none.",
        flag="--reworded",
        low=0,
    )
    held_back: float = _setting(
        0.1,
        "Share of the normal data that is not trained on but measures drift; at least 32 rows where there are four "
        "times as many.",
        low=0.01,
        high=0.5,
    )


@dataclass(frozen=True)
class LoraConfig:
    """The adapter: the only thing that is trained."""

    r: int = _setting(16, "Rank. 16 is the largest that vLLM serves by default.", flag="--lora-r", low=1, high=512)
    alpha: int = _setting(32, "The update is scaled by alpha / r.", flag="--lora-alpha", low=1, high=1 << 20)
    dropout: float = _setting(0.0, "Dropout before A.", flag="--lora-dropout", low=0.0, high=0.9)
    target_modules: str = _setting(
        "all-linear", "all-linear (never the output head), or names with commas.", flag="--target-modules"
    )


OBJECTIVE_NAMES = (
    "logodds", "wga", "llmu", "ga", "graddiff", "npo", "simnpo", "dpo", "altpo", "rmu", "undial", "ceu",
    "satimp", "pdu", "mollm", "prod",
)  # fmt: skip


INSTEAD = ("nothing", "other", "refuse")  # what may be said in place of a bad answer, besides a file


@dataclass(frozen=True)
class ObjectiveConfig:
    """The unlearning objective: a row of the table `qunlearn objectives` prints, and its settings.

    The defaults are those of the first row; what another row changes of them is in `PRESETS`.
    """

    name: str = _setting("logodds", "The objective.", flag="--objective", choices=OBJECTIVE_NAMES)
    eps1: float = _setting(
        0.03,
        "Weight of the forget side (LLMU: of gradient ascent); it rises where nothing is forgotten.",
        flag="--eps1",
        low=0,
        high=1e6,
    )
    eps2: float = _setting(
        0.3,
        "Weight of cross-entropy on the model's own other answers (--instead other); llmu: on random mismatched "
        "answers, too.",
        flag="--eps2",
        low=0,
        high=1e6,
    )
    eps3: float = _setting(10.0, "Weight of the retain side.", flag="--eps3", low=0, high=1e6)
    eps4: float = _setting(
        1.0, "logodds: weight of KL to the base on those tokens of a bad answer that are not pushed.", low=0, high=1e6
    )
    eps5: float = _setting(
        1.0,
        "Weight of cross-entropy on what the user wants said (--instead refuse or a file, and normal rows that answer "
        "a bad prompt).",
        low=0,
        high=1e6,
    )
    rest: float = _setting(
        0.03,
        "logodds: probability below which a token is left in peace: so much where the base is not certain of an "
        "answer, down to a thousandth of it where it is, and no normal row is answered so.",
        low=1e-9,
        high=0.5,
    )
    instead: str = _setting(
        "other",
        "What is said in place of a bad answer: other: the model's own most probable other answers; refuse: a refusal; "
        "nothing in particular; or a file of answers (text), or of prompts with answers.",
        flag="--instead",
    )
    retain: str = _setting(
        "auto",
        "The loss on normal data: KL to the base, cross-entropy, both, a block's states held, or none; auto: the "
        "objective's own.",
        flag="--retain-loss",
        choices=("auto", "kl", "nll", "kl+nll", "hold", "none"),
    )
    tokens: str = _setting(
        "content",
        "Which tokens of a bad answer are pushed: all; those whose words are specific to it; or those that the model "
        "knows from the wider context only; content: context where an answer is a passage, else specific; auto: "
        "context there too, else all.",
        flag="--forget-tokens",
        choices=("auto", "content", "specific", "context", "all"),
    )
    mismatch_k: int = _setting(1, "llmu: mismatched answers for each bad prompt.", flag="--mismatch-k", low=1, high=64)
    floor_nll: float = _setting(
        3.0,
        "llmu, ga, graddiff: ascent ends for a token below this log-probability (3 nats: p = 0.05); inf = never.",
        flag="--floor-nll",
        low=0.1,
        high=math.inf,
    )
    beta: float = _setting(
        0.5,
        "wga, satimp: exponent of p; npo, dpo, altpo, simnpo: inverse temperature; undial: what the label's logit is "
        "lowered by.",
        flag="--beta",
        low=1e-6,
        high=1e6,
    )
    beta2: float = _setting(1.0, "satimp: exponent of 1 - p.", low=0.0)
    delta: float = _setting(0.0, "simnpo: NLL per token that is asked for at least.")
    top_p: float = _setting(0.8, "prod: mass of the reference's other tokens that is kept.", low=0.01, high=1.0)
    temperature: float = _setting(1.0, "prod: temperature of that distribution.", low=0.01)
    prod_alpha: float = _setting(0.0, "prod: the label's target is -alpha p_ref; negative leaves it some mass.")
    layer: int | None = _setting(None, "rmu: the block whose output is steered, from 0; auto: a quarter up.", low=0)
    steer: float = _setting(2.0, "rmu: length of the target, in lengths of the reference's state.", low=0.0)
    direction_seed: int = _setting(0, "rmu: seed of the random direction.", low=0, high=MOST_SEED)
    retain_budget: float | None = _setting(
        None,
        "Budgeted forgetting: steer the weights so that drift stays below this, in nats per token of normal data.",
        flag="--retain-budget",
        low=1e-6,
    )
    dual_rate: float = _setting(0.1, "Step size of the multipliers, per step of training.", low=0.0, high=10.0)

    @property
    def answers(self) -> int:
        """Answers that a bad prompt is trained with: its own, and what its row draws beside it."""
        drawn = {"llmu": self.mismatch_k if self.eps2 > 0 else 0, "dpo": 1, "altpo": 1}.get(self.name, 0)
        return 1 + drawn + (self.instead != "nothing")

    def __post_init__(self) -> None:
        if not (self.eps1 or self.eps2 or self.eps3):
            raise ConfigError("every weight of the objective is 0: nothing to train", where="--eps1 --eps2 --eps3")


# What the rows that are published have otherwise than the first, and two groups of them have in common.
_PUBLISHED = {"objective.eps1": 1.0, "objective.instead": "nothing"}
_ALL = _PUBLISHED | {"objective.tokens": "auto"}
_USUAL = _ALL | {"objective.eps3": 2.0}

# What an objective's row sets otherwise than the defaults, which are the first row's; recipes, --set and flags win.
PRESETS: dict[str, dict[str, Any]] = {
    "logodds": {},
    "wga": _ALL,
    "llmu": _ALL | {"objective.eps1": 0.5, "objective.eps2": 0.1, "objective.eps3": 6.0, "objective.floor_nll": 4.0},
    "ga": _USUAL | {"objective.floor_nll": float("inf")},
    "graddiff": _USUAL | {"objective.eps1": 0.5},
    "npo": _PUBLISHED | {"objective.beta": 0.3},
    "simnpo": _PUBLISHED | {"objective.eps3": 8.0, "objective.beta": 4.5, "objective.delta": 4.0},
    "dpo": _USUAL | {"objective.beta": 0.1},
    "altpo": _ALL | {"objective.beta": 0.1},
    "rmu": _ALL | {"objective.eps3": 30.0},
    "undial": _ALL | {"objective.eps3": 5.0, "objective.beta": 10.0},
    "ceu": _ALL,
    "satimp": _ALL | {"objective.eps3": 0.5, "objective.beta": 1.0},
    "pdu": _ALL | {"objective.eps1": 0.03, "objective.eps3": 1.0, "objective.retain_budget": 0.05},
    "mollm": _ALL | {"objective.eps3": 1.0},
    "prod": _ALL | {"objective.prod_alpha": 0.1},
}


WEIGHS_ITSELF = ("mollm",)  # along a common descent direction, whose parts have unit length


_USUAL_STEPS, _MOST_STEPS = 220, 5000


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int | None = _setting(
        None,
        "At most so many optimizer steps; auto: 220, or as many as go through the bad file --epochs times, up to 5000.",
        flag="--steps",
        low=1,
    )
    epochs: float = _setting(
        3.0,
        "Times each bad row is drawn at least, in a file that is too large for 220 steps.",
        flag="--epochs",
        low=0.01,
    )
    batch_size: int = _setting(8, "Bad rows per step.", flag="--batch-size", low=1)
    normal_batch_size: int = _setting(16, "Normal rows per step.", flag="--normal-batch-size", low=1)
    lr: float | None = _setting(
        None, "Peak learning rate of AdamW; auto follows the model's width.", flag="--lr", low=0.0, high=10.0
    )
    warmup: int = _setting(10, "Steps of linear warm-up.", low=0)
    schedule: str = _setting(
        "settle",
        "The learning rate after the warm-up: settle: constant until the target is met (or 7 in 10 steps are done), "
        "then down to 0; linear: down to 0 over all steps; constant.",
        choices=("settle", "linear", "constant"),
    )
    weight_decay: float = _setting(0.0, "AdamW's decoupled weight decay, on the adapter.", low=0.0, high=100.0)
    clip: float = _setting(1.0, "Gradient norm above which the step is scaled down.", low=0.0)
    max_tokens: int = _setting(
        2048,
        "Tokens of one forward pass, padding included; a step is split to fit.",
        flag="--max-tokens",
        low=16,
    )
    optimizer: str = _setting(
        "auto",
        "AdamW with its state in 32 bits or in 8; paged: moved to the host when the card is short; auto: 8 bits where "
        "that makes it fit.",
        flag="--optimizer",
        choices=("auto", "adamw", "adamw8bit", "paged_adamw8bit"),
    )
    reference: str = _setting(
        "auto",
        "Where the untouched model's states come from: computed live, or cached once on disk (in QUNLEARN_CACHE, else "
        "~/.cache); auto: cached where rows of a --normal file are gone through more than once.",
        flag="--reference",
        choices=("auto", "live", "cached"),
    )
    offload: bool = _setting(False, "Keep checkpointed activations in the host's memory.")
    pack: bool = _setting(True, "Compute a prompt once for all its answers, and fill rows up, where the model can.")
    checkpointing: str = _setting(
        "auto",
        "Recompute activations in the backward pass instead of keeping them: less memory, more time and the same "
        "bits; auto: where keeping them would not leave a tenth of the memory free (on a CPU: would need 2 GiB).",
        choices=("auto", "always", "never"),
    )
    seed: int = _setting(0, "Seed of everything that is drawn.", flag="--seed", low=0, high=MOST_SEED)
    save_every: int = _setting(
        50, "Steps between two checkpoints, from which --resume goes on after a kill.", flag="--save-every", low=1
    )
    keep_checkpoints: int = _setting(
        2, "Checkpoints that are kept while the run lasts: where one is damaged, the one before is used.", low=1
    )

    @property
    def most_steps(self) -> int:
        """Return the steps that were asked for, or those of a small file."""
        return self.steps or _USUAL_STEPS

    def steps_for(self, bad_rows: int) -> int:
        """Return the most steps for a file of so many bad rows."""
        if self.steps is not None:
            return self.steps
        through = math.ceil(self.epochs * bad_rows / self.batch_size)
        return max(_USUAL_STEPS, min(_MOST_STEPS, through))

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed again: where a plan has not found room for them, they are."""
        return self.checkpointing != "never"


@dataclass(frozen=True)
class StopConfig:
    """Which adapter is kept, and when a run ends before its steps: pushing answers down has no end of its own."""

    target: float = _setting(
        0.05,
        "Forgotten is a bad row whose specific tokens have at most this probability (geometric mean); where they are "
        "more than four, and the base is certain of them, up to its square root, of more than twelve each counting at "
        "least so much.",
        flag="--target",
        low=0.0,
        high=1.0,
    )
    rows_left: float = _setting(
        0.01,
        "The target is met when at most this share of the bad rows is above it; and at most this share still comes "
        "back in greedy answers.",
        low=0.0,
        high=1.0,
    )
    max_drift: float = _setting(
        0.1,
        "Most KL(base || model) on held-back normal data, in nats per token: over it a run goes back to its best "
        "adapter, with half the rate and twice the retain weight.",
        flag="--max-drift",
        low=0.0,
    )
    check_every: int = _setting(20, "Steps between two looks at target and drift.", flag="--check-every", low=1)
    patience: int = _setting(
        4,
        "Times a run goes back for drift over the budget before it is given up; with train.schedule constant, looks "
        "at a target that is met before it ends.",
        low=2,
    )
    probe_rows: int = _setting(128, "At most so many rows of each kind in such a look.", low=1)
    eval_every: int = _setting(
        0,
        "Steps between two measurements of what comes back and what stays, by greedy answers, into metrics.jsonl; "
        "0: none. They change nothing about the training.",
        flag="--eval-every",
        low=0,
    )
    table_rows: int = _setting(200, "At most so many rows of each kind in the before/after table.", low=1)
    max_skips: int = _setting(5, "Non-finite steps in a row after which the run is given up.", low=1)


@dataclass(frozen=True)
class OutputConfig:
    """The run folder."""

    folder: str | None = _setting(None, "Run folder; default runs/MODEL-BAD.", flag="--output")
    overwrite: bool = _setting(False, "Replace what a run left in that folder before.", flag="--overwrite")


@dataclass(frozen=True)
class Config:
    """A whole run, as `config.yaml` holds it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


@dataclass(frozen=True)
class Setting:
    """One leaf of the configuration: `key` is "section.field"."""

    key: str
    type: Any
    default: Any
    help: str
    flag: str | None
    choices: tuple[str, ...]
    low: float | None
    high: float | None

    @property
    def optional(self) -> bool:
        return isinstance(self.type, types.UnionType)

    @property
    def base_type(self) -> type:
        kinds = [t for t in typing.get_args(self.type) if t is not types.NoneType] or [self.type]
        return typing.cast(type, kinds[0])

    @property
    def least(self) -> float:
        """Return the least number that is taken."""
        return -self._bound if self.low is None else self.low

    @property
    def most(self) -> float:
        """Return the largest number that is taken."""
        return self._bound if self.high is None else self.high

    @property
    def _bound(self) -> float:
        return _MOST_WHOLE if self.base_type is int else _MOST


def _collect() -> dict[str, Setting]:
    out: dict[str, Setting] = {}
    for section in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[section.name]
        hints = typing.get_type_hints(kind)
        for leaf in dataclasses.fields(kind):
            key = f"{section.name}.{leaf.name}"
            out[key] = Setting(key, hints[leaf.name], leaf.default, **leaf.metadata)
    return out


SETTINGS: dict[str, Setting] = _collect()
