"""What a method keeps and what it leaves: the size of its state, 8-bit states, the exported model."""

from __future__ import annotations

import helpers
import pytest
import torch
from transformers import AutoModelForCausalLM

from conformance.runs import CASES, SHAPE, VOCABULARY, Case, Outcome, assert_resumes, each_case
from peft_pretraining.config import cli
from peft_pretraining.export import merged_model
from peft_pretraining.methods import METHODS
from peft_pretraining.report import state_size

LAYERS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
"""Square, upright (2m x m) and flat (m x 2m)."""
FORMULAS = [case for case in CASES if case.rule == "adamw" and case.spec.state]
COUNTERS = ("step",)
"""Keys of numbers that count."""


def state_of(outcome: Outcome, layer: str) -> dict[str, torch.Tensor]:
    """Tensors of the optimizer's state of all parameters of a linear layer of the first block, without counters."""
    return {
        f"{name}.{key}": value
        for name, param in outcome.model.named_parameters()
        if f".0.{layer}." in name
        for key, value in outcome.optimizer.state.get(param, {}).items()
        if (value.is_floating_point() or value.dtype == torch.uint8) and key not in COUNTERS
    }


@each_case(FORMULAS)
@pytest.mark.parametrize("layer", LAYERS)
def test_bytes_of_the_state_are_those_of_the_formula(runs, case, layer):
    """By the formula that `--dry_run`, the plan and the tables of the documentation show."""
    outcome = runs(case)
    state, config = state_of(outcome, layer), cli.load(runs.command(case, runs.folder / "unused"), environ={}).config
    size = sum(value.numel() * value.element_size() for value in state.values())
    rows, columns = outcome.model.get_submodule(f"model.layers.0.{layer}").weight.shape
    heads = outcome.model.config.num_attention_heads if "q_proj" in layer else rows
    expected = state_size.of_matrix(config, rows, columns, heads) * torch.float64.itemsize
    assert size == expected, {name: tuple(value.shape) for name, value in state.items()}
    assert bool(size) == (case.spec.state != "0")


def test_every_method_has_a_formula():
    assert {case.method for case in FORMULAS} == {*METHODS}


def test_the_matrices_of_a_model_are_known_before_it_is_built(runs):
    outcome, shape = runs(CASES[0]), {**SHAPE, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = type(outcome.model.config)(vocab_size=VOCABULARY, **shape)
    with torch.device("meta"):
        layers = type(outcome.model)(config).model.layers
    built = [module.weight.shape for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    assert [(rows, columns) for rows, columns, _ in state_size.matrices(shape)] == list(map(tuple, built))


@each_case(case for case in CASES if case.rule == "adamw8bit")
def test_states_of_8_bits(runs, case, tmp_path):
    """Both moments of all that is trained, where the layers are large enough for them. Such a run begins as one with
    float32 states does, and resumes."""
    changes = {"hidden": 64, "dtype": "float32", **({"rank": 64} if "rank" in case.spec.own else {})}
    outcome = runs(case, **changes)
    for layer in LAYERS:
        dtypes = [value.dtype for value in state_of(outcome, layer).values() if value.numel() >= 4096]
        trained = sum(
            f".0.{layer}." in name and param.requires_grad for name, param in outcome.model.named_parameters()
        )
        assert dtypes.count(torch.uint8) == 2 * trained > 0, dtypes
    if "adamw" in case.spec.update_rules:
        losses, wide = (helpers.updates(runs(each, **changes).folder) for each in (case, Case(case.method, "adamw")))
        assert max(abs(one[1] - other[1]) for one, other in zip(losses[:4], wide[:4], strict=True)) < 0.1
    assert_resumes(runs, case, tmp_path / "run", 3, **changes)


@each_case()
def test_the_export_computes_the_same(runs, case):
    """The checkpoint as it is, and what is merged anew from the training state, in transformers alone."""
    outcome = runs(case)
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    plain, info = AutoModelForCausalLM.from_pretrained(outcome.checkpoint, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        trained = outcome.model.eval()(tokens).logits
        for exported in (plain, merged_model(outcome.checkpoint, None)):
            assert exported.dtype == torch.float64
            torch.testing.assert_close(exported.eval()(tokens).logits, trained, atol=1e-12, rtol=0)
