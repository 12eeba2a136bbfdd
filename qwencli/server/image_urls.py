"""Pictures that a client sends: data URLs, and, only where that is allowed, public addresses.

No path of a file is ever read. An address is looked up once and the connection goes to what was
found, so that a name cannot mean another machine at the second look; each redirection is checked
as the first address is.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Sequence
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

from PIL.Image import Image

from qwencli.engine.frontend.image_decoding import read_picture
from qwencli.engine.frontend.images import to_rgb
from qwencli.errors import InputError
from qwencli.messages import ImagePart
from qwencli.server.api_errors import ApiError, PictureError
from qwencli.server.background import BackgroundThreads

MOST_BYTES = 32 << 20
FETCH_S = 20.0
MOST_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)


async def picture_bytes(url: str, place: str, fetches: BackgroundThreads | None) -> bytes:
    """The bytes of a picture.

    Args:
        place: where the address stands in the request.
        fetches: where addresses of the web are asked; None = they are not.

    Raises:
        ApiError: no data URL, broken base64, or an address that may not or cannot be read.
    """
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        if len(url) > 1 << 16:
            return await asyncio.to_thread(_of_data_url, url, place)
        return _of_data_url(url, place)
    if scheme not in ("http", "https"):
        raise ApiError(400, f"{place}: give a data URL (data:image/png;base64,...)", param=place)
    if fetches is None:
        raise ApiError(
            400,
            f"{place}: addresses of the web are not read here; send a data URL, or start the "
            "server with --allow-image-urls",
            param=place,
        )
    try:
        return await fetches.run(fetched, url)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise ApiError(400, f"{place}: cannot be fetched: {reason}", param=place) from error


def _of_data_url(url: str, place: str) -> bytes:
    head, comma, data = url[5:].partition(",")
    if not comma:
        raise ApiError(400, f"{place}: a data URL has a comma before its data", param=place)
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(data)
    try:
        return base64.b64decode("".join(data.split()) + "=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{place}: broken base64: {error}", param=place) from error


def opened_picture(
    data: bytes, place: str, max_pixels: int, beside: Sequence[ImagePart]
) -> ImagePart:
    """The decoded picture.

    Args:
        beside: what the same request shows already; memory is bounded for all of it together.

    Raises:
        PictureError: no picture, a damaged one, or one that is too large.
    """
    held = sum(3 * part.image.width * part.image.height for part in beside)

    def read(image: Image, name: str) -> ImagePart:
        if image.width * image.height > max_pixels:
            raise InputError(
                f"{name}: the picture has {image.width * image.height / 1e6:.0f} megapixels, the "
                f"limit here is {max_pixels / 1e6:.0f}",
                "scale it down",
            )
        return ImagePart(to_rgb(image, name, held), name)

    try:
        return read_picture(data, read, place)
    except InputError as error:
        raise PictureError(error.message, error.hint, place) from error


def fetched(url: str) -> bytes:
    """What a public address gives.

    Raises:
        OSError, ValueError, http.client.HTTPException: it gives nothing, too much or too late, or
            is no address of the public internet.
    """
    until_s = time.monotonic() + FETCH_S
    for _ in range(MOST_REDIRECTS + 1):
        connection, target = _connection(url, until_s)
        try:
            connection.request("GET", target, headers={"accept": "image/*", "host": _host(url)})
            answer = connection.getresponse()
            if answer.status in _REDIRECTS:
                url = urljoin(url, answer.headers.get("location", ""))
                continue
            if answer.status != 200:
                raise ValueError(f"the server answers {answer.status}")
            return _read(answer, until_s)
        finally:
            connection.close()
    raise ValueError("it is redirected too often")


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]


def _connection(url: str, until_s: float) -> tuple[http.client.HTTPConnection, str]:
    """A connection to a public address of the URL's host, and what to ask it for."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it is not an http address")
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    address = _public_address(parts.hostname, port)
    left_s = max(until_s - time.monotonic(), 0.01)
    raw = socket.create_connection((address, port), timeout=left_s)
    try:
        if secure:
            raw = ssl.create_default_context().wrap_socket(raw, server_hostname=parts.hostname)
    except BaseException:
        raw.close()
        raise
    connection = http.client.HTTPConnection(parts.hostname, port, timeout=left_s)
    connection.sock = raw
    query = f"?{parts.query}" if parts.query else ""
    return connection, quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._") + query


def _public_address(host: str, port: int) -> str:
    """Raises ValueError where any of a host's addresses is not of the public internet."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise ValueError("its host is not a name") from error
    addresses = [str(each[4][0]) for each in found]
    for address in addresses:
        if not _is_public(address):
            raise ValueError("its host is not on the public internet")
    return addresses[0]


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            return _is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip not in _UNICAST or (inner is not None and not _is_public(str(inner))):
            return False
    special = any(ip.version == each.version and ip in each for each in _SPECIAL)
    return ip.is_global and not ip.is_multicast and not special


_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Of hosts of the internet; other blocks hold IPv4 addresses in many forms, or those of a site.
_UNICAST = ipaddress.ip_network("2000::/3")
# Global to Python, and no host of anybody's: protocols, relays, documentation.
_SPECIAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20")))


def _read(answer: http.client.HTTPResponse, until_s: float) -> bytes:
    data = bytearray()
    while piece := answer.read(1 << 16):
        data += piece
        if len(data) > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
        if time.monotonic() > until_s:
            raise ValueError(f"it was not here within {FETCH_S:g} s")
    return bytes(data)
