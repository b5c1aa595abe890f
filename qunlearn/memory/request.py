"""Estimate a run's memory from its settings and the model's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qunlearn.config.settings import Config
from qunlearn.data.paths import data_path, fields_of
from qunlearn.data.records import Dataset, read_dataset
from qunlearn.errors import ConfigError
from qunlearn.hub.download import hub_config, is_offline
from qunlearn.hub.known_configs import carried_config
from qunlearn.hub.preflight import read_config
from qunlearn.hub.short_names import known_model, resolve_model
from qunlearn.memory.devices import found_device
from qunlearn.memory.fit import memory_plan
from qunlearn.memory.gpus import MOST_GPUS, GpusPlan, plan_gpus
from qunlearn.memory.plan import MemoryPlan, memory_limit
from qunlearn.utils.console import stage

_BYTES_A_TOKEN = 2.5  # fewer than any language's text has with the usual tokenizers: rows are not planned too short

_TEMPLATE_TOKENS = 32


def plan_run(config: Config) -> MemoryPlan:
    """Plan a run from its settings; of the model config.json is read, or carried along, and nothing else.

    Raises ConfigError, DataError, ModelError.
    """
    longest_row = _longest_row(config)
    return memory_plan(config, find_config(config), found_device(config.model.device), longest_row)


def plan_run_on_gpus(config: Config, gpus: int) -> GpusPlan:
    """The same for a run on so many GPUs of one machine, of --vram each, or of what is found here.

    Raises ConfigError, DataError, ModelError.
    """
    if not 1 <= gpus <= MOST_GPUS:
        raise ConfigError(f"{gpus} is not a number of GPUs", where="--gpus", hint=f"1 to {MOST_GPUS}")
    device = found_device(config.model.device)
    if not device.on_gpu:
        raise ConfigError("of no use with --device cpu", where="--gpus", hint="leave one of them out")
    limit = memory_limit(config, device)
    if limit is None:
        raise ConfigError("no GPU was found here", where="--gpus", hint="say how large one is, such as --vram 24GiB")
    longest_row = _longest_row(config)
    return plan_gpus(config, find_config(config), device, [limit] * gpus, longest_row)


def _longest_row(config: Config) -> int | None:
    if not config.model.name:
        raise ConfigError("no model was named", where="--model", hint="see `qunlearn models`")
    if not config.data.bad:
        return None
    return estimated_longest_row(read_dataset(data_path(config.data.bad), fields_of(config.data), role="--bad"))


def find_config(config: Config) -> Mapping[str, Any]:
    """The model's config.json: of a folder, carried along for a known name, else fetched alone. Raises ModelError."""
    source = resolve_model(config.model.name, config.model.revision)
    if source.kind != "hub":
        return read_config(Path(source.location))
    known = known_model(source.location)
    carried = carried_config(known) if known is not None else None
    if carried is not None:
        return carried
    offline = is_offline()
    with stage(f"fetching config.json of {source.location}"):
        return hub_config(source, offline=offline)


def estimated_longest_row(dataset: Dataset) -> int:
    """The longest row in tokens, estimated high from its text: there is no tokenizer yet."""
    texts = ("".join(content for _, content in row.turns) + row.completion for row in dataset.records)
    longest = max(len(text.encode("utf-8")) for text in texts)
    return int(longest / _BYTES_A_TOKEN) + _TEMPLATE_TOKENS
