# shellcheck shell=bash
# What the other scripts share: reads settings.sh beside it, and changes nothing.
# Needs bash 4.4 or newer, coreutils and util-linux.
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=/dev/null
source "$HERE/settings.sh"

say() { printf '%s\n' "$*" >&2; }
fail() {
  say "error: $*"
  exit 1
}

# ask COMMAND: what the MPS daemon answers. One question at a time, and again
# when it fails: the daemon fails now and then when two ask at once.
ask() {
  local attempt answer
  for attempt in 1 2 3 4; do
    if ((attempt > 1)); then sleep 0.2; fi
    if answer=$(printf '%s\n' "$1" | CUDA_MPS_PIPE_DIRECTORY=$RUN/pipe CUDA_MPS_LOG_DIRECTORY=$RUN/log \
      timeout "${2:-5}" flock "$RUN/asking" nvidia-cuda-mps-control 2>/dev/null) &&
      [[ ${answer,,} != *"cannot find mps control daemon"* ]]; then
      printf '%s\n' "$answer"
      return 0
    fi
  done
  return 1
}

daemon_answers() { [[ -d $RUN/pipe ]] && ask get_server_list >/dev/null; }

# The PIDs of all clients of all servers, one a line.
clients() {
  local servers server
  servers=$(ask get_server_list) || return 1
  for server in $servers; do ask "get_client_list $server" || return 1; done
}

# Every process: PID, parent, session, start time, state, user; one a line.
processes() {
  local stat line pid fields owner
  for stat in /proc/[0-9]*/stat; do
    line=
    { IFS= read -r -d '' line <"$stat" || :; } 2>/dev/null
    [[ -n $line ]] || continue
    pid=${line%% *}
    # The name in brackets may hold anything; what follows it is plain.
    read -r -a fields <<<"${line##*) }"
    [[ -O ${stat%/stat} ]] && owner=own || owner=other
    printf '%s %s %s %s %s %s\n' "$pid" "${fields[1]}" "${fields[3]}" "${fields[19]}" "${fields[0]}" "$owner"
  done
}

# start_of PID: when a process started, by the kernel's count; nothing where
# there is none, or a zombie.
start_of() {
  local line=
  local -a fields
  { IFS= read -r -d '' line <"/proc/$1/stat" || :; } 2>/dev/null
  [[ -n $line ]] || return 0
  read -r -a fields <<<"${line##*) }"
  [[ ${fields[0]} == [ZX] ]] || printf '%s\n' "${fields[19]}"
}

# record NAME PID: remember a process by PID and start time.
record() { printf '%s %s\n' "$2" "$(start_of "$2")" >"$RUN/$1"; }

# recorded NAME: the PID of a remembered process, if exactly that one runs.
recorded() {
  local pid start
  [[ -f $RUN/$1 ]] || return 1
  read -r pid start <"$RUN/$1" || return 1
  [[ -n $start && $(start_of "$pid") == "$start" ]] && printf '%s\n' "$pid"
}

# tree PID: "PID START" of a process and of all that came of it.
tree() {
  local -A children=() starts=()
  local pid parent start state
  while read -r pid parent _ start state _; do
    [[ $state == [ZX] ]] && continue
    children[$parent]+=" $pid"
    starts[$pid]=$start
  done < <(processes)
  local -a queue=("$1") more
  while ((${#queue[@]})); do
    pid=${queue[0]}
    read -r -a more <<<"${children[$pid]-}"
    queue=("${queue[@]:1}" "${more[@]}")
    [[ -n ${starts[$pid]-} ]] && printf '%s %s\n' "$pid" "${starts[$pid]}"
  done
  return 0
}

# engine_cores PID: the PIDs of the engine cores below an engine. They are the
# processes that use the GPU, and bear a title.
engine_cores() {
  local pid name words
  while read -r pid _; do
    { name=$(<"/proc/$pid/comm") && words=$(tr '\0' '\n' <"/proc/$pid/cmdline"); } 2>/dev/null || continue
    if [[ $name == VLLM::EngineCor* || $words == VLLM::EngineCor* || $words == *$'\n'VLLM::EngineCor* ]]; then
      printf '%s\n' "$pid"
    fi
  done < <(tree "$1")
}

# healthy HOST PORT: whether GET /health there is answered by 200.
healthy() {
  # shellcheck disable=SC2016
  timeout 5 bash -c 'exec 3<>"/dev/tcp/$0/$1" &&
    printf "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" >&3 &&
    read -r -u 3 answer && [[ $answer == "HTTP/1."?" 200"* ]]' "$1" "$2" 2>/dev/null
}

# Variables of another MPS or another vLLM must not reach the daemon or an engine.
forget_mps() {
  local name
  for name in $(compgen -e CUDA_MPS_) VLLM_PORT; do unset "$name"; done
}
