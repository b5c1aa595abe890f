"""List what belongs to a model besides its weights and config.json: a merge copies it byte for byte."""

from __future__ import annotations

from pathlib import Path

from qunlearn.hub.preflight import TOKENIZERS, within

_FILES = (
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "chat_template*", "*.jinja"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "merges.txt", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".pkl")


def companions(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Path]:
    """Tokenizer, generation config, licence by name; Python files only where they are trusted.

    Raises ModelError for a link that leaves the folder.
    """
    patterns = [*_FILES, *TOKENIZERS, *(["*.py"] if trust_remote_code else [])]
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    refused = _WEIGHTS if trust_remote_code else (*_WEIGHTS, ".py")
    return {path.name: within(folder, path) for path in found if path.suffix not in refused and path.is_file()}
