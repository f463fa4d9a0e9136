"""Training methods: one folder each, with `settings.py` (what it is called and what can be set) and `method.py`.

Folders with a leading underscore hold what several methods share. Imports of the package: `distributed`, `flags`,
`models`, `nn`, `optim`, `rng`. This module and every `settings.py` are free of torch.
"""

from peft_pretraining.methods.registry import METHODS, load_method, method_flags

__all__ = ["METHODS", "load_method", "method_flags"]
