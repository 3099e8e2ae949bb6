"""Archives of torch.save that lie."""

import pickle
import zipfile
from pathlib import Path

from molehill.engine.formats.io import files


def write(folder: Path, pickled: bytes, records: dict[str, bytes], **options) -> None:
    """An archive as torch.save lays it out."""
    with zipfile.ZipFile(folder / files.PICKLE, "w", **options) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for name, data in records.items():
            archive.writestr(f"archive/data/{name}", data)


def calling(name: str, *arguments: bytes) -> bytes:
    """{"a": name(arguments)} as a pickle of protocol 2, which torch.save writes."""
    module, _, function = name.rpartition(".")
    called = f"c{module}\n{function}\n".encode() + b"(" + b"".join(arguments) + b"tR"
    return b"\x80\x02}X\x01\x00\x00\x00a" + called + b"s."


def long(number: int) -> bytes:
    data = pickle.encode_long(number)
    return b"\x8a" + bytes([len(data)]) + data


def nested(levels: int) -> bytes:
    """{tuple: 1} of a tuple that holds the one before twice, and so on."""
    return b"\x80\x02}K\x01\x85q\x00" + b"h\x00\x86q\x00" * levels + b"K\x01s."


def nested_behind_a_get(levels: int) -> bytes:
    """The same, with another opcode between the tuple and its number in the memo."""
    return b"\x80\x02}K\x01\x85\x80\x02q\x00" + b"h\x00\x86\x80\x02q\x07q\x00" * levels + b"K\x01s."


BOMBS = {
    "bytearray": calling("__builtin__.bytearray", long(1 << 45)),
    "tensor": calling("torch.FloatTensor", long(1 << 42)),
    "storage": calling("torch.storage.UntypedStorage", long(1 << 44)),
    "counter": calling("collections.Counter", b"X\x01\x00\x00\x00a"),
    "hash": nested(64),
    "hidden hash": nested_behind_a_get(64),
    "quantized": calling("torch._utils._rebuild_qtensor"),
}
