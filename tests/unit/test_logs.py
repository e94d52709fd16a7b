"""Lines of a log, as they leave a process."""

import json
import os
import subprocess
import sys

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
