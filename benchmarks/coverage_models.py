"""The models of the coverage benchmark: name -> (model, args, kwargs), with random weights.

timm: of each of its modules, the model with the fewest parameters. torchvision: every builder. Hugging Face: small
random configurations of the architectures named here.
"""

import inspect
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

CHOICE = Path(__file__).with_name("coverage_timm.txt")  # delete it to choose anew

Built = tuple[nn.Module, tuple, dict]


def names() -> list[str]:
    """Hugging Face's, torchvision's and timm's. Choosing among timm's takes minutes: the choice is kept in a file."""
    if not CHOICE.exists():
        CHOICE.write_text("\n".join(timm_names()) + "\n")
    return [*(f"hf:{name}" for name in HUGGING_FACE), *CHOICE.read_text().split(), *torchvision_names()]


def build(name: str) -> Built:
    """Build one model in eval mode, from a fixed seed, and an input for it."""
    library, _, kind = name.partition(":")
    torch.manual_seed(0)
    model, args, kwargs = {"timm": _timm, "tv": _torchvision, "hf": _hugging_face}[library](kind)
    open_branches(model)
    return model.eval(), args, kwargs


def open_branches(model: nn.Module) -> None:
    """Many a model begins with weights of 0, or nearly, in its head or at the end of a branch: what was forged ahead of
    them would not show in the result."""
    for name, weight in model.named_parameters():
        if not name.endswith("bias") and weight.numel() and weight.detach().abs().max() < 1e-3:
            nn.init.normal_(weight, std=0.02) if weight.dim() > 1 else nn.init.uniform_(weight, 0.5, 1)


def timm_names() -> list[str]:
    """Of each timm module the smallest model, by the number of parameters, the first by name where several tie."""
    import timm

    smallest: dict[str, tuple[int, str]] = {}
    for module in timm.list_modules():
        for name in sorted(timm.list_models(module=module)):
            try:
                with torch.device("meta"):
                    size = sum(p.numel() for p in timm.create_model(name).parameters())
            except Exception:  # not every constructor runs without memory: such a model is no candidate
                continue
            smallest[module] = min(smallest.get(module, (size, name)), (size, name))
    return [f"timm:{name}" for name in dict.fromkeys(name for _, name in smallest.values())]


def torchvision_names() -> list[str]:
    from torchvision.models import list_models

    return [f"tv:{name}" for name in list_models()]


def _timm(name: str) -> Built:
    import timm

    model = timm.create_model(name)
    known = model.pretrained_cfg
    channels, *side = known.get("min_input_size") or known.get("input_size", (3, 224, 224))
    if max(side) > 400 and not known.get("fixed_input_size"):
        side = [224, 224]
    return model, (torch.randn(2, channels, *side),), {}


# With what a model's result shows what goes on within, though it is untrained.
_SHOWS = {
    "retinanet*": {"score_thresh": 0.0},  # it is sure of nothing, and would find nothing
    "fcos*": {"score_thresh": 0.0},
    "fasterrcnn_mobilenet*": {"box_score_thresh": 0.0},
    "*googlenet": {"init_weights": False},  # its own are so small that the result is the last bias
}


def _torchvision(name: str) -> Built:
    """Inputs are as small as the architecture takes them: what is checked does not depend on their size."""
    from torchvision.models import get_model, get_model_builder

    builder = get_model_builder(name)
    kind, options = builder.__module__.split(".")[2], {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    for pattern, more in _SHOWS.items():
        options |= more if fnmatchcase(name, pattern) else {}
    if kind == "detection":
        if not name.startswith("ssd"):
            options |= {"min_size": 96, "max_size": 128}
        model = get_model(name, **options)
        if name.startswith("ssdlite"):  # its norms have no statistics yet, and would let nothing through to the end
            for norm in filter(lambda module: isinstance(module, nn.BatchNorm2d), model.modules()):
                norm.momentum = None  # (one batch tells all)
            with torch.no_grad():
                model.head([*model.backbone(torch.rand(4, 3, 320, 320)).values()])
        return model, ([torch.rand(3, 96, 128), torch.rand(3, 96, 96)],), {}
    if kind == "vision_transformer":
        options["image_size"] = side = 4 * int(name.rpartition("_")[2])
    else:
        side = {"inception": 96, "quantization": 96, "maxvit": 224}.get(kind, 64)
    model = get_model(name, **options)
    if name.startswith("deeplabv3_mobilenet"):
        nn.init.zeros_(model.classifier[-1].bias)  # what comes to it, untrained, is too little to show beside it
    if kind == "video":
        clip = (1, 3, 16, 224, 224) if name.startswith(("mvit", "s3d")) else (1, 3, 8, 64, 64)
        return model, (torch.randn(clip),), {}
    if kind == "optical_flow":
        return model, (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)), {"num_flow_updates": 2}
    return model, (torch.randn(2, 3, side, side),), {}


def _tokens(vocabulary: int) -> Tensor:
    return torch.randint(3, vocabulary, (2, 12))


_TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99)
_IMAGE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
)


def _bert() -> Built:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**_TEXT)), (), {"input_ids": _tokens(99)}


def _gpt2() -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99)), (), {"input_ids": _tokens(99)}


def _llama() -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_TEXT, num_key_value_heads=2)), (), {"input_ids": _tokens(99)}


def _mixtral() -> Built:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_TEXT, num_key_value_heads=2, num_local_experts=4)
    return MixtralForCausalLM(config), (), {"input_ids": _tokens(99)}


def _vit() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**_IMAGE)), (), {"pixel_values": torch.randn(2, 3, 32, 32)}


def _dinov2() -> Built:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    return Dinov2ForImageClassification(Dinov2Config(**_IMAGE)), (), {"pixel_values": torch.randn(2, 3, 32, 32)}


def _clip() -> Built:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(text_config={**_TEXT, "max_position_embeddings": 20, "eos_token_id": 2}, vision_config=_IMAGE)
    return CLIPModel(config), (), {"input_ids": _tokens(99), "pixel_values": torch.randn(2, 3, 32, 32)}


def _whisper() -> Built:
    from transformers import WhisperConfig, WhisperModel

    sizes = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    widths = dict(d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=99, num_mel_bins=16)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    model = WhisperModel(WhisperConfig(**sizes, **widths, **special, max_source_positions=20))
    return model, (), {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": _tokens(99)}


def _t5() -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99))
    return model, (), {"input_ids": _tokens(99), "decoder_input_ids": _tokens(99)}


def _wav2vec2() -> Built:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    convolutions = dict(conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2)
    position = dict(num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4)
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**_TEXT, **convolutions, **position))
    return model, (), {"input_values": torch.randn(2, 800)}


def _segformer() -> Built:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    stages = dict(
        depths=[1] * 4, hidden_sizes=[8, 16, 16, 32], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=32
    )
    model = SegformerForSemanticSegmentation(SegformerConfig(**stages))
    return model, (), {"pixel_values": torch.randn(2, 3, 64, 64)}


def _poolformer() -> Built:
    from transformers import PoolFormerConfig, PoolFormerForImageClassification

    model = PoolFormerForImageClassification(PoolFormerConfig(hidden_sizes=[8, 16, 16, 32], depths=[1] * 4))
    return model, (), {"pixel_values": torch.randn(2, 3, 64, 64)}


HUGGING_FACE: dict[str, Callable[[], Built]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
    "vit": _vit,
    "clip": _clip,
    "whisper": _whisper,
    "t5": _t5,
    "mixtral": _mixtral,
    "wav2vec2": _wav2vec2,
    "dinov2": _dinov2,
    "segformer": _segformer,
    "poolformer": _poolformer,
}


def _hugging_face(name: str) -> Built:
    return HUGGING_FACE[name]()
