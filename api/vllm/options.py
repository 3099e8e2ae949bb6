"""What `molehill serve` is told for itself; all other options are vLLM's.

Their flags and help: `molehill.api.cli.serve`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from molehill.api.adapters.admission import AdmissionLimits
from molehill.api.adapters.merged_base import MergedBaseAdapter
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.layout import Layout
from molehill.engine.vllm.settings import Settings

# Command lines can be seen by every user of a machine, environments cannot.
ADMIN_KEY_VARIABLE = "MOLEHILL_ADMIN_API_KEY"


@dataclass(frozen=True)
class ApiProcess:
    """One of several that answer clients (`--api-server-count`). index: 0 of the one that owns the
    registry, whom the others follow. directory: of sockets at which it listens to them, and
    nobody else's."""

    index: int
    directory: Path

    @property
    def follows(self) -> bool:
        return self.index > 0

    @property
    def leases(self) -> Path:
        """Where requests are admitted."""
        return self.directory / "leases"

    @property
    def app(self) -> Path:
        """Where requests are forwarded to."""
        return self.directory / "app"


@dataclass(frozen=True)
class Options:
    """What the API side needs to know. The defaults hold where no launcher of ours ran.

    adapters: (name, directory) of the adapters to load at start, wherever they lie.
    layouts: of lora_B on the fused experts of those whose files do not say it, by name.
    residuals: those that were trained beside the base that is served, by name.
    non_granular: how many tokens of their answers get scalings of their own, of X-LoRAs by name.
    roots: directories that clients may load adapters from; without any, they may load none.
    store: where canonical copies go, readable on every node; None is a temporary directory.
    backend, memory, host_memory, limits: for the workers, see `molehill.engine.vllm.settings`.
    straggler_seconds: see `molehill.api.vllm.engine_watch`; longer than any step takes, for an
    engine answers between two.
    merge: whether static parts of adapters become one low-rank pair as they load.
    merge_tolerance: above 0, nearly equal experts do too, see `static_gates.gate`.
    merge_into_base: the start adapter whose static part goes into the base weights.
    merged_base: what the launcher made of that adapter.
    admission: bounds on all adapters together. hub, url_prefixes: what else may be loaded from.
    watch: whether what appears in a root is served. adapters_file: path or URL (which may be
    signed) of what is to be served, see `molehill.api.sources.desired_state`. probe: whether an
    adapter without effect is refused. adapter_chat_templates: whether an adapter's template and
    special tokens go before the base's in its chats. extra_vocab: ids after the base's own for
    tokens that adapters add. routing_bytes: for what requests ask of their routing, on each worker,
    while they run. capture_routing: whether GPU workers can tell it.
    xlora: whether X-LoRA adapters can be served.
    routed_experts: whether vLLM's `routed_experts` are mixtures' choices.
    admin_keys: for all that changes the server. trainer_control: whether who may load adapters may
    stop and resume the engine, too. process: which of several; None where one answers all.
    """

    adapters: tuple[tuple[str, Path], ...] = ()
    layouts: tuple[tuple[str, Layout], ...] = ()
    residuals: tuple[str, ...] = ()
    non_granular: tuple[tuple[str, int], ...] = ()
    roots: tuple[Path, ...] = ()
    store: Path | None = None
    backend: str = "auto"
    memory: int = Settings.memory
    host_memory: int = Settings.host_memory
    straggler_seconds: int = 120
    limits: Limits = field(default_factory=Limits)
    merge: bool = True
    merge_tolerance: float = 0.0
    merge_into_base: str | None = None
    merged_base: MergedBaseAdapter | None = None
    admission: AdmissionLimits = field(default_factory=AdmissionLimits)
    hub: bool = False
    url_prefixes: tuple[str, ...] = ()
    watch: bool = False
    adapters_file: str | None = field(default=None, repr=False)
    probe: bool = True
    adapter_chat_templates: bool = True
    extra_vocab: int = 0
    routing_bytes: int = 512 << 20
    capture_routing: bool = False
    xlora: bool = False
    routed_experts: bool = False
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    trainer_control: bool = False
    process: ApiProcess | None = None

    @property
    def follows(self) -> bool:
        """Whether another process owns the registry."""
        return self.process is not None and self.process.follows


def admin_keys_of_environment() -> tuple[str, ...]:
    key = os.environ.get(ADMIN_KEY_VARIABLE, "")
    return (key,) if key.strip() else ()


def api_keys(given: Sequence[str] | None) -> list[str]:
    """vLLM's: those of its command line, else that of the environment."""
    return [key for key in (given or [os.environ.get("VLLM_API_KEY", "")]) if key]
