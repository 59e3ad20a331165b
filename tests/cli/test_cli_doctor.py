"""`loraq doctor`, against a live server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner, Result

from cli import machine
from cli.main import loraq
from jobqueue.settings import Settings
from jobqueue.store import Store

Run = Callable[..., Result]
INFO = {"host": "box", "uuid": "", "usable_bytes": 1, "slots": 1, "running": [], "note": "", "every_s": 60}


@pytest.fixture
def store(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """Of a setup with which nothing is wrong."""
    assert settings.redis_url is not None
    config = tmp_path / "config.toml"
    config.write_text("")
    monkeypatch.setenv("LORAQ_CONFIG", str(config))
    monkeypatch.setenv("LORAQ_REDIS_URL", settings.redis_url)
    monkeypatch.setenv("LORAQ_STORAGE", settings.storage_url)
    monkeypatch.setattr(machine, "gpu_names", list)
    monkeypatch.setattr("cli.doctor.FREE_GIB", 0)
    found = Store(settings.redis_url)
    for device in ("cpu", "control"):
        found.heartbeat(f"box/{device}", device, INFO | {"device": device})
    return found


def run(*words: str) -> Result:
    return CliRunner().invoke(loraq, ["doctor", *words], prog_name="loraq")


def problems(result: Result) -> list[str]:
    return [line for line in result.stdout.splitlines() if line.startswith("problem")]


def test_a_setup_that_works_is_said_to(store: Store) -> None:
    result = run()
    assert result.exit_code == 0
    assert not problems(result)
    for words in ("ok      server   ", "can be written and read", "2 alive: box/control, box/cpu", "loraq "):
        assert words in result.stdout
    found = json.loads(run("--json").stdout)
    assert {finding["subject"] for finding in found} == {"settings", "machine", "server", "storage", "workers"}


def test_each_problem_says_what_to_do_and_the_first_one_gives_the_exit_code(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORAQ_STORAGE", str(tmp_path / "file" / "storage"))
    store.leave("box/control")
    store.leave("box/cpu")
    result = run()
    storage, workers = problems(result)
    assert "storage" in storage
    assert "none is alive that trains: jobs wait" in workers
    assert "`loraq worker` on a GPU host" in result.stdout
    assert result.exit_code == 7


def test_without_a_server_the_rest_is_looked_at(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAQ_REDIS_URL", "redis://127.0.0.1:1/0")
    result = run()
    assert len(problems(result)) == 1
    assert "does not answer" in problems(result)[0]
    assert "ok      machine" in result.stdout
    assert result.exit_code == 5


def test_settings_of_the_server_with_which_jobs_get_lost_are_a_problem(store: Store, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            result = run()
        finally:
            client.config_set("maxmemory-policy", "noeviction")
    assert "set maxmemory-policy noeviction" in problems(result)[0]
    assert result.exit_code == 5


def test_a_password_that_others_may_read_is_noted(store: Store, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    for text, mode, noted in (
        ("[profiles.lab]\nredis_url = 'redis://:secret@lab/0'", 0o644, True),
        ("[profiles.lab]\nredis_url = 'redis://:secret@lab/0'", 0o600, False),
        ("owner = 'ann@lab'\n[profiles.lab]\nredis_url = 'redis://lab/0'", 0o644, False),
    ):
        config.write_text(text)
        config.chmod(mode)
        result = run()
        assert (f"chmod 600 {config}" in result.stdout, result.exit_code) == (noted, 0)
        assert "secret" not in result.stdout


def test_what_settings_come_from_is_said_in_the_order_in_which_it_counts(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    variables = "LORAQ_REDIS_URL, LORAQ_STORAGE, LORAQ_DATA_DIR"
    assert f"ok      settings {variables}\n" in run().stdout
    config.write_text(f'owner = "ann"\n[profiles.lab]\nredis_url = "{store.url}"\n')
    assert f"settings {variables}, then {config}\n" in run().stdout
    named = CliRunner().invoke(loraq, ["--profile", "lab", "doctor"], prog_name="loraq").stdout
    assert f"settings profile lab, then {variables}, then {config}\n" in named
    monkeypatch.setenv("LORAQ_PROFILE", "lab")
    assert f"settings LORAQ_PROFILE, {variables}, then profile lab, then {config}\n" in run().stdout


def test_a_gpu_host_needs_a_compiler_and_is_told_of_mps(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu_names", lambda: ["NVIDIA Fake, 80 GiB"])
    monkeypatch.setattr(shutil, "which", lambda _: None)
    result = run()
    assert "ok      machine  NVIDIA Fake, 80 GiB" in result.stdout
    assert problems(result) == ["problem machine  there is no C compiler, which Triton needs"]
    assert "there is no nvidia-cuda-mps-control" in result.stdout
    assert result.exit_code == 9


def test_workers_that_take_nothing_and_a_clock_that_is_wrong_are_noted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.heartbeat("box/gpu0", "gpu", INFO | {"device": "a GPU", "note": "drained"})
    usual = Store.server
    monkeypatch.setattr(Store, "server", lambda self: (usual(self)[0], usual(self)[1] + 100))
    result = run()
    assert "note    clock    the server's is 100 s ahead of this machine's" in result.stdout
    assert "note    workers  box/gpu0 takes nothing or less: drained" in result.stdout
    assert result.exit_code == 0
