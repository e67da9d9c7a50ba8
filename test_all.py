"""The promises of this project, one test each, on small audio that the tests make themselves.

    python test_all.py                  # all, about a minute on two CPU cores
    python test_all.py noise resume     # those with one of these words in their names
    pytest test_all.py                  # the same with pytest

The last line counts: "N passed, M failed". Nothing is written outside a temporary folder.

Legend: B utterances, S samples, T token frames, Q codebooks, K codes, D latent size.
"""

import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jiwer
import numpy as np
import soundfile as sf
import torch

import codec
import evaluate
import tokenize_corpus
import train_asr
from asr_model import Augment, CodecASR
from codec import Codec, read_audio
from evaluate import Recogniser, Score
from quantizers import GroupFSQ, ResidualVQ, redundancy, usage_and_perplexity
from tokenize_corpus import Encodec, FrontEnd, Noise, Utterance, read_subset
from train_asr import Text, TokenSet, TrainSet, orthogonal

HERE = Path(__file__).resolve().parent
SCRATCH = tempfile.TemporaryDirectory()     # removed when Python ends
CPU = torch.device("cpu")
FOUR = list(itertools.product(("mel", "time"), ("fsq", "rvq")))
torch.set_num_threads(1)                    # the models are so small that threads slow them down


# ----------------------------------------------------------------------------------------- helpers

def new_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=SCRATCH.name))


def noise(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(one, other, tolerance=1e-5) -> None:
    torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


def run(stage, *arguments) -> str:
    """Run a script's main() -> what it printed."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(io.StringIO()):
        stage.main([*map(str, arguments), "--device", "cpu"])
    return printed.getvalue()


def refused(what: str, function, *arguments) -> None:
    """Bad input raises ValueError, or ends a script, with one line that says `what`."""
    try:
        run(function, *arguments) if hasattr(function, "main") else function(*arguments)
    except (ValueError, SystemExit) as error:
        assert what in str(error) and "\n" not in str(error), f"{what!r} is not in {error!r}"
    else:
        raise AssertionError(f"no error that says {what!r}")


def stop_after(stage, name: str, calls: int):
    """stage.name works so many times, and then fails."""
    work, done = getattr(stage, name), []

    def limited(*arguments):
        if len(done) == calls:
            raise OSError("the disk is full")
        done.append(1)
        return work(*arguments)
    return mock.patch.object(stage, name, limited)


def write(path: Path, samples, rate=16_000, **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.asarray(samples), rate, **more)
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def weights(path: Path, name="model") -> dict:
    return torch.load(path, weights_only=True)[name]


def assert_same_weights(one: dict, other: dict) -> None:
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@cache
def corpus() -> Path:
    """Synthetic speech in LibriSpeech's layout: 8, 3 and 3 utterances."""
    folder = new_folder()
    with mock.patch.dict(codec.UTTERANCES, train=8, dev=3, test=3), redirect_stderr(io.StringIO()):
        codec.make_synthetic(folder)
    return folder


CODEC_FLAGS = ["--steps", 5, "--batch", 2, "--crop", 0.5, "--codebooks", 4]


@cache
def small_codec() -> Path:
    """codec.pt after five steps."""
    out = new_folder()
    run(codec, "--corpus", corpus(), *CODEC_FLAGS, "--out", out)
    return out / "codec.pt"


def tokenize(out: Path, *flags, source: Path | None = None) -> str:
    return run(tokenize_corpus, "--corpus", source or corpus(), "--codec", small_codec(),
               "--workers", 0, "--out", out, *flags)


@cache
def small_tokens() -> Path:
    out = new_folder()
    tokenize(out)
    return out


@cache
def small_asr() -> Path:
    """asr.pt after one epoch on the tokens of the synthetic speech, three codebooks of four."""
    out = new_folder()
    run(train_asr, "--tokens", small_tokens(), "--epochs", 1, "--codebooks", 3, "--out", out)
    return out / "asr.pt"


@cache
def make_codec(encoder: str, quantizer: str, strides=(2, 4, 5, 10)) -> Codec:
    """Random weights; one pass in training mode sets the latent's scale and RVQ's codebooks."""
    torch.manual_seed(0)
    model = Codec(encoder, quantizer, strides, codebooks=4, codebook_size=64)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm1d):
            layer.momentum = 1.0
    model(0.1 * noise(2, 32_000))
    return model.eval()


WORDS = ["MAN", "TEN", "CAT", "SEE", "ROOM", "FOX", "RED", "BLUE"]


def letter_tokens(folder: Path, texts: dict, frames=3, lang="", copies=()) -> Path:
    """Token files without audio: codebook 0 spells the text, codebook 1 is random.

    texts: {subset: transcripts}; frames: a letter; copies: (name, noisy) of each train utterance.
    """
    rng = np.random.default_rng(0)
    for subset, lines in texts.items():
        (folder / subset).mkdir(parents=True)
        rows = []
        for i, text in enumerate(lines):
            row = {"id": f"{i}", "text": text, "lang": lang, "speaker": f"s{i % 6}", "audio": ""}
            variants = copies if subset == "train" else ()
            for more in [{}, *({"copy_of": f"{i}", "noisy": noisy} for _, noisy in variants)]:
                codes = np.repeat([ord(letter) % 32 for letter in f" {text}"], frames)
                array = np.stack([codes, rng.integers(0, 32, len(codes))], 1).astype(np.int16)
                name = f"{subset}/{len(rows)}.npy"
                np.save(folder / name, array)
                rows.append(row | more | {"array": name, "frames": len(array),
                                          "duration": len(array) / 40})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{subset}.jsonl").write_text(text)
    books = rng.standard_normal((2, 32, 8)).astype(np.float32) * [[[1]], [[0.3]]]
    np.save(folder / "codebooks.npy", books.astype(np.float32))
    meta = {"features": "tokens", "codec": "abc", "codec_path": "codec.pt", "sample_rate": 16_000,
            "hop": 400, "bitrate": 400.0, "codebooks": 2, "codebook_size": 32, "dim": 8,
            "corpus": ["x"], "noise": [], "snr": [0, 20], "seed": 0,
            "train": ["train"], "dev": ["dev"], "test": ["test"]}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@cache
def letters() -> Path:
    rng = np.random.default_rng(1)
    sizes = {"train": 30, "dev": 5, "test": 12}
    return letter_tokens(new_folder(), {
        subset: [" ".join(rng.choice(WORDS, 3)) for _ in range(size)]
        for subset, size in sizes.items()})


NO_MASKS = ["--time-masks", 0, "--codebook-masks", 0, "--feature-masks", 0, "--dropout", 0]


@cache
def letter_asr() -> Path:
    """A recogniser that has learnt to read letter_tokens."""
    out = new_folder()
    run(train_asr, "--tokens", letters(), "--epochs", 8, "--batch", 3, "--lr", 0.004, *NO_MASKS,
        "--out", out)
    return out / "asr.pt"


def train_set(folder: Path, *flags) -> TrainSet:
    args = train_asr.parse(["--tokens", str(folder), *map(str, flags)])
    return TrainSet(args, train_asr.read_meta(folder))


def load_recogniser(path: Path) -> Recogniser:
    return Recogniser(path, evaluate.parse(["--device", "cpu"]))


# -------------------------------------------------------------------------------------- quantizers

def make_latent(batch=4, time=60) -> torch.Tensor:
    """Dimensions of unequal strength, (B, 16, T)."""
    return noise(batch, 16, time) * torch.linspace(2, 0.2, 16)[:, None]


@cache
def make_rvq() -> ResidualVQ:
    quantizer = ResidualVQ(16, num_codebooks=4, codebook_size=16)
    for _ in range(10):
        quantizer(make_latent())
    return quantizer.eval()


def test_quantised_latent_is_the_sum_of_codebook_rows():
    for quantizer in (make_rvq(), GroupFSQ(4)):
        result, books = quantizer(make_latent()), quantizer.codebooks()
        assert books.shape == (4, quantizer.codebook_size, 16)
        rows = sum(book[index] for book, index in zip(books, result.tokens.unbind(1)))
        close(rows.transpose(1, 2), result.latent)


def test_encode_gives_the_tokens_of_forward_and_decode_its_latent():
    for quantizer in (make_rvq(), GroupFSQ(4)):
        result = quantizer(make_latent())
        assert torch.equal(quantizer.encode(make_latent()), result.tokens)
        close(quantizer.decode(result.tokens), result.latent)


def test_first_codebooks_alone_decode_and_more_are_better():
    for quantizer in (make_rvq(), GroupFSQ(4)):
        latent = make_latent().tanh()
        tokens = quantizer.encode(make_latent())
        target = make_latent() if quantizer is make_rvq() else latent
        errors = [(quantizer.decode(tokens[:, :n]) - target).square().mean() for n in range(1, 5)]
        assert errors[0] > errors[1] > errors[2] > errors[3]


def test_fsq_reaches_all_codes():
    tokens = GroupFSQ(1).encode(noise(1, 4, 100_000))
    assert len(tokens.unique()) == 1000 and tokens.min() == 0 and tokens.max() == 999


def test_fsq_rounds_to_the_nearest_level():
    result = GroupFSQ(4)(make_latent())
    five_levels = [d for d in range(16) if d % 4]               # at -1, -1/2, 0, 1/2, 1
    error = (result.latent - make_latent().tanh())[:, five_levels]
    assert error.abs().max() < 0.252


def test_fsq_computes_in_float32_under_bfloat16_autocast():
    quantizer, rough = GroupFSQ(4), make_latent(time=500).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result, tokens = quantizer(rough), quantizer.encode(rough)
    assert result.latent.dtype == torch.float32
    assert torch.equal(tokens, quantizer.encode(rough.float()))
    assert torch.equal(tokens, result.tokens)


def test_rvq_passes_the_decoders_gradient_once():
    latent = make_latent().requires_grad_()
    make_rvq()(latent).latent.sum().backward()
    close(latent.grad, torch.ones_like(latent))


def test_every_rvq_level_pulls_on_the_encoder():
    latent, quantizer = make_latent().requires_grad_(), make_rvq()
    result = quantizer(latent)
    result.loss.backward()
    # Level n: the gradient of the mean squared distance to the sum of the first n codes.
    made = [quantizer.decode(result.tokens[:, :n]) for n in (1, 2, 3, 4)]
    pulls = [2 / latent.numel() * (latent.detach() - first) for first in made]
    close(latent.grad, sum(pulls) / 4, 1e-7)


def test_revived_dead_code_stays_at_the_data():
    quantizer = ResidualVQ(2, num_codebooks=1, codebook_size=8)
    for seed in range(5):
        quantizer(5 + noise(8, 2, 50, seed=seed))
    quantizer.embed[0, 3], quantizer.ema_sum[0, 3], quantizer.ema_count[0, 3] = 100.0, 0.01, 1e-4
    data = 5 + noise(8, 2, 50, seed=5)
    quantizer(data)
    assert torch.cdist(quantizer.embed[0, 3:4], data.transpose(1, 2).flatten(0, 1)).min() < 1e-3
    for seed in range(6, 16):
        tokens = quantizer(5 + noise(8, 2, 50, seed=seed)).tokens
    assert (tokens == 3).any()


def test_kmeans_leaves_no_zero_or_double_code_at_deep_levels():
    torch.manual_seed(0)
    quantizer = ResidualVQ(16, num_codebooks=8, codebook_size=32)
    quantizer.initialise(noise(8 * 32, 16))
    for book in quantizer.codebooks():
        assert book.norm(dim=1).min() > 1e-3
        assert torch.pdist(book).min() > 1e-4


def test_random_depth_leaves_each_utterance_its_first_codebooks():
    torch.manual_seed(0)
    quantizer = ResidualVQ(16, num_codebooks=4, codebook_size=16)
    quantizer.initialise(make_latent().transpose(1, 2).flatten(0, 1))
    quantizer.dropout, quantizer.decay, quantizer.dead_below = 1.0, 1.0, 0.0    # nothing is learnt
    result, depths = quantizer(make_latent(batch=40, time=6)), set()
    for tokens, made in zip(result.tokens, result.latent):
        first = [quantizer.decode(tokens[None, :n])[0] for n in (1, 2, 3, 4)]
        fits = [n for n, other in enumerate(first, 1) if torch.allclose(made, other, atol=1e-4)]
        depths.update(fits)
        assert len(fits) == 1
    assert depths == {1, 2, 3, 4}


def test_perplexity_counts_codes_that_are_used_alike():
    tokens = torch.tensor([[0, 1, 2, 3], [5, 5, 5, 5]]).repeat(1, 6)[None]      # (1, 2, 24)
    usage, perplexity = usage_and_perplexity(tokens, 16)
    close(usage, torch.tensor([4 / 16, 1 / 16]))
    close(perplexity, torch.tensor([4.0, 1.0]))


def test_redundancy_tells_copies_from_independent_dimensions():
    independent = noise(2, 8, 4000)
    assert redundancy(independent) < 0.01
    assert redundancy(independent[:, :1].expand(-1, 8, -1)) > 0.8


# ------------------------------------------------------------------------------------------- codec

def test_tokens_are_ceil_of_samples_over_hop_and_decode_to_as_many_hops():
    for kind, strides in itertools.product(FOUR, ((2, 4, 5, 10), (2, 4, 5, 5))):
        model, hop = make_codec(*kind, strides), math.prod(strides)
        for samples in (1, hop, hop + 1, 7 * hop - 1):
            frames = -(-samples // hop)
            tokens = model.encode(0.1 * noise(2, samples))
            assert tokens.shape == (2, 4, frames)
            assert model.decode(tokens).shape == model.decode(tokens[:, :2]).shape == (2, frames * hop)


def test_frame_rate_and_bitrate_follow_from_strides_and_codebooks():
    slow, fast = Codec(), Codec(strides=(2, 4, 5, 5), quantizer="rvq")
    assert (slow.hop, slow.frame_rate, fast.hop, fast.frame_rate) == (400, 40, 200, 80)
    assert round(slow.bitrate) == round(40 * 8 * math.log2(1000)) and fast.bitrate == 80 * 8 * 10


def test_windows_of_a_long_recording_give_the_tokens_of_the_whole():
    wav = 0.1 * noise(1, 25 * 16_000) * torch.linspace(-6, 6, 25 * 16_000).sin()
    for kind in FOUR:
        model = make_codec(*kind)
        assert wav.shape[1] > 2 * model.WINDOW * model.hop
        windows = model.encode(wav)
        with mock.patch.object(Codec, "WINDOW", 10 ** 6):
            whole = model.encode(wav)
        flipped = (windows != whole).any(1).float().mean()
        assert flipped <= 0.001 and len(whole.unique()) > 20, f"{kind}: {flipped:.2%} of frames"


def test_fingerprint_survives_saving_and_changes_with_the_encoder():
    one, other = Codec.load(small_codec()), Codec.load(small_codec())
    report = json.loads(small_codec().with_name("report.json").read_text())
    assert one.fingerprint == other.fingerprint == report["fingerprint"]
    next(other.decoder.parameters()).data += 0.01
    assert one.fingerprint == other.fingerprint
    next(other.encoder.parameters()).data += 0.01
    assert one.fingerprint != other.fingerprint


def test_codec_learns():
    torch.manual_seed(0)
    audio = read_audio(next(corpus().rglob("*.flac")))[None, 8000:16_000]
    model, distance, losses = Codec("mel", "fsq"), codec.MelDistance(), []
    optimiser = torch.optim.AdamW(model.parameters())
    for _ in range(25):
        losses.append(distance(audio, model(audio)[0]))
        codec.update(losses[-1], optimiser, 2e-3)
    assert losses[-1] < 0.6 * losses[0]


def test_resumed_codec_equals_an_uninterrupted_one():
    flags = ["--corpus", corpus(), "--quantizer", "rvq", "--codebooks", 2, "--codebook-size", 16,
             "--steps", 105, "--batch", 1, "--crop", 0.1]
    whole, cut = new_folder(), new_folder()
    run(codec, *flags, "--out", whole)
    with stop_after(codec, "save", 1):
        refused("disk is full", codec, *flags, "--out", cut)
    assert torch.load(cut / "codec.pt", weights_only=True)["step"] == 100
    run(codec, *flags, "--out", cut)
    assert_same_weights(weights(whole / "codec.pt"), weights(cut / "codec.pt"))
    assert (whole / "log.jsonl").read_text() == (cut / "log.jsonl").read_text()


def test_codec_steps_may_grow_and_other_flags_may_not():
    out = shutil.copytree(small_codec().parent, new_folder() / "codec")
    flags = ["--corpus", corpus(), *CODEC_FLAGS, "--out", out]
    refused("--lr", codec, *flags, "--lr", 0.1)
    refused("--steps", codec, *flags, "--steps", 4)
    assert "step 5 of 6" in run(codec, *flags, "--steps", 6)


def test_adversarial_training_of_a_finished_codec_changes_its_decoder_alone():
    out = shutil.copytree(small_codec().parent, new_folder() / "codec")
    run(codec, "--corpus", corpus(), *CODEC_FLAGS, "--adversarial", "--steps", 2, "--out", out)
    before, after = Codec.load(small_codec()), Codec.load(out / "codec.pt")
    assert before.fingerprint == after.fingerprint
    assert not torch.equal(before.decoder.head[1].weight, after.decoder.head[1].weight)
    log = read_lines(out / "log.jsonl")[-1]
    assert log["step"] == 2 and log["adversarial"] > 0 and log["features"] > 0


def test_finished_codec_survives_half_precision():
    for name, value in weights(small_codec()).items():
        if value.is_floating_point():
            assert torch.equal(value, value.half().float()), name


def test_reconstruction_is_as_long_as_the_original():
    home = new_folder()
    source = write(home / "in.wav", 0.1 * noise(12_345))
    flags = ["--out", small_codec().parent, "--reconstruct", source]
    run(codec, *flags, home / "out.wav")
    assert sf.info(home / "out.wav").frames == 12_345
    refused("ending in .wav", codec, *flags, home / "out.xyz")
    assert sorted(path.name for path in home.iterdir()) == ["in.wav", "out.wav"]


def test_codec_trains_on_a_folder_of_audio_and_names_what_it_cannot_read():
    home = new_folder()
    write(home / "audio" / "deep" / "good.ogg", 0.1 * noise(16_000))
    (home / "audio" / "bad.wav").write_text("no audio")
    printed = run(codec, "--corpus", home, "--train", "audio", *CODEC_FLAGS, "--out", home / "run")
    assert printed.count("bad.wav") == 1
    Codec.load(home / "run" / "codec.pt")


def test_crops_of_two_processes_are_those_of_one():
    files = sorted((corpus() / "train").rglob("*.flac"))
    crops = codec.Crops(files, seed=1, length=4000, batch=4)
    one, two = crops.step(3), [crops.step(3, rank, 2) for rank in (0, 1)]
    assert torch.equal(one, torch.stack(two, 1).flatten(0, 1))
    assert not torch.equal(one, crops.step(4))


def test_infinite_loss_ends_in_one_line_and_keeps_the_checkpoint():
    out = shutil.copytree(small_codec().parent, new_folder() / "codec")
    before = (out / "codec.pt").read_bytes()
    with mock.patch.dict(codec.WEIGHTS, mel=math.nan):
        refused("infinite", codec, "--corpus", corpus(), *CODEC_FLAGS, "--steps", 8, "--out", out)
    assert (out / "codec.pt").read_bytes() == before


# ----------------------------------------------------------------------------- audio and corpora

def test_any_rate_format_and_channel_count_becomes_16_khz_mono():
    home, kinds = new_folder(), [("wav", "PCM_U8", 8000, 1), ("wav", "PCM_16", 44_100, 2),
                                 ("flac", "PCM_24", 48_000, 8), ("ogg", "VORBIS", 22_050, 1)]
    for ending, subtype, rate, channels in kinds:
        tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
        path = home / f"a.{ending}"
        wav = read_audio(write(path, np.repeat(tone[:, None], channels, 1), rate, subtype=subtype))
        assert wav.dtype == torch.float32 and len(wav) == 16_000, (ending, len(wav))
        wanted = 0.5 * torch.sin(2 * math.pi * 440 * torch.arange(16_000) / 16_000)
        close(wav[500:-500], wanted[500:-500], 0.03)
    close(read_audio(write(home / "b.wav", [[0.5, 0.25]], subtype="FLOAT")), torch.tensor([0.375]))


def test_part_of_a_recording_is_read_from_where_it_was_asked():
    path = write(new_folder() / "a.wav", np.arange(16_000) / 20_000, subtype="FLOAT")
    whole = read_audio(path)
    assert torch.equal(read_audio(path, 0.25), whole[:4000])
    assert torch.equal(read_audio(path, 0.25, at=0.5), whole[6000:10_000])
    assert torch.equal(read_audio(path, 5, at=0.5), whole)


def damaged_files(home: Path) -> list[Path]:
    """A dozen files that look like audio and are none."""
    good = {ending: write(home / f"good.{ending}", 0.1 * noise(40_000)).read_bytes()
            for ending in ("wav", "flac")}
    made = {f"half.{ending}": good[ending][:len(good[ending]) // 2] for ending in good}
    made |= {"empty.wav": b"", "text.wav": b"these are words", "zeros.flac": bytes(5000),
             "random.ogg": np.random.default_rng(0).bytes(5000), "header.wav": good["wav"][:40],
             "wrong.flac": good["flac"][:3000] + bytes(3000) + good["flac"][6000:]}
    for name, data in made.items():
        (home / name).write_bytes(data)
    (home / "folder.wav").mkdir()
    write(home / "nan.wav", [0.1, math.nan], subtype="FLOAT")
    write(home / "loud.wav", [0.1, 3e8], subtype="FLOAT")
    write(home / "none.wav", [])
    write(home / "rate.wav", 0.1 * noise(1000), 48_001)
    return [home / name for name in (*made, "folder.wav", "nan.wav", "loud.wav", "none.wav",
                                     "rate.wav", "missing.wav")]


def test_damaged_audio_is_refused_in_one_line():
    for path in damaged_files(new_folder()):
        refused(path.name, read_audio, path)


def test_no_voice_and_no_sentence_is_in_two_subsets():
    home, few = new_folder(), {word: codec.LEXICON[word] for word in ("MAN", "TEN")}
    sizes, quiet = dict(train=25, dev=8, test=8), redirect_stderr(io.StringIO())
    # So few words that chance alone would repeat sentences.
    with mock.patch.object(codec, "LEXICON", few), mock.patch.dict(codec.UTTERANCES, sizes), quiet:
        codec.make_synthetic(home)
    speakers, sentences = [], []
    for subset in ("train", "dev", "test"):
        found, _ = read_subset(home, subset)
        assert len(found) == sizes[subset]
        speakers.append({item.speaker for item in found})
        sentences.append({item.text for item in found})
    for sets in (speakers, sentences):
        assert len(set.union(*sets)) == sum(map(len, sets))


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def download(home: Path, *names: str, md5: str = "") -> None:
    """Serve an archive with files of these names as train-clean-5; fetch it into home/data."""
    archive = home / "31" / "train-clean-5.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("LibriSpeech/train-clean-5/1/1/1-1-0000.flac", *names):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"data"))
    md5 = md5 or hashlib.md5(archive.read_bytes()).hexdigest()
    handler = partial(QuietHandler, directory=home)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with (mock.patch.object(codec, "OPENSLR", f"http://127.0.0.1:{server.server_port}"),
              mock.patch.dict(codec.MD5, {"train-clean-5": md5}), redirect_stderr(io.StringIO()),
              redirect_stdout(io.StringIO())):
            try:
                codec.fetch_librispeech(home / "data", "train-clean-5")
            finally:
                server.shutdown()


def test_download_is_unpacked_where_the_corpus_belongs():
    home = new_folder()
    download(home)
    assert (home / "data" / "train-clean-5" / "1" / "1" / "1-1-0000.flac").read_bytes() == b"data"
    assert [path.name for path in (home / "data").iterdir()] == ["train-clean-5"]


def test_download_with_a_wrong_checksum_is_removed():
    home = new_folder()
    refused("checksum", partial(download, home, md5="0" * 32))
    assert not [path for path in (home / "data").rglob("*") if path.is_file()]


def test_archive_that_leads_outside_writes_nothing_there():
    home = new_folder()
    try:
        download(home, "../../evil.txt")
    except (ValueError, OSError, tarfile.TarError):
        pass
    assert not list(home.rglob("evil.txt"))
    assert not list(Path(SCRATCH.name).glob("evil.txt"))


def manifest(home: Path, rows: list[dict], subset="train") -> Path:
    (home / f"{subset}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def test_librispeech_layout_pairs_each_file_with_its_own_transcript():
    chapter = new_folder() / "train" / "7" / "1"
    for name in ("7-1-0", "7-1-1", "7-1-2"):
        write(chapter / f"{name}.wav", 0.1 * noise(8000))
    (chapter / "7-1.trans.txt").write_bytes(
        "\ufeff7-1-0 HELLO  THERE\r\n7-1-1\r\n7-1-9 LOST\r\n".encode())
    found, skipped = read_subset(chapter.parents[2], "train")
    assert [(item.id, item.text, item.speaker, item.duration) for item in found] == [
        ("7-1-0", "HELLO THERE", "7", 0.5)]
    for name in ("7-1-1", "7-1-2", "7-1-9"):
        assert sum(name in line for line in skipped) == 1, (name, skipped)


def test_manifest_gives_text_language_and_speaker_and_names_bad_rows():
    home = new_folder()
    write(home / "audio" / "one.wav", 0.1 * noise(8000))
    row = {"audio_filepath": "audio/one.wav", "text": "GRÜN", "lang": "de", "speaker": "anna"}
    bad = [{"text": "NO PATH"}, {"audio_filepath": "lost.wav", "text": "LOST"},
           row | {"text": 7}, row | {"text": " "}, row | {"offset": 1.0, "duration": 0.1}]
    found, skipped = read_subset(manifest(home, [row, *bad]), "train")
    assert [(item.text, item.lang, item.speaker) for item in found] == [("GRÜN", "de", "anna")]
    assert len(skipped) == len(bad)


def test_manifest_cannot_lead_out_of_the_output():
    home = new_folder()
    for name in ("../beside.wav", "a/../../up.wav", "x" * 200 + ".wav"):
        write(home / "corpus" / "a" / ".." / name, 0.1 * noise(4000))
    rows = [{"audio_filepath": name, "text": "HELLO"} for name in
            ("../beside.wav", "a/../../up.wav", f"{home}/beside.wav", "x" * 200 + ".wav")]
    manifest(home / "corpus", rows)
    before = set(home.rglob("*"))
    tokenize(home / "out", "--features", "mel", source=home / "corpus")
    made = set(home.rglob("*")) - before
    assert all((home / "out") in (path, *path.parents) for path in made)
    assert len(list((home / "out" / "train").glob("*.npy"))) == 4


def test_ml_superb_layout_gives_the_language():
    home = new_folder()
    write(home / "one" / "deu" / "wav" / "a.wav", 0.1 * noise(8000))
    lists = home / "one" / "deu" / "transcript_10min_train.txt"
    lists.write_text("a 0.5 GUTEN TAG\nb 0.5 KEIN TON\n../a 0.5 HINAUS\nkurz\n")
    found, skipped = read_subset(home, "10min_train")
    assert [(item.id, item.text, item.lang) for item in found] == [("a", "GUTEN TAG", "deu")]
    assert len(skipped) == 3


def test_several_corpora_are_read_as_one():
    home = new_folder()
    write(home / "one.wav", 0.1 * noise(8000))
    manifest(home, [{"audio_filepath": "one.wav", "text": "HELLO"}])
    run(tokenize_corpus, "--corpus", corpus(), home, "--features", "mel", "--workers", 0,
        "--out", home / "out")
    texts = [row["text"] for row in read_lines(home / "out" / "train.jsonl")]
    assert len(texts) == 9 and "HELLO" in texts


# -------------------------------------------------------------------------------------- tokenising

def test_token_folder_holds_what_the_recogniser_needs():
    model, meta = Codec.load(small_codec()), train_asr.read_meta(small_tokens())
    wanted = dict(codec=model.fingerprint, hop=400, sample_rate=16_000, codebooks=4,
                  codebook_size=1000, dim=16, train=["train"], dev=["dev"], test=["test"])
    assert {name: meta[name] for name in wanted} == wanted
    books = np.load(small_tokens() / "codebooks.npy")
    assert books.dtype == np.float32 and np.array_equal(books, model.quantizer.codebooks())
    for subset, size in (("train", 8), ("dev", 3), ("test", 3)):
        rows = read_lines(small_tokens() / f"{subset}.jsonl")
        assert len(rows) == size
        for row in rows:
            wav, array = read_audio(row["audio"]), np.load(small_tokens() / row["array"])
            assert array.dtype == np.int16 and np.array_equal(array.T, model.encode(wav[None])[0])
            assert row["frames"] == len(array) and row["duration"] == round(len(wav) / 16_000, 3)
            assert row["text"] and row["speaker"] in row["id"] and row["lang"] == ""


def test_float_features_lie_in_the_same_layout():
    for features, hop, dim in (("mel", 400, 80), ("mel", 160, 80), ("latent", 400, 16)):
        out = new_folder()
        tokenize(out, "--features", features, "--hop", hop)
        row = read_lines(out / "train.jsonl")[0]
        array = np.load(out / row["array"])
        frames = -(-sf.info(row["audio"]).frames // hop)
        assert array.dtype == np.float16 and array.shape == (frames, dim)
        assert np.isfinite(array).all()


def test_copies_are_made_of_the_training_subsets_alone():
    out = new_folder()
    tokenize(out, "--features", "mel", "--speeds", 0.5, "--noise", "white", "--copies", 2)
    rows = read_lines(out / "train.jsonl")
    names = [row["id"] for row in rows if "copy_of" not in row]
    assert len(names) == 8 and len(rows) == 4 * 8
    for name in names:
        original, slow, *noisy = (row for row in rows if row["id"].startswith(name))
        assert slow["copy_of"] == name and not slow["noisy"]
        assert abs(slow["frames"] - 2 * original["frames"]) <= 1
        arrays = [np.load(out / row["array"]) for row in (original, *noisy)]
        assert [row["noisy"] for row in noisy] == [True, True]
        assert len({array.tobytes() for array in arrays}) == 3
    assert len(read_lines(out / "dev.jsonl")) == 3


def make_noise(kind: str, seed=0) -> Noise:
    return Noise([kind], [7.0, 7.0], read_subset(corpus(), "train")[0], seed)


def test_noise_has_the_ratio_asked_for():
    wav, item = 0.1 * noise(20_000), Utterance("a", "", "", "", Path("a.wav"))
    for kind in ("white", "pink", "babble", str(corpus() / "dev")):
        added = make_noise(kind)(wav, item) - wav
        snr = 10 * math.log10(wav.square().mean() / added.square().mean())
        assert abs(snr - 7) < 0.01, (kind, snr)


def test_noise_follows_from_seed_and_id_alone():
    wav, item = 0.1 * noise(20_000), Utterance("a", "", "", "", Path("a.wav"))
    for kind in ("white", "pink", "babble"):
        made = make_noise(kind)(wav, item)
        assert torch.equal(made, make_noise(kind)(wav, item))
        assert not torch.equal(made, make_noise(kind, seed=1)(wav, item))
        assert not torch.equal(made, make_noise(kind)(wav, item._replace(id="b")))


def test_silence_gives_no_nan():
    home = new_folder()
    write(home / "silent.wav", np.zeros(8000))
    manifest(home, [{"audio_filepath": "silent.wav", "text": "NOTHING"}])
    for features in ("mel", "latent"):
        out = home / features
        tokenize(out, "--features", features, "--noise", "pink", "--speeds", 0.9, source=home)
        assert all(np.isfinite(np.load(path)).all() for path in (out / "train").iterdir())


def test_interrupted_tokenising_continues():
    out = new_folder()
    with stop_after(tokenize_corpus, "save_array", 5):
        refused("disk is full", tokenize, out)
    before = {path: path.stat().st_mtime_ns for path in (out / "train").glob("*.npy")}
    assert len(before) == 4 and not (out / "train.jsonl").exists()
    tokenize(out)
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    for row in read_lines(small_tokens() / "train.jsonl"):
        assert np.array_equal(np.load(out / row["array"]), np.load(small_tokens() / row["array"]))


def test_tokens_of_another_codec_corpus_or_noise_do_not_mix():
    other = new_folder()
    run(codec, "--corpus", corpus(), *CODEC_FLAGS, "--seed", 1, "--steps", 1, "--out", other)
    copied = shutil.copytree(corpus(), new_folder() / "corpus")
    for name, flags in (("codec", ["--codec", other / "codec.pt"]), ("noise", ["--noise", "pink"]),
                        ("corpus", ["--corpus", copied]), ("seed", ["--seed", 1]),
                        ("snr", ["--snr", 1, 2]), ("features", ["--features", "mel"])):
        refused(f"holds tokens with {name}", tokenize, small_tokens(), *flags)


def test_unreadable_audio_is_named_and_the_work_goes_on():
    home = new_folder()
    bad = damaged_files(home)
    rows = [{"audio_filepath": path.name, "text": "HELLO"} for path in (*bad, home / "good.wav")]
    tokenize(home / "out", "--features", "mel", source=manifest(home, rows))
    skipped = (home / "out" / "train.skipped.txt").read_text()
    assert all(path.name in skipped for path in bad), skipped
    assert [row["id"] for row in read_lines(home / "out" / "train.jsonl")] == ["good"]


class FakeEncodec(torch.nn.Module):
    """EncodecModel's interface: 32 codebooks at 75 Hz."""
    sample_rate, encoder = 24_000, SimpleNamespace(ratios=[8, 5, 4, 2])

    def __init__(self):
        super().__init__()
        books = [SimpleNamespace(embed=noise(1024, 128, seed=n)) for n in range(32)]
        layers = [SimpleNamespace(_codebook=book) for book in books]
        self.quantizer = SimpleNamespace(vq=SimpleNamespace(layers=layers))

    def set_target_bandwidth(self, kbit):
        self.codebooks = {6.0: 8}[kbit]

    def encode(self, wav):
        frames = -(-wav.shape[2] // 320)
        return [(torch.full((1, self.codebooks, frames), 1023), None)]


def test_encodec_gives_tokens_in_our_layout():
    with mock.patch.object(tokenize_corpus, "Encodec", partial(Encodec, model=FakeEncodec())):
        front_end = FrontEnd("tokens", "encodec", 400, "cpu")
    array = front_end(0.1 * noise(16_000))
    assert array.shape == (75, 8) and array.dtype == np.int16
    assert front_end.meta["hop"] == 320 and front_end.meta["sample_rate"] == 24_000
    assert front_end.quantizer.codebooks().shape == (8, 1024, 128)


# -------------------------------------------------------------------------------------- recogniser

def make_asr(**more) -> CodecASR:
    torch.manual_seed(0)
    sizes = dict(num_codebooks=3, codebook_size=20, dim=8, size="tiny", dropout=0.0)
    return CodecASR(12, **sizes | more).eval()


def make_tokens(*shape) -> torch.Tensor:
    return torch.randint(20, shape, generator=torch.Generator().manual_seed(0))


def test_batched_log_probs_equal_single():
    token_len = torch.tensor([41, 1, 2, 7, 30])
    kinds = [dict(), dict(aggregate="stack"), dict(num_codebooks=0)]
    for kind, subsampling in itertools.product(kinds, (1, 2, 4)):
        model = make_asr(subsampling=subsampling, **kind)
        tokens = make_tokens(5, 41, 3) if model.num_codebooks else noise(5, 41, 8)
        with torch.inference_mode():
            log_probs, out_len = model(tokens, token_len)
            for i, n in enumerate(token_len):
                alone, length = model(tokens[i:i + 1, :n], token_len[i:i + 1])
                assert out_len[i] == length == alone.shape[1] == -(-n // subsampling)
                close(log_probs[i, :out_len[i]], alone[0])


def test_padding_does_not_affect_the_result():
    tokens, token_len = make_tokens(1, 41, 3), torch.tensor([25])
    for subsampling in (1, 2, 4):
        model = make_asr(subsampling=subsampling)
        one, out_len = model(tokens, token_len)
        tokens[:, 25:] = 19 - tokens[:, 25:]
        close(one[:, :out_len[0]], model(tokens, token_len)[0][:, :out_len[0]])


def test_embedding_starts_as_the_quantised_latent():
    for quantizer in (make_rvq(), GroupFSQ(4)):
        tokens = quantizer.encode(make_latent())
        frames = tokens.transpose(1, 2)                                 # (B, T, Q)
        for aggregate, scale, used in (("sum", 1, 4), ("mean", 4, 4), ("sum", 1, 2)):
            model = make_asr(num_codebooks=used, codebook_size=quantizer.codebook_size, dim=16,
                             aggregate=aggregate)
            model.start_from(quantizer.codebooks(), frames[..., :used].flatten(0, 1))
            emb = model.embed(frames[..., :used], torch.tensor([60] * 4))
            emb = scale * (emb * model.deviation + model.mean)          # undo the normalisation
            close(emb.transpose(1, 2), quantizer.decode(tokens[:, :used]), 1e-4)


def test_stacked_embedding_holds_the_rows_side_by_side():
    model, books = make_asr(aggregate="stack"), noise(3, 20, 8)
    tokens = make_tokens(1, 30, 3)
    model.start_from(books, tokens[0])
    emb = model.embed(tokens, torch.tensor([30])) * model.deviation + model.mean
    close(emb[0], torch.cat([book[index] for book, index in zip(books, tokens[0].T)], 1))


def test_evaluation_is_never_augmented():
    model, tokens, token_len = make_asr(), make_tokens(2, 50, 3), torch.tensor([50, 20])
    plain = model(tokens, token_len)[0]
    model.augment = Augment(4, 2, 2, replace=0.5, noisy_embedding=1.0)
    assert torch.equal(model(tokens, token_len)[0], plain)
    assert not torch.allclose(model.train()(tokens, token_len)[0], plain, atol=1e-3)


def test_masks_hide_spans_within_the_utterance():
    torch.manual_seed(0)
    lengths = torch.tensor([100] * 50 + [20] * 50)
    spans = Augment().spans(120, lengths, 3, 0.25)                      # (B, 3, T)
    width = spans.sum(2)
    assert (width <= 0.25 * lengths[:, None] + 1).all() and width[:50].max() > 15
    assert not spans[50:, :, 20:].any()
    assert spans[:50].flatten(0, 1).any(0)[2:98].all()                  # no place is spared


def test_codebook_masks_hide_single_codebooks_and_time_masks_all_dimensions():
    torch.manual_seed(0)
    tokens, token_len = make_tokens(20, 200, 4), torch.full((20,), 200)
    hidden = Augment(codebook_masks=1).visible(tokens, token_len) == 0
    assert (hidden.any(1).sum(1) <= 1).all() and 0.1 < hidden.float().mean() * 4 < 0.4
    emb = Augment(time_masks=4).hide(torch.ones(20, 200, 8), token_len)
    assert (emb.amax(2) == emb.amin(2)).all() and 0.02 < (emb == 0).float().mean() < 0.2
    emb = Augment(feature_masks=1).hide(torch.ones(20, 200, 8), token_len)
    assert (emb.amax(1) == emb.amin(1)).all() and 0.02 < (emb == 0).float().mean() < 0.33


def test_replaced_codes_and_embedding_noise_have_the_share_asked_for():
    torch.manual_seed(0)
    changed = Augment(replace=0.3).replace_codes(torch.zeros(4, 1000, 8).long(), 1000)
    assert abs((changed != 0).float().mean() - 0.3) < 0.02
    emb = Augment(noisy_embedding=0.3).hide(torch.zeros(4, 1000, 8), torch.full((4,), 1000))
    assert abs(emb.std() - 0.3) < 0.01 and abs(emb.mean()) < 0.01


def test_strength_0_changes_nothing():
    augment = Augment(4, 2, 2, replace=0.5, noisy_embedding=1.0, strength=0.0)
    tokens, emb, token_len = make_tokens(2, 50, 3), noise(2, 50, 8), torch.tensor([50, 20])
    assert torch.equal(augment.replace_codes(tokens, 20), tokens)
    assert augment.visible(tokens, token_len).all()
    assert torch.equal(augment.hide(emb, token_len), emb)


def test_curriculum_ramps_from_0_to_1():
    args = train_asr.parse(["--curriculum", "100"])
    assert [train_asr.ramp(step, args) for step in (0, 50, 100, 200)] == [0, 0.5, 1, 1]
    assert train_asr.ramp(0, train_asr.parse([])) == 1


# ---------------------------------------------------------------------------------------- training

def test_text_units_give_the_text_back():
    lines = ["NINE MEN", "ÜBER DEN FLUß", "מים ומלח", "TEN HENS SEE"]
    rows = [{"text": line, "lang": f"l{i}"} for i, line in enumerate(lines)]
    for units in ("char", "unigram", "bpe"):
        text = Text.train(rows, units, 40, True)
        for row in rows:
            ids = text.encode(f"<{row['lang']}> {row['text']}")
            path = [unit for i in ids for unit in (i, 0)]
            found = text.greedy(torch.eye(len(text))[path][None], torch.tensor([len(path)]))[0]
            assert train_asr.split_language(found) == (row["lang"], row["text"]), found


def test_greedy_decoding_merges_repeats_drops_blanks_and_ignores_padding():
    text = Text.train([{"text": "NINE MEN", "lang": ""}], "char", 0, False)
    n, e = (text.units.piece_to_id(letter) for letter in "NE")
    path = torch.tensor([[n, n, 0, e, 0, e, e, n, e]])
    assert text.greedy(torch.eye(len(text))[path], torch.tensor([7])) == ["NEE"]


def test_utterance_too_short_for_ctc_is_dropped_and_counted():
    texts = {"train": ["MEN", "SEE", "MAN"], "dev": ["MEN"]}    # EE needs a blank between
    home = letter_tokens(new_folder(), texts, frames=1)
    data = train_set(home)
    used = [data.rows[i]["text"] for group in data.epoch(0, 1.0) for i in group]
    assert sorted(used) == ["MAN", "MEN"] and "dropped: 1 utterances" in data.notes
    refused("nothing to train on", train_set, home, "--subsampling", 2)


def test_recogniser_learns_to_read():
    log = read_lines(letter_asr().with_name("log.jsonl"))
    assert log[-1]["loss"] < 0.1 * log[0]["loss"]
    assert log[-1]["dev_cer"] < 0.05, log[-1]


def test_embedding_flags_do_what_they_say():
    books, tables = torch.from_numpy(np.load(letters() / "codebooks.npy")), {}
    for kind in ("codebook", "random", "frozen"):
        out = new_folder()
        run(train_asr, "--tokens", letters(), "--embedding", kind, "--epochs", 1, "--out", out)
        tables[kind] = weights(out / "asr.pt")["embedding.tables"]
    assert torch.equal(tables["frozen"], books.flatten(0, 1))
    assert tables["codebook"].shape == (64, 8)
    assert 0 < (tables["codebook"] - books.flatten(0, 1)).abs().max() < 0.1
    assert tables["random"].shape == (64, 128)


def test_first_codebooks_alone_train_a_recogniser():
    assert weights(small_asr())["embedding.tables"].shape == (3000, 16)
    data = train_set(small_tokens(), "--codebooks", 3)
    whole = np.load(small_tokens() / data.rows[0]["array"])
    assert np.array_equal(data.take([0], CPU)[0][0], whole[:, :3])
    refused("--codebooks 3", train_asr, "--tokens", letters(), "--codebooks", 3)


def test_batches_hold_every_utterance_once_within_the_bound():
    data = train_set(letters(), "--batch", 5)                           # 200 frames
    for rng in (None, np.random.default_rng(0)):
        groups = data.batches(range(30), 200, rng)
        assert sorted(i for group in groups for i in group) == list(range(30))
        for group in groups:
            tokens, token_len = data.take(group, CPU)
            assert tokens.shape[0] * tokens.shape[1] <= 200
            assert token_len.tolist() == [data.rows[i]["frames"] for i in group]


def test_an_epoch_takes_one_variant_of_each_utterance():
    copies = [("slow", False), ("noise0", True), ("noise1", True)]
    data = train_set(letter_tokens(new_folder(), {"train": WORDS}, copies=copies))
    noisy = []
    for number in range(100):
        rows = [data.rows[i] for group in data.epoch(number, 1.0) for i in group]
        assert sorted(row["text"] for row in rows) == sorted(WORDS)
        noisy += [row.get("noisy", False) for row in rows]
    assert abs(np.mean(noisy) - train_asr.NOISY_SHARE) < 0.06
    early = [data.rows[i].get("noisy", False) for group in data.epoch(0, 0.0) for i in group]
    assert not any(early)                           # the curriculum begins with clean speech
    assert len(TokenSet(data_folder := letters(), ["dev"]).rows) == 5 and data_folder


def test_muons_steps_are_nearly_orthogonal():
    for shape in ((40, 40), (20, 60), (60, 20)):
        values = torch.linalg.svdvals(orthogonal(noise(*shape)))
        assert 0.4 < values.min() and values.max() < 1.4, values


def test_resumed_recogniser_equals_an_uninterrupted_one():
    whole, cut = new_folder(), new_folder()
    flags = ["--tokens", letters(), "--epochs", 3, "--batch", 10, "--replace", 0.1,
             "--noisy-embedding", 0.3, "--curriculum", 5]
    run(train_asr, *flags, "--out", whole)
    with stop_after(train_asr, "save", 1):
        refused("disk is full", train_asr, *flags, "--out", cut)
    assert torch.load(cut / "asr.pt", weights_only=True)["epoch"] == 1
    run(train_asr, *flags, "--out", cut)
    for name in ("model", "last"):
        assert_same_weights(weights(whole / "asr.pt", name), weights(cut / "asr.pt", name))
    logs = [[row["loss"] for row in read_lines(out / "log.jsonl")] for out in (whole, cut)]
    assert logs[0] == logs[1] and len(logs[0]) == 3


def test_epochs_may_grow_and_other_flags_and_tokens_may_not_change():
    out = shutil.copytree(small_asr().parent, new_folder() / "asr")
    flags = ["--tokens", small_tokens(), "--codebooks", 3, "--out", out]
    refused("--lr", train_asr, *flags, "--epochs", 1, "--lr", 0.1)
    refused("--seed", train_asr, *flags, "--epochs", 1, "--seed", 1)
    refused("--codebooks", train_asr, *flags, "--epochs", 1, "--codebooks", 2)
    refused("trained", train_asr, "--tokens", letters(), *flags[2:], "--epochs", 1)
    assert "epoch 1 of 2" in run(train_asr, *flags, "--epochs", 2)
    refused("--epochs", train_asr, *flags, "--epochs", 1)


def test_language_tokens_need_languages():
    refused("no language", train_asr, "--tokens", letters(), "--lang-token", "--out", new_folder())


# -------------------------------------------------------------------------------- several processes

SCRIPT = """
import os, sys, torch, codec, tokenize_corpus, train_asr
corpus, trained, letters, out = sys.argv[1:]
dist, start = torch.distributed, torch.distributed.init_process_group
dist.init_process_group = lambda *args, **more: dist.is_initialized() or start(*args, **more)
dist.destroy_process_group = lambda: None       # three stages in one process

class Kept(codec.Codec):
    made = []
    def __init__(self, *arguments):
        super().__init__(*arguments)
        Kept.made.append(self)

codec.Codec, train_asr.fast_dtype = Kept, lambda device: torch.float32
codec.ResidualVQ.decay = codec.ResidualVQ.dead_below = 0.5      # codes die within three steps
codec.main(["--corpus", corpus, "--quantizer", "rvq", "--codebooks", "2", "--codebook-size", "32",
            "--steps", "3", "--batch", "4", "--device", "cpu", "--out", out + "/codec"])
torch.save(Kept.made[0].quantizer.state_dict(), out + f"/books{os.environ['RANK']}.pt")
tokenize_corpus.main(["--corpus", corpus, "--codec", trained, "--workers", "0",
                      "--device", "cpu", "--out", out + "/tokens"])
train_asr.main(["--tokens", letters, "--epochs", "2", "--batch", "20", "--dropout", "0",
                "--time-masks", "0", "--codebook-masks", "0", "--feature-masks", "0",
                "--device", "cpu", "--out", out + "/asr"])
"""


@cache
def two_processes() -> Path:
    """The first three stages under torchrun -> the folder of their outputs."""
    out = new_folder()
    (out / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               out / "script.py", corpus(), small_codec(), letters(), out]
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_two_processes_keep_the_same_codebooks():
    one, other = (torch.load(two_processes() / f"books{rank}.pt") for rank in (0, 1))
    assert_same_weights(one, other)


def test_two_processes_write_the_tokens_of_one():
    for subset in ("train", "dev", "test"):
        rows = read_lines(small_tokens() / f"{subset}.jsonl")
        assert rows == read_lines(two_processes() / "tokens" / f"{subset}.jsonl")
        for row in rows:
            arrays = [np.load(out / row["array"])
                      for out in (small_tokens(), two_processes() / "tokens")]
            assert np.array_equal(*arrays)


def test_two_processes_learn_what_one_learns():
    out, flags = new_folder(), ["--epochs", 2, "--batch", 20, *NO_MASKS]
    with mock.patch.object(train_asr, "fast_dtype", lambda device: torch.float32):
        run(train_asr, "--tokens", letters(), *flags, "--out", out)
    logs = [read_lines(path / "log.jsonl") for path in (out, two_processes() / "asr")]
    for one, two in zip(*logs):
        assert abs(one["loss"] - two["loss"]) < 1e-4 * one["loss"], (one, two)


# -------------------------------------------------------------------------------------- evaluation

def make_rows(refs: list[str], speakers=4, lang="") -> list[dict]:
    return [{"text": ref, "speaker": f"s{i % speakers}", "lang": lang}
            for i, ref in enumerate(refs)]


def test_error_rates_are_those_of_jiwer():
    refs = ["THE CAT SAT", "A DOG", "SO", "NOTHING"]
    hyps = ["THE CAT SAT DOWN", "A", "GO", ""]
    summary = Score(make_rows(refs), hyps).summary(0)
    assert math.isclose(summary["wer"], jiwer.wer(refs, hyps))
    assert math.isclose(summary["cer"], jiwer.cer(refs, hyps))
    assert summary["by_speaker"]["s0"] == [1, 3, 5, 11]
    assert Score(make_rows(refs), refs).summary(0)["wer_interval"] == [0, 0]


def test_languages_are_scored_apart():
    rows = make_rows(["ONE"], lang="en") + make_rows(["DOS"], lang="es")
    summary = Score(rows, ["<en> ONE", "<en> DAS"]).summary(0)
    assert summary["cer_by_language"] == {"en": 0, "es": 1 / 3}
    assert summary["languages_named_right"] == 0.5


def test_interval_is_wider_where_errors_come_by_speaker():
    refs, widths = ["ABCDEFGHIJ"] * 300, []
    rows = make_rows(refs, speakers=10)
    for bad in ([i % 10 < 3 for i in range(300)], [i % 10 < 3 for i in np.arange(300) // 10 % 10]):
        summary = Score(rows, ["ABCDE" if b else "ABCDEFGHIJ" for b in bad]).summary(0)
        low, high = summary["cer_interval"]
        assert low < summary["cer"] < high or not widths == []
        widths.append(high - low)
    assert widths[0] > 5 * widths[1]


def test_run_does_not_differ_from_itself_and_a_worse_one_does():
    refs = ["ABCDEFGHIJ"] * 40
    score, worse = Score(make_rows(refs), refs), Score(make_rows(refs), ["ABCDEFGHI"] * 40)
    assert evaluate.difference(score, score, 0) == [0, 0]
    assert evaluate.difference(worse, score, 0)[0] > 0.05


def evaluate_small(*flags) -> Path:
    out = new_folder()
    run(evaluate, "--asr", small_asr(), "--out", out, *flags)
    return out


def test_report_has_a_row_for_each_subset_and_noise():
    out = evaluate_small("--test", "test", "dev", "--noise", "white", "--snr", 10, 0)
    report = json.loads((out / "report.json").read_text())
    assert report["command"] and report["commit"] and report["machine"]
    names = ["test", "test, white 10 dB", "test, white 0 dB",
             "dev", "dev, white 10 dB", "dev, white 0 dB"]
    assert list(report["test"]) == names
    for name in names:
        assert report["test"][name]["utterances"] == 3
        assert f"| {name} | 3 |" in (out / "report.md").read_text()


def test_noise_is_added_to_audio_that_is_encoded_anew():
    recogniser, data = load_recogniser(small_asr()), TokenSet(small_tokens(), ["test"], 3)
    tokens, _ = data.take([0, 1, 2], CPU)
    for snr, least, most in ((300.0, 0.0, 0.0), (0.0, 0.2, 1.0)):
        noisy = evaluate.degrade(recogniser.front_end(None), data, "white", snr, 0)
        share = (noisy.take([0, 1, 2], CPU)[0] != tokens).float().mean()
        assert least <= share <= most


def test_comparison_holds_every_run_and_where_it_is_from():
    out = evaluate_small("--compare", small_asr().parent, small_asr().parent)
    report = json.loads((out / "compare.json").read_text())
    assert report["commit"] and "command" in report and "machine" in report
    (run_report,) = report["runs"].values()
    assert run_report["test"]["test"]["cer_minus_first"] == [0, 0]
    assert run_report["test"]["test"]["by_speaker"] and run_report["flags"]["codebooks"] == 3
    assert run_report["bitrate"] == 0.75 * Codec.load(small_codec()).bitrate


def test_mutual_information_of_equals_is_entropy_and_of_strangers_is_nothing():
    labels = np.arange(8).repeat(100)
    assert math.isclose(evaluate.mutual_information(labels, labels), 3)
    assert abs(evaluate.mutual_information(labels, np.arange(800) % 4)) < 1e-9


def test_content_finds_the_codebook_that_spells():
    out = new_folder()
    run(evaluate, "--asr", letter_asr(), "--content", "--out", out)
    shares = json.loads((out / "content.json").read_text())["shares"]["character"]
    assert shares["0"] > 0.6 and shares["1"] < 0.1, shares


def test_alignment_gives_each_frame_the_nearest_unit():
    path = torch.tensor([0, 0, 5, 0, 0, 0, 3, 3, 0])
    log_probs = (10 * torch.eye(8)[path]).log_softmax(-1)[None]
    assert evaluate.align(log_probs, [5, 3]).tolist() == [5, 5, 5, 5, 5, 3, 3, 3, 3]


def test_transcription_is_what_the_tokens_give():
    data = TokenSet(small_tokens(), ["test"], 3)
    hyps = load_recogniser(small_asr()).recognise(data)
    bad = new_folder() / "bad.wav"
    bad.write_text("no audio")
    files = [row["audio"] for row in data.rows]
    printed = run(evaluate, "--asr", small_asr(), "--audio", bad, *files)
    assert "skipped" in printed and "bad.wav" in printed
    for file, hyp in zip(files, hyps):
        assert f"{file}: {hyp}\n" in printed
    refused("none of the files", evaluate, "--asr", small_asr(), "--audio", bad)


def test_windows_of_a_long_recording_read_every_frame_once():
    recogniser = load_recogniser(letter_asr())
    for subsampling in (1, 2):
        recogniser.flags |= {"subsampling": subsampling}
        model = train_asr.build_model(recogniser.flags, recogniser.meta, len(recogniser.text))
        for block in model.blocks:      # without attention, a frame depends on its neighbours alone
            torch.nn.init.zeros_(block.attention.out.weight)
        recogniser.model = model.eval()
        for frames in (1, 799, 1601, 2000):
            tokens = make_tokens(1, frames, 2)
            found = recogniser.log_probs(tokens[0].numpy())
            with torch.inference_mode():
                whole, _ = model(tokens, torch.tensor([frames]))
            close(found, whole, 1e-4)


ARPA = """\\data\\
ngram 1=4

\\1-grams:
-1.0\t<s>
-1.0\t</s>
-1.0\t<unk>
-0.5\tCAT

\\end\\
"""


def test_beam_search_finds_the_words_of_the_language_model():
    if not importlib.util.find_spec("flashlight"):
        return
    path = new_folder() / "lm.arpa"
    path.write_text(ARPA)
    text = load_recogniser(letter_asr()).text
    right, wrong = (torch.tensor(text.encode(word)) for word in ("CAT", "CAE"))
    log_probs = (torch.eye(len(text))[right] + 1.1 * torch.eye(len(text))[wrong]).log_softmax(-1)
    length = torch.tensor([len(right)])
    args = Namespace(lm=str(path), beam=10, lm_weight=1.0, word_score=0.0)
    assert text.greedy(log_probs[None], length) == ["CAE"]
    assert evaluate.beam_search(text, args)(log_probs[None], length) == ["CAT"]
    path.write_text("no language model")
    refused("ARPA", evaluate.beam_search, text, args)


def test_pictures_are_drawn_where_matplotlib_is():
    if not importlib.util.find_spec("matplotlib"):
        return
    drawn = set()
    for flags in (["--noise", "white", "--snr", 10], ["--content"],
                  ["--compare", small_asr().parent]):
        out = evaluate_small("--plots", *flags)
        drawn |= {path.name for path in out.glob("*.png") if path.stat().st_size > 5000}
    assert drawn == {"utterance.png", "noise.png", "content.png", "compare.png"}


# ------------------------------------------------------------------------------------------ errors

class Evil:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_loading_never_runs_a_strangers_code():
    home = new_folder()
    evil, trap = Evil(home / "ran"), home / "trap.pt"
    for kind, load in (("codec", Codec.load), ("asr", train_asr.load_checkpoint)):
        torch.save({"kind": kind, "config": evil}, trap)
        refused("damaged", load, trap)
        trap.write_bytes(pickle.dumps({"kind": kind, "config": evil}))
        refused("damaged", load, trap)
    tokens = shutil.copytree(letters(), home / "tokens")
    np.save(tokens / "train" / "0.npy", np.array([evil], object), allow_pickle=True)
    try:
        TokenSet(tokens, ["train"])
    except ValueError:
        pass
    assert not (home / "ran").exists()


def test_damaged_and_mistaken_checkpoints_are_refused_in_one_line():
    path = new_folder() / "codec.pt"
    refused("no such file", Codec.load, path)
    path.write_bytes(small_codec().read_bytes()[:5000])
    refused("damaged", Codec.load, path)
    refused("kind asr", Codec.load, small_asr())
    refused("kind codec", train_asr.load_checkpoint, small_codec())


def test_scripts_end_bad_input_with_one_line_and_write_nothing():
    home = new_folder()
    (home / "empty" / "train").mkdir(parents=True)
    lost, out = home / "nowhere", home / "out"
    for stage, what, *flags in (
            (codec, "nowhere", "--corpus", lost),
            (codec, "no subset lost", "--corpus", corpus(), "--train", "lost"),
            (codec, "no audio", "--corpus", home / "empty"),
            (codec, "no such file", "--reconstruct", lost, home / "out.wav"),
            (tokenize_corpus, "nowhere", "--corpus", lost, "--features", "mel"),
            (tokenize_corpus, "nowhere", "--corpus", corpus(), "--codec", lost),
            (tokenize_corpus, "--noise wihte", "--corpus", corpus(), "--features", "mel",
             "--noise", "wihte"),
            (train_asr, "tokenize_corpus.py", "--tokens", lost),
            (evaluate, "nowhere", "--asr", lost),
            (evaluate, "nowhere", "--asr", small_asr(), "--tokens", lost),
            (evaluate, "codec", "--asr", small_asr(), "--tokens", letters()),
            (evaluate, "tset", "--asr", small_asr(), "--test", "tset")):
        refused(what, stage, *flags, "--out", out)
    assert not (home / "out.wav").exists() and not list(out.rglob("*.pt"))


def test_codec_of_other_tokens_is_refused():
    other = new_folder()
    run(codec, "--corpus", corpus(), *CODEC_FLAGS, "--seed", 2, "--steps", 1, "--out", other)
    refused("was trained on codec", evaluate, "--asr", small_asr(), "--codec",
            other / "codec.pt", "--audio", next(corpus().rglob("*.flac")))


def test_scripts_print_errors_without_a_traceback():
    scripts = [["codec.py", "--corpus"], ["tokenize_corpus.py", "--codec"],
               ["train_asr.py", "--tokens"], ["evaluate.py", "--asr"]]
    flags = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, HERE / name, flag, "nowhere"],
                                cwd=corpus().parent, **flags) for name, flag in scripts]
    for (name, _), process in zip(scripts, running):
        message = process.communicate()[1]
        assert process.returncode == 1 and message.startswith("error: "), (name, message)
        assert "nowhere" in message and message.count("\n") == 1, (name, message)


def main() -> int:
    """Run the tests, or those whose names contain an argument -> how many failed."""
    names = [name for name in globals() if name.startswith("test_")]
    wanted = [name for name in names
              if not sys.argv[1:] or any(part in name for part in sys.argv[1:])]
    failed = 0
    for name in wanted:
        began, result = time.time(), "ok"
        try:
            globals()[name]()
        except Exception:
            traceback.print_exc(file=sys.stdout)
            result, failed = "FAILED", failed + 1
        print(f"{result:6} {time.time() - began:5.1f} s  {name}", flush=True)
    print(f"{len(wanted) - failed} passed, {failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
