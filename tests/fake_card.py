"""An accelerator that this machine does not have, under the name of a device that torch knows and nobody has.

A tensor on it is a shell round one in memory. As on a real card, an operation on tensors of the card and of the memory
fails, numpy cannot read it, and ``to`` and ``copy_`` alone carry numbers across. The device is torch's ``lazy``, since
autograd computes its gradients on the calling thread.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "lazy"
aten = torch.ops.aten
_ACROSS = {aten._to_copy.default, aten.to.other, aten.copy_.default, aten._copy_from.default}
_TAKES_HOST_INDICES = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
_PRODUCTS = (
    "mm", "matmul", "linear", "einsum", "dot", "mv", "addmm", "bmm", "baddbmm", "linalg_", "_linalg_", "_scaled_dot",
    "cholesky",
)  # fmt: skip

has_float64 = True
work: Counter[str] = Counter()  # numbers that went into products and decompositions, by kind of device


class CardTensor(torch.Tensor):
    """A tensor on the card; ``inner`` holds its numbers."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> CardTensor:
        if inner.dtype is torch.float64 and not has_float64:
            raise TypeError("card: has no float64")
        place = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        shell = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), **place, dtype=inner.dtype, device=torch.device(NAME, 0), requires_grad=False
        )
        shell.inner = inner
        return shell

    def __repr__(self, **_: Any) -> str:
        return f"CardTensor({self.inner!r})"

    # What reads numbers or addresses in C++ is not dispatched.
    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def storage(self) -> Any:
        return self.inner.storage()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    @classmethod
    @torch.inference_mode(False)  # in it torch would keep books of views, which shells are none of
    @torch.no_grad()
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        flat = tree_flatten((args, kwargs))[0]
        given = [each for each in flat if isinstance(each, torch.Tensor)]
        host = [each for each in given if not isinstance(each, CardTensor) and each.dim()]
        if func in _TAKES_HOST_INDICES:
            host = [each for each in host if each.is_floating_point()]
        if host and func not in _ACROSS:
            raise RuntimeError(f"{func}: expected all tensors on one device, got card and {host[0].device}")
        leaves = any(isinstance(each, torch.device) and each.type != NAME for each in flat)
        inner, options = tree_map(_inner, (args, kwargs))
        if func is aten.histc.default and not inner[0].is_floating_point():  # cards count whole numbers too
            return CardTensor(func(inner[0].float(), *inner[1:], **options).to(inner[0].dtype))
        out = func(*inner, **options)
        if func is aten.copy_.default or func is aten._copy_from.default:
            return args[0] if func is aten.copy_.default else args[1]
        if leaves:
            return out
        if func._schema.name[-1] == "_" and not func._schema.name.endswith("__"):  # in place
            return args[0] if func._schema.returns else None
        return tree_map(lambda x: CardTensor(x) if isinstance(x, torch.Tensor) else x, out)


def _inner(x: Any) -> Any:
    """What stands for an argument in memory."""
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.inner if isinstance(x, CardTensor) else x


class Tally(TorchDispatchMode):
    """Counts in ``work`` what products and decompositions are given, by the device that computes them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name.removeprefix("aten::").startswith(_PRODUCTS):
            given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor) and not x.is_meta]
            on = NAME if any(isinstance(x, CardTensor) for x in given) else "cpu"
            work[on] += sum(x.numel() for x in given)
        return func(*args, **kwargs)


def _factory(op: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> CardTensor:
        kwargs.pop("pin_memory", None)
        return CardTensor(op(*args, **{**kwargs, "device": "cpu"}))

    return make


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _inner(target).copy_(_inner(source))
    return target


class _Module(ModuleType):
    """What torch's own code asks of ``torch.cuda`` and the like."""

    _initialized = True
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    device = staticmethod(lambda index: nullcontext())
    get_rng_state = staticmethod(lambda device=0: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=0: torch.set_rng_state(state))


_library: list[Any] = []  # registrations live as long as it does


def plug_in(patch: Any) -> Counter[str]:
    """Give this machine the card until ``patch``, a ``pytest.MonkeyPatch``, is undone; return :data:`work`, emptied."""
    _register()
    work.clear()
    patch.setattr(torch, NAME, _Module(NAME), raising=False)
    for name, value in {
        "is_available": True, "device_count": 1, "current_accelerator": torch.device(NAME, 0), "synchronize": None,
    }.items():  # fmt: skip
        patch.setattr(torch.accelerator, name, lambda *_, value=value, **__: value)
    patch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self)
    optimizers = sys.modules["torch.optim.optimizer"]
    patch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["cpu", NAME])
    # Shells are of another class than parameters in memory, so that torch would replace tied ones one by one.
    patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    return work


def _register() -> None:
    """Register kernels that make tensors on the card: nothing else uses torch's ``lazy`` device."""
    if _library:
        return
    library = torch.library.Library("aten", "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("aten::") or any(part in name for part in ("_sparse", "_like", "_quantized", "nested")):
            continue
        op_name, _, overload = name.removeprefix("aten::").partition(".")
        try:
            op = getattr(getattr(aten, op_name), overload or "default")
        except (AttributeError, RuntimeError):
            continue
        arguments = op._schema.arguments
        if any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments):
            library.impl(name.removeprefix("aten::"), _factory(op), "Lazy")
    library.impl("_copy_from", _copy_from, "Lazy")
    _library.append(library)
