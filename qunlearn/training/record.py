"""Write what a run leaves: record.json, and the adapter with its card."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from qunlearn import __version__
from qunlearn.data.records import Dataset
from qunlearn.data.tokenize import Template
from qunlearn.hub.checked import CheckedModel
from qunlearn.hub.fingerprint import take_fingerprint
from qunlearn.hub.preflight import commit_of
from qunlearn.model.device import describe_device, peak_memory_bytes
from qunlearn.model.gpus import describe_devices, peak_on_any
from qunlearn.model.policy import Policy, save_adapter
from qunlearn.runs.folder import BEGUN_IN
from qunlearn.training.model_card import model_card
from qunlearn.training.outcome import Outcome
from qunlearn.training.request import ForgetRequest
from qunlearn.utils.file_names import ADAPTER, RECORD
from qunlearn.utils.files import write_json, write_private
from qunlearn.utils.units import date_of

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "tokenizers")


def run_record(
    request: ForgetRequest, template: Template, policy: Policy, outcome: Outcome, status: str
) -> dict[str, Any]:
    """Return what record.json says before the measures are added: inputs with their hashes, decisions, versions."""
    config, source = request.config, request.model.source
    retain_rows, model = request.retain_rows, take_fingerprint(request.model.folder)
    return {
        "status": status,
        "run": str(request.output),
        BEGUN_IN: str(Path.cwd()),
        "stop_reason": outcome.reason,
        "ended": date_of(time.time()),
        "model": {
            "asked": source.asked,
            "location": source.location,
            "revision": source.revision,
            "commit": commit_of(request.model.folder),
            "base_id": source.base_id,
            "kind": source.kind,
            "fingerprint": model.whole,
            "config_fingerprint": model.config,
            "weights_fingerprint": model.weights,
            "architecture": request.model.facts.config.get("model_type"),
            "quantization": policy.base.quantization,
        },
        "data": {
            "bad": _data_record(request.forget_rows),
            "normal": _data_record(retain_rows) if retain_rows else {},
            "holdout": _data_record(request.holdout) if request.holdout else {},
            "instead": _data_record(request.instead) if request.instead else {},
            "shared_passages": [shared.record for shared in request.shared],
            "template": asdict(template),
        },
        "training": {
            "steps": outcome.steps,
            "best": asdict(outcome.best),
            "returns": outcome.returns,
            "skipped": outcome.skipped,
            "tokens": outcome.tokens,
            "seconds": round(outcome.seconds, 2),
            "learning_rate": config.train.lr,
            "peak_memory_bytes": peak_on_any(policy.base.devices),
            "seed": config.train.seed,
        },
        "device": describe_devices(policy.base.devices),
        **_gpus(policy),
        "versions": versions(),
    }


def _gpus(policy: Policy) -> dict[str, Any]:
    """The GPUs that a model was laid over, their blocks from `start` up to but not including `stop`; else nothing."""
    if not policy.base.spans:
        return {}
    gpus = [
        {
            "device": describe_device(device),
            "start": start,
            "stop": stop,
            "peak_memory_bytes": peak_memory_bytes(device),
        }
        for device, (start, stop) in zip(policy.base.devices, policy.base.spans, strict=True)
    ]
    return {"gpus": gpus}


def versions() -> dict[str, str]:
    """Return of qunlearn and of the packages that decide about its numbers."""
    return {"qunlearn": __version__, **{name: metadata.version(name) for name in _PACKAGES}}


def _data_record(dataset: Dataset) -> dict[str, Any]:
    return {
        "path": str(Path(dataset.path).absolute()),
        "sha256": dataset.sha256,
        "rows": len(dataset.records),
        "duplicates": dataset.duplicates,
        "shape": dataset.shape,
        "fields": list(dataset.fields),
        "systems": len({record.system for record in dataset.records} - {""}),
    }


def base_revision(model: CheckedModel) -> str | None:
    """Return which revision of its base an adapter names: the commit, since a branch moves on.

    The commit of a 4-bit mirror is none of the 16-bit repository that the adapter names.
    """
    source = model.source
    commit = commit_of(model.folder) if source.kind == "hub" and source.base_id == source.location else None
    return commit or source.revision


def write_run(
    folder: Path, policy: Policy, request: ForgetRequest, record: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    """Write the adapter with its card, and record.json, for their owner's eyes only. `state` is the adapter as the
    policy has it, which in shards has only a part."""
    adapter = folder / ADAPTER
    adapter.mkdir(mode=0o700)
    source = request.model.source
    policy.model.peft_config["default"].base_model_name_or_path = source.base_id
    policy.model.peft_config["default"].revision = base_revision(request.model)
    save_adapter(policy, adapter, state if policy.in_shards else None)
    write_private(adapter / "README.md", model_card(request.config, record))
    for path in adapter.iterdir():
        path.chmod(0o600)
    write_json(folder / RECORD, record)
