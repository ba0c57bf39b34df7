// Test cases of the FASA ops, included by test-backend-ops.cpp.
//
// A backend is compared with the CPU backend, which has one implementation of these ops only: the CPU compared with
// itself says nothing. So every case computes a twin of plain ggml ops in the same graph, and the results of both
// backends are held to that. The contract is in ggml-fasa/README.md.

#pragma once

#include "ggml-fasa.h"

#include <numeric>

struct test_fasa : public test_case {
    ggml_tensor * result = nullptr; // what is compared, with
    ggml_tensor * twin   = nullptr; // ... F32, tests only

    // Asked before there is a graph, too: by the modes that leave out fusions, which this is not.
    bool run_whole_graph() override { return gf != nullptr; }
    std::vector<ggml_tensor *> fusion_test_nodes() override { return { result }; }

    // --show-coverage builds the op without a graph
    bool is_compared() const { return mode == MODE_TEST && gf != nullptr; }

    void compare(ggml_tensor * result, ggml_tensor * twin) {
        this->result = result;
        this->twin   = twin;
        ggml_build_forward_expand(gf, twin);
        ggml_build_forward_expand(gf, result);
    }

    virtual double err_twin(const std::vector<float> & twin, const float * res, size_t n) = 0;

    // the twin is backend 1's, which is as good for both results
    double err(const float * a, const float * b, size_t n) override {
        const std::vector<float> t = tensor_to_float(twin);
        return std::max(err_twin(t, a, n), err_twin(t, b, n));
    }

    // as the KV cache hands out its first cells
    static ggml_tensor * view_cells(ggml_context * ctx, ggml_tensor * cache, int64_t dim, int64_t n) {
        int64_t ne[4];
        std::copy_n(cache->ne, 4, ne);
        ne[dim] = n;
        return ggml_view_4d(ctx, cache, ne[0], ne[1], ne[2], ne[3], cache->nb[1], cache->nb[2], cache->nb[3], 0);
    }

    template <typename T> static void set(ggml_tensor * t, const std::vector<T> & data) {
        GGML_ASSERT(data.size()*sizeof(T) == ggml_nbytes(t));
        ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
    }
};

// GGML_OP_FASA_SELECT: store K, then choose
// twin: ggml_set_rows, and for every cell the greatest softmax probability among the heads of a group
struct test_fasa_select : public test_fasa {
    const int64_t hsk;                 // K head size
    const int64_t nh;                  // num KV heads
    const std::array<int64_t, 2> nr23; // query heads of a group, streams
    const int64_t kv;                  // cells in view
    const int64_t nb;                  // batch size
    const int64_t n_dim;
    const int64_t n_fac;
    const int64_t n_forced;
    const int64_t n_store;             // cells that hold a key

    ggml_tensor * store  = nullptr;
    ggml_tensor * idxs   = nullptr;
    ggml_tensor * k      = nullptr;
    ggml_tensor * dims   = nullptr;
    ggml_tensor * sel    = nullptr; // F32 [hsk, nh] 1: one of dims
    ggml_tensor * mask   = nullptr;
    ggml_tensor * forced = nullptr;

    std::vector<int32_t> forced_ids;
    std::vector<float>   mask_values;

    std::string vars() override {
        return VARS_TO_STR9(hsk, nh, nr23, kv, nb, n_dim, n_fac, n_forced, n_store);
    }

    test_fasa_select(int64_t hsk, int64_t nh, std::array<int64_t, 2> nr23, int64_t kv, int64_t nb, int64_t n_dim,
                     int64_t n_fac, int64_t n_forced = 0, int64_t n_store = 0)
        : hsk(hsk), nh(nh), nr23(nr23), kv(kv), nb(nb), n_dim(n_dim), n_fac(n_fac), n_forced(n_forced),
          n_store(n_store ? n_store : kv*nr23[1]) {}

    int64_t n_cells() const { return kv + 2*ggml_fasa_cells_per_block(); }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const float scale = 1.0f/sqrtf(hsk);

        ggml_tensor * tips = ggml_fasa_new_tips(ctx, n_cells(), n_dim, nh, nr23[1]);
        ggml_tensor * q    = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, hsk, nh*nr23[0], nb, nr23[1]);

        k      = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, hsk, nh, n_store);
        idxs   = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_store);
        dims   = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_dim, nh);
        mask   = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, kv, nb, 1, nr23[1]);
        forced = n_forced ? ggml_new_tensor_3d(ctx, GGML_TYPE_I32, n_forced, nb, nr23[1]) : nullptr;

        store = ggml_fasa_store(ctx, tips, k, dims, idxs, GGML_TYPE_F16);

        ggml_tensor * tips_kv = view_cells(ctx, store, 1, kv/ggml_fasa_cells_per_block());
        ggml_tensor * select  = ggml_fasa_select(ctx, q, tips_kv, dims, mask, forced, n_fac, scale);

        if (is_compared()) {
            sel = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, hsk, nh);

            ggml_tensor * cache = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, hsk*nh, n_cells()*nr23[1]);
            ggml_set_name(cache, "zeros");

            ggml_tensor * keys  = ggml_set_rows(ctx, cache, ggml_reshape_2d(ctx, k, hsk*nh, n_store), idxs);
            keys = view_cells(ctx, ggml_reshape_4d(ctx, keys, hsk, nh, n_cells(), nr23[1]), 2, kv);
            keys = ggml_permute(ctx, ggml_mul(ctx, keys, sel), 0, 2, 1, 3);

            ggml_tensor * kq    = ggml_mul_mat(ctx, keys, ggml_permute(ctx, q, 0, 2, 1, 3));
            ggml_tensor * probs = ggml_soft_max_ext(ctx, kq, mask, scale, 0.0f);
            ggml_tensor * heads = ggml_cont(ctx, ggml_permute(ctx, probs, 1, 2, 0, 3));

            compare(select, ggml_pool_1d(ctx, heads, GGML_OP_POOL_MAX, nr23[0], nr23[0], 0)); // [nh, kv, nb, nr23[1]]
        }
        return select;
    }

    void initialize_tensors(ggml_context * ctx) override {
        std::mt19937 rng;
        const auto random = [&](int64_t min, int64_t max) { return std::uniform_int_distribution<int64_t>(min, max)(rng); };

        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            if (t->type == GGML_TYPE_I8 || strcmp(t->name, "zeros") == 0) {
                set(t, std::vector<uint8_t>(ggml_nbytes(t)));
            } else if (t->op == GGML_OP_NONE && t->type == GGML_TYPE_F32) {
                init_tensor_uniform(t);
            }
        }

        std::vector<int32_t> dims_ids;
        std::vector<float>   dims_sel(hsk*nh);
        for (int64_t ih = 0; ih < nh; ++ih) {
            std::vector<int32_t> ids(hsk);
            std::iota(ids.begin(), ids.end(), 0);
            std::shuffle(ids.begin(), ids.end(), rng);
            for (int64_t i = 0; i < n_dim; ++i) {
                dims_ids.push_back(ids[i]);
                dims_sel[ih*hsk + ids[i]] = 1.0f;
            }
        }
        set(dims, dims_ids);

        // multiples of the tip's own step, so that 8 bits lose nothing and the twin needs no tolerance for it
        std::vector<float> keys(ggml_nelements(k));
        for (size_t i = 0; i < keys.size(); ++i) {
            const bool first = (int64_t) (i % hsk) == dims_ids[(i/hsk % nh)*n_dim];
            keys[i] = (first ? 127 : random(-127, 127))/128.0f;
        }
        set(k, keys);

        // cells outside of the view as well
        std::vector<int64_t> cells(n_cells()*nr23[1]);
        std::iota(cells.begin(), cells.end(), 0);
        if (n_store < kv*nr23[1]) {
            std::shuffle(cells.begin(), cells.end(), rng);
        } else {
            cells.erase(std::remove_if(cells.begin(), cells.end(), [&](int64_t id) { return id % n_cells() >= kv; }), cells.end());
        }
        cells.resize(n_store);
        set(idxs, cells);

        // holes, as seq_rm leaves them, and an end that differs by token
        std::vector<ggml_fp16_t> mask_data;
        for (int64_t i = 0; i < ggml_nelements(mask); ++i) {
            const bool visible = i % kv < kv - kv/8 + i/kv % nb && random(0, 9) > 0;
            mask_values.push_back(visible ? 0.0f : -INFINITY);
            mask_data.push_back(ggml_fp32_to_fp16(mask_values.back()));
        }
        set(mask, mask_data);

        for (int64_t i = 0; i < n_forced*nb*nr23[1]; ++i) {
            forced_ids.push_back(random(-1, kv - 1));
        }
        if (forced) {
            set(forced, forced_ids);
        }
        if (sel) {
            set(sel, dims_sel);
        }
    }

    double max_nmse_err() override { return 0.0; }

    // the lists that break the contract; cells may differ where they tie with the last one taken
    double err_twin(const std::vector<float> & scores, const float * res, size_t n) override {
        GGML_ASSERT((int64_t) n == n_fac*nh*nb*nr23[1]);

        int64_t n_wrong = 0;
        for (int64_t il = 0; il < nh*nb*nr23[1]; ++il) {
            const int64_t ih = il % nh;
            const int64_t it = il / nh; // of all streams

            const auto score   = [&](int64_t i) { return scores[(it*kv + i)*nh + ih]; };
            const auto visible = [&](int64_t i) { return mask_values[it*kv + i] == 0.0f; };

            enum : char { LEFT_OUT, LISTED, FORCED };
            std::vector<char> state(kv, LEFT_OUT);
            for (int64_t i = 0; i < n_forced; ++i) {
                const int32_t id = forced_ids[it*n_forced + i];
                if (id >= 0 && visible(id)) {
                    state[id] = FORCED;
                }
            }
            int64_t n_missing = std::count(state.begin(), state.end(), FORCED);

            const float * list   = res + il*n_fac;
            const float * end    = std::find(list, list + n_fac, -1.0f);
            bool          wrong  = std::any_of(end, list + n_fac, [](float id) { return id != -1.0f; });
            float         lowest = INFINITY;
            for (const float * id = list; id < end && !wrong; ++id) {
                wrong = *id < 0 || *id >= kv || (id > list && *id <= id[-1]) || !visible(*id);
                if (!wrong && state[*id] == FORCED) {
                    n_missing--;
                } else if (!wrong) {
                    state[*id] = LISTED;
                    lowest     = std::min(lowest, score(*id));
                }
            }

            int64_t n_visible = 0;
            float   best      = 0.0f; // of those left out
            for (int64_t i = 0; i < kv; ++i) {
                n_visible += visible(i);
                best = state[i] == LEFT_OUT && visible(i) ? std::max(best, score(i)) : best;
            }
            n_wrong += wrong || n_missing || end - list != std::min(n_fac, n_visible) || best > lowest*(1.0f + 1e-4f);
        }
        return n_wrong;
    }
};

// GGML_OP_FASA_STORE, whose result only select can read
struct test_fasa_store : public test_fasa_select {
    using test_fasa_select::test_fasa_select;

    ggml_tensor * build_graph(ggml_context * ctx) override {
        test_fasa_select::build_graph(ctx);
        return store;
    }

    size_t op_size(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return ggml_nbytes(k) + ggml_nbytes(idxs) + n_store*nh*(n_dim + sizeof(ggml_fp16_t));
    }
};

// GGML_OP_FASA_ATTEND
// twin: dense attention with all cells masked that are not listed
struct test_fasa_attend : public test_fasa {
    const int64_t hsk;                 // K head size
    const int64_t hsv;                 // V head size
    const int64_t nh;                  // num KV heads
    const std::array<int64_t, 2> nr23; // query heads of a group, streams
    const int64_t kv;                  // cells in view
    const int64_t nb;                  // batch size
    const int64_t n_fac;
    const bool sinks;
    const float logit_softcap;
    const ggml_type type_KV;

    ggml_tensor * q    = nullptr;
    ggml_tensor * k    = nullptr;
    ggml_tensor * v    = nullptr;
    ggml_tensor * idx  = nullptr;
    ggml_tensor * mask = nullptr;
    ggml_tensor * s    = nullptr;

    std::string vars() override {
        return VARS_TO_STR10(hsk, hsv, nh, nr23, kv, nb, n_fac, sinks, logit_softcap, type_KV);
    }

    test_fasa_attend(int64_t hsk, int64_t hsv, int64_t nh, std::array<int64_t, 2> nr23, int64_t kv, int64_t nb,
                     int64_t n_fac, bool sinks = false, float logit_softcap = 0.0f, ggml_type type_KV = GGML_TYPE_F16)
        : hsk(hsk), hsv(hsv), nh(nh), nr23(nr23), kv(kv), nb(nb), n_fac(n_fac), sinks(sinks),
          logit_softcap(logit_softcap), type_KV(type_KV) {}

    double max_nmse_err() override { return 5e-4; } // as for FLASH_ATTN_EXT

    double err_twin(const std::vector<float> & twin, const float * res, size_t n) override {
        return nmse(twin.data(), res, n);
    }

    // the rows that are read
    size_t op_size(ggml_tensor * t) override {
        return ggml_nbytes(t) + ggml_nbytes(q) + ggml_nbytes(idx) + ggml_nelements(idx)*(ggml_row_size(type_KV, hsk) + ggml_row_size(type_KV, hsv));
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const float scale = 1.0f/sqrtf(hsk);

        q   = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, hsk, nh*nr23[0], nb, nr23[1]);
        k   = view_cells(ctx, ggml_new_tensor_4d(ctx, type_KV, hsk, nh, 2*kv, nr23[1]), 2, kv);
        v   = view_cells(ctx, ggml_new_tensor_4d(ctx, type_KV, hsv, nh, 2*kv, nr23[1]), 2, kv);
        idx = ggml_new_tensor_4d(ctx, GGML_TYPE_I32, n_fac, nh, nb, nr23[1]);
        s   = sinks ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, nh*nr23[0]) : nullptr;

        ggml_tensor * out = ggml_fasa_attend(ctx, q, k, v, idx, nullptr, s, scale, logit_softcap);

        if (is_compared()) {
            mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, kv, nb, nh*nr23[0], nr23[1]);

            ggml_tensor * k_f32 = ggml_permute(ctx, ggml_cast(ctx, k, GGML_TYPE_F32), 0, 2, 1, 3);
            ggml_tensor * v_f32 = ggml_permute(ctx, ggml_cast(ctx, v, GGML_TYPE_F32), 1, 2, 0, 3);

            ggml_tensor * kq = ggml_scale(ctx, ggml_mul_mat(ctx, k_f32, ggml_permute(ctx, q, 0, 2, 1, 3)), scale);
            if (logit_softcap != 0.0f) {
                kq = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, 1.0f/logit_softcap)), logit_softcap);
            }
            kq = ggml_soft_max_ext(ctx, kq, mask, 1.0f, 0.0f);
            ggml_soft_max_add_sinks(kq, s);

            ggml_tensor * kqv = ggml_mul_mat(ctx, ggml_cont(ctx, v_f32), kq);

            compare(out, ggml_cont(ctx, ggml_permute(ctx, kqv, 0, 2, 1, 3)));
        }
        return out;
    }

    void initialize_tensors(ggml_context * ctx) override {
        // logits that matter, to sinks and the softcap as well
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            const float max = t == q || t == s ? 10.0f : 1.0f;
            if (t->op == GGML_OP_NONE && t != idx && t != mask) {
                init_tensor_uniform(t, -max, max);
            }
        }

        std::mt19937 rng;
        std::vector<int32_t> ids;
        std::vector<int32_t> cells(kv);
        std::iota(cells.begin(), cells.end(), 0);
        for (int64_t il = 0; il < nh*nb*nr23[1]; ++il) {
            std::vector<int32_t> list;
            std::sample(cells.begin(), cells.end(), std::back_inserter(list), std::max<int64_t>(1, n_fac - il % 3), rng);
            list.resize(n_fac, -1);
            ids.insert(ids.end(), list.begin(), list.end());
        }
        set(idx, ids);

        if (mask) {
            std::vector<ggml_fp16_t> visible(ggml_nelements(mask), ggml_fp32_to_fp16(-INFINITY));
            for (size_t i = 0; i < ids.size(); ++i) {
                const int64_t ih = i/n_fac % nh;
                const int64_t it = i/n_fac/nh % nb;
                const int64_t is = i/n_fac/nh/nb;
                for (int64_t ig = 0; ig < nr23[0] && ids[i] >= 0; ++ig) {
                    visible[((is*nh*nr23[0] + ih*nr23[0] + ig)*nb + it)*kv + ids[i]] = ggml_fp32_to_fp16(0.0f);
                }
            }
            set(mask, visible);
        }
    }
};

static void add_test_cases_fasa_eval(std::vector<std::unique_ptr<test_case>> & test_cases) {
    for (int64_t nb : { 1, 4 }) {
        for (std::array<int64_t, 2> nr23 : { std::array<int64_t, 2>{ 1, 1 }, { 3, 1 }, { 8, 2 } }) {
            for (int64_t n_fac : { 1, 64, 256 }) {
                test_cases.emplace_back(new test_fasa_select( 64, 3, nr23,  256, nb,  24, n_fac));
                test_cases.emplace_back(new test_fasa_select(128, 2, nr23, 1024, nb,  32, n_fac, std::min<int64_t>(n_fac, 12)));
                test_cases.emplace_back(new test_fasa_select( 80, 1, nr23,  288, nb,  26, n_fac));
                test_cases.emplace_back(new test_fasa_select( 64, 2, nr23,  256, nb,  64, n_fac, 1));
            }
            for (int64_t n_store : { 1, 7, 100 }) {
                test_cases.emplace_back(new test_fasa_store( 64, 3, nr23, 256, nb, 24,  64, 0, n_store));
                test_cases.emplace_back(new test_fasa_store(128, 2, nr23, 512, nb, 32, 200, 0, n_store));
            }
        }
    }

    for (int64_t nb : { 1, 4 }) {
        for (std::array<int64_t, 2> nr23 : { std::array<int64_t, 2>{ 1, 1 }, { 3, 1 }, { 8, 2 } }) {
            for (bool sinks : { false, true }) {
                for (float logit_softcap : { 0.0f, 5.0f }) {
                    test_cases.emplace_back(new test_fasa_attend( 64,  64, 3, nr23, 256, nb,   1, sinks, logit_softcap));
                    test_cases.emplace_back(new test_fasa_attend(128, 128, 2, nr23, 512, nb, 300, sinks, logit_softcap));
                    test_cases.emplace_back(new test_fasa_attend( 80,  80, 1, nr23,  96, nb,  96, sinks, logit_softcap));
                    test_cases.emplace_back(new test_fasa_attend(192, 128, 2, nr23, 256, nb,  64, sinks, logit_softcap));
                }
            }
        }
    }
}

static void add_test_cases_fasa_perf(std::vector<std::unique_ptr<test_case>> & test_cases) {
    // one decoded token of SmolLM2-135M and of Llama-3-8B
    for (int64_t kv : { 4096, 32768 }) {
        test_cases.emplace_back(new test_fasa_store ( 64, 3, { 3, 1 }, kv, 1, 24, 512, 0, 1));
        test_cases.emplace_back(new test_fasa_store (128, 8, { 4, 1 }, kv, 1, 32, 512, 0, 1));
        test_cases.emplace_back(new test_fasa_select( 64, 3, { 3, 1 }, kv, 1, 24, 512));
        test_cases.emplace_back(new test_fasa_select(128, 8, { 4, 1 }, kv, 1, 32, 512));
        test_cases.emplace_back(new test_fasa_attend( 64,  64, 3, { 3, 1 }, kv, 1, 512));
        test_cases.emplace_back(new test_fasa_attend(128, 128, 8, { 4, 1 }, kv, 1, 512));
    }
}
