"""Process groups: one process's (nccl on a GPU), the launcher's, and those of two GPUs."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from typing import Any

from peft_pretraining.methods import METHODS

from .. import PROJECT
from ..children import Child
from ..lines import Lines
from ..scene import Scene, argv
from ..trainee import largest_difference, must_all_end, must_end, saved_tensors, settings_of, whole_run

LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"distributed_type": "ddp"},
    "fsdp": {"distributed_type": "fsdp", "async_save": True},
    "hsdp": {"distributed_type": "fsdp", "replicas": 1, "reshard_after_forward": False},
}
NAMES = ("galore", "switchlora", "golore_adapter")
UPDATES, SAVED = 6, 3
WEIGHTS = 1e-9
"""In float64; one process has nothing to add up in another order, but kernels may be chosen by a tensor's address."""
OF_TWO = 1e-6


def of_one(scene: Scene, lines: Lines, case: str) -> None:
    """One process with a group ends as one without; its checkpoints go on without a group."""
    backend = "nccl" if scene.on_cuda else "gloo"
    names, last = NAMES[:1] if scene.quick else NAMES, f"model_{UPDATES}"
    alone = {method: scene.folder / f"{method}_alone" for method in names}
    grouped = {method: scene.folder / method for method in names}

    def start(method: str, log: str, environment: dict[str, str], **changes: Any) -> Child:
        settings = {**_settings(scene, method), **changes}
        return whole_run(settings, scene.folder / f"{method}_{log}.log", **environment)

    runs = [start(method, "alone", {}, save_dir=folder) for method, folder in alone.items()]
    for method, folder in grouped.items():
        runs.append(start(method, "grouped", _environment(0, 1), save_dir=folder, **LAYOUTS[case]))
    must_all_end(runs, 50)
    expected = {method: saved_tensors(folder / last) for method, folder in alone.items()}
    for method, folder in grouped.items():
        apart = largest_difference(saved_tensors(folder / last), expected[method])
        lines.at_most(f"{method}, {case} over a group of one ({backend}): weights and states", apart, WEIGHTS)
        shutil.rmtree(folder / last)
    must_all_end(
        [start(method, "again", {}, save_dir=folder, autoresume=True) for method, folder in grouped.items()], 50
    )
    for method, folder in grouped.items():
        apart = largest_difference(saved_tensors(folder / last), expected[method])
        lines.at_most(f"{method}, {case}: its checkpoint goes on without a group", apart, WEIGHTS)


def torchrun(scene: Scene, lines: Lines, case: str) -> None:
    """The launcher itself, which finds a port and restarts what dies."""
    settings = {**_settings(scene, "galore"), "distributed_type": "ddp", "save_dir": scene.folder / "launched"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += [str(PROJECT / "torchrun_main.py"), *argv(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55)
    last = done.stderr.strip().splitlines()[-1:] if done.returncode else ["0"]
    lines.holds("torchrun --nproc-per-node 1 ends with 0", done.returncode == 0, "".join(last)[:150], "0")


def of_two(scene: Scene, lines: Lines, case: str) -> None:
    """DDP and FSDP2 over two GPUs end as one process does."""
    for method in NAMES:
        settings = _settings(scene, method)
        alone = scene.folder / f"{method}_alone"
        must_end(whole_run({**settings, "save_dir": alone}, scene.folder / f"{method}.log"), 60)
        expected = saved_tensors(alone / f"model_{UPDATES}")
        for layout in ("ddp", "fsdp"):
            folder, port = scene.folder / f"{method}_{layout}", free_port()
            flags = {**settings, **LAYOUTS[layout], "save_dir": folder, "batch_size": settings["batch_size"] // 2}
            ranks = [
                whole_run(flags, scene.folder / f"{method}_{layout}{rank}.log", **_environment(rank, 2, port))
                for rank in range(2)
            ]
            must_all_end(ranks, 60)
            apart = largest_difference(saved_tensors(folder / f"model_{UPDATES}"), expected)
            lines.at_most(f"{method}, {layout} over two devices: weights and states", apart, OF_TWO)


def _settings(scene: Scene, method: str) -> dict[str, Any]:
    spec = METHODS[method]
    tiny = {**spec.tiny, **({"update_proj_gap": 3} if "update_proj_gap" in spec.own else {})}
    sizes = {"batch_size": 4, "total_batch_size": 4, "num_training_steps": UPDATES, "save_every": SAVED}
    return settings_of(scene, "tiny", method, method=method, precision="fp64", **tiny, **sizes)


def _environment(rank: int, size: int, port: int | None = None) -> dict[str, str]:
    """What torchrun would set."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return {
        **{name: str(value) for name, value in numbers.items()},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port or free_port()),
    }


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
