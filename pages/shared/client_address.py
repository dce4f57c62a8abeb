"""Whose request it is, and whether it comes from a page of ours. Nothing here imports torch: requests come before it is there."""

import os
import re
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")


def proxies() -> int:
    """How many proxies stand in front of this server. Raises ValueError where INTRAFUSION_PROXIES is no number."""
    text = os.environ.get("INTRAFUSION_PROXIES", "") or "0"
    if not re.fullmatch(r"[0-9]{1,2}", text):
        raise ValueError(f"INTRAFUSION_PROXIES must be how many proxies stand in front, not {text[:60]!r}")
    return int(text)


def reader(peer: str, forwarded: Sequence[str] = ()) -> str:
    """The address that limits hold for: of the peer, or of whom the outermost of our proxies heard.

    peer: who connected. forwarded: the values of X-Forwarded-For, in their order. They are believed as far as our own
    proxies wrote them, and where the peer is on this machine or a private network, as a proxy is. Of an IPv6 address it is
    the /64 network, as one person has all of that; "" where the peer has none, as at a Unix socket.
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
    """An address; of an IPv4 one that is written as IPv6 that one."""
    try:
        found = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


def _without_port(entry: str) -> str:
    """The address in "1.2.3.4:80", "[::1]:80", "1.2.3.4" or "::1"."""
    if entry.startswith("["):
        return entry[1:].partition("]")[0]
    return entry.partition(":")[0] if entry.count(":") == 1 else entry


def is_loopback(address: str | None) -> bool:
    """Whether only this machine reaches a server that is bound here; no address means all of them."""
    if address == "localhost":
        return True
    try:
        return ip_address(address or "").is_loopback
    except ValueError:  # another name may mean anything
        return False


def host_and_port(host: str, usual: int | None = None) -> tuple[str, int | None]:
    """The name, in lower case, and the port of a Host header or of an origin after its scheme; usual: where none is given.

    Raises ValueError for what is neither a name nor an address, in brackets where it is an IPv6 one, and at most a port.
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
    """Whether a page of this origin is one that was served under this Host, or of an allowed origin.

    allowed: origins, or names of hosts alone, as Streamlit's server.corsAllowedOrigins and browser.serverAddress have them.
    Nothing is looked up.
    """
    try:
        parts = urlsplit(origin)
        usual = {"http": 80, "https": 443}[parts.scheme]
        there = host_and_port(parts.netloc, usual)
        here = host_and_port(host, usual)
    except (ValueError, AttributeError, KeyError):
        return False
    return there == here or origin in allowed or there[0] in allowed
