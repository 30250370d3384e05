"""A simulation of PyTorch's CUDA caching allocator; it needs no GPU.

The rules are those of c10/cuda/CUDACachingAllocator.cpp, torch 2.11 to 2.13. With the driver's own addresses, they put every
block of recorded runs in its recorded place (`tests/recordings/h200_allocator.jsonl`).
The file simulates one device, with a pool of small blocks and a pool of large blocks for each stream.
It does not simulate streams that use each other's blocks (`record_stream`) or pools of CUDA graphs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Any

from autoaccum.simulate.allocator_settings import UNLIMITED, Settings
from autoaccum.units import MIB, in_words

LEAST = 512  # bytes; every block size is a multiple of it
SMALL = MIB  # requests up to this size use the small pool
SMALL_SEGMENT = 2 * MIB
OWN_SEGMENT = 10 * MIB  # a request of this size or more gets a segment of its own size, rounded up to 2 MiB

# Called for each change of a segment with the action ("alloc", "free", "map" or "unmap"), the address and the bytes.
Observer = Callable[[str, int, int], None]


class Block:
    """A piece of a segment: `size` bytes at `address`. The caller requested `requested` bytes of them.

    base: the start address of an expandable segment; None in other segments.
    live: True while the block is allocated. mapped: False for the part of an expandable segment that has no memory yet.
    """

    __slots__ = ("address", "age", "base", "following", "live", "mapped", "pool", "preceding", "requested", "size")

    def __init__(self, size: int, pool: Pool, address: int, base: int | None = None, *, mapped: bool = True) -> None:
        self.size, self.pool, self.address, self.base, self.mapped = size, pool, address, base, mapped
        self.requested = 0
        self.age = 0
        self.live = False
        self.preceding: Block | None = None
        self.following: Block | None = None

    @property
    def whole(self) -> bool:
        """True for a block that is a whole segment: it was never split, or its parts have merged again."""
        return self.preceding is None and self.following is None


class Pool:
    """The free blocks of one kind (small or large) on one stream, sorted by size and then by address."""

    __slots__ = ("allocated", "allocated_peak", "blocks", "free", "requested", "reserved", "reserved_peak", "searches", "segments", "small", "unmapped")

    def __init__(self, small: bool) -> None:
        self.small = small
        self.free: list[tuple[int, int, Block]] = []
        self.unmapped: list[tuple[int, Block]] = []
        self.searches = self.allocated = self.allocated_peak = self.requested = self.reserved = self.reserved_peak = self.blocks = self.segments = 0

    def add(self, block: Block) -> None:
        block.age = self.searches
        insort(self.free, (block.size, block.address, block))

    def remove(self, block: Block) -> None:
        del self.free[bisect_left(self.free, (block.size, block.address))]

    def add_unmapped(self, block: Block) -> None:
        insort(self.unmapped, (block.address, block))

    def remove_unmapped(self, block: Block) -> None:
        del self.unmapped[bisect_left(self.unmapped, (block.address,))]


class Allocator:
    """Allocates and frees blocks of a simulated card, and raises `torch.OutOfMemoryError` when the card would.

    total_bytes: the memory of the card. available_bytes: the part outside the CUDA context; default `total_bytes`.
    place: returns the address at which the driver puts a segment of that many bytes. The address matters: if several free
    blocks have the same size, the allocator takes the one at the lowest address. By default each new segment lies below all
    earlier ones, as on an H200 (driver 580). With this default, all but 13 of 327 recorded jobs reserve exactly as many bytes
    as with the real addresses. With ascending addresses 77 jobs differ, by up to 15 %.
    `allocated_bytes`, `reserved_bytes`, `requested_bytes` and their peaks mean the same as in `torch.cuda.memory_stats`.
    `retries` counts flushes of the cache.
    """

    def __init__(
        self,
        total_bytes: int = UNLIMITED,
        *,
        available_bytes: int | None = None,
        settings: Settings | None = None,
        name: str = "",
        place: Callable[[int], int] | None = None,
    ) -> None:
        self.total_bytes = total_bytes
        self.available_bytes = total_bytes if available_bytes is None else available_bytes
        self.settings = settings or Settings()
        self.name = name
        self.allocated_bytes = self.reserved_bytes = self.requested_bytes = 0
        self.peak_allocated_bytes = self.peak_reserved_bytes = self.peak_requested_bytes = 0
        self.retries = self.ooms = self.allocations = self.frees = 0
        self.observer: Observer | None = None
        self._live: dict[int, Block] = {}
        self._pools: dict[Any, tuple[Pool, Pool]] = {}
        self._new_pools(0)
        self._place = place or self._address_below
        self._lowest = 1 << 47
        self.limit_bytes = UNLIMITED
        if self.settings.memory_fraction is not None:
            self.set_fraction(self.settings.memory_fraction)
        self._rounds = any(self.settings.roundup_divisions)

    def set_fraction(self, fraction: float | None) -> None:
        """Does the same as `torch.cuda.set_per_process_memory_fraction`. None removes the limit."""
        self.limit_bytes = UNLIMITED if fraction is None else int(fraction * self.total_bytes)

    # -- public methods --

    def malloc(self, nbytes: int, stream: Any = 0) -> Block:
        """Allocates a block of at least `nbytes`. Raises `torch.OutOfMemoryError` if that is not possible."""
        size = self.rounded(nbytes)
        small, large = self._pools.get(stream) or self._new_pools(stream)
        pool = small if size <= SMALL else large
        pool.searches += 1
        block = self._best_fit(pool, size) or self._new_block(pool, size)
        if block is None:
            self.ooms += 1
            raise self._out_of_memory(nbytes)
        remainder = block.size - size
        if remainder and self._splits(pool, block, size, remainder):
            head = Block(size, pool, block.address, block.base)
            head.preceding, head.following = block.preceding, block
            if head.preceding is not None:
                head.preceding.following = head
            block.preceding = head
            block.address += size
            block.size = remainder
            age = block.age  # the remainder keeps the age of the free block
            pool.add(block)
            block.age = age
            block = head
        block.live = True
        block.requested = nbytes
        self._live[block.address] = block
        block_bytes = block.size
        pool.blocks += 1
        pool.requested += nbytes
        pool.allocated += block_bytes
        if pool.allocated > pool.allocated_peak:
            pool.allocated_peak = pool.allocated
        self.allocations += 1
        self.allocated_bytes += block_bytes
        self.requested_bytes += nbytes
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        if self.requested_bytes > self.peak_requested_bytes:
            self.peak_requested_bytes = self.requested_bytes
        return block

    def free(self, block: Block) -> None:
        """Frees a block and merges it with its free neighbours."""
        pool = block.pool
        block.live = False
        del self._live[block.address]
        self.frees += 1
        self.allocated_bytes -= block.size
        self.requested_bytes -= block.requested
        pool.blocks -= 1
        pool.allocated -= block.size
        pool.requested -= block.requested
        self._merge(block, block.preceding)
        self._merge(block, block.following)
        pool.add(block)

    def empty_cache(self) -> None:
        """Does the same as `torch.cuda.empty_cache`.

        It releases every free block that is a whole segment, and unmaps the free pages of expandable segments.
        """
        for pair in self._pools.values():
            for pool in reversed(pair):
                for _, _, block in list(pool.free):
                    if block.base is not None:
                        self._unmap(block)
                    elif block.whole:
                        self._release(block)

    def reset_peaks(self) -> None:
        """Does the same as `torch.cuda.reset_peak_memory_stats`."""
        self.peak_allocated_bytes, self.peak_reserved_bytes, self.peak_requested_bytes = self.allocated_bytes, self.reserved_bytes, self.requested_bytes
        for pair in self._pools.values():
            for pool in pair:
                pool.allocated_peak, pool.reserved_peak = pool.allocated, pool.reserved

    def memory_stats(self) -> dict[str, int]:
        """The simulated figures of `torch.cuda.memory_stats`, with the same keys."""
        pools = [pool for pair in self._pools.values() for pool in pair]
        idle = sum(size for pool in pools for size, _, block in pool.free if block.base is None and not block.whole)
        stats = {
            "allocated_bytes.all.current": self.allocated_bytes,
            "allocated_bytes.all.peak": self.peak_allocated_bytes,
            "active_bytes.all.current": self.allocated_bytes,
            "active_bytes.all.peak": self.peak_allocated_bytes,
            "requested_bytes.all.current": self.requested_bytes,
            "requested_bytes.all.peak": self.peak_requested_bytes,
            "reserved_bytes.all.current": self.reserved_bytes,
            "reserved_bytes.all.peak": self.peak_reserved_bytes,
            "inactive_split_bytes.all.current": idle,
            "allocation.all.current": sum(pool.blocks for pool in pools),
            "allocation.all.allocated": self.allocations,
            "allocation.all.freed": self.frees,
            "segment.all.current": sum(pool.segments for pool in pools),
            "num_alloc_retries": self.retries,
            "num_ooms": self.ooms,
        }
        for kind, small in (("small_pool", True), ("large_pool", False)):
            matching = [pool for pool in pools if pool.small is small]
            stats[f"allocated_bytes.{kind}.current"] = sum(pool.allocated for pool in matching)
            stats[f"reserved_bytes.{kind}.current"] = sum(pool.reserved for pool in matching)
            stats[f"segment.{kind}.current"] = sum(pool.segments for pool in matching)
        return stats

    def blocks(self) -> list[Block]:
        """All blocks of all segments, also free and unmapped ones, sorted by address."""
        blocks = list(self._live.values())
        for pair in self._pools.values():
            for pool in pair:
                blocks += [*(block for _, _, block in pool.free), *(block for _, block in pool.unmapped)]
        return sorted(blocks, key=lambda block: block.address)

    def rounded(self, nbytes: int) -> int:
        """The size of the block for a request of `nbytes`, in bytes."""
        if nbytes < LEAST:
            return LEAST
        if self._rounds:
            divisions = self.settings.roundup_divisions[min(max(nbytes.bit_length() - 21, 0), 15)]
            if divisions > 1 and nbytes > LEAST * divisions:
                if nbytes & (nbytes - 1) == 0:
                    return nbytes
                floor = 1 << (nbytes.bit_length() - 1)
                step = floor >> (divisions.bit_length() - 1)
                return floor << 1 if step == 0 else -(-nbytes // step) * step
        return (nbytes + 511) & ~511

    # -- the allocator's rules --

    def _address_below(self, nbytes: int) -> int:
        self._lowest -= nbytes + SMALL_SEGMENT
        return self._lowest

    def _new_pools(self, stream: Any) -> tuple[Pool, Pool]:
        self._pools[stream] = Pool(True), Pool(False)
        return self._pools[stream]

    def _segment_bytes(self, size: int) -> int:
        if size <= SMALL:
            return SMALL_SEGMENT
        return self.settings.large_segment_bytes if size < OWN_SEGMENT else -(-size // SMALL_SEGMENT) * SMALL_SEGMENT

    def _best_fit(self, pool: Pool, size: int) -> Block | None:
        free = pool.free
        index = bisect_left(free, (size,))
        if index == len(free):
            return None
        block = free[index][2]
        if block.base is not None:  # prefer the block that is the smallest after it has grown
            while index + 1 < len(free) and _room(free[index + 1][2]) < _room(block):
                index += 1
                block = free[index][2]
        settings = self.settings
        if settings.max_split_bytes != UNLIMITED:
            if size < settings.max_split_bytes <= block.size:
                return None  # a small request must not take an oversize block, which is never split
            if size >= settings.max_split_bytes and block.size >= size + settings.max_non_split_rounding_bytes:
                return None
        del free[index]
        return block

    def _splits(self, pool: Pool, block: Block, size: int, remainder: int) -> bool:
        if pool.small or block.base is not None:
            return remainder >= LEAST
        return size < self.settings.max_split_bytes and remainder > SMALL

    def _new_block(self, pool: Pool, size: int) -> Block | None:
        """Reserves new memory for a request that fits no free block.

        If that fails, it first releases oversize blocks, and then flushes the whole cache.
        """
        settings = self.settings
        if settings.garbage_collection_threshold and self.limit_bytes != UNLIMITED:
            self._collect_garbage()
        block = self._new_segment(pool, size)
        if block is not None or settings.throw_on_oom:
            return block
        if self._release_oversize(pool, size):
            block = self._new_segment(pool, size)
        if block is None:
            self.empty_cache()
            self.retries += 1
            block = self._new_segment(pool, size)
        return block

    def _new_segment(self, pool: Pool, size: int) -> Block | None:
        segment_bytes = self._segment_bytes(size)
        if self.reserved_bytes + segment_bytes > self.limit_bytes:
            return None
        if self.settings.expandable_segments:
            return self._expand(pool, size)
        if not self._reserve(pool, segment_bytes):
            return None
        block = Block(segment_bytes, pool, self._place(segment_bytes))
        pool.segments += 1
        if self.observer is not None:
            self.observer("alloc", block.address, segment_bytes)
        return block

    def _reserve(self, pool: Pool, nbytes: int) -> bool:
        after = self.reserved_bytes + nbytes
        if after > self.available_bytes:
            return False
        self.reserved_bytes = after
        pool.reserved += nbytes
        if after > self.peak_reserved_bytes:
            self.peak_reserved_bytes = after
        if pool.reserved > pool.reserved_peak:
            pool.reserved_peak = pool.reserved
        return True

    def _merge(self, block: Block, neighbour: Block | None) -> None:
        """Makes `neighbour` a part of `block`, if both are free, and both are mapped or both are not."""
        if neighbour is None or neighbour.live or neighbour.mapped != block.mapped:
            return
        if neighbour.mapped:
            neighbour.pool.remove(neighbour)
        else:
            neighbour.pool.remove_unmapped(neighbour)
        if block.preceding is neighbour:
            block.address = neighbour.address
            block.preceding = neighbour.preceding
            if block.preceding is not None:
                block.preceding.following = block
        else:
            block.following = neighbour.following
            if block.following is not None:
                block.following.preceding = block
        block.size += neighbour.size

    def _release(self, block: Block) -> None:
        block.pool.remove(block)
        block.pool.reserved -= block.size
        block.pool.segments -= 1
        self.reserved_bytes -= block.size
        if self.observer is not None:
            self.observer("free", block.address, block.size)

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        oversize = self.settings.max_split_bytes
        if oversize == UNLIMITED:
            return False
        wanted = max(size, oversize)
        index = bisect_left(pool.free, (wanted,))
        while index < len(pool.free) and not pool.free[index][2].whole:
            index += 1
        if index < len(pool.free):
            self._release(pool.free[index][2])
            return True
        released = 0
        for _, _, block in [entry for entry in reversed(pool.free) if entry[0] >= oversize and entry[2].whole]:
            if released >= wanted:
                break
            released += block.size
            self._release(block)
        return released >= wanted

    def _collect_garbage(self) -> None:
        """Releases whole large segments that have been free for the average time or longer, to keep the threshold."""
        wanted = self.reserved_bytes - int(self.settings.garbage_collection_threshold * self.limit_bytes)
        released, freed = 0, True
        while released < wanted and freed:
            idle = [(pool.searches - block.age, block) for _, pool in self._pools.values() for _, _, block in pool.free if block.whole and block.base is None]
            average = sum(age for age, _ in idle) / max(len(idle), 1)
            freed = False
            for age, block in idle:
                if age >= average:
                    released += block.size
                    self._release(block)
                    freed = True

    # -- expandable segments: one reserved range of addresses; pages are mapped when they are needed --

    def _page(self, pool: Pool) -> int:
        return SMALL_SEGMENT if pool.small else self.settings.large_segment_bytes

    def _expand(self, pool: Pool, size: int) -> Block | None:
        start = self._growable(pool, size)
        page = self._page(pool)
        if start is None:
            card_bytes = self.total_bytes if self.total_bytes < 1 << 50 else 1 << 40
            reserved = -(-card_bytes * 9 // 8 // page) * page
            base = self._place(reserved)
            start = Block(reserved, pool, base, base, mapped=False)
            pool.add_unmapped(start)
            pool.segments += 1
        if not start.mapped and not self._map(start, min(start.size, size), page):
            return None
        while start.size < size:
            following = start.following
            assert following is not None  # `_growable` checked that there is room
            if not self._map(following, min(size - start.size, following.size), page):
                return None
            start = following  # `_map` merged it with the mapped part before it
        pool.remove(start)
        return start

    def _growable(self, pool: Pool, size: int) -> Block | None:
        """The free block at the lowest address that can grow to `size` if the blocks after it are mapped, or None."""
        for _, unmapped in pool.unmapped:
            before = unmapped.preceding
            first = before if before is not None and not before.live else unmapped
            room, neighbour = 0, first
            while room < size and neighbour is not None and not neighbour.live:
                room += neighbour.size
                neighbour = neighbour.following  # type: ignore[assignment]
            if room >= size:
                return first
        return None

    def _map(self, block: Block, nbytes: int, page: int) -> bool:
        nbytes = min(-(-nbytes // page) * page, block.size)
        pool = block.pool
        if not self._reserve(pool, nbytes):
            return False
        pool.remove_unmapped(block)
        block.mapped = True
        if nbytes < block.size:
            remainder = Block(block.size - nbytes, pool, block.address + nbytes, block.base, mapped=False)
            remainder.preceding, remainder.following = block, block.following
            if remainder.following is not None:
                remainder.following.preceding = remainder
            block.following = remainder
            block.size = nbytes
            pool.add_unmapped(remainder)
        if self.observer is not None:
            self.observer("map", block.address, nbytes)
        self._merge(block, block.preceding)
        self._merge(block, block.following)
        pool.add(block)
        return True

    def _unmap(self, block: Block) -> None:
        """Unmaps the pages that lie completely inside a free block."""
        pool, base, page = block.pool, block.base or 0, self._page(block.pool)
        low = base + -(-(block.address - base) // page) * page
        high = base + (block.address + block.size - base) // page * page
        if low >= high:
            return
        pool.remove(block)
        for address, nbytes, before in ((block.address, low - block.address, True), (high, block.address + block.size - high, False)):
            if not nbytes:
                continue
            part = Block(nbytes, pool, address, block.base)
            if before:
                part.preceding, part.following = block.preceding, block
            else:
                part.preceding, part.following = block, block.following
            if part.preceding is not None:
                part.preceding.following = part
            if part.following is not None:
                part.following.preceding = part
            pool.add(part)
        block.address, block.size, block.mapped = low, high - low, False
        self.reserved_bytes -= block.size
        pool.reserved -= block.size
        if self.observer is not None:
            self.observer("unmap", block.address, block.size)
        self._merge(block, block.preceding)
        self._merge(block, block.following)
        pool.add_unmapped(block)

    def _out_of_memory(self, nbytes: int) -> Exception:
        import torch  # only for the exception class: without an out-of-memory the allocator needs no torch

        free = max(min(self.available_bytes, self.limit_bytes) - self.reserved_bytes, 0)
        return torch.OutOfMemoryError(
            f"CUDA out of memory. Tried to allocate {in_words(self._segment_bytes(self.rounded(nbytes)))}. {self.name or 'The virtual GPU'} has a total capacity of "
            f"{in_words(self.total_bytes)} of which {in_words(free)} is free. Of the allocated memory {in_words(self.allocated_bytes)} is allocated by "
            f"PyTorch, and {in_words(self.reserved_bytes - self.allocated_bytes)} is reserved by PyTorch but unallocated. (virtual GPU)"
        )


def _room(block: Block) -> int:
    following = block.following
    return block.size + (following.size if following is not None and not following.mapped else 0)
