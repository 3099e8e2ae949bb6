"""Messages between API side and workers, over vLLM's own wire format."""

import ast
import asyncio
from typing import Any

import pytest
import torch
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from molehill.engine.adapter.base_model import BaseModel, Moe
from molehill.engine.routing_stats import RoutingStats, SiteRoutingStats
from molehill.engine.vllm import compilation, protocol
from molehill.engine.vllm.protocol import ProtocolError, Rpc, from_wire, to_wire

RPCS = [value for value in vars(protocol).values() if isinstance(value, Rpc)]
STATS = RoutingStats(9, 8, 1, 0.5, [3, 5], 1 << 60, 40, 1.5, 1, 0.25)
SITE = SiteRoutingStats(2, 8, 1, 0.5, (3, 5), 1 << 60, 40)
MATRIX = protocol.PlainTensor.of(torch.tensor([[0.25, 0.75]]))
MESSAGES: list[Any] = [
    protocol.Empty(),
    BaseModel("m", "A", {"q": (8, 6)}, {"mlp": "silu"}, {"mlp": Moe(4, 64, 48)}, {"x": "why"}),
    protocol.CoresReply((0, 3)),
    protocol.AdapterRequest(7, "store/digest"),
    protocol.PrepareReply(True),
    protocol.PreparedReply(False),
    protocol.InstallRequest("name", 7, "store/digest"),
    protocol.InstallReply("why", full=True),
    protocol.UninstallRequest(7, "store/digest", True),
    protocol.UninstallReply(True, (8, 9)),
    protocol.StatsRequest((7, 8)),
    protocol.StatsReply(
        1,
        {7: protocol.AdapterReport("a", None, STATS), 8: protocol.AdapterReport("b", 40, STATS)},
        {7: 30},
        protocol.StepSeconds(2.0, 0.5),
    ),
    protocol.RoutingRequest(7),
    protocol.RoutingReply(9, {"layers.0.mlp": SITE}),
    protocol.TraceRequest(True),
    protocol.TraceReply([protocol.SiteTrace("q", MATRIX, MATRIX, MATRIX)]),
    protocol.RoutesRequest("key", (protocol.TokenRange(1, 3, 5),), usage=True, forget=True),
    protocol.RoutesReply(
        1,
        (("layers.0.mlp", 0), ("layers.0.self_attn.k_proj", 1)),
        2,
        [protocol.Routes(1, b"\xff\xff\x00\x01", b"")],
        protocol.RoutingUsage(3, 6, 9, 1 << 60),
    ),
    protocol.ForgetRoutesRequest("key"),
]


def over_the_wire(value: object) -> Any:
    """As vLLM carries what a utility call is given and returns."""
    return MsgpackDecoder().decode(MsgpackEncoder().encode(value))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message: Any) -> None:
    assert from_wire(over_the_wire(to_wire(message)), type(message), "x") == message


def test_every_kind_of_message_is_tried() -> None:
    kinds = {kind for rpc in RPCS for kind in (rpc.request, rpc.reply)}
    assert kinds == {type(message) for message in MESSAGES}


def test_a_tensor_arrives_with_its_shape() -> None:
    for tensor in (torch.randn(2, 3, 4), torch.randn(0, 4), torch.randn(5)):
        sent = over_the_wire(to_wire(protocol.PlainTensor.of(tensor)))
        assert torch.equal(from_wire(sent, protocol.PlainTensor, "x").tensor(), tensor)


def test_a_worker_has_a_method_for_every_question_and_no_other() -> None:
    file = compilation.__file__.replace("compilation.py", "worker.py")
    with open(file) as source:
        nodes = ast.walk(ast.parse(source.read()))
    methods = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    asked = {rpc.method for rpc in RPCS}
    assert {name for name in methods if name.startswith("molehill_")} == asked


class Worker:
    """Answers whatever it is asked with the same."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        return [self.answer]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"version": 1, "message": {"cores": [0]}}, "answered with version 1 .* expected version"),
        ({"version": "1", "message": {"cores": [0]}}, "answered with version '1' of"),
        ({"message": {"cores": [0]}}, "answered with no version"),
        ([0, 1], "answered with no version"),
        (None, "answered with no version"),
        ({"version": protocol.VERSION}, "another CoresReply"),
        ({"version": protocol.VERSION, "message": {}}, "another CoresReply: .*`cores`"),
        ({"version": protocol.VERSION, "message": {"cores": ["0"]}}, r"got `str` - at `\$\.cores"),
    ],
)
def test_an_answer_of_another_release_or_shape_is_named(answer: object, message: str) -> None:
    asking = protocol.CORES.ask(Worker(answer), protocol.Empty())
    with pytest.raises(ProtocolError, match=f"^molehill_cores: a worker .*{message}"):
        asyncio.run(asking)


def test_a_worker_refuses_a_question_of_another_release_before_it_acts() -> None:
    def act(request: protocol.RoutingRequest) -> protocol.RoutingReply:
        raise AssertionError("it acted")

    for argument, message in (
        ({"version": 0, "message": {"lora_int_id": 7}}, "the API server sent version 0"),
        (7, "the API server sent no version"),
        ({"version": protocol.VERSION, "message": {"id": 7}}, "sent another RoutingRequest"),
    ):
        with pytest.raises(ProtocolError, match=message):
            protocol.ROUTING.serve(argument, act)
