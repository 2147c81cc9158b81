"""The run as TensorBoard shows it: each step once, whatever broke it off, and whenever this was turned on."""

import io
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parts.flags import Config
from parts.run.directory import RunDir, append_whole, read_json
from parts.run.layout import BLOCK, METRICS

log = logging.getLogger("train")
EVENTS = "events.out.tfevents.{}.train"  # name of a file; those of other programs end otherwise
GROUPS = dict(
    lr="optimizer",
    grad_norm="optimizer",
    tokens="speed",
    tokens_per_sec="speed",
    elapsed_sec="speed",
)
RESULTS = {
    "best_loss",
    "best_step",
    "corpus_loss",
    "perplexity",
    "bits_per_byte",
    "val_loss",
    "val_perplexity",
}


@contextmanager
def shown(run: RunDir, config: Config) -> Iterator[None]:
    """Around a run: events of all of it with --tensorboard, else none. What is in their way costs the run nothing."""
    board = None
    with run.attempt(
        "TensorBoard's events"
    ):  # an open TensorBoard gets stuck where its file is gone: first empty it
        for path in sorted(run.events.glob(EVENTS.format("*")), reverse=True):
            path.write_bytes(b"") if path.stat().st_size else path.unlink()
    if config.tensorboard:
        try:
            board = Board(run, config)
            log.info(
                "Events for TensorBoard: %s; to see them: tensorboard --logdir %s",
                run.events,
                run.root,
            )
        except (
            Exception
        ) as error:  # versions of TensorBoard, protobuf and NumPy fail together in many ways
            log.warning(
                "Going on without --tensorboard (pip install tensorboard): %s",
                str(error).partition("\n")[0],
            )
    run.also = None if board is None else board.append
    try:
        yield
    finally:
        run.also = None
        if board is not None:
            board.end()


def rows_of(table: str) -> list[dict[str, float]]:
    """Lines of the CSV as columns and values, without what is empty and without the header."""
    lines = [line.split(",") for line in table.splitlines() if line[:1].isdigit()]
    return [
        {name: float(cell) for name, cell in zip(METRICS, cells, strict=False) if cell}
        for cells in lines
    ]


class Board:
    """An event file of TensorBoard: first what metrics and samples hold, which are the truth, then what they get.

    Whole records are appended before training goes on: no thread fails, is waited for, or is killed with rows in hand.
    """

    def __init__(self, run: RunDir, config: Config):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import RecordWriter
        from torch.utils.tensorboard.summary import hparams, text

        self.run, self.Event, self.Summary, self.text = run, Event, Summary, text
        self.path = run.events / EVENTS.format(f"{time.time():.6f}")
        self.waiting = io.BytesIO()
        self.records = RecordWriter(self.waiting)

        files = {
            path: path.read_bytes().decode("utf-8", "replace")
            for path in (run.metrics_csv, run.samples_txt)
        }
        times = {row["step"]: row["elapsed_sec"] for row in rows_of(files[run.metrics_csv])}
        elapsed, began = (
            0.0,
            time.time() - max(times.values(), default=0.0),
        )  # had it run without a break
        flags = {
            name: ", ".join(v) if isinstance(v, list) else v for name, v in config.as_dict().items()
        }
        compared = [
            "results/best_loss",
            "results/corpus_loss",
            "loss/window_loss",
            *["loss/val_loss"] * config.validates,
        ]
        experiment, session, self.session_end = hparams(flags, dict.fromkeys(compared, 0))
        self.record(0, began, file_version="brain.Event:2")
        self.record(
            0, began, session_log=SessionLog(status=SessionLog.START)
        )  # to readers: forget all from step 0 on
        self.record(0, began, summary=experiment)
        self.record(0, began, summary=session)
        past = [one for path, content in files.items() for one in self.summaries(path, content)]
        for step, summary in sorted(past, key=lambda one: one[0]):
            elapsed = times.get(step, elapsed)
            self.record(step, began + elapsed, summary=summary)
        self.flush()

    def summaries(self, path: Path, content: str) -> Iterator[tuple[int, object]]:
        """Step and summary of each row or block in a text from metrics or samples; of other files nothing."""
        if path == self.run.metrics_csv:
            for row in rows_of(content):
                step = int(row.pop("step"))
                yield (
                    step,
                    self.scalars(
                        {f"{GROUPS.get(name, 'loss')}/{name}": value for name, value in row.items()}
                    ),
                )
        elif path == self.run.samples_txt:
            for step, block in dict(BLOCK.findall(content)).items():
                yield (
                    int(step),
                    self.text("samples", "    " + block.replace("\n", "\n    ")),
                )  # in Markdown: verbatim

    def scalars(self, values: dict[str, float]) -> object:
        return self.Summary(
            value=[self.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )

    def record(self, step: int, wall_time: float, **content: object) -> None:
        self.records.write(
            self.Event(step=step, wall_time=wall_time, **content).SerializeToString()
        )

    def append(self, path: Path, content: str) -> None:
        """Show what a file of the run was just given."""
        for step, summary in self.summaries(path, content):
            self.record(step, time.time(), summary=summary)
        if self.waiting.tell():
            self.flush()

    def end(self) -> None:
        """Show the results of a run that ended, was interrupted or failed."""
        results = read_json(self.run.results_json)
        if (reason := results.get("stop_reason", "running")) != "running":
            values = {
                f"results/{k}": v for k, v in results.items() if k in RESULTS and v is not None
            }
            self.record(results.get("final_step", 0), time.time(), summary=self.scalars(values))
            if reason not in ("interrupted", "failed"):
                self.record(0, time.time(), summary=self.session_end)
            self.flush()

    def flush(self) -> None:
        """Append what waits to the file, or none of it."""
        with self.run.attempt("TensorBoard's events"):
            self.run.check_owner()
            self.run.events.mkdir(exist_ok=True)
            self.path.touch()
            append_whole(self.path, self.waiting.getvalue())
            self.waiting.truncate(self.waiting.seek(0))
