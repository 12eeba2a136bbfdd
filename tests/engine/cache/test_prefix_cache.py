"""What a session keeps of its pictures."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from qwencli.engine.cache import prefix_cache
from qwencli.engine.cache.prefix_cache import PictureKeys, VisionCache, page_keys
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


def shown(*pictures: Image.Image) -> PictureKeys:
    visuals = tuple(Visual((1, 2, 2)) for _ in pictures)
    frames = tuple((picture,) for picture in pictures)
    return PictureKeys(SimpleNamespace(inputs=SimpleNamespace(visuals=visuals, frames=frames)))


def test_pictures_that_look_like_none_before_are_encoded_before_they_are_digested(monkeypatch):
    cache, order, digests_of = VisionCache(), [], prefix_cache.digests_of

    def digested(prompt):
        order.append("digest")
        return digests_of(prompt)

    def encode(indices):
        order.append(tuple(indices))
        return [VisionFeatures(torch.full((1, 4), float(index)), ()) for index in indices]

    monkeypatch.setattr(prefix_cache, "digests_of", digested)
    one, other, third = (Image.effect_noise((96, 64), 90 + n).convert("RGB") for n in range(3))
    first = cache.features_of(shown(one, other), encode)
    assert order == [(0, 1), "digest"] and [float(f.embeds[0, 0]) for f in first] == [0.0, 1.0]
    # Which pictures those were is known all the same.
    assert cache.features_of(shown(other), encode)[0] is first[1]
    # What looks like one of them may be it, or may not.
    like = one.copy()
    like.putpixel((95, 63), (1, 2, 3))
    order.clear()
    cache.features_of(shown(like, third), encode)
    assert order == ["digest", (0, 1)]
    # One that comes twice is encoded once.
    order.clear()
    cache.clear()
    found = cache.features_of(shown(third, third), encode)
    assert order == ["digest", (1,)] and found[0] is found[1]
