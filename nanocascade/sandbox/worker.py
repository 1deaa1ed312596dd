"""A helper process for functions that may hang on model output; it can be killed and restarted.

Symbolic mathematics, a data set's regular expressions and some parsers have no useful bound on
time or memory, and Python cannot stop a thread. They run in a second Python process instead, which
reads one JSON line a job. The limit is CPU time, enforced by the kernel (ITIMER_PROF ends the
process even inside a C loop), so a busy machine changes no verdict; wall time is the backstop.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

CPU_SECONDS, WALL_SECONDS = 3.0, 60.0  # a job; the slowest honest LaTeX pair takes 0.45 s
MEMORY_BYTES = 2 << 30  # address space of the helper process


class TookTooLong(Exception):
    """The job exceeded its time or memory. The answer caused that, so its reward is 0."""


def require(module, package, what):
    """Raise ValueError with the pip command if an extra is missing. Called when data is read."""
    if find_spec(module) is None:
        raise ValueError(f"{what} needs: pip install {package}")


class Worker:
    """The helper process, started on first use. Threads may share it."""

    def __init__(self):
        self.lock, self.process, self.owner = threading.Lock(), None, None

    def run(self, function, extra, *args):
        """The result of function(*args) in the helper; arguments and result are JSON values.

        The helper imports the module `extra` before the time limit starts. Raises ValueError if the
        function raised, TookTooLong if the helper had to be killed.
        """
        with self.lock:
            if self.owner != os.getpid() or self.process.poll() is not None:
                self._start()  # first use, or it died, or a forked process inherited it
            try:
                job = [CPU_SECONDS, extra, function.__module__, function.__name__, args]
                print(json.dumps(job), file=self.pipe, flush=True)
                begun, reply = self.pipe.readline(), self.pipe.readline()
            except TimeoutError:
                begun, reply = "begun", ""
            except OSError:  # broken pipe: the helper died while starting
                begun, reply = "", ""
            if not reply.endswith("\n"):
                self.process.kill()
                self.process.wait()
                if not begun:  # it died before it read the answer, which must not cost a reward
                    raise RuntimeError(f"the reward helper does not start; does {extra} import?")
                raise TookTooLong(f"{function.__name__} was killed at its limit")
        status, result = json.loads(reply)
        if status == "raised":
            raise ValueError(result)
        return result

    def _start(self):
        ours, pipe_of_helper = socket.socketpair()
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from nanocascade.sandbox.worker import serve; serve()"],
            stdin=pipe_of_helper,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path.strip(os.pathsep)},
        )
        pipe_of_helper.close()
        ours.settimeout(WALL_SECONDS)
        self.pipe, self.owner = ours.makefile("rw"), os.getpid()


worker = Worker()


def serve():
    """The helper's loop: for each job it writes "begun", then the result."""
    import resource
    import signal

    with suppress(ValueError, OSError):  # macOS has no such limit
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
        except Exception as error:  # a bug of the parser library; reported to the caller
            reply = json.dumps(["raised", f"{type(error).__name__}: {error}"[:300]])
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, file=pipe, flush=True)
