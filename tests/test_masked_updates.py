"""Updates that nobody knows yet whether they take place: masked, they leave what a decision by the host leaves."""

import pytest
import torch
from torch import nn

from peft_pretraining.optim import Direction, LowRankOptimizer, UpdateRule
from peft_pretraining.optim.tensors import launching
from peft_pretraining.optim.tensors import mask as masking
from peft_pretraining.optim.tensors.mask import Mask

SHAPES = ((6, 4), (6, 4), (4, 7), (6, 4), (70, 64), (5,), (5,), ())
"""Of the parameters; the first five are projected where there is a basis, and the fifth is large enough for 8 bits."""
RULES = {
    "adamw": {"rule": "adamw"},
    "torch_adamw": {"rule": "torch_adamw"},
    "adamw8bit": {"rule": "adamw8bit"},
    "adafactor": {"rule": "adafactor"},
    "adafactor, beta1": {"rule": "adafactor", "beta1": 0.9},
    "lion": {"rule": "lion"},
    "sgd": {"rule": "sgd"},
    "sgd, momentum": {"rule": "sgd", "momentum": 0.9, "dampening": 0.9},
}
OSD = ("continuous", "continuous_adam8bit", "continuous_lion", "continuous_adafactor", "continuous_sgd")
BASES = {
    "no basis": {"rank": None},
    "SVD": {"rank": 3, "update_proj_gap": 4},
    **{kind: {"rank": 3, "update_proj_gap": 4, "proj_type": kind} for kind in OSD},
}
CASES = [
    *[(rule, basis) for rule in RULES for basis in ("no basis", "SVD") if (rule, basis) != ("torch_adamw", "SVD")],
    *[("adamw", kind) for kind in OSD],
    *[(rule, "continuous") for rule in RULES if rule not in ("adamw", "torch_adamw")],
]
BIT_EQUAL = ("adamw", "torch_adamw", "adamw8bit", "lion", "sgd", "sgd, momentum")
"""Rules without sums over a matrix: stacked, they have the same bits."""


def build(rule, basis, dtype=torch.float64, **settings):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]
    groups = [{"params": params[:5], **BASES[basis]}, {"params": params[5:]}]
    if basis == "no basis":
        groups = [{"params": params}]
    return LowRankOptimizer(groups, lr=0.05, **{"weight_decay": 0.1, **RULES[rule], **settings}), params


class Loop:
    """As a training loop: it reads the flag before it steps, or leaves it to the optimizer and learns of it late."""

    def __init__(self, optimizer, params, masked):
        self.optimizer, self.params, self.masked = optimizer, params, masked
        self.skipped = None
        if masked:
            optimizer.reads_found_inf = False

    def update(self, step, broken):
        optimizer = self.optimizer
        optimizer.begin_update(step)
        generator = torch.Generator().manual_seed(step)
        for param in self.params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        if broken is not None:
            for index in range(step % 3, len(self.params), 3):
                self.params[index].grad.view(-1)[-1] = broken
        norm = optimizer.grad_norm()
        optimizer.scale_((1 / (norm + 1e-6)).clamp(max=1.0))
        finite = bool(norm.isfinite())
        assert finite == (broken is None)
        if self.masked:
            self.settle()
            optimizer.found_inf = torch.tensor(float(not finite))
            optimizer.step()
            self.skipped = not finite
        elif finite:
            optimizer.step()
        optimizer.zero_grad()

    def settle(self):
        if self.skipped is not None:
            self.optimizer.settle(self.skipped)
            self.skipped = None


def pattern(seed, updates):
    """NaN or an infinity in about every third update."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(9, (updates,), generator=generator).tolist()
    return [{0: torch.nan, 1: torch.inf, 2: -torch.inf}.get(each) for each in drawn]


def state_of(optimizer):
    return {
        (index, key): value.clone()
        for index, param in enumerate(param for group in optimizer.param_groups for param in group["params"])
        for key, value in optimizer.state[param].items()
    }


def assert_same(one, other, exact):
    """Weights, states, counters."""
    for first, second in zip(one.params, other.params, strict=True):
        compare(first, second, exact)
    states = [state_of(each.optimizer) for each in (one, other)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert value.dtype == states[1][key].dtype
        compare(value, states[1][key], exact or not value.is_floating_point())


def compare(one, other, exact):
    if exact:
        assert torch.equal(one, other)
    else:
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rule", "basis"), CASES)
def test_a_masked_update_is_the_one_that_the_host_decides_on(rule, basis, seed):
    """Updates that take place and others, mixed, refreshes among them: stacked formulas come to what single ones do."""
    exact = rule in BIT_EQUAL and basis in ("no basis", "SVD")
    loops = [Loop(*build(rule, basis), masked) for masked in (False, True)]
    for step, broken in enumerate(pattern(seed, 12)):
        for loop in loops:
            loop.update(step, broken)
        loops[1].settle()
        assert_same(*loops, exact)
    assert any(pattern(seed, 12)) and not all(pattern(seed, 12))


OTHER_DTYPES = [(rule, dtype) for rule in BIT_EQUAL for dtype in (torch.float32, torch.bfloat16)]
OTHER_DTYPES.remove(("sgd, momentum", torch.bfloat16))  # torch rounds the last numbers of a tensor in another way


@pytest.mark.parametrize(("rule", "dtype"), OTHER_DTYPES)
def test_masks_have_the_bits_of_the_host_in_other_dtypes(rule, dtype):
    """Without decay in 16 bits, which a mask rounds in another way."""
    settings = {"weight_decay": 0.0} if dtype == torch.bfloat16 else {}
    loops = [Loop(*build(rule, "no basis", dtype, **settings), masked) for masked in (False, True)]
    for step, broken in enumerate(pattern(1, 8)):
        for loop in loops:
            loop.update(step, broken)
    loops[1].settle()
    assert_same(*loops, exact=True)


FORMATS = {
    "published": {},
    "float32": {"state_format": "float32"},
    "weight": {"state_format": "weight", "betas": (0.9, 0.99)},
    "stochastic": {"rounding": "stochastic"},
}


def trained(rule, basis, dtype, settings):
    optimizer, params = build(rule, basis, dtype)
    groups = [{**group, **settings} for group in optimizer.param_groups]
    optimizer = LowRankOptimizer([{key: group[key] for key in group if key != "first_lr"} for group in groups])
    loop = Loop(optimizer, params, masked=False)
    for step in range(5):
        loop.update(step, broken=None)
    return loop


TOGETHER = [
    *[(rule, basis, kept) for rule in BIT_EQUAL for basis in ("no basis", "SVD") for kept in FORMATS
      if (rule, basis) in CASES and rule not in ("adamw8bit", "sgd, momentum")],
    *[(rule, basis, "published") for rule, basis in CASES],
]  # fmt: skip
"""In 16 bits, torch rounds the last numbers of a momentum of SGD in another way."""


@pytest.mark.parametrize(("rule", "basis", "kept"), dict.fromkeys(TOGETHER))
def test_what_devices_compute_together_is_what_the_cpu_computes_one_by_one(monkeypatch, rule, basis, kept):
    """Stacks, lots and their rounding: the same bits, but for sums over a matrix."""
    exact, loops = rule in BIT_EQUAL and basis in ("no basis", "SVD"), []
    for together in (False, True):
        monkeypatch.setattr(launching, "ON_EVERY_DEVICE", together)
        dtype = torch.float64 if kept == "published" else torch.bfloat16
        loops.append(trained(rule, basis, dtype, FORMATS[kept]))
    assert_same(*loops, exact)


@pytest.mark.parametrize("settings", [{"state_format": "float32"}, {"state_format": "weight", "betas": (0.9, 0.99)},
                                      {"rounding": "stochastic"}])  # fmt: skip
@pytest.mark.parametrize("basis", ["no basis", "SVD"])
@pytest.mark.parametrize("rule", ["adamw", "torch_adamw", "lion"])
def test_masks_leave_rounded_weights_alone(rule, basis, settings):
    if rule == "torch_adamw" and basis != "no basis":
        pytest.skip("goes without a basis")
    loops = []
    for masked in (False, True):
        optimizer, params = build(rule, basis, torch.bfloat16)
        groups = [{**group, **settings} for group in optimizer.param_groups]
        optimizer = LowRankOptimizer([{key: group[key] for key in group if key != "first_lr"} for group in groups])
        loops.append(Loop(optimizer, params, masked))
    for step, broken in enumerate(pattern(2, 8)):
        for loop in loops:
            loop.update(step, broken)
    loops[1].settle()
    assert_same(*loops, exact=True)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "torch_adamw"])
def test_every_parameter_may_have_a_mask_of_its_own(rule):
    """As updates inside the backward pass need it: some move, and the others stay as they are."""
    (masked, params), (plain, others) = build(rule, "no basis"), build(rule, "no basis")
    generator = torch.Generator().manual_seed(3)
    for step in range(3):
        grads = [torch.randn(param.shape, generator=generator, dtype=torch.float64) for param in params]
        left_out = [(index + step) % 3 == 0 for index in range(len(params))]
        masks = [Mask(torch.tensor(float(each))) for each in left_out]
        broken = [grad * torch.nan if each else grad.clone() for grad, each in zip(grads, left_out, strict=True)]
        for optimizer in (masked, plain):
            optimizer.begin_update(step)
        for param, grad, mask in zip(params, broken, masks, strict=True):
            masked.update_together([(param, grad, masked.group_of(param), None)], mask)
        for mask, each in zip(masks, left_out, strict=True):
            mask.settle(each)
        moving = zip(others, grads, left_out, strict=True)
        plain.update_together([(p, g, plain.group_of(p), None) for p, g, each in moving if not each])
        for one, other in zip(params, others, strict=True):
            compare(one, other, exact=False)
            assert int(masked.state[one]["step"]) == int(plain.state[other]["step"])


def test_a_step_without_settling_reads_the_flag_itself():
    """And so do a saved state and, where parameters count their own updates, whatever asks for the count."""
    for ask in (lambda optimizer: optimizer.state_dict(), lambda optimizer: optimizer.step()):
        optimizer, params = build("adamw", "no basis")
        optimizer.reads_found_inf = False
        optimizer.begin_update(0)
        for param in params:
            param.grad = torch.full_like(param, torch.nan)
        optimizer.found_inf = torch.ones(())
        before = [param.detach().clone() for param in params]
        optimizer.step()
        assert int(optimizer.state[params[0]]["step"]) == 1
        optimizer.zero_grad()
        ask(optimizer)
        assert int(optimizer.state[params[0]]["step"]) == 0
        assert all(map(torch.equal, before, params))


class Unaware(UpdateRule):
    """Says nothing of masks."""

    def directions(self, updates, group):
        assert not any(update.mask for update in updates)
        return [Direction(update.low_rank_grad, update.rate) for update in updates]


def test_a_rule_that_says_nothing_is_asked_only_for_updates_that_take_place():
    params = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))]
    optimizer = LowRankOptimizer([{"params": params[:1], "rule": Unaware()}, {"params": params[1:]}], lr=0.5)
    optimizer.reads_found_inf = False
    for step, left_out in enumerate((True, False)):
        optimizer.begin_update(step)
        for param in params:
            param.grad = torch.full_like(param, torch.nan if left_out else 1.0)
        optimizer.found_inf = torch.tensor(float(left_out))
        optimizer.step()
        optimizer.settle(left_out)
        assert torch.equal(params[0], torch.full((3, 2), 1.0 if left_out else 0.5))


def test_large_states_are_guarded_one_by_one(monkeypatch):
    monkeypatch.setattr(masking, "_LARGE", 4000)
    loops = [Loop(*build("adamw8bit", "no basis"), masked) for masked in (False, True)]
    for step, broken in enumerate(pattern(1, 8)):
        for loop in loops:
            loop.update(step, broken)
    loops[1].settle()
    assert_same(*loops, exact=True)
