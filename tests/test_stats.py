"""Stats: exact under merge, the same after a file, and refusing what is not theirs."""

import json

import numpy as np
import pytest
import scratch
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import forged_fx
from forged_fx import histogram
from forged_fx.stats import Stats


def net(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 5))


@pytest.fixture
def batches():
    return list(torch.randn(50, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(16))


@pytest.fixture
def stats(batches):
    return forged_fx.calibrate(net(), batches)


def test_merge_of_two_halves_is_the_whole(batches, stats):
    halves = [forged_fx.calibrate(net(), part) for part in (batches[:1], batches[1:])]
    assert halves[0].merge(halves[1]) == stats == halves[1].merge(halves[0])
    assert halves[0] != stats


def test_merge_refuses_another_model(batches, stats):
    with pytest.raises(ValueError, match=r"different models.*\(8, 3, 3, 3\).*\(9, 3, 3, 3\)"):
        stats.merge(forged_fx.calibrate(net(9), batches))


def test_a_file_holds_everything(stats, tmp_path):
    stats.save(tmp_path / "stats.safetensors")
    assert Stats.load(tmp_path / "stats.safetensors") == stats
    assert [p.name for p in tmp_path.iterdir()] == ["stats.safetensors"]


MEASURED = """
import torch, forged_fx
torch.manual_seed(0)
model, x = torch.nn.Sequential(torch.nn.Linear(4, 3)), list(torch.randn(3, 5, 4))
made = forged_fx.calibrate(model, x)
made.save("stats")
kept = [made, forged_fx.Stats.load("stats"), *(forged_fx.calibrate(model, x, checkpoint="kept") for _ in range(2))]
print([stats.sites["0"].negatives for stats in kept], int(sum((b < 0).sum() for b in x)))
print(forged_fx.Stats.load("older").sites["0"].negatives)
"""


def test_a_measurement_that_is_added_as_the_docs_say_is_kept_everywhere(stats, tmp_path):
    """Under merge, in files, in a checkpoint; an older file gives the default. Without a rule nothing is imported."""
    page = (scratch.ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith("negatives: int = ")]
    stats.save(tmp_path / "older")
    at = "    def share_zeroed("
    filled = ("            one.sampled = values.numel()\n", "            one.negatives = int((x < 0).sum())\n")
    done = scratch.run(tmp_path, MEASURED, {"stats.py": [(at, f"    {line}\n\n")], "calibrate.py": [filled]})
    assert done.stdout.splitlines() == ["[27, 27, 27, 27] 27", "0"], done.stderr
    done = scratch.run(tmp_path, MEASURED, {"stats.py": [(at, "    negatives: int = 0\n\n")]})
    assert "SiteStats.negatives does not say how two scans' are merged: give it a rule" in done.stderr


def test_a_model_is_recognised_and_another_refused(stats):
    stats.check_model(net())
    with pytest.raises(ValueError, match=r"'0' has parameters .*\(9, 3, 3, 3\).*calibrate"):
        stats.check_model(net(9))
    with pytest.raises(ValueError, match="'3' is missing"):
        stats.check_model(net()[:2])


def test_shares_match_a_count(batches, stats):
    """To the histogram's resolution: the share lies between the counts at the edges of the threshold's bin."""
    x = torch.cat([b.flatten() for b in batches]).abs().numpy()
    site = stats.sites["0"]
    assert site.sampled == site.elements == x.size
    for t in np.geomspace(1e-3, 3, 40, dtype=np.float32):
        i = np.searchsorted(histogram.EDGES, t, side="right") - 1
        low, high = (np.mean(x < edge) for edge in histogram.EDGES[i : i + 2])
        assert low - 1e-12 <= site.share_zeroed(float(t)) <= high + 1e-12


def test_zeros_are_counted_apart(stats):
    after_relu = stats.sites["3"]
    assert after_relu.share_zeroed(0.0) == 0
    assert after_relu.share_zeroed(1e-30) == after_relu.zeros / after_relu.sampled > 0.3


def test_bins_are_exact_at_their_edges():
    edges = torch.from_numpy(histogram.EDGES[1 : histogram.BINS - 8].copy())
    below = torch.nextafter(edges, torch.zeros(()))
    values = torch.cat([edges, below, torch.zeros(3), -edges[:1]])
    ((zeros, *counts),) = histogram.count([values])
    counts = np.array(counts)
    assert zeros == 3 and counts[0] == 1 and zeros + counts.sum() == values.numel()
    assert counts[1] == 3 and np.unique(counts[2:-9]).tolist() == [2]


def test_samples_are_counted_together_as_one_by_one():
    random = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    samples = [
        (torch.randn(i % 7 * 3, generator=random) * 2.0 ** (i % 40 - 20)).relu().neg().to(dtypes[i % 4])
        for i in range(2 * histogram.AT_ONCE + 5)
    ]
    found = histogram.count(samples)
    for sample, (zeros, *counts) in zip(samples, found, strict=True):
        values = sample.abs().float()
        bins = np.histogram(values[values != 0].numpy(), [*histogram.EDGES[:2041], np.inf])[0]
        assert zeros == (values == 0).sum() and np.array_equal(counts[:2041], bins) and not any(counts[2041:])
    assert histogram.count([]).shape == (0, 1 + histogram.BINS)


def test_a_tensor_without_gaps_is_read_where_it_lies():
    x = torch.rand(2, 3, 4, 5)
    for dense in (x, x.contiguous(memory_format=torch.channels_last), x.permute(3, 0, 2, 1)):
        assert histogram.flat(dense).data_ptr() == dense.data_ptr()
        assert histogram.flat(dense).sort().values.equal(dense.reshape(-1).sort().values)
    for apart in (x[..., ::2], x[:, :1].expand(2, 3, 4, 5), x[:, 1:]):
        assert histogram.flat(apart).equal(apart.reshape(-1))


@pytest.mark.parametrize("shape", [(64, 64, 32, 32), (8, 197, 384), (3, 5, 7, 11)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_the_sample_favours_no_channel(shape, layout):
    """Each channel's share of the sample is its share of the tensor."""
    x = torch.arange(shape[1], dtype=torch.float32).view(1, -1, *[1] * (len(shape) - 2)).expand(shape).contiguous()
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "strided":
        x = x.repeat(1, 1, *[1] * (len(shape) - 3), 2)[..., ::2]
    values = histogram.sample(x)
    assert values.numel() == x.numel() or histogram.SAMPLE * 0.8 < values.numel() < histogram.SAMPLE * 1.2
    share = torch.bincount(values.long(), minlength=shape[1]) / values.numel()
    assert (share * shape[1] - 1).abs().max() < 0.15


def test_thresholds_are_ratio_times_c_max(stats):
    c = {name: site.c_max for name, site in stats.sites.items()}
    assert stats.thresholds(2**-6) == {"0": c["0"] / 64, "3": c["3"] / 64}
    assert stats.thresholds({"0": 0.5, "*": 0}) == {"0": c["0"] / 2, "3": 0}
    assert stats.thresholds({"*": 0.25, "3": 1}) == {"0": c["0"] / 4, "3": c["3"]}
    assert stats.thresholds(0.3)["0"] == float(np.float32(0.3 * c["0"]))
    assert stats.thresholds(np.float32(0.25)) == stats.thresholds(0.25)


@pytest.mark.parametrize(
    "ratio, message",
    [
        (-1, "in .0, 1."),
        (float("nan"), "in .0, 1."),
        (1.5, "in .0, 1."),
        ("big", "in .0, 1."),
        (True, "in .0, 1."),
        (np.float32(2), "in .0, 1."),
        ({"0": 0.1}, "no ratio for site '3'"),
        ({"*": 0.1, "conv": 0.2}, "'conv' matches no site"),
        ({"*": -2}, "ratio for '.'"),
    ],
)
def test_ratios_of_no_use(stats, ratio, message):
    with pytest.raises(ValueError, match=message):
        stats.thresholds(ratio)


def _edit(path, tensors=None, header=None):
    arrays = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        text = json.loads(file.metadata()["forged_fx.stats"])
    arrays.update(tensors or {})
    text.update(header or {})
    save_file(arrays, path, {"forged_fx.stats": json.dumps(text)})


@pytest.mark.parametrize(
    "edit, message",
    [
        (dict(header={"format": 99}), "format is 99"),
        (dict(tensors={"c_max": np.array([1, -1], np.float32)}), "negative or not finite"),
        (dict(tensors={"c_max": np.array([1, np.inf], np.float32)}), "negative or not finite"),
        (dict(tensors={"c_max": np.ones(3, np.float32)}), "shape"),
        (dict(tensors={"c_max": np.full(2, 1e-3, np.float32), "lowest": np.zeros(2, np.float32)}), "above its maximum"),
        (dict(header={"sites": 7}), "is not a file of calibration statistics"),
        (dict(header={"sites": {"a": {}, "b": {}}}), "is not a file of calibration statistics"),
    ],
)
def test_a_file_that_was_tampered_with_is_refused(stats, tmp_path, edit, message):
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    _edit(path, **edit)
    with pytest.raises(ValueError, match=message):
        Stats.load(path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(stats, tmp_path, keep):
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"stats\.safetensors is not a file of calibration statistics"):
        Stats.load(path)


def test_a_file_that_holds_no_statistics_is_not_written_over(stats, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"weight": np.ones(3, np.float32)}, path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"weights\.safetensors is there already, and is no file of calibration"):
        stats.save(path)
    assert path.read_bytes() == before
    (tmp_path / "empty").touch()
    for name in ("empty", "new"):
        stats.save(tmp_path / name)
        stats.save(tmp_path / name)
        assert Stats.load(tmp_path / name) == stats


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("", IsADirectoryError, r"^\. is a folder: name a file in it"),
        (".", IsADirectoryError, "is a folder: name a file in it"),
        (3, TypeError, "takes a path, not int"),
        ("file/x", NotADirectoryError, "no file can be made in file .*: make that folder, or put x into one"),
    ],
)
def test_a_place_where_no_file_can_be_is_named_with_the_next_step(
    stats, batches, path, error, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(error, match=words):
        stats.save(path)
    with pytest.raises(error, match=words):
        forged_fx.calibrate(net(), batches, checkpoint=path)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none: write them with forged_fx\.calibrate"):
        Stats.load(tmp_path / "none")
