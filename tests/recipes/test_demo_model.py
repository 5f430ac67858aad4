"""The shipped demo model is what its card says, and its script trains on what the demo asks."""

import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).parents[2] / "recipes" / "demo"
NUM_ITEMS = 128
# Seeds that neither the warm start, nor the demo, nor the card's figures use.
FRESH_SEED = 950_000_000


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("demo_make_model", DEMO / "make_model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "model")


@pytest.fixture
def model():
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    return model


def accuracy(script, model, tokenizer, *, greedy):
    """Fraction of fresh items that reasoning-gym scores 1.0."""
    items = script.items_for("held_out", NUM_ITEMS, seed=FRESH_SEED)
    completions = script.complete(model, tokenizer, items, greedy=greedy, seed=0)
    scores = [
        script.score(item, tokenizer.decode(completion, skip_special_tokens=True))
        for item, completion in zip(items, completions, strict=True)
    ]
    return scores.count(1.0) / NUM_ITEMS


def test_model_has_a_router_in_each_of_six_layers(model):
    routers = [layer.mlp.gate for layer in model.model.layers]
    assert [(router.num_experts, router.top_k) for router in routers] == [(32, 4)] * 6


def test_model_files_stay_under_ten_megabytes():
    sizes = {path.name: path.stat().st_size for path in (DEMO / "model").iterdir()}
    assert 1_000_000 < sizes["model.safetensors"] < sum(sizes.values()) < 10_000_000


def test_model_is_sometimes_right_on_fresh_items(script, model, tokenizer):
    # The card's figure is between 25 and 50 %; 128 items have a standard error of about 4 %.
    assert 0.15 < accuracy(script, model, tokenizer, greedy=False) < 0.6


def test_accuracy_is_lost_with_the_experts(script, model, tokenizer):
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.zero_()
    assert accuracy(script, model, tokenizer, greedy=True) < 0.05


def test_model_has_something_to_gain_in_most_groups(script, model, tokenizer):
    items = script.items_for("held_out", 24, seed=FRESH_SEED)
    repeated = [item for item in items for _ in range(8)]
    texts = tokenizer.batch_decode(
        list(script.complete(model, tokenizer, repeated, greedy=False, seed=1)),
        skip_special_tokens=True,
    )
    scores = [script.score(item, text) for item, text in zip(repeated, texts, strict=True)]
    groups = [scores[start : start + 8] for start in range(0, len(scores), 8)]
    assert sum(len(set(group)) > 1 for group in groups) >= len(groups) / 2


@given(st.text(st.characters(max_codepoint=127)))
def test_tokenizer_gives_ascii_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_tokenizer_gives_any_text_back(tokenizer):
    text = "naïve → 漢字\t\x00 State the final answer to the following arithmetic problem: 12 + 3 ="
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_is_the_one_that_the_script_builds(script, tokenizer):
    built = script.build_tokenizer()
    assert (tokenizer.get_vocab(), tokenizer.chat_template) == (
        built.get_vocab(),
        built.chat_template,
    )


def test_prompt_is_the_question_between_two_role_tokens(script, tokenizer):
    question = "State the final answer to the following arithmetic problem: 8 + 0 - 7 ="
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("<user>", script.PIECES[0], "8", " + ", "0", " - ", "7", " =", "<assistant>"),
    ]


def test_chat_template_refuses_a_role_that_was_never_trained(tokenizer):
    with pytest.raises(Exception, match="roles are user and assistant, got system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}])


def test_supervised_labels_are_the_completion_and_its_end(script, tokenizer):
    items = script.items_for("warm_start", 2)
    lessons = [(items[0], "8,15<answer>3</answer>"), (items[1], "<answer>-21</answer>")]
    labels = script.supervised_batch(tokenizer, lessons)["labels"]
    assert [tokenizer.decode(row[row != -100].tolist()) for row in labels] == [
        *("8,15<answer>3</answer><eos>", "<answer>-21</answer><eos>"),
    ]


def test_lessons_are_worked_first_and_of_both_ways_at_the_end(script):
    items = script.items_for("warm_start", 400)
    terse = [text.startswith("<answer>") for _, text in script.lessons_of(items, seed=0)]
    assert (sum(terse[:340]), 0.45 < sum(terse[340:]) / 60 < 0.75) == (0, True)


def test_worked_completion_shows_the_running_totals(script):
    item = {"metadata": {"expression": "8 + 0 + 7 - 3 - 0"}, "answer": "12"}
    assert script.worked_completion(item) == "8,15,12<answer>12</answer>"


def test_reward_is_reasoning_gyms_own(script):
    item = script.items_for("held_out", 1, seed=FRESH_SEED)[0]
    right = script.worked_completion(item)
    wrong = right.replace("<answer>", "<answer>9")
    untagged = item["answer"]
    assert [script.score(item, text) == 1.0 for text in (right, wrong, untagged)] == [
        *(True, False, False),
    ]


def test_item_seeds_of_the_purposes_never_meet(script):
    starts = sorted(script.ITEM_SEEDS.values())
    apart = min(later - first for first, later in pairwise(starts))
    assert apart > 1000 * script.STEPS * script.BATCH_SIZE


def test_task_file_states_what_the_script_trains_on(script):
    task = json.loads((DEMO / "model" / "task.json").read_text())
    assert (task["family"], task["config"]) == (script.FAMILY, script.TASK)


def test_script_writes_nothing_when_accuracy_is_not_the_wanted_one(script, tmp_path, capsys):
    output = tmp_path / "model"
    status = script.main(["--output", str(output), "--steps", "1", "--num-items", "16"])
    assert (status, output.exists()) == (1, False)
    assert "wanted 25% to 50%: nothing was written" in capsys.readouterr().err


def test_script_refuses_a_file_as_output(script, tmp_path, capsys):
    path = tmp_path / "model"
    path.write_text("")
    with pytest.raises(SystemExit):
        script.main(["--output", str(path)])
    assert "must be a directory" in capsys.readouterr().err
