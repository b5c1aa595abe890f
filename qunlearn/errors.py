"""Named errors: what is wrong, where, what to do, and the exit code."""

from __future__ import annotations

from typing import ClassVar

EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "a fault in qunlearn itself (please report it)",
    2: "wrong flags, configuration or recipe",
    3: "a data file that cannot be used",
    4: "it does not fit in memory",
    5: "the target was not reached: bad answers are still given, or the rest has suffered",
    6: "a model or adapter that cannot be used",
    7: "the device that was asked for is not there",
    8: "training failed (non-finite numbers, no gradient, a changed base, a lost process)",
    9: "the output cannot be written",
    10: "cannot resume: settings, data or model have changed",
    11: "the installation is broken (see `qunlearn doctor`)",
    12: "there is nothing to forget: the model gives none of the bad answers",
    130: "interrupted (Ctrl-C, SIGTERM); the last good adapter was kept where there was one",
    141: "the reader of stdout went away (a closed pipe)",
}


class QunlearnError(Exception):
    """A failure the user can act on.

    `message` says what is wrong, `where` names the place (`file:line`, a flag, a tensor), `hint` what to do.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class ConfigError(QunlearnError):
    """Wrong flags, an unknown key, a value out of range."""

    exit_code = 2


class DataError(QunlearnError):
    """A data file that cannot be used as it is."""

    exit_code = 3


class DoesNotFitError(QunlearnError):
    """More memory is needed than there is."""

    exit_code = 4


class GateError(QunlearnError):
    """A measured score is beyond its threshold."""

    exit_code = 5


class ModelError(QunlearnError):
    """A model that cannot be loaded, or whose architecture is not understood."""

    exit_code = 6


class AdapterError(ModelError):
    """An adapter that cannot be loaded, or that belongs to another base."""


class GuardError(ModelError):
    """A guard that cannot be used: of another base, tokenizer or template, damaged, or too strong for a dtype."""


class DeviceError(QunlearnError):
    """The device that was asked for is not there."""

    exit_code = 7


class TrainingError(QunlearnError):
    """Training cannot go on."""

    exit_code = 8


class ProcessLostError(TrainingError):
    """Another process of a run of several has ended, or cannot be reached.

    `told`: it was the main one, which has said what happened.
    """

    told = False


class NoGradientError(TrainingError):
    """An adapter tensor that should be trained received no gradient."""


class BaseChangedError(TrainingError):
    """The base weights are not what they were before training."""


class OutputError(QunlearnError):
    """The output cannot be written: it exists, the disk is full, or the folder is read-only."""

    exit_code = 9


class LockedError(OutputError):
    """Another process is writing the same output."""


class ResumeError(QunlearnError):
    """What an unfinished run was made from is not what is given now."""

    exit_code = 10


class NothingToForgetError(QunlearnError):
    """The base gives none of the bad answers."""

    exit_code = 12


class InstallationError(QunlearnError):
    """Something that every run needs does not work here."""

    exit_code = 11


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory was refused: on a CPU torch says so by a plain RuntimeError."""
    kind = type(error).__name__
    return isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
