"""The adapters that an operator wants served, as a document says it: JSON or YAML.

Either a list of adapters, or the configuration of the Gateway API Inference Extension's LoRA syncer
(tools/dynamic-lora-sidecar of kubernetes-sigs/gateway-api-inference-extension). An entry that is
wrong is told, and the others hold.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from reprlib import Repr
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from molehill.api.adapters import names
from molehill.api.adapters.errors import BadLimitsError, BadNameError, RequestError
from molehill.api.adapters.invocation import WhenNotInvoked
from molehill.api.adapters.traffic_limits import NO_LIMITS, TrafficLimits, check_limits
from molehill.api.sources.fetch import HUB
from molehill.engine.adapter.layout import Layout

logger = logging.getLogger("vllm.molehill")

# The file's name before clients, who need not know where it lies.
LABEL = "--adapters-file"

SYNCER = "vLLMLoRAConfig"
# What the syncer's versions know beside the two lists: where the server is and how often to look.
SYNCER_FIELDS = frozenset(
    (
        *("name", "host", "port", "defaultBaseModel", "ensureExist", "ensureNotExist"),
        *("healthCheckTimeoutSeconds", "healthCheckIntervalSeconds", "reconcileTriggerSeconds"),
    )
)
SYNCER_MODEL_FIELDS = frozenset(("id", "source", "base-model"))

# An alias may make a small document a huge tree: of what is wrong, so much is shown.
_short = Repr()
_short.maxstring = _short.maxother = 80
_short.maxlevel = _short.maxdict = 2

# Written in C where PyYAML was built so: some ten times as fast.
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class AdaptersFileError(RequestError):
    """A document, or an entry of one, that says nothing that could be served."""

    kind = "invalid_adapters_file"


class DesiredAdapter(BaseModel):
    """One adapter of the set. name, source, lora_b_layout, base_is_residual, non_granular_after,
    when_not_invoked, allow_noop: as in the body of a load. revision: of a repository. digest:
    sha256 of the content (the `generation` of GET /v1/adapters) that the source must have, in
    lower-case hex. pinned:
    whether it is kept in the workers; None leaves that to others. weight: those of a greater one
    are loaded first. limits: of its traffic; None leaves them to others. vllm_source: whether
    `source` is written as vLLM's clients write it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    source: str = Field(min_length=1)
    revision: str | None = Field(default=None, min_length=1)
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    pinned: bool | None = False
    weight: float = Field(default=1.0, allow_inf_nan=False, strict=False)
    lora_b_layout: Layout | None = None
    base_is_residual: bool = False
    non_granular_after: Annotated[int, Field(ge=0)] | None = None
    when_not_invoked: WhenNotInvoked | None = None
    allow_noop: bool = False
    limits: Annotated[TrafficLimits | None, PlainValidator(check_limits)] = NO_LIMITS

    vllm_source: ClassVar[bool] = False

    @property
    def location(self) -> str:
        """The source with its revision."""
        return self.source if self.revision is None else f"{self.source}@{self.revision}"


class SyncerAdapter(DesiredAdapter):
    """One that the syncer's configuration names."""

    limits: TrafficLimits | None = None

    vllm_source: ClassVar[bool] = True


@dataclass(frozen=True)
class BadEntry:
    """An entry that says nothing that could be served. place: where in the document. name: whose,
    where that can be read."""

    place: str
    name: str | None
    message: str


@dataclass(frozen=True)
class DesiredSet:
    """What a document says. adapters: by weight, then as they stand there. absent: names that must
    not be served. bad: entries of which neither holds."""

    adapters: tuple[DesiredAdapter, ...]
    absent: frozenset[str] = frozenset()
    bad: tuple[BadEntry, ...] = ()

    @cached_property
    def by_name(self) -> Mapping[str, DesiredAdapter]:
        return {adapter.name: adapter for adapter in self.adapters}

    @cached_property
    def named(self) -> frozenset[str | None]:
        """The names of all entries but those that must not be served; None where one cannot be
        read: it may be any."""
        return frozenset((*self.by_name, *(entry.name for entry in self.bad)))


def parse(content: bytes) -> DesiredSet:
    """Raises AdaptersFileError for what is no such document at all."""
    document = decoded(content)
    if isinstance(document, Mapping) and SYNCER in document:
        return syncer_set(document[SYNCER])
    if not isinstance(document, list):
        raise AdaptersFileError(
            f"{LABEL}: found {short(document)}, expected a list of adapters or {SYNCER} (an empty "
            "set is [])"
        )
    entries = [(f"entry {number}", entry) for number, entry in enumerate(document, start=1)]
    return checked([read_entry(place, entry) for place, entry in entries])


def decoded(content: bytes) -> Any:
    try:
        text = content.decode()
        try:
            return json.loads(text)
        except ValueError:
            return yaml.load(text, Loader=Loader)
    except (RecursionError, ValueError, yaml.YAMLError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        raise AdaptersFileError(
            f"{LABEL}: found what is neither JSON nor YAML: {short(line)}"
        ) from None
    except Exception as error:
        # Of scalars that its constructors do not expect.
        raise AdaptersFileError(f"{LABEL}: found a value that is none: {error!r}") from None


def syncer_set(config: Any) -> DesiredSet:
    """What the syncer's configuration says: `ensureExist` is wanted, `ensureNotExist` must not be
    there, and a name in both is neither. Raises AdaptersFileError."""
    where = f"{LABEL}: {SYNCER}"
    if not isinstance(config, Mapping):
        raise AdaptersFileError(f"{where}: found {short(config)}, expected a mapping")
    warn_of(config.keys() - SYNCER_FIELDS, SYNCER)
    wanted = [read_syncer_model(*model) for model in syncer_models(config, "ensureExist")]
    unwanted = [read_syncer_model(*model) for model in syncer_models(config, "ensureNotExist")]
    desired = checked(wanted)
    absent = {entry.name for entry in unwanted if entry.name is not None}
    both = absent & {entry.name for entry in wanted}
    bad = [entry for entry in unwanted if isinstance(entry, BadEntry)]
    bad += [
        BadEntry(
            f"{SYNCER}",
            name,
            f"{where}: {name!a}: found in ensureExist and ensureNotExist, expected in one of them",
        )
        for name in sorted(both)
    ]
    return DesiredSet(
        tuple(adapter for adapter in desired.adapters if adapter.name not in both),
        frozenset(absent - both),
        (*desired.bad, *bad),
    )


def syncer_models(config: Mapping[str, Any], field: str) -> Iterator[tuple[str, Any]]:
    """Each entry of one of the two lists, with its place. Raises AdaptersFileError."""
    part = config.get(field)
    if part is None:
        return
    models = part.get("models") if isinstance(part, Mapping) else part
    if not isinstance(part, Mapping) or not isinstance(models, list):
        raise AdaptersFileError(
            f"{LABEL}: {SYNCER}.{field}: found {short(part)}, expected models with a list"
        )
    for number, model in enumerate(models, start=1):
        yield f"{SYNCER}.{field} {number}", model


def read_syncer_model(place: str, model: Any) -> DesiredAdapter | BadEntry:
    """Which base it is for, it says for nobody: vLLM takes no notice of that either."""
    if not isinstance(model, Mapping):
        return BadEntry(place, None, f"{LABEL}: {place}: found {short(model)}, expected a mapping")
    warn_of(model.keys() - SYNCER_MODEL_FIELDS, place)
    fields = {
        field: model[key] for key, field in (("id", "name"), ("source", "source")) if key in model
    }
    return read_entry(place, {**fields, "pinned": None}, SyncerAdapter)


def read_entry(
    place: str, fields: Any, kind: type[DesiredAdapter] = DesiredAdapter
) -> DesiredAdapter | BadEntry:
    where = f"{LABEL}: {place}"
    if not isinstance(fields, Mapping):
        return BadEntry(place, None, f"{where}: found {short(fields)}, expected a mapping")
    name = fields.get("name")
    name = name if isinstance(name, str) else None
    if name is not None:
        where = f"{where} ({name[:100]!a})"
    try:
        adapter = kind.model_validate(dict(fields))
        names.check(adapter.name, base_models=())
        check_revision(adapter)
        return adapter
    except ValidationError as error:
        problems = "; ".join(shown(detail, kind) for detail in error.errors(include_url=False))
        return BadEntry(place, name, f"{where}: {problems}")
    except (BadLimitsError, BadNameError, AdaptersFileError) as error:
        return BadEntry(place, name, f"{where}: {error}")


def check_revision(adapter: DesiredAdapter) -> None:
    """Raises AdaptersFileError."""
    if adapter.revision is None:
        return
    if not adapter.source.startswith(HUB) or "@" in adapter.source:
        raise AdaptersFileError(
            f"revision: found {adapter.revision!a} beside the source {adapter.source[:200]!a}, "
            f"expected {HUB}OWNER/NAME without one"
        )


def shown(detail: Any, kind: type[DesiredAdapter]) -> str:
    """One of pydantic's errors."""
    field = ".".join(map(str, detail["loc"])) or "entry"
    if detail["type"] == "missing":
        return f"{field}: found nothing, expected it"
    if detail["type"] == "extra_forbidden":
        return f"{field}: found an unknown field, expected {', '.join(kind.model_fields)}"
    return f"{field}: found {short(detail['input'])}, expected otherwise: {detail['msg']}"


def checked(entries: list[DesiredAdapter | BadEntry]) -> DesiredSet:
    """Of a name that is given twice, neither entry holds."""
    counts = Counter(entry.name for entry in entries if entry.name is not None)
    adapters = [entry for entry in entries if isinstance(entry, DesiredAdapter)]
    bad = [entry for entry in entries if isinstance(entry, BadEntry)]
    known_bad = {entry.name for entry in bad}
    for name, count in counts.items():
        if count > 1 and name not in known_bad:
            message = f"{LABEL}: name: found {name!a} {count} times, expected it once"
            bad.append(BadEntry("name", name, message))
    once = (adapter for adapter in adapters if counts[adapter.name] == 1)
    ordered = sorted(once, key=lambda adapter: -adapter.weight)
    return DesiredSet(tuple(ordered), bad=tuple(bad))


def warn_of(unknown: Any, place: str) -> None:
    if unknown:
        logger.warning(
            "%s: %s: ignored fields that it does not know: %s",
            LABEL,
            place,
            short(sorted(map(str, unknown))),
        )


def short(value: Any) -> str:
    """A bounded text of a value, in ASCII."""
    try:
        return "nothing" if value is None else ascii(_short.repr(value))[1:-1]
    except ValueError:
        # Python writes no integer of so many digits; YAML has them in base 16.
        return "a number of thousands of digits"
