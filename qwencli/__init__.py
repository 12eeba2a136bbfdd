"""qwencli: run Qwen vision-language models on your own GPU, and explain their speed."""

__version__ = "0.1.0"
