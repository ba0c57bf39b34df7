#pragma once

#include <cstdint>

struct ggml_tensor;

// how a graph turns the keys of a layer
struct llama_fasa_rope {
    int64_t n_dim = 0; // of what RoPE was applied to, 0: it was not

    int32_t op_params[16] = {}; // of GGML_OP_ROPE

    const ggml_tensor * factors = nullptr; // of the frequencies, a weight of the model; nullptr: none
};

// k_cur: keys of a graph under construction, as they enter build_attn. Some architectures leave RoPE out in some of
// their layers, or take other factors there, which nothing but the graph tells
llama_fasa_rope llama_fasa_find_rope(const ggml_tensor * k_cur);
