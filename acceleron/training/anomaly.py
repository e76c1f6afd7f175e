"""Detection of non-finite steps and loss spikes. The checks run on the device and never synchronize."""

from typing import NamedTuple

import torch
from torch import Tensor

# A loss is a spike if it is more than this many standard deviations above the running mean.
SPIKE_SIGMAS = 6.0
# The running mean covers about this many steps. No spikes are detected in the first ones.
SPIKE_WINDOW = 100


class Anomaly(NamedTuple):
    """A skipped step, or a step with a loss spike."""

    step: int
    position: int  # the step's first batch in the data stream
    loss: float
    grad_norm: float
    skipped: bool
    threshold: float  # losses above it are spikes; infinite for the first SPIKE_WINDOW steps


class AnomalyDetector:
    """Checks the loss and gradient norm of each step before the optimizer update.

    The running mean and variance of the loss are exponentially weighted (Finch 2009, "Incremental calculation of
    weighted mean and variance"). A loss above the threshold is clipped to it before the update. So one spike
    does not hide the next, and a loss that stays high soon stops counting as a spike.

    `read` updates `consecutive_skips` (skipped steps up to the latest step), `longest_streak` (the most consecutive
    skips among the steps just read) and `good_step` (the newest step whose checkpoint is good: the step after it was
    not skipped).
    """

    SAVED = ("mean_variance_count", "consecutive_skips")

    def __init__(self, device: torch.device, skip_spikes: bool):
        self.skip_spikes = skip_spikes
        self.mean_variance_count = torch.zeros(3, dtype=torch.float64, device=device)
        self.consecutive_skips = 0
        self.longest_streak = 0
        self.good_step = -1
        self._unread: list[tuple[int, int, Tensor]] = []

    def check(self, step: int, position: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Return a bool tensor on the device: whether to skip the step. loss and grad_norm are scalars."""
        loss, grad_norm = loss.double(), grad_norm.double()
        mean, variance, count = self.mean_variance_count
        finite = loss.isfinite() & grad_norm.isfinite()
        threshold = torch.where(count >= SPIKE_WINDOW, mean + SPIKE_SIGMAS * variance.sqrt(), torch.inf)
        spike = finite & (loss > threshold)
        skipped = ~finite | spike if self.skip_spikes else ~finite

        rate = 1 / (count + 1).clamp(max=SPIKE_WINDOW)
        difference = torch.minimum(loss, threshold) - mean
        updated = (mean + rate * difference, (1 - rate) * (variance + rate * difference**2), count + 1)
        self.mean_variance_count = torch.where(finite, torch.stack(updated), self.mean_variance_count)
        values = torch.stack([loss, grad_norm, threshold, skipped.double(), spike.double()])
        self._unread.append((step, position, values))
        return skipped

    def read(self) -> list[Anomaly]:
        """Return the anomalies since the last call. Synchronizes with the device."""
        self.longest_streak = 0
        anomalies = []
        rows = torch.stack([values for _, _, values in self._unread]).tolist() if self._unread else []
        for (step, position, _), (loss, norm, threshold, skipped, spike) in zip(self._unread, rows, strict=True):
            self.consecutive_skips = self.consecutive_skips + 1 if skipped else 0
            self.good_step = self.good_step if skipped else step - 1
            self.longest_streak = max(self.longest_streak, self.consecutive_skips)
            if skipped or spike:
                anomalies.append(Anomaly(step, position, loss, norm, bool(skipped), threshold))
        self._unread.clear()
        return anomalies
