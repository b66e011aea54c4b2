"""Latents that live on the CPU and are copied to the compute device while their layer is at work.

On CUDA the next layer's are copied ahead, from page-locked memory and on a stream of their own; on any other device a
layer's are copied when it asks. Not measured on a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .latents import Latents

Pair = tuple[Latents, Latents]  # of keys and of values


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that copies to `device` run on, beside the one that computes; None where copies wait their turn.

    One for all caches: a stream can be neither copied nor pickled, a cache can.
    """
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@dataclass
class Copies:
    """Latents on the compute device, or on their way there.

    Attributes:
        latents: of keys and of values.
        arrived: what the computation has to wait for; None if they are there.
    """

    latents: Pair
    arrived: torch.cuda.Event | None = None

    def ready(self) -> Pair:
        """The latents; what is queued for computation from now on finds them there."""
        if self.arrived is not None:
            compute = torch.cuda.current_stream(self.latents[0].device)
            compute.wait_event(self.arrived)
            for tensor in (t for latents in self.latents for t in latents.held):
                tensor.record_stream(compute)  # so that the side stream, which made it, does not reuse it too early
        return self.latents


def copy_now(latents: Pair, device: torch.device) -> Copies:
    """Copies on `device`; the latents themselves if they lie there."""
    return Copies(tuple(x.on(device) for x in latents))


def copy_ahead(latents: Pair, device: torch.device) -> Copies | None:
    """[`copy_now`], beside what `device` computes; None where it has no side stream.

    Starts after what is queued for computation by now, so that no earlier layer's copies are overwritten under it.
    """
    side = side_stream(device)
    if side is None:
        return None
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        return Copies(copy_now(latents, device).latents, side.record_event())


def to_cpu(latents: Latents, device: torch.device) -> Latents:
    """On the CPU, in page-locked memory if `device`, where they will be read, is a GPU; what is there already stays.

    Waits for the copy, since operations on the CPU may follow at once.
    """
    latents = latents.to("cpu")
    return latents.pinned() if device.type == "cuda" else latents
