"""What torch.export makes of a network becomes layers with the network's names, or is refused with its place."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qface.errors import TraceError, UnsupportedLayerError
from qface.graph import Add, canonicalize, capture
from qface.models import IResNet
from qface.network_output import embedding_of
from qface.preprocessing import Preprocessing, preprocessing_of, with_preprocessing
from qface.provenance import provenance_of, record_step
from tests.graph.kinds import kinds
from tests.networks import tiny_face_net

SMALL = Preprocessing(size=(16, 12))


def small(model: nn.Module) -> nn.Module:
    return with_preprocessing(model.eval(), SMALL)


class Net(nn.Module):
    """A convolution, and ``end`` of its mean over the map [N, 4]."""

    def __init__(self, end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, 4, 3), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.conv(x).mean((2, 3)))


def refusal(model: nn.Module, kind: type[Exception] = UnsupportedLayerError) -> str:
    with pytest.raises(kind) as caught:
        capture(small(model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- names, parameters, modes


def test_layers_are_called_after_their_parameters() -> None:
    model = IResNet((1, 1, 1, 1), 8).eval()
    captured = capture(model)
    named = {name for name, layer in model.named_modules() if list(layer.parameters(recurse=False))}
    assert named <= {node.target for node in captured.graph.nodes if node.op == "call_module"}


def test_parameters_are_those_of_the_model() -> None:
    model = small(Net(lambda x: x))
    captured = capture(model)
    assert captured.get_submodule("conv").weight is model.conv.weight


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_not_changed(training: bool) -> None:
    model = with_preprocessing(tiny_face_net(size=(32, 32)), Preprocessing(size=(32, 32))).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    captured = capture(model)
    assert model.training == training
    assert not captured.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_graph_of_layers_is_returned_as_it_is() -> None:
    captured = capture(small(Net(lambda x: x)))
    assert capture(captured) is captured


def test_a_traced_network_is_captured_as_any_other() -> None:
    model = small(Net(lambda x: F.relu(x) + x))
    traced = with_preprocessing(torch.fx.symbolic_trace(model), SMALL)
    assert kinds(capture(traced)) == kinds(capture(model))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapper_is_taken_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = small(Net(F.relu))
    wrapped = with_preprocessing(wrap(model), SMALL)
    captured = capture(wrapped)
    assert kinds(captured) == kinds(capture(model))
    assert captured.get_submodule("conv").weight is model.conv.weight
    assert kinds(canonicalize(wrapped)) == kinds(canonicalize(model))


def test_a_forward_may_take_any_number_of_arguments() -> None:
    class Forwarding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(F.relu)

        def forward(self, *args: Tensor) -> Tensor:
            return self.net(*args)

    assert kinds(capture(small(Forwarding()))) == kinds(capture(small(Net(F.relu))))


def test_a_checkpointed_network_is_captured() -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Any:
            return checkpoint(super().forward, x, use_reentrant=False)

    assert kinds(capture(small(Checkpointed(F.relu)))) == kinds(capture(small(Net(F.relu))))


def test_what_a_model_carries_is_carried_on() -> None:
    model = record_step(small(Net(lambda x: x)), "made", {"by": "hand"})
    captured = capture(model)
    assert preprocessing_of(captured) == SMALL
    assert provenance_of(captured) == provenance_of(model) != ()


def test_dropout_stays_a_layer_that_drops_in_training() -> None:
    captured = capture(small(Net(nn.Dropout(0.5))))
    assert kinds(captured)[-1] is nn.Dropout


def test_a_layer_that_is_called_twice_is_there_twice_with_its_own_parameters_shared() -> None:
    fc = nn.Linear(4, 4)
    captured = capture(small(Net(nn.Sequential(fc, nn.ReLU(), fc))))
    first, second = (layer for layer in captured.modules() if isinstance(layer, nn.Linear))
    assert first is not second
    assert first.weight is second.weight


def test_code_that_is_not_run_on_images_is_not_captured() -> None:
    def end(x: Tensor) -> Tensor:
        if x.requires_grad and not torch.is_grad_enabled():
            print("unreachable")
        for _ in range(2):
            x = x + F.relu(x)
        return x

    assert kinds(capture(small(Net(end)))).count(Add) == 2


# ---- outputs


@pytest.mark.parametrize(
    "end",
    [
        lambda x: (F.relu(x), x.norm(dim=1, keepdim=True)),
        lambda x: [x.norm(dim=1), F.relu(x)],
        lambda x: {"norm": x.norm(dim=1, keepdim=True), "embedding": F.relu(x)},
        lambda x: (F.relu(x), {"map": x[:, :, None, None]}),
    ],
)
def test_the_embedding_is_found_among_several_outputs(
    end: Callable[[Tensor], Any], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = small(Net(end))
    with caplog.at_level(logging.WARNING, "qface"):
        captured = capture(model)
    assert [record.message for record in caplog.records if record.name == "qface"] == [
        "the network returns 2 tensors; the one [N, 4] is the embedding"
    ]
    x = torch.randn(3, 3, 16, 12)
    assert torch.equal(captured(x), embedding_of(model(x)))
    assert kinds(captured)[-1] is nn.ReLU  # what makes the norm is gone


def test_none_beside_the_embedding_is_no_output(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "qface"):
        capture(small(Net(lambda x: (x, None))))
    assert not [record for record in caplog.records if record.name == "qface"]


def test_a_map_of_one_pixel_is_an_embedding() -> None:
    model = small(Net(lambda x: x[:, :, None, None]))
    captured = capture(model)
    x = torch.randn(3, 3, 16, 12)
    assert captured(x).shape == (3, 4)
    assert torch.equal(captured(x), embedding_of(model(x)))


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (lambda x: (x, x + 1), "returns [N, 4], [N, 4]: several outputs [N, D]"),
        (lambda x: x[:, :, None], "returns [N, 4, 1]: no output [N, D]"),
        (lambda x: x.sum(1), "returns [N]: no output [N, D]"),
    ],
)
def test_outputs_without_one_embedding_are_refused(end: Callable[[Tensor], Any], message: str) -> None:
    assert message in refusal(Net(end))


# ---- refusals


def test_control_flow_by_what_the_images_hold_is_refused_with_its_place() -> None:
    def end(x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x

    assert re.search(r"Net cannot be captured at .*test_capture\.py:\d+ in end: ", refusal(Net(end), TraceError))


def test_a_refusal_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    refusal(Net(lambda x: x * float(x.max())), TraceError)
    assert capfd.readouterr() == ("", "")


def test_numbers_of_what_the_images_hold_are_refused_with_their_place() -> None:
    message = refusal(Net(lambda x: x * float(x.max())), TraceError)
    assert re.search(r"at .*test_capture\.py:\d+ in <lambda>: ", message)


def test_a_network_that_counts_its_images_in_python_is_captured() -> None:
    torch.manual_seed(0)
    model = small(Net(lambda x: x.view(len(x), 2, 2).transpose(1, 2).reshape(int(x.shape[0]), 4)))
    x = torch.randn(5, 3, 16, 12)
    torch.testing.assert_close(capture(model)(x), model(x))


def test_a_network_of_one_number_of_images_is_refused() -> None:
    weight = torch.ones(2, 4)
    assert "must not fix the batch size" in refusal(Net(lambda x: x * weight), TraceError)


def test_a_network_that_computes_otherwise_for_many_images_is_refused() -> None:
    assert "must not fix" in refusal(Net(lambda x: F.relu(x) if len(x) > 2 else x), TraceError)


def test_a_network_that_changes_its_buffers_is_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return x

    assert "changes its buffer 'end.seen'" in refusal(Net(Counting()), TraceError)


def test_an_operator_that_is_not_known_is_refused_with_module_and_line() -> None:
    message = refusal(nn.Sequential(nn.Identity(), Net(lambda x: torch.linalg.svdvals(x[:, None])[:, 0:1] * x)))
    assert re.search(
        r"linalg_svdvals in .1., which qface does not support; use another operator \(.*test_capture\.py:\d+\)", message
    )


def test_a_network_of_another_size_is_refused() -> None:
    model = with_preprocessing(tiny_face_net(size=(32, 32)), Preprocessing(size=(64, 64)))
    with pytest.raises(TraceError, match="does not run on an image of 3x64x64"):
        capture(model)


def test_other_operators_in_place_than_those_of_values_are_refused() -> None:
    def end(x: Tensor) -> Tensor:
        x[:, 0] = 0
        return x

    with pytest.raises((TraceError, UnsupportedLayerError)):
        canonicalize(small(Net(end)))
