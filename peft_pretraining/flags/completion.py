"""Completion of command lines in the shell, by argcomplete, where it is installed:

eval "$(register-python-argcomplete peft-pretrain)"
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence


def offer(parser: argparse.ArgumentParser, values: Mapping[str, Sequence[str]] | None = None) -> None:
    """Answer the shell, and end the process, if it asks; otherwise nothing. `values`: of flags by name."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete

    for action in parser._actions:
        if known := (values or {}).get(action.dest):
            choices = argcomplete.ChoicesCompleter(dict.fromkeys(known, ""))
            action.completer = choices  # type: ignore[attr-defined]  # argcomplete's own
    argcomplete.autocomplete(parser)
