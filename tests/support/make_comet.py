"""Run by an interpreter with unbabel-comet: writes tiny COMET checkpoints with random weights, and their scores.

    python make_comet.py DIRECTORY

DIRECTORY has `src`, `mt` and `ref`, one text per line. It gets `encoder` (an XLM-R with a SentencePiece vocabulary of
its own), `comet` (a regression model, which wants references), `kiwi` (one without), and for both `NAME.json`, what the
library says of the texts: `command`, the scores of `comet-score`, and `interface`, those of the Python interface.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning
import sentencepiece
import torch
import yaml
from comet import load_from_checkpoint
from comet.cli.score import score_command
from comet.models import ReferencelessRegression, RegressionMetric
from transformers import XLMRobertaConfig, XLMRobertaTokenizerFast

KINDS: dict[str, tuple[type[Any], str]] = {
    "comet": (RegressionMetric, "regression_metric"),
    "kiwi": (ReferencelessRegression, "referenceless_regression_metric"),
}


def make_encoder(directory: Path, texts: Path) -> None:
    """An XLM-R's tokenizer and configuration; the checkpoints have its weights."""
    directory.mkdir()
    model = directory / "sentencepiece.bpe"
    sentencepiece.SentencePieceTrainer.train(
        input=str(texts), model_prefix=str(model), vocab_size=120, hard_vocab_limit=False, minloglevel=2
    )
    tokenizer = XLMRobertaTokenizerFast(vocab_file=f"{model}.model")
    tokenizer.save_pretrained(directory)
    XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=130,
    ).save_pretrained(directory)


def make_checkpoint(directory: Path, encoder: Path) -> None:
    """A checkpoint as the library's trainer leaves it."""
    kind, identifier = KINDS[directory.name]
    torch.manual_seed(3)
    options = {"encoder_model": "XLM-RoBERTa", "pretrained_model": str(encoder), "hidden_sizes": [16]}
    model = kind(load_pretrained_weights=False, **options)
    for parameter in model.parameters():
        # With the usual initialisation every sentence has nearly the same score.
        parameter.data += 0.2 * torch.randn(parameter.shape)
    trainer = pytorch_lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(directory / "checkpoints" / "model.ckpt")
    hparams = {"class_identifier": identifier, **options}
    (directory / "hparams.yaml").write_text(yaml.safe_dump(hparams), encoding="utf-8")


def write_scores(directory: Path, name: str) -> None:
    """What the library says."""
    checkpoint, out = directory / name / "checkpoints" / "model.ckpt", directory / f"{name}.json"
    texts = ["-s", str(directory / "src"), "-t", str(directory / "mt"), "-r", str(directory / "ref")]
    sys.argv = ["comet-score", *texts, "--model", str(checkpoint), "--gpus", "0", "--to_json", str(out)]
    score_command()
    (rows,) = json.loads(out.read_text(encoding="utf-8")).values()
    scores = {
        "command": [row["COMET"] for row in rows],
        "interface": load_from_checkpoint(str(checkpoint)).predict(rows, gpus=0).scores,
    }
    out.write_text(json.dumps(scores), encoding="utf-8")


def main() -> None:
    """See the docstring of the module."""
    directory = Path(sys.argv[1])
    make_encoder(directory / "encoder", directory / "ref")
    for name in KINDS:
        make_checkpoint(directory / name, directory / "encoder")
        write_scores(directory, name)


if __name__ == "__main__":
    main()
