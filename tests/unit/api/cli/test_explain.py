"""`molehill explain` on Transformers: numbers against the golden cases, the page in a browser."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.golden import TINY_LLAMA, Case
from support.pages import browser, complaints

from molehill.api.cli import explain
from molehill.api.cli.routing_page import ExplainedSite, ExplainedText

TEXT = "The lamp </script> and the map"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = explain.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def text_of(case: str) -> tuple[str, list[int]]:
    """A golden prompt as text, and its tokens."""
    prompt = Case(case).oracle["prompts"][0]
    return prompt["text"], prompt["prompt_token_ids"]


@pytest.mark.parametrize("case", ["dynmole-soft", "mixlora"])
def test_json_has_what_the_trainers_code_chose(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str
) -> None:
    text, ids = text_of(case)
    file = tmp_path / "prompt.txt"
    file.write_text(text)
    arguments = (TINY_LLAMA, Case(case).path, "--prompt-file", file, "--max-tokens", 3, "--json")
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    result = json.loads(out)
    assert result["prompt_tokens"] == len(ids)
    assert len(result["tokens"]) == len(ids) + 3
    experts, soft = np.array(result["experts"]), np.array(result["soft"])
    assert len(experts) == len(ids) + 2
    sites = [site["site"] for site in result["sites"]]
    for name, route in Case(case).routes().items():
        i = sites.index(name)
        for row, weights in zip(experts[: len(ids), i], route["w"], strict=True):
            assert set(row[row >= 0]) == set(weights.nonzero().flatten().tolist())
        if case == "dynmole-soft":
            assert soft[: len(ids), i].tolist() == (route["w"] > 0).all(1).tolist()
    assert soft.any() == (case == "dynmole-soft")
    assert all(0 <= value <= 1 for value in result["entropy_by_layer"].values())
    assert len(result["entropy_by_layer"]) == 4


def explained() -> ExplainedText:
    """Two tokens at two routers of two layers, one of them before an invocation."""
    sites = (
        ExplainedSite("layers.0.mlp", None, 3, True),
        ExplainedSite("layers.1.self_attn.k_proj", 1, 2, False),
    )
    experts = np.array([[[-1] * 3] * 2, [[2, 0, 1], [1, 0, -1]]], np.int16)
    weights = np.array([[[0.0] * 3] * 2, [[0.5, 0.25, 0.25], [0.75, 0.25, 0]]], np.float32)
    return ExplainedText("m", "a", "here", ("x", "<b>"), 2, sites, experts, weights)


def test_entropies_pairs_and_soft_tokens() -> None:
    shown = explained()
    assert shown.routed.tolist() == [False, True]
    entropy = shown.entropy()
    assert entropy[0].tolist() == [0, 0]
    assert entropy[1, 0] == pytest.approx((0.5 * np.log(2) + 0.5 * np.log(4)) / np.log(3))
    assert entropy[1, 1] == pytest.approx(-(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)))
    assert shown.soft().tolist() == [[False, False], [True, False]]
    assert shown.pairs().tolist() == [[2, 2, 1], [2, 2, 1], [1, 1, 1]]
    assert [(site.layer, site.projection) for site in shown.sites] == [
        (0, "mlp"),
        (1, "k_proj head 1"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b"], "expected a text or --prompt-file"),
        (["a", "b", "text", "--prompt-file", "c"], "expected a text or --prompt-file"),
        (["a", "b", "--prompt-file", "nowhere"], "nowhere"),
        (["a", "b", "text", "--url", "ftp://x"], "found 'ftp://x', expected http:// or https://"),
        (["a", "b", "text", "--url", "http://127.0.0.1:9"], "http://127.0.0.1:9/v1/adapters/b"),
        (["nowhere", "b", "text"], "nowhere"),
        ([TINY_LLAMA, Case("lora").path, "text"], "no router that decides anything"),
        ([TINY_LLAMA, Case("mixlora").path, ""], "found no tokens"),
    ],
)
def test_what_cannot_be_explained_is_said(
    capsys: pytest.CaptureFixture[str], arguments: list[Any], message: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("molehill explain: ")
    assert message in err


def test_the_page_shows_it_in_a_browser(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    case = Case("dynmole-soft").path
    code, _, err = run(capsys, TINY_LLAMA, case, TEXT, "--max-tokens", 3, "--output", page)
    assert code == 0, err
    with browser() as chrome:
        chrome.get(page.as_uri())

        def colours() -> list[str]:
            buttons = chrome.find_elements("css selector", "#tokens button")
            return [button.value_of_css_property("background-color") for button in buttons]

        averaged = colours()
        count = chrome.execute_script("return data.shape[0]")
        assert len(averaged) == count > 5
        assert "".join(chrome.execute_script("return data.tokens")).count("script") == 1
        assert chrome.find_elements("css selector", "#tokens .softly")
        assert len(chrome.find_elements("css selector", "#entropy circle")) == 4
        assert len(chrome.find_elements("css selector", "#pairs td")) == 16
        assert len(chrome.find_elements("css selector", "#tokens .generated")) == 2
        for name, value in (("projection", "q_proj"), ("layer", "2")):
            chrome.execute_script(
                "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
                "s.dispatchEvent(new Event('change'))",
                name,
                value,
            )
        assert colours() != averaged
        # One decision for each token: the diagonal is the experts' shares.
        shares = chrome.execute_script(
            "return data.tokens.slice(0, data.shape[0])"
            ".map((_, token) => routes.decided(token, routes.sitesOf('q_proj', '2')).sets.length)"
        )
        assert shares == [1] * count
        chrome.find_elements("css selector", "#tokens button")[3].click()
        assert chrome.find_element("id", "detail").text.startswith("Token 3,")
        wider = "return document.documentElement.scrollWidth - innerWidth"
        assert chrome.execute_script(wider) <= 0
        assert complaints(chrome) == []
