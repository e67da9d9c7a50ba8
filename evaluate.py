"""Stage 4: judge, compare, show and use a trained recogniser.

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
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import jiwer
import numpy as np
import soundfile as sf
import torch
import torchaudio
from torch import Tensor
from tqdm import tqdm

from asr_model import CodecASR
from codec import (SAMPLE_RATE, Codec, HelpPage, LogMel, pick_device, read_audio,
                   update, write_atomically)
from tokenize_corpus import FrontEnd, Noise, Utterance
from train_asr import (Text, TokenSet, build_model, check_same_tokens, load_checkpoint, read_meta,
                       split_language, transcript)


# ------------------------------------------------------------------------------------- recognising

class Recogniser:
    """A trained run, ready for use: arrays in, texts out."""

    def __init__(self, path: str | Path, args: Namespace):
        saved = load_checkpoint(path)
        self.path, self.device = Path(path), torch.device(pick_device(args.device))
        self.flags, self.meta = saved["flags"], saved["meta"]
        self.text = Text(saved["text"])
        self.model = build_model(self.flags, self.meta, len(self.text))
        self.model.load_state_dict(saved["model"])
        self.model.to(self.device).eval()
        self.search = beam_search(self.text, args) if args.lm else self.text.greedy

    def front_end(self, codec: str | None) -> FrontEnd:
        """What made its tokens. Raises ValueError when the codec at hand is another one."""
        named = self.meta["codec_path"]             # relative to this checkpoint
        codec = codec or (named if named == "encodec" else str(self.path.parent / named))
        front_end = FrontEnd(self.meta["features"], codec, self.meta["hop"], str(self.device))
        check_same_tokens(self.path, self.meta, codec, front_end.meta)
        return front_end

    @torch.inference_mode()
    def log_probs(self, array: Tensor) -> Tensor:
        """A recording of any length, (T, Q) or (T, D) -> (1, T', V), in bounded memory.

        What is longer than a minute goes through in windows. They overlap by ten seconds, of which
        each gives half, so that no word at a seam is lost or repeated.
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

    def recognise(self, array: Tensor) -> str:
        """A recording (T, Q) or (T, D) -> its text."""
        log_probs = self.log_probs(array)
        return self.search(log_probs, torch.tensor([log_probs.shape[1]]))[0]

    def score(self, rows: list[dict], arrays: list[Tensor]) -> "Score":
        progress = tqdm(arrays, "recognising", leave=False, disable=None)
        return Score(rows, [self.recognise(array) for array in progress])


def beam_search(text: Text, args: Namespace):
    """Word-level beam search with the words of an ARPA language model, as it is or gzipped.

    -> a function with the interface of Text.greedy. Words are spelled in the model's text units.
    """
    try:
        from torchaudio.models.decoder import ctc_decoder
    except (ImportError, RuntimeError):
        raise ValueError("--lm: the beam search needs pip install flashlight-text")
    pieces = [text.units.id_to_piece(i) for i in range(len(text))]
    opened = gzip.open if args.lm.endswith(".gz") else open
    with opened(args.lm, "rt", encoding="utf-8", errors="replace") as arpa:
        unigrams = itertools.takewhile(lambda line: not line.startswith("\\2-grams"), arpa)
        words = [line.split()[1] for line in unigrams if "\t" in line]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as lexicon:
        for word in words:
            if word[0] != "<" and 0 not in text.encode(word):
                print(word, *text.units.encode(word, out_type=str), file=lexicon)
        lexicon.flush()
        try:
            decoder = ctc_decoder(
                lexicon=lexicon.name, tokens=pieces, lm=args.lm, beam_size=args.beam,
                lm_weight=args.lm_weight, word_score=args.word_score,
                blank_token=pieces[0], sil_token=pieces[0], unk_word="<unk>")
        except RuntimeError:
            raise ValueError(f"--lm {args.lm}: not a word language model in ARPA form")

    def search(log_probs: Tensor, out_len: Tensor) -> list[str]:
        found = decoder(log_probs.float().cpu().contiguous(), out_len.cpu())
        return [" ".join(best[0].words) if best else "" for best in found]
    return search


def transcribe(args: Namespace) -> None:
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
        units = speakers if len(set(speakers)) >= 5 else range(len(rows))
        self.groups = np.unique(list(units), return_inverse=True)[1]

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
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def save_report(args: Namespace, name: str, report: dict, page: str) -> Path:
    """Print the page; write it to name.md, and the numbers with their origin to name.json."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    git = ["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"]
    origin = {"command": shlex.join(["python", *sys.argv]), "seed": args.seed,
              "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
              "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, "
                         f"{torch.get_num_threads()} threads"}
    write_atomically(out / f"{name}.md", page.encode())
    write_atomically(out / f"{name}.json", json.dumps(origin | report, indent=1).encode())
    print(f"{page}\nwrote {out / name}.md and .json")
    return out


def evaluate(args: Namespace) -> None:
    """Judge the test subsets, clean and in noise."""
    recogniser = Recogniser(args.asr, args)
    tokens = args.tokens or recogniser.flags["tokens"]
    found = read_meta(tokens)
    check_same_tokens(args.asr, recogniser.meta, tokens, found)
    front_end = recogniser.front_end(args.codec) if args.noise else None
    report, page = {}, ""
    for subset in args.test or found["test"]:
        data = TokenSet(tokens, [subset])
        score = recogniser.score(data.rows, data.arrays)
        report[subset] = score.summary(args.seed)
        page += f"\n{subset}\n" + remarks(score, report[subset])
        for kind in args.noise:
            for snr in args.snr or [20.0, 10.0, 0.0]:
                arrays = degrade(front_end, data, kind, snr, args.seed)
                summary = recogniser.score(data.rows, arrays).summary(args.seed)
                report[f"{subset}, {kind} {snr:g} dB"] = summary | {"noise": kind, "snr": snr}
    rows = [[name, summary["utterances"], percent(summary, "wer"), percent(summary, "cer")]
            for name, summary in report.items()]
    page += "\n" + table(["test", "utterances", "WER % (95 %)", "CER % (95 %)"], rows)
    out = save_report(args, "report", {"asr": args.asr, "test": report}, page)
    if args.plots:
        plot_utterance(recogniser, read_audio(data.rows[0]["audio"]), data.arrays[0],
                       out / "utterance.png")
        if args.noise:
            plot_noise(report, out / "noise.png")
        if "cer_by_language" in report[subset]:
            plot_bars({"CER": report[subset]["cer_by_language"]}, out / "languages.png")


def remarks(score: Score, summary: dict) -> str:
    """Languages, and five examples."""
    page = ""
    if "cer_by_language" in summary:
        cers = summary["cer_by_language"]
        cers = cers | {"mean": np.mean([*cers.values()])}
        rows = [[lang, f"{100 * cer:.1f}"] for lang, cer in cers.items()]
        page = table(["language", "CER %"], rows)
    if "languages_named_right" in summary:
        page += f"languages named right: {summary['languages_named_right']:.1%}\n"
    for i in range(0, len(score.refs), -(-len(score.refs) // 5)):
        page += f"\n    ref  {score.refs[i]}\n    hyp  {score.hyps[i][1]}\n"
    return page


def degrade(front_end: FrontEnd, data: TokenSet, kind: str, snr: float, seed: int) -> list[Tensor]:
    """Arrays of the same utterances, noise added to their audio."""
    items = [Utterance(**{name: row[name] for name in Utterance._fields}) for row in data.rows]
    noise = Noise([kind], [snr, snr], items, seed)
    return [torch.from_numpy(front_end(noise(read_audio(item.audio), item)))
            for item in tqdm(items, f"{kind} {snr:g} dB", leave=False, disable=None)]


def compare(args: Namespace) -> None:
    """One table of several runs: what differs, WER and CER, and the difference to the first."""
    runs = {folder: Recogniser(Path(folder) / "asr.pt", args) for folder in args.compare}
    subsets = args.test or runs[args.compare[0]].meta["test"]
    rows, report, first = [], {}, {}
    for folder, run in runs.items():
        tokens, meta = run.flags["tokens"], run.meta
        check_same_tokens(run.path, meta, tokens, read_meta(tokens))
        used = (run.flags["codebooks"] or meta["codebooks"]) / max(1, meta["codebooks"])
        log = (Path(folder) / "log.jsonl").read_text().splitlines()
        bitrate = used * (meta["bitrate"] or 0)
        report[folder] = {"flags": run.flags, "meta": meta, "bitrate": bitrate,
                          "log": [json.loads(line) for line in log], "test": {}}
        for subset in subsets:
            data = TokenSet(tokens, [subset])
            score = run.score(data.rows, data.arrays)
            base = first.setdefault(subset, score)
            if score.refs != base.refs:
                raise ValueError(f"{folder}: its {subset} holds other utterances than that of "
                                 f"{args.compare[0]}")
            low, high = difference(score, base, args.seed)
            summary = score.summary(args.seed) | {"cer_minus_first": [low, high]}
            report[folder]["test"][subset] = summary
            rows.append([folder, subset, percent(summary, "wer"), percent(summary, "cer"),
                         f"{100 * low:+.1f} to {100 * high:+.1f}"])
    header = ["run", "test", "WER % (95 %)", "CER % (95 %)", "CER minus the first run's (95 %)"]
    out = save_report(args, "compare", {"runs": report}, table(header, rows))
    if args.plots:
        plot_comparison(report, out / "compare.png")


# --------------------------------------------------------------------------- what the tokens carry

def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Bits that knowing label a tells about label b: labels 0, 1, 2, ..., (N,) each."""
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1 / len(a))
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / apart[seen])).sum())


def content(args: Namespace) -> None:
    """What each codebook tells about the character being said, and about the speaker.

    The recogniser itself says where its characters are, by forced alignment; each frame belongs to
    the nearest one. So many codes look informative by chance: what the labels of other utterances
    give is subtracted, which makes the result a lower bound.
    """
    recogniser = Recogniser(args.asr, args)
    meta, flags = recogniser.meta, recogniser.flags
    if not meta["codebooks"] or flags["subsampling"] > 1:
        raise ValueError(f"{args.asr}: --content needs a run on tokens, without subsampling")
    data = TokenSet(args.tokens or flags["tokens"], args.test or meta["test"])
    names = sorted({row["speaker"] for row in data.rows})
    labels = {"character": [], "speaker": []}               # of each utterance: (T,)
    for row, array in zip(data.rows, data.arrays):
        target = recogniser.text.encode(transcript(row, flags["lang_token"]))
        labels["character"].append(align(recogniser.log_probs(array), [i for i in target if i]))
        labels["speaker"].append(np.full(len(array), names.index(row["speaker"])))
    order = np.random.default_rng(args.seed).permutation(len(data.rows))
    rows, shares = [], {"character": {}, "speaker": {}}
    for level, codes in enumerate(torch.cat(data.arrays).T.numpy().astype(int)):
        rows.append([level])
        for name, found in labels.items():
            right, wrong = np.concatenate(found), np.concatenate([found[i] for i in order])
            bits = mutual_information(codes, right) - mutual_information(codes, wrong)
            shares[name][str(level)] = bits / mutual_information(right, right)
            rows[-1] += [f"{bits:.2f}", f"{shares[name][str(level)]:.0%}"]
    header = ["codebook", "character, bits", "share", "speaker, bits", "share"]
    page = table(header, rows) + "\nLower bounds: what chance gives is subtracted.\n"
    out = save_report(args, "content", {"asr": args.asr, "shares": shares, "rows": rows}, page)
    if args.plots:
        plot_bars(shares, out / "content.png")


def align(log_probs: Tensor, target: list[int]) -> np.ndarray:
    """Forced alignment of one utterance, (1, T, V) -> the nearest text unit of each frame, (T,)."""
    path, _ = torchaudio.functional.forced_align(log_probs, torch.tensor([target]), blank=0)
    units = path[0].numpy()
    said = np.flatnonzero(units)
    middles = (said[1:] + said[:-1]) / 2
    return units[said[np.searchsorted(middles, np.arange(len(units)))]]


# ------------------------------------------------------------------------------------------- speed

def benchmark(args: Namespace) -> None:
    """Throughput on this machine, in seconds of audio a second: encoding, and training on tokens
    from disk beside log-mel computed on the fly (the paper's claim of cheap training)."""
    device, report = pick_device(args.device), {}
    minute = 0.05 * torch.randn(1, 60 * SAMPLE_RATE)
    for encoder, quantizer in itertools.product(("mel", "time"), ("fsq", "rvq")):
        codec, wav = Codec(encoder, quantizer).to(device).eval(), minute.to(device)
        report[f"encoding, {encoder} {quantizer}"] = 60 / seconds(lambda: codec.encode(wav))
    with tempfile.TemporaryDirectory() as folder:
        flac, array = Path(folder) / "minute.flac", Path(folder) / "minute.npy"
        sf.write(flac, minute[0].numpy(), SAMPLE_RATE)
        np.save(array, np.random.randint(1000, size=(2400, 8)))
        mel = LogMel(512, 160, 80)
        # A batch is six pieces of ten seconds.
        inputs = {"tokens from disk": lambda: torch.from_numpy(np.load(array)).view(6, 400, 8),
                  "log-mel, 10 ms, from audio": lambda: mel(read_audio(flac).view(6, -1)).mT}
        for (name, read), codebooks in zip(inputs.items(), (8, 0)):
            model = CodecASR(32, codebooks, 1000, 80, size="tiny").to(device)
            optimiser = torch.optim.AdamW(model.parameters())

            def step() -> None:
                batch = read().to(device)
                log_probs, _ = model(batch, torch.full((6,), batch.shape[1], device=device))
                update(log_probs.square().mean(), optimiser, 1e-3)
            report[f"training, {name}"] = 60 / seconds(step)
    rows = [[what, f"{speed:.0f}"] for what, speed in report.items()]
    save_report(args, "benchmark", {"speech a second": report}, table(["what", "s / s"], rows))


def seconds(function) -> float:
    """Median time of five calls, after one that does not count."""
    times = []
    for _ in range(6):
        began = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))


# ---------------------------------------------------------------------------------------- pictures

def figure(rows: int, height: float):
    """-> matplotlib figure and axes; matplotlib is optional."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plots needs pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot.subplots(rows, 1, figsize=(9, rows * height), layout="constrained", dpi=80)


def plot_utterance(recogniser: Recogniser, wav: Tensor, array: Tensor, path: Path) -> None:
    """Waveform, log-mel, tokens, and the probabilities of the text units, under one time axis."""
    fig, axes = figure(4, 1.9)
    end = len(wav) / SAMPLE_RATE
    mel = LogMel(512, 160, 80)(wav[None])[0]
    axes[0].plot(np.arange(len(wav)) / SAMPLE_RATE, wav, linewidth=0.4)
    axes[1].imshow(mel, origin="lower", aspect="auto", extent=(0, end, 0, 80))
    axes[2].imshow(array.T.float(), aspect="auto", interpolation="nearest",
                   cmap="nipy_spectral", extent=(0, end, array.shape[1], 0))
    probabilities = recogniser.log_probs(array)[0].exp()                    # (T', V)
    best = probabilities.argmax(1)
    at = (np.arange(len(best)) + 0.5) * end / len(best)
    axes[3].plot(at, probabilities[:, 1:], linewidth=0.8)
    for t in torch.flatten(best.diff(prepend=best[:1]).nonzero()).tolist():
        if best[t]:
            piece = recogniser.text.units.id_to_piece(int(best[t])).replace("\u2581", "_")
            axes[3].text(at[t], 1.03, piece, fontsize=7, ha="center")
    for axis, label in zip(axes, ("waveform", "mel band", "codebook", "probability")):
        axis.set(ylabel=label, xlim=(0, end))
    axes[3].set(xlabel="seconds", ylim=(0, 1.15))
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)


def plot_comparison(report: dict, path: Path) -> None:
    """Learning curves of several runs, and their CER over bits a second."""
    fig, (left, right) = figure(2, 3.2)
    for folder, run in report.items():
        left.plot([100 * row["dev_cer"] for row in run["log"]], label=folder)
        summary = next(iter(run["test"].values()))
        if run["bitrate"]:
            bounds = 100 * np.abs(np.array(summary["cer_interval"]) - summary["cer"])
            right.errorbar(run["bitrate"] / 1000, 100 * summary["cer"], bounds[:, None],
                           marker="o", capsize=3)
    left.set(xlabel="epoch", ylabel="dev CER %", ylim=(0, 100))
    right.set(xlabel="kbit/s", ylabel="test CER %")
    left.legend()
    fig.savefig(path)


def plot_noise(report: dict, path: Path) -> None:
    """CER over signal-to-noise ratio, for each subset and kind of noise."""
    fig, axis = figure(1, 3.2)
    noisy = {name: summary for name, summary in report.items() if "noise" in summary}
    for curve in dict.fromkeys(name.rsplit(" ", 2)[0] for name in noisy):
        points = [(summary["snr"], 100 * summary["cer"]) for name, summary in noisy.items()
                  if name.rsplit(" ", 2)[0] == curve]
        axis.plot(*zip(*points), marker="o", label=curve)
    axis.set(xlabel="signal-to-noise ratio, dB", ylabel="CER %", ylim=(0, 105))
    axis.legend()
    fig.savefig(path)


def plot_bars(values: dict[str, dict[str, float]], path: Path) -> None:
    """Bars side by side, {label: {name: share}}: a name is a language, or a codebook."""
    fig, axis = figure(1, 3.2)
    for number, (label, shares) in enumerate(values.items()):
        at = np.arange(len(shares)) + 0.4 * number
        axis.bar(at, [100 * share for share in shares.values()], 0.4, label=label)
    axis.set_xticks(np.arange(len(shares)), shares.keys(), fontsize=7)
    axis.set(ylabel="%")
    axis.legend()
    fig.savefig(path)


# -------------------------------------------------------------------------------------------- main

def parse(arguments: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpPage)
    add = parser.add_argument
    add("--asr", default="runs/asr/asr.pt", help="trained recogniser")
    add("--tokens", help="folder of tokens; the one it was trained on unless given")
    add("--codec", help="codec for --audio and --noise; the one of its tokens unless given")
    add("--test", nargs="+", default=[], help="subsets to judge on; those of the tokens otherwise")
    add("--noise", nargs="+", default=[],
        help="also judge in noise: white, pink, babble, or folders of audio")
    add("--snr", nargs="+", type=float, help="of the noise, in dB; 20 10 0 unless given")
    add("--audio", nargs="+", default=[], help="transcribe these files, then stop")
    add("--lm", help="word language model in ARPA form, .gz or not: beam search; greedy without")
    add("--beam", type=int, default=50, help="hypotheses kept, with --lm")
    add("--lm-weight", type=float, default=1.0, help="of the language model, with --lm")
    add("--word-score", type=float, default=0.0, help="added for every word, with --lm")
    add("--compare", nargs="+", default=[], metavar="RUN_DIR",
        help="folders with an asr.pt each: one table of all, against the first")
    add("--content", action="store_true", help="what each codebook tells of character and speaker")
    add("--benchmark", action="store_true", help="measure speed instead of accuracy")
    add("--plots", action="store_true", help="also draw pictures (needs matplotlib)")
    add("--seed", type=int, default=0, help="of noise and bootstrap")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to run")
    add("--out", default="runs/eval", help="folder to write")
    args = parser.parse_args(arguments)
    if args.snr and not args.noise:
        parser.error("--snr is for --noise")
    if args.lm and not Path(args.lm).is_file():
        parser.error(f"--lm {args.lm}: no such file")
    if sum(map(bool, (args.audio, args.compare, args.content, args.benchmark, args.noise))) > 1:
        parser.error("--audio, --compare, --content, --benchmark and --noise: one at a time")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        if args.plots:
            figure(1, 1)        # a missing matplotlib should be known before the work
        if args.audio:
            transcribe(args)
        elif args.compare:
            compare(args)
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
