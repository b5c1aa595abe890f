"""Load, read and keep a transformers encoder: a text classifier or a token classifier beside the guarded model.

Only safetensors and JSON are read and written, and no code that comes with a model is run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from qunlearn.errors import GuardError
from qunlearn.hub.positions import positions_of
from qunlearn.hub.preflight import preflight_folder
from qunlearn.model.load import load_tokenizer
from qunlearn.model.quiet import quiet_transformers

_MOST_TOKENS = 512  # that a text is read in at once, as published
_OVERLAP = 4  # a window shares a quarter of its tokens with the next
_AT_ONCE = 32  # windows


@dataclass(frozen=True)
class Encoder:
    """An encoder with a head for texts or for tokens, its tokenizer, and how many tokens it reads at once."""

    model: Any
    tokenizer: Any
    length: int

    @classmethod
    def load(cls, folder: Path, *, labels: int | None) -> Encoder:
        """Load a checked folder: with a new head for texts of so many labels where it has none, or, with None, with the
        head for tokens that it must have. Raises ModelError, GuardError."""
        preflight_folder(folder)
        tokenizer = load_tokenizer(folder)
        if not getattr(tokenizer, "is_fast", False):
            hint = "a model with tokenizer.json is needed"
            raise GuardError("its tokenizer does not tell where tokens stand", where=str(folder), hint=hint)
        options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
        kind: Any = AutoModelForTokenClassification
        if labels is not None:
            kind = AutoModelForSequenceClassification
            options |= {"num_labels": labels, "ignore_mismatched_sizes": True}
        try:
            with quiet_transformers():
                loaded = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise GuardError(f"cannot be loaded: {said}", where=str(folder), hint="is it an encoder?") from error
        model, found = loaded
        if labels is None and any("classifier" in name for name in found["missing_keys"]):
            hint = "give a model that was trained to tag names"
            raise GuardError("has no head that tags tokens", where=str(folder), hint=hint)
        return cls(model.eval(), tokenizer, _length(model, tokenizer))

    def windows(self, texts: Sequence[str]) -> dict[str, Any]:
        """Return texts in windows that overlap, so that nothing is cut off: token ids by window, which text each is of
        (`overflow_to_sample_mapping`), and the characters of each token (`offset_mapping`)."""
        return dict(
            self.tokenizer(
                list(texts),
                truncation=True,
                max_length=self.length,
                stride=self.length // _OVERLAP,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
            )
        )

    def batches(self, windows: dict[str, Any]) -> Iterator[tuple[range, dict[str, Tensor]]]:
        """Yield windows in padded batches on the model's device, each with the places of its windows."""
        count = len(windows["input_ids"])
        for start in range(0, count, _AT_ONCE):
            places = range(start, min(count, start + _AT_ONCE))
            yield places, self.batch([windows["input_ids"][i] for i in places])

    def batch(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return windows as padded token ids and mask, each (B, T), on the model's device."""
        padded = self.tokenizer.pad({"input_ids": [list(row) for row in rows]}, return_tensors="pt")
        return {name: padded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def digest(self) -> bytes:
        """Return a hash of the weights."""
        made = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            made.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return made.digest()

    def save(self, folder: Path) -> None:
        """Write it as safetensors and JSON, for its owner's eyes only."""
        folder.mkdir(mode=0o700)
        with quiet_transformers():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        for path in folder.iterdir():
            path.chmod(0o600)


def _length(model: Any, tokenizer: Any) -> int:
    """How many tokens fit: as published, or as many as there are positions. Of RoBERTa's kind some are never used."""
    unused = max(
        (
            module.padding_idx + 1
            for name, module in model.named_modules()
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        ),
        default=0,
    )
    return min(_MOST_TOKENS, positions_of(model.config) - unused, int(tokenizer.model_max_length))
