"""What an update must have brought, what it may leave out, and what digests prove of it."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from tests.engines.hooks.pushing import (
    NAMES,
    PLAN,
    Server,
    digest,
    error,
    push_16_bits,
    run,
    sixteen,
    together,
)

pytestmark = pytest.mark.filterwarnings("error")


def test_what_did_not_change_may_be_skipped_and_is_verified_all_the_same() -> None:
    async def test() -> None:
        server = Server()
        begun = (await server.begin("B", digests=True))[1]
        assert begun["digests"] == {name: digest("A", name) for name in NAMES}
        assert (await server.bucket(0, NAMES[1:]))[0] == 200
        status, ended = await server.end(1, skipped=NAMES[:1])
        assert (status, ended["verified"]) == (200, 4)

    run(test())


def test_what_is_not_alike_on_all_ranks_cannot_be_skipped() -> None:
    async def test() -> None:
        server = Server()
        digests = server.workers._digests

        def differing(rank: int, layouts: list[str] | None = None) -> dict[str, Any]:
            answer = digests(rank)
            for shard in answer["tensors"]:
                if shard["name"] == "norm.weight":  # copies, of which one has gone bad
                    shard |= {"row": 0, "primary": rank == 0, "digest": f"{rank:016x}"}
            return answer

        server.workers._digests = differing  # type: ignore[method-assign]
        begun = (await server.begin(digests=True))[1]
        assert sorted(begun["digests"]) == sorted(set(NAMES) - {"norm.weight"})

    run(test())


def test_what_was_skipped_and_changed_meanwhile_is_seen() -> None:
    async def test() -> None:
        server = Server()
        await server.begin("B", digests=True)
        server.workers.held[1][NAMES[0]] = digest("D", NAMES[0])
        await server.bucket(0, NAMES[1:])
        answer = await server.end(1, skipped=NAMES[:1])
        assert error(answer) == (500, "FP8-UNEQUAL", "failed")

    run(test())


@pytest.mark.parametrize("skipped", [NAMES[:1], ["nobody.knows"], NAMES[1:2]])
def test_only_what_the_server_told_may_be_skipped(skipped: list[str]) -> None:
    async def test() -> None:
        server = Server()
        await server.begin("B", digests=skipped != NAMES[:1])
        await server.bucket(0, NAMES[1:])
        assert error(await server.end(1, skipped=skipped)) == (422, "FP8-INCOMPLETE", "failed")

    run(test())


def test_an_update_that_changes_nothing_writes_nothing_and_keeps_the_caches() -> None:
    async def test() -> None:
        server = Server()
        await server.begin("B", digests=True)
        status, ended = await server.end(0, skipped=NAMES)
        assert (status, ended["outcome"], ended["version"]) == (200, "applied", "B")
        assert server.workers.flushed == 0
        assert await server.generate() == 200

    run(test())


@pytest.mark.parametrize("state", ["unpushed", "failed"])
def test_no_digests_are_told_where_everything_must_be_sent(state: str) -> None:
    async def test() -> None:
        server = Server(version="A" if state == "failed" else None)
        if state == "failed":
            await server.begin("C")
            await server.bucket(0, NAMES[:1], "C")
            await server.abort("C")
        assert server.state == state
        assert (await server.begin("B", digests=True))[1]["digests"] is None

    run(test())


def test_a_part_may_be_sent_to_a_server_that_has_all() -> None:
    async def test() -> None:
        server = Server()
        await server.begin("A", complete=False)
        await server.bucket(0, NAMES[3:], "A")
        status, ended = await server.end(1, "A")
        assert (status, ended["state"], ended["verified"]) == (200, "ready", 1)

    run(test())


def test_parts_make_a_waiting_server_ready_when_all_have_arrived() -> None:
    async def test() -> None:
        server = Server(version=None)
        await server.begin("A", push="one", complete=False)
        await server.bucket(0, NAMES[:3], "A", push="one")
        status, ended = await server.end(1, push="one")
        assert (status, ended["outcome"], ended["state"]) == (200, "applied", "unpushed")
        assert (ended["missing"], ended["message"]) == (
            1,
            "1 tensors have not arrived, such as norm.weight",
        )
        assert await server.generate() == 503
        await server.begin("A", push="two", complete=False)
        await server.bucket(0, NAMES[3:], "A", push="two")
        assert (await server.end(1, push="two"))[1]["state"] == "ready"
        assert await server.generate() == 200

    run(test())


def test_a_kept_tensor_that_no_rank_holds_need_not_be_sent() -> None:
    """A head that is tied to the embedding, but stored; tables that engines compute."""
    tied = {"name": "lm_head.weight", "dtype": "BF16", "shape": [8, 4], "quantize": False}
    table = {"name": "l.rotary_emb.inv_freq", "dtype": "F32", "shape": [4], "quantize": False}
    plan = {**PLAN, "tensors": [*PLAN["tensors"], tied, table]}

    async def test() -> None:
        server = Server(plan=plan)
        assert (await server.push("B"))[0] == 200
        for held in server.workers.held:  # now the engine has one of its own
            held["lm_head.weight"] = digest("B", "lm_head.weight")
        status, answer = await server.push("C")
        assert (status, answer["error"]["data"]["names"]) == (422, ["lm_head.weight"])

    run(test())


@pytest.mark.parametrize("skipped", ["embed.weight", "a.weight", "norm.weight"])
def test_without_a_plan_a_complete_update_brings_what_the_ranks_hold(skipped: str) -> None:
    """A server that is ready as well: a tensor that a trainer forgot would be of another step."""

    async def test() -> None:
        server = Server(plan={})
        server.workers.form = "engine"
        some = [name for name in sixteen() if name != skipped]
        status, answer = await push_16_bits(server, some, "B")
        assert (status, answer["error"]["id"]) == (422, "FP8-INCOMPLETE")
        assert answer["error"]["data"]["names"] == [skipped]
        assert server.state == "failed", "some of it is in place"
        status, ended = await push_16_bits(server, sixteen(), "A")
        assert (status, ended["state"]) == (200, "ready")
        # Who says that it is a part may send one.
        await server.begin("B", push="part", complete=False)
        server.workers.calls.clear()
        assert (await server.end(0, "B", push="part"))[0] == 200
        assert "names" not in server.workers.calls

    run(test())


@pytest.mark.parametrize(
    ("held", "sent"),
    [
        ("layer.q_proj.weight", "layer.qkv_proj.weight"),  # one tensor in the checkpoint
        ("lm_head.weight", ""),  # in the memory of the embedding
    ],
)
def test_what_comes_under_another_name_is_not_missing(held: str, sent: str) -> None:
    async def test() -> None:
        server = Server(plan={})
        server.workers.form = "engine"
        server.workers.same = {"lm_head.weight": NAMES[0]}
        server.workers.parameters.append(held)
        names = [*sixteen(), *filter(None, [sent])]
        status, answer = await push_16_bits(server, names, "B")
        assert (status, answer["state"]) == (200, "ready")
        assert server.workers.calls.count("digests") == 1, "it is verified, and no more"

    run(test())


def test_without_a_plan_what_the_ranks_hold_says_what_leads_out_of_a_failure() -> None:
    async def test() -> None:
        server = Server(plan={})
        server.workers.form = "engine"
        await server.begin("C")
        await server.bucket(0, NAMES[:1], "C")
        await server.abort("C")
        assert server.state == "failed"
        status, answer = await push_16_bits(server, sixteen()[:2], "B")
        assert (status, answer["error"]["data"]["names"]) == (422, ["norm.weight"])
        status, ended = await push_16_bits(server, sixteen(), "A")
        assert (status, ended["state"]) == (200, "ready")

    run(test())


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_need_not_be_sent_to_lead_out_of_a_failure(tied: bool) -> None:
    """VLLM's LlamaForCausalLM has a name for it, and its loader skips what comes under it."""

    async def test() -> None:
        server = Server(plan={})
        server.workers.form = "engine"

        server.workers.parameters.append("lm_head.weight")

        def embed(version: str) -> None:
            for held in server.workers.held:
                held["lm_head.weight"] = digest(version, NAMES[0])

        embed("A")
        await server.begin("C")
        await server.bucket(0, NAMES[:1], "C")
        await server.abort("C")
        await server.begin("B")
        for i, name in enumerate(sixteen()):
            assert (await server.bucket(i, [name], "B", dtype="bfloat16"))[0] == 200
        if tied:
            embed("B")
        status, answer = await server.end(len(sixteen()), "B")
        if tied:
            assert (status, answer["state"]) == (200, "ready")
        else:
            assert (status, answer["error"]["data"]["names"]) == (422, ["lm_head.weight"])

    run(test())


def test_a_kept_tensor_that_the_engine_holds_in_another_type_proves_nothing_and_fails_nothing() -> (
    None
):
    async def test() -> None:
        server = Server()
        server.workers.dtypes["norm.weight"] = "float32"
        status, ended = await server.push("B")
        assert (status, ended["verified"]) == (200, 3)
        # Codes are another matter.
        server.workers.dtypes["a.weight"] = "bfloat16"
        status, answer = await server.push("C")
        assert (status, answer["error"]["data"]["names"]) == (500, ["a.weight"])

    run(test())


def test_codes_that_lie_under_names_of_the_engines_own_prove_nothing() -> None:
    """A module that is fused on disk: the engine tells its parts."""

    async def test() -> None:
        server = Server()
        await server.begin()
        await server.bucket(0, NAMES)
        for held in server.workers.held:
            held["a_part.weight"] = held.pop("a.weight")
        server.workers.dtypes["a_part.weight"] = "float8_e4m3fn"
        status, ended = await server.end(1)
        assert (status, ended["verified"], ended["state"]) == (200, None, "ready")
        assert "trust" not in server.workers.calls

    run(test())


def test_who_does_not_want_proof_gets_none() -> None:
    async def test() -> None:
        server = Server()
        await server.begin()
        await server.bucket(0, NAMES)
        assert (await server.end(1, verify=False))[1]["verified"] is None
        assert "digests" not in server.workers.calls

    run(test())


async def second(server: Server) -> tuple[int, Any]:
    """Push once, begin again and send everything; return what END is asked with."""
    assert (await server.push("B"))[0] == 200
    await server.begin("C")
    for number, names in enumerate((NAMES[:2], NAMES[2:])):
        assert (await server.bucket(number, names, "C"))[0] == 200
    server.workers.calls.clear()
    server.workers.details.clear()
    return await server.end(2, "C")


def test_at_the_next_update_ranks_are_asked_for_sums_alone() -> None:
    async def test() -> None:
        server = Server()
        status, ended = await second(server)
        assert (status, ended["verified"]) == (200, len(NAMES))
        [asked] = [d for d in server.workers.details if "layouts" in d]
        assert asked["layouts"] == [server.workers._digests(rank)["layout"] for rank in range(2)]

    run(test())


@pytest.mark.parametrize("rank", [0, 1])
def test_sums_show_what_was_changed_after_it_was_loaded(rank: int) -> None:
    async def test() -> None:
        server = Server()

        async def changes() -> None:
            if server.gate.settled == "ready" and server.updates.open:
                held = server.workers.held[rank]
                assert held[NAMES[1]] == digest("C", NAMES[1])
                held[NAMES[1]] = digest("D", NAMES[1])

        assert (await server.push("B"))[0] == 200
        server.workers.faults["digests"] = changes
        answer = await server.push("C")
        assert error(answer) == (500, "FP8-UNEQUAL", "failed")
        assert answer[1]["error"]["data"]["names"] == [NAMES[1]]
        del server.workers.faults["digests"]
        assert (await server.push("D"))[1]["state"] == "ready"

    run(test())


def test_a_rank_that_holds_it_otherwise_by_now_is_heard() -> None:
    async def test() -> None:
        server = Server()
        assert (await server.push("B"))[0] == 200
        held = server.workers.held[1]
        server.workers.held[1] = {name: held[name] for name in reversed(held)}
        status, ended = await server.push("C")
        assert (status, ended["verified"]) == (200, len(NAMES))
        server.workers.remembers = False
        assert (await server.push("D"))[1]["verified"] == len(NAMES)
        assert (await server.push("A"))[1]["verified"] == len(NAMES)

    run(test())


def test_a_rank_that_gives_other_sums_than_it_was_asked_for_proves_nothing() -> None:
    async def test() -> None:
        server = Server()
        assert (await server.push("B"))[0] == 200
        digests = server.workers._digests

        def too_few(rank: int, layouts: list[str] | None = None) -> dict[str, Any]:
            answer = digests(rank, layouts)
            return {**answer, "sums": answer["sums"][16:]} if "sums" in answer else answer

        server.workers._digests = too_few  # type: ignore[method-assign]
        assert error(await server.push("C")) == (500, "FP8-ENGINE", "failed")
        assert (await server.push("D"))[1]["verified"] == len(NAMES), "asked for all of it"

    run(test())


def test_skipped_tensors_are_proven_by_sums_as_well() -> None:
    async def test() -> None:
        server = Server()
        assert (await server.push("B"))[0] == 200
        begun = (await server.begin("C", digests=True))[1]
        assert begun["digests"] == {name: digest("B", name) for name in NAMES}
        await server.bucket(0, NAMES[1:], "C")
        status, ended = await server.end(1, "C", skipped=NAMES[:1])
        assert (status, ended["verified"]) == (200, 4)

    run(test())


# --- a rank that goes on by itself ----------------------------------------------------------------


_numbers = itertools.count()


async def asked_at_end(server: Server, version: str, **more: Any) -> list[str]:
    """Push all; return what the ranks were asked when its END came."""
    names = [name for name in NAMES if name not in more.get("skipped", ())]
    push = f"{version}-{next(_numbers)}"
    await server.begin(version, push, digests="skipped" in more)
    await server.bucket(0, names, version, push)
    server.workers.messages.clear()
    status, ended = await server.end(1, version, push, **more)
    assert (status, ended["state"], server.state) == (200, "ready", "ready")
    assert ended["verified"] == (len(NAMES) if more.get("verify", True) else None)
    assert not server.workers.at_rest
    assert await server.generate() == 200
    return [*server.workers.messages]


def test_the_one_rank_goes_on_by_itself_when_it_holds_what_was_sent() -> None:
    """The first time it has to be told what to trust, and by which layout it is asked."""

    async def test() -> None:
        server = Server(ranks=1)
        assert await asked_at_end(server, "B") == ["settle", "resume"]
        for version in "CDC":
            assert await asked_at_end(server, version) == ["settle"]
        assert (await together(server, "A"))[1]["verified"] == len(NAMES)
        assert server.workers.messages == ["receive"], "asked with the last bucket"
        assert not server.workers.at_rest

    run(test())


@pytest.mark.parametrize("why", ["two ranks", "no proof", "it cannot", "no layout", "skipped"])
def test_a_rank_that_does_not_go_on_by_itself_is_told_to(why: str) -> None:
    async def test() -> None:
        server = Server(ranks=2 if why == "two ranks" else 1)
        server.workers.goes_on = why != "it cannot"
        server.workers.remembers = why != "no layout"
        await asked_at_end(server, "B")
        more: dict[str, Any] = {"verify": False} if why == "no proof" else {}
        if why == "skipped":
            for rank in server.workers.held:
                rank[NAMES[0]] = digest("C", NAMES[0])
            more = {"skipped": NAMES[:1]}
        told = await asked_at_end(server, "C", **more)
        # What was left out is there, and proven with the rest.
        assert told == ["settle"] if why == "skipped" else told == ["settle", "resume"]

    run(test())


def test_a_rank_that_holds_something_else_stays_at_rest() -> None:
    async def test() -> None:
        server = Server(ranks=1)
        await asked_at_end(server, "B")
        await server.begin("C")
        await server.bucket(0, NAMES, "C")
        server.workers.held[0][NAMES[1]] = digest("D", NAMES[1])
        resumed = []

        async def rests() -> None:
            resumed.append(server.workers.at_rest)

        server.workers.faults["flush"] = rests
        assert error(await server.end(1, "C")) == (500, "FP8-UNEQUAL", "failed")
        assert resumed[0], "behind what it was asked"
        del server.workers.faults["flush"]
        assert await asked_at_end(server, "D") == ["settle", "resume"], "it trusts nothing"
        assert await asked_at_end(server, "B") == ["settle"]

    run(test())


@pytest.mark.parametrize("complete", [True, False])
def test_a_part_lets_a_rank_go_on_only_where_all_else_is_proven(complete: bool) -> None:
    async def test() -> None:
        server = Server(ranks=1)
        await asked_at_end(server, "B")
        await server.begin("C", complete=complete)
        await server.bucket(0, NAMES[1:], "C")
        server.workers.messages.clear()
        server.workers.details.clear()
        status, ended = await server.end(1, "C")
        assert not any("sums" in asked for asked in server.workers.details)
        if complete:
            assert error((status, ended)) == (422, "FP8-INCOMPLETE", "failed")
        else:
            assert server.workers.messages == ["settle", "resume"]

    run(test())


def test_a_rank_that_went_on_is_not_asked_again_by_an_end_that_wants_less() -> None:
    """The one that came last is what the ranks were asked for; the first one is worked off."""

    async def test() -> None:
        server = Server(ranks=1)
        await asked_at_end(server, "B")
        await server.begin("C")
        ends = []
        for verify in (False, True):
            ends.append(asyncio.ensure_future(server.end(1, "C", verify=verify)))
            await asyncio.sleep(0.01)
        server.workers.messages.clear()
        assert (await server.bucket(0, NAMES, "C"))[0] == 200
        assert [(await one)[1]["outcome"] for one in ends] == ["applied"] * 2
        assert server.workers.messages == ["receive"]
        assert (server.state, server.workers.at_rest) == ("ready", False)

    run(test())


def test_a_rank_that_went_on_before_an_update_failed_is_brought_to_rest_first() -> None:
    """What fails behind it is nothing that it could have seen: its answer was lost."""

    async def test() -> None:
        server = Server(ranks=1)
        await asked_at_end(server, "B")
        await server.begin("C")
        await server.bucket(0, NAMES, "C")

        async def lost() -> None:
            assert not server.workers.at_rest
            del server.workers.faults["flush"]
            raise RuntimeError("the rank did not answer")

        server.workers.faults["flush"] = lost
        server.workers.calls.clear()
        assert error(await server.end(1, "C")) == (500, "FP8-ENGINE", "failed")
        assert server.workers.calls[-4:] == ["forget", "hold abort", "flush", "resume"]
        assert await server.generate() == 503

    run(test())


def test_without_a_plan_a_complete_update_leaves_it_to_the_server() -> None:
    """Only what the ranks have names for says then what was not sent."""

    async def test() -> None:
        server = Server(ranks=1, plan={})
        workers = server.workers
        workers.dtypes["a.weight"] = "bfloat16"
        workers.held = [{name: digest("A", name) for name in sixteen()}]
        asked = []
        for version, complete in (("B", True), ("C", True), ("D", False)):
            await server.begin(version, complete=complete)
            for i, name in enumerate(sixteen()):
                await server.bucket(i, [name], version, dtype="bfloat16")
            workers.details.clear()
            status, ended = await server.end(3, version)
            assert (status, ended["state"], ended["verified"]) == (200, "ready", 3)
            asked.append(any("sums" in one for one in workers.details))
        assert asked == [False, False, True], "a part says itself that it is one"

    run(test())


def test_after_a_rank_has_gone_on_nothing_more_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client whose END gave up on the last bucket, and that sends it, and one more."""
    monkeypatch.setattr("fp8ctl.engines.hooks.updates.PREDECESSOR", 0.05)

    async def test(late: bool) -> None:
        server = Server(ranks=1)
        await asked_at_end(server, "B")
        await server.begin("C", complete=False)
        ending = asyncio.ensure_future(server.end(1, "C"))
        await asyncio.sleep(0.2 if late else 0.01)
        server.workers.messages.clear()
        loaded = asyncio.ensure_future(server.bucket(0, NAMES, "C"))
        more = asyncio.ensure_future(server.bucket(1, ["norm.weight"], "C"))
        assert (await loaded)[0] == 200
        if late:
            assert error(await ending)[:2] == (409, "FP8-ORDER")
            assert not any("sums" in asked for asked in server.workers.details)
        # It may be there before that END is worked off, which fails with the update then.
        assert error(await more)[:2] == ((422, "FP8-TENSOR") if late else (409, "FP8-ORDER"))
        assert (await ending)[0] == 409
        assert server.state == "failed"
        assert server.workers.messages.count("receive") == 1

    run(test(late=True))
    run(test(late=False))


@pytest.mark.parametrize("skipped", [["nobody.knows"], NAMES[:1]])
def test_a_rank_does_not_go_on_before_what_was_left_out_is_looked_at(skipped: list[str]) -> None:
    async def test() -> None:
        server = Server(ranks=1)
        await asked_at_end(server, "B")
        answer = await together(server, "C", skipped=skipped)
        assert error(answer) == (422, "FP8-INCOMPLETE", "failed")
        assert server.workers.messages[0] == "receive", "it was taken"
        assert not any("sums" in asked for asked in server.workers.details)

    run(test())
