"""What is refused, with which error, and that the server goes on as before."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.api_client import BASE, Api, copy_adapter, edit_config, edit_tensors, oracle

Change = Callable[[Path], None]


def first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in tensors if part in name)


def without_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def broken_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def wrong_type(folder: Path) -> None:
    edit_config(folder, num_experts="four")


def unknown_method(folder: Path) -> None:
    edit_config(folder, peft_type="WHATEVER", routing_strategy="whatever")


def without_weights(folder: Path) -> None:
    (folder / "adapter_model.bin").unlink()


def truncated(folder: Path) -> None:
    path = folder / "adapter_model.bin"
    path.write_bytes(path.read_bytes()[:-1000])


def without_router(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(first(tensors, "moe_gate")))


def without_half(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(first(tensors, "lora_B")))


def not_finite(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors[first(tensors, "lora_A")].data.fill_(torch.nan))


def wrong_shape(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = first(tensors, "lora_B")
        tensors[name] = torch.zeros(tensors[name].shape[0] + 1, tensors[name].shape[1])

    edit_tensors(folder, change)


def unknown_layer(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.3." in name]:
            tensors[name.replace("layers.3.", "layers.4.")] = tensors[name]

    edit_tensors(folder, change)


def no_effect(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "lora_B" in name:
                tensors[name] = torch.zeros_like(tensors[name])

    edit_tensors(folder, change)


def over_limit(folder: Path) -> None:
    """The shared server takes ranks up to 64."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_A" in name:
                tensors[name] = torch.ones(65, tensor.shape[1])
            elif "lora_B" in name:
                tensors[name] = torch.ones(tensor.shape[0], 65)

    edit_config(folder, r=65)
    edit_tensors(folder, change)


# What is done to which golden adapter, and the error's type.
BAD: dict[Change, tuple[str, str]] = {
    without_config: ("mola", "invalid_config"),
    broken_json: ("mola", "invalid_config"),
    wrong_type: ("mola", "invalid_config"),
    unknown_method: ("mola", "unsupported"),
    without_weights: ("mola", "missing_tensor"),
    truncated: ("mola", "corrupt_file"),
    without_router: ("mola", "missing_tensor"),
    without_half: ("mola", "missing_tensor"),
    not_finite: ("mola", "non_finite"),
    wrong_shape: ("mola", "wrong_shape"),
    unknown_layer: ("lora", "unknown_target"),
    no_effect: ("mola", "nothing_bound"),
    over_limit: ("mola", "limit_exceeded"),
}


@pytest.fixture(params=BAD, ids=lambda change: change.__name__)
def bad_adapter(request: pytest.FixtureRequest, api: Api) -> tuple[str, str]:
    """Its path, and the type of the error that it must get."""
    change: Change = request.param
    case, kind = BAD[change]
    folder = copy_adapter(case, api.root / f"bad-{change.__name__}")
    change(folder)
    return folder.name, kind


def state(api: Api) -> tuple[list[str], dict[str, float], list[str]]:
    """All that a failed load could leave behind."""
    samples = {name: value for name, value in api.metrics().items() if "bytes" in name}
    return sorted(api.models()), samples, sorted(path.name for path in api.store.iterdir())


def test_a_bad_adapter_is_refused_and_leaves_nothing_behind(
    api: Api, bad_adapter: tuple[str, str]
) -> None:
    path, expected_kind = bad_adapter
    before = state(api)
    status, kind, message = api.error(api.load("bad", path))
    assert (status, kind) == (422, expected_kind)
    assert "found" in message
    assert "expected" in message
    assert str(api.root) not in message
    assert state(api) == before
    prompt = oracle("dynmole-default")["prompts"][0]
    assert api.greedy("started", prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]


def test_a_bad_replacement_leaves_the_old_weights_serving(clean: Api) -> None:
    folder = clean.root / "bad-replacement"
    not_finite(copy_adapter("mola", folder))
    assert clean.load("m", "lora").status_code == 200
    assert clean.error(clean.load("m", folder.name, load_inplace=True))[1] == "non_finite"
    prompt = oracle("lora")["prompts"][0]
    assert clean.greedy("m", prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_pickle_runs_no_code(api: Api, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(witness)))
    assert witness.exists()
    witness.unlink()
    folder = copy_adapter("mola", api.root / "bad-pickle")
    torch.save({"x": Payload(witness)}, folder / "adapter_model.bin")
    assert api.error(api.load("bad", folder.name))[:2] == (422, "corrupt_file")
    assert not witness.exists()


def test_an_adapter_for_another_base_is_refused(api: Api) -> None:
    status, kind, _ = api.error(api.load("bad", "drlora"))
    assert status == 422
    assert kind in {"unknown_target", "base_mismatch", "wrong_shape"}


@pytest.mark.parametrize(
    "path",
    ["..", "../", "lora/../..", "/", "/etc", "../../../../etc", "link-out", "link-out/inside"],
)
def test_paths_out_of_the_root_are_forbidden(api: Api, path: str) -> None:
    outside = api.root.parent / "outside"
    if not outside.exists():
        copy_adapter("lora", outside / "inside")
        (api.root / "link-out").symlink_to(outside)
    status, kind, message = api.error(api.load("bad", path))
    assert (status, kind) == (403, "path_forbidden")
    assert str(api.root) not in message


def test_a_linked_file_out_of_the_root_is_forbidden(api: Api) -> None:
    folder = copy_adapter("lora", api.root / "linked-file")
    weights = folder / "adapter_model.bin"
    weights.rename(api.root.parent / "weights.bin")
    weights.symlink_to(api.root.parent / "weights.bin")
    status, kind, message = api.error(api.load("bad", "linked-file"))
    assert (status, kind) == (403, "path_forbidden")
    assert "linked-file/adapter_model.bin" in message


def test_a_pipe_in_the_place_of_a_file_does_not_hang_the_server(api: Api) -> None:
    folder = copy_adapter("lora", api.root / "pipe")
    (folder / "adapter_model.bin").unlink()
    os.mkfifo(folder / "adapter_model.bin")
    assert api.error(api.load("bad", "pipe"))[:2] == (403, "path_forbidden")


def test_links_within_the_root_and_absolute_paths_below_it_load(clean: Api) -> None:
    (clean.root / "link-in").symlink_to(clean.root / "lora")
    prompt = oracle("lora")["prompts"][0]
    for name, path in (("a", "link-in"), ("b", str(clean.root / "lora"))):
        assert clean.load(name, path).status_code == 200
        assert clean.greedy(name, prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]


def test_a_missing_path_is_not_found(api: Api) -> None:
    assert api.error(api.load("bad", "no-such"))[:2] == (404, "adapter_not_found")
    assert api.error(api.load("bad", "lora/adapter_config.json"))[:2] == (404, "adapter_not_found")


@pytest.mark.parametrize("path", ["", "lora\0", "lora" * 2000])
def test_what_is_no_path_is_refused(api: Api, path: str) -> None:
    assert api.error(api.load("bad", path))[:2] == (400, "invalid_path")


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb", "a/../b", "/etc", "a//b", BASE, "\x00"])
def test_bad_names_are_refused(api: Api, name: str) -> None:
    assert api.error(api.load(name, "lora"))[:2] == (400, "invalid_name")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"lora_name": "x"},
        {"lora_path": "lora"},
        {"lora_name": 5, "lora_path": "lora"},
        {"lora_name": "x", "lora_path": ["lora"]},
        {"lora_name": "x", "lora_path": "lora", "load_inplace": "yes"},
        [],
    ],
)
def test_missing_and_mistyped_fields_are_refused(api: Api, body: Any) -> None:
    response = api.http.post("/v1/load_lora_adapter", json=body)
    assert api.error(response)[0] == 400
    assert "x" not in api.models()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/adapters", {"name": "x", "source": "lora", "pined": True}),
        ("/v1/adapters", {"name": "x", "source": "lora", "base_model_name": BASE}),
        ("/v1/adapters/started/pin", {"pinned": False, "x": 1}),
    ],
)
def test_our_own_routes_refuse_misspelt_fields(api: Api, path: str, body: Any) -> None:
    status, _, message = api.error(api.http.post(path, json=body))
    assert status == 400
    assert list(body)[-1] in message
    assert "x" not in api.models()


def test_a_body_that_is_no_json_is_refused(api: Api) -> None:
    headers = {"Content-Type": "application/json"}
    response = api.http.post("/v1/unload_lora_adapter", content=b"{", headers=headers)
    assert api.error(response)[0] == 400
    response = api.http.post("/v1/unload_lora_adapter", content=b"lora_name=started")
    assert response.status_code in (400, 415)
    assert "started" in api.models()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/v1/adapters/{name}?expected_generatoin=0"),
        ("DELETE", "/v1/adapters/{name}?expected_generation=0&x=1"),
        ("POST", "/v1/adapters?expected_generation=0"),
        ("POST", "/v1/adapters/{name}/pin?pinned=false"),
        ("POST", "/v1/unload_lora_adapter?lora_name={name}"),
        ("GET", "/v1/adapters?name={name}"),
        ("GET", "/v1/adapters/{name}/routing?layer=1"),
        ("GET", "/v1/routing?x"),
    ],
)
def test_unknown_query_parameters_are_refused(clean: Api, method: str, path: str) -> None:
    assert clean.load("m", "lora").status_code == 200
    url = path.format(name="m")
    body: dict[str, Any] = {"name": "m", "source": "lora"}
    body = body if "unload" not in url else {"lora_name": "m"}
    body = {"pinned": False} if "/pin" in url else body
    answer = clean.http.request(method, url, json=body if method == "POST" else None)
    assert clean.error(answer)[:2] == (422, "unknown_parameter")
    assert "m" in clean.models()


def test_an_adapter_for_another_base_model_is_served_with_a_warning(clean: Api) -> None:
    folder = copy_adapter("lora", clean.root / "of-another-base")
    edit_config(folder, base_model_name_or_path="org/another-model")
    answer = clean.load("m", "of-another-base").json()
    (warning,) = [text for text in answer["warnings"] if "another-model" in text]
    assert warning in clean.http.get("/v1/adapters/m").json()["warnings"]
    prompt = oracle("lora")["prompts"][0]
    assert clean.greedy("m", prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]
    assert clean.load("n", "lora").json()["warnings"] == []
