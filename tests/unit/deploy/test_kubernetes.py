"""The manifests of deploy/kubernetes: valid by their schemas, and of one mind among themselves."""

import copy
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from molehill.api.cli import serve
from molehill.api.http import auth
from molehill.api.sources.adapters_file import parse
from molehill.api.vllm.options import ADMIN_KEY_VARIABLE

kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="kubernetes-validate is not installed"
)

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy" / "kubernetes"
CRDS = ROOT / "tests" / "data" / "crds"
KUBERNETES = "1.32"

Manifest = dict[str, Any]


def kustomization() -> Manifest:
    document: Manifest = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    return document


@cache
def read() -> list[Manifest]:
    files = [FOLDER / name for name in kustomization()["resources"]]
    return [manifest for path in files for manifest in yaml.safe_load_all(path.read_text())]


def manifests() -> list[Manifest]:
    """For a test to change."""
    return copy.deepcopy(read())


def named(kind: str, name: str = "molehill") -> Manifest:
    (manifest,) = (m for m in manifests() if (m["kind"], m["metadata"]["name"]) == (kind, name))
    return manifest


def closed(schema: Any) -> Any:
    """The schema with fields that it does not name refused, as `kubectl --validate=strict` does."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        schema.setdefault("additionalProperties", False)
    return schema


@cache
def crds() -> dict[tuple[str, str], Any]:
    """By version and kind."""
    schemas = {}
    for path in CRDS.glob("*.yaml"):
        document = yaml.safe_load(path.read_text())
        schema = closed(document["schema"])
        schema["properties"] |= {name: {} for name in ("apiVersion", "kind", "metadata")}
        schemas[document["apiVersion"], document["kind"]] = schema
    return schemas


def validate(manifest: Manifest) -> None:
    """Raises ValidationError, or what kubernetes-validate raises."""
    schema = crds().get((manifest["apiVersion"], manifest["kind"]))
    if schema is None:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    else:
        jsonschema.validate(manifest, schema)


def pod() -> Manifest:
    template: Manifest = named("Deployment")["spec"]["template"]
    return template


def container() -> Manifest:
    (only,) = pod()["spec"]["containers"]
    return dict(only)


@pytest.mark.slow
@pytest.mark.parametrize(
    "manifest", manifests(), ids=lambda m: f"{m['kind']}-{m['metadata']['name']}"
)
def test_a_manifest_is_valid(manifest: Manifest) -> None:
    validate(manifest)


def broken() -> Iterator[tuple[str, Manifest]]:
    for kind, path in (
        ("Deployment", ("spec", "template", "spec", "containers", 0, "readinessProbe")),
        ("PodMonitor", ("spec", "podMetricsEndpoints", 0)),
        ("InferencePool", ("spec", "endpointPickerRef")),
        ("HTTPRoute", ("spec", "rules", 0, "backendRefs", 0)),
    ):
        manifest = copy.deepcopy(named(kind))
        place: Any = manifest
        for step in path:
            place = place[step]
        place["noSuchField"] = 1
        yield kind, manifest


@pytest.mark.parametrize(("kind", "manifest"), list(broken()))
def test_a_field_that_there_is_not_is_refused(kind: str, manifest: Manifest) -> None:
    with pytest.raises(jsonschema.ValidationError, match="noSuchField"):
        validate(manifest)


def test_selectors_select_the_pods() -> None:
    labels = pod()["metadata"]["labels"]
    picker = named("Deployment", "molehill-epp")["spec"]["template"]["metadata"]["labels"]
    selectors = [
        named("Deployment")["spec"]["selector"]["matchLabels"],
        named("Service")["spec"]["selector"],
        named("PodMonitor")["spec"]["selector"]["matchLabels"],
        named("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        named("InferencePool")["spec"]["selector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector
        assert selector.items() <= labels.items()
        assert not selector.items() <= picker.items()
    for manifest in (named("Deployment", "molehill-epp"), named("Service", "molehill-epp")):
        selector = manifest["spec"]["selector"]
        assert selector.get("matchLabels", selector).items() <= picker.items()


def test_ports_are_those_that_the_server_listens_on() -> None:
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert f"--port={ports['http']}" in container()["args"]
    assert [port["targetPort"] for port in named("Service")["spec"]["ports"]] == ["http"]
    assert [p["port"] for p in named("PodMonitor")["spec"]["podMetricsEndpoints"]] == ["http"]
    assert named("InferencePool")["spec"]["targetPorts"] == [{"number": ports["http"]}]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container()[probe]["httpGet"]["port"] == "http"
    reference = named("InferencePool")["spec"]["endpointPickerRef"]
    service = named("Service", reference["name"])
    assert [port["port"] for port in service["spec"]["ports"]] == [reference["port"]["number"]]


def test_probes_ask_what_needs_no_key() -> None:
    paths = {
        probe: container()[probe]["httpGet"]["path"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    assert set(paths.values()) <= set(auth.OPEN)
    assert paths["readinessProbe"] == "/health/ready"


def test_molehills_options_fit_the_volumes() -> None:
    """vLLM's are parsed in tests/server/test_cli.py."""
    command, *arguments = container()["args"]
    assert command == "serve"
    root = "--adapter-root=/models/adapters"
    assert root in arguments
    # It has to be there, which is not so here.
    arguments.remove(root)
    options = serve.from_namespace(serve.make_parser().parse_known_args(arguments)[0])
    mounts = {mount["mountPath"]: mount for mount in container()["volumeMounts"]}
    assert options.adapters_file is not None
    assert options.store is not None
    # By subPath, changes of a ConfigMap would not be seen.
    assert "subPath" not in mounts[str(Path(options.adapters_file).parent)]
    assert "readOnly" not in mounts[str(options.store.parent)]
    assert mounts["/models"]["readOnly"] is True


def test_the_adapters_file_is_one() -> None:
    (volume,) = (v for v in pod()["spec"]["volumes"] if v["name"] == "adapters")
    config = named("ConfigMap", volume["configMap"]["name"])
    (argument,) = (a for a in container()["args"] if a.startswith("--adapters-file="))
    desired = parse(config["data"][Path(argument).name].encode())
    assert desired.adapters
    assert desired.bad == ()
    for adapter in desired.adapters:
        assert (ROOT / "demo" / "adapters" / adapter.source).is_dir()


def test_volumes_claims_accounts_and_targets_are_there() -> None:
    for name in ("molehill", "molehill-epp"):
        spec = named("Deployment", name)["spec"]["template"]["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounted = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        assert mounted == volumes.keys()
        for volume in volumes.values():
            if "configMap" in volume:
                named("ConfigMap", volume["configMap"]["name"])
            if "persistentVolumeClaim" in volume:
                named("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
        if "serviceAccountName" in spec:
            named("ServiceAccount", spec["serviceAccountName"])
    target = named("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target["kind"] == "Deployment"
    named(target["kind"], target["name"])
    for rule in named("HTTPRoute")["spec"]["rules"]:
        for backend in rule["backendRefs"]:
            named(backend["kind"], backend["name"])


def test_what_the_autoscaler_asks_for_is_what_the_adapter_exposes() -> None:
    (metric,) = named("HorizontalPodAutoscaler")["spec"]["metrics"]
    values = yaml.safe_load((FOLDER / "prometheus-adapter-values.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    assert rule["seriesQuery"].startswith("vllm:num_requests_waiting{")
    assert metric["type"] == "Pods"


def test_pods_run_as_nobody_in_particular_and_write_nowhere_else() -> None:
    for name in ("molehill", "molehill-epp"):
        spec = named("Deployment", name)["spec"]["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        (only,) = spec["containers"]
        assert only["securityContext"]["readOnlyRootFilesystem"] is True
        assert only["securityContext"]["allowPrivilegeEscalation"] is False
        assert only["resources"].keys() == {"requests", "limits"}
    mounts = {mount["mountPath"] for mount in container()["volumeMounts"]}
    assert {"/tmp", "/dev/shm"} <= mounts
    values = {entry["name"]: entry.get("value") for entry in container()["env"]}
    for variable in ("HOME", "MOLEHILL_CACHE_DIR", "VLLM_CACHE_ROOT", "HF_HOME"):
        assert any(str(values[variable]).startswith(mount) for mount in mounts)


def test_keys_come_from_a_secret() -> None:
    keys = {
        entry["name"]: entry["valueFrom"]["secretKeyRef"]
        for entry in container()["env"]
        if "secretKeyRef" in entry.get("valueFrom", {})
    }
    assert keys.keys() == {"VLLM_API_KEY", ADMIN_KEY_VARIABLE}
    assert {reference["name"] for reference in keys.values()} == {"molehill-keys"}
    documented = (ROOT / "docs" / "fleet.md").read_text()
    for reference in keys.values():
        assert f"--from-literal={reference['key']}=" in documented


@pytest.mark.slow
def test_kustomize_renders_the_same_objects() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    render = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER)], capture_output=True, text=True, timeout=60
    )
    assert render.returncode == 0, render.stderr
    rendered = list(yaml.safe_load_all(render.stdout))
    tags = {image["name"]: image["newTag"] for image in kustomization()["images"]}
    label = kustomization()["labels"][0]["pairs"]
    expected = []
    for manifest in manifests():
        manifest["metadata"]["labels"] = {**manifest["metadata"].get("labels", {}), **label}
        for spec in (manifest.get("spec", {}).get("template", {}).get("spec", {}),):
            for part in spec.get("containers", ()):
                part["image"] = f"{part['image']}:{tags[part['image']]}"
        expected.append(manifest)

    def key(manifest: Manifest) -> tuple[str, str]:
        return manifest["kind"], manifest["metadata"]["name"]

    assert sorted(rendered, key=key) == sorted(expected, key=key)
    for manifest in rendered:
        validate(manifest)
