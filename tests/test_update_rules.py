"""Each update rule against its published formula, against other implementations, and in size and number formats."""

import math

import bitsandbytes
import pytest
import torch
from projection_helpers import RULES, build, matrix, parameter, set_gradients, train
from transformers.optimization import Adafactor

from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.basis.bases import PROJECTION_TYPES
from peft_pretraining.optim.rules.update_rules import AdamW, AdamW8bit
from peft_pretraining.optim.tensors.projection import LEFT, RIGHT, SIDES

CONTINUOUS = ["continuous", "continuous_adam8bit", "continuous_adafactor"]
PROJECTIONS = [None, "std", "reverse_std", "full", "random", *CONTINUOUS]

rules = pytest.mark.parametrize("name", RULES)


def alongside(ours, theirs, params, steps=6, before=lambda step: None):
    """Both optimizers on the same gradients; ours has the even parameters, theirs the odd ones."""
    for step in range(steps):
        set_gradients(params[::2], step)
        for mine, other in zip(params[::2], params[1::2], strict=True):
            other.grad = mine.grad.clone()
        before(step)
        ours.step()
        theirs.step()
    return list(zip(params[::2], params[1::2], strict=True))


def pairs(*shapes, dtype=torch.float64):
    return [parameter(shape, seed, dtype) for seed, shape in enumerate(shapes) for _ in range(2)]


def test_adamw_is_torchs_with_rescaled_epsilon():
    """ε before the bias correction is torch's ε / √(1 - β2^k). Decay is decoupled in both, but comes after."""
    params = pairs((4, 3), (5,))
    ours = LowRankOptimizer(params[::2], lr=0.01, eps=1e-3, betas=(0.8, 0.95))
    theirs = torch.optim.AdamW(params[1::2], lr=0.01, betas=(0.8, 0.95), weight_decay=0.0)

    def rescale(step):
        theirs.param_groups[0]["eps"] = 1e-3 / math.sqrt(1 - 0.95 ** (step + 1))

    for mine, other in alongside(ours, theirs, params, before=rescale):
        torch.testing.assert_close(mine, other, atol=1e-14, rtol=0)


def test_adamw_with_torchs_epsilon_is_torchs():
    params = pairs((4, 3), (5,))
    ours = LowRankOptimizer(params[::2], rule=AdamW(torch_epsilon=True), lr=0.01, eps=1e-3)
    theirs = torch.optim.AdamW(params[1::2], lr=0.01, eps=1e-3, weight_decay=0.0)
    for mine, other in alongside(ours, theirs, params):
        torch.testing.assert_close(mine, other, atol=1e-14, rtol=0)


@pytest.mark.parametrize("dampening", [0.0, 0.9])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs(momentum, dampening):
    params = pairs((4, 3), (5,))
    ours = LowRankOptimizer(params[::2], rule="sgd", lr=0.01, momentum=momentum, dampening=dampening)
    theirs = torch.optim.SGD(params[1::2], lr=0.01, momentum=momentum, dampening=dampening)
    for mine, other in alongside(ours, theirs, params):
        torch.testing.assert_close(mine, other, atol=1e-14, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("beta1", [None, 0.9])
def test_adafactor_is_transformers(beta1, weight_decay, dtype):
    """For matrices, vectors and stacks of matrices. Theirs reckons in float32 whatever the parameter is."""
    params = pairs((7, 5), (6,), (2, 4, 3), dtype=dtype)
    ours = LowRankOptimizer(params[::2], rule="adafactor", lr=0.01, beta1=beta1, weight_decay=weight_decay)
    theirs = Adafactor(params[1::2], lr=0.01, beta1=beta1, weight_decay=weight_decay, scale_parameter=False,
                       relative_step=False, warmup_init=False)  # fmt: skip
    for mine, other in alongside(ours, theirs, params, steps=8):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=0)


def test_8_bit_adamw_is_bitsandbytes():
    """Which keeps 8-bit moments from 4096 numbers on, of matrices and vectors alike."""
    params = pairs((80, 60), (5000,), (300,), (60, 40), dtype=torch.float32)
    ours = LowRankOptimizer(params[::2], rule=AdamW8bit(torch_epsilon=True), lr=0.01, eps=1e-8)
    theirs = bitsandbytes.optim.AdamW8bit(params[1::2], lr=0.01, eps=1e-8, weight_decay=0.0)
    for mine, other in alongside(ours, theirs, params):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=0)
    for mine, other in zip(params[:4:2], params[1:4:2], strict=True):
        assert torch.equal(ours.state[mine]["exp_avg"], theirs.state[other]["state1"])
        assert torch.equal(ours.state[mine]["exp_avg_sq"], theirs.state[other]["state2"])
    for mine, other in zip(params[4::2], params[5::2], strict=True):
        for key, name in (("exp_avg", "state1"), ("exp_avg_sq", "state2")):
            assert ours.state[mine][key].dtype == theirs.state[other][name].dtype == torch.float32
            assert key + "_absmax" not in ours.state[mine]


@pytest.mark.parametrize("proj_type", ["std", "full", "continuous"])
def test_8_bit_adamw_stays_near_adamw(proj_type):
    """Where second moments are not rounded to zero: gradients of similar size."""
    weights = [parameter((80, 72), dtype=torch.float32) for _ in range(2)]
    start = weights[0].detach().clone()
    for weight, rule in zip(weights, ("adamw", "adamw8bit"), strict=True):
        optimizer = build(weight, rule=rule, rank=64, proj_type=proj_type, weight_decay=0.0)
        train(optimizer, [weight], 0, 12)
    assert optimizer.state[weights[1]]["exp_avg"].dtype == torch.uint8
    moved = (weights[0] - start).norm()
    assert (weights[0] - weights[1]).norm() < 0.1 * moved


class Reference:
    """The formulas of the papers for one projected weight, spelled out."""

    def __init__(self, name, weight, scale, rate, decay):
        self.name, self.weight, self.scale, self.rate, self.decay = name, weight, scale, rate, decay
        self.k, self.m, self.v, self.row, self.col = 0, 0.0, 0.0, 0.0, 0.0

    def step(self, grad, left, right):
        """`left` (m, r) and `right` (r, n), identities for a side that is not projected."""
        r, rate = left.T @ grad @ right.T, self.rate
        self.k += 1
        if self.name == "adamw":
            self.m, self.v = 0.9 * self.m + 0.1 * r, 0.999 * self.v + 0.001 * r**2
            corrected = rate * math.sqrt(1 - 0.999**self.k) / (1 - 0.9**self.k)
            self.weight = self.weight - corrected * self.scale * left @ (self.m / (self.v.sqrt() + 1e-6)) @ right
            self.weight = self.weight - rate * self.decay * self.weight
        elif self.name.startswith("adafactor"):
            beta2 = 1 - self.k**-0.8
            self.row = beta2 * self.row + (1 - beta2) * (r**2 + 1e-30).mean(1)
            self.col = beta2 * self.col + (1 - beta2) * (r**2 + 1e-30).mean(0)
            update = r / torch.sqrt(torch.outer(self.row, self.col) / self.row.mean())
            update = rate * update / max(1.0, float(update.square().mean().sqrt()))
            if self.name != "adafactor":
                self.m = update = 0.9 * self.m + 0.1 * update
            self.weight = self.weight - self.decay * rate * self.weight
            self.weight = self.weight - self.scale * left @ update @ right
        elif self.name == "lion":
            update = torch.sign(self.scale * left @ (0.9 * self.m + 0.1 * r) @ right)
            self.m = 0.99 * self.m + 0.01 * r
            self.weight = (self.weight - rate * update) * (1 - rate * self.decay)
        else:
            momentum, dampening = (0.9, 0.9) if self.name == "sgd" else (0.0, 0.0)
            self.m = r if self.k == 1 else momentum * self.m + (1 - dampening) * r
            self.weight = self.weight - rate * self.scale * left @ self.m @ right
            self.weight = self.weight - rate * self.decay * self.weight


@pytest.mark.parametrize("name", [name for name in RULES if name != "adamw8bit"])
@pytest.mark.parametrize("proj_type", [*SIDES, "random", "continuous"])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_projected_updates_are_the_formulas(name, proj_type, shape):
    weight = parameter(shape)
    optimizer = build(weight, proj_type=proj_type, **RULES[name])
    reference, state = Reference(name, weight.detach().clone(), 0.5, 0.01, 0.1), optimizer.state[weight]
    eyes = torch.eye(shape[0], dtype=weight.dtype), torch.eye(shape[1], dtype=weight.dtype)
    for step in range(9):
        set_gradients([weight], step)
        # Online PCA uses the basis that it found before it moves it, except for the first.
        bases = {which: state[which].clone() for which in (LEFT, RIGHT) if which in state}
        optimizer.step()
        if step == 0 or not proj_type.startswith("continuous"):
            bases = {which: state[which] for which in bases}
        reference.step(weight.grad, bases.get(LEFT, eyes[0]), bases.get(RIGHT, eyes[1]))
        torch.testing.assert_close(weight.detach(), reference.weight, atol=1e-12, rtol=0)


MOMENTS = {"adamw": 2, "adamw8bit": 2, "lion": 1, "sgd": 1, "adafactor with beta1": 1}


@rules
@pytest.mark.parametrize("proj_type", [None, *PROJECTION_TYPES])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_states_have_exactly_the_size_of_the_formula(name, proj_type, shape):
    """The basis, m r or r n numbers; first and second moments in R's shape; three counters of 8 bytes (one for an
    unprojected weight); what the basis's own optimizer keeps. In 8 bits 1 byte a number and 4 bytes for 256."""
    assert_size_of_states(name, proj_type, shape)


@pytest.mark.parametrize(
    "name, proj_type", [*(("adamw8bit", kind) for kind in (None, *PROJECTION_TYPES)), ("lion", "continuous_adam8bit")]
)
@pytest.mark.parametrize("shape", [(700, 690), (690, 700)])
def test_8_bit_states_have_the_size_of_the_formula(name, proj_type, shape):
    """From 4096 numbers on, those of R (700 x 6) and of the basis among them."""
    assert_size_of_states(name, proj_type, shape)


def assert_size_of_states(name, proj_type, shape):
    (m, n), r = shape, 6
    sides = {None: "", "full": "lr", "left": "l", "right": "r", "reverse_std": "l" if m >= n else "r"}.get(
        proj_type, "r" if m >= n else "l"
    )
    basis = ("l" in sides) * m * r + ("r" in sides) * r * n
    low_rank = (r if "l" in sides else m, r if "r" in sides else n)

    def moments(rule, rows, columns):
        number = rows * columns
        if rule == "adamw8bit" and number >= 4096:
            return 2 * (number + 4 * math.ceil(number / 256))
        factored = 4 * (rows + columns) if rule.startswith("adafactor") else 0
        return 4 * number * MOMENTS.get(rule, 0) + factored

    expected = 4 * basis + moments(name, *low_rank) + (24 if sides else 8)
    own = {"continuous": "adamw", "continuous_adam8bit": "adamw8bit", "continuous_lion": "lion",
           "continuous_adafactor": "adafactor", "continuous_sgd": "plain sgd"}.get(proj_type)  # fmt: skip
    if own:
        expected += 8 + moments(own, *((m, r) if sides == "l" else (r, n)))
    weight = parameter(shape, dtype=torch.float32)
    optimizer = build(weight, **RULES[name], **({"proj_type": proj_type, "rank": r} if sides else {"rank": None}))
    for _ in range(2):
        assert sum(value.numel() * value.element_size() for value in optimizer.state[weight].values()) == expected
        train(optimizer, [weight], 0, 2)
    if name == "adamw8bit":
        expected = torch.uint8 if math.prod(low_rank) >= 4096 else torch.float32
        assert optimizer.state[weight]["exp_avg"].dtype == optimizer.state[weight]["exp_avg_sq"].dtype == expected


def moved(name, proj_type, dtype, golore):
    """Where a small weight and a vector are after 6 updates, and how far they came, in float64."""
    weight = torch.nn.Parameter((0.02 * matrix((24, 16))).bfloat16().to(dtype))
    vector = torch.nn.Parameter((0.02 * matrix((16,))).bfloat16().to(dtype))
    start = torch.cat([weight.detach().flatten(), vector.detach()]).double()
    group = {"rank": 4, "proj_type": proj_type} if proj_type else {"rank": None}
    optimizer = build(weight, [vector], **RULES[name], **group, **({"rand_ratio": 0.0} if golore else {}))
    dtypes = {key: value.dtype for key, value in optimizer.state[weight].items()}
    for step in range(6):
        for index, param in enumerate((weight, vector)):
            param.grad = matrix(param.shape, 1 + 100 * step + index).bfloat16().to(dtype)
        optimizer.step()
    assert {key: value.dtype for key, value in optimizer.state[weight].items()} == dtypes
    assert weight.dtype == dtype and all(value.isfinite().all() for value in optimizer.state[weight].values())
    end = torch.cat([weight.detach().flatten(), vector.detach()]).double()
    return end, (end - start).norm()


@rules
@pytest.mark.parametrize("proj_type, golore", [*((kind, False) for kind in PROJECTIONS), ("std", True)])
def test_bf16_and_float64_weights(name, proj_type, golore):
    """With gradients of the same dtype. SGD's updates are linear in the gradient and agree within bf16's 8 bits; the
    other rules nearly take its sign at first (Lion always does), which turns where rounding is as large as R itself."""
    end, distance = moved(name, proj_type, torch.float32, golore)
    half, _ = moved(name, proj_type, torch.bfloat16, golore)
    double, _ = moved(name, proj_type, torch.float64, golore)
    linear = name.endswith("sgd")
    assert (half - end).norm() < (0.05 if linear else 0.2) * distance
    assert (double - end).norm() < (1e-5 if linear else 1e-3) * distance


@pytest.mark.parametrize("svd_method", ["gram", "exact", "randomized", "subspace"])
@pytest.mark.parametrize(("shape", "dim"), [((16, 40), 0), ((40, 16), 1)])
def test_lion_leaves_alone_what_has_no_gradient(svd_method, shape, dim):
    """Rounding errors of singular vectors have a sign as well."""
    weight, dead = torch.nn.Parameter(torch.zeros(shape)), torch.tensor([0, 1, 5, 15])
    group = {"params": [weight], "rank": 4, "update_proj_gap": 3}
    optimizer = LowRankOptimizer([group], rule="lion", lr=1.0, svd_method=svd_method)
    generator = torch.Generator().manual_seed(0)
    for _ in range(7):
        weight.grad = torch.randn(shape, generator=generator).index_fill_(dim, dead, 0.0)
        optimizer.step()
    moved = weight.detach().abs().amax(1 - dim)
    assert not moved[dead].any() and (moved > 0).sum() == 12
