"""A few flags, and what parsing makes of a command line or a YAML file with them."""

from __future__ import annotations

from peft_pretraining import flags
from peft_pretraining.flags import Flag

FLAGS = [
    Flag("training_config", flags.string, "a file"),
    Flag("rank", flags.positive_int, "a number with aliases, in 100% of cases", ("lora_r", "lora_rank")),
    Flag("lr", flags.number, "a number"),
    Flag("seed", flags.integer, "an integer"),
    Flag("autoresume", flags.boolean, "a switch"),
    Flag("tokens", flags.token_count, "tokens"),
    Flag("tags", flags.comma_separated, "a list"),
    Flag("save_dir", flags.string, "a path"),
    Flag("scheduler", flags.choice("linear", "cosine"), "one of two"),
]


def parse(*argv):
    """Values by name, the spellings used, and the problems."""
    problems = []
    given = flags.parse_command_line(FLAGS, argv, prog="test", description="", problems=problems)
    return {name: item.value for name, item in given.items()}, problems


def parse_file(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    problems = []
    given = flags.parse_yaml(FLAGS, str(path), problems)
    return {name: item.value for name, item in given.items()}, [each.replace(str(path), "FILE") for each in problems]
