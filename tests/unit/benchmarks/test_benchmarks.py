"""The kernel benchmark: all contestants do the same sums, the floor is right, the script runs."""

import csv
import math
import time
from types import SimpleNamespace

import pytest
import torch

from molehill.benchmarks import kernels, race, report
from molehill.benchmarks.arms import MixtureArm, VllmArm
from molehill.benchmarks.floor import work
from molehill.benchmarks.workload import LINEARS, Point, make_inputs, make_layers
from molehill.kernels import reference
from molehill.kernels.cpu import CpuBackend
from molehill.kernels.mixture import LinearMixture
from molehill.kernels.policy import Constant, Soft, TopK
from molehill.kernels.pytorch.backend import TorchBackend

COLUMNS = [
    "sweep",
    "op",
    "tokens",
    "experts",
    "rank",
    "policy",
    "adapters",
    "chosen",
    "cpp_us",
    "cpp_median_us",
    "torch_us",
    "torch_median_us",
    "vllm_us",
    "vllm_median_us",
    "floor_us",
    "floor_percent",
    "bound",
    "moved",
    "done",
    "bandwidth",
    "rate",
    "threads",
]
TIMED = ("cpp", "torch", "vllm")
# in + out of the seven projections of a SmolLM2-135M layer.
WIDTHS = (576 + 576) + 2 * (576 + 192) + (576 + 576) + 3 * (576 + 1536)
MIXTURES = {"cpp": CpuBackend, "torch": TorchBackend}
NO_VLLM = "vLLM is an extra"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def outputs_of(arm, point, inputs):
    with torch.inference_mode():
        arm.prepare(point, inputs)(0)
    return {name: out.float() for name, out in arm.outputs.items()}


def defined(layer, inputs):
    """What plain LoRAs add, by the formula and in float32."""
    result = {}
    for name, pieces in layer.linears.items():
        x = inputs[LINEARS[name][0]]
        parts = [
            reference.linear_mixture(
                x,
                torch.zeros(p.experts.b.shape[0], x.shape[1]),
                None,
                LinearMixture(p.experts, p.policy, p.router),
            )[0]
            for p in pieces
        ]
        result[name] = torch.cat(parts, dim=1)
    return result


def assert_near(actual, expected):
    """Within bfloat16's rounding: that of the shrunk row, of the weights, of the result."""
    assert expected.abs().max() > 0.01
    assert (actual - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("arm", TIMED)
def test_contestants_compute_the_same_plain_lora(arm):
    point = Point(tokens=5, experts=1, rank=64, policy=Constant((1.0,)), adapters=2)
    layers, inputs = make_layers(point, 1), make_inputs(point.tokens)
    if arm == "vllm":
        pytest.importorskip("vllm", reason=NO_VLLM)
        contestant: VllmArm | MixtureArm = VllmArm(layers, point.adapters)
    else:
        contestant = MixtureArm(MIXTURES[arm](), layers, point.adapters)
    result, expected = outputs_of(contestant, point, inputs), defined(layers[0], inputs)
    assert list(result) == list(LINEARS)
    for name, out in result.items():
        assert_near(out, expected[name])


def test_backends_compute_the_same_ffn_mixture():
    point = Point(op="ffn", tokens=5, policy=TopK(2))
    layers, inputs = make_layers(point, 1), make_inputs(point.tokens)
    arms = [MixtureArm(backend(), layers, 1) for backend in MIXTURES.values()]
    cpp, plain = (outputs_of(arm, point, inputs)["down"] for arm in arms)
    assert cpp.abs().max() > 0.001
    assert (cpp - plain).abs().max() <= 0.02 * plain.abs().max()


@pytest.mark.parametrize(("adapters", "tokens"), [(1, 3), (3, 3), (2, 8)])
def test_floor_of_soft_routing_reads_every_expert_of_every_adapter(adapters, tokens):
    point = Point("o", tokens, experts=4, rank=2, policy=Soft(), adapters=adapters)
    needed = work(make_layers(point, 2), point, make_inputs(tokens))
    assert needed.moved == adapters * (4 * 4 * 576 + 2 * 4 * 2 * (576 + 576))
    assert needed.done == tokens * (4 * 576 + 4 * 2 * (576 + 576))
    assert needed.resident == 2 * needed.moved
    assert needed.chosen == 4


def test_floor_of_top_1_reads_the_chosen_experts_of_an_ffn():
    point = Point("ffn", 1, experts=4, rank=2, policy=TopK(1))
    needed = work(make_layers(point, 1), point, make_inputs(1))
    expert = 2 * 3 * (576 + 1536)
    assert (needed.moved, needed.done) == (4 * 4 * 576 + 2 * expert, 4 * 576 + expert)
    reading = needed.floor(SimpleNamespace(bandwidth=lambda size: 1e6, rate=1e9))
    assert reading == (pytest.approx(needed.moved / 1e6), "bytes")
    multiplying = needed.floor(SimpleNamespace(bandwidth=lambda size: 1e9, rate=1e6))
    assert multiplying == (pytest.approx(needed.done / 1e6), "operations")


def test_a_contestant_over_the_limit_is_not_timed():
    runs = {"slow": lambda layer: time.sleep(0.06), "fast": lambda layer: time.sleep(0.002)}
    timings = race.race(runs, depth=2, budget=0, limit=0.05)
    assert timings["slow"] is None
    assert 0.002 <= timings["fast"].best <= timings["fast"].median


def test_a_turn_goes_through_all_layers():
    layers = []
    race.race({"only": layers.append}, depth=3, budget=0)
    assert layers == [i % 3 for i in range(2 + 3 * race.LEAST_TURNS)]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "kernels.csv"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine several would wait for each other
    kernels.main(["--quick", "--sweeps", "policy", "--seconds", "0", "--csv", str(path)])
    torch.set_num_threads(threads)
    return path


@pytest.mark.slow
def test_script_writes_the_promised_columns_and_sane_values(table):
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert [row["policy"] for row in rows] == ["Constant", "DynMoLE"]
    for row in rows:
        for arm in TIMED:
            if row[f"{arm}_us"]:
                assert 0 < float(row[f"{arm}_us"]) <= float(row[f"{arm}_median_us"])
        assert row["cpp_us"]
        assert row["torch_us"]
        cpp, floor = float(row["cpp_us"]), float(row["floor_us"])
        assert math.isclose(float(row["floor_percent"]), 100 * floor / cpp, abs_tol=0.2)
        reading = int(row["moved"]) / float(row["bandwidth"]) / 1e3
        multiplying = int(row["done"]) / float(row["rate"]) / 1e3
        assert math.isclose(floor, max(reading, multiplying), rel_tol=0.02)
    plain, dynmole = rows
    assert (float(plain["chosen"]), int(plain["moved"])) == (1, 2 * 64 * WIDTHS)
    assert int(plain["done"]) == 32 * 64 * WIDTHS
    assert 1 <= float(dynmole["chosen"]) <= 8


@pytest.mark.slow
def test_script_times_vllms_own_lora_where_it_is_installed(table):
    pytest.importorskip("vllm", reason=NO_VLLM)
    with table.open(newline="") as file:
        assert all(float(row["vllm_us"]) > 0 for row in csv.DictReader(file))


@pytest.mark.slow
def test_plot_has_a_panel_per_sweep(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in the dev extra")
    row = dict.fromkeys(COLUMNS, 1.0) | {"sweep": "rank", "op": "layer", "policy": "DynMoLE"}
    rows = [report.Row(**row | {"rank": rank, "vllm_us": None}) for rank in (2, 4)]
    report.plot(rows, tmp_path / "one.png")
    policies = [report.Row(**row | {"sweep": "policy"})]
    report.plot([*rows, *policies], tmp_path / "two.png")
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert one.startswith(b"\x89PNG")
    # The width in the header: a second panel beside the first.
    width = [int.from_bytes(png[16:20], "big") for png in (one, two)]
    assert width[1] > 1.5 * width[0]
