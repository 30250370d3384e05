"""Is this exception an out-of-memory? A table: one row and one link per case.

Three verdicts. "oom": memory ran out. "not": something else. "ask-device": libraries say the same
words when memory runs out and when something is broken; how much the device has left decides.
`tests/recordings/oom_messages.jsonl` holds the real texts that the table is tested against.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Literal

Verdict = Literal["oom", "ask-device", "not"]

# Types by name, so that no library has to be imported to recognise its exceptions.
# torch.AcceleratorError: torch 2.8 and later. DistBackendError: NCCL.
_CARRIERS = {"RuntimeError", "OutOfMemoryError", "AcceleratorError", "DistBackendError", "MemoryError", "XlaRuntimeError"}
_ALWAYS = {"OutOfMemoryError", "MemoryError"}

_TABLE: list[tuple[Verdict, str]] = [
    # Triton: a kernel's configuration, not the device's memory
    ("not", r"out of resource: shared memory"),
    # A grid above 65535: the batch is too big for a kernel: https://github.com/pytorch/pytorch/issues/142228
    ("not", r"CUDA error: invalid configuration argument"),
    # The caching allocators: "CUDA out of memory. Tried to allocate ..." (HIP, XPU and MPS alike)
    ("oom", r"^(CUDA|HIP|XPU|MPS backend|\w+ backend) out of memory"),
    # The driver itself, past the caching allocator; also the driver API under expandable segments
    ("oom", r"(CUDA|HIP)( driver)? error: out of memory"),
    ("oom", r"cudaErrorMemoryAllocation|hipErrorOutOfMemory|CUDA_ERROR_OUT_OF_MEMORY"),
    # Libraries that allocate workspaces of their own
    ("oom", r"(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS|ROCBLAS)_STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED"),
    # Every algorithm's workspace was refused
    ("oom", r"Unable to find a valid cuDNN algorithm"),
    # How an OOM looks on a MIG slice: https://github.com/huggingface/accelerate/issues/3803,
    # https://github.com/pytorch/pytorch/issues/112377
    ("oom", r"NVML_SUCCESS == r INTERNAL ASSERT FAILED"),
    ("oom", r"UR_RESULT_ERROR_OUT_OF_(DEVICE|HOST|RESOURCES)|PI_ERROR_OUT_OF_(RESOURCES|HOST_MEMORY)"),
    # NCCL's buffers: the words come behind "Last error:"
    ("oom", r"Cuda failure 2? ?'out of memory'"),
    # The CPU: torch's allocator on Linux and Windows, C++ new, NNPACK, host memory for loader workers
    ("oom", r"DefaultCPUAllocator: (can't allocate memory|not enough memory)"),
    ("oom", r"std::bad_alloc"),
    ("oom", r"posix_memalign failed"),
    ("oom", r"unable to mmap \d+ bytes from file .*Cannot allocate memory"),
    ("oom", r"^\[enforce fail at alloc_cpu"),
    # Thread pools that cannot grow under a memory limit
    ("oom", r"can't start new thread|Resource temporarily unavailable.*[Tt]hread"),
    # A handle or a primitive that could not be made: usually memory, sometimes a lost context
    ("ask-device", r"CUBLAS_STATUS_NOT_INITIALIZED|CUDNN_STATUS_NOT_INITIALIZED"),
    ("ask-device", r"CUDNN_STATUS_INTERNAL_ERROR|CUDNN_STATUS_NOT_SUPPORTED"),
    ("ask-device", r"unable to find an engine to execute this computation"),
    # oneDNN under a memory limit; no other tool recognises it
    ("ask-device", r"could not (create|execute) a primitive|could not create a memory"),
]

# In the text of a whole program's output, where types are gone. Only complete phrases count, so that
# a script that merely talks about memory is not taken for one that ran out.
_IN_OUTPUT = re.compile(
    r"OutOfMemoryError|out of memory\. Tried to allocate|error: out of memory|DefaultCPUAllocator: (can't|not enough)"
    r"|^MemoryError|: MemoryError|std::bad_alloc|libgomp: Thread creation failed|_STATUS_ALLOC_FAILED|posix_memalign failed"
    r"|could not create a primitive|can't start new thread|Cannot allocate memory",
    re.MULTILINE,
)

Recogniser = Callable[[BaseException], bool]
_of_the_user: list[Recogniser] = []


def register(recogniser: Recogniser) -> Recogniser:
    """Adds a case of the user's own: called with each exception, True means out of memory.

    Returns the function, so that it can be used as a decorator.
    """
    _of_the_user.append(recogniser)
    return recogniser


def verdict(error: BaseException, outside: BaseException | None = None) -> Verdict:
    """The verdict on `error` and on what caused it; the clearest word in the chain wins. outside: as in `chain`."""
    verdicts = [_alone(link) for link in chain(error, outside)]
    for word in ("oom", "ask-device"):
        if word in verdicts:
            return word
    return "not"


def is_oom(error: BaseException, *, left_bytes: int | None = None, taken_bytes: int | None = None, outside: BaseException | None = None) -> bool:
    """True if `error` means that memory ran out.

    For the doubtful texts, `left_bytes` is the least that the budget had left until it was raised and
    `taken_bytes` the most that the attempt had taken: with less left than was taken already, the next
    workspace not finding room is the likely story; with more left, the device is broken and saying
    "too big" would hide it. Unknown figures count as out of memory, as they do in every peer.
    """
    word = verdict(error, outside)
    if word == "ask-device":
        return left_bytes is None or taken_bytes is None or left_bytes < max(taken_bytes, 64 * 2**20)
    return word == "oom"


def in_output(text: str) -> bool:
    """True if the printed output of a program tells of an out-of-memory."""
    return bool(_IN_OUTPUT.search(text))


def chain(error: BaseException, outside: BaseException | None = None) -> Iterator[BaseException]:
    """`error` and what it was raised from, as tracebacks show them: cause, else unsuppressed context.

    outside: where to stop: an exception that was being handled when the code began that raised `error`.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and link is not outside and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _alone(error: BaseException) -> Verdict:
    if any(recognise(error) for recognise in _of_the_user):
        return "oom"
    if not isinstance(error, Exception):  # KeyboardInterrupt, SystemExit
        return "not"
    names = {base.__name__ for base in type(error).__mro__}
    if names & _ALWAYS:
        return "oom"
    if not names & _CARRIERS:
        return "not"
    # Not str(error): with two arguments that is the text of a tuple.
    text = str(error.args[0]) if error.args else str(error)
    for word, pattern in _TABLE:
        if re.search(pattern, text, re.MULTILINE):
            return word
    return "not"


# Gloo's and NCCL's words for a collective that other ranks did not come to: gloo/transport/tcp (pair.cc, unbound_buffer.cc), ProcessGroupNCCL.cpp.
_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Read error", "NCCL communicator was aborted", "watchdog")


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank was not there."""
    return any(words in str(error) for words in _LOST_RANK)
