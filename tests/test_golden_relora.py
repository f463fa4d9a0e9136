"""ReLoRA against numbers from its public implementation (golden/README.md)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft_pretraining.config import Config
from peft_pretraining.methods.relora.method import ReLoRA

NUMBERS = load_file(Path(__file__).parent / "golden" / "relora.safetensors")
TOLERANCE = {"rtol": 0, "atol": 1e-6}


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_relora(shape, device):
    numbers = {
        name.split("/")[1]: value.to(device)
        for name, value in NUMBERS.items()
        if name.startswith(f"relora__{shape[0]}x{shape[1]}/")
    }
    linear = nn.Linear(shape[1], shape[0], bias=False, device=device)
    with torch.no_grad():
        linear.weight.copy_(numbers["W0"])
    model = nn.ModuleDict({"attn": linear})
    # Moments are zeroed at each merge, after updates 3 and 7, that is before updates 4 and 8.
    method = ReLoRA(Config.from_settings({"method": "relora", "rank": 4, "lora_alpha": 8.0, "relora": 4, "lr": 0.01}))
    model = method.convert(model)
    layer, optimizer = model["attn"], method.build_optimizer(model)
    with torch.no_grad():
        layer.lora_A.copy_(numbers["A0"])
    redrawn = iter([numbers["reinit_A_0"], numbers["reinit_A_1"]])
    method.draw_a = lambda layer, step, index: next(redrawn)
    effective = []
    for t in range(12):
        before = layer.merged_weight()
        method.before_update(model, optimizer, t)
        torch.testing.assert_close(layer.merged_weight(), before, **TOLERANCE)  # a merge keeps the function
        (layer(numbers["X"][t]) * numbers["Y"][t]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        effective.append(layer.merged_weight())
        if t not in (3, 7):  # the public code merges at the end of these updates, ours before the next
            torch.testing.assert_close(layer.weight.data, numbers["W_base"][t], **TOLERANCE)
            torch.testing.assert_close(layer.lora_A.data, numbers["lora_A"][t], **TOLERANCE)
            torch.testing.assert_close(layer.lora_B.data, numbers["lora_B"][t], **TOLERANCE)
        else:
            assert numbers["lora_B"][t].count_nonzero() == 0
    torch.testing.assert_close(torch.stack(effective), numbers["W_effective"], **TOLERANCE)
    assert next(redrawn, None) is None
    assert int(optimizer.state[layer.lora_A]["step"]) == 12  # counts stay
