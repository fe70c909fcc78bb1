#!/usr/bin/env bash
# Starts what was measured: the MPS daemon, the first engine, the others, and
# only when every engine is healthy and attached to MPS the balancer. What does
# not become so is stopped again, all of it. Exit 0: it serves.
set -euo pipefail
# shellcheck source=engines.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/engines.sh"

# ---- is all there that is needed

needed=("${VLLM[0]}" taskset setsid timeout flock)
if ((MPS)); then needed+=(nvidia-cuda-mps-control); fi
if ((BALANCER)); then needed+=(nginx); fi
for program in "${needed[@]}"; do
  command -v "$program" >/dev/null || fail "$program is not on PATH"
done
if command -v nvidia-smi >/dev/null && ! nvidia-smi --id="$GPU" --query-gpu=uuid --format=csv,noheader >/dev/null 2>&1; then
  fail "this machine has no GPU $GPU; see nvidia-smi -L, and write the deployment with --gpu"
fi
for port in "${PORTS[@]}" "$PUBLIC_PORT"; do
  # shellcheck disable=SC2016
  if timeout 5 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$PROBE" "$port" 2>/dev/null; then
    fail "port $port is in use"
  fi
done
# An MPS server holds many files open for each of its clients.
ulimit -Sn 65536 2>/dev/null || ulimit -Sn 16384 2>/dev/null || say "warning: at most $(ulimit -Sn) open files; 16384 or more are wanted"

# Clients of two daemons of one GPU only take turns.
if ((MPS)); then
  while read -r pid _ _ _ state _; do
    [[ $state == [ZX] ]] && continue
    words=$(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline") || continue
    [[ $words == *nvidia-cuda-mps-control\ -[df]* ]] || continue
    seen=$(tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" | sed -n 's/^CUDA_VISIBLE_DEVICES=//p') || seen=
    # One that was started for other GPUs by UUID is none of ours.
    if [[ ${seen:-all} == GPU-* && $GPU == GPU-* && ,$seen, != *,$GPU,* ]]; then continue; fi
    fail "another MPS daemon runs (PID $pid); a GPU has only one: end it first, when nothing uses it any more"
  done < <(processes)
fi

# The directory is the lock: of two starts one makes it.
mkdir -m 700 "$RUN" 2>/dev/null || fail "$RUN is there: this deployment runs already, or was not stopped; run stop.sh"
serving=0
give_up() {
  local code=$?
  ((serving)) && return 0
  trap - EXIT
  say "start failed: stopping what was started"
  bash "$HERE/stop.sh" || say "warning: something is left; see above"
  exit $((code ? code : 1))
}
trap give_up EXIT
trap 'exit 130' INT TERM

forget_mps
mkdir -p "$HERE/logs" "$RUN/rpc"

# ---- the daemon

if ((MPS)); then
  mkdir -m 700 "$RUN/pipe" "$RUN/log"
  env "${DAEMON_ENVIRONMENT[@]}" nvidia-cuda-mps-control -d >>"$HERE/logs/mps.log" 2>&1 </dev/null ||
    fail "nvidia-cuda-mps-control -d failed; see $HERE/logs/mps.log"
  deadline=$((SECONDS + DAEMON_S))
  until daemon_answers; do
    ((SECONDS < deadline)) || fail "no MPS daemon answers in $RUN/pipe"
    sleep 0.5
  done
  # Written by the daemon itself. Without it the daemon is only asked to quit, and gets no signal.
  if [[ -s $RUN/pipe/nvidia-cuda-mps-control.pid ]]; then record daemon "$(<"$RUN/pipe/nvidia-cuda-mps-control.pid")"; fi
  say "the MPS daemon answers"
fi

# ---- the engines

# The first alone: it fills the compile cache for the others, and shows a wrong set-up early.
start_engine 0
await_engines 0
if ((MPS)); then
  # Should the daemon be killed, they are still to be found.
  for server in $(ask get_server_list); do record "server-$server" "$server"; done
fi
rest=("${!PORTS[@]}")
rest=("${rest[@]:1}")
if ((${#rest[@]})); then
  for index in "${rest[@]}"; do start_engine "$index"; done
  await_engines "${rest[@]}"
  bash "$HERE/check.sh" engines || fail "not every engine is as it has to be"
fi

# ---- the balancer, last

if ((BALANCER)); then
  pinned=()
  if [[ -n $BALANCER_CORES ]]; then pinned=(taskset -c "$BALANCER_CORES"); fi
  mkdir -p "$RUN/nginx"
  "${pinned[@]}" nginx -p "$HERE/" -c "$HERE/nginx.conf" -e "$HERE/logs/balancer.log" ||
    fail "nginx does not start; see $HERE/logs/balancer.log"
  deadline=$((SECONDS + 30))
  until healthy "$PUBLIC_PROBE" "$PUBLIC_PORT"; do
    ((SECONDS < deadline)) || fail "the balancer does not answer on port $PUBLIC_PORT; see $HERE/logs/balancer.log"
    sleep 0.5
  done
  record balancer "$(<"$RUN/nginx/nginx.pid")"
fi

serving=1
say "serving on http://$PUBLIC_HOST_SHOWN:$PUBLIC_PORT; check.sh looks after it, stop.sh ends it"
