"""GaLore with AdamW against numbers from its public implementation (see golden/README.md)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.bases import LEFT, RIGHT, SVDBasis

GOLDEN = load_file(Path(__file__).parent / "golden" / "galore_adamw.safetensors")
GAP, RANK, BASE_RATE, TOLERANCE = 5, 4, 0.01, 2e-6

cases = pytest.mark.parametrize("shape", ["24x16", "16x24"])
sides = pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])


class PublicBases(SVDBasis):
    """Takes the public run's bases at each refresh, where the real rule takes the gradient's singular vectors."""

    kept: torch.Tensor  # (12, ...) the basis after each update

    def refreshed(self, old, grad, first):
        step = self.steps.pop(0)
        basis = self.kept[step]
        if self.sides == (LEFT, RIGHT):
            # Only the left one was kept. The right one has the signs that go with it: v = Gᵀu / σ.
            right = basis.T @ grad
            return {LEFT: basis, RIGHT: right / right.norm(dim=1, keepdim=True)}
        return {self.sides[0]: basis}


def run(shape: str, proj_type: str, public_bases: bool) -> tuple[torch.Tensor, LowRankOptimizer]:
    """The weights after each of the 12 updates, (12, m, n)."""
    gradients, rates = GOLDEN[f"inputs__{shape}/G"], GOLDEN[f"inputs__{shape}/lr"]
    weight = torch.nn.Parameter(GOLDEN[f"inputs__{shape}/W0"].clone())
    group = {"params": [weight], "rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": proj_type}
    optimizer = LowRankOptimizer([group], rule="adamw", lr=BASE_RATE, weight_decay=0.01)
    if public_bases:
        rule = optimizer._bases[weight]
        rule = PublicBases(rule.sides, rule.rank)
        object.__setattr__(rule, "kept", GOLDEN[f"adamw__{proj_type}__{shape}/P_after"])
        object.__setattr__(rule, "steps", [0, GAP, 2 * GAP])
        optimizer._bases[weight] = rule
    trajectory = []
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = float(rate)
        weight.grad = gradient.clone()
        optimizer.step()
        trajectory.append(weight.detach().clone())
    return torch.stack(trajectory), optimizer


@cases
@sides
def test_whole_trajectory_with_the_public_bases(shape, proj_type):
    trajectory, _ = run(shape, proj_type, public_bases=True)
    torch.testing.assert_close(trajectory, GOLDEN[f"adamw__{proj_type}__{shape}/W"], atol=TOLERANCE, rtol=0)


@cases
@sides
def test_own_bases_until_the_second_refresh(shape, proj_type):
    trajectory, _ = run(shape, proj_type, public_bases=False)
    expected = GOLDEN[f"adamw__{proj_type}__{shape}/W"]
    torch.testing.assert_close(trajectory[:GAP], expected[:GAP], atol=TOLERANCE, rtol=0)


@cases
@sides
def test_own_bases_span_the_public_subspaces(shape, proj_type):
    _, optimizer = run(shape, proj_type, public_bases=False)
    public = GOLDEN[f"adamw__{proj_type}__{shape}/P_after"][-1]
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    own = state[LEFT] if LEFT in state else state[RIGHT]
    assert own.shape == public.shape
    if own is state.get(LEFT):
        own, public = own.T, public.T
    torch.testing.assert_close(own.T @ own, public.T @ public, atol=1e-5, rtol=0)  # the projections onto the subspaces
