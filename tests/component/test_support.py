"""What tests wait with: a busy machine is not a fault, and what a process said is not overlooked."""

from __future__ import annotations

import sys
import time
from itertools import count

import pytest
from support import Process, free_port, wait_until


class SlowlyRead(Process):
    """Its output is read later than its end is seen, as on a busy machine."""

    def _read(self):
        time.sleep(0.3)
        super()._read()


@pytest.mark.processes
def test_process_is_read_before_giving_up():
    process = SlowlyRead([sys.executable, "-c", "print('ready'); print('address already in use'); raise SystemExit(3)"])
    with pytest.raises(AssertionError, match=r"ended \(3\) without saying 'listens'(.|\n)*address already in use"):
        process.line_with("listens")
    assert process.line_with("ready") == "ready"


def test_waiting_goes_on_while_work_goes_on():
    work = count()
    assert wait_until(lambda: next(work) > 20, "all of it", 0.1, progress=lambda: next(work))
    with pytest.raises(AssertionError, match=r"not within 0\.1 s: more of it"):
        wait_until(lambda: False, "more of it", 0.1, progress=lambda: 7)


def test_no_port_is_given_twice():
    ports = [free_port() for _ in range(100)]
    assert len(set(ports)) == 100
