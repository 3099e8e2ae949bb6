"""`molehill bench`: its arithmetic, its table and its plot, by hand-made figures."""

import json
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from support.golden import TINY_LLAMA, Case

from molehill.benchmarks import bench, limits, results_table, shapes, workloads
from molehill.benchmarks.contestants import (
    MOLEHILL,
    PLAIN,
    PLAIN_BASE,
    VLLM_LORA,
    Mixtures,
    line_up,
    memory,
)
from molehill.benchmarks.limits import AdapterWork, Machine, StepWork
from molehill.benchmarks.results_table import SPEED, Sample, cells
from molehill.benchmarks.workloads import Timeline, Workload, latencies
from molehill.engine.adapter.model import Adapter
from molehill.engine.hf.shapes import base_model
from molehill.kernels.mixture import Experts, FfnMixture, LinearMixture
from molehill.kernels.policy import Constant, TopK

DECODE, PREFILL = Workload(4, 16, 12), Workload(2, 64, 1)


def pair(inputs: int, outputs: int, ranks: tuple[int, ...]) -> Experts:
    return Experts(torch.zeros(sum(ranks), inputs), torch.zeros(outputs, sum(ranks)), ranks)


def test_an_adapters_numbers_are_those_of_routers_of_routed_and_of_static_experts() -> None:
    sites = {
        "a": LinearMixture(pair(6, 4, (2,) * 4), TopK(2), torch.zeros(4, 6)),
        "b": LinearMixture(pair(6, 4, (3,)), Constant((1.0,))),
        "c": FfnMixture({"up_proj": pair(6, 10, (1,) * 2)}, TopK(1), torch.zeros(2, 6)),
    }
    work = AdapterWork.of(Adapter("mole", sites))
    assert work == AdapterWork(4 * 6 + 2 * 6, 8 * 10 + 2 * 16, 3 * 10, 3.0)


@pytest.mark.parametrize(("tokens", "touched"), [(1, 0.5), (3, 0.875)])
def test_a_step_reads_what_its_tokens_chose_and_multiplies_by_their_own(tokens, touched) -> None:
    work = AdapterWork(routers=10, routed=400, static=30, experts=8)
    step = work.step(tokens, chosen=4, itemsize=2)
    assert step.moved == pytest.approx(4 * 10 + 2 * (30 + touched * 400))
    assert step.done == pytest.approx(tokens * (10 + 30 + 200))


def test_a_limit_is_the_longer_of_reading_and_multiplying() -> None:
    adapter = AdapterWork(routers=0, routed=0, static=100, experts=1)
    base = StepWork(moved=1000, done=50)
    reading = Machine(bandwidth=100, rate=1e9)
    # 1,000 bytes of the base and twice 200 of two adapters.
    assert limits.speed_limits(reading, DECODE, base, [(adapter, 1)] * 2, 2) == (
        pytest.approx(4 / 14),
        pytest.approx(10 / 14),
    )
    # Of more adapters than prompts, one for each prompt.
    speed, ratio = limits.speed_limits(reading, DECODE, base, [(adapter, 1)] * 9, 2)
    assert (speed, ratio) == (pytest.approx(4 / 18), pytest.approx(10 / 18))
    multiplying = Machine(bandwidth=1e9, rate=100)
    speed, ratio = limits.speed_limits(multiplying, PREFILL, base, [(adapter, 1)], 2)
    assert speed == pytest.approx(128 / ((50 + 128 * 100) / 100))
    assert ratio == pytest.approx(50 / (50 + 128 * 100))


def test_a_step_of_the_base_is_its_linears_and_its_head() -> None:
    base, config = base_model(TINY_LLAMA), SimpleNamespace(hidden_size=64, vocab_size=300)
    numbers = sum(inputs * outputs for inputs, outputs in base.linears.values())
    head = 64 * 300
    assert limits.base_step(base, config, 2, DECODE) == StepWork(
        2 * (numbers + head), 4 * (numbers + head)
    )
    # The head is for each prompt's last token.
    assert limits.base_step(base, config, 2, PREFILL).done == 128 * numbers + 2 * head


def test_latencies_are_percentiles_over_all_requests() -> None:
    timelines = [Timeline(0.0, [0.1, 0.2, 0.4]), Timeline(1.0, [1.3, 1.4])]
    result = latencies(timelines)
    assert result["ttft_p50_ms"] == pytest.approx(200)
    assert result["ttft_p99_ms"] == pytest.approx(100 + 0.99 * 200)
    assert result["itl_p50_ms"] == pytest.approx(100)
    assert result["itl_p99_ms"] == pytest.approx(100 + 0.98 * 100)
    assert workloads.percentile([3.0], 99) == 3.0


SAMPLES = [
    *(Sample(PLAIN_BASE, DECODE.name, SPEED, i, value) for i, value in enumerate((100, 200, 150))),
    *(Sample("mole", DECODE.name, SPEED, i, value) for i, value in enumerate((80, 180, 90))),
    Sample(PLAIN_BASE, "2 requests/s", "ttft_p50_ms", 0, 20.0),
    Sample("mole", "2 requests/s", "ttft_p50_ms", 0, 25.0),
    # Alone in its repetition: no ratio.
    Sample("late", DECODE.name, SPEED, 7, 50.0),
]
LIMITS = {
    (PLAIN_BASE, DECODE.name): (400.0, 1.0),
    ("mole", DECODE.name): (360.0, 0.9),
}


def test_ratios_are_taken_within_a_repetition() -> None:
    base, mole, _, slower, late = cells(SAMPLES, PLAIN_BASE, LIMITS)
    assert (base.best, base.ratio, base.share) == (200, 1, 0.5)
    assert (mole.best, mole.ratio, mole.least, mole.most) == (180, 0.8, 0.6, 0.9)
    assert (mole.limit, mole.share) == (0.9, 0.5)
    assert (slower.best, slower.ratio, slower.limit) == (25, 0.8, None)
    assert (late.best, late.ratio) == (50, None)


def test_the_table_shows_ratio_and_limit_beside_each_speed() -> None:
    console = Console(width=120, record=True, file=StringIO())
    results_table.print_tables(cells(SAMPLES, PLAIN_BASE, LIMITS), ["[a] note"], console)
    text = console.export_text()
    row = next(line for line in text.splitlines() if "mole" in line)
    assert "180.0" in row
    assert "0.80 (0.90)" in text
    assert "TTFT p50" in text
    assert "[a] note" in text


def test_json_holds_samples_and_table(tmp_path) -> None:
    path = tmp_path / "bench.json"
    results_table.write_json(path, SAMPLES, cells(SAMPLES, PLAIN_BASE, {}), {"model": "m"})
    result = json.loads(path.read_text())
    assert result["model"] == "m"
    assert len(result["samples"]) == len(SAMPLES)
    assert result["table"][1]["ratio"] == 0.8


@pytest.mark.slow
def test_the_plot_is_a_picture(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the dev extra")
    path = tmp_path / "bench.png"
    assert results_table.plot(path, cells(SAMPLES, PLAIN_BASE, LIMITS), "a model")
    assert path.read_bytes().startswith(b"\x89PNG")


def mixtures() -> Mixtures:
    base = base_model(TINY_LLAMA)
    return Mixtures(base, 2, 4, 1.0, dict.fromkeys(base.linears, 1.0))


def test_the_contestants_without_adapters_are_synthetic(tmp_path) -> None:
    result = line_up([], mixtures, many=3, vs_vllm=True, folder=tmp_path)
    assert [(case.name, case.engine, len(case.paths)) for case in result] == [
        (PLAIN_BASE, PLAIN, 0),
        ("molehill, base", MOLEHILL, 0),
        ("DynMoLE 2 x r 4", MOLEHILL, 1),
        ("MixLoRA top-2 of 2 x r 4", MOLEHILL, 1),
        ("3 x DynMoLE 2 x r 4", MOLEHILL, 3),
        ("molehill, LoRA r 8", MOLEHILL, 1),
        ("molehill, LoRA r 8, 3 of them", MOLEHILL, 3),
        ("vLLM's LoRA r 8", VLLM_LORA, 1),
        ("vLLM's LoRA r 8, 3 of them", VLLM_LORA, 3),
    ]
    one = result[2].work
    assert result[4].work == one
    assert memory([result[2]], MOLEHILL, 2) - memory(result[:2], MOLEHILL, 2) == int(
        1.25 * (2 * one.routed + 4 * one.routers)
    )


def test_the_contestants_are_the_users_adapters(tmp_path) -> None:
    paths = [Case("mola").path, Case("lora").path]
    result = line_up(paths, mixtures, many=1, vs_vllm=False, folder=tmp_path)
    assert [case.name for case in result[2:]] == ["mola", "lora"]
    assert [case.routes for case in result[2:]] == [True, False]
    assert not list(tmp_path.iterdir())


def test_dummy_shapes_are_models_and_their_routers_see_what_they_read(tmp_path) -> None:
    for name in shapes.SHAPES:
        base = base_model(shapes.write(name, tmp_path))
        sizes = shapes.dummy_input_sizes(dict(base.linears))
        assert sizes.keys() == base.linears.keys()
        assert all(size > 0 for size in sizes.values())
    # 8.03 billion parameters less the embeddings.
    base = base_model(tmp_path / "model-8b")
    assert sum(i * o for i, o in base.linears.values()) == 6_979_321_856


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "found neither of MODEL and --shape"),
        (["somewhere", "--shape", "8b"], "found both of MODEL and --shape"),
        (["somewhere", "--batches", "1,x"], "--batches: found 'x', expected a positive integer"),
        (["somewhere", "--prefill", "4"], "--prefill: found '', expected a positive integer"),
        (["somewhere", "--tokens", "1"], "--tokens: found '1', expected at least 2"),
    ],
)
def test_a_run_needs_one_model_and_numbers_that_are_some(arguments, said, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert said in capsys.readouterr().err


def test_an_adapter_that_cannot_be_read_ends_the_run_before_any_engine(tmp_path, capsys) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    code = bench.main([str(TINY_LLAMA), "--adapter", str(tmp_path)])
    assert code == bench.USER_ERROR
    assert "adapter_config.json" in capsys.readouterr().err
