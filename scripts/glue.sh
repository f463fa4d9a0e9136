#!/usr/bin/env bash
# Fine-tune on a GLUE task with a paper's settings: prints the full command and runs it.
#
#   scripts/glue.sh TASK METHOD [--dry_run] [--nproc N] [more flags]
#   scripts/glue.sh mrpc galore --dry_run
#   scripts/glue.sh all golore --seeds 1,2,3
#
# TASK is cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli or all; METHOD is full, lora, galore, golore (adapter form),
# golore_optimizer, online_subspace_descent or switchlora. More flags go to run_glue.py and win over these.
# RoBERTa-base, batch 16, 30 epochs, 512 tokens, rank 4: GoLore, arXiv 2410.11289, and GaLore, arXiv 2403.03507, table 4.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage() { sed -n '4,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
[[ $# -ge 2 ]] || usage
task=$1 method=$2
shift 2

tasks=(cola mnli mrpc qnli qqp rte sst2 stsb wnli)
case $task in
    all) ;;
    *) [[ " ${tasks[*]} " == *" $task "* ]] || { echo "error: unknown task $task; there is ${tasks[*]}, all" >&2; exit 2; }
       tasks=("$task") ;;
esac

projection=(--lora_all_modules --lora_r 4 --scale 4 --update_proj_gap 500)
case $method in
    full) own=(--method full_rank) ;;
    lora) own=(--method lora --lora_all_modules --lora_r 4) ;;
    galore) own=(--enable_galore "${projection[@]}") ;;
    golore) own=(--enable_golore "${projection[@]}" --rand_ratio 0.8) ;;
    golore_optimizer) own=(--optimizer golore_adamw "${projection[@]}" --rand_ratio 0.8) ;;
    online_subspace_descent) own=(--enable_galore --proj_type continuous "${projection[@]}") ;;
    switchlora) own=(--switch_lora --lora_all_modules --lora_r 4) ;;
    *) echo "error: unknown method $method; see the head of $0" >&2; exit 2 ;;
esac

dry_run=false nproc=1 more=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --dry_run) dry_run=true; shift ;;
        --nproc) nproc=${2:?--nproc needs a number}; shift 2 ;;
        *) more+=("$1"); shift ;;
    esac
done

python=$project/.venv/bin/python
[[ -x $python ]] || python=python3
launch=("$python")
[[ $nproc -eq 1 ]] || launch=("$python" -m torch.distributed.run --standalone --nproc-per-node "$nproc")

for name in "${tasks[@]}"; do
    command=("${launch[@]}" "$project/run_glue.py" --model_name_or_path roberta-base --task_name "$name"
        --output_dir "results/glue/$name/$method" --max_length 512 --seed 42 --per_device_train_batch_size 16
        --num_train_epochs 30 --learning_rate 3e-5 --eval_strategy epoch --save_strategy epoch --save_total_limit 2
        "${own[@]}" ${more[@]+"${more[@]}"})
    printf '%s ' "${command[@]}"
    echo
    $dry_run || "${command[@]}"
done
