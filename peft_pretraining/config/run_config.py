"""A run as a whole: its folder, its checkpoints, what it starts from and how it ends: a section of `Config`.

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft_pretraining.flags import (
    boolean,
    integer,
    non_negative_float,
    non_negative_int,
    positive_int,
    setting,
    string,
)


def _profile(text: str) -> int:
    """Bare or `True` is 5 updates, `False` is none, otherwise a number."""
    if text in ("", "True", "true"):
        return 5
    return 0 if text in ("False", "false") else non_negative_int(text)


_profile.__dict__["value_is_optional"] = True


@dataclass(frozen=True)
class RunConfig:
    save_dir: str | None = setting(None, string, "folder of the run (default: checkpoints/{model}-{method}-{time})")
    save_every: int = setting(10_000, positive_int, "updates between two checkpoints; one follows the last update")
    eval_every: int = setting(1000, positive_int, "updates between two evaluations")
    keep_checkpoints: int | None = setting(None, positive_int, "newest checkpoints to keep (default: all)")
    autoresume: bool = setting(False, boolean, "continue from the newest good checkpoint in --save_dir")
    allow_restart: bool = setting(False, boolean, "with --autoresume: start over if every checkpoint is damaged")
    allow_redecay: bool = setting(
        False,
        boolean,
        "go on with another schedule from a checkpoint of a wsd run whose rate had begun to fall, which is refused",
    )
    rewind_on_nan: int = setting(
        0,
        non_negative_int,
        "when weights or many updates in a row are not finite: go back so many checkpoints, by itself, and skip the "
        "batches since; at most three times; 0 ends the run",
    )
    resume_from: str | None = setting(
        None, string, "restore everything from this checkpoint folder", ("continue_from",)
    )
    warmed_up_model: str | None = setting(None, string, "start from this checkpoint's weights and counters only")
    seed: int = setting(42, integer, "seed of initial weights, data order and all other random choices")
    single_gpu: bool = setting(False, boolean, "no process group: the whole run on one device")
    deterministic: bool = setting(False, boolean, "deterministic kernels only (needed for bit-equal resume on CUDA)")
    step_timeout: float = setting(
        0.0, non_negative_float, "seconds after which an update that hangs ends the process, for a restart; 0 is off"
    )
    profile: int = setting(0, _profile, "trace this many updates with torch.profiler (bare: 5)")
