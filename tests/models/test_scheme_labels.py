from __future__ import annotations

import pytest

from qwencli.models.memory import stored_label, with_activation_bits


@pytest.mark.parametrize(
    ("stored", "weight_bits", "activation_bits", "label"),
    [
        ("none", 16, None, "none"),
        ("bnb-nf4", 4, None, "bnb-nf4"),
        ("int8", 8, 8, "int8-w8a8"),
        ("fp8-e4m3", 8, 16, "fp8-e4m3-w8a16"),
        ("int4-g128", 4, 8, "int4-g128-w4a8"),
    ],
)
def test_labels_go_there_and_back(
    stored: str, weight_bits: int, activation_bits: int | None, label: str
) -> None:
    assert with_activation_bits(stored, weight_bits, activation_bits) == label
    assert stored_label(label) == stored


def test_each_part_of_a_label_has_its_own_ending() -> None:
    assert stored_label("awq-int4-g128-w4a8+none") == "awq-int4-g128+none"
    assert stored_label("int4-g128-w4a8+int8-w8a8") == "int4-g128+int8"
