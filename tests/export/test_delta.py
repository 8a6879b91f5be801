"""Deltas: onto the base, off again bit by bit, from a training or from any two models, and never onto the wrong one."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import LAYERS, recipe_for, selection_for, write_checkpoint
from support.exports import contents, dense, logits, open_trained, tensors, trained_logits
from support.tiny_models import save, tiny_model
from transformers import AutoModelForCausalLM

from lander_ds.cli.main import main
from lander_ds.common.errors import DiskFull
from lander_ds.config.recipe import Recipe
from lander_ds.export.bits import Slices, difference, exclusive_or, flipped
from lander_ds.export.delta import META, SELECTION, WEIGHTS, Delta
from lander_ds.export.delta_write import export_delta
from lander_ds.export.dense import export_dense
from lander_ds.export.fold import folded
from lander_ds.export.routed import export_routed
from lander_ds.export.writer import Form
from lander_ds.models.files import PICKLED_SINGLE, SINGLE

MEANS = {str(layer): {"en-de": 0.3, "en-fr": 0.5, "de-en": 0.6} for layer in LAYERS}
FACTS = {
    "base": {"name": "tiny", "fingerprint": "sha256:0"},
    "method": "lander",
    "pairs": ["en-de", "en-fr", "de-en"],
}


@dataclass(frozen=True)
class Built:
    """A base, a training on it and the delta of that."""

    recipe: Recipe
    base: Path
    delta: Path


def make(
    root: Path, case: str = "gemma3", method: str = "lander", gate: str = "input", dtype: str = "bfloat16"
) -> Built:
    base = save(tiny_model(case).to(getattr(torch, dtype)), root / "base", max_shard_size="30KB")
    (base / "tokenizer.json").write_text("{}")
    (base / "generation_config.json").write_text('{"max_new_tokens": 7}')
    recipe = recipe_for(base, root / "run", method, gate, dtype)
    write_checkpoint(recipe)
    export_delta(open_trained(recipe), root / "delta", MEANS if gate != "none" else {}, FACTS)
    return Built(recipe, base, root / "delta")


def lander(*arguments: object) -> None:
    assert main(["delta", *map(str, arguments)]) == 0


def wording(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that succeeds says."""
    capsys.readouterr()
    lander(*arguments)
    return " ".join(capsys.readouterr().err.split())


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that ends with exit code 2."""
    capsys.readouterr()
    assert main(["delta", *map(str, arguments)]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def same_tensors(first: Path, second: Path) -> bool:
    a, b = tensors(first), tensors(second)
    return a.keys() == b.keys() and all(
        torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a
    )


def only_model_files(directory: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(directory).items() if name != "README.md"}


CASES = ("gemma3", "bloom", "opt", "gpt_neox", "llama", "qwen3", "mixtral-moe")


@pytest.mark.parametrize("case", CASES)
def test_a_gated_delta_becomes_the_routed_export_and_back_the_base(case: str, tmp_path: Path) -> None:
    built = make(tmp_path, case)
    export_routed(open_trained(built.recipe), tmp_path / "routed", Form())
    lander("apply", built.base, built.delta, tmp_path / "out")
    assert only_model_files(tmp_path / "out") == only_model_files(tmp_path / "routed")
    lander("revert", tmp_path / "out", built.delta, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(built.base)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("method", ["lander", "layers", "full", "lora", "shira"])
def test_a_delta_without_gates_becomes_the_dense_export_and_back_the_base(
    method: str, dtype: str, tmp_path: Path
) -> None:
    built = make(tmp_path, "qwen3-moe" if method == "layers" else "llama-tied", method, "none", dtype)
    lander("apply", built.base, built.delta, tmp_path / "out")
    assert only_model_files(tmp_path / "out") == only_model_files(dense(built.recipe))
    assert not same_tensors(tmp_path / "out", built.base)
    lander("revert", tmp_path / "out", built.delta, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(built.base)


def test_a_delta_holds_only_what_changed(tmp_path: Path) -> None:
    built = make(tmp_path, "llama")
    delta = Delta.open(built.delta)
    banks = {
        layer.layer: sum(bank.size for bank in layer.banks if bank.kind != "frozen")
        for layer in selection_for(built.recipe).layers
    }
    for name, change in delta.changes.items():
        layer = int(name.split(".")[2])
        assert change.count == banks[layer], name
        assert change.dim == (1 if "down_proj" in name else 0)
    assert {int(name.split(".")[2]) for name in delta.changes} == set(LAYERS)
    stored = load_file(built.delta / WEIGHTS)
    assert {name.removeprefix("gate/") for name in stored if name.startswith("gate/")} == set(
        open_trained(built.recipe).gates
    )
    for name, change in delta.changes.items():
        assert stored[f"bits/{name}"].numel() == change.count * min(change.shape), "a row has as many as d"
    assert str(built.base) not in (built.delta / META).read_text(), "no path of this machine"


def test_fold_and_dense_are_what_stage_export_writes(tmp_path: Path) -> None:
    built = make(tmp_path)
    trained = open_trained(built.recipe)
    for pair in ("en-fr", "mean"):
        export_dense(folded(trained, MEANS, pair), tmp_path / "expected", Form(torch.float32))
        # From the rounded values that the delta holds, so equal in what a bfloat16 base can hold.
        lander("apply", built.base, built.delta, tmp_path / pair, "--fold", pair, "--dtype", "float32")
        ours, theirs = tensors(tmp_path / pair), tensors(tmp_path / "expected")
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, atol=1e-2, rtol=1e-2)
        card = (tmp_path / pair / "README.md").read_text()
        assert "approximation" in card
        assert pair in card
    lander("apply", built.base, built.delta, tmp_path / "dense", "--dense")
    assert only_model_files(tmp_path / "dense") == only_model_files(dense(built.recipe))
    lander("revert", tmp_path / "dense", built.delta, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(built.base)


def test_the_applied_model_computes_what_was_trained(tmp_path: Path) -> None:
    built = make(tmp_path, "llama", dtype="float32")
    lander("apply", built.base, built.delta, tmp_path / "out", "--shard-size", "0.00002")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    for theirs, ours in zip(logits(model, "en-fr"), trained_logits(built.recipe, "en-fr"), strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    lander("revert", tmp_path / "out", built.delta, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(built.base)


def test_any_difference_between_two_models(tmp_path: Path) -> None:
    base = save(tiny_model("llama").to(torch.bfloat16), tmp_path / "base", max_shard_size="20KB")
    model = tiny_model("llama").to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[[3, 17]] += 1.0
        model.model.layers[1].mlp.down_proj.weight[:, 5] = float("nan")
        model.model.layers[2].self_attn.q_proj.weight.mul_(-1.0)
        model.model.norm.weight[2] = -0.0
        model.model.embed_tokens.weight[7, 1] = float("inf")
    # Saved in one file: the layout of the shards is the base's business.
    tuned = save(model, tmp_path / "tuned")
    lander("diff", base, tuned, tmp_path / "delta")
    changes = Delta.open(tmp_path / "delta").changes
    assert {name: (change.dim, change.count) for name, change in changes.items()} == {
        "model.layers.0.mlp.up_proj.weight": (0, 2),
        "model.layers.1.mlp.down_proj.weight": (1, 1),
        "model.layers.2.self_attn.q_proj.weight": (
            None,
            model.model.layers[2].self_attn.q_proj.weight.numel(),
        ),
        "model.norm.weight": (0, 1),
        "model.embed_tokens.weight": (0, 1),
    }
    lander("apply", base, tmp_path / "delta", tmp_path / "out")
    assert same_tensors(tmp_path / "out", tuned)
    lander("revert", tmp_path / "out", tmp_path / "delta", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)
    # Another layout of the same model can be taken back too.
    lander("revert", tuned, tmp_path / "delta", tmp_path / "back2")
    assert same_tensors(tmp_path / "back2", base)


def test_equal_models_give_an_empty_delta(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tiny_model("llama"), tmp_path / "base")
    shutil.copytree(base, tmp_path / "same")
    assert "same weights" in wording(capsys, "diff", base, tmp_path / "same", tmp_path / "delta")
    lander("apply", base, tmp_path / "delta", tmp_path / "out")
    assert only_model_files(tmp_path / "out") == contents(base)


def test_what_a_delta_leaves_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tiny_model("llama"), tmp_path / "base")
    shutil.copytree(base, tmp_path / "other")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(
        json.dumps({**config, "rms_norm_eps": 1.0, "use_cache": False})
    )
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    message = wording(capsys, "diff", base, tmp_path / "other", tmp_path / "delta")
    assert 'config.json differs in "rms_norm_eps": a delta' in message
    assert "tokenizer.json differ" in message


def nudged(base: Path, target: Path, name: str) -> Path:
    """A copy of a one-file base with a change in one tensor."""
    shutil.copytree(base, target)
    values = load_file(target / SINGLE)
    values[name] = values[name] + 1
    save_file(values, target / SINGLE, metadata={"format": "pt"})
    return target


def test_one_base_many_deltas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tiny_model("llama"), tmp_path / "base")
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    lander("diff", base, nudged(base, tmp_path / "tuned-a", first), tmp_path / "a")
    lander("diff", base, nudged(base, tmp_path / "tuned-b", second), tmp_path / "b")
    lander("diff", base, nudged(tmp_path / "tuned-a", tmp_path / "tuned-c", first), tmp_path / "c")
    lander("apply", base, tmp_path / "a", tmp_path / "base+a")
    lander("apply", base, tmp_path / "b", tmp_path / "base+b")
    assert same_tensors(tmp_path / "base+b", tmp_path / "tuned-b")
    # Another delta of other tensors fits on top; one of the same tensors, or the same one again, does not.
    lander("apply", tmp_path / "base+a", tmp_path / "b", tmp_path / "base+a+b")
    message = refused(capsys, "apply", tmp_path / "base+a", tmp_path / "c", tmp_path / "no")
    assert f"{first} is another tensor" in message
    assert "give the base it was made from (base, sha256:" in message
    message = refused(capsys, "apply", tmp_path / "base+a", tmp_path / "a", tmp_path / "no")
    assert "contains this delta already" in message
    message = refused(capsys, "revert", base, tmp_path / "a", tmp_path / "no")
    assert "does not contain this delta" in message
    message = refused(capsys, "revert", tmp_path / "base+b", tmp_path / "a", tmp_path / "no")
    assert "does not contain this delta" in message
    assert not (tmp_path / "no").exists()
    # In any order, each is taken off exactly.
    lander("revert", tmp_path / "base+a+b", tmp_path / "a", tmp_path / "only-b")
    assert same_tensors(tmp_path / "only-b", tmp_path / "tuned-b")
    lander("revert", tmp_path / "only-b", tmp_path / "b", tmp_path / "nothing")
    assert contents(tmp_path / "nothing") == contents(base)


def test_a_stacked_model_is_named_when_a_delta_is_taken_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save(tiny_model("llama"), tmp_path / "base")
    lander("diff", base, nudged(base, tmp_path / "a", "model.norm.weight"), tmp_path / "delta")
    other = nudged(tmp_path / "a", tmp_path / "b", "lm_head.weight")
    assert "holds further changes" in wording(capsys, "revert", other, tmp_path / "delta", tmp_path / "back")
    third = nudged(base, tmp_path / "c", "lm_head.weight")
    assert "is not the base that" in wording(capsys, "apply", third, tmp_path / "delta", tmp_path / "out")
    assert same_tensors(tmp_path / "out", other)


def test_wrong_bases_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = make(tmp_path, "llama")
    other = save(tiny_model("llama"), tmp_path / "float32")
    assert "is another tensor than" in refused(capsys, "apply", other, built.delta, tmp_path / "no")
    bloom = save(tiny_model("bloom"), tmp_path / "bloom")
    assert "lacks the tensor" in refused(capsys, "apply", bloom, built.delta, tmp_path / "no")
    lander("apply", built.base, built.delta, tmp_path / "routed")
    message = refused(capsys, "apply", tmp_path / "routed", built.delta, tmp_path / "no")
    assert "is a routed model: give the plain model" in message
    lander("apply", built.base, built.delta, tmp_path / "folded", "--fold", "en-de")
    message = refused(capsys, "revert", tmp_path / "folded", built.delta, tmp_path / "no")
    assert "without --fold, --dense and --dtype" in message
    lander("diff", built.base, dense(built.recipe), tmp_path / "plain")
    message = refused(capsys, "revert", tmp_path / "routed", tmp_path / "plain", tmp_path / "no")
    assert "do not belong together" in message
    assert "no gates to fold" in refused(
        capsys, "apply", built.base, tmp_path / "plain", tmp_path / "no", "--fold", "mean"
    )
    assert "no pair xx-yy" in refused(
        capsys, "apply", built.base, built.delta, tmp_path / "no", "--fold", "xx-yy"
    )
    assert not (tmp_path / "no").exists()


def test_models_that_do_not_fit_have_no_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save(tiny_model("llama"), tmp_path / "base")
    narrow = save(tiny_model("llama").to(torch.bfloat16), tmp_path / "narrow")
    message = refused(capsys, "diff", base, narrow, tmp_path / "no")
    assert "save the model in the base's type" in message
    assert "not of one architecture" in refused(
        capsys, "diff", base, save(tiny_model("opt"), tmp_path / "o"), tmp_path / "no"
    )
    assert "does not exist" in refused(capsys, "diff", base, tmp_path / "nowhere", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_nothing_is_overwritten_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = make(tmp_path, "llama")
    lander("apply", built.base, built.delta, tmp_path / "out")
    before = contents(tmp_path / "out")
    message = refused(capsys, "apply", built.base, built.delta, tmp_path / "out", "--dense")
    assert "exists: choose another directory, or --force" in message
    assert contents(tmp_path / "out") == before
    lander("apply", built.base, built.delta, tmp_path / "out", "--dense", "--force")
    assert "modeling_lander.py" not in contents(tmp_path / "out")
    # Never what is no model, and never what the result is made from.
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    for target in (tmp_path / "home", tmp_path / "home" / "thesis.txt"):
        message = refused(capsys, "apply", built.base, built.delta, target, "--force")
        assert "is no model or delta directory" in message
    for target in (built.base, built.delta, built.base / "inside", tmp_path):
        assert "overlap" in refused(capsys, "apply", built.base, built.delta, target, "--force")
    (tmp_path / "empty").mkdir()
    lander("apply", built.base, built.delta, tmp_path / "empty")


def test_a_failing_command_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = make(tmp_path, "llama")
    lander("apply", built.base, built.delta, tmp_path / "out")
    before = contents(tmp_path / "out")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lander_ds.export.routed.copy_companions", fail)
    command = ["delta", "apply", str(built.base), str(built.delta), str(tmp_path / "out"), "--force"]
    assert main(command) == DiskFull.exit_code
    assert contents(tmp_path / "out") == before
    assert not list(tmp_path.glob(".*"))


def test_a_pickled_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tiny_model("llama"), tmp_path / "base")
    values = load_file(base / SINGLE)
    tuned = nudged(base, tmp_path / "tuned", "model.norm.weight")
    torch.save(values, base / PICKLED_SINGLE)
    (base / SINGLE).unlink()
    assert "model.allow_pickle" in refused(capsys, "diff", base, tuned, tmp_path / "delta")
    lander("diff", base, tuned, tmp_path / "delta", "--allow-pickle")
    lander("apply", base, tmp_path / "delta", tmp_path / "out", "--allow-pickle")
    assert same_tensors(tmp_path / "out", tuned)
    lander("revert", tmp_path / "out", tmp_path / "delta", tmp_path / "back")
    assert same_tensors(tmp_path / "back", base)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (7,), (6, 5), (3, 4, 2)])
def test_bits_lead_there_and_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    old = torch.randint(0, 2, shape, generator=generator).to(dtype)
    new = torch.randint(0, 2, shape, generator=generator).to(dtype)
    if shape:
        new[0] = 1 - old[0].int()
    placement = difference(old, new) or Slices(None, None)
    bits = exclusive_or(old, new, placement)
    assert torch.equal(flipped(old, bits, placement), new)
    assert torch.equal(flipped(new, bits, placement), old)
    assert difference(old, old.clone()) is None


def test_the_selection_is_that_of_the_training(tmp_path: Path) -> None:
    built = make(tmp_path, "llama")
    assert (built.delta / SELECTION).exists()
    meta = json.loads((built.delta / META).read_text())
    assert meta["gate_means"] == MEANS
    assert meta["routing"]["gate"] == "input"
