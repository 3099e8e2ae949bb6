"""What attention layers are given to cache."""

import torch
from torch import Tensor
from vllm.model_executor.layers.attention.attention import Attention

from molehill.engine.vllm.model.finite_cache import keep_finite

INF, NAN = float("inf"), float("nan")


class Seen(Attention):  # type: ignore[misc]
    """Tells what its forward gets. (vLLM's own needs an engine.)"""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def forward(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, **more: object
    ) -> tuple[Tensor | None, ...]:
        return query, key, value


def test_keys_and_values_are_finite_and_all_else_is_as_it_was() -> None:
    layer = Seen()
    keep_finite(torch.nn.Sequential(layer, torch.nn.Linear(1, 1)))
    bad, good = torch.tensor([[NAN, INF, -INF, 3e38]]), torch.tensor([[1.5, -0.0, 3e38, 1e-40]])
    query, key, value = layer(bad, bad, good)
    assert query is bad
    assert key.tolist() == [[0.0, 0.0, 0.0, bad[0, 3].item()]]
    assert torch.equal(value.view(torch.int32), good.view(torch.int32))
    assert layer(bad, key=None, value=bad, output_shape=None)[1] is None
    assert layer(bad, key=None, value=bad)[2].isfinite().all()
