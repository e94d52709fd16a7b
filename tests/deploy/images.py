"""Images as the Dockerfile makes them, without Docker: overlays over this machine's own root, entered by chroot.

This machine stands in for the images that stages begin with: what it has too much of (a compiler in the slim one) a
build cannot show. All else is as it would be: commands run as they are written, users are made, files are copied from
stage to stage, and containers see a root that may be read-only, with volumes mounted into it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import dockerfile

ENVIRONMENT = "/usr/local/image"  # python:* has its interpreter, with pip, in /usr/local
PATH = f"{ENVIRONMENT}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PASSED_ON = re.compile(r"PIP_\w+|\w+_PROXY|\w+_proxy|SSL_CERT_\w+|REQUESTS_CA_BUNDLE")  # what pip needs on this machine

INTERPRETER = Path(os.path.realpath(sys._base_executable))
BINDS: dict[str, Path] = {}  # of this machine, in every image
if any(INTERPRETER.is_relative_to(home) for home in ("/root", "/home")):  # where other users, and services, see nothing
    BINDS["/usr/local/python"] = Path(sys.base_prefix)
    INTERPRETER = Path("/usr/local/python") / INTERPRETER.relative_to(sys.base_prefix)


def obstacle(folder: Path) -> str:
    """Return why no image can be made here; empty when one can."""
    if os.geteuid() != 0:
        return "overlays and chroot need root"
    for program in ("unshare", "flock", "chroot", "groupadd", "useradd"):
        if shutil.which(program) is None:
            return f"there is no {program}"
    command = Image(folder / "probe").command(["sleep", "1"])
    tried = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]  # one root, two containers
    for process in tried:
        _, error = process.communicate()
        if process.returncode:
            return f"no overlay over this machine's root: {error.strip()}"
    return ""


class Image:
    """A root file system: a layer over this machine's own. It begins as a copy of another's, if it is made from one."""

    def __init__(self, folder: Path, begin: Image | None = None) -> None:
        self.layer, self.work, self.root = folder / "layer", folder / "work", folder / "root"
        for path in (self.layer, self.work, self.root):
            path.mkdir(parents=True)
        self.layer.chmod(0o755)
        for path in BINDS:
            (self.layer / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
        if begin is not None:  # not as a layer between: the kernel wants no layer inside another, as all are in "/"
            subprocess.run(["cp", "-a", f"{begin.layer}/.", str(self.layer)], check=True)

    def command(  # noqa: PLR0913  (each is a flag of docker run)
        self,
        words: list[str],
        *,
        user: str = "0:0",
        folder: str = "/",
        variables: dict[str, str] | None = None,
        volumes: dict[str, Path] | None = None,
        read_only: bool = False,
    ) -> list[str]:
        """Return the command that runs another in this image; what it changes stays."""
        options = f"lowerdir=/,upperdir={self.layer},workdir={self.work}"
        # One at a time: a mount empties the folder that another at that moment works in.
        steps = [f"flock {self.layer} mount -t overlay overlay -o {options} {self.root}"]
        steps += [f"mount -o remount,bind,ro {self.root}"] if read_only else []
        steps += [f"mount --rbind /{name} {self.root}/{name}" for name in ("proc", "dev")]
        steps += [f"mount --bind {source} {self.root}{target}" for target, source in (BINDS | (volumes or {})).items()]
        environment = [f"{key}={value}" for key, value in ({"PATH": PATH, "HOME": "/root"} | (variables or {})).items()]
        inside = ["chroot", f"--userspec={user}", str(self.root), "env", "-i", "-C", folder, *environment, *words]
        script = "\n".join([*steps, f"exec {shlex.join(inside)}"])
        return ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script]

    def run(self, words: list[str], **options) -> str:
        """Run a command to its end, which must be a good one."""
        done = subprocess.run(self.command(words, **options), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def copy_in(self, source: Path, target: str) -> None:
        """Copy a file, or what is in a folder, to a path."""
        path = self.layer / target.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, path, symlinks=True, dirs_exist_ok=True)
        else:
            shutil.copy2(source, path)

    def copy_text(self, text: str, target: str) -> None:
        """Have a file of that text."""
        path = self.layer / target.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


class Builder:
    """Makes images, each stage once.

    That of ``build`` is where the core is compiled from clean sources, in an isolated build as pip does it: with -O1,
    for the release, which differs in that flag only, is what all other tests use.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images: dict[str, Image] = {}
        self.variables = {key: value for key, value in os.environ.items() if PASSED_ON.fullmatch(key)}
        self.variables["FASTDIST_BUILD"] = "quick"

    def build(self, name: str) -> Image:
        """Return the image of a stage."""
        if name not in self.images:
            stage = dockerfile.stages()[name]
            begin = self.build(stage.image) if stage.image in dockerfile.stages() else self._base()
            self.images[name] = Image(self.folder / name, begin)
            self._carry_out(stage, self.images[name])
        return self.images[name]

    def _base(self) -> Image:
        """Return what stands in for python:*: this machine, with an interpreter that has pip."""
        if "this machine" not in self.images:
            image = self.images["this machine"] = Image(self.folder / "this-machine")
            for (
                path
            ) in BINDS:  # an interpreter that was moved finds its library no longer by the path it was built with
                image.copy_text(f"{path}/lib\n", "/etc/ld.so.conf.d/00-python.conf")
                image.run(["ldconfig"])
            image.run([str(INTERPRETER), "-m", "venv", ENVIRONMENT])
        return self.images["this machine"]

    def _carry_out(self, stage: dockerfile.Stage, image: Image) -> None:
        where = next((each.text for one in dockerfile.lineage(stage.name) for each in one.all("WORKDIR")), "/")
        for each in stage.instructions:
            if each.word == "WORKDIR":
                where = each.text
                image.run(["mkdir", "-p", where])
            elif each.word == "RUN":
                image.run(["/bin/sh", "-c", each.text], folder=where, variables=self.variables)
            elif each.word == "COPY":
                *sources, target = each.text.split()
                target = os.path.join(where, target)  # noqa: PTH118  (it may end in a slash, which tells)
                for source in sources:
                    self._copy(each.flags.get("from"), source, target, image)

    def _copy(self, stage: str | None, source: str, target: str, image: Image) -> None:
        if stage:
            image.copy_in(self.build(stage).layer / source.lstrip("/"), target)
            return
        files = [name for name in dockerfile.context() if name == source or name.startswith(f"{source}/")]
        assert files, f"COPY {source}: .dockerignore lets nothing of that name in"
        into = target if target.endswith("/") else ""
        for name in files:
            image.copy_in(dockerfile.ROOT / name, f"{into}{name}" if into else f"{target}{name.removeprefix(source)}")
