"""The memory limits of control groups (cgroups), version 1 and 2.

A container's limit may be set on any ancestor of this process's group, so all ancestors up to the root are read.
https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from autoaccum.units import TIB

# Version 1 writes "no limit" as the largest multiple of a page below 2**63.
_NO_LIMIT = 2**20 * TIB


@dataclass(frozen=True)
class Limit:
    """The memory limit of one control group: the group's path, the limit, and the memory left below the limit, in bytes."""

    path: str
    limit_bytes: int
    left_bytes: int


def tightest(root: Path = Path("/")) -> Limit | None:
    """The limit with the least memory left; None if no group limits this process.

    root: the folder that holds /proc and /sys. Tests pass a folder with recorded files.
    """
    return min(_limits(root), key=lambda limit: limit.left_bytes, default=None)


def _limits(root: Path) -> Iterator[Limit]:
    for version, mount, mounted_at, group in _memberships(root):
        for folder in _ancestry(mount, mounted_at, group):
            limit = _limit_v2(folder) if version == 2 else _limit_v1(folder)
            if limit:
                yield limit


def _memberships(root: Path) -> Iterator[tuple[int, Path, str, str]]:
    """(version, mount point, group that is mounted there, our group) for each memory hierarchy."""
    groups: dict[int, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" and not controllers:
            groups[2] = path
        elif "memory" in controllers.split(","):
            groups[1] = path
    for line in _lines(root / "proc/self/mountinfo"):
        fields = line.split()
        if "-" not in fields:
            continue
        kind, options = fields[fields.index("-") + 1], fields[-1].split(",")
        version = 2 if kind == "cgroup2" else 1 if kind == "cgroup" and "memory" in options else 0
        if version in groups:
            yield version, root / fields[4].lstrip("/"), fields[3], groups[version]


def _ancestry(mount: Path, mounted_at: str, group: str) -> Iterator[Path]:
    """Folders of our group and of all its ancestors that are visible below the mount point.

    In a container without its own cgroup namespace, /proc/self/cgroup shows the host's path. The mount shows only the
    part of it below `mounted_at`. Then the container's group is the mount point itself.
    """
    try:
        below = PurePosixPath(group).relative_to(mounted_at)
    except ValueError:
        below = PurePosixPath()
    if ".." in below.parts:  # a group outside our namespace
        below = PurePosixPath()
    folder = mount / below
    while True:
        if folder.is_dir():
            yield folder
        if folder == mount:
            return
        folder = folder.parent


def _limit_v2(folder: Path) -> Limit | None:
    # memory.high throttles instead of killing. A training that is throttled does not fit either.
    limits = [int(text) for name in ("memory.max", "memory.high") if (text := _text(folder / name)).isdigit()]
    if not limits:
        return None
    return _limit(folder, min(limits), _text(folder / "memory.current"), "inactive_file")


def _limit_v1(folder: Path) -> Limit | None:
    text = _text(folder / "memory.limit_in_bytes")
    if not text.isdigit() or int(text) >= _NO_LIMIT:
        return None
    return _limit(folder, int(text), _text(folder / "memory.usage_in_bytes"), "total_inactive_file")


def _limit(folder: Path, limit_bytes: int, used: str, reclaimable: str) -> Limit:
    """A limit without the inactive page cache in its usage: the kernel frees that before it kills a process."""
    cache = next((int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.split()[0] == reclaimable), 0)
    used_bytes = max(int(used or 0) - cache, 0)
    return Limit(str(folder), limit_bytes, max(limit_bytes - used_bytes, 0))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _lines(path: Path) -> list[str]:
    return [line for line in _text(path).splitlines() if line.strip()]
