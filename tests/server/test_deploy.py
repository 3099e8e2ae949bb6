"""The Grafana dashboards and the Prometheus rules against a real server's metrics."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from support.api_client import TESTS, Api

DEPLOY = TESTS.parent / "deploy"
RULES = DEPLOY / "prometheus-alerts.yml"
BOARDS = {name: DEPLOY / "grafana" / f"{name}.json" for name in ("server", "fleet")}
# What Prometheus itself puts on every series.
TARGET_LABELS = {"job", "instance"}


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def board(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(BOARDS[name].read_text())
    return result


def board_expressions(name: str) -> list[str]:
    shown = board(name)
    panels = [target["expr"] for panel in shown["panels"] for target in panel.get("targets", ())]
    queries = [entry["definition"] for entry in shown["templating"]["list"][1:]]
    selectors = [re.fullmatch(r"label_values\((.+), \w+\)", query)[1] for query in queries]
    return [*panels, *selectors]


def expressions() -> list[str]:
    shown = [text for name in BOARDS for text in board_expressions(name)]
    return [rule["expr"] for rule in rules()] + list(dict.fromkeys(shown))


def parse(expression: str) -> Any:
    """The syntax tree; raises ValueError for what is no PromQL, types included."""
    parser = pytest.importorskip("promql_parser", reason="promql-parser is not installed")
    return parser.parse(expression.replace("$__rate_interval", "5m"))


def selectors(node: Any) -> Iterator[Any]:
    """Every vector selector of a tree."""
    if type(node).__name__ == "VectorSelector":
        yield node
        return
    for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
        child = getattr(node, name, None)
        if child is not None:
            yield from selectors(child)
    for argument in getattr(node, "args", None) or ():
        yield from selectors(argument)


@pytest.fixture(scope="module")
def labels(api: Api) -> dict[str, set[str]]:
    """Labels by sample name, of a server that has served an adapter and refused one."""
    assert api.load("shown", "dynmole-soft").status_code == 200
    api.complete("shown", [5, 6, 7], 2)
    assert api.load("refused", "no-such-directory").status_code == 404
    result: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(api.http.get("/metrics").text):
        for sample in family.samples:
            result.setdefault(sample.name, set()).update(sample.labels)
    assert api.unload("shown").status_code == 200
    for rule in rules():
        if "record" in rule:
            result[rule["record"]] = grouping(rule["expr"])
    return result


def grouping(expression: str) -> set[str]:
    """Labels that a recorded series keeps: those that every `by` of its expression names."""
    groups = re.findall(r"by \(([^)]*)\)", expression)
    return set.intersection(*({label.strip() for label in group.split(",")} for group in groups))


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_is_promql_on_real_series(
    labels: dict[str, set[str]], expression: str
) -> None:
    result = list(selectors(parse(expression)))
    assert result
    for selector in result:
        assert selector.name in labels
        matched = {matcher.name for matcher in selector.matchers.matchers}
        assert matched <= labels[selector.name] | TARGET_LABELS
    for aggregated in re.findall(r"by \(([^)]*)\)", expression):
        kept = {label.strip() for label in aggregated.split(",")}
        assert kept <= {"le"} | TARGET_LABELS | set.union(*(labels[one.name] for one in result))


def test_every_metric_of_molehill_is_on_a_servers_board(labels: dict[str, set[str]]) -> None:
    texts = board_expressions("server")
    shown = {selector.name for text in texts for selector in selectors(parse(text))}
    families = {re.sub(r"_(total|sum|count|bucket)$", "", name) for name in shown}
    served = {
        re.sub(r"_(total|sum|count|bucket)$", "", name)
        for name in labels
        if name.startswith("molehill_")
    }
    # The share since the start of the process; the board has the recent one.
    assert served - families == {"molehill_adapter_op_share"}


def test_alerts_say_what_and_whom() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len({rule["alert"] for rule in alerts}) == len(alerts) > 0
    for rule in alerts:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}
        named = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert named <= {"adapter", "instance", "job", "kind"}


def test_the_boards_are_two() -> None:
    assert len({board(name)["uid"] for name in BOARDS}) == len(BOARDS)


@pytest.mark.parametrize("name", BOARDS)
def test_panels_do_not_overlap_and_all_have_a_meaning(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    panels = board(name)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["type"] == "row" or panel["description"]


def test_docs_explain_every_metric_and_alert(labels: dict[str, set[str]]) -> None:
    text = (TESTS.parent / "docs" / "metrics.md").read_text()
    our_series = {name for name in labels if name.startswith("molehill_")}
    families = {re.sub(r"_(sum|count|bucket)$", "", name) for name in our_series}
    missing = {name for name in families if name not in text}
    assert missing == set()
    assert all(rule["alert"] in text for rule in rules() if "alert" in rule)
    named = set(re.findall(r"`(molehill_[a-z_]+)`", text))
    # Nothing is compiled for a CPU while it serves, and this server has one engine.
    elsewhere = {"molehill_kernel_compilations_total"} | {
        f"molehill_engine_{rest}"
        for rest in ("adapters", "adapter_resident_bytes", "adapter_tokens_total")
    }
    assert named <= our_series | families | elsewhere
