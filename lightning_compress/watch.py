"""Watches one batch: records the calls of modules, the torch functions that run, and the values between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_compress.functions import ATTRIBUTES
from lightning_compress.layers import modules_by_name
from lightning_compress.trace import Began, Ended, Ran, Trace, Value

__all__ = ["Watch", "looking", "same_value", "unwatched"]


class Watch:
    """Records what runs while it is open: inside of ``with``, or from :meth:`start` to :meth:`stop`.

    Compiled code runs eagerly meanwhile, or its calls and functions would not be seen. The trace holds no tensor, so
    that watching takes no memory to speak of.

    Args:
        model: The model. Its metrics and losses are not recorded, the functions in them are those of who called them.
        skip_root_calls: How many nested calls of the model itself to overlook (a DDP wrapper calls it once more).

    Example:
        >>> model, x = nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.randn(3, 4)
        >>> with Watch(model) as watch:
        ...     y = model(x)
        >>> [event.name for event in watch.trace.events]
        ['', '0', 'linear', '0', '1', 'relu', '1', '']
    """

    def __init__(self, model: nn.Module, skip_root_calls: int = 0) -> None:
        self.model = model
        self.trace = Trace()
        self._num_skipped = skip_root_calls
        self._calls: list[tuple[str, Began | None]] = []
        self._numbers: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
        self._next = 0  # the number of the tensor that is seen next
        self._open = ExitStack()
        self.looks = True  # else what runs is not noted

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: a closed watch that has seen nothing. The hooks on a copied model call it in vain."""
        return {**self.__dict__, **Watch(self.model, self._num_skipped).__dict__}

    def start(self) -> None:
        """Open the watch."""
        with ExitStack() as stack:
            for name, module in modules_by_name(self.model).items():
                own = [
                    *module.named_parameters(recurse=False, remove_duplicate=False),
                    *module.named_buffers(recurse=False, remove_duplicate=False),
                ]
                for key, tensor in own:
                    self.trace.tensors[name, key] = self._number(tensor)
                if _is_part_of_the_model(module):
                    before = module.register_forward_pre_hook(partial(self._began, name), with_kwargs=True)
                    stack.callback(before.remove)
                    after = module.register_forward_hook(partial(self._ended, name), always_call=True)
                    stack.callback(after.remove)
            stack.enter_context(_eagerly(self))
            stack.enter_context(_Functions(self._run))
            self._open = stack.pop_all()

    def stop(self) -> None:
        """Close it; nothing happens where it is closed."""
        self._open.close()

    def __enter__(self) -> Watch:
        """Open the watch."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it."""
        self.stop()

    def use(self, values: object) -> None:
        """Note that values are read outside of the model, such as what a training step returns."""
        read = tuple(self._value(x) for x in _tensors(values))
        self.trace.events.append(Ran("use", (), {}, read, ()))

    def _number(self, x: Tensor) -> int:
        number = self._numbers.get(x)
        return self._number_anew(x) if number is None else number

    def _number_anew(self, x: Tensor) -> int:
        self._numbers[x] = self._next
        self._next += 1
        return self._numbers[x]

    def _value(self, x: Tensor) -> Value:
        number = self._number(x)
        if is_lazy(x):  # a parameter that has no shape yet
            return Value(number, (), x.dtype, is_parameter=True)
        shape = (-1,) * x.dim() if x.is_nested else tuple(x.shape)
        return Value(number, shape, x.dtype, isinstance(x, nn.Parameter))

    def _argument(self, x: object) -> Value | None:
        if isinstance(x, PackedSequence):
            x = x.data
        return self._value(x) if isinstance(x, Tensor) else None

    def _began(self, name: str, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not name and self._calls.count(("", None)) < self._num_skipped:
            self._calls.append(("", None))
            return
        by_name = {key: self._argument(x) for key, x in kwargs.items()}
        event = Began(name, tuple(map(self._argument, args)), by_name)
        self._calls.append((name, event))
        self.trace.events.append(event)

    def _ended(self, name: str, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        if not self._calls or self._calls[-1][0] != name:  # a hook of others raised before ours saw the call begin
            return
        _, began = self._calls.pop()
        if began is None:
            return
        outputs = tuple(self._value(x) for x in _tensors(output))
        whole = outputs[0] if isinstance(output, Tensor) else None
        self.trace.events.append(Ended(name, began.args, whole, outputs))

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.looks:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        if name in ATTRIBUTES:
            output = func(*args, **kwargs)
            results = _tensors(output)
            if not results:
                return output
            known_args, known_kwargs = self._known(args, kwargs)
        else:
            # before the call: what it writes in place has another number afterwards
            known_args, known_kwargs = self._known(args, kwargs)
            output = func(*args, **kwargs)
            results = _tensors(output)
            given = _tensors((args, kwargs))
            for x in results:
                if any(x is y for y in given):
                    self._number_anew(x)
        reads = tuple(x for x in tree_leaves((known_args, known_kwargs)) if isinstance(x, Value))
        asked = getattr(getattr(func, "__self__", None), "__name__", "") if name == "get" else ""
        self.trace.events.append(Ran(name, known_args, known_kwargs, reads, tuple(map(self._value, results)), asked))
        return output

    def _known(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tree_map_only(Tensor, self._value, (args, kwargs))


class _Functions(TorchFunctionMode):
    """Lets every torch function run through another one."""

    def __init__(self, run: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self._run = run

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._run(func, args, kwargs or {})


_eager_while_open = ExitStack()
_open: list[Watch] = []

# What else looks at the functions that run, and must not see those of observers and quantizers.
looking: list[Any] = []


@contextmanager
def _eagerly(watch: Watch) -> Iterator[None]:
    """Run compiled code eagerly, until no watch is open any more.

    Callbacks close their watches in the order in which they opened them, so that the first one to close must not give
    back the stance that it found.
    """
    if not _open:
        _eager_while_open.enter_context(torch.compiler.set_stance("force_eager"))
    _open.append(watch)
    try:
        yield
    finally:
        _open.remove(watch)
        if not _open:
            _eager_while_open.close()


def unwatched(call: Callable[..., Any], *args: Any) -> Any:
    """What a call gives, whose functions no watch is to see: it observes, and changes no value."""
    if not _open and not looking:
        return call(*args)
    watches = [watch for watch in (*_open, *looking) if watch.looks]
    for watch in watches:
        watch.looks = False
    try:
        # nor a mode of them: each function that runs would ask it
        with torch._C.DisableTorchFunction():  # noqa: SLF001  # torch has no public name for it
            return call(*args)
    finally:
        for watch in watches:
            watch.looks = True


def same_value(x: Tensor, y: Tensor) -> None:
    """Let watches take a tensor for another one, which it has taken the place of unseen."""
    for watch in _open if x is not y else ():
        watch._numbers[y] = watch._number(x)  # noqa: SLF001  # of this module


def _tensors(values: object) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _is_part_of_the_model(module: nn.Module) -> bool:
    return not (type(module).__module__.startswith("torchmetrics") or isinstance(module, nn.modules.loss._Loss))
