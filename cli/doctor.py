"""`loraq doctor`: what is wrong with this machine's setup, and what to do about it."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.main import connect, installed_version, named_profile

if TYPE_CHECKING:
    from jobqueue.doctor import Finding
    from jobqueue.settings import Settings

FREE_GIB = 20  # of disk: a model in 16 bits and its adapters
PASSWORD = re.compile(r"://[^/\s]*:[^/\s]*@")
STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Look for what is wrong with settings, server, storage, workers and this machine.

    The exit code is that of the first problem, 0 where there is none.
    """
    from cli.render import console, print_json
    from jobqueue.doctor import examine

    out, found = console(), []
    client = connect()
    for finding in (*_settings(named_profile(ctx)), *_machine(client.settings), *examine(client)):
        found.append(finding)
        if not as_json:
            out.print(f"{finding.level:<8}", style=STYLES[finding.level], end="")
            out.print(f"{finding.subject:<9}{finding.what}", soft_wrap=True)
            if finding.do and finding.level != "ok":
                out.print(f"{'':17}{finding.do}", soft_wrap=True)
    if as_json:
        print_json(found)
    wrong = [finding for finding in found if finding.level == "problem"]
    if wrong:
        ctx.exit(next((finding.exit_code for finding in wrong if finding.exit_code), 1))


def _settings(profile: str | None) -> Iterator[Finding]:
    """Where they come from, the strongest first."""
    from jobqueue.configuration import config_file, sources
    from jobqueue.doctor import Finding

    what = ", then ".join(source.what for source in sources(profile) if source.values) or "defaults alone"
    file = config_file()
    yield Finding("ok", "settings", what if file.exists() else f"{what}; there is no {file}")
    if file.is_file() and file.stat().st_mode & 0o044 and PASSWORD.search(file.read_text(encoding="utf-8-sig")):
        yield Finding("note", "settings", f"{file} has a password that others here may read", f"chmod 600 {file}")


def _machine(settings: Settings) -> Iterator[Finding]:
    from cli import machine
    from jobqueue.doctor import Finding, problem
    from jobqueue.errors import MachineError

    yield Finding("ok", "machine", f"loraq {installed_version()}, Python {platform.python_version()}")
    yield _disk(settings.data_dir)
    gpus = machine.gpu_names()
    try:
        machine.require_worker_extra()
    except MachineError as error:
        if gpus:
            yield problem("machine", error)
        else:
            yield Finding("ok", "machine", "submits only: what trains is not installed")
        return
    if not gpus:
        yield Finding("note", "machine", "no NVIDIA GPU is seen", "Without one: loraq worker --cpu, for trying out.")
        return
    yield Finding("ok", "machine", ", ".join(gpus))
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        yield problem("machine", MachineError("there is no C compiler, which Triton needs", "Install gcc."))
    if shutil.which("nvidia-cuda-mps-control") is None:
        yield Finding(
            "note", "machine", "there is no nvidia-cuda-mps-control: jobs take turns on a GPU",
            "It comes with the NVIDIA driver; with it several run at the same time.",
        )  # fmt: skip


def _disk(folder: Path) -> Finding:
    from jobqueue.doctor import Finding, problem
    from jobqueue.errors import MachineError
    from jobqueue.memory import GIB

    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return problem(
            "machine", MachineError(f"{folder} cannot be written", "Set LORAQ_DATA_DIR to a folder of yours.")
        )
    free = shutil.disk_usage(there).free / GIB
    if free < FREE_GIB:
        what = f"{free:.0f} GiB are free for {folder}: a model in 16 bits may take more"
        return Finding("note", "machine", what, "Make room, or set LORAQ_DATA_DIR to a larger disk.")
    return Finding("ok", "machine", f"{free:,.0f} GiB are free for {folder}")
