"""Model shapes and recipes that come with the package. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path

from peft_pretraining.flags import string

_PACKAGE = Path(__file__).resolve().parents[1]

_PLACES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")

CONFIGS = next((folder.resolve() for folder in _PLACES if folder.is_dir()), _PLACES[0])
"""`configs/` of the project: in a checkout the package has a link to it (where links are kept), in an installation a
copy."""


def shape(text: str) -> str:
    """A flag's converter: the name where there is such a file, or the shape of that name which comes with the package.

    `llama_60m`, `llama_60m.json` and `configs/llama_60m.json` name the same from any folder.
    """
    name = string(text)
    path = Path(name)
    if path.exists() or path.parent not in (Path("."), Path("configs")):
        return name
    shipped = CONFIGS / (path.name if path.suffix == ".json" else f"{path.name}.json")
    return str(shipped) if shipped.is_file() else name
