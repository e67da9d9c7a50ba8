"""Stage 4: evaluate, compare, show and use a trained recogniser.

in   runs/asr/asr.pt, and the tokens that it was trained on
out  runs/eval/report.json, report.md       word and character error rates, with intervals
     (compare, content, benchmark: likewise; pictures with --plots)

    python evaluate.py                                              # the test subsets
    python evaluate.py --audio talk.mp3                             # transcribe
    python evaluate.py --noise white babble --snr 20 10 0           # degrade, encode, recognise
    python evaluate.py --compare runs/asr runs/asr-mel              # one table, with differences

WER, CER: word and character error rate, (substitutions + deletions + insertions) / length.
Intervals: 95 %, by a bootstrap that resamples speakers where there are five or more.
"""

import gzip
import itertools
import json
import platform
import shlex
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import jiwer
import numpy as np
import soundfile as sf
import torch
import torchaudio
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from tqdm import tqdm

from asr_model import CodecASR
from codec import (SAMPLE_RATE, Codec, HelpPage, LogMel, mel_window, pick_device, read_audio,
                   write_atomically)
from tokenize_corpus import FrontEnd, Noise, Utterance
from train_asr import (TokenSet, build_model, check_same_tokens, frames_needed, greedy,
                       load_checkpoint, read_meta, seconds, split_language, transcript)


# ------------------------------------------------------------------------------------- recognising

class Recogniser:
    """A trained run, ready for use: arrays in, texts out."""

    def __init__(self, path: str | Path, args):
        saved = load_checkpoint(path)
        self.path, self.device = Path(path), torch.device(pick_device(args.device))
        self.flags, self.meta, self.log = saved["flags"], saved["meta"], saved["log"]
        self.units = SentencePieceProcessor(model_proto=saved["text"])
        self.model = build_model(self.flags, self.meta, len(self.units))
        self.model.load_state_dict(saved["model"])
        self.model.to(self.device).eval()
        self.beam_search = beam_search(self.units, args) if args.lm else None

    def front_end(self, codec: str | None) -> FrontEnd:
        """What made its tokens. Raises ValueError when the codec at hand is another one."""
        codec = codec or self.path.parent / self.meta["codec_path"]
        front_end = FrontEnd(self.meta["features"], codec, self.meta["hop"], str(self.device))
        check_same_tokens(self.path, self.meta, codec, front_end.meta)
        return front_end

    @torch.inference_mode()
    def log_probs(self, array: Tensor) -> Tensor:
        """A recording of any length, (T, Q) or (T, D) -> (1, T', V), in bounded memory.

        Recordings longer than 50 seconds are read in windows. Neighbours overlap by ten seconds,
        and each supplies the half of the overlap in which it has more context.
        """
        factor = self.flags["subsampling"]
        second = round(self.meta["sample_rate"] / self.meta["hop"] / factor)    # in output frames
        array = array[None, :, :self.flags["codebooks"] or None].to(self.device)
        parts = []
        for start in range(0, -(-array.shape[1] // factor), 50 * second):
            first = max(0, start - 5 * second)
            part = array[:, first * factor:(start + 55 * second) * factor]
            log_probs, _ = self.model(part, torch.tensor([part.shape[1]], device=self.device))
            parts.append(log_probs[:, start - first:start - first + 50 * second].cpu())
        return torch.cat(parts, 1)

    def token_source(self, args) -> tuple[str, list[str]]:
        """-> the folder of its tokens, the subsets to evaluate."""
        folder = args.tokens or self.flags["tokens"]
        found = read_meta(folder)
        check_same_tokens(self.path, self.meta, folder, found)
        if not (args.test or found["test"]):
            raise ValueError(f"{folder}: has no test subset; name another one with --test")
        return folder, args.test or found["test"]

    def recognise(self, array: Tensor) -> str:
        """A recording (T, Q) or (T, D) -> its text."""
        log_probs = self.log_probs(array)
        if self.beam_search:
            best = self.beam_search(log_probs)[0]
            return " ".join(best[0].words) if best else ""
        return greedy(self.units, log_probs, torch.tensor([log_probs.shape[1]]))[0]


def beam_search(units: SentencePieceProcessor, args):
    """torchaudio's beam search over the words of an ARPA language model, as it is or gzipped.

    Words are spelled in the recogniser's text units.
    """
    try:
        from torchaudio.models.decoder import ctc_decoder
    except (ImportError, RuntimeError):
        raise ValueError("--lm: the beam search needs pip install flashlight-text")
    pieces = [units.id_to_piece(i) for i in range(len(units))]
    opened = gzip.open if args.lm.endswith(".gz") else open
    with opened(args.lm, "rt", encoding="utf-8", errors="replace") as arpa:
        unigrams = itertools.takewhile(lambda line: not line.startswith("\\2-grams"), arpa)
        words = [line.split()[1] for line in unigrams if "\t" in line]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as lexicon:
        for word in words:
            if word[0] != "<" and 0 not in units.encode(word):
                print(word, *units.encode(word, out_type=str), file=lexicon)
        lexicon.flush()
        try:
            return ctc_decoder(
                lexicon=lexicon.name, tokens=pieces, lm=args.lm, beam_size=args.beam,
                lm_weight=args.lm_weight, word_score=args.word_score,
                blank_token=pieces[0], sil_token=pieces[0], unk_word="<unk>")
        except RuntimeError:
            raise ValueError(f"--lm {args.lm}: not a word language model in ARPA form")


def transcribe(args):
    """Print what is said in each file; with --plots, draw it too."""
    recogniser = Recogniser(args.asr, args)
    front_end, failed = recogniser.front_end(args.codec), 0
    for path in args.audio:
        try:
            wav = read_audio(path)
        except ValueError as error:
            print(f"skipped: {error}")
            failed += 1
            continue
        array = torch.from_numpy(front_end(wav))
        print(f"{path}: {recogniser.recognise(array)}")
        if args.plots:
            plot_utterance(recogniser, wav, array, Path(args.out) / f"{Path(path).stem}.png")
    if failed == len(args.audio):
        raise ValueError("none of the files could be read")


# ----------------------------------------------------------------------------------------- scoring

class Score:
    """Errors and reference lengths of each utterance, so that every rate comes from one count."""

    def __init__(self, rows: list[dict], hyps: list[str]):
        self.rows, self.hyps = rows, [split_language(hyp) for hyp in hyps]
        self.refs = [row["text"] for row in rows]
        texts = [text for _, text in self.hyps]
        self.words = errors(jiwer.process_words, self.refs, texts)
        self.chars = errors(jiwer.process_characters, self.refs, texts)
        speakers = [row["speaker"] for row in rows]
        # The bootstrap draws speakers; where these are few, or unknown, utterances.
        drawn = speakers if len(set(speakers)) >= 5 else range(len(rows))
        self.groups = np.unique(drawn, return_inverse=True)[1]

    def summary(self, seed: int) -> dict:
        by_speaker = {}     # speaker: word errors, words, character errors, characters
        for row, counts in zip(self.rows, np.hstack([self.words, self.chars])):
            by_speaker[row["speaker"]] = by_speaker.get(row["speaker"], 0) + counts
        result = {"utterances": len(self.rows),
                  "wer": rate(self.words), "wer_interval": interval(self.words, self.groups, seed),
                  "cer": rate(self.chars), "cer_interval": interval(self.chars, self.groups, seed),
                  "by_speaker": {name: total.tolist() for name, total in by_speaker.items()}}
        languages = np.array([row["lang"] for row in self.rows])
        named = np.array([lang for lang, _ in self.hyps])
        if len(set(languages)) > 1:
            result["cer_by_language"] = {lang: rate(self.chars[languages == lang])
                                         for lang in sorted(set(languages))}
        if named.any():
            result["languages_named_right"] = float(np.mean(named == languages))
        return result


def errors(process, refs: list[str], hyps: list[str]) -> np.ndarray:
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


def interval(counts: np.ndarray, groups: np.ndarray, seed: int) -> list[float]:
    """95 % interval of the error rate."""
    return np.percentile(resampled(counts, groups, seed), [2.5, 97.5]).tolist()


def difference(score: Score, other: Score, seed: int) -> list[float]:
    """95 % interval of CER(score) - CER(other) on the same utterances, resampled together."""
    ours = resampled(score.chars, score.groups, seed)
    theirs = resampled(other.chars, score.groups, seed)
    return np.percentile(ours - theirs, [2.5, 97.5]).tolist()


# ----------------------------------------------------------------------------------------- reports

def percent(summary: dict, name: str) -> str:
    low, high = summary[f"{name}_interval"]
    return f"{100 * summary[name]:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; cells beyond the header are dropped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line[:len(header)]))} |\n" for line in lines)


def save_report(args, name: str, report: dict, page: str) -> Path:
    """Print the page; write it to name.md, and the numbers with their origin to name.json."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    git = subprocess.run("git rev-parse --short HEAD", shell=True, cwd=Path(__file__).parent,
                         capture_output=True, text=True)
    origin = {"command": shlex.join(["python", *sys.argv]), "seed": args.seed,
              "commit": git.stdout.strip(),
              "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, "
                         f"{torch.get_num_threads()} threads"}
    write_atomically(out / f"{name}.md", page.encode())
    write_atomically(out / f"{name}.json", json.dumps(origin | report, indent=1).encode())
    print(f"{page}\nwrote {out / name}.md and .json")
    return out


def evaluate(args):
    """Evaluate one run, or compare several, on the test subsets: clean, and in noise."""
    report, rows, first, subsets, page = {}, [], {}, [], ""
    for name, path in runs(args).items():
        run = Recogniser(path, args)
        folder, tested = run.token_source(args)
        subsets = subsets or tested                     # those of the first run
        bitrate = run.meta["bitrate"] * run.model.num_codebooks / max(1, run.meta["codebooks"])
        report[name] = {"flags": run.flags, "meta": run.meta, "bitrate": bitrate, "log": run.log,
                        "test": {}}
        for subset in subsets:
            data = TokenSet(folder, [subset])
            for kind, snr, arrays in conditions(run, data, args):
                test = f"{subset}, {kind} {snr:g} dB" if kind else subset
                progress = tqdm(arrays, test, leave=False, disable=None)
                score = Score(data.rows, [run.recognise(array) for array in progress])
                base = first.setdefault(test, score)
                if score.refs != base.refs:
                    raise ValueError(f"{name}: its {subset} holds other utterances than that of "
                                     f"{args.compare[0]}")
                low, high = difference(score, base, args.seed)
                summary = score.summary(args.seed) | {
                    "subset": subset, "noise": kind, "snr": snr, "cer_minus_first": [low, high]}
                report[name]["test"][test] = summary
                rows.append([name, test, summary["utterances"], percent(summary, "wer"),
                             percent(summary, "cer"), f"{100 * low:+.1f} to {100 * high:+.1f}"])
                if not kind and not args.compare:
                    page += f"\n{subset}\n{remarks(score, summary)}"
    header = ["run", "test", "utterances", "WER % (95 %)", "CER % (95 %)"]
    if args.compare:
        header.append("CER minus the first run's (95 %)")
    page += "\n" + table(header, rows)
    out = save_report(args, "compare" if args.compare else "report", {"runs": report}, page)
    if args.plots:
        wav = read_audio(data.rows[0]["audio"])
        plot_utterance(run, wav, data.arrays[0], out / "utterance.png")
        plot_report(report, out)


def runs(args) -> dict[str, str | Path]:
    """Names and checkpoints of the runs to look at."""
    return {folder: Path(folder) / "asr.pt" for folder in args.compare} or {args.asr: args.asr}


def conditions(run: Recogniser, data: TokenSet, args) -> Iterator[tuple]:
    """-> kind of noise, signal-to-noise ratio, arrays of the utterances: first without noise."""
    yield None, None, data.arrays
    items = [Utterance(**{name: row[name] for name in Utterance._fields}) for row in data.rows]
    front_end = run.front_end(args.codec) if args.noise else None
    for kind, snr in itertools.product(args.noise, args.snr):
        noise = Noise([kind], [snr, snr], items, args.seed)
        yield kind, snr, [torch.from_numpy(front_end(noise(read_audio(item.audio), item)))
                          for item in tqdm(items, f"{kind} {snr:g} dB", disable=None)]


def remarks(score: Score, summary: dict) -> str:
    """Languages, and five examples."""
    page = ""
    if "cer_by_language" in summary:
        cers = summary["cer_by_language"]
        page = f"CER by language, mean {np.mean([*cers.values()]):.1%}: "
        page += ", ".join(f"{lang} {cer:.1%}" for lang, cer in cers.items()) + "\n"
    if "languages_named_right" in summary:
        page += f"languages named right: {summary['languages_named_right']:.1%}\n"
    for i in range(0, len(score.refs), -(-len(score.refs) // 5)):
        page += f"\n    ref  {score.refs[i]}\n    hyp  {score.hyps[i][1]}\n"
    return page


# --------------------------------------------------------------------------- what the tokens carry

def entropy(*labels: np.ndarray) -> float:
    """Bits of one kind of label, or of several together: integers (N,) each."""
    counts = np.unique(np.stack(labels), axis=1, return_counts=True)[1]
    return float(torch.special.entr(torch.from_numpy(counts / counts.sum())).sum() / np.log(2))


def content(args):
    """What each codebook of each run reveals about the text unit being said, and the speaker.

    Mutual information is H(code) + H(label) - H(code, label). Of so many codes, some look
    informative by chance; we subtract what the labels of other utterances give. What remains,
    H(code, label of another) - H(code, label), is a lower bound. A CTC model may write a unit later
    than it was said: of delays of 0 to 4 frames, the one that reveals most counts.
    """
    rows, shares, page = [], {}, ""
    for run, path in runs(args).items():
        tokens, labels, total = labelled_frames(Recogniser(path, args), args)
        page += f"\n{run}: {len(tokens)} of {total} utterances could be aligned."
        order = np.random.default_rng(args.seed).permutation(len(tokens))
        for name, found in labels.items():
            right, wrong = np.concatenate(found), np.concatenate([found[i] for i in order])
            bars = shares[f"{run}, {name}"] = {}
            for level, codes in enumerate(np.concatenate(tokens).T, 1):
                bits = max(entropy(codes, np.roll(wrong, -delay))
                           - entropy(codes, np.roll(right, -delay)) for delay in range(5))
                bars[str(level)] = bits / (entropy(right) or 1)     # a single speaker has none
                rows.append([run, name, level, f"{bits:.2f}", f"{bars[str(level)]:.0%}"])
    header = ["run", "label", "codebook", "bits", "share of the label's entropy"]
    page = table(header, rows) + page + "\nLower bounds: what chance gives is subtracted.\n"
    out = save_report(args, "content", {"shares": shares}, page)
    if args.plots:
        plot_bars(shares, out / "content.png")


def labelled_frames(run: Recogniser, args) -> tuple[list[np.ndarray], dict, int]:
    """-> tokens of each utterance (T, Q), {kind of label: those of each utterance (T,)}, the
    number of utterances before some were left out because they could not be aligned.

    The recogniser itself says where its text units are; each frame belongs to the nearest one.
    """
    if not run.meta["codebooks"] or run.flags["subsampling"] > 1:
        raise ValueError(f"{run.path}: --content needs a run on tokens, without subsampling")
    data = TokenSet(*run.token_source(args))
    speakers = sorted({row["speaker"] for row in data.rows})
    tokens, labels = [], {"character": [], "speaker": []}
    for row, array in zip(data.rows, data.arrays):
        target = torch.tensor(run.units.encode(transcript(row, run.flags["lang_token"])))
        target = target[target != 0]
        if 0 < frames_needed(target) <= len(array):
            tokens.append(array.numpy().astype(int))
            labels["character"].append(align(run.log_probs(array), target))
            labels["speaker"].append(np.full(len(array), speakers.index(row["speaker"])))
    return tokens, labels, len(data.rows)


def align(log_probs: Tensor, target: Tensor) -> np.ndarray:
    """Forced alignment of one utterance, (1, T, V) -> the nearest text unit of each frame, (T,)."""
    path, _ = torchaudio.functional.forced_align(log_probs, target[None], blank=0)
    path = path[0].numpy()
    said = np.flatnonzero(path)
    middles = (said[1:] + said[:-1]) / 2
    return path[said[np.searchsorted(middles, np.arange(len(path)))]]


# ------------------------------------------------------------------------------------------- speed

def benchmark(args):
    """Throughput on this machine, in seconds of audio a second: encoding, and training on tokens
    from disk beside log-mel computed on the fly (the paper's claim of cheap training)."""
    device, report = pick_device(args.device), {}
    wav = 0.05 * torch.randn(1, 60 * SAMPLE_RATE, device=device)
    for encoder, quantizer in itertools.product(("mel", "time"), ("fsq", "rvq")):
        codec = Codec(encoder, quantizer).to(device).eval()
        report[f"encoding, {encoder} {quantizer}"] = 60 / seconds(lambda: codec.encode(wav))
    with tempfile.TemporaryDirectory() as folder:
        flac, array = f"{folder}/minute.flac", f"{folder}/minute.npy"
        sf.write(flac, wav[0].cpu().numpy(), SAMPLE_RATE)
        np.save(array, np.random.randint(1000, size=(6, 400, 8)))
        for name, codebooks, hop, subsampling in (
                ("tokens from disk, 40 frames a second", 8, 400, 1),
                ("log-mel from audio, 40 frames a second", 0, 400, 1),
                ("log-mel from audio, 100 frames a second", 0, 160, 1),
                ("log-mel from audio, 100 frames a second, subsampled to 25", 0, 160, 4)):
            mel = LogMel(mel_window(hop), hop, 80)
            model = CodecASR(32, codebooks, 1000, 80, "sum", "tiny", subsampling).to(device)

            def step():
                """Forward and backward pass on six pieces of ten seconds."""
                batch = (torch.from_numpy(np.load(array)) if codebooks
                         else mel(read_audio(flac).view(6, -1)).mT).to(device)
                log_probs, _ = model(batch, torch.full((6,), batch.shape[1], device=device))
                log_probs.square().mean().backward()
            report[f"training, {name}"] = 60 / seconds(step)
    rows = [[what, f"{speed:.0f}"] for what, speed in report.items()]
    save_report(args, "benchmark", {"speech a second": report}, table(["what", "s / s"], rows))


# ---------------------------------------------------------------------------------------- pictures

def figure(rows: int, height: float):
    """-> matplotlib figure, list of axes; matplotlib is optional."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plots needs pip install matplotlib")
    fig = Figure(figsize=(9, rows * height), dpi=80, layout="constrained")
    return fig, fig.subplots(rows, 1, squeeze=False)[:, 0]


def plot_utterance(recogniser: Recogniser, wav: Tensor, array: Tensor, path: Path):
    """Waveform, log-mel, and tokens with the text units read from them, under one time axis."""
    fig, axes = figure(3, 2)
    end = len(wav) / SAMPLE_RATE
    axes[0].plot(np.linspace(0, end, len(wav)), wav, linewidth=0.4)
    mel = LogMel(512, 160, 80)(wav[None])[0]
    axes[1].imshow(mel, origin="lower", aspect="auto", extent=(0, end, 0, 80))
    axes[2].imshow(array.T.float(), aspect="auto", interpolation="nearest",
                   cmap="nipy_spectral", extent=(0, end, array.shape[1], 0))
    best = recogniser.log_probs(array)[0].argmax(1)                         # (T',)
    for t in range(1, len(best)):
        if best[t] and best[t] != best[t - 1]:
            piece = recogniser.units.id_to_piece(int(best[t]))
            axes[2].text((t + 0.5) / len(best), 1.03, piece, ha="center",
                         transform=axes[2].transAxes)
    for axis, label in zip(axes, ("waveform", "mel band", "codebook")):
        axis.set(ylabel=label, xlim=(0, end))
    axes[2].set_xlabel("seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)


def plot_report(report: dict, out: Path):
    """CER by epoch, by bits a second, by noise and by language, as far as the report has them."""
    epochs, bits, noise, languages = {}, {}, {}, {}
    for name, run in report.items():
        epochs[name] = {row["epoch"]: 100 * row["dev_cer"] for row in run["log"]}
        for summary in run["test"].values():
            cer, label = 100 * summary["cer"], f"{name}, {summary['subset']}"
            if summary["noise"]:
                noise.setdefault(f"{label}, {summary['noise']}", {})[summary["snr"]] = cer
                continue
            if run["bitrate"]:
                bits[label] = {run["bitrate"] / 1000: cer}
            if "cer_by_language" in summary:
                languages[label] = summary["cer_by_language"]
    plot_curves(out / "epochs.png", epochs, "epoch", "dev CER %")
    if bits:
        plot_curves(out / "bits.png", bits, "kbit/s", "CER %")
    if noise:
        plot_curves(out / "noise.png", noise, "signal-to-noise ratio, dB", "CER %")
    if languages:
        plot_bars(languages, out / "languages.png")


def plot_curves(path: Path, curves: dict[str, dict[float, float]], xlabel: str, ylabel: str):
    """{label: {x: y}}."""
    fig, (axis,) = figure(1, 3.2)
    for label, points in curves.items():
        axis.plot(points.keys(), points.values(), marker="o", label=label)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend()
    fig.savefig(path)


def plot_bars(values: dict[str, dict[str, float]], path: Path):
    """Bars side by side, {label: {name: share}}: a name is a language, or a codebook."""
    fig, (axis,) = figure(1, 3.2)
    width = 0.8 / len(values)
    names = [*dict.fromkeys(itertools.chain(*values.values()))]
    for number, (label, shares) in enumerate(values.items()):
        at = np.arange(len(names)) + width * number
        axis.bar(at, [100 * shares.get(name, 0) for name in names], width, label=label)
    axis.set_xticks(range(len(names)), names, fontsize=7, rotation=90)
    axis.set_ylabel("%")
    fig.legend(loc="outside upper right")  # above the axes, so that it hides no bar
    fig.savefig(path)


# -------------------------------------------------------------------------------------------- main

def parse(arguments=None):
    parser = ArgumentParser(description=__doc__, formatter_class=HelpPage)
    add = parser.add_argument
    add("--asr", default="runs/asr/asr.pt", help="trained recogniser")
    add("--tokens", help="folder of tokens; the one it was trained on unless given")
    add("--codec", help="codec for --audio and --noise; the one of its tokens unless given")
    add("--test", nargs="+", default=[], help="subsets to evaluate, if not those of the tokens")
    add("--noise", nargs="+", default=[],
        help="also evaluate in noise: white, pink, babble, or folders of audio")
    add("--snr", nargs="+", type=float, default=[20.0, 10.0, 0.0],
        help="signal-to-noise ratios in dB, with --noise")
    add("--audio", nargs="+", default=[], help="transcribe these files, then stop")
    add("--lm", help="word language model in ARPA form, .gz or not: beam search; greedy without")
    add("--beam", type=int, default=200, help="hypotheses kept, with --lm")
    add("--lm-weight", type=float, default=2.0, help="of the language model, with --lm")
    add("--word-score", type=float, default=0.0, help="added for every word, with --lm")
    add("--compare", nargs="+", default=[], metavar="RUN_DIR",
        help="folders with an asr.pt each: one table of all, against the first")
    add("--content", action="store_true",
        help="measure what each codebook reveals about text unit and speaker, also with --compare")
    add("--benchmark", action="store_true", help="measure speed instead of accuracy")
    add("--plots", action="store_true", help="also draw pictures (needs matplotlib)")
    add("--seed", type=int, default=0, help="random seed for noise and bootstrap")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to run")
    add("--out", default="runs/eval", help="folder to write")
    args = parser.parse_args(arguments)
    scores = args.noise or args.compare and not args.content
    if sum(map(bool, (args.audio, args.benchmark, args.content, scores))) > 1:
        parser.error("one at a time: --audio, --benchmark, --content (also with --compare), "
                     "--compare or --noise")
    return args


def main(arguments=None):
    args = parse(arguments)
    try:
        if args.plots:
            figure(1, 1)        # reports a missing matplotlib before the work starts
        if args.audio:
            transcribe(args)
        elif args.content:
            content(args)
        elif args.benchmark:
            benchmark(args)
        else:
            evaluate(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
