from hypothesis import given
from hypothesis import strategies as st

from qwencli.engine.native.decode_state import bucket_for, buckets_between


@given(st.integers(0, 100_000), st.integers(1, 100_000))
def test_a_bucket_contains_its_slot_and_wastes_little(slot, extra):
    limit = slot + extra
    bucket = bucket_for(slot, limit)
    assert slot < bucket <= limit
    assert bucket - slot <= max(256, (slot + 1) // 4 + 1)


@given(st.integers(0, 20_000), st.integers(0, 3000), st.integers(1, 5000))
def test_buckets_between_are_those_of_every_slot(first, length, extra):
    limit = first + length + extra
    wanted = {bucket_for(slot, limit) for slot in range(first, first + length + 1)}
    assert set(buckets_between(first, first + length, limit)) == wanted
