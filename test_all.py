"""The properties that hold this project together, a test each, in the order in which the files are read.

in   nothing: every test makes its own few seconds of audio in a temporary folder
out  exit code 0 when all hold; the last line says how many did

    python test_all.py                                   # all, a minute and a half on two CPU cores
    python test_all.py Quantizers Codecs.test_tokens_are_the_same_alone_and_in_a_batch

The name of a test is the property; its body is the shortest way that we know to break it.

Legend: B utterances, S samples, T token frames, Q codebooks, K codes, D latent size.
"""

import copy
import functools
import hashlib
import http.server
import importlib.util
import io
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import unittest
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import jiwer
import numpy as np
import soundfile as sf
import torch

import codec as codec_stage
import evaluate
import tokenize_corpus
import train_asr
from asr_model import Augment, CodecASR
from codec import Codec, CodecSettings, Crops, InputError, make_synthetic, read_audio
from quantizers import GroupFSQ, ResidualVQ, usage_and_perplexity
from tokenize_corpus import Noise, read_subset
from train_asr import Text, TrainSet, TrainSettings

HERE = Path(__file__).resolve().parent
FOUR_CODECS = [(encoder, quantizer) for encoder in ("mel", "time") for quantizer in ("fsq", "rvq")]


def setUpModule():
    global SCRATCH                                      # what several tests read: one corpus, the four codecs
    SCRATCH = tempfile.TemporaryDirectory()
    torch.set_num_threads(1)                            # the models are tiny: more threads would only wait for each other


def tearDownModule():
    SCRATCH.cleanup()


class Case(unittest.TestCase):
    """A temporary folder and a fixed seed for each test; what the scripts print is kept in self.output."""

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.output = self.enterContext(redirect_stdout(io.StringIO()))
        self.enterContext(redirect_stderr(io.StringIO()))
        torch.manual_seed(0)

    def assertSame(self, one, other, message=None):
        self.assertEqual(one.shape, other.shape, message)
        self.assertTrue(torch.equal(one, other), message)

    def assertClose(self, one, other, atol=1e-5):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)

    def assertInputError(self, text, call, *arguments, **more):
        """Bad input ends in an InputError of one line that says `text`."""
        with self.assertRaisesRegex((InputError, train_asr.InputError), text) as caught:
            call(*arguments, **more)
        self.assertNotIn("\n", str(caught.exception))


def noise(*shape) -> torch.Tensor:
    return 0.1 * torch.randn(shape)


@functools.cache
def small_corpus() -> Path:
    """Synthetic speech: 4 utterances to train on, 2 for dev, 2 for test."""
    with redirect_stdout(io.StringIO()):
        make_synthetic(Path(SCRATCH.name) / "corpus", sizes={"train": 4, "dev": 2, "test": 2})
    return Path(SCRATCH.name) / "corpus"


@functools.cache
def trained_codec(encoder: str = "mel", quantizer: str = "fsq") -> Path:
    """A codec after two steps of training, by the script itself."""
    out = Path(SCRATCH.name) / f"codec-{encoder}-{quantizer}"
    codec_stage.main(["--corpus", str(small_corpus()), "--encoder", encoder, "--quantizer", quantizer, "--codebooks", "4",
                      "--steps", "2", "--batch", "4", "--device", "cpu", "--out", str(out)])
    return out / "codec.pt"


def tokenize(out: Path, *more, corpus: Path | None = None) -> Path:
    tokenize_corpus.main(["--corpus", str(corpus or small_corpus()), "--codec", str(trained_codec()), "--workers", "0",
                          "--device", "cpu", "--out", str(out), *map(str, more)])
    return out


def rows(folder: Path, subset: str = "train") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{subset}.jsonl").open(encoding="utf-8")]


# ---------------------------------------------------------------------------------------------------- quantizers.py

class Quantizers(Case):
    def latent(self, batch=4, time=60, dim=16):
        """Directions of unlike strength, as an encoder gives them: (B, D, T)."""
        return torch.randn(batch, dim, time) * torch.linspace(2, 0.2, dim)[:, None]

    def rvq(self, **more):
        quantizer = ResidualVQ(**{"dim": 16, "num_codebooks": 4, "codebook_size": 16, "dropout": 0.0} | more)
        for _ in range(20):
            quantizer(self.latent())
        return quantizer.eval()

    def test_sum_of_codebook_rows_is_the_decoded_latent(self):
        for quantizer in (self.rvq(), GroupFSQ(4)):
            latent, books = self.latent(), quantizer.codebooks()
            result = quantizer(latent)
            rows = sum(book[level] for book, level in zip(books, result.tokens.unbind(1)))      # (B, T, D)
            self.assertEqual(books.shape, (4, quantizer.codebook_size, 16))
            self.assertClose(rows.transpose(1, 2), quantizer.decode(result.tokens))
            self.assertClose(rows.transpose(1, 2), result.latent)
            self.assertSame(quantizer.encode(latent), result.tokens)

    def test_gradient_passes_rvq_once_whatever_its_depth(self):
        quantizer = self.rvq()
        for mode in (True, False):
            latent = self.latent().requires_grad_()
            quantizer.train(mode)(latent).latent.sum().backward()
            self.assertClose(latent.grad, torch.ones_like(latent))

    def test_every_rvq_level_pulls_on_the_encoder(self):
        quantizer, latent = self.rvq(), self.latent().requires_grad_()
        result = quantizer(latent)
        result.loss.backward()
        # Level n's loss is the squared distance to the sum of the first n codes; d/dx of a mean square is 2 / count * difference.
        pulls = [2 / latent.numel() / 4 * (latent - quantizer.decode(result.tokens[:, :n])).detach() for n in (1, 2, 3, 4)]
        self.assertClose(latent.grad, sum(pulls), atol=1e-7)
        self.assertGreater(min(pull.norm() for pull in pulls), 0)

    def test_dead_code_moves_to_data_and_stays(self):
        quantizer = ResidualVQ(dim=2, num_codebooks=1, codebook_size=8, dropout=0.0)
        latent = lambda: 5 + torch.randn(8, 2, 50)
        for _ in range(5):
            quantizer(latent())
        quantizer.embed[0, 3] = 100.0                   # far from all data, and hardly ever used
        quantizer.ema_count[0, 3], quantizer.ema_sum[0, 3] = 1e-4, 1e-2
        data = latent()
        quantizer(data)
        here = data.transpose(1, 2).flatten(0, 1)       # (N, D)
        self.assertLess(torch.cdist(quantizer.embed[0, 3:4], here).min(), 1e-4)
        for _ in range(10):
            usage = quantizer(latent()).usage
            self.assertLess((quantizer.embed[0, 3] - 5).abs().max(), 5)
        self.assertEqual(usage[0], 1)                   # all eight codes are in use, number 3 among them

    def test_first_codebooks_alone_decode_and_more_are_better(self):
        quantizer, latent = self.rvq(), self.latent()
        tokens = quantizer.encode(latent)
        errors = [(latent - quantizer.decode(tokens[:, :n])).square().mean().item() for n in (1, 2, 3, 4)]
        self.assertEqual(errors, sorted(errors, reverse=True))
        self.assertLess(errors[-1], 0.7 * errors[0])
        fsq = GroupFSQ(4)
        tokens = fsq.encode(latent)
        self.assertSame(fsq.decode(tokens[:, :2])[:, :8], fsq.decode(tokens)[:, :8])
        self.assertEqual(fsq.decode(tokens[:, :2])[:, 8:].abs().max(), 0)

    def test_dropout_of_codebooks_leaves_each_utterance_its_first_n(self):
        quantizer, latent = self.rvq(dropout=1.0, decay=1.0).train(), self.latent(batch=40, time=6)
        result, depths = quantizer(latent), set()
        for tokens, made in zip(result.tokens, result.latent):
            fits = [n for n in (1, 2, 3, 4) if torch.allclose(quantizer.decode(tokens[None, :n])[0], made, atol=1e-4)]
            self.assertEqual(len(fits), 1)
            depths.update(fits)
        self.assertEqual(depths, {1, 2, 3, 4})

    def test_kmeans_initialises_each_level_on_what_the_ones_before_left(self):
        quantizer, latent = ResidualVQ(dim=16, num_codebooks=4, codebook_size=16), self.latent()
        quantizer.initialise(latent.transpose(1, 2).flatten(0, 1))
        tokens = quantizer.encode(latent)
        energy = [latent.square().mean()] + [(latent - quantizer.decode(tokens[:, :n])).square().mean() for n in (1, 2, 3, 4)]
        for before, after in zip(energy, energy[1:]):
            self.assertLess(after, 0.85 * before)

    def test_padding_is_in_no_statistic(self):
        latent, length = self.latent(time=20), torch.full((4,), 20)
        padded = torch.cat([latent, torch.full((4, 16, 15), 1e3)], 2)
        one, other = (ResidualVQ(16, 4, 16, dead_below=0, dropout=0) for _ in range(2))
        for _ in range(3):
            torch.manual_seed(1)
            alone = one(latent)
            torch.manual_seed(1)
            result = other(padded, length)
        for name in ("loss", "usage", "perplexity"):
            self.assertClose(getattr(alone, name), getattr(result, name))
        for name, value in one.state_dict().items():
            self.assertClose(value, other.state_dict()[name])
        self.assertClose(GroupFSQ(4)(latent).usage, GroupFSQ(4)(padded, length).usage)
        restless = ResidualVQ(16, 2, 64, decay=0.5, dead_below=0.9, dropout=0)  # many of its codes die: none may move to padding
        for _ in range(5):
            restless(padded, length)
        self.assertLess(restless.embed.abs().max(), 50)

    def test_perplexity_is_the_number_of_codes_used_alike(self):
        tokens = torch.tensor([0, 1, 2, 3]).repeat(6).view(1, 1, 24)
        usage, perplexity = usage_and_perplexity(tokens, torch.ones(1, 24), 16)
        self.assertClose(torch.cat([usage, perplexity]), torch.tensor([0.25, 4.0]), atol=1e-3)

    def test_fsq_reaches_every_index(self):
        fsq, grid = GroupFSQ(1), torch.linspace(-5, 5, 201)
        digits = fsq.encode(grid.expand(1, 4, -1))[0, 0, :, None] // fsq.basis % fsq.width      # (201, 4)
        tokens = torch.arange(1000)
        wanted = tokens[:, None] // fsq.basis % fsq.width                                       # (1000, 4)
        latent = torch.stack([torch.stack([grid[digits[:, d] == n].median() for n in range(fsq.width[d])])[wanted[:, d]]
                              for d in range(4)])                                               # (4, 1000)
        self.assertSame(fsq.encode(latent[None])[0, 0], tokens)
        values = fsq.decode(tokens[None, None])[0].T
        self.assertEqual(len(values.unique(dim=0)), 1000)
        self.assertLessEqual(values.abs().max(), 1)

    def test_fsq_rounds_to_the_nearest_level(self):
        fsq, latent = GroupFSQ(4), self.latent()
        result = fsq(latent)
        odd = torch.tensor([False, True, True, True] * 4)                       # five levels: -1, -1/2, 0, 1/2, 1
        self.assertLess((result.latent - latent.tanh())[:, odd].abs().max(), 0.252)
        self.assertClose(fsq(-latent).latent[:, odd], -result.latent[:, odd])

    def test_fsq_is_float32_inside_bfloat16_autocast(self):
        fsq, rough = GroupFSQ(4), self.latent(time=500).bfloat16()              # what an encoder under autocast hands over
        for latent in (rough, rough.float()):
            with torch.autocast("cpu", torch.bfloat16):
                inside, tokens = fsq(latent), fsq.encode(latent)
            self.assertSame(inside.tokens, fsq.encode(rough.float()))
            self.assertSame(inside.tokens, tokens)
            self.assertEqual(inside.latent.dtype, torch.float32)


# ---------------------------------------------------------------------------------------------------- codec.py: models

class Codecs(Case):
    @staticmethod
    @functools.cache
    def codec(encoder="mel", quantizer="fsq", strides=(2, 4, 5, 10)):
        codec = Codec(CodecSettings(encoder=encoder, quantizer=quantizer, codebooks=4, strides=strides))
        codec.encoder[-1].momentum = 1.0                # one pass in training mode gives the latent its scale, RVQ its codebooks
        codec(noise(4, 16000))
        return codec.eval()

    def save(self, codec):
        path = self.folder / "codec.pt"
        codec_stage.save_checkpoint(path, {"kind": "codec", "settings": vars(codec.settings), "model": codec.state_dict()})
        return path

    def test_number_of_frames_is_the_length_over_the_hop_rounded_up(self):
        for strides in ((2, 4, 5, 10), (2, 4, 5, 5)):
            for encoder in ("mel", "time"):
                codec, hop = self.codec(encoder, "fsq", strides), math.prod(strides)
                self.assertEqual((codec.hop, codec.frame_rate), (hop, 16000 / hop))
                for length in (1, 2, hop - 1, hop, hop + 1, 7 * hop - 3, codec.window * hop, codec.window * hop + 1):
                    tokens, token_len = codec.encode(noise(1, length))
                    self.assertEqual(tokens.shape, (1, 4, -(-length // hop)), f"{length} samples")
                    self.assertEqual(token_len.tolist(), [-(-length // hop)])

    def test_tokens_are_the_same_alone_and_in_a_batch(self):
        wav_len = torch.tensor([0, 1, 399, 16_001, 44_801, 100_000])
        for kind in FOUR_CODECS:
            codec, wav = self.codec(*kind), noise(6, 100_000)                   # padding holds noise, which must not matter
            tokens, token_len = codec.encode(wav, wav_len)
            latent, _ = codec.latent(wav, wav_len)
            for i, length in enumerate(wav_len):
                alone, _ = codec.encode(wav[i:i + 1, :length])
                self.assertSame(tokens[i:i + 1, :, :token_len[i]], alone, f"{kind}, {length} samples")
                self.assertEqual(tokens[i, :, token_len[i]:].abs().sum(), 0)
                # To the last bit: were it only nearly so, now and then a token would differ.
                self.assertSame(latent[i:i + 1, :, :token_len[i]], codec.latent(wav[i:i + 1, :length])[0])
            self.assertGreater(len(tokens.unique()), 20)                        # a constant would be the same too

    def test_windows_see_what_the_encoder_sees(self):
        for kind in FOUR_CODECS:                        # 2 s: one window; its context is silence, as the encoder's padding is
            codec, wav = self.codec(*kind), noise(1, 32_000)
            with torch.inference_mode():
                whole = codec.encoder(torch.nn.functional.pad(wav, (8000, 8000)))[:, :, 20:-20]
            self.assertClose(codec.latent(wav)[0], whole, atol=1e-3)

    def test_tokens_and_fingerprint_survive_saving_and_tell_codecs_apart(self):
        codecs, wav = [self.codec(*kind) for kind in FOUR_CODECS], noise(2, 20_000)
        for codec in codecs:
            loaded = Codec.load(self.save(codec))
            self.assertSame(loaded.encode(wav)[0], codec.encode(wav)[0])
            self.assertEqual(loaded.fingerprint, codec.fingerprint)
        codebook, weight = copy.deepcopy(self.codec("mel", "rvq")), copy.deepcopy(self.codec())
        codebook.quantizer.embed[0, 0, 0] += 1e-3
        next(weight.encoder.parameters()).data += 1e-3
        codecs += [codebook, weight, self.codec(strides=(2, 4, 5, 5))]
        self.assertEqual(len({codec.fingerprint for codec in codecs}), 7)

    def test_decoded_length_is_frames_times_hop(self):
        for kind in FOUR_CODECS:
            for frames in (1, 2, 113):
                tokens = torch.randint(1000, (2, 4, frames))
                self.assertEqual(self.codec(*kind).decode(tokens).shape, (2, 400 * frames))
                self.assertEqual(self.codec(*kind).decode(tokens[:, :2]).shape, (2, 400 * frames))

    def test_decoder_puts_each_frame_where_its_samples_are(self):
        decoder = copy.deepcopy(self.codec().decoder)
        torch.nn.init.zeros_(decoder.head[1].weight)                            # all spectra alike: a click in the middle of a frame
        decoder.head[1].bias.data = torch.cat([torch.zeros(decoder.n_fft // 2 + 1), math.pi * torch.arange(decoder.n_fft // 2 + 1)])
        clicks = (decoder(torch.zeros(1, 16, 5))[0] > 0.3).nonzero()[:, 0]
        self.assertEqual(clicks.tolist(), list(range(decoder.hop // 2, 5 * 400, decoder.hop)))

    def test_wrong_or_damaged_checkpoint_is_told_in_one_line(self):
        path = self.folder / "codec.pt"
        self.assertInputError("no such file", Codec.load, path)
        path.write_bytes(b"no checkpoint")
        self.assertInputError("damaged", Codec.load, path)
        self.save(self.codec())
        sound = path.read_bytes()
        path.write_bytes(sound[:5000])
        self.assertInputError("damaged", Codec.load, path)
        path.write_bytes(sound[:9 * len(sound) // 10] + b"words" + sound[9 * len(sound) // 10 + 5:])      # a few weights are others
        self.assertInputError("damaged", Codec.load, path)
        codec_stage.save_checkpoint(path, {"kind": "asr"})
        self.assertInputError("holds asr", Codec.load, path)
        self.save(self.codec())
        self.assertInputError("holds codec", train_asr.load_checkpoint, path)
        settings, model = vars(self.codec().settings), self.codec().state_dict()
        for other in ({"settings": settings | {"heads": 3}, "model": model}, {"settings": settings | {"codebooks": 5}, "model": model},
                      {"settings": settings}, {"settings": 3, "model": model}):
            codec_stage.save_checkpoint(path, {"kind": "codec", **other})
            self.assertInputError("another version", Codec.load, path)


# ---------------------------------------------------------------------------------------------------- codec.py: training

class CodecTraining(Case):
    def train(self, out, *more, stop_after=None):
        """Six steps with a checkpoint every two, cut short by Ctrl-C in the middle of step `stop_after` + 1."""
        arguments = ["--corpus", str(small_corpus()), "--codebooks", "2", "--steps", "6", "--batch", "2", "--crop", "0.5",
                     "--device", "cpu", "--out", str(self.folder / out), *more]
        step, calls = codec_stage.train_step, []

        def interrupted(*things):
            calls.append(1)
            if len(calls) - 1 == stop_after:
                raise KeyboardInterrupt
            return step(*things)
        with mock.patch.multiple(codec_stage, CHECK_EVERY=2, train_step=interrupted):
            codec_stage.main(arguments)
        return torch.load(self.folder / out / "codec.pt", weights_only=True)

    def test_resumed_run_equals_uninterrupted_run(self):
        for more in (["--quantizer", "rvq"], ["--encoder", "time", "--adversarial"]):
            straight = self.train(f"straight{len(more)}", *more)
            with self.assertRaises(KeyboardInterrupt):
                self.train(f"cut{len(more)}", *more, stop_after=3)              # step 3 is lost: the checkpoint is of step 2
            resumed = self.train(f"cut{len(more)}", *more)
            self.assertIn("continuing at step 2 of 6", self.output.getvalue())
            for name, value in straight["model"].items():
                self.assertSame(value, resumed["model"][name], name)
            for name, value in straight["discriminator"].items():
                self.assertSame(value, resumed["discriminator"][name], name)

    def test_crops_of_several_processes_are_those_of_one(self):
        files = sorted((small_corpus() / "train").rglob("*.flac"))
        settings = CodecSettings(batch=4, crop=0.5)
        one, two = Crops(files, settings)(7, 0, 1), [Crops(files, settings)(7, rank, 2) for rank in (0, 1)]
        self.assertSame(one, torch.stack(two, 1).flatten(0, 1))
        self.assertSame(one, Crops(files, settings)(7, 0, 1))

    def test_unreadable_files_are_passed_over_and_named(self):
        for path in (good := self.folder / "train" / "good.wav", self.folder / "dev" / "dev.wav"):
            path.parent.mkdir()
            sf.write(path, noise(16_000).numpy(), 16_000)
        good.with_name("bad.wav").write_text("no audio")
        codec_stage.main(["--corpus", str(self.folder), "--steps", "2", "--batch", "2", "--codebooks", "2", "--crop", "0.5",
                          "--device", "cpu", "--out", str(self.folder / "run")])
        self.assertRegex(self.output.getvalue(), r"skipped: .*bad\.wav")
        good.unlink()
        self.assertInputError("no readable audio", Crops([good.with_name("bad.wav")], CodecSettings()), 0, 0, 1)

    def test_reconstruction_is_as_long_as_the_original(self):
        sf.write(self.folder / "in.wav", noise(12_345).numpy(), 16_000)
        reconstruct = lambda name: codec_stage.main(["--out", str(trained_codec().parent), "--device", "cpu", "--reconstruct",
                                                     str(self.folder / "in.wav"), str(self.folder / name)])
        reconstruct("out.wav")
        self.assertEqual(sf.info(self.folder / "out.wav").frames, 12_345)
        self.assertInputError("ends in .wav", reconstruct, "out.xyz")
        self.assertInputError("ends in .wav", reconstruct, "out")
        self.assertRaisesRegex(OSError, "nowhere/out.wav", reconstruct, "nowhere/out.wav")

    def test_infinite_loss_is_told_with_its_step_and_files_and_saves_nothing(self):
        step = codec_stage.train_step

        def broken(nets, optimisers, distance, wav, number, settings):
            losses, tokens = step(nets, optimisers, distance, wav, number, settings)
            return losses | {"mel": losses["mel"] * (math.nan if number >= 4 else 1)}, tokens
        with mock.patch.object(codec_stage, "train_step", broken):
            self.assertInputError("at step 5, at crops of .*flac", self.train, "run")
        self.assertEqual(torch.load(self.folder / "run" / "codec.pt", weights_only=True)["step"], 4)

    def test_silent_and_tiny_audio_ends_without_nan_and_is_told(self):
        for subset, wav in (("train", np.zeros(8000)), ("dev", np.zeros(1))):   # shorter than the windows of the loss
            (self.folder / subset).mkdir()
            sf.write(self.folder / subset / "a.wav", wav, 16_000)
        for quantizer in ("rvq", "fsq"):
            codec_stage.main(["--corpus", str(self.folder), "--quantizer", quantizer, "--codebooks", "2", "--steps", "2", "--batch", "2",
                              "--crop", "0.5", "--device", "cpu", "--out", str(self.folder / quantizer)])
            report = json.loads((self.folder / quantizer / "report.json").read_text())
            self.assertTrue(math.isfinite(report["mel_distance"] + report["si_sdr"]))
        for what in ("1 of 1 files are silent", r"so few files to train on \(1\)"):
            self.assertRegex(self.output.getvalue(), what)

    def test_full_disk_keeps_the_last_checkpoint_and_names_the_file(self):
        self.train("run", stop_after=None)
        before = (self.folder / "run" / "codec.pt").read_bytes()
        with mock.patch.object(codec_stage.os, "replace", side_effect=OSError(28, "No space left on device")):
            for stage in (codec_stage, train_asr):
                with self.assertRaisesRegex(OSError, "No space left on device: '.*/run/codec.pt'"):
                    stage.write_atomically(self.folder / "run" / "codec.pt", b"half")
        self.assertEqual((self.folder / "run" / "codec.pt").read_bytes(), before)
        self.assertEqual({path.name for path in (self.folder / "run").iterdir()}, {"codec.pt", "log.jsonl", "report.json"})

    def test_numbers_out_of_range_are_told_in_one_line(self):
        for more in ({"seed": -1}, {"batch": 0}, {"crop": math.inf}, {"lr": math.nan}, {"strides": (2, 0)}, {"codebooks": 0},
                     {"encoder": "time", "strides": (400,)}):
            self.assertInputError("--", CodecSettings, **more)
        with mock.patch.object(codec_stage, "start_processes", lambda device: (torch.device("cpu"), 0, 4)):
            self.assertInputError("each of the 4 processes", self.train, "run")


# ---------------------------------------------------------------------------------------------------- codec.py: audio and corpora

class AudioFiles(Case):
    def test_any_rate_and_channel_count_becomes_16_khz_mono(self):
        wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100)
        for channels, rate, subtype in ((1, 16_000, "PCM_16"), (2, 44_100, "PCM_16"), (8, 8_000, "PCM_24"), (1, 44_100, "PCM_U8")):
            path = self.folder / f"{channels}-{rate}.wav"
            sf.write(path, np.repeat(wave[::44_100 // rate, None], channels, 1), rate, subtype=subtype)
            wav, samples = read_audio(path), sf.info(path).frames
            self.assertEqual(wav.dtype, torch.float32)
            self.assertAlmostEqual(len(wav), samples * 16_000 / rate, delta=1)
            self.assertAlmostEqual(wav.square().mean().sqrt().item(), 0.5 / 2 ** 0.5, delta=0.01)

    def test_channels_are_averaged_and_one_sample_is_audio(self):
        for samples, mono in (([[0.5, -0.5], [0.5, 0.25]], [0.0, 0.375]), ([0.5], [0.5])):
            sf.write(self.folder / "a.wav", np.array(samples), 16_000, subtype="FLOAT")
            self.assertClose(read_audio(self.folder / "a.wav"), torch.tensor(mono))

    def test_bad_audio_is_told_in_one_line(self):
        path = self.folder / "a.wav"
        self.assertInputError("a.wav", read_audio, path)
        path.write_text("these are words")
        self.assertInputError("not readable as audio", read_audio, path)
        path.write_bytes(b"")
        self.assertInputError("a.wav", read_audio, path)
        for samples, complaint in ((np.zeros(0), "no samples"), (np.array([0.0, np.nan]), "not numbers"), (np.array([np.inf]), "not numbers")):
            sf.write(path, samples, 16_000, subtype="FLOAT")
            self.assertInputError(complaint, read_audio, path)
        sf.write(path, np.zeros(1000), 16_000)
        path.write_bytes(path.read_bytes()[:20])        # the header breaks off
        self.assertInputError("breaks off", read_audio, path)
        self.assertInputError("no such file", read_audio, self.folder)
        sf.write(path, np.array([0.1, 3e8]), 16_000, subtype="FLOAT")
        self.assertInputError("full scale is 1", read_audio, path)
        sf.write(path, np.zeros(1000), 48_001)          # one byte of the header is wrong: resampling would take gigabytes
        self.assertInputError("sample rate of 48001", read_audio, path)

    def test_file_that_breaks_off_is_not_filled_up(self):
        for ending in ("mp3", "flac", "wav"):
            path = self.folder / f"a.{ending}"
            sf.write(path, noise(80_000).numpy(), 16_000)
            self.assertEqual(len(read_audio(path)), 80_000)
            path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
            self.assertInputError("breaks off|not readable", read_audio, path)


class Synthetic(Case):
    def test_it_is_the_same_each_time_and_another_for_another_seed(self):
        def made(name, seed):
            make_synthetic(self.folder / name, seed, {"train": 2})
            return [hashlib.md5(path.read_bytes()).digest() for path in sorted((self.folder / name).rglob("*.*")) if path.is_file()]
        self.assertEqual(made("a", 0), made("b", 0))
        self.assertNotEqual(made("a", 0), made("c", 1))

    def test_no_voice_and_no_sentence_is_in_two_subsets(self):
        few = {word: codec_stage.LEXICON[word] for word in ("GO", "TEN")}       # so few that chance would repeat sentences
        with mock.patch.object(codec_stage, "LEXICON", few):
            make_synthetic(self.folder, sizes={"train": 25, "dev": 8, "test": 8})
        speakers, sentences = [], []
        for subset in ("train", "dev", "test"):
            lines = [line for path in (self.folder / subset).rglob("*.trans.txt") for line in path.read_text().splitlines()]
            speakers.append({line.split("-")[0] for line in lines})
            sentences.append({line.split(" ", 1)[1] for line in lines})
        for sets in (speakers, sentences):
            self.assertEqual(len(set.union(*sets)), sum(map(len, sets)))

    def test_alignment_ends_where_the_audio_ends_and_has_the_words_sounds(self):
        for path in small_corpus().rglob("*.phones.txt"):
            words = dict(line.split(" ", 1) for line in path.with_name(path.name.replace("phones", "trans")).read_text().splitlines())
            for line in path.read_text().splitlines():
                name, *pairs = line.split()
                phones, ends = zip(*(pair.split(":") for pair in pairs))
                self.assertEqual(int(ends[-1]), sf.info(path.with_name(f"{name}.flac")).frames)
                self.assertEqual(sorted(map(int, ends)), list(map(int, ends)))
                said = [phone for word in words[name].split() for phone in codec_stage.LEXICON[word]]
                self.assertEqual([phone for phone in phones if phone != "SIL"], said)


class Downloads(Case):
    """fetch_librispeech against a web server of our own on the loopback address."""

    def setUp(self):
        super().setUp()
        self.asked, self.archive, case = [], b"", self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                case.asked.append(asked)
                start = int(asked[6:-1]) if asked else 0
                self.send_response(416 if start >= len(case.archive) else 206 if asked else 200)
                self.send_header("Content-Length", str(len(case.archive[start:])))
                self.end_headers()
                self.wfile.write(case.archive[start:])

            def log_message(self, *_):
                pass
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        self.enterContext(mock.patch.object(codec_stage, "MINI", f"http://127.0.0.1:{server.server_port}/"))
        self.target = self.folder / "data" / "LibriSpeech"

    def serve(self, *more: tarfile.TarInfo, md5=None):
        """An archive of one audio file and the members given; its checksum becomes the published one."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for member in (tarfile.TarInfo("LibriSpeech/train-clean-5/1/1/1-1-0000.flac"), *more):
                member.size = 9 if member.isreg() else 0
                tar.addfile(member, io.BytesIO(b"some data"))
        self.archive = buffer.getvalue()
        found = md5 or hashlib.md5(self.archive).hexdigest()
        self.enterContext(mock.patch.dict(codec_stage.MINI_MD5, {"train-clean-5": found}))

    def fetch(self):
        codec_stage.fetch_librispeech(self.target, "train-clean-5")
        return [str(path.relative_to(self.target)) for path in self.target.rglob("*.flac")]

    def test_right_checksum_unpacks_into_the_folder_once(self):
        self.serve()
        self.assertEqual(self.fetch(), ["train-clean-5/1/1/1-1-0000.flac"])
        self.fetch()
        self.assertEqual(len(self.asked), 1)

    def test_wrong_checksum_removes_the_file_and_unpacks_nothing(self):
        self.serve(md5="0" * 32)
        self.assertInputError("checksum", self.fetch)
        self.assertEqual([path for path in self.folder.rglob("*") if path.is_file()], [])

    def test_download_continues_where_it_stopped(self):
        self.serve()
        for have in (50, len(self.archive)):            # half of it; all of it
            partial = self.folder / "data" / f"part{have}.tar.gz"
            partial.parent.mkdir(exist_ok=True)
            partial.write_bytes(self.archive[:have])
            codec_stage.download(codec_stage.MINI + "any", partial, hashlib.md5(self.archive).hexdigest())
            self.assertEqual(partial.read_bytes(), self.archive)
            self.assertEqual(self.asked[-1], f"bytes={have}-")

    def test_download_that_breaks_off_is_kept_and_continued(self):
        self.serve()
        whole, self.archive = self.archive, self.archive[:-20]
        with mock.patch.object(http.server.BaseHTTPRequestHandler, "send_header",
                               lambda handler, name, value, send=http.server.BaseHTTPRequestHandler.send_header:
                               send(handler, name, str(len(whole)) if name == "Content-Length" else value)):
            self.assertInputError("broke off after .* run again to continue", self.fetch)
        self.archive = whole
        self.assertEqual(self.fetch(), ["train-clean-5/1/1/1-1-0000.flac"])
        self.assertEqual(self.asked, [None, f"bytes={len(whole) - 20}-"])

    def test_archive_that_leads_outside_is_refused(self):
        link = tarfile.TarInfo("LibriSpeech/train-clean-5/link")
        link.type, link.linkname = tarfile.SYMTYPE, "../../../../outside"
        for member in (tarfile.TarInfo("../../outside/evil.txt"), link):
            self.serve(member)
            self.assertInputError("train-clean-5", self.fetch)
            self.assertFalse((self.folder / "outside").exists())
            self.assertFalse(self.target.exists())      # nor is half a subset left where the next run would take it as whole

    def test_half_unpacked_subset_of_a_killed_run_is_unpacked_anew(self):
        half = self.target.parent / "partial-dev-clean" / "LibriSpeech" / "dev-clean"
        half.mkdir(parents=True)
        (half / "half.flac").write_text("")

        def librispeech(root, subset, download):        # as torchaudio does it: a folder that is there counts as whole
            if subset != "dev-clean":
                raise ValueError("Invalid url")
            if not half.is_dir():
                half.mkdir(parents=True)
                (half / "whole.flac").write_text("")
        with mock.patch.object(codec_stage.torchaudio.datasets, "LIBRISPEECH", librispeech):
            codec_stage.fetch_librispeech(self.target, "dev-clean")
            self.assertInputError("no such subset", codec_stage.fetch_librispeech, self.target, "dev-cleen")
        self.assertEqual([path.name for path in self.target.rglob("*.flac")], ["whole.flac"])

    def test_no_network_is_told_in_one_line(self):
        self.enterContext(mock.patch.object(codec_stage, "MINI", "http://127.0.0.1:1/"))
        self.assertInputError("no network", self.fetch)


# ---------------------------------------------------------------------------------------------------- tokenize_corpus.py

class MessyCorpora(Case):
    """Usable utterances are used, the others named; --features mel needs no codec."""

    def setUp(self):
        super().setUp()
        self.corpus, self.out = self.folder / "corpus", self.folder / "out"

    def audio(self, path):
        path = self.corpus / path
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, noise(8000).numpy(), 16_000)

    def tokenize(self):
        for subset in ("dev", "test"):
            self.audio(f"{subset}/1/1/1-1-0.wav")
            (self.corpus / subset / "1" / "1" / "1-1.trans.txt").write_text("1-1-0 HELLO\n")
        before = {path: path.stat().st_mtime_ns for path in self.folder.rglob("*")}
        tokenize(self.out, "--features", "mel", corpus=self.corpus)
        after = {path: path.stat().st_mtime_ns for path in self.folder.rglob("*") if self.out not in (path, *path.parents)}
        self.assertEqual(before, after)                 # nothing outside of --out was written
        return {row["id"]: row["text"] for row in rows(self.out)}, (self.out / "train.skipped.txt").read_text()

    def test_messy_librispeech_folder(self):
        for name in ("7-1-0", "7-1-1", "7-1-2", "7-1-3", "7-1-9"):
            self.audio(f"train/7/1/{name}.wav")
        (self.corpus / "train/7/1/7-1-4.wav").write_text("no audio")
        (self.corpus / "train/7/1/7-1.trans.txt").write_bytes(
            "\ufeff7-1-0 WITH A MARK\r\n7-1-1\tBY  TABS\tAND SPACES \r\n\r\n7-1-2\r\n7-1-3 SAID ONCE\r\n7-1-3 SAID TWICE\r\n"
            "7-1-4 NO AUDIO IN IT\r\n7-1-5 LOST\r\n../../7-1-6 LEADS OUT\r\n".encode())
        texts, skipped = self.tokenize()
        self.assertEqual(texts, {"7-1-0": "WITH A MARK", "7-1-1": "BY TABS AND SPACES", "7-1-3": "SAID ONCE"})
        for name in ("7-1-2", "7-1-3", "7-1-4", "7-1-5", "7-1-6", "7-1-9"):
            self.assertEqual(sum(name in line for line in skipped.splitlines()), 1, f"{name} in\n{skipped}")

    def test_files_of_one_name_in_several_folders_are_paired_with_their_own_transcript(self):
        for path in ("7/1/a.wav", "7/2/a.wav", "7/2/b.wav", "7/2/b.flac", "8/1/c.wav"):
            self.audio(f"train/{path}")
        for chapter, line in ((1, "b FROM ELSEWHERE\nc ELSEWHERE BUT ALONE"), (2, "a SECOND")):
            (self.corpus / f"train/7/{chapter}/7-{chapter}.trans.txt").write_text(line)
        texts, skipped = self.tokenize()
        self.assertEqual(texts, {"a": "SECOND", "c": "ELSEWHERE BUT ALONE"})
        self.assertTrue(rows(self.out)[1]["audio"].endswith("7/2/a.wav"))
        for what, times in (("7/1/a.wav: no transcript", 1), ("b may be", 1), ("7/2/b", 3), ("a.wav", 1)):
            self.assertEqual(sum(what in line for line in skipped.splitlines()), times, f"{what} in\n{skipped}")

    def test_odd_names_and_letters_are_used_or_named(self):
        long = "/".join(["x" * 60] * 5)
        for name in ("good.wav", f"{long}.wav", "$.wav"):
            self.audio(name)
        (self.corpus / "folder.wav").mkdir()
        os.mkfifo(self.corpus / "pipe.wav")             # reading it would wait for ever
        lines = [{"audio_filepath": "good.wav", "text": "ONE\u2028LINE\0", "lang": "e\u2028n"}, {"audio_filepath": f"{long}.wav", "text": "LONG"},
                 {"audio_filepath": "$.wav", "text": "DOLLAR"}, {"audio_filepath": "./good.wav", "text": "HALF \ud83d"},
                 {"audio_filepath": "pipe.wav", "text": "PIPE"}, {"audio_filepath": "folder.wav", "text": "FOLDER"},
                 {"audio_filepath": "nul\0.wav", "text": "NUL"}, {"audio_filepath": "y" * 5000, "text": "TOO LONG"},
                 {"audio_filepath": "caf\udce9.wav", "text": "LATIN"}, {"audio_filepath": "good.wav", "text": ["NO", "TEXT"]}]
        (self.corpus / "train.jsonl").write_text("\n".join([*(json.dumps(line) for line in lines), "[" * 100_000]))
        texts, skipped = self.tokenize()
        self.assertEqual(sorted(texts.values()), ["DOLLAR", "LONG", "ONE LINE\0"])
        self.assertEqual(len(skipped.splitlines()), 8)
        (self.corpus / "train.jsonl").write_text(json.dumps(lines[0], ensure_ascii=False))
        self.assertEqual(len(read_subset(self.corpus, "train")[0]), 1)          # a line ends where JSON says, not at any sign that Unicode calls one

    def test_subsets_cannot_lead_out_of_the_output(self):
        self.audio("train/1-1-0.wav")
        for name in ("../corpus", str(self.corpus / "train"), ".."):
            self.assertInputError("not the name of a subset", tokenize, self.out, "--features", "mel", "--train", name, corpus=self.corpus)

    def test_messy_manifest(self):
        for name in ("a/one.wav", "b/one.wav", "../beside/two.wav", "three.wav", "four.wav"):
            self.audio(name)
        lines = ['{"audio_filepath": "a/one.wav", "text": "ONE", "lang": "en"}', '{"audio_filepath": "b/one.wav", "text": "ANOTHER"}',
                 '{"audio_filepath": "../beside/two.wav", "text": "BESIDE"}', "", '{"audio_filepath": "four.wav", "te',
                 json.dumps({"audio_filepath": str(self.corpus / "three.wav"), "text": "ÜBER ALL"}),
                 '{"text": "NO PATH"}', '{"audio_filepath": "four.wav"}', '{"audio_filepath": "four.wav", "text": " "}',
                 '{"audio_filepath": "a/one.wav", "text": "AGAIN"}', '{"audio_filepath": "lost.wav", "text": "LOST"}', "[]", "7",
                 '{"audio_filepath": "four.wav", "text": null}', '{"audio_filepath": 7, "text": "SEVEN"}', '{"audio_filepath": "", "text": "NOWHERE"}']
        (self.corpus / "train.jsonl").write_text("\ufeff" + "\r\n".join(lines), "utf-8")
        texts, skipped = self.tokenize()
        self.assertEqual(sorted(texts.values()), ["ANOTHER", "BESIDE", "ONE", "ÜBER ALL"])
        for what, times in (("four.wav", 3), ("one.wav", 1), ("lost.wav", 1), *((f"line {number} ", 1) for number in (5, 7, 12, 13, 15, 16))):
            self.assertEqual(sum(what in line for line in skipped.splitlines()), times, f"{what} in\n{skipped}")
        self.assertEqual(rows(self.out)[0]["lang"], "en")
        for row in rows(self.out):
            self.assertTrue((self.out / row["array"]).resolve().is_relative_to(self.out.resolve()))

    def test_pieces_of_recordings_do_not_stand_for_the_whole(self):
        self.audio("long.wav")                          # half a second
        lines = [{"offset": 0.0, "duration": 0.2, "text": "FIRST"}, {"offset": 0.2, "text": "SECOND"}, {"duration": 0.5, "text": "WHOLE"}]
        (self.corpus / "train.jsonl").write_text("\n".join(json.dumps(line | {"audio_filepath": "long.wav"}) for line in lines))
        texts, skipped = self.tokenize()
        self.assertEqual(texts, {"long": "WHOLE"})
        self.assertEqual(skipped.count("cut it out first"), 2)

    def test_ml_superb_layout(self):
        self.audio("one/deu/wav/a.wav")
        for subset, lines in (("train", "a 0.5 GUTEN TAG\nb 0.5 KEIN TON\n../a 0.5 HINAUS\nshort\n"), ("dev", ""), ("test", "")):
            (self.corpus / "one" / "deu" / f"transcript_{subset}.txt").write_text(lines)
        found, skipped = read_subset(self.corpus, "train")
        self.assertEqual([(item.id, item.text, item.lang) for item in found], [("a", "GUTEN TAG", "deu")])
        for lost in ("b.wav", "'../a 0.5 HINAUS'", "'short'"):
            self.assertEqual(sum(lost in line for line in skipped), 1)

    def test_codec_reads_the_same_messy_manifest(self):
        self.audio("one.wav")
        (self.corpus / "train.jsonl").write_text('{"audio_filepath": "one.wav", "text": "ONE"}\n{"broken\n{"text": "NO PATH"}\n')
        found = codec_stage.find_audio(self.corpus, "train")
        self.assertEqual([path.name for path in found], ["one.wav"])

    def test_corpus_without_anything_usable_is_told_in_one_line(self):
        self.audio("train/1-1-0.wav")
        self.assertInputError("nothing that can be used", self.tokenize)
        self.assertInputError("no such folder", codec_stage.corpus_subsets, str(self.folder / "nowhere"), (), ())
        self.assertInputError("neither a folder nope/ nor", codec_stage.find_audio, self.corpus, "nope")


class Tokens(Case):
    def test_folder_holds_what_the_recogniser_needs(self):
        out, codec = tokenize(self.folder), Codec.load(trained_codec())
        meta = json.loads((out / "meta.json").read_text())
        self.assertEqual((meta["codec"], meta["hop"], meta["sample_rate"]), (codec.fingerprint, 400, 16_000))
        self.assertEqual((meta["codebooks"], meta["codebook_size"], meta["dim"]), (4, 1000, 16))
        np.testing.assert_array_equal(np.load(out / "codebooks.npy"), codec.quantizer.codebooks().numpy())
        for subset, count in (("train", 4), ("dev", 2), ("test", 2)):
            self.assertEqual(len(rows(out, subset)), count)
            for row in rows(out, subset):
                array, wav = np.load(out / row["array"]), read_audio(row["audio"])
                self.assertEqual((array.dtype, array.shape), (np.int16, (row["frames"], 4)))
                self.assertEqual(row["frames"], -(-len(wav) // 400))
                self.assertAlmostEqual(row["duration"], len(wav) / 16_000, places=3)
                np.testing.assert_array_equal(array.T, codec.encode(wav[None])[0][0])   # alone, and there in a batch

    def test_finished_work_is_not_done_again(self):
        tokenize(self.folder)
        arrays = {path: (np.load(path), path.stat().st_mtime_ns) for path in self.folder.rglob("*/*.npy")}
        lost, *kept = arrays
        lost.unlink()
        tokenize(self.folder)
        np.testing.assert_array_equal(np.load(lost), arrays[lost][0])
        for path in kept:
            self.assertEqual(path.stat().st_mtime_ns, arrays[path][1])

    def test_damaged_array_is_removed_and_made_anew(self):
        tokenize(self.folder)
        for damage in (lambda data: data[:-1], lambda data: b"", lambda data: b"words" + data[5:], lambda data: data.replace(b"<i2", b"<f2")):
            path = self.folder / rows(self.folder)[0]["array"]
            sound = path.read_bytes()
            path.write_bytes(damage(sound))
            tokenize(self.folder)
            self.assertEqual(path.read_bytes(), sound)
            self.assertIn(f"{path} was damaged", self.output.getvalue())

    def test_number_of_workers_changes_nothing(self):
        noisy = ("--noise", "white", "babble", "--copies", "2", "--speeds", "0.9")
        folders = [tokenize(self.folder / n, *noisy, "--workers", n) for n in "012"]
        for path in folders[0].rglob("*.npy"):
            for other in folders[1:]:
                np.testing.assert_array_equal(np.load(path), np.load(other / path.relative_to(folders[0])))

    def test_copies_are_of_the_train_subset_and_point_to_their_original(self):
        out = tokenize(self.folder, "--features", "mel", "--noise", "pink", "--copies", "2", "--speeds", "0.9", "1.1")
        self.assertEqual([len(rows(out, subset)) for subset in ("train", "dev", "test")], [4 * (1 + 2 + 2), 2, 2])
        originals = {row["id"]: row for row in rows(out) if "copy_of" not in row}
        self.assertEqual(len(originals), 4)
        for row in rows(out):
            if "copy_of" in row:
                original = originals[row["copy_of"]]
                self.assertEqual(row["text"], original["text"])
                speed = {"speed0.9": 0.9, "speed1.1": 1.1}.get(row["id"].rsplit("-", 1)[1], 1.0)
                self.assertAlmostEqual(row["frames"], original["frames"] / speed, delta=1)
                self.assertAlmostEqual(row["duration"], original["duration"] / speed, delta=0.002)
                self.assertEqual(row["noisy"], speed == 1.0)

    def test_tokens_of_two_codecs_do_not_mix(self):
        tokenize(self.folder)
        other = str(trained_codec("time", "rvq"))
        self.assertInputError("give another --out", tokenize, self.folder, "--codec", other)
        self.assertInputError("give another --out", tokenize, self.folder, "--features", "mel")
        tokenize(self.folder / "noisy", "--features", "mel", "--noise", "white")
        for more in (("--noise", "pink"), ("--noise", "white", "--seed", "1"), ()):
            self.assertInputError("give another --out", tokenize, self.folder / "noisy", "--features", "mel", *more)
        for text in ("{", "[]", "{}"):
            (self.folder / "meta.json").write_text(text)
            self.assertInputError("give another --out", tokenize, self.folder)

    def test_mistaken_flag_leaves_finished_tokens_as_they_are(self):
        tokenize(self.folder, "--features", "mel")
        before = (self.folder / "meta.json").read_text()
        self.assertInputError("not white, pink or babble", tokenize, self.folder, "--features", "mel", "--noise", "wihte")
        self.assertInputError("tset", tokenize, self.folder, "--features", "mel", "--test", "tset")
        self.assertEqual((self.folder / "meta.json").read_text(), before)

    def test_tokens_are_those_of_the_audio_at_hand(self):
        corpus, out = self.folder / "corpus", self.folder / "out"
        shutil.copytree(small_corpus(), corpus)
        tokenize(out, "--features", "mel", corpus=corpus)
        self.assertInputError("corpus", tokenize, out, "--features", "mel")                     # another corpus, names alike
        changed = Path(rows(out)[0]["audio"])
        sf.write(changed, noise(24_000).numpy(), 16_000)
        tokenize(out, "--features", "mel", corpus=corpus)
        self.assertEqual(rows(out)[0]["frames"], 60)

    def test_copies_that_would_share_a_name_are_told_in_one_line(self):
        self.assertInputError("stand for two things", tokenize, self.folder, "--features", "mel", "--speeds", "0.9", "0.9")

    def test_float_features_lie_in_the_same_layout(self):
        for features, hop, dim in (("mel", 400, 80), ("mel", 160, 80), ("latent", 400, 16)):
            out = tokenize(self.folder / f"{features}{hop}", "--features", features, "--hop", hop)
            row = rows(out)[0]
            array = np.load(out / row["array"])
            self.assertEqual((array.dtype, array.shape[1]), (np.float16, dim))
            self.assertEqual(len(array), -(-sf.info(row["audio"]).frames // hop))
            self.assertTrue(np.isfinite(array).all())

    def test_recogniser_as_codec_is_told_in_one_line(self):
        codec_stage.save_checkpoint(self.folder / "asr.pt", {"kind": "asr"})
        self.assertInputError("holds asr", tokenize, self.folder / "out", "--codec", self.folder / "asr.pt")


class Noises(Case):
    def noise(self, kind, snr=(7.0, 7.0), seed=0):
        speakers = sorted(small_corpus().rglob("*.flac"))
        return Noise((kind,), snr, speakers, seed)

    def test_measured_ratio_is_the_one_asked_for(self):
        wav = noise(20_000)
        for kind in ("white", "pink", "babble", str(small_corpus() / "dev")):
            added = self.noise(kind)(wav, "1-1-0", Path("1-1-0.flac")) - wav
            self.assertAlmostEqual(10 * math.log10(wav.square().mean() / added.square().mean()), 7, delta=0.01)

    def test_noise_follows_from_seed_and_id_alone(self):
        wav = noise(20_000)
        for kind in ("white", "pink", "babble"):
            made = self.noise(kind, (0, 20))(wav, "1-1-0", Path("1.flac"))
            self.assertSame(self.noise(kind, (0, 20))(wav, "1-1-0", Path("1.flac")), made)
            self.assertFalse(torch.equal(self.noise(kind, (0, 20))(wav, "1-1-1", Path("1.flac")), made))
            self.assertFalse(torch.equal(self.noise(kind, (0, 20), seed=1)(wav, "1-1-0", Path("1.flac")), made))

    def test_babble_is_of_as_many_other_voices_as_there_are(self):
        heard = []
        self.enterContext(mock.patch.object(tokenize_corpus, "read_audio", lambda path: heard.append(path.stem) or noise(100)))
        for voices, expected in ((9, 6), (4, 3), (2, 1), (1, 1)):
            files = [Path(f"{voice}-1-{number}.flac") for voice in range(voices) for number in range(5)]
            for name in "abcde":
                heard.clear()
                Noise(("babble",), (7.0, 7.0), files, 0)(noise(1000), name, files[0])
                self.assertEqual((len(heard), len({path.split("-")[0] for path in heard})), (6, expected))
                self.assertNotIn("0" if voices > 1 else "0-1-0", {path.split("-")[0] if voices > 1 else path for path in heard})

    def test_pink_noise_lies_where_speech_is(self):
        power = np.abs(np.fft.rfft(self.noise("pink").make("pink", 80_000, Path("a"), np.random.default_rng(0)))) ** 2     # 0.2 Hz a bin
        self.assertLess(power[:100].sum(), 1e-9 * power.sum())
        self.assertAlmostEqual(power[500:1000].sum() / power[5000:10_000].sum(), 1, delta=0.2)          # each octave alike

    def test_noise_is_heard_where_its_recording_is_mostly_silent(self):
        sf.write(self.folder / "bang.wav", np.concatenate([noise(16_000).numpy(), np.zeros(144_000)]), 16_000)
        for name in "abcdefghij":
            wav = noise(8000)
            added = self.noise(str(self.folder))(wav, name, Path(name)) - wav
            self.assertAlmostEqual(10 * math.log10(wav.square().mean() / added.square().mean()), 7, delta=0.01)

    def test_noise_that_cannot_be_read_is_replaced_by_other_and_named_once(self):
        (self.folder / "bad.wav").write_text("no audio")
        self.assertInputError("no noise can be read: .*bad.wav", self.noise(str(self.folder)), noise(1000), "a", Path("a"))
        sf.write(self.folder / "good.wav", noise(500).numpy(), 16_000)
        add = self.noise(str(self.folder))
        for name in "abcdef":
            self.assertTrue(add(noise(1000), name, Path(name)).isfinite().all())
        self.assertEqual(self.output.getvalue().count("noise left out: "), 1)

    def test_unknown_kind_and_impossible_ratio_are_told_in_one_line(self):
        self.assertInputError("not white, pink or babble", self.noise, "brown")
        for snr in ((0, math.nan), (-1e9, 0), (5, 4)):
            self.assertInputError("--snr", self.noise, "white", snr)


# ---------------------------------------------------------------------------------------------------- asr_model.py

class Recogniser(Case):
    LENGTHS = [1, 2, 7, 30, 41]

    def model(self, **more):
        return CodecASR(12, **{"num_codebooks": 3, "codebook_size": 20, "dim": 8, "size": "tiny", "dropout": 0.0} | more).eval()

    def tokens(self, *shape):
        return torch.randint(20, shape)

    def test_alone_equals_in_a_batch(self):
        token_len, kinds = torch.tensor(self.LENGTHS), [dict(aggregate=name) for name in ("sum", "mean", "stack")]
        for more in kinds + [dict(num_codebooks=0)]:
            for subsampling in (1, 2, 4):
                model = self.model(subsampling=subsampling, **more)
                tokens = self.tokens(5, 41, 3) if model.num_codebooks else torch.randn(5, 41, 8)
                with torch.inference_mode():
                    log_probs, out_len = model(tokens, token_len)
                    self.assertEqual(out_len.tolist(), [-(-n // subsampling) for n in self.LENGTHS])
                    for i, n in enumerate(self.LENGTHS):
                        alone, _ = model(tokens[i:i + 1, :n], token_len[i:i + 1])
                        self.assertClose(log_probs[i, :out_len[i]], alone[0])

    def test_padding_changes_nothing(self):
        for subsampling in (1, 2):
            model, token_len = self.model(subsampling=subsampling), torch.tensor(self.LENGTHS)
            tokens, other = self.tokens(5, 41, 3), self.tokens(5, 41, 3)
            real = torch.arange(41)[None, :, None] < token_len[:, None, None]
            one, out_len = model(tokens, token_len)
            two, _ = model(torch.where(real, tokens, other), token_len)
            for i, n in enumerate(out_len):
                self.assertClose(one[i, :n], two[i, :n])

    def test_embedding_begins_as_what_the_codec_decodes(self):
        rvq = ResidualVQ(dim=16, num_codebooks=4, codebook_size=16)
        rvq(torch.randn(2, 16, 50))
        for quantizer in (rvq.eval(), GroupFSQ(4)):
            latent = torch.randn(2, 16, 30)
            tokens = quantizer.encode(latent)                                                   # (B, Q, T)
            frames = tokens.transpose(1, 2)                                                     # (B, T, Q)
            for aggregate, scale in (("sum", 1), ("mean", 4)):
                model = self.model(num_codebooks=4, codebook_size=quantizer.codebook_size, dim=16, aggregate=aggregate)
                model.start_from(quantizer.codebooks(), frames.flatten(0, 1))
                emb = model.embedding(frames, torch.ones(frames.shape))                             # (B, T, D)
                self.assertClose(scale * emb.transpose(1, 2), quantizer.decode(tokens))
                normal = (emb - model.mean) / model.deviation
                self.assertClose(normal.mean((0, 1)), torch.zeros(16), atol=1e-4)
                self.assertClose(normal.std((0, 1)), torch.ones(16), atol=1e-3)
            first = self.model(num_codebooks=2, codebook_size=quantizer.codebook_size, dim=16)
            first.start_from(quantizer.codebooks(), frames[..., :2].flatten(0, 1))
            emb = first.embedding(frames[..., :2], torch.ones(2, 30, 2))
            self.assertClose(emb.transpose(1, 2), quantizer.decode(tokens[:, :2]))

    def test_dimensions_that_never_move_are_not_blown_up(self):
        fsq = GroupFSQ(4)
        sample = fsq.encode(torch.randn(1, 16, 500))[0].T                                       # (N, Q)
        for aggregate in ("sum", "stack"):              # side by side, 12 dimensions of each row are always 0
            model = self.model(num_codebooks=4, codebook_size=fsq.codebook_size, dim=16, aggregate=aggregate)
            model.start_from(fsq.codebooks(), sample)
            normal = (model.embedding(sample[None], torch.ones(1, *sample.shape)) - model.mean) / model.deviation
            self.assertClose(normal.square().mean(), torch.tensor(1.0), atol=1e-2)
            self.assertGreater(model.deviation.min(), 0.1)
            model.start_from(fsq.codebooks(), sample[:1].expand(100, -1))                       # one sound throughout
            self.assertTrue(model(sample[None], torch.tensor([500]))[0].isfinite().all())

    def test_random_tables_move_at_a_step_of_the_optimiser(self):
        model, sample = self.model(), self.tokens(500, 3)
        model.start_from(None, sample)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        normal = lambda: (model.embedding(sample[None], torch.ones(1, 500, 3)) - model.mean) / model.deviation
        before = normal().detach()
        normal()[..., 0].sum().backward()
        optimiser.step()
        self.assertGreater((normal() - before)[..., 0].abs().mean(), 0.05)

    def test_subsampling_keeps_the_size_of_the_input(self):
        size = {}                                       # how much the first block's input moves over time
        for subsampling in (1, 2, 4):
            model = self.model(num_codebooks=0, subsampling=subsampling)
            model.blocks[0].register_forward_pre_hook(lambda _, inputs: size.update({subsampling: inputs[0].std(1).mean()}))
            model(torch.randn(2, 400, 8), torch.tensor([400, 400]))
        for subsampling in (2, 4):
            self.assertGreater(size[subsampling] / size[1], 0.4)

    def test_attention_knows_the_order_of_frames(self):
        model, tokens, token_len = self.model(), self.tokens(1, 30, 3), torch.tensor([30])
        for block in model.blocks:                      # without convolution, only positions can tell a sequence from its mirror image
            torch.nn.init.zeros_(block.convolution.out.weight)
        self.assertGreater((model(tokens, token_len)[0] - model(tokens.flip(1), token_len)[0].flip(1)).abs().max(), 1e-4)


class Augmentation(Case):
    def test_evaluation_is_never_augmented(self):
        model = CodecASR(12, 3, 20, 8, size="tiny", dropout=0.0)
        tokens, token_len = torch.randint(20, (2, 50, 3)), torch.tensor([50, 20])
        model.eval()
        plain = model(tokens, token_len)[0]
        model.augment = Augment(4, 2, 2, replace=0.5, noisy_embedding=5.0)
        self.assertSame(model(tokens, token_len)[0], plain)
        self.assertGreater((model.train()(tokens, token_len)[0] - plain).abs().max(), 1e-3)

    def test_masks_stay_within_the_utterance_and_their_width(self):
        lengths = torch.tensor([100] * 50 + [20] * 50)
        spans = Augment().spans(120, lengths, 3, 0.25)                          # (B, 3, T)
        hidden = spans.sum(2)
        self.assertTrue((hidden <= 0.25 * lengths[:, None] + 1).all())
        self.assertGreater(hidden[:50].max(), 20)                               # of at most 25
        self.assertFalse(spans[50:, :, 20:].any())
        self.assertTrue(spans[:50].any(1).any(0)[:100].float().mean() > 0.95)   # no place is spared

    def test_hidden_codebooks_are_whole_codebooks_over_a_span(self):
        tokens = torch.zeros(20, 100, 4, dtype=torch.long)
        keep = Augment(codebook_masks=1).keep_codebooks(tokens, torch.full((20,), 100))
        self.assertTrue(((keep == 0).any(1).sum(1) <= 1).all())                 # one mask: one codebook an utterance
        self.assertTrue(0.1 < (keep == 0).float().mean() * 4 < 0.4)             # a quarter of the time on average

    def test_masked_time_is_zero_in_all_dimensions(self):
        emb = Augment(time_masks=4).hide(torch.ones(20, 200, 8), torch.full((20,), 200))
        self.assertTrue((emb.amax(2) == emb.amin(2)).all())
        self.assertTrue(0.02 < (emb == 0).float().mean() < 0.2)

    def test_share_of_replaced_codes_is_the_one_asked_for(self):
        tokens = torch.zeros(4, 1000, 8, dtype=torch.long)
        changed = Augment(replace=0.3).change_codes(tokens, 1000)
        self.assertAlmostEqual((changed != 0).float().mean().item(), 0.3, delta=0.02)
        self.assertTrue(0 <= changed.min() and 900 < changed.max() < 1000)

    def test_noise_on_embeddings_is_neftunes(self):
        token_len, dim = torch.tensor([400, 100]), 32
        emb = Augment(noisy_embedding=5.0).hide(torch.zeros(2, 400, dim), token_len)
        for row, n in zip(emb, token_len.tolist()):
            bound = 5 / math.sqrt(n * dim)              # of a uniform distribution
            self.assertLessEqual(row[:n].abs().max(), bound)
            self.assertAlmostEqual(row[:n].std().item(), bound / math.sqrt(3), delta=0.05 * bound)

    def test_strength_zero_is_no_augmentation(self):
        augment = Augment(4, 2, 2, replace=0.5, noisy_embedding=5.0, strength=0.0)
        tokens, emb, token_len = torch.randint(20, (2, 50, 3)), torch.randn(2, 50, 8), torch.tensor([50, 20])
        self.assertSame(augment.change_codes(tokens, 20), tokens)
        self.assertEqual(augment.keep_codebooks(tokens, token_len).min(), 1)
        self.assertSame(augment.hide(emb, token_len), emb)


# ---------------------------------------------------------------------------------------------------- train_asr.py

TEXTS = ["NINE MEN", "TEN HENS", "A GREEN SEA", "THE RAIN"]


def token_folder(folder: Path, texts=TEXTS, frames_a_letter=3, dev=TEXTS[:2], copies=()) -> Path:
    """What tokenize_corpus.py writes, without audio: each letter is a few frames of a code of its own."""
    rng = np.random.default_rng(0)
    books = rng.standard_normal((2, 64, 8)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "codebooks.npy", books)
    for subset, lines in (("train", texts), ("dev", dev), ("test", dev)):
        (folder / subset).mkdir(exist_ok=True)
        items = [{"id": f"{subset}-{i}", "text": text, "lang": "en"} for i, text in enumerate(lines)]
        items += [item | {"id": f"{item['id']}-{copy['kind']}", "copy_of": item["id"], "noisy": copy["noisy"]}
                  for copy in copies if subset == "train" for item in items[:len(lines)]]
        for item in items:
            codes = np.repeat([ord(letter) % 64 for letter in " " + item["text"]], frames_a_letter)
            array = np.stack([codes, rng.integers(0, 64, len(codes))], 1).astype(np.int16)      # (T, Q)
            item |= {"frames": len(array), "duration": len(array) / 40, "audio": "", "array": f"{subset}/{item['id']}.npy"}
            np.save(folder / item["array"], array)
        (folder / f"{subset}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    meta = {"features": "tokens", "codec": "abc", "codec_path": "", "sample_rate": 16_000, "hop": 400, "bitrate": 480.0,
            "codebooks": 2, "codebook_size": 64, "dim": 8, "train": ["train"], "dev": ["dev"], "test": ["test"]}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


class Training(Case):
    def settings(self, **more):
        return TrainSettings(**{"tokens": str(self.folder / "tokens"), "out": str(self.folder / "asr"), "device": "cpu"} | more)

    def text(self, **more):
        return Text.train([{"text": text, "lang": "en"} for text in TEXTS], self.settings(**more))

    def data(self, **more):
        return TrainSet(self.settings(**more), train_asr.read_meta(self.folder / "tokens"), self.text())

    def train(self, **more):
        train_asr.train(self.settings(**{"epochs": 4, "batch": 2.0} | more))
        return torch.load(self.folder / "asr" / "asr.pt", weights_only=True)

    def test_four_utterances_are_learnt_to_the_letter(self):
        token_folder(self.folder / "tokens")
        data, text = self.data(), self.text()
        model = CodecASR(len(text), 2, 64, 8, size="tiny", dropout=0.0)
        model.start_from(torch.from_numpy(np.load(self.folder / "tokens" / "codebooks.npy")), data.flat)
        optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
        everything, cpu = torch.arange(4), torch.device("cpu")
        for step in range(150):
            train_asr.train_step(model, optimiser, data, everything, 1e-3, cpu, 0, 1)
            if step % 10 == 9:
                wer, _ = train_asr.judge(model, data, text, 1000, cpu, False)
                if wer == 0:
                    break
        self.assertEqual(wer, 0)

    def test_utterance_too_short_for_ctc_is_dropped_and_named(self):
        token_folder(self.folder / "tokens", ["NINE MEN", "SEES", "SEEN", "A"], frames_a_letter=1)
        self.assertEqual(self.data().dropped, ["train-1", "train-2"])           # EE needs a blank between: one frame more
        self.assertInputError("long enough", self.data, subsampling=2)
        self.train(epochs=1)
        self.assertRegex(self.output.getvalue(), "train-1, train-2")

    def test_ctc_sees_as_many_frames_as_subsampling_leaves(self):
        for subsampling in (2, 4):
            token_folder(self.folder / "tokens", frames_a_letter=9)             # else a loss over frames that are not there
            train_asr.train(self.settings(epochs=1, batch=4.0, subsampling=subsampling, out=str(self.folder / f"asr-{subsampling}")))
            self.assertTrue((self.folder / f"asr-{subsampling}" / "asr.pt").exists())

    def test_utterance_too_long_for_memory_is_dropped_and_named(self):
        token_folder(self.folder / "tokens", ["NINE MEN", "TEN " * 1000])       # 0.7 s, 300 s
        self.train(epochs=1)
        self.assertRegex(self.output.getvalue(), "1 utterances longer than 60 s.*train-1")

    def test_nothing_to_train_on_is_told_in_one_line(self):
        token_folder(self.folder / "tokens", frames_a_letter=1)
        self.assertInputError("long enough", self.train, subsampling=4)
        self.assertInputError("run tokenize_corpus.py first", self.train, tokens=str(self.folder / "nowhere"))
        self.assertInputError("--codebooks 3", self.train, codebooks=3)

    def test_damaged_tokens_are_told_in_one_line(self):
        folder = self.folder / "tokens"
        good = np.zeros((27, 2), np.int16)              # NINE MEN: as many frames as its row says
        cases = [("meta.json", text) for text in (b"{", b"[]", b'{"hop": 400}', b"\xff")]
        cases += [("train.jsonl", text) for text in (b"", b"{\n", b"[]\n", b'{"id": "train-0"}\n', b"\xff\n")]
        cases += [("dev.jsonl", b""), ("codebooks.npy", b"words"), ("train/train-0.npy", b""), ("train/train-0.npy", b"PK\3\4")]
        for array in (good[:-1], good[:, :1], good.astype(np.int64), good + np.int16(64), good - np.int16(1), good[:0]):
            np.save(buffer := io.BytesIO(), array)
            cases += [("train/train-0.npy", buffer.getvalue())]
        for name, data in cases:
            token_folder(folder)
            (folder / name).write_bytes(data)
            self.assertInputError(f"{name}: .*run tokenize_corpus.py", self.train)
        self.assertFalse((self.folder / "asr").exists())

    def test_infinite_loss_is_told_with_its_step_and_utterances(self):
        token_folder(self.folder / "tokens")
        self.train(epochs=1, lr=1e-3)
        step, before = train_asr.train_step, (self.folder / "asr" / "asr.pt").read_bytes()

        def broken(*things):
            return step(*things) * (math.nan if things[3].tolist() == [3] else 1)
        with mock.patch.object(train_asr, "train_step", broken):
            self.assertInputError("at step ., at utterances train-3", self.train, batch=1.0, out=str(self.folder / "new"))
        self.assertFalse((self.folder / "new").exists())
        self.assertEqual((self.folder / "asr" / "asr.pt").read_bytes(), before)

    def test_unknown_characters_become_no_blanks(self):
        token_folder(self.folder / "tokens", ["NINE ÖMEN"])
        data, text = self.data(), self.text()           # of TEXTS: it has never seen an Ö
        self.assertIn(0, text.encode("NINE ÖMEN"))
        self.assertEqual(data.targets[0].tolist(), text.encode("NINE MEN"))
        self.assertEqual((data.unknown, text.unknown(["ÖÖ NINE", "MÖN"])), (1, 3))      # each, though neighbours become one id

    def test_same_id_in_two_subsets_stands_for_two_utterances(self):
        folder = token_folder(self.folder / "tokens")
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "more").symlink_to("train")
        (folder / "more.jsonl").write_text((folder / "train.jsonl").read_text().replace('"train/', '"more/'))
        (folder / "meta.json").write_text(json.dumps(meta | {"train": ["train", "more"]}))
        self.assertEqual(sum(map(len, self.data().epoch(0, 1000, 1.0))), 2 * len(TEXTS))

    def test_languages_are_asked_for_where_there_are_none(self):
        folder = token_folder(self.folder / "tokens")
        (folder / "train.jsonl").write_text((folder / "train.jsonl").read_text().replace('"en"', '""'))
        self.assertInputError("no utterance says its language", self.train, lang_token=True)

    def test_units_give_the_text_back_and_blank_is_index_0(self):
        for units in ("char", "unigram", "bpe"):
            text = self.text(units=units, vocab_size=24)
            for line in TEXTS:
                ids = text.encode(line)
                self.assertEqual(text.decode(ids), line)
                self.assertNotIn(0, ids)

    def test_greedy_merges_repeats_and_drops_blanks(self):
        text = self.text()
        n, e = (text.units.piece_to_id(letter) for letter in "NE")
        path = torch.tensor([[n, n, 0, e, 0, e, e, n, e]])                      # the last two are padding
        log_probs = torch.nn.functional.one_hot(path, len(text)).float()
        self.assertEqual(text.greedy(log_probs, torch.tensor([7])), ["NEE"])

    def test_shares_of_several_processes_add_up_to_the_whole(self):
        token_folder(self.folder / "tokens")
        data, cpu = self.data(), torch.device("cpu")
        model = CodecASR(len(self.text()), 2, 64, 8, size="tiny", dropout=0.0)
        optimiser = torch.optim.AdamW(model.parameters())
        for group in (torch.arange(4), torch.arange(3), torch.tensor([2])):     # even, uneven, and fewer than processes
            loss = lambda rank, world: train_asr.train_step(model, optimiser, data, group, 0.0, cpu, rank, world)
            self.assertClose((loss(0, 2) + loss(1, 2)) / 2, loss(0, 1))

    def test_every_batch_is_within_its_bound_and_every_utterance_in_one(self):
        token_folder(self.folder / "tokens", [("NINE MEN " * n).strip() for n in range(1, 40)])
        data = self.data()
        for generator in (None, torch.Generator().manual_seed(0)):
            groups = data.batches(torch.arange(39), 2500, generator)
            self.assertEqual(sorted(i for group in groups for i in group.tolist()), list(range(39)))
            self.assertTrue(all(len(group) * data.lengths[group].max() <= 2500 for group in groups))
        tokens, token_len = data.take(torch.tensor([3, 0]), torch.device("cpu"))
        self.assertSame(tokens[1, :token_len[1]], torch.from_numpy(np.load(self.folder / "tokens" / "train" / "train-0.npy")))
        self.assertEqual(tokens[1, token_len[1]:].abs().sum(), 0)

    def test_an_epoch_takes_one_variant_of_each_utterance(self):
        kinds = [dict(kind="speed0.9", noisy=False), dict(kind="noise0", noisy=True), dict(kind="noise1", noisy=True)]
        token_folder(self.folder / "tokens", copies=kinds)
        data, noisy = self.data(noisy_share=0.25), []
        for number in range(200):
            taken = [data.rows[i] for group in data.epoch(number, 1000, 1.0) for i in group.tolist()]
            self.assertEqual(sorted(row.get("copy_of", row["id"]) for row in taken), [f"train-{i}" for i in range(4)])
            noisy += [row.get("noisy", False) for row in taken]
        self.assertAlmostEqual(np.mean(noisy), 0.25, delta=0.06)
        early = [data.rows[i].get("noisy", False) for group in data.epoch(0, 1000, 0.0) for i in group.tolist()]
        self.assertEqual(sum(early), 0)                 # the curriculum begins with clean speech

    def test_resumed_run_equals_uninterrupted_run(self):
        token_folder(self.folder / "tokens")
        more, errors = dict(noisy_embedding=5.0, replace=0.1, curriculum=6), (0.5, 0.6, 0.4, 0.7)
        # Epoch 2 is worse than epoch 1: what is best and what goes on are not the same weights.
        self.enterContext(mock.patch.object(train_asr, "judge", side_effect=[(1.0, error) for error in 2 * errors]))
        straight = self.train(**more)
        (self.folder / "asr" / "asr.pt").unlink()
        step, began = train_asr.train_step, []

        def interrupted(*things):
            began.append(1)
            if len(began) > straight["step"] // 2 + 1:  # Ctrl-C in the middle of the third of four epochs
                raise KeyboardInterrupt
            return step(*things)
        with mock.patch.object(train_asr, "train_step", interrupted), self.assertRaises(KeyboardInterrupt):
            self.train(**more)
        resumed = self.train(**more)
        self.assertIn("continuing after epoch 2 of 4", self.output.getvalue())
        self.assertEqual((resumed["step"], resumed["best"]), (straight["step"], 0.4))
        for weights in ("last", "model"):
            for name, value in straight[weights].items():
                self.assertSame(value, resumed[weights][name], name)

    def test_run_goes_on_only_with_what_it_began_with(self):
        token_folder(self.folder / "tokens")
        self.train(epochs=1)
        self.assertInputError("trained with --time-masks", self.train, epochs=1, time_masks=1)
        meta = json.loads((self.folder / "tokens" / "meta.json").read_text())
        for other in ({"corpus": "elsewhere"}, {"train": ["test"]}, {"noise": ["white"]}):
            (self.folder / "tokens" / "meta.json").write_text(json.dumps(meta | other))
            self.assertInputError(f"tokens with {next(iter(other))}", self.train, epochs=1)
        (self.folder / "tokens" / "meta.json").write_text(json.dumps(meta | {"codec": "another"}))
        self.assertInputError("tokens of codec", self.train, epochs=1)

    def test_codec_as_recogniser_and_the_reverse_are_told_in_one_line(self):
        token_folder(self.folder / "tokens")
        self.train(epochs=1)
        self.assertInputError("holds asr", Codec.load, self.folder / "asr" / "asr.pt")
        saved = torch.load(self.folder / "asr" / "asr.pt", weights_only=True)
        for other in (saved | {"settings": saved["settings"] | {"heads": 4}}, saved | {"meta": {}}, saved | {"text": torch.zeros(9)},
                      {name: saved[name] for name in ("kind", "format", "settings", "meta", "text")}):
            torch.save(other, self.folder / "asr" / "asr.pt")
            self.assertInputError("another version", self.train)
        (self.folder / "asr" / "asr.pt").write_bytes(trained_codec().read_bytes())
        self.assertInputError("holds codec", self.train)


# ---------------------------------------------------------------------------------------------------- evaluate.py

@functools.cache
def trained_asr() -> Path:
    """A recogniser after one epoch on the tokens of the small corpus."""
    tokens, out = tokenize(Path(SCRATCH.name) / "tokens"), Path(SCRATCH.name) / "asr"
    train_asr.main(["--tokens", str(tokens), "--epochs", "1", "--batch", "10", "--codebooks", "3", "--device", "cpu", "--out", str(out)])
    return out / "asr.pt"


class Evaluation(Case):
    def evaluate(self, *arguments):
        evaluate.main(["--asr", str(trained_asr()), "--device", "cpu", "--out", str(self.folder / "eval"), *map(str, arguments)])
        return self.folder / "eval"

    def test_error_rates_are_those_of_jiwer(self):
        refs, hyps = ["THE CAT SAT", "A DOG", "SO"], ["THE CAT SAT DOWN", "A", "GO"]
        summary = evaluate.Score(refs, hyps).summary()
        self.assertAlmostEqual(summary["wer"], jiwer.wer(refs, hyps))
        self.assertAlmostEqual(summary["cer"], jiwer.cer(refs, hyps))
        self.assertEqual([summary[kind] for kind in ("substitutions", "deletions", "insertions")], [1, 1, 1])
        self.assertEqual(evaluate.Score(refs, refs).summary()["wer_interval"], [0, 0])

    def test_languages_are_scored_apart_and_letters_never_seen_are_counted(self):
        text = Text.train([{"text": "ONE DOS ZWEI"}], TrainSettings())
        recogniser = mock.Mock(return_value=(["<en> ONE", "<es> DOS", "<en> ZWEI"], 1.0), settings={"lang_token": True}, text=text)
        data = mock.Mock(rows=[{"text": words, "lang": lang, "duration": 1.0} for words, lang in (("ONE", "en"), ("DOS", "es"), ("ZWÄI", "es"))])
        _, summary = evaluate.judge(recogniser, data, 0)
        self.assertEqual({lang: cer for lang, (cer, *_) in summary["cer_by_language"].items()}, {"en": 0, "es": 1 / 7})
        self.assertAlmostEqual(summary["cer_language_mean"], 1 / 14)
        page = evaluate.remarks(summary)
        self.assertIn("language identified: 66.7 %", page)
        self.assertIn("1 characters of the transcripts", page)

    def test_only_a_language_token_is_taken_off_the_text(self):
        data = mock.Mock(rows=[{"text": "<laugh> YES", "lang": "", "duration": 1.0}])
        recogniser = mock.Mock(return_value=(["<laugh> YES"], 1.0), settings={"lang_token": False}, text=Text.train(data.rows, TrainSettings()))
        self.assertEqual(evaluate.judge(recogniser, data, 0)[1]["wer"], 0)
        for name in ("Mandarin Chinese", "unk", "<en>"):
            self.assertInputError("cannot be a token", Text.train, [{"text": "ONE", "lang": name}], TrainSettings(lang_token=True))

    def test_copies_are_not_judged(self):
        token_folder(self.folder, copies=[{"kind": "speed0.9", "noisy": False}, {"kind": "noise0", "noisy": True}])
        self.assertEqual(len(train_asr.TokenSet(self.folder, ["train"]).rows), 4)
        self.assertEqual(len(train_asr.TokenSet(self.folder, ["train"], copies=True).rows), 12)

    def test_what_cannot_be_done_is_told_before_the_work(self):
        self.enterContext(mock.patch.object(evaluate, "judge", side_effect=AssertionError))
        self.assertInputError("--noise wihte", self.evaluate, "--noise", "white", "wihte")
        self.assertInputError("--snr inf", self.evaluate, "--noise", "white", "--snr", 10, "inf")
        self.assertInputError("no such subset", self.evaluate, "--test", "test", "tset")
        for mode, more in ((("--compare", trained_asr().parent), ("--noise", "white")), (("--benchmark",), ("--tokens", "runs")),
                           (("--audio", "a.wav"), ("--noise", "white")), (("--content",), ("--compare", "runs/asr"))):
            self.assertInputError("leave one of them out", self.evaluate, *mode, *more)

    def test_interval_holds_the_rate_and_a_run_does_not_differ_from_itself(self):
        rng = np.random.default_rng(0)
        counts = np.stack([rng.binomial(20, 0.3, 400), np.full(400, 20)], 1)
        low, high = evaluate.interval(counts, 0)
        self.assertLess(low, evaluate.error_rate(counts))
        self.assertGreater(high, evaluate.error_rate(counts))
        self.assertAlmostEqual(high - low, 2 * 1.96 * math.sqrt(0.3 * 0.7 / 8000), delta=0.004)         # of a binomial
        self.assertEqual(evaluate.paired(counts, counts, 0), [0, 0])
        self.assertGreater(evaluate.paired(counts + [1, 0], counts, 0)[0], 0)

    def test_mutual_information_of_equals_is_entropy_and_of_strangers_is_nothing(self):
        labels = np.arange(8).repeat(100)
        self.assertAlmostEqual(evaluate.mutual_information(labels, labels), 3)
        self.assertAlmostEqual(evaluate.mutual_information(labels, np.arange(800) % 4), 0)

    def test_report_holds_every_test_subset_and_noise(self):
        out = self.evaluate("--test", "test", "dev", "--noise", "white", "--snr", 10, 0)
        report = json.loads((out / "report.json").read_text())["test"]
        self.assertEqual(list(report), ["test", "test, white 10 dB", "test, white 0 dB", "dev", "dev, white 10 dB", "dev, white 0 dB"])
        for name, result in report.items():
            self.assertEqual(result["utterances"], 2)
            self.assertLessEqual(result["wer_interval"][0], result["wer"])
            self.assertIn(f"| {name} |", (out / "report.md").read_text())

    def test_noise_is_added_to_audio_that_is_then_encoded_anew(self):
        recogniser = evaluate.Recogniser(trained_asr())
        data = train_asr.TokenSet(recogniser.settings["tokens"], ["test"], 3)
        same, other = (evaluate.degrade(recogniser, recogniser.front_end(""), data, "white", snr, 0) for snr in (300, 0))
        self.assertSame(same.flat, data.flat)
        self.assertGreater((other.flat != data.flat).float().mean(), 0.2)

    def test_file_is_transcribed_as_its_tokens_are_recognised(self):
        recogniser = evaluate.Recogniser(trained_asr())
        data = train_asr.TokenSet(recogniser.settings["tokens"], ["test"], 3)
        (self.folder / "bad.wav").write_text("no audio")
        self.evaluate("--audio", *(row["audio"] for row in data.rows), self.folder / "bad.wav")
        for row, hyp in zip(data.rows, recogniser(data)[0]):
            self.assertIn(f"{row['audio']}: {hyp}\n", self.output.getvalue())
        self.assertRegex(self.output.getvalue(), r"skipped: .*bad\.wav")
        self.assertInputError("none of the files", self.evaluate, "--audio", self.folder / "bad.wav")

    def test_long_recordings_are_read_frame_by_frame_with_no_seam(self):
        recogniser, seen = evaluate.Recogniser(trained_asr()), []
        recogniser.search = lambda log_probs, out_len: [seen.append(log_probs) or ""]
        for subsampling in (1, 2):
            recogniser.settings |= {"subsampling": subsampling}
            width = recogniser.model.project.out_features
            recogniser.model.subsample = torch.nn.ModuleList(torch.nn.Conv1d(width, width, 3, 2, padding=1) for _ in range(subsampling - 1))
            for block in recogniser.model.blocks:       # without attention a frame depends on its neighbours alone
                torch.nn.init.zeros_(block.attention.out.weight)
            for frames in (1, 7, 799, 1601, 2000):
                array = np.random.default_rng(0).integers(0, 1000, (frames, 4)).astype(np.int16)
                recogniser.long(array)
                with torch.inference_mode():
                    whole, _ = recogniser.model(torch.from_numpy(array[None, :, :3]), torch.tensor([frames]))
                self.assertClose(seen[-1], whole, atol=1e-4)

    def test_comparison_is_a_table_of_all_runs(self):
        out = self.evaluate("--compare", trained_asr().parent, trained_asr().parent)
        first, second = json.loads((out / "compare.json").read_text())
        self.assertEqual(second["test"]["test"]["cer_difference"], [0, 0])
        self.assertEqual(first["test"]["test"]["wer"], second["test"]["test"]["wer"])

    def test_content_is_of_each_codebook(self):
        out = self.evaluate("--content", "--tokens", trained_asr().parents[1] / "tokens")
        self.assertEqual([row["codebook"] for row in json.loads((out / "content.json").read_text())], [0, 1, 2, 3])

    def test_codec_and_tokens_of_another_kind_are_told_in_one_line(self):
        other = tokenize(self.folder / "mel", "--features", "mel")
        self.assertInputError("was trained on tokens of codec", self.evaluate, "--tokens", other)
        self.assertInputError("no alignment|not tokens", self.evaluate, "--content", "--tokens", other)
        audio = next(small_corpus().rglob("*.flac"))
        self.assertInputError("give its own with --codec", self.evaluate, "--codec", trained_codec("time", "rvq"), "--audio", audio)
        self.assertInputError("no such subset", self.evaluate, "--test", "nope")
        self.assertInputError("holds codec", evaluate.Recogniser, trained_codec())

    def test_content_of_other_corpora_is_told_in_one_line(self):
        token_folder(self.folder / "tokens")
        self.assertInputError("synthetic", self.evaluate, "--content", "--tokens", self.folder / "tokens")

    def test_pictures_are_drawn_where_matplotlib_is(self):
        if not importlib.util.find_spec("matplotlib"):
            return self.assertInputError("pip install matplotlib", self.evaluate, "--plots")
        self.evaluate("--plots", "--noise", "white", "--snr", 10)
        self.evaluate("--plots", "--content", "--tokens", trained_asr().parents[1] / "tokens")
        self.evaluate("--plots", "--compare", trained_asr().parent)
        drawn = {path.name for path in (self.folder / "eval").glob("*.png") if path.stat().st_size > 5000}
        self.assertEqual(drawn, {"utterance.png", "learning.png", "codec.png", "noise.png", "content.png", "bitrate.png"})

    @unittest.skipIf(importlib.util.find_spec("flashlight"), "flashlight-text is installed")
    def test_beam_search_without_flashlight_is_told_in_one_line(self):
        self.assertInputError("pip install flashlight-text", self.evaluate, "--beam", 5)


# ---------------------------------------------------------------------------------------------------- all together

class WholeRuns(Case):
    def test_the_four_codecs_go_through_all_stages(self):
        for kind in FOUR_CODECS:
            tokens, asr, out = (self.folder / f"{name}-{kind}" for name in ("tokens", "asr", "eval"))
            tokenize(tokens, "--codec", trained_codec(*kind))
            train_asr.main(["--tokens", str(tokens), "--epochs", "1", "--batch", "10", "--device", "cpu", "--out", str(asr)])
            evaluate.main(["--asr", str(asr / "asr.pt"), "--device", "cpu", "--out", str(out)])
            self.assertEqual(list(json.loads((out / "report.json").read_text())["test"]), ["test"])

    def test_scripts_answer_bad_input_in_one_line(self):
        commands = (["codec.py", "--corpus"], ["tokenize_corpus.py", "--corpus", small_corpus(), "--codec"],
                    ["train_asr.py", "--tokens"], ["evaluate.py", "--asr"])
        running = [subprocess.Popen([sys.executable, HERE / script, *arguments, self.folder / "nowhere"], cwd=self.folder, text=True,
                                    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for script, *arguments in commands]
        for (script, *_), process in zip(commands, running):
            _, complaint = process.communicate(timeout=300)
            self.assertEqual(process.returncode, 2, complaint)
            self.assertRegex(complaint, r"\Aerror: .*nowhere.*\n\Z", script)


SCRIPT = """
import functools, json, os, sys
import torch, torch.distributed as dist
import codec, tokenize_corpus, train_asr
out, corpus, trained, tokens = sys.argv[1:]
rank, losses, start = os.environ.get("RANK", "0"), [], dist.init_process_group
dist.init_process_group = lambda backend, timeout: dist.is_initialized() or start(backend)      # three stages in one process
log_and_save, train_step = codec.log_and_save, train_asr.train_step

def save_books(recent, step, settings, nets, *rest):
    torch.save(getattr(nets[0], "module", nets[0]).quantizer.state_dict(), f"{out}/books{rank}.pt")
    log_and_save(recent, step, settings, nets, *rest)

def save_loss(*things):
    losses.append(train_step(*things))
    return losses[-1]

codec.log_and_save, train_asr.train_step = save_books, save_loss
codec.ResidualVQ = functools.partial(codec.ResidualVQ, decay=0.5, dead_below=0.5)       # so that codes die within three steps
codec.main(["--corpus", corpus, "--quantizer", "rvq", "--codebooks", "2", "--steps", "3", "--batch", "4", "--device", "cpu", "--out", f"{out}/codec"])
tokenize_corpus.main(["--corpus", corpus, "--codec", trained, "--workers", "0", "--device", "cpu", "--out", f"{out}/tokens"])
train_asr.main(["--tokens", tokens, "--epochs", "2", "--batch", "100", "--dropout", "0", "--time-masks", "0", "--codebook-masks", "0",
                "--feature-masks", "0", "--device", "cpu", "--out", f"{out}/asr"])
json.dump([loss.item() for loss in losses], open(f"{out}/losses{rank}.json", "w"))
codec.stop_processes()
"""


@unittest.skipUnless(torch.distributed.is_available() and torch.distributed.is_gloo_available(), "torch was built without gloo")
class TwoProcesses(Case):
    """The first three stages under torchrun, over gloo, next to the same in one process."""

    @classmethod
    def setUpClass(cls):
        cls.home = Path(SCRATCH.name) / "processes"
        tokens, script = token_folder(cls.home / "letters"), cls.home / "script.py"
        script.write_text(SCRIPT)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            inputs = [small_corpus(), trained_codec(), tokens]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = ["--master_addr=127.0.0.1", f"--master_port={free.getsockname()[1]}"]
        for count, launch in ((1, []), (2, ["-m", "torch.distributed.run", "--nproc_per_node=2", *address])):
            (cls.home / str(count)).mkdir()
            done = subprocess.run([sys.executable, *launch, script, cls.home / str(count), *inputs], text=True, capture_output=True,
                                  timeout=300, env=os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
            if done.returncode:
                raise AssertionError(f"{count} processes: {done.stderr[-3000:]}")

    def test_both_keep_the_same_codebooks(self):
        one, other = (torch.load(self.home / "2" / f"books{rank}.pt") for rank in (0, 1))
        for name, value in one.items():
            self.assertSame(value, other[name], name)

    def test_two_write_the_tokens_that_one_writes(self):
        for subset in ("train", "dev", "test"):
            self.assertEqual(rows(self.home / "1" / "tokens", subset), rows(self.home / "2" / "tokens", subset))
            for row in rows(self.home / "1" / "tokens", subset):
                np.testing.assert_array_equal(*(np.load(self.home / count / "tokens" / row["array"]) for count in "12"))

    def test_two_learn_what_one_learns(self):
        one, first, second = (json.loads((self.home / name).read_text()) for name in ("1/losses0.json", "2/losses0.json", "2/losses1.json"))
        self.assertEqual(len(one), 2)
        np.testing.assert_allclose(np.mean([first, second], 0), one, rtol=1e-4)


def load_tests(loader, _tests, _pattern):
    """All classes in the order in which they stand here."""
    return unittest.TestSuite(loader.loadTestsFromTestCase(case) for case in list(globals().values())
                              if isinstance(case, type) and issubclass(case, Case))


if __name__ == "__main__":
    result = unittest.main(verbosity=2, exit=False).result
    failed = len({getattr(test, "test_case", test).id() for test, _ in result.failures + result.errors})
    skipped = len(result.skipped)
    print(f"{max(0, result.testsRun - failed - skipped)} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    sys.exit(not result.wasSuccessful())
