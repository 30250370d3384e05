"""Functions that decide if an exception is an out-of-memory, with a table of message patterns: one row per case.

There are three verdicts. "oom": memory ran out. "not": another failure. "ask-device": libraries use the same message when memory
runs out and when something else fails; then the memory that the device has left decides.
`tests/recordings/oom_messages.jsonl` contains the real messages against which the table is tested.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Literal

from autoaccum.errors import without_middle

Verdict = Literal["oom", "ask-device", "not"]

# Types by name, so that no library is imported to recognise its exceptions.
# torch.AcceleratorError: torch 2.8 and later. DistBackendError: NCCL.
_CARRIERS = {"RuntimeError", "OutOfMemoryError", "AcceleratorError", "DistBackendError", "MemoryError", "XlaRuntimeError"}
_ALWAYS = {"OutOfMemoryError", "MemoryError"}

_TABLE: list[tuple[Verdict, str]] = [
    # Triton: the kernel's configuration needs too much shared memory; the device's memory did not run out
    ("not", r"out of resource: shared memory"),
    # A grid above 65535: the batch is too big for a kernel: https://github.com/pytorch/pytorch/issues/142228
    ("not", r"CUDA error: invalid configuration argument"),
    # The caching allocators: "CUDA out of memory. Tried to allocate ..." (HIP, XPU and MPS use the same text)
    ("oom", r"^(CUDA|HIP|XPU|MPS backend|\w+ backend) out of memory"),
    # The driver, outside the caching allocator; also the driver API with expandable segments
    ("oom", r"(CUDA|HIP)( driver)? error: out of memory"),
    ("oom", r"cudaErrorMemoryAllocation|hipErrorOutOfMemory|CUDA_ERROR_OUT_OF_MEMORY"),
    # Libraries that allocate their own workspaces
    ("oom", r"(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS|ROCBLAS)_STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED"),
    # No algorithm's workspace could be allocated
    ("oom", r"Unable to find a valid cuDNN algorithm"),
    # The message of an OOM on a MIG slice: https://github.com/huggingface/accelerate/issues/3803,
    # https://github.com/pytorch/pytorch/issues/112377
    ("oom", r"NVML_SUCCESS == r INTERNAL ASSERT FAILED"),
    ("oom", r"UR_RESULT_ERROR_OUT_OF_(DEVICE|HOST|RESOURCES)|PI_ERROR_OUT_OF_(RESOURCES|HOST_MEMORY)"),
    # NCCL's buffers: this text follows "Last error:"
    ("oom", r"Cuda failure 2? ?'out of memory'"),
    # The CPU: torch's allocator on Linux and Windows, C++ new, NNPACK, host memory for loader workers
    ("oom", r"DefaultCPUAllocator: (can't allocate memory|not enough memory)"),
    ("oom", r"std::bad_alloc"),
    ("oom", r"posix_memalign failed"),
    ("oom", r"unable to mmap \d+ bytes from file .*Cannot allocate memory"),
    ("oom", r"^\[enforce fail at alloc_cpu"),
    # A thread pool cannot grow under a memory limit
    ("oom", r"can't start new thread|Resource temporarily unavailable.*[Tt]hread"),
    # A handle or a primitive could not be created: usually memory ran out, sometimes the context is lost
    ("ask-device", r"CUBLAS_STATUS_NOT_INITIALIZED|CUDNN_STATUS_NOT_INITIALIZED"),
    ("ask-device", r"CUDNN_STATUS_INTERNAL_ERROR|CUDNN_STATUS_NOT_SUPPORTED"),
    ("ask-device", r"unable to find an engine to execute this computation"),
    # oneDNN under a memory limit; no other tool recognises this message
    ("ask-device", r"could not (create|execute) a primitive|could not create a memory"),
]

# What C and C++ print themselves, without an exception in front; and what the text of an exception may go on with in later lines.
_PRINTED = re.compile(
    r"std::bad_alloc|libgomp: Thread creation failed|posix_memalign failed|DefaultCPUAllocator: (can't|not enough)|error: out of memory"
    r"|out of memory\. Tried to allocate|_STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED|Cuda failure 2? ?'out of memory'|NVML_SUCCESS == r INTERNAL ASSERT FAILED"
    r"|[Cc]annot allocate memory|can't start new thread|could not create a primitive|Detected \d+ oom[_-]kill event",
)
# The last line of a traceback, also behind the prefix of a launcher ("[rank0]: ").
_EXCEPTION = re.compile(r"(?:^|: |\]:? ?)\s*(?:\w+\.)*(\w*(?:Error|Exception))(?:: *(.*))?$")

# The words of launchers for a process that was ended by SIGKILL: a shell, torchrun, accelerate launch, DeepSpeed, Slurm, torch's DataLoader.
_KILLED = re.compile(
    r"exit ?code *: *-9\b|Signals\.SIGKILL|return code = -9\b|[Ss]ignal 9 \(SIGKILL\)|DataLoader worker \(pid\S* ?\d*\) is killed by signal"
    r"|^\S+: line \d+: +\d+ Killed\b|^Killed$|oom[_-]kill event|Out Of Memory|exit(ed)? (code|status) 137\b",
    re.MULTILINE,
)
_SIGKILL_IN_A_SHELL = 137  # 128 + 9

Recogniser = Callable[[BaseException], bool]
_of_the_user: list[Recogniser] = []


def register(recogniser: Recogniser) -> Recogniser:
    """Registers a function of the user that recognises out-of-memory errors.

    recogniser: called with each exception; returns True for an out-of-memory.
    Returns the function, so that `register` can be used as a decorator.
    """
    _of_the_user.append(recogniser)
    return recogniser


def verdict(error: BaseException, outside: BaseException | None = None) -> Verdict:
    """The verdict on `error` and on the exceptions that caused it. "oom" comes before "ask-device", and that before "not".

    outside: as in `chain`.
    """
    verdicts = [_alone(link) for link in chain(error, outside)]
    for word in ("oom", "ask-device"):
        if word in verdicts:
            return word
    return "not"


def is_oom(error: BaseException, *, left_bytes: int | None = None, taken_bytes: int | None = None, outside: BaseException | None = None) -> bool:
    """True if `error` means that memory ran out.

    left_bytes, taken_bytes: they decide for the verdict "ask-device". `left_bytes` is the least that the budget had left before the
    error, and `taken_bytes` the most that the attempt had allocated. If less is left than was allocated (or than 64 MiB), the next
    workspace probably did not fit. If more is left, the device is broken, and "too big" would hide that. Unknown values count as
    out of memory, as in comparable tools.
    outside: as in `chain`.
    """
    word = verdict(error, outside)
    if word == "ask-device":
        return left_bytes is None or taken_bytes is None or left_bytes < max(taken_bytes, 64 * 2**20)
    return word == "oom"


_OF_A_CARD = re.compile(r"CUDA|HIP\b|XPU|MPS backend|CUBLAS|CUDNN|CUFFT|NCCL|NVML|GPU|cuda", re.ASCII)


def in_output(text: str, *, on_cpu: bool = False) -> str:
    """The line of a program's output that is an out-of-memory message; "" if there is none.

    An exception is judged by the same table as one that was raised here. Where the device would decide, it counts as out of memory,
    because the program ran under a limit.
    on_cpu: True for a program that trains on a CPU. What it prints of a card's memory is then a text, such as one of its data set.
    """
    for line in map(str.rstrip, text.splitlines()):
        found = _EXCEPTION.search(line)
        kind, words = (found[1], found[2] or "") if found is not None else ("", line)
        if kind and _of_text(kind, words) != "not":
            is_told = True
        else:
            is_told = bool(_PRINTED.search(line)) and not any(word == "not" and re.search(pattern, words) for word, pattern in _TABLE)
        if is_told and not (on_cpu and _OF_A_CARD.search(line)):
            return line.strip()
    return ""


def was_killed(code: int, text: str) -> bool:
    """True if a command was ended by SIGKILL, as the kernel does when memory runs out: itself, or what it started.

    code: its exit code, negative for a signal. text: its output, in which launchers say it.
    """
    return code in (-9, _SIGKILL_IN_A_SHELL) or (code != 0 and bool(_KILLED.search(text)))


def chain(error: BaseException, outside: BaseException | None = None) -> Iterator[BaseException]:
    """`error` and the exceptions that it was raised from, as tracebacks show them: the cause, or else the context if not suppressed.

    outside: the chain ends before this exception, which was handled already when the code that raised `error` began.
    """
    seen_ids: set[int] = set()
    link: BaseException | None = error
    while link is not None and link is not outside and id(link) not in seen_ids:
        seen_ids.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _alone(error: BaseException) -> Verdict:
    if any(recognise(error) for recognise in _of_the_user):
        return "oom"
    if not isinstance(error, Exception):  # KeyboardInterrupt, SystemExit
        return "not"
    # Not str(error): with two arguments, that is the text of a tuple.
    text = without_middle(str(error.args[0]) if error.args else str(error))
    verdicts = [_of_text(base.__name__, text) for base in type(error).__mro__]
    return next((word for word in ("oom", "ask-device") if word in verdicts), "not")


def _of_text(kind: str, text: str) -> Verdict:
    """The verdict on an exception by the name of its type and its text."""
    if kind in _ALWAYS or kind.endswith("MemoryError"):  # NumPy's is _ArrayMemoryError
        return "oom"
    if kind not in _CARRIERS:
        return "not"
    for word, pattern in _TABLE:
        if re.search(pattern, text, re.MULTILINE):
            return word
    return "not"


def is_of_device(error: BaseException) -> bool:
    """True if `error` came from a device's driver or runtime, after which its memory may be lost."""
    return type(error).__name__ == "AcceleratorError" or bool(re.search(r"\b(CUDA|HIP|XPU|MPS|CUBLAS|cuDNN|level_zero)\b.*(error|fail)", str(error), re.I))


# A kernel that cannot count so many elements or blocks, however much memory there is. CUDA grids: 65535 blocks in two of three dimensions;
# indices of 32 bits: https://github.com/pytorch/pytorch/issues/142228, https://github.com/pytorch/pytorch/issues/144824
_KERNEL_LIMIT = re.compile(
    r"invalid configuration argument|canUse32BitIndexMath|32.?bit index|more than INT_MAX elements|int32_t max|smaller than int32"
    r"|to type int without overflow|total bytes of NDArray > 2\*\*32|too large for 32",
)


def is_kernel_limit(error: BaseException) -> bool:
    """True if `error` says that a kernel cannot take so many elements. Smaller sizes run, and the device is well."""
    return any(type(link).__name__ in _CARRIERS and _KERNEL_LIMIT.search(str(link)) is not None for link in chain(error))


# Messages of Gloo and NCCL for a collective that other ranks did not join: gloo/transport/tcp (pair.cc, unbound_buffer.cc), ProcessGroupNCCL.cpp.
_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Read error", "NCCL communicator was aborted", "watchdog")


def is_lost_rank(error: BaseException) -> bool:
    """True if `error` is a collective that failed because another rank was missing."""
    return any(words in str(error) for words in _LOST_RANK)
