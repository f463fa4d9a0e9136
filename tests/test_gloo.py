"""Every gloo group has one thread. That two of them crash shows only now and then: gloo_threads.py.

The groups of runs on several ranks are looked at where these are made, by `helpers._run_cases`.
"""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from collectives import gloo_threads
from helpers import last_words

from peft_pretraining.distributed.gloo import one_thread_per_group


@pytest.fixture(params=[None, "lo", "lo,lo"])
def group(request, monkeypatch):
    if request.param is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    else:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", request.param)
    with one_thread_per_group():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=70))
        dist.new_group(backend="gloo")
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_groups_have_one_thread_and_are_otherwise_torchs(group):
    assert gloo_threads() == [1, 1]
    assert dist.get_backend() == "gloo"
    assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=70)
    tensor, gathered = torch.arange(3.0), torch.empty(3)
    dist.all_reduce(tensor)
    works = [group.allgather_into_tensor_coalesced([gathered], [tensor]) for _ in range(200)]
    for work in works:
        work.wait()
    assert gathered.tolist() == [0, 1, 2]


def test_others_make_their_groups_as_ever():
    with one_thread_per_group():
        pass
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert gloo_threads() == [2]
    finally:
        dist.destroy_process_group()


def test_torchs_class_is_back_after_an_error():
    original = dist.distributed_c10d.ProcessGroupGloo
    with pytest.raises(KeyError), one_thread_per_group():
        assert dist.distributed_c10d.ProcessGroupGloo is not original
        raise KeyError
    assert dist.distributed_c10d.ProcessGroupGloo is original


def test_a_crashs_stacks_are_shown_wherever_they_are_in_the_log():
    log = "began\n" * 90 + "Fatal Python error: Segmentation fault\nstacks\n" + "the launcher\n" * 90
    assert last_words(log, 50).startswith("began\nFatal Python error: Segmentation fault\nstacks\n")
    assert last_words("began\n" * 90 + "end", 9) == "began\nend"
