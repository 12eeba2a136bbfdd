"""What a sequence of requests can share: keys and values of a common beginning, image features."""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL.Image import Image

from qwencli.engine.cache.kv_cache import KVCache
from qwencli.engine.frontend.preprocess import Visual, pixels_of
from qwencli.engine.frontend.prompt import Prompt
from qwencli.engine.layers.vision_tower import VisionFeatures
from qwencli.engine.machine.host import usable_cores
from qwencli.engine.request import Key

# Places in a list of pictures -> the features of each.
Encode = Callable[[list[int]], Iterable[VisionFeatures]]

# Features that stay on the device for later requests: four megapixels of a 4B model. A count of
# pictures would bound nothing, as one may have sixteen times as many tokens as another.
VISION_CACHE_BYTES = 96 * 2**20
# Pixels that a thread copies and digests at a time to tell a picture from others, and the threads:
# one takes 5 ms for a picture of 1920x1080, for which the device would wait.
_DIGEST_PIXELS, _DIGEST_THREADS = 2**17, 8
# Glimpses that are remembered, each of a grid of pixels, and the pixels of a side of it.
GLIMPSES_KEPT, _GLIMPSE_SIDE = 1024, 16


class PrefixCache:
    """The keys and values in a cache, and which tokens they belong to."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self._keys: list[Key] = []

    def reuse(self, keys: Sequence[Key]) -> int:
        """Keep what the new prompt shares with the cache and return its length.

        At least the last token is left to run, because its logits are wanted.
        """
        shared = 0
        for old, new in zip(self._keys, keys[:-1], strict=False):
            if old != new:
                break
            shared += 1
        self.forget_after(shared)
        return shared

    def forget_after(self, length: int) -> None:
        """At most the first `length` slots are valid from here on."""
        del self._keys[length:]
        self.cache.truncate(len(self._keys))

    def remember(self, keys: Sequence[Key]) -> None:
        """Note the keys of the slots that are now written, from the first slot on."""
        self._keys = list(keys)
        self.cache.truncate(len(self._keys))


class VisionCache:
    """Features of recent pictures, by content, so that another turn or request does not encode
    them again.

    All pictures that were last asked for stay, and of those before as many as `VISION_CACHE_BYTES`
    has room for.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, VisionFeatures] = OrderedDict()
        self._glimpsed: set[Hashable] = set()

    def features_of(self, pictures: PictureKeys, encode: Encode) -> list[VisionFeatures]:
        """`features`; pictures that no earlier one looks like are told from others once they are on
        their way, while the device encodes them."""
        glimpses = pictures.glimpses
        looks_known = len(set(glimpses)) < len(glimpses) or not self._glimpsed.isdisjoint(glimpses)
        if len(self._glimpsed) >= GLIMPSES_KEPT:
            self._glimpsed.clear()
        self._glimpsed.update(glimpses)
        if looks_known or not glimpses:
            return self.features(pictures.digests, encode)
        made = list(encode(list(range(len(glimpses)))))
        return self.features(pictures.digests, lambda missing: [made[index] for index in missing])

    def get(self, digest: bytes) -> VisionFeatures | None:
        return self._kept.get(digest)

    def features(self, digests: Sequence[bytes], encode: Encode) -> list[VisionFeatures]:
        """Features of each picture; `encode` makes those that are missing, each content once."""
        missing = {
            digest: index for index, digest in enumerate(digests) if digest not in self._kept
        }
        if missing:
            made = encode(list(missing.values()))
            self._kept.update(zip(missing, made, strict=True))
        for digest in digests:
            self._kept.move_to_end(digest)
        found = [self._kept[digest] for digest in digests]
        size = sum(_bytes_of(kept) for kept in self._kept.values())
        while size > VISION_CACHE_BYTES and len(self._kept) > len(set(digests)):
            _, dropped = self._kept.popitem(last=False)
            size -= _bytes_of(dropped)
        return found

    def clear(self) -> None:
        self._kept.clear()
        self._glimpsed.clear()


class PictureKeys:
    """What tells a prompt's pictures and videos from others.

    Args:
        prompt: its patches may be gone before `digests` are asked for, its frames may not.
    """

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt

    @functools.cached_property
    def digests(self) -> list[bytes]:
        """`digests_of` them, when they are first asked for."""
        return digests_of(self._prompt)

    @functools.cached_property
    def glimpses(self) -> list[Hashable]:
        """A key made of a few pixels of each picture: unequal keys mean unequal pictures."""
        if self._prompt.inputs is None:
            return []
        return [
            (visual, frames[0].size, *map(_glimpse, frames))
            for visual, frames in zip(
                self._prompt.inputs.visuals, self._prompt.inputs.frames, strict=True
            )
        ]


def _glimpse(frame: Image) -> bytes:
    pixels = pixels_of(frame)
    rows, columns = (max(size // _GLIMPSE_SIDE, 1) for size in pixels.shape[:2])
    return pixels[::rows, ::columns, :3].tobytes()


def _bytes_of(features: VisionFeatures) -> int:
    return sum(layer.nbytes for layer in (features.embeds, *features.deepstack))


def digests_of(prompt: Prompt) -> list[bytes]:
    """A digest for each picture or video: of its frames, and of the grid they are cut into."""
    if prompt.inputs is None:
        return []
    return [
        _digest(visual, frames)
        for visual, frames in zip(prompt.inputs.visuals, prompt.inputs.frames, strict=True)
    ]


def _digest(visual: Visual, frames: Sequence[Image]) -> bytes:
    digest = hashlib.sha256(repr((visual, frames[0].size)).encode())
    rows = max(_DIGEST_PIXELS // frames[0].width, 1)
    for frame in frames:
        pixels = pixels_of(frame)
        parts = [pixels[top : top + rows] for top in range(0, frame.height, rows)]
        digests = map(_digest_of, parts) if len(parts) == 1 else _threads().map(_digest_of, parts)
        digest.update(b"".join(digests))
    return digest.digest()


def _digest_of(pixels: npt.NDArray[Any]) -> bytes:
    """The digest of some rows of a picture [rows, width, 3 or 4]."""
    if pixels.shape[-1] == 4:  # of which the fourth is whatever it happens to be
        pixels = pixels.view("<u4") & 0xFFFFFF
    return hashlib.sha256(np.ascontiguousarray(pixels).data).digest()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Neither copies nor digests hold the interpreter's lock."""
    return ThreadPoolExecutor(min(_DIGEST_THREADS, usable_cores()), "digest")


def keys_of(prompt: Prompt, digests: Sequence[bytes]) -> list[Key]:
    """The prompt's slots as keys: equal keys mean equal keys and values in the cache."""
    if prompt.inputs is None:
        return list(prompt.input_ids)
    counts = prompt.inputs.num_tokens
    places = iter(
        [(digest, n) for digest, count in zip(digests, counts, strict=True) for n in range(count)]
    )
    # A prompt with too many image tokens is refused later, with the figures.
    return [
        next(places, token) if kind else token
        for token, kind in zip(prompt.input_ids, prompt.mm_token_type_ids, strict=True)
    ]


def page_keys(keys: Sequence[Key], size: int, before: bytes = b"") -> list[bytes]:
    """A key for each whole page of `size` slots: equal keys mean equal pages, and equal pages in
    front of them, as each is a hash of its slots and of the key before it.

    Args:
        before: the key of the page in front of the first.
    """
    made = []
    # In one piece a page: whoever hashes it needs the interpreter's lock once.
    contents = [
        key.to_bytes(8, "little") if isinstance(key, int) else key[0] + key[1].to_bytes(8, "little")
        for key in keys[: len(keys) // size * size]
    ]
    for end in range(size, len(keys) + 1, size):
        before = hashlib.sha256(b"".join((before, *contents[end - size : end]))).digest()
        made.append(before)
    return made
