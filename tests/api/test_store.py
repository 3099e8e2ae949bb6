"""Canonical copies live as long as somebody holds them."""

from pathlib import Path

import pytest
import torch

from molehill.api.store import AdapterStore
from molehill.engine.adapter import Adapter
from molehill.engine.base import Limits
from molehill.engine.formats import native
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import Constant


@pytest.fixture
def adapter() -> Adapter:
    pair = Experts(torch.ones(1, 4), torch.ones(4, 1), (1,))
    return Adapter("lora", {"layers.0.self_attn.q_proj": LinearMixture(pair, Constant((1.0,)))})


def test_the_copy_is_the_adapter_under_its_digest(tmp_path: Path, adapter: Adapter) -> None:
    path = AdapterStore(tmp_path).acquire(adapter)
    assert path == tmp_path / adapter.digest
    assert native.read(path, Limits()).digest == adapter.digest


def test_the_last_holder_deletes_it(tmp_path: Path, adapter: Adapter) -> None:
    store = AdapterStore(tmp_path)
    assert store.acquire(adapter) == store.acquire(adapter)
    store.release(adapter.digest)
    assert (tmp_path / adapter.digest / native.CONFIG).exists()
    store.release(adapter.digest)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_server_left_is_written_anew(tmp_path: Path, adapter: Adapter) -> None:
    (tmp_path / adapter.digest).mkdir()
    (tmp_path / adapter.digest / native.CONFIG).write_text("half")
    path = AdapterStore(tmp_path).acquire(adapter)
    assert native.read(path, Limits()).digest == adapter.digest


def test_a_temporary_store_goes_with_its_owner(adapter: Adapter) -> None:
    store = AdapterStore()
    path = store.acquire(adapter)
    assert path.exists()
    root = store.root
    del store
    assert not root.exists()
