"""The rules of the house: who may import whom. Read off the source, of which nothing is run.

A room is a package; `api/app.py`, which puts the rest together, is a room of its own. Each rule
gives a line for each breach of it: the file, its line, what was found there and what is expected.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

# From the top: each imports those after it.
FLOORS = ("api", "engine", "kernels")
PACKAGES = (*FLOORS, "benchmarks")
COMPOSITION = ("api.app",)

# What each room imports of ours, besides itself; a room of a room is one of its own where it is
# listed. `api.*` stands for all rooms of api. The table in docs/architecture.md says the same.
ROOMS: dict[str, tuple[str, ...]] = {
    "api.app": ("api.*", "engine.adapter", "engine.system", "engine.vllm"),
    "api.cli": ("api.*", "engine.*", "kernels.*"),
    "api.http": (
        "api.adapters",
        "api.followers",
        "api.metrics",
        "api.sources",
        "api.vllm",
        "engine.adapter",
        "engine.routing_stats",
        "engine.system",
    ),
    "api.adapters": ("engine.adapter", "engine.formats", "engine.system", "engine.transform"),
    "api.followers": ("api.adapters", "engine.adapter", "engine.formats"),
    "api.sources": ("api.adapters", "engine.adapter", "engine.formats", "engine.system"),
    "api.metrics": ("api.adapters", "api.sources", "engine.routing_stats", "engine.vllm"),
    "api.ray": ("api.cli",),
    "api.vllm": (
        "api.adapters",
        "api.followers",
        "engine.adapter",
        "engine.formats",
        "engine.hf",
        "engine.system",
        "engine.transform",
        "engine.vllm",
    ),
    "engine.adapter": ("kernels",),
    "engine.formats": ("engine.adapter", "engine.system", "engine.transform", "kernels"),
    "engine.transform": ("engine.adapter", "engine.hf", "engine.system", "kernels"),
    "engine.hf": ("engine.adapter", "engine.system", "kernels"),
    "engine.routing_stats": ("engine.adapter", "kernels"),
    "engine.system": ("engine.adapter",),
    "engine.vllm": (
        "engine.adapter",
        "engine.formats",
        "engine.routing_stats",
        "engine.system",
        "engine.transform",
        "engine.vllm.model",
        "kernels.*",
    ),
    "engine.vllm.model": ("engine.adapter", "engine.formats", "engine.transform", "kernels"),
    "kernels": (),
    "kernels.pytorch": ("kernels",),
    "kernels.cpu": ("kernels",),
    "kernels.triton": ("kernels", "kernels.pytorch"),
    "benchmarks": ("api.*", "engine.*", "kernels.*"),
}

KERNELS_USE = {"numpy", "torch", "triton"}
KNOW_VLLM = ("engine.vllm", "api.vllm")
# Not `http`: the errors have their status, one of its numbers.
HTTP = {"aiohttp", "fastapi", "httpx", "requests", "starlette", "uvicorn"}

# What a name of a variable, function or field does not say anything by.
VAGUE = {"dice", "figures", "go_on", "mine", "own", "settle", "stay", "told"}

MOST_LINES = 450
# A kernel of Triton, and what launches it, name each of many arguments.
MOST_FUNCTION_LINES, LONG_FUNCTIONS_IN = 60, ("kernels.triton",)
SOURCES = ("*.py", "*.cpp", "*.h", "*.js", "*.css", "*.html")


@dataclass(frozen=True)
class Import:
    """importer, imported: modules, ours without `molehill.`. place: file and line."""

    importer: str
    imported: str
    place: str

    def __str__(self) -> str:
        return f"{self.place}: imports {self.imported}"

    @property
    def top(self) -> str:
        return self.imported.partition(".")[0]


class House:
    """The modules below a repository's root and all that they import, wherever in a file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        files = [path for top in PACKAGES for path in sorted((root / top).rglob("*.py"))]
        self.modules = {self._module(path): path for path in files}
        self.imports = [imported for name in self.modules for imported in self._imports(name)]

    def inside(self, package: str) -> list[Import]:
        return [imported for imported in self.imports if is_in(imported.importer, package)]

    def room(self, module: str) -> str:
        if module in COMPOSITION or self.modules[module].name == "__init__.py":
            return module
        return module.rpartition(".")[0]

    def _module(self, path: Path) -> str:
        return ".".join(path.relative_to(self.root).with_suffix("").parts).removesuffix(".__init__")

    def _imports(self, module: str) -> Iterator[Import]:
        path = self.modules[module]
        for node in ast.walk(_parsed(path.read_text())):
            for name in dict.fromkeys(self._imported(module, node)):
                place = f"{path.relative_to(self.root)}:{getattr(node, 'lineno', 0)}"
                yield Import(module, name, place)

    def _imported(self, module: str, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (name.name.removeprefix("molehill.") for name in node.names)
        if isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                package = self.modules[module].relative_to(self.root).parts[: -node.level]
                source = ".".join((*package, *filter(None, [source])))
            source = source.removeprefix("molehill.")
            for alias in node.names:
                part = alias.name if source == "molehill" else f"{source}.{alias.name}"
                yield part if part in self.modules else source


@cache
def _parsed(text: str) -> ast.Module:
    """Every rule reads every file."""
    return ast.parse(text)


def is_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def arrows(house: House) -> Iterator[str]:
    """api -> engine -> kernels; nobody imports benchmarks."""
    for imported in house.imports:
        top = imported.importer.partition(".")[0]
        below = FLOORS[FLOORS.index(top) :] if top in FLOORS else PACKAGES
        if imported.top in PACKAGES and imported.top not in below:
            yield f"{imported}, expected {' and '.join(below)} only"


def rooms_import_what_is_listed(house: House) -> Iterator[str]:
    """ROOMS has every module, and each import between its rooms."""
    for module, path in house.modules.items():
        if listed_room(module) is None and path.name != "__init__.py":
            yield f"{path.relative_to(house.root)}: found in no room of ROOMS, expected in one"
    for imported in house.imports:
        importer, room = listed_room(imported.importer), listed_room(imported.imported)
        if importer is None or room is None or importer == room:
            continue
        listed = ROOMS[importer]
        if room not in listed and f"{imported.top}.*" not in listed:
            yield f"{imported}, expected {expected_imports(importer)}"


def listed_room(module: str) -> str | None:
    """The innermost room of ROOMS that a module is in."""
    return max((room for room in ROOMS if is_in(module, room)), key=len, default=None)


def expected_imports(room: str) -> str:
    """As folders, for people."""
    return ", ".join(name.replace(".", "/") for name in ROOMS[room]) or "nothing of ours"


def third_parties_of_kernels(house: House) -> Iterator[str]:
    for imported in house.inside("kernels"):
        if imported.top not in {*PACKAGES, *KERNELS_USE, *sys.stdlib_module_names}:
            yield f"{imported}, expected {', '.join(sorted(KERNELS_USE))} only"


def vllm_in_two_rooms(house: House) -> Iterator[str]:
    for floor in FLOORS:
        for imported in house.inside(floor):
            if imported.top == "vllm" and not any(
                is_in(imported.importer, room) for room in KNOW_VLLM
            ):
                yield f"{imported}, expected in {' and '.join(KNOW_VLLM)} only"


def adapters_know_no_server(house: House) -> Iterator[str]:
    """What manages adapters imports no HTTP, no vLLM and no other room of api."""
    for imported in house.inside("api.adapters"):
        other = imported.top == "api" and not is_in(imported.imported, "api.adapters")
        if other or imported.top in {*HTTP, "vllm"} or is_in(imported.imported, "engine.vllm"):
            yield f"{imported}, expected neither HTTP, vLLM nor other rooms of api"


def no_circle_of_modules(house: House) -> Iterator[str]:
    yield from _circle(house, lambda module: module)


def no_circle_of_rooms(house: House) -> Iterator[str]:
    yield from _circle(house, house.room)


def _circle(house: House, place: Callable[[str], str]) -> Iterator[str]:
    """One circle of arrows between places, with an import for each arrow."""
    reasons: dict[tuple[str, str], Import] = {}
    graph: dict[str, list[str]] = {}
    for imported in house.imports:
        if imported.imported in house.modules:
            arrow = (place(imported.importer), place(imported.imported))
            if arrow[0] != arrow[1] and arrow not in reasons:
                reasons[arrow] = imported
                graph.setdefault(arrow[0], []).append(arrow[1])
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        # Each is imported by the next one, and the first is the last.
        circle = error.args[1][:0:-1]
        first = circle.index(min(circle))
        circle = [*circle[first:], *circle[: first + 1]]
        steps = [str(reasons[arrow]) for arrow in pairwise(circle)]
        yield f"{' -> '.join(circle)}, expected no circle: {'; '.join(steps)}"


def packages_are_installed(house: House) -> Iterator[str]:
    """Every folder with modules, and no other, is in pyproject's packages and package-dir."""
    settings = tomllib.loads((house.root / "pyproject.toml").read_text())["tool"]["setuptools"]
    expected = {}
    for path in house.modules.values():
        folder = path.relative_to(house.root).parent
        expected[".".join(("molehill", *folder.parts))] = folder.as_posix()
        if not (path.parent / "__init__.py").exists():
            yield f"{folder}: found no __init__.py, expected one beside {path.name}"
    for name in sorted(expected.keys() ^ set(settings["packages"])):
        said = "in packages, expected a folder" if name not in expected else "expected in packages"
        yield f"pyproject.toml: tool.setuptools.packages: {name} {said}"
    for name, folder in sorted(expected.items() ^ settings["package-dir"].items()):
        said = "expected" if expected.get(name) == folder else "found"
        yield f'pyproject.toml: tool.setuptools.package-dir: {said} "{name}" = "{folder}"'


def no_long_file(house: House) -> Iterator[str]:
    for top in (*PACKAGES, "tests"):
        for pattern in SOURCES:
            for path in sorted((house.root / top).rglob(pattern)):
                lines = len(path.read_text().splitlines())
                if lines > MOST_LINES:
                    place = path.relative_to(house.root)
                    yield f"{place}: found {lines} lines, expected at most {MOST_LINES}"


def no_long_function(house: House) -> Iterator[str]:
    """Of what is installed, but for LONG_FUNCTIONS_IN."""
    for module, path in house.modules.items():
        if not any(is_in(module, room) for room in FLOORS):
            continue
        if any(is_in(module, room) for room in LONG_FUNCTIONS_IN):
            continue
        for node in ast.walk(_parsed(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_FUNCTION_LINES:
                    place = f"{path.relative_to(house.root)}:{node.lineno}"
                    most = MOST_FUNCTION_LINES
                    yield f"{place}: {node.name}: found {lines} lines, expected at most {most}"


def one_class_of_a_name(house: House) -> Iterator[str]:
    """Public classes, of all packages together."""
    places: dict[str, str] = {}
    for path in house.modules.values():
        for node in _parsed(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                place = f"{path.relative_to(house.root)}:{node.lineno}"
                if node.name in places:
                    yield f"{place}: class {node.name}, expected no other than {places[node.name]}"
                places.setdefault(node.name, place)


def no_vague_name(house: House) -> Iterator[str]:
    """In tests too."""
    vague = re.compile(rf"\b({'|'.join(VAGUE)})\b")
    for path in (*house.modules.values(), *sorted((house.root / "tests").rglob("*.py"))):
        text = path.read_text()
        # Few have the word at all.
        for node in ast.walk(_parsed(text)) if vague.search(text) else ():
            name = getattr(node, "id", None) or getattr(node, "arg", None)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = node.name
            if name in VAGUE:
                place = f"{path.relative_to(house.root)}:{getattr(node, 'lineno', 0)}"
                yield f"{place}: {name}, expected what it holds or does"


RULES: tuple[Callable[[House], Iterator[str]], ...] = (
    arrows,
    rooms_import_what_is_listed,
    third_parties_of_kernels,
    vllm_in_two_rooms,
    adapters_know_no_server,
    no_circle_of_modules,
    no_circle_of_rooms,
    packages_are_installed,
    no_long_file,
    no_long_function,
    one_class_of_a_name,
    no_vague_name,
)
