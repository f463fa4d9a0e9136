"""Muon and NorMuon: limits, torch's own Muon, and what makes no sense. Golden numbers: test_golden_more_methods.py."""

import pytest
import torch
from projection_helpers import matrix, parameter, set_gradients
from torch import nn

from peft_pretraining.methods.muon.method import orthogonalize
from peft_pretraining.optim import Muon, NorMuon


def steps(optimizer, weight, updates=4):
    """Movements of each update."""
    found = []
    for step in range(updates):
        before = weight.detach().clone()
        set_gradients([weight], step)
        optimizer.step()
        found.append(weight.detach() - before)
    return found


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (10, 10)])
def test_singular_values_come_near_one(shape):
    values = torch.linalg.svdvals(orthogonalize([matrix(shape)])[0])
    assert 0.6 < values.min() and values.max() < 1.3


def test_a_batch_is_one_matrix_after_another():
    """Of a shape, and the transposed one."""
    matrices = [matrix(shape, seed) for seed, shape in enumerate([(6, 4), (4, 6), (6, 4), (5, 5)])]
    for one, alone in zip(orthogonalize(matrices), (orthogonalize([each])[0] for each in matrices), strict=True):
        torch.testing.assert_close(one, alone, atol=1e-13, rtol=0)


@pytest.mark.parametrize(("scale", "theirs"), [("match_rms", "match_rms_adamw"), ("spectral", "original")])
def test_it_is_torchs_muon_but_for_bfloat16_iterations(monkeypatch, scale, theirs):
    """torch iterates in bfloat16 whatever the weight is in; here it is kept from that."""
    one, other = parameter((12, 8)), parameter((12, 8))
    ours = steps(Muon([one], lr=0.01, scale=scale, weight_decay=0.1), one)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    reference = torch.optim.Muon([other], lr=0.01, adjust_lr_fn=theirs, weight_decay=0.1)
    for mine, its in zip(ours, steps(reference, other), strict=True):
        torch.testing.assert_close(mine, its, atol=1e-12, rtol=0)


def test_bfloat16_iterations_change_little():
    one, other = (orthogonalize([matrix((64, 32)).float()], dtype=dtype)[0] for dtype in ("bfloat16", "float32"))
    assert 1e-4 * other.norm() < (one - other).norm() < 0.03 * other.norm()


@pytest.mark.parametrize("kind", [Muon, NorMuon])
def test_a_gradient_of_zeros_moves_nothing_at_first(kind):
    weight = parameter((6, 4))
    start, optimizer = weight.detach().clone(), kind([weight], lr=0.01, weight_decay=0)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, start)
    assert all(0 < moved.norm() < 1 for moved in steps(optimizer, weight))


def test_what_is_no_matrix_has_adamw_and_its_rate():
    model = nn.ModuleDict({"mlp": nn.Linear(6, 8), "head": nn.Linear(8, 3)})
    optimizer = Muon.from_model(model, lr=0.01, adam_lr=0.001)
    assert [(group["param_names"], group["rule"], group["lr"]) for group in optimizer.param_groups] == [
        (["mlp.bias", "head.weight", "head.bias"], "adamw", 0.001),
        (["mlp.weight"], "muon", 0.01),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": "rms"}, "scale must be one of match_rms, spectral, got 'rms'"),
        ({"ns_dtype": "fp8"}, "ns_dtype must be one of auto, bfloat16, float32, got 'fp8'"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"neuron_beta2": 1.0}, "neuron_beta2 must be at least 0 and below 1, or None, got 1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Muon([parameter((4, 4))], **settings)
