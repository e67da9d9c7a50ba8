"""Residual vector quantization (RVQ) and grouped finite scalar quantization (FSQ).

in   latent (B, D, T)     the encoder's description of each frame
out  tokens (B, Q, T)     Q integers per frame, and the quantized latent that they stand for

Legend: B utterances, D latent size, T token frames, Q codebooks, K codes in each, N = B * T frames,
d numbers in a group of FSQ. In the code, `y.mT` is y with its last two axes swapped.

Both quantizers satisfy one invariant, on which the recognizer's embedding relies: `codebooks()`
returns a tensor (Q, K, D), and the quantized latent of a frame is the SUM over q of row `tokens[q]`
of codebook q.

RVQ: SoundStream, arXiv 2107.03312, section III-C.  FSQ: Mentzer et al., arXiv 2309.15505.
Both as inputs of a speech recognizer: Dhawan et al., arXiv 2407.03495, section 2.
"""

from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Quantized(NamedTuple):
    latent: Tensor      # (B, D, T) quantized; gradients pass as if nothing had been rounded
    tokens: Tensor      # (B, Q, T) int64
    loss: Tensor        # () to be added to the codec's loss: commitment for RVQ, redundancy for FSQ


# ------------------------------------------------------------------------------------------- RVQ

def nearest(frames: Tensor, codebook: Tensor) -> Tensor:
    """Index of the closest code: frames (N, D), codebook (K, D) -> (N,).

    |f - c|^2 = |f|^2 - 2 f.c + |c|^2, and |f|^2 is the same for all codes: one matrix product is
    enough, a hundred times cheaper than an N x K x D tensor of differences.
    """
    half_norm = codebook.square().sum(1) / 2
    # Half of the distance, without |f|^2: (N, K).
    distance = torch.addmm(half_norm, frames, codebook.T, alpha=-1)
    return distance.min(1).indices          # on a CPU, faster than argmin(1)


class ResidualVQ(nn.Module):
    """Each codebook quantizes what the previous ones left over.

    The codebooks learn by exponential moving averages (EMA), not by gradients. The encoder learns
    from the decoder through a straight-through estimator, and from the commitment loss.
    """

    decay = 0.97        # of the EMA, per step
    # A code is dead when its use is below this share of uniform use. With decay 0.97, a code that
    # is no longer used falls below it after 53 steps; with the usual 0.99 and 0.03 after 350.
    dead_below = 0.2
    # Share of the training utterances quantized with only the first n codebooks, n random from 1
    # to Q, so that the first n alone are a valid codec of a lower bitrate (SoundStream, section
    # III-C).
    dropout = 0.5
    learning = True     # False: frozen, while a decoder learns alone

    def __init__(self, dim: int = 128, num_codebooks: int = 8, codebook_size: int = 1024):
        super().__init__()
        self.dim = dim
        self.num_codebooks = num_codebooks
        self.codebook_size = codebook_size
        self.register_buffer("embed", torch.zeros(num_codebooks, codebook_size, dim))
        self.register_buffer("ema_sum", torch.zeros(num_codebooks, codebook_size, dim))
        self.register_buffer("ema_count", torch.ones(num_codebooks, codebook_size))

    def codebooks(self) -> Tensor:
        """(Q, K, D)."""
        return self.embed

    def forward(self, latent: Tensor) -> Quantized:
        """latent (B, D, T) -> Quantized. In training, the codebooks learn from it.

        Call `initialize` before training: of codes that all begin at zero, most would not be used.
        """
        batch, _, time = latent.shape
        frames = latent.float().mT.flatten(0, 1)                            # (N, D)
        depth = self.random_depth(batch).repeat_interleave(time)            # (N,) levels in use

        # Every level's commitment loss starts from `frames`: through chained residuals, the
        # gradients of all levels but the first would cancel (encodec issue 25).
        residual = frames.detach()
        quantized = torch.zeros_like(residual)
        tokens = self.encode(latent.detach())           # (B, Q, T): all levels, whatever `depth` is
        loss = 0.0
        for level, index in enumerate(tokens.transpose(0, 1).flatten(1)):   # (N,)
            code = self.embed[level, index]                                 # (N, D)
            active = level < depth                  # (N,) does this utterance use this level?
            quantized = quantized + code * active[:, None]
            error = (frames - quantized).square().mean(1)                   # (N,)
            loss += (error * active).sum() / active.sum().clamp(min=1)
            if self.training and self.learning:
                self.update(level, residual, index, active)
            # Inactive frames, too: on the next level, `update` may move a dead code to one.
            residual = residual - code

        # One straight-through on the sum: one per level would multiply the gradient by Q.
        straight = frames + (quantized - frames).detach()
        straight = straight.unflatten(0, (batch, time)).mT
        return Quantized(straight, tokens, loss / self.num_codebooks)

    def encode(self, latent: Tensor) -> Tensor:
        """latent (B, D, T) -> tokens (B, Q, T)."""
        batch, _, time = latent.shape
        residual = latent.float().mT.flatten(0, 1)
        tokens = []
        for codebook in self.embed:
            index = nearest(residual, codebook)
            residual = residual - codebook[index]
            tokens.append(index.view(batch, time))
        return torch.stack(tokens, 1)

    def decode(self, tokens: Tensor) -> Tensor:
        """tokens (B, n, T), n <= Q: the first n levels -> latent (B, D, T)."""
        rows = [book[index] for book, index in zip(self.embed, tokens.unbind(1))]
        return sum(rows).mT

    def random_depth(self, batch: int) -> Tensor:
        """How many codebooks each utterance uses; outside training, all of them: (B,)."""
        device = self.embed.device
        drawn = torch.randint(1, self.num_codebooks + 1, (batch,), device=device)
        hit = torch.rand(batch, device=device) < self.dropout * self.training
        return torch.where(hit, drawn, self.num_codebooks)

    @torch.no_grad()
    def initialize(self, frames: Tensor):
        """k-means on frames (N, D), one level at a time, each on what the previous levels left.

        Needs at least eight frames per code: from fewer, the deeper levels would start as copies
        of single residuals, or as zeros.
        """
        residual = frames
        for level in range(self.num_codebooks):
            picked = torch.randint(len(residual), (self.codebook_size,), device=residual.device)
            centers = residual[picked]                                      # (K, D)
            # A little noise separates centers that began on the same frame.
            centers += 0.01 * residual.std() * torch.randn_like(centers)
            for _ in range(10):
                index = nearest(residual, centers)
                count, total = self.sums(residual, index)
                mean = total / count.clamp(min=1)[:, None]
                centers = torch.where(count[:, None] > 0, mean, centers)
            residual = residual - centers[nearest(residual, centers)]
            self.embed[level] = centers
            self.ema_sum[level] = centers       # of one frame each, as ema_count is 1

    def sums(self, frames: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Number and sum of the frames of each code: (N, D), (N,) -> (K,), (K, D)."""
        count = torch.bincount(index, minlength=self.codebook_size).float()
        total = frames.new_zeros(self.codebook_size, self.dim)
        return count, total.index_add_(0, index, frames)

    @torch.no_grad()
    def update(self, level: int, residual: Tensor, index: Tensor, active: Tensor):
        """One EMA step of one codebook, then move its dead codes to where the data is.

        residual (N, D); index (N,); active (N,), True for the frames that the codes learn from.
        """
        count, total = self.sums(residual[active], index[active])
        if dist.is_initialized():
            dist.all_reduce(count)
            dist.all_reduce(total)
        if not count.any():
            return                      # no utterance of this batch uses the level
        uniform = count.mean()      # the unit of counts: steps with few active frames weigh as much
        self.ema_count[level].lerp_(count / uniform, 1 - self.decay)
        self.ema_sum[level].lerp_(total / uniform, 1 - self.decay)

        # The n-th dead code moves to the n-th of the frames in random order, with a little noise:
        # of two identical codes, one would die again.
        dead = self.ema_count[level] < self.dead_below                      # (K,)
        frame = torch.randperm(len(residual), device=residual.device)
        # (K, D): a row for every code; only the rows of dead codes are used.
        moved = residual[frame[dead.cumsum(0) % len(frame)]]
        moved += 0.01 * residual.std() * torch.randn_like(moved)
        if dist.is_initialized():
            dist.broadcast(moved, 0)        # all processes take what process 0 drew
        # Count and sum move with the code: otherwise this very step would pull it back to where
        # it was (espnet issue 6284).
        self.ema_count[level, dead] = 1.0
        self.ema_sum[level, dead] = moved[dead]
        self.embed[level] = self.ema_sum[level] / self.ema_count[level, :, None]


# ------------------------------------------------------------------------------------------- FSQ

class GroupFSQ(nn.Module):
    """The latent is cut into groups of a few numbers, each rounded to one of a few levels.

    Nothing is learned, so no code can die. The codebook of a group is implicit: its
    K = prod(levels) points. Always computed in float32: in bfloat16, half of the indices come out
    wrong.
    """

    def __init__(self, num_groups: int = 8, levels: tuple[int, ...] = (8, 5, 5, 5)):
        super().__init__()
        self.num_codebooks = num_groups
        self.codebook_size = prod(levels)
        self.dim = num_groups * len(levels)
        sizes = torch.tensor(levels)
        # Index of a code in mixed radix: the place value of a digit is the product of the levels
        # before it.
        self.register_buffer("basis", sizes.cumprod(0) // sizes, persistent=False)
        self.register_buffer("levels", sizes, persistent=False)

    def digits(self, latent: Tensor) -> Tensor:
        """(B, D, T) -> (B, T, Q, d): numbers in 0 .. levels - 1, not yet rounded.

        tanh squashes to (-half, half); an even number of levels is shifted by 0.5, so that
        rounding gives exactly that many values (Mentzer et al., section 3.1).
        """
        groups = latent.float().mT.unflatten(2, (self.num_codebooks, -1))
        half = (self.levels - 1) * (1 + 1e-3) / 2       # 1e-3: atanh stays finite for 2 levels
        offset = 0.5 * (self.levels % 2 == 0)
        shift = torch.atanh(offset / half)                  # a latent of 0 becomes the value 0
        return torch.tanh(groups + shift) * half - offset + self.levels // 2

    def index(self, digits: Tensor) -> Tensor:
        """Digits (B, T, Q, d) -> tokens (B, Q, T)."""
        return (digits.round().long() * self.basis).sum(-1).mT

    def unpack(self, tokens: Tensor) -> Tensor:
        """Tokens (B, Q, T) -> digits (B, T, Q, d)."""
        return tokens.mT[..., None] // self.basis % self.levels

    def values(self, digits: Tensor) -> Tensor:
        """Digits (B, T, Q, d) -> the numbers in [-1, 1] that they stand for, (B, D, T)."""
        return (digits / (self.levels // 2) - 1).flatten(2).mT

    def forward(self, latent: Tensor) -> Quantized:
        """latent (B, D, T) -> Quantized."""
        soft = self.digits(latent)                                          # (B, T, Q, d)
        hard = soft + (soft.round() - soft).detach()        # straight-through, with tanh's gradient
        tokens = self.index(soft)
        # A weight of 3.0 lowers the mel distance, but raises the recognizer's error rate.
        return Quantized(self.values(hard), tokens, 0.1 * redundancy(latent.float()))

    def encode(self, latent: Tensor) -> Tensor:
        """latent (B, D, T) -> tokens (B, Q, T)."""
        return self.index(self.digits(latent))

    def decode(self, tokens: Tensor) -> Tensor:
        """tokens (B, n, T), n <= Q: the first n groups, the others at 0 -> latent (B, D, T)."""
        latent = self.values(self.unpack(tokens))
        return F.pad(latent, (0, 0, 0, self.dim - latent.shape[1]))

    def codebooks(self) -> Tensor:
        """(Q, K, D): each group's points in its own slice of D, zeros elsewhere."""
        codes = torch.arange(self.codebook_size, device=self.basis.device)
        # The codes serve as K frames of one group, (1, 1, K).
        points = self.values(self.unpack(codes[None, None]))[0].T           # (K, d)
        groups = torch.eye(self.num_codebooks, device=points.device)
        return torch.kron(groups, points).view(len(groups), -1, self.dim)


def redundancy(latent: Tensor) -> Tensor:
    """Squared correlation between different dimensions of the latent, summed over the ordered
    pairs and divided by D * D: (B, D, T) -> ().

    Without this term, FSQ's groups become redundant: 8 of 32 principal components held most of
    the variance. No published recipe that we know of has this term.
    """
    covariance = torch.cov(latent.transpose(0, 1).flatten(1), correction=0)         # (D, D)
    scale = covariance.diagonal().clamp(min=1e-6).rsqrt()
    correlation = covariance * scale * scale[:, None]
    return correlation.fill_diagonal_(0).square().mean()


# ----------------------------------------------------------------------------------------- usage

def usage_and_perplexity(tokens: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """How evenly the codes are used. tokens (B, Q, T) -> usage (Q,), perplexity (Q,).

    Usage is the share of the K codes that occur. Perplexity is exp(entropy): K when all codes
    occur equally often, 1 when only one does.
    """
    counts = torch.stack([torch.bincount(level.flatten(), minlength=codebook_size)
                          for level in tokens.unbind(1)])                   # (Q, K)
    share = counts / counts.sum(1, keepdim=True)
    entropy = torch.special.entr(share).sum(1)
    return (counts > 0).float().mean(1), entropy.exp()
