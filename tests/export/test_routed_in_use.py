"""A routed export as others use it: spread over devices, under threads, in Trainer, with more tokens, another attention."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from support.checkpoints import PAIRS, recipe_for, write_checkpoint
from support.exports import open_trained
from support.golden_export import GOLDEN
from support.tiny_models import examples, save, tiny_model
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from lander_ds.export.card import Exactness, render
from lander_ds.export.routed import export_routed
from lander_ds.export.writer import Form

FAMILIES = ("llama", "gemma3", "bloom", "gpt_neox", "opt")


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A routed export of every kind of family."""
    root = tmp_path_factory.mktemp(f"use-{request.param}")
    recipe = recipe_for(save(tiny_model(request.param), root / "base"), root / "run")
    write_checkpoint(recipe)
    export_routed(open_trained(recipe), root / f"routed-{request.param}", Form())
    return root / f"routed-{request.param}"


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options)


def greedy(model: Any, ids: torch.Tensor, pair: str) -> torch.Tensor:
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
    }
    translation: torch.Tensor = model.generate(ids, pair=pair, **options)
    return translation


def outputs(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pair -> logits and greedy translation."""
    ids = examples()[0][None]
    with torch.no_grad():
        return {pair: (model(ids, pair=pair).logits, greedy(model, ids, pair)) for pair in PAIRS}


def assert_same(actual: Any, expected: Any) -> None:
    for pair, (logits, translation) in outputs(expected).items():
        other_logits, other = outputs(actual)[pair]
        torch.testing.assert_close(other_logits, logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(other, translation), pair


def name_of(model: torch.nn.Module, wanted: torch.nn.Module) -> str:
    names: dict[torch.nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[wanted]


def test_modules_offloaded_to_disk_and_to_memory(directory: Path, tmp_path: Path) -> None:
    """Also the embedding, whose weight is then on no device at all."""
    plain = load(directory)
    decoder, _, embedding = name_of(plain, plain.get_input_embeddings()).rpartition(".")
    places: dict[str, str] = {}
    for name, module in plain.get_submodule(decoder).named_children():
        if isinstance(module, torch.nn.ModuleList):
            places.update({f"{decoder}.{name}.{i}": "disk" if i % 2 else "cpu" for i in range(len(module))})
        else:
            places[f"{decoder}.{name}"] = "disk" if name == embedding else "cpu"
    places[name_of(plain, plain.get_output_embeddings())] = "disk"
    spread = load(directory, device_map=places, offload_folder=str(tmp_path / "offload"))
    assert any(parameter.is_meta for parameter in spread.parameters())
    assert_same(spread, plain)


def test_auto_model_gives_the_hidden_states_under_the_head(directory: Path) -> None:
    plain, below = load(directory), AutoModel.from_pretrained(directory, trust_remote_code=True)
    ids = examples()[0][None]
    with torch.no_grad():
        for pair in PAIRS:
            hidden = below(ids, pair=pair).last_hidden_state
            logits = plain(ids, pair=pair).logits
            torch.testing.assert_close(plain.get_output_embeddings()(hidden), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_device_maps(directory: Path, device_map: str) -> None:
    assert_same(load(directory, device_map=device_map), load(directory))


def test_threads_with_different_pairs(directory: Path) -> None:
    model = load(directory)
    alone = {pair: greedy(model, examples()[0][None], pair) for pair in PAIRS}
    start = Barrier(len(PAIRS))

    def translate(pair: str) -> list[torch.Tensor]:
        start.wait()
        return [greedy(model, examples()[0][None], pair) for _ in range(10)]

    with ThreadPoolExecutor(len(PAIRS)) as threads:
        for pair, actual in zip(PAIRS, threads.map(translate, PAIRS), strict=True):
            assert all(torch.equal(one, alone[pair]) for one in actual), pair


def gradients(model: Any, pair: str) -> torch.Tensor:
    ids = examples()[0][None]
    loss = model(ids, labels=ids, pair=pair).loss
    weights = [p for p in model.parameters() if p.requires_grad]
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, weights, allow_unused=True) if g is not None]
    )


def recomputing(directory: Path, reentrant: bool) -> Any:
    model = load(directory).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def test_recomputation_under_threads(directory: Path) -> None:
    """What is run again in the backward pass belongs to the pair of its forward pass."""
    plain, model = load(directory), recomputing(directory, reentrant=False)
    wanted = {pair: gradients(plain, pair) for pair in PAIRS}
    with ThreadPoolExecutor(len(PAIRS)) as threads:
        for _ in range(4):
            for pair, actual in zip(
                PAIRS, threads.map(lambda pair: gradients(model, pair), PAIRS), strict=True
            ):
                torch.testing.assert_close(actual, wanted[pair], rtol=1e-4, atol=1e-6)


def test_reentrant_recomputation(directory: Path) -> None:
    plain, model = load(directory), recomputing(directory, reentrant=True)
    ids = examples()[0][None]
    for pair in PAIRS:
        model.zero_grad()
        model(ids, labels=ids, pair=pair).loss.backward()
        actual = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(actual, gradients(plain, pair), rtol=1e-4, atol=1e-6)


def test_replicas_in_threads_as_data_parallel_makes_them(directory: Path) -> None:
    """Each replica runs the forward pass of its rows in a thread of its own."""
    model = load(directory)
    ids = examples()[0][None]
    with torch.no_grad(), ThreadPoolExecutor(len(PAIRS)) as threads:
        wanted = [model(ids, pair=pair).logits for pair in PAIRS]
        rows = [torch.tensor([i]) for i in range(len(PAIRS))]
        for _ in range(10):
            # The gradient mode belongs to the thread.
            actual = list(threads.map(lambda row: model(ids, pair_ids=row).logits.detach(), rows))
            for one, other in zip(actual, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_attention_that_is_asked_for(directory: Path) -> None:
    eager = load(directory, attn_implementation="eager")
    assert eager.model.config._attn_implementation == "eager"
    assert_same(eager, load(directory))
    if "bloom" not in directory.name:
        sdpa = load(directory, attn_implementation="sdpa")
        assert sdpa.model.config._attn_implementation == "sdpa"
        assert_same(sdpa, eager)


def test_more_tokens(directory: Path, tmp_path: Path) -> None:
    model = load(directory)
    before, size = outputs(model), model.config.vocab_size
    model.resize_token_embeddings(size + 7, mean_resizing=False)
    for pair, (logits, _) in outputs(model).items():
        torch.testing.assert_close(logits[..., :size], before[pair][0], rtol=1e-5, atol=1e-5)
    assert model.config.vocab_size == size + 7
    with torch.no_grad():
        assert model(torch.tensor([[size + 3, 5]]), pair=PAIRS[0]).logits.shape == (1, 2, size + 7)
    model.save_pretrained(tmp_path / "saved")
    assert_same(load(tmp_path / "saved"), model)


def examples_for_trainer() -> list[dict[str, Any]]:
    ids = examples()[0].tolist()
    return [{"input_ids": ids, "labels": ids, "pair_ids": i % len(PAIRS), "text": "unused"} for i in range(6)]


def test_trainer(directory: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    model = load(directory)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = datasets.Dataset.from_list(examples_for_trainer())
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(
        torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry
    )
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert trainer.evaluate()["eval_loss"] > 0


SNIPPET = """
from transformers import AutoModelForCausalLM, AutoTokenizer
{lines}
print(tokenizer.decode(model.generate(**tokenizer("en: Good morning", return_tensors="pt"), pair="en-de")[0]))
"""


def test_the_documented_lines_ask_nothing(tmp_path: Path) -> None:
    """Those of the README and of the card, with nobody there to answer: an unanswered question is an error."""
    base = tmp_path / "base"
    shutil.copytree(GOLDEN / "base", base)
    recipe = recipe_for(base, tmp_path / "run")
    write_checkpoint(recipe)
    target = tmp_path / "runs" / "demo" / "export" / "routed"
    export_routed(open_trained(recipe), target, Form())
    facts = {"base": {"name": "b", "fingerprint": "f"}, "method": "lander", "pairs": ["en-de"]}
    card = render(facts, "routed", Exactness.exact()).replace("(directory", f"({str(target)!r}")
    program = ""
    for text in ((Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8"), card):
        lines = [line for line in text.splitlines() if line.startswith(("model = Auto", "tokenizer = Auto"))]
        assert len(lines) == 2
        program += SNIPPET.format(lines="\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Do you wish to run the custom code" not in done.stdout + done.stderr
