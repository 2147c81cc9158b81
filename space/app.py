"""A page on which visitors let a small GPT-2 continue their text, word by word.

    pip install -r requirements.txt
    MODEL_DIR=../hf/gpt2 python app.py

Runs as it lies as a Hugging Face Space. The model is a folder made by export_hf.py, beside this file as `model` or
wherever MODEL_DIR says. What a visitor may ask for is bounded, one text is written at a time, and the queue is short,
so that a public page cannot be made to eat its machine.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import gradio as gr
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, set_seed

MODEL_DIR = Path(os.environ.get("MODEL_DIR", Path(__file__).parent / "model"))
MOST_CHARACTERS, MOST_TOKENS, QUEUE = 2000, 400, 20
NO_MODEL = f"""
# There is no model here yet

This page needs a folder `{MODEL_DIR.name}` with an exported model, and found none. Make one with

```bash
python export_hf.py --checkpoint out/demo/checkpoints/best.pt --out space/model
```

or point the environment variable `MODEL_DIR` at one, and start the page again.
"""
STYLE = "footer {display: none !important} #text textarea {font-family: monospace; font-size: 15px}"


class Writer:
    """The model, and the text it writes."""

    def __init__(self, folder: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.context = self.model.generation_config.max_length or self.model.config.n_positions
        self.most_tokens = max(1, min(MOST_TOKENS, self.context - 1))
        prompts = folder / "prompts.json"
        self.prompts = json.loads(prompts.read_text(encoding="utf-8")) if prompts.is_file() else ["Once upon a time"]

    def write(self, prompt: str, length: float, temperature: float, top_k: float, seed: float) -> Iterator[str]:
        """The prompt and what follows, longer with every item; ends early when the visitor stops or leaves.

        A prompt longer than the trained context leaves room for is continued from its end.
        """
        if len(prompt) > MOST_CHARACTERS:
            raise gr.Error(f"That prompt has {len(prompt):,} characters; {MOST_CHARACTERS:,} are the most.")
        length = max(1, min(int(length), self.most_tokens))
        ids = self.tokenizer(prompt or "\n", return_tensors="pt")["input_ids"][:, -max(1, self.context - length) :]
        stopped, streamer = Event(), TextIteratorStreamer(self.tokenizer, skip_prompt=True, timeout=60)
        options = dict(do_sample=temperature > 0, max_new_tokens=length, max_length=None, streamer=streamer)
        if temperature > 0:
            options |= dict(temperature=float(temperature), top_k=int(top_k))

        def generate() -> None:
            set_seed(int(seed))
            with torch.inference_mode():
                self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    stopping_criteria=[lambda *_: torch.tensor([stopped.is_set()])],
                    **options,
                )

        thread = Thread(target=generate, daemon=True)
        thread.start()
        text = prompt
        try:
            yield text
            for piece in streamer:
                text += piece
                yield text
        finally:
            stopped.set()
            thread.join()


def page(folder: Path = MODEL_DIR) -> gr.Blocks:
    """The page; one that says what is missing where there is no model."""
    if not (folder / "config.json").is_file():
        with gr.Blocks(title="No model yet") as blocks:
            gr.Markdown(NO_MODEL)
        return blocks
    writer = Writer(folder)
    with gr.Blocks(title="A small GPT-2") as blocks:
        gr.Markdown(
            "# A GPT-2 that read one text\n"
            f"It continues what you write, from {writer.context} tokens of memory. It knows its one text, largely by "
            "heart, and nothing else; what it says is not true or false, only likely."
        )
        text = gr.Textbox(
            label="Your text, and what follows", lines=10, max_lines=24, max_length=MOST_CHARACTERS * 4, elem_id="text"
        )
        with gr.Row():
            go = gr.Button("Continue", variant="primary", elem_id="go")
            stop = gr.Button("Stop", variant="stop", elem_id="stop")
        gr.Examples([[prompt] for prompt in writer.prompts], [text], label="Beginnings")
        with gr.Accordion("How", open=False):
            length = gr.Slider(1, writer.most_tokens, min(100, writer.most_tokens), step=1, label="tokens to add")
            temperature = gr.Slider(0, 2, 0.9, step=0.05, label="temperature (0: always the likeliest)")
            top_k = gr.Slider(1, 200, 50, step=1, label="choose among so many")
            seed = gr.Number(1337, precision=0, minimum=0, maximum=2**31 - 1, label="seed (the same gives the same)")
        writing = go.click(writer.write, [text, length, temperature, top_k, seed], text, concurrency_limit=1)
        stop.click(None, cancels=[writing])
    return blocks.queue(max_size=QUEUE)


if __name__ == "__main__":
    page().launch(css=STYLE)
