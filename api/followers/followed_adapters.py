"""Adapters as a process that has no registry knows them: by asking the one that has it, for each
request anew. Nothing here decides anything about adapters."""

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any
from weakref import WeakValueDictionary

from molehill.api.adapters.errors import LimitReachedError, UnknownModelError
from molehill.api.adapters.events import NotInvoked, Tier
from molehill.api.adapters.generation import Content, Generation
from molehill.api.adapters.generations import MakeRequest
from molehill.api.adapters.source import Source
from molehill.api.adapters.status import GenerationStatus
from molehill.api.adapters.traffic import AdapterTraffic
from molehill.api.followers import messages
from molehill.api.followers.followed_lease import AdmittedRequest, CaughtUp, FollowedLease
from molehill.api.followers.messages import Described, Granted, Hit, MissedInvocation
from molehill.api.followers.owner import Owner

# Contents that are not asked for again; each has as much as its chat template.
MOST_CONTENTS = 256


@dataclass(frozen=True)
class LimitedRequest:
    """Stands for the engine's request where the owner refuses one for its name's limits."""

    lora_name: str
    error: LimitReachedError


class FollowedEvents:
    """Counts where all is counted. Implements RequestEvents."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    def hit(self, name: str, tier: Tier, seconds: float) -> None:
        self._owner.send(Hit(name, tier, seconds))

    def not_invoked(self, name: str, outcome: NotInvoked) -> None:
        self._owner.send(MissedInvocation(name, outcome))


class FollowedAdapters:
    """Implements RequestAdmission, for requests that are being answered inside of `admitted`.

    make_request: see Generations. caught_up: see CaughtUp.
    """

    def __init__(self, owner: Owner, make_request: MakeRequest, caught_up: CaughtUp) -> None:
        self.events = FollowedEvents(owner)
        self._owner = owner
        self._make_request = make_request
        self._caught_up = caught_up
        self._admitted: dict[object, FollowedLease | LimitedRequest] = {}
        self._generations: WeakValueDictionary[int, Generation] = WeakValueDictionary()
        # By id, in the order of last use.
        self._contents: OrderedDict[int, Content] = OrderedDict()

    @asynccontextmanager
    async def admitted(self, name: str, request: object) -> AsyncIterator[bool]:
        """While a request for the name is answered. request: see Hold. Whether the name is served;
        what a limit refuses is refused where `admit` is called. Raises OwnerGoneError."""
        admitted = await self._ask(name)
        if admitted is None:
            yield False
            return
        self._admitted[request] = admitted
        try:
            yield True
        finally:
            del self._admitted[request]
            if isinstance(admitted, FollowedLease):
                admitted.release()

    def request_of(self, name: object, request: object) -> Any:
        """The engine's request for the name, or a LimitedRequest; None if it is not the one that
        `request` asks for."""
        admitted = self._admitted.get(request)
        if isinstance(admitted, FollowedLease):
            return admitted.generation.request if admitted.generation.name == name else None
        return admitted if admitted is not None and admitted.lora_name == name else None

    def get(self, name: str) -> Generation | None:
        """None: outside of a request nothing is known of a name."""
        return None

    def generation(self, lora_int_id: int) -> Generation | None:
        """One that a request holds."""
        return self._generations.get(lora_int_id)

    def admit(self, lora_request: Any, request: object) -> FollowedLease:
        """See AdapterRegistry. One more lease of what `admitted` has. Raises LimitReachedError, and
        UnknownModelError for a request that has ended."""
        admitted = self._admitted.get(request)
        if isinstance(admitted, LimitedRequest):
            raise admitted.error
        if admitted is None or admitted.generation.name != lora_request.lora_name:
            raise UnknownModelError(lora_request.lora_name)
        return admitted.share()

    async def _ask(self, name: str) -> FollowedLease | LimitedRequest | None:
        number = self._owner.number()
        try:
            answer = await self._owner.ask(messages.Admit(number, name))
            if isinstance(answer, messages.Limited):
                error = LimitReachedError(answer.message, answer.retry_after)
                return LimitedRequest(name, error)
            if not isinstance(answer, Granted):
                return None
            generation = await self._generation(name, answer)
        except BaseException:
            # The client may have gone, and the owner may be about to answer.
            self._owner.send(messages.Release(number))
            raise
        admitted = AdmittedRequest(
            self._owner, number, generation, answer.unprobed, self._caught_up
        )
        return FollowedLease(admitted)

    async def _generation(self, name: str, granted: Granted) -> Generation:
        number = granted.lora_int_id
        content = self._contents.pop(number, None) or await self._content(granted)
        self._contents[number] = content
        while len(self._contents) > MOST_CONTENTS:
            self._contents.popitem(last=False)
        generation = self._generations.get(number)
        if generation is None:
            generation = self._made(name, granted, content)
            self._generations[number] = generation
        if granted.when_not_invoked is not None:
            generation.status.answer_not_invoked(granted.when_not_invoked)
        return generation

    async def _content(self, granted: Granted) -> Content:
        question = messages.Describe(self._owner.number(), granted.number)
        answer = await self._owner.ask(question)
        assert isinstance(answer, Described), "that is how it is answered"
        return Content(
            granted.digest,
            answer.kind,
            answer.num_bytes,
            (),
            {},
            Path(granted.path),
            answer.invocation_tokens,
            answer.chat,
            added=answer.added,
            token_texts=answer.token_texts,
        )

    def _made(self, name: str, granted: Granted, content: Content) -> Generation:
        """Its status is the owner's affair, but for what requests read of it."""
        request = self._make_request(name, granted.lora_int_id, granted.path)
        traffic = AdapterTraffic(name, lambda _: None, monotonic)
        status = GenerationStatus(Source(content.path, name), traffic)
        return Generation(name, content, request, status, granted.created)
