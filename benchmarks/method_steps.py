"""Times of an optimizer step of every training method on LLaMA's target layers, over torch's fused AdamW on the same.

Every method is built as a run builds it, with its defaults and a vocabulary of a few words. The weights of its target
layers have Gaussian gradients; factors beside them, which are all that moves then, those of a backward pass. A method's
step and one of AdamW on the whole weights take turns; ratios are medians over pairs of turns. Steps that do more than
usual (refreshes of bases, merges) are timed apart.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from real_gradients import PROJECT, model_shape
from torch import Tensor, nn

from peft_pretraining.config import Config
from peft_pretraining.distributed import ProcessGroup
from peft_pretraining.methods import METHODS, load_method
from peft_pretraining.models.loss import token_loss_sum
from peft_pretraining.nn import low_rank_layers
from peft_pretraining.optim.model_groups import TARGET_MODULES
from peft_pretraining.optim.state.gradient_owner import gradient_owner
from peft_pretraining.training.build_model import distributed_model

SETS: dict[str, tuple[str, str, int, dict[str, int]]] = {
    "llama_60m": ("target layers of llama_60m", "llama_60m.json", 128, {}),
    "block_1b": ("target layers of one block of llama_1b", "llama_1b.json", 512, {"num_hidden_layers": 1}),
}
"""Title, model JSON, rank, and what is different about it."""
Clock: TypeAlias = Callable[[Callable[[], object]], float]
"""How many seconds something takes."""
_VOCABULARY = 64
_LR = 1e-5


@dataclass
class Timed:
    """Seconds of steps, and of those of AdamW that they took turns with."""

    own: list[float] = field(default_factory=list)
    adamw: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return statistics.median(a / b for a, b in zip(self.own, self.adamw, strict=True))

    def cells(self) -> list[str]:
        """Milliseconds and ratio."""
        return [f"{1000 * statistics.median(self.own):,.1f}", f"{self.ratio:.2f}"] if self.own else ["", ""]


class Contender:
    """A method's optimizer with gradients at the target layers, and what a run calls around its step."""

    def __init__(self, name: str, which: str, period: int, device: torch.device, dtype: torch.dtype):
        _, file, rank, changes = SETS[which]
        shape = model_shape(PROJECT / "configs" / file, **changes, vocab_size=_VOCABULARY)
        config = config_of(name, rank, period, dtype)
        self.method = load_method(name)(config)
        group = ProcessGroup(0, 1, 0, 1, device)
        self.model: Any = distributed_model(config, shape, self.method, group)
        self.optimizer = self.method.build_optimizer(self.model)
        self.method.prepare(self.model, self.optimizer, group.averaging)
        self.owner, self.update = gradient_owner(self.optimizer, self.model), 0
        self.has_factors = bool(low_rank_layers(self.model))
        self.tokens = {"input_ids": torch.arange(_VOCABULARY, device=device).view(1, -1)}
        self.trained = [
            param
            for name, param in self.model.named_parameters()
            if param.requires_grad and param.ndim == 2 and any(part in name for part in TARGET_MODULES)
        ]
        for param in self.trained:
            param.grad = gaussian(param)

    def prepare(self) -> None:
        """What of an update comes before its step. Layers with factors have a backward pass, which they may look at."""
        self.owner.begin_update(self.update)
        self.method.before_update(self.model, self.optimizer, self.update)
        if self.has_factors:
            self.model.zero_grad()
            token_loss_sum(self.model, self.tokens).backward()
            for param in set(self.model.parameters()) - set(self.trained):
                param.grad = None

    def step(self) -> None:
        if self.has_factors:
            self.owner.grad_norm()  # in which some of them take their bases
        if self.method.acts_before_step(self.optimizer, self.update):
            self.method.before_step(self.model, self.optimizer, self.update)
        self.optimizer.step()
        self.update += 1


def config_of(name: str, rank: int, period: int, dtype: torch.dtype) -> Config:
    """The settings of a run, with `period` updates between two steps that do more than usual."""
    spec = METHODS[name]
    own: dict[str, Any] = {**spec.defaults, "method": name, "lr": _LR, "num_training_steps": 10_000}
    own |= {"batch_size": 1, "total_batch_size": 1, "max_length": 256}
    own["precision"] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}[dtype]
    if spec.period is not None:
        own[spec.period] = period
    if "rank" in {item.name for item in dataclasses.fields(spec.settings)} and "rank" not in spec.defaults:
        own["rank"] = rank
    return Config.from_settings(own)


def gaussian(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(like.numel())
    return (0.001 * torch.randn(like.shape, generator=generator)).to(like.device, like.dtype)


def measure(
    contender: Contender, adamw: Callable[[], object], rounds: int, period: int, seconds: Clock
) -> tuple[Timed, Timed]:
    """Ordinary steps, and one that does more than usual, each with a step of AdamW before it."""
    ordinary, rare = Timed(), Timed()
    for update in range(rounds + 2):  # two to warm up, the first of which may take bases
        turn(contender, adamw, ordinary if update > 1 else Timed(), seconds)
    if period:
        contender.update = period
        turn(contender, adamw, rare, seconds)
    return ordinary, rare


def turn(contender: Contender, adamw: Callable[[], object], into: Timed, seconds: Clock) -> None:
    into.adamw.append(seconds(adamw))
    contender.prepare()
    into.own.append(seconds(contender.step))


def stopwatch(device: torch.device, clock: Callable[[], float]) -> Clock:
    def seconds(act: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = clock()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - began

    return seconds


def fused_adamw(which: str, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """A step of torch's fused AdamW on the weights of the target layers of the plain model."""
    plain = Contender("full_rank", which, 0, device, dtype)
    params = [nn.Parameter(param.detach()) for param in plain.model.parameters() if param.grad is not None]
    for param in params:
        param.grad = gaussian(param)
    step: Callable[[], object] = torch.optim.AdamW(params, lr=_LR, fused=True).step
    return step


def report(
    methods: Sequence[str],
    sets: Sequence[str],
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Prints a table, method by method, and returns the seconds."""
    torch.zeros(31 * 2**18)  # as activations do, lets the C library keep what tensors up to its size give back
    found: dict[str, Any] = {}
    seconds = stopwatch(device, clock)
    period = rounds + 3
    titles = " | ".join(f"{SETS[which][0]}: ms | x AdamW | rare step, ms | x AdamW" for which in sets)
    print(f"| method | {titles} |\n|---{'|--:' * 4 * len(sets)}|", flush=True)
    adamw = {which: fused_adamw(which, device, dtype) for which in sets}
    for name in methods:
        cells: list[str] = []
        for which in sets:
            rare = 0 if METHODS[name].period is None else period
            timed = measure(Contender(name, which, period, device, dtype), adamw[which], rounds, rare, seconds)
            cells += [cell for one in timed for cell in one.cells()]
            found.setdefault(name, {})[which] = dict(zip(("ordinary", "rare"), map(vars, timed), strict=True))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return found
