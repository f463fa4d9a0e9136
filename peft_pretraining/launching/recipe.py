"""From a recipe (a size and a method) to the torchrun command that runs it.

The numbers are data, in `configs/recipes/`; `common.yaml` there says in which order its files are read. Nothing here
imports torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.config import cli
from peft_pretraining.config.shipped import CONFIGS
from peft_pretraining.flags import ConfigError, yaml_file
from peft_pretraining.methods import METHODS

RECIPES = CONFIGS / "recipes"
TRAINER = Path(__file__).resolve().parents[2] / "torchrun_main.py"
"""Beside the package, in a checkout as in an installation."""


@dataclass(frozen=True)
class Devices:
    """Where a run happens: `processes` on each of `nodes`, one device per process."""

    processes: int = 1
    nodes: int = 1
    rdzv_endpoint: str | None = None
    """HOST:PORT where the nodes meet; unused on a single node."""
    max_restarts: int = 0
    """How often torchrun starts all processes again when one has failed."""

    @property
    def world_size(self) -> int:
        return self.processes * self.nodes


def known_sizes() -> tuple[str, ...]:
    return tuple(_read("common")["sizes"])


def known_methods() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "common"))


def check_names(size: str, method: str) -> None:
    """Raises `ConfigError` for a size or method without a recipe, and for a method that is not built yet."""
    problems = []
    if size not in known_sizes():
        problems.append(f"unknown size {size!r}; there is {', '.join(known_sizes())}")
    if method not in known_methods():
        problems.append(f"unknown method {method!r}; there is {', '.join(known_methods())}")
    elif method not in METHODS:
        problems.append(f"method {method} is not built yet; there is {', '.join(METHODS)}")
    if problems:
        raise ConfigError(problems)


def settings(size: str, method: str, world_size: int) -> dict[str, str]:
    """The recipe's flags and values, in the order in which its files name them."""
    merged: dict[str, Any] = {}
    for file in (_read("common"), *_files(method)):
        merged |= file.get("all_sizes") or {}
        merged |= (file.get("sizes") or {}).get(size) or {}
    for_one_device = merged.pop("one_device", {})
    if world_size == 1:
        merged |= for_one_device
    return {name: str(value) for name, value in merged.items() if value is not None}


def is_published(size: str, method: str) -> bool:
    """Whether the recipe's rates at this size are those of its source; its file says what they are otherwise."""
    return size in _read(method)["published"]


def _files(method: str) -> Iterator[dict[str, Any]]:
    """The method's file, after the one that it is based on."""
    file = _read(method)
    if "based_on" in file:
        yield from _files(file["based_on"])
    yield file


def _read(name: str) -> dict[str, Any]:
    return yaml_file.load_mapping(RECIPES / f"{name}.yaml")


def largest_batch_size(total: int, limit: int, world_size: int) -> int:
    """Sequences per device: the largest number up to `limit` that divides each device's share of `total`.

    For powers of two that is the smaller of the recipe's batch size and the share; the rest is gradient accumulation.
    """
    if total <= 0 or total % world_size:
        raise ConfigError([f"--total_batch_size {total} cannot be divided over {world_size} processes"])
    share = total // world_size
    return next(size for size in range(min(limit, share), 0, -1) if share % size == 0)


def command(size: str, method: str, devices: Devices, overrides: Sequence[str] = ()) -> list[str]:
    """The whole command line; `overrides` are flags of torchrun_main.py, which replace the recipe's."""
    given = _flags(overrides)
    recipe = settings(size, method, devices.world_size)
    if "gradient_accumulation" in given:
        del recipe["batch_size"]  # follows from the other two
    elif "batch_size" not in given:
        total = given.get("total_batch_size", recipe["total_batch_size"])
        if re.fullmatch("[0-9]{1,18}", total):  # anything else is for torchrun_main.py to refuse
            limit = int(recipe["batch_size"])
            recipe["batch_size"] = str(largest_batch_size(int(total), limit, devices.world_size))
    flags = {
        "model_config": str(CONFIGS / f"llama_{size}.json"),
        "method": method,
        **recipe,
        "save_dir": f"checkpoints/llama_{size}_{method}",
        "autoresume": "True",
    }
    words = [word for name, value in flags.items() if name not in given for word in (f"--{name}", value)]
    return [*torchrun(devices), str(TRAINER), *words, *overrides]


def torchrun(devices: Devices) -> list[str]:
    """torchrun of the Python in use, and where its processes are and meet."""
    beside_python = Path(sys.executable).with_name("torchrun")
    program = [str(beside_python) if beside_python.exists() else "torchrun"]
    if devices.max_restarts:
        program += ["--max_restarts", str(devices.max_restarts)]
    if devices.nodes == 1:
        return [*program, "--standalone", "--nproc_per_node", str(devices.processes)]
    if not devices.rdzv_endpoint:
        raise ConfigError([f"--nnodes {devices.nodes} needs --rdzv_endpoint HOST:PORT, the same on every node"])
    nodes = ["--nnodes", str(devices.nodes), "--nproc_per_node", str(devices.processes)]
    return [*program, *nodes, "--rdzv_backend", "c10d", "--rdzv_endpoint", devices.rdzv_endpoint]


def _flags(words: Sequence[str]) -> dict[str, str]:
    """`["--lr", "0.1", "--autoresume"]` -> {"lr": "0.1", "autoresume": ""}; aliases by the flag's own name."""
    found: dict[str, str] = {}
    names = {spelling: flag.name for flag in cli.all_flags() for spelling in flag.accepted}
    for position, word in enumerate(words):
        following = words[position + 1] if position + 1 < len(words) else "--"
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            found[names.get(name, name)] = value or ("" if following.startswith("--") else following)
    return found
