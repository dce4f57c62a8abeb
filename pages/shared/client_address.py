"""The client address of a request, and whether the request comes from one of our own pages.

Nothing here imports torch, because requests arrive before torch is loaded.
"""

import os
import re
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")


def proxies() -> int:
    """Return how many proxies are in front of this server. Raise ValueError if INTRAFUSION_PROXIES is not a number."""
    text = os.environ.get("INTRAFUSION_PROXIES", "") or "0"
    if not re.fullmatch(r"[0-9]{1,2}", text):
        raise ValueError(f"INTRAFUSION_PROXIES must be the number of proxies in front, not {text[:60]!r}")
    return int(text)


def reader(peer: str, forwarded: Sequence[str] = ()) -> str:
    """Return the address that rate limits apply to: the peer's, or the client address seen by our outermost proxy.

    peer: the address that connected. forwarded: the values of X-Forwarded-For, in order. Only the entries that our own
    proxies wrote are trusted, and only if the peer is on this machine or a private network, as a proxy is. For an IPv6
    address, returns its /64 network, because one person usually has all of it. Returns "" if the peer has no address, as
    with a Unix socket.
    """
    near = _address(peer)
    count = proxies()
    if count and (near is None or near.is_private):
        heard = [entry for value in forwarded for entry in value.split(",")][-count:]
        near = (_address(_without_port(heard[0].strip())) if heard else None) or near
    if isinstance(near, IPv6Address):
        return str(ip_network((near.packed[:8] + bytes(8), 64)))
    return str(near or "")


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """Parse an address. Return an IPv4-mapped IPv6 address as IPv4, and None if the text is not an address."""
    try:
        found = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


def _without_port(entry: str) -> str:
    """Return the address in "1.2.3.4:80", "[::1]:80", "1.2.3.4" or "::1"."""
    if entry.startswith("["):
        return entry[1:].partition("]")[0]
    return entry.partition(":")[0] if entry.count(":") == 1 else entry


def is_loopback(address: str | None) -> bool:
    """Return whether a server bound to this address is reachable from this machine only. None means all interfaces."""
    if address == "localhost":
        return True
    try:
        return ip_address(address or "").is_loopback
    except ValueError:  # any other name may resolve to anything
        return False


def host_and_port(host: str, usual: int | None = None) -> tuple[str, int | None]:
    """Return the lower-case name and the port of a Host header, or of an origin without its scheme.

    usual: the port if none is given. Raises ValueError unless the text is a host name or an address (IPv6 in brackets)
    with at most a port. Raises AttributeError if it does not match that form at all.
    """
    name, port = re.fullmatch(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::([0-9]{1,5}))?", host).groups()  # type: ignore[union-attr]
    if name.startswith("["):
        name = str(IPv6Address(name[1:-1]))
    elif not _NAME.fullmatch(name):
        raise ValueError(f"no name of a host: {name!r}")
    if port is not None and not 0 < int(port) < 65536:
        raise ValueError(f"no port: {port}")
    return name.lower(), usual if port is None else int(port)


def is_ours(origin: str, host: str, allowed: Sequence[str] = ()) -> bool:
    """Return whether an origin matches this Host header or is allowed.

    allowed: origins or bare host names, as in Streamlit's server.corsAllowedOrigins and browser.serverAddress. No name is
    resolved.
    """
    try:
        parts = urlsplit(origin)
        usual = {"http": 80, "https": 443}[parts.scheme]
        there = host_and_port(parts.netloc, usual)
        here = host_and_port(host, usual)
    except (ValueError, AttributeError, KeyError):
        return False
    return there == here or origin in allowed or there[0] in allowed
