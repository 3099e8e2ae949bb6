"""What the documents name is there: files, modules and what is in them, links."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FOLDERS = "api|engine|kernels|benchmarks|tests|docs|deploy|demo"
PATH = re.compile(rf"(?<![\w/.:-])(?:{FOLDERS})/[\w*./-]*[\w*]")
NAME = re.compile(r"\bmolehill((?:\.\w+)+)")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
# Not modules: files, hosts and metrics of that name.
NO_MODULE = re.compile(r"\.(?:stamp|example|egg|md|json|lock|safetensors)\b")


def absent(document: Path) -> Iterator[str]:
    text = document.read_text()
    for path in PATH.findall(text):
        # Whole folders are written with a slash, some files without what they end with.
        if not any(ROOT.glob(path)) and not any(ROOT.glob(f"{path}.*")):
            yield path
    for name in NAME.findall(text):
        if NO_MODULE.match(name) is None and not is_there(name[1:].split(".")):
            yield f"molehill{name}"
    for link in LINK.findall(text):
        if not (document.parent / link).exists():
            yield link


def is_there(parts: list[str]) -> bool:
    """Whether a name is a package or a module, or is defined or imported in one."""
    path = ROOT
    for number, part in enumerate(parts):
        if (path / part).is_dir():
            path = path / part
            continue
        module = path / f"{part}.py"
        rest = parts[number:]
        if module.is_file():
            rest = rest[1:]
        else:
            module = path / "__init__.py"
        if not rest:
            return True
        return module.is_file() and re.search(rf"\b{rest[0]}\b", module.read_text()) is not None
    return path != ROOT


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_what_is_there(document: Path) -> None:
    assert list(absent(document)) == []


def test_what_is_not_there_is_found(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text(
        "`api/nowhere.py`, `engine/vllm/`, [a link](nothing.md), `molehill.engine.vllm.nothing`, "
        "`molehill.engine.formats.read`, `molehill.engine.formats.no_such_name`"
    )
    assert list(absent(document)) == [
        "api/nowhere.py",
        "molehill.engine.vllm.nothing",
        "molehill.engine.formats.no_such_name",
        "nothing.md",
    ]
