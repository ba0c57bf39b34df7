// FASA_STORE and FASA_SELECT in test-backend-ops, and what the tests of all FASA ops share.
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
