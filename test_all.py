"""The promises of this project, one test each, on small audio that the tests make themselves.

    python test_all.py                  # all, about a minute on two CPU cores
    python test_all.py noise resume     # those with one of these words in their names

pytest runs them, too. The last line counts: "N passed, M failed".
All files go into a temporary folder.
"""

import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jiwer
import numpy as np
import soundfile as sf
import torch
from sentencepiece import SentencePieceProcessor

import codec
import evaluate
import tokenize_corpus
import train_asr
from asr_model import Augment, CodecASR
from codec import Codec, read_audio
from evaluate import Recognizer, Score
from quantizers import GroupFSQ, ResidualVQ, usage_and_perplexity
from results import study
from tokenize_corpus import Noise, Utterance
from train_asr import TokenSet, TrainSet

SCRATCH = tempfile.TemporaryDirectory()     # removed when Python ends
FOUR = list(product(("mel", "time"), ("fsq", "rvq")))
torch.set_num_threads(1)                    # the models are so small that threads slow them down


# ----------------------------------------------------------------------------------------- helpers

def new_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=SCRATCH.name))


def noise(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(one, other, tolerance=1e-5) -> None:
    torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


def run(stage, *arguments) -> str:
    """A script's main() -> what it printed."""
    printed, device = io.StringIO(), [] if stage is study else ["--device", "cpu"]
    with redirect_stdout(printed), redirect_stderr(io.StringIO()):
        stage.main([*map(str, arguments), *device])
    return printed.getvalue()


def refused(what: str, function, *arguments) -> None:
    """Raises ValueError, or ends the script, with one line that says `what`."""
    message, usage = "no error", io.StringIO()
    try:
        with redirect_stderr(usage), redirect_stdout(io.StringIO()):
            if hasattr(function, "main"):
                function.main([str(argument) for argument in arguments])
            else:
                function(*arguments)
    except (ValueError, SystemExit) as error:
        message = str(error) if str(error) != "2" else usage.getvalue().splitlines()[-1]
    assert what in message and "\n" not in message, f"{what!r} is not in {message!r}"


def full_disk(stage, name: str, after: int):
    """stage.name, which writes a file, works so many times and then fails."""
    calls = [mock.DEFAULT] * after + [OSError("disk full")]
    return mock.patch.object(stage, name, wraps=getattr(stage, name), side_effect=calls)


def write(path: Path, samples, rate=16_000, **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.asarray(samples), rate, **more)
    return path


def write_manifest(folder: Path, *rows: dict) -> None:
    lines = [json.dumps({"text": "HELLO"} | row) for row in rows]
    (folder / "train.jsonl").write_text("\n".join(lines))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (torch.load(path, weights_only=True)["model"] for path in (one, other))
    return all(torch.equal(value, theirs[key]) for key, value in ours.items())


CODEC = ["--steps", 5, "--batch", 2, "--crop", 0.5, "--codebooks", 4]
READING = ["--epochs", 8, "--batch", 3, "--lr", 0.004, "--time-masks", 0, "--feature-masks", 0]


@cache
def corpus() -> Path:
    """Synthetic speech in LibriSpeech's layout: 8, 3 and 3 utterances."""
    folder = new_folder()
    with mock.patch.dict(codec.UTTERANCES, train=8, dev=3, test=3):
        codec.make_synthetic(folder)
    return folder


@cache
def small_codec(encoder="mel", quantizer="fsq", seed=0) -> Path:
    out, books = new_folder(), ["--codebook-size", 64] if quantizer == "rvq" else []
    run(codec, "--corpus", corpus(), "--encoder", encoder, "--quantizer", quantizer, *books,
        *CODEC, "--seed", seed, "--out", out)
    return out / "codec.pt"


def tokenize(out: Path, *flags, source=None) -> Path:
    if "mel" not in flags:
        flags = "--codec", small_codec(), *flags
    run(tokenize_corpus, "--corpus", source or corpus(), "--workers", 0, "--out", out, *flags)
    return out


@cache
def small_tokens() -> Path:
    return tokenize(new_folder())


@cache
def small_asr() -> Path:
    """Trained for one epoch on three of the four codebooks."""
    out = new_folder()
    run(train_asr, "--tokens", small_tokens(), "--epochs", 1, "--codebooks", 3, "--out", out)
    return out / "asr.pt"


def letter_tokens(frames=3, **texts) -> Path:
    """Token files without audio: codebook 0 spells the text, so many frames a letter; codebook 1
    is random. texts: the transcripts of each subset."""
    folder, rng = new_folder(), np.random.default_rng(0)
    for subset, lines in texts.items():
        (folder / subset).mkdir()
        with open(folder / f"{subset}.jsonl", "w") as rows:
            for i, text in enumerate(lines):
                codes = np.repeat([ord(letter) % 32 for letter in f" {text}"], frames)
                array = np.stack([codes, rng.integers(0, 32, len(codes))], 1)
                np.save(folder / subset / f"{i}.npy", array.astype(np.int16))
                item = Utterance(str(i), text, "", f"s{i % 6}", "a.wav", len(codes) / 40)
                more = {"frames": len(codes), "array": f"{subset}/{i}.npy"}
                print(json.dumps(item._asdict() | more), file=rows)
    books = rng.standard_normal((2, 32, 8)) * [[[1]], [[0.3]]]
    np.save(folder / "codebooks.npy", books.astype(np.float32))
    meta = train_asr.read_meta(small_tokens())
    meta |= {"codec": "letters", "codebooks": 2, "codebook_size": 32, "dim": 8}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@cache
def letters() -> Path:
    rng, words = np.random.default_rng(1), "MAN TEN CAT SEE ROOM FOX RED BLUE".split()
    texts = [" ".join(rng.choice(words, 3)) for _ in range(47)]
    return letter_tokens(train=texts[:30], dev=texts[30:35], test=texts[35:])


@cache
def letter_asr() -> Path:
    """A recognizer that has learned to read letters()."""
    out = new_folder()
    run(train_asr, "--tokens", letters(), *READING, "--out", out)
    return out / "asr.pt"


# -------------------------------------------------------------------------------------- quantizers

def make_latent(batch=4, time=60) -> torch.Tensor:
    return noise(batch, 16, time) * torch.linspace(2, 0.2, 16)[:, None]         # (B, D, T)


def make_rvq(dim=16, codebooks=4, size=16) -> ResidualVQ:
    quantizer = ResidualVQ(dim, codebooks, size)
    quantizer.initialize(make_latent().transpose(1, 2).flatten(0, 1)[:, :dim])
    return quantizer.eval()


def test_quantized_latent_is_the_sum_of_codebook_rows():
    for quantizer in (make_rvq(), GroupFSQ(4)):
        result, books = quantizer(make_latent()), quantizer.codebooks()
        rows = sum(book[index] for book, index in zip(books, result.tokens.unbind(1)))
        close(rows.transpose(1, 2), result.latent)
        assert torch.equal(quantizer.encode(make_latent()), result.tokens)
        close(quantizer.decode(result.tokens), result.latent)


def test_fsq_reaches_all_codes_and_rounds_to_the_nearest():
    tokens = GroupFSQ(1).encode(noise(1, 4, 100_000)).unique()
    assert torch.equal(tokens, torch.arange(1000))
    usage, perplexity = usage_and_perplexity(tokens[None, None, :500], 1000)
    assert usage == 0.5 and abs(perplexity - 500) < 0.1         # half of the codes, all alike
    error = GroupFSQ(4)(make_latent()).latent - make_latent().tanh()
    five_levels = [d for d in range(16) if d % 4]               # at -1, -1/2, 0, 1/2, 1
    assert error[:, five_levels].abs().max() < 0.252


def test_fsq_computes_in_float32_under_bfloat16_autocast():
    quantizer, rough = GroupFSQ(4), make_latent(time=500).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result, tokens = quantizer(rough), quantizer.encode(rough)
    assert result.latent.dtype == torch.float32 and torch.equal(tokens, result.tokens)
    assert torch.equal(tokens, quantizer.encode(rough.float()))


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


def test_dead_codes_move_to_the_data_each_to_its_own_frame_and_stay():
    latents = [5 + noise(8, 2, 50, seed=n) for n in range(9)]
    quantizer, dead = make_rvq(2, 1, 64).train(), range(3, 60)
    quantizer.embed[0, dead] = quantizer.ema_sum[0, dead] = 100.0
    quantizer.ema_count[0, dead] = 1e-4
    quantizer(latents[0])
    frames, moved = latents[0].transpose(1, 2).flatten(0, 1), quantizer.embed[0, dead]
    assert torch.cdist(moved, frames).min(1).values.max() < 0.1
    assert torch.pdist(moved).min() > 1e-4
    for latent in latents[1:]:
        tokens = quantizer(latent).tokens
    assert len(set(tokens.flatten().tolist()) & set(dead)) > 20


def test_a_code_without_use_is_dead_after_53_steps():
    quantizer = make_rvq(2, 1, 8).train()
    quantizer.embed[0, 3] = quantizer.ema_sum[0, 3] = 1e6
    for step in range(53):
        assert quantizer.ema_count[0, 3] < 1.01 and quantizer.embed[0, 3].min() > 1e5, step
        quantizer(5 + noise(8, 2, 50, seed=step))
    assert quantizer.embed[0, 3].max() < 100


def test_codebooks_that_do_not_learn_stay_and_are_used_in_part():
    quantizer = make_rvq().train()
    quantizer.learning, quantizer.dropout, before = False, 1.0, quantizer.embed.clone()
    result = quantizer(make_latent())
    assert torch.equal(quantizer.embed, before)
    assert not torch.allclose(result.latent, quantizer.decode(result.tokens))


def test_kmeans_leaves_no_zero_or_double_code_at_deep_levels():
    quantizer = ResidualVQ(16, num_codebooks=8, codebook_size=32)
    quantizer.initialize(noise(8 * 32, 16))
    for book in quantizer.codebooks():
        assert book.norm(dim=1).min() > 1e-3 and torch.pdist(book).min() > 1e-4


def test_random_depth_leaves_each_utterance_its_first_codebooks():
    quantizer, depths = make_rvq().train(), set()
    quantizer.dropout, quantizer.decay, quantizer.dead_below = 1.0, 1.0, 0.0    # it learns nothing
    result = quantizer(noise(60, 16, 6))
    for tokens, made in zip(result.tokens, result.latent):
        first = [quantizer.decode(tokens[None, :n])[0] for n in (1, 2, 3, 4)]
        (depth,) = [n for n in range(4) if torch.allclose(made, first[n], atol=1e-4)]
        depths.add(depth)
    assert depths == {0, 1, 2, 3}
    quantizer.dropout = 0.5                             # of half of the utterances
    depth = quantizer.random_depth(8000, "cpu").float()
    close((depth == 4).float().mean(), torch.tensor(0.625), 0.03)


# ------------------------------------------------------------------------------------------- codec

def test_tokens_are_ceil_of_samples_over_hop_and_decode_to_as_many_hops():
    for kind, hop in product(FOUR, (400, 200)):
        model = Codec(*kind, strides=(2, 4, 5, hop // 40)).eval()
        assert model.hop == hop and model.frame_rate == 16_000 / hop
        for samples in (1, hop, hop + 1, 7 * hop - 1):
            tokens, frames = model.encode(0.1 * noise(2, samples)), -(-samples // hop)
            assert tokens.shape == (2, 8, frames)
            assert model.decode(tokens[:, :2]).shape == (2, frames * hop)
    assert round(Codec().bitrate) == 3189 and model.bitrate == 6400


def test_windows_of_a_long_recording_give_the_tokens_of_the_whole():
    wav = 0.1 * noise(1, 60 * 16_000) * torch.linspace(-9, 9, 60 * 16_000).sin()
    for kind in FOUR:
        model = Codec.load(small_codec(*kind))
        with torch.inference_mode():
            whole = model.quantizer.encode(model.encoder(wav))
        flipped = (model.encode(wav) != whole).any(1).float().mean()
        assert flipped <= 0.001 and len(whole.unique()) > 20, f"{kind}: {flipped:.2%} of frames"


def test_fingerprint_survives_half_precision_and_changes_with_the_encoder():
    one, other = Codec.load(small_codec()), Codec.load(small_codec())
    report = json.loads(small_codec().with_name("report.json").read_text())
    other.load_state_dict({name: value.half() for name, value in one.state_dict().items()})
    next(other.decoder.parameters()).data += 0.01
    assert one.fingerprint == other.fingerprint == report["fingerprint"]
    next(other.encoder.parameters()).data += 0.01
    assert one.fingerprint != other.fingerprint


def test_codec_learns_and_resumes_as_if_uninterrupted():
    whole, cut = new_folder(), new_folder()             # on a plain folder of audio
    flags = ["--corpus", corpus() / "train", "--train", "100", "--quantizer", "rvq",
             "--codebooks", 2, "--codebook-size", 16, "--steps", 105, "--batch", 1, "--crop", 0.1]
    run(codec, *flags, "--out", whole)
    with full_disk(codec, "save_checkpoint", after=3):      # at the last step, between two files
        refused("disk full", codec, *flags, "--out", cut)
    assert "step 100 of 105" in run(codec, *flags, "--out", cut)
    for name in ("codec.pt", "resume.pt"):
        assert same_weights(whole / name, cut / name)
    early, late = read_rows(whole / "log.jsonl")        # of 100 steps, and of five
    assert late["mel"] < 0.9 * early["mel"]


def test_codec_steps_may_grow_and_other_flags_may_not_change():
    out = shutil.copytree(small_codec().parent, new_folder() / "codec")
    flags = ["--corpus", corpus(), *CODEC, "--out", out]
    for name, value in (("--lr", 0.1), ("--steps", 4), ("--seed", 1), ("--strides", 400)):
        refused(name, codec, *flags, name, value)
    assert "step 5 of 6" in run(codec, *flags, "--steps", 6)


def test_adversarial_training_of_a_finished_codec_changes_its_decoder_alone():
    for kind, published in (("fsq", False), ("rvq", True)):
        out = shutil.copytree(small_codec("mel", kind).parent, new_folder() / "codec")
        if published:
            (out / "resume.pt").unlink()
        flags = ["--corpus", corpus(), *CODEC, "--adversarial", "--steps", 2, "--out", out]
        books = ["--quantizer", "rvq", "--codebook-size", 64] if kind == "rvq" else []
        with mock.patch.object(ResidualVQ, "random_depth", autospec=True,
                               side_effect=ResidualVQ.random_depth) as depth:
            run(codec, *flags, *books)
        # Half of the crops keep only their first codebooks, as in the training before.
        assert [call.args[0].training for call in depth.call_args_list] == [True] * 2 * len(books[2:3])
        before, after = Codec.load(small_codec("mel", kind)), Codec.load(out / "codec.pt")
        assert before.fingerprint == after.fingerprint
        assert not torch.equal(before.decoder.head[1].weight, after.decoder.head[1].weight)


def test_report_takes_up_to_100_files_evenly():
    files = [write(new_folder() / "a.wav", 0.1 * noise(800))] * 101
    for number, taken in ((1, 1), (100, 100), (101, 51)):
        with redirect_stdout(io.StringIO()):
            codec.report(Codec.load(small_codec()), files[:number], files[0].parent)
        assert json.loads((files[0].parent / "report.json").read_text())["files"] == taken


def test_reconstruction_is_as_long_as_the_original():
    source = write(new_folder() / "in.wav", 0.1 * noise(12_345))
    made = source.with_name("out.flac")
    for books in (), ("--codebooks", 2):
        run(codec, "--codec", small_codec(), "--reconstruct", source, made, *books)
        assert sf.info(made).frames == 12_345


# ------------------------------------------------------------------------------- audio and corpora

def test_any_rate_format_and_channel_count_becomes_16_khz_mono():
    def tone(rate):
        return np.float32(0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate))
    home = new_folder()
    for name, subtype, rate, channels in (
            ("a.wav", "PCM_U8", 8000, 1), ("b.wav", "PCM_16", 44_100, 2),
            ("c.flac", "PCM_24", 48_000, 8), ("d.ogg", "VORBIS", 22_050, 1)):
        write(home / name, np.stack([tone(rate)] * channels, 1), rate, subtype=subtype)
        close(read_audio(home / name)[500:-500], torch.tensor(tone(16_000))[500:-500], 0.03)
    assert read_audio(write(home / "e.wav", [[0.5, 0.25]], subtype="FLOAT")).tolist() == [0.375]
    path = write(home / "f.wav", np.arange(16_000) / 20_000, subtype="FLOAT")
    assert torch.equal(read_audio(path, seconds=0.25, at=0.5), read_audio(path)[6000:10_000])


@cache
def damaged_files() -> list[Path]:
    """Files that look like audio and are none, beside good.wav and good.flac."""
    home = new_folder()
    wav = write(home / "good.wav", 0.1 * noise(40_000)).read_bytes()
    flac = write(home / "good.flac", 0.1 * noise(40_000)).read_bytes()
    for name, data in (("half.wav", wav[:40_000]), ("half.flac", flac[:30_000]), ("empty.wav", b""),
                       ("header.wav", wav[:40]), ("text.wav", b"words"), ("zeros.ogg", bytes(5000)),
                       ("wrong.flac", flac[:3000] + bytes(3000) + flac[6000:]),
                       ("phone.m4a", b"\0\0\0\x20ftypM4A " + bytes(5000))):
        (home / name).write_bytes(data)
    for name, samples, rate in (("nan.wav", [0.1, math.nan], 16_000), ("none.wav", [], 16_000),
                                ("loud.wav", [0.1, 3e8], 16_000), ("rate.wav", [0.1], 48_001)):
        write(home / name, samples, rate, subtype="FLOAT")
    return [path for path in home.iterdir() if path.stem != "good"] + [home, home / "missing.wav"]


def test_no_voice_and_no_sentence_is_in_two_subsets():
    home, owner = new_folder(), {}
    with mock.patch.object(codec, "speak", lambda *_: np.zeros(9)):     # all sentences, but silent
        with redirect_stderr(io.StringIO()):
            codec.make_synthetic(home)
    for path in home.rglob("*.trans.txt"):
        subset, speaker = path.relative_to(home).parts[:2]
        for line in path.read_text().splitlines():
            for name in (speaker, line.split(" ", 1)[1]):
                assert owner.setdefault(name, subset) == subset
    assert set(owner.values()) == {"train", "dev", "test"}


def download(home: Path, *names: str, md5: str = "") -> None:
    """Serve train-clean-5 with files of these names; fetch it into home/data."""
    archive = home / "31" / "train-clean-5.tar.gz"
    archive.parent.mkdir(exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("LibriSpeech/train-clean-5/1/1/1-1-0000.flac", *names):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    md5 = md5 or hashlib.md5(archive.read_bytes()).hexdigest()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=home)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    with (mock.patch.multiple(codec, OPENSLR=url, MD5={"train-clean-5": md5}),
          redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO())):
        codec.fetch_librispeech(home / "data", "train-clean-5")


def test_download_is_checked_and_unpacked_inside_its_folder():
    home = new_folder()
    refused("checksum", partial(download, home, md5="0" * 32))
    assert not [path for path in (home / "data").rglob("*") if path.is_file()]
    download(home)
    assert [path.name for path in (home / "data").rglob("*.*")] == ["1-1-0000.flac"]
    try:
        download(new_folder(), "../../evil.txt")
    except (ValueError, tarfile.TarError):
        pass
    assert not list(Path(SCRATCH.name).rglob("evil.txt"))


def test_three_layouts_are_read_as_one_corpus():
    home = new_folder()
    libri, superb = home / "libri" / "train" / "7" / "1", home / "superb" / "x" / "deu"
    for path in (libri / "7-1-0.wav", libri / "7-1-1.wav", libri / "7-1-2.wav",
                 superb / "wav" / "b.wav", home / "rows" / "c.wav"):
        write(path, 0.1 * noise(4000))
    transcripts = b"\xef\xbb\xbf7-1-0 HELLO  THERE\r\n7-1-1\r\n7-1-9 LOST\r\n"
    (libri / "7-1.trans.txt").write_bytes(transcripts)
    (superb / "transcript_train.txt").write_text("b 0.2 GUTEN TAG\n../b 0.2 RAUS\n\nkurz\n")
    good = {"audio_filepath": "c.wav", "text": "GRÜN", "lang": "de", "speaker": "anna"}
    bad = [{"speaker": "NO PATH"}, good | {"text": ""}, good | {"offset": 1.0, "duration": 0.1}]
    write_manifest(home / "rows", good, *bad)
    run(tokenize_corpus, "--corpus", home / "libri", home / "superb", home / "rows", "--dev",
        "train", "--features", "mel", "--workers", 0, "--out", home / "out")
    rows = read_rows(home / "out" / "train.jsonl")
    assert [(row["id"], row["text"], row["lang"], row["speaker"]) for row in rows] == [
        ("7-1-0", "HELLO THERE", "", "7"), ("b", "GUTEN TAG", "deu", ""),
        ("c", "GRÜN", "de", "anna")]
    skipped = (home / "out" / "train.skipped.txt").read_text().splitlines()
    assert len(skipped) == 3 + 2 + 3, skipped


def test_manifest_cannot_lead_out_of_the_output():
    home, names = new_folder(), ["../up.wav", "../in/../over.wav", "x" * 200 + ".wav"]
    for name in names:
        write(home / "in" / name, 0.1 * noise(4000))
    names.append(f"{home}/up.wav")
    write_manifest(home / "in", *({"audio_filepath": name} for name in names))
    out = tokenize(home / "out", "--features", "mel", "--dev", "train", source=home / "in")
    assert {path.name for path in home.iterdir()} == {"in", "out", "up.wav", "over.wav"}
    assert len(list(out.rglob("*.npy"))) == 4


# -------------------------------------------------------------------------------------- tokenizing

def test_token_folder_holds_what_the_recognizer_needs():
    model, meta = Codec.load(small_codec()), train_asr.read_meta(small_tokens())
    sizes = [meta[name] for name in ("hop", "sample_rate", "codebooks", "codebook_size", "dim")]
    assert sizes == [400, 16_000, 4, 1000, 16] and meta["codec"] == model.fingerprint
    books = np.load(small_tokens() / "codebooks.npy")
    assert books.dtype == np.float32 and np.array_equal(books, model.quantizer.codebooks())
    for subset, size in (("train", 8), ("dev", 3), ("test", 3)):
        rows = read_rows(small_tokens() / f"{subset}.jsonl")
        assert len(rows) == size and subset in meta[subset]
        for row in rows:
            wav, array = read_audio(row["audio"]), np.load(small_tokens() / row["array"])
            assert array.dtype == np.int16 and np.array_equal(array.T, model.encode(wav[None])[0])
            assert row["frames"] == len(array) and row["duration"] == round(len(wav) / 16_000, 3)


class StandIn(torch.nn.Module):
    """EnCodec's interface, without its weights: the codes are the loudness of each frame."""
    sample_rate, encoder = 24_000, SimpleNamespace(ratios=[8, 5, 4, 2])
    encodec_model_24khz = classmethod(lambda cls: cls())

    def __init__(self):
        super().__init__()
        layer = SimpleNamespace(_codebook=SimpleNamespace(embed=torch.randn(1024, 128)))
        self.quantizer = SimpleNamespace(vq=SimpleNamespace(layers=[layer] * 32))

    def set_target_bandwidth(self, kbps: float):
        self.books = int(kbps / 0.75)

    def encode(self, wav: torch.Tensor) -> list[tuple]:
        frames = torch.nn.functional.pad(wav, (0, -wav.shape[2] % 320)).unflatten(2, (-1, 320))
        codes = (frames.abs().mean(3) * 1000).long()                        # (1, 1, T)
        return [(codes.repeat(1, self.books, 1), None)]


def test_encodec_gives_eight_codebooks_at_75_hz():
    sys.modules["encodec"] = SimpleNamespace(EncodecModel=StandIn)
    out = tokenize(new_folder() / "tokens", "--codec", "encodec")
    run(train_asr, "--tokens", out, "--epochs", 1, "--subsampling", 2, "--out", out / "asr")
    front_end = Recognizer(out / "asr" / "asr.pt", "cpu").front_end()
    row = read_rows(out / "test.jsonl")[0]
    array = front_end(read_audio(row["audio"]))
    assert np.array_equal(np.load(out / row["array"]), array)
    assert array.shape == (math.ceil(row["duration"] * 75), 8) and len(np.unique(array)) > 9


COPIES = ["--features", "mel", "--hop", 160, "--speeds", 0.5, "--noise", "white", "--copies", 2]


@cache
def tokens_with_copies() -> Path:
    return tokenize(new_folder(), *COPIES)


def test_copies_are_made_of_the_training_subsets_alone():
    rows = read_rows(tokens_with_copies() / "train.jsonl")
    arrays = {row["id"]: np.load(tokens_with_copies() / row["array"]) for row in rows}
    assert len(rows) == 4 * 8 and len(read_rows(tokens_with_copies() / "dev.jsonl")) == 3
    for row in rows:
        array, plain = arrays[row["id"]], arrays[row["copy_of"] or row["id"]]
        assert array.dtype == np.float16 and array.shape == (row["frames"], 80)
        assert len(array) == math.ceil(sf.info(row["audio"]).frames / row["speed"] / 160)
        assert row["noisy"] == (row["speed"] == 1 and not np.array_equal(array, plain))


def add_noise(kind: str, name="a", seed=0) -> torch.Tensor:
    item = Utterance(name, "", "", "", Path("a.wav"))
    speech = [item._replace(id=path.stem, audio=path) for path in sorted(corpus().rglob("*.flac"))]
    return Noise([kind], [7.0, 7.0], speech, seed)(0.1 * noise(20_000), item)     # at 7 dB


def test_noise_has_the_ratio_asked_for():
    wav = 0.1 * noise(20_000)
    for kind in ("white", "pink", "babble", str(corpus() / "dev")):
        ratio = wav.square().mean() / (add_noise(kind) - wav).square().mean()
        assert abs(10 * torch.log10(ratio) - 7) < 0.01, kind


def test_noise_follows_from_seed_and_id_alone():
    for kind in ("white", "pink", "babble"):
        assert torch.equal(add_noise(kind), add_noise(kind))
        for other in (add_noise(kind, seed=1), add_noise(kind, name="b")):
            assert not torch.equal(add_noise(kind), other)


def test_interrupted_tokenizing_continues():
    out = new_folder()
    with full_disk(tokenize_corpus, "save_array", after=5):
        refused("disk full", tokenize, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("train/*.npy")}
    assert 0 < len(before) < 8 and not (out / "train.jsonl").exists()
    tokenize(out)
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    assert read_rows(out / "train.jsonl") == read_rows(small_tokens() / "train.jsonl")


def test_tokens_of_another_codec_corpus_or_noise_do_not_mix():
    copied = shutil.copytree(corpus(), new_folder() / "corpus")
    for name, value in (("codec", small_codec(seed=1)), ("noise", "pink"), ("corpus", copied),
                        ("seed", 1), ("features", "mel")):
        refused(f"tokens with {name}", tokenize, small_tokens(), f"--{name}", value)
    refused("tokens with snr", tokenize, tokens_with_copies(), *COPIES, "--snr", 1, 2)


def test_the_corrected_command_follows_one_that_failed():
    home, out = new_folder(), new_folder() / "tokens"
    (home / "train.jsonl").write_text(json.dumps({"audio_filepath": "lost.wav", "text": "A"}))
    mel = "--features", "mel"
    refused("nothing that can be used", tokenize, out, *mel, "--dev", "train", "--corpus", home)
    assert len(read_rows(tokenize(out, *mel) / "train.jsonl")) == 8


def test_unreadable_audio_is_named_and_silence_gives_no_nan():
    bad, home = damaged_files(), damaged_files()[0].parent
    good = [home / "good.wav", write(home / "silent.wav", np.zeros(8000))]
    write_manifest(home, *({"audio_filepath": path.name} for path in (*bad, *good)))
    out = tokenize(new_folder(), "--features", "latent", "--noise", "pink", "--dev", "train",
                   source=home)
    rows, skipped = read_rows(out / "train.jsonl"), (out / "train.skipped.txt").read_text()
    assert [row["copy_of"] or row["id"] for row in rows] == ["good", "silent"] * 2
    assert all(np.isfinite(np.load(out / row["array"])).all() for row in rows)
    for path in bad:
        refused(path.name, read_audio, path)
        assert path.name in skipped


# -------------------------------------------------------------------------------------- recognizer

def make_asr(**more) -> CodecASR:
    sizes = dict(num_codebooks=3, codebook_size=20, dim=8, size="tiny")
    return CodecASR(12, **sizes | more).eval()


def make_tokens(*shape) -> torch.Tensor:
    return torch.randint(20, shape, generator=torch.Generator().manual_seed(0))


def test_batched_log_probs_equal_single():
    token_len = torch.tensor([41, 1, 2, 7, 30])         # what stands behind must not matter
    kinds = (dict(aggregate="sum"), dict(aggregate="stack"), dict(num_codebooks=0))
    for kind, subsampling in product(kinds, (1, 2, 4)):
        model = make_asr(subsampling=subsampling, **kind)
        tokens = make_tokens(5, 41, 3) if model.num_codebooks else noise(5, 41, 8)
        log_probs, out_len = model(tokens, token_len)
        for i, n in enumerate(token_len):
            alone, length = model(tokens[i:i + 1, :n], token_len[i:i + 1])
            assert out_len[i] == length == -(-n // subsampling)
            close(log_probs[i, :out_len[i]], alone[0])


def test_embedding_starts_as_the_quantized_latent():
    aggregates = ("sum", "stack")
    for quantizer, name, used in product((make_rvq(), GroupFSQ(4)), aggregates, (2, 4)):
        tokens, books = quantizer.encode(make_latent())[:, :used], quantizer.codebooks()
        model = make_asr(num_codebooks=used, codebook_size=books.shape[1], dim=16, aggregate=name)
        frames = tokens.transpose(1, 2)                             # (B, T, Q)
        model.start_from(books, frames.flatten(0, 1))
        emb = model.embed(frames, torch.tensor([60] * 4)) * model.deviation + model.mean
        latent = quantizer.decode(tokens).transpose(1, 2)
        rows = torch.cat([book[index] for book, index in zip(books, tokens.unbind(1))], 2)
        close(emb, {"sum": latent, "stack": rows}[name], 1e-4)


def test_augmentation_follows_the_curriculum_and_stays_out_of_evaluation():
    args = train_asr.parse(["--curriculum", "100"])
    assert [train_asr.ramp(step, args) for step in (0, 50, 100, 200)] == [0, 0.5, 1, 1]
    model, inputs = make_asr(), (make_tokens(2, 50, 3), torch.tensor([50, 20]))
    plain = model(*inputs)[0]
    model.augment = Augment(4, 8, 2, 2, replace=0.5, noisy_embedding=1.0)
    assert torch.equal(model(*inputs)[0], plain)
    assert not torch.allclose(model.train()(*inputs)[0], plain, atol=1e-3)
    model.augment.strength = 0.0
    close(model(*inputs)[0], plain)


def test_masks_hide_codebooks_frames_and_bands_within_the_utterance():
    lengths, ones = torch.tensor([100] * 20 + [200] * 20), torch.ones(40, 200, 8)
    spans = Augment().spans(200, lengths, 300, lengths / 4)             # (B, n, T)
    assert (spans.sum(2) <= 0.25 * lengths[:, None] + 1).all() and not spans[:20, :, 100:].any()
    close(spans.float().mean() / 0.75, torch.tensor(0.125), 0.01)       # half as wide on average
    at = (spans * torch.arange(200)).sum(2) / spans.sum(2)
    close(at[20:].nanmean(), torch.tensor(99.5), 2.0)                   # anywhere
    hidden = Augment(codebook_masks=1).visible(make_tokens(40, 200, 4), lengths) == 0
    assert (hidden.any(1).sum(1) <= 1).all() and 0.1 < hidden[20:].float().mean() * 4 < 0.4
    for masks, dim in ((Augment(time_masks=4), 2), (Augment(feature_masks=1), 1)):
        emb = masks.hide(ones, lengths)
        assert (emb.amax(dim) == emb.amin(dim)).all() and 0.01 < (emb == 0).float().mean() < 0.33
    longest = Augment(time_masks=1, longest_mask=2.0).hide(ones, lengths)
    assert (longest == 0).any(2).sum(1).max() == 2
    noisy = Augment(noisy_embedding=0.3).hide(torch.zeros(40, 200, 8), lengths)
    close(torch.stack([noisy.mean(), noisy.std()]), torch.tensor([0.0, 0.3]), 0.01)
    codes = Augment(replace=0.3).replace_codes(torch.full((9, 900, 8), -1), 1000)
    close((codes >= 0).float().mean(), torch.tensor(0.3), 0.01)
    close(codes[codes >= 0].float().mean(), torch.tensor(499.5), 10.0)


# ---------------------------------------------------------------------------------------- training

def test_text_units_give_text_and_language_back():
    texts = {"en": "NINE MEN SEE", "de": "ÜBER DEN FLUß", "he": "מים ומלח", "et": "KAAPPI"}
    rows = [{"text": text, "lang": lang} for lang, text in texts.items()]
    for units, row in product(("char", "unigram", "bpe"), rows):
        size = ["--vocab-size", "40"] if units != "char" else []
        args = train_asr.parse(["--units", units, "--lang-token", *size])
        model = SentencePieceProcessor(model_proto=train_asr.train_units(rows, args))
        ids = model.encode(train_asr.transcript(row, True))
        path = [unit for i in ids for unit in (i, i, 0)]        # repeats merge, blanks vanish
        log_probs = torch.eye(len(model))[path + [3, 4]][None]  # two frames of padding
        (found,) = train_asr.greedy(model, log_probs, torch.tensor([len(path)]))
        assert train_asr.split_language(found) == (row["lang"], row["text"]), found


def train_set(folder: Path, *flags) -> TrainSet:
    args = train_asr.parse(["--tokens", str(folder), *map(str, flags)])
    return TrainSet(args, train_asr.read_meta(folder))


def test_utterance_too_short_for_ctc_is_dropped_and_counted():
    home = letter_tokens(frames=1, train=["MEN", "SEE", "MAN"])         # EE needs a blank between
    data = train_set(home)
    used = [data.rows[i]["text"] for group in data.epoch(0, 1.0) for i in group]
    assert sorted(used) == ["MAN", "MEN"] and "dropped: 1 utterances" in data.notes
    refused("nothing to train on", train_set, home, "--subsampling", 2)


def test_recognizer_learns_to_read():
    log = read_rows(letter_asr().with_name("log.jsonl"))
    assert log[-1]["loss"] < 0.1 * log[0]["loss"] and log[-1]["dev_cer"] < 0.05


def start_model(*flags) -> CodecASR:
    args = train_asr.parse(["--tokens", str(letters()), *map(str, flags)])
    return train_asr.start_model(args, train_asr.read_meta(letters()), train_set(letters(), *flags))


def test_tables_start_frozen_random_or_as_the_first_codebooks():
    books = torch.tensor(np.load(letters() / "codebooks.npy"))
    random, many = start_model("--embedding", "random").embedding.tables.view(2, 32, 8), []
    assert not torch.isclose(random, books).any()
    for seed in range(40):
        args = "--embedding", "random", "--seed", seed
        many.append(start_model(*args).embedding.tables.detach().view(2, 32, 8))
    close(torch.cat(many, 1).std(1) / books.std(1), torch.ones(2, 8), 0.1)
    close((torch.cat(many, 1).mean(1) - books.mean(1)) / books.std(1), torch.zeros(2, 8), 0.1)
    for kind, most in (("codebook", 0.002), ("frozen", 0)):
        out, flags = new_folder(), ["--embedding", kind, "--codebooks", 1, "--epochs", 1]
        run(train_asr, "--tokens", letters(), *flags, "--out", out)
        moved = torch.load(out / "resume.pt", weights_only=True)["model"]["embedding.tables"]
        assert most / 20 <= (moved - books[0]).abs().max() <= most          # slowly, or not at all


def test_learning_rates_at_a_few_steps():
    args = codec.parse(["--steps", "1000"])
    rates = [codec.learning_rate(step, args) for step in (0, 49, 99, 100, 500, 1000)]
    close(torch.tensor(rates), torch.tensor([1e-5, 4.972e-4, 9.77e-4, 9.768e-4, 5.25e-4, 5e-5]), 1e-6)
    steps = 0, 150, 299, 300, 1000, 2000
    rates = [train_asr.share_of_peak(step, step / 2000, 300) for step in steps]
    close(torch.tensor(rates), torch.tensor([1 / 300, 0.4965, 0.9459, 0.9455, 0.5, 0.0]), 1e-3)
    (muon, *_), (others, tables) = (item.param_groups for item in train_asr.make_optimizers(
        make_asr(), train_asr.parse(["--lr", "1"])))
    assert [group["peak"] for group in (muon, others, tables)] == [2.5, 1, 0.1]


def test_an_epoch_takes_one_variant_of_each_utterance_in_bounded_batches():
    data, noisy = train_set(tokens_with_copies(), "--batch", 10), []
    for number in range(60):
        groups = data.epoch(number, 1.0)
        rows = [data.rows[i] for group in groups for i in group]
        assert len({row["copy_of"] or row["id"] for row in rows}) == len(rows) == 8
        noisy += [row["noisy"] for row in rows]
        assert all(data.take(group, "cpu")[0][..., 0].numel() <= 1000 for group in groups)
    assert abs(np.mean(noisy) - train_asr.NOISY_SHARE) < 0.08
    assert not any(data.rows[i]["noisy"] for group in data.epoch(0, 0.0) for i in group)


def test_muon_steps_are_orthogonal_and_follow_the_gradient():
    matrices = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((96, 24), (24, 96), (96, 24))]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
        matrix.grad[:6, :6] *= 10
    train_asr.Muon(matrices, 1.0).step()
    for matrix in matrices:
        u, _, v = torch.linalg.svd(matrix.grad, full_matrices=False)
        length = max(1.0, len(matrix) / matrix.shape[1]) ** 0.5
        along = (u.T @ -matrix.detach() @ v.T / length).diagonal()
        assert 0.6 < along.min() and along.max() < 1.3


def test_resumed_recognizer_equals_an_uninterrupted_one():
    whole, cut = new_folder(), new_folder()
    flags = ["--tokens", letters(), "--epochs", 3, "--batch", 10, "--replace", 0.1,
             "--noisy-embedding", 0.3, "--curriculum", 5]
    run(train_asr, *flags, "--out", whole)
    with full_disk(train_asr, "save_checkpoint", after=3):      # in epoch 2, between two files
        refused("disk full", train_asr, *flags, "--out", cut)
    assert "epoch 1 of 3" in run(train_asr, *flags, "--out", cut)
    for name in ("asr.pt", "resume.pt"):
        assert same_weights(whole / name, cut / name)


def test_epochs_may_grow_and_other_flags_and_tokens_may_not_change():
    out = shutil.copytree(small_asr().parent, new_folder() / "asr")
    flags = ["--tokens", small_tokens(), "--codebooks", 3, "--epochs", 1, "--out", out]
    for name, value in (("--lr", 0.1), ("--seed", 1), ("--codebooks", 2)):
        refused(name, train_asr, *flags, name, value)
    refused("trained", train_asr, *flags, "--tokens", letters())
    assert "epoch 1 of 2" in run(train_asr, *flags, "--epochs", 2)
    refused("--epochs", train_asr, *flags)


SCRIPT = """
import os, sys, torch, codec, train_asr
dist = torch.distributed
start, stop = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda *args, **more: dist.is_initialized() or start(*args, **more)
dist.destroy_process_group = lambda: None       # two stages in one process

class Kept(codec.Codec):
    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        Kept.made = getattr(Kept, "made", self)         # not the one that is loaded for its report

out, corpus, *flags = sys.argv[1:]
codec.Codec, train_asr.fast_dtype = Kept, lambda device: torch.float32
codec.ResidualVQ.decay = codec.ResidualVQ.dead_below = 0.5      # codes die within three steps
codec.main(["--corpus", corpus, "--quantizer", "rvq", "--codebooks", "2", "--codebook-size", "32",
            "--steps", "3", "--batch", "4", "--device", "cpu", "--out", out + "/codec"])
torch.save({"model": Kept.made.quantizer.state_dict()}, out + f"/books{os.environ['RANK']}.pt")
train_asr.main([*flags, "--device", "cpu", "--out", out + "/asr"])
dist.barrier()
stop()
"""


def test_two_processes_learn_what_one_learns():
    one, two, root = new_folder(), new_folder(), str(Path(__file__).resolve().parent)
    reading = ["--tokens", letters(), *READING, "--epochs", 2]
    (two / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*map(str, [*torchrun, two / "script.py", two, corpus(), *reading])],
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with mock.patch.object(train_asr, "fast_dtype", lambda device: torch.float32):
        run(train_asr, *reading, "--out", one)
    logs = [read_rows(path / "log.jsonl") for path in (one, two / "asr")]
    for alone, shared in zip(*logs, strict=True):
        assert math.isclose(alone["loss"], shared["loss"], rel_tol=1e-4), (alone, shared)
    assert same_weights(two / "books0.pt", two / "books1.pt")       # RVQ's, with revived codes


# -------------------------------------------------------------------------------------- evaluation

def make_score(refs: list[str], hyps: list[str], speakers=4) -> Score:
    rows = [{"text": ref, "speaker": f"s{i % speakers}", "lang": ""} for i, ref in enumerate(refs)]
    return Score(rows, hyps)


def test_error_rates_are_those_of_jiwer():
    refs, hyps = ["THE CAT SAT", "A DOG", "SO", "NIL"], ["THE CAT SAT DOWN", "A", "GO", ""]
    summary = make_score(refs, hyps).summary(0)
    assert math.isclose(summary["wer"], jiwer.wer(refs, hyps))
    assert math.isclose(summary["cer"], jiwer.cer(refs, hyps))
    assert summary["by_speaker"]["s0"] == [1, 3, 5, 11]         # errors and length: words, letters


def test_interval_is_wider_where_errors_come_by_speaker():
    refs, numbers, widths = ["ABCDEFGHIJ"] * 300, np.arange(300), []
    for bad in (numbers % 10 < 3, numbers // 10 % 10 < 3):      # three of ten speakers; all alike
        score = make_score(refs, ["ABCDE" if b else "ABCDEFGHIJ" for b in bad], speakers=10)
        widths.append(np.diff(score.summary(0)["cer_interval"]))
    assert widths[0] > 0.1 > 5 * widths[1]
    assert evaluate.difference(score, score, 0) == [0, 0]
    assert evaluate.difference(score, make_score(refs, refs, speakers=10), 0)[0] > 0.1


def ask(name: str, *flags) -> dict:
    """The JSON that evaluate.py writes."""
    out = new_folder() / "made" / "for it"
    run(evaluate, "--out", out, *flags)
    return json.loads((out / f"{name}.json").read_text())


def test_noise_is_added_to_audio_that_is_encoded_anew():
    data = TokenSet(small_tokens(), ["test"])
    args = evaluate.parse(["--noise", "white", "--snr", "300", "0"])
    clean, *noisy = evaluate.conditions(Recognizer(small_asr(), "cpu"), data, args)
    assert [kind for kind, _, _ in (clean, *noisy)] == [None, "white", "white"]
    for (_, snr, arrays), least, most in zip(noisy, (0.0, 0.2), (0.0, 1.0)):
        changed = torch.cat(arrays) != torch.cat(clean[2])
        assert least <= changed.float().mean() <= most, snr
    report = ask("report", "--asr", small_asr(), "--test", "test", "dev", "--noise", "white",
                 "--snr", 10, 0)
    names = ["test", "test, white 10 dB", "test, white 0 dB"]
    (found,) = report["runs"].values()
    assert list(found["test"]) == names + [name.replace("test", "dev") for name in names]


def test_comparison_says_what_ran_where_and_how_it_differs():
    report = ask("compare", "--compare", small_asr().parent, small_asr())
    assert report["command"] and report["machine"] and "commit" in report
    found, again = report["runs"].values()
    assert found["bitrate"] == 0.75 * Codec.load(small_codec()).bitrate         # 3 of 4 codebooks
    assert found["test"]["test"]["cer_minus_first"] == [0, 0] and found["test"] == again["test"]


def test_copies_are_not_scored_and_test_subsets_alone_are_enough():
    assert len(TokenSet(tokens_with_copies(), ["train"]).rows) == 8
    home = new_folder() / "mine"
    shutil.copytree(corpus() / "test", home / "test")
    tokenize(home / "tokens", source=home)
    refused("no train subset", train_asr, "--tokens", home / "tokens", "--out", home / "asr")
    (found,) = ask("report", "--asr", small_asr(), "--tokens", home / "tokens")["runs"].values()
    assert found["test"]["test"]["utterances"] == 3


def test_transcription_is_what_the_tokens_give():
    data, bad, home = TokenSet(small_tokens(), ["test"]), damaged_files()[0], new_folder()
    for number, row in enumerate(data.rows):
        (home / str(number)).mkdir()
        shutil.copy(row["audio"], home / str(number) / "same.flac")
    drawn = ["--plots", "--out", home / "out"] if importlib.util.find_spec("matplotlib") else []
    printed = run(evaluate, "--asr", small_asr(), "--audio", bad, home, *drawn)
    assert f"skipped: {bad}" in printed
    recognizer = Recognizer(small_asr().parent, device="cpu")
    for number, array in enumerate(data.arrays):
        text, path = recognizer.recognize(array), home / str(number) / "same.flac"
        assert f"{path}: {text}\n" in printed and recognizer.transcribe(path) == text
    pictures = list(home.glob("out/*.png"))
    assert not drawn or len(pictures) == 3 and all(f"wrote {path}" in printed for path in pictures)


ARPA = """
\\data\\
ngram 1=6
ngram 2=1

\\1-grams:
-1.0\t<s>\t0
-1.0\t</s>
-9.0\t<unk>
-1.0\tMAN\t0
-1.0\tCAT\t0
{red}\tRED

\\2-grams:
-1.0\tMAN CAT

\\end\\
"""


def test_beam_search_writes_words_of_the_language_model_that_the_weights_favor():
    if not importlib.util.find_spec("flashlight"):
        return
    home = new_folder()
    for name, red in (("rare", -8.0), ("common", -0.05)):
        (home / name).write_text(ARPA.format(red=red))
    with gzip.open(home / "rare.gz", "wt") as file:
        file.write((home / "rare").read_text())
    plain = Recognizer(letter_asr(), "cpu")
    ids = {piece: plain.units.piece_to_id(piece) for piece in "\u2581MANCTRED"}
    path = [unit for letter in "\u2581MAN\u2581CAT" for unit in (ids[letter], 0)]
    log_probs = torch.full((1, len(path), len(plain.units)), -9.0)
    log_probs[0, range(len(path)), path] = 0.0
    doubt = log_probs.clone()                       # the second word may be RED as well
    for place, letter in ((10, "R"), (12, "E"), (14, "D")):
        doubt[0, place, ids[letter]] = -0.2
    heard = {}
    for name, scores, more in (("rare", log_probs, {}), ("rare.gz", log_probs, {}),
                               ("rare", doubt, {}), ("common", doubt, {}),
                               ("common", doubt, {"lm_weight": 0.0}),
                               ("rare", doubt, {"lm_weight": 0.0, "prior_weight": 1.0})):
        recognizer = Recognizer(letter_asr(), "cpu", home / name, **more)
        if "prior_weight" in more:                  # letters that are frequent need better evidence
            recognizer.prior = torch.zeros(len(plain.units))
            recognizer.prior[ids["A"]] = 5.0
        recognizer.log_probs = lambda tokens, scores=scores: scores
        heard[name, scores is doubt, *more] = recognizer.recognize(None)
    assert [*heard.values()] == ["MAN CAT"] * 3 + ["MAN RED", "MAN CAT", "MAN RED"], heard
    refused("not a word language model", Recognizer, letter_asr(), "cpu", letters() / "meta.json")


def test_prior_is_the_mean_posterior_of_the_training_tokens():
    saved = torch.load(letter_asr(), weights_only=True)
    close(saved["log_prior"].exp().sum(), torch.tensor(1.0), 1e-3)
    recognizer, data = Recognizer(letter_asr(), "cpu"), TokenSet(letters(), ["train"])
    probs = torch.cat([recognizer.log_probs(array)[0].exp() for array in data.arrays])
    close(saved["log_prior"].exp(), probs.mean(0), 2e-3)


def test_windows_of_a_long_recording_read_every_frame_once():
    recognizer = Recognizer(letter_asr(), "cpu")
    for subsampling, frames in product((1, 2), (1, 2399, 6001)):
        recognizer.flags |= {"subsampling": subsampling}
        model = train_asr.build_model(recognizer.flags, recognizer.meta, len(recognizer.units))
        for block in model.blocks:      # without attention, a frame depends on its neighbors alone
            torch.nn.init.zeros_(block.attention.out.weight)
        recognizer.model, tokens = model.eval(), make_tokens(1, frames, 2)
        with torch.inference_mode():
            whole, _ = model(tokens, torch.tensor([frames]))
        close(recognizer.log_probs(tokens[0]), whole, 1e-4)


# ------------------------------------------------------------------------------------------ errors

class Evil:
    """Unpickling it creates a file."""
    path = Path(SCRATCH.name) / "evil"

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_loading_never_runs_a_strangers_code():
    path, tokens = new_folder() / "trap.pt", letter_tokens(train=["MEN"])
    for kind, load in (("codec", Codec.load), ("asr", Recognizer)):
        torch.save({"kind": kind, "config": Evil()}, path)
        refused("damaged", load, path)
    np.save(tokens / "train" / "0.npy", np.array([Evil()], object), allow_pickle=True)
    refused("allow_pickle=False", TokenSet, tokens, ["train"])
    assert not Evil.path.exists()


def test_a_checkpoint_that_lacks_something_is_refused():
    for source, load, names in ((small_codec(), Codec.load, ("config", "model")),
                                (small_asr(), Recognizer, ("flags", "meta", "text", "model"))):
        whole, path = torch.load(source, weights_only=True), new_folder() / "part.pt"
        for name in names:
            torch.save({key: value for key, value in whole.items() if key != name}, path)
            refused("not a whole", load, path)
        whole["model"].popitem()
        torch.save(whole, path)
        refused("not a whole", load, path)


def test_scripts_end_bad_input_with_one_line():
    lost, audio, mel = new_folder() / "lost", next(corpus().rglob("*.flac")), ["--features", "mel"]
    half, other = lost.with_name("half.pt"), small_codec(seed=1)
    half.write_bytes(other.read_bytes()[:5000])
    strange = [new_folder() for _ in range(4)]
    (strange[0] / "train.jsonl").write_text('{"path": "a.wav", "sentence": "HELLO"}\n')
    (strange[1] / "train.jsonl").write_text('{\n  "audio_filepath": "a.wav"\n}\n')
    (strange[2] / "train.tsv").write_text("path\tsentence\n")
    write(strange[3] / "a.wav", 0.1 * noise(4000))
    for stage, what, *flags in (
            (codec, "no such folder", "--corpus", lost),
            (codec, "--train lost: no such subset", "--corpus", corpus(), "--train", "lost"),
            (codec, f"{lost.parent}: no audio", "--corpus", corpus(), lost.parent),
            (codec, "line 1 has path, sentence", "--corpus", strange[0]),
            (codec, "line 1 has no JSON object", "--corpus", strange[1]),
            (codec, "holds train.tsv", "--corpus", strange[2]),
            (codec, "holds a.wav", "--corpus", strange[3]),
            (codec, "at most 32768", "--quantizer", "rvq", "--codebook-size", 40_000),
            (codec, "no effect without --reconstruct", "--codec", other),
            (codec, "has no effect with --reconstruct", "--reconstruct", audio, "out.wav"),
            (tokenize_corpus, "needs a dev subset", "--corpus", strange[3].parent, "--train",
             strange[3].name, *mel),
            (tokenize_corpus, "damaged", "--corpus", corpus(), "--codec", half),
            (tokenize_corpus, "no codec", "--corpus", corpus(), "--codec", small_asr()),
            (tokenize_corpus, "--noise lost", "--corpus", corpus(), *mel, "--noise", "lost"),
            (train_asr, "tokenize_corpus.py", "--tokens", lost),
            (train_asr, "--codebooks 3", "--tokens", letters(), "--codebooks", 3),
            (train_asr, "without a language", "--tokens", letters(), "--lang-token"),
            (train_asr, "--replace has no effect on mel", "--tokens", tokens_with_copies(),
             "--replace", 0.1),
            (evaluate, "letters", "--asr", small_asr(), "--tokens", letters()),
            (evaluate, "lost", "--asr", small_asr(), "--test", "lost"),
            (evaluate, "--beam has no effect", "--asr", small_asr(), "--beam", 9),
            (evaluate, "codec", "--asr", small_asr(), "--codec", other, "--audio", audio)):
        refused(what, stage, *flags, "--out", lost)
    assert [path.name for path in lost.parent.rglob("*.pt")] == ["half.pt"]


def test_ctrl_c_ends_with_one_line():
    for stage, name in ((codec, "train"), (train_asr, "train"), (evaluate, "evaluate")):
        told = io.StringIO()
        with mock.patch.object(stage, name, side_effect=KeyboardInterrupt), redirect_stderr(told):
            try:
                stage.main([])
            except SystemExit as end:
                assert end.code == 130
        assert told.getvalue().strip().count("\n") == 0 and "same command" in told.getvalue()


# --------------------------------------------------------------------------- README and published

HOME = Path(__file__).resolve().parent
STAGES = {"codec": codec, "tokenize_corpus": tokenize_corpus, "train_asr": train_asr,
          "evaluate": evaluate}


def test_every_printed_command_is_one_that_the_scripts_accept():
    pages = [HOME / "README.md", HOME / "results" / "README.md"]
    texts = [page.read_text("utf-8") for page in pages] + [m.__doc__ for m in STAGES.values()]
    commands = re.findall(r"python (\w+)\.py([^\n&#`|;]*)", "\n".join(texts))
    assert len(commands) > 25
    for name, flags in commands:
        if name in STAGES and "--help" not in flags:
            STAGES[name].parse(shlex.split(flags))


def test_the_next_command_continues_the_run():
    out = new_folder() / "codec"
    printed = run(codec, "--corpus", corpus(), "--train", "dev", *CODEC, "--out", out)
    for stage, expected in ((tokenize_corpus, {"corpus": [str(corpus())], "train": ["dev"]}),
                            (train_asr, {"tokens": str(out.parent / "tokens")}),
                            (evaluate, {"asr": str(out.parent / "asr" / "asr.pt")})):
        name, flags = re.search(r"next: python (\w+)\.py (.*)", printed).groups()
        args = vars(stage.parse(shlex.split(flags)))
        assert STAGES[name] is stage and args | expected == args
        more = ["--epochs", 1] if stage is train_asr else []
        printed = run(stage, *shlex.split(flags), *more)


def test_numbers_of_the_pages_are_those_of_the_study():
    run(study, "tables")
    known = (HOME / "results" / "tables.md").read_text("utf-8").replace("+", "")
    for page in ("README.md", "results/README.md"):
        for number in re.findall(r"[\d.]+ \([\d.]+-[\d.]+\)", (HOME / page).read_text("utf-8")):
            assert number in known, f"{page}: {number}"


def test_own_report_is_drawn_and_the_codebook_that_spells_is_found():
    report = Path(new_folder() / "report.json")
    report.write_text(json.dumps(ask("report", "--asr", letter_asr())))
    if importlib.util.find_spec("matplotlib"):
        assert "learning.png" in run(study, "figures", report)
        assert report.with_name("learning.png").stat().st_size > 5000
    on_time = Recognizer.log_probs
    for late in 0, 2:           # frames after the letter that the recognizer writes it
        with (mock.patch.object(Recognizer, "log_probs", lambda *a: on_time(*a).roll(late, 1)),
              mock.patch.object(study, "save", lambda *saved: found.append(saved))):
            found = []
            run(study, "content", letter_asr())
        ((_, entries),) = found
        first, second = entries[str(letter_asr())]["character"]
        assert first > 1.2 and abs(second) < 0.3, (late, first, second)


def test_published_weights_read_the_sample_as_before():
    blocks = re.findall(r"```python\n(.*?)```", (HOME / "README.md").read_text("utf-8"), re.S)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(blocks[0], {})
    expected = json.loads((HOME / "results" / "mini-librispeech" / "sample.json").read_text())
    assert expected["text"] in printed.getvalue()
    wav = read_audio(HOME / "results" / "listen" / "original.flac")
    tokens = Codec.load(HOME / "results" / "mini-librispeech" / "codec.pt").encode(wav[None])
    same = tokens[0] == torch.tensor(expected["tokens"])
    assert same.float().mean() > 0.95                   # other processors may flip a few
    recognizer = Recognizer(HOME / "results" / "mini-librispeech", "cpu")
    log_probs = recognizer.log_probs(torch.tensor(expected["tokens"]).T)[0, ::16, :8]
    close(log_probs, torch.tensor(expected["log_probs"]), 1e-2)


def main() -> None:
    """Run the tests, or those whose names contain an argument; exit with 1 if one failed."""
    tests = [test for name, test in globals().items() if name.startswith("test_")
             and any(part in name for part in sys.argv[1:] or [""])]
    failed = 0
    for test in tests:
        began, result = time.time(), "ok"
        torch.manual_seed(0)
        try:
            test()
        except (Exception, SystemExit):
            traceback.print_exc(file=sys.stdout)
            failed, result = failed + 1, "FAILED"
        print(f"{result:6} {time.time() - began:5.1f} s  {test.__name__}", flush=True)
    print(f"{len(tests) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
