#!/usr/bin/env bash
# Stops in the order that is safe under MPS: the balancer, which lets requests
# finish; the engines, by SIGTERM, waited for; then the daemon, and only without
# clients. A busy client is never killed before it was asked and taken from MPS.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

[[ -d $RUN ]] || {
  say "nothing runs here ($RUN is not there)"
  exit 0
}
[[ -O $RUN ]] || fail "$RUN belongs to another user, who has to stop it"

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

# ---- the balancer

# In a start that failed it may run and not be recorded yet.
if [[ ! -f $RUN/balancer && -s $RUN/nginx/nginx.pid ]]; then record balancer "$(<"$RUN/nginx/nginx.pid")"; fi
if pid=$(recorded balancer); then
  mapfile -t balancer < <(tree "$pid")
  kill -QUIT "$pid"
  if ! gone "$DRAIN_S" "${balancer[@]}"; then
    say "requests were still running after $DRAIN_S s; they are cut off"
    signal TERM "${balancer[@]}"
    gone 10 "${balancer[@]}" || signal KILL "${balancer[@]}"
  fi
  say "the balancer has ended"
fi

# ---- the engines

# An engine's own process and everything of its session: an engine core outlives a killed parent.
members() {
  local file leader start pid session began state owner now
  for file in "$RUN"/engine-*; do
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

mapfile -t engines < <(members)
if ((${#engines[@]})); then
  leaders=()
  for file in "$RUN"/engine-*; do
    if [[ -f $file ]]; then leaders+=("$(<"$file")"); fi
  done
  signal TERM "${leaders[@]}"
  # Those that a dead leader left behind have nobody to tell them.
  gone "$STOP_S" "${leaders[@]}" || say "engines did not end within $STOP_S s of SIGTERM"
  gone 5 "${engines[@]}" || :
  mapfile -t left < <(members)
  if ((${#left[@]})); then
    signal TERM "${left[@]}"
    if ! gone 10 "${left[@]}"; then
      # Taken from MPS first: killed in the middle of its work a client can take the server with it.
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
    fi
  fi
  say "the engines have ended"
fi

# ---- the daemon

if ((MPS)) && daemon_answers; then
  attached=$(clients) || fail "the MPS daemon does not list its clients, so it is not told to quit"
  [[ -z $attached ]] || fail "the MPS daemon has clients that are not these engines (PID ${attached//$'\n'/, }); end them, then run stop.sh again"
  pair=
  if daemon=$(recorded daemon); then pair=$(<"$RUN/daemon"); fi
  for server in $(ask get_server_list); do record "server-$server" "$server"; done
  ask quit 60 >/dev/null || :
  if [[ -n $pair ]]; then
    if ! gone 30 "$pair"; then
      signal TERM "$pair"
      gone 10 "$pair" || fail "the MPS daemon (PID $daemon) does not end"
    fi
  elif daemon_answers; then
    fail "the MPS daemon in $RUN/pipe does not quit, and its process is not known"
  fi
  say "the MPS daemon has ended"
elif ((MPS)); then
  say "no MPS daemon answers any more"
  # Alive but mute: with no engine left nobody loses by it.
  if recorded daemon >/dev/null; then signal TERM "$(<"$RUN/daemon")"; fi
fi
for file in "$RUN"/server-*; do
  [[ -f $file ]] || continue
  pair=$(<"$file")
  if ! gone 5 "$pair"; then
    signal TERM "$pair"
    gone 10 "$pair" || fail "the MPS server (PID ${pair% *}) does not end"
  fi
done

# What MPS said is kept; everything else lived only while it ran.
for name in control.log server.log; do
  if [[ -s $RUN/log/$name ]]; then mkdir -p "$HERE/logs" && cp "$RUN/log/$name" "$HERE/logs/mps-$name"; fi
done
rm -rf "$RUN"
say "stopped; nothing is left but the logs in $HERE/logs"
