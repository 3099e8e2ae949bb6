"""Which names adapters may have."""

import pytest
from fastapi.routing import APIRoute

from molehill.api.adapters import names
from molehill.api.adapters.errors import BadNameError
from molehill.api.http import adapters, router_stats


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "org/model-8b:v2",
        "x" * 128,
        "v1.2",
        "name@rev",
        "größe",
        "a/b/c",
        "routing",
        "a/pinned",
    ],
)
def test_good_names_pass(name: str) -> None:
    names.check(name, {"base"})


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x" * 129,
        "/a",
        "a/",
        "a//b",
        "..",
        ".",
        "a/../b",
        "a/./b",
        "a b",
        "a\n",
        "a\0",
        "\x1b[31m",
        "a\u202eb",
        'a"b',
        "a\\b",
        "base",
        "a/routing",
        "a/b/pin",
    ],
)
def test_bad_names_are_refused_and_shown_escaped(name: str) -> None:
    with pytest.raises(BadNameError) as refusal:
        names.check(name, {"base"})
    assert str(refusal.value).isascii()
    assert str(refusal.value).isprintable()


def test_no_name_reads_as_the_route_of_another_adapter() -> None:
    paths = {
        route.path
        for router in (adapters.router, router_stats.router)
        for route in router.routes
        if isinstance(route, APIRoute)
    }
    below = {path.partition("/{name:path}/")[2] for path in paths if "/{name:path}/" in path}
    assert below == set(names.ROUTES)
