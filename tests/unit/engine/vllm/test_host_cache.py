"""Host memory for adapters that left the slots."""

from molehill.engine.routing_stats import cost_table
from molehill.engine.vllm.host_cache import HostCache, PreparedAdapter
from molehill.kernels.interface import MoePiece, Packed


def adapter(num_bytes: int, moes: dict[int, MoePiece] | None = None) -> PreparedAdapter:
    return PreparedAdapter(cost_table(()), moes or {}, num_bytes, False, Packed(object()))


def test_those_that_left_first_make_room() -> None:
    host = HostCache(100)
    first, second, third = adapter(40), adapter(50), adapter(30)
    host.put("first", first)
    host.put("second", second)
    assert host.sizes() == {"first": 40, "second": 50}
    host.put("third", third)
    assert host.sizes() == {"second": 50, "third": 30}
    assert host.take_evicted() == ["first"]
    assert host.take("first") is None
    assert host.take("second") is second
    assert "second" not in host
    host.drop("third")
    assert host.sizes() == {}
    assert host.take_evicted() == []


def test_one_that_left_again_is_the_last_to_go() -> None:
    host = HostCache(100)
    host.put("a", adapter(40))
    host.put("b", adapter(40))
    host.put("a", adapter(40))
    host.put("c", adapter(40))
    assert list(host.sizes()) == ["a", "c"]


def test_what_is_larger_than_all_or_not_packed_is_not_kept_and_pushes_nobody_out() -> None:
    host = HostCache(100)
    host.put("a", adapter(60))
    host.put("large", adapter(101))
    host.put("moe", adapter(10, {0: MoePiece("layers.0.mlp", None, None, None)}))
    assert host.sizes() == {"a": 60}
    nothing = HostCache(0)
    nothing.put("a", adapter(1))
    assert nothing.sizes() == {}
