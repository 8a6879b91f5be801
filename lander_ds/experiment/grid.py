"""What an experiment compares: a YAML file with methods, seeds and variants around one recipe, and its cells.

A cell is one ordinary run. Every method gets the same number of learning-rate trials, short runs judged by chrF on
validation data; then it is trained with the best rate for every seed and variant, for the recipe's number of steps
and, with `equal_time`, for as many steps as fit into the time that the baseline takes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from lander_ds.common.errors import ConfigError
from lander_ds.config.document import describe, nearest, read_text
from lander_ds.config.schema.types import PathText, Positive, PositiveInt, Seed
from lander_ds.config.strict import STRICT, build
from lander_ds.config.yaml_source import parse_yaml

EVERYTHING = "all"
"""Name of the only variant where an experiment has none."""

Settings = dict[str, Any]
"""Keys of the recipe (`train.lora.r`) -> values."""


@dataclass(frozen=True, config=STRICT)
class Method:
    """One row of the table."""

    set: Settings = field(default_factory=dict)
    """What this method changes in the recipe."""
    rate_keys: tuple[str, ...] = ()
    """Keys that get the learning rate, e.g. `train.lr.lora`."""
    rates: tuple[Positive, ...] = ()
    """Learning rates to try; as many for every method."""
    tuned_as: str | None = None
    """Take the learning rate that was chosen for this other method instead, as controls do."""
    trained: bool = True
    """Whether there is anything to train; the untouched base has one cell per variant."""
    equal_time: bool = True
    """Whether it is also trained for as long as the baseline takes."""


@dataclass(frozen=True, config=STRICT)
class Tuning:
    """How learning rates are chosen."""

    steps: PositiveInt
    """Steps of a trial."""
    sentences: PositiveInt = 50
    """Validation sentences per pair that a trial translates."""
    seed: Seed = 0
    """Seed of all trials; not one of `seeds`."""


@dataclass(frozen=True, config=STRICT)
class Experiment:
    """A grid of runs over one data plan, one detection and one cache."""

    recipe: PathText
    """What all cells have in common; a path that is not absolute counts from the current directory, as everywhere."""
    run_dir: PathText
    """Where cells are run. It is not needed any more once they are finished."""
    methods: dict[str, Method]
    """The rows, by name."""
    baseline: str
    """The method that all others are compared with."""
    results: PathText | None = None
    """Where figures and translations of finished cells are kept, which says what is finished. Default: RUN_DIR/results."""
    set: Settings = field(default_factory=dict)
    """What all cells change in the recipe."""
    seeds: tuple[Seed, ...] = (1,)
    """Every method is trained once per seed. The data plan does not depend on it."""
    variants: dict[str, Settings] = field(default_factory=dict)
    """Another axis: data sizes, bases or sets of pairs, each with its own data plan and detection."""
    tuning: Tuning | None = None
    """Learning-rate trials; without it every method keeps the rates of its settings."""
    equal_time: bool = False
    """Also compare at equal training time: every method gets the time that the baseline needs for its steps."""
    clock: Literal["wall", "processor"] = "wall"
    """What a step's time is; `processor` (of all ranks) where cells share processors with something else."""
    launch: str = "lander"
    """Command that a stage's name and options are appended to. `{slot}` and `{port}` are filled in, e.g.
    `deepspeed --include localhost:{slot} --master_port {port} --module lander_ds`."""

    def cell_settings(self, variant: str) -> Settings:
        """What the cells of a variant change in the recipe, their methods' settings excluded."""
        return {**self.set, **self.variants.get(variant, {})}

    @property
    def variant_names(self) -> tuple[str, ...]:
        """At least one."""
        return tuple(self.variants) or (EVERYTHING,)


Kind = Literal["trial", "steps", "time"]


@plain_dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    kind: Kind
    """A learning-rate trial, or a comparison at equal steps or equal time."""
    method: str
    variant: str
    seed: int
    rate: float | None
    """Learning rate; None where the method's settings say it."""
    steps: int | None
    """Optimizer steps; None: those of the recipe."""

    @property
    def name(self) -> str:
        """Unique, and good as a directory."""
        if self.kind == "trial":
            return f"trials/{self.variant}/{self.method}/{self.rate:g}"
        return f"{self.kind}/{self.variant}/{self.method}/seed-{self.seed}"


def load_experiment(path: Path) -> Experiment:
    """Read an experiment.

    Raises:
        ConfigError: it cannot be read, or does not make sense; with file and line.
    """
    document = parse_yaml(read_text(path, "the experiment"), str(path))
    if not isinstance(document.value, dict):
        raise ConfigError(
            f"{path}: an experiment is a mapping of keys, found {describe(document.value)}; "
            "experiments/tiny.yaml shows what one holds"
        )
    experiment = build(Experiment, document)
    for key, message in _problems(experiment):
        raise ConfigError(f"{document.origin(key)}: {'.'.join(key)}: {message}")
    return experiment


def _problems(experiment: Experiment) -> Iterator[tuple[tuple[str, ...], str]]:
    """Key paths and what is wrong there."""
    methods = experiment.methods
    if experiment.baseline not in methods:
        yield ("baseline",), _unknown(experiment.baseline, methods)
    if len(set(experiment.seeds)) != len(experiment.seeds) or not experiment.seeds:
        yield ("seeds",), "needs at least one seed, and every seed once"
    counts = {len(method.rates) for method in methods.values() if method.trained and method.tuned_as is None}
    for name, method in methods.items():
        here = ("methods", name)
        if "/" in name or name.startswith("."):
            yield here, "a method's name becomes a directory; use letters, digits and hyphens"
        if method.tuned_as is None and bool(method.rates) != bool(method.rate_keys):
            yield here, "rates and rate_keys belong together: give both or neither"
        if method.tuned_as is not None:
            if method.tuned_as not in methods or not methods[method.tuned_as].rates:
                yield (*here, "tuned_as"), f"{method.tuned_as} is no method with rates of its own"
            if method.rates or not method.rate_keys:
                yield (*here, "tuned_as"), "needs rate_keys, and no rates of its own"
        if method.rates and experiment.tuning is None:
            yield (*here, "rates"), "are only tried with tuning: add tuning: {steps: N}"
    if experiment.tuning is not None and len(counts) > 1:
        yield (
            ("methods",),
            f"methods have {' and '.join(map(str, sorted(counts)))} rates to try; "
            "give all of them as many, or the comparison is not fair",
        )


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    near = nearest(name, known)
    return f"there is no method {name}; did you mean {near}?" if near else f"use one of {', '.join(known)}"


def trials(experiment: Experiment) -> list[Cell]:
    """Every learning-rate trial."""
    tuning = experiment.tuning
    if tuning is None:
        return []
    return [
        Cell("trial", name, variant, tuning.seed, rate, tuning.steps)
        for variant in experiment.variant_names
        for name, method in experiment.methods.items()
        for rate in method.rates
    ]


def cells(experiment: Experiment, kind: Kind, rates: Mapping[tuple[str, str], float | None]) -> list[Cell]:
    """The cells of a comparison, seed by seed, so that a first whole table is there early.

    Args:
        experiment: the experiment.
        kind: `steps` or `time`; the number of steps of a `time` cell is not known here.
        rates: (method, variant) -> chosen learning rate.
    """
    chosen: list[Cell] = []
    for number, seed in enumerate(experiment.seeds):
        for variant in experiment.variant_names:
            for name, method in experiment.methods.items():
                once = method.trained or (number == 0 and kind == "steps")
                if once and (kind == "steps" or (method.equal_time and name != experiment.baseline)):
                    chosen.append(Cell(kind, name, variant, seed, rates.get((name, variant)), None))
    return chosen


def overrides(experiment: Experiment, cell: Cell, directory: Path, cache: Path) -> list[str]:
    """The `--set` options of a cell's run.

    Args:
        experiment: it belongs to.
        cell: the cell.
        directory: its run directory.
        cache: where prepared data lies, for all cells.
    """
    method = experiment.methods[cell.method]
    settings: Settings = {
        "data.cache_dir": str(cache),
        **experiment.cell_settings(cell.variant),
        **method.set,
        **({} if cell.rate is None else dict.fromkeys(method.rate_keys, cell.rate)),
        "run_dir": str(directory),
        "seed": cell.seed,
    }
    settings.setdefault("data.seed", experiment.seeds[0])
    if method.trained:
        settings.setdefault("translate.systems", ["trained"])
    if cell.steps is not None:
        settings["train.steps"] = cell.steps
    if cell.kind == "trial":
        assert experiment.tuning is not None
        settings |= {
            "translate.split": "valid",
            "translate.limit": experiment.tuning.sentences,
            "evaluate": {},
        }
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
