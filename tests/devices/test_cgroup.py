"""Memory limits of control groups, on trees of files as Linux shows them.

Lines of /proc/self/cgroup are HIERARCHY:CONTROLLERS:PATH; in /proc/self/mountinfo the fourth field is the
group that is mounted and the fifth is where. https://man7.org/linux/man-pages/man7/cgroups.7.html
"""

from __future__ import annotations

from pathlib import Path

import pytest

from autoaccum.devices.cgroup import Limit, tightest
from autoaccum.units import GIB, MIB

V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
V1_MOUNTS = """\
25 19 0:22 / /sys/fs/cgroup ro,nosuid,nodev,noexec shared:9 - tmpfs tmpfs ro,mode=755
31 25 0:27 / /sys/fs/cgroup/systemd rw,nosuid,nodev,noexec,relatime shared:11 - cgroup cgroup rw,xattr,name=systemd
34 25 0:30 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid,nodev,noexec,relatime shared:16 - cgroup cgroup rw,cpu,cpuacct
36 25 0:32 / /sys/fs/cgroup/memory rw,nosuid,nodev,noexec,relatime shared:18 - cgroup cgroup rw,memory
"""
V1_GROUPS = "12:pids:/user.slice\n9:memory:{group}\n4:cpu,cpuacct:/user.slice\n1:name=systemd:/user.slice/user-1000.slice\n0::/user.slice\n"
V1_NO_LIMIT = 9223372036854771712  # 2**63 - 1, cut to a multiple of a page
DOCKER = "/docker/2f5d1c9be7a04c6bb03ce9d8a1f5b7a6c4e3d2f1a0b9c8d7e6f5a4b3c2d1e0f9"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def membership(root: Path, cgroup: str, mountinfo: str) -> None:
    (root / "proc/self/cgroup").write_text(cgroup)
    other = "22 28 0:20 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw\n28 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
    (root / "proc/self/mountinfo").write_text(other + mountinfo)


def v2(root: Path, path: str, *, max: int | str = "max", high: int | str = "max", current: int = 0, **stat: int) -> Path:
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{max}\n")
    (folder / "memory.high").write_text(f"{high}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text("".join(f"{name} {bytes_}\n" for name, bytes_ in {"anon": 4096, "file": 0, **stat}.items()))
    return folder


def v1(root: Path, path: str, *, limit: int = V1_NO_LIMIT, usage: int = 0, **stat: int) -> Path:
    folder = root / "sys/fs/cgroup/memory" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text("".join(f"{name} {bytes_}\n" for name, bytes_ in {"cache": 0, "rss": 4096, **stat}.items()))
    return folder


def test_v2_finds_the_limit_of_an_ancestor(root: Path) -> None:
    membership(root, "0::/user.slice/user-1000.slice/session-3.scope\n", V2_MOUNT)
    limited = v2(root, "user.slice", max=8 * GIB, current=3 * GIB)
    v2(root, "user.slice/user-1000.slice")
    v2(root, "user.slice/user-1000.slice/session-3.scope")
    assert tightest(root) == Limit(str(limited), 8 * GIB, 5 * GIB)


def test_v2_takes_the_limit_that_throttles_where_it_is_below_the_one_that_kills(root: Path) -> None:
    membership(root, "0::/system.slice/train.service\n", V2_MOUNT)
    folder = v2(root, "system.slice/train.service", max=8 * GIB, high=6 * GIB, current=2 * GIB)
    assert tightest(root) == Limit(str(folder), 6 * GIB, 4 * GIB)


def test_v2_with_max_everywhere_is_no_limit(root: Path) -> None:
    membership(root, "0::/user.slice/user-1000.slice\n", V2_MOUNT)
    v2(root, "user.slice", current=3 * GIB)
    v2(root, "user.slice/user-1000.slice", current=3 * GIB)
    assert tightest(root) is None


def test_v2_groups_beside_ours_do_not_limit_us(root: Path) -> None:
    membership(root, "0::/user.slice\n", V2_MOUNT)
    v2(root, "user.slice")
    v2(root, "system.slice", max=1 * GIB)
    v2(root, "user.slice/user-1000.slice", max=1 * GIB)
    assert tightest(root) is None


def test_v2_in_a_namespace_of_its_own_reads_the_mount_itself(root: Path) -> None:
    """What Docker does by default: inside, the container's group looks like the root."""
    membership(root, "0::/\n", V2_MOUNT)
    folder = v2(root, "", max=2 * GIB, current=500 * MIB)
    assert tightest(root) == Limit(str(folder), 2 * GIB, 2 * GIB - 500 * MIB)


def test_v2_outside_of_the_namespace_reads_the_mount_itself(root: Path) -> None:
    """A process that was moved out of its namespace's root sees its group with "/.."."""
    membership(root, "0::/../cri-containerd-7be1.scope\n", V2_MOUNT)
    folder = v2(root, "", max=2 * GIB)
    v2(root, "../cri-containerd-7be1.scope", max=1 * GIB)  # not a group: beside the mount
    assert tightest(root) == Limit(str(folder), 2 * GIB, 2 * GIB)


def test_v1_with_the_number_for_no_limit_is_no_limit(root: Path) -> None:
    membership(root, V1_GROUPS.format(group="/user.slice"), V1_MOUNTS)
    v1(root, "", usage=20 * GIB)
    v1(root, "user.slice", usage=3 * GIB)
    assert tightest(root) is None


def test_v1_limit_of_an_ancestor_is_found(root: Path) -> None:
    membership(root, V1_GROUPS.format(group="/slurm/uid_1000/job_42/step_0"), V1_MOUNTS)
    v1(root, "")
    limited = v1(root, "slurm/uid_1000/job_42", limit=4 * GIB, usage=1 * GIB)
    v1(root, "slurm/uid_1000/job_42/step_0", usage=1 * GIB)
    assert tightest(root) == Limit(str(limited), 4 * GIB, 3 * GIB)


def test_v2_gives_inactive_file_pages_back(root: Path) -> None:
    membership(root, "0::/job\n", V2_MOUNT)
    v2(root, "job", max=4 * GIB, current=3 * GIB, active_file=300 * MIB, inactive_file=2 * GIB)
    found = tightest(root)
    assert found and found.left_bytes == 3 * GIB


def test_v1_gives_inactive_file_pages_of_the_whole_subtree_back(root: Path) -> None:
    membership(root, V1_GROUPS.format(group="/job"), V1_MOUNTS)
    v1(root, "job", limit=4 * GIB, usage=3 * GIB, inactive_file=1 * MIB, total_inactive_file=2 * GIB)
    found = tightest(root)
    assert found and found.left_bytes == 3 * GIB


def test_usage_above_the_limit_leaves_nothing(root: Path) -> None:
    """memory.high may be exceeded."""
    membership(root, "0::/job\n", V2_MOUNT)
    v2(root, "job", high=1 * GIB, current=2 * GIB)
    found = tightest(root)
    assert found and found.left_bytes == 0


@pytest.mark.parametrize("below, limit_bytes", [("", 2 * GIB), ("/worker-1", 1 * GIB)])
def test_v1_container_that_is_shown_the_hosts_path_reads_what_is_mounted(root: Path, below: str, limit_bytes: int) -> None:
    """Without a cgroup namespace the path is the host's, and of the hierarchy only the container's part is mounted."""
    mount = f"1283 1276 0:32 {DOCKER} /sys/fs/cgroup/memory ro,nosuid,nodev,noexec,relatime master:18 - cgroup cgroup rw,memory\n"
    membership(root, f"9:memory:{DOCKER}{below}\n1:name=systemd:{DOCKER}{below}\n", mount)
    v1(root, "", limit=2 * GIB)
    v1(root, "worker-1", limit=1 * GIB)
    assert tightest(root) == Limit(f"{root}/sys/fs/cgroup/memory{below}", limit_bytes, limit_bytes)


def test_v1_container_whose_path_is_not_below_what_is_mounted_reads_the_mount_itself(root: Path) -> None:
    """Docker in Docker: the path is told from the outer host, the mount from the inner one."""
    mount = f"1283 1276 0:32 {DOCKER} /sys/fs/cgroup/memory ro,nosuid,nodev,noexec,relatime master:18 - cgroup cgroup rw,memory\n"
    membership(root, f"9:memory:/kubepods/burstable/pod5e0c{DOCKER}\n", mount)
    folder = v1(root, "", limit=2 * GIB, usage=1 * GIB)
    assert tightest(root) == Limit(str(folder), 2 * GIB, 1 * GIB)


def test_of_two_limits_the_one_that_leaves_less_wins_though_it_is_larger(root: Path) -> None:
    membership(root, "0::/pod/container\n", V2_MOUNT)
    pod = v2(root, "pod", max=8 * GIB, current=7 * GIB)  # others in the pod use most of it
    v2(root, "pod/container", max=4 * GIB, current=1 * GIB)
    assert tightest(root) == Limit(str(pod), 8 * GIB, 1 * GIB)


def test_hybrid_systems_are_limited_by_the_version_that_has_the_memory_controller(root: Path) -> None:
    """systemd's hybrid layout mounts version 2 without controllers beside version 1."""
    unified = "32 25 0:28 / /sys/fs/cgroup/unified rw,nosuid,nodev,noexec,relatime shared:10 - cgroup2 cgroup2 rw,nsdelegate\n"
    membership(root, V1_GROUPS.format(group="/user.slice"), V1_MOUNTS + unified)
    (root / "sys/fs/cgroup/unified/user.slice").mkdir(parents=True)
    folder = v1(root, "user.slice", limit=4 * GIB, usage=1 * GIB)
    assert tightest(root) == Limit(str(folder), 4 * GIB, 3 * GIB)


@pytest.mark.parametrize("cgroup", ["0::/user.slice\n", V1_GROUPS.format(group="/user.slice"), ""])
def test_nothing_mounted_is_no_limit(root: Path, cgroup: str) -> None:
    membership(root, cgroup, "")
    v2(root, "user.slice", max=1 * GIB)
    assert tightest(root) is None


def test_a_system_without_proc_is_no_limit(tmp_path: Path) -> None:
    assert tightest(tmp_path) is None
