#!/usr/bin/env bash
# The cascade on a pretrained model that you have: SFT, IF-RL, RL on mathematics and multiple choice,
# then MOPD from these checkpoints. An interrupted run goes on when the command is given again.
#
#   bash runs/small.sh MODEL_DIR                 with generated rows (nanocascade/data/everyday.py)
#   bash runs/small.sh MODEL_DIR DATA_DIR        with your own: train.jsonl, test.jsonl (held out)
#                                                and sft.jsonl (answers to imitate; may be missing),
#                                                plain or .gz; a stage without rows is left out
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
case "${1:-}" in ''|-*) sed -n '5,17s/^# \{0,1\}//p' "$PWD/runs/small.sh" >&2; exit 2 ;; esac
stop() { echo "error: $*" >&2; exit 2; }
MODEL=$1; shift
[ -f "$MODEL/config.json" ] || stop "no $MODEL/config.json; relative paths start at $PWD"
source runs/setup.sh

DATA= OUT= SHORT= SEED=0 THINKING=false FLAGS=() SFT=() RL=() MOPD=() EVERYDAY=()
EVAL=(--eval_samples 200 --own_eval_samples 200)
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then DATA=$1; shift; fi
while [ $# -gt 0 ]; do
  case "$1" in
    --out=* | --seed=* | --thinking=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
    --out) OUT=${2?--out needs a value}; shift 2 ;;
    --seed) SEED=${2?--seed needs a value}; shift 2 ;;
    --thinking) THINKING=${2?--thinking needs a value}; shift 2 ;;
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
[ -z "$DATA" ] || [ -d "$DATA" ] || stop "no directory $DATA; relative paths start at $PWD"
if [ -z "$DATA" ]; then
  DATA=$OUT/rows
  [ -f "$DATA/test.jsonl" ] ||
    python -m nanocascade.data.everyday "$DATA" --seed "$SEED" ${EVERYDAY[@]+"${EVERYDAY[@]}"}
fi
file() { if [ -f "$DATA/$1.jsonl.gz" ]; then echo "$DATA/$1.jsonl.gz"; else echo "$DATA/$1.jsonl"; fi; }
TRAIN=$(file train) TEST=$(file test) ANSWERS=$(file sft)
ROWS=$(python -m nanocascade.data "$TRAIN")
[[ $ROWS == *"0 rows cannot be used" ]] || stop "these cannot be used:${ROWS#*cannot be used}"
DOMAINS=" "  # those of the training rows: a line "math: 40 rows, prompts of ..." each
while read -r line; do
  if [[ $line == *": "*" rows, "* ]]; then DOMAINS+="${line%%:*} "; fi
done <<< "$ROWS"
has() { [[ $DOMAINS == *" $1 "* ]]; }
! has sft || stop "$TRAIN holds chats without an expected answer: they belong in sft.jsonl"
CHOICE=  # the domains of the second RL stage: "math,mcqa" or one of them
for domain in math mcqa; do if has $domain; then CHOICE+=${CHOICE:+,}$domain; fi; done
if [ -z "$CHOICE" ] && ! has if; then
  stop "$TRAIN has no rows of if, math or mcqa, which the stages here train"
fi
[ "$THINKING" = true ] && STRIP=0.1 || STRIP=1

CONFIG=small RANKS=${RANKS:-1} DEVICE=${DEVICE:-auto}
source runs/launch.sh
run() { local script=$1 dir=$2; shift 2
  stage "$script" "$dir" --eval_data "$TEST" "${EVAL[@]}" "$@" ${FLAGS[@]+"${FLAGS[@]}"}; }
rl() { local dir=$1; shift
  run train_rl.py "$dir" --init "$LAST" --data "$TRAIN" --thinking "$THINKING" "$@" \
    ${RL[@]+"${RL[@]}"} ${RL_FLAGS:-}
  LAST=$OUT/$dir; }

# A wrong flag of any stage ends here, not after the stages before it.
flags() { printf '%s\n' "$@" ${FLAGS[@]+"${FLAGS[@]}"}; }
python - "$(flags SFT ${SFT_FLAGS:-})" "$(flags RL --thinking "$THINKING" ${RL_FLAGS:-})" \
  "$(flags MOPD ${MOPD_FLAGS:-})" << 'END'
import sys
from nanocascade import cli, stages
from nanocascade.run.settings import read_settings
for script, *words in (text.split("\n") for text in sys.argv[1:]):
    cli.run_main(lambda: read_settings(getattr(stages, script), argv=words))
END

START=$MODEL
if [ -f "$ANSWERS" ]; then
  run train_sft.py sft --init "$MODEL" --data "$ANSWERS" --strip_thinking $STRIP \
    ${SFT[@]+"${SFT[@]}"} ${SFT_FLAGS:-}
  START=$OUT/sft
else echo "== SFT is left out: no $ANSWERS"; fi
# Each stage starts from the last one. A domain's teacher is the checkpoint after its own stage; JSON,
# which no stage trains, has SFT's.
LAST=$START TEACHERS=
if has if; then
  rl if_rl --stage if_rl
  TEACHERS+=if=$LAST,
else echo "== IF-RL is left out: no rows of if in $TRAIN"; fi
if [ -n "$CHOICE" ]; then
  rl choice_rl --stage multi_domain_rl --domains "$CHOICE"
  for domain in ${CHOICE/,/ }; do TEACHERS+=$domain=$LAST,; done
else echo "== the second RL stage is left out: no rows of math or mcqa in $TRAIN"; fi
if has structured; then TEACHERS+=structured=$START,; fi
if has structured || { has if && [ -n "$CHOICE" ]; }; then
  run train_mopd.py mopd --init "$LAST" --data "$TRAIN" --thinking "$THINKING" \
    ${MOPD[@]+"${MOPD[@]}"} --teachers "${TEACHERS}default=$LAST" ${MOPD_FLAGS:-}
else echo "== MOPD is left out: after one RL stage alone the only teacher would be the student"; fi

python runs/report.py "$OUT"
python -m nanocascade.show "$OUT"
