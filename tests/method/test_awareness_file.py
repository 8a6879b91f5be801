"""The awareness file: round trip, derived figures, and every kind of damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.toy import METADATA, PAIRS

from lander_ds.common.errors import ArtefactError
from lander_ds.method.awareness import STATISTICS, Awareness

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def awareness() -> Awareness:
    torch.manual_seed(0)
    tokens = torch.tensor([10.0, 20, 40], dtype=torch.float64)
    signed = torch.randn(3, 4, 6, dtype=torch.float64)
    active = torch.randint(0, 10, (3, 4, 6)).double()
    return Awareness(
        PAIRS, tokens, signed, signed.abs(), active, signed.square(), signed.square() + 1, METADATA
    )


@pytest.fixture
def path(awareness: Awareness, tmp_path: Path) -> Path:
    awareness.save(tmp_path / "sub" / "awareness.safetensors")
    return tmp_path / "sub" / "awareness.safetensors"


def test_round_trip(awareness: Awareness, path: Path) -> None:
    loaded = Awareness.load(path)
    assert loaded.pairs == PAIRS
    assert loaded.metadata == METADATA
    assert (loaded.layers, loaded.neurons) == (4, 6)
    for name in ("tokens", *STATISTICS):
        assert torch.equal(getattr(loaded, name), getattr(awareness, name))
    assert loaded.content_hash() == awareness.content_hash()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_tensor_names(path: Path) -> None:
    tensors = load_file(path)
    assert set(tensors) == {f"{pair}/{name}" for pair in PAIRS for name in ("tokens", *STATISTICS)}
    assert tensors["en-de/tokens"].shape == ()
    assert tensors["en-fr/sum_abs_gh"].shape == (4, 6)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float64}


def test_equal_contents_give_equal_bytes(awareness: Awareness, path: Path, tmp_path: Path) -> None:
    for number in range(5):
        again = tmp_path / f"{number}.safetensors"
        awareness.save(again)
        assert again.read_bytes() == path.read_bytes()


def test_derived_figures(awareness: Awareness) -> None:
    assert torch.equal(awareness.phi()[1], awareness.sum_abs_gh[1] / 20)
    assert torch.equal(awareness.activation_mean()[2], awareness.sum_h[2] / 40)
    assert torch.equal(awareness.activation_probability()[0], awareness.active[0] / 10)


def test_content_hash_sees_every_change(awareness: Awareness) -> None:
    changed = awareness.sum_gh2.clone()
    changed[2, 3, 5] += 1e-9
    others = [
        replace(awareness, sum_gh2=changed),
        replace(awareness, metadata=replace(METADATA, base_fingerprint="other")),
        awareness.reordered(PAIRS[::-1]),
    ]
    assert awareness.content_hash() not in {other.content_hash() for other in others}


def test_reordered(awareness: Awareness) -> None:
    other = awareness.reordered(["en-ru", "en-de", "en-fr"])
    assert other.pairs == ("en-ru", "en-de", "en-fr")
    assert other.tokens.tolist() == [40, 10, 20]
    assert torch.equal(other.phi()[0], awareness.phi()[2])


@pytest.mark.parametrize("pairs", [PAIRS[:2], (*PAIRS, "en-cs"), ("en-de", "en-fr", "en-cs"), ("en-de",) * 3])
def test_other_pairs_are_refused(awareness: Awareness, pairs: tuple[str, ...]) -> None:
    with pytest.raises(ArtefactError, match=r"en-de, en-fr, en-ru but.*data\.pairs.*run stage detect"):
        awareness.reordered(pairs)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="does not exist: run stage detect"):
        Awareness.load(tmp_path / "awareness.safetensors")


@pytest.mark.parametrize("length", [0, 5, 100, -8])
def test_truncated(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ArtefactError, match=r"damaged.*run stage detect"):
        Awareness.load(path)


def test_not_safetensors(path: Path) -> None:
    path.write_text("hello, this is not a tensor file\n" * 10)
    with pytest.raises(ArtefactError, match="damaged"):
        Awareness.load(path)


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="damaged"):
        Awareness.load(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"awareness": '{"format": "lander-awareness-0"}'}])
def test_other_format(path: Path, metadata: dict[str, str] | None) -> None:
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(ArtefactError, match="not a lander-awareness-1 file"):
        Awareness.load(path)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "lander-awareness-1"}', '"x"'])
def test_bad_metadata(path: Path, text: str) -> None:
    save_file(load_file(path), path, metadata={"awareness": text})
    with pytest.raises(ArtefactError, match=r"damaged.*run stage detect"):
        Awareness.load(path)


def put(name: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].reshape(-1)[-1] = value

    return change


def to_float32(tensors: Tensors) -> None:
    for pair in PAIRS:
        tensors[f"{pair}/sum_h"] = tensors[f"{pair}/sum_h"].float()


def drop_neuron(tensors: Tensors) -> None:
    for pair in PAIRS:
        tensors[f"{pair}/active"] = tensors[f"{pair}/active"][:, :-1].contiguous()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put("en-fr/sum_h", float("nan")), "en-fr/sum_h holds NaN"),
        (put("en-ru/sum_gh2", float("inf")), "en-ru/sum_gh2 holds NaN or infinity"),
        (put("en-de/sum_abs_gh", -1e-9), "en-de/sum_abs_gh holds negative"),
        (put("en-de/active", -1), "en-de/active holds negative"),
        (put("en-de/active", 11), "en-de/active exceeds the number of tokens"),
        (put("en-ru/tokens", 0), "en-ru/tokens is 0"),
        (put("en-ru/tokens", -3), "en-ru/tokens is -3"),
        (put("en-ru/tokens", float("nan")), "en-ru/tokens is nan"),
        (to_float32, "sum_h is not float64"),
        (drop_neuron, "active is not float64 of .* 6"),
        (lambda tensors: tensors.pop("en-fr/sum_abs_h"), "en-fr/sum_abs_h"),
        (lambda tensors: tensors.pop("en-de/tokens"), "en-de/tokens"),
        (lambda tensors: tensors.update({"en-de/sum_h": torch.zeros(2, 2).double()}), "equal size"),
    ],
)
def test_impossible_values(path: Path, damage: Callable[[Tensors], object], message: str) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ArtefactError, match=f"damaged.*{message}.*run stage detect"):
        Awareness.load(path)


def test_a_pair_listed_twice(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["awareness"])
    description["pairs"] = ["en-de", "en-de", "en-fr"]
    save_file(load_file(path), path, metadata={"awareness": json.dumps(description)})
    with pytest.raises(ArtefactError, match="listed twice"):
        Awareness.load(path)
