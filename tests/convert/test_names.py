# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from gpt2_jax.convert import names
from gpt2_jax.model import ModelConfig
from gpt2_jax.sizes import SIZES

PARAMETERS = {"117M": 124_439_808, "345M": 354_823_168, "762M": 774_030_080, "1542M": 1_557_611_200}


@pytest.mark.parametrize("size", PARAMETERS)
def test_the_published_sizes_add_up(size):
  assert (
    sum(int(np.prod(shape)) for shape in names.shapes(SIZES[size]).values()) == PARAMETERS[size]
  )


def test_names_and_shapes_of_openai():
  """As OpenAI's graph and Hugging Face's files have them."""
  found = names.shapes(SIZES["117M"])
  assert found["h.11.attn.c_attn.w"] == (768, 2304) and found["h.0.mlp.c_proj.w"] == (3072, 768)
  assert names.translate_name("h.11.attn.c_attn.w", names.OPENAI) == "h11/attn/c_attn/w"
  assert names.translate_name("h.11.attn.c_attn.w", names.TORCH) == "h.11.attn.c_attn.weight"
  assert (
    names.translate_name("ln_f.g", names.OPENAI) == "ln_f/g"
    and names.translate_name("wte", names.TORCH) == "wte.weight"
  )
  assert len(found) == 2 + 12 * 12 + 2
  for column in (names.OPENAI, names.TORCH):
    assert len({names.translate_name(name, column) for name in found}) == len(found)


def test_a_model_without_biases_has_no_bias_names():
  config = ModelConfig(n_vocab=7, n_ctx=5, n_embd=4, n_head=2, n_layer=2, use_bias=False)
  assert not [name for name in names.shapes(config) if name.endswith("b")]
  assert len(names.shapes(config)) == 2 + 2 * 6 + 1


def test_c_attn_columns_are_grouped_by_head_and_back():
  """Column (part, head, k) of the canonical order goes to (head, part, k), and back."""
  H, K = 5, 2
  canonical = np.array(
    [[100 * part + 10 * head + k for part in range(3) for head in range(H) for k in range(K)]]
  )
  ours = [[100 * part + 10 * head + k for head in range(H) for part in range(3) for k in range(K)]]
  assert names.group_by_head(canonical, H).tolist() == ours
  assert names.group_by_qkv(np.array(ours), H).tolist() == canonical.tolist()
  assert names.group_by_head(canonical[0], H).tolist() == ours[0], "a bias too"


@pytest.mark.parametrize(
  ("found", "expected", "message"),
  [
    (["h.0.a", "h.1.a", "h.2.a"], [], r"\(extra: h\.0-2\.a\)"),
    (["h.0.a", "h.2.a", "h.11.a"], [], r"\(extra: h\.0,2,11\.a\)"),
    ([], [f"model/h{i}/b" for i in range(12)], r"\(missing: model/h0-11/b\)"),
    (["h.3.a", "x"], ["h.3.b"], r"\(missing: h\.3\.b; extra: h\.3\.a, x\)"),
  ],
)
def test_faults_join_layers_to_ranges(found, expected, message):
  with pytest.raises(ValueError, match=f"^it does not hold the tensors of its config {message}$"):
    names.check_shapes(dict.fromkeys(found, (1,)), dict.fromkeys(expected, (1,)), "it")


def test_the_message_has_a_length():
  """However many names there are, and whatever they are called."""
  expected = {f"h.{i}.{'a' * n}.w": (n, n) for i in range(48) for n in range(1, 60)}
  found = {f"{n}\n\ud800{'x' * 900}": (1,) for n in range(300)}
  found |= {name: (1,) * 30 for name in expected if "h.7" in name}
  with pytest.raises(ValueError, match="missing: .*and 5. more; extra: .*; misshapen: ") as error:
    names.check_shapes(found, expected, "a file")
  assert len(str(error.value)) < 600 and "\n" not in str(error.value)
