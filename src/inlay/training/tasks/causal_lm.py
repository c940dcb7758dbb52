"""Next-token prediction on running text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from inlay.errors import ConfigError
from inlay.training.tasks import IGNORED, Encoded, Example, Task

if TYPE_CHECKING:
    import numpy
    import torch

    from inlay.training.formats import Row


class CausalLM(Task):
    name = "causal-lm"
    task_type = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"
    unit = "document"
    pipeline_tag = "text-generation"
    default_length = 512
    main_metric = "perplexity"

    def check(self, rows: Sequence[Row], setting: str) -> None:
        name = self.config.text_field
        for row in rows:
            text = row.values.get(name)
            if not isinstance(text, str) or not text.strip():
                raise ConfigError(
                    f"{setting}: {row.where} has no text in field {name!r} (fields: {sorted(row.values)})"
                )

    def encode(self, rows: Sequence[Row], tokenizer: Any, length: int) -> Encoded:
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        tail = [] if end is None else [end]
        texts = [row.values[self.config.text_field] for row in rows]
        documents = [[*ids, *tail] for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
        if not self.config.pack:
            usable = [ids[:length] for ids in documents if len(ids) > 1]
            return Encoded([{"input_ids": ids} for ids in usable], cut=sum(len(ids) > length for ids in documents))
        stream = [token for ids in documents for token in ids]
        blocks = [stream[start : start + length] for start in range(0, len(stream), length)]
        # a last block of one token predicts nothing
        return Encoded([{"input_ids": block} for block in blocks if len(block) > 1])

    def split(self, encoded: Encoded, fraction: float) -> tuple[Encoded, Encoded] | None:
        """Hold out the tail of the text: a random choice of blocks would put neighbours on both sides."""
        held = max(1, round(len(encoded.examples) * fraction))
        if held >= len(encoded.examples):
            return None
        return Encoded(encoded.examples[:-held], encoded.cut), Encoded(encoded.examples[-held:])

    def collator(self, tokenizer: Any) -> Callable[[list[Example]], dict[str, torch.Tensor]]:
        return partial(_collate, tokenizer.pad_token_id)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, count: Any = None) -> torch.Tensor:
        from torch.nn.functional import cross_entropy

        flat = logits.float().flatten(0, 1)
        wanted = labels.flatten()
        if count is None:
            return cross_entropy(flat, wanted, ignore_index=IGNORED)
        return cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum") / count

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return ``(batch, 2)``: the summed negative log-likelihood of each example, and its token count."""
        import torch
        from torch.nn.functional import cross_entropy

        each = cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return torch.stack([each.double().sum(dim=1), (labels != IGNORED).double().sum(dim=1)], dim=1)

    def metrics(self, reduced: numpy.ndarray, labels: numpy.ndarray) -> dict[str, float]:
        total, count = reduced.sum(axis=0)
        loss = float(total / count)
        return {"exact_loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def _collate(pad: int, examples: list[Example]) -> dict[str, torch.Tensor]:
    """Pad to the longest example; ``labels[t]`` is the token that position ``t`` has to predict."""
    import torch

    longest = max(len(example["input_ids"]) for example in examples)
    ids = torch.full((len(examples), longest), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        tokens = torch.tensor(example["input_ids"])
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        labels[row, : len(tokens) - 1] = tokens[1:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
