"""The settings of the loop and of early stopping."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from qunlearn.config.fields import MOST_SEED, setting

_USUAL_STEPS, _MOST_STEPS = 220, 5000
_USUAL_TOKENS = 2048


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int | None = setting(
        None,
        "At most so many optimizer steps; auto: 220, or as many as go through the bad file --epochs times, up to 5000.",
        flag="--steps",
        low=1,
    )
    more_steps: int | None = setting(
        None,
        "Steps that are added as long as the target is not met; auto: as many again, but 0 where --steps is given.",
        flag="--more-steps",
        low=0,
    )
    epochs: float = setting(
        3.0,
        "Times each bad row is drawn at least, in a file that is too large for 220 steps.",
        flag="--epochs",
        low=0.01,
    )
    batch_size: int = setting(8, "Bad rows per step.", flag="--batch-size", low=1)
    normal_batch_size: int = setting(16, "Normal rows per step.", flag="--normal-batch-size", low=1)
    lr: float | None = setting(
        None, "Peak learning rate of AdamW; auto follows the model's width.", flag="--lr", low=0.0, high=10.0
    )
    warmup: int = setting(10, "Steps of linear warm-up.", low=0)
    schedule: str = setting(
        "settle",
        "The learning rate after the warm-up: settle: constant until the target is clearly met (or 7 in 10 steps are "
        "done), then down to 0; linear: down to 0 over all steps; constant.",
        choices=("settle", "linear", "constant"),
    )
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay, on the adapter.", low=0.0, high=100.0)
    clip: float = setting(1.0, "Gradient norm above which the step is scaled down.", low=0.0)
    max_tokens: int | None = setting(
        None,
        "Tokens of a micro-batch, padding included: gradients of a step are accumulated over as many as it takes. "
        "auto: 2,048; on a GPU more, up to the whole step, where passes are launched piece by piece, and fewer where "
        "only those fit.",
        flag="--max-tokens",
        low=16,
    )
    optimizer: str = setting(
        "auto",
        "AdamW with its state in 32 bits or in 8; paged: moved to the host when GPU memory runs out; auto: 8 bits "
        "where that makes it fit.",
        flag="--optimizer",
        choices=("auto", "adamw", "adamw8bit", "paged_adamw8bit"),
    )
    reference: str = setting(
        "auto",
        "Where the reference's hidden states come from: computed live, or cached on disk (in QUNLEARN_CACHE, else "
        "~/.cache); auto: cached where rows of a --normal file are used more than once.",
        flag="--reference",
        choices=("auto", "live", "cached"),
    )
    offload: bool = setting(False, "Offload checkpointed activations to the host's memory.")
    pack: bool = setting(
        True, "Sequence packing, with the prompt of several answers computed once, where the model can."
    )
    checkpointing: str = setting(
        "auto",
        "Gradient checkpointing: recompute activations in the backward pass; less memory, more time, the same bits. "
        "auto: where keeping them would not leave a tenth of the memory free (on a CPU: would need 2 GiB).",
        choices=("auto", "always", "never"),
    )
    kept_blocks: int | None = setting(
        None,
        "With gradient checkpointing, so many of the last blocks keep their activations; the same bits. auto: as many "
        "as there is room for, as above; none with `always`, or on several GPUs.",
        low=0,
    )
    compile: str = setting(
        "auto",
        "graphs: on a GPU, passes of a shape that comes again are recorded as CUDA graphs and launched at once; the "
        "same numbers but for rounding. auto: where the model and its device allow it.",
        flag="--compile",
        choices=("auto", "graphs", "off"),
    )
    seed: int = setting(0, "Seed of everything that is drawn.", flag="--seed", low=0, high=MOST_SEED)
    save_every: int = setting(
        50, "Steps between two checkpoints, from which --resume continues.", flag="--save-every", low=1
    )
    keep_checkpoints: int = setting(
        2, "Checkpoints kept during a run; where the newest is damaged, the one before is used.", low=1
    )

    @property
    def usual_steps(self) -> int:
        """Return the steps that were asked for, or those of a small file."""
        return self.steps or _USUAL_STEPS

    @property
    def most_steps(self) -> int:
        """Return the steps there are at most: the usual ones, and those that are added where the target is not met."""
        return self.usual_steps + (self.more_steps or 0)

    def for_rows(self, bad_rows: int) -> TrainConfig:
        """Return the same with the steps for a file of so many bad rows."""
        if self.steps is not None:
            return replace(self, more_steps=self.more_steps or 0)
        through = math.ceil(self.epochs * bad_rows / self.batch_size)
        steps = max(_USUAL_STEPS, min(_MOST_STEPS, through))
        more = 0 if self.schedule != "settle" else steps if self.more_steps is None else self.more_steps
        return replace(self, steps=steps, more_steps=more)

    @property
    def pass_tokens(self) -> int:
        """Return the tokens of a micro-batch: those that were asked for, or settled by a memory plan."""
        return self.max_tokens or _USUAL_TOKENS

    @property
    def recomputes(self) -> bool:
        """Return whether activations are computed again: where a plan has not found room for them, they are."""
        return self.checkpointing != "never"


@dataclass(frozen=True)
class StopConfig:
    """Which adapter is kept, and when a run ends before its steps: pushing answers down has no end of its own."""

    target: float = setting(
        0.05,
        "Early stopping: a bad row counts as forgotten when its specific tokens have at most this probability "
        "(geometric mean). Of more than four tokens that the base is certain of, up to its square root; of more than "
        "twelve, each token counts with at least that, or the square of what its row should come to.",
        flag="--target",
        low=0.0,
        high=1.0,
    )
    rows_left: float = setting(
        0.01,
        "Share of the bad rows that may stay above the target, and that may still be given as greedy answers.",
        low=0.0,
        high=1.0,
    )
    max_drift: float = setting(
        0.1,
        "Largest KL(base || model) on held-back retain rows, in nats per token. Above it the run returns to its best "
        "adapter, with half the learning rate and twice the retain weight.",
        flag="--max-drift",
        low=0.0,
    )
    check_every: int = setting(20, "Steps between two checks of target and drift.", flag="--check-every", low=1)
    patience: int = setting(
        4,
        "Returns to the best adapter before a run is given up; with train.schedule constant, checks with the target "
        "met before it ends.",
        low=2,
    )
    probe_rows: int = setting(128, "At most so many rows of each kind in such a check.", low=1)
    eval_every: int = setting(
        0,
        "Steps between two measurements by greedy answers, written to metrics.jsonl; 0: none. They do not change the "
        "training.",
        flag="--eval-every",
        low=0,
    )
    table_rows: int = setting(200, "At most so many rows of each kind in the before/after table.", low=1)
    max_skips: int = setting(5, "Non-finite steps in a row after which the run is given up.", low=1)
