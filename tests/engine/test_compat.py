"""The start-up check of vLLM's version and seams."""

from typing import Any

import pytest

from molehill.engine.vllm import compat


@pytest.mark.parametrize("found", ["0.31.2", "0.33.0", "1.0.0"])
def test_another_vllm_is_refused_with_the_range(monkeypatch: Any, found: str) -> None:
    monkeypatch.setattr(compat, "version", lambda distribution: found)
    with pytest.raises(RuntimeError, match=rf"vLLM {found} is installed; .*>=0\.32,<0\.33"):
        compat.check_version()


def test_the_installed_vllm_has_every_seam() -> None:
    compat.check_version()
    compat.check_seams()


def test_a_seam_that_changed_is_named(monkeypatch: Any) -> None:
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    def load_lora_model(self: Any, model: Any) -> None: ...

    monkeypatch.setattr(LoRAModelRunnerMixin, "load_lora_model", load_lora_model)
    with pytest.raises(RuntimeError, match="load_lora_model"):
        compat.check_seams()


def test_a_method_that_is_gone_is_named(monkeypatch: Any) -> None:
    from vllm.model_executor.layers.linear import LinearMethodBase

    monkeypatch.delattr(LinearMethodBase, "apply")
    with pytest.raises(RuntimeError, match=r"LinearMethodBase\.apply takes"):
        compat.check_seams()


def test_a_field_that_is_gone_is_named(monkeypatch: Any) -> None:
    from vllm.lora.layers.utils import LoRAMapping

    monkeypatch.setattr(LoRAMapping, "__annotations__", {"type": Any})
    with pytest.raises(RuntimeError, match="LoRAMapping has no index_mapping"):
        compat.check_seams()
