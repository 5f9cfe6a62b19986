"""Text to tokens and back, and conversations to prompts."""

from longburn.text.chat import ChatPrompt, ChatTemplateError, chat_prompt, render_chat
from longburn.text.harmony import speaks_harmony
from longburn.text.harmony_reply import HarmonyMessage, HarmonyParser
from longburn.text.o200k import harmony_tokenizer
from longburn.text.sources import TokenizerError
from longburn.text.tokenizer import Tokenizer

__all__ = [
    "ChatPrompt",
    "ChatTemplateError",
    "HarmonyMessage",
    "HarmonyParser",
    "Tokenizer",
    "TokenizerError",
    "chat_prompt",
    "harmony_tokenizer",
    "render_chat",
    "speaks_harmony",
]
