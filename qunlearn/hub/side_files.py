"""List what belongs to a model besides its weights and config.json: a merge copies it byte for byte."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from qunlearn.hub.preflight import TOKENIZERS, within

_FILES = (
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "chat_template*", "*.jinja"),
    "additional_chat_templates/*.jinja",
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "merges.txt", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".pkl")


def companions(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Path]:
    """Tokenizer, generation config, licence by their place in the folder; Python files only where they are trusted.

    Raises ModelError for a link that leaves the folder.
    """
    patterns = [*_FILES, *TOKENIZERS, *(["*.py"] if trust_remote_code else [])]
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    refused = _WEIGHTS if trust_remote_code else (*_WEIGHTS, ".py")
    kept = [path for path in found if path.suffix not in refused and path.is_file()]
    return {path.relative_to(folder).as_posix(): within(folder, path) for path in kept}


def copy_into(folder: Path, files: Mapping[str, Path]) -> None:
    """Copy files to their places in a folder. Raises OSError."""
    for place, path in files.items():
        (folder / place).parent.mkdir(mode=0o700, exist_ok=True)
        shutil.copyfile(path, folder / place)
