"""The examples for systemd and Kubernetes: what they say is right, and fits the settings."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from jobqueue.configuration import NAMES
from jobqueue.settings import Settings

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "ops" / "loraq-worker.service"


def unit() -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read_string(UNIT.read_text())
    return parsed


def pods() -> dict[str, dict[str, Any]]:
    """Name of the deployment -> its pods' spec."""
    documents = yaml.safe_load_all((ROOT / "ops" / "kubernetes.yaml").read_text())
    return {document["metadata"]["name"]: document["spec"]["template"]["spec"] for document in documents}


def long_enough(outer_s: float, grace_s: float) -> bool:
    return outer_s >= 4 * grace_s + 20


def test_systemd_gives_a_worker_the_time_that_it_needs_and_kills_what_is_left() -> None:
    service = unit()["Service"]
    environment = dict(word.split("=") for word in service["Environment"].split())

    assert long_enough(float(service["TimeoutStopSec"]), float(environment["LORAQ_GRACE_S"]))
    assert (service["KillMode"], service["SendSIGKILL"], service["OOMPolicy"]) == ("mixed", "yes", "continue")
    assert {name.removeprefix("LORAQ_").lower() for name in environment} <= set(NAMES)


def test_systemd_finds_no_mistake_in_the_unit(tmp_path: Path) -> None:
    assert shutil.which("systemd-analyze"), "this test needs systemd-analyze"
    loraq = tmp_path / "loraq"
    loraq.write_text("#!/bin/sh\n")
    loraq.chmod(0o755)
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/loraq/bin/loraq", str(loraq)).replace("User=loraq", "User=root"))

    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)

    assert UNIT.name not in done.stderr, done.stderr


def test_kubernetes_gives_a_pod_the_time_that_it_needs() -> None:
    for name, pod in pods().items():
        (container,) = pod["containers"]
        environment = {each["name"]: each.get("value") for each in container["env"]}
        grace_s = float(environment.get("LORAQ_GRACE_S") or Settings.grace_s)
        assert name == "loraq-control" or long_enough(pod["terminationGracePeriodSeconds"], grace_s)
        ours = {key.removeprefix("LORAQ_").lower() for key in environment if key.startswith("LORAQ_")}
        assert ours <= set(NAMES)
        assert container["command"][:2] == ["loraq", "worker"], "no shell in front of it"
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_compose_gives_a_container_the_time_that_it_needs() -> None:
    worker = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["worker"]

    assert worker["stop_grace_period"] == "2m"
    assert long_enough(120, Settings.grace_s)


def test_the_operators_page_says_how_long_that_is() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()

    assert "four times `LORAQ_GRACE_S`, and 20 s" in page
    assert f"`LORAQ_GRACE_S` ({Settings.grace_s:g} s)" in page
