"""Origins as browsers write them (RFC 6454, section 6.2), made of what people write."""

from __future__ import annotations

import ipaddress
import re

import idna

_PARTS = re.compile(r"([a-z][a-z0-9+.-]*)://(\*\.)?(\[[0-9a-f:.]+\]|[^\[\]:]+)(?::([0-9]{1,5}))?")
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", re.ASCII)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_SHAPE = "must be an origin like https://www.example.com or https://*.example.com, without a path"


def canonical_origin(text: str) -> str:
    """The origin as a browser sends it; `*` and `null` as they are.

    Case, default ports, other scripts and ways to write an address are folded. In a pattern a `*`
    stands for the labels before at least two others. Raises `ValueError` with a sentence, which
    does not quote the text, for what no browser sends.
    """
    if text in ("*", "null"):
        return text
    match = _PARTS.fullmatch(text.lower())
    if match is None or re.search(r"[/?#*@\s]", match[3]):
        raise ValueError(_SHAPE)
    scheme, star, host, port = match[1], match[2] or "", _host(match[3]), match[4]
    if star and host.rstrip(".").count(".") < 1:
        raise ValueError("must have two labels at least after the *, like https://*.example.com")
    if star and _is_address(host):
        raise ValueError("must have a name after the *, not an address")
    return f"{scheme}://{star}{host}{_port(scheme, port)}"


def _port(scheme: str, port: str | None) -> str:
    if port is None or int(port) == _DEFAULT_PORTS.get(scheme):
        return ""
    if int(port) > 65535:
        raise ValueError("must have a port of at most 65535")
    return f":{int(port)}"


def _host(host: str) -> str:
    if host.startswith("["):
        try:
            return f"[{ipaddress.IPv6Address(host[1:-1])}]"
        except ValueError:
            raise ValueError("must have an IPv6 address in its brackets") from None
    if not host.isascii():
        try:
            # As browsers do it: UTS #46, without the transitional ways of IDNA 2003.
            host = idna.encode(host, uts46=True).decode()
        except idna.IDNAError:
            raise ValueError(
                "must have a host name that can be written in ASCII: write it as browsers show it "
                "to a server, with xn--"
            ) from None
    if not _HOST.fullmatch(host):
        raise ValueError(_SHAPE)
    if host.rstrip(".").rpartition(".")[2].isdigit() and not _is_address(host):
        raise ValueError("must have an IPv4 address in four numbers, or a name")
    return host


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
