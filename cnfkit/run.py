"""One training run: the state that :func:`cnfkit.fit` advances, saves and resumes."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from pathlib import Path

import torch
from torch import Tensor, nn

from cnfkit import checkpoint as files
from cnfkit import distributed
from cnfkit.arguments import as_count, check_positive
from cnfkit.rows import fingerprint, require_rows, seeded, split
from cnfkit.shards import parts

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "constant": lambda share: 1.0,
}
LOOKS_ON_DEVICE = 10  # steps between looks at whether the loss is finite, where each would wait for the device
WATCHED = 64  # points that the solver's error is measured on


@dataclass
class History:
    """What a run recorded.

    Attributes:
        steps: the steps at which it did.
        train: the mean training loss since the step before; NaN where each of these steps was undone.
        validation: the validation loss, if there was a validation split.
        solver_error: that of the training's solves, see :meth:`~cnfkit.NegativeLogLikelihood.solver_error`, if there
            was a validation split and the loss has one.
        terms: the mean of each of the loss's terms since the step before, by name.
        recovered: the steps that were not finite, at each of which the run went back.
        ended: why the run did: all ``"steps"`` were taken, the ``"patience"`` was over, or ``"stop"`` said so.
        best_step: the step whose weights the model has now.

    >>> loss = NegativeLogLikelihood(Flow(Normal(1), Diagonal(1)))
    >>> history = fit(loss, torch.randn(100, 1), steps=10, records=2, progress=False)
    >>> history.steps, list(history.terms), len(history.validation)
    ([5, 10], ['nll'], 2)
    """

    steps: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    solver_error: list[float] = field(default_factory=list)
    terms: dict[str, list[float]] = field(default_factory=dict)
    recovered: list[int] = field(default_factory=list)
    ended: str = ""
    best_step: int = 0


class Run:
    """The state of a run, whole after each step.

    Attributes:
        step: how many steps were taken.
        history: what was recorded.
        whole: whether everything is of the same step, so that it can be saved.
    """

    def __init__(self, loss, data, validation, checkpoint, **settings) -> None:
        if not isinstance(loss, nn.Module) or hasattr(loss, "log_prob"):
            raise TypeError(
                f"loss is a {type(loss).__name__}; wanted a loss module, such as NegativeLogLikelihood(flow)"
            )
        data = require_rows(data, ("data", "context"))
        self.settings = require_settings(settings)
        if checkpoint is not None and not isinstance(checkpoint, str | Path):
            raise TypeError(f"checkpoint is a {type(checkpoint).__name__}; wanted a str or a pathlib.Path")
        if checkpoint is not None and Path(checkpoint).is_dir():
            raise ValueError(f"checkpoint is {str(checkpoint)!r}, a folder; wanted a file")
        self.parameters = {name: p for name, p in loss.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("loss has no parameters to train")
        self.loss, self.checkpoint, self.seed, self.steps = loss, checkpoint, settings["seed"], settings["steps"]
        self.device = next(iter(self.parameters.values())).device
        train, held_out = split(data, validation, self.seed)
        if settings["patience"] is not None and not held_out:
            raise ValueError("patience is given, but validation is 0; wanted held-out points to judge by")
        self.settings["batch"] = min(settings["batch"], len(train[0]))
        self.parts = self.settings.pop("accumulate") * distributed.processes()
        if self.parts > self.settings["batch"]:
            raise ValueError(f"batch is {self.settings['batch']}; wanted at least {self.parts}, the parts it comes in")
        if self.parts > 1:
            self.settings["parts"] = self.parts
        if checkpoint is not None:
            learnt = " ".join(self.parameters)
            self.settings["parameters"] = f"{len(self.parameters)} that are trained, {zlib.crc32(learnt.encode()):08x}"
            self.settings |= {"data": fingerprint(train), "validation": fingerprint(held_out)}
        self.train, self.held_out = ([part.detach().to(self.device) for part in rows] for rows in (train, held_out))
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=settings["lr"])
        self.history, self.step, self.best, self.rate = History(), 0, {}, 1.0
        self.average = {} if settings["ema"] is None else _copies(self.parameters)
        self.recent: dict[str, Tensor] = {}  # sums over the steps since the last record,
        self.counted = 0  # and how many these are
        self.order = (-1, torch.empty(0))
        self.before: dict[str, Tensor] = {}  # what a call of the loss changes by itself, as it was before the call
        self.whole = True
        if not loss.training:  # in eval() mode it may be another one
            loss.train()
        self.parallel = distributed.parallel(loss)
        self.failed = torch.zeros((), dtype=torch.bool, device=self.device)
        self.good = _copies(self.state())  # as of the last record
        if checkpoint is not None and parts(Path(checkpoint)):
            self.resume()

    @property
    def finished(self) -> bool:
        """Whether all steps were taken, or the patience with the validation loss is over."""
        return self.step >= self.steps or self.impatient

    @property
    def impatient(self) -> bool:
        """Whether too many records brought no better validation loss."""
        steps, patience = self.history.steps, self.settings["patience"]
        waited = len(steps) - (steps.index(self.history.best_step) + 1 if self.best else 0)
        return patience is not None and waited >= patience

    def advance(self) -> None:
        """Take one step; at the end of a part of the run, record it."""
        rate = SCHEDULES[self.settings["schedule"]](self.step / self.steps)
        rate *= min(1.0, (self.step + 1) / max(self.settings["warmup"], 1))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings["lr"] * self.rate * rate
        if self.checkpoint is not None:
            state = self.loss.state_dict().items()
            self.before = {name: value.detach().clone() for name, value in state if name not in self.parameters}
        try:
            self.update()
        except FloatingPointError as error:
            self.whole = False
            self.go_back(error)
        self.step, self.before = self.step + 1, {}
        records = self.settings["records"]
        if self.step * records // self.steps > (self.step - 1) * records // self.steps:
            self.record()
        self.whole = True

    def update(self) -> None:
        """The loss of the next batch, and what the optimiser makes of it."""
        self.optimizer.zero_grad(set_to_none=True)
        batch, values = self.next_batch(), {}
        for part in range(distributed.rank(), self.parts, distributed.processes()):
            points, *context = (rows[part :: self.parts] for rows in batch)
            share = len(points) / len(batch[0])
            with self.meanwhile(last=part + distributed.processes() >= self.parts):
                loss, terms = self.loss_of(part, points, context)
                (share * distributed.processes() * loss).backward()  # processes take the mean of theirs
            for name, value in {**terms, "loss": loss.detach()}.items():
                values[name] = share * value + values[name] if name in values else share * value
        if self.settings["clip"] is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.settings["clip"])
        self.whole = False
        self.optimizer.step()
        with torch.no_grad():
            for name, average in self.average.items():
                decay = min(self.settings["ema"], (1 + self.step) / (10 + self.step))
                average.lerp_(self.parameters[name], 1 - decay)
        for name, value in zip(values, distributed.total(as_one(values, self.device)), strict=True):
            self.recent[name] = self.recent[name] + value if name in self.recent else value
        self.counted += 1

    def meanwhile(self, last: bool) -> AbstractContextManager:
        """Where the processes keep their gradients to themselves: in all parts of a batch but the last."""
        return nullcontext() if last or distributed.processes() == 1 else self.parallel.no_sync()

    def loss_of(self, part: int, points: Tensor, context: list[Tensor]) -> tuple[Tensor, dict]:
        """The loss of a part of the batch, and its terms, once all processes found theirs finite."""
        noise = "noise" if self.parts == 1 else f"noise {part} of {self.parts}"
        with distributed.agreed():
            loss, terms = self.call(self.parallel, points, context, seeded(self.seed, noise, self.step))
            self.failed |= ~loss.detach().isfinite()
            if self.device.type == "cpu" or distributed.processes() > 1 or self.step % LOOKS_ON_DEVICE == 0:
                self.require_finite(f"the loss is {loss.item()}" if self.failed else "")
        return loss, terms

    def call(
        self, loss: nn.Module, points: Tensor, context: list[Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict]:
        return loss(points, generator=generator, **({"context": context[0]} if context else {}))

    def next_batch(self) -> list[Tensor]:
        n, batch = len(self.train[0]), self.settings["batch"]
        epoch, position = divmod(self.step, n // batch)
        if self.order[0] != epoch:
            order = torch.randperm(n, generator=seeded(self.seed, "order", epoch))
            self.order = epoch, order.to(self.device)
        rows = self.order[1][position * batch : (position + 1) * batch]
        return [part[rows] for part in self.train]

    def require_finite(self, problem: str) -> None:
        if problem:
            raise FloatingPointError(problem)

    def go_back(self, error: FloatingPointError) -> None:
        """To the state of the last record, at half the learning rate; or raise, if that was done too often."""
        rate = self.optimizer.param_groups[0]["lr"]
        what = f"step {self.step} of {self.steps} (learning rate {rate:.2g}): {error}"
        last = self.history.steps[-1] if self.history.steps else 0
        self.restore(self.good)
        if len(self.history.recovered) >= self.settings["recoveries"]:
            best = f"the model has the weights of step {self.history.best_step}, its best" if self.best else ""
            saved = f"those of step {last} are in {self.checkpoint}" if self.checkpoint and last else ""
            advice = ["try a smaller lr, or standardise the data", best, saved]
            raise FloatingPointError(f"{what}; {'; '.join(filter(None, advice))}") from error
        if distributed.rank() == 0:
            warnings.warn(
                f"{what}; back to the weights of step {last}, at half the learning rate",
                RuntimeWarning,
                stacklevel=4,
            )
        self.history.recovered.append(self.step)
        self.rate, self.recent, self.counted = self.rate / 2, {}, 0
        self.failed.zero_()

    def record(self) -> None:
        """Note the losses, keep the weights if they are the best, and save."""
        try:
            with distributed.agreed():
                finite = not self.failed and all(value.isfinite().all() for value in self.parameters.values())
                self.require_finite("" if finite else "the loss or a weight is not finite")
            judged = self.judge()
        except FloatingPointError as error:
            self.go_back(error)
            judged = self.judge()
        history, mean = self.history, {name: value.item() / self.counted for name, value in self.recent.items()}
        history.steps.append(self.step)
        history.train.append(mean.pop("loss", math.nan))
        for name in {**history.terms, **mean}:
            missed = [math.nan] * (len(history.steps) - 1)
            history.terms.setdefault(name, missed).append(mean.get(name, math.nan))
        self.recent, self.counted = {}, 0
        if self.held_out:
            validation, error = judged
            finite = [value for value in history.validation if not math.isnan(value)]
            history.validation.append(validation)
            if error is not None:
                history.solver_error.append(error)
            if validation < min(finite, default=math.inf):
                history.best_step = self.step
                with self.averaged():
                    self.best = _copies(self.loss.state_dict())
        else:
            history.best_step = self.step
        self.good = _copies(self.state())
        self.save()

    @torch.no_grad()
    def judge(self) -> tuple[float, float | None] | None:
        """The validation loss, and the error of the training's solver; None without held-out points."""
        if not self.held_out:
            return None
        total = torch.zeros((), dtype=torch.float64)
        size, n = max(self.settings["batch"], 512), len(self.held_out[0])
        batches = list(enumerate(zip(*(part.split(size) for part in self.held_out), strict=True)))
        modes = {module: module.training for module in self.loss.modules()}
        with self.averaged():
            self.loss.eval()
            try:
                with distributed.agreed():
                    for k, (points, *context) in batches[distributed.rank() :: distributed.processes()]:
                        noise = seeded(self.seed, "validation", k)
                        total += self.call(self.loss, points, context, noise)[0].item() * len(points)
                measure = getattr(self.loss, "solver_error", None)
                rows = [part[:WATCHED] for part in self.held_out]
                try:
                    error = measure(*rows, generator=seeded(self.seed, "solver", 0)) if measure else None
                except FloatingPointError:  # what is only watched ends no run
                    error = math.nan
            finally:
                for module, training in modes.items():
                    module.training = training
        return distributed.total(total).item() / n, error

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with the moving average of its weights, if there is one."""
        own = _copies({name: self.parameters[name] for name in self.average})
        try:
            self.fill(self.average)
            yield
        finally:
            self.fill(own)

    @torch.no_grad()
    def fill(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.parameters[name].copy_(value)

    def keep_best(self) -> None:
        """Give the model the weights that did best, or else the last ones."""
        if not all(value.isfinite().all() for value in self.parameters.values()):  # stopped right after a bad update
            self.restore(self.good)
        if self.best:
            self.loss.load_state_dict(self.best)
        else:  # nothing was held out, or no validation loss was finite
            self.history.best_step = self.step
            self.fill(self.average)

    def state(self) -> dict[str, Tensor]:
        """The model, the optimiser and the average, by name."""
        tensors = {f"model/{name}": value for name, value in (self.loss.state_dict() | self.before).items()}
        tensors |= {f"average/{name}": value for name, value in self.average.items()}
        for k, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{k}/{name}": value for name, value in state.items()}
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _part(tensors, "optimizer").items():
            k, key = name.split("/")
            state.setdefault(int(k), {})[key] = value.clone()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.loss.load_state_dict(_part(tensors, "model"))
        for name, value in _part(tensors, "average").items():
            self.average[name].copy_(value)

    def save(self) -> None:
        """Write the checkpoint, if there is one: all that the run needs to go on as if it had not stopped."""
        if self.checkpoint is None or distributed.rank():
            return
        tensors = self.state() | {f"recent/{name}": value for name, value in self.recent.items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        if not self.history.steps or self.history.steps[-1] != self.step:
            tensors |= {f"good/{name}": value for name, value in self.good.items()}
        about = {"step": self.step, "counted": self.counted, "rate": self.rate, "history": asdict(self.history)}
        about["recent"] = list(self.recent)  # in this order
        files.write(self.checkpoint, tensors, about | {"settings": self.settings, "model": files.describe(self.loss)})

    def resume(self) -> None:
        """Take up the run of the checkpoint."""
        tensors, about = files.read(self.checkpoint)
        if "settings" not in about:
            raise files.CheckpointError(f"{self.checkpoint} holds weights, but no training run to resume")
        same = about["model"] == files.describe(self.loss)  # else that is what is wrong
        for name, value in self.settings.items():
            if (same or name != "parameters") and (came := about["settings"].get(name)) != value:
                raise ValueError(
                    f"{self.checkpoint} is of a run with {name}={came!r}, this one has {value!r}; "
                    "use the same settings, or another file"
                )
        files.fill(self.loss, _part(tensors, "model"), about["model"], self.checkpoint)
        self.restore(tensors)
        self.step, self.counted, self.rate = about["step"], about["counted"], about["rate"]
        self.history, self.best = History(**about["history"]), _part(tensors, "best")
        recent = _part(tensors, "recent")
        self.recent = {name: recent[name].to(self.device) for name in about["recent"]}
        self.good = _part(tensors, "good") or _copies(self.state())


def as_one(values: dict[str, Tensor], device: torch.device) -> Tensor:
    """Numbers by name, as a vector."""
    return torch.stack([value.to(device) for value in values.values()])


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"the loss's state has {name}, a {type(value).__name__}; wanted tensors, to go back to")
    return {name: value.detach().clone() for name, value in tensors.items()}


def _part(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}/"): value for name, value in tensors.items() if name.startswith(f"{kind}/")}


def require_settings(settings: dict) -> dict:
    """The settings, each in its range, or an error that names the one that is not."""
    for name in ("steps", "batch", "records", "accumulate"):
        settings[name] = as_count(name, settings[name])
    for name in ("warmup", "recoveries", "seed"):
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, Integral) or (value < 0 and name != "seed"):
            wanted = "a whole number" if name == "seed" else "a whole number, 0 for none"
            raise ValueError(f"{name} is {value!r}; wanted {wanted}")
        settings[name] = int(value)
    if settings["patience"] is not None:
        settings["patience"] = as_count("patience", settings["patience"])
    if not isinstance(settings["schedule"], str) or settings["schedule"] not in SCHEDULES:
        raise ValueError(f"schedule is {settings['schedule']!r}; wanted one of {', '.join(SCHEDULES)}")
    check_positive("lr", settings["lr"])
    if settings["clip"] is not None:
        check_positive("clip", settings["clip"])
    ema = settings["ema"]
    if ema is not None and (not isinstance(ema, Real) or not 0 < ema < 1):
        raise ValueError(f"ema is {ema!r}; wanted a decay between 0 and 1, such as 0.999")
    for name in ("lr", "clip", "ema"):
        settings[name] = settings[name] if settings[name] is None else float(settings[name])
    return dict(settings)
