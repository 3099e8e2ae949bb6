"""Archives of torch.save that lie: refused at once, whatever they would make torch do."""

import io
import pickle
import struct
import time
import zipfile
from collections import OrderedDict

import psutil
import pytest
import torch
from support.bombs import BOMBS, write
from support.broken import NAME, refusal

from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import CorruptFileError, LimitError
from molehill.engine.formats.io import files, pickles

# Of this process's own work, whatever else the machine does. A bomb would take for ever.
CPU_SECONDS = 5
BYTES = 256 << 20


@pytest.fixture
def adapter(edited):
    """A sound adapter whose weights a test writes over."""
    return edited("lora")


@pytest.mark.parametrize("pickled", BOMBS.values(), ids=BOMBS)
def test_a_small_pickle_takes_neither_memory_nor_time(adapter, pickled):
    write(adapter, pickled, {})
    before, start = psutil.Process().memory_info().rss, time.process_time()
    assert refusal(CorruptFileError, adapter).where == files.PICKLE
    assert time.process_time() - start < CPU_SECONDS
    assert psutil.Process().memory_info().rss - before < BYTES


class Storage:
    def __init__(self, elements: int) -> None:
        self.elements = elements


class Lying:
    """A tensor of `elements`, of which the record has fewer."""

    def __init__(self, elements: int) -> None:
        self.elements = elements

    def __reduce__(self):
        shape = (self.elements,)
        return torch._utils._rebuild_tensor_v2, (
            *(Storage(self.elements), 0, shape, (1,), False, OrderedDict()),
        )


class Saver(pickle.Pickler):
    def persistent_id(self, value):
        if isinstance(value, Storage):
            return "storage", torch.FloatStorage, "0", "cpu", value.elements
        return None


@pytest.mark.parametrize("elements", [5, 10**6, 10**12, 2**62])
def test_a_storage_ends_where_its_record_does(adapter, elements):
    pickled = io.BytesIO()
    Saver(pickled, protocol=2).dump({NAME: Lying(elements)})
    write(adapter, pickled.getvalue(), {"0": b"\0" * 16})
    assert refusal(CorruptFileError, adapter).where == files.PICKLE


def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path):
    saved = {
        "half": torch.randn(3, 5).half(),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "transposed": torch.randn(4, 2).T,
        "part": torch.randn(9)[3:5],
        "empty": torch.empty(0, 3),
    }
    saved["again"] = saved["half"]
    path = tmp_path / "tensors.bin"
    torch.save(OrderedDict(saved), path)
    result = pickles.load(path.name, path.read_bytes(), Limits())
    assert list(result) == list(saved)
    assert all(torch.equal(result[name], saved[name]) for name in saved)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.eye(4).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.empty(2, 64, device="meta"), "_rebuild_meta_tensor_no_storage"),
    ],
    ids=["sparse", "meta"],
)
def test_a_tensor_without_plain_values(edited, tensor, message):
    error = refusal(CorruptFileError, edited("lora", tensors={NAME: tensor}))
    assert error.found == f"a pickled torch._utils.{message}"


def test_compressed_records_are_refused(adapter):
    write(adapter, pickle.dumps({}, 2), {}, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(CorruptFileError, adapter).found


def test_two_pickles_are_refused(adapter):
    with zipfile.ZipFile(adapter / files.PICKLE, "a") as archive:
        archive.writestr("other/data.pkl", BOMBS["bytearray"])
    assert refusal(CorruptFileError, adapter).found == "2 pickles"


def test_a_sparse_file_over_the_limit_is_refused_by_its_size(edited):
    """A terabyte that takes no room on disk is not copied anywhere."""
    directory = edited("lora", safetensors=True)
    with (directory / files.SAFETENSORS).open("r+b") as file:
        file.seek(1 << 40)
        file.write(struct.pack("<Q", 0))
    start = time.process_time()
    error = refusal(LimitError, directory)
    assert error.found == f"{(1 << 40) + 8} bytes"
    assert time.process_time() - start < CPU_SECONDS
