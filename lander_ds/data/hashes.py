"""Remembering many sentences in little memory: 64-bit hashes instead of text."""

from __future__ import annotations

import hashlib
from array import array


def text_hash(text: str) -> int:
    """64 bits of BLAKE2b of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class HashSet:
    """A set of 64-bit hashes: open addressing in one array, at most 24 bytes each (Python's set: about 100).

    The chance that a new text is taken for a known one is n / 2^64, one in 18 billion for a billion texts.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 1024))
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, value: int) -> bool:
        return self._slots[self._slot(value or 1)] != 0

    def add(self, value: int) -> bool:
        """Remember `value`; returns whether it is new."""
        value = value or 1  # 0 marks a free slot
        slot = self._slot(value)
        if self._slots[slot]:
            return False
        self._slots[slot] = value
        self._size += 1
        if 3 * self._size > 2 * len(self._slots):
            self._grow()
        return True

    def _slot(self, value: int) -> int:
        slots, mask = self._slots, len(self._slots) - 1
        slot = value & mask
        while slots[slot] and slots[slot] != value:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        old = self._slots
        self._slots = array("Q", bytes(16 * len(old)))
        for value in old:
            if value:
                self._slots[self._slot(value)] = value
