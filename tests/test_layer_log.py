"""What --log_layers records of each matrix."""

from __future__ import annotations

import helpers
import pytest
import torch
from helpers import GALORE
from torch import nn

from peft_pretraining.checkpoint.train_state import TrainState
from peft_pretraining.training.dashboard import named
from peft_pretraining.training.layer_log import LayerLog, stable_rank


def test_the_stable_rank_is_that_of_the_singular_values():
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, 10))[0] for size in (40, 20))
    singular = torch.tensor([5.0, 3.0, 2.0, *[1.0] * 7])
    matrix = u * singular @ v.T
    assert stable_rank(matrix).item() == pytest.approx((singular.square().sum() / 25).item(), rel=1e-4)
    assert stable_rank(torch.outer(u[:, 0], v[:, 0])).item() == pytest.approx(1.0)
    assert stable_rank(torch.eye(6)).item() == pytest.approx(6.0)
    assert stable_rank(torch.zeros(3, 4)).isnan()


def test_it_looks_at_what_the_step_did():
    torch.manual_seed(0)
    model, state = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), TrainState()
    model[1].weight.requires_grad = False
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    log = LayerLog(2, model, optimizer, state)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().sum().backward()
        before, grad = model[0].weight.detach().clone(), model[0].weight.grad.clone()
        state.update_step += 1
        optimizer.step()
        found = log.of(step)
        if step == 1:
            assert found == {}
            continue
        moved = -0.5 * grad
        expected = {
            "grad_norm": grad.norm().item(),
            "update_ratio": (moved.norm() / before.norm()).item(),
            "update_stable_rank": (moved.norm() / torch.linalg.matrix_norm(moved, 2)).square().item(),
        }
        assert found == {"layers": {"0.weight": pytest.approx(expected, rel=1e-3)}}
        assert log.of(step) == {}


def test_a_run_is_the_same_with_it(command, tmp_path):
    for name, every in (("with", 5), ("without", None)):
        changes = {"save_dir": tmp_path / name, "num_training_steps": 7, "log_layers": every}
        assert helpers.run(command(**GALORE, **changes)) == 0
    helpers.assert_same_run(tmp_path / "with", tmp_path / "without")
    layers = {r["update_step"]: r["layers"] for r in helpers.records(tmp_path / "with") if "layers" in r}
    assert list(layers) == [1, 6]  # refreshes are in these updates
    of_projection, of_all = {"captured_energy", "projected_grad_norm"}, {"update_ratio", "update_stable_rank"}
    query, head = (layers[6][f"{name}.weight"] for name in ("model.layers.0.self_attn.q_proj", "lm_head"))
    assert of_projection | of_all <= set(query) <= of_projection | of_all | {"grad_norm"}
    assert 0 < query["captured_energy"] <= 1 and 1 <= query["update_stable_rank"] <= 4 + 1e-4  # GaLore's rank
    assert set(head) == of_all | {"grad_norm"}
    assert layers[1]["lm_head.weight"]["update_ratio"] == 0  # the rate's warm-up begins with 0
    assert "update_stable_rank" not in layers[1]["lm_head.weight"]
    assert "layers/update_ratio/lm_head.weight" in named({"layers": layers[6]}, 7)


def test_updates_inside_the_backward_pass_cannot_be_seen(command, capsys):
    assert helpers.run(command(**GALORE, per_layer=True, total_batch_size=4, log_layers=5)) == 2
    assert "--log_layers 5 cannot see --per_layer updates" in capsys.readouterr().err
