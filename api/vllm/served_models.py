"""The models that clients may ask for by name: the base model's names and the adapters.

What they are told of them, none of it a path of the server's.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.exceptions import VLLMNotFoundError

from molehill.api.adapters.errors import UnknownModelError
from molehill.api.adapters.generation import Generation
from molehill.api.adapters.registry import AdapterRegistry

# What those of vLLM's routes raise that check a model's name themselves.
NOT_FOUND: type[Exception] = VLLMNotFoundError

# Names in the answer to a request for a model that is not served.
MOST = 20

Card = dict[str, Any]


class ServedPaths(list[BaseModelPath]):
    """vLLM's names of the base model, of which it takes the first as the model's.

    It goes through all of them for one thing: to tell who asks for another model which there are.
    There it finds the adapters too, and no directory. registry: or nothing, where there is none.
    """

    def __init__(
        self, paths: Sequence[BaseModelPath], registry: AdapterRegistry | Sequence[Generation]
    ) -> None:
        super().__init__(paths)
        first, *others = paths
        self._public = [first.name, *(path.name for path in others if path.name != path.model_path)]
        self._registry = registry

    def __iter__(self) -> Iterator[BaseModelPath]:
        return (BaseModelPath(name, "") for name in self.shown())

    def shown(self) -> list[str]:
        """The first names, and how many more there are."""
        adapters = (generation.name for generation in self._registry)
        names = list(islice((*self._public, *islice(adapters, MOST)), MOST))
        more = len(self._public) + len(self._registry) - len(names)
        return [*names, f"and {more} more"] if more else names


class ServedModels:
    """models: vLLM's OpenAIServingModels."""

    def __init__(self, models: Any, registry: AdapterRegistry) -> None:
        self._models = models
        self._registry = registry
        self.names = models.base_model_paths = ServedPaths(models.base_model_paths, registry)

    async def cards(self) -> list[Card]:
        """The base model's cards as vLLM writes them, and one per adapter."""
        base = await self._base_cards()
        return [*base, *(adapter_card(base[0], generation) for generation in self._registry)]

    async def card(self, name: str) -> Card:
        """Raises UnknownModelError."""
        base = await self._base_cards()
        generation = self._registry.get(name)
        if generation is not None:
            return adapter_card(base[0], generation)
        if self._models.is_base_model(name):
            return {**base[0], "id": name, "root": name}
        raise UnknownModelError(name)

    async def _base_cards(self) -> list[Card]:
        listed = await self._models.registry.show_available_models()
        # A local model also answers to its directory, which is not for everybody to know.
        first, *others = listed.data
        shown = (first, *(card for card in others if card.id != card.root))
        return [{**card.model_dump(), "root": card.id} for card in shown]


def adapter_card(base: Card, generation: Generation) -> Card:
    name = generation.name
    fields = {"id": name, "root": name, "parent": base["id"], "created": generation.created}
    return {**base, **fields}
