"""A run ends with what came of it, in a sentence, and with a command that can be pasted."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import log_text

from parts.commandline import read_typed
from parts.flags import From, Origin, decided
from parts.progress import Progress
from parts.report.words import how_to_continue, verdict


@pytest.fixture
def ended(config):
    """A run of 40 steps, its flags and how far it came."""
    flags = replace(config, out_dir=Path("out/x"), steps=40, decay_steps=40, target_loss=0.1)
    progress = Progress(step=40, recent_losses=[0.2, 0.25, 0.3], best_step=40, best_loss=0.25)
    return flags, replace(progress, corpus_loss=0.25, corpus_step=40)


def test_a_target_that_was_reached(ended):
    config, progress = ended
    assert verdict(config, progress, 0.05, "target") == "Verdict: the target was reached at step 40"


def test_a_target_that_was_missed(ended):
    config, progress = ended
    said = verdict(config, progress, 0.05, "steps")
    assert said == (
        "Verdict: the target was missed by 0.1500; half as many steps more may help: "
        "python train.py --out_dir out/x --steps 60"
    )
    typed = decided(config, "decay_steps", 40, Origin(From.TYPED))
    assert verdict(typed, progress, 0.05, "steps").endswith(" --steps 60 --decay_steps 60")


def test_no_steps_are_advised_for_a_target_below_the_floor(ended):
    config, progress = ended
    said = verdict(config, progress, 0.12, "steps")
    assert said == "Verdict: the target was missed, and no model can reach it: the floor is 0.1200"


def test_a_validation_loss_that_was_still_falling(ended):
    config, progress = ended
    config = replace(config, target_loss=0.0, val_fraction=0.1, eval_every=10)
    progress = replace(progress, val_loss=0.25, val_step=40)
    assert verdict(config, progress, 0.05, "steps") == (
        "Verdict: the validation loss was still falling at the end; half as many steps more may "
        "help: "
        "python train.py --out_dir out/x --steps 60"
    )
    lowest = replace(progress, best_step=30, best_loss=0.249)
    assert (
        verdict(config, lowest, 0.05, "steps")
        == "Verdict: the validation loss was lowest at step 30"
    )
    once = replace(config, eval_every=40)
    assert "still falling" not in verdict(once, progress, 0.05, "steps"), "of a single measurement"
    patient = verdict(config, replace(lowest, validations_since_best=1), 0.05, "patience")
    assert patient == "Verdict: the validation loss fell no further after step 30"


def test_a_model_that_overfits(ended):
    config, progress = ended
    config = replace(config, target_loss=0.0, val_fraction=0.1, eval_every=10)
    progress = replace(progress, best_step=20, best_loss=1.0, val_loss=1.5, val_step=40)
    told = "Verdict: the model overfits since step 20, whose weights are in best.pt"
    assert verdict(config, progress, 0.05, "steps") == told
    assert verdict(config, progress, 0.05, "patience") == told


def test_the_last_lines_of_a_run_have_it(launch):
    assert launch("run", "--target_loss=0.3") == 0
    said, _see = re.search(r"Verdict: (.+)\n(.*Next: .+)", log_text(Path("run"))).groups()
    assert re.fullmatch(
        r"the target was missed by \d\.\d{4}; .+: python train\.py --out_dir run --steps 12", said
    )
    assert launch("none") == 0
    assert "Verdict: all 8 steps are done, with neither a target nor " in log_text(Path("none"))


def test_the_command_that_goes_on_can_be_pasted(config):
    config = replace(config, out_dir=Path("out/my run"))
    typed = ["--preset", "demo", "--resume", "never", "--prompt", "one\ntwo"]
    assert (
        how_to_continue(typed, config, True)
        == "To continue: python train.py --out_dir 'out/my run'"
    )
    again = how_to_continue(typed, config, False, " from step 3")
    assert again.startswith("To start again: python train.py --preset demo ")
    for prompt in ("one\ntwo", "never"):
        words = ["--preset", "demo", "--resume", "never", "--prompt", prompt]
        again = how_to_continue(words, config, False).removeprefix("To start again: ")
        found = read_typed(shlex.split(again)[2:])
        assert found["resume"] == "auto" and found["prompt"].replace("\\n", "\n") == prompt
    dashed = replace(config, out_dir=Path("-x"), tensorboard=True)
    command = how_to_continue(typed, dashed, True).removeprefix("To continue: python train.py ")
    assert read_typed(shlex.split(command)) == {"out_dir": Path("-x"), "tensorboard": True}
