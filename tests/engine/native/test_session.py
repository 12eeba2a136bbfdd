"""What a session keeps of its pictures."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from qwencli.engine.frontend.preprocess import Visual
from qwencli.engine.native import session
from qwencli.engine.native.session import FeatureCache
from qwencli.engine.native.vision import VisionFeatures


@pytest.fixture
def look(monkeypatch):
    """Ask one cache for the features of pictures named by single bytes, of 10 tokens each."""
    monkeypatch.setattr(session, "KEPT_IMAGE_TOKENS", 25)
    cache = FeatureCache()

    def ask(names):
        encoded = []
        digests = [bytes([name]) for name in names]

        def encode(index):
            encoded.append(names[index])
            return VisionFeatures(torch.zeros(10, 4), ())

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
    whole = session._digest(visual, [picture])
    assert session._digest(visual, [other]) != whole
    monkeypatch.setattr(session, "_DIGEST_PIXELS", 100)
    assert session._digest(visual, [picture]) == whole
