"""Every setting of a run: the only place where a default lives.

Flags, `--set`, recipes and `-c` files are overlays over these dataclasses; help texts and the documentation are
generated from the fields. How overlays are read and laid is in resolve.py.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field

from qunlearn.config.fields import Setting, setting
from qunlearn.config.objective import ObjectiveConfig
from qunlearn.config.training import StopConfig, TrainConfig


@dataclass(frozen=True)
class ModelConfig:
    """Which base model, and how it is loaded."""

    name: str = setting("", "A folder, a hub id, or a short name (see `qunlearn models`).", flag="--model")
    revision: str | None = setting(None, "Branch, tag or commit on the hub.", flag="--revision")
    quant: str = setting(
        "nf4",
        "How the base is quantised. NF4 is QLoRA's data type: 4 bits a weight.",
        flag="--quant",
        choices=("nf4", "fp4", "int8", "none"),
    )
    double_quant: bool = setting(True, "Quantise the quantisation constants too: 0.25-0.3 GiB less at 7B.")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N.", flag="--device")
    device_map: str = setting(
        "none",
        "For a model that no GPU holds alone. auto: lay its blocks over all GPUs of this machine; fsdp: under a "
        "launcher, a shard of every block in each process.",
        flag="--device-map",
        choices=("none", "auto", "fsdp"),
    )
    embeddings: str = setting(
        "auto",
        "Where the input embeddings are kept: cpu keeps a large table off the GPU; auto: cpu where that makes it fit.",
        flag="--embeddings",
        choices=("auto", "device", "cpu"),
    )
    head: str = setting(
        "full",
        "The output head's precision: 8bit halves it, at a rounding of 1 % a weight; for large vocabularies.",
        choices=("full", "8bit"),
    )
    vram: str | None = setting(
        None, "GPU memory the run may use, CUDA context included, such as 6GiB (= 6G).", flag="--vram"
    )
    trust_remote_code: bool = setting(
        False, "Run Python code that comes with the model. Only for a repository you trust.", flag="--trust-remote-code"
    )


@dataclass(frozen=True)
class DataConfig:
    """What should be forgotten, what should stay, and how rows become tokens."""

    bad: str = setting("", "The forget set: a file of answers that the model must not give any more.", flag="--bad")
    normal: str | None = setting(
        None, "The retain set: rows to answer as before. Without it the base generates its own.", flag="--normal"
    )
    holdout: str | None = setting(
        None,
        "Rows that are only measured, such as neighbours of the forget set. Without it the held-back share of the "
        "retain set is measured alone.",
        flag="--holdout",
    )
    prompt_field: str | None = setting(
        None,
        "Field of the prompt, where it has its own name; several with commas, the first that a file has.",
        flag="--prompt-field",
    )
    completion_field: str | None = setting(None, "Field of the answer, likewise.", flag="--completion-field")
    turns: str = setting(
        "last",
        "Which answers of a dialogue are trained on: the last, with those before it as context, or all.",
        flag="--turns",
        choices=("last", "all"),
    )
    template: str = setting("auto", "auto, chat, qa, raw, or a text with {prompt} in it.", flag="--template")
    max_length: int = setting(
        512,
        "Tokens of a row; longer prompts are cut from the left, inside the template; plain text in windows.",
        flag="--max-length",
        low=8,
    )
    normal_count: int = setting(
        1536, "Retain rows that the base generates when there is no --normal.", flag="--normal-count", low=8
    )
    normal_near: float = setting(
        0.5,
        "Share of them whose prompt begins like some bad prompt, or asks the same about others: the neighbours that "
        "suffer first.",
        low=0.0,
        high=1.0,
    )
    own_share: float = setting(
        0.75,
        "Share of the retain rows that the base generates beside a --normal file, for what the file does not cover; "
        "0: none.",
        flag="--own-share",
        low=0.0,
        high=0.9,
    )
    reworded: int = setting(
        256,
        "At most so many other wordings of bad prompts, up to four each, are measured, taken from the forms of the "
        "retain rows, where the base gives the same answer. Three in four of them are pushed as well where they still "
        "get it when the row itself is forgotten. 0: none.",
        flag="--reworded",
        low=0,
    )
    held_back: float = setting(
        0.1,
        "Share of the normal data that is not trained on but measures drift; at least 32 rows where there are four "
        "times as many.",
        low=0.01,
        high=0.5,
    )


@dataclass(frozen=True)
class LoraConfig:
    """The adapter: the only thing that is trained."""

    r: int = setting(16, "Rank. 16 is the largest that vLLM serves by default.", flag="--lora-r", low=1, high=512)
    alpha: int = setting(32, "The update is scaled by alpha / r.", flag="--lora-alpha", low=1, high=1 << 20)
    dropout: float = setting(0.0, "Dropout before A.", flag="--lora-dropout", low=0.0, high=0.9)
    target_modules: str = setting(
        "all-linear", "all-linear (never the output head), or names with commas.", flag="--target-modules"
    )


@dataclass(frozen=True)
class OutputConfig:
    """The run folder."""

    folder: str | None = setting(None, "Run folder; default runs/MODEL-BAD.", flag="--output")
    overwrite: bool = setting(False, "Replace what a run left in that folder before.", flag="--overwrite")
    audit: str = setting(
        "none",
        "Audit the finished run with this budget (see `qunlearn audit`); the exit code stays the run's own.",
        flag="--audit",
        choices=("none", "quick", "standard", "deep"),
    )


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
