"""What the tests of all integrations share: EVA is softmax in these settings."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eva_attn import integrations, replace_attention

EXACT_OPTIONS = {"projection": "identity", "exclude_window_landmarks": True, "log_count_bias": True}
ONE_WINDOW = {"window_size": 80, "chunk_size": 4, **EXACT_OPTIONS}
ONE_TOKEN_CHUNKS = {"window_size": 2, "chunk_size": 1, **EXACT_OPTIONS}
LOCAL = {"window_size": 2, "chunk_size": 2}


def randomised(model: nn.Module) -> nn.Module:
    """`model` in float64 and evaluation, with weights that make attention matter."""
    model = model.double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def assert_replaces(
    model: nn.Module,
    names: list[str],
    run: Callable[[nn.Module], Tensor],
    *,
    exact: tuple[dict[str, Any], ...] = (ONE_WINDOW, ONE_TOKEN_CHUNKS),
    **options: Any,
) -> integrations.ReplacementReport:
    """Exact settings change neither outputs nor parameters; others change outputs, and train."""
    expected = run(model)
    keys = model.state_dict().keys()
    for settings in exact:
        replaced = copy.deepcopy(model)
        parameters = dict(replaced.named_parameters())
        assert replace_attention(replaced, **settings, **options) == names
        assert_equal(run(replaced), expected)
        assert replaced.state_dict().keys() == keys
        assert dict(replaced.named_parameters()).keys() == parameters.keys()
        assert all(x is parameters[name] for name, x in replaced.named_parameters())
        assert not any(module.training for module in replaced.modules())

    trained = copy.deepcopy(model)
    report = replace_attention(trained, **LOCAL, **options)
    missing, unexpected = trained.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all("landmark_projection" in name for name in missing)
    assert not torch.allclose(run(trained), expected)
    run(trained.train()).square().mean().backward()
    without = [name for name, x in trained.named_parameters() if x.requires_grad and x.grad is None]
    wanted = [name for name in without if "landmark_projection" in name]
    assert not wanted
    return report
