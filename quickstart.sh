#!/usr/bin/env bash
# See the paper's effect on a CPU: pre-train MoCo v2 without and with non-semantic negatives on generated data, probe the
# backbones, and print the robustness table. Run it again after an interruption to resume.
#   QUICKSTART_SEEDS=3     runs per row (default 1)
#   QUICKSTART_TEXTURE=0   leave out the + Texture row
#   QUICKSTART_OUT=DIR     output folder (default quickstart_out)
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1    # one thread per run: as many runs as cores side by side, and a seed gives the same run anywhere
export out=${QUICKSTART_OUT:-quickstart_out} epochs=20 probe_epochs=20 precision=fp32
grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo && precision=bf16      # slower than fp32 on other CPUs
cores=$(getconf _NPROCESSORS_ONLN)
seeds=$(seq 0 $((${QUICKSTART_SEEDS:-1} - 1)))
start=$SECONDS

rows=("plain;MoCo v2;--robust none;shapes"
      "patch2;+ Patch, alpha 2;--robust patch --alpha 2;shapes"
      "patch3;+ Patch, alpha 3;--robust patch --alpha 3;shapes"
      "texture2;+ Texture, alpha 2;--robust texture --alpha 2;shapes-texture")
[ "${QUICKSTART_TEXTURE:-1}" = 0 ] && unset 'rows[3]'

# Sizes are a quarter of ImageNet's: 56 px crops for 224, patches of 4 to 18 px for 16 to 72.
pretrain() {
  python moco-non-sem-neg.py -a resnet10 --image-size 56 --lr 0.06 --batch-size 64 -j 1 --mlp --moco-t 0.2 --moco-m 0.99 \
    --moco-k 512 --aug-plus --cos --patch-ratio 4 18 --epochs "$epochs" --precision "$precision" "$@"
}

probe() {
  python main_lincls.py -a resnet10 --lr 0.1 --batch-size 128 -j 1 --epochs "$probe_epochs" --schedule 8 14 18 \
    --precision "$precision" "$@" "$out/shapes"
}

train() {                   # one line "RUN;SEED;OPTIONS;DATA": pre-train and probe, skipping what is done
  IFS=';' read -r run seed options data <<< "$1"
  local last=checkpoint_$(printf %04d $((epochs - 1))).pth.tar
  local to=(--seed "$seed" --ckpt_path "$out/$run")
  [ -e "$out/$run/$last" ] || pretrain $options "${to[@]}" --resume auto "$out/$data" || return 255
  [ -e "$out/$run/done" ] || probe "${to[@]}" --pretrained "$out/$run/$last" || return 255
  touch "$out/$run/done"
}

finished() {                # epochs so far, in the time of a probe's; one of pre-training takes three times as long
  echo $((3 * $(cat "$out"/*/log.jsonl 2> /dev/null | wc -l) + $(cat "$out"/*/output.log 2> /dev/null | grep -c ' val: ')))
}

progress() {                # every few seconds: how much is done, and about how long is left
  local total=$1 before began=$SECONDS done left
  before=$(finished)
  while sleep 3; do
    done=$(finished)
    [ "$done" -gt "$before" ] || continue
    left=$(((SECONDS - began) * (total - done) / (done - before) + 30))
    printf '%s%d of %d runs probed, %d%% done, about %d:%02d left%s' "$line_start" \
      "$(ls -d "$out"/*/done 2> /dev/null | wc -l)" "$jobs" $((100 * done / total)) $((left / 60)) $((left % 60)) "$line_end"
  done
}
line_start='' line_end=$'\n'
[ -t 2 ] && line_start=$'\r  ' line_end='   '
export -f pretrain probe train

python preprocess/shapes.py --out "$out/shapes" --preview "$out/shapes.png"
views=("$out/negatives.png")
pretrain --robust patch --batch-size 6 --seed 0 --preview "$out/negatives.png" "$out/shapes"
if [ "${#rows[@]}" = 4 ]; then
  python preprocess/imagenet_texture_syn.py --patch 24 --size 64 --imagenet_path "$out/shapes" --imagenet_t_path "$out/shapes-texture"
  for negatives in patch texture; do
    data=$out/shapes$([ $negatives = patch ] || echo -texture)
    pretrain --robust $negatives --batch-size 3 --seed 0 --preview "$out/$negatives.png" "$data"
  done
  views=("$out/patch.png" "$out/texture.png")
fi

list=() table=() jobs=0
for seed in $seeds; do
  for row in "${rows[@]}"; do
    IFS=';' read -r name title options data <<< "$row"
    mkdir -p "$out/$name-$seed"
    list+=("$name-$seed;$seed;$options;$data")
    jobs=$((jobs + 1))
  done
done
for row in "${rows[@]}"; do
  IFS=';' read -r name title options data <<< "$row"
  heads=$(for seed in $seeds; do echo "$out/$name-$seed/checkpoint_robust_$(printf %04d $((epochs - 1))).pth.tar"; done | paste -sd, -)
  table+=("$title=$heads")
done

echo "$jobs runs of pre-training and probe, $cores at a time, $precision; their output is in $out/*/output.log" >&2
progress $((jobs * (3 * epochs + probe_epochs))) >&2 &
watcher=$!
trap 'kill $watcher 2> /dev/null || true' EXIT
if ! printf '%s\0' "${list[@]}" | xargs -0 -P "$cores" -I{} bash -c 'train "{}" >> "$out/$(cut -d";" -f1 <<< "{}")/output.log" 2>&1'; then
  echo "a run failed; the end of each run's output:" >&2
  tail -n 3 "$out"/*/output.log >&2
  exit 1
fi
kill $watcher
echo >&2

python eval_robustness.py -j 1 --pretrained "${table[@]}" --val "$out/shapes" --corruption "$out/shapes/corruption" \
  --sketch "$out/shapes/sketch" --stylized "$out/shapes/stylized" --rendition "$out/shapes/rendition" \
  --json "$out/table.json" > "$out/evaluation.txt"
echo
grep '^|' "$out/evaluation.txt" | tee "$out/table.md"
echo
python -m moco.quickstart "$out/table.json" --views "${views[@]}" --out "$out/result.png"
echo "
$out/result.png       the table as a picture, and what the models were trained on
$out/table.md         the table above
$out/table.json       every figure behind it, per class and corruption
$out/evaluation.txt   how each column was measured
$out/shapes.png       the generated data
$out/*/log.jsonl      the pre-training logs, one line per epoch
$(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s"
