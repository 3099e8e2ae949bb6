"""The rules of the house hold here, and each of them finds what breaks it."""

import re
from pathlib import Path

import pytest
from support import house

ROOT = Path(__file__).parents[2]

# By rule: files that break it, and what is said of them.
BREACHES = {
    house.arrows: (
        {"kernels/policy.py": "from molehill.engine import hf"},
        "kernels/policy.py:1: imports engine.hf, expected kernels only",
    ),
    house.rooms_import_what_is_listed: (
        {"engine/hf/shapes.py": "from molehill.engine.formats import native"}
        | {"engine/formats/__init__.py": "", "engine/formats/native.py": ""},
        "engine/hf/shapes.py:1: imports engine.formats.native, expected engine/adapter, "
        "engine/system, kernels",
    ),
    house.third_parties_of_kernels: (
        {"kernels/cpu/build.py": "import os\nimport torch.nn, safetensors"},
        "kernels/cpu/build.py:2: imports safetensors, expected numpy, torch, triton only",
    ),
    house.vllm_in_two_rooms: (
        {"api/http/errors.py": "def f():\n    from vllm.exceptions import X"},
        "api/http/errors.py:2: imports vllm.exceptions, expected in engine.vllm and api.vllm only",
    ),
    house.adapters_know_no_server: (
        {"api/adapters/residency.py": "from molehill.api.sources import roots"},
        "api/adapters/residency.py:1: imports api.sources.roots, expected neither HTTP, vLLM nor "
        "other rooms of api",
    ),
    house.no_circle_of_modules: (
        {
            "engine/hf/__init__.py": "from molehill.engine.hf.shapes import X",
            "engine/hf/shapes.py": "from molehill.engine.hf import Y",
        },
        "engine.hf -> engine.hf.shapes -> engine.hf, expected no circle: "
        "engine/hf/__init__.py:1: imports engine.hf.shapes; "
        "engine/hf/shapes.py:1: imports engine.hf",
    ),
    house.no_circle_of_rooms: (
        {
            "api/app.py": "from molehill.api.sources.roots import X",
            "api/sources/roots.py": "from ..vllm import options",
            "api/vllm/options.py": "import molehill.api.app",
        },
        "api.app -> api.sources -> api.vllm -> api.app, expected no circle: "
        "api/app.py:1: imports api.sources.roots; api/sources/roots.py:1: imports "
        "api.vllm.options; api/vllm/options.py:1: imports api.app",
    ),
    house.packages_are_installed: (
        {"engine/new/model.py": "", "engine/new/__init__.py": ""},
        'pyproject.toml: tool.setuptools.package-dir: expected "molehill.engine.new" = '
        '"engine/new"',
    ),
    house.one_class_of_a_name: (
        {"api/sources/roots.py": "class Lock: ...", "engine/hf/shapes.py": "class Lock: ..."},
        "engine/hf/shapes.py:1: class Lock, expected no other than api/sources/roots.py:1",
    ),
    house.no_vague_name: (
        {"engine/hf/shapes.py": "def f(x):\n    own = x"},
        "engine/hf/shapes.py:2: own, expected what it holds or does",
    ),
    house.no_long_function: (
        {"engine/hf/shapes.py": "def f():\n" + "    pass\n" * 60},
        "engine/hf/shapes.py:1: f: found 61 lines, expected at most 60",
    ),
    house.no_long_file: (
        {"tests/data.py": "\n" * 451},
        "tests/data.py: found 451 lines, expected at most 450",
    ),
}


@pytest.fixture(scope="module")
def here():
    return house.House(ROOT)


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(here, rule):
    breaches = list(rule(here))
    assert not breaches, "\n".join(breaches)


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_a_breach_of_the_rule_is_named(tmp_path, rule):
    files, said = BREACHES[rule]
    modules = {
        "api/sources/roots.py": "import http",
        "api/sources/__init__.py": "",
        "api/vllm/hooks.py": "import vllm.exceptions\nfrom molehill.engine import hf\n"
        "from molehill.engine.hf import shapes",
        "api/vllm/__init__.py": "",
        "engine/hf/shapes.py": "import safetensors\nfrom molehill.kernels.policy import Policy",
        "engine/hf/__init__.py": "",
        "kernels/policy.py": "import torch, triton.language, dataclasses",
        "kernels/__init__.py": "",
    }
    folders = ("api/sources", "api/vllm", "engine/hf", "kernels")
    listed = {f"molehill.{folder.replace('/', '.')}": folder for folder in folders}
    settings = "\n".join(
        [
            "[tool.setuptools]",
            f"packages = {list(listed)}",
            "[tool.setuptools.package-dir]",
            *(f'"{name}" = "{folder}"' for name, folder in listed.items()),
        ]
    )
    (tmp_path / "pyproject.toml").write_text(settings)
    write(tmp_path, modules)
    assert list(rule(house.House(tmp_path))) == []
    write(tmp_path, files)
    assert said in list(rule(house.House(tmp_path)))


def test_the_architecture_document_lists_the_same_rooms_and_imports():
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("| room |")[2].partition("\n\n")[0]
    said = {}
    for row in table.splitlines()[2:]:
        rooms, _, imports = (cell.strip() for cell in row.strip("|").split("|"))
        for room in re.findall(r"`([\w/]+?)/?(?:\.py)?`", rooms):
            said[room.replace("/", ".")] = imports
    assert said == {room: house.expected_imports(room) for room in house.ROOMS}


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
