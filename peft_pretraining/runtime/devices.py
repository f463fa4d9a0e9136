"""Data sheets of GPUs that models are trained on."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Peak rates, dense, with float32 sums; what is reached of them is `roofline`'s guess."""

    name: str
    memory: float
    """GiB, as the driver reports it."""
    bf16: float
    """TFLOP/s of products of bfloat16."""
    tf32: float
    fp32: float
    fp64: float
    bandwidth: float
    """TB/s of its memory."""
    link: float
    """GB/s to the other devices of the machine, in one direction: NVLink, else PCIe through the host."""
    network: float
    """GB/s to other machines."""
    products_workspace: int = 8
    """MiB that a cuBLAS handle takes; there is one for the forward and one for the backward thread."""

    def tflops(self, dtype: str, matmul_precision: str | None) -> float:
        """Peak rate of products of a dtype. `matmul_precision`: torch's, of float32."""
        if dtype in ("bfloat16", "float16"):
            return self.bf16
        if dtype == "float64":
            return self.fp64
        return self.fp32 if matmul_precision == "highest" else self.tf32


DEVICES = {
    each.name: each
    for each in (
        Device("b200", 178.7, 2250, 1125, 75, 37, 8.0, 900, 50, 32),
        Device("h200", 140.4, 989, 494, 67, 67, 4.8, 450, 50, 32),
        Device("h100", 79.6, 989, 494, 67, 67, 3.35, 450, 50, 32),
        Device("a100-80", 80.0, 312, 156, 19.5, 19.5, 2.04, 300, 25),
        Device("a100-40", 40.0, 312, 156, 19.5, 19.5, 1.56, 300, 25),
        Device("l40s", 45.0, 362, 183, 91.6, 1.43, 0.86, 16, 12),
        Device("a6000", 48.0, 155, 77, 38.7, 0.6, 0.77, 16, 12),
        Device("rtx5090", 31.8, 209, 105, 105, 1.64, 1.79, 25, 12, 32),
        Device("rtx4090", 24.0, 165, 82.6, 82.6, 1.29, 1.01, 12, 12),
        Device("rtx3090", 24.0, 71, 35.6, 35.6, 0.56, 0.94, 12, 12),
    )
}
ALIASES = {"a100": "a100-80", "4090": "rtx4090", "3090": "rtx3090", "5090": "rtx5090"}


def device_named(name: str) -> Device:
    """Raises `KeyError` for one that is not known."""
    name = name.lower()
    return DEVICES[ALIASES.get(name, name)]


def device_of_driver(name: str, gib: float = 0.0) -> Device | None:
    """The data sheet of a GPU by the name that its driver gives it, and its memory; None where there is none.

    >>> device_of_driver("NVIDIA A100-SXM4-80GB", 79.3).name
    'a100-80'
    >>> device_of_driver("NVIDIA GeForce RTX 4090").name
    'rtx4090'
    >>> device_of_driver("NVIDIA RTX A6000").name
    'a6000'
    """
    words = name.lower().replace("geforce ", "").replace("rtx ", "rtx").replace("rtxa6000", "a6000")
    if "a100" in words:
        return DEVICES["a100-80" if gib > 60 else "a100-40"]
    return next(
        (device for known, device in DEVICES.items() if known in words and f"{known} laptop" not in words), None
    )
