#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs and trains on one host of a TPU slice. tpu_vm.sh calls it over ssh on every worker; GKE,
# xpk and SkyPilot call `run`.
#
#   worker.sh install          Python and the project, into ~/gpt2_jax_env
#   worker.sh run FLAGS...     launch/train.py FLAGS in the foreground; SIGTERM is passed on
#   worker.sh start FLAGS...   the same, detached from the terminal; a second start with the same
#                              flags changes nothing
#   worker.sh follow           the log, from its last 100 lines on until training ends
#   worker.sh state            one line "@worker HOST none|running|ended STATUS|stopped STATUS|lost"
#   worker.sh stop [SECONDS]   SIGTERM, so that the step is saved; SIGKILL after SECONDS (300)
#
# Exit status of `run`: that of train.py (0 done, 2 bad input, 75 another process was lost), with
# one exception. Training that a signal stopped, with its step saved, also ends with 75: whoever
# runs it should start the same command again.
set -euo pipefail
cd "$(dirname "$0")/.."

ENV="$HOME/gpt2_jax_env" # outlives the tree, which every copy replaces
PYTHON="$ENV/bin/python"
[ -x "$PYTHON" ] || PYTHON=python3 # of an image that has the project in it
STATE="$HOME/gpt2_jax_state" # log, flags, pid (of train.py), status, lock, stop_requested
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
# end train.py before it has saved. In a container only the first process gets the signal and has to
# pass it on.
init_is_systemd() { [ "$(cat /proc/1/comm)" = systemd ]; }

# Runs train.py with its output in the log (shown, too, if SHOW is set) and waits for its end.
train() {
  local child shown status signalled
  exec 9>"$STATE/lock"
  flock --nonblock 9 || { say "refused: training runs here already"; exit 2; }
  rm -f "$STATE/status" "$STATE/stop_requested"

  "$PYTHON" launch/train.py "$@" >"$STATE/log" 2>&1 </dev/null 9>&- &
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

  if [ "$status" = 0 ] && grep -q 'stopped and saved at step' "$STATE/log"; then
    status=$EXIT_RETRY
  fi
  echo "$status" >"$STATE/status.new" && mv "$STATE/status.new" "$STATE/status"
  return "$status"
}

show_log() {
  exec tail --lines=100 --follow --sleep-interval="$POLL" --pid="$(cat "$STATE/pid")" \
    "$STATE/log" 9>&-
}

run() {
  mkdir -p "$STATE"
  SHOW=yes train "$@"
}

start() {
  mkdir -p "$STATE"
  local flags
  flags=$(printf '%q ' "$@")
  if running; then
    [ "$flags" = "$(cat "$STATE/flags")" ] ||
      { say "refused: training with other flags runs here; stop that first"; exit 2; }
    say running
    return
  fi

  printf '%s\n' "$flags" >"$STATE/flags"
  rm -f "$STATE/pid"
  setsid nohup bash launch/worker.sh detached "$@" >/dev/null 2>&1 </dev/null &

  # Started means that train.py runs: its pid is there.
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
  detached) train "$@" ;;
  *) echo "error: no verb $verb; there are install, run, start, follow, state, stop" >&2; exit 2 ;;
esac
