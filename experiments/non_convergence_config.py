"""The flags of `non_convergence.py`, and the runs they ask for. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_pretraining.flags import (
    ConfigError,
    ParsedFlag,
    comma_separated,
    non_negative_float,
    non_negative_int,
    parse_command_line,
    positive_float,
    positive_int,
    section_flags,
    setting,
    string,
)

METHODS = ("galore", "full", "golore", "large_batch")
"""In the order of their numbers as `--type`."""
OPTIMIZERS = ("sgd", "adamw")
RAND_RATIO = {"sgd": 0.25, "adamw": 0.5}
"""Of GoLore, unless told otherwise."""
LARGE_BATCH = 1000
"""Draws of the noise in the gradient that large-batch GaLore's SVD sees, unless told otherwise."""
_SAMPLES = 400
_LARGEST_SEED = 2**63 - 1


def _distinct(items: Sequence[str]) -> tuple[str, ...]:
    if not items or len(set(items)) < len(items):
        raise ValueError("must be one or more different values with commas between them")
    return tuple(items)


def _methods(text: str) -> tuple[str, ...]:
    names = [METHODS[int(item)] if item in map(str, range(len(METHODS))) else item for item in comma_separated(text)]
    if not set(names) <= set(METHODS):
        raise ValueError(f"must be of {', '.join(f'{i} {name}' for i, name in enumerate(METHODS))}")
    return _distinct(names)


def _optimizers(text: str) -> tuple[str, ...]:
    names = [item.lower() for item in comma_separated(text)]
    if not set(names) <= set(OPTIMIZERS):
        raise ValueError("must be SGD, AdamW or both")
    return _distinct(names)


def _seeds(text: str) -> tuple[int, ...]:
    seeds = [non_negative_int(item) for item in _distinct(comma_separated(text))]
    if max(seeds) > _LARGEST_SEED:
        raise ValueError(f"must be at most {_LARGEST_SEED}")
    return tuple(seeds)


@dataclass(frozen=True)
class Settings:
    """Every flag of `non_convergence.py`; the aliases are what the papers' authors call them."""

    method: tuple[str, ...] = setting(
        METHODS, _methods, "0 galore, 1 full, 2 golore, 3 large_batch, by number or name (default: all)", ("type",)
    )
    optimizer: tuple[str, ...] = setting(OPTIMIZERS, _optimizers, "inner optimizer, SGD or AdamW (default: both)")
    seeds: tuple[int, ...] = setting((42,), _seeds, "one or more seeds of problem and noise (default: 42)", ("seed",))
    steps: int = setting(200_000, positive_int, "steps of each run (default: 200000)", ("epoch",))
    lr: float = setting(3e-5, positive_float, "learning rate, constant (default: 3e-5)")
    update_proj_gap: int = setting(
        100, non_negative_int, "steps between two refreshes of the basis; 0 keeps the first (default: 100)", ("T",)
    )
    rand_ratio: float | None = setting(
        None, non_negative_float, "share of GoLore's run with SVD bases (default: 0.25 with SGD, 0.5 with AdamW)"
    )
    grad_accumulation: int | None = setting(
        None, positive_int, f"noise draws in the gradient that large_batch's SVD sees (default: {LARGE_BATCH})"
    )
    n: int = setting(10, positive_int, "rows and columns of X (default: 10)")
    rank: int = setting(4, positive_int, "rank of the projection and of the noise (default: 4)")
    sigma: float = setting(1.0, positive_float, "scale of B, of the noise and of the start (default: 1)")
    sample_every: int | None = setting(
        None, positive_int, f"steps between two values in the CSV files (default: {_SAMPLES} values a run)"
    )
    jobs: int = setting(2, positive_int, "runs at a time, each on one thread of its own process (default: 2)")
    output_dir: str | None = setting(
        None, string, "results; files of an earlier call are replaced (default: results/non_convergence)"
    )

    @property
    def folder(self) -> Path:
        """Where the results go. A part of the methods or optimizers has a default of its own, so as not to replace the
        results of all."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        chosen = ((self.method, METHODS), (self.optimizer, OPTIMIZERS))
        part = [name for names, known in chosen if set(names) != set(known) for name in names]
        return Path("results", "_".join(["non_convergence", *part]))

    def runs(self) -> list[Run]:
        return [self._run(m, o, s) for s in self.seeds for o in self.optimizer for m in self.method]

    def _run(self, method: str, optimizer: str, seed: int) -> Run:
        # The flag is for large_batch; GoLore's own SVDs read it where large_batch is not chosen.
        given, alone = self.grad_accumulation, "large_batch" not in self.method
        draws = {"large_batch": given or LARGE_BATCH, "golore": given if alone else None}
        ratio = RAND_RATIO[optimizer] if self.rand_ratio is None else self.rand_ratio
        return Run(
            **{name: getattr(self, name) for name in ("steps", "lr", "update_proj_gap", "n", "rank", "sigma")},
            **{"method": method, "optimizer": optimizer, "seed": seed, "svd_draws": draws.get(method) or 1},
            rand_ratio=ratio if method == "golore" else None,
            sample_every=self.sample_every or max(1, self.steps // _SAMPLES),
        )


@dataclass(frozen=True)
class Run:
    """One method with one inner optimizer and one seed."""

    method: str
    optimizer: str
    seed: int
    steps: int
    lr: float
    update_proj_gap: int
    """Steps between two refreshes."""
    svd_draws: int
    """Draws of the noise averaged in the gradient that the SVD sees."""
    rand_ratio: float | None
    """Share of the run with SVD bases; None without random ones."""
    n: int
    rank: int
    sigma: float
    sample_every: int
    """Steps."""

    @property
    def projected(self) -> bool:
        return self.method != "full"

    @property
    def name(self) -> str:
        return f"{self.optimizer}_{self.method}_seed{self.seed}"


def load(argv: Sequence[str], *, description: str) -> tuple[Settings, list[str]]:
    """The settings and warnings about flags without effect. Raises `ConfigError` with every problem."""
    problems: list[str] = []
    flags = section_flags(Settings)
    given = parse_command_line(flags, argv, prog="non_convergence.py", description=description, problems=problems)
    settings = Settings(**{name: item.value for name, item in given.items()})
    settings = _with_older_meaning(settings, given)
    if settings.rank >= settings.n:
        problems.append(f"--rank {settings.rank} must be below --n {settings.n}: nothing would be left to minimise")
    if settings.grad_accumulation == 1 and "large_batch" in settings.method:
        problems.append("--grad_accumulation 1 makes large_batch the same as galore: give at least 2, or --type 0")
    problems += _folder_problems(settings.folder)
    if problems:
        raise ConfigError(problems)
    return settings, _without_effect(settings, given)


def _with_older_meaning(settings: Settings, given: dict[str, ParsedFlag]) -> Settings:
    """`--type 0 --grad_accumulation 1000` is GaLore with a large batch, which has a name of its own here."""
    many = settings.grad_accumulation is not None and settings.grad_accumulation > 1
    if not (many and "method" in given and "galore" in settings.method) or "large_batch" in settings.method:
        return settings
    methods = tuple("large_batch" if name == "galore" else name for name in settings.method)
    return dataclasses.replace(settings, method=methods)


def _without_effect(settings: Settings, given: dict[str, ParsedFlag]) -> list[str]:
    methods = set(settings.method)
    read_by = {
        "update_proj_gap": {"galore", "golore", "large_batch"},
        "rand_ratio": {"golore"},
        "grad_accumulation": {"golore", "large_batch"} | ({"galore"} if settings.grad_accumulation == 1 else set()),
    }
    unread = [
        f"--{given[name].spelling}" for name, readers in read_by.items() if name in given and not readers & methods
    ]
    return [f"without effect for {', '.join(settings.method)}: {', '.join(unread)}"] if unread else []


def _folder_problems(folder: Path) -> list[str]:
    nearest = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    if not nearest.is_dir():
        return [f"--output_dir {folder}: {nearest} is not a folder"]
    if not os.access(nearest, os.W_OK | os.X_OK):
        return [f"--output_dir {folder}: no permission to write in {nearest}"]
    return []
