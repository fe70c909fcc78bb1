#!/usr/bin/env bash
# Stops in the order that is safe under MPS: the balancer, which lets requests
# finish; the engines, by SIGTERM, waited for; then the daemon, and only without
# clients. A busy client is never killed before it was asked and taken from MPS.
set -euo pipefail
# shellcheck source=engines.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/engines.sh"

[[ -d $RUN ]] || {
  say "nothing runs here ($RUN is not there)"
  exit 0
}
[[ -O $RUN ]] || fail "$RUN belongs to another user, who has to stop it"

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

end_engines "${!PORTS[@]}"
say "the engines have ended"

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
