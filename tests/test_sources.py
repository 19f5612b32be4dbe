"""Models and images by name."""

import copy
import enum
import gzip
import pickle
import re
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from nets import vit_in_a_folder
from safetensors.torch import save_file
from torch import nn

import forged_fx
from forged_fx import digits
from forged_fx.sources import load_data, load_model
from forged_fx.sources.classifier import NORMALIZATIONS, normalization


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture
def x():
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def tiny():
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 4))


# models


def test_a_function_of_a_package(x):
    model = load_model("test_sources:tiny")
    assert not model.module.training and model.classifier() is model.module and torch.equal(model.inputs(x), x)
    assert torch.equal(model.module(x), load_model("test_sources:tiny").module(x))  # seeded


@pytest.mark.parametrize("name", ["test_sources:gone", "gone.at_all:f", "test_sources:digits.EPS"])
def test_a_function_that_gives_no_model(name):
    with pytest.raises(ValueError, match=r"module:function|returns an nn\.Module"):
        load_model(name)


def of_size(width):
    return nn.Linear(width, 4)


def test_a_function_that_wants_to_be_told_more():
    with pytest.raises(TypeError, match=r"^test_sources:of_size is called without arguments.*'width'"):
        load_model("test_sources:of_size")


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:squeezenet1_1"])
def test_a_librarys_own_weights_are_asked_of_the_network_and_the_next_step_is_named(name):
    with pytest.raises(ValueError, match=r"could not be fetched .*--weights FILE, or --weights random") as raised:
        load_model(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:squeezenet1_1"])
def test_a_librarys_model_knows_its_normalisation_but_not_that_of_other_weights(name, tmp_path):
    model = load_model(name, "random")
    assert model.normalize == NORMALIZATIONS["imagenet"] and model.size in (176, 224)
    save_file(model.module.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"how are the inputs of .* normalised"):
        load_model(name, tmp_path / "w.safetensors")
    assert load_model(name, tmp_path / "w.safetensors", normalize="none").normalize is None


@pytest.mark.parametrize("name, hint", [("timm:resnet81", "resnet18"), ("torchvision:resnet81", "resnet18")])
def test_close_matches_are_offered(name, hint):
    with pytest.raises(ValueError, match=f"has no model 'resnet81': did you mean.*{hint}"):
        load_model(name)


def test_what_is_calibrated_is_the_librarys_model_and_what_is_judged_takes_images(x):
    model = load_model("test_sources:tiny", normalize="0.5/0.25")
    judged = model.classifier()
    assert torch.equal(judged(x), model.module((x - 0.5) / 0.25))
    stats = forged_fx.calibrate(model.module, [model.inputs(x)])
    assert list(stats.sites) == ["0", "2"] and stats.sites["0"].c_max == float(((x - 0.5) / 0.25).abs().max())
    assert list(model.module.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_normalisations():
    assert normalization("0.5,0.4,0.3/1,1,2") == ((0.5, 0.4, 0.3), (1, 1, 2))
    for bad in ("imagenot", "0.5", "0.5/0", "0.5,0.5/1", "a/b", "0.5/nan"):
        with pytest.raises(ValueError, match="normalize="):
            normalization(bad)


def test_a_folder_of_hugging_face(x, tmp_path):
    vit_in_a_folder(tmp_path)
    model = load_model(f"hf:{tmp_path}")
    assert model.normalize == ((0.5,) * 3, (0.5,) * 3) and model.size == 8
    assert torch.equal(model.classifier()(x), model.module(pixel_values=(x - 0.5) / 0.5).logits)
    stats = forged_fx.calibrate(model.module, [model.inputs(x)])
    forged = model.classifier(forged_fx.transform(model.module, stats, 0))
    assert torch.equal(forged(x), model.classifier()(x))


def test_a_processor_that_does_more_than_normalise(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(image_size=8, depth_multiplier=0.1)
    transformers.MobileNetV2ForImageClassification(config).save_pretrained(tmp_path)
    swaps_channels = transformers.MobileViTImageProcessor(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
    )
    swaps_channels.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"MobileViTImageProcessor.* makes other inputs .*name that, package\.module"):
        load_model(f"hf:{tmp_path}")
    swaps_channels.do_flip_channel_order = False
    swaps_channels.save_pretrained(tmp_path)
    assert load_model(f"hf:{tmp_path}").normalize is None


def test_robustbench_by_its_own_code(monkeypatch, tmp_path):
    pyautoattack = pytest.importorskip("pyautoattack")
    zoo, utils = types.ModuleType("robustbench.model_zoo"), types.ModuleType("robustbench.utils")
    kinds = enum.Enum("Kinds", {"data": "cifar10", "norm": "L2"})
    zoo.model_dicts = {kinds.data: {kinds.norm: {"Author2020": {"model": tiny}}}}
    asked = []

    def load(model_name, dataset, threat_model, model_dir="models"):
        asked.append((model_name, dataset, threat_model))
        model = tiny()
        model.load_state_dict(torch.load(f"{model_dir}/{dataset}/{threat_model}/{model_name}.pt")["state_dict"])
        return model

    utils.load_model = load
    for module in (types.ModuleType("robustbench"), zoo, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("autoattack", "autoattack.state"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    trained = tiny()
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "w.pt")
    model = load_model("robustbench:cifar10/L2/Author2020", tmp_path / "w.pt")
    assert asked == [("Author2020", "cifar10", "L2")] and model.threat == ("L2", 0.5) and model.size == 32
    assert torch.equal(model.module[0].weight, trained[0].weight)
    assert issubclass(sys.modules["autoattack"].AutoAttack, pyautoattack.AutoAttack)
    with pytest.raises(ValueError, match="did you mean Author2020"):
        load_model("robustbench:cifar10/L2/Author2021")
    with pytest.raises(ValueError, match="its lists are cifar10/L2"):
        load_model("robustbench:cifar10/Linf/Author2020")
    with pytest.raises(ValueError, match="could not be fetched"):
        load_model("robustbench:cifar10/L2/Author2020")


def test_without_robustbench_the_error_says_how_to_get_it(monkeypatch):
    for name in ("", ".utils", ".model_zoo"):
        monkeypatch.setitem(sys.modules, f"robustbench{name}", None)
    with pytest.raises(ImportError, match="pip install robustbench"):
        load_model("robustbench:Standard")


@pytest.fixture
def program(tmp_path, x):
    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(tiny().eval(), (x,), dynamic_shapes=({0: torch.export.Dim("n")},)), path)
    return path


def test_a_program_of_torch_export(program, x):
    model = load_model(str(program)).module
    assert torch.equal(model(x), torch.export.load(program).module()(x))
    stats = forged_fx.calibrate(model, [x])
    assert torch.equal(forged_fx.transform(model, stats, 0)(x[:1]), model(x[:1]))
    with pytest.raises(ValueError, match="holds its weights"):
        load_model(str(program), "random")


LOAD = """
import sys, torch
from forged_fx.sources import load_model
model, (x, expected) = load_model(sys.argv[1]).module, torch.load(sys.argv[2], weights_only=True)
assert torch.equal(model(x), expected)
"""


@pytest.fixture
def forged(tmp_path, x):
    """A forged model, and the path of the program that it was saved as."""
    torch.manual_seed(0)
    model = tiny().eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-4)
    free = ({0: torch.export.Dim("n")},)
    torch.export.save(torch.export.export(forged, (x,), dynamic_shapes=free), tmp_path / "forged.pt2")
    return forged, str(tmp_path / "forged.pt2")


def test_a_forged_program_is_loaded_where_nothing_else_of_the_library_was_used(forged, tmp_path, x):
    model, path = forged
    torch.save((x, model(x).detach()), tmp_path / "data")
    theirs = "ignore:The given buffer is not writable"  # what torch.export.load says of any program, up to torch 2.12
    command = [sys.executable, "-W", theirs, "-c", LOAD, path, tmp_path / "data"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_a_forged_program_is_known_to_be_forged(forged, program, x):
    _, path = forged
    loaded = load_model(path)
    wrapped = load_model(path, normalize="imagenet").classifier()
    stats = forged_fx.calibrate(tiny().eval(), [x])
    by_torch = torch.export.load(path).module()
    for given in (loaded.module, wrapped, copy.deepcopy(loaded.module), by_torch):
        for call, message in (
            (lambda given=given: forged_fx.calibrate(given, [x]), "forged already, and is measured behind"),
            (lambda given=given: forged_fx.transform(given, stats), "forged already: .* or forge the plain model"),
            (lambda given=given: forged_fx.describe(given), "no record of its forging.*that it was exported from"),
            (lambda given=given: forged_fx.sparsity(given, [x]), "no record of its forging.*sparsity takes the forged"),
        ):
            with pytest.raises(ValueError, match=message):
                call()
    with pytest.raises(ValueError, match="is not forged: describe takes what"):
        forged_fx.describe(load_model(str(program)).module)


def test_a_forged_program_is_judged_as_the_model_is(forged, x):
    model, path = forged
    y = model(x).argmax(1)
    results = [
        forged_fx.evaluate(one, x=x, y=y, eps=0.5, attacks=["apgd-ce"]) for one in (model, load_model(path).module)
    ]
    one, other = ([(row.kind, row.attacked, row.broken, row.note) for row in result.rows] for result in results)
    assert one == other and ("BPDA", "apgd-ce") in {(row.kind, row.attack) for row in results[1].rows}


class Harm:
    def __reduce__(self):
        return (open, ("harm", "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "member",
    [
        "data/constants/opaque_obj_0",
        "data/constants/OPAQUE_OBJ_0",
        "data/aotinductor/model/x.wrapper.so",
        "data/sample_inputs/model.pt",
        "data/weights/x",
    ],
)
def test_a_program_that_holds_more_is_not_unpickled(program, member, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = tmp_path / "hostile.pt2"
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(hostile, "w", zipfile.ZIP_STORED) as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            if not name.endswith(member):
                new.writestr(name, old.read(name))
        new.writestr(f"{root}/{member}", pickle.dumps(Harm()))
    try:
        load_model(str(hostile))
    except ValueError as error:
        assert "\n" not in str(error)
        assert ("holds pickled objects" in str(error)) is ("opaque" in member.lower() or "aotinductor" in member)
    assert not (tmp_path / "harm").exists()


# weights


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w, "epoch": 5}, lambda w: {"model": w}])
def test_weights_as_training_scripts_keep_them(wrap, tmp_path):
    trained = tiny()
    parallel = {f"module.{name}": value for name, value in trained.state_dict().items()}
    for i, weights in enumerate((trained.state_dict(), parallel)):
        torch.save(wrap(weights), tmp_path / f"{i}.pt")
        model = load_model("test_sources:tiny", tmp_path / f"{i}.pt").module
        assert torch.equal(model[2].weight, trained[2].weight)


def saved(path, **sets):
    torch.save(sets, path)
    return path


def test_of_several_sets_of_weights_that_fit_one_has_to_be_chosen(tmp_path):
    """An average beside the weights; an optimizer's tensors and another model's are none that fit."""
    now, average = (dict(tiny().state_dict()) for _ in range(2))
    beside = {"optimizer": {"state": {0: {"step": torch.ones(())}}}, "discriminator": nn.Linear(2, 2).state_dict()}
    file = saved(tmp_path / "c.pt", model=now, model_ema=average, epoch=3, **beside)
    with pytest.raises(
        ValueError, match=r"2 sets of weights that fit Sequential: model, model_ema\. Say which, .*:model_e"
    ):
        load_model("test_sources:tiny", file)
    for key, weights in (("model", now), ("model_ema", average)):
        loaded = load_model("test_sources:tiny", f"{file}:{key}").module.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    with pytest.raises(ValueError, match=r"holds no weights at 'ema': it has model, model_ema, discriminator"):
        load_model("test_sources:tiny", f"{file}:ema")
    torch.save({"model": now, 3: "three", **beside}, tmp_path / "a.pt")
    alone = load_model("test_sources:tiny", tmp_path / "a.pt").module
    assert torch.equal(alone[0].weight, now["0.weight"])


@pytest.mark.parametrize(
    ("prefix", "wrapped"),
    [
        ("module.", lambda model: torch.optim.swa_utils.AveragedModel(model).state_dict()),
        ("_orig_mod.", lambda model: torch.compile(model).state_dict()),
        ("module._orig_mod.", lambda model: nn.ModuleDict({"module": torch.compile(model)}).state_dict()),
        ("model.", lambda model: {"state_dict": nn.ModuleDict({"model": model}).state_dict(), "epoch": 1}),
    ],
)
def test_what_a_wrapper_puts_ahead_of_every_name_is_taken_off(prefix, wrapped, tmp_path):
    torch.manual_seed(1)
    trained = tiny()
    torch.save(wrapped(trained), tmp_path / "w.pt")
    with pytest.warns(UserWarning, match=f"begin with '{prefix}', which was taken off"):
        model = load_model("test_sources:tiny", tmp_path / "w.pt").module
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in trained.state_dict().items())


def normed():
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))


def test_a_batchnorm_of_before_there_was_a_counter(tmp_path):
    weights = {name: value + 1 for name, value in normed().state_dict().items() if "tracked" not in name}
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, tmp_path / "old.pt")
    with pytest.warns(UserWarning, match="begin with 'module.'"):
        loaded = load_model("test_sources:normed", tmp_path / "old.pt").module.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_whole_numbers_are_no_weights(tmp_path):
    weights = {name: value.mul(100).to(torch.int8) for name, value in tiny().state_dict().items()}
    torch.save(weights, tmp_path / "int8.pt")
    with pytest.raises(ValueError, match=r"has no numbers with fractions for 0\.weight"):
        load_model("test_sources:tiny", tmp_path / "int8.pt")


SHARED = tiny()


def shared():
    return SHARED


@pytest.mark.parametrize("name", ["shared", "SHARED"])
def test_a_module_that_is_always_the_same_is_not_filled_itself(name, tmp_path):
    before = copy.deepcopy(SHARED.state_dict())
    weights = {key: value + 1 for key, value in before.items()}
    torch.save(weights, tmp_path / "w.pt")
    filled, bare = load_model(f"test_sources:{name}", tmp_path / "w.pt"), load_model(f"test_sources:{name}")
    for key, value in before.items():
        assert torch.equal(SHARED.state_dict()[key], value) and torch.equal(bare.module.state_dict()[key], value)
        assert torch.equal(filled.module.state_dict()[key], weights[key])


def tied():
    model = nn.ModuleDict({"embed": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 4)})
    model.head.weight = model.embed.weight
    return model


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: nn.ModuleDict({"module": model})])
def test_a_tensor_of_two_names_may_stand_in_the_file_under_either(wrap, tmp_path):
    from safetensors.torch import save_model

    torch.manual_seed(1)
    trained = tied()
    save_model(wrap(trained), str(tmp_path / "w.safetensors"))
    loaded = load_model("test_sources:tied", tmp_path / "w.safetensors").module
    assert loaded.head.weight is loaded.embed.weight
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in trained.state_dict().items())


def test_a_forged_models_weights_are_not_taken_for_a_plain_models(x, tmp_path):
    model = tiny()
    save_file(forged_fx.transform(model, forged_fx.calibrate(model, [x])).state_dict(), tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=r"has beside .*forged_threshold.*They are a forged model's, with its thr"):
        load_model("test_sources:tiny", tmp_path / "f.safetensors")


def test_weights_that_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.safetensors").write_text("text")
    torch.save({"state_dict": Harm()}, "harm.pt")
    torch.save([1], "list.pt")
    save_file({"0.weight": torch.zeros(1), "2.weight": torch.zeros(4, 72), "9.x": torch.zeros(1)}, "other.safetensors")
    cases = {
        "text.safetensors": "cannot be read",
        "harm.pt": "cannot be read",
        "list.pt": "no state_dict",
        "gone.pt": "there is no file",
        "other.safetensors": r"lacks 0.bias, 2.bias; it has beside 9.x; it has of another shape 0.weight",
    }
    for name, words in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=words) as raised:
            load_model("test_sources:tiny", name)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "harm").exists()


# data


def test_digits():
    train, test = load_data("digits"), load_data("digits", "test")
    assert (len(train), len(test)) == (1597, 200)
    x, y = test.tensors(3)
    assert torch.equal(x, digits.load()[2][:3]) and torch.equal(y, digits.load()[3][:3])


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 8, 8, 3), (5, 3, 8, 8), (5, 1, 8, 8)])
def test_npz(shape, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(5))
    np.savez(tmp_path / "b.npz", x=(x / 255).astype(np.float32))
    found, y = load_data(f"npz:{tmp_path / 'a.npz'}").tensors()
    assert found.shape == (5, 3 if 3 in shape else 1, 8, 8) and y.tolist() == [0, 1, 2, 3, 4]
    assert found.dtype == torch.float32 and 0 <= float(found.min()) and 0.9 < float(found.max()) <= 1
    unlabelled = load_data(f"npz:{tmp_path / 'b.npz'}")
    assert torch.allclose(next(iter(unlabelled.batches(5)))[0], found, atol=1e-7)
    with pytest.raises(ValueError, match="has no labels"):
        unlabelled.tensors()


def test_npz_that_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = np.zeros((2, 8, 8), np.uint8)
    np.savez("object.npz", x=np.array([Harm()], object))
    np.savez("range.npz", x=good + 1.5)
    np.savez("names.npz", images=good)
    np.savez("binary.npz", x=good + (np.arange(8) % 2).astype(np.uint8))
    np.savez("shape.npz", x=np.zeros((2, 3, 8, 3), np.uint8))
    np.savez("labels.npz", x=good, y=np.zeros(3, int))
    (tmp_path / "text.npz").write_text("text")
    np.save("array.npy", good)
    (tmp_path / "array.npy").rename("array.npz")
    np.savez_compressed("whole.npz", x=np.random.default_rng(0).integers(0, 256, (9, 99, 99), np.uint8))
    content = bytearray((tmp_path / "whole.npz").read_bytes())
    content[300:400] = bytes(100)
    (tmp_path / "damaged.npz").write_bytes(content)
    words = {
        "array": "a single array",
        "damaged": "cannot be read as npz",
        "object": "pickle",
        "range": "in \\[0, 1\\]; it is float64, and spans \\[1.5, 1.5\\]$",
        "names": "no array x",
        "binary": "holds 0 and 1 alone, where 255 is white",
        "shape": "has shape",
        "labels": "y has",
    }
    for name, match in {**words, "text": "cannot be read", "gone": "there is no file"}.items():
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            load_data(f"npz:{name}.npz")
    assert not (tmp_path / "harm").exists()


@pytest.fixture
def pictures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    for name in ("ape", "bee"):
        (tmp_path / name).mkdir()
        for i in range(4):
            image.fromarray(random.integers(0, 256, (12 + i, 10, 3), np.uint8)).save(tmp_path / name / f"{i}.png")
    image.fromarray(random.integers(0, 256, (9, 9), np.uint8)).save(tmp_path / "bee" / "grey.png")
    return tmp_path


def test_a_folder_of_images(pictures):
    data = load_data(f"imagefolder:{pictures}", resize="8,6")
    x, y = data.tensors()
    assert x.shape == (9, 3, 6, 6) and y.tolist() == [0] * 4 + [1] * 5
    assert torch.equal(x[8, 0], x[8, 2])  # grey
    assert data.tensors(3)[1].tolist() == [0, 0, 1]  # a part holds every class
    with pytest.raises(ValueError, match="--resize"):
        load_data(f"imagefolder:{pictures}").tensors()
    with pytest.raises(ValueError, match="no splits"):
        load_data(f"imagefolder:{pictures}", "train")


def test_more_than_8_bits_are_not_cut_off_in_silence(pictures):
    """PIL's convert, and so torchvision's ImageFolder, makes 255 of whatever is above."""
    image = pytest.importorskip("PIL.Image")
    for folder, values in (("ape", np.full((9, 9), 4000, np.uint16)), ("bee", np.full((9, 9), 0.5, np.float32))):
        path = pictures / folder / "wide.tiff"
        image.fromarray(values).save(path)
        with pytest.raises(ValueError, match=f"{path} has more than 8 bits a channel"):
            load_data(f"imagefolder:{pictures}", resize="8,6").tensors()
        path.unlink()


def test_a_damaged_image_is_named(pictures, monkeypatch):
    """By whichever process it is read."""
    path = pictures / "ape" / "1.png"
    path.write_bytes(path.read_bytes()[:80])
    for many in (99, 2):
        monkeypatch.setattr("forged_fx.sources.data.MANY", many)
        with pytest.raises(ValueError) as caught:
            list(load_data(f"imagefolder:{pictures}", resize="8,6").batches(2))
        assert re.fullmatch(
            rf"{path} cannot be read as an image \(.*\): replace it, or leave it out", str(caught.value)
        )


def test_names_of_classes_are_text(pictures):
    (pictures / "bee").rename(pictures / "be\x1b[31me")
    assert load_data(f"imagefolder:{pictures}").numbering == "0 ape, 1 be\\x1b[31me"


def test_a_part_of_sorted_images_has_every_class(tmp_path):
    x = np.zeros((40, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(40) // 10)
    assert load_data(f"npz:{tmp_path / 'a.npz'}").tensors(8)[1].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    np.savez(tmp_path / "b.npz", x=x, y=np.arange(40) % 7)
    assert load_data(f"npz:{tmp_path / 'b.npz'}").tensors(8)[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 0]


def test_folders_called_by_numbers_are_not_numbered_in_silence(tmp_path):
    """torchvision sorts 1, 10, 2: of a model whose classes count up, nearly every label is another's."""
    image = pytest.importorskip("PIL.Image")
    for name in range(1, 11):
        (tmp_path / str(name)).mkdir()
        image.fromarray(np.full((2, 2, 3), name, np.uint8)).save(tmp_path / str(name) / "a.png")
    unsure = load_data(f"imagefolder:{tmp_path}")
    assert len(list(unsure.batches(5))) == 2  # calibration needs no labels
    with pytest.raises(ValueError, match=r"\(1, 10, 2, .*\(1, 2, 3, .*imagefolder-as-text:.*imagefolder-as-numbers:"):
        unsure.tensors()
    for order, names in (("text", [1, 10, *range(2, 10)]), ("numbers", [*range(1, 11)])):
        data = load_data(f"imagefolder-as-{order}:{tmp_path}")
        x, y = data.tensors()
        assert data.classes == tuple(map(str, names)) and y.tolist() == list(range(10))
        assert (255 * x[:, 0, 0, 0]).round().tolist() == names
    assert data.numbering.startswith("0 1, 1 2") and data.numbering.endswith("9 10")
    (tmp_path / "ape").mkdir()
    image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "ape" / "a.png")
    assert load_data(f"imagefolder:{tmp_path}").tensors()[1].tolist() == list(range(11))  # no numbers: text
    with pytest.raises(ValueError, match="'ape' is no whole number"):
        load_data(f"imagefolder-as-numbers:{tmp_path}")


def test_many_images_are_decoded_by_other_processes(pictures, monkeypatch):
    monkeypatch.setattr("forged_fx.sources.data.MANY", 4)
    data = load_data(f"imagefolder:{pictures}", resize="8")
    with_workers = list(data.batches(2))
    monkeypatch.setattr("forged_fx.sources.data.MANY", 99)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(with_workers, data.batches(2), strict=True))


def test_batches_are_shared_out_by_slices():
    batches = load_data("digits").batches(100, limit=450)
    assert [len(y) for _, y in batches] == [100] * 4 + [50]
    parts = [batches[rank::2] for rank in range(2)]
    assert [len(part) for part in parts] == [3, 2]
    assert torch.equal(next(iter(parts[1]))[0], batches[1][0])


def test_cifar10(tmp_path):
    rows = np.random.default_rng(0).integers(0, 10, (4, 3073), np.uint8)
    with pytest.raises(FileNotFoundError, match="unpack CIFAR-10's archive"):
        load_data(f"cifar10:{tmp_path}", "test")
    rows.tofile(tmp_path / "test_batch.bin")
    x, y = load_data(f"cifar10:{tmp_path}", "test").tensors()
    assert y.tolist() == rows[:, 0].tolist() and x.shape == (4, 3, 32, 32)
    assert np.array_equal((x[1, 2, 3] * 255).round().numpy(), rows[1, 1 + 2048 + 96 : 1 + 2048 + 128])
    (tmp_path / "test_batch.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="no whole number"):
        load_data(f"cifar10:{tmp_path}", "test")


def test_a_pickled_cifar10_is_opened_only_as_published(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (folder / name).write_bytes(pickle.dumps(Harm()))
    with pytest.raises(ValueError, match="not as published"):
        load_data(f"cifar10:{tmp_path}", "test")
    assert not (tmp_path / "harm").exists()


def test_mnist(tmp_path):
    x, y = np.random.default_rng(0).integers(0, 256, (3, 4, 5), np.uint8), np.array([7, 2, 1], np.uint8)
    header = bytes((0, 0, 8, 3)) + b"".join(size.to_bytes(4, "big") for size in x.shape)
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + x.tobytes()))
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte"):
        load_data(f"mnist:{tmp_path}", "test")
    labels = folder / "t10k-labels-idx1-ubyte"
    labels.write_bytes(bytes((0, 0, 8, 1, 0, 0, 0, 3)) + y.tobytes())
    found, classes = load_data(f"mnist:{tmp_path}", "test").tensors()
    assert np.array_equal((found[:, 0] * 255).round().numpy(), x) and classes.tolist() == [7, 2, 1]
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not whole"):
        load_data(f"mnist:{tmp_path}", "test")


def test_hugging_faces_data(monkeypatch, pictures):
    image = pytest.importorskip("PIL.Image")

    class Rows(list):
        def __getitem__(self, key):
            return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    Rows.features = {"img": type("Image", (), {})(), "label": type("ClassLabel", (), {})()}
    rows = Rows({"img": image.open(path), "label": i} for i, path in enumerate(sorted((pictures / "ape").iterdir())))
    library = types.SimpleNamespace(load_dataset=lambda name: {"validation": rows})
    monkeypatch.setitem(sys.modules, "datasets", library)
    x, y = load_data("hf:some/thing", "test", resize="8").tensors()
    assert x.shape == (4, 3, 8, 8) and y.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="it has validation"):
        load_data("hf:some/thing", "train")

    def refuse(name):
        raise ConnectionError("no network\nat all")

    library.load_dataset = refuse
    with pytest.raises(ValueError, match=r"could not be loaded \(ConnectionError: no network\): on a machine with"):
        load_data("hf:some/thing")


@pytest.mark.parametrize("name", ["", "digits:x", "npz", "npz:", "folder:x", "cifar10"])
def test_data_that_is_none(name):
    with pytest.raises(ValueError, match="write one of digits, npz:FILE"):
        load_data(name)


@pytest.mark.parametrize("resize", ["", "8,9", "0", "x", "8,8,8"])
def test_sizes_that_are_none(resize):
    with pytest.raises(ValueError, match="resize="):
        load_data("digits", resize=resize)
