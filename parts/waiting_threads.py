"""Threads that wait for each other sleep soon, so that a busy machine does not stall them. Import before PyTorch.

GNU OpenMP, which PyTorch brings under Linux, has a waiting thread spin for some milliseconds. On an idle machine that
is the fastest; where other programs want the cores, it is their time that is spun away, and the thread that is waited
for stands in line behind it.
"""

import os

SPINS = "10000"

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = SPINS
