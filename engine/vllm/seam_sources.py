"""Compares seams with the source files of a vLLM that is not imported, and need not be installed.

What decides is what a file says on its face: definitions, assignments, annotations and re-exports.
"""

import ast
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from molehill.engine.vllm.seams import Definition, Parameter, Seam, fault

Function = ast.FunctionDef | ast.AsyncFunctionDef
DATACLASS = ("dataclass", "config")
# A module's name, and a node in it.
Place = tuple[str, ast.AST]


class SourceTree:
    """The files below `root`, the folder that holds the package `vllm`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._tree, self._text = cache(self._parse), cache(self._read)
        self._names = cache(self._names_of)

    def faults(self, seams: Iterable[Seam]) -> Iterator[tuple[Seam, str | None]]:
        """Every seam, with what is not as expected of it."""
        for seam in seams:
            yield seam, fault(seam, self.definition(seam))

    def definition(self, seam: Seam) -> Definition | None:
        """None where no module has it."""
        for module in seam.modules:
            place = self._find(module, seam.name)
            if place is not None:
                return self._definition(place, seam.attributes)
        return None

    def _file(self, module: str) -> Path | None:
        path = self._root.joinpath(*module.split("."))
        files = (path / "__init__.py", path.with_suffix(".py"))
        return next((file for file in files if file.is_file()), None)

    def _read(self, module: str) -> str | None:
        file = self._file(module)
        return None if file is None else file.read_text(encoding="utf-8")

    def _parse(self, module: str) -> ast.Module | None:
        text = self._text(module)
        return None if text is None else ast.parse(text)

    def _find(self, module: str, name: str) -> Place | None:
        tree = self._tree(module)
        if tree is None:
            return None
        if not name:
            return module, tree
        first, *rest = name.split(".")
        place = self._top_level(module, first)
        for part in rest:
            place = None if place is None else self._member(place, part)
        return place

    def _top_level(self, module: str, name: str) -> Place | None:
        tree = self._tree(module)
        if tree is None:
            return None
        for node in statements(tree.body):
            if name in defined(node):
                return module, node
            if isinstance(node, ast.ImportFrom):
                place = self._imported(module, node, name)
                if place is not None:
                    return place
        submodule = f"{module}.{name}"
        tree = self._tree(submodule)
        return None if tree is None else (submodule, tree)

    def _imported(self, module: str, node: ast.ImportFrom, name: str) -> Place | None:
        names = {alias.asname or alias.name: alias.name for alias in node.names}
        source = self._absolute(module, node)
        if not source.startswith("vllm") or source == module:
            return None
        if name in names:
            return self._top_level(source, names[name])
        return self._top_level(source, name) if "*" in names else None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        file = self._file(module)
        is_package = file is not None and file.name == "__init__.py"
        parts = module.split(".")
        kept = parts[: len(parts) - node.level + is_package]
        return ".".join([*kept, *filter(None, [node.module])])

    def _bases(self, place: Place) -> list[Place]:
        """A class, then those that it inherits from, as far as they are vLLM's."""
        module, node = place
        result = [place]
        for base in node.bases if isinstance(node, ast.ClassDef) else ():
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                parent = self._top_level(module, base.id)
                if parent is not None and parent[1] is not node:
                    result += self._bases(parent)
        return result

    def _member(self, place: Place, name: str) -> Place | None:
        for module, owner in self._bases(place):
            if isinstance(owner, ast.ClassDef):
                for node in statements(owner.body):
                    if name in defined(node):
                        return module, node
        return None

    def _definition(self, place: Place, attributes: Sequence[str]) -> Definition:
        module, node = place
        parameters, takes_more = self._parameters(place)
        return Definition(
            parameters,
            takes_more,
            frozenset(name for name in attributes if self._has(place, name)),
            self._source(module, node),
        )

    def _source(self, module: str, node: ast.AST) -> str:
        text = self._text(module) or ""
        if isinstance(node, ast.Module) or not isinstance(node, ast.stmt):
            return text
        return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])

    def _parameters(self, place: Place) -> tuple[tuple[Parameter, ...] | None, bool]:
        _, node = place
        if isinstance(node, Function):
            bound = any(
                isinstance(d, ast.Name) and d.id == "classmethod" for d in node.decorator_list
            )
            return parameters_of(node.args, skip=int(bound))
        if not isinstance(node, ast.ClassDef):
            return None, False
        constructor = self._member(place, "__init__")
        if constructor is not None and isinstance(constructor[1], Function):
            return parameters_of(constructor[1].args, skip=1)
        fields = [
            Parameter(item.target.id, item.value is None)
            for _, owner in reversed(self._bases(place))
            if isinstance(owner, ast.ClassDef)
            for item in owner.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        ]
        return tuple(fields), False

    def _has(self, place: Place, name: str) -> bool:
        module, node = place
        if isinstance(node, ast.Module):
            return self._top_level(module, name) is not None
        return any(name in self._names(owner) for _, owner in self._bases(place))

    def _names_of(self, owner: ast.AST) -> set[str]:
        """What a class has, and what its methods assign; see `seams`."""
        names: set[str] = set()
        for node in ast.iter_child_nodes(owner):
            names |= defined(node)
            names |= (
                set()
                if is_dataclass(owner)
                else {
                    item.attr
                    for item in ast.walk(node)
                    if isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store)
                }
            )
        return names


def statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a body, and of the conditions and attempts in it."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            handlers = node.handlers if isinstance(node, ast.Try) else []
            yield from statements(node.body)
            for handler in handlers:
                yield from statements(handler.body)
            yield from statements(node.orelse)


def defined(node: ast.AST) -> set[str]:
    """The names that a statement binds, without those that it imports from vLLM."""
    if isinstance(node, Function | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {name.id for name in node.targets if isinstance(name, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    return set()


def is_dataclass(owner: ast.AST) -> bool:
    """`config` is vLLM's own decorator for one."""
    decorators = owner.decorator_list if isinstance(owner, ast.ClassDef) else ()
    calls = (node.func if isinstance(node, ast.Call) else node for node in decorators)
    return any(isinstance(name, ast.Name) and name.id in DATACLASS for name in calls)


def parameters_of(arguments: ast.arguments, skip: int) -> tuple[tuple[Parameter, ...], bool]:
    """skip: how many of the first are bound."""
    plain = [*arguments.posonlyargs, *arguments.args]
    without_default = len(plain) - len(arguments.defaults)
    parameters = [Parameter(item.arg, i < without_default) for i, item in enumerate(plain)]
    parameters += [
        Parameter(item.arg, default is None)
        for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return tuple(parameters[skip:]), arguments.kwarg is not None
