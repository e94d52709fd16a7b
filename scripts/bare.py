"""Try the README's commands on a bare Debian 12 and 13: a clean checkout, Python, a C compiler, make, nothing else.

A system is made by debootstrap from the mirror that this machine's apt uses, and kept in build/bare/ for the next time.
Into it go a checkout of what is committed and this machine's way to its package index (pip's settings and folders,
certificates, names, proxies). There a user who is not root runs `make build`, `make run` (until a packet has been
delivered, then Ctrl-C) and `make test`; the latter two without a network. All of it happens in namespaces of its own:
whatever ends this, no mount and no process stays. Needs root, debootstrap and git.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "bare"
SUITES = {"bookworm": "Debian 12", "trixie": "Debian 13"}
PACKAGES = "python3,python3-venv,python3-dev,gcc,make"
USER = "somebody"
URL = "http://127.0.0.1:3000"
PACKET = b'{"emitterId":"web-42","messages":[{"level":"info","message":"hello"}]}'
PATIENCE = 120  # seconds until what `make run` starts has to be there or gone
CLONE_NEWNET = 0x40000000
BEGUN = time.monotonic()


class CannotError(Exception):
    """Why something cannot be tried here."""


class FailedError(Exception):
    """What was tried and did not work."""


def main() -> int:
    """Run it, in namespaces; return 1 if something failed or could not be tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"{' or '.join(SUITES)} (default: both)")
    parser.add_argument("--unit", action="store_true", help="only build, and run the unit tests")
    parser.add_argument("--tests", default="", help="only build, and run these tests (words for pytest)")
    parser.add_argument("--or-skip", action="store_true", help="where it is impossible, say why and return 0")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if unknown := set(wanted.suites) - SUITES.keys():
        parser.error(f"no such suite: {', '.join(unknown)}")
    try:
        if not wanted.inside:
            enter_namespaces()
        for number in (signal.SIGINT, signal.SIGTERM):  # the namespaces end all that is in them, however busy it is
            signal.signal(number, lambda number, _frame: os._exit(128 + number))
        PLACE.mkdir(parents=True, exist_ok=True)
        lock = (PLACE / "lock").open("w")  # a second run waits for the first
        fcntl.flock(lock, fcntl.LOCK_EX)
        failures, obstacles = try_all(wanted.suites or list(SUITES), "tests/unit" if wanted.unit else wanted.tests)
    except CannotError as reason:
        failures, obstacles = [], [str(reason)]
    for failure in failures:
        print(f"bare: {failure}")
    for obstacle in obstacles:
        print(f"bare: this cannot be tried here: {obstacle}")
    return 1 if failures or (obstacles and not wanted.or_skip) else 0


def enter_namespaces() -> None:
    """Become this script again, with mounts and processes of its own; sh is there to reap orphans."""
    if os.geteuid() != 0:
        raise CannotError("it needs root")
    for program in ("debootstrap", "git", "unshare", "chroot", "ip"):
        if shutil.which(program) is None:
            raise CannotError(f"{program} is not installed (scripts/peers.sh installs debootstrap)")
    enter = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*enter, "true"], capture_output=True, check=False).returncode != 0:
        raise CannotError("mounts and processes of one's own are not allowed (unshare)")
    again = [sys.executable, __file__, "--inside", *sys.argv[1:]]
    os.execvp("unshare", [*enter, "sh", "-c", '"$@"; exit $?', "sh", *again])


def try_all(suites: list[str], tests: str) -> tuple[list[str], list[str]]:
    """Build while there is a network, then run everything, or these tests; return failures and obstacles.

    Systems build and test at the same time, unless all tests are wanted: some measure, and `make run` has its ports.
    """
    systems = [System(suite, aside=len(suites) > 1, build="quick" if tests else "release") for suite in suites]
    failures: list[str] = []
    obstacles: list[str] = []

    def attempt(system: System, act: Callable[[System], None]) -> None:
        try:
            act(system)
        except FailedError as error:
            failures.append(f"{system.name}: {error}")
            systems.remove(system)
        except CannotError as error:
            obstacles.append(f"{system.name}: {error}")
            systems.remove(system)
        finally:
            system.show()

    def at_once(act: Callable[[System], None]) -> None:
        with ThreadPoolExecutor(len(suites)) as pool:
            list(pool.map(attempt, list(systems), [act] * len(systems)))

    at_once(System.build)
    leave_network()
    if tests:
        at_once(lambda system: system.run(".venv/bin/python", "-m", "pytest", *tests.split()))
        return failures, obstacles
    for system in list(systems):
        system.aside = False
        attempt(system, System.run_and_test)
    return failures, obstacles


class System:
    """A bare Debian with a checkout in it. ``aside``: what is said there is kept until ``show``."""

    def __init__(self, suite: str, *, aside: bool, build: str) -> None:
        self.suite, self.name, self.aside, self.kind = suite, f"{SUITES[suite]} ({suite})", aside, build
        self.root = PLACE / suite
        self.said = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the system)
        self.environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": f"/home/{USER}",
            "USER": USER,
            "TERM": "dumb",
        }

    def show(self) -> None:
        """Print what was kept."""
        self.said.seek(0)
        sys.stdout.write(self.said.read().decode(errors="replace"))
        sys.stdout.flush()
        self.said.seek(0)
        self.said.truncate()

    def section(self, title: str) -> None:
        """Say what comes."""
        text = f"\n---- {self.name}: {title} (after {time.monotonic() - BEGUN:.0f} s)\n\n"
        os.write(self.said.fileno() if self.aside else 1, text.encode())

    # ---- making it

    def build(self) -> None:
        """Make the system and the checkout, and run ``make build``."""
        if not self.root.exists():
            self.section("debootstrap")
            bootstrap(self.suite, self.root)
        self.section("checkout")
        self._mount()
        self._take_over_network()
        self._take_over_pip()
        self._check_out()
        self.run("make", "build", f"FASTDIST_BUILD={self.kind}")

    def _mount(self) -> None:
        for folder in ("tmp", "var/tmp"):
            shutil.rmtree(self.root / folder)
            (self.root / folder).mkdir()
            (self.root / folder).chmod(0o1777)
        mount("-t", "proc", "proc", f"{self.root}/proc")
        for folder in ("/dev", "/sys"):
            mount("--rbind", folder, f"{self.root}{folder}")
        mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", f"{self.root}/dev/shm")

    def _take_over_network(self) -> None:
        """Let names and certificates be those of outside, and the proxies."""
        for path in ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt"):
            if Path(path).exists():
                (self.root / path[1:]).unlink(missing_ok=True)  # it may be a link
                shutil.copyfile(path, self.root / path[1:])
        proxies = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
        self.environment |= {name: value for name, value in os.environ.items() if name.lower() in proxies}

    def _take_over_pip(self) -> None:
        """Give pip the settings it has outside, as variables, and show it the folders and files that they name."""
        for name, value in pip_settings().items():
            self.environment[f"PIP_{name.upper().replace('-', '_')}"] = value
            for path in paths_in(value):
                target = self.root / str(path)[1:]
                (target if path.is_dir() else target.parent).mkdir(parents=True, exist_ok=True)
                if path.is_file():
                    target.touch()
                mount("--bind", str(path), str(target))
                mount("-o", "remount,bind,ro", str(target))

    def _check_out(self) -> None:
        """Put what is committed into the home folder; what pip has downloaded in an earlier run is beside it."""
        git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
        tree = subprocess.run([*git, "archive", "HEAD"], capture_output=True, check=False)
        if tree.returncode != 0:
            raise CannotError(f"there is no committed tree: {tree.stderr.decode().strip()}")
        unpack = "rm -rf fastdist && mkdir fastdist && tar -x -C fastdist"
        subprocess.run([*self.chroot("~"), "sh", "-c", unpack], input=tree.stdout, check=True)

    # ---- using it

    def chroot(self, folder: str) -> list[str]:
        """Return what has a command run there, as that user."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        folder = folder.replace("~", f"/home/{USER}")
        return ["chroot", f"--userspec={USER}:{USER}", str(self.root), "env", "-i", "-C", folder, *variables]

    def start(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a command in the checkout."""
        self.section(" ".join(words))
        output = self.said if self.aside else None
        command = [*self.chroot("~/fastdist"), *words]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **options)

    def run(self, *words: str) -> None:
        """Run a command that must work."""
        if self.start(*words).wait() != 0:
            raise FailedError(f"{' '.join(words)} failed")

    def run_and_test(self) -> None:
        """Run ``make run`` until a packet is delivered, then press Ctrl-C: all must end. Then run ``make test``."""
        process = self.start("make", "run", start_new_session=True)
        try:
            until(lambda: ask("/health") or process.poll() is not None, "make run does not answer")
            if not ask("/logs", PACKET):
                raise FailedError("make run took no packet")
            until(lambda: ask("/stats")["packets"]["delivered"] == 1, "the packet was not delivered")
            print("bare: a packet was taken and delivered", flush=True)
            os.killpg(process.pid, signal.SIGINT)
            until(lambda: process.poll() is not None, "Ctrl-C does not end make run")
            until(lambda: not ask("/health"), "something of make run is left after Ctrl-C")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.run("make", "test")


# ---- what the machine outside has


def bootstrap(suite: str, root: Path) -> None:
    """Make the system, from the mirror and by the proxy of apt here, or else from the mirror that debootstrap knows."""
    fresh = root.with_name(f"{suite}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    proxy = output_of("apt-config", "shell", "x", "Acquire::http::Proxy").removeprefix("x=").strip("'\n")
    environment = ({"http_proxy": proxy} if proxy else {}) | os.environ
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, str(fresh), *mirror()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        last = "; ".join((done.stdout + done.stderr).splitlines()[-3:])
        raise CannotError(f"debootstrap failed: {last}")
    subprocess.run(["chroot", fresh, "useradd", "--create-home", USER], check=True)
    fresh.rename(root)


def mirror() -> list[str]:
    """Return the address of the Debian archive in apt's settings, in a list; empty where this is no Debian."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    if release.get("ID", "").strip('"') != "debian":
        return []
    codename = release.get("VERSION_CODENAME", "").strip('"')
    targets = output_of("apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)")
    rows = [line.split() for line in targets.splitlines()]
    return [address for suite, component, address in rows if (suite, component) == (codename, "main")][:1]


def pip_settings() -> dict[str, str]:
    """Return pip's global settings, from its files and from the environment, which goes before them."""
    found: dict[str, dict[str, str]] = {"global": {}, ":env:": {}}
    for line in output_of(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        section, _, name = name.rpartition(".")
        if section in found:
            found[section][name] = ast.literal_eval(value)
    return found["global"] | found[":env:"]


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
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        raise CannotError(f"a network of its own is not allowed: {os.strerror(ctypes.get_errno())}")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def mount(*words: str) -> None:
    """Run mount."""
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotError(done.stderr.strip())


def output_of(*words: str) -> str:
    """Return what a command prints; nothing where it is not installed or fails."""
    if shutil.which(words[0]) is None:
        return ""
    return subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout


# ---- what runs inside


def ask(path: str, body: bytes | None = None) -> Any:
    """Return the answer of what `make run` has started; None without one."""
    question = urllib.request.Request(URL + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(question, timeout=10) as answer:
            return json.load(answer)
    except OSError:
        return None


def until(condition: Callable[[], Any], otherwise: str) -> None:
    """Wait for it."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise FailedError(otherwise)
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
