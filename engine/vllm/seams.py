"""A seam: one thing of vLLM that molehill imports, calls, extends or replaces; and its check.

Seams are data, in the tables of `engine.vllm.compat` and `api.vllm.compat`. One is compared with
what a process has imported, here, or with vLLM's source files, see `seam_sources`.
"""

import ast
import dis
import inspect
import linecache
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from importlib import import_module
from types import CodeType, FunctionType, ModuleType
from typing import Any, Literal


@dataclass(frozen=True)
class Seam:
    """What molehill expects of `name` in `module`.

    name: a path inside the module, `Class.method`; empty for the module itself. user: the module of
    molehill that needs it, and why: what for. before: modules that had it in older versions.
    overrides: its parameters where molehill replaces or extends it: these, in this order.
    positional, keywords: the arguments that molehill's call gives; none else may be required.
    attributes: what is read of it, or of its instances.
    markers: texts in its source, where how it works matters and not only what it takes.
    calls: an attribute's name, and the methods of it that its source may call: what vLLM asks of an
    object that molehill hands in.
    platform: the one whose processes import the module.
    """

    module: str
    name: str
    user: str
    why: str
    before: tuple[str, ...] = ()
    overrides: tuple[str, ...] | None = None
    positional: tuple[str, ...] | None = None
    keywords: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    calls: tuple[str, tuple[str, ...]] | None = None
    platform: Literal["any", "cpu", "gpu"] = "any"

    def __str__(self) -> str:
        return self.name or self.module

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.module, *self.before)


@dataclass(frozen=True)
class Parameter:
    name: str
    required: bool


@dataclass(frozen=True)
class Definition:
    """What was found of a seam. parameters: None of what cannot be called; a class's are its
    constructor's. takes_more: it takes any keyword. attributes: those of the seam's that it has."""

    parameters: tuple[Parameter, ...] | None
    takes_more: bool
    attributes: frozenset[str]
    source: str


def fault(seam: Seam, definition: Definition | None) -> str | None:
    """What is not as expected, in a line; None if all is."""
    if definition is None:
        if seam.overrides is not None:
            return f"vLLM's {seam} takes None, molehill expects {list(seam.overrides)}"
        return f"vLLM has no {'.'.join(filter(None, (seam.module, seam.name)))}"
    return (
        _parameter_fault(seam, definition)
        or _missing(seam, [name for name in seam.attributes if name not in definition.attributes])
        or _missing(seam, [text for text in seam.markers if text not in definition.source])
        or _call_fault(seam, definition.source)
    )


def _missing(seam: Seam, missing: Sequence[str]) -> str | None:
    return f"vLLM's {seam} has no {', '.join(missing)}" if missing else None


def _parameter_fault(seam: Seam, definition: Definition) -> str | None:
    parameters = definition.parameters
    names = None if parameters is None else [parameter.name for parameter in parameters]
    takes = f"vLLM's {seam} takes {names}, molehill"
    if seam.overrides is not None and names != list(seam.overrides):
        return f"{takes} expects {list(seam.overrides)}"
    if seam.positional is None:
        return None
    given = [*seam.positional, *seam.keywords]
    leading = list(seam.positional)
    if parameters is None or names is None or names[: len(leading)] != leading:
        return f"{takes} gives {given}"
    unknown = [name for name in seam.keywords if name not in names and not definition.takes_more]
    required = [item.name for item in parameters if item.required and item.name not in given]
    return f"{takes} gives {given}" if unknown or required else None


def _call_fault(seam: Seam, source: str) -> str | None:
    if seam.calls is None:
        return None
    name, known = seam.calls
    called = set(re.findall(rf"\b{name}\.(\w+)\(", source))
    if not called:
        return f"vLLM's {seam} calls nothing of {name}"
    unknown = sorted(called - set(known))
    return f"vLLM's {seam} calls {name}.{unknown[0]}" if unknown else None


def check(seams: Iterable[Seam], version: str) -> None:
    """Compares with what this process has imported, and imports what it has not. Raises
    RuntimeError that names the first seam that is not as expected."""
    for seam in seams:
        text = fault(seam, inspected(seam))
        if text is not None:
            raise RuntimeError(f"vLLM {version} does not fit molehill: {text} (for {seam.user})")


def load(seam: Seam) -> Any:
    """What a seam names, from whichever of its modules has it. Raises RuntimeError where none
    does."""
    for module in seam.modules:
        try:
            value: Any = import_module(module)
            for part in filter(None, seam.name.split(".")):
                value = getattr(value, part)
        except (ImportError, AttributeError):
            continue
        return value
    raise RuntimeError(fault(seam, None))


def inspected(seam: Seam) -> Definition | None:
    try:
        value = load(seam)
    except RuntimeError:
        return None
    parameters, takes_more = None, False
    if seam.overrides is not None or seam.positional is not None:
        parameters, takes_more = _signature(value)
    attributes = frozenset(name for name in seam.attributes if _has(value, name))
    source = _source(value) if seam.markers or seam.calls else ""
    return Definition(parameters, takes_more, attributes, source)


def _signature(value: Any) -> tuple[tuple[Parameter, ...] | None, bool]:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return None, False
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    parameters = tuple(
        Parameter(parameter.name, parameter.default is inspect.Parameter.empty)
        for parameter in signature.parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    )
    return parameters, inspect.Parameter.VAR_KEYWORD in kinds


def _has(value: Any, name: str) -> bool:
    """Of a class, also what only its instances have: fields, and what a method assigns."""
    if isinstance(value, ModuleType) or not isinstance(value, type):
        return hasattr(value, name)
    parents = value.__mro__
    return any(
        name in vars(parent) or name in vars(parent).get("__annotations__", ())
        for parent in parents
    ) or any(_assigns(code, name) for parent in parents for code in _methods(parent))


@cache
def _methods(owner: type) -> tuple[CodeType, ...]:
    """What may assign to attributes of an instance; of a dataclass nothing, whose annotations say
    what it has."""
    if is_dataclass(owner):
        return ()
    members = (inspect.unwrap(item) if callable(item) else item for item in vars(owner).values())
    codes = (getattr(member, "__code__", None) for member in members)
    return tuple(code for code in codes if code is not None)


def _assigns(code: CodeType, name: str) -> bool:
    # Few have the name at all: every process of vLLM checks at its start, and reading all of a
    # model runner's instructions took it half a second.
    return name in code.co_names and any(
        item.opname == "STORE_ATTR" and item.argval == name for item in dis.get_instructions(code)
    )


def _source(value: Any) -> str:
    """Like `inspect.getsource`, which looks for the end of a function or class by its tokens."""
    if isinstance(value, type):
        path = inspect.getsourcefile(value)
        lines = linecache.getlines(path or "")
        for node in ast.walk(ast.parse("".join(lines))):
            if isinstance(node, ast.ClassDef) and node.name == value.__name__:
                first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
                return "".join(lines[first - 1 : node.end_lineno])
    if not isinstance(value, FunctionType):
        return inspect.getsource(value)
    code = inspect.unwrap(value).__code__
    lines = linecache.getlines(code.co_filename)
    return "".join(lines[code.co_firstlineno - 1 : _last_line(code)])


def _last_line(code: CodeType) -> int:
    within = (_last_line(item) for item in code.co_consts if isinstance(item, CodeType))
    return max(*(end or 0 for _, end, _, _ in code.co_positions()), *within, 0)
