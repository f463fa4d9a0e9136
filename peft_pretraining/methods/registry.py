"""The training methods that there are: found, not listed.

A method is a folder here, or the module that an installed package names in the entry-point group
`peft_pretraining.methods`: its `settings.py` has a `SPEC`, and `method.py` beside it one subclass of `TrainingMethod`.
Command lines are checked with the specs alone; torch is imported with the class.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_pretraining.flags import ConfigError, Flag, MethodSettings, MethodSpec, section_flags
from peft_pretraining.optim.rule_settings import RULES

if TYPE_CHECKING:
    from peft_pretraining.methods.base import TrainingMethod

GROUP = "peft_pretraining.methods"
"""Entry points `name = "package.settings"` of plug-ins."""


class _Methods(Mapping[str, MethodSpec]):
    """Name -> spec, in the order of publication, plug-ins last; looked for when it is first read."""

    def __init__(self) -> None:
        self._specs: dict[str, MethodSpec] = {}
        self._searched = False
        self._modules: dict[str, str] = {}

    def _found(self) -> dict[str, MethodSpec]:
        if not self._searched:
            self._searched = True
            folders = (path.parent.name for path in Path(__file__).parent.glob("[!_]*/settings.py"))
            own = {name: _spec_of(f"{__package__}.{name}.settings") for name in folders}
            for name, spec in sorted(own.items(), key=lambda item: (item[1].paper or "", item[0])):
                if spec.name != name:
                    raise ConfigError([f"methods/{name}/settings.py: its SPEC calls itself {spec.name!r}"])
                self._add(spec, f"{__package__}.{name}")
            for point in sorted(metadata.entry_points(group=GROUP)):
                self._add_plugin(point)
        return self._specs

    def _add(self, spec: MethodSpec, package: str) -> None:
        self._specs[spec.name] = spec
        self._modules[spec.name] = f"{package}.method"

    def _add_plugin(self, point: metadata.EntryPoint) -> None:
        """A plug-in that does not work is left out, and said: the methods that are there must not depend on it."""
        try:
            spec = _spec_of(point.value)
            if spec.name != point.name:
                raise ValueError(f"its SPEC calls itself {spec.name!r}")
            if spec.name in self._specs:
                raise ValueError("there is a method of this name")
            if clash := _clashes(spec, self._specs.values()):
                raise ValueError(clash)
        except Exception as error:  # whatever somebody else's module raises while it is imported
            why = " ".join(str(error).split())[:200]
            warnings.warn(
                f"the method {point.name} ({point.value}) is left out: {type(error).__name__}: {why}", stacklevel=2
            )
            return
        self._add(spec, point.value.rpartition(".")[0])

    def __getitem__(self, name: str) -> MethodSpec:
        return self._found()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())

    def module_of(self, name: str) -> str:
        """The module with the method's class."""
        self._found()
        return self._modules[name]

    def forget(self) -> None:
        """Look again: a package was installed meanwhile."""
        self._specs, self._modules, self._searched = {}, {}, False


METHODS = _Methods()


def _spec_of(module: str) -> MethodSpec:
    spec = importlib.import_module(module).SPEC
    if not isinstance(spec, MethodSpec):
        raise TypeError(f"{module}.SPEC is a {type(spec).__name__}, and must be a MethodSpec")
    if not issubclass(spec.settings, MethodSettings):
        raise TypeError(f"{module}: {spec.settings.__name__} must be a MethodSettings")
    if unknown := [name for name in spec.update_rules if name not in RULES]:
        raise ValueError(f"{module}: there is no update rule {', '.join(unknown)}; there is {', '.join(RULES)}")
    return spec


def _clashes(spec: MethodSpec, others: Iterable[MethodSpec]) -> str | None:
    """A flag has one meaning: which of a plug-in's is another one's by name and not by meaning."""
    known = {item.name: item for rule in RULES.values() for item in dataclasses.fields(rule.settings)}
    known |= {item.name: item for other in others for item in dataclasses.fields(other.settings)}
    for item in dataclasses.fields(spec.settings):
        other = known.get(item.name)
        if other is not None and item.metadata["help"] != other.metadata["help"]:
            return f"its setting {item.name} means something else than that of another method or update rule"
    return None


def method_flags() -> list[Flag]:
    """One flag for every setting of any method, in groups named after the methods that read it."""
    readers: dict[str, list[str]] = {}
    flags: dict[str, Flag] = {}
    for spec in METHODS.values():
        for flag in section_flags(spec.settings):
            flags.setdefault(flag.name, flag)
            readers.setdefault(flag.name, []).append(spec.name)
    everyone = len(METHODS)
    return [
        dataclasses.replace(flag, group="" if len(readers[name]) == everyone else ", ".join(readers[name]))
        for name, flag in flags.items()
    ]


def load_method(name: str) -> type[TrainingMethod[Any]]:
    """The class of the method called `name`: the one subclass of `TrainingMethod` that its `method.py` defines.

    Raises `ConfigError` without a `method.py`, or where it defines none or several.
    """
    from peft_pretraining.methods.base import TrainingMethod

    place = METHODS.module_of(name)
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name != place:
            raise
        raise ConfigError([f"--method {name}: there is no {place}, which has the class"]) from None
    found = [
        item
        for item in vars(module).values()
        if inspect.isclass(item) and issubclass(item, TrainingMethod) and item.__module__ == module.__name__
    ]
    public = [item for item in found if not item.__name__.startswith("_")]
    if len(public) != 1:
        names = ", ".join(item.__name__ for item in public) or "none"
        raise ConfigError([f"--method {name}: {place} must define one public subclass of TrainingMethod, has {names}"])
    return public[0]
