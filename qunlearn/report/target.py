"""Check the file that a report is written to, and refuse one that would cost something else."""

from __future__ import annotations

import os
from pathlib import Path

from qunlearn.errors import OutputError
from qunlearn.utils.file_names import ADAPTER, AUDIT, CONFIG, EVAL, EVAL_CACHE, METRICS, NORMAL, RECORD

_OURS = b'<meta name="generator" content="qunlearn '
_HEAD_BYTES = 4096
_READ = (RECORD, CONFIG, METRICS, NORMAL, EVAL, ADAPTER, EVAL_CACHE, AUDIT)


def check_target(folder: Path, output: Path, *, overwrite: bool) -> None:
    """Refuse a link, the run's own files, and what is no page of ours unless that is asked for. Raises OutputError."""
    where, hint = str(output), "choose another --output"
    try:
        if output.is_symlink():
            raise OutputError("is a link, and links are not followed", where=where, hint=f"remove it, or {hint}")
        real = output.resolve()
        if any(real.is_relative_to((folder / name).resolve()) for name in _READ):
            raise OutputError("belongs to the run itself", where=where, hint=hint)
        if output.is_dir():
            raise OutputError("is a folder, not a file", where=where, hint=hint)
        if output.exists() and not output.is_file():
            raise OutputError("is not a plain file", where=where, hint=hint)
        if not os.access(real.parent, os.W_OK | os.X_OK):
            what = "cannot be written" if real.parent.is_dir() else "no such folder"
            raise OutputError(what, where=str(output.parent), hint=hint)
        if output.exists() and not overwrite and not _is_ours(output):
            raise OutputError("exists, and is no report of ours", where=where, hint=f"{hint}, or --overwrite")
    except (OSError, RuntimeError) as error:  # a name too long, a folder that is closed, a loop of links
        said = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot be written: {said}", where=where, hint=hint) from error


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return _OURS in file.read(_HEAD_BYTES)
