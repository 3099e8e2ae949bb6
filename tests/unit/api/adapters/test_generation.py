"""What is known of an adapter once its files were read."""

import ast
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.operators import Operators

from molehill import api
from molehill.api.adapters import status
from molehill.api.adapters.generation import Generation, content_of
from molehill.api.adapters.source import Source
from molehill.api.adapters.status import AdapterState, GenerationStatus
from molehill.api.adapters.traffic import AdapterTraffic
from molehill.engine.adapter.model import Adapter, TokenAdapters
from molehill.kernels.mixture import Experts, LinearMixture, VocabularyRows
from molehill.kernels.policy import Constant, Soft

ROUTER = torch.randn(2, 64)


def linear(policy: Constant | Soft, router: torch.Tensor | None = None) -> LinearMixture:
    return LinearMixture(Experts(torch.randn(4, 64), torch.randn(48, 4), (2, 2)), policy, router)


def test_static_sites_are_counted_and_nothing_is_merged() -> None:
    """Workers merge; a factorisation of every site here would be the longest part of a load."""
    sites = {
        "layers.0.self_attn.q_proj": linear(Constant((0.3, 0.7))),
        "layers.0.self_attn.k_proj": linear(Soft(), torch.zeros(2, 64)),
        "layers.0.self_attn.v_proj": linear(Soft(), ROUTER),
    }
    with Operators() as operators:
        content = content_of(Adapter("mola", sites), Path("there"))
    assert content.plan == {"sites": 3, "static": 2, "dynamic": 1}
    assert [name for name in operators.names if "linalg" in name] == []


def test_a_probe_asks_the_ids_that_an_adapter_hangs_on() -> None:
    """A prompt without them would show nothing of it."""
    lora = Adapter("lora", {"layers.0.self_attn.q_proj": linear(Constant((0.3, 0.7)))})
    table = torch.full((512,), -1)
    table[5], table[400:403] = 1, 0
    by_token = TokenAdapters({"a": lora, "b": lora}, table)
    rows = {"embed_tokens": VocabularyRows(torch.tensor([77, 78]), torch.zeros(2, 64))}
    for adapter, expected in (
        (lora, ()),
        (Adapter("molora", {}, by_token=by_token), (400, 5)),
        (Adapter("lora", {}, rows=rows), (77, 78)),
    ):
        assert content_of(adapter, Path("there")).probe_tokens == expected


def test_a_generation_never_changes() -> None:
    source = Source(Path("there"), "label")
    content = content_of(Adapter("lora", {}), Path("there"))
    traffic = AdapterTraffic("a", lambda _: None, time.monotonic)
    generation = Generation("a", content, None, GenerationStatus(source, traffic))
    for field in dataclasses.fields(generation):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(generation, field.name, None)
    generation.status.serve()
    assert generation.status.state is AdapterState.SERVING


def assigned(tree: ast.AST) -> Iterator[str]:
    """Fields of what is called a status that some statement assigns to, or deletes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            owner = node.value
            name = getattr(owner, "attr", None) or getattr(owner, "id", None)
            if name in ("status", "slot"):
                yield node.attr


def test_one_module_writes_what_becomes_of_a_generation() -> None:
    (folder,) = api.__path__
    modules = set(Path(folder).rglob("*.py")) - {Path(str(status.__file__))}
    assert Path(folder, "adapters", "residency.py") in modules
    written = {path.name: list(assigned(ast.parse(path.read_text()))) for path in modules}
    assert {name: fields for name, fields in written.items() if fields} == {}


def test_who_else_writes_it_is_seen() -> None:
    """The check above can fail."""
    lines = [
        "generation.status.state = 1",
        "status.in_flight += 1",
        "del old.status.note",
        "status.slot.loads = 2",
    ]
    fields = [list(assigned(ast.parse(line))) for line in lines]
    assert fields == [["state"], ["in_flight"], ["note"], ["loads"]]
