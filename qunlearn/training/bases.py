"""Load a base once for several runs: each puts a fresh adapter into it, and takes it out again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qunlearn.model.load import Base, LoadSpec, load_base
from qunlearn.model.policy import Policy
from qunlearn.utils.console import stage


class Bases:
    """The base of the last run, for the next one of the same model in the same form; holds one at most."""

    def __init__(self) -> None:
        self._kept: tuple[Path, LoadSpec, Base] | None = None

    def load(self, folder: Path, spec: LoadSpec) -> Base:
        """Hand the base out that is there, or load it. Raises ModelError, DeviceError, DoesNotFitError."""
        kept, self._kept = self._kept, None
        if kept is not None and kept[:2] == (folder, _form(spec)):
            return replace(kept[2], cache_bytes=spec.cache_bytes)
        del kept  # two do not fit
        with stage("loading the model"):
            return load_base(folder, spec)

    def keep(self, policy: Policy, folder: Path, spec: LoadSpec) -> None:
        """Take the policy's adapter out of its base, and keep that; the policy is of no use afterwards."""
        policy.model.unload()
        model = policy.base.model
        if getattr(model, "peft_config", None) is not None:  # else peft takes the next adapter for a second one
            del model.peft_config
        if getattr(model, "supports_gradient_checkpointing", False):
            # transformers 5.22 renamed it; the old name warns there.
            (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
        model.requires_grad_(False)
        model.eval()
        self._kept = folder, _form(spec), policy.base


def _form(spec: LoadSpec) -> LoadSpec:
    """What a base is, without how much a batch of answers may take."""
    return replace(spec, cache_bytes=0)
