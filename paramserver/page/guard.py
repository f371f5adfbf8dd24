"""Who may see the page: which names of this machine a request may use, and the watch token.

A page at a loopback address is open to the users of this machine. At any other address only holders
of the watch token see the run; the browser gets the token in the part of the address behind `#`,
which it never sends, shows it once, and keeps a cookie that is made of it.

The name in the `Host` header is checked because a foreign web site may let its own name point to
this machine ("DNS rebinding"): the browser would then show it what is here. A number cannot be
stolen that way.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie

from paramserver.errors import UserError
from paramserver.net import jointoken

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of every answer."""
HEADERS_NEAR = {**HEADERS, "Cross-Origin-Opener-Policy": "same-origin"}
"""The same at loopback. Browsers ignore that one without TLS elsewhere, and complain."""

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?")


def is_ours(host: str, names: Collection[str]) -> bool:
    """May a request have this `Host`: a number, localhost, or one of this machine's `names`?"""
    found = _HOST.fullmatch(host)
    if found is None:
        return False
    name = found[1].strip("[]").lower().removesuffix(".")
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return name == "localhost" or name.endswith(".localhost") or name in names


def cookie_of(secret: bytes) -> str:
    """What the browser of a holder of the watch token keeps: no token, and no key."""
    return hashlib.sha256(b"page" + secret).hexdigest()


def cookie_name(port: int) -> str:
    """Cookies know no ports, so two pages of one machine need two names."""
    return f"paramserver_page_{port}"


def holds(cookies: str, name: str, secret: bytes) -> bool:
    """Is the cookie of a holder of the token in a `Cookie` header?"""
    try:
        found = SimpleCookie(cookies).get(name)
    except CookieError:
        return False
    return found is not None and hmac.compare_digest(
        found.value.encode(), cookie_of(secret).encode()
    )


def opens(told: str, secret: bytes) -> bool:
    """Is this the watch token of a server with this secret, at whatever address?"""
    try:
        token = jointoken.decode(told, to_watch=True)
    except UserError:
        return False
    return token.watches and hmac.compare_digest(token.client_secret, secret)
