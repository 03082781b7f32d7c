"""Idempotency keys, priority and labels of a submission."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from service.store import Store

SMALLEST: dict[str, Any] = {"dataset": "digits", "ipc": 1}


def post(client: httpx.Client, key: str, document: Any = SMALLEST, path: str = "/jobs") -> httpx.Response:
    return client.post(path, json=document, headers={"Idempotency-Key": key})


def test_submit_when_sent_again_under_its_key_answers_with_the_same_job(client: httpx.Client) -> None:
    first, again = post(client, "once-1"), post(client, "once-1", {"ipc": 1, "dataset": "digits"})
    assert (first.status_code, again.status_code) == (201, 201)
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.json() == first.json()
    assert again.headers["Location"] == first.headers["Location"]


def test_submit_when_a_key_comes_with_another_body_is_refused(client: httpx.Client) -> None:
    made = post(client, "once-2").json()
    reply = post(client, "once-2", SMALLEST | {"labels": {"a": "b"}})
    assert (reply.status_code, reply.json()["code"]) == (422, "idempotency_key_reused")
    [error] = reply.json()["errors"]
    assert error["field"] == "Idempotency-Key" and made["id"] in error["message"] and error["hint"]


def test_submit_when_a_hundred_come_at_once_under_one_key_makes_one_job(client: httpx.Client, api_store: Store) -> None:
    before = sum(api_store.counts().values())
    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda _: post(client, "once-3"), range(100)))
    assert {reply.status_code for reply in replies} == {201}
    assert len({reply.json()["id"] for reply in replies}) == 1
    assert sum("Idempotency-Replayed" not in reply.headers for reply in replies) == 1
    assert sum(api_store.counts().values()) == before + 1


def test_submit_when_refused_leaves_its_key_free(client: httpx.Client) -> None:
    assert post(client, "once-4", SMALLEST | {"ipc": 0}).status_code == 422
    assert "Idempotency-Replayed" not in post(client, "once-4").headers


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"])
def test_submit_when_the_key_is_not_legal_names_the_header(client: httpx.Client, key: str) -> None:
    reply = post(client, key)
    assert reply.status_code == 422
    assert reply.json()["errors"][0]["field"] == "Idempotency-Key"


def test_submit_when_it_has_priority_and_labels_keeps_them_out_of_the_spec(client: httpx.Client) -> None:
    body = client.post("/jobs", json=SMALLEST | {"priority": 70, "labels": {"paper": "dm", "a.b-c_1": ""}}).json()
    assert (body["priority"], body["labels"], body["owner"]) == (70, {"paper": "dm", "a.b-c_1": ""}, "local")
    assert body["requested"] == SMALLEST
    assert not {"priority", "labels"} & set(body["spec"])
    assert (client.post("/jobs", json=SMALLEST).json()["priority"], body["parent_id"]) == (50, None)


@pytest.mark.parametrize(
    ("envelope", "field"),
    [
        ({"priority": 101}, "priority"),
        ({"priority": -1}, "priority"),
        ({"priority": "50"}, "priority"),
        ({"priority": None}, "priority"),
        ({"priority": True}, "priority"),
        ({"priority": 1.5}, "priority"),
        ({"labels": None}, "labels"),
        ({"labels": ["a"]}, "labels"),
        ({"labels": {"A": "x"}}, "labels.A"),
        ({"labels": {"": "x"}}, "labels."),
        ({"labels": {"k" * 64: "x"}}, "labels." + "k" * 64),
        ({"labels": {"a": 1}}, "labels.a"),
        ({"labels": {"a": None}}, "labels.a"),
        ({"labels": {"a": "x" * 256}}, "labels.a"),
        ({"labels": {"a": "\0"}}, "labels.a"),
        ({"labels": {f"k{i}": "x" for i in range(33)}}, "labels"),
    ],
)
def test_submit_when_the_envelope_is_not_legal_names_the_field(
    client: httpx.Client, envelope: dict[str, Any], field: str
) -> None:
    reply = client.post("/jobs", json=SMALLEST | envelope)
    assert (reply.status_code, reply.json()["code"]) == (422, "invalid_spec")
    assert [error["field"] for error in reply.json()["errors"]] == [field]
    assert reply.json()["errors"][0]["hint"]


@pytest.mark.parametrize(("key", "meant"), [("priorty", "priority"), ("Label", "labels"), ("limit", "limits")])
def test_submit_when_a_key_is_misspelt_says_what_was_meant(client: httpx.Client, key: str, meant: str) -> None:
    refused = client.post("/jobs", json={"dataset": "digits", "ipc": 1, key: 1})
    (error,) = refused.json()["errors"]
    assert (refused.status_code, error["field"]) == (422, key)
    assert error["hint"] == f"Did you mean '{meant}'?"
