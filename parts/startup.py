"""Before a script loads PyTorch: Python's version, open streams, packages, threads.

GNU OpenMP, which PyTorch brings under Linux, has a thread that waits for others spin before it
sleeps. On an idle machine that is the fastest. Where other programs use the cores it takes their
time, and the thread that is waited for stands in line behind it.
"""

import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Up to here, and in the grammar of the scripts, there is nothing that Python 3.8 does not know.
if sys.version_info < (3, 11):  # noqa: UP036
    print(
        f"{Path(sys.argv[0]).name}: error: Python 3.11 or newer is needed, and this is "
        f"{sys.version.split()[0]}: install one, and make the virtual environment with it",
        file=sys.stderr,
    )
    sys.exit(2)

# A stream is None where it was closed, and under pythonw.exe.
if sys.stdin is None:
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
if sys.stdout is None:
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
if sys.stderr is None:
    os.open(os.devnull, os.O_WRONLY)  # or the next file gets number 2, to which C libraries write
    sys.stderr = sys.stdout

SPINS, SPINS_BESIDE_OTHERS = "10000", "100"
QUOTA_FILES = ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")  # microseconds in a period
BUSY = 0.5  # of the cores in use: threads spin less from here on


def usable_cores(root: Path = Path("/")) -> tuple[int, str]:
    """How many cores this process may use, and what keeps it from the others. A quota counts for
    its control group and those below it; in a container only the topmost may be visible."""
    cores = os.cpu_count() or 1
    quotas = [math.inf]
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    groups = text_of(root / "proc/self/cgroup")
    for version_1, name in re.findall(r"^\d+:(|.*\bcpu\b.*):(/.*)", groups, re.MULTILINE):
        group = root / "sys/fs/cgroup" / ("cpu" if version_1 else "") / name.strip("/")
        for folder in (group, *group.parents):
            times = "".join(text_of(folder / file) for file in QUOTA_FILES)
            if match := re.fullmatch(r"(\d+)\s+(\d+)\s+", times):  # no limit: "max" or -1
                quotas.append(int(match[1]) / int(match[2]))
    if min(quotas) < allowed:
        return math.ceil(min(quotas)), f"a CPU quota of {min(quotas):.3g} cores"
    limit = f"a CPU affinity of {allowed} of {cores} cores"
    return allowed, limit if allowed < cores else ""


def text_of(path: Path) -> str:
    """What a file of the system says; nothing where it is not there."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def choose_spins(loadavg: str, cores: int) -> tuple[str, str]:
    """GOMP_SPINCOUNT by what /proc/loadavg says, and the reason, if it is not the usual one. The
    lesser load of the last minute and this moment counts: not that of a run that just ended."""
    last_minute, _, _, tasks, _ = (loadavg or "0 0 0 1/1 0").split()
    load = min(float(last_minute), int(tasks.partition("/")[0]) - 1)  # less this program itself
    if load < BUSY * cores:
        return SPINS, ""
    return SPINS_BESIDE_OTHERS, f"idle threads sleep: others keep {load:.1f} of {cores} cores busy"


allowed_cores, limit = usable_cores()
if limit:
    os.environ.setdefault("OMP_NUM_THREADS", str(allowed_cores))
WAITING = ""  # why threads that wait hardly spin, if that was chosen here
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    spins, WAITING = choose_spins(text_of(Path("/proc/loadavg")), os.cpu_count() or 1)
    os.environ["GOMP_SPINCOUNT"] = spins


@contextmanager
def packages_of(script: str, name: str) -> Iterator[None]:
    """Around the imports of a script, called `name`: without a package, or at Ctrl-C, it ends."""
    if name == "__main__":
        os.environ.pop("MPLBACKEND", None)  # Jupyter's may be missing here, and a PNG needs none
    try:
        yield
    except ModuleNotFoundError as missing:
        if name != "__main__":
            raise
        advice = "activate the virtual environment, or install requirements.txt"
        print(f"{script}: error: {missing}: {advice}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if name != "__main__":
            raise
        sys.exit(130)
