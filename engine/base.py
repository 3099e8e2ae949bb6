"""What an adapter must fit: the base model's linears and FFNs by canonical name."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class BaseModel:
    """Shapes of a base model, no weights.

    name: as served. architecture: the config's first `architectures` entry.
    linears: (in_features, out_features) by canonical name, `layers.3.self_attn.q_proj`.
    ffns: the activation's Transformers name by canonical name of each gated FFN, `layers.3.mlp`,
        whose projections are `gate_proj`, `up_proj` and `down_proj`.
    """

    name: str
    architecture: str
    linears: Mapping[str, tuple[int, int]]
    ffns: Mapping[str, str]


@dataclass(frozen=True)
class Limits:
    """Upper bounds that an adapter is held to before anything is allocated.

    rank: of one expert. experts: of one site. total_rank: rank rows of one site.
    adapter_bytes: of one adapter, in canonical float32 and on disk.
    """

    rank: int = 512
    experts: int = 128
    total_rank: int = 4096
    adapter_bytes: int = 8 << 30
