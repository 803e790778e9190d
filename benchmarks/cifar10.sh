#!/usr/bin/env bash
# Train a CIFAR-10 model, sample it and measure it, in calls that each end within ten minutes.
#
#     benchmarks/cifar10.sh TRAIN TEST OUT      # again and again, until it says: done
#
# TRAIN and TEST: .npz files with `images` (N, 32, 32, 3) uint8 and `labels` (N,). OUT: a folder; what
# it holds is where the next call goes on. LIMIT: seconds a call; STEPS: updates in all, the last third
# with a falling learning rate; PRESET: cifar10-small; FLAGS: more flags of `minddpm train`.
set -euo pipefail
train=${1:?the training images, an .npz file}
test=${2:?the held-out images, an .npz file}
out=${3:?a folder for what comes out}
limit=${LIMIT:-540}
steps=${STEPS:-24000}
flags=(--steps "$steps" --cooldown "$((steps / 3))" --save-every 2000)
read -ra more <<< "${FLAGS:-}"
mkdir -p "$out"

cd "$out" # the commands are recorded without its path
once() { # once NAME COMMAND...: run it, unless an earlier call did
  [ -e "$1.txt" ] && return
  timeout "$limit" "${@:2}" > "$1.part" && mv "$1.part" "$1.txt" && cat "$1.txt"
}

if [ ! -e trained ]; then
  resume=()
  [ -e run/last.safetensors ] && resume=(--resume)
  # A Ctrl-C after `limit` seconds: the run saves, and the next call resumes it exactly.
  timeout --preserve-status --signal=INT "$limit" \
    minddpm train "${PRESET:-cifar10-small}" --data "$train" --out run \
    "${flags[@]}" "${more[@]}" "${resume[@]}" | tee said
  grep -q "^step.*: checkpoint" said
  grep -q "^to sample" said || { echo "to be continued: call again"; exit; }
  touch trained
  echo "trained: call again to measure"
  exit
fi
once export minddpm export run cifar10.safetensors
once grid minddpm sample run --out grid.png
once film minddpm sample run -n 16 --out film.webp
once distance minddpm evaluate run --data "$train" -n "${SAMPLES:-10000}" --features classifier --root .
once bits minddpm evaluate run --data "$test" -n 0 --bits "${IMAGES:-200}"
echo done
