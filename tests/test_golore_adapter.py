"""GoLore's adapter form: against its public implementation, against the optimizer form, and what it exchanges."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft_pretraining.config import Config
from peft_pretraining.methods.golore.method import GoLore
from peft_pretraining.methods.golore_adapter.method import GoLoreAdapter
from peft_pretraining.models.loss import token_loss_sum
from peft_pretraining.optim.basis.bases import RandomBasis
from peft_pretraining.optim.tensors.projection import LEFT

GOLDEN = load_file(Path(__file__).parent / "golden" / "projected.safetensors")


def config(**settings):
    return Config.from_settings({"method": "golore_adapter", "clip_grad_norm": 0.0, "adam_eps": 1e-6, **settings})


def train_step(method, model, optimizer, step, backward, rate, clip=0.0):
    """One update as the trainer makes it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.begin_update(step)
    method.before_update(model, optimizer, step)
    backward()
    norm = optimizer.grad_norm()
    if clip:
        optimizer.scale_((clip / (norm + 1e-6)).clamp(max=1.0))
    method.before_step(model, optimizer, step)
    optimizer.step()
    optimizer.zero_grad()
    return norm


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("m, n", [(24, 16), (16, 24)])
def test_public_numbers(monkeypatch, rule, m, n):
    prefix = f"golore_adapter__{rule}__{m}x{n}/"
    numbers = {name.removeprefix(prefix): value for name, value in GOLDEN.items() if name.startswith(prefix)}
    monkeypatch.setattr(
        RandomBasis,
        "compute_basis",
        lambda self, refresh: {refresh.projection.sides[0]: numbers["random_orthogonal_0"]},
    )
    linear = nn.Linear(n, m, bias=False)
    with torch.no_grad():
        linear.weight.copy_(numbers["W0"])
    model = nn.ModuleDict({"attn": linear})
    settings = {"rank": 4, "scale": 0.5, "update_proj_gap": 4, "rand_ratio": 8 / 12, "num_training_steps": 12}
    method = GoLoreAdapter(config(optimizer=rule, momentum=0.9, dampening=0.0, **settings))
    model = method.convert(model)
    optimizer, layer = method.build_optimizer(model), model["attn"]
    for t in range(12):
        batch = numbers["X"][t], numbers["Y"][t]
        train_step(
            method, model, optimizer, t, lambda batch=batch: (layer(batch[0]) * batch[1]).sum().backward(),
            float(numbers["lr"][t]),
        )  # fmt: skip
        torch.testing.assert_close(layer.merged_weight(), numbers["W_effective"][t], rtol=0, atol=2e-6)
    assert optimizer.state[method.subspaces[0].trained]["refreshes"] == 3


# Against the optimizer form.


def small_llama(dtype=torch.float64):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, max_position_embeddings=32)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)  # signals that do not vanish
    return model


def batches(count, micro_batches=2):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield [{"input_ids": torch.randint(0, 40, (2, 12), generator=generator)} for _ in range(micro_batches)]


def forms(rule, s, **settings):
    """Both forms over the same model, so configured that they should agree."""
    shared = {"rank": 4, "update_proj_gap": 10, "rand_ratio": 0.5, "num_training_steps": 50, "optimizer": rule}
    shared |= {"momentum": 0.9, "dampening": 0.0, "lr": 1e-2, **settings}
    adapter = GoLoreAdapter(config(**shared, scale=s))
    equivalent = {"scale": s, "adam_eps": 1e-6 / s} if rule == "adamw" else {"scale": s**2}
    optimizer_form = GoLore(config(**{**shared, **equivalent, "method": "golore"}))
    made = []
    for method in (adapter, optimizer_form):
        model = method.convert(small_llama())
        made.append((method, model, method.build_optimizer(model)))
    if rule == "adamw":  # the ε of what is not projected stays: it has no scale
        made[1][2].param_groups[0]["eps"] = 1e-6
    return made


@pytest.mark.parametrize("s", [1.0, 0.25])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_both_forms_follow_each_other(rule, s):
    """50 updates in float64; bases from equal gradients, then from equal draws."""
    (adapter, model, optimizer), (other, other_model, other_optimizer) = forms(rule, s)
    names = {name for name, parameter in other_model.named_parameters()}
    start = {name: tensor.clone() for name, tensor in other_model.state_dict().items()}
    for step, micro_batches in enumerate(batches(50)):
        rate = (1e-2 if rule == "adamw" else 1e-1) * (1 - step / 60)
        for form in ((adapter, model, optimizer), (other, other_model, other_optimizer)):

            def backward(model=form[1], micro_batches=micro_batches):
                for batch in micro_batches:
                    (token_loss_sum(model, batch) / 44).backward()

            norm = train_step(*form, step, backward, rate)
            if form[0] is adapter:
                adapter_norm = norm
        assert float(adapter_norm) == pytest.approx(float(norm), rel=1e-7)
        merged, plain = adapter.merged_state_dict(model), other_model.state_dict()
        assert set(merged) == names == set(plain)
        for name in names:
            torch.testing.assert_close(merged[name], plain[name], rtol=0, atol=1e-8)
    moved = [(plain[name] - start[name]).abs().max() for name in names]
    assert min(moved) > 1e-4
    counts = [int(optimizer.state[adapter.subspaces[0].trained][key]) for key in ("refreshes", "last_refresh")]
    assert counts == [5, 40]


def test_clipping_is_the_same_in_both_forms():
    """The norm is over R in the basis that the update uses, also where that is new; the adapter form divides by s."""
    forms_ = forms("sgd", 0.25, rand_ratio=0.0)
    weights = []
    for step, micro_batches in enumerate(batches(12)):
        norms = []
        for form in forms_:

            def backward(model=form[1], micro_batches=micro_batches):
                for batch in micro_batches:
                    (token_loss_sum(model, batch) / 44).backward()

            norms.append(float(train_step(*form, step, backward, 1e-2, clip=0.1)))
        assert norms[0] == pytest.approx(norms[1], rel=1e-7) and norms[0] > 0.1
        weights = [form[0].merged_state_dict(form[1]) for form in forms_]
        for name, tensor in weights[0].items():
            torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=1e-8)


def test_an_update_that_is_skipped_leaves_no_trace_and_the_refresh_pending():
    adapter, model, optimizer = forms("adamw", 0.5)[0]
    given = list(batches(4))

    def backward(batch):
        (token_loss_sum(model, batch) / 22).backward()

    train_step(adapter, model, optimizer, 0, lambda: backward(given[0][0]), 1e-2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer.begin_update(10)  # a refresh is due
    backward(given[1][0])
    adapter.subspaces[3].layer.full_gradient[0, 0] = float("nan")
    adapter.subspaces[3].trained.grad[0, 0] = float("nan")
    assert not optimizer.grad_norm().isfinite()
    optimizer.zero_grad()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    train_step(adapter, model, optimizer, 11, lambda: backward(given[2][0]), 1e-2)
    for subspace in adapter.subspaces:
        state = optimizer.state[subspace.trained]
        assert (int(state["refreshes"]), int(state["last_refresh"])) == (2, 11)
    optimizer.begin_update(12)
    assert all(subspace.layer.full_gradient is None for subspace in adapter.subspaces)


def test_more_gradients_for_a_refresh():
    """`--refresh_accumulation`: the basis is that of the mean over further batches; the update sees its own batch."""
    adapter, model, optimizer = forms("adamw", 0.5, refresh_accumulation=3)[0]
    given = [micro_batches[0] for micro_batches in batches(3)]
    optimizer.begin_update(0)
    assert optimizer.wants_extra_batches() == 2
    for batch in given[:2]:
        token_loss_sum(model, batch).backward()
        optimizer.observe_gradients()
        optimizer.zero_grad()
    token_loss_sum(model, given[2]).backward()
    optimizer.grad_norm()
    optimizer.take_bases()

    plain = small_llama()
    full = []
    for batch in given:
        plain.zero_grad()
        token_loss_sum(plain, batch).backward()
        full.append(plain.model.layers[1].mlp.up_proj.weight.grad.clone())
    subspace = next(each for each in adapter.subspaces if each.layer is model.model.layers[1].mlp.up_proj)
    left = subspace.side == LEFT
    u, _, vt = torch.linalg.svd(torch.stack(full).mean(0), full_matrices=False)
    expected = u[:, :4] @ u[:, :4].T if left else vt[:4].T @ vt[:4]
    basis = subspace.basis.data if left else subspace.basis.data.T
    torch.testing.assert_close(basis @ basis.T, expected, rtol=0, atol=1e-8)
    own = basis.T @ full[2] if left else full[2] @ basis
    torch.testing.assert_close(subspace.trained.grad, -0.5 * own, rtol=0, atol=1e-10)
    optimizer.begin_update(1)
    assert optimizer.wants_extra_batches() == 0
