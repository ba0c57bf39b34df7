#pragma once

#include "ggml.h"

// Attention weights, which flash attention does not give: unfused, for evaluation.

// the softmax over all visible cells: F32 [n_kv, n_tokens, n_head, n_stream]
//   q:    F32 [n_embd_head, n_head,    n_tokens, n_stream]
//   k:        [n_embd_head, n_head_kv, n_kv,     n_stream]
//   mask: F16 [n_kv, n_tokens, 1, n_stream]
//   scale, softcap: as in ggml_flash_attn_ext
ggml_tensor * llama_fasa_weights(
        ggml_context * ctx,
        ggml_tensor  * q,
        ggml_tensor  * k,
        ggml_tensor  * mask,
        float          scale,
        float          softcap);

// attention-mass recall: the weight of the listed cells together, on the CPU: F32 [n_head, n_tokens, n_stream]
//   weights: F32 [n_kv, n_tokens, n_head, n_stream]
//   idx:     I32 [n_list, n_head_sel, n_tokens, n_stream]
ggml_tensor * llama_fasa_mass(
        ggml_context * ctx,
        ggml_tensor  * weights,
        ggml_tensor  * idx);
