# Sourced by toy.sh and nightly.sh, after setup.sh: one stage as RANKS processes of this machine.
# Two processes of one thread beat one of two threads at this size (LOG.md): the toy runs
# data parallel, as the full run does. torchrun would do the same, a few seconds later.
# DEVICE=cuda (or mps) runs it on a GPU, in one process; a model this small gains nothing there.
# CONFIG=small (small.sh) takes the other presets, and DEVICE=auto the best device there is.
CONFIG=${CONFIG:-toy} DEVICE=${DEVICE:-cpu}
[ "$DEVICE" = cpu ] || RANKS=${RANKS:-1}
RANKS=${RANKS:-$(python -c 'import os
print(min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))')}
[ "$RANKS" = 1 ] || export OMP_NUM_THREADS=1
export PYTHONPATH=$PWD MASTER_ADDR=127.0.0.1 WORLD_SIZE=$RANKS
# The loopback device: some machines cannot resolve their own name, which gloo would ask for.
[ "$(uname)" = Darwin ] && loopback=lo0 || loopback=lo
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$loopback}
launch() {
  export MASTER_PORT=$((20000 + RANDOM % 20000))
  local pids=() rank status=0
  for ((rank = 0; rank < RANKS; rank++)); do RANK=$rank LOCAL_RANK=$rank python "$@" & pids+=($!); done
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  return $status
}
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT  # Ctrl-C leaves no rank behind

# stage SCRIPT DIRECTORY ARGUMENTS...: run it unless it is finished, resuming where it stopped.
stage() {
  local script=$1 dir=$OUT/$2; shift 2
  [ -f "$dir/manifest.json" ] && { echo "== $dir is finished"; return; }
  echo "== $dir"
  launch "$script" --config "$CONFIG" --device "${DEVICE#auto}" --out "$dir" --seed "$SEED" --resume "$@"
}
