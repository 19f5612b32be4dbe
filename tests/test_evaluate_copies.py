"""An input that was given before, or one so near that it is no other, is no further evidence."""

import json

import planted
import pytest
import torch
from planted import evaluate

import forged_fx
from forged_fx.evaluate import Result, copies
from forged_fx.evaluate.statistics import compare
from forged_fx.evaluate.verdict import weigh

pytestmark = pytest.mark.usefixtures("single_thread")


def noisy(x, size, seed=0):
    return (x + size * torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 8, 8), (5,), (1,)])
def test_a_copy_is_known_by_its_elements_and_not_by_their_mean(shape):
    x = torch.rand(7, *shape, generator=torch.Generator().manual_seed(3)) * 0.9
    given = torch.cat([x, noisy(x[2:4], 1.9e-3), x[:1], noisy(x[4:5], 0.05)])
    assert copies.first_of(given).tolist() == [*range(7), 2, 3, 0, 10] and copies.among(given) == [7, 8, 9]
    if len(shape) > 1:
        turned = torch.cat([x[:1], x[:1].flip(2), x[:1].flip(3)])  # the same mean
        assert copies.among(turned) == []


def test_each_group_has_one_first_and_what_is_near_a_copy_alone_is_another():
    x = torch.tensor([0.5, 0.5015, 0.503, 0.5031])[:, None]
    assert copies.first_of(x).tolist() == [0, 0, 2, 2]


def test_copies_cost_little():
    x = torch.rand(3000, 3, 8, 8)
    assert copies.among(torch.cat([x, x[:5]])) == [*range(3000, 3005)]


@pytest.mark.parametrize("size", [0, 1e-6, 1e-3])
def test_one_image_again_and_again_is_one_input(monkeypatch, size):
    planted.hurry(monkeypatch)
    strong, weak, x, y = planted.strong_and_weak()
    x, y = noisy(x[:1].repeat(30, 1, 1, 1), size), y[:1].repeat(30)
    with pytest.warns(UserWarning, match="29 of 30 inputs are copies of others: .* of the other 1 alone"):
        result = evaluate(strong, weak, x=x, y=y, eps=0.1)
    assert result.worst_case == 1 and result.base_worst_case == 0 and result.compared().n == 1
    assert result.verdict == "cannot say" and "copies of them left out" in result.sentence


def test_what_is_said_is_of_inputs_that_are_no_copies(monkeypatch, tmp_path):
    planted.hurry(monkeypatch)
    strong, weak, x, y = planted.strong_and_weak()
    call = {"x": torch.cat([x, noisy(x[:4], 1e-3)]), "y": torch.cat([y, y[:4]]), "eps": 0.1}
    with pytest.warns(UserWarning, match="4 of 28 inputs"):
        result = evaluate(strong, weak, **call, folder=tmp_path)
    alone = evaluate(strong, weak, x=x, y=y, eps=0.1)
    assert result.compared() == alone.compared() and result.compared().n == 24 and result.n == 28
    assert result.verdict == "gain" and "right on 28 of 28 inputs, its base on 0" in result.sentence
    assert "points on the 24 that are no copies of others" in result.sentence
    assert Result.load(tmp_path).compared() == alone.compared()
    found = forged_fx.compare(tmp_path, result)
    assert found.paired().n == 24 and any("4 of 28 inputs" in caution for caution in found.cautions)
    record = json.loads((tmp_path / "result.json").read_text())
    for said, words in (([28], "copies are said to be"), ([0], "copies are said to be"), (None, "")):
        changed = {key: value for key, value in record.items() if key != "copies"} | ({"copies": said} if said else {})
        (tmp_path / "result.json").write_text(json.dumps(changed))
        if words:
            with pytest.raises(ValueError, match=words):
                Result.load(tmp_path)
    assert Result.load(tmp_path).compared().n == 28  # of an earlier version


def test_what_rows_took_of_copies_counts_once():
    true, worst = torch.ones(40, dtype=torch.bool), torch.ones(40, dtype=torch.bool)
    worst[:6] = False
    distinct = copies.others(40, [1, 2, 3, 4, 5])
    model = {"true gradient": true, "further": worst}
    for given, taken in ((None, 6), (distinct, 1)):
        paired = compare(worst, true, distinct=given)
        e = weigh(lambda kind="further": model[kind], lambda kind="further": true, paired, True, False, distinct=given)
        assert e.taken == paired.base_only == taken and e.masked is (taken == 6) and e.worst == 34
