"""Principal components of rows that come in batches (Ross et al. 2008, "Incremental learning for robust tracking")."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from inlay.errors import ConfigError

__all__ = ["IncrementalPCA"]


class IncrementalPCA:
    """Keeps the leading components of everything seen so far; a batch costs one SVD of itself and of them.

    Args:
        n_components: how many are kept; by default as many as the first batch can have.
        copy: False lets given tensors be overwritten.
        batch_size: rows that :meth:`fit` takes at a time; by default five times the number of features.
        svd_driver: driver of ``torch.linalg.svd`` on CUDA.
        lowrank: find the components by random projection.
        lowrank_q: size of the projection, by default twice ``n_components``.
        lowrank_niter: rounds of subspace iteration.
        lowrank_seed: what the projection is drawn from; None draws from torch's global stream.

    Attributes:
        components_: (n_components, features), orthonormal rows; the largest number of each is positive.
        singular_values_: (n_components,).
        explained_variance_, explained_variance_ratio_: (n_components,), of all variance seen.
        mean_, var_: (features,), in float64.
        n_samples_seen_: (1,).
        noise_variance_: mean variance of what is left out.

    Raises:
        ConfigError: ``lowrank`` without a size, or with one below ``n_components``.
    """

    components_: Tensor
    singular_values_: Tensor
    mean_: Tensor
    var_: Tensor
    n_samples_seen_: Tensor

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ) -> None:
        if lowrank and lowrank_q is None:
            if n_components is None:
                raise ConfigError("lowrank=True: n_components must be specified where lowrank_q is not")
            lowrank_q = 2 * n_components
        if lowrank and n_components is not None and lowrank_q is not None and lowrank_q < n_components:
            raise ConfigError(
                f"lowrank_q must be greater than or equal to n_components={n_components}, found {lowrank_q}"
            )
        self.n_components = n_components
        self.copy = copy
        self.batch_size = batch_size
        self.svd_driver = svd_driver
        self.lowrank = lowrank
        self.lowrank_q = lowrank_q
        self.lowrank_niter = lowrank_niter
        self.lowrank_seed = lowrank_seed
        self.n_features_: int | None = None

    def fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Take in all rows of X (samples, features), a batch at a time."""
        X = self._checked(X) if check_input else X
        self.batch_size = self.batch_size or 5 * X.shape[1]
        for part in self.gen_batches(len(X), self.batch_size, self.n_components or 0):
            self.partial_fit(X[part], check_input=False)
        return self

    def partial_fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Take in one batch X (samples, features).

        Raises:
            ConfigError: it has fewer rows or columns than components, or another number of columns than before.
        """
        X = self._checked(X) if check_input else X
        n, features = X.shape
        first = self.n_features_ is None
        if first:
            self.n_features_ = features
            self.n_components = self.n_components or min(n, features)
            seen = torch.zeros(1, dtype=torch.long, device=X.device)
            before_mean = before_var = torch.zeros(features, dtype=torch.float64, device=X.device)
        else:
            seen, before_mean, before_var = self.n_samples_seen_, self.mean_, self.var_
        if features != self.n_features_:
            raise ConfigError(
                f"the number of features of the new batch ({features}) does not match the number of features of the "
                f"first batch ({self.n_features_})"
            )
        batch = X.double()
        batch_mean, total = batch.mean(0), seen + n
        # the two parts' squared deviations, and what their means are apart
        apart = (before_mean - batch_mean).square() * (seen.double() * n / total)
        squares = before_var * seen + batch.var(0, correction=0) * n + apart
        mean = (before_mean * seen + batch_mean * n) / total
        X = X - batch_mean.to(X.dtype)
        if not first:
            shift = (seen.double() * n / total).sqrt() * (before_mean - batch_mean)
            X = torch.vstack([self.singular_values_.unsqueeze(1) * self.components_, X, shift.to(X.dtype)])
        S, Vh = self._svd(X)
        sign = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()
        variance, k = S.double().square() / (total - 1), self.n_components
        assert k is not None
        self.components_, self.singular_values_ = (Vh * sign)[:k], S[:k]
        self.mean_, self.var_, self.n_samples_seen_ = mean, squares / total, total
        self.explained_variance_ = variance[:k]
        self.explained_variance_ratio_ = (S.double().square() / squares.sum())[:k]
        rest = variance[k:]
        self.noise_variance_ = rest.mean() if k not in (n, features) else torch.zeros((), device=X.device)
        return self

    def transform(self, X: Tensor) -> Tensor:
        """Return the coordinates of rows X (samples, features) along the components, (samples, n_components)."""
        return ((X.double() - self.mean_) @ self.components_.double().T).to(X.dtype)

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Yield slices of ``batch_size`` out of n; the last takes what would leave less than ``min_batch_size``."""
        start = 0
        for _ in range(n // batch_size):
            end = start + batch_size
            if end + min_batch_size > n:
                continue
            yield slice(start, end)
            start = end
        if start < n:
            yield slice(start, n)

    def _svd(self, X: Tensor) -> tuple[Tensor, Tensor]:
        if not self.lowrank:
            _, S, Vh = torch.linalg.svd(X, full_matrices=False, driver=self.svd_driver)
            return S, Vh
        with torch.random.fork_rng(enabled=self.lowrank_seed is not None):
            if self.lowrank_seed is not None:
                torch.manual_seed(self.lowrank_seed)
            _, S, V = torch.svd_lowrank(X, q=min(self.lowrank_q or 0, *X.shape), niter=self.lowrank_niter)
        return S, V.mH

    def _checked(self, X: Any) -> Tensor:
        X = X if isinstance(X, Tensor) else torch.tensor(X, dtype=torch.float32)
        n, features = X.shape
        if self.n_components is not None and self.n_components > features:
            raise ConfigError(f"n_components={self.n_components} invalid for n_features={features}: there are no more")
        if self.n_components is not None and self.n_components > n:
            raise ConfigError(
                f"n_components={self.n_components} must be less or equal to the batch number of samples {n}"
            )
        return X if X.dtype in (torch.float32, torch.float64) else X.float()
