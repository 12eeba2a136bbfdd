"""What a session keeps of its pictures."""

from __future__ import annotations

import hashlib

import pytest
import torch
from PIL import Image

from qwencli.engine.cache import prefix_cache
from qwencli.engine.cache.prefix_cache import VisionCache, page_keys
from qwencli.engine.frontend.preprocess import Visual
from qwencli.engine.layers.vision_tower import VisionFeatures


@pytest.fixture
def look(monkeypatch):
    """Ask one cache for the features of pictures named by single bytes, of 10 tokens each."""
    monkeypatch.setattr(prefix_cache, "VISION_CACHE_BYTES", 25 * 4 * 4)
    cache = VisionCache()

    def ask(names):
        encoded = []
        digests = [bytes([name]) for name in names]

        def encode(indices):
            encoded.extend(names[index] for index in indices)
            return [VisionFeatures(torch.zeros(10, 4), ()) for _ in indices]

        cache.features(digests, encode)
        return bytes(encoded)

    return ask


def test_older_pictures_go_when_their_tokens_are_too_many(look):
    assert look(b"a") == b"a"
    assert look(b"b") == b"b"
    assert look(b"a") == b""
    assert look(b"c") == b"c"  # b is the oldest now, and goes
    assert look(b"a") == b""
    assert look(b"b") == b"b"


def test_the_pictures_of_one_request_stay_however_many_they_are(look):
    assert look(b"abcde") == b"abcde"
    assert look(b"abcde") == b""


def test_a_picture_is_told_by_all_of_its_pixels(monkeypatch):
    picture = Image.effect_noise((37, 23), 90).convert("RGB")
    other = picture.copy()
    other.putpixel((36, 22), (1, 2, 3))
    visual = Visual((1, 2, 2))
    turned = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    for pixels_at_a_time in (prefix_cache._DIGEST_PIXELS, 100, 1):  # one part, and several
        monkeypatch.setattr(prefix_cache, "_DIGEST_PIXELS", pixels_at_a_time)
        whole = prefix_cache._digest(visual, [picture])
        assert prefix_cache._digest(visual, [picture.copy()]) == whole
        assert prefix_cache._digest(visual, [other]) != whole
        assert prefix_cache._digest(visual, [turned]) != whole


def test_equal_pictures_are_equal_whatever_stands_beside_their_pixels():
    """Pillow's RGB has a fourth byte: 0 in a new picture, 255 in one that was read."""
    new = Image.new("RGB", (37, 23))
    read = Image.frombytes("RGB", new.size, bytes(3 * 37 * 23))
    visual = Visual((1, 2, 2))
    assert prefix_cache._digest(visual, [new]) == prefix_cache._digest(visual, [read])


def test_keys_of_pages_are_chained_hashes_of_their_slots():
    keys = [3, (b"picture", 0), (b"picture", 1), 2**40, 5, 6, 7]
    first, second, third = page_keys(keys, 2)
    slots = [(3).to_bytes(8, "little"), b"picture" + bytes(8)]
    assert first == hashlib.sha256(b"".join(slots)).digest()
    assert page_keys(keys[2:4], 2, first) == [second]
    assert page_keys(keys[4:], 2, second) == [third]
    assert page_keys([4, *keys[1:]], 2)[2] != third
