"""Which tests start an engine, a server or a browser: read off what their functions call.

A mark that is written by hand is forgotten by hand, and then the fast run starts engines.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
# By module and name: what a test that reaches it is marked with.
STARTERS = {
    ("support.engines", "engine"): "engine",
    ("support.in_process", "answer"): "engine",
    ("support.server", "serve"): "server",
    ("support.pages", "browser"): "browser",
}
# The fixture of tests that run in Triton's interpreter, or natively where there is a GPU.
NATIVE = "interpreted"
# Fixtures that take seconds of their own.
SLOW = {"authored"}
LAST = 3


def marks(item: pytest.Item) -> set[str]:
    """What a test and the fixtures that it gets start, of STARTERS' values; and `gpu` for what a
    GPU runs natively, `slow` for what waits for a fixture of SLOW."""
    if not isinstance(item, pytest.Function):
        return set()
    result = {mark for function in _functions(item) for mark in reached(function)}
    if NATIVE in item.fixturenames or TESTS / "gpu" in item.path.parents:
        result.add("gpu")
    if SLOW & set(item.fixturenames):
        result.add("slow")
    return result


def group(item: pytest.Item) -> str:
    """Tests of one group run in one process: those of a file, or of all that share an engine or a
    server. Every process would start its own."""
    if isinstance(item, pytest.Function):
        for name, definitions in item._fixtureinfo.name2fixturedefs.items():
            definition = definitions[-1]
            if definition.scope in ("package", "session") and reached(definition.func):
                return f"{definition.baseid}::{name}"
    return item.nodeid.split("::")[0]


def rank(item: pytest.Item, group: str) -> int:
    """Whose group runs first: what takes long, so that no process works alone at the end."""
    if "::" in group:
        return 0
    if any(item.get_closest_marker(mark) for mark in STARTERS.values()):
        return 1
    return 2 if item.get_closest_marker("slow") else LAST


def _functions(item: pytest.Function) -> Iterator[Callable[..., Any]]:
    # Hypothesis hides the test in a wrapper of its own.
    hypothesis = getattr(item.function, "hypothesis", None)
    yield hypothesis.inner_test if hypothesis else item.function
    for definitions in item._fixtureinfo.name2fixturedefs.values():
        yield definitions[-1].func


@cache
def reached(function: Callable[..., Any]) -> frozenset[str]:
    """What a function of the tests starts, itself or through others of the tests."""
    result: set[str] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [function]
    while waiting:
        called = waiting.pop()
        if called in seen:
            continue
        seen.add(called)
        mark = STARTERS.get((called.__module__, called.__name__))
        if mark:
            result.add(mark)
            continue
        unwrapped = inspect.unwrap(called)
        if isinstance(unwrapped, FunctionType) and _is_of_the_tests(unwrapped.__code__):
            waiting += _called(unwrapped)
    return frozenset(result)


def _is_of_the_tests(code: CodeType) -> bool:
    return code.co_filename.startswith(f"{TESTS}/")


def _called(function: FunctionType) -> Iterator[FunctionType]:
    """Functions that it names: globals of its module, and what it names of other modules."""
    names = set(_names(function.__code__))
    known = [function.__globals__[name] for name in names if name in function.__globals__]
    modules = [value for value in known if isinstance(value, ModuleType)]
    known += [vars(module)[name] for module in modules for name in names if name in vars(module)]
    yield from (value for value in known if isinstance(value, FunctionType))


def _names(code: CodeType) -> Iterator[str]:
    """The globals and attributes that it and what is defined in it name."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
