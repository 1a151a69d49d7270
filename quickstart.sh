#!/usr/bin/env bash
# Train MoCo v2 without and with non-semantic negatives, then a linear classifier on each, and print a table of accuracies.
#   bash quickstart.sh                  on generated images: see the paper's effect on a CPU
#   bash quickstart.sh DIR [OPTIONS]    on your own, DIR/{train,val}/<class>/*; options are those of moco-non-sem-neg.py
#   QUICKSTART_SEEDS=3                  runs of each row, with seeds 0, 1, 2 (default 1)
#   QUICKSTART_ROWS="plain patch1.5"    which rows: plain, patch or texture with their alpha (default: plain patch2, on
#                                       generated images texture2, too)
#   QUICKSTART_OUT=FOLDER               default: quickstart_out, for DIR quickstart_out/<name of DIR>
# One run per GPU at a time; on a CPU, cores + 1 at once. Run it again to resume.
set -euo pipefail
shopt -s nullglob
refuse() { echo "quickstart.sh: error: $1" >&2; exit 2; }
case " ${1-} $* " in "  "*) ;; " -"* | *" -h "* | *" --help "*) sed -n '2,/^# One run/s/^# //p' "$0"; exit 2 ;; esac
own=${1-} here=$PWD
[ $# = 0 ] || shift
case $own in "" | /*) ;; *) own=$here/$own ;; esac
[ ! -d "$own" ] || own=$(cd -- "$own" && pwd)
cd "$(dirname "$0")"
export LC_NUMERIC=C OMP_NUM_THREADS=1   # one thread per run: the same figures with any number of cores
out=${QUICKSTART_OUT:-$PWD/quickstart_out${own:+/$(basename "$own")}}
case $out in /*) ;; *) out=$here/$out ;; esac
export out data=${own:-$out/shapes} settings probe epochs probe_epochs last gpus

row() {                     # NAME: set title, options and negatives of a row
  negatives= options="--robust none" title="MoCo v2"
  [ "$1" != plain ] || return 0
  [[ $1 =~ ^(patch|texture)([0-9]+([.][0-9]+)?)$ ]] ||
    refuse "QUICKSTART_ROWS: no row $1; there are plain, patch or texture with an alpha, such as patch2"
  negatives=${BASH_REMATCH[1]} options="--robust ${BASH_REMATCH[1]} --alpha ${BASH_REMATCH[2]}"
  title="+ Patch, alpha ${BASH_REMATCH[2]}"
  [ "$negatives" = patch ] || title="+ Texture, alpha ${BASH_REMATCH[2]}"
}

rows="plain patch2"
[ "$own" ] || rows+=" texture2"
rows=$(printf '%s\n' ${QUICKSTART_ROWS:-$rows} | awk '!seen[$0]++')
[ "$rows" ] || refuse "QUICKSTART_ROWS is empty"
for name in $rows; do row "$name"; done
[[ ${QUICKSTART_SEEDS:-1} =~ ^[1-9][0-9]*$ ]] || refuse "QUICKSTART_SEEDS: $QUICKSTART_SEEDS is no number of runs"
[[ $data$out != *\;* && $out != *,* ]] || refuse "a ; or , in a path: $data, $out"
[ "$out" != "$data" ] || refuse "$out is the data set; name another place: QUICKSTART_OUT=FOLDER"
if [ -z "$own" ]; then
  mkdir -p "$out"
  python preprocess/shapes.py --out "$data" --preview "$out/shapes.png"
fi
found=$(python docs/quickstart_settings.py "$data" "$@")    # crop, epochs, batch and so on, for these images
eval "$found"
[ "$(cat "$out/data" 2> /dev/null || echo "$data")" = "$data" ] ||
  refuse "$out holds runs on $(cat "$out/data"); name another place: QUICKSTART_OUT=FOLDER"
mkdir -p "$out"
echo "$data" > "$out/data"
echo "$images
pre-training  $settings
probe         $probe" >&2

pretrain() {                # OPTIONS
  eval "python moco-non-sem-neg.py $settings \"\$@\""
}

train() {                   # NAME SEED DATA OPTIONS: pre-train and probe; what is done is not done again
  local folder=$out/$1-$2 seed=$2 data_of_row=$3 gpu=
  shift 3
  [ "$gpus" = 0 ] || gpu="--gpu $GPU"
  mkdir -p "$folder"
  pretrain "$@" $gpu --seed "$seed" --keep 1 --ckpt_path "$folder" --resume auto "$data_of_row" \
    >> "$folder/pretraining.log" 2>&1 || return
  python main_lincls.py $probe $gpu --seed "$seed" --pretrained "$folder/checkpoint_$last.pth.tar" \
    --ckpt_path "$folder" --resume auto "$data" >> "$folder/probe.log" 2>&1
}

share() {                   # of the work that is done, 0 to 1, by the last step in each log
  awk -v runs="${#jobs[@]}" -v epochs="$epochs" -v probe_epochs="$probe_epochs" '
    match($0, /^epoch [0-9]+ \[[0-9]+\/[0-9]+\]/) {
      at = substr($0, 1, RLENGTH); gsub(/[^0-9]+/, " ", at); split(at, number, " ")
      epoch[FILENAME] = number[1] + number[2] / number[3]
    }
    END {                   # an epoch of pre-training takes as long as two of the probe
      for (file in epoch) sum += (file ~ /probe.log$/ ? 1 : 2) * epoch[file]
      print sum / runs / (2 * epochs + probe_epochs)
    }' "$out"/*/*.log /dev/null
}

progress() {                # how much is done and how long the rest will take, until killed
  local began=$SECONDS before
  before=$(share)
  while sleep 3; do
    awk -v now="$(share)" -v before="$before" -v seconds=$((SECONDS - began)) -v line="$line" 'BEGIN {
      left = now > before ? seconds * (1 - now) / (now - before) + 20 : -1    # 20 s for the test sets
      if (left >= 0) printf line, 100 * now, left / 60, left % 60
    }'
  done
}
line='  %d %% done, about %d:%02d left\n'
[ -t 2 ] && line='\r  %d %% done, about %d:%02d left   '
export -f pretrain train

sets=(--val "$data") views=() jobs=() table=()
if [ -z "$own" ]; then
  sets+=(--corruption "$data/corruption" --sketch "$data/sketch" --stylized "$data/stylized" --rendition "$data/rendition")
elif python -c "import imagecorruptions" 2> /dev/null; then
  python preprocess/corruptions.py --val "$data" --out "$out/corruption" --size "$image_size" --limit "$corrupted"
  sets+=(--corruption "$out/corruption")
else
  echo "no column Corruption: pip install imagecorruptions-imaug makes the images" >&2
fi
for name in $rows; do
  row "$name"
  data_of_row=$data heads=
  if [ "$negatives" = texture ]; then
    data_of_row=$data-texture
    python preprocess/imagenet_texture_syn.py $([ "$own" ] || echo "--patch 24 --size 64") \
      --imagenet_path "$data" --imagenet_t_path "$data_of_row"
  fi
  if [ "$negatives" ] && [ ! -e "$out/$negatives.png" ]; then
    pretrain $options --batch-size 3 --seed 0 --preview "$out/$negatives.png" "$data_of_row"
  fi
  for seed in $(seq 0 $((${QUICKSTART_SEEDS:-1} - 1))); do
    jobs+=("$name;$seed;$data_of_row;$options")
    heads+=,$out/$name-$seed/model_best_$last.pth.tar
  done
  table+=("$title=${heads#,}")
done
for negatives in patch texture; do
  [[ $rows != *$negatives* ]] || views+=("$out/$negatives.png")
done

interrupted() {             # when all runs have saved their state
  printf '\ninterrupted: saving\n' >&2
  while [ "$(ps -eo args= | grep -F -e "--ckpt_path $out/" | grep -v grep)" ]; do sleep 1; done
  echo "run the same command again to resume" >&2
  exit 130
}
trap interrupted INT
echo "${#jobs[@]} runs of pre-training and probe, $parallel at a time; their output: $out/*/*.log" >&2
progress >&2 &
watcher=$!
trap 'kill $watcher 2> /dev/null || true' EXIT
if ! printf '%s\0' "${jobs[@]}" | xargs -0 -n 1 -P "$parallel" $([ "$gpus" = 0 ] || echo --process-slot-var=GPU) \
  bash -c 'IFS=";" read -r name seed data_of_row options <<< "$1"; train "$name" "$seed" "$data_of_row" $options' -; then
  echo "a run failed; how each run's output ends:" >&2
  tail -n 3 "$out"/*/*.log >&2
  exit 1
fi
kill $watcher 2> /dev/null || true
echo >&2

python eval_robustness.py -j 1 --pretrained "${table[@]}" "${sets[@]}" --json "$out/table.json" > "$out/evaluation.txt"
grep '^|' "$out/evaluation.txt" > "$out/table.md"
python docs/quickstart_result.py "$out/table.json" --views ${views[@]+"${views[@]}"} --out "$out/result.png"
echo "
$out/result.png       the table as a picture, beside queries with their negatives
$out/table.md         the table in full
$out/table.json       every figure behind it, per class and corruption
$out/evaluation.txt   how each column was measured
$out/*/log.jsonl      the pre-training logs, one line per epoch

$((SECONDS / 60)) min $((SECONDS % 60)) s"
