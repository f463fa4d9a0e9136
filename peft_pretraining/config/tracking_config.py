"""What is seen of a run while it goes on: the screen, samples, wandb: a section of `Config`.

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft_pretraining.flags import boolean, comma_separated, non_negative_float, non_negative_int, setting, string, text

if TYPE_CHECKING:
    from peft_pretraining.config.sections import Config


@dataclass(frozen=True)
class TrackingConfig:
    progress_every: float = setting(
        30.0, non_negative_float, "seconds between two lines of progress where stderr is no terminal; 0: every update"
    )
    sample_every: int = setting(
        0, non_negative_int, "updates between two samples: how the model continues --sample_prompts; 0 is off"
    )
    sample_prompts: str | None = setting(None, string, "text file with a prompt per line, for --sample_every")
    with_tracking: bool = setting(False, boolean, "log to wandb")
    wandb_project: str | None = setting(None, string, "wandb project (default: peft_pretraining); implies tracking")
    name: str | None = setting(None, text, "wandb run name (default: the folder's name)")
    tags: tuple[str, ...] = setting((), comma_separated, "wandb tags, comma-separated")
    comment: str | None = setting(None, text, "wandb notes")
    wandb_watch: bool = setting(False, boolean, "let wandb record histograms of weights and gradients")


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
    """Samples need prompts, which must be readable before anything is built."""
    tracking = config.tracking
    if tracking.sample_every and tracking.sample_prompts is None:
        problems.append(f"--sample_every {tracking.sample_every} needs --sample_prompts, a text file")
    if tracking.sample_every and tracking.sample_prompts is not None:
        try:
            if not Path(tracking.sample_prompts).is_file():
                raise ValueError("no such file")
            read_prompts(tracking.sample_prompts)
        except (ValueError, OSError) as error:
            problems.append(f"--sample_prompts {tracking.sample_prompts}: {error}")
