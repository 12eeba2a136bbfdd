"""What a session keeps of its pictures."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from qwencli.engine.cache import prefix_cache
from qwencli.engine.cache.prefix_cache import VisionCache
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
    whole = prefix_cache._digest(visual, [picture])
    assert prefix_cache._digest(visual, [other]) != whole
    monkeypatch.setattr(prefix_cache, "_DIGEST_PIXELS", 100)
    assert prefix_cache._digest(visual, [picture]) == whole
