"""Initial weights are functions of (seed, name), whoever draws them, in however many threads and pieces."""

import threading

import pytest
import torch
from torch import nn

from peft_pretraining import rng
from peft_pretraining.models import initial_weights
from peft_pretraining.models.initial_weights import initialize
from peft_pretraining.runtime import threads
from peft_pretraining.runtime.threads import ahead, share_of_cores

SHAPES = {"a": (100, 7), "b": (1000, 33), "c": (333, 5), "d": (17, 3), "e": (2, 5), "f": (50, 1), "g": (64, 64)}
STD = 0.02


def drawn_at_once(name, shape):
    return torch.empty(shape).normal_(0.0, STD, generator=rng.generator(3, f"initial weights of {name}"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("number", [1, 2, 5])
def test_threads_and_pieces_change_no_bit(number, dtype, monkeypatch):
    monkeypatch.setattr(initial_weights, "_AT_ONCE", 64)
    monkeypatch.setattr(initial_weights, "WORTH_A_THREAD", 100)
    params = {name: nn.Parameter(torch.full(shape, torch.nan, dtype=dtype)) for name, shape in SHAPES.items()}
    params |= {"norm.weight": nn.Parameter(torch.zeros(3)), "b.bias": nn.Parameter(torch.ones(3))}
    initialize(params, STD, seed=3, threads=number)
    assert (params["norm.weight"] == 1).all() and (params["b.bias"] == 0).all()
    for name, shape in SHAPES.items():
        assert torch.equal(params[name], drawn_at_once(name, shape).to(dtype)), name


def test_weights_on_the_meta_device_are_left_alone(monkeypatch):
    monkeypatch.setattr(rng, "generator", lambda *_: pytest.fail("something was drawn"))
    initialize({"a": nn.Parameter(torch.empty(8, 8, device="meta"))}, STD, seed=0)


def test_results_come_in_order_and_few_wait():
    made, most, lock = [], 0, threading.Lock()

    def make(item):
        with lock:
            made.append(item)
        return item

    for place, item in enumerate(ahead(make, range(20), threads=3)):
        assert item == place
        most = max(most, len(made) - place)
    assert most <= 4  # three that wait, and the one that was taken


def test_torch_works_with_one_thread_in_each_and_as_before_elsewhere():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        inside = list(ahead(lambda _: (torch.get_num_threads(), torch.is_grad_enabled()), range(4), threads=2))
        assert inside == [(1, False)] * 4
        elsewhere = []
        other = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert [torch.get_num_threads(), *elsewhere] == [3, 3]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("number", [1, 2])
def test_an_error_is_raised_and_gradients_stay_on(number):
    found = ahead(lambda divisor: 1 // divisor, [1, 0, 1], number)
    assert next(found) == 1 and torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError):
        list(found)


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert share_of_cores() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert share_of_cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert share_of_cores() == 1


def test_a_system_without_threads_is_an_error_and_nothing_waits(monkeypatch):
    """Threads that have begun end, too."""
    begun, start = [], threading.Thread.start

    def refuse_the_second(thread):
        if begun:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_the_second)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        list(ahead(lambda number: number, range(4), threads=3))
    begun[0].join(timeout=20)
    assert not begun[0].is_alive()
