"""What a request needs of whoever admits it: the registry, or, in a process that has none, what
asks the process that has it (`molehill.api.followers`)."""

from typing import Any, Protocol

from molehill.api.adapters.events import NotInvoked, Tier
from molehill.api.adapters.generation import Generation


class RequestLease(Protocol):
    """See Lease."""

    @property
    def generation(self) -> Generation: ...

    @property
    def unprobed(self) -> bool: ...

    def share(self) -> "RequestLease": ...

    def charge(self, tokens: int) -> None: ...

    async def acquire_slot(self) -> Tier: ...

    def release_slot(self) -> None: ...

    def release(self) -> None: ...

    def abandon(self) -> None: ...


class RequestEvents(Protocol):
    """See LifecycleMetrics."""

    def hit(self, name: str, tier: Tier, seconds: float) -> None: ...

    def not_invoked(self, name: str, outcome: NotInvoked) -> None: ...


class RequestAdmission(Protocol):
    """See AdapterRegistry."""

    @property
    def events(self) -> RequestEvents: ...

    def get(self, name: str) -> Generation | None: ...

    def generation(self, lora_int_id: int) -> Generation | None: ...

    def admit(self, lora_request: Any, request: object) -> RequestLease: ...
