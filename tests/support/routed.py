"""What routers chose for requests of an engine, and what the reference says that they choose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molehill.engine import formats
from molehill.engine.hf.reference import attach
from molehill.engine.vllm import protocol
from molehill.engine.vllm.routing_capture import ASKED
from molehill.kernels.interface import Trace
from support.asking import ask_each, assert_golden, request
from support.golden import Case, greatest_difference

Router = tuple[str, int]


@dataclass(frozen=True)
class Chosen:
    """Of one request: by (site, head), ids int16 and weights float16 `[tokens, most]`."""

    routers: Mapping[Router, tuple[NDArray[np.int16], NDArray[np.float16]]]

    def gate_weights(self, router: Router, experts: int) -> Tensor:
        """float32 `[tokens, experts]`, 0 where an expert was not chosen."""
        ids, weights = (torch.from_numpy(values.copy()) for values in self.routers[router])
        dense = torch.zeros(len(ids), experts + 1)
        dense.scatter_(1, torch.where(ids < 0, experts, ids).long(), weights.float())
        return dense[:, :experts]


def asking(key: str, tokens: int, n: int = 1) -> dict[str, Any]:
    """Sampling parameters of a request of up to so many tokens, as the API side has them."""
    asked = {"key": key, "tokens": tokens, "weights": True, "n": n}
    return {"extra_args": {ASKED: asked}, "skip_reading_prefix_cache": True}


def chosen(llm: Any, key: str, tokens: int, index: int = 0) -> Chosen:
    """Of a request's first tokens, from all workers, which then forget it. The tensor-parallel
    ranks of a stage say the same, and each stage has other routers."""
    part = protocol.TokenRange(index, 0, tokens)
    asked = protocol.to_wire(protocol.RoutesRequest(key, (part,), forget=True))
    replies = protocol.ROUTES.replies(llm.collective_rpc(protocol.ROUTES.method, args=(asked,)))
    of_stages = {reply.stage: reply for reply in replies}
    assert all(reply == of_stages[reply.stage] for reply in replies)
    routers: dict[Router, tuple[NDArray[np.int16], NDArray[np.float16]]] = {}
    for reply in of_stages.values():
        (routes,) = reply.parts
        shape = -1, len(reply.routers), reply.most
        experts = np.frombuffer(routes.experts, np.int16).reshape(shape)
        weights = np.frombuffer(routes.weights, np.float16).reshape(shape)
        assert not routers.keys() & set(reply.routers)
        routers |= {
            router: (experts[:, i], weights[:, i]) for i, router in enumerate(reply.routers)
        }
    return Chosen(routers)


ROUTED_CASES = ("dynmole-soft", "mixlora", "mola")


def assert_routing_of_golden_cases(llm: Any, model: Any) -> None:
    """What one batch of mixtures, and of others that do not ask, is told of its routing. model: the
    base on Transformers."""
    cases = [*ROUTED_CASES, "base", *ROUTED_CASES]
    prompts = [Case(case).prompts[0] for case in cases]
    ids, requests = [list(prompt.ids) for prompt in prompts], [request(case) for case in cases]
    extra = {i: asking(case, 100) for i, case in enumerate(ROUTED_CASES)}
    assert_golden(ask_each(llm, ids, requests, extra=extra), prompts)
    for case, prompt in zip(ROUTED_CASES, prompts, strict=False):
        read = [*prompt.ids, *prompt.greedy[:-1]]
        result = chosen(llm, case, len(read))
        assert_chosen(result, gate_weights(model, Case(case).path, read))


def gate_weights(
    model: Any, path: Path, ids: Sequence[int], start: int = 0
) -> dict[Router, Tensor]:
    """The reference's `[tokens, experts]` for a text, by (site, head). start: the first token that
    the adapter acts on; those before it have no meaning."""
    traces: dict[str, list[Trace]] = {}
    with torch.inference_mode(), attach(model, formats.read(path), traces, start):
        model(torch.tensor([list(ids)]))
    result: dict[Router, Tensor] = {}
    for site, (trace,) in traces.items():
        weights = trace.weights
        heads = weights.unsqueeze(1) if weights.dim() == 2 else weights
        result.update({(site, head): heads[:, head] for head in range(heads.shape[1])})
    return result


# Half of float16's spacing below 2, beside float32's rounding.
WEIGHT_TOLERANCE = 1e-3


def assert_chosen(
    chosen: Chosen, weights: Mapping[Router, Tensor], start: int = 0, tolerance: float = 0.0
) -> None:
    """What was captured is the reference's, the strongest expert first, and nobody's before
    `start`."""
    assert chosen.routers.keys() == weights.keys()
    for router, wanted in weights.items():
        dense = chosen.gate_weights(router, wanted.shape[1])
        assert dense.shape == wanted.shape
        difference = greatest_difference(dense[start:], wanted[start:])
        assert difference < max(tolerance, WEIGHT_TOLERANCE), router
        ids, kept = chosen.routers[router]
        assert (ids[:start] == -1).all()
        assert ((ids[start:] >= 0).sum(1) == (wanted[start:] > 1e-6).sum(1).numpy()).all(), router
        assert (kept[:, :-1] >= kept[:, 1:]).all()
