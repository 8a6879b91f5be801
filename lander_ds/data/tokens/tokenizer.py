"""The tokenizer of a model directory."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lander_ds.common.errors import ModelError
from lander_ds.data.tokens.sentencepiece_model import load_sentencepiece

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tekken.json",
)


def load_tokenizer(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or tokenizer directory; a bare SentencePiece `tokenizer.model` will do.

    It always has a padding token: the end-of-sequence token where the directory names none.

    Args:
        path: local directory.
        trust_remote_code: allow a tokenizer class that the directory ships as Python code.

    Raises:
        ModelError: there is no tokenizer, it cannot be loaded, it has no end-of-sequence token, or its
            vocabulary is larger than the model's embedding.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(
            f"{path}: no such directory (model.path): give a local model directory, or the hub id of a model"
        )
    settings = _read_json(directory / "tokenizer_config.json")
    own_code = "auto_map" in settings and "AutoTokenizer" in settings["auto_map"]
    if own_code and not trust_remote_code:
        raise ModelError(
            f"{path}: its tokenizer is Python code in that directory: read the code, then set "
            "model.trust_remote_code: true"
        )
    present = [name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not present and not own_code:
        raise ModelError(
            f"{path}: holds no tokenizer ({', '.join(TOKENIZER_FILES[:3])}, ...): copy the tokenizer files "
            "of the base model there, or train one with `lander tokenizer`"
        )
    if "tokenizer.model" in present and "tokenizer.json" not in present and not own_code:
        tokenizer = load_sentencepiece(directory / "tokenizer.model", settings)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                path, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as error:  # damaged files raise whatever their parser raises
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise ModelError(
                f"{path}: its tokenizer cannot be loaded ({reason}): copy the tokenizer files of the base "
                "model again"
            ) from error
    _check(tokenizer, directory)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def embedding_rows(directory: Path) -> int | None:
    """How many token ids the model of a directory knows; None where config.json does not say."""
    config = _read_json(directory / "config.json")
    rows: int | None = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return rows


def _check(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{directory}: the tokenizer has no end-of-sequence token, so translations would never end: name "
            "it as eos_token in tokenizer_config.json"
        )
    embedding = embedding_rows(directory)
    if embedding is None:
        return
    # Tokens added on top may lie beyond the embedding (Gemma 3's image token does). Whether the data hold any is seen
    # when they are prepared.
    added = tokenizer.added_tokens_decoder
    largest = max(index for index in tokenizer.get_vocab().values() if index not in added)
    largest = max(largest, tokenizer.eos_token_id, tokenizer.bos_token_id or 0)
    if largest >= embedding:
        raise ModelError(
            f"{directory}: the tokenizer has token ids up to {largest}, but the model's embedding has "
            f"{embedding} rows (vocab_size in config.json): tokenizer and model do not belong together; copy "
            "the tokenizer of this model"
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: is not valid JSON ({error}): copy it from the base model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: is not a JSON object: copy it from the base model again")
    return value


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> str:
    """SHA-256 (hex) of everything that decides token ids: equal for tokenizers that encode alike.

    Args:
        tokenizer: the tokenizer.
        chat: its chat template matters too.
    """
    if tokenizer.is_fast:
        # Padding and truncation are settings of the last call, not of the tokenizer.
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
        state = tokenizer.backend_tokenizer.to_str()
    else:
        state = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    probe = tokenizer("a")["input_ids"]  # shows whether special tokens are added
    parts = [type(tokenizer).__name__, state, tokenizer.bos_token_id, tokenizer.eos_token_id, probe]
    if chat:
        parts.append(tokenizer.chat_template)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
