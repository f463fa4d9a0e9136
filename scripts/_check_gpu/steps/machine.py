"""What is installed, and what the device says of itself."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

import torch

from ..lines import Lines
from ..scene import Scene

OPTIONAL = {
    "triton": "compiled kernels",
    "bitsandbytes": "8-bit optimizers, 8- and 4-bit weights",
    "liger_kernel": "the fused head",
}


def versions(scene: Scene, lines: Lines, case: str) -> None:
    python = ".".join(map(str, sys.version_info[:3]))
    lines.holds("Python, torch, transformers", True, " ".join([python, *map(_version, ("torch", "transformers"))]))
    if scene.on_cuda:
        properties = torch.cuda.get_device_properties(scene.device)
        name = f"{properties.name}, {scene.memory():.1f} GiB, CUDA {torch.version.cuda}"
        lines.holds("the device", True, name)
        lines.holds("bfloat16", torch.cuda.is_bf16_supported(), str(torch.cuda.is_bf16_supported()))
        free, total = torch.cuda.mem_get_info(scene.device)
        lines.at_least("memory that nobody else holds", free / total, 0.9)
    else:
        lines.absent("the device", "no GPU is looked at")
    for module, purpose in OPTIONAL.items():
        what = f"{module} ({purpose})"
        try:
            importlib.import_module(module)
        except ImportError as error:
            lines.absent(what, str(error).splitlines()[0][:80])
        else:
            lines.holds(what, True, _version(module.replace("_", "-")))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "no version"
