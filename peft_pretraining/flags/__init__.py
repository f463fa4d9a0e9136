"""What a setting is: its flag, its default, its unit and how text becomes its value; command lines and YAML files.

Imports of the package: nothing.
"""

from peft_pretraining.flags.converters import (
    boolean,
    choice,
    comma_separated,
    fraction_below_one,
    fraction_up_to_one,
    integer,
    non_negative_float,
    non_negative_int,
    number,
    positive_float,
    positive_int,
    sequence_length,
    string,
    text,
    token_count,
)
from peft_pretraining.flags.reading import TRAINING_CONFIG, read_flags
from peft_pretraining.flags.settings import (
    EXIT_BAD_INPUT,
    ConfigError,
    Flag,
    ParsedFlag,
    exit_with_problems,
    one_line,
    parse_command_line,
    parse_yaml,
    setting,
)
from peft_pretraining.flags.spec import (
    Allows,
    Condition,
    MethodSettings,
    MethodSpec,
    RuleSettings,
    RuleSpec,
    section_flags,
)

__all__ = [
    "EXIT_BAD_INPUT",
    "TRAINING_CONFIG",
    "Allows",
    "Condition",
    "ConfigError",
    "Flag",
    "MethodSettings",
    "MethodSpec",
    "ParsedFlag",
    "RuleSettings",
    "RuleSpec",
    "boolean",
    "choice",
    "comma_separated",
    "exit_with_problems",
    "fraction_below_one",
    "fraction_up_to_one",
    "integer",
    "non_negative_float",
    "non_negative_int",
    "number",
    "one_line",
    "parse_command_line",
    "parse_yaml",
    "positive_float",
    "positive_int",
    "read_flags",
    "section_flags",
    "sequence_length",
    "setting",
    "string",
    "text",
    "token_count",
]
