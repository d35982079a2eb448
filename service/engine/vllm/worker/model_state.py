"""Everything that a model computes with: its tensors, wherever its objects hold them, and the rest.

vLLM's quantised layers and fused mixtures keep more than parameters and buffers: scales in configs
of kernels, tables in kernel objects, numbers and flags that the kernels were built with, and views
of parameters under other names. An expert can be copied into a running model only if all of that
is either copied or equal. So this module looks through the objects of the layers that compute with
weights, and describes what it finds by path. Two models of one description differ in the copied
tensors only. An object that can't be looked into is named, and keeps its model from being copied.

Nothing here knows a kernel, and nothing needs a GPU.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch

from service.engine.vllm.worker.model_access import is_attention, weight_method

# Classes whose objects are looked through, by the beginning of their module.
_OPEN = ("vllm.", "torch.nn.", "compressed_tensors.")
# Objects of one engine, which both of its models have, or that hold no weights.
_SHARED = ("vllm.config.", "vllm.distributed.", "transformers.", "torch.distributed.", "torch._ops")
_SHARED_CLASSES = frozenset({"QuantizationConfig", "BaseRouter", "RoutedExpertsSink"})
_HARMLESS = ("torch.cuda.", "torch.streams", "threading", "logging", "weakref")
_PLAIN_VALUES: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None), Fraction)
_PLAIN_VALUES += (torch.dtype, torch.Size)
_MODULE_FIELDS = frozenset(vars(torch.nn.Module()))
# Loaders and places of parameters, which matter while files are read only.
_READING_FIELDS = frozenset({"weight_loader", "_weight_loader"})
# Marks that compiling leaves on what a running model computes with.
_COMPILERS = ("_dynamo", "_torchdynamo")
# A tensor of such values outside parameters may hold addresses, which must not be copied.
_ADDRESSES = (torch.int64, torch.uint64)
_DEEPEST = 24


@dataclass(slots=True)
class ModelState:
    """What one model computes with, by path.

    Attributes:
        tensors: The tensors that make the difference between two experts, without views of them.
        values: A description of everything else, and of the form of each tensor.
        hidden: The paths of tensors that are neither parameters nor buffers.
        fixed: Tensors that belong to the engine and must be equal, such as scales of its KV cache.
        closed: Objects that can't be looked into, with their classes.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    fixed: dict[str, torch.Tensor] = field(default_factory=dict)
    closed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: torch.nn.Module) -> ModelState:
        """Look through a model whose weights are ready for its kernels.

        Raises:
            ValueError: A tensor has no memory of its own yet.
        """
        walk = _Walk()
        # Parameters first, so that other names of theirs are known as such.
        for name, module in model.named_modules():
            walk.registered(name, module)
        for name, module in model.named_modules():
            walk.attributes(name, module)
        return walk.state

    def check_open(self) -> None:
        """Check that everything could be looked into.

        Raises:
            ValueError: An object could hold weights that are not seen.
        """
        for path, kind in self.closed.items():
            raise ValueError(f"{path} is a {kind}, which may hold weights that can't be seen")

    def digest(self) -> bytes:
        """Return a digest of what `check_fits` wants equal, for models of other processes."""
        found = hashlib.blake2b(digest_size=16)
        for path in sorted(self.values):
            found.update(f"{path}\0{self.values[path]}\0".encode("utf-8", "replace"))
        whole = {path: self.tensors[path] for path in self.hidden} | self.fixed
        for path in sorted(whole):
            if path in self.fixed or whole[path].dtype in _ADDRESSES:
                found.update(f"{path}\0{form_of(whole[path])}\0".encode())
                found.update(as_bytes(whole[path].detach().cpu().contiguous()).numpy().tobytes())
        return found.digest()

    def check_fits(self, live: ModelState) -> None:
        """Check that copies of this model's tensors make a running model equal to this one.

        Args:
            live: The running model's state when its engine had started.

        Raises:
            ValueError: They differ in something that is not copied.
        """
        self.check_open()
        for path in sorted(self.values.keys() | live.values.keys()):
            mine, theirs = self.values.get(path), live.values.get(path)
            if mine != theirs:
                raise ValueError(
                    f"{path} is {mine or 'missing'}, and {theirs or 'missing'} in the running model"
                )
        for path in sorted(self.fixed.keys() & live.fixed.keys()):
            if not same_bytes(self.fixed[path], live.fixed[path]):
                raise ValueError(f"{path} has values of its own, and belongs to the engine")
        for path in self.hidden:
            held, there = self.tensors[path], live.tensors[path]
            if held.dtype in _ADDRESSES and not same_bytes(held, there):
                raise ValueError(f"{path} has integers of its own, which may be addresses")


class _Walk:
    """One pass over the objects of a model."""

    def __init__(self) -> None:
        self.state = ModelState()
        # Ids of objects are unique only while they live.
        self.seen: dict[int, tuple[str, object]] = {}
        self._views: dict[tuple[object, ...], str] = {}
        self._storages: dict[int, list[str]] = {}

    def registered(self, name: str, module: torch.nn.Module) -> None:
        self.seen[id(module)] = (name, module)
        own = {"recurse": False, "remove_duplicate": False}
        for key, parameter in module.named_parameters(**own):
            self._tensor(_joined(name, key), parameter)
        for key, buffer in module.named_buffers(**own):
            if is_attention(module):
                self.state.fixed[_joined(name, key)] = buffer
                self.seen[id(buffer)] = (_joined(name, key), buffer)
            else:
                self._tensor(_joined(name, key), buffer)

    def attributes(self, name: str, module: torch.nn.Module) -> None:
        own = {
            key: value
            for key, value in vars(module).items()
            if key not in _MODULE_FIELDS and not key.startswith(_COMPILERS)
        }
        if is_attention(module):
            for key, value in own.items():
                if isinstance(value, torch.Tensor) and key != "kv_cache":
                    self.state.fixed[f"{name}:{key}"] = value
                elif isinstance(value, float):
                    self.state.values[f"{name}:{key}"] = repr(value)
            return
        whole = weight_method(module) is not None or hasattr(module, "_quant_method")
        for key, value in sorted(own.items()):
            if whole or isinstance(value, torch.Tensor):
                self._visit(f"{name}:{key}", value, 0)

    def _visit(self, path: str, value: object, depth: int) -> None:
        if isinstance(value, _PLAIN_VALUES):
            self.state.values[path] = _told(value, 200)
        elif isinstance(value, torch.device):
            pass  # a model on the host is compared with one on a GPU
        elif isinstance(value, enum.Enum | type):
            self.state.values[path] = str(value)
        elif id(value) in self.seen:
            self.state.values[path] = f"the same as {self.seen[id(value)][0]}"
        elif depth > _DEEPEST:
            self.state.closed[path] = f"{_kind(value)} in {depth} others"
        elif isinstance(value, torch.Tensor):
            self._tensor(path, value, hidden=True)
        else:
            self.seen[id(value)] = (path, value)
            self._object(path, value, depth + 1)

    def _object(self, path: str, value: object, depth: int) -> None:
        kind = _kind(value)
        if _is_shared(value):
            return
        if isinstance(value, Mapping):
            self.state.values[path] = f"{len(value)} items"
            for key in sorted(value, key=repr):
                self._visit(f"{path}[{_told(key, 80)}]", value[key], depth)
        elif isinstance(value, set | frozenset):
            self.state.values[path] = repr(sorted(map(repr, value)))
        elif isinstance(value, list | tuple):
            self.state.values[path] = f"{len(value)} items"
            for index, item in enumerate(value):
                self._visit(f"{path}[{index}]", item, depth)
        elif isinstance(value, functools.partial):
            self.state.values[path] = "a partial function"
            for index, item in enumerate((value.func, value.args, value.keywords)):
                self._visit(f"{path}({index})", item, depth)
        elif isinstance(value, types.MethodType):
            self.state.values[path] = f"the method {value.__func__.__qualname__}"
            self._visit(f"{path}.self", value.__self__, depth)
        elif isinstance(value, types.FunctionType):
            self.state.values[path] = f"the function {value.__module__}.{value.__qualname__}"
            for index, cell in enumerate(value.__closure__ or ()):
                try:
                    self._visit(f"{path}<{index}>", cell.cell_contents, depth)
                except ValueError:
                    self.state.values[f"{path}<{index}>"] = "an empty cell"
            for name in ("__defaults__", "__kwdefaults__"):
                if (defaults := getattr(value, name)) is not None:
                    self._visit(f"{path}.{name}", defaults, depth)
        elif isinstance(value, types.BuiltinFunctionType):
            self.state.values[path] = f"{value.__name__}"
            # A function of an extension has its module there, or a capsule with its own record.
            bound = getattr(value, "__self__", None)
            if not isinstance(bound, types.ModuleType) and type(bound).__name__ != "PyCapsule":
                self._visit(f"{path}.self", bound, depth)
        elif isinstance(value, types.ModuleType):
            self.state.values[path] = f"{value.__name__}"
        elif kind.startswith(_OPEN):
            self.state.values[path] = f"a {kind}"
            for key, item in _fields(value):
                self._visit(f"{path}.{key}", item, depth)
        elif kind.startswith(_HARMLESS):
            self.state.values[path] = f"a {kind}"
        else:
            self.state.closed[path] = kind

    def _tensor(self, path: str, tensor: torch.Tensor, *, hidden: bool = False) -> None:
        if (seen := self.seen.get(id(tensor))) is not None:
            self.state.values[path] = f"the same as {seen[0]}"
            return
        self.seen[id(tensor)] = (path, tensor)
        if tensor.is_meta:
            raise ValueError(f"{path} has no memory yet")
        form = form_of(tensor)
        for key, value in sorted(vars(tensor).items()):
            # Kernels are chosen by flags of parameters.
            if key in _READING_FIELDS or key.startswith(_COMPILERS):
                continue
            if isinstance(value, bool | int | float | str):
                self.state.values[f"{path}.{key}"] = repr(value)
        if not tensor.numel():
            self.state.values[path] = f"empty, {form}"
            return
        data = tensor.detach()
        storage = data.untyped_storage().data_ptr()
        view = (storage, data.storage_offset(), form)
        if (same := self._views.get(view)) is not None:
            self.state.values[path] = f"the same as {same}"
            return
        for owner in self._storages.get(storage, ()):
            if (at := _place_within(data, self.state.tensors[owner])) is not None:
                self.state.values[path] = f"{form} at {at} of {owner}"
                return
        self.state.values[path] = form
        self.state.tensors[path] = data
        self._views[view] = path
        self._storages.setdefault(storage, []).append(path)
        if hidden:
            self.state.hidden.add(path)


def form_of(tensor: torch.Tensor) -> str:
    """Return a tensor's dtype, shape and strides as text."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    strides = "" if tensor.is_contiguous() else f" with strides {tuple(tensor.stride())}"
    return f"{dtype} {tuple(tensor.shape)}{strides}"


def memory_order(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a view of a tensor's values in the order of memory, or None where it has gaps.

    The view has one dimension and no copy is made, however the dimensions are permuted.
    """
    if not tensor.dim():
        return tensor.reshape(1)
    order = sorted(range(tensor.dim()), key=lambda d: (-tensor.stride(d), d))
    sorted_ = tensor.permute(order)
    return sorted_.view(-1) if sorted_.is_contiguous() else None


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor's bytes, uint8 (n,). Not every dtype can be compared."""
    return tensor.reshape(-1).view(torch.uint8)


def ends_of(tensor: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return copies of a tensor's first and last values, as bytes and without copying the rest."""
    flat = memory_order(tensor.detach())
    if flat is None:
        flat = tensor.detach().flatten()
    return as_bytes(flat[:count].clone()), as_bytes(flat[-count:].clone())


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have equal forms and bytes, on whatever devices."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    mine, theirs = (as_bytes(t.detach().cpu().contiguous()) for t in (one, other))
    return bool(torch.equal(mine, theirs))


def memory_of(state: ModelState) -> frozenset[int]:
    """Return the addresses of all memory that a model's tensors are in."""
    tensors = (*state.tensors.values(), *state.fixed.values())
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)


def move_to_host(module: torch.nn.Module, kept: Collection[int]) -> None:
    """Move a layer's tensors to the host, wherever its objects hold them, with their views.

    Args:
        module: A layer of which all weights are ready.
        kept: Addresses of memory that others use, which stays.
    """

    def host(storage: torch.UntypedStorage) -> torch.UntypedStorage | None:
        there = storage.device.type == "cpu" or storage.data_ptr() in kept
        return None if there else storage.cpu()

    move_memory(module, host)


def move_memory(
    module: torch.nn.Module, move: Callable[[torch.UntypedStorage], torch.UntypedStorage | None]
) -> None:
    """Give a layer's tensors other memory. Tensors that share memory share it afterwards.

    Args:
        module: The layer.
        move: A function that returns the new memory, or None where a memory stays.
    """
    walk = _Walk()
    for name, part in module.named_modules():
        walk.registered(name, part)
    for name, part in module.named_modules():
        walk.attributes(name, part)
    moved: dict[int, torch.UntypedStorage | None] = {}
    for _, found in walk.seen.values():
        if not isinstance(found, torch.Tensor):
            continue
        storage = found.untyped_storage()
        address = storage.data_ptr()
        if address not in moved:
            moved[address] = move(storage)
        if (new := moved[address]) is not None:
            place = (found.storage_offset(), found.shape, found.stride())
            empty = torch.empty(0, dtype=found.dtype, device=new.device)
            found.data = empty.set_(new, *place)


def _place_within(tensor: torch.Tensor, owner: torch.Tensor) -> int | None:
    """Return the place of a tensor in memory that another one fills, in bytes, or None."""
    if memory_order(owner) is None:
        return None
    size = tensor.element_size()
    begin = tensor.storage_offset() * size - owner.storage_offset() * owner.element_size()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    end = begin + size * (1 + sum((n - 1) * step for n, step in steps))
    return begin if begin >= 0 and end <= owner.numel() * owner.element_size() else None


def _fields(value: object) -> Iterator[tuple[str, Any]]:
    yield from sorted(getattr(value, "__dict__", {}).items())
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def _is_shared(value: object) -> bool:
    return any(
        f"{kind.__module__}.".startswith(_SHARED) or kind.__name__ in _SHARED_CLASSES
        for kind in type(value).__mro__
    )


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _told(value: object, most_chars: int) -> str:
    """Return a value as text, with a digest in the place of what is left out."""
    text = repr(value)
    if len(text) <= most_chars:
        return text
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()
    return f"{text[:most_chars]}… ({digest})"


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
