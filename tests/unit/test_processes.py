"""Which processes run: an exit code that nobody asked for is none of them."""

from __future__ import annotations

import os
import subprocess
import sys

from millrace import processes


def test_an_ended_child_whose_parent_has_not_asked_for_it() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert processes.alive(child.pid)
        assert child.pid in {one.pid for one in processes.tree(os.getpid())}
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and its exit code stays
        os.kill(child.pid, 0)
        assert not processes.alive(child.pid)
        assert child.pid not in {one.pid for one in processes.tree(os.getpid())}
    assert not processes.alive(child.pid)
