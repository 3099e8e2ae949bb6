"""The part of a page that draws what routers chose for a text: the dashboard's and explain's."""

from dataclasses import dataclass
from pathlib import Path

PARTS = Path(__file__).with_name("page")


@dataclass(frozen=True)
class RoutesView:
    """html: elements. style: of these alone. script: `drawRoutes` and what decodes its arrays,
    before the page's own script."""

    html: str
    style: str
    script: str


def routes_view() -> RoutesView:
    names = ("routes.html", "routes.css", "routes.js")
    return RoutesView(*(PARTS.joinpath(name).read_text() for name in names))
