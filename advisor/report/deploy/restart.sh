#!/usr/bin/env bash
# restart.sh N: ends engine N and starts it again, while the others serve on.
# Exit 0: it is healthy and attached again.
set -euo pipefail
# shellcheck source=engines.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/engines.sh"

index=${1-}
[[ $index =~ ^[0-9]+$ && -n ${PORTS[index]-} ]] || fail "restart.sh N: an engine from 0 to $((${#PORTS[@]} - 1)) is expected"
[[ -d $RUN ]] || fail "nothing runs here ($RUN is not there); start.sh starts it"
[[ -O $RUN ]] || fail "$RUN belongs to another user"
# Before anything is ended: without the daemon it would not come back.
if ((MPS)); then daemon_answers || fail "no MPS daemon answers in $RUN/pipe; run stop.sh, then start.sh"; fi

forget_mps
ulimit -Sn 65536 2>/dev/null || ulimit -Sn 16384 2>/dev/null || :
end_engines "$index"
say "engine $index has ended"
# One that is not as it has to be would serve all the same.
give_up() {
  local code=$?
  trap - EXIT
  say "engine $index is ended again; the others serve on"
  end_engines "$index"
  exit "$code"
}
trap give_up EXIT
trap 'exit 130' INT TERM
start_engine "$index"
await_engines "$index"
trap - EXIT
