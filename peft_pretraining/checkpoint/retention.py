"""Which checkpoints of a run may be deleted, when a newer one is complete."""

from __future__ import annotations

from pathlib import Path

from peft_pretraining.checkpoint import resume, run_dir
from peft_pretraining.checkpoint.train_state import NewerFormat, read_counters


class Retention:
    """Keeps the newest `keep` good checkpoints of a run in its folder; None keeps all.

    Only those count that this process wrote, or found to be undamaged, of this run, and finite: nothing else may push
    out a good one. Damaged ones go with those that are too old. What belongs to other runs stays, and counts for
    nothing.
    """

    def __init__(self, save_dir: Path, keep: int | None, run_id: str | None):
        self.save_dir, self.keep, self.run_id = save_dir, keep, run_id
        self._is_good: dict[int, bool | None] = {}
        """By update; None is not this run's."""

    def mark(self, step: int, good: bool) -> None:
        """Checkpoint `step` is known to be good, or not."""
        self._is_good[step] = good

    def passed_over_since(self, step: int) -> None:
        """The run goes on from checkpoint `step`: later ones lie in the folder, but could not be used."""
        for other, _ in run_dir.completed_checkpoints(self.save_dir):
            if other > step:
                self.mark(other, False)
        self.mark(step, True)

    def delete_old(self, newest: int) -> None:
        """Delete what a complete checkpoint of update `newest` makes superfluous. Raises `OSError`."""
        self.mark(newest, True)
        if self.keep is None:
            return
        # Those with a later number are written over when the run gets there.
        steps = [entry for entry in run_dir.completed_checkpoints(self.save_dir) if entry[0] <= newest]
        if len(steps) <= self.keep and all(self._is_good.get(step, True) for step, _ in steps):
            return
        good = [folder for step, folder in steps if self._judge(step, folder)]
        bad = [folder for step, folder in steps if self._is_good[step] is False]
        for folder in (*good[self.keep :], *bad):
            run_dir.remove(folder)

    def delete_after(self, step: int, last: int) -> None:
        """The run has gone back to update `step` from `last`: what was saved between them has been undone."""
        for other, folder in run_dir.completed_checkpoints(self.save_dir):
            if step < other <= last and self._judge(other, folder):
                run_dir.remove(folder)
                del self._is_good[other]

    def _judge(self, step: int, folder: Path) -> bool | None:
        """Whether a checkpoint is good; looked up, or found out by reading all of it, once."""
        if step not in self._is_good:
            try:
                found = resume.examine(folder, self.run_id, step=step)
                if found.foreign:
                    self._is_good[step] = None
                else:
                    self._is_good[step] = found.problem is None and _exports_finite_weights(folder)
            except NewerFormat:
                self._is_good[step] = None
        return self._is_good[step]


def _exports_finite_weights(folder: Path) -> bool:
    """Whether an older checkpoint's plain model is finite; newer ones are, or would not have been written."""
    if read_counters(folder).get("format"):
        return True
    from safetensors import safe_open

    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if not all(bool(file.get_tensor(name).isfinite().all()) for name in file.keys()):
                return False
    return True
