"""``inlay methods``: every method that there is, with its formula, its source and the layers that it goes to."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    name: Annotated[str | None, typer.Argument(help="Tell more of this one, such as LORA")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page of the documentation")] = False,
) -> None:
    """List the methods, or tell what there is to know about one, its config's fields included."""
    from inlay.core.report import table
    from inlay.models import catalogue

    if markdown:
        print(catalogue.markdown(catalogue.catalogue()), end="")
    elif name is None:
        rows = [(row.peft_type, row.title, ", ".join(row.kinds)) for row in catalogue.catalogue()]
        print("\n".join(table(("method", "what it is", "layers"), rows)))
    else:
        print(catalogue.described(name.upper()))
