#!/usr/bin/env bash
# The paper's effect on a laptop: pre-train plain MoCo v2 and two strengths of patch negatives on generated data,
# probe them, and print the robustness table with the shape bias of each row.
#   QUICKSTART_SEEDS=3   runs a row (default 1); each adds its own pre-training, probe and column spread
#   QUICKSTART_OUT=DIR   where everything goes (default quickstart_out)
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1    # with another number of threads sums round differently, and a seed is another run
out=${QUICKSTART_OUT:-quickstart_out}
seeds=$(seq 0 $((${QUICKSTART_SEEDS:-1} - 1)))
data=$out/shapes
epochs=10
last=checkpoint_$(printf %04d $((epochs - 1))).pth.tar

# Every size is a quarter of ImageNet's: crops of 56 px for 224, patches of 4 to 18 px for 16 to 72.
pretrain() { python moco-non-sem-neg.py -a resnet10 --image-size 56 --lr 0.06 --batch-size 64 -j 1 --mlp --moco-t 0.2 \
  --moco-m 0.99 --moco-k 2048 --aug-plus --cos --patch-ratio 4 18 --epochs $epochs --print-freq 31 "$@" "$data"; }

python preprocess/shapes.py --out "$data" --preview "$out/shapes.png"
pretrain --alpha 2 --seed 0 --preview "$out/negatives.png"

rows=()
for row in "plain:MoCo v2:--robust none" "patch2:+ Patch, alpha 2:--robust patch --alpha 2" "patch3:+ Patch, alpha 3:--robust patch --alpha 3"; do
  IFS=: read -r name title options <<< "$row"
  heads=()
  for seed in $seeds; do
    run=$out/$name-$seed
    echo "=== $title, seed $seed"
    pretrain $options --seed "$seed" --ckpt_path "$run"
    python main_lincls.py -a resnet10 --lr 0.3 --batch-size 128 -j 1 --epochs 8 --schedule 4 6 --print-freq 1000 \
      --pretrained "$run/$last" --seed "$seed" --ckpt_path "$run" "$data"
    heads+=("$run/${last/checkpoint/model_best}")
  done
  rows+=("$title=$(IFS=,; echo "${heads[*]}")")
done

python eval_robustness.py -j 1 --pretrained "${rows[@]}" --val "$data" --corruption "$data/corruption" \
  --sketch "$data/sketch" --stylized "$data/stylized" --rendition "$data/rendition" --json "$out/table.json" | tee "$out/table.md"
echo "
$out/table.md         the table above
$out/table.json       every figure of it, per class and corruption
$out/negatives.png    queries, keys and their patch negatives
$out/shapes.png       the generated data
$out/*/log.jsonl      the pre-training logs, one line an epoch"
