"""Resolve a model's name to a folder, and download it or find it in the cache. No torch here."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from qunlearn.errors import ModelError
from qunlearn.hub.preflight import read_json
from qunlearn.hub.short_names import ModelSource, resolve_model, suggestion

__all__ = ["ModelSource", "fetch", "go_offline", "hub_config", "local_snapshot", "resolve_model"]

_WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "tokenizer*", "*.tiktoken"]
# The same weights in other layouts: downloading them too would double the gigabytes.
_UNWANTED = ["*/*.safetensors", "consolidated*", "original/*", "onnx/*", "*.onnx", "*.bin", "*.pth", "*.gguf"]
_ASK_S = 5.0
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_closed_here = [False]  # whether it is this process alone that keeps the hub client off the network


def is_offline() -> bool:
    """Return whether the user has told Hugging Face's libraries to stay off the network."""
    said = any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in _OFFLINE)
    return said and not _closed_here[0]


def go_offline() -> None:
    """Forbid the hub client every request of this process, telemetry included.

    Call it before transformers is imported. A hub client that is imported already (by `local_snapshot`) has
    read its environment and is told directly.
    """
    _closed_here[0] = not is_offline()
    os.environ.update(dict.fromkeys((*_OFFLINE, "HF_HUB_DISABLE_TELEMETRY"), "1"))
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        vars(constants).update(HF_HUB_OFFLINE=True, HF_HUB_DISABLE_TELEMETRY=True)


@contextlib.contextmanager
def _open_again() -> Iterator[None]:
    """The network for one more model that was named, where only this process has closed it."""
    constants = sys.modules.get("huggingface_hub.constants")
    if not _closed_here[0] or constants is None:
        yield
        return
    vars(constants).update(HF_HUB_OFFLINE=False)
    try:
        yield
    finally:
        go_offline()


def local_snapshot(source: ModelSource, *, offline: bool, trust_remote_code: bool = False) -> Path:
    """The folder of a source; a hub id is downloaded first, or looked up in the cache when `offline`.

    Only what is loaded is fetched: configuration, tokenizer, safetensors, and Python files where they are
    trusted. Raises ModelError by cause.
    """
    if source.kind != "hub":
        return Path(source.location)
    folder = fetch(source, [*_WANTED, "*.py"] if trust_remote_code else _WANTED, offline=offline)
    if not any(folder.glob("*.safetensors")):
        if offline:  # the cache has other files of it, as `plan` fetches
            message, hint = "offline, and its weights are not in the cache", _fetch_hint(source)
            raise ModelError(message, where=source.location, hint=hint)
        hint = (
            f"if {_url(source)}/discussions has a conversion by SFconvertbot, add --revision refs/pr/NUMBER; "
            "else convert the weights where you trust them, and give the folder"
        )
        raise ModelError("the repository has no safetensors weights", where=source.location, hint=hint)
    return folder


def hub_config(source: ModelSource, *, offline: bool) -> dict[str, Any]:
    """config.json of a hub model and nothing else, from the cache when `offline`. Raises ModelError by cause."""
    path = fetch(source, ["config.json"], offline=offline) / "config.json"
    if not path.exists():
        if offline:  # the cache has other files of it
            message, hint = "offline, and its config.json is not in the cache", _fetch_hint(source)
            raise ModelError(message, where=source.location, hint=hint)
        hint = "is it a model of transformers? give the repository of the original weights"
        raise ModelError("the repository has no config.json", where=source.location, hint=hint)
    return read_json(path)


def fetch(source: ModelSource, wanted: Sequence[str], *, offline: bool) -> Path:
    """The snapshot folder of a hub id with the files of these patterns; what the cache has is not fetched again.

    The hub is asked once, for seconds: then the cache is all there is. Raises ModelError by cause.
    """
    import huggingface_hub
    from huggingface_hub.utils import logging as client_logging

    # What the attempts come to is said once, as an error. The client sets its own level up at the first import.
    client_logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.nullcontext() if offline else _open_again():
            unreachable = None if offline else _unreachable(source)
            return Path(
                huggingface_hub.snapshot_download(
                    source.location,
                    revision=source.revision,
                    allow_patterns=list(wanted),
                    ignore_patterns=_UNWANTED,
                    local_files_only=offline or unreachable is not None,
                )
            )
    except (OSError, ValueError, RuntimeError, _http_error()) as error:
        raise _download_error(source, error, offline) from error


def _unreachable(source: ModelSource) -> Exception | None:
    """Why the hub cannot be reached for a commit, which the client would ask for six times, with pauses.

    For a branch or a tag its first question has one attempt, and it looks in the cache then by itself.
    """
    if source.revision is None or not re.fullmatch(r"[0-9a-f]{40}", source.revision):
        return None
    import huggingface_hub

    try:
        huggingface_hub.HfApi().model_info(source.location, revision=source.revision, timeout=_ASK_S)
    except (ConnectionError, TimeoutError, _http_error()) as error:
        # An answer of the hub, be it a refusal, is left to the download, which has words for each.
        return error if getattr(error, "response", None) is None else None
    except (OSError, ValueError, RuntimeError):
        return None
    return None


def _url(source: ModelSource) -> str:
    return f"https://huggingface.co/{source.location}"


def _http_error() -> type[Exception]:
    """The root of the HTTP library's exceptions, whichever library the hub client is built on."""
    from huggingface_hub.errors import HfHubHTTPError

    return cast("type[Exception]", HfHubHTTPError.__bases__[0])


def _download_error(source: ModelSource, error: BaseException, offline: bool) -> ModelError:
    """The hub client's exception as one of ours, by cause."""
    from huggingface_hub import errors as hub

    cause = error.__cause__
    if isinstance(error, (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled)):
        if isinstance(cause, hub.HfHubHTTPError):  # refused by the hub, and not in the cache either
            return _download_error(source, cause, offline)
        return _not_cached(source, error, offline)
    url, network = _url(source), (ConnectionError, TimeoutError, _http_error())
    status = getattr(getattr(error, "response", None), "status_code", None)
    known: list[tuple[bool, str, str]] = [
        (
            getattr(error, "errno", None) == errno.ENOSPC or "No space left" in f"{error} {cause}",
            "the disk is full",
            "free space, or set HF_HOME to a folder on a larger disk; finished files are kept",
        ),
        (
            isinstance(error, hub.GatedRepoError),
            "the model is gated: its licence must be accepted first",
            f"accept it on {url}, then `hf auth login` (or set HF_TOKEN)",
        ),
        (
            isinstance(error, hub.RevisionNotFoundError),
            f"there is no revision {source.revision or 'main'!r}",
            f"{url}/tree/main lists branches and tags",
        ),
        (
            isinstance(error, hub.RepositoryNotFoundError),
            "no such repository on the hub, and no such folder here",
            f"{suggestion(source.asked)}; for a private one `hf auth login` first",
        ),
        (isinstance(error, hub.DisabledRepoError), "the hub has disabled this repository", "take another model"),
        (
            status in (401, 403),
            f"the hub refuses access (HTTP {status})",
            f"accept the licence on {url} if there is one, then `hf auth login` with a token that may read",
        ),
        (isinstance(error, hub.HFValidationError), "not a hub id", suggestion(source.asked)),
        (
            isinstance(error, PermissionError),
            f"the cache cannot be written: {error}",
            "set HF_HOME to a folder you may write to",
        ),
        (status is not None, f"the hub answered HTTP {status}", "it has a fault or is busy: try again later"),
        (
            isinstance(error, network),
            "no folder of this name is here, and the hub cannot be reached",
            "check the path; or the connection and proxy",
        ),
    ]
    first = (str(error).strip().splitlines() or [""])[0][:200]
    other = (f"the download failed: {type(error).__name__}: {first}", "try again; finished files are kept")
    message, hint = next(((message, hint) for matches, message, hint in known if matches), other)
    return ModelError(message, where=source.location, hint=hint)


def _not_cached(source: ModelSource, error: BaseException, offline: bool) -> ModelError:
    from huggingface_hub import errors as hub

    partly = " completely" if isinstance(error, hub.IncompleteSnapshotError) else ""
    if offline or any(isinstance(e, hub.OfflineModeIsEnabled) for e in (error, error.__cause__)):
        message, hint = f"offline, and not{partly} in the cache", _fetch_hint(source)
    else:
        message = (
            f"no folder of this name is here, the hub cannot be reached, and the model is not{partly} in the cache"
        )
        hint = "check the path; or the connection and proxy"
    return ModelError(message, where=source.location, hint=hint)


def _fetch_hint(source: ModelSource) -> str:
    revision = f" --revision {source.revision}" if source.revision else ""
    fetching = f"hf download {source.location}{revision}"
    return f"run once online, HF_HUB_OFFLINE unset (or `{fetching}`), or give a folder"
