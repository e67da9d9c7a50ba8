"""Stage 2: encode a corpus with a trained codec, once, into small files of tokens.

in   a corpus with transcripts, and runs/codec/codec.pt
out  runs/tokens/meta.json              which codec, frame rate, Q, K, D, subsets
     runs/tokens/codebooks.npy          (Q, K, D) float32: what the recogniser's embedding starts from
     runs/tokens/<subset>.jsonl         a row an utterance: id, text, lang, duration, frames, audio, array
     runs/tokens/<subset>/<id>.npy      tokens (T, Q) int16
     runs/tokens/<subset>.skipped.txt   what could not be used, and why

    python tokenize_corpus.py                                   # after codec.py
    python tokenize_corpus.py --features mel --out runs/mel     # the log-mel baseline, in the same layout

Legend: B utterances, S samples, T token frames, Q codebooks, K codes, D feature size.
Dhawan et al., arXiv 2407.03495, section 3: the recogniser never sees audio, only these files.
"""

import hashlib
import io
import json
import os
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile as sf
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from codec import (AUDIO_ENDINGS, SAMPLE_RATE, Codec, InputError, LogMel, corpus_subsets, everyone, find_audio, option, parse,
                   read_audio, read_manifest, run, start_processes, write_atomically)


@dataclass
class TokenSettings:
    corpus: str = option("synthetic", "synthetic, mini-librispeech, librispeech, or a folder with transcripts")
    train: tuple = option((), "subsets to train on", type=str)
    dev: tuple = option((), "subsets to choose the best epoch on", type=str)
    test: tuple = option((), "subsets to judge on", type=str)
    codec: str = option("runs/codec/codec.pt", "trained codec, or `encodec`")
    features: str = option("tokens", "tokens, or what they are compared with: the codec's latent, log-mel",
                           choices=("tokens", "latent", "mel"))
    kbps: float = option(6.0, "bitrate of --codec encodec: 1.5, 3 or 6 kbit/s")
    hop: int = option(400, "samples a frame of --features mel: 400 = 40 Hz as the tokens, 160 = the usual 10 ms")
    speeds: tuple = option((), "also copies of the train subsets at these speeds, such as 0.9 1.1", type=float)
    noise: tuple = option((), "kinds for noisy copies: white, pink, babble, or folders of audio", type=str)
    snr: tuple = option((0.0, 20.0), "LOW HIGH: range of the noisy copies' signal-to-noise ratio in dB", type=float)
    copies: int = option(1, "noisy copies of each train utterance, where --noise is given")
    workers: int = option(1, "processes that read audio while the codec works")
    seed: int = option(0, "random seed of the noise")
    device: str = option("auto", "auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))
    out: str = option("runs/tokens", "folder to write")

    def __post_init__(self):
        if len(self.snr) != 2 or self.snr[0] > self.snr[1]:
            raise InputError(f"--snr {' '.join(map(str, self.snr))}: give two numbers, LOW HIGH")
        if self.hop < 1 or self.workers < 0 or self.copies < 0 or self.seed < 0 or not all(0.1 <= speed <= 10 for speed in self.speeds):
            raise InputError("--hop must be at least 1, --workers, --copies and --seed at least 0, --speeds between 0.1 and 10")


class Utterance(NamedTuple):
    id: str
    text: str
    lang: str
    audio: Path
    duration: float         # seconds of the result: after a change of speed
    copy_of: str = ""       # id of the original, for copies
    speed: float = 1.0
    noisy: bool = False


# ---------------------------------------------------------------------------------------------------- transcripts

def read_subset(folder: Path, subset: str) -> tuple[list[Utterance], list[str]]:
    """A subset in any of the three layouts -> utterances, and a line on each thing that cannot be used."""
    if (folder / f"{subset}.jsonl").is_file():
        found, skipped = read_rows(folder / f"{subset}.jsonl")
    elif any(folder.glob(f"*/*/transcript_{subset}.txt")):
        found, skipped = read_ml_superb(folder, subset)
    else:
        found, skipped = read_librispeech(folder, subset)
    kept: dict[str, Utterance] = {}
    for name, text, lang, audio, *promised in found:    # seconds, where a manifest's row gives them
        text = " ".join(text.replace("\ufeff", "").split())
        if not name or len(name.encode(errors="replace")) > 200:                 # with its endings it must fit a file name, 255 bytes
            name = name[:40] + hashlib.sha256(name.encode(errors="replace")).hexdigest()[:16]
        try:
            f"{text}{lang}{audio}".encode()             # half characters of broken JSON, names of files in old encodings
            if not text:
                raise InputError(f"{audio}: its transcript is empty")
            if name in kept:
                raise InputError(f"{audio}: id {name} was seen before ({kept[name].audio})")
            if not os.path.isfile(audio):
                raise InputError(f"{audio}: no such file")
            info = sf.info(audio)
            seconds = info.frames / info.samplerate
            if promised and isinstance(promised[0], (int, float)) and promised[0] < 0.8 * seconds:
                raise InputError(f"{audio}: lasts {seconds:.1f} s, and its row means a piece of it; cut it out first")
            kept[name] = Utterance(name, text, lang, audio, seconds)
        except InputError as error:
            skipped.append(str(error))
        except UnicodeEncodeError:
            skipped.append(f"{str(audio)!a}: its name, transcript or language is not valid Unicode")
        except (sf.LibsndfileError, OSError, RuntimeError, ZeroDivisionError) as error:
            skipped.append(f"{audio}: not readable as audio ({str(error).splitlines()[0]})")
    return list(kept.values()), skipped


def read_librispeech(folder: Path, subset: str) -> tuple[list[tuple], list[str]]:
    """speaker/chapter/*.trans.txt, whose lines are an id and its words; audio files lie beside it."""
    audio, found, skipped = {}, [], []
    for path in find_audio(folder, subset):
        audio.setdefault(path.stem, []).append(path)
    for path in sorted((folder / subset).rglob("*.trans.txt")):
        for line in path.read_text("utf-8-sig", errors="replace").split("\n"):
            name, _, text = line.strip().replace("\t", " ").partition(" ")
            files = audio.get(name, [])
            files = [file for file in files if file.parent == path.parent] or files
            if len(files) == 1:
                found.append((name, text, "", files[0]))
            elif name:
                skipped.append(f"{path}: {name} " + (f"may be {files[0]} or {files[1]}" if files else "has no audio file"))
    with_text = {row[3] for row in found}
    skipped += [f"{path}: no transcript names it" for files in audio.values() for path in files if path not in with_text]
    return found, skipped


def read_rows(manifest: Path) -> tuple[list[tuple], list[str]]:
    """A manifest's rows hold audio_filepath and text, and perhaps lang, duration and offset."""
    rows, skipped = read_manifest(manifest)
    found = []
    for row in rows:
        # The id becomes a file name: whatever the path held, it cannot lead out of --out.
        name = re.sub(r"[^\w-]+", "-", str(Path(row["audio_filepath"]).with_suffix(""))).strip("-")
        seconds = 0.0 if row.get("offset") else row.get("duration")             # a piece from further on: never the whole file
        if isinstance(row.get("text") or "", str):
            found.append((name, row.get("text") or "", str(row.get("lang") or ""), manifest.parent / row["audio_filepath"], seconds))
        else:
            skipped.append(f"{manifest}: the text of {row['audio_filepath']} is none")
    return found, skipped


def read_ml_superb(folder: Path, subset: str) -> tuple[list[tuple], list[str]]:
    """<dataset>/<lang>/transcript_<subset>.txt, whose lines are id, duration (or a filler) and text, and wav/<id>.wav.

    The subsets of ML-SUPERB (arXiv 2305.10615) are called 10min_train, 1h_train, 10min_dev and so on."""
    found, skipped = [], []
    for path in sorted(folder.glob(f"*/*/transcript_{subset}.txt")):
        for line in path.read_text("utf-8-sig", errors="replace").split("\n"):
            parts = line.split(maxsplit=2)
            if len(parts) == 3 and Path(parts[0]).name == parts[0]:
                found.append((parts[0], parts[2], path.parent.name, path.parent / "wav" / f"{parts[0]}.wav"))
            elif parts:
                skipped.append(f"{path}: '{line[:60]}' is not a line of id, duration and text")
    return found, skipped


# ---------------------------------------------------------------------------------------------------- noise

class Noise:
    """Adds one kind of noise at a random signal-to-noise ratio; which, follows from the seed and the utterance's id."""

    def __init__(self, kinds: tuple, snr: tuple, speakers: list[Path], seed: int):
        """speakers: files that babble is made of; their names begin with the speaker, as LibriSpeech's do."""
        self.kinds, self.snr, self.seed, self.speakers, self.unreadable = kinds, snr, seed, defaultdict(list), set()
        for path in speakers:
            self.speakers[path.stem.split("-")[0]].append(path)
        if not -100 <= snr[0] <= snr[1] <= 1000:
            raise InputError(f"--snr {snr[0]:g} {snr[1]:g}: give numbers of dB, LOW HIGH, between -100 and 1000")
        self.files = {kind: sorted(path for path in Path(kind).rglob("*") if path.suffix.lower() in AUDIO_ENDINGS)
                      for kind in kinds if kind not in ("white", "pink", "babble")}
        for kind, files in self.files.items():
            if not files:
                raise InputError(f"--noise {kind}: not white, pink or babble, and no folder with audio files")

    def __call__(self, wav: Tensor, name: str, audio: Path) -> Tensor:
        """wav (S,), the utterance's id and file -> (S,)."""
        rng = np.random.default_rng([self.seed, *name.encode()])
        kind, snr = self.kinds[rng.integers(len(self.kinds))], rng.uniform(*self.snr)
        noise = torch.from_numpy(self.make(kind, len(wav), audio, rng)).float()
        gain = (wav.square().mean() / noise.square().mean().clamp(min=1e-10)).sqrt() * 10 ** (-snr / 20)
        return wav + gain * noise

    def make(self, kind: str, length: int, audio: Path, rng: np.random.Generator) -> np.ndarray:
        if kind in ("white", "pink"):
            white = rng.standard_normal(length)
            if kind == "white":
                return white
            # Pink: power falls as 1 / frequency, here from 20 Hz on. Half of it would lie below, which no speech meets.
            hz = np.fft.rfftfreq(length, 1 / SAMPLE_RATE)
            return np.fft.irfft(np.fft.rfft(white) * (hz >= 20) / np.sqrt(np.maximum(hz, 20)), length)
        if kind == "babble":                            # six recordings, of as many other voices as there are
            voices = [files for name, files in self.speakers.items() if name != audio.stem.split("-")[0]]
            voices = voices or [[path for path in sum(self.speakers.values(), []) if path != audio] or [audio]]
            six = np.resize(rng.permutation(len(voices)), 6)
            return sum(self.stretch(voices[i], rng.integers(len(voices[i])), length, rng) for i in six)
        files = self.files[kind]
        return self.stretch(files, rng.integers(len(files)), length, rng)

    def stretch(self, files: list[Path], number: int, length: int, rng: np.random.Generator) -> np.ndarray:
        """A random stretch of a file, or of the next that can be read, repeated where it is too short; its level set to 1."""
        for attempt in range(len(files)):
            path = files[(number + attempt) % len(files)]
            try:
                wav = read_audio(path).numpy()
                break
            except InputError as error:
                if attempt == len(files) - 1:
                    raise InputError(f"no noise can be read: {error}") from None
                if path not in self.unreadable:
                    tqdm.write(f"noise left out: {error}")
                    self.unreadable.add(path)
        level = np.mean(wav ** 2)
        for _ in range(100):                            # a recording may be silent for most of its time
            part = wav.take(np.arange(length) - rng.integers(len(wav)), mode="wrap")
            if np.mean(part ** 2) >= 0.1 * level:
                break
        return part / max(1e-5, float(np.sqrt(level)))


# ---------------------------------------------------------------------------------------------------- encoding

class Encodec:
    """The published EnCodec (pip install encodec; arXiv 2210.13438) behind the interface of our Codec."""

    def __init__(self, kbps: float, device: str, model=None):
        """kbps: 1.5, 3 or 6 = 2, 4 or 8 codebooks. model: an EncodecModel; None downloads the 24 kHz one."""
        if model is None:
            try:
                from encodec import EncodecModel
            except ImportError:
                raise InputError("--codec encodec: pip install encodec, or give the path of a codec of ours") from None
            try:
                model = EncodecModel.encodec_model_24khz()
            except OSError as error:
                raise InputError(f"--codec encodec: its weights cannot be downloaded ({error})") from None
        if kbps not in (1.5, 3, 6):
            raise InputError(f"--kbps {kbps:g}: give 1.5, 3 or 6")
        model.set_target_bandwidth(kbps)
        self.model, self.sample_rate = model.to(device).eval(), model.sample_rate
        self.num_codebooks = model.quantizer.get_num_quantizers_for_bandwidth(model.frame_rate, kbps)
        self.hop, self.bitrate = int(np.prod(model.encoder.ratios)), kbps * 1000
        self.fingerprint = f"encodec-{kbps:g}"
        self.quantizer = self               # codebooks() and its sizes are found where our Codec has them

    def codebooks(self) -> Tensor:
        return torch.stack([layer._codebook.embed for layer in self.model.quantizer.vq.layers[:self.num_codebooks]])

    @property
    def dim(self) -> int:
        return self.codebooks().shape[2]

    @property
    def codebook_size(self) -> int:
        return self.codebooks().shape[1]

    def encode(self, wav: Tensor, wav_len: Tensor) -> tuple[Tensor, Tensor]:
        """wav (B, S) at 16 kHz -> tokens (B, Q, T), token_len. One by one: in EnCodec, padding leaks into the codes."""
        tokens = []
        for row, length in zip(wav, wav_len.tolist()):
            row = torchaudio.functional.resample(row[:length], SAMPLE_RATE, self.sample_rate)
            tokens.append(self.model.encode(row[None, None])[0][0][0].T)        # (T, Q)
        return pad_sequence(tokens, batch_first=True).transpose(1, 2), torch.tensor([len(row) for row in tokens])


class FrontEnd:
    """What turns audio into the recogniser's input: a codec's tokens, its latent, or log-mel."""

    def __init__(self, features: str, codec_path: str, hop: int, device: str, kbps: float = 6.0):
        """hop: of log-mel; a codec has its own. kbps: of EnCodec."""
        self.device = device
        if features == "mel":
            self.mel = LogMel(512, hop, 80).to(device)
            self.encode, self.codebooks, self.type = self.log_mel, None, torch.float16
            self.meta = {"codec": f"mel-{hop}", "sample_rate": SAMPLE_RATE, "hop": hop, "bitrate": None,
                         "codebooks": 0, "codebook_size": 0, "dim": 80}
        else:
            codec = Encodec(kbps, device) if codec_path == "encodec" else Codec.load(codec_path, device)
            quantizer, is_tokens = codec.quantizer, features == "tokens"
            if not is_tokens and codec_path == "encodec":
                raise InputError("--features latent: only with a codec of ours, not with encodec")
            self.encode, self.type = (codec.encode, torch.int16) if is_tokens else (codec.latent, torch.float16)
            self.codebooks = quantizer.codebooks() if is_tokens else None
            self.meta = {"codec": codec.fingerprint, "sample_rate": codec.sample_rate, "hop": codec.hop,
                         "bitrate": codec.bitrate if is_tokens else None,
                         "codebooks": quantizer.num_codebooks if is_tokens else 0,
                         "codebook_size": quantizer.codebook_size, "dim": quantizer.dim}
        self.meta |= {"features": features, "codec_path": str(codec_path), "kbps": kbps}

    def log_mel(self, wav: Tensor, wav_len: Tensor) -> tuple[Tensor, Tensor]:
        """wav (B, S) -> (B, M, T), token_len (B,)."""
        return self.mel(F.pad(wav, (0, -wav.shape[1] % self.mel.hop))), -(-wav_len // self.mel.hop)

    @torch.inference_mode()
    def __call__(self, wavs: list[Tensor]) -> list[np.ndarray]:
        """wavs, (S,) each -> arrays as they are stored, (T, Q) int16 or (T, D) float16 each."""
        wav_len = torch.tensor([len(wav) for wav in wavs], device=self.device)
        features, lengths = self.encode(pad_sequence(wavs, batch_first=True).to(self.device), wav_len)    # (B, Q or D, T)
        features = features.transpose(1, 2).to(self.type).cpu().numpy()
        return [np.ascontiguousarray(row[:length]) for row, length in zip(features, lengths.tolist())]


class Audio(Dataset):
    """Reads (and degrades) utterances in worker processes; an unreadable one comes back as its error."""

    def __init__(self, utterances: list[Utterance], noise: Noise | None):
        self.utterances, self.noise = utterances, noise

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        item = self.utterances[index]
        try:
            wav = read_audio(item.audio)
            if item.speed != 1.0:                       # as sox does it: faster is also higher
                wav = torchaudio.functional.resample(wav, round(SAMPLE_RATE * item.speed / 100), SAMPLE_RATE // 100)
            return index, self.noise(wav, item.id, item.audio) if item.noisy else wav
        except InputError as error:
            return index, str(error)


def with_copies(utterances: list[Utterance], settings: TokenSettings) -> list[Utterance]:
    """The utterances, and their copies at other speeds and in noise."""
    everything = list(utterances)
    for speed in settings.speeds:
        everything += [item._replace(id=f"{item.id}-speed{speed:g}", copy_of=item.id, speed=speed, duration=item.duration / speed)
                       for item in utterances]
    for copy in range(settings.copies if settings.noise else 0):
        everything += [item._replace(id=f"{item.id}-noise{copy}", copy_of=item.id, noisy=True) for item in utterances]
    twice = [name for name, count in Counter(item.id for item in everything).items() if count > 1]
    if twice:
        raise InputError(f"--speeds, --noise: {twice[0]} would stand for two things; give each speed once, or rename the original")
    return everything


def batches(utterances: list[Utterance], seconds: float) -> list[list[int]]:
    """Indices in batches of like length, each of at most so many padded seconds (or one utterance)."""
    order = sorted(range(len(utterances)), key=lambda i: -utterances[i].duration)
    result, longest = [], 0.0
    for i in order:
        if not result or (len(result[-1]) + 1) * longest > seconds:
            result.append([])
            longest = utterances[i].duration
        result[-1].append(i)
    return result


def encode_subset(front_end: FrontEnd, utterances: list[Utterance], noise: Noise | None, folder: Path, workers: int) -> list[str]:
    """Write folder/<id>.npy for every utterance that has none yet -> lines on those that could not be read."""
    folder.mkdir(parents=True, exist_ok=True)
    for item in utterances:
        array = folder / f"{item.id}.npy"
        if array.exists() and array.stat().st_mtime < item.audio.stat().st_mtime:       # of what the file held before
            array.unlink()
    todo = [item for item in utterances if not frames_in(folder / f"{item.id}.npy", front_end.meta)]
    loader = DataLoader(Audio(todo, noise), batch_sampler=batches(todo, 20 if front_end.device == "cpu" else 600),
                        num_workers=workers if todo else 0, collate_fn=list)
    skipped, writes = [], []
    with ThreadPoolExecutor(1) as writer, tqdm(total=len(todo), desc=folder.name, disable=not todo) as bar:
        for batch in told(loader):
            skipped += [wav for _, wav in batch if isinstance(wav, str)]
            good = [(index, wav) for index, wav in batch if not isinstance(wav, str)]
            for (index, _), array in zip(good, front_end([wav for _, wav in good]) if good else ()):
                writes.append(writer.submit(save_array, folder / f"{todo[index].id}.npy", array))
            bar.update(len(batch))
            while writes and writes[0].done():
                writes.pop(0).result()                  # a full disk is told here
        for write in writes:
            write.result()
    return skipped


def told(loader: DataLoader):
    """The batches of a loader; the death of one of its processes is told in one line."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError("a process that reads audio died, maybe for want of (shared) memory; try --workers 0. "
                         "What was finished is kept, the same command continues") from None


def frames_in(path: Path, meta: dict) -> int:
    """Length of an array on disk; 0 when there is none. A damaged one is removed, and so made anew."""
    if not path.exists():
        return 0
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)                # its header fits the size of the file
        if array.dtype != ("int16" if meta["codebooks"] else "float16") or array.shape[1:] != (meta["codebooks"] or meta["dim"],):
            raise ValueError(f"it holds {array.dtype} {array.shape}")
        return len(array)
    except OSError:                                     # of the disk: the file may be sound
        raise
    except Exception as error:                          # numpy raises many types for a damaged file
        print(f"{path} was damaged and is removed ({error!r})")
        path.unlink()
        return 0


def save_array(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomically(path, buffer.getbuffer())


def write_rows(path: Path, utterances: list[Utterance], folder: Path, meta: dict) -> list[dict]:
    """<subset>.jsonl: a row for every utterance whose array was written."""
    rows = []
    for item in utterances:
        array = folder / f"{item.id}.npy"
        if frames := frames_in(array, meta):
            frame = meta["hop"] / meta["sample_rate"]
            seconds = min(max(item.duration, (frames - 1) * frame), frames * frame)     # a file's header may be wrong
            row = {"id": item.id, "text": item.text, "lang": item.lang, "duration": round(seconds, 3), "frames": frames,
                   "audio": str(item.audio.resolve()), "array": f"{folder.name}/{array.name}"}
            rows.append(row | ({"copy_of": item.copy_of, "noisy": item.noisy} if item.copy_of else {}))
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return rows


def tokenize(settings: TokenSettings) -> None:
    device, rank, world = start_processes(settings.device)
    out = Path(settings.out)
    folder, train, dev, test = corpus_subsets(settings.corpus, settings.train, settings.dev, settings.test)
    front_end = FrontEnd(settings.features, settings.codec, settings.hop, str(device), settings.kbps)
    meta = front_end.meta | {"corpus": str(folder.resolve()), "train": train, "dev": dev, "test": test, "speeds": settings.speeds,
                              "noise": settings.noise, "snr": settings.snr, "seed": settings.seed}
    subsets = {}
    for subset in dict.fromkeys((*train, *dev, *test)):
        if Path(subset).name != subset or subset == "..":                       # or it would lead out of --out
            raise InputError(f"{subset}: not the name of a subset of {folder}; give its folder as --corpus")
        subsets[subset] = read_subset(folder, subset)
    noises = {subset: Noise(settings.noise, settings.snr, [item.audio for item in subsets[subset][0]], settings.seed) for subset in train}
    check_same_codec(out / "meta.json", meta)
    if rank == 0:                                       # now that all flags are known to be good
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "meta.json", json.dumps(meta, indent=1).encode())
        if front_end.codebooks is not None:
            save_array(out / "codebooks.npy", front_end.codebooks.cpu().numpy())
    for subset, (utterances, skipped) in subsets.items():
        if subset in train:
            utterances = with_copies(utterances, settings)
        unread = encode_subset(front_end, utterances[rank::world], noises.get(subset), out / subset, settings.workers)
        skipped += sum(everyone(unread), [])            # also waits for the other processes
        if rank == 0:
            finish_subset(out, subset, utterances, skipped, meta)
    if rank == 0:
        print(f"wrote {out}; next: python train_asr.py --tokens {out}")


def finish_subset(out: Path, subset: str, utterances: list[Utterance], skipped: list[str], meta: dict) -> None:
    """Write <subset>.jsonl and <subset>.skipped.txt and say what is in them."""
    rows = write_rows(out / f"{subset}.jsonl", utterances, out / subset, meta)
    write_atomically(out / f"{subset}.skipped.txt", "".join(f"{line}\n" for line in skipped).encode())
    print(f"{subset}: {len(rows)} utterances, {sum(row['duration'] for row in rows) / 3600:.2f} hours")
    if skipped:
        print(f"  {len(skipped)} skipped, listed in {out / subset}.skipped.txt; the first: {skipped[0]}")
    if not rows:
        raise InputError(f"{subset}: nothing that can be used; see {out / subset}.skipped.txt")


def check_same_codec(path: Path, meta: dict) -> None:
    """Tokens of two codecs or corpora, or copies in two kinds of noise, must not be mixed in one folder."""
    if path.exists():
        try:
            before = dict(json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError):
            raise InputError(f"{path}: damaged, nothing tells which codec made the arrays beside it: "
                             f"give another --out, or delete {path.parent}") from None
        for name in ("features", "codec", "hop", "corpus", *(("noise", "snr", "seed") if before.get("noise") else ())):
            if before.get(name) != json.loads(json.dumps(meta[name])):
                raise InputError(f"{path.parent} holds {before.get('features')} with {name} {before.get(name)}, now {meta[name]}: "
                                 f"give another --out, or delete it")


def main(arguments: list[str] | None = None) -> None:
    tokenize(parse(TokenSettings, __doc__, arguments))


if __name__ == "__main__":
    run(main)
