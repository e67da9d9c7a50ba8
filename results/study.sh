#!/usr/bin/env bash
# Each run of the study by name, in order: `bash results/study.sh NAME`; without a name, a list.
# Most names take one to two hours. The minutes are those of one core of an Intel Xeon with AMX,
# for both seeds where there are two. Everything goes to runs/; a stopped run continues when it is
# repeated. On a GPU, several can run side by side:
#     echo baseline log-mel random | xargs -n 1 -P 3 bash results/study.sh
# The variable TEST names other test subsets:
#     TEST="test-clean test-other" bash results/study.sh mini
#
# Except for headline, plain, quick and lang, all runs are `tiny`, last 12 epochs unless stated
# otherwise, and use no masks. Older runs (runs/old in study.json) used ten time masks of
# up to 5% of an utterance, four codebook masks and two feature masks, without self-conditioned CTC:
# they cannot be repeated exactly.
set -euo pipefail
cd "$(dirname "$0")/.."
mini=(--corpus mini-librispeech --speeds 0.8 0.9 1.1 1.2 --test ${TEST:-test-clean})
lm=results/mini-librispeech/lm.arpa.gz

codec() {       # NAME, flags: a codec in runs/study/codec-NAME
    python codec.py --corpus mini-librispeech --steps 6000 --batch 16 \
        --out "runs/study/codec-$1" "${@:2}"
}
tokens() {      # NAME, CODEC, flags: tokens in runs/study/tokens-NAME
    python tokenize_corpus.py "${mini[@]}" --codec "$2/codec.pt" --out "runs/study/tokens-$1" "${@:3}"
}
tables() {      # NAME, CODE: runs/mini/tokens-NAME, its codebooks replaced by CODE, in Python
    local part=runs/mini/part-$1
    [ -e "runs/mini/tokens-$1" ] && return
    rm -rf "$part"
    cp -r runs/mini/tokens "$part"
    python - <<END
import numpy as np
codebooks = np.load("$part/codebooks.npy")          # (Q, K, D)
np.save("$part/codebooks.npy", $2)
END
    mv "$part" "runs/mini/tokens-$1"
}
alike() {       # N: Python for N random rows; each code takes that of the nearest of N codes
    echo "np.take_along_axis(
        np.random.default_rng(0).normal(codebooks.mean(1, keepdims=True),
                                        codebooks.std(1, keepdims=True), (8, $1, 128)),
        np.square(codebooks[:, :, None] - codebooks[:, None, :$1]).sum(3).argmin(2)[..., None],
        1).astype(np.float32)"
}
seed() {        # SEED, RUN, TOKENS, flags: a recognizer in RUN, and its report in RUN/eval
    python train_asr.py --seed "$1" --out "$2" --tokens "$3" "${@:4}"
    python evaluate.py --asr "$2" --out "$2/eval"
}
seeds() {       # RUN, TOKENS, flags: seed 0 in RUN, seed 1 in RUN-1
    seed 0 "$1" "${@:2}"
    seed 1 "$1-1" "${@:2}"
}
headline() {    # NAME, TOKENS: the headline in runs/headline/NAME and NAME-1, with the LM, too
    local run
    seeds "runs/headline/$1" "$2" --size small --epochs 32
    for run in "runs/headline/$1"{,-1}; do
        python evaluate.py --asr "$run" --lm $lm --out "$run/eval-lm"
    done
}
asr() {         # NAME, TOKENS, flags: the study's recognizer, in runs/study/NAME and NAME-1
    seeds "runs/study/$1" "$2" --epochs 12 --time-masks 0 --feature-masks 0 "${@:3}"
}
trial() {       # NAME, TOKENS, flags: six epochs, seed 0
    seed 0 "runs/study/$1" "$2" --epochs 6 --time-masks 0 --feature-masks 0 "${@:3}"
}
noise() {       # TOKENS, RUN ...: in noise, on every fourth utterance
    awk 'NR % 4 == 1' "$1/test-clean.jsonl" > "$1/test-quarter.jsonl"
    for run in "${@:2}"; do         # data/noise/test: recorded sounds, ours 20 clips of ESC-10
        python evaluate.py --asr "$run" --out "$run/eval-noise" --test test-quarter \
            --noise white pink babble data/noise/test
    done
}

case ${1-} in
mini)           # 57: codec, tokens and log-mel that most runs below use, also of equalized copies
    python codec.py --corpus mini-librispeech --steps 6000 --batch 16 \
        --out runs/mini/codec
    python tokenize_corpus.py "${mini[@]}" --codec runs/mini/codec/codec.pt --out runs/mini/tokens
    python tokenize_corpus.py "${mini[@]}" --features mel --out runs/mini/mel
    python tokenize_corpus.py "${mini[@]}" --equalize 5 --codec runs/mini/codec/codec.pt \
        --out runs/mini/tokens-eq
    python tokenize_corpus.py "${mini[@]}" --equalize 5 --features mel --out runs/mini/mel-eq
    ;;
headline)       # 300: the headline, on tokens
    headline asr runs/mini/tokens-eq
    ;;
headline-mel)   # 300: the headline, on log-mel
    headline asr-mel runs/mini/mel-eq
    ;;
more)           # 140: 9.5 hours of speech, one seed; data/LibriSpeech holds speakers 4088 4406 5652
    # 8226 of train-clean-100 in train-more, and in train-mini 26 and 27 of train-clean-100 and, as
    # MP3, 84 251 422 652 777 1988 1993 2035 2277 2412 2428 2803 2902 of dev-clean.
    python tokenize_corpus.py --corpus data/LibriSpeech --train train-clean-5 train-more train-mini \
        --dev dev-clean-2 --test ${TEST:-test-clean} --speeds 0.8 0.9 1.1 1.2 --equalize 5 \
        --codec runs/mini/codec/codec.pt --out runs/headline/more-tokens
    seed 0 runs/headline/more runs/headline/more-tokens --size small --epochs 10
    python evaluate.py --asr runs/headline/more --lm $lm --out runs/headline/more/eval-lm
    ;;
plain)          # 150: the same with copies that are not equalized; on one core of an AMD EPYC
    seed 0 runs/plain/asr runs/mini/tokens --size small --epochs 22
    ;;
plain-mel)      # 150: likewise
    seed 0 runs/plain/asr-mel runs/mini/mel --size small --epochs 22
    ;;
quick)          # 80: 12 epochs with the default masks
    seeds runs/quick/masks runs/mini/tokens --epochs 12
    ;;
quick-mel)      # 75: the same on log-mel
    seeds runs/quick/masks-mel runs/mini/mel --epochs 12
    ;;
masks-30)       # 260: 30 epochs on equalized copies, without and with the default masks, one seed
    # We also evaluated both on the six speakers of `more` that are not MP3 (subset six).
    seed 0 runs/masks/none runs/mini/tokens-eq --epochs 30 --time-masks 0 --feature-masks 0
    seed 0 runs/masks/default runs/mini/tokens-eq --epochs 30
    for run in runs/masks/{none,default}; do
        python evaluate.py --asr $run --lm $lm --out $run/eval-lm
    done
    ;;
baseline)       # 80: what the others are compared with
    asr baseline runs/mini/tokens
    ;;
log-mel)        # 75: log-mel instead of tokens
    asr log-mel runs/mini/mel
    ;;
equalized)      # 60: equalized copies, as those of the headline
    asr equalized runs/mini/tokens-eq
    ;;
equalized-mel)  # 55: the same on log-mel
    asr equalized-mel runs/mini/mel-eq
    ;;
log-mel-80)     # 85: log-mel of 80 frames per second, as inside the codec, subsampled to 40
    python tokenize_corpus.py "${mini[@]}" --features mel --hop 200 \
        --out runs/study/tokens-log-mel-80
    asr log-mel-80 runs/study/tokens-log-mel-80 --subsampling 2
    ;;
latent)         # 80: the latent before the quantizer
    tokens latent runs/mini/codec --features latent
    asr latent runs/study/tokens-latent
    ;;
shuffled)       # 80: tables start as codebooks, but each code has the row of another one
    tables shuffled "np.random.default_rng(0).permutation(codebooks, axis=1)"
    asr shuffled runs/mini/tokens-shuffled
    ;;
random)         # 80: tables start at random, with the mean and deviation of the codebooks
    asr random runs/mini/tokens --embedding random
    ;;
random-fast)    # 80: the same with rows a tenth as long, in effect ten times the learning rate
    tables fast "codebooks / 10"
    asr random-fast runs/mini/tokens-fast --embedding random
    ;;
random-24)      # 80: random tables, 24 epochs, one seed
    seed 0 runs/study/random-24 runs/mini/tokens --epochs 24 --time-masks 0 --feature-masks 0 \
        --embedding random
    ;;
shared)         # 80: 64 random rows in each table, the same row for similar codes
    tables shared "$(alike 64)"
    asr shared runs/mini/tokens-shared
    ;;
shared-256)     # 20: the same with 256 random rows, six epochs, one seed
    tables shared-256 "$(alike 256)"
    trial shared-256 runs/mini/tokens-shared-256
    ;;
mixed)          # 20: 64 random rows, shared by unrelated codes; after shared; six epochs, one seed
    tables mixed "np.random.default_rng(0).permutation(
        np.load('runs/mini/tokens-shared/codebooks.npy'), axis=1)"
    trial mixed runs/mini/tokens-mixed
    ;;
random-first)   # 20: random rows of the first codebook alone, six epochs, one seed
    trial random-first runs/mini/tokens --embedding random --codebooks 1
    ;;
random-faster)  # 20: random rows a thirtieth as long, six epochs, one seed
    tables faster "codebooks / 30"
    trial random-faster runs/mini/tokens-faster --embedding random
    ;;
frozen)         # 80: tables stay codebooks
    asr frozen runs/mini/tokens --embedding frozen
    ;;
stack)          # 80: embeddings concatenated instead of summed
    asr stack runs/mini/tokens --aggregate stack
    ;;
codebooks-1)    # 80: the first codebook alone
    asr codebooks-1 runs/mini/tokens --codebooks 1
    ;;
codebooks-2)    # 80
    asr codebooks-2 runs/mini/tokens --codebooks 2
    ;;
codebooks-4)    # 80
    asr codebooks-4 runs/mini/tokens --codebooks 4
    ;;
256)            # 115: codebooks of 256 codes
    codec 256 --codebook-size 256
    tokens 256 runs/study/codec-256
    asr 256 runs/study/tokens-256
    ;;
4096)           # 125: codebooks of 4,096 codes
    codec 4096 --codebook-size 4096
    tokens 4096 runs/study/codec-4096
    asr 4096 runs/study/tokens-4096
    ;;
80hz)           # 130: 80 frames per second, which the recognizer merges in pairs
    codec 80hz --strides 2 4 5 5
    tokens 80hz runs/study/codec-80hz
    asr 80hz runs/study/tokens-80hz --subsampling 2
    ;;
untrained)      # 95: a codec of random filters; its codebooks and BatchNorm have settled
    # Here and in steps-1500, our seed 1 was that of a second codec, too.
    codec untrained --steps 60 --lr 1e-9
    tokens untrained runs/study/codec-untrained
    asr untrained runs/study/tokens-untrained
    ;;
steps-1500)     # 95: a codec of 1,500 steps, with a schedule of this length
    codec steps-1500 --steps 1500
    tokens steps-1500 runs/study/codec-steps-1500
    asr steps-1500 runs/study/tokens-steps-1500
    ;;
steps-3000)     # 100
    codec steps-3000 --steps 3000
    tokens steps-3000 runs/study/codec-steps-3000
    asr steps-3000 runs/study/tokens-steps-3000
    ;;
steps-12000)    # 155
    codec steps-12000 --steps 12000
    tokens steps-12000 runs/study/codec-steps-12000
    asr steps-12000 runs/study/tokens-steps-12000
    ;;
fsq)            # 120: FSQ instead of RVQ
    codec fsq --quantizer fsq
    tokens fsq runs/study/codec-fsq
    asr fsq runs/study/tokens-fsq
    ;;
time)           # 125: the time-domain encoder, with RVQ
    codec time --encoder time
    tokens time runs/study/codec-time
    asr time runs/study/tokens-time
    ;;
time-fsq)       # 125: the time-domain encoder, with FSQ
    codec time-fsq --encoder time --quantizer fsq
    tokens time-fsq runs/study/codec-time-fsq
    asr time-fsq runs/study/tokens-time-fsq
    ;;
encodec)        # ?: four codebooks of EnCodec, 3 kbit/s; needs pip install encodec, and a network
    python tokenize_corpus.py "${mini[@]}" --codec encodec --out runs/study/tokens-encodec
    asr encodec runs/study/tokens-encodec --codebooks 4 --subsampling 2
    ;;
pink)           # 90: one copy of each utterance in pink noise
    tokens pink runs/mini/codec --noise pink --snr 0 20
    asr pink runs/study/tokens-pink
    ;;
pink-log-mel)   # 85: the same on log-mel
    python tokenize_corpus.py "${mini[@]}" --features mel --noise pink --snr 0 20 \
        --out runs/study/tokens-pink-log-mel
    asr pink-log-mel runs/study/tokens-pink-log-mel
    ;;
noisy-0.3)      # 80: noise on the embedding
    asr noisy-0.3 runs/mini/tokens --noisy-embedding 0.3
    ;;
noisy-1)        # 80
    asr noisy-1 runs/mini/tokens --noisy-embedding 1
    ;;
noise)          # 120: evaluation in noise; after baseline, log-mel, pink*, noisy-*
    noise runs/mini/tokens runs/study/{baseline,noisy-0.3,noisy-1}{,-1}
    noise runs/mini/mel runs/study/log-mel{,-1}
    noise runs/study/tokens-pink runs/study/pink{,-1}
    noise runs/study/tokens-pink-log-mel runs/study/pink-log-mel{,-1}
    ;;
lang)           # 170: 46 languages on tokens; data/commonvoice holds manifests of Common Voice
    python tokenize_corpus.py --corpus data/commonvoice --speeds 0.8 0.9 1.1 1.2 \
        --codec runs/mini/codec/codec.pt --out runs/lang/tokens
    seeds runs/lang/asr runs/lang/tokens --size small --epochs 30 --lr 0.0015 \
        --time-masks 0 --feature-masks 0
    ;;
lang-mel)       # 150: 46 languages on log-mel
    python tokenize_corpus.py --corpus data/commonvoice --speeds 0.8 0.9 1.1 1.2 \
        --features mel --out runs/lang/mel
    seeds runs/lang/asr-mel runs/lang/mel --size small --epochs 30 --lr 0.0015 \
        --time-masks 0 --feature-masks 0
    ;;
half)           # 0: half FOLDER makes a subset test-half of our speakers in its test-clean
    speakers='61|121|672|1089|1221|1320|1580|2094|2830|3570|3729|4507|4992|5105|5683|6930|7127|7729|8230|8463'
    grep -E "\"speaker\": \"($speakers)\"" "$2/test-clean.jsonl" > "$2/test-half.jsonl"
    ;;
content)        # 5: what each codebook reveals
    python -m results.study content runs/study/baseline runs/study/fsq --test test-clean
    ;;
loss)           # 3: CTC loss on training and test speech; after headline and headline-mel
    python - runs/headline/asr runs/headline/asr-mel <<'END'
import sys
import torch
from torch.nn.functional import ctc_loss
from evaluate import Recognizer
from train_asr import TokenSet
for path in sys.argv[1:]:
    run = Recognizer(path)
    for subset in "train-clean-5", "test-clean":
        data, nats, letters = TokenSet(run.flags["tokens"], [subset]), 0, 0
        for row, array in [*zip(data.rows, data.arrays)][::8]:
            target = torch.tensor(run.units.encode(row["text"]))
            log_probs = run.log_probs(array).transpose(0, 1)        # (T', 1, V)
            lengths = [len(log_probs)], [len(target)]
            nats += ctc_loss(log_probs, target[None], *lengths, reduction="sum").item()
            letters += len(target)
        print(f"{path}, {subset}: {nats / letters:.3f} nats per letter")
END
    ;;
sound)          # 10: STOI and PESQ of decoded speech; needs pip install pystoi pesq, and fsq
    mkdir -p runs/adversarial
    [ -e runs/adversarial/codec.pt ] || cp results/mini-librispeech/codec.pt runs/adversarial/
    python codec.py --corpus mini-librispeech --adversarial --steps 400 --batch 4 --crop 0.25 \
        --lr 0.0003 --out runs/adversarial
    python - results/mini-librispeech/codec.pt runs/study/codec-fsq/codec.pt runs/adversarial/codec.pt <<'END'
import sys
from pathlib import Path
import numpy as np
from pesq import pesq
from pystoi import stoi
from codec import Codec, files_below, read_audio
files = files_below(Path("data/LibriSpeech/test-clean"))
for path in sys.argv[1:]:
    codec = Codec.load(path)
    for codebooks in 8, 4:
        scores = []
        for file in files[::len(files) // 20]:
            wav = read_audio(file)
            tokens = codec.encode(wav[None])[:, :codebooks]
            pair = wav.numpy(), codec.decode(tokens)[0, :len(wav)].clamp(-1, 1).numpy()
            scores.append((stoi(*pair, 16_000), pesq(16_000, *pair, "wb")))
        print(path, codebooks, "codebooks, STOI and PESQ:", np.mean(scores, 0).round(2))
END
    ;;
benchmark)      # 1: speed
    python -m results.study benchmark
    ;;
report)         # 1: all of it into study.json, tables and pictures
    shopt -s nullglob
    python -m results.study collect runs/*/*/eval*/report.json runs/*/codec*/report.json \
        runs/content.jso[n] runs/benchmark.jso[n]
    python -m results.study tables
    python -m results.study figures
    ;;
*)
    echo "bash results/study.sh NAME, where NAME is one of these (minutes: what):"
    grep -E '^[a-z0-9.-]+\) ' results/study.sh | tr -d ')#'
    [ -z "${1-}" ]
    ;;
esac
