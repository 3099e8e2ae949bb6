"""Every alert fires when it should and not before, by promtool's own evaluation of the rules."""

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

RULES = Path(__file__).parents[3] / "deploy" / "prometheus-alerts.yml"


@dataclass(frozen=True)
class Case:
    """What fires an alert.

    series: samples a minute apart, by name and labels, in promtool's notation; each is of the
    server `here`, and of `there` with the values of `calm`, which fires nothing. quiet, fires:
    minutes. summary: as people read it. labels: of the alert beside severity, job and instance.
    """

    series: dict[str, str]
    calm: dict[str, str]
    quiet: int
    fires: int
    summary: str
    labels: dict[str, str] = field(default_factory=dict)


def steady(step: float) -> str:
    """A counter that grows by `step` each minute."""
    return f"0+{step:g}x90"


OP_SECONDS = 'molehill_adapter_op_seconds_total{adapter="a"}'
DECISIONS = 'molehill_router_decisions_total{adapter="a"}'
SOFT = 'molehill_soft_routed_total{adapter="a"}'
ENTROPY = 'molehill_router_entropy_sum{adapter="a"}'
ENTROPIES = 'molehill_router_entropy_count{adapter="a"}'
IMBALANCE = 'molehill_expert_imbalance{adapter="a"}'
EXPERTS = [f'molehill_expert_tokens_total{{adapter="a",expert="{expert}"}}' for expert in range(4)]
REFUSED = 'molehill_adapter_loads_refused_total{kind="wrong_shape"}'
LOADS = {le: f'molehill_adapter_load_seconds_bucket{{le="{le}"}}' for le in ("30", "60", "+Inf")}
HITS = {
    tier: f'molehill_adapter_cache_hits_total{{adapter="a",tier="{tier}"}}'
    for tier in ("worker", "disk")
}
WAITS = {
    le: f'molehill_adapter_wait_seconds_bucket{{tier="disk",le="{le}"}}'
    for le in ("5", "10", "+Inf")
}
FAILED = 'molehill_adapters{state="failed"}'
UNWANTED = 'molehill_desired_adapters{state="failed"}'
AGE = "molehill_adapters_file_age_seconds"
UNFREED = "molehill_adapter_free_failures_total"
UNWRITTEN = "molehill_manifest_write_failures_total"
OLD = "molehill_worker_figures_age_seconds"
FAULTS = 'molehill_task_failures_total{task="watch"}'
# One event in the tenth minute.
ONCE, NEVER = "0x9 1x80", "0x90"

CASES = {
    "MolehillAdapterOpsDominateSteps": Case(
        {OP_SECONDS: steady(36), "molehill_step_seconds_total": steady(60)},
        {OP_SECONDS: steady(24), "molehill_step_seconds_total": steady(60)},
        14,
        20,
        "Adapter ops take 60% of the steps on here",
    ),
    "MolehillSoftFallback": Case(
        {SOFT: steady(60), DECISIONS: steady(100)},
        {SOFT: steady(40), DECISIONS: steady(100)},
        14,
        20,
        "Adapter a falls back to all experts in 60% of its decisions",
        {"adapter": "a"},
    ),
    "MolehillRouterUndecided": Case(
        {ENTROPY: steady(99), ENTROPIES: steady(100)},
        {ENTROPY: steady(50), ENTROPIES: steady(100)},
        29,
        35,
        "The routers of a hardly tell experts apart (entropy 0.99)",
        {"adapter": "a"},
    ),
    "MolehillExpertsUnused": Case(
        {IMBALANCE: "3x90", **dict.fromkeys(EXPERTS, steady(1))},
        {IMBALANCE: "2x90", **dict.fromkeys(EXPERTS, steady(1))},
        29,
        31,
        "Few experts of a do nearly all of the work (3 times the mean)",
        {"adapter": "a"},
    ),
    "MolehillLoadsRefused": Case(
        {REFUSED: "0x9 8x80"},
        {REFUSED: "0x9 4x80"},
        9,
        14,
        "8 loads refused with wrong_shape on here in 15 minutes",
        {"kind": "wrong_shape"},
    ),
    "MolehillLoadsSlow": Case(
        {LOADS["30"]: steady(0), LOADS["60"]: steady(10), LOADS["+Inf"]: steady(10)},
        {LOADS["30"]: steady(10), LOADS["60"]: steady(10), LOADS["+Inf"]: steady(10)},
        14,
        20,
        "One load in ten takes over 57s on here",
    ),
    "MolehillAdaptersThrash": Case(
        {HITS["worker"]: steady(70), HITS["disk"]: steady(30)},
        {HITS["worker"]: steady(90), HITS["disk"]: steady(10)},
        14,
        20,
        "30% of the requests on here wait for their adapter to be brought in",
    ),
    "MolehillColdStartsSlow": Case(
        {WAITS["5"]: steady(90), WAITS["10"]: steady(100), WAITS["+Inf"]: steady(100)},
        {WAITS["5"]: steady(100), WAITS["10"]: steady(100), WAITS["+Inf"]: steady(100)},
        14,
        20,
        "One cold start in a hundred takes over 9.5s on here",
    ),
    "MolehillReplicasDiffer": Case(
        {'molehill_desired_adapters{state="converged"}': "5x9 3x80"},
        {'molehill_desired_adapters{state="converged"}': "5x90"},
        20,
        26,
        "A replica of molehill serves 2 adapters of the file less than another",
    ),
    "MolehillAdaptersFailed": Case(
        {FAILED: "0x9 2x80"},
        {FAILED: NEVER},
        18,
        21,
        "2 adapters that here should serve do not serve",
        {"state": "failed"},
    ),
    "MolehillDesiredFailed": Case(
        {UNWANTED: "0x9 2x80"},
        {UNWANTED: NEVER},
        18,
        21,
        "2 entries of the adapters file are not served as they say on here",
        {"state": "failed"},
    ),
    "MolehillAdaptersFileUnread": Case(
        {AGE: "0x9 180x80"},
        {AGE: "10x90"},
        13,
        16,
        "here has not read its adapters file for 3m 0s",
    ),
    "MolehillAdapterNotFreed": Case(
        {UNFREED: ONCE},
        {UNFREED: NEVER},
        9,
        11,
        "The workers of here did not give 1 adapters back",
    ),
    "MolehillManifestNotWritten": Case(
        {UNWRITTEN: ONCE},
        {UNWRITTEN: NEVER},
        9,
        11,
        "A restart of here would not know its last changes",
    ),
    "MolehillFiguresStale": Case(
        {OLD: "0x9 180x80"},
        {OLD: "10x90"},
        13,
        16,
        "The adapter figures of here are 3m 0s old",
    ),
    "MolehillTaskFailed": Case(
        {FAULTS: ONCE},
        {FAULTS: NEVER},
        9,
        11,
        "1 faults in the background of here",
    ),
}
# Of a job, not of one server.
OF_JOBS = {"MolehillReplicasDiffer"}


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    return {rule["alert"]: rule for rule in rules if "alert" in rule}


def of_server(series: str, instance: str) -> str:
    name, _, labels = series.partition("{")
    return f'{name}{{job="molehill",instance="{instance}",{labels.rstrip("}")}}}'


def as_promtool_has_it(alert: str, case: Case) -> dict[str, Any]:
    rule = alerts()[alert]
    server = {} if alert in OF_JOBS else {"instance": "here"}
    labels = {**rule["labels"], "job": "molehill", **server, **case.labels}
    annotations = {"summary": case.summary, "description": rule["annotations"]["description"]}
    fired = [{"exp_labels": labels, "exp_annotations": annotations}]
    return {
        "name": alert,
        "interval": "1m",
        "input_series": [
            {"series": of_server(series, instance), "values": values}
            for instance, samples in (("here", case.series), ("there", case.calm))
            for series, values in samples.items()
        ],
        "alert_rule_test": [
            {"eval_time": f"{minutes}m", "alertname": alert, "exp_alerts": expected}
            for minutes, expected in ((case.quiet, []), (case.fires, fired))
        ],
    }


def run(folder: Path, cases: dict[str, Case]) -> subprocess.CompletedProcess[str]:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    tests = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [as_promtool_has_it(alert, case) for alert, case in cases.items()],
    }
    path = folder / "alerts-test.yml"
    path.write_text(yaml.safe_dump(tests))
    return subprocess.run([promtool, "test", "rules", str(path)], capture_output=True, text=True)


def test_every_alert_has_a_case() -> None:
    assert CASES.keys() == alerts().keys()
    for alert, case in CASES.items():
        metrics = {series.partition("{")[0] for series in case.series}
        assert metrics == {series.partition("{")[0] for series in case.calm}, alert


@pytest.mark.slow
def test_alerts_fire_when_they_should_and_not_before(tmp_path: Path) -> None:
    done = run(tmp_path, CASES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_case_that_does_not_hold_fails(tmp_path: Path) -> None:
    alert = "MolehillAdaptersFailed"
    case = CASES[alert]
    late = Case(case.series, case.calm, case.fires, case.fires, case.summary, case.labels)
    done = run(tmp_path, {alert: late})
    assert done.returncode != 0
    assert re.search(rf"alertname: {alert}, time: {case.fires}m", done.stdout + done.stderr)
