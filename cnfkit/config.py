"""The configuration of a run: a small TOML file that says which data, which model, which loss, how long."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cnfkit import data as sets
from cnfkit.bijections.affine import Standardize
from cnfkit.bijections.base import Chain
from cnfkit.bijections.glow import ActNorm
from cnfkit.data.toy import DENSITIES
from cnfkit.dequantise import Dequantised, UniformDequantiser
from cnfkit.flow import Flow
from cnfkit.flow_matching import FlowMatching
from cnfkit.grids import FrozenGrid, JitteredGrid, uniform_grid
from cnfkit.losses import NegativeLogLikelihood
from cnfkit.ode.cnf import CNF
from cnfkit.ode.solve import Solve
from cnfkit.presets import PRESETS, preset
from cnfkit.run import require_settings
from cnfkit.training import fit

FOLDER = Path(__file__).with_name("configs")
IMAGES = {name: getattr(sets, name) for name in ("digits", "mnist", "fashion_mnist", "cifar10")}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the entry, and what is wanted."""


@dataclass(frozen=True)
class Points:
    """What a run is about.

    Attributes:
        train: what is trained on, shape ``(n, *event_shape)``.
        validation: held-out points, or the fraction of ``train`` that becomes them.
        test: for the last measurement.
        levels: of a discrete variable, the number of its values; None of a continuous one.
        entropy: in nats, where the truth is known.
    """

    train: Tensor
    validation: Tensor | float
    test: Tensor
    levels: int | None = None
    entropy: float | None = None


@dataclass(frozen=True)
class Config:
    """A configuration that was read: its sections, each a table of plain values.

    Attributes:
        source: the file that it was read from, for messages.
        data: ``name``, a toy density, a set of images or a table, and for toys the number of ``points``; or ``file``, a
            file of points, one a row, ``.npy`` or ``.csv``, which the model standardises itself.
        model: ``name``, one of the presets, and options of it.
        loss: ``kind``, ``"likelihood"`` or ``"flow_matching"``; for the first ``penalties``, and of models with a CNF
            the ``grid`` of the training's solves, ``"frozen"``, ``"uniform"``, ``"jittered"`` or ``"adaptive"``, with
            options of it and of :class:`cnfkit.Solve`.
        training: options of :func:`cnfkit.fit`.
        evaluation: options of :class:`cnfkit.Solve`, for all that is measured; or ``method`` and ``steps`` of a grid.

    An entry may be a table by the names of data, such as ``alpha = { mnist = 1e-5, cifar10 = 0.05 }``.
    """

    source: str
    data: dict
    model: dict
    loss: dict
    training: dict
    evaluation: dict

    @classmethod
    def read(cls, path: Path) -> Config:
        """The configuration in a file; raises as :meth:`of`, and an ``OSError`` if it cannot be read."""
        return cls.of(_text(path), path.name)

    @classmethod
    def of(cls, text: str, source: str) -> Config:
        """The configuration in a TOML text.

        Raises:
            ConfigError: if it is no TOML, or an entry is missing, unknown, or a table where none is wanted.
        """
        try:
            content = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{source} is no TOML file: {error}") from None
        return cls.from_dict(content, source)

    @classmethod
    def from_dict(cls, content: dict, source: str) -> Config:
        """The configuration of a table of sections, as :meth:`as_dict` gives it; raises as :meth:`of`."""
        sections = {section.name: {} for section in fields(cls) if section.name != "source"}
        _require_known(source, "a section", content, sections)
        for name, section in content.items():
            if not isinstance(section, dict):
                raise ConfigError(f"{source}: {name} is {section!r}; wanted a section, [{name}]")
            sections[name] = {entry: _of_data(value, content.get("data", {})) for entry, value in section.items()}
        config = cls(source, **sections)
        _require_known(source, "[data]", config.data, ("name", "file", "points"))
        _require_known(source, "[training]", config.training, _options(fit) - OURS)
        _require_known(source, "[evaluation]", config.evaluation, SOLVE | {"steps"})
        if "steps" not in config.training:
            raise ConfigError(f"{source}: [training] has no steps; wanted their number")
        config.call("training", require_settings, FIT | config.training)
        name = config.choice("model", "name", PRESETS)
        _require_known(source, f"[model] of the name {name!r}", config.model, {"name"} | _options(PRESETS[name]))
        return config

    def as_dict(self) -> dict:
        """The sections, as JSON can hold them."""
        return {section.name: getattr(self, section.name) for section in fields(self) if section.name != "source"}

    def choice(self, section: str, entry: str, known: Iterable[str], default: str | None = None) -> str:
        """An entry that must be one of some names."""
        value = getattr(self, section).get(entry, default)
        if value not in list(known):
            came = "missing" if value is None else repr(value)
            raise ConfigError(f"{self.source}: [{section}] {entry} is {came}; wanted one of {', '.join(known)}")
        return value

    def points(self) -> Points:
        """The data, drawn or loaded.

        Raises:
            ConfigError: if there are none of that name, or the file does not hold points.
            OSError, ValueError: as the function that loads them.
        """
        if ("name" in self.data) == ("file" in self.data):
            raise ConfigError(f"{self.source}: [data] has {list(self.data)}; wanted a name or a file, one of the two")
        if "file" in self.data:
            return _from_file(self.source, self.data["file"])
        name = self.choice("data", "name", [*DENSITIES, *IMAGES, *sets.TABLES])
        if name in DENSITIES:
            n, truth = self.data.get("points", 20_000), sets.toy_density(name)
            if isinstance(n, bool) or not isinstance(n, int) or n < 10:
                raise ConfigError(f"{self.source}: [data] points is {n!r}; wanted a whole number of at least 10")
            sizes = {0: n, 1: min(n, 2000), 2: 5000}
            parts = [truth.sample(size, torch.Generator().manual_seed(seed)) for seed, size in sizes.items()]
            return Points(*parts, entropy=truth.entropy())
        if "points" in self.data:
            raise ConfigError(f"{self.source}: [data] has points, but {name} is not drawn; leave them out")
        if name in IMAGES:
            images = IMAGES[name]()
            return Points(images.train, 0.1, images.test, levels=images.levels)
        table = sets.table(name)
        return Points(table.train, table.validation, table.test)

    def built(self, points: Points) -> Flow | Dequantised:
        """The model for the data, with weights that are a function of the seed, and of the data for some layers."""
        model = self.shaped(points.train.shape[1:], points.levels)
        first = points.train
        if isinstance(model, Dequantised):
            flow, first = model.flow, model.dequantiser(first[:1000], torch.Generator().manual_seed(0))[0]
        else:
            flow = model
        if self.own:  # in its own units, whatever they are
            flow.bijection[0].load_state_dict(Standardize.of(first).state_dict())
        if any(isinstance(layer, ActNorm) for layer in flow.modules()):
            flow.initialize(first[:1000])
        return model

    def shaped(self, event_shape: Sequence[int], levels: int | None) -> Flow | Dequantised:
        """The model for points of a shape, whole numbers if they have levels, before it has seen any."""
        options = {name: value for name, value in self.model.items() if name != "name"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.training.get("seed", 0))
            flow = self.call("model", preset, self.model["name"], tuple(event_shape), **options)
        if self.own:
            standardize = Standardize(torch.zeros(*event_shape), torch.ones(*event_shape))
            flow = Flow(flow.base, Chain(standardize, flow.bijection))
        return flow if levels is None else Dequantised(flow, UniformDequantiser(levels))

    @property
    def own(self) -> bool:
        """Whether the data are a file of one's own, of any scale."""
        return "file" in self.data

    def loss_of(self, model: Flow | Dequantised) -> nn.Module:
        """The loss that trains the model."""
        kind = self.choice("loss", "kind", ("likelihood", "flow_matching"), "likelihood")
        options = {name: value for name, value in self.loss.items() if name != "kind"}
        if kind == "flow_matching":
            _require_known(self.source, "[loss] of the kind 'flow_matching'", options, ("pairing", "pairing_batch"))
            return self.call("loss", FlowMatching, model, **options)
        own = {"unit": options.pop("unit", "bits" if isinstance(model, Dequantised) else "nats")}
        own |= {"penalties": options.pop("penalties", {}), "evaluation": self.solve()}
        if any(isinstance(part, CNF) for part in model.modules()):
            name = self.choice("loss", "grid", GRIDS, "frozen")
            options.pop("grid", None)
            make = GRIDS[name]
            known = SOLVE | (_options(make) - {"options"}) if name != "adaptive" else SOLVE
            _require_known(self.source, f"[loss] with the grid {name!r}", options, known)
            if name in ("uniform", "jittered") and "steps" not in options:
                raise ConfigError(f"{self.source}: [loss] with the grid {name!r} has no steps; wanted their number")
            own["solve"] = self.call("loss", make, **options)
        else:
            _require_known(self.source, "[loss] of a model without a CNF", options, ("trace", "probes", "noise"))
            own["solve"] = self.call("loss", Solve, **options)
        return self.call("loss", NegativeLogLikelihood, model, **own)

    def solve(self) -> Solve:
        """How everything is measured."""
        return self.call("evaluation", _uniform if "steps" in self.evaluation else Solve, **self.evaluation)

    def call(self, section: str, make: Callable, *arguments, **options):
        """What a section describes; what is wrong with it is said with the section's name."""
        try:
            return make(*arguments, **options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.source}: [{section}]: {error}") from None


def _of_data(value, data: dict):
    """An entry that is a table by the name of the data is what that says."""
    by_data = isinstance(value, dict) and isinstance(data, dict) and data.get("name") in value
    return value[data["name"]] if by_data else value


def find_config(name: str | Path) -> tuple[str, str]:
    """A configuration by its path, or one that comes with cnfkit by its name: its name, and its text.

    Raises:
        ConfigError: if there is none.
    """
    path, plain = Path(name), str(name).replace("-", "_")
    if path.suffix == ".toml" and path.is_file():
        return path.stem, _text(path)
    if plain in own_configs():
        return plain, _text(FOLDER / f"{plain}.toml")
    for data in IMAGES:
        kind = plain.removeprefix(f"{data}_")
        if kind != plain and kind in image_models():
            return plain, f'[data]\nname = "{data}"\n\n' + _text(FOLDER / "images" / f"{kind}.toml")
    absent = ", which is not there" if path.suffix == ".toml" else ""
    raise ConfigError(f"CONFIG is {str(name)!r}{absent}; wanted a TOML file, or {known_configs()}")


def own_configs() -> list[str]:
    """The names of the configurations that come with cnfkit."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def image_models() -> list[str]:
    """The models that come with cnfkit for all sets of images."""
    return sorted(path.stem for path in (FOLDER / "images").glob("*.toml"))


def known_configs() -> str:
    """What may be asked for by name, in words."""
    data, models = (", ".join(names) for names in (IMAGES, image_models()))
    return f"one of {', '.join(own_configs())}, or DATA-MODEL with data {data} and model {models}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no TOML file: {error}") from None


def _uniform(steps: int, method: str = "rk4", **options) -> Solve:
    return Solve(method=method, times=uniform_grid(steps), **options)


GRIDS: dict[str, Callable] = {"frozen": FrozenGrid, "uniform": _uniform, "jittered": JitteredGrid, "adaptive": Solve}


def _options(call: Callable) -> set[str]:
    """The names of a callable's arguments that a configuration may give."""
    return set(inspect.signature(call).parameters) - {"event_shape", "context", "generator", "energies", "times"}


SOLVE = _options(Solve)
FIT = {name: option.default for name, option in inspect.signature(fit).parameters.items()}
# arguments of fit that the commands give themselves
OURS = {"loss", "data", "context", "validation", "checkpoint", "report", "stop", "progress"}


def _require_known(source: str, what: str, came: Iterable[str], known: Iterable[str]) -> None:
    for name in came:
        if name not in known:
            raise ConfigError(f"{source}: {what} has {name!r}; wanted {', '.join(sorted(known))}")


def _from_file(source: str, name: str) -> Points:
    """Points of one's own: a tenth for validation, a tenth for the test, of a split that is fixed."""
    path = Path(str(name))
    if path.suffix not in (".npy", ".csv"):
        raise ConfigError(f"{source}: [data] file is {name!r}; wanted points in a .npy or .csv file")
    if not path.is_file():
        raise ConfigError(f"{source}: [data] file is {name!r}, which is not there (seen from {Path.cwd().name}/)")
    try:
        if path.suffix == ".npy":
            rows = np.load(path, allow_pickle=False)
        else:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            if not lines:
                raise ValueError("it is empty")
            named = not any(map(_is_number, lines[0].split(",")))
            rows = np.loadtxt(lines[named:], delimiter=",", ndmin=2)
        x = torch.from_numpy(rows.astype(np.float32))
    except (ValueError, OSError, TypeError) as error:
        raise ConfigError(f"{source}: [data] file {name!r} does not hold points: {error}") from None
    if x.dim() != 2 or len(x) < 20 or not x.isfinite().all():
        raise ConfigError(
            f"{source}: [data] file {name!r} holds numbers of shape {tuple(x.shape)}, {int((~x.isfinite()).sum())} of "
            "them not finite; wanted at least 20 rows of finite numbers, a point each"
        )
    held_out = len(x) // 10
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return Points(x[2 * held_out :], x[:held_out], x[held_out : 2 * held_out])


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
