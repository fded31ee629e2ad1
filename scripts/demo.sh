#!/usr/bin/env bash
# Everything on a bare machine with Python: set up, fine-tune the shipped model, look, export.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

echo "== setting up .venv (the first time takes a few minutes)"
make_environment --editable .
started=$SECONDS
rm -rf demo-run demo-peft # an earlier demo's

echo "== fine-tuning examples/model to write a function from its docstring"
.venv/bin/tlora train --model examples/model --data examples/data --adapter-path demo-run \
  -c examples/demo.yaml

echo "== a completion before and after (the model has 1 million parameters: expect form, not sense)"
.venv/bin/tlora generate demo-run --max-tokens 60 \
  --prompt $'"""Return True if the object is a string."""\n'

echo "== exporting to PEFT"
.venv/bin/tlora export demo-run --format peft --output demo-peft

echo "== done in $((SECONDS - started)) s after the set-up: the run is in demo-run/ (rank_plan.json," \
  "adapters.safetensors, metrics.jsonl), the PEFT adapter in demo-peft/"
