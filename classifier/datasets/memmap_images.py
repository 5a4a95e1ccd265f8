"""Images that are not held in memory."""

import mmap
from collections.abc import Iterator

import torch
from torch import Tensor


class MemmapImages:
    """Images of a cache that stay on disk; used like a tensor, uint8 (N, 3, S, S).

    A slice, and `select`, give another such view; any other index gives a tensor.

    Attributes:
        store: all images of the cache, uint8 (M, 3, S, S), mapped from its file.
        rows: which of them these are, int64 (N,).
        mapping: the memory map under `store`.
    """

    def __init__(self, store: Tensor, rows: Tensor, mapping: mmap.mmap):
        self.store = store
        self.rows = rows
        self.mapping = mapping

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.store.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Tensor | slice) -> "MemmapImages":
        """A view of the images at these indices."""
        return MemmapImages(self.store, self.rows[indices], self.mapping)

    def __getitem__(self, index: Tensor | slice | int) -> "Tensor | MemmapImages":
        if isinstance(index, slice):
            return self.select(index)
        return self.store[self.rows[index]]

    def read(self, indices: Tensor) -> Tensor:
        """These images (int64 (N,), on the CPU), read from the disk."""
        return self.store[self.rows[indices]]

    def split(self, count: int) -> Iterator[Tensor]:
        """Tensors of `count` images each; the last one may hold fewer."""
        for rows in self.rows.split(count):
            yield self.store[rows]

    def to(self, device: torch.device | str) -> "MemmapImages":
        """The images stay where they are: only batches are moved to the device.

        From now on they are read in random order, so the system is told not to read ahead. Where
        memory was short, reading ahead made that fifteen times slower.
        """
        if hasattr(mmap, "MADV_RANDOM"):
            self.mapping.madvise(mmap.MADV_RANDOM)
        return self
