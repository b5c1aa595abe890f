"""Find a model, fetch it if it is on the hub, and check its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qunlearn.hub.download import ModelSource, go_offline, is_offline, local_snapshot
from qunlearn.hub.preflight import FolderFacts, preflight_folder
from qunlearn.utils.console import stage


@dataclass(frozen=True)
class CheckedModel:
    """A model whose files are here and look sound."""

    source: ModelSource
    folder: Path
    facts: FolderFacts


def fetch_all(sources: Sequence[ModelSource]) -> None:
    """Fetch those of several models that are on the hub: checking the first closes the network. Raises ModelError."""
    offline = is_offline()
    for source in sources:
        if source.kind == "hub":
            with stage(f"fetching {source.location}"):
                local_snapshot(source, offline=offline)


def check_model(source: ModelSource, trust_remote_code: bool = False) -> CheckedModel:
    """Fetch a model if it is on the hub, check its folder, and close the network behind it. Raises ModelError."""
    if source.kind == "hub":
        offline = is_offline()
        with stage(f"fetching {source.location}"):
            folder = local_snapshot(source, offline=offline, trust_remote_code=trust_remote_code)
    else:
        folder = Path(source.location)
    facts = preflight_folder(folder, trust_remote_code=trust_remote_code)
    go_offline()
    return CheckedModel(source, folder, facts)
