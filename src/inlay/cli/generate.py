"""``inlay generate``: try a text-generation adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

LISTS = ("--prompt",)


def command(
    adapter: Annotated[Path, typer.Option(help="Adapter folder")],
    prompt: Annotated[list[str], typer.Option(help="Text to go on from; may be given more than once")],
    model: Annotated[str | None, typer.Option(help="Base model; default: the one the adapter names")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="At most this many new tokens")] = 60,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed for a temperature above 0")] = 0,
) -> None:
    """Print each prompt with its continuation by the adapted model."""
    from inlay.training.pretrained import accelerator_device, load_adapted, transformers_library
    from inlay.training.tasks.causal_lm import CausalLM

    adapted, tokenizer, _ = load_adapted(adapter, model, wanted=CausalLM)
    device = accelerator_device()
    adapted.to(device)
    transformers_library().set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    for text in prompt:
        batch = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(device)
        produced = adapted.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=tokens,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
        print(tokenizer.decode(produced[0], skip_special_tokens=True))
