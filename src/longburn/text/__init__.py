"""Text to tokens and back, and conversations to prompts."""

from longburn.text.chat import ChatPrompt, ChatTemplateError, chat_prompt, render_chat
from longburn.text.sources import TokenizerError
from longburn.text.tokenizer import Tokenizer

__all__ = ["ChatPrompt", "ChatTemplateError", "Tokenizer", "TokenizerError", "chat_prompt", "render_chat"]
