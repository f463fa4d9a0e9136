"""Learning-rate schedules against their formulas, written down once more, over whole runs."""

from __future__ import annotations

from math import cos, floor, pi

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_pretraining.config import SCHEDULERS, ScheduleConfig, schedule_problems
from peft_pretraining.config.schedule import rate_multiplier


def linear(t, w, T, **_):
    return t / w if t < w else max(0, (T - t) / (T - w))


def constant(t, w, **_):
    return t / w if t < w else 1


def cosine_with_min_lr(t, w, T, **_):
    return t / w if t < w else max(0.1, (1 + cos(pi * (t - w) / (T - w))) / 2)


def cosine(t, w, c, f, **_):
    u = t - c * floor(t / c)
    if u < w and t >= c and u < 2:
        return 1e-7
    return u / w if u < w else f + (1 - f) * (1 + cos(pi * (u - w) / (c - w))) / 2


def cosine_restarts(t, w, T, c, f, q, a):
    if t < w:
        return t / w
    s = t + a
    k = floor(s / c)
    i = s - k * c
    if i < q and t >= c:
        return i / q * (f + (1 - f) * (1 + cos(pi * (k * c + q - w) / (T - w))) / 2)
    return f + (1 - f) * (1 + cos(pi * (s - w) / (T - w))) / 2


def wsd(t, w, T, f, d, shape, **_):
    if t < w:
        return t / w
    x = max(0, t - (T - d)) / d if d else 0
    return f + (1 - f) * (1 - x) if shape == "linear" else f + (1 - f) * (1 - x**0.5)


FORMULAS = {
    **{"linear": linear, "constant": constant, "cosine": cosine},
    **{"cosine_restarts": cosine_restarts, "cosine_with_min_lr": cosine_with_min_lr, "wsd": wsd},
}


def schedule(scheduler, *, w=0, c=None, f=0.1, q=0, a=0, d=None, shape="1-sqrt"):
    return ScheduleConfig(
        **{"scheduler": scheduler, "warmup_steps": w, "cycle_length": c, "min_lr_ratio": f},
        **{"restart_warmup_steps": q, "adjust_step": a, "decay_steps": d, "decay_shape": shape},
    )


def whole_run(config, T, extra=0):
    return [rate_multiplier(t, config, T) for t in range(T + extra)]


def expected_run(scheduler, T, *, w=0, c=None, f=0.1, q=0, a=0, d=None, shape="1-sqrt"):
    formula, d = FORMULAS[scheduler], {"d": round(0.2 * T) if d is None else d, "shape": shape}
    return [
        formula(t, w=w, T=T, c=c or T, f=f, **({"q": q, "a": a} if formula is cosine_restarts else d)) for t in range(T)
    ]


def test_every_schedule_has_a_formula_here():
    assert set(FORMULAS) == set(SCHEDULERS)


@st.composite
def valid_schedules(draw):
    """A schedule's name, its T and its other numbers, all within what the checks allow."""
    scheduler = draw(st.sampled_from(SCHEDULERS))
    c = draw(st.integers(1, 40))
    cycles = draw(st.integers(1, 5))
    numbers = {"c": None if cycles == 1 and draw(st.booleans()) else c, "f": draw(st.floats(0, 0.99))}
    if scheduler == "cosine_restarts":
        numbers["w"] = draw(st.integers(0, c))
        numbers["a"] = draw(st.integers(0, c - numbers["w"]))
        numbers["q"] = draw(st.integers(0, c))
    elif scheduler == "cosine":
        numbers["w"] = draw(st.integers(0, c))
    elif scheduler == "wsd":
        numbers["d"] = draw(st.integers(1, c * cycles))
        numbers["w"] = draw(st.integers(0, c * cycles - numbers["d"]))
        numbers["shape"] = draw(st.sampled_from(("linear", "1-sqrt")))
    else:
        numbers["w"] = draw(st.integers(0, c * cycles))
    return scheduler, c * cycles, numbers


@settings(max_examples=400, deadline=None, derandomize=True)
@given(valid_schedules())
def test_every_schedule_follows_its_formula(drawn):
    scheduler, T, numbers = drawn
    config = schedule(scheduler, **numbers)
    assert schedule_problems(config, T) == []
    run = whole_run(config, T)
    assert run == pytest.approx(expected_run(scheduler, T, **numbers), rel=1e-12, abs=1e-15)
    assert all(0 <= multiplier <= 1 for multiplier in run)


PUBLISHED = [
    ("cosine", 10_000, {"w": 1000, "f": 0.1}),  # GaLore, GoLore and Online Subspace Descent
    ("cosine", 10_000, {"w": 1000, "f": 0, "c": 10_000}),
    ("cosine", 6000, {"w": 500, "f": 0.1, "c": 1000}),
    ("cosine", 40_002, {"w": 100, "f": 0}),  # SwitchLoRA
    ("cosine_with_min_lr", 40_000, {"w": 100}),
    ("cosine_restarts", 20_000, {"w": 500, "c": 5000, "q": 100, "f": 0.1}),  # ReLoRA
    ("cosine_restarts", 19_000, {"w": 500, "c": 1000, "q": 100, "a": 250, "f": 0}),
    ("linear", 15_000, {"w": 1500}),
    ("linear", 500, {"w": 0}),
    ("constant", 500, {"w": 20}),
    ("constant", 500, {"w": 0}),
    ("wsd", 10_000, {"w": 1000, "f": 0, "d": 2000}),
    ("wsd", 10_000, {"w": 1000, "f": 0}),
]


@pytest.mark.parametrize(("scheduler", "T", "numbers"), PUBLISHED)
def test_settings_of_the_papers_over_the_whole_run(scheduler, T, numbers):
    config = schedule(scheduler, **numbers)
    assert whole_run(config, T) == pytest.approx(expected_run(scheduler, T, **numbers), rel=1e-12, abs=1e-15)


# (1 + cos(n pi / 8)) / 2 by n, from a table of cosines.
EIGHTHS = (1, 0.9619397662556434, 0.8535533905932737, 0.6913417161825449, 0.5, 0.3086582838174551, 0.14644660940672627,
           0.03806023374435663, 0)  # fmt: skip
BY_HAND = [
    ("linear", 6, {"w": 2}, [0, 1 / 2, 1, 3 / 4, 1 / 2, 1 / 4]),
    ("linear", 4, {"w": 4}, [0, 1 / 4, 1 / 2, 3 / 4]),
    ("constant", 4, {"w": 2}, [0, 1 / 2, 1, 1]),
    ("cosine", 8, {"w": 0, "f": 0}, EIGHTHS[:8]),
    ("wsd", 9, {"w": 2, "d": 4, "f": 0, "shape": "linear"}, [0, 1 / 2, 1, 1, 1, 1, 3 / 4, 1 / 2, 1 / 4]),
    ("wsd", 7, {"w": 1, "d": 4, "f": 0.2}, [0, 1, 1, 1, 0.6, 1 - 0.8 * 0.5**0.5, 1 - 0.8 * 0.75**0.5]),
    ("cosine", 4, {"w": 2, "f": 0.2}, [0, 1 / 2, 1, 0.6]),
    ("cosine", 8, {"w": 3, "c": 4, "f": 0}, [0, 1 / 3, 2 / 3, 1, 1e-7, 1e-7, 2 / 3, 1]),
    ("cosine", 4, {"w": 1, "c": 2}, [0, 1, 1e-7, 1]),  # the second update of a cycle is past this warm-up
    ("cosine", 4, {"w": 0, "c": 2}, [1, 0.55, 1, 0.55]),
    ("cosine_with_min_lr", 8, {"w": 0, "f": 0}, [*EIGHTHS[:7], 0.1]),  # its floor is fixed
    # The restart warms up, in two updates, towards where the cosine of the whole run then is.
    ("cosine_restarts", 8, {"w": 0, "c": 4, "q": 2, "f": 0}, [*EIGHTHS[:4], 0, EIGHTHS[6] / 2, *EIGHTHS[6:8]]),
    # The same three updates earlier; but the first cycle has no restart, though one of its updates would be due.
    (
        *("cosine_restarts", 8, {"w": 0, "c": 4, "q": 2, "a": 3, "f": 0}),
        [*EIGHTHS[3:8], 0, EIGHTHS[6] / 2, EIGHTHS[6]],
    ),
]


@pytest.mark.parametrize(("scheduler", "T", "numbers", "expected"), BY_HAND)
def test_worked_by_hand(scheduler, T, numbers, expected):
    assert whole_run(schedule(scheduler, **numbers), T) == pytest.approx(list(expected), abs=1e-15)


def test_later_cycles_do_not_begin_at_zero():
    """A rate of 0 right after ReLoRA's optimizer reset would be divided by."""
    run = whole_run(schedule("cosine", w=5, c=20), 60)
    assert run[:3] == [0, 1 / 5, 2 / 5]
    assert run[20:23] == run[40:43] == [1e-7, 1e-7, 2 / 5]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_extra_updates_run_at_the_rate_of_the_last_one(scheduler):
    run = whole_run(schedule(scheduler, w=3, c=10, q=2, f=0.2), 20, extra=15)
    assert run[20:] == [run[19]] * 15
    assert run[19] > 0


@pytest.mark.parametrize(("scheduler", "lowest"), [("cosine", 0.3), ("cosine_restarts", 0.3), ("linear", 0.0)])
def test_the_lowest_rate_is_approached_at_the_end(scheduler, lowest):
    run = whole_run(schedule(scheduler, w=10, f=0.3), 1000)
    assert lowest < run[-1] < lowest + 0.002
    assert min(run[10:]) == run[-1]


def problems(scheduler, T, **numbers):
    return schedule_problems(schedule(scheduler, **numbers), T)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_cyclic_schedules_need_whole_cycles(scheduler):
    if scheduler in ("cosine", "cosine_restarts"):
        assert problems(scheduler, 25, c=10) == ["--num_training_steps 25 must be a multiple of --cycle_length 10"]
        assert problems(scheduler, 5, c=10) == ["--num_training_steps 5 must be a multiple of --cycle_length 10"]
    else:
        assert problems(scheduler, 25, c=10) == []
    assert problems(scheduler, 30, c=10) == []


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_warmup_lies_within_the_cycle_or_the_run(scheduler):
    decay = 4 if scheduler == "wsd" else 0
    assert problems(scheduler, 20, w=20 - decay) == []
    assert problems(scheduler, 20, w=21)[0] == "--warmup_steps 21 must not exceed --num_training_steps 20"
    within_cycle = problems(scheduler, 20, w=11, c=10)
    if scheduler in ("cosine", "cosine_restarts"):
        assert within_cycle[0] == "--warmup_steps 11 must not exceed --cycle_length 10"
    else:
        assert within_cycle == []


def test_adjusted_restarts_leave_room_for_the_warmup():
    assert problems("cosine_restarts", 20, w=4, a=6, c=10) == []
    found = ["--adjust_step 7 + --warmup_steps 4 must not exceed the cycle of 10"]
    assert problems("cosine_restarts", 20, w=4, a=7, c=10) == found
    assert problems("cosine", 20, w=4, a=7, c=10) == []  # it has no such setting


def test_all_problems_of_a_schedule_are_found():
    assert len(problems("cosine_restarts", 25, w=11, a=1, c=10)) == 3
