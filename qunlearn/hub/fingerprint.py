"""Tell models from each other fast: by config.json and samples of their weights. No torch here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from qunlearn.errors import ModelError
from qunlearn.hub.preflight import DOWNLOAD_AGAIN, headers_of_weights, read_config

_ENDS_BYTES, _TENSOR_BYTES = 64 * 1024, 4 * 1024  # what is sampled


@dataclass(frozen=True)
class Fingerprint:
    """A fast identity of a model, in hexadecimal sha256: of config.json's values, and of samples of its weights.

    `by_bytes` is what earlier versions took: both together, with config.json as its bytes.
    """

    config: str
    weights: str
    by_bytes: str

    @property
    def whole(self) -> str:
        """The two parts as one."""
        return hashlib.sha256(f"{self.config} {self.weights}".encode()).hexdigest()

    def like(self, known: object) -> str:
        """The identity to compare with a recorded one, taken as that was."""
        return self.by_bytes if known == self.by_bytes else self.whole


def fingerprint(folder: Path) -> str:
    """A fast identity of a model: sha256 in hexadecimal. Raises ModelError."""
    return take_fingerprint(folder).whole


def take_fingerprint(folder: Path) -> Fingerprint:
    """Read what tells a model from others.

    That is config.json, however it is written, and of every weight file name, size, header, the first and last 64 KiB,
    and the first 4 KiB of each tensor: without these a merge would look like its base, whose embeddings and norms it
    shares. Bytes changed only between the samples are not seen, so it tells models apart but proves no integrity.
    Raises ModelError.
    """
    config = read_config(folder)
    by_bytes, weights = hashlib.sha256((folder / "config.json").read_bytes()), hashlib.sha256()
    for path, header in sorted(headers_of_weights(folder, config), key=lambda item: item[0]):
        size = path.stat().st_size
        data = size - header.data_bytes
        spans = [(0, data), (0, _ENDS_BYTES), (max(0, size - _ENDS_BYTES), size)]
        spans += [(data + start, min(data + end, data + start + _TENSOR_BYTES)) for start, end in header.spans]
        pieces = [f"\n{path.relative_to(folder).as_posix()} {size}\n".encode()]
        with path.open("rb") as file:
            for start, end in spans:
                file.seek(start)
                pieces.append(file.read(end - start))
        for piece in pieces:
            by_bytes.update(piece)
            weights.update(piece)
    try:
        canonical = json.dumps(config, sort_keys=True, separators=(",", ":"))
    except RecursionError as error:
        raise ModelError("nested too deeply", where=str(folder / "config.json"), hint=DOWNLOAD_AGAIN) from error
    return Fingerprint(hashlib.sha256(canonical.encode()).hexdigest(), weights.hexdigest(), by_bytes.hexdigest())
