#!/usr/bin/env bash
# engine.sh INDEX COMMAND...: becomes an engine, and never one without the MPS
# daemon. (Where there is a pipe directory and no daemon, CUDA runs a client
# without MPS and says nothing.)
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

index=$1
shift
mkdir -p "$RUN/rpc"
# The PID stays the same when this becomes the engine.
record "engine-$index" "$$"
if ((MPS)); then
  waited=0
  until daemon_answers; do
    ((waited += 1))
    ((waited <= DAEMON_S)) || fail "no MPS daemon answers in $RUN/pipe: engine $index would run without MPS"
    sleep 1
  done
else
  mkdir -p "$RUN/empty"
fi
exec "$@"
