"""One thread, here and in child processes: results of runs in either are then the same bits."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
