"""Plan a merge: every tensor that will be written, where it comes from, and what is added to it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qunlearn import __version__
from qunlearn.errors import AdapterError, ConfigError, ModelError
from qunlearn.hub.fingerprint import fingerprint
from qunlearn.hub.safetensors_file import Stored, header, read_tensors
from qunlearn.hub.side_files import companions
from qunlearn.merging.lora_tensors import CONFIG as ADAPTER_CONFIG
from qunlearn.merging.lora_tensors import WEIGHTS as ADAPTER_WEIGHTS
from qunlearn.merging.lora_tensors import Update, read_adapter
from qunlearn.merging.name_mapping import Anatomy, anatomy, skeleton
from qunlearn.merging.request import MergeRequest
from qunlearn.model.device import choose_device, choose_dtype
from qunlearn.utils.files import sha256_of

if TYPE_CHECKING:
    from qunlearn.merging.dequantize import Rounding

SHARD_BYTES = 2_000_000_000
_FLOATS = {"F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class Piece:
    """A tensor that will be written: `source` plus `updates`, as `dtype`.

    `transposed`: the weight is (in, out). `rounded`: it goes through the data type the training used first;
    `statistics` are what its stored quantised form is read with, where it has one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    source: Stored
    updates: tuple[Update, ...] = ()
    transposed: bool = False
    rounded: bool = False
    statistics: tuple[Stored, ...] = ()


@dataclass(frozen=True)
class Shard:
    """A file that will be written: the tensors' bytes one after the other behind a header."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def header(self) -> bytes:
        return header((p.name, p.dtype, p.shape, p.bytes) for p in self.pieces)

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(piece.bytes for piece in self.pieces)


@dataclass(frozen=True)
class MergePlan:
    """Everything a merge will write. `identity` is equal for two merges exactly if their files would be."""

    shards: tuple[Shard, ...]
    companions: Mapping[str, Path]
    config: Mapping[str, Any]
    rounding: Rounding | None
    adapter_tensors: int
    identity: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def index(self) -> dict[str, Any]:
        """Return what model.safetensors.index.json says."""
        pieces = [(piece, shard) for shard in self.shards for piece in shard.pieces]
        placed = {piece.name: shard.name for piece, shard in pieces}
        size = sum(piece.bytes for piece, _ in pieces)
        return {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}


def make_plan(request: MergeRequest, device: str) -> MergePlan:
    """Resolve every adapter tensor to its place, or refuse by name. Nothing is written. Raises QunlearnErrors."""
    if request.measure:
        choose_device(device)  # before gigabytes are read
    folder, facts = request.model.folder, request.model.facts
    trusted = any(source.config.model.trust_remote_code for source in request.sources)
    tensors = _checkpoint(request)
    model = skeleton(folder, trust_remote_code=trusted)
    parts = anatomy(model, tensors)
    updates = _placed(request, parts)
    rounding = None
    if facts.quantization:  # only for the dequantized base: see check_merge
        pieces = _from_quantized(tensors, updates, parts, _dtype_of(facts.config))
    else:
        pieces = {name: _original(stored, updates.get(name, ()), parts) for name, stored in tensors.items()}
        rounding = _rounding(request, device) if request.base == "dequantized" else None
        if rounding is not None:
            from qunlearn.merging.dequantize import quantized_modules

            pieces = _dequantized(pieces, parts, quantized_modules(model, rounding.spec, rounding.dtype))
    count = 2 * sum(len(listed) for listed in updates.values())
    files = companions(folder, trust_remote_code=trusted)
    plan = MergePlan(_shards(list(pieces.values())), files, plain_config(facts.config, trusted), rounding, count, {})
    return replace(plan, identity=_identity(request, plan))


def _dtype_of(config: Mapping[str, Any]) -> str:
    """The type of a quantised checkpoint's other weights, in safetensors' words."""
    said = config.get("dtype") or config.get("torch_dtype")
    return {"float32": "F32", "float16": "F16"}.get(str(said), "BF16")


def _checkpoint(request: MergeRequest) -> dict[str, Stored]:
    """Every tensor of the base by name, in the order of files and bytes."""
    found: dict[str, Stored] = {}
    for path in request.model.facts.weight_files:
        for tensor in read_tensors(path):
            if tensor.name in found:
                message = f"{tensor.name} is in {found[tensor.name].file.name} and in {path.name}"
                raise ModelError(message, where=str(request.model.folder), hint="download the model again")
            found[tensor.name] = tensor
    return found


def _placed(request: MergeRequest, parts: Anatomy) -> dict[str, tuple[Update, ...]]:
    """Checkpoint tensor -> the updates that are added to it, in the order of the adapters. Raises AdapterError."""
    placed: dict[str, tuple[Update, ...]] = {}
    for source in request.sources:
        where = str(source.run.adapter)
        for update in read_adapter(source.run.adapter):
            try:
                name = parts.tensor_of(update.module)
            except ModelError as error:
                raise AdapterError(f"{error.where}: {error.message}", where=where, hint=error.hint) from error
            shape = (update.b.shape[0], update.a.shape[1])
            expected = shape[::-1] if parts.transposed[update.module] else shape
            if parts.shapes[name] != expected:
                message = f"{update.module}: an update of {list(expected)} for a weight of {list(parts.shapes[name])}"
                hint = "the adapter belongs to another base; give the one it was trained on"
                raise AdapterError(message, where=where, hint=hint)
            placed[name] = (*placed.get(name, ()), update)
    return placed


def _original(stored: Stored, updates: tuple[Update, ...], parts: Anatomy) -> Piece:
    piece = Piece(stored.name, stored.dtype, stored.shape, stored.bytes, stored)
    if not updates:
        return piece
    if stored.shape != parts.shapes[stored.name] or stored.dtype not in _FLOATS:
        message = f"{stored.dtype} {list(stored.shape)}, where the model has {list(parts.shapes[stored.name])}"
        hint = "a base in 16 or 32 bits is needed"
        raise ModelError(f"cannot be added to: {message}", where=stored.name, hint=hint)
    return replace(piece, updates=updates, transposed=parts.transposed[updates[0].module])


def _rounding(request: MergeRequest, device: str) -> Rounding | None:
    """Return how the runs' base was quantised; None where it was not. Raises ConfigError where they differ."""
    # bitsandbytes takes seconds to import: merging into the original weights does without.
    from qunlearn.merging.dequantize import Rounding, compute_dtype
    from qunlearn.model.load import LoadSpec

    where, made = choose_device(device), set()
    for source in request.sources:
        m, said = source.config.model, str(source.run.record.get("model", {}).get("quantization", ""))
        spec = LoadSpec(m.quant, m.double_quant and m.quant in ("nf4", "fp4"))
        made.add(Rounding(spec, compute_dtype(said, choose_dtype(where)), where))
    if len(made) > 1:
        told = ", ".join(sorted(f"{r.spec.quant} in {str(r.dtype).removeprefix('torch.')}" for r in made))
        hint = "merge them one after the other, or into the original weights"
        raise ConfigError(f"the runs saw the base in different forms: {told}", where="--base dequantized", hint=hint)
    only = made.pop()
    return only if only.spec.quant != "none" else None


def _dequantized(pieces: dict[str, Piece], parts: Anatomy, modules: frozenset[str]) -> dict[str, Piece]:
    """The same pieces, those of quantised modules through their data type first. Raises ModelError."""
    for module in modules:
        piece = pieces[parts.tensor_of(module)]
        if piece.dtype not in _FLOATS:
            hint = "a base in 16 or 32 bits is needed"
            raise ModelError(f"of type {piece.dtype} cannot be rounded", where=piece.name, hint=hint)
        pieces[piece.name] = replace(piece, rounded=True, transposed=parts.transposed[module])
    return pieces


def _from_quantized(
    tensors: Mapping[str, Stored], updates: Mapping[str, tuple[Update, ...]], parts: Anatomy, dtype: str
) -> dict[str, Piece]:
    """Pieces of a checkpoint that bitsandbytes wrote: its quantised weights in full, without their statistics."""
    modules = {parts.stored[f"{m}.weight"]: m for m in parts.transposed if f"{m}.weight" in parts.stored}
    pieces: dict[str, Piece] = {}
    dropped: set[str] = set()
    for name, stored in tensors.items():
        statistics = statistics_of(name, tensors.__contains__)
        if not statistics:
            pieces[name] = _original(stored, updates.get(name, ()), parts)
            continue
        dropped.update(statistics)
        if name not in modules:
            hint = "give --model with its 16-bit original"
            raise ModelError("is quantised, but no linear layer of the model", where=name, hint=hint)
        shape = parts.shapes[name]
        size = math.prod(shape) * _FLOATS[dtype]
        pieces[name] = Piece(
            name,
            dtype,
            shape,
            size,
            stored,
            updates.get(name, ()),
            parts.transposed[modules[name]],
            rounded=True,
            statistics=tuple(tensors[n] for n in statistics),
        )
    return {name: piece for name, piece in pieces.items() if name not in dropped}


def statistics_of(name: str, names: Callable[[str], bool]) -> tuple[str, ...]:
    """The tensors that tell what a quantised weight of the checkpoint means; none where it is not quantised."""
    four = [f"{name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
    if any(map(names, four)):
        parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        return tuple(n for n in (*(f"{name}.{part}" for part in parts), *four) if names(n))
    scales = f"{name.removesuffix('weight')}SCB"
    form = f"{name}_format"
    return tuple(n for n in (scales, form) if names(n)) if name.endswith(".weight") and names(scales) else ()


def _shards(pieces: Sequence[Piece]) -> tuple[Shard, ...]:
    """Files of about SHARD_BYTES: small enough to lose little when killed. Wider types first: so all are aligned."""
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if groups[-1] and size + piece.bytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.bytes
    sorted_groups = [tuple(sorted(g, key=lambda p: -(p.bytes // max(1, math.prod(p.shape))))) for g in groups]
    if len(groups) == 1:
        return (Shard("model.safetensors", sorted_groups[0]),)
    return tuple(
        Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(sorted_groups, 1)
    )


def plain_config(config: Mapping[str, Any], trusted: bool) -> dict[str, Any]:
    """Return the base's config.json for weights that are neither quantised nor elsewhere any more."""
    gone = {"quantization_config", "transformers_weights"} | (set() if trusted else {"auto_map"})
    return {key: value for key, value in config.items() if key not in gone}


def _identity(request: MergeRequest, plan: MergePlan) -> dict[str, Any]:
    """Return what the written bytes depend on."""
    sources = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in request.model.facts.weight_files}
    pieces = [
        [p.name, p.dtype, p.shape, p.source.file.name, p.source.start, p.transposed, p.rounded, len(p.updates)]
        for shard in plan.shards
        for p in (*shard.pieces, Piece(shard.name, "", (), 0, shard.pieces[0].source))
    ]
    r = plan.rounding
    made = [r.spec.quant, r.spec.double_quant, str(r.dtype), r.device.type] if r else []
    small = [sha256_of(path) for path in plan.companions.values()]
    everything = [sources, pieces, made, plan.config, sorted(plan.companions), small]
    return {
        "made_by": f"qunlearn {__version__}",
        "base": fingerprint(request.model.folder),
        "base_kind": request.base,
        "adapters": [
            {name: sha256_of(source.run.adapter / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
            for source in request.sources
        ],
        "layout": hashlib.sha256(json.dumps(everything).encode()).hexdigest(),
    }
