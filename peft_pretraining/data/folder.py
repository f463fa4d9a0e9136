"""What a folder that `pretokenize.py` wrote says of itself, checked: whoever sent it may have changed it.

Read are `args.json`, `dataset_dict.json`, each split's `state.json` and the Arrow files that it names, as plain JSON
and plain Arrow; `dataset_info.json` is not. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_pretraining.data.json_rows import one_line

if TYPE_CHECKING:
    import pyarrow as pa

DEFAULT_TOKENIZER = "t5-base"
SPLITS = ("train", "validation")
ARGUMENTS, DATASET, STATE = "args.json", "dataset_dict.json", "state.json"

_LARGEST_DESCRIPTION = 2**24
"""Bytes of a JSON file here; those that are written have a few hundred, or some kB for the list of files."""
_LARGEST_INT = 2**63 - 1
_LARGEST_ID = 2**31 - 1


def read_arguments(folder: str | Path) -> dict[str, Any]:
    """`args.json`, with every value that is read of the type that it is written with. `ValueError` says what is not."""
    folder = Path(folder)
    splits = _read_json(folder / DATASET).get("splits")
    if not isinstance(splits, list):
        raise ValueError(f"{DATASET} has no list of splits")
    for split in SPLITS:
        if split not in splits:
            raise ValueError(f"split {split} is missing")
    arguments = _read_json(folder / ARGUMENTS)
    if "sequence_length" not in arguments:
        raise ValueError(f"{ARGUMENTS} has no sequence_length")
    _check_int(arguments, "sequence_length", 1, _LARGEST_ID)
    _check_int(arguments, "vocab_size", 1, _LARGEST_ID)
    _check_int(arguments, "largest_token_id", -1, _LARGEST_ID)
    _check_int(arguments, "eos_token_id", 0, _LARGEST_ID)
    if not isinstance(arguments.get("tokenizer"), str | None):
        raise ValueError(f"{ARGUMENTS}: tokenizer must be a name, not {_shown(arguments['tokenizer'])}")
    for split in SPLITS:
        counts = arguments.get(split, {})
        if not isinstance(counts, dict):
            raise ValueError(f"{ARGUMENTS}: {split} must be the counts of the split, not {_shown(counts)}")
        for name in ("documents", "tokens", "blocks"):
            _check_int(counts, name, 0, _LARGEST_INT, f"{split}.")
    sizes = arguments.get("text_bytes") or {}
    if not isinstance(sizes, dict):
        raise ValueError(f"{ARGUMENTS}: text_bytes must be the bytes of each split, not {_shown(sizes)}")
    for split in SPLITS:
        _check_int(sizes, split, 0, _LARGEST_INT, "text_bytes.")
    return arguments


def bytes_per_token(arguments: dict[str, Any], split: str) -> float | None:
    """Bytes of text, in UTF-8, for each token of a split, EOS counted; None of folders that do not say it."""
    size, tokens = (arguments.get("text_bytes") or {}).get(split), arguments.get(split, {}).get("tokens")
    return size / tokens if size and tokens else None


def read_column(folder: str | Path, split: str) -> pa.ChunkedArray:
    """The split's lists of token ids, memory-mapped. `ValueError` or `OSError` where files are damaged or others."""
    import pyarrow as pa

    tables = []
    for file in _arrow_files(Path(folder) / split):
        where = f"{split}/{file.name}"
        try:
            with pa.ipc.open_stream(pa.memory_map(str(file))) as reader:
                table = reader.read_all()
            table.validate()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{where} is damaged or no Arrow file ({one_line(error)})") from error
        if table.schema.names.count("input_ids") != 1 or not _holds_ids(table.schema.field("input_ids")):
            raise ValueError(f"{where} has no column input_ids of token ids")
        tables.append(table.column("input_ids"))
    if len({column.type for column in tables}) > 1:
        raise ValueError(f"the files of split {split} differ in their types")
    kind = tables[0].type if tables else pa.list_(pa.int32())
    return pa.chunked_array([chunk for column in tables for chunk in column.chunks], kind)


def _holds_ids(field: pa.Field) -> bool:
    import pyarrow as pa

    kind = field.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and pa.types.is_integer(kind.value_type)


def _arrow_files(folder: Path) -> list[Path]:
    """The files that make up a split, in their order; only such as lie in its folder."""
    state = _read_json(folder / STATE)
    entries = state.get("_data_files")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{folder.name}/{STATE} has no list of files")
    if state.get("_indices_data_files"):
        raise ValueError(f"split {folder.name} was saved with an order of its own: save it after flatten_indices()")
    files = []
    for name in (entry.get("filename") for entry in entries):
        if not isinstance(name, str) or not name or "\0" in name or os.path.basename(name) != name:
            raise ValueError(f"{folder.name}/{STATE} names {_shown(name)}, which is no file of this folder")
        if not os.path.isfile(folder / name):
            raise ValueError(f"{folder.name}/{name} is missing")
        files.append(folder / name)
    return files


def _read_json(file: Path) -> dict[str, Any]:
    name = file.name if file.name != STATE else f"{file.parent.name}/{file.name}"
    if not os.path.isfile(file):
        raise ValueError(f"{name} is missing")
    if file.stat().st_size > _LARGEST_DESCRIPTION:
        raise ValueError(f"{name} cannot be read (it has {file.stat().st_size} bytes)")
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be read ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds no JSON object")
    return content


def _check_int(values: dict[str, Any], name: str, least: int, most: int, where: str = "") -> None:
    value = values.get(name)
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{ARGUMENTS}: {where}{name} must be an integer from {least} to {most}, not {_shown(value)}")


def _shown(value: Any) -> str:
    """The value in a few characters: a whole number of a million digits is no help."""
    if isinstance(value, int) and abs(value) > 10**20:
        return "one of more than 20 digits"
    shown = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return shown if len(shown) <= 60 else shown[:60] + "..."
