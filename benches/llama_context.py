"""llama.cpp through the low-level calls of its package: many sequences, one batch a step."""

import ctypes

import llama_cpp
import numpy as np

# llama.cpp keeps the address alone.
_SILENT = llama_cpp.llama_log_callback(lambda *_: None)


def load(path):
    """A model whose weights are mapped from the file."""
    llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    assert model, f"llama.cpp does not load {path}"
    return model


class Context:
    """`num_seqs` sequences of up to `max_len` tokens that advance together."""

    def __init__(self, model, num_seqs, max_len, num_threads):
        params = llama_cpp.llama_context_default_params()
        # A sequence's share of the cells is rounded to 256 by llama.cpp itself.
        params.n_ctx = params.n_batch = num_seqs * max_len
        params.n_seq_max = num_seqs
        params.n_threads = params.n_threads_batch = num_threads
        # The fastest of four at 16 sequences: 158 tok/s, 152 with cells shared by all sequences,
        # 144 without flash attention, 129 with neither (one thread, busy machine).
        params.kv_unified = False
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama_cpp.llama_init_from_model(model, params)
        assert self._context, f"llama.cpp makes no context of {num_seqs} sequences"
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._num_seqs = num_seqs

    def logits(self, prompts):
        """Logits behind the last token of each prompt, all prompts in one batch."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        (length,) = {len(prompt) for prompt in prompts}
        batch = _Batch(len(prompts), length)
        batch.token[:] = np.ravel(prompts)
        batch.pos[:] = np.tile(np.arange(length), len(prompts))
        return self._decode(batch)

    def greedy(self, prompts, num_tokens):
        """The likeliest tokens behind each prompt, `[num_tokens, num_prompts]`."""
        tokens = [self.logits(prompts).argmax(axis=1)]
        batch = _Batch(len(prompts), 1)
        for position in range(len(prompts[0]), len(prompts[0]) + num_tokens - 1):
            batch.token[:], batch.pos[:] = tokens[-1], position
            tokens.append(self._decode(batch).argmax(axis=1))
        return [step.tolist() for step in tokens]

    def _decode(self, batch):
        status = llama_cpp.llama_decode(self._context, batch.native)
        assert status == 0, f"llama_decode says {status}"
        rows = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(rows, (batch.num_seqs, self._vocab_size))


class _Batch:
    """`length` tokens of each of `num_seqs` sequences; the logits behind each last one are kept."""

    def __init__(self, num_seqs, length):
        size = num_seqs * length
        self.num_seqs = num_seqs
        self.native = llama_cpp.llama_batch_init(size, 0, 1)
        self.native.n_tokens = size
        self.token = np.ctypeslib.as_array(self.native.token, (size,))
        self.pos = np.ctypeslib.as_array(self.native.pos, (size,))
        for index in range(size):
            self.native.n_seq_id[index] = 1
            self.native.seq_id[index][0] = index // length
            self.native.logits[index] = (index + 1) % length == 0

    def __del__(self):
        llama_cpp.llama_batch_free(self.native)
