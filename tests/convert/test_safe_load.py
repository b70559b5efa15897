# SPDX-License-Identifier: Apache-2.0
import os
import pathlib
import pickle

import pytest

from gpt2_jax.convert.safe_load import read_plain_pickle


@pytest.mark.parametrize("value", [{"a": [1, 2.5, "x", None, (True, b"y")]}, {0: "a"}, []])
def test_plain_pickles_are_read(value, tmp_path):
  for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, protocol))
    try:
      assert read_plain_pickle(tmp_path / "x.pkl") == value
    except ValueError:
      assert protocol < 3 and "b'y'" in str(value), "bytes, which old protocols made by a call"


@pytest.mark.parametrize(
  "value", [print, pathlib.Path("a"), {1, 2, print}, os.system, {"itos": os.getcwd}]
)
def test_other_pickles_are_refused(value, tmp_path):
  (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
  with pytest.raises(ValueError, match="more than plain values, or damaged") as error:
    read_plain_pickle(tmp_path / "x.pkl")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "content", [b"", b"\x80", b"junk", b"P0\n.", b"\x80\x04]\x94K\x01", b"cos\nsystem\n."], ids=ascii
)
def test_a_damaged_pickle_is_one_line(content, tmp_path):
  (tmp_path / "x.pkl").write_bytes(content)
  with pytest.raises(
    ValueError, match="x.pkl is refused: more than plain values, or damaged"
  ) as error:
    read_plain_pickle(tmp_path / "x.pkl")
  assert "\n" not in str(error.value)


def test_code_in_a_pickle_is_not_run(payload, tmp_path):
  for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"itos": payload}, protocol))
    with pytest.raises(ValueError, match="is refused"):
      read_plain_pickle(tmp_path / "x.pkl")
