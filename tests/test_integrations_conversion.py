"""Converted models: nearer to the original after fitting, exact where EVA is, and models like any other."""

import copy
from typing import Any

import pytest
import torch
from integration_cases import EXACT_OPTIONS
from torch import Tensor, nn

from eva_attn import EVAttention, convert, replace_attention

GAP_OF_ROUNDING = 1e-5  # in float32


def randomised(model: nn.Module) -> nn.Module:
    """In evaluation, with weights that make attention matter."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def encoder(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, **{"batch_first": True, **options})
    return randomised(nn.TransformerEncoder(layer, 2, enable_nested_tensor=layer.self_attn.batch_first))


def sequences(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 32, 16, generator=generator) for _ in range(count)]


LOCAL = {"window_size": 8, "chunk_size": 4, "progress": False}


@pytest.mark.parametrize("options", [{}, {"projection": "linear-layernorm"}, {"relative_bias": "table"}])
def test_fitting_narrows_the_gap(options):
    """Of each layer on what was fitted, and of the whole model on what was not."""
    model = encoder()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    fitted, unseen = sequences(4), torch.cat(sequences(15)[4:])
    expected = model(unseen)
    untrained = copy.deepcopy(model)
    report = convert(model, fitted, held_out=fitted, steps=20, **LOCAL, **options)
    assert [gap.name for gap in report.layers] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all(gap.after < 0.99 * gap.before for gap in report.layers)
    assert len(report.curve) == 20
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    replace_attention(untrained, **report.options)
    assert (model(unseen) - expected).norm() < (untrained(unseen) - expected).norm()


def test_tangents_need_no_fitting():
    """They have no parameters, and no use for counts."""
    model, identity = encoder(), encoder()
    parameters = dict(model.named_parameters())
    report = convert(model, sequences(2), projection="tangent", **LOCAL)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert report.curve == []
    assert report.options["log_count_bias"] is False
    start = convert(identity, sequences(2), projection="identity", **LOCAL)
    for tangent, other in zip(report.layers, start.layers, strict=True):
        assert tangent.after == tangent.before < other.before
    with pytest.raises(ValueError, match="log_count_bias"):
        convert(encoder(), sequences(1), projection="tangent", log_count_bias=True, **LOCAL)


def test_the_gap_is_that_of_a_layer_on_the_originals_inputs():
    model = encoder()
    original = copy.deepcopy(model)
    x = sequences(1)[0]
    report = convert(model, [x], steps=0, **LOCAL)
    inputs: list[Tensor] = []
    hook = original.layers[1].self_attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        original(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    hook.remove()
    with torch.no_grad():
        expected = original.layers[1].self_attn(*3 * inputs)[0]
        actual = model.layers[1].self_attn(*3 * inputs)[0]
    gap = ((actual - expected).norm() / expected.norm()).item()
    assert report.layers[1].before == report.layers[1].after == pytest.approx(gap, rel=1e-4)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{"window_size": 40, "chunk_size": 4, "relative_bias": "table"}, {"window_size": 2, "chunk_size": 1}],
)
def test_exact_settings_stay_exact(batch_first, padded, settings):
    model = encoder(batch_first=batch_first)
    x = sequences(1)[0]
    padding = torch.arange(32) >= torch.tensor([32, 20, 7])[:, None] if padded else None
    batch = {"src": x if batch_first else x.transpose(0, 1), "src_key_padding_mask": padding}
    report = convert(model, [batch], steps=5, progress=False, **settings)
    assert all(gap.before < GAP_OF_ROUNDING for gap in report.layers)
    assert all(gap.after <= gap.before for gap in report.layers)


@pytest.mark.parametrize("causal", [False, True])
def test_transformers_with_padding(causal):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    if causal:
        model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, num_key_value_heads=1))
    else:
        model = transformers.BertModel(transformers.BertConfig(**sizes))
    randomised(model)
    tokens = torch.randint(0, 50, (3, 32))
    mask = (torch.arange(32) < torch.tensor([32, 20, 7])[:, None]).long()
    batch = {"input_ids": tokens, "attention_mask": mask}
    exact = convert(copy.deepcopy(model), [batch], window_size=32, chunk_size=4, steps=0)
    assert all(gap.before < GAP_OF_ROUNDING for gap in exact.layers)
    report = convert(model, [batch], steps=10, **LOCAL)
    assert all(gap.after < gap.before for gap in report.layers)


def test_vision_with_images_of_other_sizes():
    timm = pytest.importorskip("timm")
    sizes = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = randomised(timm.create_model("vit_tiny_patch16_224", img_size=32, dynamic_img_size=True, **sizes))
    batches = [[torch.randn(2, 3, 32, 32), torch.zeros(2)], [torch.randn(2, 3, 40, 24), torch.zeros(2)]]
    report = convert(model, batches, window_size=4, num_landmarks=16, steps=8, progress=False)
    assert all(gap.after < gap.before for gap in report.layers)


def test_the_same_twice_and_again_from_a_state_dict(tmp_path):
    models = [encoder() for _ in range(2)]
    reports = [convert(model, sequences(3), steps=7, **LOCAL) for model in models]
    assert reports[0].curve == reports[1].curve
    torch.save(models[0].state_dict(), tmp_path / "model.pt")
    loaded = encoder()
    replace_attention(loaded, **reports[0].options)
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x = sequences(1)[0]
    assert torch.equal(loaded.eval()(x), models[1](x))


def test_trains_on_like_any_model():
    model = encoder()
    convert(model, sequences(2), steps=2, **LOCAL)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    start = {name: x.detach().clone() for name, x in model.named_parameters()}
    model(sequences(1)[0])[..., 0].square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(start[name], x) for name, x in model.named_parameters() if x.dim() > 1)


def classifier() -> nn.Module:
    """Converted, of transformers: tokens to one of two classes."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.BertForSequenceClassification(config)
    convert(model, [{"input_ids": torch.arange(32)[None]}], steps=1, **LOCAL)
    return model


EXAMPLES = [{"input_ids": torch.full((32,), i), "labels": torch.tensor(i % 2)} for i in range(8)]


def test_the_trainer_of_transformers(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True
    )
    trainer = Trainer(classifier(), arguments, train_dataset=EXAMPLES)
    start = trainer.model.bert.encoder.layer[0].attention.self.eva.landmark_projection.key[0].weight.clone()
    assert trainer.train().training_loss > 0
    end = trainer.model.bert.encoder.layer[0].attention.self.eva.landmark_projection.key[0].weight
    assert not torch.equal(start, end)
    trainer.save_model(tmp_path / "saved")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(saved["bert.encoder.layer.0.attention.self.eva.landmark_projection.key.0.weight"], end)


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = classifier()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    module = Module()
    start = {name: x.clone() for name, x in module.state_dict().items() if "landmark_projection" in name}
    trainer = lightning.Trainer(
        max_steps=3, logger=False, enable_progress_bar=False, accelerator="cpu", default_root_dir=tmp_path
    )
    trainer.fit(module.train(), torch.utils.data.DataLoader(EXAMPLES, batch_size=4))
    assert all(not torch.equal(x, module.state_dict()[name]) for name, x in start.items() if "weight" in name)


def test_keeps_modes_and_frozen_parameters():
    model = encoder().train()
    model.layers[0].eval()
    model.layers[0].linear1.weight.requires_grad_(False)
    convert(model, sequences(1), steps=1, **LOCAL)
    assert model.training
    assert model.layers[1].self_attn.training
    assert not model.layers[0].self_attn.training
    assert not model.layers[0].linear1.weight.requires_grad


def test_a_layer_that_fitting_worsens_keeps_its_start():
    model = encoder()
    report = convert(model, sequences(2), steps=3, learning_rate=1e3, **LOCAL)
    assert all(gap.after <= gap.before for gap in report.layers)
    projection = model.layers[0].self_attn.landmark_projection
    assert torch.equal(projection.key[0].weight, torch.eye(8))


class OwnAttention(nn.Module):
    """Softmax attention of one head that nobody has heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x)[:, None].chunk(3, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(query, key, value)[:, 0])


def own_eva(attention: OwnAttention, options: dict[str, Any]) -> EVAttention:
    eva = EVAttention(16, 1, **options)
    eva.qkv, eva.proj = attention.qkv, attention.proj
    return eva


def test_attention_of_ones_own():
    model = randomised(nn.Sequential(OwnAttention(), OwnAttention()))
    with pytest.raises(ValueError, match=r"found none\n  0: not known here"):
        convert(copy.deepcopy(model), sequences(1), **LOCAL)
    exact = copy.deepcopy(model)
    replace_attention(
        exact, window_size=32, chunk_size=4, converters={OwnAttention: own_eva}, **EXACT_OPTIONS
    )
    x = sequences(1)[0]
    torch.testing.assert_close(exact(x), model(x))
    report = convert(model, sequences(3), steps=20, converters={OwnAttention: own_eva}, **LOCAL)
    assert all(gap.after < gap.before for gap in report.layers)
    assert report.replacement == ["0", "1"]


def test_a_converter_takes_precedence_and_may_make_anything():
    class Nothing(nn.Module):
        def __init__(self, attention: nn.Module, options: dict[str, Any]) -> None:
            super().__init__()
            self.options = options

    model = encoder()
    report = replace_attention(model, window_size=5, converters={nn.MultiheadAttention: Nothing})
    assert model.layers[0].self_attn.options["window_size"] == 5
    assert "test_integrations_conversion test_a_converter" in str(report)


def test_bad_arguments():
    def batches():
        yield from sequences(2)

    with pytest.raises(ValueError, match="steps: expected 0 or more, got -1"):
        convert(encoder(), sequences(1), steps=-1)
    with pytest.raises(ValueError, match="forward: expected to run the model with gradients"):
        convert(encoder(), sequences(1), forward=torch.no_grad()(lambda model, x: model(x)), **LOCAL)
    with pytest.raises(ValueError, match="expected at least one batch"):
        convert(encoder(), [], **LOCAL)
    with pytest.raises(ValueError, match="batches: expected 9, or what can be iterated again, got 2"):
        convert(encoder(), batches(), held_out=sequences(1), steps=9, **LOCAL)
    with pytest.raises(ValueError, match=r"missed \['layers.1.self_attn'\]"):
        convert(encoder(), sequences(1), forward=lambda model, x: model.layers[0](x), **LOCAL)


def test_attention_that_gives_nothing():
    model = encoder()
    for layer in model.layers:
        nn.init.zeros_(layer.self_attn.out_proj.weight)
        nn.init.zeros_(layer.self_attn.out_proj.bias)
    report = convert(model, sequences(1), steps=2, **LOCAL)
    assert [(gap.before, gap.after) for gap in report.layers] == [(0, 0)] * 2
    assert all(x.isfinite().all() for x in model.parameters())


def test_swin_has_nothing_to_match():
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(2,), num_heads=(2,), embed_dim=16
    )
    with pytest.raises(ValueError, match=r"layers.0.blocks.0.attn: .*not to all tokens"):
        convert(model, [torch.randn(1, 3, 56, 56)], steps=1)


def test_the_report_prints_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    report = convert(encoder(), sequences(2), steps=10, window_size=8, chunk_size=4)
    assert capsys.readouterr().err.count("fitting: step") == 10
    header, first, _, mean = str(report).splitlines()
    assert header.split() == ["gap", "to", "softmax", "swapped", "fitted"]
    assert first.split() == [
        "layers.0.self_attn",
        *(f"{x:.4f}" for x in (report.layers[0].before, report.layers[0].after)),
    ]
    assert mean.split()[0] == "mean"
    report.plot(tmp_path / "gap.png")
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")
