"""Stage 1: train a neural audio codec, which turns speech into a few whole numbers a frame and back.

in   a corpus of audio          synthetic speech (made on the spot), LibriSpeech, or any folder; no transcripts needed
out  runs/codec/codec.pt        weights and settings; training resumes from it
     runs/codec/report.json     how well it does on the dev audio
     runs/codec/log.jsonl       a row a hundred steps

    python codec.py                                              # synthetic corpus, about three minutes on a CPU core
    python codec.py --corpus mini-librispeech --size small       # real speech
    python codec.py --reconstruct in.wav out.wav                 # hear what the tokens keep

wav (B, S) -> encoder -> latent (B, D, T) -> quantizer -> tokens (B, Q, T) -> latent -> decoder -> wav (B, S)
Legend: B utterances, S samples, T token frames, D latent size, Q codebooks, C channels, M mel bands.

Dhawan et al., arXiv 2407.03495, section 2. The mel encoder and the losses follow NVIDIA's published recipes
(NeMo audio_codec_16000 and mel_codec), the time encoder departs from SEANet where its class says; the decoder is
Vocos (arXiv 2306.00814) instead of HiFi-GAN, for all four codecs: it works at frame rate, so that a codec can be
trained without a GPU.
"""

import argparse
import hashlib
import io
import json
import math
import os
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import lru_cache, partial
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


class InputError(ValueError):
    """Bad input, told in one line: what, where, what to do. The scripts print it and exit with code 2."""


def option(default, help, **more):
    """A field of a settings class that is also a command-line flag."""
    return field(default=default, metadata={"help": help, **more})


# widths of the three parts; `small` trains on a laptop, `base` wants a GPU
SIZES = {"tiny":  dict(time_channels=8, mel_channels=128, decoder_channels=128, blocks=2),
         "small": dict(time_channels=16, mel_channels=192, decoder_channels=256, blocks=4),
         "base":  dict(time_channels=32, mel_channels=384, decoder_channels=512, blocks=6)}


@dataclass
class CodecSettings:
    corpus: str = option("synthetic", "synthetic, mini-librispeech, librispeech, or a folder")
    train: tuple = option((), "subsets (or plain folders of audio) to train on", type=str)
    dev: tuple = option((), "subsets to report on", type=str)
    encoder: str = option("mel", "what the encoder sees: the waveform or its log-mel spectrogram", choices=("time", "mel"))
    quantizer: str = option("fsq", "residual VQ or grouped FSQ", choices=("rvq", "fsq"))
    strides: tuple = option((2, 4, 5, 10), "product = samples a token frame: 400 = 25 ms = 40 Hz; 2 4 5 5 = 80 Hz", type=int)
    codebooks: int = option(8, "codebooks (RVQ) or groups (FSQ): each adds 10 bits a frame")
    size: str = option("tiny", "width and depth of all parts", choices=tuple(SIZES))
    adversarial: bool = option(False, "add the multi-resolution STFT discriminator: for better sound, as NVIDIA's recipe does")
    steps: int = option(500, "optimiser steps: 500 for the synthetic corpus, thousands for real speech")
    batch: int = option(8, "crops a step, over all processes")
    crop: float = option(1.0, "seconds a crop")
    lr: float = option(1e-3, "peak learning rate; the usual 1e-4 is for runs a hundred times longer")
    seed: int = option(0, "random seed of weights and data order")
    device: str = option("auto", "auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))
    out: str = option("runs/codec", "folder to write")
    reconstruct: tuple = option((), "IN OUT: encode and decode one file with the trained codec, then stop", type=str)

    @property
    def hop(self) -> int:
        return math.prod(self.strides)

    def __post_init__(self):
        if self.hop % 2 or min(self.strides) < 1:
            raise InputError(f"--strides {' '.join(map(str, self.strides))}: their product, samples a frame, must be even")
        for name in ("codebooks", "steps", "batch", "crop", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"--{name} {getattr(self, name)}: must be above 0")
        if self.encoder == "time" and (self.strides[0] > 8 or 1 in self.strides[1:]):
            raise InputError(f"--strides {' '.join(map(str, self.strides))}: --encoder time begins with at most 8, and goes on with at least 2")
        if self.seed < 0 or self.crop > 100:
            raise InputError("--seed must be at least 0, --crop at most 100 seconds")


# ---------------------------------------------------------------------------------------------------- the models

def conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Module:
    """Convolution padded so that T steps in give T / stride steps out."""
    both, right = divmod(kernel - stride, 2)
    layer = nn.Conv1d(channels_in, channels_out, kernel, stride, padding=both)
    return nn.Sequential(nn.ConstantPad1d((0, 1), 0.0), layer) if right else layer


class Residual(nn.Module):
    """y + conv(act(conv(act(y)))), (B, C, T) -> (B, C, T)."""

    def __init__(self, channels: int, inner: int, act=nn.ELU):
        super().__init__()
        self.body = nn.Sequential(act(), conv(channels, inner, 3), act(), conv(inner, channels, 1))

    def forward(self, y: Tensor) -> Tensor:
        return y + self.body(y)


class LogMel(nn.Module):
    """wav (B, S) -> log-mel (B, M, S / hop): natural log of mel energies. S must be a multiple of hop."""

    def __init__(self, n_fft: int, hop: int, n_mels: int):
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.register_buffer("bands", torchaudio.functional.melscale_fbanks(
            n_fft // 2 + 1, 0.0, SAMPLE_RATE / 2, n_mels, SAMPLE_RATE).T.contiguous(), persistent=False)

    def forward(self, wav: Tensor) -> Tensor:
        left = (self.n_fft - self.hop) // 2     # each frame's window is centred on the samples that it stands for
        wav = F.pad(wav, (left, self.n_fft - self.hop - left))
        spectrum = torch.stft(wav, self.n_fft, self.hop, window=self.window, center=False, return_complex=True)
        energy = spectrum.real.square() + spectrum.imag.square()    # a sum over the last axis, of size 2, takes five times as long
        return (self.bands @ energy).clamp(min=1e-5).log()


class MelEncoder(nn.Sequential):
    """wav (B, S) -> latent (B, D, T). Two log-mel frames make one token frame.

    The BatchNorm keeps every dimension of the latent spread over the quantizer's range, so that codes are in use from
    the first step; in evaluation it is a fixed scale."""

    def __init__(self, dim: int, strides: tuple, mel_channels: int, blocks: int, **_):
        hop = math.prod(strides) // 2
        super().__init__(LogMel(512, hop, 80), Normalise(), conv(80, mel_channels, 4, stride=2),
                         *(Residual(mel_channels, mel_channels) for _ in range(blocks)),
                         nn.ELU(), conv(mel_channels, dim, 1), nn.BatchNorm1d(dim, affine=False))


class Normalise(nn.Module):
    """Log-mel of speech to about mean 0, deviation 1; fixed numbers, so that it cannot depend on the batch."""

    def forward(self, mel: Tensor) -> Tensor:
        return (mel + 4.4) / 4.0


class TimeEncoder(nn.Sequential):
    """wav (B, S) -> latent (B, D, T): SEANet (EnCodec, arXiv 2210.13438) without its LSTM.

    Each stride shortens the time axis and doubles the channels; a residual unit refines the result. SEANet's first
    convolution and residual unit work at the full sample rate, where they cost most: left out.
    Four changes make it learn within minutes what a log-mel spectrum gives away, energy in bands of frequency: LeakyReLU,
    which rectifies however quiet the sound is (SEANet's ELU is nearly a straight line about 0); He initialisation,
    which keeps the signal's size from layer to layer (torch's own shrinks it below the biases); a LayerNorm of each
    frame, so that quiet ones are not all rounded to the same code; and two wide residual units at the token rate,
    where they are cheap."""

    def __init__(self, dim: int, strides: tuple, time_channels: int, **_):
        act = partial(nn.LeakyReLU, 0.1)
        layers, channels = [Waveform(), conv(1, 2 * time_channels, 8, strides[0])], 2 * time_channels
        for stride in strides[1:]:
            layers += [Residual(channels, channels // 2, act), act(), conv(channels, 2 * channels, 2 * stride, stride)]
            channels *= 2
        super().__init__(*layers, FrameNorm(channels), *(Residual(channels, channels, act) for _ in range(2)), act(),
                         conv(channels, dim, 3), nn.BatchNorm1d(dim, affine=False))
        for layer in self.modules():
            if isinstance(layer, nn.Conv1d):
                nn.init.kaiming_normal_(layer.weight, 0.1)
                nn.init.zeros_(layer.bias)


class FrameNorm(nn.LayerNorm):
    """LayerNorm over the channels of a frame. (B, C, T) -> (B, C, T)."""

    def forward(self, y: Tensor) -> Tensor:
        return super().forward(y.transpose(1, 2)).transpose(1, 2)


class Waveform(nn.Module):
    def forward(self, wav: Tensor) -> Tensor:
        return 4 * wav[:, None]                 # (B, 1, S), about deviation 0.3: speech recordings are quiet


class ConvNeXt(nn.Module):
    """Depthwise convolution over time, then a two-layer network a frame (Vocos, section 3.2). (B, C, T) -> same."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, 7, padding=3, groups=channels)
        self.frame = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 3 * channels), nn.GELU(),
                                   nn.Linear(3 * channels, channels))
        self.scale = nn.Parameter(torch.full((channels,), 0.3))

    def forward(self, y: Tensor) -> Tensor:
        return y + (self.frame(self.depthwise(y).transpose(1, 2)) * self.scale).transpose(1, 2)


class Decoder(nn.Module):
    """latent (B, D, T) -> wav (B, T * hop), by predicting the complex spectrum and inverting it.

    The first blocks work at the token rate, where they are cheap and see far; the last ones at a hop of about 100
    samples, fine enough for pitch pulses."""

    def __init__(self, dim: int, hop: int, decoder_channels: int, blocks: int, **_):
        super().__init__()
        self.up = min((n for n in range(1, hop + 1) if hop % n == 0), key=lambda n: abs(hop / n - 100))
        self.hop = hop // self.up               # samples a spectrum frame
        self.n_fft = 4 * self.hop
        wide, slim = decoder_channels, decoder_channels * 3 // 4
        self.slow = nn.Sequential(conv(dim, wide, 7), *(ConvNeXt(wide) for _ in range(blocks)))
        self.widen = conv(wide, slim * self.up, 3)
        self.fast = nn.Sequential(*(ConvNeXt(slim) for _ in range(blocks)))
        self.head = nn.Sequential(nn.LayerNorm(slim), nn.Linear(slim, 2 * (self.n_fft // 2 + 1)))
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)

    def forward(self, latent: Tensor) -> Tensor:
        batch, _, time = latent.shape
        y = self.widen(self.slow(latent))                                       # (B, slim * up, T)
        y = y.unflatten(1, (-1, self.up)).transpose(2, 3).flatten(2)            # (B, slim, T * up)
        log_magnitude, phase = self.head(self.fast(y).transpose(1, 2)).float().chunk(2, dim=-1)
        spectrum = torch.polar(log_magnitude.clamp(max=5).exp(), phase)         # (B, T * up, n_fft / 2 + 1)
        frames = torch.fft.irfft(spectrum, self.n_fft) * self.window            # (B, T * up, n_fft)
        # Overlap-add, divided by what the squared windows sum to.
        length = (time * self.up - 1) * self.hop + self.n_fft
        add = dict(output_size=(1, length), kernel_size=(1, self.n_fft), stride=(1, self.hop))
        wav = F.fold(frames.transpose(1, 2), **add).view(batch, length)
        weight = F.fold(self.window.square().expand(1, time * self.up, -1).transpose(1, 2), **add).view(1, length)
        left = (self.n_fft - self.hop) // 2
        return (wav / weight.clamp(min=1e-3))[:, left:left + time * self.up * self.hop]


class Codec(nn.Module):
    """Encoder, quantizer and decoder.

        codec = Codec.load("runs/codec/codec.pt")
        tokens, token_len = codec.encode(wav, wav_len)      # (B, S) -> (B, Q, T), (B,), T = ceil(wav_len / hop)
        wav = codec.decode(tokens)                          # (B, Q, T) -> (B, T * hop)
    """
    # Encoding works through windows whose shapes follow from an utterance's own length: its tokens are then the same
    # bits alone and in any batch (a convolution rounds differently for another shape), memory is bounded however long
    # the recording, and the working set stays in the processor's cache.
    # Token frames kept of each window, and context on each side: no less than the encoder sees (mel 7.5, time 4.9 at the usual
    # strides; where a token is much shorter, those beside a seam are found with a little less context).
    # The mel encoder is cheap, so it takes longer windows to outweigh the fixed cost of a call.
    WINDOWS = {"mel": (496, 8), "time": (240, 5)}
    ROUND = 32                                  # the last window is as short as a multiple of this allows

    def __init__(self, settings: CodecSettings):
        super().__init__()
        self.settings, sizes = settings, SIZES[settings.size]
        self.quantizer = (ResidualVQ(128, settings.codebooks) if settings.quantizer == "rvq"
                          else GroupFSQ(settings.codebooks))
        encoder = {"mel": MelEncoder, "time": TimeEncoder}[settings.encoder]
        self.encoder = encoder(self.quantizer.dim, settings.strides, **sizes)
        self.decoder = Decoder(self.quantizer.dim, settings.hop, **sizes)
        self.hop, self.sample_rate = settings.hop, SAMPLE_RATE
        self.window, self.context = self.WINDOWS[settings.encoder]

    @property
    def frame_rate(self) -> float:
        """Token frames a second."""
        return self.sample_rate / self.hop

    @property
    def bitrate(self) -> float:
        """Bits a second."""
        return self.frame_rate * self.quantizer.num_codebooks * math.log2(self.quantizer.codebook_size)

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that tell this encoder and these codebooks from all others."""
        digest = hashlib.sha256(repr((self.settings.encoder, self.settings.strides)).encode())
        for name, value in sorted({**self.encoder.state_dict(), "codebooks": self.quantizer.codebooks()}.items()):
            digest.update(name.encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()[:12]

    def forward(self, wav: Tensor) -> tuple[Tensor, Quantized]:
        """For training: wav (B, S), S a multiple of hop -> reconstruction (B, S) and what the quantizer says."""
        quantized = self.quantizer(self.encoder(wav))
        return self.decoder(quantized.latent), quantized

    def encode(self, wav: Tensor, wav_len: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """wav (B, S) -> tokens (B, Q, T) int64, token_len (B,); steps after token_len are 0."""
        return self.by_windows(wav, wav_len, self.quantizer.encode)

    def latent(self, wav: Tensor, wav_len: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the quantizer sees: wav (B, S) -> latent (B, D, T), token_len (B,)."""
        return self.by_windows(wav, wav_len, nn.Identity())

    @torch.inference_mode()
    def by_windows(self, wav: Tensor, wav_len: Tensor | None, finish) -> tuple[Tensor, Tensor]:
        """The encoder window by window; `finish` (n, D, T) -> (n, Q or D, T) then sees the frames that are kept, not the context."""
        batch, samples = wav.shape
        wav_len = torch.full((batch,), samples, device=wav.device) if wav_len is None else wav_len.to(wav.device)
        token_len = -(-wav_len // self.hop)
        wav = wav * (torch.arange(samples, device=wav.device) < wav_len[:, None])
        wav = F.pad(wav, (self.context * self.hop, (self.ROUND + self.context) * self.hop))
        places, out = defaultdict(list), None                                   # length of a window -> [(utterance, start)]
        for i, frames in enumerate(token_len.tolist()):
            for start in range(0, max(1, frames), self.window):
                places[min(self.window, -(-(frames - start) // self.ROUND) * self.ROUND)].append((i, start))
        for length, those in places.items():
            parts = [wav[i, start * self.hop:(start + length + 2 * self.context) * self.hop] for i, start in those]
            size = 1 if wav.device.type == "cpu" else 64        # on a GPU one by one would be slow; a few tokens may differ there
            for at in range(0, len(those), size):
                latent = self.encoder(torch.stack(parts[at:at + size]))
                kept = finish(latent[..., self.context:-self.context])          # (n, Q or D, length)
                if out is None:
                    out = kept.new_zeros(batch, kept.shape[1], int(token_len.max()) + self.ROUND)
                for (i, start), row in zip(those[at:], kept):
                    out[i, :, start:start + length] = row
        out = out[..., :int(token_len.max())]
        return out * (torch.arange(out.shape[-1], device=out.device) < token_len[:, None, None]), token_len

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """tokens (B, n, T), n <= Q -> wav (B, T * hop)."""
        return self.decoder(self.quantizer.decode(tokens))

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "Codec":
        """Raises InputError when the file is missing, damaged, or no codec."""
        saved = load_checkpoint(path, "codec", device)
        with fitting(path):
            codec = cls(CodecSettings(**saved["settings"]))
            codec.load_state_dict(saved["model"])
        return codec.to(device).eval()


# ---------------------------------------------------------------------------------------------------- losses

class MelDistance(nn.Module):
    """Distance of log-mel spectrograms at seven resolutions, from sharp in time to sharp in frequency."""

    def __init__(self):
        super().__init__()
        self.mels = nn.ModuleList(LogMel(n_fft, n_fft // 4, n_mels) for n_fft, n_mels in
                                  zip((32, 64, 128, 256, 512, 1024, 2048), (5, 10, 20, 40, 80, 120, 160)))

    def forward(self, wav: Tensor, other: Tensor) -> Tensor:
        """(B, S), (B, S) -> (): mean of L1 + L2."""
        total = 0.0
        for mel in self.mels:
            length = wav.shape[1] // mel.hop * mel.hop
            difference = (mel(wav[:, :length]) - mel(other[:, :length])) / 2     # of amplitudes: half that of energies
            total = total + difference.abs().mean() + difference.square().mean()
        return total / len(self.mels)


class Discriminator(nn.Module):
    """Judges complex spectrograms at three resolutions (EnCodec, section 3.4): real speech or reconstructed?"""

    def __init__(self, channels: int = 32):
        super().__init__()
        self.sizes = (2048, 1024, 512)
        self.nets = nn.ModuleList(nn.ModuleList([
            nn.Conv2d(2, channels, (3, 9), padding=(1, 4)),
            *(nn.Conv2d(channels, channels, (3, 9), (1, 2), (dilation, 4), (dilation, 1)) for dilation in (1, 2, 4)),
            nn.Conv2d(channels, 1, 3, padding=1)]) for _ in self.sizes)

    def forward(self, wav: Tensor) -> list[list[Tensor]]:
        """wav (B, S) -> for each resolution the outputs of all layers; the last is the score."""
        outputs = []
        for n_fft, layers in zip(self.sizes, self.nets):
            spectrum = torch.stft(wav, n_fft, n_fft // 4, window=torch.hann_window(n_fft, device=wav.device),
                                  normalized=True, return_complex=True)
            y, features = torch.view_as_real(spectrum).permute(0, 3, 2, 1), []  # (B, 2, frames, bins)
            for layer in layers:
                y = layer(y)
                features.append(y)
                y = F.leaky_relu(y, 0.2)
            outputs.append(features)
        return outputs


WEIGHTS = {"mel": 1.0, "wave": 0.1, "commit": 1.0, "adversarial": 1.0, "features": 2.0}


def generator_losses(discriminator: nn.Module, wav: Tensor, made: Tensor) -> dict[str, Tensor]:
    """Squared GAN loss and feature matching, mean over resolutions and layers."""
    with torch.no_grad():
        real = discriminator(wav)
    fake = discriminator(made)
    matching = [(f - r).abs().mean() / r.abs().mean() for fs, rs in zip(fake, real) for f, r in zip(fs[:-1], rs[:-1])]
    return {"adversarial": sum((fs[-1] - 1).square().mean() for fs in fake) / len(fake),
            "features": sum(matching) / len(matching)}


def discriminator_loss(discriminator: nn.Module, wav: Tensor, made: Tensor) -> Tensor:
    scores = [outputs[-1].chunk(2) for outputs in discriminator(torch.cat([wav, made.detach()]))]
    return sum((real - 1).square().mean() + fake.square().mean() for real, fake in scores) / len(scores)


def si_sdr(made: Tensor, wav: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB (arXiv 1811.02508). (B, S), (B, S) -> (B,)."""
    made, wav = made - made.mean(1, keepdim=True), wav - wav.mean(1, keepdim=True)
    target = wav * ((made * wav).sum(1) / wav.square().sum(1).clamp(min=1e-8))[:, None]
    return 10 * torch.log10(target.square().sum(1).clamp(min=1e-8) / (made - target).square().sum(1).clamp(min=1e-8))


# ---------------------------------------------------------------------------------------------------- training

class Crops:
    """Random crops of audio files. Batch number n depends on seed and n alone: a resumed run goes on with the same data."""

    def __init__(self, files: list[Path], settings: CodecSettings):
        self.files, self.seed, self.batch = files, settings.seed, settings.batch
        self.length = max(2, round(settings.crop * SAMPLE_RATE / settings.hop)) * settings.hop
        self.cache, self.room = {}, 2 << 30             # decoded audio as int16, up to 2 GiB
        self.unreadable: dict[Path, str] = {}
        self.odd: dict[Path, list[str]] = {}            # what is strange about a file
        self.readers = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2))   # soundfile decodes outside Python's lock

    def read(self, path: Path) -> np.ndarray | None:
        if path not in self.cache and path not in self.unreadable:
            try:
                wav = (read_audio(path) * 32767).clamp(-32768, 32767).short().numpy()
            except InputError as error:
                self.unreadable[path] = str(error)
                return None
            self.odd[path] = [name for name, found in (
                ("silent", np.abs(wav).max() < 30), ("clipped", np.mean(np.abs(wav) > 32700) > 0.01),
                ("shifted off zero", abs(wav.mean()) > 1000)) if found]
            if self.room < wav.nbytes:
                return wav
            self.cache[path], self.room = wav, self.room - wav.nbytes
        return self.cache.get(path)

    def files_of(self, step: int) -> list[Path]:
        numbers = range(step * self.batch, (step + 1) * self.batch)
        return [self.files[self.order(n // len(self.files))[n % len(self.files)]] for n in numbers]

    @lru_cache(2)
    def order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.files))

    def crop(self, number: int) -> np.ndarray:
        """Crop `number` of the run: every file once before any comes again, in a new order each time."""
        epoch, place = divmod(number, len(self.files))
        rng = np.random.default_rng((self.seed, 1, number))
        for attempt in range(1000):                     # an unreadable file is named at the end, its place taken by the next
            wav = self.read(self.files[self.order(epoch)[(place + attempt) % len(self.files)]])
            if wav is not None:
                wav = np.pad(wav, (0, max(0, self.length - len(wav))))
                start = rng.integers(len(wav) - self.length + 1)
                return wav[start:start + self.length].astype(np.float32) / 32768
        raise InputError(f"no readable audio among {len(self.files)} files; the first: {next(iter(self.unreadable.values()))}")

    def __call__(self, step: int, rank: int, world: int) -> Tensor:
        """This process's share of a step's crops: (batch / world, crop)."""
        numbers = range(step * self.batch + rank, (step + 1) * self.batch, world)
        wav = torch.from_numpy(np.stack(list(self.readers.map(self.crop, numbers))))
        return wav.pin_memory() if torch.cuda.is_available() else wav


def train(settings: CodecSettings) -> None:
    device, rank, world = start_processes(settings.device)
    if device.type == "cpu" and settings.size == "tiny":
        torch.set_num_threads(1)                        # so small that threads mostly wait for each other: two take twice as long
    torch.manual_seed(settings.seed)                    # same weights in all processes
    folder, train_subsets, dev_subsets, _ = corpus_subsets(settings.corpus, settings.train, settings.dev)
    files = [path for subset in train_subsets for path in find_audio(folder, subset)]
    if not files:
        raise InputError(f"{folder}: no audio in {', '.join(train_subsets)}")
    if settings.batch < world:
        raise InputError(f"--batch {settings.batch}: each of the {world} processes needs at least one crop")
    if not settings.dev:                                # a plain folder of audio need not have a dev subset
        dev_subsets = [name for name in dev_subsets if (folder / name).is_dir() or (folder / f"{name}.jsonl").is_file()]
    dev_files = [path for subset in dev_subsets for path in find_audio(folder, subset)][:100]
    codec, out = Codec(settings).to(device), Path(settings.out)
    nets, mel_distance, crops = [codec], MelDistance().to(device), Crops(files, settings)
    if settings.adversarial:
        nets.append(Discriminator().to(device))
    optimisers = [torch.optim.AdamW(net.parameters(), settings.lr, betas=(0.8, 0.99), fused=True) for net in nets]
    start, log = resume(out / "codec.pt", settings, nets, optimisers)
    if rank == 0:
        print(f"codec: {settings.encoder} encoder, {settings.quantizer}, {codec.frame_rate:g} Hz, {codec.bitrate / 1000:.1f} kbit/s, "
              f"{sum(p.numel() for p in codec.parameters()) / 1e6:.1f} M parameters; {len(files)} files on {device}")
        if start:
            print(f"continuing at step {start} of {settings.steps} ({out / 'codec.pt'})")
    if world > 1:                                       # codebooks agree by themselves: no broadcast of buffers
        nets = [nn.parallel.DistributedDataParallel(net, broadcast_buffers=False) for net in nets]
    recent, bar = [], tqdm(range(start, settings.steps), initial=start, total=settings.steps, disable=rank > 0, desc="codec")
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(crops, start, rank, world)
        for step in bar:
            wav, ahead = ahead.result().to(device, non_blocking=True), reader.submit(crops, step + 1, rank, world)
            torch.manual_seed((settings.seed * 1_000_000 + step) * world + rank)    # a resumed run draws the same
            recent.append(train_step(nets, optimisers, mel_distance, wav, step, settings))
            if (step + 1) % CHECK_EVERY == 0 or step + 1 == settings.steps:
                check_finite(recent, step + 1, crops)
                log_and_save(recent, step + 1, settings, nets, optimisers, log, bar, rank)
                recent.clear()
    unreadable, odd = ({path: why for one in everyone(mine) for path, why in one.items()} for mine in (crops.unreadable, crops.odd))
    if rank == 0:
        report(codec, dev_files, out)
        for why in unreadable.values():
            print(f"skipped: {why}")
        for name, count in Counter(name for names in odd.values() for name in names).items():
            print(f"odd: {count} of {len(files)} files are {name}")
        if len(files) < 10:
            print(f"odd: so few files to train on ({len(files)}) that the codec will hardly fit other voices")
        print(f"wrote {out / 'codec.pt'}; next: python tokenize_corpus.py --codec {out / 'codec.pt'}")


CHECK_EVERY = 100       # steps between log lines; each is also a checkpoint


def train_step(nets, optimisers, mel_distance, wav, step: int, settings) -> tuple[dict[str, Tensor], Tensor]:
    """One step on wav (B, S) -> the losses and the tokens (B, Q, T), left on the device."""
    warm = min(1.0, (step + 1) / 100)                   # then a half cosine to a twentieth of the peak
    lr = settings.lr * warm * (0.525 + 0.475 * math.cos(math.pi * step / settings.steps))
    for optimiser in optimisers:
        optimiser.param_groups[0]["lr"] = lr
    made, quantized = nets[0](wav)
    losses = {"mel": mel_distance(wav, made), "wave": (wav - made).abs().mean(), "commit": quantized.loss}
    if settings.adversarial:
        if step % 3 < 2:                                # the discriminator learns in two steps of three
            step_down(discriminator_loss(nets[1], wav, made), nets[1], optimisers[1])
        losses.update(generator_losses(nets[1], wav, made))
    step_down(sum(WEIGHTS[name] * value for name, value in losses.items()), nets[0], optimisers[0])
    return {name: value.detach() for name, value in losses.items()}, quantized.tokens


def step_down(loss: Tensor, net: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)     # a click in one file must not throw the run off
    optimiser.step()


def average(value: Tensor) -> float:
    """Mean over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value.item()


def everyone(mine) -> list:
    """What each process has, in order of rank."""
    all_of_them = [mine]
    if dist.is_initialized():
        all_of_them *= dist.get_world_size()
        dist.all_gather_object(all_of_them, mine)
    return all_of_them


def check_finite(recent, step: int, crops: Crops) -> None:
    good = torch.stack([sum(losses.values()) for losses, _ in recent]).isfinite().tolist()
    if False in good:
        first = step - len(recent) + good.index(False)
        raise InputError(f"the loss became infinite at step {first + 1}, at crops of {', '.join(map(str, crops.files_of(first)[:8]))}; "
                         f"the last good checkpoint is kept: try a lower --lr or look for odd audio")


def log_and_save(recent, step: int, settings, nets, optimisers, log: list, bar, rank: int) -> None:
    losses = {name: average(torch.stack([row[name] for row, _ in recent]).mean()) for name in recent[0][0]}
    tokens = torch.cat(everyone(torch.cat([tokens for _, tokens in recent[-50:]]).cpu()))
    if rank:
        return
    codec = getattr(nets[0], "module", nets[0])
    size = codec.quantizer.codebook_size
    usage, perplexity = usage_and_perplexity(tokens, torch.ones_like(tokens[:, 0]).float(), size)
    bar.write(f"step {step} | " + " | ".join(f"{name} {value:.3f}" for name, value in losses.items())
              + f" | codes in use {100 * usage.mean():.0f} % | perplexity {perplexity.mean():.0f} of {size}"
              + f" | {bar.format_dict['rate'] or 0:.1f} steps/s")
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    log.append({"step": step, **losses, "usage": usage.tolist(), "perplexity": perplexity.tolist()})
    save_checkpoint(out / "codec.pt", {"kind": "codec", "settings": asdict(settings), "step": step, "model": codec.state_dict(),
                                       "discriminator": nets[1].state_dict() if len(nets) > 1 else {},
                                       "optimisers": [optimiser.state_dict() for optimiser in optimisers], "log": log})
    write_atomically(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log).encode())


@torch.inference_mode()
def report(codec: Codec, files: list[Path], out: Path) -> None:
    """How well the codec does on whole dev utterances; printed and written to report.json."""
    codec.eval()
    device = next(codec.parameters()).device
    mel_distance, rows, tokens = MelDistance().to(device), [], []
    for path in files:
        try:
            wav = read_audio(path)[None, :30 * SAMPLE_RATE].to(device)
        except InputError as error:
            print(f"skipped: {error}")
            continue
        wav = F.pad(wav, (0, max(0, 512 - wav.shape[1])))                       # the longest hop of the mel distance
        tokens.append(codec.encode(wav)[0])
        made = codec.decode(tokens[-1])[:, :wav.shape[1]]
        rows.append((mel_distance(wav, made).item(), si_sdr(made, wav).item()))
    if not rows:
        return print("no dev audio: no report")
    tokens = torch.cat(tokens, 2)                       # (1, Q, all frames)
    size = codec.quantizer.codebook_size
    usage, perplexity = usage_and_perplexity(tokens, torch.ones_like(tokens[:, 0]).float(), size)
    mel, sdr = np.mean(rows, 0)
    print(f"dev ({len(rows)} files): mel distance {mel:.3f} | SI-SDR {sdr:.1f} dB | {codec.bitrate / 1000:.2f} kbit/s")
    for level in range(codec.quantizer.num_codebooks):
        print(f"  codebook {level}: {100 * usage[level]:.0f} % of {size} codes in use, perplexity {perplexity[level]:.0f}")
    if perplexity.min() < min(0.02 * size, 0.1 * tokens.shape[2]):              # few frames cannot use many codes
        print("  a codebook has collapsed: a few codes stand for nearly everything. Is the audio silent, or all alike? Otherwise try "
              "more --steps or a lower --lr" + (", or --quantizer fsq." if codec.settings.quantizer == "rvq" else "."))
    result = {"files": len(rows), "mel_distance": mel, "si_sdr": sdr, "bitrate": codec.bitrate, "frame_rate": codec.frame_rate,
              "usage": usage.tolist(), "perplexity": perplexity.tolist(), "fingerprint": codec.fingerprint}
    write_atomically(out / "report.json", json.dumps(result, indent=1).encode())


def reconstruct(settings: CodecSettings) -> None:
    if len(settings.reconstruct) != 2:
        raise InputError("--reconstruct takes two paths: IN OUT")
    source, target = settings.reconstruct
    codec = Codec.load(Path(settings.out) / "codec.pt", pick_device(settings.device))
    wav = read_audio(source)
    tokens, _ = codec.encode(wav[None].to(next(codec.parameters()).device))
    made, buffer = codec.decode(tokens)[0, :len(wav)].cpu().clamp(-1, 1), io.BytesIO()
    try:
        sf.write(buffer, made.numpy(), SAMPLE_RATE, format=Path(target).suffix[1:])
    except (sf.LibsndfileError, TypeError, ValueError) as error:
        raise InputError(f"{target}: not a kind of audio that can be written ({error}); try a name that ends in .wav or .flac") from None
    write_atomically(Path(target), buffer.getbuffer())
    print(f"{source}: {len(wav) / SAMPLE_RATE:.1f} s -> {tokens.numel()} tokens, {codec.bitrate / 1000:.1f} kbit/s -> {target}")


# ---------------------------------------------------------------------------------------------------- audio and corpora

AUDIO_ENDINGS = {".flac", ".wav", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".caf", ".w64"}
DATA = Path("data")                             # where named corpora are kept
# name: (folder, train, dev, test); a subset of LibriSpeech has the same name everywhere
CORPORA = {"synthetic": (DATA / "synthetic", ("train",), ("dev",), ("test",)),
           "mini-librispeech": (DATA / "LibriSpeech", ("train-clean-5",), ("dev-clean-2",), ("test-clean",)),
           "librispeech": (DATA / "LibriSpeech", ("train-clean-100",), ("dev-clean",), ("test-clean", "test-other"))}
MINI = "https://www.openslr.org/resources/31/"
MINI_MD5 = {"train-clean-5": "5df7d4e78065366204ca6845bb08f490", "dev-clean-2": "6d7ab67ac6a1d2c993d050e16d61080d"}


def read_audio(path: str | Path, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """Any file that soundfile reads -> wav (S,) float32 in [-1, 1], channels averaged, resampled.

    Raises InputError when the file cannot be read, breaks off, or holds no samples or such as cannot be sound."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            kind, size = file.read(4), int.from_bytes(file.read(4), "little")
        # libsndfile takes a WAV that breaks off for a shorter one. Sizes near 2 GiB stand for "unknown", of streams.
        if kind == b"RIFF" and os.path.getsize(path) < 0.9 * size and size < 0x7f000000:
            raise InputError(f"{path}: breaks off after {os.path.getsize(path)} of {size + 8} bytes")
        with sf.SoundFile(path) as file:
            rate, promised, blocks = file.samplerate, file.frames, []
            # Not file.blocks(): where a file breaks off, it fills up with whatever was in memory.
            while len(block := file.read(1 << 20, dtype="float32", always_2d=True)):
                blocks.append(block.mean(1))
    except (sf.LibsndfileError, OSError, RuntimeError) as error:
        raise InputError(f"{path}: not readable as audio ({str(error).splitlines()[0]})") from None
    wav = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if not len(wav):
        raise InputError(f"{path}: holds no samples")
    if not np.isfinite(wav).all():
        raise InputError(f"{path}: holds samples that are not numbers (NaN or infinity)")
    if np.abs(wav).max() > 100:
        raise InputError(f"{path}: holds samples up to {np.abs(wav).max():.0g}; full scale is 1: damaged, or to be scaled first")
    if len(wav) < 0.9 * promised:                       # the header of an MP3 may be a little off
        raise InputError(f"{path}: breaks off after {len(wav)} of {promised} samples")
    common = math.gcd(rate, sample_rate)
    if not 1000 <= rate <= 1_000_000 or rate * sample_rate > 2e7 * common ** 2:     # resampling would take gigabytes
        raise InputError(f"{path}: a sample rate of {rate} Hz is that of a damaged file")
    wav = torch.from_numpy(wav)
    return wav if rate == sample_rate else torchaudio.functional.resample(wav, rate, sample_rate)


def corpus_subsets(corpus: str, train: tuple, dev: tuple, test: tuple | None = None) -> tuple[Path, tuple, tuple, tuple]:
    """Corpus name or folder and the subsets asked for -> folder and subsets; named corpora are made or fetched.

    An empty tuple stands for the usual subsets of this corpus; test None for none."""
    folder, *usual = CORPORA.get(corpus, (Path(corpus), ("train",), ("dev",), ("test",)))
    if test is None:
        test, usual[2] = (), ()
    chosen = [tuple(asked) or default for asked, default in zip((train, dev, test), usual)]
    if corpus not in CORPORA and not folder.is_dir():
        raise InputError(f"--corpus {corpus}: no such folder, and no corpus of that name; known: {', '.join(CORPORA)}")
    if corpus == "synthetic" and first_process():
        make_synthetic(folder)
    elif corpus in CORPORA and first_process():
        for subset in sum(chosen, ()):
            fetch_librispeech(folder, subset)
    if dist.is_initialized():
        dist.barrier()                          # the other processes wait until the corpus is there
    return folder, *chosen


def first_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def find_audio(folder: Path, subset: str) -> list[Path]:
    """The audio files of a subset: of its manifest <subset>.jsonl, or else of its folder (however deep)."""
    if (folder / f"{subset}.jsonl").is_file():
        return [folder / row["audio_filepath"] for row in read_manifest(folder / f"{subset}.jsonl")[0]]
    if (folder / subset).is_dir():
        return sorted(path for path in (folder / subset).rglob("*") if path.suffix.lower() in AUDIO_ENDINGS)
    raise InputError(f"{folder}: has neither a folder {subset}/ nor a manifest {subset}.jsonl; it holds: "
                     + (", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"))


def read_manifest(path: Path) -> tuple[list[dict], list[str]]:
    """JSON lines with at least audio_filepath, relative to the manifest -> rows, and a line on each that is none."""
    rows, skipped = [], []
    for number, line in enumerate(path.read_text("utf-8-sig", errors="replace").split("\n"), 1):
        try:
            if line.strip():
                row = json.loads(line)
                if not Path(row["audio_filepath"]).name:
                    raise ValueError("empty path")
                rows.append(row)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            skipped.append(f"{path}: line {number} is not a row with audio_filepath ({error!r})")
    return rows, skipped


def fetch_librispeech(folder: Path, subset: str) -> None:
    """Download one subset into folder/<subset>, unless it is there. Unpacked elsewhere first: never half a subset."""
    if (folder / subset).is_dir():
        return
    partial = folder.parent / f"partial-{subset}"
    partial.mkdir(parents=True, exist_ok=True)
    if subset in MINI_MD5:
        archive = download(f"{MINI}{subset}.tar.gz", partial / f"{subset}.tar.gz", MINI_MD5[subset])
        print(f"unpacking {archive.name}")
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(partial, filter="data")  # refuses links and paths that lead outside
        except tarfile.TarError as error:
            raise InputError(f"{archive}: refused to unpack it: {error}") from None
    else:
        shutil.rmtree(partial / "LibriSpeech", ignore_errors=True)              # of a killed run: torchaudio would take it as whole
        for left in partial.glob("*.partial"):
            left.unlink()
        try:
            torchaudio.datasets.LIBRISPEECH(partial, subset, download=True)
        except (OSError, RuntimeError, ValueError, EOFError, tarfile.TarError) as error:
            raise InputError(f"{subset}: no such subset of LibriSpeech, or it cannot be fetched ({error}); run again, or fetch it by "
                             f"hand to {folder / subset}") from None
    folder.mkdir(parents=True, exist_ok=True)
    os.replace(partial / "LibriSpeech" / subset, folder / subset)
    shutil.rmtree(partial)


def download(url: str, path: Path, md5: str) -> Path:
    """Fetch url to path, continuing where an earlier try stopped; InputError when the checksum is wrong."""
    start = path.stat().st_size if path.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            start = start if reply.status == 206 else 0
            total = start + int(reply.headers.get("Content-Length", 0))
            with open(path, "ab" if start else "wb") as file, \
                    tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := reply.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
            if path.stat().st_size < total:
                raise OSError(f"broke off after {path.stat().st_size} of {total} bytes")
    except urllib.error.HTTPError as error:
        if error.code != 416:                           # 416: nothing is left to fetch
            raise InputError(f"{url}: {error}; try again later, or fetch it by hand to {path}") from None
    except OSError as error:
        raise InputError(f"{url}: {error}; no network? run again to continue, or fetch it by hand to {path}") from None
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        path.unlink()
        raise InputError(f"{url}: checksum {found}, expected {md5}; the file was removed, run again to fetch it anew")
    return path


# ---------------------------------------------------------------------------------------------------- synthetic speech
#
# A source-filter synthesiser after Klatt (1980), with vowels near those of Peterson and Barney (1952): pulses at the
# pitch and white noise pass through resonances that move from sound to sound. The filter works frame by frame in the
# STFT domain, which makes it fast without a compiled loop: 760 utterances, 28 minutes of speech, in about 25 s.

STEP, SPAN, SPAN_FFT = 64, 256, 512     # samples; the FFT is twice the span: a resonance rings on past its frame


def phone_table() -> dict:
    """Name -> the pieces of a sound, ten numbers each:
    ms | F1 F2 F3, Hz | voice, breath, hiss: amplitudes | hz, width: of the hiss or of a nasal's zero | nasal: 0 or 1.
    Breath is noise through the formants, hiss is noise with a peak of its own.  NaN: no target, go from neighbour to neighbour.
    """
    glide, none = (np.nan,) * 3, (np.nan,) * 2
    table = {"SIL": [(100, *glide, 0, 0, 0, 4000, 1000, 0)], "HH": [(70, *glide, 0, 0.4, 0, *none, 0)]}
    for name, *targets in [("IY", (280, 2300, 3000)), ("IH", (400, 1950, 2550)), ("EH", (550, 1800, 2500)),
                           ("AE", (700, 1650, 2450)), ("AA", (740, 1100, 2450)), ("AO", (560, 800, 2450)),
                           ("UW", (310, 900, 2250)), ("AH", (620, 1250, 2450)), ("ER", (480, 1300, 1650)),
                           ("EY", (520, 1850, 2500), (310, 2250, 2900)), ("AY", (730, 1200, 2450), (330, 2150, 2800)),
                           ("OW", (540, 950, 2400), (330, 780, 2300)), ("AW", (740, 1300, 2450), (350, 850, 2300))]:
        table[name] = [(115 if len(targets) == 1 else 80, *f, 1, 0, 0, *none, 0) for f in targets]
    for name, ms, f, voice in [("W", 70, (290, 650, 2200), 0.6), ("Y", 65, (260, 2350, 3100), 0.6),
                               ("R", 75, (330, 1100, 1450), 0.7), ("L", 75, (350, 1000, 2900), 0.55)]:
        table[name] = [(ms, *f, voice, 0, 0, *none, 0)]
    for name, f, zero in [("M", (260, 950, 2200), 1100), ("N", (260, 1600, 2600), 1900), ("NG", (260, 2150, 2700), 3200)]:
        table[name] = [(80, *f, 0.6, 0, 0, zero, 500, 1)]
    for name, ms, f, voice, *hiss in [("F", 95, (340, 900, 2300), 0, 0.10, 4500, 4500),
                                      ("V", 65, (340, 900, 2300), 0.3, 0.06, 4500, 4500),
                                      ("S", 110, (320, 1700, 2600), 0, 0.45, 6300, 1000),
                                      ("Z", 80, (280, 1700, 2600), 0.3, 0.3, 6300, 1000),
                                      ("SH", 110, (320, 1900, 2500), 0, 0.5, 3000, 700)]:
        table[name] = [(ms, *f, voice, 0, *hiss, 0)]
    # A stop is a closure (a murmur where voiced), a burst at the place of articulation and, where unvoiced, breath.  Its
    # formants are the locus to which the vowels beside it bend; they tell B from D from G more than the burst does.
    for name, voiced, f, hiss, *shape in [("P", "B", (250, 750, 2200), 0.25, 900, 900),
                                          ("T", "D", (250, 1750, 2700), 0.6, 5000, 1500),
                                          ("K", "G", (250, 2100, 2350), 0.6, 2100, 400)]:
        table[name] = [(55, *f, 0, 0, 0, *shape, 0), (14, *f, 0, 0.1, hiss, *shape, 0), (30, *glide, 0, 0.35, 0, *shape, 0)]
        table[voiced] = [(50, *f, 0.12, 0, 0, *shape, 0), (10, *f, 0.4, 0.1, 0.7 * hiss, *shape, 0)]
    table["CH"] = [table["T"][0], (75, *table["SH"][0][1:])]
    return table


PHONES = phone_table()
LEXICON = {word: phones.split() for word, phones in (entry.split(":") for entry in """
MAN:M AE N|MOON:M UW N|NAME:N EY M|LAMP:L AE M P|KING:K IH NG|SONG:S AO NG|RIVER:R IH V ER|WATER:W AO T ER|YELLOW:Y EH L OW|
RED:R EH D|GREEN:G R IY N|BLUE:B L UW|BLACK:B L AE K|WHITE:W AY T|HOUSE:HH AW S|HILL:HH IH L|FISH:F IH SH|SHIP:SH IH P|
SHOE:SH UW|CHAIR:CH EH R|CHEESE:CH IY Z|TEACHER:T IY CH ER|BIRD:B ER D|GIRL:G ER L|DOG:D AO G|CAT:K AE T|COW:K AW|
HORSE:HH AO R S|FOX:F AA K S|BOX:B AA K S|CUP:K AH P|BUS:B AH S|SUN:S AH N|SEVEN:S EH V AH N|SIX:S IH K S|FIVE:F AY V|
NINE:N AY N|TEN:T EH N|EIGHT:EY T|OPEN:OW P AH N|OVER:OW V ER|UNDER:AH N D ER|AFTER:AE F T ER|APPLE:AE P AH L|EASY:IY Z IY|
MONEY:M AH N IY|HAPPY:HH AE P IY|BABY:B EY B IY|WINDOW:W IH N D OW|GARDEN:G AA R D AH N|PAPER:P EY P ER|MUSIC:M Y UW Z IH K|
YOUNG:Y AH NG|LIGHT:L AY T|RAIN:R EY N|ROAD:R OW D|VERY:V EH R IY|GO:G OW|PARK:P AA R K|VISIT:V IH Z IH T
""".replace("\n", "").split("|"))}

VOICES = {"train": range(0, 20), "dev": range(20, 23), "test": range(23, 27)}    # no voice is in two subsets


def make_voice(seed: int, speaker: int) -> dict:
    """One speaker.  Steps of the golden ratio never meet, and spread any few neighbours over the whole range of sizes."""
    rng = np.random.default_rng([seed, speaker, 0])
    size = (0.37 * seed + 0.6180339887 * speaker) % 1                            # 0: long vocal tract, 1: short
    pitch = 90 * (260 / 90) ** min(max(size + rng.normal(0, 0.15), 0), 1)        # Hz; small people mostly speak higher
    return {"scale": 0.85 + 0.35 * size, "pitch": pitch, "rate": rng.uniform(0.8, 1.15),
            "breath": rng.uniform(0.01, 0.08), "tilt": rng.uniform(400, 1200)}   # Hz; above it 6 dB less an octave


def smooth(track: np.ndarray, frames: int) -> np.ndarray:
    """Moving average under a Hann window; track (T, columns), frames odd."""
    kernel = np.hanning(frames + 2)[1:-1] / np.hanning(frames + 2).sum()
    padded = np.pad(track, ((frames // 2, frames // 2), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, kernel, "valid") for column in padded.T], 1)


def articulate(words: list[str], voice: dict, rng: np.random.Generator):
    """Words -> track (T, 9), a piece's numbers but ms, around every STEP-th sample; [(phone, end sample), ...]."""
    phones = ["SIL"]
    for word in words:
        phones += LEXICON[word] + ["SIL"] * (rng.random() < 0.15)                # a pause after some words
    phones += ["SIL"] * (phones[-1] != "SIL")
    targets, ends, alignment = [], [0], []
    for i, phone in enumerate(phones):
        stretch = rng.uniform(0.85, 1.2) / voice["rate"] * (1.3 if len(phones) - 4 < i else 1)   # slower towards the end
        for ms, *target in PHONES[phone]:
            targets.append(target)
            ends.append(ends[-1] + int(ms * stretch * SAMPLE_RATE / 1000))
        alignment.append((phone, ends[-1]))
    targets, starts, ends = np.array(targets), np.array(ends[:-1]), np.array(ends[1:])
    targets[:, :3] *= rng.normal(1, 0.02, (len(targets), 3))                     # nobody says a sound twice the same way
    centre = np.arange(0, ends[-1] + STEP, STEP)
    track = targets[np.minimum(np.searchsorted(ends, centre, side="right"), len(ends) - 1)]
    for column, hold in [(0, 0.4), (1, 0.4), (2, 0.4), (6, 1), (7, 1)]:          # a formant holds for 40 % of a piece
        known = ~np.isnan(targets[:, column])
        margin = (1 - hold) / 2 * (ends - starts)
        knots = np.stack([starts + margin, ends - margin], 1)[known].ravel()
        track[:, column] = np.interp(centre, knots, targets[known, column].repeat(2))
    track[:, :3] = smooth(track[:, :3], 9)                                       # 36 ms: tongue and lips
    track[:, 3:6] = smooth(track[:, 3:6], 3)                                     # 12 ms: bursts stay short
    track[:, 8:] = smooth(track[:, 8:], 11)                                      # the velum is slow: vowels beside M turn nasal
    return track.astype(np.float32), alignment


def make_source(frames: int, voice: dict, rng: np.random.Generator) -> np.ndarray:
    """Pitch pulses and white noise, (2, frames * STEP), both of power 1."""
    melody = np.linspace(1.15, 0.82, frames) + smooth(rng.normal(0, 0.35, (frames, 1)), 61)[:, 0]    # falls, wanders
    pitch = np.repeat(voice["pitch"] * melody * rng.normal(1, 0.01, frames), STEP)                    # 1 % jitter
    phase = np.cumsum(pitch / SAMPLE_RATE)
    at = np.flatnonzero(np.diff(np.floor(phase)))                                # a pulse falls between samples at and at + 1:
    share = (phase[at + 1] % 1) / (pitch[at + 1] / SAMPLE_RATE)                         # split it, or the pitch sounds rough
    height = rng.normal(1, 0.05, len(at)) * np.sqrt(SAMPLE_RATE / pitch[at])
    source = np.stack([np.zeros(len(pitch)), rng.normal(0, 1, len(pitch))])
    source[0, at], source[0, at + 1] = height * share, height * (1 - share)
    return source.astype(np.float32)


def resonance(hz: np.ndarray, width: np.ndarray, delay: np.ndarray) -> np.ndarray:
    """A formant on the SPAN_FFT bins, gain 1 at 0 Hz.  hz and width (T,), delay = 1/z (bins,) -> (T, bins)."""
    radius = np.exp(-np.pi * width / SAMPLE_RATE)[:, None]
    b, c = 2 * radius * np.cos(2 * np.pi * hz / SAMPLE_RATE)[:, None], radius ** 2
    return (1 - b + c) / (1 - delay * (b - c * delay))


def speak(words: list[str], voice: dict, rng: np.random.Generator):
    """Words -> wav (n,) at 16 kHz; [(phone, end sample), ...], the last end is n."""
    track, alignment = articulate(words, voice, rng)
    f1, f2, f3, voiced, breath, hiss, hz, width, nasal = track.T                 # (T,) each
    bins = np.fft.rfftfreq(SPAN_FFT, 1 / SAMPLE_RATE).astype(np.float32)
    delay = np.exp(-2j * np.pi * bins / SAMPLE_RATE).astype(np.complex64)
    tract = resonance(f1 * voice["scale"], 70 + 80 * nasal, delay)               # (T, bins)
    tract *= resonance(f2 * voice["scale"], 90 + 100 * nasal, delay) * resonance(f3 * voice["scale"], 140 + 100 * nasal, delay)
    for f in voice["scale"] * np.arange(3500, 7800 / voice["scale"], 1000):      # the upper formants hardly move
        tract *= resonance(np.float32([f]), np.float32([f / 15]), delay)
    peak = hz * voice["scale"] ** 0.5                                            # made at the teeth: depends less on size
    bump = np.exp(-0.5 * ((bins - peak[:, None]) / width[:, None]) ** 2)         # (T, bins)
    tract *= 1 - 0.9 * nasal[:, None] * bump                                     # a nasal's zero

    padded = np.pad(make_source(len(track), voice, rng), ((0, 0), (SPAN // 2, SPAN)))
    cut = np.arange(len(track))[:, None] * STEP + np.arange(SPAN)                  # frame t is centred on sample t * STEP
    pulses, noise = np.fft.rfft(padded[:, cut] * np.hanning(SPAN + 1)[:-1].astype(np.float32), SPAN_FFT)   # (T, bins) each
    pulses *= voiced[:, None] / (1 + 1j * bins / voice["tilt"]).astype(np.complex64)
    breath = 0.15 * breath + 0.5 * voice["breath"] * voiced
    frames = np.fft.irfft(tract * (pulses + noise * breath[:, None]) + noise * hiss[:, None] * bump, SPAN_FFT)
    wav = np.zeros(len(track) * STEP + SPAN_FFT)
    for t, frame in enumerate(frames):
        wav[t * STEP:t * STEP + SPAN_FFT] += frame
    wav = wav[SPAN // 2:][:alignment[-1][1]]
    wav *= 10 ** (rng.uniform(-30, -24) / 20) / np.sqrt(np.mean(wav ** 2))       # level, and room noise, in dB of full scale
    return np.clip(wav + rng.normal(0, 10 ** (rng.uniform(-70, -52) / 20), len(wav)), -0.999, 0.999), alignment


def make_synthetic(root: Path, seed: int = 0, sizes={"train": 600, "dev": 60, "test": 100}) -> None:
    """Write root/<subset>/<speaker>/<chapter>/ as LibriSpeech does, and the exact alignment beside it as *.phones.txt.

    A sentence is 3 to 7 words drawn at random: no language model can guess what was not heard.  Its checksum alone says
    in which subset it may stand, so none is in two, whatever the sizes and seeds.  A subset that exists is left as it is.
    """
    for subset, size in sizes.items():
        if (Path(root) / subset).exists():
            continue
        part = Path(root) / f".{subset}.part"                                    # renamed when whole: no half subset, ever
        shutil.rmtree(part, ignore_errors=True)
        for n in range(size):
            speaker, number = VOICES[subset][n % len(VOICES[subset])], n // len(VOICES[subset])
            rng = np.random.default_rng([seed, speaker, 1 + number])
            words = home = None
            while home != subset:
                words = list(rng.choice(list(LEXICON), rng.integers(3, 8)))
                home = {0: "test", 1: "dev"}.get(zlib.crc32(" ".join(words).encode()) % 10, "train")
            wav, alignment = speak(words, make_voice(seed, speaker), rng)
            chapter, name = part / f"{100 + speaker}" / "1", f"{100 + speaker}-1"
            chapter.mkdir(parents=True, exist_ok=True)
            sf.write(buffer := io.BytesIO(), wav, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
            write_atomically(chapter / f"{name}-{number:04d}.flac", buffer.getbuffer())  # tells of a full disk; soundfile does not
            with open(chapter / f"{name}.trans.txt", "a") as text, open(chapter / f"{name}.phones.txt", "a") as phones:
                print(f"{name}-{number:04d}", *words, file=text)
                print(f"{name}-{number:04d}", *(f"{phone}:{end}" for phone, end in alignment), file=phones)
        part.rename(Path(root) / subset)


# ---------------------------------------------------------------------------------------------------- plumbing

FORMAT = 1              # of checkpoints; raised when their contents change


def write_atomically(path: Path, data: bytes) -> None:
    """A reader finds the old file or the new one, never a half of it."""
    temporary = path.with_name(f".{path.name}.part")    # always the same: what a killed run left is written over
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None         # a full disk does not say which file


def save_checkpoint(path: Path, content: dict) -> None:
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path: str | Path, kind: str, device: str = "cpu") -> dict:
    """Raises InputError unless path holds a checkpoint of this kind and format."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; train it first, or give its path")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        found = saved["kind"], saved["format"]
        if zipfile.ZipFile(path).testzip():             # torch itself compares no checksums
            raise ValueError
    except Exception:                                   # torch raises many types for a damaged file
        raise InputError(f"{path}: not a checkpoint of this project, or damaged; delete it to train anew") from None
    if found != (kind, FORMAT):
        raise InputError(f"{path}: holds {found[0]} (format {found[1]}), expected {kind} (format {FORMAT}); give another path, or train it anew")
    return saved


@contextmanager
def fitting(path: str | Path):
    """Around what is done with the parts of a checkpoint: those of another version are told in one line."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: was written by another version of this script ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[-200:]}); use that version, or train it anew") from None


def resume(path: Path, settings: CodecSettings, nets: list[nn.Module], optimisers: list) -> tuple[int, list]:
    """Load an earlier checkpoint where there is one -> the step to start at, the log so far."""
    if not path.exists():
        return 0, []
    saved = load_checkpoint(path, "codec")
    free = {"device", "out", "reconstruct"}             # may differ between a run and its continuation
    with fitting(path):
        before = asdict(CodecSettings(**saved["settings"]))
        for name, value in asdict(settings).items():
            if name not in free and before[name] != value:
                raise InputError(f"{path} was trained with --{name} {before[name]}, now {value}: give another --out, or delete the file")
        for net, state in zip(nets, (saved["model"], saved["discriminator"])):
            net.load_state_dict(state)
        for optimiser, state in zip(optimisers, saved["optimisers"]):
            optimiser.load_state_dict(state)
        return int(saved["step"]), saved.get("log", [])


def pick_device(name: str) -> str:
    if name != "auto":
        if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
            raise InputError(f"--device {name}: this machine, or this build of torch, has none; try --device cpu")
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def start_processes(device: str) -> tuple[torch.device, int, int]:
    """-> device, rank, number of processes; more than one where torchrun started this script."""
    device, world = pick_device(device), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        # So patient because the first process may have a corpus to download.
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=12))
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
    return torch.device(device), int(os.environ.get("RANK", 0)), world


def stop_processes() -> None:
    """After all work: nobody leaves before the others, and no thread of gloo's still holds a tensor when the interpreter goes."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def parse(settings: type, description: str, arguments: list[str] | None = None):
    """Command-line flags from the fields of a settings class -> an instance of it."""
    page = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=120)
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=description, formatter_class=page)
    for item in fields(settings):
        flag, more = "--" + item.name.replace("_", "-"), dict(item.metadata)
        if item.default is False:
            parser.add_argument(flag, action="store_true", **more)
            continue
        several = isinstance(item.default, tuple)
        more.setdefault("type", type(item.default))
        if "choices" not in more:
            more["metavar"] = {int: "N", float: "X", str: "NAME"}[more["type"]]
        shown = " ".join(map(str, item.default)) if several else str(item.default)
        more["help"] += f" (default: {shown})" if shown else ""
        parser.add_argument(flag, default=item.default, nargs="+" if several else None, **more)
    values = vars(parser.parse_args(arguments))
    return settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def run(main, *errors: type) -> None:
    """Call main; bad input (InputError and errors), Ctrl-C and a full disk end in one line instead of a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")   # names and transcripts in letters that the terminal lacks
    sys.stderr.reconfigure(errors="backslashreplace")
    try:
        main()
        stop_processes()
    except (InputError, *errors) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues at the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; what was finished before is kept, the same command continues", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:        # on a CPU torch has no type of its own for it
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        print("error: out of memory; try a smaller --batch or --size, or --device cpu", file=sys.stderr)
        sys.exit(2)


def main(arguments: list[str] | None = None) -> None:
    settings = parse(CodecSettings, __doc__, arguments)
    if settings.reconstruct:
        reconstruct(settings)
    else:
        train(settings)


if __name__ == "__main__":
    run(main)
