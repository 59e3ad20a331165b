"""Where settings come from, which of them count, and what is said of those that are wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from jobqueue.configuration import profiles, read_settings
from jobqueue.errors import LoraqError
from jobqueue.settings import Settings

FILE = """
timeout_s = 1
lease_s = 100
owner = "top"

[profiles.lab]
redis_url = "redis://lab/0"
owner = "lab"

[profiles.cloud]
redis_url = "redis://cloud/0"
storage = "s3://bucket/loraq"
"""


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    file = tmp_path / "config.toml"
    file.write_text(FILE)
    monkeypatch.setenv("LORAQ_CONFIG", str(file))
    return file


def error_of(profile: str | None = None) -> LoraqError:
    with pytest.raises(LoraqError) as caught:
        read_settings(profile)
    return caught.value


@pytest.mark.parametrize(
    ("text", "price"), [("", None), ("2.5", 2.5), ("0", 0.0), ('{"H100": 2.5, "T4": 0.35}', {"H100": 2.5, "T4": 0.35})]
)
def test_price_of_a_gpu_hour(monkeypatch: pytest.MonkeyPatch, text: str, price: Any) -> None:
    monkeypatch.setenv("LORAQ_GPU_HOUR_PRICE", text)

    assert read_settings().gpu_hour_price == price


@pytest.mark.parametrize("text", ["-1", "NaN", "cheap", '{"H100": "?"}', '{"H100": -2}'])
def test_price_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("LORAQ_GPU_HOUR_PRICE", text)

    assert "gpu_hour_price" in error_of().what.lower()


def test_values_have_the_types_of_their_settings(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAQ_MODEL_ROOTS", '["/models", "/data"]')
    monkeypatch.setenv("LORAQ_GGUF_CONVERTER", "/opt/convert.py")
    monkeypatch.setenv("LORAQ_DATA_DIR", "~/loraq")
    monkeypatch.setenv("LORAQ_STORAGE", "shared")
    monkeypatch.setenv("LORAQ_MAX_FAILURES", "5")

    read = read_settings(sweep_s=1)

    assert (read.timeout_s, read.sweep_s, read.max_failures) == (1.0, 1.0, 5)
    assert read.model_roots == (Path("/models"), Path("/data"))
    assert (read.gguf_converter, read.data_dir) == (Path("/opt/convert.py"), Path.home() / "loraq")
    assert read.storage == str(Path("shared").absolute())


@pytest.mark.parametrize(
    ("named", "variables", "url", "owner"),
    [
        (None, {}, None, "top"),
        ("lab", {}, "redis://lab/0", "lab"),
        ("cloud", {}, "redis://cloud/0", "top"),
        (None, {"PROFILE": "lab"}, "redis://lab/0", "lab"),
        (None, {"PROFILE": ""}, None, "top"),
        ("cloud", {"PROFILE": "lab"}, "redis://cloud/0", "top"),
        (None, {"PROFILE": "lab", "REDIS_URL": "redis://here/0"}, "redis://here/0", "lab"),
        ("lab", {"REDIS_URL": "redis://here/0"}, "redis://lab/0", "lab"),  # else `--profile lab rm` hits another one
        ("cloud", {"OWNER": "ann"}, "redis://cloud/0", "ann"),
    ],
)
def test_which_profile_counts_and_what_goes_before_it(
    config: Path, monkeypatch: pytest.MonkeyPatch, named: str | None, variables: dict[str, str], url: str, owner: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"LORAQ_{name}", value)

    read = read_settings(named)

    assert (read.redis_url, read.owner, read.timeout_s) == (url, owner, 1.0)
    assert read.profile == (named or variables.get("PROFILE") or None)


def test_the_file_names_the_profile_that_counts_by_default(config: Path) -> None:
    config.write_text(f'profile = "cloud"\n{FILE}')

    assert (read_settings().profile, read_settings().redis_url) == ("cloud", "redis://cloud/0")
    assert (read_settings("lab").profile, read_settings("lab").redis_url) == ("lab", "redis://lab/0")
    assert profiles() == ["lab", "cloud"]


def test_an_unknown_profile_is_told_with_those_that_there_are(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = error_of("lba")
    assert (error.what, error.do) == (f"there is no profile 'lba' in {config}", "The profiles there are: lab, cloud.")

    monkeypatch.setenv("LORAQ_PROFILE", "clod")
    assert error_of().what == f"there is no profile 'clod' in {config}"

    config.write_text("")
    assert error_of("lab").do == "Write one there: [profiles.lab]."


def test_an_empty_name_in_a_call_is_not_the_default(config: Path) -> None:
    """`loraq --profile "$CLUSTER" rm b`, with a variable that is not set, must not remove the batch of another one."""
    config.write_text(f'profile = "cloud"\n{FILE}')

    assert error_of("").what == f"there is no profile '' in {config}"


def test_a_mistake_in_a_profile_hinders_only_who_uses_it(config: Path) -> None:
    config.write_text(f'{FILE}redis = "x"\npoll_s = "often"\n')

    assert read_settings("lab").owner == "lab"
    what = error_of("cloud").what
    assert "profiles.cloud.redis is no setting; did you mean redis_url?" in what
    assert "profiles.cloud.poll_s must be a number, not 'often'" in what


def test_everything_that_is_wrong_is_told_at_once(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text('leese_s = 30\nstorage = 5\nlease_s = 10\nLORAQ_OWNER = "ann"\ngpu_hour_price = {T4 = "x"}\n')
    monkeypatch.setenv("LORAQ_STORGE", "/mnt/team")
    monkeypatch.setenv("LORAQ_MODEL_ROOTS", "/models")
    monkeypatch.setenv("LORAQ_TIMEOUT_S", "0")

    what = error_of().what

    for mistake in (
        "LORAQ_STORGE is no setting; did you mean LORAQ_STORAGE?",
        "leese_s is no setting; did you mean lease_s?",
        "storage must be text, not 5",
        "LORAQ_OWNER is no setting; did you mean owner?",
        'gpu_hour_price must be a number or values by name, e.g. {"a": ...};',
        'LORAQ_MODEL_ROOTS must be a list, e.g. ["a", "b"], not \'/models\'',
        "timeout_s (0) must be above 0",
        "renew_s (5) must be at most a third of lease_s (10)",
    ):
        assert mistake in what


def test_a_mark_at_the_beginning_of_the_file_is_passed_over(config: Path) -> None:
    config.write_text("timeout_s = 4", encoding="utf-8-sig")

    assert read_settings().timeout_s == 4


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("lease_s = = 3", "is not valid TOML"),
        ('owner = "\udce9"', "is not valid TOML"),
        ('profiles = "lab"', "the profiles in"),
        ("[profiles]\nlab = 1", "the profiles in"),
        ('profile = ["lab"]', "profile in"),
        ('[profile.lab]\nredis_url = "redis://:secret@lab/0"', "profile in"),
    ],
)
def test_a_file_that_cannot_be_understood(config: Path, text: str, what: str) -> None:
    config.write_bytes(text.encode(errors="surrogateescape"))

    assert what in error_of().what
    assert str(config) in error_of().what
    assert "secret" not in str(error_of())


def test_a_file_that_is_named_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAQ_CONFIG", str(tmp_path / "gone.toml"))
    assert error_of().what == f"LORAQ_CONFIG names {tmp_path / 'gone.toml'}, which is not there"

    monkeypatch.setenv("LORAQ_CONFIG", str(tmp_path))
    assert error_of().what == f"{tmp_path} cannot be read: Is a directory"

    monkeypatch.delenv("LORAQ_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert read_settings().lease_s == 60  # the one of the user's folder need not be

    monkeypatch.setenv("LORAQ_CONFIG", os.devnull)
    assert read_settings().lease_s == 60


def test_a_program_that_misspells_a_setting_is_told() -> None:
    with pytest.raises(LoraqError, match="redis is no setting; did you mean redis_url"):
        read_settings(redis="redis://lab/0")


def test_settings_of_ones_own_are_held_to_their_bounds_too() -> None:
    with pytest.raises(ValueError, match=r"grace_s \(-1\) must be at least 0; archive_days \(inf\) must be below inf"):
        Settings(grace_s=-1, archive_days=float("inf"))


@pytest.mark.parametrize(
    "text",
    [
        '{"team": "team.example/s3cret"}',
        '{"team": "ftp://team.example/s3cret"}',
        '{"team": "https://user:s3cret@team.example"}',
        '{"team": "https://team.example:port/s3cret"}',
        '{"team": "https://team.example:99999/s3cret"}',
        '{"a b": "https://x/s3cret"}',
        '{"http://x": "https://x/s3cret"}',
        '{"team": ["https://x/s3cret"]}',
        '{"team": "https://x/s3cret"',
        "s3cret",
    ],
)
def test_webhooks_that_are_none_are_refused_without_their_urls(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("LORAQ_WEBHOOKS", text)

    assert "webhooks" in error_of().what.lower()
    assert "s3cret" not in error_of().what


@pytest.mark.parametrize("text", ["'no end", "  "])
def test_a_command_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("LORAQ_ON_BATCH_END", text)

    assert "on_batch_end" in error_of().what.lower()


@pytest.mark.parametrize("text", ["0", "65536", "http"])
def test_a_port_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("LORAQ_METRICS_PORT", text)

    assert "metrics_port" in error_of().what.lower()
