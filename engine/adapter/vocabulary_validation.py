"""Whether what an adapter has on the embedding and on the LM head can be served."""

from collections.abc import Iterator

from molehill.engine.adapter import added_tokens
from molehill.engine.adapter.added_tokens import no_room
from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.errors import (
    AdapterError,
    ShapeError,
    UnknownTargetError,
    UnsupportedError,
)
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.vocabulary_sites import is_embedding, is_on_vocabulary
from molehill.kernels.mixture import LinearMixture, Mixture, VocabularyRows


def adapter_problems(adapter: Adapter) -> Iterator[AdapterError]:
    """The problems that need no base model to be seen."""
    for site in filter(is_on_vocabulary, adapter.sites):
        yield from _unservable(site, adapter.sites[site])
        if is_embedding(site) and adapter.invocation_tokens:
            found = "the embedding in an activated adapter, which PEFT changes for every token"
            yield UnsupportedError(site, found, "the layers and the LM head")
    for site, table in adapter.rows.items():
        yield from _inconsistent_rows(adapter, site, table)


def misfits(adapter: Adapter, base: BaseModel) -> Iterator[AdapterError]:
    """Where rows do not fit the base; pairs are held against it as those of linears are."""
    fitting = True
    for site, table in adapter.rows.items():
        for problem in _misfit_rows(site, table, base):
            fitting = False
            yield problem
    if fitting:
        yield from added_tokens.misfits(adapter, base)


def with_added_tokens(site: str, mixture: LinearMixture, base: BaseModel) -> tuple[int, int] | None:
    """(in, out) of what a pair is for that has added tokens, and the base room for them; None
    for another."""
    inputs, outputs = base.vocabulary[site]
    on_embedding = is_embedding(site)
    tokens, hidden = (inputs, outputs) if on_embedding else (outputs, inputs)
    width = added_tokens.pair_tokens(site, mixture)
    if not tokens < width <= tokens + base.extra_tokens:
        return None
    return (width, hidden) if on_embedding else (hidden, width)


def _unservable(site: str, mixture: Mixture) -> Iterator[AdapterError]:
    """The methods that route adapt the layers alone, and the head is run for few of a step's rows,
    outside the backends."""
    expected = "plain LoRA on the embedding and on the LM head"
    if not isinstance(mixture, LinearMixture):
        yield UnsupportedError(site, type(mixture).__name__, expected)
    elif mixture.router is not None:
        yield UnsupportedError(site, "a router", expected)
    elif mixture.magnitude is not None:
        yield UnsupportedError(site, "DoRA", expected)


def _inconsistent_rows(
    adapter: Adapter, site: str, table: VocabularyRows
) -> Iterator[AdapterError]:
    if not is_on_vocabulary(site):
        yield UnsupportedError(f"{site}.rows", "rows of a linear", "those of embed_tokens, lm_head")
    if adapter.invocation_tokens:
        found = "rows in an activated adapter, which PEFT replaces for every token"
        yield UnsupportedError(f"{site}.rows", found, "low-rank pairs alone")
    if table.rows.ndim != 2 or table.ids.shape != table.rows.shape[:1]:
        yield ShapeError(f"{site}.rows", list(table.rows.shape), [len(table.ids), "hidden"])
    elif len(table.ids) and (table.ids[0] < 0 or not bool((table.ids.diff() > 0).all())):
        yield UnsupportedError(f"{site}.row_ids", "others", "ascending ids, none below 0")


def _misfit_rows(site: str, table: VocabularyRows, base: BaseModel) -> Iterator[AdapterError]:
    if refusal := base.refusal(site):
        yield UnsupportedError(site, refusal, "a base model and settings that allow it")
        return
    if site not in base.vocabulary:
        expected = f"one of {', '.join(base.vocabulary)}" if base.vocabulary else "a base with one"
        yield UnknownTargetError(site, "no such embedding or head in the base model", expected)
        return
    inputs, outputs = base.vocabulary[site]
    tokens, hidden = (inputs, outputs) if is_embedding(site) else (outputs, inputs)
    if table.rows.shape[-1] != hidden:
        yield ShapeError(f"{site}.rows", list(table.rows.shape), [len(table.ids), hidden])
    if len(table.ids) and int(table.ids[-1]) >= tokens + base.extra_tokens:
        yield no_room(f"{site}.row_ids", int(table.ids[-1]) + 1, tokens, base.extra_tokens)
