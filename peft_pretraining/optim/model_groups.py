"""Parameter groups of a whole model: what is projected and what is not, and rates of their own by role."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from peft_pretraining.models.targets import target_linears
from peft_pretraining.optim.group_record import GroupRecord

TARGET_MODULES = ("attn", "attention", "mlp")
"""Parts of the names of attention layers and MLPs, as pre-training has them."""


def model_groups(model: nn.Module, target_modules: Sequence[str], projection: dict[str, Any]) -> list[dict[str, Any]]:
    """Groups of named parameters that are trained: those that are updated as they are, and the weights of the target
    layers with the settings of `projection`. Raises `ValueError` if no trained layer matches."""
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    targets = {linear.weight for linear in target_linears(model, names).values()}
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    projected = [(name, param) for name, param in trained if param in targets]
    if not projected:
        raise ValueError(f"target_modules {','.join(names)}: the weights of these layers are frozen")
    regular = [(name, param) for name, param in trained if param not in targets]
    groups = [{"params": regular}] if regular else []
    return [*groups, {"params": projected, **projection}]


ROLES = ("matrices", "factors", "embedding", "head", "norms", "others")
"""What a parameter is to a language model.

`matrices`: the weights of the target layers; `factors`: what a layer with low-rank factors trains beside its weight and
bias; `embedding`: token and position tables; `head`: the matrix before the logits, tied ones included, or a
classifier's; `norms`: all other vectors, biases too; `others`: the rest.
"""


def roles_of(model: nn.Module, matrices: Collection[str]) -> dict[str, str]:
    """The role of each parameter, by the name under which `named_parameters` gives it.

    `matrices` are the names of the target layers' weights. A head that is tied to the embedding is one tensor, and has
    the head's role.

        >>> model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "norm": nn.LayerNorm(4), "lm_head": nn.Linear(4, 9)})
        >>> {name: role for name, role in roles_of(model, ()).items() if "norm" not in name}
        {'embed.weight': 'embedding', 'lm_head.weight': 'head', 'lm_head.bias': 'norms'}
    """
    of_head = _head(model)
    tables: set[Tensor] = set()
    factors: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            tables.add(module.weight)
        if hasattr(module, "lora_A"):
            factors |= {p for name, p in module.named_parameters(recurse=False) if name not in ("weight", "bias")}
    roles = {}
    for name, param in model.named_parameters():
        if name in matrices:
            roles[name] = "matrices"
        elif param in factors:
            roles[name] = "factors"
        elif param in of_head:
            roles[name] = "head"
        elif param in tables:
            roles[name] = "embedding"
        else:
            roles[name] = "norms" if param.ndim < 2 else "others"
    return roles


def _head(model: nn.Module) -> set[nn.Parameter]:
    """The weight of the output embeddings, where transformers' models say which that is or by the name; without any,
    all matrices outside a transformers model's body, which are a classifier's."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else dict(model.named_modules()).get("lm_head")
    if head is not None:
        return {head.weight}
    body = getattr(model, "base_model", model)
    inside = set(body.parameters()) if isinstance(body, nn.Module) else set(model.parameters())
    return {param for param in model.parameters() if param.ndim > 1 and param not in inside}


_ORDINARY_LIFTS = (None, "identity", "project_back")


def record_groups(model: nn.Module, optimizer: Optimizer, rule: str) -> list[GroupRecord]:
    """One record for all parameter groups with equal settings: how many weights of which role, over all devices, and
    their rule, rank, peak rate and decay. `rule`: the name of that of groups that do not name another one."""
    roles = roles_of(model, matrices=())
    role_by_param = {param: roles[name].replace("others", "matrices") for name, param in model.named_parameters()}
    found: dict[GroupRecord, dict[str, int]] = {}
    for group in optimizer.param_groups:
        own, lift = group.get("rule"), group.get("lift")
        settings = GroupRecord(
            {},
            rule=rule if own == optimizer.defaults.get("rule") else str(getattr(own, "name", own)),
            rate=float(group.get("initial_lr", group["lr"])),
            weight_decay=float(group["weight_decay"]),
            rank=group.get("rank"),
            lift=None if lift in _ORDINARY_LIFTS else str(lift),
        )
        held = found.setdefault(settings, {})
        for param in group["params"]:
            if param.requires_grad:
                role = role_by_param.get(param, "matrices")
                held[role] = held.get(role, 0) + param.numel()
    return [
        dataclasses.replace(settings, weights={role: held[role] for role in ROLES if role in held})
        for settings, held in found.items()
        if held
    ]


def role_settings(
    *,
    adam_lr: float | None = None,
    head_lr: float | None = None,
    embed_lr: float | None = None,
    norm_lr: float | None = None,
    head_weight_decay: float | None = None,
    embed_weight_decay: float | None = None,
    norm_weight_decay: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Settings of the roles that are to have their own, for `split_by_role`.

    Rates that are not given are `adam_lr`, and without that the optimizer's; decays are the optimizer's.

        >>> role_settings(adam_lr=1e-3, head_lr=5e-4, norm_weight_decay=0.0)["norms"]
        {'lr': 0.001, 'weight_decay': 0.0}
    """
    given = {
        "embedding": (embed_lr, embed_weight_decay),
        "head": (head_lr, head_weight_decay),
        "norms": (norm_lr, norm_weight_decay),
        "others": (None, None),
    }
    settings: dict[str, dict[str, Any]] = {}
    for role, (rate, decay) in given.items():
        rate = adam_lr if rate is None else rate
        own = {"lr": rate, "weight_decay": decay}
        if own := {name: value for name, value in own.items() if value is not None}:
            settings[role] = own
    return settings


def split_by_role(
    group: Mapping[str, Any], roles: Mapping[str, str], settings: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A group of named parameters, and beside it one for each role in `settings`, which has these in addition.

    Parameters keep their order, and with no settings the group is all there is: optimizers that were saved before there
    were roles go on. A rate is what schedules are relative to, too (`initial_lr`).

        >>> import torch
        >>> one, two = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, 3))
        >>> group = {"params": [("norm", one), ("lm_head", two)], "weight_decay": 0.1}
        >>> split = split_by_role(group, {"norm": "norms", "lm_head": "head"}, {"head": {"lr": 0.5}})
        >>> [([name for name, _ in each.pop("params")], each) for each in split]
        [(['norm'], {'weight_decay': 0.1}), (['lm_head'], {'weight_decay': 0.1, 'lr': 0.5, 'initial_lr': 0.5})]
    """
    if unknown := sorted(settings.keys() - set(ROLES)):
        raise ValueError(f"a role must be one of {', '.join(ROLES)}, got {', '.join(unknown)}")
    named = list(group["params"])
    parts: list[dict[str, Any]] = [{**group, "params": [each for each in named if roles[each[0]] not in settings]}]
    for role in ROLES:
        own = dict(settings.get(role, {}))
        if "lr" in own:
            own["initial_lr"] = own["lr"]
        if own:
            parts.append({**group, "params": [each for each in named if roles[each[0]] == role], **own})
    return [part for part in parts if part["params"]]
