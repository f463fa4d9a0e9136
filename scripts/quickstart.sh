#!/usr/bin/env bash
# From nothing to a comparison of two methods: install, fetch a small real corpus, train a tokenizer on it, pre-tokenise,
# train a LLaMA of 2.5M weights with full-rank AdamW and with GaLore, and print a table. About five minutes on two CPU
# cores after the first installation. Run it again, and it goes on where it was, or shows the result again; everything it
# makes is in quickstart/, which may be deleted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh

export OMP_WAIT_POLICY=PASSIVE # data loading and training share the cores
python=.venv/bin/python
out=quickstart
updates=${QUICKSTART_UPDATES:-1000} # fewer for a look at the commands
began=$SECONDS

step() { printf '\n== %s\n' "$*"; }

step "1/4 corpus"
if [[ ! -f $out/wiki_intros.jsonl ]]; then
    "$python" scripts/fetch_corpus.py "$out/wiki_intros.jsonl"
fi

step "2/4 tokenizer and token blocks"
data=$out/data/wiki_intros_bpe4096_128
if [[ ! -d $data ]]; then
    "$python" pretokenize.py --dataset "$out/wiki_intros.jsonl" --save_dir "$out/data" \
        --train_tokenizer 4096 --sequence_length 128 --validation_fraction 0.02
fi

# Both runs start from the same weights and read the same tokens in the same order. Embedding, head and norms have one
# rate in both, the layers' matrices another: each the best of a sweep (docs/quickstart.md).
train() {
    "$python" torchrun_main.py --model_config configs/llama_tiny.json --dataset_path "$data" \
        --batch_size 8 --num_training_steps "$updates" --warmup_steps $((updates / 10)) --eval_every 250 --save_every 500 \
        --keep_checkpoints 1 --autoresume True --seed 42 "$@"
}
step "3/4 full-rank AdamW"
train --method full_rank --lr 0.001 --adam_lr 0.02 --save_dir "$out/full_rank"
step "4/4 GaLore"
train --method galore --rank 40 --scale 0.25 --update_proj_gap 100 --lr 0.02 --save_dir "$out/galore"

step "result, after $((SECONDS - began)) s"
"$python" -m peft_pretraining.report.compare "$out/full_rank" "$out/galore" \
    --plot "$out/comparison.png" --json "$out/comparison.json"
echo
echo "plot: $PWD/$out/comparison.png"
