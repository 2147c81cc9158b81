"""export_hf.py --out NAME.gguf: llama.cpp writes the same text, and has the same ids."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import train_on_lines
from test_tokens import NASTY

import export_hf
import sample
from parts.run.checkpoint import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("gguf")]  # `run` is made once
gguf = pytest.importorskip("gguf", reason="needs gguf (requirements-dev.txt)")
CONTEXT = 32
PROMPT = "Line 1: the"


@pytest.fixture(scope="module", params=["gpt2", "bpe:300"])
def run(request, tmp_path_factory):
    """A model that has learned some of its text, in half of its positions."""
    path = tmp_path_factory.mktemp("gguf")
    context = ["--block_size=64", f"--seq_len={CONTEXT}"]
    return train_on_lines(path, f"--tokenizer={request.param}", *context)


def export(run: Path, *flags: str) -> Path:
    out = run.parent / f"model{len(list(run.parent.glob('*.gguf')))}.gguf"
    assert export_hf.main([f"--checkpoint={run}", f"--out={out}", *flags]) == 0
    return out


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_llama_cpp_writes_the_same_text_up_to_the_trained_context(run, kind):
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs xllamacpp (requirements-dev.txt)")
    path = export(run, f"--gguf_type={kind}")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), CONTEXT, 1
    params.cpuparams.n_threads, params.n_gpu_layers = 1, 0
    server = xllamacpp.Server(params)
    request = {"prompt": PROMPT, "max_tokens": 10 * CONTEXT, "temperature": 0.0}
    answer = server.handle_completions(request)
    sampler = sample.Sampler(run / "checkpoints/best.pt", "cpu", "off")
    start = len(sampler.tokenizer.encode_ordinary(PROMPT))
    options = sample.Options(temperature=0.0, max_new_tokens=CONTEXT - start)
    assert answer["choices"][0]["text"] == "".join(sampler.stream(PROMPT, options))
    assert answer["usage"]["total_tokens"] == CONTEXT and answer["usage"]["prompt_tokens"] == start
    # The server keeps what it has seen: all ids of a text but the last are cached if they are ours.
    lines = (run.parent / "text.txt").read_text(encoding="utf-8").splitlines()[::20]
    compared = 0
    for text in (*lines, " x  y\n\n z\t", *(word for word in NASTY if word != "<|endoftext|>")):
        ids = sampler.tokenizer.encode_ordinary(text)
        if 0 < len(ids) < CONTEXT:
            usage = [
                server.handle_completions({"prompt": prompt, "max_tokens": 1})["usage"]
                for prompt in (ids, text)
            ][1]
            assert usage["prompt_tokens"] == len(ids), ascii(text)
            assert usage["prompt_tokens_details"]["cached_tokens"] == len(ids) - 1, ascii(text)
            compared += 1
    assert compared >= 10


def test_what_the_file_holds(run, capsys):
    path = export(run)
    assert capsys.readouterr().out.endswith(f"llama-cli -m {path} -c {CONTEXT}\n")
    reader = gguf.GGUFReader(path)
    weights = {tensor.name: tensor.data for tensor in reader.tensors}
    checkpoint = load_checkpoint(run / "checkpoints/best.pt")
    model = checkpoint["model"]
    assert len(weights) == len(model) + 1, "the tied head twice"
    assert np.array_equal(weights["output.weight"], model["wte.weight"].numpy())
    assert np.array_equal(weights["position_embd.weight"], model["wpe.weight"][:CONTEXT].numpy())
    ours = model["h.1.attn.c_attn.weight"].numpy()
    assert np.array_equal(weights["blk.1.attn_qkv.weight"], ours)
    sampler = sample.Sampler(run / "checkpoints/best.pt", "cpu", "off")
    said = {name: field.contents() for name, field in reader.fields.items()}
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert len(tokens) == len(model["wte.weight"]) and types.count(3) == 1
    assert tokens[sampler.tokenizer.eot_token] == "<|endoftext|>"
    assert types[sampler.tokenizer.eot_token] == 3
    assert said["gpt2.context_length"] == CONTEXT
    assert said["tokenizer.ggml.add_bos_token"] is False
    half = {
        tensor.name: tensor for tensor in gguf.GGUFReader(export(run, "--gguf_type=f16")).tensors
    }
    assert half["blk.0.ffn_up.weight"].data.dtype == np.float16
    assert half["blk.0.ffn_up.bias"].data.dtype == np.float32
    assert half["position_embd.weight"].data.dtype == np.float32


@pytest.mark.parametrize("run", ["bpe:300"], indirect=True)
def test_what_is_wrong_is_said_in_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    here = f"--checkpoint={run}"
    Path("notes.gguf").write_text("mine", encoding="utf-8")
    Path("folder.gguf").mkdir()
    checkpoint = load_checkpoint(run / "checkpoints/best.pt")
    checkpoint["model"]["h.0.mlp.c_fc.weight"] = torch.full((128, 32), 1e6)
    torch.save(checkpoint, "large.pt")
    before = sorted(Path().rglob("*"))
    for flags, problem in (
        ([here, "--out=notes.gguf", "--replace"], "--out notes.gguf is no GGUF file"),
        ([here, "--out=folder.gguf", "--replace"], "--out folder.gguf is no GGUF file"),
        ([here, "--out=hf", "--gguf_type=f16"], "--gguf_type f16 is for a GGUF file"),
        (["--from_hf=hf", "--out=new.gguf"], "a GGUF file is made of a --checkpoint"),
        (["--checkpoint=large.pt", "--out=new.gguf", "--gguf_type=f16"], "give --gguf_type f32"),
    ):
        capsys.readouterr()
        assert export_hf.main(flags) == 2
        out, error = capsys.readouterr()
        assert out == "" and problem in error and error.count("\n") == 1, error
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert export_hf.main([here, "--out=new.gguf"]) == 2
    error = capsys.readouterr().err
    assert "pip install gguf" in error and error.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("run", ["bpe:300"], indirect=True)
def test_an_earlier_file_is_replaced_when_asked(run, tmp_path):
    flags = [f"--checkpoint={run}", f"--out={tmp_path / 'new' / 'model.gguf'}"]
    assert [export_hf.main(flags), export_hf.main(flags)] == [0, 2]
    assert export_hf.main([*flags, "--replace", "--license=mit"]) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.gguf"]
    license = gguf.GGUFReader(tmp_path / "new/model.gguf").get_field("general.license")
    assert license.contents() == "mit"
