"""Stage 1: train a neural audio codec: speech to a few integers per frame, and back.

in   a corpus of audio          synthetic speech, LibriSpeech, or any folder; no transcripts needed
out  runs/codec/codec.pt        the codec, in half precision: all that the other stages need
     runs/codec/resume.pt       the state of training; the same command continues from it
     runs/codec/report.json     how well the codec reproduces 32 random pieces of dev audio
     runs/codec/log.jsonl       the losses, every 100 steps
     runs/codec/skipped.txt     files that process 0 could not read in the latest run

    python codec.py                                               # synthetic speech, a few minutes
    python codec.py --corpus mini-librispeech --steps 6000 --batch 16 --out runs/mini/codec
    python codec.py --corpus my-audio --train recordings --steps 6000 --out runs/my/codec
    python codec.py --reconstruct in.wav out.wav                  # hear what the tokens keep

The log lines: `mel` is the distance between log-mel spectrograms of speech and reconstruction,
`wave` the mean absolute difference of the waveforms, `quantizer` RVQ's distance from the latent to
its codes, or FSQ's penalty on correlated dimensions. `usage` is the share of the codes that
occurred since the last line, `perplexity` the number of equally frequent codes with the same
entropy; both are means over the codebooks. With --adversarial, `adversarial` falls as the
discriminator mistakes more reconstructions for speech, and `matching` as its layers respond more
alike to both.

wav (B, S) -> encoder -> latent (B, D, T) -> quantizer -> tokens (B, Q, T) -> decoder -> wav (B, S)
Legend: B utterances, S samples, T token frames, D latent size, Q codebooks, K codes in each,
C channels, M mel bands.

Read the encoders, the decoder, `Codec`, the losses and `train`. The sections on files and corpora
serve all stages and can be skimmed; the last two, downloads and synthetic speech, can be skipped.

Dhawan et al., arXiv 2407.03495, section 2. The mel encoder and the losses follow NVIDIA's published
recipes (NeMo audio_codec_16000 and mel_codec). The decoder is Vocos (arXiv 2306.00814) instead of
HiFi-GAN: it predicts spectra, not samples, so that a codec can be trained without a GPU.
"""

import hashlib
import json
import math
import os
import shlex
import shutil
import socket
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn
from tqdm import tqdm

from quantizers import GroupFSQ, Quantized, ResidualVQ, usage_and_perplexity

SAMPLE_RATE = 16_000

# Channels of the time encoder's first layer, of the mel encoder, and of the decoder; blocks of the
# mel encoder, and of the decoder. `tiny` and `small` train on a laptop; `base` needs a GPU.
SIZES = {"tiny": (16, 128, 128, 2), "small": (32, 192, 256, 4), "base": (64, 384, 512, 6)}


# ---------------------------------------------------------------------------------------- encoders

def conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Module:
    """T steps in give T / stride steps out. The kernel shrinks by one where both
    sides could not be padded alike."""
    kernel -= (kernel - stride) % 2
    return nn.Conv1d(channels_in, channels_out, kernel, stride, padding=(kernel - stride) // 2)


class Residual(nn.Module):
    """y + conv(act(conv(act(y)))), (B, C, T) -> (B, C, T)."""

    def __init__(self, channels: int, inner: int, act: nn.Module):
        super().__init__()
        self.body = nn.Sequential(act, conv(channels, inner, 3), act, conv(inner, channels, 1))

    def forward(self, y: Tensor) -> Tensor:
        return y + self.body(y)


class LogMel(nn.Module):
    """wav (B, S) -> log of mel energies (B, M, S / hop); frame t is centered on sample t * hop."""

    def __init__(self, n_fft: int, hop: int, n_mels: int):
        super().__init__()
        self.mel = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE, n_fft, hop_length=hop, n_mels=n_mels, pad_mode="constant")

    def forward(self, wav: Tensor) -> Tensor:
        mel = self.mel(wav)[..., :-1]           # without the last of S / hop + 1 frames
        return mel.clamp(min=1e-5).log()


def mel_window(hop: int) -> int:
    """Samples of the analysis window: a power of two that covers at least two hops, and 32 ms."""
    return max(512, 1 << (2 * hop - 1).bit_length())


class MelEncoder(nn.Module):
    """wav (B, S) -> latent (B, D, T). Two log-mel frames make one token frame.

    The final BatchNorm gives every dimension of the latent mean 0 and deviation 1, so that the
    codes are in use from the first step. In evaluation, scale and shift are fixed.
    """
    chunk = 600         # token frames that Codec.chunks encodes at once: bounds memory

    def __init__(self, dim: int, hop: int, channels: int, blocks: int):
        super().__init__()
        window = mel_window(hop // 2)
        self.mel = LogMel(window, hop // 2, 80)
        # Token frames seen on each side: one per block, a mel window, and some to spare.
        self.context = blocks + 3 + window // hop
        self.net = nn.Sequential(
            conv(80, channels, 4, stride=2),
            *(Residual(channels, channels, nn.ELU()) for _ in range(blocks)),
            nn.ELU(), conv(channels, dim, 1), nn.BatchNorm1d(dim, affine=False))

    def forward(self, wav: Tensor) -> Tensor:
        return self.net((self.mel(wav) + 4.4) / 4.0)        # speech: about mean 0, deviation 1


class TimeEncoder(nn.Module):
    """wav (B, S) -> latent (B, D, T): SEANet (EnCodec, arXiv 2210.13438) without its LSTM.

    Each stride shortens the time axis, and each but the first doubles the channels; between them
    are residual units. SEANet's first convolution and residual unit, at the full sample rate, are
    left out, because they cost the most. Four more departures let it learn within minutes what a
    log-mel spectrum gives for free, the energy in each band of frequencies:
    - LeakyReLU, which rectifies however quiet the sound is. ELU is nearly a straight line around 0.
    - He initialization, which keeps the size of the signal from layer to layer.
    - A LayerNorm of each frame, so that quiet frames are not all rounded to one code.
    - Two wide residual units at the token rate, where they are cheap.
    """
    chunk = 200         # token frames encoded at once: bounds memory
    context = 8         # token frames seen on each side: 3 by self.top, the rest by self.down

    def __init__(self, dim: int, strides: list[int], channels: int):
        super().__init__()
        act = nn.LeakyReLU(0.1)
        layers = [conv(1, channels, 4 * strides[0], strides[0])]
        for stride in strides[1:]:
            layers += [Residual(channels, channels // 2, act), act,
                       conv(channels, 2 * channels, 2 * stride, stride)]
            channels *= 2
        self.down = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(channels)
        self.top = nn.Sequential(
            Residual(channels, channels, act), Residual(channels, channels, act), act,
            conv(channels, dim, 3), nn.BatchNorm1d(dim, affine=False))
        for layer in self.modules():
            if isinstance(layer, nn.Conv1d):
                nn.init.kaiming_normal_(layer.weight, 0.1)
                nn.init.zeros_(layer.bias)

    def forward(self, wav: Tensor) -> Tensor:
        y = self.down(4 * wav[:, None])         # lifts quiet recordings to a deviation of about 0.3
        y = self.norm(y.mT).mT                  # over C
        return self.top(y)


# ----------------------------------------------------------------------------------------- decoder

class ConvNeXt(nn.Module):
    """Depthwise convolution over time, then two layers on each frame (Vocos, section 3.2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, 7, padding=3, groups=channels)
        self.frame = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, 3 * channels), nn.GELU(),
            nn.Linear(3 * channels, channels))
        self.scale = nn.Parameter(torch.full((channels,), 0.3))

    def forward(self, y: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T)."""
        frames = self.depthwise(y).mT
        return y + (self.frame(frames) * self.scale).mT


class Decoder(nn.Module):
    """latent (B, D, T) -> wav (B, T * hop), by predicting the complex spectrum and inverting it.

    The first blocks work at the token rate, where they are cheap and see far; the last ones at a
    hop of about 100 samples, fine enough for the pulses of the voice.
    """

    def __init__(self, dim: int, hop: int, wide: int, blocks: int):
        super().__init__()
        # Spectrum frames per token frame: the divisor n of hop for which hop / n is nearest to 100.
        divisors = [n for n in range(1, hop + 1) if hop % n == 0]
        self.up = min(divisors, key=lambda n: abs(hop / n - 100))
        self.spectrum_hop = hop // self.up
        self.n_fft = 4 * self.spectrum_hop
        slim = wide * 3 // 4
        self.slow = nn.Sequential(conv(dim, wide, 7), *(ConvNeXt(wide) for _ in range(blocks)))
        self.widen = conv(wide, slim * self.up, 3)
        self.fast = nn.Sequential(*(ConvNeXt(slim) for _ in range(blocks)))
        self.head = nn.Sequential(nn.LayerNorm(slim), nn.Linear(slim, self.n_fft + 2))

    def forward(self, latent: Tensor) -> Tensor:
        y = self.widen(self.slow(latent))                               # (B, slim * up, T)
        y = y.unflatten(1, (-1, self.up)).mT.flatten(2)                 # (B, slim, T * up)
        y = self.head(self.fast(y).mT).mT                               # (B, n_fft + 2, T * up)
        log_magnitude, phase = y.chunk(2, 1)
        spectrum = torch.polar(log_magnitude.clamp(max=5).exp(), phase)
        window = torch.hann_window(self.n_fft, device=y.device)
        return torch.istft(spectrum, self.n_fft, self.spectrum_hop, window=window,
                           length=y.shape[2] * self.spectrum_hop)


# ------------------------------------------------------------------------------------------- codec

class Codec(nn.Module):
    """Encoder, quantizer and decoder.

        codec = Codec.load("runs/codec/codec.pt")
        tokens = codec.encode(wav)          # (B, S) -> (B, Q, T), T = ceil(S / hop)
        wav = codec.decode(tokens)          # (B, Q, T) -> (B, T * hop)

    All wavs in a call must have the same length. Encode recordings one by one: then no padding can
    change a token.
    """
    sample_rate = SAMPLE_RATE

    def __init__(self, encoder: str = "mel", quantizer: str = "rvq", strides=(2, 4, 5, 10),
                 codebooks: int = 8, codebook_size: int = 1024, size: str = "tiny"):
        """encoder "mel" or "time"; quantizer "rvq" or "fsq", which always has 1000 codes."""
        super().__init__()
        self.config = dict(encoder=encoder, quantizer=quantizer, strides=strides,
                           codebooks=codebooks, codebook_size=codebook_size, size=size)
        self.hop = math.prod(strides)
        self.frame_rate = SAMPLE_RATE / self.hop                # token frames per second
        if quantizer == "rvq":
            self.quantizer = ResidualVQ(128, codebooks, codebook_size)
        else:
            self.quantizer = GroupFSQ(codebooks)
        bits = codebooks * math.log2(self.quantizer.codebook_size)
        self.bitrate = self.frame_rate * bits                   # bits per second
        time_width, mel_width, decoder_width, blocks = SIZES[size]
        dim = self.quantizer.dim
        if encoder == "mel":
            self.encoder = MelEncoder(dim, self.hop, mel_width, blocks)
        else:
            self.encoder = TimeEncoder(dim, strides, time_width)
        self.decoder = Decoder(dim, self.hop, decoder_width, blocks)

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that identify this encoder and these codebooks."""
        digest = hashlib.sha256(json.dumps(self.config).encode())
        for weights in (*self.encoder.state_dict().values(), self.codebooks()):
            digest.update(weights.cpu().numpy().tobytes())
        return digest.hexdigest()[:12]

    def codebooks(self) -> Tensor:
        """(Q, K, D): the quantized latent is the sum of one row of each."""
        return self.quantizer.codebooks()

    def forward(self, wav: Tensor) -> tuple[Tensor, Quantized]:
        """For training: wav (B, S), S a multiple of hop -> reconstruction (B, S), Quantized."""
        quantized = self.quantizer(self.encoder(wav))
        return self.decoder(quantized.latent), quantized

    @torch.inference_mode()
    def encode(self, wav: Tensor) -> Tensor:
        """wav (B, S) -> tokens (B, Q, T) int64."""
        return torch.cat([self.quantizer.encode(part) for part in self.chunks(wav)], 2)

    @torch.inference_mode()
    def latent(self, wav: Tensor) -> Tensor:
        """The encoder's output before quantization: wav (B, S) -> (B, D, T)."""
        return torch.cat([*self.chunks(wav)], 2)

    def chunks(self, wav: Tensor) -> Iterator[Tensor]:
        """Latent of one chunk after another, each with as much context as the encoder sees."""
        chunk = self.encoder.chunk
        context = self.encoder.context
        wav = F.pad(wav, (0, -wav.shape[1] % self.hop))         # to whole frames
        for start in range(0, wav.shape[1] // self.hop, chunk):
            first = max(0, start - context)
            part = wav[:, first * self.hop:(start + chunk + context) * self.hop]
            yield self.encoder(part)[..., start - first:start - first + chunk]

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """tokens (B, n, T), n <= Q -> wav (B, T * hop)."""
        return self.decoder(self.quantizer.decode(tokens.long()))

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "Codec":
        """A trained codec. Raises ValueError when the file is missing, damaged, or not a codec."""
        saved = load_checkpoint(path, "codec")
        try:
            codec = cls(**saved["config"])
            codec.load_state_dict(saved["model"])
        except (KeyError, TypeError, RuntimeError):
            raise ValueError(f"{path}: an incomplete codec; copy or train it again")
        return codec.to(device).eval()


# ------------------------------------------------------------------------------------------ losses

# "quantizer" is RVQ's commitment or FSQ's redundancy; the last two come with --adversarial.
WEIGHTS = {"mel": 1.0, "wave": 0.1, "quantizer": 1.0, "adversarial": 1.0, "matching": 2.0}


class MelDistance(nn.Module):
    """Distance of log-mel spectra at seven resolutions, from fine in time to fine in frequency."""

    BANDS = {32: 5, 64: 10, 128: 20, 256: 40, 512: 80, 1024: 120, 2048: 160}    # window: mel bands

    def __init__(self):
        super().__init__()
        self.mels = nn.ModuleList(
            LogMel(n_fft, n_fft // 4, n_mels) for n_fft, n_mels in self.BANDS.items())

    def forward(self, wav: Tensor, other: Tensor) -> Tensor:
        """(B, S), (B, S) -> (): mean over resolutions of L1 + L2."""
        total = 0.0
        for mel in self.mels:
            difference = (mel(wav) - mel(other)) / 2    # log amplitude is half of log energy
            total += difference.abs().mean() + difference.square().mean()
        return total / len(self.mels)


class Discriminator(nn.Module):
    """Judges complex spectrograms at three resolutions (EnCodec, section 3.4)."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList()
        for n_fft in 2048, 1024, 512:
            spectrogram = torchaudio.transforms.Spectrogram(
                n_fft, hop_length=n_fft // 4, power=None, normalized="frame_length",
                pad_mode="constant")
            layers = [spectrogram, nn.Conv2d(2, 32, (3, 9), padding="same")]
            for dilation in 1, 2, 4:
                layers.append(nn.Conv2d(32, 32, (3, 9), stride=(1, 2), padding=(dilation, 4),
                                        dilation=(dilation, 1)))
            layers.append(nn.Conv2d(32, 1, 3, padding=1))
            self.nets.append(nn.ModuleList(layers))

    def forward(self, wav: Tensor) -> list[list[Tensor]]:
        """wav (B, S) -> for each resolution the outputs of its layers, the last being the score."""
        outputs = []
        for spectrogram, *layers in self.nets:
            y = torch.view_as_real(spectrogram(wav)).permute(0, 3, 2, 1)    # (B, 2, frames, bins)
            outputs.append([])
            for layer in layers:
                y = layer(y)
                outputs[-1].append(y)
                y = F.leaky_relu(y, 0.2)
        return outputs


def generator_losses(discriminator: Discriminator, wav: Tensor, made: Tensor) -> dict[str, Tensor]:
    """Least-squares GAN loss, and feature matching: means over resolutions and layers. made is
    the reconstruction of wav, both (B, S)."""
    with torch.no_grad():
        real = discriminator(wav)
    scores = []
    matching = []
    for of_wav, of_made in zip(real, discriminator(made)):          # the last output is the score
        scores.append((of_made[-1] - 1).square().mean())
        matching += [F.l1_loss(a, b) / b.abs().mean() for a, b in zip(of_made[:-1], of_wav)]
    return {"adversarial": sum(scores) / len(scores), "matching": sum(matching) / len(matching)}


def discriminator_loss(discriminator: nn.Module, wav: Tensor, made: Tensor) -> Tensor:
    """Real speech should score 1, reconstructions 0."""
    total = 0.0
    outputs = discriminator(torch.cat([wav, made.detach()]))
    for layers in outputs:
        real, fake = layers[-1].chunk(2)
        total += (real - 1).square().mean() + fake.square().mean()
    return total / len(outputs)


# ------------------------------------------------------- files, devices and flags, for all stages

write_text = partial(Path.write_text, encoding="utf-8", errors="replace")


def write_atomically(path: Path, data, save: Callable = write_text):
    """save(path, data), so that a reader finds the old file or the new one, never half of one."""
    temporary = path.with_name(f".part-{path.name}")
    try:
        save(temporary, data)
        temporary.replace(path)
    # torch raises these on a full disk, soundfile on an unknown file ending.
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: cannot be written ({error})")
    finally:
        temporary.unlink(missing_ok=True)


def write_rows(path: Path, rows: list[dict]):
    """One row per line, as JSON."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def save_run(out: Path, state: dict, **more):
    """Write <kind>.pt, the state with weights in half precision, for the next stages; resume.pt, in
    full precision and with all else that resuming needs; and the log."""
    weights = {name: value.half() if value.is_floating_point() else value
               for name, value in state["model"].items()}
    save = lambda path, checkpoint: torch.save(checkpoint, path)
    # Both are whole before either is replaced: a full disk leaves the pair of the last checkpoint.
    write_atomically(out / "resume.new", state | more, save)
    write_atomically(out / f"{state['kind']}.pt", state | {"model": weights}, save)
    os.replace(out / "resume.new", out / "resume.pt")
    write_rows(out / "log.jsonl", state["log"])


def save_skipped(path: Path, messages: list[str]):
    """Write what could not be used, one line each, and print how many."""
    write_atomically(path, "".join(f"{message}\n" for message in messages))
    if messages:
        print(f"  {len(messages)} skipped, named in {path}: {messages[0]!a}")


def load_checkpoint(path: str | Path, kind: str) -> dict:
    """Raises ValueError unless path holds a checkpoint of this kind. Runs no code from the file."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["kind"] == kind:
            return saved
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; train it first, or give its path")
    except Exception:                   # torch raises many types for a damaged file
        pass
    raise ValueError(f"{path}: damaged, or not a {kind} checkpoint of this project")


def check_same_flags(path: Path, flags: dict, args):
    """A run resumes only with the flags that it began with, which the checkpoint at path holds;
    but --steps and --epochs may grow, and --out, --tokens and --device may change."""
    for name, before in flags.items():
        now = vars(args)[name]
        grown = name in ("steps", "epochs") and now > before
        if name not in ("device", "out", "tokens") and now != before and not grown:
            raise ValueError(f"{path} was trained with --{name.replace('_', '-')} {before}, "
                             f"not {now}: give another --out, or delete {path.parent}")


def flag_group(parser: ArgumentParser, title: str) -> Callable:
    """-> add(name, default, text, **more), for the flags of a group. A flag has the type of its
    default; a list takes several words: paths, or names (read like paths), unless `more` has
    a type."""
    group = parser.add_argument_group(title)

    def add(name, default, text, **more):
        if default is False:
            more["action"] = "store_true"
        elif isinstance(default, list):
            more = {"nargs": "+", "type": os.path.normpath} | more
        elif default is not None:
            more["type"] = type(default)
        if default not in (None, []):
            text += f" (default: {default})"
        group.add_argument(name, default=default, help=text, **more)
    return add


def add_common_flags(parser: ArgumentParser, out: str):
    add = flag_group(parser, "running")
    add("--seed", 0, "random seed: weights, data order, masks, noise")
    add("--device", "auto", "where to run: auto, cpu, cuda or mps")
    add("--out", out, "folder to write")


def refuse_idle(parser: ArgumentParser, args, why: str, *names: str):
    """An error if a flag was given that has no effect."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no effect {why}")


def pick_device(name: str) -> str:
    best = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name not in ("auto", "cpu", best):
        raise ValueError(f"--device {name}: not available here; try --device cpu")
    return best if name == "auto" else name


def start_processes(name: str):
    """-> device, rank, number of processes: more than one if torchrun started this script."""
    device = pick_device(name)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        # The others may have to wait while the first one downloads a corpus.
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=12))
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
    return torch.device(device), int(os.environ.get("RANK", 0)), world


def run_stage(stage: Callable, args):
    """Bad input and Ctrl-C end a script with one line."""
    try:
        if not 0 <= args.seed < 1e9:
            raise ValueError(f"--seed {args.seed}: must be at least 0, and below a billion")
        stage(args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (ValueError, OverflowError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted: files already written are kept; repeat the command to finish",
              file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------------------- training

@dataclass
class Crops:
    """Random crops of audio files. Crop n depends on seed and n alone, so that runs can resume."""
    files: list[Path]           # each once
    seed: int
    length: int                 # of a crop, in samples
    batch: int                  # crops per step, over all processes
    unreadable: dict = field(default_factory=dict)      # path: why

    def __getitem__(self, number: int) -> Tensor:
        """-> wav (length,). A file that cannot be read is replaced by another."""
        rng = np.random.default_rng((self.seed, number))
        for _ in range(20 * len(self.files)):       # another part of a damaged file may do
            path = self.files[rng.integers(len(self.files))]
            try:
                wav = read_audio(path, self.length / SAMPLE_RATE, at=rng.random())
                return F.pad(wav, (0, self.length - len(wav)))      # or cut
            except ValueError as error:
                self.unreadable[path] = str(error)
        raise ValueError(f"of {len(self.files)} audio files, none can be read; name subsets with "
                         f"--train and --dev. {next(iter(self.unreadable.values()), '')}")

    def batch_of(self, step: int, rank: int = 0, world: int = 1) -> Tensor:
        """This process's share of a training step: (batch / world, length)."""
        numbers = range(step * self.batch + rank, (step + 1) * self.batch, world)
        return torch.stack([self[number] for number in numbers])


@torch.no_grad()
def start_codebooks(codec: Codec, crops: Crops):
    """RVQ's k-means on the untrained encoder's latent of the first crops: eight frames per code.

    Every process encodes the same crops; DistributedDataParallel then copies process 0's codebooks.
    """
    frames = crops.batch * crops.length // codec.hop                        # per step
    steps = -(-8 * codec.quantizer.codebook_size // frames)
    device = codec.codebooks().device
    latents = [codec.encoder(crops.batch_of(step).to(device)) for step in range(steps)]
    codec.quantizer.initialize(torch.cat(latents).mT.flatten(0, 1))


def learning_rate(step: int, args) -> float:
    """Linear warm-up over 100 steps, times half a cosine that falls to a twentieth of the peak."""
    decay = 0.525 + 0.475 * math.cos(math.pi * step / args.steps)
    return args.lr * decay * min(1, (step + 1) / 100)


def optimize(loss: Tensor, optimizer: torch.optim.Optimizer, lr: float):
    """One optimizer step. Gradients are clipped, so that a click in one file does no harm."""
    (group,) = optimizer.param_groups
    group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def log_row(recent: list[tuple], codec: Codec) -> dict:
    """recent: losses and tokens of some steps -> mean losses, and how evenly codes were used."""
    losses, tokens = zip(*recent)
    row = {name: sum(each[name].item() for each in losses) / len(losses) for name in losses[0]}
    if not math.isfinite(sum(row.values())):
        raise ValueError("the loss is no longer finite: look for odd audio, or try a lower --lr, "
                         "with another --out")
    usage, perplexity = usage_and_perplexity(torch.cat(tokens, 2), codec.quantizer.codebook_size)
    return row | {"usage": usage.mean().item(), "perplexity": perplexity.mean().item()}


def resume_codec(out: Path, args) -> dict | None:
    """The state to continue from, if any: what `train` saves.

    `--adversarial` on a codec that was finished without it trains its decoder alone, in a new run
    with its own --steps, --batch and so on.
    """
    path = out / "resume.pt"
    if not path.exists():
        path = out / "codec.pt"         # a published codec comes without its resume.pt
    if not path.exists():
        return None
    saved = load_checkpoint(path, "codec")
    flags = saved["flags"]
    if args.adversarial and not flags["adversarial"] and saved["step"] == flags["steps"]:
        # Encoder, quantizer, strides, codebooks, their size and --size must stay.
        check_same_flags(path, saved["config"], args)
        return saved | {"decoder_only": True, "step": 0, "log": [], "optimizers": []}
    if path.name == "codec.pt":
        raise ValueError(f"{out} holds a codec.pt without its resume.pt: give another --out")
    check_same_flags(path, flags, args)
    return saved


def train(args):
    device, rank, world = start_processes(args.device)
    if args.batch % world:
        raise ValueError(f"--batch {args.batch}: must be a multiple of the {world} processes")
    # {"train": {"train-clean-5": [folders that have it]}, "dev": ...}
    corpus = find_subsets(args.corpus, train=args.train, dev=args.dev)
    files = audio_files(corpus["train"])
    dev = audio_files(corpus["dev"])
    torch.manual_seed(args.seed)
    codec = Codec(args.encoder, args.quantizer, args.strides, args.codebooks, args.codebook_size,
                  args.size).to(device)
    discriminator = Discriminator().to(device)
    mel_distance = MelDistance().to(device)
    # At least two frames, for BatchNorm, and 512 samples, the largest hop of MelDistance: 2048 / 4.
    frames = max(2, math.ceil(512 / codec.hop), round(args.crop * codec.frame_rate))
    crops = Crops(files, args.seed, frames * codec.hop, args.batch)
    dev_crops = Crops(dev, seed=0, length=100 * codec.hop, batch=32)        # 2.5 s each at 40 Hz
    if dev:
        dev_crops[0]                    # fails now, not after training, if none can be read

    nets = [codec, discriminator]       # the discriminator learns only with --adversarial
    optimizers = [torch.optim.AdamW(net.parameters(), betas=(0.8, 0.99)) for net in nets]
    start = 0
    log = []
    decoder_only = False
    out = Path(args.out)
    saved = resume_codec(out, args)
    if saved:
        start = saved["step"]
        log = saved["log"]
        decoder_only = saved["decoder_only"]
        codec.load_state_dict(saved["model"])
        if saved["optimizers"]:         # resume_codec drops them where the decoder trains alone
            discriminator.load_state_dict(saved["discriminator"])
            for optimizer, state in zip(optimizers, saved["optimizers"]):
                optimizer.load_state_dict(state)
    elif args.quantizer == "rvq":
        start_codebooks(codec, crops)
    if decoder_only:                    # tokens and fingerprint stay as they are
        codec.encoder.eval().requires_grad_(False)
        codec.quantizer.learning = False            # GroupFSQ never learns
    if world > 1:
        nets = [nn.parallel.DistributedDataParallel(net) for net in nets]
    codec_net, discriminator_net = nets
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        print(f"codec: {args.encoder} encoder, {args.quantizer}, {codec.frame_rate:g} Hz, "
              f"{codec.bitrate / 1000:.1f} kbit/s; {len(files)} files; step {start} of "
              f"{args.steps} on {device}")

    recent = []                         # losses and tokens since the last checkpoint
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(crops.batch_of, start, rank, world)
        for step in tqdm(range(start, args.steps), "codec", disable=True if rank else None):
            wav = ahead.result().to(device)                             # (B, S)
            ahead = reader.submit(crops.batch_of, step + 1, rank, world)
            # Reseed, so that a resumed run draws the same numbers.
            torch.manual_seed((args.seed * 1_000_000 + step) * world + rank)
            lr = learning_rate(step, args)

            made, quantized = codec_net(wav)
            losses = {"mel": mel_distance(wav, made), "wave": F.l1_loss(made, wav),
                      "quantizer": quantized.loss}
            if args.adversarial:
                if step % 3 < 2:        # the discriminator learns in two of every three steps
                    optimize(discriminator_loss(discriminator_net, wav, made), optimizers[1], lr)
                # Without DistributedDataParallel, as the discriminator does not learn from these.
                losses |= generator_losses(discriminator, wav, made)
            total = sum(WEIGHTS[name] * value for name, value in losses.items())
            optimize(total, optimizers[0], lr)
            recent.append(({name: value.detach() for name, value in losses.items()},
                           quantized.tokens))

            done = step + 1
            if done % 100 == 0 or done == args.steps:
                log.append({"step": done} | log_row(recent, codec))
                recent.clear()
                if rank == 0:
                    tqdm.write(" | ".join(f"{key} {value:.6g}" for key, value in log[-1].items()))
                    state = {"kind": "codec", "config": codec.config, "flags": vars(args),
                             "decoder_only": decoder_only, "step": done, "log": log,
                             "model": codec.state_dict()}
                    save_run(out, state, discriminator=discriminator.state_dict(),
                             optimizers=[item.state_dict() for item in optimizers])
    if rank == 0:
        if dev:
            report(out, dev_crops)
        save_skipped(out / "skipped.txt", [*(crops.unreadable | dev_crops.unreadable).values()])
        command = ["tokenize_corpus.py", "--codec", out / "codec.pt",
                   "--out", out.parent / "tokens"]
        for name in "corpus", "train", "dev":
            if getattr(args, name):
                command += [f"--{name}", *getattr(args, name)]
        print(f"wrote {out / 'codec.pt'}; next: python {shlex.join(map(str, command))}")


def report(out: Path, crops: Crops):
    """Mel distance, usage and perplexity on one batch of dev audio -> out/report.json."""
    codec = Codec.load(out / "codec.pt")
    wav = crops.batch_of(0)
    tokens = codec.encode(wav)
    mel_distance = MelDistance()(wav, codec.decode(tokens))
    # A row of the log, as if of one step with one loss.
    row = log_row([({"mel_distance": mel_distance}, tokens)], codec)
    text = json.dumps(row | {"fingerprint": codec.fingerprint}, indent=1)
    print(f"dev: {text}")
    write_atomically(out / "report.json", text)


def reconstruct(args):
    """Encode and decode one file."""
    source, target = map(Path, args.reconstruct)
    device = pick_device(args.device)
    codec = Codec.load(args.codec, device)
    if not 0 <= args.codebooks <= codec.quantizer.num_codebooks:
        raise ValueError(f"--codebooks {args.codebooks}: {args.codec} has "
                         f"{codec.quantizer.num_codebooks}")
    wav = read_audio(source)
    tokens = codec.encode(wav[None].to(device))[:, :args.codebooks or None]
    made = codec.decode(tokens)[0, :len(wav)].cpu()
    write_atomically(target, made.numpy(), partial(sf.write, samplerate=SAMPLE_RATE))
    print(f"wrote {target}: {tokens.shape[2]} frames of {tokens.shape[1]} tokens")


# ------------------------------------------------------------- audio and corpora, for all stages

# Formats that soundfile reads, and some that it does not read, which are reported, not ignored.
AUDIO = tuple(""".flac .wav .mp3 .ogg .opus .aiff .aif .au .caf .w64
                 .m4a .mp4 .webm .wma .aac .amr .3gp""".split())
# The usual subsets of any folder, unless it is a named corpus.
USUAL = {"train": ["train"], "dev": ["dev"], "test": ["test"]}
# Named corpora: their folder, and their usual subsets. Any other name is a folder.
CORPORA = {
    "synthetic": ("data/synthetic", USUAL),
    "mini-librispeech": ("data/LibriSpeech", {
        "train": ["train-clean-5"], "dev": ["dev-clean-2"], "test": ["test-clean"]}),
    "librispeech": ("data/LibriSpeech", {
        "train": ["train-clean-100"], "dev": ["dev-clean"], "test": ["test-clean", "test-other"]}),
}


def read_audio(path: str | Path, seconds: float = math.inf, at: float = 0.0) -> Tensor:
    """Any file that soundfile reads -> wav (S,) float32, full scale 1, 16 kHz, channels averaged.

    `seconds`: read only so much; `at`, from 0 to 1: where in the file this piece lies. Raises
    ValueError when the file cannot be read, cannot be a recording, or has lost more than a tenth of
    the samples that its header promises. Some headers promise nothing: truncated AIFF and AU files
    are read to their end, and an MP3 without a Xing or Info frame may be read only in part.
    """
    try:
        check_wav_size(path)
        with sf.SoundFile(path) as file:
            rate = file.samplerate
            wanted = math.ceil(min(file.frames, seconds * rate))
            if at:
                file.seek(int(at * (file.frames - wanted)))
            wav = file.read(wanted, "float32", always_2d=True).mean(1)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}")
    # TypeError: headerless .raw; MemoryError: a damaged header that promises terabytes.
    # ValueError: a truncated WAV, or a streamed FLAC, whose header does not say its length.
    except (RuntimeError, TypeError, ValueError, MemoryError) as error:
        raise ValueError(f"{path}: not readable as audio ({str(error).splitlines()[0]}); other "
                         f"formats: ffmpeg -i in.m4a out.wav")
    check_sound(path, wav, wanted, rate)
    return torchaudio.functional.resample(torch.from_numpy(wav), rate, SAMPLE_RATE)


def check_wav_size(path: str | Path):
    """Raises ValueError for a truncated WAV, which libsndfile reads as a shorter recording."""
    with open(path, "rb") as file:
        kind = file.read(4)
        size = int.from_bytes(file.read(4), "little")
    # Programs that stream a WAV may write a size of about 2 GiB or more.
    if kind == b"RIFF" and os.path.getsize(path) < 0.9 * size and size < 0x7f000000:
        raise ValueError(f"truncated: its header says {size} bytes")


def check_sound(path: str | Path, wav: np.ndarray, wanted: int, rate: int):
    """Raises ValueError unless wav (S,), as read from path, can be a recording."""
    if len(wav) < max(1, 0.9 * wanted):         # the header of an MP3 may be a little off
        raise ValueError(f"{path}: is empty or truncated, after {len(wav)} of {wanted} samples")
    if not np.abs(wav).max() < 100:     # true for NaN, too
        raise ValueError(f"{path}: holds samples that are not numbers, or far above full scale")
    if not 1000 <= rate <= 400_000 or rate // math.gcd(rate, SAMPLE_RATE) > 4000:
        raise ValueError(f"{path}: has a sample rate of {rate} Hz; unless it is damaged, convert "
                         f"it: ffmpeg -i in.wav -ar 16000 out.wav")


def find_subsets(corpora: list[str], **asked: list[str]) -> dict:
    """Several corpora, read as one -> {role: {subset: [folders that have it]}}.

    asked: the names of the subsets for the roles train, dev and test. Each of them must exist in
    some corpus. An empty list stands for the usual ones that exist. Each corpus must have some
    subset.
    """
    found = {role: {} for role in asked}
    for corpus in corpora:
        name, usual = CORPORA.get(corpus, (corpus, USUAL))
        folder = Path(name)
        wanted = [(role, subset) for role in asked for subset in (asked[role] or usual[role])]
        subsets = [subset for _, subset in wanted]
        prepare(corpus, folder, subsets)
        there = [(role, subset) for role, subset in wanted if find_audio(folder, subset)]
        if not there:
            raise ValueError(nothing_found(folder, subsets, asked))
        for role, subset in there:
            folders = found[role].setdefault(subset, [])
            if folder not in folders:
                folders.append(folder)
    for role, subsets in asked.items():
        for subset in subsets:
            if subset not in found[role] or ".." in subset or os.path.isabs(subset):
                raise ValueError(f"--{role} {subset}: no such subset inside {', '.join(corpora)}")
    return found


def prepare(corpus: str, folder: Path, subsets: list[str]):
    """Make or download a named corpus, unless it is already there."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        if corpus == "synthetic":
            make_synthetic(folder)
        elif corpus in CORPORA:
            for subset in subsets:
                fetch_librispeech(folder, subset)
    if dist.is_initialized():
        dist.barrier()                  # the other processes wait until the corpus is there
    if not folder.is_dir():
        raise ValueError(f"--corpus {corpus}: no such folder, and none of {', '.join(CORPORA)}")


def nothing_found(folder: Path, subsets: list[str], roles: dict) -> str:
    """What was looked for, and what is there."""
    there = sorted(os.listdir(folder))
    return (f"{folder}: no audio of the subsets {', '.join(subsets)}. A subset NAME is a folder "
            f"NAME/ with audio, a manifest NAME.jsonl, or */*/transcript_NAME.txt; {folder} holds "
            f"{', '.join(there[:6]) or 'nothing'}{', ...' * (len(there) > 6)}. Name your subsets "
            f"with {' and '.join(f'--{role}' for role in roles)}; . is {folder} itself")


def audio_files(subsets: dict) -> list[Path]:
    """{subset: [folders that have it]} -> their files, each once: a manifest may repeat them."""
    files = {}
    for subset, folders in subsets.items():
        for folder in folders:
            files |= dict.fromkeys(find_audio(folder, subset))
    return [*files]


def find_audio(folder: Path, subset: str) -> list[Path]:
    """The audio files that the subset's manifest or ML-SUPERB's lists name, or else those in the
    subset's own folder. An empty list if there is no such subset."""
    manifest = folder / f"{subset}.jsonl"
    if manifest.is_file():
        rows, _ = read_manifest(manifest)
        return [manifest.parent / row["audio_filepath"] for row in rows]
    listed = [path.parent / "wav" / f"{Path(words[0]).name}.wav"
              for path in sorted(folder.glob(f"*/*/transcript_{subset}.txt"))
              for words in read_lines(path)]
    return listed or files_below(folder / subset)


def files_below(folder: Path, endings=AUDIO) -> list[Path]:
    """Files with these endings in a folder and all below it, sorted; links are followed."""
    walk = os.walk(folder, followlinks=True)
    return sorted(Path(root, name) for root, _, names in walk for name in names
                  if name.lower().endswith(endings))


def read_lines(path: Path) -> list[list[str]]:
    """The words of each line that is not empty."""
    text = path.read_text("utf-8-sig", errors="replace")
    return [line.split() for line in text.split("\n") if line.strip()]


def read_manifest(path: Path) -> tuple:
    """JSON lines with at least audio_filepath -> rows, and a message for each line that lacks it.

    Raises ValueError when there are lines, but none has it.
    """
    rows = []
    skipped = []
    for number, line in enumerate(path.read_text("utf-8-sig", errors="replace").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                Path(row["audio_filepath"])
                rows.append(row)
            except (ValueError, TypeError, KeyError):
                skipped.append(f"{path}: line {number} is {line[:60]}; each line needs to be a "
                               f"JSON object with audio_filepath and text")
    if skipped and not rows:
        raise ValueError(skipped[0])
    return rows, skipped


# -------------------------------------------------------------------------------------------- main

def parse(arguments=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = flag_group(parser, "speech")
    add("--corpus", ["synthetic"],
        "synthetic, mini-librispeech, librispeech, or folders, read as one corpus")
    add("--train", [],
        "subsets to train on, if not the usual ones; any folder of audio in --corpus will do")
    add("--dev", [], "subsets to report on, if not the usual ones")
    add("--crop", 1.0, "length of each training crop in seconds")
    add = flag_group(parser, "codec")
    add("--encoder", "mel",
        "what the encoder sees: the waveform, or its log-mel spectrogram",
        choices=("time", "mel"))
    add("--quantizer", "rvq",
        "residual vector quantization, or grouped finite scalar quantization",
        choices=("rvq", "fsq"))
    add("--strides", [2, 4, 5, 10],
        "their product is the samples per token frame: 400 = 25 ms = 40 Hz; 2 4 5 5 = 80 Hz",
        type=int)
    add("--codebooks", 0,
        "codebooks of RVQ, or groups of FSQ; with --reconstruct, use only the first N; "
        "0: 8, or with --reconstruct all")
    add("--codebook-size", 1024, "codes in each codebook of RVQ")
    add("--size", "tiny", "width and depth of encoder and decoder; base needs a GPU", choices=SIZES)
    add = flag_group(parser, "training")
    add("--steps", 500, "training steps; real speech takes thousands")
    add("--batch", 8, "crops per step, over all processes")
    add("--lr", 0.001, "peak learning rate")
    add("--adversarial", False,
        "add a discriminator, for better sound; on a finished codec: train its decoder alone")
    add = flag_group(parser, "listening")
    add("--reconstruct", None,
        "encode and decode one audio file (an hour takes 6 GB of memory); OUT: .wav, .flac or .mp3",
        nargs=2, metavar=("IN", "OUT"))
    add("--codec", "runs/codec/codec.pt", "the codec that --reconstruct uses")
    add_common_flags(parser, "runs/codec")

    args = parser.parse_args(arguments)
    if args.reconstruct:
        refuse_idle(parser, args, "with --reconstruct", *sorted(
            set(vars(args)) - {"reconstruct", "codec", "codebooks", "device"}))
        return args
    refuse_idle(parser, args, "without --reconstruct", "codec")
    if args.quantizer == "fsq":
        refuse_idle(parser, args, "with --quantizer fsq, which has 1000 codes", "codebook_size")
    args.codebooks = args.codebooks or 8
    if min(args.codebooks, args.codebook_size, args.steps, args.batch, args.crop, args.lr) <= 0:
        parser.error("--codebooks, --codebook-size, --steps, --batch, --crop, --lr: above 0")
    if args.codebook_size > 8192:
        parser.error("--codebook-size: at most 8192: memory of k-means grows with its square")
    if min(args.strides) < 1 or math.prod(args.strides) % 2:
        parser.error("--strides: each at least 1, and their product even")
    return args


def main(arguments=None):
    args = parse(arguments)
    run_stage(reconstruct if args.reconstruct else train, args)


# -------------------------------------------------- appendix, can be skipped: LibriSpeech downloads

OPENSLR = "https://www.openslr.org/resources"
MD5 = {     # published at OPENSLR/31 (the first two) and OPENSLR/12
    "train-clean-5": "5df7d4e78065366204ca6845bb08f490",
    "dev-clean-2": "6d7ab67ac6a1d2c993d050e16d61080d",
    "dev-clean": "42e2234ba48799c1f50f24a7926300a1",
    "dev-other": "c8d0bcc9cca99d4f8b62fcc847357931",
    "test-clean": "32fa31d27d2e1cad72775fee3f4849a9",
    "test-other": "fb5a50374b501bb3bac4815ee91d3135",
    "train-clean-100": "2a93770f6d5c6c964bc36631d331a522",
    "train-clean-360": "c0e676e450a7ff2f54aeade5171606fa",
    "train-other-500": "d1a0fd59409feb2c614ce4d30c387708",
}


def fetch_librispeech(folder: Path, subset: str):
    """Download folder/<subset>, unless it is there, or is not a subset of LibriSpeech."""
    if (folder / subset).is_dir() or subset not in MD5:
        return
    number = 31 if subset in ("train-clean-5", "dev-clean-2") else 12
    url = f"{OPENSLR}/{number}/{subset}.tar.gz"
    print(f"downloading {url}")
    socket.setdefaulttimeout(60)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        archive = f"{part}/{subset}.tar.gz"
        try:
            torch.hub.download_url_to_file(url, archive)
        except OSError as error:
            raise ValueError(f"{url}: {error}; run again, or unpack it by hand to "
                             f"{folder / subset}")
        with open(archive, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != MD5[subset]:
            raise ValueError(f"{url}: checksum {found} instead of {MD5[subset]}; run again")
        shutil.unpack_archive(archive, part, filter="data")     # refuses paths that lead outside
        os.replace(f"{part}/LibriSpeech/{subset}", folder / subset)     # never half a subset


# ----------------------------------------------------- appendix, can be skipped: synthetic speech
#
# A source-filter synthesizer after Klatt (1980): pulses at the pitch of the voice, and noise, pass
# through resonances that move from sound to sound. The vowels are near those of Peterson and
# Barney (1952). It works on short-time spectra: 28 minutes of speech take about 20 seconds.

STEP = 64           # samples per frame of the synthesizer: 4 ms

# Each sound: its length and the silence before it (ms); three formants (Hz); amplitudes of voice
# and of hiss, which is noise with a peak of its own; that peak (Hz).
PHONE_TABLE = """
      length pause    F1    F2    F3  voice  hiss   peak
SIL      100     0   500  1500  2500    0.0   0.0   4000
IY       110     0   280  2300  3000    1.0   0.0   4000
EH       110     0   550  1800  2500    1.0   0.0   4000
AE       120     0   750  1600  2450    1.0   0.0   4000
AA       110     0   740  1100  2450    1.0   0.0   4000
AO       110     0   540   800  2450    1.0   0.0   4000
UW       110     0   310   900  2250    1.0   0.0   4000
ER       120     0   480  1300  1650    1.0   0.0   4000
W         70     0   290   650  2200    0.6   0.0   4000
R         75     0   330  1100  1450    0.7   0.0   4000
L         75     0   350  1000  2900    0.5   0.0   4000
M         80     0   250   950  2200    0.3   0.0   4000
N         80     0   250  1600  2600    0.3   0.0   4000
F         95     0   340   900  2300    0.0   0.1   4500
S        110     0   320  1700  2600    0.0   0.5   6300
SH       110     0   320  1900  2500    0.0   0.5   3000
B         25    50   250   750  2200    0.5   0.1    900
D         25    50   250  1750  2700    0.5   0.3   5000
T         40    60   250  1750  2700    0.0   0.5   5000
K         40    60   250  2100  2350    0.0   0.5   2100
"""
WORD_LIST = """
MAN M AE N | MOON M UW N | NAME N EH IY M | NINE N AA IY N | TEN T EH N | EIGHT EH IY T |
FOUR F AO R | RED R EH D | BLUE B L UW | BLACK B L AE K | WHITE W AA IY T | WATER W AO T ER |
FEET F IY T | SHOE SH UW | SEA S IY | BIRD B ER D | CAT K AE T | COW K AA UW | FOX F AA K S |
BOSS B AO S | SOON S UW N | AFTER AE F T ER | LIGHT L AA IY T | RAIN R EH IY N | TREE T R IY |
ROAD R AO UW D | LETTER L EH T ER | DOCTOR D AA K T ER | MASTER M AE S T ER | LADDER L AE D ER |
ROOM R UW M | TABLE T EH IY B L | SAND S AE N D | DESK D EH S K | SHELF SH EH L F |
FARM F AA R M | STAR S T AA R | STONE S T AO UW N | SNOW S N AO UW | SMOKE S M AO UW K |
BOAT B AO UW T | FOOD F UW D | BREAD B R EH D | SALT S AO L T | WALK W AO K | SMALL S M AO L |
BELL B EH L | LEAF L IY F | SHEET SH IY T | DREAM D R IY M
"""
PHONES = {name: np.array(values, float)
          for name, *values in map(str.split, PHONE_TABLE.splitlines()[2:])}
LEXICON = {word: phones for word, *phones in map(str.split, WORD_LIST.split("|"))}

VOICES = {"train": range(100, 120), "dev": range(120, 123), "test": range(123, 127)}
UTTERANCES = {"train": 30, "dev": 20, "test": 25}       # of each voice


def articulate(words: list[str], rate: float, rng) -> Tensor:
    """Words -> (6, frames): three formants, voice, hiss, its peak."""
    phones = ["SIL"]
    for word in words:
        phones += LEXICON[word] + ["SIL"] * (rng.random() < 0.15)
    targets = []
    lengths = []
    for phone in [*phones, "SIL"]:
        length, pause, *values = PHONES[phone]
        values = values * rng.normal(1, 0.02, 6)                            # never twice the same
        targets += [values * [1, 1, 1, 0, 0, 1], values]
        lengths += [pause, length * rng.uniform(0.85, 1.2)]
    frames = np.array(lengths) / rate / 4                                   # of 4 ms
    track = torch.from_numpy(np.repeat(targets, frames.round().astype(int), axis=0)).T
    # One sound glides into the next within 36 ms, as tongue and lips are slow.
    return F.avg_pool1d(track, 9, 1, 4, count_include_pad=False)


def speak(words: list[str], speaker: int, rng) -> np.ndarray:
    """Words -> wav (S,) at 16 kHz, in the voice of a speaker."""
    # Steps of irrational size spread the voices evenly from 0 to 1, and never repeat one.
    size, haste, edge = speaker * np.array([0.618034, 0.754878, 0.569840]) % 1
    scale = 0.85 + 0.35 * size                      # of the resonances: low for a long vocal tract
    track = articulate(words, 0.8 + 0.35 * haste, rng)
    frames = track.shape[1]

    # The source: pulses at a falling, slightly rough pitch, and white noise, both of power 1.
    melody = np.linspace(1.15, 0.82, frames) * rng.normal(1, 0.02, frames)
    pitch = np.repeat(90 * 2.9 ** size * melody, STEP)                      # (S,)
    pulses = np.diff(np.floor(np.cumsum(pitch / SAMPLE_RATE)), prepend=0)
    source = np.stack([pulses * np.sqrt(SAMPLE_RATE / pitch), rng.standard_normal(len(pitch))])
    short_time = dict(n_fft=512, hop_length=STEP, win_length=256, window=torch.hann_window(256))
    source = torch.stft(torch.from_numpy(source), **short_time, return_complex=True)
    pulses, noise = source[..., :frames]                                    # (bins, frames) each

    # The filter: resonances of the vocal tract, of which one hardly moves, and the hiss.
    hz = torch.linspace(0, SAMPLE_RATE / 2, 257)[:, None]
    tract = 1 / (1 + (hz / (400 + 800 * edge)) ** 2) ** 0.5                 # (bins, frames)
    for formant in *track[:3], 3500:
        formant = formant * scale
        width = 60 + 0.04 * formant
        tract = tract / torch.hypot(1 - (hz / formant) ** 2, hz * width / formant ** 2)
    voice, hiss, peak = track[3:]
    bump = torch.exp(-8 * (hz / peak - 1) ** 2)
    wav = torch.istft(pulses * voice * tract + noise * hiss * bump, **short_time).numpy()
    wav = wav / wav.std() + rng.normal(0, rng.uniform(0.01, 0.06), len(wav))    # a noisy room
    return wav * rng.uniform(0.03, 0.06)


def make_synthetic(root: Path):
    """Write root/<subset>/<speaker>/<chapter>/ as LibriSpeech does, unless the subset exists.

    A sentence is 3 to 7 random words, so that no language model can guess what was not heard.
    With these seeds, no sentence is in two subsets.
    """
    for subset, voices in VOICES.items():
        if (root / subset).exists():
            continue
        part = root / f".{subset}.part"             # renamed when whole: never half a subset
        shutil.rmtree(part, ignore_errors=True)
        for speaker in tqdm(voices, f"making {root / subset}", disable=None):
            chapter = part / f"{speaker}/1"
            chapter.mkdir(parents=True)
            with open(chapter / f"{speaker}-1.trans.txt", "w") as transcripts:
                for number in range(UTTERANCES[subset]):
                    rng = np.random.default_rng([speaker, number])
                    words = rng.choice(list(LEXICON), rng.integers(3, 8))
                    name = f"{speaker}-1-{number:04d}"
                    sf.write(chapter / f"{name}.flac", speak(words, speaker, rng), SAMPLE_RATE)
                    print(name, *words, file=transcripts)
        part.rename(root / subset)


if __name__ == "__main__":
    main()
