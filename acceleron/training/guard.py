"""Which steps are to be skipped, decided on the device: none waits for it."""

from typing import NamedTuple

import torch
from torch import Tensor

# A spike is a loss this many standard deviations above the running mean …
SPIKE_SIGMAS = 6.0
# … of about this many steps, and not before so many were seen.
SPIKE_HORIZON = 100


class Judgement(NamedTuple):
    """A step that was skipped, or whose loss was a spike."""

    step: int
    position: int  # in the stream of the data, where the step's batches begin
    loss: float
    grad_norm: float
    skipped: bool
    threshold: float  # of a spike; infinite until SPIKE_HORIZON steps were seen


class StepGuard:
    """Judges each step by its loss and its gradient norm, before the optimizer acts on them.

    The running mean and variance of the loss are exponentially weighted (Finch 2009, "Incremental calculation of
    weighted mean and variance"). A loss beyond the threshold enters them as the threshold, so that one spike does not
    hide the next, and a loss that stays high is soon no spike any more.

    Of the steps that were read, `in_a_row` is how many the last ones were that had to be skipped, and `last_good` the
    number of the last one that had not; `longest` is the most in a row among those that the last `read` returned.
    """

    def __init__(self, device: torch.device, skip_spikes: bool):
        self.skip_spikes = skip_spikes
        self.mean_variance_count = torch.zeros(3, dtype=torch.float64, device=device)
        self.in_a_row = self.longest = self.last_good = 0
        self._judged: list[tuple[int, int, Tensor]] = []

    def judge(self, step: int, position: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """loss and grad_norm: scalars. Returns whether to skip the step, as a bool on the device."""
        loss, grad_norm = loss.double(), grad_norm.double()
        mean, variance, count = self.mean_variance_count
        finite = loss.isfinite() & grad_norm.isfinite()
        threshold = torch.where(count >= SPIKE_HORIZON, mean + SPIKE_SIGMAS * variance.sqrt(), torch.inf)
        spike = finite & (loss > threshold)
        skipped = ~finite | spike if self.skip_spikes else ~finite

        rate = 1 / (count + 1).clamp(max=SPIKE_HORIZON)
        difference = torch.minimum(loss, threshold) - mean
        updated = (mean + rate * difference, (1 - rate) * (variance + rate * difference**2), count + 1)
        self.mean_variance_count = torch.where(finite, torch.stack(updated), self.mean_variance_count)
        figures = torch.stack([loss, grad_norm, threshold, skipped.double(), spike.double()])
        self._judged.append((step, position, figures))
        return skipped

    def read(self) -> list[Judgement]:
        """The steps since the last call that were skipped or spiked. Waits for the device."""
        self.longest = 0
        found = []
        figures = torch.stack([row for _, _, row in self._judged]).tolist() if self._judged else []
        for (step, position, _), (loss, norm, threshold, skipped, spike) in zip(self._judged, figures, strict=True):
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            self.last_good = self.last_good if skipped else step
            self.longest = max(self.longest, self.in_a_row)
            if skipped or spike:
                found.append(Judgement(step, position, loss, norm, bool(skipped), threshold))
        self._judged.clear()
        return found
