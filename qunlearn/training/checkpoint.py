"""Checkpoints of the loop: written whole or not at all, verified by their hashes, the last few kept.

A checkpoint is a folder of three files: tensors (safetensors), values (JSON), and a manifest with the hash of both.
It is written under a temporary name, brought to the disk, and renamed: what has the name is whole, unless the disk
itself has damaged it, and then its hash says so.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qunlearn.hub.safetensors_file import header
from qunlearn.model.policy import Policy
from qunlearn.parallel.ranks import current
from qunlearn.training.optimizer import load_optimizer_state, optimizer_state
from qunlearn.utils.console import say, warn
from qunlearn.utils.files import sha256_of, sync, write_json
from qunlearn.utils.json_files import LARGE_BYTES, parse, read_text

TENSORS, VALUES, MANIFEST = "state.safetensors", "state.json", "manifest.json"
_FOLDER = re.compile(r"step-(\d{8,})")
_PART = ".part"
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Snapshot:
    """The loop between two steps: tensors on the CPU, and everything else as JSON values."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it."""
        return {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}


class Part(Protocol):
    """Anything with a state of its own, in JSON values, that the loop must find again as it was."""

    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class TrainState:
    """What changes from step to step besides the outcome: adapter, optimizer, random states, and `parts` by name."""

    policy: Policy
    optimizer: Any
    parts: Mapping[str, Part]

    def snapshot(self, outcome: Mapping[str, Any], best: Mapping[str, Tensor]) -> Snapshot:
        """A copy of all of it, with the outcome so far and the best adapter. Where the adapter is in shards all
        processes make it at once, and the main one's is whole."""
        device = self.policy.device
        random = {"random.cpu": torch.get_rng_state()}
        if device.type == "cuda":
            random["random.cuda"] = torch.cuda.get_rng_state(device)
        state, scalars = optimizer_state(self.optimizer, [*self.policy.trainable().values()])
        tensors = {f"adapter.{name}": t for name, t in self.policy.adapter_state().items()}
        tensors |= {f"best.{name}": t for name, t in best.items()}
        tensors |= {f"optimizer.{name}": t for name, t in state.items()} | random
        parts = {name: part.state() for name, part in self.parts.items()}
        return Snapshot(tensors, {"outcome": dict(outcome), "optimizer": scalars, "parts": parts})

    def restore(self, found: Snapshot) -> None:
        """Put everything but the outcome back as it was."""
        self.policy.load_adapter_state(found.under("adapter."))
        parameters = [*self.policy.trainable().values()]
        load_optimizer_state(self.optimizer, found.under("optimizer."), found.values["optimizer"], parameters)
        for name, part in self.parts.items():
            part.load_state(found.values["parts"][name])
        torch.set_rng_state(found.tensors["random.cpu"])
        if self.policy.device.type == "cuda" and "random.cuda" in found.tensors:
            torch.cuda.set_rng_state(found.tensors["random.cuda"], self.policy.device)


@dataclass(frozen=True)
class Checkpoints:
    """Where checkpoints are kept, how often they are made and how many stay; without a folder, none.

    `stopping` says whether the run was asked to end; `parts` are the states of those who watch the loop.
    """

    folder: Path | None = None
    every: int = 1
    keep: int = 1
    stopping: Callable[[], bool] = lambda: False
    parts: Mapping[str, Part] = field(default_factory=dict)

    def due(self, step: int, *, last: bool = False) -> bool:
        """Return whether to make one after this step; `last`: the run was asked to end. Of what is in shards all
        processes make what one of them writes."""
        mine, ranks = self.folder is not None and (step % self.every == 0 or last), current()
        return mine if ranks.shards is None else ranks.any(mine)

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Write a checkpoint and drop the oldest. A disk that refuses it costs this checkpoint, not the run."""
        if self.folder is None:
            return
        try:
            for path in checkpoints(self.folder):
                if _step(path) > step:  # damaged, or this run would be further on
                    shutil.rmtree(path)
            _write(self.folder, step, snapshot)
            for path in checkpoints(self.folder)[: -self.keep]:
                shutil.rmtree(path)
        except OSError as error:
            shutil.rmtree(_path(self.folder, step, _PART), ignore_errors=True)
            warn(f"the checkpoint of step {step} could not be written ({error.strerror or error}): the run goes on")

    def latest(self) -> Snapshot | None:
        """The newest checkpoint that is sound; says so of each that is not."""
        for path in reversed(checkpoints(self.folder) if self.folder else []):
            try:
                snapshot = _read(path)
            except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
                warn(f"the checkpoint {path} is damaged ({error}): the one before it is used")
                continue
            say(f"resuming after step {_step(path)}, from {path}")
            return snapshot
        return None

    def latest_of_all(self) -> Snapshot | None:
        """The newest checkpoint of the main process, in all processes: the others keep none."""
        found, ranks = self.latest(), current()
        if ranks.count == 1:
            return found
        told = ranks.from_main(lambda: _described(found))
        if told is None:
            return None
        if found is None:
            kinds = {code: dtype for dtype, code in _DTYPES.items()}
            tensors = {name: torch.empty(shape, dtype=kinds[code]) for name, (code, shape) in told["tensors"].items()}
            found = Snapshot(tensors, told["values"])
        ranks.copy(found.tensors[name] for name in told["tensors"])
        return found


def _described(found: Snapshot | None) -> dict[str, Any] | None:
    """A checkpoint without what its tensors hold."""
    if found is None:
        return None
    return {
        "values": found.values,
        "tensors": {name: (_DTYPES[t.dtype], list(t.shape)) for name, t in found.tensors.items()},
    }


NO_CHECKPOINTS = Checkpoints()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; unfinished ones are not among them."""
    found = [p for p in folder.iterdir() if _FOLDER.fullmatch(p.name) and p.is_dir()] if folder.is_dir() else []
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    match = _FOLDER.fullmatch(path.name)
    return int(match[1]) if match else -1


def _path(folder: Path, step: int, suffix: str = "") -> Path:
    return folder / f"step-{step:08d}{suffix}"


def _write(folder: Path, step: int, snapshot: Snapshot) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    stage, path = _path(folder, step, _PART), _path(folder, step)
    for old in (stage, path):  # of an attempt that was killed, or damaged and made again
        shutil.rmtree(old, ignore_errors=True)
    stage.mkdir(mode=0o700)
    hashes = {TENSORS: _write_tensors(stage / TENSORS, snapshot.tensors)}
    write_json(stage / VALUES, snapshot.values)
    hashes[VALUES] = sha256_of(stage / VALUES)
    write_json(stage / MANIFEST, {"step": step, "sha256": hashes})
    for written in (stage / VALUES, stage / MANIFEST, stage):
        sync(written)
    stage.rename(path)
    sync(folder)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, on the disk when it returns; returns its hash. Largest alignment first."""
    order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    table = [(name, _DTYPES[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for name, t in order]
    digest = hashlib.sha256()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        for block in itertools.chain([header(table)], (_bytes(t) for _, t in order)):
            file.write(block)
            digest.update(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _read(path: Path) -> Snapshot:
    """Raises ValueError and others for what is not what was written."""
    manifest = parse(read_text(path / MANIFEST))
    if manifest["step"] != _step(path) or set(manifest["sha256"]) != {TENSORS, VALUES}:
        raise ValueError("its manifest is not of this checkpoint")
    for name, wanted in manifest["sha256"].items():
        if sha256_of(path / name) != wanted:
            raise ValueError(f"{name} has another hash than the manifest says")
    tensors = {name: tensor.clone() for name, tensor in load_file(path / TENSORS).items()}
    return Snapshot(tensors, parse(read_text(path / VALUES, LARGE_BYTES)))
