"""Compiled models are judged like what they were compiled from."""

import pytest
import torch
from planted import evaluate, inputs, linear
from torch import nn

import forged_fx
from forged_fx.evaluate.compiled import is_compiled

pytestmark = pytest.mark.usefixtures("single_thread")


def case(n=30):
    base, x = linear(classes=4), inputs(n)
    return base, {"x": x, "y": base(x).argmax(1), "eps": 0.05, "attacks": ["apgd-ce"]}


def outcomes(result):
    return [tensor for side in result.sides for tensor in (side.broken_by, side.examples)]


def test_attacked_eagerly_where_that_is_the_same():
    base, call = case()
    stats = forged_fx.calibrate(base, [call["x"]])
    forged = forged_fx.transform(base, stats, ratio=0.6)
    call["bpda"] = None  # the library's own
    expected = evaluate(forged, base, **call)
    compiled = torch.compile(forged, backend="forged")
    result = evaluate(compiled, base, **call)
    assert all(map(torch.equal, outcomes(result), outcomes(expected)))
    assert result.notes == ["the model is compiled; attacked eagerly, and what breaks it breaks it compiled too"]
    assert 0 < result.worst_case < 1 and any(row.kind == "BPDA" and row.attacked for row in result.rows)
    result.verify(compiled, call["x"], call["y"], base)


def rolled(graph, example_inputs):
    """A backend that makes another function of the model."""
    return lambda *args: tuple(out.roll(1, dims=1) for out in graph(*args))


def test_attacked_compiled_where_it_is_another_function():
    base, call = case(12)
    compiled = torch.compile(base, backend=rolled)
    assert evaluate(compiled, **call).model.accuracy("natural") == 0
    call["y"] = (call["y"] + 1) % 4
    result = evaluate(compiled, **call)
    assert result.notes == ["the model is compiled, and another function eagerly; attacked as it is, compiled"]
    assert result.model.accuracy("natural") == 1 and result.worst_case < 1
    result.verify(compiled, call["x"], call["y"])


def rounded(graph, example_inputs):
    """A backend that rounds images to eighths: no attack of less than a sixteenth gets through."""
    return lambda *args: graph(*((arg * 8).round() / 8 if arg.dim() == 4 else arg for arg in args))


def test_what_breaks_it_eagerly_only_does_not_count():
    base, call = case(12)
    call["x"] = (call["x"] * 8).round() / 8  # on clean images the two are the same
    call["y"] = base(call["x"]).argmax(1)
    assert evaluate(base, **call).worst_case < 1
    compiled = torch.compile(base, backend=rounded)
    result = evaluate(compiled, **call)
    assert "attacked eagerly" in result.notes[0] and result.worst_case == 1


def test_a_compiled_part_and_compiled_in_place():
    base, call = case(12)
    expected = evaluate(base, **call)
    parted = nn.Sequential(torch.compile(base, backend="eager")).eval()
    placed = linear(classes=4)
    placed.compile(backend="eager")
    assert is_compiled(parted) and is_compiled(placed) and not is_compiled(base)
    for model in (parted, placed):
        result = evaluate(model, **call)
        assert all(map(torch.equal, outcomes(result), outcomes(expected)))
        assert "attacked eagerly" in result.notes[0]
