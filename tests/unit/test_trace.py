"""What a watch records: calls, functions, and the values between them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_compress.trace import Began, Ended, Event, Ran, Trace, find_norms
from lightning_compress.watch import Watch

from .helpers import noise


class Calls(nn.Module):
    """A layer, and what the model does with it."""

    def __init__(self, use: Callable[[Any, Tensor], Any] = lambda model, x: model.fc(x)) -> None:
        super().__init__()
        self.fc, self.norm, self.other = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def watched(use: Callable[[Any, Tensor], Any]) -> Trace:
    model, x = Calls(use), noise(3, 4)
    with Watch(model) as watch:
        model(x)
    return watch.trace


def functions(trace: Trace) -> list[Ran]:
    return [event for event in trace.events if isinstance(event, Ran)]


def short(event: Event) -> str:
    return f"{type(event).__name__} {event.name}"


def test_calls_are_nested_and_their_values_connect_them() -> None:
    trace = watched(lambda model, x: model.norm(model.fc(x)).relu())
    assert [short(event) for event in trace.events] == [
        *("Began ", "Began fc", "Ran linear", "Ended fc"),
        *("Began norm", "Ran add", "Ran batch_norm", "Ended norm", "Ran relu", "Ended "),
    ]
    root, fc, linear, _, norm, _, batch_norm, normed, relu, end = trace.events
    assert isinstance(linear, Ran) and isinstance(batch_norm, Ran) and isinstance(relu, Ran)  # noqa: PT018
    assert isinstance(root, Began) and isinstance(fc, Began) and isinstance(norm, Began)  # noqa: PT018
    assert isinstance(normed, Ended) and isinstance(end, Ended)  # noqa: PT018
    assert root.args == fc.args == (linear.args[0],)
    assert linear.results == norm.args == (batch_norm.args[0],)
    assert batch_norm.results == (normed.output,) == (relu.args[0],)
    assert relu.results == (end.output,) == end.outputs
    weight, bias = linear.args[1:]
    assert (trace.tensors["fc", "weight"], trace.tensors["fc", "bias"]) == (weight.number, bias.number)
    assert trace.tensors["norm", "running_var"] == batch_norm.args[2].number
    assert (weight.shape, weight.dtype, weight.is_parameter) == ((4, 4), torch.float32, True)
    assert not linear.results[0].is_parameter


def test_a_number_is_never_used_again_though_an_id_is() -> None:
    ids: list[set[int]] = []

    def use(model: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            results = [x + 1 for _ in range(100)]
            ids.append({id(result) for result in results})
            del results
        return x

    results = [event.results[0].number for event in functions(watched(use))]
    assert ids[0] & ids[1]
    assert len(results) == len(set(results)) == 200


def test_a_trace_keeps_no_tensor_alive() -> None:
    model, known = Calls(lambda model, x: model.norm(model.fc(x)).relu().mean()), []
    handle = model.fc.register_forward_hook(lambda module, args, output: known.append(weakref.ref(output)))
    with torch.no_grad(), Watch(model) as watch:
        model(noise(3, 4))
        gc.collect()
        assert known[0]() is None
    handle.remove()
    assert watch.trace.events


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y.add_(1),
        lambda y: F.relu(y, inplace=True),
        lambda y: torch.mul(y, 2, out=y),
        lambda y: y.__iadd__(1),
    ],
)
def test_a_tensor_that_was_written_in_place_holds_another_value(write: Callable[[Tensor], Tensor]) -> None:
    def use(model: Any, x: Tensor) -> Tensor:
        y = x + 1
        write(y)
        return y * 2

    with torch.no_grad():
        made, written, read = functions(watched(use))
    assert written.reads[0] == made.results[0]
    assert written.results == read.reads
    assert written.results[0].number != made.results[0].number


def test_a_tensor_that_a_function_hands_back_counts_as_written() -> None:
    """Here it is a float tensor already."""
    first, *_, last = functions(watched(lambda model, x: model.norm(model.fc(x.float())) + x))
    assert first.name == "float"
    assert first.results == (last.reads[1],) != first.reads


def test_functions_know_their_arguments_and_all_tensors_inside_of_them() -> None:
    trace = watched(lambda model, x: torch.cat([x, x, x.T], dim=0) if len(x) == 4 else torch.cat([x, x], dim=1))
    cat = functions(trace)[-1]
    assert (cat.name, cat.kwargs) == ("cat", {"dim": 1})
    assert cat.reads == (*cat.args[0],) == (cat.reads[0],) * 2
    assert cat.results[0].shape == (3, 8)


def test_what_only_asks_for_shape_and_type_is_no_function() -> None:
    trace = watched(lambda model, x: x if x.shape[0] and x.size(1) and x.dim() and len(x) and x.is_contiguous() else 0)
    assert not functions(trace)
    assert [event.name for event in functions(watched(lambda model, x: x.T))] == ["get"]


def test_what_reads_values_without_giving_a_tensor_is_recorded() -> None:
    (event,) = functions(watched(lambda model, x: x[0, 0].item()))[1:]
    assert (event.name, event.results, event.reads[0].shape) == ("item", (), ())


def test_outputs_of_any_shape_are_found() -> None:
    trace = watched(lambda model, x: {"logits": model.fc(x), "more": [x, "text"]})
    end = trace.events[-1]
    assert isinstance(end, Ended)
    assert end.output is None
    assert [value.shape for value in end.outputs] == [(3, 4), (3, 4)]


def test_values_used_outside_of_the_model_are_read() -> None:
    model = Calls()
    with Watch(model) as watch:
        y = model(noise(3, 4))
        watch.use({"loss": y, "text": "no tensor"})
    end, use = watch.trace.events[-2:]
    assert isinstance(end, Ended) and isinstance(use, Ran)  # noqa: PT018
    assert use.reads == end.outputs
    assert not use.results


def test_a_call_that_raised_ends_and_leaves_neither_hooks_nor_modes() -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("wrong")

    model, x = nn.Sequential(nn.Linear(4, 4), Wrong()), noise(3, 4)
    watch = Watch(model)
    with pytest.raises(RuntimeError, match="wrong"), watch:
        model(x)
    assert [short(event) for event in watch.trace.events] == [
        *("Began ", "Began 0", "Ran linear", "Ended 0"),
        *("Began 1", "Ended 1", "Ended "),
    ]
    assert_closed(model)


def test_an_error_that_the_model_catches_leaves_the_calls_nested() -> None:
    def use(model: Any, x: Tensor) -> Tensor:
        with suppress(RuntimeError):
            model.fc(x.T)
        return model.fc(x)

    calls = [short(event) for event in watched(use).events if not isinstance(event, Ran)]
    assert calls == ["Began ", "Began fc", "Ended fc", "Began fc", "Ended fc", "Ended "]


def assert_closed(model: nn.Module) -> None:
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.overrides._get_current_function_mode() is None
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_an_error_while_it_opens_leaves_neither_hooks_nor_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(mode: Any) -> None:
        raise RuntimeError("no mode")

    monkeypatch.setattr(TorchFunctionMode, "__enter__", fail)
    model = Calls()
    with pytest.raises(RuntimeError, match="no mode"):
        Watch(model).start()
    assert_closed(model)


def test_stopping_twice_or_before_the_start_does_nothing() -> None:
    model = Calls()
    watch = Watch(model)
    watch.stop()
    watch.start()
    model(noise(3, 4))
    watch.stop()
    watch.stop()
    num = len(watch.trace.events)
    model(noise(3, 4))
    assert len(watch.trace.events) == num
    assert_closed(model)


def test_watches_that_close_in_the_order_in_which_they_opened_see_the_same() -> None:
    """As those of two callbacks do."""
    model, x = Calls(lambda model, x: model.norm(model.fc(x)).relu()), noise(3, 4)
    first, second = Watch(model), Watch(model)
    first.start()
    second.start()
    model(x)
    first.stop()
    second.stop()
    assert [short(event) for event in first.trace.events] == [short(event) for event in second.trace.events]
    assert_closed(model)


@pytest.mark.parametrize("inplace", [True, False])
def test_compiled_code_is_seen_by_its_plain_names_and_runs_compiled_again_afterwards(inplace: bool) -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model: Any = nn.Sequential(Calls(lambda model, x: model.fc(x).relu()))
    if inplace:
        model[0].compile(backend=backend)
    else:
        model[0] = torch.compile(model[0], backend=backend)
    x = noise(3, 4)
    with Watch(model) as watch:
        model(x)
    assert [short(event) for event in watch.trace.events] == [
        *("Began ", "Began 0", "Began 0.fc", "Ran linear", "Ended 0.fc", "Ran relu", "Ended 0", "Ended "),
    ]
    assert not compiled
    assert ("0.fc", "weight") in watch.trace.tensors
    model(x)
    assert len(compiled) == 1


def test_a_wrappers_call_of_the_model_is_overlooked_and_what_runs_in_it_is_not() -> None:
    class Root(Calls):
        def forward(self, x: Tensor, step: bool = False) -> Any:
            return self(x) * 2 if step else super().forward(x)

    model, x = Root(), noise(3, 4)
    with Watch(model, skip_root_calls=1) as watch:
        model(x, True)
    assert [short(event) for event in watch.trace.events] == [
        *("Began ", "Began fc", "Ran linear", "Ended fc", "Ended ", "Ran mul"),
    ]


def test_parameters_without_a_shape_are_seen() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
    with Watch(model) as watch:
        model(noise(3, 4))
    assert [event.name for event in watch.trace.events if isinstance(event, Began)] == ["", "0", "1"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_have_axes_of_unknown_length() -> None:
    trace = watched(lambda model, x: torch.nested.nested_tensor([x, x[:2]]) + torch.nested.nested_tensor([x, x[:2]]))
    assert functions(trace)[-1].reads[0].shape == (-1, -1, -1)


@pytest.mark.parametrize(
    ("use", "norms"),
    [
        (lambda m, x: m.norm(m.fc(x)), {"fc": "norm"}),
        (lambda m, x: (m.other(y := m.fc(x)), m.norm(y)), {"fc": "other"}),
        (lambda m, x: m.other(m.norm(m.fc(x))), {"fc": "norm"}),
        (lambda m, x: m.norm(m.fc(m.norm(m.fc(x)))), {"fc": "norm"}),
        (lambda m, x: m.norm(m.fc(x).relu()), {}),
        (lambda m, x: m.norm(m.fc(x).add_(1)), {}),
        (lambda m, x: m.norm(F.linear(x, m.fc.weight)), {}),
    ],
)
def test_the_norm_right_behind_a_layer(use: Callable[[Any, Tensor], Any], norms: dict[str, str]) -> None:
    found, layer_of = find_norms(watched(use), ["fc"], ["norm", "other"])
    assert found == norms
    assert set(layer_of.values()) <= {"fc"}
