# SPDX-License-Identifier: Apache-2.0
"""launch/tpu_vm.sh and worker.sh against a stand-in gcloud (stand_in.py), whose workers run what is sent to them."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

ROOT = pathlib.Path(__file__).parents[2]
MACHINE = ["--project=my-project", "--zone=us-west4-a", "--name=test"]
TRAIN = [*MACHINE, "--topology=v5e-16", "--workdir=gs://bucket/run"]
FLAGS = ["--", "--config=configs/gpt2.py:117M"]


class Box:
  """A folder with a stand-in gcloud, and what came of it."""

  def __init__(self, path: pathlib.Path, tree: pathlib.Path):
    self.path, self.script = path, tree / "launch" / "tpu_vm.sh"
    for folder, names in (("local", ["gcloud", "ssh-add"]), ("remote", ["python3", "hostname"])):
      (path / folder).mkdir()
      for name in names:
        text = (pathlib.Path(__file__).parent / "stand_in.py").read_text()
        (path / folder / name).write_text(text.replace("#!/usr/bin/env python3", f"#!{sys.executable} -IS"))
        (path / folder / name).chmod(0o755)

  def start(self, *arguments: str, **scenario) -> subprocess.Popen:
    (self.path / "scenario.json").write_text(json.dumps({"workers": 1, "train": [[200, "done"]]} | scenario))
    environment = os.environ | {"STAND_IN": str(self.path), "PATH": f"{self.path}/local:{os.environ['PATH']}"}
    environment |= {"HOME": str(self.path), "GPT2_JAX_POLL": "0.02", "GPT2_JAX_PATIENCE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
    return subprocess.Popen(
      ["bash", self.script, *arguments],
      env=environment,
      start_new_session=True,
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background hands on SIG_IGN
      **pipes,
    )

  def run(self, *arguments: str, status: int = 0, **scenario) -> tuple[str, str]:
    process = self.start(*arguments, **scenario)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    return out, err

  def lines(self, name: str) -> list:
    path = self.path / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def calls(self, verb: str | None = None) -> list[list[str]]:
    return [call for call in self.lines("calls.jsonl") if verb is None or call[3] == verb]

  def trained(self, worker: str = "gpt2-jax-test-w-0") -> list[list[str]]:
    """The arguments of each train.py on a worker."""
    return self.lines(f"trained-{worker}.jsonl")

  def place(self, labels: dict):
    """A machine that is there already."""
    machine = {"type": "v5litepod-16", "nodes": ["gpt2-jax-test"], "states": ["ACTIVE"], "lost": False}
    (self.path / "machine.json").write_text(json.dumps(machine | {"labels": labels}))

  @property
  def there(self) -> bool:
    return (self.path / "machine.json").exists()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
  """A checkout with one change that is not committed and one file that git does not know."""
  root = tmp_path_factory.mktemp("tree")
  (root / "launch").mkdir()
  for name in ("tpu_vm.sh", "worker.sh"):
    shutil.copy(ROOT / "launch" / name, root / "launch" / name)
  (root / "change").write_text("old")
  for command in ("init --quiet", "add .", "-c user.name=a -c user.email=a@b commit --quiet --message=tree"):
    subprocess.run(["git", "-C", root, *command.split()], check=True)
  (root / "change").write_text("new")
  (root / "unknown").write_text("")
  return root


@pytest.fixture
def box(tmp_path, tree):
  box = Box(tmp_path, tree)
  yield box
  end = time.monotonic() + 5
  while (left := processes_of(tmp_path)) and time.monotonic() < end:
    time.sleep(0.05)
  for process in left:
    process.kill()
  assert not left, "left behind"


def processes_of(path: pathlib.Path) -> list[psutil.Process]:
  """Those that were started, however indirectly, with this folder as their stand-in."""
  found = psutil.process_iter(["environ"])
  return [process for process in found if (process.info["environ"] or {}).get("STAND_IN") == str(path)]


def test_one_command_asks_waits_installs_trains_follows_and_deletes(box):
  out, err = box.run("train", *TRAIN, "--spot", *FLAGS, workers=2)
  verbs = [call[3] for call in box.calls()]
  assert [verb for i, verb in enumerate(verbs) if verb != verbs[i - 1]][1:4] == ["create", "describe", "scp"]
  create = box.calls("create")[0]
  for flag in ("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"):
    assert flag in create
  for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "training is done", "is deleted"):
    assert state in err
  assert "loss 3.0" in out
  assert [len(box.trained(f"gpt2-jax-test-w-{w}")) for w in range(2)] == [1, 1]
  assert not box.there


def test_flags_arrive_as_they_were_given_and_run_nothing_and_the_tree_has_its_changes(box):
  mark = box.path / "mark"
  nasty = [
    f"--a=$(touch {mark})",
    f"--b=`touch {mark}`",
    f"--c='; touch {mark}; '",
    "--d=two  spaces",
    "--e=line\nline\n",
  ]
  nasty += ['--f="quoted" \\ $HOME *', "--g=", "", "--h=é~#!", "--spot"]
  _, err = box.run("train", *TRAIN, "--keep", *FLAGS, *nasty)
  assert box.trained() == [["launch/train.py", "--workdir=gs://bucket/run", FLAGS[1], *nasty]]
  assert not mark.exists() and "--spot" not in box.calls("create")[0]
  tree = box.path / "workers" / "gpt2-jax-test-w-0" / "gpt2_jax"
  assert (tree / "change").read_text() == "new" and not (tree / "unknown").exists()
  assert "1 untracked files stay here" in err
  assert box.there and "to delete it: launch/tpu_vm.sh down" in err


def test_a_preempted_machine_is_replaced_and_training_goes_on_with_the_same_flags(box):
  _, err = box.run("train", *TRAIN, "--spot", *FLAGS, train=[[100, "preempted"], [300, "done"]], workers=2)
  assert len(box.calls("create")) == len(box.calls("delete")) == 2
  first, second = box.trained()
  assert first == second and "newest checkpoint (step 100)" in err and "training is done" in err
  assert not box.there


def test_preemption_without_progress_has_a_limit(box):
  _, err = box.run("train", *TRAIN, "--retries=1", *FLAGS, train=[[0, "preempted"]], status=1)
  assert len(box.trained()) == 2 and "without a checkpoint after step 0; gave up" in err
  assert not box.there


def test_a_lost_host_starts_the_same_command_again_on_the_same_machine(box):
  train = [[100, 75], [200, 1], [300, "done"]]  # each with a newer checkpoint, so none counts against --retries
  _, err = box.run("train", *TRAIN, "--retries=1", *FLAGS, train=train)
  assert len(box.calls("create")) == len(box.calls("scp")) == 1 and len(box.trained()) == 3
  assert "ended 75" in err and not box.there


def test_a_quota_refusal_says_which_and_is_not_tried_again(box):
  limit = "Quota limit 'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-west4-a."
  _, err = box.run("up", *TRAIN, create=[f"RESOURCE_EXHAUSTED: {limit}"], status=3)
  assert limit in err and "iam-admin/quotas?project=my-project" in err
  assert len(box.calls("create")) == 1


def test_a_request_that_fails_for_quota_later_is_deleted_too(box):
  failure = "Quota 'TPUV5sPreemptibleLitepodPerProjectPerRegionForTPUAPI' exhausted. Limit 32 in region us-west4"
  _, err = box.run("up", *TRAIN, states=[["PROVISIONING", "FAILED"]], failure=failure, status=3)
  assert failure in err and not box.there


def test_want_of_capacity_is_tried_again_and_other_refusals_are_not(box):
  failed = [["PROVISIONING", "FAILED"], ["PROVISIONING", "ACTIVE"]]
  box.run("up", *TRAIN, states=failed, failure="There is no more capacity in the zone", create=["UNAVAILABLE", "ok"])
  assert len(box.calls("create")) == 3 and box.there
  box.run("down", *MACHINE)
  _, err = box.run("up", *TRAIN, create=["PERMISSION_DENIED: Cloud TPU API has not been used"], status=1)
  assert "PERMISSION_DENIED" in err and len(box.calls("create")) == 4


def test_a_quota_of_requests_a_minute_is_waited_for(box):
  busy = "RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Create node requests' and limit 'per minute'"
  box.run("up", *TRAIN, create=[busy, "ok"])
  assert len(box.calls("create")) == 2 and box.there


def test_a_key_that_the_agent_lacks_is_said_before_the_machine_is_asked_for(box):
  (box.path / "agent").write_text("256 SHA256:other other (RSA)")
  _, err = box.run("train", *TRAIN, *FLAGS, status=2)
  assert f"ssh-add {box.path}/.ssh/google_compute_engine" in err and not box.calls()


def test_one_worker_that_cannot_install_is_named_tried_once_more_and_then_all_ends(box):
  bad = "gpt2-jax-test-w-1"
  _, err = box.run("train", *TRAIN, *FLAGS, install_fails=[[bad]], workers=2, status=1)
  assert f"@worker {bad} install failed at: python3 -m uv pip install" in err and "no space left" in err
  assert len(box.calls("scp")) == 2 and not box.trained() and not box.there


def test_one_failed_install_is_not_the_end(box):
  box.run("train", *TRAIN, *FLAGS, install_fails=[["gpt2-jax-test-w-0"], []])
  assert len(box.calls("scp")) == 2 and len(box.trained()) == 1


def test_input_that_training_refuses_is_not_tried_again(box):
  out, err = box.run("train", *TRAIN, *FLAGS, train=[[0, 2]], status=2)
  assert "error: status 2 it is" in out and "refused its input" in err
  assert len(box.trained()) == 1 and not box.there


def test_workers_that_hang_after_one_was_lost_are_stopped_and_all_start_again(box):
  hangs = {"train-gpt2-jax-test-w-1": [[0, "hangs"], [0, "done"]]}
  _, err = box.run("train", *TRAIN, *FLAGS, train=[[100, 75], [200, "done"]], workers=2, **hangs)
  assert "without the others: @worker gpt2-jax-test-w-1 running" in err
  assert [len(box.trained(f"gpt2-jax-test-w-{w}")) for w in range(2)] == [2, 2]


def test_slices_are_one_request_and_every_worker_of_each_trains(box):
  box.run("train", *TRAIN, "--slices=2", *FLAGS, workers=2)
  assert {"--node-count=2", "--node-prefix=gpt2-jax-test"} < set(box.calls("create")[0])
  assert all(len(box.trained(f"gpt2-jax-test-{node}-w-{w}")) == 1 for node in range(2) for w in range(2))


def test_ctrl_c_leaves_all_in_place_and_the_same_command_follows_again_until_stopped(box):
  process = box.start("train", *TRAIN, *FLAGS, train=[[100, "SIGTERM"]])
  wait_for(lambda: len(box.trained()) == 1 and any("follow" in call[-1] for call in box.calls("ssh")))
  os.killpg(process.pid, signal.SIGINT)
  _, err = process.communicate(timeout=20)
  assert process.returncode == 130 and box.there
  assert "19.20 USD an hour" in err and "tpu_vm.sh down --project=my-project --zone=us-west4-a --name=test" in err

  copies = len(box.calls("scp"))
  process = box.start("train", *TRAIN, *FLAGS, train=[[100, "SIGTERM"]])
  calls = len(box.calls("ssh"))
  wait_for(lambda: any("follow" in call[-1] for call in box.calls("ssh")[calls:]))
  out, err = box.run("status", *MACHINE, train=[[100, "SIGTERM"]])
  assert (
    re.findall("^@worker .* running$", out, re.M)
    and "19.20 USD" in err
    and len(box.trained()) == 1
    and len(box.calls("scp")) == copies
  )
  _, err = box.run("run", *TRAIN, *FLAGS, "--config.seed=1", status=2)
  assert "other flags" in err
  out, _ = box.run("stop", *MACHINE)
  assert out.count("asked 75") == 1
  _, err = process.communicate(timeout=20)
  assert process.returncode == 0 and box.there and "stopped as asked" in err
  box.run("down", *MACHINE)


def test_down_twice_is_down_once_and_only_what_the_script_made(box):
  box.place(labels={"gpt2_jax": "tpu_vm"})
  box.run("down", *MACHINE)
  _, err = box.run("down", *MACHINE)
  assert "there is no gpt2-jax-test" in err and len(box.calls("delete")) == 1
  box.place(labels={})
  _, err = box.run("down", *MACHINE, status=2)
  assert "not made by this script" in err and box.there


def test_a_machine_of_another_kind_is_not_taken(box):
  box.place(labels={"gpt2_jax": "tpu_vm"})
  _, err = box.run("train", *MACHINE, "--topology=v5e-64", "--workdir=gs://bucket/run", *FLAGS, status=2)
  assert "1 of v5litepod-16, not 1 of v5litepod-64" in err and box.there


def test_a_queue_that_does_not_move_has_a_limit_and_leaves_no_request(box):
  _, err = box.run("up", *TRAIN, "--wait_hours=0", states=[["WAITING_FOR_RESOURCES"]], status=1)
  assert "still WAITING_FOR_RESOURCES after 0 hours" in err and not box.there


@pytest.mark.parametrize("verb", ["train", "up", "run", "logs", "status", "stop", "down"])
def test_a_dry_run_calls_nothing_and_prints_what_a_shell_accepts(box, verb):
  training = [*TRAIN, *FLAGS, "--a=b c'd\n$(e)"] if verb in ("train", "run") else TRAIN
  out, _ = box.run(verb, "--dry-run", *training)
  assert not box.calls() and "gcloud" in out
  subprocess.run(["bash", "-n"], input=out, text=True, check=True)


def test_the_dry_run_prints_the_calls_that_are_made(box):
  command = ["train", *TRAIN, "--spot", "--slices=2", *FLAGS, "--a=b c'd\n$(e)"]
  out, _ = box.run(*command, "--x=y")
  made = [["gcloud", *call] for call in box.calls()]
  out, _ = box.run(command[0], "--dry-run", *command[1:], "--x=y")
  shown = [shlex.split(line.replace("$'", "'"))[:5] for line in out.splitlines() if line.startswith("gcloud")]
  assert {tuple(call[:5]) for call in shown} <= {tuple(call[:5]) for call in made}
  script = out.replace("until [", "while false && [").replace("/tmp/gpt2_jax.tar.gz", f"{box.path}/tree.tar.gz")
  script = re.sub("^git.*$", "", script, flags=re.M)
  (box.path / "local" / "gcloud").write_text('#!/bin/bash\nprintf "%s\\0" "$@" END >>"$STAND_IN/pasted"\n')
  environment = os.environ | {"STAND_IN": str(box.path), "PATH": f"{box.path}/local:{os.environ['PATH']}"}
  subprocess.run(["bash"], input=script, text=True, check=True, env=environment)
  pasted = (box.path / "pasted").read_text().replace(f"{box.path}/tree.tar.gz", "").split("\0END\0")[:-1]
  made = {"\0".join(re.sub(r"^/.*/gpt2_jax.tar.gz$", "", word) for word in call[1:]) for call in made}
  assert len(pasted) == 7 and set(pasted) <= made


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "say what to do"),
    (["fly"], "no verb fly"),
    (["up", "--projct=x"], "--projct=x is no flag"),
    (["up", "--project=My Project"], "is no project id"),
    (["up", *MACHINE, "--zone=us-west4"], "is no zone"),
    (["up", *MACHINE, "--topology=v5e-63"], "comes in 1, 4, 8, 16, 32, 64, 128 or 256 chips"),
    (["up", *MACHINE, "--topology=v4-4"], "multiples of 8 cores"),
    (["up", *MACHINE, "--topology=v4:2x4x8"], "not the default shape"),
    (["up", *MACHINE, "--topology=h100-8"], "--topology='h100-8' is none"),
    (["up", *MACHINE, "--name=x;id"], "--name='x;id'"),
    (["up", *TRAIN, "--slices=0"], "--slices='0'"),
    (["up", *TRAIN, *FLAGS], "only train and run take flags"),
    (["train", *TRAIN, "--workdir=/tmp/run", *FLAGS], "has to be gs://BUCKET/PATH"),
    (["train", *TRAIN, "--workdir=gs://bucket/*", *FLAGS], "has to be gs://BUCKET/PATH"),
    (["train", *TRAIN], "no --config"),
    (["train", *TRAIN, *FLAGS, "--workdir=gs://b/c"], "before the --"),
  ],
)
def test_input_that_cannot_be_is_one_line_and_status_2(box, arguments, message):
  _, err = box.run(*arguments, status=2)
  assert message in err and len(err.splitlines()) == 1 and not box.calls()


@pytest.mark.parametrize(
  "topology, accelerator, runtime, usd",
  [
    ("v5e-64", "v5litepod-64", "v2-alpha-tpuv5-lite", "76.80"),
    ("v5e:8x8", "v5litepod-64", "v2-alpha-tpuv5-lite", "76.80"),
    ("v4:4x4x4", "v4-128", "tpu-ubuntu2204-base", "206.08"),
    ("v5p-64", "v5p-64", "v2-alpha-tpuv5", "134.40"),
    ("v6e-64", "v6e-64", "v2-alpha-tpuv6e", "172.80"),
  ],
)
def test_topologies_are_named_as_google_names_them(box, topology, accelerator, runtime, usd):
  out, _ = box.run("up", "--dry-run", *MACHINE, f"--topology={topology}")
  assert {f"--accelerator-type={accelerator}", f"--runtime-version={runtime}"} < set(out.split())
  assert f"{usd} USD an hour" in out


def test_a_container_passes_sigterm_on_and_says_that_it_wants_to_go_on(box):
  (box.path / "scenario.json").write_text(json.dumps({"train": [[100, "SIGTERM"]]}))
  home = box.path / "pod-w-0"
  (home / "gpt2_jax_env" / "bin").mkdir(parents=True)
  shutil.copy(box.path / "remote" / "python3", home / "gpt2_jax_env" / "bin" / "python")
  environment = os.environ | {"HOME": str(home), "STAND_IN": str(box.path), "GPT2_JAX_POLL": "0.02"}
  command = ["bash", ROOT / "launch" / "worker.sh", "run", "--workdir=gs://b/run", "--x=a b"]
  process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
  wait_for(lambda: box.trained("pod-w-0") == [["launch/train.py", "--workdir=gs://b/run", "--x=a b"]])
  heard = [process.pid]
  if pathlib.Path("/proc/1/comm").read_text().strip() == "systemd":  # which signals them all when a machine shuts down
    heard.append(int((home / "gpt2_jax_state" / "pid").read_text()))
  for pid in heard:
    os.kill(pid, signal.SIGTERM)
  out, _ = process.communicate(timeout=20)
  assert process.returncode == 75 and "loss 3.0" in out and "stopped and saved at step 7" in out


def wait_for(condition):
  end = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.02)
