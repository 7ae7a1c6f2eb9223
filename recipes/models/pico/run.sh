#!/usr/bin/env bash
# clara-pico from nothing, about 40 minutes on two cores. Run again, it resumes: a finished step is skipped.
#
#   recipes/models/pico/run.sh                    data, backbone, three stages, evaluation; everything in runs/pico
#   PUBLISH=model_cards recipes/models/pico/run.sh   also write clara-pico/ and clara-pico-corpus/ there
#
# Arguments are key=value of every training stage, for example max_steps=10. PYTHON names another interpreter.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
HERE=$ROOT/recipes/models/pico
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
PYTHON=${PYTHON:-python}
RUNS=runs/pico

# skipped WHAT FILE: a step is finished when its last file is there
skipped() { [ -e "$2" ] && echo "$1: finished"; }

skipped data $RUNS/data/test_wordings_joint.jsonl ||
    "$PYTHON" -m recipes.models.pico.facts --output $RUNS/data

skipped backbone $RUNS/backbone/tokenizer_config.json ||
    "$PYTHON" -m recipes.models.pico.backbone --data $RUNS/data --output $RUNS/backbone

for stage in pretrain instruct joint; do
    skipped $stage $RUNS/$stage/config.json && continue
    "$PYTHON" -m recipes.train --config "$HERE/$stage.yaml" "$@"
    [ -e $RUNS/$stage/config.json ] || exit 0 # stopped by max_minutes
done

if [ -n "${PUBLISH:-}" ]; then
    "$PYTHON" -m recipes.models.pico.publish $RUNS/joint --output "$PUBLISH"
else
    "$PYTHON" -m recipes.models.pico.evaluate $RUNS/joint
fi
