// FASA_ATTEND in test-backend-ops, alone and behind FASA_SELECT.

#pragma once

#include "test-backend-ops-fasa-select.h"

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

    // cells that the mask shows
    virtual bool is_part() const { return false; }
    virtual void leave_out(ggml_context * ctx, ggml_tensor * out) { GGML_UNUSED(ctx); GGML_UNUSED(out); }

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
        leave_out(ctx, out);

        if (is_compared()) {
            seen = mask && !is_part() ? mask : ggml_new_tensor_4d(ctx, GGML_TYPE_F16, kv, nb, nh*nr23[0], nr23[1]);

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

// GGML_OP_FASA_ATTEND with tips: some blocks of cells matter to a KV head, by queries of their own, and none else does
// twin: as above, with all masked that is not in these blocks nor in those that are always attended to
struct test_fasa_attend_blocks : public test_fasa_attend {
    // as in ggml_kernels/cpu/fasa-attend.h
    static constexpr int64_t BLOCK     = 64;  // cells
    static constexpr int64_t TILE_ROWS = 144; // query heads

    const int64_t n_dim;
    const float   mass; // >= 1: all blocks

    ggml_tensor * keys   = nullptr;
    ggml_tensor * q_tip  = nullptr;
    ggml_tensor * dims   = nullptr;
    ggml_tensor * ranges = nullptr;
    ggml_tensor * idxs   = nullptr;

    std::string vars() override { return test_fasa_attend::vars() + "," + VARS_TO_STR2(n_dim, mass); }

    // hidden: percentage of blocks of which nothing is visible
    test_fasa_attend_blocks(int64_t hsk, int64_t hsv, int64_t nh, std::array<int64_t, 2> nr23, int64_t kv, int64_t nb, int64_t n_dim, float mass,
                            bool sinks = false, float logit_softcap = 0.0f, ggml_type type_KV = GGML_TYPE_F16, int64_t hidden = 0)
        : test_fasa_attend(hsk, hsv, nh, nr23, kv, nb, 0, sinks, logit_softcap, type_KV, type_KV, hidden), n_dim(n_dim), mass(mass) {}

    bool is_part() const override { return true; }

    void leave_out(ggml_context * ctx, ggml_tensor * out) override {
        ggml_tensor * tips = ggml_fasa_new_tips(ctx, kv, n_dim, nh, nr23[1]);
        ggml_set_name(tips, "tips");

        keys   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, hsk, nh, kv*nr23[1]);
        q_tip  = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, hsk, nh*nr23[0], nb, nr23[1]);
        idxs   = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, kv*nr23[1]);
        dims   = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_dim, nh);
        ranges = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_dim, 2, nh);

        ggml_fasa_attend_set_tips(out, q_tip, ggml_fasa_store(ctx, tips, keys, dims, ranges, idxs, GGML_TYPE_F32), dims, ranges, mass);
    }

    bool is_important(int64_t is, int64_t ih, int64_t block) const { return (block + ih + is) % 3 == 0; }

    void initialize_tensors(ggml_context * ctx) override {
        test_fasa_attend::initialize_tensors(ctx);

        std::mt19937 rng(1);

        set(ggml_get_tensor(ctx, "tips"), std::vector<uint8_t>(ggml_nbytes(ggml_get_tensor(ctx, "tips"))));

        std::vector<int64_t> cells(kv*nr23[1]);
        std::iota(cells.begin(), cells.end(), 0);
        set(idxs, cells);

        std::vector<int32_t> ids;
        for (int64_t ih = 0; ih < nh; ++ih) {
            for (int64_t i = 0; i < n_dim; ++i) {
                ids.push_back((i + ih) % hsk);
            }
        }
        set(dims, ids);

        std::vector<float> centres_and_steps(ggml_nelements(ranges));
        for (size_t i = 0; i < centres_and_steps.size(); ++i) {
            centres_and_steps[i] = i/n_dim % 2 ? 0.125f : 0.0f;
        }
        set(ranges, centres_and_steps);

        // keys of the greatest levels where a block matters, else of the least: what is left out has no attention by their scores
        std::vector<float> values(ggml_nelements(keys));
        for (size_t i = 0; i < values.size(); ++i) {
            const int64_t cell = i/(hsk*nh);
            values[i] = is_important(cell/kv, i/hsk % nh, cell % kv/BLOCK) ? 1.0f : -1.0f;
        }
        set(keys, values);

        std::vector<float> queries(ggml_nelements(q_tip));
        for (float & x : queries) {
            x = 1000.0f/n_dim*fasa_random(rng, 5, 10);
        }
        set(q_tip, queries);

        // what a sequence sees of its cache, but for some blocks
        std::vector<char> is_visible(kv*(nb + 1)*nr23[1]);
        for (size_t i = 0; i < is_visible.size(); ++i) {
            const int64_t cell = i % kv;
            const int64_t it   = i/kv % (nb + 1);
            const int64_t is   = i/kv/(nb + 1);
            is_visible[i] = cell <= kv - kv/8 - nb + it && (cell/BLOCK*37 + is*11) % 100 >= hidden;
        }
        std::vector<ggml_fp16_t> data(is_visible.size());
        const auto to_mask = [](bool x) { return ggml_fp32_to_fp16(x ? 0.0f : -INFINITY); };
        std::transform(is_visible.begin(), is_visible.end(), data.begin(), to_mask);
        set(mask, data);

        if (!seen) {
            return;
        }
        const int64_t n_tile   = std::max<int64_t>(TILE_ROWS/nr23[0], 1);
        const int64_t n_blocks = (kv + BLOCK - 1)/BLOCK;

        std::vector<ggml_fp16_t> data_seen(ggml_nelements(seen), to_mask(false));
        for (int64_t is = 0; is < nr23[1]; ++is) {
            const char * visible = is_visible.data() + is*(nb + 1)*kv;

            for (int64_t it = 0; it < nb; ++it) {
                const int64_t it0 = it/n_tile*n_tile;
                const int64_t it1 = std::min(it0 + n_tile, nb);

                // share of a block's pairs of a token and a cell
                std::vector<float> share(n_blocks + 1);
                for (int64_t ib = 0; ib < n_blocks; ++ib) {
                    const int64_t end = std::min((ib + 1)*BLOCK, kv);
                    for (int64_t i = ib*BLOCK; i < end; ++i) {
                        for (int64_t jt = it0; jt < it1; ++jt) {
                            share[ib] += 1.0f/(end - ib*BLOCK)/(it1 - it0)*visible[jt*kv + i];
                        }
                    }
                }
                const auto is_some = [&](int64_t ib) { return share[ib] > 0.0f && share[ib] < 0.9999f; };
                const int64_t first = std::find_if(share.begin(), share.end(), [](float x) { return x > 0.0f; }) - share.begin();

                for (int64_t i = 0; i < kv; ++i) {
                    const int64_t ib      = i/BLOCK;
                    const bool    is_near = is_some(ib) || (ib + 1 < n_blocks && share[ib] > 0.0f && share[ib + 1] < 0.9999f);
                    for (int64_t ih = 0; ih < nh*nr23[0]; ++ih) {
                        const bool attended = mass >= 1.0f || ib == first || is_near || is_important(is, ih/nr23[0], ib);
                        data_seen[((is*nh*nr23[0] + ih)*nb + it)*kv + i] = to_mask(attended && visible[it*kv + i]);
                    }
                }
            }
        }
        set(seen, data_seen);
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
