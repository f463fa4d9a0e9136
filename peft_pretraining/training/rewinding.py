"""Going back to an earlier checkpoint when a run is no longer finite, and on past the batches that led there.

The counters are those of the checkpoint, and with them rate, refreshes and random numbers; only the data goes on where
it stands. The checkpoint is written anew with that place and a note of what was skipped (`rewinds`), so that a run
which is stopped or killed afterwards goes on in the same way, bit by bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING

from peft_pretraining.checkpoint import resume
from peft_pretraining.checkpoint.failures import NotFinite
from peft_pretraining.checkpoint.resume import Candidate
from peft_pretraining.distributed import free_gathered_weights
from peft_pretraining.training.starting import StartingPoint, restore_first
from peft_pretraining.training.tracking import log

if TYPE_CHECKING:
    from peft_pretraining.training.run import Run

MOST_REWINDS = 3
"""Times that a run goes back, over all its launches."""


def go_back(run: Run, error: NotFinite) -> None:
    """Go back `--rewind_on_nan` checkpoints, or to the oldest; all ranks call it.

    Raises `NotFinite`, with the checkpoint to go on from, when the run must not go back, or cannot.
    """
    state, checkpointer, wanted = run.state, run.checkpointer, run.config.run.rewind_on_nan
    checkpointer.wait()
    where = checkpointer.where_to_go_on()
    if not wanted:
        raise NotFinite(f"{error}; {where}") from error
    if len(state.rewinds) >= MOST_REWINDS:
        raise NotFinite(f"{error}; the run has gone back {MOST_REWINDS} times already; {where}") from error
    log.error("%s; going back (--rewind_on_nan %d)", error, wanted)
    reached = copy.deepcopy(state)
    found = _in_order_of_trial(run, wanted) if run.group.is_main else iter(())
    restored = restore_first(StartingPoint(checkpointer.record, found=found), checkpointer, run.group)
    if restored is None:
        raise NotFinite(f"{error}; there is no checkpoint to go back to") from error
    free_gathered_weights(run.model)
    skipped = reached.data_position - restored.data_position
    restored.data_position, restored.data_state = reached.data_position, reached.data_state
    restored.nonfinite_in_a_row = 0
    rewind = {"from_update": reached.update_step, "to_update": restored.update_step, "samples_skipped": skipped}
    restored.rewinds = [*reached.rewinds, rewind]
    state.restore(restored)
    run.tracker.go_back(state)
    checkpointer.save_rewound(state, reached.update_step)
    log.warning(
        "went back from update %d to %d, and skips the %d samples since (%d of at most %d times)",
        *(reached.update_step, state.update_step, skipped, len(state.rewinds), MOST_REWINDS),
    )


def _in_order_of_trial(run: Run, wanted: int) -> Iterator[Candidate]:
    """The good checkpoint that is `wanted` steps back, then older ones, then newer ones."""
    checkpointer, state = run.checkpointer, run.state
    record = checkpointer.record
    candidates = resume.candidates(checkpointer.save_dir, record.id, record.identity)
    good = (item for item in candidates if item.problem is None and item.step <= state.update_step)
    nearest = list(islice(good, wanted))
    if not nearest and checkpointer.saved_in is not None:  # the one of --resume_from: nothing has been saved since
        nearest = [Candidate(checkpointer.saved_in)]
    return chain(nearest[-1:], good, reversed(nearest[:-1]))
