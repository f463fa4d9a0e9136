"""`--help METHOD`: what one method is, what it reads, and its defaults. No torch."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence

from peft_pretraining.flags import Flag, MethodSpec
from peft_pretraining.flags.settings import build_parser
from peft_pretraining.methods import METHODS
from peft_pretraining.optim.rule_settings import RULES

NOTE = """Every flag is also a key of a --training_config file (YAML). `--help METHOD` shows the flags of one method,
with its defaults; a flag that the chosen method does not read is named in a warning."""

_OTHERS_DEFAULT = re.compile(r" \(default[^()]*\)")
"""What a flag's help says where no default holds for all methods."""

_PERMISSIONS = {
    "projected_gradient": "DDP that averages projected gradients",
    "per_layer": "updates inside the backward pass",
    "quantized_weights": "quantised weights",
    "fsdp": "FSDP2",
    "fine_tuning": "fine-tuning",
    "fp16": "fp16 in fine-tuning",
}


def exit_with_help(argv: Sequence[str], flags: Sequence[Flag], prog: str) -> None:
    """Print the help of a method and exit, if that is what is asked for."""
    for word, topic in itertools.pairwise(argv):
        if word in ("-h", "--help") and topic in METHODS:
            build_parser(_flags_of(METHODS[topic], flags), prog, description(METHODS[topic])).print_help()
            raise SystemExit(0)


def description(spec: MethodSpec) -> str:
    """The head of a method's help."""
    lines = [f"{spec.title}: {spec.summary}."]
    if spec.paper:
        lines.append(f"Paper: arXiv {spec.paper} ({spec.year}).")
    lines.append(f"Update rules (--optimizer): {', '.join(spec.update_rules)}.")
    if spec.state:
        with_adamw = ", with AdamW" if len(spec.update_rules) > 1 else ""
        lines.append(f"Optimizer state of an m x n matrix, m <= n{with_adamw}: {spec.state} elements.")
    lines.append(f"Can be combined with: {', '.join(permissions(spec)) or 'nothing'}.")
    return "\n".join(lines)


def permissions(spec: MethodSpec) -> list[str]:
    """What the method allows, in words."""
    return [text for name, text in _PERMISSIONS.items() if getattr(spec.allows, name)]


def meaning(spec: MethodSpec, flag: Flag) -> str:
    """What a flag is for this method; of a default of the method's own, it does not say what others have."""
    said = spec.meanings.get(flag.name, flag.help)
    return _OTHERS_DEFAULT.sub("", said) if flag.name in spec.defaults else said


def _flags_of(spec: MethodSpec, flags: Sequence[Flag]) -> list[Flag]:
    """The flags of the method and of its update rules, and those elsewhere whose default it changes."""
    own = {"method", *spec.own}
    of_rules = {name for rule in spec.update_rules for name in RULES[rule].reads}
    changed = set(spec.defaults) - own - of_rules
    defaults = {**spec.defaults, "method": spec.name}
    shown = [(f"settings of {spec.name}", own), ("settings of its update rules", of_rules), ("others", changed)]
    return [
        dataclasses.replace(
            flag,
            group=title,
            default=defaults.get(flag.name, flag.default),
            help=meaning(spec, flag),
        )
        for title, names in shown
        for flag in flags
        if flag.name in names
    ]
