"""FOAM: limits, blocks and zeros."""

import pytest
import torch
from projection_helpers import parameter, set_gradients

from peft_pretraining.optim import Foam


@pytest.mark.parametrize("columns", [8, 5, 3])
def test_blocks_that_do_not_fit_are_filled_up_with_zeros(columns):
    weight = parameter((4, columns))
    optimizer = Foam([weight], level=2)
    set_gradients([weight], 0)
    optimizer.step()
    padded = torch.zeros(4, 8, dtype=torch.float64)
    padded[:, :columns] = weight.grad
    blocks = -(-columns // 4)
    expected = 0.1 * padded[:, : 4 * blocks].view(4, blocks, 4).mean(-1)
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], expected)


def test_a_gradient_of_zeros_moves_nothing_at_first():
    weight = parameter((4, 8))
    start, optimizer = weight.detach().clone(), Foam([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, start)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="level must be at least 0, got -1"):
        Foam([parameter((4, 4))], level=-1)
    with pytest.raises(ValueError, match="second must be one of mean_of_squares, square_of_mean, got 'mean'"):
        Foam([parameter((4, 4))], second="mean")
