#!/usr/bin/env bash
# See the paper's effect on a CPU: pre-train MoCo v2 without and with non-semantic negatives on generated data, probe the
# backbones, and print the robustness table. After an interruption, run it again to resume.
#   QUICKSTART_SEEDS=3     runs per row (default 1)
#   QUICKSTART_TEXTURE=0   without the + Texture row
#   QUICKSTART_OUT=DIR     output folder (default quickstart_out)
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1    # one thread per run, as many runs as cores side by side; a seed gives the same run anywhere
export out=${QUICKSTART_OUT:-quickstart_out} epochs=20 probe_epochs=20 precision=fp32
grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo && precision=bf16      # on other CPUs slower than fp32
cores=$(getconf _NPROCESSORS_ONLN)

rows=("plain;MoCo v2;--robust none;shapes"                            # folder; title; options; data
      "patch2;+ Patch, alpha 2;--robust patch --alpha 2;shapes"
      "patch3;+ Patch, alpha 3;--robust patch --alpha 3;shapes")
negatives=(patch)
if [ "${QUICKSTART_TEXTURE:-1}" != 0 ]; then
  rows+=("texture2;+ Texture, alpha 2;--robust texture --alpha 2;shapes-texture")
  negatives+=(texture)
fi

# The paper's recipe at a quarter of ImageNet's size: K 512 and patches of 4 to 18 px follow from the data and the crop.
pretrain() {
  python moco-non-sem-neg.py --recipe paper -a resnet10 --image-size 56 --lr 0.06 --batch-size 64 -j 1 --moco-m 0.99 \
    --epochs "$epochs" --precision "$precision" "$@"
}

probe() {
  python main_lincls.py -a resnet10 --lr 0.1 --batch-size 128 -j 1 --epochs "$probe_epochs" --schedule 8 14 18 \
    --precision "$precision" "$@" "$out/shapes"
}

train() {                   # FOLDER SEED DATA OPTIONS: pre-train and probe, but for what is done
  local folder=$out/$1 seed=$2 data=$out/$3 last=checkpoint_$(printf %04d $((epochs - 1))).pth.tar
  shift 3
  [ -e "$folder/$last" ] || pretrain "$@" --seed "$seed" --ckpt_path "$folder" --resume auto "$data" || return
  [ -e "$folder/done" ] || probe --seed "$seed" --pretrained "$folder/$last" --ckpt_path "$folder" --resume auto || return
  touch "$folder/done"
}

finished() {                # epochs so far, counted in the time of a probe's; one of pre-training takes three times as long
  echo $((3 * $(cat "$out"/*/log.jsonl 2> /dev/null | grep -cv '"probe"') + $(cat "$out"/*/log.jsonl 2> /dev/null | grep -c '"probe"')))
}

progress() {                # TOTAL: how much of it is done and how long the rest will take, until killed
  local began=$SECONDS before done left
  before=$(finished)
  while sleep 3; do
    done=$(finished)
    [ "$done" -gt "$before" ] || continue
    left=$(((SECONDS - began) * ($1 - done) / (done - before) + 30))  # 30 s for the test sets
    printf "$line" $((100 * done / $1)) $((left / 60)) $((left % 60))
  done
}
line='  %d %% done, about %d:%02d left\n'
[ -t 2 ] && line='\r  %d %% done, about %d:%02d left   '
export -f pretrain probe train

python preprocess/shapes.py --out "$out/shapes" --preview "$out/shapes.png"
if [ "${#negatives[@]}" = 2 ]; then
  python preprocess/imagenet_texture_syn.py --patch 24 --size 64 \
    --imagenet_path "$out/shapes" --imagenet_t_path "$out/shapes-texture"
fi
views=() jobs=() table=()
for kind in "${negatives[@]}"; do
  data=$out/shapes$([ $kind = patch ] || echo -texture)
  pretrain --robust $kind --batch-size $((6 / ${#negatives[@]})) --seed 0 --preview "$out/$kind.png" "$data"
  views+=("$out/$kind.png")
done
for row in "${rows[@]}"; do
  IFS=';' read -r name title options data <<< "$row"
  heads=
  for seed in $(seq 0 $((${QUICKSTART_SEEDS:-1} - 1))); do
    mkdir -p "$out/$name-$seed"
    jobs+=("$name-$seed $seed $data $options")
    heads+=,$out/$name-$seed/checkpoint_robust_$(printf %04d $((epochs - 1))).pth.tar
  done
  table+=("$title=${heads#,}")
done

echo "${#jobs[@]} runs of pre-training and probe, $cores at a time, $precision; their output: $out/*/output.log" >&2
progress $((${#jobs[@]} * (3 * epochs + probe_epochs))) >&2 &
watcher=$!
trap 'kill $watcher 2> /dev/null || true' EXIT
if ! printf '%s\0' "${jobs[@]}" | xargs -0 -P "$cores" -I{} bash -c 'set -- {}; train "$@" >> "$out/$1/output.log" 2>&1'; then
  echo "a run failed; how each run's output ends:" >&2
  tail -n 3 "$out"/*/output.log >&2
  exit 1
fi
kill $watcher
echo >&2

python eval_robustness.py -j 1 --pretrained "${table[@]}" --val "$out/shapes" --corruption "$out/shapes/corruption" \
  --sketch "$out/shapes/sketch" --stylized "$out/shapes/stylized" --rendition "$out/shapes/rendition" \
  --json "$out/table.json" > "$out/evaluation.txt"
grep '^|' "$out/evaluation.txt" > "$out/table.md"
cat "$out/table.md"
echo
python docs/quickstart_result.py "$out/table.json" --views "${views[@]}" --out "$out/result.png"
echo "
$out/result.png       the table as a picture, beside queries with their negatives
$out/table.md         the table above
$out/table.json       every figure behind it, per class and corruption
$out/evaluation.txt   how each column was measured
$out/shapes.png       the generated data
$out/*/log.jsonl      the pre-training logs, one line per epoch

$((SECONDS / 60)) min $((SECONDS % 60)) s"
