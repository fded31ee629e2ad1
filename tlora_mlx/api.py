"""The commands as Python functions, as a notebook calls them: options as keywords.

Each takes its command's options by their names in YAML, or a configuration that has them; what is
wrong with them is a ``UserError``. With keywords, progress is printed unless ``quiet``; with a
configuration nothing is, unless an ``observer`` is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from tlora_mlx.config.check_options import CheckCommand
from tlora_mlx.config.export_options import ExportCommand
from tlora_mlx.config.option import Config
from tlora_mlx.config.parsing import from_keywords
from tlora_mlx.config.training_options import PlanCommand, TrainConfig
from tlora_mlx.config.usage_options import EvaluateCommand, ReportCommand
from tlora_mlx.evaluation import evaluate as evaluation
from tlora_mlx.evaluation.evaluate import EvaluationResult
from tlora_mlx.observer import SILENT, Advance, Observer
from tlora_mlx.publishing import export as exporting
from tlora_mlx.publishing.export import ExportResult
from tlora_mlx.reporting import report as reporting
from tlora_mlx.reporting.notebook import DrawnPlan, drawn
from tlora_mlx.runs.run_directory import with_stored_options
from tlora_mlx.terminal import Terminal
from tlora_mlx.training import data_check, planning, session
from tlora_mlx.training.data_check import DataCheck
from tlora_mlx.training.session import TrainingResult

C = TypeVar("C", bound=Config)
F = TypeVar("F", bound=Callable[..., Any])
OnReport = Callable[[Mapping[str, Any]], object]


def _with_options_of(config_class: type[Config]) -> Callable[[F], F]:
    """Show a command's options in a function's signature, for completion, and in its help."""

    def decorate(function: F) -> F:
        own = inspect.signature(function)
        kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [
            inspect.Parameter(
                item.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if item.default is MISSING else item.default,
                annotation=item.type,
            )
            for item in fields(config_class)
        ]
        function.__signature__ = own.replace(parameters=[*kept, *options])  # type: ignore
        told = "\n".join(
            f"    {item.name}: {item.metadata['help']}" for item in fields(config_class)
        )
        before, returns, after = (inspect.getdoc(function) or "").partition("\n\nReturns:")
        function.options = config_class  # type: ignore[attr-defined]
        function.__doc__ = f"{before}\n{told}{returns}{after}"
        return function

    return decorate


class _Reporting(Observer):
    """Passes everything on, and each report to a function too."""

    def __init__(self, observer: Observer, on_report: OnReport):
        self._observer, self._on_report = observer, on_report

    def note(self, text: str) -> None:
        """Pass it on."""
        self._observer.note(text)

    def planned(self, plan: Any) -> None:
        """Pass it on."""
        self._observer.planned(plan)

    def reported(self, metrics: Mapping[str, Any]) -> None:
        """Pass it on, and call the function."""
        self._observer.reported(metrics)
        self._on_report(dict(metrics))

    def stage(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        """Pass it on."""
        return self._observer.stage(name, total, done)


def _observer(
    config: Config | None, observer: Observer | None, quiet: bool, on_report: OnReport | None = None
) -> Observer:
    found = observer or (SILENT if quiet or config is not None else Terminal())
    return _Reporting(found, on_report) if on_report else found


@_with_options_of(TrainConfig)
def train(
    config: TrainConfig | None = None,
    observer: Observer | None = None,
    *,
    quiet: bool = False,
    on_report: OnReport | None = None,
    **options: Any,
) -> TrainingResult:
    """Train an adapter; under ``mlx.launch``, together with the other processes.

    Args:
        config: the options, instead of keywords.
        observer: notified of the progress, instead of printing it.
        quiet: print nothing.
        on_report: called with each line of ``metrics.jsonl``, a dict, as it is written.

    Returns:
        The run directory and the figures of the run; a notebook shows losses and rank plan.

    Raises:
        UserError: the options, the model or the data are invalid.
        RunError: it failed while running.
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived; everything was saved.
    """
    given = config or from_keywords(TrainConfig, options, with_stored_options)
    return session.train(given, _observer(config, observer, quiet, on_report))


@_with_options_of(PlanCommand)
def plan(
    config: PlanCommand | None = None,
    observer: Observer | None = None,
    *,
    quiet: bool = False,
    **options: Any,
) -> DrawnPlan:
    """Calibrate and allocate, or reallocate from an earlier plan; nothing is written.

    Args:
        config: the options, instead of keywords.
        observer: notified of the progress, instead of printing it.
        quiet: print nothing.

    Returns:
        Ranks and scales of all target modules; a notebook shows them as heat maps.

    Raises:
        UserError: the options, the model or the data are invalid.
        RunError: it failed while running.
    """
    given = config or from_keywords(PlanCommand, options)
    return drawn(planning.plan(given, _observer(config, observer, quiet)))


@_with_options_of(CheckCommand)
def check(config: CheckCommand | None = None, **options: Any) -> DataCheck:
    """Read and tokenize the data as training would; write the samples if ``json`` is given.

    Args:
        config: the options, instead of keywords.

    Returns:
        Figures, warnings, and the first samples.

    Raises:
        UserError: the model has no tokenizer, there is no such data, or rows of it are not right.
        RunError: the samples cannot be written.
    """
    return data_check.check(config or from_keywords(CheckCommand, options))


@_with_options_of(ExportCommand)
def export(
    config: ExportCommand | None = None,
    observer: Observer | None = None,
    *,
    quiet: bool = False,
    **options: Any,
) -> ExportResult:
    """Export a run, another tool's adapter, or several combined, without pushing.

    Args:
        config: the options, instead of keywords.
        observer: notified of the progress, instead of printing it.
        quiet: print nothing.

    Returns:
        The directory, the result of reading it back, and how to load it.

    Raises:
        UserError: the adapter, the options or the output directory are invalid, or it could not be
            pushed to ``push_to``.
        RunError: writing failed, or what was read back differs.
    """
    given = config or from_keywords(ExportCommand, options)
    return exporting.export(given, _observer(config, observer, quiet))


@_with_options_of(EvaluateCommand)
def evaluate(
    config: EvaluateCommand | None = None,
    observer: Observer | None = None,
    *,
    quiet: bool = False,
    **options: Any,
) -> EvaluationResult:
    """Compare base model and adapter on a task, and write all answers.

    Args:
        config: the options, instead of keywords.
        observer: notified of the progress, instead of printing it.
        quiet: print nothing.

    Returns:
        The metrics of both, and the directory with every answer.

    Raises:
        UserError: the run, the options or the rows are invalid.
        RunError: it failed while running.
    """
    given = config or from_keywords(EvaluateCommand, options)
    return evaluation.evaluate(given, _observer(config, observer, quiet))


@_with_options_of(ReportCommand)
def report(
    config: ReportCommand | None = None,
    observer: Observer | None = None,
    *,
    quiet: bool = False,
    **options: Any,
) -> Path:
    """Write a run as one HTML page.

    Args:
        config: the options, instead of keywords.
        observer: notified as samples are generated, instead of printing it.
        quiet: print nothing.

    Returns:
        The page.

    Raises:
        UserError: the run is incomplete, or samples are requested but its data is gone.
    """
    given = config or from_keywords(ReportCommand, options)
    return reporting.report(given, _observer(config, observer, quiet))
