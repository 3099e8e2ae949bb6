"""What routers chose for one text, as a page to look at or as JSON."""

import base64
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molehill.api.http.routes_view import routes_view
from molehill.engine.adapter.model import layer_of, projection_of

PARTS = Path(__file__).with_name("page")


@dataclass(frozen=True)
class ExplainedSite:
    """One router. head: of one that decides head by head. soft: whether a token may fall back to
    all experts (DynMoLE)."""

    site: str
    head: int | None
    experts: int
    soft: bool

    @property
    def layer(self) -> int | None:
        """None outside of the numbered layers."""
        return layer_of(self.site)

    @property
    def projection(self) -> str:
        name = projection_of(self.site)
        return name if self.head is None else f"{name} head {self.head}"


@dataclass(frozen=True)
class ExplainedText:
    """tokens: the text's and the answer's, prompt_tokens of the former; the last one of an answer
    is not in the arrays. origin: who computed this. experts: int16 `[tokens, sites, k]`, -1 where
    fewer were chosen. weights: float32, as many."""

    model: str
    adapter: str
    origin: str
    tokens: tuple[str, ...]
    prompt_tokens: int
    sites: tuple[ExplainedSite, ...]
    experts: NDArray[np.int16]
    weights: NDArray[np.float32]

    @property
    def routed(self) -> NDArray[np.bool_]:
        """bool `[tokens]`: those for which a router ran."""
        return np.asarray((self.experts >= 0).any((1, 2)), dtype=np.bool_)

    def entropy(self) -> NDArray[np.float64]:
        """Of the gate weights of each decision over its maximum, `[tokens, sites]`; 0 where there
        is one expert, or none was chosen."""
        weights = np.where(self.experts >= 0, self.weights, 0).astype(np.float64)
        total = weights.sum(2, keepdims=True)
        shares = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
        most = np.log([max(2, site.experts) for site in self.sites])
        entropy: NDArray[np.float64] = -(shares * logs).sum(2) / most
        return entropy

    def soft(self) -> NDArray[np.bool_]:
        """bool `[tokens, sites]`: decisions that fell back to all experts."""
        chosen = (self.experts >= 0).sum(2)
        of_all = chosen == np.array([site.experts for site in self.sites])
        may = np.array([site.soft for site in self.sites], dtype=np.bool_)
        return np.asarray(of_all & may, dtype=np.bool_)

    def pairs(self) -> NDArray[np.int64]:
        """Decisions that chose both of two experts, on the diagonal one, `[E, E]`."""
        widest = max((site.experts for site in self.sites), default=0)
        chosen = np.stack([(self.experts == e).any(2) for e in range(widest)], axis=-1)
        flat = chosen.reshape(-1, widest).astype(np.int64)
        pairs: NDArray[np.int64] = flat.T @ flat
        return pairs

    def to_json(self) -> dict[str, Any]:
        """For programs. entropy_by_layer: means over the tokens that a router ran for."""
        entropy = self.entropy()[self.routed]
        layers: dict[str, list[int]] = {}
        for i, site in enumerate(self.sites):
            layers.setdefault(str(site.layer), []).append(i)
        return {
            "model": self.model,
            "adapter": self.adapter,
            "origin": self.origin,
            "tokens": list(self.tokens),
            "prompt_tokens": self.prompt_tokens,
            "sites": [asdict(site) for site in self.sites],
            "experts": self.experts.tolist(),
            "weights": [[[round(w, 6) for w in s] for s in t] for t in self.weights.tolist()],
            "soft": self.soft().tolist(),
            "entropy_by_layer": {
                layer: float(entropy[:, sites].mean()) if len(entropy) else None
                for layer, sites in layers.items()
            },
            "pairs": self.pairs().tolist(),
        }

    def to_html(self) -> str:
        """One page that needs nothing else."""
        shown = {
            "model": self.model,
            "adapter": self.adapter,
            "origin": self.origin,
            "tokens": list(self.tokens),
            "prompt_tokens": self.prompt_tokens,
            "shape": list(self.experts.shape),
            "sites": [
                {
                    "layer": site.layer,
                    "projection": site.projection,
                    "experts": site.experts,
                    "soft": site.soft,
                }
                for site in self.sites
            ],
            "experts": _encoded(self.experts, "<i2"),
            "weights": _encoded(self.weights, "<f4"),
        }
        # Nothing of a token ends the element that it is in.
        text = json.dumps(shown).replace("<", "\\u003c")
        page, style, script = (
            PARTS.joinpath(name).read_text() for name in ("index.html", "style.css", "script.js")
        )
        view = routes_view()
        page = page.replace("<!-- routes -->", view.html)
        page = page.replace("<style></style>", f"<style>{style}{view.style}</style>")
        page = page.replace("<script></script>", f"<script>{view.script}{script}</script>")
        return page.replace('id="routing"></script>', f'id="routing">{text}</script>')


def _encoded(array: NDArray[Any], kind: str) -> str:
    return base64.b64encode(array.astype(kind).tobytes()).decode()
