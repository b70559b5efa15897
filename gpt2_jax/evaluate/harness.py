# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness: this project's models as its model type `gpt2_jax`.

  pip install 'gpt2_jax[harness]'
  python -m gpt2_jax.evaluate.harness --model gpt2_jax \\
    --model_args pretrained=gpt2,dtype=bfloat16 --tasks lambada_openai,blimp --batch_size 64

The harness (0.4.13) knows the models in a table of its own and those that were imported. So this
command is `lm_eval` itself, with all its arguments, after one import. In Python, `import
gpt2_jax.evaluate.harness` before `lm_eval.simple_evaluate(model="gpt2_jax", ...)` does the same.

Scores are those of the harness's own model `hf` on the same weights. Tokens are the same
(`<|endoftext|>` in a text is that token), and so are contexts that lose their beginning, windows
over long texts, and stop strings. Samples differ: they come from JAX's random numbers.

`--batch_size=auto` is 32 rows. `--device` is ignored: JAX computes on all devices that it finds,
and JAX_PLATFORMS says of which kind. JAX warns of the processes that the harness forks to bootstrap
its error bars, which do not use it; DISABLE_MULTIPROC=1 does without them.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Sequence

import jax
from flax import nnx

try:
  # Its own models: it would not look for them once another one is registered.
  import lm_eval.models  # noqa: F401
  from lm_eval.__main__ import cli_evaluate
  from lm_eval.api.instance import Instance
  from lm_eval.api.model import TemplateLM
  from lm_eval.api.registry import register_model
  from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
except ImportError as error:
  raise ImportError(
    f"lm-evaluation-harness is not installed completely ({error}): pip install 'gpt2_jax[harness]'"
  ) from error

from gpt2_jax.convert.names import shapes
from gpt2_jax.convert.pretrained import load_pretrained
from gpt2_jax.decoding import Greedy, Sample, Temperature, TopK, TopP, for_inference
from gpt2_jax.decoding.kv_cache import InferenceModel
from gpt2_jax.evaluate.generation import write
from gpt2_jax.evaluate.loglikelihood import plan_on_mesh
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.task import Likelihood
from gpt2_jax.files import progress
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import make_mesh

log = logging.getLogger(__name__)

N_NEW = 256  # tokens that `hf` generates where a task does not say
# In the order in which transformers applies them.
FILTERS = {"temperature": Temperature, "top_k": TopK, "top_p": TopP}


@dataclasses.dataclass(frozen=True)
class _GenerationRequest:
  """One request of `generate_until`, with its prompt as tokens."""

  prompt: list[int]
  stop: list[str]
  n_new: int
  sampler: Greedy | Sample


@register_model("gpt2_jax")
class Gpt2Jax(TemplateLM):
  """lm_eval model of a checkpoint of any kind that `load_pretrained` takes.

  It computes on a mesh of all devices unless the axes say otherwise. `max_length` is a context
  shorter than the model's own.
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
    # These two the harness hands to every model.
    max_batch_size: int | None = None,
    device: str | None = None,
  ):
    super().__init__()

    # 1. Load. The harness's command line makes numbers of names that are digits.
    mesh = make_mesh(mesh_replica, mesh_data, mesh_model)
    revision = None if revision is None else str(revision)
    model, tokenizer = load_pretrained(str(pretrained), mesh, dtype, quantize, revision, str(step))
    if tokenizer is not None and tokenizer.eot is None:
      raise ValueError(
        f"the tokenizer of {pretrained} has no <|endoftext|>, after which the harness scores texts"
      )
    if max_length is not None:
      model = shorten_context(model, max_length)

    # 2. The scorer does the work.
    n_rows = 32 if str(batch_size).startswith("auto") else int(batch_size)
    self.scorer = Scorer(model, tokenizer, n_rows, seed=seed)
    self.metadata = {
      "model_dtype": dtype,
      "model_revision": revision or "",
      "mesh": dict(mesh.shape),
    }

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

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    raise ValueError(
      "GPT-2 was trained on no chats and has no template for them; leave --apply_chat_template out"
    )

  def get_model_info(self) -> dict:
    """Metadata that the harness keeps with its results."""
    n_params = sum(math.prod(shape) for shape in shapes(self.scorer.model.config).values())
    return {"model_num_parameters": n_params} | self.metadata

  # ---- the harness's three types of requests

  def _loglikelihood_tokens(
    self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs
  ) -> list[tuple[float, bool]]:
    """Log-likelihood of continuations, and whether each is what greedy decoding would write."""
    # An empty context stands for the end of the text before.
    pairs = []
    for _, context, continuation in requests:
      pairs.append((context or [self.eot_token_id], continuation))
    likelihoods = self.scorer.loglikelihoods(pairs)

    n_cut = sum(likelihood.truncated for likelihood in likelihoods)
    if n_cut:
      log.warning(
        "%d of %d contexts lost their beginning, to fit %d tokens",
        n_cut,
        len(pairs),
        self.max_length,
      )

    # The harness's cache has each answer under the request's texts.
    answers = list(map(_logprob_and_greedy, likelihoods))
    for (texts, _, _), answer in zip(requests, answers, strict=True):
      self.cache_hook.add_partial("loglikelihood", texts, answer)
    return answers

  def loglikelihood_rolling(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Rolling log-likelihood of each text, its first token after `<|endoftext|>`."""
    texts = [self.tok_encode(request.args[0]) for request in requests]
    likelihoods = self.scorer.rolling_loglikelihoods(texts)

    answers = []
    for request, likelihood in zip(requests, likelihoods, strict=True):
      logprob, _ = _logprob_and_greedy(likelihood)
      answers.append(logprob)
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
    return answers

  def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
    """Generates a text after each context, up to the first of its `until` strings.

    Raises ValueError for options that are not supported.
    """
    # Only requests with one sampler and one number of new tokens can share a batch.
    groups = {}
    for i, request in enumerate(requests):
      parsed = self._parse_generation(*request.args)
      groups.setdefault((parsed.n_new, parsed.sampler), {})[i] = parsed

    # Answers go back in the order of the requests.
    texts = {}
    for (n_new, sampler), group in groups.items():
      texts |= self._generate_group(group, n_new, sampler)

    answers = []
    for i, request in enumerate(requests):
      answers.append(texts[i])
      self.cache_hook.add_partial("generate_until", request.args, texts[i])
    return answers

  def _parse_generation(self, context: str, kwargs: dict) -> _GenerationRequest:
    # 1. The sampler. An option that is not known here would change the draws: it is an error.
    kwargs = dict(normalize_gen_kwargs(kwargs, N_NEW))
    until = kwargs.pop("until")
    n_new = kwargs.pop("max_gen_toks")
    do_sample = kwargs.pop("do_sample")
    if unknown := kwargs.keys() - FILTERS.keys():
      raise ValueError(
        f"generation with {', '.join(sorted(unknown))} is not supported; it takes until, "
        f"max_gen_toks, do_sample, {', '.join(FILTERS)}"
      )
    sampler = Greedy()
    if do_sample:
      filters = [make(kwargs[name]) for name, make in FILTERS.items() if name in kwargs]
      sampler = Sample(tuple(filters))

    # 2. The stop strings. The end of a text is always one of them.
    eot = self.eot_token_id
    stop = handle_stop_sequences(until, self.scorer.tokenizer.decode([eot]))
    stop = list(filter(None, stop))

    # 3. The prompt, truncated on the left so that the new tokens fit.
    room = self.max_length - n_new
    if room < 1:
      raise ValueError(
        f"{n_new} new tokens leave no room for a prompt in {self.max_length}; "
        "set max_gen_toks lower"
      )
    prompt = self.tok_encode(context) or [eot]
    if len(prompt) > room:
      log.warning(
        "a prompt of %d tokens lost its beginning, to leave room for %d new ones",
        len(prompt),
        n_new,
      )
    return _GenerationRequest(prompt[-room:], stop, n_new, sampler)

  def _generate_group(
    self, group: dict[int, _GenerationRequest], n_new: int, sampler: Greedy | Sample
  ) -> dict[int, str]:
    """The texts of requests with one sampler, by their numbers, in batches of similar lengths."""
    scorer = self.scorer
    numbers = list(group)
    lengths = [len(request.prompt) for request in group.values()]
    plan = plan_on_mesh(scorer.model, lengths, scorer.batch_size)

    texts = {}
    for batch in progress(plan.batches, "writing"):
      in_batch = [numbers[row] for row in batch.rows]
      generated = write(
        self._inference_model,
        scorer.tokenizer,
        [group[i].prompt for i in in_batch],
        n_new,
        [group[i].stop for i in in_batch],
        sampler,
        # A draw depends on the seed and the request's number, never on its batch.
        (scorer.seed, in_batch),
        (plan.size, batch.length),
      )
      for i, (text, *_) in zip(in_batch, generated, strict=True):
        texts[i] = text
    return texts

  @functools.cached_property
  def _inference_model(self) -> InferenceModel:
    return for_inference(self.scorer.model)


def shorten_context(model: GPT2, n_ctx: int) -> GPT2:
  """Truncates the model's context to `n_ctx` position embeddings.

  Raises ValueError if it has fewer.
  """
  if not 1 <= n_ctx <= model.config.n_ctx:
    raise ValueError(
      f"a max_length of {n_ctx} is not from 1 to the model's context of {model.config.n_ctx}"
    )
  # Virtual tokens have positions of their own beside the context.
  n_virtual = model.wpe.shape[0] - model.config.n_ctx
  with jax.set_mesh(model.mesh):
    model.wpe = nnx.Param(model.wpe[...][: n_ctx + n_virtual])
  model.config = dataclasses.replace(model.config, n_ctx=n_ctx)
  return model


def _logprob_and_greedy(likelihood: Likelihood) -> tuple[float, bool]:
  return -likelihood.nats, likelihood.greedy


if __name__ == "__main__":
  cli_evaluate()
