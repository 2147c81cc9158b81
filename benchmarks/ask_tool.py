"""What one tool says of an exported model. benchmarks/other_tools.py runs this file in the tool's
own environment, which has nothing of this project.

    python ask_tool.py TOOL MODEL QUESTION.json ANSWER.json

The question has `passage`, a text whose tokens fill the context; `prompt`; `n_new`, the tokens from
the prompt to the end of the context; `context`; and `heldout`, a longer text. The answer has

    version        of the tool
    ids            of the passage
    log_probs      of each token of the passage but the first, in nats
    greedy         the prompt and what the tool adds to it
    bits_per_byte  of the longer text

What a tool cannot tell is left out.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path


def log_probs(logits, ids: list[int]) -> list[float]:
    """Of each id but the first, from logits (T, V) of a torch model."""
    import torch

    chosen = torch.tensor(ids[1:])[:, None]
    return logits[:-1].double().log_softmax(-1).gather(1, chosen)[:, 0].tolist()


def asked_of_hf(model, tokenizer, question: dict) -> dict:
    """What a model card says: all that the tokenizer returns goes to the model."""
    import torch

    encoded = tokenizer(question["passage"], return_tensors="pt")
    ids = encoded["input_ids"][0].tolist()
    with torch.no_grad():
        logits = model(**encoded).logits[0]
    prompt = tokenizer(question["prompt"], return_tensors="pt")
    greedy = model.generate(**prompt, max_length=question["context"], do_sample=False)[0]
    text = tokenizer.decode(greedy, skip_special_tokens=True)
    return {"ids": ids, "log_probs": log_probs(logits, ids), "greedy": text}


def ask_transformers(model: Path, question: dict) -> dict:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return asked_of_hf(AutoModelForCausalLM.from_pretrained(model).eval(), tokenizer, question)


def ask_optimum(model: Path, question: dict) -> dict:
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return asked_of_hf(ORTModelForCausalLM.from_pretrained(model, export=True), tokenizer, question)


def ask_ctranslate2(model: Path, question: dict) -> dict:
    import ctranslate2
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(question["passage"])["input_ids"]
    prompt = tokenizer.convert_ids_to_tokens(tokenizer(question["prompt"])["input_ids"])
    with tempfile.TemporaryDirectory() as folder:
        converted = ctranslate2.converters.TransformersConverter(str(model))
        generator = ctranslate2.Generator(converted.convert(folder, force=True), device="cpu")
        passage = [tokenizer.convert_ids_to_tokens(ids)]
        logits = torch.from_numpy(np.array(generator.forward_batch(passage))[0])
        greedy = {"sampling_topk": 1, "max_length": question["n_new"]}
        [found] = generator.generate_batch([prompt], include_prompt_in_result=False, **greedy)
    start = tokenizer.convert_tokens_to_ids(prompt)
    text = tokenizer.decode(start + found.sequences_ids[0], skip_special_tokens=True)
    return {"ids": ids, "log_probs": log_probs(logits, ids), "greedy": text}


def ask_mlx_lm(model: Path, question: dict) -> dict:
    import mlx.core as mx
    import numpy as np
    import torch
    from mlx_lm import load, stream_generate

    network, tokenizer = load(str(model))
    ids = tokenizer.encode(question["passage"])
    logits = torch.from_numpy(np.array(network(mx.array([ids]))[0].astype(mx.float32)))
    start = tokenizer.encode(question["prompt"])
    # Its own text leaves out a space at the beginning.
    stream = stream_generate(network, tokenizer, start, max_tokens=question["n_new"])
    greedy = tokenizer.decode(start + [piece.token for piece in stream], skip_special_tokens=True)
    return {"ids": ids, "log_probs": log_probs(logits, ids), "greedy": greedy}


def ask_lm_eval(model: Path, question: dict) -> dict:
    import lm_eval
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "text.json"
        data.write_text(json.dumps({"text": question["heldout"]}), encoding="utf-8")
        task = {
            "task": "own_text",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        }
        # JSON is YAML.
        (folder / "own_text.yaml").write_text(json.dumps(task), encoding="utf-8")
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={model},device=cpu,dtype=float32",
            tasks=["own_text"],
            task_manager=TaskManager(include_path=name),
        )
    return {"bits_per_byte": found["results"]["own_text"]["bits_per_byte,none"]}


def ask_llama_cpp(model: Path, question: dict) -> dict:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = question["context"]
    params.n_parallel = 1
    server = xllamacpp.Server(params)
    request = {"prompt": question["prompt"], "max_tokens": 10**6, "temperature": 0.0}
    answer = server.handle_completions(request)
    return {"greedy": question["prompt"] + answer["choices"][0]["text"]}


def ask_gpt4all(model: Path, question: dict) -> dict:
    from gpt4all import GPT4All

    local = {"model_path": model.parent, "allow_download": False, "device": "cpu"}
    network = GPT4All(model.name, n_ctx=question["context"], **local)
    greedy = {"temp": 0, "repeat_penalty": 1.0, "max_tokens": question["n_new"]}
    added = network.generate(question["prompt"], **greedy)
    return {"greedy": question["prompt"] + added}


ASK = {
    "transformers": ask_transformers,
    "optimum-onnx": ask_optimum,
    "ctranslate2": ask_ctranslate2,
    "mlx-lm": ask_mlx_lm,
    "lm_eval": ask_lm_eval,
    "xllamacpp": ask_llama_cpp,
    "gpt4all": ask_gpt4all,
}


def main() -> None:
    tool, model, question, out = sys.argv[1:]
    answer = ASK[tool](Path(model), json.loads(Path(question).read_text(encoding="utf-8")))
    Path(out).write_text(json.dumps(answer | {"version": version(tool)}), encoding="utf-8")


if __name__ == "__main__":
    main()
