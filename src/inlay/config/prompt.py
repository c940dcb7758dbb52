"""What the configurations of prompt-learning methods share."""

from __future__ import annotations

from inlay.config.base import PeftConfig
from inlay.config.fields import SavedModulesField
from inlay.config.settings import setting, settings

__all__ = ["PromptLearningConfig"]


@settings(
    positional="num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers modules_to_save"
)
class PromptLearningConfig(SavedModulesField, PeftConfig):
    """What the configurations of all methods with virtual tokens share; None is filled in from the model."""

    num_virtual_tokens: int | None = setting(
        default=None, doc="How many virtual tokens are learnt.", gt=0, parameters="proportional"
    )
    token_dim: int | None = setting(
        default=None, doc="Width of the model's embeddings.", gt=0, parameters="proportional"
    )
    num_transformer_submodules: int | None = setting(
        default=None,
        doc="1 for a decoder or an encoder, 2 for an encoder with a decoder.",
        gt=0,
        parameters="proportional",
    )
    num_attention_heads: int | None = setting(default=None, doc="Number of attention heads of the model.", gt=0)
    num_layers: int | None = setting(default=None, doc="Number of the model's blocks.", gt=0)

    @property
    def is_prompt_learning(self) -> bool:
        return True
