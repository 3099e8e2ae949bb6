"""What `serve run` and deploy/ray/serve.yaml are given, and `molehill serve` for it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from molehill.api.cli import serve
from molehill.api.ray.settings import SET_BY_REPLICAS, RaySettings

ROOT = Path(__file__).parents[4]


def test_text_of_the_command_line_becomes_what_it_says() -> None:
    result = RaySettings(
        model="/models/tiny", min_replicas="2", max_replicas="3", server_arguments="--dtype float32"
    )
    assert (result.base, result.min_replicas) == ("tiny", 2)
    assert result.server_arguments == ["--dtype", "float32"]
    assert result.deployment()["autoscaling_config"]["max_replicas"] == 3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "model"),
        ({"model": "m", "max_replica": 2}, "max_replica"),
        ({"model": "m", "max_adapters_per_replica": 0}, "max_adapters_per_replica"),
        ({"model": "m", "min_replicas": 2}, "max_replicas: found 1, expected min_replicas, 2"),
        ({"model": "m", "server_arguments": "--port=1"}, "found --port, expected nothing"),
        ({"model": "m", "server_arguments": ["--api-key", "k"]}, "expected VLLM_API_KEY"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RaySettings(**wrong)


@pytest.mark.parametrize(
    ("adapters", "source", "allowed"),
    [
        (None, None, []),
        ("/srv/adapters", "team/a:v2", ["--adapter-root", "/srv/adapters"]),
        ("s3://b/x", "s3://b/x/team/a%3Av2", ["--allow-url-prefix", "s3://b/x/"]),
        ("hf://owner", "hf://owner/team/a:v2", ["--allow-hub"]),
    ],
)
def test_an_adapter_is_looked_for_by_its_name(
    adapters: str | None, source: str | None, allowed: list[str]
) -> None:
    settings = RaySettings(model="m", adapters=adapters)
    assert settings.source_of("team/a:v2") == source
    arguments = settings.arguments(1)
    assert [part for part in arguments if part in allowed] == allowed
    assert ("--adapter-root" in arguments) == (allowed[:1] == ["--adapter-root"])


def test_the_shipped_file_is_what_the_application_takes(tmp_path: Path) -> None:
    (only,) = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())["applications"]
    module, _, function = only["import_path"].partition(":")
    path = ROOT / module.removeprefix("molehill.").replace(".", "/")
    assert f"def {function}(" in path.with_suffix(".py").read_text()
    settings = RaySettings(**only["args"])
    # The server's parser knows what it would be given.
    known = {option.flag for group in serve.OPTIONS.values() for option in group}
    ours = {part for part in settings.arguments(1) if part.startswith("--")} - {
        *("--host", "--port", "--served-model-name", "--max-loras", "--shutdown-timeout"),
    }
    assert ours == {"--adapters-file", "--adapter-root"} <= known
    assert {"--adapter-store", "--admin-api-key"} <= SET_BY_REPLICAS.keys() & known
