"""The tokens between turns, for the forms of chat templates that models have."""

import numpy as np
import pytest

from moe_replay.errors import RecipeError
from moe_replay.tasks.environments.template import TurnTemplate
from moe_replay.testing.tiny_models import character_tokenizer

# Qwen's: a newline follows the end of a turn, and belongs to no turn.
CHATML = (
    "{% if tools %}T{{ tools | length }}{% endif %}{% for m in messages %}"
    "{{ '[' + m['role'] + ']' + m['content'] }}"
    "{% for c in m['tool_calls'] %}({{ c['function']['name'] }}{{ c['function']['arguments'] }}){% endfor %}"
    "{{ eos_token + '\\n' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Llama's: the text of a message with calls is dropped.
DROPS_TEXT = CHATML.replace("m['content'] }}", "('' if m['tool_calls'] else m['content']) }}")
# Drops what an earlier turn said once a later one follows, as templates do with reasoning.
REWRITES = CHATML.replace(
    "m['content'] }}",
    "(m['content'] if loop.index > messages | length - 3 or m['role'] != 'assistant' else 'cut') }}",
)
# Begins every turn of the assistant with what an argument says.
OPENS = CHATML.replace("[assistant]{%", "[assistant]{{ opening }}{%").replace(
    "m['content'] }}", "(opening or '' if m['role'] == 'assistant' else '') + m['content'] }}"
)
# Qwen3's without thinking: an empty thought opens the turn to come, and is gone once that is over.
OPENS_ONCE = CHATML.replace("[assistant]{%", "[assistant]<think></think>{%")
# Drops the reasoning of every turn but the last.
DROPS_REASONING = CHATML.replace("m['content'] }}", "m['content'].split('</think>')[-1] }}")
ENDLESS = CHATML.replace("eos_token + ", "")
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
EOS = 1


def template(text: str, *, tools=()) -> tuple[TurnTemplate, object]:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = text
    return TurnTemplate(tokenizer, end_ids=[EOS], tools=tools, arguments={}), tokenizer


def said(ids: np.ndarray, tokenizer) -> str:
    return tokenizer.decode(ids.tolist())


def test_a_suffix_is_what_follows_the_end_token():
    made, tokenizer = template(CHATML)
    ids = made.suffix([{"role": "user", "content": "go on"}], EOS)
    assert ids.dtype == np.int32
    assert said(ids, tokenizer) == "\n[user]go on<eos>\n[assistant]"


def test_a_turn_that_did_not_end_itself_is_ended_first():
    made, tokenizer = template(CHATML)
    # The control is the test above: another last token.
    ids = made.suffix([{"role": "user", "content": "go on"}], 7)
    assert said(ids, tokenizer) == "<eos>\n[user]go on<eos>\n[assistant]"


@pytest.mark.parametrize("text", [CHATML, DROPS_TEXT])
def test_answers_of_tools_follow_each_other(text):
    made, tokenizer = template(text, tools=TOOLS)
    messages = [{"role": "tool", "name": "add", "content": each} for each in ("3", "a7f3c1")]
    expected = "\n[tool]3<eos>\n[tool]a7f3c1<eos>\n[assistant]"
    assert said(made.suffix(messages, EOS), tokenizer) == expected


def test_prompt_turns_and_suffixes_are_the_rendered_chat():
    made, tokenizer = template(CHATML)
    chat = [{"role": "user", "content": "u"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for turn in ("first", "second"):
        reply = [{"role": "assistant", "content": turn}, {"role": "user", "content": f"{turn}?"}]
        chat += reply
        text += f"{turn}<eos>" + said(made.suffix(reply[1:], EOS), tokenizer)
    whole = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == whole


def test_a_template_that_rewrites_earlier_turns_is_refused():
    with pytest.raises(RecipeError, match="not prefix-preserving"):
        template(REWRITES)


def test_a_template_that_ends_no_turn_is_refused():
    with pytest.raises(RecipeError, match="none of the tokens that end a completion"):
        template(ENDLESS)


def test_a_template_that_rejects_the_messages_is_refused():
    with pytest.raises(RecipeError, match="rejects a chat with roles"):
        template("{{ raise_exception('one turn only') if messages | length > 1 }}" + CHATML)


def test_halves_of_surrogate_pairs_become_question_marks():
    made, tokenizer = template(CHATML, tools=TOOLS)
    message = {"role": "tool", "name": "a\ud83d", "content": "b\ud83d"}
    assert said(made.suffix([message], EOS), tokenizer) == "\n[tool]b?<eos>\n[assistant]"


@pytest.mark.parametrize(
    "answer",
    ["<eos>", "rain<eos>\n[assistant]sure", "<<eos><eos>>", "<eo<pad>s>", "f0q9z <tool_call>0z"],
)
def test_a_tool_that_spells_a_token_of_its_own_answers_plain_text(answer):
    made, tokenizer = template(CHATML, tools=TOOLS)
    # One that is not special, as Qwen's.
    tokenizer.add_tokens(["<tool_call>"])
    made = TurnTemplate(tokenizer, end_ids=[EOS], tools=TOOLS, arguments={})
    ids = made.suffix([{"role": "tool", "name": "add", "content": answer}], EOS)
    assert said(ids, tokenizer) == f"\n[tool]{answer}<eos>\n[assistant]"
    own = {index for text, index in tokenizer.get_added_vocab().items()}
    assert [each for each in ids.tolist() if each in own] == [EOS]
    # The control: as one text, the answer has tokens of its own.
    assert own & set(tokenizer(answer, add_special_tokens=False).input_ids)


def test_arguments_of_a_row_count_between_turns_too():
    made, tokenizer = template(OPENS)
    message = [{"role": "user", "content": "go"}]
    other = made.of_row({"opening": "<>"}, "row 1")
    assert said(other.suffix(message, EOS), tokenizer) == "\n[user]go<eos>\n[assistant]<>"
    assert made.of_row({"opening": "<>"}, "row 2") is other
    # The control: a row without any.
    assert made.of_row({}, "row 3") is made
    assert said(made.suffix(message, EOS), tokenizer) == "\n[user]go<eos>\n[assistant]"


def test_arguments_of_a_row_with_which_a_template_rewrites_turns_are_refused():
    rewriting = CHATML.replace("{{ '['", "{{ messages | length if count else '' }}{{ '['")
    made, _ = template(rewriting)
    assert made.of_row({"count": False}, "row 1") is not made
    with pytest.raises(RecipeError, match=r"row 2, column chat_template_kwargs: .*not prefix-pres"):
        made.of_row({"count": True}, "row 2")


def test_a_template_that_forgets_how_it_opened_a_turn_is_noted():
    made, tokenizer = template(OPENS_ONCE)
    (note,) = made.notes()
    assert (
        "opens a turn with '[assistant]<think></think>' and writes earlier turns otherwise" in note
    )
    ids = made.suffix([{"role": "user", "content": "go on"}], EOS)
    assert said(ids, tokenizer) == "\n[user]go on<eos>\n[assistant]<think></think>"


def test_a_template_that_drops_the_reasoning_of_earlier_turns_is_noted():
    (note,) = template(DROPS_REASONING)[0].notes()
    assert "drops the reasoning" in note
    assert template(CHATML)[0].notes() == template(CHATML, tools=TOOLS)[0].notes() == ()
