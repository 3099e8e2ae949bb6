"""Canonical copies live as long as somebody holds them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from molehill.api.adapters.store import AdapterStore
from molehill.api.adapters.store_lock import LockedError, check_free
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.model import Adapter
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


def test_a_copy_that_was_deleted_after_it_was_read_is_written_again(
    tmp_path: Path, adapter: Adapter
) -> None:
    """By the last of its names, while a restart reads it for another."""
    store = AdapterStore(tmp_path)
    path = store.acquire(adapter)
    read = native.read(path, Limits())
    store.release(adapter.digest)
    assert store.acquire(read, source=path) == path
    assert native.read(path, Limits()).digest == adapter.digest


def test_a_store_of_nobodys_choice_is_where_somebody_removes_it(tmp_path: Path) -> None:
    store = AdapterStore(scratch=tmp_path)
    assert store.root.parent == tmp_path
    assert AdapterStore().root.parent != tmp_path


def test_a_sweep_leaves_what_is_held_and_what_is_not_the_stores(
    tmp_path: Path, adapter: Adapter
) -> None:
    digests = ["0" * 64, "1" * 64]
    names = [name for digest in digests for name in (digest, f"base-{digest}")]
    for name in (*names, f".base-{digests[0]}-half", f".{digests[0]}-half", "base-camp"):
        (tmp_path / name).mkdir()
    store = AdapterStore(tmp_path)
    store.acquire(adapter)
    store.hold(tmp_path / f"base-{digests[1]}")
    store.sweep({digests[0]})
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {adapter.digest, digests[0], f"base-{digests[1]}", "base-camp"}


def test_a_store_has_one_server(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    for take in (AdapterStore, check_free):
        with pytest.raises(LockedError, match=f"^{tmp_path}: found another server"):
            take(tmp_path)
    store.claim.release()
    check_free(tmp_path)
    assert AdapterStore(tmp_path).root == tmp_path
    check_free(tmp_path / "not-there-yet")


def test_a_store_is_free_when_its_server_was_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from molehill.api.adapters.store_lock import DirectoryLock; "
        "own = DirectoryLock(pathlib.Path(sys.argv[1])); print('locked', flush=True); "
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"locked\n"
        with pytest.raises(LockedError):
            AdapterStore(tmp_path)
        server.kill()
        server.wait()
    assert AdapterStore(tmp_path).root == tmp_path


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
