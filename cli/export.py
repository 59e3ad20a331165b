"""`loraq export`: a trained adapter as a model of its own, or as GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from cli import complete
from cli.main import connect


@click.command()
@click.argument("trial", metavar="BATCH/NUMBER", shell_complete=complete.trials)
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["merged_16bit", "gguf"]),
    help="As what it is written; may be given twice. merged_16bit where it is left out.",
)
@click.option(
    "--quantization-method",
    type=click.Choice(["q8_0", "bf16", "f16", "f32"]),
    help="Of gguf: how its numbers are written; q8_0 where it is left out.",
)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="Ask this to compare answers, instead of rows that were trained on. May be given several times.",
)
@click.option("--wait", is_flag=True, help="Follow the job to its end; exit code 10 if it failed.")
@click.option("--force", is_flag=True, help="Submit also where no live worker is big enough.")
@click.option("--again", is_flag=True, help="Write once more what was written before.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def export(
    trial: str,
    formats: tuple[str, ...],
    quantization_method: str | None,
    prompts: tuple[str, ...],
    wait: bool,
    force: bool,
    again: bool,
    as_json: bool,
) -> None:
    """Write a trained adapter as a model of its own, or as GGUF.

    Of a trial that has succeeded. A worker merges it into its base model in 16 bits, writes the result into the
    storage, loads it anew, and keeps it only if it answers as the adapter does.
    """
    if quantization_method and "gguf" not in formats:
        raise click.UsageError("--quantization-method is of gguf: add --format gguf.")
    from pydantic import ValidationError

    from cli.render import console, print_json
    from cli.watch import watch_batch
    from jobqueue.errors import BatchFailedError
    from jobqueue.export_spec import ExportOptions
    from jobqueue.job import JobState

    given = {"formats": formats, "quantization_method": quantization_method, "prompts": prompts}
    try:
        options = ExportOptions.model_validate({key: value for key, value in given.items() if value})
    except ValidationError as error:
        raise click.UsageError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from None
    client = connect()
    plan = client.plan_export(trial, options)
    batch = client.submit(plan, force=force, again=again)
    out, job_id = console(), f"{batch.name}.{plan.jobs[0].id}"
    if wait:
        watch_batch(client, batch.name, console(stderr=as_json))
    job = client.job(job_id)
    if as_json:
        print_json(job)
    elif job.state is JobState.SUCCEEDED:
        for made in job.outcome["exports"]:
            out.print(f"{made['format']} {compared(made)}: {job.outcome['folder']}/{made['path']}", soft_wrap=True)
    elif not wait:
        out.print(f"{job_id} is {job.state}.")
        out.print(f"  loraq watch {batch.name}  to follow it", style="dim")
        out.print(f"  loraq show {job_id}  to see where its result lies, and how close it is", style="dim")
    if wait and job.state is not JobState.SUCCEEDED:
        raise BatchFailedError(f"{job_id} did not succeed: {job.message}", f"See `loraq show {job_id}`.")


def compared(made: Mapping[str, Any]) -> str:
    """How close the answers of what was written are to the adapter's, in words."""
    same = f"{made['same_tokens']} of {made['tokens']} tokens"
    said = f"answers as the adapter does (log-probabilities differ by {made['difference']:.2g}, {same} are the same"
    base = made["base_difference"]
    if base is None:
        return f"{said})"
    if base > made["tolerance"]:
        return f"{said}; the base model's differ by {base:.2g})"
    return f"{said}), but so does the base model (by {base:.2g}): ask other prompts to tell the two apart"
