# SPDX-License-Identifier: Apache-2.0
"""Reads the tokenizer of a folder: whichever of the field's files lie in it.

A tokenizer.json, a vocabulary with its merges, WordPiece's vocab.txt, a SentencePiece model, with
what transformers keeps beside them. Files that are not read are an error, never another tokenizer.
"""

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING

from gpt2_jax.files import parse_json_object, read_json_object, read_text, summarize
from gpt2_jax.tokenizer.as_tokenizer_json import sentencepiece_as_json
from gpt2_jax.tokenizer.companion_files import (
  CONFIG,
  Companions,
  add_tokens,
  has_token,
  read_companions,
)
from gpt2_jax.tokenizer.gpt1_bpe import (
  HUGGING_FACE_FILES,
  OPENAI_FILES,
  Gpt1Bpe,
  read_gpt1_bpe,
)
from gpt2_jax.tokenizer.huggingface import HuggingFace, open_tokenizer_json
from gpt2_jax.tokenizer.interface import EOT, Tokenizer
from gpt2_jax.tokenizer.sentencepiece import SentencePiece

if TYPE_CHECKING:
  import tokenizers

TOKENIZER_JSON = "tokenizer.json"
WORD_PIECES = "vocab.txt"
# The vocabulary and its merges, by Hugging Face's names and by OpenAI's.
VOCAB_AND_MERGES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
MODELS = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
VOCABULARIES = (TOKENIZER_JSON, WORD_PIECES, *VOCAB_AND_MERGES[0], *VOCAB_AND_MERGES[1], *MODELS)

# What else holds a vocabulary, and is not read.
UNREAD = ("*.model", "*.tiktoken", "*.spm", "*.vocab", "*vocab*.txt", "*vocab*.json", "dict.txt")
UNREAD += ("tekken.json", "vocab.pkl", "*merges*.txt")

# The classes of transformers that make the same of their files; None is a class that is not named.
GENERIC = (None, "PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
ROBERTA = ("RobertaTokenizer", "BartTokenizer")
BYTE_LEVEL = ("GPT2Tokenizer", *ROBERTA)
BERT = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
SENTENCE_PIECE = ("T5Tokenizer", "LlamaTokenizer", "ReformerTokenizer")

# The special tokens of a class that its files need not name.
GPT2_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT)
BERT_TOKENS = {
  "unk_token": "[UNK]",
  "sep_token": "[SEP]",
  "pad_token": "[PAD]",
  "cls_token": "[CLS]",
  "mask_token": "[MASK]",
}
ROBERTA_TOKENS = {
  "bos_token": "<s>",
  "eos_token": "</s>",
  "unk_token": "<unk>",
  "sep_token": "</s>",
  "pad_token": "<pad>",
  "cls_token": "<s>",
  "mask_token": "<mask>",
}


def read_folder(folder: pathlib.Path) -> Tokenizer | None:
  """The tokenizer of a folder's files; None where there is none.

  Raises ValueError for damaged files, and for those that are not read.
  """
  missing = [name for name in OPENAI_FILES if not (folder / name).is_file()]
  if not missing:
    return read_gpt1_bpe(folder, OPENAI_FILES)
  if len(missing) < len(OPENAI_FILES):
    raise ValueError(
      f"it has half of GPT-1's vocabulary, without {missing[0]}: put that beside it, or take the "
      f"other one away"
    )
  if not any((folder / name).is_file() for name in VOCABULARIES):
    return _check_unread(folder)
  companions = read_companions(folder)
  if companions.is_gpt1:
    return _read_gpt1(folder, companions)

  # 1. A tokenizer.json says the most.
  path = folder / TOKENIZER_JSON
  if path.is_file():
    return read_tokenizer_json(path, companions)

  # 2. Else the class decides which files count, and GPT-2's come first.
  name = companions.tokenizer_class
  reads_word_pieces = name in (*GENERIC, *BERT) and (folder / WORD_PIECES).is_file()
  if reads_word_pieces and name in BERT:
    return read_word_pieces(folder / WORD_PIECES, companions)
  for vocab, merges in VOCAB_AND_MERGES:
    is_pair = (folder / vocab).is_file() and (folder / merges).is_file()
    if is_pair and name in (*GENERIC, *BYTE_LEVEL):
      return _read_merges(folder / vocab, folder / merges, companions)
  for model in MODELS:
    if (folder / model).is_file() and name in (*GENERIC, *SENTENCE_PIECE):
      return _read_model(folder / model, companions)
  if reads_word_pieces:
    return read_word_pieces(folder / WORD_PIECES, companions)

  # 3. What is left is half of a pair, or a class's own way of reading.
  present = [file for file in VOCABULARIES if (folder / file).is_file()]
  raise ValueError(_why_not(present, name))


def _read_gpt1(folder: pathlib.Path, companions: Companions) -> Gpt1Bpe:
  """GPT-1's BPE from the pair of files, or from the tokenizer.json that transformers 5 makes of it.

  Of the latter the vocabulary and the merges count: words are cut as OpenAI's code cuts them.
  """
  # 1. The vocabulary and its merges.
  special = [spec["content"] for spec in companions.special_tokens()]
  added = {i: str(spec["content"]) for i, spec in companions.added.items()}
  if all((folder / name).is_file() for name in HUGGING_FACE_FILES):
    tokenizer = read_gpt1_bpe(folder, HUGGING_FACE_FILES, special)
  elif (folder / TOKENIZER_JSON).is_file():
    content = read_text(folder / TOKENIZER_JSON)
    check_tokenizer_json(content, TOKENIZER_JSON)
    payload = parse_json_object(content, TOKENIZER_JSON)
    tokenizer = Gpt1Bpe.from_tokenizer_json(payload, special)
    for token in payload.get("added_tokens") or ():
      added[token["id"]] = token["content"]
  else:
    present = [file for file in VOCABULARIES if (folder / file).is_file()]
    raise ValueError(_why_not(present, companions.tokenizer_class))

  # 2. Added tokens count on from the vocabulary's end.
  size = tokenizer.vocab_size
  beyond = {i: token for i, token in added.items() if i >= size}
  if sorted(beyond) != list(range(size, size + len(beyond))):
    raise ValueError(
      f"its added tokens have the ids {summarize(sorted(beyond), 4)}, and the vocabulary ends with "
      f"{size - 1}"
    )
  return tokenizer.with_tokens([beyond[i] for i in sorted(beyond)]) if beyond else tokenizer


def _why_not(present: list[str], name: str | None) -> str:
  files = summarize(present)
  for pair in VOCAB_AND_MERGES:
    halves = [file for file in pair if file in present]
    if len(halves) == 1:
      missing = next(file for file in pair if file not in present)
      return f"{files} is there and {missing} is not: one does not cut a text without the other"
  return (
    f"its class {name!r} reads {files} in a way of its own, which is not known here; save it as a "
    f"tokenizer.json with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
  )


def _check_unread(folder: pathlib.Path) -> None:
  """Raises ValueError if the folder holds a tokenizer of a kind that is not read."""
  unread = set()
  for pattern in UNREAD:
    unread |= {path.name for path in folder.glob(pattern) if path.is_file()}
  if unread:
    raise ValueError(
      f"it is of a kind that is not read ({summarize(sorted(unread), 4)}); save it as a "
      f"tokenizer.json with transformers, or name it as the field does ({', '.join(VOCABULARIES)})"
    )

  # A config without a vocabulary may stand for GPT-2's own, and for no other.
  companions = read_companions(folder)
  if companions.tokenizer_class not in (*GENERIC, "GPT2Tokenizer") or companions.added:
    raise ValueError(
      f"{CONFIG} is there and its vocabulary is not ({', '.join(VOCABULARIES)}); fetch that, too"
    )


def read_tokenizer_json(path: pathlib.Path, companions: Companions | None = None) -> HuggingFace:
  """Reads a tokenizer.json, with the `companions` that lie beside it."""
  content = read_text(path)
  payload = parse_json_object(content, str(path))
  companions = companions or Companions(tokenizer_class="TokenizersBackend")
  name = companions.tokenizer_class
  if name is None and companions.is_gpt2:
    name = "GPT2Tokenizer"

  # The class's own settings count more than the file's, as transformers has it.
  if _apply_class(payload, name, companions.fields):
    content = json.dumps(payload, ensure_ascii=False)
  return _finish(HuggingFace(content), companions, _default_tokens(name), path.name)


def _default_tokens(name: str | None) -> dict[str, str]:
  if name in ROBERTA:
    return ROBERTA_TOKENS
  if name in BERT:
    return BERT_TOKENS
  return GPT2_TOKENS if name in (None, "GPT2Tokenizer") else {}


def _apply_class(payload: dict, name: str | None, fields: dict) -> bool:
  """Applies the settings of a class to a tokenizer.json; returns whether any was another."""
  part, settings = None, {}
  if name in BYTE_LEVEL:
    part, settings = "pre_tokenizer", {"add_prefix_space": fields.get("add_prefix_space", False)}
  elif name in BERT:
    part, settings = "normalizer", _bert_settings(fields)

  stated = payload.get(part) if part else None
  is_theirs = isinstance(stated, dict) and stated.get("type") in ("ByteLevel", "BertNormalizer")
  if not is_theirs or all(stated.get(key) == value for key, value in settings.items()):
    return False
  payload[part] = stated | settings
  return True


def _bert_settings(fields: dict) -> dict:
  """The normalizer's settings by the names of BERT's config."""
  settings = {
    "lowercase": fields.get("do_lower_case", True),
    "strip_accents": fields.get("strip_accents"),
    "handle_chinese_chars": fields.get("tokenize_chinese_chars", True),
  }
  for name, value in settings.items():
    if not isinstance(value, bool) and (value is not None or name != "strip_accents"):
      raise ValueError(f"{name} of the tokenizer's config is {str(value)[:40]!r}, no bool")
  return settings


def _read_merges(vocab: pathlib.Path, merges: pathlib.Path, companions: Companions) -> HuggingFace:
  """Byte-level BPE of a vocabulary and its merges."""
  lines = read_text(merges).split("\n")
  # The first line may be one of version.
  if lines[0].startswith("#version"):
    lines = lines[1:]
  pairs = [tuple(line.split()) for line in lines if line]

  add_prefix_space = companions.fields.get("add_prefix_space", False)
  if not isinstance(add_prefix_space, bool):
    raise ValueError(f"add_prefix_space is {str(add_prefix_space)[:40]!r}, no bool")
  tokenizer = HuggingFace.from_merges(read_json_object(vocab), pairs, add_prefix_space)
  defaults = _default_tokens(companions.tokenizer_class)
  return _finish(tokenizer, companions, defaults, vocab.name)


def read_word_pieces(path: pathlib.Path, companions: Companions | None = None) -> HuggingFace:
  """Reads BERT's WordPiece, a token a line, as transformers' BertTokenizer does."""
  companions = companions or read_companions(path.parent)
  if not companions.fields.get("do_basic_tokenize", True):
    raise ValueError(
      "do_basic_tokenize is false in its config, which is not read; save it as a tokenizer.json "
      "with transformers"
    )
  lines = read_text(path).split("\n")
  if lines and not lines[-1]:
    lines.pop()
  vocab = {line.removesuffix("\r"): i for i, line in enumerate(lines)}
  unknown = str(companions.fields.get("unk_token") or BERT_TOKENS["unk_token"])
  tokenizer = HuggingFace.from_word_pieces(vocab, unknown, **_bert_settings(companions.fields))
  return _finish(tokenizer, companions, BERT_TOKENS, path.name)


def _read_model(path: pathlib.Path, companions: Companions) -> HuggingFace:
  """A SentencePiece model, whose ids are the library's own."""
  model = SentencePiece(path.read_bytes())
  tokenizer = sentencepiece_as_json(model)

  defaults = model.control_names()
  if companions.tokenizer_class == "T5Tokenizer":
    defaults = {"pad_token": "<pad>"} | defaults
  return _finish(dataclasses.replace(tokenizer, end=None), companions, defaults, path.name)


def check_tokenizer_json(payload: str, place: str) -> "tokenizers.Tokenizer":
  """Opens a tokenizer.json. Raises ValueError for one that cuts a text at random, or is empty."""
  opened = open_tokenizer_json(payload)
  dropout = parse_json_object(payload, place)["model"].get("dropout")
  if dropout:
    raise ValueError(
      f"{place} has BPE dropout {str(dropout)[:20]}: a text would have other ids each time; set it "
      f"to null"
    )
  if not opened.get_vocab_size():
    raise ValueError(f"{place} has no tokens")
  return opened


def _finish(
  tokenizer: HuggingFace, companions: Companions, defaults: dict[str, str], place: str
) -> HuggingFace:
  """The tokenizer with the tokens and fields of the files beside it.

  Raises ValueError for one that has no tokens, or cuts a text at random.
  """
  # 1. What no model can be used with.
  opened = check_tokenizer_json(tokenizer.payload, place)

  # 2. Tokens, and what stands before and after a text for those who ask for it.
  is_changed = add_tokens(opened, companions, defaults, place)
  known = {name: token for name, token in defaults.items() if has_token(opened, token)}
  carried = companions.carried(known)
  if opened.post_processor is None:
    is_changed |= _add_template(opened, companions.tokenizer_class, carried)
  payload = opened.to_str() if is_changed else tokenizer.payload

  # 3. The end of a text, unless it is the one that is looked up.
  end = opened.token_to_id(str(carried.get("eos_token", "")))
  if end == opened.token_to_id(EOT):
    end = None
  # Of GPT-2's own names nothing need be kept.
  has_fields = bool(companions.fields) or (bool(known) and defaults != GPT2_TOKENS)
  config = json.dumps(carried, sort_keys=True, ensure_ascii=False) if has_fields else None
  return HuggingFace(payload, end, config)


def _add_template(opened: "tokenizers.Tokenizer", name: str | None, carried: dict) -> bool:
  """Adds the special tokens that a class puts around a text; returns whether there are any.

  A text of a corpus gets none. They are for those to whom the tokenizer is written.
  """
  import tokenizers

  # 1. Which ones.
  if name in (*BERT, *ROBERTA):
    first, last = carried.get("cls_token"), carried.get("sep_token")
  else:
    adds_first = carried.get("add_bos_token", name == "LlamaTokenizer")
    adds_last = carried.get("add_eos_token", name == "T5Tokenizer")
    first = carried.get("bos_token") if adds_first else None
    last = carried.get("eos_token") if adds_last else None
  tokens = [str(token) for token in (first, last) if token]
  if not tokens or not all(has_token(opened, token) for token in tokens):
    return False

  # 2. Around one text, and around two: BERT gives the second types of its own, RoBERTa parts them
  #    by two tokens.
  before, after = [first] if first else [], [last] if last else []
  single = [*before, "$A", *after]
  if name in BERT:
    pair = [*single, "$B:1", f"{last}:1"]
  elif name in ROBERTA:
    pair = [*single, *after, "$B", *after]
  else:
    pair = [*single, *before, "$B", *after]
  ids = [(token, opened.token_to_id(token)) for token in dict.fromkeys(tokens)]
  opened.post_processor = tokenizers.processors.TemplateProcessing(single, pair, ids)
  return True
