# SPDX-License-Identifier: Apache-2.0
"""Generation config: every option of text generation in one value, and the completions that result.

`generate`, `complete`, `stream` and `stream_rows` make a `Generation` of their keywords, or take
one as it is; everything behind them passes it on.
"""

import dataclasses
import difflib
import inspect
import numbers

import jax.numpy as jnp

from gpt2_jax.decoding.kv_cache import check_seed
from gpt2_jax.decoding.samplers import Greedy, Sample, make_sampler
from gpt2_jax.tokenizer import check_unicode

DEFAULT_N_NEW = 128

# With a window a row may have any length, but it is one array of tokens.
MAX_N_NEW = 2**24
MAX_SAMPLES = 2**20


@dataclasses.dataclass(frozen=True)
class Completion:
  """The new tokens of one prompt: what every decoding method returns.

  `tokens` leave `eot` out; `finished` says that it came. `logprobs` are those of the tokens under
  the model's own distribution, which no filter has touched, in nats; None unless they were asked
  for. `score` is what ranked a beam; None where nothing is ranked.
  """

  tokens: list[int]
  logprobs: list[float] | None = None
  score: float | None = None
  finished: bool = False


@dataclasses.dataclass(frozen=True)
class SlidingWindow:
  """Sliding window: lets a row outgrow the context by forgetting its oldest tokens.

  When the context is full, the oldest `stride` tokens but for the first `keep` are forgotten.
  GPT-2's positions are learned and absolute, so the rest is read again from position 0: one
  prefill every `stride` tokens. What a row remembers depends on its length alone.
  """

  stride: int
  keep: int = 0

  def __post_init__(self):
    if self.stride < 1 or self.keep < 0:
      raise ValueError(
        f"a window with stride {self.stride} and keep {self.keep}: they are 1 and 0 or more"
      )

  def check(self, n_ctx: int) -> None:
    """Raises ValueError if nothing of a context would be left."""
    if self.stride + self.keep >= n_ctx:
      raise ValueError(
        f"stride {self.stride} and keep {self.keep} leave nothing of a context of {n_ctx}; "
        f"make them smaller"
      )

  def forgotten(self, length, n_ctx: int):
    """How many tokens a row of this length has forgotten; the rest is at most `n_ctx`."""
    return -(-jnp.maximum(length - n_ctx, 0) // self.stride) * self.stride


@dataclasses.dataclass(frozen=True)
class Generation:
  """All options of text generation, checked once.

  `n_new` is the most tokens that are added; None is 128, or fewer where the context has no room
  behind the longest prompt. `eot` ends a row; None is the tokenizer's for texts, and none for
  tokens. `stop` strings end a text; `generate` has none. `samples` is the number of completions of
  each prompt. `window` lets rows outgrow the context. `logprobs` are kept if asked for.
  """

  n_new: int | None = None
  sampler: Greedy | Sample = Sample()
  seed: int = 0
  samples: int = 1
  stop: tuple[str, ...] = ()
  eot: int | None = None
  window: SlidingWindow | None = None
  logprobs: bool = False

  def __post_init__(self):
    if isinstance(self.stop, str) or not all(self.stop):
      raise ValueError(f"stop strings {self.stop!r}: give a sequence of texts, none of them empty")
    for text in self.stop:
      check_unicode(text, "the stop string")

    if not isinstance(self.sampler, Greedy | Sample):
      raise ValueError(
        f"sampler is {str(self.sampler)[:80]}; give Greedy(), Sample((TopK(40),)), "
        f"or keywords such as top_k=40"
      )
    if not isinstance(self.window, SlidingWindow | None):
      raise ValueError(f"window is {str(self.window)[:80]}; give SlidingWindow(stride) or None")
    for name in ("n_new", "samples", "seed", "eot"):
      value = getattr(self, name)
      if value is not None and not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} is {str(value)[:80]}; it is a whole number")
    self._check_ranges()

    # A list is as good; a tuple can be hashed and compared.
    object.__setattr__(self, "stop", tuple(self.stop))

  def _check_ranges(self) -> None:
    """Raises ValueError for numbers that no model could take."""
    check_seed(self.seed)
    for name, limit in (("n_new", MAX_N_NEW), ("samples", MAX_SAMPLES)):
      value = getattr(self, name)
      if value is not None and not 1 <= value <= limit:
        raise ValueError(f"{name} is {str(value)[:80]}; it is from 1 to {limit:,}")

  def with_n_new(self, longest: int, n_ctx: int) -> "Generation":
    """Fills in `n_new` if it is None: 128, or the room behind the longest prompt."""
    if self.n_new is not None:
      return self
    if self.window is not None:
      return dataclasses.replace(self, n_new=DEFAULT_N_NEW)

    # A full context predicts one token more. At least 1, so that a longer prompt is refused with
    # the numbers, like any other request.
    room = max(1, n_ctx + 1 - longest)
    return dataclasses.replace(self, n_new=min(DEFAULT_N_NEW, room))


def make_generation(
  generation: Generation | None,
  n_new: int | None,
  sampler: Greedy | Sample | None,
  options: dict,
  default: Greedy | Sample,
) -> Generation:
  """A `Generation` from the arguments of a public function: as a whole, or from keywords.

  `options` are fields of `Generation` and keywords of `make_sampler`; None is as good as absent.
  `default` samples where neither a sampler nor one of its options is given. Raises ValueError on
  two answers to one question, and TypeError on an unknown keyword.
  """
  # 1. Only what there is. A misspelled keyword would be left out silently.
  fields = {field.name for field in dataclasses.fields(Generation)}
  known = fields | inspect.signature(make_sampler).parameters.keys()
  for name in options.keys() - known:
    near = difflib.get_close_matches(name, known, 1, cutoff=0)[0]
    raise TypeError(f"text generation has no keyword {name!r}; did you mean {near!r}?")

  # 2. A whole one leaves nothing open.
  keywords = {"n_new": n_new, "sampler": sampler} | options
  keywords = {name: value for name, value in keywords.items() if value is not None}
  if generation is not None:
    if not isinstance(generation, Generation):
      raise ValueError(f"generation is a {type(generation).__name__}; give Generation(...)")
    if keywords:
      raise ValueError(
        f"generation= together with {', '.join(keywords)}: give one of both, "
        f"or dataclasses.replace(generation, ...)"
      )
    return generation

  # 3. What is no field of a Generation is an option of its sampler.
  sampling = {name: keywords.pop(name) for name in list(keywords) if name not in fields}
  if sampling and sampler is not None:
    raise ValueError(
      f"sampler= together with {', '.join(sampling)}: give one of both; filters of a sampler "
      f"are its argument, Sample((Temperature(0.8), TopK(40)))"
    )
  if sampling:
    sampler = make_sampler(**sampling)
  return Generation(**keywords | {"sampler": sampler or default})
