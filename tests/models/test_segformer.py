"""SegFormer: what the conformance suite (test_conformance.py) cannot know."""

import re

import pytest
import torch
from torch import nn

import pyseg
from pyseg.models.segformer import SIZES

NAMES = sorted(SIZES)


def transformers_model(name, classes, eps):
    """Random; statistics and normalisation weights that matter."""
    transformers = pytest.importorskip("transformers")
    widths, depths, width = SIZES[name]
    config = transformers.SegformerConfig(
        hidden_sizes=list(widths),
        depths=list(depths),
        decoder_hidden_size=width,
        num_labels=classes,
    )
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    for key, layer in model.named_modules():
        if isinstance(layer, nn.LayerNorm):
            # transformers has 1e-5 everywhere, where the authors have 1e-6 in blocks and at ends
            inner = "patch_embeddings" in key or "sequence_reduction" in key or "self" in key
            if eps == "authors" and not inner:
                layer.eps = 1e-6
        if model.device.type != "meta" and hasattr(layer, "weight"):
            nn.init.normal_(layer.bias, std=0.1) if layer.bias is not None else None
        if isinstance(layer, nn.BatchNorm2d) and model.device.type != "meta":
            nn.init.normal_(layer.running_mean, std=0.1)
    return model


def old_keys(state):
    """As files of the hub have them, which transformers below 5 wrote."""
    renamed = {
        r"\.stages\.(\d)\.patch_embeddings": r".encoder.patch_embeddings.\1",
        r"\.stages\.(\d)\.blocks\.(\d+)": r".encoder.block.\1.\2",
        r"\.stages\.(\d)\.layer_norm": r".encoder.layer_norm.\1",
        "layernorm_before": "layer_norm_1",
        "layernorm_after": "layer_norm_2",
        "sequence_reduction.sequence_reduction": "self.sr",
        "sequence_reduction.layer_norm": "self.layer_norm",
        r"attention\.q_proj": "attention.self.query",
        r"attention\.k_proj": "attention.self.key",
        r"attention\.v_proj": "attention.self.value",
        r"attention\.o_proj": "attention.output.dense",
        r"mlp\.fc": "mlp.dense",
        "linear_projections": "linear_c",
    }
    result = {}
    for key, value in state.items():
        for pattern, new in renamed.items():
            key = re.sub(pattern, new, key)
        result[key] = value
    return result


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_are_transformers(name):
    with torch.device("meta"):
        peer = transformers_model(name, 19, "authors")
        model = pyseg.models.get(name)(weights=None)
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(p.numel() for p in peer.parameters())
    stated = re.search(r"([\d.]+) M parameters", pyseg.models.get(name).__doc__)[1]
    assert f"{count / 1e6:.1f}" == stated


@pytest.mark.parametrize("layout", ["new", "old"])
def test_equals_transformers(layout, tmp_path):
    torch.manual_seed(0)
    peer = transformers_model("segformer_b0", 5, "authors")
    state = peer.state_dict()
    torch.save(state if layout == "new" else old_keys(state), tmp_path / "peer.pth")
    assert layout == "new" or "segformer.encoder.block.0.1.mlp.dense1.bias" in old_keys(state)
    model = pyseg.models.get("segformer_b0")(weights=tmp_path / "peer.pth", num_classes=5)
    for size in ((64, 96), (71, 103)):
        images = torch.randn(2, 3, *size)
        with torch.inference_mode():
            torch.testing.assert_close(
                model.network(images), peer(images).logits, atol=1e-4, rtol=1e-4
            )


def test_transformers_epsilon_makes_no_difference(tmp_path):
    torch.manual_seed(0)
    peer = transformers_model("segformer_b0", 5, "transformers")
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    model = pyseg.models.get("segformer_b0")(weights=tmp_path / "peer.pth", num_classes=5)
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        ours, theirs = model.network(images), peer(images).logits
    assert (ours - theirs).abs().max() < 1e-2 * theirs.abs().max()
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() > 0.99


def nvidia_keys(state, head):
    """Written from the lists of keys of the published files, without the converter's rules."""
    result = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "trunk":
            group = {"embeds": "patch_embed", "stages": "block", "norms": "norm"}[parts[1]]
            rest = ".".join(parts[3:]).replace("dwconv.", "dwconv.dwconv.")
            result[f"backbone.{group}{int(parts[2]) + 1}.{rest}"] = value
        elif parts[1] == "linear":
            stem = (
                f"linear_c{int(parts[2]) + 1}"
                if head == "segformer"
                else (f"embed_layers.{parts[2]}")
            )
            result[f"decode_head.{stem}.proj.{parts[3]}"] = value
        elif parts[1] == "score":
            last = "linear_pred" if head == "segformer" else "conv_seg"
            result[f"decode_head.{last}.{parts[2]}"] = value
        elif parts[1] == "fuse":
            stem = "linear_fuse" if head == "segformer" else "fuse_layer.bottleneck"
            kind = ("conv", "bn")[int(parts[2])]
            result[f"decode_head.{stem}.{kind}.{parts[3]}"] = value
        else:
            *numbers, last = parts[2:]
            middle = (
                ""
                if len(numbers) == 2
                else (("depthwise_conv.", "pointwise_conv.")[int(numbers[1])])
            )
            kind = ("conv", "bn")[int(numbers[-1])]
            stem = f"decode_head.fuse_layer.aspp_modules.{numbers[0]}"
            result[f"{stem}.{middle}{kind}.{last}"] = value
    return result


@pytest.mark.parametrize("head", ["segformer", "daformer"])
def test_loads_checkpoints_of_the_authors(head, tmp_path):
    torch.manual_seed(0)
    factory = pyseg.models.get("segformer_b0")
    source = factory(weights=None, head=head)
    theirs = nvidia_keys(source.network.state_dict(), head)
    if head == "segformer":
        assert "backbone.block3.1.mlp.dwconv.dwconv.weight" in theirs
        theirs["decode_head.conv_seg.weight"] = torch.zeros(19, 128, 1, 1)
    else:
        assert "decode_head.fuse_layer.aspp_modules.2.depthwise_conv.bn.weight" in theirs
        teacher = {f"ema_model.{k}": torch.zeros_like(v) for k, v in theirs.items()}
        theirs = {**{f"model.{k}": v for k, v in theirs.items()}, **teacher}
    torch.save({"state_dict": theirs}, tmp_path / "theirs.pth")
    loaded = factory(weights=tmp_path / "theirs.pth", head=head)
    for key, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_starts_from_the_authors_classifier(tmp_path):
    torch.manual_seed(0)
    source = pyseg.models.get("segformer_b0")(weights=None).network
    theirs = nvidia_keys(source.state_dict(), "segformer")
    state = {k.removeprefix("backbone."): v for k, v in theirs.items() if "decode_head" not in k}
    state |= {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "mit_b0.pth")
    for head in ("segformer", "daformer"):
        factory = pyseg.models.get("segformer_b0")
        model = factory(weights=tmp_path / "mit_b0.pth", head=head, num_classes=3)
        for key, value in source.trunk.state_dict().items():
            assert torch.equal(model.network.trunk.state_dict()[key], value)


def test_daformer_head():
    """256 channels and four dilations, of which the first is a plain 1x1, as its authors state."""
    with torch.device("meta"):
        head = pyseg.models.get("segformer_b5")(weights=None, head="daformer").network.head
        shapes = [
            torch.empty(1, c, s, s) for c, s in zip((64, 128, 320, 512), (16, 8, 4, 2), strict=True)
        ]
        assert head(shapes).shape == (1, 19, 16, 16)
    assert [b[0][0].dilation[0] for b in list(head.branches)[1:]] == [6, 12, 18]
    linear = 256 * (64 + 128 + 320 + 512) + 4 * 256
    branches = 4 * (1024 * 256 + 512) + 3 * (1024 * 9 + 2048)
    rest = 1024 * 256 * 9 + 512 + 257 * 19
    assert sum(p.numel() for p in head.parameters()) == linear + branches + rest


def test_refuses():
    with pytest.raises(ValueError, match="head must be 'segformer' or 'daformer', got 'fcn'"):
        pyseg.models.get("segformer_b1")(weights=None, head="fcn")


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (28, 5), (31, 33)])
def test_images_smaller_than_a_cell_of_attention(size):
    model = pyseg.models.get("segformer_b0")(weights=None)
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    logits = model.predict([image])[0].logits
    assert logits.shape == (19, -(-size[0] // 4), -(-size[1] // 4)) and logits.isfinite().all()
