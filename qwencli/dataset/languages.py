"""Which language a text is in, as far as scripts and frequent words tell.

No model and no dependency. Languages of different scripts are told apart in a few words; those of
Latin script in sentences, by their most frequent words. Languages not listed are not told apart
from others of their script.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Language:
    """Args: name: in English. names: how prompts call it. scripts: that it is written in."""

    name: str
    names: str
    scripts: frozenset[str]
    frequent: frozenset[str] = frozenset()


def first_words(text: str, most: int) -> str:
    """The beginning of a text in at most so many characters, without half a word."""
    if len(text) <= most:
        return text
    begin = text[:most]
    return f"{begin.rpartition(' ')[0] or begin} ..."


def last_words(text: str, most: int) -> str:
    """The end of a text in at most so many characters, without half a word."""
    if len(text) <= most:
        return text
    end = text[-most:]
    return f"... {end.partition(' ')[2] or end}"


def _language(name: str, names: str, scripts: str, frequent: str = "") -> Language:
    return Language(name, names, frozenset(scripts.split()), frozenset(frequent.split()))


LANGUAGES = {
    "en": _language(
        "English",
        "english",
        "LATIN",
        "the a an of and is in to with on are that it his her their at from as by this there has "
        "be for which while its into",
    ),
    "de": _language(
        "German",
        "german|deutsch\\w*",
        "LATIN",
        "der die das und ist ein eine einen einem einer mit auf im den dem von zu sich nicht des "
        "für an als auch sind vor aus wird bei",
    ),
    "fr": _language(
        "French",
        "french|français\\w*",
        "LATIN",
        "le la les des et est un une dans du en avec sur qui au pour par il elle que se son sa ses "
        "aux ce cette sont d l",
    ),
    "es": _language(
        "Spanish",
        "spanish|español\\w*|castellano",
        "LATIN",
        "el la los las de y es un una en con que del al por para se su sus está están lo como más "
        "hay sobre",
    ),
    "it": _language(
        "Italian",
        "italian|italiano",
        "LATIN",
        "il lo la gli le di e è un una in con che del della dei al alla per si sono nel nella su "
        "da suo sua",
    ),
    "pt": _language(
        "Portuguese",
        "portuguese|português|portugues",
        "LATIN",
        "o a os as de e é um uma em com que do da dos das no na ao por para se seu sua está são "
        "sobre",
    ),
    "nl": _language(
        "Dutch",
        "dutch|nederlands\\w*",
        "LATIN",
        "de het een en is van in met op te zijn dat die aan voor er naar uit bij door ook",
    ),
    "pl": _language(
        "Polish",
        "polish|polski\\w*|polsku",
        "LATIN",
        "i w na z się jest do nie to o że przez od po za ma ze który która oraz są",
    ),
    "tr": _language(
        "Turkish",
        "turkish|türkçe",
        "LATIN",
        "bir ve bu ile için olan da de çok gibi üzerinde var içinde olarak daha",
    ),
    "vi": _language(
        "Vietnamese",
        "vietnamese|tiếng việt",
        "LATIN",
        "một và của có trong là với được những các người trên đang màu cho",
    ),
    "id": _language(
        "Indonesian",
        "indonesian|bahasa",
        "LATIN",
        "yang dan di dengan dari ini itu untuk pada sebuah seorang ada adalah dalam ke berwarna",
    ),
    "ru": _language("Russian", "russian|русск\\w*", "CYRILLIC"),
    "uk": _language("Ukrainian", "ukrainian|українськ\\w*", "CYRILLIC"),
    "zh": _language("Chinese", "chinese|mandarin|中文|汉语|漢語|简体|繁體", "CJK"),
    "ja": _language("Japanese", "japanese|日本語", "CJK HIRAGANA KATAKANA"),
    "ko": _language("Korean", "korean|한국어", "HANGUL CJK"),
    "ar": _language("Arabic", "arabic|العربية", "ARABIC"),
    "fa": _language("Persian", "persian|farsi|فارسی", "ARABIC"),
    "he": _language("Hebrew", "hebrew|עברית", "HEBREW"),
    "hi": _language("Hindi", "hindi|हिन्दी|हिंदी", "DEVANAGARI"),
    "th": _language("Thai", "thai|ไทย", "THAI"),
    "el": _language("Greek", "greek|ελληνικ\\w*", "GREEK"),
}

_WORD = re.compile(r"[^\W\d_]+")
# Fewer words tell no language of Latin script.
_MIN_WORDS, _MIN_SHARE, _TIMES = 12, 0.12, 2.5
# With so many of its frequent words a text is in a language, whatever else is in it.
_CLEAR = 0.25


def wrong_language(text: str, wanted: str, *, tags: bool = False) -> str | None:
    """What shows that a text is not in the language `wanted`, or None where nothing does.

    Args:
        tags: a list of tags, of which only the script is looked at.
    """
    language = LANGUAGES[wanted]
    counts = scripts(text)
    letters = sum(counts.values())
    foreign = letters - sum(counts[script] for script in language.scripts)
    # Words on signs are quoted in their own script; they are not most of a caption.
    if letters >= 4 and 2 * foreign > letters:
        script = max(counts.keys() - language.scripts, key=lambda name: counts[name])
        return f"{script.capitalize()} script, not {language.name}: {first_words(text.strip(), 60)}"
    if "CJK" in counts and wanted == "ja" and letters >= 30 and not counts["HIRAGANA"]:
        return f"Chinese, not Japanese: {first_words(text.strip(), 60)}"
    if tags or not language.frequent:
        return None
    shares = _shares(text, only=wanted)
    own = shares.get(wanted, 0.0)
    if not shares or own >= _CLEAR:
        return None
    shares = _shares(text)
    best = max(shares, key=lambda code: shares[code])
    if best != wanted and shares[best] >= max(_MIN_SHARE, _TIMES * own):
        return f"{LANGUAGES[best].name}, not {language.name}: {first_words(text.strip(), 60)}"
    return None


@cache
def language_wanted(prompt: str) -> str | None:
    """The language a prompt asks for: the one it names, else its own; None where it tells neither.

    A prompt that names several asks for none of them in particular.
    """
    named = {
        code
        for code, language in LANGUAGES.items()
        if re.search(rf"(?<!\w)(?:{language.names})(?!\w)", prompt, re.IGNORECASE)
        or (not language.names.isascii() and _named_unspaced(language, prompt))
    }
    if named:
        return named.pop() if len(named) == 1 else None
    counts = scripts(prompt)
    if not counts:
        return None
    script = max(counts, key=lambda name: counts[name])
    if counts["HIRAGANA"] + counts["KATAKANA"]:
        return "ja"
    of_script = [code for code, language in LANGUAGES.items() if script in language.scripts]
    if script == "LATIN":
        shares = _shares(prompt, least=1)
        best = max(shares, key=lambda code: shares[code], default=None)
        return best if best is not None and shares[best] > 0 else None
    return of_script[0] if of_script else None


def _named_unspaced(language: Language, prompt: str) -> bool:
    names = (name for name in language.names.split("|") if not name.isascii() and "\\" not in name)
    return any(name in prompt for name in names)


def scripts(text: str) -> Counter[str]:
    """Letters by script, named as Unicode names characters."""
    counts: Counter[str] = Counter()
    for char, times in Counter(text).items():
        if char.isalpha():
            counts[_script(char)] += times
    return counts


@cache
def _script(char: str) -> str:
    return unicodedata.name(char, "UNKNOWN").split()[0].split("-")[0]


def _shares(text: str, least: int = _MIN_WORDS, only: str | None = None) -> dict[str, float]:
    """By language of Latin script, how much of the text are its frequent words.

    Args:
        least: words that a text must have; of fewer nothing is said.
        only: the one language that is asked about.
    """
    said = [word.casefold() for word in _WORD.findall(text)]
    if len(said) < least:
        return {}
    return {
        code: _count(said, language.frequent) / len(said)
        for code, language in LANGUAGES.items()
        if language.frequent and only in (None, code)
    }


def _count(said: Iterable[str], frequent: frozenset[str]) -> int:
    return sum(word in frequent for word in said)
