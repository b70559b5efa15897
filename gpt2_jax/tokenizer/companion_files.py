# SPDX-License-Identifier: Apache-2.0
"""What transformers keeps beside a vocabulary: added tokens, special tokens, chat template, class.

The files are tokenizer_config.json, special_tokens_map.json, added_tokens.json and
chat_template.jinja. Their meaning is the one of transformers, versions 4 and 5.
"""

import dataclasses
import pathlib
from typing import TYPE_CHECKING

from gpt2_jax.files import read_json_object, read_text

if TYPE_CHECKING:
  import tokenizers

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
MORE_CHAT_TEMPLATES = "additional_chat_templates"
COMPANIONS = (CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS, CHAT_TEMPLATE)

# The special tokens that have names, in the order in which transformers gives new ones their ids.
NAMED_TOKENS = (
  "bos_token",
  "eos_token",
  "unk_token",
  "sep_token",
  "pad_token",
  "cls_token",
  "mask_token",
)
TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")

# What the class makes of its files, or where they lay: a tokenizer.json says the first itself.
_NOT_CARRIED = {
  "added_tokens_decoder",
  "auto_map",
  "backend",
  "device_map",
  "do_basic_tokenize",
  "do_lower_case",
  "extra_ids",
  "files_loaded",
  "init_inputs",
  "is_local",
  "legacy",
  "local_files_only",
  "name_or_path",
  "never_split",
  "sp_model_kwargs",
  "strip_accents",
  "tokenize_chinese_chars",
  "tokenizer_class",
}


@dataclasses.dataclass(frozen=True)
class Companions:
  """The files beside a vocabulary, read.

  `fields` are those of tokenizer_config.json with the names of special_tokens_map.json. `added` are
  the added tokens by their ids, each with the flags that it has.
  """

  tokenizer_class: str | None = None
  fields: dict = dataclasses.field(default_factory=dict)
  added: dict[int, dict] = dataclasses.field(default_factory=dict)
  # Older files list added tokens without flags: those of a tokenizer.json count more.
  is_legacy: bool = True
  # Whether the model's config.json is one of GPT-2, whose class counts where none is named.
  is_gpt2: bool = False
  # Whether the class or the model's config.json is GPT-1's.
  is_gpt1: bool = False

  def special_tokens(self, defaults: dict[str, str] | None = None) -> list[dict]:
    """The special tokens, named ones first; `defaults` are the class's own names."""
    fields = (defaults or {}) | self.fields
    values = [fields[name] for name in NAMED_TOKENS if fields.get(name)]

    # A field of a fine-tune's own, such as user_token, names a special token, too.
    for name, value in self.fields.items():
      is_token = name.endswith("_token") and isinstance(value, str | dict)
      if is_token and value and name not in NAMED_TOKENS:
        values.append(value)
    for name in TOKEN_LISTS:
      tokens = self.fields.get(name) or []
      if not isinstance(tokens, list | dict):
        raise ValueError(f"{name} is {str(tokens)[:40]!r}, no list of tokens")
      values += tokens.values() if isinstance(tokens, dict) else tokens
    return [token_spec(value, special=True) for value in values]

  def carried(self, defaults: dict[str, str] | None = None) -> dict:
    """The fields that a tokenizer.json cannot say, each token by how it is written."""
    carried = dict(defaults or {})
    for name, value in self.fields.items():
      if name in _NOT_CARRIED or name.endswith("_file"):
        continue
      if name in TOKEN_LISTS and isinstance(value, list):
        value = [token_spec(token, special=True)["content"] for token in value]
      elif name.endswith("_token") and isinstance(value, dict):
        value = token_spec(value, special=True)["content"]
      carried[name] = value
    return carried


def read_companions(folder: pathlib.Path) -> Companions:
  """Reads the files beside a vocabulary; those that are not there say nothing.

  Raises ValueError for what is not as transformers writes it.
  """
  fields = _read_object(folder / CONFIG)

  # 1. The class. Old checkpoints state it in the model's config.
  config = _read_object(folder / "config.json")
  stated = fields.get("tokenizer_class") or config.get("tokenizer_class")
  tokenizer_class = None if stated is None else str(stated)[:80].removesuffix("Fast")

  # 2. Added tokens. Newer files give their flags; only without them do older files count.
  is_legacy = "added_tokens_decoder" not in fields
  if is_legacy:
    fields |= _read_object(folder / SPECIAL_TOKENS_MAP)
    added = _legacy_tokens(folder / ADDED_TOKENS, fields)
  else:
    added = _decoder_tokens(fields["added_tokens_decoder"], folder / CONFIG)

  # 3. Chat templates in files of their own.
  templates = _read_templates(folder)
  if templates:
    fields["chat_template"] = templates
  is_gpt2 = config.get("model_type") == "gpt2"
  is_gpt1 = config.get("model_type") == "openai-gpt" or tokenizer_class == "OpenAIGPTTokenizer"
  return Companions(tokenizer_class, fields, added, is_legacy, is_gpt2, is_gpt1)


def token_spec(value: object, special: bool) -> dict:
  """A token with its flags, from how it is written or from an object. Raises ValueError."""
  if isinstance(value, str):
    value = {"content": value, "normalized": not special}
  if not isinstance(value, dict) or not isinstance(value.get("content"), str):
    raise ValueError(f"a token is a string or an object with content, not {str(value)[:60]!r}")
  if not value["content"]:
    raise ValueError("a token is an empty string")

  spec = {"content": value["content"], "special": special or value.get("special", False)}
  # As the library has it, unless the file says otherwise.
  spec["normalized"] = value.get("normalized", not spec["special"])
  for flag in ("lstrip", "rstrip", "single_word"):
    spec[flag] = value.get(flag, False)
  for flag, is_set in spec.items():
    if flag != "content" and not isinstance(is_set, bool):
      raise ValueError(f"{flag} of {spec['content'][:40]!r} is {str(is_set)[:40]!r}, no bool")
  return spec


def add_tokens(
  tokenizer: "tokenizers.Tokenizer", companions: Companions, defaults: dict[str, str], place: str
) -> bool:
  """Adds the tokens that the files name to a tokenizer; returns whether there were any.

  The class's default tokens are added only where the vocabulary has them. Raises ValueError for a
  token whose id would be another than its file says.
  """
  import tokenizers

  known = {}
  for token in tokenizer.get_added_tokens_decoder().values():
    known[token.content] = _flags(token)
  special = {spec["content"]: spec for spec in companions.special_tokens(defaults)}
  pending = {}

  # 1. Added tokens, in the order of their ids. What is special may be said by name only.
  for _, spec in sorted(companions.added.items()):
    content = spec["content"]
    spec = spec | {"special": spec["special"] or content in special}
    is_known = content in known and (companions.is_legacy or known[content] == spec)
    if not is_known:
      pending[content] = spec

  # 2. Special tokens that are not among them, or not as special ones. A class's default is no
  #    reason for a new id.
  stated = {spec["content"] for spec in companions.special_tokens()}
  for content, spec in special.items():
    is_there = content in stated or has_token(tokenizer, content)
    if content in known and not known[content]["special"]:
      pending[content] = pending.get(content, known[content]) | {"special": True}
    elif is_there and content not in known and content not in pending:
      pending[content] = spec
  tokenizer.add_tokens([tokenizers.AddedToken(**spec) for spec in pending.values()])

  # 3. The library counts on from the vocabulary's end, whatever id a file states.
  for i, spec in companions.added.items():
    actual = tokenizer.token_to_id(spec["content"])
    if actual != i:
      raise ValueError(
        f"{place} gives the added token {spec['content'][:40]!r} the id {i}, and after the "
        f"vocabulary it would be {actual}; save the tokenizer as a tokenizer.json"
      )
  return bool(pending)


def has_token(tokenizer: "tokenizers.Tokenizer", token: str) -> bool:
  return tokenizer.token_to_id(token) is not None


def _flags(token: "tokenizers.AddedToken") -> dict:
  return {
    "content": token.content,
    "lstrip": token.lstrip,
    "rstrip": token.rstrip,
    "single_word": token.single_word,
    "normalized": token.normalized,
    "special": token.special,
  }


def _read_object(path: pathlib.Path) -> dict:
  return read_json_object(path) if path.is_file() else {}


def _legacy_tokens(path: pathlib.Path, fields: dict) -> dict[int, dict]:
  """The tokens of an added_tokens.json, {token: id}; special are those that the fields name."""
  named = Companions(fields=fields).special_tokens()
  special = {spec["content"] for spec in named}
  added = {}
  for content, i in _read_object(path).items():
    added[_token_id(i, path)] = token_spec(content, content in special)
  return added


def _decoder_tokens(decoder: object, path: pathlib.Path) -> dict[int, dict]:
  """The tokens of added_tokens_decoder, {id: token with flags}."""
  if not isinstance(decoder, dict):
    raise ValueError(f"{path}: added_tokens_decoder is a {type(decoder).__name__}, not an object")
  added = {}
  for i, token in decoder.items():
    added[_token_id(i, path)] = token_spec(token, special=False)
  return added


def _token_id(value: object, path: pathlib.Path) -> int:
  # The type itself, since True is an int to isinstance. As a name in JSON it is a string.
  digits = str(value) if type(value) in (int, str) else ""
  if not digits.isdecimal() or len(digits) > 9:
    raise ValueError(f"{path} gives an added token the id {str(value)[:40]!r}; ids count from 0")
  return int(digits)


def _read_templates(folder: pathlib.Path) -> str | list[dict] | None:
  """The chat templates of a folder's own files: one text, or several with their names."""
  default = None
  if (folder / CHAT_TEMPLATE).is_file():
    default = read_text(folder / CHAT_TEMPLATE)
  named = []
  for path in sorted((folder / MORE_CHAT_TEMPLATES).glob("*.jinja")):
    named.append({"name": path.stem, "template": read_text(path)})
  if not named:
    return default
  if default is not None:
    named.insert(0, {"name": "default", "template": default})
  return named
