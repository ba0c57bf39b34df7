// Test cases of the FASA ops, included by test-backend-ops.cpp.
//
// A backend is compared with the CPU backend, which has one implementation of these ops only: the CPU compared with
// itself says nothing. So every case computes a twin of plain ggml ops in the same graph, and the results of both
// backends are held to that. The contract is in ggml-fasa/README.md.

#pragma once

#include "ggml-fasa.h"

#include <numeric>

// not by a distribution: the same on every platform
static int64_t fasa_random(std::mt19937 & rng, int64_t min, int64_t max) {
    return min + rng() % (max - min + 1);
}

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
        // the CPU with another number of threads
        if (ggml_backend_buffer_is_host(result->buffer) && memcmp(a, b, n*sizeof(float)) != 0) {
            printf("[threads differ] ");
            return INFINITY;
        }
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

    // all cells but holes, as seq_rm leaves them, and an end that differs by token
    // hidden: percentage of holes; returns what the mask [kv, >= nb, 1, ns] has for the nb tokens: 0 or -INFINITY
    static std::vector<float> set_mask(ggml_tensor * mask, int64_t nb, int64_t hidden, std::mt19937 & rng) {
        const int64_t kv = mask->ne[0];

        std::vector<float>       values;
        std::vector<ggml_fp16_t> data;
        for (int64_t i = 0; i < ggml_nelements(mask); ++i) {
            const int64_t it = i/kv % mask->ne[1];
            const bool visible = i % kv < kv - kv/8 + it && fasa_random(rng, 1, 100) > hidden;
            data.push_back(ggml_fp32_to_fp16(visible ? 0.0f : -INFINITY));
            if (it < nb) {
                values.push_back(visible ? 0.0f : -INFINITY);
            }
        }
        set(mask, data);
        return values;
    }

    // not init_tensor_uniform, which takes long to find good quants and never gives the same numbers
    static void set_uniform(ggml_tensor * t, float max, std::mt19937 & rng) {
        std::vector<float> data(ggml_nelements(t));
        for (float & x : data) {
            x = max*fasa_random(rng, -4096, 4096)/4096;
        }
        std::vector<uint8_t> rounded(ggml_nbytes(t));
        round_to_type(t->type, data.data(), data.size(), rounded.data());
        set(t, rounded);
    }

    static void round_to_type(ggml_type type, const float * x, int64_t n, uint8_t * res) {
        if (type == GGML_TYPE_F32) {
            memcpy(res, x, n*sizeof(float));
        } else {
            ggml_get_type_traits(type)->from_float_ref(x, res, n);
        }
    }

    void set_sentinels() {
        for (ggml_tensor * sentinel : sentinels) {
            set(sentinel, std::vector<float>(sentinel_size, -1.0f));
        }
    }

    template <typename T> static void set(ggml_tensor * t, const std::vector<T> & data) {
        GGML_ASSERT(data.size()*sizeof(T) == ggml_nbytes(t));
        ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
    }
};

// GGML_OP_FASA_SELECT: store K, then choose
// twin: ggml_set_rows of the levels, and for every cell the greatest softmax probability among the heads that share a choice
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
    const int64_t hidden;              // percentage of masked cells
    const ggml_type type_k;            // of the K cache
    const bool by_head;                // each query head has a choice of its own
    const bool cached;                 // keys are read from the K cache
    const float q_scale;               // of the queries, which changes no choice that a head makes alone

    ggml_tensor * q      = nullptr;
    ggml_tensor * store  = nullptr;
    ggml_tensor * idxs   = nullptr;
    ggml_tensor * k      = nullptr;
    ggml_tensor * k_kv   = nullptr; // the K cache
    ggml_tensor * levels = nullptr; // what the tips make of the keys, tests only
    ggml_tensor * dims   = nullptr;
    ggml_tensor * ranges = nullptr;
    ggml_tensor * steps  = nullptr; // F32 [hsk, nh] of dims, else 0; tests only
    ggml_tensor * mask   = nullptr;
    ggml_tensor * forced = nullptr;

    std::vector<int32_t> forced_ids;
    std::vector<float>   mask_values;

    std::string vars() override {
        return VARS_TO_STR14(hsk, nh, nr23, kv, nb, n_dim, n_fac, n_forced, n_store, hidden, type_k, by_head, cached, q_scale);
    }

    test_fasa_select(int64_t hsk, int64_t nh, std::array<int64_t, 2> nr23, int64_t kv, int64_t nb, int64_t n_dim,
                     int64_t n_fac, int64_t n_forced = 0, int64_t n_store = 0, int64_t hidden = 10,
                     ggml_type type_k = GGML_TYPE_F16, bool by_head = false, bool cached = false, float q_scale = 1.0f)
        : hsk(hsk), nh(nh), nr23(nr23), kv(kv), nb(nb), n_dim(n_dim), n_fac(n_fac), n_forced(n_forced),
          n_store(n_store ? n_store : kv*nr23[1]), hidden(hidden), type_k(type_k), by_head(by_head), cached(cached), q_scale(q_scale) {}

    int64_t n_sharing()  const { return by_head ? 1 : nr23[0]; } // query heads
    int64_t n_head_sel() const { return nh*nr23[0]/n_sharing(); }

    int64_t n_cells() const { return kv + 2*ggml_fasa_cells_per_block(); }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const float scale = 1.0f/sqrtf(hsk);

        ggml_tensor * tips = ggml_fasa_new_tips(ctx, n_cells(), n_dim, nh, nr23[1]);

        q      = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, hsk, nh*nr23[0], nb, nr23[1]);
        k      = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, hsk, nh, n_store);
        idxs   = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_store);
        dims   = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_dim, nh);
        ranges = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_dim, 2, nh);
        mask   = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, kv, nb + 1, 1, nr23[1]);
        forced = n_forced ? ggml_new_tensor_3d(ctx, GGML_TYPE_I32, n_forced, nb, nr23[1]) : nullptr;

        if (cached) {
            k_kv  = ggml_new_tensor_3d(ctx, type_k, hsk, nh, n_cells()*nr23[1]);
            store = ggml_fasa_store_cached(ctx, tips, k_kv, dims, ranges, idxs);
        } else {
            store = ggml_fasa_store(ctx, tips, k, dims, ranges, idxs, type_k);
        }

        ggml_tensor * tips_kv = view_cells(ctx, store, 1, kv/ggml_fasa_cells_per_block());
        ggml_tensor * select  = ggml_fasa_select(ctx, q, tips_kv, dims, ranges, mask, forced, n_head_sel(), n_fac, scale);

        if (is_compared()) {
            steps  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, hsk, nh);
            levels = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, hsk, nh, n_store);

            ggml_tensor * cache = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, hsk*nh, n_cells()*nr23[1]);
            ggml_set_name(cache, "zeros");

            ggml_tensor * keys  = ggml_set_rows(ctx, cache, ggml_reshape_2d(ctx, levels, hsk*nh, n_store), idxs);
            keys = view_cells(ctx, ggml_reshape_4d(ctx, keys, hsk, nh, n_cells(), nr23[1]), 2, kv);
            keys = ggml_permute(ctx, ggml_mul(ctx, keys, steps), 0, 2, 1, 3);

            ggml_tensor * q_one = q_scale == 1.0f ? q : ggml_scale(ctx, q, 1.0f/q_scale);
            ggml_tensor * kq    = ggml_mul_mat(ctx, keys, ggml_permute(ctx, q_one, 0, 2, 1, 3));
            ggml_tensor * probs = ggml_soft_max_ext(ctx, kq, mask, scale, 0.0f);
            ggml_tensor * heads = ggml_cont(ctx, ggml_permute(ctx, probs, 1, 2, 0, 3));

            compare(select, ggml_pool_1d(ctx, heads, GGML_OP_POOL_MAX, n_sharing(), n_sharing(), 0)); // [n_head_sel, kv, nb, nr23[1]]
        }
        return select;
    }

    void initialize_tensors(ggml_context * ctx) override {
        std::mt19937 rng;
        const auto random = [&](int64_t min, int64_t max) { return fasa_random(rng, min, max); };

        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            if (t->type == GGML_TYPE_I8 || strcmp(t->name, "zeros") == 0) {
                set(t, std::vector<uint8_t>(ggml_nbytes(t)));
            }
        }
        set_sentinels();

        // ranges of powers of two, so that nothing is rounded; a dim that never moves
        std::vector<int32_t> dims_ids;
        std::vector<float>   ranges_values;
        std::vector<float>   dims_centre(hsk*nh);
        std::vector<float>   dims_step(hsk*nh);
        for (int64_t ih = 0; ih < nh; ++ih) {
            std::vector<int32_t> ids(hsk);
            std::iota(ids.begin(), ids.end(), 0);
            std::shuffle(ids.begin(), ids.end(), rng);
            for (int64_t i = 0; i < n_dim; ++i) {
                dims_ids.push_back(ids[i]);
                dims_step  [ih*hsk + ids[i]] = i > 0 && i == n_dim - 1 ? 0.0f : ldexpf(1.0f, random(-4, -1));
                dims_centre[ih*hsk + ids[i]] = dims_step[ih*hsk + ids[i]]*random(-40, 40)/4;
            }
            for (const auto * values : { &dims_centre, &dims_step }) {
                for (int64_t i = 0; i < n_dim; ++i) {
                    ranges_values.push_back((*values)[ih*hsk + ids[i]]);
                }
            }
        }
        set(dims, dims_ids);
        set(ranges, ranges_values);

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

        mask_values = set_mask(mask, nb, hidden, rng);

        const auto is_seen = [&](int64_t id) {
            bool seen = id % n_cells() >= kv;
            for (int64_t it = 0; it < nb && !seen; ++it) {
                seen = mask_values[(id/n_cells()*nb + it)*kv + id % n_cells()] == 0.0f;
            }
            return seen;
        };

        // In units of the steps multiples of what 8 bits have, with a head's greatest among its dims: rounding a query loses nothing, and
        // the twin needs no tolerance for it. The extremes are frequent, for sums that saturate.
        std::vector<float> queries(ggml_nelements(q));
        for (int64_t i = 0; i < ggml_nrows(q); ++i) {
            const int64_t ih   = i % q->ne[1] / nr23[0];
            const float   unit = random(0, 15) ? q_scale*ldexpf(1.0f, random(-10, -6)) : 0.0f;
            for (int64_t j = 0; j < hsk; ++j) {
                const float step = dims_step[ih*hsk + j];
                queries[i*hsk + j] = unit*(random(0, 3) ? random(-127, 127) : random(0, 1) ? 127 : -127)/(step > 0.0f ? step : 1.0f);
            }
            const int32_t first = dims_ids[ih*n_dim];
            queries[i*hsk + first] = unit*(random(0, 1) ? 127 : -127)/dims_step[ih*hsk + first];
        }
        set(q, queries);

        // levels, and keys in the middle of them, or far beyond the first and the last one; cells that no token sees hold anything
        std::vector<float> keys(ggml_nelements(k));
        std::vector<float> keys_levels(keys.size());
        for (int64_t i = 0; i < ggml_nrows(k); ++i) {
            const bool is_wild = !is_seen(cells[i/nh]) && random(0, 1);
            for (int64_t j = 0; j < hsk; ++j) {
                const int64_t at    = i % nh*hsk + j;
                const int64_t level = random(0, 3) ? random(0, 15) : random(0, 1) ? 15 : 0;
                const float   far   = random(0, 7) ? 0.0f : level == 15 ? random(1, 1000) : level == 0 ? -random(1, 1000) : 0.0f;
                keys       [i*hsk + j] = dims_centre[at] + dims_step[at]*(level - 7.5f + far);
                keys_levels[i*hsk + j] = level;
                if (is_wild) {
                    keys[i*hsk + j] = std::array<float, 4>{ NAN, INFINITY, -INFINITY, 1e30f }[random(0, 3)];
                }
            }
        }
        set(k, keys);

        if (k_kv) {
            // as SET_ROWS leaves them, among rows that nobody should read: NaN
            const size_t row = ggml_row_size(type_k, hsk*nh);
            std::vector<uint8_t> data(ggml_nbytes(k_kv), 0xFF);
            for (int64_t i = 0; i < n_store; ++i) {
                round_to_type(type_k, keys.data() + i*hsk*nh, hsk*nh, data.data() + cells[i]*row);
            }
            set(k_kv, data);
        }

        for (int64_t i = 0; i < n_forced*nb*nr23[1]; ++i) {
            forced_ids.push_back(random(-1, kv - 1));
        }
        if (forced) {
            set(forced, forced_ids);
        }
        if (levels) {
            set(levels, keys_levels);
            set(steps, dims_step);
        }
    }

    double max_nmse_err() override { return 0.0; }

    // the lists that break the contract; cells may differ where they tie with the last one taken
    double err_twin(const std::vector<float> & scores, const float * res, size_t n) override {
        GGML_ASSERT((int64_t) n == n_fac*n_head_sel()*nb*nr23[1]);

        int64_t n_wrong = 0;
        for (int64_t il = 0; il < n_head_sel()*nb*nr23[1]; ++il) {
            const int64_t ih = il % n_head_sel();
            const int64_t it = il / n_head_sel(); // of all streams

            const auto score   = [&](int64_t i) { return scores[(it*kv + i)*n_head_sel() + ih]; };
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
        return n_store*nh*ggml_row_size(cached ? type_k : k->type, hsk) + ggml_nbytes(idxs) + n_store*nh*n_dim/2;
    }
};

// the contract of the CPU; others as for FLASH_ATTN_EXT
static double attention_max_err(ggml_backend_t backend) {
    return ggml_backend_dev_type(ggml_backend_get_device(backend)) == GGML_BACKEND_DEVICE_TYPE_CPU ? 1e-6 : 5e-4;
}

// nmse, also where there is nothing to normalize by: without a cell, the twin is 0/0 and the result zero
static double nmse_of_twin(const std::vector<float> & twin, const float * res, size_t n) {
    double mse_diff = 0.0;
    double mse_twin = 0.0;
    for (size_t i = 0; i < n; ++i) {
        const double t = std::isnan(twin[i]) ? 0.0 : twin[i];
        mse_diff += (t - res[i])*(t - res[i]);
        mse_twin += t*t;
    }
    return mse_diff > 0.0 ? mse_diff/mse_twin : 0.0;
}

// GGML_OP_FASA_ATTEND
// twin: dense attention with all cells masked that are not listed
// n_fac = 0: no list, a mask for all cells
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
    const ggml_type type_K;
    const ggml_type type_V;
    const int64_t hidden;              // percentage of masked cells, of empty lists
    const bool by_head;                // each query head has a list of its own
    const int64_t n_inf;               // cells from the first on whose logit is -INFINITY

    ggml_tensor * q    = nullptr;
    ggml_tensor * k    = nullptr;
    ggml_tensor * v    = nullptr;
    ggml_tensor * idx  = nullptr; // or
    ggml_tensor * mask = nullptr;
    ggml_tensor * seen = nullptr; // mask of each head, tests only
    ggml_tensor * s    = nullptr;

    std::string vars() override {
        return VARS_TO_STR14(hsk, hsv, nh, nr23, kv, nb, n_fac, sinks, logit_softcap, type_K, type_V, hidden, by_head, n_inf);
    }

    test_fasa_attend(int64_t hsk, int64_t hsv, int64_t nh, std::array<int64_t, 2> nr23, int64_t kv, int64_t nb,
                     int64_t n_fac, bool sinks = false, float logit_softcap = 0.0f, ggml_type type_K = GGML_TYPE_F16,
                     ggml_type type_V = GGML_TYPE_F16, int64_t hidden = 10, bool by_head = false, int64_t n_inf = 0)
        : hsk(hsk), hsv(hsv), nh(nh), nr23(nr23), kv(kv), nb(nb), n_fac(n_fac), sinks(sinks),
          logit_softcap(logit_softcap), type_K(type_K), type_V(type_V), hidden(hidden), by_head(by_head), n_inf(n_inf) {}

    int64_t n_sharing() const { return by_head ? 1 : nr23[0]; } // query heads
    int64_t n_lists()   const { return nh*nr23[0]/n_sharing(); } // of a token

    double max_err(ggml_backend_t backend) override { return attention_max_err(backend); }

    double err_twin(const std::vector<float> & twin, const float * res, size_t n) override { return nmse_of_twin(twin, res, n); }

    // the rows that are read
    size_t op_size(ggml_tensor * t) override {
        const int64_t n_rows = idx ? ggml_nelements(idx) : nh*kv*nr23[1];
        return ggml_nbytes(t) + ggml_nbytes(q) + ggml_nbytes(idx ? idx : mask) + n_rows*(ggml_row_size(type_K, hsk) + ggml_row_size(type_V, hsv));
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const float scale = 1.0f/sqrtf(hsk);

        q   = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, hsk, nh*nr23[0], nb, nr23[1]);
        k   = view_cells(ctx, ggml_new_tensor_4d(ctx, type_K, hsk, nh, kv + 7, nr23[1]), 2, kv);
        v   = view_cells(ctx, ggml_new_tensor_4d(ctx, type_V, hsv, nh, kv + 7, nr23[1]), 2, kv);
        s   = sinks ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, nh*nr23[0]) : nullptr;

        if (n_fac) {
            idx  = ggml_new_tensor_4d(ctx, GGML_TYPE_I32, n_fac, n_lists(), nb, nr23[1]);
        } else {
            mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, kv, nb + 1, 1, nr23[1]);
        }

        ggml_tensor * out = ggml_fasa_attend(ctx, q, k, v, idx, mask, s, scale, logit_softcap);

        if (is_compared()) {
            seen = mask ? mask : ggml_new_tensor_4d(ctx, GGML_TYPE_F16, kv, nb, nh*nr23[0], nr23[1]);

            // not by ggml_cast, whose node is its own source: a copy of the graph loses that
            const auto to_f32 = [&](ggml_tensor * t) { return ggml_cpy(ctx, t, ggml_new_tensor(ctx, GGML_TYPE_F32, 4, t->ne)); };

            ggml_tensor * k_f32 = ggml_permute(ctx, to_f32(k), 0, 2, 1, 3);
            ggml_tensor * v_f32 = ggml_permute(ctx, to_f32(v), 1, 2, 0, 3);

            ggml_tensor * kq = ggml_scale(ctx, ggml_mul_mat(ctx, k_f32, ggml_permute(ctx, q, 0, 2, 1, 3)), scale);
            if (logit_softcap != 0.0f) {
                kq = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, 1.0f/logit_softcap)), logit_softcap);
            }
            kq = ggml_soft_max_ext(ctx, kq, seen, 1.0f, 0.0f);
            ggml_soft_max_add_sinks(kq, s);

            ggml_tensor * kqv = ggml_mul_mat(ctx, ggml_cont(ctx, v_f32), kq);

            compare(out, ggml_cont(ctx, ggml_permute(ctx, kqv, 0, 2, 1, 3)));
        }
        return out;
    }

    void set_infinite() {
        const float   one = 1.0f;
        const float   infinite = -INFINITY;
        uint8_t       element[sizeof(float)];
        round_to_type(type_K, &infinite, 1, element);

        for (int64_t i = 0; i < ggml_nrows(q); ++i) {
            ggml_backend_tensor_set(q, &one, i*q->nb[1], sizeof(one));
        }
        for (int64_t is = 0; is < nr23[1]; ++is) {
            for (int64_t i = 0; i < n_inf*nh; ++i) {
                ggml_backend_tensor_set(k->view_src, element, is*k->nb[3] + i*k->nb[1], ggml_type_size(type_K));
            }
        }
    }

    void initialize_tensors(ggml_context * ctx) override {
        GGML_UNUSED(ctx);
        std::mt19937 rng;

        // logits that matter, to sinks and the softcap as well
        set_uniform(q, 10.0f, rng);
        set_uniform(k->view_src, 1.0f, rng);
        set_uniform(v->view_src, 1.0f, rng);
        if (n_inf) {
            set_infinite();
        }
        if (s) {
            set_uniform(s, 10.0f, rng);
        }
        set_sentinels();

        if (mask) {
            set_mask(mask, nb, hidden, rng);
            return;
        }

        // -1 at the end, where select writes it, or anywhere
        std::vector<int32_t> ids;
        std::vector<int32_t> cells(kv);
        std::iota(cells.begin(), cells.end(), 0);
        for (int64_t il = 0; il < n_lists()*nb*nr23[1]; ++il) {
            const int64_t n = fasa_random(rng, 1, 100) <= hidden ? 0 : n_fac - il % std::min<int64_t>(n_fac, 3);

            std::vector<int32_t> list(n);
            std::sample(cells.begin(), cells.end(), list.begin(), n, rng);
            while ((int64_t) list.size() < n_fac) {
                list.insert(il % 2 ? list.end() : list.begin() + fasa_random(rng, 0, list.size()), -1);
            }
            ids.insert(ids.end(), list.begin(), list.end());
        }
        set(idx, ids);

        if (seen) {
            std::vector<ggml_fp16_t> data(ggml_nelements(seen), ggml_fp32_to_fp16(-INFINITY));
            for (size_t i = 0; i < ids.size(); ++i) {
                const int64_t ih = i/n_fac % n_lists();
                const int64_t it = i/n_fac/n_lists() % nb;
                const int64_t is = i/n_fac/n_lists()/nb;
                for (int64_t ig = 0; ig < n_sharing() && ids[i] >= 0; ++ig) {
                    data[((is*nh*nr23[0] + ih*n_sharing() + ig)*nb + it)*kv + ids[i]] = ggml_fp32_to_fp16(0.0f);
                }
            }
            set(seen, data);
        }
    }
};

// FASA_SELECT and FASA_ATTEND as a decode step has them, one right behind the other, which a backend may compute in one launch
// twin: the same with a list that is wanted, so the ops stay two, each of which has its own twin above
struct test_fasa_decode : public test_fasa {
    const int64_t hsk;                 // K and V head size
    const int64_t nh;                  // num KV heads
    const std::array<int64_t, 2> nr23; // query heads of a group, streams
    const int64_t kv;                  // cells in view
    const int64_t nb;                  // batch size
    const int64_t n_dim;
    const int64_t n_fac;
    const int64_t n_forced;
    const bool sinks;
    const float logit_softcap;
    const ggml_type type_K;
    const ggml_type type_V;
    const int64_t hidden;              // percentage of masked cells
    const bool by_head;                // each query head has a list of its own
    const bool ties;                   // many cells have the same key

    ggml_tensor * q      = nullptr;
    ggml_tensor * keys   = nullptr;
    ggml_tensor * idxs   = nullptr;
    ggml_tensor * k      = nullptr;
    ggml_tensor * v      = nullptr;
    ggml_tensor * dims   = nullptr;
    ggml_tensor * ranges = nullptr;
    ggml_tensor * mask   = nullptr;
    ggml_tensor * forced = nullptr;
    ggml_tensor * s      = nullptr;

    std::string vars() override {
        return VARS_TO_STR15(hsk, nh, nr23, kv, nb, n_dim, n_fac, n_forced, sinks, logit_softcap, type_K, type_V, hidden, by_head, ties);
    }

    test_fasa_decode(int64_t hsk, int64_t nh, std::array<int64_t, 2> nr23, int64_t kv, int64_t nb, int64_t n_dim, int64_t n_fac,
                     int64_t n_forced = 0, bool sinks = false, float logit_softcap = 0.0f, ggml_type type_K = GGML_TYPE_F16,
                     ggml_type type_V = GGML_TYPE_F16, int64_t hidden = 10, bool by_head = false, bool ties = false)
        : hsk(hsk), nh(nh), nr23(nr23), kv(kv), nb(nb), n_dim(n_dim), n_fac(n_fac), n_forced(n_forced), sinks(sinks),
          logit_softcap(logit_softcap), type_K(type_K), type_V(type_V), hidden(hidden), by_head(by_head), ties(ties) {}

    double max_err(ggml_backend_t backend) override { return attention_max_err(backend); }

    double err_twin(const std::vector<float> & twin, const float * res, size_t n) override { return nmse_of_twin(twin, res, n); }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const float   scale      = 1.0f/sqrtf(hsk);
        const int64_t n_head_sel = by_head ? nh*nr23[0] : nh;

        ggml_tensor * tips = ggml_fasa_new_tips(ctx, kv, n_dim, nh, nr23[1]);

        q      = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, hsk, nh*nr23[0], nb, nr23[1]);
        keys   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, hsk, nh, kv*nr23[1]);
        idxs   = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, kv*nr23[1]);
        k      = view_cells(ctx, ggml_new_tensor_4d(ctx, type_K, hsk, nh, kv + 7, nr23[1]), 2, kv);
        v      = view_cells(ctx, ggml_new_tensor_4d(ctx, type_V, hsk, nh, kv + 7, nr23[1]), 2, kv);
        dims   = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_dim, nh);
        ranges = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_dim, 2, nh);
        mask   = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, kv, nb, 1, nr23[1]);
        forced = n_forced ? ggml_new_tensor_3d(ctx, GGML_TYPE_I32, n_forced, nb, nr23[1]) : nullptr;
        s      = sinks ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, nh*nr23[0]) : nullptr;

        const auto build = [&](bool is_apart) {
            ggml_tensor * store  = ggml_fasa_store(ctx, tips, keys, dims, ranges, idxs, GGML_TYPE_F32);
            ggml_tensor * select = ggml_fasa_select(ctx, q, view_cells(ctx, store, 1, kv/ggml_fasa_cells_per_block()), dims, ranges, mask, forced, n_head_sel, n_fac, scale);
            if (is_apart) {
                ggml_set_output(select); // somebody wants the list: no backend may leave it out
            }
            return ggml_fasa_attend(ctx, q, k, v, select, nullptr, s, scale, logit_softcap);
        };
        ggml_tensor * out = build(false);
        if (is_compared()) {
            compare(out, ggml_cont(ctx, build(true)));
        }
        return out;
    }

    void initialize_tensors(ggml_context * ctx) override {
        std::mt19937 rng;

        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            if (t->type == GGML_TYPE_I8) {
                set(t, std::vector<uint8_t>(ggml_nbytes(t)));
            }
        }
        set_sentinels();
        set_uniform(q, 10.0f, rng);
        set_uniform(keys, 1.0f, rng);
        set_uniform(k->view_src, 1.0f, rng);
        set_uniform(v->view_src, 1.0f, rng);
        if (s) {
            set_uniform(s, 10.0f, rng);
        }
        if (ties) {
            std::vector<float> data(ggml_nelements(keys));
            for (size_t i = 0; i < data.size(); ++i) {
                data[i] = (float) (i % hsk % 5) - (i/(hsk*nh) % 3 == 0);
            }
            set(keys, data);
        }
        std::vector<int64_t> cells(kv*nr23[1]);
        std::iota(cells.begin(), cells.end(), 0);
        set(idxs, cells);

        std::vector<int32_t> ids;
        for (int64_t ih = 0; ih < nh; ++ih) {
            std::vector<int32_t> all(hsk);
            std::iota(all.begin(), all.end(), 0);
            std::shuffle(all.begin(), all.end(), rng);
            ids.insert(ids.end(), all.begin(), all.begin() + n_dim);
        }
        set(dims, ids);
        std::vector<float> values(ggml_nelements(ranges));
        for (size_t i = 0; i < values.size(); ++i) {
            values[i] = i/n_dim % 2 ? 0.125f : fasa_random(rng, -10, 10)/40.0f; // keys are from -1 to 1
        }
        set(ranges, values);
        set_mask(mask, nb, hidden, rng);
        if (forced) {
            std::vector<int32_t> data(ggml_nelements(forced));
            for (int32_t & id : data) {
                id = fasa_random(rng, -1, kv - 1);
            }
            set(forced, data);
        }
    }
};

// shapes that nobody thought of
static void add_test_cases_fasa_fuzz(std::vector<std::unique_ptr<test_case>> & test_cases) {
    static const ggml_type types_KV[] = {
        GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q8_0,  GGML_TYPE_Q4_0,
        GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL,
    };

    std::mt19937 rng;
    const auto random  = [&](int64_t min, int64_t max) { return fasa_random(rng, min, max); };
    const auto hs      = [&] { return std::array<int64_t, 5>{ 64, 80, 96, 128, 256 }[random(0, 4)]; };
    const auto type_KV = [&](int64_t hs) {
        const ggml_type type = types_KV[random(0, 8)];
        return hs % ggml_blck_size(type) == 0 ? type : GGML_TYPE_F16;
    };
    const auto hidden  = [&] { return std::array<int64_t, 6>{ 0, 10, 10, 50, 97, 100 }[random(0, 5)]; };

    for (int i = 0; i < 200; ++i) {
        const int64_t hsk = hs();
        const int64_t nh  = random(1, 3);
        const std::array<int64_t, 2> nr23 = { random(1, 16), random(1, 2) };
        const int64_t kv       = 32*random(1, 8);
        const int64_t nb       = random(1, 3);
        const int64_t n_dim    = random(0, 1) ? 16 + hsk/8 : 2*random(1, hsk/2);
        const int64_t n_fac    = random(1, kv);
        const int64_t n_forced = random(0, std::min<int64_t>(n_fac, 12));
        const int64_t n_store  = random(0, 3) ? 0 : random(1, kv);
        const int64_t n_hidden = hidden();
        const ggml_type type_k = types_KV[random(0, 2)];
        const bool by_head = random(0, 3) == 0;
        const bool cached  = random(0, 1);
        test_cases.emplace_back(new test_fasa_select(hsk, nh, nr23, kv, nb, n_dim, n_fac, n_forced, n_store, n_hidden, type_k, by_head, cached));
    }

    for (int i = 0; i < 300; ++i) {
        const int64_t hsk = hs();
        const int64_t hsv = random(0, 2) ? hsk : hs();
        const int64_t nh  = random(1, 3);
        const std::array<int64_t, 2> nr23 = { random(1, 16), random(1, 2) };
        const int64_t kv    = random(1, 160);
        const int64_t nb    = random(1, 3);
        const int64_t n_fac = random(0, 2) ? random(1, kv) : 0;
        const bool    sinks = random(0, 1);
        const float   logit_softcap = random(0, 1) ? 0.0f : random(3, 30);
        const ggml_type type_K = type_KV(hsk);
        const ggml_type type_V = type_KV(hsv);
        const int64_t n_hidden = hidden();
        const bool by_head = n_fac && random(0, 3) == 0;
        test_cases.emplace_back(new test_fasa_attend(hsk, hsv, nh, nr23, kv, nb, n_fac, sinks, logit_softcap, type_K, type_V, n_hidden, by_head));
    }
}

static void add_test_cases_fasa_decode(std::vector<std::unique_ptr<test_case>> & test_cases) {
    for (int64_t nb : { 1, 3 }) {
        for (std::array<int64_t, 2> nr23 : { std::array<int64_t, 2>{ 1, 1 }, { 3, 1 }, { 7, 2 }, { 12, 1 } }) {
            for (bool by_head : { false, true }) {
                test_cases.emplace_back(new test_fasa_decode( 64, 2, nr23,  512, nb, 24,  100, 12, false, 0.0f, GGML_TYPE_F16, GGML_TYPE_F16, 10, by_head));
                test_cases.emplace_back(new test_fasa_decode(128, 1, nr23, 1056, nb, 32,  256, 0, true,  5.0f, GGML_TYPE_F16, GGML_TYPE_F16, 10, by_head));
            }
            test_cases.emplace_back(new test_fasa_decode(256, 1, nr23, 256, nb, 48, 256, 1));
            test_cases.emplace_back(new test_fasa_decode( 80, 1, nr23, 512, nb, 26,  64, 5));
            test_cases.emplace_back(new test_fasa_decode( 64, 1, nr23, 512, nb, 24,  64, 5, false, 0.0f, GGML_TYPE_F16, GGML_TYPE_F16, 10, false, true));
        }
    }
    for (ggml_type type_K : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        for (ggml_type type_V : { GGML_TYPE_F16, GGML_TYPE_Q8_0, type_K }) {
            test_cases.emplace_back(new test_fasa_decode(64, 2, { 4, 1 }, 512, 1, 24, 100, 12, false, 0.0f, type_K, type_V));
        }
    }
    for (int64_t hidden : { 0, 97, 100 }) {
        test_cases.emplace_back(new test_fasa_decode(64, 2, { 4, 1 }, 512, 2, 24, 100, 12, true, 0.0f, GGML_TYPE_F16, GGML_TYPE_F16, hidden));
    }
    // scores that no shared memory holds; more candidates than threads
    test_cases.emplace_back(new test_fasa_decode(64, 2, { 4, 1 }, 66080, 1, 24, 700, 36));
    test_cases.emplace_back(new test_fasa_decode(64, 1, { 4, 1 },  8192, 1, 24, 1000, 36, false, 0.0f, GGML_TYPE_F16, GGML_TYPE_F16, 10, false, true));
    test_cases.emplace_back(new test_fasa_decode(64, 1, { 1, 1 },  8192, 1, 24, 5000, 36));
}

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
    for (ggml_type type_k : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16 }) {
        for (int64_t n_store : { 0, 1, 100 }) {
            test_cases.emplace_back(new test_fasa_store( 80, 3, { 3, 2 }, 256, 2, 26, 64, 0, n_store, 10, type_k, false, true));
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
                    test_cases.emplace_back(new test_fasa_attend( 64,  64, 3, nr23, 257, nb,   0, sinks, logit_softcap));
                }
            }
        }
    }

    // more cells than heads: what can only be shared out by cells
    for (ggml_type type_KV : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (int64_t n_fac : { 0, 4097 }) {
            for (std::array<int64_t, 2> nr23 : { std::array<int64_t, 2>{ 1, 1 }, { 7, 1 } }) {
                test_cases.emplace_back(new test_fasa_attend( 64,  64, 1, nr23, 5003, 1, n_fac, true,  0.0f, type_KV, type_KV));
                test_cases.emplace_back(new test_fasa_attend(128, 128, 1, nr23, 4999, 1, n_fac, false, 0.0f, type_KV, type_KV));
            }
        }
    }
    test_cases.emplace_back(new test_fasa_select( 64, 1, { 1, 1 }, 8192, 1, 24, 512, 12));
    test_cases.emplace_back(new test_fasa_select(128, 1, { 7, 1 }, 8192, 1, 32, 512, 12));
    // so long that what works on a part of the cells has to take several turns
    test_cases.emplace_back(new test_fasa_select( 64, 1, { 4, 1 }, 66080, 1, 24, 700, 12));
    test_cases.emplace_back(new test_fasa_select( 64, 1, { 1, 1 }, 66080, 2, 24, 700, 12, 3000));

    // logits of -INFINITY, of all cells of a thread or of all; scores that f32 would not hold
    for (ggml_type type_K : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16 }) {
        for (int64_t n_fac : { 0, 400 }) {
            for (int64_t n_inf : { 300, 600 }) {
                for (bool sinks : { false, true }) {
                    test_cases.emplace_back(new test_fasa_attend(64, 64, 2, { 4, 2 }, 600, 2, n_fac, sinks, 0.0f, type_K, GGML_TYPE_F16, 10, false, n_inf));
                }
            }
        }
    }
    for (int exponent : { -60, 60, 120 }) {
        test_cases.emplace_back(new test_fasa_select(64, 2, { 4, 2 }, 1024, 2, 24, 200, 12, 0, 10, GGML_TYPE_F16, true, false, ldexpf(1.0f, exponent)));
        test_cases.emplace_back(new test_fasa_select(64, 2, { 1, 1 }, 1024, 1, 24, 950,  0, 0, 10, GGML_TYPE_F16, false, false, ldexpf(1.0f, exponent)));
    }

    add_test_cases_fasa_decode(test_cases);
    add_test_cases_fasa_fuzz(test_cases);
}

static void add_test_cases_fasa_perf(std::vector<std::unique_ptr<test_case>> & test_cases) {
    // one decoded token of SmolLM2-135M and of Llama-3-8B
    for (int64_t kv : { 4096, 32768 }) {
        test_cases.emplace_back(new test_fasa_store ( 64, 3, { 3, 1 }, kv, 1, 24, 512, 0, 1));
        test_cases.emplace_back(new test_fasa_store (128, 8, { 4, 1 }, kv, 1, 32, 512, 0, 1));
        test_cases.emplace_back(new test_fasa_store (128, 8, { 4, 1 }, kv, 1, 32, 512, 0, 1, 10, GGML_TYPE_F16, false, true));
        test_cases.emplace_back(new test_fasa_select( 64, 3, { 3, 1 }, kv, 1, 24, 512));
        test_cases.emplace_back(new test_fasa_select(128, 8, { 4, 1 }, kv, 1, 32, 512));
        test_cases.emplace_back(new test_fasa_attend( 64,  64, 3, { 3, 1 }, kv, 1, 512));
        test_cases.emplace_back(new test_fasa_attend(128, 128, 8, { 4, 1 }, kv, 1, 512));
        test_cases.emplace_back(new test_fasa_attend( 64,  64, 3, { 3, 1 }, kv, 1, 0));
        test_cases.emplace_back(new test_fasa_attend(128, 128, 8, { 4, 1 }, kv, 1, 0));
    }
}
