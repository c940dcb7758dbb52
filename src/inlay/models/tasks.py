"""One wrapper per task. They differ in the arguments that their ``forward`` names; labels and loss are the model's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from inlay.config.types import TaskType
from inlay.models.peft_model import PeftModel

__all__ = [
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "wrapper_class",
]


def _given(task_ids: Tensor | None, named: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that were given; models need not accept those that were not."""
    given = {name: value for name, value in {**named, "task_ids": task_ids}.items() if value is not None}
    return {**given, **rest}


class _Generative(PeftModel):
    """What the tasks that generate share."""

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """Return what the bare model makes of a generation step's inputs."""
        base: Any = self.get_base_model()
        inputs = base.prepare_inputs_for_generation(*args, **kwargs)
        return inputs if task_ids is None else {**inputs, "task_ids": task_ids}

    @property
    def base_model_prepare_inputs_for_generation(self) -> Any:
        """The bare model's own ``prepare_inputs_for_generation``."""
        base: Any = self.get_base_model()
        return base.prepare_inputs_for_generation


class PeftModelForCausalLM(_Generative):
    """Next-token prediction: ``labels`` (batch, length) gives the mean cross-entropy of the shifted tokens."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        return super().forward(**_given(task_ids, named, kwargs))


class PeftModelForSeq2SeqLM(_Generative):
    """Encoder-decoder generation: ``labels`` (batch, target length) gives the mean cross-entropy."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "decoder_inputs_embeds": decoder_inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        return super().forward(**_given(task_ids, named, kwargs))


class _Encoder(PeftModel):
    """What the tasks over encoder outputs share.

    ``token_type_ids`` and ``position_ids`` are named so that trainers, which read the signature, keep these columns.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        return super().forward(**_given(task_ids, named, kwargs))


class PeftModelForSequenceClassification(_Encoder):
    """A label per sequence: ``labels`` (batch,) gives the cross-entropy. The new head trains too."""


class PeftModelForTokenClassification(_Encoder):
    """A label per token: ``labels`` (batch, length) gives the cross-entropy. The new head trains too."""


class PeftModelForQuestionAnswering(PeftModel):
    """A span of the context: ``start_positions`` and ``end_positions`` (batch,) give the mean cross-entropy."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "start_positions": start_positions,
            "end_positions": end_positions,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        return super().forward(**_given(task_ids, named, kwargs))


class PeftModelForFeatureExtraction(PeftModel):
    """Hidden states as features; there is no loss."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        return super().forward(**_given(task_ids, named, kwargs))


_CLASSES: dict[str, type[PeftModel]] = {
    TaskType.SEQ_CLS.value: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM.value: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM.value: PeftModelForCausalLM,
    TaskType.TOKEN_CLS.value: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS.value: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION.value: PeftModelForFeatureExtraction,
}


def wrapper_class(task_type: Any, otherwise: type[Any] = PeftModel) -> type[Any]:
    """Return the wrapper of a task, or ``otherwise`` where there is none (a class of its own stays what it is)."""
    found = _CLASSES.get(str(getattr(task_type, "value", task_type)))
    if found is None or issubclass(otherwise, found) or otherwise.keeps_class:
        return otherwise
    return found
