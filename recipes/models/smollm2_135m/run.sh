#!/usr/bin/env bash
# clara-smollm2-135m from data to evaluated checkpoint. Run again, it resumes: a finished step is skipped.
#
#   recipes/models/smollm2_135m/run.sh DATA [key=value ...]
#
# DATA is a folder with the files that data.py names; key=value go to all training runs, for example max_minutes=60.
# BACKBONE names a folder with the weights of SmolLM2-135M-Instruct (default: the Hub), PYTHON another interpreter.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
HERE=$ROOT/recipes/models/smollm2_135m
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
PYTHON=${PYTHON:-python}
SOURCE=${1:?name the folder with the data}
shift
DATA=data/smollm2 RUNS=runs/smollm2
MODEL=$RUNS/clara-smollm2-135m
option=() key=()
if [ -n "${BACKBONE:-}" ]; then option=(--backbone "$BACKBONE") key=("backbone=$BACKBONE"); fi

# skipped WHAT FILE: a step is finished when its last file is there
skipped() { [ -e "$2" ] && echo "$1: finished"; }

skipped data $DATA/counts.json ||
    "$PYTHON" -m recipes.models.smollm2_135m.data "$SOURCE" --output $DATA

for run in reading reading_hard reading_passages finding text_reader; do
    skipped $run $RUNS/$run/config.json && continue
    "$PYTHON" -m recipes.train --config "$HERE/$run.yaml" ${key[@]+"${key[@]}"} "$@"
    [ -e $RUNS/$run/config.json ] || exit 0 # stopped by max_minutes
done

skipped publish $MODEL/config.json ||
    "$PYTHON" -m recipes.models.smollm2_135m.publish $RUNS/finding $MODEL --text-run $RUNS/text_reader ${option[@]+"${option[@]}"}

skipped calibrate $MODEL/calibration.json ||
    "$PYTHON" -m recipes.evaluation.calibrate $MODEL --data $DATA/dev/passages_{squad,nq}.jsonl \
        --unanswerable "$SOURCE"/unanswerable_*.jsonl.gz --half first --max-loss 0.02 --write ${option[@]+"${option[@]}"}

for name in nq squad; do
    skipped "evaluate $name" $RUNS/evaluation/$name/results.json ||
        "$PYTHON" -m recipes.evaluate --model $MODEL --data $DATA/dev/passages_$name.jsonl --setting gold_only \
            --dtype bfloat16 --systems clara clara_expand wrong_memory --output $RUNS/evaluation/$name ${option[@]+"${option[@]}"}
done
skipped "evaluate hotpotqa" $RUNS/evaluation/hotpotqa/results.json ||
    "$PYTHON" -m recipes.evaluate --model $MODEL --data $DATA/dev/multihop_hotpotqa_dev.jsonl --half second \
        --top-k 5 --memory-size 16 --dtype bfloat16 --systems clara bm25_memory hybrid_scores \
        --output $RUNS/evaluation/hotpotqa ${option[@]+"${option[@]}"}

"$PYTHON" -m recipes.evaluation.update_card $MODEL $RUNS/evaluation/{nq,squad,hotpotqa}
