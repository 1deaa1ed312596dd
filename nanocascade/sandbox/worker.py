"""One helper process for work on model output that may hang: it is killed and started again.

Symbolic mathematics, a data set's regular expressions and some parsers have no useful bound on
time or memory, and no time-out works inside a thread. They run in a second Python instead, a JSON
line a job. The limit is CPU time, kept by the kernel (ITIMER_PROF ends the process even inside a C
loop), so that a busy machine changes no verdict; wall time is only the backstop.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

CPU_SECONDS, WALL_SECONDS = 3.0, 60.0  # a job; the slowest honest LaTeX pair takes 0.45 s
MEMORY_BYTES = 2 << 30  # address space of the helper


class TookTooLong(Exception):
    """The job ran out of time or memory, which is the answer's doing: the verdict is a 0."""


def require(module, package, what):
    """ValueError with the pip command if an extra is missing; called when data is read."""
    if find_spec(module) is None:
        raise ValueError(f"{what} needs: pip install {package}")


class Worker:
    """The helper process, started on first use; threads may share it."""

    def __init__(self):
        self.lock, self.process, self.owner = threading.Lock(), None, None

    def run(self, function, extra, *args):
        """function(*args), plain values, in the helper; it imports `extra` before the clock starts.

        ValueError if the function raised, TookTooLong if it had to be killed.
        """
        with self.lock:
            if self.owner != os.getpid() or self.process.poll() is not None:
                self._start()  # first use, or it died, or this is a fork and the pipe not ours
            try:
                job = [CPU_SECONDS, extra, function.__module__, function.__name__, args]
                print(json.dumps(job), file=self.pipe, flush=True)
                begun, reply = self.pipe.readline(), self.pipe.readline()
            except TimeoutError:
                begun, reply = "begun", ""
            except OSError:  # nobody reads: it died while starting
                begun, reply = "", ""
            if not reply.endswith("\n"):
                self.process.kill()
                self.process.wait()
                if not begun:  # it died before it saw the answer: never a silent 0
                    raise RuntimeError(f"the reward helper does not start; does {extra} import?")
                raise TookTooLong(f"{function.__name__} was killed at its limit")
        status, result = json.loads(reply)
        if status == "raised":
            raise ValueError(result)
        return result

    def _start(self):
        ours, theirs = socket.socketpair()
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from nanocascade.sandbox.worker import serve; serve()"],
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path.strip(os.pathsep)},
        )
        theirs.close()
        ours.settimeout(WALL_SECONDS)
        self.pipe, self.owner = ours.makefile("rw"), os.getpid()


worker = Worker()


def serve():
    """The helper's loop: answers "begun", then the result, for each job."""
    import resource
    import signal

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    pipe = socket.socket(fileno=0).makefile("rw")
    for line in pipe:
        seconds, extra, module, name, args = json.loads(line)
        importlib.import_module(extra)
        importlib.import_module(module)
        print("begun", file=pipe, flush=True)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            reply = json.dumps(["ok", getattr(sys.modules[module], name)(*args)], default=str)
        except Exception as error:  # a foreign parser's bug on this answer; reported, not hidden
            reply = json.dumps(["raised", f"{type(error).__name__}: {error}"[:300]])
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, file=pipe, flush=True)
