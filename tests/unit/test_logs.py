"""Lines of a log, as they leave a process."""

import json
import os
import subprocess
import sys

import pytest

WRITER = """
import sys
from fastdist import logs
logs.configure(worker=sys.argv[1])
log = logs.get()
for number in range(400):
    log.info("x" * 50, number=number)
"""


def test_processes_on_one_stream_mix_no_line(tmp_path):
    """Also where Python does not buffer (as in containers), which writes in as many pieces as it is given."""
    target = tmp_path / "log"
    with target.open("ab") as stream:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(n)], stderr=stream, env=os.environ | {"PYTHONUNBUFFERED": "1"}
            )
            for n in range(4)
        ]
        assert [process.wait(60) for process in processes] == [0] * 4
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    for n in range(4):
        assert [line["number"] for line in lines if line["worker"] == str(n)] == list(range(400))


def test_line_of_invalid_unicode_is_written(capfd):
    """A file's name may be any bytes."""
    program = "from fastdist import logs; logs.configure(); logs.get().info('é', file='a\\udcff', number=1 << 70)"
    subprocess.run([sys.executable, "-c", program], check=True)
    line = json.loads(capfd.readouterr().err)
    assert (line["message"], line["file"], line["number"]) == ("é", "a\udcff", 1 << 70)


FAILING = """
import asyncio, gc, socket, sys
from types import SimpleNamespace as Any

class Failing:
    def __init__(self, *_):
        pass

    def prepare(self):
        pass

    async def run(self):
        async def fail():
            raise ZeroDivisionError

        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: [][0])
        task = loop.create_task(fail())
        await asyncio.sleep(0.01)
        del task
        gc.collect()
        loop.call_exception_handler({"message": "another", "protocol": Any(body="what it says")})
        return 0

    async def serve(self, commands):
        await self.run()

"""
PROCESSES = {
    "supervisor": """
from fastdist.supervisor import main
main.Supervisor = Failing
main.serve(Any(config=Any(queue=Any(backend="ring"))))
""",
    "worker": """
from fastdist.worker import main
main.Worker = Failing
control, _other = socket.socketpair()
assignment = main.Assignment(0, 0, -1, 0, control.detach(), 0, {})
sys.argv = ["", main.msgspec.json.encode(assignment).decode()]
main.main()
""",
}


@pytest.mark.parametrize("process", PROCESSES)
def test_errors_of_the_loop_are_lines_too(capfd, process):
    subprocess.run([sys.executable, "-c", FAILING + PROCESSES[process]], check=True)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["level"] for line in lines] == ["error"] * 3
    assert [line.get("exception", "").splitlines()[-1:] for line in lines] == [
        ["IndexError: list index out of range"],
        ["ZeroDivisionError"],
        [],
    ]
    assert lines[1]["message"] == "Task exception was never retrieved"
    assert "what it says" not in str(lines[2])
