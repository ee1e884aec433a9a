"""A run's mirror in Weights & Biases: whatever happens there, the run on disk goes on."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.precision import Parity
from mechlens.runs.artifacts import read_header
from mechlens.runs.privacy import PrivateTexts, figure_without_text, frame_without_text, header_has_text, unpacked
from mechlens.runs.run import Artefact, Inputs, Run, plain
from mechlens.runs.wandb.start import remove_staged, start_wandb, wandb_files_in, warn_wandb
from mechlens.settings import WandbSettings

# W&B shows no more rows of a table; all of them are in the run folder.
MAX_ROWS = 10_000
STEP = "step"
MAIN, N_MAIN = "0 main figures", 3
"""Section of the run's page for the figures that its report begins with; W&B sorts sections by name."""
BY_STEP = "tables by step"
"""Section of the tables over checkpoints, cut by step, on whose panels W&B's slider moves from one to the next."""


class WandbMirror:
    """Sends what a run records to W&B; the first failure is one warning, then W&B is left alone."""

    def __init__(self, settings: WandbSettings, folder: Path, run: Run) -> None:
        started = start_wandb(settings, folder, run)
        self._run = started.run if started else None
        self._online = bool(started and started.online)
        self._folder = folder
        self._upload_text = settings.upload_text
        self._private = PrivateTexts()
        self._steps: set[str] = set()
        self._figures: dict[str, Any] = {}
        self._by_step: dict[str, pd.DataFrame] = {}
        self._linked: set[tuple[str, str]] = set()
        self._own_notes = getattr(self._run, "notes", None)

    @property
    def id(self) -> str | None:
        """The W&B run's id; None where there is no W&B run."""
        return None if self._run is None else str(self._run.id)

    @property
    def project(self) -> str | None:
        """The W&B run's ENTITY/PROJECT, or PROJECT where it will be that of who uploads it."""
        parts = [getattr(self._run, name, None) for name in ("entity", "project")]
        return "/".join(part for part in parts if part) or None

    def withhold(self, texts: list[str]) -> None:
        """From now on these texts stay on the machine, whatever holds them."""
        self._private = self._private.and_these(texts)

    def inputs(self, inputs: Inputs, device: str | None, dtype: str | None, parity: Parity | None) -> None:
        """Adds what went in to the config and, when online, to the lineage."""

        def send(run: Any) -> None:
            known = {name: value for name, value in plain(inputs).items() if value is not None}
            record = {"inputs": known, "device": device, "dtype": dtype, "parity": plain(parity)}
            run.config.update(record, allow_val_change=True)
            self._link(run, inputs.named)

        self._attempt(send)

    def metrics(self, metrics: Mapping[str, Estimate]) -> None:
        """Puts value, interval and count of each number in the summary."""
        summary: dict[str, Any] = {}
        for name, estimate in metrics.items():
            low, high = estimate.interval
            summary |= {name: plain(estimate.value), f"{name}/low": plain(low)}
            summary |= {f"{name}/high": plain(high), f"{name}/n": estimate.n}
        self._attempt(lambda run: run.summary.update(summary))

    def begins_with(self, sentence: str, figures: Sequence[str]) -> None:
        """The one sentence, in the summary and before the run's own notes; then the figures, the main ones first."""
        told = sentence if self._upload_text else self._private.clean(sentence)

        def send(run: Any) -> None:
            run.summary.update({"sentence": told})
            run.notes = "\n\n".join(part for part in (told, self._own_notes) if part)

        self._attempt(send)
        for name in figures[:N_MAIN]:
            if name in self._figures:
                self._draw(f"{MAIN}/{name}", self._figures.pop(name))

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """One point on the step axis of each named series."""

        def send(run: Any) -> None:
            for name in values.keys() - self._steps:
                run.define_metric(STEP, hidden=True)
                run.define_metric(name, step_metric=STEP)
                self._steps.add(name)
            run.log({**plain(values), STEP: step})

        self._attempt(send)

    def table(self, name: str, frame: pd.DataFrame) -> None:
        """The table, without its columns of words unless text may be uploaded."""

        def send(run: Any) -> None:
            shown = frame if self._upload_text else frame_without_text(frame, self._private)
            run.log({f"tables/{name}": _table(shown)})
            if STEP in shown and shown[STEP].nunique() > 1:
                self._by_step[name] = shown

        self._attempt(send)

    def figure(self, name: str, figure: Any) -> None:
        """The figure, interactive, without words unless text may be uploaded; sent once it has its place."""
        self._figures[name] = figure

    def _draw(self, key: str, figure: Any) -> None:
        def send(run: Any) -> None:
            import plotly.graph_objects as go
            import wandb

            shown: dict[str, Any] | None = unpacked(figure.to_plotly_json())
            if shown is not None and not self._upload_text:
                shown = figure_without_text(shown, self._private)
            if shown is not None:
                run.log({key: wandb.Plotly(go.Figure(shown))})

        self._attempt(send)

    def artefact(self, name: str, kind: str, artefact: Artefact) -> None:
        """The artefact with its own and its inputs' sha256."""

        def send(run: Any) -> None:
            import wandb

            record = {"sha256": artefact.sha256, "inputs": artefact.inputs}
            item = wandb.Artifact(artefact_name(name), type=kind, metadata=record)
            path = self._folder / artefact.file
            if self._upload_text or not self._holds_text(path):
                # The file is only ever replaced, never written into, so W&B needs no copy of it.
                item.add_file(str(path), policy="immutable")
            self._link(run, artefact.inputs)
            run.log_artifact(item, aliases=["latest", artefact_alias(artefact.sha256)])

        self._attempt(send)

    def finish(self, status: str, error: str | None) -> None:
        """Ends the W&B run; of an error only the kind is told, since its words may quote a prompt."""

        for name, figure in self._figures.items():
            self._draw(f"figures/{name}", figure)
        self._attempt(self._send_by_step)

        def send(run: Any) -> None:
            told = error if self._upload_text or error is None else error.split(":", 1)[0]
            run.summary.update({"status": status, "error": told})
            run.finish(exit_code=0 if status == "success" else 1)
            if self._online:
                remove_staged(self._folder)

        self._attempt(send)
        self._run = None

    def _send_by_step(self, run: Any) -> None:
        """All tables of one step are one row of the history, so that their sliders move together."""
        for name in self._by_step:
            run.define_metric(f"{BY_STEP}/{name}", step_metric=STEP)
        for step in sorted({step for frame in self._by_step.values() for step in frame[STEP]}):
            parts = {name: frame[frame[STEP] == step] for name, frame in self._by_step.items()}
            cut = {f"{BY_STEP}/{name}": _table(part) for name, part in parts.items() if len(part)}
            run.log({**cut, STEP: _cell(step)})

    def _attempt(self, send: Callable[[Any], object]) -> None:
        """Does something with the W&B run, if there is one; if that fails, there is none from then on."""
        if self._run is None:
            return
        try:
            with wandb_files_in(self._folder):
                send(self._run)
        except Exception as error:
            # W&B raises anything, from TypeError to its own; none of it may end a run.
            self._run = None
            warn_wandb(error, "the run goes on, recorded on disk only")

    def _holds_text(self, path: Path) -> bool:
        fields = read_header(path)["fields"]
        return header_has_text(fields) or fields != self._private.clean(fields)

    def _link(self, run: Any, inputs: Mapping[str, str]) -> None:
        """Links inputs in W&B's lineage; offline a stub of each is logged, which `mechlens wandb sync` links later."""
        import wandb

        for name, sha in inputs.items():
            if not sha or (name, sha) in self._linked:
                continue
            self._linked.add((name, sha))
            try:
                if self._online:
                    run.use_artifact(f"{artefact_name(name)}:{artefact_alias(sha)}")
                    continue
            except (wandb.errors.CommError, ValueError):
                pass  # never logged to this project
            # A name of its own: W&B lets no two types share one.
            stub = wandb.Artifact(stub_name(name), type="input", metadata={"sha256": sha})
            with stub.new_file("sha256.txt") as file:
                file.write(sha)
            log = run.use_artifact if self._online else run.log_artifact
            log(stub, aliases=[artefact_alias(sha)])


def artefact_name(name: str) -> str:
    """The name with nothing that W&B refuses in an artefact's name."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in name)


def stub_name(name: str) -> str:
    """Of what stands for an input that no run has logged."""
    return f"input-{artefact_name(name)}"


def artefact_alias(sha: str) -> str:
    """By which a run finds the artefact that an earlier run logged."""
    return f"sha256-{sha[:16]}"


def _table(frame: pd.DataFrame) -> Any:
    import wandb

    rows = [[_cell(cell) for cell in row] for row in frame.head(MAX_ROWS).itertuples(index=False)]
    return wandb.Table(columns=[str(column) for column in frame.columns], data=rows, allow_mixed_types=True)


def _cell(value: Any) -> Any:
    """What a W&B table can hold: a number, a text, a list of them or None."""
    try:
        return plain(value.tolist() if hasattr(value, "tolist") else value)
    except TypeError:
        return str(value)
