#!/usr/bin/env bash
# The evidence behind the README, from nothing: the cascade with five seeds, ablations with three,
# a long run, and the strategies; then assets/evidence.md with its tables, pictures and CSV files.
# About 3 hours on 2 quiet cores. Given again it goes on where it stopped.
#
#   bash runs/nightly.sh [DIRECTORY]
#   SEEDS="0 1" ARMS="0" LONG=200 bash runs/nightly.sh      fewer of each
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
OUT=${1:-runs/out-evidence}
source runs/launch.sh

for SEED in ${SEEDS:-0 1 2 3 4}; do bash runs/toy.sh --seed "$SEED" --out "$OUT/seed$SEED"; done

# What each part is worth: one flag changed, from the same start, one directory an arm and seed.
# IF-RL as the cascade ran it; MOPD with a third of its prompts and 25 of 50 steps, so that it has a
# "recipe" of its own.
for SEED in ${ARMS:-0 1 2}; do
  from=$OUT/seed$SEED
  if_rl() { local arm=$1; shift
    stage train_rl.py "arms$SEED/if_rl-$arm" --stage if_rl --init "$from/sft" \
      --own_eval_samples 500 --eval_samples 128 --show_every 0 "$@"; }
  mopd() { local arm=$1 teachers=$2; shift 2
    stage train_mopd.py "arms$SEED/mopd-$arm" --init "$from/multi_domain_rl" --show_every 0 \
      --prompts 256 --steps 25 --warmup 4 --own_eval_samples 500 --eval_samples 128 --teachers "$teachers" "$@"; }
  best=multi_domain=$from/if_rl+$from/multi_domain_rl
  teachers=math=$from/sft,preference=$from/rlhf_side,$best

  if_rl recipe
  if_rl no_std --normalize_std false
  if_rl no_filtering --dynamic_filtering false
  if_rl no_thinking --thinking false
  if_rl router_trained --train_router
  if_rl no_bias_update --bias_rate 0
  if_rl bf16 --dtype bfloat16
  if_rl bf16_replay --dtype bfloat16 --routing_replay
  mopd recipe "$teachers"
  mopd gate_clamp "$teachers" --gate clamp
  mopd gate_none "$teachers" --gate none
  mopd no_warmup "$teachers" --warmup 0
  mopd per_token "$teachers" --denominator token
  mopd router_trained "$teachers" --train_router
  mopd one_teacher "math=$from/if_rl,preference=$from/if_rl,multi_domain=$from/if_rl"
  mopd last_teachers "math=$from/multi_domain_rl,preference=$from/rlhf_side,multi_domain=$from/multi_domain_rl"
done

# 2,000 steps of one stage, small batches; and without dynamic filtering.
SEED=0
long() { local arm=$1; shift
  stage train_rl.py "long/$arm" --stage if_rl --init "$OUT/seed0/sft" --steps "${LONG:-2000}" \
    --prompts 8 --rollouts 8 --lr 1e-4 --toy_rows 4000 --own_eval_samples 1000 --show_every 0 \
    --save_every 100 --log_groups 0 "$@"; }
long recipe
long no_filtering --dynamic_filtering false

# MOPD with the report's teachers alone and with the student's start for all other domains.
python -m bench.anchor $(for SEED in ${SEEDS:-0 1 2 3 4}; do echo "$OUT/seed$SEED"; done)

for SEED in ${ARMS:-0 1 2}; do python -m bench.probe "$OUT/seed$SEED"; done
python -m bench.evidence "$OUT" assets
