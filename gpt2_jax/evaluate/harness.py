# SPDX-License-Identifier: Apache-2.0
"""This project's models in lm-evaluation-harness, as its model `gpt2_jax`.

  pip install -e '.[harness]'
  python -m gpt2_jax.evaluate.harness --model gpt2_jax --model_args pretrained=gpt2,dtype=bfloat16 \\
    --tasks lambada_openai,blimp --batch_size 64

The harness (0.4.13) knows the models in a table of its own and those that were imported, and looks for no others. So
this command is `lm_eval` itself, all its arguments included, after one import; in Python `import
gpt2_jax.evaluate.harness` before `lm_eval.simple_evaluate(model="gpt2_jax", ...)` does the same.

Scores are those of the harness's own model `hf` on the same weights: the same tokens (`<|endoftext|>` in a text is that
token), contexts that lose their beginning, windows over long texts, stop strings. Draws are not: they come from JAX.
`--batch_size=auto` is 32 rows. `--device` is left alone: JAX computes on all devices that it finds, and JAX_PLATFORMS
says of which kind. JAX warns of the processes that the harness forks to bootstrap its error bars, which do not use it;
DISABLE_MULTIPROC=1 does without them.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Sequence

import jax
from flax import nnx

try:
  import lm_eval.models  # its own, which it would not look for once there is one more  # noqa: F401
  from lm_eval.__main__ import cli_evaluate
  from lm_eval.api.instance import Instance
  from lm_eval.api.model import TemplateLM
  from lm_eval.api.registry import register_model
  from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
except ImportError as error:
  raise ImportError(f"lm-evaluation-harness is not whole here ({error}): pip install 'lm_eval>=0.4.13'") from error

from gpt2_jax.convert.names import shapes
from gpt2_jax.convert.weights import progress
from gpt2_jax.decoding import Greedy, Sample, Temperature, TopK, TopP, ready
from gpt2_jax.evaluate.likelihood import planned_for
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.task import Likelihood
from gpt2_jax.evaluate.writing import write
from gpt2_jax.model import GPT2
from gpt2_jax.pretrained import load_pretrained
from gpt2_jax.sharding import make_mesh

log = logging.getLogger(__name__)

N_NEW = 256  # tokens that `hf` writes where a task does not say
FILTERS = {"temperature": Temperature, "top_k": TopK, "top_p": TopP}  # in the order in which transformers applies them


@dataclasses.dataclass(frozen=True)
class _Asked:
  """One request of `generate_until`."""

  prompt: list[int]
  stop: list[str]
  n_new: int
  sampler: Greedy | Sample


@register_model("gpt2_jax")
class Gpt2Jax(TemplateLM):
  """A checkpoint of any kind that `load_pretrained` takes, on a mesh of all devices unless the axes say otherwise.

  `max_length` is a context shorter than the model's own.
  """

  def __init__(
    self,
    pretrained: str,
    dtype: str = "float32",
    revision: str | None = None,
    step: str | int = "latest",
    quantize: str | None = None,
    mesh_replica: int = 1,
    mesh_data: int = -1,
    mesh_model: int = 1,
    batch_size: str | int = 1,
    max_length: int | None = None,
    seed: int = 0,
    max_batch_size: int | None = None,  # these two the harness hands to every model
    device: str | None = None,
  ):
    super().__init__()
    mesh = make_mesh(mesh_replica, mesh_data, mesh_model)
    revision = None if revision is None else str(revision)  # the command line makes numbers of digits
    model, tokenizer = load_pretrained(str(pretrained), mesh, dtype, quantize, revision, str(step))
    if tokenizer is not None and tokenizer.eot is None:
      raise ValueError(f"the tokenizer of {pretrained} has no <|endoftext|>, after which the harness scores texts")
    rows = 32 if str(batch_size).startswith("auto") else int(batch_size)
    self.scorer = Scorer(model if max_length is None else shortened(model, max_length), tokenizer, rows, seed=seed)
    self.about = {"model_dtype": dtype, "model_revision": revision or "", "mesh": dict(mesh.shape)}

  @property
  def max_length(self) -> int:
    return self.scorer.model.config.n_ctx

  @property
  def eot_token_id(self) -> int:
    return self.scorer.tokenizer.eot

  @property
  def tokenizer_name(self) -> str:
    return f"gpt2_jax {self.scorer.tokenizer.fingerprint}"

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
    return self.scorer.tokenizer.encode(string, allow_eot=True)

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    raise ValueError("GPT-2 was trained on no chats and has no template for them; leave --apply_chat_template out")

  def get_model_info(self) -> dict:
    """What the harness keeps beside its results."""
    count = sum(math.prod(shape) for shape in shapes(self.scorer.model.config).values())
    return {"model_num_parameters": count} | self.about

  def _loglikelihood_tokens(
    self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs
  ) -> list[tuple[float, bool]]:
    found = self.scorer.continuations(
      [(context or [self.eot_token_id], continuation) for _, context, continuation in requests]
    )
    if cut := sum(likelihood.truncated for likelihood in found):
      log.warning("%d of %d contexts lost their beginning, to fit %d tokens", cut, len(found), self.max_length)
    answers = [_answer(likelihood) for likelihood in found]
    for (texts, _, _), answer in zip(requests, answers, strict=True):
      self.cache_hook.add_partial("loglikelihood", texts, answer)
    return answers

  def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
    """The log-likelihood of each text, its first token after `<|endoftext|>`."""
    found = self.scorer.passages([self.tok_encode(request.args[0]) for request in requests])
    answers = [_answer(likelihood)[0] for likelihood in found]
    for request, answer in zip(requests, answers, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
    return answers

  def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
    """What follows each context, up to the first of the `until` strings. Raises ValueError for what it cannot do."""
    asked, texts = [self._asked(*request.args) for request in requests], {}
    for n_new, sampler in dict.fromkeys((one.n_new, one.sampler) for one in asked):
      numbers = [i for i, one in enumerate(asked) if (one.n_new, one.sampler) == (n_new, sampler)]
      texts |= self._written(asked, numbers, n_new, sampler)
    for i, request in enumerate(requests):
      self.cache_hook.add_partial("generate_until", request.args, texts[i])
    return [texts[i] for i in range(len(requests))]

  def _asked(self, context: str, kwargs: dict) -> _Asked:
    kwargs = dict(normalize_gen_kwargs(kwargs, N_NEW))
    until, n_new, draws = kwargs.pop("until"), kwargs.pop("max_gen_toks"), kwargs.pop("do_sample")
    if odd := kwargs.keys() - FILTERS.keys():
      raise ValueError(
        f"generation with {', '.join(sorted(odd))} is not supported; it takes until, max_gen_toks, do_sample, "
        f"{', '.join(FILTERS)}"
      )
    sampler = (
      Sample(tuple(make(kwargs[name]) for name, make in FILTERS.items() if name in kwargs)) if draws else Greedy()
    )
    room, eot = self.max_length - n_new, self.eot_token_id
    if room < 1:
      raise ValueError(f"{n_new} new tokens leave no room for a prompt in {self.max_length}; set max_gen_toks lower")
    stop = [text for text in handle_stop_sequences(until, self.scorer.tokenizer.decode([eot])) if text]
    prompt = self.tok_encode(context) or [eot]
    if len(prompt) > room:
      log.warning("a prompt of %d tokens lost its beginning, to leave room for %d new ones", len(prompt), n_new)
    return _Asked(prompt[-room:], stop, n_new, sampler)

  def _written(self, asked: Sequence[_Asked], numbers: Sequence[int], n_new: int, sampler) -> dict[int, str]:
    """The texts of those requests, in batches of like lengths."""
    texts, scorer = {}, self.scorer
    planned = planned_for(scorer.model, [len(asked[i].prompt) for i in numbers], scorer.batch_size)
    for batch in progress(planned.batches, "writing"):
      rows = [numbers[row] for row in batch.rows]
      prompts, stops = [asked[i].prompt for i in rows], [asked[i].stop for i in rows]
      draws, shape = (scorer.seed, rows), (planned.size, batch.length)
      found = write(self._decoder, scorer.tokenizer, prompts, n_new, stops, sampler, draws, shape)
      texts |= {i: text for i, (text, *_) in zip(rows, found, strict=True)}
    return texts

  @functools.cached_property
  def _decoder(self):
    return ready(self.scorer.model)


def shortened(model: GPT2, n_ctx: int) -> GPT2:
  """The model with the first `n_ctx` positions of its context only. Raises ValueError where it has fewer."""
  if not 1 <= n_ctx <= model.config.n_ctx:
    raise ValueError(f"a max_length of {n_ctx} is not from 1 to the model's context of {model.config.n_ctx}")
  with jax.set_mesh(model.mesh):
    model.wpe = nnx.Param(model.wpe[...][:n_ctx])
  model.config = dataclasses.replace(model.config, n_ctx=n_ctx)
  return model


def _answer(likelihood: Likelihood) -> tuple[float, bool]:
  return -likelihood.nats, likelihood.greedy


if __name__ == "__main__":
  cli_evaluate()
