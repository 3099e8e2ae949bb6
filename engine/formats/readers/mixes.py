"""Adapters made of others: a static mix, Arrow routing, a learned gate, or a table of token ids, of
the adapters in sub-directories.

`molehill_mix.json` says how; docs/format.md describes it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from molehill.engine.adapter import token_validation
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import LimitError, UnsupportedError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io import files
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.readers import invocation, peft, router_file, token_table
from molehill.engine.formats.readers.members import check_directory, named
from molehill.engine.formats.readers.reader import (
    PEFT_FILES,
    AdapterFiles,
    FileNames,
    Reader,
    read_weights,
    with_notes,
)
from molehill.engine.transform.arrow import Lora, arrow
from molehill.engine.transform.by_token import by_token
from molehill.engine.transform.learned_gate import routed
from molehill.engine.transform.weighted_sum import Part, mix
from molehill.kernels.policy import Arrow, Soft, TopK

CONFIG = "molehill_mix.json"

_Read = Callable[[Path], Adapter]


def read(mix: AdapterFiles) -> Adapter:
    """Raises an AdapterError that names the sub-directory, file and tensor or field."""
    members = _Members(mix.directory, mix.config, mix.limits)
    kind = mix.config.choice("kind", ("mix", "arrow", "molora"))
    if kind == "mix":
        return _read_mix(mix.config, members, mix.read_member)
    if kind == "arrow":
        return _read_arrow(mix.config, members)
    return _read_molora(mix, members)


READER = Reader(FileNames(CONFIG), read, no_layout=f"each adapter of a {CONFIG} says its own")


def _read_mix(config: Fields, members: "_Members", read_member: _Read) -> Adapter:
    config.only("kind", "adapters", invocation.FIELD)
    scales = config.object("adapters")
    members.check("adapters", list(scales.values))
    numbers = {name: scales.number(name) for name in scales.values}
    return mix([Part(name, members.read(name, read_member), numbers[name]) for name in numbers])


def _read_arrow(config: Fields, members: "_Members") -> Adapter:
    """Names and defaults of PEFT's ArrowConfig; `general` takes the place of `use_gks`."""
    config.only("kind", "adapters", "general", "top_k", "router_temperature", invocation.FIELD)
    tasks = list(config.items("adapters").values.values())
    general = list(config.items("general").values.values()) if config.has("general") else []
    members.check("adapters", tasks)
    if general:
        members.check("general", general)
    policy = Arrow(config.integer("top_k", 3), config.number("router_temperature", 1.0, above=0))
    _check_top_k(config, policy.k, tasks)
    loras = [members.read_lora(name) for name in (*tasks, *general)]
    return arrow(loras[: len(tasks)], policy, loras[len(tasks) :])


def _check_top_k(config: Fields, k: int, adapters: Sequence[Any]) -> None:
    if k > len(adapters):
        expected = f"at most {len(adapters)}, as many as there are adapters"
        raise UnsupportedError(f"{config.where}: top_k", k, expected)


def _read_molora(mix: AdapterFiles, members: "_Members") -> Adapter:
    """Every adapter is an expert; all of them by probability, or the `top_k` most probable."""
    config = mix.config
    if config.has(token_validation.FIELD):
        return _read_by_token(mix, members)
    fields = (router_file.FIELD, "top_k", "normalize", "router_temperature")
    config.only("kind", "adapters", *fields, invocation.FIELD)
    names = list(config.items("adapters").values.values())
    members.check("adapters", names)
    policy: Soft | TopK = Soft()
    if config.has("top_k"):
        policy = TopK(config.integer("top_k"), config.flag("normalize", True))
        _check_top_k(config, policy.k, names)
    elif config.has("normalize"):
        raise config.error("normalize", "none without `top_k`")
    temperature = config.number("router_temperature", 1.0, above=0)
    weights = router_file.read(mix.directory, config, mix.limits)
    parts = [Part(name, members.read(name, mix.read_member), 1.0) for name in names]
    sites = {site for part in parts for site in part.adapter.sites}
    return routed(parts, router_file.by_site(weights, sites), policy, temperature)


def _read_by_token(mix: AdapterFiles, members: "_Members") -> Adapter:
    """Every token has one of the adapters, or none, by its id."""
    fields = (token_validation.FIELD, token_table.OTHER)
    mix.config.only("kind", "adapters", *fields, invocation.FIELD)
    names = list(mix.config.items("adapters").values.values())
    members.check("adapters", names)
    adapter_of, other = token_table.read(mix.config, names)
    parts = [Part(name, members.read(name, mix.read_member), 1.0) for name in names]
    return by_token(parts, adapter_of, other)


class _Members:
    """The sub-directories of a mix, read one by one within the limits of one adapter."""

    def __init__(self, directory: Path, config: Fields, limits: Limits) -> None:
        self._directory, self._config, self._limits = directory, config, limits
        self._bytes = 0

    def check(self, field: str, names: Sequence[Any]) -> None:
        """Every name is that of a directory right below, and none comes twice."""
        where = f"{self._config.where}: {field}"
        if not names:
            raise self._config.error(field, "at least one adapter")
        if len(names) > self._limits.experts:
            expected = f"at most {self._limits.experts}"
            raise LimitError(where, f"{len(names)} adapters", expected)
        for name in names:
            check_directory(self._directory, name, where)
        if len(set(names)) < len(names):
            raise self._config.error(field, "every adapter once")

    def read(self, name: str, read_member: _Read) -> Adapter:
        path = self._directory / name
        with named(name):
            if (path / CONFIG).exists():
                expected = "an adapter with tensors of its own"
                raise UnsupportedError(CONFIG, "a mix inside a mix", expected)
            adapter = read_member(path)
            self._check_invocation(adapter)
        self._bytes += adapter.num_bytes
        if self._bytes > self._limits.adapter_bytes:
            expected = f"at most {self._limits.adapter_bytes} bytes for all of the mix"
            raise LimitError(name, f"{self._bytes} bytes up to here", expected)
        return adapter

    def _check_invocation(self, adapter: Adapter) -> None:
        """One that acts on a part of the tokens alone cannot act on all of them in a mix."""
        if adapter.invocation_tokens not in ((), invocation.read(self._config)):
            expected = f"none, or those of the {CONFIG}"
            raise UnsupportedError(invocation.FIELD, list(adapter.invocation_tokens), expected)

    def read_lora(self, name: str) -> Lora:
        """One that PEFT saved: only its config tells the factor in B."""
        factors: dict[str, float] = {}

        def read_member(path: Path) -> Adapter:
            config = files.read_config(path)
            if config.text("peft_type") not in (None, "LORA"):
                found = config.text("peft_type")
                raise UnsupportedError(f"{config.where}: peft_type", found, "LORA")
            weights = read_weights(path, PEFT_FILES, self._limits)
            factors.update(peft.factors(config, weights))
            adapter = with_notes(peft.read(config, weights), weights)
            return invocation.activated(adapter, config)

        return Lora(name, self.read(name, read_member), factors)
