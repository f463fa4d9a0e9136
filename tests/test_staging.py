"""Copies of what a checkpoint holds: pinned memory that is kept, and what happens where it cannot be had."""

import pytest
import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from peft_pretraining.checkpoint import staging
from peft_pretraining.checkpoint.staging import HostCopies

PLAIN = StagingOptions(False, False, False, False)


@pytest.fixture
def on_device(monkeypatch):
    """Tensors of two dimensions count as a device's; what they are copied to is not pinned here."""
    made = []

    def pinned():
        made.append(DefaultStager(PLAIN))
        return made[-1]

    monkeypatch.setattr(staging, "_on_device", lambda tensor: tensor.ndim == 2)
    monkeypatch.setattr(staging, "_pinned", pinned)
    return made


def tree():
    weight, host = torch.arange(6.0).reshape(2, 3), torch.ones(4)
    return {
        "tensors": {"model": {"w": weight, "row": weight[1:], "host": host}, "step": 3},
        "exported": {"w": weight, "again": weight},
    }


def assert_copied(copies, original):
    tensors, expected = copies["tensors"], original["tensors"]
    assert tensors["step"] == 3 and copies["exported"]["w"] is copies["exported"]["again"] is tensors["model"]["w"]
    for name, tensor in expected["model"].items():
        assert torch.equal(tensors["model"][name], tensor)
        assert tensors["model"][name].untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    one, part = (tensors["model"][name].untyped_storage().data_ptr() for name in ("w", "row"))
    assert one == part


def test_memory_for_a_devices_tensors_is_kept_and_shared_as_theirs(on_device):
    copies, original = HostCopies(), tree()
    first = copies.copy(original)
    assert_copied(first, original)
    original["tensors"]["model"]["w"].add_(1)
    original["tensors"]["model"]["host"].add_(1)
    second = copies.copy(original)
    assert_copied(second, original)
    places = [{name: copy["tensors"]["model"][name].data_ptr() for name in ("w", "host")} for copy in (first, second)]
    assert places[0]["w"] == places[1]["w"] and places[0]["host"] != places[1]["host"]
    assert len(on_device) == 1


def test_what_has_gone_is_not_kept(on_device):
    copies = HostCopies()
    copies.copy(tree())
    assert len(on_device[0]._state_dict_stager._cached_storage_mapping) == 0


@pytest.mark.parametrize("why", ["too much", "refused"])
def test_without_pinned_memory_it_is_pageable_and_that_is_said_once(on_device, monkeypatch, caplog, why):
    copies, original = HostCopies(processes=8), tree()
    if why == "too much":
        monkeypatch.setattr(staging, "_machine_memory", lambda: 2 * 8 * 24 - 1)  # eight processes with 24 bytes each
    else:
        monkeypatch.setattr(DefaultStager, "stage", refuse_first(DefaultStager.stage))
    logger = staging.log
    monkeypatch.setattr(logger, "propagate", True)
    for _ in range(2):
        assert_copied(copies.copy(original), original)
    said = [message for message in caplog.messages if "--async_save copies to memory that is not pinned" in message]
    assert len(said) == 1


def refuse_first(stage):
    calls = []

    def staged(self, tensors):
        calls.append(self)
        if len(calls) == 1:
            raise RuntimeError("Registering memory failed with cudaError: 2.\nand more")
        return stage(self, tensors)

    return staged


def test_without_a_device_nothing_is_pinned(monkeypatch):
    monkeypatch.setattr(staging, "_pinned", lambda: pytest.fail("asked for pinned memory"))
    original = tree()
    assert_copied(HostCopies().copy(original), original)
