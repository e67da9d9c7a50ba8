"""The study: its numbers in one file, its tables and pictures, what each codebook reveals, speed.

in   runs/*/eval/report.json        written by evaluate.py (or compare.json), by codec.py, and by
                                    `content` and `benchmark`
out  results/study.json             every run by its folder, one per line
     results/tables.md, *.png       computed from it; pictures.py draws

    python -m results.study collect runs/study/*/eval/report.json
    python -m results.study tables
    python -m results.study figures                             # the pictures in results/
    python -m results.study figures runs/eval/report.json       # those of your own runs, beside it
    python -m results.study content runs/study/baseline runs/study/fsq --test test-clean
    python -m results.study benchmark

Run these at the top of the repository. study.sh holds the commands that made the runs.

study.json has `runs`: flags, meta, bitrate, log (the learning curve) and, for each test, the
summary of evaluate.py with its command, commit, machine and seed. All rates follow from its
`by_speaker` (word errors, words, character errors, characters), and so do the intervals where
there are five speakers or more. Likewise `codecs`, `content` and `benchmark`. `trials` are those
from which the training recipe was chosen.
"""

import json
import re
import sys
import timeit
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from torchaudio.functional import forced_align
from tqdm import tqdm

from asr_model import CodecASR
from codec import (SAMPLE_RATE, Codec, LogMel, load_checkpoint, mel_window, read_audio, run_stage,
                   write_atomically)
from evaluate import Recognizer, interval, origin, percent, rate, resampled, table
from train_asr import TokenSet, frames_needed

STUDY_FILE = Path(__file__).with_name("study.json")

# Each row is an answer: the question ("older": asked with the older recipe), what a run is called
# there, its folder, and the folder of the run that it is compared with. A folder that ends in -1
# holds the same run with seed 1.
STUDY = """
headline           tokens: against log-mel          runs/headline/asr          runs/headline/asr-mel
headline           log-mel                          runs/headline/asr-mel      -
recipe             22 epochs, unequalized, tokens   runs/plain/asr             runs/headline/asr
recipe             22 epochs, unequalized, log-mel  runs/plain/asr-mel         runs/headline/asr-mel
recipe             the older one, tokens            runs/old/headline          runs/plain/asr
recipe             the older one, log-mel           runs/old/headline-mel      runs/plain/asr-mel
more speech        9.5 hours, in half the steps     runs/headline/more         runs/headline/asr
equalized copies   tokens: against plain copies     runs/study/equalized       runs/study/baseline
equalized copies   log-mel: against plain copies    runs/study/equalized-mel   runs/study/log-mel
equalized copies   tokens: against log-mel          runs/study/equalized    runs/study/equalized-mel
README's run       tokens                           runs/quick/asr             -
README's run       log-mel: against tokens          runs/quick/asr-mel         runs/quick/asr
quick run          tokens: against log-mel          runs/quick/masks           runs/quick/masks-mel
quick run          log-mel                          runs/quick/masks-mel       -
input              tokens: against log-mel          runs/study/baseline        runs/study/log-mel
input              log-mel                          runs/study/log-mel         -
input              latent instead of tokens         runs/study/latent          runs/study/baseline
input              log-mel of 80 Hz: against 40 Hz  runs/study/log-mel-80      runs/study/log-mel
embedding tables   start as codebooks               runs/study/baseline        -
embedding tables   codebooks, never trained         runs/study/frozen          runs/study/baseline
embedding tables   start as shuffled codebooks      runs/study/shuffled        runs/study/baseline
embedding tables   start at random                  runs/study/random          runs/study/baseline
embedding tables   random, shared by similar codes  runs/study/shared          runs/study/baseline
random tables      ten times the rate               runs/study/random-fast     runs/study/baseline
random tables      24 epochs                        runs/study/random-24       -
random tables      the first codebook, 6 epochs     runs/study/random-first    -
random tables      256 for similar codes, 6 epochs  runs/study/shared-256      -
random tables      64 for unrelated ones, 6 epochs  runs/study/mixed           -
random tables      30 times the rate, 6 epochs      runs/study/random-faster   -
sum of embeddings  concatenated instead             runs/study/stack           runs/study/baseline
bits               first codebooks alone: 1         runs/study/codebooks-1     runs/study/baseline
bits               first codebooks alone: 2         runs/study/codebooks-2     runs/study/baseline
bits               first codebooks alone: 4         runs/study/codebooks-4     runs/study/baseline
bits               first codebooks alone: all 8     runs/study/baseline        -
bits               256 codes in each codebook       runs/study/256             runs/study/baseline
bits               4,096 codes in each codebook     runs/study/4096            runs/study/baseline
bits               80 frames per second             runs/study/80hz            runs/study/baseline
bits               log-mel                          runs/study/log-mel         -
codec steps        none: random filters             runs/study/untrained       runs/study/baseline
codec steps        1,500                            runs/study/steps-1500      runs/study/baseline
codec steps        3,000                            runs/study/steps-3000      runs/study/baseline
codec steps        12,000                           runs/study/steps-12000     runs/study/baseline
codec              mel encoder, FSQ                 runs/study/fsq             runs/study/baseline
codec              time encoder, RVQ                runs/study/time            runs/study/baseline
codec              time encoder, FSQ                runs/study/time-fsq        runs/study/baseline
codec              EnCodec, 3 kbit/s                runs/study/encodec         runs/study/baseline
masks              the default ones                 runs/quick/masks           runs/study/baseline
masks              none, 30 epochs, equalized       runs/masks/none            -
masks              the default ones, 30 epochs      runs/masks/default         runs/masks/none
noise              tokens                           runs/study/baseline        -
noise              log-mel                          runs/study/log-mel         -
noise              tokens, trained in pink noise    runs/study/pink            runs/study/baseline
noise              log-mel, trained in pink noise   runs/study/pink-log-mel    -
noise, others      log-mel instead, both in noise   runs/study/pink-log-mel    runs/study/pink
noisy embedding    strength 0.3                     runs/study/noisy-0.3       runs/study/baseline
noisy embedding    strength 1                       runs/study/noisy-1         runs/study/baseline
noise, others      noisy embedding, 0.3             runs/study/noisy-0.3       runs/study/baseline
noise, others      noisy embedding, 1               runs/study/noisy-1         runs/study/baseline
languages          tokens: against log-mel          runs/lang/asr              runs/lang/asr-mel
languages          log-mel                          runs/lang/asr-mel          -
codecs             mel encoder, RVQ                 runs/mini/codec            -
codecs             mel encoder, FSQ                 runs/study/codec-fsq       -
codecs             time encoder, RVQ                runs/study/codec-time      -
codecs             time encoder, FSQ                runs/study/codec-time-fsq  -
content            RVQ                              runs/study/baseline        -
content            FSQ                              runs/study/fsq             -
input, older       log-mel, 100 Hz to 25            runs/quick/mel10           runs/quick/mel
input, older       latent of FSQ, not its codes     runs/quick/latent          runs/quick/fsq-3
bits, older        256 codes in each codebook       runs/old/256               runs/old/baseline
bits, older        4,096 codes in each codebook     runs/old/4096              runs/old/baseline
bits, older        80 frames per second             runs/old/80hz              runs/old/baseline
steps, older       12,000, small, 30 epochs         runs/old/headline-12k      runs/old/headline
steps, older       12,000, 12 epochs                runs/quick/rvq-12k         runs/quick/rvq
steps, older       12,000, 6 epochs                 runs/old/steps-12000       runs/old/xeon
codec, older       mel encoder, FSQ                 runs/quick/fsq             runs/quick/rvq
codec, older       mel encoder, FSQ, penalty 3      runs/quick/fsq-3           runs/quick/rvq
codec, older       time encoder, RVQ                runs/old/time              runs/old/baseline
codec, older       time encoder, FSQ                runs/old/time-fsq          runs/old/baseline
codec, older       time encoder, FSQ, not RVQ       runs/old/time-fsq          runs/old/time
masks, older       none                             runs/old/no-masks          runs/old/baseline
masks, older       none, 12 epochs                  runs/old/no-masks-12       runs/old/masks-12
masks, older       none, 12 epochs                  runs/old/no-masks-12-1     runs/quick/rvq-1
noise, older       noisy embedding, 0.3             runs/old/noisy-0.3         runs/old/xeon
noise, older       noisy embedding, 1               runs/old/noisy-1           runs/old/xeon
noise, older       log-mel instead, both in noise   runs/old/log-mel-pink      runs/old/pink
noise, older       no masks                         runs/old/no-masks          runs/old/xeon
noise, older       no masks, 12 epochs              runs/old/no-masks-12       runs/old/masks-12
noise              tokens, older recipe             runs/old/xeon              -
noise              tokens, older recipe             runs/old/baseline-1        -
noise              tokens trained in noise, older   runs/old/pink              runs/old/xeon
noise              tokens trained in noise, older   runs/old/pink-1            runs/old/baseline-1
noise              log-mel, older recipe            runs/old/log-mel           -
noise              log-mel trained in noise, older  runs/old/log-mel-pink      -
languages          tokens: against log-mel          runs/cv/small              runs/cv/small-mel
languages          log-mel                          runs/cv/small-mel          -
languages, tiny    tokens: against log-mel          runs/cv/asr                runs/cv/asr-mel
languages, tiny    log-mel                          runs/cv/asr-mel            -
synthetic speech   tokens                           runs/asr                   -
codecs             time encoder, RVQ                runs/old/codec-time        -
codecs             time encoder, FSQ                runs/old/codec-time-fsq    -
content            published codec, RVQ             results/mini-librispeech   -
"""


# ------------------------------------------------------------------------------------- study.json

def read(path):
    return json.loads(path.read_text("utf-8"))


def collect(args):
    """Add reports to study.json, in the place of older numbers of the same runs and tests."""
    study = read(STUDY_FILE)
    for path in map(Path, args.paths):
        report = read(path)
        if "mel_distance" in report:            # of a codec, whose flags and log are beside it
            saved = load_checkpoint(path.with_name("codec.pt"), "codec")
            report |= {"flags": saved["flags"], "log": saved["log"]}
            report = {"codecs": {str(path.parent): report}}
        for name, run in report.pop("runs", {}).items():
            add_run(study["runs"], name.removesuffix("/asr.pt"), run, made=report)
        for section in study.keys() & report.keys():
            study[section] |= report[section]
    # One run per line, so that git shows what changed.
    write_atomically(STUDY_FILE, json.dumps(study, sort_keys=True).replace(
        '}, "runs/', '},\n"runs/'))
    print(f"wrote {STUDY_FILE}: {len(study['runs'])} runs")


def add_run(runs, name, run, made):
    """made: command, commit, machine and seed of its tests. Other tests of this run stay; those of
    an earlier run of the same name go."""
    lm = ", with LM" if " --lm" in made["command"] else ""
    tests = {test + lm: found | made for test, found in run["test"].items()}
    if name in runs and runs[name]["log"] == run["log"]:
        tests = runs[name]["test"] | tests
    runs[name] = run | {"test": tests}


def rows_of(entries):
    """A section of study.json -> question, label, entry, what it is compared with or None.

    Of rows that agree in question, label and seed, the first one counts."""
    rows = {}
    for line in STUDY.strip().splitlines():
        question, label, name, base = re.split("  +", line)
        for seed in "", "-1":
            run, other = entries.get(name + seed), entries.get(base + seed)
            if run and (other or base == "-"):
                row = question, label, run, other
                rows.setdefault((question, label, run["flags"]["seed"]), row)
    return [*rows.values()]


# ----------------------------------------------------------------------------------------- tables

def difference(run, base, test, words=False):
    """CER (or WER) of a run minus that of another, and its 95% interval, in points.

    Speakers that both were tested on count, and are resampled together: a reader may have tested
    on more of them than we had.
    """
    columns = slice(2) if words else slice(2, 4)
    ours, theirs = run["test"][test]["by_speaker"], base["test"][test]["by_speaker"]
    pairs = np.array([(ours[name], theirs[name]) for name in ours if name in theirs])
    ours, theirs = pairs[..., columns].swapaxes(0, 1)       # (speakers, 2) each
    speakers = np.arange(len(pairs))
    spread = resampled(ours, speakers, 0) - resampled(theirs, speakers, 0)
    return [100 * (rate(ours) - rate(theirs)), *interval(100 * spread)]


def tables(args):
    """Print a table for each question, and write them to results/tables.md."""
    answers = {}            # question: rows of its table
    for question, label, run, base in rows_of(read(STUDY_FILE)["runs"]):
        if question == "content":
            continue
        # Noise is measured on every fourth utterance.
        subsets = ["test-quarter"] if question.startswith("noise") else ["test-clean", "test"]
        for test, found in run["test"].items():
            if found["subset"] not in subsets or found["snr"] not in (None, 10):
                continue
            words, minus = test.endswith("LM"), ""
            if base and test in base["test"]:
                middle, low, high = difference(run, base, test, words)
                minus = f"{'WER' if words else 'CER'} {middle:+z.1f} ({low:+z.1f} to {high:+z.1f})"
            row = [f"{label}, seed {run['flags']['seed']}", test, percent(found, "wer"),
                   percent(found, "cer"), minus]
            answers.setdefault(question, []).append(row)
    header = ["run", "test", "WER % (95%)", "CER % (95%)", "minus its reference (95%)"]
    pages = [f"## {question}\n\n{table(header, rows)}" for question, rows in answers.items()]
    page = "\n".join(pages)
    write_atomically(STUDY_FILE.with_name("tables.md"), page)
    print(page)


def figures(args):
    """Draw study.json into results/, or each of the given reports beside it."""
    from results import pictures            # which needs matplotlib
    for path in args.paths or [STUDY_FILE]:
        pictures.draw(Path(path))


# -------------------------------------------------------------------------- what codebooks reveal

def content(args):
    """Measure what each codebook reveals about the character being said, and about the speaker."""
    runs = {path: Recognizer(path) for path in args.paths}
    for path, run in runs.items():
        if not run.meta["codebooks"] or run.flags["subsampling"] > 1:
            raise ValueError(f"{path}: content needs a run on tokens, without subsampling")
    found = {path: origin(args) | codebook_bits(run, args.test) for path, run in runs.items()}
    save("content", found)


def codebook_bits(run, test):
    """Mutual information of the code of each codebook and a label, in bits.

    The labels are those of frames in which the recognizer, by forced alignment, writes a
    character, which may be later than it was said. One half of the utterances shows after which
    delay, of 0 to 4 frames, a code reveals most; the other half is measured.
    """
    data, parts = TokenSet(run.flags["tokens"], test or run.meta["test"]), []
    speakers = sorted({row["speaker"] for row in data.rows})
    order = np.random.default_rng(0).permutation(len(data.rows))
    for i in tqdm(order, f"aligning {run.path}", disable=None):
        row, array = data.rows[i], data.arrays[i]
        target = torch.tensor(run.units.encode(row["text"]))
        target = target[target != 0]
        if 0 < frames_needed(target) <= len(array):
            path = forced_align(run.log_probs(array), target[None])[0][0]           # (T,)
            at = path.nonzero()[:, 0]                                               # (N,)
            delayed = [array[(at - delay).clamp(min=0)] for delay in range(5)]      # (N, Q) each
            speaker = torch.full_like(at, speakers.index(row["speaker"]))
            parts.append((torch.stack(delayed, 1), path[at], speaker))
    codes, characters, speakers = map(torch.cat, zip(*parts))           # (N, 5, Q), (N,), (N,)
    half, found = len(codes) // 2, {"flags": run.flags}
    for kind, labels in (("character", characters), ("speaker", speakers)):
        found[kind] = []
        for code in codes.long().unbind(2):                                         # (N, 5)
            tried = [information(delayed, labels[:half]) for delayed in code[:half].T]
            found[kind].append(information(code[half:, np.argmax(tried)], labels[half:]))
        print(f"{run.path}, bits about the {kind}:", *np.round(found[kind], 2))
    return found


def information(codes, labels):
    """Bits that codes and labels share, less what other utterances' labels seem to share."""
    return entropy(codes, labels.roll(len(labels) // 2)) - entropy(codes, labels)


def entropy(codes, labels):
    counts = (codes * 2**16 + labels).unique(return_counts=True)[1]
    share = counts / counts.sum()
    return -(share * share.log2()).sum().item()


# ------------------------------------------------------------------------------------------ speed

def benchmark(args):
    """Measure seconds of speech per second on the CPU: encoding, training on tokens and log-mel."""
    wav, speeds = 0.05 * torch.randn(1, 60 * SAMPLE_RATE), {}
    for encoder in ("mel", "time"):
        for quantizer in ("fsq", "rvq"):
            codec = Codec(encoder, quantizer).eval()
            speeds[f"encoding, {encoder} {quantizer}"] = speed(lambda: codec.encode(wav))
    Path("runs").mkdir(exist_ok=True)
    flac = "runs/minute.flac"
    sf.write(flac, wav[0].numpy(), SAMPLE_RATE)
    for name, codebooks, hop, subsampling in (
            ("tokens, 40 frames per second", 8, 400, 1),
            ("log-mel from audio, 40 frames per second", 0, 400, 1),
            ("log-mel from audio, 100 frames per second, subsampled to 25", 0, 160, 4)):
        mel = LogMel(mel_window(hop), hop, 80)
        model = CodecASR(32, codebooks, 1000, 80, "sum", "tiny", subsampling)

        def step():
            """Forward and backward pass on six pieces of ten seconds."""
            batch = (torch.randint(1000, (6, 400, 8)) if codebooks
                     else mel(read_audio(flac).view(6, -1)).mT)
            log_probs, _ = model(batch, torch.full((6,), batch.shape[1]))
            log_probs.square().mean().backward()
        speeds[f"training, {name}"] = speed(step)
    print(table(["seconds of speech per second", ""], speeds.items()))
    save("benchmark", {origin(args)["machine"]: origin(args) | speeds})


def speed(function):
    """Seconds of speech per second of a function that processes a minute."""
    return round(60 / min(timeit.repeat(function, number=1)))


def save(section, entries):
    path = Path(f"runs/{section}.json")
    write_atomically(path, json.dumps({section: entries}))
    print(f"wrote {path}")


# -------------------------------------------------------------------------------------------- main

def parse(arguments=None):
    parser = ArgumentParser("python -m results.study", description=__doc__,
                            formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="WHAT", required=True)
    for stage in (collect, tables, figures, content, benchmark):
        command = commands.add_parser(stage.__name__, help=stage.__doc__)
        command.set_defaults(stage=stage, seed=0)
        if stage in (collect, figures, content):
            command.add_argument("paths", nargs="*" if stage == figures else "+",
                                 help="recognizers, for content; else reports")
        if stage == content:
            command.add_argument("--test", nargs="+", help="subsets, if not those of the tokens")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    sys.argv[:1] = ["-m", "results.study"]      # for the command in a report
    run_stage(args.stage, args)


if __name__ == "__main__":
    main()
