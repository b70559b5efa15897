# SPDX-License-Identifier: Apache-2.0
"""Damages files at random: bytes, JSON values, whole files. The same seed makes the same mutant."""

import json
import os
import pathlib
import random
import shutil

# What is put in the place of a JSON value. The last one stands for a list that is nested too deep
# to be written by a JSON library.
DEEP = "<deep>"
VALUES = (
  *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0),
  *(
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x",
    "\ud800",
    "\0",
    "../../x",
    "/etc/passwd",
    "9" * 400,
  ),
  *([], {}, [[]], [None], {"": None}, ["a", 1], [0] * 3, {"kind": "gpt2"}, DEEP),
)
INTERESTING = (b"\0", b"\xff", b"\x80", b"\x7f", b"\n", b'"', b"{", b"}", b"[", b",", b"-", b"9")


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
  """One to four damages: flipped bits, other bytes, cuts, repetitions, zeros, pieces moved."""
  for _ in range(rng.choice((1, 1, 1, 2, 4))):
    content = _damage(bytearray(content), rng)
  return content


def _damage(content: bytearray, rng: random.Random) -> bytes:
  if not content:
    return rng.randbytes(rng.randrange(1, 40))

  # Most of a file is weights, and most of its sense is at the beginning and at the end.
  place = rng.randrange(len(content))
  if rng.random() < 0.5:
    reach = min(len(content), 600)
    place = rng.choice((rng.randrange(reach), len(content) - 1 - rng.randrange(reach)))
  end = min(len(content), place + rng.choice((1, 2, 4, 8, 50, 1000)))

  match rng.randrange(9):
    case 0 | 1:
      content[place] ^= 1 << rng.randrange(8)
    case 2:
      content[place] = rng.randrange(256)
    case 3:
      content[place : place + 1] = rng.choice(INTERESTING)
    case 4:
      del content[place:end]
    case 5:
      content[place:place] = content[place:end] * rng.choice((1, 2, 50))
    case 6:
      content[place:end] = bytes(end - place)
    case 7:
      del content[place:]
    case 8:
      other = rng.randrange(len(content))
      content[place:end] = content[other : other + end - place]
  return bytes(content)


def mutate_json(content: bytes, rng: random.Random) -> bytes:
  """Other values, missing, renamed or doubled names somewhere in a JSON text."""
  root = [json.loads(content)]
  holders = [(root, 0)]
  _collect(root[0], holders)
  holder, key = rng.choice(holders)
  match rng.randrange(4):
    case 0 if isinstance(holder, dict):
      del holder[key]
    case 1 if isinstance(holder, dict):
      holder[f"{key}{rng.choice(('x', '', '0'))}"] = holder.pop(key)
    case 2 if isinstance(holder, list) and holder is not root:
      holder[key:key] = [holder[key]] * rng.choice((1, 3))
    case _:
      holder[key] = rng.choice(VALUES)
  text = json.dumps(root[0])
  return text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000).encode()


def _collect(value: object, holders: list) -> None:
  """Adds every place of a value in the tree of `value`: what holds it, and under which key."""
  items = ()
  if isinstance(value, dict):
    items = value.items()
  elif isinstance(value, list):
    items = enumerate(value)
  for key, inner in list(items):
    holders.append((value, key))
    _collect(inner, holders)


def mutate_file(folder: pathlib.Path, names: list[str], rng: random.Random) -> str:
  """Damages one of the files in `folder`; returns what was done, for a message."""
  path = folder / rng.choice(names)
  content = path.read_bytes()
  if rng.random() < 0.1:
    return _replace_file(path, [folder / name for name in names], rng)

  is_json = content[:1] in b"{[" and rng.random() < 0.6
  if is_json:
    try:
      mutant = mutate_json(content, rng)
    except ValueError:
      is_json = False
  if not is_json:
    mutant = mutate_bytes(content, rng)
  path.write_bytes(mutant)
  return f"{path.relative_to(folder)}: {'JSON' if is_json else 'bytes'}"


def _replace_file(path: pathlib.Path, others: list[pathlib.Path], rng: random.Random) -> str:
  """Removes a file, or puts nothing, a folder, a loop of links or another file in its place."""
  name = path.name
  other = rng.choice(others).read_bytes()
  path.unlink()
  match rng.randrange(5):
    case 0:
      return f"{name}: removed"
    case 1:
      path.touch()
      return f"{name}: empty"
    case 2:
      path.mkdir()
      return f"{name}: a folder"
    case 3:
      os.symlink(name, path)
      return f"{name}: a link to itself"
    case _:
      path.write_bytes(other)
      return f"{name}: another file"


def copy_fresh(source: pathlib.Path, target: pathlib.Path) -> None:
  """Makes `target` the same folder as `source`, whatever it is now."""
  shutil.rmtree(target, ignore_errors=True)
  shutil.copytree(source, target)
