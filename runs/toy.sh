#!/usr/bin/env bash
# The whole cascade on a laptop: a fresh machine to a finished report. No GPU, no download of
# weights or data. An interrupted run goes on where it stopped when the command is given again.
#
#   bash runs/toy.sh              every stage, about 15 minutes on 2 cores
#   bash runs/toy.sh --short      every stage for a few steps, to see that it all works
#   bash runs/toy.sh --thorough   2,000 evaluation samples for every domain after every stage
#   bash runs/toy.sh --seed 1     another seed
#   DEVICE=cuda bash runs/toy.sh  on a GPU (default: cpu)
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh

SEED=0 OUT=runs/out SHORT=() RL=() MOPD=() EVAL=() FINAL=(--eval_samples 2000)
while [ $# -gt 0 ]; do
  case "$1" in
    --seed) SEED=$2; OUT=runs/out-seed$2; shift 2 ;;
    --out) OUT=$2; shift 2 ;;
    --thorough) EVAL=(--eval_samples 2000 --own_eval_samples 2000); shift ;;
    --short)
      # One process: starting a second costs more than a few steps gain.
      OUT=runs/out-short FINAL=() RANKS=${RANKS:-1}
      EVAL=(--eval_samples 8 --own_eval_samples 8 --eval_max_new_tokens 24 --save_every 1)
      SHORT=(--steps 3 --reference_samples 8 --toy_rows 60)
      RL=(--steps 2 --prompts 4 --rollouts 4 --show_every 0 --toy_rows 30)
      MOPD=(--steps 2 --prompts 4 --rollouts 2 --show_every 0 --toy_rows 30)
      shift ;;
    *) echo "error: unknown option $1 (have --short, --thorough, --seed N, --out DIR)" >&2; exit 2 ;;
  esac
done

source runs/launch.sh
rl() { local dir=$1 name=$2 from=$3; shift 3
  stage train_rl.py "$dir" --stage "$name" --init "$OUT/$from" ${RL[@]+"${RL[@]}"} ${EVAL[@]+"${EVAL[@]}"} "$@"; }

stage train_sft.py sft ${SHORT[@]+"${SHORT[@]}"} ${EVAL[@]+"${EVAL[@]}"}
rl if_rl if_rl sft
rl multi_domain_rl multi_domain_rl if_rl
rl rlhf_side rlhf sft                        # the preference teacher, a short side branch
stage train_mopd.py mopd --init "$OUT/multi_domain_rl" ${MOPD[@]+"${MOPD[@]}"} ${EVAL[@]+"${EVAL[@]}"} \
  --teachers "math=$OUT/sft,preference=$OUT/rlhf_side,multi_domain=$OUT/if_rl+$OUT/multi_domain_rl,default=$OUT/multi_domain_rl"
rl rlhf rlhf mopd --lr 1.5e-4                 # gentler than the side branch: MOPD left little to learn
rl long_context_rl long_context_rl rlhf
rl code_rl code_rl long_context_rl
rl swe_rl swe_rl code_rl ${FINAL[@]+"${FINAL[@]}"}
# MOPD against the RL that made its teacher, from the same start: SFT.
stage train_mopd.py mopd_from_sft --init "$OUT/sft" --eval_data "" \
  --domains if,preference --balance --prompts 48 --rollouts 4 --lr 1e-3 --warmup 5 --warmup_from 1e-4 --schedule constant --steps 30 \
  ${MOPD[@]+"${MOPD[@]}"} \
  --teachers "preference=$OUT/rlhf_side,multi_domain=$OUT/if_rl"
# GRPO on mathematics from where MOPD started: nothing to catch up with, two curves.
rl math_rl math_rl multi_domain_rl --eval_samples 0

python runs/report.py "$OUT"
python -m bench.claims "$OUT"
python -m nanocascade.show "$OUT"  # one page of everything, to be opened in a browser
