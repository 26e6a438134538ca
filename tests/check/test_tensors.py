# --- compare and judge --------------------------------------------------------------------------


def test_weights_that_are_the_sources_are_ok(plan: Plan, expected: dict[str, int]) -> None:
    assert {Q, SCALE, NORM, ROUTER, HEAD} <= expected.keys()
    held = held_of(expected)
    assert unequal(plan, expected, held) == []
    verdict, why = word(plan, expected, held)
    assert verdict == "fp8-ok"
    assert why.startswith("4 tensors of codes and scales equal the source's")


@pytest.mark.parametrize("name", [Q, SCALE, NORM, HEAD])
def test_one_digest_that_differs_is_found_by_name(
    name: str, plan: Plan, expected: dict[str, int]
) -> None:
    held = held_of(expected)
    held[name] = replace(held[name], digest=held[name].digest ^ 1)
    assert unequal(plan, expected, held) == [(name, "different")]
    assert word(plan, expected, held) == (
        "wrong-weights",
        f"1 tensors are not what the source makes: {name} is different",
    )


def test_weights_of_another_recipe_are_wrong(plan: Plan, expected: dict[str, int]) -> None:
    other = replace(plan, recipe="ue8m0")
    assert word(other, checkpoint.expected_digests(plan.model, other), held_of(expected))[0] == (
        "wrong-weights"
    )


@pytest.mark.parametrize("name", [Q, SCALE])
def test_a_code_or_a_scale_that_is_missing_is_wrong(
    name: str, plan: Plan, expected: dict[str, int]
) -> None:
    held = held_of({n: d for n, d in expected.items() if n != name})
    assert unequal(plan, expected, held) == [(name, "missing")]
    verdict, why = word(plan, expected, held)
    assert (verdict, f"{name} is missing" in why) == ("wrong-weights", True)


@pytest.mark.parametrize("name", [HEAD, NORM])
def test_a_kept_tensor_that_lives_elsewhere_is_no_fault(
    name: str, plan: Plan, expected: dict[str, int]
) -> None:
    """A tied head is the embedding; it is listed all the same."""
    held = held_of({n: d for n, d in expected.items() if n != name})
    assert unequal(plan, expected, held) == [(name, "missing")]
    assert word(plan, expected, held)[0] == "fp8-ok"


def test_fp8_that_nobody_planned_is_wrong_and_a_buffer_is_not(
    plan: Plan, expected: dict[str, int]
) -> None:
    buffer = {**held_of(expected), "rope.inv_freq": Held("float32", 1, True, (0,))}
    assert unequal(plan, expected, buffer) == [("rope.inv_freq", "unexpected")]
    assert word(plan, expected, buffer)[0] == "fp8-ok"
    codes = {**held_of(expected), "model.extra.weight": Held("float8_e4m3fn", 1, True, (0,))}
    verdict, why = word(plan, expected, codes)
    assert (verdict, "model.extra.weight is unexpected" in why) == ("wrong-weights", True)


def test_copies_that_are_not_alike_are_different(plan: Plan, expected: dict[str, int]) -> None:
    held = held_of(expected)
    held[Q] = replace(held[Q], replicas_agree=False, ranks=(0, 3))
    [line] = [x for x in compare(plan, expected, held) if x.found != "equal"]
    assert (line.name, line.found) == (Q, "different")
    assert "0, 3" in line.detail
    assert word(plan, expected, held)[0] == "wrong-weights"


def test_a_router_in_fp8_is_named_before_anything_else(
    plan: Plan, expected: dict[str, int]
) -> None:
    held = held_of(expected)
    held[ROUTER] = replace(held[ROUTER], dtype="float8_e4m3fn", digest=0)
    held[Q] = replace(held[Q], digest=0)
    verdict, why = word(plan, expected, held)
    assert verdict == "router-quantised"
    assert why.startswith(f"{ROUTER} is float8_e4m3fn, and the plan keeps it: router")


def test_a_head_in_fp8_is_wrong_but_no_router(plan: Plan, expected: dict[str, int]) -> None:
    held = held_of(expected)
    held[HEAD] = replace(held[HEAD], dtype="float8_e4m3fn", digest=0)
    verdict, why = word(plan, expected, held)
    assert verdict == "wrong-weights"
    assert HEAD in why


def test_sixteen_bits_everywhere_is_a_fallback_and_not_just_wrong(
    plan: Plan, expected: dict[str, int]
) -> None:
    held = {n: replace(h, dtype="bfloat16") for n, h in held_of(expected).items() if n != SCALE}
    for tensor in plan.quantized:
        held[tensor.name] = replace(held[tensor.name], digest=0)
    verdict, why = word(plan, expected, held)
    assert verdict == "bf16-fallback"
    assert "bfloat16" in why


def test_sixteen_bits_in_one_place_is_wrong_weights(plan: Plan, expected: dict[str, int]) -> None:
    held = held_of(expected)
    held[Q] = replace(held[Q], dtype="bfloat16", digest=0)
    assert word(plan, expected, held)[0] == "wrong-weights"


def test_a_server_that_holds_nothing_is_not_ok(plan: Plan, expected: dict[str, int]) -> None:
    assert word(plan, expected, {})[0] == "wrong-weights"


@pytest.mark.parametrize(("name", "dtype"), [(Q, "float8_e5m2"), (SCALE, "bfloat16")])
def test_equal_bits_of_another_type_are_different(
    name: str, dtype: str, plan: Plan, expected: dict[str, int]
) -> None:
    held = held_of(expected)
    held[name] = replace(held[name], dtype=dtype)
    assert unequal(plan, expected, held) == [(name, "different")]
    assert word(plan, expected, held)[0] == "wrong-weights"


def test_a_kept_tensor_that_the_engine_cast_decides_nothing(
    plan: Plan, expected: dict[str, int]
) -> None:
    """Engines hold everything in one type; an F32 norm of the checkpoint is not lost by that."""
    held = held_of(expected)
    held[NORM] = replace(held[NORM], dtype="float16", digest=1)
    assert unequal(plan, expected, held) == [(NORM, "cast")]
    assert word(plan, expected, held)[0] == "fp8-ok"


def test_tensors_that_are_there_under_another_name_only_are_not_mapped(
    plan: Plan, expected: dict[str, int]
) -> None:
    """A module that is fused on disk too (Phi-3): q_proj in the worker, qkv_proj in the plan."""

    def seen(held: dict[str, Held]) -> bool:
        return weights.unmapped(compare(plan, expected, held))

    held = held_of(expected)
    assert not seen(held)
    renamed = {n: h for n, h in held.items() if n != Q} | {"other.weight": held[Q]}
    assert seen(renamed)
    assert not seen({n: h for n, h in held.items() if n != Q}), "one that is gone is wrong"
    assert not seen({**held, "other.weight": held[Q]}), "one too many is wrong"
    wrong = {**renamed, SCALE: replace(held[SCALE], digest=0)}
    assert not seen(wrong), "what can be seen to differ is not hidden"
