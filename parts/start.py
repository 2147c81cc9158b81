"""Before a script loads PyTorch: threads that sleep soon, and one sentence where a package is missing.

GNU OpenMP, which PyTorch brings under Linux, has a thread that waits for others spin for some milliseconds. On an idle
machine that is the fastest. Where other programs want the cores it is their time that is spun away, and the thread that
is waited for stands in line behind it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SPINS = "10000"

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = SPINS


@contextmanager
def packages_of(script: str, name: str) -> Iterator[None]:
    """Around the imports of a script: without a package, the script called `name` ("__main__") ends with a sentence."""
    try:
        yield
    except ModuleNotFoundError as missing:
        if name != "__main__":
            raise
        advice = "activate the virtual environment, or install requirements.txt"
        print(f"{script}: error: {missing}: {advice}", file=sys.stderr)
        sys.exit(2)
