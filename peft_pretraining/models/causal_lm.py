"""transformers' LLaMA, which can return the loss of its tokens without logits of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from torch import Tensor, nn

from peft_pretraining.models.fused_loss import fused_token_loss


class LlamaForCausalLM(transformers.LlamaForCausalLM):
    """As transformers', by whose name it is saved. The loss is made inside `forward`, so that what wraps the model
    (DDP, FSDP2) sees the head used where it gathers weights and reduces gradients."""

    fused_loss: bool = False
    """Whether `token_loss_sum` asks for the loss instead of the logits."""
    head_loss: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(fused_token_loss)
    """What then makes it of hidden states, the head's weight and labels."""
    head_loss_by: str = "blocks of logits"
    """The same in words."""

    def forward(self, input_ids: Tensor, *args: Any, token_labels: Tensor | None = None, **kwargs: Any) -> Any:
        """With `token_labels` (batch, length), of which each is what its position predicts: the sum of the
        cross-entropies, a scalar. Without them what transformers returns."""
        if token_labels is None:
            return super().forward(input_ids, *args, **kwargs)
        hidden = self.model(input_ids, *args, **kwargs).last_hidden_state  # (batch, length, d)
        return self.head_loss(hidden, self.lm_head.weight, token_labels)


def can_fuse_loss(model: nn.Module) -> bool:
    """Whether a model's head is a plain matrix: one with factors beside it, or a bias, has more to add."""
    head = getattr(model, "lm_head", None)
    return isinstance(model, LlamaForCausalLM) and isinstance(head, nn.Linear) and head.bias is None
