"""Building transformers' LLaMA from a JSON shape or from saved weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from peft_pretraining.flags import ConfigError
from peft_pretraining.models.causal_attention import make_maskless
from peft_pretraining.models.causal_lm import LlamaForCausalLM
from peft_pretraining.models.compute_dtype import compute_in, is_norm
from peft_pretraining.models.initial_weights import WORTH_A_THREAD, initialize
from peft_pretraining.models.loading import check_is_llama, load_pretrained
from peft_pretraining.models.model_keys import KEYS

if TYPE_CHECKING:
    from peft_pretraining.config import ModelConfig, Precision

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

_AT_ONCE = 2**27
"""Numbers of the layers that are drawn together before they are replaced: a decoder layer of 7B has 1.5 times that."""


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that torch has under this name."""
    return _DTYPES[name]


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[name]


def check_attention(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `ConfigError` where flash attention cannot run: it knows neither the CPU nor float32.

    `dtype` is that of activations.
    """
    if name != "flash_attention_2":
        return
    if device.type != "cuda":
        raise ConfigError(["--attn_implementation flash_attention_2 needs CUDA; on the CPU use sdpa"])
    if dtype != torch.bfloat16:
        raise ConfigError(
            [f"--attn_implementation flash_attention_2 computes in bfloat16, not in {dtype}: see --precision"]
        )


def build_model(
    config: ModelConfig,
    shape: dict[str, Any],
    weights_from: str | None,
    device: torch.device,
    seed: int | None = None,
    precision: Precision | None = None,
) -> PreTrainedModel:
    """A LLaMA in training mode.

    `precision` says in which dtypes weights are kept and products computed; without it `config.dtype` is that of all.

    With `weights_from`, a folder or hub name, its weights are read; raises `ConfigError` unless they are a whole LLaMA.
    Otherwise `shape` is the model JSON's settings, and weights are drawn by `seed`; with a seed of None the model has
    no memory until `materialize` gives it some.
    """
    dtype = resolve_dtype(precision.weight_dtype if precision else config.dtype, device)
    norm_dtype = torch_dtype(precision.norm_dtype) if precision else dtype
    compute_dtype = torch_dtype(precision.compute_dtype) if precision else dtype
    check_attention(config.attn_implementation, device, compute_dtype)
    if weights_from is not None:
        flag = "--model_name_or_path" if weights_from == config.model_name_or_path else "--warmed_up_model"
        what = f"{flag} {weights_from}"
        check_is_llama(weights_from, what, config.model_revision)
        model = load_pretrained(
            LlamaForCausalLM,
            weights_from,
            what,
            dtype=torch.promote_types(dtype, norm_dtype),
            return_dict=True,
            output_attentions=False,
            output_hidden_states=False,
            attn_implementation=config.attn_implementation,
            revision=config.model_revision or "main",
        )
        cast_weights(model, dtype, norm_dtype)
    else:
        model = _empty_model(config, shape, dtype)
        cast_weights(model, dtype, norm_dtype)
        if seed is not None:
            materialize(model, device, seed)
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    embeddings.padding_idx = None
    model.config.use_cache = True
    make_maskless(model)
    if config.lean_layers == "on" or {dtype, norm_dtype} != {compute_dtype}:
        compute_in(model, compute_dtype)
    if config.activation_checkpointing:
        # transformers renamed it in 5.2x; both take the arguments of torch.utils.checkpoint first.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return (model if weights_from is None else _moved(model, device)).train()


def _moved(model: PreTrainedModel, to: torch.device | torch.dtype) -> PreTrainedModel:
    return model.to(to)  # type: ignore[arg-type]  # transformers' decorator hides that it is a method


def cast_weights(model: PreTrainedModel, dtype: torch.dtype, norm_dtype: torch.dtype) -> None:
    """Norms' weights to one dtype, all others to another, one by one; buffers stay as they are."""
    of_norms = {param for module in model.modules() if is_norm(module) for param in module.parameters()}
    for param in model.parameters():
        param.data = param.data.to(norm_dtype if param in of_norms else dtype)
    model.config.dtype = dtype


def _empty_model(config: ModelConfig, shape: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device: shapes without memory."""
    # With a padding id the embedding would zero that row and never train it; with -1, the last one.
    # What is said to be passed over is: `return_dict` or `output_attentions` would change what the model returns.
    read = KEYS.keys() - {"pad_token_id"}
    llama = LlamaConfig(**{key: value for key, value in shape.items() if key in read})
    pad_token_id = shape.get("pad_token_id")
    llama._attn_implementation = config.attn_implementation
    with torch.device("meta"):
        model = _moved(LlamaForCausalLM(llama), dtype)
    if pad_token_id is not None and 0 <= pad_token_id < llama.vocab_size:
        model.config.pad_token_id = pad_token_id  # fine-tuning the exported model needs it
    model.config.dtype = dtype
    return model


@torch.no_grad()
def materialize(model: PreTrainedModel, device: torch.device, seed: int) -> None:
    """Give a model on the meta device memory on `device`, and its initial weights, in place.

    What has its weights is left alone. Matrices are drawn from N(0, initializer_range), norms are 1, biases 0, as
    transformers does (`initial_weights`).
    """
    missing = {name for name, param in model.named_parameters() if param.is_meta}
    if not missing:
        return
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    model.tie_weights()
    # Its buffers are computed when it is built, and saved nowhere.
    assert isinstance(model.config, LlamaConfig)
    model.set_submodule("model.rotary_emb", LlamaRotaryEmbedding(model.config).to(device))
    params = {name: param for name, param in model.named_parameters() if name in missing}
    initialize(params, model.config.initializer_range, seed)


@torch.no_grad()
def materialize_layers(model: PreTrainedModel, names: Iterable[str], device: torch.device, seed: int) -> None:
    """Give some layers of a model on the meta device what `materialize` would, so that they can be replaced before the
    others take any memory. Those that have their weights are left alone."""
    params = {}
    for name in names:
        layer = model.get_submodule(name)
        if any(param.is_meta for param in layer.parameters()):
            layer.to_empty(device=device)
            params.update({f"{name}.{key}": param for key, param in layer.named_parameters()})
    initialize(params, model.config.initializer_range, seed)


def drawn_together(model: PreTrainedModel, names: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive layers that are drawn together before each is replaced: large ones, as long as they are few."""
    lot: list[str] = []
    numbers = 0
    for name in names:
        size = sum(param.numel() for param in model.get_submodule(name).parameters() if param.is_meta)
        if lot and (size < WORTH_A_THREAD or numbers + size > _AT_ONCE):
            yield lot
            lot, numbers = [], 0
        lot.append(name)
        numbers += size
    if lot:
        yield lot
