"""Where a value comes from: a default that is typed changes nothing but its origin; the recipe
follows the text."""

import lzma
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import log_text
from hypothesis import given
from hypothesis import strategies as st

import train
from parts.commandline import parse_config
from parts.compute.device import choose_runtime
from parts.flags import DEMO_CORPUS, PRESETS, Config, Flags, From, Origin
from parts.recipe import TINY_SHAKESPEARE, Text, decide
from parts.report.words import plan_warnings
from parts.text.corpus import Corpus, compressed, text_of
from parts.text.vocabulary import OwnVocabulary, choose_tokenizer, train_vocabulary

TEXTS = [Text(30_000, 8_697), Text(110_000, 33_802), TINY_SHAKESPEARE, Text(3_000_000, 1_363_724)]
CHANGES = [
    {},
    {"optimizer": "adamw"},
    {"seq_len": 64},
    {"batch_size": 2},
    {"input_file": (Path("a.txt"),)},
]


def words(name: str, value: object) -> list[str]:
    """How a flag is given this value on a command line; no words for what cannot be typed."""
    if value is None or value is False or value == ():
        return []
    return [f"--{name}", *map(str, value)] if isinstance(value, tuple) else [f"--{name}={value}"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("text", TEXTS, ids=str)
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_default_that_is_typed_changes_nothing_but_its_origin(preset, text, changes):
    asked = {"preset": preset, "device": "cpu"} | changes
    config = decide(asked, text, machine=choose_runtime)
    for name in (field.name for field in fields(Flags)):
        value = getattr(config, name)
        if not words(name, value):
            continue
        typed = decide(asked | {name: value}, text, machine=choose_runtime)
        assert typed == config, name
        assert typed.origins | {name: config.origins[name]} == config.origins
        assert value in ("", "auto") or typed.origins[name] == Origin(From.TYPED)


@pytest.mark.parametrize("preset", PRESETS)
def test_so_it_is_on_the_command_line(preset):
    config = parse_config([f"--preset={preset}"])
    for name in (field.name for field in fields(Flags)):
        argv = words(name, getattr(config, name))
        assert not argv or parse_config([f"--preset={preset}", *argv]) == config, argv


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "steps": st.integers(1, 10**6),
            "lr": st.floats(1e-6, 1),
            "seq_len": st.integers(1, 128),
            "batch_size": st.integers(1, 64),
            "optimizer": st.sampled_from(["muon", "adamw"]),
            "warmup_steps": st.integers(0, 10**6),
            "mixed_steps": st.integers(0, 10**6),
            "dropout": st.floats(0, 0.9),
        },
    ),
    st.sampled_from(TEXTS),
)
def test_a_run_that_goes_on_without_flags_has_the_flags_it_had(typed, text):
    config = replace(decide(typed, text), out_dir=Path("run"))
    again = decide({}, text, previous=config)
    assert again == config
    assert {name for name, origin in again.origins.items() if origin.source == From.RUN} == {
        *typed,
        "preset",
    }
    assert decide({}, text, previous=again).origins == again.origins


def test_what_followed_from_other_flags_follows_them_when_they_change():
    before = decide(dict(steps=100, lr=1e-3, out_dir=Path("run")))
    after = decide(dict(steps=200), previous=before)
    assert (after.decay_steps, after.warmup_steps, after.mixed_steps, after.lr) == (
        200,
        6,
        160,
        1e-3,
    )
    typed = decide(dict(steps=100, decay_steps=90))
    assert decide(dict(steps=200), previous=typed).decay_steps == 90
    assert decide(dict(optimizer="adamw"), previous=before).lr == 1e-3, "typed once"
    longer = decide({}, TEXTS[1])
    for flags in (dict(batch_size=64), dict(seq_len=64), dict(batch_size=8, grad_accum=2)):
        assert decide(flags, TEXTS[1], previous=longer).steps == longer.steps, (
            "steps that were done stay done"
        )
    written = decide(dict(preset="write"), TEXTS[2])
    shorter = decide(dict(seq_len=64, val_file=(Path("v.txt"),)), TEXTS[2], previous=written)
    assert (shorter.block_size, shorter.val_fraction) == (written.block_size, written.val_fraction)


def test_what_was_decided_is_not_decided_again_by_a_newer_program(monkeypatch):
    before = decide({}, TEXTS[1])
    monkeypatch.setattr("parts.recipe.LAW_TOKENS", 1e9)
    assert decide({}, TEXTS[1], previous=before) == before
    assert decide({}, TEXTS[1]).steps > before.steps
    unknown = Config.from_dict(before.as_dict())  # as a checkpoint of an older program
    assert decide({}, TEXTS[1], previous=unknown) == before


def test_another_preset_brings_its_own_flags():
    before = decide(dict(preset="small", lr=1e-3))
    assert decide(dict(preset="gpt2"), previous=before).n_layer == 12
    assert decide(dict(preset="small"), previous=before).lr == 1e-3


def test_origins_go_through_a_checkpoint():
    config = decide(dict(steps=5, device="cpu"), machine=choose_runtime)
    again = Config.from_dict(config.as_dict(), config.origins_as_dict())
    assert again == config and again.origins == config.origins


def test_longer_texts_take_more_steps_and_fewer_passes():
    steps = [decide({}, text).steps for text in TEXTS]
    passes = [count * 4096 / text.n_tokens for count, text in zip(steps, TEXTS, strict=True)]
    assert steps == sorted(steps) and passes == sorted(passes, reverse=True)
    halved = decide(dict(batch_size=16), TEXTS[2])
    assert abs(halved.steps - 2 * steps[2]) <= 1


def test_a_run_directory_alone_says_all_that_was_typed(launch, capsys):
    assert launch("run", "--steps=4", "--lr=0.01", "--dropout=0.1") == 0
    assert train.main(["--out_dir=run"]) == 0
    assert "Already finished: all steps up to 4 are done" in capsys.readouterr().out
    assert train.main(["--out_dir=run", "--steps=8"]) == 0
    text = log_text(Path("run"))
    assert "Changed from here on: --steps 4 -> 8, --decay_steps 4 -> 8" in text
    (line,) = (line for line in text.splitlines() if "Kept from the run so far: " in line)
    for words in ("lr 0.01", "dropout 0.1", "n_layer 2", "tokenizer bpe:257"):
        assert words in line


def warnings_of(steps: int, n_tokens: int, **flags) -> list[str]:
    config = decide(dict(steps=steps, device="cuda", **flags), Text(3 * n_tokens, n_tokens))
    corpus = Corpus(np.broadcast_to(np.uint16(0), n_tokens), "made up", n_tokens)
    return [line for line in plan_warnings(config, corpus, 0.01) if "passes over this text" in line]


def test_steps_far_from_the_usual_are_warned_of():
    usual = decide({}, TEXTS[0]).steps
    (many,) = warnings_of(1220, 8_697)
    passes = f"{usual * 4096 / 8_697:.3g}"
    assert many == f"575 passes over this text; about {passes} are usual (--steps {usual})"
    (few,) = warnings_of(20, 338_025)
    assert few.startswith("0.242 passes over this text; about ")
    assert warnings_of(usual, 8_697) == warnings_of(int(1.5 * usual), 8_697) == []
    assert warnings_of(1220, 8_697, target_loss=0.0) == [], "another goal"


def test_a_vocabulary_is_not_learned_from_the_text_that_is_held_out(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a cat sat on a mat. " * 100 + "zzyzx " * 150, encoding="utf-8")
    whole, part = (
        OwnVocabulary(train_vocabulary([path], 265, share), "it") for share in (1.0, 0.6)
    )
    assert (
        len(whole.encode_ordinary(" zzyzx")) < len(part.encode_ordinary(" zzyzx")) == len(" zzyzx")
    )


def test_what_a_compressor_makes_of_the_held_out_text(tokenizer):
    words = np.array(tokenizer.encode_ordinary("It is what it is, said the cat. " * 40))
    random = np.random.default_rng(0).integers(0, 50_000, 300)
    known, unknown = (compressed(words, held_out, tokenizer) for held_out in (words[:300], random))
    assert known[0] in ("lzma", "bz2") and known[1] < 1 < 4 < unknown[1]
    expected = len(lzma.compress(text_of(words, tokenizer) + text_of(random, tokenizer)))
    expected -= len(lzma.compress(text_of(words, tokenizer)))
    assert unknown[1] <= 8 * expected / len(text_of(random, tokenizer))


def test_the_plan_names_what_was_decided_and_the_yardstick(launch, capsys):
    assert launch("run", "--val_fraction=0.2", "--seq_len=8", "--batch_size=4", "--dry_run") == 0
    said = capsys.readouterr().out
    assert "makes" in said and "bits per byte of them" in said
    assert (
        "From other flags: lr 0.0035 (with muon); beta2 0.99 (with muon); decay_steps 8 (the "
        "last step)" in said
    )
    assert "mixed_steps 6 (80% of the steps)" in said


def test_what_write_takes_follows_from_the_bytes_of_the_text():
    sizes = (10_000, 30_000, 300_000, 3_000_000, 30_000_000)
    found = [decide(dict(preset="write"), Text(n, n // 3)) for n in sizes]
    assert [c.tokenizer for c in found] == ["gpt2", "gpt2", "bpe:1500", "bpe:3800", "bpe:4000"]
    assert [c.n_embd for c in found] == [128, 128, 192, 256, 256]
    passes = [c.steps * c.tokens_per_step / (n // 3) for c, n in zip(found, sizes, strict=True)]
    assert passes == sorted(passes, reverse=True) and 3 < passes[-1] < passes[0] < 12
    for flags in (
        {},
        {"val_file": (Path("v.txt"),)},
        {"val_fraction": 0.0},
        {"n_embd": 96},
        {"seq_len": 64},
    ):
        config = decide(
            dict(preset="write", device="cpu") | flags, TEXTS[2], machine=choose_runtime
        )
        assert config.contradictions() == [], flags
        assert bool(config.patience) == config.validates == (flags != {"val_fraction": 0.0})


def test_write_takes_the_vocabulary_that_the_text_can_fill(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_bytes(b"the same line again and again\n" * 6000)
    flags = ["--preset=write", "--input_file=text.txt", "--num_prompts=0", "--n_layer=1"]
    assert train.main([*flags, "--steps=2"]) == 0
    log = log_text(Path("out/write-text"))
    n_vocab = int(re.search(r"tokenizer bpe:(\d+) \(for 180,000 bytes\)", log)[1])
    assert 257 < n_vocab < 600 and f"vocabulary {n_vocab})" in log
    assert train.main(["--out_dir=out/write-text", "--steps=4"]) == 0
    assert (
        train.main(
            ["--preset=write", "--input_file=text.txt", "--tokenizer=bpe:900", "--out_dir=x"]
        )
        == 2
    )


def test_auto_and_nothing_are_words_where_they_decide_nothing():
    assert decide(dict(prompt="auto")).prompt == decide(dict(tokenizer="auto")).tokenizer == "auto"
    spoken = decide(dict(prompt="hi"))
    assert (
        decide({}, previous=spoken).prompt == "hi"
        and decide(dict(prompt=""), previous=spoken).prompt == ""
    )


@pytest.mark.parametrize(
    "flags", [{"n_embd": 200}, {"n_embd": 100}, {"optimizer": "adamw"}, {"seq_len": 32}]
)
def test_what_write_decides_goes_together(flags):
    config = decide(dict(preset="write") | flags, TEXTS[2])
    assert config.contradictions() == []
    assert config.lr == (1e-3 if config.optimizer == "adamw" else 4e-3)
    assert decide(dict(preset="write", input_file=(DEMO_CORPUS,))).contradictions() == []


@pytest.mark.parametrize(
    "origins", [{"lr": {}}, {"lr": 5}, [1], "x", {"lr": {"from": "magic", "why": ""}}]
)
def test_origins_that_are_none_are_damage(launch, origins, capsys):
    assert launch("run", "--steps=2", "--save_every=2") == 0
    path = Path("run/checkpoints/last.pt")
    torch.save(torch.load(path, weights_only=True) | {"origins": origins}, path)
    capsys.readouterr()
    assert train.main(["--out_dir=run", "--steps=4"]) == 2
    assert "last.pt is no checkpoint of train.py" in capsys.readouterr().err


def test_with_max_tokens_too_the_vocabulary_is_of_what_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("leak.txt").write_text("a b c d e f g h. " * 100 + "zzyzx qwert " * 3000, encoding="utf-8")
    config = decide(
        dict(input_file=(Path("leak.txt"),), max_tokens=3000, val_fraction=0.4, tokenizer="bpe:260")
    )
    vocabulary = choose_tokenizer(config, None)
    assert "zz" not in "".join(vocabulary.decode([token]) for token in range(257, 260))


def test_a_short_part_of_a_long_text_is_a_short_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(
        "".join(f"{n * 7919 % 1000} words of it\n" for n in range(9000)), encoding="utf-8"
    )
    assert (
        train.main(["--preset=write", "--input_file=text.txt", "--max_tokens=5000", "--dry_run"])
        == 0
    )
    assert "batch_size 4 (for 20,000 bytes)" in capsys.readouterr().out
