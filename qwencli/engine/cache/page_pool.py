"""Which pages of the KV pool are free. The pages' contents are `paged_kv`'s."""

from __future__ import annotations

# Tokens of a page. A row of 300 tokens wastes half a page, a tenth; what attention reads of a page
# is one stretch of memory.
PAGE_SIZE = 64
# Rows that nothing uses write here, and nothing reads it.
SCRATCH_PAGE = 0


class PagePool:
    """Pages 1 to `num_pages` - 1, handed out lowest first; page 0 belongs to idle rows."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, SCRATCH_PAGE, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Pages that one sequence could have at most."""
        return self.num_pages - 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, or None where fewer are free."""
        if count > len(self._free):
            return None
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken[::-1]

    def free(self, pages: list[int]) -> None:
        """Give pages back; the last freed are the first to be used again."""
        self._free.extend(reversed(pages))


def pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)
