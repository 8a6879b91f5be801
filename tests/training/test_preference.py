"""`train.objective: cpo` against its formula and on other numbers of ranks; `train.start_from`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import PAIRS, recipe_for, selection_for
from support.compare import assert_same_training, distance, metrics, trained, validations
from support.tiny_models import VOCABULARY, save, tiny_model
from support.tiny_run import TinyRun
from support.workspace import Workspace
from torch.nn import functional

from lander_ds.cli.main import main
from lander_ds.common.files import file_hash
from lander_ds.data.batching.micro_batches import FILLER
from lander_ds.data.batching.packing import Example, pack
from lander_ds.models.loading import build, fill
from lander_ds.models.parameter_groups import mark_trained, prepare_model
from lander_ds.models.preference import Preference
from lander_ds.models.routed_ffn import NO_PAIR
from lander_ds.models.translation_model import BatchTotals, Objective, TranslationModel
from lander_ds.models.weights import BaseWeights

BETA, LIKELIHOOD = 0.3, 0.7


def preferences() -> list[list[Example]]:
    """Chosen and rejected translations of three sources, and a text that has none."""
    generator = np.random.default_rng(4)
    made = []
    for number, (prompt, chosen, rejected) in enumerate([(4, 5, 3), (2, 4, 7), (3, 2, 2)]):
        source = generator.integers(3, VOCABULARY, prompt)
        targets = (generator.integers(3, VOCABULARY, length) for length in (chosen, rejected))
        made.append(
            [
                Example(np.append(source, target).astype(np.int32), prompt, number, 10 + number, worse)
                for target, worse in zip(targets, (False, True), strict=True)
            ]
        )
    return [*made, [Example(generator.integers(3, VOCABULARY, 6).astype(np.int32), 1, NO_PAIR, 20)]]


@pytest.fixture
def module(tmp_path: Path) -> TranslationModel:
    recipe = recipe_for(save(tiny_model("llama"), tmp_path / "base"), tmp_path / "run", "full")
    model, family = build(recipe.model)
    prepare_model(model, family, recipe, selection_for(recipe))
    fill(model, family, BaseWeights(recipe.model.path), lambda unit: None)
    mark_trained(model, family, recipe.train, None)
    objective = Objective(preference=Preference(BETA, LIKELIHOOD))
    return TranslationModel(model, family, len(PAIRS), objective)


def test_the_formula(module: TranslationModel) -> None:
    """Losses, gradients and figures of a packed row are those of one example after the other, in transformers' model."""
    everything = preferences()
    targets = sum(len(example.input_ids) - example.prompt_length for example, *_ in everything)
    batch = pack([*(example for examples in everything for example in examples), FILLER])
    assert batch.preferences == 3
    loss, sums, _ = module(batch, BatchTotals(targets, 4, 3))
    loss.backward()

    plain = tiny_model("llama")
    losses = torch.zeros(4, 2)
    for number, examples in enumerate(everything):
        for side, example in enumerate(examples):
            ids = torch.from_numpy(example.input_ids).long()
            logits = plain(ids[None]).logits[0, example.prompt_length - 1 : -1]
            losses[number, side] = functional.cross_entropy(
                logits, ids[example.prompt_length :], reduction="sum"
            )
    margins = losses[:3, 1] - losses[:3, 0]
    preference = -torch.log(torch.sigmoid(BETA * margins))
    expected = LIKELIHOOD * losses[:, 0].sum() / targets + preference.mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = {name: p.grad for name, p in module.model.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
    wanted = torch.stack([losses[:3, 0], preference, (margins > 0).float(), margins]).detach().double()
    torch.testing.assert_close(sums[[0, 2, 3, 4], :3], wanted, rtol=1e-4, atol=1e-5)
    assert sums[1].tolist() == [5, 4, 2, 5]
    assert sums[5].tolist() == [1, 1, 1, 0]


def test_a_batch_may_be_cut_anywhere(module: TranslationModel) -> None:
    everything, totals = preferences(), BatchTotals(30, 4, 3)
    whole = module(pack([example for examples in everything for example in examples]), totals)
    parts = [module(pack(examples), totals) for examples in (*everything, [FILLER])]
    torch.testing.assert_close(sum(part[0] for part in parts), whole[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sum(part[1] for part in parts), whole[1], rtol=1e-5, atol=1e-5)


@pytest.mark.distributed
def test_ranks_change_nothing(world_1: TinyRun, world_2: TinyRun) -> None:
    one, two = world_1.run("cpo-1"), world_2.run("cpo-2")
    assert_same_training(two, one, 1e-4)
    for name in ("loss", "accuracy", "margin"):
        values = [[record["preference"][name] for record in metrics(run)] for run in (one, two)]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-4)
    last = validations(one)[-1]
    assert last["valid_preference"] == pytest.approx(validations(two)[-1]["valid_preference"], rel=1e-4)
    assert all(record["replay_loss"] > 0 for record in metrics(one))
    assert "preference" not in metrics(world_1.run("adamw-1"))[0]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("first", "second"), [("adamw-1", "further-1"), ("bfloat16-1", "further-bfloat16-1")]
)
def test_a_run_starts_from_another(world_1: TinyRun, first: str, second: str) -> None:
    """With its selection and its weights, but steps and schedule of its own."""
    earlier, further = world_1.run(first), world_1.run(second)
    assert file_hash(earlier.selection) == file_hash(further.selection)
    assert not further.awareness.exists(), "nothing had to be detected"
    assert distance(trained(further), trained(earlier)) < 1e-6
    rounded = {name: tensor.bfloat16().float() for name, tensor in trained(earlier).items()}
    assert distance(rounded, trained(earlier)) > 1e-4
    (step,) = metrics(further)
    assert (step["step"], step["lr"]["gates"]) == (1, 1e-9)
    assert step["loss"] < metrics(earlier)[0]["loss"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["train.objective=cpo"], "cpo compares every translation with a worse one; name its column"),
        (["train.start_from=nowhere"], "train.start_from: nowhere does not exist: name a run directory"),
    ],
)
def test_what_is_refused_before_anything_runs(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], changed: list[str], message: str
) -> None:
    options = [word for setting in changed for word in ("--set", setting)]
    assert main(["config", "--recipe", str(workspace.recipe), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.distributed
def test_another_method_cannot_start_from_it(
    workspace: Workspace, world_1: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--set", f"train.start_from={world_1.run('lora-1').path}"]
    assert main(["config", "--recipe", str(workspace.recipe), *options]) == 2
    assert "was trained with method lora, now it is lander" in capsys.readouterr().err
