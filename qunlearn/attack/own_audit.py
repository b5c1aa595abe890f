"""Audit a run as soon as it is there: `forget --audit`, and the stage of a recipe. The run is whole without it."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qunlearn.attack.request import FEWEST, AuditWish, check_audit
from qunlearn.config.settings import ModelConfig
from qunlearn.data.records import Dataset
from qunlearn.errors import DataError, QunlearnError
from qunlearn.utils.console import say, warn
from qunlearn.utils.file_names import AUDIT
from qunlearn.utils.text import command_line

NOT_AUDITED = "not audited"
_TOLD = ("budget", "status", "worst", "leaking_families", "baseline", "facts", "seconds")


def check_enough(forget_rows: Dataset) -> None:
    """Refuse, before a run begins, what could not be audited after it. Raises DataError."""
    if len(forget_rows.records) < FEWEST:
        hint = f"leave --audit out, or give {FEWEST} rows at least"
        raise DataError("too few rows to be audited", where=forget_rows.path, hint=hint)


def audit_run(
    run: Path, model: ModelConfig, budget: str, files: Mapping[str, Path] | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Audit a finished run into RUN/audit, and return what it came to: `status` as in audit.json.

    `files` by split; without them what the run was given is asked. A failure is told and returned ("not audited",
    `why`), not raised, for the run it follows has its own end.
    """
    gc.collect()  # what trained the run has gone: no second model is in memory
    say(f"\naudit of the run, {budget}: what comes back?", style="bold")
    named = {name: str(path) for name, path in (files or {}).items()}
    wish = AuditWish(budget=budget, overwrite=overwrite, vram=model.vram)
    how = (None, None, model.device, model.trust_remote_code)
    try:
        request = check_audit(str(run), None, None, named, None, how, wish)
        from qunlearn.attack.audit import audit

        result = audit(request, to_stdout=False)
    except QunlearnError as error:
        warn(f"the run was not audited: {error}")
        say(f"the run itself is whole; later: {command_line('qunlearn', 'audit', run)}")
        return {"budget": budget, "status": NOT_AUDITED, "why": error.message}
    finally:
        gc.collect()
    return {**{key: result[key] for key in _TOLD}, "folder": str(run / AUDIT)}
