"""`VirtualGpu`: a simulated GPU that can run out of memory. Real CPU tensors are charged to a simulated allocator.

Use it to test how code handles an out-of-memory; `train --device virtual:...` uses it too. Allocations have the sizes of CPU
kernels, so it does not predict the peak of a real card: `autoaccum.estimate` does.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from autoaccum.errors import UsageError
from autoaccum.simulate import Allocator, Block, Settings, profiles, settings_from_environment
from autoaccum.units import in_words, parse_size


class VirtualGpu:
    """A context manager: inside, every storage that a CPU tensor has or gets is charged to the simulated card.

        with autoaccum.VirtualGpu("8GiB") as gpu:
            train(batch_size=512)  # raises a real torch.OutOfMemoryError where 8 GiB are not enough
        print(gpu.max_memory_reserved())

    gpu: a card's name (`"t4"`; its allocator gets the card's memory without the context) or a size.
    settings: of the caching allocator; None reads them from `PYTORCH_CUDA_ALLOC_CONF`, as torch does.
    A tensor from outside is charged when an operator inside first uses it. Sparse tensors are not charged.
    The code inside must run on the CPU: moving a tensor to "cuda" fails as it does without a GPU.
    Only the thread that enters the block is charged, its backward included; other threads are not.

    Raises `UsageError` for an unknown card, or if the same object is entered again before it is left.
    """

    def __init__(self, gpu: str | int, *, settings: Settings | None = None) -> None:
        if isinstance(gpu, bool) or not isinstance(gpu, (str, int)):
            raise UsageError(f"a card's name or a size is needed, such as 't4' or '8GiB', not {gpu!r}")
        self.profile = profiles.load(gpu) if isinstance(gpu, str) else profiles.of_size(parse_size(gpu))
        self.allocator = Allocator(
            self.profile.total_bytes,
            available_bytes=self.profile.available_bytes,
            settings=settings or settings_from_environment(),
            name=self.profile.name,
        )
        self._charging: _Charging | None = None

    def __enter__(self) -> VirtualGpu:
        if self._charging is not None:
            raise UsageError(f"this {self.profile.name} is in use already: make another VirtualGpu, or leave the first `with` before")
        self._charging = _Charging(self.allocator)
        self._charging.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        charging, self._charging = self._charging, None
        if charging is not None:
            charging.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
            charging.let_go()

    def memory_allocated(self) -> int:
        """Bytes in blocks that tensors hold, like `torch.cuda.memory_allocated`."""
        return self._settled_allocator().allocated_bytes

    def memory_reserved(self) -> int:
        """Bytes that the allocator holds, like `torch.cuda.memory_reserved`."""
        return self._settled_allocator().reserved_bytes

    def max_memory_allocated(self) -> int:
        """The peak of `memory_allocated`."""
        return self._settled_allocator().peak_allocated_bytes

    def max_memory_reserved(self) -> int:
        """The peak of `memory_reserved`."""
        return self._settled_allocator().peak_reserved_bytes

    def memory_stats(self) -> dict[str, int]:
        """The simulated figures of `torch.cuda.memory_stats`, with the same keys."""
        return self._settled_allocator().memory_stats()

    def empty_cache(self) -> None:
        """Releases the cached blocks, like `torch.cuda.empty_cache`."""
        self._settled_allocator().empty_cache()

    def on_host(self, tensors: Iterable[torch.Tensor]) -> None:
        """Marks these tensors as host memory: their storages are not charged."""
        if self._charging is not None:
            for tensor in tensors:
                self._charging.exempt(tensor)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context manager: inside, nothing is charged. It is for work of the host, such as a loader's."""
        charging = self._charging
        if charging is None:
            yield
            return
        charging.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            charging.__enter__()  # type: ignore[no-untyped-call]

    def _settled_allocator(self) -> Allocator:
        if self._charging is not None:
            self._charging.settle()
        return self.allocator

    def __repr__(self) -> str:
        return f"<VirtualGpu {self.profile.name}: {in_words(self.memory_reserved())} of {in_words(self.profile.available_bytes)} reserved>"


class _Charging(TorchDispatchMode):
    def __init__(self, allocator: Allocator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._allocator = allocator
        self._blocks: dict[int, tuple[Block, Any]] = {}
        self._on_host: dict[int, Any] = {}
        # A storage may die at any moment, also inside an allocator call. `settle` frees its block later.
        self._dead: deque[Block] = deque()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._charge(args)
        self._charge(kwargs.values())
        out = func(*args, **kwargs)
        self._charge((out,))
        return out

    def settle(self) -> None:
        """Frees the blocks of storages that have died."""
        while self._dead:
            self._allocator.free(self._dead.popleft())

    def let_go(self) -> None:
        """Frees all blocks, also those of storages that live on."""
        for block, finalizer in list(self._blocks.values()):
            if finalizer.detach() is not None:
                self._dead.append(block)
        self._blocks.clear()
        self.settle()

    def exempt(self, tensor: torch.Tensor) -> None:
        """Marks this tensor's storage as host memory."""
        storage = tensor.untyped_storage()
        self._on_host[storage._cdata] = weakref.ref(storage)

    def _charge(self, values: Any) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                if value.device.type == "cpu" and value.layout == torch.strided:
                    self._charge_storage(value.untyped_storage())
            elif isinstance(value, (tuple, list)):
                self._charge(value)

    def _charge_storage(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        entry = self._blocks.get(key)
        if entry is not None and entry[0].requested == nbytes:
            return
        host = self._on_host.get(key)
        if not nbytes or (host is not None and host() is storage):
            return
        self.settle()
        block = self._allocator.malloc(nbytes)
        if entry is not None:  # the storage was resized
            entry[1].detach()
            self._dead.append(entry[0])
        finalizer = weakref.finalize(storage, self._died, key, block)
        finalizer.atexit = False
        self._blocks[key] = (block, finalizer)

    def _died(self, key: int, block: Block) -> None:
        entry = self._blocks.get(key)
        if entry is not None and entry[0] is block:
            del self._blocks[key]
        self._dead.append(block)
