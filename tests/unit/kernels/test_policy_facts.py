"""What a policy's class says of itself, against what it does and what files hold."""

import json

import pytest
import torch

from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.readers.policies import parse_policy
from molehill.kernels.policy import (
    POLICIES,
    AdaMoLE,
    Arrow,
    Constant,
    DynMoLE,
    FlyLoRA,
    Policy,
    Soft,
    Sparsegen,
    Threshold,
    TopK,
    TopP,
)

EXPERTS = 4

# As files have them: these bytes may not change, or adapters that were written lose their digests.
JSON = {
    Constant((0.5, 1.0)): '{"policy": "Constant", "weights": [0.5, 1.0]}',
    Soft(): '{"policy": "Soft"}',
    TopK(2): '{"policy": "TopK", "k": 2, "normalize": true}',
    TopK(1, normalize=False): '{"policy": "TopK", "k": 1, "normalize": false}',
    TopP(0.75): '{"policy": "TopP", "top_p": 0.75, "temperature": 0.0}',
    DynMoLE(): (
        '{"policy": "DynMoLE", "top_p": 0.75, "keep_top_k": 2, "entropy_threshold": 0.9, '
        '"entropy_index": 1.1, "entropy_type": "tsallis", "entropy_eps": 1e-05, '
        '"normalize_weights": false, "include_crossing": false, "normalize_entropy": true}'
    ),
    DynMoLE(0.5, 1, 1.0, 1.5, "renyi", 0.0, True, True, False): (
        '{"policy": "DynMoLE", "top_p": 0.5, "keep_top_k": 1, "entropy_threshold": 1.0, '
        '"entropy_index": 1.5, "entropy_type": "renyi", "entropy_eps": 0.0, '
        '"normalize_weights": true, "include_crossing": true, "normalize_entropy": false}'
    ),
    Threshold(0.3): '{"policy": "Threshold", "threshold": 0.3}',
    Arrow(3, 0.5): '{"policy": "Arrow", "k": 3, "temperature": 0.5}',
    AdaMoLE(0.9): '{"policy": "AdaMoLE", "max_threshold": 0.9}',
    Sparsegen(4): '{"policy": "Sparsegen", "hidden": 4}',
    FlyLoRA(2, experts=4): '{"policy": "FlyLoRA", "k": 2, "experts": 4}',
}
ROUTED = [policy for policy in JSON if policy.constant_weights is None]


def decided(policy: Policy) -> torch.Tensor:
    """Gate weights of 200 tokens, of decided routers and of undecided ones."""
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(200, EXPERTS + policy.extra_rows, generator=draw)
    parameters = torch.randn(policy.num_parameters, generator=draw)
    scaled = logits * torch.linspace(0.1, 5, 200).unsqueeze(1)
    return policy.decide(scaled, parameters if policy.num_parameters else None)[1].weights


def test_every_policy_is_known_by_its_name():
    facts = {
        policy for policy in Policy.__subclasses__() if policy.__module__.startswith("molehill.")
    }
    assert set(POLICIES.values()) == facts
    assert {type(policy) for policy in JSON} == set(POLICIES.values())


@pytest.mark.parametrize("policy", JSON, ids=str)
def test_json_is_that_of_the_files_and_comes_back(policy):
    assert json.dumps(policy.to_json()) == JSON[policy]
    assert parse_policy(Fields("routing", json.loads(JSON[policy]))) == policy


@pytest.mark.parametrize("policy", ROUTED, ids=str)
def test_weights_sum_to_one_where_it_is_said(policy):
    always = bool(torch.isclose(decided(policy).sum(-1), torch.tensor(1.0), atol=1e-6).all())
    assert always == policy.sums_to_one


@pytest.mark.parametrize("policy", ROUTED, ids=str)
def test_no_token_has_more_experts_than_is_said(policy):
    assert (decided(policy) != 0).sum(-1).max() <= policy.most_experts(EXPERTS) <= EXPERTS


@pytest.mark.parametrize("policy", ROUTED, ids=str)
def test_no_token_has_fewer_experts_than_is_said(policy):
    counts = (decided(policy) != 0).sum(-1)
    fewest = policy.fewest_experts(EXPERTS)
    assert counts.min() >= fewest
    assert (counts.min() == counts.max()) == (fewest == policy.most_experts(EXPERTS))


@pytest.mark.parametrize("policy", [TopK(2), Arrow(2), FlyLoRA(2, experts=4)], ids=str)
def test_the_most_experts_are_k(policy):
    assert (policy.most_experts(4), policy.most_experts(1)) == (2, 1)


def test_two_policies_know_how_many_experts_they_are_for():
    known = {policy: policy.only_experts for policy in JSON if policy.only_experts is not None}
    assert known == {Constant((0.5, 1.0)): 2, FlyLoRA(2, experts=4): 4}


def test_constant_weights_are_those_of_every_token():
    policy = Constant((0.5, 1.0))
    assert policy.constant_weights == tuple(policy.route(torch.rand(3, 2)).weights[2].tolist())
