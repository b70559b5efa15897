#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs the project on one host of a TPU slice, and runs a command of gpt2-jax there. tpu_vm.sh
# calls it over ssh on every worker; GKE, xpk and SkyPilot call `run`.
#
#   worker.sh install                 Python and the project, into ~/gpt2_jax_env
#   worker.sh run COMMAND FLAGS...    `gpt2-jax COMMAND FLAGS` in the foreground; passes SIGTERM on
#   worker.sh start COMMAND FLAGS...  the same, detached from the terminal; a second start of the
#                                     same changes nothing
#   worker.sh follow                  the log, from its last 100 lines on until the command ends
#   worker.sh state                   "@worker HOST none|running|ended STATUS|stopped STATUS|lost"
#   worker.sh stop [SECONDS]          SIGTERM, so that training saves; SIGKILL after SECONDS (300)
#
# COMMAND is train if it is left out. On several hosts it is train or evaluate: the same command on
# each of them is one run.
#
# Exit status of `run`: that of the command (0 done, 2 bad input, 75 another process was lost), with
# two exceptions, for whoever starts what fails again. What a signal stopped ends with 75: training
# that has saved its step, an evaluation with finished cells. The 1 of another command than train
# says that a part of its work could not be done, and would not be at the next try: it becomes 2.
set -euo pipefail
cd "$(dirname "$0")/.."

ENV="$HOME/gpt2_jax_env" # outlives the tree, which every copy replaces
PYTHON="$ENV/bin/python"
[ -x "$PYTHON" ] || PYTHON=python3 # of an image that has the project in it
STATE="$HOME/gpt2_jax_state" # log, flags, pid (of the command), status, lock, stop_requested
POLL="${GPT2_JAX_POLL:-1}"   # seconds between two looks at a process
EXIT_RETRY=75                # EX_TEMPFAIL of sysexits.h

say() { echo "@worker $(hostname) $*"; }

running() { [ -e "$STATE/lock" ] && ! flock --nonblock "$STATE/lock" true; }

install() {
  trap 'say "install failed at: $BASH_COMMAND"' ERR
  # Images of TPU VMs have Python 3.10: uv, from PyPI, installs the one that the whole suite passes
  # with, and those versions. An environment of another Python is made anew.
  python3 -m pip install --user --quiet uv
  grep --quiet 'version_info = 3.13' "$ENV/pyvenv.cfg" 2>/dev/null ||
    python3 -m uv venv --quiet --clear --python 3.13 "$ENV"
  python3 -m uv pip install --quiet --python "$ENV/bin/python" --constraint launch/constraints.txt \
    --editable '.[tpu,eval]'
  say installed
}

# Whether init is systemd, which signals every process when a VM shuts down: a second SIGTERM would
# end training before it has saved. In a container only the first process gets the signal and has to
# pass it on.
init_is_systemd() { [ "$(cat /proc/1/comm)" = systemd ]; }

# Sets `command` and `flags`. Exits with 2 for what is no command, or not one for several hosts.
read_command() {
  command=train
  case "${1:-}" in
    -* | '') ;;
    *) command="$1"; shift ;;
  esac
  flags=("$@")
  [[ "$command" =~ ^[a-z]+$ && -e "launch/$command.py" && -e "gpt2_jax/cli/$command.py" ]] ||
    { say "refused: gpt2-jax has no command ${command:0:80}"; exit 2; }
  case "$command" in
    train | evaluate) ;;
    *) ! has_other_hosts ||
      { say "refused: $command runs on one host, and this is one of several"; exit 2; } ;;
  esac
}

# As GKE and SkyPilot tell it; tpu_vm.sh knows it from the topology.
has_other_hosts() {
  [[ "${TPU_WORKER_HOSTNAMES:-}" = *,* || "${MEGASCALE_NUM_SLICES:-1}" != 1 ||
    "${SKYPILOT_NUM_NODES:-1}" != 1 ]]
}

# Runs the command with its output in the log (shown, too, if SHOW is set) and waits for its end.
execute() {
  local child shown status signalled
  exec 9>"$STATE/lock"
  flock --nonblock 9 || { say "refused: another command runs here already"; exit 2; }
  rm -f "$STATE/status" "$STATE/stop_requested"
  : >"$STATE/log" # there before it is shown

  "$PYTHON" "launch/$command.py" ${flags[@]+"${flags[@]}"} >"$STATE/log" 2>&1 </dev/null 9>&- &
  child=$!
  echo "$child" >"$STATE/pid"
  trap 'signalled=yes; init_is_systemd || kill -TERM "$child" 2>/dev/null || true' TERM
  [ -z "${SHOW:-}" ] || { show_log & }
  shown=$!

  # A trapped signal ends `wait` early, and then it has to be called again.
  while :; do
    signalled='' status=0
    wait "$child" || status=$?
    [ -n "$signalled" ] || break
  done
  [ -z "${SHOW:-}" ] || wait "$shown" || true

  case "$command $status" in
    'train 0') ! grep -q 'stopped and saved at step' "$STATE/log" || status=$EXIT_RETRY ;;
    'train 1') ;;
    *' 1') status=2 ;;
    *' 143') status=$EXIT_RETRY ;; # SIGTERM
  esac
  echo "$status" >"$STATE/status.new" && mv "$STATE/status.new" "$STATE/status"
  return "$status"
}

show_log() {
  exec tail --lines=100 --follow --sleep-interval="$POLL" --pid="$(cat "$STATE/pid")" \
    "$STATE/log" 9>&-
}

run() {
  read_command "$@"
  mkdir -p "$STATE"
  SHOW=yes execute
}

start() {
  read_command "$@"
  mkdir -p "$STATE"
  local words
  words=$(printf '%q ' "$command" ${flags[@]+"${flags[@]}"})
  if running; then
    [ "$words" = "$(cat "$STATE/flags")" ] ||
      { say "refused: another command, or the same with other flags, runs here; stop that first"
        exit 2; }
    say running
    return
  fi

  printf '%s\n' "$words" >"$STATE/flags"
  rm -f "$STATE/pid"
  setsid nohup bash launch/worker.sh detached "$@" >/dev/null 2>&1 </dev/null &

  # Started means that the command runs: its pid is there.
  until [ -s "$STATE/pid" ]; do
    kill -0 $! 2>/dev/null || { say "refused: nothing can be written to $STATE"; exit 2; }
    sleep 0.05
  done
  say started
}

follow() {
  [ -e "$STATE/log" ] || { say "none: nothing was started here"; return; }
  if running; then show_log; else tail --lines=100 "$STATE/log"; fi
}

state() {
  if running; then
    say running
  elif [ -e "$STATE/status" ]; then
    say "$([ -e "$STATE/stop_requested" ] && echo stopped || echo ended) $(cat "$STATE/status")"
  elif [ -e "$STATE/flags" ]; then
    say lost
  else
    say none
  fi
}

stop() {
  local end=$((SECONDS + ${1:-300}))
  if running; then
    : >"$STATE/stop_requested"
    kill -TERM "$(cat "$STATE/pid")" 2>/dev/null || true
    while running && [ "$SECONDS" -lt "$end" ]; do sleep "$POLL"; done
    ! running || kill -KILL "$(cat "$STATE/pid")" 2>/dev/null || true
    while running; do sleep "$POLL"; done
  fi
  state
}

verb="${1:?usage: worker.sh install|run|start|follow|state|stop; see the top of this file}"
shift
case "$verb" in
  install | run | start | follow | state | stop) "$verb" "$@" ;;
  detached) read_command "$@"; execute ;;
  *) echo "error: no verb $verb; there are install, run, start, follow, state, stop" >&2; exit 2 ;;
esac
