"""Embedding, head and norms have rates and decays of their own, in every method."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import helpers
import pytest
import torch
import torch.distributed as dist
from conformance.runs import (
    BASE,
    CASES,
    SHAPE,
    TOTAL_BATCH,
    UPDATES,
    VOCABULARY,
    Case,
    Runs,
    assert_resumes,
    assert_same_weights,
    inside_backward,
    rounding,
)
from conftest import write_model
from torch import Tensor

from peft_pretraining.checkpoint.checkpointer import Checkpointer
from peft_pretraining.config import Config
from peft_pretraining.methods import load_method
from peft_pretraining.optim import LowRankOptimizer
from peft_pretraining.optim.model_groups import describe_groups, roles_of
from peft_pretraining.training import build

RATE = BASE["lr"]
OWN = {
    **{"head_lr": 0.003, "embed_lr": 0.02, "norm_lr": 0.005},
    **{"head_weight_decay": 0.1, "embed_weight_decay": 0.2, "norm_weight_decay": 0.3},
}
EXPECTED = {"head": (0.003, 0.1), "embedding": (0.02, 0.2), "norms": (0.005, 0.3)}
"""Role -> the rate and decay that `OWN` gives it."""
ONE_UPDATE = {"num_training_steps": 1, "warmup_steps": 0, "eval_every": 10}
EACH_METHOD = [case for case in CASES if case.is_first]
each_method = pytest.mark.parametrize("case", EACH_METHOD, ids=str)


def quick(*methods: str, cases: Sequence[Case] = EACH_METHOD):
    """Runs a test for every case; all but the first of these methods wait for the slow tier."""
    marks = {case: [] if case.is_first and case.method in methods else [pytest.mark.slow] for case in cases}
    return pytest.mark.parametrize("case", [pytest.param(case, id=str(case), marks=marks[case]) for case in cases])


one_of_each_kind = quick("full_rank", "galore", "switchlora")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("roles"))


@dataclass
class Trained:
    """A run in this process, of which nothing is saved."""

    run: Any
    before: dict[str, Tensor]
    after: dict[str, Tensor]

    @property
    def roles(self) -> dict[str, str]:
        """Of the trained weights."""
        targets = getattr(self.run.config.method, "target_modules", ("self_attn", "mlp"))
        matrices = {name for name, value in self.after.items() if value.ndim > 1 and any(t in name for t in targets)}
        matrices = {name for name in matrices if "lora_" not in name}
        return {name: role for name, role in roles_of(self.run.model, matrices).items() if name in self.after}

    def group_of(self, name: str) -> dict[str, Any]:
        param = self.run.model.get_parameter(name)
        (group,) = [group for group in self.run.optimizer.param_groups if any(p is param for p in group["params"])]
        return group


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    """A function that trains by a command line, each once."""
    folder, done = tmp_path_factory.mktemp("trained"), {}

    def train(case: Case, **changes: Any) -> Trained:
        key = (case, tuple(sorted(changes.items())))
        if key not in done:
            done[key] = _trained(runs.command(case, folder / str(len(done)), **changes))
        return done[key]

    return train


def _trained(argv: list[str]) -> Trained:
    train, found = build.train, []

    def observed(run: Any) -> int:
        before = weights(run.model)
        code = train(run)
        found.append(Trained(run, before, weights(run.model)))
        return code

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "save_last", lambda *_: None)
        patch.setattr(build, "train", observed)
        assert helpers.run(argv) == 0
    return found[0]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def decays_first(optimizer: torch.optim.Optimizer) -> bool:
    """Before the update; projected ones decay after it, as GaLore's do."""
    return not isinstance(optimizer, LowRankOptimizer) or optimizer.rule.decays_first


def assert_moved(ours: Trained, plain: Trained, expected: dict[str, tuple[float, float]]) -> None:
    """One update of each role in `expected` is `plain`'s, without decay, at its rate and decay; all else is `plain`'s
    to the bit."""
    seen = set()
    for name, role in ours.roles.items():
        if role not in expected:
            assert torch.equal(ours.after[name], plain.after[name]), name
            continue
        rate, decay = expected[role]
        start, moved = plain.before[name], plain.after[name] - plain.before[name]
        kept, moved = 1 - rate * decay, moved * (rate / plain.group_of(name)["initial_lr"])
        wanted = start * kept + moved if decays_first(plain.run.optimizer) else (start + moved) * kept
        torch.testing.assert_close(ours.after[name], wanted, rtol=0, atol=1e-14, msg=lambda text, n=name: n + text)
        assert moved.abs().max() > 1e-5, name
        seen.add(role)
    assert seen == expected.keys()


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


@one_of_each_kind
def test_adam_lr_is_the_rate_of_all_that_have_none(trained, case):
    plain = trained(case, **ONE_UPDATE)
    ours = trained(case, **ONE_UPDATE, adam_lr=0.004, head_lr=0.003)
    assert_moved(ours, plain, {"embedding": (0.004, 0.0), "head": (0.003, 0.0), "norms": (0.004, 0.0)})


@quick("galore", "lora", cases=[case for case in EACH_METHOD if "target_modules" in case.spec.own])
def test_what_is_no_target_has_adam_lr(trained, case):
    """Attention, where MLPs alone are projected or have factors."""
    changes = {**ONE_UPDATE, "target_modules": "mlp"}
    plain, ours = trained(case, **changes), trained(case, **changes, adam_lr=0.004)
    assert_moved(ours, plain, dict.fromkeys(("embedding", "head", "norms", "others"), (0.004, 0.0)))


@pytest.mark.parametrize("clip", [0, 0.1])
@one_of_each_kind
def test_settings_that_are_the_defaults_change_nothing(trained, case, clip):
    """Over several updates: no bit, but for the order in which a norm of projected gradients is summed for clipping."""
    changes = {"clip_grad_norm": clip, "weight_decay": 0.1}
    own = {name: RATE if name.endswith("lr") else 0.1 for name in OWN}
    plain, ours = trained(case, **changes), trained(case, **changes, **own)
    assert len(ours.run.optimizer.param_groups) > len(plain.run.optimizer.param_groups)
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
    elif "rank" in case.spec.own:
        apart = [[name for name in trained_names if name not in targets], targets]
    else:
        apart = [trained_names]
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


# Stopping and going on.


@quick("galore", "switchlora", cases=CASES)
def test_stopped_and_resumed_changes_no_bit(runs, case, tmp_path):
    assert_resumes(runs, case, tmp_path / "run", 3, **OWN)


@pytest.mark.parametrize("method", ["full_rank", "lora"])
def test_going_on_with_another_rate_is_said(runs, tmp_path, capsys, method):
    """And done, also where the run was begun without one: the optimizer's state does not depend on its groups."""
    (case,) = [case for case in EACH_METHOD if case.method == method]
    argv = [*runs.command(case, tmp_path / "run", embed_lr=0.02), *helpers.RESUME]
    helpers.stop_after(3, argv)
    capsys.readouterr()
    resumed = _trained([*argv, "--embed_lr", "0.03", "--norm_weight_decay", "0.3"])
    said = capsys.readouterr().err
    assert "resuming with another --embed_lr: 0.03 instead of 0.02" in said
    assert "resuming with another --norm_weight_decay: 0.3 instead of None" in said
    assert "embedding 512: adamw, rate 0.03, weight decay 0\n" in said
    assert resumed.group_of("model.embed_tokens.weight")["initial_lr"] == 0.03
    assert resumed.group_of("model.norm.weight")["weight_decay"] == 0.3
    assert resumed.group_of("lm_head.weight")["initial_lr"] == RATE


# Several devices.

_LAYOUTS = {
    "ddp": ({"distributed_type": "ddp"}, [case for case in CASES if case.is_first or case.rule == "adam_zero"]),
    "fsdp": ({"distributed_type": "fsdp"}, [case for case in EACH_METHOD if case.spec.allows.fsdp]),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_are_one(runs, tmp_path):
    """One launch for all; every process says the whole number of weights."""
    names = [(layout, case) for layout, (_, cases) in _LAYOUTS.items() for case in cases]
    commands = [
        runs.command(case, tmp_path / f"{layout} {case}", batch_size=TOTAL_BATCH // 2, **_LAYOUTS[layout][0], **OWN)
        for layout, case in names
    ]
    (tmp_path / "cases.json").write_text(json.dumps([{"argv": argv} for argv in commands]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, helpers.__file__, str(tmp_path / "cases.json")],
        env=helpers.child_environment(),
        cwd=helpers.PROJECT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-30000:]
    assert done.stderr.count("head 512: ") == len(names)
    for layout, case in names:
        one = runs(case, **OWN)
        checkpoint = tmp_path / f"{layout} {case}" / one.checkpoint.name
        assert_same_weights(checkpoint, one.checkpoint, rounding(one.optimizer))


# What is said of it.


@each_method
def test_the_log_says_what_each_group_got(trained, case):
    run = trained(case, **ONE_UPDATE, **OWN).run
    lines = describe_groups(run.model, run.optimizer, "adamw")
    own = ["norms 80: adamw, rate 0.005, weight decay 0.3", "embedding 512: adamw, rate 0.02, weight decay 0.2"]
    others = [line for line in lines if line not in (*own, "head 512: adamw, rate 0.003, weight decay 0.1")]
    assert len(lines) == 4 and len(others) == 1
    trained_count = sum(param.numel() for param in run.model.parameters() if param.requires_grad) - 80 - 2 * 512
    what = "factors" if "lora_alpha" in case.spec.own or "lora_dropout" in case.spec.own else "matrices"
    rank = f" in rank {case.settings['rank']}" if what == "matrices" and "rank" in case.spec.own else ""
    assert others == [f"{what} {trained_count / 1000:.1f}k: adamw{rank}, rate 0.01, weight decay 0"]


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
    return describe_groups(run.model, run.optimizer, run.config.optimizer.optimizer)
