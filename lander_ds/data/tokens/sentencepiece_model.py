"""A SentencePiece `tokenizer.model` as a Hugging Face tokenizer with exactly the same token ids.

transformers' own conversion of a bare `tokenizer.model` leaves out the prefix space, the stripping of white
space and the scores that order BPE merges, so its ids differ from SentencePiece's. This one reads all of them
from the model, and the result saves as a `tokenizer.json` that any Hugging Face tool opens. One difference is
left: where the model normalises by NFKC, a combining mark that follows a space may be encoded otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from lander_ds.common.errors import ModelError

UNIGRAM, BPE_MODEL = 1, 2
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def load_sentencepiece(path: Path, settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of a SentencePiece model.

    Args:
        path: the `tokenizer.model` file.
        settings: what a `tokenizer_config.json` beside it says; it may override special tokens and
            `add_bos_token` (default: a beginning-of-sequence token is added when the model has one).

    Raises:
        ModelError: the file is not a SentencePiece model of type unigram or BPE.
    """
    proto = _parse(path)
    tokenizer = Tokenizer(_model(proto, path))
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.decoder = _decoder(proto.normalizer_spec)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
            for piece in proto.pieces
            if piece.type in {CONTROL, USER_DEFINED}
        ]
    )
    _add_tokens_on_top(tokenizer, settings, path)
    names: dict[str, Any] = {}
    for name in ("bos", "eos", "pad", "unk"):
        index = getattr(proto.trainer_spec, f"{name}_id")
        if 0 <= index < len(proto.pieces):
            names[f"{name}_token"] = proto.pieces[index].piece
    names |= {
        name: _content(settings[name])
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if name in settings
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        add_bos_token=bool(settings.get("add_bos_token", "bos_token" in names))
        and names.get("bos_token") is not None,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **names,
    )


def _add_tokens_on_top(tokenizer: Tokenizer, settings: dict[str, Any], path: Path) -> None:
    """Add the tokens that a fine-tuned model lists behind the SentencePiece pieces."""
    pieces = tokenizer.get_vocab_size()
    listed = {int(index): token for index, token in settings.get("added_tokens_decoder", {}).items()}
    for index in sorted(index for index in listed if index >= pieces):
        token = listed[index]
        tokenizer.add_tokens(
            [AddedToken(token["content"], special=token.get("special", False), normalized=False)]
        )
        if tokenizer.token_to_id(token["content"]) != index:
            raise ModelError(
                f"{path.with_name('tokenizer_config.json')}: added_tokens_decoder gives {token['content']!r} "
                f"the id {index}, which does not follow on the {pieces} pieces of {path.name}: copy both "
                "files of one model"
            )


def _parse(path: Path) -> Any:
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(SentencePieceProcessor(model_file=str(path)).serialized_model_proto())
    except (OSError, RuntimeError):
        raise ModelError(
            f"{path}: is not a SentencePiece model (a Git LFS pointer, a truncated copy or a tiktoken "
            "file?): get the real file, or save the tokenizer as tokenizer.json"
        ) from None
    return proto


def _model(proto: Any, path: Path) -> Unigram | BPE:
    spec = proto.trainer_spec
    if spec.model_type == UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        return Unigram(scores, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    if spec.model_type == BPE_MODEL:
        vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
        unknown = proto.pieces[spec.unk_id].piece
        return BPE(
            vocabulary, _merges(proto), unk_token=unknown, fuse_unk=True, byte_fallback=spec.byte_fallback
        )
    raise ModelError(
        f"{path}: is a SentencePiece model of type word or char: only unigram and BPE models are supported"
    )


def _merges(proto: Any) -> list[tuple[str, str]]:
    # SentencePiece merges the neighbours whose joint piece has the highest score.
    score = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    rank = {piece: index for index, piece in enumerate(score)}
    merges = [
        (-score[piece], rank[piece[:cut]], rank[piece[cut:]], piece[:cut], piece[cut:])
        for piece in score
        for cut in range(1, len(piece))
        if piece[:cut] in rank and piece[cut:] in rank
    ]
    return [(left, right) for _, _, _, left, right in sorted(merges)]


def _normalizer(spec: Any) -> normalizers.Sequence:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence(steps)


def _decoder(spec: Any) -> decoders.Sequence:
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _content(token: Any) -> Any:
    # tokenizer_config.json writes a token as text or as an object with its text under `content`.
    return token["content"] if isinstance(token, dict) else token
