# SPDX-License-Identifier: Apache-2.0
"""SentencePiece models and characters as a tokenizer.json, which transformers reads.

The ids are the same. A SentencePiece model is checked for it: the two libraries share no code.
"""

import functools
import re
from typing import TYPE_CHECKING

from gpt2_jax.files import first_line
from gpt2_jax.tokenizer.characters import Characters
from gpt2_jax.tokenizer.huggingface import HuggingFace
from gpt2_jax.tokenizer.sentencepiece import SPACE_SYMBOL, SentencePiece

if TYPE_CHECKING:
  import tokenizers

# The numbers of SentencePiece's proto.
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# What the two libraries could cut in two ways: spaces, ends of lines, composed characters,
# ligatures, characters that no piece has, what looks like a piece of control.
PROBES = (
  "",
  " ",
  "hello world, this is a test of 12345 tokens",
  "  two  spaces   three\n\n    indented\tby a tab \r\n",
  "caf\u00e9 cafe\u0301 na\u00efve \ufb01ne \uff21\uff22\uff23 \u212b \u00bd",
  "\u65e5\u672c \u4f60\u597d \ud55c\uad6d\uc5b4 \u0440\u0443\u0441 \u03b1\u03b2\u03b3 \u0e44\u0e17",
  "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \ufeff\u200b\u00a0\u3000\u00ad",
  "aaaa aaaaaaa ......... ((((())))) ======== \u2047 \u0001",
)


def characters_as_json(tokenizer: Characters) -> HuggingFace:
  """The characters as words of a tokenizer.json, which raises for unknown ones, too."""
  import tokenizers

  vocab = {character: i for i, character in enumerate(tokenizer.alphabet)}
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=""))
  every_character = tokenizers.Regex("(?m:.)")
  words.pre_tokenizer = tokenizers.pre_tokenizers.Split(every_character, "isolated")
  words.decoder = tokenizers.decoders.Fuse()
  return HuggingFace(words.to_str())


def sentencepiece_as_json(tokenizer: SentencePiece) -> HuggingFace:
  """A SentencePiece model as a tokenizer.json. Raises ValueError if the ids would be others."""
  import tokenizers

  proto = _parse(tokenizer.proto)
  # The other library looks up a line's \r\n as one character. Where this model makes the same of
  # it as of two line feeds, it is given those.
  joins_crlf = tokenizer.library_ids("a\r\nb") == tokenizer.library_ids("a\n\nb")
  try:
    converted = _build(proto, joins_crlf)
  except ValueError:
    raise
  except Exception as error:
    # The library raises plain ones for what it cannot parse.
    reason = first_line(error, 120)
    raise ValueError(f"the SentencePiece model has no tokenizer.json ({reason})") from error

  # What control pieces there are is special; what the user defined is never cut.
  special = []
  for piece in proto.pieces:
    if piece.type in (CONTROL, UNKNOWN):
      special.append(tokenizers.AddedToken(piece.piece, normalized=False, special=True))
  converted.add_tokens(special)

  result = HuggingFace(converted.to_str(), tokenizer.eot)
  _check_same_ids(tokenizer, result, proto)
  return result


def _check_same_ids(tokenizer: SentencePiece, converted: HuggingFace, proto) -> None:
  """Raises ValueError unless the two give equal ids for the probes and for pieces in a row."""
  pieces = [piece.piece for piece in proto.pieces if piece.type == NORMAL]
  words = "".join(pieces[:: max(1, len(pieces) // 2000)]).replace(SPACE_SYMBOL, " ")
  for text in (*PROBES, words, words[::-1]):
    # The library's own ids: the space symbol is to be a space here.
    expected = tokenizer.library_ids(text)
    actual = converted.encode(text)
    if actual != expected:
      raise ValueError(
        f"the SentencePiece model has no tokenizer.json with the same ids: {text[:40]!r} would be "
        f"{actual[:8]}, and is {expected[:8]}"
      )


def _build(proto, joins_crlf: bool) -> "tokenizers.Tokenizer":
  """The tokenizer that does what the model's own settings say."""
  import tokenizers

  trainer, rules = proto.trainer_spec, proto.normalizer_spec
  user_defined = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
  if trainer.model_type == UNIGRAM:
    model = _unigram(proto)
  elif trainer.model_type == BPE:
    model = _bpe(proto, bool(user_defined))
  else:
    raise ValueError("a SentencePiece model of words or characters has no form in tokenizer.json")
  built = tokenizers.Tokenizer(model)

  # 1. Normalize as the library does, in its order. Only spaces are removed, no other blanks.
  normalizers, replace = [], tokenizers.normalizers.Replace
  if rules.precompiled_charsmap:
    if joins_crlf:
      normalizers.append(replace("\r\n", "\n\n"))
    normalizers.append(tokenizers.normalizers.Precompiled(rules.precompiled_charsmap))
  if rules.remove_extra_whitespaces:
    normalizers.append(replace(tokenizers.Regex(r"\A +| +\z"), ""))
    normalizers.append(replace(tokenizers.Regex(" {2,}"), " "))
  if rules.escape_whitespaces:
    normalizers.append(replace(" ", SPACE_SYMBOL))
  if rules.add_dummy_prefix:
    # An empty text gets no prefix.
    normalizers.append(replace(tokenizers.Regex(r"\A(?=.|\n)"), SPACE_SYMBOL))
  built.normalizer = tokenizers.normalizers.Sequence(normalizers)

  # 2. What the user defined is one token wherever it stands.
  if user_defined:
    longest_first = sorted(user_defined, key=len, reverse=True)
    pattern = tokenizers.Regex("|".join(map(re.escape, longest_first)))
    built.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")

  # 3. Back: bytes to characters, and without the prefix.
  decoders = [tokenizers.decoders.Replace(SPACE_SYMBOL, " ")]
  if trainer.byte_fallback:
    decoders.append(tokenizers.decoders.ByteFallback())
  decoders.append(tokenizers.decoders.Fuse())
  if rules.add_dummy_prefix:
    decoders.append(tokenizers.decoders.Strip(" ", 1, 0))
  built.decoder = tokenizers.decoders.Sequence(decoders)
  return built


def _unigram(proto) -> "tokenizers.models.Unigram":
  import tokenizers

  vocab = [(piece.piece, piece.score) for piece in proto.pieces]
  trainer = proto.trainer_spec
  return tokenizers.models.Unigram(vocab, trainer.unk_id, trainer.byte_fallback)


def _bpe(proto, has_user_defined: bool) -> "tokenizers.models.BPE":
  """BPE whose merges are all ways to make a piece of two, the piece of the highest score first."""
  import tokenizers

  vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
  scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
  ranked = []
  for token, score in scores.items():
    for cut in range(1, len(token)):
      if token[:cut] in scores and token[cut:] in scores:
        ranked.append((-score, vocab[token], token[:cut], token[cut:]))
  merges = [(left, right) for _, _, left, right in sorted(ranked)]
  return tokenizers.models.BPE(
    vocab,
    merges,
    unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
    fuse_unk=True,
    byte_fallback=proto.trainer_spec.byte_fallback,
    ignore_merges=has_user_defined,
  )


def _parse(content: bytes):
  from google.protobuf.message import DecodeError

  model = _model_class()()
  try:
    model.ParseFromString(content)
  except DecodeError as error:
    raise ValueError(f"{len(content):,} bytes are no SentencePiece model") from error
  return model


@functools.cache
def _model_class() -> type:
  """The message of a SentencePiece model, of which only the fields used here are declared.

  It is declared in a pool of its own: the library and transformers each bring one, and whoever
  comes second to the pool that all share fails.
  """
  from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

  kinds = descriptor_pb2.FieldDescriptorProto
  text, number, real = kinds.TYPE_STRING, kinds.TYPE_INT32, kinds.TYPE_FLOAT
  boolean, content, message = kinds.TYPE_BOOL, kinds.TYPE_BYTES, kinds.TYPE_MESSAGE

  # (name, number, type, default), of sentencepiece_model.proto.
  messages = {
    "Piece": [("piece", 1, text, ""), ("score", 2, real, "0"), ("type", 3, number, "1")],
    "TrainerSpec": [
      ("model_type", 3, number, "1"),
      ("byte_fallback", 35, boolean, "false"),
      ("unk_id", 40, number, "0"),
    ],
    "NormalizerSpec": [
      ("precompiled_charsmap", 2, content, ""),
      ("add_dummy_prefix", 3, boolean, "true"),
      ("remove_extra_whitespaces", 4, boolean, "true"),
      ("escape_whitespaces", 5, boolean, "true"),
    ],
    "Model": [
      ("pieces", 1, message, ".Piece"),
      ("trainer_spec", 2, message, ".TrainerSpec"),
      ("normalizer_spec", 3, message, ".NormalizerSpec"),
    ],
  }
  file = descriptor_pb2.FileDescriptorProto(name="sentencepiece_fields.proto", syntax="proto2")
  for name, fields in messages.items():
    declared = file.message_type.add(name=name)
    for field_name, field_number, kind, default in fields:
      field = declared.field.add(name=field_name, number=field_number, type=kind, label=1)
      if kind == message:
        field.type_name = default
      else:
        field.default_value = default
      if field_name == "pieces":
        field.label = kinds.LABEL_REPEATED

  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName("Model"))
