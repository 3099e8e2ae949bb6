"""molehill's settings on a worker. They travel as vLLM's `additional_config["molehill"]`."""

from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from molehill.engine.adapter.base_model import Limits

GIB = 1 << 30


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Settings:
    """backend: see `backends.NAMES`. limits: of one adapter, see Limits.

    memory: bytes for the serving copies of all adapters on one worker. A GPU worker sets them aside
    at start, a CPU worker takes them as adapters come.
    host_memory: bytes for adapters that left the slots of one worker and may come back.
    merge: whether static parts of adapters become one low-rank pair as they load.
    merge_tolerance: above 0, nearly equal experts do too, see `static_gates.gate`.
    merged_base: directory of the adapter that is merged into the base weights; it is served to
    requests for the adapter whose digest is `merged_base_digest`.
    capture_routing: whether a GPU worker keeps gate weights for requests that ask.
    xlora: whether X-LoRA adapters can be served, for which a worker keeps a second KV cache.
    extra_vocab: ids after the base's own for tokens that adapters add; the config's `vocab_size`
    has them already.
    """

    backend: str = "auto"
    memory: int = 2 * GIB
    limits: Limits = field(default_factory=Limits)
    merge: bool = True
    merge_tolerance: float = 0.0
    merged_base: str | None = None
    merged_base_digest: str = ""
    host_memory: int = GIB
    capture_routing: bool = False
    xlora: bool = False
    extra_vocab: int = 0

    def to_config(self) -> dict[str, Any]:
        """The value for `additional_config`."""
        return {"molehill": asdict(self)}

    @classmethod
    def from_config(cls, additional_config: Any) -> "Settings":
        """Reads `additional_config`; raises ValueError for another setting or type."""
        try:
            return TypeAdapter(cls).validate_python((additional_config or {}).get("molehill", {}))
        except ValidationError as error:
            problems = (
                f"{'.'.join(map(str, each['loc']))}: {each['msg']}, found {each['input']!r}"
                for each in error.errors()
            )
            raise ValueError(f"additional_config['molehill']: {'; '.join(problems)}") from error
