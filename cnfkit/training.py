"""Fitting a flow: one loop with a progress bar, a validation split, and checkpoints to resume from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from tqdm.auto import tqdm

from cnfkit import settings
from cnfkit.distributed import any_of, rank
from cnfkit.run import History, Run


def fit(
    loss: nn.Module,
    data: Tensor,
    *,
    steps: int,
    batch: int = 128,
    lr: float = 1e-3,
    context: Tensor | None = None,
    validation: float | Tensor | tuple[Tensor, Tensor] = 0.1,
    schedule: str = "cosine",
    warmup: int = 0,
    clip: float | None = None,
    ema: float | None = None,
    patience: int | None = None,
    recoveries: int = 3,
    accumulate: int = 1,
    records: int = 20,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    report: Callable[[History], None] | None = None,
    stop: Callable[[], bool] | None = None,
    progress: bool | None = None,
) -> History:
    r"""Train a loss module with Adam, the learning rate falling along a cosine.

    .. math::

        \eta_k = \eta_0 \min\bigl(1, \tfrac{k+1}{w}\bigr) \cdot \tfrac12 \bigl( 1 + \cos(\pi k / K) \bigr),

        \bar\theta_{k+1} = \bar\theta_k + (1 - \beta_k) (\theta_{k+1} - \bar\theta_k),

        \beta_k = \min\bigl(\beta, \tfrac{1+k}{10+k}\bigr)

    The order of the data, and all noise that comes from the generator which the loss is called with, are functions of
    the seed and the step: on the CPU, a run that was interrupted, or killed, and resumed ends in the same weights as
    one that was not. With a validation split, the model ends with the weights that did best on it. A loss in ``eval()``
    mode is put into training mode first.

    Where ``torchrun`` started several processes, and they have joined as ``python -m cnfkit train`` has them do, each
    takes its share of every batch, and the first writes the files. ``P`` processes with ``accumulate=a`` take the steps
    that one takes with ``accumulate=a * P``, up to rounding.

    A loss that is not finite, or a solve that fails, sends the run back to the weights of the last record, and on with
    the next batches at half the learning rate; a warning says so.

    Args:
        loss: a module whose call takes a batch, a generator and perhaps a context, and returns the loss and its terms.
        data: points, shape ``(n, *event_shape)``; moved to the loss's device.
        steps: :math:`K`, the number of steps.
        batch: points per step; the last incomplete batch of an epoch is left out.
        lr: :math:`\eta_0`.
        context: what the points are conditioned on, shape ``(n, features)``.
        validation: the fraction of ``data`` held out, or held-out points, or a pair of these and their contexts; 0 for
            none.
        schedule: ``"cosine"``, or ``"constant"`` for a learning rate that does not fall.
        warmup: :math:`w`, the steps over which the learning rate rises; 0 for none.
        clip: the largest norm of the gradient; longer ones are shortened to it.
        ema: :math:`\beta`, the decay of a moving average of the weights, such as 0.999; it is then this average
            :math:`\bar\theta` that is validated, and that the model ends with.
        patience: how many records without a better validation loss end the run early; none unless given.
        recoveries: how often the run may go back before it gives up.
        accumulate: the parts that a batch is taken in, one after the other, to save memory.
        records: how often, in equal parts of the run, the losses are recorded, and the checkpoint is written.
        seed: of the split, the order and the noise.
        checkpoint: a file to resume from, if it is there, and to save to: at each record, and when stopped or
            interrupted (unless in the middle of an update; then the last record stands). The model of an interrupted
            run has the weights of its last step.
        report: called with the history after each record; in several processes, in the first.
        stop: asked after each step; when it says True, the run is saved, and ends as if it were finished.
        progress: whether to show a bar; by default in a terminal or notebook, unless ``CNFKIT_PROGRESS=0``.

    Returns:
        The :class:`History`.

    Raises:
        TypeError: if ``loss`` is no loss module, or the data are no tensor.
        ValueError: if an argument is out of range, the data are empty or hold NaN, or the checkpoint is a folder, or of
            a run with other settings.
        CheckpointError: if the checkpoint is damaged or of another model.
        FloatingPointError: if the loss is not finite once more than ``recoveries`` times; it says at which step, and
            what to try. The model has the weights that did best so far.

    >>> flow = Flow(Normal(1), Diagonal(1))
    >>> points = 3 + 2 * torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    >>> history = fit(NegativeLogLikelihood(flow), points, steps=200, lr=0.1, progress=False)
    >>> bool((flow.sample(1000).mean() - 3).abs() < 0.5)
    True
    """
    for name, value in (("report", report), ("stop", stop)):
        if value is not None and not callable(value):
            raise TypeError(f"{name} is a {type(value).__name__}; wanted a function")
    run = Run(
        loss,
        data if context is None else (data, context),
        validation,
        checkpoint,
        steps=steps,
        batch=batch,
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        clip=clip,
        ema=ema,
        patience=patience,
        recoveries=recoveries,
        accumulate=accumulate,
        records=records,
        seed=seed,
    )
    shown = (progress if progress is not None else settings.progress()) and rank() == 0
    with tqdm(total=steps, initial=run.step, disable=not shown, leave=False, unit="step") as bar:
        try:
            while not run.finished:
                run.advance()
                bar.update()
                if run.history.steps and run.history.steps[-1] == run.step:
                    bar.set_postfix_str(_summary(run.history), refresh=False)
                    if report is not None and rank() == 0:
                        report(run.history)
                if not run.finished and any_of(stop is not None and stop()):
                    run.save()
                    run.history.ended = "stop"
                    break
        except KeyboardInterrupt:
            if run.whole:
                run.save()
            raise
        except FloatingPointError:
            run.keep_best()
            raise
    run.keep_best()
    run.history.ended = run.history.ended or ("patience" if run.step < steps else "steps")
    return run.history


def _summary(history: History) -> str:
    """The last record in a few words, for the bar."""
    parts = [f"loss {(history.validation or history.train)[-1]:.4g}"]
    if history.solver_error:
        parts.append(f"solver error {history.solver_error[-1]:.1e}")
    if "evaluations" in history.terms:
        parts.append(f"{history.terms['evaluations'][-1]:.0f} evaluations")
    if history.recovered:
        parts.append(f"went back {len(history.recovered)} times")
    return ", ".join(parts)
