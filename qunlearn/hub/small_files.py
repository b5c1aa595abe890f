"""Check the small files of a model folder before the libraries read them whole."""

from __future__ import annotations

from pathlib import Path

from qunlearn.errors import ModelError
from qunlearn.utils.json_files import SMALL_BYTES

# A vocabulary of a quarter of a million tokens takes some 35 MB.
_MAX_VOCABULARY_BYTES = 128 << 20
MAX_INDEX_BYTES = 32 << 20  # the largest there are name a hundred thousand tensors, in 10 MB
_DOWNLOAD_AGAIN = "copy or download the file again"


# By name, the most bytes of each file that the libraries read whole; others in the folder are nobody's business.
_MOST_BYTES = {
    **dict.fromkeys(("config.json", "generation_config.json", "quantize_config.json"), SMALL_BYTES),
    **dict.fromkeys(("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"), SMALL_BYTES),
    **dict.fromkeys(("chat_template.jinja", "chat_template.json", "processor_config.json"), SMALL_BYTES),
    **dict.fromkeys(("tokenizer.json", "tokenizer.model", "tekken.json"), _MAX_VOCABULARY_BYTES),
    **dict.fromkeys(("vocab.json", "vocab.txt", "merges.txt", "spiece.model"), _MAX_VOCABULARY_BYTES),
    "model.safetensors.index.json": MAX_INDEX_BYTES,
}


def refuse_strange_files(folder: Path) -> None:
    """Refuse what would be read whole and is no file that ends, or is larger than such files are. Raises ModelError."""
    for name, most in _MOST_BYTES.items():
        path = folder / name
        if not path.exists() or path.is_dir():
            continue
        if not path.is_file():
            raise ModelError("is a device or a pipe, not a file", where=str(path), hint=_DOWNLOAD_AGAIN)
        if path.stat().st_size > most:
            message = f"is larger than {most >> 20} MiB, more than such a file has"
            raise ModelError(message, where=str(path), hint=_DOWNLOAD_AGAIN)
