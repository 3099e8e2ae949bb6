"""Whether adapters that tokens have by their ids can be served."""

from collections.abc import Callable, Iterator

from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.errors import AdapterError, LimitError, UnsupportedError
from molehill.engine.adapter.model import Adapter, TokenAdapters
from molehill.engine.adapter.vocabulary_sites import EMBEDDINGS, is_on_vocabulary
from molehill.kernels.mixture import ClassifierMixture, FfnMixture, LinearMixture, ScaleMixture

# As `molehill_mix.json` calls the table, in errors and among a server's refusals.
FIELD = "token_adapters"
MOST_TOKENS = 1 << 24

Problems = Callable[[Adapter], list[AdapterError]]


def problems(adapter: Adapter, members: Problems, most_bytes: int) -> Iterator[AdapterError]:
    """Those of each adapter, with its name, and of the table; whatever the base.

    members: the problems of one of them. most_bytes: of all together.
    """
    by_token = adapter.by_token
    assert by_token is not None
    if adapter.sites or adapter.rows or adapter.biases:
        yield UnsupportedError(FIELD, "adapters by token id beside sites", "one of the two")
    if adapter.num_bytes > most_bytes:
        found, expected = f"{adapter.num_bytes} bytes", f"at most {most_bytes} bytes"
        yield LimitError("adapter", found, expected)
    for name, member in by_token.adapters.items():
        for error in (*members(member), *_unservable(member)):
            yield type(error)(f"{name}: {error.where}", error.found, error.expected)
    yield from _wrong_table(by_token)


def misfits(adapter: Adapter, base: BaseModel) -> Iterator[AdapterError]:
    """Where the table does not fit the base, or the server."""
    if refusal := base.refusal(FIELD):
        yield UnsupportedError(FIELD, refusal, "a base model and settings that allow it")
    by_token = adapter.by_token
    assert by_token is not None
    shape = next((base.vocabulary[n] for n in EMBEDDINGS if n in base.vocabulary), None)
    if shape is not None and len(by_token.adapter_of) > shape[0]:
        last = len(by_token.adapter_of) - 1
        yield UnsupportedError(FIELD, f"token {last}", f"tokens below {shape[0]}, as the base has")


def _unservable(member: Adapter) -> Iterator[AdapterError]:
    """Rows of a step are dealt to adapters that do the same to each of them, and those of logits
    are not dealt by token."""
    for site in (*member.rows, *filter(is_on_vocabulary, member.sites)):
        found = "what is on the embedding or the LM head, by token id"
        yield UnsupportedError(site, found, "linears inside the layers")
    for site, mixture in member.sites.items():
        routed = (
            isinstance(mixture, FfnMixture)
            or (isinstance(mixture, LinearMixture) and mixture.router is not None)
            or (isinstance(mixture, ScaleMixture) and mixture.num_experts > 1)
        )
        if routed and not isinstance(mixture, ClassifierMixture):
            found = f"a router ({type(mixture.policy).__name__}) in an adapter by token id"
            yield UnsupportedError(site, found, "one that is the same for every token it gets")
    if member.by_token is not None or member.invocation_tokens or member.classifier is not None:
        found = "a table of token ids, invocation tokens or a classifier of an adapter by token id"
        yield UnsupportedError(FIELD, found, "none")


def _wrong_table(by_token: TokenAdapters) -> Iterator[AdapterError]:
    table, experts = by_token.adapter_of, len(by_token.adapters)
    if not experts or table.ndim != 1 or not 0 < len(table) <= MOST_TOKENS:
        found = f"{experts} adapters, a table {list(table.shape)}"
        yield UnsupportedError(FIELD, found, f"some of both, ids below {MOST_TOKENS}")
        return
    chosen = {*table.unique().tolist(), by_token.other}
    if min(chosen) < -1 or max(chosen) >= experts:
        expected = f"-1 for none, or one of {experts} adapters"
        yield UnsupportedError(FIELD, f"adapters {sorted(chosen)[:9]}", expected)
    for place, name in enumerate(by_token.adapters):
        if place not in chosen:
            yield UnsupportedError(FIELD, f"no token for {name}", "at least one for every adapter")
