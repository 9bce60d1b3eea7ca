"""Checkpoints of small configurations, as `save_pretrained` writes them; no network."""

import pytest
import torch
import transformers as t
from tokenizers import pre_tokenizers

NAMES = {0: "car", 1: "road", 2: "sky"}
STAGES = [f"stage{k}" for k in (1, 2, 3, 4)]
SQUARE = {"height": 64, "width": 64}


def swin():
    return t.SwinConfig(
        image_size=64,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=STAGES,
    )


def resnet():
    return t.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=STAGES,
    )


def transformer(**options):
    return {
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
        **options,
    }


def detr(**options):
    return t.DetrConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        num_queries=7,
        **options,
    )


def eomt(kind, **options):
    config = getattr(t, f"{kind}Config")(
        **transformer(**options),
        num_blocks=2,
        num_queries=7,
        train_num_points=64,
        id2label=NAMES,
    )
    return getattr(t, f"{kind}ForUniversalSegmentation")(config)


def vision(config, **options):
    return t.AutoModelForSemanticSegmentation.from_config(config(id2label=NAMES, **options))


BEIT = transformer(
    intermediate_size=32,
    out_indices=[1, 2, 3, 4],
    pool_scales=[1, 2],
    use_relative_position_bias=True,
)
# name -> (network, processor)
SEMANTIC = {
    "beit": (
        lambda: vision(t.BeitConfig, **BEIT),
        # as classifiers have it: a central crop, which leaves pixels without a class
        lambda: t.BeitImageProcessor(size=SQUARE, do_center_crop=True, crop_size=SQUARE),
    ),
    "data2vec": (
        lambda: vision(t.Data2VecVisionConfig, **BEIT),
        lambda: t.BeitImageProcessor(size=SQUARE),
    ),
    "dpt": (
        lambda: vision(
            t.DPTConfig,
            **transformer(intermediate_size=32),
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=16,
        ),
        lambda: t.DPTImageProcessor(size=SQUARE),
    ),
    "mobilenet_v2": (
        lambda: vision(t.MobileNetV2Config, depth_multiplier=0.25, image_size=64),
        lambda: t.MobileNetV2ImageProcessor(size={"shortest_edge": 64}, crop_size=SQUARE),
    ),
    "mobilevit": (
        lambda: vision(
            t.MobileViTConfig,
            image_size=64,
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32],
            num_attention_heads=2,
            aspp_out_channels=16,
        ),
        lambda: t.MobileViTImageProcessor(size={"shortest_edge": 72}, crop_size=SQUARE),
    ),
    "mobilevitv2": (
        lambda: vision(
            t.MobileViTV2Config, image_size=64, width_multiplier=0.25, aspp_out_channels=16
        ),
        lambda: t.MobileViTImageProcessor(size={"shortest_edge": 72}, crop_size=SQUARE),
    ),
    "sapiens2": (
        lambda: vision(
            t.Sapiens2Config,
            **transformer(image_size=[64, 48], num_key_value_attention_heads=2),
            intermediate_size=32,
            head_config={"upsample_out_channels": [8], "conv_out_channels": [8]},
        ),
        lambda: t.Sapiens2ImageProcessor(size={"height": 64, "width": 48}),
    ),
    "segformer": (
        lambda: vision(
            t.SegformerConfig,
            hidden_sizes=[8, 16, 20, 32],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 2, 4],
            sr_ratios=[2, 1, 1, 1],
            decoder_hidden_size=16,
        ),
        lambda: t.SegformerImageProcessor(size={"height": 64, "width": 96}),
    ),
    "tipsv2_dpt": (
        lambda: vision(
            t.Tipsv2DptConfig,
            backbone_config={
                "model_type": "tipsv2_vision_model",
                **transformer(patch_size=14, image_size=56),
                "out_features": STAGES,
                "reshape_hidden_states": False,
            },
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=16,
        ),
        lambda: t.Tipsv2DptImageProcessor(size={"height": 56, "width": 56}),
    ),
    "upernet": (
        lambda: vision(t.UperNetConfig, backbone_config=swin(), hidden_size=16, pool_scales=[1, 2]),
        lambda: t.SegformerImageProcessor(size=SQUARE),
    ),
}
UNIVERSAL = {
    "mask2former": (
        lambda: t.Mask2FormerForUniversalSegmentation(
            t.Mask2FormerConfig(
                backbone_config=swin(),
                feature_size=32,
                mask_feature_size=32,
                hidden_dim=32,
                encoder_feedforward_dim=32,
                dim_feedforward=32,
                encoder_layers=1,
                decoder_layers=2,
                num_attention_heads=4,
                num_queries=7,
                train_num_points=64,
                id2label=NAMES,
            )
        ),
        lambda: t.Mask2FormerImageProcessor(size=SQUARE, size_divisor=32, num_labels=3),
    ),
    "maskformer": (
        lambda: t.MaskFormerForInstanceSegmentation(
            t.MaskFormerConfig(
                backbone_config=swin(),
                decoder_config=detr(),
                fpn_feature_size=32,
                mask_feature_size=32,
                id2label=NAMES,
            )
        ),
        lambda: t.MaskFormerImageProcessor(size=SQUARE, size_divisor=32, num_labels=3),
    ),
    "oneformer": (
        lambda: t.OneFormerForUniversalSegmentation(
            t.OneFormerConfig(
                backbone_config=swin(),
                num_queries=10,
                text_encoder_width=64,
                text_encoder_num_layers=1,
                text_encoder_vocab_size=600,
                text_encoder_n_ctx=3,
                conv_dim=64,
                mask_dim=64,
                hidden_dim=64,
                encoder_feedforward_dim=32,
                encoder_layers=1,
                decoder_layers=3,
                num_attention_heads=2,
                dim_feedforward=32,
                query_dec_layers=1,
                train_num_points=64,
                id2label=NAMES,
                is_training=True,
            )
        ),
        lambda: t.OneFormerImageProcessor(size={"shortest_edge": 48, "longest_edge": 96}),
    ),
    "eomt": (
        lambda: eomt("Eomt"),
        lambda: t.EomtImageProcessor(
            size={"shortest_edge": 64, "longest_edge": 64}, do_pad=True, do_split_image=False
        ),
    ),
    "eomt_semantic": (
        lambda: eomt("Eomt"),
        lambda: t.EomtImageProcessor(
            size={"shortest_edge": 64, "longest_edge": None}, do_split_image=True
        ),
    ),
    "eomt_dinov3": (
        lambda: eomt("EomtDinov3", intermediate_size=32),
        lambda: t.EomtImageProcessor(
            size={"shortest_edge": 64, "longest_edge": 64}, do_pad=True, do_split_image=False
        ),
    ),
    "detr": (
        lambda: t.DetrForSegmentation(detr(backbone_config=resnet(), id2label=NAMES)),
        lambda: t.DetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 96}),
    ),
    "rf_detr": (
        lambda: t.RfDetrForInstanceSegmentation(
            t.RfDetrConfig(
                d_model=32,
                decoder_layers=2,
                decoder_ffn_dim=32,
                decoder_self_attention_heads=2,
                decoder_cross_attention_heads=4,
                decoder_n_points=2,
                num_queries=7,
                group_detr=2,
                id2label=NAMES,
                backbone_config=t.RfDetrDinov2Config(
                    **transformer(num_windows=1, out_features=["stage2", "stage4"])
                ),
            )
        ),
        lambda: t.RfDetrImageProcessor(size=SQUARE),
    ),
}


def clipseg():
    text = transformer(intermediate_size=32, vocab_size=514, num_hidden_layers=2)
    del text["image_size"], text["patch_size"]
    config = t.CLIPSegConfig(
        text_config={**text, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513},
        vision_config=transformer(intermediate_size=32),
        projection_dim=16,
        extract_layers=[1, 2, 3],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    return t.CLIPSegForImageSegmentation(config)


ALL = {
    **SEMANTIC,
    **UNIVERSAL,
    "clipseg": (clipseg, lambda: t.ViTImageProcessor(size=SQUARE)),
}


def tokenizer():
    """CLIP's, of single letters: no merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return t.CLIPTokenizer(vocab={word: k for k, word in enumerate(words)}, merges=[])


def save(kind, folder, *, tokens=True):
    torch.manual_seed(0)
    network, processor = ALL[kind]
    made = network()
    certain(made)
    made.save_pretrained(folder)
    processor().save_pretrained(folder)
    if tokens and kind in ("clipseg", "oneformer"):
        tokenizer().save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def certain(network):
    """Makes queries sure of some class, so that there is something to find."""
    for name, part in network.named_modules():
        if name.endswith(("class_predictor", "class_labels_classifier", "class_embed")):
            for layer in (part, *getattr(part, "layers", [])):
                if isinstance(layer, torch.nn.Linear):
                    if layer.out_features == len(NAMES) + 1:
                        layer.weight.mul_(40)
                        layer.bias[-1] = -100  # the class of queries that found nothing
                    else:
                        layer.bias.zero_()


class Checkpoints:
    """Called with a kind: the folder of a checkpoint of it, made once."""

    UNIVERSAL, NAMES = UNIVERSAL, NAMES
    save, tokenizer, detr, resnet = map(staticmethod, (save, tokenizer, detr, resnet))

    def __init__(self, factory):
        self.factory, self.made = factory, {}

    def __call__(self, kind):
        if kind not in self.made:
            self.made[kind] = save(kind, self.factory.mktemp(kind))
        return self.made[kind]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The hub is never asked, whether or not there is a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return Checkpoints(tmp_path_factory)
