"""What a request may ask of a name, and what it makes sure of first."""

from dataclasses import dataclass

from molehill.api.adapters.chat import ChatTemplate
from molehill.api.adapters.errors import GenerationMismatchError, SourceChangedError
from molehill.api.adapters.generation import Generation
from molehill.api.adapters.invocation import WhenNotInvoked
from molehill.api.adapters.traffic_limits import TrafficLimits


class AnyGeneration:
    """The expectation of a request that names no generation."""


# A generation's digest, None for a name that serves nothing.
Expected = str | type[AnyGeneration] | None


@dataclass(frozen=True)
class LoadOptions:
    """How a load wants its name to be.

    replace: whether it may take the place of other weights. expected: digest of the generation
    that must be served now, None for none. pinned: None leaves it as it is. allow_noop: serve it
    even if it changes nothing. content: digest that the source must have, None for any. eager:
    bring it into the workers even where another adapter must leave them for it. when_not_invoked:
    of an activated adapter; None leaves it as it is, which for a new name is "refuse".
    chat_template: whose its chat requests get. chat: digest that the source's chat must have, None
    for any. limits: of its traffic; None leaves them as they are.
    """

    replace: bool = True
    expected: Expected = AnyGeneration
    pinned: bool | None = None
    allow_noop: bool = False
    content: str | None = None
    eager: bool = True
    when_not_invoked: WhenNotInvoked | None = None
    chat_template: ChatTemplate = "adapter"
    chat: str | None = None
    limits: TrafficLimits | None = None


def check_expected(name: str, current: Generation | None, expected: Expected) -> None:
    """Raises GenerationMismatchError unless `current` is the expected one."""
    served = None if current is None else current.digest
    if expected is not AnyGeneration and expected != served:
        raise GenerationMismatchError(
            f"{name!a}: found generation {served or 'none'}, expected {expected or 'none'}"
        )


def check_content(source: str, digest: str, expected: str | None) -> None:
    """Raises SourceChangedError."""
    if expected is not None and digest != expected:
        raise SourceChangedError(f"{source}: found {digest}, expected {expected}")
