"""A confined Python process that runs several programs, which share their variables."""

import json
import os
import resource
import select
from contextlib import suppress

from nanocascade.sandbox import jail
from nanocascade.sandbox.sandbox import (
    LIMITS,
    SLEEP_FACTOR,
    Server,
    make_pipe,
    memory_file,
    outcome,
)

# The program of the child. A byte on CALLS says that a new program is in STDIN, a byte on REPLIES
# that it is over. A program that tampers with these files harms only its own session.
LOOP = """
%(prelude)s
def run_programs(names):
    import os, signal, sys
    while os.read(%(calls)d, 1):
        os.lseek(0, 0, 0)
        program = os.read(0, os.fstat(0).st_size).decode()
        signal.setitimer(signal.ITIMER_PROF, %(seconds)r)
        try:
            exec(compile(program, "program.py", "exec"), names)
        except SystemExit:
            pass
        except BaseException as error:
            print(error_text(error))
        sys.stdout.flush()
        os.write(%(replies)d, b".")
run_programs({"__name__": "__main__"})
"""


class Session:
    """One child of a sandbox's server; it runs one program at a time. The server has other jobs.

    Limits are those of any program: CPU time of each, and of all together; memory; output of each.
    """

    def __init__(self, sandbox, prelude: str, limits=LIMITS):
        """prelude: source of error_text(error), the text of an exception."""
        assert not sandbox.plain_only, "a session runs any program, and nothing is confined here"
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a session has four open files
        values = {"prelude": prelude, "seconds": limits.test_seconds}
        values |= {"calls": jail.CALLS, "replies": jail.REPLIES}
        job = {"modules": {}, "sources": [LOOP % values], **limits._asdict()}
        self.limits = limits
        self.program, self.stdout = memory_file(b""), memory_file(b"")
        (calls, self.calls), (self.replies, replies) = make_pipe(), make_pipe()
        with calls, replies, open(os.devnull, "r+b", 0) as null:  # then only the child holds them
            with memory_file(json.dumps(job).encode()) as file:
                files = [self.program, self.stdout, null, file, calls, replies, null]
                self.server = sandbox.idle.get() or Server()
                sandbox.idle.put(self.server)
                self.child = self.server.start(files)

    def run(self, program: str) -> tuple[str, str]:
        """(the program's output, ""), or (the output, how the program ended the session)."""
        for file in (self.stdout, self.program):  # open in the child too, at the same position
            file.truncate(0)
            file.seek(0)
        self.program.write(program.encode(errors="replace"))
        with suppress(BrokenPipeError):  # the child has ended since
            self.calls.write(b".")
        waiting = select.poll()
        waiting.register(self.replies)
        finished = bool(waiting.poll(1000 * SLEEP_FACTOR * self.limits.test_seconds))
        alive = finished and self.replies.read(1 << 16)[-1:] == b"."  # not so if the loop ended
        printed = os.pread(self.stdout.fileno(), self.limits.output, 0).decode(errors="replace")
        return printed, "" if alive else self.close(finished)

    def close(self, finished=True) -> str:
        """Kill the child. Returns how it had ended before that: at a limit, or by itself."""
        ended = self.server.end(self.child)
        ended = outcome(*ended, finished, self.limits, self.stdout, self.stdout).ended
        for file in (self.program, self.stdout, self.calls, self.replies):
            file.close()
        limits = "time limit", "output limit", "asleep"
        return ended if ended in limits else "process ended"  # its exit status depends on timing
