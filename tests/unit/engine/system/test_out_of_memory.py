"""What of all errors means that there is no memory left."""

import errno
import io
from pathlib import Path

import pytest
import torch

from molehill.api.adapters.errors import OutOfMemoryError
from molehill.api.cli import inspect, main
from molehill.api.sources.fetch import reporting
from molehill.engine.adapter.errors import AdapterError, CorruptFileError
from molehill.engine.formats.convert import isolation
from molehill.engine.formats.io import files
from molehill.engine.system.out_of_memory import is_out_of_memory, raise_if_out_of_memory


def of_allocator() -> RuntimeError:
    """What torch raises on the host, as itself."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        of_allocator(),
        # The class alone must do: its text is the allocator's, and changes.
        torch.OutOfMemoryError("no room"),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        # A worker's, which comes here as text.
        Exception("Call to collective_rpc method failed: CUDA out of memory. Tried to allocate"),
        RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
        # Not the caching allocator: pinned memory, a library's workspace.
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
    ],
    ids=str,
)
def test_no_memory_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)
    with pytest.raises(MemoryError):
        raise_if_out_of_memory(error)


def test_the_cause_counts_where_an_error_was_raised_for_another() -> None:
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError("the weights could not be stored") from torch.OutOfMemoryError("none")
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        # Whatever a file says in a name of its own.
        AdapterError("CUDA out of memory", "out of memory", "not enough memory"),
        RuntimeError("out of resource: shared memory, Required: 200, Hardware limit: 100"),
        OSError(errno.ENOENT, "out of memory"),
        ValueError("a fault"),
    ],
    ids=str,
)
def test_other_faults_are_none(error: Exception) -> None:
    assert not is_out_of_memory(error)
    raise_if_out_of_memory(error)


def test_a_file_that_there_is_no_memory_to_open_is_not_a_damaged_one() -> None:
    with pytest.raises(MemoryError), files._reading(Path("adapter_model.safetensors")):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")
    with pytest.raises(CorruptFileError), files._reading(Path("adapter_model.safetensors")):
        raise OSError(errno.EIO, "Input/output error")


def test_a_download_without_memory_is_not_the_sources_fault() -> None:
    with pytest.raises(OutOfMemoryError, match="org/adapter"), reporting("org/adapter"):
        raise MemoryError


def test_a_command_without_memory_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhausted(_: object) -> int:
        raise_if_out_of_memory(of_allocator())
        return 0

    monkeypatch.setattr(inspect, "main", exhausted)
    assert main.main(["inspect"]) == main.USER_ERROR
    said = capsys.readouterr().err
    assert "out of memory" in said
    assert "Traceback" not in said


def test_a_reader_of_its_own_that_has_no_memory_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between processes only text survives."""

    def exhausted(*_: object) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr(isolation, "read", exhausted)
    monkeypatch.setattr("sys.stdin", io.StringIO("[{}, null, false, null, null]"))
    assert isolation.main([str(tmp_path), str(tmp_path / "copy")]) == 1
    said = capsys.readouterr().out
    child = isolation.subprocess.CompletedProcess([], 1, said, "")
    assert isinstance(isolation._error(tmp_path, child), MemoryError)
