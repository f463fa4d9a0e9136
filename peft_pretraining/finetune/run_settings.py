"""Settings of fine-tuning runs that are neither a method's nor transformers' nor the task's. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from peft_pretraining.flags import boolean, comma_separated, integer, setting


def _seeds(text: str) -> tuple[int, ...]:
    if not (seeds := tuple(integer(item) for item in comma_separated(text))):
        raise ValueError("must be integers, comma-separated")
    if len(set(seeds)) < len(seeds):
        raise ValueError("must not name a seed twice")
    if not all(0 <= seed < 2**32 for seed in seeds):
        raise ValueError("must be between 0 and 4294967295")
    return seeds


@dataclass(frozen=True)
class RunSettings:
    lora_all_modules: bool = setting(
        False, boolean, "target all linear layers of the blocks, not only queries and values"
    )
    seeds: tuple[int, ...] = setting(
        (), _seeds, "run once per seed, comma-separated, each in a folder of its own, and report mean and deviation"
    )
    overwrite_output_dir: bool = setting(False, boolean, "start over: drop the run in --output_dir")
