"""The manifest is whole or refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from molehill.api.adapters.mix import Mix, MixPart
from molehill.api.adapters.traffic_limits import TrafficLimits
from molehill.api.sources.manifest import Entry, Manifest, ManifestError

ENTRIES = [
    Entry("team/a", "0" * 64, "a", "f" * 64, True),
    Entry("b", "1" * 64, "hf://org/b@main", "", False, lora_b_layout="grouped_by_expert"),
    Entry("c", "2" * 64, "c", "e" * 64, False, base_is_residual=True),
    Entry("d", "3" * 64, "a=0.7", "", False, mix=Mix((MixPart("a", 0.7, "0" * 64),))),
    Entry("x", "5" * 64, "x", "", False, non_granular_after=0),
    Entry("e", "4" * 64, "e", "", False, limits=TrafficLimits(3, 2.5, "t", 2)),
]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    Manifest(tmp_path).write(ENTRIES)
    assert Manifest(tmp_path).read() == ENTRIES
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_new_server_remembers_nothing(tmp_path: Path) -> None:
    assert Manifest(tmp_path).read() == []


def test_a_write_that_fails_leaves_the_old_manifest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Manifest(tmp_path).write(ENTRIES)
    (tmp_path / "manifest.partial").mkdir()
    Manifest(tmp_path).write([])
    assert "could not be written" in caplog.text
    assert Manifest(tmp_path).read() == ENTRIES


ENTRY = {"name": "a", "generation": "0", "source": "s", "fingerprint": "", "pinned": False}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        {"version": 2, "adapters": []},
        {"version": 1},
        {"version": 1, "adapters": [{"name": "a"}]},
        {"version": 1, "adapters": [{**ENTRY, "pinned": "yes"}]},
        {"version": 1, "adapters": [{**ENTRY, "more": 1}]},
        {"version": 1, "adapters": [{**ENTRY, "lora_b_layout": "by_row"}]},
        {"version": 1, "adapters": [{**ENTRY, "mix": "a=0.7"}]},
        {"version": 1, "adapters": [{**ENTRY, "mix": {"parts": []}}]},
        {"version": 1, "adapters": [{**ENTRY, "mix": {"parts": [{"name": "a", "weight": 1}]}}]},
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(tmp_path: Path, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        Manifest(tmp_path).read()
