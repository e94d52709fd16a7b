"""Try the README's commands on a bare Debian 12 and 13: a clean checkout, Python, a C compiler, make, nothing else.

A system is made by debootstrap from the mirror that this machine's apt uses, and kept in build/bare/ for the next time.
Into it go a checkout of what is committed and this machine's way to its package index (pip's settings and folders,
certificates, names, proxies). There somebody who is not root runs `make build`, `make run` (until a packet has been
delivered, then Ctrl-C) and `make test`; the latter two without a network. All of it happens in namespaces of its own:
whatever ends this, no mount and no process stays. Needs root, debootstrap and git.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "bare"
SUITES = {"bookworm": "Debian 12", "trixie": "Debian 13"}
PACKAGES = "python3,python3-venv,python3-dev,gcc,make"
USER = "somebody"
URL = "http://127.0.0.1:3000"
PACKET = b'{"emitterId":"web-42","messages":[{"level":"info","message":"hello"}]}'
PATIENCE = 120  # seconds until what `make run` starts has to be there or gone
CLONE_NEWNET = 0x40000000


class CannotError(Exception):
    """Why there can be no bare system here."""


class FailedError(Exception):
    """What did not work in one."""


def main() -> int:
    """Run it, in namespaces; return 1 if something failed or could not be tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"{' or '.join(SUITES)} (default: both)")
    parser.add_argument("--unit", action="store_true", help="only build, and run the unit tests")
    parser.add_argument("--tests", default="", help="words for pytest: run these tests only")
    parser.add_argument("--or-skip", action="store_true", help="where it is impossible, say why and return 0")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if unknown := set(wanted.suites) - SUITES.keys():
        parser.error(f"no such suite: {', '.join(unknown)}")
    try:
        if not wanted.inside:
            enter_namespaces()
        return try_all(wanted.suites or list(SUITES), "tests/unit" if wanted.unit else wanted.tests)
    except CannotError as reason:
        print(f"bare: no bare Debian can be tried here: {reason}", flush=True)
        return 0 if wanted.or_skip else 1


def enter_namespaces() -> None:
    """Become this script again, with mounts and processes of its own; sh is there to reap orphans."""
    if os.geteuid() != 0:
        raise CannotError("that needs root")
    for program in ("debootstrap", "git", "unshare", "chroot"):
        if shutil.which(program) is None:
            raise CannotError(f"{program} is not installed (scripts/peers.sh installs debootstrap)")
    enter = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*enter, "true"], capture_output=True, check=False).returncode != 0:
        raise CannotError("mounts and processes of its own are not allowed (unshare)")
    os.execvp(
        "unshare", [*enter, "sh", "-c", '"$@"; exit $?', "sh", sys.executable, __file__, "--inside", *sys.argv[1:]]
    )


def try_all(suites: list[str], tests: str) -> int:
    """Build in every suite while there is a network, then run everything; return 1 if anything failed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    systems = {suite: System(suite) for suite in suites}
    failures = []

    def in_each(act: Any) -> None:
        for suite in list(systems):
            try:
                act(systems[suite])
            except FailedError as failure:
                failures.append(f"{SUITES[suite]}: {failure}")
                del systems[suite]

    in_each(System.build)
    leave_network()
    if not tests:
        in_each(System.run_and_deliver)
    in_each(lambda system: system.test(tests))
    for failure in failures:
        print(f"bare: {failure}", flush=True)
    return 1 if failures else 0


class System:
    """A bare Debian with a checkout in it."""

    def __init__(self, suite: str) -> None:
        self.suite, self.name = suite, f"{SUITES[suite]} ({suite})"
        self.root = PLACE / suite
        self.home = self.root / "home" / USER
        self.environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": f"/home/{USER}",
            "USER": USER,
            "TERM": "dumb",
        }
        if not self.root.exists():
            section(f"{self.name}: debootstrap")
            bootstrap(suite, self.root)
        section(f"{self.name}: checkout")
        self._mount()
        self._check_out()
        self._take_over_pip()

    def _mount(self) -> None:
        (self.root / "dev/shm").mkdir(exist_ok=True)
        for folder in ("tmp", "var/tmp"):
            shutil.rmtree(self.root / folder)
            (self.root / folder).mkdir()
            (self.root / folder).chmod(0o1777)
        mount("-t", "proc", "proc", f"{self.root}/proc")
        for folder in ("/dev", "/sys"):
            mount("--rbind", folder, f"{self.root}{folder}")
        mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", f"{self.root}/dev/shm")

    def _check_out(self) -> None:
        """Put what is committed into the home folder; what was downloaded in an earlier run stays beside it."""
        git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
        archive = subprocess.run([*git, "archive", "HEAD"], capture_output=True, check=False)
        if archive.returncode != 0:
            raise CannotError(f"there is no committed tree: {archive.stderr.decode().strip()}")
        if subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode != 0:
            print("bare: changes that are not committed are left out")
        checkout = self.home / "fastdist"
        shutil.rmtree(checkout, ignore_errors=True)
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(checkout, filter="data")
        command = ["chown", "--recursive", f"{USER}:{USER}", f"/home/{USER}/fastdist"]
        subprocess.run(["chroot", self.root, *command], check=True)

    def _take_over_pip(self) -> None:
        """Let pip reach what it reaches outside: its settings as variables, the folders and files they name, names."""
        for path in ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt"):
            if Path(path).exists():
                (self.root / path[1:]).unlink(missing_ok=True)  # it may be a link
                shutil.copyfile(path, self.root / path[1:])
        proxies = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")
        self.environment |= {name: value for name, value in os.environ.items() if name.lower() in proxies}
        for name, value in pip_settings().items():
            self.environment[f"PIP_{name.upper().replace('-', '_')}"] = value
            for path in paths_in(value):
                self._show(path)

    def _show(self, path: Path) -> None:
        """Mount a folder or file of outside at the same place, read-only."""
        target = self.root / str(path)[1:]
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        mount("--bind", str(path), str(target))
        mount("-o", "remount,bind,ro", str(target))

    def command(self, *words: str) -> list[str]:
        """Return what runs a command in the checkout, as somebody."""
        enter = ["chroot", f"--userspec={USER}:{USER}", str(self.root), "env", "-i", "-C", f"/home/{USER}/fastdist"]
        return [*enter, *(f"{name}={value}" for name, value in self.environment.items()), *words]

    def run(self, *words: str) -> None:
        """Run a command that must work."""
        section(f"{self.name}: {' '.join(words)}")
        if subprocess.run(self.command(*words), stdin=subprocess.DEVNULL, check=False).returncode != 0:
            raise FailedError(f"{' '.join(words)} failed")

    def build(self) -> None:
        """Run ``make build``."""
        self.run("make", "build")

    def test(self, tests: str) -> None:
        """Run ``make test``, or some tests."""
        if tests:
            self.run(".venv/bin/python", "-m", "pytest", *tests.split())
        else:
            self.run("make", "test")

    def run_and_deliver(self) -> None:
        """Run ``make run`` until a packet is delivered, then press Ctrl-C: all must end."""
        section(f"{self.name}: make run")
        process = subprocess.Popen(self.command("make", "run"), stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            until(lambda: ask("/health") is not None or process.poll() is not None, "make run does not answer")
            if ask("/logs", PACKET) is None:
                raise FailedError("make run took no packet")
            until(lambda: (ask("/stats") or {})["packets"]["delivered"] == 1, "the packet was not delivered")
            print("bare: a packet was taken and delivered", flush=True)
            os.killpg(process.pid, signal.SIGINT)
            until(lambda: process.poll() is not None, "Ctrl-C does not end make run")
            until(lambda: ask("/health") is None, "something of make run is left after Ctrl-C")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def bootstrap(suite: str, root: Path) -> None:
    """Make the system, from the mirror that apt uses here, or else the one that debootstrap knows."""
    fresh = root.with_name(f"{suite}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, str(fresh), *mirror()]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        last = "\n".join(done.stdout.splitlines()[-5:])
        raise CannotError(f"debootstrap could not make {suite}:\n{last}")
    subprocess.run(["chroot", fresh, "useradd", "--create-home", USER], check=True)
    fresh.rename(root)


def mirror() -> list[str]:
    """Return the address of the Debian archive in apt's settings, in a list; empty where this is no Debian."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    if release["ID"].strip('"') != "debian" or shutil.which("apt-get") is None:
        return []
    command = ["apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = (line.split() for line in done.stdout.splitlines())
    codename = release.get("VERSION_CODENAME", "").strip('"')
    return [uri for suite, component, uri in rows if suite == codename and component == "main"][:1]


def pip_settings() -> dict[str, str]:
    """Return pip's global settings, from its files and from the environment, which goes before them."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files, environment = {}, {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition("=")
        section_, _, name = name.rpartition(".")
        if section_ in ("global", ":env:"):
            (files if section_ == "global" else environment)[name] = ast.literal_eval(value)
    return files | environment


def paths_in(value: str) -> list[Path]:
    """Return the paths that a setting names. The pages of an index may link to files beside it: what it is in."""
    found = []
    for word in value.split():
        address = re.fullmatch("(file://)?(/.*)", word)
        if address and Path(address[2]).exists():
            found.append(Path(address[2]).parent if address[1] else Path(address[2]))
    return found


def leave_network() -> None:
    """Give this process, and what it starts from now on, a network with nothing but a loopback device."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        raise CannotError(f"a network of its own is not allowed: {os.strerror(ctypes.get_errno())}")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def mount(*words: str) -> None:
    """Run mount."""
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotError(done.stderr.strip())


def ask(path: str, body: bytes | None = None) -> Any:
    """Return the answer of what `make run` has started; None without one."""
    question = urllib.request.Request(URL + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(question, timeout=10) as answer:
            return json.load(answer)
    except OSError:
        return None


def until(condition: Any, otherwise: str) -> None:
    """Wait for it."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise FailedError(otherwise)
        time.sleep(0.1)


def section(title: str) -> None:
    """Say what comes."""
    print(f"\n---- {title} (after {time.monotonic() - BEGUN:.0f} s)\n", flush=True)


BEGUN = time.monotonic()

if __name__ == "__main__":
    sys.exit(main())
