"""The dashboard in headless Chromium: empty, full, narrow, locked, lost, and on a real server."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from support.api_client import BASE, KEY, Api
from support.pages import EXPERTS, LAYERS, Canned, browser, complaints, serving, until

from molehill.api.cli.routing_sources import of_server

LONG = "x" * 128


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    with browser() as chrome:
        yield chrome


@pytest.fixture
def narrow() -> Iterator[Any]:
    with browser(width=380, height=800) as chrome:
        yield chrome


def text(chrome: Any, name: str) -> str:
    result: str = chrome.find_element("id", name).text
    return result


def shown(chrome: Any, name: str) -> bool:
    result: bool = chrome.find_element("id", name).is_displayed()
    return result


def opened(chrome: Any, url: str, waits_for: str) -> None:
    """The page, once the element is there; with nothing kept from an earlier test."""
    chrome.get(f"{url}/dashboard")
    chrome.execute_script("sessionStorage.clear()")
    chrome.get(f"{url}/dashboard")
    # What an earlier test's page said, when its server had gone.
    complaints(chrome)
    until(lambda: shown(chrome, waits_for), waits_for)


def names(chrome: Any) -> list[str]:
    buttons = chrome.find_elements("css selector", "#rows button")
    return [button.get_attribute("title") for button in buttons]


def overflow(chrome: Any) -> int:
    """Pixels by which the page is wider than its window."""
    wider: int = chrome.execute_script("return document.documentElement.scrollWidth - innerWidth")
    return wider


def colours(chrome: Any) -> int:
    """Distinct colours on the heat map."""
    script = """
        const canvas = document.getElementById("heat");
        const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return new Set(new Uint32Array(data.buffer)).size;
    """
    result: int = chrome.execute_script(script)
    return result


def test_an_empty_server_says_how_to_load_an_adapter(chrome: Any) -> None:
    with serving(Canned([])) as canned:
        opened(chrome, canned.url, "empty")
        assert f"{canned.url}/v1/adapters " in text(chrome, "example")
        assert not shown(chrome, "content")
        assert complaints(chrome) == []


def test_figures_and_the_map_of_the_busiest_adapter(chrome: Any) -> None:
    with serving(Canned(["quiet", "busy"])) as canned:
        opened(chrome, canned.url, "map")
        assert text(chrome, "title") == "busy"
        assert text(chrome, "count") == "2"
        assert not shown(chrome, "trouble")
        until(lambda: text(chrome, "share") == "25 %", "the share of the step")
        until(lambda: re.fullmatch(r"1[12]\d", text(chrome, "speed")), "tokens per second")
        until(lambda: "at last" in label(chrome, "curve"), "the curve of experts")
        assert f"{EXPERTS} experts at {LAYERS} layers" in label(chrome, "heat")
        assert colours(chrome) > 20
        assert complaints(chrome) == []


def label(chrome: Any, name: str) -> str:
    result: str = chrome.find_element("id", name).get_attribute("aria-label") or ""
    return result


def rows(chrome: Any) -> list[list[str]]:
    """The table's cells, read at once: the page redraws it now and then."""
    result: list[list[str]] = chrome.execute_script(
        "return [...document.querySelectorAll('#table tr')].map("
        "row => [...row.querySelectorAll('td')].map(cell => cell.innerText))"
    )
    return result


def test_the_map_is_read_by_keyboard_and_as_a_table(chrome: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    with serving(Canned(["one"])) as canned:
        opened(chrome, canned.url, "map")
        heat = chrome.find_element("id", "heat")
        heat.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
        site = canned.routing("one")["sites"][3]
        assert (site["layer"], site["projection"]) == (1, "q_proj")
        share = round(100 * site["expert_shares"][1])
        assert text(chrome, "readout").startswith(f"Layer 1, expert 1: {share} % of ")
        chrome.find_element("css selector", "#numbers summary").click()
        cells = until(lambda: rows(chrome)[2:3], "the table's third row")[0]
        assert cells[0] == "1"
        assert cells[2] == f"{share} %"
        assert len(cells) == 1 + EXPERTS


def test_two_hundred_adapters_are_listed_filtered_and_chosen(chrome: Any) -> None:
    every = [f"tenant-{number:03d}" for number in range(200)]
    with serving(Canned(every)) as canned:
        opened(chrome, canned.url, "map")
        assert names(chrome) == every
        assert overflow(chrome) <= 0
        chrome.find_element("id", "filter").send_keys("-17")
        assert names(chrome) == every[170:180]
        assert text(chrome, "filtered") == "10 of 200 shown"
        chrome.find_element("css selector", "#rows button[title=tenant-173]").click()
        until(lambda: text(chrome, "title") == "tenant-173", "the chosen adapter")
        assert complaints(chrome) == []


def test_an_adapter_that_does_not_serve_says_why(chrome: Any) -> None:
    why = "broken/adapter_model.safetensors: found 12 bytes, expected a header"
    with serving(Canned(["good"], failures={"broken": why})) as canned:
        opened(chrome, canned.url, "map")
        notes = [note.text for note in chrome.find_elements("css selector", "#rows small")]
        assert notes == ["dynmole, serving", f"failed, {why}"]
        chrome.find_element("css selector", "#rows button[title=broken]").click()
        until(lambda: text(chrome, "title") == "broken", "the chosen adapter")
        until(lambda: not shown(chrome, "map"), "no map")
        assert "failed" in text(chrome, "subtitle")
        assert "None" not in text(chrome, "detail")
        assert "null" not in text(chrome, "detail")


def test_names_are_text_and_never_markup(chrome: Any) -> None:
    name = "<img src=x onerror=document.title='owned'>"
    with serving(Canned([name])) as canned:
        opened(chrome, canned.url, "map")
        assert names(chrome) == [name]
        assert text(chrome, "title") == name
        assert chrome.title == "molehill"
        assert chrome.find_elements("css selector", "main img") == []


def test_long_names_fit_a_narrow_window(narrow: Any) -> None:
    with serving(Canned([LONG, "short"])) as canned:
        opened(narrow, canned.url, "map")
        assert overflow(narrow) <= 0
        narrow.find_element("css selector", f"#rows button[title={LONG}]").click()
        until(lambda: text(narrow, "title") == LONG, "the chosen adapter")
        assert overflow(narrow) <= 0
        assert colours(narrow) > 20


def test_a_lost_server_is_told_and_found_again(chrome: Any) -> None:
    with serving(Canned(["one"])) as canned:
        opened(chrome, canned.url, "map")
        canned.down = True
        until(lambda: shown(chrome, "trouble"), "the message")
        assert "it answers 500" in text(chrome, "trouble")
        assert names(chrome) == ["one"]
        canned.down = False
        until(lambda: not shown(chrome, "trouble"), "the end of the message")


def test_the_key_is_asked_for_and_kept_in_the_tab(chrome: Any) -> None:
    with serving(Canned(["one"], key="right")) as canned:
        opened(chrome, canned.url, "login")
        chrome.find_element("id", "key").send_keys("wrong\n")
        until(lambda: text(chrome, "status") == "The key was refused", "the refusal")
        chrome.find_element("id", "key").send_keys("right\n")
        until(lambda: shown(chrome, "map"), "the map")
        assert not shown(chrome, "login")
        chrome.get(f"{canned.url}/dashboard")
        until(lambda: shown(chrome, "map"), "the map, again")
        assert chrome.execute_script("return [document.cookie, localStorage.length]") == ["", 0]


def test_the_page_runs_nothing_from_elsewhere(api: Api) -> None:
    response = httpx.get(f"{api.url}/dashboard")
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    links = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']*)", response.text)
    assert links == ["data:,"]
    assert re.findall(r"https?://[^w]", response.text) == []
    assert "innerHTML" not in response.text


def test_a_real_servers_routing_is_drawn(clean: Api, chrome: Any) -> None:
    assert clean.load("drawn/mola", "mola").status_code == 200
    for _ in range(2):
        clean.complete("drawn/mola", [5, 6, 7, 8], 4)
    opened(chrome, clean.url, "login")
    chrome.find_element("id", "key").send_keys(f"{KEY}\n")
    until(lambda: shown(chrome, "content"), "the figures")
    chrome.find_element("css selector", "#rows button[title='drawn/mola']").click()
    until(lambda: text(chrome, "title") == "drawn/mola" and shown(chrome, "map"), "the map")
    until(lambda: "4 experts at 4 layers" in label(chrome, "heat"), "the adapter's own map")
    routing = clean.http.get("/v1/adapters/drawn/mola/routing").json()
    until(lambda: texts(chrome, "#figures dd")[:2] == [str(routing["tokens"]), "2"], "figures")
    choice = chrome.find_element("id", "projection")
    choice.find_element("css selector", "option[value=v_proj]").click()
    chrome.find_element("css selector", "#numbers summary").click()
    rows = [
        [str(site["layer"]), *(percent(share) for share in site["expert_shares"])]
        for site in routing["sites"]
        if site["projection"] == "v_proj"
    ]
    assert len(rows) == 4
    expected = [cell for row in rows for cell in row]
    until(lambda: texts(chrome, "#table td") == expected, f"the table {rows}")
    assert [text for text in complaints(chrome) if "401" not in text] == []


TEXT = "The lamp <b> and the map"


def test_a_prompts_routing_is_drawn_as_explain_draws_it(clean: Api, chrome: Any) -> None:
    for name, case in (("seen/soft", "dynmole-soft"), ("seen/plain", "lora")):
        assert clean.load(name, case).status_code == 200
    opened(chrome, clean.url, "login")
    assert not shown(chrome, "views")
    chrome.find_element("id", "key").send_keys(f"{KEY}\n")
    until(lambda: shown(chrome, "content"), "the figures")
    chrome.find_element("css selector", "[data-view=prompt]").click()
    assert not shown(chrome, "content")
    asked(chrome, "seen/soft", TEXT, 6)
    until(lambda: "as the kernels chose" in text(chrome, "asking"), "the routing")
    wanted = of_server(clean.url, KEY, BASE, "seen/soft", TEXT, 6)
    count = len(wanted.experts)
    assert text(chrome, "asking").startswith(f"{count} tokens at {len(wanted.sites)} routers")
    tokens = part(chrome, "#tokens button")
    drawn = [said.replace("\n", "⏎").replace("\t", "⇥") or "∅" for said in wanted.tokens]
    assert [token.get_attribute("textContent") for token in tokens] == drawn[:count]
    assert len(part(chrome, "#tokens .generated")) == count - wanted.prompt_tokens == 5
    softly = (wanted.soft().mean(1) >= 0.5).tolist()
    marked = [" softly " in f" {token.get_attribute('class')} " for token in tokens]
    assert marked == softly
    assert any(softly)
    assert len(part(chrome, "#entropy circle")) == 4
    decisions = count * len(wanted.sites)
    cells = [cell.text for cell in part(chrome, "#pairs td")]
    shares = wanted.pairs().flatten() / decisions
    assert [float(cell.removesuffix(" %")) for cell in cells] == pytest.approx(
        (100 * shares).tolist(), abs=0.51
    )
    for name, value in (("projection", "q_proj"), ("layer", "2")):
        part(chrome, f"#{name} option[value='{value}']")[0].click()
    names = [site.site for site in wanted.sites]
    site = names.index("layers.2.self_attn.q_proj")
    strongest = wanted.weights[:, site] == wanted.weights[:, site].max(1, keepdims=True)
    best = np.where(strongest, wanted.experts[:, site], 99).min(1).tolist()
    titles = [token.get_attribute("title") for token in part(chrome, "#tokens button")]
    assert [title.partition(",")[0] for title in titles] == [f"expert {e}" for e in best]
    assert [said for said in complaints(chrome) if "401" not in said] == []
    assert overflow(chrome) <= 0
    for name, more, why in (
        ("seen/plain", 6, "seen/plain: no router of it decides anything"),
        ("seen/soft", 1024, "(--routing-bytes)"),
    ):
        asked(chrome, name, TEXT, more)
        until(lambda why=why: why in text(chrome, "refusal"), why)
    chrome.find_element("css selector", "[data-view=adapters]").click()
    until(lambda: shown(chrome, "content"), "the figures")


def asked(chrome: Any, name: str, prompt: str, more: int) -> None:
    """In the form of the page."""
    chrome.find_element("css selector", f"#asked option[value='{name}']").click()
    for field, value in (("text", prompt), ("more", more)):
        box = chrome.find_element("id", field)
        box.clear()
        box.send_keys(str(value))
    chrome.find_element("id", "show").click()


def part(chrome: Any, selector: str) -> list[Any]:
    """Elements of what is drawn of a prompt."""
    root = chrome.find_element("id", "routes").shadow_root
    result: list[Any] = root.find_elements("css selector", selector)
    return result


def texts(chrome: Any, selector: str) -> list[str]:
    """All at once: the page draws itself anew every two seconds."""
    script = "return [...document.querySelectorAll(arguments[0])].map(one => one.innerText)"
    result: list[str] = chrome.execute_script(script, selector)
    return result


def percent(share: float) -> str:
    """As the page writes it."""
    return f"{100 * share:.1f} %" if 0 < share < 0.0995 else f"{round(100 * share)} %"
