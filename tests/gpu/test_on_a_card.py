"""For the day with a card: the same figures as on the CPU, in half precision too, without waits, and whole stages.

python -m pytest -m gpu
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_cuda_cases import FAMILIES, TOTALS, Case, attention_of, batch, engine_of, operated
from support.golden_export import GOLDEN
from support.tiny_models import tiny_model

from lander_ds.config.schema.types import Quantization
from lander_ds.models.quantization import QuantizedLinear
from lander_ds.models.surgery import routed_ffns
from lander_ds.models.translation_model import GateStatistics, TranslationModel

CUDA = torch.device("cuda")
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 means float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def built(case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> TranslationModel:
    """A tiny model after surgery with the same random weights on every device, and gates that weigh."""
    part = operated(case, tiny_model(case.model, attention_of(case)).to(dtype))
    generator = torch.Generator().manual_seed(7)
    for _, ffn in routed_ffns(part):
        for parameter in () if ffn.router is None else ffn.router.parameters():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return part.to(device).train()


def outcome(case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Loss per pair, budget and gradients of a micro-batch, on the CPU in float32."""
    part = built(case, device, dtype)
    loss, per_pair, budget = part(batch(case.lengths, case.pairs).to(device), TOTALS, alpha=0.5)
    loss.backward()
    tensors = {name: p.grad for name, p in part.named_parameters() if p.grad is not None}
    return {
        name: tensor.detach().float().cpu()
        for name, tensor in {"loss": loss, "per pair": per_pair, "budget": budget, **tensors}.items()
    }


@pytest.mark.parametrize("gate", ["input", "output", "none"])
@pytest.mark.parametrize("model", FAMILIES)
def test_float32_is_that_of_the_cpu(model: str, gate: str) -> None:
    case = Case(model, gate)
    actual, wanted = outcome(case, CUDA), outcome(case, CPU)
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("model", FAMILIES)
def test_bfloat16_is_close(model: str) -> None:
    actual, wanted = outcome(Case(model), CUDA, torch.bfloat16), outcome(Case(model), CPU)
    torch.testing.assert_close(actual["loss"], wanted["loss"], rtol=0.05, atol=0.05)
    for name, value in wanted.items():
        assert torch.isfinite(actual[name]).all(), name
        assert (actual[name] - value).norm() <= 0.2 * value.norm() + 0.02, name


@pytest.mark.parametrize("model", FAMILIES)
def test_nothing_waits_in_a_micro_batch(model: str) -> None:
    """What the fake device counts, asked of CUDA itself."""
    case = Case(model)
    engine = engine_of(built(case, CUDA, torch.bfloat16))
    engine.train_step([batch(case.lengths, case.pairs).to(CUDA)], TOTALS, 1.0, GateStatistics())
    packed = batch(case.lengths, case.pairs).to(CUDA)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.train_step([packed], TOTALS, 1.0, GateStatistics())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_product_is_that_of_the_cpu(kind: Quantization) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    weight = torch.randn(96, 100, generator=torch.Generator().manual_seed(1))
    results = []
    for device in (CUDA, CPU):
        projection = QuantizedLinear(weight.to(device), None, kind)
        x = torch.linspace(-1, 1, 300, device=device).view(3, 100).requires_grad_()
        y = projection(x)
        y.square().sum().backward()
        assert x.grad is not None
        results.append([part.detach().cpu() for part in (projection.weight_in(x.dtype), y, x.grad)])
    for actual, wanted in zip(*results, strict=True):
        # A weight between two codes may go to either.
        assert (actual - wanted).norm() < 0.01 * wanted.norm()


def lander(directory: Path, *arguments: str) -> None:
    """The command line, in `directory`."""
    done = subprocess.run(
        [sys.executable, "-m", "lander_ds", *arguments, "--recipe", "recipe.yaml"],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def losses(run: Path) -> list[float]:
    """Of every step."""
    records = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """The golden recipe and its data, without its run."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run"))
    return tmp_path


def test_stages_and_resuming(golden: Path) -> None:
    """Detection and training give the CPU's figures; a training in two parts ends where one does."""
    for stage in ("prepare", "detect", "select"):
        lander(golden, stage)
    lander(golden, "train", "--set", "train.steps=4")
    lander(golden, "train", "--auto-resume")
    assert losses(golden / "run") == pytest.approx(losses(GOLDEN / "run"), rel=1e-3)


def test_offloaded_optimizer_state(golden: Path) -> None:
    path = golden / "zero3.json"
    options: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    options["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    path.write_text(json.dumps(options), encoding="utf-8")
    for stage in ("prepare", "detect", "select", "train"):
        lander(golden, stage)
    assert losses(golden / "run") == pytest.approx(losses(GOLDEN / "run"), rel=1e-3)
