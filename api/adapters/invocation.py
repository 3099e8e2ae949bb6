"""What becomes of a request whose prompt lacks the tokens that activate its adapter."""

from collections.abc import Sequence
from typing import Literal

from molehill.api.adapters.errors import NotActivatedError, NotInvokedError

# Refused, as the answer would be the base model's under the adapter's name, or answered by the base
# model, as PEFT does.
WhenNotInvoked = Literal["refuse", "base"]


def check_activated(name: str, tokens: Sequence[int], asked: WhenNotInvoked | None) -> None:
    """Raises NotActivatedError where it is said of an adapter that acts on every token."""
    if asked is not None and not tokens:
        raise NotActivatedError(
            f"when_not_invoked: found {asked!a} for {name!a}, which has no "
            "alora_invocation_tokens, expected an activated adapter"
        )


def not_invoked(name: str, found: str, tokens: Sequence[int], text: str) -> NotInvokedError:
    """found: in their place. text: what the tokens are, empty where nobody knows."""
    shown = f"{list(tokens)} ({text!r})" if text else f"{list(tokens)}"
    return NotInvokedError(
        f"prompt: found {found}, expected the tokens {shown} that activate the adapter {name!a}; "
        "without them it would answer as the base model, which it does if it is loaded with "
        '"when_not_invoked": "base"'
    )
