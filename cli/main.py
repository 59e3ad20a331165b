"""The command `loraq`: its commands by name, what an error looks like, and the way to the service.

Everything but Click is imported by the command that needs it, so that `loraq --help` starts at once.
"""

from __future__ import annotations

import difflib
import errno
import os
import traceback
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.exceptions import Exit

from cli import complete
from jobqueue.errors import LoraqError

if TYPE_CHECKING:
    from jobqueue.service import Client

INTERRUPTED = 130

# name: (module, how the command's help begins). A command is the module's attribute of that name.
COMMANDS = {
    "submit": ("cli.submit", "Put the fine-tunes of a sweep file into the queue."),
    "preview": ("cli.preview", "Show what a training would read, and what of it is trained on."),
    "export": ("cli.export", "Write a trained adapter as a model of its own, or as GGUF."),
    "pull": ("cli.pull", "Copy a trial's adapter to this machine."),
    "ls": ("cli.control", "List batches, or the jobs of one."),
    "show": ("cli.show", "Show a batch or a job in full."),
    "watch": ("cli.watch", "Follow a batch until it has ended."),
    "top": ("cli.top", "Show workers, what runs and what waits, refreshed."),
    "logs": ("cli.logs", "Show what a job has printed."),
    "results": ("cli.results", "Show which trial is better, by how much, and what it cost."),
    "ask": ("cli.ask", "Ask a trial's base model and its adapter the same, and show both answers."),
    "cards": ("cli.cards", "Have people rate a batch's answers, blind."),
    "cancel": ("cli.control", "Stop batches or jobs."),
    "retry": ("cli.steer", "Run again what failed or was cancelled."),
    "hold": ("cli.steer", "Keep jobs, batches or a memory class from being started."),
    "release": ("cli.steer", "End a hold."),
    "rm": ("cli.steer", "Forget batches that have ended."),
    "workers": ("cli.steer", "List the workers, what they run, and why one takes nothing."),
    "drain": ("cli.steer", "Empty a worker, or all workers of a host."),
    "undrain": ("cli.steer", "Let drained workers take jobs again."),
    "worker": ("cli.local", "Work on jobs with this machine's GPUs."),
    "up": ("cli.local", "Start a server and a worker on this machine."),
    "down": ("cli.local", "Stop what `loraq up` started."),
    "doctor": ("cli.doctor", "Look for what is wrong with settings, server, storage, workers and this machine."),
    "demo": ("cli.local", "Try everything with a tiny model."),
    "completion": ("cli.complete", "Print what makes a shell complete commands, options and names."),
}


class LazyGroup(click.Group):
    """Imports a command when it is called, and turns every exception into two lines and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(COMMANDS[cmd_name][0]), cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        close = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if args[0] not in COMMANDS and close:  # Click knows only the names of commands that were imported
            ctx.fail(f"No such command {args[0]!r}. Did you mean {close[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in exit_codes()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            if error.option_name in [name for each in self.params for name in each.opts]:
                raise click.UsageError(f"{error.option_name} goes before the command.", error.ctx) from None
            raise
        except (click.ClickException, Exit):
            raise
        except (KeyboardInterrupt, click.Abort):
            ctx.exit(INTERRUPTED)
        except LoraqError as error:
            _fail(ctx, error.what, error.do, error.exit_code)
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # `loraq ls | head`: Click ends quietly
            what = " ".join(f"{type(error).__name__}: {error}".split())
            _fail(
                ctx,
                what,
                "This should not happen; run again with --debug (`loraq --debug ...`) to see where.",
                1,
            )


def _fail(ctx: click.Context, what: str, do: str, exit_code: int) -> NoReturn:
    """Say what happened and what to do about it, and leave."""
    if ctx.params.get("debug"):
        traceback.print_exc()
    color = False if os.environ.get("NO_COLOR") else None
    click.secho(what, fg="red", bold=True, err=True, color=color)
    if do:
        click.echo(do, err=True)
    ctx.exit(exit_code)


def exit_codes() -> Iterator[tuple[int, str]]:
    """Every exit code and its meaning; those of errors come from jobqueue.errors."""
    yield 0, "Done."
    yield 1, "Anything else."
    yield 2, "The command line is wrong."
    for error in sorted(LoraqError.__subclasses__(), key=lambda kind: kind.exit_code):
        if error.exit_code != LoraqError.exit_code:
            yield (
                error.exit_code,
                (error.__doc__ or "").partition("\n")[0].partition(";")[0].rstrip(".") + ".",
            )
    yield INTERRUPTED, "Interrupted (ctrl-C)."


def connect(ctx: click.Context | None = None) -> Client:
    """The service with the user's settings; it talks to the server at its first call."""
    from jobqueue.configuration import read_settings
    from jobqueue.service import Client

    return Client(read_settings(named_profile(ctx or click.get_current_context(silent=True))))


def named_profile(ctx: click.Context | None) -> str | None:
    """That of --profile."""
    return ctx.find_root().params.get("profile") if ctx else None


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    click.echo(f"loraq {installed_version()}")
    ctx.exit()


def installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("loraq")
    except PackageNotFoundError:
        return "(not installed: run from its source)"


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version.",
)
@click.option(
    "--profile",
    metavar="NAME",
    shell_complete=complete.profiles,
    help="The cluster that is meant: a [profiles.NAME] of the configuration file.",
)
@click.option("--debug", is_flag=True, help="Show where an error came from.")
def loraq(profile: str | None, debug: bool) -> None:
    """A job queue for LLM fine-tuning: submit a sweep, let GPUs work it off, see which run is better."""


def main() -> None:
    """Entry point of the command."""
    loraq(prog_name="loraq")


if __name__ == "__main__":
    main()
