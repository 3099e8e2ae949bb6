"""A page to look at: what the JSON routes say, drawn. It carries no data itself and no secrets."""

import base64
import hashlib
from functools import cache

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from molehill.api.http.routes_view import PARTS, routes_view

router = APIRouter()


@router.get("/dashboard", include_in_schema=False)
async def show_dashboard() -> HTMLResponse:
    """The page asks for an API key where the routes want one."""
    text, policy = page()
    return HTMLResponse(
        text,
        headers={
            "Content-Security-Policy": policy,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-cache",
        },
    )


@cache
def page() -> tuple[str, str]:
    """The page in one piece, and a policy that runs its own script and style and no others, and
    lets it talk to its own server only."""
    names = ("index.html", "style.css", "script.js", "prompt.js")
    text, style, *scripts = (PARTS.joinpath(name).read_text() for name in names)
    view = routes_view()
    script = view.script + "".join(scripts)
    text = text.replace("<style></style>", f"<style>{style}</style>")
    # In a template: the page makes it anew for each text, apart from its own names and styles.
    text = text.replace("<!-- routes -->", f"<style>{view.style}</style>{view.html}")
    text = text.replace("<script></script>", f"<script>{script}</script>")
    rules = {
        "default-src": "'none'",
        "script-src": source_of(script),
        "style-src": f"{source_of(style)} {source_of(view.style)}",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return text, "; ".join(f"{name} {value}" for name, value in rules.items())


def source_of(content: str) -> str:
    """How a policy names an inline script or style: by its digest (W3C CSP 3, section 2.3.1)."""
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"
