"""Refreshes of GoLore's adapter form inside the backward pass: what they hold, and that they choose the same bases."""

import pytest
import torch
from live_bytes import peak_bytes
from test_golore_adapter import batches, config, forms, train_step
from transformers import LlamaConfig, LlamaForCausalLM

from peft_pretraining.methods.golore_adapter.method import GoLoreAdapter
from peft_pretraining.models.loss import token_loss_sum
from peft_pretraining.nn.low_rank_linear import LowRankLinear


def update(form, step, given, announced=True, watch=lambda: None):
    """One update, its micro-batches announced as the training loop does, or not; with the extra batches that it wants,
    which are the same here."""
    method, model, optimizer = form

    def passes():
        for index, batch in enumerate(given):
            if announced:
                optimizer.begin_micro_batch(index, len(given))
            (token_loss_sum(model, batch) / 44).backward()
            watch()

    def backward():
        for _ in range(optimizer.wants_extra_batches()):
            passes()
            optimizer.observe_gradients()
            optimizer.zero_grad()
        passes()

    return train_step(method, model, optimizer, step, backward, 1e-2)


def held(adapters):
    """Layers that have a gradient of their whole weight."""
    found = [each.layer.full_gradient for each in adapters if each.gathers_whole]
    return [gradient for gradient in found if any(gradient.stride())]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("rand_ratio, precision", [(2.0, "auto"), (0.0, "auto"), (2.0, "mixed"), (0.0, "mixed")])
@pytest.mark.parametrize("refresh_accumulation", [1, 2])
def test_the_same_bits_as_from_gradients_that_are_kept(micro_batches, rand_ratio, precision, refresh_accumulation):
    settings = {"precision": precision, "rand_ratio": rand_ratio, "refresh_accumulation": refresh_accumulation}
    ends = []
    for announced in (True, False):
        form = forms("adamw", 0.5, update_proj_gap=2, **settings)[0]
        norms = [float(update(form, step, given, announced)) for step, given in enumerate(batches(5, micro_batches))]
        ends.append((norms, [tensor.clone() for tensor in form[1].state_dict().values()]))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(*pair) for pair in zip(ends[0][1], ends[1][1], strict=True))


def test_one_gradient_of_a_whole_weight_exists_at_a_time(monkeypatch):
    """At the end of the backward pass none; with more micro-batches, and in extra batches, all add up."""
    gather, alive = LowRankLinear.gather_gradient, []
    for refresh_accumulation, micro_batches, most in ((1, 1, 2), (1, 2, 14), (2, 1, 14)):
        form = forms("adamw", 0.5, rand_ratio=2.0, refresh_accumulation=refresh_accumulation)[0]
        adapters = form[0].subspaces

        def gathers(layer, *given, adapters=adapters):
            gather(layer, *given)
            alive.append(len(held(adapters)))

        monkeypatch.setattr(LowRankLinear, "gather_gradient", gathers)
        alive.clear()
        watch = lambda adapters=adapters: alive.append(len(held(adapters)))  # noqa: E731
        update(form, 0, next(batches(1, micro_batches)), watch=watch)
        assert max(alive) <= most and (most == 2 or max(alive) == most) and alive[-1] == 0
        assert {int(form[2].state[each.trained]["refreshes"]) for each in adapters} == {1}


def test_drawn_bases_need_no_gradient_of_a_whole_weight():
    """Where products are in bfloat16; R is that of the gradient which is added up otherwise."""
    found = []
    for precision in ("mixed", "fp32"):
        adapter, model, optimizer = forms("adamw", 0.5, rand_ratio=0.0, precision=precision)[0]
        optimizer.begin_update(0)
        for batch in next(batches(1, 2)):
            (token_loss_sum(model, batch) / 44).backward()
        if precision == "mixed":
            low = [each.layer.full_gradient for each in adapter.subspaces]
        optimizer.grad_norm()
        found.append([param.grad for param in model.parameters() if param.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert [each.shape for each in low] == [each.trained.shape for each in adapter.subspaces]


@pytest.mark.parametrize("rand_ratio", [2.0, 0.0])
def test_a_refresh_takes_little_more_memory_than_other_updates(rand_ratio):
    """Deep and narrow, so that a few gradients do not weigh: below what the frozen weights' gradients would add."""
    form = deep(rand_ratio)
    adapters = form[0].subspaces
    given = [{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}]
    peaks = []
    for step in range(2):
        with peak_bytes() as peak:
            update(form, step, given)
        peaks.append(peak.bytes)
    whole = sum(each.layer.frozen_weight.nbytes for each in adapters)
    low = sum(each.trained.nbytes + each.basis.nbytes for each in adapters)
    assert peaks[0] - peaks[1] < 0.25 * whole + low < 0.6 * whole


def deep(rand_ratio):
    torch.manual_seed(0)
    shape = {"vocab_size": 8, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 12}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=1, max_position_embeddings=8))
    method = GoLoreAdapter(
        config(rank=2, update_proj_gap=10, precision="mixed", rand_ratio=rand_ratio, num_training_steps=50)
    )
    model = method.convert(model)
    return method, model, method.build_optimizer(model)


def test_a_second_backward_pass_after_the_last_is_refused():
    _, model, optimizer = forms("adamw", 0.5)[0]
    (given,) = next(batches(1, 1))
    optimizer.begin_update(0)
    optimizer.begin_micro_batch(0, 1)
    token_loss_sum(model, given).backward()
    with pytest.raises(RuntimeError, match=r"has taken its basis of .* already: call begin_micro_batch"):
        token_loss_sum(model, given).backward()
