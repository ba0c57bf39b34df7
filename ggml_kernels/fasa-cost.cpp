// From which depth on sparse attention is the faster on a GPU. A model of two lines: what a layer takes besides, and what it reads
// at a share of the bandwidth that the data sheet of the memory gives. Fitted to the decoding of whole models, where the
// launches around a layer count, too; tests/test_cost.py holds it to figures of GPUs, docs/performance.md has those.

#include "ggml-fasa.h"

#include <algorithm>
#include <cmath>

static constexpr float DENSE_US  = 18.0f; // flash attention and the launch that adds up its parts
static constexpr float SPARSE_US = 32.0f; // what blocks of threads wait for: one another, and the first bytes from memory
static constexpr float CELL_US   = 6.7e-4f; // what flash attention computes for a cell, however short its rows are

// shares of the bandwidth
static constexpr float DENSE_SHARE = 0.93f; // rows of K and V one after the other
static constexpr float TIPS_SHARE  = 0.27f; // scored in between
static constexpr float ROWS_SHARE  = 0.5f;  // rows here and there

static float us_to_read(float n_bytes, float bandwidth) {
    return n_bytes/(bandwidth*1e3f); // GB/s are kB/us
}

float ggml_fasa_us_dense(float bandwidth, size_t row_bytes, int64_t n_kv) {
    return DENSE_US + n_kv*CELL_US + us_to_read((float) n_kv*row_bytes, bandwidth*DENSE_SHARE);
}

float ggml_fasa_us_sparse(float bandwidth, size_t row_bytes, size_t tip_bytes, int64_t n_kv, int64_t n_fac) {
    return SPARSE_US + us_to_read((float) n_kv*tip_bytes, bandwidth*TIPS_SHARE) + us_to_read((float) n_fac*row_bytes, bandwidth*ROWS_SHARE);
}

int64_t ggml_fasa_min_cells(float bandwidth, size_t row_bytes, size_t tip_bytes, int64_t n_fac) {
    if (!(bandwidth > 0.0f)) {
        return 0;
    }
    const float by_cell = CELL_US + us_to_read(row_bytes, bandwidth*DENSE_SHARE) - us_to_read(tip_bytes, bandwidth*TIPS_SHARE);
    const float at_once = ggml_fasa_us_sparse(bandwidth, row_bytes, tip_bytes, 0, n_fac) - ggml_fasa_us_dense(bandwidth, row_bytes, 0);
    return by_cell > 0.0f ? (int64_t) std::min(std::ceil(at_once/by_cell), (float) INT32_MAX) : INT32_MAX;
}
