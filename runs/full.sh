#!/usr/bin/env bash
# The cascade of the 30B-A3B on a cluster: every stage's torchrun line. NOT RUN BY US: there was no
# cluster. What is known of memory and time is the plan's (the same line with --dry_run).
#
#   bash runs/full.sh STAGE BASE OUT DATA...     one node of 8 (8 x 141 GB; 8 x 80 GB for
#                                                the stages of 49K: ask the plan, below)
#   NODES=2 HEAD=host0:29500 bash runs/full.sh STAGE ...     on each of two nodes; HEAD is one of them
#   CLUSTER=16xH100 bash runs/full.sh STAGE ...  prints the plan of the stage, trains nothing
#   EVAL=rows.jsonl          held-out rows to evaluate on after a stage (several: with commas); if_rl
#                            and multi_domain_rl need them, of if, mcqa, tools and structured each:
#                            mopd takes the better of the two as a teacher, by these scores
#   JUDGE=http://host:8000/v1 JUDGE_MODEL=name   the generative reward model, for rlhf and rlhf_side,
#                            and wherever EVAL holds preference rows; mopd needs none
#
# STAGE, in this order: sft if_rl multi_domain_rl rlhf_side mopd rlhf long_context_rl code_rl swe_rl
# swe_agentic_rl. BASE: the released checkpoint's directory, where SFT starts. OUT: a file system that
# all nodes see; every stage reads the one before it there. DATA: JSONL files in the NeMo Gym form
# (SFT: OpenAI messages). Flags after -- go to the script: -- --offload_blocks --max_rows 64
#
# Memory: the flags of a stage come from stages.FULL_LAYOUT; optimizer states lie in host memory
# (31.6 GB a rank on 8 ranks: 253 GB of a node, and 7.9 GB a rank for each idle teacher of MOPD).
# Time: the longest response is waited for, so a step of a 49K stage takes an hour and more on 8
# devices. Start a stage with -- --steps 2 and compare the log's memory/peak_gib, time/rollout and
# time/train with the plan before you leave it alone. A stage that was cut off (also by SIGTERM)
# goes on when its line is given again.
#
# Stop and look, after each stage and, in metrics.jsonl, every few steps:
#   sft               loss/token still falling slowly; write a few answers: sample.py --model OUT/sft
#   *_rl              mismatch/prob_error of the first step: 1e-3 in bf16 at the 30B's depth and a
#                     small width; above 0.2 trainer and sampler disagree: stop.
#                     response/truncated below 0.1 and not rising; group/all_right +
#                     group/all_wrong (of the groups drawn) below 0.8, else the prompts teach nothing.
#   rlhf, rlhf_side   kl/reference below 1, response/length not running away: the judge can be fooled
#   mopd              mopd/reverse_kl falls within ten steps, gate/out_of_band below 0.01
#   before mopd       manifest.json of if_rl and multi_domain_rl: whose evaluation is better?
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 4 ] || { sed -n '2,17s/^# \{0,1\}//p' "$0" >&2; exit 2; }
STAGE=$1 BASE=$2 OUT=$3; shift 3
DATA=() FLAGS=(--config full --resume)
while [ $# -gt 0 ] && [ "$1" != -- ]; do DATA+=("$1"); shift; done
[ $# -eq 0 ] || shift
FLAGS+=(--data "$(IFS=,; echo "${DATA[*]}")")

rl() { FLAGS+=(--stage "$1" --init "$OUT/$2"); SCRIPT=train_rl.py; }
SCRIPT=train_sft.py
case "$STAGE" in
  sft) FLAGS+=(--init "$BASE" --offload_blocks) ;;  # rows of 256K tokens
  if_rl) rl if_rl sft ;;
  multi_domain_rl) rl multi_domain_rl if_rl ;;
  rlhf_side) rl rlhf sft ;;  # MOPD's preference teacher
  mopd)
    SCRIPT=train_mopd.py
    FLAGS+=(--init "$OUT/multi_domain_rl" --offload_blocks --max_rows 64 --teachers
      "math=$OUT/sft,preference=$OUT/rlhf_side,multi_domain=$OUT/if_rl+$OUT/multi_domain_rl,default=$OUT/multi_domain_rl") ;;
  rlhf) rl rlhf mopd ;;
  long_context_rl) rl long_context_rl rlhf ;;
  code_rl) rl code_rl long_context_rl; FLAGS+=(--offload_blocks --max_rows 48) ;;
  swe_rl) rl swe_rl code_rl; FLAGS+=(--offload_blocks --max_rows 64) ;;
  swe_agentic_rl) rl swe_agentic_rl swe_rl; FLAGS+=(--offload_blocks --max_rows 32) ;;
  *) echo "error: unknown stage $STAGE" >&2; exit 2 ;;
esac
case "$STAGE ${CLUSTER:-}${EVAL:-}" in
  "if_rl " | "multi_domain_rl ")
    echo "error: $STAGE needs EVAL=rows.jsonl: mopd chooses its teacher by its scores" >&2
    exit 2 ;;
esac
[ -z "${EVAL:-}" ] || FLAGS+=(--eval_data "$EVAL")
[ -z "${JUDGE:-}" ] || FLAGS+=(--judge_url "$JUDGE" --judge_model "$JUDGE_MODEL")

if [ -n "${CLUSTER:-}" ]; then  # the plan needs neither checkpoint nor rows
  exec python "$SCRIPT" "${FLAGS[@]}" --init "" --data "" --dry_run --cluster "$CLUSTER" "$@"
fi
LAUNCH=(--nproc_per_node 8)
if [ "${NODES:-1}" -gt 1 ]; then
  LAUNCH+=(--nnodes "$NODES" --rdzv_backend c10d --rdzv_endpoint "$HEAD" --rdzv_id "$STAGE")
else
  LAUNCH+=(--standalone)
fi
exec torchrun "${LAUNCH[@]}" "$SCRIPT" "${FLAGS[@]}" --out "$OUT/$STAGE" "$@"
