"""`hermes-shard`: raw datasets → checked, compact, streamable shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_tools import phantom
from hermes_dist.errors import exit_on_error

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def _root() -> None:
    """From any raw dataset to checked, compact, streamable shards; resumable and incremental."""


@app.command("phantom")
def _phantom(
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    seed: Annotated[int, typer.Option(help="Equal seeds write equal bytes.")] = 7,
    cases: Annotated[int, typer.Option(min=3, help="Cases per dataset, split 60 / 10 / 30 %.")] = 20,
) -> None:
    """Write four synthetic datasets with partial, conflicting labels.

    Example: hermes-shard phantom --out demo_data --seed 7
    """
    collection = phantom.write_phantoms(out, seed=seed, cases=cases)
    print(phantom.describe(collection))
    print(f"wrote 4 datasets of {cases} cases and {collection}")


def main() -> None:
    """Entry point of `hermes-shard`."""
    with exit_on_error():
        app()
