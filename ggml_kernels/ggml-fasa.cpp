#include "ggml-fasa.h"

#include "fasa-tips.h"
#include "ggml-impl.h"

#if defined(__linux__)
#    include <sys/mman.h>
#    include <unistd.h>
#endif

int64_t ggml_fasa_cells_per_block(void) {
    return FASA_TIPS_CELLS;
}

ggml_tensor * ggml_fasa_new_tips(
        ggml_context * ctx,
        int64_t        n_cells,
        int64_t        n_dim,
        int64_t        n_head_kv,
        int64_t        n_stream) {
    GGML_ASSERT(n_cells % FASA_TIPS_CELLS == 0);
    GGML_ASSERT(n_dim > 0 && n_dim % 2 == 0);

    return ggml_new_tensor_4d(ctx, GGML_TYPE_I8, fasa_tips_block_size(n_dim), n_cells/FASA_TIPS_CELLS, n_head_kv, n_stream);
}

// what store and select both ask of the tip cache and of what says which dims are kept in it, and how
static void fasa_check_tips(const ggml_tensor * tips, const ggml_tensor * dims, const ggml_tensor * ranges) {
    GGML_ASSERT(tips->type == GGML_TYPE_I8);
    GGML_ASSERT(dims->type == GGML_TYPE_I32);
    GGML_ASSERT(ggml_is_contiguous(dims));
    GGML_ASSERT(dims->ne[2] == 1 && dims->ne[3] == 1);
    GGML_ASSERT(tips->ne[0] == (int64_t) fasa_tips_block_size(dims->ne[0]));
    GGML_ASSERT(tips->ne[2] == dims->ne[1]);
    GGML_ASSERT(ranges->type == GGML_TYPE_F32);
    GGML_ASSERT(ggml_is_contiguous(ranges));
    GGML_ASSERT(ranges->ne[0] == dims->ne[0] && ranges->ne[1] == 2 && ranges->ne[2] == dims->ne[1] && ranges->ne[3] == 1);
    GGML_ASSERT(tips->nb[0] == 1 && tips->nb[1] == (size_t) tips->ne[0]);
}

static void fasa_check_mask(const ggml_tensor * mask, int64_t n_kv, int64_t n_tokens, int64_t n_stream) {
    GGML_ASSERT(mask->type == GGML_TYPE_F16);
    GGML_ASSERT(mask->nb[0] == sizeof(ggml_fp16_t));
    GGML_ASSERT(mask->ne[0] == n_kv);
    GGML_ASSERT(mask->ne[1] >= n_tokens);
    GGML_ASSERT(mask->ne[2] == 1 && mask->ne[3] == n_stream);
}

static ggml_tensor * fasa_store(
        ggml_context * ctx,
        ggml_tensor  * tips,
        ggml_tensor  * k,
        ggml_tensor  * dims,
        ggml_tensor  * ranges,
        ggml_tensor  * idxs,
        ggml_type      type_k,
        bool           is_cached) {
    fasa_check_tips(tips, dims, ranges);

    GGML_ASSERT(k->type == GGML_TYPE_F32 || k->type == GGML_TYPE_F16 || k->type == GGML_TYPE_BF16);
    GGML_ASSERT(k->nb[0] == ggml_type_size(k->type));
    GGML_ASSERT(k->ne[1] == dims->ne[1]);
    GGML_ASSERT(k->ne[2] == (is_cached ? tips->ne[1]*FASA_TIPS_CELLS*tips->ne[3] : idxs->ne[0]));
    GGML_ASSERT(k->ne[3] == 1);
    GGML_ASSERT(idxs->type == GGML_TYPE_I64);
    GGML_ASSERT(ggml_is_vector(idxs) && ggml_is_contiguous(idxs));

    ggml_tensor * result = ggml_view_tensor(ctx, tips);

    ggml_set_op_params_i32(result, 0, type_k);
    ggml_set_op_params_i32(result, 1, is_cached);

    result->op     = GGML_OP_FASA_STORE;
    result->src[0] = tips;
    result->src[1] = k;
    result->src[2] = dims;
    result->src[3] = idxs;
    result->src[4] = ranges;

    return result;
}

ggml_tensor * ggml_fasa_store(
        ggml_context * ctx,
        ggml_tensor  * tips,
        ggml_tensor  * k,
        ggml_tensor  * dims,
        ggml_tensor  * ranges,
        ggml_tensor  * idxs,
        ggml_type      type_k) {
    return fasa_store(ctx, tips, k, dims, ranges, idxs, type_k, false);
}

ggml_tensor * ggml_fasa_store_cached(
        ggml_context * ctx,
        ggml_tensor  * tips,
        ggml_tensor  * k,
        ggml_tensor  * dims,
        ggml_tensor  * ranges,
        ggml_tensor  * idxs) {
    return fasa_store(ctx, tips, k, dims, ranges, idxs, k->type, true);
}

ggml_tensor * ggml_fasa_select(
        ggml_context * ctx,
        ggml_tensor  * q,
        ggml_tensor  * tips,
        ggml_tensor  * dims,
        ggml_tensor  * ranges,
        ggml_tensor  * mask,
        ggml_tensor  * forced,
        int64_t        n_head_sel,
        int64_t        n_fac,
        float          scale) {
    fasa_check_tips(tips, dims, ranges);

    const int64_t n_tokens = q->ne[2];
    const int64_t n_stream = q->ne[3];
    const int64_t n_kv     = tips->ne[1]*FASA_TIPS_CELLS;

    GGML_ASSERT(q->type == GGML_TYPE_F32);
    GGML_ASSERT(q->nb[0] == sizeof(float));
    GGML_ASSERT(q->ne[1] % dims->ne[1] == 0);
    GGML_ASSERT(n_head_sel == dims->ne[1] || n_head_sel == q->ne[1]);
    GGML_ASSERT(tips->ne[3] == n_stream);
    fasa_check_mask(mask, n_kv, n_tokens, n_stream);
    GGML_ASSERT(n_fac > 0 && n_fac <= n_kv);

    if (forced) {
        GGML_ASSERT(forced->type == GGML_TYPE_I32);
        GGML_ASSERT(ggml_is_contiguous(forced));
        GGML_ASSERT(forced->ne[0] <= n_fac);
        GGML_ASSERT(forced->ne[1] == n_tokens && forced->ne[2] == n_stream && forced->ne[3] == 1);
    }

    ggml_tensor * result = ggml_new_tensor_4d(ctx, GGML_TYPE_I32, n_fac, n_head_sel, n_tokens, n_stream);

    ggml_set_op_params_f32(result, 0, scale);

    result->op     = GGML_OP_FASA_SELECT;
    result->src[0] = q;
    result->src[1] = tips;
    result->src[2] = dims;
    result->src[3] = mask;
    result->src[4] = forced;
    result->src[5] = ranges;

    return result;
}

ggml_tensor * ggml_fasa_attend(
        ggml_context * ctx,
        ggml_tensor  * q,
        ggml_tensor  * k,
        ggml_tensor  * v,
        ggml_tensor  * idx,
        ggml_tensor  * mask,
        ggml_tensor  * sinks,
        float          scale,
        float          logit_softcap) {
    GGML_ASSERT(q->type == GGML_TYPE_F32);
    GGML_ASSERT(q->nb[0] == sizeof(float));
    GGML_ASSERT(q->ne[0] == k->ne[0]);
    GGML_ASSERT(q->ne[1] % k->ne[1] == 0);
    GGML_ASSERT(q->ne[3] == k->ne[3]);
    GGML_ASSERT(k->nb[0] == ggml_type_size(k->type) && v->nb[0] == ggml_type_size(v->type));
    GGML_ASSERT(v->ne[1] == k->ne[1] && v->ne[2] == k->ne[2] && v->ne[3] == k->ne[3]);
    GGML_ASSERT((idx == NULL) != (mask == NULL));

    if (idx) {
        GGML_ASSERT(idx->type == GGML_TYPE_I32);
        GGML_ASSERT(ggml_is_contiguous(idx));
        GGML_ASSERT(idx->ne[1] == k->ne[1] || idx->ne[1] == q->ne[1]);
        GGML_ASSERT(idx->ne[2] == q->ne[2] && idx->ne[3] == q->ne[3]);
    } else {
        fasa_check_mask(mask, k->ne[2], q->ne[2], q->ne[3]);
    }
    if (sinks) {
        GGML_ASSERT(sinks->type == GGML_TYPE_F32);
        GGML_ASSERT(ggml_is_vector(sinks) && ggml_is_contiguous(sinks));
        GGML_ASSERT(sinks->ne[0] == q->ne[1]);
    }

    ggml_tensor * result = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, v->ne[0], q->ne[1], q->ne[2], q->ne[3]);

    ggml_set_op_params_f32(result, 0, scale);
    ggml_set_op_params_f32(result, 1, logit_softcap);

    result->op     = GGML_OP_FASA_ATTEND;
    result->src[0] = q;
    result->src[1] = k;
    result->src[2] = v;
    result->src[3] = idx;
    result->src[4] = mask;
    result->src[5] = sinks;
    if (idx && idx->op == GGML_OP_FASA_SELECT) {
        result->src[6] = idx->src[0]; // what select reads is kept until then: a backend may compute both in one launch
    }

    return result;
}

void ggml_fasa_attend_set_tips(
        ggml_tensor * a,
        ggml_tensor * q,
        ggml_tensor * tips,
        ggml_tensor * dims,
        ggml_tensor * ranges,
        float         mass) {
    GGML_ASSERT(a->op == GGML_OP_FASA_ATTEND && a->src[4]);
    fasa_check_tips(tips, dims, ranges);
    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float));
    GGML_ASSERT(ggml_are_same_shape(q, a->src[0]));
    GGML_ASSERT(tips->ne[1]*FASA_TIPS_CELLS >= a->src[1]->ne[2]);
    GGML_ASSERT(tips->ne[2] == a->src[1]->ne[1] && tips->ne[3] == q->ne[3]);
    GGML_ASSERT(mass > 0.0f);

    ggml_set_op_params_f32(a, 2, mass);

    a->src[6] = q;
    a->src[7] = tips;
    a->src[8] = dims;
    a->src[9] = ranges;
}

float ggml_fasa_bandwidth(ggml_backend_dev_t dev) {
    ggml_backend_reg_t reg = dev ? ggml_backend_dev_backend_reg(dev) : NULL;
    auto * bandwidth = reg ? (float (*)(ggml_backend_dev_t)) ggml_backend_reg_get_proc_address(reg, "ggml_backend_fasa_bandwidth") : NULL;
    return bandwidth ? bandwidth(dev) : 0.0f;
}

void ggml_fasa_prefer_huge_pages(ggml_backend_buffer_t buffer) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (!ggml_backend_buffer_is_host(buffer)) {
        return;
    }
    const uintptr_t page  = sysconf(_SC_PAGESIZE);
    const uintptr_t begin = (uintptr_t) ggml_backend_buffer_get_base(buffer);
    const uintptr_t end   = begin + ggml_backend_buffer_get_size(buffer);

    // only pages that are wholly of the buffer; where the system has no huge ones, it refuses and all stays as it is
    const uintptr_t first = (begin + page - 1)/page*page;
    const uintptr_t last  = end/page*page;
    if (first < last) {
        madvise((void *) first, last - first, MADV_HUGEPAGE);
    }
#else
    GGML_UNUSED(buffer);
#endif
}
