"""The caching allocator of torch on CUDA, by its rules, over memory that is not there.

Rules: c10/cuda/CUDACachingAllocator.cpp, torch 2.11 to 2.13; with the driver's own addresses they give every block of
recorded runs its place (`tests/recordings/h200_allocator.jsonl`). One device; a pool of small and one of large blocks for each stream.
Not simulated: streams that use each other's blocks (`record_stream`), pools of CUDA graphs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Any

from autoaccum.simulate.allocator_settings import UNLIMITED, Settings
from autoaccum.units import MIB, in_words

LEAST = 512  # bytes; every block is a multiple
SMALL = MIB  # requests up to this come from the small pool
SMALL_SEGMENT = 2 * MIB
OWN_SEGMENT = 10 * MIB  # from here on a segment is made for the request, rounded up to 2 MiB

# Told of segments: "alloc", "free", "map" or "unmap", the address, the bytes.
Observer = Callable[[str, int, int], None]


class Block:
    """A piece of a segment. `size` bytes at `address`, of which `requested` were asked for.

    A block of an expandable segment knows where that begins (`base`), and is free, handed out, or not mapped yet.
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
        """True for a segment that was never split, or has grown together again."""
        return self.preceding is None and self.following is None


class Pool:
    """Free blocks of one kind on one stream: smallest first, of equal ones the one at the lowest address."""

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
    """Hands out blocks of a card with `total_bytes`, of which `available_bytes` are left beside the context.

    Raises `torch.OutOfMemoryError` where the card would. `allocated_bytes`, `reserved_bytes` and `requested_bytes`
    are what `torch.cuda` reports by these names, with their peaks; `retries` counts flushes of the cache.
    place: the address where the driver puts so many bytes. It matters: of equal free blocks the one at the lowest address is
    taken. By default each new segment lies below all earlier ones, as on an H200 (driver 580): there all but 13 of 327 recorded jobs
    reserve the same to the byte as with the real addresses; with segments that go upwards 77 do not, by up to 15 %.
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
        self._pair(0)
        self._place = place or self._below
        self._lowest = 1 << 47
        self.limit_bytes = UNLIMITED
        if self.settings.memory_fraction is not None:
            self.set_fraction(self.settings.memory_fraction)
        self._rounds = any(self.settings.roundup_divisions)

    def set_fraction(self, fraction: float | None) -> None:
        """As `torch.cuda.set_per_process_memory_fraction`; None lifts the limit."""
        self.limit_bytes = UNLIMITED if fraction is None else int(fraction * self.total_bytes)

    # -- what callers ask --

    def malloc(self, nbytes: int, stream: Any = 0) -> Block:
        """A block of at least `nbytes`. Raises `torch.OutOfMemoryError`."""
        size = self.rounded(nbytes)
        small, large = self._pools.get(stream) or self._pair(stream)
        pool = small if size <= SMALL else large
        pool.searches += 1
        block = self._fitting(pool, size) or self._obtained(pool, size)
        if block is None:
            self.ooms += 1
            raise self._out_of_memory(nbytes)
        rest = block.size - size
        if rest and self._splits(pool, block, size, rest):
            head = Block(size, pool, block.address, block.base)
            head.preceding, head.following = block.preceding, block
            if head.preceding is not None:
                head.preceding.following = head
            block.preceding = head
            block.address += size
            block.size = rest
            age = block.age  # what is left over has been free as long as before
            pool.add(block)
            block.age = age
            block = head
        block.live = True
        block.requested = nbytes
        self._live[block.address] = block
        given = block.size
        pool.blocks += 1
        pool.requested += nbytes
        pool.allocated += given
        if pool.allocated > pool.allocated_peak:
            pool.allocated_peak = pool.allocated
        self.allocations += 1
        self.allocated_bytes += given
        self.requested_bytes += nbytes
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        if self.requested_bytes > self.peak_requested_bytes:
            self.peak_requested_bytes = self.requested_bytes
        return block

    def free(self, block: Block) -> None:
        """Gives a block back; it grows together with free neighbours."""
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
        """As `torch.cuda.empty_cache`: every free block that is a whole segment goes back, and pages of expandable ones."""
        for pair in self._pools.values():
            for pool in reversed(pair):
                for _, _, block in list(pool.free):
                    if block.base is not None:
                        self._unmap(block)
                    elif block.whole:
                        self._release(block)

    def reset_peaks(self) -> None:
        """As `torch.cuda.reset_peak_memory_stats`."""
        self.peak_allocated_bytes, self.peak_reserved_bytes, self.peak_requested_bytes = self.allocated_bytes, self.reserved_bytes, self.requested_bytes
        for pair in self._pools.values():
            for pool in pair:
                pool.allocated_peak, pool.reserved_peak = pool.allocated, pool.reserved

    def memory_stats(self) -> dict[str, int]:
        """The figures of `torch.cuda.memory_stats` that are simulated, by its names."""
        pools = [pool for pair in self._pools.values() for pool in pair]
        idle = sum(size for pool in pools for size, _, block in pool.free if block.base is None and not block.whole)
        found = {
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
            of_kind = [pool for pool in pools if pool.small is small]
            found[f"allocated_bytes.{kind}.current"] = sum(pool.allocated for pool in of_kind)
            found[f"reserved_bytes.{kind}.current"] = sum(pool.reserved for pool in of_kind)
            found[f"segment.{kind}.current"] = sum(pool.segments for pool in of_kind)
        return found

    def blocks(self) -> list[Block]:
        """Every block of every segment, by address; free ones too."""
        found = list(self._live.values())
        for pair in self._pools.values():
            for pool in pair:
                found += [*(block for _, _, block in pool.free), *(block for _, block in pool.unmapped)]
        return sorted(found, key=lambda block: block.address)

    def rounded(self, nbytes: int) -> int:
        """The block size that a request gets."""
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

    # -- the rules --

    def _below(self, nbytes: int) -> int:
        self._lowest -= nbytes + SMALL_SEGMENT
        return self._lowest

    def _pair(self, stream: Any) -> tuple[Pool, Pool]:
        self._pools[stream] = Pool(True), Pool(False)
        return self._pools[stream]

    def _segment_bytes(self, size: int) -> int:
        if size <= SMALL:
            return SMALL_SEGMENT
        return self.settings.large_segment_bytes if size < OWN_SEGMENT else -(-size // SMALL_SEGMENT) * SMALL_SEGMENT

    def _fitting(self, pool: Pool, size: int) -> Block | None:
        free = pool.free
        at = bisect_left(free, (size,))
        if at == len(free):
            return None
        block = free[at][2]
        if block.base is not None:  # of those that could grow, the one that would become the smallest
            while at + 1 < len(free) and _room(free[at + 1][2]) < _room(block):
                at += 1
                block = free[at][2]
        settings = self.settings
        if settings.max_split_bytes != UNLIMITED:
            if size < settings.max_split_bytes <= block.size:
                return None  # a small request must not take a block that may never be split
            if size >= settings.max_split_bytes and block.size >= size + settings.max_non_split_rounding_bytes:
                return None
        del free[at]
        return block

    def _splits(self, pool: Pool, block: Block, size: int, rest: int) -> bool:
        if pool.small or block.base is not None:
            return rest >= LEAST
        return size < self.settings.max_split_bytes and rest > SMALL

    def _obtained(self, pool: Pool, size: int) -> Block | None:
        """New memory for a request that no free block can serve, by ever harder means."""
        settings = self.settings
        if settings.garbage_collection_threshold and self.limit_bytes != UNLIMITED:
            self._collect_garbage()
        block = self._new(pool, size)
        if block is not None or settings.throw_on_oom:
            return block
        if self._release_oversize(pool, size):
            block = self._new(pool, size)
        if block is None:
            self.empty_cache()
            self.retries += 1
            block = self._new(pool, size)
        return block

    def _new(self, pool: Pool, size: int) -> Block | None:
        wanted = self._segment_bytes(size)
        if self.reserved_bytes + wanted > self.limit_bytes:
            return None
        if self.settings.expandable_segments:
            return self._expanded(pool, size)
        if not self._reserve(pool, wanted):
            return None
        block = Block(wanted, pool, self._place(wanted))
        pool.segments += 1
        if self.observer is not None:
            self.observer("alloc", block.address, wanted)
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

    def _merge(self, block: Block, near: Block | None) -> None:
        """`near` becomes a part of `block`, if it is free as well."""
        if near is None or near.live or near.mapped != block.mapped:
            return
        if near.mapped:
            near.pool.remove(near)
        else:
            near.pool.remove_unmapped(near)
        if block.preceding is near:
            block.address = near.address
            block.preceding = near.preceding
            if block.preceding is not None:
                block.preceding.following = block
        else:
            block.following = near.following
            if block.following is not None:
                block.following.preceding = block
        block.size += near.size

    def _release(self, block: Block) -> None:
        block.pool.remove(block)
        block.pool.reserved -= block.size
        block.pool.segments -= 1
        self.reserved_bytes -= block.size
        if self.observer is not None:
            self.observer("free", block.address, block.size)

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        least = self.settings.max_split_bytes
        if least == UNLIMITED:
            return False
        wanted = max(size, least)
        at = bisect_left(pool.free, (wanted,))
        while at < len(pool.free) and not pool.free[at][2].whole:
            at += 1
        if at < len(pool.free):
            self._release(pool.free[at][2])
            return True
        got = 0
        for _, _, block in [entry for entry in reversed(pool.free) if entry[0] >= least and entry[2].whole]:
            if got >= wanted:
                break
            got += block.size
            self._release(block)
        return got >= wanted

    def _collect_garbage(self) -> None:
        """Releases whole large segments that have been free for longer than the average, until the threshold is kept."""
        wanted = self.reserved_bytes - int(self.settings.garbage_collection_threshold * self.limit_bytes)
        released, freed = 0, True
        while released < wanted and freed:
            old = [(pool.searches - block.age, block) for _, pool in self._pools.values() for _, _, block in pool.free if block.whole and block.base is None]
            average = sum(age for age, _ in old) / max(len(old), 1)
            freed = False
            for age, block in old:
                if age >= average:
                    released += block.size
                    self._release(block)
                    freed = True

    # -- expandable segments: one reservation of addresses, pages mapped where they are needed --

    def _page(self, pool: Pool) -> int:
        return SMALL_SEGMENT if pool.small else self.settings.large_segment_bytes

    def _expanded(self, pool: Pool, size: int) -> Block | None:
        start = self._growable(pool, size)
        page = self._page(pool)
        if start is None:
            whole = self.total_bytes if self.total_bytes < 1 << 50 else 1 << 40
            reserved = -(-whole * 9 // 8 // page) * page
            base = self._place(reserved)
            start = Block(reserved, pool, base, base, mapped=False)
            pool.add_unmapped(start)
            pool.segments += 1
        if not start.mapped and not self._map(start, min(start.size, size), page):
            return None
        while start.size < size:
            following = start.following
            assert following is not None  # `_growable` has seen that there is room
            if not self._map(following, min(size - start.size, following.size), page):
                return None
            start = following  # which has taken the mapped part before it in
        pool.remove(start)
        return start

    def _growable(self, pool: Pool, size: int) -> Block | None:
        """The first free block, at the lowest address, that can be grown to `size` by mapping what follows it."""
        for _, unmapped in pool.unmapped:
            before = unmapped.preceding
            first = before if before is not None and not before.live else unmapped
            room, near = 0, first
            while room < size and near is not None and not near.live:
                room += near.size
                near = near.following  # type: ignore[assignment]
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
            rest = Block(block.size - nbytes, pool, block.address + nbytes, block.base, mapped=False)
            rest.preceding, rest.following = block, block.following
            if rest.following is not None:
                rest.following.preceding = rest
            block.following = rest
            block.size = nbytes
            pool.add_unmapped(rest)
        if self.observer is not None:
            self.observer("map", block.address, nbytes)
        self._merge(block, block.preceding)
        self._merge(block, block.following)
        pool.add(block)
        return True

    def _unmap(self, block: Block) -> None:
        """Pages that lie wholly inside a free block."""
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
        import torch  # for the class alone: what replays without running out needs none

        free = max(min(self.available_bytes, self.limit_bytes) - self.reserved_bytes, 0)
        return torch.OutOfMemoryError(
            f"CUDA out of memory. Tried to allocate {in_words(self._segment_bytes(self.rounded(nbytes)))}. {self.name or 'The virtual GPU'} has a total capacity of "
            f"{in_words(self.total_bytes)} of which {in_words(free)} is free. Of the allocated memory {in_words(self.allocated_bytes)} is allocated by "
            f"PyTorch, and {in_words(self.reserved_bytes - self.allocated_bytes)} is reserved by PyTorch but unallocated. (virtual GPU)"
        )


def _room(block: Block) -> int:
    following = block.following
    return block.size + (following.size if following is not None and not following.mapped else 0)
