"""Stage 4: judge, compare, show and use a trained recogniser.

in   runs/asr/asr.pt, and the tokens that it was trained on
out  runs/eval/report.json, report.md       word and character error rates with intervals, and examples
     (compare, content, benchmark: likewise; pictures with --plots)

    python evaluate.py                                                  # the test subsets of the trained run
    python evaluate.py --audio talk.mp3                                 # transcribe
    python evaluate.py --noise white babble --snr 20 10 5 0             # audio is degraded, re-encoded, recognised
    python evaluate.py --compare runs/asr runs/asr-mel                  # one table; is the difference significant?

WER, CER: word and character error rate, (substitutions + deletions + insertions) / reference length.
"""

import json
import math
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jiwer
import numpy as np
import soundfile as sf
import torch
import torchaudio
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import asr_model
from asr_model import CodecASR
from codec import (SAMPLE_RATE, SIZES as CODEC_SIZES, Codec, CodecSettings, InputError, LogMel, MelDistance, option, parse,
                   pick_device, read_audio, run, train_step as codec_step, write_atomically)
from quantizers import GroupFSQ, ResidualVQ
from tokenize_corpus import FrontEnd, Noise
import train_asr
from train_asr import Text, TokenSet, build_model, check_same_tokens, fitting, load_checkpoint, split_language


@dataclass
class EvalSettings:
    asr: str = option("runs/asr/asr.pt", "trained recogniser")
    tokens: str = option("", "folder of tokens; empty: the one it was trained on")
    codec: str = option("", "codec for --audio and --noise; empty: the one that made the tokens")
    test: tuple = option((), "subsets to judge on; empty: the test subsets of the tokens", type=str)
    noise: tuple = option((), "also judge in noise: white, pink, babble, or folders of audio", type=str)
    snr: tuple = option((20.0, 10.0, 5.0, 0.0), "signal-to-noise ratios in dB", type=float)
    audio: tuple = option((), "transcribe these files, then stop", type=str)
    beam: int = option(0, "beam search with this many hypotheses (needs flashlight-text); 0: greedy")
    lm: str = option("", "KenLM language model for --beam, over text units (letters), not over words")
    compare: tuple = option((), "run folders (each with an asr.pt): one table of all", type=str)
    content: bool = option(False, "measure what the tokens tell of phoneme and voice (synthetic corpus)")
    benchmark: bool = option(False, "measure speed instead of accuracy")
    plots: bool = option(False, "also draw pictures (needs matplotlib)")
    seed: int = option(0, "random seed of noise and bootstrap")
    device: str = option("auto", "auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))
    out: str = option("runs/eval", "folder to write")

    def __post_init__(self):
        if self.seed < 0 or self.beam < 0:
            raise InputError("--seed and --beam must be at least 0")
        if self.lm and not (self.beam and Path(self.lm).is_file()):
            raise InputError(f"--lm {self.lm}: " + ("no such file" if self.beam else "only --beam uses a language model"))
        others = {"audio": "noise tokens test compare", "compare": "noise tokens codec", "content": "noise codec test beam audio compare",
                  "benchmark": "noise tokens codec test beam audio compare content"}
        for mode, unused in others.items():
            for name in unused.split():
                if getattr(self, mode) and getattr(self, name):
                    raise InputError(f"--{mode} has no use for --{name}: leave one of them out")


# ---------------------------------------------------------------------------------------------------- recognising

class Recogniser:
    """A trained run, ready for use: arrays in, texts out."""

    def __init__(self, path: str | Path, device: str = "cpu", beam: int = 0, lm: str = ""):
        saved = load_checkpoint(path, device)
        self.path, self.device, self.settings, self.meta = Path(path), torch.device(device), saved["settings"], saved["meta"]
        self.text = Text(saved["text"])
        with fitting(path):
            self.model = build_model(self.settings, self.meta, len(self.text)).to(device).eval()
            self.model.load_state_dict(saved["model"])
        self.search = beam_search(self.text, beam, lm) if beam else self.text.greedy

    @property
    def bitrate(self) -> int | None:
        """Bits a second of the tokens that it reads; None for features."""
        used = (self.settings["codebooks"] or self.meta["codebooks"]) / max(1, self.meta["codebooks"])
        return round(self.meta["bitrate"] * used) if self.meta["bitrate"] else None

    def front_end(self, codec: str) -> FrontEnd:
        """What made its training tokens; InputError when the codec at hand is another one."""
        front_end = FrontEnd(self.meta["features"], codec or self.meta["codec_path"], self.meta["hop"], str(self.device),
                             self.meta.get("kbps", 6.0))
        if front_end.meta["codec"] != self.meta["codec"]:
            raise InputError(f"{self.path} was trained on tokens of codec {self.meta['codec']}, "
                             f"{front_end.meta['codec_path']} is codec {front_end.meta['codec']}: give its own with --codec")
        return front_end

    @torch.inference_mode()
    def __call__(self, data: TokenSet) -> tuple[list[str], float]:
        """-> texts in the order of data.rows, seconds that it took."""
        texts, began = [""] * len(data.lengths), time.perf_counter()
        frames = round(80 * self.meta["sample_rate"] / self.meta["hop"])
        for group in tqdm(data.batches(torch.arange(len(texts)), frames, None), desc="recognising", leave=False):
            for i, hyp in zip(group.tolist(), self.search(*self.model(*data.take(group, self.device)))):
                texts[i] = hyp
        return texts, time.perf_counter() - began

    @torch.inference_mode()
    def long(self, array: np.ndarray, seconds: float = 20.0, margin: float = 2.0) -> str:
        """A recording of any length, (T, Q) or (T, D) -> text, in bounded memory.

        Windows overlap by twice the margin; of each only the middle counts. The log-probabilities are joined, frame by
        frame, before they are decoded: a word at a seam is neither lost nor said twice."""
        rate = self.meta["sample_rate"] / self.meta["hop"] / self.settings["subsampling"]          # output frames a second
        keep, edge, sub = round((seconds - 2 * margin) * rate), round(margin * rate), self.settings["subsampling"]
        total, pieces = -(-len(array) // sub), []
        for start in tqdm(range(0, total, keep), desc="recognising", leave=False, disable=total < 10 * keep):
            first = max(0, start - edge)
            part = torch.from_numpy(array[first * sub:(start + keep + edge) * sub])[None].to(self.device)
            log_probs, _ = self.model(part[..., :self.settings["codebooks"] or None], torch.tensor([part.shape[1]], device=self.device))
            pieces.append(log_probs[:, start - first:start - first + keep].cpu())
        log_probs = torch.cat(pieces, 1)
        return self.search(log_probs, torch.tensor([log_probs.shape[1]]))[0]


def beam_search(text: Text, beam: int, lm: str):
    """-> a function with the interface of Text.greedy."""
    try:
        from torchaudio.models.decoder import ctc_decoder
    except (ImportError, RuntimeError) as error:        # torchaudio raises either
        raise InputError(f"--beam: {str(error).splitlines()[0]}; pip install flashlight-text, or leave --beam out") from None
    pieces = [text.units.id_to_piece(i) for i in range(len(text))]
    try:
        decoder = ctc_decoder(lexicon=None, tokens=pieces, lm=lm or None, beam_size=beam, log_add=True, blank_token=pieces[0],
                              sil_token="\u2581")
    except RuntimeError:
        raise InputError(f"--lm {lm}: not a language model that KenLM reads") from None

    def search(log_probs: Tensor, out_len: Tensor) -> list[str]:
        best = decoder(log_probs.float().cpu().contiguous(), out_len.cpu())
        return [text.decode([i for i in hyps[0].tokens.tolist() if i]) for hyps in best]
    return search


def transcribe(settings: EvalSettings) -> None:
    recogniser = Recogniser(settings.asr, pick_device(settings.device), settings.beam, settings.lm)
    front_end, failed = recogniser.front_end(settings.codec), 0
    for path in settings.audio:
        try:
            wav, began = read_audio(path), time.perf_counter()
        except InputError as error:
            print(f"skipped: {error}")
            failed += 1
            continue
        print(f"{path}: {recogniser.long(front_end([wav])[0])}")
        taken = time.perf_counter() - began
        print(f"  ({len(wav) / SAMPLE_RATE:.1f} s of audio in {taken:.2f} s)")
    if failed == len(settings.audio):
        raise InputError("none of the files could be read")


# ---------------------------------------------------------------------------------------------------- scoring

class Score:
    """Errors of each utterance, so that rates, intervals and paired comparisons come from one count."""

    def __init__(self, refs: list[str], hyps: list[str]):
        self.words, self.kinds = self.count(jiwer.process_words(refs, hyps))
        self.chars, _ = self.count(jiwer.process_characters(refs, hyps))
        self.refs, self.hyps = refs, hyps

    @staticmethod
    def count(result) -> tuple[np.ndarray, dict[str, int]]:
        """-> (errors, reference length) an utterance (N, 2), and totals of each kind of error."""
        errors = [sum(max(c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx) for c in chunks if c.type != "equal")
                  for chunks in result.alignments]
        totals = {"substitutions": result.substitutions, "deletions": result.deletions, "insertions": result.insertions}
        return np.array([errors, [len(ref) for ref in result.references]]).T, totals

    def summary(self, seed: int = 0) -> dict:
        return {"utterances": len(self.refs), "wer": error_rate(self.words), "wer_interval": interval(self.words, seed),
                "cer": error_rate(self.chars), "cer_interval": interval(self.chars, seed), "words": int(self.words[:, 1].sum()), **self.kinds}


def error_rate(counts: np.ndarray) -> float:
    """(N, 2) errors and lengths -> error rate."""
    return float(counts[:, 0].sum() / counts[:, 1].sum())


def draws(size: int, seed: int, rounds: int = 1000) -> np.ndarray:
    """Bootstrap over utterances (Bisani and Ney, 2004): row numbers (rounds, size)."""
    return np.random.default_rng(seed).integers(size, size=(rounds, size))


def interval(counts: np.ndarray, seed: int) -> list[float]:
    """95 % interval of the error rate."""
    picked = counts[draws(len(counts), seed)].sum(1)
    return np.percentile(picked[:, 0] / picked[:, 1], [2.5, 97.5]).tolist()


def paired(counts: np.ndarray, others: np.ndarray, seed: int) -> list[float]:
    """95 % interval of the difference of two error rates on the same utterances; significant when 0 lies outside."""
    picks = draws(len(counts), seed)
    one, two = counts[picks].sum(1), others[picks].sum(1)
    return np.percentile(one[:, 0] / one[:, 1] - two[:, 0] / two[:, 1], [2.5, 97.5]).tolist()


def percent(value: float, interval: list[float]) -> str:
    return f"{100 * value:.1f} ({100 * interval[0]:.1f}-{100 * interval[1]:.1f})"


# ---------------------------------------------------------------------------------------------------- reports

def judge(recogniser: Recogniser, data: TokenSet, seed: int) -> tuple[Score, dict]:
    """Recognise and score a subset -> score, summary with real-time factor and languages."""
    hyps, seconds = recogniser(data)
    if recogniser.settings["lang_token"]:
        guesses, hyps = zip(*map(split_language, hyps))
    score = Score([row["text"] for row in data.rows], list(hyps))
    summary = score.summary(seed)
    summary["real_time_factor"] = seconds / sum(row["duration"] for row in data.rows)
    summary["unknown_characters"] = recogniser.text.unknown(score.refs)
    languages = sorted({row["lang"] for row in data.rows} - {""})
    if len(languages) > 1:
        of = np.array([row["lang"] for row in data.rows])
        summary["cer_by_language"] = {lang: [error_rate(score.chars[of == lang]), *interval(score.chars[of == lang], seed)] for lang in languages}
        summary["cer_language_mean"] = float(np.mean([cer for cer, *_ in summary["cer_by_language"].values()]))
        if recogniser.settings["lang_token"]:
            summary["language_accuracy"] = float(np.mean([guess == lang for guess, lang in zip(guesses, of)]))
    return score, summary


HEADER = ("| test | utterances | WER % (95 %) | CER % (95 %) | sub / del / ins | real-time factor, tokens to text |\n"
          "|---|---|---|---|---|---|\n")


def table_row(name: str, s: dict) -> str:
    return (f"| {name} | {s['utterances']} | {percent(s['wer'], s['wer_interval'])} | {percent(s['cer'], s['cer_interval'])} | "
            f"{s['substitutions']} / {s['deletions']} / {s['insertions']} | {s['real_time_factor']:.4f} |\n")


def examples(score: Score, count: int = 3) -> str:
    """The worst utterances and some from the middle, reference above hypothesis."""
    order = np.argsort(-score.chars[:, 0] / score.chars[:, 1].clip(1), kind="stable")
    lines = []
    for title, picked in (("worst", order[:count]), ("typical", order[len(order) // 2:][:count])):
        lines += [f"\n{title}:\n"] + [f"    ref  {score.refs[i]}\n    hyp  {score.hyps[i]}\n\n" for i in picked]
    return "".join(lines)


def evaluate(settings: EvalSettings) -> None:
    recogniser = Recogniser(settings.asr, pick_device(settings.device), settings.beam, settings.lm)
    tokens, meta = settings.tokens or recogniser.settings["tokens"], recogniser.meta
    found = train_asr.read_meta(tokens)
    check_same_tokens(settings.asr, meta, tokens, found)
    front_end = recogniser.front_end(settings.codec) if settings.noise else None
    report, page, details = {"asr": settings.asr, "beam": settings.beam, "test": {}}, HEADER, ""
    subsets = {subset: TokenSet(tokens, [subset], recogniser.settings["codebooks"]) for subset in settings.test or found["test"]}
    for snr in settings.snr:
        Noise(settings.noise, (snr, snr), [], settings.seed)                    # a kind or ratio that cannot be is told before the work
    for subset, data in subsets.items():
        score, summary = judge(recogniser, data, settings.seed)
        report["test"][subset] = summary
        page += table_row(subset, summary)
        details += f"\n### {subset}\n" + remarks(summary) + examples(score)
        for kind in settings.noise:
            for snr in settings.snr:
                noisy = degrade(recogniser, front_end, data, kind, snr, settings.seed)
                _, summary = judge(recogniser, noisy, settings.seed)
                report["test"][f"{subset}, {kind} {snr:g} dB"] = summary
                page += table_row(f"{subset}, {kind} {snr:g} dB", summary)
    out = save_report(settings.out, "report", report, details + "\n" + page)
    if settings.plots:
        plot_utterance(recogniser, data, len(data.rows) // 2, out)
        plot_curves([str(recogniser.path.parent)], out)
        if meta["features"] == "tokens" and meta["codec_path"] != "encodec":
            codec = Codec.load(settings.codec or meta["codec_path"], str(recogniser.device))
            plot_codec(codec, data.rows[len(data.rows) // 2], data, out)
        if settings.noise:
            plot_noise(report["test"], out)


def save_report(folder: str, name: str, report: dict | list, page: str) -> Path:
    """Print the page; write folder/name.md and name.json."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / f"{name}.md", page.encode())
    write_atomically(out / f"{name}.json", json.dumps(report, indent=1).encode())
    print(f"{page}\nwrote {out / name}.md and .json")
    return out


def remarks(summary: dict) -> str:
    """What only some test sets have: letters that the recogniser has never seen, several languages."""
    unknown = (f"\n{summary['unknown_characters']} characters of the transcripts are not among the text units: they cannot be written, "
               f"and count as errors.\n" if summary["unknown_characters"] else "")
    if "cer_by_language" not in summary:
        return unknown
    rows = "".join(f"| {lang} | {percent(cer, bounds)} |\n" for lang, (cer, *bounds) in summary["cer_by_language"].items())
    accuracy = f"\nlanguage identified: {100 * summary['language_accuracy']:.1f} %\n" if "language_accuracy" in summary else ""
    return unknown + f"\n| language | CER % (95 %) |\n|---|---|\n{rows}| mean | {100 * summary['cer_language_mean']:.1f} |\n{accuracy}"


def degrade(recogniser: Recogniser, front_end: FrontEnd, data: TokenSet, kind: str, snr: float, seed: int) -> TokenSet:
    """The same utterances with noise added to their audio, encoded anew."""
    noise = Noise((kind,), (snr, snr), [Path(row["audio"]) for row in data.rows], seed)
    arrays = [front_end([noise(read_audio(row["audio"]), row["id"], Path(row["audio"]))])[0]
              for row in tqdm(data.rows, desc=f"{kind} {snr:g} dB", leave=False)]
    return data.with_arrays([array[:, :recogniser.settings["codebooks"] or None] for array in arrays])


def read_log(folder: str | Path) -> list[dict]:
    """A training run's log.jsonl: a row an epoch."""
    path = Path(folder) / "log.jsonl"
    try:
        return [train_asr.parse_json(line, {"epoch": int, "dev_cer": float, "seconds_a_second": float})
                for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: missing or damaged ({error}); train_asr.py writes it anew after each epoch") from None


def compare(settings: EvalSettings) -> None:
    """One table of several runs, each against the first, on the same utterances."""
    runs = [Recogniser(Path(folder) / "asr.pt", pick_device(settings.device), settings.beam, settings.lm) for folder in settings.compare]
    everything = [{**run.settings, **{k: run.meta[k] for k in ("features", "codec", "hop")}, "bitrate": run.bitrate} for run in runs]
    differ = [key for key in everything[0] if key not in ("out", "device") and len({str(e.get(key)) for e in everything}) > 1]
    subsets = settings.test or runs[0].meta["test"]
    page = f"| run | {' | '.join(differ)} | M parameters | training, s of speech a s | " + " | ".join(f"{s}: WER % | {s}: CER % | CER - first" for s in subsets) + " |\n"
    page += "|" + "---|" * (page.count("|") - 1) + "\n"
    report, first = [], {}
    for folder, recogniser, values in zip(settings.compare, runs, everything):
        row = {"run": folder, "bitrate": recogniser.bitrate, **{key: values.get(key) for key in differ},
               "parameters": sum(p.numel() for p in recogniser.model.parameters()),
               "training_speed": float(np.median([epoch["seconds_a_second"] for epoch in read_log(folder)])), "test": {}}
        cells = [folder, *(str(values.get(key)) for key in differ), f"{row['parameters'] / 1e6:.2f}", f"{row['training_speed']:.0f}"]
        for subset in subsets:
            check_same_tokens(folder, recogniser.meta, recogniser.settings["tokens"], train_asr.read_meta(recogniser.settings["tokens"]))
            data = TokenSet(recogniser.settings["tokens"], [subset], recogniser.settings["codebooks"])
            score, summary = judge(recogniser, data, settings.seed)
            base = first.setdefault(subset, score)
            if base.refs != score.refs:
                raise InputError(f"{folder}: its {subset} holds other utterances than that of {settings.compare[0]}")
            low, high = summary["cer_difference"] = paired(score.chars, base.chars, settings.seed)
            row["test"][subset] = summary
            verdict = "-" if base is score else f"{100 * low:+.1f} .. {100 * high:+.1f}" + (" *" if low * high > 0 else "")
            cells += [percent(summary["wer"], summary["wer_interval"]), percent(summary["cer"], summary["cer_interval"]), verdict]
        report.append(row)
        page += "| " + " | ".join(cells) + " |\n"
    page += "\n* significant: the 95 % interval of the difference (paired bootstrap over utterances) leaves out 0.\n"
    out = save_report(settings.out, "compare", report, page)
    if settings.plots:
        plot_curves(settings.compare, out)
        plot_bitrate(report, out)


# ---------------------------------------------------------------------------------------------------- what tokens carry

def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Bits that knowing `a` tells about `b`; both hold labels 0, 1, 2 ... (N,)."""
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1 / len(a))
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    return float((joint[joint > 0] * np.log2(joint[joint > 0] / apart[joint > 0])).sum())


def content(settings: EvalSettings) -> None:
    """Which codebook tells the phoneme, which the voice? On the synthetic corpus, whose phonemes are known exactly."""
    folder, rows = settings.tokens or "runs/tokens", []
    meta = train_asr.read_meta(folder)
    if not meta["codebooks"]:
        raise InputError(f"{folder}: holds {meta['features']}, not tokens")
    data = TokenSet(folder, [*meta["train"], *meta["test"]])
    phones, voices = [], []
    for row, frames in zip(data.rows, data.lengths.tolist()):
        speaker = row["id"].split("-")[0]
        path = Path(row["audio"]).parent / f"{row['id'].rpartition('-')[0]}.phones.txt"
        if not path.is_file():
            raise InputError(f"{path}: no alignment; --content needs tokens of the synthetic corpus")
        items = [item.split(":") for line in path.read_text().splitlines() if line.startswith(row["id"] + " ") for item in line.split()[1:]]
        if not items or any(len(item) != 2 or not item[1].isdigit() for item in items):
            raise InputError(f"{path}: has no alignment of {row['id']}, or a damaged one; delete the corpus to make it anew")
        names, ends = zip(*items)
        middle = (np.arange(frames) + 0.5) * meta["hop"] * SAMPLE_RATE / meta["sample_rate"]    # the sample in the middle of each token frame
        phones += [names[i] for i in np.searchsorted(np.array(ends, int), middle, side="right").clip(max=len(names) - 1)]
        voices += [speaker] * frames
    phones, voices = (np.unique(labels, return_inverse=True)[1] for labels in (phones, voices))
    random, utterances = np.random.default_rng(settings.seed), np.split(np.arange(len(phones)), data.lengths.cumsum(0)[:-1])
    strangers = [np.concatenate([utterances[i] for i in random.permutation(len(utterances))]) for _ in range(5)]
    page = "| codebook | phoneme, bits | share of what there is to know | voice, bits | share |\n|---|---|---|---|---|\n"
    for level in range(meta["codebooks"]):
        codes = data.flat[:, level].numpy().astype(np.int64)
        row = {"codebook": level}
        for name, labels in (("phoneme", phones), ("voice", voices)):
            # With so many codes, chance alone looks like information: take off what the labels of other utterances give.
            # Not of single frames: those of an utterance share sounds and voice, and leave more to chance.
            chance = np.mean([mutual_information(codes, labels[order]) for order in strangers])
            bits = max(0.0, mutual_information(codes, labels) - chance)
            row |= {name: bits, f"{name}_share": bits / mutual_information(labels, labels)}
        rows.append(row)
        page += (f"| {level} | {row['phoneme']:.2f} | {100 * row['phoneme_share']:.0f} % | "
                 f"{row['voice']:.2f} | {100 * row['voice_share']:.0f} % |\n")
    out = save_report(settings.out, "content", rows, page)
    if settings.plots:
        plot_content(rows, out)


# ---------------------------------------------------------------------------------------------------- speed

def race(ours, usual=None, rounds: int = 5) -> tuple[float, float]:
    """Median seconds of both, run in turns, so that a slow moment of the machine hits both. Once before, unmeasured."""
    times = [[], []]
    for number in range(rounds + 1):
        for function, taken in zip((ours, usual), times):
            if function:
                began = time.perf_counter()
                function()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - began)
    return tuple(float(np.median(taken[1:])) if taken else math.nan for taken in times)


def codec_training(wav: Tensor, **more):
    """A codec of size small, and a function that trains it by one step on wav (B, S)."""
    settings = CodecSettings(size="small", **more)
    codec, distance = Codec(settings).to(wav.device), MelDistance().to(wav.device)
    nets, optimisers = [codec], [torch.optim.AdamW(codec.parameters())]
    return codec, lambda: codec_step(nets, optimisers, distance, wav, 0, settings)


def asr_training(model: torch.nn.Module, arrays, frames: int, device: str):
    """A function that trains on one batch of 8; arrays() gives its input (8, frames, ...). Targets are the same for all."""
    optimiser = torch.optim.AdamW(model.parameters())
    targets = torch.randint(1, 30, (8, 100), device=device)
    lengths, target_len = torch.full((8,), frames, device=device), torch.full((8,), 100, device=device)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            out, out_len = model.train()(arrays().to(device), lengths)
        loss = torch.nn.functional.ctc_loss(out.float().log_softmax(-1).transpose(0, 1), targets, out_len, target_len)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return step


def usual_rvq(latent: Tensor, codebooks: Tensor) -> None:
    """Residual quantization as it is mostly written; latent (B, D, T)."""
    residual = latent.transpose(1, 2).flatten(0, 1)
    for codebook in codebooks:
        residual = residual - codebook[torch.cdist(residual, codebook).argmin(1)]


def peak_memory(device: str) -> float:
    """GB: on a GPU since the last call, elsewhere of the whole process so far."""
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def benchmark(settings: EvalSettings) -> None:
    """What a user waits for, in seconds of audio a second, beside the same work done the usual way, in one run."""
    torch.manual_seed(settings.seed)
    device, rows = pick_device(settings.device), []
    size = "base" if device == "cuda" else "small"                              # of the recogniser
    wav = 0.05 * torch.randn(8, 10 * SAMPLE_RATE, device=device)                # 8 utterances of 10 s
    print(f"{torch.get_num_threads()} threads, {device}; seconds of audio a second, times as fast as the usual way, peak memory")

    def add(what: str, seconds: float, ours, way: str = "", usual=None) -> None:
        mine, other = race(ours, usual)
        rows.append({"what": what, "audio_seconds_a_second": seconds / mine, "usual_way": way, "times_as_fast": other / mine,
                     "peak_memory_gb": peak_memory(device)})
        print(f"{what:52s} {seconds / mine:9.0f} {rows[-1]['peak_memory_gb']:6.1f} GB"
              + (f" {other / mine:7.2f} x  {way}" if usual else ""), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        flacs, arrays = ([f"{folder}/{i}.{kind}" for i in range(8)] for kind in ("flac", "npy"))
        for flac, array, row in zip(flacs, arrays, wav.cpu().numpy()):
            sf.write(flac, row, SAMPLE_RATE)
            np.save(array, np.random.randint(1000, size=(400, 8), dtype=np.int16))
        add("read 8 FLAC files of 10 s", 80, lambda: [read_audio(name) for name in flacs],
            "soundfile alone", lambda: [sf.read(name, dtype="float32") for name in flacs])
        benchmark_codec(add, wav)
        tokens = torch.randint(1000, (8, 400, 8), device=device)
        lengths = torch.full((8,), 400, device=device)
        model, (width, layers, heads, kernel) = CodecASR(32, size=size).to(device), asr_model.SIZES[size].values()
        theirs = torchaudio.models.Conformer(width, heads, 4 * width, layers, kernel, dropout=0.1).to(device)
        wide = torch.randn(8, 400, width, device=device)
        step = asr_training(model, lambda: tokens, 400, device)
        add(f"recogniser {size}, training step, 8 x 10 s", 80, step, "torchaudio.models.Conformer", asr_training(theirs, lambda: wide, 400, device))
        with FlopCounterMode(display=False) as counter:
            step()
        print(f"  = {counter.get_total_flops() / 80 * rows[-1]['audio_seconds_a_second'] / 1e12:.2f} TFLOP/s")
        with torch.inference_mode():
            for count in (1, 8):
                add(f"recogniser {size}, inference, {count} x 10 s", 10 * count, lambda: model.eval()(tokens[:count], lengths[:count]),
                    "torchaudio.models.Conformer", lambda: theirs.eval()(wide[:count], lengths[:count]))
        text = Text.train([{"text": "THE QUICK BROWN FOX JUMPS OVER A LAZY DOG"}], train_asr.TrainSettings(units="char"))
        log_probs = torch.randn(8, 400, len(text), device=device)
        add("greedy decoding, 8 x 10 s", 80, lambda: text.greedy(log_probs, lengths))
        mel = LogMel(400, 160, 80)
        on_the_fly = lambda: mel(torch.stack([read_audio(name) for name in flacs])).transpose(1, 2)
        from_disk = lambda: torch.from_numpy(np.stack([np.load(name) for name in arrays]))
        for factor, way in ((4, "log-mel from audio, 10 ms, 4x subsampling"), (1, "log-mel from audio, 10 ms")):
            add(f"recogniser {size}, training, tokens from disk", 80, asr_training(model, from_disk, 400, device), way,
                asr_training(CodecASR(32, 0, 0, 80, size=size, subsampling=factor).to(device), on_the_fly, 1000, device))
    page = "| what | audio seconds a second | times as fast as | | peak memory, GB |\n|---|---|---|---|---|\n" + "".join(
        f"| {row['what']} | {row['audio_seconds_a_second']:.0f} | " + (f"{row['times_as_fast']:.2f}" if row["usual_way"] else "") +
        f" | {row['usual_way']} | {row['peak_memory_gb']:.1f} |\n" for row in rows)
    page += "\nMillions of parameters: " + ", ".join(f"{name} {sum(p.numel() for p in net.parameters()) / 1e6:.1f}" for name, net in {
        **{f"codec {encoder} {size}": Codec(CodecSettings(encoder=encoder, size=size)) for encoder in ("mel", "time") for size in CODEC_SIZES},
        **{f"recogniser {size}": CodecASR(32, size=size) for size in asr_model.SIZES}}.items()) + ".\n"
    save_report(settings.out, "benchmark", rows, page)


def benchmark_codec(add, wav: Tensor) -> None:
    """The rows of the codec; wav (8, S)."""
    for encoder, quantizer in (("mel", "fsq"), ("mel", "rvq"), ("time", "fsq"), ("time", "rvq")):
        codec, step = codec_training(wav[:, :2 * SAMPLE_RATE], encoder=encoder, quantizer=quantizer)
        add(f"codec {encoder} {quantizer} small, training step, 8 x 2 s", 16, step)
        codec.eval()
        whole = torch.inference_mode()(lambda: codec.quantizer.encode(codec.encoder(wav)))
        single = lambda: [codec.encode(row[None]) for row in wav]
        add(f"codec {encoder} {quantizer} small, encoding, 1 x 10 s", 10, lambda: codec.encode(wav[:1]))
        add(f"codec {encoder} {quantizer} small, encoding, 8 x 10 s", 80, lambda: codec.encode(wav), "one by one", single)
        add(f"codec {encoder} {quantizer} small, encoding, 8 x 10 s", 80, lambda: codec.encode(wav), "all at once, not in windows", whole)
    for quantizer in (ResidualVQ().to(wav.device), GroupFSQ().to(wav.device)):
        latent, name = torch.randn(16, quantizer.dim, 400, device=wav.device), type(quantizer).__name__
        add(f"{name}, training, 16 x 10 s", 160, lambda: quantizer.train()(latent))
        usual = ("torch.cdist", lambda: usual_rvq(latent, quantizer.codebooks())) if name == "ResidualVQ" else ()
        add(f"{name}, tokens only, 16 x 10 s", 160, torch.inference_mode()(lambda: quantizer.eval().encode(latent)), *usual)


# ---------------------------------------------------------------------------------------------------- pictures

def figure(rows: int, width: float = 9.0, height: float = 1.9, **more):
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise InputError("--plots: pip install matplotlib, or leave --plots out") from None
    return pyplot.subplots(rows, 1, figsize=(width, rows * height + 0.4), layout="constrained", squeeze=False, **more)


def plot_utterance(recogniser: Recogniser, data: TokenSet, number: int, out: Path) -> None:
    """One utterance: waveform, log-mel, tokens, and what the recogniser is sure of, under one time axis; words as it heard them."""
    row, hop = data.rows[number], recogniser.meta["hop"] / recogniser.meta["sample_rate"]
    wav = read_audio(row["audio"])
    array = data.take(torch.tensor([number]), recogniser.device)[0]
    with torch.inference_mode():
        posterior = recogniser.model(array, torch.tensor([array.shape[1]], device=recogniser.device))[0][0].exp().cpu().T
    mel = LogMel(512, 160, 80)(wav[None, :len(wav) // 160 * 160])[0]
    seconds = len(wav) / SAMPLE_RATE
    fig, axes = figure(4, sharex=True)
    (top, second, third, bottom), raster = axes[:, 0], array[0].cpu().float().T
    top.plot(np.arange(len(wav)) / SAMPLE_RATE, wav, linewidth=0.4)
    top.set_title(row["text"], fontsize=9, wrap=True)
    second.imshow(mel, origin="lower", aspect="auto", extent=(0, seconds, 0, 80))
    third.imshow(raster, origin="lower", aspect="auto", interpolation="nearest", cmap="nipy_spectral",
                 extent=(0, array.shape[1] * hop, -0.5, len(raster) - 0.5))
    best, step = posterior.argmax(0), seconds / posterior.shape[1]
    for unit in best.unique().tolist():
        bottom.plot((np.arange(posterior.shape[1]) + 0.5) * step, posterior[unit], linewidth=0.8, color="0.8" if unit == 0 else None)
    words = []                                              # [second where it begins, its letters]
    for t, unit in enumerate(best.tolist()):
        if unit and (t == 0 or best[t - 1] != unit):
            piece = recogniser.text.units.id_to_piece(unit).replace("\u2581", "_")
            bottom.text((t + 0.5) * step, 1.03, piece, fontsize=7, ha="center")
            if piece[0] == "_" or not words:
                words.append([(t + 0.5) * step, ""])
            words[-1][1] += piece.strip("_")
    for start, word in words:
        second.text(start, 82, word, fontsize=7)
        for axis in (top, second, third):
            axis.axvline(start, color="red", linewidth=0.6)
    for axis, name in zip(axes[:, 0], ("wave", "mel band", "codebook" if recogniser.meta["codebooks"] else "feature", "probability")):
        axis.set_ylabel(name)
    bottom.set(xlabel="seconds", xlim=(0, seconds), ylim=(0, 1.15))
    fig.savefig(out / "utterance.png", dpi=80)


def plot_codec(codec: Codec, row: dict, data: TokenSet, out: Path) -> None:
    """Log-mel before and after the codec, and how evenly each codebook is used."""
    wav = read_audio(row["audio"])[None].to(next(codec.parameters()).device)
    mel, made = LogMel(512, 160, 80).to(wav.device), codec.decode(codec.encode(wav)[0])
    fig, axes = figure(3)
    for axis, sound, name in zip(axes[:, 0], (wav, made), ("original", f"from tokens, {codec.bitrate / 1000:.1f} kbit/s")):
        axis.imshow(mel(sound[:, :wav.shape[1] // 160 * 160])[0].cpu(), origin="lower", aspect="auto", vmin=-11, vmax=6,
                    extent=(0, wav.shape[1] / SAMPLE_RATE, 0, 80))
        axis.set(title=name, ylabel="mel band")
    axes[1, 0].set(xlabel="seconds")
    for level in range(data.flat.shape[1]):
        counts = np.sort(np.bincount(data.flat[:, level].numpy(), minlength=codec.quantizer.codebook_size))[::-1]
        axes[2, 0].plot(counts / counts.sum() * len(counts), linewidth=0.8, label=f"codebook {level}")
    axes[2, 0].set(xlabel="codes, most used first", ylabel="use (1: even)", yscale="log", ylim=(1e-2, None))
    axes[2, 0].legend(fontsize=6, ncol=4)
    fig.savefig(out / "codec.png", dpi=80)


def plot_content(rows: list[dict], out: Path) -> None:
    """What each codebook tells of phoneme and voice."""
    fig, axes = figure(1, 6.5, 3.2)
    for shift, name in ((-0.2, "phoneme"), (0.2, "voice")):
        axes[0, 0].bar([row["codebook"] + shift for row in rows], [100 * row[f"{name}_share"] for row in rows], 0.4, label=name)
    axes[0, 0].set(xlabel="codebook", ylabel="% of what there is to know")
    axes[0, 0].legend()
    fig.savefig(out / "content.png", dpi=80)


def plot_curves(folders: list[str], out: Path) -> None:
    """Dev CER against passes over the data, of several runs."""
    fig, axes = figure(1, 6.5, 3.2)
    for folder in folders:
        rows = read_log(folder)
        axes[0, 0].plot([row["epoch"] for row in rows], [100 * row["dev_cer"] for row in rows], marker=".", label=folder)
    axes[0, 0].set(xlabel="epoch", ylabel="dev CER %", ylim=(0, None))
    axes[0, 0].locator_params(axis="x", integer=True)
    axes[0, 0].legend()
    fig.savefig(out / "learning.png", dpi=80)


def plot_bitrate(report: list[dict], out: Path) -> None:
    """CER against the bitrate of what a run reads."""
    fig, axes = figure(1, 6.5, 3.2)
    for subset in report[0]["test"]:
        points = sorted((row["bitrate"] / 1000, 100 * row["test"][subset]["cer"], *np.array(row["test"][subset]["cer_interval"]) * 100)
                        for row in report if row["bitrate"])
        if points:
            kbps, cer, low, high = np.array(points).T
            axes[0, 0].errorbar(kbps, cer, (cer - low, high - cer), marker="o", markersize=4, capsize=3, label=subset)
    axes[0, 0].set(xlabel="kbit/s", ylabel="CER %", ylim=(0, None))
    axes[0, 0].legend()
    fig.savefig(out / "bitrate.png", dpi=80)


def plot_noise(report: dict, out: Path) -> None:
    """CER against signal-to-noise ratio."""
    fig, axes = figure(1, 6.5, 3.2)
    subsets = [key for key in report if ", " not in key]
    for subset, dashes in zip(subsets, ("-", "--", ":", "-.") * len(subsets)):
        of = f"{subset}, " if len(subsets) > 1 else ""
        for number, kind in enumerate(dict.fromkeys(key.split(", ")[1].rsplit(" ", 2)[0] for key in report if ", " in key)):
            points = sorted((float(key.rsplit(" ", 2)[1]), 100 * value["cer"]) for key, value in report.items()
                            if key.startswith(f"{subset}, {kind} "))
            axes[0, 0].plot(*zip(*points), dashes, color=f"C{number}", marker="o", label=of + Path(kind).name)
        axes[0, 0].axhline(100 * report[subset]["cer"], linestyle=dashes, color="0.5", label=f"{of}clean")
    axes[0, 0].set(xlabel="signal-to-noise ratio, dB", ylabel="CER %", ylim=(0, 105))
    axes[0, 0].legend()
    fig.savefig(out / "noise.png", dpi=80)


def main(arguments: list[str] | None = None) -> None:
    settings = parse(EvalSettings, __doc__, arguments)
    if settings.plots:
        figure(1)                                       # no matplotlib: better told now than after the work
    if settings.audio:
        transcribe(settings)
    elif settings.compare:
        compare(settings)
    elif settings.content:
        content(settings)
    elif settings.benchmark:
        benchmark(settings)
    else:
        evaluate(settings)


if __name__ == "__main__":
    run(main, train_asr.InputError)
