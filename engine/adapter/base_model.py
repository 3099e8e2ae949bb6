"""What an adapter must fit: the base model's linears and FFNs by canonical name."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from molehill.engine.adapter import expert_sites
from molehill.engine.adapter.vocabulary_sites import is_embedding

# Model types whose files keep linears' weights as [in, out] (Transformers' Conv1D).
TRANSPOSED = frozenset({"gpt2", "openai-gpt"})


@dataclass(frozen=True)
class Moe:
    """A mixture-of-experts block: `experts` gated FFNs from `hidden` over `intermediate` back.

    interleaved: whether the base holds gate and up output by output in turn, as gpt-oss does, and
    all of its weights as `[in, out]`; else all gates before all ups, and `[out, in]`.
    """

    experts: int
    hidden: int
    intermediate: int
    interleaved: bool = False


@dataclass(frozen=True)
class BaseModel:
    """Shapes of a base model, no weights.

    name: as served. source: its checkpoint, a directory or a name in the local cache; None where
        `name` is. architecture: the config's first `architectures` entry.
    linears: (in_features, out_features) by canonical name, `layers.3.self_attn.q_proj`.
    ffns: the activation's Transformers name by canonical name of each gated FFN, `layers.3.mlp`,
        whose projections are `gate_proj` and `up_proj`, or both fused in `gate_up_proj`, and
        `down_proj`.
    moes: the blocks of routed experts by canonical name, `layers.3.mlp`.
    biased: the linears that have a bias.
    ignored: linears that files may have tensors for and that the model does not compute, as
        Transformers does not: k and v of layers that share another's KV cache.
    refused: why what lies below a module cannot be adapted on this base, by the module's name.
    vocabulary: (in, out) of `embed_tokens`, (tokens, hidden), and of `lm_head`, (hidden, tokens).
    extra_tokens: ids after the base's own that adapters may have tokens at, without which the sizes
        in `vocabulary` are (`--extra-vocab`).
    tied: whether these two have one weight.
    """

    name: str
    architecture: str
    linears: Mapping[str, tuple[int, int]]
    ffns: Mapping[str, str]
    moes: Mapping[str, Moe] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    biased: frozenset[str] = frozenset()
    vocabulary: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    extra_tokens: int = 0
    source: str | None = None
    tied: bool = False
    ignored: frozenset[str] = frozenset()

    def linear(self, site: str) -> tuple[int, int] | None:
        """(in_features, out_features) of a linear, of an expert's projection, of the embedding or
        the LM head; None if unknown."""
        expert = expert_sites.split(site)
        block = self.moes.get(expert.block) if expert else None
        if expert is None or block is None:
            return self.linears.get(site, self.vocabulary.get(site))
        if expert.expert >= block.experts or expert.projection not in expert_sites.PROJECTIONS:
            return None
        if expert.projection == "down_proj":
            return block.intermediate, block.hidden
        return block.hidden, block.intermediate

    def ffn_projection(self, ffn: str, projection: str) -> tuple[int, int]:
        """(in_features, out_features) of `gate_proj`, `up_proj` or `down_proj` of one of `ffns`."""
        intermediate, hidden = self.linears[f"{ffn}.down_proj"]
        return (intermediate, hidden) if projection == "down_proj" else (hidden, intermediate)

    @property
    def num_tokens(self) -> int | None:
        """Of the base's own vocabulary, without `extra_tokens`; None where nobody knows."""
        sizes = [
            shape[0] if is_embedding(site) else shape[1] for site, shape in self.vocabulary.items()
        ]
        return min(sizes, default=None)

    def refusal(self, site: str) -> str | None:
        """Why the site cannot be adapted although the base has it."""
        return next(
            (why for name, why in self.refused.items() if f"{site}.".startswith(f"{name}.")), None
        )


@dataclass(frozen=True)
class Limits:
    """Upper bounds that an adapter is held to before anything is allocated.

    rank: of one expert. experts: of one site. total_rank: rank rows of one site.
    adapter_bytes: of one adapter, in canonical float32 and on disk.
    pickles: whether weights may be pickled, which take longer to check and more memory to read.
    """

    rank: int = 512
    experts: int = 128
    total_rank: int = 4096
    adapter_bytes: int = 8 << 30
    pickles: bool = True
