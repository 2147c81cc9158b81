"""Several processes, started by torchrun, train the run that one process would."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_FLAGS, log_text, rows, weights

import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ranks"),
    pytest.mark.skipif(os.name == "nt", reason="torchrun does not start under Windows"),
]

FLAGS = [
    *TINY_FLAGS,
    "--input_file=input.txt",
    "--batch_size=4",
    "--grad_accum=2",
    "--amp=off",
    "--log_every=1",
]
FLAGS += ["--val_fraction=0.2", "--eval_every=3", "--lr=0.01", "--mixed_steps=2"]


@pytest.fixture
def here(text_file, monkeypatch):
    monkeypatch.chdir(text_file.parent)
    return text_file.parent


def command(
    processes: int, *flags: str, script: Path = ROOT / "train.py", restarts: int = 0
) -> list[str]:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    ]
    return [*torchrun, f"--max_restarts={restarts}", str(script), *FLAGS, *flags]


def torchrun(
    processes: int, *flags: str, restarts: int = 0, **options
) -> subprocess.CompletedProcess:
    """Run to the end. gloo sometimes fails to connect processes on a busy machine, or waits for
    ever; then they are started again."""
    for _ in range(4):
        line = command(processes, *flags, restarts=restarts, **options)
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
        process = subprocess.Popen(line, start_new_session=True, **pipes)
        try:
            out, err = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends all that it started, in half a minute at most
            out, err = process.communicate()
            assert restarts or "step 1/" not in out, "it hangs after it began"
        else:
            if "do not reach each other" not in err:
                return subprocess.CompletedProcess(line, process.returncode, out, err)
    raise AssertionError("the processes never met")


def assert_same_to_rounding(first: str, second: str) -> None:
    for column in ("step", "loss", "window_loss", "grad_norm", "val_loss", "tokens"):
        expected, found = (
            [float(value or "nan") for (value,) in rows(Path(run), column)]
            for run in (first, second)
        )
        assert found == pytest.approx(expected, rel=2e-4, nan_ok=True), column
    a, b = (weights(Path(run, "checkpoints/last.pt")) for run in (first, second))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-3, atol=1e-3)


@pytest.fixture
def alone(here):
    assert train.main([*FLAGS, "--out_dir=alone"]) == 0


def test_the_same_run_on_several_ranks(alone):
    """Four of them; those that follow train with two."""
    processes = 4
    result = torchrun(processes, "--out_dir=shared", "--tensorboard")
    assert result.returncode == 0, result.stderr
    assert_same_to_rounding("alone", "shared")
    if find_spec("tensorboard"):
        assert len(list(Path("shared/tensorboard").iterdir())) == 1, "one process writes for all"
    assert result.stdout.count("Training complete.") == 1, "one process speaks for all"
    assert result.stdout.count("step 5/8 | ") == 1
    cores = os.cpu_count()
    assert (
        f"threads {max(1, cores // processes)} ({cores} cores shared by {processes} processes)"
        in result.stdout
    )
    assert f"micro_batch {8 // processes} " in result.stdout
    # The run goes on alone, and is told to.
    assert train.main([*FLAGS, "--out_dir=shared", "--steps=10"]) == 0
    assert "Resuming from step 8" in log_text(Path("shared"))


def test_a_target_that_the_first_rank_measures_ends_all(here):
    ended = torchrun(2, "--out_dir=run", "--target_loss=99", "--steps=50")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = json.loads(Path("run/results.json").read_text(encoding="utf-8"))
    assert (results["stop_reason"], results["final_step"]) == ("target", 3)


def test_checkpoints_move_between_numbers_of_ranks(alone):
    schedule = ["--out_dir=moved", "--decay_steps=8", "--warmup_steps=0"]
    assert torchrun(2, *schedule, "--steps=3").returncode == 0
    assert train.main([*FLAGS, *schedule, "--steps=5"]) == 0
    assert torchrun(2, *schedule).returncode == 0
    assert "Resuming from step 5" in log_text(Path("moved"))
    losses = [[float(loss) for (loss,) in rows(Path(run), "loss")] for run in ("alone", "moved")]
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)


def test_what_cannot_be_shared_is_refused_by_one_voice(here):
    result = torchrun(3, "--out_dir=run")
    assert result.returncode == 1, "torchrun's own code"
    said = re.findall(r"^train.py: error: (.*)$", result.stderr, re.MULTILINE)
    assert said == [
        "--batch_size x --grad_accum = 8 slices do not divide evenly among 3 processes: 6 or 9 "
        "would"
    ]
    assert "exitcode  : 2" in result.stderr and not Path("run").exists()


# One dies at step 6. After the restart the first process is late: what it left with torchrun of
# where it was to be reached is found by the other, and must not be believed.
DIES_ONCE = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
rank, restarted = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
update = train.Trainer.update
def dying(trainer):
    if rank == "1" and trainer.progress.step == 6 and not restarted:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(trainer)
train.Trainer.update = dying
time.sleep(2 if restarted and rank == "0" else 0)
sys.exit(train.main())
"""


def test_a_rank_that_dies_ends_the_run_and_a_restart_continues_it(alone):
    Path("dies.py").write_text(DIES_ONCE, encoding="utf-8")
    ended = torchrun(2, "--out_dir=run", "--save_every=2", script=Path("dies.py"), restarts=1)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = (
        r"another process of this run is gone \(.+\)\. To continue from step (\d+): torchrun .+ "
        r"--out_dir run"
    )
    found = re.search(told, ended.stdout)
    assert found and found[0] in log_text(Path("run")), ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout and 'File "' not in log_text(Path("run"))
    assert log_text(Path("run")).count(f"Resuming from step {found[1]} ") == 1
    assert_same_to_rounding("alone", "run")


# A goodbye that waits for the others for ever, as NCCL's may; one that fails, alone.
FAILS_ALONE = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
import torch.distributed
torch.distributed.destroy_process_group = lambda: time.sleep(1000)
compute = train.Trainer.accumulate
def accumulate(trainer, step, *rest):
    if os.environ["RANK"] == sys.argv[-1] and step == 5:
        raise RuntimeError("of this process alone")
    return compute(trainer, step, *rest)
train.Trainer.accumulate = accumulate
sys.exit(train.main(sys.argv[1:-1]))
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_fails_alone_ends_the_run_and_is_heard(here, rank):
    Path("fails.py").write_text(FAILS_ALONE, encoding="utf-8")
    ended = torchrun(2, "--out_dir=run", "--save_every=2", rank, script=Path("fails.py"))
    assert ended.returncode == 1 and "RuntimeError: of this process alone" in ended.stderr
    if rank == "1":
        told = (
            r"After step 4: another process of this run is gone \(.+\)\. To continue from step "
            r"\d+: torchrun "
        )
        assert re.search(told, ended.stdout)


# A loss that is lost at step 6, and a last word for which the first process takes its time.
LOSES_ITS_LOSS = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
train.MAX_SKIPPED_IN_A_ROW = 2
compute, rescue = train.Trainer.add_gradients, train.Saver.rescue
train.Trainer.add_gradients = lambda t, step, *rest: (
    compute(t, step, *rest) * (float("nan") if step > 5 else 1)
)
train.Saver.rescue = lambda saver, stop: (time.sleep(2), rescue(saver, stop))
sys.exit(train.main())
"""


def test_the_first_process_has_the_last_word(here):
    """torchrun ends the others when one exits with an error."""
    Path("loses.py").write_text(LOSES_ITS_LOSS, encoding="utf-8")
    ended = torchrun(2, "--out_dir=run", "--save_every=2", script=Path("loses.py"))
    assert ended.returncode == 1 and "Broken off" not in ended.stdout
    assert (
        "Training failed: loss or gradient was not finite in 2 steps in a row, the last being "
        "step 7" in ended.stdout
    )
    assert (
        json.loads(Path("run/results.json").read_text(encoding="utf-8"))["stop_reason"] == "failed"
    )


def test_one_interrupt_ends_all_ranks_after_saving(here):
    flags = ["--out_dir=run", "--steps=100000", "--sample_every=100000"]
    process = subprocess.Popen(
        command(2, *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        Path("run/logs/train.log").exists() and "step 5/" in log_text(Path("run"))
    ):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does: torchrun and every rank
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    step = torch.load("run/checkpoints/last.pt", weights_only=True)["step"]
    again = "torchrun --standalone --nproc_per_node=2 train.py --out_dir run"
    assert f"Interrupted by SIGINT after step {step}. To continue: {again}\n" in out, err
    assert "train.py" not in re.sub(r".*torch.distributed.*", "", err) or "Traceback" not in out


def test_processes_that_see_different_texts_do_not_train(here):
    """As on two machines without a shared disk."""
    for rank, line in enumerate(("One text. ", "Another. ")):
        Path(f"w{rank}").mkdir()
        Path(f"w{rank}/input.txt").write_text(line * 200, encoding="utf-8")
    script = Path("apart.py")
    script.write_text(
        f"import os, sys; os.chdir('w' + os.environ['RANK']); sys.path.insert(0, {str(ROOT)!r}); "
        f"import train; "
        "sys.exit(train.main())",
        encoding="utf-8",
    )
    result = torchrun(2, "--out_dir=run", script=script)
    assert result.returncode == 1 and result.stderr.count("the processes do not agree on ") == 1
    assert not Path("w0/run/logs").exists()


def test_a_world_size_without_torchrun_means_nothing(here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main([*FLAGS, "--out_dir=run", "--steps=2"]) == 0
