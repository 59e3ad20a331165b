"""`loraq cards`: people rate answers, without knowing who wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from cli import complete
from cli.main import connect

DELIMITERS = {"comma": ",", "semicolon": ";"}


@click.group()
def cards() -> None:
    """Have people rate a batch's answers, blind: export a sheet, import what three or more reviewers filled in."""


@cards.command()
@click.argument("batch", shell_complete=complete.batches)
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="The sheet to write."
)
@click.option("--questions", default=20, show_default=True, type=click.IntRange(1), help="How many are asked about.")
@click.option("--seed", default=3407, show_default=True, type=click.IntRange(0), help="Another seed, another sheet.")
@click.option(
    "--delimiter", default="comma", show_default=True, type=click.Choice([*DELIMITERS]), help="As your Excel wants it."
)
def export(batch: str, out: Path, questions: int, seed: int, delimiter: Literal["comma", "semicolon"]) -> None:
    """Write a sheet of answers of a batch's base model and trials to the same questions.

    Which model wrote an answer stands nowhere in it. Give a copy to each reviewer, who writes a name and, for each
    card, whole numbers from 1 (worst) to 5 (best). The same seed makes the same sheet again.
    """
    from cli.render import counted
    from jobqueue.cards import as_csv

    deck = connect().export_cards(batch, questions, seed)
    try:
        out.write_bytes(as_csv(deck, DELIMITERS[delimiter]))
    except OSError as error:
        raise click.FileError(str(out), error.strerror) from error
    asked = len({card.index for card in deck.cards})
    click.echo(
        f"wrote {out}: {counted(len(deck.cards), 'card')}, {counted(asked, 'question')} to {len(deck.models)} models"
    )


@cards.command("import")
@click.argument("batch", shell_complete=complete.batches)
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def import_cards(batch: str, files: tuple[Path, ...], as_json: bool) -> None:
    """Read the filled sheets of three reviewers or more, one sheet each, and show what came out.

    They are kept with the batch: `loraq results` shows them too. A later import replaces them.
    """
    from cli.render import console, print_json
    from cli.results import print_ratings

    ratings = connect().import_cards(batch, files)
    if as_json:
        print_json(ratings)
        return
    print_ratings(console(), ratings, f"{batch}: ")
