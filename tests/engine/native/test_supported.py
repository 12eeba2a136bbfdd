from __future__ import annotations

import pytest

from qwencli.engine.native.supported import check_supported
from qwencli.errors import ModelFileError
from qwencli.models.shape_reader import read_shape
from tests.models.test_shape_reader import qwen2_5_vl, qwen3_vl


def test_every_family_as_published_is_supported() -> None:
    check_supported(read_shape(qwen3_vl()))
    check_supported(read_shape(qwen2_5_vl()))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("text_config", "hidden_act"), "gelu", "hidden_act 'gelu' in the text decoder"),
        (("text_config", "rope_scaling", "rope_type"), "linear", "'linear' rotary scaling"),
        (("vision_config", "hidden_act"), "relu", "hidden_act 'relu' in the vision tower"),
    ],
)
def test_what_the_engine_lacks_is_named(path: tuple[str, ...], value: str, said: str) -> None:
    config = qwen3_vl()
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ModelFileError, match=said) as caught:
        check_supported(read_shape(config))
    assert "--engine transformers" in caught.value.hint


def test_a_sliding_window_is_named() -> None:
    config = qwen2_5_vl() | {"use_sliding_window": True, "max_window_layers": 2}
    with pytest.raises(ModelFileError, match="a sliding window"):
        check_supported(read_shape(config))
