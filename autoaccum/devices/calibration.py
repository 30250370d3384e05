"""Calibration: measures the card in this machine and returns its profile, which `profiles/` keeps as a data file."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from autoaccum import devices
from autoaccum.devices import nvml
from autoaccum.errors import DeviceError
from autoaccum.simulate import Figure, Profile

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def calibrate(label: str) -> Profile:
    """The measured profile of a CUDA card. The measurement takes some seconds and about 2 GiB of the card's memory.

    Raises `NoSuchDevice` if there is no such card, and `DeviceError` if it is not a CUDA card or the driver does not report
    the size of the context.
    """
    device = devices.get(label)
    if device.facts.kind != "cuda" or device.facts.index is None:
        raise DeviceError(f"only CUDA cards can be recorded, not {device.facts.label}: write the file by hand, see profiles/README.md")
    index = device.facts.index
    properties = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        device.prepare()
        workspace = _cublas_workspace()  # first: a handle that another thread created before would be reused
        warm_up()
        torch.cuda.empty_cache()
        memory = device.memory()
        if memory.outside_bytes is None:
            raise DeviceError(f"nobody says what the context on {device.facts.label} takes (NVML is missing or forbidden): write the file by hand")
        how = f"measured on this card, torch {torch.__version__}, driver {nvml.driver_version()}"
        hip = torch.version.hip is not None
        speeds = {
            name: Figure(_flops(dtype, tf32=name == "tf32"), f"{how}: 8192 x 8192 matrix product", False)
            for name, dtype in _DTYPES.items()
            if _native(name, properties)
        }
        return Profile(
            label=properties.name.lower().replace(" ", "-"),
            name=properties.name,
            backend="rocm" if hip else "cuda",
            architecture=getattr(properties, "gcnArchName", "").split(":")[0] if hip else f"sm_{properties.major}{properties.minor}",
            total=Figure(int(properties.total_memory), f"{how}: get_device_properties", False),
            context=Figure(
                int(memory.outside_bytes), f"{how}: NVML's figure for this process less what the allocator had reserved, after a training step", False
            ),
            cublas_workspace=Figure(workspace, f"{how}: allocated by the first product of a thread", False),
            multiprocessors=Figure(int(properties.multi_processor_count), f"{how}: get_device_properties", False),
            bandwidth=Figure(_bandwidth(), f"{how}: copy of 1 GiB, read and written", False),
            flops=speeds,
        )


def warm_up() -> None:
    """Runs a training step with convolutions, attention and the usual optimizers.

    Libraries load their kernels at first use. From then on the kernels take memory outside of the allocator.
    """
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3)).cuda()
    for autocast in (False, True):
        with torch.autocast("cuda", torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16, enabled=autocast):
            net(torch.ones(8, 3, 64, 64, device="cuda")).float().mean().backward()
    query = torch.ones(2, 8, 256, 64, device="cuda", dtype=torch.float16, requires_grad=True)
    torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    for fused in (False, True):
        torch.optim.AdamW(net.parameters(), fused=fused).step()
    torch.cuda.synchronize()


def _native(name: str, properties: object) -> bool:
    return name in ("fp32", "fp16") or getattr(properties, "major", 0) >= 8


def _cublas_workspace() -> int:
    """Bytes that stay allocated after the first matrix product of a new thread."""
    import threading

    allocated = []

    def product() -> None:
        a = torch.ones(256, 256, device="cuda")
        before = torch.cuda.memory_allocated()
        out = a @ a
        allocated.append(torch.cuda.memory_allocated() - before - out.nbytes)

    thread = threading.Thread(target=product)
    thread.start()
    thread.join()
    return max(allocated[0], 0)


def _bandwidth() -> int:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return int(2 * source.nbytes / _seconds(lambda: target.copy_(source)))


def _flops(dtype: torch.dtype, *, tf32: bool) -> int:
    size = 8192
    a = torch.randn(size, size, device="cuda", dtype=dtype)
    b = torch.randn(size, size, device="cuda", dtype=dtype)
    tf32_before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        return int(2 * size**3 / _seconds(lambda: torch.mm(a, b)))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32_before


def _seconds(run: Callable[[], object]) -> float:
    """The median of five runs, in seconds, after two warm-up runs. The device is idle before and after each run."""
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[2:])[2]
