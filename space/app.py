"""A page on which visitors let a small GPT-2 continue their text, word by word.

    pip install -r requirements.txt
    MODEL_DIR=../hf/gpt2 python app.py

It runs as it is as a Hugging Face Space. The model is a folder made by export_hf.py: `model` beside
this file, or what MODEL_DIR names. What a visitor may ask for and send is bounded, one text is
written at a time, and the queue is short, so that a public page cannot use up its machine.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import gradio as gr
import torch
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, set_seed

hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
hosts = ",".join(filter(None, [hosts, "localhost", "127.0.0.1"]))
os.environ |= {"no_proxy": hosts, "NO_PROXY": hosts}  # Gradio asks its own page whether it is up

MODEL_DIR = Path(os.environ.get("MODEL_DIR", Path(__file__).parent / "model"))
MOST_CHARACTERS = 8000
MOST_TOKENS = 400
MOST_BYTES = 2**17
QUEUE = 20
NO_MODEL = """
# There is no model here yet

This page needs a folder `{folder}` with an exported model: {problem}. Make one with

```bash
python export_hf.py --checkpoint out/demo --out space/model
```

or point the environment variable `MODEL_DIR` at one, and start the page again.
"""
STYLE = "footer {display: none !important} #text textarea {font-family: monospace; font-size: 15px}"


class Storyteller:
    """A model, and the text it writes. Raises one of many exceptions for a folder without one."""

    def __init__(self, folder: Path):
        if not (folder / "config.json").is_file():
            raise FileNotFoundError("it found none")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config["model_type"] != "gpt2":
            raise ValueError(f"what is there is a {config['model_type']}")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        if found["missing_keys"]:  # or transformers makes them up
            raise ValueError(f"it has no weights called {min(found['missing_keys'])}")
        self.model.eval()
        self.context = self.model.generation_config.max_length or self.model.config.n_positions
        self.most_tokens = max(1, min(MOST_TOKENS, self.context - 1))
        self.prompts = ["Once upon a time"]
        if (folder / "prompts.json").is_file():
            self.prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))

    def write(
        self, prompt: str, length: float, temperature: float, top_k: float, seed: float
    ) -> Iterator[str]:
        """The prompt and what follows, longer with every item; ends early when the visitor stops or
        leaves. Of a prompt that is too long for the trained context the end is continued."""
        if len(prompt) > MOST_CHARACTERS:
            problem = f"That text has {len(prompt):,} characters; {MOST_CHARACTERS:,} are the most."
            sees = f"the model sees the last {self.context} tokens only"
            gr.Warning(f"{problem} Delete its beginning: {sees}.")
            yield prompt
            return
        length = int(bounded(length, 1, self.most_tokens, self.most_tokens))
        temperature = bounded(temperature, 0, 2, 0.9)
        ids = self.tokenizer(prompt or "\n", return_tensors="pt")["input_ids"]
        ids = ids[:, -max(1, self.context - length) :]
        shown = dict(skip_prompt=True, skip_special_tokens=True)  # the end of a document is no text
        streamer = TextIteratorStreamer(self.tokenizer, **shown)
        stopped = Event()
        failures = []
        stop = [lambda *_: torch.tensor([stopped.is_set()])]
        options = dict(attention_mask=torch.ones_like(ids), streamer=streamer, do_sample=False)
        options |= dict(max_new_tokens=length, max_length=None, stopping_criteria=stop)
        if temperature >= 0.01:
            top_k = int(bounded(top_k, 1, 200, 50))
            options |= dict(do_sample=True, temperature=temperature, top_k=top_k)

        def generate() -> None:
            set_seed(int(bounded(seed, 0, 2**31 - 1, 1337)))
            try:
                with torch.inference_mode():
                    self.model.generate(ids, **options)
            except Exception as error:
                failures.append(error)
            finally:
                streamer.end()  # or the visitor, and all who wait, would wait for ever

        thread = Thread(target=generate, daemon=True)
        thread.start()
        added = ""
        try:
            yield prompt
            for piece in streamer:
                added += piece
                yield prompt + added.rstrip("\ufffd")  # less a character that the last token cuts
        finally:
            stopped.set()
            thread.join()
        if failures:
            raise gr.Error("The model failed on this.") from failures[0]


def bounded(value: float | None, low: float, high: float, default: float) -> float:
    """The value, or the nearest that is allowed; the default for none at all and for NaN."""
    return default if value is None or value != value else min(max(float(value), low), high)


class SmallRequests:
    """ASGI middleware that refuses a request when more than `MOST_BYTES` of it have come."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        """Pass the request on, counting what is read of it."""
        taken = 0

        async def counted() -> dict:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MOST_BYTES:
                raise HTTPException(413)
            return message

        await self.app(scope, counted, send)


def page(folder: Path = MODEL_DIR) -> gr.Blocks:
    """The page; one that says what is missing where there is no model."""
    try:
        return writing_page(Storyteller(folder))
    except Exception as error:  # transformers, tokenizers and safetensors fail in many ways
        with gr.Blocks(title="No model yet") as blocks:
            problem = str(error).partition("\n")[0]
            gr.Markdown(NO_MODEL.format(folder=folder.name, problem=problem))
        return blocks


def writing_page(storyteller: Storyteller) -> gr.Blocks:
    """The page with a model behind it."""
    with gr.Blocks(title="A small GPT-2") as blocks:
        gr.Markdown(
            "# A small GPT-2\n"
            f"It continues what you write and remembers {storyteller.context} tokens. What it says "
            "is not true or false, only likely, and may be copied from what it was trained on."
        )
        size = dict(lines=10, max_lines=24, max_length=MOST_CHARACTERS)
        text = gr.Textbox(label="Your text, and what follows", elem_id="text", **size)
        with gr.Row():
            go = gr.Button("Continue", variant="primary", elem_id="go")
            stop = gr.Button("Stop", elem_id="stop")
        gr.Examples([[prompt] for prompt in storyteller.prompts], [text], label="Beginnings")
        with gr.Accordion("How it writes", open=False):
            most = max(2, storyteller.most_tokens)
            length = gr.Slider(1, most, min(100, most), step=1, label="tokens to add")
            likeliest = "temperature (0: always the likeliest)"
            temperature = gr.Slider(0, 2, 0.9, step=0.05, label=likeliest)
            top_k = gr.Slider(1, 200, 50, step=1, label="top-k: choose among so many tokens")
            limits = dict(precision=0, minimum=0, maximum=2**31 - 1)
            seed = gr.Number(1337, label="seed (the same gives the same)", **limits)
        asked = [text, length, temperature, top_k, seed]
        writing = go.click(storyteller.write, asked, text, concurrency_limit=1)
        stop.click(None, cancels=[writing])
    return blocks.queue(max_size=QUEUE, api_open=False)


if __name__ == "__main__":
    page().launch(css=STYLE, app_kwargs={"middleware": [Middleware(SmallRequests)]})
