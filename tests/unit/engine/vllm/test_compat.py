"""The start-up check of vLLM's version and seams."""

import ast
import logging
import shutil
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from molehill.api.vllm import check_sources
from molehill.api.vllm import compat as api
from molehill.engine.vllm import compat, seams
from molehill.engine.vllm.seam_sources import SourceTree
from molehill.engine.vllm.seams import Seam

ALL = (*compat.SEAMS, *api.SEAMS)
REPOSITORY = Path(__file__).parents[4]


@pytest.fixture(scope="module", autouse=True)
def parsed_once() -> Iterator[None]:
    """The tests read the same files again and again: of each text one tree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ast, "parse", cache(ast.parse))
        yield


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with the files of vLLM that the tables name, and those that re-export them."""
    root = compat.root()
    modules = {module for seam in ALL for module in seam.modules}
    modules |= {"vllm", "vllm.config.vllm", "vllm.config.model", "vllm.config.lora"}
    modules |= {"vllm.config.load", "vllm.config.parallel", "vllm.config.scheduler"}
    modules |= {"vllm.config.compilation", "vllm.distributed.communication_op"}
    modules |= {"vllm.distributed.utils", "vllm.v1.worker.worker_base"}
    modules |= {"vllm.v1.sample.ops.logprobs"}
    modules |= {"vllm.model_executor.layers.fused_moe.fused_moe_method_base"}
    for module in modules:
        path = root.joinpath(*module.split("."))
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                target = tmp_path / file.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
    return tmp_path


def edit(folder: Path, module: str, old: str, new: str) -> None:
    path = folder.joinpath(*module.split(".")).with_suffix(".py")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def faults(folder: Path, table: Iterable[Seam] = ALL) -> list[str]:
    return [text for _, text in SourceTree(folder).faults(table) if text is not None]


@pytest.mark.slow
@pytest.mark.parametrize("installed", ["0.31.2", "0.33.0", "1.0.0+cpu"])
def test_a_version_that_was_not_tested_warns_where_all_is_there(
    monkeypatch: Any, caplog: Any, installed: str
) -> None:
    """The files are those of the installed version."""
    monkeypatch.setattr(compat, "TESTED", ("0.9",))
    monkeypatch.setattr(compat, "version", lambda distribution: installed)
    with caplog.at_level(logging.WARNING):
        api.check_version()
        api.check_version()
    (record,) = caplog.records
    assert f"vLLM {installed} is installed" in record.message
    assert "tested with 0.9" in record.message


def test_a_tested_version_is_taken_without_a_word(monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(compat, "version", lambda distribution: f"{compat.TESTED[-1]}.7+cpu")
    monkeypatch.setattr(compat, "root", lambda: Path("nowhere"))
    with caplog.at_level(logging.WARNING):
        api.check_version()
    assert not caplog.records


def test_a_version_whose_seams_changed_is_refused_with_their_names(
    monkeypatch: Any, copy: Path
) -> None:
    edit(
        copy, "vllm.model_executor.layers.linear", "self.quant_method.apply(", "self.method.apply("
    )
    edit(copy, "vllm.lora.request", "lora_path", "lora_folder")
    monkeypatch.setattr(compat, "root", lambda: copy)
    monkeypatch.setattr(compat, "version", lambda distribution: "0.99.0")
    with pytest.raises(RuntimeError, match=r"vLLM 0\.99\.0 is installed") as refused:
        api.check_version()
    assert "ColumnParallelLinear.forward has no self.quant_method.apply" in str(refused.value)
    assert "LoRARequest takes" in str(refused.value)


def test_an_absent_vllm_is_told(monkeypatch: Any) -> None:
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="no package `vllm`"):
        compat.root()


def test_the_installed_vllm_has_every_seam() -> None:
    compat.check_version()
    compat.check_seams()


def test_the_files_of_the_installed_vllm_have_every_seam() -> None:
    assert faults(compat.root()) == []


@pytest.mark.slow
def test_the_installed_vllm_has_every_seam_of_the_server() -> None:
    """Imports vLLM's server."""
    api.check_launcher()
    api.check_server()


@pytest.mark.parametrize(
    ("module", "old", "new", "expected"),
    [
        (
            "vllm.distributed.device_communicators.shm_broadcast",
            "def wait(self, timeout_ms:",
            "def wait(self, timeout:",
            "SpinCondition.wait takes ['self', 'timeout']",
        ),
        (
            "vllm.distributed.device_communicators.shm_broadcast",
            "class SpinCondition",
            "class SpinWait",
            "SpinCondition.wait takes None",
        ),
        (
            "vllm.v1.worker.lora_model_runner_mixin",
            "self.lora_manager.pin_adapter(",
            "self.lora_manager.pin(",
            "vllm.v1.worker.lora_model_runner_mixin calls lora_manager.pin",
        ),
        (
            "vllm.v1.core.kv_cache_utils",
            "lora_request.lora_path",
            "lora_request.lora_int_id",
            "_gen_lora_extra_hash_keys has no lora_request.lora_path",
        ),
        (
            "vllm.config.vllm",
            "additional_config",
            "extra_config",
            "VllmConfig has no additional_config",
        ),
        (
            "vllm.model_executor.layers.linear",
            "num_kv_head_replicas",
            "kv_replicas",
            "QKVParallelLinear has no num_kv_head_replicas",
        ),
        (
            "vllm.transformers_utils.config",
            "    code_revision: str | None = None,\n",
            "",
            "get_config takes",
        ),
        (
            "vllm.entrypoints.launchers.launcher",
            "def setup_server(args, *, reuse_port: bool)",
            "def setup_server(args, config, *, reuse_port: bool)",
            "setup_server takes ['args', 'config', 'reuse_port'], molehill gives",
        ),
        ("vllm.envs", "VLLM_CACHE_ROOT", "VLLM_CACHES", "vllm.envs has no VLLM_CACHE_ROOT"),
        (
            "vllm.exceptions",
            "class GracefulHTTPError",
            "class PoliteHTTPError",
            "vLLM has no vllm.exceptions.GracefulHTTPError",
        ),
    ],
)
def test_a_seam_that_changed_in_the_files_is_named(
    copy: Path, module: str, old: str, new: str, expected: str
) -> None:
    edit(copy, module, old, new)
    suspects = [seam for seam in ALL if str(seam) in expected]
    assert any(expected in text for text in faults(copy, suspects))


def test_what_moved_is_found_in_either_place(copy: Path) -> None:
    """As 0.33 has it."""
    new = copy / "vllm" / "entrypoints" / "common" / "cli_args.py"
    new.parent.mkdir(exist_ok=True)
    (copy / "vllm" / "entrypoints" / "launchers" / "cli_args.py").rename(new)
    moved = [seam for seam in ALL if seam.module == "vllm.entrypoints.common.cli_args"]
    assert len(moved) == 3
    assert faults(copy, moved) == []
    new.unlink()
    assert len(faults(copy, moved)) == 3


@pytest.mark.slow
def test_a_maintainer_sees_every_seam(copy: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert check_sources.main([str(copy)]) == 0
    assert f"{len(ALL)} seams, 0 of them changed" in capsys.readouterr().out
    wheel = shutil.make_archive(str(copy / "wheel"), "zip", copy, "vllm")
    edit(copy, "vllm.lora.request", "lora_path", "lora_folder")
    assert check_sources.main([str(copy)]) == 1
    assert "LoRARequest takes" in capsys.readouterr().out
    assert check_sources.main([wheel]) == 0
    with pytest.raises(SystemExit):
        check_sources.main([str(copy / "vllm")])
    assert "found no vllm/__init__.py" in capsys.readouterr().err


def imports() -> Iterator[tuple[Path, str, str]]:
    """(file, module, name) of what the sources import from vLLM; an empty name for a module."""
    for room in ("engine", "api", "kernels"):
        for file in sorted((REPOSITORY / room).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    yield from ((file, alias.name, "") for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module:
                    yield from ((file, node.module, alias.name) for alias in node.names)


@pytest.mark.slow
def test_all_that_is_imported_from_vllm_is_a_seam() -> None:
    known = {(module, seam.name.split(".")[0]) for seam in ALL for module in seam.modules}
    result = [entry for entry in imports() if entry[1].split(".")[0] == "vllm"]
    assert len(result) > 50
    for file, module, name in result:
        # A module of its own: `from vllm import envs`.
        as_module = any(f"{module}.{name}" == place for place, _ in known)
        assert (module, name) in known or as_module, f"{file}: {module}.{name} is in no table"


@pytest.mark.parametrize("seam", ALL, ids=lambda seam: f"{seam.module}.{seam.name}")
def test_a_seam_says_who_uses_it_and_what_for(seam: Seam) -> None:
    assert (REPOSITORY / seam.user).is_file()
    assert seam.why


def test_a_seam_that_changed_is_named(monkeypatch: Any) -> None:
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    def load_lora_model(self: Any, model: Any) -> None: ...

    monkeypatch.setattr(LoRAModelRunnerMixin, "load_lora_model", load_lora_model)
    with pytest.raises(RuntimeError, match="load_lora_model"):
        compat.check_seams()


def test_a_method_that_is_gone_is_named(monkeypatch: Any) -> None:
    from vllm.model_executor.layers.linear import LinearMethodBase

    monkeypatch.delattr(LinearMethodBase, "apply")
    with pytest.raises(RuntimeError, match=r"LinearMethodBase\.apply takes"):
        compat.check_seams()


def test_a_field_that_is_gone_is_named(monkeypatch: Any) -> None:
    from vllm.lora.layers.utils import LoRAMapping

    monkeypatch.setattr(LoRAMapping, "__annotations__", {"type": Any})
    with pytest.raises(RuntimeError, match="LoRAMapping has no index_mapping"):
        compat.check_seams()


@pytest.mark.slow
def test_an_argument_that_is_gone_is_named(monkeypatch: Any) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    def generate(self: Any, prompt: Any, sampling_params: Any, request_id: str) -> None: ...

    monkeypatch.setattr(AsyncLLM, "generate", generate)
    with pytest.raises(RuntimeError, match=r"AsyncLLM\.generate takes .*lora_request.*leased_ca"):
        api.check_server()


def test_what_is_loaded_by_its_seam_is_named_where_it_is_gone() -> None:
    gone = Seam("vllm.lora.request", "LoRAQuery", "tests", "a test", before=("vllm.lora.query",))
    with pytest.raises(RuntimeError, match=r"vLLM has no vllm\.lora\.request\.LoRAQuery"):
        seams.load(gone)
    assert find_spec("vllm.lora.request") is not None
