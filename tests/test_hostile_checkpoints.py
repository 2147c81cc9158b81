"""A checkpoint is refused in one line when a byte of it is wrong, executes nothing, and the one
before it steps in."""

import io
import math
import os
import pickle
import random
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import GPT2, TINY_FLAGS, assert_same_run, log_text, unequal

import train
from parts.recipe import decide
from parts.run.checkpoint import CHECKPOINT_FORMAT, load_checkpoint


class Bomb:
    """Unpickled without care, it makes a file."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def in_a_zip(pickled: bytes) -> bytes:
    """The pickle where PyTorch's archives have theirs."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def saved(values: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


def packed(good: bytes) -> bytes:
    """The same archive, compressed: what could unpack to any size."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(good)) as source,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return buffer.getvalue()


def flipped(good: bytes) -> bytes:
    """One bit of the first weights."""
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    damaged = bytearray(good)
    damaged[largest.header_offset + largest.file_size // 2] ^= 1
    return bytes(damaged)


DAMAGE = {
    "nothing": lambda good: b"",
    "a byte": lambda good: b"\0",
    "text": lambda good: b"hello, world\n" * 50,
    "cut in half": lambda good: good[: len(good) // 2],
    "without its last byte": lambda good: good[:-1],
    "without its first byte": lambda good: good[1:],
    "zeros": lambda good: bytes(len(good)),
    "one bit flipped": flipped,
    "a zip of nothing": lambda good: b"PK\x05\x06" + bytes(18),
    "a zip of something else": lambda good: in_a_zip(b"x"),
    "a pickle bomb": lambda good: pickle.dumps(Bomb(), protocol=2),
    "a pickle bomb in a zip": lambda good: in_a_zip(pickle.dumps(Bomb(), protocol=2)),
    "compressed": packed,
    "a model alone": lambda good: saved({"model": {}}),
    "a list": lambda good: saved([1, 2]),
    "a tensor": lambda good: saved(torch.zeros(3)),
    "flags that are no dictionary": lambda good: saved(
        torch.load(io.BytesIO(good), weights_only=True) | {"config": 3}
    ),
    "another format": lambda good: saved(
        torch.load(io.BytesIO(good), weights_only=True) | {"format": 99}
    ),
}


@pytest.fixture(scope="session")
def good_run(tmp_path_factory) -> Path:
    """A run of four steps that two more can follow: last.pt of step 4, prev.pt of step 2."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "input.txt").write_text(
        "The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8"
    )
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert train.main([*FLAGS, "--steps=4"]) == 0
    finally:
        os.chdir(before)
    return folder


FLAGS = [
    *TINY_FLAGS,
    GPT2,
    "--input_file=input.txt",
    "--out_dir=run",
    "--n_embd=8",
    "--save_every=2",
    "--decay_steps=8",
    "--warmup_steps=0",
]


@pytest.fixture
def run(good_run, tmp_path, monkeypatch) -> Path:
    shutil.copytree(good_run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("run")


@pytest.mark.parametrize("damage", DAMAGE)
def test_is_refused_in_one_line(run, capsys, damage):
    last, prev = run / "checkpoints/last.pt", run / "checkpoints/prev.pt"
    bad = DAMAGE[damage](last.read_bytes())
    prev.write_bytes(bad)
    last.write_bytes(bad)
    state = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    capsys.readouterr()
    for flags in ([], [f"--resume={last}"]):
        assert train.main([*FLAGS, *flags]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and len(captured.err) < 300
        assert f"train.py: error: {last} " in captured.err and "--resume never" in captured.err
        assert {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")} == state
    assert not Path("exploded").exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["nothing", "cut in half", "one bit flipped", "a pickle bomb"])
def test_the_one_before_steps_in_aloud(run, damage):
    last = run / "checkpoints/last.pt"
    assert train.main([*FLAGS, "--out_dir=whole"]) == 0
    bad = DAMAGE[damage](last.read_bytes())
    last.write_bytes(bad)
    assert train.main(FLAGS) == 0
    log = log_text(run).replace("\\", "/")
    assert "WARNING | run/checkpoints/last.pt is damaged or no checkpoint" in log
    assert "set aside as run/checkpoints/damaged.pt; going on from run/checkpoints/prev.pt" in log
    assert (run / "checkpoints/damaged.pt").read_bytes() == bad
    assert "Resuming from step 2" in log
    assert_same_run(Path("whole"), run)
    assert not Path("exploded").exists()


@pytest.mark.slow
def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """A bit is either of no meaning at all (padding, dates), or the file is refused."""
    torch.manual_seed(0)
    shape = dict(n_layer=1, n_head=1, n_embd=4, block_size=8, seq_len=8)
    config = decide(shape, vocab_size=8)
    content = {
        "model": train.GPT(config).state_dict(),
        "progress": {"step": 7, "recent_losses": [1.5, 2.5]},
    }
    content |= {
        "format": CHECKPOINT_FORMAT,
        "config": config.as_dict(),
        "step": 7,
        "trained_context": 8,
    }
    content |= {
        "corpus_sha256": "x",
        "corpus_tokens": 3,
        "val_sha256": "",
        "tokenizer": {"content": ""},
    }
    good, path = saved(content), tmp_path / "last.pt"
    refused = 0
    members = [match.start() for match in re.finditer(b"PK\x01\x02", good)]
    folders = [8 * (start + 38) + 4 for start in members]  # the bit that makes a folder of a member
    for position in [*folders, *random.Random(0).sample(range(8 * len(good)), 1500)]:
        damaged = bytearray(good)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            assert unequal(content, load_checkpoint(path)) == [], position
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert 500 < refused < 1500


def crafted(path: Path, **changes: object) -> None:
    """Write the checkpoint again with other contents at `a__b__c`, whole and with its checksums."""
    checkpoint = torch.load(path, weights_only=True)
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = checkpoint
        for parent in parents:
            place = place[int(parent) if parent.isdigit() else parent]
        place[int(last) if last.isdigit() else last] = value
    torch.save(checkpoint, path)


@pytest.mark.parametrize(
    "changes",
    [
        {"progress": []},
        {"progress__step": "4"},
        {"progress__later": 1},
        {"progress__recent_losses": "x"},
        {"progress__recent_losses": None},
        {"step": "4"},
        {"step": [4]},
        {"corpus_tokens": "x"},
        {"model": 3},
        {"config__input_file": 5},
        {"config__device": "foo"},
        {"config__threads": 0},
        {"config__batch_size": None},
        {"config__n_layer": "2"},
        {"model__extra": torch.zeros(2)},
        {"model__ln_f.bias": torch.zeros(2)},
        {"config__micro_batch": 0},
        {"config__micro_batch": "4"},
        {"config__micro_batch": 7},
        {"trained_context": 0},
        {"trained_context": "16"},
        {"trained_context": 10**5},
        {"config__vocab_size": 300},
        {"model": {}},
        {"model__wpe.weight": torch.zeros(2, 2)},
        {"model__ln_f.bias": torch.full((8,), math.nan)},
        {"optimizer": {}},
        {"optimizer": 3},
        {"optimizer__muon": 7},
        {"optimizer__adamw": {}},
        {"optimizer__muon__0__momentum_buffer": torch.ones(3)},
        {"optimizer__adamw__0__exp_avg": torch.ones(3)},
        {"optimizer__adamw__99": {"exp_avg": torch.ones(3)}},
        {"optimizer__muon__0__row_mean_square": torch.ones(3)},
        {"optimizer__muon__0__momentum_buffer": torch.ones(24, 1)},
    ],
    ids=str,
)
def test_contents_that_do_not_fit_are_refused(run, capsys, changes):
    """Some of these would make a fused kernel write outside its memory."""
    last = run / "checkpoints/last.pt"
    crafted(last, **changes)
    shutil.copy(last, run / "checkpoints/prev.pt")
    state = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    capsys.readouterr()
    assert train.main(FLAGS) == 2
    captured = capsys.readouterr()
    assert (
        captured.out == ""
        and captured.err.startswith(f"train.py: error: {last} ")
        and captured.err.count("\n") == 1
    )
    assert {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")} == state


def test_a_moment_that_is_one_number_repeated_is_made_whole(run):
    last = run / "checkpoints/last.pt"
    shape = torch.load(last, weights_only=True)["optimizer"]["adamw"][0]["exp_avg"].shape
    crafted(last, optimizer__adamw__0__exp_avg=torch.zeros(1).expand(shape))
    assert train.main(FLAGS) == 0


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        OSError(5, "Input/output error"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=repr,
)
def test_what_cannot_be_read_is_not_called_damaged(run, capsys, monkeypatch, error):
    """Nothing is set aside, and nobody is told to start anew."""

    def refuse(*_arguments, **_options):
        raise error

    monkeypatch.setattr(torch, "load", refuse)
    assert train.main(FLAGS) == 2
    message = capsys.readouterr().err
    assert "damaged" not in message and "--resume never" not in message and message.count("\n") == 1
    assert not (run / "checkpoints/damaged.pt").exists()
