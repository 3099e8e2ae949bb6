"""Leases for the requests of other processes, in the process that owns the registry.

A follower that dies holds nothing any more: its leases end with its connection.
"""

import asyncio
import logging
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable
from pathlib import Path

from molehill.api.adapters.errors import EngineRefusedError, LimitReachedError
from molehill.api.adapters.lease import Lease
from molehill.api.adapters.registry import AdapterRegistry
from molehill.api.followers import messages
from molehill.api.followers.messages import FromFollower, FromOwner, Welcome

logger = logging.getLogger("vllm.molehill")


class LeaseServer:
    """welcome: what each follower is told first."""

    def __init__(self, registry: AdapterRegistry, welcome: Welcome) -> None:
        self._registry = registry
        self._welcome = welcome
        self._server: asyncio.Server | None = None

    async def listen(self, path: Path) -> None:
        """At a path in a directory that is nobody else's: who can connect may hold adapters."""
        self._server = await asyncio.start_unix_server(self._serve, str(path))

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        def send(message: FromOwner) -> None:
            messages.write(writer, message)

        held = FollowerLeases(self._registry, send)
        try:
            send(self._welcome)
            while True:
                held.take(await messages.read(reader, messages.from_follower))
        except asyncio.CancelledError:
            # This process ends. asyncio would log a connection's task that was cancelled.
            pass
        except (asyncio.IncompleteReadError, ConnectionError):
            logger.info("molehill: an API process has gone; what its requests held is released")
        except Exception:
            logger.exception("molehill: found what is no message of an API process; it is left")
        finally:
            held.end()
            writer.close()


class FollowerLeases:
    """What the requests of one follower hold. send: to that follower."""

    def __init__(self, registry: AdapterRegistry, send: Callable[[FromOwner], None]) -> None:
        self._registry = registry
        self._send = send
        self._leases: dict[int, Lease] = {}
        # With what brings each in.
        self._slots: dict[int, tuple[Lease, asyncio.Task[None]]] = {}

    def take(self, message: FromFollower) -> None:
        """Raises KeyError for a number that nothing has."""
        match message:
            case messages.Admit(number, name):
                self._admit(number, name)
            case messages.Describe(number, lease):
                self._send(described(number, self._leases[lease]))
            case messages.AcquireSlot(number, lease):
                slot = self._leases[lease].share()
                self._slots[number] = slot, asyncio.create_task(self._enter(number, slot))
            case messages.ReleaseSlot(slot):
                leave(*self._slots.pop(slot))
            case messages.Charge(lease, tokens):
                self._leases[lease].charge(tokens)
            case messages.Release(number):
                self._release(number)
            case messages.Hit(name, tier, seconds):
                self._registry.events.hit(name, tier, seconds)
            case messages.MissedInvocation(name, outcome):
                self._registry.events.not_invoked(name, outcome)

    def end(self) -> None:
        for slot, entering in self._slots.values():
            leave(slot, entering)
        for lease in self._leases.values():
            lease.release()
        self._slots.clear()
        self._leases.clear()

    def _admit(self, number: int, name: str) -> None:
        generation = self._registry.get(name)
        if generation is None:
            self._send(messages.Unknown(number))
            return
        try:
            lease = self._registry.admit(generation.request, object())
        except LimitReachedError as error:
            self._send(messages.Limited(number, str(error), error.retry_after or 1))
            return
        self._leases[number] = lease
        self._send(granted(number, lease))

    def _release(self, number: int) -> None:
        # Nobody has one that was refused, or that was not admitted yet when its client went.
        lease = self._leases.pop(number, None)
        if lease is not None:
            lease.release()

    async def _enter(self, number: int, slot: Lease) -> None:
        try:
            self._send(messages.Entered(number, await slot.acquire_slot()))
        except EngineRefusedError as error:
            self._send(messages.SlotRefused(number, str(error)))
        except Exception as error:
            logger.exception("Adapter %s could not be brought in", slot.generation.name)
            self._send(messages.SlotRefused(number, type(error).__name__))


def leave(slot: Lease, entering: asyncio.Task[None]) -> None:
    """Out of the slot, or of the queue for one."""
    entering.cancel()
    entering.add_done_callback(lambda _: slot.release())


def granted(number: int, lease: Lease) -> messages.Granted:
    generation = lease.generation
    return messages.Granted(
        number,
        generation.lora_int_id,
        str(generation.content.path),
        generation.digest,
        generation.created,
        generation.status.when_not_invoked,
        lease.unprobed,
    )


def described(number: int, lease: Lease) -> messages.Described:
    content = lease.generation.content
    return messages.Described(
        number,
        content.kind,
        content.num_bytes,
        content.invocation_tokens,
        content.chat,
        content.added,
        content.token_texts,
    )
