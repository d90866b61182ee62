"""The tests. Before torch is imported, here and in what they start: one thread a process, as a rank of a job has."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
