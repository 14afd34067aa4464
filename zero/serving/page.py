"""The page for people: three files of this package in one reply that asks for nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from starlette.responses import Response

_FOLDER = Path(__file__).parent / "page"


def page_response() -> Response:
    """The page, with a policy under which only its own style and script run."""
    html, policy = _page()
    return Response(html, media_type="text/html", headers={"content-security-policy": policy})


@cache
def _page() -> tuple[str, str]:
    """Page and Content-Security-Policy. Nothing of a request is in either, so both are made once."""
    style, script, html = (
        (_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "page.html")
    )
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_digest(script)}'",
            f"style-src '{_digest(style)}'",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    )
    page = html.replace("<style></style>", f"<style>{style}</style>")
    return page.replace("<script></script>", f"<script>{script}</script>"), policy


def _digest(text: str) -> str:
    """As a browser computes it, of what stands between the tags."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
