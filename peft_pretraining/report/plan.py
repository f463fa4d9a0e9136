"""Say what a run needs before it is launched: memory, traffic, launches, time, and the micro-batch that fits.

python -m peft_pretraining.report.plan --model_config configs/llama_7b.json --method galore ... --device h100

Takes all flags of torchrun_main.py, or a whole command line that launches it, and these:
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from peft_pretraining.flags import ConfigError, exit_with_problems, one_line

ENTRY = "torchrun_main.py"
MOST_DEVICES = 512


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError([message])


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m peft_pretraining.report.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--devices", help=f"how many, 1 to {MOST_DEVICES} (default: those of the launcher, or 1)")
    parser.add_argument(
        "--device", default="h100", help="kind of GPU: h200, h100, a100-80, rtx4090, ... (default h100)"
    )
    parser.add_argument("--json", help="write the plan to this file, too: bytes and seconds")
    parser.add_argument("--search", choices=("yes", "no"), default="yes", help="look for the largest micro-batch")
    return parser


def split(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str], int]:
    """Returns the plan's own flags, the run's, and the number of devices. Raises `ConfigError`."""
    own, rest = _parser().parse_known_args(list(argv))
    launched = 1
    place = next((index for index, word in enumerate(rest) if Path(word).name == ENTRY), None)
    if place is not None:
        launched, rest = _launched(rest[:place]), rest[place + 1 :]
    text = str(launched) if own.devices is None else own.devices
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MOST_DEVICES):
        raise ConfigError([f"--devices must be a whole number from 1 to {MOST_DEVICES}, got {text!r}"])
    return own, rest, int(text)


def _launched(words: Sequence[str]) -> int:
    """How many processes a launcher's flags ask for."""
    number = 1
    for index, word in enumerate(words):
        name, _, value = word.lstrip("-").replace("-", "_").partition("=")
        if name in ("nproc_per_node", "nnodes"):
            value = value or (words[index + 1] if index + 1 < len(words) else "")
            if not (value.isascii() and value.isdigit()):
                raise ConfigError([f"{word} {value}: say with --devices how many there are"])
            number *= int(value)
    return number


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        return exit_with_problems(error)


def _run(argv: Sequence[str]) -> int:
    from peft_pretraining.report.footprint.devices import DEVICES, device_named

    own, flags, devices = split(argv)
    try:
        device = device_named(own.device)
    except KeyError:
        raise ConfigError([f"--device must be one of {', '.join(sorted(DEVICES))}, got {own.device!r}"]) from None
    from peft_pretraining.config import cli
    from peft_pretraining.report import state_size

    launch = cli.load(flags, {"WORLD_SIZE": str(devices)}, here=False)
    for warning in launch.warnings:
        print(f"warning: {one_line(warning)}", file=sys.stderr)
    if launch.facts.model is None:
        raise ConfigError(["--model_config is needed: a model of the hub is not loaded for a plan"])
    plan = _simulated(launch.config, launch.facts.model, device, devices, own.search == "yes")
    print(plan[0])
    print(f"\nBy formula, {state_size.line(launch.config, launch.facts.model)}.")
    if own.json:
        try:
            Path(own.json).write_text(json.dumps(plan[1], indent=2) + "\n")
        except OSError as error:
            raise ConfigError([f"--json {own.json}: cannot be written ({error.strerror})"]) from None
    return 0


def _simulated(config, shape, device, devices: int, search: bool) -> tuple[str, dict]:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # nothing is trained
    from peft_pretraining.report.footprint.planning import make_plan
    from peft_pretraining.report.footprint.table import describe

    try:
        plan = make_plan(config, shape, device, devices, search)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    finally:
        logging.disable(logging.NOTSET)
    return describe(plan), plan.as_json()


if __name__ == "__main__":
    sys.exit(main())
