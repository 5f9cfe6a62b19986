"""What the text encoder of ACE-Step 1.5 reads, in the released pipeline's words: the models were trained on them."""

from dataclasses import dataclass

UNKNOWN = "N/A"
INSTRUCTIONS = {
    "text2music": "Fill the audio semantic mask based on the given conditions:",
    "repaint": "Repaint the mask area based on the given conditions:",
    "cover": "Generate audio semantic tokens based on the given conditions:",
    "extract": "Extract the track from the audio:",
    "lego": "Generate the track based on the audio context:",
    "complete": "Complete the input track:",
}


@dataclass(frozen=True)
class Metadata:
    """What is known of a piece.

    Args:
        duration: seconds; whole ones are told.
        bpm: beats a minute.
        keyscale: such as "C major".
        timesignature: beats of a bar, such as "4".
    """

    duration: float
    bpm: int | None = None
    keyscale: str | None = None
    timesignature: str | None = None

    def text(self) -> str:
        """One line a field; what is not known is "N/A"."""
        lines = {
            "bpm": self.bpm or UNKNOWN,
            "timesignature": (self.timesignature or "").strip() or UNKNOWN,
            "keyscale": (self.keyscale or "").strip() or UNKNOWN,
            "duration": f"{int(self.duration)} seconds",
        }
        return "".join(f"- {name}: {value}\n" for name, value in lines.items())


def instruction(task: str, track: str | None = None) -> str:
    """What the model is told to do.

    Args:
        task: text2music, repaint, cover, extract, lego or complete.
        track: for the last three, the track (or tracks, separated by " | ") that it is about.

    Raises:
        ValueError: another task.
    """
    if task not in INSTRUCTIONS:
        raise ValueError(f"ACE-Step: task {task!r}, wanted one of {', '.join(INSTRUCTIONS)}")
    if not track:
        return INSTRUCTIONS[task]
    named = {
        "extract": f"Extract the {track.upper()} track from the audio:",
        "lego": f"Generate the {track.upper()} track based on the audio context:",
        "complete": f"Complete the input track with {track.upper()}:",
    }
    return named.get(task, INSTRUCTIONS[task])


def caption_text(caption: str, metadata: Metadata, *, task: str = "text2music", track: str | None = None) -> str:
    """Of the caption and what is known of the piece."""
    told = f"# Instruction\n{instruction(task, track)}\n\n# Caption\n{caption}\n\n"
    return f"{told}# Metas\n{metadata.text()}<|endoftext|>\n"


def lyrics_text(lyrics: str, language: str) -> str:
    """Of the lyrics, in a language named by its code ("en")."""
    return f"# Languages\n{language}\n\n# Lyric\n{lyrics}<|endoftext|>"
