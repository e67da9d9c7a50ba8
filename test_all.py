"""The promises of this project, one test each, on small audio that the tests make themselves.

    python test_all.py                  # all, about a minute on two cores; pytest runs them, too
    python test_all.py noise resume     # those with one of these words in their names
"""

import gzip
import hashlib
import http.server
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
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import soundfile as sf
import torch

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
HOME = Path(__file__).resolve().parent
PAGES = {page: (HOME / page).read_text("utf-8") for page in ("README.md", "results/README.md")}
STAGES = {stage.__name__: stage for stage in (codec, tokenize_corpus, train_asr, evaluate)}
SCRATCH = tempfile.TemporaryDirectory()     # removed when Python ends
torch.set_num_threads(1)                    # the models are so small that threads slow them down
FOUR = list(product(("mel", "time"), ("fsq", "rvq")))
FSQ, RVQ, MEL = ["--quantizer", "fsq"], ["--codebook-size", 64], ["--features", "mel"]
CODEC = ["--steps", 5, "--batch", 2, "--crop", 0.5, "--codebooks", 4]
COPIES = [*MEL, "--hop", 160, "--speeds", 0.5, "--equalize", 5, "--noise", "white", "--copies", 2]
READING = "--epochs 5 --batch 3 --lr .006 --time-masks 0 --feature-masks 0 --subsampling 1".split()
new_folder = lambda: Path(tempfile.mkdtemp(dir=SCRATCH.name))
noise = lambda *shape, seed=0: torch.randn(shape, generator=torch.Generator().manual_seed(seed))
close = lambda a, b, tolerance=1e-5: torch.testing.assert_close(a, b, atol=tolerance, rtol=0)
read_json = lambda path: json.loads(path.read_text("utf-8"))
read_rows = lambda path: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
write_manifest = lambda path, *rows: path.write_text(
    "\n".join(json.dumps({"text": "HELLO"} | row) for row in rows))


def run(stage, *arguments) -> str:      # what main() printed; ValueError: the line that ended it
    printed, told, device = io.StringIO(), io.StringIO(), ["--device", "cpu"]
    try:
        with redirect_stdout(printed), redirect_stderr(told):
            stage.main([*map(str, arguments), *(device if stage is not study else [])])
    except SystemExit as error:         # with a text, or a number after argparse or Ctrl-C
        line = f"{told.getvalue().strip().split('error: ')[-1]} ({error})"
        raise ValueError(error.code if isinstance(error.code, str) else line)
    return printed.getvalue()


def made(stage, *arguments) -> Path:            # a new folder, --out, with what main() wrote
    out = new_folder() / "made" / "for it"
    run(stage, *arguments, "--out", out)
    return out


def refused(what: str, function, *arguments) -> None:       # with one line that says so
    message = "no error"
    try:
        function(*arguments)
    except ValueError as error:
        message = str(error)
    assert what in message and "\n" not in message, f"{what!r} is not in {message!r}"


def full_disk(library, after: int):             # its save() works so many times, then half of it
    def save(*what, works=library.save):
        if library.save.call_count <= after:
            return works(*what)
        next(each for each in what if isinstance(each, Path)).write_bytes(b"half")
        raise RuntimeError("disk full")                             # as torch.save says it
    return mock.patch.object(library, "save", side_effect=save)


def write(path: Path, samples, rate=16_000, **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.asarray(samples), rate, **more)
    return path


def same_weights(path: Path, model: dict) -> bool:              # at the precision of the file
    saved = torch.load(path, weights_only=True)["model"]
    return all(torch.equal(value, model[name].to(value.dtype)) for name, value in saved.items())


@cache
def corpus() -> Path:       # synthetic speech in LibriSpeech's layout: 8, 3 and 3 utterances
    folder = new_folder()
    voices = {"train": range(100, 108), "dev": range(120, 123), "test": range(123, 126)}
    with mock.patch.multiple(codec, VOICES=voices, UTTERANCES=dict.fromkeys(voices, 1)):
        codec.make_synthetic(folder)
    return folder


@cache
def small_codec(encoder="mel", quantizer="fsq", seed=0) -> Path:
    flags = ["--corpus", corpus(), "--encoder", encoder, *CODEC, "--seed", seed]
    return made(codec, *flags, *(RVQ if quantizer == "rvq" else FSQ)) / "codec.pt"


def tokenize(out: Path, *flags, source=None) -> Path:
    usual = ["--corpus", source or corpus(), "--workers", 0, "--out", out]
    run(tokenize_corpus, *([] if "mel" in flags else ["--codec", small_codec()]), *usual, *flags)
    return out


def letter_tokens(frames=3, **texts) -> Path:       # codebook 0 spells the texts of each subset
    folder, rng = new_folder(), np.random.default_rng(0)
    for subset, lines in texts.items():
        (folder / subset).mkdir()
        rows = []
        for i, text in enumerate(lines):
            codes = np.repeat([ord(letter) % 32 for letter in f" {text}"], frames)
            array = np.int16(np.stack([codes, rng.integers(0, 32, len(codes))], 1))
            np.save(folder / subset / f"{i}.npy", array)
            item = Utterance(str(i), text, "", f"s{i % 6}", "a.wav", len(codes) / 40)
            rows.append(item._asdict() | {"frames": len(codes), "array": f"{subset}/{i}.npy"})
        write_manifest(folder / f"{subset}.jsonl", *rows)
    books = rng.standard_normal((2, 32, 8)) * [[[1]], [[0.3]]]
    np.save(folder / "codebooks.npy", books.astype(np.float32))
    meta = {"codec": "letters", "codebooks": 2, "codebook_size": 32, "dim": 8}
    write_manifest(folder / "meta.json", train_asr.read_meta(small_tokens()) | meta)
    return folder


@cache
def letters() -> Path:
    rng, words = np.random.default_rng(1), "MAN TEN CAT SEE ROOM FOX RED BLUE".split()
    texts = [" ".join(rng.choice(words, 3)) for _ in range(47)]
    return letter_tokens(train=texts[:30], dev=texts[30:35], test=texts[35:])


small_tokens = cache(lambda: tokenize(new_folder()))
tokens_with_copies = cache(lambda: tokenize(new_folder(), *COPIES))
letter_asr = cache(lambda: made(train_asr, "--tokens", letters(), *READING) / "asr.pt")
small_asr = cache(lambda: made(
    train_asr, "--tokens", small_tokens(), "--epochs", 1, "--codebooks", 3) / "asr.pt")
train_set = lambda folder, *flags: TrainSet(
    train_asr.parse(["--tokens", str(folder), *map(str, flags)]), train_asr.read_meta(folder))
SMALL = dict(num_codebooks=3, codebook_size=20, dim=8, size="tiny")
make_asr = lambda **more: CodecASR(12, **SMALL | more).eval()
make_latent = lambda time=60: noise(4, 16, time) * torch.linspace(2, 0.2, 16)[:, None]  # (B, D, T)


def test_printed_commands_are_accepted_and_printed_numbers_are_those_of_the_study():
    texts = [*PAGES.values(), *(stage.__doc__ for stage in STAGES.values())]
    commands = re.findall(r"(?:python|torchrun \S+) (\w+)\.py([^\n&#`|;]*)", "\n".join(texts))
    for name, flags in commands:
        if name in STAGES and "--help" not in flags:
            STAGES[name].parse(shlex.split(flags))
    defaults = [[value for value in vars(stage.parse([])).values()
                 if isinstance(value, (int, float))] for stage in STAGES.values()]
    assert defaults == [[1.0, 8, 1024, 500, 8, 0.001, False, 0], [400, 0.0, 1, 1, 0],
                        [0, 1, 8, 0, 1, 0.0, 0.0, 3000, 256, False, 20, 40.0, 0.003, 0],
                        [False, 500, 3.0, 0.0, 0.5, 0]]
    with mock.patch.object(study, "write_atomically"):
        known = run(study, "tables")
    assert known == (HOME / "results/tables.md").read_text("utf-8") + "\n"
    for page, text in PAGES.items():
        for number in re.findall(r"[-+\d.]+ \([-\d.]+(?: to |-)[-\d.]+\)", text):
            assert number.lstrip("+") in known.replace("+", ""), f"{page}: {number}"


def test_the_next_command_continues_the_run():
    out = new_folder() / "codec"
    printed = run(codec, "--corpus", corpus(), "--train", "dev", *CODEC, *FSQ, "--out", out)
    for stage, expected, more in (
            (tokenize_corpus, {"corpus": [str(corpus())], "train": ["dev"]}, []),
            (train_asr, {"tokens": str(out.parent / "tokens")}, ["--epochs", 1]),
            (evaluate, {"asr": str(out.parent / "asr")}, [])):
        name, flags = re.search(r"next: python (\w+)\.py (.*)", printed).groups()
        args = vars(stage.parse(shlex.split(flags)))
        assert STAGES[name] is stage and args | expected == args
        printed = run(stage, *shlex.split(flags), *more)


def test_published_weights_read_the_sample_as_before():
    published, printed = HOME / "results/mini-librispeech", io.StringIO()
    with redirect_stdout(printed):
        exec(re.search(r"```python\n(.*?)```", PAGES["README.md"], re.S)[1], {})
    expected = read_json(published / "sample.json")
    assert expected["text"] in printed.getvalue()
    wav, found = read_audio(HOME / "results/listen/original.flac"), torch.tensor(expected["tokens"])
    same = Codec.load(published / "codec.pt").encode(wav[None])[0] == found
    assert same.float().mean() > 0.95                   # other processors may flip a few
    log_probs = Recognizer(published, "cpu").log_probs(found.T)[0, ::16, :8]
    close(log_probs, torch.tensor(expected["log_probs"]), 1e-2)


def test_own_report_is_drawn_and_the_codebook_that_spells_is_found():
    report = made(evaluate, "--asr", letter_asr()) / "report.json"
    assert not find_spec("matplotlib") or "learning.png" in run(study, "figures", report)
    on_time = Recognizer.log_probs
    for late in 0, 2:           # frames after the letter that the recognizer writes it
        with (mock.patch.object(Recognizer, "log_probs", lambda *a: on_time(*a).roll(late, 1)),
              mock.patch.object(study, "save") as save):
            run(study, "content", letter_asr())
        first, second = save.call_args.args[1][str(letter_asr())]["character"]
        assert first > 1.2 and abs(second) < 0.3, (late, first, second)


def test_a_stopped_run_resumes_as_if_uninterrupted_and_may_grow_but_not_change():
    speech = ["--corpus", corpus() / "train", "--train", "100", *RVQ, "--codebook-size", 16,
              "--codebooks", 2, "--steps", 105, "--batch", 1, "--crop", 0.1, "--out", new_folder()]
    reading = ["--tokens", letters(), "--epochs", 3, "--batch", 10, "--curriculum", 5,
               "--replace", 0.1, "--noisy-embedding", 0.3, "--out", new_folder()]
    for stage, file, flags, saved, other, length, start, end in (   # 100: a plain folder of audio
            (codec, "codec.pt", speech, 2, ("--strides", 400), "--steps", 100, 105),
            (train_asr, "asr.pt", reading, 4, ("--codebooks", 1), "--epochs", 2, 3)):
        with full_disk(torch, after=saved) as save:
            refused("disk full", run, stage, *flags)                # at the end
        assert f" {start} of {end} on " in run(stage, *flags)
        for name in (file, "resume.pt"):
            assert same_weights(flags[-1] / name, save.call_args.args[0]["model"]), name
        for name, value in (other, ("--lr", 0.1), ("--seed", 1)):
            refused(name, run, stage, *flags, name, value)
        assert f" {end} of {end + 1} on " in run(stage, *flags, length, end + 1)
        refused(length, run, stage, *flags)
    refused("trained on codec", run, train_asr, *reading, "--epochs", 4, "--tokens", small_tokens())
    early, late, _ = read_rows(speech[-1] / "log.jsonl")            # of 100, five, and one step
    assert late["mel"] < 0.9 * early["mel"]


def test_adversarial_training_of_a_finished_codec_changes_its_decoder_alone():
    published = HOME / "results/mini-librispeech/codec.pt"      # of RVQ, with fewer flags than now
    for path, more, depths in ((small_codec("mel", "fsq"), [*CODEC, *FSQ], []),
                               (published, ["--batch", 2], [True, True])):
        out = shutil.copytree(path.parent, new_folder() / "codec")
        flags = ["--corpus", corpus(), *more, "--adversarial", "--steps", 2, "--crop", 0.1]
        with (mock.patch.object(ResidualVQ, "random_depth", autospec=True,
                                side_effect=ResidualVQ.random_depth) as depth,
              mock.patch.object(codec, "Crops", side_effect=codec.Crops) as crops):
            run(codec, *flags, "--out", out)
        used = [(a[0][0].parts[-4], *a[1:], *more.values()) for _, a, more in crops.mock_calls]
        assert used == [("train", 0, 1600, 2), ("dev", 0, 40_000, 32)]  # seed, samples, batch
        assert [call.args[0].training for call in depth.call_args_list] == depths
        assert {"adversarial", "matching"} < read_rows(out / "log.jsonl")[0].keys()
        before, after = Codec.load(path), Codec.load(out / "codec.pt")
        assert before.fingerprint == after.fingerprint
        assert not torch.equal(before.decoder.head[1].weight, after.decoder.head[1].weight)
    (out / "resume.pt").unlink()
    refused("without its resume.pt", run, codec, *flags, "--steps", 3, "--out", out)


SCRIPT = """
import functools, os, sys, torch, codec, train_asr
dist, nets, start_codebooks = torch.distributed, [], codec.start_codebooks
dist.init_process_group = functools.cache(dist.init_process_group)
dist.destroy_process_group = lambda: None                       # once, for both stages
codec.start_codebooks = lambda net, crops: nets.append(net) or start_codebooks(net, crops)
codec.ResidualVQ.decay = codec.ResidualVQ.dead_below = 0.5      # codes die within three steps
train_asr.fast_dtype = lambda device: torch.float32
out, corpus, *flags = sys.argv[1:]
codec.main(["--corpus", corpus, "--quantizer", "rvq", "--codebooks", "2", "--codebook-size", "32",
            "--steps", "3", "--batch", "4", "--device", "cpu", "--out", out + "/codec"])
torch.save({"model": nets[0].quantizer.state_dict()}, out + f"/books{os.environ['RANK']}.pt")
train_asr.main([*flags, "--device", "cpu", "--out", out + "/asr"])
dist.barrier()
"""


def test_two_processes_learn_what_one_learns():
    two, reading = new_folder(), ["--tokens", letters(), *READING, "--batch", 6, "--epochs", 2]
    (two / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*map(str, [*torchrun, two / "script.py", two, corpus(), *reading])]
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOME)}
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with mock.patch.object(train_asr, "fast_dtype", lambda device: torch.float32):
        augmented = made(train_asr, *reading, "--replace", 0.3, "--curriculum", 0, "--seed", 1)
        one = made(train_asr, *reading)
    losses = lambda path: [row["loss"] for row in read_rows(path / "log.jsonl")]
    found, stored = losses(one) + losses(augmented), [4.4062, 2.6127, 4.1253, 2.1544]
    assert np.allclose(losses(one), losses(two / "asr"), 1e-4) and np.allclose(found, stored, 1e-3)
    books = torch.load(two / "books1.pt", weights_only=True)["model"]
    assert same_weights(two / "books0.pt", books)       # RVQ's, with revived codes


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


def test_fsq_reaches_all_codes_and_rounds_to_the_nearest_in_float32():
    tokens = GroupFSQ(1).encode(noise(1, 4, 100_000)).unique()
    assert torch.equal(tokens, torch.arange(1000))
    usage, perplexity = usage_and_perplexity(tokens[None, None, :500], 1000)
    assert usage == 0.5 and abs(perplexity - 500) < 0.1         # half of the codes, all alike
    close(GroupFSQ(1)(noise(1, 1, 50).expand(1, 4, 50)).loss, torch.tensor(0.1 * 12 / 16))
    error = GroupFSQ(4)(make_latent()).latent - make_latent().tanh()
    assert error.unflatten(1, (4, 4))[:, :, 1:].abs().max() < 0.252     # five levels, -1 to 1
    quantizer, rough = GroupFSQ(4), make_latent(time=500).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result, tokens = quantizer(rough), quantizer.encode(rough)
    assert result.latent.dtype == torch.float32 and torch.equal(tokens, result.tokens)
    assert torch.equal(tokens, quantizer.encode(rough.float()))


def test_rvq_passes_the_decoders_gradient_once_and_every_level_pulls_on_the_encoder():
    latent, quantizer = make_latent().requires_grad_(), make_rvq()
    result = quantizer(latent)
    (gradient,) = torch.autograd.grad(result.latent.sum(), latent, retain_graph=True)
    close(gradient, torch.ones_like(latent))
    (gradient,) = torch.autograd.grad(result.loss, latent)
    pulls = [latent.detach() - quantizer.decode(result.tokens[:, :n]) for n in (1, 2, 3, 4)]
    close(gradient, sum(pulls) / 4 * 2 / latent.numel(), 1e-7)


def test_codes_without_use_die_after_53_steps_and_move_to_the_data_each_to_its_own_frame():
    latents, dead = [5 + noise(8, 2, 50, seed=n) for n in range(53)], range(3, 60)
    quantizer = make_rvq(2, 1, 64).train()
    quantizer.embed[0, 3:61] = quantizer.ema_sum[0, 3:61] = 1e6     # far from the data
    quantizer.ema_count[0, dead] = 1e-4                             # but code 60 was in use
    for step, latent in enumerate(latents):
        assert quantizer.ema_count[0, 60] < 1.01 and quantizer.embed[0, 60].min() > 1e5, step
        tokens = quantizer(latent).tokens
        if step == 0:
            moved, frames = quantizer.embed[0, dead], latent.transpose(1, 2).flatten(0, 1)
            assert torch.cdist(moved, frames).min(1).values.max() < 0.1
            assert torch.pdist(moved).min() > 1e-4
    assert len({*tokens.flatten().tolist()} & {*dead}) > 20 and quantizer.embed[0, 60].max() < 100


def test_kmeans_leaves_no_zero_or_double_code_at_deep_levels():
    for book in make_rvq(16, 8, 32).codebooks():
        assert book.norm(dim=1).min() > 1e-3 and torch.pdist(book).min() > 1e-4


def test_random_depth_leaves_each_utterance_its_first_codebooks():
    for learning, decay in ((True, 1.0), (False, 0.97)):        # either way, the codebooks stay
        quantizer, depths = make_rvq().train(), set()
        quantizer.learning, quantizer.decay, quantizer.dropout = learning, decay, 1.0
        before, result = quantizer.embed.clone(), quantizer(noise(60, 16, 6))
        assert torch.equal(quantizer.embed, before)
        for tokens, latent in zip(result.tokens, result.latent):
            first = [quantizer.decode(tokens[None, :n])[0] for n in (1, 2, 3, 4)]
            depths |= {[torch.allclose(latent, each, atol=1e-4) for each in first].index(True)}
        assert depths == {0, 1, 2, 3}
    quantizer.dropout = 0.5                             # of half of the utterances
    depth = quantizer.random_depth(8000).float()
    close((depth == 4).float().mean(), torch.tensor(0.625), 0.03)


def test_networks_and_losses_give_the_stored_values_and_one_frame_per_hop():
    wav, other, values = 0.1 * noise(2, 16_000), 0.1 * noise(2, 16_000, seed=1), []
    torch.manual_seed(0)
    judge = codec.Discriminator()
    losses = codec.generator_losses(judge, wav, other).values()
    losses = *losses, codec.MelDistance()(wav, other), codec.discriminator_loss(judge, wav, other)
    close(torch.stack(losses), torch.tensor([0.9933, 0.2757, 0.6638, 0.9939]), 1e-4)
    for kind, hop in product(FOUR, (400, 200)):
        model = Codec(*kind, strides=(2, 4, 5, hop // 40))
        made = model.decoder(noise(2, model.quantizer.dim, 40))
        values += [model.encoder(wav).abs().mean().item(), made.std().item()]
        model.eval()
        assert model.hop == hop and model.frame_rate == 16_000 / hop
        for samples in (1, hop, hop + 1, 7 * hop - 1):
            tokens, frames = model.encode(0.1 * noise(2, samples)), -(-samples // hop)
            assert tokens.shape == (2, 8, frames)
            assert model.decode(tokens[:, :2]).shape == (2, frames * hop)
    assert round(Codec(quantizer="fsq").bitrate) == 3189 and model.bitrate == 6400
    stored = [0.7163, 0.04042, 0.7021, 0.04027, 0.7091, 0.04009, 0.7459, 0.04001,
              0.8005, 0.03943, 0.8009, 0.03986, 0.7948, 0.04120, 0.7985, 0.04059]
    assert np.allclose(values, stored, rtol=2e-3), values


def test_windows_of_a_long_recording_give_the_tokens_of_the_whole():
    wav = 0.1 * noise(1, 40 * 16_000) * torch.linspace(-6, 6, 40 * 16_000).sin()
    for kind in FOUR:
        model = Codec.load(small_codec(*kind))
        whole = model.quantizer.encode(model.encoder(wav))
        flipped = (model.encode(wav) != whole).any(1).float().mean()
        assert flipped <= 0.001 and len(whole.unique()) > 20, f"{kind}: {flipped:.2%} of frames"


def test_fingerprint_follows_from_the_flags_and_changes_with_the_encoder_alone():
    one, other = Codec.load(small_codec()), Codec.load(small_codec())
    other.load_state_dict({name: value.half() for name, value in one.state_dict().items()})
    next(other.decoder.parameters()).data += 0.01
    report = read_json(small_codec().with_name("report.json"))
    assert one.fingerprint == other.fingerprint == report["fingerprint"]
    next(other.encoder.parameters()).data += 0.01
    assert one.fingerprint != other.fingerprint
    first, again = small_codec("mel", "rvq"), small_codec.__wrapped__("mel", "rvq")     # not cached
    assert Codec.load(first).fingerprint == Codec.load(again).fingerprint


def test_reconstruction_is_as_long_as_the_original_and_the_report_measures_dev_speech():
    assert 1 < read_json(small_codec().with_name("report.json"))["mel_distance"] < 30
    source = write(new_folder() / "in.wav", 0.1 * noise(1234))
    flags = ["--codec", small_codec(), "--reconstruct", source, source.with_name("out.flac")]
    for books in 0, 2:
        run(codec, *flags, "--codebooks", books)
        assert sf.info(flags[-1]).frames == 1234
    refused("codec.pt has 4", run, codec, *flags, "--codebooks", -1)


def test_any_rate_format_and_channel_count_becomes_16_khz_mono():
    home, at = new_folder(), np.arange(48_000)
    for name, subtype, rate, channels in (
            ("a.wav", "PCM_U8", 8000, 1), ("b.wav", "PCM_16", 44_100, 2),
            ("c.flac", "PCM_24", 48_000, 8), ("d.ogg", "VORBIS", 22_050, 1)):
        tone, expected = (0.5 * np.sin(2 * np.pi * 440 * at[:n] / n) for n in (rate, 16_000))
        write(home / name, np.stack([tone] * channels, 1), rate, subtype=subtype)
        close(read_audio(home / name)[500:-500], torch.tensor(expected[500:-500]).float(), 0.03)
    assert read_audio(write(home / "e.wav", [[0.5, 0.25]], subtype="FLOAT")).tolist() == [0.375]
    path = write(home / "f.wav", at[:16_000] / 20_000, subtype="FLOAT")
    assert torch.equal(read_audio(path, seconds=0.25, at=0.5), read_audio(path)[6000:10_000])


def test_no_voice_and_no_sentence_is_in_two_subsets():
    home, owner = new_folder(), {}
    wav = codec.speak(["MAN", "TEN"], 100, np.random.default_rng(0))
    assert len(wav) == 13_184 and abs(np.diff(wav[5000:5500]).std() - 0.00818) < 1e-5
    with (mock.patch.object(codec, "speak"), mock.patch.object(codec.sf, "write"),      # no audio
          redirect_stderr(io.StringIO())):
        for _ in range(2):                  # a corpus that is there is left as it is
            codec.prepare("synthetic", home, [])
    for path in home.rglob("*.trans.txt"):
        subset, speaker = path.relative_to(home).parts[:2]
        for name in (speaker, *(line.split(" ", 1)[1] for line in path.read_text().splitlines())):
            assert owner.setdefault(name, subset) == subset
    assert [[*owner.values()].count(name) for name in ("train", "dev", "test")] == [620, 63, 104]


def test_download_is_checked_and_unpacked_inside_its_folder():
    def download(home, member, md5="", number="31", subset="train-clean-5"):    # with this member
        archive = home / number / f"{subset}.tar.gz"
        archive.parent.mkdir(exist_ok=True)
        with tarfile.open(archive, "w:gz") as tar:
            for name in (f"LibriSpeech/{subset}/1/1/1-1-0000.flac", member):
                tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        md5 = {subset: md5 or hashlib.md5(archive.read_bytes()).hexdigest()}
        serve = partial(http.server.SimpleHTTPRequestHandler, directory=home)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with (mock.patch.multiple(codec, OPENSLR=f"http://127.0.0.1:{server.server_port}", MD5=md5),
              redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO())):
            codec.fetch_librispeech(home / "data", subset)
    home = new_folder()
    refused("checksum", download, home, "README.TXT", "0" * 32)
    assert not [path for path in home.rglob("data/**/*") if path.is_file()]
    download(home, "README.TXT")
    download(new_folder(), "README.TXT", "", "12", "test-other")
    assert [path.name for path in home.rglob("data/**/*.*")] == ["1-1-0000.flac"]
    with suppress(ValueError, tarfile.TarError):
        download(new_folder(), "../../evil.txt")
    assert not list(Path(SCRATCH.name).rglob("evil.txt"))


def test_three_layouts_are_read_as_one_corpus_and_no_name_leads_out_of_the_output():
    home = new_folder()
    libri, superb, rows = home / "libri/train/7/1", home / "superb/x/deu", home / "rows"
    names = ["c.wav", "../up.wav", "../rows/../up.wav", f"{home}/up.wav", "x" * 200 + ".wav"]
    for path in (*(libri / f"7-1-{name}" for name in ("0.flac", "0.wav", "1.wav", "2.wav")),
                 superb / "wav/b.wav", *(rows / name for name in names)):
        write(path, 0.1 * noise(4000))
    (libri / "7.trans.txt").write_bytes(b"\xef\xbb\xbf7-1-0 HELLO  THERE\r\n7-1-1\r\n7-1-9 GO\r\n")
    for speaker in "a-1", "a-2":                        # whose files have the same names
        path = write(home / "libri/train" / speaker / "u-1.wav", 0.1 * noise(4000))
        path.with_name("a.trans.txt").write_text("u-1 HI\n")
    (superb / "transcript_train.txt").write_text(
        f"b 0.2 GUTEN TAG\n../b 0.2 RAUS\n\nkurz\n{'ü' * 101} 0.2 LANG\n", "utf-8")
    good = {"audio_filepath": "c.wav", "text": "GRÜN", "lang": "de", "speaker": 0, "duration": "1"}
    bad = [{"speaker": "NO PATH"}, good | {"text": ""}, good | {"offset": 1.0, "duration": 0.1}]
    write_manifest(rows / "train.jsonl", good, *bad, *({"audio_filepath": n} for n in names[1:]))
    before, corpora = sorted(home.rglob("*")), [home / "libri", home / "superb", rows]
    out = made(tokenize_corpus, "--corpus", *corpora, "--dev", "train", *MEL, "--workers", 0)
    found, skipped = read_rows(out / "train.jsonl"), (out / "train.skipped.txt").read_text()
    assert [(row["id"], row["text"], row["lang"], row["speaker"]) for row in found[:5]] == [
        ("7-1-0", "HELLO THERE", "", "7"), ("a-1-u-1", "HI", "", "a-1"),
        ("a-2-u-1", "HI", "", "a-2"), ("b", "GUTEN TAG", "deu", ""), ("c", "GRÜN", "de", "0")]
    assert len(skipped.splitlines()) == 4 + 3 + 3 and "too long" in skipped, skipped
    assert len(found) == len(list(out.rglob("*.npy"))) == 5 + 4
    assert sorted(home.rglob("*")) == before


def test_token_folder_holds_what_the_recognizer_needs_and_takes_no_other_tokens():
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
    for name, value in (
            ("codec", small_codec(seed=1)), ("noise", "pink"), ("seed", 1), ("speeds", 0.9),
            ("features", "mel"), ("corpus", shutil.copytree(corpus(), new_folder() / "corpus"))):
        refused(f"tokens with {name}", tokenize, small_tokens(), f"--{name}", value)
    refused("tokens with snr", tokenize, tokens_with_copies(), *COPIES, "--snr", 1, 2)


def test_encodec_gives_eight_codebooks_at_75_hz():
    def encode(wav):                            # its codes are the loudness of each frame
        (kbps,) = model.set_target_bandwidth.call_args.args
        frames = torch.nn.functional.pad(wav, (0, -wav.shape[2] % 320)).unflatten(2, (-1, 320))
        codes = (frames.abs().mean(3) * 1000).long()                        # (1, 1, T)
        return [(codes.repeat(1, int(kbps / 0.75), 1), None)]
    layers = [mock.Mock(**{"_codebook.embed": noise(1024, 128)})] * 32
    more = {"encoder.ratios": [8, 5, 4, 2], "quantizer.vq.layers": layers}
    model = mock.Mock(sample_rate=24_000, encode=encode, **more)
    model.to.return_value.eval.return_value = model
    sys.modules["encodec"] = mock.Mock(**{"EncodecModel.encodec_model_24khz.return_value": model})
    out = tokenize(new_folder(), "--codec", "encodec", "--train", "dev", "--dev", "test")
    asr = made(train_asr, "--tokens", out, "--epochs", 1, "--subsampling", 2)
    row = read_rows(out / "test.jsonl")[0]
    array = Recognizer(asr, "cpu").front_end(read_audio(row["audio"]))
    assert np.array_equal(np.load(out / row["array"]), array)
    assert array.shape == (math.ceil(row["duration"] * 75), 8) and len(np.unique(array)) > 9


def test_copies_are_made_of_the_training_subsets_and_not_scored():
    rows = read_rows(tokens_with_copies() / "train.jsonl")
    arrays = {row["id"]: np.load(tokens_with_copies() / row["array"]) for row in rows}
    assert len(rows) == 4 * 8 and len(read_rows(tokens_with_copies() / "dev.jsonl")) == 3
    assert len(TokenSet(tokens_with_copies(), ["train"]).rows) == 8
    for row in rows:
        array, plain = arrays[row["id"]], arrays[row["copy_of"] or row["id"]]
        assert array.dtype == np.float16 and array.shape == (row["frames"], 80)
        late = np.random.default_rng([0, *row["id"].encode()]).integers(400) * (row["speed"] < 1)
        assert len(array) == math.ceil((sf.info(row["audio"]).frames / row["speed"] - late) / 160)
        assert row["noisy"] == (row["speed"] == 1 and not np.array_equal(array, plain))
    out = tokenize(new_folder(), *COPIES, "--train", "dev", "--dev", "test")
    before = read_rows(out / "dev.jsonl")
    tokenize(out, *COPIES, "--test", "dev")         # a test subset, added later, takes nothing away
    assert read_rows(out / "dev.jsonl") == before and train_asr.read_meta(out)["train"] == ["dev"]


def test_noise_and_equalization_are_as_strong_as_asked_and_follow_from_seed_and_id_alone():
    wav, item = 0.1 * noise(20_000), Utterance("a", "", "", "", Path("a.wav"))
    speech = [item._replace(id=path.stem, audio=path) for path in sorted(corpus().rglob("*.flac"))]
    for kind in ("white", "pink", "babble", str(corpus() / "dev")):
        add, seeded = (Noise([kind], [7.0, 7.0], speech, seed) for seed in (0, 1))      # at 7 dB
        noisy = add(wav, item)
        ratio = wav.square().mean() / (noisy - wav).square().mean()
        assert abs(10 * torch.log10(ratio) - 7) < 0.01, kind
        assert torch.equal(add(wav, item), noisy), kind
        assert not any(map(noisy.equal, (seeded(wav, item), add(wav, item._replace(id="b"))))), kind
    mine = [each._replace(speaker="me") for each in speech[:3]]
    few, more = (Noise(["babble"], [7, 7], mix, 0) for mix in (speech[3:], speech[3:] + mine))
    assert few(wav, mine[0]).equal(more(wav, mine[0]))                  # no babble of one's own
    rng, again = (np.random.default_rng(3) for _ in range(2))
    click = tokenize_corpus.equalize(torch.arange(20_000).eq(9000).float(), 5.0, rng)
    late, gain = again.integers(400), 20 * torch.fft.rfft(click, 20_000).abs().log10().double()
    assert len(click) == 20_000 - late and click.abs().argmax() == 9000 - late
    octaves = [round(2**octave * 78.125) for octave in range(8)]                # 62.5 Hz to 8 kHz
    close(gain[octaves], torch.tensor(again.normal(0, 5, 8)), 0.1)


def test_tokenizing_continues_after_an_interruption_and_after_a_wrong_command():
    out, home = new_folder(), new_folder()
    with full_disk(np, after=5):
        refused("disk full", tokenize, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("train/[!.]*.npy")}
    assert 0 < len(before) < 8 and not (out / "train.jsonl").exists()
    tokenize(out, source=f"{corpus()}/")
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    assert read_rows(out / "train.jsonl") == read_rows(small_tokens() / "train.jsonl")
    write_manifest(home / "train.jsonl", {"audio_filepath": "a.wav"})
    refused("can be used", tokenize, home / "out", *MEL, "--dev", "train", "--corpus", home)
    assert len(read_rows(tokenize(home / "out", *MEL) / "train.jsonl")) == 8
    for samples in (8000, 4000):                    # the recording was replaced
        write(home / "a.wav", noise(samples))
        tokenize(home / "new", *MEL, "--dev", "train", source=home)
        assert [row["frames"] for row in read_rows(home / "new/train.jsonl")] == [samples / 400]
    os.truncate(home / "a.wav", 5000)
    refused("can be used", tokenize, home / "new", *MEL, "--dev", "train", "--corpus", home)
    with mock.patch.dict(codec.CORPORA, x=(corpus(), dict(train=[], dev=[], test=["dev", "test"]))):
        (tokenize(home / "x", *MEL, source="x") / "test.jsonl").unlink()
        assert (tokenize(home / "x", *MEL, source="x") / "test.jsonl").exists()


def test_unreadable_audio_is_named_and_silence_gives_no_nan():
    home = new_folder()
    wav = write(home / "good.wav", 0.1 * noise(40_000)).read_bytes()
    flac = write(home / "good.flac", 0.1 * noise(40_000)).read_bytes()
    for name, data in (("half.wav", wav[:40_000]), ("half.flac", flac[:30_000]), ("empty.wav", b""),
                       ("header.wav", wav[:40]), ("text.wav", b"words"), ("zeros.ogg", bytes(5000)),
                       ("wrong.flac", flac[:3000] + bytes(3000) + flac[6000:]),
                       ("stream.flac", flac[:21] + b"\xf0" + bytes(4) + flac[26:]),
                       ("phone.m4a", b"\0\0\0\x20ftypM4A " + bytes(5000))):
        (home / name).write_bytes(data)
    for name, samples, rate in (("nan.wav", [0.1, math.nan], 16_000), ("none.wav", [], 16_000),
                                ("loud.wav", [0.1, 3e8], 16_000), ("rate.wav", [0.1], 48_001)):
        write(home / name, samples, rate, subtype="FLOAT")
    bad = [path for path in home.iterdir() if path.stem != "good"] + [home, home / "missing.wav"]
    good = [home / "good.wav", write(home / "silent.wav", np.zeros(8000))]
    write_manifest(home / "train.jsonl", *({"audio_filepath": path.name} for path in bad + good))
    assert good[0] in codec.find_audio(home.parent, f"{home.name}/train")
    out = tokenize(new_folder(), "--features=latent", "--noise=pink", "--dev=train", source=home)
    rows, skipped = read_rows(out / "train.jsonl"), (out / "train.skipped.txt").read_text()
    assert [row["copy_of"] or row["id"] for row in rows] == ["good", "silent"] * 2
    assert all(np.isfinite(np.load(out / row["array"])).all() for row in rows)
    crops = codec.Crops(bad + good, 0, 800, 2)
    assert all(crops[n].isfinite().all() for n in range(99)) and {*crops.unreadable} == {*bad}
    assert codec.Crops([home / "wrong.flac"], 0, 800, 99).batch_of(0).isfinite().all()   # in part
    halves = torch.stack([crops.batch_of(3, rank, 2) for rank in (0, 1)], 1)    # of two processes
    assert halves.flatten(0, 1).equal(crops.batch_of(3))
    for path in bad:
        refused(path.name, read_audio, path)
        assert path.name in skipped


def test_batched_log_probs_equal_single():
    token_len = torch.tensor([41, 1, 2, 7, 30])         # what stands behind must not matter
    for kind, subsampling in product(({}, {"aggregate": "stack"}, {"num_codebooks": 0}), (1, 2, 4)):
        model = make_asr(size="small", subsampling=subsampling, **kind)
        tokens = torch.randint(20, (5, 41, 3)) if model.num_codebooks else noise(5, 41, 8)
        log_probs, out_len = model(tokens, token_len)
        for i, n in enumerate(token_len):
            alone, length = model(tokens[i:i + 1, :n], token_len[i:i + 1])
            assert out_len[i] == length == -(-n // subsampling)
            close(log_probs[i, :out_len[i]], alone[0])
        early, late = model(tokens, token_len, both=True)[0]
        model.feedback.bias.data += noise(144)          # which the second half of the blocks reads
        other = model(tokens, token_len, both=True)[0]
        assert late.equal(log_probs) and early.equal(other[0]) and not late.equal(other[1])
        assert not model.train()(tokens, token_len)[0].equal(other[1])              # dropout


def test_embedding_starts_as_the_quantized_latent():
    for quantizer, name, used in product((make_rvq(), GroupFSQ(4)), ("sum", "stack"), (2, 4)):
        tokens, books = quantizer.encode(make_latent())[:, :used], quantizer.codebooks()
        model = make_asr(num_codebooks=used, codebook_size=books.shape[1], dim=16, aggregate=name)
        frames = tokens.transpose(1, 2)                             # (B, T, Q)
        model.start_from(books, frames.flatten(0, 1))
        emb = model.embed(frames, torch.tensor([60] * 4)) * model.deviation + model.mean
        latent = quantizer.decode(tokens).transpose(1, 2)
        rows = torch.cat([book[index] for book, index in zip(books, tokens.unbind(1))], 2)
        close(emb, {"sum": latent, "stack": rows}[name], 1e-4)


def test_augmentation_is_as_strong_as_asked_within_the_utterance_and_not_in_evaluation():
    model, inputs = make_asr(), (torch.randint(20, (2, 50, 3)), torch.tensor([50, 20]))
    plain = model(*inputs)[0]
    model.augment = Augment(4, 8, 2, 2, replace=0.5, noisy_embedding=1.0)
    assert torch.equal(model(*inputs)[0], plain)
    assert not torch.allclose(model.train()(*inputs)[0], plain, atol=1e-3)
    model.augment.strength = 0.0
    close(model(*inputs)[0], plain)
    noisy = Augment(noisy_embedding=0.3).hide(torch.zeros(40, 200, 8), torch.tensor([200] * 40))
    close(torch.stack([noisy.mean(), noisy.std()]), torch.tensor([0.0, 0.3]), 0.01)
    codes = Augment(replace=0.3).replace_codes(torch.full((9, 900, 8), -1), 1000)
    close((codes >= 0).float().mean(), torch.tensor(0.3), 0.01)
    lengths, ones = torch.tensor([100] * 20 + [200] * 20), torch.ones(40, 200, 8)
    spans = Augment().spans(200, lengths, 300, lengths / 4)             # (B, n, T)
    assert (spans.sum(2) <= 0.25 * lengths[:, None] + 1).all() and not spans[:20, :, 100:].any()
    close(spans.float().mean() / 0.75, torch.tensor(0.125), 0.01)       # half as wide on average
    at = (spans * torch.arange(200)).sum(2) / spans.sum(2)              # anywhere
    close(at[20:].nanmean(), torch.tensor(99.5), 2.0)
    hidden = Augment(codebook_masks=1).visible(torch.zeros(40, 200, 4), lengths) == 0
    assert (hidden.any(1).sum(1) <= 1).all() and 0.1 < hidden[20:].float().mean() * 4 < 0.4
    for masks, dim in ((Augment(time_masks=4), 2), (Augment(feature_masks=1), 1)):
        emb = masks.hide(ones, lengths)
        assert (emb.amax(dim) == emb.amin(dim)).all() and 0.01 < (emb == 0).float().mean() < 0.33
    assert (Augment(1, longest_mask=2.0).hide(ones, lengths) == 0).any(2).sum(1).max() == 2


def test_text_units_give_text_and_language_back():
    texts = {"en": "MEN SEE", "de AT": "ÜBER DEN FLUß", "he": "מים ומלח", "et": "KAAPPI"}
    rows = [{"text": text, "lang": lang} for lang, text in texts.items()]
    for units, row in product(("char", "unigram", "bpe"), rows):
        size = ["--vocab-size", "40"] if units != "char" else []
        args = train_asr.parse(["--units", units, "--lang-token", *size])
        model = train_asr.SentencePieceProcessor(model_proto=train_asr.train_units(rows, args))
        ids = model.encode(f"<|{row['lang']}|> {row['text']}")
        path = [unit for i in ids for unit in (i, i, 0)]        # repeats merge, blanks vanish
        found = train_asr.greedy(model, torch.eye(len(model))[path])
        assert train_asr.split_language(found) == (row["lang"], row["text"]), found


def test_an_epoch_takes_one_variant_of_each_utterance_that_ctc_can_align():
    data, noisy = train_set(tokens_with_copies(), "--batch", 10), []
    for number in range(60):
        groups = data.epoch(number, 1.0)
        rows = [data.rows[i] for group in groups for i in group]
        assert len({row["copy_of"] or row["id"] for row in rows}) == len(rows) == 8
        noisy += [row["noisy"] for row in rows]
        assert all(data.take(group, "cpu")[0][..., 0].numel() <= 1000 for group in groups)
    assert abs(np.mean(noisy) - train_asr.NOISY_SHARE) < 0.08
    assert not any(data.rows[i]["noisy"] for group in data.epoch(0, 0.0) for i in group)
    short = letter_tokens(frames=1, train=["MEN", "SEE", "MAN"])        # EE needs a blank between
    data = train_set(short)
    used = [data.rows[i]["text"] for group in data.epoch(0, 1.0) for i in group]
    assert sorted(used) == ["MAN", "MEN"] and "dropped: 1 utterances" in data.notes
    refused("nothing to train on", train_set, short, "--subsampling", 2)


def test_recognizer_learns_to_read_and_stores_its_mean_posterior_as_prior():
    log = read_rows(letter_asr().with_name("log.jsonl"))
    assert log[-1]["loss"] < 0.1 * log[0]["loss"] and log[-1]["dev_cer"] < 0.05
    recognizer, data = Recognizer(letter_asr(), "cpu"), TokenSet(letters(), ["train"])
    probs = torch.cat([recognizer.log_probs(array)[0].exp() for array in data.arrays])
    close(torch.load(letter_asr(), weights_only=True)["log_prior"].exp(), probs.mean(0), 2e-3)


def test_tables_start_frozen_random_or_as_the_first_codebooks():
    books, random = torch.tensor(np.load(letters() / "codebooks.npy")), []
    meta, data = train_asr.read_meta(letters()), train_set(letters())
    for seed in range(40):
        flags = ["--tokens", str(letters()), "--embedding", "random", "--seed", str(seed)]
        model = train_asr.start_model(train_asr.parse(flags), meta, data)
        random.append(model.embedding.tables.detach().view(2, 32, 8))
    assert not torch.isclose(random[0], books).any()
    random = torch.cat(random, 1)
    close(random.std(1) / books.std(1), torch.ones(2, 8), 0.1)
    close((random.mean(1) - books.mean(1)) / books.std(1), torch.zeros(2, 8), 0.1)
    for kind, most in (("codebook", 0.002), ("frozen", 0)):
        flags = ["--tokens", letters(), "--embedding", kind, "--codebooks", 1, "--epochs", 1]
        saved = torch.load(made(train_asr, *flags) / "resume.pt", weights_only=True)
        moved = (saved["model"]["embedding.tables"] - books[0]).abs().max()
        assert most / 20 <= moved <= most               # slowly, or not at all


def test_optimizers_follow_their_schedules_and_muon_makes_orthogonal_steps():
    args = codec.parse(["--steps", "1000"])
    rates = [codec.learning_rate(step, args) for step in (0, 49, 99, 100, 500, 1000)]
    assert np.allclose(rates, [1e-5, 4.972e-4, 9.77e-4, 9.768e-4, 5.25e-4, 5e-5], 0, 1e-6)
    args = train_asr.parse(["--lr", "1", "--curriculum", "100"])
    assert [train_asr.ramp(step, args) for step in (0, 50, 100, 200)] == [0, 0.5, 1, 1]
    rates = [train_asr.share_of_peak(n, n / 2000, 300) for n in (0, 150, 299, 300, 1000, 2000)]
    assert np.allclose(rates, [1 / 300, 0.4965, 0.9459, 0.9455, 0.5, 0.0], 0, 1e-3)
    (muon, *_), adam = (each.param_groups for each in train_asr.make_optimizers(make_asr(), args))
    assert [group["peak"] for group in (muon, *adam)] == [2.5, 1, 0.1]
    matrices = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((96, 24), (24, 96), (96, 24))]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    train_asr.Muon(matrices, 1.0).step()
    for matrix in matrices:
        u, _, v = torch.linalg.svd(matrix.grad, full_matrices=False)
        length = max(1.0, len(matrix) / matrix.shape[1]) ** 0.5
        along = (u.T @ -matrix.detach() @ v.T / length).diagonal()
        assert 0.6 < along.min() and along.max() < 1.3


def test_error_rates_are_those_of_jiwer_and_intervals_wider_where_errors_come_by_speaker():
    def make_score(refs, hyps, speakers):
        rows = [{"text": r, "speaker": f"s{i % speakers}", "lang": ""} for i, r in enumerate(refs)]
        return Score(rows, hyps)
    refs, hyps = ["THE CAT SAT", "A DOG", "SO", "NIL"], ["THE CAT SAT DOWN", "A", "GO", ""]
    summary = make_score(refs, hyps, 4).summary(0)
    assert [summary["wer"], summary["cer"]] == [
        evaluate.jiwer.wer(refs, hyps), evaluate.jiwer.cer(refs, hyps)]
    assert summary["by_speaker"]["s0"] == [1, 3, 5, 11]         # errors and length: words, letters
    refs, numbers, widths = ["ABCDEFGHIJ"] * 300, np.arange(300), []
    for bad in (numbers % 10 < 3, numbers // 10 % 10 < 3):      # three of ten speakers; all alike
        score = make_score(refs, ["ABCDE" if b else "ABCDEFGHIJ" for b in bad], 10)
        widths.append(np.diff(score.summary(0)["cer_interval"]))
    assert widths[0] > 0.1 > 5 * widths[1]
    result = lambda **speakers: {"test": {"": {"by_speaker": speakers}}}    # one of whom is in both
    assert study.difference(result(a=[2] * 4, c=0), result(b=0, a=[9, 9, 1, 2]), "")[0] == 50
    rows = [dict(id=f"{i}", text="A", lang="", speaker="one"[i // 5 * 3:]) for i in range(9)]
    score = Score(rows, "A" * 9)        # five utterances of one speaker, four of unknown speakers
    assert score.groups.max() == 4 and [*score.summary(0)["by_speaker"]] == ["one", *"5678"]


def test_noise_is_added_to_audio_that_is_encoded_anew():
    data = TokenSet(small_tokens(), ["test"])
    args = evaluate.parse(["--noise", "white", "--snr", "300", "0"])
    clean, *noisy = evaluate.conditions(Recognizer(small_asr(), "cpu"), data, args)
    for (_, snr, arrays), least, most in zip(noisy, (0.0, 0.2), (0.0, 1.0)):
        changed = torch.cat(arrays) != torch.cat(clean[2])
        assert least <= changed.float().mean() <= most, snr
    flags = ["--asr", small_asr(), "--test", "test", "dev", "--noise=white", "--snr=10", "--out"]
    out, heard = new_folder(), [noise(4000)] * 5 + [ValueError("gone")]
    with mock.patch.object(evaluate, "read_audio", side_effect=heard):
        refused("gone", run, evaluate, *flags, out)
    (found,) = read_json(out / "report.json")["runs"].values()          # what is measured is kept
    assert [*found["test"]] == ["test", "test, white 10 dB", "dev"]


def test_reports_say_what_ran_where_and_test_subsets_alone_are_enough():
    asr, home = small_asr(), new_folder()
    texts = [row["text"] for row in read_rows(small_tokens() / "test.jsonl")]
    with mock.patch.object(evaluate, "greedy", side_effect=[*texts, "", "", ""]):    # right, wrong
        report = read_json(made(evaluate, "--compare", asr.parent, asr) / "compare.json")
    found, again = report["runs"].values()
    assert found["bitrate"] == 0.75 * Codec.load(small_codec()).bitrate         # 3 of 4 codebooks
    assert [run["test"]["test"]["cer_minus_first"] for run in (found, again)] == [[0, 0], [1, 1]]
    shutil.copytree(corpus() / "test", home / "test")
    tokens = tokenize(home / "tokens", source=home)
    refused("no train subset", made, train_asr, "--tokens", tokens)
    report = read_json(made(evaluate, "--asr", asr, "--tokens", tokens) / "report.json")
    assert report["runs"][str(asr)]["test"]["test"]["utterances"] == 3


def test_transcription_is_what_the_tokens_give():
    data, home = TokenSet(small_tokens(), ["test"]), new_folder()
    paths = [write(home / f"{number}/same.flac", sf.read(row["audio"])[0])
             for number, row in enumerate(data.rows[:2])]
    drawn = ["--plots", "--out", home / "out"] if find_spec("matplotlib") else []
    printed = run(evaluate, "--asr", small_asr(), "--audio", home / "lost.wav", home, *drawn)
    assert f"skipped: {home / 'lost.wav'}" in printed
    recognizer, pictures = Recognizer(small_asr().parent, "cpu"), list(home.glob("out/*.png"))
    for array, path in zip(data.arrays, paths):
        assert f"{path}: {recognizer.recognize(array)}\n" in printed
    assert len(pictures) == len(drawn) - 1 if drawn else not pictures
    for path in pictures:               # a PNG says its width and height, which are 960 by 560
        assert f"wrote {path}" in printed and path.read_bytes()[16:24].hex() == "000003c000000230"


def test_beam_search_writes_words_of_the_language_model_that_the_weights_favor():
    if not find_spec("flashlight"):
        return print("skipped: needs pip install flashlight-text")
    home, units = new_folder(), Recognizer(letter_asr(), "cpu").units
    for name, red in (("rare", -8), ("common", -0.05)):
        text = (f"\\data\\\nngram 1=6\nngram 2=1\n\n\\1-grams:\n-1\t<s>\t0\n-1\t</s>\n-9\t<unk>\n"
                f"-1\tMAN\t0\n-1\tCAT\t0\n{red}\tRED\n\n\\2-grams:\n-1\tMAN CAT\n\n\\end\\\n")
        (home / name).write_text(text)
    packed = gzip.compress((home / "rare").read_bytes())
    for name, data in ("rare", packed), ("cut", packed[:60]), ("no", b"hello"):
        (home / f"{name}.gz").write_bytes(data)
    path = [unit for i in units.piece_to_id([*"\u2581MAN\u2581CAT"]) for unit in (i, 0)]
    sure = 9 * torch.eye(len(units))[None, path] - 9
    long = torch.cat([sure.repeat(1, 130, 1), sure[:, [1] * 20], sure.repeat(1, 30, 1)], 1)
    doubt = sure.clone()                            # the second word may be RED as well
    doubt[0, (10, 12, 14), units.piece_to_id(["R", "E", "D"])] = -0.2
    for text, lm, log_probs, more, prior in (       # frequent letters need better evidence
            ("MAN CAT", "rare", sure, {}, 0), ("MAN CAT", "rare.gz", sure, {}, 0),
            (" ".join(160 * ["MAN CAT"]), "rare", long, {}, 0), ("MAN CAT", "rare", doubt, {}, 0),
            ("MAN RED", "common", doubt, {}, 0), ("MAN CAT", "common", doubt, {"lm_weight": 0}, 0),
            ("MAN RED", "rare", doubt, {"lm_weight": 0.0}, 5)):
        recognizer = Recognizer(letter_asr(), "cpu", home / lm, **more)
        recognizer.log_prior[units.piece_to_id("A")] += prior
        recognizer.log_probs = lambda tokens: log_probs
        assert recognizer.recognize(None) == text, (lm, more, prior)
    for path in letters() / "meta.json", home / "lost", home / "cut.gz", home / "no.gz":
        refused(f"--lm {path}: ", Recognizer, letter_asr(), "cpu", path)


def test_windows_of_a_long_recording_read_every_frame_once():
    recognizer = Recognizer(letter_asr(), "cpu")
    recognizer.meta |= {"hop": 1000}        # 16 Hz: the windows are 800 frames
    for subsampling, frames in product((1, 2), (1, 999, 2401)):
        recognizer.flags |= {"subsampling": subsampling}
        model = train_asr.build_model(recognizer.flags, recognizer.meta, len(recognizer.units))
        for block in model.blocks:      # without attention, a frame depends on its neighbors alone
            torch.nn.init.zeros_(block.attention.out.weight)
        recognizer.model, tokens = model.eval(), torch.randint(20, (1, frames, 2))
        close(recognizer.log_probs(tokens[0]), model(tokens, torch.tensor([frames]))[0], 1e-4)


def test_a_checkpoint_runs_no_strangers_code_and_lacks_nothing():
    path, evil, tokens = new_folder() / "part.pt", new_folder() / "evil", letter_tokens(train=["A"])
    trap = type("Trap", (), {"__reduce__": lambda self: (open, (str(evil), "w"))})()
    for kind, source, load, names in (
            ("codec", small_codec(), Codec.load, ("config", "model")),
            ("asr", small_asr(), Recognizer, ("flags", "meta", "text", "model"))):
        torch.save({"kind": kind, "config": trap}, path)
        refused("damaged", load, path)
        whole = torch.load(source, weights_only=True)
        parts = [{key: value for key, value in whole.items() if key != name} for name in names]
        for part in *parts, whole | {"model": dict([*whole["model"].items()][1:])}:
            torch.save(part, path)
            refused("an incomplete", load, path)
    np.save(tokens / "train" / "0.npy", np.array([trap], object), allow_pickle=True)
    refused("allow_pickle=False", TokenSet, tokens, ["train"])
    assert not evil.exists()


def test_scripts_end_bad_input_and_ctrl_c_with_one_line():
    lost, other, asr = new_folder() / "lost", small_codec(seed=1), small_asr()
    for what, name, text in (
            ('line 1 is {"path": "a.wav", "s', "train.jsonl", '{"path": "a.wav", "sentence": "A"}'),
            ("line 1 is {; each line needs", "train.jsonl", '{\n  "audio_filepath": "a.wav"\n}\n'),
            ("holds train.tsv", "train.tsv", "path\tsentence\n"), ("holds a.wav", "a.wav", "")):
        strange = new_folder()
        (strange / name).write_text(text)
        refused(what, run, codec, "--corpus", strange, "--out", lost)
    speech, no_dev = ["--corpus", corpus()], ["--corpus", strange.parent, "--train", strange.name]
    for stage, what, *flags in (
            (codec, "--train lost: no such subset", *speech, "--train", "lost"),
            (tokenize_corpus, "no such subset", *speech, "--test", corpus() / "test", *MEL),
            (codec, "most 8192", *RVQ, "--codebook-size", 9000), (codec, "seed", "--seed", 10**9),
            (tokenize_corpus, "needs a dev subset", *no_dev, *MEL), (codec, "above 0", "--lr", 0),
            (train_asr, "without a language", "--tokens", letters(), "--lang-token"),
            (train_asr, "no effect on mel", "--tokens", tokens_with_copies(), "--replace", 0.1),
            (train_asr, "vocab_size", "--tokens", letters(), "--units=bpe", "--vocab-size", 2),
            (train_asr, "at least 0", "--time-masks", -1), (train_asr, "above 0", "--epochs", 0),
            (tokenize_corpus, "a folder of --corpus", *MEL, "--corpus", os.path.relpath(lost)),
            (evaluate, "trained on codec", "--asr", asr, "--tokens", letters()),
            (evaluate, "on codec", "--asr", asr, "--codec", other, "--audio", corpus(), "--plots")):
        refused(what, run, stage, *flags, "--out", lost)
    assert not lost.exists()
    for stage, name in ((codec, "train"), (train_asr, "train"), (evaluate, "evaluate")):
        with mock.patch.object(stage, name, side_effect=KeyboardInterrupt):
            refused("repeat the command to finish (130)", run, stage)


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
