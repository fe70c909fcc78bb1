#!/usr/bin/env bash
# The MPS daemon in the foreground. TERM makes it quit, which waits for clients:
# end the engines first.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

forget_mps
mkdir -p "$RUN"
if daemon_answers; then fail "an MPS daemon answers in $RUN/pipe already"; fi
rm -rf "$RUN/pipe" "$RUN/log"
mkdir -m 700 "$RUN/pipe" "$RUN/log"
export CUDA_MPS_PIPE_DIRECTORY=$RUN/pipe CUDA_MPS_LOG_DIRECTORY=$RUN/log
if [[ -n $GPU ]]; then export CUDA_VISIBLE_DEVICES=$GPU; fi

stopping=0
trap 'stopping=1' TERM INT
nvidia-cuda-mps-control -f &
daemon=$!
code=0
while [[ -n $(start_of "$daemon") ]]; do
  # A failed question is asked again; an answered one is waited for.
  if ((stopping)); then ask quit 600 >/dev/null || sleep 1; fi
  # Interrupted by the signal, it is called again.
  wait "$daemon" && code=0 || code=$?
done
# Only then: what finds no directory knows that there is no daemon.
rm -rf "$RUN/pipe"
if ((stopping)); then exit 0; fi
say "error: the MPS daemon ended by itself (code $code)"
exit 1
