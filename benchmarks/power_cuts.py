"""Cut the power of a training run on file systems of its own, and look at what is lost.

    python benchmarks/power_cuts.py --cuts 20 --record power-cuts.json

Needs Linux, root, loop devices and mkfs; elsewhere it says so and ends. A cut takes what the file
system has sent to its device at one instant: it is shut down there without a last word, its image
is copied, and the copy is mounted, checked by fsck and used from then on. Of four cuts of training
one falls at a random instant, two into the writing of a checkpoint, one into the last sample; the
first of a run falls into its first save. Then a finished run is begun anew with --resume never, and
cut soon after; and a model is exported, and cut up to eight seconds after the export's last word.
The negative control does the same with a stand-in for fsync that does nothing: losses must be
noticed there.
"""

import fcntl
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.record import write_record  # noqa: E402
from benchmarks.torture import Arguments, OurTrainer, aim_into_a_write, differences  # noqa: E402

SHUT_DOWN, WITHOUT_FLUSH = (
    0x8004587D,
    2,
)  # FS_IOC_SHUTDOWN of linux/fs.h, and its flag for the hardest cut
NO_SYNC = "int fsync(int n) { return 0; } int fdatasync(int n) { return 0; }"


@dataclass(frozen=True)
class FileSystem:
    """How to make one, and how to bring it back after a cut."""

    make: str
    check: str
    megabytes: int = 64


SYSTEMS = {
    "ext4": FileSystem("mkfs.ext4 -q", "e2fsck -fy"),
    "ext4 without a journal": FileSystem("mkfs.ext4 -q -O ^has_journal", "e2fsck -fy"),
    "ext2": FileSystem("mkfs.ext2 -q", "e2fsck -fy"),
    "xfs": FileSystem("mkfs.xfs -q", "true", 320),
    "btrfs": FileSystem("mkfs.btrfs -q", "true", 128),
}


@dataclass(frozen=True)
class Options:
    """What to cut, and how often."""

    cuts: int = 20
    """of training, on each file system"""
    others: int = 5
    """of a run begun anew, and of an export, on each file system"""
    control_cuts: int = 6
    """of training in the negative control, on ext4"""
    seed: int = 0
    """of the instants"""
    work: Path = Path("out/power-cuts")
    """folder for images and mounts; emptied first"""
    record: Path | None = None
    """JSON file to write"""


class Device:
    """A file system in an image, mounted."""

    def __init__(self, work: Path, system: FileSystem):
        self.system, self.image, self.place = system, work / "image", work / "mounted"
        self.place.mkdir(parents=True, exist_ok=True)
        with open(self.image, "wb") as file:
            file.truncate(system.megabytes * 2**20)
        subprocess.run([*system.make.split(), self.image], check=True)
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self.image, self.place], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", self.place], check=True)

    def sync(self) -> None:
        """Have all of it on the device."""
        subprocess.run(["sync", "-f", self.place], check=True)

    def cut(self, process: subprocess.Popen | None) -> None:
        """Leave what is on the device now, and nothing else."""
        if process is not None:
            process.send_signal(signal.SIGSTOP)
        folder = os.open(self.place, os.O_RDONLY)
        with suppress(
            OSError
        ):  # a file system without it goes on sending for as long as the copy takes
            fcntl.ioctl(folder, SHUT_DOWN, struct.pack("I", WITHOUT_FLUSH))
        os.close(folder)
        left = self.image.with_name("left")
        shutil.copyfile(self.image, left)
        if process is not None:
            process.kill()
            process.wait()
        self.unmount()
        left.replace(self.image)
        for _ in range(3):  # until it finds no more errors
            command = [*self.system.check.split(), self.image]
            if subprocess.run(command, capture_output=True).returncode == 0:
                break
        self.mount()


class Cutter(OurTrainer):
    """Runs on a device, what they were heard to say, and what is wrong after a cut."""

    def __init__(self, options: Options, device: Device, shim: Path | None):
        super().__init__(
            Arguments(
                steps=600, work=options.work, flags="--amp=bf16 --dropout=0.1 --tokenizer=bpe:257"
            )
        )
        self.device, self.random = device, Random(options.seed)
        self.environment = os.environ | ({"LD_PRELOAD": str(shim)} if shim else {})
        self.said, self.out = options.work / "said.txt", device.place / "above" / "run"
        self.losses: Counter[str] = Counter()
        self.reported = self.cuts = 0  # the step that was last reported as saved
        self.new = True  # the run has not been cut yet

    def run(self, *command: object) -> subprocess.Popen:
        with open(self.said, "wb") as output:
            words = [sys.executable, *map(str, command)]
            return subprocess.Popen(words, stdout=output, stderr=output, env=self.environment)

    def start(self, out: Path, *more: str) -> subprocess.Popen:
        return self.run(ROOT / "train.py", *self.flags, f"--out_dir={out}", *more)

    def heard(self) -> str:
        return self.said.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, process: subprocess.Popen, words: str) -> None:
        while process.poll() is None and words not in self.heard():
            time.sleep(0.002)

    def wait(self, process: subprocess.Popen, number: int) -> None:
        """Until the moment of this cut."""
        if self.new:
            aim_into_a_write(process, self, self.out, 1, self.random.uniform(0, 0.02))
        elif number % 4 == 0:
            time.sleep(self.random.uniform(0, 8))
        elif number % 4 < 3:
            aim_into_a_write(
                process, self, self.out, self.random.randint(1, 3), self.random.uniform(0, 0.02)
            )
        else:
            self.wait_for(process, " | Corpus loss ")
            time.sleep(self.random.uniform(0, 0.02))

    def last_steps(self) -> list[int]:
        """Of the checkpoints that are there and whole."""
        steps = []
        for path in filter(Path.exists, self.checkpoints(self.out)):
            try:
                steps.append(self.load(path))
            except Exception as error:
                self.losses[f"{path.name}: {type(error).__name__}"] += 1
        return steps

    def note_reported(self) -> None:
        """The k-th save of a start is of the k-th multiple of save_every behind its first step, or
        of a later one."""
        heard, every = self.heard(), 20
        begun = int((re.findall(r"Resuming from step (\d+) ", heard) or ["0"])[-1])
        saves = heard.count(" | Saved checkpoint: ")
        least = begun if not saves else min(600, (begun // every + saves) * every)
        if "Measuring the corpus loss" in heard:  # behind a save that is waited for
            least = 600
        self.reported = max(self.reported, least)

    def look(self) -> None:
        """Whether what was reported is there."""
        steps = self.last_steps()
        if max(steps, default=0) < self.reported:
            self.losses["a reported save"] += 1
        self.reported = max(steps, default=0)
        heard = self.heard()
        for words in ("is not as the run left it", "set aside as", "Traceback"):
            self.losses[words] += heard.count(words)

    def train(self, cuts: int) -> None:
        """Cut training so often, then let it end and compare it with the run that nobody
        disturbed."""
        while self.cuts < cuts:
            process = self.start(self.out)
            self.wait(process, self.cuts)
            ended = process.poll()
            self.note_reported()
            self.device.cut(process)
            if ended:
                self.losses["a start that was refused"] += 1
            self.cuts += 1
            self.look()
            self.new = ended is not None
            if self.new:
                shutil.rmtree(self.out, ignore_errors=True)
                self.device.sync()
                self.reported = 0
        if self.start(self.out).wait():
            self.losses["a run that cannot be ended"] += 1
            return
        self.look()
        for name, value in differences(self.device.place.parent / "whole", self.out).items():
            self.losses[name] += bool(value)

    def begin_anew(self, cuts: int) -> None:
        """Cut soon after the earlier run was moved aside: its files are in one place or the
        other."""
        self.device.sync()  # that run ended long ago
        before = contents(self.out)
        for _ in range(cuts):
            process = self.start(self.out, "--resume=never")
            self.wait_for(process, "Moved the run")
            time.sleep(self.random.choice([0, self.random.uniform(0, 8)]))
            self.device.cut(process)
            self.cuts += 1
            self.losses["a file of the earlier run"] += len(before - contents(self.out))
            earlier = self.out / "earlier-1"
            if earlier.exists():  # back again, for the next cut
                for path in list(earlier.iterdir()):
                    target = self.out / path.name
                    if target.exists():
                        shutil.rmtree(target) if target.is_dir() else target.unlink()
                    path.rename(target)
                earlier.rmdir()
                self.device.sync()

    def export(self, cuts: int) -> None:
        """Cut up to eight seconds after the export said that it is done: it is there whole."""
        for number in range(cuts):
            out = self.device.place / "models" / f"hf{number}"
            process = self.run(ROOT / "export_hf.py", f"--checkpoint={self.out}", f"--out={out}")
            if process.wait():
                self.losses["an export that was refused"] += 1
            whole = contents(out)
            time.sleep(self.random.choice([0, 7, self.random.uniform(0, 8)]))
            self.device.cut(None)
            self.cuts += 1
            self.losses["a file of an export"] += len(whole - contents(out))


def contents(folder: Path) -> set[bytes]:
    """Of all files that are no lock and not empty."""
    paths = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".lock", ".pid")
    ]
    return {path.read_bytes() for path in paths} - {b""}


def why_not(work: Path) -> str | None:
    """What this machine lacks; None when it can cut."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "it needs Linux and root, to mount file systems"
    if missing := [name for name in ("mount", "mkfs.ext4", "gcc") if shutil.which(name) is None]:
        return f"it needs {', '.join(missing)}"
    try:
        device = Device(work, SYSTEMS["ext4"])
    except subprocess.CalledProcessError:
        return "loop devices cannot be mounted here"
    device.unmount()
    return None


def row(name: str, what: str, cutter: Cutter, before: int) -> dict:
    """What came of some cuts."""
    lost = {words: count for words, count in cutter.losses.items() if count}
    cutter.losses.clear()
    return {
        "file system": name,
        "what was cut": what,
        "cuts": cutter.cuts - before,
        "losses": sum(lost.values()),
        "of what": "; ".join(f"{words} {count}" for words, count in lost.items()),
    }


def main() -> None:
    options = tyro.cli(Options, description=__doc__, use_underscores=True)
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if reason := why_not(work):
        print(f"power_cuts.py: nothing was cut: {reason}")
        return
    shim = work / "nosync.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", shim],
        input=NO_SYNC,
        text=True,
        check=True,
    )
    rows = []
    for name, system in SYSTEMS.items():
        if shutil.which(system.make.split()[0]) is None:
            print(f"{name} is left out: there is no {system.make.split()[0]}")
            continue
        device = Device(work, system)
        try:
            cutter = Cutter(options, device, None)
            if not (work / "whole").exists() and cutter.start(work / "whole").wait():
                sys.exit(f"the undisturbed run failed: {cutter.heard()}")
            for what, act, cuts in (
                ("training", cutter.train, options.cuts),
                ("a run begun anew", cutter.begin_anew, options.others),
                ("an export", cutter.export, options.others),
            ):
                before = cutter.cuts
                act(cuts)
                rows.append(row(name, what, cutter, before))
                print(rows[-1], flush=True)
        finally:
            device.unmount()
    device = Device(work, SYSTEMS["ext4"])
    try:
        control = Cutter(options, device, shim)
        for what, act, cuts in (
            ("training without fsync", control.train, options.control_cuts),
            ("an export without fsync", control.export, options.others),
        ):
            before = control.cuts
            act(cuts)
            rows.append(row("ext4", what, control, before))
    finally:
        device.unmount()
    write_record(options.record, __file__, rows, asdict(options))
    if not all(control["losses"] for control in rows[-2:]):
        sys.exit("power_cuts.py: a control lost nothing: these cuts prove nothing")


if __name__ == "__main__":
    main()
