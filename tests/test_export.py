"""export_hf.py: what transformers loads is the same model, and comes back as the same weights."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GPT2, TINY_FLAGS, rows, run_script, train_on_lines
from huggingface_hub import metadata_load
from markdown_it import MarkdownIt
from safetensors import safe_open
from safetensors.torch import load, save_file
from test_tokens import NASTY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import export_hf
import sample
import train
from parts.commandline import parse_config
from parts.flags import PRESETS, Config
from parts.predecessor import InitialWeights
from parts.recipe import decide
from parts.run.checkpoint import load_checkpoint
from parts.run.directory import read_json
from parts.run.layout import sample_blocks
from parts.text.corpus import load_corpus
from parts.text.vocabulary import OwnVocabulary, choose_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("export")]  # `folder` is made once
whatever_the_vocabulary = pytest.mark.parametrize("folder", ["bpe:300"], indirect=True)

LOAD = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained("hf"), AutoModelForCausalLM.from_pretrained("hf")
ids = tokenizer("Line 1: the", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_length=16, do_sample=False)[0]), end="")
"""


@pytest.fixture(scope="module", params=["gpt2", "bpe:300"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("export")
    train_on_lines(path, f"--tokenizer={request.param}", "--block_size=32")
    if request.param == "gpt2":
        result = run_script(
            "--checkpoint=run/checkpoints/best.pt", "--out=hf", cwd=path, script="export_hf.py"
        )
        assert result.returncode == 0, result.stderr
    else:
        assert (
            export_hf.main(
                [f"--checkpoint={path / 'run/checkpoints/best.pt'}", f"--out={path / 'hf'}"]
            )
            == 0
        )
    return path


def test_the_same_model(folder):
    sampler = sample.Sampler(folder / "run/checkpoints/best.pt", "cpu", "off")
    model = AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    tokens = torch.randint(
        sampler.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens).logits, sampler.model(tokens), rtol=1e-4, atol=1e-4
        )
    with safe_open(folder / "hf/model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (no mapping)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_the_shapes_of_transformers(preset):
    config = parse_config([f"--preset={preset}"])
    shape = export_hf.hf_config(config, 50_256, config.block_size)
    with torch.device("meta"):
        ours = train.GPT(config)
        theirs = GPT2LMHeadModel(GPT2Config(**shape))
    weights = export_hf.hf_weights(ours.state_dict())
    exported = {name: value.shape for name, value in weights.items()}
    weights = theirs.transformer.state_dict()  # without the head, which is tied
    expected = {name: value.shape for name, value in weights.items()}
    assert exported == expected
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    assert sum(value.numel() for value in expected.values()) == config.n_params


def test_the_same_ids(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    own = sample.Sampler(folder / "run/checkpoints/best.pt", "cpu", "off").tokenizer
    for text in [
        *(word for word in NASTY if word != "<|endoftext|>"),
        "".join(NASTY[:-3]),
        " x  y\n\n z\t",
    ]:
        assert tokenizer(text)["input_ids"] == own.encode_ordinary(text), ascii(text)
        assert tokenizer.decode(own.encode_ordinary(text)) == text
    assert tokenizer("<|endoftext|>")["input_ids"] == [own.eot_token] == [tokenizer.eos_token_id]
    assert tokenizer(["a", "Line 1"], padding=True)["attention_mask"][0][-1] == 0
    assert list(tokenizer("a")) == ["input_ids", "attention_mask"], "or GPT-2 takes a third"
    vocab, merges = (str(folder / "hf" / name) for name in ("vocab.json", "merges.txt"))
    text = "".join(NASTY[:-3])
    plain = Tokenizer(models.BPE.from_file(vocab, merges))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert plain.encode(text).ids == own.encode_ordinary(text)
    merges = json.loads((folder / "hf/tokenizer.json").read_text(encoding="utf-8"))["model"][
        "merges"
    ]
    assert all(isinstance(merge, str) for merge in merges), (
        "as versions of before November 2024 read them"
    )


def test_transformers_alone_writes_the_same_text_without_a_warning(folder):
    result = subprocess.run(
        [sys.executable, "-c", LOAD],
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    noise = [
        line
        for line in result.stderr.splitlines()
        if "Loading weights" not in line and line.strip()
    ]
    assert noise == []
    sampler = sample.Sampler(folder / "run/checkpoints/best.pt", "cpu", "off")
    start = sampler.tokenizer.encode_ordinary("Line 1: the")
    options = dict(context=16, temperature=0.0, top_k=0, generators=[torch.Generator()])
    (row,) = train.generate(sampler.model, [start], 16 - len(start), **options)
    assert result.stdout == sampler.tokenizer.decode(row)


def test_what_the_folder_says_of_the_model(folder):
    config = json.loads((folder / "hf/config.json").read_text(encoding="utf-8"))
    assert config["n_positions"] == config["n_ctx"] == 16
    assert (
        json.loads((folder / "hf/generation_config.json").read_text(encoding="utf-8"))["max_length"]
        == 16
    )
    assert AutoTokenizer.from_pretrained(folder / "hf").model_max_length == 16
    card = (folder / "hf/README.md").read_text(encoding="utf-8")
    best = load_checkpoint(folder / "run/checkpoints/best.pt")
    for text in (
        "| trained context | 16 tokens |",
        "| left out | positions 17 to 32, never trained |",
        "USER/NAME",
        "```text\nLine",
        f"(window) | {best['loss']:.6f}",
        "trained from scratch on text.txt",
    ):
        assert text in card
    assert "run/" not in card and "run\\" not in card
    for path in (folder / "hf").iterdir():
        assert folder.name.encode() not in path.read_bytes(), "no path of this machine"
    modes = {path.stat().st_mode for path in (folder / "hf").iterdir()}
    assert len(modes) == 1, "whoever may read one file may read all"


@whatever_the_vocabulary
def test_the_card_tells_of_these_weights_alone(folder, tmp_path):
    """The last checkpoint has the losses measured at the end, the best of an earlier step its
    own."""
    results = read_json(folder / "run/results.json")
    cards = {}
    for name, step in (("last", results["final_step"]), ("prev", results["final_step"] - 20)):
        path = tmp_path / "run/checkpoints" / f"{name}.pt"
        shutil.copytree(folder / "run", tmp_path / "run", dirs_exist_ok=True)
        torch.save(load_checkpoint(folder / "run/checkpoints/last.pt") | {"step": step}, path)
        assert export_hf.main(["--checkpoint", str(path), "--out", str(tmp_path / name)]) == 0
        cards[name] = (tmp_path / name / "README.md").read_text(encoding="utf-8")
    assert f"corpus loss, nats per token | {results['corpus_loss']:.6f}" in cards["last"]
    assert "corpus loss" not in cards["prev"]


def exported(checkpoint: Path, out: Path, *flags: str) -> tuple[dict, str]:
    """The card of an exported model: its metadata, as the Hub reads them, and the whole."""
    assert export_hf.main(["--checkpoint", str(checkpoint), "--out", str(out), *flags]) == 0
    return metadata_load(out / "README.md"), (out / "README.md").read_text(encoding="utf-8")


@whatever_the_vocabulary
@pytest.mark.parametrize(
    ("loss", "val_fraction", "corpus_loss", "claim", "row"),
    [
        (0.2, 0.0, None, "A loss of 0.20", "training loss (window) | 0.200000"),
        (0.7, 0.0, None, "has not been measured", "training loss (window) | 0.700000"),
        (0.7, 0.0, 0.3, "A loss of 0.30", "corpus loss, nats per token | 0.300000"),
        (0.4, 0.0, 0.6, "has not been measured", "corpus loss, nats per token | 0.600000"),
        (0.2, 0.1, None, "has not been measured", "validation loss | 0.200000"),
        (3.5, 0.1, 0.3, "A loss of 0.30", "validation loss | 3.500000"),
    ],
)
def test_the_card_claims_to_recite_where_that_was_measured(
    folder, tmp_path, loss, val_fraction, corpus_loss, claim, row
):
    shutil.copytree(folder / "run", tmp_path / "run")
    path = tmp_path / "run/checkpoints/best.pt"
    checkpoint = load_checkpoint(path)
    torch.save(
        checkpoint
        | {"loss": loss, "config": checkpoint["config"] | {"val_fraction": val_fraction}},
        path,
    )
    results = {
        "final_step": checkpoint["step"] + (corpus_loss is None),
        "window_loss": 0.1,
        "corpus_loss": corpus_loss,
    }
    (tmp_path / "run/results.json").write_text(
        json.dumps(results | {"val_loss": 3.5}), encoding="utf-8"
    )
    _, card = exported(tmp_path / "run", tmp_path / "hf")
    assert claim in card and f"| {row} |" in card
    assert ("recites" in card) == ("A loss" in claim)


@whatever_the_vocabulary
def test_the_hub_can_read_the_card(folder, tmp_path):
    common = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gpt2"]}
    metadata, card = exported(folder / "run", tmp_path / "a")
    assert metadata == common | {"license": "unknown"} and "set `license:`" in card
    metadata, card = exported(folder / "run/checkpoints", tmp_path / "b", "--license=cc-by-sa-4.0")
    assert metadata == common | {"license": "cc-by-sa-4.0"} and "set `license:`" not in card


def test_of_paths_the_names_are_told():
    paths = [
        r"C:\Users\me\words\tokenizer.json",
        "/home/me/a b.txt",
        Path("out/demo"),
        "bpe:300",
        "gpt2",
    ]
    assert export_hf.without_folders(*paths) == "tokenizer.json, a b.txt, demo, bpe:300, gpt2"


@pytest.mark.parametrize(
    "name",
    [
        "p|q.txt",
        "a\nb\r.txt",
        r"back\slash.txt",
        r"a\|b\\.txt",
        "*_x_* `y` <b>&amp; [z](q) ~~w~~ $v$ #",
        "my_book.txt",
    ],
)
def test_the_card_shows_a_name_as_it_is(name):
    if os.name == "nt" and "\\" in name:
        pytest.skip("there a backslash stands between folders")
    checkpoint = {"trained_context": 16, "corpus_sha256": "0", "corpus_tokens": 99, "step": 5}
    config = decide(
        dict(input_file=(Path("folder") / name,), init_from=Path(name), tokenizer="bpe:300")
    )
    found = (
        MarkdownIt("commonmark")
        .enable(["table", "strikethrough"])
        .parse(export_hf.model_card(checkpoint, config, {}, "mit").partition("\n---\n")[2])
    )
    shown = [
        "".join(part.content for part in token.children)
        for token in found
        if token.type == "inline"
    ]
    name = name.replace("\n", "\ufffd").replace("\r", "\ufffd")
    assert shown[0] == f"GPT-2 trained from the weights of {name} on {name}"
    table = dict(zip(shown[1::2], shown[2::2], strict=False))
    assert (
        table["text"] == name
        and table["vocabulary"] == "50,257 (bpe:300)"
        and table["SHA-256 of the text"] == "0"
    )


@whatever_the_vocabulary
@pytest.mark.parametrize("license", ["MIT License", "", "mit\ntags: x"])
def test_a_license_is_an_identifier(folder, tmp_path, capsys, license):
    out = tmp_path / "x"
    assert (
        export_hf.main(
            ["--checkpoint", str(folder / "run"), "--out", str(out), "--license", license]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1 and "--license" in error and "cc0-1.0" in error and not out.exists()
    )


@whatever_the_vocabulary
def test_what_came_from_elsewhere_claims_no_text(folder, tmp_path):
    assert (
        export_hf.main(["--from_hf", str(folder / "hf"), "--out", str(tmp_path / "back.pt")]) == 0
    )
    assert (
        export_hf.main(
            ["--checkpoint", str(tmp_path / "back.pt"), "--out", str(tmp_path / "again")]
        )
        == 0
    )
    card = (tmp_path / "again/README.md").read_text(encoding="utf-8")
    for text in ("from scratch", "input.txt", "SHA-256", "this text alone", "recites", "hf/"):
        assert text not in card


def test_and_back(folder, tmp_path):
    assert (
        export_hf.main(["--from_hf", str(folder / "hf"), "--out", str(tmp_path / "back.pt")]) == 0
    )
    before = load_checkpoint(folder / "run/checkpoints/best.pt")
    after = load_checkpoint(tmp_path / "back.pt")
    assert before["model"].keys() == after["model"].keys() and after["trained_context"] == 16
    before["model"]["wpe.weight"] = before["model"]["wpe.weight"][:16]  # what was trained
    assert all(torch.equal(value, after["model"][name]) for name, value in before["model"].items())
    assert after["tokenizer"]["n_vocab"] == before["tokenizer"]["n_vocab"]
    texts = [
        "".join(
            sample.Sampler(path, "cpu", "off").stream(
                "Line", sample.Options(path, max_new_tokens=12)
            )
        )
        for path in (folder / "run/checkpoints/best.pt", tmp_path / "back.pt")
    ]
    assert texts[0] == texts[1]


@whatever_the_vocabulary
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint=none.pt", "--out=new"], "--checkpoint none.pt: no such file"),
        (["--checkpoint=text.txt", "--out=new"], "text.txt is damaged or no checkpoint"),
        (["--checkpoint=run/checkpoints/best.pt", "--out=hf"], "--out hf is there already"),
        (["--out=new"], "give either --checkpoint"),
        (
            ["--checkpoint=.", "--out=new"],
            "--checkpoint .: no best.pt, last.pt, prev.pt in this folder",
        ),
        (["--checkpoint=hf", "--out=new"], "--checkpoint hf: a model for transformers"),
        (["--checkpoint=run", "--out=text.txt/new"], "--out text.txt/new cannot be written"),
        (["--from_hf=run", "--out=new"], "--from_hf run has no model.safetensors"),
        (["--from_hf=run/logs", "--out=new"], "--from_hf run/logs has no config.json"),
        (["--from_hf=text.txt", "--out=new"], "--from_hf text.txt is a file: name the folder"),
        (["--from_hf=none", "--out=new"], "--from_hf none: no such folder"),
        (["--from_hf=hf", "--out=new", "--license=mit"], "--license is for a model card"),
        (["--checkpoint=run", "--out=", "--replace"], "--out is empty or the current folder"),
        (["--checkpoint=run", "--out=.", "--replace"], "--out is empty or the current folder"),
        (["--checkpoint=run", "--out=text.txt", "--replace"], "--out text.txt is a file: name"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(folder)
    before = set(folder.rglob("*"))
    capsys.readouterr()
    assert export_hf.main(flags) == 2
    out, error = capsys.readouterr()
    assert out == "" and message in error.replace("\\", "/") and error.count("\n") == 1
    assert set(folder.rglob("*")) == before


@whatever_the_vocabulary
def test_an_earlier_export_or_import_is_replaced_when_asked_and_nothing_else_is(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    here, there = f"--checkpoint={folder / 'run'}", f"--from_hf={folder / 'hf'}"
    for _ in range(2):
        assert export_hf.main([here, "--out=hf", "--replace"]) == 0
        assert export_hf.main([there, "--out=back.pt", "--replace"]) == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["back.pt", "hf"]
        Path("hf/README.md").write_text("edited", encoding="utf-8")
    assert export_hf.main(
        [here, "--out=hf"]
    ) == 2 and "--out hf is there already: give --replace" in err(capsys)
    Path("hf/notes.txt").write_text("mine", encoding="utf-8")
    shutil.copy(folder / "run/checkpoints/best.pt", "best.pt")
    Path("README.md").write_text("mine", encoding="utf-8")  # a name that exports have, too
    for flags, problem in (
        ([here, "--out=hf"], "--out hf: notes.txt is of no export"),
        ([here, "--out=back.pt"], "--out back.pt is a file: name a folder"),
        ([here, "--out=README.md"], "--out README.md is a file: name a folder"),
        ([there, "--out=hf/notes.txt"], "notes.txt is damaged or no checkpoint"),
        ([there, "--out=best.pt"], "--out best.pt is the checkpoint of a run"),
    ):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert export_hf.main([*flags, "--replace"]) == 2 and problem in err(capsys).replace(
            "\\", "/"
        )
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def err(capsys) -> str:
    """What has come to stderr since the last time."""
    return capsys.readouterr().err


def rewritten(folder: Path, target: Path, config: dict, weights: dict) -> Path:
    """The exported folder with other values in its config.json and other weights."""
    shutil.copytree(folder / "hf", target)
    values = json.loads((target / "config.json").read_text(encoding="utf-8")) | config
    (target / "config.json").write_text(json.dumps(values), encoding="utf-8")
    if weights:
        save_file(weights_in(target) | weights, target / "model.safetensors")
    return target


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Those of an exported model, read: a mapped file cannot be written over under Windows."""
    return load((folder / "model.safetensors").read_bytes())


@whatever_the_vocabulary
@pytest.mark.parametrize(
    ("config", "weights"),
    [
        ({"model_type": "llama"}, {}),
        ({"activation_function": "relu"}, {}),
        ({"layer_norm_epsilon": 0.1}, {}),
        ({"scale_attn_weights": False}, {}),
        ({"scale_attn_by_inverse_layer_idx": True}, {}),
        ({"tie_word_embeddings": False}, {}),
        ({"n_layer": "1"}, {}),
        ({"n_layer": None}, {}),
        ({"n_layer": 10**7}, {}),
        ({"n_embd": 32.0}, {}),
        ({"n_positions": 16.0}, {}),
        ({}, {"lm_head.weight": torch.zeros(300, 32)}),
        ({"n_embd": 10**12}, {}),
        ({"n_head": 0}, {}),
        ({"n_head": 3}, {}),
        ({"n_positions": -4}, {}),
        ({"n_positions": 64}, {}),
        ({"vocab_size": 17}, {}),
        ({}, {"ln_f.bias": torch.zeros(3)}),
        ({}, {"ln_f.bias": torch.full((32,), float("nan"))}),
        ({"vocab_size": 17}, {"wte.weight": torch.zeros(17, 32)}),
    ],
    ids=str,
)
def test_another_model_is_not_taken_for_this_one(folder, tmp_path, capsys, config, weights):
    other = rewritten(folder, tmp_path / "other", config, weights)
    capsys.readouterr()
    assert export_hf.main(["--from_hf", str(other), "--out", str(tmp_path / "x.pt")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(
        line.startswith(f"export_hf.py: error: --from_hf {other}") for line in lines
    )
    assert not (tmp_path / "x.pt").exists()


@whatever_the_vocabulary
@pytest.mark.skipif(os.name == "nt", reason="links need a right under Windows")
def test_what_a_link_points_to_is_replaced_and_the_link_stays(
    folder, tmp_path, monkeypatch, capsys
):
    """As where the disk with room is another one. A link to nothing may be a disk that is off."""
    monkeypatch.chdir(tmp_path)
    for name in ("hf", "model.gguf", "back.pt"):
        Path("link-" + name).symlink_to(tmp_path / "far" / name)
    sources = {
        "hf": "--checkpoint=run",
        "model.gguf": "--checkpoint=run",
        "back.pt": "--from_hf=hf",
    }
    for name, source in sources.items():
        flag, _, place = source.partition("=")
        flags = [f"{flag}={folder / place}", f"--out=link-{name}", "--replace"]
        assert export_hf.main(flags) == 2
        assert f"--out link-{name} is a link to nothing" in err(capsys)
        assert export_hf.main([flags[0], f"--out=far/{name}"]) == 0
        before = (tmp_path / "far" / name).stat().st_ino
        assert export_hf.main(flags) == 0
        assert Path("link-" + name).is_symlink()
        assert (tmp_path / "far" / name).stat().st_ino != before, "replaced"
    assert sorted(path.name for path in Path("far").iterdir()) == ["back.pt", "hf", "model.gguf"]


@whatever_the_vocabulary
def test_what_is_write_protected_is_not_replaced(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [f"--checkpoint={folder / 'run'}", "--out=model.gguf"]
    assert export_hf.main(flags) == 0
    Path("model.gguf").chmod(0o444)
    assert export_hf.main([*flags, "--replace"]) == 2
    assert "--out model.gguf is write-protected: make it writable" in err(capsys)


@whatever_the_vocabulary
def test_bad_bytes_in_the_samples_of_a_run_do_not_stop_an_export(folder, tmp_path):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    with open(run / "samples/samples.txt", "ab") as file:
        file.write(b"\xff\xfe")
    assert export_hf.main([f"--checkpoint={run}", f"--out={tmp_path / 'hf'}"]) == 0
    card = (tmp_path / "hf/README.md").read_text(encoding="utf-8")
    assert "**What the run wrote** at step 60" in card


@whatever_the_vocabulary
def test_a_folder_that_cannot_be_imported_is_described(folder, tmp_path, capsys):
    """Each in one line: what is wrong with it, and what to do."""
    for number, (spoil, problem) in enumerate(
        (
            (
                lambda path: (path / "config.json").write_bytes(b""),
                "config.json is empty or no JSON",
            ),
            (
                lambda path: (path / "tokenizer.json").write_text("version https://git-lfs"),
                "the file tokenizer.json is no tokenizer.json",
            ),
            (
                lambda path: (path / "model.safetensors").rename(
                    path / "model.safetensors.index.json"
                ),
                'as save_pretrained writes them with max_shard_size="100GB"',
            ),
        )
    ):
        other = shutil.copytree(folder / "hf", tmp_path / str(number))
        spoil(other)
        assert export_hf.main([f"--from_hf={other}", f"--out={tmp_path / 'x.pt'}"]) == 2
        said = err(capsys)
        assert said.startswith(f"export_hf.py: error: --from_hf {other}") and problem in said
        assert said.count("\n") == 1


@whatever_the_vocabulary
def test_a_reader_that_is_gone_costs_no_export(folder, tmp_path):
    """As in a pipe to a program that has ended: all is written, and nothing is said."""
    command = [sys.executable, str(export_hf.__file__), "--out=hf"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command.append(f"--checkpoint={folder / 'run'}")
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (0, b"") and (tmp_path / "hf/config.json").exists()


def test_padding_behind_the_vocabulary_is_left_out(folder, tmp_path):
    """And a folder that says nothing of its context knows all of its positions."""
    before = load_checkpoint(folder / "run/checkpoints/best.pt")["model"]["wte.weight"]
    rows = len(before) + 5
    padded = torch.cat([before, torch.ones(5, 32)])
    other = rewritten(folder, tmp_path / "other", {"vocab_size": rows}, {"wte.weight": padded})
    (other / "tokenizer_config.json").unlink()
    assert export_hf.main(["--from_hf", str(other), "--out", str(tmp_path / "x.pt")]) == 0
    checkpoint = load_checkpoint(tmp_path / "x.pt")
    assert (
        torch.equal(checkpoint["model"]["wte.weight"], before)
        and checkpoint["trained_context"] == 16
    )


def test_weights_saved_by_transformers_come_back(folder, tmp_path):
    """Their names have a prefix that ours have not."""
    saved = tmp_path / "saved"
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        kind.from_pretrained(folder / "hf").save_pretrained(saved)
    assert all(name.startswith("transformer.") for name in weights_in(saved))
    assert export_hf.main(["--from_hf", str(saved), "--out", str(tmp_path / "x.pt")]) == 0
    before = load_checkpoint(folder / "run/checkpoints/best.pt")["model"]
    before["wpe.weight"] = before["wpe.weight"][:16]  # those that were trained
    after = load_checkpoint(tmp_path / "x.pt")["model"]
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_vocabulary_saved_by_transformers_is_the_same(folder, tmp_path):
    AutoTokenizer.from_pretrained(folder / "hf").save_pretrained(tmp_path)
    contents = {
        OwnVocabulary((path / "tokenizer.json").read_text(encoding="utf-8"), "x").content
        for path in (folder / "hf", tmp_path)
    }
    assert len(contents) == 1


@pytest.mark.parametrize("folder", ["gpt2"], indirect=True)
def test_a_disk_that_fills_leaves_nothing(folder, small_disk, capsys):
    disk = small_disk(4, "tmpfs")
    for flag, source, out in (
        ("--checkpoint", "run", disk / "x"),
        ("--from_hf", "hf", disk / "x.pt"),
    ):
        assert export_hf.main([flag, str(folder / source), f"--out={out}"]) == 2
        error = capsys.readouterr().err
        assert f"--out {out} cannot be written (" in error and "No space left on device" in error
        assert error.count("\n") == 1 and list(disk.iterdir()) == []


def test_training_goes_on_from_what_came_back(folder, tmp_path, monkeypatch):
    """The first step of the new run has the loss that the imported weights have."""
    monkeypatch.chdir(folder)
    back = tmp_path / "back.pt"
    assert export_hf.main(["--from_hf", "hf", "--out", str(back)]) == 0
    name = json.loads(Path("run/config.json").read_text(encoding="utf-8"))["config"]["tokenizer"]
    flags = [
        *TINY_FLAGS,
        "--input_file=text.txt",
        "--block_size=32",
        "--steps=3",
        "--amp=off",
        "--log_every=1",
    ]
    flags += [f"--out_dir={tmp_path / 'more'}", f"--init_from={back}"]
    flags += [GPT2 if name == "gpt2" else "--tokenizer=run/tokenizer.json"]
    assert train.main(flags) == 0
    log = (tmp_path / "more/logs/train.log").read_text(encoding="utf-8")
    assert f"Starting from the weights of {back} (16 positions; 17 to 32 begin new)" in log
    loss = float(log.split("step 1/3 | loss ")[1].split(" ")[0])
    checkpoint = load_checkpoint(back)
    saved = load_checkpoint(tmp_path / "more/checkpoints/last.pt")
    config = Config.from_dict(saved["config"])
    trainer = train.Trainer(config, load_corpus(config, choose_tokenizer(config, saved)), None)
    new = trainer.model.wpe.weight.detach()[16:].clone()
    trainer.start_from(InitialWeights(back, checkpoint["model"], 16))
    positions = trainer.model.wpe.weight
    assert torch.equal(positions[:16], checkpoint["model"]["wpe.weight"])
    assert torch.equal(positions[16:], new) and new.std() > 0
    (slices,) = trainer.slices(1)
    assert loss == pytest.approx(trainer.model(slices[:, :-1], slices[:, 1:]).item(), rel=1e-5)
    assert train.main([*flags, "--steps=5"]) == 0, "and the run continues from its own checkpoint"
    assert "Resuming from step 3" in (tmp_path / "more/logs/train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", ["gpt2"], indirect=True)
def test_a_published_model_is_fine_tuned(folder, tmp_path, monkeypatch):
    """The two commands of the README, on a model in the layout of openai-community/gpt2: names
    without a prefix, the masks among the weights, no word about a trained context. It knows all its
    32 positions, and still does when it was trained on with slices of 16."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "hf", "gpt2")
    published = weights_in(Path("gpt2"))
    more = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)) / 50
    published["wpe.weight"] = torch.cat([published["wpe.weight"], more])
    config = read_json(Path("gpt2/config.json")) | {"n_positions": 32, "n_ctx": 32}
    Path("gpt2/config.json").write_text(json.dumps(config), encoding="utf-8")
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32).tril() for layer in range(2)}
    save_file(published | masks, "gpt2/model.safetensors")
    for name in ("tokenizer_config.json", "prompts.json", "README.md"):
        Path("gpt2", name).unlink()
    Path("gpt2/generation_config.json").write_text(
        '{"max_length": 20}', encoding="utf-8"
    )  # of text, not of the model
    text = "".join(
        f"Verse {i}: a slow green hen sleeps under {i * 7} old trees.\n" for i in range(200)
    )
    Path("verses.txt").write_text(text, encoding="utf-8", newline="\n")

    assert export_hf.main(["--from_hf", "gpt2", "--out", "gpt2.pt"]) == 0
    assert load_checkpoint(Path("gpt2.pt"))["trained_context"] == 32
    flags = [
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=32",
        "--block_size=32",
        "--device=cpu",
        "--input_file=verses.txt",
    ]
    fine = [
        "--optimizer=adamw",
        "--lr=1e-3",
        "--target_loss=0",
        "--val_fraction=0.1",
        "--patience=2",
        "--seq_len=16",
    ]
    fine += ["--batch_size=8", "--steps=20", "--eval_every=5", "--max_new_tokens=20", "--amp=off"]
    assert train.main([*flags, *fine, "--init_from=gpt2.pt", "--out_dir=out/fine-tuned"]) == 0
    first, *_, last = (float(loss) for (loss,) in rows(Path("out/fine-tuned"), "val_loss") if loss)
    assert last < first - 0.1
    best = load_checkpoint(Path("out/fine-tuned/checkpoints/best.pt"))
    assert best["trained_context"] == 32 and best["loss"] == pytest.approx(last, abs=1e-6)

    _, card = exported(Path("out/fine-tuned"), Path("again"))
    assert (
        "GPT-2 trained from the weights of gpt2.pt on verses.txt" in card
        and "this text alone" not in card
    )
    sampler = sample.Sampler(Path("out/fine-tuned/checkpoints/best.pt"), "cpu", "off")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained("again"),
        AutoTokenizer.from_pretrained("again"),
    )
    ids = tokenizer("Verse 1: a", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**ids, do_sample=False, max_length=32)[0])
    options = sample.Options(temperature=0.0, max_new_tokens=32 - ids["input_ids"].shape[1])
    assert "Verse 1: a" + "".join(sampler.stream("Verse 1: a", options)) == expected, (
        "it sees all that it wrote"
    )

    more = [
        *flags,
        "--seq_len=16",
        "--batch_size=2",
        "--steps=2",
        "--target_loss=0",
        "--num_prompts=0",
    ]
    assert train.main([*more, "--init_from=out/fine-tuned", "--out_dir=out/more"]) == 0
    log = Path("out/more/logs/train.log").read_text(encoding="utf-8")
    assert f"Starting from the weights of {Path('out/fine-tuned/checkpoints/best.pt')}" in log
    assert load_checkpoint(Path("out/more/checkpoints/last.pt"))["trained_context"] == 32


@pytest.mark.parametrize(
    ("asked", "name"),
    [("gpt2", "gpt2"), ("openai-community/gpt2-xl", "gpt2-xl"), ("some/other", "gpt2")],
)
def test_a_model_of_the_hub_has_to_be_downloaded(tmp_path, monkeypatch, capsys, asked, name):
    monkeypatch.chdir(tmp_path)
    assert export_hf.main([f"--from_hf={asked}", "--out=x.pt"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--from_hf {Path(asked)}: no such folder" in error
    assert f"hf download openai-community/{name} " in error and f"--local-dir {name}" in error
    assert error.rstrip().endswith(f"--from_hf {name}") and not Path("x.pt").exists()


@whatever_the_vocabulary
def test_a_run_that_goes_on_still_began_with_other_weights(folder, tmp_path, monkeypatch):
    """Also where the flag is left out then: the card does not call it trained from scratch."""
    monkeypatch.chdir(folder)
    flags = [
        *TINY_FLAGS,
        "--input_file=text.txt",
        "--block_size=32",
        "--tokenizer=run/tokenizer.json",
    ]
    flags.append(f"--out_dir={tmp_path / 'more'}")
    assert train.main([*flags, "--steps=2", "--init_from=run"]) == 0
    assert train.main([*flags, "--steps=4"]) == 0
    _, card = exported(tmp_path / "more", tmp_path / "hf")
    assert "GPT-2 trained from the weights of run on text.txt" in card


@whatever_the_vocabulary
def test_weights_of_another_shape_are_no_start(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    flags = [*TINY_FLAGS, "--input_file=text.txt", f"--out_dir={tmp_path / 'x'}"]
    assert train.main([*flags, "--init_from=run/checkpoints/best.pt", "--n_layer=3"]) == 2
    message = capsys.readouterr().err.replace("\\", "/")
    assert message.endswith(": give --n_layer 2 --block_size 32 --tokenizer run/tokenizer.json\n")
    longer = ["--init_from=run/checkpoints/best.pt", "--n_layer=3", "--block_size=64"]
    assert train.main([*flags, *longer]) == 2
    message = capsys.readouterr().err.replace("\\", "/")
    assert message.endswith(": give --n_layer 2 --tokenizer run/tokenizer.json\n")
    assert train.main([*flags, "--init_from=none.pt"]) == 2
    assert (
        "--init_from none.pt: no such file" in capsys.readouterr().err
        and not (tmp_path / "x").exists()
    )


def test_the_sample_of_a_card_is_of_its_weights_or_before(launch, prompt_disk):
    flags = ["--steps=6", "--sample_every=2", "--save_every=2", "--num_prompts=1"]
    assert launch("run", *flags) == 0
    blocks = sample_blocks(Path("run/samples/samples.txt").read_text("utf-8"))
    assert blocks[-1].step == 6 and len(blocks) > 2
    for step, shown in ((6, 6), (5, 4), (2, 2)):
        assert f"at step {shown}, " in export_hf.sample_of(blocks, step)
    assert export_hf.sample_of(blocks, 0) == ""
    assert export_hf.main(["--checkpoint=run/checkpoints/prev.pt", "--out=hf"]) == 0
    step = load_checkpoint(Path("run/checkpoints/prev.pt"))["step"]
    card = Path("hf/README.md").read_text(encoding="utf-8")
    assert step < 6 and f"**What the run wrote** at step {step}, the prompt first:" in card
