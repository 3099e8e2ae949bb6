"""What is said of an adapter that names another base model than the one that is served."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.api_client import GOLDEN

from molehill.api.adapters.reader import AdapterReader, doubt
from molehill.engine import formats
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.formats import native
from molehill.engine.hf.shapes import base_model

NAMES = ("/models/SmolLM2-135M-Instruct/", "tiny")


@pytest.mark.parametrize(
    "trained_on", [None, "HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct", "x/tiny"]
)
def test_a_base_of_the_same_name_is_not_doubted(trained_on: str | None) -> None:
    assert doubt(trained_on, NAMES) is None


def test_another_base_is_named_without_the_servers_paths() -> None:
    result = doubt("org/SmolLM2-135M", NAMES)
    assert result == (
        "base model: trained on 'org/SmolLM2-135M', served on smollm2-135m-instruct or tiny"
    )


def test_a_warning_is_kept_and_not_repeated(tmp_path: Path) -> None:
    read = AdapterReader(base_model(GOLDEN / "tiny-llama"), Limits(), ["other"])
    adapter = read(GOLDEN / "cases" / "lora")
    assert [text for text in adapter.warnings if "trained on 'tiny-llama'" in text]
    native.write(adapter, tmp_path / "copy")
    again = read(tmp_path / "copy")
    assert (again.warnings, again.digest) == (adapter.warnings, adapter.digest)
    same = AdapterReader(read.base, read.limits, ["tiny-llama"])(GOLDEN / "cases" / "lora")
    assert not [text for text in same.warnings if "trained on" in text]
    assert same.digest == adapter.digest


def test_pickles_can_be_refused(tmp_path: Path) -> None:
    read = AdapterReader(base_model(GOLDEN / "tiny-llama"), Limits(pickles=False), ["tiny-llama"])
    with pytest.raises(UnsupportedError, match=r"adapter_model\.bin: found a pickle, expected"):
        read(GOLDEN / "cases" / "lora")
    native.write(formats.read(GOLDEN / "cases" / "lora"), tmp_path / "copy")
    assert read(tmp_path / "copy").kind == "lora"
    with_pickles = replace(read, limits=Limits())
    assert with_pickles(GOLDEN / "cases" / "lora").kind == "lora"
