"""Takes out of a text what says who and where: names, hosts, paths, addresses, secrets."""

from __future__ import annotations

import getpass
import ipaddress
import platform
import re
import unicodedata
from dataclasses import astuple, dataclass
from pathlib import Path
from urllib.parse import urlsplit

_SECRET_NAME = (
    r"(?:secret|passw(?:or)?d|passphrase|pwd|(?:api|access|private|account|signing|secret)[_-]?key"
    r"|authorization|credentials?|cookie|connection[_-]?string)"
)
_NOT_IN_WORD = r"(?<![\w/\\.-])"
# How keys begin that services hand out; what follows is at least eight characters.
_KEY_STARTS = (
    r"hf[-_]|api_org_|sk[-_]|rk_|pk_(?:live|test)_|whsec_|gh[oprsu]_|github_pat_|gl(?:pat|rt|dt|ft|soat|sa)[-_]"
    r"|xox[abeprs][-_.]|xapp-|AIza|ya29\.|GOCSPX-|npm_|pypi-|dckr_(?:pat|oat)_|gsk_|r8_|nvapi-"
    r"|wandb_v\d_|rpa_|xai-|pplx-|tvly-|fw_|shp(?:at|ca|pa|ss)_|dop_v1_|doo_v1_|lin_api_|sq0(?:atp|csp)-"
    r"|SG\.|key-|tskey-|hv[sb]\.|ATATT3|ATCTT3|ATBB|ntn_|secret_|AGE-SECRET-KEY-|sbp_|dapi|EAA[A-Z]"
)
_SERIAL_NAME = (
    r"(?:\w{0,40}serial(?:[ _-]?(?:numbers?|num|nr|no))?\.?|s/n|(?:asset|service)[ _-]?tag"
    r"|(?:machine|boot|system|board|chassis|product|disk|hardware)[ _-]?(?:uu)?id)"
)
# What a name begins with or goes on with. Bounded: of a long word every part would be tried.
_MORE = r"\w{0,40}"
_TO_QUOTE = r"(?:\\?[\"'])"

# Pattern -> what stands there instead; the order matters.
RULES: tuple[tuple[str, str], ...] = (
    (r"(?s)-----BEGIN [A-Z0-9 ]+-----(?:(?!-----BEGIN).)*?-----END [A-Z0-9 ]+-----", "<key>"),
    # One that was cut off before its end.
    (r"-----BEGIN [A-Z0-9 ]+-----(?:\s|\\[nr]|[\w-]+: [^\n]*\n|[A-Za-z0-9+/=]{8,})*", "<key>"),
    (
        r"\b(?:ssh-(?:rsa|dss|ed25519)|ecdsa-sha2-\S{1,40}|sk-ssh-\S{1,40}) AAAA\S+(?: \S+@\S+)?",
        "<key>",
    ),
    (rf"(?<![A-Za-z0-9])(?:{_KEY_STARTS})[A-Za-z0-9_.~+/=-]{{8,}}", "<token>"),
    (r"\beyJ[\w-]{8,4096}\.[\w-]{1,4096}\.[\w-]+", "<token>"),
    (r"\b(?:AKIA|ASIA|ABIA|ACCA|AROA|AIDA|AGPA|ANPA)[0-9A-Z]{12,}", "<token>"),
    (r"\b(?:AC|SK)[0-9a-f]{32}\b", "<token>"),
    (r"\b\d{8,10}:AA[\w-]{30,}", "<token>"),
    (r"(?i)\b(bearer|basic|digest)\s+[\w.~+/=-]{6,}", r"\1 <token>"),
    # The package `tokenizers` is none of these.
    # Of an option, its value; of a name, what it is set to, with the spaces inside its quotes.
    (rf"(?i)(--?[\w-]{{0,40}}(?:{_SECRET_NAME}|token)[ ]+)(?![-<])\S+", r"\1<secret>"),
    (
        rf"(?i)\b(?!tokenizers\b)({_MORE}(?:{_SECRET_NAME}|token){_MORE}{_TO_QUOTE}?\s*[=:]\s*)(\\?[\"'])(?!<)[^\"'\n]+(\\?[\"'])",
        r"\1\2<secret>\3",
    ),
    # A number is a setting (max_new_tokens: 256), not a secret; nor is what JSON has for nothing.
    (
        rf"(?i)\b({_MORE}{_SECRET_NAME}{_MORE}{_TO_QUOTE}?\s*[=:]\s*{_TO_QUOTE}?)(?!(?:null|true|false)\b)[^\s\"',;<]+",
        r"\1<secret>",
    ),
    (
        rf"(?i)\b(?!tokenizers\b)({_MORE}token{_MORE}{_TO_QUOTE}?\s*[=:]\s*{_TO_QUOTE}?)(?!(?:\d+|\d*\.\d+|null|true|false)\b)[^\s\"',;<\[{{]+",
        r"\1<secret>",
    ),
    (r"(\w{1,40}://)[^\s/@:]*:[^\s/@]+@", r"\1<credentials>@"),
    (r"\b[\w.+-]{1,64}@[\w-]+\.[\w.-]+\b", "<address>"),
    (r"\b(?:GPU|MIG)-[0-9a-fA-F]{8}-[0-9a-fA-F-]{20,}", "<uuid>"),
    (r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b", "<uuid>"),
    (
        rf"(?i)(?<!\w)({_SERIAL_NAME}{_TO_QUOTE}?(?:\s*[:=#]\s*|\s+(?=\S*\d)){_TO_QUOTE}?)(?!(?:null|true|false|none)\b)[A-Z0-9][\w./-]{{3,}}",
        r"\1<serial>",
    ),
    (r"\b(?:[0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}\b(?![:-])", "<mac>"),
    # How Linux names an adapter by its address.
    (r"\b(en|wl|ww)x[0-9a-f]{12}\b", r"\1x<mac>"),
    (r"\b(?:[0-9A-Fa-f]{4}\.){2}[0-9A-Fa-f]{4}\b", "<mac>"),
)
_IPV6 = re.compile(
    r"(?<![\w:.])(?P<address>(?:[0-9A-Fa-f]{0,4}:){2,7}(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4}))"
    r"(?:%[\w-]+)?(?![\w:])"
)
_IPV4 = re.compile(
    r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w]|\.\d)"
)
# Folders of this machine are private, and so are stores and hosts of a house; other addresses of
# the web are public as they are. Of a path the last part stays: it says which file, and not whose.
# A name may hold spaces and apostrophes. It ends in neither, so that "/usr/lib and /usr/bin" are
# two paths; behind a quotation mark all of it is the path.
# A shell writes spaces and apostrophes with a backslash.
_PART = r"(?:[^/\\\s\"':*?<>|,;()]|'(?=\w)|'\\''|\\(?=[ '&;()])['&;]?)"
_INSIDE = rf"(?:{_PART}|,? (?![~/]|[A-Za-z]:[\\/])|[()]){{0,255}}"
_FOLDER = rf"(?:{_PART}(?:{_INSIDE}{_PART})?\)?)"
_PERSON = r"(?i:home|users|documents and settings)"
# A person's folder at the end of a path: words that begin in capitals belong to it, and two others
# that no sentence goes on with.
_GOES_ON = (
    r"(?:a|about|after|already|also|an|and|are|as|at|available|be|because|been|before|but|by|can"
    r"|cannot|contains?|could|did|do|does|exists?|failed|fails|for|free|from|full|gives?|had|has"
    r"|have|here|holds?|if|in|instead|into|is|it|its|left|may|missing|mounted|must|needs?|no|nor"
    r"|not|of|on|only|or|out|over|owned|per|read|runs?|shows?|so|stands?|takes?|than|that|the|then"
    r"|there|this|to|too|took|total|under|until|used|using|was|were|when|where|which|while|who|will"
    r"|with|without|would|write)(?![\w'\u2019-])"
)
_NAME = rf"(?!{_GOES_ON})[^\W\d_]+(?:['\u2019-][^\W\d_]+)*(?!\w|['\u2019-]\w|[/\\(]|\.\w)"
_PERSON_LAST = (
    rf"(?>{_PART}+(?: [A-Z]{_PART}*)*(?: {_NAME}){{0,2}})(?!(?:{_INSIDE}{_PART})?\)?[\\/])"
)
_PUBLIC = r"(?i:https?|hf)"
_FILE_URL = r"(?:file:/{0,2}(?=/))?"
_START = rf"{_FILE_URL}(?:~[\w.-]*|/?(?:\\\\\?\\)?[A-Za-z]:)?"
# "at 5 GB/s" is no folder.
_SLASH = r"/+(?!s(?:[\s,;.)]|$))"
_PLACES = re.compile(
    rf"(?P<url>\b{_PUBLIC}://[^\s\"'<>]+"
    # Elsewhere a space belongs to the address where it goes on with more folders.
    rf"|\b(?!file:|{_PUBLIC}:)[A-Za-z][A-Za-z0-9+.-]{{0,40}}://[^\s\"'<>]+"
    r"(?:(?: [^\s\"'<>/,;:]+){1,4}/[^\s\"'<>]+)*)"
    rf"|{_NOT_IN_WORD}(?P<account>~[A-Za-z_][\w.-]*\b(?![\\/]))"
    rf"|(?P<mark>\\?\"|\\?')(?P<quoted>(?:~[\w.-]*[\\/]|[A-Za-z]:[\\/]|/|\\\\)"
    r"(?:(?! /|: )[^\"'\n]|'(?=\w)|'\\'')*)(?=(?P=mark))"
    rf"|{_NOT_IN_WORD}(?P<person>{_START}[\\/]+(?:{_FOLDER}[\\/]+)*?{_PERSON}[\\/]+{_PERSON_LAST})"
    rf"|{_NOT_IN_WORD}(?P<windows>{_FILE_URL}/?(?:\\\\\?\\)?[A-Za-z]:[\\/]+(?:{_FOLDER}[\\/]+)*{_PART}*)"
    rf"|(?P<unc>\\\\[^\\\s\"']+\\+(?:{_FOLDER}\\+)*{_PART}*)"
    rf"|{_NOT_IN_WORD}(?P<posix>~[\w.-]*/(?:{_FOLDER}/+)*{_PART}*|{_FILE_URL}//?(?:{_FOLDER}{_SLASH})+{_PART}*)"
)
_BUCKETS = re.compile(
    r"(?i)(?:^|\.)(?:s3[\w.-]*\.amazonaws\.com(?:\.cn)?|storage(?:\.cloud)?\.google(?:apis)?\.com"
    r"|(?:blob|dfs|file)\.core\.windows\.net|r2\.cloudflarestorage\.com|r2\.dev"
    r"|digitaloceanspaces\.com|backblazeb2\.com|aliyuncs\.com|myqcloud\.com|wasabisys\.com)$"
)
_HOUSE = re.compile(r"(?i)^[\w-]+$|\.(?:local|lan|internal|intranet|home|corp|localdomain|arpa)$")


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
    # JSON writes letters of other alphabets as escapes, and macOS accents behind their letters.
    text = unicodedata.normalize("NFC", re.sub(r"\\u[0-9a-fA-F]{4}", _letter, text))
    owner = Owner(*(unicodedata.normalize("NFC", part) for part in astuple(owner)))
    for pattern, instead in RULES:
        text = re.sub(pattern, instead, text)
    text = _IPV4.sub("<ip>", _IPV6.sub(_ipv6, text))
    for home in {owner.home, owner.home.replace("\\", "/"), owner.home.replace("\\", "\\\\")}:
        if len(home) > 1:
            text = re.sub(rf"(?i){re.escape(home)}(?!\w)", "~", text)
    text = _PLACES.sub(_shorter, text)
    for name, instead in _names(owner):
        whole_word = rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])"
        text = re.sub(whole_word, instead, text, flags=re.IGNORECASE)
    return text


def _letter(found: re.Match[str]) -> str:
    char = chr(int(found.group()[2:], 16))
    return char if unicodedata.category(char)[0] in "LM" else found.group()


def _ipv6(found: re.Match[str]) -> str:
    try:
        ipaddress.IPv6Address(found["address"])
    except ValueError:  # a time, a place on a bus
        return found.group()
    return "<ip>" if re.search(r"[0-9A-Fa-f]", found["address"]) else found.group()


def _shorter(found: re.Match[str]) -> str:
    if found["url"]:
        return _shorter_url(found["url"])
    if found["account"]:
        return "~<user>"
    if found["person"]:
        return "<path>/<user>"
    path = found["quoted"] or found.group()
    parts = re.split(r"[\\/]+", path.rstrip("\\/"))
    folder = parts[-2] if len(parts) > 1 else ""
    last = "<user>" if re.fullmatch(_PERSON, folder) else parts[-1]
    if path in ("/", "~"):
        return found.group()
    return f"{found['mark'] or ''}<path>/{last}"


def _shorter_url(url: str) -> str:
    scheme, _, rest = url.partition("://")
    place, last = rest.partition("/")[0], rest.rstrip("/").rpartition("/")[2].partition("?")[0]
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:  # half an address
        host = place
    if not re.fullmatch(_PUBLIC, scheme) or _BUCKETS.search(host):
        inside = "/" in rest.rstrip("/")
        return f"{scheme}://<place>" + (f"/{last}" if inside else "")
    # What follows the question mark may be a signature.
    shown = re.sub(r"\?[^\s#]*", "?<query>", rest) if "=" in rest.partition("?")[2] else rest
    if scheme.lower() != "hf" and _HOUSE.search(host) and host != "localhost":
        shown = shown.replace(place, re.sub(r"^[^:]*", "<host>", place.rpartition("@")[2]), 1)
    return f"{scheme}://{shown}"


def _names(owner: Owner) -> list[tuple[str, str]]:
    """Longest first, so that no name is cut apart by a shorter one."""
    first_label = owner.host.partition(".")[0]
    # The folder may have the whole name where the account has its first word.
    folder = re.split(r"[\\/]", owner.home)[-1]
    people = [(name, "<user>") for name in (owner.user, folder)]
    names = [(owner.host, "<host>"), (first_label, "<host>"), *people]
    return sorted((pair for pair in names if len(pair[0]) > 1), key=lambda pair: -len(pair[0]))
