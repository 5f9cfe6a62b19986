"""The texts of ACE-Step 1.5's text encoder against diffusers' pipeline."""

import pytest
from diffusers import AceStepPipeline

from longburn.models.ace_step.v15.prompts import INSTRUCTIONS, Metadata, caption_text, instruction, lyrics_text


@pytest.mark.parametrize("task", INSTRUCTIONS)
@pytest.mark.parametrize("track", [None, "vocals"])
def test_instructions(task: str, track: str | None) -> None:
    classes = [track] if track else None
    assert instruction(task, track) == AceStepPipeline._get_task_instruction(task, track, classes)


@pytest.mark.parametrize(
    "known", [{}, {"bpm": 120, "keyscale": "F# minor", "timesignature": "3"}, {"keyscale": " ", "timesignature": ""}]
)
def test_texts(known: dict[str, object]) -> None:
    theirs = AceStepPipeline._format_prompt(
        AceStepPipeline, "a slow waltz", "[verse]\nla la", "de", 61.7, instruction("cover"), **known
    )
    metadata = Metadata(61.7, **known)
    assert caption_text("a slow waltz", metadata, task="cover") == theirs[0]
    assert lyrics_text("[verse]\nla la", "de") == theirs[1]


def test_another_task() -> None:
    with pytest.raises(ValueError, match="task 'remix', wanted one of text2music"):
        caption_text("x", Metadata(10), task="remix")
