"""Idle OpenMP threads sleep soon, and torch takes at most two threads: cores may be shared."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read once, when torch is imported
os.environ["NANOCASCADE_DEVICE"] = "cpu"  # the scripts under test run alike where there is a GPU

import torch  # noqa: E402

affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, len(affinity(0))))))
