#!/usr/bin/env bash
# await.sh daemon | engine N: until check.sh is content with it, or START_S is over.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

deadline=$((SECONDS + START_S))
if [[ $1 == daemon ]]; then deadline=$((SECONDS + DAEMON_S)); fi
until [[ $1 == daemon ]] || healthy "$PROBE" "${PORTS[$2]}"; do
  recorded "engine-$2" >/dev/null || ((SECONDS < 5)) || fail "engine $2 ended while starting"
  ((SECONDS < deadline)) || fail "engine $2 did not become healthy within $START_S s"
  sleep 1
done
until bash "$HERE/check.sh" "$@"; do
  # What is healthy and not attached will not become so.
  [[ $1 == daemon ]] && ((SECONDS < deadline)) || exit 1
  sleep 1
done
