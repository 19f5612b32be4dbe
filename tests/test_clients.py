"""Other people's code, unchanged, with forged models: eager, and compiled where it runs a model as it is.

A package that is not installed is skipped; docs/compatibility.md has the versions that all of it was run with.
"""

import contextlib
import io

import pytest
import torch
from torch import nn

import forged_fx

EPS = 0.1


pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def x():
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def y(plain, x):
    return plain(x).argmax(1)


@pytest.fixture(params=["eager", "compiled"])
def forged(request, plain, x):
    made = forged_fx.transform(plain, forged_fx.calibrate(plain, [x]), 2**-3)
    return made if request.param == "eager" else torch.compile(made, backend="forged")


def holds(forged, x, y, adversarial, broken=None):
    """The examples are in the ball and the box; and of `broken`, what the client says is what the model says."""
    assert adversarial.shape == x.shape and 0 <= float(adversarial.min()) and float(adversarial.max()) <= 1
    assert float((adversarial - x).abs().max()) <= EPS + 1e-6
    wrong = forged(adversarial).argmax(1) != y
    assert bool(wrong.any())  # there is something to find
    if broken is not None:
        assert wrong.tolist() == broken


@pytest.mark.parametrize("name", ["LinfFastGradientAttack", "LinfPGD", "LinfDeepFoolAttack"])
def test_foolbox(forged, x, y, name):
    foolbox = pytest.importorskip("foolbox")
    model = foolbox.PyTorchModel(forged, bounds=(0, 1))
    attack = getattr(foolbox.attacks, name)()
    _, clipped, success = attack(model, x, y, epsilons=EPS)
    holds(forged, x, y, clipped, success.tolist())
    assert foolbox.accuracy(model, x, y) == float((forged(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize("name", ["PGD", "AutoAttack"])
def test_torchattacks(forged, x, y, name):
    torchattacks = pytest.importorskip("torchattacks")
    options = {"steps": 5} if name == "PGD" else {"n_classes": 5, "version": "standard"}
    holds(forged, x, y, getattr(torchattacks, name)(forged, eps=EPS, **options)(x, y))


def test_a_clients_gradient_passes_the_thresholds_where_it_is_told_to(plain, x, y):
    torchattacks = pytest.importorskip("torchattacks")
    forged = forged_fx.transform(plain, forged_fx.calibrate(plain, [x]), 0.9)  # cuts nearly everything
    attack = torchattacks.FGSM(forged, eps=EPS)
    true = (attack(x, y) - x).abs().mean()  # of most pixels the gradient is 0
    with forged_fx.straight_through():
        assert (attack(x, y) - x).abs().mean() > 1.5 * true


def test_pyautoattack(forged, x, y):
    pyautoattack = pytest.importorskip("pyautoattack")
    attack = pyautoattack.AutoAttack(forged, eps=EPS, version="standard")
    examples, *_ = attack.run_standard_evaluation(x, y)
    holds(forged, x, y, examples)


def test_robustbench(forged, plain, x, y, monkeypatch):
    """Its `benchmark`, on images at hand in CIFAR-10's place, which it would download."""
    from forged_fx.sources import robustbench

    try:
        package = robustbench.package("robustbench")
    except ImportError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(package.eval, "load_clean_dataset", lambda *_: (x, y))
    with contextlib.redirect_stdout(io.StringIO()):
        clean, robust = package.benchmark(
            forged, n_examples=4, dataset="cifar10", threat_model="Linf", eps=EPS, batch_size=4
        )
    assert clean == float((forged(x).argmax(1) == y).float().mean()) and robust < clean


def test_the_adversarial_robustness_toolbox(forged, x, y):
    art = pytest.importorskip("art.estimators.classification")
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent

    judge = art.PyTorchClassifier(forged, nn.CrossEntropyLoss(), (3, 8, 8), 5, clip_values=(0, 1))
    assert (judge.predict(x.numpy()).argmax(1) == forged(x).argmax(1).numpy()).all()
    for attack in (FastGradientMethod(judge, eps=EPS), ProjectedGradientDescent(judge, eps=EPS, max_iter=3)):
        holds(forged, x, y, torch.from_numpy(attack.generate(x.numpy(), y.numpy())))


@pytest.fixture
def vit():
    """A small ViT of Hugging Face's, forged, and its image processor."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    batches = [{"pixel_values": torch.randn(4, 3, 8, 8)}]
    forged = forged_fx.transform(model, forged_fx.calibrate(model, batches), 2**-3)
    return forged, transformers.ViTImageProcessor(size={"height": 8, "width": 8})


@pytest.mark.parametrize("compiled", [False, True])
def test_hugging_faces_pipeline(vit, compiled):
    transformers, image = pytest.importorskip("transformers"), pytest.importorskip("PIL.Image")
    forged, processor = vit
    picture = image.new("RGB", (8, 8), (200, 30, 90))
    expected = forged(**processor(picture, return_tensors="pt")).logits.softmax(1)[0]
    if compiled:
        forged.forward = torch.compile(forged.forward, backend="forged")  # as its documentation compiles a model
    classify = transformers.pipeline("image-classification", model=forged, image_processor=processor)
    scores = {row["label"]: row["score"] for row in classify(picture)}
    assert [scores[f"LABEL_{i}"] for i in range(3)] == pytest.approx(expected.tolist(), abs=1e-5)


def test_hugging_faces_trainer(vit, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    forged, _ = vit
    rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 3} for i in range(6)]
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    found = transformers.Trainer(forged, arguments, eval_dataset=rows).evaluate()
    batch = {"pixel_values": torch.stack([r["pixel_values"] for r in rows]), "labels": torch.arange(6) % 3}
    assert found["eval_loss"] == pytest.approx(float(forged(**batch).loss), abs=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loop_like_timms_validate(compiled):
    """channels_last, autocast, and timm's own accuracy."""
    timm = pytest.importorskip("timm")
    from timm.utils import AverageMeter, accuracy

    torch.manual_seed(0)
    model = timm.create_model("test_resnet" if timm.is_model("test_resnet") else "resnet10t", num_classes=10).eval()
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-4).to(memory_format=torch.channels_last)
    expected = forged(x)
    run = torch.compile(forged, backend="forged") if compiled else forged
    top1 = AverageMeter()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(x.contiguous(memory_format=torch.channels_last))
        top1.update(accuracy(output, y)[0].item(), len(x))
    assert float((output.float() - expected).abs().max()) < 0.05 * float(expected.abs().max())
    assert top1.avg == 100 * float((output.argmax(1) == y).float().mean())


def test_accelerate(plain, x, y):
    accelerate = pytest.importorskip("accelerate")
    forged = forged_fx.transform(plain, forged_fx.calibrate(plain, [x]), 2**-3)
    expected = forged(x)
    accelerator = accelerate.Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=2)
    model, loader = accelerator.prepare(forged, loader)
    parts = [accelerator.gather_for_metrics(model(images)) for images, _ in loader]
    assert torch.allclose(torch.cat(parts), expected, atol=1e-6)


def test_lightning(plain, x, y, tmp_path):
    lightning = pytest.importorskip("lightning")
    forged = forged_fx.transform(plain, forged_fx.calibrate(plain, [x]), 2**-3)

    class Judge(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = forged

        def validation_step(self, batch, _):
            self.log("right", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    loader = torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=4)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    (found,) = trainer.validate(Judge(), loader, verbose=False)
    assert found["right"] == float((forged(x).argmax(1) == y).float().mean())
