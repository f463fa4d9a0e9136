"""The commands of an installation, beside `peft-pretrain` and the others that are scripts of the project's folder."""

from __future__ import annotations


def recipe() -> int:
    """`peft-recipe SIZE METHOD ...`, which is scripts/pretrain.sh."""
    from peft_pretraining.launching import launch

    return launch.main(prog="peft-recipe")


def torchrun() -> int:
    """`peft-torchrun`, torchrun with the exit codes of its processes."""
    from peft_pretraining.launching.torchrun import main

    return main()


def report() -> int:
    """`peft-report RUN ... --out DIR`."""
    from peft_pretraining.report.__main__ import main

    return main(prog="peft-report")


def plan() -> int:
    """`peft-plan FLAGS`."""
    from peft_pretraining.report.plan import main

    return main()


def export() -> int:
    """`peft-export CHECKPOINT OUT`."""
    from peft_pretraining.export import main

    return main(prog="peft-export")


def generate() -> int:
    """`peft-generate CHECKPOINT TEXT`."""
    from peft_pretraining.generate import main

    return main(prog="peft-generate")
