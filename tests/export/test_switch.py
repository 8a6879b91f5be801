"""One base in memory and several deltas: each gives what its export gives, and leaves the base as it was."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import pytest
import torch
from support.checkpoints import recipe_for
from support.exports import examples, logits, open_trained, rewrite_checkpoint, trained_logits  # type: ignore[attr-defined]
from support.tiny_models import save, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from lander_ds.cli.main import main
from lander_ds.common.errors import ArtefactError, ModelError
from lander_ds.config.recipe import Recipe
from lander_ds.export.delta_write import export_delta
from lander_ds.export.switch import Switch

FACTS = {"base": {"name": "tiny", "fingerprint": "sha256:0"}, "method": "lander", "pairs": ["en-de", "en-fr"]}


def base_of(root: Path, case: str) -> Path:
    return save(tiny_model(case), root / "base")


def delta_of(base: Path, root: Path, scale: float, method: str = "lander", gate: str = "input") -> Recipe:
    """A made-up training; its delta is in `root/delta`."""
    recipe = recipe_for(base, root / "run", method, gate)
    rewrite_checkpoint(recipe, lambda tensors: [tensor.mul_(scale) for tensor in tensors.values()])  # type: ignore[arg-type]
    export_delta(open_trained(recipe), root / "delta", {}, FACTS)
    return recipe


def load(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base)


def same(actual: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(actual, wanted, strict=True))


@pytest.mark.parametrize("case", ["gemma3", "bloom", "opt", "gpt_neox", "llama", "qwen3-moe"])
def test_each_delta_gives_what_it_gives_alone(case: str, tmp_path: Path) -> None:
    base = base_of(tmp_path, case)
    gated = {name: delta_of(base, tmp_path / name, scale) for name, scale in (("one", 1.1), ("two", 0.7))}
    plain = delta_of(base, tmp_path / "plain", 1.3, "layers", "none")
    served = Switch(load(base), base)
    before = {name: parameter.clone() for name, parameter in served.model.named_parameters()}
    untouched = logits(served.model)
    for name in ("one", "two", "plain"):
        served.add(name, tmp_path / name / "delta")
    assert served.names == ("one", "two", "plain")
    for name, pair in (("one", "en-de"), ("two", "en-de"), ("plain", None), ("one", "en-fr")):
        recipe = gated.get(name, plain)
        with served.using(name, pair) as model:
            actual = logits(model)
        assert same(actual, trained_logits(recipe, pair or "en-de"))
        assert not same(actual, untouched)
        assert all(torch.equal(a, b) for a, b in zip(logits(served.model), untouched, strict=True))
    after = dict(served.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(parameter, before[name]) for name, parameter in after.items())


def test_rows_of_several_pairs_and_generation(tmp_path: Path) -> None:
    base = base_of(tmp_path, "llama")
    recipe = delta_of(base, tmp_path / "one", 1.5)
    served = Switch(load(base), base)
    served.add("one", tmp_path / "one" / "delta")
    prompt = examples()[0][None]
    greedy = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(3, prompt.shape[1])}
    with served.using("one", ["en-de", "en-fr", "none"]) as model:
        logits_of_rows = model(prompt.repeat(3, 1)).logits
        tokens = model.generate(prompt.repeat(3, 1), num_beams=2, **greedy)
    assert tokens.shape[0] == 3
    # en-es was not trained.
    for row, pair in enumerate(("en-de", "en-fr", "en-es")):
        assert same([logits_of_rows[row : row + 1]], trained_logits(recipe, pair)[:1])


def test_what_is_shared_takes_no_memory(tmp_path: Path) -> None:
    base = base_of(tmp_path, "llama")
    delta_of(base, tmp_path / "one", 1.5)
    served = Switch(load(base), base)
    served.add("one", tmp_path / "one" / "delta")
    own = {parameter.data_ptr() for parameter in served.model.parameters()}
    with served.using("one", "en-de") as model:
        others = {name for name, parameter in model.named_parameters() if parameter.data_ptr() not in own}
    assert others
    assert all(".banks." in name or ".router." in name for name in others)
    served.remove("one")
    assert served.names == ()


def test_the_base_is_back_after_an_error(tmp_path: Path) -> None:
    base = base_of(tmp_path, "llama")
    delta_of(base, tmp_path / "one", 1.5)
    delta_of(base, tmp_path / "plain", 1.5, "layers", "none")
    served = Switch(load(base), base)
    untouched = logits(served.model)
    for name in ("one", "plain"):
        served.add(name, tmp_path / name / "delta")
        with pytest.raises(RuntimeError, match="the request failed"), served.using(name, "en-de"):
            raise RuntimeError("the request failed")
        assert all(torch.equal(a, b) for a, b in zip(logits(served.model), untouched, strict=True))


def test_threads_with_different_pairs_and_deltas(tmp_path: Path) -> None:
    base = base_of(tmp_path, "llama")
    served = Switch(load(base), base)
    for name, scale in (("one", 1.5), ("two", 0.5)):
        delta_of(base, tmp_path / name, scale)
        served.add(name, tmp_path / name / "delta")
    requests = [(name, pair) for name in served.names for pair in ("en-de", "en-fr", "de-en")]

    def serve(request: tuple[str, str]) -> list[torch.Tensor]:
        with served.using(*request) as model:
            return logits(model)

    wanted = {request: serve(request) for request in requests}
    with ThreadPoolExecutor(len(requests)) as threads:
        for request, actual in zip(requests * 5, threads.map(serve, requests * 5), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(actual, wanted[request], strict=True)), request


def test_a_thread_started_inside_takes_its_context_along(tmp_path: Path) -> None:
    base = base_of(tmp_path, "llama")
    delta_of(base, tmp_path / "one", 1.5)
    served = Switch(load(base), base)
    served.add("one", tmp_path / "one" / "delta")
    with served.using("one", "en-de") as model, ThreadPoolExecutor(1) as thread:
        actual = thread.submit(copy_context().run, logits, model).result()
        assert all(torch.equal(a, b) for a, b in zip(actual, logits(model), strict=True))


def test_nothing_is_put_on_twice(tmp_path: Path) -> None:
    """What is under the second one would be taken for the base."""
    base = base_of(tmp_path, "llama")
    for name, scale in (("one", 1.3), ("two", 0.7)):
        delta_of(base, tmp_path / name, scale, "layers", "none")
    served = Switch(load(base), base)
    untouched = logits(served.model)
    for name in ("one", "two"):
        served.add(name, tmp_path / name / "delta")
    with served.using("one") as model:
        on = logits(model)
        with pytest.raises(ArtefactError, match="a delta is on"), served.using("two"):
            pass
        for change in (lambda: served.add("more", tmp_path / "one" / "delta"), lambda: served.remove("two")):
            with pytest.raises(ArtefactError, match="a delta is on"):
                change()
        assert all(torch.equal(a, b) for a, b in zip(logits(model), on, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(logits(served.model), untouched, strict=True))
    assert served.names == ("one", "two")


def test_what_is_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path, "llama")
    delta_of(base, tmp_path / "one", 1.5)
    served = Switch(load(base), base)
    with pytest.raises(ArtefactError, match="no delta 'one' was added"), served.using("one"):
        pass
    served.add("one", tmp_path / "one" / "delta")
    for pair in (None, "en-xx", ["en-de", "en-xx"]):
        with (
            pytest.raises(ArtefactError, match=r"has pairs en-de, en-fr, de-en, not"),
            served.using("one", pair),
        ):
            pass
    changed = tiny_model("llama")
    for parameter in changed.parameters():
        parameter.data *= 1.01
    other = save(changed, tmp_path / "other")
    with pytest.raises(ArtefactError, match="another tensor than"):
        Switch(load(other), other).add("one", tmp_path / "one" / "delta")
    assert main(["delta", "apply", str(base), str(tmp_path / "one" / "delta"), str(tmp_path / "out")]) == 0
    routed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with pytest.raises(ModelError, match="lander"):
        Switch(routed, tmp_path / "out")
