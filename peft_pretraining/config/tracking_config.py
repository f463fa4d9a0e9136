"""What is seen of a run while it goes on: the screen, samples, wandb: a section of `Config`.

Nothing here imports torch.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft_pretraining.flags import (
    boolean,
    choice,
    comma_separated,
    non_negative_float,
    non_negative_int,
    setting,
    string,
    text,
)

if TYPE_CHECKING:
    from peft_pretraining.config.sections import Config


TRACKERS = ("wandb", "tensorboard")


def _trackers(text: str) -> tuple[str, ...]:
    return tuple(map(choice(*TRACKERS), comma_separated(text)))


@dataclass(frozen=True)
class TrackingConfig:
    progress_every: float = setting(
        30.0, non_negative_float, "seconds between two lines of progress where stderr is no terminal; 0: every update"
    )
    sample_every: int = setting(
        0, non_negative_int, "updates between two samples: how the model continues --sample_prompts; 0 is off"
    )
    sample_prompts: str | None = setting(None, string, "text file with a prompt per line, for --sample_every")
    tracker: tuple[str, ...] = setting(
        (), _trackers, "dashboards beside metrics.jsonl, comma-separated: wandb, tensorboard"
    )
    log_layers: int = setting(
        0,
        non_negative_int,
        "updates between two looks at each trained matrix: how far and in how many directions it moved, its gradient, "
        "and what the projection captured; 0 is off",
    )
    older_eval_names: bool = setting(
        False, boolean, "on dashboards, evaluations also as final_eval_..., which otherwise the last one has alone"
    )
    with_tracking: bool = setting(False, boolean, "log to wandb: the same as --tracker wandb")
    wandb_project: str | None = setting(None, string, "wandb project (default: peft_pretraining); implies tracking")
    name: str | None = setting(None, text, "wandb run name (default: the method and its key settings)")
    tags: tuple[str, ...] = setting((), comma_separated, "wandb tags, comma-separated")
    comment: str | None = setting(None, text, "wandb notes")
    wandb_watch: bool = setting(False, boolean, "let wandb record histograms of weights and gradients")

    @property
    def trackers(self) -> frozenset[str]:
        """Dashboards that the run's numbers go to, whichever flag asked for them."""
        by_flag = self.with_tracking or self.wandb_project is not None
        return frozenset((*self.tracker, *(("wandb",) if by_flag else ())))


_MOST_PROMPTS = 64
_LARGEST_FILE = 2**20  # bytes


def read_prompts(path: str) -> list[str]:
    """The lines of a file that are not blank. Raises `ValueError`, one line, where there are none, or too many."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_LARGEST_FILE + 1)
        prompts = [line.strip() for line in raw.decode().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be read ({getattr(error, 'strerror', None) or 'it is no UTF-8 text'})") from error
    if not prompts or len(prompts) > _MOST_PROMPTS or len(raw) > _LARGEST_FILE:
        raise ValueError(f"has {len(prompts) or 'no'} prompts: a line each, 1 to {_MOST_PROMPTS} of them, are wanted")
    return prompts


def check(config: Config, problems: list[str]) -> None:
    """Dashboards must be installed, and samples need prompts, which must be readable before anything is built."""
    tracking = config.tracking
    for name in TRACKERS:
        if name in tracking.trackers and importlib.util.find_spec(name) is None:
            problems.append(f"--tracker {name}: {name} is not installed (pip install {name})")
    if tracking.log_layers and config.per_layer:
        problems.append(f"--log_layers {tracking.log_layers} cannot see --per_layer updates: leave one of them out")
    if tracking.sample_every and tracking.sample_prompts is None:
        problems.append(f"--sample_every {tracking.sample_every} needs --sample_prompts, a text file")
    if tracking.sample_every and tracking.sample_prompts is not None:
        try:
            if not Path(tracking.sample_prompts).is_file():
                raise ValueError("no such file")
            read_prompts(tracking.sample_prompts)
        except (ValueError, OSError) as error:
            problems.append(f"--sample_prompts {tracking.sample_prompts}: {error}")
