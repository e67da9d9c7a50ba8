"""The two quantizers: residual vector quantization (RVQ) and grouped finite scalar quantization (FSQ).

in   latent (B, D, T)     what an encoder says about each frame
out  tokens (B, Q, T)     Q whole numbers a frame, and the latent that they stand for

Legend: B utterances, D latent size, T frames, Q codebooks, K codes in each, N = B * T frames in one list.

Both keep one promise, on which the recogniser's embedding rests: `codebooks()` is a tensor (Q, K, D), and the
quantised latent of a frame is the SUM over q of row `tokens[q]` of codebook q.

RVQ  SoundStream, arXiv 2107.03312, section III-C.    FSQ  Mentzer et al., arXiv 2309.15505.
Both for speech recognition: Dhawan et al., arXiv 2407.03495, section 2.
"""

from math import gcd, prod
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Quantized(NamedTuple):
    latent: Tensor      # (B, D, T) quantised; its gradient goes to the encoder as if nothing had been rounded
    tokens: Tensor      # (B, Q, T) int64
    loss: Tensor        # () commitment loss, mean over levels; 0 for FSQ
    usage: Tensor       # (Q,) share of the K codes that this batch used
    perplexity: Tensor  # (Q,) exp(entropy) of this batch's codes: K when all are used alike, 1 when one is


def frame_mask(latent: Tensor, latent_len: Tensor | None) -> Tensor:
    """1 for real frames, 0 for padding: (B, T) float."""
    steps = torch.arange(latent.shape[2], device=latent.device).expand(latent.shape[0], -1)
    return torch.ones_like(steps).float() if latent_len is None else (steps < latent_len[:, None]).float()


def usage_and_perplexity(tokens: Tensor, mask: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """How evenly codes are used. tokens (B, Q, T), mask (B, T) -> usage (Q,), perplexity (Q,)."""
    tokens = tokens.transpose(0, 1).flatten(1)                  # (Q, N)
    counts = torch.zeros(len(tokens), codebook_size, device=tokens.device)
    counts.scatter_add_(1, tokens, mask.flatten().expand_as(tokens).contiguous())
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    entropy = -(share * share.clamp(min=1e-10).log()).sum(1)
    return (counts > 0).float().mean(1), entropy.exp()


class ResidualVQ(nn.Module):
    """Each codebook quantises what the one before left over.

    The codebooks learn by exponential moving averages (EMA), not by gradients; the encoder learns from the decoder
    through a straight-through estimator and from the commitment loss.
    """

    def __init__(self, dim: int = 128, num_codebooks: int = 8, codebook_size: int = 1024,
                 decay: float = 0.97, dead_below: float = 0.2, dropout: float = 0.5):
        """decay: of the EMA, a step. dead_below: a code is dead when used less than this fraction of uniform use. A code
        that the moving encoder left behind is found out within 53 steps; with the usual 0.99, and 0.03, it takes 350.
        dropout: share of training utterances quantised with only the first n codebooks, n random, so that the
        first n alone are a valid codec of a lower bitrate (SoundStream, section III-C)."""
        super().__init__()
        self.dim, self.num_codebooks, self.codebook_size = dim, num_codebooks, codebook_size
        self.decay, self.dead_below, self.dropout = decay, dead_below, dropout
        self.register_buffer("embed", torch.zeros(num_codebooks, codebook_size, dim))
        self.register_buffer("ema_sum", torch.zeros(num_codebooks, codebook_size, dim))
        self.register_buffer("ema_count", torch.zeros(num_codebooks, codebook_size))
        self.ready = False                                      # have the codebooks been initialised from data?

    def get_extra_state(self) -> Tensor:                        # `ready` is saved with the codebooks; it is no buffer,
        return torch.tensor(self.ready)                         # because asking a GPU for it would cost a wait a step

    def set_extra_state(self, state: Tensor) -> None:
        self.ready = bool(state)

    def codebooks(self) -> Tensor:
        return self.embed                                       # (Q, K, D)

    @torch.autocast("cuda", enabled=False)
    def forward(self, latent: Tensor, latent_len: Tensor | None = None) -> Quantized:
        batch, _, time = latent.shape
        mask = frame_mask(latent, latent_len)                   # (B, T)
        frames = latent.float().transpose(1, 2)                 # (B, T, D)
        if self.training and not self.ready:
            self.initialise(frames.detach()[mask > 0])
        depth = self.random_depth(batch, latent.device)         # (B,) codebooks that each utterance uses

        # Residuals are detached: each level's commitment loss then reaches the encoder once, at full strength; otherwise
        # only the first level's does (encodec issue 25).
        residual = frames.detach().reshape(-1, self.dim)        # (N, D)
        flat, quantised, loss, tokens = frames.reshape(-1, self.dim), torch.zeros_like(residual), 0.0, []
        for level in range(self.num_codebooks):
            index = nearest(residual, self.embed[level])        # (N,)
            code = F.embedding(index, self.embed[level])        # (N, D)
            active = (mask * (level < depth)[:, None]).flatten()            # (N,) frames that this level counts
            error = (flat - quantised - code).square().mean(1)  # gradient: flat only
            loss = loss + (error * active).sum() / active.sum().clamp(min=1)
            if self.training:
                self.update(level, residual, index, active)
            quantised = quantised + code * active[:, None]
            residual = residual - code
            tokens.append(index.view(batch, time))
        # One straight-through on the sum: one a level would multiply the decoder's gradient by Q.
        out = flat + (quantised - flat).detach()
        tokens = torch.stack(tokens, 1)
        out = out.view(batch, time, -1).transpose(1, 2)
        return Quantized(out, tokens, loss / self.num_codebooks,
                         *usage_and_perplexity(tokens, mask, self.codebook_size))

    def encode(self, latent: Tensor) -> Tensor:
        """latent (B, D, T) -> tokens (B, Q, T)."""
        residual = latent.float().transpose(1, 2).reshape(-1, self.dim)
        tokens = []
        for codebook in self.embed:
            tokens.append(nearest(residual, codebook))
            residual = residual - F.embedding(tokens[-1], codebook)
        return torch.stack(tokens).view(self.num_codebooks, latent.shape[0], latent.shape[2]).transpose(0, 1)

    def decode(self, tokens: Tensor) -> Tensor:
        """tokens (B, n, T), n <= Q: the first n levels -> latent (B, D, T)."""
        return sum(F.embedding(level, book) for level, book in zip(tokens.unbind(1), self.embed)).transpose(1, 2)

    def random_depth(self, batch: int, device: torch.device) -> Tensor:
        full = torch.full((batch,), self.num_codebooks, device=device)
        if not self.training or not self.dropout:
            return full
        some = torch.randint(1, self.num_codebooks + 1, (batch,), device=device)
        return torch.where(torch.rand(batch, device=device) < self.dropout, some, full)

    @torch.no_grad()
    def initialise(self, frames: Tensor, rounds: int = 10) -> None:
        """k-means, one level at a time, on what the levels before left over. frames (N, D)."""
        residual = frames[:16 * self.codebook_size]
        for level in range(self.num_codebooks):
            # A little noise tells copies apart where there are fewer frames than codes.
            pick = torch.randint(len(residual), (self.codebook_size,), device=residual.device)
            centres = residual[pick] + 0.01 * residual.std() * torch.randn_like(residual[pick])
            for _ in range(rounds):
                index = nearest(residual, centres)
                count = torch.zeros_like(self.ema_count[level]).index_add_(0, index, torch.ones_like(residual[:, 0]))
                total = torch.zeros_like(centres).index_add_(0, index, residual)
                centres = torch.where(count[:, None] > 0, total / count[:, None].clamp(min=1), centres)
            from_rank_0(centres)
            self.embed[level] = centres
            self.ema_count[level] = 1.0
            self.ema_sum[level] = centres
            residual = residual - centres[nearest(residual, centres)]
        self.ready = True

    @torch.no_grad()
    def update(self, level: int, residual: Tensor, index: Tensor, active: Tensor) -> None:
        """One EMA step of one codebook; then its dead codes move to where the data is.

        residual (N, D), index (N,), active (N,) with 1 for frames that count and 0 for the others."""
        count = torch.zeros_like(self.ema_count[level]).index_add_(0, index, active)
        total = torch.zeros_like(self.ema_sum[level]).index_add_(0, index, residual * active[:, None])
        if dist.is_initialized():
            dist.all_reduce(count)
            dist.all_reduce(total)
        self.ema_count[level].lerp_(count, 1 - self.decay)
        self.ema_sum[level].lerp_(total, 1 - self.decay)
        uniform = self.ema_count[level].mean()                  # what each code would have if all were used alike
        dead = self.ema_count[level] < self.dead_below * uniform
        moved = residual[torch.multinomial(active + 1e-9, self.codebook_size, replacement=True)]    # (K, D)
        from_rank_0(moved)
        # Count and sum move with the code: were they left, this very step would pull it back (espnet issue 6284).
        self.ema_count[level] = torch.where(dead, uniform, self.ema_count[level])
        self.ema_sum[level] = torch.where(dead[:, None], moved * uniform, self.ema_sum[level])
        self.embed[level] = self.ema_sum[level] / self.ema_count[level].clamp(min=1e-9)[:, None]


def nearest(frames: Tensor, codebook: Tensor) -> Tensor:
    """Index of the closest code. frames (N, D), codebook (K, D) -> (N,).

    |f - c|^2 = |f|^2 - 2 f.c + |c|^2, and the first term is the same for all codes: one matrix product is enough,
    where a broadcast N x K x D difference costs a hundred times more."""
    half_norm, found = codebook.square().sum(1) / 2, []
    for part in frames.split(2048):                             # parts that stay in the processor's cache
        distance = torch.addmm(half_norm, part, codebook.T, alpha=-1)
        # The best block of codes, then the best code in it: argmin over all, slow on a CPU, took a third of the time.
        blocks = distance.unflatten(1, (gcd(len(codebook), 32), -1))
        best = blocks.amin(2).argmin(1)
        inside = blocks[torch.arange(len(part), device=part.device), best].argmin(1)
        found.append(best * blocks.shape[2] + inside)
    return torch.cat(found)


def from_rank_0(tensor: Tensor) -> None:
    """With several processes, all continue with what process 0 drew."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)


class GroupFSQ(nn.Module):
    """The latent is cut into groups of a few numbers, and each number is rounded to one of a few levels.

    Nothing is learnt, so no code can die. The codebook of a group is implicit: its K = prod(levels) points.
    Always in float32: in bfloat16 half of the indices come out wrong.
    """

    def __init__(self, num_groups: int = 8, levels: tuple[int, ...] = (8, 5, 5, 5)):
        super().__init__()
        self.num_codebooks, self.levels = num_groups, tuple(levels)
        self.dim, self.codebook_size = num_groups * len(levels), prod(levels)
        width = torch.tensor(levels)
        self.register_buffer("width", width, persistent=False)
        # Index of a code in mixed radix: digit d counts basis[d] = levels[0] * ... * levels[d - 1].
        self.register_buffer("basis", torch.cat([torch.ones(1, dtype=torch.long), width.cumprod(0)[:-1]]),
                             persistent=False)

    def split(self, latent: Tensor) -> Tensor:
        """(B, D, T) -> (B, Q, T, d), d = D / Q numbers a group."""
        return latent.float().unflatten(1, (self.num_codebooks, -1)).transpose(2, 3)

    def merge(self, groups: Tensor) -> Tensor:
        """(B, Q, T, d) -> (B, D, T)."""
        return groups.transpose(2, 3).flatten(1, 2)

    def digits(self, groups: Tensor) -> Tensor:
        """Squash to (-half, half) and move even counts of levels by a half, so that rounding gives `levels` values.

        (..., d) floats -> (..., d) floats between 0 and levels - 1, not yet rounded (Mentzer et al., section 3.1)."""
        half = (self.width - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.width % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half)                      # latent 0 becomes value 0
        return torch.tanh(groups + shift) * half - offset + self.width // 2

    def values(self, digits: Tensor) -> Tensor:
        """Digits 0 .. levels - 1 -> the numbers that stand for them, in [-1, 1]."""
        return digits / (self.width // 2) - 1

    @torch.autocast("cuda", enabled=False)
    def forward(self, latent: Tensor, latent_len: Tensor | None = None) -> Quantized:
        soft = self.digits(self.split(latent))                  # (B, Q, T, d)
        hard = soft + (soft.round() - soft).detach()            # straight-through: the gradient of tanh remains
        tokens = (soft.detach().round().long() * self.basis).sum(-1)
        usage = usage_and_perplexity(tokens, frame_mask(latent, latent_len), self.codebook_size)
        return Quantized(self.merge(self.values(hard)), tokens, latent.new_zeros(()), *usage)

    def encode(self, latent: Tensor) -> Tensor:
        """latent (B, D, T) -> tokens (B, Q, T)."""
        return (self.digits(self.split(latent)).round().long() * self.basis).sum(-1)

    def decode(self, tokens: Tensor) -> Tensor:
        """tokens (B, n, T), n <= Q: the first n groups, the others at 0 -> latent (B, D, T)."""
        latent = self.merge(self.values(tokens[..., None] // self.basis % self.width))
        return F.pad(latent, (0, 0, 0, self.dim - latent.shape[1]))

    def codebooks(self) -> Tensor:
        """(Q, K, D): a group's points in its own slice of D, zeros elsewhere."""
        points = self.values(torch.arange(self.codebook_size, device=self.basis.device)[:, None] // self.basis % self.width)
        books = points.new_zeros(self.num_codebooks, self.codebook_size, self.num_codebooks, len(self.levels))
        for group in range(self.num_codebooks):
            books[group, :, group] = points
        return books.flatten(2)
