"""How a run fails: each of these ends it with its message on one line and exit code 1."""

from __future__ import annotations


class TrainingFailed(RuntimeError):
    """The run cannot go on. Where all ranks come to it, all raise it alike."""


class NotFinite(TrainingFailed):
    """Weights, optimizer state, or the losses and gradients of too many updates are not finite.

    All ranks raise it; `--rewind_on_nan` answers it.
    """


class SaveFailed(TrainingFailed):
    """The state that a run ends with could not be saved; all ranks raise it."""


class FolderLost(TrainingFailed):
    """The run's folder was removed, or somebody else took it. Only the main process notices."""
