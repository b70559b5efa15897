# SPDX-License-Identifier: Apache-2.0
"""The GPT-2 paper's zero-shot figures for its four sizes, each beside ours, with intervals, differences and plots.

COMMAND   python experiments/zero_shot_sweep.py --data=data --out=runs/zero_shot_sweep
          or a part of it: --model=gpt2 --task=lambada --config.limit=500
HARDWARE  one device that holds gpt2-xl in float32, 6.2 GB of weights, or a mesh (--config.mesh.model=4)
EXPECT    nothing yet: nobody has run this with this code. What the paper has stands in gpt2_jax/evaluate/paper.json;
          a drift within -1 and 1 says that its figure lies in our interval. Two are known to be far for a reason:
          LAMBADA's accuracy, which others came near with the last piece of the word (46.67 % for gpt2, in
          huggingface/transformers#13761), and perplexities, since the paper's de-tokenizers were not published.

The weights come from the Hugging Face Hub, or from its cache. The datasets lie under --data in the form in which they
were published, or are prepared by TFDS; those that are neither are named before anything is loaded, and --skip_missing
goes on without them. It is `launch/evaluate.py` with `configs/zero_shot.py`: after a kill the same command goes on.
"""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> None:
  flags = sys.argv[1:]
  if not any(flag.startswith("--out") for flag in flags):
    flags.append("--out=runs/zero_shot_sweep")
  command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), f"--config={ROOT}/configs/zero_shot.py", *flags]
  os.execv(sys.executable, command)


if __name__ == "__main__":
  main()
