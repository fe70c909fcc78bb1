# shellcheck shell=bash
# Starting, waiting for and ending engines, for start.sh, stop.sh and restart.sh.
# shellcheck source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

# ---- starting

declare -a launched=()

start_engine() {
  local index=$1
  local -n variables="ENGINE_${1}_ENVIRONMENT" arguments="ENGINE_${1}"
  local -a pinned=()
  if [[ -n ${CORES[index]} ]]; then pinned=(taskset -c "${CORES[index]}"); fi
  # In a session of its own: a Ctrl-C here is not for it, and its processes are known by it.
  setsid env "${variables[@]}" "${pinned[@]}" bash "$HERE/engine.sh" "$index" "${VLLM[@]}" "${arguments[@]}" \
    >"$HERE/logs/engine-$index.log" 2>&1 </dev/null &
  launched[index]=$!
  record "engine-$index" "$!"
}

# await_engines INDEX...: until all of them are healthy.
await_engines() {
  local index deadline=$((SECONDS + START_S))
  for index in "$@"; do
    until healthy "$PROBE" "${PORTS[index]}"; do
      for other in "$@"; do
        [[ -n $(start_of "${launched[other]}") ]] ||
          fail "engine $other ended while starting; the end of $HERE/logs/engine-$other.log: $(tail -n 1 "$HERE/logs/engine-$other.log")"
      done
      ((SECONDS < deadline)) || fail "engine $index did not become healthy within $START_S s; see $HERE/logs/engine-$index.log"
      sleep 0.5
    done
    say "engine $index answers"
  done
  for index in "$@"; do
    bash "$HERE/check.sh" engine "$index" || fail "engine $index is not as it has to be"
  done
}

# ---- ending

# gone SECONDS PAIR...: whether all of these processes, each "PID START", end in time.
gone() {
  local deadline=$((SECONDS + $1)) pair pid start left
  shift
  while :; do
    left=0
    for pair in "$@"; do
      read -r pid start <<<"$pair"
      if [[ -n $start && $(start_of "$pid") == "$start" ]]; then left=1; fi
    done
    ((left)) || return 0
    ((SECONDS < deadline)) || return 1
    sleep 0.2
  done
}

# signal NAME PAIR...: to those of them that are still the same process.
signal() {
  local name=$1 pair pid start
  shift
  for pair in "$@"; do
    read -r pid start <<<"$pair"
    if [[ -n $start && $(start_of "$pid") == "$start" ]]; then kill "-$name" "$pid" 2>/dev/null || :; fi
  done
}

# members INDEX...: an engine's own process and everything of its session, each
# "PID START": an engine core outlives a killed parent.
members() {
  local index file leader start pid session began state owner now
  for index in "$@"; do
    file=$RUN/engine-$index
    [[ -f $file ]] || continue
    read -r leader start <"$file" || continue
    now=$(start_of "$leader")
    # Another process has this PID by now, so the session is not ours either.
    [[ -z $now || $now == "$start" ]] || continue
    while read -r pid _ session began state owner; do
      if [[ $session == "$leader" && $owner == own && $state != [ZX] ]] && ((began >= start)); then printf '%s %s\n' "$pid" "$began"; fi
    done < <(processes)
    if [[ $now == "$start" ]]; then tree "$leader"; fi
  done | sort -u
}

# end_engines INDEX...: SIGTERM, wait; then the rest, taken from MPS before it is killed.
end_engines() {
  local index server attached pair
  local -a all leaders=() left
  mapfile -t all < <(members "$@")
  ((${#all[@]})) || return 0
  for index in "$@"; do
    if [[ -f $RUN/engine-$index ]]; then leaders+=("$(<"$RUN/engine-$index")"); fi
  done
  signal TERM "${leaders[@]}"
  gone "$STOP_S" "${leaders[@]}" || say "engines did not end within $STOP_S s of SIGTERM"
  gone 5 "${all[@]}" || :
  # Those that a dead leader left behind have nobody to tell them.
  mapfile -t left < <(members "$@")
  ((${#left[@]})) || return 0
  signal TERM "${left[@]}"
  gone 10 "${left[@]}" && return 0
  # Killed in the middle of its work a client can take the server with it.
  if ((MPS)); then
    for server in $(ask get_server_list || :); do
      attached=$(ask "get_client_list $server" || :)
      for pair in "${left[@]}"; do
        if [[ $'\n'$attached$'\n' == *$'\n'${pair%% *}$'\n'* ]]; then ask "terminate_client $server ${pair%% *}" 30 >/dev/null || :; fi
      done
    done
  fi
  say "SIGKILL to ${left[*]%% *}"
  signal KILL "${left[@]}"
  gone 30 "${left[@]}" || fail "these processes do not end: ${left[*]%% *}; the MPS daemon is left alone"
}
