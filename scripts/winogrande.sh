#!/usr/bin/env bash
# Fine-tune a causal language model on WinoGrande with GoLore's settings: prints the full command and runs it.
#
#   scripts/winogrande.sh METHOD [--dry_run] [--nproc N] [more flags]
#   scripts/winogrande.sh golore_sgd --dry_run
#   scripts/winogrande.sh adamw --model_name checkpoints/llama_1b/model_100000
#
# METHOD is sgd, adam, adamw, galore_adamw, galore_sgd, golore_adamw or golore_sgd. More flags go to run_tasks.py and win
# over these. Llama-2-7B in bfloat16, batch 16, 30 epochs, rank 1024: GoLore, arXiv 2410.11289.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage() { sed -n '4,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
[[ $# -ge 1 ]] || usage
method=$1
shift

projection=(--rank 1024 --update_proj_gap 500 --proj_type std)
case $method in
    sgd | adam | adamw) own=() ;;
    galore_adamw) own=("${projection[@]}" --galore_scale 1.0) ;;
    galore_sgd) own=("${projection[@]}" --galore_scale 4.0) ;;
    golore_adamw) own=("${projection[@]}" --galore_scale 1.0 --rand_ratio 0.8) ;;
    golore_sgd) own=("${projection[@]}" --galore_scale 4.0 --rand_ratio 0.8) ;;
    *) echo "error: unknown method $method; there is sgd, adam, adamw, galore_adamw, galore_sgd, golore_adamw, golore_sgd" >&2
       exit 2 ;;
esac
case $method in
    *sgd) own+=(--learning_rate 1e-3 --momentum 0.9 --dampening 0.0) ;;
    *) own+=(--learning_rate 3e-5) ;;
esac

dry_run=false nproc=1 more=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --dry_run) dry_run=true; shift ;;
        --nproc) nproc=${2:?--nproc needs a number}; shift 2 ;;
        *) more+=("$1"); shift ;;
    esac
done

[[ $nproc =~ ^[1-9][0-9]*$ ]] && ((16 % nproc == 0)) ||
    { echo "error: --nproc $nproc must divide the batch of 16" >&2; exit 2; }

python=$project/.venv/bin/python
[[ -x $python ]] || python=python3
launch=("$python")
[[ $nproc -eq 1 ]] || launch=("$python" -m torch.distributed.run --standalone --nproc-per-node "$nproc")

command=("${launch[@]}" "$project/run_tasks.py" --model_name meta-llama/Llama-2-7b-hf --task_name WinoGrande
    --output_dir "results/winogrande/$method" --num_train_epochs 30 --per_device_train_batch_size $((16 / nproc))
    --lr_scheduler_type constant --weight_decay 0.0 --train_all True --num_eval 1000 --load_bfloat16 --bf16
    --load_best_model_at_end --eval_strategy epoch --save_strategy epoch --save_total_limit 1 --logging_steps 10
    --optimizer "$method" ${own[@]+"${own[@]}"} ${more[@]+"${more[@]}"})
printf '%s ' "${command[@]}"
echo
$dry_run || exec "${command[@]}"
