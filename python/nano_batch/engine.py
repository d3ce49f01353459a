"""The engine as Python holds it."""

import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from tqdm import tqdm

from nano_batch import _native
from nano_batch.checks import check_choice, check_flag, check_integer, check_number
from nano_batch.cuda_libraries import map_cuda_libraries
from nano_batch.exceptions import InvalidRequestError, ModelLoadError, NanoBatchError
from nano_batch.outputs import CompletionOutput, EngineStats, RequestMetrics, RequestOutput
from nano_batch.sampling_params import SamplingParams

EMBEDDED_MODEL = Path(__file__).parent / "models" / "austen"

Prompt: TypeAlias = str | Sequence[int] | np.ndarray | Mapping[str, Any]
_T = TypeVar("_T")


class Engine:
    """Serves a model: many requests at once, each with its own stream of tokens.

    A context manager; leaving it closes the engine. Its methods may be called from any thread.

    Args:
        model: A directory in Hugging Face's form, a hub id, or None for the embedded model.
        device: "cpu", "cuda", "cuda:1" and so on, or "auto": the first GPU if it can run the model
            as asked, else the CPU. A GPU with too little free memory is an error then too: the CPU
            instead would be many times slower without a word.
        dtype: "float32", "bfloat16" or "auto": the checkpoint's, bfloat16 for float16 or on a GPU.
        max_model_len: Tokens of prompt and output together; None is the config's limit, lowered
            to what the KV cache can hold.
        gpu_memory_utilization: Share of a GPU's memory that may be in use, with the KV cache
            taking what the rest leaves. Means nothing on the CPU.
        max_num_seqs: Sequences that run at the same time.
        max_num_batched_tokens: Tokens of one step; a longer prompt runs in chunks. None is 8192 on
            a GPU and 2048 on the CPU, where a larger step is no faster and takes more memory.
        block_size: Tokens of a KV cache block; on a GPU 16 only.
        num_blocks: Blocks of the KV cache. None derives it from `kv_cache_gib` or free memory: on
            the CPU half of what the weights leave, also of a container's limit; nowhere more
            than `max_num_seqs` sequences of `max_model_len` can use. On the CPU a block takes
            memory when it is first written.
        kv_cache_gib: Size of the KV cache in GiB, if `num_blocks` is None.
        num_threads: Threads of a CPU step, at most 1024; None is one per core. Means nothing on
            a GPU.
        deterministic: Whether a request's tokens are exactly the same in any batch: on a GPU at
            the cost of speed, on the CPU always.
        enable_prefix_caching, quantization, tensor_parallel_size: Not supported yet beyond their
            defaults.
        max_itl_ms: The time between two tokens of a running stream to aim at when prompts join:
            a step that also decodes takes only so many tokens of them. None gives them the whole
            step. Where chunks end then depends on time, and on a GPU without `deterministic` so
            may the last bits of logits. From 0.001 to 1,000,000.
        seed: What the seeds of unseeded requests derive from.
        load_format: "auto", or "dummy" for random weights of the config's shapes.
        revision: The hub's branch, tag or commit, for a hub id.

    Raises:
        ModelLoadError: The directory does not hold a model that can be run; the message says why.
        InvalidRequestError: An option is out of range or not supported yet.

    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_cache_gib: float | None = None,
        num_threads: int | None = None,
        enable_prefix_caching: bool = False,
        quantization: str | None = None,
        tensor_parallel_size: int = 1,
        max_itl_ms: float | None = None,
        deterministic: bool = False,
        seed: int = 0,
        revision: str | None = None,
        load_format: str = "auto",
    ) -> None:
        """Load the model and start serving."""
        code = "invalid_config"
        check_choice("load_format", load_format, ("auto", "dummy"), code)
        check_choice("dtype", dtype, ("auto", "float32", "bfloat16"), code)
        check_flag("deterministic", deterministic)
        if not isinstance(device, str):
            raise TypeError(f"device must be a string, got {device!r}")
        neutral = {
            "enable_prefix_caching": (enable_prefix_caching, False),
            "quantization": (quantization, None),
            "tensor_parallel_size": (tensor_parallel_size, 1),
        }
        for name, (value, only) in neutral.items():
            if value != only:
                message = f"{name} is not supported yet beyond {only!r}, got {value!r}"
                raise InvalidRequestError(message, "unsupported_parameter")
        counts = {
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "block_size": block_size,
            "num_blocks": num_blocks,
            "num_threads": num_threads,
        }
        for name, count in counts.items():
            if count is not None:
                most = 1024 if name == "num_threads" else 2**32 - 1
                check_integer(name, count, 1, most, code)
        check_integer("seed", seed, -(2**63), 2**63 - 1, code)
        if not 0 < check_number("gpu_memory_utilization", gpu_memory_utilization) <= 1:
            message = (
                "gpu_memory_utilization must be above 0 and at most 1, "
                f"got {gpu_memory_utilization}"
            )
            raise InvalidRequestError(message, code)
        if kv_cache_gib is not None:
            if not 0 < check_number("kv_cache_gib", kv_cache_gib) < 2**20:
                message = f"kv_cache_gib must be above 0 and below {2**20}, got {kv_cache_gib}"
                raise InvalidRequestError(message, code)
            if num_blocks is not None:
                message = (
                    f"kv_cache_gib {kv_cache_gib} and num_blocks {num_blocks} exclude each other"
                )
                raise InvalidRequestError(message, code)
        if max_itl_ms is not None and not 1e-3 <= check_number("max_itl_ms", max_itl_ms) <= 1e6:
            message = f"max_itl_ms must be in [0.001, 1000000], got {max_itl_ms}"
            raise InvalidRequestError(message, code)
        self.model_dir = _find_model(model, revision)
        if device != "cpu":
            map_cuda_libraries()
        self._native = _native.Engine(
            self.model_dir,
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            num_blocks=num_blocks,
            kv_cache_bytes=None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
            num_threads=num_threads,
            max_itl_ns=None if max_itl_ms is None else int(max_itl_ms * 1e6),
            deterministic=deterministic,
            seed=seed,
            dummy_weights=load_format == "dummy",
        )
        # Threads must end before the interpreter does, also when nobody calls close().
        self._close = weakref.finalize(self, self._native.close)

    def generate(
        self,
        prompts: Prompt | Sequence[object],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Run prompts together and return their answers in the order of the prompts.

        Args:
            prompts: A text, token ids (a list or an array), `{"prompt": text}`,
                `{"prompt_token_ids": ids}`, or a list of these.
            sampling_params: For all prompts, or one each; None takes the model's defaults.
            use_tqdm: Whether to show progress, if stderr is a terminal.

        Raises:
            InvalidRequestError: A prompt or parameter does not hold.
            TypeError: `sampling_params` is of another type.

        Whatever is raised, Ctrl-C included, aborts all of its requests.

        """
        many = _prompts(prompts)
        params: list[SamplingParams | None]
        if isinstance(sampling_params, Sequence):
            params = list(sampling_params)
        else:
            params = [sampling_params] * len(many)
        if len(params) != len(many):
            message = f"{len(params)} sampling_params were given for {len(many)} prompts"
            raise InvalidRequestError(message, "invalid_sampling_params")
        streams = []
        outputs = []
        num_tokens = 0
        bar: Any = nullcontext()
        if use_tqdm and sys.stderr is not None and sys.stderr.isatty():
            # It imports more, where Python can lose a Ctrl-C, and has locks, which a fork may find
            # held: not beside a request, and not where nobody sees it.
            bar = tqdm(total=len(many), desc="prompts", unit="prompt")
        try:
            with bar:
                for pair in zip(many, params, strict=True):
                    streams.append(self.stream(*pair))
                for stream in streams:
                    output = stream.collect()
                    num_tokens += len(output.outputs[0].token_ids)
                    outputs.append(output)
                    if isinstance(bar, tqdm):
                        bar.update()
                        speed = num_tokens / max(bar.format_dict["elapsed"], 1e-9)
                        bar.set_postfix_str(f"{speed:.1f} tok/s", refresh=False)
        except BaseException as error:
            if len(many) > 1 and isinstance(error, Exception):
                index = len(streams) if len(streams) < len(many) else len(outputs)
                error.add_note(f"prompts[{index}]")
            # The exception's traceback keeps the streams for as long as somebody keeps it.
            for stream in streams:
                stream._native.abort()
            raise
        return outputs

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> "RequestStream":
        """Run one prompt and iterate over what is new; dropping the iterator aborts the request.

        Raises:
            InvalidRequestError: The prompt or a parameter does not hold.
            TypeError: `sampling_params` is of another type.

        """
        text_or_ids = _plain_prompt(prompt)
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        elif not isinstance(sampling_params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, got {sampling_params!r}")
        native = self._native.submit(text_or_ids, sampling_params)
        try:
            text = text_or_ids if isinstance(text_or_ids, str) else None
            return RequestStream(self, native, text)
        except BaseException:
            native.abort()
            raise

    def logits(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the logits at every position: float32 `[num_tokens, vocab_size]`.

        They come through the same cache and batches as generation, for parity and perplexity.

        Raises:
            InvalidRequestError: The token ids do not hold, or twice their logits are more than the
                free memory of the host.

        """
        native = self._native.submit_logits(_plain_token_ids(token_ids))
        try:
            flat = np.frombuffer(memoryview(native.collect_logits()), dtype=np.float32)
        except BaseException:
            native.abort()
            raise
        return flat.reshape(-1, self._native.vocab_size)

    def abort(self, request_id: str) -> None:
        """End a request; its stream finishes with "abort". One that has ended is left alone.

        Raises:
            InvalidRequestError: No request has had this id.
            EngineClosedError: The engine was closed.

        """
        self._native.abort(request_id)

    def stats(self) -> EngineStats:
        """Return the load after the last step.

        Raises:
            EngineClosedError: The engine was closed.

        """
        running, waiting, free, preemptions = self._native.stats()
        return EngineStats(running, waiting, free, self._native.num_blocks, preemptions)

    def get_default_sampling_params(self, **unsaid: Any) -> SamplingParams:
        """Return what requests without parameters get: the model's `generation_config.json`.

        Args:
            unsaid: Defaults in place of `SamplingParams`'s own where the file says nothing.

        Raises:
            InvalidRequestError: A default is out of range or not supported yet.
            TypeError: A default is of another type, or a name is unknown.

        """
        return SamplingParams(**{**unsaid, **self._native.default_sampling_params()})

    def get_tokenizer(self) -> _native.Tokenizer:
        """Return the model's tokenizer.

        Raises:
            InvalidRequestError: The model has none.

        """
        return self._native.tokenizer()

    @property
    def device(self) -> str:
        """What the model runs on: "cpu", or the GPU's name."""
        return self._native.device

    @property
    def weight_bytes(self) -> int:
        """Bytes that the parameters take in memory."""
        return self._native.weight_bytes

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together."""
        return self._native.max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._native.vocab_size

    def close(self) -> None:
        """End every request at once, stop the threads and give the memory back.

        It waits up to two seconds for the step that runs, which on the CPU ends with its layer or
        with its logits. One that takes longer is left to itself: its threads and memory go when it
        ends. Handlers of the log get two seconds for each record as well.
        """
        self._native.close()
        self._close.detach()

    def __enter__(self) -> "Engine":
        """Return the engine."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the engine."""
        self.close()

    def __repr__(self) -> str:
        """Name the model and its limits."""
        native = self._native
        return (
            f"Engine({str(self.model_dir)!r}, dtype={native.dtype!r}, "
            f"max_model_len={native.max_model_len}, num_blocks={native.num_blocks}, "
            f"block_size={native.block_size})"
        )


class RequestStream(Iterator[RequestOutput]):
    """The answer to one prompt: an iterator over what is new since the last item.

    It holds its engine, and lets go of it with the last item or an error: if nobody else holds it,
    these come when the engine is closed.
    """

    def __init__(self, engine: Engine, native: _native.RequestStream, prompt: str | None) -> None:
        """Wrap a submitted request."""
        # An engine that nobody holds is closed: not before the last item.
        self._engine: Engine | None = engine
        self._native = native
        self._prompt = prompt
        self.request_id = native.request_id
        self.prompt_token_ids = native.prompt_token_ids

    def __next__(self) -> RequestOutput:
        """Wait for news; the GIL is free meanwhile and Ctrl-C works."""
        delta = self._read(self._native.next)
        if delta is None:
            raise StopIteration
        return self._output(delta)

    def collect(self) -> RequestOutput:
        """Wait for the end and return all that was not taken yet as one output.

        An exception while it waits, as of Ctrl-C, takes nothing: the next call has it all.
        """
        return self._output(self._read(self._native.collect))

    def _read(self, read: Callable[[], _T]) -> _T:
        try:
            return read()
        except NanoBatchError:
            self._engine = None
            raise

    def _output(self, delta: "_native._Delta") -> RequestOutput:
        token_ids, text, finish_reason, stop_reason, first_token_s, last_token_s = delta
        if finish_reason is not None:
            self._engine = None
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[CompletionOutput(0, text, token_ids, finish_reason, stop_reason)],
            finished=finish_reason is not None,
            metrics=RequestMetrics(first_token_s, last_token_s),
        )


def _find_model(model: str | os.PathLike[str] | None, revision: str | None) -> Path:
    """Return the directory of a model, downloading a hub id first."""
    if model is not None and not os.fspath(model):
        raise ModelLoadError("model is an empty string, not a directory or hub id", "model_missing")
    path = EMBEDDED_MODEL if model is None else Path(model)
    if revision is not None and (model is None or path.exists()):
        message = f"revision {revision!r} is for hub ids, but {str(path)!r} is a directory"
        raise InvalidRequestError(message, "invalid_config")
    if (
        model is None
        or path.exists()
        or path.is_absolute()
        or not _looks_like_hub_id(os.fspath(model))
    ):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        message = (
            f"{os.fspath(model)!r} is no directory; to download it as a hub id, "
            "pip install huggingface_hub"
        )
        raise ModelLoadError(message, "model_missing") from None
    try:
        found = snapshot_download(
            str(model),
            revision=revision,
            allow_patterns=["*.json", "*.safetensors"],
            # The same weights once more, under Mistral's own names.
            ignore_patterns=["consolidated*"],
        )
        return Path(found)
    except Exception as error:
        message = f"{os.fspath(model)!r} is no directory and the hub did not give it: {error}"
        raise ModelLoadError(message, "model_missing") from error


def _looks_like_hub_id(model: str) -> bool:
    return model.count("/") <= 1 and not model.startswith((".", "~"))


def _prompts(prompts: Any) -> list[Any]:
    """Return one or many prompts as a list."""
    num_dimensions = getattr(prompts, "ndim", None)
    if isinstance(prompts, str | Mapping) or num_dimensions == 1:
        return [prompts]
    # A set has no order for the answers to keep.
    if not isinstance(prompts, Iterable) or isinstance(prompts, Set) or num_dimensions == 0:
        message = f"prompts are a text, token ids, a dict or a list of these, got {prompts!r}"
        raise InvalidRequestError(message, "invalid_prompt")
    many = list(prompts)
    return [prompts] if many and isinstance(many[0], int | np.integer) else many


def _plain_prompt(prompt: Prompt) -> str | list[int]:
    if isinstance(prompt, Mapping):
        keys = set(prompt)
        if keys == {"prompt"}:
            text = prompt["prompt"]
            if isinstance(text, str):
                return text
            message = f"prompt in a prompt dict must be a text, got {type(text).__name__}"
            raise InvalidRequestError(message, "invalid_prompt")
        if keys == {"prompt_token_ids"}:
            return _plain_token_ids(prompt["prompt_token_ids"])
        names = sorted(map(str, keys))
        message = f"a prompt dict has the one key prompt or prompt_token_ids, got {names}"
        raise InvalidRequestError(message, "invalid_prompt")
    return prompt if isinstance(prompt, str) else _plain_token_ids(prompt)


def _plain_token_ids(token_ids: Any) -> list[int]:
    ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
    if not isinstance(ids, list | tuple):
        message = f"a prompt is a text or token ids, got {type(token_ids).__name__}"
        raise InvalidRequestError(message, "invalid_prompt")
    for position, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            message = f"prompt token at position {position} must be an integer, got {token!r}"
            raise InvalidRequestError(message, "invalid_prompt")
        if not -(2**63) <= token < 2**63:
            message = f"prompt token {token} at position {position} is outside the vocabulary"
            raise InvalidRequestError(message, "token_outside_vocabulary")
    return [int(token) for token in ids]
