"""Stage 2: encode a corpus once with a trained codec, into small files of tokens.

in   a corpus with transcripts, and runs/codec/codec.pt
out  runs/tokens/meta.json              codec (fingerprint and path), hop, Q, K, D, subsets, ...
     runs/tokens/codebooks.npy          (Q, K, D) float32: the recognizer's embedding starts here
     runs/tokens/<subset>.jsonl         one row per utterance: id, text, lang, speaker, ...
     runs/tokens/<subset>/<id>.npy      tokens (T, Q) int16
     runs/tokens/<subset>.skipped.txt   what could not be used, and why

    python tokenize_corpus.py                                     # after codec.py
    python tokenize_corpus.py --features mel --out runs/mel       # the log-mel baseline
    python tokenize_corpus.py --corpus my-corpus --codec runs/my/codec/codec.pt --out runs/my/tokens

my-corpus holds subsets train, dev and test in one of three layouts: LibriSpeech's folders;
manifests such as train.jsonl, with a line {"audio_filepath": "a.wav", "text": "GUTEN TAG"} for each
file, optionally with "lang" and "speaker"; or ML-SUPERB's <dataset>/<lang>/transcript_train.txt.
Test subsets alone are enough for evaluate.py. The same command continues an interrupted run, and
re-encodes recordings that are newer than their tokens. It does not notice that an id now stands for
an older recording: then give another --out.

Legend: S samples, T token frames, Q codebooks, K codes, D feature size.
Dhawan et al., arXiv 2407.03495, section 3: the recognizer never sees audio, only these files.
"""

import json
import math
import os
import re
import shlex
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile as sf
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from codec import (CORPORA, SAMPLE_RATE, Codec, LogMel, add_common_flags, files_below, find_audio,
                   find_subsets, flag_group, mel_window, read_audio, read_lines, read_manifest,
                   refuse_idle, run_stage, save_skipped, start_processes, write_atomically,
                   write_rows)


class Utterance(NamedTuple):
    id: str
    text: str
    lang: str
    speaker: str
    audio: Path
    duration: float = 0.0       # seconds, at `speed`; what the manifest says, until it is measured
    copy_of: str = ""           # id of the original
    speed: float = 1.0
    equalize: float = 0.0       # deviation of a random gain in each octave, in dB
    noisy: bool = False


# ------------------------------------------------------------------------------------- transcripts

def read_subset(folders: list[Path], subset: str) -> tuple[list[Utterance], list[str]]:
    """A subset, in any of the three layouts -> utterances, a message for each unusable one."""
    kept = {}
    skipped = []
    for folder in folders:
        manifest = folder / f"{subset}.jsonl"
        if manifest.is_file():
            found = read_rows(manifest, skipped)
        elif any(folder.glob(f"*/*/transcript_{subset}.txt")):
            found = read_ml_superb(folder, subset, skipped)
        else:
            found = read_librispeech(folder, subset, skipped)
        for item in tqdm(found, f"reading {subset}", leave=False, disable=None):
            try:
                item.text.encode()          # raises for half a surrogate pair, such as \ud83d
                if not item.text or "\ufffd" in item.text:
                    raise ValueError("its transcript is empty, or not UTF-8")
                if len(item.id.encode()) > 200:
                    raise ValueError("its name is too long for a file of tokens; rename it")
                if item.id in kept:
                    raise ValueError(f"{kept[item.id].audio} has the same id, {item.id}; rename "
                                     f"one of them")
                if not item.audio.exists():
                    raise ValueError("no such file")
                seconds = sf.info(item.audio).duration
                # item.duration is still what the manifest says.
                if 0 < float(item.duration) < 0.8 * seconds:
                    raise ValueError(f"its row covers only part of {seconds:.1f} s: save that part "
                                     f"as a file of its own")
                kept[item.id] = item._replace(duration=seconds)
            except (ValueError, TypeError, ZeroDivisionError, OSError, RuntimeError) as error:
                skipped.append(f"{item.audio}: {str(error).splitlines()[0]}")
    return list(kept.values()), skipped


def read_librispeech(folder: Path, subset: str, skipped: list[str]) -> Iterator[Utterance]:
    """speaker/chapter/*.trans.txt, whose lines are an id and its words, beside the audio files."""
    unused = dict.fromkeys(find_audio(folder, subset))
    by_name = {(path.parent, path.stem): path for path in unused}
    for path in files_below(folder / subset, ".trans.txt"):
        for name, *words in read_lines(path):
            file = by_name.get((path.parent, name))
            if file in unused:
                del unused[file]
                # LibriSpeech's names begin with the speaker; other names get their folders. Without
                # folders, the speaker is what comes before the first hyphen.
                parts = file.with_suffix("").relative_to(folder / subset).parts
                key = name if name.startswith(f"{parts[0]}-") else "-".join(parts)
                speaker = parts[0] if len(parts) > 1 else name.split("-")[0]
                yield Utterance(key, " ".join(words), "", speaker, file)
            else:
                skipped.append(f"{path}: {name} has no audio file of its own")
    skipped += [f"{path}: no transcript names it, or another file of this name is used"
                for path in unused]


def read_rows(manifest: Path, skipped: list[str]) -> Iterator[Utterance]:
    """A manifest's rows hold audio_filepath and text, and perhaps lang, speaker and duration."""
    rows, problems = read_manifest(manifest)
    skipped += problems
    for row in rows:
        audio = Path(row["audio_filepath"])
        if row.get("offset"):
            skipped.append(f"{manifest.parent / audio}: its row covers only part of the file: save "
                           f"that part as a file of its own")
        elif "text" not in row:
            skipped.append(f"{manifest}: {audio} has {', '.join(row)}, but no text")
        else:
            # The id becomes a file name: it must be short, and cannot lead out of --out.
            stem = os.path.splitext(audio)[0]
            name = re.sub(r"[^\w-]+", "-", stem)[-60:].strip("-")
            text, lang, speaker = ("" if row.get(key) is None else str(row[key])
                                   for key in ("text", "lang", "speaker"))
            yield Utterance(name, " ".join(text.split()), lang, speaker, manifest.parent / audio,
                            row.get("duration") or 0)


def read_ml_superb(folder: Path, subset: str, skipped: list[str]) -> Iterator[Utterance]:
    """<dataset>/<lang>/transcript_<subset>.txt and wav/<id>.wav (ML-SUPERB, arXiv 2305.10615).

    A line holds id, duration (or a filler) and text. Subsets are called 10min_train, 1h_train, ...
    """
    for path in sorted(folder.glob(f"*/*/transcript_{subset}.txt")):
        for name, *rest in read_lines(path):
            name = Path(name).name          # it becomes a file name
            audio = path.parent / "wav" / f"{name}.wav"
            yield Utterance(name, " ".join(rest[1:]), path.parent.name, "", audio)


# ------------------------------------------------------------------------------------------- noise

class Noise:
    """Adds noise at a random signal-to-noise ratio; kind and ratio depend on seed and id alone.

    Each copy of an utterance has an id of its own.
    """

    def __init__(self, kinds: list[str], snr: list[float], speech: list[Utterance], seed: int):
        """kinds: white, pink, babble or folders; snr: LOW HIGH in dB; speech: what babble mixes."""
        self.kinds = kinds
        self.snr = sorted(snr)
        self.speech = speech
        self.seed = seed
        self.files = {kind: files_below(Path(kind)) for kind in kinds}
        for kind, files in self.files.items():
            if not files and kind not in ("white", "pink", "babble"):
                raise ValueError(f"--noise {kind}: not white, pink, babble or a folder with "
                                 f"audio files")

    def __call__(self, wav: Tensor, item: Utterance) -> Tensor:
        """wav (S,) -> (S,)."""
        rng = np.random.default_rng([self.seed, *item.id.encode()])
        kind = self.kinds[rng.integers(len(self.kinds))]
        snr = rng.uniform(*self.snr)
        if kind == "white":
            noise = torch.from_numpy(rng.standard_normal(len(wav))).float()
        elif kind == "pink":
            noise = pink(len(wav), rng)
        elif kind == "babble":          # six stretches of other speakers, if there are any
            # Where speakers are unknown, each recording counts as one of its own.
            who = item.speaker or item.audio
            files = [each.audio for each in self.speech if (each.speaker or each.audio) != who]
            files = files or [each.audio for each in self.speech]
            noise = sum(stretch(files, len(wav), rng) for _ in range(6))
        else:
            noise = stretch(self.files[kind], len(wav), rng)
        return torchaudio.functional.add_noise(wav, noise, torch.tensor(snr))


def pink(length: int, rng: np.random.Generator) -> Tensor:
    """Power falls as 1 / frequency, and is 0 below 20 Hz, where half of it would lie."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    hz = np.fft.rfftfreq(length, 1 / SAMPLE_RATE)
    spectrum *= (hz >= 20) / np.sqrt(hz.clip(20))
    return torch.from_numpy(np.fft.irfft(spectrum, length)).float()


def stretch(files: list[Path], length: int, rng: np.random.Generator) -> Tensor:
    """A random stretch of a random file, repeated where it is too short, at power 1 -> (length,).

    Files that cannot be read, and stretches of silence, are skipped."""
    for _ in range(100):
        try:
            path = files[rng.integers(len(files))]
            wav = read_audio(path, length / SAMPLE_RATE, at=rng.random())
        except ValueError as error:
            problem = error
            continue
        part = wav[torch.arange(length) % len(wav)]
        power = part.square().mean()
        if power > 1e-8:
            return part / power.sqrt()
        problem = "it is silent"
    raise ValueError(f"{files[0]} and {len(files) - 1} others give no noise: {problem}")


# ---------------------------------------------------------------------------------------- encoding

class Encodec:
    """The published EnCodec (pip install encodec; arXiv 2210.13438) with the interface of Codec."""

    def __init__(self, device: str):
        try:
            from encodec import EncodecModel
            model = EncodecModel.encodec_model_24khz()
        except (ImportError, OSError) as error:
            raise ValueError(f"--codec encodec: {error}; it needs pip install encodec, and the "
                             f"network to fetch its weights")
        model.set_target_bandwidth(6.0)         # kbit/s: eight codebooks
        self.model = model.to(device).eval()
        self.sample_rate = model.sample_rate
        self.bitrate = 6000
        self.fingerprint = "encodec-24khz"
        self.hop = math.prod(model.encoder.ratios)

    def codebooks(self) -> Tensor:
        return torch.stack([layer._codebook.embed for layer in self.model.quantizer.vq.layers[:8]])

    def encode(self, wav: Tensor) -> Tensor:
        """wav (1, S) at 16 kHz -> tokens (1, Q, T)."""
        wav = torchaudio.functional.resample(wav, SAMPLE_RATE, self.sample_rate)
        return self.model.encode(wav[None])[0][0]       # codes of the only segment


class FrontEnd:
    """Turns audio into the recognizer's input: a codec's tokens, its latent, or log-mel."""

    def __init__(self, features: str, codec_path: str | Path, hop: int, device: str):
        """features: tokens, latent or mel; hop: for mel only, as a codec has its own."""
        self.features = features
        self.device = device
        self.meta = {"features": features, "sample_rate": SAMPLE_RATE, "hop": hop,
                     "codebooks": 0, "codebook_size": 0, "bitrate": 0}
        # "codec" identifies what makes the input; check_same_tokens in train_asr.py compares it.
        if features == "mel":
            self.encode = LogMel(mel_window(hop), hop, 80).to(device)
            self.meta |= {"codec": f"mel-{hop}", "dim": 80}
            return
        # Only the name counts: in meta.json, the path is relative, such as ../../encodec.
        own = Path(codec_path).name != "encodec"
        codec = Codec.load(codec_path, device) if own else Encodec(device)
        self.encode = codec.encode if features == "tokens" else codec.latent
        self.tables = codec.codebooks().cpu().numpy()                       # (Q, K, D)
        codebooks, size, dim = self.tables.shape
        self.meta |= {"codec": codec.fingerprint, "sample_rate": codec.sample_rate,
                      "hop": codec.hop, "dim": dim}
        if features == "tokens":
            self.meta |= {"codebooks": codebooks, "codebook_size": size, "bitrate": codec.bitrate}

    @torch.inference_mode()
    def __call__(self, wav: Tensor) -> np.ndarray:
        """wav (S,) -> tokens (T, Q) int16, or features (T, D) float16."""
        if self.features == "mel":                      # pad to whole frames, as codecs do
            wav = F.pad(wav, (0, -len(wav) % self.meta["hop"]))
        array = self.encode(wav[None].to(self.device))[0].T.cpu()
        return array.to(torch.int16 if self.features == "tokens" else torch.float16).numpy()


def read_utterance(noise: Noise, item: Utterance) -> np.ndarray | str:
    """-> wav (S,), at its speed, equalized and in its noise, or why it cannot be read.

    An array, because a tensor in transit between processes makes Ctrl-C end in a traceback.
    """
    try:
        wav = read_audio(item.audio)
        if item.speed != 1.0:           # as sox does: faster also means higher in pitch
            rate = round(SAMPLE_RATE * item.speed / 100)
            wav = torchaudio.functional.resample(wav, rate, SAMPLE_RATE // 100)
        if item.equalize:
            rng = np.random.default_rng([noise.seed, *item.id.encode()])
            wav = equalize(wav, item.equalize, rng)
        return (noise(wav, item) if item.noisy else wav).numpy()
    except ValueError as error:
        return str(error)


def equalize(wav: Tensor, decibels: float, rng: np.random.Generator) -> Tensor:
    """As if through another microphone: wav (S,) with a random gain in each octave, drawn from a
    normal distribution with this deviation in dB, and interpolated in between. The result begins
    up to 25 ms later, so that frames fall elsewhere."""
    wav = wav[rng.integers(min(400, len(wav))):]
    length = math.ceil(len(wav) / 4000) * 4000          # a length with a fast FFT
    hz = np.fft.rfftfreq(length, 1 / SAMPLE_RATE).clip(62.5)
    octaves = np.log2(hz / 62.5)                                            # 0 to 7
    gain = torch.from_numpy(np.interp(octaves, range(8), rng.normal(0, decibels, 8)))
    spectrum = torch.fft.rfft(wav, length) * 10 ** (gain / 20).float()
    return torch.fft.irfft(spectrum, length)[:len(wav)]


def with_copies(utterances: list[Utterance], args) -> list[Utterance]:
    """The utterances, and their copies: at other speeds, equalized if so asked, and in noise."""
    copies = []
    for item in utterances:
        for speed in args.speeds:
            copies.append(item._replace(id=f"{item.id}-speed{speed:g}", copy_of=item.id,
                                        speed=speed, duration=item.duration / speed,
                                        equalize=args.equalize))
        for number in range(args.copies if args.noise else 0):
            copies.append(item._replace(id=f"{item.id}.noise{number}", copy_of=item.id, noisy=True))
    return utterances + copies


def continue_folder(out: Path, meta: dict, args):
    """Raises ValueError if the folder holds tokens that were made otherwise. meta: all that is in
    meta.json. It is changed: a role that this command does not name keeps the subsets that an
    earlier command gave it."""
    arrays = {*out.rglob("*.npy")} - {out / "codebooks.npy"}
    if not (out / "meta.json").exists() or not arrays:
        return
    before = json.loads((out / "meta.json").read_text("utf-8"))
    for name, now in meta.items():
        if name not in ("train", "dev", "test", "codec_path") and before[name] != now:
            raise ValueError(f"{out} holds tokens with {name} {before[name]}, not {now}: give "
                             f"another --out, or delete it")
    for role in "train", "dev", "test":
        if not getattr(args, role):     # then find_subsets gave meta the usual ones that exist
            listed = [name for name in before[role]
                      if name in meta[role] or (out / f"{name}.jsonl").exists()]
            meta[role] = listed or meta[role]


def encode_subset(front_end: FrontEnd, utterances: list[Utterance], noise: Noise, folder: Path,
                  workers: int):
    """Write folder/<id>.npy for each utterance that has none, or whose audio has changed since, and
    say what cannot be read."""
    folder.mkdir(parents=True, exist_ok=True)
    # ctime is also set when a file is moved or copied here.
    changed = lambda path: path.stat().st_ctime if path.exists() else 0
    todo = [item for item in utterances
            if changed(folder / f"{item.id}.npy") < changed(item.audio)]
    loader = DataLoader(todo, batch_size=None, num_workers=workers,
                        collate_fn=partial(read_utterance, noise))      # called in the workers
    for wav, item in zip(tqdm(loader, folder.name, disable=None), todo):
        path = folder / f"{item.id}.npy"
        if isinstance(wav, str):                    # why it cannot be read
            tqdm.write(f"skipped: {wav}")
            path.unlink(missing_ok=True)            # that of an earlier recording
        else:
            write_atomically(path, front_end(torch.from_numpy(wav)), np.save)


def list_subset(out: Path, subset: str, utterances: list[Utterance], skipped: list[str],
                noise: Noise):
    """Write <subset>.jsonl and <subset>.skipped.txt, and say what is in them."""
    rows = []
    for item in utterances:
        array = out / subset / f"{item.id}.npy"
        if not array.exists():
            problem = read_utterance(noise, item)       # again, as it says why not
            skipped.append(problem if isinstance(problem, str) else
                           f"{item.audio}: can be read only now: repeat the command")
            continue
        rows.append(item._asdict() | {
            "audio": str(item.audio.resolve()), "duration": round(item.duration, 3),
            "frames": len(np.load(array, mmap_mode="r")), "array": f"{subset}/{array.name}"})
    hours = sum(row["duration"] for row in rows) / 3600
    print(f"{subset}: {len(rows)} utterances and copies, {hours:.2f} hours")
    save_skipped(out / f"{subset}.skipped.txt", [*dict.fromkeys(skipped)])
    if not rows:
        raise ValueError(f"{subset}: nothing that can be used; see {out}/{subset}.skipped.txt")
    write_rows(out / f"{subset}.jsonl", rows)


def tokenize(args):
    device, rank, world = start_processes(args.device)
    out = Path(args.out)
    # {"train": {"train-clean-5": [folders that have it]}, "dev": ...}
    corpus = find_subsets(args.corpus, train=args.train, dev=args.dev, test=args.test)
    front_end = FrontEnd(args.features, args.codec, args.hop, str(device))
    meta = front_end.meta | {role: list(subsets) for role, subsets in corpus.items()}
    meta |= {
        # Relative, so that the folders can move together; either may be behind a link.
        "codec_path": os.path.relpath(Path(args.codec).resolve(), out.resolve()),
        "corpus": args.corpus, "speeds": args.speeds, "equalize": args.equalize,
        "noise": args.noise, "snr": args.snr, "copies": args.copies, "seed": args.seed}
    continue_folder(out, meta, args)        # may change the subsets in meta
    if meta["train"] and not meta["dev"]:
        raise ValueError(f"{', '.join(args.corpus)}: train_asr.py needs a dev subset beside "
                         f"{', '.join(meta['train'])}; name one with --dev")
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "meta.json", json.dumps(meta, indent=1))
        if args.features == "tokens":
            write_atomically(out / "codebooks.npy", front_end.tables, np.save)

    for role, subsets in corpus.items():
        for subset, folders in subsets.items():
            if subset not in meta[role]:        # continue_folder kept those of an earlier command
                continue
            utterances, skipped = read_subset(folders, subset)
            noise = Noise(args.noise, args.snr, utterances, args.seed)
            # Whatever its role in this command: an earlier command may have called it train.
            if subset in meta["train"]:
                utterances = with_copies(utterances, args)
            encode_subset(front_end, utterances[rank::world], noise, out / subset, args.workers)
            if world > 1:
                dist.barrier()
            if rank == 0:
                list_subset(out, subset, utterances, skipped, noise)
    if rank == 0:
        name = "asr" if out.name == "tokens" else f"asr-{out.name}"
        command = ["train_asr.py", "--tokens", out, "--out", out.parent / name]
        if not corpus["train"]:
            command = ["evaluate.py", "--tokens", out, "--out", out / "eval"]
            published = Path(args.codec).with_name("asr.pt")        # lies beside its codec
            if published.exists():
                command += ["--asr", published]
        print(f"wrote {out}; next: python {shlex.join(map(str, command))}")


# -------------------------------------------------------------------------------------------- main

def parse(arguments=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = flag_group(parser, "speech")
    add("--corpus", ["synthetic"],
        "synthetic, mini-librispeech, librispeech, or folders, read as one corpus")
    add("--train", [], "subsets to train on, if not the usual ones")
    add("--dev", [], "subsets to measure progress on, likewise")
    add("--test", [], "subsets to evaluate on, likewise")
    add = flag_group(parser, "input of the recognizer")
    add("--codec", "runs/codec/codec.pt", "a trained codec, or encodec")
    add("--features", "tokens",
        "tokens, or what they are compared with: the codec's latent, log-mel",
        choices=("tokens", "latent", "mel"))
    add("--hop", 400,
        "samples per frame of log-mel: 400 = 40 Hz, like the tokens; 160 = the usual 10 ms")
    add = flag_group(parser, "copies of the train subsets")
    add("--speeds", [], "copies at these speeds, such as 0.9 1.1", type=float)
    add("--equalize", 0.0,
        "deviation in dB of a random gain in each octave of the --speeds copies, which then also "
        "begin up to 25 ms later")
    add("--noise", [], "copies in noise: white, pink, babble, or folders of audio")
    add("--snr", [0.0, 20.0], "range of their signal-to-noise ratio in dB",
        nargs=2, type=float, metavar=("LOW", "HIGH"))
    add("--copies", 1, "copies in noise of each utterance")
    add("--workers", 1, "processes that read audio while the codec works")
    add_common_flags(parser, "runs/tokens")

    args = parser.parse_args(arguments)
    if args.features == "mel":
        refuse_idle(parser, args, "with --features mel", "codec")
    else:
        refuse_idle(parser, args, "without --features mel", "hop")
    if not args.speeds:
        refuse_idle(parser, args, "without --speeds", "equalize")
    if not args.noise:
        refuse_idle(parser, args, "without --noise", "snr", "copies")
    if Path(args.codec).name == "encodec" and args.features == "latent":
        parser.error("--features latent needs a codec of ours, not encodec")
    if (min(args.hop, args.copies) < 1 or args.equalize < 0
            or not all(0.1 <= speed <= 10 for speed in args.speeds)):
        parser.error("--hop and --copies must be above 0, --equalize not below 0, --speeds between "
                     "0.1 and 10")
    folders = [CORPORA.get(name, (name,))[0] for name in args.corpus]
    if os.path.realpath(args.out) in map(os.path.realpath, folders):
        parser.error("--out cannot be a folder of --corpus")
    return args


def main(arguments=None):
    run_stage(tokenize, parse(arguments))


if __name__ == "__main__":
    main()
