"""Takes out of a text what says who and where: names, hosts, paths, addresses, secrets."""

from __future__ import annotations

import getpass
import platform
import re
from dataclasses import dataclass
from pathlib import Path

_SECRET_NAME = r"(?:token|secret|passw(?:or)?d|api[_-]?key|access[_-]?key|authorization)"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_NOT_IN_WORD = r"(?<![\w/\\.-])"

# Pattern -> what stands there instead; the order matters.
RULES: tuple[tuple[str, str], ...] = (
    (r"\b(?:hf|sk|ghp|gho|ghs|glpat|xox[abp])[-_][A-Za-z0-9_-]{8,}", "<token>"),
    (r"\bgithub_pat_\w{8,}", "<token>"),
    (r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]+", "<token>"),
    (r"\bAKIA[0-9A-Z]{12,}", "<token>"),
    (r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{6,}", r"\1 <token>"),
    # A number is a setting (max_new_tokens: 256), not a secret; nor is what JSON has for nothing.
    (
        rf"(?i)\b(\w*{_SECRET_NAME}\w*[\"']?\s*[=:]\s*[\"']?)(?!(?:\d+|null|true|false)\b)[^\s\"',;<]+",
        r"\1<secret>",
    ),
    (r"(\w+://)[^\s/@:]+:[^\s/@]+@", r"\1<credentials>@"),
    (r"\b[\w.+-]+@[\w-]+\.[\w.-]+\b", "<address>"),
    (r"\b(?:GPU|MIG)-[0-9a-fA-F]{8}-[0-9a-fA-F-]{20,}", "<uuid>"),
    (r"\b(?:[0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}\b", "<mac>"),
    (r"\b(?:[0-9a-fA-F]{1,4}:){4,7}[0-9a-fA-F]{1,4}\b", "<ip>"),
    (
        r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w.])",
        "<ip>",
    ),
)
# Addresses of the web are public as they are; folders of this machine are not. Of a path the last
# part stays: it says which file, and not whose.
_PLACES = re.compile(
    r"(?P<url>\b(?:https?|hf)://[^\s\"'<>]+)"
    r"|(?P<unc>\\\\[^\\\s\"']+(?:\\[^\\\s\"']+)+)"
    rf"|{_NOT_IN_WORD}(?P<windows>[A-Za-z]:[\\/](?:[^\\/\s\"':*?<>|]+[\\/])*[^\\/\s\"':*?<>|]*)"
    rf"|{_NOT_IN_WORD}(?P<posix>~?/(?:[^/\s\"':,;()]+/)+[^/\s\"':,;()]*)"
)


@dataclass(frozen=True)
class Owner:
    """Who and where this is: what a report must not show."""

    user: str
    host: str
    home: str


def this_owner() -> Owner:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without an entry for its user
        user = ""
    return Owner(user, platform.node(), str(Path.home()))


def redact(text: str, owner: Owner) -> str:
    """The text without names, hosts, folders, addresses and secrets."""
    for pattern, instead in RULES:
        text = re.sub(pattern, instead, text)
    for home in {owner.home, owner.home.replace("\\", "/"), owner.home.replace("\\", "\\\\")}:
        if len(home) > 1:
            text = text.replace(home, "~")
    text = _PLACES.sub(_shorter, text)
    for name, instead in _names(owner):
        whole_word = rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])"
        text = re.sub(whole_word, instead, text, flags=re.IGNORECASE)
    return text


def _shorter(found: re.Match[str]) -> str:
    if found["url"]:
        return found.group()
    last = re.split(r"[\\/]", found.group().rstrip("\\/"))[-1]
    return f"<path>/{last}"


def _names(owner: Owner) -> list[tuple[str, str]]:
    """Longest first, so that no name is cut apart by a shorter one."""
    first_label = owner.host.partition(".")[0]
    names = [(owner.host, "<host>"), (first_label, "<host>"), (owner.user, "<user>")]
    return sorted((pair for pair in names if len(pair[0]) > 1), key=lambda pair: -len(pair[0]))
