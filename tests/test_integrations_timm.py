"""timm's vision transformers with EVA in them."""

import copy
import io
from typing import Any

import pytest
import torch
from integration_cases import LOCAL, ONE_WINDOW, assert_equal, assert_replaces, randomised
from torch import Tensor, nn

from eva_attn import EVAttention, functional, replace_attention

timm = pytest.importorskip("timm")
models = timm.models
from timm.models import deit, eva, vision_transformer  # noqa: E402

SIZES = {"img_size": (24, 32), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
NAMES = ["blocks.0.attn", "blocks.1.attn"]


def images(height: int = 24, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        ({}, 1),
        ({"qk_norm": True, "reg_tokens": 4, "qkv_bias": False}, 5),
        ({"class_token": False, "global_pool": "avg", "attn_drop_rate": 0.1, "proj_drop_rate": 0.1}, 0),
        ({"scale_attn_norm": True, "pos_embed": "none"}, 1),
        ({"block_fn": vision_transformer.ResPostBlock, "no_embed_class": True}, 1),
        ({"distilled": True}, 2),
    ],
)
def test_vision_transformer(options: dict[str, Any], prefix: int) -> None:
    torch.manual_seed(0)
    distilled = options.pop("distilled", False)
    kind = deit.VisionTransformerDistilled if distilled else models.VisionTransformer
    model = randomised(kind(**SIZES, **options))
    x = images()
    assert_replaces(model, NAMES, lambda model: model(x) if not distilled else model.forward_features(x))
    replace_attention(model, **LOCAL)
    attention = model.blocks[0].attn
    assert isinstance(attention, EVAttention) != ("scale_attn_norm" in options)
    assert (attention.grid_size, attention.num_prefix_tokens) == ((6, 8), prefix)
    assert attention.attn_drop == options.get("attn_drop_rate", 0.0)
    with pytest.raises(ValueError, match="attn_mask"):
        attention(torch.zeros(2, 48 + prefix, 24).double(), attn_mask=torch.zeros(1))


@pytest.mark.parametrize(
    "options",
    [
        {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True},
        {"scale_attn_inner": True},
        {"use_post_norm": True, "qkv_bias": False},
        {"attn_type": "rope", "rope_type": "mixed", "num_reg_tokens": 4},
        {"attn_type": "rope", "rope_type": "dinov3", "qkv_fused": False, "num_kv_heads": 1, "qk_norm": True},
        {"attn_type": "rope", "rope_rotate_half": True, "class_token": False, "global_pool": "avg"},
    ],
)
def test_rotary_vision_transformer(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = randomised(eva.Eva(**SIZES, use_rot_pos_emb=True, **options))
    x = images()
    assert_replaces(model, NAMES, lambda model: model(x))
    assert (
        replace_attention(model, **LOCAL)
        .replaced[0]
        .settings.startswith("window 2 x 2, chunk 2 x 2, 12 land")
    )


@pytest.mark.parametrize("kind", [models.VisionTransformer, eva.Eva])
def test_images_of_other_sizes(kind: Any) -> None:
    torch.manual_seed(0)
    options = {"use_rot_pos_emb": True} if kind is eva.Eva else {}
    model = randomised(kind(**SIZES, dynamic_img_size=True, dynamic_img_pad=True, **options))
    exact = copy.deepcopy(model)
    replace_attention(exact, **{**ONE_WINDOW, "chunk_size": None})
    for size in ((24, 32), (40, 24), (23, 38), (24, 32)):
        x = images(*size)
        assert_equal(exact(x), model(x))
    exact.set_input_size((40, 40))
    model.set_input_size((40, 40))
    assert_equal(exact(images(40, 40) * 0 + 1), model(images(40, 40) * 0 + 1))


def test_a_grid_that_is_given_stays() -> None:
    model = models.VisionTransformer(**SIZES, dynamic_img_size=True).double()
    replace_attention(model, **LOCAL, grid_size=(6, 8))
    model(images())
    with pytest.raises(ValueError, match="grid_size"):
        model(images(40, 40))


def test_copies_follow_their_own_images() -> None:
    torch.manual_seed(0)
    model = models.VisionTransformer(**SIZES, dynamic_img_size=True).eval()
    replace_attention(model, **LOCAL)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    x = images(40, 24).float()
    expected = model(x)
    for other in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
        model(images().float())
        assert_equal(other(x), expected)


def test_checkpointed_blocks() -> None:
    torch.manual_seed(0)
    model = models.VisionTransformer(**SIZES, dynamic_img_size=True).double()
    replace_attention(model, **LOCAL, projection="identity")
    model.eval()
    x = images(16, 24)
    grads = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        assert_equal(checkpointed, plain)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: models.VisionTransformer(**SIZES, patch_drop_rate=0.5), "patch_drop"),
        (
            lambda: models.VisionTransformer(**SIZES, block_fn=vision_transformer.ParallelScalingBlock),
            "share",
        ),
        (lambda: models.VisionTransformer(**SIZES).blocks, "give grid_size"),
        (lambda: models.NaFlexVit(embed_dim=24, depth=1, num_heads=2, patch_size=4), "several grids"),
        (lambda: models.Beit(img_size=32, patch_size=4, embed_dim=24, depth=1, num_heads=2), "class token"),
        (
            lambda: models.SwinTransformerV2(
                img_size=32, embed_dim=12, depths=(1,), num_heads=(2,), window_size=4
            ),
            "cosine",
        ),
    ],
)
def test_refuses_with_a_reason(build: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"found none\n(.*\n)*.*{reason}"):
        replace_attention(build())


def test_a_pool_of_attention_is_left() -> None:
    report = replace_attention(models.VisionTransformer(**SIZES, global_pool="map"), **LOCAL)
    assert report == NAMES
    assert [entry.name for entry in report.left] == ["attn_pool"]


def test_blocks_alone_take_a_grid() -> None:
    blocks = models.VisionTransformer(**SIZES).blocks
    assert replace_attention(blocks, **LOCAL, grid_size=(6, 8), num_prefix_tokens=1) == ["0.attn", "1.attn"]
    blocks(torch.randn(2, 49, 24))


def pyramid(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "depths": (1, 1, 1, 1),
        "embed_dims": (8, 8, 16, 16),
        "num_heads": (1, 1, 2, 2),
        "num_classes": 5,
    }
    return randomised(models.PyramidVisionTransformerV2(**sizes, **options))


def test_pyramid_vision_transformer() -> None:
    x = images(64, 96)
    names = [f"stages.{i}.blocks.0.attn" for i in range(4)]
    report = replace_attention(pyramid(), **LOCAL)
    assert report == names[3:]
    assert ["sr_ratios" in entry.reason for entry in report.left] == [True] * 3
    assert_replaces(
        pyramid(sr_ratios=(1, 1, 1, 1)),
        names,
        lambda model: model(x),
        exact=({**ONE_WINDOW, "chunk_size": 8},),
    )


def swin(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "num_classes": 5}
    return randomised(models.SwinTransformer(**sizes, **options))


SWIN_NAMES = [f"layers.{i}.blocks.{j}.attn" for i in range(2) for j in range(2)]


def test_swin_of_one_window() -> None:
    x = images(32, 32)
    report = assert_replaces(
        swin(patch_size=4, window_size=8), SWIN_NAMES, lambda model: model(x), exact=(ONE_WINDOW,)
    )
    assert "window 4 x 4" in report.replaced[-1].settings


def test_swin_keeps_its_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shifted ones too, with their bias: without landmarks, nothing changes."""

    def without_landmarks(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        names = ("grid_size", "window_size", "relative_bias", "key_padding_mask")
        return functional.window_attention(query, key, value, **{name: options[name] for name in names})

    from eva_attn.integrations import timm as integration

    model = swin(patch_size=2, window_size=4, strict_img_size=False)
    replaced = copy.deepcopy(model)
    replace_attention(replaced, **LOCAL)
    x = images(32, 48)
    assert not torch.allclose(replaced(x), model(x))
    monkeypatch.setattr(integration, "eva_attention", without_landmarks)
    assert_equal(replaced(x), model(x))
    for y in (model, replaced):
        y.set_input_size((48, 32))
    assert replaced.layers[0].blocks[1].attn.window_size == (6, 4)
    x = images(48, 32)
    assert_equal(replaced(x), model(x))


def test_swin_has_a_bias_of_its_own() -> None:
    for options in ({"relative_bias": "table"}, {"overlap": 1}):
        with pytest.raises(ValueError, match="relative bias"):
            replace_attention(swin(window_size=4), **options)


def test_compiles_for_other_sizes() -> None:
    torch.manual_seed(0)
    model = models.VisionTransformer(**{**SIZES, "depth": 1}, dynamic_img_size=True).eval()
    replace_attention(model, **LOCAL)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in ((24, 32), (40, 24)):
        x = images(*size).float()
        torch.testing.assert_close(compiled(x), model(x))
