"""Resuming: where an unfinished run is kept, what it is made from, and whether it can be resumed.

It lives in a hidden folder beside the run folder it will become, which is locked while a process works there:

    unfinished.json   what the run is made from: settings, hashes of data and model
    config.yaml       the same settings, so that `--resume -o FOLDER` needs no others
    normal.jsonl      the normal data the base made
    metrics.jsonl     the steps so far
    checkpoints/      the last few
    trained/          what the loop ended with, while that is measured
    run/              the run folder, while it is being filled: it takes its place whole, or not at all
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn.config.objective import INSTEAD
from qunlearn.config.resolve import PATHS, TRUST, read_config_file, resolve, to_yaml
from qunlearn.config.settings import Config
from qunlearn.errors import OutputError, QunlearnError, ResumeError
from qunlearn.hub.fingerprint import take_fingerprint
from qunlearn.hub.preflight import commit_of
from qunlearn.runs.folder import BEGUN_IN, FINISHED, status_of_run
from qunlearn.training.request import ForgetRequest
from qunlearn.utils.console import say, warn
from qunlearn.utils.file_names import CONFIG, METRICS, NORMAL, RECORD
from qunlearn.utils.files import PART, named_write_errors, output_error, sha256_of, sync, write_json, write_private
from qunlearn.utils.json_files import read_object
from qunlearn.utils.lock import locked
from qunlearn.utils.output import INSIDE, Place
from qunlearn.utils.staging import check_again, put_back, put_in_place, staging_folder

DATE = "date told"
IDENTITY, CHECKPOINTS, TRAINED, RESULT = "unfinished.json", "checkpoints", "trained", "run"
_OURS = {IDENTITY, IDENTITY + PART, CONFIG, NORMAL, METRICS, CHECKPOINTS, TRAINED, RESULT, RESULT + "-old"}
_TORN = (f".{NORMAL}-", f".{CONFIG}-")  # what a kill leaves of a file that is being written
_FORMAT = 5  # of the staging folder: 1 to 4 had other parts of the loop, and other retain rows
# Settings that do not change the result, or that the hashes tell: a run may be resumed with other values of these.
_FREE = {
    *("model.name", "model.revision", "model.vram", "data.bad", "data.normal", "output.folder", "output.overwrite"),
    "output.audit",
    *("data.holdout", "train.save_every", "train.keep_checkpoints", "train.checkpointing", "train.kept_blocks"),
    "stop.eval_every",
    TRUST,
}


@dataclass(frozen=True)
class Unfinished:
    """The staging folder of a run, held by this process."""

    stage: Path

    @property
    def checkpoints(self) -> Path:
        return self.stage / CHECKPOINTS

    @property
    def trained(self) -> Path:
        return self.stage / TRAINED

    @property
    def metrics(self) -> Path:
        return self.stage / METRICS

    @property
    def self_made(self) -> Path:
        return self.stage / NORMAL

    def keep_self_made(self) -> None:
        """The self-made rows are written: remember their hash. Raises OutputError."""
        sync(self.self_made)
        identity = _read(self.stage) or {}
        _write_identity(self.stage, identity | {"self_made": sha256_of(self.self_made)})

    @property
    def has_self_made(self) -> bool:
        """Return whether the rows the base made are there, as they were. Raises ResumeError when they have changed."""
        wanted = (_read(self.stage) or {}).get("self_made")
        if wanted is None or not self.self_made.is_file():
            return False
        if sha256_of(self.self_made) != wanted:
            hint = f"--overwrite starts anew; or remove {self.stage}"
            raise ResumeError("the normal data of the unfinished run has changed", where=str(self.self_made), hint=hint)
        return True

    @contextlib.contextmanager
    def placed(self, place: Place) -> Iterator[Path]:
        """A folder that becomes the run folder when the block ends well. Raises OutputError."""
        result = self.stage / RESULT
        with named_write_errors(place.folder):
            shutil.rmtree(result, ignore_errors=True)
            result.mkdir(mode=0o700)
            try:
                yield result
                for name in (METRICS, NORMAL):
                    if (self.stage / name).is_file():
                        shutil.copyfile(self.stage / name, result / name)
                        (result / name).chmod(0o600)
                for path in (*result.rglob("*"), result):
                    sync(path)
                put_in_place(result, place)
                sync(place.folder.absolute().parent)
            finally:
                shutil.rmtree(result, ignore_errors=True)


@contextlib.contextmanager
def unfinished(request: ForgetRequest, config: Config, versions: Mapping[str, str]) -> Iterator[Unfinished]:
    """Hold the locked staging folder of a new or resumed run, and delete it when the block is done with it.

    It stays when the block raises after a first checkpoint, or calls for it by ending with `run/` placed and a record
    that says "interrupted". Raises OutputError, LockedError, ResumeError.
    """
    stage = staging_folder(request.output)
    try:
        if stage.is_symlink() or (stage.exists() and not stage.is_dir()):
            raise OutputError("is in the way", where=str(stage), hint="remove it")
        stage.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(stage, request.output):
            _enter(stage, request, config, versions)
            try:
                yield Unfinished(stage)
            except BaseException:
                _leave(stage)
                raise
            if is_interrupted(request.output) or is_begun_anew(request.output):
                _leave(stage)
            else:
                shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise output_error(error, request.output) from error


def _enter(stage: Path, request: ForgetRequest, config: Config, versions: Mapping[str, str]) -> None:
    """Make the folder ready, for a run that is resumed or for a new one."""
    # A link would have checkpoints written, and old ones removed, wherever it leads.
    found, there = _read(stage), list(stage.iterdir())
    strange = [p for p in there if not (p.name in _OURS or p.name.startswith(_TORN)) or p.is_symlink()]
    if strange or (found is None and there and not (stage / (IDENTITY + PART)).exists()):
        raise OutputError("is not a folder of ours", where=str(stage), hint="move it away")
    put_back(stage / (RESULT + "-old"), request.output)
    check_again(stage, request.place)
    now = identity(request, config, found)
    if found is not None and request.resume:
        check_same(found, now, stage)
        changed = [f"{k} {v} then, {versions.get(k)} now" for k, v in found["versions"].items() if versions.get(k) != v]
        if changed:
            warn(f"resuming with other versions or another device, so not to the same bits: {'; '.join(changed)}")
        return
    if request.resume and is_interrupted(request.output):
        hint = f"move it here too, as {stage}; or --overwrite without --resume starts anew"
        with contextlib.suppress(OSError):
            stage.rmdir()  # nothing is in it yet
        message = f"the run was interrupted, and its checkpoints (.NAME{INSIDE}) are not where they belong"
        raise ResumeError(message, where=str(request.output), hint=hint)
    if request.resume:
        say("there is no interrupted run to resume: starting at the beginning")
    if found and _has_checkpoints(stage) and not request.config.output.overwrite:
        hint = f"--resume continues it, --overwrite starts anew; or remove {stage}"
        raise OutputError("an unfinished run is there", where=str(request.output), hint=hint)
    try:
        for path in stage.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        _write_identity(stage, {**now, BEGUN_IN: str(Path.cwd()), "versions": dict(versions)})
        write_private(stage / CONFIG, to_yaml(config))
    except OSError:
        _leave(stage)
        raise


def _leave(stage: Path) -> None:
    """Keep the folder where a run can be resumed from it: not before the first checkpoint."""
    if not _has_checkpoints(stage):
        shutil.rmtree(stage, ignore_errors=True)
        return
    say(f"checkpoints are kept in {stage}: --resume continues from there; remove it to give up")


def _has_checkpoints(stage: Path) -> bool:
    return any(any((stage / name).glob("step-????????")) for name in (CHECKPOINTS, TRAINED))


def identity(request: ForgetRequest, config: Config, then: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what decides about a run's result: the settings that matter, and the hashes of data and model.

    then: what a run was begun with, whose way of taking the model's hash is followed.
    """
    return {
        "format": _FORMAT,
        "settings": _settings(config),
        "bad": request.forget_rows.sha256,
        "normal": request.retain_rows.sha256 if request.retain_rows else None,
        "holdout": request.holdout.sha256 if request.holdout else None,
        "instead": request.instead.sha256 if request.instead else None,
        "model": take_fingerprint(request.model.folder).like((then or {}).get("model")),
        "commit": commit_of(request.model.folder),
    }


def _settings(config: Config) -> dict[str, Any]:
    tree = dataclasses.asdict(config)
    flat = {f"{section}.{name}": value for section, leaves in tree.items() for name, value in leaves.items()}
    if flat["objective.instead"] not in INSTEAD:
        flat["objective.instead"] = "a file"  # which one is told by its hash
    return {key: value for key, value in flat.items() if key not in _FREE}


def check_same(then: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raises ResumeError with every difference."""
    old, new = then.get("settings"), now["settings"]
    old = old if isinstance(old, dict) else {}
    differences = [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    words = {"bad": "the bad file", "normal": "the normal file", "holdout": "the holdout file"}
    words |= {"instead": "the file of what is said instead"}
    words |= {"model": "the model", "format": "the file format"}
    differences += [
        f"{word}: {_short(then.get(key))} then, {_short(now[key])} now"
        for key, word in words.items()
        if then.get(key) != now[key]
    ]
    if differences:
        hint = "give what the run was begun with; or --overwrite without --resume to start anew"
        commit = then.get("commit")
        if then.get("model") != now["model"] and isinstance(commit, str) and commit != now["commit"]:
            hint = f"the model was at --revision {commit}; {hint}"
        message = "the unfinished run was begun otherwise:\n  " + "\n  ".join(differences)
        raise ResumeError(message, where=str(where), hint=hint)


def _short(value: object) -> str:
    return f"sha256 {value[:12]}" if isinstance(value, str) else "none" if value is None else str(value)[:40]


def stored_settings(output: Path) -> dict[str, Any]:
    """Return the settings of the unfinished run of an output folder, or of the finished one, as an overlay."""
    for folder, told in ((staging_folder(output), IDENTITY), (output, RECORD)):
        if (folder / CONFIG).is_file():
            return _where_begun(read_config_file(folder / CONFIG), folder / told)
    return {}


def _where_begun(settings: dict[str, Any], told: Path) -> dict[str, Any]:
    """Return the settings with their relative paths as seen from where the run was begun, which may be elsewhere."""
    try:
        begun_in = read_object(told).get(BEGUN_IN)
    except QunlearnError:
        begun_in = None
    if not isinstance(begun_in, str):  # of a run of before
        return settings
    named = {key: settings.get(key) for key in PATHS}
    seen = {key: str(Path(begun_in, name)) for key, name in named.items() if isinstance(name, str) and name}
    return settings | {k: p for k, p in seen.items() if named[k] not in INSTEAD and os.path.exists(p)}  # noqa: PTH110


def is_interrupted(output: Path) -> bool:
    """Return whether a run folder is what Ctrl-C left: whole, but of a run that may be resumed."""
    return status_of_run(output) == "interrupted"


def is_begun_anew(output: Path) -> bool:
    """Return whether a later run with --overwrite was cut off: its checkpoints are there, and newer than the record."""
    stage = staging_folder(output)
    try:
        later = (stage / IDENTITY).stat().st_mtime_ns > (output / RECORD).stat().st_mtime_ns
    except OSError:
        return False
    return later and _has_checkpoints(stage)


def finished_record(request: ForgetRequest) -> dict[str, Any] | None:
    """The record of a run that --resume finds finished; None where there is something to do.

    Raises ResumeError when the finished run is another one.
    """
    if not request.resume or status_of_run(request.output) not in FINISHED or is_begun_anew(request.output):
        return None
    record = read_object(request.output / RECORD)
    then = identity(request, resolve((CONFIG, read_config_file(request.output / CONFIG))))
    now = identity(request, request.config, {"model": record.get("model", {}).get("fingerprint")})
    # What was `auto` was settled when the run began.
    settled = ("auto", None)
    now["settings"] = {k: then["settings"].get(k) if v in settled else v for k, v in now["settings"].items()}
    data = record.get("data", {})
    then |= {
        "bad": data.get("bad", {}).get("sha256"),
        "normal": None if data.get("normal", {}).get("self_made") else data.get("normal", {}).get("sha256"),
        "holdout": data.get("holdout", {}).get("sha256"),
        "instead": data.get("instead", {}).get("sha256"),
        "model": record.get("model", {}).get("fingerprint"),
        "commit": record.get("model", {}).get("commit"),
    }
    check_same(then, now, request.output)
    return record


def date_begun(request: ForgetRequest) -> str:
    """Return the day that the rows of the unfinished run tell which is resumed; empty where they tell none."""
    found = _read(staging_folder(request.output)) if request.resume else None
    return str(found["versions"].get(DATE, "")) if found else ""


def _read(stage: Path) -> dict[str, Any] | None:
    try:
        value = read_object(stage / IDENTITY)
    except QunlearnError:
        return None
    return value if isinstance(value.get("versions"), dict) else None


def _write_identity(stage: Path, value: Mapping[str, Any]) -> None:
    temporary = stage / (IDENTITY + PART)
    write_json(temporary, value)
    sync(temporary)
    temporary.replace(stage / IDENTITY)
