"""NorMuon: Muon with rows of equal size (arXiv 2510.05491).

With O (m, n) as Muon has it (methods/muon), for each row i:

    v_i <- β2 v_i + (1-β2) mean_j O_ij²                                       (m)
    O'_i = O_i / (√v_i + 1e-10)                                               (m, n)
    W <- W (1 - lr weight_decay) - lr 0.2 √(mn) O' / ‖O'‖

The authors' code keeps O's own size, √max(1, m / n) ‖O‖ O' / ‖O'‖ (`--muon_scale spectral`), and looks ahead as Muon
does, where the paper has U = M (`--nesterov False`). v begins at zero, which only changes a common factor.
"""

from __future__ import annotations

from typing import Any

from peft_pretraining.methods.muon.method import Muon, MuonTraining


class NorMuonTraining(MuonTraining):
    @property
    def neuron_beta2(self) -> float:  # type: ignore[override]
        return float(self.config.method.neuron_beta2)


class NorMuon(Muon):
    """NorMuon for other loops.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.eye(4, 6))
    >>> optimizer = NorMuon([weight], lr=0.01)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> {key: tuple(value.shape) for key, value in optimizer.state[weight].items() if value.ndim}
    {'exp_avg': (4, 6), 'row_mean_sq': (4,)}
    """

    def __init__(self, params: Any, *, neuron_beta2: float = 0.95, **settings: Any):
        super().__init__(params, neuron_beta2=neuron_beta2, **settings)
