"""What a training method and an update rule say about themselves: the types of their `settings.py`.

Flags, defaults, `--help`, the warnings about settings without effect, the identity in checkpoints and the tables of the
documentation follow from these. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft_pretraining.flags.converters import string
from peft_pretraining.flags.settings import Flag, ParsedFlag, setting

if TYPE_CHECKING:
    from peft_pretraining.config import Config


@dataclass(frozen=True)
class MethodSettings:
    """The settings of one method: every field is a flag. A method adds its own in a subclass.

    A field's name has one meaning in all methods: the same converter and the same help.
    """

    method: str = setting("full_rank", string, "training method")


@dataclass(frozen=True)
class RuleSettings:
    """The settings of one update rule: every field is a flag."""

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of an optimizer that has the rule."""
        return {}


@dataclass(frozen=True)
class Allows:
    """What a method permits: nothing that is not declared. A method that says nothing is slow and right."""

    projected_gradient: bool = False
    """DDP may average R = PᵀG in place of G between refreshes; otherwise whole gradients are averaged."""
    per_layer: bool = False
    """Weights may move inside the backward pass, one at a time; the settings then have a field `per_layer`, and where
    it is set, the method's `prepare` makes `optim.PerLayerUpdates` of the optimizer."""
    quantized_weights: bool = False
    """Frozen weights may be kept in 4 or 8 bits; the settings then have a field `quantize`."""
    fsdp: bool = False
    """FSDP2 may divide weights, gradients and states over devices."""
    fine_tuning: bool = False
    """The method may train any model of transformers, in its Trainer."""
    stochastic_rounding: bool = False
    """Weights may be bfloat16 that move with stochastic rounding, and states have a dtype of their own: every
    parameter group has what `methods.groups.state_settings` gives."""
    stored_bases: bool = False
    """The optimizer keeps bases, which may have a dtype of their own."""
    tables: bool = False
    """Embedding and head may move as the matrices do: the method's `by_role` says how (`--head_optimizer method`)."""
    fp16: bool = False
    """Fine-tuning may scale the loss: no gradient is used before it is unscaled."""


@dataclass(frozen=True)
class Condition:
    """Settings that act only under a condition; otherwise the user is told."""

    names: tuple[str, ...]
    acts: Callable[[Config], bool]
    otherwise: str
    """What goes after "without effect"; may name settings in braces."""


@dataclass(frozen=True)
class RuleSpec:
    """An update rule: what becomes of a gradient."""

    name: str
    """The value of `--optimizer`."""
    title: str
    settings: type[RuleSettings] = RuleSettings
    paper: str | None = None
    """arXiv number."""
    state: str = ""
    """What it keeps for a gradient of k elements."""
    unread: tuple[str, ...] = ()
    """Settings of methods that have no effect with this rule."""
    fine_tuning: bool = True
    keeps_formats: bool = True
    """Whether states may have another dtype than weights, and weights be rounded stochastically."""
    compact: bool = False
    """Whether it is there to save memory: beside bfloat16 weights, what it keeps beside its own format is bfloat16."""
    tiny: Mapping[str, Any] = field(default_factory=dict)
    """Settings with which it learns within ten updates of a toy model: for tests of every rule."""

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(item.name for item in dataclasses.fields(self.settings))


@dataclass(frozen=True)
class MethodSpec:
    """A training method: everything that the rest of the code asks about it."""

    name: str
    """The value of `--method`, and the name of its folder."""
    title: str
    summary: str
    """One line, for tables."""
    settings: type[MethodSettings]
    paper: str | None = None
    """arXiv number."""
    year: int | None = None
    family: str = ""
    """What it has in common with others: a heading of `--help`."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of settings of any kind that are others for this method."""
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Setting -> the values that it may have here, where that is not all."""
    meanings: Mapping[str, str] = field(default_factory=dict)
    """Setting -> what it multiplies or counts here: for `--help METHOD` and the method's page."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Setting of another method -> why it is an error here, and not only without effect."""
    update_rules: tuple[str, ...] = ("adamw",)
    """Values of `--optimizer`, the default first. A formula of its own names the rule whose settings it reads."""
    state: str = ""
    """Elements of optimizer state for an m x n matrix, m <= n, bases included, step counts not."""
    state_letters: Mapping[str, tuple[str, Callable[[Any], float]]] = field(default_factory=dict)
    """Letters in `state` beside m, n and the rank r -> what they are, and their value by the method's settings."""
    allows: Allows = Allows()
    tables: frozenset[str] = frozenset()
    """Of head and embedding, those that move as the matrices do where `--head_optimizer` and `--embed_optimizer` are
    auto; what is in none of the two has the update rule without a basis."""
    tiny: Mapping[str, Any] = field(default_factory=dict)
    """Settings with which it does all that it can within ten updates of a toy model: for tests of every method."""
    identity: tuple[str, ...] = ()
    """Settings, beside those marked `identity=True`, without which saved tensors would compute something else."""
    reads: tuple[str, ...] = ()
    """Settings of other sections that it gives a meaning of its own."""
    library: str = ""
    """The class in its `method.py` that is its optimizer for other loops: `from peft_pretraining.optim import ...`."""
    period: str | None = None
    """The setting that counts updates from one that does more than usual (refreshes, merges) to the next."""
    conditions: tuple[Condition, ...] = ()
    """When its settings act."""
    resolve: Callable[[Config, Mapping[str, ParsedFlag]], Config] | None = None
    """Settles what follows from other settings."""
    check: Callable[[Config, Mapping[str, ParsedFlag], list[str], list[str]], None] | None = None
    """Adds to problems and warnings: settings against each other."""
    check_schedule: Callable[[Config, list[str]], None] | None = None
    """Adds to warnings, for a schedule that is right; of pre-training alone."""
    check_sharding: Callable[[Config, Mapping[str, int], int], list[str]] | None = None
    """Problems of dividing a model, with so many inputs of each linear layer, over so many devices."""
    check_fine_tuning: Callable[[Config, list[str]], None] | None = None
    """Adds to problems: what pre-training alone can do."""
    for_device: Callable[[Config, str], Mapping[str, Any]] | None = None
    """What its settings of `auto` are in a new run of pre-training on a device of a type: recorded and kept."""

    @property
    def own(self) -> tuple[str, ...]:
        """Names of its settings."""
        return tuple(item.name for item in dataclasses.fields(self.settings) if item.name != "method")

    @property
    def identity_names(self) -> tuple[str, ...]:
        marked = [item.name for item in dataclasses.fields(self.settings) if item.metadata.get("identity")]
        return (*marked, *self.identity)


def section_flags(*sections: type) -> list[Flag]:
    """One flag for every field made by `setting`."""
    return [
        Flag(
            item.name,
            item.metadata["convert"],
            item.metadata["help"],
            item.metadata["aliases"],
            default=item.default,
        )
        for section in sections
        for item in dataclasses.fields(section)
        if item.metadata
    ]
