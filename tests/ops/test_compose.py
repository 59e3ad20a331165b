"""compose.yaml, redis.conf and the image, as far as they can be checked without a container engine.

compose-spec.json is the schema of the Compose Specification at commit 170098b of
github.com/compose-spec/compose-spec: Apache-2.0, Copyright 2020 The Compose Specification Authors.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from jsonschema import Draft7Validator, ValidationError

from jobqueue import embedded

ROOT = Path(__file__).parents[2]
SCHEMA = Draft7Validator(json.loads((ROOT / "tests" / "ops" / "compose-spec.json").read_text()))
PASSWORD = "a-password-for-the-test"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return loaded


def directives() -> dict[str, str]:
    lines = (ROOT / "ops" / "redis.conf").read_text().splitlines()
    split = [line.split(None, 1) for line in lines if line.strip() and not line.startswith("#")]
    return {name: value.strip() for name, value in split}


@contextmanager
def as_compose_starts_it(compose: dict[str, Any], folder: Path) -> Iterator[redis.Redis]:
    """The command of the redis service, with the embedded server as `redis-server`."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "redis-server").symlink_to(embedded.server_binary())
    port = embedded._free_port()
    config = folder / "redis.conf"
    config.write_text(f"{(ROOT / 'ops' / 'redis.conf').read_text()}\nport {port}\nbind 127.0.0.1\n")
    shell, flag, script = compose["services"]["redis"]["command"]
    script = script.replace("$$", "$").replace("/usr/local/etc/redis/redis.conf", str(config))
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "REDIS_PASSWORD": PASSWORD}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([shell, flag, script], cwd=folder, env=environment, stdout=log, stderr=log)
    client = redis.Redis(port=port, password=PASSWORD, decode_responses=True)
    try:
        for _ in range(500):
            try:
                client.ping()
                break
            except redis.ConnectionError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.02)
        yield client
    finally:
        client.close()
        process.terminate()  # as `docker stop` does
        assert process.wait(10) == 0
        assert "bye bye" in (folder / "log").read_text()


def test_the_compose_file_follows_the_specification(compose: dict[str, Any]) -> None:
    errors = [f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in SCHEMA.iter_errors(compose)]

    assert not errors


def test_the_schema_finds_a_mistake(compose: dict[str, Any]) -> None:
    wrong = {**compose, "services": {"worker": {"image": "loraq", "stop_grace": "2m"}}}

    with pytest.raises(ValidationError, match="stop_grace"):
        SCHEMA.validate(wrong)


def test_what_the_compose_file_names_is_there(compose: dict[str, Any]) -> None:
    services = compose["services"]
    volumes = [volume for service in services.values() for volume in service["volumes"]]
    defaults = [re.sub(r"\$\{\w+:-(\w*)\}", r"\1", volume) for volume in volumes]  # ${NAME:-default} -> default
    mounts = [volume.split(":")[0] for volume in defaults]
    files = [mount for mount in mounts if mount.startswith(".")]

    assert {mount for mount in mounts if mount not in files} == set(compose["volumes"])
    assert all((ROOT / file).is_file() for file in files)
    assert (ROOT / services["worker"]["build"]["dockerfile"]).is_file()
    assert {"healthcheck", "stop_grace_period"} <= set(services["redis"])


def test_a_worker_gets_the_gpus_and_time_to_drain(compose: dict[str, Any]) -> None:
    worker = compose["services"]["worker"]
    (devices,) = worker["deploy"]["resources"]["reservations"]["devices"]

    assert devices == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert worker["stop_grace_period"] == "2m"
    assert worker["depends_on"]["redis"]["condition"] == "service_healthy"


def test_redis_keeps_every_record() -> None:
    assert directives()["appendonly"] == "yes"
    assert directives()["maxmemory-policy"] == "noeviction"


def test_the_server_starts_with_redis_conf_as_compose_does_it(compose: dict[str, Any], tmp_path: Path) -> None:
    with as_compose_starts_it(compose, tmp_path) as client:
        config = client.config_get("*")
        without = redis.Redis(port=client.get_connection_kwargs()["port"])
        with pytest.raises(redis.AuthenticationError):
            without.ping()
        shown = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout

    for name, wanted in directives().items():
        if name not in ("save", "maxmemory"):  # shown in another form
            assert config[name] == wanted, name
    assert PASSWORD not in shown


def test_the_image_runs_as_a_user_and_installs_the_pinned_versions() -> None:
    lines = (ROOT / "ops" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = {source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1] if source[0] != "-"}
    allowed = (ROOT / "ops" / "Dockerfile.dockerignore").read_text().splitlines()

    assert [line for line in lines if line.startswith("USER ")] == ["USER loraq"]
    assert any(line.startswith("HEALTHCHECK ") for line in lines)
    assert any(re.search(r"pip install -c constraints\.txt -r", line) for line in lines)
    assert all((ROOT / source).exists() for source in copied)
    assert {f"!{source}" for source in copied} <= set(allowed)
