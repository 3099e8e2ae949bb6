"""The part of vLLM's engine client that tells whether it lives."""

from vllm.v1.engine.exceptions import EngineDeadError


class Engine:
    """The part of vLLM's engine client that `/health` asks."""

    def __init__(self, dead: bool) -> None:
        self.dead = dead

    async def check_health(self) -> None:
        if self.dead:
            raise EngineDeadError
