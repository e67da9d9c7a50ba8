"""Stage 4: recognize speech with a trained recognizer, and measure how well.

in   runs/asr/asr.pt, and token files; for --audio and --noise the audio and the codec
out  runs/eval/report.json, report.md       word and character error rates, with intervals
     runs/eval/compare.json, compare.md     instead, with --compare
     runs/eval/*.png                        pictures of the files of --audio, with --plots

    python evaluate.py                                              # the test subsets
    python evaluate.py --audio talk.mp3 my-recordings               # transcribe files and folders
    python evaluate.py --noise white babble --snr 20 10 0           # degrade, encode, recognize
    python evaluate.py --compare runs/asr runs/asr-mel              # one table, with differences

From Python:

    recognizer = Recognizer("runs/asr/asr.pt")
    print(recognizer.transcribe("talk.mp3"))

WER, CER: word and character error rate, (substitutions + deletions + insertions) / true length.
Intervals: 95%, by a bootstrap that resamples speakers, or utterances where there are fewer than
five speakers. With few speakers they are too narrow: in a simulation, they contained the truth in
94 of 100 cases with 20 speakers, in 83 with 5 speakers.
Legend: T token frames, Q codebooks, D feature size, T' output frames, V text units, N utterances.
"""

import gzip
import itertools
import json
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import jiwer
import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from tqdm import tqdm

from codec import (SAMPLE_RATE, LogMel, add_common_flags, files_below, flag_group,
                   load_checkpoint, pick_device, read_audio, refuse_idle, run_stage,
                   write_atomically)
from tokenize_corpus import FrontEnd, Noise, Utterance
from train_asr import TokenSet, build_model, check_same_tokens, greedy, read_meta, split_language


# ------------------------------------------------------------------------------------ recognizing

class Recognizer:
    """A trained recognizer, ready for use.

        recognizer = Recognizer("results/mini-librispeech/asr.pt", lm="lm.arpa.gz")
        text = recognizer.transcribe("talk.mp3")
        text = recognizer.recognize(codec.encode(wav)[0].T)         # tokens (T, Q)
    """

    def __init__(self, path: str | Path, device: str = "auto", lm: str | None = None,
                 codec: str | None = None, beam: int = 500, lm_weight: float = 3.0,
                 word_score: float = 0.0, prior_weight: float = 0.5):
        """path: asr.pt or its folder. lm: a word language model in ARPA format, plain or gzipped,
        for a beam search; without, decoding is greedy. codec: by default the one that made the
        training tokens; it is loaded at first use. Raises ValueError when a file is missing,
        damaged, or does not fit."""
        self.path = Path(path) / "asr.pt" if Path(path).is_dir() else Path(path)
        saved = load_checkpoint(self.path, "asr")
        self.device = pick_device(device)
        try:
            self.flags = saved["flags"]
            self.meta = saved["meta"]
            self.log = saved["log"]
            self.units = SentencePieceProcessor(model_proto=saved["text"])
            self.model = build_model(self.flags, self.meta, len(self.units))
            self.model.load_state_dict(saved["model"])
        except (KeyError, TypeError, RuntimeError):
            raise ValueError(f"{self.path}: an incomplete recognizer; copy or train it again")
        self.model.to(self.device).eval()
        # codec_path is relative to the checkpoint.
        self.codec = codec or self.path.parent / self.meta["codec_path"]
        # A log prior, subtracted before a beam search, as the language model has its own (see
        # unit_prior in train_asr.py). Older checkpoints lack it.
        self.log_prior = prior_weight * saved.get("log_prior", torch.zeros(len(self.units)))
        self.beam_search = lm and make_beam_search(self.units, lm, beam, lm_weight, word_score)

    @cached_property
    def front_end(self) -> FrontEnd:
        """What made the training tokens. Raises ValueError when the given codec is another one."""
        front_end = FrontEnd(self.meta["features"], self.codec, self.meta["hop"], self.device)
        check_same_tokens(self.path, self.meta, self.codec, front_end.meta)
        return front_end

    @torch.inference_mode()
    def log_probs(self, array: Tensor) -> Tensor:
        """A recording of any length, (T, Q) or (T, D) -> (1, T', V), in bounded memory.

        It is read in pieces of 50 seconds, each with five more on both sides as context.
        """
        factor = self.flags["subsampling"]
        per_second = round(self.meta["sample_rate"] / self.meta["hop"] / factor)
        piece = 50 * per_second         # output frames; times factor: input frames
        context = 5 * per_second
        array = array[None, :, :self.flags["codebooks"] or None].to(self.device)
        parts = []
        for start in range(0, -(-array.shape[1] // factor), piece):
            first = max(0, start - context)
            part = array[:, first * factor:(start + piece + context) * factor]
            read, _ = self.model(part, torch.tensor([part.shape[1]], device=self.device))
            parts.append(read[:, start - first:start - first + piece].cpu())
        return torch.cat(parts, 1)

    def recognize(self, tokens: Tensor) -> str:
        """Tokens (T, Q), or features (T, D), of a recording -> its text."""
        log_probs = self.log_probs(tokens)
        if not self.beam_search:
            return greedy(self.units, log_probs[0])
        rest = log_probs - self.log_prior
        words = []
        while rest.shape[1]:
            end = rest.shape[1]
            if end > 2400:
                # Pieces of at most a minute (at 40 Hz) bound memory. This one ends in a pause: in
                # the middle of those 15 of its last 800 frames where blanks are likeliest.
                end = 1607 + int(rest[0, 1600:2400, 0].unfold(0, 15, 1).mean(1).argmax())
            for best in self.beam_search(rest[:, :end])[0]:         # one hypothesis, or none
                words += best.words
            rest = rest[:, end:]
        return " ".join(words)

    def transcribe(self, path: str | Path) -> str:
        """An audio file of any length -> its text. Raises ValueError where it cannot be read."""
        return self.recognize(torch.from_numpy(self.front_end(read_audio(path))))


def make_beam_search(units: SentencePieceProcessor, lm: str, beam: int, lm_weight: float,
                     word_score: float):
    """torchaudio's beam search over the words of an ARPA language model, plain or gzipped.

    Words are spelled in the recognizer's text units. In each frame only the ten likeliest units
    continue a hypothesis, and hypotheses that score more than 20 below the best are dropped:
    both make room for a wider beam.
    """
    try:
        from torchaudio.models.decoder import ctc_decoder
    except (ImportError, RuntimeError):
        raise ValueError("--lm: the beam search needs pip install flashlight-text")
    pieces = [units.id_to_piece(i) for i in range(len(units))]
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as lexicon:
        for word in arpa_words(lm):
            if word[0] != "<" and 0 not in units.encode(word):
                print(word, *units.encode(word, out_type=str), file=lexicon)
        if not lexicon.tell():
            raise ValueError(f"--lm {lm}: holds no words in ARPA format that the recognizer's "
                             f"units can spell; upper and lower case differ")
        lexicon.flush()
        try:
            return ctc_decoder(
                lexicon=lexicon.name, tokens=pieces, lm=str(lm), beam_size=beam,
                beam_size_token=10, beam_threshold=20, lm_weight=lm_weight, word_score=word_score,
                blank_token=pieces[0], sil_token=pieces[0], unk_word="<unk>")
        except RuntimeError:
            raise ValueError(f"--lm {lm}: not a word language model in ARPA format")


def arpa_words(lm: str) -> list[str]:
    """The words that an ARPA file lists as its 1-grams."""
    opener = gzip.open if str(lm).endswith(".gz") else open
    try:
        with opener(lm, "rt", encoding="utf-8", errors="replace") as arpa:
            unigrams = itertools.takewhile(lambda line: not line.startswith("\\2-grams"), arpa)
            return re.findall(r"^\S+\t(\S+)", "".join(unigrams), re.MULTILINE)
    except (OSError, EOFError, zlib.error):
        raise ValueError(f"--lm {lm}: no such file, or damaged")


# ----------------------------------------------------------------------------------------- scoring

class Score:
    """Errors and reference lengths of each utterance, so that every rate comes from one count."""

    def __init__(self, rows: list[dict], hyps: list[str]):
        """rows: of the token folder, with text, lang and speaker; hyps: what was recognized."""
        self.rows = rows
        self.refs = [row["text"] for row in rows]
        self.hyp_langs, self.texts = zip(*map(split_language, hyps))
        self.word_counts = count_errors(jiwer.process_words, self.refs, self.texts)
        self.char_counts = count_errors(jiwer.process_characters, self.refs, self.texts)
        self.speakers = [row["speaker"] or row["id"] for row in rows]
        # The bootstrap draws speakers, or utterances where there are fewer than five speakers.
        # groups (N,): for each utterance, the number of its speaker, or its own.
        drawn = self.speakers if len(set(self.speakers)) >= 5 else range(len(rows))
        self.groups = np.unique(drawn, return_inverse=True)[1]

    def summary(self, seed: int) -> dict:
        by_speaker = {}     # speaker: word errors, words, character errors, characters
        for name, counts in zip(self.speakers, np.hstack([self.word_counts, self.char_counts])):
            by_speaker[name] = by_speaker.get(name, 0) + counts
        result = {"utterances": len(self.rows),
                  "wer": rate(self.word_counts),
                  "wer_interval": interval(resampled(self.word_counts, self.groups, seed)),
                  "cer": rate(self.char_counts),
                  "cer_interval": interval(resampled(self.char_counts, self.groups, seed)),
                  "by_speaker": {name: total.tolist() for name, total in by_speaker.items()}}
        languages = np.array([row["lang"] for row in self.rows])
        named = np.array(self.hyp_langs)
        if len(set(languages)) > 1:
            result["cer_by_language"] = {lang: rate(self.char_counts[languages == lang])
                                         for lang in sorted(set(languages))}
        if named.any():
            result["languages_named_right"] = float(np.mean(named == languages))
        return result


def count_errors(process, refs: list[str], hyps: list[str]) -> np.ndarray:
    """-> errors and reference length of each utterance, (N, 2)."""
    counts = []
    for found in map(process, refs, hyps):
        missed = found.substitutions + found.deletions
        counts.append((missed + found.insertions, missed + found.hits))
    return np.array(counts)


def rate(counts: np.ndarray) -> float:
    """Errors and lengths (N, 2) -> error rate."""
    return float(counts[:, 0].sum() / counts[:, 1].sum())


def resampled(counts: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Error rates of 1,000 bootstrap samples of the groups (Bisani and Ney, 2004)."""
    totals = np.zeros((groups.max() + 1, 2))
    np.add.at(totals, groups, counts)
    drawn = np.random.default_rng(seed).integers(len(totals), size=(1000, len(totals)))
    errors, lengths = totals[drawn].sum(1).T
    return errors / lengths


def interval(rates: np.ndarray) -> list[float]:
    """The middle 95% of the bootstrap's error rates, or of their differences."""
    return np.percentile(rates, [2.5, 97.5]).tolist()


def cer_difference(score: Score, base: Score, seed: int) -> list[float]:
    """Interval of the CER of score minus the CER of base. One seed draws the same speakers, or
    utterances, for both."""
    cers = resampled(score.char_counts, base.groups, seed)
    return interval(cers - resampled(base.char_counts, base.groups, seed))


# ----------------------------------------------------------------------------------------- picture

def plot_utterance(recognizer: Recognizer, audio: Path, text: str, picture: Path):
    """Waveform, log-mel, and tokens with the text units read from them, on a shared time axis."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plots needs pip install matplotlib")
    wav = read_audio(audio)
    array = torch.from_numpy(recognizer.front_end(wav))                     # (T, Q)
    end = len(wav) / SAMPLE_RATE
    best = recognizer.log_probs(array)[0].argmax(1)                         # (T',)
    fig = Figure(figsize=(12, 7), dpi=80, layout="constrained")
    fig.suptitle(f"recognized: {text}", parse_math=False)
    axes = fig.subplots(3, 1, sharex=True)
    axes[0].plot(np.linspace(0, end, len(wav)), wav, linewidth=0.4)
    mel = LogMel(512, 160, 80)(wav[None])[0]
    axes[1].imshow(mel, origin="lower", aspect="auto", extent=(0, end, 0.5, 80.5))
    axes[2].imshow(array.T.float(), aspect="auto", extent=(0, end, array.shape[1] + 0.5, 0.5))
    written = [t for t in range(len(best)) if best[t] and (t == 0 or best[t] != best[t - 1])]
    for number, t in enumerate(written):
        height = 1.03 + 0.08 * (number % 3)         # neighbors side by side would collide
        piece = recognizer.units.id_to_piece(int(best[t])).strip("\u2581")
        axes[2].text((t + 0.5) / len(best), height, piece, ha="center",
                     transform=axes[2].transAxes)
    for axis, label in zip(axes, ("amplitude", "mel band", recognizer.meta["features"])):
        axis.set(ylabel=label, xlim=(0, end))
    axes[2].set_xlabel("seconds")
    picture.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(picture)
    print(f"wrote {picture}")


# ----------------------------------------------------------------------------------------- reports

def percent(summary: dict, name: str) -> str:
    low, high = summary[f"{name}_interval"]
    return f"{100 * summary[name]:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def origin(args) -> dict:
    """Where numbers come from: command, seed, commit and machine."""
    git = subprocess.run("git describe --always --dirty --exclude '*'", shell=True,
                         cwd=Path(__file__).parent, capture_output=True, text=True)
    return {"command": shlex.join(["python", *sys.argv]), "seed": args.seed,
            "commit": git.stdout.strip(),
            "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, "
                       f"{torch.get_num_threads()} threads"}


def remarks(score: Score, summary: dict) -> str:
    """Error rates by language, and up to five examples."""
    page = ""
    if "cer_by_language" in summary:
        cers = summary["cer_by_language"]
        page = f"CER by language, mean {np.mean([*cers.values()]):.1%}: "
        page += ", ".join(f"{lang} {cer:.1%}" for lang, cer in cers.items()) + "\n"
    if "languages_named_right" in summary:
        page += f"languages identified correctly: {summary['languages_named_right']:.1%}\n"
    for i in range(0, len(score.refs), -(-len(score.refs) // 5)):
        page += f"\n    ref  {score.refs[i]}\n    hyp  {score.texts[i]}\n"
    return page


def conditions(run: Recognizer, data: TokenSet, args) -> Iterator[tuple]:
    """-> kind of noise, signal-to-noise ratio, arrays of the utterances: first without noise."""
    yield None, None, data.arrays
    # Rows are Utterances, written as JSON, so their audio is a str.
    items = [Utterance(*map(row.get, Utterance._fields)) for row in data.rows]
    for kind, snr in itertools.product(args.noise, args.snr):
        noise = Noise([kind], [snr, snr], items, args.seed)
        yield kind, snr, [torch.from_numpy(run.front_end(noise(read_audio(item.audio), item)))
                          for item in tqdm(items, f"{kind} {snr:g} dB", disable=None)]


def load(path: str | Path, args) -> Recognizer:
    return Recognizer(path, args.device, lm=args.lm, codec=args.codec, beam=args.beam,
                      lm_weight=args.lm_weight, word_score=args.word_score,
                      prior_weight=args.prior_weight)


def evaluate(args):
    """Evaluate one run, or compare several, on the test subsets: clean, and in noise."""
    out = Path(args.out)
    subsets = args.test
    report = {}
    rows = []
    page = ""
    first = {}                              # test: Score of the first run
    stem = "compare" if args.compare else "report"
    header = ["run", "test", "utterances", "WER % (95%)", "CER % (95%)"]
    if args.compare:
        header.append("CER minus the first run's, 95%")
    for name in args.compare or [args.asr]:
        run = load(name, args)
        folder = args.tokens or run.flags["tokens"]
        found = read_meta(folder)
        check_same_tokens(run.path, run.meta, folder, found)
        subsets = subsets or found["test"]              # those of the first run
        if not subsets:
            raise ValueError(f"{folder}: has no test subset; name another one with --test")
        bitrate = run.meta["bitrate"] * run.model.num_codebooks / max(1, run.meta["codebooks"])
        if args.noise:
            # A typo in the kinds, or a codec that is missing, is reported now.
            Noise(args.noise, args.snr, [], args.seed)
            run.front_end
        out.mkdir(parents=True, exist_ok=True)          # fails here, not after hours
        report[name] = {"flags": run.flags, "meta": run.meta, "bitrate": bitrate, "log": run.log,
                        "test": {}}
        for subset in subsets:
            data = TokenSet(folder, [subset])
            for kind, snr, arrays in conditions(run, data, args):
                test = f"{subset}, {kind} {snr:g} dB" if kind else subset
                progress = tqdm(arrays, test, leave=False, disable=None)
                score = Score(data.rows, [run.recognize(array) for array in progress])
                summary = score.summary(args.seed) | {"subset": subset, "noise": kind, "snr": snr}
                report[name]["test"][test] = summary
                rows.append([name, test, summary["utterances"], percent(summary, "wer"),
                             percent(summary, "cer")])
                if args.compare:
                    base = first.setdefault(test, score)
                    if score.refs != base.refs:
                        raise ValueError(f"{name}: its {subset} holds other utterances than that "
                                         f"of {args.compare[0]}")
                    low, high = cer_difference(score, base, args.seed)
                    summary["cer_minus_first"] = [low, high]
                    rows[-1].append(f"{100 * low:+.1f} to {100 * high:+.1f}")
                elif not kind:
                    page += f"\n{subset}\n{remarks(score, summary)}"
                # Now, not at the end, so that what is measured is kept.
                text = f"{page}\n{table(header, rows)}"
                write_atomically(out / f"{stem}.md", text)
                write_atomically(out / f"{stem}.json",
                                 json.dumps(origin(args) | {"runs": report}, indent=1))
    print(f"{text}\nwrote {out / stem}.md and .json; pictures of them: "
          f"python -m results.study figures {shlex.quote(f'{out / stem}.json')}")


# ----------------------------------------------------------------------------------- transcribing

def transcribe(args):
    """Print what is said in each file; with --plots, draw it too."""
    recognizer = load(args.asr, args)
    files = []
    failed = 0
    recognizer.front_end                # a codec that does not fit is reported once, now
    for path in map(Path, args.audio):
        files += files_below(path) if path.is_dir() else [path]
    for number, path in enumerate(files):
        try:
            text = recognizer.transcribe(path)
        except ValueError as error:
            print(f"skipped: {error}")
            failed += 1
            continue
        print(f"{path}: {text}", flush=True)
        if args.plots:
            picture = Path(args.out) / f"{number:03d}-{path.stem}.png"
            plot_utterance(recognizer, path, text, picture)
    if failed == len(files):
        raise ValueError(f"{', '.join(args.audio)}: no audio that can be read")


# -------------------------------------------------------------------------------------------- main

def parse(arguments=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = flag_group(parser, "recognizer, and what to recognize")
    add("--asr", "runs/asr/asr.pt", "a recognizer, or its folder")
    add("--test", [], "subsets to evaluate, if not the test subsets of the token folder")
    add("--tokens", None, "folder of tokens, if not those the recognizer was trained on")
    add("--compare", [],
        "recognizers or their folders: one table of all, against the first", metavar="RUN")
    add("--noise", [],
        "also evaluate in noise: white, pink, babble, or folders of audio; reads the recordings")
    add("--snr", [20.0, 10.0, 0.0], "signal-to-noise ratios in dB", type=float)
    add("--audio", [], "transcribe these files and folders instead")
    add("--codec", None, "codec for --audio and --noise, if the one that --asr names has moved")
    add("--plots", False,
        "also draw each file of --audio, with its tokens and letters (needs matplotlib)")
    add = flag_group(parser, "beam search with a language model")
    add("--lm", None, "word language model in ARPA format, plain or gzipped; it writes no language "
        "tokens; without one, decoding is greedy")
    add("--beam", 500, "hypotheses kept")
    add("--lm-weight", 3.0, "weight of the language model")
    add("--word-score", 0.0, "added for every word")
    add("--prior-weight", 0.5,
        "share of the units' log prior that is subtracted from their log-probabilities")
    add_common_flags(parser, "runs/eval")

    args = parser.parse_args(arguments)
    if args.audio:
        refuse_idle(parser, args, "with --audio", "test", "tokens", "compare", "noise", "seed")
        if not args.plots:
            refuse_idle(parser, args, "with --audio, without --plots", "out")
    else:
        refuse_idle(parser, args, "without --audio", "plots")
    if not args.noise:
        refuse_idle(parser, args, "without --noise", "snr")
    if not args.noise and not args.audio:
        refuse_idle(parser, args, "without --audio or --noise", "codec")
    if not args.lm:
        refuse_idle(parser, args, "without --lm", "beam", "lm_weight", "word_score",
                    "prior_weight")
    if args.compare:
        refuse_idle(parser, args, "with --compare", "asr")
    if args.beam < 1:
        parser.error("--beam must be above 0")
    return args


def main(arguments=None):
    args = parse(arguments)
    run_stage(transcribe if args.audio else evaluate, args)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")        # for file names that are not UTF-8
    main()
