"""Tokens that an adapter adds to its base's vocabulary: rows at ids that the base does not have.

The server has room for `--extra-vocab` of them, from the base's own vocabulary on. What one adapter
has there no other request sees.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.errors import AdapterError, UnsupportedError
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.vocabulary_sites import is_embedding, is_head
from molehill.kernels.mixture import LinearMixture

# Room for whatever there is, where only files are looked at.
ANY_NUMBER = 1 << 24


@dataclass(frozen=True)
class AddedTokens:
    """read: ids that prompts may hold, those with rows of the embedding. answered: ids that answers
    may, those with rows of the head. Both ascending, from `first` on, the first that is not the
    base's."""

    first: int = 0
    read: tuple[int, ...] = ()
    answered: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.read or self.answered)

    @property
    def needed(self) -> tuple[int, ...]:
        """All of them."""
        return tuple(sorted({*self.read, *self.answered}))


NO_TOKENS = AddedTokens()


def added_tokens(adapter: Adapter, first: int | None) -> AddedTokens:
    """Those of an adapter that fits its base. first: the base's number of tokens."""
    if first is None:
        return NO_TOKENS
    ids: dict[bool, tuple[int, ...]] = {True: (), False: ()}
    for site, table in adapter.rows.items():
        ids[is_embedding(site)] = tuple(table.ids[table.ids >= first].tolist())
    return AddedTokens(first, ids[True], ids[False])


def no_room(where: str, tokens: int, of_base: int, extra: int) -> UnsupportedError:
    """tokens: ids that are needed, from 0 on. of_base: those that the base has. extra: room after
    them."""
    needed = tokens - of_base
    found = f"{tokens} tokens, {needed} of them added to the base's vocabulary"
    room = f"the base's {of_base}" + (f" and at most {extra} more" if extra else "")
    return UnsupportedError(where, found, f"{room}; a server with --extra-vocab {needed} takes it")


def misfits(adapter: Adapter, base: BaseModel) -> Iterator[AdapterError]:
    """What is inconsistent in an adapter's added tokens, whose rows are within the base's room."""
    tokens = added_tokens(adapter, base.num_tokens)
    unread = sorted({*tokens.answered} - {*tokens.read})
    if unread:
        found = f"a row for the added token {unread[0]}, and none of the embedding"
        yield UnsupportedError("lm_head.row_ids", found, "a row of the embedding, to read it again")
    for site, mixture in adapter.sites.items():
        if not (is_embedding(site) or is_head(site)) or not isinstance(mixture, LinearMixture):
            continue
        width = pair_tokens(site, mixture)
        rows = {*(tokens.read if is_embedding(site) else tokens.answered)}
        lacking = sorted({*range(base.num_tokens or 0, width)} - rows)
        if lacking:
            found = f"a pair of {width} tokens, and no row for the added token {lacking[0]}"
            yield UnsupportedError(site, found, "the row that the pair adds to")


def pair_tokens(site: str, mixture: LinearMixture) -> int:
    """How many tokens a pair on the embedding or the head is for."""
    experts = mixture.experts
    return int(experts.a.shape[1] if is_embedding(site) else experts.b.shape[0])
