"""Running the trainer, comparing what it left behind bit by bit, and damaging it.

As a script under torchrun, `helpers.py CASES.json` makes one run after the other in the same processes: starting a
process costs more than a small run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

GALORE = {"method": "galore", "rank": 4, "update_proj_gap": 5}
METHODS = {"full_rank": {}, "galore": GALORE}
RESUME = ("--autoresume", "True")
REQUEUE = 75
"""Exit code of a run that was stopped by a signal."""


class MachineGone(BaseException):
    """What a test raises where a process would have been killed: no error that the run may handle."""


def run(argv: Iterable[Any]) -> int:
    """`torchrun_main.py` in this process; its exit code."""
    import torchrun_main

    return torchrun_main.main([str(part) for part in argv])


def stop_after(updates: int, argv: Iterable[Any], number: int = signal.SIGTERM) -> None:
    """Run until a signal within the last of so many updates."""
    with signal_in_update(updates - 1, number):
        assert run(argv) == REQUEUE


class Undisturbed:
    """Folders of runs that nothing disturbed, each made once: `undisturbed(command, **changes)`."""

    def __init__(self, tmp_path_factory):
        self._folders, self._made = tmp_path_factory, {}

    def __call__(self, command: Callable[..., list[str]], **changes: Any) -> Path:
        key = tuple(sorted(changes.items()))
        if key not in self._made:
            folder = self._folders.mktemp("undisturbed") / "run"
            assert run(command(**{**changes, "save_dir": folder})) == 0
            self._made[key] = folder
        return self._made[key]


def checkpoints(folder: Path) -> list[int]:
    """Updates of the complete checkpoints in a run's folder."""
    return sorted(int(path.name.split("_")[1]) for path in folder.glob("model_*") if path.name[6:].isdigit())


def unfinished(folder: Path) -> list[str]:
    """What an interrupted save would leave."""
    return sorted(path.name for path in folder.glob("model_*") if not path.name[6:].isdigit())


def tensors(checkpoint: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint: of the training state, and of the exported model."""
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file

    folder = checkpoint / "training_state"
    described = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {name: torch.empty(item.size, dtype=item.properties.dtype) for name, item in described.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a single process needs no process group
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state | {f"exported.{name}": value for name, value in load_file(checkpoint / "model.safetensors").items()}


def counters(checkpoint: Path) -> dict[str, Any]:
    """Those of a checkpoint, without what differs from run to run: its id and settings."""
    found = json.loads((checkpoint / "training_state.json").read_text())
    return {name: value for name, value in found.items() if name not in ("run", "versions")}


def different_tensors(one: Path, other: Path) -> list[str]:
    """Names of the tensors in which two checkpoints differ, by one bit or more."""
    a, b = ({name: _bits(tensor) for name, tensor in tensors(folder).items()} for folder in (one, other))
    return sorted(name for name in {*a, *b} if a.get(name) != b.get(name))


def _bits(tensor) -> tuple[Any, ...]:
    import torch

    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def updates(folder: Path) -> list[tuple[int, float, float, float]]:
    """(update, loss, rate, gradient norm) of every record of an update, in the order of writing."""
    kept = [record for record in records(folder) if "loss" in record]
    return [(record["update_step"], record["loss"], record["lr"], record["grad_norm"]) for record in kept]


def evaluations(folder: Path) -> list[tuple[int, float]]:
    """(update, validation loss) of every evaluation, in the order of writing."""
    kept = [record for record in records(folder) if "final_eval_loss" in record]
    return [(record["update_step"], record["final_eval_loss"]) for record in kept]


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs ended alike, bit by bit, and recorded the same: each update and each evaluation once."""
    last = checkpoints(other)[-1]
    assert checkpoints(one)[-1] == last, checkpoints(one)
    assert (differing := different_tensors(one / f"model_{last}", other / f"model_{last}")) == [], differing
    assert counters(one / f"model_{last}") == counters(other / f"model_{last}"), counters(one / f"model_{last}")
    assert (recorded := [item[0] for item in updates(one)]) == list(range(1, last + 1)), recorded
    assert (unequal := [row for row in zip(updates(one), updates(other), strict=True) if row[0] != row[1]]) == [], (
        unequal
    )
    assert evaluations(one) == evaluations(other), (evaluations(one), evaluations(other))
    assert unfinished(one) == [], unfinished(one)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, whole."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flip_byte(path: Path, at: float = 0.5) -> None:
    """Change one bit, `at` of the way through a file."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 0x01
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@contextlib.contextmanager
def before_update(step: int, act: Callable[[], Any]) -> Iterator[None]:
    """Call `act` at the beginning of 0-based update `step`, once."""
    from peft_pretraining.training import loop as train

    train_step, done = train.train_step, []

    def wrapped(run, micro_batches, stop):
        if run.state.update_step == step and not done:
            done.append(True)
            act()
        return train_step(run, micro_batches, stop)

    train.train_step = wrapped
    try:
        yield
    finally:
        train.train_step = train_step
    assert done, f"there was no update {step}"


def signal_in_update(step: int, number: int = signal.SIGTERM):
    """A signal to this process within 0-based update `step`: the run stops with `step + 1` updates done."""
    return before_update(step, lambda: os.kill(os.getpid(), number))


@contextlib.contextmanager
def signal_before_evaluation(number: int) -> Iterator[None]:
    """SIGUSR1 to this process when it begins its `number`-th evaluation, which then does not take place."""
    from peft_pretraining.training import loop as train

    evaluate, begun = train.evaluate, []

    def wrapped(*args):
        begun.append(True)
        if len(begun) == number:
            signal.raise_signal(signal.SIGUSR1)
        return evaluate(*args)

    train.evaluate = wrapped
    try:
        yield
    finally:
        train.evaluate = evaluate
    assert len(begun) == number, f"{len(begun)} evaluations instead of {number}"


@contextlib.contextmanager
def spoil_weights(step: int, times: int = 1) -> Iterator[None]:
    """NaN in the first weight from the beginning of 0-based update `step` on, as a flipped bit may leave it.

    Each time that the run gets there, at most so many times.
    """
    import torch

    from peft_pretraining.distributed.sharding import local
    from peft_pretraining.training import loop as train

    train_step, left = train.train_step, [times]

    def wrapped(run, micro_batches, stop):
        if run.state.update_step == step and left[0]:
            left[0] -= 1
            with torch.no_grad():
                local(next(iter(run.model.parameters()))).fill_(float("nan"))
        return train_step(run, micro_batches, stop)

    train.train_step = wrapped
    try:
        yield
    finally:
        train.train_step = train_step
    assert left[0] < times, f"there was no update {step}"


def refreshes(checkpoint: Path) -> set[int]:
    """The update steps of the last refresh, over all projected weights."""
    return {int(value) for name, value in tensors(checkpoint).items() if name.endswith(".last_refresh")}


def poisoned_loss(loss, model):
    return loss * float("nan")


def poisoned_gradient(loss, model):
    """A finite loss whose gradient is not: the root's slope at 0 is infinite."""
    return loss + (next(model.parameters()).sum() * 0).sqrt()


@contextlib.contextmanager
def poison(monkeypatch, steps: set[int], poisoned=poisoned_loss, micro_batch: int = 1) -> Iterator[None]:
    """Let the 0-based updates `steps` be non-finite in their second micro-batch, or in the one that is named."""
    from peft_pretraining.training import loop as train

    train_step, loss_sum, now = train.train_step, train.token_loss_sum, []

    def watched_step(run, micro_batches, stop):
        now[:] = [run.state.update_step, 0]
        return train_step(run, micro_batches, stop)

    def poisoned_sum(model, batch):
        now[1] += 1
        loss = loss_sum(model, batch)
        return poisoned(loss, model) if now[0] in steps and now[1] == micro_batch + 1 else loss

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", watched_step)
        patch.setattr(train, "token_loss_sum", poisoned_sum)
        yield


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment, with threads that leave the cores to each other; a crash prints its stacks."""
    fixed = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    return {**os.environ, **fixed, "PYTHONFAULTHANDLER": "1", **changes}


def last_words(stderr: str, characters: int = 30_000) -> str:
    """The end of a log, from the crash of the first process on if one crashed: the others go on writing."""
    crash = stderr.find("Fatal Python error")
    if crash < 0:
        return stderr[-characters:]
    before = stderr[:crash].splitlines(keepends=True)[-20:]
    return "".join(before)[-(characters // 8) :] + stderr[crash : crash + characters]


def _run_cases(path: Path) -> None:
    """Under torchrun: the runs that a JSON file lists, and what each rank has at the end of each.

    A case is {"argv": [...]}. With "signal": [rank, update], one rank gets a SIGUSR1 within that update; with
    "evaluation_signal": [rank, number], as it begins that evaluation; with "poison": [rank, update], its loss in that
    update's first micro-batch is not finite; with "count", its "collectives" are counted; with "late", numbers are read
    one update late. Beside the file,
    `rank{N}.json` gets a list of {"exit_code", "digest", "state_digest", "state_bytes", "local_bytes",
    "unsynchronised"}, one per case: the SHA-256 of the weights and of this rank's optimizer state, the state's size,
    that of each of the model's tensors on this rank, and the number of backward passes without a reduction.
    """
    import hashlib

    import collectives
    import pytest
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from peft_pretraining.distributed.sharding import local
    from peft_pretraining.training import build, late_values
    from peft_pretraining.training.loop import state_bytes

    rank, results, train, no_sync = int(os.environ["RANK"]), [], build.train, DistributedDataParallel.no_sync

    def observed_train(run):
        code = train(run)
        params = list(run.model.parameters())
        # A sharded optimizer has no state of the other ranks' parameters.
        state = [tensor for param in params for tensor in run.optimizer.state.get(param, {}).values()]
        for name, tensors in (("digest", [param.detach() for param in params]), ("state_digest", state)):
            digest = hashlib.sha256()
            for tensor in tensors:
                whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                digest.update(whole.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            results[-1][name] = digest.hexdigest()
        results[-1]["state_bytes"] = state_bytes(run.optimizer)
        held = {name: local(tensor) for name, tensor in run.model.state_dict().items()}
        results[-1]["local_bytes"] = {name: part.numel() * part.element_size() for name, part in held.items()}
        return code

    def observed_no_sync(model):
        results[-1]["unsynchronised"] += 1
        return no_sync(model)

    build.train, DistributedDataParallel.no_sync = observed_train, observed_no_sync
    # One group for all runs: a second one would find the first one's addresses in torchrun's store.
    init, destroy = dist.init_process_group, dist.destroy_process_group
    dist.init_process_group = lambda *args, **settings: None if dist.is_initialized() else init(*args, **settings)
    dist.destroy_process_group = lambda: None
    for case in json.loads(path.read_text()):
        results.append({"unsynchronised": 0})
        late_values.ON_EVERY_DEVICE = case.get("late", False)
        with collectives.few_groups(destroy), contextlib.ExitStack() as stops:
            if case.get("signal", [None])[0] == rank:
                stops.enter_context(signal_in_update(case["signal"][1], signal.SIGUSR1))
            if case.get("evaluation_signal", [None])[0] == rank:
                stops.enter_context(signal_before_evaluation(case["evaluation_signal"][1]))
            if case.get("poison", [None])[0] == rank:
                stops.enter_context(poison(pytest.MonkeyPatch(), {case["poison"][1]}, micro_batch=0))
            if case.get("count"):
                stops.enter_context(collectives.counted(results[-1].setdefault("collectives", [])))
            results[-1]["exit_code"] = run(case["argv"])
            assert set(threads := collectives.gloo_threads()) == {1}, threads
    destroy()
    (path.parent / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    _run_cases(Path(sys.argv[1]))
