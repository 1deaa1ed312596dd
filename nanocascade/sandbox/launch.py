"""Starts a program other than Python, confined. rewards/proof.py runs coqc with it.

    python -I -S launch.py SECONDS MEMORY OUTPUT WRITES READS COMMAND...

The program can execute only itself. It reads libraries and the folder READS, and writes existing
files of the folder WRITES, each up to OUTPUT bytes. This needs Landlock.
"""

import glob
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # -I leaves it out
import jail  # noqa: E402

CALLS = (  # system calls that starting a compiler needs besides jail.ALLOWED
    jail.OPENAT + " execve:59:221 pread64:17:67 readlink:89: readlinkat:267:78 chdir:80:49"
    " arch_prctl:158: set_tid_address:218:96"
)
EXECUTE, WRITE, READ, LIST, TRUNCATE = 1, 2, 4, 8, 16384  # Landlock's rights


def launch(seconds, memory, output, writes, reads, *command):
    loaders = glob.glob("/lib*/ld-linux*")  # the kernel executes one to load a program
    grants = [(os.path.realpath(path), EXECUTE | READ) for path in (command[0], *loaders)]
    grants += [("/etc/ocamlfind.conf", READ), (reads, READ | LIST)]
    grants += [(writes, WRITE | READ | LIST | TRUNCATE)]
    confinement = jail.Confinement(grants, CALLS)
    if not confinement.landlock:
        sys.exit("this system has no Landlock: programs that write files cannot be confined")
    confinement.server = os.getppid()
    limits = {"total_seconds": float(seconds), "memory": int(memory), "output": int(output)}
    confinement.put_on(limits)
    os.execve(command[0], command, {})


if __name__ == "__main__":
    launch(*sys.argv[1:])
