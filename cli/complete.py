"""What a shell completes: commands and options by Click, names of batches, jobs, trials and workers from the server,
those of profiles from the file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import click
from click.shell_completion import get_completion_class

if TYPE_CHECKING:
    from jobqueue.service import Client

ASK_S = 1.0  # whoever presses Tab does not wait for a server that is away
NEWEST = 100  # batches
SHOWN = 20  # of these, with their trials
VARIABLE = "_LORAQ_COMPLETE"
Complete = Callable[[click.Context, click.Parameter, str], list[str]]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes a shell complete commands, options and names.

    Names are those of batches, jobs, trials and workers that the server knows.

    For bash: `eval "$(loraq completion bash)"` in ~/.bashrc; for zsh the same with zsh in ~/.zshrc; for fish
    `loraq completion fish > ~/.config/fish/completions/loraq.fish`.
    """
    from cli.main import loraq

    kind = get_completion_class(shell)
    assert kind is not None  # Click has all three
    click.echo(kind(loraq, {}, "loraq", VARIABLE).source())


def _of(look: Callable[[click.Context, str], Iterable[str]]) -> Complete:
    """Those names that begin like what is there; none where the server does not say."""

    def complete(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
        try:
            return [name for name in look(ctx, incomplete) if name.startswith(incomplete)]
        except Exception:  # nothing may be written over the line that somebody types
            return []

    return complete


def _client(ctx: click.Context) -> Client:
    from cli.main import connect
    from jobqueue.service import Client

    return Client(replace(connect(ctx).settings, timeout_s=ASK_S))


def _jobs(ctx: click.Context, incomplete: str) -> Iterable[str]:
    client = _client(ctx)
    names = client.store.batch_names(NEWEST)
    own = [name for name in names if incomplete.startswith(f"{name}.")]
    return [*names, *(job for name in own for job in client.store.batch(name).jobs)]


def _trials(ctx: click.Context, incomplete: str) -> Iterable[str]:
    client = _client(ctx)
    name = incomplete.partition("/")[0]
    close = [known for known in client.store.batch_names(NEWEST) if known.startswith(name)]
    counts = {known: client.store.batch(known).trials for known in close[:SHOWN]}
    return [f"{known}/{number}" for known, count in counts.items() for number in range(1, count + 1)]


def _workers(ctx: click.Context, _: str) -> Iterable[str]:
    found = _client(ctx).store.workers()
    return [*dict.fromkeys(worker.host for worker in found), *(worker.id for worker in found)]


def _profiles(_: click.Context, __: str) -> Iterable[str]:
    from jobqueue.configuration import profiles

    return profiles()


batches = _of(lambda ctx, _: _client(ctx).store.batch_names(NEWEST))
jobs = _of(_jobs)
trials = _of(_trials)
batches_and_trials = _of(lambda ctx, begun: [*_client(ctx).store.batch_names(NEWEST), *_trials(ctx, begun)])
workers = _of(_workers)
profiles = _of(_profiles)
