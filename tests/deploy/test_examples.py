"""What the pages show was run: requests and their answers, the analyzer of the quick start, its configuration."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys

import pytest
from dockerfile import ROOT
from support import Distributor, Emitter, Mocks, Process, free_port, get_json, request, running, wait_until

API = (ROOT / "docs" / "api.md").read_text()
QUICKSTART = (ROOT / "docs" / "quickstart.md").read_text()
README = (ROOT / "README.md").read_text()
LOAD_TESTING = (ROOT / "docs" / "load-testing.md").read_text()
JSON = {"Content-Type": "application/json"}
with_curl = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed (scripts/peers.sh installs it)")


def examples():
    """Yield every command of the API's page with the answer that is shown."""
    for block in re.findall(r"```console\n(.*?)```", API, re.DOTALL):
        yield from re.findall(r"^\$ (curl .*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)


@contextlib.contextmanager
def serving(folder):
    mocks = Mocks()
    with running(mocks):
        distributor = Distributor(folder, mocks)
        with running(distributor):
            Emitter(distributor.port).send(100)
            distributor.wait_at_rest()
            yield distributor


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("examples")) as distributor:
        yield distributor


@pytest.fixture
def unharmed(tmp_path):
    """A service that has refused and changed nothing: /health and a reload tell what other examples have done."""
    with serving(tmp_path) as distributor:
        wait_until(lambda: get_json(distributor.port, "/health")["deadLetters"]["fileSystemUsed"], "it is looked at")
        yield distributor


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """A service with a dead letter."""
    mocks = Mocks()
    with running(mocks):
        mocks.set_all(status=422)
        distributor = Distributor(tmp_path_factory.mktemp("refused"), mocks)
        with running(distributor):
            assert distributor.post()[0] == 202
            wait_until(lambda: get_json(distributor.port, "/dead-letters")["last"], "it is seen")
            yield distributor


def shape(value):
    """Return what a document looks like: names and kinds; of a list, what its first element looks like."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value[:1]]
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def assert_answer_is_as_shown(answer, shown):
    head, _, body = shown.rpartition("\n\n") if shown.startswith("HTTP/") else ("", "", shown)
    if shown.startswith("HTTP/"):
        first, *lines = (head or shown).strip().splitlines()
        actual, _, answer = answer.replace("\r\n", "\n").partition("\n\n")
        assert actual.startswith(f"{first}\n")
        assert set(lines) <= set(actual.splitlines())
        body = body if head else ""
    if body.lstrip().startswith("{") and body.rstrip().endswith("}"):
        expected, got = shape(json.loads(body)), shape(json.loads(answer))
        for document in (expected, got):  # null until something has happened
            document.pop("override", None)
        assert got == expected
        status = json.loads(body).get("status")
        assert status is None or status == json.loads(answer)["status"]
    elif body and body[0].isalpha():
        assert re.sub(r"\d+", "1", answer).split() == re.sub(r"\d+", "1", body).split()
    elif body:
        assert answer.split() == body.split()


@with_curl
@pytest.mark.parametrize(("command", "shown"), list(examples()), ids=lambda text: text[:60])
def test_api_page_requests_respond_as_shown(request, command, shown):
    of_its_own = {"dead-letters": "refused", "health": "unharmed", "reload": "unharmed"}
    service = request.getfixturevalue(of_its_own.get(command.rpartition("/")[2], "service"))
    local = command.replace("127.0.0.1:3000", f"127.0.0.1:{service.port}")
    done = subprocess.run(["sh", "-c", local], capture_output=True, text=True, check=False, timeout=30)
    assert_answer_is_as_shown(done.stdout, shown)


def test_each_page_request_is_tested():
    assert len(list(examples())) == API.count("$ curl")


def test_quick_start_analyzers_work(tmp_path):
    """The program and the file as they stand there, with other ports."""
    (program,) = re.findall(r"```python\n(.*?)```", QUICKSTART, re.DOTALL)
    (text,) = re.findall(r"```toml\n(.*?)```", QUICKSTART, re.DOTALL)
    assert text in README
    (tmp_path / "analyzer.py").write_text(program)
    ports = {"4001": str(free_port()), "4002": str(free_port())}
    text = re.sub(r"\b400[12]\b", lambda match: ports[match[0]], text)
    (tmp_path / "fastdist.toml").write_text(text)
    analyzers = [Process([sys.executable, "analyzer.py", port], cwd=tmp_path) for port in ports.values()]
    with running(*analyzers):
        command = [sys.executable, "-m", "fastdist"]
        checked = subprocess.run([*command, "check", "fastdist.toml"], cwd=tmp_path, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr
        serve = [*command, "serve", "--config", "fastdist.toml", "--host", "127.0.0.1", "--port", "0"]
        process = Process(serve, cwd=tmp_path, WORKER_COUNT="1", FASTDIST_QUEUE__CAPACITY="8MiB")
        with running(process):
            port = int(json.loads(process.line_with("fastdist is ready"))["url"].rsplit(":", 1)[1])
            for number in range(40):
                body = json.dumps({"emitterId": "web-42", "messages": [{"message": f"hello {number}"}]}).encode()
                assert request(port, "POST", "/logs", body, JSON)[0] == 202
            wait_until(lambda: sum(len(each.lines) for each in analyzers) == 40, "all are delivered")
            large, small = (len([line for line in each.lines if " web-42 hello " in line]) for each in analyzers)
            assert large + small == 40
            assert 28 <= large <= 32
            assert (tmp_path / "fastdist-data").is_dir()


@with_curl
def test_quick_start_requests_are_accepted(service):
    """Those to the distributor, as they stand there."""
    commands = re.findall(r"^curl (?:[^\n]*\\\n)*[^\n]*", QUICKSTART, re.MULTILINE)
    logs = [command for command in commands if "3000/logs" in command]
    assert len(logs) == 2
    for command in logs:
        local = command.replace("127.0.0.1:3000", f"127.0.0.1:{service.port}").replace("curl ", "curl -s ", 1)
        done = subprocess.run(["sh", "-c", local], capture_output=True, text=True, check=False, timeout=30)
        assert json.loads(done.stdout.splitlines()[-1])["status"] in {"accepted", "delivered"}, done


@pytest.mark.parametrize("tool", ["wrk", "ab"])
def test_load_by_hand_works_as_documented(service, tool, tmp_path):
    """The packet, the script and the commands as they stand there, for a shorter time."""
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed (scripts/peers.sh installs it)")
    for language, name in (("json", "packet.json"), ("lua", "post.lua")):
        (text,) = re.findall(rf"```{language}\n(.*?)```", LOAD_TESTING, re.DOTALL)
        (tmp_path / name).write_text(text)
    (command,) = re.findall(rf"^{tool} -.*3000/logs$", LOAD_TESTING, re.MULTILINE)
    for shown, here in {"127.0.0.1:3000": f"127.0.0.1:{service.port}", "-d30s": "-d1s", "100000": "1000"}.items():
        command = command.replace(shown, here)
    accepted = service.stats()["packets"]["accepted"]
    done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done
    assert "Non-2xx" not in done.stdout
    assert service.wait_at_rest()["packets"]["accepted"] > accepted
