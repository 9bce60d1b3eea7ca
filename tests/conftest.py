"""What many test files share."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from pyseg.promptable import Sam2Backend, SamBackend

# The slow tests that take minutes begin, so that the others fill both processes to the end.
LONGEST = ("test_sanitize.py", "test_compilers.py", "test_emulation.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    if all(item.get_closest_marker("slow") for item in items):
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


class Page(HTMLParser):
    """Checks that tags close, and collects them."""

    VOID = ("meta", "img", "rect", "line", "circle", "polyline", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, tag

    def pictures(self):
        return [attributes["src"] for tag, attributes in self.tags if tag == "img"]


@pytest.fixture
def html_page():
    """``html_page(text)``: its tags; fails where one does not close."""
    return Page


@pytest.fixture
def one_thread():
    """For inputs so small that threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_sam():
    from segment_anything.modeling import (
        ImageEncoderViT,
        MaskDecoder,
        PromptEncoder,
        Sam,
        TwoWayTransformer,
    )

    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=128,
        patch_size=16,
        embed_dim=32,
        depth=2,
        num_heads=2,
        out_chans=32,
        window_size=4,
        global_attn_indexes=(1,),
        use_rel_pos=True,
    )
    decoder = MaskDecoder(transformer_dim=32, transformer=TwoWayTransformer(1, 32, 2, 64))
    return Sam(encoder, PromptEncoder(32, (8, 8), (128, 128), 4), decoder)


def small_sam2():
    import sam2
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    torch.manual_seed(0)
    file = Path(sam2.__path__[0]) / "configs/sam2.1/sam2.1_hiera_t.yaml"
    config = OmegaConf.load(file).model
    config.image_size = 128
    encoder, memory = config.image_encoder, config.memory_attention
    encoder.trunk.update(embed_dim=16, stages=[1, 1, 2, 1], global_att_blocks=[3])
    encoder.neck.update(d_model=32, backbone_channel_list=[128, 64, 32, 16])
    encoder.neck.position_encoding.num_pos_feats = 32
    memory.update(d_model=32, num_layers=1)
    memory.layer.update(d_model=32, dim_feedforward=32)
    memory.layer.self_attention.embedding_dim = 32
    memory.layer.cross_attention.embedding_dim = 32
    return instantiate(config)


@pytest.fixture(scope="session")
def small_models():
    """Makers of a SAM and a SAM 2 of 128 x 128 input with random weights, the same every time."""
    return {"sam": small_sam, "sam2": small_sam2}


@pytest.fixture(scope="session")
def backends():
    return {"sam": SamBackend(small_sam()), "sam2": Sam2Backend(small_sam2())}
