"""The command line: help, errors, and what is handed to vLLM."""

import contextlib
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.api_client import BASE, GOLDEN
from support.server import TINY, serve

from molehill.api.adapters.admission import AdmissionLimits
from molehill.api.adapters.store_lock import DirectoryLock, LockedError
from molehill.api.cli import main
from molehill.api.cli.serve import from_namespace, make_parser
from molehill.api.vllm import launcher, options
from molehill.api.vllm.launcher import LaunchError, allow_plugin
from molehill.engine.adapter.base_model import Limits

TINY_LLAMA = GOLDEN / "tiny-llama"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"molehill {version('molehill')}\n"


def test_help_shows_our_options_without_importing_vllm() -> None:
    code = (
        "import sys; from molehill.api.cli.main import main; main(['serve', '--help']); "
        "assert 'vllm' not in sys.modules and 'torch' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    for option in ("--adapter NAME=PATH", "--adapter-root DIR", "--max-adapter-rank N"):
        assert option in result.stdout


@pytest.mark.parametrize("argument", ["--version", "--help"])
def test_what_needs_no_command_waits_for_no_library(argument: str) -> None:
    code = (
        "import sys\nfrom molehill.api.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n"
        "    heavy = {'torch', 'vllm', 'transformers', 'fastapi', 'numpy'} & sys.modules.keys()\n"
        "    assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, argument], capture_output=True, check=True)


@pytest.mark.parametrize("name", list(main.COMMANDS))
def test_every_command_of_the_help_is_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    # Argparse ends the process itself, serve does not use its help.
    with contextlib.suppress(SystemExit):
        assert main.main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: molehill {name} ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "nonsense"], "found 'nonsense', expected NAME=PATH"),
        (["--adapter", "=x"], "expected NAME=PATH"),
        (["--adapter-lora-b-layout", "a=by_row"], "expected NAME= and one of rank_major"),
        (["--adapter-non-granular-after", "a=-1"], "expected NAME= and a whole number"),
        (["--adapter-non-granular-after", "3"], "expected NAME= and a whole number"),
        (["--adapter", "../x=/tmp"], "adapter name: found '../x'"),
        (["--adapter", "x=/no/such"], "found no directory at '/no/such'"),
        (["--adapter-root", "/no/such"], "found no directory at '/no/such'"),
        (["--max-adapter-rank", "0"], "expected a positive integer"),
        (["--max-adapter-bytes", "8GB"], "expected a positive integer"),
        (["--admin-api-key", " "], "found an empty key"),
        (["--allow-url-prefix", "file:///srv"], "expected a URL of one of https"),
        (["--allow-url-prefix", "models.example"], "expected a URL of one of https"),
        (["--max-adapters", "none"], "expected a positive integer"),
    ],
)
def test_bad_values_are_one_clear_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main.main(["serve", "m", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", list(launcher.UNSAFE_ENVIRONMENT))
def test_unsafe_settings_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "1")
    assert main.main(["serve", "m"]) == 2
    assert capsys.readouterr().err.startswith(f"molehill serve: {name} is set")


def test_samples_of_one_request_are_bounded_unless_the_user_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    # Set first, so that what the launcher writes is undone.
    monkeypatch.setenv("VLLM_PLUGINS", allow_plugin(None))
    monkeypatch.setenv("VLLM_MAX_N_SEQUENCES", "")
    monkeypatch.delenv("VLLM_MAX_N_SEQUENCES")
    monkeypatch.setattr(launcher, "run", lambda _: None)
    launcher.launch(options.Options(), [str(TINY_LLAMA)])
    assert SamplingParams(n=128).n == 128
    with pytest.raises(VLLMValidationError, match="128"):
        SamplingParams(n=129)
    monkeypatch.setenv("VLLM_MAX_N_SEQUENCES", "200")
    launcher.launch(options.Options(), [str(TINY_LLAMA)])
    assert SamplingParams(n=200).n == 200


def test_the_plugin_joins_those_that_load_anyway() -> None:
    unset = allow_plugin(None).split(",")
    assert unset[-1] == "molehill"
    # vLLM's own, which load as long as nobody sets VLLM_PLUGINS.
    assert "lora_filesystem_resolver" in unset
    assert allow_plugin("") == "molehill"
    assert allow_plugin("a,b") == "a,b,molehill"
    assert allow_plugin("molehill,a") == "molehill,a"


def parsed(*arguments: str) -> options.Options:
    return from_namespace(make_parser().parse_args(arguments))


def prepared(*arguments: str, ours: options.Options | None = None) -> Any:
    args = launcher.parse([str(TINY_LLAMA), *arguments])
    return launcher.prepare(args, ours or options.Options())


def test_vllm_gets_our_worker_and_defaults() -> None:
    args = vars(prepared("--port", "1234"))
    assert args["model"] == str(TINY_LLAMA)
    assert args["port"] == 1234
    assert args["worker_cls"] == "molehill.engine.vllm.worker.Worker"
    assert args["enable_lora"] is True
    assert args["max_loras"] == 32
    assert args["api_server_count"] is None


def test_the_kv_cache_of_a_cpu_has_a_size_unless_the_user_says_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert prepared().kv_cache_memory_bytes == 4 << 30
    assert prepared("--kv-cache-memory-bytes", "1000000").kv_cache_memory_bytes == 1000000
    assert prepared("--gpu-memory-utilization", "0.5").kv_cache_memory_bytes is None
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert prepared().kv_cache_memory_bytes is None


def test_the_admin_key_is_also_an_api_key_where_there_are_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = options.Options(admin_keys=("secret",))
    assert prepared(ours=ours).api_key is None
    assert prepared("--api-key", "a", ours=ours).api_key == ["a", "secret"]
    monkeypatch.setenv("VLLM_API_KEY", "b")
    assert prepared(ours=ours).api_key == ["b", "secret"]
    assert "secret" not in str(ours)


def test_the_admin_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def keys(*arguments: str) -> tuple[str, ...]:
        return parsed(*arguments).admin_keys

    assert keys() == ()
    monkeypatch.setenv("MOLEHILL_ADMIN_API_KEY", "hidden")
    assert keys() == ("hidden",)
    assert keys("--admin-api-key", "a", "--admin-api-key", "b") == ("a", "b")


def test_every_option_has_one_flag_and_what_nobody_says_is_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MOLEHILL_ADMIN_API_KEY", raising=False)
    assert parsed() == options.Options()
    set_by_flags = vars(make_parser().parse_args([])).keys()
    # The launcher makes them.
    made = {"merged_base", "process", "routed_experts"}
    expected = {field.name for field in fields(options.Options)} - made
    assert {name.partition(".")[0] for name in set_by_flags} == expected
    assert {f"limits.{field.name}" for field in fields(Limits)} < set_by_flags


def test_options_reach_their_fields(tmp_path: Path) -> None:
    given = parsed(
        *("--adapter", f"a={tmp_path}", "--adapter", f"b={tmp_path}"),
        *("--adapter-lora-b-layout", "a=rank_major", "--adapter-root", str(tmp_path)),
        *("--adapter-base-is-residual", "b", "--adapters-file", "wanted.yaml"),
        *("--adapter-non-granular-after", "a=0"),
        *("--adapter-store", "store", "--adapter-backend", "torch", "--adapter-memory", "7"),
        *("--adapter-host-memory", "0", "--no-adapter-probe", "--no-merge"),
        *("--merge-tolerance", "0.5", "--merge-into-base", "a", "--admin-api-key", "secret"),
        *("--allow-hub", "--allow-url-prefix", "https://models.example/x"),
        *("--no-adapter-pickles", "--watch-adapter-roots", "--max-adapters", "1"),
        *("--max-adapter-loads", "2", "--max-adapter-rank", "3", "--max-adapter-experts", "4"),
        *("--max-adapter-total-rank", "5", "--max-adapter-bytes", "6"),
        *("--max-request-mixes", "0"),
    )
    assert given == options.Options(
        adapters=(("a", tmp_path), ("b", tmp_path)),
        layouts=(("a", "rank_major"),),
        residuals=("b",),
        non_granular=(("a", 0),),
        roots=(tmp_path,),
        store=Path("store"),
        backend="torch",
        memory=7,
        host_memory=0,
        limits=Limits(rank=3, experts=4, total_rank=5, adapter_bytes=6, pickles=False),
        merge=False,
        merge_tolerance=0.5,
        merge_into_base="a",
        admission=AdmissionLimits(adapters=1, loads=2, mixes=0),
        hub=True,
        url_prefixes=("https://models.example/x",),
        watch=True,
        adapters_file="wanted.yaml",
        probe=False,
        admin_keys=("secret",),
    )


@pytest.mark.parametrize("place", ["", "ftp://host/file", "https:///file"])
def test_the_adapters_file_is_a_path_or_a_known_url(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed("--adapters-file", place)
    assert "argument --adapters-file: found" in capsys.readouterr().err


def test_a_signed_url_of_the_adapters_file_is_not_shown() -> None:
    signed = "https://bucket.example/adapters.yaml?signature=secret"
    given = parsed("--adapters-file", signed)
    assert given.adapters_file == signed
    assert "secret" not in repr(given)


def test_several_engines_have_one_api_process() -> None:
    args = prepared("--data-parallel-size", "2", "--data-parallel-size-local", "2")
    assert (args.data_parallel_size, args.api_server_count) == (2, None)


def test_several_processes_answer_where_they_are_asked_for() -> None:
    assert prepared("--api-server-count", "1").api_server_count is None
    assert prepared("--api-server-count", "4").api_server_count == 4


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data-parallel-size-local", "1"],
        ["--data-parallel-rank", "0"],
        ["--data-parallel-start-rank", "1"],
        ["--data-parallel-external-lb"],
        ["--data-parallel-hybrid-lb"],
        ["--data-parallel-multi-port-external-lb", "--data-parallel-size-local", "2"],
        ["--data-parallel-backend", "ray"],
        ["--headless"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_engines_that_this_server_would_not_ask_or_see_die_are_refused(
    arguments: list[str],
) -> None:
    with pytest.raises(LaunchError, match=f"molehill serve: {arguments[0]}"):
        prepared("--data-parallel-size", "2", *arguments)


def test_pickles_are_taken_unless_the_operator_says_no() -> None:
    def limits(*arguments: str) -> Limits:
        return parsed(*arguments).limits

    assert limits().pickles is True
    assert limits("--no-adapter-pickles").pickles is False


def test_there_must_be_a_root_to_watch() -> None:
    with pytest.raises(LaunchError, match="no --adapter-root"):
        prepared(ours=options.Options(watch=True))


def test_a_local_model_is_named_after_its_directory() -> None:
    assert prepared().served_model_name == [TINY_LLAMA.name, str(TINY_LLAMA)]
    assert prepared("--served-model-name", "mine").served_model_name == ["mine"]


def test_a_users_own_max_loras_holds() -> None:
    assert vars(prepared("--max-loras", "3"))["max_loras"] == 3


def test_limits_reach_the_workers_beside_other_settings() -> None:
    ours = options.Options(backend="torch", limits=Limits(rank=16))
    args = vars(prepared("--additional-config", '{"x": 1}', ours=ours))
    assert args["additional_config"]["x"] == 1
    assert args["additional_config"]["molehill"]["backend"] == "torch"
    assert args["additional_config"]["molehill"]["limits"]["rank"] == 16


def test_files_without_an_installation_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would serve without molehill's routes, and say nothing."""
    launcher.check_installed()
    elsewhere = [path for path in sys.path if not list(Path(path).glob("molehill*-info"))]
    monkeypatch.setattr(sys, "path", elsewhere)
    with pytest.raises(LaunchError, match=r"vllm\.general_plugins.*installed by pip"):
        launcher.check_installed()


def test_x_lora_is_an_option_of_one_worker() -> None:
    def config(*arguments: str, **ours: Any) -> Any:
        return vars(prepared(*arguments, ours=options.Options(**ours)))["additional_config"]

    assert parsed("--xlora").xlora is True
    assert config(xlora=True)["molehill"]["xlora"] is True
    assert config()["molehill"]["xlora"] is False
    for kind in ("tensor", "pipeline", "data"):
        with pytest.raises(LaunchError, match=f"--{kind}-parallel-size with --xlora"):
            config(f"--{kind}-parallel-size", "2", xlora=True)
    with pytest.raises(LaunchError, match="--merge-into-base with --xlora"):
        config(xlora=True, merge_into_base="a")


def test_lora_modules_become_start_adapters() -> None:
    path = GOLDEN / "cases" / "lora"
    args = vars(prepared("--lora-modules", f"a={path}", ours=options.Options((("b", path),))))
    assert args["lora_modules"] is None
    assert args["molehill"].adapters == (("b", path), ("a", path))


def test_vllms_default_model_is_not_served_by_accident() -> None:
    with pytest.raises(LaunchError, match="no MODEL given"):
        launcher.parse(["--port", "1234"])


def test_a_layout_is_of_a_start_adapter() -> None:
    path = GOLDEN / "cases" / "lora"
    ours = options.Options((("a", path),), layouts=(("b", "rank_major"),))
    with pytest.raises(LaunchError, match="found b=rank_major, expected an --adapter's name"):
        prepared(ours=ours)
    given = options.Options((("a", path),), layouts=(("a", "rank_major"),))
    assert vars(prepared(ours=given))["molehill"].layouts == (("a", "rank_major"),)


def test_a_residual_base_is_a_start_adapters() -> None:
    path = GOLDEN / "cases" / "lora"
    with pytest.raises(LaunchError, match="is-residual: found b, expected an --adapter's name"):
        prepared(ours=options.Options((("a", path),), residuals=("b",)))


def test_a_name_given_twice_is_refused() -> None:
    path = GOLDEN / "cases" / "lora"
    with pytest.raises(LaunchError, match="--adapter a: the name is given twice"):
        prepared("--lora-modules", f"a={path}", ours=options.Options((("a", path),)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--worker-cls", "mine"], "--worker-cls"),
        (["--no-enable-lora"], "--no-enable-lora"),
        (["--api-server-count", "0"], "--api-server-count 0: expected at least 1"),
        (["--api-server-count", "2", "--headless"], "--api-server-count with --headless"),
        (
            ["--api-server-count", "2", "--enable-server-load-tracking"],
            "--enable-server-load-tracking with --api-server-count",
        ),
        (
            ["--api-server-count", "2", "--enable-return-routed-experts"],
            "--enable-return-routed-experts with --api-server-count",
        ),
        (["--grpc"], "--grpc"),
        (["--lora-modules", "a=/no/such"], "found no directory"),
    ],
)
def test_what_molehill_cannot_serve_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        prepared(*arguments)


def test_a_store_that_another_server_uses_is_refused_before_the_engine_starts(
    tmp_path: Path,
) -> None:
    ours = options.Options(store=tmp_path)
    claim = DirectoryLock(tmp_path)
    with pytest.raises(LockedError, match=str(tmp_path)):
        prepared(ours=ours)
    # A node that only computes shares its server's store.
    prepared("--headless", ours=ours)
    claim.release()
    prepared(ours=ours)


def test_a_bad_start_adapter_ends_the_start_with_its_error(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{")
    log = tmp_path / "log"
    good = ("--adapter", f"good={GOLDEN / 'cases' / 'lora'}")
    arguments = [*TINY, *good, "--adapter", f"bad={folder}"]
    with (
        pytest.raises(RuntimeError, match="the server ended with 2"),
        serve(TINY_LLAMA, log, arguments, warm=True),
    ):
        pass
    lines = [line for line in log.read_text().splitlines() if line.startswith("molehill serve: ")]
    assert len(lines) == 1
    assert "adapter_config.json" in lines[0]
    assert "Traceback" not in log.read_text()
    assert BASE not in lines[0]


def test_kubernetes_arguments_are_vllms_and_end_within_the_grace_period() -> None:
    path = GOLDEN.parents[2] / "deploy" / "kubernetes" / "deployment.yaml"
    pod = yaml.safe_load(path.read_text())["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    _, rest = make_parser().parse_known_args(
        [arg for arg in container["args"][1:] if not arg.startswith("--adapter-root=")]
    )
    args = launcher.parse(rest)
    assert (args.model, args.host, args.port) == ("/models/base", "0.0.0.0", 8000)
    assert args.served_model_name == ["base"]
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert 0 < args.shutdown_timeout < pod["terminationGracePeriodSeconds"] - pause
