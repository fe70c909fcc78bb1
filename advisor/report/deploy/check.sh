#!/usr/bin/env bash
# check.sh            the daemon, every engine and the balancer
# check.sh daemon     only whether the MPS daemon answers
# check.sh engine N   only engine N: alive, healthy, attached to MPS
# check.sh engines    every engine
# Exit 0: all is well. Exit 1: it is not, and a line says what.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

wrong=0
bad() {
  say "NOT OK  $*"
  wrong=1
}
good() { say "ok      $*"; }

check_daemon() {
  local server status
  ((MPS)) || return 0
  if ! daemon_answers; then
    bad "no MPS daemon answers in $RUN/pipe; an engine started now would run without MPS and say nothing"
    return 0
  fi
  good "the MPS daemon answers"
  for server in $(ask get_server_list); do
    status=$(ask "get_server_status $server") || status="no answer"
    if [[ $status == *ACTIVE* ]]; then good "MPS server $server is ACTIVE"; else bad "MPS server $server: $status"; fi
  done
}

# check_engine N ATTACHED: with all clients of the daemon, one a line.
check_engine() {
  local index=$1 attached=$2 pid core cores
  if ! pid=$(recorded "engine-$index"); then
    bad "engine $index does not run"
    return 0
  fi
  if ! healthy "$PROBE" "${PORTS[index]}"; then
    bad "engine $index (PID $pid) does not answer http://$PROBE:${PORTS[index]}/health"
    return 0
  fi
  if ! ((MPS)); then
    good "engine $index (PID $pid) answers on port ${PORTS[index]}"
    return 0
  fi
  cores=$(engine_cores "$pid")
  if [[ -z $cores ]]; then
    bad "engine $index (PID $pid) has no engine core that could be found"
    return 0
  fi
  for core in $cores; do
    if [[ $'\n'$attached$'\n' == *$'\n'$core$'\n'* ]]; then
      good "engine $index (PID $pid) answers on port ${PORTS[index]}; its core $core is attached to MPS"
    else
      bad "engine $index (PID $pid): its core $core is NOT attached to MPS; it runs without and says nothing"
    fi
  done
}

check_engines() {
  local index attached=
  if ((MPS)) && ! attached=$(clients); then
    bad "the MPS daemon does not list its clients"
    return 0
  fi
  for index in "$@"; do check_engine "$index" "$attached"; done
}

check_balancer() {
  ((BALANCER)) || return 0
  if healthy "$PUBLIC_PROBE" "$PUBLIC_PORT"; then
    good "the balancer answers on port $PUBLIC_PORT"
  else
    bad "the balancer does not answer http://$PUBLIC_PROBE:$PUBLIC_PORT/health"
  fi
}

case ${1-all} in
  daemon) check_daemon ;;
  engine) check_engines "$2" ;;
  engines) check_engines "${!PORTS[@]}" ;;
  all)
    check_daemon
    check_engines "${!PORTS[@]}"
    check_balancer
    ;;
  *) fail "check.sh [daemon | engine N | engines]" ;;
esac
exit "$wrong"
