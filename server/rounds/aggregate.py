"""From the sites' mean update to the next adapter.

`apply_update` takes one server step on the mean of the sites' updates. `refactor` re-factorises each layer's B·A
(FedSVD) and returns how the basis of B changed, so that the optimizer's momenta can be transformed too. All arithmetic
is float64; adapters are float32, rounded once per call.

Why train B alone: a layer adds (alpha/r) B·A to its weight. With one A for all sites the product of means is
the mean of products, mean(B_i)·A = mean(B_i·A), and aggregation is exact (`ffa`, `fedsvd`; FFA-LoRA, Sun et
al. 2024). Averaging A and B apart (`fedavg`) is not: mean(B_i)·mean(A_i) differs from mean(B_i·A_i) by the
covariance of the factors over sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from privet.common.errors import DivergedError, ProtocolError, StateError, StudyError
from privet.common.privacy.schedule import rate_factor
from privet.common.study.adapter import Adapter, AdapterSpec, TensorSpec, Vector
from privet.common.study.sections import SQUARING, AggregationSection

_Array = NDArray[np.float64]


class Adaptive(torch.optim.Optimizer):
    """FedAdam and FedYogi as in Reddi et al. 2021, Algorithm 2.

    With the pseudo-gradient g, the negative mean update::

        m = beta1 m + (1 - beta1) g                          m starts at 0
        v = beta2 v + (1 - beta2) g^2                        FedAdam; v starts at tau^2
        v = v - (1 - beta2) g^2 sign(v - g^2)                FedYogi
        x = x - lr m / (sqrt(v) + tau)

    This is not `torch.optim.Adam`: the paper has no bias correction, and v starts at tau^2 instead of 0, the
    least that its Algorithm 2 allows. One class for both keeps their comparison to the one line that differs.
    """

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], tau: float, yogi: bool) -> None:
        super().__init__(groups, {"betas": betas, "tau": tau, "yogi": yogi})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step along the gradients that the parameters hold."""
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    self._step_one(parameter, group)

    def _step_one(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        if gradient is None:
            return
        (beta1, beta2), tau = group["betas"], group["tau"]
        if not state:
            state["m"] = torch.zeros_like(parameter)
            state["v"] = torch.full_like(parameter, tau * tau)
        m, v, square = state["m"], state["v"], gradient.square()
        m.mul_(beta1).add_(gradient, alpha=1 - beta1)
        if group["yogi"]:
            v.sub_((1 - beta2) * square * torch.sign(v - square))
        else:
            v.mul_(beta2).add_(square, alpha=1 - beta2)
        parameter.sub_(group["lr"] * m / (v.sqrt() + tau))


class ServerOptimizer:
    """The study's server optimizer on the pseudo-gradient, the negative mean update (Reddi et al. 2021).

    * `fedavg`: `torch.optim.SGD`; at learning rate 1 the new adapter is the old one plus the mean update.
    * `fedavgm`: `torch.optim.SGD` with momentum, buffer = momentum * buffer + gradient (Hsu et al. 2019); a
      constant update is therefore amplified by 1 / (1 - momentum) in the long run.
    * `fedadam`, `fedyogi`: `Adaptive`.
    * `adam`: `torch.optim.Adam`, its epsilon being `tau`.

    Adapters (A and B) and modules trained in full have a learning rate each; both follow the study's schedule
    over its rounds. Everything is deterministic.

    Args:
        settings: `study.aggregation`.
        rounds: `study.training.rounds`, the length of the schedule.
        spec: Layout of the adapter; the tensors that `settings.method` trains are optimised.
        head: Whether the head is among them.
    """

    def __init__(self, settings: AggregationSection, rounds: int, spec: AdapterSpec, *, head: bool = True) -> None:
        self.trained: tuple[TensorSpec, ...] = spec.trained(settings.method, head=head)
        """The tensors that an update holds, in the update's order."""
        self._settings = settings
        self._rounds = rounds
        self._pairs = spec.pairs()
        self._parameters = {t.name: torch.zeros(t.shape, dtype=torch.float64) for t in self.trained}
        self._optimizer = self._make()

    def _make(self) -> torch.optim.Optimizer:
        settings = self._settings
        head_rate = settings.head_learning_rate or settings.learning_rate
        groups: list[dict[str, Any]] = []
        for full, rate in ((False, settings.learning_rate), (True, head_rate)):
            members = [self._parameters[t.name] for t in self.trained if (t.role == "full") == full]
            if members:
                groups.append({"params": members, "lr": rate, "rate": rate})
        if settings.optimizer in ("fedadam", "fedyogi"):
            yogi = settings.optimizer == "fedyogi"
            return Adaptive(groups, betas=settings.betas, tau=settings.tau, yogi=yogi)
        if settings.optimizer == "adam":
            return torch.optim.Adam(groups, betas=settings.betas, eps=settings.tau, foreach=False)
        momentum = settings.momentum if settings.optimizer == "fedavgm" else 0.0
        return torch.optim.SGD(groups, momentum=momentum, foreach=False)

    def step(
        self,
        values: Mapping[str, Vector],
        updates: Mapping[str, _Array],
        step: int,
        moving: Mapping[str, NDArray[np.bool_]] | None = None,
    ) -> dict[str, Vector]:
        """Return the new values of the trained tensors, given their old values and mean updates.

        Args:
            values: float32 value by tensor name; tensors that are not trained are not looked at.
            updates: float64 mean update of each trained tensor, in its shape.
            step: Round of the study, from 0; sets the place in the schedule.
            moving: Which values of each trained tensor some site trained. The others stay, with their momenta: for
                them there was no step. None: all moved.

        Raises:
            StudyError: `step` is not one of the study's rounds.
        """
        factor = rate_factor(self._settings.schedule, step, self._rounds)
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        for name, parameter in self._parameters.items():
            # From the adapter, not from the last step: its float64 result was rounded since, and a resumed run has
            # only the rounded values.
            parameter.copy_(torch.from_numpy(values[name].astype(np.float64)))
            parameter.grad = torch.from_numpy(-updates[name])
        kept = [] if moving is None else list(self._kept(moving))
        self._optimizer.step()
        for tensor, before, still in kept:
            tensor.copy_(torch.where(still, before, tensor))
        # A value too large for float32 becomes infinite here; the caller checks for that.
        return {name: p.to(torch.float32).numpy().copy() for name, p in self._parameters.items()}

    def _kept(
        self, moving: Mapping[str, NDArray[np.bool_]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield parameters and their momenta, each with a copy and where to put it back."""
        for name, parameter in self._parameters.items():
            still = torch.from_numpy(~moving[name])
            buffers = self._optimizer.state.get(parameter, {}).values()
            for tensor in (parameter, *(buffer for buffer in buffers if buffer is not None)):
                if tensor.shape == parameter.shape and bool(still.any()):
                    yield tensor, tensor.clone(), still

    def change_basis(self, bases: Mapping[str, _Array]) -> None:
        """Transform the momenta of B to a new basis: buffer @ M, as B itself becomes B @ M.

        Momentum is a sum of past updates and therefore linear in them, so it is the same change of B·A before and
        after: buffer·A_old = (buffer M)·A_new. Squared gradients cannot be transformed like this.

        Args:
            bases: M [r, r] by the name of the B tensor, as `refactor` returns them.

        Raises:
            StudyError: The optimizer keeps squared gradients, or A is trained too.
        """
        if self._settings.optimizer in SQUARING:
            raise StudyError(
                f"aggregation.optimizer {self._settings.optimizer} cannot be used with aggregation.method fedsvd: it "
                "keeps squared gradients, which are wrong after A and B are refactored",
                "set aggregation.method to ffa, or aggregation.optimizer to fedavg or fedavgm",
            )
        if any(a in self._parameters and b in bases for a, b in self._pairs):
            raise StudyError(
                "the study trains the adapter's A tensors, so A and B cannot be refactored",
                "set aggregation.method to fedsvd",
            )
        for name, basis in bases.items():
            buffer = self._optimizer.state[self._parameters[name]].get("momentum_buffer")
            if buffer is not None:
                buffer.copy_(buffer @ torch.from_numpy(basis))

    def state_dict(self) -> tuple[dict[str, Any], dict[str, _Array]]:
        """Return the optimizer's state for a resumed run: JSON values, and float64 arrays for a safetensors file.

        The arrays are named `<buffer>/<tensor>`; there are none for `fedavg` or before the first step.
        """
        # Adam counts its steps in an array without dimensions, which the file format does not keep.
        arrays = {key: np.atleast_1d(buffer.to(torch.float64).numpy().copy()) for key, buffer in self._buffers()}
        return {"optimizer": self._settings.optimizer, "arrays": sorted(arrays)}, arrays

    def _buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._parameters.items():
            for buffer, value in self._optimizer.state[parameter].items():
                if value is not None:
                    yield f"{buffer}/{name}", value

    def load_state_dict(self, document: Mapping[str, Any], arrays: Mapping[str, _Array]) -> None:
        """Continue from what `state_dict` returned, bit for bit as the saved optimizer would have.

        Raises:
            StateError: The state is another optimizer's, another adapter's, incomplete or not finite.
        """
        mine = self._settings.optimizer
        if document.get("optimizer") != mine:
            raise StateError(
                f"the run's saved state is of server optimizer {document.get('optimizer')}, but the study has {mine}",
                "resume with the study file that the run was started with",
            )
        if sorted(arrays) != document.get("arrays"):
            raise StateError(
                "the server optimizer in the run's saved state is incomplete: an array is missing or surplus",
                "restore the newest backup of the run directory",
            )
        shapes = self._buffer_shapes()
        if arrays and {key: array.shape for key, array in arrays.items()} != shapes:
            raise StateError(
                f"the server optimizer in the run's saved state does not fit its adapter: expected {len(shapes)} "
                f"arrays in the shapes of its tensors, found {len(arrays)}, or other shapes",
                "resume with the study file that the run was started with",
            )
        if any(array.dtype != np.float64 or not np.isfinite(array).all() for array in arrays.values()):
            raise StateError(
                "the server optimizer in the run's saved state has values that are not finite float64 numbers",
                "restore the newest backup of the run directory",
            )
        self._optimizer.state.clear()
        for key, array in arrays.items():
            buffer, _, name = key.partition("/")
            self._optimizer.state[self._parameters[name]][buffer] = torch.from_numpy(array.copy())

    def _buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        known = {"fedavg": (), "fedavgm": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq", "step")}
        buffers = known.get(self._settings.optimizer, ("m", "v"))
        return {f"{b}/{t.name}": (1,) if b == "step" else t.shape for b in buffers for t in self.trained}


def apply_update(
    adapter: Adapter,
    mean: _Array,
    optimizer: ServerOptimizer,
    step: int,
    moving: NDArray[np.bool_] | None = None,
) -> Adapter:
    """Return the adapter after one server step on the sites' mean update.

    Args:
        adapter: The adapter that the sites started the round from.
        mean: float64 [d]: weighted mean over sites of (trained minus received), flattened over
            `optimizer.trained` in that order.
        optimizer: Takes the step, and keeps its momenta for the next round.
        step: Round of the study, from 0.
        moving: Which values [d] some site trained; the others stay. None: all.

    Raises:
        ProtocolError: `mean` has another shape than the trained tensors have together.
        DivergedError: `mean` is not finite (the optimizer is then unchanged), or the new adapter is not.
        StudyError: `step` is not one of the study's rounds.
    """
    sizes = [tensor.size for tensor in optimizer.trained]
    if mean.shape != (sum(sizes),):
        raise ProtocolError(
            f"the sites' mean update must have {sum(sizes)} values, found the shape {list(mean.shape)}",
            "report this as a bug",
        )
    bad = mean.size - int(np.isfinite(mean).sum())
    if bad:
        raise DivergedError(
            f"the sites' mean update has {bad} of {mean.size} values that are infinite or not a number",
            "lower training.learning_rate in the study file",
        )
    ends = np.cumsum(sizes)[:-1]

    def by_tensor(flat: NDArray[Any]) -> dict[str, NDArray[Any]]:
        parts = zip(optimizer.trained, np.split(flat, ends), strict=True)
        return {tensor.name: part.reshape(tensor.shape) for tensor, part in parts}

    steps = None if moving is None else by_tensor(moving)
    moved = adapter.replace(optimizer.step(adapter.values, by_tensor(mean.astype(np.float64)), step, steps))
    moved.check_finite("the adapter after the server step")
    return moved


def refactor(adapter: Adapter) -> tuple[Adapter, dict[str, _Array]]:
    """Re-factorise every B·A so that A has orthonormal rows (FedSVD, Lee et al. 2025, arXiv 2505.12805).

    With B·A = U S Vt of rank r at most: A becomes Vt and B becomes U S, with singular values in descending order and
    every row of A signed so that its largest entry is positive. The product is unchanged up to float32 rounding, 1e-6
    of its norm. This costs no privacy, because it is computed from values that were already released.

    The rows of A are orthonormal also if B is 0 or either factor is rank deficient. A layer with fewer inputs than the
    rank (d_in < r) cannot have r orthonormal rows: the first d_in rows are orthonormal, and the rest of A and of B's
    columns is 0. Such a layer loses nothing, because B·A has rank d_in at most.

    A does not learn by this. The rows of Vt are in the row space of A, because those of B·A are. With B-only training
    the layer's update therefore stays in the span of the first A. (One exception: if A lacks full row rank, the missing
    directions are chosen arbitrarily.) The basis of that span changes. The first call makes it orthonormal, so that
    gradients and privacy noise of B act on B·A with the same strength in every direction; later calls rotate it onto
    the singular directions (M is then orthogonal). Clipping, Gaussian noise, SGD and momentum are invariant under a
    rotation; per-coordinate methods such as AdamW are not.

    Method: A^T = Q R and B = Q' R' (thin QR), then the SVD of the small R' R^T = U S Vt. A_new = Vt Q^T and M = R^T V,
    so that A_old = M A_new holds exactly, and B_new = B_old M. Singular vectors are unique only where singular values
    are distinct: another LAPACK may choose another basis of the same product.

    Returns:
        The adapter, and M float64 [r, r] by name of the B tensor, for `ServerOptimizer.change_basis`.

    Raises:
        DivergedError: A value is not finite, before or after.
    """
    adapter.check_finite("the adapter to refactor")
    values: dict[str, Vector] = {}
    bases: dict[str, _Array] = {}
    for a_name, b_name in adapter.spec.pairs():
        # In float64, rounded once at the end: QR and SVD in float32 would change the product by more than that.
        b = adapter.values[b_name].astype(np.float64)
        a_new, basis = _orthonormal(adapter.values[a_name].astype(np.float64), b)
        with np.errstate(over="ignore"):  # an overflow becomes infinite, and is found by the check below
            values[b_name] = np.ascontiguousarray(b @ basis, dtype=np.float32)
        values[a_name] = np.ascontiguousarray(a_new, dtype=np.float32)
        bases[b_name] = basis
    done = adapter.replace(values)
    done.check_finite("the refactored adapter")
    return done, bases


def _orthonormal(a: _Array, b: _Array) -> tuple[_Array, _Array]:
    """Return the new A [r, d_in] and M [r, r], A = M A_new, for one layer's A [r, d_in] and B [d_out, r]."""
    rank = a.shape[0]
    # QR first: the SVD is then of a matrix of rank times rank, not of d_out times d_in.
    q, upper = np.linalg.qr(a.T)  # [d_in, k], [k, r], k = min(r, d_in)
    core = np.linalg.qr(b, mode="r") @ upper.T  # [min(r, d_out), k]: B·A between orthonormal frames
    _, _, vt = np.linalg.svd(core, full_matrices=True)  # [k, k], also where the core has fewer rows
    rows = vt @ q.T  # [k, d_in]
    # The SVD leaves each sign open. Fixing it makes the result the same on every run.
    largest = np.abs(rows).argmax(axis=1)
    signs = np.where(rows[np.arange(len(rows)), largest] < 0, -1.0, 1.0)
    missing = rank - len(rows)
    a_new = np.pad(signs[:, None] * rows, ((0, missing), (0, 0)))
    return a_new, np.pad(upper.T @ vt.T * signs, ((0, 0), (0, missing)))
