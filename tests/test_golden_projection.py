"""The projected optimizer against numbers from the methods' public implementations (see golden/README.md)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.basis.bases import SVDBasis
from peft_pretraining.optim.tensors.projection import LEFT, RIGHT

GOLDEN = load_file(Path(__file__).parent / "golden" / "projected.safetensors")
GAP, RANK, BASE_RATE, TOLERANCE = 5, 4, 0.01, 2e-6

RULES = {
    "adamw": {"rule": "adamw"},
    "adafactor": {"rule": "adafactor"},
    "adafactor_beta1_0.9": {"rule": "adafactor", "beta1": 0.9},
    "lion": {"rule": "lion"},
}
SIDES = ["std", "reverse_std", "left", "right", "full"]
CONTINUOUS = ["continuous", "continuous_sgd", "continuous_lion", "continuous_adafactor"]

shapes = pytest.mark.parametrize("shape", ["24x16", "16x24"])
rules = pytest.mark.parametrize("rule", RULES)
sides = pytest.mark.parametrize("proj_type", SIDES)


class PublicBases(SVDBasis):
    """Takes the public run's bases, in order of the refreshes, where the real rule takes singular vectors."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def compute_bases(self, refreshes):
        return [self.compute_basis(refresh) for refresh in refreshes]

    def compute_basis(self, refresh):
        basis = self.kept[refresh.number].to(refresh.grad.device)
        if refresh.projection.sides == (LEFT, RIGHT):
            # Only the left one was kept. The right one has the signs that go with it: v = Gᵀu / σ.
            right = basis.T @ refresh.grad
            return {LEFT: basis, RIGHT: right / right.norm(dim=1, keepdim=True)}
        return {refresh.projection.sides[0]: basis}


def trajectory(optimizer, weight, gradients, rates):
    """The weight after each update, (12, m, n)."""
    weights = []
    for gradient, rate in zip(gradients, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        weight.grad = gradient.clone().to(weight.device)
        optimizer.step()
        weights.append(weight.detach().cpu().clone())
    return torch.stack(weights)


def run(shape, rule, proj_type, public_bases=False, device="cpu", **settings):
    weight = torch.nn.Parameter(GOLDEN[f"inputs__{shape}/W0"].clone().to(device))
    group = {"params": [weight], "rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": proj_type}
    if public_bases:
        group["basis"] = PublicBases(GOLDEN[f"bases__{proj_type}__{shape}"])
    optimizer = LowRankOptimizer([group], **RULES[rule], lr=BASE_RATE, weight_decay=0.01, **settings)
    weights = trajectory(optimizer, weight, GOLDEN[f"inputs__{shape}/G"], GOLDEN[f"inputs__{shape}/lr"])
    return weights, optimizer.state[weight]


def assert_agree(weights, case, updates=12):
    torch.testing.assert_close(weights[:updates], GOLDEN[case][:updates], atol=TOLERANCE, rtol=0)


def test_every_case_is_here():
    cases = {
        f"{rule}__{kind}__{shape}/W" for rule in RULES for kind in SIDES + CONTINUOUS for shape in ("24x16", "16x24")
    }
    assert cases == {key for key in GOLDEN if key.endswith("/W")}
    assert len(cases) == 72


@shapes
@rules
@sides
def test_svd_projections_with_the_public_bases(shape, rule, proj_type, device):
    weights, _ = run(shape, rule, proj_type, public_bases=True, device=device)
    assert_agree(weights, f"{rule}__{proj_type}__{shape}/W")


@shapes
@rules
@sides
@pytest.mark.parametrize("svd_method", ["gram", "exact"])
def test_own_bases_until_the_second_refresh(shape, rule, proj_type, svd_method, device):
    """Until then signs cannot matter; after it, moments meet bases with signs of our own."""
    weights, _ = run(shape, rule, proj_type, svd_method=svd_method, device=device)
    assert_agree(weights, f"{rule}__{proj_type}__{shape}/W", updates=GAP)


@shapes
@sides
def test_own_bases_span_the_public_subspaces(shape, proj_type, device):
    _, state = run(shape, "adamw", proj_type, device=device)
    public = GOLDEN[f"bases__{proj_type}__{shape}"][-1]
    own = (state[LEFT] if LEFT in state else state[RIGHT]).cpu()
    assert own.shape == public.shape
    if LEFT in state:
        own, public = own.T, public.T
    torch.testing.assert_close(own.T @ own, public.T @ public, atol=1e-5, rtol=0)  # the projections onto the subspaces


@shapes
@rules
@pytest.mark.parametrize("proj_type", CONTINUOUS)
def test_online_subspace_descent(shape, rule, proj_type, device):
    """With bases of its own: one SVD at the start, whose signs cannot matter."""
    weights, _ = run(shape, rule, proj_type, device=device)
    assert_agree(weights, f"{rule}__{proj_type}__{shape}/W")


class RandomFromFile(SVDBasis):
    """GoLore with the public run's random basis from update 8 on."""

    carries_momentum = True

    def __init__(self, drawn):
        super().__init__()
        self.drawn = drawn

    def compute_bases(self, refreshes):
        return [self.compute_basis(refresh) for refresh in refreshes]

    def compute_basis(self, refresh):
        return {refresh.projection.sides[0]: self.drawn} if refresh.step >= 8 else super().compute_basis(refresh)


@shapes
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_golore_follows_its_adapter_form(shape, rule, device):
    """The public runs have a factor of r rows or columns and a scale s both in its forward and in its effect; without
    weight decay W - s A B moves as the weight itself does here, with ε / s for AdamW and the scale s² for SGD. No sign
    matters, because the momentum is carried into new bases."""
    case, scale, gap = f"golore_adapter__{rule}__{shape}", 0.5, 4
    weight = torch.nn.Parameter(GOLDEN[f"{case}/W0"].clone().to(device))
    group = {"params": [weight], "rank": RANK, "update_proj_gap": gap, "rand_ratio": 8 / 12, "num_training_steps": 12}
    if rule == "adamw":
        optimizer = LowRankOptimizer([{**group, "scale": scale}], rule="adamw", lr=BASE_RATE, eps=1e-6 / scale)
    else:
        optimizer = LowRankOptimizer([{**group, "scale": scale**2}], rule="sgd", lr=BASE_RATE, momentum=0.9)
    subspace = optimizer.subspaces[weight]
    assert subspace.rule.carries_momentum
    assert [subspace.rule.reads_gradient(step) for step in (0, 4, 8)] == [True, True, False]
    subspace.rule = RandomFromFile(GOLDEN[f"{case}/random_orthogonal_0"].to(device))
    gradients = GOLDEN[f"{case}/Y"].mT @ GOLDEN[f"{case}/X"]  # (T, N, m)ᵀ (T, N, n) -> (T, m, n)
    weights = trajectory(optimizer, weight, gradients, GOLDEN[f"{case}/lr"])
    assert_agree(weights, f"{case}/W_effective")
