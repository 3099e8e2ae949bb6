"""The process that owns the registry, as a follower asks it."""

import asyncio
import itertools
import logging
from asyncio import StreamReader, StreamWriter
from pathlib import Path

import msgspec

from molehill.api.adapters.errors import EngineRefusedError
from molehill.api.followers import messages
from molehill.api.followers.messages import Answer, FromFollower, Question, Welcome

logger = logging.getLogger("vllm.molehill")

# Between two looks at whether the owner listens by now.
LOOK_SECONDS = 0.1


class OwnerGoneError(EngineRefusedError):
    """The process that owns the registry has ended; this one is about to."""

    def __init__(self) -> None:
        super().__init__("found no process that owns the adapters' registry: the server ends")


class Owner:
    """A connection to it. welcome: what it said first."""

    def __init__(self, reader: StreamReader, writer: StreamWriter, welcome: Welcome) -> None:
        self.welcome = welcome
        self.gone = asyncio.Event()
        self._writer = writer
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Answer]] = {}
        self._reading = asyncio.create_task(self._read(reader))

    @classmethod
    async def connect(cls, path: Path) -> "Owner":
        """Returns once it listens there, which it does when it is ready."""
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.sleep(LOOK_SECONDS)
        first = await messages.read(reader, messages.from_owner)
        if not isinstance(first, Welcome):
            raise RuntimeError(f"found {type(first).__name__} of the owner, expected Welcome")
        return cls(reader, writer, first)

    def number(self) -> int:
        """Of the next question."""
        return next(self._numbers)

    async def ask(self, question: Question) -> Answer:
        """Raises OwnerGoneError."""
        if self.gone.is_set():
            raise OwnerGoneError
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._asked[question.number] = answer
        self.send(question)
        try:
            return await answer
        finally:
            del self._asked[question.number]

    def send(self, message: FromFollower) -> None:
        """What goes to an owner that has gone is lost, as what it counted is."""
        if not self.gone.is_set():
            messages.write(self._writer, message)

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.wait([self._reading])

    async def _read(self, reader: StreamReader) -> None:
        try:
            while True:
                message = await messages.read(reader, messages.from_owner)
                answer = None if isinstance(message, Welcome) else self._asked.get(message.number)
                if answer is not None and not answer.done():
                    answer.set_result(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except msgspec.DecodeError:
            logger.exception("molehill: found what is no message of the owner of the registry")
        finally:
            self.gone.set()
            self._writer.close()
            for answer in self._asked.values():
                if not answer.done():
                    answer.set_exception(OwnerGoneError())
