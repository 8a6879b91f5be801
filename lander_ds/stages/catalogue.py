"""What is known about the stages without importing one: the command line and the launchers read it here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Description:
    """A stage as seen from outside; `lander_ds/stages/NAME.py` does its work."""

    name: str
    summary: str
    """What it reads and writes."""
    example: str
    """Flags that its help shows, beside --recipe."""
    collective: bool = False
    """All ranks work on it, in a process group of the compute device. Else rank 0 works and the others wait."""
    resumes: bool = False
    """It knows --auto-resume; other stages begin again, or go on by themselves."""
    up_to_train: bool = False
    """A training rests on it: of all such stages only one may run at a time in a run directory, because what a training
    reads must not be made anew beneath it."""

    @property
    def lock(self) -> str:
        """Name of the lock that it holds while it runs: two with the same one wait for each other."""
        return "train" if self.up_to_train else self.name


STAGES: dict[str, Description] = {
    stage.name: stage
    for stage in (
        Description(
            "prepare",
            "corpora -> checked, filtered and tokenised sentence pairs",
            "--set data.workers=8",
            up_to_train=True,
        ),
        Description(
            "detect",
            "base model + sentence pairs -> awareness.safetensors",
            "--set detect.examples=64",
            collective=True,
            up_to_train=True,
        ),
        Description(
            "select",
            "awareness -> selection.safetensors: layers and banks",
            "--set select.banks.rho=0.7",
            up_to_train=True,
        ),
        Description(
            "train",
            "base model + selection + sentence pairs -> checkpoints/",
            "--set train.steps=500 --set train.lr.general=1e-4",
            collective=True,
            resumes=True,
            up_to_train=True,
        ),
        Description(
            "translate",
            "models + test sentences -> translations/",
            "--set translate.beams=4",
            collective=True,
        ),
        Description(
            "score",
            "translations -> scores.json: BLEU, chrF, TER, significance",
            "--set score.ter=false",
        ),
        Description(
            "export",
            "checkpoint -> Hugging Face directories under export/",
            "--set 'export.formats=[dense]'",
        ),
        Description("report", "everything -> report.html", "--force"),
    )
}
"""By name, in the order in which `all` runs them."""

ALL = "all"


def names(command: str) -> tuple[str, ...]:
    """The stages that `lander COMMAND` runs; none for a command that is not a stage."""
    return tuple(name for name in STAGES if command in (name, ALL))


def is_collective(command: str) -> bool:
    """Whether `lander COMMAND` needs a process group of the compute device."""
    return any(STAGES[name].collective for name in names(command))


def resumes(command: str) -> bool:
    """Whether `lander COMMAND` knows --auto-resume."""
    return any(STAGES[name].resumes for name in names(command))
