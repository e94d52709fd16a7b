"""A machine that runs systemd, in namespaces over an image: units are started by the real thing, sandbox and all.

It has processes, cgroups, mounts and a name of its own; the network is this machine's, so that tests reach what it
serves. Nothing but what is asked for runs in it: its target wants no unit.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from images import BINDS
from support import wait_until

if TYPE_CHECKING:
    from images import Image

SYSTEMD = Path("/lib/systemd/systemd")
UNITS = "/etc/systemd/system"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TARGET = "[Unit]\nDescription=Nothing\nDefaultDependencies=no\nWants=systemd-journald.service\n"


def obstacle() -> str:
    """Return why there can be no such machine here; empty when there can."""
    if not SYSTEMD.exists():
        return "systemd is not installed"
    if shutil.which("nsenter") is None or shutil.which("pivot_root") is None:
        return "there is no nsenter or no pivot_root"
    return "" if _hierarchy() else "there is no cgroup2 hierarchy that can be written to"


def _hierarchy() -> Path | None:
    """Return where the cgroup2 hierarchy is mounted (beside others, on machines that have both)."""
    candidates = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
    return next((path for path in candidates if os.access(path / "cgroup.procs", os.W_OK)), None)


class Machine:
    """systemd, running."""

    def __init__(self, image: Image) -> None:
        image.copy_text(TARGET, f"{UNITS}/nothing.target")
        for unit in (SYSTEMD.parent / "system" / "sysinit.target.wants").iterdir():  # what services start after
            if not unit.name.startswith("systemd-journald"):
                (image.layer / UNITS[1:] / unit.name).symlink_to("/dev/null")
        hierarchy = _hierarchy()
        assert hierarchy
        self.group = hierarchy / f"fastdist-test-{os.getpid()}"
        self.group.mkdir()
        namespaces = ["--mount", "--pid", "--fork", "--kill-child", "--cgroup", "--uts", "--ipc"]
        inside = shlex.join(["unshare", *namespaces, "--propagation", "private", "sh", "-ec", _boot(image)])
        self.outside = subprocess.Popen(
            ["sh", "-ec", f"echo $$ > {self.group}/cgroup.procs; exec {inside}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = int(wait_until(self._first, "the first process of the machine"))
        wait_until(lambda: self.run("systemctl", "is-active", "systemd-journald", check=False) == "active", "systemd")

    def _first(self) -> str:
        assert self.outside.poll() is None, self.outside.stdout and self.outside.stdout.read()
        children = Path(f"/proc/{self.outside.pid}/task/{self.outside.pid}/children").read_text().split()
        return children[0] if children else ""

    def run(self, *words: str, check: bool = True) -> str:
        """Run a command in the machine; return what it says."""
        enter = ["nsenter", "-t", str(self.pid), "-m", "-p", "-C", "-u", "-i", "-r", "-w"]
        command = [*enter, "env", "-i", f"PATH={PATH}", "SYSTEMD_PAGER=", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        assert done.returncode == 0 or not check, f"{shlex.join(words)}: {done.stdout}\n{self.journal()}"
        return done.stdout.strip()

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", "-p", name, unit)

    def journal(self) -> str:
        """Return what units have said."""
        return self.run("journalctl", "--no-pager", "-o", "cat", "-n", "200", check=False)

    def kill(self) -> None:
        """End it and all that runs in it."""
        if self.outside.poll() is None:
            os.killpg(self.outside.pid, signal.SIGKILL)  # and by --kill-child the machine's first process
        self.outside.wait(20)
        folders = sorted(self.group.rglob("*/"), key=lambda path: len(path.parts), reverse=True)
        for path in (*folders, self.group):
            if path.is_dir():
                wait_until(lambda path=path: _removed(path), f"{path} without processes")


def _removed(path: Path) -> bool:
    try:
        path.rmdir()
    except OSError:
        return False
    return True


def _boot(image: Image) -> str:
    """Return the script that mounts what a machine has, makes the image its root, and becomes systemd."""
    devices = ("null", "zero", "full", "random", "urandom", "tty")
    root = image.root
    return "\n".join(
        [
            f"mount -t overlay overlay -o lowerdir=/,upperdir={image.layer},workdir={image.work} {root}",
            *(f"mount --bind {source} {root}{target}" for target, source in BINDS.items()),
            f"cd {root}",
            "mount -t proc proc proc",
            "mount --bind proc/sys proc/sys",
            "mount -o remount,bind,ro proc/sys",  # what is the whole kernel's
            "mount -t sysfs -o ro sysfs sys",
            "mount -t cgroup2 cgroup2 sys/fs/cgroup",
            *(f"mount -t tmpfs -o mode={mode} tmpfs {name}" for name, mode in (("run", "755"), ("tmp", "1777"))),
            "mount -t tmpfs -o mode=755 tmpfs dev",
            *(f"touch dev/{name}; mount --bind /dev/{name} dev/{name}" for name in devices),
            "mkdir dev/pts dev/shm run/old",
            "mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts",
            "ln -s pts/ptmx dev/ptmx",
            "ln -s /proc/self/fd dev/fd",
            "pivot_root . run/old",
            "umount -l run/old",
            f"exec env -i container=test PATH={PATH} {SYSTEMD} --system --unit=nothing.target --show-status=no",
        ]
    )
