"""What the application of Ray Serve is started with, and what its servers are started with for it.

As `key=value` of `serve run`, where all are text, or under `args` of a configuration file.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

HUB = "hf://"

# What a replica sets itself, and where that is said instead.
SET_BY_REPLICAS = {
    "--host": "nothing: servers listen on the loopback interface",
    "--port": "nothing: servers take a free port",
    "--served-model-name": "served_model_name",
    "--max-loras": "max_adapters_per_replica",
    "--adapters-file": "adapters_file",
    "--adapter-store": "nothing: a replica's store goes with it",
    "--shutdown-timeout": "drain_seconds",
    "--api-key": "VLLM_API_KEY in the environment of the Ray nodes",
    "--admin-api-key": "MOLEHILL_ADMIN_API_KEY in the environment of the Ray nodes",
}


class RaySettings(BaseModel):
    """model: of every server. served_model_name: of the base; left out, the last part of `model`.

    adapters: where an adapter that a request names is looked for, by its name: a directory, a URL
    prefix, or `hf://OWNER`; without it only those of adapters_file are served.
    max_adapters_per_replica: that a replica has loaded because of requests, and its server's slots.
    target_ongoing_requests: of one replica, which autoscaling aims at; max_ongoing_requests: that
    one takes. start_seconds: that a server may take to start. drain_seconds: that running requests
    may take when a replica stops. server_arguments: further ones of `molehill serve`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    served_model_name: str = ""
    adapters: str | None = None
    adapters_file: str | None = None
    max_adapters_per_replica: int = Field(default=8, ge=1)
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: float = Field(default=32, gt=0)
    max_ongoing_requests: int = Field(default=256, ge=1)
    cpus_per_replica: float = Field(default=1, ge=0)
    gpus_per_replica: float = Field(default=0, ge=0)
    health_check_seconds: float = Field(default=5, gt=0)
    start_seconds: int = Field(default=1800, ge=1)
    drain_seconds: int = Field(default=90, ge=1)
    server_arguments: list[str] = []

    @field_validator("server_arguments", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return shlex.split(value) if isinstance(value, str) else value

    @field_validator("server_arguments")
    @classmethod
    def _not_the_replicas(cls, value: list[str]) -> list[str]:
        for argument in value:
            option = argument.partition("=")[0]
            if option in SET_BY_REPLICAS:
                raise ValueError(f"found {option}, expected {SET_BY_REPLICAS[option]}")
        return value

    @model_validator(mode="after")
    def _replicas(self) -> "RaySettings":
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas: found {self.max_replicas}, expected min_replicas, "
                f"{self.min_replicas}, or more"
            )
        return self

    @property
    def base(self) -> str:
        """The base's name."""
        return self.served_model_name or Path(self.model).name

    def source_of(self, adapter: str) -> str | None:
        """As `POST /v1/adapters` takes it. None without `adapters`."""
        if self.adapters is None:
            return None
        if self.adapters.startswith(HUB):
            return f"{self.adapters.rstrip('/')}/{adapter}"
        if "://" in self.adapters:
            return f"{self.adapters.rstrip('/')}/{quote(adapter)}"
        return adapter

    def arguments(self, port: int) -> list[str]:
        """Of `molehill serve`, for a server on that port of the loopback interface."""
        return [
            self.model,
            *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", self.base),
            *("--max-loras", str(self.max_adapters_per_replica)),
            *("--shutdown-timeout", str(self.drain_seconds)),
            *(() if self.adapters_file is None else ("--adapters-file", self.adapters_file)),
            *self._allowed(),
            *self.server_arguments,
        ]

    def _allowed(self) -> tuple[str, ...]:
        if self.adapters is None:
            return ()
        if self.adapters.startswith(HUB):
            return ("--allow-hub",)
        if "://" in self.adapters:
            return ("--allow-url-prefix", f"{self.adapters.rstrip('/')}/")
        return ("--adapter-root", self.adapters)

    def deployment(self) -> Mapping[str, Any]:
        """Options of the replicas' deployment."""
        return {
            "autoscaling_config": {
                "min_replicas": self.min_replicas,
                "max_replicas": self.max_replicas,
                "target_ongoing_requests": self.target_ongoing_requests,
            },
            "max_ongoing_requests": self.max_ongoing_requests,
            "ray_actor_options": {
                "num_cpus": self.cpus_per_replica,
                "num_gpus": self.gpus_per_replica,
            },
            "health_check_period_s": self.health_check_seconds,
            "health_check_timeout_s": 2 * self.health_check_seconds,
            # The server's end comes after its requests'.
            "graceful_shutdown_timeout_s": self.drain_seconds + 30,
        }
