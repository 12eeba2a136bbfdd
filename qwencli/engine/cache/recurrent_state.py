"""States of one size that a sequence has in place of keys and values, in the layers that keep such.

A state lies in a slot: one for each sequence that runs, and one for each beginning that is kept
for others to go on from (`SnapshotPool`). Slot 0 belongs to idle rows. A state holds all tokens up
to one place and cannot be cut back, so a beginning is only of use at a place where it was kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch

from qwencli.engine.device_memory import lazy_zeros
from qwencli.engine.ops.gated_delta import TAPS, DeltaState, DeltaUpdates
from qwencli.models.shapes import TextShape

# Idle rows name it, and nothing reads what they find there.
SCRATCH_SLOT = 0


class RecurrentStates:
    """States of all gated delta nets of a model: `recurrent` float32 [L, slots, heads, K, V], and
    `conv` [L, slots, RING, C], earlier inputs of the convolutions.

    Args:
        dtype: of what the convolutions see.
        step_tokens: of a row in the longest step: RING is so many and three.
        checked_tokens: of all rows in a step that checks drafts, at most; 0 = there is none.
    """

    def __init__(
        self,
        shape: TextShape,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        step_tokens: int = 1,
        checked_tokens: int = 0,
    ) -> None:
        delta = shape.delta
        assert delta is not None, "only models with such layers have states"
        self.num_slots = num_slots
        sides = len(shape.delta_layers), num_slots
        heads = delta.num_v_heads, delta.k_head_dim, delta.v_head_dim
        self.recurrent = lazy_zeros((*sides, *heads), torch.float32, device)
        self.conv = lazy_zeros((*sides, TAPS - 1 + step_tokens, delta.conv_dim), dtype, device)
        # By index of the layer in the decoder, in the same memory.
        self.layers = {
            layer: DeltaState(self.conv[place], self.recurrent[place])
            for place, layer in enumerate(shape.delta_layers)
        }
        # What tokens of the last step that checked drafts would do to the states.
        self._updates: DeltaUpdates | None = None
        if checked_tokens:
            keys = delta.num_k_heads, delta.k_head_dim
            values = delta.num_v_heads, delta.v_head_dim
            self._updates = DeltaUpdates.empty(
                len(shape.delta_layers), 1, checked_tokens, keys, values, device
            )

    def updates(self, rows: int, tokens: int) -> DeltaUpdates:
        """The buffers, of all layers, for a step that checks `tokens` tokens of each row."""
        assert self._updates is not None, "made for steps of one token a row"
        return self._updates.shaped(rows, tokens)

    def by_layer(self, updates: DeltaUpdates) -> Mapping[int, DeltaUpdates]:
        """By index of the layer in the decoder, as `layers`."""
        return {layer: updates.of_layer(place) for place, layer in enumerate(self.layers)}

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy the states of slots to others, (from, to), in this order."""
        for source, place in copies:
            for state in (self.recurrent, self.conv):
                state[:, place].copy_(state[:, source])


class SnapshotPool:
    """Slots 1 to `num_slots` - 1: who has which, and the beginnings that are kept in those left.

    A sequence always gets a slot (`allocate`): there are as many as rows, and what is kept gives
    way to it, what was not used for longest first.
    """

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, SCRATCH_SLOT, -1))
        self._kept: OrderedDict[bytes, int] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._kept)

    def allocate(self) -> int | None:
        """A slot of nobody else's, or None where sequences have them all."""
        if not self._free and self._kept:
            _, slot = self._kept.popitem(last=False)
            return slot
        return self._free.pop() if self._free else None

    def free(self, slot: int) -> None:
        self._free.append(slot)

    def keep(self, key: bytes) -> int | None:
        """A slot for the state after the tokens of `key`, found by it from now on; None
        where one is there already, or no slot is left."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return None
        slot = self.allocate()
        if slot is not None:
            self._kept[key] = slot
        return slot

    def give(self, key: bytes, slot: int) -> None:
        """Keep the state of a sequence that is over where it is, found by `key` from now on."""
        if key in self._kept:
            self.free(slot)
        else:
            self._kept[key] = slot

    def claim(self, key: bytes) -> int | None:
        """The slot of a state that is kept, for one sequence to go on from: it is found no more."""
        return self._kept.pop(key, None)

    def forget(self, key: bytes) -> None:
        """What was to be kept has not come to be."""
        slot = self._kept.pop(key, None)
        if slot is not None:
            self._free.append(slot)

    def find(self, keys: Sequence[bytes]) -> tuple[int, int | None]:
        """How many of these keys, one after the other, the longest beginning that is kept stands
        for, and its slot."""
        for count in range(len(keys), 0, -1):
            slot = self._kept.get(keys[count - 1])
            if slot is not None:
                self._kept.move_to_end(keys[count - 1])
                return count, slot
        return 0, None
