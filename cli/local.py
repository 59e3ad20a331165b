"""loraq on this machine: worker, up, down, demo."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from cli import machine
from cli.main import connect
from jobqueue import embedded
from jobqueue.errors import BatchFailedError, LoraqError, MachineError

if TYPE_CHECKING:
    from jobqueue.job import WorkerInfo
    from jobqueue.service import Client
    from jobqueue.settings import Settings

DEMO_FILE = Path(__file__).parent / "demo" / "sweep.yaml"
DEMO_STOP_S = 10.0  # its jobs need not be saved


@click.command()
@click.option("--cpu", is_flag=True, help="Train on the CPU: slow, for trying things out.")
@click.option("--gpu", "gpus", multiple=True, metavar="INDEX|UUID", help="Only this GPU; may be repeated.")
@click.option(
    "--slots",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many jobs may share a GPU, where their memory fits [default: by cores and main memory, at most 16].",
)
@click.option(
    "--spares",
    type=click.IntRange(min=0),
    metavar="N",
    help="How many trainers stand ready on each GPU before there is a job; each holds 0.8 GiB of it [default: 1].",
)
@click.option(
    "--share",
    type=click.Choice(["auto", "mps", "timeslice", "off"]),
    default="auto",
    show_default=True,
    help="How jobs share a GPU: side by side by NVIDIA's MPS, in turns, or one job at a time. auto: by MPS where "
    "several may run and its daemon can be started.",
)
@click.option("--no-control", is_flag=True, help="Without this host's control worker.")
@click.option("--control-only", is_flag=True, help="Only the control worker: sweeps and reports, trains nothing.")
def worker(
    cpu: bool,
    gpus: tuple[str, ...],
    slots: int | None,
    spares: int | None,
    share: str,
    no_control: bool,
    control_only: bool,
) -> None:
    """Work on jobs with this machine's GPUs, one worker for each, until it is told to stop.

    SIGTERM or Ctrl-C drains it: running jobs go back into the queue, which costs them no failure.
    """
    if cpu and gpus:
        raise click.UsageError("--cpu and --gpu exclude each other")
    if cpu and share != "auto":
        raise click.UsageError("--share is about GPUs; --cpu works without one")
    if share == "off" and (slots or 1) > 1:
        raise click.UsageError("--share off is one job at a time; --slots asks for several")
    if control_only and (cpu or gpus or no_control or slots or spares is not None or share != "auto"):
        raise click.UsageError("--control-only goes with no other option")
    if control_only:
        machine.require_control_extra()
    else:
        machine.require_worker_extra()
    settings = connect().settings
    environment = machine.worker_environment(settings, embedded.connect_url(settings))
    options = ["--cpu"] if cpu else [part for gpu in gpus for part in ("--gpu", gpu)]
    options += [] if slots is None else ["--slots", str(slots)]
    options += [] if spares is None else ["--spares", str(spares)]
    options += ["--share", share]
    options += ["--no-control"] if no_control else ["--control-only"] if control_only else []
    command = machine.worker_command(options)
    os.execve(command[0], command, environment)


@click.command()
@click.option("--no-worker", is_flag=True, help="Only the server.")
@click.option("--cpu", is_flag=True, help="A worker that trains on the CPU; the default where there is no GPU.")
def up(no_worker: bool, cpu: bool) -> None:
    """Start a server and a worker on this machine, in the background.

    Where LORAQ_REDIS_URL names a server, only a worker is started. What is up already stays as it is.
    """
    if not no_worker:
        machine.require_worker_extra()
    client = connect()
    settings = client.settings
    if settings.profile:
        click.echo(f"profile: {settings.profile}")
    with _alone(settings):
        url = settings.redis_url or _server_up(settings)
        if not no_worker:
            _worker_up(client, url, cpu or not machine.has_nvidia_gpu())
    click.echo("Next: `loraq submit sweep.yaml`, then `loraq watch BATCH`. `loraq down` ends all of it.")


def _server_up(settings: Settings) -> str:
    """The URL of the embedded server, started where it is not running."""
    server = embedded.recorded(settings.server_file)
    word = "is up already"
    if server is None:
        server = embedded.start(settings.data_dir / "server", die_with_parent=False)
        embedded.record(server, settings.server_file)
        word = "started"
    click.echo(f"server {word}: {machine.server_name(server.url)}, process {server.pid}, data in {server.folder}")
    return server.url


def _worker_up(client: Client, url: str, cpu: bool) -> None:
    """Start a worker where none is running for that server."""
    settings = client.settings
    running = machine.recorded_worker(settings)
    if running and running.server == machine.server_name(url):
        click.echo(f"worker is up already: process {running.pid}, log {running.log}")
        return
    if running:  # a device has one worker for each data folder
        click.echo(f"the worker for {running.server} is stopped first")
        running.stop()
    before = machine.seen(client)
    started, process = machine.start_worker(settings, url, ["--cpu"] if cpu else [], die_with_parent=False)
    machine.record_worker(settings, started)
    try:
        found = machine.wait_until_registered(client, process, Path(started.log), before)
    except BaseException:
        started.stop(DEMO_STOP_S)
        machine.forget_worker(settings)
        raise
    click.echo(f"worker started: {_devices(found)}, process {started.pid}, log {started.log}")
    if cpu:
        click.echo("It trains on the CPU: slow, for trying things out.")


def _devices(workers: list[WorkerInfo]) -> str:
    return ", ".join(w.device for w in workers if w.trains)


@click.command()
def down() -> None:
    """Stop what `loraq up` started: first the worker, which puts its jobs back, then the server.

    Everything that was submitted is kept for the next `loraq up`.
    """
    from jobqueue.service import Client

    settings = connect().settings
    with _alone(settings):
        running = machine.recorded_worker(settings)
        if running:
            orderly = running.stop()
            click.echo("worker stopped" if orderly else "worker killed: it did not stop in time")
        machine.forget_worker(settings)
        server = embedded.recorded(settings.server_file)
        if server:
            with contextlib.suppress(LoraqError):  # a server that answers nobody is stopped all the same
                Client(replace(settings, redis_url=server.url)).forget_server()
            server.stop()
            click.echo(f"server stopped; its data stays in {server.folder}")
        settings.server_file.unlink(missing_ok=True)
    if not running and not server:
        click.echo("nothing was up")


@contextlib.contextmanager
def _alone(settings: Settings) -> Iterator[None]:
    """Two `up`, or an `up` and a `down`, one after the other."""
    try:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(settings.data_dir / "up.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        what = f"cannot write in {settings.data_dir}: {error.strerror}"
        raise MachineError(what, "Set LORAQ_DATA_DIR to a folder of yours.") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@click.command()
@click.option("--keep", is_flag=True, help="Keep the folder with the adapters, logs and records.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, and nothing else to stdout.")
def demo(keep: bool, as_json: bool) -> None:
    """Try everything with a tiny model: a server, a worker, a sweep of two fine-tunes, the results.

    It takes one to two minutes on two CPU cores, downloads nothing, and leaves nothing behind.
    """
    machine.require_worker_extra()
    signal.signal(signal.SIGTERM, _leave)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="loraq-demo-"))
    try:
        ended_well = _demo(folder, as_json)
    finally:
        if keep:
            click.echo(f"kept: {folder}", err=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    click.echo(f"The demo took {time.monotonic() - began:.0f} s.", err=True)
    if not ended_well:
        raise BatchFailedError("a job of the demo did not succeed", "See the failures above; --keep keeps the logs.")


def _demo(folder: Path, as_json: bool) -> bool:
    """Everything in `folder`; True where every job succeeded."""
    from cli.render import console
    from cli.results import print_report
    from cli.watch import follow_batch
    from jobqueue.configuration import read_settings
    from jobqueue.job import JobState
    from jobqueue.service import Client

    def say(line: str) -> None:
        click.echo(line, err=as_json)

    server = embedded.start(folder / "server", die_with_parent=True)
    settings = read_settings(redis_url=server.url, storage=str(folder / "storage"), data_dir=folder, sweep_s=0.5)
    client = Client(settings)
    cpu = not machine.has_nvidia_gpu()
    say(f"server: {machine.server_name(server.url)}, in {folder}")
    started, process = machine.start_worker(settings, server.url, ["--cpu"] if cpu else [], die_with_parent=True)
    try:
        found = machine.wait_until_registered(client, process, Path(started.log), {})
        say(f"worker: {_devices(found)}")
        batch = client.submit(client.plan(client.read(DEMO_FILE)))
        say(f"submitted {batch.name} with {len(batch.jobs)} jobs, see {DEMO_FILE}")
        with _noticing_the_end_of(process, Path(started.log)):
            batch = follow_batch(client, batch.name, console(stderr=as_json))
        print_report(client.report(batch.name), "json" if as_json else "table")
        return batch.state is JobState.SUCCEEDED
    finally:
        started.stop(DEMO_STOP_S)
        server.stop()


@contextlib.contextmanager
def _noticing_the_end_of(process: subprocess.Popen[bytes], log: Path) -> Iterator[None]:
    """Raises MachineError when the worker ends, instead of waiting for it for ever."""
    done, ended = threading.Event(), threading.Event()

    def look() -> None:
        while not done.wait(0.5):
            if process.poll() is not None:
                ended.set()
                os.kill(os.getpid(), signal.SIGINT)
                return

    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        if not ended.is_set():
            raise
    finally:
        done.set()
    if ended.is_set():
        raise MachineError(f"the worker ended: {machine.last_lines(log)}", "Run again with --keep to keep its log.")


def _leave(signum: int, frame: object) -> NoReturn:
    """SIGTERM cleans up as Ctrl-C does."""
    raise SystemExit(128 + signum)
