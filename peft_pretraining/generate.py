"""Go on with a text: `python -m peft_pretraining.generate checkpoints/my_run "Once upon a time"`.

The model is a checkpoint, a run's folder (its newest good checkpoint), an export, or any folder or hub name of a causal
language model. Without a text, each line on stdin is one. What is printed is the text and how the model goes on, up to
the end of the document or --max_new_tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_pretraining.flags import ConfigError, completion, exit_with_problems, positive_float, positive_int

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEVICES = ("auto", "cpu", "cuda")


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line's."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="a checkpoint's folder, a run's, an export's, or a hub name")
    parser.add_argument("text", nargs="*", help="what to go on with (default: the lines on stdin)")
    parser.add_argument("--max_new_tokens", type=_of(positive_int), default=100, metavar="N", help="(default: 100)")
    parser.add_argument("--greedy", action="store_true", help="always the most probable token, instead of drawing")
    parser.add_argument("--temperature", type=_of(positive_float), default=0.8, metavar="T", help="(default: 0.8)")
    parser.add_argument("--top_p", type=_of(_share), default=0.95, metavar="P", help="(default: 0.95)")
    parser.add_argument("--seed", type=int, default=42, help="of the random numbers (default: 42)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(default: cuda where there is one)")
    return parser


def _of(convert: Any) -> Any:
    """A flag's converter as argparse takes it: with the reason in the message."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}, got {text!r}") from None

    return converted


def _share(text: str) -> float:
    value = float(positive_float(text))
    if value > 1:
        raise ValueError("must be at most 1")
    return value


def main(argv: Sequence[str] | None = None, prog: str = "python -m peft_pretraining.generate") -> int:
    command = parser(prog)
    completion.offer(command)
    arguments = command.parse_args(argv)
    try:
        texts = arguments.text or [line.rstrip("\n") for line in sys.stdin if line.strip()]
        model, tokenizer = load(arguments.checkpoint, arguments.device)
        sampling: dict[str, Any] = {"do_sample": not arguments.greedy}
        if not arguments.greedy:
            sampling |= {"temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
        for text in texts:
            print(generate(model, tokenizer, text, arguments.max_new_tokens, arguments.seed, **sampling), flush=True)
    except ConfigError as error:
        return exit_with_problems(error)
    return 0


def load(name: str, device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model, in evaluation, and its tokenizer, from a folder or a hub name. Raises `ConfigError`."""
    from peft_pretraining.export import newest

    path, is_adapter = Path(name), False
    if path.is_dir():
        found, skipped = newest(path)
        if found is None:
            raise ConfigError(skipped)
        name = str(found)
        is_adapter = (found / "adapter_config.json").is_file()
        if is_adapter and importlib.util.find_spec("peft") is None:
            raise ConfigError([f"{name} is an adapter, and peft is not installed: pip install peft"])

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from peft_pretraining.models.loading import load_pretrained

    disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["--device cuda: torch finds no CUDA device that it can use"])
    if not is_adapter:
        model = load_pretrained(AutoModelForCausalLM, name, f"the model of {name}", dtype="auto")
    what = "the model"
    try:
        if is_adapter:  # PEFT's to read, over its base
            model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", trust_remote_code=False)
        what = "the tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer("a", add_special_tokens=False)
    except Exception as error:  # files can be broken in any way, each with an exception of its own
        raise ConfigError([f"{what} of {name} cannot be loaded: {' '.join(str(error).split())[:300]}"]) from error
    model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides that it is a method
    return model.eval(), tokenizer


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, max_new_tokens: int, seed: int, **how: Any
) -> str:
    """The text and how the model goes on with it, special tokens left out. `how` is for transformers' `generate`.

    An empty text stands for a document's beginning, which in training follows the end of another one.
    """
    import torch

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        start = model.generation_config.bos_token_id
        ends = model.generation_config.eos_token_id if start is None else start
        ids = [ends[0] if isinstance(ends, list) else 0 if ends is None else ends]
    prompt = torch.tensor([ids], device=model.device)
    padding = model.generation_config.pad_token_id
    torch.manual_seed(seed)
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]  # from a mixin that says nothing of its type
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            pad_token_id=0 if padding is None else padding,
            **how,
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    sys.exit(main())
