"""One process of torchrun's: it has a group, and is distributed as several are where its layout is asked for."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

import helpers
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from peft_pretraining.distributed import process_group
from peft_pretraining.distributed.process_group import ProcessGroup
from peft_pretraining.flags import ConfigError
from peft_pretraining.training import build

GALORE = {**helpers.GALORE, "num_training_steps": 8, "save_every": 4, "eval_every": 8}
METHODS = {
    "galore": GALORE,
    "switchlora": {"method": "switchlora", "rank": 8, "switch_lora_interval": 5, "adam_warm_step": 2},
    "golore_adapter": {"method": "golore_adapter", "rank": 4, "update_proj_gap": 4, "rand_ratio": 0.5},
    "adam_zero": {"optimizer": "adam_zero"},
}
FSDP = {"distributed_type": "fsdp"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def torchrun(monkeypatch):
    """The environment of torchrun's only process."""
    numbers = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": free_port()}
    for name, value in {**numbers, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    yield
    assert not dist.is_initialized(), "a run leaves the group that it made"


@pytest.fixture
def models(monkeypatch):
    """The modules that are trained, of all runs."""
    seen, train = [], build.train

    def observed(run):
        seen.append(run.parallel_model)
        assert dist.is_initialized() != run.config.run.single_gpu
        return train(run)

    monkeypatch.setattr(build, "train", observed)
    return seen


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return helpers.Undisturbed(tmp_path_factory)


@pytest.mark.parametrize(
    "layout, kind",
    [({}, None), ({"distributed_type": "ddp"}, DistributedDataParallel), (FSDP, FSDPModule)],
    ids=["unasked", "ddp", "fsdp"],
)
@pytest.mark.parametrize("method", METHODS)
def test_one_process_with_a_group_trains_as_one_without(
    command, undisturbed, request, tmp_path, device, method, layout, kind
):
    flags = {"num_training_steps": 8, "eval_every": 8, **METHODS[method]}
    alone = undisturbed(command, **flags)
    request.getfixturevalue("torchrun")
    models = request.getfixturevalue("models")
    assert helpers.run(command(**flags, **layout)) == 0
    assert isinstance(models[0], kind) if kind else not isinstance(models[0], DistributedDataParallel | FSDPModule)
    helpers.assert_same_run(tmp_path / "run", alone)


def test_projected_gradients_are_reduced_and_weights_divided(command, torchrun, tmp_path, device, monkeypatch):
    """What several processes do is done by one: the hook reduces R, states are parts of a mesh's."""
    shapes, real = [], dist.all_reduce

    def seen(tensor, *args, **settings):
        shapes.append(tensor.numel())
        return real(tensor, *args, **settings)

    states = []

    def observed(run):
        states[:] = [type(value).__name__ for state in run.optimizer.state.values() for value in state.values()]
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(dist, "all_reduce", seen)
        assert helpers.run(command(**GALORE, distributed_type="ddp")) == 0
    whole = sum(
        tensor.numel()
        for name, tensor in helpers.tensors(tmp_path / "run" / "model_8").items()
        if name.startswith("model.")
    )
    buckets = [count for count in shapes if count > 100]
    assert min(buckets) < whole / 2 and max(buckets) <= whole, (shapes, whole)
    monkeypatch.setattr(build, "train", observed)
    assert helpers.run(command(**GALORE, **FSDP, save_dir=tmp_path / "divided", replicas=1)) == 0
    assert "DTensor" in states


@pytest.mark.parametrize("layout", [FSDP, {"distributed_type": "ddp"}], ids=["fsdp", "ddp"])
@pytest.mark.parametrize("grouped_first", [True, False])
def test_a_run_goes_on_with_a_group_or_without(command, undisturbed, request, tmp_path, device, layout, grouped_first):
    whole = undisturbed(command, **GALORE)
    parts = [{**layout, "async_save": True}, {"single_gpu": True}]
    request.getfixturevalue("torchrun")
    models = request.getfixturevalue("models")
    for number, part in enumerate(parts if grouped_first else parts[::-1]):
        argv = command(**GALORE, **part)
        if number == 0:
            helpers.stop_after(3, argv)
        else:
            assert helpers.run([*argv, *helpers.RESUME]) == 0
    assert [isinstance(model, DistributedDataParallel | FSDPModule) for model in models] == [
        grouped_first,
        not grouped_first,
    ]
    helpers.assert_same_run(tmp_path / "run", whole)


def test_time_limits(torchrun):
    group = ProcessGroup.start(of_one=True)
    try:
        limits = [each._get_backend(torch.device("cpu")).options._timeout for each in (dist.group.WORLD, group.files)]
        assert limits == [process_group.COLLECTIVE_TIMEOUT, process_group.HOST_TIMEOUT]
        assert limits[0] < limits[1]
        assert group.from_main({"step": 3}) == {"step": 3} and group.is_collective
    finally:
        group.stop()


def test_a_port_that_is_taken_is_said_at_once(torchrun, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(ConfigError) as raised:
            ProcessGroup.start()
    (problem,) = raised.value.problems
    assert problem.startswith(f"the processes cannot meet at MASTER_ADDR:MASTER_PORT 127.0.0.1:{port}: ")
    assert "\n" not in problem


def test_an_environment_that_cannot_be_torchruns(torchrun, command, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert helpers.run(command()) == 2
    assert "RANK 1 must be below WORLD_SIZE 1" in capsys.readouterr().err
    monkeypatch.delenv("MASTER_ADDR")  # not torchrun's: a plain process
    group = ProcessGroup.start(of_one=True)
    assert not group.made and not group.is_collective and group.rank == 0


def test_a_device_that_cannot_be_used_is_said_in_one_line(monkeypatch):
    def busy(device):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with ...\n")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(ConfigError) as raised:
        ProcessGroup.start()
    (problem,) = raised.value.problems
    assert problem.startswith("cuda:0 cannot be used: CUDA error: all CUDA-capable devices are busy or unavailable (")


def test_too_little_memory_is_one_line(command, monkeypatch, capsys):
    def full(run):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB of which "
            "1.2 GiB is free. Of the allocated memory 21 GiB is allocated by PyTorch. If reserved but unallocated ..."
        )

    monkeypatch.setattr(build, "train", full)
    assert helpers.run(command()) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "ERROR" in line or "Traceback" in line]
    assert len(errors) == 1 and "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has" in errors[0]
    assert errors[0].endswith(
        "1.2 GiB is free. python -m peft_pretraining.report.plan with the same flags says what fits"
    )


def test_a_main_process_may_read_its_files_for_longer_than_a_collective_may_take(torchrun, monkeypatch):
    """Two processes, with a limit of half a second: what comes from the main process's files is waited for."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    if (child := os.fork()) == 0:
        try:
            group = _impatient(0, monkeypatch)
            time.sleep(1.2)
            group.from_main("read")
            time.sleep(1.2)
            os._exit(0)
        finally:
            os._exit(1)
    group = _impatient(1, monkeypatch)
    try:
        assert group.from_main(None) == "read"
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            group.all_reduce_sum(torch.ones(1))
    finally:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        group.stop()


def _impatient(rank: int, monkeypatch) -> ProcessGroup:
    monkeypatch.setenv("RANK", str(rank))
    group = ProcessGroup.start()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.5), dist.group.WORLD)
    return group
