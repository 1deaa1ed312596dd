#!/usr/bin/env bash
# The cascade on a pretrained model that you have: SFT, IF-RL, RL on mathematics and multiple choice,
# then MOPD from these checkpoints. An interrupted run goes on when the command is given again.
#
#   bash runs/small.sh MODEL_DIR                 with generated rows (nanocascade/data/everyday.py)
#   bash runs/small.sh MODEL_DIR DATA_DIR        with your own: train.jsonl, test.jsonl (held out)
#                                                and sft.jsonl (answers to imitate; may be missing);
#                                                a stage that has no rows is left out
#   bash runs/small.sh MODEL_DIR --short         every stage for two steps, to see that it all works
#   bash runs/small.sh MODEL_DIR --cpu           short answers and few steps: a 135M model, two cores
#   bash runs/small.sh MODEL_DIR --lora_rank 16  adapters on frozen weights; any flag that all three
#                                                train scripts know may follow, as --dtype bfloat16
#   --out DIR                                    where the runs go (default: runs/out-small, with
#                                                --short runs/out-small-short)
#   DEVICE=cpu RANKS=2 bash runs/small.sh ...    default: the GPU if there is one; one process
#   SFT_FLAGS="--steps 50" RL_FLAGS="--rollouts 16 --lr 5e-6" MOPD_FLAGS=... bash runs/small.sh ...
#
# MODEL_DIR: a Hugging Face directory of nemotron_h, llama, qwen2, qwen3 or qwen3_moe. A model that
# does not think answers without a thought; give --thinking true for one that does. See
# docs/one-gpu.md for memory, minutes and what to change first.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] && [ -f "$1/config.json" ] || { sed -n '5,17s/^# \{0,1\}//p' "$0" >&2; exit 2; }
MODEL=$1; shift
source runs/setup.sh

DATA= OUT= SHORT= SEED=0 THINKING=false FLAGS=() SFT=() RL=() MOPD=() EVERYDAY=()
EVAL=(--eval_samples 200 --own_eval_samples 200)
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then DATA=$1; shift; fi
while [ $# -gt 0 ]; do
  case "$1" in
    --out) OUT=$2; shift 2 ;;
    --seed) SEED=$2; shift 2 ;;
    --thinking) THINKING=$2; shift 2 ;;
    --short)
      SHORT=-short EVERYDAY=(--rows 24 --test_rows 4)
      EVAL=(--eval_samples 4 --own_eval_samples 4 --eval_max_new_tokens 8)
      SFT=(--steps 2 --batch_tokens 512)
      RL=(--steps 2 --prompts 4 --rollouts 2 --max_new_tokens 8)
      MOPD=(--steps 2 --prompts 4 --rollouts 1 --max_new_tokens 8)
      shift ;;
    --cpu)
      EVAL=(--eval_samples 100 --own_eval_samples 200 --eval_max_new_tokens 48)
      FLAGS+=(--micro_tokens 2048 --max_rows 96)
      SFT=(--steps 16 --batch_tokens 2048 --row_tokens 256 --warmup 3 --schedule_steps 16)
      RL=(--steps 45 --prompts 8 --rollouts 8 --max_new_tokens 48 --lr 2e-5 --dynamic_filtering true)
      MOPD=(--steps 20 --prompts 32 --rollouts 1 --max_new_tokens 48 --lr 1e-5 --warmup 2)
      shift ;;
    *) FLAGS+=("$1"); shift ;;
  esac
done
OUT=${OUT:-runs/out-small$SHORT}
if [ -z "$DATA" ]; then
  DATA=$OUT/rows
  [ -f "$DATA/test.jsonl" ] ||
    python -m nanocascade.data.everyday "$DATA" --seed "$SEED" ${EVERYDAY[@]+"${EVERYDAY[@]}"}
fi
ROWS=$(python -m nanocascade.data "$DATA/train.jsonl")
DOMAINS=" "  # those of the training rows: a line "math: 40 rows, prompts of ..." each
while read -r line; do
  if [[ $line == *": "*" rows, "* ]]; then DOMAINS+="${line%%:*} "; fi
done <<< "$ROWS"
has() { [[ $DOMAINS == *" $1 "* ]]; }
CHOICE=  # the domains of the second RL stage: "math,mcqa" or one of them
for domain in math mcqa; do if has $domain; then CHOICE+=${CHOICE:+,}$domain; fi; done
if [ -z "$CHOICE" ] && ! has if; then
  echo "error: $DATA/train.jsonl has no rows of if, math or mcqa, which the stages here train" >&2
  exit 2
fi
[ "$THINKING" = true ] && STRIP=0.1 || STRIP=1

CONFIG=small RANKS=${RANKS:-1} DEVICE=${DEVICE:-auto}
source runs/launch.sh
run() { local script=$1 dir=$2; shift 2
  stage "$script" "$dir" --eval_data "$DATA/test.jsonl" "${EVAL[@]}" "$@" ${FLAGS[@]+"${FLAGS[@]}"}; }
rl() { local dir=$1; shift
  run train_rl.py "$dir" --init "$LAST" --data "$DATA/train.jsonl" --thinking "$THINKING" "$@" \
    ${RL[@]+"${RL[@]}"} ${RL_FLAGS:-}
  LAST=$OUT/$dir; }

START=$MODEL
if [ -f "$DATA/sft.jsonl" ]; then
  run train_sft.py sft --init "$MODEL" --data "$DATA/sft.jsonl" --strip_thinking $STRIP \
    ${SFT[@]+"${SFT[@]}"} ${SFT_FLAGS:-}
  START=$OUT/sft
fi
# Each stage starts from the last one. A domain's teacher is the checkpoint after its own stage; JSON,
# which no stage trains, has SFT's.
LAST=$START TEACHERS=
if has if; then
  rl if_rl --stage if_rl
  TEACHERS+=if=$LAST,
fi
if [ -n "$CHOICE" ]; then
  rl choice_rl --stage multi_domain_rl --domains "$CHOICE"
  for domain in ${CHOICE/,/ }; do TEACHERS+=$domain=$LAST,; done
fi
if has structured; then TEACHERS+=structured=$START,; fi
# After one RL stage alone the only teacher would be the student itself.
if has structured || { has if && [ -n "$CHOICE" ]; }; then
  run train_mopd.py mopd --init "$LAST" --data "$DATA/train.jsonl" --thinking "$THINKING" \
    ${MOPD[@]+"${MOPD[@]}"} --teachers "${TEACHERS}default=$LAST" ${MOPD_FLAGS:-}
fi

python runs/report.py "$OUT"
python -m nanocascade.show "$OUT"
