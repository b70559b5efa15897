# SPDX-License-Identifier: Apache-2.0
"""Moderation filter: a usage policy that generated text follows before anyone reads it.

`stream(model, tokenizer, prompt, moderation=load_policy("policy.toml"))`, and the same for
`complete`. A rule has words, or a function that judges sentences, and an action:

  refuse  the text ends before the match, with the policy's refusal
  redact  the match is replaced
  flag    the text passes; the match is counted

Words match as whole words in any case, after Unicode's NFKC and without invisible characters;
spaces in them match any white space. Text is held back while a banned word may have begun in it, so
no half of a word comes out before it is judged. What is judged is what the model writes: of a
prompt only the beginning of a word that the model ends. Paraphrase passes a list of words.
"""

import dataclasses
import hashlib
import json
import os
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from gpt2_jax.files import first_line, local_path, parse_json_object, summarize

ACTIONS = ("refuse", "redact", "flag")
REDACTED = "[redacted]"
REFUSAL = "[refused]"
MAX_BYTES = 1 << 24  # of a policy file

# A log tells equal texts of one process by it; a hash without it could be guessed from short texts.
SALT = os.urandom(16)


@dataclasses.dataclass(frozen=True)
class Rule:
  """What is banned, and what is done about it. `judge` is asked for each sentence or line.

  Raises ValueError for an unknown action, and for words that ban nothing or every text.
  """

  name: str
  action: str
  words: tuple[str, ...] = ()
  judge: Callable[[str], bool] | None = None

  def __post_init__(self):
    rule = f"rule {self.name[:40]!r}"
    if self.action not in ACTIONS:
      raise ValueError(
        f"{rule} has the action {str(self.action)[:40]!r}; it is one of {', '.join(ACTIONS)}"
      )
    if not self.words and self.judge is None:
      raise ValueError(f"{rule} has no words, and bans nothing; give it some, or leave it out")
    if self.words and self.judge is not None:
      raise ValueError(f"{rule} has words and a function; give each a rule of its own")
    for word in self.words:
      if not any(map(str.isalnum, normalize(word)[0])):
        raise ValueError(
          f"{rule} has {word[:40]!r}, which has no letter or digit and would ban nearly every "
          f"text; leave it out"
        )


@dataclasses.dataclass(frozen=True)
class Policy:
  """Rules, the text of a refusal, and where matches are counted: one JSON line for each text.

  The log has no text unless `logs_text` is set: rule names, counts, and a salted hash.
  """

  rules: tuple[Rule, ...]
  refusal: str = REFUSAL
  log: str | None = None
  logs_text: bool = False

  def __post_init__(self):
    if not self.rules:
      raise ValueError("the policy has no rule, and bans nothing; give one, or no policy")


def load_policy(path: str, log: str | None = None, logs_text: bool = False) -> Policy:
  """A policy from a file: `refusal`, a text, and `rules`, of a name, an action and words each.

  The file is TOML, or JSON by its name. Raises ValueError, in one line, for one that is none.
  """
  file = local_path(path)
  if file.stat().st_size > MAX_BYTES:
    raise ValueError(f"{path[:200]} has {file.stat().st_size:,} bytes; a policy has {MAX_BYTES:,}")
  try:
    if file.suffix == ".json":
      settings = parse_json_object(file.read_bytes(), "a policy")
    else:
      settings = tomllib.loads(file.read_text(encoding="utf-8"))
    policy = _parse_policy(settings, log, logs_text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path[:200]}: {first_line(error, 200)}") from error

  # A log that cannot be written is an error here, and not at the first match.
  if log:
    local_path(log).open("a").close()
  return policy


def _parse_policy(settings: dict, log: str | None, logs_text: bool) -> Policy:
  _check_keys(settings, "the policy", {"rules": list, "refusal": str})
  rules = []
  for entry in settings.get("rules", []):
    _check_keys(entry, "a rule", {"name": str, "action": str, "words": list})
    words = entry.get("words", [])
    if "name" not in entry or "action" not in entry or not all(isinstance(w, str) for w in words):
      raise ValueError("a rule has a name, an action, and words, which are texts")
    rules.append(Rule(entry["name"], entry["action"], tuple(words)))
  return Policy(tuple(rules), settings.get("refusal", REFUSAL), log, logs_text)


def _check_keys(settings: object, what: str, types: dict[str, type]) -> None:
  """Raises ValueError unless `settings` is a table of some of these keys, with values of a type."""
  if not isinstance(settings, dict):
    raise ValueError(f"{what} is no table of {', '.join(types)}")
  unknown = sorted(settings.keys() - types.keys())
  if unknown:
    raise ValueError(f"{what} has {summarize(unknown, each=40)}; its keys are {', '.join(types)}")
  for name, value in settings.items():
    if not isinstance(value, types[name]):
      raise ValueError(f"{what} has {name} that is no {types[name].__name__}")


def normalize(text: str) -> tuple[str, list[int]]:
  """The text as words are compared, and for each of its characters where it begins in `text`.

  NFKC and case folding, character by character with its accents; invisible characters are left
  out, and white space is one space. The list has one more place, the end of the text.
  """
  characters, places, begin = [], [], 0
  for end in range(1, len(text) + 1):
    if end < len(text) and _joins(text[end]):
      continue
    folded = unicodedata.normalize("NFKC", text[begin:end]).casefold()
    for character in unicodedata.normalize("NFKC", folded):
      character = " " if character.isspace() else character
      is_shown = unicodedata.category(character) != "Cf"
      if is_shown and not (character == " " and characters[-1:] == [" "]):
        characters.append(character)
        places.append(begin)
    begin = end
  return "".join(characters), [*places, len(text)]


def _joins(character: str) -> bool:
  """Whether it belongs to the character before: an accent, an invisible sign, a vowel of Hangul."""
  is_jamo = "\u1160" <= character <= "\u11ff"
  return is_jamo or unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")


class Filter:
  """What a policy does to one text, in chunks; `counts` are of the rules that matched."""

  def __init__(self, policy: Policy, counts: Counter):
    self.policy = policy
    self.counts = counts
    self.text = ""  # held back
    self.stopped = False

  def act(self, rule: Rule, matched: str) -> str:
    """Counts a match. Returns what stands in its place."""
    self.counts[rule.name] += 1
    if rule.action == "refuse":
      self.stopped = True
      return self.policy.refusal
    return matched if rule.action == "flag" else REDACTED


class WordFilter(Filter):
  """The rules with words: passes text on as soon as no banned word may begin in it."""

  def __init__(self, policy: Policy, counts: Counter, prompt: str = ""):
    super().__init__(policy, counts)
    self.rules = {}
    for rule in policy.rules:
      for word in rule.words:
        self.rules.setdefault(normalize(word)[0].strip(), rule)
    self.lengths = sorted({len(word) for word in self.rules}, reverse=True)
    self.longest = max(self.lengths, default=0) + 1
    self.prefixes = {word[:size] for word in self.rules for size in range(1, len(word) + 1)}

    # The end of what is out already: a word may have begun in it, and a border lies after it.
    self.before = normalize(prompt[-4 * self.longest :])[0][-self.longest :]

  def push(self, text: str, last: bool = False) -> str:
    """What has become certain; all that is left of it if this is the `last` text."""
    self.text += text
    tail, places = normalize(self.text)
    before = self.before.rstrip(" ") if tail.startswith(" ") else self.before
    joined, offset = before + tail, len(before)
    end = len(joined) if last else self._undecided(joined, offset)

    # Matches, from left to right. What is out of one already stays out.
    out, done, place = [], 0, 0
    while place < end and not self.stopped:
      word = self._word_at(joined, place)
      after = place + len(word)
      if not word or after <= offset:
        place += 1
        continue
      begin, stop = places[max(0, place - offset)], _end_of(places, after - offset)
      out.append(self.text[done:begin] + self.act(self.rules[word], self.text[begin:stop]))
      done, place = stop, after
    if self.stopped:
      self.text = ""
      return "".join(out)

    # What comes after a match that reaches beyond what is certain stays here.
    cut = max(done, places[max(0, end - offset)])
    out.append(self.text[done:cut])
    certain = normalize(self.text[:cut])[0]
    self.before = (self.before + certain)[-self.longest :]
    self.text = self.text[cut:]
    return "".join(out)

  def _undecided(self, joined: str, offset: int) -> int:
    """The first character where a word may begin that more text decides on."""
    # An accent may still join the last character.
    end = max(offset, len(joined) - 1)
    for place in range(max(0, len(joined) - self.longest), end):
      if joined[place:] in self.prefixes and self._is_border(joined, place):
        return place
    return end

  def _is_border(self, joined: str, place: int) -> bool:
    """Whether no word goes on over this place."""
    if not 0 < place < len(joined):
      return True
    return not (joined[place - 1].isalnum() and joined[place].isalnum())

  def _word_at(self, joined: str, place: int) -> str:
    """The longest banned word that begins and ends here, or nothing."""
    if not self._is_border(joined, place):
      return ""
    for length in self.lengths:
      word = joined[place : place + length]
      if word in self.rules and self._is_border(joined, place + length):
        return word
    return ""


def _end_of(places: list[int], after: int) -> int:
  """Where the character before `after` ends in the text; NFKC makes several of some."""
  begin = places[after - 1]
  while places[after] == begin:
    after += 1
  return places[after]


class SentenceFilter(Filter):
  """A rule that asks a function: each sentence or line comes out once it is judged."""

  END = re.compile(r"[.!?]+\s+|\n+")

  def __init__(self, policy: Policy, counts: Counter, rule: Rule):
    super().__init__(policy, counts)
    self.rule = rule

  def push(self, text: str, last: bool = False) -> str:
    self.text += text
    ends = [match.end() for match in self.END.finditer(self.text)]
    ends += [len(self.text)] if last and self.text else []
    out, done = [], 0
    for end in ends:
      sentence, done = self.text[done:end], end
      out.append(self.act(self.rule, sentence) if self.rule.judge(sentence) else sentence)
      if self.stopped:
        break
    self.text = self.text[done:]
    return "".join(out)


class Moderator:
  """A policy on one text: its words first, then what its functions judge."""

  def __init__(self, policy: Policy, prompt: str = ""):
    self.policy, self.counts, self.text = policy, Counter(), ""
    self.filters = [WordFilter(policy, self.counts, prompt)]
    self.filters += [SentenceFilter(policy, self.counts, r) for r in policy.rules if r.judge]

  @property
  def stopped(self) -> bool:
    return any(stage.stopped for stage in self.filters)

  def push(self, text: str, last: bool = False) -> str:
    """What may be read; all that is left of it if this is the `last` text."""
    if self.policy.log:
      self.text += text
    for stage in self.filters:
      text = stage.push(text, last)
      last |= stage.stopped
    if last:
      self.close()
    return text

  def close(self) -> None:
    """Appends a line to the policy's log, if anything matched."""
    if not (self.policy.log and self.counts):
      return
    sha256 = hashlib.sha256(SALT + self.text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    line = {"rules": dict(self.counts), "refused": self.stopped, "sha256": sha256}
    if self.policy.logs_text:
      line["text"] = self.text
    with local_path(self.policy.log).open("a", encoding="utf-8") as file:
      file.write(json.dumps(line) + "\n")
    self.counts.clear()


def moderate(
  chunks: Iterator[tuple[int, str, int]], policy: Policy, prompts: Sequence[str]
) -> Iterator[tuple[int, str, int]]:
  """Chunks of rows, with their numbers of tokens, as the policy lets them out.

  `prompts` are those of the rows. It ends where every text has ended.
  """
  moderators = {row: Moderator(policy, prompt) for row, prompt in enumerate(prompts)}
  try:
    for row, chunk, n_tokens in chunks:
      if row not in moderators:
        continue
      yield row, moderators[row].push(chunk), n_tokens
      if moderators[row].stopped:
        del moderators[row]
      if not moderators:
        return
    for row, moderator in moderators.items():
      yield row, moderator.push("", last=True), 0
  finally:
    # Also of texts that nobody read to their end.
    for moderator in moderators.values():
      moderator.close()
