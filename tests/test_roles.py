"""Embedding, head and norms have rates and decays of their own, in every method.

How runs with them are stopped, continued and divided over devices: test_roles_runs.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Set
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conformance.runs import CASES, SHAPE, UPDATES, VOCABULARY, Case, Runs, inside_backward
from conftest import write_model
from role_helpers import (
    EACH_METHOD,
    EXPECTED,
    ONE_UPDATE,
    OWN,
    RATE,
    Trained,
    assert_moved,
    each_method,
    one_of_each_kind,
    quick,
    train,
)

from peft_pretraining.config import Config
from peft_pretraining.flags import ConfigError
from peft_pretraining.methods import load_method
from peft_pretraining.optim.model_groups import record_groups, roles_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("roles"))


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    """A function that trains by a command line, each once."""
    folder, done = tmp_path_factory.mktemp("trained"), {}

    def once(case: Case, **changes: Any) -> Trained:
        key = (case, tuple(sorted(changes.items())))
        if key not in done:
            done[key] = train(runs.command(case, folder / str(len(done)), **changes))
        return done[key]

    return once


# What each setting does.


@each_method
def test_every_rate_and_decay_acts(trained, case):
    plain = trained(case, **ONE_UPDATE)
    assert_moved(trained(case, **ONE_UPDATE, **OWN), plain, EXPECTED)


@quick("full_rank")
@pytest.mark.parametrize("name", OWN)
def test_a_setting_is_of_its_role_alone(trained, case, name):
    role = {"head": "head", "embed": "embedding", "norm": "norms"}[name.split("_")[0]]
    rate, decay = EXPECTED[role]
    expected = {role: (rate, 0.0) if name.endswith("lr") else (RATE, decay)}
    assert_moved(trained(case, **ONE_UPDATE, **{name: OWN[name]}), trained(case, **ONE_UPDATE), expected)


def without_tables_of_its_own(case: Case, expected: dict[str, Any], given: Set[str] = frozenset()) -> dict[str, Any]:
    """What `--adam_lr` is of: not of a head or an embedding that is updated as the matrices are, beside which it is."""
    own = case.spec.tables if "target_modules" in case.spec.own else frozenset()
    return {role: value for role, value in expected.items() if role in given or role not in own}


@one_of_each_kind
def test_adam_lr_is_the_rate_of_all_that_have_none(trained, case):
    plain = trained(case, **ONE_UPDATE)
    ours = trained(case, **ONE_UPDATE, adam_lr=0.004, head_lr=0.003)
    expected = {"embedding": (0.004, 0.0), "head": (0.003, 0.0), "norms": (0.004, 0.0)}
    assert_moved(ours, plain, without_tables_of_its_own(case, expected, given={"head"}))


@quick("galore", "lora", cases=[case for case in EACH_METHOD if "target_modules" in case.spec.own])
def test_what_is_no_target_has_adam_lr(trained, case):
    """Attention, where MLPs alone are projected or have factors."""
    changes = {**ONE_UPDATE, "target_modules": "mlp"}
    plain, ours = trained(case, **changes), trained(case, **changes, adam_lr=0.004)
    expected = dict.fromkeys(("embedding", "head", "norms", "others"), (0.004, 0.0))
    assert_moved(ours, plain, without_tables_of_its_own(case, expected))


@pytest.mark.parametrize("clip", [0, 0.1])
@one_of_each_kind
def test_settings_that_are_the_defaults_change_nothing(trained, case, clip):
    """Over several updates: no bit, but for the order in which a norm of projected gradients is summed for clipping."""
    changes = {"clip_grad_norm": clip, "weight_decay": 0.1}
    own = {name: RATE if name.endswith("lr") else 0.1 for name in OWN}
    if case.method == "adam_mini":  # whose vectors have no decay by default
        own["norm_weight_decay"] = 0.0
    plain, ours = trained(case, **changes), trained(case, **changes, **own)
    assert len(ours.run.optimizer.param_groups) > len(plain.run.optimizer.param_groups) - len(case.spec.tables)
    atol = 1e-13 if clip and case.spec.allows.projected_gradient else 0
    for name, value in ours.after.items():
        torch.testing.assert_close(value, plain.after[name], rtol=0, atol=atol, msg=lambda text, n=name: n + text)


@each_method
def test_without_settings_groups_are_as_they_were(trained, case):
    plain = trained(case, **ONE_UPDATE)
    names = {param: name for name, param in plain.run.model.named_parameters()}
    groups = [[names[param] for param in group["params"]] for group in plain.run.optimizer.param_groups]
    trained_names = list(plain.after)
    factors = [name for name in trained_names if "lora_" in name]
    targets = [name for name in trained_names if "self_attn" in name or "mlp" in name]
    if factors:
        sides = [[name for name in factors if name.endswith(side)] for side in ("lora_A", "lora_B")]
        apart = [*(side for side in sides if side), [name for name in trained_names if name not in factors]]
    elif "target_modules" in case.spec.own:
        tables = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}
        own = [[tables[role]] for role in ("embedding", "head") if role in case.spec.tables]
        others = [name for name in trained_names if name not in targets and [name] not in own]
        apart = [others, *own, targets]
    else:
        apart = [trained_names]
    assert sorted(name for group in groups for name in group) == sorted(trained_names)
    if case.method == "adam_mini":  # which tells kinds of blocks apart: heads, rows, and vectors
        heads = [name for name in trained_names if "q_proj" in name or "k_proj" in name]
        vectors = [name for name in trained_names if "norm" in name]
        apart = [[name for name in trained_names if name not in (*heads, *vectors)], heads, vectors]
    assert groups == apart


@one_of_each_kind
def test_the_schedule_multiplies_all(trained, case):
    run = trained(case, **OWN).run
    rates = {group["initial_lr"]: group["lr"] for group in run.optimizer.param_groups}
    multiplier = run.config.rate_multiplier(UPDATES - 1)
    assert rates.keys() == {RATE, 0.003, 0.02, 0.005} and 0.1 <= multiplier < 0.2
    assert rates == {rate: pytest.approx(rate * multiplier) for rate in rates}


# What only some methods have.


@quick("switchlora", cases=[case for case in EACH_METHOD if "dense_lr_ratio" in case.spec.own])
def test_a_ratio_is_of_what_has_no_rate_of_its_own(trained, case):
    plain = trained(case, **ONE_UPDATE)
    ours = trained(case, **ONE_UPDATE, dense_lr_ratio=0.5, head_lr=0.003, norm_weight_decay=0.3)
    expected = {"head": (0.003, 0.0), "embedding": (RATE / 2, 0.0), "norms": (RATE / 2, 0.3)}
    assert_moved(ours, plain, expected)


def test_a_ratio_of_nothing_is_said(trained, capsys):
    trained(Case("lora", "adamw"), **ONE_UPDATE, **OWN, dense_lr_ratio=0.4)
    assert "for all that has no factors has a rate of its own: --dense_lr_ratio" in capsys.readouterr().err
    trained(Case("lora", "adamw"), **ONE_UPDATE, head_lr=0.003, norm_lr=0.003, dense_lr_ratio=0.5)
    assert "without effect" not in capsys.readouterr().err


def test_a_trained_scale_is_no_norm(trained):
    changes = {**ONE_UPDATE, "train_scaling": True}
    plain, ours = (trained(Case("lora", "adamw"), **changes, **own) for own in ({}, OWN))
    assert {ours.roles[name] for name in ours.after if name.endswith("scaling")} == {"factors"}
    assert_moved(ours, plain, EXPECTED)


@quick("galore", cases=[case for case in EACH_METHOD if case.spec.allows.per_layer])
def test_inside_the_backward_pass(trained, case):
    changes = {**inside_backward(case), **OWN}
    at_once, ours = trained(case, **changes), trained(case, **changes, per_layer=True)
    for name, value in ours.after.items():
        torch.testing.assert_close(value, at_once.after[name], rtol=0, atol=1e-9, msg=lambda text, n=name: n + text)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def config_of(runs: Runs, tmp_path, case: Case, **changes: Any) -> Config:
    from peft_pretraining.config import cli

    return cli.load(runs.command(case, tmp_path / "unused", **changes), environ={}).config


@pytest.mark.parametrize("rule", ["adamw", "adam_zero"])
def test_full_rank_is_adamw_with_groups_made_by_hand(runs, tmp_path, one_rank, rule):
    config = config_of(runs, tmp_path, Case("full_rank", rule), **OWN, weight_decay=0.05)
    shape = json.loads(write_model(tmp_path / "llama.json", vocab_size=VOCABULARY, **SHAPE).read_text())
    ours, theirs = (build_tiny(shape) for _ in range(2))
    optimizer = load_method("full_rank")(config).build_optimizer(ours)
    assert type(optimizer).__name__ == ("ShardedOptimizer" if rule == "adam_zero" else "LowRankOptimizer")
    roles, named = roles_of(theirs, ()), dict(theirs.named_parameters())
    groups = [
        {"params": [named[name] for name in named if roles[name] == role], "lr": rate, "weight_decay": decay}
        for role, (rate, decay) in {"others": (RATE, 0.05), **EXPECTED}.items()
    ]
    reference = torch.optim.AdamW(groups, eps=config.rule.adam_eps)
    half = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 0.5**step) for each in (optimizer, reference)]
    for step in range(5):
        tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(step))
        for model, each in ((ours, optimizer), (theirs, reference)):
            each.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            each.step()
        for schedule in half:
            schedule.step()
    for name, param in ours.named_parameters():
        torch.testing.assert_close(param, named[name], rtol=0, atol=1e-13, msg=lambda text, n=name: n + text)


def build_tiny(shape: dict[str, Any]) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape)).double()


# What updates head and embedding.

TABLES = {"head_optimizer": "lm_head.weight", "embed_optimizer": "model.embed_tokens.weight"}


@quick("full_rank", "galore", "muon", cases=[case for case in EACH_METHOD if case.spec.allows.tables])
def test_tables_can_be_the_methods(trained, case):
    """With the objects of the matrices, and at their rate, where they are not what a method has for all weights."""
    run = trained(case, **ONE_UPDATE, head_optimizer="method", embed_optimizer="method", adam_lr=0.004).run
    matrix = run.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    for name in TABLES.values():
        group, own = (run.optimizer.group_of(each) for each in (run.model.get_parameter(name), matrix))
        assert (group["rule"], group["lift"], group["rank"]) == (own["rule"], own["lift"], own["rank"])
        assert own["initial_lr"] == RATE
        assert group["initial_lr"] == (RATE if "target_modules" in case.spec.own else 0.004)


@quick("full_rank", "stable_spam", "scale", cases=[case for case in EACH_METHOD if case.spec.tables])
@pytest.mark.parametrize("setting", TABLES)
def test_tables_can_be_adamws(trained, case, setting):
    run = trained(case, **ONE_UPDATE, **{setting: "adamw"}).run
    roles = {"head_optimizer": "head", "embed_optimizer": "embedding"}
    rules = {key: run.optimizer.group_of(run.model.get_parameter(name))["rule"] for key, name in TABLES.items()}
    of_matrices = run.optimizer.group_of(run.model.get_parameter("model.layers.0.mlp.up_proj.weight"))["rule"]
    assert rules.pop(setting) in ("adamw", "torch_adamw")
    ((other, rule),) = rules.items()
    assert rule == (of_matrices if roles[other] in case.spec.tables else "adamw")


def test_the_heads_adamw_is_the_one_of_adamw_runs(trained):
    """Whatever updates the rest."""
    changes = {**ONE_UPDATE, "clip_grad_norm": 0, "lr": 0.01}
    ours = trained(Case("full_rank", "lion"), **changes, head_optimizer="adamw")
    reference = trained(Case("full_rank", "adamw"), **changes)
    assert torch.equal(ours.after["lm_head.weight"], reference.after["lm_head.weight"])
    assert not torch.equal(ours.after["model.norm.weight"], reference.after["model.norm.weight"])


def test_what_a_method_has_no_way_to_update_is_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match="--head_optimizer method: lora does not declare that it can update the head"):
        config_of(runs, tmp_path, Case("lora", "adamw"), head_optimizer="method")


# A head that is tied to the embedding.


@pytest.fixture(scope="module")
def tied(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("tied") / "llama.json"
    return write_model(path, vocab_size=VOCABULARY, tie_word_embeddings=True, **SHAPE)


@one_of_each_kind
def test_a_tied_embedding_is_the_head(trained, tied, case):
    changes = {**ONE_UPDATE, "model_config": tied}
    plain, ours = trained(case, **changes), trained(case, **changes, head_lr=0.003, head_weight_decay=0.1)
    assert ours.roles["model.embed_tokens.weight"] == "head" and "lm_head.weight" not in ours.after
    assert_moved(ours, plain, {"head": (0.003, 0.1)})


@one_of_each_kind
def test_what_a_tied_embedding_is_not_is_said(trained, tied, case, capsys):
    changes = {**ONE_UPDATE, "model_config": tied}
    plain = trained(case, **changes)
    capsys.readouterr()
    ours = trained(case, **changes, embed_lr=0.003, embed_weight_decay=0.1)
    assert "(a tied embedding is the head): --embed_lr, --embed_weight_decay\n" in capsys.readouterr().err
    assert_moved(ours, plain, {})


# What is said of it.


_RULES = {
    **dict.fromkeys(("full_rank", "lora", "relora", "switchlora", "golore_adapter"), ("adamw", "adamw")),
    **dict.fromkeys(("galore", "golore", "online_subspace_descent"), ("adamw in rank 4", "adamw")),
    "apollo": ("adamw in rank 4, lift scaled_gradient", "adamw"),
    "apollo_mini": ("adamw in rank 1, lift scaled_gradient", "adamw"),
    "fira": ("adamw in rank 4, lift scaled_residual", "adamw"),
    "alice": ("alice in rank 4, lift compensated", "adamw"),
    **{name: (name, name) for name in ("stable_spam", "adam_mini")},
}
"""Method -> what is said of its matrices or factors, and of the rest, where that is not its name and AdamW."""


@each_method
def test_the_log_says_what_each_group_got(trained, case):
    """Each role's rule, rate and decay; of tables that are the method's, its rule."""
    run = trained(case, **ONE_UPDATE, **OWN).run
    lines = list(map(str, record_groups(run.model, run.optimizer, "adamw")))
    found = {}
    for line in lines:
        roles, _, settings = line.partition(": ")
        found |= {role.rpartition(" ")[0]: settings for role in roles.split(", ")}
    what = "factors" if "lora_alpha" in case.spec.own or "lora_dropout" in case.spec.own else "matrices"
    of_method, others = _RULES.get(case.method, (case.method, "adamw"))
    if case.spec.tables and "target_modules" in case.spec.own:  # its vectors are AdamW's
        rules = {role: of_method if role in case.spec.tables else "adamw" for role in EXPECTED}
    else:
        rules = dict.fromkeys(EXPECTED, others)
    for role, (rate, decay) in EXPECTED.items():
        assert found[role] == f"{rules[role]}, rate {rate:g}, weight decay {decay:g}", lines
    assert found[what] == f"{of_method}, rate 0.01, weight decay 0" and len(lines) == 4


def test_the_log_of_rates_that_are_the_same(trained):
    """One line, whatever groups there are; the name of the rule is the command line's."""
    for case in CASES:
        if case.method == "full_rank":
            run = trained(case, **ONE_UPDATE).run
            settings = f"{case.rule}, rate {run.config.optimizer.lr:g}, weight decay 0"
            assert _lines(run) == [f"matrices 5.1k, embedding 512, head 512, norms 80: {settings}"]
    run = trained(Case("lora", "adamw"), **ONE_UPDATE, lora_plus_ratio=4).run
    assert [line[:14] for line in _lines(run)] == ["factors 1.0k, ", "factors 1.2k: "]


def _lines(run: Any) -> list[str]:
    return list(map(str, record_groups(run.model, run.optimizer, run.config.optimizer.optimizer)))
