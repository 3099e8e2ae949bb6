"""The requests for one name that are being answered, and the limits that they are held to.

It is the name's, not a generation's: replaced weights change neither the limits nor what was used.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from molehill.api.adapters.errors import LimitReachedError
from molehill.api.adapters.token_bucket import TokenBucket
from molehill.api.adapters.traffic_limits import NO_LIMITS, TrafficLimits

# Which limit refuses a request: the field's name.
LimitKind = Literal["requests_in_flight", "tokens_per_second"]

# Nobody knows when a request will end.
IN_FLIGHT_SECONDS = 1


class AdapterTraffic:
    """refused: called with the limit that refuses a request. clock: seconds, monotonic.

    limits: what holds now; changed by `limit`.
    """

    def __init__(
        self, name: str, refused: Callable[[LimitKind], None], clock: Callable[[], float]
    ) -> None:
        self.limits = NO_LIMITS
        self._name = name
        self._refused = refused
        self._clock = clock
        self._bucket: TokenBucket | None = None
        # Holds of each, see Hold.
        self._requests: Counter[object] = Counter()

    def limit(self, limits: TrafficLimits) -> None:
        """From the next request on. Tokens that are owed stay owed unless their limit is lifted."""
        rate = limits.tokens_per_second
        if rate is None:
            self._bucket = None
        elif self._bucket is None:
            self._bucket = TokenBucket(rate, self._clock)
        elif rate != self._bucket.rate:
            self._bucket = self._bucket.at_rate(rate)
        self.limits = limits

    def check(self, request: object) -> None:
        """Raises LimitReachedError for one more request than the limits allow. One that is being
        answered already goes on."""
        if request in self._requests:
            return
        most = self.limits.requests_in_flight
        if most is not None and len(self._requests) >= most:
            where = f"{self._name!a}: limits.requests_in_flight"
            message = f"{where}: found {len(self._requests)} in flight, expected at most {most}"
            self._refuse("requests_in_flight", message, IN_FLIGHT_SECONDS)
        seconds = 0 if self._bucket is None else self._bucket.wait_seconds
        if seconds:
            where = f"{self._name!a}: limits.tokens_per_second"
            message = (
                f"{where}: found more tokens than {self.limits.tokens_per_second:g} per second, "
                f"expected the next request in {seconds} s"
            )
            self._refuse("tokens_per_second", message, seconds)

    def _refuse(self, kind: LimitKind, message: str, seconds: int) -> None:
        self._refused(kind)
        raise LimitReachedError(message, seconds)

    def begin(self, request: object) -> None:
        self._requests[request] += 1

    def end(self, request: object) -> None:
        """Once for each `begin`."""
        self._requests[request] -= 1
        if not self._requests[request]:
            del self._requests[request]

    def charge(self, tokens: int) -> None:
        if self._bucket is not None:
            self._bucket.take(tokens)


@contextmanager
def admitted(traffics: Sequence[AdapterTraffic], request: object) -> Iterator[None]:
    """Counts the request while what holds it is made. Raises LimitReachedError."""
    for traffic in traffics:
        traffic.check(request)
    for traffic in traffics:
        traffic.begin(request)
    try:
        yield
    finally:
        for traffic in traffics:
            traffic.end(request)
